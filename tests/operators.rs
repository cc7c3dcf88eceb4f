//! What operators do to deliveries, and verdicts that are neither success nor failure, on both stores.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use postbox::admin::{Cancel, DeliveryDetail, Filter, Replay, Replays, Resolution};
use postbox::lifecycle::{Answer, End, Kind, Policy, State};
use postbox::store::{Claimed, Declared, Guarded, Move, Observation, Settle, Store};
use postbox::{
    Attempt, Envelope, Error, Failure, Operation, OperationFailure, Postbox, Postgres, Receipt, ResultExt, Router,
    Settings, Worker, handler, operation,
};
use postbox_testkit::hand::{self, Hand, publish};
use postbox_testkit::{Fresh, Server, Testable, on_both_stores};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

on_both_stores!(
    what_waits_or_is_dead_can_be_called_off,
    an_ended_delivery_is_replayed_as_a_new_one,
    an_operation_is_replayed_with_a_word_only,
    a_filter_is_previewed_and_replayed_once,
    times_and_applications_narrow_a_filter,
    a_snooze_is_on_record_and_no_attempt,
    a_snooze_leaves_its_lease,
    what_is_discarded_is_no_dead_letter,
    an_idempotent_operation_is_tried_again,
    an_idempotent_operation_ends_in_doubt_not_dead,
    a_lost_attempt_is_judged_by_what_it_was_begun_under,
    without_the_declaration_it_is_not_called_again,
    called_off_is_in_doubt_if_an_attempt_may_have_happened,
);

const QUICK: Duration = Duration::from_millis(1);

async fn start<Db: Testable>(fresh: &Fresh<Db>, router: Router<Db>) -> Worker<Db> {
    fresh.postbox.worker(router).poll_interval(Duration::from_millis(20)).start().await.expect("start")
}

