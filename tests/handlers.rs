//! What handlers may say and what comes of it, end to end, on both stores.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use postbox::admin::{DeliveryDetail, Filter, Resolution};
use postbox::lifecycle::{Answer, State as Standing};
use postbox::{
    Attempt, Done, Draft, Envelope, Failure, FollowUps, FromRef, Message, Metadata, Operation, OperationFailure,
    Payload, Postgres, Receipt, Reconciled, ResultExt, Router, Sqlite, State, Tx, Worker, handler, operation,
};
use postbox_testkit::{Fresh, Testable, on_both_stores};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Notify;

on_both_stores!(
    plain_verdicts,
    operation_verdicts,
    a_payload_that_does_not_decode_never_reaches_its_handler,
    reconcile_ends_doubts,
    follow_ups_commit_with_the_outcome,
    an_operators_word_releases_what_follows,
    ids_and_traces_are_carried,
    extractors_read_the_delivery,
    limits_hold,
    one_that_blocks_its_thread_holds_up_no_neighbour,
    one_that_panics_or_waits_is_settled_as_itself,
    a_message_may_have_its_own_limit_of_attempts,
    stopping_cancels_what_does_not_end,
    polling_alone_is_enough,
    a_bare_connection_publishes_in_one_statement,
);

async fn start<Db: Testable>(fresh: &Fresh<Db>, router: Router<Db>) -> Worker<Db> {
    fresh.postbox.worker(router).poll_interval(Duration::from_millis(20)).start().await.expect("start")
}

async fn publish<Db: Testable>(fresh: &Fresh<Db>, drafts: impl IntoIterator<Item = Draft>) -> Vec<Envelope> {
    let published = fresh.postbox.publish_now(drafts).await.expect("publish");
    published.into_iter().map(|p| p.into_envelope()).collect()
}

fn draft(topic: &str) -> Draft {
    Envelope::json(topic, &json!({})).expect("a draft")
}

/// Waits until nothing is pending or running any more; every delivery with its history, by subscription.
async fn drained<Db: Testable>(fresh: &Fresh<Db>, count: usize) -> BTreeMap<String, DeliveryDetail> {
    let admin = fresh.postbox.admin();
    let waiting = async {
        loop {
            let rows = admin.list(&Filter::default(), 1000).await.expect("list");
            let open = rows.iter().any(|r| matches!(r.state, Standing::Pending | Standing::Running));
            if rows.len() >= count && !open {
                break rows;
            }
            tokio::task::yield_now().await;
        }
    };
    let rows = match tokio::time::timeout(Duration::from_secs(60), waiting).await {
        Ok(rows) => rows,
        Err(_) => panic!("not drained within a minute: {:#?}", admin.list(&Filter::default(), 1000).await),
    };
    assert_eq!(rows.len(), count, "{rows:#?}");
    let mut details = BTreeMap::new();
    for row in rows {
        // A second delivery of a subscription is `name#1`, and so on, the newest first.
        let name = row.subscription.clone();
        let again = (1..).map(|n| format!("{name}#{n}"));
        let free = std::iter::once(name.clone()).chain(again).find(|n| !details.contains_key(n)).expect("endless");
        details.insert(free, admin.show(row.id).await.expect("show"));
    }
    details
}

/// State, attempts, and the outcomes in order.
fn story(detail: &DeliveryDetail) -> (Standing, u32, Vec<&str>) {
    let outcomes = detail.attempts.iter().map(|a| a.outcome.as_deref().unwrap_or("running")).collect();
    (detail.row.state, detail.row.attempt, outcomes)
}

fn broken() -> std::io::Error {
    std::io::Error::other("postgres://ana:secret@db/ is down")
}

