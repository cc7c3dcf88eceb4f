//! The checker: a history in, what was broken out. It knows no database and no clock.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use crate::child::handlers::LATER;
use crate::history::{Attempt, Call, Delivery, History, Message, Observed, Resolved};
use crate::traffic::{Behind, FLEETING, Subscribed, follows, is_poison, most_attempts, subscribed};

mod claims;
mod ends;
mod fan_out;
#[cfg(test)]
mod honest;
pub(crate) mod load;

/// The most lines for one invariant: the first tell enough.
const MOST: usize = 10;

/// What was broken, a line each, beginning with the invariant.
pub(crate) fn check(history: &History) -> Vec<String> {
    let mut checker = Checker::new(history);
    checker.publishes();
    checker.fan_out();
    checker.strangers();
    checker.deliveries();
    checker.attempts();
    checker.ends();
    checker.late_ends();
    checker.claims();
    checker.calls();
    checker.due_times();
    checker.end_states();
    checker.audit();
    checker.repeats();
    checker.keys();
    checker.pulls();
    checker.cancels();
    checker.replays();
    checker.acted();
    for left in &history.leftovers {
        checker.broken("I14", left);
    }
    checker.told()
}

/// The history, by what one looks for.
struct Checker<'a> {
    history: &'a History,
    by_ext: HashMap<&'a str, Vec<&'a Message>>,
    messages: HashMap<&'a str, &'a Message>,
    attempts: HashMap<i64, Vec<&'a Attempt>>,
    resolutions: HashMap<i64, Vec<&'a Resolved>>,
    calls: HashMap<i64, Vec<&'a Call>>,
    observed: HashMap<i64, Vec<&'a Observed>>,
    notes: HashMap<i64, Vec<u32>>,
    effects: HashMap<i64, Vec<u32>>,
    /// What retention may have removed: handled, and of a topic whose history is not kept.
    fleeting: HashSet<&'a str>,
    fleeting_deliveries: HashSet<i64>,
    /// Recorded retries by an operator, per delivery.
    retries: HashMap<i64, u32>,
    /// Successes that something follows from, by external id: replays are successes of their own.
    done: HashMap<&'a str, usize>,
    /// Deliveries of operations that were declared idempotent.
    idempotent: HashSet<i64>,
    broken: BTreeMap<&'static str, Vec<String>>,
}

fn grouped<K: std::hash::Hash + Eq, V>(items: impl Iterator<Item = (K, V)>) -> HashMap<K, Vec<V>> {
    let mut groups: HashMap<K, Vec<V>> = HashMap::new();
    for (key, value) in items {
        groups.entry(key).or_default().push(value);
    }
    groups
}

impl<'a> Checker<'a> {
    fn new(history: &'a History) -> Self {
        let mut attempts = grouped(history.attempts.iter().map(|a| (a.delivery, a)));
        for list in attempts.values_mut() {
            list.sort_by_key(|a: &&Attempt| a.number);
        }
        let mut retries: HashMap<i64, u32> = HashMap::new();
        for entry in history.audit.iter().filter(|a| a.action == "retry") {
            *retries.entry(entry.delivery.unwrap_or_default()).or_default() += 1;
        }
        let brief = |ext: &str| history.publishes.get(ext).is_some_and(|p| p.topic == FLEETING);
        // Removed only when it was done: what was tried and put off is unfinished.
        let done: Vec<_> = history.notes.iter().filter(|n| n.done && brief(&n.ext)).collect();
        let messages: HashMap<_, _> = history.messages.iter().map(|m| (m.id.as_str(), m)).collect();
        let mut successes: HashMap<&str, usize> = HashMap::new();
        for delivery in history.deliveries.iter().filter(|d| d.state == "succeeded") {
            if let Some(message) = messages.get(delivery.message.as_str()) {
                *successes.entry(&message.ext).or_default() += 1;
            }
        }
        Checker {
            history,
            done: successes,
            idempotent: (history.deliveries.iter())
                .filter(|d| subscribed(&d.subscription).is_some_and(|s| s.kind == Behind::Idempotent))
                .map(|d| d.id)
                .collect(),
            fleeting: done.iter().map(|n| n.ext.as_str()).collect(),
            fleeting_deliveries: done.iter().map(|n| n.delivery).collect(),
            by_ext: grouped(history.messages.iter().map(|m| (m.ext.as_str(), m))),
            messages,
            attempts,
            resolutions: grouped(history.resolutions.iter().map(|r| (r.delivery, r))),
            calls: grouped(history.calls.iter().map(|c| (c.delivery, c))),
            observed: grouped(history.observations.iter().map(|o| (o.delivery, o))),
            notes: grouped(history.notes.iter().map(|n| (n.delivery, n.number))),
            effects: grouped(history.effects.iter().map(|e| (e.delivery, e.number))),
            retries,
            broken: BTreeMap::new(),
        }
    }

