//! Where it is measured: a private server, or the one at `DATABASE_URL`; the machine.

use std::time::Duration;

use postbox::{Postbox, Postgres, Settings};
use postbox_testkit::Server;
use sqlx::postgres::PgPoolOptions;
use sqlx::{AssertSqlSafe, PgPool, Row};

use crate::Problem;

/// What is asked of a private server beyond its defaults, so that checkpoints do not fall into a round.
const SETTINGS: &[(&str, &str)] = &[
    ("shared_buffers", "1GB"),
    ("max_wal_size", "8GB"),
    ("checkpoint_timeout", "30min"),
    ("shared_preload_libraries", "pg_stat_statements"),
    ("pg_stat_statements.track_utility", "off"),
    ("max_connections", "200"),
];
/// What is printed, because the figures hang on it.
const SHOWN: &[&str] = &[
    "server_version",
    "fsync",
    "full_page_writes",
    "synchronous_commit",
    "shared_buffers",
    "max_wal_size",
    "checkpoint_timeout",
    "autovacuum",
    "wal_compression",
];

/// A server with a schema for the benchmark alone.
pub(crate) struct Site {
    /// Plain connections, for what is not postbox.
    pub(crate) pool: PgPool,
    url: String,
    schema: String,
    count: std::sync::atomic::AtomicU32,
    /// Ends with this.
    _server: Option<Server>,
}

impl Site {
    /// At `DATABASE_URL`, or on a server of its own.
    pub(crate) async fn open() -> Result<Site, Problem> {
        let named = std::env::var("DATABASE_URL").ok().filter(|url| url.starts_with("postgres"));
        let (url, server) = match named {
            Some(url) => (url, None),
            None => {
                let server = tokio::task::spawn_blocking(|| Server::durable(SETTINGS)).await?;
                (server.url(), Some(server))
            }
        };
        let pool = PgPoolOptions::new().max_connections(20).connect(&url).await?;
        let schema = format!("postbox_bench_{}", &uuid::Uuid::now_v7().simple().to_string()[20..]);
        let site = Site { pool, url, schema, count: 0.into(), _server: server };
        for needed in ["fsync", "full_page_writes", "synchronous_commit"] {
            if site.setting(needed).await? == "off" {
                return Err(format!("{needed} is off at this server; figures without it would say nothing").into());
            }
        }
        site.run(&format!("create schema {}", site.schema)).await?;
        Ok(site)
    }

    /// Removes what it made.
    pub(crate) async fn close(&self) -> Result<(), Problem> {
        self.run(&format!("drop schema {} cascade", self.schema)).await
    }

    /// A table of the benchmark's own.
    pub(crate) fn table(&self, name: &str) -> String {
        format!("{}.{name}", self.schema)
    }

    pub(crate) async fn run(&self, sql: &str) -> Result<(), Problem> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&self.pool).await?;
        Ok(())
    }

    /// The one number of a query.
    pub(crate) async fn number(&self, sql: &str) -> Result<f64, Problem> {
        let sql = format!("select ({sql})::float8");
        Ok(sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&self.pool).await?)
    }

    pub(crate) async fn setting(&self, name: &str) -> Result<String, Problem> {
        Ok(sqlx::query(AssertSqlSafe(format!("show {name}"))).fetch_one(&self.pool).await?.try_get(0)?)
    }

    /// The settings that matter, as `name=value`.
    pub(crate) async fn settings(&self) -> Result<String, Problem> {
        let mut shown = Vec::new();
        for name in SHOWN {
            shown.push(format!("{name}={}", self.setting(name).await?));
        }
        Ok(shown.join(" "))
    }

    /// A postbox in a schema of its own, with nothing in it.
    pub(crate) async fn fresh(&self) -> Result<Fresh, Problem> {
        let number = self.count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let schema = format!("{}_{number}", self.schema);
        let settings =
            Settings::defaults().url(&self.url).set("schema", &schema).set("application", "bench").set("pool_size", 16);
        Ok(Fresh { postbox: Postbox::migrate(settings).await?, schema })
    }

    /// Writes what is dirty, so that the next round does not pay for the last one.
    pub(crate) async fn settle_down(&self) -> Result<(), Problem> {
        self.run("checkpoint").await
    }

    /// Bytes of WAL so far.
    pub(crate) async fn wal(&self) -> Result<f64, Problem> {
        self.number("pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_insert_lsn(), '0/0')").await
    }

    /// Connections for `count` clients, with nothing of postbox.
    pub(crate) async fn clients(&self, count: u32) -> Result<PgPool, Problem> {
        let pool = PgPoolOptions::new().min_connections(count).max_connections(count);
        Ok(pool.acquire_timeout(Duration::from_secs(60)).connect(&self.url).await?)
    }
}

/// A postbox that nothing was done to.
pub(crate) struct Fresh {
    pub(crate) postbox: Postbox<Postgres>,
    pub(crate) schema: String,
}

impl Fresh {
    /// Removes it.
    pub(crate) async fn drop(self, site: &Site) -> Result<(), Problem> {
        self.postbox.close().await;
        site.run(&format!("drop schema {} cascade", self.schema)).await?;
        for role in ["publisher", "worker", "operator", "viewer"] {
            site.run(&format!("drop role if exists {}_{role}", self.schema)).await?;
        }
        Ok(())
    }
}

/// Processors, memory and system, for people.
pub(crate) fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpuinfo.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':')).map_or("?", |(_, m)| m.trim());
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .map_or(0, |kb| kb / 1024 / 1024);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{cores} cores of {model}, {memory} GiB, {} {}", std::env::consts::OS, kernel.trim())
}
