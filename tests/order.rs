//! Order per key, across workers, and limits per key. On both stores.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use postbox::admin::{Filter, KeyFilter, KeyRow, KeyWish};
use postbox::lifecycle::{End, Kind, State};
use postbox::store::{Claimed, Declared, Item, Settle, Store};
use postbox::{Envelope, Failure, Keys, OnDead, Payload, Postgres, Priority, Router, Worker, handler};
use postbox_testkit::hand::{Hand, declared, ended, registration, success};
use postbox_testkit::{Fresh, Testable, on_both_stores};
use serde::{Deserialize, Serialize};
use sqlx::AssertSqlSafe;

on_both_stores!(
    keys_are_in_order_across_workers,
    one_that_fails_holds_back_its_own_key,
    no_more_of_a_key_run_than_its_limit,
    a_dead_one_blocks_its_key_until_somebody_decides,
    a_dead_one_is_skipped_where_that_is_said,
    a_dead_one_parks_its_key_where_that_is_said,
    what_a_dead_worker_had_begun_comes_first_again,
    what_was_not_begun_keeps_its_place,
    many_wait_and_come_in_order,
    a_key_that_is_parked_waits_with_all_that_comes,
    the_way_to_deliver_does_not_change_under_deliveries,
    who_has_the_lock_of_a_key_publishes_first,
    a_backlog_is_drained_in_order,
    history_is_in_order_whatever_its_priority,
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
    let drafts = steps
        .into_iter()
        .map(|(key, number)| Envelope::json("step", &Step { key: key.clone(), number }).expect("a message").key(key));
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

/// Numbers that a handler fails for good, by key.
#[derive(Clone, Default)]
struct Poison(Arc<Mutex<Vec<(String, u32)>>>);

impl Poison {
    fn of(steps: &[(&str, u32)]) -> Poison {
        Poison(Arc::new(Mutex::new(steps.iter().map(|(key, number)| ((*key).to_owned(), *number)).collect())))
    }

    fn is(&self, step: &Step) -> bool {
        self.0.lock().expect("poison").contains(&(step.key.clone(), step.number))
    }

    fn is_mended(&self) {
        self.0.lock().expect("poison").clear();
    }
}

/// A worker in order whose handler fails for good on what is poisoned.
async fn worker<Db: Testable>(fresh: &Fresh<Db>, witness: &Witness, poison: &Poison, on_dead: OnDead) -> Worker<Db> {
    let (witness, poison) = (witness.clone(), poison.clone());
    let step = move |Payload(step): Payload<Step>| {
        let (witness, poison) = (witness.clone(), poison.clone());
        async move {
            witness.begin(&step);
            tokio::task::yield_now().await;
            witness.end(&step);
            if poison.is(&step) { Err(Failure::permanent("poisoned")) } else { Ok(()) }
        }
    };
    let routes = Router::<Db>::new().on("step", handler(step).named("steps").ordered().on_dead(on_dead));
    let worker =
        fresh.postbox.worker(routes).application("test").concurrency(4).poll_interval(Duration::from_millis(20));
    worker.start().await.expect("starts")
}

fn wish(key: &str) -> KeyWish {
    KeyWish {
        application: "test".into(),
        subscription: "steps".into(),
        key: key.into(),
        actor: "tester".into(),
        reason: "as the test says".into(),
    }
}

/// The only key that waits, when it does: its state, its head, and how many are behind it.
async fn waits<Db: Testable>(fresh: &Fresh<Db>, state: &str, waiting: i64) -> KeyRow {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let rows = fresh.postbox.admin().keys(&KeyFilter::default(), 10).await.expect("keys");
        if let [row] = rows.as_slice()
            && row.state == state
            && row.waiting == waiting
        {
            return row.clone();
        }
        assert!(Instant::now() < deadline, "no key is {state} with {waiting} waiting: {rows:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn a_dead_one_blocks_its_key_until_somebody_decides<Db: Testable>() {
    let fresh = Db::fresh().await;
    let (witness, poison) = (Witness::default(), Poison::of(&[("key-1", 2)]));
    publish(&fresh, steps(2, 4)).await;
    let worker = worker(&fresh, &witness, &poison, OnDead::Block).await;
    witness.ended(6).await;
    let row = waits(&fresh, "blocked", 2).await;
    assert_eq!((row.key.as_str(), row.cause.as_str()), ("key-1", "poisoned"));
    let head = row.head.expect("a head");
    let admin = fresh.postbox.admin();
    assert_eq!(admin.show(head).await.expect("a delivery").row.state, State::Dead);
    assert_eq!((witness.of("key-0"), witness.of("key-1")), (vec![1, 2, 3, 4], vec![1, 2]));
    // What is published meanwhile waits, too.
    publish(&fresh, [("key-1".to_owned(), 5), ("key-0".to_owned(), 5)]).await;
    witness.ended(7).await;
    waits(&fresh, "blocked", 3).await;
    // Not mended: it dies again, and nothing has passed it.
    admin.unblock_key(&wish("key-1")).await.expect("unblocked");
    witness.ended(8).await;
    waits(&fresh, "blocked", 3).await;
    poison.is_mended();
    let entry = admin.unblock_key(&wish("key-1")).await.expect("unblocked");
    assert_eq!((entry.action.as_str(), entry.delivery), ("unblock key", Some(head)));
    witness.ended(12).await;
    assert_eq!(witness.of("key-1"), [1, 2, 2, 2, 3, 4, 5]);
    assert_eq!(admin.keys(&KeyFilter::default(), 10).await.expect("keys").len(), 0);
    let error = admin.unblock_key(&wish("key-1")).await.expect_err("nothing waits");
    assert!(matches!(error, postbox::Error::Conflict(_)), "{error}");
    worker.stop(None).await.expect("stops");
}

async fn a_dead_one_is_skipped_where_that_is_said<Db: Testable>() {
    let fresh = Db::fresh().await;
    let (witness, poison) = (Witness::default(), Poison::of(&[("key-1", 2), ("key-1", 4)]));
    publish(&fresh, steps(2, 5)).await;
    let worker = worker(&fresh, &witness, &poison, OnDead::Skip).await;
    witness.ended(10).await;
    assert_eq!((witness.of("key-0"), witness.of("key-1")), (vec![1, 2, 3, 4, 5], vec![1, 2, 3, 4, 5]));
    worker.stop(None).await.expect("stops");
    let admin = fresh.postbox.admin();
    assert_eq!(admin.keys(&KeyFilter::default(), 10).await.expect("keys").len(), 0);
    let mut dead = Filter::default();
    dead.states = vec![State::Dead];
    assert_eq!(admin.list(&dead, 10).await.expect("dead letters").len(), 2);
}

async fn a_dead_one_parks_its_key_where_that_is_said<Db: Testable>() {
    let fresh = Db::fresh().await;
    let (witness, poison) = (Witness::default(), Poison::of(&[("key-1", 2)]));
    publish(&fresh, steps(2, 4)).await;
    let worker = worker(&fresh, &witness, &poison, OnDead::Park).await;
    witness.ended(6).await;
    waits(&fresh, "parked", 2).await;
    let entry = fresh.postbox.admin().skip_key(&wish("key-1")).await.expect("skipped");
    assert_eq!(entry.action, "skip key");
    witness.ended(8).await;
    assert_eq!(witness.of("key-1"), [1, 2, 3, 4]);
    worker.stop(None).await.expect("stops");
}

fn in_order() -> Declared {
    Declared { keys: Some(Keys::Ordered(OnDead::Block)), ..declared("steps", "step", Kind::Plain) }
}

fn numbers(claimed: &Claimed) -> Vec<u32> {
    let number = |item: &Item| {
        let envelope = item.envelope.as_ref().expect("a message");
        serde_json::from_str::<Step>(envelope.payload.json().expect("JSON")).expect("a step").number
    };
    claimed.items.iter().map(number).collect()
}

async fn what_a_dead_worker_had_begun_comes_first_again<Db: Testable>() {
    let fresh = Db::fresh().await;
    let first = Hand::register(&fresh, vec![in_order()]).await;
    let key = |number| ("key".to_owned(), number);
    // Published first, committed last.
    let late = match <Db as Testable>::NAME {
        "postgres" => {
            let mut tx = fresh.pool.begin().await.expect("a transaction");
            let draft = Envelope::json("step", &Step { key: "key".into(), number: 0 }).expect("a message").key("key");
            fresh.postbox.publish(&mut tx, draft).await.expect("published");
            Some(tx)
        }
        // There is one writer.
        _ => None,
    };
    publish(&fresh, (1..=4).map(key)).await;
    let claimed = first.claim(2).await;
    assert_eq!(numbers(&claimed), [1, 2]);
    let is_late = late.is_some();
    if let Some(tx) = late {
        tx.commit().await.expect("committed");
    }
    first.dies(&fresh).await;
    let heir = Hand::register(&fresh, vec![in_order()]).await;
    let claimed = heir.claim(10).await;
    assert_eq!(numbers(&claimed), [1], "whatever was begun comes first again, and the others wait for it");
    assert!(claimed.items[0].leads);
    waits(&fresh, "retrying", if is_late { 4 } else { 3 }).await;
    let done = ended(&claimed.items[0], Kind::Plain, End::Succeeded, false);
    heir.settle(Settle { moves: vec![done], close: true, ..heir.flush(&claimed, 0) }).await;
    let rest = heir.claim(10).await;
    let expected: &[u32] = if is_late { &[0, 2, 3, 4] } else { &[2, 3, 4] };
    assert_eq!(numbers(&rest), expected);
}

async fn what_was_not_begun_keeps_its_place<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![in_order()]).await;
    publish(&fresh, (1..=4).map(|number| ("key".to_owned(), number))).await;
    let claimed = hand.claim(2).await;
    let released = claimed.items.clone();
    hand.settle(Settle { released, close: true, ..hand.flush(&claimed, 0) }).await;
    assert_eq!(numbers(&hand.claim(10).await), [1, 2, 3, 4]);
}

