//! A checker that cannot fail proves nothing: each lie in a history is told.

use super::*;
use crate::history::{Audited, Sample, Seen};

/// What happened, and was put on record as it happened: an operation that was in doubt, found and
/// followed up; a transactional handler; a delayed plain one; a crowd with one dedup key; a rollback.
fn honest() -> History {
    let mut history = History::default();
    history.read_publisher(
        "a intent chain.one business\na ok\nb intent late -\nb unknown\nd intent note dedup\nd ok x\nd duplicate x\n\
         d conflict y\nr intent note business\nr fail\nu intent note -\nu unknown\ng intent blind -\ng ok\n",
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
    ];
    let delivery = |id: i64, subscription: &str, attempts: u32, state: &str| Delivery {
        id,
        state: state.into(),
        subscription: subscription.into(),
        message: format!("m{id}"),
        attempts,
        rev: 4,
        note: String::new(),
    };
    history.deliveries = vec![
        delivery(1, "chain_one", 2, "succeeded"),
        delivery(2, "chain_two", 1, "succeeded"),
        delivery(3, "chain_three", 1, "succeeded"),
        delivery(4, "late", 2, "succeeded"),
        delivery(5, "note", 1, "succeeded"),
        delivery(6, "blind", 1, "dead"),
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
        Attempt { begun_by: Some("w/1".into()), ended_by: Some("w/1".into()), ..attempt(1, 2, "in_doubt") },
        attempt(2, 1, "succeeded"),
        attempt(3, 1, "succeeded"),
        Attempt { error: format!("come back in {LATER} ms"), ..attempt(4, 1, "failed") },
        attempt(4, 2, "succeeded"),
        attempt(5, 1, "succeeded"),
        attempt(6, 1, "failed"),
    ];
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
    let seen =
        |delivery: i64, number: u32, clock: i64| Seen { ext: String::new(), delivery, number, clock, done: true };
    history.notes = vec![seen(3, 1, 6000), seen(4, 1, 6000), seen(4, 2, 7000 + LATER as i64), seen(5, 1, 6000)];
    history.effects = vec![seen(2, 1, 6000)];
    history.audit = vec![Audited { seq: 1, action: "resolve refused".into(), delivery: Some(6), rev_before: None }];
    history.samples = BTreeMap::from([(2, vec![Sample { state: "succeeded".into(), rev: 4 }])]);
    history
}

#[test]
fn what_was_kept_is_not_told() {
    assert_eq!(check(&honest()), [""; 0]);
}

/// Falsifies one thing; the line that tells it begins like this.
#[track_caller]
fn told(invariant: &str, words: &str, falsify: impl FnOnce(&mut History)) {
    let mut history = honest();
    falsify(&mut history);
    let told = check(&history);
    let found = told.iter().any(|line| line.starts_with(&format!("{invariant}: ")) && line.contains(words));
    assert!(found, "{invariant} with `{words}` is not among {told:#?}");
}

#[test]
fn i1_what_was_published_is_gone() {
    told("I1", "and is not there", |h| h.messages.retain(|m| m.ext != "d"));
    told("I1", "no delivery for note", |h| h.deliveries.retain(|d| d.id != 5));
    told("I1", "2 deliveries for note", |h| h.deliveries.push(Delivery { id: 9, ..h.deliveries[4].clone() }));
    told("I1", "is nowhere", |h| h.messages[4].deliveries.push(99));
    told("I1", "not at an end", |h| h.deliveries[3].state = "pending".into());
    told("I1", "not at an end", |h| h.deliveries[5].state = "in_doubt".into());
    told("I1", "is dead", |h| {
        h.deliveries[4].state = "dead".into();
        h.attempts[6].outcome = Some("failed".into());
    });
    told("I1", "no message", |h| h.business.push("r".into()));
}

#[test]
fn i2_what_was_rolled_back_is_there() {
    let phantom = |h: &mut History| {
        h.messages.push(Message { id: "m7".into(), ext: "r".into(), topic: "none".into(), ..h.messages[0].clone() });
    };
    told("I2", "was rolled back", phantom);
    told("I2", "and no business row", phantom);
    told("I2", "nobody published it", |h| h.messages[3].ext = "x".into());
    told("I2", "2 times", |h| h.messages.push(h.messages[3].clone()));
    told("I2", "and is not there", |h| {
        h.notes.push(Seen { ext: "z".into(), delivery: 77, number: 1, clock: 1, done: true })
    });
}

