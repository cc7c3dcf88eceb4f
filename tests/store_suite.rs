//! Every verb of the store, concurrency included, the same for each database. A store is done when
//! this passes.

#[path = "store_suite/subscriptions.rs"]
mod subscriptions;

use std::collections::HashSet;
use std::time::Duration;

use postbox::admin::{Filter, Resolution, Retry};
use postbox::lifecycle::{Answer, End, Kind, State};
use postbox::store::{Answered, Beat, ClaimRequest, Claimed, Evidence, Guarded, Observation, Settle, Speaker, Store};
use postbox::{Envelope, Error, PublishError};
use postbox_testkit::hand::{Hand, declared, ended, publish, success};
use postbox_testkit::{Fresh, Testable, on_both_stores};
use serde_json::json;
use sqlx::Connection;
use uuid::Uuid;

use self::subscriptions::*;

on_both_stores!(
    each_delivery_is_claimed_once,
    a_settle_counts_once_and_needs_its_lease,
    what_was_not_started_goes_back_uncounted,
    a_dead_workers_batch_comes_back_without_what_was_settled,
    a_plain_delivery_whose_worker_died_is_lost_not_failed,
    a_doubt_ends_once,
    late_outcomes_are_evidence,
    a_dedup_key_makes_one_row_from_eight_connections,
    nothing_starts_before_it_is_due,
    operators_act_on_what_they_saw,
    only_resolve_ends_a_doubt,
    new_subscriptions_take_their_history,
    two_workers_hand_out_history_at_once,
    an_operation_is_not_taken_for_something_else,
    a_reborn_worker_changes_no_subscription,
    a_renamed_subscription_keeps_its_deliveries,
    a_changed_pattern_leaves_old_deliveries_and_takes_new_ones,
    a_taken_over_worker_is_told,
    an_unknown_claim_is_handed_back,
    routes_that_were_learnt_fan_out_the_same,
    a_sleeper_is_woken,
    a_rollback_leaves_nothing,
    stranded_deliveries_are_told,
    what_is_due_later_waits_for_nobody_yet,
);

/// Every delivery, and that each is in one place only.
async fn standing<Db: Testable>(fresh: &Fresh<Db>) -> Vec<(i64, State, u32)> {
    let rows = fresh.postbox.admin().list(&Filter::default(), 10_000).await.expect("list");
    let ids: HashSet<i64> = rows.iter().map(|r| r.id).collect();
    assert_eq!(ids.len(), rows.len(), "a delivery is in two places");
    let mut all: Vec<_> = rows.iter().map(|r| (r.id, r.state, r.attempt)).collect();
    all.sort();
    all
}

async fn count<Db: Testable>(fresh: &Fresh<Db>, state: State) -> usize {
    standing(fresh).await.iter().filter(|(_, s, _)| *s == state).count()
}

async fn each_delivery_is_claimed_once<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t.*", Kind::Plain), declared("b", "t.>", Kind::Plain)]).await;
    publish(&fresh, "t.x", 100).await;
    let claims = (0..8).map(|_| async {
        let mut seen = Vec::new();
        loop {
            let claimed = hand.claim(7).await;
            if claimed.items.is_empty() {
                return seen;
            }
            assert!(claimed.items.iter().all(|i| i.envelope.as_ref().is_some_and(|e| e.topic == "t.x")));
            let successes = claimed.items.iter().map(success).collect();
            seen.extend(claimed.items.iter().map(|i| i.delivery));
            let settle = Settle { successes, close: true, ..hand.flush(&claimed, 0) };
            assert_eq!(hand.settle(settle).await, Guarded::Done);
        }
    });
    let seen: Vec<i64> = futures_util::future::join_all(claims).await.concat();
    assert_eq!(seen.len(), 200, "each message for both subscriptions");
    assert_eq!(seen.iter().collect::<HashSet<_>>().len(), 200, "each once");
    assert_eq!(count(&fresh, State::Succeeded).await, 200);
}

