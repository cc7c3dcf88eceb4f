//! Commit, rollback, begin and close are not there to call on a handler's `Tx`.
use postbox::{Failure, Postgres, Tx};

async fn commits(tx: Tx<Postgres>) -> Result<(), Failure> {
    tx.commit().await?;
    Ok(())
}

async fn rolls_back(tx: Tx<Postgres>) -> Result<(), Failure> {
    tx.rollback().await?;
    Ok(())
}

async fn begins(mut tx: Tx<Postgres>) -> Result<(), Failure> {
    tx.begin().await?;
    Ok(())
}

async fn closes(tx: Tx<Postgres>) -> Result<(), Failure> {
    tx.close().await?;
    Ok(())
}

fn main() {}
