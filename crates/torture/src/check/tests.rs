//! A checker that cannot fail proves nothing: each lie in a history is told.

use super::honest::honest;
use super::*;
use crate::history::{Audited, Claim, Ended, Pull, Sample, Seen, Written};

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
fn i2_deliveries_of_nothing() {
    let stray = |h: &History| Delivery { id: 77, attempts: 0, ..h.deliveries[4].clone() };
    told("I2", "is of message m99, which is not there", |h| {
        h.deliveries.push(Delivery { message: "m99".into(), ..stray(h) })
    });
    told("I2", "that nobody declared", |h| h.deliveries.push(Delivery { subscription: "other".into(), ..stray(h) }));
    told("I2", "does not match note", |h| h.deliveries.push(Delivery { subscription: "late".into(), ..stray(h) }));
    told("I2", "is on the list of message m4", |h| h.messages[3].deliveries = vec![4, 5]);
}

/// Wildcards match more than one topic, and one topic more than one wildcard.
#[test]
fn a_message_for_two_subscriptions_is_none_of_those() {
    let mut history = honest();
    history.read_publisher("l intent pair.left -\nl ok\n");
    history.messages.push(Message {
        id: "m13".into(),
        topic: "pair.left".into(),
        ext: "l".into(),
        deliveries: vec![13, 14],
        ..history.messages[4].clone()
    });
    for (id, subscription) in [(13, "pair_note"), (14, "pair_project")] {
        history.deliveries.push(Delivery {
            id,
            subscription: subscription.into(),
            message: "m13".into(),
            ..history.deliveries[4].clone()
        });
        history.attempts.push(Attempt { delivery: id, ..history.attempts[6].clone() });
    }
    history.notes.push(Seen { delivery: 13, ..history.notes[3].clone() });
    history.effects.push(Seen { delivery: 14, ..history.effects[0].clone() });
    assert_eq!(check(&history), [""; 0]);
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
fn an_effect_of_another_attempt() {
    told("I4", "attempt 1 of delivery 11 (g, blind, succeeded) succeeded, and its effect", |h| h.calls[6].number = 2);
    told("I4", "attempt 3 of delivery 7 (h, repeat, succeeded) succeeded, and its", |h| h.calls[3].applied.clear());
    told("I4", "attempt 1 of delivery 2 (a/2, chain_two, succeeded) succeeded", |h| h.effects[0].number = 2);
    told("I4", "attempt 1 of delivery 5 (d, note, succeeded) succeeded", |h| h.notes[3].done = false);
    let moved = |h: &mut History| {
        let applied = std::mem::take(&mut h.calls[1].applied);
        h.calls[0].applied = applied;
    };
    told("I4", "happened, says reconcile of attempt 2, and the effect is not there of [2]", moved);
    told("I5", "attempt 1 of delivery 1 (a, chain_one, succeeded) failed", moved);
}

#[test]
fn words_that_are_not_true() {
    told("I5", "did not happen, says reconcile of attempt 2, and one of [2]", |h| {
        h.resolutions[0].answer = "did_not_happen".into();
    });
    // Whoever says it of a declared-idempotent operation says it of every attempt that nobody saw.
    told("I5", "did not happen, says operator of attempt 2, and one of [1, 2]", |h| {
        h.resolutions.push(word(7, 2, "did_not_happen"));
    });
    told("I4", "happened, says operator of attempt 1", |h| h.resolutions.push(word(6, 1, "happened")));
    told("I5", "failed late", |h| h.observations.push(late(1, 2, "failed")));
    told("I4", "succeeded late", |h| h.observations.push(late(6, 1, "succeeded")));
}

fn word(delivery: i64, number: u32, answer: &str) -> Resolved {
    let state_after = if answer == "happened" { "succeeded" } else { "dead" };
    let (answer, source, state_after) = (answer.into(), "operator".into(), state_after.into());
    Resolved { delivery, number, answer, source, state_after }
}

fn late(delivery: i64, number: u32, kind: &str) -> Observed {
    Observed { delivery, number, worker: "w".into(), kind: kind.into() }
}

/// A repeat that was given up is told of what the other one did.
#[test]
fn late_words_that_are_true() {
    let mut history = honest();
    history.observations = vec![
        late(1, 2, "succeeded"),
        late(6, 1, "failed"),
        late(7, 1, "succeeded"),
        late(7, 2, "succeeded"),
        late(5, 1, "lost"),
    ];
    assert_eq!(check(&history), [""; 0]);
}

#[test]
fn i6_a_late_end_that_left_no_trace() {
    // Paused while it called, taken over, resolved by what the remote knew, and gone on.
    let mut history = honest();
    history.attempts[1].error = "worker w1 was lost during the attempt".into();
    let end = Ended { life: "w1-3".into(), delivery: 1, number: 2, word: "succeeded".into(), lived: 8 };
    history.ends = vec![end.clone()];
    history.observations = vec![late(1, 2, "succeeded")];
    assert_eq!(check(&history), [""; 0]);
    assert!(load::seen(&history).contains(&("load:late-ends", 1)));
    // Of its own worker, and of its end; that one is thought to be lost is another's word.
    for other in [late(1, 2, "lost"), Observed { worker: "v".into(), ..late(1, 2, "succeeded") }] {
        history.observations = vec![other];
        let told = check(&history);
        assert!(told.iter().any(|line| line.starts_with("I6: ") && line.contains("no late outcome")), "{told:#?}");
    }
    // Killed soon after: it had no time to write it.
    history.ends = vec![Ended { lived: 3, ..end }];
    history.observations.clear();
    assert_eq!(check(&history), [""; 0]);
}

/// An operator gave it up and had it tried again after all; then the first call was found.
#[test]
fn what_was_abandoned_may_be_found() {
    let mut history = honest();
    history.deliveries[5] = Delivery { attempts: 2, state: "succeeded".into(), ..history.deliveries[5].clone() };
    history.attempts[7].outcome = Some("in_doubt".into());
    history.attempts.push(Attempt { number: 2, ..history.attempts[7].clone() });
    history.calls[2].applied = vec![920];
    history.calls.push(Call {
        number: 2,
        received: 990,
        over: Some(1090),
        applied: vec![],
        ..history.calls[2].clone()
    });
    history.resolutions.extend([word(6, 1, "abandoned"), word(6, 2, "happened")]);
    history.audit.push(Audited { seq: 5, action: "retry".into(), delivery: Some(6), ..Audited::default() });
    assert_eq!(check(&history), [""; 0]);
    // Without its being given up, the word is about the attempt in doubt alone.
    history.resolutions[1].answer = "did_not_happen".into();
    assert!(check(&history).iter().any(|line| line.starts_with("I4: ") && line.contains("not there of [2]")));
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
fn i6_outcomes_of_another_batch() {
    let by = |h: &History, number: u32| h.written.iter().position(|w| (w.delivery, w.number) == (5, number));
    let own = move |h: &History| by(h, 1).expect("its outcome");
    told("I6", "attempt 1 of delivery 5 (d, note, succeeded) was written by w/9, which had not claimed it", |h| {
        let at = own(h);
        h.written[at].by = Some("w/9".into());
    });
    told("I6", "was written by w/1, which had not claimed it", |h| h.claims.retain(|c| c.delivery != 5));
    told("I6", "attempt 1 of delivery 5 (d, note, succeeded) was written by nobody", |h| {
        let at = own(h);
        h.written[at].by = None;
    });
    told("I6", "has revision 6, and w/1 had claimed it at revision 1 for attempt 1", |h| {
        let at = own(h);
        h.written[at].rev = 6;
    });
    told("I6", "has revision 2, and w/1 had claimed it at revision 1 for attempt 2", |h| {
        h.claims.iter_mut().filter(|c| c.delivery == 5).for_each(|c| c.number = 2);
    });
    told("I6", "was written by w/1 and by w/3", |h| {
        h.claims.push(Claim { by: "w/3".into(), delivery: 5, rev: 1, number: 1 });
        h.written.push(Written { by: Some("w/3".into()), ..h.written[own(h)].clone() });
    });
    told("I6", "was begun by w/7, which had not claimed it", |h| h.attempts[1].begun_by = Some("w/7".into()));
    told("I6", "revision 1 of delivery 5 was claimed by w/1 and by w/3", |h| {
        h.claims.push(Claim { by: "w/3".into(), delivery: 5, rev: 1, number: 1 });
    });
    told("I6", "was claimed by w/3 at revision 9, and ended at 8", |h| {
        h.claims.push(Claim { by: "w/3".into(), delivery: 5, rev: 9, number: 2 });
    });
}

/// In SQL there is no lease, and so no claim.
#[test]
fn i6_a_pull_in_sql_is_nobodys() {
    let mut history = honest();
    history.read_publisher("l intent sql.good -\nl ok\n");
    let message =
        Message { id: "m13".into(), topic: "sql.good".into(), ext: "l".into(), ..history.messages[8].clone() };
    history.messages.push(message);
    let pulled = Delivery {
        id: 13,
        subscription: "pulled_in_sql".into(),
        message: "m13".into(),
        attempts: 1,
        ..history.deliveries[7].clone()
    };
    history.deliveries.push(pulled);
    history.attempts.push(Attempt { delivery: 13, ..history.attempts[6].clone() });
    history.effects.push(Seen { delivery: 13, number: 1, ..history.effects[1].clone() });
    history.written.push(Written { by: None, delivery: 13, number: 1, rev: 8 });
    assert_eq!(check(&history), [""; 0]);
}

#[test]
fn i6_an_operator_may() {
    let mut history = honest();
    history.samples.insert(5, vec![Sample { state: "dead".into(), rev: 2 }]);
    let retry =
        Audited { seq: 5, action: "retry".into(), delivery: Some(5), rev_before: Some(2), ..Audited::default() };
    history.audit.push(retry);
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
fn repeats_that_are_none_under_one_key() {
    told("I7", "is idempotent, and was applied 2 times", |h| h.calls[4].applied.push(1030));
    told("I7", "called under 2 keys", |h| h.calls[4].key = "other".into());
    told("I7", "share the key", |h| h.calls[6].key = "k-6".into());
    // What may have happened is not given up by itself.
    let give_up = |h: &mut History, at: u32, how: &str| {
        h.attempts.retain(|a| a.delivery != 7 || a.number <= at);
        h.deliveries[6].attempts = at;
        h.deliveries[6].state = "dead".into();
        h.attempts.iter_mut().filter(|a| a.delivery == 7 && a.number == at).for_each(|a| a.outcome = Some(how.into()));
    };
    told("I5", "ended in_doubt: no other", |h| give_up(h, 2, "in_doubt"));
    told("I5", "was given up, and attempt 1 ended lost", |h| give_up(h, 3, "failed"));
    told("I5", "and it was applied", |h| give_up(h, 3, "failed"));
    told("I7", "overlap", |h| h.deliveries[6].subscription = "charge".into());
}

#[test]
fn pulls_that_are_not_what_was_told() {
    told("I1", "was committed, and is", |h| h.attempts[12].outcome = Some("failed".into()));
    told("I1", "its effect is there: false", |h| h.effects[1].number = 1);
    told("I2", "was rolled back, and is", |h| h.effects.push(Seen { number: 1, ..h.effects[1].clone() }));
    told("I4", "attempt 2 of delivery 8 (i, pulled, succeeded) succeeded", |h| h.effects[1].number = 1);
    told("I4", "its effect is not there (2 rows)", |h| h.effects.push(h.effects[1].clone()));
    told("I4", "nobody committed it", |h| {
        h.deliveries[8].state = "succeeded".into();
        h.attempts[15].outcome = Some("succeeded".into());
        h.effects.push(Seen { delivery: 9, number: 3, ..h.effects[1].clone() });
    });
    told("I11", "given up after 2 attempts of 3", |h| {
        h.deliveries[8].attempts = 2;
        h.attempts.remove(15);
    });
    told("I11", "made 4 attempts of 3", |h| {
        h.deliveries[8].attempts = 4;
        h.attempts.push(Attempt { number: 4, ..h.attempts[15].clone() });
    });
    told("I1", "is dead", |h| h.messages[8].topic = "pull.good".into());
    told("I1", "was committed", |h| {
        let gone = Pull { delivery: 99, ..h.pulls[1].clone() };
        h.pulls.push(gone);
    });
}

#[test]
fn what_was_called_off_and_ran() {
    told("I8", "no operator's action on record", |h| h.audit[1].action = "other".into());
    told("I1", "is cancelled", |h| h.audit[1].action = "other".into());
    told("I6", "from running to cancelled", |h| h.audit[1].state_before = "running".into());
    told("I6", "from pending to in_doubt", |h| h.audit[1].state_after = "in_doubt".into());
    told("I6", "was called off, and is pending", |h| h.deliveries[9].state = "pending".into());
    told("I1", "was called off, and is nowhere", |h| h.deliveries.retain(|d| d.id != 10));
    told("I6", "ran after it was called off", |h| {
        h.deliveries[9].attempts = 1;
        h.attempts.push(Attempt { delivery: 10, started_ms: 8001, finished_ms: Some(8002), ..h.attempts[0].clone() });
    });
    told("I6", "ran long after", |h| h.notes.push(Seen { delivery: 10, clock: 20_000, ..h.notes[0].clone() }));
    told("I11", "ran as attempt 2, and counts 0", |h| {
        h.notes.push(Seen { delivery: 10, number: 2, ..h.notes[0].clone() })
    });
    told("I7", "called the remote after it was called off", |h| {
        h.calls.push(Call { delivery: 10, clock: 8001, ..h.calls[0].clone() })
    });
    told("I6", "was cancelled at revision 3", |h| {
        h.samples.insert(10, vec![Sample { state: "cancelled".into(), rev: 3 }]);
    });
    told("I8", "is not in the audit as told", |h| h.acted[0].seq = 1);
}

/// A run whose worker was lost is not counted, and the next one was called off.
#[test]
fn a_lost_run_before_a_cancel_is_none() {
    let mut history = honest();
    history.notes.push(Seen { delivery: 10, ..history.notes[0].clone() });
    assert_eq!(check(&history), [""; 0]);
}

#[test]
fn replays_that_nobody_asked_for() {
    told("I8", "is on record 0 times", |h| h.audit[3].action = "other".into());
    told("I8", "is on record 2 times", |h| h.audit.push(Audited { seq: 5, ..h.audit[3].clone() }));
    told("I8", "which is none of the same", |h| h.deliveries[11].replay_of = Some(4));
    told("I1", "which is not there as its replay", |h| h.deliveries.retain(|d| d.id != 12));
    told("I1", "2 deliveries for note", |h| h.deliveries[11].replay_of = None);
    told("I6", "replayed while it was in_doubt", |h| h.audit[2].state_before = "in_doubt".into());
    told("I7", "replayed by `replay`", |h| h.audit[2].action = "replay".into());
    told("I7", "with the reason ``", |h| h.audit[2].reason.clear());
    // Each has an effect of its own.
    told("I4", "its effect is not there", |h| h.notes.retain(|n| n.delivery != 12));
    told("I7", "applied 2 times", |h| h.calls[6].applied.push(1540));
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

#[test]
fn what_the_load_had_is_counted() {
    let seen: BTreeMap<_, _> = load::seen(&honest()).into_iter().collect();
    assert_eq!(seen["load:repeated-calls"], 2);
    assert_eq!((seen["load:pulled"], seen["load:poisoned"], seen["load:pulled-and-lost"]), (1, 1, 1));
}
