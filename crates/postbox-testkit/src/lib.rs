//! Private servers and fresh stores for postbox's own tests.
//!
//! PostgreSQL: the server at `DATABASE_URL` if it is set, else one that this process starts from the
//! installed binaries on a free port, and that ends with it. Each test has a schema of its own. Redis: the same
//! with `REDIS_URL`; each test has names of its own.

pub mod bad_input;
mod child;
mod endpoint;
pub mod hand;
mod login;
#[cfg(feature = "faults")]
pub mod planted;
mod postgres;
mod proxy;
mod redis;
mod remote;
mod wait;

use std::future::Future;

use postbox::{Database, Postbox, Postgres, Settings, Sqlite};

pub use child::WorkerProcess;
pub use endpoint::{Asked, Endpoint, Then};
pub use login::Login;
pub use postgres::{Disks, Server, shared_url, unprivileged_account};
pub use proxy::{Lost, Proxy};
pub use redis::{RedisServer, shared_redis_url};
pub use remote::Remote;
pub use wait::{deliveries, until};

/// A store of its own for one test. Dropped, it leaves nothing behind.
pub struct Fresh<Db: Database> {
    /// An open, migrated postbox.
    pub postbox: Postbox<Db>,
    /// A pool for the test's own tables and transactions.
    pub pool: sqlx::Pool<Db>,
    /// What to pass to a child process or a second `open`.
    pub settings: Settings,
    login: Option<Login>,
    cleanup: Cleanup,
}

enum Cleanup {
    Schema { url: String, schema: String },
    File(#[allow(dead_code, reason = "removes the folder when it is dropped")] tempfile::TempDir),
}

impl<Db: Database> Fresh<Db> {
    /// The URL of the database.
    pub fn url(&self) -> String {
        self.settings.database_url().unwrap_or_default().to_owned()
    }

    /// The PostgreSQL schema; `postbox` on SQLite.
    pub fn schema(&self) -> String {
        self.settings.schema().unwrap_or_default()
    }

    /// A name for a table of the test's own: in its schema, where there are schemas.
    pub fn table(&self, name: &str) -> String {
        match &self.cleanup {
            Cleanup::Schema { schema, .. } => format!("{schema}.{name}"),
            Cleanup::File(_) => name.to_owned(),
        }
    }
}

impl<Db: Database> Drop for Fresh<Db> {
    fn drop(&mut self) {
        let Cleanup::Schema { url, schema } = &self.cleanup else { return };
        // Roles are the whole server's: what is granted to a login goes before what grants it.
        drop(self.login.take());
        let mut statements = vec![format!("set lock_timeout = '2s'; drop schema if exists {schema} cascade")];
        // A role that something else depends on stays.
        for role in ["publisher", "worker", "operator", "viewer"] {
            statements.push(format!("drop role if exists {schema}_{role}"));
        }
        clean_up(url.clone(), statements);
    }
}

/// Runs each statement, whether the one before succeeded or not, and waits for it.
pub(crate) fn clean_up(url: String, statements: Vec<String>) {
    // A thread of its own: a test's runtime may be gone by now.
    let done = std::thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            use sqlx::Connection;
            let Ok(mut connection) = sqlx::PgConnection::connect(&url).await else { return };
            for sql in statements {
                sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut connection).await.ok();
            }
        });
    });
    done.join().ok();
}

/// A database that tests can have fresh.
pub trait Testable: Database {
    /// `postgres` or `sqlite`.
    const NAME: &'static str;

    /// A store of its own, with these settings on top.
    fn fresh_with(adjust: impl FnOnce(Settings) -> Settings + Send) -> impl Future<Output = Fresh<Self>> + Send;

    /// Makes a registered worker die, as far as the others can tell: its lease runs out, or its
    /// process is gone.
    fn kill(fresh: &Fresh<Self>, postbox: Postbox<Self>, worker: uuid::Uuid) -> impl Future<Output = ()> + Send;

    /// Runs a statement of the test's own.
    fn execute(fresh: &Fresh<Self>, sql: &str) -> impl Future<Output = ()> + Send;

    /// The one number that a query of the test's own gives.
    fn count(fresh: &Fresh<Self>, sql: &str) -> impl Future<Output = i64> + Send;

    /// A store of its own.
    fn fresh() -> impl Future<Output = Fresh<Self>> + Send {
        Self::fresh_with(|settings| settings)
    }
}

