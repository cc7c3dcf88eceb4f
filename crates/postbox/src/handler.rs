//! Handlers: async functions whose arguments say what they need and what they promise.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use serde::de::DeserializeOwned;

use crate::content::{Bytes, Content};
use crate::lifecycle::End;
use crate::message::Envelope;
use crate::operation::{Done, Operation, OperationFailure, Receipt, Reconciled};
use crate::store::{AsConnection, Database, HandlerTx, Store};

mod batch;
mod together;

pub(crate) use batch::{Answers, Gather, Reading, Start, Unread, read};
pub use batch::{Batch, BatchHandler, BatchPayload, Delivered, IntoOutcomes, Outcomes};
pub use together::{Several, Together};

/// How a plain or transactional handler's attempt did not succeed. `?` on any error gives a retry.
#[derive(Debug, Clone)]
pub struct Failure {
    pub(crate) error: String,
    pub(crate) end: End,
    /// Nothing was tried: this is no attempt.
    pub(crate) untried: bool,
}

impl Failure {
    fn of(error: impl fmt::Display, end: End) -> Self {
        Failure { error: error.to_string(), end, untried: false }
    }

    /// Nothing was tried, for a reason that is not its own: it is handed out again, and that is no attempt.
    pub(crate) fn untried(error: impl fmt::Display) -> Self {
        Failure { untried: true, ..Failure::retry(error) }
    }

    /// Try again, as the subscription's policy says.
    pub fn retry(error: impl fmt::Display) -> Self {
        Failure::of(error, End::Failed { permanent: false, retry_after: None })
    }

    /// Trying again would not help: dead.
    pub fn permanent(error: impl fmt::Display) -> Self {
        Failure::of(error, End::Failed { permanent: true, retry_after: None })
    }

    /// Try again after `wait`, whatever the backoff says.
    pub fn retry_after(error: impl fmt::Display, wait: Duration) -> Self {
        Failure::of(error, End::Failed { permanent: false, retry_after: Some(wait) })
    }

    /// Not now: again after `wait` (at most 10 years), as if it had not been tried. That does not use
    /// up an attempt, unless its start is on record, which it is after a worker died holding it. Each is
    /// on record, up to 100 of one attempt.
    pub fn snooze(wait: Duration) -> Self {
        Failure::of(format_args!("snoozed for {wait:?}"), End::Snoozed { wait })
    }

    /// It is not wanted (any more): cancelled, with this reason, and no dead letter.
    pub fn discard(reason: impl fmt::Display) -> Self {
        Failure::of(reason, End::Discarded)
    }
}

/// An error and its sources, in one line.
pub(crate) fn words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_words = cause.to_string();
        if !words.contains(&cause_words) {
            words = format!("{words}: {cause_words}");
        }
        source = cause.source();
    }
    words
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::retry(words(&error))
    }
}

/// Marks an error as final; becomes a [`Failure`] or an [`OperationFailure`] at `?`.
#[derive(Debug)]
pub struct Permanent(pub(crate) String);
/// Marks an error as worth a retry after a given wait.
#[derive(Debug)]
pub struct RetryAfter(pub(crate) String, pub(crate) Duration);
/// Marks an error of an operation that came before anything irreversible was sent.
#[derive(Debug)]
pub struct NotDone(pub(crate) String);
/// Marks an error that says: not now, and that is no attempt.
#[derive(Debug)]
pub struct Snoozed(pub(crate) String, pub(crate) Duration);
/// Marks an error that says: it is not wanted (any more).
#[derive(Debug)]
pub struct Discarded(pub(crate) String);

impl From<Snoozed> for Failure {
    fn from(Snoozed(error, wait): Snoozed) -> Self {
        Failure::of(error, End::Snoozed { wait })
    }
}

impl From<Discarded> for Failure {
    fn from(Discarded(reason): Discarded) -> Self {
        Failure::discard(reason)
    }
}

impl From<Permanent> for Failure {
    fn from(Permanent(error): Permanent) -> Self {
        Failure::permanent(error)
    }
}

impl From<RetryAfter> for Failure {
    fn from(RetryAfter(error, wait): RetryAfter) -> Self {
        Failure::retry_after(error, wait)
    }
}