/// Waits until `count` deliveries are there and none is pending or running; the oldest first.
async fn drained<Db: Testable>(fresh: &Fresh<Db>, count: usize) -> Vec<DeliveryDetail> {
    let admin = fresh.postbox.admin();
    let waiting = async {
        loop {
            let rows = admin.list(&Filter::default(), 1000).await.expect("list");
            let open = rows.iter().any(|r| matches!(r.state, State::Pending | State::Running));
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
    let mut details = Vec::new();
    for row in rows.iter().rev() {
        details.push(admin.show(row.id).await.expect("show"));
    }
    details
}

fn story(detail: &DeliveryDetail) -> (State, u32, Vec<&str>) {
    let outcomes = detail.attempts.iter().map(|a| a.outcome.as_deref().unwrap_or("running")).collect();
    (detail.row.state, detail.row.attempt, outcomes)
}

fn declared(name: &str, kind: Kind, idempotent: bool) -> Declared {
    let plainly = hand::declared(name, "t", kind);
    Declared { policy: Policy { idempotent, ..plainly.policy }, reconciles: false, ..plainly }
}

/// Claims what there is, with a first flush to fill.
async fn claim<Db: Testable>(hand: &Hand<Db>) -> (Claimed, Settle) {
    let claimed = hand.claim(10).await;
    let settle = hand.flush(&claimed, 0);
    (claimed, settle)
}

/// Claims one, puts its start on record, and dies; its number.
async fn dies_of_it<Db: Testable>(hand: Hand<Db>, fresh: &Fresh<Db>) -> i64 {
    let claimed = hand.claim(10).await;
    let item = &claimed.items[0];
    hand.begin(&claimed, 0, &[item]).await;
    hand.dies(fresh).await;
    item.delivery
}

fn cancel(rev: Option<i32>) -> Cancel {
    Cancel { rev, actor: "ana".into(), reason: "not wanted".into() }
}

fn replay(irreversible: bool) -> Replay {
    Replay { actor: "ana".into(), reason: "the CRM lost it".into(), irreversible }
}

async fn what_waits_or_is_dead_can_be_called_off<Db: Testable>() {
    let fresh = Db::fresh().await;
    let admin = fresh.postbox.admin();
    let hand = Hand::register(&fresh, vec![declared("a", Kind::Plain, false)]).await;
    let later = Envelope::json("t", &1).expect("a draft").after(Duration::from_secs(3600));
    fresh.postbox.publish_now([later]).await.expect("publish");
    publish(&fresh, "t", 2).await;
    let ids: Vec<i64> = admin.list(&Filter::default(), 10).await.expect("list").iter().rev().map(|r| r.id).collect();
    let entry = admin.cancel(ids[0], &cancel(Some(0))).await.expect("what is scheduled");
    assert_eq!((entry.state_before.as_deref(), entry.state_after.as_deref()), (Some("pending"), Some("cancelled")));
    admin.cancel(ids[1], &cancel(None)).await.expect("what is ready");
    assert!(matches!(admin.cancel(ids[1], &cancel(None)).await, Err(Error::Refused(_))), "once");
    let shown = admin.show(ids[1]).await.expect("show");
    assert_eq!((shown.row.state, shown.row.attempt), (State::Cancelled, 0));
    assert!(shown.row.note.as_deref().is_some_and(|n| n.contains("ana") && n.contains("not wanted")), "{shown:?}");

    let (claimed, settle) = claim(&hand).await;
    assert_eq!(claimed.items.len(), 1, "what was called off is not handed out");
    assert_eq!(claimed.items[0].delivery, ids[2]);
    let running = admin.cancel(ids[2], &cancel(None)).await.expect_err("running");
    assert!(matches!(&running, Error::Conflict(why) if why.contains("cannot be cancelled")), "{running}");
    let released = Settle { released: claimed.items.clone(), close: true, ..settle };
    hand.postbox.store().settle(&released).await.expect("released");
    let seen = admin.show(ids[2]).await.expect("show").row.rev;
    assert!(matches!(admin.cancel(ids[2], &cancel(Some(seen - 1))).await, Err(Error::Conflict(_))), "an old version");
    let (one, two) = (cancel(Some(seen)), cancel(Some(seen)));
    let both = futures_util::future::join(admin.cancel(ids[2], &one), admin.cancel(ids[2], &two)).await;
    let won = [&both.0, &both.1].into_iter().filter(|r| r.is_ok()).count();
    assert_eq!(won, 1, "one of two operators wins: {both:?}");
    assert!(matches!(admin.cancel(987_654, &cancel(None)).await, Err(Error::NotFound(_))));
    let audit = admin.audit(100).await.expect("audit");
    assert_eq!(audit.iter().filter(|a| a.action == "cancel").count(), 3);
    assert_eq!(audit.iter().filter(|a| a.action == "cancel refused").count(), 4, "the losers too: {audit:?}");

    // A dead letter is called off; what was called off can be tried again.
    publish(&fresh, "t", 1).await;
    drop(hand);
    let failing = handler(|_: Envelope| async { Err::<(), _>(Failure::permanent("no")) }).named("a");
    let worker = start(&fresh, Router::new().on("t", failing)).await;
    let all = drained(&fresh, 4).await;
    worker.stop(None).await.expect("stop");
    let dead = all[3].row.id;
    assert_eq!(all[3].row.state, State::Dead);
    admin.cancel(dead, &cancel(None)).await.expect("a dead letter");
    assert_eq!(admin.show(dead).await.expect("show").row.state, State::Cancelled);
    let again = postbox::admin::Retry { rev: None, actor: "ana".into(), reason: "after all".into() };
    admin.retry(dead, &again).await.expect("retry");
    assert_eq!(admin.show(dead).await.expect("show").row.state, State::Pending);
}

async fn an_ended_delivery_is_replayed_as_a_new_one<Db: Testable>() {
    let fresh = Db::fresh().await;
    let admin = fresh.postbox.admin();
    let calls = Arc::new(AtomicUsize::new(0));
    let counting = {
        let calls = calls.clone();
        handler(move |_: Envelope| {
            calls.fetch_add(1, Ordering::SeqCst);
            async { Ok::<(), Failure>(()) }
        })
        .named("a")
    };
    publish(&fresh, "t", 1).await;
    let worker = start(&fresh, Router::new().on("t", counting)).await;
    let old = drained(&fresh, 1).await.remove(0);
    let replayed = admin.replay(old.row.id, &replay(false)).await.expect("replay");
    assert!(replayed.delivery > old.row.id && replayed.idempotency_key.is_none(), "{replayed:?}");
    let all = drained(&fresh, 2).await;
    assert_eq!(calls.load(Ordering::SeqCst), 2, "the handler ran again");
    assert_eq!(story(&all[0]), story(&old), "the old one stays as it is");
    assert_eq!(all[0].replays, [replayed.delivery]);
    assert_eq!((all[1].row.id, all[1].row.replay_of), (replayed.delivery, Some(old.row.id)));
    assert_eq!(all[1].row.message, old.row.message);
    assert_eq!(story(&all[1]), (State::Succeeded, 1, vec!["succeeded"]));
    let (_, deliveries) = admin.message(old.row.message).await.expect("the message");
    assert_eq!(deliveries, [old.row.id, replayed.delivery]);
    worker.stop(None).await.expect("stop");

    publish(&fresh, "t", 1).await;
    let waits = admin.list(&Filter::default(), 1).await.expect("list")[0].id;
    let refused = admin.replay(waits, &replay(false)).await.expect_err("it waits");
    assert!(matches!(&refused, Error::Refused(why) if why.contains("on its way")), "{refused}");
    assert!(matches!(admin.replay(987_654, &replay(false)).await, Err(Error::NotFound(_))));
    admin.cancel(waits, &cancel(None)).await.expect("cancel");
    admin.replay(waits, &replay(false)).await.expect("what was cancelled");
    admin.remove_subscription("test", "a", "ana", "over").await.expect("remove");
    let removed = admin.replay(waits, &replay(false)).await.expect_err("removed");
    assert!(matches!(&removed, Error::Refused(why) if why.contains("was removed")), "{removed}");
    let again = postbox::admin::Retry { rev: None, actor: "ana".into(), reason: "who would take it?".into() };
    let removed = admin.retry(waits, &again).await.expect_err("removed");
    assert!(matches!(&removed, Error::Refused(why) if why.contains("was removed")), "{removed}");
    let long = postbox::admin::Retry { reason: "x".repeat(4097), ..again };
    let long = admin.retry(waits, &long).await.expect_err("too long");
    assert!(matches!(&long, Error::Refused(why) if why.contains("4096")), "{long}");
    let audit = admin.audit(100).await.expect("audit");
    let seqs: Vec<i64> = audit.iter().rev().map(|a| a.seq).collect();
    assert_eq!(seqs, (1..=seqs.len() as i64).collect::<Vec<_>>(), "no gap");
    assert_eq!(audit.iter().filter(|a| a.action == "replay").count(), 2);
    assert_eq!(audit.iter().filter(|a| a.action == "replay refused").count(), 2);
}

async fn an_operation_is_replayed_with_a_word_only<Db: Testable>() {
    let fresh = Db::fresh().await;
    let admin = fresh.postbox.admin();
    let keys = Arc::new(std::sync::Mutex::new(Vec::new()));
    let charge = {
        let keys = keys.clone();
        operation(move |op: Operation| {
            keys.lock().expect("the keys").push(op.idempotency_key().to_owned());
            async { Ok::<_, OperationFailure>(Receipt::none()) }
        })
        .named("charge")
    };
    let unseen =
        operation(|_: Operation| async { Err::<Receipt, _>(OperationFailure::in_doubt("no answer")) }).named("unseen");
    publish(&fresh, "t", 1).await;
    let worker = start(&fresh, Router::new().on("t", charge).on("t", unseen)).await;
    let all = drained(&fresh, 2).await;
    let charged = all.iter().find(|d| d.row.subscription == "charge").expect("charged").row.id;
    let doubt = all.iter().find(|d| d.row.subscription == "unseen").expect("unseen").row.id;
    let refused = admin.replay(charged, &replay(false)).await.expect_err("without a word");
    assert!(matches!(&refused, Error::Refused(why) if why.contains("--irreversible")), "{refused}");
    let silent = Replay { reason: " ".into(), ..replay(true) };
    assert!(matches!(admin.replay(charged, &silent).await, Err(Error::Refused(_))), "without a reason");
    let in_doubt = admin.replay(doubt, &replay(true)).await.expect_err("in doubt");
    assert!(matches!(&in_doubt, Error::Refused(why) if why.contains("postbox resolve")), "{in_doubt}");
    let replayed = admin.replay(charged, &replay(true)).await.expect("with one");
    drained(&fresh, 3).await;
    let keys = keys.lock().expect("the keys").clone();
    assert_eq!(keys.len(), 2);
    assert!(keys[0] != keys[1], "another key: {keys:?}");
    assert_eq!(replayed.idempotency_key.as_ref(), keys.get(1));
    assert_eq!(replayed.audit.action, "replay: irreversible");
    worker.stop(None).await.expect("stop");
}

async fn run_all<Db: Testable>(fresh: &Fresh<Db>, filter: &Filter, above: i64) -> Replays {
    let mut run = fresh.postbox.admin().replay_all(filter, &replay(false), above).await.expect("replay");
    while run.next().await.expect("a page").is_some() {}
    run.so_far()
}

async fn a_filter_is_previewed_and_replayed_once<Db: Testable>() {
    let fresh = Db::fresh().await;
    let admin = fresh.postbox.admin();
    let ok = |name: &str| handler(|_: Envelope| async { Ok::<(), Failure>(()) }).named(name);
    let fails = handler(|_: Envelope| async { Err::<(), _>(Failure::permanent("no")) }).named("fails");
    let charge = operation(|_: Operation| async { Ok::<_, OperationFailure>(Receipt::none()) }).named("charge");
    publish(&fresh, "t", 700).await;
    publish(&fresh, "u", 3).await;
    let router = Router::new().on("t", ok("ok")).on("u", fails).on("u", charge).on("u", ok("gone"));
    let worker = start(&fresh, router).await;
    let open: Filter = "state:pending,running".parse().expect("a filter");
    let done = async { while !admin.list(&open, 1).await.expect("list").is_empty() {} };
    tokio::time::timeout(Duration::from_secs(60), done).await.expect("all done");
    worker.stop(None).await.expect("stop");
    let entry = admin.remove_subscription("test", "gone", "ana", "over").await.expect("remove");
    assert_eq!((entry.subscription.as_deref(), entry.delivery), (Some("gone"), None));
    assert_eq!(admin.audit(1).await.expect("audit")[0].subscription.as_deref(), Some("gone"), "on record, too");
    let everything: Filter = "topic:>".parse().expect("a filter");
    let preview = admin.replay_preview(&everything).await.expect("preview");
    assert_eq!((preview.deliveries, preview.operations, preview.removed), (703, 3, 3), "{preview:?}");
    assert_eq!((preview.by_subscription.len(), preview.sample.len()), (4, 5));
    assert_eq!(admin.audit(10).await.expect("audit").len(), 1, "a preview does nothing");
    assert!(matches!(admin.replay_preview(&Filter::default()).await, Err(Error::Refused(_))), "all there ever was");
    let doubtful: Filter = "state:in_doubt".parse().expect("a filter");
    assert!(matches!(admin.replay_preview(&doubtful).await, Err(Error::Refused(_))));

    // Interrupted after the first page, and gone on with where it came to.
    let mut run = admin.replay_all(&everything, &replay(false), 0).await.expect("replay");
    let first = run.next().await.expect("a page").expect("one");
    assert_eq!(first.replayed + first.left_out, 500);
    drop(run);
    let rest = run_all(&fresh, &everything, first.upto).await;
    assert_eq!((first.replayed + rest.replayed, first.left_out + rest.left_out), (703, 6), "{first:?} {rest:?}");
    let pending: Filter = "state:pending".parse().expect("a filter");
    let made = admin.list(&pending, 1000).await.expect("list");
    assert_eq!(made.len(), 703);
    let olds: std::collections::HashSet<i64> = made.iter().filter_map(|r| r.replay_of).collect();
    assert_eq!(olds.len(), 703, "each once, and nothing that it made itself");
    let audit = admin.audit(1000).await.expect("audit");
    assert_eq!(audit.iter().filter(|a| a.action == "replay").count(), 703);
    let seqs: Vec<i64> = audit.iter().rev().map(|a| a.seq).collect();
    assert_eq!(seqs, (1..=704).collect::<Vec<_>>(), "no gap");
    let dead: Filter = "state:dead subscription:fails".parse().expect("a filter");
    assert_eq!(run_all(&fresh, &dead, 0).await.replayed, 3, "states narrow");
}

async fn times_and_applications_narrow_a_filter<Db: Testable>() {
    let fresh = Db::fresh().await;
    let admin = fresh.postbox.admin();
    let _hand = Hand::register(&fresh, vec![declared("a", Kind::Plain, false)]).await;
    publish(&fresh, "t", 1).await;
    let first = admin.list(&Filter::default(), 1).await.expect("list")[0].recorded_at;
    // Ids tell milliseconds: until a message is of a later one.
    let rows = loop {
        publish(&fresh, "t", 1).await;
        let rows = admin.list(&Filter::default(), 10_000).await.expect("list");
        if rows[0].recorded_at > first {
            break rows;
        }
    };
    let newest = rows[0].recorded_at;
    let count = |filter: String| {
        let admin = admin.clone();
        async move { admin.list(&filter.parse().expect("a filter"), 10_000).await.expect("list").len() }
    };
    let since = rows.iter().filter(|r| r.recorded_at >= newest).count();
    assert_eq!(count(format!("since:{newest}")).await, since);
    assert_eq!(count(format!("until:{newest}")).await, rows.len() - since);
    assert_eq!(count("since:1h".into()).await, rows.len());
    assert_eq!(count("until:1h".into()).await, 0);
    assert_eq!(count("application:test since:1h state:pending".into()).await, rows.len());
    assert_eq!(count("application:other".into()).await, 0);
    for wrong in ["since:yesterday", "since:-1h", "since:1h,2h", "until:9999999999h", "since:1mo"] {
        assert!(matches!(wrong.parse::<Filter>(), Err(Error::Settings(_))), "{wrong}");
    }
}

async fn a_snooze_is_on_record_and_no_attempt<Db: Testable>() {
    let fresh = Db::fresh().await;
    let snoozing = |name: &'static str| {
        let calls = Arc::new(AtomicUsize::new(0));
        move |attempt: Attempt| {
            let call = calls.fetch_add(1, Ordering::SeqCst);
            async move {
                assert_eq!(attempt.number, 1, "{name}: a snooze is no attempt");
                if call < 2 { Err(Failure::snooze(QUICK)) } else { Ok(()) }
            }
        }
    };
    let busy = || std::io::Error::other("busy");
    let operations = Arc::new(AtomicUsize::new(0));
    let asked = operations.clone();
    let later = operation(move |_: Operation| {
        let call = asked.fetch_add(1, Ordering::SeqCst);
        async move {
            if call == 0 {
                Err::<(), _>(busy()).snooze(QUICK)?;
            }
            Ok::<_, OperationFailure>(Receipt::none())
        }
    });
    let plain = handler(snoozing("plain")).named("plain").max_attempts(1);
    publish(&fresh, "t", 1).await;
    let worker = start(&fresh, Router::new().on("t", plain).on("t", later.named("later"))).await;
    let all = drained(&fresh, 2).await;
    let of = |name: &str| all.iter().find(|d| d.row.subscription == name).expect("there");
    assert_eq!(story(of("plain")), (State::Succeeded, 1, vec!["succeeded"]));
    let snoozes: Vec<_> = of("plain").records.iter().filter(|r| r.what == "snoozed").collect();
    assert_eq!(snoozes.len(), 2, "{:?}", of("plain").records);
    assert!(snoozes[0].detail.as_deref().is_some_and(|d| d.contains("1ms")));
    assert_eq!(story(of("later")), (State::Succeeded, 2, vec!["failed", "succeeded"]), "an operation's is on record");
    worker.stop(None).await.expect("stop");
}

async fn a_snooze_leaves_its_lease<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", Kind::Plain, false)]).await;
    publish(&fresh, "t", 2).await;
    let (claimed, settle) = claim(&hand).await;
    let item = &claimed.items[0];
    let snooze = End::Snoozed { wait: Duration::from_secs(3600) };
    let moved = Move { outcome: None, ..hand::ended(item, Kind::Plain, snooze, false) };
    let seen = Observation {
        delivery: item.delivery,
        number: 1,
        worker: hand.worker,
        kind: "snoozed",
        detail: None,
        evidence: None,
    };
    // A handler that snoozes for ever does not fill the disk with it.
    let settle = Settle { moves: vec![moved], seen: vec![seen; 120], ..settle };
    for _ in 0..2 {
        assert_eq!(hand.postbox.store().settle(&settle).await.expect("settle"), Guarded::Done, "once, asked twice");
    }
    // The batch is open when its worker dies: the takeover finds the other one only.
    let snoozed = item.delivery;
    Db::kill(&fresh, hand.postbox, hand.worker).await;
    let taken = fresh.postbox.store().take_over(0.0).await.expect("take over").expect("somebody dead");
    assert_eq!((taken.pending, taken.in_doubt, taken.dead), (1, 0, 0));
    let admin = fresh.postbox.admin();
    let rows = admin.list(&Filter::default(), 10).await.expect("list");
    assert_eq!(rows.len(), 2, "each in one place: {rows:#?}");
    let shown = admin.show(snoozed).await.expect("show");
    assert_eq!(story(&shown), (State::Pending, 0, vec![]));
    assert!(shown.row.next_due_at.is_some());
    assert_eq!(shown.records.iter().filter(|r| r.what == "snoozed").count(), 100, "up to a limit");
}