/// What is on record of these deliveries, and what is counted.
async fn record<Db: Testable>(fresh: &Fresh<Db>, claimed: &Claimed) -> Vec<String> {
    let mut record = Vec::new();
    for item in &claimed.items {
        let shown = fresh.postbox.admin().show(item.delivery).await.expect("show");
        let outcomes: Vec<_> = shown.attempts.iter().map(|a| (a.number, a.outcome.clone())).collect();
        record.push(format!("{} {} {} {outcomes:?}", shown.row.id, shown.row.state, shown.row.rev));
    }
    for s in fresh.postbox.admin().status().await.expect("status").subscriptions {
        let counts = (s.pending, s.scheduled, s.running, s.in_doubt, s.dead, s.succeeded_last_hour);
        record.push(format!("{} {counts:?}", s.name));
    }
    record
}

/// The part is free and no attempt has ended yet: nothing but the fence stands in the way.
async fn who_was_taken_over_settles_nothing<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    publish(&fresh, "t", 2).await;
    let claimed = hand.claim(2).await;
    let late = Settle {
        successes: vec![success(&claimed.items[0])],
        moves: vec![ended(&claimed.items[1], Kind::Plain, REFUSED, false)],
        ..hand.flush(&claimed, 0)
    };
    assert_eq!(hand.dies(&fresh).await, (2, 0, 0));
    let heir = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    let again = heir.claim(2).await;
    assert_eq!(again.items.len(), 2);
    let before = record(&fresh, &again).await;
    let answer = fresh.postbox.store().settle(&late).await;
    assert_eq!(record(&fresh, &again).await, before, "who was taken over has changed something");
    assert_eq!(answer.expect("settle"), Guarded::Fenced);
    let own = Settle { successes: again.items.iter().map(success).collect(), close: true, ..heir.flush(&again, 0) };
    assert_eq!(heir.settle(own).await, Guarded::Done, "who holds the lease settles");
}

const REFUSED: End = End::Failed { permanent: true, retry_after: None };

async fn a_settle_counts_once_and_needs_its_lease<Db: Testable>() {
    who_was_taken_over_settles_nothing::<Db>().await;
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    publish(&fresh, "t", 2).await;
    let claimed = hand.claim(2).await;
    let (one, two) = (&claimed.items[0], &claimed.items[1]);
    let first = Settle {
        successes: vec![success(one)],
        moves: vec![ended(two, Kind::Plain, REFUSED, false)],
        ..hand.flush(&claimed, 0)
    };
    assert_eq!(hand.settle(first.clone()).await, Guarded::Done);
    let before = standing(&fresh).await;
    assert_eq!(hand.settle(first.clone()).await, Guarded::Done, "the answer was lost, asked again");
    assert_eq!(standing(&fresh).await, before, "and nothing was written twice");
    let close = Settle { close: true, ..hand.flush(&claimed, 1) };
    assert_eq!(hand.settle(close.clone()).await, Guarded::Done);
    assert_eq!(hand.settle(close).await, Guarded::Done, "a close whose answer was lost is known by its part");
    assert_eq!(hand.settle(Settle { part: 2, ..first }).await, Guarded::Fenced, "without a lease nothing is written");
    let shown = fresh.postbox.admin().show(one.delivery).await.expect("show");
    assert_eq!((shown.attempts.len(), shown.attempts[0].outcome.as_deref()), (1, Some("succeeded")));
    let dead = fresh.postbox.admin().show(two.delivery).await.expect("show");
    assert_eq!((dead.row.state, dead.row.last_error.as_deref()), (State::Dead, Some("as the test says")));
}

async fn what_was_not_started_goes_back_uncounted<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Operation)]).await;
    publish(&fresh, "t", 3).await;
    let claimed = hand.claim(3).await;
    let settle = Settle { released: claimed.items.clone(), close: true, ..hand.flush(&claimed, 0) };
    assert_eq!(hand.settle(settle).await, Guarded::Done);
    let again = hand.claim(3).await;
    assert_eq!(again.items.len(), 3);
    assert!(again.items.iter().all(|i| i.attempts == 0 && i.lost == 0));
    assert!(again.items[0].rev > claimed.items[0].rev, "each move counts a revision");
}

