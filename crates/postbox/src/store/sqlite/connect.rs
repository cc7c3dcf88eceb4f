//! Opening the file and bringing its tables to this build's version.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{SqliteConnection, SqlitePool};
use uuid::Uuid;

use super::{PREFIX, SqliteStore, timestamp};
use crate::admin::MigrationStatus;
use crate::crash;
use crate::error::Error;
use crate::settings::Settings;
use crate::store::down::{Holdings, Loss, too_far};

/// Version and name are the position and the file's; up and down.
pub(super) const MIGRATIONS: [(&str, &str, &str); 8] = [
    ("engine", include_str!("migrations/0001_engine.sql"), include_str!("migrations/0001_engine.down.sql")),
    ("successes", include_str!("migrations/0002_successes.sql"), include_str!("migrations/0002_successes.down.sql")),
    ("limits", include_str!("migrations/0003_limits.sql"), include_str!("migrations/0003_limits.down.sql")),
    ("schedules", include_str!("migrations/0004_schedules.sql"), include_str!("migrations/0004_schedules.down.sql")),
    (
        "pause_and_priority",
        include_str!("migrations/0005_pause_and_priority.sql"),
        include_str!("migrations/0005_pause_and_priority.down.sql"),
    ),
    ("order", include_str!("migrations/0006_order.sql"), include_str!("migrations/0006_order.down.sql")),
    ("unique", include_str!("migrations/0007_unique.sql"), include_str!("migrations/0007_unique.down.sql")),
    ("inbox", include_str!("migrations/0008_inbox.sql"), include_str!("migrations/0008_inbox.down.sql")),
];

pub(super) const HEAD: &str = "create table if not exists postbox_migration (
    version    integer primary key,
    name       text    not null,
    applied_at integer not null
) strict;\n";

/// Rows that the connection's thread reads ahead: a whole claim, so that it does not stop and wait for who takes them.
const ROWS: usize = 512;

/// Readers beside the one writer.
const READERS: u32 = 4;

pub(super) struct Opened {
    pub(super) writer: SqlitePool,
    pub(super) reader: SqlitePool,
    /// For connections outside of the pools.
    pub(super) options: SqliteConnectOptions,
    /// The database's file, absolute.
    pub(super) file: PathBuf,
    /// How long a connection waits for the write lock.
    pub(super) busy: Duration,
}

pub(super) async fn open(settings: &Settings) -> Result<Opened, Error> {
    let busy = settings.busy_timeout()?;
    let options = options(settings.database_url().unwrap_or_default())?.busy_timeout(busy);
    let writer = SqlitePoolOptions::new()
        .max_connections(1)
        .acquire_timeout(busy.max(Duration::from_secs(1)))
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        .connect_lazy_with(
            options
                .clone()
                .create_if_missing(true)
                .journal_mode(SqliteJournalMode::Wal)
                .synchronous(SqliteSynchronous::Full),
        );
    let file = first_contact(&writer, busy, &options).await?;
    let options = options.pragma("query_only", "on");
    let reader = readers(&options, READERS);
    Ok(Opened { writer, reader, options, file, busy })
}

pub(super) fn readers(options: &SqliteConnectOptions, connections: u32) -> SqlitePool {
    SqlitePoolOptions::new()
        .max_connections(connections)
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        .connect_lazy_with(options.clone())
}

