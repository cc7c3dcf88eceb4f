//! What runs together shares a transaction: no operation, and not one handler alone.
use postbox::{Envelope, OperationFailure, Postgres, Receipt, Router, Tx, operation, together};

async fn reserve(_: Envelope, _: Tx<Postgres>) {}

async fn charge() -> Result<Receipt, OperationFailure> {
    Ok(Receipt::none())
}

fn main() {
    let _: Router<Postgres> = Router::new().on("orders.placed", together((reserve, operation(charge))));
    let _: Router<Postgres> = Router::new().on("orders.placed", together(reserve));
}
