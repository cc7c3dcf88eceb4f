//! The router: which handler stands behind which topics.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::handler::{
    BoxFuture, Call, Failure, FromDelivery, Gather, Handler, OperationHandler, Payload, ReconcileHook, Rejection,
    Several, Together, Tx,
};
use crate::keys::{Keys, OnDead};
use crate::lifecycle::{Kind, Policy};
use crate::limits::{Limits, Rate};
use crate::message::{Envelope, Message};
use crate::operation::{Done, FollowUps, OperationFailure, Receipt, Reconciled};
use crate::pattern::{MAX_NAME_BYTES, Pattern, TopicError};
use crate::retention::{Keep, MIN_KEEP};
use crate::retry::RetryPolicy;
use crate::store::{Database, Declared, Start};
use crate::unique::Unique;

/// A handler bound to its state, ready to be called for a delivery.
pub(crate) trait Bound<Db: Database>: Send + Sync {
    fn run(&self, call: &Call, tx: Option<Tx<Db>>) -> Result<BoxFuture<Ran>, Rejection>;
    fn reconcile(&self, call: &Call) -> Option<Result<BoxFuture<Result<Reconciled, Failure>>, Rejection>>;
    fn continues(&self, call: &Call, receipt: &Receipt) -> Result<FollowUps, Rejection>;
}

/// What stands behind a subscription: a handler of single messages, or one of batches.
pub(crate) enum Stands<Db: Database> {
    Single(Arc<dyn Bound<Db>>),
    Batch(Arc<dyn BoundBatch<Db>>),
}

/// What a handler returned.
pub(crate) enum Ran {
    Plain(Result<Done, Failure>),
    Operation(Result<Receipt, OperationFailure>),
}

/// A handler that still waits for its state.
trait Unbound<Db: Database, S>: Send + Sync {
    fn bind(self: Box<Self>, state: S) -> Stands<Db>;
}

struct PlainHandler<H, M>(H, PhantomData<fn() -> M>);

impl<Db, S, H, M> Unbound<Db, S> for PlainHandler<H, M>
where
    Db: Database,
    S: Clone + Send + Sync + 'static,
    H: Handler<Db, S, M>,
    M: 'static,
{
    fn bind(self: Box<Self>, state: S) -> Stands<Db> {
        Stands::Single(Arc::new(BoundPlain { handler: self.0, state, marker: PhantomData::<fn() -> M> }))
    }
}

struct BoundPlain<H, S, M> {
    handler: H,
    state: S,
    marker: PhantomData<fn() -> M>,
}

impl<Db, S, H, M> Bound<Db> for BoundPlain<H, S, M>
where
    Db: Database,
    S: Send + Sync,
    H: Handler<Db, S, M>,
{
    fn run(&self, call: &Call, tx: Option<Tx<Db>>) -> Result<BoxFuture<Ran>, Rejection> {
        let future = self.handler.call(call, &self.state, tx)?;
        Ok(Box::pin(async move { Ran::Plain(future.await) }))
    }

    fn reconcile(&self, _: &Call) -> Option<Result<BoxFuture<Result<Reconciled, Failure>>, Rejection>> {
        None
    }

    fn continues(&self, _: &Call, _: &Receipt) -> Result<FollowUps, Rejection> {
        Ok(FollowUps::none())
    }
}

type BoxReconcile<S> =
    Box<dyn Fn(&Call, &S) -> Result<BoxFuture<Result<Reconciled, Failure>>, Rejection> + Send + Sync>;
type BoxContinue<S> = Box<dyn Fn(&Call, &S, &Receipt) -> Result<FollowUps, Rejection> + Send + Sync>;
type BoxOperation<S> =
    Box<dyn Fn(&Call, &S) -> Result<BoxFuture<Result<Receipt, OperationFailure>>, Rejection> + Send + Sync>;

struct OperationParts<S> {
    operation: BoxOperation<S>,
    reconcile: Option<BoxReconcile<S>>,
    then: Option<BoxContinue<S>>,
}

impl<Db, S> Unbound<Db, S> for OperationParts<S>
where
    Db: Database,
    S: Clone + Send + Sync + 'static,
{
    fn bind(self: Box<Self>, state: S) -> Stands<Db> {
        Stands::Single(Arc::new(BoundOperation { parts: *self, state }))
    }
}

