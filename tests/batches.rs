//! Batch handlers: one call for several deliveries, and an outcome for each. On both stores.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postbox::admin::DeliveryDetail;
use postbox::lifecycle::State as Standing;
use postbox::{
    Batch, Bytes, Done, Draft, Envelope, Failure, Outcomes, Payload, Postgres, Router, Sqlite, State, Tx, Worker,
    batch, handler,
};
use postbox_testkit::{Fresh, Testable, deliveries, on_both_stores};
use serde_json::json;
use tokio::sync::Notify;

on_both_stores!(
    a_batch_is_in_order_and_says_what_it_is_of,
    each_has_its_own_outcome,
    what_a_call_fails_of_all_of_it_fails_of,
    what_does_not_decode_is_settled_by_itself,
    a_wrong_number_of_outcomes_settles_nothing_as_done,
    one_that_spoils_every_batch_dies_alone,
    the_first_waits_for_others_and_keeps_nobody_waiting,
    a_stop_hands_back_what_waits,
    bytes_come_in_batches_too,
);

const QUICK: Duration = Duration::from_millis(1);

/// The sizes of the batches so far, and what was in them.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<Vec<i64>>>>);

impl Seen {
    fn saw(&self, numbers: &Batch<i64>) {
        self.0.lock().expect("what was seen").push(numbers.iter().map(|n| n.payload).collect());
    }

    fn all(&self) -> Vec<Vec<i64>> {
        self.0.lock().expect("what was seen").clone()
    }

    fn sizes(&self) -> Vec<usize> {
        self.all().iter().map(Vec::len).collect()
    }
}

async fn publish<Db: Testable>(fresh: &Fresh<Db>, numbers: impl IntoIterator<Item = i64>) {
    let drafts: Vec<Draft> = numbers.into_iter().map(|n| Envelope::json("t", &n).expect("a draft")).collect();
    fresh.postbox.publish_now(drafts).await.expect("publish");
}

async fn start<Db: Testable>(fresh: &Fresh<Db>, router: Router<Db>) -> Worker<Db> {
    fresh.postbox.worker(router).poll_interval(Duration::from_millis(20)).start().await.expect("start")
}

/// Looks until all of so many deliveries are so, a minute at most; each with its history, by number.
async fn all<Db: Testable>(
    fresh: &Fresh<Db>,
    count: usize,
    so: impl Fn(Standing) -> bool,
) -> BTreeMap<String, DeliveryDetail> {
    let mut details = BTreeMap::new();
    for detail in deliveries(fresh, count, so).await {
        let payload = detail.envelope.as_ref().map(|e| String::from_utf8_lossy(e.payload_bytes()).into_owned());
        details.insert(format!("{} {}", detail.row.subscription, payload.unwrap_or_default()), detail);
    }
    details
}

async fn ended<Db: Testable>(fresh: &Fresh<Db>, count: usize) -> BTreeMap<String, DeliveryDetail> {
    all(fresh, count, |state| !matches!(state, Standing::Pending | Standing::Running)).await
}

/// State, attempts, and the outcomes in order.
fn story(detail: &DeliveryDetail) -> (Standing, u32, Vec<&str>) {
    let outcomes = detail.attempts.iter().map(|a| a.outcome.as_deref().unwrap_or("running")).collect();
    (detail.row.state, detail.row.attempt, outcomes)
}

