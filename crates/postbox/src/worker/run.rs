//! Attempts under way: called in turn by one task for as long as none of them waits, and in tasks of
//! their own from then on.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{self, Poll};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};

use super::attempt::{Attempt, Called};
use super::core::{Cancel, Ended, Event, Hold};
use crate::lifecycle::{End, Kind};
use crate::store::Database;

/// The most attempts of a run.
const MOST: usize = 64;
/// After this long, a run hands out the rest of its attempts: it is not handlers that do next to nothing.
const LONG: Duration = Duration::from_micros(200);
/// After this long, the engine does it: one of them blocks its thread.
pub(super) const LATE: Duration = Duration::from_millis(1);

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who writes an attempt's end: either it seals its own, or somebody cancels it; never both.
#[derive(Debug, Default)]
pub(super) struct Fate(Mutex<Stage>);

#[derive(Debug, Default)]
enum Stage {
    /// In a task of its own, if there is one.
    #[default]
    InRun,
    Alone(tokio::task::AbortHandle),
    Sealed,
    Cancelled,
}

impl Fate {
    /// The end is decided here; a cancellation that comes later is too late.
    pub(super) fn seal(&self) -> bool {
        let mut stage = locked(&self.0);
        if let Stage::Cancelled = *stage {
            return false;
        }
        *stage = Stage::Sealed;
        true
    }

    pub(super) fn is_cancelled(&self) -> bool {
        matches!(*locked(&self.0), Stage::Cancelled)
    }

    /// It goes on in this task, which a cancellation aborts.
    pub(super) fn goes_on(&self, task: tokio::task::AbortHandle) {
        let mut stage = locked(&self.0);
        match *stage {
            Stage::InRun => *stage = Stage::Alone(task),
            Stage::Cancelled => task.abort(),
            Stage::Alone(_) | Stage::Sealed => {}
        }
    }
}

/// A call as the engine remembers it.
pub(super) struct Running {
    pub(super) fate: Arc<Fate>,
    /// All that are in it, if it is a batch handler's.
    pub(super) members: Vec<Hold>,
    pub(super) operation: bool,
    pub(super) started: Instant,
}

impl Running {
    /// Cancels the handler, unless its end is being written already. The end is reported at once;
    /// the permit comes back when the handler is really gone.
    pub(super) fn cancel(&self, hold: Hold, why: Cancel, events: &mpsc::UnboundedSender<Event>) {
        let mut stage = locked(&self.fate.0);
        if let Stage::Sealed | Stage::Cancelled = *stage {
            return;
        }
        let ran = self.started.elapsed();
        let (end, words) = match why {
            Cancel::TimedOut => (End::TimedOut, format!("no end after {ran:.1?}: timed out")),
            Cancel::Stopped | Cancel::Fenced if self.operation => {
                (End::InDoubt, "the worker stopped while it ran".to_owned())
            }
            Cancel::Stopped | Cancel::Fenced => (
                End::Failed { permanent: false, retry_after: Some(Duration::ZERO) },
                "the worker stopped while it ran".to_owned(),
            ),
        };
        let ended = Ended { ran, fenced: why == Cancel::Fenced, cut_off: true, ..Ended::new(end, Some(words)) };
        // Told first: that it is gone comes after.
        if self.members.is_empty() {
            events.send(Event::Ended(hold, Box::new(ended))).ok();
        } else {
            // Of those that it shares the call with, only some are in the lease that was lost.
            let each = |member: &Hold| {
                let fenced = ended.fenced && member.0 == hold.0;
                (*member, Box::new(Ended { fenced, ..ended.clone() }))
            };
            events.send(Event::EndedTogether(self.members.iter().map(each).collect())).ok();
        }
        if let Stage::Alone(task) = std::mem::replace(&mut *stage, Stage::Cancelled) {
            task.abort();
        }
    }
}

/// Gives the permit back when the task is gone, however it went.
pub(super) struct Permit(pub(super) mpsc::UnboundedSender<Event>, pub(super) Hold);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.send(Event::Freed(self.1)).ok();
    }
}

/// Gives an attempt a task of its own, from the start or from where it waits.
fn alone<Db: Database>(attempt: Attempt<Db>, called: Option<(Called, Instant)>) {
    let (events, hold, fate) = (attempt.means.events.clone(), attempt.hold, attempt.fate.clone());
    let permit = Permit(events.clone(), hold);
    let attempt = Box::new(attempt);
    let task = tokio::spawn({
        let fate = fate.clone();
        async move {
            let _permit = permit;
            if fate.is_cancelled() {
                return;
            }
            let started = called.as_ref().map_or_else(Instant::now, |(_, started)| *started);
            let mut ended = match called {
                Some((called, _)) => attempt.go_on(called).await,
                None => attempt.perform().await,
            };
            ended.ran = started.elapsed();
            if ended.settled || ended.fenced || fate.seal() {
                events.send(Event::Ended(hold, Box::new(ended))).ok();
            }
        }
    });
    fate.goes_on(task.abort_handle());
}