struct BoundOperation<S> {
    parts: OperationParts<S>,
    state: S,
}

impl<Db: Database, S: Send + Sync> Bound<Db> for BoundOperation<S> {
    fn run(&self, call: &Call, _: Option<Tx<Db>>) -> Result<BoxFuture<Ran>, Rejection> {
        let future = (self.parts.operation)(call, &self.state)?;
        Ok(Box::pin(async move { Ran::Operation(future.await) }))
    }

    fn reconcile(&self, call: &Call) -> Option<Result<BoxFuture<Result<Reconciled, Failure>>, Rejection>> {
        self.parts.reconcile.as_ref().map(|hook| hook(call, &self.state))
    }

    fn continues(&self, call: &Call, receipt: &Receipt) -> Result<FollowUps, Rejection> {
        match &self.parts.then {
            Some(then) => then(call, &self.state, receipt),
            None => Ok(FollowUps::none()),
        }
    }
}

/// The longest timeout and quiet period.
const MAX_TIMEOUT: Duration = Duration::from_secs(7 * 86_400);

/// What a subscription may set beside its handler.
#[derive(Debug, Clone)]
struct Options {
    name: Option<String>,
    renamed_from: Vec<String>,
    retry: RetryPolicy,
    timeout: Duration,
    quiet: Duration,
    concurrency: Option<usize>,
    limits: Limits,
    keys: Option<Keys>,
    unique: Option<Unique>,
    start: Start,
    idempotent: bool,
    keep: Keep,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            name: None,
            renamed_from: Vec::new(),
            retry: RetryPolicy::default(),
            timeout: Duration::from_secs(60),
            quiet: Duration::from_secs(60),
            concurrency: None,
            limits: Limits::default(),
            keys: None,
            unique: None,
            start: Start::default(),
            idempotent: false,
            keep: Keep::default(),
        }
    }
}