/// Reads the URL; refuses what two connections would see as two databases, or cannot write to.
fn options(url: &str) -> Result<SqliteConnectOptions, Error> {
    let refuse = |why: &str| {
        Err(Error::Settings(format!("the database URL {url} cannot be used: {why}; give a file, like sqlite:shop.db")))
    };
    let Some(rest) = url.strip_prefix("sqlite:") else { return refuse("it does not start with sqlite:") };
    for pair in rest.split_once('?').map_or("", |(_, query)| query).split('&').filter(|p| !p.is_empty()) {
        match pair {
            "mode=memory" => return refuse("postbox needs several connections to one file, memory has none"),
            "mode=rw" | "mode=rwc" | "cache=private" => {}
            "mode=ro" | "immutable=1" | "immutable=true" => return refuse("postbox writes to it"),
            other => return refuse(&format!("it has the parameter `{}`", other.escape_debug())),
        }
    }
    let options = match SqliteConnectOptions::from_str(url) {
        Ok(options) => options,
        Err(error) => return refuse(&error.to_string()),
    };
    // SQLite itself reads `file:` names as URLs, which could name memory again.
    match options.get_filename().to_str() {
        None => refuse("the file's name is not UTF-8"),
        Some("") => refuse("it names no file"),
        Some(name) if name.starts_with("file:") || name.starts_with(":memory:") => {
            refuse("postbox needs several connections to one file, memory has none")
        }
        // Handlers' transactions run on these connections: the user's foreign keys are enforced.
        Some(_) => Ok(options.foreign_keys(true).row_buffer_size(ROWS)),
    }
}

