//! Pulling: the caller asks for one delivery, in a transaction of its own, and its commit completes it.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::de::DeserializeOwned;

use crate::context::Context;
use crate::crash;
use crate::error::Error;
use crate::handler::Failure;
use crate::lifecycle::{Kind, Policy};
use crate::limits::Limits;
use crate::message::{DecodeError, Envelope, MAX_WAIT};
use crate::pattern::{MAX_NAME_BYTES, Pattern};
use crate::postbox::Postbox;
use crate::retention::Keep;
use crate::retry::RetryPolicy;
use crate::store::{
    AsConnection, Completion, Database, Declared, DeliveryId, Observation, PullRequest, Start, Store, SubscriptionId,
};
use crate::unique::Unique;
use crate::worker::puller::{Told, succeeded};

/// How long a look at the stored subscription is believed.
const FRESH: Duration = Duration::from_secs(30);
/// The shortest wait between two looks of [`PullSubscription::ready`].
const FIRST_POLL: Duration = Duration::from_millis(5);
/// How long a declaration may hand out what was published before it.
const FIRST_HISTORY: Duration = Duration::from_secs(1);

/// A subscription to pull from: cheap to clone, and for use by many tasks at once.
///
/// Deliveries go to whoever asks first, other processes and workers that handle the subscription
/// included; each goes to one of them.
pub struct PullSubscription<Db: Database> {
    postbox: Postbox<Db>,
    name: String,
    application: Option<String>,
    pattern: Option<Pattern>,
    retry: RetryPolicy,
    start: Start,
    unique: Option<Unique>,
    known: Arc<Mutex<Option<(SubscriptionId, Instant)>>>,
}

impl<Db: Database> Clone for PullSubscription<Db> {
    fn clone(&self) -> Self {
        PullSubscription {
            postbox: self.postbox.clone(),
            name: self.name.clone(),
            application: self.application.clone(),
            pattern: self.pattern.clone(),
            retry: self.retry,
            start: self.start,
            unique: self.unique,
            known: self.known.clone(),
        }
    }
}

impl<Db: Database> fmt::Debug for PullSubscription<Db> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PullSubscription")
            .field("name", &self.name)
            .field("pattern", &self.pattern)
            .finish_non_exhaustive()
    }
}

impl<Db: Database> PullSubscription<Db> {
    pub(crate) fn new(postbox: &Postbox<Db>, name: String) -> Self {
        PullSubscription {
            postbox: postbox.clone(),
            name,
            application: None,
            pattern: None,
            retry: RetryPolicy::default(),
            start: Start::default(),
            unique: None,
            known: Arc::default(),
        }
    }

    /// What it listens to, for [`declare`](Self::declare).
    ///
    /// # Panics
    /// It is no pattern.
    #[track_caller]
    #[must_use]
    pub fn pattern(self, pattern: &str) -> Self {
        match pattern.parse() {
            Ok(pattern) => self.listening_to(pattern),
            Err(error) => panic!("{error}"),
        }
    }

    /// The same with a pattern that was read from somewhere.
    #[must_use]
    pub fn listening_to(mut self, pattern: Pattern) -> Self {
        self.pattern = Some(pattern);
        self
    }

    /// Whose it is; without it, the application of the settings.
    #[must_use]
    pub fn application(mut self, name: impl Into<String>) -> Self {
        self.application = Some(name.into());
        self
    }

