//! What stands behind a process's pulls: a worker row with its heartbeat, and a keeper that looks
//! after what was handed out until its transaction has ended.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc, watch};
use uuid::Uuid;

use super::attempt::clean;
use super::core::Event;
use super::maintain::{self, Topics};
use super::{LEAST_PATIENCE, Life, Moment, heart, told, worker_name};
use crate::error::Error;
use crate::handler::Failure;
use crate::lifecycle::{self, End, Event as Happening, Next, Standing, State, transition};
use crate::settings::Settings;
use crate::store::{
    Fate, Guarded, Move, Observation, OutcomeRecord, PulledOne, Registration, Settle, Store, SubscriptionId,
};

/// The first wait before it looks again at transactions that are open; it doubles.
const FIRST_LOOK: Duration = Duration::from_millis(20);
/// The longest one.
const LONGEST_LOOK: Duration = Duration::from_secs(1);
/// How long a caller that still holds what was rolled back may take to say why.
const GRACE: Duration = Duration::from_secs(1);
/// What is on record when it does not.
const ROLLED_BACK: &str = "the caller's transaction was rolled back";

/// A process's puller; it ends with the last handle on it.
#[derive(Debug)]
pub(crate) struct Puller<S: Store> {
    shared: Arc<Shared<S>>,
    stop: watch::Sender<()>,
    keeper: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
pub(crate) struct Shared<S: Store> {
    store: S,
    worker: Mutex<Uuid>,
    lease: Duration,
    held: Mutex<HashMap<Uuid, Held>>,
    subscriptions: Mutex<BTreeSet<SubscriptionId>>,
    asleep: AtomicBool,
    /// One look at a time, so that an attempt's error has one author.
    looking: tokio::sync::Mutex<()>,
    poked: Notify,
    topics: Arc<Topics>,
}

/// A lease that was asked for, and is not known to have ended.
#[derive(Debug)]
struct Held {
    worker: Uuid,
    /// What it carries, once that is known.
    one: Option<Box<PulledOne>>,
    stage: Stage,
    since: Instant,
    rolled_back: Option<Instant>,
    failure: Option<Failure>,
}

#[derive(Debug)]
enum Stage {
    /// `next` is at work.
    Claiming,
    /// It is the caller's, for as long as somebody holds this.
    Handed(Weak<()>),
    /// `next` ended without handing it out.
    Abandoned,
}

/// What `failed` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// The words are the attempt's error.
    Recorded,
    /// The attempt was on record already; the words stand beside it.
    Observed,
    /// The transaction is still open.
    Open,
    /// The transaction was committed.
    Committed,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    match mutex.lock() {
        Ok(guard) => guard,
        Err(poisoned) => poisoned.into_inner(),
    }
}

impl<S: Store> Puller<S> {
    pub(crate) async fn start(store: S, settings: &Settings) -> Result<Self, Error> {
        let registration = Registration {
            worker: Uuid::now_v7(),
            name: format!("{} (pull)", worker_name()),
            application: settings.application()?,
            lease: settings.lease()?,
            subscriptions: Vec::new(),
        };
        let sent = Moment::now();
        store.register(&registration).await?;
        let life = Arc::new(Life::new(registration.worker, sent, registration.lease));
        let (events, inbox) = mpsc::unbounded_channel();
        let heart = heart::start(&store, &registration, Vec::new(), life, events)?;
        let shared = Arc::new(Shared {
            store,
            worker: Mutex::new(registration.worker),
            lease: registration.lease,
            held: Mutex::default(),
            subscriptions: Mutex::default(),
            asleep: AtomicBool::new(false),
            looking: tokio::sync::Mutex::default(),
            poked: Notify::new(),
            topics: Arc::default(),
        });
        let (stop, stopped) = watch::channel(());
        let keeper = tokio::spawn(keep(shared.clone(), heart, inbox, stopped));
        Ok(Puller { shared, stop, keeper })
    }

    /// Its runtime is gone, and the keeper with it: another one is needed.
    pub(crate) fn is_over(&self) -> bool {
        self.keeper.is_finished()
    }

    pub(crate) fn shared(&self) -> Arc<Shared<S>> {
        self.shared.clone()
    }

    /// Settles what was rolled back, and ends the worker row.
    pub(crate) async fn stop(self) {
        drop(self.stop);
        tokio::time::timeout(LEAST_PATIENCE, self.keeper).await.ok();
    }
}

