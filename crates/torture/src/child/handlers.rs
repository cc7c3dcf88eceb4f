//! The handlers under torture. Each tells the remote, or a table, that it ran, with the database's clock.

use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postbox::{
    Attempt, Envelope, Failure, FollowUps, Operation, OperationFailure, Payload, Postbox, Receipt, Reconciled,
    ResultExt, Router, State, Tx, crash, handler, operation,
};
use serde::Deserialize;
use sqlx::Pool;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::{ChildPlan, LEASE, QUIET, TIMEOUT, hit};
use crate::fault::{Fault, Kind};
use crate::log::Log;
use crate::site::{Site, Texts};
use crate::traffic::{FEW, FLEETING, MANY, follows};

/// Between two signs of life.
const SIGNS: Duration = Duration::from_secs(2);

/// What the handlers share.
pub(crate) struct Hands<Db: Site> {
    pub(crate) plan: Arc<ChildPlan>,
    pub(crate) postbox: Postbox<Db>,
    pub(crate) side: Pool<Db>,
    pub(crate) running: Arc<AtomicU64>,
    pub(crate) done: Arc<AtomicU64>,
    /// How operations ended, and signs of life.
    pub(crate) log: Log,
}

impl<Db: Site> Clone for Hands<Db> {
    fn clone(&self) -> Self {
        Hands {
            plan: self.plan.clone(),
            postbox: self.postbox.clone(),
            side: self.side.clone(),
            running: self.running.clone(),
            done: self.done.clone(),
            log: self.log.clone(),
        }
    }
}

/// The payload of every message.
#[derive(Debug, Deserialize)]
pub(crate) struct Body {
    pub(crate) ext: String,
}

