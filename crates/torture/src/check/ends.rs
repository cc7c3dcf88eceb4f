//! Attempt by attempt: what the record says of its end, and what was really done in it.

use std::collections::{HashMap, HashSet};

use super::load::is_unseen;
use super::{Attempt, Behind, Checker, Delivery, Resolved, Subscribed, subscribed};
use crate::history::{Ended, History};

/// Who left this many signs of life after an end, two seconds apart and each with the database there,
/// had the time to write down that it came too late.
const LIVELY: u32 = 8;

/// Its worker was taken for dead before its end was written.
fn was_taken_over(attempt: &Attempt) -> bool {
    matches!(attempt.outcome.as_deref(), Some("in_doubt" | "lost"))
        && attempt.error.contains("was lost during the attempt")
}

/// Ends by workers that were taken for dead and lived: which attempt each is of.
pub(super) fn late_ends(history: &History) -> Vec<(&Ended, &Attempt)> {
    let taken: HashMap<_, _> =
        history.attempts.iter().filter(|a| was_taken_over(a)).map(|a| ((a.delivery, a.number), a)).collect();
    let lively = history.ends.iter().filter(|e| e.lived >= LIVELY);
    lively.filter_map(|end| Some((end, *taken.get(&(end.delivery, end.number))?))).collect()
}

/// How an attempt ends that is known to have done nothing.
const NOT_DONE: &[&str] = &["failed", "discarded", "snoozed"];

impl<'a> Checker<'a> {
    /// I4, I5: the attempt that succeeded has done it, and none that failed has.
    pub(super) fn ends(&mut self) {
        let noted = self.history.notes.iter().filter(|n| n.done).map(|n| (n.delivery, n.number)).collect();
        for delivery in &self.history.deliveries {
            let Some(behind) = subscribed(&delivery.subscription) else { continue };
            let told = self.told_of(delivery);
            for attempt in self.attempts.get(&delivery.id).cloned().unwrap_or_default() {
                let (number, how) = (attempt.number, attempt.outcome.as_deref().unwrap_or("open"));
                if how == "succeeded" && !self.has_done(behind, delivery.id, number, &noted) {
                    self.broken("I4", format!("attempt {number} of {told} succeeded, and its effect is not there"));
                }
                if NOT_DONE.contains(&how) && behind.kind.calls() && self.was_applied(delivery.id, number) {
                    self.broken("I5", format!("attempt {number} of {told} {how} ({}), and was applied", attempt.error));
                }
            }
            if behind.kind.calls() {
                self.words(delivery, behind, &told);
                self.late_words(delivery, behind, &told);
            }
        }
    }

    /// Whether the effect is that of this attempt. `noted`: the plain runs that were told that they are done.
    fn has_done(&self, behind: &Subscribed, delivery: i64, number: u32, noted: &HashSet<(i64, u32)>) -> bool {
        match behind.kind {
            Behind::Operation => self.was_applied(delivery, number),
            // Once per key: a repeat is told that it is done.
            Behind::Idempotent => (1..=number).any(|n| self.was_applied(delivery, n)),
            Behind::Plain => noted.contains(&(delivery, number)),
            Behind::Transactional | Behind::Pulled => {
                self.effects.get(&delivery).is_some_and(|numbers| numbers.contains(&number))
            }
        }
    }

    fn was_applied(&self, delivery: i64, number: u32) -> bool {
        let calls = self.calls.get(&delivery).map_or(&[][..], Vec::as_slice);
        calls.iter().any(|c| c.number == number && !c.applied.is_empty())
    }

    /// I4, I5: the word on a doubt is true of the attempts that it is about.
    fn words(&mut self, delivery: &Delivery, behind: &Subscribed, told: &str) {
        let words = self.resolutions.get(&delivery.id).cloned().unwrap_or_default();
        for word in &words {
            let about = self.about(delivery.id, behind, word, &words);
            let applied = about.iter().any(|number| self.was_applied(delivery.id, *number));
            let (number, source) = (word.number, &word.source);
            match word.answer.as_str() {
                "happened" if !applied => self.broken(
                    "I4",
                    format!(
                        "{told} happened, says {source} of attempt {number}, and the effect is not there of {about:?}"
                    ),
                ),
                "did_not_happen" if applied => self.broken(
                    "I5",
                    format!(
                        "{told} did not happen, says {source} of attempt {number}, and one of {about:?} was applied"
                    ),
                ),
                _ => {}
            }
        }
    }

    /// The attempts that a word is about: the one in doubt; of a declared-idempotent operation, whatever
    /// nobody saw the end of. Who looks at the remote finds what was abandoned before, too.
    fn about(&self, delivery: i64, behind: &Subscribed, word: &Resolved, words: &[&Resolved]) -> Vec<u32> {
        let abandoned = words.iter().filter(|w| w.answer == "abandoned" && w.number < word.number).map(|w| w.number);
        let given_up = abandoned.max().unwrap_or_default();
        let found = word.answer == "happened";
        let attempts = self.attempts.get(&delivery).map_or(&[][..], Vec::as_slice);
        let doubtful = |a: &&&Attempt| is_unseen(a) && (behind.kind == Behind::Idempotent || a.number <= given_up);
        let mut about: Vec<u32> = (attempts.iter().filter(doubtful))
            .map(|a| a.number)
            .filter(|number| *number < word.number && (found || *number > given_up))
            .collect();
        about.push(word.number);
        about
    }

    /// I4, I5: what came too late to count is true as well.
    fn late_words(&mut self, delivery: &Delivery, behind: &Subscribed, told: &str) {
        for seen in self.observed.get(&delivery.id).cloned().unwrap_or_default() {
            let (number, how) = (seen.number, seen.kind.as_str());
            let applied = self.was_applied(delivery.id, number);
            // One that was given up may have come after its repeat.
            let known = behind.kind == Behind::Idempotent && self.applied(delivery.id) > 0;
            if how == "succeeded" && !applied && !known {
                let what = format!("attempt {number} of {told} succeeded late, and its effect is not there");
                self.broken("I4", what);
            }
            if NOT_DONE.contains(&how) && applied {
                self.broken("I5", format!("attempt {number} of {told} {how} late, and was applied"));
            }
        }
    }

    /// I6: what came too late is on record, if whoever came too late lived to write it.
    pub(super) fn late_ends(&mut self) {
        for (end, attempt) in late_ends(self.history) {
            let worker = attempt.begun_by.as_deref().and_then(|by| by.split('/').next()).unwrap_or_default();
            let observed = self.observed.get(&end.delivery).map_or(&[][..], Vec::as_slice);
            if !observed.iter().any(|o| o.number == end.number && o.worker == worker && o.kind != "lost") {
                let Ended { life, delivery, number, word, .. } = end;
                let what = format!("attempt {number} of delivery {delivery} was taken over, and then {word} in {life}");
                self.broken("I6", format!("{what}: no late outcome of worker {worker} is on record"));
            }
        }
    }
}
