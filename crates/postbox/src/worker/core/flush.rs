//! A batch's flushes: what has ended is judged and written, what starts is put on record.

use std::collections::HashMap;
use std::time::Duration;

use uuid::Uuid;

use super::batch::{Batch, Entry, Slot};
use super::wire::{Ended, Lane};
use super::{LONGEST_PAUSE, Load};
use crate::keys::Keys;
use crate::lifecycle::{Answer, End, Event as Lived, Kind, Policy, Standing, State, transition};
use crate::planted::planted;
use crate::store::{Evidence, Item, LeaseRef, Move, Observation, OutcomeRecord, Settle, SubscriptionId, Success};

/// What has ended waits this long for company before it is settled.
pub(super) const FLUSH_AFTER: Duration = Duration::from_millis(25);
/// What has ended is settled at once when it is this many.
pub(super) const FLUSH_COUNT: usize = 500;
/// An operation that has ended waits this long for others that were begun and have not ended.
pub(super) const WAVE_AFTER: Duration = Duration::from_millis(1);

/// The revision of a delivery that is leased for the first time, and was never moved.
const FIRST_LEASED_REV: i32 = 1;

impl Batch {
    /// Takes the flush under way for one that was not written: what a planted bug believes.
    pub(super) fn unsettled(&mut self, now: Duration) {
        self.flight = None;
        self.each(|_, entry| {
            entry.slot = match std::mem::replace(&mut entry.slot, Slot::Settled) {
                Slot::Settling(Some(ended)) => Slot::Ended(ended, now),
                Slot::Settling(None) => Slot::Released,
                Slot::Starting => Slot::Reserved,
                other => other,
            };
        });
    }