    fn broken(&mut self, invariant: &'static str, what: impl std::fmt::Display) {
        self.broken.entry(invariant).or_default().push(what.to_string());
    }

    fn told(self) -> Vec<String> {
        let mut lines = Vec::new();
        for (invariant, broken) in self.broken {
            lines.extend(broken.iter().take(MOST).map(|what| format!("{invariant}: {what}")));
            if broken.len() > MOST {
                lines.push(format!("{invariant}: and {} more", broken.len() - MOST));
            }
        }
        lines
    }

    /// I1 and I2 for messages, I10: what publishers were told is what is there.
    fn publishes(&mut self) {
        let business: HashSet<&str> = self.history.business.iter().map(String::as_str).collect();
        for (ext, publish) in &self.history.publishes {
            let rows = self.by_ext.get(ext.as_str()).cloned().unwrap_or_default();
            let was = |words: &[&str]| publish.told.iter().any(|(told, _)| words.contains(&told.as_str()));
            let failed = publish.told.len() == 1 && was(&["fail"]);
            if rows.is_empty() && self.fleeting.contains(ext.as_str()) {
                if failed {
                    self.broken("I2", format!("message {ext} was rolled back, and was handled"));
                }
                continue;
            }
            if was(&["ok", "duplicate", "conflict"]) && rows.is_empty() {
                self.broken("I1", format!("message {ext} was published, and is not there: told {:?}", publish.told));
            }
            if rows.len() > 1 {
                let invariant = if publish.dedup { "I10" } else { "I2" };
                self.broken(invariant, format!("message {ext} is there {} times", rows.len()));
            }
            if failed && !rows.is_empty() {
                self.broken("I2", format!("message {ext} was rolled back, and is there"));
            }
            if publish.business && business.contains(ext.as_str()) == rows.is_empty() {
                let (one, other) =
                    if rows.is_empty() { ("business row", "message") } else { ("message", "business row") };
                let invariant = if rows.is_empty() { "I1" } else { "I2" };
                self.broken(invariant, format!("{ext} has a {one} and no {other}: they commit together"));
            }
            if let ([row], true) = (rows.as_slice(), publish.dedup) {
                let there = row.body.as_deref().unwrap_or_default();
                for (told, body) in &publish.told {
                    let same = body == there;
                    if (told == "conflict" && same) || (["ok", "duplicate"].contains(&told.as_str()) && !same) {
                        self.broken("I10", format!("{ext} has body {there}, and body {body} was told {told}"));
                    }
                }
                if publish.told.iter().filter(|(told, _)| told == "ok").count() > 1 {
                    self.broken("I10", format!("{ext} was new to more than one publisher: {:?}", publish.told));
                }
            }
        }
        for message in &self.history.messages {
            let root = message.ext.split('/').next().unwrap_or_default();
            if !self.history.publishes.contains_key(root) {
                self.broken(
                    "I2",
                    format!("message {} ({}) is there, and nobody published it", message.id, message.ext),
                );
            }
        }
    }

    fn applied(&self, delivery: i64) -> usize {
        self.calls.get(&delivery).map_or(0, |calls| calls.iter().map(|c| c.applied.len()).sum())
    }

