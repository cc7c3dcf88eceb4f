//! `Tx` is the last argument, so that the others are read before it is lent.
use postbox::{Envelope, Postgres, Router, Tx};

async fn reserve(_: Tx<Postgres>, _: Envelope) {}

fn main() {
    let _: Router<Postgres> = Router::new().on("orders.placed", reserve);
}