    /// Attempts in all, the first included, for [`declare`](Self::declare). Default 4.
    ///
    /// # Panics
    /// Outside 1 to 1000.
    #[track_caller]
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        assert!((1..=1000).contains(&attempts), "max_attempts is {attempts}; it must be 1 to 1000");
        self.retry.max_attempts = attempts;
        self
    }

    /// The longest wait after the first failure (default 1 s), and at all (default 15 min), for
    /// [`declare`](Self::declare).
    #[must_use]
    pub fn backoff(mut self, base: Duration, cap: Duration) -> Self {
        self.retry.base = base.min(MAX_WAIT);
        self.retry.cap = cap.min(MAX_WAIT);
        self
    }

    /// It has at most one unfinished delivery of a message's key, for [`declare`](Self::declare). See
    /// `docs/unique.md`.
    #[must_use]
    pub fn unique(mut self, unique: Unique) -> Self {
        self.unique = Some(unique);
        self
    }

    /// When it is new: takes nothing that was published before.
    #[must_use]
    pub fn from_now(mut self) -> Self {
        self.start = Start::Now;
        self
    }

    /// When it is new: takes every message that matches, from the first on.
    #[must_use]
    pub fn from_beginning(mut self) -> Self {
        self.start = Start::Beginning;
        self
    }

    /// When it is new: takes every message that matches and was recorded at `time` or later.
    #[must_use]
    pub fn from(mut self, time: Timestamp) -> Self {
        self.start = Start::Time(time);
        self
    }

    /// Stores it, as a worker's start stores the subscriptions of its router: makes it, or changes its
    /// pattern and policy. What was published before and belongs to it is handed out for up to a
    /// second here; a worker, or a process that pulls, goes on with the rest.
    ///
    /// Cancel safety: it is stored or not; call it again.
    ///
    /// # Errors
    /// It has no pattern; its name cannot be used; it is stored as an operation's; or the database did
    /// not answer.
    pub async fn declare(&self) -> Result<(), Error> {
        let Some(pattern) = &self.pattern else {
            return Err(Error::Settings(format!(
                "the subscription `{}` has no pattern to be declared with; say `.pattern(\"orders.*\")`",
                self.name.escape_debug()
            )));
        };
        let odd = |c: char| c.is_control() || c.is_whitespace();
        if self.name.is_empty() || self.name.len() > MAX_NAME_BYTES || self.name.chars().any(odd) {
            return Err(Error::Settings(format!(
                "the subscription name {:?} must be 1 to {MAX_NAME_BYTES} bytes without spaces or control characters",
                self.name
            )));
        }
        let declared = Declared {
            name: self.name.clone(),
            renamed_from: Vec::new(),
            pattern: pattern.clone(),
            policy: Policy { kind: Kind::Transactional, idempotent: false, retry: self.retry },
            timeout: Duration::from_secs(60),
            quiet: Duration::from_secs(60),
            reconciles: false,
            continues: false,
            start: self.start,
            keep: Keep::default(),
            limits: Limits::default(),
            keys: None,
            unique: self.unique,
        };
        let store = self.postbox.store();
        let ids = store.declare(&self.of()?, &[declared]).await?;
        let begun = Instant::now();
        while begun.elapsed() < FIRST_HISTORY && store.backfill().await? {}
        if let Some(id) = ids.first() {
            self.remember(*id);
        }
        Ok(())
    }

    /// The next delivery, leased for the caller's transaction; `None` at once when nothing is due.
    ///
    /// Its success is written in that transaction: the commit completes it. A rollback counts as a
    /// failed attempt, so that a message that nobody can handle becomes a dead letter;
    /// [`failed`](Self::failed) says why. On PostgreSQL call it as often as wanted. On SQLite, call it
    /// before the transaction's first statement, once, in a transaction that was begun with `BEGIN`.
    ///
    /// Cancel safety: a dropped future leaves the transaction in whatever state the driver is in; roll
    /// it back. The delivery then comes back, and no attempt is counted.
    ///
    /// # Errors
    /// [`Error::NotFound`]: it is not stored, and has no pattern to be declared with.
    /// [`Error::Refused`]: it is an operation's; the connection is in no transaction; or the transaction
    /// is stricter than READ COMMITTED and has read already. [`Error::BusyTransaction`], on SQLite: the
    /// transaction has read or written already. [`Error::Conflict`]: this process was taken for dead
    /// meanwhile. Or the database did not answer. Nothing is leased then.
    pub async fn next<C>(&self, transaction: &mut C) -> Result<Option<Pulled>, Error>
    where
        C: AsConnection<Db> + ?Sized,
    {
        let caller = transaction.as_connection();
        let running = self.postbox.running_puller().await;
        let known = self.known().and_then(|id| running.filter(|p| p.attends(id)).map(|p| (id, p)));
        self.postbox.store().admit(caller, known.is_none()).await?;
        let (subscription, puller) = match known {
            Some(known) => known,
            None => {
                let subscription = self.id().await?;
                let puller = self.postbox.puller().await?;
                puller.attend(subscription).await?;
                (subscription, puller)
            }
        };
        loop {
            let claiming = puller.claiming();
            let request = PullRequest { worker: claiming.worker, token: claiming.token, subscription };
            let Some(one) = puller.store().pull(caller, request).await? else {
                claiming.forget();
                return Ok(None);
            };
            claiming.leased(&one);
            crash::point("pull-leased");
            let Some(envelope) = one.item.envelope.clone() else {
                claiming.bury(&one).await?;
                continue;
            };
            return match puller.store().complete(caller, one.lease, &succeeded(&one)?).await? {
                Completion::Done => {
                    let token = claiming.token;
                    let worker = claiming.worker;
                    let alive = claiming.hand_out();
                    crash::point("pulled");
                    Ok(Some(Pulled {
                        delivery: one.item.delivery,
                        attempt: one.item.attempts + 1,
                        max_attempts: one.policy.retry.max_attempts,
                        envelope,
                        token,
                        worker,
                        _alive: alive,
                    }))
                }
                Completion::Fenced => {
                    claiming.forget();
                    Err(Error::Conflict(format!(
                        "delivery {} was taken over from this process before it was handed out; roll back, and call `next` again",
                        one.item.delivery
                    )))
                }
                Completion::Unseen => Err(Error::Refused(
                    "this transaction is stricter than READ COMMITTED and has read already, so that it cannot see what is leased beside it; call `next` before its first statement".into(),
                )),
            };
        }
    }

    /// Returns when something may be due for it: for before a transaction is begun. Another one may be
    /// faster, so [`next`](Self::next) may still find nothing.
    ///
    /// Cancel safety: nothing is lost with a dropped future.
    ///
    /// # Errors
    /// As [`next`](Self::next), for the subscription.
    pub async fn ready(&self) -> Result<(), Error> {
        let subscription = self.id().await?;
        let longest = self.postbox.settings().poll_interval()?;
        let store = self.postbox.store();
        let puller = self.postbox.puller().await?;
        puller.attend(subscription).await?;
        let mut pause = FIRST_POLL;
        loop {
            let (mut due, mut wait) = store.waiting(subscription).await?;
            if !due && puller.asleep(true).await? {
                // Looks once more now that publishers know.
                (due, wait) = store.waiting(subscription).await?;
            }
            if due {
                puller.asleep(false).await?;
                return Ok(());
            }
            tokio::select! {
                () = store.woken() => {}
                () = tokio::time::sleep(pause.min(wait.unwrap_or(pause))) => {}
            }
            pause = (pause * 2).min(longest.max(FIRST_POLL * 2));
        }
    }

    /// Says why a pulled delivery's transaction was rolled back, after that: the words become the
    /// attempt's error. `false` if the rollback was on record already (a second after it, or at once
    /// when the [`Pulled`] was dropped); then the words are kept beside it, as an observation.
    ///
    /// Takes what a handler would return as its error: any error, or a [`Failure`], whose verdict
    /// (permanent, retry after) is followed. Waits up to 5 s for a rollback that is on its way.
    ///
    /// Cancel safety: a dropped future leaves the words unsaid, or said.
    ///
    /// # Errors
    /// [`Error::Refused`]: the transaction is still open (the words are used once it is rolled back),
    /// or was committed. Or the database did not answer.
    pub async fn failed(&self, pulled: &Pulled, why: impl Into<Failure>) -> Result<bool, Error> {
        let seen = Observation {
            delivery: pulled.delivery,
            number: pulled.attempt,
            worker: pulled.worker,
            kind: "failed",
            detail: None,
            evidence: None,
        };
        let delivery = pulled.delivery;
        match self.postbox.puller().await?.failed(pulled.token, seen, why.into()).await? {
            Told::Recorded => Ok(true),
            Told::Observed => Ok(false),
            Told::Open => Err(Error::Refused(format!(
                "the transaction that pulled delivery {delivery} is still open; roll it back first"
            ))),
            Told::Committed => Err(Error::Refused(format!(
                "the transaction that pulled delivery {delivery} was committed: it has succeeded"
            ))),
        }
    }

    fn of(&self) -> Result<String, Error> {
        match &self.application {
            Some(name) => crate::settings::Settings::defaults().set("application", name).application(),
            None => self.postbox.settings().application(),
        }
    }

    fn remember(&self, id: SubscriptionId) {
        if let Ok(mut known) = self.known.lock() {
            *known = Some((id, Instant::now()));
        }
    }

    /// Its number, if it was looked up lately.
    fn known(&self) -> Option<SubscriptionId> {
        let known = self.known.lock().ok().and_then(|known| *known);
        known.filter(|(_, at)| at.elapsed() < FRESH).map(|(id, _)| id)
    }

    /// Its number; declares it if it is not stored and can be.
    async fn id(&self) -> Result<SubscriptionId, Error> {
        if let Some(id) = self.known() {
            return Ok(id);
        }
        let application = self.of()?;
        let name = self.name.escape_debug();
        match self.postbox.store().stored(&application, &self.name).await? {
            Some((_, Kind::Operation)) => Err(Error::Refused(format!(
                "the subscription `{name}` is an operation's: its attempts are put on record for a handler that a worker calls, and cannot be pulled"
            ))),
            Some((id, _)) => {
                self.remember(id);
                Ok(id)
            }
            None if self.pattern.is_some() => {
                self.declare().await?;
                self.known().ok_or_else(|| Error::NotFound(format!("the subscription `{name}` was not stored")))
            }
            None => Err(Error::NotFound(format!(
                "the application `{}` has no subscription `{name}`; give it a pattern (`.pattern(\"orders.*\")`) and call `declare`, or name its application",
                application.escape_debug()
            ))),
        }
    }
}

