//! A worker whose subscriptions have limits. Its handlers call the remote, which counts.

use std::time::Duration;

use postbox::{Attempt, Envelope, Failure, Postbox, Router, State, handler};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::{AT_ONCE, BURST, CONCURRENCY, FEW, HIGH, LOW, LOWEST, PER, RATE, SLOW, SLOW_MS, WORK_MS};
use crate::child::{LEASE, listen, say};
use crate::scenario::{Part, now_us};
use crate::site::Site;
use crate::traffic::MANY;

#[derive(Clone)]
struct Remote(String);

impl Remote {
    /// Asks for something that takes the remote so long.
    async fn pass(&self, what: &str, ms: u64, attempt: Attempt) -> Result<(), Failure> {
        let begun = now_us();
        let mut stream = TcpStream::connect(&self.0).await?;
        let line = format!("pass {what} {ms} {} {} {begun}\n", attempt.delivery, std::process::id());
        stream.write_all(line.as_bytes()).await?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).await?;
        match answer.trim() {
            "done" => Ok(()),
            _ => Err(Failure::retry("the remote did not answer")),
        }
    }
}

async fn few(attempt: Attempt, State(remote): State<Remote>) -> Result<(), Failure> {
    remote.pass(FEW, WORK_MS, attempt).await
}

async fn slow(envelope: Envelope, attempt: Attempt, State(remote): State<Remote>) -> Result<(), Failure> {
    let level = if envelope.topic == LOW { LOWEST } else { HIGH };
    remote.pass(level, SLOW_MS, attempt).await
}

pub(crate) async fn work<Db: Site>(part: Part) -> Result<(), Box<dyn std::error::Error>> {
    listen(|_| {});
    let postbox = Postbox::<Db>::open(part.settings()).await?;
    let soon = (Duration::from_millis(20), Duration::from_millis(200));
    let few = handler(few).named(FEW).limit(AT_ONCE).max_attempts(MANY).backoff(soon.0, soon.1);
    let slow = handler(slow).named(SLOW).rate(RATE, PER).burst(BURST).max_attempts(MANY).backoff(soon.0, soon.1);
    let routes = Router::new().on("paced.few", few).on("paced.slow.*", slow).with_state(Remote(part.remote.clone()));
    let worker = postbox.worker(routes).lease(LEASE).poll_interval(Duration::from_millis(100));
    let worker = worker.concurrency(CONCURRENCY).start().await?;
    say("ready");
    // Until it is killed.
    std::future::pending::<()>().await;
    drop(worker);
    Ok(())
}