    /// I1, I4, I5: the state tells what happened. What each attempt did: [`Self::ends`].
    fn deliveries(&mut self) {
        for delivery in &self.history.deliveries {
            let Some(behind) = subscribed(&delivery.subscription) else { continue };
            let told = describe(delivery, self.messages.get(delivery.message.as_str()).copied());
            if !["succeeded", "dead", "cancelled"].contains(&delivery.state.as_str()) {
                self.broken("I1", format!("{told} is not at an end: {}", delivery.note));
                continue;
            }
            let attempts = self.attempts.get(&delivery.id).cloned().unwrap_or_default();
            let succeeded = attempts.iter().filter(|a| a.outcome.as_deref() == Some("succeeded")).count();
            let resolved = self.resolutions.get(&delivery.id).cloned().unwrap_or_default();
            let happened = resolved.iter().filter(|r| r.answer == "happened" && r.state_after == "succeeded").count();
            let effects = self.effects.get(&delivery.id).map_or(0, Vec::len);
            if delivery.state == "succeeded" {
                if succeeded + happened != 1 {
                    self.broken(
                        "I4",
                        format!("{told} has {succeeded} succeeded attempts and {happened} resolutions as happened"),
                    );
                }
                if happened == 1 && attempts.last().and_then(|a| a.outcome.as_deref()) != Some("in_doubt") {
                    let last = attempts.last().and_then(|a| a.outcome.clone());
                    // A panic or a timeout of an operation is a doubt as well.
                    if !matches!(last.as_deref(), Some("panicked" | "timed_out"))
                        && !self.may_have_done(behind, &attempts)
                    {
                        self.broken(
                            "I4",
                            format!("{told} was resolved, and its last attempt was not in doubt: {last:?}"),
                        );
                    }
                }
                if behind.kind.commits_its_effect() && effects != 1 {
                    self.broken("I4", format!("{told} succeeded, and its effect is not there ({effects} rows)"));
                }
            } else {
                if succeeded + happened > 0 {
                    self.broken("I4", format!("{told} has succeeded before, and is {}", delivery.state));
                }
                if behind.kind.commits_its_effect() && effects > 0 {
                    self.broken("I4", format!("{told} is {}, and {effects} effects are there", delivery.state));
                }
                let abandoned = resolved.iter().any(|r| r.answer == "abandoned");
                if behind.kind.calls() && self.applied(delivery.id) > 0 && !abandoned {
                    self.broken("I5", format!("{told} is {}, and it was applied", delivery.state));
                }
                if !behind.kind.calls() && !self.is_poisoned(delivery) && !self.was_called_off(delivery) {
                    self.broken("I1", format!("{told} is {}: {}", delivery.state, delivery.note));
                }
            }
            self.follow_ups(delivery, &told);
        }
    }

    /// I4: what follows from a success is there once, and only then.
    fn follow_ups(&mut self, delivery: &Delivery, told: &str) {
        let Some(message) = self.messages.get(delivery.message.as_str()) else { return };
        let Some((topic, end)) = follows(&message.topic) else { return };
        let ext = format!("{}{end}", message.ext);
        let there = self.by_ext.get(ext.as_str()).map_or(0, Vec::len);
        let wanted = self.done.get(message.ext.as_str()).copied().unwrap_or_default();
        if there != wanted {
            self.broken("I4", format!("{told} has {there} follow-ups {topic} ({ext}) instead of {wanted}"));
        }
    }

    /// I5, I6, I11: attempts are whole, numbered, and written by those who made them.
    fn attempts(&mut self) {
        for delivery in &self.history.deliveries {
            let Some(behind) = subscribed(&delivery.subscription) else { continue };
            let told = describe(delivery, self.messages.get(delivery.message.as_str()).copied());
            let attempts = self.attempts.get(&delivery.id).cloned().unwrap_or_default();
            let numbers: Vec<u32> = attempts.iter().map(|a| a.number).collect();
            if numbers != (1..=numbers.len() as u32).collect::<Vec<_>>() {
                self.broken("I11", format!("{told} has attempts {numbers:?}"));
            }
            if delivery.attempts != numbers.len() as u32 {
                self.broken("I11", format!("{told} counts {} attempts and has {numbers:?}", delivery.attempts));
            }
            let topic = self.messages.get(delivery.message.as_str()).map_or("", |m| m.topic.as_str());
            let most = most_attempts(behind, topic) + self.retries.get(&delivery.id).copied().unwrap_or_default();
            if numbers.len() as u32 > most {
                self.broken("I11", format!("{told} made {} attempts of {most}", numbers.len()));
            }
            self.un_counted(delivery, behind, &told, numbers.len() as u32);
            for attempt in &attempts {
                let what = format!("attempt {} of {told}", attempt.number);
                match attempt.outcome.as_deref() {
                    None => self.broken("I5", format!("{what} is open, and nobody makes it any more")),
                    Some("lost") if behind.kind == Behind::Operation => {
                        self.broken("I5", format!("{what} was lost and not put in doubt"));
                    }
                    Some(unseen @ ("in_doubt" | "panicked" | "timed_out")) if behind.kind == Behind::Operation => {
                        let resolved = self.resolutions.get(&delivery.id).cloned().unwrap_or_default();
                        if !resolved.iter().any(|r| r.number == attempt.number) {
                            self.broken("I5", format!("{what} ended {unseen}, and nobody said how it ended"));
                        }
                    }
                    _ => {}
                }
                if let (Some(begun), Some(ended)) = (&attempt.begun_by, &attempt.ended_by)
                    && begun != ended
                {
                    self.broken("I6", format!("{what} was begun by {begun}, and its outcome written by {ended}"));
                }
            }
            let done = attempts.iter().find(|a| a.outcome.as_deref() == Some("succeeded"));
            if let Some(done) = done.filter(|d| d.number != numbers.len() as u32) {
                self.broken("I6", format!("{told} was tried again after its success at attempt {}", done.number));
            }
        }
    }