async fn what_is_discarded_is_no_dead_letter<Db: Testable>() {
    let fresh = Db::fresh().await;
    let outdated = || std::io::Error::other("its price has changed");
    let plain = handler(move |_: Envelope| async move {
        Err::<(), _>(outdated()).discard()?;
        Ok::<(), Failure>(())
    });
    let charge = operation(|_: Operation| async { Err::<Receipt, _>(OperationFailure::discard("sold out")) });
    publish(&fresh, "t", 1).await;
    let worker = start(&fresh, Router::new().on("t", plain.named("plain")).on("t", charge.named("charge"))).await;
    let all = drained(&fresh, 2).await;
    for (detail, why) in all.iter().zip(["its price has changed", "sold out"]) {
        assert_eq!(story(detail), (State::Cancelled, 1, vec!["discarded"]));
        assert!(detail.row.note.as_deref().is_some_and(|n| n.contains(why)), "{:?}", detail.row);
    }
    let subscriptions = fresh.postbox.admin().subscriptions().await.expect("subscriptions");
    assert!(subscriptions.iter().all(|s| s.dead == 0), "{subscriptions:?}");
    worker.stop(None).await.expect("stop");
}

async fn an_idempotent_operation_is_tried_again<Db: Testable>() {
    let fresh = Db::fresh().await;
    let keys = Arc::new(std::sync::Mutex::new(std::collections::HashSet::new()));
    let seen = keys.clone();
    let charge = operation(move |op: Operation| {
        seen.lock().expect("the keys").insert(op.idempotency_key().to_owned());
        async move {
            match op.attempt() {
                1 => Err(OperationFailure::in_doubt("no answer")),
                2 => panic!("a planned panic"),
                3 => std::future::pending().await,
                _ => Ok(Receipt::of("ch_1")),
            }
        }
    });
    let charge = charge.named("charge").idempotent().backoff(QUICK, QUICK).timeout(Duration::from_secs(2));
    publish(&fresh, "t", 1).await;
    let worker = start(&fresh, Router::new().on("t", charge)).await;
    let all = drained(&fresh, 1).await;
    assert_eq!(story(&all[0]), (State::Succeeded, 4, vec!["in_doubt", "panicked", "timed_out", "succeeded"]));
    assert_eq!(keys.lock().expect("the keys").len(), 1, "one key for all attempts");
    let subscriptions = fresh.postbox.admin().subscriptions().await.expect("subscriptions");
    assert!(subscriptions[0].idempotent);
    worker.stop(None).await.expect("stop");
}