/// Counts a handler for as long as it runs.
struct Running(Arc<AtomicU64>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn first(rows: Vec<Texts>) -> String {
    rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten().unwrap_or_default()
}

fn clock_sql<Db: Site>() -> String {
    format!("select cast({} as text)", Db::CLOCK)
}

impl<Db: Site> Hands<Db> {
    fn enter(&self) -> Running {
        self.running.fetch_add(1, Ordering::SeqCst);
        self.done.fetch_add(1, Ordering::SeqCst);
        Running(self.running.clone())
    }

    /// Leaves a word of how an operation's handler ended.
    fn ended(&self, attempt: Attempt, end: Result<Receipt, OperationFailure>) -> Result<Receipt, OperationFailure> {
        let word = match &end {
            Ok(_) => "succeeded",
            Err(OperationFailure::InDoubt { .. }) => "in_doubt",
            Err(OperationFailure::Discarded { .. }) => "discarded",
            Err(OperationFailure::NotDone { .. } | OperationFailure::Refused { .. }) => "failed",
        };
        self.log.leave(format!("ended {} {} {} {word}", self.plan.life, attempt.delivery, attempt.number));
        end
    }

    /// Leaves signs of life for as long as the process runs and the database answers.
    pub(crate) async fn live(self) {
        loop {
            tokio::time::sleep(SIGNS).await;
            if self.clock().await.is_ok() {
                self.log.leave(format!("alive {}", self.plan.life));
            }
        }
    }

    /// The database's clock, over a connection that is nobody else's.
    pub(crate) async fn clock(&self) -> Result<String, sqlx::Error> {
        let mut connection = Db::acquire(&self.side).await?;
        Ok(first(Db::rows(&mut connection, clock_sql::<Db>()).await?))
    }

    /// Whether this process's worker is on record as alive: its heart has beaten.
    async fn is_alive(&self) -> Result<bool, sqlx::Error> {
        let mut connection = Db::acquire(&self.side).await?;
        let alive = match Db::KIND {
            Kind::Postgres => "expires_at > clock_timestamp()",
            // Whoever is on record there lives by a lock that its process holds.
            Kind::Sqlite => "true",
        };
        let (table, process) = (Db::postbox("worker"), std::process::id());
        let sql = format!("select cast(count(*) as text) from {table} where name like '%:{process}' and {alive}");
        Ok(first(Db::rows(&mut connection, sql).await?) != "0")
    }

    /// Does what the remote dares it to, once per message.
    async fn misbehave(&self, ext: &str) -> Result<bool, std::io::Error> {
        if !self.plan.wants(Fault::F18) {
            return Ok(false);
        }
        match ask(&self.plan.remote, &format!("dare {ext}"), false).await?.as_str() {
            "panic" => {
                hit("F18:panic", 1);
                panic!("as dared");
            }
            "block" => {
                hit("F18:block", 1);
                loop {
                    std::thread::park();
                }
            }
            "abort" => {
                hit("F18:abort", 1);
                std::process::abort();
            }
            "ignore" => {
                hit("F18:ignore", 1);
                // No await: nobody can cancel this.
                std::thread::sleep(TIMEOUT + Duration::from_secs(1));
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

/// One line there, one line back.
async fn ask(remote: &str, line: &str, points: bool) -> Result<String, std::io::Error> {
    let mut stream = TcpStream::connect(remote).await?;
    stream.write_all(format!("{line}\n").as_bytes()).await?;
    if points {
        crash::point("request-sent");
    }
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).await?;
    if points {
        crash::point("reply-received");
    }
    match answer.trim() {
        "" => Err(std::io::Error::other("the connection closed without an answer")),
        answer => Ok(answer.to_owned()),
    }
}

/// The same, in a way that no cancellation reaches.
fn ask_blocking(remote: &str, line: &str) -> Result<String, std::io::Error> {
    let mut stream = std::net::TcpStream::connect(remote)?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut answer = String::new();
    std::io::BufReader::new(stream).read_line(&mut answer)?;
    Ok(answer.trim().to_owned())
}

/// Asks the parent's operator door, too: it speaks to the remote the same way.
pub(crate) async fn find(remote: &str, key: &str) -> Result<bool, std::io::Error> {
    is_found(remote, &format!("find {key}")).await
}

/// Whether a plain handler has run for this message.
pub(crate) async fn was_noted(remote: &str, ext: &str) -> Result<bool, std::io::Error> {
    is_found(remote, &format!("noted {ext}")).await
}

async fn is_found(remote: &str, question: &str) -> Result<bool, std::io::Error> {
    match ask(remote, question, false).await?.as_str() {
        "found" => Ok(true),
        "nothing" => Ok(false),
        other => Err(std::io::Error::other(format!("the remote said {other}"))),
    }
}

async fn note<Db: Site>(
    Payload(body): Payload<Body>,
    attempt: Attempt,
    State(hands): State<Hands<Db>>,
) -> Result<(), Failure> {
    let _running = hands.enter();
    let clock = hands.clock().await?;
    let line = format!("note {} {} {} {clock} plain", body.ext, attempt.delivery, attempt.number);
    let answer = ask(&hands.plan.remote, &line, false).await?;
    hands.misbehave(&body.ext).await?;
    match answer.as_str() {
        "later" => Err(Failure::retry_after(format!("come back in {LATER} ms"), Duration::from_millis(LATER))),
        _ => Ok(()),
    }
}

/// What the remote's "later" means to a plain handler, in milliseconds.
pub(crate) const LATER: u64 = 400;

async fn charge<Db: Site>(
    op: Operation,
    payload: Payload<Body>,
    attempt: Attempt,
    State(hands): State<Hands<Db>>,
) -> Result<Receipt, OperationFailure> {
    hands.ended(attempt, call("charge", op, payload, attempt, &hands).await)
}

/// A call that the remote applies once per idempotency key, however often it comes.
async fn repeat<Db: Site>(
    op: Operation,
    payload: Payload<Body>,
    attempt: Attempt,
    State(hands): State<Hands<Db>>,
) -> Result<Receipt, OperationFailure> {
    hands.ended(attempt, call("repeat", op, payload, attempt, &hands).await)
}

async fn call<Db: Site>(
    what: &str,
    op: Operation,
    Payload(body): Payload<Body>,
    attempt: Attempt,
    hands: &Hands<Db>,
) -> Result<Receipt, OperationFailure> {
    let _running = hands.enter();
    let clock = hands.clock().await.not_done()?;
    let key = op.idempotency_key();
    let line = format!("{what} {} {key} {} {} {clock}", body.ext, attempt.delivery, attempt.number);
    let answer = match hands.misbehave(&body.ext).await.not_done()? {
        true => ask_blocking(&hands.plan.remote, &line)?,
        false => ask(&hands.plan.remote, &line, true).await?,
    };
    match answer.as_str() {
        "done" => Ok(Receipt::of(answer)),
        "later" => Err(OperationFailure::not_done("the remote said: not now")),
        "refused" => Err(OperationFailure::refused("the remote refused")),
        _ => Err(OperationFailure::in_doubt(format!("the remote said: {answer}"))),
    }
}

async fn find_charge<Db: Site>(op: Operation, State(hands): State<Hands<Db>>) -> Result<Reconciled, Failure> {
    Ok(match find(&hands.plan.remote, op.idempotency_key()).await? {
        true => Reconciled::Done(Receipt::of("found")),
        false => Reconciled::NotDone,
    })
}

fn follow_up(topic: &str, ext: &str) -> Option<Result<postbox::Draft, postbox::PublishError>> {
    let (topic, end) = follows(topic)?;
    let ext = format!("{ext}{end}");
    Some(Envelope::json(topic, &serde_json::json!({ "ext": ext })).map(|draft| draft.external_id(ext)))
}

async fn project<Db: Site>(
    envelope: Envelope,
    Payload(body): Payload<Body>,
    attempt: Attempt,
    State(hands): State<Hands<Db>>,
    mut tx: Tx<Db>,
) -> Result<(), Failure> {
    let _running = hands.enter();
    let clock = first(Db::rows(Db::within(&mut tx), clock_sql::<Db>()).await?);
    let insert = format!(
        "insert into {} (delivery, number, ext, clock) values ({}, {}, '{}', {clock})",
        Db::table("effect"),
        attempt.delivery,
        attempt.number,
        body.ext
    );
    Db::run(Db::within(&mut tx), insert).await?;
    if envelope.topic == "hog" {
        hold(&hands, &mut tx).await?;
    }
    if let Some(draft) = follow_up(&envelope.topic, &body.ext) {
        hands.postbox.publish(&mut tx, draft?).await?;
    }
    // Fails after its effect: what it wrote must be gone.
    match hands.dice(attempt).u32(..100) {
        0..4 => Err(Failure::retry("as the dice fell")),
        4..6 if hands.plan.wants(Fault::F18) => {
            hit("F18:panic", 1);
            panic!("as the dice fell")
        }
        _ => Ok(()),
    }
}

impl<Db: Site> Hands<Db> {
    fn dice(&self, attempt: Attempt) -> fastrand::Rng {
        let mixed = self.plan.seed ^ (attempt.delivery as u64).rotate_left(20) ^ u64::from(attempt.number);
        let mut dice = fastrand::Rng::with_seed(mixed);
        dice.u64(..);
        dice
    }
}

/// Holds its connection for longer than a lease.
async fn hold<Db: Site>(hands: &Hands<Db>, tx: &mut Tx<Db>) -> Result<(), Failure> {
    let Some(ms) = hands.plan.hog_ms else { return Ok(()) };
    let begun = Instant::now();
    match Db::KIND {
        // Busy, not idle: idle transactions are ended with the lease.
        Kind::Postgres => {
            let sql = format!("select cast(pg_catalog.pg_sleep({}) as text)", ms as f64 / 1000.0);
            Db::rows(Db::within(tx), sql).await?;
        }
        Kind::Sqlite => tokio::time::sleep(Duration::from_millis(ms)).await,
    }
    if begun.elapsed() > LEASE && hands.is_alive().await? {
        hit("F15", 1);
    }
    Ok(())
}

/// The routes of a worker.
pub(crate) fn routes<Db: Site>(hands: Hands<Db>, hogs: bool) -> Router<Db> {
    let quick = |base: u64| (Duration::from_millis(base), Duration::from_millis(400));
    macro_rules! plain {
        ($name:literal, $f:expr) => {
            handler($f).named($name).max_attempts(MANY).backoff(quick(50).0, quick(50).1).timeout(TIMEOUT)
        };
    }
    macro_rules! charging {
        ($name:literal) => {
            charging!($name, charge::<Db>)
        };
        ($name:literal, $f:expr) => {
            operation($f)
                .named($name)
                .max_attempts(FEW)
                .backoff(quick(50).0, quick(50).1)
                .timeout(TIMEOUT)
                .quiet_period(QUIET)
        };
    }
    let router = Router::new()
        .on("note", plain!("note", note::<Db>))
        .on("late", plain!("late", note::<Db>))
        .on(FLEETING, plain!("fleeting", note::<Db>))
        .on("project", plain!("project", project::<Db>))
        .on("pair.*", plain!("pair_note", note::<Db>))
        .on("pair.>", plain!("pair_project", project::<Db>))
        .on("charge", charging!("charge").reconcile(find_charge::<Db>))
        .on("blind", charging!("blind"))
        .on("repeat", charging!("repeat", repeat::<Db>).idempotent())
        .on(
            "chain.one",
            charging!("chain_one").reconcile(find_charge::<Db>).then(|body: Body, _: &Receipt| {
                let mut follow_ups = FollowUps::none();
                if let Some(draft) = follow_up("chain.one", &body.ext) {
                    follow_ups.push(draft);
                }
                follow_ups
            }),
        )
        .on("chain.two", plain!("chain_two", project::<Db>))
        .on("chain.three", plain!("chain_three", note::<Db>));
    let router = match hogs {
        true => router.on("hog", plain!("hog", project::<Db>).timeout(Duration::from_secs(8)).concurrency(3)),
        false => router,
    };
    router.with_state(hands)
}
