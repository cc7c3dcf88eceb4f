//! The worker's decisions, without I/O: events go in with the time, commands come out.
//!
//! One value of [`Core`] is one worker. It never waits and never touches a database, so a simulation
//! can drive it through any order of events, lost answers included. Times are durations on the
//! worker's own monotonic clock; what is written carries durations, for the database's clock.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use uuid::Uuid;

use crate::lifecycle::{Answer, End, Event as Lived, Kind, Policy, Standing, State, transition};
use crate::message::Draft;
use crate::store::{
    ClaimRequest, Claimed, Evidence, Guarded, Item, LeaseRef, Move, Observation, OutcomeRecord, Settle, SubscriptionId,
    Success,
};

/// The most that is claimed at once.
const MAX_BATCH: u32 = 500;
/// How much work lies ready in memory: about what is done in this time.
const AHEAD: Duration = Duration::from_millis(250);
/// What has ended waits this long for company before it is settled.
const FLUSH_AFTER: Duration = Duration::from_millis(10);
/// What has ended is settled at once when it is this many.
const FLUSH_COUNT: usize = 100;
/// The first wait of the fallback poll; it doubles up to the poll interval.
const FIRST_POLL: Duration = Duration::from_millis(5);
/// The first and the longest wait before a verb that failed is tried again.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long a handler that could not be called is put off.
const NOT_CALLED_PAUSE: Duration = Duration::from_secs(1);
/// After `StopNow`, how long outcomes may still take to be written.
const LAST_WAIT: Duration = Duration::from_secs(5);

/// What a worker is made of.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) worker: Uuid,
    pub(crate) concurrency: usize,
    /// A fixed size of batches, instead of one that follows the load.
    pub(crate) batch: Option<u32>,
    pub(crate) poll_interval: Duration,
    pub(crate) subscriptions: Vec<Lane>,
    /// Tokens and jitter come from here.
    pub(crate) seed: u64,
}

/// A subscription as the decisions see it.
#[derive(Debug, Clone)]
pub(crate) struct Lane {
    pub(crate) id: SubscriptionId,
    pub(crate) policy: Policy,
    pub(crate) timeout: Duration,
    /// How long a call that was sent may still be on its way to the remote.
    pub(crate) quiet: Duration,
    pub(crate) concurrency: Option<usize>,
}

/// One delivery in hand: the batch's token and its place in the batch.
pub(crate) type Hold = (Uuid, usize);

/// How an attempt ended, as the runner reports it.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub(crate) end: End,
    pub(crate) error: Option<String>,
    pub(crate) receipt: Option<serde_json::Value>,
    pub(crate) follow_ups: Vec<Draft>,
    pub(crate) ran: Duration,
    /// A transactional handler's transaction has committed its outcome already.
    pub(crate) settled: bool,
    /// The lease was found to be gone.
    pub(crate) fenced: bool,
    /// Its task was cancelled, and may not have let go yet.
    pub(crate) cut_off: bool,
    /// The handler was never called, for a reason that is not its own.
    pub(crate) not_called: bool,
}

impl Ended {
    /// With this end, and nothing else to tell.
    pub(crate) fn of(end: End) -> Ended {
        Ended {
            end,
            error: None,
            receipt: None,
            follow_ups: Vec::new(),
            ran: Duration::ZERO,
            settled: false,
            fenced: false,
            cut_off: false,
            not_called: false,
        }
    }
}

/// What became of a flush.
#[derive(Debug)]
pub(crate) enum Flushed {
    /// The store said so.
    Known(Guarded),
    /// The answer was lost, or the database is away.
    Unknown,
    /// The database will not take what is in it.
    Refused(String),
}

/// What happens to a worker.
#[derive(Debug)]
pub(crate) enum Event {
    /// Something may be there.
    Woken,
    /// A claim returned; `None`: its answer was lost or an error.
    Claimed(Uuid, Option<Claimed>),
    /// A flush returned.
    Settled(Uuid, Flushed),
    /// A handback of an unknown claim returned.
    Disowned(Uuid, bool),
    /// An attempt ended.
    Ended(Hold, Box<Ended>),
    /// Its task is gone, and with it the permit.
    Freed(Hold),
    /// A heartbeat, sent at this time, found these leases.
    Pulse(Duration, Vec<Uuid>),
    /// The worker was taken over; it goes on as this one.
    Reborn(Uuid),
    /// No new claims, and nothing new starts.
    Stop,
    /// What still runs is cancelled.
    StopNow,
    /// Time has passed.
    Tick,
}

/// Why a handler is cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cancel {
    TimedOut,
    Stopped,
    Fenced,
}

/// What a worker wants done.
#[derive(Debug)]
pub(crate) enum Command {
    Claim(ClaimRequest),
    Settle(Box<Settle>),
    Disown(Uuid),
    Run(Hold, LeaseRef, Box<Item>, u32),
    Cancel(Hold, Cancel),
    Observe(Vec<Observation>),
    Asleep(bool),
}

