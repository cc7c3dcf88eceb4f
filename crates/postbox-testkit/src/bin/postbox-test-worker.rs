//! A worker in a process of its own, for tests that kill it. Everything comes from the environment:
//! the store as for any postbox, `TEST_REMOTE` (host:port of the remote), `TEST_CONCURRENCY`,
//! `TEST_BATCH`, `TEST_RENAMED` (the plain handler has a new name), `TEST_RECONCILE` (the operation
//! asks the remote about doubts), `TEST_PULL` (pulls from this subscription instead).

use std::time::Duration;

use postbox::{
    Batch, Database, Envelope, Failure, Metadata, Operation, OperationFailure, Postbox, Postgres, Receipt, Reconciled,
    ResultExt, Router, Settings, Sqlite, State, Tx, Unique, batch, handler, operation,
};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

#[derive(Clone)]
struct Remote(String);

impl Remote {
    /// One line there, one line back.
    async fn ask(&self, verb: &str, key: &str) -> Result<String, std::io::Error> {
        let mut stream = TcpStream::connect(&self.0).await?;
        stream.write_all(format!("{verb} {key}\n").as_bytes()).await?;
        if verb == "charge" {
            postbox::crash::point("request-sent");
        }
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).await?;
        match answer.trim() {
            "" => Err(std::io::Error::other("the connection closed without an answer")),
            answer => Ok(answer.to_owned()),
        }
    }
}

async fn charge(op: Operation, State(remote): State<Remote>) -> Result<Receipt, OperationFailure> {
    let answer = remote.ask("charge", op.idempotency_key()).await?;
    Ok(Receipt::of(answer))
}

async fn find_charge(op: Operation, State(remote): State<Remote>) -> Result<Reconciled, Failure> {
    Ok(match remote.ask("find", op.idempotency_key()).await?.as_str() {
        "found" => Reconciled::Done(Receipt::of("found")),
        "nothing" => Reconciled::NotDone,
        _ => Reconciled::Unknown,
    })
}

async fn note(metadata: Metadata, State(remote): State<Remote>) -> Result<(), Failure> {
    remote.ask("note", &metadata.id.to_string()).await?;
    Ok(())
}

async fn work_on(metadata: Metadata, State(remote): State<Remote>) -> Result<(), Failure> {
    remote.ask("work", &metadata.id.to_string()).await?;
    Ok(())
}

/// One line for each, and the last word only when all have been said.
async fn note_all(batch: Batch<serde_json::Value>, State(remote): State<Remote>) -> Result<(), Failure> {
    for one in &batch {
        remote.ask("note", &one.id().to_string()).await?;
    }
    postbox::crash::point("batch-done");
    Ok(())
}

macro_rules! step {
    ($name:ident, $next:expr) => {
        async fn $name(
            op: Operation,
            envelope: Envelope,
            State(remote): State<Remote>,
        ) -> Result<Receipt, OperationFailure> {
            let answer = remote.ask("charge", &format!("{} {}", envelope.topic, op.idempotency_key())).await?;
            Ok(follow(Receipt::of(answer), $next))
        }
    };
}
step!(chain_one, Some("chain.two"));
step!(chain_two, Some("chain.three"));
step!(chain_three, None);

fn follow(receipt: Receipt, next: Option<&str>) -> Receipt {
    match next {
        Some(topic) => receipt.then(Envelope::json(topic, &"go on")),
        None => receipt,
    }
}

async fn find_step(op: Operation, envelope: Envelope, State(remote): State<Remote>) -> Result<Reconciled, Failure> {
    let next = match envelope.topic.as_str() {
        "chain.one" => Some("chain.two"),
        "chain.two" => Some("chain.three"),
        _ => None,
    };
    Ok(match remote.ask("find", &format!("{} {}", envelope.topic, op.idempotency_key())).await?.as_str() {
        "found" => Reconciled::Done(follow(Receipt::of("found"), next)),
        "nothing" => Reconciled::NotDone,
        _ => Reconciled::Unknown,
    })
}