async fn a_dead_workers_batch_comes_back_without_what_was_settled<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("op", "t", Kind::Operation)]).await;
    publish(&fresh, "t", 6).await;
    let claimed = hand.claim(6).await;
    let items = &claimed.items;
    hand.begin(&claimed, 0, &[&items[0], &items[1], &items[2]]).await;
    let settle = Settle {
        moves: vec![ended(&items[0], Kind::Operation, End::Succeeded, true)],
        released: vec![items[3].clone()],
        ..hand.flush(&claimed, 1)
    };
    assert_eq!(hand.settle(settle).await, Guarded::Done);
    let mut late = hand.flush(&claimed, 2);
    assert_eq!(hand.dies(&fresh).await, (2, 2, 0), "begun: in doubt; not begun: pending; the rest was settled");
    assert_eq!(count(&fresh, State::InDoubt).await, 2);
    assert_eq!(count(&fresh, State::Pending).await, 3);
    assert_eq!(count(&fresh, State::Succeeded).await, 1);
    late.moves = vec![ended(&items[1], Kind::Operation, End::Succeeded, true)];
    assert_eq!(fresh.postbox.store().settle(&late).await.expect("settle"), Guarded::Fenced);
    let doubt = fresh.postbox.admin().show(items[1].delivery).await.expect("show");
    assert_eq!((doubt.row.state, doubt.row.attempt), (State::InDoubt, 1));
    assert_eq!(doubt.attempts[0].outcome.as_deref(), Some("in_doubt"));
}

async fn a_plain_delivery_whose_worker_died_is_lost_not_failed<Db: Testable>() {
    let fresh = Db::fresh().await;
    publish(&fresh, "t", 1).await;
    for round in 0..2 {
        let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
        let claimed = hand.claim(1).await;
        assert_eq!((claimed.items[0].attempts, claimed.items[0].lost), (0, round), "no attempt is counted");
        assert_eq!(hand.dies(&fresh).await, (1, 0, 0));
    }
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    let claimed = hand.claim(1).await;
    hand.begin(&claimed, 0, &[&claimed.items[0]]).await;
    let delivery = claimed.items[0].delivery;
    assert_eq!(hand.dies(&fresh).await, (1, 0, 0), "a start on record counts as an attempt");
    let shown = fresh.postbox.admin().show(delivery).await.expect("show");
    assert_eq!((shown.row.state, shown.row.attempt), (State::Pending, 1));
    assert_eq!(shown.attempts[0].outcome.as_deref(), Some("lost"));
    assert_eq!(shown.records.iter().filter(|r| r.record == "observation").count(), 2);
}

/// An operation that is in doubt after its first attempt.
async fn doubtful<Db: Testable>(fresh: &Fresh<Db>, hand: &Hand<Db>) -> (i64, i32) {
    publish(fresh, "t", 1).await;
    let claimed = hand.claim(1).await;
    let item = &claimed.items[0];
    hand.begin(&claimed, 0, &[item]).await;
    let moves = vec![ended(item, Kind::Operation, End::InDoubt, true)];
    assert_eq!(hand.settle(Settle { moves, close: true, ..hand.flush(&claimed, 1) }).await, Guarded::Done);
    (item.delivery, item.rev + 1)
}

fn answered(delivery: i64, rev: i32, answer: Answer) -> Answered {
    Answered {
        delivery,
        rev,
        answer,
        speaker: Speaker::Reconcile,
        actor: "reconcile".into(),
        reason: None,
        receipt: Some(json!({ "found": true })),
        follow_ups: vec![Envelope::json("after", &1).expect("a draft")],
        draw: 0.0,
    }
}