#[derive(Debug)]
enum Slot {
    /// Waits for a permit.
    Queued,
    /// Has a permit, waits for its attempt to be on record.
    Reserved,
    /// Its attempt is being put on record.
    Starting,
    Running {
        deadline: Duration,
        cancelled: bool,
    },
    /// Could not be called; tried again from this time on.
    Paused(Duration),
    /// An operation that was cut off and has not let go: it may still do its work.
    CutOff(Box<Ended>),
    /// Ended, waits to be settled.
    Ended(Box<Ended>, Duration),
    /// Handed back, waits to be settled.
    Released,
    /// In the flush that is under way; how it ended is kept, in case the flush is fenced.
    Settling(Option<Box<Ended>>),
    Settled,
}

#[derive(Debug)]
struct Batch {
    lease: LeaseRef,
    items: Vec<(Item, Slot)>,
    claimed_at: Duration,
    next_part: i32,
    /// The flush under way, kept for trying again: its answer may get lost.
    flight: Option<Settle>,
    again_at: Option<Duration>,
    pause: Duration,
    fenced: bool,
    /// A flush was refused: what is in it is settled one by one, to find the one that is.
    one_by_one: bool,
}

#[derive(Debug, Default)]
struct Load {
    queued: usize,
    /// Of those, the ones that run one at a time.
    suspects: usize,
    running: usize,
    /// A moving average of how long an attempt runs.
    ran: Option<Duration>,
}

/// What of a batch a kill would leave in doubt.
#[derive(Debug, Clone, Copy, Default)]
struct Exposed {
    /// Begun, or about to be.
    open: usize,
    /// Ended, and settled by the batch's next flush.
    ended: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Working,
    Stopping,
    StoppingNow,
}

/// One worker's decisions.
#[derive(Debug)]
pub(crate) struct Core {
    setup: Setup,
    lanes: HashMap<SubscriptionId, (Lane, Load)>,
    batches: BTreeMap<Uuid, Batch>,
    queue: VecDeque<Hold>,
    /// Who holds a permit; more than run, while a cancelled handler does not let go.
    permits: HashMap<Hold, SubscriptionId>,
    suspect: Option<Hold>,
    claiming: Option<Uuid>,
    /// Claims whose answer was lost: they may hold a lease that nobody works on.
    lost_claims: BTreeMap<Uuid, Option<Duration>>,
    phase: Phase,
    /// What has not let go by then is left to a takeover.
    give_up_at: Option<Duration>,
    hungry: bool,
    asleep: bool,
    poll_at: Duration,
    poll_wait: Duration,
    pause: Duration,
    rng: fastrand::Rng,
}

impl Core {
    pub(crate) fn new(setup: Setup) -> Core {
        let lanes = setup.subscriptions.iter().map(|lane| (lane.id, (lane.clone(), Load::default()))).collect();
        Core {
            lanes,
            batches: BTreeMap::new(),
            queue: VecDeque::new(),
            permits: HashMap::new(),
            suspect: None,
            claiming: None,
            lost_claims: BTreeMap::new(),
            phase: Phase::Working,
            give_up_at: None,
            hungry: true,
            asleep: false,
            poll_at: Duration::ZERO,
            poll_wait: FIRST_POLL,
            pause: FIRST_PAUSE,
            rng: fastrand::Rng::with_seed(setup.seed),
            setup,
        }
    }

    /// Nothing is held any more and nothing is under way: the worker may retire.
    pub(crate) fn is_done(&self, now: Duration) -> bool {
        let over = self.batches.is_empty() && self.claiming.is_none();
        match self.phase {
            Phase::Working => false,
            Phase::Stopping => over && self.permits.is_empty(),
            // A handler or a database that does not answer is not waited for.
            Phase::StoppingNow => over || self.give_up_at.is_some_and(|at| at <= now),
        }
    }

    /// Deliveries that are left to a takeover.
    pub(crate) fn left(&self) -> usize {
        self.batches.values().flat_map(|b| &b.items).filter(|(_, slot)| !matches!(slot, Slot::Settled)).count()
    }

    /// When `Tick` is wanted at the latest.
    pub(crate) fn next_tick(&self) -> Option<Duration> {
        let mut next: Option<Duration> = None;
        let mut at_latest = |at: Duration| next = Some(next.map_or(at, |n| n.min(at)));
        if !self.hungry && self.wanted().is_some() {
            at_latest(self.poll_at);
        }
        if let Some(at) = self.give_up_at {
            at_latest(at);
        }
        for batch in self.batches.values() {
            if let Some(at) = batch.again_at {
                at_latest(at);
            }
            for (_, slot) in &batch.items {
                match slot {
                    Slot::Running { deadline, cancelled: false } => at_latest(*deadline),
                    Slot::Paused(until) if self.phase == Phase::Working => at_latest(*until),
                    Slot::Ended(_, at) if batch.flight.is_none() && !batch.fenced && batch.again_at.is_none() => {
                        at_latest(*at + FLUSH_AFTER);
                    }
                    _ => {}
                }
            }
        }
        for at in self.lost_claims.values().flatten() {
            at_latest(*at);
        }
        next
    }

