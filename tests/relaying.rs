//! Relays: what counts as sent was confirmed, in order by key, and nobody is in another's way.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postbox::admin::{Filter, KeyFilter, KeyWish, SinkRow};
use postbox::lifecycle::State;
use postbox::sink::{Outgoing, Sent, Sink, Unsent};
use postbox::testing::{Arrived, SinkBench, sink_suite};
use postbox::{BrokerError, Envelope, OnDead, Router, relay};
use postbox_testkit::{Fresh, Testable, on_both_stores, until};
use serde_json::json;
use uuid::Uuid;

on_both_stores!(
    the_suite,
    a_relay_is_a_subscription_like_any_other,
    what_was_not_tried_is_no_attempt,
    what_the_other_side_said_is_kept,
    what_is_rejected_is_dead_with_its_words,
    a_poisoned_key_blocks_no_other,
    what_is_told_to_wait_waits,
    nobody_there_pauses_the_relay,
    a_wrong_number_of_answers_sends_nothing,
    a_timeout_is_not_sent,
    unsafe_settings_stop_the_start,
    order_holds_while_half_of_it_fails,
);

const PATIENCE: Duration = Duration::from_secs(60);

type Verdict = Box<dyn Fn(&Outgoing, u32) -> Result<(), Unsent> + Send + Sync>;

/// Another side in memory.
struct Other {
    arrived: Mutex<Vec<Arrived>>,
    tries: Mutex<HashMap<Uuid, u32>>,
    answers: AtomicBool,
    calls: AtomicUsize,
    verdict: Verdict,
}

impl Other {
    fn new(verdict: impl Fn(&Outgoing, u32) -> Result<(), Unsent> + Send + Sync + 'static) -> Arc<Other> {
        Arc::new(Other {
            arrived: Mutex::default(),
            tries: Mutex::default(),
            answers: AtomicBool::new(true),
            calls: AtomicUsize::new(0),
            verdict: Box::new(verdict),
        })
    }

    fn count(&self) -> usize {
        self.arrived.lock().expect("a list").len()
    }
}

#[derive(Clone)]
struct ToMemory(Arc<Other>);

impl Sink for ToMemory {
    fn kind(&self) -> &'static str {
        "memory"
    }

    fn name(&self) -> String {
        "memory:other".into()
    }

    async fn open(&self) -> Result<Vec<String>, BrokerError> {
        Ok(vec!["nothing survives a restart".into()])
    }

    async fn send(&self, batch: &[Outgoing]) -> Sent {
        self.0.calls.fetch_add(1, Ordering::SeqCst);
        tokio::task::yield_now().await;
        let send = |one: &Outgoing| {
            if !self.0.answers.load(Ordering::SeqCst) {
                return Err(Unsent::again("nobody answers"));
            }
            let number = {
                let mut tries = self.0.tries.lock().expect("a map");
                let number = tries.entry(one.id).or_insert(0);
                *number += 1;
                *number
            };
            (self.0.verdict)(one, number)?;
            self.0.arrived.lock().expect("a list").push(Arrived {
                id: one.id,
                topic: one.topic.clone(),
                key: one.key.clone(),
                payload: one.payload_bytes().to_vec(),
            });
            Ok(())
        };
        batch.iter().map(send).collect()
    }
}

struct InMemory(Arc<Other>);

impl SinkBench for InMemory {
    type Sink = ToMemory;

    async fn sink(&self) -> ToMemory {
        ToMemory(self.0.clone())
    }

    async fn arrived(&self) -> Vec<Arrived> {
        std::mem::take(&mut *self.0.arrived.lock().expect("a list"))
    }

    async fn answers(&self, does: bool) {
        self.0.answers.store(does, Ordering::SeqCst);
    }
}

async fn the_suite<Db: Testable>() {
    let fresh = Db::fresh().await;
    sink_suite(&InMemory(Other::new(|_, _| Ok(()))), &fresh.postbox).await;
}

async fn publish<Db: Testable>(fresh: &Fresh<Db>, keys: &[&str]) -> Vec<Uuid> {
    let drafts = keys.iter().enumerate().map(|(n, key)| {
        let draft = Envelope::json("orders.placed", &json!({ "n": n }))?;
        Ok::<_, postbox::PublishError>(if key.is_empty() { draft } else { draft.key(*key) })
    });
    let published = fresh.postbox.publish_now(drafts).await.expect("it publishes");
    published.iter().map(|one| one.id).collect()
}