async fn a_doubt_ends_once<Db: Testable>() {
    let fresh = Db::fresh().await;
    let subscriptions = vec![declared("op", "t", Kind::Operation), declared("after", "after", Kind::Plain)];
    let hand = Hand::register(&fresh, subscriptions).await;
    let (delivery, rev) = doubtful(&fresh, &hand).await;
    let asked = hand.store().doubts(&hand.subscriptions, 10, Duration::from_secs(60)).await.expect("doubts");
    assert_eq!((asked.len(), asked[0].delivery, asked[0].rev, asked[0].quiet), (1, delivery, rev, true));
    let again = hand.store().doubts(&hand.subscriptions, 10, Duration::from_secs(60)).await.expect("doubts");
    assert!(again.is_empty(), "one worker asks at a time");
    let (store, word) = (hand.store(), answered(delivery, rev, Answer::Happened));
    let answers = futures_util::future::join_all((0..4).map(|_| store.answer(&word))).await;
    let won = answers.into_iter().filter(|a| *a.as_ref().expect("an answer")).count();
    assert_eq!(won, 1, "one answer counts");
    let followed = hand.claim(10).await;
    assert_eq!(followed.items.len(), 1, "its follow-up was published with it, once");
    let shown = fresh.postbox.admin().show(delivery).await.expect("show");
    assert_eq!((shown.row.state, shown.attempts.len()), (State::Succeeded, 1));

    let (delivery, rev) = doubtful(&fresh, &hand).await;
    assert!(!hand.store().answer(&answered(delivery, rev + 1, Answer::DidNotHappen)).await.expect("answer"));
    assert!(hand.store().answer(&answered(delivery, rev, Answer::DidNotHappen)).await.expect("answer"));
    let again = loop {
        let claimed = hand.claim(1).await;
        if let Some(item) = claimed.items.into_iter().find(|i| i.delivery == delivery) {
            break item;
        }
    };
    assert_eq!(again.attempts, 1, "the numbering goes on");
}

async fn late_outcomes_are_evidence<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("op", "t", Kind::Operation)]).await;
    let (delivery, _) = doubtful(&fresh, &hand).await;
    let seen = |number, answer| Observation {
        delivery,
        number,
        worker: hand.worker,
        kind: "succeeded",
        detail: None,
        evidence: Some(Evidence { answer, receipt: Some(json!({ "id": "ch_1" })), follow_ups: Vec::new() }),
    };
    hand.store().observe(&[seen(7, Answer::Happened)]).await.expect("observe");
    assert_eq!(count(&fresh, State::InDoubt).await, 1, "of another attempt it proves nothing");
    hand.store().observe(&[seen(1, Answer::Happened)]).await.expect("observe");
    let shown = fresh.postbox.admin().show(delivery).await.expect("show");
    assert_eq!(shown.row.state, State::Succeeded);
    assert_eq!(shown.records.iter().filter(|r| r.record == "observation").count(), 2);
    assert_eq!(shown.records.iter().filter(|r| r.record == "resolution" && r.what == "happened").count(), 1);
    hand.store().observe(&[seen(1, Answer::DidNotHappen)]).await.expect("observe");
    assert_eq!(count(&fresh, State::Succeeded).await, 1, "what is settled stays settled");
}

async fn a_dedup_key_makes_one_row_from_eight_connections<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    let publish = |n: usize| {
        let postbox = fresh.postbox.clone();
        async move {
            // Two of the eight say something else under the same key.
            let body = json!({ "amount": if n % 4 == 3 { 2 } else { 1 }, "same": true });
            postbox.publish_now([Envelope::json("t", &body).expect("a draft").dedup("event-1")]).await
        }
    };
    let results = futures_util::future::join_all((0..8).map(publish)).await;
    let fresh_ones: Vec<Uuid> = results.iter().flatten().filter(|p| !p[0].is_duplicate()).map(|p| p[0].id).collect();
    assert_eq!(fresh_ones.len(), 1, "one row");
    for result in &results {
        match result {
            Ok(published) => assert_eq!(published[0].id, fresh_ones[0], "all are told the same id"),
            Err(Error::Publish(PublishError::DedupConflict { existing, .. })) => assert_eq!(*existing, fresh_ones[0]),
            Err(other) => panic!("{other}"),
        }
    }
    let conflicts = results.iter().filter(|r| r.is_err()).count();
    assert!(conflicts == 2 || conflicts == 6, "another body is a conflict, whoever came first: {conflicts}");
    assert_eq!(hand.claim(10).await.items.len(), 1);

    // Spelled otherwise, the same body; another topic, another key; out of its window, new.
    let spelled = Envelope::raw("t2", "{\"b\": 1,   \"a\": 2}").expect("json").dedup("k");
    let other = Envelope::raw("t2", "{\"a\":2,\"b\":1}").expect("json").dedup("k");
    let first = fresh.postbox.publish_now([spelled]).await.expect("publish");
    assert_eq!(fresh.postbox.publish_now([other]).await.expect("publish")[0].id, first[0].id);
    let short = || Envelope::json("t3", &1).expect("a draft").dedup_within("k", Duration::ZERO);
    let ids: HashSet<Uuid> = [
        fresh.postbox.publish_now([short()]).await.expect("publish")[0].id,
        fresh.postbox.publish_now([short()]).await.expect("publish")[0].id,
    ]
    .into();
    assert_eq!(ids.len(), 2, "a window that is over does not count");
    let twice = [short().dedup("in-one-call"), short().dedup("in-one-call")];
    let both = fresh.postbox.publish_now(twice).await.expect("publish");
    assert_eq!((both[0].id, both[1].is_duplicate()), (both[1].id, true));
}

