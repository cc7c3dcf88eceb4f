//! Pulling on both stores: a commit completes, a rollback counts, whatever is dropped comes back.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use postbox::admin::{AttemptRow, Filter};
use postbox::lifecycle::{Standing, State};
use postbox::store::{Completion, Move, OutcomeRecord, PullRequest, Registration, Store};
use postbox::{Database, Envelope, Error, Failure, Operation, OperationFailure, Postbox, PullSubscription, Pulled};
use postbox::{Postgres, Receipt, Router, Sqlite, operation};
use postbox_testkit::{Fresh, Testable, on_both_stores};

on_both_stores!(
    a_commit_completes,
    eight_pullers_take_each_once,
    a_rollback_counts_and_poison_ends_dead,
    a_failure_says_what_comes_next,
    a_dropped_next_costs_no_attempt,
    a_lease_that_was_taken_over_is_fenced,
    wrong_uses_are_told,
    ready_returns_when_something_is_published,
    a_worker_and_a_puller_share,
);

async fn orders<Db: Testable>(fresh: &Fresh<Db>, attempts: u32) -> PullSubscription<Db> {
    let orders = fresh.postbox.subscription("orders").pattern("orders.>").max_attempts(attempts);
    let orders = orders.backoff(Duration::ZERO, Duration::ZERO);
    orders.declare().await.expect("declare");
    orders
}

async fn publish<Db: Testable>(fresh: &Fresh<Db>, count: usize) {
    let messages = (0..count).map(|n| Envelope::json("orders.placed", &n));
    fresh.postbox.publish_now(messages).await.expect("publish");
}