async fn an_idempotent_operation_ends_in_doubt_not_dead<Db: Testable>() {
    let fresh = Db::fresh().await;
    type Outcome = Result<Receipt, OperationFailure>;
    let unseen_then = |name: &'static str, then: fn() -> OperationFailure| {
        operation(move |op: Operation| async move {
            match op.attempt() {
                1 => Outcome::Err(OperationFailure::in_doubt("no answer")),
                _ => Err(then()),
            }
        })
        .named(name)
        .idempotent()
        .max_attempts(2)
        .backoff(QUICK, QUICK)
    };
    let refused = operation(|_: Operation| async { Outcome::Err(OperationFailure::refused("no")) });
    let router = Router::new()
        .on("t", unseen_then("unseen", || OperationFailure::in_doubt("no answer")))
        .on("t", unseen_then("not_done", || OperationFailure::not_done("busy")))
        .on("t", unseen_then("refused", || OperationFailure::refused("no")))
        .on("t", unseen_then("discarded", || OperationFailure::discard("not wanted")))
        .on("t", refused.named("clear").idempotent());
    publish(&fresh, "t", 1).await;
    let worker = start(&fresh, router).await;
    let all = drained(&fresh, 5).await;
    for detail in &all {
        let story = story(detail);
        match detail.row.subscription.as_str() {
            "unseen" => assert_eq!(story, (State::InDoubt, 2, vec!["in_doubt", "in_doubt"])),
            "not_done" | "refused" => assert_eq!(story, (State::InDoubt, 2, vec!["in_doubt", "failed"])),
            "discarded" => assert_eq!(story, (State::InDoubt, 2, vec!["in_doubt", "discarded"])),
            _ => assert_eq!(story, (State::Dead, 1, vec!["failed"]), "nothing was unseen"),
        }
    }
    worker.stop(None).await.expect("stop");
    let doubt = all.iter().find(|d| d.row.subscription == "refused").expect("there");
    assert!(doubt.row.note.as_deref().is_some_and(|n| n.contains("earlier attempt")), "{:?}", doubt.row);
    let word = Resolution {
        rev: None,
        answer: Answer::Happened,
        evidence: None,
        actor: "ana".into(),
        reason: "in the console".into(),
    };
    fresh.postbox.admin().resolve(doubt.row.id, &word).await.expect("resolve");
}