async fn nothing_starts_before_it_is_due<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    let delay = Duration::from_millis(300);
    let before = std::time::Instant::now();
    let drafts = [
        Envelope::json("t", &"later").expect("a draft").after(delay),
        Envelope::json("t", &"next year")
            .expect("a draft")
            .at(jiff::Timestamp::now() + Duration::from_secs(31_536_000)),
        Envelope::json("t", &"past").expect("a draft").at(jiff::Timestamp::UNIX_EPOCH),
    ];
    fresh.postbox.publish_now(drafts).await.expect("publish");
    let now = hand.claim(10).await;
    assert_eq!(now.items.len(), 1, "what was due in the past is due now");
    let empty = hand.claim(10).await;
    assert!(before.elapsed() > delay || empty.next_due.is_some_and(|due| due <= delay), "{:?}", empty.next_due);
    let later = loop {
        let claimed = hand.claim(10).await;
        if !claimed.items.is_empty() {
            break claimed;
        }
        tokio::task::yield_now().await;
    };
    assert!(before.elapsed() >= delay, "not before its time");
    let payload = later.items[0].envelope.as_ref().and_then(|e| e.payload_json().map(str::to_owned));
    assert_eq!((later.items.len(), payload.as_deref()), (1, Some("\"later\"")));
}

fn retry(rev: Option<i32>) -> Retry {
    Retry { rev, actor: "ana".into(), reason: "the CRM is back".into() }
}

fn word(rev: Option<i32>, answer: Answer) -> Resolution {
    Resolution { rev, answer, evidence: None, actor: "ana".into(), reason: "seen in the console".into() }
}

async fn operators_act_on_what_they_saw<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    publish(&fresh, "t", 1).await;
    let claimed = hand.claim(1).await;
    let item = &claimed.items[0];
    let admin = fresh.postbox.admin();
    assert!(matches!(admin.retry(item.delivery, &retry(None)).await, Err(Error::Conflict(_))), "it is running");
    let moves = vec![ended(item, Kind::Plain, End::Failed { permanent: true, retry_after: None }, false)];
    hand.settle(Settle { moves, close: true, ..hand.flush(&claimed, 0) }).await;
    let dead = admin.show(item.delivery).await.expect("show").row;
    let (one, two) = (retry(Some(dead.rev)), retry(Some(dead.rev)));
    let both = futures_util::future::join(admin.retry(dead.id, &one), admin.retry(dead.id, &two)).await;
    let won = [&both.0, &both.1].into_iter().filter(|r| r.is_ok()).count();
    let lost = [&both.0, &both.1].into_iter().filter(|r| matches!(r, Err(Error::Conflict(_)))).count();
    assert_eq!((won, lost), (1, 1), "one wins, the other is told: {both:?}");
    let again = hand.claim(1).await;
    assert_eq!(
        (again.items[0].delivery, again.items[0].attempts),
        (item.delivery, 1),
        "the same delivery, counting on"
    );
    hand.settle(Settle { successes: vec![success(&again.items[0])], close: true, ..hand.flush(&again, 0) }).await;
    assert!(matches!(admin.retry(dead.id, &retry(None)).await, Err(Error::Refused(_))), "it has succeeded");
    assert!(matches!(admin.retry(987_654, &retry(None)).await, Err(Error::NotFound(_))));
    let audit = admin.audit(100).await.expect("audit");
    let mut numbers: Vec<i64> = audit.iter().map(|a| a.seq).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (1..=numbers.len() as i64).collect::<Vec<_>>(), "no gap, in whatever order");
    assert_eq!(audit.iter().filter(|a| a.action == "retry").count(), 1);
    assert_eq!(audit.iter().filter(|a| a.action == "retry refused").count(), 3, "the losers are on record: {audit:?}");
}