/// A pulled delivery: the envelope, and which attempt this is. Its transaction's end is its own.
#[derive(Debug)]
pub struct Pulled {
    delivery: DeliveryId,
    attempt: u32,
    max_attempts: u32,
    envelope: Arc<Envelope>,
    token: uuid::Uuid,
    worker: uuid::Uuid,
    /// Tells the keeper that somebody may still say why it was rolled back.
    _alive: Arc<()>,
}

impl Pulled {
    /// The delivery's number, as the command and [`admin`](Postbox::admin) show it.
    pub fn delivery(&self) -> i64 {
        self.delivery
    }

    /// Which attempt this is, from 1.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// How many there will be at most.
    pub fn max_attempts(&self) -> u32 {
        self.max_attempts
    }

    /// The payload as `T`.
    ///
    /// # Errors
    /// The JSON path at which it does not fit, and why.
    pub fn payload<T: DeserializeOwned + 'static>(&self) -> Result<T, DecodeError> {
        self.envelope.decode()
    }

    /// Runs a future in which what is published carries this message's correlation, causation and
    /// trace, as in a handler.
    pub async fn scope<F: Future>(&self, future: F) -> F::Output {
        Context::of(&self.envelope).scope(future).await
    }
}

impl std::ops::Deref for Pulled {
    type Target = Envelope;

    fn deref(&self) -> &Envelope {
        &self.envelope
    }
}
