//! The worker: claims, attempts, settles, maintains; the decisions are in `core`.

mod attempt;
mod batch;
mod core;
mod heart;
mod maintain;
pub(crate) mod puller;
mod receive;
mod relay;
mod run;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{Notify, mpsc, oneshot, watch};
use uuid::Uuid;

use self::attempt::{Attempt, Means};
use self::core::{Command, Core, Event, Flushed, Hold, Lane, Member, Setup};
use self::receive::Receiver;
use self::run::{Look, Run, Running, Through};
use crate::crash;
use crate::error::Error;
use crate::lifecycle::{Kind, State};
use crate::planted::planted;
use crate::postbox::Postbox;
use crate::router::{Route, Router, Stands};
use crate::schedule::Schedule;
use crate::settings::Settings;
use crate::source::Source;
use crate::store::{Database, Guarded, Item, LeaseRef, Move, Registration, Store, Stranded, SubscriptionId};

/// How long a start may hand out what was published before it.
const FIRST_HISTORY: Duration = Duration::from_secs(1);

/// The least time that a verb of the store is given; more if the lease is longer.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);

/// A worker's options; the rest comes from [`Settings`].
#[derive(Debug)]
#[must_use = "a worker does nothing until it is started"]
pub struct WorkerBuilder<Db: Database> {
    postbox: Postbox<Db>,
    router: Router<Db>,
    settings: Settings,
    batch: Option<u32>,
    schedules: Vec<Schedule>,
    receivers: Vec<Receiver<Db>>,
}

impl<Db: Database> WorkerBuilder<Db> {
    pub(crate) fn new(postbox: &Postbox<Db>, router: Router<Db>) -> Self {
        WorkerBuilder {
            postbox: postbox.clone(),
            router,
            settings: postbox.settings().clone(),
            batch: None,
            schedules: Vec::new(),
            receivers: Vec::new(),
        }
    }

    /// Handlers that run at once, 1 to 10000. Default 5.
    pub fn concurrency(mut self, at_once: usize) -> Self {
        self.settings = self.settings.set("concurrency", at_once);
        self
    }

    /// How long it may stay silent before its work is taken over, 1 s to 1 h. Default 30 s.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.settings = self.settings.set("lease", format!("{}ms", lease.as_millis()));
        self
    }

    /// The longest it sleeps without looking, 5 ms to 1 h. Default 1 s.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.settings = self.settings.set("poll_interval", format!("{}ms", interval.as_millis()));
        self
    }

    /// The application its subscriptions belong to.
    pub fn application(mut self, name: impl Into<String>) -> Self {
        self.settings = self.settings.set("application", name.into());
        self
    }

    /// Claims batches of this size, instead of a size that follows the load.
    pub fn batch(mut self, size: u32) -> Self {
        self.batch = Some(size.clamp(1, 10_000));
        self
    }

    /// Declares a schedule when it starts, as [`Postbox::schedule`] does: one that an operator has edited
    /// stays as it is.
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedules.push(schedule);
        self
    }

    /// Receives from a source: what it reads becomes messages, each once, and goes to whatever is subscribed, here and
    /// in other workers. Any number of workers receive from the same source, if they call it by the same name; see
    /// `docs/receiving.md`.
    ///
    /// # Panics
    /// Two sources have one name.
    #[track_caller]
    pub fn receive(mut self, source: impl Source) -> Self {
        let receiver = Receiver::new(source);
        assert!(
            self.receivers.iter().all(|other| other.name() != receiver.name()),
            "two sources are called `{}`; give one a name of its own with `.named(\"…\")`",
            receiver.name()
        );
        self.receivers.push(receiver);
        self
    }

    /// Starts it on the current tokio runtime, with a thread of its own for heartbeats.
    ///
    /// # Errors
    /// A setting cannot be used, or the database did not answer. Nothing runs then.
    pub async fn start(self) -> Result<Worker<Db>, Error> {
        Worker::start(self).await
    }

    /// Starts it, runs until SIGINT or SIGTERM, and stops gracefully: no new claims, what runs is
    /// waited for. A second signal stops at once. One that comes while it still starts is not lost.
    ///
    /// # Errors
    /// As [`start`](Self::start), or it could not be stopped cleanly.
    pub async fn run(self) -> Result<(), Error> {
        // Before the start: whoever listens later does not hear of what came earlier.
        let mut signals = Signals::listen()?;
        let mut start = std::pin::pin!(self.start());
        let mut asked = false;
        let worker = loop {
            tokio::select! {
                started = &mut start => break started?,
                () = signals.next() => {
                    if asked {
                        return Err(Error::Refused("it was told to stop at once before it had started; nothing was claimed".into()));
                    }
                    asked = true;
                }
            }
        };
        if !asked {
            signals.next().await;
        }
        tracing::info!("stopping: no new claims; what runs is waited for (a second signal stops at once)");
        worker.stop_or_hurry(signals.next()).await
    }
}