macro_rules! options {
    () => {
        /// Its durable name, instead of the function's.
        #[must_use]
        pub fn named(mut self, name: impl Into<String>) -> Self {
            self.options.name = Some(name.into());
            self
        }

        /// A name it had before: its deliveries come along.
        #[must_use]
        pub fn renamed_from(mut self, name: impl Into<String>) -> Self {
            self.options.renamed_from.push(name.into());
            self
        }

        /// Attempts in all, the first included. Default 4.
        ///
        /// # Panics
        /// Outside 1 to 1000.
        #[track_caller]
        #[must_use]
        pub fn max_attempts(mut self, attempts: u32) -> Self {
            assert!((1..=1000).contains(&attempts), "max_attempts is {attempts}; it must be 1 to 1000");
            self.options.retry.max_attempts = attempts;
            self
        }

        /// The longest wait after the first failure (default 1 s), and at all (default 15 min).
        #[must_use]
        pub fn backoff(mut self, base: Duration, cap: Duration) -> Self {
            self.options.retry.base = base.min(crate::message::MAX_WAIT);
            self.options.retry.cap = cap.min(crate::message::MAX_WAIT);
            self
        }

        /// How long an attempt may run, at most a week. Default 60 s.
        ///
        /// # Panics
        /// Zero, or longer than a week.
        #[track_caller]
        #[must_use]
        pub fn timeout(mut self, timeout: Duration) -> Self {
            assert!(
                !timeout.is_zero() && timeout <= MAX_TIMEOUT,
                "the timeout is {timeout:?}; it must be above zero and at most a week"
            );
            self.options.timeout = timeout;
            self
        }

        /// How many of its attempts a worker runs at once, within the worker's own limit.
        ///
        /// # Panics
        /// Zero.
        #[track_caller]
        #[must_use]
        pub fn concurrency(mut self, at_once: usize) -> Self {
            assert!(at_once > 0, "the concurrency of a subscription must be at least 1");
            self.options.concurrency = Some(at_once);
            self
        }

        /// How many of its attempts run at once across all workers of the database, within each worker's own
        /// limits. Workers share these permits out among themselves; a worker that dies frees its own when it
        /// is taken over. What is pulled does not count.
        ///
        /// # Panics
        /// Zero.
        #[track_caller]
        #[must_use]
        pub fn limit(mut self, at_once: u32) -> Self {
            assert!(at_once > 0, "the limit of a subscription must be at least 1; to stop it, pause it");
            self.options.limits.at_once = Some(at_once);
            self
        }

        /// How many of its attempts begin in a time, across all workers of the database: `rate(100, SECOND)`.
        /// A token bucket in the database: in any time `t` there are at most `burst + count * t / per`, where
        /// the [`burst`](Self::burst) is what comes in 100 ms, or 1. Retries count, what is pulled does not.
        ///
        /// # Panics
        /// Zero, above a million a second, or a time above 366 days.
        #[track_caller]
        #[must_use]
        pub fn rate(mut self, count: u32, per: Duration) -> Self {
            match Rate::new(count, per) {
                Ok(rate) => self.options.limits.rate = Some(rate),
                Err(error) => panic!("{error}"),
            }
            self
        }

        /// How many may begin at once under a [`rate`](Self::rate), after a pause.
        ///
        /// # Panics
        /// Zero, or without a rate before it.
        #[track_caller]
        #[must_use]
        pub fn burst(mut self, at_once: u32) -> Self {
            assert!(at_once > 0, "the burst of a rate must be at least 1");
            match &mut self.options.limits.rate {
                Some(rate) => *rate = rate.with_burst(at_once),
                None => panic!("a burst belongs to a rate: `.rate(100, SECOND).burst({at_once})`"),
            }
            self
        }

        /// Delivers in order: of one key one at a time across all workers, in the order in which they were
        /// published (committed before the next was begun). One that has not succeeded holds back the others of
        /// its key, and nobody else's; see [`on_dead`](Self::on_dead). Messages without a key are in no order.
        ///
        /// # Panics
        /// With [`limit_per_key`](Self::limit_per_key): in order means one at a time. With [`unique`](Self::unique).
        #[track_caller]
        #[must_use]
        pub fn ordered(mut self) -> Self {
            assert!(
                !matches!(self.options.keys, Some(Keys::AtOnce(_))),
                "a subscription in order runs one of a key at a time: leave `limit_per_key` out"
            );
            assert!(self.options.unique.is_none(), "{}", crate::unique::ALONE);
            let on_dead = self.options.keys.and_then(Keys::on_dead).unwrap_or_default();
            self.options.keys = Some(Keys::Ordered(on_dead));
            self
        }

        /// What becomes of a key in order when one of its deliveries has died. Default
        /// [`Block`](OnDead::Block): the others wait until somebody decides.
        ///
        /// # Panics
        /// Without [`ordered`](Self::ordered) before it.
        #[track_caller]
        #[must_use]
        pub fn on_dead(mut self, on_dead: OnDead) -> Self {
            match &mut self.options.keys {
                Some(Keys::Ordered(one)) => *one = on_dead,
                _ => panic!("only deliveries in order hold others back: `.ordered().on_dead(…)`"),
            }
            self
        }

        /// How many attempts of one key run at once across all workers of the database. Messages without a key do
        /// not count.
        ///
        /// # Panics
        /// Zero, or with [`ordered`](Self::ordered), which runs one at a time.
        #[track_caller]
        #[must_use]
        pub fn limit_per_key(mut self, at_once: u32) -> Self {
            assert!(at_once > 0, "the limit of a key must be at least 1");
            assert!(self.options.unique.is_none(), "{}", crate::unique::ALONE);
            assert!(
                !matches!(self.options.keys, Some(Keys::Ordered(_))),
                "a subscription in order runs one of a key at a time: leave `limit_per_key` out"
            );
            self.options.keys = Some(Keys::AtOnce(at_once));
            self
        }

        /// It has at most one unfinished delivery of a message's key: one that waits, is due later, runs, is
        /// to be tried again or is in doubt. What becomes of another message of that key is yours to say;
        /// a message without a key is not concerned. See `docs/unique.md`.
        ///
        /// # Panics
        /// With [`ordered`](Self::ordered) or [`limit_per_key`](Self::limit_per_key): there are no several of a key.
        #[track_caller]
        #[must_use]
        pub fn unique(mut self, unique: Unique) -> Self {
            assert!(self.options.keys.is_none(), "{}", crate::unique::ALONE);
            self.options.unique = Some(unique);
            self
        }

        /// How long its deliveries stay on record after they have succeeded, instead of the setting
        /// `keep_succeeded` (and `keep_operations`). `Duration::MAX` is for ever.
        ///
        /// # Panics
        /// Shorter than an hour ([`MIN_KEEP`]).
        #[track_caller]
        #[must_use]
        pub fn keep_succeeded(mut self, keep: Duration) -> Self {
            assert!(keep >= MIN_KEEP, "keep_succeeded is {keep:?}; it must be at least an hour");
            self.options.keep.succeeded = Some(keep);
            self
        }

        /// How long its deliveries stay on record after they have died or were cancelled, instead of
        /// the setting `keep_dead` (and `keep_operations`). `Duration::MAX` is for ever.
        ///
        /// # Panics
        /// Shorter than an hour ([`MIN_KEEP`]).
        #[track_caller]
        #[must_use]
        pub fn keep_dead(mut self, keep: Duration) -> Self {
            assert!(keep >= MIN_KEEP, "keep_dead is {keep:?}; it must be at least an hour");
            self.options.keep.dead = Some(keep);
            self
        }

        /// When it is new: takes nothing that was published before.
        #[must_use]
        pub fn from_now(mut self) -> Self {
            self.options.start = Start::Now;
            self
        }

        /// When it is new: takes every message that matches, from the first on.
        #[must_use]
        pub fn from_beginning(mut self) -> Self {
            self.options.start = Start::Beginning;
            self
        }

        /// When it is new: takes every message that matches and was recorded at `time` or later.
        #[must_use]
        pub fn from(mut self, time: Timestamp) -> Self {
            self.options.start = Start::Time(time);
            self
        }
    };
}