/// Verdicts on a `Result`, to be written before the `?`.
pub trait ResultExt<T> {
    /// Trying again would not help. In an operation: the remote refused, it did not happen.
    ///
    /// # Errors
    /// The same error, marked.
    fn permanent(self) -> Result<T, Permanent>;
    /// Try again after `wait`. In an operation: it has not been done.
    ///
    /// # Errors
    /// The same error, marked.
    fn retry_after(self, wait: Duration) -> Result<T, RetryAfter>;
    /// In an operation: nothing irreversible has been sent yet.
    ///
    /// # Errors
    /// The same error, marked.
    fn not_done(self) -> Result<T, NotDone>;
    /// Not now: again after `wait`, and not counted ([`Failure::snooze`]). In an operation: nothing
    /// irreversible has been sent yet; there the attempt is on record and counts.
    ///
    /// # Errors
    /// The same error, marked.
    fn snooze(self, wait: Duration) -> Result<T, Snoozed>;
    /// It is not wanted (any more): cancelled. In an operation: nothing irreversible has been sent.
    ///
    /// # Errors
    /// The same error, marked.
    fn discard(self) -> Result<T, Discarded>;
}

impl<T, E: std::error::Error> ResultExt<T> for Result<T, E> {
    fn permanent(self) -> Result<T, Permanent> {
        self.map_err(|e| Permanent(words(&e)))
    }

    fn retry_after(self, wait: Duration) -> Result<T, RetryAfter> {
        self.map_err(|e| RetryAfter(words(&e), wait))
    }

    fn not_done(self) -> Result<T, NotDone> {
        self.map_err(|e| NotDone(words(&e)))
    }

    fn snooze(self, wait: Duration) -> Result<T, Snoozed> {
        self.map_err(|e| Snoozed(words(&e), wait))
    }

    fn discard(self) -> Result<T, Discarded> {
        self.map_err(|e| Discarded(words(&e)))
    }
}

/// What extractors read from: one delivery's attempt.
#[derive(Debug, Clone)]
pub struct Call {
    pub(crate) envelope: Arc<Envelope>,
    pub(crate) attempt: Attempt,
}

/// Which attempt this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    /// From 1.
    pub number: u32,
    /// How many there may be.
    pub max: u32,
    /// The delivery's number.
    pub delivery: i64,
}

impl Attempt {
    /// A failure of this one will not be tried again by itself.
    pub fn is_last(&self) -> bool {
        self.number >= self.max
    }
}

/// Why a delivery never reached its handler: dead, and for an operation not done.
#[derive(Debug)]
pub struct Rejection(pub(crate) String);

impl Rejection {
    /// With a reason.
    pub fn new(reason: impl fmt::Display) -> Self {
        Rejection(reason.to_string())
    }
}

/// An argument of a handler that is read from the delivery.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be an argument of this handler",
    label = "no extractor",
    note = "arguments may be Payload<T>, Bytes, Envelope, Metadata, State<S>, Attempt and Operation",
    note = "`Tx<Db>` comes last, and only in handlers that are not operations: an irreversible effect cannot be rolled back with a transaction"
)]
pub trait FromDelivery<S>: Sized {
    /// Reads it.
    ///
    /// # Errors
    /// The delivery is dead; the handler is not called.
    fn from_delivery(call: &Call, state: &S) -> Result<Self, Rejection>;
}

/// The payload, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload<T>(pub T);

impl<S, T: DeserializeOwned + 'static> FromDelivery<S> for Payload<T> {
    fn from_delivery(call: &Call, _: &S) -> Result<Self, Rejection> {
        if let Content::Bytes(bytes) = &call.envelope.payload {
            return Err(Rejection(format!("the payload is bytes of {}; take `Bytes`", bytes.content_type())));
        }
        call.envelope.decode().map(Payload).map_err(Rejection::new)
    }
}

impl<S> FromDelivery<S> for Bytes {
    fn from_delivery(call: &Call, _: &S) -> Result<Self, Rejection> {
        let envelope = &call.envelope;
        Ok(match &envelope.payload {
            Content::Bytes(bytes) => bytes.clone(),
            Content::Json(_) => Bytes::new(envelope.content_type(), envelope.payload_bytes()),
        })
    }
}