/// SIGINT and SIGTERM.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> Result<Signals, Error> {
        use tokio::signal::unix::{SignalKind, signal};
        let failed = |e: std::io::Error| Error::Settings(format!("cannot listen for signals: {e}"));
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    No,
    Gracefully,
    Now,
}

/// A running worker. Dropping it stops it at once, in the background; [`stop`](Self::stop) waits.
#[derive(Debug)]
pub struct Worker<Db: Database> {
    id: Uuid,
    stop: Arc<watch::Sender<Stop>>,
    finished: Option<oneshot::Receiver<Result<(), Error>>>,
    stranded: Vec<Stranded>,
    postbox: Postbox<Db>,
}

impl<Db: Database> Drop for Worker<Db> {
    fn drop(&mut self) {
        if self.finished.is_some() {
            self.stop.send(Stop::Now).ok();
        }
    }
}

impl<Db: Database> Worker<Db> {
    async fn start(builder: WorkerBuilder<Db>) -> Result<Self, Error> {
        let WorkerBuilder { postbox, router, settings, batch, schedules, receivers } = builder;
        let mut routes = router.into_routes();
        let keeps = settings.keeps()?;
        settings.keep_unrouted()?;
        for route in &mut routes {
            let declared = &mut route.declared;
            declared.keep = keeps.filled_in(declared.policy.kind, declared.keep);
        }
        let registration = Registration {
            worker: Uuid::now_v7(),
            name: worker_name(),
            application: settings.application()?,
            lease: settings.lease()?,
            subscriptions: routes.iter().map(|r| r.declared.clone()).collect(),
        };
        for schedule in schedules {
            postbox.declare_schedule(&registration.application, schedule).await?;
        }
        relay::open(&routes).await?;
        let store = postbox.store().clone();
        let (stop, stopping) = watch::channel(Stop::No);
        let mut readings = Vec::with_capacity(receivers.len());
        for receiver in receivers {
            readings.push(receiver.start(&postbox, &registration.application, stopping.clone()).await?);
        }
        let sent = Moment::now();
        let ids = store.register(&registration).await?;
        // What was published before anybody was subscribed is there when this returns, unless it is much:
        // the rest goes on in the background.
        let begun = Instant::now();
        while begun.elapsed() < FIRST_HISTORY && matches!(store.backfill().await, Ok(true)) {}
        let stranded = store.stranded().await?;
        for lost in &stranded {
            tracing::warn!(
                application = lost.application,
                subscription = lost.subscription,
                waiting = lost.waiting,
                "deliveries wait for a subscription that no live worker stands behind; if it was renamed, say `.renamed_from(…)`; if it is gone, `postbox subscriptions remove`"
            );
        }
        let id = registration.worker;
        let (done, finished) = oneshot::channel();
        let life = Life::new(registration.worker, sent, registration.lease);
        let routes: Vec<_> = ids.into_iter().zip(routes).collect();
        relay::declare::<Db>(&store, &registration.application, &routes).await?;
        let engine = Engine::new(postbox.clone(), registration, life, routes, &settings, batch, stopping)?;
        let stop = Arc::new(stop);
        let last = Last(stop.clone());
        tokio::spawn(async move {
            // Each by itself, so that none keeps another waiting.
            let receiving: Vec<_> = readings.into_iter().map(tokio::spawn).collect();
            let result = engine.run().await;
            drop(last);
            for reading in receiving {
                reading.await.ok();
            }
            done.send(result).ok();
        });
        Ok(Worker { id, stop, finished: Some(finished), stranded, postbox })
    }