mod batch;
mod relay;

pub(crate) use batch::BoundBatch;
pub use batch::{BatchEntry, IntoBatch, batch};
pub(crate) use relay::{Attached, Relayed};
pub use relay::{IntoRelay, RelayEntry, relay};

/// A handler with options: [`handler`].
pub struct HandlerEntry<H> {
    handler: H,
    options: Options,
}

/// Takes options for a handler: `handler(notify_crm).max_attempts(8).timeout(MINUTE)`.
pub fn handler<H>(handler: H) -> HandlerEntry<H> {
    HandlerEntry { handler, options: Options::default() }
}

impl<H> HandlerEntry<H> {
    options!();
}

/// Handlers that must commit together, as one subscription with one delivery a message:
/// `.on("placed", together((reserve_stock, book_revenue)))`.
///
/// Two to eight handlers, of which at least one takes `Tx`. They run in order, each after the one
/// before has ended, and all see the one transaction. The first that fails or panics ends the
/// attempt: everything is rolled back, its verdict is the attempt's, and a retry runs all of them
/// again. What they want published with [`Done`](crate::Done) is published with the outcome. What a
/// handler without `Tx` does outside of the transaction is not rolled back.
///
/// The durable name is their names with `+` between them, in order, so `.named("…")` one that may
/// grow. It takes options as [`handler`] does; the handlers in it have none of their own.
pub fn together<T: Several>(handlers: T) -> HandlerEntry<Together<T>> {
    handler(Together::new(handlers))
}

/// An operation with its hooks and options: [`operation`].
pub struct OperationEntry<S> {
    parts: OperationParts<S>,
    function: &'static str,
    options: Options,
}

/// Declares irreversible work: `operation(charge).reconcile(find_charge).max_attempts(5)`.
///
/// The attempt is committed before `f` is called; an outcome that nobody saw leaves the delivery in
/// doubt.
pub fn operation<S, F, M>(f: F) -> OperationEntry<S>
where
    F: OperationHandler<S, M>,
{
    OperationEntry {
        parts: OperationParts {
            operation: Box::new(move |call, state| f.call(call, state)),
            reconcile: None,
            then: None,
        },
        function: std::any::type_name::<F>(),
        options: Options::default(),
    }
}