async fn only_resolve_ends_a_doubt<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("op", "t", Kind::Operation)]).await;
    let admin = fresh.postbox.admin();
    let (delivery, rev) = doubtful(&fresh, &hand).await;
    assert!(matches!(admin.retry(delivery, &retry(None)).await, Err(Error::Refused(_))), "never a blind retry");
    let unreasoned = Resolution { reason: " ".into(), ..word(None, Answer::Happened) };
    assert!(matches!(admin.resolve(delivery, &unreasoned).await, Err(Error::Refused(_))));
    assert!(matches!(admin.resolve(delivery, &word(Some(rev - 1), Answer::Happened)).await, Err(Error::Conflict(_))));
    let entry = admin.resolve(delivery, &word(Some(rev), Answer::Happened)).await.expect("resolve");
    assert_eq!((entry.state_before.as_deref(), entry.state_after.as_deref()), (Some("in_doubt"), Some("succeeded")));
    assert!(matches!(admin.resolve(delivery, &word(None, Answer::Abandoned)).await, Err(Error::Conflict(_))));

    let (delivery, _) = doubtful(&fresh, &hand).await;
    admin.resolve(delivery, &word(None, Answer::Abandoned)).await.expect("resolve");
    let shown = admin.show(delivery).await.expect("show");
    assert_eq!(shown.row.state, State::Dead);
    assert!(shown.row.note.is_some_and(|n| n.contains("never known")));
    admin.retry(delivery, &retry(None)).await.expect("an operator may");

    let (delivery, _) = doubtful(&fresh, &hand).await;
    admin.resolve(delivery, &word(None, Answer::DidNotHappen)).await.expect("resolve");
    assert_eq!(admin.show(delivery).await.expect("show").row.state, State::Pending);
}

async fn a_taken_over_worker_is_told<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    publish(&fresh, "t", 1).await;
    let claimed = hand.claim(1).await;
    let beat = Beat { worker: hand.worker, lease: Duration::from_secs(60) };
    let pulse = hand.store().beat(beat).await.expect("beat").expect("alive");
    assert_eq!(pulse.tokens, [claimed.token]);
    assert_eq!(fresh.postbox.store().take_over(0.0).await.expect("take over"), None, "nobody is dead");
    let subscriptions = hand.subscriptions.clone();
    hand.dies(&fresh).await;
    assert_eq!(fresh.postbox.store().beat(beat).await.expect("beat"), None);
    let request = ClaimRequest {
        worker: beat.worker,
        token: Uuid::now_v7(),
        wanted: subscriptions.iter().map(|s| (*s, 9)).collect(),
        metered: Vec::new(),
        by_key: Vec::new(),
        full: Vec::new(),
        sorts: true,
    };
    let claimed = fresh.postbox.store().claim(&request).await.expect("claim");
    assert!(claimed.items.is_empty(), "who is not registered gets nothing");
    let fresh_hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    assert_eq!(fresh_hand.claim(1).await.items.len(), 1);
    let worker = fresh_hand.worker;
    let claimed = fresh_hand.store().beat(Beat { worker, lease: Duration::from_secs(60) }).await.expect("beat");
    assert_eq!(claimed.map(|p| p.tokens.len()), Some(1));
}