async fn a_lost_attempt_is_judged_by_what_it_was_begun_under<Db: Testable>() {
    let fresh = Db::fresh().await;
    let admin = fresh.postbox.admin();
    publish(&fresh, "t", 1).await;
    let hand = Hand::register(&fresh, vec![declared("op", Kind::Operation, true)]).await;
    let delivery = dies_of_it(hand, &fresh).await;
    let shown = admin.show(delivery).await.expect("show");
    assert_eq!(story(&shown), (State::Pending, 1, vec!["lost"]), "declared: tried again");
    let hand = Hand::register(&fresh, vec![declared("op", Kind::Operation, true)]).await;
    let (claimed, settle) = claim(&hand).await;
    assert_eq!((claimed.items[0].attempts, claimed.items[0].lost), (1, 1), "what nobody saw is remembered");
    let released = Settle { released: claimed.items.clone(), close: true, ..settle };
    hand.postbox.store().settle(&released).await.expect("released");
    admin.cancel(delivery, &cancel(None)).await.expect("cancel");

    // Begun without the declaration, which comes before the takeover.
    publish(&fresh, "t", 1).await;
    let old = Hand::register(&fresh, vec![declared("op", Kind::Operation, false)]).await;
    let new = Hand::register(&fresh, vec![declared("op", Kind::Operation, true)]).await;
    let delivery = dies_of_it(old, &fresh).await;
    let shown = admin.show(delivery).await.expect("show");
    assert_eq!(story(&shown), (State::InDoubt, 1, vec!["in_doubt"]), "a repeat of that one may do it twice");
    drop((hand, new));
}