async fn many_wait_and_come_in_order<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![in_order()]).await;
    publish(&fresh, (1..=2500).map(|number| ("key".to_owned(), number))).await;
    let claimed = hand.claim(1).await;
    let failed = ended(&claimed.items[0], Kind::Plain, End::Failed { permanent: true, retry_after: None }, false);
    hand.settle(Settle { moves: vec![failed], close: true, ..hand.flush(&claimed, 0) }).await;
    assert!(hand.claim(500).await.items.is_empty(), "the others wait");
    waits(&fresh, "blocked", 2499).await;
    fresh.postbox.admin().skip_key(&wish("key")).await.expect("skipped");
    let mut seen = Vec::new();
    while seen.len() < 2499 {
        let claimed = hand.claim(500).await;
        assert!(!claimed.items.is_empty(), "{} of 2499 came", seen.len());
        seen.extend(numbers(&claimed));
        let moves = claimed.items.iter().map(|item| ended(item, Kind::Plain, End::Succeeded, false)).collect();
        hand.settle(Settle { moves, close: true, ..hand.flush(&claimed, 0) }).await;
    }
    assert_eq!(seen, (2..=2500).collect::<Vec<_>>());
    assert_eq!(fresh.postbox.admin().keys(&KeyFilter::default(), 10).await.expect("keys").len(), 0);
}

