//! What the checker knows of repeats under one key, of pulling, and of what an operator calls off or
//! has replayed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::ends::late_ends;
use super::{Attempt, Behind, Checker, Delivery, Subscribed, describe, is_poison, subscribed};
use crate::history::{Audited, History};
use crate::traffic::{POISON_ATTEMPTS, PULLED, PULLED_IN_SQL};

/// A plain handler whose worker was given up may still run for as long as that is paused, waits for a
/// connection or is blocked; after this, nothing runs any more.
const LATEST_RUN_MS: i64 = 10_000;

/// Ends that leave open whether it happened.
pub(super) fn is_unseen(attempt: &Attempt) -> bool {
    matches!(attempt.outcome.as_deref(), Some("lost" | "in_doubt" | "panicked" | "timed_out"))
}

/// What a history must have had in it for its checks to mean something, and how often it had. The
/// names are the same for any history, also for an empty one.
pub(crate) fn seen(history: &History) -> Vec<(&'static str, u64)> {
    let of = |name: &str| -> HashMap<i64, &Delivery> {
        history.deliveries.iter().filter(|d| d.subscription == name).map(|d| (d.id, d)).collect()
    };
    let (repeats, pulled, in_sql) = (of("repeat"), of(PULLED), of(PULLED_IN_SQL));
    let again = history.calls.iter().filter(|c| c.number > 1 && repeats.contains_key(&c.delivery));
    let lost = |of: &HashMap<i64, &Delivery>| {
        let lost = |a: &&Attempt| a.outcome.as_deref() == Some("lost") && of.contains_key(&a.delivery);
        history.attempts.iter().filter(lost).count()
    };
    let ended = |of: &HashMap<i64, &Delivery>, state: &str| of.values().filter(|d| d.state == state).count();
    let replays = |of: &HashMap<i64, &Delivery>| of.values().filter(|d| d.replay_of.is_some()).count();
    let all = [
        ("load:repeated-calls", again.count()),
        ("load:known-at-the-remote", history.calls.iter().filter(|c| c.how.ends_with(" known")).count()),
        ("load:lost-and-repeated", lost(&repeats)),
        ("load:pulled", ended(&pulled, "succeeded")),
        ("load:pulled-and-lost", lost(&pulled)),
        ("load:poisoned", ended(&pulled, "dead")),
        ("load:pulled-in-sql", ended(&in_sql, "succeeded")),
        ("load:poisoned-in-sql", ended(&in_sql, "dead")),
        ("load:late-ends", late_ends(history).len()),
        ("load:pulled-replays", replays(&pulled) + replays(&in_sql)),
    ];
    all.into_iter().map(|(what, times)| (what, times as u64)).collect()
}

impl<'a> Checker<'a> {
    pub(super) fn told_of(&self, delivery: &Delivery) -> String {
        describe(delivery, self.messages.get(delivery.message.as_str()).copied())
    }