    /// Its id, as `status` and the attempts show it.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Subscriptions with deliveries waiting that no live worker stood behind when it started.
    pub fn stranded(&self) -> &[Stranded] {
        &self.stranded
    }

    /// The postbox it works on.
    pub fn postbox(&self) -> &Postbox<Db> {
        &self.postbox
    }

    /// Tells whether it lives, where the worker itself cannot be kept: behind a readiness check, say.
    pub fn alive(&self) -> Alive {
        Alive(self.stop.subscribe())
    }

    /// Stops claiming, hands back what has not started, waits for what runs: for as long as it
    /// takes, or until `patience` has passed. Then what still runs is cancelled: plain and
    /// transactional attempts count as failed and go back, operations are in doubt.
    ///
    /// # Errors
    /// The last outcomes could not be written; they are taken over when the lease runs out.
    pub async fn stop(mut self, patience: Option<Duration>) -> Result<(), Error> {
        self.stop.send_if_modified(|stop| {
            let first = *stop == Stop::No;
            if first {
                *stop = Stop::Gracefully;
            }
            first
        });
        let Some(mut finished) = self.finished.take() else { return Ok(()) };
        let gone =
            || Error::Refused("the worker's task was lost; its work is taken over when its lease runs out".into());
        if let Some(patience) = patience {
            match tokio::time::timeout(patience, &mut finished).await {
                Ok(result) => return result.unwrap_or_else(|_| Err(gone())),
                Err(_) => {
                    self.stop.send(Stop::Now).ok();
                }
            }
        }
        finished.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Stops gracefully, and when `hurry` comes before that is done (a second signal, say), at once.
    ///
    /// # Errors
    /// As [`stop`](Self::stop).
    pub async fn stop_or_hurry(self, hurry: impl Future<Output = ()>) -> Result<(), Error> {
        let stop = self.stop.clone();
        let mut stopped = std::pin::pin!(self.stop(None));
        tokio::select! {
            result = &mut stopped => return result,
            () = hurry => {}
        }
        tracing::warn!("stopping now");
        stop.send(Stop::Now).ok();
        stopped.await
    }

    /// Stops at once: what runs is cancelled, as [`stop`](Self::stop) does when its patience ends.
    ///
    /// # Errors
    /// As [`stop`](Self::stop).
    pub async fn stop_now(self) -> Result<(), Error> {
        self.stop.send(Stop::Now).ok();
        self.stop(None).await
    }
}

/// Whether a worker lives: [`Worker::alive`].
#[derive(Debug, Clone)]
pub struct Alive(watch::Receiver<Stop>);

impl Alive {
    /// It works: nobody has stopped it, and it has not ended by itself.
    pub fn is_alive(&self) -> bool {
        *self.0.borrow() == Stop::No
    }