async fn a_batch_is_in_order_and_says_what_it_is_of<Db: Testable>() {
    let fresh = Db::fresh().await;
    let seen = Seen::default();
    let note = {
        let seen = seen.clone();
        move |numbers: Batch<i64>, State(word): State<&'static str>| {
            seen.saw(&numbers);
            for number in &numbers {
                assert_eq!(number.key(), Some(format!("key-{}", number.payload).as_str()));
                assert_eq!((number.attempt.number, number.attempt.max), (1, 4));
                assert_eq!(number.id(), number.envelope().id);
                assert_eq!(number.envelope().headers.get("lang").map(String::as_str), Some(word));
            }
            async {}
        }
    };
    let router = || {
        let note = batch(note.clone()).named("note").up_to(10);
        Router::<Db, &'static str>::new().on_batch("t", note).with_state("en")
    };
    // What was there before the subscription has no order among itself.
    start(&fresh, router()).await.stop(None).await.expect("stop");
    let drafts =
        (1..=25).map(|n| Envelope::json("t", &n).expect("a draft").key(format!("key-{n}")).header("lang", "en"));
    fresh.postbox.publish_now(drafts.collect::<Vec<_>>()).await.expect("publish");
    let worker = start(&fresh, router()).await;
    let details = ended(&fresh, 25).await;
    worker.stop(None).await.expect("stop");
    assert!(details.values().all(|d| story(d) == (Standing::Succeeded, 1, vec!["succeeded"])), "{details:#?}");
    let mut flat: Vec<i64> = seen.all().concat();
    assert!(seen.sizes().iter().all(|size| (1..=10).contains(size)), "{:?}", seen.sizes());
    assert!(seen.sizes().contains(&10), "{:?}", seen.sizes());
    assert!(seen.all().iter().all(|call| call.is_sorted()), "{:?}", seen.all());
    flat.sort_unstable();
    assert_eq!(flat, (1..=25).collect::<Vec<_>>(), "each once");
}

async fn judge(numbers: Batch<i64>) -> Result<Vec<Result<Done, Failure>>, Failure> {
    let verdict = |number: &postbox::Delivered<i64>| match (number.payload, number.attempt.number) {
        (1, _) => Ok(Done::new().then(Envelope::json("followed", &number.payload))),
        (2, _) => Err(Failure::permanent("never")),
        (3, 1) => Err(Failure::retry("not yet")),
        (4, _) => Err(Failure::discard("not wanted")),
        (5, 1) => Err(Failure::retry_after("in a moment", QUICK)),
        (6, _) => Err(Failure::snooze(Duration::from_secs(3600))),
        (7, _) => Ok(Done::new().then(Envelope::raw("a", "not json"))),
        _ => Ok(Done::new()),
    };
    Ok(numbers.iter().map(verdict).collect())
}

async fn each_has_its_own_outcome<Db: Testable>() {
    let fresh = Db::fresh().await;
    publish(&fresh, 0..8).await;
    let router = Router::<Db>::new()
        .on_batch("t", batch(judge).backoff(QUICK, QUICK))
        .on("followed", handler(|_: Envelope| async {}).named("followed"));
    let worker = start(&fresh, router).await;
    // The snoozed one is not through.
    let details = all(&fresh, 9, |state| state != Standing::Running).await;
    let over = |d: &DeliveryDetail| d.row.state != Standing::Pending;
    let details = match details.values().filter(|d| !over(d)).count() {
        1 => details,
        _ => {
            let looking = async {
                loop {
                    let details = all(&fresh, 9, |state| state != Standing::Running).await;
                    if details.values().filter(|d| !over(d)).count() == 1 {
                        break details;
                    }
                }
            };
            tokio::time::timeout(Duration::from_secs(60), looking).await.expect("all but one end")
        }
    };
    worker.stop(None).await.expect("stop");
    let told = |n: i64| story(&details[&format!("judge {n}")]);
    assert_eq!(told(0), (Standing::Succeeded, 1, vec!["succeeded"]));
    assert_eq!(told(1), (Standing::Succeeded, 1, vec!["succeeded"]));
    assert_eq!(told(2), (Standing::Dead, 1, vec!["failed"]));
    assert_eq!(told(3), (Standing::Succeeded, 2, vec!["failed", "succeeded"]));
    assert_eq!(told(4), (Standing::Cancelled, 1, vec!["discarded"]));
    assert_eq!(told(5), (Standing::Succeeded, 2, vec!["failed", "succeeded"]));
    assert_eq!((told(6).0, told(6).1), (Standing::Pending, 0), "a snooze is no attempt");
    assert_eq!(told(7), (Standing::Dead, 1, vec!["failed"]), "a success whose follow-up cannot be published");
    let cause = details["judge 1"].envelope.as_ref().expect("its message").id.to_string();
    let followed = details["followed 1"].envelope.as_ref().expect("its message");
    assert_eq!(followed.causation_id.as_deref(), Some(cause.as_str()), "it carries on what caused it");
}