fn routes<Db: Database>() -> Router<Db, Remote> {
    let charging = operation(charge).named("charge").max_attempts(2);
    let charging =
        if std::env::var_os("TEST_RECONCILE").is_some() { charging.reconcile(find_charge) } else { charging };
    let noting = match std::env::var_os("TEST_RENAMED") {
        Some(_) => handler(note).named("noted").renamed_from("note"),
        None => handler(note).named("note"),
    };
    // A doubt ends soon, so that its key is free again.
    let only = operation(charge).named("only-op").unique(Unique::Refuse).reconcile(find_charge);
    let only = only.timeout(Duration::from_secs(2)).quiet_period(Duration::ZERO);
    Router::new()
        .on("op.charge", charging)
        .on("plain.note", noting)
        .on("plain.work", handler(work_on).named("work").limit(3))
        .on_batch("batch.note", batch(note_all).up_to(10).within(Duration::from_millis(50)))
        .on("plain.only", handler(work_on).named("only").unique(Unique::Coalesce).max_attempts(1000))
        .on("op.only", only)
        .on("chain.one", operation(chain_one).reconcile(find_step))
        .on("chain.two", operation(chain_two).reconcile(find_step))
        .on("chain.three", operation(chain_three).reconcile(find_step))
}

fn number(name: &str, default: u32) -> u32 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// Pulls for ever, one delivery a transaction.
async fn pull<Db: Database>(settings: Settings, pool: sqlx::Pool<Db>, name: &str) -> Result<(), postbox::Error> {
    let postbox = Postbox::<Db>::open(settings).await?;
    let subscription = postbox.subscription(name);
    loop {
        subscription.ready().await?;
        let mut tx = pool.begin().await?;
        if subscription.next(&mut tx).await?.is_some() {
            tx.commit().await?;
        }
    }
}

async fn work<Db: Database>(settings: Settings, more: Router<Db, Remote>) -> Result<(), postbox::Error> {
    let remote = Remote(std::env::var("TEST_REMOTE").unwrap_or_default());
    let postbox = Postbox::<Db>::open(settings).await?;
    let app = routes().merge(more).with_state(remote);
    let mut worker = postbox
        .worker(app)
        .lease(Duration::from_secs(1))
        .poll_interval(Duration::from_millis(50))
        .concurrency(number("TEST_CONCURRENCY", 4) as usize);
    if std::env::var_os("TEST_BATCH").is_some() {
        worker = worker.batch(number("TEST_BATCH", 1));
    }
    worker.run().await
}

macro_rules! project {
    ($db:ty, $insert:literal) => {{
        async fn project(metadata: Metadata, mut tx: Tx<$db>) -> Result<(), Failure> {
            let table = std::env::var("TEST_TABLE").unwrap_or_default();
            let sql = format!($insert, table);
            sqlx::query(sqlx::AssertSqlSafe(sql)).bind(metadata.id.to_string()).execute(&mut tx).await.permanent()?;
            Ok(())
        }
        async fn project_all(batch: Batch<serde_json::Value>, mut tx: Tx<$db>) -> Result<(), Failure> {
            let table = std::env::var("TEST_TABLE").unwrap_or_default();
            for one in &batch {
                let sql = sqlx::query(sqlx::AssertSqlSafe(format!($insert, table)));
                sql.bind(one.id().to_string()).execute(&mut tx).await.permanent()?;
            }
            postbox::crash::point("batch-done");
            Ok(())
        }
        Router::new()
            .on("tx.project", project)
            .on_batch("batch.project", batch(project_all).up_to(10).within(Duration::from_millis(50)))
    }};
}

#[tokio::main(flavor = "multi_thread", worker_threads = 4)]
async fn main() -> Result<(), postbox::Error> {
    let settings = Settings::load()?;
    if let Ok(name) = std::env::var("TEST_PULL") {
        let url = settings.database_url().unwrap_or_default().to_owned();
        return match settings.backend()? {
            postbox::Backend::Postgres => pull(settings, sqlx::PgPool::connect(&url).await?, &name).await,
            postbox::Backend::Sqlite => pull(settings, sqlx::SqlitePool::connect(&url).await?, &name).await,
        };
    }
    match settings.backend()? {
        postbox::Backend::Postgres => {
            work::<Postgres>(settings, project!(Postgres, "insert into {} (message) values ($1)")).await
        }
        postbox::Backend::Sqlite => {
            work::<Sqlite>(settings, project!(Sqlite, "insert into {} (message) values (?1)")).await
        }
    }
}