/// Several attempts that one task calls in turn, each until it waits for something: one that ends without
/// costs no task and no event of its own.
pub(super) struct Run<Db: Database> {
    state: Mutex<State<Db>>,
    begun: Instant,
    bell: Arc<Notify>,
}

/// A hold whose handler is gone, and what it came to; nothing, if that was told already, or if nobody can.
pub(super) type Through = (Hold, Option<Box<Ended>>);

struct State<Db: Database> {
    waiting: VecDeque<Attempt<Db>>,
    through: Vec<Through>,
    over: bool,
}

/// Starts these: in runs, and in tasks of their own where one would do no good.
pub(super) fn start<Db: Database>(attempts: Vec<Attempt<Db>>, bell: &Arc<Notify>) -> Vec<Arc<Run<Db>>> {
    // A transactional handler begins with a round trip.
    let (apart, mut together): (Vec<_>, Vec<_>) =
        attempts.into_iter().partition(|attempt| attempt.kind == Kind::Transactional);
    apart.into_iter().for_each(|attempt| alone(attempt, None));
    let mut runs = Vec::new();
    while !together.is_empty() {
        let rest = together.split_off(together.len().min(MOST));
        let waiting = VecDeque::from(std::mem::replace(&mut together, rest));
        let through = Vec::with_capacity(waiting.len());
        let run = Arc::new(Run {
            state: Mutex::new(State { waiting, through, over: false }),
            begun: Instant::now(),
            bell: bell.clone(),
        });
        tokio::spawn(run.clone().work());
        runs.push(run);
    }
    runs
}

impl<Db: Database> Run<Db> {
    async fn work(self: Arc<Self>) {
        std::future::poll_fn(|context| {
            self.call_all(context);
            Poll::Ready(())
        })
        .await;
        self.bell.notify_one();
    }

    fn call_all(&self, context: &mut task::Context<'_>) {
        let begun = Instant::now();
        let mut through = None;
        loop {
            let attempt = {
                let mut state = locked(&self.state);
                state.through.extend(through.take());
                let Some(attempt) = state.waiting.pop_front() else {
                    state.over = true;
                    return;
                };
                attempt
            };
            let hold = attempt.hold;
            // Whatever panics besides the handler itself, on its way out say, concerns this one alone.
            through = match catch_unwind(AssertUnwindSafe(|| once(attempt, context))) {
                Ok(Poll::Ready(ended)) => Some((hold, ended.map(Box::new))),
                Ok(Poll::Pending) => None,
                Err(_) => Some((hold, None)),
            };
            if begun.elapsed() > LONG {
                self.hand_out();
            }
        }
    }

    /// Gives a task of its own to each that still waits.
    fn hand_out(&self) {
        let waiting = std::mem::take(&mut locked(&self.state).waiting);
        waiting.into_iter().for_each(|attempt| alone(attempt, None));
    }

    /// Takes what is through, and looks after the rest: one may have blocked the thread. When to look again;
    /// `None`: it rings.
    pub(super) fn look(&self, now: Instant, through: &mut Vec<Through>) -> Look {
        let mut state = locked(&self.state);
        through.append(&mut state.through);
        if state.over {
            return Look::Over;
        }
        let late_at = self.begun + LATE;
        if state.waiting.is_empty() {
            Look::Rings
        } else if now < late_at {
            Look::Again(late_at)
        } else {
            drop(state);
            self.hand_out();
            Look::Rings
        }
    }
}

/// How a run stands.
pub(super) enum Look {
    Over,
    /// It rings when there is something.
    Rings,
    /// To be looked at then.
    Again(Instant),
}

/// Calls an attempt until it waits; from then on it has a task of its own.
fn once<Db: Database>(attempt: Attempt<Db>, context: &mut task::Context<'_>) -> Poll<Option<Ended>> {
    if attempt.fate.is_cancelled() {
        return Poll::Ready(None);
    }
    let started = Instant::now();
    let fate = attempt.fate.clone();
    let mut ended = match attempt.call() {
        Err(ended) => *ended,
        Ok(mut called) => match attempt.poll(&mut called, context) {
            Poll::Ready(ended) => ended,
            Poll::Pending => {
                alone(attempt, Some((called, started)));
                return Poll::Pending;
            }
        },
    };
    ended.ran = started.elapsed();
    Poll::Ready((ended.fenced || fate.seal()).then_some(ended))
}