impl<S: 'static> OperationEntry<S> {
    options!();

    /// How long a call that was sent may still be on its way to the remote, at most a week: until then
    /// a reconcile hook's [`NotDone`](Reconciled::NotDone) is not believed. Default 60 s. Zero is for
    /// remotes that refuse what comes late (by a deadline in the call, say).
    ///
    /// # Panics
    /// Longer than a week.
    #[track_caller]
    #[must_use]
    pub fn quiet_period(mut self, quiet: Duration) -> Self {
        assert!(quiet <= MAX_TIMEOUT, "the quiet period is {quiet:?}; it must be at most a week");
        self.options.quiet = quiet;
        self
    }

    /// Declares that the remote makes repeats under one idempotency key harmless: it applies the
    /// first, and answers the others with what that came to. An attempt whose end nobody saw is then
    /// followed by another, with a backoff, instead of a doubt. When the attempts are used up, and
    /// whenever it would end otherwise than with a success, it is in doubt if one of its attempts may
    /// have been applied.
    ///
    /// Only for remotes that keep the key for longer than all attempts can take.
    #[must_use]
    pub fn idempotent(mut self) -> Self {
        self.options.idempotent = true;
        self
    }

    /// Asks the remote how a doubt ends.
    #[must_use]
    pub fn reconcile<F, M>(mut self, hook: F) -> Self
    where
        F: ReconcileHook<S, M>,
    {
        self.parts.reconcile = Some(Box::new(move |call, state| hook.call(call, state)));
        self
    }

    /// The messages that follow from its success, whoever establishes it: the handler, a reconcile
    /// hook, a late outcome or an operator. They commit with it.
    ///
    /// [`Receipt::then`] is for what only the handler or the hook can know.
    #[must_use]
    pub fn then<T, F>(mut self, follow: F) -> Self
    where
        T: serde::de::DeserializeOwned + 'static,
        F: Fn(T, &Receipt) -> FollowUps + Send + Sync + 'static,
    {
        self.parts.then = Some(Box::new(move |call, state, receipt| {
            let Payload(payload) = Payload::<T>::from_delivery(call, state)?;
            Ok(crate::context::Context::of(&call.envelope).scope_sync(|| follow(payload, receipt)))
        }));
        self
    }

    /// Like [`then`](Self::then), from the whole message: for payloads that are bytes.
    #[must_use]
    pub fn then_from<F>(mut self, follow: F) -> Self
    where
        F: Fn(&Envelope, &Receipt) -> FollowUps + Send + Sync + 'static,
    {
        self.parts.then = Some(Box::new(move |call, _, receipt| {
            Ok(crate::context::Context::of(&call.envelope).scope_sync(|| follow(&call.envelope, receipt)))
        }));
        self
    }
}

/// What [`Router::on`] takes: a handler, [`handler`] or [`operation`] with options.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot stand behind a subscription of this router",
    label = "no handler for this router",
    note = "a handler is an async function whose arguments are Payload<T>, Bytes, Envelope, Metadata, State<S>, Attempt (at most eight), then `Tx<Db>`, last, if it is transactional, and that returns () or Result<(), postbox::Failure>",
    note = "the `Db` of `Tx<Db>` and of the router are the same, and `State<S>` is the router's state or a part of it",
    note = "irreversible work goes through `operation(f)`",
    note = "what `together((…))` joins are such handlers without options, and no operations"
)]
pub trait IntoSubscription<Db: Database, S, M> {
    /// The entry.
    #[doc(hidden)]
    fn into_subscription(self) -> Subscription<Db, S>;
}

/// A handler on its way into the router.
#[doc(hidden)]
pub struct Subscription<Db: Database, S> {
    kind: Kind,
    functions: Vec<&'static str>,
    options: Options,
    reconciles: bool,
    continues: bool,
    gather: Option<Gather>,
    unbound: Box<dyn Unbound<Db, S>>,
}

/// Tells the impls of [`IntoSubscription`] apart.
#[doc(hidden)]
pub struct Bare;
#[doc(hidden)]
pub struct WithOptions;

impl<Db, S, H, M> IntoSubscription<Db, S, (Bare, M)> for H
where
    Db: Database,
    S: Clone + Send + Sync + 'static,
    H: Handler<Db, S, M>,
    M: 'static,
{
    fn into_subscription(self) -> Subscription<Db, S> {
        handler(self).into_subscription()
    }
}

