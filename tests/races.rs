//! Where two transactions meet: what one does while the other has not committed. On PostgreSQL most
//! of all; SQLite has one writer.

use std::time::Duration;

use postbox::lifecycle::{Kind, Policy, Standing, State};
use postbox::store::{
    Beat, ClaimRequest, Claimed, Declared, Guarded, HandlerTx, Item, LeaseRef, Move, OutcomeRecord, Registration,
    Settle, Start, Store, Success,
};
use postbox::{Envelope, Keep, Postbox, Postgres, RetryPolicy};
use postbox_testkit::{Fresh, Testable, on_both_stores};
use uuid::Uuid;

on_both_stores!(
    what_has_begun_is_not_handed_back,
    a_fenced_flush_publishes_nothing,
    a_fenced_transaction_leaves_no_effect,
);

#[test]
fn planted_bugs_are_caught() {
    postbox_testkit::planted::each_is_caught("races");
}

/// A registered worker, driven by hand.
struct Hand<Db: Testable> {
    postbox: Postbox<Db>,
    worker: Uuid,
    subscriptions: Vec<i32>,
}

fn registration(lease: Duration, subscriptions: &[(&str, &str, Kind)]) -> Registration {
    let declared = subscriptions.iter().map(|(name, pattern, kind)| Declared {
        name: (*name).into(),
        renamed_from: Vec::new(),
        pattern: pattern.parse().expect("a pattern"),
        policy: Policy { kind: *kind, idempotent: false, retry: RetryPolicy::default() },
        timeout: Duration::from_secs(60),
        quiet: Duration::from_secs(60),
        reconciles: false,
        continues: false,
        start: Start::Unrouted,
        keep: Keep::default(),
    });
    Registration {
        worker: Uuid::now_v7(),
        name: "hand".into(),
        application: "test".into(),
        lease,
        subscriptions: declared.collect(),
    }
}

impl<Db: Testable> Hand<Db> {
    async fn new(fresh: &Fresh<Db>, registration: Registration) -> Self {
        // A postbox of its own: it can die by itself.
        let postbox: Postbox<Db> = Postbox::open(fresh.settings.clone()).await.expect("a second postbox");
        let subscriptions = postbox.store().register(&registration).await.expect("register");
        Hand { postbox, worker: registration.worker, subscriptions }
    }

    async fn of(fresh: &Fresh<Db>, kind: Kind) -> Self {
        Hand::new(fresh, registration(Duration::from_secs(60), &[("one", "t", kind), ("after", "after", Kind::Plain)]))
            .await
    }

    fn store(&self) -> &Db::Store {
        self.postbox.store()
    }

    async fn claim(&self) -> Claimed {
        let wanted = self.subscriptions.iter().map(|id| (*id, 10)).collect();
        let request = ClaimRequest { worker: self.worker, token: Uuid::now_v7(), wanted };
        self.store().claim(&request).await.expect("claim")
    }

    fn flush(&self, claimed: &Claimed, part: i32) -> Settle {
        Settle {
            lease: LeaseRef { worker: self.worker, batch: claimed.batch, token: claimed.token },
            part,
            successes: Vec::new(),
            moves: Vec::new(),
            released: Vec::new(),
            seen: Vec::new(),
            follow_ups: Vec::new(),
            starts: Vec::new(),
            close: false,
        }
    }
}

async fn publish<Db: Testable>(fresh: &Fresh<Db>, topic: &str) {
    fresh.postbox.publish_now([Envelope::json(topic, &1)]).await.expect("publish");
}

fn success(item: &Item) -> Success {
    Success {
        delivery: item.delivery,
        message: item.message,
        subscription: item.subscription,
        ran: Duration::from_millis(1),
    }
}

/// A success with an outcome row of its own.
fn succeeded(item: &Item) -> Move {
    Move {
        delivery: item.delivery,
        message: item.message,
        subscription: item.subscription,
        priority: item.priority,
        rev: item.rev + 1,
        standing: Standing { state: State::Succeeded, attempts: 1, begun: false, lost: 0 },
        delay: Duration::ZERO,
        quiet: Duration::ZERO,
        note: String::new(),
        outcome: Some(OutcomeRecord {
            number: 1,
            kind: "succeeded",
            error: None,
            receipt: None,
            ran: Duration::from_millis(1),
            ago: Duration::ZERO,
        }),
    }
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
    publish(&fresh, "t").await;
    let hand = Hand::of(&fresh, Kind::Operation).await;
    while hand.store().backfill().await.expect("backfill") {}
    let claimed = hand.claim().await;
    let starts = vec![(claimed.items[0].delivery, 1)];
    let begun = hand.store().settle(&Settle { starts, ..hand.flush(&claimed, 0) }).await.expect("settle");
    assert_eq!(begun, Guarded::Done);
    hand.store().disown(hand.worker, claimed.token).await.expect_err("it may be happening");
    assert_eq!(hand.claim().await.items.len(), 0, "nobody else gets it");
    let shown = fresh.postbox.admin().show(claimed.items[0].delivery).await.expect("show");
    assert_eq!((shown.row.state, shown.row.attempt), (State::Running, 1));
}

