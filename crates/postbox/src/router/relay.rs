//! Relays in the router: subscriptions whose handler is a sink.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;

use super::{Bare, BoundBatch, MAX_TIMEOUT, Options, Router, Stands, Subscription, Unbound, WithOptions, parsed};
use crate::crash;
use crate::error::BrokerError;
use crate::handler::{Answers, BoxFuture, Call, Failure, Gather, Reading};
use crate::keys::{Keys, OnDead};
use crate::lifecycle::Kind;
use crate::limits::Rate;
use crate::operation::Done;
use crate::retention::MIN_KEEP;
use crate::retry::RetryPolicy;
use crate::sink::{Outgoing, Sent, Sink, Then, Unsent};
use crate::store::{Database, Start, Store};
use crate::unique::Unique;

/// The most messages that go to a sink at once.
const MOST: usize = 1000;
/// How long a message waits that found nobody who would take it.
const GONE: Duration = Duration::from_secs(60);
/// The same, if the relay could not be paused.
const STILL_THERE: Duration = Duration::from_secs(900);

/// A relay with options: [`relay`].
pub struct RelayEntry<K> {
    sink: K,
    options: Options,
    gather: Gather,
}

/// Takes options for a relay: `relay(redis("orders")).named("to-redis").up_to(500)`.
///
/// A relay is a plain subscription: a message counts as sent when the other side has confirmed it, and is sent
/// again, with the same id, when nobody knows. Unless it is [`unordered`](RelayEntry::unordered), messages of one
/// key go out one after the other, in the order in which they were published. It makes up to 1000 attempts, at
/// most 5 minutes apart (about three days), so that an outage makes no dead letters.
pub fn relay<K: Sink>(sink: K) -> RelayEntry<K> {
    let options = Options {
        keys: Some(Keys::Ordered(OnDead::Block)),
        retry: RetryPolicy { max_attempts: 1000, base: Duration::from_secs(1), cap: Duration::from_secs(300) },
        ..Options::default()
    };
    RelayEntry { sink, options, gather: Gather { most: 200, within: Duration::ZERO } }
}

impl<K> RelayEntry<K> {
    options!();

    /// In no order: for messages whose order means nothing, this is faster where keys are few.
    #[must_use]
    pub fn unordered(mut self) -> Self {
        self.options.keys = None;
        self
    }

    /// How many messages the sink is given at once at the most, 1 to 1000. Default 200.
    ///
    /// # Panics
    /// Zero, or above 1000.
    #[track_caller]
    #[must_use]
    pub fn up_to(mut self, messages: usize) -> Self {
        assert!((1..=MOST).contains(&messages), "up_to is {messages}; a sink is given 1 to {MOST} messages at once");
        self.gather.most = messages;
        self
    }

    /// How long the first message waits for others, at most a minute. Default zero: what is there.
    ///
    /// # Panics
    /// Longer than a minute.
    #[track_caller]
    #[must_use]
    pub fn within(mut self, wait: Duration) -> Self {
        assert!(wait <= Duration::from_secs(60), "within is {wait:?}; a message waits for others for at most a minute");
        self.gather.within = wait;
        self
    }
}

/// What [`Router::relay`] takes: a sink, or [`relay`] with options.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no sink",
    label = "not a sink",
    note = "a relay goes to a `postbox::sink::Sink`, as it is or as `relay(sink)` with options"
)]
pub trait IntoRelay<M> {
    /// The sink.
    #[doc(hidden)]
    type Sink: Sink;
    /// The entry.
    #[doc(hidden)]
    fn into_relay(self) -> RelayEntry<Self::Sink>;
}

impl<K: Sink> IntoRelay<Bare> for K {
    type Sink = K;

    fn into_relay(self) -> RelayEntry<K> {
        relay(self)
    }
}

impl<K: Sink> IntoRelay<WithOptions> for RelayEntry<K> {
    type Sink = K;

    fn into_relay(self) -> RelayEntry<K> {
        self
    }
}

impl<Db: Database, S: Clone + Send + Sync + 'static> Router<Db, S> {
    /// Sends messages of a topic or pattern to a broker or an endpoint; see [`relay`](fn@relay). Its durable name is the
    /// sink's (`redis:orders`), unless it is given one.
    ///
    /// # Panics
    /// The pattern is none, or the name is taken.
    #[track_caller]
    #[must_use]
    pub fn relay<M>(self, pattern: &str, sink: impl IntoRelay<M>) -> Self {
        let RelayEntry { sink, mut options, gather } = sink.into_relay();
        // Not `get_or_insert_with`: a closure would hide the caller's line.
        if options.name.is_none() {
            options.name = Some(sink.name());
        }
        let subscription = Subscription {
            kind: Kind::Plain,
            functions: Vec::new(),
            options,
            reconciles: false,
            continues: false,
            gather: Some(gather),
            unbound: Box::new(Relaying(sink)),
        };
        self.add(parsed(pattern.parse()), false, subscription)
    }
}

struct Relaying<K>(K);

impl<Db: Database, S, K: Sink> Unbound<Db, S> for Relaying<K> {
    fn bind(self: Box<Self>, _: S) -> Stands<Db> {
        Stands::Batch(Arc::new(Relay { sink: Arc::new(self.0), attached: Arc::default(), tally: Arc::default() }))
    }
}

/// Whose relay it is, once a worker runs it.
pub(crate) struct Attached<Db: Database> {
    pub(crate) store: Db::Store,
    pub(crate) application: String,
    pub(crate) name: String,
}