impl<Db, S, H, M> IntoSubscription<Db, S, (WithOptions, M)> for HandlerEntry<H>
where
    Db: Database,
    S: Clone + Send + Sync + 'static,
    H: Handler<Db, S, M>,
    M: 'static,
{
    fn into_subscription(self) -> Subscription<Db, S> {
        Subscription {
            kind: if H::TRANSACTIONAL { Kind::Transactional } else { Kind::Plain },
            functions: H::functions(),
            options: self.options,
            reconciles: false,
            continues: false,
            gather: None,
            unbound: Box::new(PlainHandler(self.handler, PhantomData::<fn() -> M>)),
        }
    }
}

impl<Db, S> IntoSubscription<Db, S, ()> for OperationEntry<S>
where
    Db: Database,
    S: Clone + Send + Sync + 'static,
{
    fn into_subscription(self) -> Subscription<Db, S> {
        Subscription {
            kind: Kind::Operation,
            functions: vec![self.function],
            options: self.options,
            reconciles: self.parts.reconcile.is_some(),
            continues: self.parts.then.is_some(),
            gather: None,
            unbound: Box::new(self.parts),
        }
    }
}

enum Target<Db: Database, S> {
    Unbound(Box<dyn Unbound<Db, S>>),
    Bound(Stands<Db>),
}

struct Entry<Db: Database, S> {
    declared: Declared,
    concurrency: Option<usize>,
    gather: Option<Gather>,
    absolute: bool,
    target: Target<Db, S>,
}

/// Which handler stands behind which topics; built like an axum router.
///
/// Wiring mistakes (a bad pattern, a name used twice, an unnamed closure) panic at the line that
/// makes them.
pub struct Router<Db: Database, S = ()> {
    entries: Vec<Entry<Db, S>>,
}

impl<Db: Database, S> fmt::Debug for Router<Db, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.entries.iter().map(|e| (&e.declared.name, e.declared.pattern.as_str()))).finish()
    }
}

impl<Db: Database, S> Default for Router<Db, S> {
    fn default() -> Self {
        Router { entries: Vec::new() }
    }
}

