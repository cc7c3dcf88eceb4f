//! What the remote saw of deliveries in order, and whether they were.

use std::collections::BTreeMap;

use crate::scenario::crew::Stop;
use crate::scenario::limits::check::{Pass, passes};

/// A call for a step of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) step: usize,
    pub(crate) pass: Pass,
}

/// The calls of each key, in the order in which they came.
pub(crate) fn calls(log: &str) -> BTreeMap<String, Vec<Call>> {
    let mut calls: BTreeMap<String, Vec<Call>> = BTreeMap::new();
    for pass in passes(log) {
        let Some((key, step)) = pass.what.split_once(':') else { continue };
        let (key, Ok(step)) = (key.to_owned(), step.parse()) else { continue };
        calls.entry(key).or_default().push(Call { step, pass });
    }
    calls
}

/// How many came again.
pub(crate) fn repeated(calls: &[Call]) -> usize {
    let mut steps: Vec<usize> = calls.iter().map(|call| call.step).collect();
    steps.sort_unstable();
    steps.dedup();
    calls.len() - steps.len()
}

/// Its process was stopped while it was on its way: it may come beside those of the heir, and after them.
fn was_stopped(call: &Call, stops: &[Stop]) -> bool {
    let end = call.pass.left.unwrap_or(u64::MAX);
    stops.iter().any(|stop| stop.pid == call.pass.process && call.pass.begun <= stop.to && end >= stop.from)
}

/// When nobody waits for its answer any more: its caller has it, or is gone.
fn end(call: &Call) -> u64 {
    let [left, gone] = [call.pass.left, call.pass.gone].map(|time| time.unwrap_or(u64::MAX));
    left.min(gone)
}

/// What is wrong with the calls of one key, of which so many steps were published one after the other.
///
/// Each step comes after the one before, or again, or it goes back to one that was not on record when a worker died,
/// and goes on from there. None comes before the one before it has ended.
pub(crate) fn judge(key: &str, calls: &[Call], steps: usize, stops: &[Stop]) -> Vec<String> {
    let mut broken = Vec::new();
    let mut before: Option<&Call> = None;
    for call in calls.iter().filter(|call| !was_stopped(call, stops)) {
        let last = before.map_or(0, |before| before.step);
        if call.step > last + 1 && !reached(calls, call, stops) {
            broken.push(format!("order: {key}: step {} came after step {last} at {}", call.step, call.pass.came));
        }
        if let Some(before) = before
            && end(before) > call.pass.came
        {
            broken.push(format!(
                "order: {key}: step {} came at {} while step {last} was in progress until {}",
                call.step,
                call.pass.came,
                end(before)
            ));
        }
        before = Some(call);
    }
    let seen: std::collections::BTreeSet<usize> = calls.iter().map(|call| call.step).collect();
    if let Some(missing) = (1..=steps).find(|step| !seen.contains(step)) {
        broken.push(format!("order: {key}: step {missing} of {steps} never came"));
    }
    broken.truncate(3);
    broken
}

/// The step before was called by a process that was stopped then: it has come, and is not looked at.
fn reached(calls: &[Call], call: &Call, stops: &[Stop]) -> bool {
    let earlier = calls.iter().take_while(|other| *other != call);
    earlier.filter(|other| was_stopped(other, stops)).any(|other| other.step + 1 == call.step)
}

/// How many different keys were in progress at once at the most.
pub(crate) fn side_by_side(calls: &BTreeMap<String, Vec<Call>>) -> usize {
    let all = calls.values().flatten();
    let mut changes: Vec<(u64, i64)> = all.flat_map(|call| [(call.pass.came, 1), (end(call), -1)]).collect();
    changes.sort_unstable();
    let (mut now, mut most) = (0, 0);
    for (_, change) in changes {
        now += change;
        most = most.max(now);
    }
    most as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(step: usize, came: u64, left: u64) -> Call {
        let what = format!("key:{step}");
        let pass = Pass { what, delivery: step as i64, process: 1, begun: came, came, gone: None, left: Some(left) };
        Call { step, pass }
    }

    fn said(calls: &[Call], stops: &[Stop]) -> String {
        judge("key", calls, 3, stops).join("; ")
    }

    #[test]
    fn an_order_that_is_kept() {
        let again =
            [call(1, 10, 19), call(2, 20, 29), call(2, 30, 39), call(1, 40, 49), call(2, 50, 59), call(3, 60, 69)];
        assert_eq!(said(&again, &[]), "");
        assert_eq!(repeated(&again), 3);
    }

    #[test]
    fn an_order_that_is_not_kept_is_seen() {
        assert!(said(&[call(1, 10, 19), call(3, 20, 29), call(2, 30, 39)], &[]).contains("step 3 came after step 1"));
        assert!(said(&[call(1, 10, 25), call(2, 20, 29), call(3, 30, 39)], &[]).contains("while step 1"));
        assert!(said(&[call(1, 10, 19), call(2, 20, 29)], &[]).contains("step 3 of 3 never came"));
        // Back, and on with another one than the next.
        let jumps = [call(1, 10, 19), call(2, 20, 29), call(1, 30, 39), call(3, 40, 49)];
        assert!(said(&jumps, &[]).contains("step 3 came after step 1"));
    }

    #[test]
    fn who_was_stopped_may_come_late() {
        let stop = Stop { pid: 1, from: 15, to: 35 };
        let heir = |step, came| Call { pass: Pass { process: 2, ..call(step, came, came + 3).pass }, step };
        let calls = [call(1, 10, 40), heir(1, 20), heir(2, 25), heir(3, 30)];
        assert_eq!(said(&calls, &[stop]), "");
    }
}