async fn plain_verdicts<Db: Testable>() {
    let fresh = Db::fresh().await;
    let quick = Duration::from_millis(1);
    let router = Router::new()
        .on(
            "t",
            handler(|_: Envelope| async { Err::<(), Failure>(broken().into()) })
                .named("gives_up")
                .max_attempts(2)
                .backoff(quick, quick),
        )
        .on(
            "t",
            handler(|_: Envelope| async { Err::<(), _>(broken()).permanent().map_err(Failure::from) })
                .named("permanent"),
        )
        .on(
            "t",
            handler(|a: Attempt| async move {
                if a.number == 1 { Err(Failure::retry_after("later", Duration::ZERO)) } else { Ok(()) }
            })
            .named("second_try"),
        )
        .on(
            "t",
            handler(|a: Attempt| async move { assert!(a.number == 2, "a planned panic") })
                .named("panics")
                .backoff(quick, quick),
        )
        .on(
            "t",
            handler(|a: Attempt| async move {
                if a.number == 1 {
                    std::future::pending::<()>().await;
                }
            })
            .named("hangs")
            .timeout(Duration::from_millis(50))
            .backoff(quick, quick),
        )
        .on("t", handler(|_: Envelope| async { Ok::<(), Failure>(()) }).named("succeeds"));
    publish(&fresh, [draft("t")]).await;
    let worker = start(&fresh, router).await;
    let all = drained(&fresh, 6).await;
    assert_eq!(story(&all["gives_up"]), (Standing::Dead, 2, vec!["failed", "failed"]));
    assert_eq!(story(&all["permanent"]), (Standing::Dead, 1, vec!["failed"]));
    assert_eq!(story(&all["second_try"]), (Standing::Succeeded, 2, vec!["failed", "succeeded"]));
    assert_eq!(story(&all["panics"]), (Standing::Succeeded, 2, vec!["panicked", "succeeded"]));
    assert_eq!(story(&all["hangs"]), (Standing::Succeeded, 2, vec!["timed_out", "succeeded"]));
    assert_eq!(story(&all["succeeds"]), (Standing::Succeeded, 1, vec!["succeeded"]));
    let error = all["gives_up"].row.last_error.clone().expect("an error");
    assert!(error.contains("is down") && !error.contains("secret"), "passwords are hidden: {error}");
    assert!(all["panics"].attempts[0].error.as_deref().is_some_and(|e| e.contains("a planned panic")));
    assert!(all["gives_up"].row.last_error_at.is_some() && all["gives_up"].row.next_due_at.is_none());
    worker.stop(None).await.expect("stop");
}

async fn operation_verdicts<Db: Testable>() {
    let fresh = Db::fresh().await;
    let quick = Duration::from_millis(1);
    type Outcome = Result<Receipt, OperationFailure>;
    let router = Router::new()
        .on(
            "t",
            operation(|_: Operation| async {
                Ok::<_, OperationFailure>(Receipt::of(json!({"id": "ch_1", "nul": "\u{0}"})))
            })
            .named("done"),
        )
        .on(
            "t",
            operation(|op: Operation| async move {
                if op.attempt() == 1 {
                    Err(broken()).not_done()?;
                }
                Ok::<_, OperationFailure>(Receipt::none())
            })
            .named("not_done")
            .backoff(quick, quick),
        )
        .on(
            "t",
            operation(|_: Operation| async {
                Outcome::Err(Err::<(), _>(broken()).permanent().expect_err("refused").into())
            })
            .named("refused"),
        )
        .on("t", operation(|_: Operation| async { Outcome::Err(broken().into()) }).named("unseen"))
        .on(
            "t",
            operation(|op: Operation| async move {
                assert_eq!(op.attempt(), 0, "a planned panic");
                Outcome::Ok(Receipt::none())
            })
            .named("panics"),
        )
        .on(
            "t",
            operation(|_: Operation| std::future::pending::<Outcome>())
                .named("hangs")
                .timeout(Duration::from_millis(50)),
        );
    publish(&fresh, [draft("t")]).await;
    let worker = start(&fresh, router).await;
    let all = drained(&fresh, 6).await;
    assert_eq!(story(&all["done"]), (Standing::Succeeded, 1, vec!["succeeded"]));
    assert!(
        all["done"].attempts[0].receipt.as_ref().is_some_and(|r| r["unstorable"].is_string()),
        "what no store takes is told"
    );
    assert_eq!(story(&all["not_done"]), (Standing::Succeeded, 2, vec!["failed", "succeeded"]));
    assert_eq!(story(&all["refused"]), (Standing::Dead, 1, vec!["failed"]));
    assert_eq!(story(&all["unseen"]), (Standing::InDoubt, 1, vec!["in_doubt"]));
    assert_eq!(story(&all["panics"]), (Standing::InDoubt, 1, vec!["panicked"]));
    assert_eq!(story(&all["hangs"]), (Standing::InDoubt, 1, vec!["timed_out"]));
    worker.stop(None).await.expect("stop");
}

