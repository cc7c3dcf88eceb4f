//! A transaction of another database is refused before anything runs.
use postbox::{Envelope, Postbox, Sqlite};

async fn publish(postbox: Postbox<Sqlite>, pool: sqlx::PgPool) {
    let mut tx = pool.begin().await.unwrap();
    postbox.publish(&mut tx, Envelope::json("t", &1)).await.unwrap();
}

fn main() {}