    /// Takes events that happened by `now`, and says what to do.
    pub(crate) fn step(&mut self, events: impl IntoIterator<Item = Event>, now: Duration) -> Vec<Command> {
        let mut commands = Vec::new();
        for event in events {
            self.take(event, now, &mut commands);
        }
        self.expire(now, &mut commands);
        self.start(now, &mut commands);
        self.flush(now, &mut commands);
        self.claim(now, &mut commands);
        commands
    }

    fn take(&mut self, event: Event, now: Duration, commands: &mut Vec<Command>) {
        match event {
            Event::Woken => self.hungry = true,
            Event::Tick => {}
            Event::Claimed(token, claimed) => self.claimed(token, claimed, now, commands),
            Event::Settled(token, answer) => self.settled(token, answer, now, commands),
            Event::Disowned(token, done) => {
                if done {
                    self.lost_claims.remove(&token);
                } else if let Some(at) = self.lost_claims.get_mut(&token) {
                    *at = Some(now + LONGEST_PAUSE);
                }
            }
            Event::Ended(hold, ended) => self.ended(hold, *ended, now, commands),
            Event::Freed(hold) => self.freed(hold, now, commands),
            Event::Pulse(sent, tokens) => {
                // A lease that is stored and that nobody here knows: its claim's answer was lost, and
                // its COMMIT came through after all.
                for token in &tokens {
                    let known = self.batches.contains_key(token) || self.claiming == Some(*token);
                    if !known && !self.lost_claims.contains_key(token) {
                        self.lost_claims.insert(*token, None);
                        commands.push(Command::Disown(*token));
                    }
                }
                let gone: Vec<Uuid> = self
                    .batches
                    .values()
                    .filter(|b| b.claimed_at < sent && b.flight.is_none() && !tokens.contains(&b.lease.token))
                    .map(|b| b.lease.token)
                    .collect();
                for token in gone {
                    self.fence(token, commands);
                }
            }
            Event::Reborn(worker) => {
                let tokens: Vec<Uuid> = self.batches.keys().copied().collect();
                for token in tokens {
                    self.fence(token, commands);
                }
                self.setup.worker = worker;
                self.lost_claims.clear();
                self.asleep = false;
                self.hungry = true;
            }
            Event::Stop => {
                if self.phase == Phase::Working {
                    self.phase = Phase::Stopping;
                }
                self.release_queued();
            }
            Event::StopNow => {
                self.phase = Phase::StoppingNow;
                self.give_up_at.get_or_insert(now + LAST_WAIT);
                self.release_queued();
                for (token, batch) in &mut self.batches {
                    for (index, (_, slot)) in batch.items.iter_mut().enumerate() {
                        if let Slot::Running { cancelled: cancelled @ false, .. } = slot {
                            *cancelled = true;
                            commands.push(Command::Cancel((*token, index), Cancel::Stopped));
                        }
                    }
                }
            }
        }
    }

    fn claimed(&mut self, token: Uuid, claimed: Option<Claimed>, now: Duration, commands: &mut Vec<Command>) {
        if self.claiming == Some(token) {
            self.claiming = None;
        }
        let Some(claimed) = claimed else {
            self.lost_claims.insert(token, None);
            commands.push(Command::Disown(token));
            self.poll_at = now + self.pause;
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            return;
        };
        self.pause = FIRST_PAUSE;
        if claimed.items.is_empty() {
            if self.asleep {
                let wait = claimed.next_due.map_or(self.poll_wait, |due| due.min(self.poll_wait));
                self.poll_at = now + wait.max(Duration::from_millis(1));
                self.poll_wait = (self.poll_wait * 2).min(self.setup.poll_interval);
            } else {
                // Say so, look once more, and only then sleep: what is published in between is seen.
                self.asleep = true;
                self.hungry = true;
                commands.push(Command::Asleep(true));
            }
            return;
        }
        self.poll_wait = FIRST_POLL.min(self.setup.poll_interval);
        self.hungry = true;
        if self.asleep && claimed.items.len() as u32 >= self.target() {
            self.asleep = false;
            commands.push(Command::Asleep(false));
        }
        let lease = LeaseRef { worker: self.setup.worker, batch: claimed.batch, token };
        let mut items = Vec::with_capacity(claimed.items.len());
        for (index, item) in claimed.items.into_iter().enumerate() {
            if let Some((lane, load)) = self.lanes.get_mut(&item.subscription) {
                load.enter(lane, &item);
            }
            self.queue.push_back((token, index));
            items.push((item, Slot::Queued));
        }
        self.batches.insert(
            token,
            Batch {
                lease,
                items,
                claimed_at: now,
                next_part: 0,
                flight: None,
                again_at: None,
                pause: FIRST_PAUSE,
                fenced: false,
                one_by_one: false,
            },
        );
        if self.phase != Phase::Working {
            self.release_queued();
        }
    }

