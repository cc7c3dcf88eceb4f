//! Retention: what has ended goes when its time has come, and nothing that is unfinished ever does.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postbox::admin::{Filter, Resolution, Retry};
use postbox::lifecycle::{Answer, End, Kind, State};
use postbox::store::{Claimed, Declared, Guarded, Item, Move, Registration, Settle, Start, Store};
use postbox::{
    Attempt, Envelope, Error, Failure, Keep, OperationFailure, Postgres, Receipt, Retention, Router, handler, operation,
};
use postbox_testkit::hand::{self, Hand, success};
use postbox_testkit::{Fresh, Testable, end_window, on_both_stores};
use uuid::Uuid;

on_both_stores!(
    what_has_ended_goes_and_nothing_else_does,
    each_subscription_keeps_its_own_for_as_long_as_it_says,
    the_history_of_what_a_live_lease_held_stays,
    nobody_elses_messages_go_when_they_are_old,
    under_load_nothing_is_lost,
);

const FOREVER: Duration = Duration::MAX;
const SOON: Keep = Keep { succeeded: Some(Duration::ZERO), dead: Some(Duration::ZERO) };

fn declared(name: &str, pattern: &str, kind: Kind, keep: Keep) -> Declared {
    Declared { keep, reconciles: false, ..hand::declared(name, pattern, kind) }
}

/// A worker driven by hand, which knows its subscriptions by name.
struct Named<Db: Testable> {
    hand: Hand<Db>,
    ids: BTreeMap<String, i32>,
}

impl<Db: Testable> Named<Db> {
    async fn register(fresh: &Fresh<Db>, subscriptions: Vec<Declared>) -> Self {
        let names: Vec<String> = subscriptions.iter().map(|d| d.name.clone()).collect();
        let hand = Hand::register(fresh, subscriptions).await;
        let ids = names.into_iter().zip(hand.subscriptions.iter().copied()).collect();
        Named { hand, ids }
    }

    async fn claim(&self, name: &str, room: u32) -> Claimed {
        self.hand.claim_of(&[self.ids[name]], room).await
    }

    fn flush(&self, claimed: &Claimed, part: i32) -> Settle {
        self.hand.flush(claimed, part)
    }

    async fn settle(&self, settle: Settle) {
        assert_eq!(self.hand.settle(settle).await, Guarded::Done);
    }

    /// All that is due succeeds, at once.
    async fn succeed(&self, name: &str) -> Vec<i64> {
        let claimed = self.claim(name, 100).await;
        let successes = claimed.items.iter().map(success).collect();
        self.settle(Settle { successes, close: true, ..self.flush(&claimed, 1) }).await;
        claimed.items.iter().map(|i| i.delivery).collect()
    }

    /// One that is due ends like this.
    async fn end(&self, name: &str, kind: Kind, end: End) -> i64 {
        let claimed = self.claim(name, 1).await;
        let item = &claimed.items[0];
        let begun = kind == Kind::Operation;
        if begun {
            let starts = vec![(item.delivery, item.attempts + 1)];
            self.settle(Settle { starts, ..self.flush(&claimed, 1) }).await;
        }
        let moves = vec![ended(item, kind, end, begun)];
        self.settle(Settle { moves, close: true, ..self.flush(&claimed, 2) }).await;
        item.delivery
    }
}

/// To be tried again at once.
fn ended(item: &Item, kind: Kind, end: End, begun: bool) -> Move {
    Move { delay: Duration::ZERO, ..hand::ended(item, kind, end, begun) }
}

const FAILED: End = End::Failed { permanent: false, retry_after: None };
const REFUSED: End = End::Failed { permanent: true, retry_after: None };

async fn publish<Db: Testable>(fresh: &Fresh<Db>, topic: &str) -> Uuid {
    fresh.postbox.publish_now([Envelope::json(topic, &1).expect("valid")]).await.expect("publish")[0].id
}

fn table<Db: Testable>(fresh: &Fresh<Db>, name: &str) -> String {
    match <Db as Testable>::NAME {
        "postgres" => format!("{}.{name}", fresh.schema()),
        _ => format!("postbox_{name}"),
    }
}

