//! A worker that declares schedules and publishes their ticks, and tells the remote of each that it is handed.

use std::time::Duration;

use postbox::{Attempt, Envelope, Failure, Missed, Postbox, Router, Schedule, State, handler};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::child::{LEASE, listen, say};
use crate::scenario::Part;
use crate::site::Site;
use crate::traffic::MANY;

#[derive(Clone)]
struct Remote(String);

async fn tell(envelope: Envelope, attempt: Attempt, State(remote): State<Remote>) -> Result<(), Failure> {
    let of = |name: &str| envelope.headers.get(name).cloned().unwrap_or_default();
    let what = format!("{}@{}", of("postbox-schedule"), of("postbox-schedule-tick"));
    let line = format!("note {what} {} {} 0 {}\n", attempt.delivery, attempt.number, envelope.id);
    let mut stream = TcpStream::connect(&remote.0).await?;
    stream.write_all(line.as_bytes()).await?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).await?;
    match answer.trim() {
        "done" => Ok(()),
        _ => Err(Failure::retry("the remote did not answer")),
    }
}

pub(crate) async fn work<Db: Site>(part: Part) -> Result<(), Box<dyn std::error::Error>> {
    listen(|_| {});
    let postbox = Postbox::<Db>::open(part.settings()).await?;
    let soon = (Duration::from_millis(20), Duration::from_millis(200));
    let tell = handler(tell).named("tell").max_attempts(MANY).backoff(soon.0, soon.1);
    let routes = Router::new().on("ticks", tell).with_state(Remote(part.remote.clone()));
    let mut worker = postbox.worker(routes).lease(LEASE).poll_interval(Duration::from_millis(100));
    for wanted in &part.schedules {
        let schedule = Schedule::cron(&wanted.name, &wanted.cron).time_zone(&wanted.time_zone);
        worker = worker.schedule(schedule.publishes("ticks").missed(Missed::All));
    }
    let worker = worker.start().await?;
    say("ready");
    // Until it is killed.
    std::future::pending::<()>().await;
    drop(worker);
    Ok(())
}
