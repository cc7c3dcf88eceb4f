//! One attempt: resolve the handler, perform, judge, report.

use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{self, Poll};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use serde_json::Value;
use tokio::sync::mpsc;

use super::core::{Cancel, Ended, Event, Hold};
use super::{Life, Moment, told};
use crate::context::Context;
use crate::crash;
use crate::handler::{self, Call, Failure, Tx};
use crate::lifecycle::{End, Kind, Standing, State};
use crate::message::Draft;
use crate::operation::{FollowUps, Operation, OperationFailure, Receipt};
use crate::router::{Bound, Ran};
use crate::settings::hide_password;
use crate::store::{Database, Guarded, Item, LeaseRef, Move, OutcomeRecord, Store};

/// The longest error kept, in bytes.
const MAX_ERROR_BYTES: usize = 4096;
/// The largest receipt kept, in bytes.
const MAX_RECEIPT_BYTES: usize = 64 << 10;

pub(super) struct Attempt<Db: Database> {
    pub(super) store: Db::Store,
    pub(super) handler: Arc<dyn Bound<Db>>,
    pub(super) kind: Kind,
    pub(super) max_attempts: u32,
    pub(super) timeout: Duration,
    pub(super) hold: Hold,
    pub(super) lease: LeaseRef,
    pub(super) item: Item,
    pub(super) number: u32,
    pub(super) life: Arc<Life>,
    pub(super) lease_time: Duration,
    pub(super) patience: Duration,
    pub(super) events: mpsc::UnboundedSender<Event>,
    pub(super) max_payload_bytes: usize,
}

const OPEN: u8 = 0;
const SEALED: u8 = 1;
const CANCELLED: u8 = 2;

/// An attempt that runs: either it seals its own end, or somebody cancels it; never both.
pub(super) struct Running {
    fate: Arc<AtomicU8>,
    abort: tokio::task::AbortHandle,
    hold: Hold,
    operation: bool,
    started: Instant,
    events: mpsc::UnboundedSender<Event>,
}

impl Running {
    /// Cancels the handler, unless its end is being written already. The end is reported at once;
    /// the permit comes back when the task is really gone.
    pub(super) fn cancel(&self, why: Cancel) {
        if self.fate.compare_exchange(OPEN, CANCELLED, Ordering::SeqCst, Ordering::SeqCst).is_err() {
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
        // Told first: that the task is gone comes after.
        self.events.send(Event::Ended(self.hold, Box::new(ended))).ok();
        self.abort.abort();
    }
}

impl Ended {
    fn new(end: End, error: Option<String>) -> Ended {
        Ended { error: error.map(clean), ..Ended::of(end) }
    }

    fn failed(error: impl std::fmt::Display, permanent: bool) -> Ended {
        Ended::new(End::Failed { permanent, retry_after: None }, Some(error.to_string()))
    }
}

/// Gives the permit back when the task is gone, however it went.
struct Permit(mpsc::UnboundedSender<Event>, Hold);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.send(Event::Freed(self.1)).ok();
    }
}

/// Starts an attempt in a task of its own.
pub(super) fn run<Db: Database>(attempt: Attempt<Db>) -> Running {
    let fate = Arc::new(AtomicU8::new(OPEN));
    let attempt = Box::new(attempt);
    let (hold, events, operation) = (attempt.hold, attempt.events.clone(), attempt.kind == Kind::Operation);
    let permit = Permit(events.clone(), hold);
    let started = Instant::now();
    let task = {
        let (fate, events) = (fate.clone(), events.clone());
        tokio::spawn(async move {
            let _permit = permit;
            let mut ended = attempt.perform(&fate).await;
            ended.ran = started.elapsed();
            if ended.settled || ended.fenced || seal(&fate) {
                events.send(Event::Ended(hold, Box::new(ended))).ok();
            }
        })
    };
    Running { fate, abort: task.abort_handle(), hold, operation, started, events }
}