    /// Hands back what has not started.
    fn release_queued(&mut self) {
        for (token, index) in std::mem::take(&mut self.queue) {
            if let Some(batch) = self.batches.get_mut(&token) {
                let (item, slot) = &mut batch.items[index];
                if matches!(slot, Slot::Queued) {
                    *slot = Slot::Released;
                    if let Some((lane, load)) = self.lanes.get_mut(&item.subscription) {
                        load.leave(lane, item);
                    }
                }
            }
        }
        let mut freed = Vec::new();
        for (token, batch) in &mut self.batches {
            for (index, (_, slot)) in batch.items.iter_mut().enumerate() {
                match slot {
                    Slot::Reserved => {
                        *slot = Slot::Released;
                        freed.push((*token, index));
                    }
                    Slot::Paused(_) => *slot = Slot::Released,
                    _ => {}
                }
            }
        }
        for hold in freed {
            self.free(hold);
        }
    }

    fn free(&mut self, hold: Hold) {
        if self.suspect == Some(hold) {
            self.suspect = None;
        }
        if let Some(subscription) = self.permits.remove(&hold)
            && let Some((_, load)) = self.lanes.get_mut(&subscription)
        {
            load.running -= 1;
        }
    }

    fn freed(&mut self, hold: Hold, now: Duration, commands: &mut Vec<Command>) {
        self.free(hold);
        let slot = self.batches.get_mut(&hold.0).map(|batch| &mut batch.items[hold.1].1);
        match slot {
            // The task is gone without a word: something panicked on its way out.
            Some(Slot::Running { .. }) => {
                let error = Some("the handler's task ended without an outcome".to_owned());
                self.ended(hold, Ended { error, ..Ended::of(End::Panicked) }, now, commands);
            }
            Some(slot @ Slot::CutOff(_)) => {
                if let Slot::CutOff(ended) = std::mem::replace(slot, Slot::Settled) {
                    *slot = Slot::Ended(ended, now);
                }
            }
            _ => {}
        }
        self.forget_if_over(hold.0);
    }

    /// Gives permits, in order; what may run without a record runs.
    fn start(&mut self, now: Duration, commands: &mut Vec<Command>) {
        if self.phase != Phase::Working || self.permits.len() >= self.setup.concurrency {
            return;
        }
        let mut exposed = self.exposed();
        let mut waiting = VecDeque::with_capacity(self.queue.len());
        while let Some(hold) = self.queue.pop_front() {
            if self.permits.len() >= self.setup.concurrency {
                waiting.push_back(hold);
                break;
            }
            let Some(batch) = self.batches.get_mut(&hold.0) else { continue };
            let (item, slot) = &mut batch.items[hold.1];
            if !matches!(slot, Slot::Queued) {
                continue;
            }
            let Some((lane, load)) = self.lanes.get_mut(&item.subscription) else { continue };
            // A message whose worker died may have killed it: such ones run one at a time, on record.
            let suspicious = is_suspect(lane, item);
            if lane.concurrency.is_some_and(|limit| load.running >= limit) || (suspicious && self.suspect.is_some()) {
                waiting.push_back(hold);
                continue;
            }
            // What a kill would leave in doubt never passes the concurrency. Attempts that ended in this
            // batch are settled by the flush that starts this one; those in others are not yet.
            if lane.policy.kind == Kind::Operation {
                let besides = |lane: Option<SubscriptionId>| -> usize {
                    let counted = exposed.iter().filter(|((_, id), _)| lane.is_none_or(|lane| lane == *id));
                    counted.map(|((token, _), e)| e.open + if *token == hold.0 { 0 } else { e.ended }).sum()
                };
                let own = lane.concurrency.unwrap_or(self.setup.concurrency);
                if besides(None) >= self.setup.concurrency || besides(Some(lane.id)) >= own {
                    waiting.push_back(hold);
                    continue;
                }
                exposed.entry((hold.0, lane.id)).or_default().open += 1;
            }
            load.leave(lane, item);
            load.running += 1;
            self.permits.insert(hold, item.subscription);
            if suspicious {
                self.suspect = Some(hold);
            }
            if suspicious || lane.policy.kind == Kind::Operation {
                *slot = Slot::Reserved;
            } else {
                *slot = Slot::Running { deadline: now.saturating_add(lane.timeout), cancelled: false };
                commands.push(Command::Run(hold, batch.lease, Box::new(item.clone()), item.attempts + 1));
            }
        }
        waiting.append(&mut self.queue);
        self.queue = waiting;
    }