    /// I11: whoever ran a handler as attempt n has left n attempts.
    fn un_counted(&mut self, delivery: &Delivery, behind: &Subscribed, told: &str, counted: u32) {
        let seen = match behind.kind {
            Behind::Plain => self.notes.get(&delivery.id).into_iter().flatten().max().copied(),
            Behind::Transactional | Behind::Pulled => {
                self.effects.get(&delivery.id).into_iter().flatten().max().copied()
            }
            Behind::Operation | Behind::Idempotent => {
                self.calls.get(&delivery.id).into_iter().flatten().map(|c| c.number).max()
            }
        };
        // A plain run whose worker was lost is not counted, but for its next one, which a cancel may spare.
        let spared = u32::from(behind.kind == Behind::Plain && self.was_called_off(delivery));
        if let Some(seen) = seen.filter(|seen| *seen > counted + spared) {
            self.broken("I11", format!("{told} ran as attempt {seen}, and counts {counted}"));
        }
    }

    /// I3 and I7: calls at the remote.
    fn calls(&mut self) {
        let unchecked = self.history.calls.iter().filter(|c| c.how == "unchecked").count();
        if unchecked > 20 && unchecked * 2 > self.history.calls.len() {
            let all = self.history.calls.len();
            self.broken("I3", format!("{unchecked} of {all} calls could not be looked up: the witness is blind"));
        }
        let mut by_delivery: Vec<(i64, Vec<&Call>)> = self.calls.iter().map(|(d, c)| (*d, c.clone())).collect();
        by_delivery.sort_by_key(|(delivery, _)| *delivery);
        for (delivery, mut calls) in by_delivery {
            calls.sort_by_key(|c| c.received);
            let mut numbers = BTreeSet::new();
            for call in &calls {
                if call.unrecorded {
                    let what = format!("attempt {} of delivery {delivery} ({})", call.number, call.ext);
                    self.broken("I3", format!("{what} called the remote before it was on record"));
                }
                if !numbers.insert(call.number) {
                    let what = format!("attempt {} of delivery {delivery} ({})", call.number, call.ext);
                    self.broken("I7", format!("{what} called the remote more than once: {}", timeline(&calls)));
                }
            }
            // A repeat under one key may meet a call whose worker was given up: the remote applies one.
            let repeats = self.is_idempotent(delivery);
            for pair in calls.windows(2).filter(|_| !repeats) {
                if pair[0].over.is_none_or(|over| over > pair[1].received) {
                    let what = format!("calls of delivery {delivery} ({})", pair[0].ext);
                    self.broken("I7", format!("{what} overlap at the remote: {}", timeline(&calls)));
                }
            }
            let applied = calls.iter().map(|c| c.applied.len()).sum::<usize>();
            // What is retried here is known not to have happened, but for what was abandoned.
            let abandoned = self.resolutions.get(&delivery).into_iter().flatten().any(|r| r.answer == "abandoned");
            let retries = self.retries.get(&delivery).copied().unwrap_or_default() as usize;
            let allowed = 1 + if abandoned { retries } else { 0 };
            if applied > allowed {
                let ext = calls.first().map_or("", |c| c.ext.as_str());
                self.broken(
                    "I7",
                    format!(
                        "delivery {delivery} ({ext}) was applied {applied} times of {allowed}: {}",
                        timeline(&calls)
                    ),
                );
            }
        }
    }