async fn what_a_call_fails_of_all_of_it_fails_of<Db: Testable>() {
    let fresh = Db::fresh().await;
    publish(&fresh, 1..=3).await;
    async fn refuses(numbers: Batch<i64>) -> Result<(), Failure> {
        if numbers[0].attempt.number == 1 { Err(Failure::retry("all of it")) } else { Ok(()) }
    }
    let panics = |numbers: Batch<i64>| async move { assert!(numbers[0].attempt.number == 2, "a planned panic") };
    let hangs = |numbers: Batch<i64>| async move {
        if numbers[0].attempt.number == 1 {
            std::future::pending::<()>().await;
        }
    };
    let router = Router::<Db>::new()
        .on_batch("t", batch(refuses).backoff(QUICK, QUICK))
        .on_batch("t", batch(panics).named("panics").backoff(QUICK, QUICK))
        .on_batch("t", batch(hangs).named("hangs").backoff(QUICK, QUICK).timeout(Duration::from_millis(50)));
    let worker = start(&fresh, router).await;
    let details = ended(&fresh, 9).await;
    worker.stop(None).await.expect("stop");
    for (name, kind, words) in [
        ("refuses", "failed", "all of it"),
        ("panics", "panicked", "a planned panic"),
        ("hangs", "timed_out", "timed out"),
    ] {
        for n in 1..=3 {
            let detail = &details[&format!("{name} {n}")];
            assert_eq!(story(detail), (Standing::Succeeded, 2, vec![kind, "succeeded"]), "{name} {n}");
            let error = detail.attempts[0].error.clone().unwrap_or_default();
            assert!(error.contains(words), "{name} {n}: {error}");
        }
    }
}

async fn what_does_not_decode_is_settled_by_itself<Db: Testable>() {
    let fresh = Db::fresh().await;
    let seen = Seen::default();
    let note = {
        let seen = seen.clone();
        move |numbers: Batch<i64>| {
            seen.saw(&numbers);
            async {}
        }
    };
    let drafts = vec![
        Envelope::json("t", &1).expect("a draft"),
        Envelope::json("t", &"no number").expect("a draft"),
        Envelope::bytes("t", "text/plain", *b"2"),
        Envelope::json("t", &3).expect("a draft"),
    ];
    fresh.postbox.publish_now(drafts).await.expect("publish");
    let worker = start(&fresh, Router::<Db>::new().on_batch("t", batch(note).named("note").up_to(4))).await;
    let details = ended(&fresh, 4).await;
    worker.stop(None).await.expect("stop");
    assert_eq!(seen.all(), [[1, 3]], "the others are called with");
    for (which, words) in [("note \"no number\"", "invalid type"), ("note 2", "bytes of text/plain")] {
        assert_eq!(story(&details[which]), (Standing::Dead, 1, vec!["failed"]));
        let error = details[which].row.last_error.clone().unwrap_or_default();
        assert!(error.contains(words), "{error}");
    }
}

async fn a_wrong_number_of_outcomes_settles_nothing_as_done<Db: Testable>() {
    let fresh = Db::fresh().await;
    publish(&fresh, 1..=3).await;
    let few = |_: Batch<i64>| async { vec![Ok::<(), Failure>(())] };
    let router = Router::<Db>::new().on_batch("t", batch(few).named("few").up_to(3).max_attempts(1));
    let worker = start(&fresh, router).await;
    let details = ended(&fresh, 3).await;
    worker.stop(None).await.expect("stop");
    let words = "the handler gave 1 outcomes for a batch of 3; nothing of the batch counts as done";
    for detail in details.values() {
        assert_eq!(story(detail), (Standing::Dead, 1, vec!["failed"]));
        assert_eq!(detail.attempts[0].error.as_deref(), Some(words));
    }
}