/// Waits until there is one, and takes it.
async fn take<Db: Testable>(
    fresh: &Fresh<Db>,
    orders: &PullSubscription<Db>,
) -> (sqlx::Transaction<'static, Db>, Pulled) {
    let taking = async {
        loop {
            orders.ready().await.expect("ready");
            let mut tx = fresh.pool.begin().await.expect("begin");
            match orders.next(&mut tx).await.expect("next") {
                Some(pulled) => return (tx, pulled),
                None => tx.rollback().await.expect("rollback"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), taking).await.expect("a delivery within a minute")
}

/// Its state and attempts, once it is not running any more.
async fn settled<Db: Testable>(fresh: &Fresh<Db>, delivery: i64) -> (State, Vec<AttemptRow>) {
    let looking = async {
        loop {
            let shown = fresh.postbox.admin().show(delivery).await.expect("show");
            if shown.row.state != State::Running {
                return (shown.row.state, shown.attempts);
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), looking).await.expect("settled within a minute")
}

async fn a_commit_completes<Db: Testable>() {
    let fresh = Db::fresh().await;
    publish(&fresh, 1).await; // before anybody is subscribed
    let orders = orders(&fresh, 4).await;
    publish(&fresh, 2).await;
    let mut seen = Vec::new();
    for _ in 0..3 {
        let mut tx = fresh.pool.begin().await.expect("begin");
        let pulled = orders.next(&mut tx).await.expect("next").expect("one is there");
        assert_eq!((pulled.attempt(), pulled.max_attempts(), &*pulled.topic), (1, 4, "orders.placed"));
        seen.push(pulled.payload::<usize>().expect("a number"));
        let done = fresh.postbox.publish(&mut tx, Envelope::json("done", &1).expect("a draft"));
        let done = pulled.scope(done).await.expect("publish");
        assert_eq!(done.causation_id.as_deref(), Some(&*pulled.id.to_string()));
        tx.commit().await.expect("commit");
        let (state, attempts) = settled(&fresh, pulled.delivery()).await;
        assert_eq!((state, attempts.len()), (State::Succeeded, 1));
        assert_eq!(attempts[0].outcome.as_deref(), Some("succeeded"));
        let error = orders.failed(&pulled, Failure::retry("too late")).await.expect_err("it is committed");
        assert!(error.to_string().contains("has succeeded"), "{error}");
    }
    seen.sort_unstable();
    assert_eq!(seen, [0, 0, 1]);
    let mut tx = fresh.pool.begin().await.expect("begin");
    assert!(orders.next(&mut tx).await.expect("next").is_none(), "empty: at once");
    tx.rollback().await.expect("rollback");
    fresh.postbox.close().await;
}

async fn eight_pullers_take_each_once<Db: Testable>() {
    let fresh = Db::fresh().await;
    let orders = orders(&fresh, 4).await;
    publish(&fresh, 60).await;
    let mut pullers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (orders, pool) = (orders.clone(), fresh.pool.clone());
        pullers.spawn(async move {
            let mut mine = Vec::new();
            loop {
                let mut tx = pool.begin().await.expect("begin");
                let Some(pulled) = orders.next(&mut tx).await.expect("next") else { return mine };
                assert_eq!(pulled.attempt(), 1);
                mine.push(pulled.delivery());
                tx.commit().await.expect("commit");
            }
        });
    }
    let all: Vec<i64> = pullers.join_all().await.into_iter().flatten().collect();
    assert_eq!(all.len(), 60, "none twice");
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 60);
    for row in fresh.postbox.admin().list(&Filter::default(), 100).await.expect("list") {
        assert_eq!((row.state, row.attempt), (State::Succeeded, 1));
    }
}

async fn a_rollback_counts_and_poison_ends_dead<Db: Testable>() {
    let fresh = Db::fresh().await;
    let orders = orders(&fresh, 3).await;
    publish(&fresh, 1).await;
    // Nobody says why.
    let (tx, pulled) = take(&fresh, &orders).await;
    let delivery = pulled.delivery();
    drop(pulled);
    tx.rollback().await.expect("rollback");
    // Said, after a transaction that was only dropped.
    let (tx, pulled) = take(&fresh, &orders).await;
    assert_eq!((pulled.delivery(), pulled.attempt()), (delivery, 2));
    drop(tx);
    assert!(orders.failed(&pulled, Failure::retry("no such customer")).await.expect("failed"));
    // Said before the rollback: kept until then.
    let (tx, pulled) = take(&fresh, &orders).await;
    assert_eq!(pulled.attempt(), 3);
    tx.rollback().await.expect("rollback");
    assert!(orders.failed(&pulled, Failure::retry("still no such customer")).await.expect("failed"));
    assert!(!orders.failed(&pulled, Failure::retry("again")).await.expect("on record already"));

    let (state, attempts) = settled(&fresh, delivery).await;
    assert_eq!(state, State::Dead, "its attempts are used up");
    let errors: Vec<_> = attempts.iter().map(|a| (a.number, a.error.clone().unwrap_or_default())).collect();
    assert_eq!(
        errors,
        [
            (1, "the caller's transaction was rolled back".to_owned()),
            (2, "no such customer".to_owned()),
            (3, "still no such customer".to_owned()),
        ]
    );
    let shown = fresh.postbox.admin().show(delivery).await.expect("show");
    assert!(
        shown.records.iter().any(|r| format!("{r:?}").contains("again")),
        "late words are kept: {:?}",
        shown.records
    );
}

async fn a_failure_says_what_comes_next<Db: Testable>() {
    let fresh = Db::fresh().await;
    let orders = orders(&fresh, 4).await;
    publish(&fresh, 1).await;
    let (tx, pulled) = take(&fresh, &orders).await;
    tx.rollback().await.expect("rollback");
    let later = Failure::retry_after("the shop is closed", Duration::from_secs(3600));
    assert!(orders.failed(&pulled, later).await.expect("failed"));
    let mut tx = fresh.pool.begin().await.expect("begin");
    assert!(orders.next(&mut tx).await.expect("next").is_none(), "due in an hour");
    tx.rollback().await.expect("rollback");

    publish(&fresh, 1).await;
    let (tx, pulled) = take(&fresh, &orders).await;
    tx.rollback().await.expect("rollback");
    assert!(orders.failed(&pulled, Failure::permanent("no order at all")).await.expect("failed"));
    let (state, attempts) = settled(&fresh, pulled.delivery()).await;
    assert_eq!((state, attempts.len()), (State::Dead, 1), "dead at once");
}

async fn a_dropped_next_costs_no_attempt<Db: Testable>() {
    let fresh = Db::fresh().await;
    let orders = orders(&fresh, 1000).await;
    publish(&fresh, 1).await;
    let mut handed_out = 0;
    for n in 0..40_u64 {
        // Cut off at another moment each time.
        let mut tx = fresh.pool.begin().await.expect("begin");
        let cut = tokio::time::timeout(Duration::from_micros(n * 150), orders.next(&mut tx)).await;
        if let Ok(pulled) = cut {
            handed_out += u32::from(pulled.expect("next").is_some());
        }
        drop(tx);
    }
    let (tx, pulled) = take(&fresh, &orders).await;
    assert_eq!(pulled.attempt(), handed_out + 1, "only what was handed out counts");
    tx.commit().await.expect("commit");
    let (state, attempts) = settled(&fresh, pulled.delivery()).await;
    assert_eq!((state, attempts.len() as u32), (State::Succeeded, handed_out + 1), "no gap, nothing twice");
}

async fn a_lease_that_was_taken_over_is_fenced<Db: Testable>() {
    let fresh = Db::fresh().await;
    let orders = orders(&fresh, 4).await;
    publish(&fresh, 1).await;
    let dying = Postbox::<Db>::open(fresh.settings.clone()).await.expect("a second one");
    let worker = uuid::Uuid::now_v7();
    let registration = Registration {
        worker,
        name: "paused".into(),
        application: "test".into(),
        lease: Duration::from_secs(30),
        subscriptions: Vec::new(),
    };
    dying.store().register(&registration).await.expect("register");
    let (id, _) = fresh.postbox.store().stored("test", "orders").await.expect("stored").expect("it is declared");
    let mut tx = fresh.pool.begin().await.expect("begin");
    let request = PullRequest { worker, token: uuid::Uuid::now_v7(), subscription: id };
    let one = dying.store().pull(&mut tx, request).await.expect("pull").expect("one is there");
    Db::kill(&fresh, dying, worker).await;
    let taken = fresh.postbox.store().take_over(0.0).await.expect("take over").expect("it is dead");
    assert_eq!((taken.pending, taken.dead), (1, 0));

    // It wakes up, and is told.
    let outcome = Move {
        delivery: one.item.delivery,
        message: one.item.message,
        subscription: id,
        priority: 0,
        rev: one.item.rev + 1,
        standing: Standing { state: State::Succeeded, attempts: 1, begun: false, lost: 0 },
        delay: Duration::ZERO,
        quiet: Duration::ZERO,
        note: String::new(),
        outcome: Some(OutcomeRecord {
            number: 1,
            kind: "succeeded",
            error: None,
            receipt: None,
            ran: Duration::ZERO,
            ago: Duration::ZERO,
        }),
        leads: false,
    };
    let completed = fresh.postbox.store().complete(&mut tx, one.lease, &outcome).await.expect("complete");
    assert_eq!(completed, Completion::Fenced);
    tx.commit().await.expect("commit");

    let (tx, pulled) = take(&fresh, &orders).await;
    assert_eq!((pulled.delivery(), pulled.attempt()), (one.item.delivery, 2), "the lost attempt counts");
    tx.commit().await.expect("commit");
    let (state, attempts) = settled(&fresh, pulled.delivery()).await;
    assert_eq!(state, State::Succeeded);
    assert_eq!(attempts.iter().map(|a| a.outcome.as_deref()).collect::<Vec<_>>(), [Some("lost"), Some("succeeded")]);
}

async fn wrong_uses_are_told<Db: Testable>() {
    async fn charge(_: Operation) -> Result<Receipt, OperationFailure> {
        Ok(Receipt::none())
    }
    let fresh = Db::fresh().await;
    let orders = orders(&fresh, 4).await;
    publish(&fresh, 1).await;
    let mut bare = fresh.pool.acquire().await.expect("a connection");
    let error = orders.next(&mut bare).await.expect_err("no transaction").to_string();
    assert!(error.contains("needs a transaction"), "{error}");
    drop(bare);

    let mut tx = fresh.pool.begin().await.expect("begin");
    let error = fresh.postbox.subscription("nobody").next(&mut tx).await.expect_err("unknown");
    assert!(matches!(error, Error::NotFound(_)) && error.to_string().contains(".pattern("), "{error}");
    let error = fresh.postbox.subscription("nobody").declare().await.expect_err("no pattern").to_string();
    assert!(error.contains(".pattern("), "{error}");
    let worker = fresh.postbox.worker(Router::new().on("pay", operation(charge))).start().await.expect("start");
    let error = fresh.postbox.subscription("charge").next(&mut tx).await.expect_err("an operation").to_string();
    assert!(error.contains("cannot be pulled"), "{error}");
    worker.stop(None).await.expect("stop");
    // Nothing of that was in its way.
    assert!(orders.next(&mut tx).await.expect("next").is_some());
    tx.commit().await.expect("commit");
}

async fn ready_returns_when_something_is_published<Db: Testable>() {
    let fresh = Db::fresh_with(|s| s.set("poll_interval", "1h")).await;
    let orders = orders(&fresh, 4).await;
    let waiting = tokio::spawn({
        let orders = orders.clone();
        async move { orders.ready().await }
    });
    // Wherever the wait is when it comes.
    tokio::task::yield_now().await;
    publish(&fresh, 1).await;
    tokio::time::timeout(Duration::from_secs(30), waiting).await.expect("woken").expect("no panic").expect("ready");
}

async fn a_worker_and_a_puller_share<Db: Testable>() {
    async fn handled(_: Envelope) {}
    let fresh = Db::fresh().await;
    let orders = orders(&fresh, 4).await;
    let routes = Router::new().on("orders.>", postbox::handler(handled).named("orders"));
    let worker = fresh.postbox.worker(routes).start().await.expect("start");
    publish(&fresh, 30).await;
    let mut pulled = 0;
    loop {
        let mut tx = fresh.pool.begin().await.expect("begin");
        match orders.next(&mut tx).await.expect("next") {
            Some(_) => {
                pulled += 1;
                tx.commit().await.expect("commit");
            }
            None => {
                tx.rollback().await.expect("rollback");
                let rows = fresh.postbox.admin().list(&Filter::default(), 100).await.expect("list");
                if rows.iter().all(|row| row.state == State::Succeeded) {
                    assert_eq!(rows.len(), 30, "{pulled} of them were pulled");
                    break;
                }
            }
        }
    }
    worker.stop(None).await.expect("stop");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takeover_leaves_what_an_open_transaction_completes() {
    let fresh = Postgres::fresh().await;
    let orders = orders(&fresh, 4).await;
    publish(&fresh, 2).await;
    let (tx, pulled) = take(&fresh, &orders).await;
    let store = fresh.postbox.store();
    // The process is paused for longer than its lease; another one has died.
    Postgres::execute(&fresh, &format!("update {}.worker set expires_at = now() - interval '1 s'", fresh.schema()))
        .await;
    let registration = Registration {
        worker: uuid::Uuid::now_v7(),
        name: "dead".into(),
        application: "test".into(),
        lease: Duration::from_secs(30),
        subscriptions: Vec::new(),
    };
    store.register(&registration).await.expect("register");
    Postgres::kill(&fresh, fresh.postbox.clone(), registration.worker).await;
    while let Some(taken) = store.take_over(0.0).await.expect("take over") {
        assert_eq!((taken.name.as_str(), taken.pending), ("dead", 0));
    }
    assert_eq!(fresh.postbox.admin().show(pulled.delivery()).await.expect("show").row.state, State::Running);
    tx.commit().await.expect("commit");
    assert_eq!(settled(&fresh, pulled.delivery()).await.0, State::Succeeded);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_is_older_than_the_lease_is_told() {
    let fresh = Postgres::fresh().await;
    let orders = orders(&fresh, 4).await;
    publish(&fresh, 1).await;
    let mut tx = fresh.pool.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await.expect("begin");
    sqlx::query("select 1 from pg_class limit 1").execute(&mut *tx).await.expect("a read");
    let error = orders.next(&mut tx).await.expect_err("too late").to_string();
    assert!(error.contains("before its first statement"), "{error}");
    tx.rollback().await.expect("rollback");
    let (tx, pulled) = take(&fresh, &orders).await;
    assert_eq!(pulled.attempt(), 1, "uncounted");
    tx.commit().await.expect("commit");
    // As its first statement it sees it.
    publish(&fresh, 1).await;
    let mut tx = fresh.pool.begin_with("BEGIN ISOLATION LEVEL SERIALIZABLE").await.expect("begin");
    assert!(orders.next(&mut tx).await.expect("next").is_some());
    tx.commit().await.expect("commit");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_savepoint_that_is_rolled_back_counts() {
    let fresh = Postgres::fresh().await;
    let orders = orders(&fresh, 1).await;
    publish(&fresh, 1).await;
    let mut tx = fresh.pool.begin().await.expect("begin");
    sqlx::raw_sql("SAVEPOINT before").execute(&mut *tx).await.expect("savepoint");
    let pulled = orders.next(&mut tx).await.expect("next").expect("one is there");
    sqlx::raw_sql("ROLLBACK TO before").execute(&mut *tx).await.expect("rollback");
    assert!(orders.failed(&pulled, Failure::retry("not this one")).await.expect("failed"));
    tx.commit().await.expect("commit");
    assert_eq!(settled(&fresh, pulled.delivery()).await.0, State::Dead);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite_tells_a_transaction_that_has_begun_its_work() {
    let fresh = Sqlite::fresh().await;
    let orders = orders(&fresh, 4).await;
    publish(&fresh, 2).await;
    for (begin, first) in [
        ("BEGIN IMMEDIATE", "select 1"),
        ("BEGIN", "select count(*) from sqlite_schema"),
        ("BEGIN", "create table mine (id integer)"),
    ] {
        let mut tx = fresh.pool.begin_with(begin).await.expect("begin");
        sqlx::query(first).execute(&mut *tx).await.expect("a statement");
        let begun = Instant::now();
        let error = orders.next(&mut tx).await.expect_err("too late");
        assert!(matches!(error, Error::BusyTransaction(_)), "{begin}; {first}: {error}");
        assert!(begun.elapsed() < Duration::from_secs(10), "told at once, not when the patience ends");
        tx.rollback().await.expect("rollback");
    }
    // Twice in one transaction is once too often.
    let (mut tx, pulled) = take(&fresh, &orders).await;
    assert_eq!(pulled.attempt(), 1, "uncounted");
    let error = orders.next(&mut tx).await.expect_err("the second");
    assert!(matches!(error, Error::BusyTransaction(_)), "{error}");
    tx.commit().await.expect("commit");
    assert_eq!(settled(&fresh, pulled.delivery()).await.0, State::Succeeded);
}

/// What is pulled belongs to one database.
#[allow(dead_code, reason = "it compiles")]
fn sendable<Db: Database>(orders: PullSubscription<Db>) -> impl Send {
    orders
}