    pub(super) fn by_id(&self) -> HashMap<i64, &'a Delivery> {
        self.history.deliveries.iter().map(|d| (d.id, d)).collect()
    }

    pub(super) fn is_poisoned(&self, delivery: &Delivery) -> bool {
        self.messages.get(delivery.message.as_str()).is_some_and(|m| is_poison(&m.topic))
    }

    /// It is cancelled, and an operator's action on record made it so.
    pub(super) fn was_called_off(&self, delivery: &Delivery) -> bool {
        let cancelled = |entry: &Audited| {
            entry.action == "cancel"
                && entry.delivery == Some(delivery.id)
                && entry.state_after == "cancelled"
                && entry.rev_after == Some(delivery.rev)
        };
        delivery.state == "cancelled" && self.history.audit.iter().any(cancelled)
    }

    pub(super) fn is_idempotent(&self, delivery: i64) -> bool {
        self.idempotent.contains(&delivery)
    }

    /// Of a declared-idempotent operation, any attempt may be the one that did it.
    pub(super) fn may_have_done(&self, behind: &Subscribed, attempts: &[&Attempt]) -> bool {
        behind.kind == Behind::Idempotent && attempts.iter().any(|a| is_unseen(a))
    }

    /// D5, I5, I7: calls are repeated under one key and applied once; what may have happened is tried
    /// again, or put before somebody, and never given up by itself.
    pub(super) fn repeats(&mut self) {
        for delivery in &self.history.deliveries {
            if !self.is_idempotent(delivery.id) {
                continue;
            }
            let told = self.told_of(delivery);
            let applied = self.applied(delivery.id);
            if applied > 1 {
                self.broken("I7", format!("{told} is idempotent, and was applied {applied} times"));
            }
            let attempts = self.attempts.get(&delivery.id).cloned().unwrap_or_default();
            let words = self.resolutions.get(&delivery.id).cloned().unwrap_or_default();
            let last = attempts.last().map_or(0, |a| a.number);
            for attempt in attempts.iter().filter(|a| is_unseen(a)) {
                let (number, how) = (attempt.number, attempt.outcome.as_deref().unwrap_or_default());
                let word = words.iter().any(|w| w.number >= number);
                if number == last && !word {
                    self.broken("I5", format!("attempt {number} of {told} ended {how}: no other, and nobody's word"));
                } else if delivery.state != "succeeded" && !word {
                    self.broken("I5", format!("{told} was given up, and attempt {number} ended {how}: nobody's word"));
                }
            }
        }
    }

    /// I7: a delivery calls under one key, and no two deliveries, of which one may be a replay, share one.
    pub(super) fn keys(&mut self) {
        let mut keys: BTreeMap<i64, BTreeSet<&str>> = BTreeMap::new();
        let mut owners: BTreeMap<&str, BTreeSet<i64>> = BTreeMap::new();
        for call in &self.history.calls {
            keys.entry(call.delivery).or_default().insert(&call.key);
            owners.entry(&call.key).or_default().insert(call.delivery);
        }
        for (delivery, keys) in keys.iter().filter(|(_, keys)| keys.len() > 1) {
            self.broken("I7", format!("delivery {delivery} called under {} keys", keys.len()));
        }
        for (key, owners) in owners.iter().filter(|(_, owners)| owners.len() > 1) {
            self.broken("I7", format!("deliveries {owners:?} share the key {key}"));
        }
    }

    /// I1, I2, I4, I11 for those who pull: what they committed is there, once, and what they rolled back
    /// is not; what nobody can handle gets its attempts, and is dead then.
    pub(super) fn pulls(&mut self) {
        let committed: HashSet<(i64, u32)> = self.history.effects.iter().map(|e| (e.delivery, e.number)).collect();
        let deliveries = self.by_id();
        let outcome = |checker: &Self, delivery: i64, number: u32| {
            let attempts = checker.attempts.get(&delivery);
            attempts.and_then(|all| all.iter().find(|a| a.number == number)?.outcome.clone())
        };
        for pull in &self.history.pulls {
            let what =
                format!("attempt {} of delivery {} ({}, {})", pull.number, pull.delivery, pull.ext, pull.subscription);
            let there = committed.contains(&(pull.delivery, pull.number));
            let outcome = outcome(self, pull.delivery, pull.number);
            let succeeded = outcome.as_deref() == Some("succeeded");
            match pull.told.as_str() {
                "ok" if !there || !succeeded => {
                    self.broken(
                        "I1",
                        format!("{what} was committed, and is {outcome:?}; its effect is there: {there}"),
                    );
                }
                // In SQL a rollback is no attempt: another one may have the number.
                "fail" if pull.subscription == PULLED && (there || succeeded) => {
                    self.broken(
                        "I2",
                        format!("{what} was rolled back, and is {outcome:?}; its effect is there: {there}"),
                    );
                }
                _ => {}
            }
        }
        for delivery in deliveries.values() {
            if subscribed(&delivery.subscription).is_none_or(|s| s.kind != Behind::Pulled) {
                continue;
            }
            let told = self.told_of(delivery);
            let attempts = self.attempts.get(&delivery.id).cloned().unwrap_or_default();
            if self.is_poisoned(delivery) {
                if delivery.state == "succeeded" {
                    self.broken("I4", format!("{told} succeeded, and nobody committed it"));
                }
                if delivery.state == "dead" && (attempts.len() as u32) < POISON_ATTEMPTS {
                    let made = attempts.len();
                    self.broken("I11", format!("{told} was given up after {made} attempts of {POISON_ATTEMPTS}"));
                }
            }
        }
    }

    /// I6, I7, I8: what is cancelled was called off on record, from where that is allowed, and did not
    /// run again.
    pub(super) fn cancels(&mut self) {
        let deliveries = self.by_id();
        for delivery in deliveries.values().filter(|d| d.state == "cancelled") {
            if !self.was_called_off(delivery) {
                let told = self.told_of(delivery);
                self.broken("I8", format!("{told} at revision {}: no operator's action on record", delivery.rev));
            }
        }
        let audit = &self.history.audit;
        for entry in audit.iter().filter(|a| a.action == "cancel") {
            let id = entry.delivery.unwrap_or_default();
            let Some(delivery) = deliveries.get(&id) else {
                // Tried again after all, done, and removed with its history.
                if self.fleeting_deliveries.contains(&id) {
                    continue;
                }
                self.broken("I1", format!("delivery {id} was called off, and is nowhere"));
                continue;
            };
            let told = self.told_of(delivery);
            let doubt = entry.state_before == "pending" && entry.state_after == "in_doubt" && self.is_idempotent(id);
            if !["pending", "dead"].contains(&entry.state_before.as_str())
                || (entry.state_after != "cancelled" && !doubt)
            {
                let (from, to) = (&entry.state_before, &entry.state_after);
                self.broken("I6", format!("{told} was called off from {from} to {to}"));
            }
            let revived = audit.iter().any(|a| a.action == "retry" && a.delivery == Some(id) && a.seq > entry.seq);
            if entry.state_after != "cancelled" || revived {
                continue;
            }
            if delivery.state != "cancelled" || Some(delivery.rev) != entry.rev_after {
                let (state, rev) = (&delivery.state, delivery.rev);
                self.broken("I6", format!("{told} was called off, and is {state} at revision {rev}"));
            }
            let attempts = self.attempts.get(&id).cloned().unwrap_or_default();
            let late = |a: &&&Attempt| a.started_ms.max(a.finished_ms.unwrap_or_default()) > entry.at_ms;
            if let Some(attempt) = attempts.iter().find(late) {
                self.broken("I6", format!("attempt {} of {told} ran after it was called off", attempt.number));
            }
            if self.calls.get(&id).into_iter().flatten().any(|c| c.clock > entry.at_ms) {
                self.broken("I7", format!("{told} called the remote after it was called off"));
            }
            let notes = self.history.notes.iter().filter(|n| n.delivery == id);
            if notes.map(|n| n.clock).max().is_some_and(|last| last > entry.at_ms + LATEST_RUN_MS) {
                self.broken("I6", format!("{told} ran long after it was called off"));
            }
        }
    }

    /// D7, I7, I8: a replay is a new delivery of what had ended, linked to it and asked for on record.
    pub(super) fn replays(&mut self) {
        let deliveries = self.by_id();
        let mut asked: BTreeMap<i64, Vec<&Audited>> = BTreeMap::new();
        for entry in self.history.audit.iter().filter(|a| ["replay", "replay: irreversible"].contains(&&*a.action)) {
            let (old, new) = (entry.delivery.unwrap_or_default(), entry.replayed_as.unwrap_or_default());
            asked.entry(new).or_default().push(entry);
            if deliveries.get(&new).is_none_or(|d| d.replay_of != Some(old)) {
                self.broken("I1", format!("delivery {old} was replayed as {new}, which is not there as its replay"));
            }
            if !["succeeded", "dead", "cancelled"].contains(&entry.state_before.as_str()) {
                self.broken("I6", format!("delivery {old} was replayed while it was {}", entry.state_before));
            }
        }
        for delivery in &self.history.deliveries {
            let Some(old) = delivery.replay_of else { continue };
            let told = self.told_of(delivery);
            let same = |d: &&Delivery| d.message == delivery.message && d.subscription == delivery.subscription;
            if !deliveries.get(&old).is_some_and(same) {
                self.broken("I8", format!("{told} is a replay of {old}, which is none of the same"));
            }
            let [entry] = asked.get(&delivery.id).map_or(&[][..], Vec::as_slice) else {
                let times = asked.get(&delivery.id).map_or(0, Vec::len);
                self.broken("I8", format!("{told} is a replay that is on record {times} times"));
                continue;
            };
            let calls = subscribed(&delivery.subscription).is_some_and(|s| s.kind.calls());
            let meant = entry.action == "replay: irreversible" && !entry.reason.trim().is_empty();
            if calls != meant {
                let (action, reason) = (&entry.action, &entry.reason);
                self.broken("I7", format!("{told} was replayed by `{action}` with the reason `{reason}`"));
            }
        }
    }

    /// I8: what the operator was told is done stands in the audit under its number.
    pub(super) fn acted(&mut self) {
        for acted in &self.history.acted {
            let same =
                |a: &&Audited| a.seq == acted.seq && a.action == acted.action && a.delivery == Some(acted.delivery);
            if !self.history.audit.iter().any(|a| same(&a)) {
                let (seq, action, delivery) = (acted.seq, &acted.action, acted.delivery);
                self.broken("I8", format!("entry {seq}, {action} of delivery {delivery}, is not in the audit as told"));
            }
        }
    }
}
