//! Workers whose own clocks are an hour apart keep schedules by the database's clock, also when one of them
//! is killed in the middle of a tick. libfaketime sets their clocks.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use postbox::admin::Filter;
use postbox::lifecycle::Kind;
use postbox::store::Store;
use postbox::{Envelope, Missed, Postgres, Schedule};
use postbox_testkit::{Fresh, Testable, WorkerProcess, hand};

const WORKER: &str = env!("CARGO_BIN_EXE_postbox-test-worker");

/// Where Debian puts it.
fn faketime() -> String {
    let folders = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let mut found = folders.map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
    let library = found.find(|library| library.exists());
    library.expect("libfaketime is not installed; ./scripts/test installs it").display().to_string()
}

fn worker(fresh: &Fresh<Postgres>, library: &str, offset: &str, more: &[(&str, &str)]) -> WorkerProcess {
    let mut variables = vec![
        ("LD_PRELOAD", library),
        ("FAKETIME", offset),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("DONT_FAKE_MONOTONIC", "1"),
    ];
    variables.extend(more);
    WorkerProcess::start(WORKER, fresh, &variables)
}

async fn published(fresh: &Fresh<Postgres>) -> Vec<Envelope> {
    let admin = fresh.postbox.admin();
    let mut envelopes = Vec::new();
    for row in admin.list(&Filter::default(), 1000).await.expect("list").into_iter().rev() {
        envelopes.push(admin.message(row.message).await.expect("there").0);
    }
    envelopes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_hour_apart_each_tick_is_published_once_and_on_time() {
    let library = faketime();
    let fresh = Postgres::fresh().await;
    let declared = [hand::declared("all", "every.>", Kind::Plain)];
    fresh.postbox.store().declare("test", &declared).await.expect("declare");
    let before = Timestamp::now();
    // One that dies after its first COMMIT was sent, whose answer nobody has read.
    let dies = worker(&fresh, &library, "+0s", &[("POSTBOX_CRASH_POINT", "ticking")]);
    let schedule = Schedule::cron("s", "* * * * * *").publishes("every.second").missed(Missed::All);
    fresh.postbox.schedule(schedule).await.expect("made");
    dies.kill_at("ticking").await;
    let until = async |count: usize| {
        let enough = async {
            while published(&fresh).await.len() < count {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), enough).await.expect("a tick each second");
    };
    // Each by itself: the other one cannot make up for what it does wrong. Then together.
    for (offset, count) in [("+3600s", 3), ("-3600s", 5)] {
        let one = worker(&fresh, &library, offset, &[]);
        until(count).await;
        one.kill().await;
    }
    let all = ["-3600s", "+3600s", "+0s"].map(|offset| worker(&fresh, &library, offset, &[]));
    until(published(&fresh).await.len() + 3).await;
    for worker in all {
        worker.kill().await;
    }
    let published = published(&fresh).await;
    let ticks: Vec<Timestamp> = published.iter().map(|envelope| envelope.occurred_at).collect();
    assert!(ticks.windows(2).all(|pair| pair[1] == pair[0] + SignedDuration::from_secs(1)), "each once: {ticks:?}");
    assert!(ticks[0] >= before && ticks[0] < before + SignedDuration::from_secs(60), "{ticks:?}");
    for envelope in &published {
        let late = envelope.received_at.duration_since(envelope.occurred_at);
        assert!(!late.is_negative() && late < SignedDuration::from_secs(60), "{late}: {}", envelope.occurred_at);
    }
}