/// An operation that goes on only within its timeout. Where the process was stopped or its machine was
/// suspended, a wake-up may come before the cancellation does; what it was about to send then is not sent.
struct Timely<F> {
    future: Pin<Box<F>>,
    called: Moment,
    timeout: Duration,
}

impl<F: Future> Future for Timely<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut task::Context<'_>) -> Poll<Self::Output> {
        if self.called.elapsed() >= self.timeout {
            return Poll::Ready(None);
        }
        self.future.as_mut().poll(context).map(Some)
    }
}

/// The end is decided here; a cancellation that comes later is too late.
fn seal(fate: &AtomicU8) -> bool {
    matches!(fate.compare_exchange(OPEN, SEALED, Ordering::SeqCst, Ordering::SeqCst), Ok(_) | Err(SEALED))
}

impl<Db: Database> Attempt<Db> {
    async fn perform(self: Box<Self>, fate: &Arc<AtomicU8>) -> Ended {
        let Some(envelope) = self.item.envelope.clone() else {
            return Ended::failed("its message is gone: retention or a restore took it before it was delivered", true);
        };
        let context = Context::of(&envelope);
        let call = Call {
            attempt: handler::Attempt { number: self.number, max: self.max_attempts, delivery: self.item.delivery },
            operation: Operation::of(envelope.id, self.item.delivery, self.number),
            envelope,
        };
        match self.kind {
            // Boxed: what a task is made of is copied several times when it starts.
            Kind::Transactional => context.scope(Box::pin(self.transactional(call, fate.clone()))).await,
            Kind::Plain | Kind::Operation => context.scope(Box::pin(self.outside(call))).await,
        }
    }

    /// A plain handler or an operation: the outcome follows the effect.
    async fn outside(self: Box<Self>, call: Call) -> Ended {
        if self.kind == Kind::Operation {
            crash::point("attempt-committed");
            // A process that slept through its lease must not call: others may have taken over.
            if self.life.is_over(self.lease.worker) {
                return Ended::failed("the lease ran out before the call was made", false);
            }
        }
        let called = AssertUnwindSafe(async { self.handler.run(&call, None) }).catch_unwind().await;
        let future = match called {
            Ok(Ok(future)) => future,
            Ok(Err(rejection)) => return Ended::failed(rejection.0, true),
            Err(panic) => return Ended::new(End::Panicked, Some(panic_words(&*panic))),
        };
        let future = AssertUnwindSafe(future).catch_unwind();
        let ran = match self.kind {
            Kind::Operation => Timely { future: Box::pin(future), called: Moment::now(), timeout: self.timeout }.await,
            _ => Some(future.await),
        };
        let Some(ran) = ran else {
            let words = format!("no end after {:.1?}: the process slept through its timeout", self.timeout);
            return Ended::new(End::TimedOut, Some(words));
        };
        match ran {
            Ok(Ran::Plain(Ok(follow_ups))) => match follow_ups.checked(self.max_payload_bytes) {
                Ok(follow_ups) => Ended { follow_ups, ..Ended::new(End::Succeeded, None) },
                Err(error) => Ended::failed(format!("a follow-up message cannot be published: {error}"), true),
            },
            Ok(Ran::Plain(Err(failure))) => ended_by(failure),
            Ok(Ran::Operation(result)) => judge(&*self.handler, &call, result, self.max_payload_bytes),
            Err(panic) => Ended::new(End::Panicked, Some(panic_words(&*panic))),
        }
    }

