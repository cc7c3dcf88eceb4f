//! The example's own tables, beside postbox's: the same on both databases.

use std::collections::BTreeMap;
use std::future::Future;
use std::str::FromStr;
use std::time::Duration;

use postbox::{Database, Postgres, Settings, Sqlite, Tx};
use sqlx::{AssertSqlSafe, Pool, Transaction};

use crate::Problem;
use crate::input::Counts;

/// What the tables are called: in a schema of their own, or on SQLite with a prefix of their own.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    schema: Option<String>,
}

impl Names {
    fn table(&self, name: &str) -> String {
        match &self.schema {
            Some(schema) => format!("{schema}.{name}"),
            None => format!("github_{name}"),
        }
    }
}

/// A query on text that this file wrote; `{name}` stands for a table.
fn sql(names: &Names, text: &str) -> AssertSqlSafe<String> {
    let mut text = text.to_owned();
    for table in ["repository", "audit", "account"] {
        text = text.replace(&format!("{{{table}}}"), &names.table(table));
    }
    AssertSqlSafe(text)
}

const TABLES: [&str; 3] = [
    "create table if not exists {repository} (
        name text primary key, issues bigint not null, pull_requests bigint not null)",
    "create table if not exists {audit} (event text not null, payload text not null)",
    "create table if not exists {account} (one integer primary key check (one = 1), id text not null)",
];

/// What the example does on a database of one kind.
pub(crate) trait Tables: Database {
    /// What the tables are called beside a postbox with these settings.
    fn names(settings: &Settings) -> Result<Names, Problem>;
    /// Connections of the example's own.
    fn open(settings: &Settings) -> impl Future<Output = Result<Pool<Self>, Problem>> + Send;
    /// Makes the tables, unless they are there.
    fn set_up(pool: &Pool<Self>, names: &Names) -> impl Future<Output = Result<(), Problem>> + Send;
    /// A transaction that is going to write.
    fn begin(pool: &Pool<Self>) -> impl Future<Output = sqlx::Result<Transaction<'static, Self>>> + Send;
    /// Adds to a repository's counts.
    fn count(
        tx: &mut Tx<Self>,
        names: &Names,
        repository: &str,
        more: Counts,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;
    /// Writes an event down.
    fn note(
        tx: &mut Tx<Self>,
        names: &Names,
        event: &str,
        payload: &str,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;
    /// The account at the announcement server that belongs to this database: a fresh database has a
    /// fresh one.
    fn account(pool: &Pool<Self>, names: &Names) -> impl Future<Output = sqlx::Result<String>> + Send;
    /// The counts of all repositories.
    fn counts(pool: &Pool<Self>, names: &Names) -> impl Future<Output = sqlx::Result<BTreeMap<String, Counts>>> + Send;
    /// All that was written down: event and payload.
    fn noted(pool: &Pool<Self>, names: &Names) -> impl Future<Output = sqlx::Result<Vec<(String, String)>>> + Send;
}

async fn postgres_pool(settings: &Settings) -> Result<Pool<Postgres>, Problem> {
    Ok(sqlx::postgres::PgPoolOptions::new().max_connections(2).connect_with(settings.postgres()?).await?)
}

async fn sqlite_pool(settings: &Settings) -> Result<Pool<Sqlite>, Problem> {
    let options = sqlx::sqlite::SqliteConnectOptions::from_str(settings.database_url().unwrap_or_default())?
        .busy_timeout(Duration::from_secs(30));
    Ok(sqlx::sqlite::SqlitePoolOptions::new().max_connections(2).connect_with(options).await?)
}

fn in_a_schema(settings: &Settings) -> Result<Names, Problem> {
    Ok(Names { schema: Some(format!("{}_example", settings.schema()?)) })
}

fn in_the_file(_: &Settings) -> Result<Names, Problem> {
    Ok(Names { schema: None })
}

macro_rules! tables {
    ($db:ty, $names:ident, $pool:ident, $begin:literal) => {
        impl Tables for $db {
            fn names(settings: &Settings) -> Result<Names, Problem> {
                $names(settings)
            }

            async fn open(settings: &Settings) -> Result<Pool<$db>, Problem> {
                $pool(settings).await
            }

            async fn set_up(pool: &Pool<$db>, names: &Names) -> Result<(), Problem> {
                let mut tx = Self::begin(pool).await?;
                if let Some(schema) = &names.schema {
                    // `if not exists` alone fails when two processes start at once.
                    sqlx::query("select pg_advisory_xact_lock(hashtext($1))").bind(schema).execute(&mut *tx).await?;
                    let text = format!("create schema if not exists {schema}");
                    sqlx::query(AssertSqlSafe(text)).execute(&mut *tx).await?;
                }
                for table in TABLES {
                    sqlx::query(sql(names, table)).execute(&mut *tx).await?;
                }
                tx.commit().await?;
                Ok(())
            }

            async fn begin(pool: &Pool<$db>) -> sqlx::Result<Transaction<'static, $db>> {
                pool.begin_with($begin).await
            }

            async fn count(tx: &mut Tx<$db>, names: &Names, repository: &str, more: Counts) -> sqlx::Result<()> {
                let text = "insert into {repository} as r (name, issues, pull_requests) values ($1, $2, $3)
                    on conflict (name) do update set
                        issues = r.issues + excluded.issues, pull_requests = r.pull_requests + excluded.pull_requests";
                let query = sqlx::query(sql(names, text)).bind(repository).bind(more.issues).bind(more.pull_requests);
                query.execute(&mut *tx).await?;
                Ok(())
            }

            async fn note(tx: &mut Tx<$db>, names: &Names, event: &str, payload: &str) -> sqlx::Result<()> {
                let text = "insert into {audit} (event, payload) values ($1, $2)";
                sqlx::query(sql(names, text)).bind(event).bind(payload).execute(&mut *tx).await?;
                Ok(())
            }

            async fn account(pool: &Pool<$db>, names: &Names) -> sqlx::Result<String> {
                let text = "insert into {account} (one, id) values (1, $1) on conflict (one) do nothing";
                let id = uuid::Uuid::now_v7().to_string();
                sqlx::query(sql(names, text)).bind(id).execute(pool).await?;
                sqlx::query_scalar(sql(names, "select id from {account}")).fetch_one(pool).await
            }

            async fn counts(pool: &Pool<$db>, names: &Names) -> sqlx::Result<BTreeMap<String, Counts>> {
                let text = "select name, issues, pull_requests from {repository}";
                let rows: Vec<(String, i64, i64)> = sqlx::query_as(sql(names, text)).fetch_all(pool).await?;
                Ok(rows.into_iter().map(|(n, issues, pull_requests)| (n, Counts { issues, pull_requests })).collect())
            }

            async fn noted(pool: &Pool<$db>, names: &Names) -> sqlx::Result<Vec<(String, String)>> {
                sqlx::query_as(sql(names, "select event, payload from {audit}")).fetch_all(pool).await
            }
        }
    };
}

tables!(Postgres, in_a_schema, postgres_pool, "begin");
tables!(Sqlite, in_the_file, sqlite_pool, "begin immediate");