#[test]
fn i3_a_call_before_its_record() {
    told("I3", "before it was on record", |h| h.calls[1].unrecorded = true);
}

#[test]
fn i4_a_success_that_is_none() {
    told("I4", "1 succeeded attempts and 1 resolutions", |h| h.attempts[0].outcome = Some("succeeded".into()));
    told("I4", "0 succeeded attempts", |h| h.resolutions.clear());
    told("I4", "effect is not there", |h| h.calls[1].applied.clear());
    told("I4", "effect is not there", |h| h.effects.clear());
    told("I4", "effect is not there (2 rows)", |h| h.effects.push(h.effects[0].clone()));
    told("I4", "effect is not there", |h| h.notes.retain(|n| n.delivery != 5));
    told("I4", "has succeeded before", |h| h.deliveries[4].state = "dead".into());
    told("I4", "follow-ups", |h| h.messages.retain(|m| m.ext != "a/2/3"));
    told("I4", "follow-ups", |h| h.messages.push(h.messages[1].clone()));
    told("I4", "not in doubt", |h| h.attempts[1].outcome = Some("failed".into()));
}

#[test]
fn i5_a_failure_that_was_done() {
    told("I5", "and was applied", |h| h.calls[2].applied.push(950));
    told("I5", "and it was applied", |h| h.calls[2].applied.push(950));
    told("I5", "is open", |h| h.attempts[7].outcome = None);
    told("I5", "not put in doubt", |h| h.attempts[7].outcome = Some("lost".into()));
}

#[test]
fn i6_a_write_without_the_lease() {
    told("I6", "written by other", |h| h.attempts[1].ended_by = Some("other/2".into()));
    told("I6", "in 2 places", |h| h.deliveries.push(h.deliveries[0].clone()));
    told("I6", "after its success", |h| h.attempts[4].outcome = Some("succeeded".into()));
    told("I6", "was dead at revision 2", |h| {
        h.samples.insert(5, vec![Sample { state: "dead".into(), rev: 2 }]);
    });
    told("I6", "was succeeded at revision 3", |h| {
        h.samples.insert(2, vec![Sample { state: "succeeded".into(), rev: 3 }]);
    });
}

#[test]
fn i6_an_operator_may() {
    let mut history = honest();
    history.samples.insert(5, vec![Sample { state: "dead".into(), rev: 2 }]);
    history.audit.push(Audited { seq: 2, action: "retry".into(), delivery: Some(5), rev_before: Some(2) });
    assert_eq!(check(&history), [""; 0]);
}

#[test]
fn i7_calls_that_overlap_or_repeat() {
    told("I7", "overlap", |h| h.calls[0].over = Some(310));
    told("I7", "overlap", |h| h.calls[0].over = None);
    told("I7", "more than once", |h| h.calls[1].number = 1);
    told("I7", "applied 2 times", |h| h.calls[0].applied.push(120));
}

#[test]
fn i8_a_gap_in_the_audit() {
    told("I8", "gap", |h| h.audit[0].seq = 2);
}

#[test]
fn i10_one_id_twice() {
    told("I10", "there 2 times", |h| h.messages.push(h.messages[4].clone()));
    told("I10", "more than one publisher", |h| h.publishes.get_mut("d").expect("d").told[1].0 = "ok".into());
    told("I10", "told duplicate", |h| h.publishes.get_mut("d").expect("d").told[1].1 = "y".into());
    told("I10", "told conflict", |h| h.publishes.get_mut("d").expect("d").told[2].1 = "x".into());
}

#[test]
fn i11_attempts_that_do_not_add_up() {
    told("I11", "has attempts", |h| h.attempts[1].number = 3);
    told("I11", "counts 5 attempts", |h| h.deliveries[0].attempts = 5);
    told("I11", "ran as attempt 2", |h| h.notes[3].number = 2);
    told("I11", "of 4", |h| {
        for number in 2..=5 {
            h.attempts.push(Attempt { number, ..h.attempts[7].clone() });
        }
    });
}

#[test]
fn i13_too_early() {
    told("I13", "before its due time", |h| h.messages[3].due_ms = Some(6001));
    told("I13", "before its retry was due", |h| h.notes[2].clock = 7100);
}

#[test]
fn i14_what_is_left() {
    told("I14", "a lease", |h| h.leftovers.push("a lease is left".into()));
}

#[test]
fn many_lines_are_cut_short() {
    let mut history = honest();
    history.leftovers = (0..30).map(|n| n.to_string()).collect();
    assert!(check(&history).iter().any(|line| line == "I14: and 20 more"));
}