    /// Waits until that is over. Cancel safety: it may be dropped.
    pub async fn ended(&self) {
        self.0.clone().wait_for(|stop| *stop != Stop::No).await.ok();
    }
}

/// Whatever ends a worker, its sources end with it.
struct Last(Arc<watch::Sender<Stop>>);

impl Drop for Last {
    fn drop(&mut self) {
        self.0.send_if_modified(|stop| {
            let by_itself = *stop == Stop::No;
            if by_itself {
                *stop = Stop::Gracefully;
            }
            by_itself
        });
    }
}

/// Host and process, for people.
fn worker_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("HOSTNAME").ok())
        .map(|h| h.trim().to_owned())
        .filter(|h| !h.is_empty())
        .unwrap_or_else(|| "localhost".into());
    format!("{host}:{}", std::process::id())
}

/// Whether an incarnation of this worker may still believe in its lease: a local deadline, taken
/// before the last renewal was sent. It is kept on two clocks, because the monotonic one stands still
/// while a machine is suspended, and the wall clock may be set.
#[derive(Debug)]
pub(crate) struct Life {
    origin: Instant,
    current: Mutex<Incarnation>,
}

#[derive(Debug, Clone, Copy)]
struct Incarnation {
    worker: Uuid,
    sent: Moment,
    lease: Duration,
}

impl Life {
    fn new(worker: Uuid, sent: Moment, lease: Duration) -> Life {
        Life { origin: sent.instant, current: Mutex::new(Incarnation { worker, sent, lease }) }
    }

    /// The renewal of this incarnation that was sent then has come through.
    fn extend(&self, worker: Uuid, sent: Moment, lease: Duration) {
        if let Ok(mut current) = self.current.lock() {
            *current = Incarnation { worker, sent, lease };
        }
    }

    /// An incarnation that was taken over never believes in its lease again.
    pub(crate) fn is_over(&self, worker: Uuid) -> bool {
        let Ok(current) = self.current.lock().map(|c| *c) else { return true };
        current.worker != worker || ran_out(current.sent.elapsed(), current.lease)
    }
}

/// Whether a lease must not be believed in any more, this long after its last renewal was sent.
pub(crate) fn ran_out(since: Duration, lease: Duration) -> bool {
    since >= lease && !planted!("no-last-look")
}

/// A moment on both clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    instant: Instant,
    wall: SystemTime,
}

impl Moment {
    fn now() -> Moment {
        Moment { instant: Instant::now(), wall: SystemTime::now() }
    }

    /// By the clock that has gone on further.
    fn elapsed(self) -> Duration {
        self.instant.elapsed().max(self.wall.elapsed().unwrap_or_default())
    }
}

/// The shell around the decisions: does what they say, tells them what happened.
struct Engine<Db: Database> {
    postbox: Postbox<Db>,
    registration: Registration,
    /// What its subscriptions are stored as, in the registration's order.
    ids: Vec<SubscriptionId>,
    routes: Arc<HashMap<SubscriptionId, Route<Db>>>,
    core: Core,
    origin: Instant,
    means: Arc<Means<Db>>,
    events: mpsc::UnboundedSender<Event>,
    inbox: mpsc::UnboundedReceiver<Event>,
    /// Observations on their way: evidence that must not be lost with the worker.
    observing: tokio::task::JoinSet<()>,
    running: HashMap<Hold, Running>,
    runs: Vec<Arc<Run<Db>>>,
    /// When the first of them is to be looked at, at the latest.
    look_at: Option<Instant>,
    /// A run has something to tell.
    bell: Arc<Notify>,
    stopping: watch::Receiver<Stop>,
    topics: Arc<maintain::Topics>,
}

