//! A quiet machine: how soon a handler starts, and what a worker costs that has nothing to do.

use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use postbox::{Draft, Envelope, Failure, Payload, Postbox, Postgres, Router, Settings, handler};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

use crate::figure::{Bar, Figure, percentile};
use crate::load::TOPIC;
use crate::site::{Fresh, Site};
use crate::{Extent, Problem};

/// Messages a second while latency is measured.
const RATE: f64 = 100.0;
/// How long a worker is watched that has nothing to do.
const IDLE: Duration = Duration::from_secs(20);
/// Subscriptions of that worker.
const SUBSCRIPTIONS: usize = 50;

pub(crate) async fn latency(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let fresh = site.fresh().await?;
    let started: Arc<Mutex<Vec<Option<Instant>>>> = Arc::default();
    let log = started.clone();
    let note = move |Payload(number): Payload<usize>| {
        let now = Instant::now();
        if let Some(slot) = log.lock().ok().as_mut().and_then(|log| log.get_mut(number)) {
            *slot = Some(now);
        }
        std::future::ready(Ok::<(), Failure>(()))
    };
    let worker = fresh.postbox.worker(Router::new().on(TOPIC, handler(note).named("bench"))).start().await?;
    let messages = (RATE * extent.seconds * 3.0) as usize;
    if let Ok(mut log) = started.lock() {
        log.resize(messages, None);
    }
    let mut ticks = tokio::time::interval(Duration::from_secs_f64(1.0 / RATE));
    let (mut sent, mut committed) = (Vec::with_capacity(messages), Vec::with_capacity(messages));
    let mut connection = site.pool.acquire().await?;
    for number in 0..messages {
        ticks.tick().await;
        let draft: Draft = Envelope::json(TOPIC, &number)?;
        let mut tx = sqlx::Connection::begin(&mut *connection).await?;
        fresh.postbox.publish(&mut tx, draft).await?;
        sent.push(Instant::now());
        tx.commit().await?;
        committed.push(Instant::now());
    }
    crate::load::finished(site, &fresh).await?;
    worker.stop(None).await?;
    fresh.drop(site).await?;
    let started = started.lock().map(|log| log.clone()).map_err(|_| "a handler panicked")?;
    let started: Vec<Instant> = started.into_iter().collect::<Option<_>>().ok_or("a message has not started")?;
    let since = |from: &[Instant]| -> Vec<f64> {
        from.iter().zip(&started).map(|(f, s)| s.saturating_duration_since(*f).as_secs_f64() * 1000.0).collect()
    };
    let (after, whole) = (since(&committed), since(&sent));
    Ok(vec![
        Figure::alone("latency, commit to handler, 100/s, p50", percentile(&after, 0.5), "ms", Bar::AtMost(1.0)),
        Figure::alone("latency, commit to handler, 100/s, p99", percentile(&after, 0.99), "ms", Bar::AtMost(5.0)),
        Figure::alone("latency, the commit included, 100/s, p50", percentile(&whole, 0.5), "ms", Bar::None),
        Figure::alone("latency, the commit included, 100/s, p99", percentile(&whole, 0.99), "ms", Bar::None),
    ])
}

pub(crate) async fn idle(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let fresh = site.fresh().await?;
    let watch = if extent.rounds == 1 { IDLE / 4 } else { IDLE };
    let worker = Apart::start(&fresh, SUBSCRIPTIONS).await?;
    // The first seconds are busier: it learns, looks for history, falls asleep.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let statements = counted(site).await;
    let (before, begun) = (worker.cpu()?, Instant::now());
    tokio::time::sleep(watch).await;
    let took = begun.elapsed().as_secs_f64();
    let cpu = (worker.cpu()? - before) / took * 100.0;
    let calls = match (statements, counted(site).await) {
        (Ok(before), Ok(after)) => Some((after - before) / took),
        _ => None,
    };
    worker.end().await?;
    fresh.drop(site).await?;
    let mut figures = Vec::new();
    match calls {
        Some(calls) => {
            figures.push(Figure::alone("idle worker, 50 subscriptions, statements", calls, "1/s", Bar::AtMost(2.0)))
        }
        None => {
            eprintln!("pg_stat_statements is not loaded at this server: an idle worker's statements are not counted")
        }
    }
    figures.push(Figure::alone("idle worker, 50 subscriptions, processor", cpu, "% core", Bar::AtMost(1.0)));
    Ok(figures)
}

