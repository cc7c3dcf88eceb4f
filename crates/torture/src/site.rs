//! What the two databases need said differently: connections, and SQL whose rows come back as texts.

use std::future::Future;
use std::time::Duration;

use postbox::{Database, Postgres, Sqlite, Tx};
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, Pool, Row};

use crate::fault::Kind;

/// A row, column by column.
pub(crate) type Texts = Vec<Option<String>>;

/// A database that is tortured. All SQL goes as simple queries, so that any pooler passes it on.
pub(crate) trait Site: Database {
    const KIND: Kind;

    /// A pool of plain connections, made when they are needed.
    fn pool(url: &str, size: u32, busy: Duration) -> Result<Pool<Self>, sqlx::Error>;

    /// Runs statements; how many rows they touched.
    fn run(connection: &mut Self::Connection, sql: String) -> impl Future<Output = Result<u64, sqlx::Error>> + Send;

    /// Reads rows of texts.
    fn rows(
        connection: &mut Self::Connection,
        sql: String,
    ) -> impl Future<Output = Result<Vec<Texts>, sqlx::Error>> + Send;

    /// A connection from a pool.
    fn acquire(pool: &Pool<Self>) -> impl Future<Output = Result<PoolConnection<Self>, sqlx::Error>> + Send {
        let pool = pool.clone();
        async move { pool.acquire().await }
    }

    /// The handler's own connection.
    fn within(tx: &mut Tx<Self>) -> &mut Self::Connection {
        tx.unsafe_connection()
    }

    /// How a transaction that will write begins.
    const BEGIN: &'static str;

    /// The database's clock in milliseconds, as an expression.
    const CLOCK: &'static str;

    /// A table of the torture's own, and one of postbox's.
    fn table(name: &str) -> String;
    fn postbox(name: &str) -> String;
}

/// The schema of postbox's tables on PostgreSQL.
pub(crate) const SCHEMA: &str = "postbox";

macro_rules! statements {
    () => {
        async fn run(connection: &mut Self::Connection, sql: String) -> Result<u64, sqlx::Error> {
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(|done| done.rows_affected())
        }

        async fn rows(connection: &mut Self::Connection, sql: String) -> Result<Vec<Texts>, sqlx::Error> {
            let rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await?;
            rows.iter()
                .map(|row| (0..row.columns().len()).map(|i| row.try_get_unchecked::<Option<String>, _>(i)).collect())
                .collect()
        }
    };
}

impl Site for Postgres {
    const KIND: Kind = Kind::Postgres;
    const BEGIN: &'static str = "BEGIN";
    const CLOCK: &'static str = "(extract(epoch from clock_timestamp()) * 1000)::bigint";

    fn pool(url: &str, size: u32, busy: Duration) -> Result<Pool<Postgres>, sqlx::Error> {
        let options: sqlx::postgres::PgConnectOptions = url.parse()?;
        let pool = sqlx::postgres::PgPoolOptions::new().max_connections(size).acquire_timeout(busy);
        Ok(pool.connect_lazy_with(options.statement_cache_capacity(0)))
    }

    statements!();

    fn table(name: &str) -> String {
        format!("torture.{name}")
    }

    fn postbox(name: &str) -> String {
        format!("{SCHEMA}.{name}")
    }
}

impl Site for Sqlite {
    const KIND: Kind = Kind::Sqlite;
    const BEGIN: &'static str = "BEGIN IMMEDIATE";
    const CLOCK: &'static str = "cast(unixepoch('subsec') * 1000 as integer)";

    fn pool(url: &str, size: u32, busy: Duration) -> Result<Pool<Sqlite>, sqlx::Error> {
        let options: sqlx::sqlite::SqliteConnectOptions = url.parse()?;
        let pool = sqlx::sqlite::SqlitePoolOptions::new().max_connections(size).acquire_timeout(busy);
        Ok(pool.connect_lazy_with(options.busy_timeout(busy).synchronous(sqlx::sqlite::SqliteSynchronous::Full)))
    }

    statements!();

    fn table(name: &str) -> String {
        format!("torture_{name}")
    }

    fn postbox(name: &str) -> String {
        format!("postbox_{name}")
    }
}

/// The one number of a query.
pub(crate) fn number(rows: &[Texts]) -> i64 {
    rows.first().and_then(|row| row.first()).and_then(Clone::clone).and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// A connection with an open transaction. Dropped before its end, it is closed: nothing half done
/// goes back to the pool, wherever a future was dropped.
pub(crate) struct Session<Db: Site> {
    connection: PoolConnection<Db>,
    over: bool,
}

impl<Db: Site> Session<Db> {
    pub(crate) async fn begin(pool: &Pool<Db>, begin: &str) -> Result<Session<Db>, sqlx::Error> {
        let connection = Db::acquire(pool).await?;
        let mut session = Session { connection, over: false };
        session.run(begin).await?;
        Ok(session)
    }

    pub(crate) fn on(&mut self) -> &mut PoolConnection<Db> {
        &mut self.connection
    }

    pub(crate) async fn run(&mut self, sql: impl Into<String>) -> Result<u64, sqlx::Error> {
        Db::run(&mut self.connection, sql.into()).await
    }

    /// Commits, or rolls back; a connection that could not do it is closed.
    pub(crate) async fn end(mut self, how: &str) -> Result<(), sqlx::Error> {
        self.run(how).await?;
        self.over = true;
        Ok(())
    }
}

impl<Db: Site> Drop for Session<Db> {
    fn drop(&mut self) {
        if !self.over {
            self.connection.close_on_drop();
        }
    }
}

/// The database says that its disk is full, and refuses this statement or COMMIT. PostgreSQL says the same
/// when it goes down with it: then more may have happened.
pub(crate) fn is_refused_as_full(error: &sqlx::Error) -> bool {
    use sqlx::postgres::{PgDatabaseError, PgSeverity};
    let severity =
        error.as_database_error().and_then(|e| e.try_downcast_ref::<PgDatabaseError>()).map(|e| e.severity());
    matches!(code(error).as_deref(), Some("53100" | "13"))
        && severity.is_none_or(|severity| severity == PgSeverity::Error)
}

/// The state of a database error, if it is one.
pub(crate) fn code(error: &sqlx::Error) -> Option<String> {
    error.as_database_error().and_then(|e| e.code()).map(|code| code.into_owned())
}