/// On PostgreSQL: as when the window is over that messages were stored in up to now, and each one is due to be
/// looked through by retention.
pub async fn end_window<Db: Testable>(fresh: &Fresh<Db>) {
    let schema = fresh.schema();
    let cut = format!("select {schema}.cut_window(clock_timestamp())::int::bigint");
    while Db::count(fresh, &cut).await == 0 {
        tokio::task::yield_now().await;
    }
    let over = format!(
        "select count(*) from {schema}.message_window w
         where w.to_id > {schema}.uuid_at(clock_timestamp()) and w.to_id < {schema}.uuid_at(clock_timestamp() + interval '1 second')"
    );
    while Db::count(fresh, &over).await > 0 {
        tokio::task::yield_now().await;
    }
    Db::execute(fresh, &format!("update {schema}.message_window set look_at = '-infinity'")).await;
}

/// A schema name that nobody else has.
fn unique(prefix: &str) -> String {
    format!("{prefix}_{}", &uuid::Uuid::now_v7().simple().to_string()[20..])
}

/// A store on a server of the test's own.
pub async fn fresh_on(server: &Server) -> Fresh<Postgres> {
    fresh_at(server.url(), |settings| settings).await
}

impl Testable for Postgres {
    const NAME: &'static str = "postgres";

    async fn fresh_with(adjust: impl FnOnce(Settings) -> Settings + Send) -> Fresh<Postgres> {
        fresh_at(shared_url(), adjust).await
    }

    async fn execute(fresh: &Fresh<Postgres>, sql: &str) {
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&fresh.pool).await.expect("the test's statement");
    }

    async fn count(fresh: &Fresh<Postgres>, sql: &str) -> i64 {
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&fresh.pool).await.expect("the test's query")
    }

    async fn kill(fresh: &Fresh<Postgres>, _: Postbox<Postgres>, worker: uuid::Uuid) {
        let sql = format!(
            "update {}.worker set expires_at = clock_timestamp() - interval '1 ms' where id = $1",
            fresh.schema()
        );
        sqlx::query(sqlx::AssertSqlSafe(sql)).bind(worker).execute(&fresh.pool).await.expect("the lease ends");
    }
}

async fn fresh_at(url: String, adjust: impl FnOnce(Settings) -> Settings + Send) -> Fresh<Postgres> {
    let schema = unique("postbox_test");
    let settings = Settings::defaults().url(&url).set("schema", &schema).set("application", "test");
    let settings = adjust(settings);
    let postbox = Postbox::migrate(settings.clone()).await.expect("a fresh schema on the test server");
    let pool = sqlx::PgPool::connect(&url).await.expect("a pool on the test server");
    let cleanup = Cleanup::Schema { url, schema };
    let mut fresh = Fresh { postbox, pool, settings, cleanup, login: None };
    // The same tests, by programs that own nothing and have the roles only.
    if std::env::var_os("POSTBOX_TEST_AS_ROLES").is_some() {
        let login = Login::with(&fresh, &["worker", "operator"]).await;
        let sql =
            format!("alter default privileges in schema {} grant all on tables to {}", fresh.schema(), login.name);
        Postgres::execute(&fresh, &sql).await;
        fresh.settings = login.settings.clone();
        fresh.postbox = Postbox::open(login.settings.clone()).await.expect("open as the roles");
        fresh.login = Some(login);
    }
    fresh
}

impl Testable for Sqlite {
    const NAME: &'static str = "sqlite";

    async fn fresh_with(adjust: impl FnOnce(Settings) -> Settings + Send) -> Fresh<Sqlite> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let url = format!("sqlite:{}", folder.path().join("test.db").display());
        let settings = adjust(Settings::defaults().url(&url).set("application", "test"));
        let postbox = Postbox::migrate(settings.clone()).await.expect("a fresh SQLite file");
        let options: sqlx::sqlite::SqliteConnectOptions = url.parse().expect("a SQLite URL");
        let options = options.busy_timeout(std::time::Duration::from_secs(30));
        let pool = sqlx::SqlitePool::connect_with(options).await.expect("a pool on the SQLite file");
        Fresh { postbox, pool, settings, login: None, cleanup: Cleanup::File(folder) }
    }

    async fn execute(fresh: &Fresh<Sqlite>, sql: &str) {
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&fresh.pool).await.expect("the test's statement");
    }

    async fn count(fresh: &Fresh<Sqlite>, sql: &str) -> i64 {
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&fresh.pool).await.expect("the test's query")
    }

    async fn kill(_: &Fresh<Sqlite>, postbox: Postbox<Sqlite>, _: uuid::Uuid) {
        // Its lock files go with the last handle on them.
        postbox.close().await;
        drop(postbox);
    }
}

/// Makes a test of each generic async function, once per store: `on_both_stores!(publishes, retries);`
#[macro_export]
macro_rules! on_both_stores {
    ($($test:ident),* $(,)?) => {
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() { super::$test::<postbox::Postgres>().await; })*
        }
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $test() { super::$test::<postbox::Sqlite>().await; })*
        }
    };
}