/// Statements so far of everybody, transaction control and this very query left out.
async fn counted(site: &Site) -> Result<f64, Problem> {
    site.run("create extension if not exists pg_stat_statements").await?;
    site.number("select coalesce(sum(calls), 0) from pg_stat_statements where query not ilike '%pg_stat_statements%'")
        .await
}

/// The MiB that a worker takes over its start, in a process of its own, in front of what is waiting.
pub(crate) async fn memory(fresh: &Fresh) -> Result<f64, Problem> {
    let worker = Apart::start(fresh, 1).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let now = worker.resident()?;
    let took = (now - worker.at_start) / 1024.0 / 1024.0;
    worker.end().await?;
    Ok(took)
}

/// A worker in a process of its own.
struct Apart {
    child: Child,
    /// Bytes before it was started.
    at_start: f64,
}

impl Apart {
    async fn start(fresh: &Fresh, subscriptions: usize) -> Result<Apart, Problem> {
        let url = fresh.postbox.settings().database_url().unwrap_or_default().to_owned();
        let mut child = Command::new(std::env::current_exe()?)
            .args(["worker-apart", &url, &fresh.schema, &subscriptions.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
        let first = lines.next_line().await?.ok_or("the worker apart ended before it had started")?;
        Ok(Apart { child, at_start: first.parse()? })
    }

    fn file(&self, name: &str) -> Result<String, Problem> {
        let pid = self.child.id().ok_or("the worker apart has ended")?;
        Ok(std::fs::read_to_string(format!("/proc/{pid}/{name}"))?)
    }

    /// Seconds of processor time so far; the kernel counts in hundredths.
    fn cpu(&self) -> Result<f64, Problem> {
        let stat = self.file("stat")?;
        let fields: Vec<&str> = stat.rsplit_once(") ").ok_or("no stat")?.1.split(' ').collect();
        let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        Ok(ticks / 100.0)
    }

    /// Bytes that it holds in memory.
    fn resident(&self) -> Result<f64, Problem> {
        resident(&self.file("status")?)
    }

    async fn end(mut self) -> Result<(), Problem> {
        if let Some(mut input) = self.child.stdin.take() {
            input.shutdown().await?;
        }
        let status = self.child.wait().await?;
        if status.success() { Ok(()) } else { Err(format!("the worker apart ended with {status}").into()) }
    }
}

fn resident(status: &str) -> Result<f64, Problem> {
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0)
}

/// The other process: says what it held before its worker started, and ends when its input does. Its
/// handlers take their time, so that what it has in memory is what it works ahead.
pub(crate) async fn apart(url: &str, schema: &str, subscriptions: usize) -> Result<(), Problem> {
    let settings = Settings::defaults().url(url).set("schema", schema).set("application", "bench");
    let postbox = Postbox::<Postgres>::open(settings).await?;
    let router = (0..subscriptions).fold(Router::new(), |router, number| {
        let wait = handler(async || {
            tokio::time::sleep(Duration::from_secs(60)).await;
            Ok::<(), Failure>(())
        });
        let (name, topic) = match subscriptions {
            1 => ("bench".to_owned(), TOPIC.to_owned()),
            _ => (format!("bench_{number}"), format!("bench.{number}")),
        };
        router.on(&topic, wait.named(name))
    });
    let held = resident(&std::fs::read_to_string("/proc/self/status")?)?;
    let worker = postbox.worker(router).start().await?;
    println!("{held}");
    tokio::io::copy(&mut tokio::io::stdin(), &mut tokio::io::sink()).await?;
    // What runs is handed back: for a plain handler that is a failed attempt.
    worker.stop_now().await?;
    Ok(())
}