    /// The database refused a flush for what is in it. Nothing of it was written: its slots go back,
    /// and are settled one by one; the one that is refused alone is settled as what could not be.
    pub(super) fn refused(&mut self, error: &str, now: Duration) {
        tracing::error!(batch = self.lease.batch, error, "a flush was refused; settling one by one");
        let alone = self.one_by_one;
        self.one_by_one = true;
        self.again_at = None;
        self.flight = None;
        self.each(|_, entry| {
            entry.slot = match std::mem::replace(&mut entry.slot, Slot::Settled) {
                Slot::Settling(Some(mut ended)) => {
                    if alone {
                        let end = match entry.operation {
                            true => End::InDoubt,
                            false => End::Failed { permanent: true, retry_after: None },
                        };
                        let words = format!("its outcome ({}) could not be written: {error}", ended.end.as_str());
                        *ended = Ended { error: Some(words), ran: ended.ran, ..Ended::of(end) };
                    }
                    Slot::Ended(ended, now)
                }
                Slot::Settling(None) => Slot::Released,
                Slot::Starting => Slot::Reserved,
                other => other,
            };
        });
        // Not at once: if even that is refused, it is not asked without end.
        if alone {
            self.again_at = Some(now + self.pause);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// The flush that a batch is due for, its slots moved along.
pub(super) fn due_flush(
    batch: &mut Batch,
    lanes: &HashMap<SubscriptionId, (Lane, Load)>,
    rng: &mut fastrand::Rng,
    now: Duration,
) -> Option<Settle> {
    let tally = batch.tally();
    let done = tally.ended + tally.released;
    let complete = done + tally.settled == batch.entries().len();
    let ripe = tally.ripe_at().is_some_and(|at| at <= now);
    // What begins need not wait, if nothing of its wave is about to be settled.
    let begins = tally.reserved > 0 && tally.operations == 0;
    if !(complete || ripe || begins || tally.released > 0) {
        return None;
    }
    // The first alone, if a flush with company was refused.
    let mut room = if batch.one_by_one { 1 } else { usize::MAX };
    let complete = complete && (!batch.one_by_one || done <= 1);
    let mut settle = Settle { close: complete, ..nothing(batch.lease, batch.next_part) };
    batch.next_part += 1;
    batch.each(|_, Entry { item, slot, .. }| {
        if room == 0 || !matches!(slot, Slot::Ended(..) | Slot::Released | Slot::Withheld | Slot::Reserved) {
            return;
        }
        room -= 1;
        match std::mem::replace(slot, Slot::Settling(None)) {
            Slot::Ended(ended, at) => {
                let lane = lanes.get(&item.subscription).map(|(lane, _)| lane);
                judge(item, &ended, now.saturating_sub(at), lane, rng, &mut settle);
                *slot = Slot::Settling(Some(ended));
            }
            Slot::Released => settle.released.push(item.clone()),
            Slot::Withheld => {
                let lane = lanes.get(&item.subscription).map(|(lane, _)| lane);
                withhold(item, lane, &mut settle);
            }
            Slot::Reserved => {
                settle.starts.push((item.delivery, item.attempts + 1));
                *slot = Slot::Starting;
            }
            other => *slot = other,
        }
    });
    Some(settle)
}

/// A flush with nothing in it.
fn nothing(lease: LeaseRef, part: i32) -> Settle {
    Settle {
        lease,
        part,
        successes: Vec::new(),
        moves: Vec::new(),
        released: Vec::new(),
        seen: Vec::new(),
        follow_ups: Vec::new(),
        starts: Vec::new(),
        close: false,
    }
}

/// What a transactional batch handler's transaction writes under one lease.
pub(crate) fn settle_of<'a>(
    (lease, part): (LeaseRef, i32),
    ended: impl Iterator<Item = (&'a Item, &'a Ended)>,
    lane: &Lane,
    rng: &mut fastrand::Rng,
) -> Settle {
    let mut settle = nothing(lease, part);
    ended.for_each(|(item, ended)| judge(item, ended, Duration::ZERO, Some(lane), rng, &mut settle));
    settle
}

/// Turns an attempt's end into what is written: the lifecycle decides.
fn judge(item: &Item, ended: &Ended, ago: Duration, lane: Option<&Lane>, rng: &mut fastrand::Rng, settle: &mut Settle) {
    let policy = policy_for(item, lane);
    let begun = policy.kind == Kind::Operation || item.lost > 0;
    let number = item.attempts + 1;
    let bare = ended.receipt.is_none() && (ended.follow_ups.is_empty() || planted!("success-without-follow-ups"));
    // Compact successes carry no revision: only what went the straight way has the one they stand for.
    let straight = number == 1 && !begun && item.rev == FIRST_LEASED_REV;
    if ended.end == End::Succeeded && straight && bare && policy.kind != Kind::Operation && !item.leads {
        settle.successes.push(Success {
            delivery: item.delivery,
            message: item.message,
            subscription: item.subscription,
            ran: ended.ran,
        });
        return;
    }
    let standing = Standing {
        state: State::Running,
        attempts: if begun { number } else { item.attempts },
        begun,
        lost: item.lost,
    };
    // Running and ended always has a next state.
    let Ok(next) = transition(standing, Lived::Ended(ended.end), &policy, rng.f64()) else { return };
    let note = note(ended, next.standing.state, number, &policy);
    if next.standing.state == State::Succeeded {
        settle.follow_ups.extend(ended.follow_ups.iter().cloned());
    }
    // Without a start on record it is no attempt, but it is on record that it was asked.
    let counted = begun || !matches!(ended.end, End::Snoozed { .. });
    if !counted {
        settle.seen.push(Observation {
            delivery: item.delivery,
            number,
            worker: settle.lease.worker,
            kind: ended.end.as_str(),
            detail: ended.error.clone(),
            evidence: None,
        });
    }
    settle.moves.push(Move {
        delivery: item.delivery,
        message: item.message,
        subscription: item.subscription,
        priority: item.priority,
        rev: item.rev + 1,
        standing: next.standing,
        delay: next.delay,
        // A call of an earlier attempt may be on its way, too.
        quiet: lane.map_or(Duration::ZERO, |lane| if item.lost > 0 { lane.late } else { lane.quiet }),
        note,
        leads: leads(item, lane, next.standing.state),
        outcome: counted.then(|| OutcomeRecord {
            number,
            kind: ended.end.as_str(),
            error: ended.error.clone(),
            receipt: ended.receipt.clone(),
            ran: ended.ran,
            ago,
        }),
    });
}

/// What may have happened already is not called without the declaration that a repeat is harmless.
pub(super) fn is_withheld(item: &Item, lane: &Lane) -> bool {
    transition(claimed(item), Lived::Withheld, &lane.policy, 0.0).is_ok() && !planted!("undeclared-repeat")
}

fn claimed(item: &Item) -> Standing {
    Standing { state: State::Running, attempts: item.attempts, begun: false, lost: item.lost }
}

fn withhold(item: &Item, lane: Option<&Lane>, settle: &mut Settle) {
    let Ok(next) = transition(claimed(item), Lived::Withheld, &policy_for(item, lane), 0.0) else { return };
    settle.moves.push(Move {
        delivery: item.delivery,
        message: item.message,
        subscription: item.subscription,
        priority: item.priority,
        rev: item.rev + 1,
        standing: next.standing,
        delay: next.delay,
        quiet: lane.map_or(Duration::ZERO, |lane| lane.late),
        note: "an earlier attempt may have happened, and its operation is not declared idempotent (any more)".into(),
        leads: leads(item, lane, next.standing.state),
        outcome: None,
    });
}

/// Whether the others of its key wait for it, or did for this success.
fn leads(item: &Item, lane: Option<&Lane>, state: State) -> bool {
    let ordered = lane.is_some_and(|lane| matches!(lane.keys, Some(Keys::Ordered(_))));
    item.leads || ordered && state != State::Succeeded
}

pub(super) fn policy_for(item: &Item, lane: Option<&Lane>) -> Policy {
    let mut policy =
        lane.map_or(Policy { kind: Kind::Plain, retry: Default::default(), idempotent: false }, |lane| lane.policy);
    if let Some(own) = item.envelope.as_ref().and_then(|e| e.max_attempts) {
        policy.retry.max_attempts = own;
    }
    policy
}

fn note(ended: &Ended, state: State, number: u32, policy: &Policy) -> String {
    let words = ended.error.as_deref().unwrap_or("no reason was given");
    match state {
        State::Cancelled => format!("discarded: {words}"),
        // Its own end was clear; what another attempt came to is not.
        State::InDoubt if matches!(ended.end, End::Failed { .. } | End::Discarded | End::Snoozed { .. }) => {
            format!("attempt {number}: {words}; an earlier attempt may have happened")
        }
        State::Dead if number >= policy.retry.max_attempts => {
            format!("attempt {number} of {}: {words}", policy.retry.max_attempts)
        }
        _ => words.to_owned(),
    }
}

/// What a fenced attempt's end is kept as, and whether it proves anything.
pub(super) fn observation(item: &Item, ended: &Ended, worker: Uuid, lane: Option<&Lane>) -> Observation {
    let policy = policy_for(item, lane);
    let answer = match ended.end {
        End::Succeeded => Some(Answer::Happened),
        // That says nothing about an earlier attempt which may have done it.
        End::Failed { .. } | End::Discarded | End::Snoozed { .. } if item.lost > 0 => None,
        End::Failed { .. } | End::Discarded | End::Snoozed { .. } => Some(Answer::DidNotHappen),
        End::InDoubt | End::Panicked | End::TimedOut => None,
    };
    Observation {
        delivery: item.delivery,
        number: item.attempts + 1,
        worker,
        kind: ended.end.as_str(),
        detail: ended.error.clone(),
        evidence: answer.filter(|_| policy.kind == Kind::Operation).map(|answer| Evidence {
            answer,
            receipt: ended.receipt.clone(),
            follow_ups: match planted!("evidence-without-follow-ups") {
                true => Vec::new(),
                false => ended.follow_ups.clone(),
            },
        }),
    }
}