/// What a relay's sink has confirmed, and what is to be sent again, since it was counted last.
#[derive(Debug, Default)]
struct Tally {
    sent: AtomicI64,
    retried: AtomicI64,
}

/// A relay as a worker sees it.
pub(crate) trait Relayed<Db: Database>: Send + Sync {
    fn kind(&self) -> &'static str;
    fn target(&self) -> String;
    fn open(&self) -> BoxFuture<Result<Vec<String>, BrokerError>>;
    fn attach(&self, attached: Attached<Db>);
    /// Takes what is to be counted: sent, and retried.
    fn take_counts(&self) -> (i64, i64);
    /// It could not be counted.
    fn put_back(&self, sent: i64, retried: i64);
}

struct Relay<Db: Database, K> {
    sink: Arc<K>,
    attached: Arc<OnceLock<Attached<Db>>>,
    tally: Arc<Tally>,
}

impl<Db: Database, K: Sink> Relayed<Db> for Relay<Db, K> {
    fn kind(&self) -> &'static str {
        self.sink.kind()
    }

    fn target(&self) -> String {
        self.sink.name()
    }

    fn open(&self) -> BoxFuture<Result<Vec<String>, BrokerError>> {
        let sink = self.sink.clone();
        Box::pin(async move { sink.open().await })
    }

    fn attach(&self, attached: Attached<Db>) {
        self.attached.set(attached).ok();
    }

    fn take_counts(&self) -> (i64, i64) {
        (self.tally.sent.swap(0, Ordering::Relaxed), self.tally.retried.swap(0, Ordering::Relaxed))
    }

    fn put_back(&self, sent: i64, retried: i64) {
        self.tally.sent.fetch_add(sent, Ordering::Relaxed);
        self.tally.retried.fetch_add(retried, Ordering::Relaxed);
    }
}

impl<Db: Database, K: Sink> BoundBatch<Db> for Relay<Db, K> {
    fn read(&self, calls: Vec<Call>) -> Reading<Db> {
        let (sink, attached, tally) = (self.sink.clone(), self.attached.clone(), self.tally.clone());
        let batch: Vec<Outgoing> = calls.into_iter().map(|call| Outgoing::new(call.envelope, call.attempt)).collect();
        let send = async move {
            let sent = sink.send(&batch).await;
            crash::point("relayed");
            if sent.len() != batch.len() {
                let words = format!(
                    "the sink gave {} answers for {} messages; none of them counts as sent",
                    sent.len(),
                    batch.len()
                );
                return Answers::of(batch.iter().map(|_| Err(Failure::retry(&words))).collect());
            }
            let mut verdicts = judged(sent, attached.get(), &tally).await;
            for (verdict, message) in verdicts.iter_mut().zip(batch) {
                if let Ok(done) = verdict {
                    done.receipt = message.into_answer();
                }
            }
            Answers::of(verdicts)
        };
        Reading { unread: Vec::new(), start: Box::new(move |_| Ok(Box::pin(send))) }
    }

    fn relay(&self) -> Option<&dyn Relayed<Db>> {
        Some(self)
    }
}

/// What the engine makes of a sink's answers.
async fn judged<Db: Database>(
    sent: Sent,
    attached: Option<&Attached<Db>>,
    tally: &Tally,
) -> Vec<Result<Done, Failure>> {
    let gone = sent.iter().find_map(|answer| match answer {
        Err(Unsent { error, then: Then::Pause }) => Some(error.clone()),
        _ => None,
    });
    let mut wait = STILL_THERE;
    if let (Some(error), Some(attached)) = (gone, attached)
        && pause(attached, &error).await
    {
        wait = GONE;
    }
    let judge = |answer: Result<(), Unsent>| match answer {
        Ok(()) => {
            tally.sent.fetch_add(1, Ordering::Relaxed);
            Ok(Done::new())
        }
        Err(Unsent { error, then: Then::Untried }) => Err(Failure::untried(error)),
        Err(Unsent { error, then: Then::Dead }) => Err(Failure::permanent(error)),
        Err(Unsent { error, then: Then::Again { after } }) => {
            tally.retried.fetch_add(1, Ordering::Relaxed);
            Err(match after {
                Some(after) => Failure::retry_after(error, after),
                None => Failure::retry(error),
            })
        }
        Err(Unsent { error, then: Then::Pause }) => {
            tally.retried.fetch_add(1, Ordering::Relaxed);
            Err(Failure::retry_after(error, wait))
        }
    };
    sent.into_iter().map(judge).collect()
}

/// Nobody is there who would take anything: the relay waits for an operator.
async fn pause<Db: Database>(attached: &Attached<Db>, error: &str) -> bool {
    let Attached { store, application, name } = attached;
    let mut reason = format!("the endpoint is gone: {error}");
    while reason.len() > crate::admin::MAX_REASON_BYTES {
        reason.pop();
    }
    let wish = crate::store::Pause { pauses: true, actor: "postbox", reason: &reason };
    match store.pause(application, name, &wish).await {
        Ok(_) => {
            tracing::error!(
                relay = name,
                error,
                "nobody is there any more who would take messages: the relay is paused; when that is mended, `postbox subscriptions resume`"
            );
            true
        }
        Err(refused) => {
            tracing::error!(relay = name, error, %refused, "nobody is there any more who would take messages, and the relay could not be paused");
            false
        }
    }
}