async fn an_unknown_claim_is_handed_back<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    publish(&fresh, "t", 2).await;
    let lost = hand.claim(2).await;
    hand.store().disown(hand.worker, Uuid::now_v7()).await.expect("a token that is none");
    hand.store().disown(hand.worker, lost.token).await.expect("disown");
    let again = hand.claim(2).await;
    assert_eq!(again.items.len(), 2);
    assert!(again.items.iter().all(|i| i.lost == 0 && i.attempts == 0));
}

async fn a_sleeper_is_woken<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    hand.store().asleep(hand.worker, true).await.expect("asleep");
    // The first rings may be of the past, and a listener may still be on its way: published until heard.
    let heard = async {
        loop {
            publish(&fresh, "t", 1).await;
            if tokio::time::timeout(Duration::from_millis(200), hand.store().woken()).await.is_ok() {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), heard).await.expect("a wake-up");
}

async fn a_rollback_leaves_nothing<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t", Kind::Plain)]).await;
    let mut tx = hand.store().begin().await.expect("begin");
    let connection = postbox::store::HandlerTx::connection(&mut tx);
    let draft = Envelope::json("t", &1).expect("a draft").dedup("k");
    fresh.postbox.publish(connection, draft.clone()).await.expect("publish");
    drop(tx);
    assert_eq!(hand.claim(10).await.items.len(), 0);
    assert_eq!(standing(&fresh).await, []);
    let published = fresh.postbox.publish_now([draft]).await.expect("publish");
    assert!(!published[0].is_duplicate(), "the key went with the rollback");
    assert_eq!(hand.claim(10).await.items.len(), 1);
}

#[test]
fn planted_bugs_are_caught() {
    postbox_testkit::planted::each_is_caught(module_path!());
}

#[tokio::test]
async fn a_promoted_standby_makes_open_operations_suspect() {
    type Pg = postbox::Postgres;
    let fresh = Pg::fresh().await;
    let subscriptions = || vec![declared("op", "t", Kind::Operation)];
    let hand = Hand::<Pg>::register(&fresh, subscriptions()).await;
    let (doubt, _) = doubtful(&fresh, &hand).await;
    publish(&fresh, "t", 2).await;
    let claimed = hand.claim(2).await;
    hand.begin(&claimed, 0, &[&claimed.items[0]]).await;
    let suspects = || async {
        let sql = format!("select count(*) from {}.observation where kind = 'suspect'", fresh.schema());
        Pg::count(&fresh, &sql).await
    };
    assert_eq!(suspects().await, 0, "the same server, the same timeline");
    let sql = format!("update {}.routing set cluster = '7/00000001'", fresh.schema());
    Pg::execute(&fresh, &sql).await;
    let _again = Hand::<Pg>::register(&fresh, subscriptions()).await;
    assert_eq!(suspects().await, 2, "the open attempt and the doubt; not what had not begun");
    let shown = fresh.postbox.admin().show(doubt).await.expect("show");
    assert!(
        shown
            .records
            .iter()
            .any(|r| r.what == "suspect" && r.detail.as_deref().is_some_and(|d| d.contains("7/00000001")))
    );
    let _once = Hand::<Pg>::register(&fresh, subscriptions()).await;
    assert_eq!(suspects().await, 2, "told once");
}

#[tokio::test]
async fn a_stricter_default_isolation_does_not_reach_the_engine() {
    let strict = "options=-c%20default_transaction_isolation%3Dserializable";
    let fresh = postbox::Postgres::fresh_with(|settings| {
        let url = settings.database_url().unwrap_or_default().to_owned();
        let joined = if url.contains('?') { '&' } else { '?' };
        settings.url(format!("{url}{joined}{strict}"))
    })
    .await;
    let level = |connection| sqlx::query_scalar::<_, String>("show transaction_isolation").fetch_one(connection);
    let mut plain = sqlx::PgConnection::connect(&fresh.url()).await.expect("connect");
    assert_eq!(level(&mut plain).await.expect("show"), "serializable", "the default is in force");
    let mut tx = fresh.postbox.store().begin().await.expect("begin");
    let own = level(postbox::store::HandlerTx::connection(&mut tx)).await.expect("show");
    assert_eq!(own, "read committed", "a takeover that locks first must see what was settled meanwhile");
}