/// `next`'s hold on a lease it asked for. Dropped before it is handed out, the delivery goes back.
pub(crate) struct Claiming<S: Store> {
    shared: Arc<Shared<S>>,
    pub(crate) worker: Uuid,
    pub(crate) token: Uuid,
    open: bool,
}

impl<S: Store> Drop for Claiming<S> {
    fn drop(&mut self) {
        if self.open {
            if let Some(held) = lock(&self.shared.held).get_mut(&self.token) {
                held.stage = Stage::Abandoned;
            }
            self.shared.poked.notify_one();
        }
    }
}

impl<S: Store> Claiming<S> {
    /// There was nothing, or nothing is left to look after.
    pub(crate) fn forget(mut self) {
        self.open = false;
        lock(&self.shared.held).remove(&self.token);
    }

    pub(crate) fn leased(&self, one: &PulledOne) {
        if let Some(held) = lock(&self.shared.held).get_mut(&self.token) {
            held.one = Some(Box::new(one.clone()));
        }
        if let Some(envelope) = &one.item.envelope {
            self.shared.topics.saw_topic(&envelope.topic);
        }
    }

    /// It is the caller's from now on; the answer is what the caller holds while it has it.
    pub(crate) fn hand_out(mut self) -> Arc<()> {
        self.open = false;
        let alive = Arc::new(());
        if let Some(held) = lock(&self.shared.held).get_mut(&self.token) {
            held.stage = Stage::Handed(Arc::downgrade(&alive));
        }
        self.shared.poked.notify_one();
        alive
    }

    /// Its message is gone: dead, loudly.
    pub(crate) async fn bury(self, one: &PulledOne) -> Result<(), Error> {
        let gone = Failure::permanent("its message is gone: retention or a restore took it before it was delivered");
        self.shared.store.settle(&ended(one, Duration::ZERO, gone)?).await?;
        self.forget();
        Ok(())
    }
}

impl<S: Store> Shared<S> {
    pub(crate) fn store(&self) -> &S {
        &self.store
    }

    /// Mints a token, and remembers it before anything is asked for under it.
    pub(crate) fn claiming(self: &Arc<Self>) -> Claiming<S> {
        let (worker, token) = (*lock(&self.worker), Uuid::now_v7());
        let held =
            Held { worker, one: None, stage: Stage::Claiming, since: Instant::now(), rolled_back: None, failure: None };
        lock(&self.held).insert(token, held);
        Claiming { shared: self.clone(), worker, token, open: true }
    }

    pub(crate) fn attends(&self, subscription: SubscriptionId) -> bool {
        lock(&self.subscriptions).contains(&subscription)
    }

    /// Says in the worker's row that it stands behind this subscription, too.
    pub(crate) async fn attend(&self, subscription: SubscriptionId) -> Result<(), Error> {
        let (worker, all) = {
            let mut subscriptions = lock(&self.subscriptions);
            if subscriptions.contains(&subscription) {
                return Ok(());
            }
            subscriptions.insert(subscription);
            (*lock(&self.worker), subscriptions.iter().copied().collect::<Vec<_>>())
        };
        let attended = self.store.attend(worker, &all).await;
        if attended.is_err() {
            lock(&self.subscriptions).remove(&subscription);
        }
        attended
    }

    /// Says whether publishers are to wake this process. A wait that is dropped leaves it said, which
    /// costs them a notification until the next wait ends.
    /// Whether that is new.
    pub(crate) async fn asleep(&self, asleep: bool) -> Result<bool, Error> {
        if self.asleep.swap(asleep, Ordering::SeqCst) == asleep {
            return Ok(false);
        }
        let worker = *lock(&self.worker);
        self.store.asleep(worker, asleep).await?;
        Ok(true)
    }

