//! An irreversible effect cannot be rolled back with a transaction.
use postbox::{Operation, OperationFailure, Postgres, Receipt, Router, Tx, operation};

async fn charge(_: Operation, _: Tx<Postgres>) -> Result<Receipt, OperationFailure> {
    Ok(Receipt::none())
}

fn main() {
    let _: Router<Postgres> = Router::new().on("orders.placed", operation(charge));
}
