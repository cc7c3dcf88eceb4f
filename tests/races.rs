//! Where two transactions meet: what one does while the other has not committed. On PostgreSQL most
//! of all; SQLite has one writer.

use std::time::Duration;

use postbox::lifecycle::{End, Kind, State};
use postbox::store::{Beat, Guarded, HandlerTx, Item, LeaseRef, Move, Registration, Settle, Store};
use postbox::{Envelope, Operation, OperationFailure, Postgres, Receipt, Router, operation};
use postbox_testkit::hand::{Hand, declared, ended, publish, registration, success};
use postbox_testkit::{Fresh, Testable, on_both_stores};
use uuid::Uuid;

on_both_stores!(
    what_has_begun_is_not_handed_back,
    a_fenced_flush_publishes_nothing,
    a_fenced_transaction_leaves_no_effect,
);

#[test]
fn planted_bugs_are_caught() {
    postbox_testkit::planted::each_is_caught(module_path!());
}

async fn hand_of<Db: Testable>(fresh: &Fresh<Db>, kind: Kind) -> Hand<Db> {
    let subscriptions = vec![declared("one", "t", kind), declared("after", "after", Kind::Plain)];
    Hand::registered(fresh, &registration(subscriptions)).await
}

/// A success with an outcome row of its own.
fn succeeded(item: &Item) -> Move {
    ended(item, Kind::Plain, End::Succeeded, false)
}

/// Asks until the answer is one, a minute at most.
async fn until_one(fresh: &Fresh<Postgres>, what: &str, sql: &str) {
    let looking = async {
        while Postgres::count(fresh, sql).await != 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), looking).await.unwrap_or_else(|_| panic!("not {what} in a minute"));
}

async fn what_has_begun_is_not_handed_back<Db: Testable>() {
    let fresh = Db::fresh().await;
    publish(&fresh, "t", 1).await;
    let hand = hand_of(&fresh, Kind::Operation).await;
    hand.backfill().await;
    let claimed = hand.claim(10).await;
    let starts = vec![(claimed.items[0].delivery, 1)];
    let begun = hand.store().settle(&Settle { starts, ..hand.flush(&claimed, 0) }).await.expect("settle");
    assert_eq!(begun, Guarded::Done);
    hand.store().disown(hand.worker, claimed.token).await.expect_err("it may be happening");
    assert_eq!(hand.claim(10).await.items.len(), 0, "nobody else gets it");
    let shown = fresh.postbox.admin().show(claimed.items[0].delivery).await.expect("show");
    assert_eq!((shown.row.state, shown.row.attempt), (State::Running, 1));
}

async fn a_fenced_flush_publishes_nothing<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = hand_of(&fresh, Kind::Plain).await;
    hand.backfill().await;
    publish(&fresh, "t", 1).await;
    let claimed = hand.claim(10).await;
    let mut late = hand.flush(&claimed, 0);
    late.successes = vec![success(&claimed.items[0])];
    late.follow_ups = vec![Envelope::json("after", &1).expect("a draft")];
    let worker = hand.worker;
    Db::kill(&fresh, hand.postbox, worker).await;
    assert!(fresh.postbox.store().take_over(0.0).await.expect("take over").is_some());
    assert_eq!(fresh.postbox.store().settle(&late).await.expect("settle"), Guarded::Fenced);
    let heir = hand_of(&fresh, Kind::Plain).await;
    let again = heir.claim(10).await;
    let topics: Vec<&str> = again.items.iter().filter_map(|i| i.envelope.as_ref()).map(|e| e.topic.as_str()).collect();
    assert_eq!(topics, ["t"], "what follows from an outcome that was not written is not published");
}