    /// Settles the attempt that was handed out under this token, in the caller's words.
    pub(crate) async fn failed(&self, token: Uuid, seen: Observation, failure: Failure) -> Result<Told, Error> {
        let give_up = Instant::now() + LEAST_PATIENCE;
        let words = clean(failure.error.clone());
        let mut said = false;
        loop {
            let looked = self.looking.lock().await;
            let known = match lock(&self.held).get_mut(&token) {
                Some(held) => {
                    held.failure.get_or_insert_with(|| failure.clone());
                    said = true;
                    true
                }
                None => false,
            };
            if !known {
                let attempts = self.store.show(seen.delivery).await?.map(|detail| detail.attempts).unwrap_or_default();
                if let Some(this) = attempts.into_iter().find(|a| a.number == seen.number) {
                    if this.outcome.as_deref() == Some("succeeded") {
                        return Ok(Told::Committed);
                    }
                    // The keeper has used the words meanwhile.
                    if said && this.error.as_deref() == Some(&*words) {
                        return Ok(Told::Recorded);
                    }
                }
                self.store.observe(&[Observation { detail: Some(words), ..seen }]).await?;
                return Ok(Told::Observed);
            }
            let fate = self.store.fates(&[token]).await?.first().map(|(_, fate)| *fate);
            match fate {
                Some(Fate::RolledBack) => {
                    self.settle(token).await?;
                    return Ok(Told::Recorded);
                }
                Some(Fate::Open) => {}
                // Committed, or settled by somebody else: the record tells.
                Some(Fate::Gone) | None => {
                    lock(&self.held).remove(&token);
                    continue;
                }
            }
            drop(looked);
            if Instant::now() >= give_up {
                return Ok(Told::Open);
            }
            // A dropped transaction is rolled back a moment later.
            tokio::time::sleep(FIRST_LOOK).await;
        }
    }

    /// One look at all that is not the callers' own affair.
    async fn look(&self) {
        let _one = self.looking.lock().await;
        let tokens: Vec<Uuid> = lock(&self.held)
            .iter()
            .filter(|(_, held)| !matches!(held.stage, Stage::Claiming))
            .map(|(token, _)| *token)
            .collect();
        if tokens.is_empty() {
            return;
        }
        let Some(fates) = told("fates", LEAST_PATIENCE, self.store.fates(&tokens)).await else { return };
        for (token, fate) in fates {
            match fate {
                Fate::Open => {}
                Fate::Gone => self.gone(token).await,
                Fate::RolledBack => {
                    if self.is_due(token) {
                        told("settle", LEAST_PATIENCE, self.settle(token)).await;
                    }
                }
            }
        }
    }

    fn abandoned(&self) -> bool {
        lock(&self.held).values().any(|held| matches!(held.stage, Stage::Abandoned))
    }

    /// Whether what was rolled back is to be settled now: its holder may still say why.
    fn is_due(&self, token: Uuid) -> bool {
        let mut all = lock(&self.held);
        let Some(held) = all.get_mut(&token) else { return false };
        let since = *held.rolled_back.get_or_insert_with(Instant::now);
        match &held.stage {
            Stage::Handed(alive) if alive.strong_count() > 0 && held.failure.is_none() => since.elapsed() >= GRACE,
            _ => true,
        }
    }

    /// Settles what was rolled back: a failed attempt, or none if it was never handed out.
    async fn settle(&self, token: Uuid) -> Result<(), Error> {
        let (worker, wanted) = {
            let all = lock(&self.held);
            let Some(held) = all.get(&token) else { return Ok(()) };
            let wanted = match (&held.stage, &held.one) {
                (Stage::Handed(_), Some(one)) => {
                    let failure = held.failure.clone().unwrap_or_else(|| Failure::retry(ROLLED_BACK));
                    Some(ended(one, held.since.elapsed(), failure)?)
                }
                _ => None,
            };
            (held.worker, wanted)
        };
        match wanted {
            Some(settle) => {
                if self.store.settle(&settle).await? == Guarded::Fenced {
                    tracing::warn!(%token, "a rolled back delivery had been taken over already");
                }
            }
            None => self.store.forgo(worker, token).await?,
        }
        lock(&self.held).remove(&token);
        Ok(())
    }

    /// The lease has ended with its transaction. One that `next` had not handed out was completed by a
    /// caller who dropped `next` and committed all the same: that is told and kept.
    async fn gone(&self, token: Uuid) {
        let Some(held) = lock(&self.held).remove(&token) else { return };
        let (Stage::Abandoned, Some(one)) = (held.stage, held.one) else { return };
        let (delivery, number) = (one.item.delivery, one.item.attempts + 1);
        let asked = self.store.recheck(one.lease, delivery, number);
        if told("recheck", LEAST_PATIENCE, asked).await == Some(Some(true)) {
            tracing::error!(
                delivery,
                "a `next` was dropped and its transaction committed all the same: the delivery counts as done, and nobody saw it"
            );
            let seen = Observation {
                delivery,
                number,
                worker: held.worker,
                kind: "unseen",
                detail: Some("committed after `next` was dropped: it was never handed out".into()),
                evidence: None,
            };
            told("observe", LEAST_PATIENCE, self.store.observe(&[seen])).await;
        }
    }