    /// Operations on record as begun and without an outcome on record, by batch and subscription.
    fn exposed(&self) -> HashMap<(Uuid, SubscriptionId), Exposed> {
        let mut exposed: HashMap<(Uuid, SubscriptionId), Exposed> = HashMap::new();
        for (token, batch) in &self.batches {
            for (item, slot) in &batch.items {
                let operation =
                    self.lanes.get(&item.subscription).is_some_and(|(l, _)| l.policy.kind == Kind::Operation);
                match slot {
                    Slot::Reserved
                    | Slot::Starting
                    | Slot::Running { .. }
                    | Slot::CutOff(_)
                    | Slot::Settling(Some(_))
                        if operation =>
                    {
                        exposed.entry((*token, item.subscription)).or_default().open += 1;
                    }
                    Slot::Ended(..) if operation => exposed.entry((*token, item.subscription)).or_default().ended += 1,
                    _ => {}
                }
            }
        }
        exposed
    }

    /// Cancels what has run too long.
    fn expire(&mut self, now: Duration, commands: &mut Vec<Command>) {
        for (token, batch) in &mut self.batches {
            for (index, (item, slot)) in batch.items.iter_mut().enumerate() {
                match slot {
                    Slot::Running { deadline, cancelled: cancelled @ false } if *deadline <= now => {
                        *cancelled = true;
                        commands.push(Command::Cancel((*token, index), Cancel::TimedOut));
                    }
                    Slot::Paused(until) if *until <= now => {
                        *slot = Slot::Queued;
                        self.queue.push_back((*token, index));
                        if let Some((lane, load)) = self.lanes.get_mut(&item.subscription) {
                            load.enter(lane, item);
                        }
                    }
                    _ => {}
                }
            }
        }
        for (token, at) in &mut self.lost_claims {
            if at.is_some_and(|at| at <= now) {
                *at = None;
                commands.push(Command::Disown(*token));
            }
        }
    }

    fn ended(&mut self, hold: Hold, ended: Ended, now: Duration, commands: &mut Vec<Command>) {
        let Some(batch) = self.batches.get_mut(&hold.0) else { return };
        let (item, slot) = &mut batch.items[hold.1];
        if !matches!(slot, Slot::Running { .. }) {
            return;
        }
        if let Some((_, load)) = self.lanes.get_mut(&item.subscription) {
            let before = load.ran.unwrap_or(ended.ran);
            load.ran = Some((before * 7 + ended.ran) / 8);
        }
        // One that blocks its thread must not hold back the others for ever.
        if self.suspect == Some(hold) {
            self.suspect = None;
        }
        let operation = self.lanes.get(&item.subscription).is_some_and(|(lane, _)| lane.policy.kind == Kind::Operation);
        if ended.settled {
            *slot = Slot::Settled;
            self.forget_if_over(hold.0);
        } else if ended.cut_off && operation && !batch.fenced && self.permits.contains_key(&hold) {
            // Nothing is said about it while it may still do its work.
            *slot = Slot::CutOff(Box::new(ended));
        } else if ended.not_called && item.lost == 0 && !operation && !batch.fenced {
            *slot = match self.phase {
                Phase::Working => Slot::Paused(now + NOT_CALLED_PAUSE),
                _ => Slot::Released,
            };
        } else if batch.fenced || ended.fenced {
            *slot = Slot::Settled;
            let seen = observation(item, &ended, batch.lease.worker, self.lanes.get(&item.subscription).map(|l| &l.0));
            commands.push(Command::Observe(vec![seen]));
            if ended.fenced {
                self.fence(hold.0, commands);
            }
            self.forget_if_over(hold.0);
        } else {
            *slot = Slot::Ended(Box::new(ended), now);
        }
    }