#[derive(Debug, Serialize, Deserialize, Message)]
#[message(topic = "t", key = id)]
struct Typed {
    id: i64,
    items: Vec<Item>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Item {
    cents: u32,
}

async fn a_payload_that_does_not_decode_never_reaches_its_handler<Db: Testable>() {
    let fresh = Db::fresh().await;
    let called = Arc::new(AtomicUsize::new(0));
    let (one, two) = (called.clone(), called.clone());
    let router = Router::new()
        .on_type::<Typed, _>(
            handler(move |_: Payload<Typed>| {
                one.fetch_add(1, Ordering::SeqCst);
                async {}
            })
            .named("plain"),
        )
        .on(
            "t",
            operation(move |_: Payload<Typed>| {
                two.fetch_add(1, Ordering::SeqCst);
                async { Ok::<_, OperationFailure>(Receipt::none()) }
            })
            .named("operation"),
        )
        .on("t", handler(|_: Payload<Value>| async {}).named("value"));
    publish(
        &fresh,
        [Envelope::raw("t", r#"{"id": 1, "items": [{"cents": 1}, {"cents": -5}], "big": 123456789012345678901}"#)
            .expect("json")],
    )
    .await;
    let worker = start(&fresh, router).await;
    let all = drained(&fresh, 3).await;
    for name in ["plain", "operation"] {
        assert_eq!(story(&all[name]), (Standing::Dead, 1, vec!["failed"]), "{name}");
        let error = all[name].row.last_error.clone().expect("an error");
        assert!(error.contains("items[1].cents"), "the JSON path is told: {error}");
    }
    assert!(
        all["value"].row.last_error.as_deref().is_some_and(|e| e.contains("would be changed")),
        "digits are not lost in silence"
    );
    assert_eq!(called.load(Ordering::SeqCst), 0);
    worker.stop(None).await.expect("stop");
}

async fn reconcile_ends_doubts<Db: Testable>() {
    let fresh = Db::fresh().await;
    let sent = |_: Operation| async { Err::<Receipt, OperationFailure>(broken().into()) };
    let router = Router::new()
        .on(
            "t",
            operation(sent)
                .named("found")
                .reconcile(|op: Operation| async move { Ok(Reconciled::Done(Receipt::of(op.idempotency_key()))) }),
        )
        .on(
            "t",
            operation(|op: Operation| async move {
                match op.attempt() {
                    1 => Err::<Receipt, OperationFailure>(broken().into()),
                    _ => Ok(Receipt::none()),
                }
            })
            .named("not_there")
            .backoff(Duration::from_millis(1), Duration::from_millis(1))
            .quiet_period(Duration::ZERO)
            .reconcile(|_: Operation| async { Ok(Reconciled::NotDone) }),
        )
        .on("t", operation(sent).named("unknown").reconcile(|_: Operation| async { Ok(Reconciled::Unknown) }))
        .on(
            "t",
            operation(sent)
                .named("unreachable")
                .reconcile(|_: Operation| async { Err::<Reconciled, Failure>(broken().into()) }),
        );
    publish(&fresh, [draft("t")]).await;
    let worker = start(&fresh, router).await;
    let found = async {
        loop {
            let done =
                fresh.postbox.admin().list(&"state:succeeded".parse().expect("a filter"), 10).await.expect("list");
            if done.len() == 2 {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), found).await.expect("two are settled by their remotes");
    let all = drained(&fresh, 4).await;
    assert_eq!(story(&all["found"]), (Standing::Succeeded, 1, vec!["in_doubt"]));
    assert!(all["found"].records.iter().any(|r| r.record == "resolution" && r.what == "happened"));
    assert_eq!(story(&all["not_there"]), (Standing::Succeeded, 2, vec!["in_doubt", "succeeded"]));
    assert_eq!(all["unknown"].row.state, Standing::InDoubt);
    assert_eq!(all["unreachable"].row.state, Standing::InDoubt);
    worker.stop(None).await.expect("stop");
}

async fn follow_ups_commit_with_the_outcome<Db: Testable>() {
    let fresh = Db::fresh().await;
    let router = Router::new()
        .on("a", handler(|_: Envelope| async { Done::new().then(draft("b")) }).named("plain"))
        .on(
            "b",
            operation(|_: Operation| async {
                Ok::<_, OperationFailure>(Receipt::none().then(draft("c")).then(draft("c")))
            })
            .named("operation"),
        )
        .on(
            "c",
            handler(|a: Attempt| async move {
                if a.number == 1 {
                    Err(Failure::retry_after("once more", Duration::ZERO))
                } else {
                    Ok(Done::new().then(draft("d")))
                }
            })
            .named("retried"),
        )
        // What cannot be published is not swallowed: a plain handler's is dead, an operation's in doubt.
        .on("x", handler(|_: Envelope| async { Done::new().then(draft("not a topic")) }).named("wrong"))
        .on(
            "x",
            operation(|_: Operation| async {
                Ok::<_, OperationFailure>(Receipt::of("it is done").then(draft("not a topic")))
            })
            .named("wrong_operation"),
        );
    publish(&fresh, [draft("a"), draft("x")]).await;
    let worker = start(&fresh, router).await;
    let all = drained(&fresh, 6).await;
    assert_eq!(all["retried"].row.attempt, 2);
    assert_eq!(all["retried#1"].effects.len(), 1);
    assert_eq!(all["operation"].effects.len(), 2);
    assert_eq!(all["wrong"].row.state, Standing::Dead);
    assert_eq!(all["wrong_operation"].row.state, Standing::InDoubt);
    let error = all["wrong_operation"].row.last_error.clone().expect("an error");
    assert!(error.contains("it is done, but a follow-up"), "{error}");
    assert_eq!(fresh.postbox.admin().status().await.expect("status").unrouted, 2, "d, twice");
    worker.stop(None).await.expect("stop");
}

async fn an_operators_word_releases_what_follows<Db: Testable>() {
    let fresh = Db::fresh().await;
    let charge = operation(|_: Operation| async { Err::<Receipt, OperationFailure>(broken().into()) })
        .named("charge")
        .then(|order: Value, receipt: &Receipt| {
            let seen = receipt.content().cloned();
            FollowUps::none().and(Envelope::json("paid", &json!({ "order": order["id"], "seen": seen })))
        });
    let router = Router::new().on("t", charge).on("paid", handler(|_: Envelope| async {}).named("ship"));
    let published =
        publish(&fresh, [Envelope::json("t", &json!({ "id": 42 })).expect("a draft").correlation_id("c-1")]).await;
    let worker = start(&fresh, router).await;
    let all = drained(&fresh, 1).await;
    let word = Resolution {
        rev: Some(all["charge"].row.rev),
        answer: Answer::Happened,
        evidence: Some("ch_7".into()),
        actor: "ana".into(),
        reason: "seen in the console".into(),
    };
    fresh.postbox.admin().resolve(all["charge"].row.id, &word).await.expect("resolve");
    let shipped = async {
        while fresh
            .postbox
            .admin()
            .list(&"subscription:ship state:succeeded".parse().expect("a filter"), 1)
            .await
            .expect("list")
            .is_empty()
        {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), shipped).await.expect("what follows is published");
    let all = drained(&fresh, 2).await;
    assert_eq!(story(&all["charge"]), (Standing::Succeeded, 1, vec!["in_doubt"]));
    let resolution = all["charge"].records.iter().find(|r| r.record == "resolution").expect("a resolution");
    assert_eq!((resolution.actor.as_str(), resolution.detail.as_deref()), ("ana", Some("seen in the console")));
    let shipped = all["ship"].envelope.as_ref().expect("the message");
    assert_eq!(shipped.payload_json(), Some(r#"{"order":42,"seen":{"evidence":"ch_7"}}"#));
    assert_eq!(shipped.correlation_id.as_deref(), Some("c-1"));
    assert_eq!(shipped.causation_id, Some(published[0].id.to_string()));
    worker.stop(None).await.expect("stop");
}

async fn ids_and_traces_are_carried<Db: Testable>() {
    let fresh = Db::fresh().await;
    let postbox = fresh.postbox.clone();
    let router = Router::new()
        .on(
            "a",
            handler(move |_: Envelope| {
                let postbox = postbox.clone();
                async move {
                    postbox.publish_now([draft("b")]).await?;
                    Ok::<_, Failure>(())
                }
            })
            .named("first"),
        )
        .on("b", handler(|_: Envelope| async { Done::new().then(draft("c")) }).named("second"))
        .on("c", handler(|_: Metadata| async {}).named("third"));
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let root = &publish(&fresh, [draft("a").header("traceparent", trace)]).await[0];
    let worker = start(&fresh, router).await;
    let all = drained(&fresh, 3).await;
    let envelope = |name: &str| all[name].envelope.clone().expect("the message");
    assert_eq!(envelope("second").causation_id, Some(root.id.to_string()));
    assert_eq!(envelope("third").causation_id, Some(envelope("second").id.to_string()));
    for name in ["second", "third"] {
        assert_eq!(envelope(name).correlation(), root.id.to_string(), "{name}");
        assert_eq!(envelope(name).traceparent(), Some(trace), "{name}");
    }
    let event: Value = serde_json::from_str(&envelope("third").to_cloudevent()).expect("JSON");
    assert_eq!((event["specversion"].as_str(), event["type"].as_str()), (Some("1.0"), Some("c")));
    assert_eq!(event["traceparent"], trace);
    let json: Value = serde_json::from_str(&envelope("third").to_json()).expect("JSON");
    assert_eq!(json["topic"], "c");
    worker.stop(None).await.expect("stop");
}

#[derive(Clone)]
struct App {
    name: Arc<str>,
    seen: Arc<std::sync::Mutex<Vec<String>>>,
}

#[derive(Clone)]
struct Name(Arc<str>);

impl FromRef<App> for Name {
    fn from_ref(app: &App) -> Name {
        Name(app.name.clone())
    }
}

async fn everything(
    Payload(value): Payload<Value>,
    envelope: Envelope,
    metadata: Metadata,
    State(app): State<App>,
    State(Name(name)): State<Name>,
    attempt: Attempt,
) {
    let seen = format!(
        "{name} {} {} {:?} {:?} {:?} {}/{} {}",
        envelope.topic,
        value["n"],
        metadata.source,
        metadata.external_id,
        envelope.key,
        attempt.number,
        attempt.max,
        metadata.occurred_at
    );
    app.seen.lock().expect("the list").push(seen);
    assert!(metadata.received_at > metadata.occurred_at && metadata.id == envelope.id);
}

async fn extractors_read_the_delivery<Db: Testable>() {
    let fresh = Db::fresh().await;
    let app = App { name: "shop".into(), seen: Arc::default() };
    let routes: Router<Db, App> = Router::new().on("*.x", everything);
    let router = Router::new().nest("deep", routes).with_state(app.clone());
    assert_eq!(router.subscriptions().map(|(n, p)| format!("{n} {p}")).collect::<Vec<_>>(), ["everything deep.*.x"]);
    let long_ago: jiff::Timestamp = "2020-02-02T02:02:02Z".parse().expect("a time");
    let message = Envelope::json("deep.y.x", &json!({ "n": 7 })).expect("a draft");
    publish(&fresh, [message.key("k").source("erp").external_id("e-1").occurred_at(long_ago)]).await;
    let worker = start(&fresh, router).await;
    drained(&fresh, 1).await;
    let seen = app.seen.lock().expect("the list").clone();
    assert_eq!(seen, [r#"shop deep.y.x 7 Some("erp") Some("e-1") Some("k") 1/4 2020-02-02T02:02:02Z"#]);
    worker.stop(None).await.expect("stop");
}

async fn limits_hold<Db: Testable>() {
    let fresh = Db::fresh().await;
    #[derive(Clone, Default)]
    struct Gauge(Arc<[AtomicUsize; 4]>);
    let gauge = Gauge::default();
    fn count(gauge: &Gauge, own: usize) -> impl Future<Output = ()> + use<> {
        let gauge = gauge.0.clone();
        async move {
            for (now, most) in [(own, own + 2), (0, 2)].into_iter().take(2 - usize::from(own == 0)) {
                let running = gauge[now].fetch_add(1, Ordering::SeqCst) + 1;
                gauge[most].fetch_max(running, Ordering::SeqCst);
            }
            tokio::task::yield_now().await;
            gauge[0].fetch_sub(1, Ordering::SeqCst);
            if own == 1 {
                gauge[1].fetch_sub(1, Ordering::SeqCst);
            }
        }
    }
    let (all, few) = (gauge.clone(), gauge.clone());
    let router = Router::new()
        .on("t", handler(move |_: Envelope| count(&all, 0)).named("all"))
        .on("t", handler(move |_: Envelope| count(&few, 1)).named("few").concurrency(2));
    publish(&fresh, (0..60).map(|_| draft("t"))).await;
    let worker = fresh
        .postbox
        .worker(router)
        .concurrency(3)
        .poll_interval(Duration::from_millis(20))
        .start()
        .await
        .expect("start");
    drained(&fresh, 120).await;
    let most = |n: usize| gauge.0[n].load(Ordering::SeqCst);
    assert!((1..=3).contains(&most(2)), "{} at once in the worker", most(2));
    assert!((1..=2).contains(&most(3)), "{} at once in the subscription", most(3));
    worker.stop(None).await.expect("stop");
}

async fn one_that_blocks_its_thread_holds_up_no_neighbour<Db: Testable>() {
    let fresh = Db::fresh().await;
    let through = Arc::new((Mutex::new(0), Condvar::new()));
    let seen = through.clone();
    let block = move |attempt: Attempt| {
        let through = seen.clone();
        async move {
            let (count, changed) = &*through;
            let mut count = count.lock().expect("it was not poisoned");
            *count += 1;
            changed.notify_all();
            // The first one keeps its thread until the others have been called.
            if *count == 1 {
                let patience = Duration::from_secs(30);
                let waited = changed.wait_timeout_while(count, patience, |count| *count < 40).expect("not poisoned");
                assert!(!waited.1.timed_out(), "attempt {} holds up the others", attempt.number);
            }
        }
    };
    publish(&fresh, (0..40).map(|_| draft("t"))).await;
    let router = Router::new().on("t", handler(block).named("block"));
    let worker = fresh.postbox.worker(router).concurrency(40).start().await.expect("start");
    let stories = drained(&fresh, 40).await;
    for detail in stories.values() {
        assert_eq!(story(detail), (Standing::Succeeded, 1, vec!["succeeded"]));
    }
    worker.stop(None).await.expect("stop");
}

async fn one_that_panics_or_waits_is_settled_as_itself<Db: Testable>() {
    /// Panics when it is dropped.
    struct Fuse;
    impl Drop for Fuse {
        fn drop(&mut self) {
            panic!("on its way out");
        }
    }
    let fresh = Db::fresh().await;
    let gate = Arc::new(Notify::new());
    let mixed = move |Payload(way): Payload<u32>| {
        let gate = gate.clone();
        async move {
            match way {
                0 => panic!("at once"),
                1 => {
                    let _fuse = Fuse;
                    return Err(Failure::permanent("on purpose"));
                }
                2 => gate.notified().await,
                3 => {
                    tokio::task::yield_now().await;
                    panic!("after it has waited");
                }
                _ => {}
            }
            gate.notify_one();
            Ok(())
        }
    };
    publish(&fresh, (0..8).map(|way| Envelope::json("t", &way).expect("a draft"))).await;
    let router = Router::new().on("t", handler(mixed).named("mixed").max_attempts(1));
    let worker = fresh.postbox.worker(router).concurrency(8).start().await.expect("start");
    let stories = drained(&fresh, 8).await;
    let ended = |kind: &str| stories.values().filter(|d| story(d).2 == [kind]).count();
    assert_eq!((ended("panicked"), ended("succeeded")), (3, 5), "{stories:#?}");
    worker.stop(None).await.expect("stop");
}

async fn a_message_may_have_its_own_limit_of_attempts<Db: Testable>() {
    let fresh = Db::fresh().await;
    let quick = Duration::from_millis(1);
    let fails = |a: Attempt| async move { Err::<(), Failure>(Failure::retry(format!("{}/{}", a.number, a.max))) };
    let router = Router::new().on("t", handler(fails).named("fails").backoff(quick, quick));
    publish(&fresh, [draft("t").max_attempts(1), draft("t").max_attempts(6)]).await;
    let worker = start(&fresh, router).await;
    let all = drained(&fresh, 2).await;
    let mut made: Vec<(u32, u32)> = all.values().map(|d| (d.row.attempt, d.row.max_attempts)).collect();
    made.sort_unstable();
    assert_eq!(made, [(1, 1), (6, 6)]);
    worker.stop(None).await.expect("stop");
}

async fn stopping_cancels_what_does_not_end<Db: Testable>() {
    let fresh = Db::fresh().await;
    let begun = Arc::new(Notify::new());
    let (one, two) = (begun.clone(), begun.clone());
    let router = Router::new()
        .on(
            "t",
            handler(move |_: Envelope| {
                one.notify_one();
                std::future::pending::<()>()
            })
            .named("plain"),
        )
        .on(
            "u",
            operation(move |_: Operation| {
                two.notify_one();
                std::future::pending::<Result<Receipt, OperationFailure>>()
            })
            .named("operation"),
        );
    publish(&fresh, [draft("t")]).await;
    let worker = start(&fresh, router).await;
    begun.notified().await;
    publish(&fresh, [draft("u")]).await;
    begun.notified().await;
    worker.stop(Some(Duration::from_millis(10))).await.expect("stop");
    let admin = fresh.postbox.admin();
    let rows = admin.list(&Filter::default(), 10).await.expect("list");
    let of = |name: &str| rows.iter().find(|r| r.subscription == name).expect("a row");
    assert_eq!(
        (of("plain").state, of("plain").attempt),
        (Standing::Pending, 1),
        "a shutdown does not un-count an attempt"
    );
    assert_eq!((of("operation").state, of("operation").attempt), (Standing::InDoubt, 1));
    assert!(of("operation").last_error.as_deref().is_some_and(|e| e.contains("stopped")));
    assert!(admin.status().await.expect("status").workers.is_empty());
}

async fn polling_alone_is_enough<Db: Testable>() {
    let fresh = Db::fresh_with(|s| s.set("wake_ups", false).set("prepared_statements", false)).await;
    let worker = start(&fresh, Router::new().on("t", handler(|_: Envelope| async {}).named("polled"))).await;
    for round in 1..=3 {
        publish(&fresh, [draft("t")]).await;
        drained(&fresh, round).await;
    }
    worker.stop_now().await.expect("stop");
}

async fn a_bare_connection_publishes_in_one_statement<Db: Testable>() {
    let fresh = Db::fresh().await;
    let mut connection = fresh.pool.acquire().await.expect("a connection");
    let published = fresh.postbox.publish(&mut connection, &Typed { id: 5, items: Vec::new() }).await.expect("publish");
    assert_eq!((published.key.as_deref(), published.payload_json()), (Some("5"), Some(r#"{"id":5,"items":[]}"#)));
    let (stored, _) = fresh.postbox.admin().message(published.id).await.expect("it is there at once");
    assert_eq!(stored.topic, "t");
}

/// Transactional handlers name their database, so these are written for each.
macro_rules! transactional {
    ($name:ident, $db:ty, $insert:literal) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            let fresh: Fresh<$db> = <$db>::fresh().await;
            let table = fresh.table("effects");
            let sql = format!("create table {table} (who text primary key)");
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&fresh.pool).await.expect("a table");
            type S = (String, postbox::Postbox<$db>);
            async fn write(tx: &mut Tx<$db>, table: &str, who: &str) -> Result<(), sqlx::Error> {
                let sql = format!($insert, table);
                sqlx::query(sqlx::AssertSqlSafe(sql)).bind(who).execute(tx).await?;
                Ok(())
            }
            async fn commits(State((table, postbox)): State<S>, mut tx: Tx<$db>) -> Result<(), Failure> {
                write(&mut tx, &table, "commits").await?;
                postbox.publish(&mut tx, draft("followed")).await?;
                Ok(())
            }
            async fn fails(State((table, postbox)): State<S>, mut tx: Tx<$db>) -> Result<(), Failure> {
                write(&mut tx, &table, "fails").await?;
                postbox.publish(&mut tx, draft("never")).await?;
                Err(Failure::permanent("after its effects"))
            }
            async fn panics(State((table, _)): State<S>, mut tx: Tx<$db>) {
                write(&mut tx, &table, "panics").await.expect("written");
                panic!("a planned panic");
            }
            async fn ends_it(State((table, _)): State<S>, mut tx: Tx<$db>) -> Result<Done, Failure> {
                sqlx::raw_sql("commit").execute(&mut tx).await?;
                write(&mut tx, &table, "ends_it").await.ok();
                // Nothing follows from what is not one with its transaction.
                Ok(Done::new().then(draft("never")))
            }
            async fn rolls_back(State((table, _)): State<S>, mut tx: Tx<$db>) -> Result<(), Failure> {
                sqlx::raw_sql("rollback").execute(&mut tx).await?;
                sqlx::raw_sql("begin").execute(&mut tx).await?;
                write(&mut tx, &table, "rolls_back").await?;
                Ok(())
            }
            async fn keeps_it(tx: Tx<$db>) {
                std::mem::forget(tx);
            }
            let router = Router::new()
                .on("t", commits)
                .on("t", fails)
                .on("t", handler(panics).max_attempts(1))
                .on("t", handler(ends_it).max_attempts(1))
                .on("t", handler(rolls_back).max_attempts(1))
                .on("followed", handler(|_: Envelope| async {}).named("followed"))
                .on("never", handler(|_: Envelope| async {}).named("never"))
                .with_state((table.clone(), fresh.postbox.clone()));
            publish(&fresh, [draft("t")]).await;
            let worker = start(&fresh, router).await;
            let all = drained(&fresh, 6).await;
            assert_eq!(story(&all["commits"]), (Standing::Succeeded, 1, vec!["succeeded"]));
            assert_eq!(story(&all["followed"]), (Standing::Succeeded, 1, vec!["succeeded"]));
            assert_eq!(story(&all["fails"]), (Standing::Dead, 1, vec!["failed"]));
            assert_eq!(story(&all["panics"]), (Standing::Dead, 1, vec!["panicked"]));
            for name in ["ends_it", "rolls_back"] {
                assert_eq!(story(&all[name]), (Standing::Dead, 1, vec!["failed"]), "{name}");
                let error = all[name].row.last_error.clone().expect("an error");
                assert!(error.contains("ended its own transaction"), "{name}: {error}");
            }
            let sql = format!("select who from {table} where who <> 'ends_it' order by who");
            let effects: Vec<String> =
                sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_all(&fresh.pool).await.expect("the effects");
            assert_eq!(effects, ["commits"], "only what committed with its outcome is there");
            worker.stop(None).await.expect("stop");

            let kept = Router::new().on("kept", keeps_it);
            let worker = start(&fresh, kept).await;
            publish(&fresh, [draft("kept")]).await;
            let dead = async {
                while fresh
                    .postbox
                    .admin()
                    .list(&"subscription:keeps_it state:dead".parse().expect("a filter"), 1)
                    .await
                    .expect("list")
                    .is_empty()
                {
                    tokio::task::yield_now().await;
                }
            };
            // SQLite's one writer is gone with the transaction that was leaked: only its end is certain.
            if <$db as Testable>::NAME == "postgres" {
                tokio::time::timeout(Duration::from_secs(60), dead).await.expect("a leaked Tx is found out");
            }
            worker.stop_now().await.ok();
        }
    };
}

transactional!(transactional_handlers_on_postgres, Postgres, "insert into {} values ($1)");
transactional!(transactional_handlers_on_sqlite, Sqlite, "insert into {} values (?1)");
