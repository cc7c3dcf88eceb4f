//! A worker in a process of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postbox::Postbox;
use tokio::signal::unix::{SignalKind, signal};

use super::handlers::{Hands, routes};
use super::stderr::was_told_full;
use super::{ChildPlan, LEASE, hit, listen, say};
use crate::fault::Fault;
use crate::full::WORKER_WORKS;
use crate::log::Log;
use crate::site::Site;

/// It could not start: the database is away.
pub(crate) const NOT_STARTED: i32 = 3;
/// It stopped, and left something to a takeover.
pub(crate) const LEFT_OVER: i32 = 4;

pub(crate) async fn run<Db: Site>(plan: ChildPlan) -> Result<(), Box<dyn std::error::Error>> {
    listen(|_| {});
    let postbox = match Postbox::<Db>::open(plan.settings()).await {
        Ok(postbox) => postbox,
        Err(error) => {
            eprintln!("not started: {error}");
            std::process::exit(NOT_STARTED);
        }
    };
    let plan = Arc::new(plan);
    let hands = Hands {
        side: Db::pool(&plan.direct, 4, Duration::from_secs(1))?,
        postbox: postbox.clone(),
        running: Arc::new(AtomicU64::new(0)),
        done: Arc::new(AtomicU64::new(0)),
        log: Log::open(&plan.log)?,
        plan: plan.clone(),
    };
    tokio::spawn(hands.clone().live());
    let (running, done) = (hands.running.clone(), hands.done.clone());
    // A clock that is right after all proves nothing.
    let wrong = plan.tag != Some(Fault::F14) || hands.clock().await.is_ok_and(|clock| is_wrong(&clock));
    // With some, work alone is no hit.
    let by_work = |tag: &Fault| wrong && !matches!(tag, Fault::F11 | Fault::F15);
    if let Some(tag) = plan.tag.filter(by_work) {
        let done = done.clone();
        tokio::spawn(async move {
            let mut told = 0;
            loop {
                tokio::time::sleep(Duration::from_millis(100)).await;
                let now = done.load(Ordering::SeqCst);
                if now > told {
                    hit(tag, now - told);
                    told = now;
                }
            }
        });
    }
    if plan.wants(Fault::F16) {
        tokio::spawn(work_after_full(done.clone()));
    }
    let signalled = Arc::new(AtomicBool::new(false));
    let mut terminate = signal(SignalKind::terminate())?;
    {
        // A listener of its own: what ran when the signals came.
        let (mut terminate, signalled) = (signal(SignalKind::terminate())?, signalled.clone());
        let running = running.clone();
        let heeds_both = plan.patience_ms.is_none();
        tokio::spawn(async move {
            while terminate.recv().await.is_some() {
                signalled.store(true, Ordering::SeqCst);
                // With a patience of its own it does not listen for a second one.
                let running = if heeds_both { running.load(Ordering::SeqCst) } else { 0 };
                say(format_args!("terminated {running}"));
            }
        });
    }
    let hogs = plan.hog_ms.is_some();
    let builder =
        postbox.worker(routes(hands, hogs)).lease(LEASE).poll_interval(Duration::from_millis(100)).concurrency(6);
    let ended = match plan.patience_ms.map(Duration::from_millis) {
        None => builder.run().await,
        Some(patience) => match builder.start().await {
            Err(error) => Err(error),
            Ok(worker) => {
                terminate.recv().await;
                let (begun, busy) = (Instant::now(), running.load(Ordering::SeqCst));
                let ended = worker.stop(Some(patience)).await;
                if busy > 0 && begun.elapsed() >= patience {
                    hit("F19:deadline", 1);
                }
                ended
            }
        },
    };
    // Handlers that never end do not keep the process.
    std::process::exit(match ended {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("ended: {error}");
            if signalled.load(Ordering::SeqCst) { LEFT_OVER } else { NOT_STARTED }
        }
    })
}

/// Tells what is done after this process was told that the disk is full.
async fn work_after_full(done: Arc<AtomicU64>) {
    let mut last = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = done.load(Ordering::SeqCst);
        if now > last && was_told_full() {
            hit(WORKER_WORKS, now - last);
        }
        last = now;
    }
}

/// Whether this process's clock is far from the database's, in milliseconds.
fn is_wrong(database: &str) -> bool {
    let here = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_millis());
    database.parse::<u128>().is_ok_and(|there| here.abs_diff(there) > 30 * 60_000)
}