    /// The lease is not ours any more: nothing is written, what was seen is kept as an observation.
    fn fence(&mut self, token: Uuid, commands: &mut Vec<Command>) {
        let Some(batch) = self.batches.get_mut(&token) else { return };
        if batch.fenced {
            return;
        }
        tracing::warn!(batch = batch.lease.batch, "the lease was lost; others have taken the batch over");
        batch.fenced = true;
        batch.flight = None;
        batch.again_at = None;
        let mut seen = Vec::new();
        let mut freed = Vec::new();
        for (index, (item, slot)) in batch.items.iter_mut().enumerate() {
            let lane = self.lanes.get_mut(&item.subscription);
            match slot {
                Slot::Queued => {
                    if let Some((lane, load)) = lane {
                        load.leave(lane, item);
                    }
                    *slot = Slot::Settled;
                }
                Slot::Reserved | Slot::Starting => {
                    *slot = Slot::Settled;
                    freed.push((token, index));
                }
                Slot::Ended(ended, _) | Slot::CutOff(ended) | Slot::Settling(Some(ended)) => {
                    seen.push(observation(item, ended, batch.lease.worker, lane.map(|l| &l.0)));
                    *slot = Slot::Settled;
                }
                // An operation is let run to its end: its late answer is evidence.
                Slot::Running { cancelled: cancelled @ false, .. }
                    if lane.is_some_and(|(l, _)| l.policy.kind != Kind::Operation) =>
                {
                    *cancelled = true;
                    commands.push(Command::Cancel((token, index), Cancel::Fenced));
                }
                Slot::Released | Slot::Paused(_) | Slot::Settling(None) => *slot = Slot::Settled,
                Slot::Running { .. } | Slot::Settled => {}
            }
        }
        for hold in freed {
            self.free(hold);
        }
        if !seen.is_empty() {
            commands.push(Command::Observe(seen));
        }
        self.queue.retain(|(t, _)| *t != token);
        self.forget_if_over(token);
    }

    /// Forgets a batch that nobody can hear of any more.
    fn forget_if_over(&mut self, token: Uuid) {
        if let Some(batch) = self.batches.get(&token)
            && batch.fenced
            && batch.items.iter().all(|(_, slot)| matches!(slot, Slot::Settled))
        {
            self.batches.remove(&token);
        }
    }

    /// Settles what has ended and puts on record what is about to start, one flush a batch at a time.
    fn flush(&mut self, now: Duration, commands: &mut Vec<Command>) {
        let tokens: Vec<Uuid> = self.batches.keys().copied().collect();
        for token in tokens {
            let Some(batch) = self.batches.get_mut(&token) else { continue };
            if batch.fenced {
                continue;
            }
            if let Some(flight) = &batch.flight {
                if batch.again_at.is_some_and(|at| at <= now) {
                    batch.again_at = None;
                    commands.push(Command::Settle(Box::new(flight.clone())));
                }
                continue;
            }
            if batch.again_at.is_some_and(|at| at > now) {
                continue;
            }
            batch.again_at = None;
            if let Some(settle) = due_flush(batch, &self.lanes, &mut self.rng, now) {
                batch.flight = Some(settle.clone());
                commands.push(Command::Settle(Box::new(settle)));
            }
        }
    }

    fn settled(&mut self, token: Uuid, answer: Flushed, now: Duration, commands: &mut Vec<Command>) {
        let Some(batch) = self.batches.get_mut(&token) else { return };
        if batch.flight.is_none() {
            return;
        }
        match answer {
            Flushed::Unknown => {
                batch.again_at = Some(now + batch.pause);
                batch.pause = (batch.pause * 2).min(LONGEST_PAUSE);
            }
            Flushed::Refused(error) => batch.refused(&error, &self.lanes, now),
            Flushed::Known(Guarded::Fenced) => self.fence(token, commands),
            Flushed::Known(Guarded::Done) => {
                batch.pause = FIRST_PAUSE;
                let close = batch.flight.take().is_some_and(|f| f.close);
                for (index, (item, slot)) in batch.items.iter_mut().enumerate() {
                    match slot {
                        Slot::Settling(_) => *slot = Slot::Settled,
                        Slot::Starting => {
                            let timeout = self.lanes.get(&item.subscription).map_or(Duration::ZERO, |(l, _)| l.timeout);
                            *slot = Slot::Running { deadline: now.saturating_add(timeout), cancelled: false };
                            let number = item.attempts + 1;
                            commands.push(Command::Run((token, index), batch.lease, Box::new(item.clone()), number));
                        }
                        _ => {}
                    }
                }
                if close {
                    self.batches.remove(&token);
                } else if self.phase == Phase::StoppingNow {
                    self.take(Event::StopNow, now, commands);
                }
            }
        }
    }

    /// How many deliveries should lie ready.
    fn target(&self) -> u32 {
        if let Some(batch) = self.setup.batch {
            return batch;
        }
        let concurrency = self.setup.concurrency as u32;
        let ran = self.lanes.values().filter_map(|(_, load)| load.ran).max();
        ahead(concurrency, ran)
    }

