//! What comes next for a delivery: one pure function, [`transition`].
//!
//! It knows no clock, no I/O and no SQL. Waits are given as durations, which the store adds to the
//! database's own clock; the randomness of the backoff comes in as an argument. `docs/lifecycle.md`
//! shows the same thing as a picture.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::planted::planted;
use crate::retry::RetryPolicy;

/// Where a delivery stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// Waits for a worker, now or from its due time on.
    Pending,
    /// Leased to a worker.
    Running,
    /// It may have happened; nobody saw the end.
    InDoubt,
    /// It happened.
    Succeeded,
    /// A dead letter: not tried again by itself.
    Dead,
    /// Called off by an operator.
    Cancelled,
}

impl State {
    /// All of them, in the order in which `status` shows them.
    pub const ALL: [State; 6] =
        [State::Pending, State::Running, State::InDoubt, State::Dead, State::Succeeded, State::Cancelled];

    /// The word for it: in SQL, JSON, filters and pages alike.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Pending => "pending",
            State::Running => "running",
            State::InDoubt => "in_doubt",
            State::Succeeded => "succeeded",
            State::Dead => "dead",
            State::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for State {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = text.to_ascii_lowercase().replace('-', "_");
        State::ALL.into_iter().find(|s| s.as_str() == wanted).ok_or_else(|| {
            let known: Vec<_> = State::ALL.iter().map(|s| s.as_str()).collect();
            format!("there is no state `{}`; the states are {}", text.escape_debug(), known.join(", "))
        })
    }
}

/// What kind of handler stands behind a subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// At least once: the outcome follows the effect.
    Plain,
    /// Effect and outcome commit together.
    Transactional,
    /// The effect cannot be undone: the attempt is on record before it starts.
    Operation,
}

impl Kind {
    /// The word for it, in SQL and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Plain => "plain",
            Kind::Transactional => "transactional",
            Kind::Operation => "operation",
        }
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Kind::Plain, Kind::Transactional, Kind::Operation]
            .into_iter()
            .find(|k| k.as_str() == text)
            .ok_or_else(|| format!("there is no kind of handler `{text}`"))
    }
}

/// What decides about a subscription's deliveries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// What stands behind it.
    pub kind: Kind,
    /// How often, how soon.
    pub retry: RetryPolicy,
    /// Of an operation: the remote makes repeats under one idempotency key harmless, so that an
    /// attempt whose end nobody saw may be followed by another.
    pub idempotent: bool,
}

impl Policy {
    /// An operation that was declared idempotent.
    pub fn repeats(&self) -> bool {
        self.kind == Kind::Operation && self.idempotent
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It is done.
    Succeeded,
    /// It is known not to have been done. For an operation: nothing irreversible happened.
    Failed {
        /// Trying again would not help.
        permanent: bool,
        /// Try again after this, whatever the backoff says.
        retry_after: Option<Duration>,
    },
    /// The call was sent and nobody saw the end.
    InDoubt,
    /// The handler panicked.
    Panicked,
    /// The handler ran past its timeout and was cancelled.
    TimedOut,
    /// Not now: again after this. Without a start on record it is not counted as an attempt.
    Snoozed {
        /// The wait.
        wait: Duration,
    },
    /// It is not wanted (any more), and was not done.
    Discarded,
}

impl End {
    /// The outcome's word, in SQL and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            End::Succeeded => "succeeded",
            End::Failed { .. } => "failed",
            End::InDoubt => "in_doubt",
            End::Panicked => "panicked",
            End::TimedOut => "timed_out",
            End::Snoozed { .. } => "snoozed",
            End::Discarded => "discarded",
        }
    }
}

/// The word of a reconcile hook, an operator or a late outcome on a delivery in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The effect is there.
    Happened,
    /// The effect is not there, and will not come any more.
    DidNotHappen,
    /// It will never be known; stop asking.
    Abandoned,
}

impl Answer {
    /// The word for it, in SQL and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Answer::Happened => "happened",
            Answer::DidNotHappen => "did_not_happen",
            Answer::Abandoned => "abandoned",
        }
    }
}

