use postbox::{Batch, Operation, OperationFailure, Receipt, Router, Sqlite, operation};

async fn charge(_: Operation) -> Result<Receipt, OperationFailure> {
    Ok(Receipt::none())
}

async fn charge_all(_: Batch<i64>, _: Operation) -> Result<Receipt, OperationFailure> {
    Ok(Receipt::none())
}

fn main() {
    let _ = Router::<Sqlite>::new().on_batch("orders.placed", operation(charge));
    let _ = Router::<Sqlite>::new().on_batch("orders.placed", charge_all);
}