async fn rows<Db: Testable>(fresh: &Fresh<Db>, name: &str) -> i64 {
    Db::count(fresh, &format!("select count(*) from {}", table(fresh, name))).await
}

/// Removes until nothing is left to remove: deliveries and messages that went.
async fn retain<Db: Testable>(fresh: &Fresh<Db>, keep_unrouted: Duration) -> (i64, i64) {
    if <Db as Testable>::NAME == "postgres" {
        // As an hour later: what was passed over among the parts is looked at again.
        let sql = format!("update {} set parts_after = null, swept_at = null", table(fresh, "retention"));
        Db::execute(fresh, &sql).await;
        end_window(fresh).await;
    } else {
        // Its clock has milliseconds: what ended in this one has not been kept for more than 0 yet.
        tick(fresh).await;
    }
    let mut sum = (0, 0);
    loop {
        let retention = Retention { keep_unrouted, most: 2, tell: false };
        let step = fresh.postbox.store().retain(&retention).await.expect("retain");
        assert!(!step.busy);
        sum = (sum.0 + step.deliveries, sum.1 + step.messages);
        if !step.more {
            return sum;
        }
    }
}

/// Lets the database's clock move on by a millisecond.
async fn tick<Db: Testable>(fresh: &Fresh<Db>) {
    let now = "select cast(unixepoch('subsec') * 1000 as integer)";
    let then = Db::count(fresh, now).await;
    while Db::count(fresh, now).await <= then {
        tokio::task::yield_now().await;
    }
}

