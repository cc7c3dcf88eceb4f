//! A worker that delivers in order. Its handler calls the remote, and fails now and then before it does.

use std::time::Duration;

use postbox::{Attempt, Envelope, Failure, Payload, Postbox, Router, State, handler};

use super::{CONCURRENCY, STEPS, TOPIC};
use crate::child::{LEASE, listen, say};
use crate::scenario::Part;
use crate::scenario::limits::member::Remote;
use crate::site::Site;
use crate::traffic::MANY;

/// One in so many fails at its first attempt, after it has called the remote.
const FAILS: u32 = 97;

async fn step(
    envelope: Envelope,
    Payload(number): Payload<u32>,
    attempt: Attempt,
    State(remote): State<Remote>,
) -> Result<(), Failure> {
    let key = envelope.key.as_deref().unwrap_or_default();
    remote.pass(&format!("{key}:{number}"), u64::from(number % 3), attempt).await?;
    let digits: u32 = key.bytes().filter(u8::is_ascii_digit).map(u32::from).sum();
    match attempt.number == 1 && (number * 31 + digits).is_multiple_of(FAILS) {
        true => Err(Failure::retry("not the first time")),
        false => Ok(()),
    }
}

pub(crate) async fn work<Db: Site>(part: Part) -> Result<(), Box<dyn std::error::Error>> {
    listen(|_| {});
    let postbox = Postbox::<Db>::open(part.settings()).await?;
    // For long enough that those behind it would come first, if they were not held.
    let soon = (Duration::from_millis(200), Duration::from_millis(400));
    let step = handler(step).named(STEPS).ordered().max_attempts(MANY).backoff(soon.0, soon.1);
    let routes = Router::new().on(TOPIC, step).with_state(Remote(part.remote.clone()));
    let worker = postbox.worker(routes).lease(LEASE).poll_interval(Duration::from_millis(100));
    let worker = worker.concurrency(CONCURRENCY).start().await?;
    say("ready");
    // Until it is killed.
    std::future::pending::<()>().await;
    drop(worker);
    Ok(())
}