/// What can befall a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A worker leased it.
    Claimed,
    /// The running attempt was put on record, before the handler is called.
    Begun,
    /// The running attempt ended.
    Ended(End),
    /// The worker hands it back unstarted.
    Released,
    /// The worker does not start it: an earlier attempt may have done it, and nobody declared that
    /// a repeat is harmless (any more).
    Withheld,
    /// The worker is gone.
    WorkerLost,
    /// Somebody knows how the doubt ends.
    Resolved(Answer),
    /// An operator wants a dead one tried again, or a waiting one now.
    Retried,
    /// An operator calls it off.
    Cancelled,
}

/// What a decision needs to know of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Where it stands.
    pub state: State,
    /// Attempts counted so far: those that ended, and those that are on record as begun.
    pub attempts: u32,
    /// The running attempt is on record as begun (and so counted in `attempts`).
    pub begun: bool,
    /// How many workers died holding it without a record of whether it had started. Of an operation
    /// that was declared idempotent: how many attempts ended in a way that nobody saw.
    pub lost: u32,
}

impl Standing {
    /// A delivery as fan-out makes it.
    pub const NEW: Standing = Standing { state: State::Pending, attempts: 0, begun: false, lost: 0 };
}

/// Where a delivery goes, and when it is due there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Next {
    /// The standing after the event.
    pub standing: Standing,
    /// For a pending one: how long from now it becomes due.
    pub delay: Duration,
}

/// An event that the state does not allow. Nothing changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a delivery that is {state} cannot be {event}")]
pub struct Refused {
    /// Where it stands.
    pub state: State,
    /// What was asked, as a participle.
    pub event: &'static str,
}

