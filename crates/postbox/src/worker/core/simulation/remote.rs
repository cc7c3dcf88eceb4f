//! The remote: what it was asked, what it has done. It keeps its own log, and believes nobody.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Checked, ensure, policy};
use crate::lifecycle::{Answer, Kind};
use crate::store::{DeliveryId, Speaker};

use super::store::{Place, Row};

/// How a call goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is done, and answered.
    Done,
    /// It is done, and the answer is lost.
    DoneUnheard,
    /// It never gets there; the caller only sees a broken connection.
    Lost,
    /// It is refused.
    Refused,
}

#[derive(Debug)]
struct Call {
    number: u32,
    /// What the remote tells repeats by.
    key: String,
    sent: Duration,
    /// When it got there, or was lost.
    over: Option<Duration>,
    applied: bool,
}

/// Its log.
#[derive(Debug, Default)]
pub(super) struct Remote {
    calls: BTreeMap<DeliveryId, Vec<Call>>,
}

/// How many attempts an operator's recorded word has made possible.
fn allowed(row: &Row) -> u32 {
    let words = row.resolutions.iter();
    let words = words.filter(|(_, answer, speaker)| *answer == Answer::DidNotHappen && *speaker == Speaker::Operator);
    row.allowed + words.count() as u32
}

/// Whether an operator ended the doubt about this attempt, so that others might follow.
fn spoken(row: &Row, attempt: u32) -> bool {
    let word = |(number, answer, speaker): &(u32, Answer, Speaker)| {
        *number == attempt && *answer != Answer::Happened && *speaker == Speaker::Operator
    };
    row.resolutions.iter().any(word)
}

impl Remote {
    /// A call is sent. What must hold then?
    pub(super) fn sent(
        &mut self,
        row: &Row,
        number: u32,
        key: String,
        declared: bool,
        now: Duration,
    ) -> Checked<usize> {
        let delivery = row.delivery;
        let calls = self.calls.entry(delivery).or_default();
        if row.kind() == Kind::Operation {
            ensure!(row.begun.contains(&number), "I3: attempt {number} of {delivery} is called, and not on record");
            ensure!(calls.iter().all(|c| c.number != number), "I7: attempt {number} of {delivery} is called twice");
        }
        if row.kind() == Kind::Operation && !declared {
            let unseen = row.may_have_happened(number) && !spoken(row, number);
            ensure!(
                !unseen,
                "I7: attempt {number} of {delivery} is a repeat, and its worker does not know it as harmless"
            );
            // Unless an operator's word let them: it is on record whose mistake that was.
            let open = calls.iter().find(|c| c.over.is_none() && !spoken(row, c.number) && !spoken(row, number));
            ensure!(
                open.is_none(),
                "I7: attempt {number} of {delivery} overlaps attempt {}",
                open.map_or(0, |c| c.number)
            );
            let later = calls.iter().any(|c| c.number > number) && !spoken(row, number);
            ensure!(!later, "I7: attempt {number} of {delivery} is called after a later one");
        }
        calls.push(Call { number, key, sent: now, over: None, applied: false });
        Ok(calls.len() - 1)
    }

    /// It gets there, or is lost.
    pub(super) fn arrives(&mut self, row: &Row, call: usize, fate: Fate, now: Duration) -> Checked {
        let Some(calls) = self.calls.get_mut(&row.delivery) else { return Ok(()) };
        // Under a key that it has seen it does nothing more.
        let keyed = policy(row.subscription).repeats();
        let repeated = keyed && calls.iter().any(|c| c.applied && c.key == calls[call].key);
        calls[call].over = Some(now);
        calls[call].applied = matches!(fate, Fate::Done | Fate::DoneUnheard) && !repeated;
        let applied = calls.iter().filter(|c| c.applied).count() as u32;
        let most = if keyed { 1 } else { 1 + allowed(row) };
        let operation = row.kind() == Kind::Operation;
        ensure!(!operation || applied <= most, "I7: delivery {} is applied {applied} times of {most}", row.delivery);
        Ok(())
    }

    pub(super) fn applied(&self, delivery: DeliveryId) -> bool {
        self.calls.get(&delivery).is_some_and(|calls| calls.iter().any(|c| c.applied))
    }

    pub(super) fn under_way(&self) -> bool {
        self.calls.values().flatten().any(|c| c.over.is_none())
    }

    /// At the end: does the record say what has happened here?
    pub(super) fn agrees(&self, row: &Row) -> Checked {
        static NONE: Vec<Call> = Vec::new();
        let calls = self.calls.get(&row.delivery).unwrap_or(&NONE);
        let delivery = row.delivery;
        for call in calls.iter().filter(|c| c.applied) {
            let n = call.number;
            let said = row.outcomes.get(&n).copied();
            ensure!(
                row.kind() != Kind::Operation || said != Some("failed"),
                "I5: attempt {n} of {delivery} failed on record, and was applied (sent {:?})",
                call.sent
            );
            // Of repeats, a word is about all of them.
            let about = |number: u32| number == n || (number > n && policy(row.subscription).repeats());
            let denied = row.resolutions.iter().any(|(number, answer, speaker)| {
                about(*number) && *answer == Answer::DidNotHappen && *speaker != Speaker::Operator
            });
            ensure!(!denied, "I5: attempt {n} of {delivery} was said not to have happened, and was applied");
        }
        match row.kind() {
            Kind::Operation => {
                let succeeded = row.outcomes.values().filter(|o| **o == "succeeded").count();
                let happened = row.resolutions.iter().filter(|(_, answer, _)| *answer == Answer::Happened).count();
                if row.place == Place::Succeeded {
                    ensure!(
                        succeeded + happened == 1,
                        "I4: delivery {delivery} succeeded {succeeded}+{happened} times"
                    );
                    let word =
                        row.resolutions.iter().any(|(_, a, s)| *a == Answer::Happened && *s == Speaker::Operator);
                    let applied = self.applied(delivery);
                    ensure!(word || applied, "I4: delivery {delivery} succeeded, and was never applied");
                } else {
                    ensure!(succeeded + happened == 0, "I6: delivery {delivery} succeeded and is {:?}", row.place);
                    let words = row.resolutions.iter();
                    let word = words.filter(|(_, a, s)| *a != Answer::Happened && *s == Speaker::Operator).count();
                    let applied = self.applied(delivery);
                    ensure!(word > 0 || !applied, "I5: delivery {delivery} is {:?}, and was applied", row.place);
                }
            }
            Kind::Plain => {
                let done = row.outcomes.values().filter(|o| **o == "succeeded").count();
                ensure!(done <= 1, "I4: delivery {delivery} succeeded {done} times");
                // D3: called again only after an attempt that did not succeed, or a worker that died.
                let reasons = 1 + row.outcomes.len() - done + row.losses as usize;
                ensure!(calls.len() <= reasons, "I1: delivery {delivery} is called {} times of {reasons}", calls.len());
                let succeeded = row.place == Place::Succeeded;
                ensure!(!succeeded || !calls.is_empty(), "I4: delivery {delivery} succeeded, and was never called");
            }
            Kind::Transactional => {
                let done = row.outcomes.values().filter(|o| **o == "succeeded").count();
                ensure!(
                    done == usize::from(row.place == Place::Succeeded),
                    "I4: delivery {delivery}: {done} successes"
                );
            }
        }
        let open = row.begun.iter().find(|n| !row.outcomes.contains_key(n));
        ensure!(open.is_none(), "I5: attempt {} of {delivery} is open for ever", open.copied().unwrap_or_default());
        Ok(())
    }
}