    /// Leases in the database that this process knows nothing of: claims whose answer was lost.
    async fn disown(&self, tokens: Vec<Uuid>) {
        let unknown: Vec<Uuid> = {
            let held = lock(&self.held);
            tokens.into_iter().filter(|token| !held.contains_key(token)).collect()
        };
        let worker = *lock(&self.worker);
        for token in unknown {
            told("forgo", LEAST_PATIENCE, self.store.forgo(worker, token)).await;
        }
    }
}

/// How an attempt that was rolled back ends.
fn ended(one: &PulledOne, ran: Duration, failure: Failure) -> Result<Settle, Error> {
    let number = one.item.attempts + 1;
    let now = Standing { state: State::Running, attempts: number, begun: true, lost: one.item.lost };
    let Failure { error, end, .. } = failure;
    let event = Happening::Ended(end);
    let next = transition(now, event, &one.policy, fastrand::f64()).map_err(refused)?;
    let words = clean(error);
    let record = OutcomeRecord {
        number,
        kind: end.as_str(),
        error: Some(words.clone()),
        receipt: None,
        ran,
        ago: Duration::ZERO,
    };
    Ok(Settle {
        lease: one.lease,
        part: 0,
        successes: Vec::new(),
        moves: vec![moved(one, next, words, record)],
        released: Vec::new(),
        follow_ups: Vec::new(),
        starts: Vec::new(),
        seen: Vec::new(),
        close: true,
    })
}

/// What the caller's commit makes of it.
pub(crate) fn succeeded(one: &PulledOne) -> Result<Move, Error> {
    let number = one.item.attempts + 1;
    let now = Standing { state: State::Running, attempts: number, begun: true, lost: one.item.lost };
    let next = transition(now, Happening::Ended(End::Succeeded), &one.policy, 0.0).map_err(refused)?;
    let record = OutcomeRecord {
        number,
        kind: "succeeded",
        error: None,
        receipt: None,
        ran: Duration::ZERO,
        ago: Duration::ZERO,
    };
    Ok(moved(one, next, String::new(), record))
}

fn refused(error: lifecycle::Refused) -> Error {
    Error::Refused(error.to_string())
}

fn moved(one: &PulledOne, next: Next, note: String, outcome: OutcomeRecord) -> Move {
    Move {
        delivery: one.item.delivery,
        message: one.item.message,
        subscription: one.item.subscription,
        priority: one.item.priority,
        rev: one.item.rev + 1,
        standing: next.standing,
        delay: next.delay,
        quiet: Duration::ZERO,
        note,
        outcome: Some(outcome),
        leads: false,
    }
}

/// Looks after what is handed out, until it is told to stop: promptly, then less and less often.
async fn keep<S: Store>(
    shared: Arc<Shared<S>>,
    heart: heart::Heart,
    mut inbox: mpsc::UnboundedReceiver<Event>,
    mut stopped: watch::Receiver<()>,
) {
    // Programs that only pull have no other worker that would do this.
    let house = tokio::spawn(maintain::keep(shared.store.clone(), shared.topics.clone(), shared.lease));
    let (mut pause, mut next) = (FIRST_LOOK, None);
    loop {
        tokio::select! {
            _ = stopped.changed() => break,
            () = shared.poked.notified() => {
                // What was just handed out is open: a busy process is not asked about each one.
                pause = FIRST_LOOK;
                let soon = Instant::now() + FIRST_LOOK;
                next = Some(next.map_or(soon, |at: Instant| at.min(soon)));
                if !shared.abandoned() {
                    continue;
                }
            }
            () = super::sleep_until(next) => {}
            event = inbox.recv() => match event {
                Some(Event::Pulse(_, tokens)) => shared.disown(tokens).await,
                Some(Event::Reborn(worker)) => {
                    *lock(&shared.worker) = worker;
                    shared.asleep.store(false, Ordering::SeqCst);
                    let all: Vec<SubscriptionId> = lock(&shared.subscriptions).iter().copied().collect();
                    told("attend", LEAST_PATIENCE, shared.store.attend(worker, &all)).await;
                }
                Some(_) => {}
                None => break,
            },
        }
        shared.look().await;
        pause = (pause * 2).min(LONGEST_LOOK);
        next = (!lock(&shared.held).is_empty()).then(|| Instant::now() + pause);
    }
    house.abort();
    shared.look().await;
    drop(heart);
    let worker = *lock(&shared.worker);
    told("retire", shared.lease.max(LEAST_PATIENCE), shared.store.retire(worker)).await;
}