async fn what_has_ended_goes_and_nothing_else_does<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Named::register(
        &fresh,
        vec![declared("plain", "p", Kind::Plain, SOON), declared("charge", "o", Kind::Operation, SOON)],
    )
    .await;
    let admin = fresh.postbox.admin();
    // What has ended: in one go, after a retry, dead, an operation, a doubt that was resolved.
    let first = fresh.postbox.publish_now([Envelope::json("p", &1).expect("valid").dedup("once")]).await;
    let first = first.expect("publish")[0].id;
    let mut over = hand.succeed("plain").await;
    publish(&fresh, "p").await;
    hand.end("plain", Kind::Plain, FAILED).await;
    over.push(hand.end("plain", Kind::Plain, End::Succeeded).await);
    publish(&fresh, "p").await;
    over.push(hand.end("plain", Kind::Plain, REFUSED).await);
    publish(&fresh, "o").await;
    over.push(hand.end("charge", Kind::Operation, End::Succeeded).await);
    for answer in [Answer::Happened, Answer::Abandoned] {
        publish(&fresh, "o").await;
        let delivery = hand.end("charge", Kind::Operation, End::InDoubt).await;
        let word = Resolution { rev: None, answer, evidence: None, actor: "ana".into(), reason: "looked".into() };
        admin.resolve(delivery, &word).await.expect("resolve");
        over.push(delivery);
    }
    // What has not: waiting, far in the future, tried and waiting again, running, an attempt on
    // record, in doubt, and a message that nobody is subscribed to.
    publish(&fresh, "p").await;
    hand.end("plain", Kind::Plain, FAILED).await;
    publish(&fresh, "p").await;
    let running = hand.claim("plain", 1).await;
    publish(&fresh, "p").await;
    let later = Envelope::json("p", &1).expect("valid").after(Duration::from_secs(300 * 86_400));
    fresh.postbox.publish_now([later]).await.expect("publish");
    publish(&fresh, "o").await;
    let open = hand.claim("charge", 1).await;
    hand.settle(Settle { starts: vec![(open.items[0].delivery, 1)], ..hand.flush(&open, 1) }).await;
    publish(&fresh, "o").await;
    let doubt = hand.end("charge", Kind::Operation, End::InDoubt).await;
    publish(&fresh, "nobody").await;
    let mut unfinished: Vec<(i64, State, u32)> = Vec::new();
    for row in admin.list(&Filter::default(), 100).await.expect("list") {
        if !over.contains(&row.id) {
            unfinished.push((row.id, row.state, row.attempt));
        }
    }
    assert_eq!(unfinished.len(), 6, "{unfinished:?}");

    match <Db as Testable>::NAME {
        "sqlite" => tick(&fresh).await,
        _ => end_window(&fresh).await,
    }
    let preview = admin.retention_preview(FOREVER).await.expect("preview");
    let told: BTreeMap<(String, String), i64> =
        preview.deliveries.iter().map(|r| ((r.subscription.clone(), r.outcome.clone()), r.deliveries)).collect();
    let expected = [("charge", "dead", 1), ("charge", "succeeded", 2), ("plain", "dead", 1), ("plain", "succeeded", 2)];
    assert_eq!(told, expected.map(|(s, o, n)| ((s.to_owned(), o.to_owned()), n)).into());
    assert_eq!(preview.messages, 6);
    assert_eq!(retain(&fresh, FOREVER).await, (6, 6));
    assert_eq!(retain(&fresh, FOREVER).await, (0, 0), "and nothing a second time");
    for delivery in &over {
        let error = admin.show(*delivery).await.expect_err("gone").to_string();
        assert!(error.contains("removed by retention or never there"), "{error}");
        let retry = Retry { rev: None, actor: "ana".into(), reason: "again".into() };
        assert!(matches!(admin.retry(*delivery, &retry).await, Err(Error::NotFound(_))));
    }
    let mut left: Vec<(i64, State, u32)> = Vec::new();
    for row in admin.list(&Filter::default(), 100).await.expect("list") {
        left.push((row.id, row.state, row.attempt));
        let detail = admin.show(row.id).await.expect("there");
        assert!(detail.envelope.is_some(), "with its message");
        assert_eq!(detail.attempts.len(), row.attempt as usize, "and its history");
    }
    assert_eq!(left, unfinished);
    assert_eq!(admin.status().await.expect("status").unrouted, 1);
    assert_eq!(rows(&fresh, "message").await, 7);
    // Dedup keys have a window of their own.
    let twice = fresh.postbox.publish_now([Envelope::json("p", &1).expect("valid").dedup("once")]).await;
    assert_eq!(twice.expect("a duplicate").first().map(|p| (p.is_duplicate(), p.id)), Some((true, first)));
    assert!(matches!(admin.message(first).await, Err(Error::NotFound(_))), "its message is gone all the same");
    // On record: once, with what went by now; the rest of the hour when somebody asks.
    let words = |entries: Vec<postbox::admin::AuditEntry>| -> Vec<String> {
        entries.into_iter().filter(|e| e.actor == "retention").filter_map(|e| e.reason).collect()
    };
    assert_eq!(words(admin.audit(100).await.expect("audit")).len(), 1);
    admin.retain(FOREVER).await.expect("retain");
    let told = words(admin.audit(100).await.expect("audit"));
    let sum: i64 = told.iter().filter_map(|w| w.split(' ').nth(1)?.parse::<i64>().ok()).sum();
    assert_eq!((told.len(), sum), (2, 6), "{told:?}");
    // What was unfinished goes on as if nothing had been.
    let answer = Resolution {
        rev: None,
        answer: Answer::Happened,
        evidence: None,
        actor: "ana".into(),
        reason: "looked".into(),
    };
    admin.resolve(doubt, &answer).await.expect("resolve");
    let moves = vec![ended(&open.items[0], Kind::Operation, End::Succeeded, true)];
    hand.settle(Settle { moves, close: true, ..hand.flush(&open, 2) }).await;
    let successes = running.items.iter().map(success).collect();
    hand.settle(Settle { successes, close: true, ..hand.flush(&running, 1) }).await;
    hand.succeed("plain").await;
    assert_eq!(retain(&fresh, FOREVER).await, (5, 5));
    assert_eq!(rows(&fresh, "message").await, 2, "the one in the future and nobody's");
    for name in ["outcome", "attempt", "resolution", "observation"] {
        assert_eq!(rows(&fresh, name).await, 0, "{name}");
    }
}

