//! Batch handlers in the router.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::relay::Relayed;
use super::{Bare, IntoSubscription, MAX_TIMEOUT, Options, Router, Stands, Subscription, Unbound, WithOptions, parsed};
use crate::handler::{BatchHandler, Call, Gather, Reading, read};
use crate::keys::{Keys, OnDead};
use crate::lifecycle::Kind;
use crate::limits::Rate;
use crate::retention::MIN_KEEP;
use crate::store::{Database, Start};
use crate::unique::Unique;

/// The most messages of a batch.
const MOST: usize = 1000;
/// The longest that a message waits for others.
const LONGEST: Duration = Duration::from_secs(60);

/// A batch handler bound to its state, ready to be called.
pub(crate) trait BoundBatch<Db: Database>: Send + Sync {
    fn read(&self, calls: Vec<Call>) -> Reading<Db>;

    /// The sink behind it, if it is a relay.
    fn relay(&self) -> Option<&dyn Relayed<Db>> {
        None
    }
}

struct InBatches<H, M>(H, PhantomData<fn() -> M>);

impl<Db, S, H, M> Unbound<Db, S> for InBatches<H, M>
where
    Db: Database,
    S: Clone + Send + Sync + 'static,
    H: BatchHandler<Db, S, M>,
    M: 'static,
{
    fn bind(self: Box<Self>, state: S) -> Stands<Db> {
        Stands::Batch(Arc::new(Ready { handler: Arc::new(self.0), state, marker: PhantomData::<fn() -> M> }))
    }
}

struct Ready<H, S, M> {
    handler: Arc<H>,
    state: S,
    marker: PhantomData<fn() -> M>,
}

impl<Db, S, H, M> BoundBatch<Db> for Ready<H, S, M>
where
    Db: Database,
    S: Clone + Send + Sync + 'static,
    H: BatchHandler<Db, S, M>,
    M: 'static,
{
    fn read(&self, calls: Vec<Call>) -> Reading<Db> {
        read(&self.handler, &self.state, calls)
    }
}

/// A batch handler with options: [`batch`].
pub struct BatchEntry<H> {
    handler: H,
    options: Options,
    gather: Gather,
}

/// Takes options for a batch handler: `batch(index_orders).up_to(200).within(SECOND).max_attempts(8)`.
///
/// It goes to [`on_batch`](Router::on_batch), and wherever a handler of single messages does.
pub fn batch<H>(handler: H) -> BatchEntry<H> {
    let gather = Gather { most: 100, within: Duration::from_millis(10) };
    BatchEntry { handler, options: Options::default(), gather }
}

impl<H> BatchEntry<H> {
    options!();

    /// How many messages a call is for at the most, 1 to 1000. Default 100.
    ///
    /// # Panics
    /// Zero, or above 1000.
    #[track_caller]
    #[must_use]
    pub fn up_to(mut self, messages: usize) -> Self {
        assert!((1..=MOST).contains(&messages), "up_to is {messages}; a batch is of 1 to {MOST} messages");
        self.gather.most = messages;
        self
    }

    /// How long the first message waits for others, at most a minute. Zero: what is there. Default 10 ms.
    ///
    /// The wait begins when a worker has claimed it, and does not count to the handler's
    /// [`timeout`](Self::timeout).
    ///
    /// # Panics
    /// Longer than a minute.
    #[track_caller]
    #[must_use]
    pub fn within(mut self, wait: Duration) -> Self {
        assert!(wait <= LONGEST, "within is {wait:?}; a message waits for others for at most a minute");
        self.gather.within = wait;
        self
    }
}

/// What [`Router::on_batch`] takes: a batch handler, or [`batch`] with options.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot handle batches for this router",
    label = "no batch handler for this router",
    note = "a batch handler is an async function whose arguments are Batch<T>, then State<S> (at most four), then Tx<Db> if it is transactional, and that returns (), Vec<Result<(), postbox::Failure>>, Outcomes, or a Result of one of these and postbox::Failure",
    note = "irreversible work is done one at a time: `operation(f)` goes to `on`, not to `on_batch`"
)]
pub trait IntoBatch<Db: Database, S, M> {
    /// The entry.
    #[doc(hidden)]
    fn into_batch(self) -> Subscription<Db, S>;
}

impl<Db, S, H, M> IntoBatch<Db, S, (Bare, M)> for H
where
    Db: Database,
    S: Clone + Send + Sync + 'static,
    H: BatchHandler<Db, S, M>,
    M: 'static,
{
    fn into_batch(self) -> Subscription<Db, S> {
        batch(self).into_subscription()
    }
}

impl<Db, S, H, M> IntoBatch<Db, S, (WithOptions, M)> for BatchEntry<H>
where
    Db: Database,
    S: Clone + Send + Sync + 'static,
    H: BatchHandler<Db, S, M>,
    M: 'static,
{
    fn into_batch(self) -> Subscription<Db, S> {
        self.into_subscription()
    }
}

/// Tells the impls of [`IntoSubscription`] apart.
#[doc(hidden)]
pub struct OfBatches;

// In lists of what can stand behind a subscription, this would be noise.
#[diagnostic::do_not_recommend]
impl<Db, S, H, M> IntoSubscription<Db, S, (OfBatches, M)> for BatchEntry<H>
where
    Db: Database,
    S: Clone + Send + Sync + 'static,
    H: BatchHandler<Db, S, M>,
    M: 'static,
{
    fn into_subscription(self) -> Subscription<Db, S> {
        Subscription {
            kind: if H::TRANSACTIONAL { Kind::Transactional } else { Kind::Plain },
            functions: vec![std::any::type_name::<H>()],
            options: self.options,
            reconciles: false,
            continues: false,
            gather: Some(self.gather),
            unbound: Box::new(InBatches(self.handler, PhantomData::<fn() -> M>)),
        }
    }
}

impl<Db: Database, S: Clone + Send + Sync + 'static> Router<Db, S> {
    /// Subscribes a batch handler to a topic or pattern: it is called with up to 100 messages at a time
    /// ([`BatchEntry::up_to`]), as many as come within 10 ms ([`BatchEntry::within`]), and says of each what it
    /// came to.
    ///
    /// # Panics
    /// As [`on`](Self::on).
    #[track_caller]
    #[must_use]
    pub fn on_batch<M>(self, pattern: &str, handler: impl IntoBatch<Db, S, M>) -> Self {
        self.add(parsed(pattern.parse()), false, handler.into_batch())
    }
}