async fn a_fenced_flush_publishes_nothing<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::of(&fresh, Kind::Plain).await;
    while hand.store().backfill().await.expect("backfill") {}
    publish(&fresh, "t").await;
    let claimed = hand.claim().await;
    let mut late = hand.flush(&claimed, 0);
    late.successes = vec![success(&claimed.items[0])];
    late.follow_ups = vec![Envelope::json("after", &1).expect("a draft")];
    let worker = hand.worker;
    Db::kill(&fresh, hand.postbox, worker).await;
    assert!(fresh.postbox.store().take_over(0.0).await.expect("take over").is_some());
    assert_eq!(fresh.postbox.store().settle(&late).await.expect("settle"), Guarded::Fenced);
    let heir = Hand::of(&fresh, Kind::Plain).await;
    let again = heir.claim().await;
    let topics: Vec<&str> = again.items.iter().filter_map(|i| i.envelope.as_ref()).map(|e| e.topic.as_str()).collect();
    assert_eq!(topics, ["t"], "what follows from an outcome that was not written is not published");
}

async fn a_fenced_transaction_leaves_no_effect<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::of(&fresh, Kind::Transactional).await;
    while hand.store().backfill().await.expect("backfill") {}
    publish(&fresh, "t").await;
    let claimed = hand.claim().await;
    let held = LeaseRef { worker: hand.worker, batch: claimed.batch, token: claimed.token };
    let lost = LeaseRef { token: Uuid::now_v7(), ..held };
    for (lease, expected) in [(lost, Guarded::Fenced), (held, Guarded::Done)] {
        let mut tx = hand.store().open(lease, Duration::from_secs(60)).await.expect("open");
        let effect = Envelope::json("after", &1).expect("a draft");
        fresh.postbox.publish(tx.connection(), effect).await.expect("publish");
        let settled = hand.store().settle_open(tx, lease, &succeeded(&claimed.items[0]), &[]).await;
        assert_eq!(settled.expect("settle"), expected);
    }
    assert_eq!(hand.claim().await.items.len(), 1, "the effect of the one that was settled, and no other");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_worker_that_lives_is_left_alone() {
    let fresh = Postgres::fresh().await;
    let hand = Hand::new(&fresh, registration(Duration::from_millis(50), &[("one", "t", Kind::Plain)])).await;
    // Its sign of life holds for a minute; its lease row gets older than what it registered with.
    let beat = Beat { worker: hand.worker, lease: Duration::from_secs(60) };
    assert!(hand.store().beat(beat).await.expect("beat").is_some());
    while hand.store().backfill().await.expect("backfill") {}
    publish(&fresh, "t").await;
    assert_eq!(hand.claim().await.items.len(), 1);
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
    let hand = Hand::of(&fresh, Kind::Plain).await;
    while hand.store().backfill().await.expect("backfill") {}
    publish(&fresh, "t").await;
    let claimed = hand.claim().await;
    let schema = fresh.schema();
    // Somebody's lock stops the flush half-way: it has its lease row, and has not committed.
    let mut blocker = fresh.pool.begin().await.expect("begin");
    let lock = format!("lock table {schema}.outcome in share row exclusive mode");
    sqlx::raw_sql(sqlx::AssertSqlSafe(lock)).execute(&mut *blocker).await.expect("lock");
    let (store, flush) =
        (hand.store().clone(), Settle { moves: vec![succeeded(&claimed.items[0])], ..hand.flush(&claimed, 0) });
    let settling = tokio::spawn(async move { store.settle(&flush).await });
    let waits =
        format!("select count(*) from pg_locks where not granted and relation = '{schema}.outcome'::regclass::oid");
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
    let hand = Hand::of(&fresh, Kind::Operation).await;
    while hand.store().backfill().await.expect("backfill") {}
    publish(&fresh, "t").await;
    let begun = hand.claim().await;
    let starts = vec![(begun.items[0].delivery, 1)];
    hand.store().settle(&Settle { starts, ..hand.flush(&begun, 0) }).await.expect("begin");
    publish(&fresh, "t").await;
    let held = hand.claim().await;
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
    let hand = Hand::of(&fresh, Kind::Plain).await;
    while hand.store().backfill().await.expect("backfill") {}
    // The first publisher draws the lower position and stalls; the second commits.
    let mut tx = fresh.postbox.store().begin().await.expect("begin");
    fresh.postbox.publish(tx.connection(), Envelope::json("t", &"first").expect("a draft")).await.expect("publish");
    publish(&fresh, "t").await;
    let second = hand.claim().await;
    assert_eq!(second.items.len(), 1, "what has committed");
    let successes = vec![success(&second.items[0])];
    let flush = Settle { successes, close: true, ..hand.flush(&second, 0) };
    assert_eq!(hand.store().settle(&flush).await.expect("settle"), Guarded::Done);
    fresh.postbox.store().commit(tx).await.expect("commit");
    let first = hand.claim().await;
    assert_eq!(first.items.len(), 1, "both are delivered");
    assert!(first.items[0].delivery < second.items[0].delivery, "the late one has the lower position");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_waits_for_publishers_in_flight() {
    let fresh = Postgres::fresh().await;
    let mut tx = fresh.postbox.store().begin().await.expect("begin");
    fresh.postbox.publish(tx.connection(), Envelope::json("t", &1).expect("a draft")).await.expect("publish");
    let hand = Hand::of(&fresh, Kind::Plain).await;
    for _ in 0..3 {
        while hand.store().backfill().await.expect("backfill") {}
    }
    fresh.postbox.store().commit(tx).await.expect("commit");
    while hand.store().backfill().await.expect("backfill") {}
    assert_eq!(hand.claim().await.items.len(), 1, "it was published before the subscription, and seen after it");
}