async fn each_subscription_keeps_its_own_for_as_long_as_it_says<Db: Testable>() {
    let fresh = Db::fresh().await;
    let long = Keep { succeeded: Some(Duration::from_secs(86_400)), dead: Some(FOREVER) };
    let keeps = |b| vec![declared("a", "t", Kind::Plain, SOON), declared("b", "t", Kind::Plain, b)];
    let hand = Named::register(&fresh, keeps(long)).await;
    let message = publish(&fresh, "t").await;
    let (a, b) = (hand.succeed("a").await[0], hand.succeed("b").await[0]);
    assert_eq!(retain(&fresh, FOREVER).await, (1, 0), "b's keeps the message");
    let admin = fresh.postbox.admin();
    assert!(admin.show(a).await.is_err());
    assert!(admin.show(b).await.expect("kept").envelope.is_some());
    let (_, deliveries) = admin.message(message).await.expect("kept");
    assert!(deliveries.contains(&b));
    // Someone who comes later takes it from the beginning: it has a third delivery, a late one.
    let late = Declared { start: Start::Beginning, ..declared("late", "t", Kind::Plain, SOON) };
    let newcomer = Named::register(&fresh, vec![late]).await;
    let c = newcomer.succeed("late").await[0];
    assert_eq!(retain(&fresh, FOREVER).await, (1, 0));
    assert!(admin.show(c).await.is_err());
    // What a subscription says counts from its next registration on.
    let _again = Named::register(&fresh, keeps(SOON)).await;
    assert_eq!(retain(&fresh, FOREVER).await, (1, 1));
    assert_eq!(rows(&fresh, "message").await, 0);
    if <Db as Testable>::NAME == "postgres" {
        assert_eq!(rows(&fresh, "late_delivery").await, 0);
    }
}