async fn a_key_that_is_parked_waits_with_all_that_comes<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![in_order()]).await;
    let admin = fresh.postbox.admin();
    admin.park_key(&wish("key")).await.expect("parked");
    publish(&fresh, (1..=3).map(|number| ("key".to_owned(), number))).await;
    assert!(hand.claim(10).await.items.is_empty());
    let row = waits(&fresh, "parked", 3).await;
    assert_eq!((row.head, row.cause.as_str()), (None, "as the test says"));
    admin.unblock_key(&wish("key")).await.expect("unblocked");
    assert_eq!(numbers(&hand.claim(10).await), [1, 2, 3]);
    let error = admin.park_key(&KeyWish { subscription: "none".into(), ..wish("key") }).await.expect_err("no such");
    assert!(matches!(error, postbox::Error::NotFound(_)), "{error}");
}

async fn the_way_to_deliver_does_not_change_under_deliveries<Db: Testable>() {
    let fresh = Db::fresh().await;
    let plain = || vec![declared("steps", "step", Kind::Plain)];
    let hand = Hand::register(&fresh, plain()).await;
    publish(&fresh, [("key".to_owned(), 1)]).await;
    let store = hand.store();
    let error = store.register(&registration(vec![in_order()])).await.expect_err("one is unfinished");
    assert!(error.to_string().contains("unfinished"), "{error}");
    let claimed = hand.claim(1).await;
    hand.settle(Settle { successes: vec![success(&claimed.items[0])], close: true, ..hand.flush(&claimed, 0) }).await;
    let ordered = Hand::register(&fresh, vec![in_order()]).await;
    assert_eq!(ordered.subscriptions, hand.subscriptions);
    publish(&fresh, [("key".to_owned(), 2)]).await;
    assert_eq!(numbers(&ordered.claim(1).await), [2]);
    let error = store.register(&registration(plain())).await.expect_err("it is in order for good");
    assert!(error.to_string().contains("another name"), "{error}");
}