    /// How many of which subscriptions could be claimed now; `None` when nothing is wanted.
    fn wanted(&self) -> Option<Vec<(SubscriptionId, u32)>> {
        if self.phase != Phase::Working || self.claiming.is_some() {
            return None;
        }
        let target = self.target();
        // What waits for a permit of its own subscription does not keep the others waiting.
        let startable = |(lane, load): &(Lane, Load)| {
            let full = lane.concurrency.is_some_and(|limit| load.running >= limit);
            if full { 0 } else { load.queued - load.suspects }
        };
        let queued = self.lanes.values().map(startable).sum::<usize>() as u32;
        if queued * 2 > target || (self.setup.batch.is_some() && queued > 0) {
            return None;
        }
        let room = target.saturating_sub(queued);
        let mut wanted: Vec<(SubscriptionId, u32)> = self
            .lanes
            .values()
            .filter_map(|(lane, load)| {
                let limit = lane.concurrency.unwrap_or(self.setup.concurrency).min(self.setup.concurrency) as u32;
                let share = self.setup.batch.unwrap_or_else(|| ahead(limit, load.ran));
                let room = room.min(share.saturating_sub(load.queued as u32));
                (room > 0).then_some((lane.id, room))
            })
            .collect();
        wanted.sort_unstable();
        (!wanted.is_empty()).then_some(wanted)
    }

    fn claim(&mut self, now: Duration, commands: &mut Vec<Command>) {
        if !self.hungry && now < self.poll_at {
            return;
        }
        let Some(wanted) = self.wanted() else { return };
        let token = uuid::Builder::from_random_bytes(self.rng.u128(..).to_be_bytes()).into_uuid();
        self.claiming = Some(token);
        self.hungry = false;
        commands.push(Command::Claim(ClaimRequest { worker: self.setup.worker, token, wanted }));
    }
}

impl Load {
    fn enter(&mut self, lane: &Lane, item: &Item) {
        self.queued += 1;
        self.suspects += usize::from(is_suspect(lane, item));
    }

    fn leave(&mut self, lane: &Lane, item: &Item) {
        self.queued -= 1;
        self.suspects -= usize::from(is_suspect(lane, item));
    }
}

/// Its last worker died, and may have died of it.
fn is_suspect(lane: &Lane, item: &Item) -> bool {
    item.lost > 0 && lane.policy.kind != Kind::Operation
}