impl<Db: Database> Engine<Db> {
    fn new(
        postbox: Postbox<Db>,
        registration: Registration,
        life: Life,
        routes: Vec<(SubscriptionId, Route<Db>)>,
        settings: &Settings,
        batch: Option<u32>,
        stopping: watch::Receiver<Stop>,
    ) -> Result<Self, Error> {
        let (events, inbox) = mpsc::unbounded_channel();
        let origin = life.origin;
        let lanes = routes.iter().map(|(id, route)| lane_of(*id, route, registration.lease));
        let setup = Setup {
            worker: registration.worker,
            concurrency: settings.concurrency()?,
            batch,
            poll_interval: settings.poll_interval()?,
            subscriptions: lanes.collect(),
            seed: fastrand::u64(..),
        };
        let means = Means {
            store: postbox.store().clone(),
            life: Arc::new(life),
            lease_time: registration.lease,
            patience: registration.lease.max(LEAST_PATIENCE),
            max_payload_bytes: settings.max_payload_bytes()?,
            events: events.clone(),
        };
        Ok(Engine {
            means: Arc::new(means),
            core: Core::new(setup),
            ids: routes.iter().map(|(id, _)| *id).collect(),
            routes: Arc::new(routes.into_iter().collect()),
            origin,
            events,
            inbox,
            observing: tokio::task::JoinSet::new(),
            running: HashMap::new(),
            runs: Vec::new(),
            look_at: None,
            bell: Arc::default(),
            stopping,
            topics: Arc::default(),
            postbox,
            registration,
        })
    }

    async fn run(mut self) -> Result<(), Error> {
        let store = self.postbox.store().clone();
        let mut ids = self.ids.clone();
        if planted!("reborn-in-another-order") {
            ids.reverse();
        }
        let heart = heart::start(&store, &self.registration, ids, self.means.life.clone(), self.events.clone())?;
        let counting = relay::Counting::start(store.clone(), self.routes.clone());
        let keeper =
            maintain::start(self.postbox.clone(), self.registration.clone(), self.routes.clone(), self.topics.clone());
        let mut batch = vec![Event::Tick];
        let mut handle_lives = true;
        let mut draining = false;
        loop {
            let commands = self.core.step(batch.drain(..), self.origin.elapsed());
            self.perform_all(commands);
            if draining {
                crash::point("draining");
            }
            if self.core.is_done(self.origin.elapsed()) {
                break;
            }
            let tick = [self.core.next_tick().map(|at| self.origin + at), self.look_at].into_iter().flatten().min();
            tokio::select! {
                event = self.inbox.recv() => batch.extend(event.and_then(|e| self.note(e))),
                () = store.woken() => batch.push(Event::Woken),
                () = self.bell.notified() => {}
                () = sleep_until(tick) => batch.push(Event::Tick),
                changed = self.stopping.changed(), if handle_lives => {
                    handle_lives = changed.is_ok();
                    let wish = if handle_lives { *self.stopping.borrow_and_update() } else { Stop::Now };
                    draining = wish != Stop::No;
                    match wish {
                        Stop::No => {}
                        Stop::Gracefully => batch.push(Event::Stop),
                        Stop::Now => batch.extend([Event::Stop, Event::StopNow]),
                    }
                }
            }
            while let Ok(event) = self.inbox.try_recv() {
                batch.extend(self.note(event));
            }
            // After the inbox: that one was cancelled is told there, and that it is gone may be told here.
            self.look(&mut batch);
        }
        keeper.abort();
        drop(heart);
        counting.end().await;
        let observed = async { while self.observing.join_next().await.is_some() {} };
        tokio::time::timeout(LEAST_PATIENCE, observed).await.ok();
        let retired = tokio::time::timeout(LEAST_PATIENCE, store.retire(self.registration.worker)).await;
        let left = self.core.left();
        if left > 0 {
            return Err(Error::Refused(format!(
                "{left} deliveries could not be settled before the stop; they are taken over when the lease has run out"
            )));
        }
        retired.unwrap_or_else(|_| Err(Error::Refused("the database did not answer before the stop".into())))
    }

    /// What the shell itself takes from an event, before the decisions see it.
    fn note(&mut self, event: Event) -> Option<Event> {
        match &event {
            Event::Freed(hold) => {
                self.running.remove(hold);
            }
            Event::Reborn(worker) => self.registration.worker = *worker,
            Event::Claimed(_, Some(claimed)) if !claimed.items.is_empty() => {
                crash::point("claimed");
                self.topics.saw(claimed);
            }
            _ => {}
        }
        Some(event)
    }