impl<S> FromDelivery<S> for Envelope {
    fn from_delivery(call: &Call, _: &S) -> Result<Self, Rejection> {
        Ok(call.envelope.as_ref().clone())
    }
}

impl<S> FromDelivery<S> for Attempt {
    fn from_delivery(call: &Call, _: &S) -> Result<Self, Rejection> {
        Ok(call.attempt)
    }
}

impl<S> FromDelivery<S> for Operation {
    fn from_delivery(call: &Call, _: &S) -> Result<Self, Rejection> {
        Ok(Operation::of(call.envelope.id, call.attempt.delivery, call.attempt.number))
    }
}

/// Where a message comes from and what it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metadata {
    /// The message's id.
    pub id: uuid::Uuid,
    /// What everything in one business process shares.
    pub correlation_id: String,
    /// The message that caused it.
    pub causation_id: Option<String>,
    /// When it happened.
    pub occurred_at: Timestamp,
    /// When it was recorded here.
    pub received_at: Timestamp,
    /// Where it came from.
    pub source: Option<String>,
    /// The id its producer gave it.
    pub external_id: Option<String>,
}

impl<S> FromDelivery<S> for Metadata {
    fn from_delivery(call: &Call, _: &S) -> Result<Self, Rejection> {
        let envelope = &call.envelope;
        Ok(Metadata {
            id: envelope.id,
            correlation_id: envelope.correlation(),
            causation_id: envelope.causation_id.clone(),
            occurred_at: envelope.occurred_at,
            received_at: envelope.received_at,
            source: envelope.source.clone(),
            external_id: envelope.external_id.clone(),
        })
    }
}

/// The router's state, or a part of it ([`FromRef`]).
#[derive(Debug, Clone, Copy)]
pub struct State<T>(pub T);

/// Takes a part out of a state.
pub trait FromRef<S> {
    /// The part.
    fn from_ref(state: &S) -> Self;
}

impl<S: Clone> FromRef<S> for S {
    fn from_ref(state: &S) -> S {
        state.clone()
    }
}

impl<S, T: FromRef<S>> FromDelivery<S> for State<T> {
    fn from_delivery(_: &Call, state: &S) -> Result<Self, Rejection> {
        Ok(State(T::from_ref(state)))
    }
}

/// The transaction in which a handler's effects and its outcome commit together. It lends a
/// connection: pass `&mut tx` to sqlx's `execute` and `fetch`, and to `publish`. Commit and
/// rollback are not there to call; an `Err` or a panic rolls back.
///
/// Comes last in a handler's arguments.
pub struct Tx<Db: Database> {
    inner: Option<<Db::Store as Store>::Tx>,
    home: Arc<Mutex<Option<<Db::Store as Store>::Tx>>>,
}

impl<Db: Database> fmt::Debug for Tx<Db> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tx")
    }
}

/// Where a handler's transaction comes back to when the handler lets go of it.
pub(crate) type Home<Db> = Arc<Mutex<Option<<<Db as Database>::Store as Store>::Tx>>>;

impl<Db: Database> Tx<Db> {
    pub(crate) fn lend(tx: <Db::Store as Store>::Tx) -> (Self, Home<Db>) {
        let home = Arc::new(Mutex::new(None));
        (Tx { inner: Some(tx), home: home.clone() }, home)
    }

    fn lent(&mut self) -> &mut <Db as sqlx::Database>::Connection {
        // `inner` is taken in `drop` only.
        self.inner.as_mut().expect("a Tx holds its transaction until it is dropped").connection()
    }

    /// The connection itself. What is given up: the driver lets you begin, commit and roll back on
    /// it. A handler that ends the transaction has its attempt failed, but what it committed stays
    /// committed, and runs again with the next attempt.
    pub fn unsafe_connection(&mut self) -> &mut <Db as sqlx::Database>::Connection {
        self.lent()
    }
}

impl<Db: Database> Drop for Tx<Db> {
    fn drop(&mut self) {
        if let (Some(tx), Ok(mut home)) = (self.inner.take(), self.home.lock()) {
            *home = Some(tx);
        }
    }
}

impl<Db: Database> AsConnection<Db> for Tx<Db> {
    fn as_connection(&mut self) -> &mut Db::Connection {
        self.lent()
    }
}

