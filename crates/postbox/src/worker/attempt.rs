//! One attempt: resolve the handler, perform, judge, report.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::{self, Poll};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use serde_json::Value;
use tokio::sync::mpsc;

use super::core::{Ended, Event, Hold};
use super::run::Fate;
use super::{Life, Moment, told};
use crate::context::Context;
use crate::crash;
use crate::handler::{self, BoxFuture, Call, Failure, Tx};
use crate::lifecycle::{End, Kind, Standing, State};
use crate::message::{Draft, Envelope};
use crate::operation::{Done, FollowUps, OperationFailure, Receipt};
use crate::router::{Bound, Ran};
use crate::settings::hide_password;
use crate::store::{Database, Guarded, Item, LeaseRef, Move, OutcomeRecord, Store};

/// The longest error kept, in bytes.
const MAX_ERROR_BYTES: usize = 4096;
/// The largest receipt kept, in bytes.
const MAX_RECEIPT_BYTES: usize = 64 << 10;

/// What all attempts of a worker need.
pub(super) struct Means<Db: Database> {
    pub(super) store: Db::Store,
    pub(super) life: Arc<Life>,
    pub(super) lease_time: Duration,
    pub(super) patience: Duration,
    pub(super) max_payload_bytes: usize,
    pub(super) events: mpsc::UnboundedSender<Event>,
}

pub(super) struct Attempt<Db: Database> {
    pub(super) means: Arc<Means<Db>>,
    pub(super) handler: Arc<dyn Bound<Db>>,
    pub(super) kind: Kind,
    pub(super) max_attempts: u32,
    pub(super) timeout: Duration,
    pub(super) hold: Hold,
    pub(super) lease: LeaseRef,
    pub(super) item: Box<Item>,
    pub(super) number: u32,
    /// Its permit is good for as long as the lease is.
    pub(super) limited: bool,
    pub(super) fate: Arc<Fate>,
}

impl Ended {
    pub(super) fn new(end: End, error: Option<String>) -> Ended {
        Ended { error: error.map(clean), ..Ended::of(end) }
    }

    pub(super) fn failed(error: impl std::fmt::Display, permanent: bool) -> Ended {
        Ended::new(End::Failed { permanent, retry_after: None }, Some(error.to_string()))
    }
}

/// An operation that goes on only within its timeout. Where the process was stopped or its machine was
/// suspended, a wake-up may come before the cancellation does; what it was about to send then is not sent.
struct Timely {
    called: Moment,
    timeout: Duration,
}

/// A handler that was called, and has not returned yet.
pub(super) struct Called {
    call: Call,
    future: BoxFuture<Ran>,
    limit: Option<Timely>,
}

impl Called {
    fn poll(&mut self, context: &mut task::Context<'_>) -> Poll<Result<Ran, Ended>> {
        if let Some(limit) = self.limit.as_ref().filter(|limit| limit.called.elapsed() >= limit.timeout) {
            let words = format!("no end after {:.1?}: the process slept through its timeout", limit.timeout);
            return Poll::Ready(Err(Ended::new(End::TimedOut, Some(words))));
        }
        match catch_unwind(AssertUnwindSafe(|| self.future.as_mut().poll(context))) {
            Ok(poll) => poll.map(Ok),
            Err(panic) => Poll::Ready(Err(Ended::new(End::Panicked, Some(panic_words(&*panic))))),
        }
    }
}

impl<Db: Database> Attempt<Db> {
    fn envelope(&self) -> Result<&Arc<Envelope>, Box<Ended>> {
        let gone = "its message is gone: retention or a restore took it before it was delivered";
        self.item.envelope.as_ref().ok_or_else(|| Box::new(Ended::failed(gone, true)))
    }

    /// Who slept through its lease has no permits any more: others run with them.
    fn holds_its_permit(&self) -> Result<(), Box<Ended>> {
        match self.limited && self.means.life.is_over(self.lease.worker) {
            false => Ok(()),
            true => {
                let ended = Ended::failed("the lease ran out, and the permit with it, before the call was made", false);
                Err(Box::new(Ended { not_called: true, ..ended }))
            }
        }
    }