async fn sink_row<Db: Testable>(fresh: &Fresh<Db>) -> SinkRow {
    fresh.postbox.admin().sinks().await.expect("the sinks").pop().expect("one sink")
}

async fn list<Db: Testable>(fresh: &Fresh<Db>, filter: &str) -> Vec<postbox::admin::DeliveryRow> {
    let filter: Filter = filter.parse().expect("a filter");
    fresh.postbox.admin().list(&filter, 1000).await.expect("a list")
}

async fn a_relay_is_a_subscription_like_any_other<Db: Testable>() {
    let fresh = Db::fresh().await;
    let other = Other::new(|_, number| if number < 2 { Err(Unsent::again("not yet")) } else { Ok(()) });
    let short = Duration::from_millis(10);
    let routes = || Router::new().relay("orders.*", relay(ToMemory(other.clone())).named("out").backoff(short, short));
    let worker = fresh.postbox.worker(routes()).start().await.expect("it starts");
    let ids = publish(&fresh, &["a", "b", ""]).await;
    until("all are sent", async || list(&fresh, "state:succeeded subscription:out").await.len() == 3).await;
    until("all are counted", async || {
        let row = sink_row(&fresh).await;
        (row.sent, row.retried, row.lag) == (3, 3, 0)
    })
    .await;
    let row = sink_row(&fresh).await;
    assert_eq!((row.name.as_str(), row.kind.as_str(), row.target.as_str()), ("out", "memory", "memory:other"));
    assert_eq!((row.state.as_str(), row.dead, row.blocked_keys), ("sending", 0, 0));
    // Each attempt is on record, and a replay goes out under the message's own id.
    let sent = list(&fresh, "state:succeeded").await;
    let shown = fresh.postbox.admin().show(sent[0].id).await.expect("it is shown");
    let outcomes: Vec<_> = shown.attempts.iter().map(|attempt| attempt.outcome.as_deref()).collect();
    assert_eq!(outcomes, [Some("failed"), Some("succeeded")]);
    assert_eq!(shown.attempts[0].error.as_deref(), Some("not yet"));
    let replay = postbox::admin::Replay { actor: "ana".into(), reason: "they lost it".into(), irreversible: false };
    fresh.postbox.admin().replay(sent[0].id, &replay).await.expect("it is replayed");
    until("it is sent again", async || other.count() == 4).await;
    let arrived: BTreeSet<Uuid> = other.arrived.lock().expect("a list").iter().map(|one| one.id).collect();
    assert_eq!(arrived, ids.iter().copied().collect());
    // Paused, it waits.
    fresh.postbox.admin().pause("test", "out", "ana", "they migrate").await.expect("it is paused");
    publish(&fresh, &["a"]).await;
    assert_eq!((sink_row(&fresh).await.state.as_str(), other.count()), ("paused", 4));
    fresh.postbox.admin().resume("test", "out", "ana", "done").await.expect("it goes on");
    until("it is sent", async || other.count() == 5).await;
    worker.stop(Some(PATIENCE)).await.expect("it stops");
    // What was counted last is counted, too.
    let row = sink_row(&fresh).await;
    assert_eq!((row.sent, row.state.as_str()), (5, "stopped"));
    let status = fresh.postbox.admin().status().await.expect("the status");
    assert_eq!(status.sinks.len(), 1);
}