    /// Hears of what is through in the runs.
    fn look(&mut self, batch: &mut Vec<Event>) {
        self.look_at = None;
        if self.runs.is_empty() {
            return;
        }
        let (now, mut through) = (Instant::now(), Vec::<Through>::new());
        self.runs.retain(|run| match run.look(now, &mut through) {
            Look::Over => false,
            Look::Rings => true,
            Look::Again(at) => {
                self.look_at = Some(self.look_at.map_or(at, |other| other.min(at)));
                true
            }
        });
        for (hold, ended) in through {
            batch.extend(ended.map(|ended| Event::Ended(hold, ended)));
            batch.extend(self.note(Event::Freed(hold)));
        }
    }

    fn perform_all(&mut self, commands: Vec<Command>) {
        let (now, mut attempts) = (Instant::now(), Vec::new());
        for command in commands {
            self.perform(command, now, &mut attempts);
        }
        for run in run::start(attempts, &self.bell) {
            self.look_at.get_or_insert(now + run::LATE);
            self.runs.push(run);
        }
    }

    fn attempt(
        &mut self,
        hold: Hold,
        lease: LeaseRef,
        item: Box<Item>,
        number: u32,
        now: Instant,
    ) -> Option<Attempt<Db>> {
        let route = self.routes.get(&item.subscription)?;
        let Stands::Single(handler) = &route.handler else { return None };
        let policy = route.declared.policy;
        let fate = Arc::default();
        let operation = policy.kind == Kind::Operation;
        self.running.insert(hold, Running { fate: Arc::clone(&fate), members: Vec::new(), operation, started: now });
        let own = item.envelope.as_ref().and_then(|e| e.max_attempts);
        Some(Attempt {
            means: self.means.clone(),
            handler: handler.clone(),
            kind: policy.kind,
            max_attempts: own.unwrap_or(policy.retry.max_attempts),
            timeout: route.declared.timeout,
            hold,
            lease,
            item,
            number,
            limited: route.declared.limits.at_once.is_some() || route.declared.keys.is_some(),
            fate,
        })
    }

    /// Calls a batch handler.
    fn call(&mut self, members: Vec<Member>, now: Instant) {
        let Some(first) = members.first() else { return };
        let hold = first.hold;
        let Some(route) = self.routes.get(&first.item.subscription) else { return };
        let Stands::Batch(handler) = &route.handler else { return };
        let fate = Arc::default();
        let holds = members.iter().map(|member| member.hold).collect();
        let running = Running { fate: Arc::clone(&fate), members: holds, operation: false, started: now };
        self.running.insert(hold, running);
        let lane = lane_of(first.item.subscription, route, self.registration.lease);
        batch::start(batch::Called { means: self.means.clone(), handler: handler.clone(), lane, members, fate });
    }