async fn a_fenced_transaction_leaves_no_effect<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = hand_of(&fresh, Kind::Transactional).await;
    hand.backfill().await;
    publish(&fresh, "t", 1).await;
    let claimed = hand.claim(10).await;
    let held = LeaseRef { worker: hand.worker, batch: claimed.batch, token: claimed.token };
    let lost = LeaseRef { token: Uuid::now_v7(), ..held };
    for (lease, expected) in [(lost, Guarded::Fenced), (held, Guarded::Done)] {
        let mut tx = hand.store().open(lease, Duration::from_secs(60)).await.expect("open");
        let effect = Envelope::json("after", &1).expect("a draft");
        fresh.postbox.publish(tx.connection(), effect).await.expect("publish");
        let settled = hand.store().settle_open(tx, lease, &succeeded(&claimed.items[0]), &[]).await;
        assert_eq!(settled.expect("settle"), expected);
    }
    assert_eq!(hand.claim(10).await.items.len(), 1, "the effect of the one that was settled, and no other");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_worker_that_lives_is_left_alone() {
    let fresh = Postgres::fresh().await;
    let short =
        Registration { lease: Duration::from_millis(50), ..registration(vec![declared("one", "t", Kind::Plain)]) };
    let hand = Hand::registered(&fresh, &short).await;
    // Its sign of life holds for a minute; its lease row gets older than what it registered with.
    let beat = Beat { worker: hand.worker, lease: Duration::from_secs(60) };
    assert!(hand.store().beat(beat).await.expect("beat").is_some());
    hand.backfill().await;
    publish(&fresh, "t", 1).await;
    assert_eq!(hand.claim(10).await.items.len(), 1);
    let old = format!(
        "select count(*) from {}.lease where claimed_at < clock_timestamp() - interval '100 milliseconds'",
        fresh.schema()
    );
    until_one(&fresh, "old", &old).await;
    assert_eq!(fresh.postbox.store().take_over(0.0).await.expect("take over"), None, "it lives");
    assert!(hand.store().beat(beat).await.expect("beat").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_settle_that_commits_during_a_takeover_is_seen() {
    let fresh = Postgres::fresh().await;
    let hand = hand_of(&fresh, Kind::Plain).await;
    hand.backfill().await;
    publish(&fresh, "t", 1).await;
    let claimed = hand.claim(10).await;
    let schema = fresh.schema();
    // Somebody's lock stops the flush half-way: it has its lease row, and has not committed.
    let mut blocker = fresh.pool.begin().await.expect("begin");
    let item = &claimed.items[0];
    let same = format!(
        "insert into {schema}.outcome (delivery, number, kind, state_after, rev, subscription, message, batch, worker,
             started_at, finished_at)
         values ({}, 1, 'failed', 'dead', 0, 0, '{}', 0, '{}', now(), now())",
        item.delivery, item.message, hand.worker
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(same)).execute(&mut *blocker).await.expect("the same key");
    let (store, flush) =
        (hand.store().clone(), Settle { moves: vec![succeeded(&claimed.items[0])], ..hand.flush(&claimed, 0) });
    let settling = tokio::spawn(async move { store.settle(&flush).await });
    let waits = format!(
        "select count(*) from pg_stat_activity where wait_event = 'transactionid' and query like '%insert into {schema}.outcome %'"
    );
    until_one(&fresh, "half-way", &waits).await;
    // Meanwhile its worker is taken for dead.
    let dead = format!("update {schema}.worker set expires_at = clock_timestamp() - interval '1 ms'");
    Postgres::execute(&fresh, &dead).await;
    let store = fresh.postbox.store().clone();
    let taking = tokio::spawn(async move { store.take_over(0.0).await });
    // It leaves a lease that somebody holds for later; one that read before it locked would wait here.
    let waits = format!(
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%from {schema}.lease where worker%for update%'
            and pid <> pg_backend_pid()"
    );
    let met = async {
        while !taking.is_finished() && Postgres::count(&fresh, &waits).await == 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), met).await.expect("the takeover comes to the lease");
    blocker.rollback().await.expect("rollback");
    assert_eq!(settling.await.expect("a task").expect("settle"), Guarded::Done);
    let taken = match taking.await.expect("a task").expect("take over") {
        Some(taken) => taken,
        None => fresh.postbox.store().take_over(0.0).await.expect("take over").expect("somebody dead"),
    };
    assert_eq!((taken.pending, taken.in_doubt, taken.dead), (0, 0, 0), "what was settled is not handed out again");
    let shown = fresh.postbox.admin().show(claimed.items[0].delivery).await.expect("show");
    assert_eq!((shown.row.state, shown.attempts.len()), (State::Succeeded, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_was_taken_over_in_part_does_not_live_on() {
    let fresh = Postgres::fresh().await;
    let hand = hand_of(&fresh, Kind::Operation).await;
    hand.backfill().await;
    publish(&fresh, "t", 1).await;
    let begun = hand.claim(10).await;
    let starts = vec![(begun.items[0].delivery, 1)];
    hand.store().settle(&Settle { starts, ..hand.flush(&begun, 0) }).await.expect("begin");
    publish(&fresh, "t", 1).await;
    let held = hand.claim(10).await;
    let schema = fresh.schema();
    // A settle of the second batch stands still with its lease row locked.
    let mut settling = fresh.pool.begin().await.expect("begin");
    let lock = format!("select from {schema}.lease where token = $1 for share");
    sqlx::query(sqlx::AssertSqlSafe(lock)).bind(held.token).execute(&mut *settling).await.expect("lock");
    let dead = format!("update {schema}.worker set expires_at = clock_timestamp() - interval '1 ms'");
    Postgres::execute(&fresh, &dead).await;
    let taken = fresh.postbox.store().take_over(0.0).await.expect("take over").expect("somebody dead");
    assert_eq!((taken.in_doubt, taken.pending), (1, 0), "what could be taken");
    // The paused worker comes back: it must learn that it is over, or it would believe in its lease.
    let beat = Beat { worker: hand.worker, lease: Duration::from_secs(60) };
    assert!(hand.store().beat(beat).await.expect("beat").is_none());
    settling.rollback().await.expect("rollback");
    let taken = fresh.postbox.store().take_over(0.0).await.expect("take over").expect("the rest of it");
    assert_eq!((taken.in_doubt, taken.pending), (0, 1));
    assert!(fresh.postbox.store().take_over(0.0).await.expect("take over").is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_commits_late_is_not_passed_over() {
    let fresh = Postgres::fresh().await;
    let hand = hand_of(&fresh, Kind::Plain).await;
    hand.backfill().await;
    // The first publisher draws the lower position and stalls; the second commits.
    let mut tx = fresh.postbox.store().begin().await.expect("begin");
    fresh.postbox.publish(tx.connection(), Envelope::json("t", &"first").expect("a draft")).await.expect("publish");
    publish(&fresh, "t", 1).await;
    let second = hand.claim(10).await;
    assert_eq!(second.items.len(), 1, "what has committed");
    let successes = vec![success(&second.items[0])];
    let flush = Settle { successes, close: true, ..hand.flush(&second, 0) };
    assert_eq!(hand.store().settle(&flush).await.expect("settle"), Guarded::Done);
    fresh.postbox.store().commit(tx).await.expect("commit");
    let first = hand.claim(10).await;
    assert_eq!(first.items.len(), 1, "both are delivered");
    assert!(first.items[0].delivery < second.items[0].delivery, "the late one has the lower position");
}

/// Further below the mark of those who claim than a claim looks by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_commits_late_and_far_below_is_swept_up() {
    let fresh = Postgres::fresh().await;
    let hand = hand_of(&fresh, Kind::Plain).await;
    hand.backfill().await;
    let mut tx = fresh.postbox.store().begin().await.expect("begin");
    fresh.postbox.publish(tx.connection(), Envelope::json("t", &"first").expect("a draft")).await.expect("publish");
    publish(&fresh, "t", 1_000).await;
    let others = hand.claim(2_000).await;
    assert_eq!(others.items.len(), 1_000, "what has committed");
    assert!(hand.claim(10).await.items.is_empty());
    fresh.postbox.store().commit(tx).await.expect("commit");
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    let late = loop {
        let claimed = hand.claim(10).await;
        if !claimed.items.is_empty() {
            break claimed;
        }
        assert!(std::time::Instant::now() < deadline, "a sweep comes at least every second here");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(late.items.len(), 1);
    assert!(late.items[0].delivery < others.items[0].delivery);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_waits_for_publishers_in_flight() {
    let fresh = Postgres::fresh().await;
    let mut tx = fresh.postbox.store().begin().await.expect("begin");
    fresh.postbox.publish(tx.connection(), Envelope::json("t", &1).expect("a draft")).await.expect("publish");
    let hand = hand_of(&fresh, Kind::Plain).await;
    for _ in 0..3 {
        hand.backfill().await;
    }
    fresh.postbox.store().commit(tx).await.expect("commit");
    hand.backfill().await;
    assert_eq!(hand.claim(10).await.items.len(), 1, "it was published before the subscription, and seen after it");
}

/// Its heart writes its row anew, and a takeover goes by what is written there: an operation that was
/// not declared idempotent must not pass for one that was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reborn_worker_declares_the_same() {
    let fresh = Postgres::fresh().await;
    let app = (0..12).fold(Router::new(), |app, n| {
        let nothing = operation(async |_: Operation| Ok::<_, OperationFailure>(Receipt::none()));
        let nothing = nothing.named(format!("op{n}"));
        app.on("t", if n < 3 { nothing.idempotent() } else { nothing })
    });
    let worker = fresh.postbox.worker(app).lease(Duration::from_secs(1)).start().await.expect("start");
    let table = |name: &str| format!("{}.{name}", fresh.schema());
    let gone = format!("select count(*) from {} where id = '{}'", table("worker"), worker.id());
    let taken_over = async {
        while Postgres::count(&fresh, &gone).await > 0 {
            Postgres::kill(&fresh, fresh.postbox.clone(), worker.id()).await;
            fresh.postbox.store().take_over(0.0).await.expect("take over");
        }
    };
    tokio::time::timeout(Duration::from_secs(60), taken_over).await.expect("taken over");
    until_one(&fresh, "reborn", &format!("select count(*) from {}", table("worker"))).await;
    let declared = format!(
        "select count(*) from {} w
         where array(select unnest(w.idempotent) order by 1)
             = array(select s.id from {} s where s.idempotent order by 1) and cardinality(w.idempotent) = 3",
        table("worker"),
        table("subscription")
    );
    assert_eq!(Postgres::count(&fresh, &declared).await, 1, "each of its own");
    worker.stop(None).await.expect("stop");
}

/// Claims of 400, until there were none twice in a row; all that they took, in order.
async fn claimed_at_once(hands: &[Hand<Postgres>]) -> Vec<i64> {
    let claims = hands.iter().map(async |hand| {
        let mut taken = Vec::new();
        loop {
            let two = tokio::join!(
                hand.claim_of(&hand.subscriptions[..1], 400),
                hand.claim_of(&hand.subscriptions[..1], 400)
            );
            let before = taken.len();
            taken.extend(two.0.items.iter().chain(&two.1.items).map(|i| i.delivery));
            if taken.len() == before {
                return taken;
            }
        }
    });
    let mut taken: Vec<i64> = futures_util::future::join_all(claims).await.concat();
    taken.sort_unstable();
    taken
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_claims_at_once_take_each_row_once_and_wait_for_nobody() {
    let fresh = Postgres::fresh().await;
    let hands = [hand_of(&fresh, Kind::Plain).await, hand_of(&fresh, Kind::Plain).await];
    publish(&fresh, "t", 4000).await;
    // Somebody's transaction has deleted some of them, and does not end.
    let mut open = fresh.pool.begin().await.expect("begins");
    let schema = fresh.schema();
    let delete = format!(
        "delete from {schema}.ready where delivery in (select delivery from {schema}.ready order by pos offset 1500 limit 3) returning delivery"
    );
    let held: Vec<i64> =
        sqlx::query_scalar(sqlx::AssertSqlSafe(&*delete)).fetch_all(&mut *open).await.expect("deletes");
    let mut taken = claimed_at_once(&hands).await;
    // Two that pass over each other's stretches may both have seen nothing: a sweep sees the rest.
    while taken.len() < 3997 {
        taken.extend(claimed_at_once(&hands).await);
    }
    open.rollback().await.expect("rolls back");
    assert!(held.iter().all(|delivery| !taken.contains(delivery)));
    while taken.len() < 4000 {
        taken.extend(claimed_at_once(&hands).await);
    }
    taken.sort_unstable();
    taken.dedup();
    assert_eq!(taken.len(), 4000, "each once");
}