async fn one_that_spoils_every_batch_dies_alone<Db: Testable>() {
    let fresh = Db::fresh().await;
    publish(&fresh, 1..=5).await;
    let seen = Seen::default();
    let spoilt = {
        let seen = seen.clone();
        move |numbers: Batch<i64>| {
            seen.saw(&numbers);
            assert!(numbers.iter().all(|n| n.payload != 3), "a planned panic");
            async {}
        }
    };
    let entry = batch(spoilt).named("spoilt").up_to(5).max_attempts(2).backoff(QUICK, QUICK);
    let worker = start(&fresh, Router::<Db>::new().on_batch("t", entry)).await;
    let details = ended(&fresh, 5).await;
    worker.stop(None).await.expect("stop");
    assert_eq!(seen.sizes(), [5, 1, 1, 1, 1, 1], "the last try of each is its own");
    for (name, detail) in &details {
        let end = if name == "spoilt 3" { Standing::Dead } else { Standing::Succeeded };
        assert_eq!(detail.row.state, end, "{name}");
    }
}

async fn the_first_waits_for_others_and_keeps_nobody_waiting<Db: Testable>() {
    let fresh = Db::fresh().await;
    let seen = Seen::default();
    let note = {
        let seen = seen.clone();
        move |numbers: Batch<i64>| {
            seen.saw(&numbers);
            async {}
        }
    };
    let beside = Arc::new(Notify::new());
    let other = {
        let beside = beside.clone();
        move |Payload(_): Payload<i64>| {
            beside.notify_one();
            async {}
        }
    };
    // Nothing but the third message ends this wait within the test.
    let router = Router::<Db>::new()
        .on_batch("t", batch(note).named("note").up_to(3).within(Duration::from_secs(60)))
        .on("t", handler(other).named("other"));
    let worker = start(&fresh, router).await;
    for number in 1..=3 {
        assert_eq!(seen.sizes(), [0; 0]);
        publish(&fresh, [number]).await;
        tokio::time::timeout(Duration::from_secs(60), beside.notified()).await.expect("the other is not held up");
    }
    let details = ended(&fresh, 6).await;
    worker.stop(None).await.expect("stop");
    assert_eq!(seen.all(), [[1, 2, 3]], "claimed one by one, called once");
    assert!(details.values().all(|d| story(d) == (Standing::Succeeded, 1, vec!["succeeded"])), "{details:#?}");
}

async fn a_stop_hands_back_what_waits<Db: Testable>() {
    let fresh = Db::fresh().await;
    let seen = Seen::default();
    let note = {
        let seen = seen.clone();
        move |numbers: Batch<i64>| {
            seen.saw(&numbers);
            async {}
        }
    };
    let router = || {
        let waits = batch(note.clone()).named("note").up_to(3).within(Duration::from_secs(60));
        Router::<Db>::new().on_batch("t", waits)
    };
    let worker = start(&fresh, router()).await;
    publish(&fresh, [1, 2]).await;
    all(&fresh, 2, |state| state == Standing::Running).await;
    worker.stop(None).await.expect("stop");
    let details = all(&fresh, 2, |state| state == Standing::Pending).await;
    assert!(details.values().all(|d| story(d) == (Standing::Pending, 0, vec![])), "uncounted: {details:#?}");
    // And the next worker takes them, at the first attempt.
    let worker = start(&fresh, router()).await;
    publish(&fresh, [3]).await;
    let details = ended(&fresh, 3).await;
    worker.stop(None).await.expect("stop");
    assert!(details.values().all(|d| story(d) == (Standing::Succeeded, 1, vec!["succeeded"])), "{details:#?}");
    assert_eq!(seen.sizes(), [3]);
}

async fn bytes_come_in_batches_too<Db: Testable>() {
    let fresh = Db::fresh().await;
    let drafts =
        vec![Envelope::bytes("t", "image/png", *b"\x89PNG"), Envelope::json("t", &json!({"a": 1})).expect("a draft")];
    fresh.postbox.publish_now(drafts).await.expect("publish");
    async fn weigh(images: Batch<Bytes>) -> Outcomes {
        let mut outcomes = images.outcomes();
        for image in &images {
            if image.payload.content_type() != "image/png" {
                outcomes.fail(image, Failure::permanent("no image"));
            }
        }
        outcomes
    }
    let worker = start(&fresh, Router::<Db>::new().on_batch("t", weigh)).await;
    let details = ended(&fresh, 2).await;
    worker.stop(None).await.expect("stop");
    let states: Vec<Standing> = details.values().map(|d| d.row.state).collect();
    assert!(states.contains(&Standing::Succeeded) && states.contains(&Standing::Dead), "{details:#?}");
}

