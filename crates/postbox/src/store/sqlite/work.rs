//! Transactions that never go back to their pool half done.

use sqlx::pool::PoolConnection;
use sqlx::{Sqlite, SqliteConnection, SqlitePool};

use crate::error::Error;
use crate::store::HandlerTx;

/// A transaction of the store's own. Dropped before its commit, it closes its connection: no open
/// transaction goes back to the pool, and the write lock is let go.
#[derive(Debug)]
pub struct Work {
    connection: PoolConnection<Sqlite>,
    ended: bool,
}

impl Work {
    /// Takes the write lock at once: a transaction that reads first may not get it later.
    pub(super) async fn write(pool: &SqlitePool) -> Result<Work, Error> {
        Self::begin(pool, "BEGIN IMMEDIATE").await
    }

    /// One snapshot for several reads.
    pub(super) async fn read(pool: &SqlitePool) -> Result<Work, Error> {
        Self::begin(pool, "BEGIN").await
    }

    async fn begin(pool: &SqlitePool, statement: &'static str) -> Result<Work, Error> {
        let connection = pool.acquire().await.map_err(|error| match error {
            // The one writer is somebody's in this process, as it could be another process's.
            sqlx::Error::PoolTimedOut => Error::Busy(error),
            error => Error::from(error),
        })?;
        let mut work = Work { connection, ended: false };
        sqlx::query(statement).execute(work.on()).await?;
        Ok(work)
    }

    pub(super) fn on(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }

    pub(super) async fn commit(mut self) -> Result<(), Error> {
        sqlx::query("COMMIT").execute(self.on()).await?;
        self.ended = true;
        Ok(())
    }

    pub(super) async fn rollback(mut self) -> Result<(), Error> {
        sqlx::query("ROLLBACK").execute(self.on()).await?;
        self.ended = true;
        Ok(())
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !self.ended {
            self.connection.close_on_drop();
        }
    }
}

impl HandlerTx<Sqlite> for Work {
    fn connection(&mut self) -> &mut SqliteConnection {
        self.on()
    }
}