async fn who_has_the_lock_of_a_key_publishes_first<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![in_order()]).await;
    let draft = |number| Envelope::json("step", &Step { key: "key".into(), number }).expect("a message").key("key");
    let postbox = &fresh.postbox;
    let publish = async |number: u32| {
        let mut tx = fresh.pool.begin().await.expect("a transaction");
        postbox.lock_key(&mut tx, "key").await.expect("the lock");
        postbox.publish(&mut tx, draft(number)).await.expect("published");
        tx
    };
    let first = publish(1).await;
    let second = async {
        publish(2).await.commit().await.expect("committed");
    };
    let commit = async {
        if <Db as Testable>::NAME == "postgres" {
            let waits = format!(
                "select count(*) from pg_locks where locktype = 'advisory' and not granted
                     and (classid::bigint << 32) | objid::bigint = hashtextextended('{}.key key', 0)",
                fresh.schema()
            );
            while Db::count(&fresh, &waits).await == 0 {
                tokio::task::yield_now().await;
            }
        }
        first.commit().await.expect("committed");
    };
    tokio::join!(second, commit);
    assert_eq!(numbers(&hand.claim(10).await), [1, 2]);
    let mut tx = fresh.pool.begin().await.expect("a transaction");
    assert!(postbox.lock_key(&mut tx, "").await.is_err());
}

async fn a_backlog_is_drained_in_order<Db: Testable>() {
    let fresh = Db::fresh().await;
    let witness = Witness::default();
    let worker = || {
        let witness = witness.clone();
        let step = move |Payload(step): Payload<Step>, attempt: postbox::Attempt| {
            let witness = witness.clone();
            async move {
                witness.begin(&step);
                tokio::task::yield_now().await;
                witness.end(&step);
                // Their keys stand still for a moment, while claims of the others go on.
                match step.number == 20 && step.key.ends_with('7') && attempt.number == 1 {
                    true => Err(Failure::retry("not yet")),
                    false => Ok(()),
                }
            }
        };
        let backoff = Duration::from_millis(20);
        let steps = handler(step).named("steps").ordered().backoff(backoff, backoff);
        fresh.postbox.worker(Router::<Db>::new().on("step", steps)).concurrency(100)
    };
    worker().start().await.expect("starts").stop(None).await.expect("stops");
    // More than a claim takes, many times over: two run side by side.
    for number in 1..=40 {
        publish(&fresh, (0..100).map(|key| (format!("key-{key}"), number))).await;
    }
    let worker = worker().start().await.expect("starts");
    witness.ended(4010).await;
    for key in 0..100 {
        let mut wanted: Vec<u32> = (1..=40).collect();
        if key % 10 == 7 {
            wanted.insert(20, 20);
        }
        assert_eq!(witness.of(&format!("key-{key}")), wanted, "key-{key}");
    }
    assert_eq!(witness.0.lock().expect("a log").most_of_a_key, 1);
    worker.stop(None).await.expect("stops");
}

async fn history_is_in_order_whatever_its_priority<Db: Testable>() {
    let fresh = Db::fresh().await;
    publish(&fresh, [("key".to_owned(), 1)]).await;
    let high = |key: String, number| {
        let step = Step { key: key.clone(), number };
        Envelope::json("step", &step).expect("a message").key(key).priority(Priority::High)
    };
    let second = std::iter::once(high("key".into(), 2));
    // More than are sorted at once.
    let others = (0..5000).map(|n| high(format!("other-{}", n % 100), n));
    fresh.postbox.publish_now(second.chain(others).collect::<Vec<_>>()).await.expect("published");
    let hand = Hand::register(&fresh, vec![in_order()]).await;
    let mut claimed = hand.claim(500).await;
    claimed.items.retain(|item| item.envelope.as_ref().is_some_and(|e| e.key.as_deref() == Some("key")));
    assert_eq!(numbers(&claimed), [1, 2]);
}

#[tokio::test]
async fn history_is_sorted_by_one_claim_at_a_time() {
    let fresh = Postgres::fresh().await;
    publish(&fresh, (1..=5).map(|number| ("key".to_owned(), number))).await;
    let hand = Hand::register(&fresh, vec![in_order()]).await;
    let lock = format!(
        "select pg_advisory_xact_lock('{}.lane'::regclass::oid::int, {})",
        fresh.schema(),
        hand.subscriptions[0]
    );
    let mut tx = fresh.pool.begin().await.expect("a transaction");
    sqlx::query(AssertSqlSafe(lock)).execute(&mut *tx).await.expect("the lock");
    assert!(hand.claim(10).await.items.is_empty(), "somebody else sorts");
    tx.commit().await.expect("committed");
    assert_eq!(numbers(&hand.claim(10).await), [1, 2, 3, 4, 5]);
}
