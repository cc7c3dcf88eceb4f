//! Transactions that never go back to their pool half done.

use std::time::Duration;

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
    /// Its commit does not wait for the disk.
    light: bool,
}

impl Work {
    /// Takes the write lock at once: a transaction that reads first may not get it later.
    pub(super) async fn write(pool: &SqlitePool) -> Result<Work, Error> {
        Self::begin(pool, "BEGIN IMMEDIATE").await
    }

    /// The same for what may be lost when the machine stops, because it means nothing after that. What
    /// is committed next by anybody takes it to the disk, too.
    pub(super) async fn write_lightly(pool: &SqlitePool) -> Result<Work, Error> {
        let mut work = Work { connection: acquire(pool).await?, ended: false, light: true };
        sqlx::raw_sql("PRAGMA synchronous = NORMAL; BEGIN IMMEDIATE").execute(work.on()).await?;
        Ok(work)
    }

    /// One snapshot for several reads.
    pub(super) async fn read(pool: &SqlitePool) -> Result<Work, Error> {
        Self::begin(pool, "BEGIN").await
    }

    async fn begin(pool: &SqlitePool, statement: &'static str) -> Result<Work, Error> {
        let mut work = Work { connection: acquire(pool).await?, ended: false, light: false };
        sqlx::query(statement).execute(work.on()).await?;
        Ok(work)
    }

    /// The write lock, if nobody holds it for longer than `patience`; `usual` is how long the
    /// connection waits for it otherwise.
    pub(super) async fn write_soon(
        pool: &SqlitePool,
        patience: Duration,
        usual: Duration,
    ) -> Result<Option<Work>, Error> {
        // The one writer may be somebody's in this process.
        let Ok(acquired) = tokio::time::timeout(patience, pool.acquire()).await else { return Ok(None) };
        let connection = match acquired {
            Err(sqlx::Error::PoolTimedOut) => return Ok(None),
            acquired => acquired?,
        };
        let mut work = Work { connection, ended: false, light: false };
        work.wait_for(patience).await?;
        let begun = sqlx::query("BEGIN IMMEDIATE").execute(work.on()).await.map_err(Error::from);
        work.wait_for(usual).await?;
        match begun {
            Ok(_) => Ok(Some(work)),
            Err(Error::Busy(_)) => {
                work.ended = true;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn wait_for(&mut self, patience: Duration) -> Result<(), Error> {
        let sql = format!("PRAGMA busy_timeout = {}", patience.as_millis().min(i32::MAX as u128));
        sqlx::query(sqlx::AssertSqlSafe(sql)).execute(self.on()).await?;
        Ok(())
    }

    pub(super) fn on(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }

    pub(super) async fn commit(mut self) -> Result<(), Error> {
        sqlx::query("COMMIT").execute(self.on()).await?;
        self.end().await
    }

    pub(super) async fn rollback(mut self) -> Result<(), Error> {
        sqlx::query("ROLLBACK").execute(self.on()).await?;
        self.end().await
    }

    /// The next one waits for the disk again, or gets another connection.
    async fn end(mut self) -> Result<(), Error> {
        if self.light {
            sqlx::query("PRAGMA synchronous = FULL").execute(self.on()).await?;
        }
        self.ended = true;
        Ok(())
    }
}

async fn acquire(pool: &SqlitePool) -> Result<PoolConnection<Sqlite>, Error> {
    pool.acquire().await.map_err(|error| match error {
        // The one writer is somebody's in this process, as it could be another process's.
        sqlx::Error::PoolTimedOut => Error::Busy(error),
        error => Error::from(error),
    })
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