async fn what_was_not_tried_is_no_attempt<Db: Testable>() {
    let fresh = Db::fresh().await;
    let other = Other::new(|one, number| match (one.key.as_deref(), number) {
        (Some("first"), 1) => Err(Unsent::again("not yet")),
        (Some("behind"), 1) | (Some("never"), _) => Err(Unsent::not_tried("the one before it was not taken")),
        _ => Ok(()),
    });
    let short = Duration::from_millis(10);
    let routes = relay(ToMemory(other.clone())).named("out").unordered().backoff(short, short);
    let worker = fresh.postbox.worker(Router::new().relay("orders.*", routes)).start().await.expect("it starts");
    publish(&fresh, &["first", "behind", "behind", "never", "plain"]).await;
    until("four are sent", async || list(&fresh, "state:succeeded").await.len() == 4).await;
    until("they are counted", async || {
        let row = sink_row(&fresh).await;
        (row.sent, row.retried) == (4, 1)
    })
    .await;
    worker.stop(Some(PATIENCE)).await.expect("it stops");
    for row in list(&fresh, "subscription:out").await {
        let attempts = fresh.postbox.admin().show(row.id).await.expect("it is shown").attempts;
        let outcomes: Vec<_> = attempts.iter().filter_map(|attempt| attempt.outcome.as_deref()).collect();
        let expected = match row.key.as_deref() {
            Some("first") => &["failed", "succeeded"][..],
            Some("never") => &[],
            _ => &["succeeded"],
        };
        assert_eq!(outcomes, expected, "{row:?}");
    }
    let waiting = list(&fresh, "state:pending").await;
    assert_eq!((waiting.len(), waiting[0].key.as_deref(), waiting[0].attempt), (1, Some("never"), 0), "{waiting:?}");
}

async fn what_the_other_side_said_is_kept<Db: Testable>() {
    let fresh = Db::fresh().await;
    let other = Other::new(|one, number| {
        one.answered(json!({ "number": number }));
        one.answered("the first word stands");
        match one.key.as_deref() {
            Some("again") if number == 1 => Err(Unsent::again("not yet")),
            _ => Ok(()),
        }
    });
    let short = Duration::from_millis(10);
    let routes = relay(ToMemory(other)).named("out").backoff(short, short);
    let worker = fresh.postbox.worker(Router::new().relay("orders.*", routes)).start().await.expect("it starts");
    publish(&fresh, &["a", "again", ""]).await;
    until("all are sent", async || list(&fresh, "state:succeeded").await.len() == 3).await;
    worker.stop(Some(PATIENCE)).await.expect("it stops");
    for row in list(&fresh, "subscription:out").await {
        let attempts = fresh.postbox.admin().show(row.id).await.expect("it is shown").attempts;
        let receipts: Vec<_> = attempts.iter().map(|attempt| attempt.receipt.clone()).collect();
        match row.key.as_deref() {
            Some("again") => assert_eq!(receipts, [None, Some(json!({ "number": 2 }))]),
            _ => assert_eq!(receipts, [Some(json!({ "number": 1 }))]),
        }
    }
}

async fn what_is_rejected_is_dead_with_its_words<Db: Testable>() {
    let fresh = Db::fresh().await;
    let other = Other::new(|one, _| match one.key.as_deref() {
        Some("bad") => Err(Unsent::rejected("413 too large for us")),
        _ => Ok(()),
    });
    let routes = Router::new().relay("orders.>", relay(ToMemory(other.clone())).unordered());
    let worker = fresh.postbox.worker(routes).start().await.expect("it starts");
    publish(&fresh, &["a", "bad", "b", "bad", "c"]).await;
    until("the others are sent", async || list(&fresh, "state:succeeded").await.len() == 3).await;
    until("the two are dead", async || list(&fresh, "state:dead").await.len() == 2).await;
    for row in list(&fresh, "state:dead").await {
        assert_eq!((row.last_error.as_deref(), row.attempt), (Some("413 too large for us"), 1));
        assert_eq!(row.subscription, "memory:other");
    }
    assert_eq!(sink_row(&fresh).await.dead, 2);
    worker.stop(Some(PATIENCE)).await.expect("it stops");
}