/// Says what comes next. `draw` in `0.0 ..= 1.0` is the jitter of a backoff.
///
/// ```
/// use postbox::lifecycle::*;
/// let policy = Policy { kind: Kind::Operation, retry: Default::default(), idempotent: false };
/// let claimed = transition(Standing::NEW, Event::Claimed, &policy, 0.5)?.standing;
/// let begun = transition(claimed, Event::Begun, &policy, 0.5)?.standing;
/// let after = transition(begun, Event::WorkerLost, &policy, 0.5)?.standing;
/// assert_eq!(after.state, State::InDoubt); // never a blind retry
/// # Ok::<(), Refused>(())
/// ```
pub fn transition(now: Standing, event: Event, policy: &Policy, draw: f64) -> Result<Next, Refused> {
    let refuse = |event| Err(Refused { state: now.state, event });
    let operation = policy.kind == Kind::Operation;
    let repeats = policy.repeats();
    let to = |state| Standing { state, begun: false, ..now };
    let at_once = |standing| Ok(Next { standing, delay: Duration::ZERO });

    match (now.state, event) {
        (State::Pending, Event::Claimed) => at_once(to(State::Running)),
        (_, Event::Claimed) => refuse("claimed"),

        (State::Running, Event::Begun) if !now.begun => {
            at_once(Standing { begun: true, attempts: now.attempts + 1, ..now })
        }
        (_, Event::Begun) => refuse("begun"),

        (State::Running, Event::Ended(end)) => {
            // What is not on record as begun is counted by its outcome.
            let counted = if now.begun { now.attempts } else { now.attempts + 1 };
            let unseen = if repeats { now.lost } else { 0 };
            let settled = |state| Standing { attempts: counted, lost: 0, ..to(state) };
            let tried = |unseen| Standing { lost: unseen, ..settled(State::Pending) };
            match end {
                End::Succeeded => at_once(settled(State::Succeeded)),
                End::Snoozed { wait } if !now.begun => Ok(Next { standing: to(State::Pending), delay: wait }),
                End::Panicked | End::TimedOut if operation && planted!("unseen-end-retried") => {
                    Ok(again(settled(State::Pending), policy, None, draw))
                }
                End::InDoubt | End::Panicked | End::TimedOut if repeats => {
                    Ok(again(tried(unseen + 1), policy, None, draw))
                }
                End::InDoubt | End::Panicked | End::TimedOut if operation => at_once(settled(State::InDoubt)),
                End::Failed { permanent: true, .. } => at_once(over(tried(unseen), policy, State::Dead)),
                End::Discarded => at_once(over(tried(unseen), policy, State::Cancelled)),
                End::Failed { .. } | End::InDoubt | End::Panicked | End::TimedOut | End::Snoozed { .. } => {
                    let wanted = match end {
                        End::Failed { retry_after, .. } => retry_after,
                        End::Snoozed { wait } => Some(wait),
                        _ => None,
                    };
                    Ok(again(tried(unseen), policy, wanted, draw))
                }
            }
        }
        (_, Event::Ended(_)) => refuse("settled"),

        (State::Running, Event::Released) if !now.begun => at_once(to(State::Pending)),
        (_, Event::Released) => refuse("released"),

        (State::Running, Event::Withheld) if operation && !repeats && !now.begun && now.lost > 0 => {
            at_once(Standing { lost: 0, ..to(State::InDoubt) })
        }
        (_, Event::Withheld) => refuse("withheld"),

        (State::Running, Event::WorkerLost) => match (operation, now.begun) {
            (true, true) if planted!("lost-operation-retried") => at_once(to(State::Pending)),
            (true, true) if !repeats => at_once(to(State::InDoubt)),
            (true, false) => at_once(to(State::Pending)),
            // Whether it had started is unknown: no attempt is counted, but the next one is put on
            // record first, so that a message that kills its worker is found out.
            (false, false) if planted!("lost-counted") => {
                Ok(again(Standing { attempts: now.attempts + 1, ..to(State::Pending) }, policy, None, draw))
            }
            (false, false) => at_once(Standing { lost: now.lost + 1, ..to(State::Pending) }),
            (_, true) => {
                Ok(again(Standing { lost: now.lost + 1, ..to(State::Pending) }, policy, Some(Duration::ZERO), draw))
            }
        },
        (_, Event::WorkerLost) => refuse("taken over"),

        (State::InDoubt, Event::Resolved(answer)) => match answer {
            Answer::Happened => at_once(to(State::Succeeded)),
            // The word is about the delivery: about all its attempts.
            Answer::DidNotHappen => Ok(again(Standing { lost: 0, ..to(State::Pending) }, policy, None, draw)),
            Answer::Abandoned => at_once(to(State::Dead)),
        },
        (_, Event::Resolved(_)) => refuse("resolved"),

        // That an earlier attempt may have done it is not forgotten for being in a hurry.
        (State::Pending, Event::Retried) if operation => at_once(now),
        (State::Dead | State::Cancelled | State::Pending, Event::Retried) => {
            at_once(Standing { lost: 0, ..to(State::Pending) })
        }
        (_, Event::Retried) => refuse("retried"),

        // No further attempt; but "cancelled" would say that it did not happen.
        (State::Pending, Event::Cancelled) if operation && now.lost > 0 => {
            at_once(Standing { lost: 0, ..to(State::InDoubt) })
        }
        (State::Pending | State::Dead, Event::Cancelled) => at_once(Standing { lost: 0, ..to(State::Cancelled) }),
        (_, Event::Cancelled) => refuse("cancelled"),
    }
}

/// Pending again while attempts are left, over otherwise.
fn again(standing: Standing, policy: &Policy, wait: Option<Duration>, draw: f64) -> Next {
    if standing.attempts >= policy.retry.max_attempts && !planted!("attempts-without-end") {
        return Next { standing: over(standing, policy, State::Dead), delay: Duration::ZERO };
    }
    let delay = wait.unwrap_or_else(|| policy.retry.backoff(standing.attempts, draw));
    Next { standing, delay }
}

/// Not tried again by itself: in this state, or in doubt if one of its attempts may have done it.
fn over(standing: Standing, policy: &Policy, state: State) -> Standing {
    let unseen = policy.repeats() && standing.lost > 0 && !planted!("dead-though-unseen");
    Standing { state: if unseen { State::InDoubt } else { state }, lost: 0, ..standing }
}

#[cfg(test)]
mod tests;