macro_rules! executes {
    ($($db:ty),*) => { $(
        impl<'c> sqlx::Executor<'c> for &'c mut Tx<$db> {
            type Database = $db;

            fn fetch_many<'e, 'q: 'e, E>(
                self,
                query: E,
            ) -> futures_util::stream::BoxStream<
                'e,
                Result<sqlx::Either<<$db as sqlx::Database>::QueryResult, <$db as sqlx::Database>::Row>, sqlx::Error>,
            >
            where
                'c: 'e,
                E: 'q + sqlx::Execute<'q, $db>,
            {
                self.lent().fetch_many(query)
            }

            fn fetch_optional<'e, 'q: 'e, E>(
                self,
                query: E,
            ) -> futures_util::future::BoxFuture<'e, Result<Option<<$db as sqlx::Database>::Row>, sqlx::Error>>
            where
                'c: 'e,
                E: 'q + sqlx::Execute<'q, $db>,
            {
                self.lent().fetch_optional(query)
            }

            fn prepare_with<'e>(
                self,
                sql: sqlx::SqlStr,
                parameters: &'e [<$db as sqlx::Database>::TypeInfo],
            ) -> futures_util::future::BoxFuture<'e, Result<<$db as sqlx::Database>::Statement, sqlx::Error>>
            where
                'c: 'e,
            {
                self.lent().prepare_with(sql, parameters)
            }
        }
    )* };
}
executes!(sqlx::Postgres, sqlx::Sqlite);

/// What a plain or transactional handler may return.
pub trait IntoVerdict {
    /// Its verdict.
    #[doc(hidden)]
    fn into_verdict(self) -> Result<Done, Failure>;
}

impl IntoVerdict for () {
    fn into_verdict(self) -> Result<Done, Failure> {
        Ok(Done::new())
    }
}

impl IntoVerdict for Done {
    fn into_verdict(self) -> Result<Done, Failure> {
        Ok(self)
    }
}

impl<T: IntoVerdict> IntoVerdict for Result<T, Failure> {
    fn into_verdict(self) -> Result<Done, Failure> {
        self?.into_verdict()
    }
}

pub(crate) type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// A plain or transactional handler: an async function of up to eight extractors, and `Tx<Db>` last
/// if effect and outcome are to commit together.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no handler",
    label = "not a handler",
    note = "a handler is an async function whose arguments are Payload<T>, Bytes, Envelope, Metadata, State<S>, Attempt (at most eight), then Tx<Db> if it is transactional, and that returns () or Result<(), postbox::Failure>",
    note = "irreversible work goes through `operation(f)`"
)]
pub trait Handler<Db: Database, S, M>: Send + Sync + 'static {
    /// Whether it takes a `Tx`.
    const TRANSACTIONAL: bool;

    /// The paths of the functions that it is, for its name.
    #[doc(hidden)]
    fn functions() -> Vec<&'static str>
    where
        Self: Sized,
    {
        vec![std::any::type_name::<Self>()]
    }

    /// Reads the arguments and starts the function. `tx` is there if it takes one.
    #[doc(hidden)]
    fn call(&self, call: &Call, state: &S, tx: Option<Tx<Db>>) -> Result<BoxFuture<Result<Done, Failure>>, Rejection>;
}

/// An operation: an async function of up to eight extractors that returns
/// `Result<Receipt, OperationFailure>`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no operation",
    label = "not an operation",
    note = "an operation is an async function whose arguments are Operation, Payload<T>, Bytes, Envelope, Metadata, State<S>, Attempt (at most eight) and that returns Result<Receipt, OperationFailure>",
    note = "an operation cannot take `Tx`: an irreversible effect cannot be rolled back with a transaction; publish with `Receipt::then` instead"
)]
pub trait OperationHandler<S, M>: Send + Sync + 'static {
    /// Reads the arguments and starts the function.
    #[doc(hidden)]
    fn call(&self, call: &Call, state: &S) -> Result<BoxFuture<Result<Receipt, OperationFailure>>, Rejection>;
}