/// Handlers with a `Tx` name their database, so these are written for each.
macro_rules! both {
    ($name:ident, $db:ty, $insert:literal) => {
        mod $name {
            use super::*;

            #[derive(Clone)]
            struct Shop {
                table: String,
                seen: Seen,
            }

            async fn fresh_shop() -> (Fresh<$db>, Shop) {
                let fresh: Fresh<$db> = <$db>::fresh().await;
                let table = fresh.table("effects");
                <$db as Testable>::execute(&fresh, &format!("create table {table} (n bigint primary key)")).await;
                (fresh, Shop { table, seen: Seen::default() })
            }

            async fn effects(fresh: &Fresh<$db>, shop: &Shop) -> Vec<i64> {
                let sql = format!("select n from {} order by n", shop.table);
                sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_all(&fresh.pool).await.expect("the effects")
            }

            async fn write(shop: &Shop, tx: &mut Tx<$db>, n: i64) -> Result<(), sqlx::Error> {
                sqlx::query(sqlx::AssertSqlSafe(format!($insert, shop.table))).bind(n).execute(tx).await?;
                Ok(())
            }

            /// Each by itself, in a savepoint: what fails is undone, and the others are not.
            async fn book(numbers: Batch<i64>, State(shop): State<Shop>, mut tx: Tx<$db>) -> Result<Outcomes, Failure> {
                shop.seen.saw(&numbers);
                let mut outcomes = numbers.outcomes();
                for number in &numbers {
                    sqlx::query("savepoint one").execute(&mut tx).await?;
                    write(&shop, &mut tx, number.payload).await?;
                    if number.payload % 2 == 0 {
                        sqlx::query("rollback to savepoint one").execute(&mut tx).await?;
                        outcomes.fail(number, Failure::permanent("an even one"));
                    }
                    sqlx::query("release savepoint one").execute(&mut tx).await?;
                }
                Ok(outcomes)
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn effects_and_outcomes_commit_together() {
                let (fresh, shop) = fresh_shop().await;
                publish(&fresh, 1..=6).await;
                let router = Router::new().on_batch("t", batch(book).up_to(6)).with_state(shop.clone());
                let worker = start(&fresh, router).await;
                let details = ended(&fresh, 6).await;
                worker.stop(None).await.expect("stop");
                assert_eq!(effects(&fresh, &shop).await, [1, 3, 5]);
                for n in 1..=6 {
                    let (state, kind) =
                        if n % 2 == 0 { (Standing::Dead, "failed") } else { (Standing::Succeeded, "succeeded") };
                    let detail = &details[&format!("book {n}")];
                    assert_eq!(story(detail), (state, 1, vec![kind]));
                    assert_eq!(detail.row.kind, "transactional");
                }
            }

            async fn refuse(numbers: Batch<i64>, State(shop): State<Shop>, mut tx: Tx<$db>) -> Result<(), Failure> {
                shop.seen.saw(&numbers);
                for number in &numbers {
                    write(&shop, &mut tx, number.payload).await?;
                }
                match numbers[0].attempt.number {
                    1 => Err(Failure::retry("all of it")),
                    2 => panic!("a planned panic"),
                    _ => Ok(()),
                }
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn a_call_that_fails_as_a_whole_is_rolled_back() {
                let (fresh, shop) = fresh_shop().await;
                publish(&fresh, 1..=3).await;
                let entry = batch(refuse).up_to(3).backoff(QUICK, QUICK);
                let worker = start(&fresh, Router::new().on_batch("t", entry).with_state(shop.clone())).await;
                let details = ended(&fresh, 3).await;
                worker.stop(None).await.expect("stop");
                // Had an effect of an earlier try stayed, its key would be taken.
                assert_eq!(effects(&fresh, &shop).await, [1, 2, 3]);
                for detail in details.values() {
                    assert_eq!(story(detail), (Standing::Succeeded, 3, vec!["failed", "panicked", "succeeded"]));
                }
            }

            async fn add(numbers: Batch<i64>, State(shop): State<Shop>, mut tx: Tx<$db>) -> Result<(), Failure> {
                shop.seen.saw(&numbers);
                for number in &numbers {
                    write(&shop, &mut tx, number.payload).await?;
                }
                Ok(())
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn a_batch_of_several_leases_is_one_transaction() {
                let (fresh, shop) = fresh_shop().await;
                publish(&fresh, 1..=6).await;
                let entry = batch(add).up_to(6).within(Duration::from_secs(60));
                let router = Router::new().on_batch("t", entry).with_state(shop.clone());
                let worker = fresh.postbox.worker(router).batch(2).start().await.expect("start");
                let details = ended(&fresh, 6).await;
                worker.stop(None).await.expect("stop");
                assert_eq!(shop.seen.sizes(), [6]);
                assert_eq!(effects(&fresh, &shop).await, [1, 2, 3, 4, 5, 6]);
                assert!(details.values().all(|d| story(d) == (Standing::Succeeded, 1, vec!["succeeded"])));
            }

            async fn end_it(_: Batch<i64>, mut tx: Tx<$db>) -> Result<(), Failure> {
                sqlx::query("commit").execute(&mut tx).await?;
                Ok(())
            }

            async fn keep(_: Batch<i64>, tx: Tx<$db>) {
                std::mem::forget(tx);
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn a_transaction_that_is_not_there_any_more_counts_for_nothing() {
                let (fresh, _) = fresh_shop().await;
                publish(&fresh, 1..=3).await;
                let worker = start(&fresh, Router::new().on_batch("t", batch(end_it).up_to(3).max_attempts(1))).await;
                let details = ended(&fresh, 3).await;
                worker.stop(None).await.expect("stop");
                for detail in details.values() {
                    assert_eq!(story(detail), (Standing::Dead, 1, vec!["failed"]));
                    let error = detail.row.last_error.clone().unwrap_or_default();
                    assert!(error.contains("ended its own transaction"), "{error}");
                }
                // SQLite's one writer would be gone with the transaction that was leaked.
                if <$db as Testable>::NAME == "postgres" {
                    let (fresh, _) = fresh_shop().await;
                    publish(&fresh, 1..=3).await;
                    let worker = start(&fresh, Router::new().on_batch("t", batch(keep).up_to(3))).await;
                    let details = ended(&fresh, 3).await;
                    worker.stop_now().await.ok();
                    let error = |d: &DeliveryDetail| d.row.last_error.clone().unwrap_or_default();
                    assert!(details.values().all(|d| error(d).contains("moved its Tx")), "{details:#?}");
                }
            }
        }
    };
}
both!(transactional_on_postgres, Postgres, "insert into {} values ($1)");
both!(transactional_on_sqlite, Sqlite, "insert into {} values (?1)");

/// What a closure panics with.
fn words_of(mistake: impl FnOnce() + std::panic::UnwindSafe) -> String {
    let panic = std::panic::catch_unwind(mistake).expect_err("a mistake");
    let words = panic.downcast_ref::<&str>().map(|words| (*words).to_owned());
    words.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

#[test]
fn what_no_batch_can_be_is_refused_at_once() {
    async fn note(_: Batch<i64>) {}
    for messages in [0, 1001] {
        let words = words_of(move || drop(batch(note).up_to(messages)));
        assert_eq!(words, format!("up_to is {messages}; a batch is of 1 to 1000 messages"));
    }
    let words = words_of(|| drop(batch(note).within(Duration::from_secs(61))));
    assert_eq!(words, "within is 61s; a message waits for others for at most a minute");
    let words = words_of(|| drop(Router::<Sqlite>::new().on_batch("t", |_: Batch<i64>| async {})));
    assert!(words.contains("a closure has no durable name"), "{words}");
}