impl<Db: Database, S: Clone + Send + Sync + 'static> Router<Db, S> {
    /// Without subscriptions.
    pub fn new() -> Self {
        Router::default()
    }

    /// Subscribes a handler to a topic or pattern.
    ///
    /// # Panics
    /// The pattern is none, the name is taken, or a closure has no name.
    #[track_caller]
    #[must_use]
    pub fn on<M>(self, pattern: &str, handler: impl IntoSubscription<Db, S, M>) -> Self {
        self.add(parsed(pattern.parse()), false, handler.into_subscription())
    }

    /// Subscribes a handler to the topic of a message type. The topic is taken as it is: `nest`
    /// does not prefix it.
    ///
    /// # Panics
    /// As [`on`](Self::on).
    #[track_caller]
    #[must_use]
    pub fn on_type<T: Message, M>(self, handler: impl IntoSubscription<Db, S, M>) -> Self {
        self.add(parsed(T::TOPIC.parse()), true, handler.into_subscription())
    }

    #[track_caller]
    fn add(mut self, pattern: Pattern, absolute: bool, subscription: Subscription<Db, S>) -> Self {
        let Subscription { kind, functions, options, reconciles, continues, gather, unbound } = subscription;
        assert!(
            functions.len() < 2 || kind == Kind::Transactional,
            "none of the handlers in `together((…))` takes a `Tx`: there is nothing to share; subscribe each by itself"
        );
        // Not `unwrap_or_else`: a closure would hide the caller's line.
        let name = match options.name {
            Some(name) => name,
            None => joined_name(&functions),
        };
        assert!(
            !name.is_empty()
                && name.len() <= MAX_NAME_BYTES
                && !name.chars().any(|c| c.is_control() || c.is_whitespace()),
            "the subscription name {name:?} must be 1 to {MAX_NAME_BYTES} bytes without spaces or control characters"
        );
        let entry = Entry {
            declared: Declared {
                name,
                renamed_from: options.renamed_from,
                pattern,
                policy: Policy { kind, retry: options.retry, idempotent: options.idempotent },
                reconciles,
                continues,
                start: options.start,
                keep: options.keep,
                limits: options.limits,
                keys: options.keys,
                unique: options.unique,
                timeout: options.timeout,
                quiet: options.quiet,
            },
            concurrency: options.concurrency,
            gather,
            absolute,
            target: Target::Unbound(unbound),
        };
        self.push(entry);
        self
    }

    #[track_caller]
    fn push(&mut self, entry: Entry<Db, S>) {
        let name = &entry.declared.name;
        assert!(
            self.entries.iter().all(|e| e.declared.name != *name),
            "two subscriptions are called `{name}`; give one a name of its own with `.named(\"…\")`"
        );
        self.entries.push(entry);
    }

    /// Adds another router's subscriptions under `prefix.`.
    ///
    /// # Panics
    /// The prefix is no topic, or a name is taken.
    #[track_caller]
    #[must_use]
    pub fn nest(mut self, prefix: &str, router: Router<Db, S>) -> Self {
        if let Err(error) = crate::pattern::check_topic(prefix) {
            panic!("the prefix `{prefix}` cannot be nested under: {error}");
        }
        for mut entry in router.entries {
            if !entry.absolute {
                entry.declared.pattern = parsed(entry.declared.pattern.nested_in(prefix));
            }
            self.push(entry);
        }
        self
    }

    /// Adds another router's subscriptions.
    ///
    /// # Panics
    /// A name is taken.
    #[track_caller]
    #[must_use]
    pub fn merge(mut self, router: Router<Db, S>) -> Self {
        for entry in router.entries {
            self.push(entry);
        }
        self
    }

    /// Gives the handlers their state.
    #[must_use]
    pub fn with_state<S2>(self, state: S) -> Router<Db, S2> {
        let entries = self.entries.into_iter().map(|entry| Entry {
            declared: entry.declared,
            concurrency: entry.concurrency,
            gather: entry.gather,
            absolute: entry.absolute,
            target: Target::Bound(match entry.target {
                Target::Unbound(unbound) => unbound.bind(state.clone()),
                Target::Bound(bound) => bound,
            }),
        });
        Router { entries: entries.collect() }
    }

    /// What it subscribes to: name and pattern of each, in the order added.
    pub fn subscriptions(&self) -> impl Iterator<Item = (&str, &Pattern)> {
        self.entries.iter().map(|e| (e.declared.name.as_str(), &e.declared.pattern))
    }
}

/// A subscription as a worker runs it.
pub(crate) struct Route<Db: Database> {
    pub(crate) declared: Declared,
    pub(crate) concurrency: Option<usize>,
    pub(crate) gather: Option<Gather>,
    pub(crate) handler: Stands<Db>,
}

impl<Db: Database> Router<Db> {
    pub(crate) fn into_routes(self) -> Vec<Route<Db>> {
        let routes = self.entries.into_iter().map(|entry| Route {
            declared: entry.declared,
            concurrency: entry.concurrency,
            gather: entry.gather,
            handler: match entry.target {
                Target::Unbound(unbound) => unbound.bind(()),
                Target::Bound(bound) => bound,
            },
        });
        routes.collect()
    }
}

/// A pattern, or a panic at the caller's line.
#[track_caller]
fn parsed(pattern: Result<Pattern, TopicError>) -> Pattern {
    match pattern {
        Ok(pattern) => pattern,
        Err(error) => panic!("{error}"),
    }
}

/// The names of what runs together, or the one there is.
#[track_caller]
fn joined_name(functions: &[&'static str]) -> String {
    let mut name = String::new();
    // Not `map`: a closure would hide the caller's line.
    for function in functions {
        if !name.is_empty() {
            name.push('+');
        }
        name.push_str(&function_name(function));
    }
    name
}

/// The last segment of a function's path.
#[track_caller]
fn function_name(path: &'static str) -> String {
    let base = path.split('<').next().unwrap_or(path);
    let name = base.rsplit("::").next().unwrap_or(base);
    assert!(name != "{{closure}}", "a closure has no durable name; give it one: `handler(|…| …).named(\"…\")`");
    name.to_owned()
}
