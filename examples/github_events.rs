//! 329 real webhook events of GitHub, three subscriptions, and a proof that every event did what it
//! should, once: what the file and the script say beside what the database and the server say.
//!
//! ```sh
//! cargo run --release --example github_events -- --sqlite github.db
//! DATABASE_URL=postgres://postgres@localhost/postgres cargo run --release --example github_events
//! ```
//!
//! Run it again, or kill it half-way (`kill -9`) and start it again: the counts are the same. After
//! a kill it may wait for some seconds: whether a call that nobody saw the end of has reached the server
//! is asked there, and a "no" is believed only when the call cannot arrive any more.

#![allow(clippy::print_stdout, reason = "the result goes to standard output")]

#[path = "github_events/handlers.rs"]
mod handlers;
#[path = "github_events/input.rs"]
mod input;
#[path = "github_events/outcome.rs"]
mod outcome;
#[path = "github_events/server.rs"]
mod server;
#[path = "github_events/tables.rs"]
mod tables;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use postbox::admin::{Admin, SubscriptionRow};
use postbox::{Backend, Database, Postbox, Postgres, Settings, Sqlite};

use self::handlers::{Remote, SUBSCRIPTIONS};
use self::input::{Event, Expected};
use self::server::Journal;
use self::tables::Tables;

pub(crate) type Problem = Box<dyn std::error::Error + Send + Sync>;

const USAGE: &str = "usage: github_events [--sqlite PATH] [--schema NAME] [--state DIR] [FILE]

Publishes FILE (default: the events that come with the example), one JSON object a line with id,
topic, key and payload, and compares what came of it with what should have. One file a database.

  --sqlite PATH   the database's file; else DATABASE_URL, else a temporary SQLite file
  --schema NAME   postbox's schema on PostgreSQL [default: postbox_github]; the example's own
                  tables go to NAME_example
  --state DIR     where the announcement server keeps its journal [default: beside the SQLite file,
                  else the folder for temporary files]";

/// The application that the subscriptions belong to.
pub(crate) const APPLICATION: &str = "github-example";
/// Messages in one transaction.
const BATCH: usize = 50;
/// How soon another process takes over what a killed one held.
const LEASE: Duration = Duration::from_secs(2);
/// It gives up when nothing has moved for this long.
const STUCK: Duration = Duration::from_secs(300);

struct Options {
    file: PathBuf,
    sqlite: Option<String>,
    schema: String,
    state: Option<PathBuf>,
}

/// What the command line says; `None` asks for help.
fn options(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    let mut file = None;
    let (mut sqlite, mut schema, mut state) = (None, "postbox_github".to_owned(), None);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "-h" | "--help" => return Ok(None),
            "--sqlite" => sqlite = Some(value()?),
            "--schema" => schema = value()?,
            "--state" => state = Some(PathBuf::from(value()?)),
            flag if flag.starts_with('-') => return Err(format!("there is no option {flag}")),
            _ if file.is_some() => return Err("one FILE is enough".into()),
            _ => file = Some(PathBuf::from(argument)),
        }
    }
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/data/github-events.jsonl");
    Ok(Some(Options { file: file.unwrap_or_else(own), sqlite, schema, state }))
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "postbox=warn".into()),
        )
        .init();
    let options = match options(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            eprintln!("github_events: {wrong}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("github_events: {problem}");
            ExitCode::FAILURE
        }
    }
}

/// Picks the database; from here on its kind is a type.
async fn run(options: Options) -> Result<bool, Problem> {
    let mut settings = Settings::load()?;
    let mut temporary = None;
    if let Some(path) = &options.sqlite {
        settings = settings.url(format!("sqlite:{path}"));
    } else if settings.database_url().is_none() {
        let folder = tempfile::Builder::new().prefix("postbox-github-").tempdir()?;
        let file = folder.path().join("github.db");
        eprintln!("no database is named: using {}, which is removed at the end", file.display());
        settings = settings.url(format!("sqlite:{}", file.display()));
        temporary = Some(folder);
    }
    let settings = settings
        .set("schema", &options.schema)
        .set("application", APPLICATION)
        .set("lease", format!("{}s", LEASE.as_secs()));
    let beside = match settings.backend()? {
        Backend::Postgres => None,
        Backend::Sqlite => {
            let url = settings.database_url().unwrap_or_default();
            let file = url.trim_start_matches("sqlite:").trim_start_matches("//");
            Path::new(file.split('?').next().unwrap_or(file)).parent().map(Path::to_path_buf)
        }
    };
    let state = options.state.or(beside).unwrap_or_else(std::env::temp_dir);
    let equal = match settings.backend()? {
        Backend::Postgres => journey::<Postgres>(&settings, &options.file, &state).await,
        Backend::Sqlite => journey::<Sqlite>(&settings, &options.file, &state).await,
    };
    drop(temporary);
    equal
}