async fn the_history_of_what_a_live_lease_held_stays<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Named::register(&fresh, vec![declared("a", "t", Kind::Plain, SOON)]).await;
    for _ in 0..3 {
        publish(&fresh, "t").await;
    }
    // One batch of three: one succeeds, one fails and succeeds in another batch, one still runs.
    let batch = hand.claim("a", 3).await;
    let moves = vec![ended(&batch.items[1], Kind::Plain, FAILED, false)];
    let successes = vec![success(&batch.items[0])];
    hand.settle(Settle { successes, moves, ..hand.flush(&batch, 1) }).await;
    assert_eq!(hand.end("a", Kind::Plain, End::Succeeded).await, batch.items[1].delivery);
    retain(&fresh, FOREVER).await;
    // It dies; only what still ran may come back.
    let Hand { postbox, worker, .. } = hand.hand;
    Db::kill(&fresh, postbox, worker).await;
    let mut taken = None;
    for _ in 0..1000 {
        taken = fresh.postbox.store().take_over(0.0).await.expect("take over");
        if taken.is_some() {
            break;
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(taken.map(|t| t.pending), Some(1), "nothing that was settled comes back");
    retain(&fresh, FOREVER).await;
    let left: Vec<i64> =
        fresh.postbox.admin().list(&Filter::default(), 10).await.expect("list").into_iter().map(|r| r.id).collect();
    assert_eq!(left, [batch.items[2].delivery]);
    assert_eq!(rows(&fresh, "message").await, 1);
}

async fn nobody_elses_messages_go_when_they_are_old<Db: Testable>() {
    let fresh = Db::fresh().await;
    for _ in 0..3 {
        publish(&fresh, "nobody").await;
    }
    if <Db as Testable>::NAME == "postgres" {
        let now = "select (extract(epoch from clock_timestamp()) * 1000)::bigint";
        let then = Db::count(&fresh, now).await;
        while Db::count(&fresh, now).await <= then {}
    }
    assert_eq!(retain(&fresh, FOREVER).await, (0, 0));
    assert_eq!(retain(&fresh, Duration::from_secs(3600)).await, (0, 0));
    assert_eq!(fresh.postbox.admin().retention_preview(Duration::ZERO).await.expect("preview").messages, 3);
    assert_eq!(retain(&fresh, Duration::ZERO).await, (0, 3));
    assert_eq!((rows(&fresh, "message").await, rows(&fresh, "unrouted").await), (0, 0));
}

/// Which deliveries were handled to their end, by subscription and message.
type Done = Arc<Mutex<BTreeMap<(&'static str, Uuid), u32>>>;

fn handled(done: &Done, name: &'static str, id: Uuid) {
    *done.lock().expect("the record").entry((name, id)).or_insert(0) += 1;
}

async fn under_load_nothing_is_lost<Db: Testable>() {
    const MESSAGES: usize = 300;
    let fresh = Db::fresh().await;
    let done: Done = Arc::default();
    let router = |late: bool| {
        let (a, b, c, d) = (done.clone(), done.clone(), done.clone(), done.clone());
        let router = Router::<Db>::new()
            .on(
                "t.*",
                handler(move |m: Envelope| {
                    let done = a.clone();
                    async move { handled(&done, "plain", m.id) }
                })
                .named("plain"),
            )
            .on(
                "t.*",
                handler(move |m: Envelope, attempt: Attempt| {
                    let done = b.clone();
                    async move {
                        match (m.id.as_u128() % 3, attempt.number) {
                            (0, 1) => Err(Failure::retry_after("first", Duration::ZERO)),
                            (1, 1) => Err(Failure::permanent("dead until somebody tries again")),
                            _ => {
                                handled(&done, "flaky", m.id);
                                Ok(())
                            }
                        }
                    }
                })
                .named("flaky"),
            )
            .on(
                "t.pay",
                operation(move |m: Envelope| {
                    let done = c.clone();
                    async move {
                        handled(&done, "charge", m.id);
                        match m.id.as_u128() % 2 {
                            0 => Ok(Receipt::none()),
                            _ => Err(OperationFailure::in_doubt("no answer")),
                        }
                    }
                })
                .named("charge"),
            );
        match late {
            false => router,
            true => router.on(
                "t.*",
                handler(move |m: Envelope| {
                    let done = d.clone();
                    async move { handled(&done, "late", m.id) }
                })
                .named("late")
                .from_beginning(),
            ),
        }
    };
    let first = fresh.postbox.worker(router(false)).start().await.expect("start");
    // Nothing that succeeded is kept at all; the dead wait for the one who tries them again.
    let at_once = format!("update {} set keep_succeeded_ms = 0", table(&fresh, "subscription"));
    Db::execute(&fresh, &at_once).await;
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let running = || !over.load(std::sync::atomic::Ordering::SeqCst);
    let removing = async {
        let mut removed = 0;
        while running() {
            let retention = Retention { keep_unrouted: FOREVER, most: 20, tell: false };
            if <Db as Testable>::NAME == "postgres" {
                end_window(&fresh).await;
            }
            let step = fresh.postbox.store().retain(&retention).await.expect("retain");
            removed += step.deliveries;
            tokio::task::yield_now().await;
        }
        removed
    };
    let admin = fresh.postbox.admin();
    let operating = async {
        let wanted: Filter = "state:dead,in_doubt".parse().expect("a filter");
        while running() {
            for row in admin.list(&wanted, 100).await.expect("list") {
                assert!(!row.note.as_deref().unwrap_or_default().contains("message is gone"), "{row:?}");
                if row.state == State::InDoubt {
                    let reason = "looked".to_owned();
                    let word =
                        Resolution { rev: None, answer: Answer::Happened, evidence: None, actor: "ana".into(), reason };
                    admin.resolve(row.id, &word).await.expect("nobody else resolves");
                } else {
                    let retry = Retry { rev: None, actor: "ana".into(), reason: "again".into() };
                    admin.retry(row.id, &retry).await.expect("nobody else tries again");
                }
            }
            tokio::task::yield_now().await;
        }
    };
    let working = async {
        let mut ids = Vec::new();
        let mut second = None;
        for n in 0..MESSAGES {
            let topic = if n % 4 == 0 { "t.pay" } else { "t.x" };
            ids.push(publish(&fresh, topic).await);
            if n == MESSAGES / 2 {
                // In the middle of it, someone wants all that there is still.
                second = Some(fresh.postbox.worker(router(true)).start().await.expect("start"));
                Db::execute(&fresh, &at_once).await;
            }
        }
        let quiet = async {
            loop {
                let status = admin.status().await.expect("status");
                let busy = status
                    .subscriptions
                    .iter()
                    .any(|s| s.backfilling || s.pending + s.scheduled + s.running + s.in_doubt + s.dead > 0);
                if !busy && done.lock().expect("the record").len() >= 2 * MESSAGES + MESSAGES / 4 {
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(120), quiet).await.expect("all of it is handled");
        over.store(true, std::sync::atomic::Ordering::SeqCst);
        (ids, second)
    };
    let (removed, (), (ids, second)) = tokio::join!(removing, operating, working);
    assert!(removed > 0, "retention was in the middle of it");
    first.stop(None).await.expect("stop");
    if let Some(second) = second {
        second.stop(None).await.expect("stop");
    }
    let done = done.lock().expect("the record").clone();
    for id in &ids {
        assert_eq!(done.get(&("plain", *id)), Some(&1));
        assert_eq!(done.get(&("flaky", *id)), Some(&1));
    }
    assert!(done.values().all(|times| *times == 1), "nothing came back");
    let late: HashSet<Uuid> = done.keys().filter(|(name, _)| *name == "late").map(|(_, id)| *id).collect();
    assert!(ids[MESSAGES / 2 + 1..].iter().all(|id| late.contains(id)), "the newcomer has all that came after it");
    retain(&fresh, FOREVER).await;
    assert_eq!((admin.list(&Filter::default(), 10).await.expect("list").len(), rows(&fresh, "message").await), (0, 0));
    for name in ["outcome", "attempt", "resolution", "observation"] {
        assert_eq!(rows(&fresh, name).await, 0, "{name}");
    }
    if <Db as Testable>::NAME == "postgres" {
        assert_eq!(rows(&fresh, "late_delivery").await, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_hands_out_old_messages_keeps_retention_away() {
    let fresh = Postgres::fresh().await;
    let hand = Named::register(&fresh, vec![declared("a", "t", Kind::Plain, SOON)]).await;
    publish(&fresh, "t").await;
    hand.succeed("a").await;
    let sql = format!("select 1 from {}.retention for share", fresh.schema());
    let mut replay = fresh.pool.begin().await.expect("begin");
    sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut *replay).await.expect("hold");
    let retention = Retention { keep_unrouted: FOREVER, most: 10, tell: false };
    let step = fresh.postbox.store().retain(&retention).await.expect("retain");
    assert!(step.busy && step.more);
    replay.commit().await.expect("commit");
    assert_eq!(retain(&fresh, FOREVER).await, (1, 1));
    // An older snapshot could not tell what was handed out meanwhile.
    let mut strict = fresh.pool.begin().await.expect("begin");
    sqlx::raw_sql("set transaction isolation level repeatable read").execute(&mut *strict).await.expect("set");
    let sql = format!("select * from {}.retain(0, 10, false)", fresh.schema());
    let error = sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut *strict).await.expect_err("refused");
    assert_eq!(error.as_database_error().and_then(|e| e.code()).as_deref(), Some("25001"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_going_is_handed_out_to_nobody() {
    let fresh = Postgres::fresh().await;
    let hand = Named::register(&fresh, vec![declared("a", "t", Kind::Plain, SOON)]).await;
    publish(&fresh, "t").await;
    hand.succeed("a").await;
    let newcomer = Registration {
        worker: Uuid::now_v7(),
        name: "newcomer".into(),
        application: "test".into(),
        lease: Duration::from_secs(60),
        subscriptions: vec![Declared { start: Start::Beginning, ..declared("late", "t", Kind::Plain, SOON) }],
    };
    fresh.postbox.store().register(&newcomer).await.expect("register");
    end_window(&fresh).await;
    // It has removed the message, and has not committed yet.
    let mut removing = fresh.pool.begin().await.expect("begin");
    let sql = format!("select deliveries + messages from {}.retain(0, 10, false)", fresh.schema());
    let gone: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&mut *removing).await.expect("retain");
    assert_eq!(gone, 2);
    let handing_out = {
        let postbox = fresh.postbox.clone();
        tokio::spawn(async move { while postbox.store().backfill().await.expect("backfill") {} })
    };
    let waits = format!(
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%{}.retention for share%'",
        fresh.schema()
    );
    while Postgres::count(&fresh, &waits).await == 0 {
        assert!(!handing_out.is_finished(), "it does not wait");
        tokio::task::yield_now().await;
    }
    removing.commit().await.expect("commit");
    handing_out.await.expect("handed out");
    while fresh.postbox.store().backfill().await.expect("backfill") {}
    let subscriptions = fresh.postbox.admin().subscriptions().await.expect("subscriptions");
    assert!(subscriptions.iter().all(|s| !s.backfilling && s.pending == 0), "{subscriptions:?}");
}