    /// A transactional handler: effects and outcome commit together, or not at all.
    async fn transactional(self: Box<Self>, call: Call, fate: Arc<AtomicU8>) -> Ended {
        // An idle transaction must not outlive its lease.
        let tx = match self.store.open(self.lease, self.timeout.min(self.lease_time)).await {
            Ok(tx) => tx,
            Err(error) => {
                // Not the handler's fault, and it was not called.
                tracing::warn!(delivery = self.item.delivery, %error, "no transaction could be opened; put off");
                return Ended {
                    not_called: true,
                    ..Ended::failed(format!("no transaction could be opened: {error}"), false)
                };
            }
        };
        let started = Instant::now();
        let (tx, home) = Tx::lend(tx);
        let called = AssertUnwindSafe(async { self.handler.run(&call, Some(tx)) }).catch_unwind().await;
        let future = match called {
            Ok(Ok(future)) => future,
            Ok(Err(rejection)) => return Ended::failed(rejection.0, true),
            Err(panic) => return Ended::new(End::Panicked, Some(panic_words(&*panic))),
        };
        let follow_ups = match AssertUnwindSafe(future).catch_unwind().await {
            Ok(Ran::Plain(Ok(follow_ups))) => follow_ups,
            Ok(Ran::Plain(Err(failure))) => return ended_by(failure),
            Ok(Ran::Operation(_)) => return Ended::failed("an operation cannot be transactional", true),
            Err(panic) => return Ended::new(End::Panicked, Some(panic_words(&*panic))),
        };
        let follow_ups = match follow_ups.checked(self.max_payload_bytes) {
            Ok(follow_ups) => follow_ups,
            Err(error) => return Ended::failed(format!("a follow-up message cannot be published: {error}"), true),
        };
        let returned = home.lock().ok().and_then(|mut home| home.take());
        let Some(tx) = returned else {
            return Ended::failed(
                "the handler moved its Tx to another task; it must be dropped when the handler returns",
                true,
            );
        };
        // From here on nobody cancels: in a task of its own, so that an abort does not reach it.
        if !seal(&fate) {
            return Ended::failed("cancelled", false);
        }
        match tokio::spawn(self.commit(tx, follow_ups, started)).await {
            Ok(ended) => ended,
            Err(error) => Ended::failed(format!("the commit was lost: {error}"), false),
        }
    }