async fn a_poisoned_key_blocks_no_other<Db: Testable>() {
    let fresh = Db::fresh().await;
    let mended = Arc::new(AtomicBool::new(false));
    let is_mended = mended.clone();
    let other = Other::new(move |one, _| match one.key.as_deref() {
        Some("poison") if !is_mended.load(Ordering::SeqCst) => Err(Unsent::rejected("no such subject")),
        _ => Ok(()),
    });
    let routes = Router::new().relay("orders.>", relay(ToMemory(other.clone())).named("out"));
    let worker = fresh.postbox.worker(routes).start().await.expect("it starts");
    let keys: Vec<&str> = (0..60).map(|n| ["poison", "a", "b"][n % 3]).collect();
    let ids = publish(&fresh, &keys).await;
    until("all others are sent", async || other.count() == 40).await;
    until("the key waits", async || sink_row(&fresh).await.blocked_keys == 1).await;
    let keys = fresh.postbox.admin().keys(&KeyFilter::default(), 10).await.expect("the keys");
    assert_eq!((keys[0].key.as_str(), keys[0].state.as_str(), keys.len()), ("poison", "blocked", 1));
    assert_eq!(list(&fresh, "state:dead").await.len(), 1);
    mended.store(true, Ordering::SeqCst);
    let wish = KeyWish {
        application: "test".into(),
        subscription: "out".into(),
        key: "poison".into(),
        actor: "ana".into(),
        reason: "the subject is there now".into(),
    };
    fresh.postbox.admin().unblock_key(&wish).await.expect("it goes on");
    until("all are sent", async || other.count() == 60).await;
    let poisoned: Vec<Uuid> = ids.iter().copied().step_by(3).collect();
    let arrived = other.arrived.lock().expect("a list").clone();
    let came: Vec<Uuid> = arrived.iter().filter(|one| one.key.as_deref() == Some("poison")).map(|one| one.id).collect();
    assert_eq!(came, poisoned, "in their order");
    worker.stop(Some(PATIENCE)).await.expect("it stops");
}

async fn what_is_told_to_wait_waits<Db: Testable>() {
    let fresh = Db::fresh().await;
    let other = Other::new(|_, _| Err(Unsent::again_after("429 slow down", Duration::from_secs(3600))));
    let worker = fresh.postbox.worker(Router::new().relay("orders.>", ToMemory(other.clone()))).start().await;
    let worker = worker.expect("it starts");
    publish(&fresh, &[""]).await;
    until("it is put off", async || {
        list(&fresh, "state:pending").await.first().is_some_and(|row| row.attempt == 1 && row.next_due_at.is_some())
    })
    .await;
    let row = list(&fresh, "state:pending").await.remove(0);
    let wait = row.next_due_at.expect("a time").duration_since(row.last_error_at.expect("a time")).as_secs();
    assert!((3590..=3610).contains(&wait), "{wait} s");
    worker.stop(Some(PATIENCE)).await.expect("it stops");
}

async fn nobody_there_pauses_the_relay<Db: Testable>() {
    let fresh = Db::fresh().await;
    let other = Other::new(|_, _| Err(Unsent::gone("410 Gone")));
    let worker = fresh.postbox.worker(Router::new().relay("orders.>", relay(ToMemory(other.clone())).named("out")));
    let worker = worker.start().await.expect("it starts");
    publish(&fresh, &["a", "b", "c"]).await;
    until("the relay is paused", async || sink_row(&fresh).await.state == "paused").await;
    worker.stop(Some(PATIENCE)).await.expect("it stops");
    let audit = fresh.postbox.admin().audit(10).await.expect("the audit");
    let paused = audit.iter().find(|entry| entry.action == "pause subscription").expect("it is on record");
    assert_eq!(paused.actor, "postbox");
    assert!(paused.reason.as_deref().is_some_and(|reason| reason.contains("410 Gone")), "{:?}", paused.reason);
    // Nothing is dead, and nothing is lost.
    assert_eq!((list(&fresh, "state:dead").await.len(), list(&fresh, "state:pending").await.len()), (0, 3));
}

/// Gives too few answers.
struct Careless(ToMemory);

impl Sink for Careless {
    fn kind(&self) -> &'static str {
        "careless"
    }

    fn name(&self) -> String {
        "careless".into()
    }

    async fn open(&self) -> Result<Vec<String>, BrokerError> {
        Ok(Vec::new())
    }

    async fn send(&self, batch: &[Outgoing]) -> Sent {
        let mut sent = self.0.send(batch).await;
        sent.pop();
        sent
    }
}

async fn a_wrong_number_of_answers_sends_nothing<Db: Testable>() {
    let fresh = Db::fresh().await;
    let sink = Careless(ToMemory(Other::new(|_, _| Ok(()))));
    let worker = fresh.postbox.worker(Router::new().relay("orders.>", relay(sink).max_attempts(1)));
    let worker = worker.start().await.expect("it starts");
    publish(&fresh, &["a"]).await;
    until("it is dead", async || list(&fresh, "state:dead").await.len() == 1).await;
    let words = list(&fresh, "state:dead").await.remove(0).last_error.expect("words");
    assert!(words.contains("0 answers for 1 messages"), "{words}");
    worker.stop(Some(PATIENCE)).await.expect("it stops");
}