async fn without_the_declaration_it_is_not_called_again<Db: Testable>() {
    let fresh = Db::fresh().await;
    publish(&fresh, "t", 1).await;
    let hand = Hand::register(&fresh, vec![declared("op", Kind::Operation, true)]).await;
    dies_of_it(hand, &fresh).await;
    let calls = Arc::new(AtomicUsize::new(0));
    let counting = calls.clone();
    let undeclared = operation(move |_: Operation| {
        counting.fetch_add(1, Ordering::SeqCst);
        async { Ok::<_, OperationFailure>(Receipt::none()) }
    });
    let worker = start(&fresh, Router::new().on("t", undeclared.named("op"))).await;
    let all = drained(&fresh, 1).await;
    assert_eq!(story(&all[0]), (State::InDoubt, 1, vec!["lost"]));
    assert!(all[0].row.note.as_deref().is_some_and(|n| n.contains("not declared idempotent")), "{:?}", all[0].row);
    assert_eq!(calls.load(Ordering::SeqCst), 0, "it may have happened, and a repeat is not known to be harmless");
    worker.stop(None).await.expect("stop");
}

async fn called_off_is_in_doubt_if_an_attempt_may_have_happened<Db: Testable>() {
    let fresh = Db::fresh().await;
    let admin = fresh.postbox.admin();
    publish(&fresh, "t", 1).await;
    let hand = Hand::register(&fresh, vec![declared("op", Kind::Operation, true)]).await;
    let delivery = dies_of_it(hand, &fresh).await;
    let again = postbox::admin::Retry { rev: None, actor: "ana".into(), reason: "in a hurry".into() };
    admin.retry(delivery, &again).await.expect("retry");
    let entry = admin.cancel(delivery, &cancel(None)).await.expect("cancel");
    assert_eq!((entry.state_before.as_deref(), entry.state_after.as_deref()), (Some("pending"), Some("in_doubt")));
    let shown = admin.show(delivery).await.expect("show");
    assert!(shown.row.note.as_deref().is_some_and(|n| n.contains("not wanted")), "{:?}", shown.row);
    let refused = admin.cancel(delivery, &cancel(None)).await.expect_err("in doubt");
    assert!(matches!(&refused, Error::Refused(why) if why.contains("postbox resolve")), "{refused}");
    let word = |answer| Resolution {
        rev: None,
        answer,
        evidence: None,
        actor: "ana".into(),
        reason: "not in the console".into(),
    };
    admin.resolve(delivery, &word(Answer::DidNotHappen)).await.expect("resolve");
    admin.cancel(delivery, &cancel(None)).await.expect("now it is known");
    assert_eq!(admin.show(delivery).await.expect("show").row.state, State::Cancelled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_the_server_gives_up_may_be_had_later() {
    let server = Server::start();
    let mut connection = PgConnection::connect(&server.url()).await.expect("a connection");
    sql(&mut connection, "create database closed allow_connections false").await;
    let open = async |url: String| {
        let settings = Settings::defaults().url(url).set("application", "test");
        Postbox::<Postgres>::open(settings).await.expect_err("no session")
    };
    // 55000, which is a statement's own fault otherwise.
    let url = server.url();
    let url = url.strip_suffix("postgres").expect("the database's name comes last");
    let given_up = open(format!("{url}closed")).await;
    assert!(given_up.is_transient(), "{given_up}");
    for elsewhere in [format!("{url}nowhere"), format!("{}postgres", url.replace("postgres@", "nobody@"))] {
        let refused = open(elsewhere).await;
        assert!(!refused.is_transient(), "{refused}");
    }
}

async fn sql(connection: &mut PgConnection, text: &str) {
    sqlx::raw_sql(AssertSqlSafe(text.to_owned())).execute(connection).await.expect("the statement");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_keeps_dead_rows_is_told() {
    // A server of its own: what other tests hold open would be told of, too.
    let server = Server::start();
    let settings = Settings::defaults().url(server.url()).set("application", "test");
    let postbox: Postbox<Postgres> = Postbox::migrate(settings.clone()).await.expect("migrated");
    let store = postbox.store();
    let held_back = async |longer_than| store.held_back(longer_than).await.expect("looks");
    assert_eq!(held_back(Duration::ZERO).await, None);

    let url = format!("{}?application_name=report", server.url());
    let mut reader = PgConnection::connect(&url).await.expect("a connection");
    sql(&mut reader, "begin isolation level repeatable read; select 1").await;
    let mut other = PgConnection::connect(&server.url()).await.expect("a connection");
    let dead = "insert into postbox.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
            select 0, 0, 0, n, n, gen_random_uuid(), 0, 0, 0 from generate_series(1, 100) n;
         delete from postbox.ready; select pg_stat_force_next_flush()";
    sql(&mut other, dead).await;
    let told = held_back(Duration::ZERO).await.expect("a reader holds its snapshot");
    assert_eq!((told.kind.as_str(), told.name.as_deref()), ("transaction", Some("report")));
    assert_eq!((told.login.as_deref(), told.state.as_deref()), (Some("postgres"), Some("idle in transaction")));
    assert!(told.age_s.is_some_and(|age| age < 60.0) && told.transactions > 0, "{told:?}");
    assert_eq!(told.dead_rows, 100);
    // It is young.
    assert_eq!(held_back(Duration::from_secs(3600)).await, None);
    assert_eq!(postbox.admin().status().await.expect("status").held_back, None);

    // A viewer may not see how long a session of others has held it: by then it is very old.
    sql(&mut other, "create role looker login; grant postbox_viewer to looker").await;
    let seen = settings.url(server.url().replace("postgres@", "looker@"));
    let viewer: Postbox<Postgres> = Postbox::open(seen).await.expect("open as a viewer");
    assert_eq!(viewer.store().held_back(Duration::ZERO).await.expect("looks"), None);
    let many = "create temporary table spent (n int);
         do $$ begin for n in 1..50000 loop
             begin insert into spent values (n); exception when others then raise; end;
         end loop; end $$";
    sql(&mut other, many).await;
    let told = viewer.admin().status().await.expect("status").held_back.expect("very old");
    assert_eq!((told.name.as_deref(), told.state, told.age_s), (Some("report"), None, None));
    let pid: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut reader).await.expect("a number");
    assert_eq!(told.pid, Some(pid));

    sql(&mut reader, "rollback").await;
    sql(&mut other, "begin; insert into spent values (0); drop table spent").await;
    assert_eq!(held_back(Duration::ZERO).await.expect("a writer").state.as_deref(), Some("idle in transaction"));
    sql(&mut other, "rollback; begin; delete from postbox.ready; select pg_current_xact_id()").await;
    sql(&mut other, "prepare transaction 'forgotten'").await;
    let told = held_back(Duration::ZERO).await.expect("a prepared transaction");
    assert_eq!((told.kind.as_str(), told.name.as_deref(), told.pid), ("prepared transaction", Some("forgotten"), None));
    sql(&mut other, "rollback prepared 'forgotten'").await;
    assert_eq!(held_back(Duration::ZERO).await, None);
}
