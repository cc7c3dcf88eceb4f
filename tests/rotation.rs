//! The ring of ready tables and the windows of messages: what is drained goes under load, and nothing else.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postbox::lifecycle::Kind;
use postbox::store::Store;
use postbox::{Attempt, Envelope, Failure, Postgres, Retention, Router, handler};
use postbox_testkit::hand::{Hand, declared, publish};
use postbox_testkit::{Fresh, Testable, end_window};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(60);

/// Places in the ready order go on in the next slot of the ring, as after a million of them.
async fn next_slot(fresh: &Fresh<Postgres>) {
    let sequence = format!("{}.delivery_id", fresh.schema());
    let sql = format!("select setval('{sequence}', ((last_value >> 20) + 1) << 20) from {sequence}");
    Postgres::count(fresh, &sql).await;
}

/// Bytes of each slot of the ring.
async fn sizes(fresh: &Fresh<Postgres>) -> Vec<i64> {
    let mut sizes = Vec::new();
    for slot in 0..4 {
        let sql = format!("select pg_relation_size('{}.ready_{slot}')", fresh.schema());
        sizes.push(Postgres::count(fresh, &sql).await);
    }
    sizes
}

/// Looks through the ring; how many slots are left with something in them.
async fn rotate(fresh: &Fresh<Postgres>) -> i64 {
    let schema = fresh.schema();
    Postgres::execute(fresh, &format!("update {schema}.ring set look_at = '-infinity'")).await;
    Postgres::count(fresh, &format!("select {schema}.rotate()::bigint")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_slot_goes_whatever_an_old_snapshot_wants() {
    let fresh = Postgres::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    // It sees all of it, for as long as it is open; no vacuum may take that away.
    publish(&fresh, "t", 500).await;
    let mut old = fresh.pool.begin().await.expect("begin");
    sqlx::raw_sql("set transaction isolation level repeatable read").execute(&mut *old).await.expect("set");
    sqlx::raw_sql("select txid_current()").execute(&mut *old).await.expect("a snapshot");
    assert_eq!(hand.claim(499).await.items.len(), 499);
    assert_eq!(rotate(&fresh).await, 0, "what is written to now is left alone");
    next_slot(&fresh).await;
    publish(&fresh, "t", 10).await;
    assert_eq!(rotate(&fresh).await, 1, "there is one left in it");
    assert!(sizes(&fresh).await[0] > 0);
    // The one that was left is claimed first; the new ones come after it.
    let claimed = hand.claim(3).await;
    assert_eq!(claimed.items.len(), 3);
    assert!(claimed.items[0].delivery <= 500 && claimed.items[1].delivery > 1 << 20, "the oldest first");
    assert_eq!(rotate(&fresh).await, 0);
    let after = sizes(&fresh).await;
    assert!(after[0] == 0 && after[1] > 0, "{after:?}");
    old.rollback().await.expect("rollback");
    assert_eq!(hand.claim(100).await.items.len(), 8, "nothing went that was not taken");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_somebody_still_writes_to_waits() {
    let fresh = Postgres::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    publish(&fresh, "t", 5).await;
    // Slow to commit: its message is below all that comes after.
    let mut slow = fresh.pool.begin().await.expect("begin");
    fresh.postbox.publish(&mut slow, Envelope::json("t", &6)).await.expect("publish");
    next_slot(&fresh).await;
    publish(&fresh, "t", 5).await;
    assert_eq!(hand.claim(100).await.items.len(), 10);
    assert_eq!(rotate(&fresh).await, 1, "it cannot be locked, and is left for later");
    slow.commit().await.expect("commit");
    assert_eq!(rotate(&fresh).await, 1, "now there is something in it");
    // A claim begins where the last one ended: a sweep finds it.
    let deadline = std::time::Instant::now() + PATIENCE;
    while hand.claim(100).await.items.is_empty() {
        assert!(std::time::Instant::now() < deadline, "a late commit is found in time");
        tokio::task::yield_now().await;
    }
    assert_eq!(rotate(&fresh).await, 0);
    assert_eq!(sizes(&fresh).await[0], 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_rotation_and_dropped_windows_lose_nothing() {
    const MESSAGES: usize = 400;
    let fresh = Postgres::fresh().await;
    let done: Arc<Mutex<BTreeMap<(Uuid, &'static str), u32>>> = Arc::default();
    let app = || {
        let (once, twice) = (done.clone(), done.clone());
        let first = move |m: Envelope| {
            let done = once.clone();
            async move { *done.lock().expect("counts").entry((m.id, "once")).or_default() += 1 }
        };
        let second = move |m: Envelope, attempt: Attempt| {
            let done = twice.clone();
            async move {
                if attempt.number == 1 {
                    return Err(Failure::retry_after("again", Duration::from_millis(m.id.as_u128() as u64 % 50)));
                }
                *done.lock().expect("counts").entry((m.id, "twice")).or_default() += 1;
                Ok(())
            }
        };
        Router::<Postgres>::new().on("t", handler(first).named("once")).on("t", handler(second).named("twice"))
    };
    let workers = [
        fresh.postbox.worker(app()).poll_interval(Duration::from_millis(50)).start().await.expect("start"),
        fresh.postbox.worker(app()).poll_interval(Duration::from_millis(50)).start().await.expect("start"),
    ];
    let schema = fresh.schema();
    Postgres::execute(&fresh, &format!("update {schema}.subscription set keep_succeeded_ms = 0")).await;
    let over = AtomicBool::new(false);
    let turning = async {
        let (mut turns, mut gone) = (0_u32, 0);
        while !over.load(Ordering::SeqCst) {
            next_slot(&fresh).await;
            rotate(&fresh).await;
            end_window(&fresh).await;
            let retention = Retention { keep_unrouted: Duration::MAX, most: 100, tell: false };
            gone += fresh.postbox.store().retain(&retention).await.expect("retain").messages;
            turns += 1;
        }
        (turns, gone)
    };
    let publishing = async {
        let mut ids = Vec::new();
        for n in 0..MESSAGES {
            let published = fresh.postbox.publish_now([Envelope::json("t", &n)]).await.expect("publish");
            ids.push(published[0].id);
        }
        let all = async {
            while done.lock().expect("counts").len() < 2 * MESSAGES {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, all).await.expect("all of it is handled");
        over.store(true, Ordering::SeqCst);
        ids
    };
    let ((turns, gone), ids) = tokio::join!(turning, publishing);
    for worker in workers {
        worker.stop(None).await.expect("stop");
    }
    assert!(turns > 8 && gone > 0, "the ring went round and windows went: {turns} turns, {gone} messages");
    let done = done.lock().expect("counts");
    for id in ids {
        assert_eq!((done.get(&(id, "once")), done.get(&(id, "twice"))), (Some(&1), Some(&1)));
    }
}