/// Never answers.
struct Silent;

impl Sink for Silent {
    fn kind(&self) -> &'static str {
        "silent"
    }

    fn name(&self) -> String {
        "silent".into()
    }

    async fn open(&self) -> Result<Vec<String>, BrokerError> {
        Err(BrokerError::Unavailable("nobody is there".into()))
    }

    async fn send(&self, _: &[Outgoing]) -> Sent {
        std::future::pending().await
    }
}

async fn a_timeout_is_not_sent<Db: Testable>() {
    let fresh = Db::fresh().await;
    let silent =
        relay(Silent).timeout(Duration::from_millis(50)).max_attempts(2).backoff(Duration::ZERO, Duration::ZERO);
    let worker = fresh.postbox.worker(Router::new().relay("orders.>", silent)).start().await.expect("it starts");
    publish(&fresh, &["a"]).await;
    until("it is dead", async || list(&fresh, "state:dead").await.len() == 1).await;
    let row = list(&fresh, "state:dead").await.remove(0);
    let shown = fresh.postbox.admin().show(row.id).await.expect("it is shown");
    let outcomes: Vec<_> = shown.attempts.iter().filter_map(|attempt| attempt.outcome.as_deref()).collect();
    assert_eq!(outcomes, ["timed_out", "timed_out"]);
    assert_eq!(sink_row(&fresh).await.sent, 0);
    worker.stop(Some(PATIENCE)).await.expect("it stops");
}

/// Set up badly.
struct Unsafe;

impl Sink for Unsafe {
    fn kind(&self) -> &'static str {
        "unsafe"
    }

    fn name(&self) -> String {
        "unsafe".into()
    }

    async fn open(&self) -> Result<Vec<String>, BrokerError> {
        Err(BrokerError::Refused("confirms are off: turn them on".into()))
    }

    async fn send(&self, batch: &[Outgoing]) -> Sent {
        batch.iter().map(|_| Ok(())).collect()
    }
}

async fn unsafe_settings_stop_the_start<Db: Testable>() {
    let fresh = Db::fresh().await;
    let started = fresh.postbox.worker(Router::new().relay("orders.>", relay(Unsafe).named("out"))).start().await;
    let refused = started.expect_err("it is not safe").to_string();
    assert!(refused.contains("`out`") && refused.contains("confirms are off"), "{refused}");
    assert!(fresh.postbox.admin().subscriptions().await.expect("subscriptions").is_empty(), "nothing was declared");
}

async fn order_holds_while_half_of_it_fails<Db: Testable>() {
    let fresh = Db::fresh().await;
    // Each message fails twice at the most, chosen by its own number.
    let other = Other::new(|one, number| {
        let n: serde_json::Value = serde_json::from_slice(one.payload_bytes()).unwrap_or_default();
        match n["n"].as_u64().unwrap_or(0) % 3 >= u64::from(number) {
            true => Err(Unsent::again("a hiccup")),
            false => Ok(()),
        }
    });
    let short = Duration::from_millis(5);
    let sink = relay(ToMemory(other.clone())).backoff(short, short).on_dead(OnDead::Skip);
    let worker = fresh.postbox.worker(Router::new().relay("orders.>", sink)).start().await.expect("it starts");
    let names: Vec<String> = (0..300).map(|n| format!("k{}", n % 20)).collect();
    let keys: Vec<&str> = names.iter().map(String::as_str).collect();
    let ids = publish(&fresh, &keys).await;
    until("all are sent", async || other.count() == 300).await;
    worker.stop(Some(PATIENCE)).await.expect("it stops");
    let mut wanted: BTreeMap<&str, Vec<Uuid>> = BTreeMap::new();
    for (key, id) in keys.iter().zip(&ids) {
        wanted.entry(key).or_default().push(*id);
    }
    let arrived = other.arrived.lock().expect("a list").clone();
    for (key, ids) in wanted {
        let came: Vec<Uuid> = arrived.iter().filter(|one| one.key.as_deref() == Some(key)).map(|one| one.id).collect();
        assert_eq!(came, ids, "the order of {key}");
    }
    assert!(list(&fresh, "state:dead").await.iter().all(|row| row.state != State::Dead));
}
