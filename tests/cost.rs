//! What things cost in statements, so that a regression shows without a clock. On PostgreSQL: each
//! statement is a round trip there.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use postbox::lifecycle::Kind;
use postbox::source::{Entry, Format, Raw};
use postbox::store::{Declared, Settle, Store};
use postbox::{Envelope, Failure, Fate, OperationFailure, Postgres, Receipt, Router, Tx, Unique, handler, operation};
use postbox_testkit::hand::{Hand, declared, publish, success};
use postbox_testkit::{Fresh, Testable};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Hears of each statement that sqlx has run, in this process.
struct Ear;

static HEARD: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Statement(Option<String>, Option<String>);

impl Visit for Statement {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "summary" => self.0 = Some(value.to_owned()),
            "db.statement" => self.1 = Some(value.to_owned()),
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

impl Subscriber for Ear {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "sqlx::query"
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut statement = Statement(None, None);
        event.record(&mut statement);
        // A short statement is its own summary.
        let text = statement.1.filter(|text| !text.trim().is_empty()).or(statement.0).unwrap_or_default();
        if let Ok(mut heard) = HEARD.lock() {
            heard.push(text);
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// One test at a time: all statements of the process are heard. What a stopped worker still has under way
/// is heard, too; so statements are told by their words.
async fn alone() -> tokio::sync::MutexGuard<'static, ()> {
    static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    static LISTENS: OnceLock<()> = OnceLock::new();
    let guard = ONE.lock().await;
    LISTENS.get_or_init(|| tracing::subscriber::set_global_default(Ear).expect("nobody else listens"));
    guard
}

/// What was run meanwhile.
async fn heard<T>(run: impl Future<Output = T>) -> (T, Vec<String>) {
    HEARD.lock().expect("it was not poisoned").clear();
    let result = run.await;
    (result, std::mem::take(&mut *HEARD.lock().expect("it was not poisoned")))
}

/// Those that have this in them.
fn with(statements: &[String], words: &str) -> usize {
    statements.iter().filter(|s| s.contains(words)).count()
}

async fn until(fresh: &Fresh<Postgres>, sql: &str, wanted: i64) {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while Postgres::count(fresh, sql).await != wanted {
        assert!(std::time::Instant::now() < deadline, "it is not done");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishing_is_one_statement() {
    let _alone = alone().await;
    let fresh = Postgres::fresh().await;
    let routes = Router::new().on("t", handler(async || {}).named("a")).on("t", handler(async || {}).named("b"));
    fresh.postbox.worker(routes).start().await.expect("starts").stop(None).await.expect("stops");
    let mut tx = fresh.pool.begin().await.expect("begins");
    let one = |n: u32| Envelope::json("t", &n).expect("a draft");
    // What the topic fans out to is not stored yet: the short ways find nothing, and are not tried again at once.
    for statements in [3, 1] {
        let (_, before) = heard(fresh.postbox.publish(&mut tx, one(1))).await;
        assert_eq!(with(&before, "-- Stores "), statements, "{before:#?}");
    }
    tx.commit().await.expect("commits");
    fresh.postbox.store().learn_routes(&["t".into()]).await.expect("learns");
    let mut tx = fresh.pool.begin().await.expect("begins");
    let (mut long, mut tries) = (true, 0);
    while long {
        let (published, after) = heard(fresh.postbox.publish(&mut tx, one(2))).await;
        published.expect("publishes");
        long = with(&after, "-- Stores messages") > 0;
        tries += 1;
        assert!(tries <= 17, "the short ways are tried again");
    }
    let (published, after) = heard(fresh.postbox.publish(&mut tx, one(2))).await;
    published.expect("publishes");
    assert_eq!((with(&after, "-- Stores one"), with(&after, "-- Stores ")), (1, 1), "{after:#?}");
    let (published, many) = heard(fresh.postbox.publish_all(&mut tx, (0..1000).map(one))).await;
    assert_eq!((published.expect("publishes").len(), with(&many, "-- Stores ")), (1000, 1), "{many:#?}");
    tx.commit().await.expect("commits");
    let sql = format!("select count(*) from {}.ready", fresh.schema());
    assert_eq!(Postgres::count(&fresh, &sql).await, 2 * (2 + tries + 1 + 1000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_is_one_statement_for_a_batch_and_a_look_is_one_for_nothing() {
    let _alone = alone().await;
    let fresh = Postgres::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    publish(&fresh, "t", 300).await;
    let (claimed, claim) = heard(hand.claim(300)).await;
    assert_eq!(claimed.items.len(), 300);
    assert_eq!((with(&claim, "Leases a batch"), with(&claim, "Moves what is due")), (1, 1), "{claim:#?}");
    // A large one that is no sweep locks no rows; on a slow machine one or the other is a sweep.
    let mut without_locks = 0;
    for _ in 0..20 {
        publish(&fresh, "t", 20).await;
        let (claimed, claim) = heard(hand.claim(300)).await;
        assert_eq!(claimed.items.len(), 20);
        without_locks += with(&claim, "What nobody has touched");
    }
    assert!(without_locks > 0);
    let (empty, _) = heard(hand.claim(100)).await;
    assert!(empty.items.is_empty());
    let (empty, look) = heard(hand.claim(300)).await;
    assert!(empty.items.is_empty());
    let claims = with(&look, "Leases a batch") + with(&look, "Moves what is due");
    assert_eq!((with(&look, "Whether something is ready"), claims), (1, 0), "{look:#?}");
    publish(&fresh, "t", 1).await;
    assert_eq!(hand.claim(300).await.items.len(), 1, "the look sees what has come");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_behind_a_pause_is_looked_at_and_not_claimed() {
    let _alone = alone().await;
    let fresh = Postgres::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    publish(&fresh, "t", 300).await;
    fresh.postbox.admin().pause("test", "a", "ana", "the provider is down").await.expect("pause");
    assert!(hand.claim(300).await.items.is_empty());
    for _ in 0..3 {
        let (empty, look) = heard(hand.claim(300)).await;
        assert!(empty.items.is_empty() && empty.next_due.is_none());
        let claims = with(&look, "Leases a batch") + with(&look, "Moves what is due");
        assert_eq!((with(&look, "Whether something is ready"), claims), (1, 0), "{look:#?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_plain_deliveries_share_their_statements() {
    let _alone = alone().await;
    let fresh = Postgres::fresh().await;
    let done = Arc::new(AtomicU64::new(0));
    let routes = || {
        let done = done.clone();
        let count = move || {
            done.fetch_add(1, Ordering::SeqCst);
            std::future::ready(Ok::<(), Failure>(()))
        };
        Router::<Postgres>::new().on("t", handler(count).named("a"))
    };
    fresh.postbox.worker(routes()).start().await.expect("starts").stop(None).await.expect("stops");
    publish(&fresh, "t", 1000).await;
    let outcomes =
        format!("select coalesce(sum(cardinality(deliveries)), 0)::bigint from {}.outcome_part", fresh.schema());
    let drain = async {
        let worker = fresh.postbox.worker(routes()).concurrency(100).start().await.expect("starts");
        until(&fresh, &outcomes, 1000).await;
        worker.stop(None).await.expect("stops");
    };
    let ((), statements) = heard(drain).await;
    let (claims, flushes) = (with(&statements, "Leases a batch"), with(&statements, "One flush of a batch"));
    // Each claim takes up to 500, each flush what has ended in 50 ms: a slow machine needs more of them.
    assert!((2..=40).contains(&claims), "{claims} claims");
    assert!((2..=60).contains(&flushes), "{flushes} flushes");
    assert_eq!(with(&statements, "Puts deliveries where they go next"), 0, "nothing but first successes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operations_start_in_waves() {
    let _alone = alone().await;
    let fresh = Postgres::fresh().await;
    let routes = || {
        let charge = operation(async || Ok::<Receipt, OperationFailure>(Receipt::none()));
        Router::<Postgres>::new().on("t", charge.named("a"))
    };
    fresh.postbox.worker(routes()).start().await.expect("starts").stop(None).await.expect("stops");
    publish(&fresh, "t", 500).await;
    let outcomes = format!("select count(*) from {}.outcome where state_after = 'succeeded'", fresh.schema());
    let drain = async {
        let worker = fresh.postbox.worker(routes()).concurrency(100).start().await.expect("starts");
        until(&fresh, &outcomes, 500).await;
        worker.stop(None).await.expect("stops");
    };
    let ((), statements) = heard(drain).await;
    let waves = with(&statements, "One flush of a batch");
    // A flush starts up to the concurrency, and settles what has ended before.
    assert!((5..=100).contains(&waves), "{waves} waves");
    assert_eq!(with(&statements, "Puts deliveries where they go next"), 0, "nothing but successes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transactional_delivery_adds_little_to_its_transaction() {
    let _alone = alone().await;
    let fresh = Postgres::fresh().await;
    let table = fresh.table("effect");
    Postgres::execute(&fresh, &format!("create table {table} (n bigint generated always as identity)")).await;
    let insert: Arc<str> = format!("insert into {table} default values").into();
    let routes = || {
        let insert = insert.clone();
        let effect = move |mut tx: Tx<Postgres>| {
            let insert = insert.clone();
            async move {
                sqlx::query(sqlx::AssertSqlSafe(&*insert)).execute(&mut tx).await?;
                Ok::<(), Failure>(())
            }
        };
        Router::<Postgres>::new().on("t", handler(effect).named("a"))
    };
    fresh.postbox.worker(routes()).start().await.expect("starts").stop(None).await.expect("stops");
    publish(&fresh, "t", 200).await;
    let drain = async {
        let worker = fresh.postbox.worker(routes()).concurrency(8).start().await.expect("starts");
        until(&fresh, &format!("select count(*) from {table}"), 200).await;
        worker.stop(None).await.expect("stops");
    };
    let ((), statements) = heard(drain).await;
    assert_eq!(with(&statements, "default values"), 200, "the handlers' own");
    // BEGIN, with which transaction it is; the outcome under the lease's lock; COMMIT; claims come on top.
    let beside = statements.len() - 200;
    assert!((3 * 200..=3 * 200 + 400).contains(&beside), "{beside} statements beside the handlers' own");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_schedule_an_idle_worker_hardly_looks_for_one() {
    let _alone = alone().await;
    let fresh = Postgres::fresh().await;
    let worker = fresh.postbox.worker(Router::new()).start().await.expect("starts");
    let ((), idle) = heard(tokio::time::sleep(Duration::from_secs(3))).await;
    let looks = with(&idle, "until a schedule is due");
    assert!(looks <= 2, "{looks} looks in 3 s");
    assert_eq!(with(&idle, "Schedules that are due"), 0);
    worker.stop(None).await.expect("stops");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_a_key_costs_a_statement_a_flush_and_nobody_else_any() {
    let _alone = alone().await;
    let fresh = Postgres::fresh().await;
    let only = Declared { unique: Some(Unique::Coalesce), ..declared("only", "u", Kind::Plain) };
    let hand = Hand::register(&fresh, vec![only, declared("any", "t", Kind::Plain)]).await;
    fresh.postbox.store().learn_routes(&["t".into(), "u".into()]).await.expect("learns");
    let draft = |topic: &str, n: u32| Envelope::json(topic, &n).expect("a draft").key(format!("k{n}"));
    // Who publishes to others goes the short way still.
    let mut tx = fresh.pool.begin().await.expect("begins");
    fresh.postbox.publish(&mut tx, draft("t", 0)).await.expect("publishes");
    let (published, any) = heard(fresh.postbox.publish(&mut tx, draft("t", 0))).await;
    published.expect("publishes");
    assert_eq!((with(&any, "-- Stores one"), with(&any, "-- Stores ")), (1, 1), "{any:#?}");
    let (published, many) = heard(fresh.postbox.publish_all(&mut tx, (0..100).map(|n| draft("u", n)))).await;
    assert_eq!((published.expect("publishes").len(), with(&many, "-- Stores ")), (100, 1), "{many:#?}");
    tx.commit().await.expect("commits");
    for (place, count, freed) in [(0, 100, 1), (1, 2, 0)] {
        let claimed = hand.claim_of(&hand.subscriptions[place..=place], 1000).await;
        assert_eq!(claimed.items.len(), count);
        let successes = claimed.items.iter().map(success).collect();
        let settle = Settle { successes, close: true, ..hand.flush(&claimed, 1) };
        let (_, flush) = heard(hand.settle(settle)).await;
        assert_eq!(
            (with(&flush, "One flush of a batch"), with(&flush, "Lets go of the keys")),
            (1, freed),
            "{flush:#?}"
        );
    }
    let sql = format!("select count(*) from {}.key_holder", fresh.schema());
    assert_eq!(Postgres::count(&fresh, &sql).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_before_is_looked_for_once_something_has_come_twice() {
    const LOOKS: usize = 100;
    let _alone = alone().await;
    let fresh = Postgres::fresh().await;
    let inbox = fresh.postbox.inbox("partner", "http", Format::default()).await.expect("an inbox");
    let batch = |n: usize| {
        let event = serde_json::json!({"event_id": format!("e{n}"), "event_type": "t", "payload": n});
        let raw = Raw { fields: vec![(b"data".to_vec(), event.to_string().into_bytes())], body: None };
        [Entry { position: n.to_string(), raw, deliveries: 1 }]
    };
    // Is it looked for, does writing it down mind what is there, is it done again?
    let counts = |statements: &[String]| {
        ["-- Which of these ids", "on conflict (source, identity)", "-- Remembers ids"]
            .map(|words| with(statements, words))
    };
    let (fates, first) = heard(inbox.receive(&batch(0))).await;
    assert!(matches!(fates.expect("stored")[..], [Fate::Received(_)]));
    assert_eq!(counts(&first), [0, 0, 1], "{first:#?}");
    let (fates, again) = heard(inbox.receive(&batch(0))).await;
    assert!(matches!(fates.expect("stored")[..], [Fate::Duplicate(_)]));
    assert_eq!(counts(&again), [1, 0, 1], "the plain one has failed, and then it was looked for: {again:#?}");
    for n in 1..=LOOKS {
        let (fates, looked) = heard(inbox.receive(&batch(n))).await;
        assert!(matches!(fates.expect("stored")[..], [Fate::Received(_)]));
        assert_eq!(counts(&looked), [1, 1, 1], "{n}: {looked:#?}");
    }
    let (_, calm) = heard(inbox.receive(&batch(LOOKS + 1))).await;
    assert_eq!(counts(&calm), [0, 0, 1], "{calm:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delivery_is_found_by_indexes_however_much_was_there() {
    let _alone = alone().await;
    let fresh = Postgres::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    // What is gone is still in the table: nobody vacuums, nobody analyses.
    let unswept = format!("alter table {} set (autovacuum_enabled = off)", fresh.table("ready_0"));
    Postgres::execute(&fresh, &unswept).await;
    publish(&fresh, "t", 5000).await;
    for _ in 0..10 {
        let claimed = hand.claim(500).await;
        let successes = claimed.items.iter().map(success).collect();
        hand.settle(Settle { successes, close: true, ..hand.flush(&claimed, 1) }).await;
    }
    publish(&fresh, "t", 1).await;
    let (ended, of_ended) = heard(fresh.postbox.admin().show(2500)).await;
    let (ready, of_ready) = heard(fresh.postbox.admin().show(5001)).await;
    assert_eq!((ended.expect("there").attempts.len(), ready.expect("there").attempts.len()), (1, 0));
    let places = "Deliveries with what lists show";
    assert_eq!((with(&of_ended, places), with(&of_ready, places)), (1, 2), "ended ones are looked for first");
    for (statements, words, given, indexes) in [
        (&of_ended, places, "1, 2500", &["outcome_part_delivery"][..]),
        (&of_ended, "Every attempt at one", "2500", &["outcome_part_delivery"]),
        (&of_ready, places, "1, 5001", &["ready_0_subscription_priority_pos_idx", "outcome_part_delivery"]),
    ] {
        let text = statements.iter().rfind(|s| s.contains(words)).expect("it was run");
        let plan = generic_plan(&fresh, text, given, "on").await;
        assert!(!plan.contains("Seq Scan on ready_0"), "{plan}");
        // What has succeeded is on one page: it may be read as a whole, if that is allowed.
        let plan = generic_plan(&fresh, text, given, "off").await;
        for index in indexes {
            assert!(plan.contains(index), "{index}: {plan}");
        }
    }
}

/// How a statement is carried out, whatever is given.
async fn generic_plan(fresh: &Fresh<Postgres>, statement: &str, given: &str, seqscan: &str) -> String {
    let mut connection = fresh.pool.acquire().await.expect("a connection").detach();
    let prepare = format!(
        "set plan_cache_mode = force_generic_plan; set enable_seqscan = {seqscan}; prepare asked as {statement}"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(prepare)).execute(&mut connection).await.expect("it is prepared");
    let explain = format!("explain execute asked({given})");
    let lines: Vec<String> =
        sqlx::query_scalar(sqlx::AssertSqlSafe(explain)).fetch_all(&mut connection).await.expect("a plan");
    lines.join("\n")
}