    fn read(&self, envelope: &Arc<Envelope>) -> Call {
        Call {
            envelope: envelope.clone(),
            attempt: handler::Attempt { number: self.number, max: self.max_attempts, delivery: self.item.delivery },
        }
    }

    /// The whole of it, in a task of its own.
    pub(super) async fn perform(self: Box<Self>) -> Ended {
        if self.kind == Kind::Transactional {
            let call = match self.envelope() {
                Ok(envelope) => self.read(envelope),
                Err(ended) => return *ended,
            };
            // Boxed: what a task is made of is copied several times when it starts.
            return Context::of(&call.envelope).scope(Box::pin(self.transactional(call))).await;
        }
        match self.call() {
            Ok(called) => self.go_on(called).await,
            Err(ended) => *ended,
        }
    }

    /// Calls a plain handler or an operation: the outcome follows the effect.
    pub(super) fn call(&self) -> Result<Called, Box<Ended>> {
        let envelope = self.envelope()?;
        if self.kind == Kind::Operation {
            crash::point("attempt-committed");
            // A process that slept through its lease must not call: others may have taken over.
            if self.means.life.is_over(self.lease.worker) {
                return Err(Box::new(Ended::failed("the lease ran out before the call was made", false)));
            }
        }
        self.holds_its_permit()?;
        let call = self.read(envelope);
        let called =
            catch_unwind(AssertUnwindSafe(|| Context::of(envelope).scope_sync(|| self.handler.run(&call, None))));
        let future = match called {
            Ok(Ok(future)) => future,
            Ok(Err(rejection)) => return Err(Box::new(Ended::failed(rejection.0, true))),
            Err(panic) => return Err(Box::new(Ended::new(End::Panicked, Some(panic_words(&*panic))))),
        };
        let limit = (self.kind == Kind::Operation).then(|| Timely { called: Moment::now(), timeout: self.timeout });
        Ok(Called { call, future, limit })
    }

    /// One step of it.
    pub(super) fn poll(&self, called: &mut Called, context: &mut task::Context<'_>) -> Poll<Ended> {
        Context::of(&called.call.envelope).scope_sync(|| self.step(called, context))
    }

    fn step(&self, called: &mut Called, context: &mut task::Context<'_>) -> Poll<Ended> {
        called.poll(context).map(|ran| match ran {
            Ok(ran) => self.ended(&called.call, ran),
            Err(ended) => ended,
        })
    }

    /// The rest of it.
    pub(super) async fn go_on(self: Box<Self>, mut called: Called) -> Ended {
        let context = Context::of(&called.call.envelope);
        context.scope(std::future::poll_fn(move |context| self.step(&mut called, context))).await
    }

    /// What a plain handler or an operation came to.
    fn ended(&self, call: &Call, ran: Ran) -> Ended {
        let max_payload_bytes = self.means.max_payload_bytes;
        match ran {
            Ran::Plain(Ok(done)) => succeeded(done, max_payload_bytes),
            Ran::Plain(Err(failure)) => ended_by(failure),
            Ran::Operation(result) => judge(&*self.handler, call, result, max_payload_bytes),
        }
    }