    /// Does one; attempts are started together.
    fn perform(&mut self, command: Command, now: Instant, attempts: &mut Vec<Attempt<Db>>) {
        let means = self.means.clone();
        let (events, patience) = (self.events.clone(), means.patience);
        match command {
            Command::Claim(request) => {
                tokio::spawn(async move {
                    let claimed = told("claim", patience, means.store.claim(&request)).await;
                    events.send(Event::Claimed(request.token, claimed)).ok();
                });
            }
            Command::Permits(worker, wishes) => {
                tokio::spawn(async move {
                    let permits = told("permits", patience, means.store.permits(worker, &wishes)).await;
                    events.send(Event::Permitted(worker, permits)).ok();
                });
            }
            Command::Settle(settle) => {
                tokio::spawn(async move {
                    let flushed = match tokio::time::timeout(patience, means.store.settle(&settle)).await {
                        Ok(Ok(guarded)) => {
                            if guarded == Guarded::Done {
                                settle.moves.iter().for_each(log);
                            }
                            Flushed::Known(guarded)
                        }
                        Ok(Err(error)) if !error.is_transient() => Flushed::Refused(error.to_string()),
                        Ok(Err(error)) => {
                            tracing::warn!(%error, "a flush failed; trying again");
                            Flushed::Unknown
                        }
                        Err(_) => {
                            tracing::warn!("a flush got no answer; trying again");
                            Flushed::Unknown
                        }
                    };
                    events.send(Event::Settled(settle.lease.token, flushed)).ok();
                });
            }
            Command::Disown(token) => {
                let worker = self.registration.worker;
                tokio::spawn(async move {
                    let done = told("disown", patience, means.store.disown(worker, token)).await.is_some();
                    events.send(Event::Disowned(token, done)).ok();
                });
            }
            Command::Observe(observations) => {
                self.observing.spawn(async move {
                    for _ in 0..10 {
                        if told("observe", patience, means.store.observe(&observations)).await.is_some() {
                            return;
                        }
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                    tracing::error!(count = observations.len(), "late outcomes could not be recorded");
                });
            }
            Command::Asleep(asleep) => {
                let worker = self.registration.worker;
                tokio::spawn(async move {
                    told("asleep", patience, means.store.asleep(worker, asleep)).await;
                    // Looks once more now that publishers know.
                    events.send(Event::Woken).ok();
                });
            }
            Command::AskPaused(subscriptions) => {
                tokio::spawn(async move {
                    let paused = told("look for pauses", patience, means.store.paused(&subscriptions)).await;
                    events.send(Event::Paused(paused.unwrap_or_default())).ok();
                });
            }
            Command::Run(hold, lease, item, number) => attempts.extend(self.attempt(hold, lease, item, number, now)),
            Command::RunBatch(members) => self.call(members, now),
            Command::Cancel(hold, why) => {
                let shared = || self.running.values().find(|running| running.members.contains(&hold));
                if let Some(running) = self.running.get(&hold).or_else(shared) {
                    running.cancel(hold, why, &events);
                }
            }
        }
    }
}

/// A subscription as the decisions see it.
fn lane_of<Db: Database>(id: SubscriptionId, route: &Route<Db>, lease: Duration) -> Lane {
    let declared = &route.declared;
    Lane {
        id,
        policy: declared.policy,
        timeout: declared.timeout,
        quiet: declared.quiet,
        late: declared.quiet.saturating_add(declared.timeout).saturating_add(lease),
        concurrency: route.concurrency,
        keys: declared.keys,
        gather: route.gather,
        limited: declared.limits.at_once.is_some(),
        metered: declared.limits.rate.is_some(),
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// A verb's result; an error is logged, and the decisions try again.
async fn told<T>(verb: &'static str, patience: Duration, result: impl Future<Output = Result<T, Error>>) -> Option<T> {
    match tokio::time::timeout(patience, result).await {
        Ok(Ok(value)) => Some(value),
        Err(_) => {
            tracing::warn!(verb, "the database gave no answer; trying again");
            None
        }
        Ok(Err(error)) => {
            tracing::warn!(verb, %error, "the database did not do as asked; trying again");
            None
        }
    }
}

/// Says what did not go well, once that is on record.
fn log(done: &Move) {
    let Move { delivery, message, note, .. } = done;
    match (done.standing.state, &done.outcome) {
        (State::Dead, _) => {
            tracing::warn!(delivery, message_id = %message, why = note, "dead: it is not tried again by itself")
        }
        (State::InDoubt, _) => {
            tracing::warn!(delivery, message_id = %message, why = note, "in doubt: nobody saw how it ended")
        }
        (State::Pending, Some(outcome)) => {
            let why = outcome.error.as_deref().unwrap_or_default();
            tracing::debug!(delivery, message_id = %message, attempt = outcome.number, why, "an attempt failed; it is tried again");
        }
        _ => {}
    }
}
