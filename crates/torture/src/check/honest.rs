//! A history in which everything was kept: what the tests falsify.

use std::collections::BTreeMap;

use crate::check::LATER;
use crate::history::{
    Acted, Attempt, Audited, Call, Claim, Delivery, History, Message, Resolved, Sample, Seen, Written,
};

/// What happened, and was put on record as it happened: an operation that was in doubt, found and
/// followed up; a transactional handler; a delayed plain one; a crowd with one dedup key; a rollback;
/// an idempotent operation that called three times; one that was pulled again after a rollback, and one
/// that nobody could handle; one that was called off; and two replays, one of an operation.
pub(super) fn honest() -> History {
    let mut history = History::default();
    history.read_publisher(
        "a intent chain.one business\na ok\nb intent late -\nb unknown\nd intent note dedup\nd ok x\nd duplicate x\n\
         d conflict y\nr intent note business\nr fail\nu intent note -\nu unknown\ng intent blind -\ng ok\n\
         h intent repeat -\nh ok\ni intent pull.good -\ni ok\nj intent pull.poison -\nj ok\nk intent note -\nk ok\n",
    );
    history.business = vec!["a".into()];
    let message = |id: &str, topic: &str, ext: &str| Message {
        id: id.into(),
        topic: topic.into(),
        ext: ext.into(),
        due_ms: None,
        body: None,
        deliveries: Vec::new(),
    };
    history.messages = vec![
        message("m1", "chain.one", "a"),
        message("m2", "chain.two", "a/2"),
        message("m3", "chain.three", "a/2/3"),
        Message { due_ms: Some(5000), ..message("m4", "late", "b") },
        Message { body: Some("x".into()), deliveries: vec![5], ..message("m5", "note", "d") },
        message("m6", "blind", "g"),
        message("m7", "repeat", "h"),
        message("m8", "pull.good", "i"),
        message("m9", "pull.poison", "j"),
        message("m10", "note", "k"),
    ];
    let delivery = |id: i64, subscription: &str, attempts: u32, state: &str| Delivery {
        id,
        state: state.into(),
        subscription: subscription.into(),
        message: format!("m{id}"),
        attempts,
        rev: 8,
        note: String::new(),
        replay_of: None,
    };
    let replay = |of: i64, again: Delivery| Delivery { message: format!("m{of}"), replay_of: Some(of), ..again };
    history.deliveries = vec![
        delivery(1, "chain_one", 2, "succeeded"),
        delivery(2, "chain_two", 1, "succeeded"),
        delivery(3, "chain_three", 1, "succeeded"),
        delivery(4, "late", 2, "succeeded"),
        delivery(5, "note", 1, "succeeded"),
        delivery(6, "blind", 1, "dead"),
        delivery(7, "repeat", 3, "succeeded"),
        delivery(8, "pulled", 2, "succeeded"),
        delivery(9, "pulled", 3, "dead"),
        delivery(10, "note", 0, "cancelled"),
        replay(6, delivery(11, "blind", 1, "succeeded")),
        replay(5, delivery(12, "note", 1, "succeeded")),
    ];
    let attempt = |delivery: i64, number: u32, outcome: &str| Attempt {
        delivery,
        number,
        outcome: Some(outcome.into()),
        started_ms: 6000,
        finished_ms: Some(7000),
        error: String::new(),
        begun_by: None,
        ended_by: None,
    };
    history.attempts = vec![
        attempt(1, 1, "failed"),
        Attempt { begun_by: Some("w/2".into()), ended_by: Some("w/2".into()), ..attempt(1, 2, "in_doubt") },
        attempt(2, 1, "succeeded"),
        attempt(3, 1, "succeeded"),
        Attempt { error: format!("come back in {LATER} ms"), ..attempt(4, 1, "failed") },
        attempt(4, 2, "succeeded"),
        attempt(5, 1, "succeeded"),
        attempt(6, 1, "failed"),
        attempt(7, 1, "lost"),
        attempt(7, 2, "in_doubt"),
        attempt(7, 3, "succeeded"),
        attempt(8, 1, "failed"),
        attempt(8, 2, "succeeded"),
        attempt(9, 1, "failed"),
        attempt(9, 2, "lost"),
        attempt(9, 3, "failed"),
        attempt(11, 1, "succeeded"),
        attempt(12, 1, "succeeded"),
    ];
    // Each attempt was claimed, by a batch for all that came to as many, and its outcome written by that.
    for Attempt { delivery, number, .. } in history.attempts.clone() {
        let (by, rev) = (format!("w/{number}"), i64::from(number) * 2 - 1);
        history.written.push(Written { by: Some(by.clone()), delivery, number, rev: rev + 1 });
        history.claims.push(Claim { by, delivery, rev, number });
    }
    // And this one was handed back before it was called off.
    history.claims.push(Claim { by: "w/1".into(), delivery: 10, rev: 1, number: 1 });
    history.resolutions = vec![Resolved {
        delivery: 1,
        number: 2,
        answer: "happened".into(),
        source: "reconcile".into(),
        state_after: "succeeded".into(),
    }];
    let call = |delivery: i64, number: u32, received: u64, applied: Vec<u64>| Call {
        ext: "a".into(),
        key: format!("k-{delivery}"),
        delivery,
        number,
        received,
        over: Some(received + 50),
        applied,
        unrecorded: false,
        clock: 6000,
        how: "Answer".into(),
    };
    history.calls = vec![call(1, 1, 100, vec![]), call(1, 2, 300, vec![320]), call(6, 1, 900, vec![])];
    // The second one comes while the first, whose worker was given up, is still there.
    history.calls.extend([call(7, 1, 1000, vec![1010]), call(7, 2, 1020, vec![]), call(7, 3, 1200, vec![])]);
    history.calls.push(call(11, 1, 1500, vec![1520]));
    let seen =
        |delivery: i64, number: u32, clock: i64| Seen { ext: String::new(), delivery, number, clock, done: true };
    // It was told to come later, the first time.
    let later = Seen { done: false, ..seen(4, 1, 6000) };
    history.notes = vec![seen(3, 1, 6000), later, seen(4, 2, 7000 + LATER as i64), seen(5, 1, 6000)];
    history.notes.push(seen(12, 1, 6000));
    history.effects = vec![seen(2, 1, 6000), seen(8, 2, 6000)];
    history.read_puller("pulled i 8 1 fail\npulled i 8 2 ok\npulled j 9 1 fail\n");
    let entry = |seq: i64, action: &str, delivery: i64, state: &str| Audited {
        seq,
        action: action.into(),
        delivery: Some(delivery),
        state_before: state.into(),
        state_after: state.into(),
        at_ms: 8000,
        reason: "it is wanted twice".into(),
        ..Audited::default()
    };
    history.audit = vec![
        entry(1, "resolve refused", 6, "dead"),
        Audited { state_after: "cancelled".into(), rev_after: Some(8), ..entry(2, "cancel", 10, "pending") },
        Audited { replayed_as: Some(11), ..entry(3, "replay: irreversible", 6, "dead") },
        Audited { replayed_as: Some(12), ..entry(4, "replay", 5, "succeeded") },
    ];
    history.acted = vec![Acted { seq: 2, action: "cancel".into(), delivery: 10 }];
    history.samples = BTreeMap::from([(2, vec![Sample { state: "succeeded".into(), rev: 8 }])]);
    history
}