impl Batch {
    /// The database refused a flush for what is in it. Nothing of it was written: its slots go back,
    /// and are settled one by one; the one that is refused alone is settled as what could not be.
    fn refused(&mut self, error: &str, lanes: &HashMap<SubscriptionId, (Lane, Load)>, now: Duration) {
        tracing::error!(batch = self.lease.batch, error, "a flush was refused; settling one by one");
        let alone = self.one_by_one;
        self.one_by_one = true;
        self.again_at = None;
        let flight = self.flight.take();
        for (item, slot) in &mut self.items {
            match std::mem::replace(slot, Slot::Settled) {
                Slot::Settling(Some(mut ended)) => {
                    if alone {
                        let operation =
                            lanes.get(&item.subscription).is_some_and(|(l, _)| l.policy.kind == Kind::Operation);
                        let end = match operation {
                            true => End::InDoubt,
                            false => End::Failed { permanent: true, retry_after: None },
                        };
                        let words = format!("its outcome ({}) could not be written: {error}", ended.end.as_str());
                        *ended = Ended { error: Some(words), ran: ended.ran, ..Ended::of(end) };
                    }
                    *slot = Slot::Ended(ended, now);
                }
                Slot::Settling(None) => *slot = Slot::Released,
                Slot::Starting => *slot = Slot::Reserved,
                other => *slot = other,
            }
        }
        // Not at once: if even that is refused, it is not asked without end.
        if alone {
            self.again_at = Some(now + self.pause);
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
        drop(flight);
    }
}

/// What `concurrency` handlers do in the time that is worked ahead.
fn ahead(concurrency: u32, ran: Option<Duration>) -> u32 {
    let per_handler = match ran {
        Some(ran) => (AHEAD.as_nanos() / ran.as_nanos().max(1)).min(u128::from(MAX_BATCH)) as u32,
        None => 2,
    };
    concurrency.saturating_mul(per_handler.max(1)).min(MAX_BATCH.max(concurrency))
}

/// The flush that a batch is due for, its slots moved along.
fn due_flush(
    batch: &mut Batch,
    lanes: &HashMap<SubscriptionId, (Lane, Load)>,
    rng: &mut fastrand::Rng,
    now: Duration,
) -> Option<Settle> {
    let count = |wanted: fn(&Slot) -> bool| batch.items.iter().filter(|(_, slot)| wanted(slot)).count();
    let ended = count(|s| matches!(s, Slot::Ended(..)));
    let reserved = count(|s| matches!(s, Slot::Reserved));
    let released = count(|s| matches!(s, Slot::Released));
    let settled = count(|s| matches!(s, Slot::Settled));
    let complete = ended + released + settled == batch.items.len();
    let oldest =
        batch.items.iter().filter_map(|(_, s)| if let Slot::Ended(_, at) = s { Some(*at) } else { None }).min();
    // An operation's outcome does not wait: others may wait for it.
    let urgent = batch.items.iter().any(|(item, slot)| {
        matches!(slot, Slot::Ended(..))
            && lanes.get(&item.subscription).is_some_and(|(lane, _)| lane.policy.kind == Kind::Operation)
    });
    let ripe = urgent || ended >= FLUSH_COUNT || oldest.is_some_and(|at| at + FLUSH_AFTER <= now);
    if !(complete || ripe || reserved > 0 || released > 0) {
        return None;
    }
    // The first alone, if a flush with company was refused.
    let mut room = if batch.one_by_one { 1 } else { usize::MAX };
    let complete = complete && (!batch.one_by_one || ended + released <= 1);
    let mut settle = Settle {
        lease: batch.lease,
        part: batch.next_part,
        successes: Vec::new(),
        moves: Vec::new(),
        released: Vec::new(),
        follow_ups: Vec::new(),
        starts: Vec::new(),
        close: complete,
    };
    batch.next_part += 1;
    for (item, slot) in &mut batch.items {
        if room == 0 || !matches!(slot, Slot::Ended(..) | Slot::Released | Slot::Reserved) {
            continue;
        }
        room -= 1;
        match std::mem::replace(slot, Slot::Settling(None)) {
            Slot::Ended(ended, at) => {
                let lane = lanes.get(&item.subscription).map(|(lane, _)| lane);
                judge(item, (*ended).clone(), now.saturating_sub(at), lane, rng, &mut settle);
                *slot = Slot::Settling(Some(ended));
            }
            Slot::Released => settle.released.push(item.clone()),
            Slot::Reserved => {
                settle.starts.push((item.delivery, item.attempts + 1));
                *slot = Slot::Starting;
            }
            other => *slot = other,
        }
    }
    Some(settle)
}

/// Turns an attempt's end into what is written: the lifecycle decides.
fn judge(item: &Item, ended: Ended, ago: Duration, lane: Option<&Lane>, rng: &mut fastrand::Rng, settle: &mut Settle) {
    let policy = policy_for(item, lane);
    let begun = policy.kind == Kind::Operation || item.lost > 0;
    let number = item.attempts + 1;
    if ended.end == End::Succeeded && number == 1 && !begun && ended.follow_ups.is_empty() && policy.kind == Kind::Plain
    {
        settle.successes.push(Success {
            delivery: item.delivery,
            message: item.message,
            subscription: item.subscription,
            ran: ended.ran,
        });
        return;
    }
    let standing = Standing {
        state: State::Running,
        attempts: if begun { number } else { item.attempts },
        begun,
        lost: item.lost,
    };
    // Running and ended always has a next state.
    let Ok(next) = transition(standing, Lived::Ended(ended.end), &policy, rng.f64()) else { return };
    if next.standing.state == State::Succeeded {
        settle.follow_ups.extend(ended.follow_ups);
    }
    settle.moves.push(Move {
        delivery: item.delivery,
        message: item.message,
        subscription: item.subscription,
        priority: item.priority,
        rev: item.rev + 1,
        standing: next.standing,
        delay: next.delay,
        quiet: lane.map_or(Duration::ZERO, |lane| lane.quiet),
        note: note(&ended.error, next.standing.state, number, &policy),
        outcome: Some(OutcomeRecord {
            number,
            kind: ended.end.as_str(),
            error: ended.error,
            receipt: ended.receipt,
            ran: ended.ran,
            ago,
        }),
    });
}

fn policy_for(item: &Item, lane: Option<&Lane>) -> Policy {
    let mut policy = lane.map_or(Policy { kind: Kind::Plain, retry: Default::default() }, |lane| lane.policy);
    if let Some(own) = item.envelope.as_ref().and_then(|e| e.max_attempts) {
        policy.retry.max_attempts = own;
    }
    policy
}

fn note(error: &Option<String>, state: State, number: u32, policy: &Policy) -> String {
    let words = error.as_deref().unwrap_or("no reason was given");
    match state {
        State::Dead if number >= policy.retry.max_attempts => {
            format!("attempt {number} of {}: {words}", policy.retry.max_attempts)
        }
        _ => words.to_owned(),
    }
}

/// What a fenced attempt's end is kept as, and whether it proves anything.
fn observation(item: &Item, ended: &Ended, worker: Uuid, lane: Option<&Lane>) -> Observation {
    let policy = policy_for(item, lane);
    let answer = match ended.end {
        End::Succeeded => Some(Answer::Happened),
        End::Failed { .. } => Some(Answer::DidNotHappen),
        End::InDoubt | End::Panicked | End::TimedOut => None,
    };
    Observation {
        delivery: item.delivery,
        number: item.attempts + 1,
        worker,
        kind: ended.end.as_str(),
        detail: ended.error.clone(),
        evidence: answer.filter(|_| policy.kind == Kind::Operation).map(|answer| Evidence {
            answer,
            receipt: ended.receipt.clone(),
            follow_ups: ended.follow_ups.clone(),
            policy,
        }),
    }
}

#[cfg(test)]
mod tests;