    async fn commit(self: Box<Self>, tx: <Db::Store as Store>::Tx, follow_ups: Vec<Draft>, started: Instant) -> Ended {
        let outcome = Move {
            delivery: self.item.delivery,
            message: self.item.message,
            subscription: self.item.subscription,
            priority: self.item.priority,
            rev: self.item.rev + 1,
            standing: Standing { state: State::Succeeded, attempts: self.number, begun: false, lost: 0 },
            delay: Duration::ZERO,
            quiet: Duration::ZERO,
            note: String::new(),
            outcome: Some(OutcomeRecord {
                number: self.number,
                kind: "succeeded",
                error: None,
                receipt: None,
                ran: started.elapsed(),
                ago: Duration::ZERO,
            }),
        };
        let settled = Ended { settled: true, ..Ended::new(End::Succeeded, None) };
        let fenced =
            || Ended { fenced: true, ..Ended::failed("the lease was lost; the transaction was rolled back", false) };
        let settling = self.store.settle_open(tx, self.lease, &outcome, &follow_ups);
        let error = match tokio::time::timeout(self.patience, settling).await {
            Ok(Ok(Guarded::Done)) => return settled,
            Ok(Ok(Guarded::Fenced)) => return fenced(),
            Ok(Err(error)) if error.is_transient() => error.to_string(),
            Ok(Err(error)) => return Ended::failed(error, false),
            Err(_) => "the commit got no answer".to_owned(),
        };
        // The COMMIT's answer was lost: ask, once nobody can still be committing it.
        let mut pause = Duration::from_millis(50);
        loop {
            let asked = self.store.recheck(self.lease, self.item.delivery, self.number);
            match told("recheck", self.patience, asked).await {
                Some(Some(true)) => return settled,
                Some(Some(false)) => return Ended::failed(error, false),
                Some(None) => return fenced(),
                None => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }
}

fn ended_by(failure: Failure) -> Ended {
    Ended::new(failure.end, Some(failure.error))
}

/// What an operation's return says about the world.
fn judge<Db: Database>(
    handler: &dyn Bound<Db>,
    call: &Call,
    result: Result<Receipt, OperationFailure>,
    max_payload_bytes: usize,
) -> Ended {
    match result {
        Ok(receipt) => {
            let content = receipt.content.clone().map(clean_receipt);
            match continued(handler, call, receipt, max_payload_bytes) {
                Ok(follow_ups) => Ended { receipt: content, follow_ups, ..Ended::new(End::Succeeded, None) },
                // It happened, but what follows from it cannot be stored: a person must look.
                Err(error) => Ended {
                    receipt: content,
                    ..Ended::new(End::InDoubt, Some(format!("the remote said that it is done, but {error}")))
                },
            }
        }
        Err(OperationFailure::InDoubt { error }) => Ended::new(End::InDoubt, Some(error)),
        Err(OperationFailure::NotDone { error, retry_after }) => {
            Ended::new(End::Failed { permanent: false, retry_after }, Some(error))
        }
        Err(OperationFailure::Refused { error }) => Ended::failed(error, true),
        Err(OperationFailure::Discarded { reason }) => Ended::new(End::Discarded, Some(reason)),
    }
}

/// The follow-ups of a success: those of the receipt, and those that hang on the operation.
pub(super) fn continued<Db: Database>(
    handler: &dyn Bound<Db>,
    call: &Call,
    receipt: Receipt,
    max_payload_bytes: usize,
) -> Result<Vec<Draft>, String> {
    let hanging = std::panic::catch_unwind(AssertUnwindSafe(|| handler.continues(call, &receipt)))
        .map_err(|panic| format!("its `then` panicked: {}", panic_words(&*panic)))?
        .map_err(|rejection| rejection.0)?;
    let mut follow_ups: FollowUps = receipt.follow_ups;
    follow_ups.append(hanging);
    follow_ups.checked(max_payload_bytes).map_err(|e| format!("a follow-up message cannot be published: {e}"))
}

pub(super) fn panic_words(panic: &(dyn std::any::Any + Send)) -> String {
    let words =
        panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
    format!("the handler panicked: {}", words.unwrap_or_else(|| "without a message".into()))
}

/// An error as it may be kept: bounded, without NUL, without a URL's password.
pub(super) fn clean(error: String) -> String {
    let mut error: String = error
        .replace('\0', "\u{fffd}")
        .split(' ')
        .map(|word| if word.contains("://") { hide_password(word) } else { word.to_owned() })
        .collect::<Vec<_>>()
        .join(" ");
    if error.len() > MAX_ERROR_BYTES {
        let cut = (0..=MAX_ERROR_BYTES).rev().find(|i| error.is_char_boundary(*i)).unwrap_or(0);
        error.truncate(cut);
        error.push_str(" … (cut)");
    }
    error
}

/// A receipt as it may be kept: something that every store takes.
pub(super) fn clean_receipt(receipt: Value) -> Value {
    let text = receipt.to_string();
    if text.len() > MAX_RECEIPT_BYTES {
        return serde_json::json!({ "cut": clean(text.chars().take(1024).collect()), "bytes": text.len() });
    }
    match crate::json::check(&text) {
        Ok(_) => receipt,
        Err(error) => serde_json::json!({ "unstorable": error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_operation_that_slept_through_its_timeout_does_not_go_on() {
        let timeout = Duration::from_secs(60);
        let sent = Arc::new(AtomicU8::new(0));
        let send = |called| {
            let sent = sent.clone();
            let call = async move { sent.fetch_add(1, Ordering::SeqCst) };
            Timely { future: Box::pin(call), called, timeout }
        };
        assert_eq!(send(Moment::now()).await, Some(0));
        let long_ago = Moment { instant: Instant::now().checked_sub(timeout).expect("it was up"), ..Moment::now() };
        assert_eq!(send(long_ago).await, None);
        let suspended = Moment { wall: std::time::SystemTime::now() - timeout, ..Moment::now() };
        assert_eq!(send(suspended).await, None, "the monotonic clock stands still while a machine is suspended");
        assert_eq!(sent.load(Ordering::SeqCst), 1);
    }
}