    /// I13: nothing begins before it is due.
    fn due_times(&mut self) {
        let began = |delivery: i64, number: u32, clock: i64| (delivery, number, clock);
        let history = self.history;
        let all = (history.notes.iter().chain(&history.effects))
            .map(|s| began(s.delivery, s.number, s.clock))
            .chain(history.calls.iter().map(|c| began(c.delivery, c.number, c.clock)));
        let deliveries: HashMap<i64, &Delivery> = history.deliveries.iter().map(|d| (d.id, d)).collect();
        for (id, number, clock) in all {
            let Some(delivery) = deliveries.get(&id) else {
                if self.fleeting_deliveries.contains(&id) {
                    continue;
                }
                self.broken("I2", format!("delivery {id} was handled, and is not there"));
                continue;
            };
            let message = self.messages.get(delivery.message.as_str()).copied();
            let told = describe(delivery, message);
            // What an operator replays, or has tried again, is due now.
            let hurried = delivery.replay_of.is_some() || self.retries.contains_key(&id);
            if let Some(due) = message.and_then(|m| m.due_ms).filter(|due| clock < *due && !hurried) {
                self.broken("I13", format!("attempt {number} of {told} began {} ms before its due time", due - clock));
            }
            // A retry that was put off by the handler's own word, unless an operator wanted it now.
            let before = self.attempts.get(&id).and_then(|list| list.iter().find(|a| a.number + 1 == number)).copied();
            if let Some(before) = before.filter(|a| a.error.contains("come back in"))
                && !self.retries.contains_key(&id)
                && let Some(finished) = before.finished_ms
                && clock < finished + LATER as i64 - 2
            {
                let early = finished + LATER as i64 - clock;
                self.broken("I13", format!("attempt {number} of {told} began {early} ms before its retry was due"));
            }
        }
    }

    /// I6: an end state that was seen once is changed by an operator's recorded action only.
    fn end_states(&mut self) {
        let deliveries: HashMap<i64, &Delivery> = self.history.deliveries.iter().map(|d| (d.id, d)).collect();
        for (id, samples) in &self.history.samples {
            let Some(delivery) = deliveries.get(id) else {
                if self.fleeting_deliveries.contains(id) {
                    continue;
                }
                self.broken("I1", format!("delivery {id} was {:?}, and is nowhere", samples.last()));
                continue;
            };
            for sample in samples {
                let same = delivery.state == sample.state && delivery.rev == sample.rev;
                let acted = self.history.audit.iter().any(|entry| {
                    let may = entry.action == "retry" || (entry.action == "cancel" && sample.state == "dead");
                    entry.delivery == Some(*id) && may && entry.rev_before == Some(sample.rev)
                });
                if !same && (sample.state == "succeeded" || !acted) {
                    let (state, rev) = (&delivery.state, delivery.rev);
                    self.broken(
                        "I6",
                        format!(
                            "delivery {id} was {} at revision {}, and is {state} at revision {rev}",
                            sample.state, sample.rev
                        ),
                    );
                }
            }
        }
    }

    /// I8, the part that shows here: the audit has no gap.
    fn audit(&mut self) {
        let mut numbers: Vec<i64> = self.history.audit.iter().map(|a| a.seq).collect();
        numbers.sort_unstable();
        if numbers.iter().zip(1..).any(|(seq, wanted)| *seq != wanted) {
            self.broken("I8", format!("the audit has a gap: {} entries up to {:?}", numbers.len(), numbers.last()));
        }
    }
}

fn describe(delivery: &Delivery, message: Option<&Message>) -> String {
    let ext = message.map_or("its message is gone", |m| m.ext.as_str());
    format!("delivery {} ({ext}, {}, {})", delivery.id, delivery.subscription, delivery.state)
}

fn timeline(calls: &[&Call]) -> String {
    let one = |c: &&Call| {
        let over = c.over.map_or("open".to_owned(), |o| (o / 1000).to_string());
        let applied: Vec<u64> = c.applied.iter().map(|a| a / 1000).collect();
        format!("#{} from {} to {over} ms, {}, applied at {applied:?}", c.number, c.received / 1000, c.how)
    };
    calls.iter().map(one).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
#[path = "check/tests.rs"]
mod tests;