/// A reconcile hook: an async function of up to eight extractors that asks the remote and returns
/// `Result<Reconciled, E>`; an error counts as unknown.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no reconcile hook",
    note = "a reconcile hook is an async function whose arguments are Operation, Payload<T>, Bytes, Envelope, Metadata, State<S>, Attempt (at most eight) and that returns Result<Reconciled, postbox::Failure>"
)]
pub trait ReconcileHook<S, M>: Send + Sync + 'static {
    /// Reads the arguments and starts the function.
    #[doc(hidden)]
    fn call(&self, call: &Call, state: &S) -> Result<BoxFuture<Result<Reconciled, Failure>>, Rejection>;
}

macro_rules! handlers {
    ($($arg:ident),*) => {
        #[allow(non_snake_case, unused_variables)]
        impl<Db, S, F, Fut, Out, $($arg,)*> Handler<Db, S, (Db, Out, $($arg,)*)> for F
        where
            Db: Database,
            F: Fn($($arg),*) -> Fut + Send + Sync + 'static,
            Fut: Future<Output = Out> + Send + 'static,
            Out: IntoVerdict + 'static,
            $($arg: FromDelivery<S> + 'static,)*
        {
            const TRANSACTIONAL: bool = false;

            fn call(&self, call: &Call, state: &S, _: Option<Tx<Db>>) -> Result<BoxFuture<Result<Done, Failure>>, Rejection> {
                $(let $arg = $arg::from_delivery(call, state)?;)*
                let future = self($($arg),*);
                Ok(Box::pin(async move { future.await.into_verdict() }))
            }
        }

        #[allow(non_snake_case, unused_variables)]
        impl<Db, S, F, Fut, Out, $($arg,)*> Handler<Db, S, (Tx<Db>, Out, $($arg,)*)> for F
        where
            Db: Database,
            F: Fn($($arg,)* Tx<Db>) -> Fut + Send + Sync + 'static,
            Fut: Future<Output = Out> + Send + 'static,
            Out: IntoVerdict + 'static,
            $($arg: FromDelivery<S> + 'static,)*
        {
            const TRANSACTIONAL: bool = true;

            fn call(&self, call: &Call, state: &S, tx: Option<Tx<Db>>) -> Result<BoxFuture<Result<Done, Failure>>, Rejection> {
                let tx = tx.ok_or_else(|| Rejection::new("there is no transaction for a transactional handler"))?;
                $(let $arg = $arg::from_delivery(call, state)?;)*
                let future = self($($arg,)* tx);
                Ok(Box::pin(async move { future.await.into_verdict() }))
            }
        }

        #[allow(non_snake_case, unused_variables)]
        impl<S, F, Fut, $($arg,)*> OperationHandler<S, ($($arg,)*)> for F
        where
            F: Fn($($arg),*) -> Fut + Send + Sync + 'static,
            Fut: Future<Output = Result<Receipt, OperationFailure>> + Send + 'static,
            $($arg: FromDelivery<S> + 'static,)*
        {
            fn call(&self, call: &Call, state: &S) -> Result<BoxFuture<Result<Receipt, OperationFailure>>, Rejection> {
                $(let $arg = $arg::from_delivery(call, state)?;)*
                Ok(Box::pin(self($($arg),*)))
            }
        }

        #[allow(non_snake_case, unused_variables)]
        impl<S, F, Fut, $($arg,)*> ReconcileHook<S, ($($arg,)*)> for F
        where
            F: Fn($($arg),*) -> Fut + Send + Sync + 'static,
            Fut: Future<Output = Result<Reconciled, Failure>> + Send + 'static,
            $($arg: FromDelivery<S> + 'static,)*
        {
            fn call(&self, call: &Call, state: &S) -> Result<BoxFuture<Result<Reconciled, Failure>>, Rejection> {
                $(let $arg = $arg::from_delivery(call, state)?;)*
                Ok(Box::pin(self($($arg),*)))
            }
        }
    };
}
handlers!();
handlers!(A1);
handlers!(A1, A2);
handlers!(A1, A2, A3);
handlers!(A1, A2, A3, A4);
handlers!(A1, A2, A3, A4, A5);
handlers!(A1, A2, A3, A4, A5, A6);
handlers!(A1, A2, A3, A4, A5, A6, A7);
handlers!(A1, A2, A3, A4, A5, A6, A7, A8);
