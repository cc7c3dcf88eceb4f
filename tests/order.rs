//! Order per key, across workers, and limits per key. On both stores.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use postbox::{Envelope, Failure, Payload, Router, handler};
use postbox_testkit::{Fresh, Testable, on_both_stores};
use serde::{Deserialize, Serialize};

on_both_stores!(
    keys_are_in_order_across_workers,
    one_that_fails_holds_back_its_own_key,
    no_more_of_a_key_run_than_its_limit,
);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Step {
    key: String,
    number: u32,
}

/// What handlers were called with, in order, and how many were at it at once.
#[derive(Default)]
struct Log {
    calls: Vec<Step>,
    running: HashMap<String, u32>,
    most_of_a_key: u32,
    most: u32,
    ended: usize,
}

#[derive(Clone, Default)]
struct Witness(Arc<Mutex<Log>>);

impl Witness {
    fn begin(&self, step: &Step) {
        let mut log = self.0.lock().expect("a log");
        log.calls.push(step.clone());
        let of_key = log.running.entry(step.key.clone()).or_default();
        *of_key += 1;
        log.most_of_a_key = log.most_of_a_key.max(log.running[&step.key]);
        log.most = log.most.max(log.running.values().sum());
    }

    fn end(&self, step: &Step) {
        let mut log = self.0.lock().expect("a log");
        *log.running.get_mut(&step.key).expect("it runs") -= 1;
        log.ended += 1;
    }

    /// The numbers that handlers of a key were called with.
    fn of(&self, key: &str) -> Vec<u32> {
        self.0.lock().expect("a log").calls.iter().filter(|step| step.key == key).map(|step| step.number).collect()
    }

    async fn ended(&self, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let (ended, calls) = {
                let log = self.0.lock().expect("a log");
                (log.ended, log.calls.len())
            };
            if ended >= count {
                return;
            }
            assert!(Instant::now() < deadline, "{ended} of {count} have ended, {calls} have begun");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn publish<Db: Testable>(fresh: &Fresh<Db>, steps: impl IntoIterator<Item = (String, u32)>) {
    let drafts = steps.into_iter().map(|(key, number)| {
        Envelope::json("step", &Step { key: key.clone(), number }).expect("a message").key(key)
    });
    fresh.postbox.publish_now(drafts.collect::<Vec<_>>()).await.expect("published");
}

/// For each number each key.
fn steps(keys: u32, numbers: u32) -> impl Iterator<Item = (String, u32)> {
    (1..=numbers).flat_map(move |number| (0..keys).map(move |key| (format!("key-{key}"), number)))
}

async fn keys_are_in_order_across_workers<Db: Testable>() {
    let fresh = Db::fresh().await;
    let witness = Witness::default();
    let mut workers = Vec::new();
    for _ in 0..3 {
        let witness = witness.clone();
        let step = move |Payload(step): Payload<Step>| {
            let witness = witness.clone();
            async move {
                witness.begin(&step);
                tokio::time::sleep(Duration::from_micros(300)).await;
                witness.end(&step);
            }
        };
        let routes = Router::<Db>::new().on("step", handler(step).named("steps").ordered());
        let worker = fresh.postbox.worker(routes).concurrency(4).poll_interval(Duration::from_millis(20));
        workers.push(worker.start().await.expect("starts"));
        publish(&fresh, steps(20, 10).map(|(key, n)| (key, n + 10 * workers.len() as u32))).await;
    }
    witness.ended(600).await;
    for key in 0..20 {
        assert_eq!(witness.of(&format!("key-{key}")), (11..=40).collect::<Vec<_>>(), "key-{key}");
    }
    {
        let log = witness.0.lock().expect("a log");
        assert_eq!(log.most_of_a_key, 1);
        assert!(log.most > 1, "different keys run side by side");
    }
    for worker in workers {
        worker.stop(None).await.expect("stops");
    }
}

async fn one_that_fails_holds_back_its_own_key<Db: Testable>() {
    let fresh = Db::fresh().await;
    let witness = Witness::default();
    let step = {
        let witness = witness.clone();
        move |Payload(step): Payload<Step>, attempt: postbox::Attempt| {
            let witness = witness.clone();
            async move {
                witness.begin(&step);
                tokio::task::yield_now().await;
                witness.end(&step);
                match step.key == "key-1" && step.number == 2 && attempt.number < 3 {
                    true => Err(Failure::retry("not yet")),
                    false => Ok(()),
                }
            }
        }
    };
    publish(&fresh, steps(3, 5)).await;
    let backoff = Duration::from_millis(20);
    let routes = Router::<Db>::new().on("step", handler(step).named("steps").ordered().backoff(backoff, backoff));
    let worker = fresh.postbox.worker(routes).concurrency(4).poll_interval(Duration::from_millis(20));
    let worker = worker.start().await.expect("starts");
    publish(&fresh, steps(3, 2).map(|(key, n)| (key, n + 5))).await;
    witness.ended(23).await;
    assert_eq!(witness.of("key-0"), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(witness.of("key-1"), [1, 2, 2, 2, 3, 4, 5, 6, 7]);
    assert_eq!(witness.of("key-2"), [1, 2, 3, 4, 5, 6, 7]);
    worker.stop(None).await.expect("stops");
}

async fn no_more_of_a_key_run_than_its_limit<Db: Testable>() {
    let fresh = Db::fresh().await;
    let witness = Witness::default();
    let mut workers = Vec::new();
    publish(&fresh, steps(2, 60)).await;
    for _ in 0..3 {
        let witness = witness.clone();
        let step = move |Payload(step): Payload<Step>| {
            let witness = witness.clone();
            async move {
                witness.begin(&step);
                tokio::time::sleep(Duration::from_millis(1)).await;
                witness.end(&step);
            }
        };
        let routes = Router::<Db>::new().on("step", handler(step).named("steps").limit_per_key(2));
        let worker = fresh.postbox.worker(routes).concurrency(8).poll_interval(Duration::from_millis(20));
        workers.push(worker.start().await.expect("starts"));
    }
    witness.ended(120).await;
    {
        let log = witness.0.lock().expect("a log");
        assert_eq!(log.most_of_a_key, 2);
        assert!(log.most > 2, "different keys run side by side: {}", log.most);
    }
    for worker in workers {
        worker.stop(None).await.expect("stops");
    }
}