    /// A transactional handler: effects and outcome commit together, or not at all.
    async fn transactional(self: Box<Self>, call: Call) -> Ended {
        // An idle transaction must not outlive its lease.
        let tx = match self.means.store.open(self.lease, self.timeout.min(self.means.lease_time)).await {
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
        if let Err(ended) = self.holds_its_permit() {
            return *ended;
        }
        let started = Instant::now();
        let (tx, home) = Tx::lend(tx);
        let called = AssertUnwindSafe(async { self.handler.run(&call, Some(tx)) }).catch_unwind().await;
        let future = match called {
            Ok(Ok(future)) => future,
            Ok(Err(rejection)) => return Ended::failed(rejection.0, true),
            Err(panic) => return Ended::new(End::Panicked, Some(panic_words(&*panic))),
        };
        let follow_ups = match AssertUnwindSafe(future).catch_unwind().await {
            Ok(Ran::Plain(Ok(done))) => done.follow_ups,
            Ok(Ran::Plain(Err(failure))) => return ended_by(failure),
            Ok(Ran::Operation(_)) => return Ended::failed("an operation cannot be transactional", true),
            Err(panic) => return Ended::new(End::Panicked, Some(panic_words(&*panic))),
        };
        let follow_ups = match follow_ups.checked(self.means.max_payload_bytes) {
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
        if !self.fate.seal() {
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
            leads: self.item.leads,
        };
        let settled = Ended { settled: true, ..Ended::new(End::Succeeded, None) };
        let fenced =
            || Ended { fenced: true, ..Ended::failed("the lease was lost; the transaction was rolled back", false) };
        let settling = self.means.store.settle_open(tx, self.lease, &outcome, &follow_ups);
        let error = match tokio::time::timeout(self.means.patience, settling).await {
            Ok(Ok(Guarded::Done)) => return settled,
            Ok(Ok(Guarded::Fenced)) => return fenced(),
            Ok(Err(error)) if error.is_transient() => error.to_string(),
            Ok(Err(error)) => return Ended::failed(error, false),
            Err(_) => "the commit got no answer".to_owned(),
        };
        // The COMMIT's answer was lost: ask, once nobody can still be committing it.
        let mut pause = Duration::from_millis(50);
        loop {
            let asked = self.means.store.recheck(self.lease, self.item.delivery, self.number);
            match told("recheck", self.means.patience, asked).await {
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

pub(super) fn ended_by(failure: Failure) -> Ended {
    Ended { not_called: failure.untried, ..Ended::new(failure.end, Some(failure.error)) }
}

/// A plain handler's success.
pub(super) fn succeeded(done: Done, max_payload_bytes: usize) -> Ended {
    match done.follow_ups.checked(max_payload_bytes) {
        Ok(follow_ups) => Ended { follow_ups, receipt: done.receipt.map(clean_receipt), ..Ended::of(End::Succeeded) },
        Err(error) => Ended::failed(format!("a follow-up message cannot be published: {error}"), true),
    }
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
    use std::sync::atomic::{AtomicU8, Ordering};

    use super::*;
    use crate::store::Stored;

    #[tokio::test]
    async fn an_operation_that_slept_through_its_timeout_does_not_go_on() {
        let timeout = Duration::from_secs(60);
        let sent = Arc::new(AtomicU8::new(0));
        let envelope = Envelope::raw("t", "1").expect("a draft");
        let envelope = crate::postbox::published(envelope, Stored::New(uuid::Uuid::now_v7()));
        let envelope = Arc::new(envelope.expect("published").into_envelope());
        let send = |called| {
            let (sent, envelope) = (sent.clone(), envelope.clone());
            let future = async move {
                sent.fetch_add(1, Ordering::SeqCst);
                Ran::Operation(Ok(Receipt::none()))
            };
            let attempt = handler::Attempt { number: 1, max: 1, delivery: 1 };
            let limit = Some(Timely { called, timeout });
            let mut called = Called { call: Call { envelope, attempt }, future: Box::pin(future), limit };
            std::future::poll_fn(move |context| called.poll(context)).map(|ran| ran.err().map(|ended| ended.end))
        };
        assert_eq!(send(Moment::now()).await, None);
        let long_ago = Moment { instant: Instant::now().checked_sub(timeout).expect("it was up"), ..Moment::now() };
        assert_eq!(send(long_ago).await, Some(End::TimedOut));
        let suspended = Moment { wall: std::time::SystemTime::now() - timeout, ..Moment::now() };
        let words = "the monotonic clock stands still while a machine is suspended";
        assert_eq!(send(suspended).await, Some(End::TimedOut), "{words}");
        assert_eq!(sent.load(Ordering::SeqCst), 1);
    }
}