/// The first connection makes the file and turns on WAL, which SQLite may refuse as busy without
/// waiting while another process does the same.
async fn first_contact(writer: &SqlitePool, busy: Duration, options: &SqliteConnectOptions) -> Result<PathBuf, Error> {
    let give_up = Instant::now() + busy.max(Duration::from_secs(1));
    loop {
        let asked = sqlx::query_scalar::<_, String>("select file from pragma_database_list where name = 'main'");
        let error = match asked.fetch_one(writer).await {
            Ok(file) if file.is_empty() => {
                return Err(Error::Settings("the database is not a file; give one, like sqlite:shop.db".into()));
            }
            Ok(file) => return Ok(PathBuf::from(file)),
            Err(error) => error,
        };
        let code = error.as_database_error().and_then(|e| e.code()).unwrap_or_default();
        if code == "14" {
            let name = options.get_filename().display();
            return Err(Error::Settings(format!(
                "cannot open or create the SQLite file {name}; is its folder there and writable?"
            )));
        }
        let error = Error::from(error);
        if !matches!(error, Error::Busy(_)) || Instant::now() >= give_up {
            return Err(error);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn applied(connection: &mut SqliteConnection) -> Result<Vec<(i64, String, i64)>, Error> {
    let table = "select count(*) from sqlite_schema where type = 'table' and name = 'postbox_migration'";
    if sqlx::query_scalar::<_, i64>(table).fetch_one(&mut *connection).await? == 0 {
        return Ok(Vec::new());
    }
    let rows = sqlx::query_as("select version, name, applied_at from postbox_migration order by version");
    let rows: Vec<(i64, String, i64)> = rows.fetch_all(connection).await?;
    let newest = rows.last().map_or(0, |(version, ..)| *version);
    if newest > MIGRATIONS.len() as i64 {
        return Err(Error::Schema {
            schema: PREFIX.into(),
            found: u32::try_from(newest).unwrap_or(u32::MAX),
            needed: MIGRATIONS.len() as u32,
            mend: "this postbox is older than the schema: update the program".into(),
        });
    }
    Ok(rows)
}

pub(super) async fn status(store: &SqliteStore) -> Result<MigrationStatus, Error> {
    let mut work = store.read().await?;
    let done = applied(work.on()).await?;
    work.rollback().await?;
    let migrations = (1..).zip(MIGRATIONS).map(|(version, (name, ..))| {
        let at = done.iter().find(|(v, ..)| *v == version).map(|(_, _, at)| timestamp(*at));
        (version as u32, name.to_owned(), at)
    });
    Ok(MigrationStatus { schema: PREFIX.into(), migrations: migrations.collect() })
}

/// Each migration commits whole, or not at all.
pub(super) async fn migrate(store: &SqliteStore) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    let mut work = store.read().await?;
    let done = applied(work.on()).await?.len();
    work.rollback().await?;
    if done == MIGRATIONS.len() {
        return Ok(names);
    }
    loop {
        let mut work = store.write().await?;
        // Somebody else may have migrated meanwhile.
        let done = applied(work.on()).await?.len();
        let Some((name, migration, _)) = MIGRATIONS.get(done) else {
            work.rollback().await?;
            return Ok(names);
        };
        sqlx::raw_sql(HEAD).execute(work.on()).await?;
        sqlx::raw_sql(*migration).execute(work.on()).await?;
        let record = "insert into postbox_migration (version, name, applied_at) select ?1, ?2, now from postbox_clock";
        sqlx::query(record).bind(done as i64 + 1).bind(*name).execute(work.on()).await?;
        crash::point("migrating");
        work.commit().await?;
        names.push(format!("{:04} {name}", done + 1));
    }
}

/// Each migration is taken back whole, or not at all. Opening the file migrates it again.
pub(super) async fn migrate_down(store: &SqliteStore, to: u32, loss: Loss) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    loop {
        let mut work = store.write().await?;
        let done = applied(work.on()).await?.len();
        if names.is_empty() && to as usize > done {
            work.rollback().await?;
            return Err(too_far(PREFIX, done as u32, to));
        }
        let migration = done.checked_sub(1).filter(|_| done > to as usize).and_then(|n| MIGRATIONS.get(n));
        let Some((name, _, down)) = migration else {
            work.rollback().await?;
            return Ok(names);
        };
        if loss == Loss::Refused
            && let Some(refused) = holdings(store, work.on(), done, to).await?.refusal(PREFIX, to)
        {
            work.rollback().await?;
            return Err(refused);
        }
        sqlx::raw_sql(*down).execute(work.on()).await?;
        let last = match done {
            1 => "drop table postbox_migration".to_owned(),
            _ => format!("delete from postbox_migration where version = {done}"),
        };
        sqlx::raw_sql(sqlx::AssertSqlSafe(last)).execute(work.on()).await?;
        work.commit().await?;
        names.push(format!("{done:04} {name}"));
    }
}

/// What is in the way of going down from the version `done`. Only the first one's way down loses what there is.
async fn holdings(
    store: &SqliteStore,
    connection: &mut SqliteConnection,
    done: usize,
    to: u32,
) -> Result<Holdings, Error> {
    let mut sql = "select (select count(*) from (select 1 from postbox_message limit 100001)),
        (select count(*) from (select 1 from postbox_delivery where state in ('pending', 'running', 'in_doubt') limit 100001)),
        (select count(*) from (select 1 from postbox_delivery where state = 'in_doubt' limit 100001))"
        .to_owned();
    if done > 1 {
        sql.push_str(", (select count(*) from postbox_held)");
    } else {
        sql.push_str(", 0");
    }
    let (messages, unfinished, in_doubt) = match to {
        0 => {
            let (messages, unfinished, in_doubt, held): (i64, i64, i64, i64) =
                sqlx::query_as(sqlx::AssertSqlSafe(sql)).fetch_one(&mut *connection).await?;
            (messages, unfinished + held, in_doubt)
        }
        _ => (0, 0, 0),
    };
    let leaves = MIGRATIONS.get(to as usize..done).unwrap_or_default();
    let schedules = match leaves.iter().any(|(name, ..)| *name == "schedules") {
        true => sqlx::query_scalar("select count(*) from postbox_schedule").fetch_one(&mut *connection).await?,
        false => 0,
    };
    let quarantined = match leaves.iter().any(|(name, ..)| *name == "inbox") {
        true => {
            let sql = "select count(*) from (select 1 from postbox_quarantine where ended_at is null limit 100001)";
            sqlx::query_scalar(sql).fetch_one(&mut *connection).await?
        }
        false => 0,
    };
    let workers: Vec<Uuid> = sqlx::query_scalar("select id from postbox_worker").fetch_all(connection).await?;
    let workers = workers.into_iter().filter(|id| store.shared.alive.lives(*id)).count() as i64;
    Ok(Holdings { workers, messages, unfinished, in_doubt, schedules, quarantined })
}

/// All migrations as one SQL text, for the user's own migration tool.
pub fn migrations_sql() -> String {
    let mut text = HEAD.to_owned();
    for (version, (name, migration, _)) in (1..).zip(MIGRATIONS) {
        text.push_str(&format!("\n-- {version:04} {name}\n{migration}"));
        text.push_str(&format!(
            "insert into postbox_migration (version, name, applied_at) select {version}, '{name}', now from postbox_clock;\n"
        ));
    }
    text
}