/// Publishes, handles, waits until all is quiet, compares.
async fn journey<Db: Tables>(settings: &Settings, file: &Path, state: &Path) -> Result<bool, Problem> {
    let events = input::read(file)?;
    let expected = Expected::of(&events)?;
    let postbox = Postbox::<Db>::migrate(settings.clone()).await?;
    let pool = Db::open(settings).await?;
    let names = Db::names(settings)?;
    Db::set_up(&pool, &names).await?;

    std::fs::create_dir_all(state)?;
    let journal = state.join(format!("github-announcements-{}.jsonl", Db::account(&pool, &names).await?));
    eprintln!("the announcement server keeps its journal in {}", journal.display());
    let address = server::start(Journal::open(&journal)?, expected.releases.clone()).await?;
    let worker = postbox.worker(handlers::routes::<Db>(names.clone(), Remote::at(address)?)).start().await?;
    publish::<Db>(&postbox, &pool, &events).await?;
    quiet(&postbox.admin()).await?;
    worker.stop(None).await?;
    postbox.close().await;
    pool.close().await;

    // What is compared is read by others: connections that had no part in it.
    let actual = outcome::read::<Db>(settings, &names, &expected, &journal).await?;
    Ok(outcome::compare(&expected, &actual))
}

/// Batch by batch, each in a transaction: a kill leaves whole batches, and a second run finds the
/// ids taken.
async fn publish<Db: Tables>(postbox: &Postbox<Db>, pool: &sqlx::Pool<Db>, events: &[Event]) -> Result<(), Problem> {
    let (mut done, mut before) = (0, 0);
    for batch in events.chunks(BATCH) {
        let mut tx = Db::begin(pool).await?;
        let published = postbox.publish_all(&mut *tx, batch.iter().map(Event::draft)).await?;
        tx.commit().await?;
        done += batch.len();
        before += published.iter().filter(|p| p.is_duplicate()).count();
        eprintln!("published {done} of {} ({before} were there before)", events.len());
    }
    Ok(())
}

/// Returns when no delivery of the three subscriptions has anything before it.
async fn quiet<Db: Database>(admin: &Admin<Db>) -> Result<(), Problem> {
    let (mut told, mut said) = (Instant::now(), String::new());
    let (mut moved, mut last) = (Instant::now(), String::new());
    loop {
        let open: Vec<String> = admin.subscriptions().await?.iter().filter_map(still_open).collect();
        if open.is_empty() {
            return Ok(());
        }
        let now = open.join("; ");
        if now != last {
            (last, moved) = (now, Instant::now());
        }
        if moved.elapsed() > STUCK {
            return Err(format!("nothing has moved for {} s: {last}", STUCK.as_secs()).into());
        }
        // What changes is told every two seconds, what does not every fifteen.
        if told.elapsed() > Duration::from_secs(if last == said { 15 } else { 2 }) {
            told = Instant::now();
            said.clone_from(&last);
            eprintln!("waiting for {last}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What a subscription has before it, in words.
fn still_open(row: &SubscriptionRow) -> Option<String> {
    if row.application != APPLICATION || !SUBSCRIPTIONS.contains(&row.name.as_str()) {
        return None;
    }
    let waiting = row.pending + row.scheduled;
    if waiting + row.running + row.in_doubt == 0 && !row.backfilling {
        return None;
    }
    let mut words = format!("{}: {waiting} pending, {} running", row.name, row.running);
    if row.in_doubt > 0 {
        words += &format!(
            ", {} in doubt (the server is asked; after a kill, its \"no\" is believed only when the lost call cannot \
             arrive any more, in some seconds)",
            row.in_doubt
        );
    }
    Some(words)
}
