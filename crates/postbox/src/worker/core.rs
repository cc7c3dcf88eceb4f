//! The worker's decisions, without I/O: events go in with the time, commands come out.
//!
//! One value of [`Core`] is one worker. It never waits and never touches a database, so a simulation
//! can drive it through any order of events, lost answers included. Times are durations on the
//! worker's own monotonic clock; what is written carries durations, for the database's clock.

mod batch;
mod claims;
mod flush;
mod gather;
mod keys;
mod limits;
mod wire;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use self::batch::{Batch, Entry, Slot};
use self::claims::{FIRST_POLL, Keyed};
pub(crate) use self::flush::settle_of;
use self::flush::{due_flush, is_withheld, observation};
use self::gather::{Turn, Waiting};
use self::keys::{Lines, Through, in_lines};
use self::limits::{Allowance, Asking};
pub(crate) use self::wire::{Cancel, Command, Ended, Event, Flushed, Hold, Lane, Member, Setup};
use crate::lifecycle::{End, Kind};
use crate::planted::planted;
use crate::store::{Guarded, Item, SubscriptionId};

/// How often it is asked whether what lies ready belongs to a subscription that was paused.
const PAUSES: Duration = Duration::from_millis(500);
/// The first and the longest wait before a verb that failed is tried again.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long a handler that could not be called is put off.
const NOT_CALLED_PAUSE: Duration = Duration::from_secs(1);
/// After `StopNow`, how long outcomes may still take to be written.
const LAST_WAIT: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
struct Load {
    queued: usize,
    /// Of those, the ones that run one at a time.
    suspects: usize,
    running: usize,
    /// The calls that they are: one each, but for batch handlers.
    calls: usize,
    /// Those of the queued that wait for each other, for a batch handler.
    waiting: Waiting,
    /// A moving average of how long a call runs.
    ran: Option<Duration>,
    allowance: Allowance,
}

/// A call that runs: of a batch handler's, the first of its deliveries holds the permit.
#[derive(Debug)]
struct Permit {
    subscription: SubscriptionId,
    others: Vec<Hold>,
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
    queue: VecDeque<Turn>,
    /// Those of the lanes that have batch handlers.
    gathering: Vec<SubscriptionId>,
    lines: Lines,
    /// Who holds a permit; more than run, while a cancelled handler does not let go.
    permits: HashMap<Hold, Permit>,
    suspect: Option<Hold>,
    /// Claims under way, and how many deliveries each has asked for.
    claiming: BTreeMap<Uuid, u32>,
    /// Those of them that want deliveries by key.
    keyed: Keyed,
    /// The last claim got all that it had asked for: there is more.
    deep: bool,
    /// Claims whose answer was lost: they may hold a lease that nobody works on.
    lost_claims: BTreeMap<Uuid, Option<Duration>>,
    /// When it is asked next which subscriptions are paused, while something lies ready.
    ask_at: Option<Duration>,
    asking: bool,
    phase: Phase,
    /// What has not let go by then is left to a takeover.
    give_up_at: Option<Duration>,
    hungry: bool,
    asleep: bool,
    poll_at: Duration,
    poll_wait: Duration,
    pause: Duration,
    sharing: Asking,
    rng: fastrand::Rng,
    /// The time of this step.
    now: Duration,
}

impl Core {
    pub(crate) fn new(setup: Setup) -> Core {
        let lanes = setup.subscriptions.iter().map(|lane| (lane.id, (lane.clone(), Load::default()))).collect();
        let gathering = setup.subscriptions.iter().filter(|lane| lane.gather.is_some()).map(|lane| lane.id).collect();
        Core {
            lanes,
            batches: BTreeMap::new(),
            queue: VecDeque::new(),
            gathering,
            lines: Lines::default(),
            permits: HashMap::new(),
            suspect: None,
            claiming: BTreeMap::new(),
            keyed: Keyed::default(),
            deep: false,
            lost_claims: BTreeMap::new(),
            ask_at: None,
            asking: false,
            phase: Phase::Working,
            give_up_at: None,
            hungry: true,
            asleep: false,
            poll_at: Duration::ZERO,
            poll_wait: FIRST_POLL,
            pause: FIRST_PAUSE,
            sharing: Asking::default(),
            rng: fastrand::Rng::with_seed(setup.seed),
            now: Duration::ZERO,
            setup,
        }
    }

    /// Nothing is held any more and nothing is under way: the worker may retire.
    pub(crate) fn is_done(&self, now: Duration) -> bool {
        let over = self.batches.is_empty() && self.claiming.is_empty();
        match self.phase {
            Phase::Working => false,
            Phase::Stopping => over && self.permits.is_empty(),
            // A handler or a database that does not answer is not waited for.
            Phase::StoppingNow => over || self.give_up_at.is_some_and(|at| at <= now),
        }
    }

    /// Deliveries that are left to a takeover.
    pub(crate) fn left(&self) -> usize {
        self.batches.values().map(|b| b.entries().len() - b.tally().settled).sum()
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
        if let Some(at) = self.ask_at.filter(|_| !self.asking) {
            at_latest(at);
        }
        for batch in self.batches.values() {
            if let Some(at) = batch.again_at {
                at_latest(at);
            }
            let tally = batch.tally();
            if let Some(at) = tally.due {
                at_latest(at);
            }
            let may_flush = batch.flight.is_none() && !batch.fenced && batch.again_at.is_none();
            if let Some(at) = tally.ripe_at().filter(|_| may_flush) {
                at_latest(at);
            }
        }
        for at in self.lost_claims.values().flatten() {
            at_latest(*at);
        }
        for at in [self.limits_tick(), self.gather_tick()].into_iter().flatten() {
            at_latest(at);
        }
        next
    }

    /// Takes events that happened by `now`, and says what to do.
    pub(crate) fn step(&mut self, events: impl IntoIterator<Item = Event>, now: Duration) -> Vec<Command> {
        self.now = now;
        let mut commands = Vec::new();
        for event in events {
            self.take(event, now, &mut commands);
        }
        self.expire(now, &mut commands);
        self.refill(now);
        self.gather(now);
        self.start(now, &mut commands);
        self.flush(now, &mut commands);
        self.claim(now, &mut commands);
        self.ask_for_permits(now, &mut commands);
        self.ask(now, &mut commands);
        commands
    }

    fn take(&mut self, event: Event, now: Duration, commands: &mut Vec<Command>) {
        match event {
            Event::Woken => self.hungry = true,
            Event::Tick => {}
            Event::Claimed(token, claimed) => self.claimed(token, claimed, now, commands),
            Event::Permitted(worker, permits) => self.permitted(worker, permits, now),
            Event::Settled(token, answer) => self.settled(token, answer, now, commands),
            Event::Disowned(token, done) => {
                if done {
                    self.lost_claims.remove(&token);
                } else if let Some(at) = self.lost_claims.get_mut(&token) {
                    *at = Some(now + LONGEST_PAUSE);
                }
            }
            Event::Ended(hold, ended) => self.ended(hold, ended, now, commands),
            Event::EndedTogether(all) => {
                for (hold, ended) in all {
                    self.ended(hold, ended, now, commands);
                }
            }
            Event::Freed(hold) => self.freed(hold, now, commands),
            Event::Pulse(sent, tokens) => {
                // A lease that is stored and that nobody here knows: its claim's answer was lost, and
                // its COMMIT came through after all.
                for token in &tokens {
                    let known = self.batches.contains_key(token) || self.claiming.contains_key(token);
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
                self.without_permits();
                self.asleep = false;
                self.hungry = true;
            }
            Event::Paused(subscriptions) => {
                self.asking = false;
                self.ask_at = Some(now + PAUSES);
                if !subscriptions.is_empty() {
                    self.release(|id| subscriptions.contains(&id));
                }
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
                    batch.each(|index, entry| {
                        if let Slot::Running { cancelled: cancelled @ false, .. } = &mut entry.slot {
                            *cancelled = true;
                            commands.push(Command::Cancel((*token, index), Cancel::Stopped));
                        }
                    });
                }
            }
        }
    }

    /// Hands back what has not started.
    fn release_queued(&mut self) {
        self.release(|_| true);
    }

    /// The same of some subscriptions.
    fn release(&mut self, which: impl Fn(SubscriptionId) -> bool) {
        self.lines.empty(&which);
        let mut released: Vec<Item> = Vec::new();
        let mut kept = VecDeque::new();
        let mut queue = std::mem::take(&mut self.queue);
        for id in self.gathering.iter().filter(|id| which(**id)) {
            if let Some((_, load)) = self.lanes.get_mut(id) {
                let waiting = std::mem::take(&mut load.waiting);
                queue.extend(waiting.into_holds().map(Turn::One));
            }
        }
        for turn in queue {
            let (token, index) = match turn {
                Turn::One(hold) => hold,
                Turn::Batch(id) => {
                    if !which(id) {
                        kept.push_back(turn);
                    }
                    continue;
                }
            };
            if let Some(batch) = self.batches.get_mut(&token) {
                let Entry { item, slot, .. } = &batch.entries()[index];
                if !matches!(slot, Slot::Queued) {
                    continue;
                }
                if !which(item.subscription) {
                    kept.push_back(turn);
                    continue;
                }
                if let Some((lane, load)) = self.lanes.get_mut(&item.subscription) {
                    load.leave(lane, item);
                    if lane.keys.is_some() {
                        released.push(item.clone());
                    }
                }
                batch.put(index, Slot::Released);
            }
        }
        self.queue = kept;
        let mut freed = Vec::new();
        for (token, batch) in &mut self.batches {
            batch.each(|index, entry| match entry.slot {
                Slot::Reserved if which(entry.item.subscription) => {
                    entry.slot = Slot::Released;
                    freed.push((*token, index));
                    released.push(entry.item.clone());
                }
                Slot::Paused(_) if which(entry.item.subscription) => {
                    entry.slot = Slot::Released;
                    released.push(entry.item.clone());
                }
                Slot::Behind if which(entry.item.subscription) => entry.slot = Slot::Released,
                _ => {}
            });
        }
        for hold in freed {
            self.free(hold);
        }
        for item in released {
            self.went_back(&item);
        }
    }

    /// Takes its permit back; the others of its call.
    fn free(&mut self, hold: Hold) -> Vec<Hold> {
        if self.suspect == Some(hold) {
            self.suspect = None;
        }
        let Some(Permit { subscription, others }) = self.permits.remove(&hold) else { return Vec::new() };
        if let Some((_, load)) = self.lanes.get_mut(&subscription) {
            load.calls -= 1;
            load.running -= 1 + others.len();
        }
        others
    }

    fn freed(&mut self, hold: Hold, now: Duration, commands: &mut Vec<Command>) {
        let others = self.free(hold);
        self.let_go(hold, now, commands);
        for other in others {
            self.let_go(other, now, commands);
        }
    }

    /// Its handler is gone.
    fn let_go(&mut self, hold: Hold, now: Duration, commands: &mut Vec<Command>) {
        let Some(batch) = self.batches.get_mut(&hold.0) else { return };
        match &batch.entries()[hold.1].slot {
            // The task is gone without a word: something panicked on its way out.
            Slot::Running { .. } => {
                let error = Some("the handler's task ended without an outcome".to_owned());
                self.ended(hold, Box::new(Ended { error, ..Ended::of(End::Panicked) }), now, commands);
            }
            Slot::CutOff(_) => {
                if let Slot::CutOff(ended) = batch.put(hold.1, Slot::Settled) {
                    let how = Through::of(ended.end);
                    batch.put(hold.1, Slot::Ended(ended, now));
                    self.through(hold, how);
                }
            }
            _ => {}
        }
        self.forget_if_over(hold.0);
    }

    /// Gives permits, in order; what may run without a record runs.
    fn start(&mut self, now: Duration, commands: &mut Vec<Command>) {
        if self.phase != Phase::Working || self.queue.is_empty() || self.permits.len() >= self.setup.concurrency {
            return;
        }
        let operations = self.lanes.values().any(|(lane, _)| lane.policy.kind == Kind::Operation);
        let mut exposed = if operations { self.exposed() } else { HashMap::new() };
        let mut waiting = Vec::new();
        while self.permits.len() < self.setup.concurrency
            && let Some(turn) = self.queue.pop_front()
        {
            let hold = match turn {
                Turn::One(hold) => hold,
                Turn::Batch(id) => {
                    if !self.call(id, now, commands) {
                        waiting.push(turn);
                    }
                    continue;
                }
            };
            let Some(batch) = self.batches.get_mut(&hold.0) else { continue };
            let Entry { item, slot, .. } = &batch.entries()[hold.1];
            if !matches!(slot, Slot::Queued) {
                continue;
            }
            let Some((lane, load)) = self.lanes.get_mut(&item.subscription) else { continue };
            if is_withheld(item, lane) {
                load.leave(lane, item);
                batch.put(hold.1, Slot::Withheld);
                self.through(hold, Through::Failed);
                continue;
            }
            // A message whose worker died may have killed it: such ones run one at a time, on record.
            let suspicious = is_suspect(lane, item);
            if load.is_full(lane) || (suspicious && self.suspect.is_some()) {
                waiting.push(turn);
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
                    waiting.push(turn);
                    continue;
                }
                exposed.entry((hold.0, lane.id)).or_default().open += 1;
            }
            load.leave(lane, item);
            load.run(1);
            self.permits.insert(hold, Permit { subscription: item.subscription, others: Vec::new() });
            if suspicious {
                self.suspect = Some(hold);
            }
            if suspicious || lane.policy.kind == Kind::Operation {
                batch.put(hold.1, Slot::Reserved);
            } else {
                commands.push(run(batch, hold.1, lane));
                batch.put(hold.1, Slot::Running { deadline: now.saturating_add(lane.timeout), cancelled: false });
            }
        }
        for turn in waiting.into_iter().rev() {
            self.queue.push_front(turn);
        }
    }

    /// Operations on record as begun and without an outcome on record, by batch and subscription.
    fn exposed(&self) -> HashMap<(Uuid, SubscriptionId), Exposed> {
        let mut exposed: HashMap<(Uuid, SubscriptionId), Exposed> = HashMap::new();
        for (token, batch) in &self.batches {
            for Entry { item, operation, slot } in batch.entries() {
                let operation = *operation;
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
            if batch.tally().due.is_none_or(|at| at > now) {
                continue;
            }
            batch.each(|index, Entry { item, slot, .. }| match slot {
                Slot::Running { deadline, cancelled: cancelled @ false } if *deadline <= now => {
                    *cancelled = true;
                    commands.push(Command::Cancel((*token, index), Cancel::TimedOut));
                }
                Slot::Paused(until) if *until <= now => {
                    *slot = Slot::Queued;
                    if let Some((lane, load)) = self.lanes.get_mut(&item.subscription) {
                        load.line_up(lane, item, (*token, index), &mut self.queue, now);
                    }
                }
                _ => {}
            });
        }
        for (token, at) in &mut self.lost_claims {
            if at.is_some_and(|at| at <= now) {
                *at = None;
                commands.push(Command::Disown(*token));
            }
        }
    }

    fn ended(&mut self, hold: Hold, ended: Box<Ended>, now: Duration, commands: &mut Vec<Command>) {
        let Some(batch) = self.batches.get_mut(&hold.0) else { return };
        let Entry { item, slot, operation } = &batch.entries()[hold.1];
        if !matches!(slot, Slot::Running { .. }) {
            return;
        }
        let operation = *operation;
        if let Some((_, load)) = self.lanes.get_mut(&item.subscription) {
            let before = load.ran.unwrap_or(ended.ran);
            load.ran = Some((before * 7 + ended.ran) / 8);
        }
        // One that blocks its thread must not hold back the others for ever.
        if self.suspect == Some(hold) {
            self.suspect = None;
        }
        if ended.settled {
            batch.put(hold.1, Slot::Settled);
            self.through(hold, Through::OnRecord);
            self.forget_if_over(hold.0);
        } else if ended.cut_off && operation && !batch.fenced && self.permits.contains_key(&hold) {
            // Nothing is said about it while it may still do its work.
            batch.put(hold.1, Slot::CutOff(ended));
        } else if ended.not_called && item.lost == 0 && !operation && !batch.fenced {
            let slot = match self.phase {
                Phase::Working => Slot::Paused(now + NOT_CALLED_PAUSE),
                _ => Slot::Released,
            };
            batch.put(hold.1, slot);
        } else if batch.fenced || ended.fenced {
            let seen = observation(item, &ended, batch.lease.worker, self.lanes.get(&item.subscription).map(|l| &l.0));
            let was_fenced = batch.fenced;
            batch.put(hold.1, Slot::Settled);
            commands.push(Command::Observe(vec![seen]));
            if ended.fenced {
                if !was_fenced {
                    self.through(hold, Through::Failed);
                }
                self.fence(hold.0, commands);
            }
            self.forget_if_over(hold.0);
        } else {
            let how = Through::of(ended.end);
            batch.put(hold.1, Slot::Ended(ended, now));
            self.through(hold, how);
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
        let in_lines = in_lines(batch, &self.lanes);
        let mut seen = Vec::new();
        let mut freed = Vec::new();
        let worker = batch.lease.worker;
        batch.each(|index, Entry { item, slot, .. }| {
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
                    seen.push(observation(item, ended, worker, lane.map(|l| &l.0)));
                    *slot = Slot::Settled;
                }
                // An operation is let run to its end: its late answer is evidence.
                Slot::Running { cancelled: cancelled @ false, .. }
                    if lane.is_some_and(|(l, _)| l.policy.kind != Kind::Operation) =>
                {
                    *cancelled = true;
                    commands.push(Command::Cancel((token, index), Cancel::Fenced));
                }
                Slot::Behind | Slot::Released | Slot::Withheld | Slot::Paused(_) | Slot::Settling(None) => {
                    *slot = Slot::Settled
                }
                Slot::Running { .. } | Slot::Settled => {}
            }
        });
        for hold in freed {
            self.free(hold);
        }
        if !seen.is_empty() {
            commands.push(Command::Observe(seen));
        }
        self.queue.retain(|turn| !matches!(turn, Turn::One((t, _)) if *t == token));
        for id in &self.gathering {
            if let Some((_, load)) = self.lanes.get_mut(id) {
                load.waiting.forget(token);
            }
        }
        self.lines_lost(token, in_lines);
        self.forget_if_over(token);
    }

    /// Forgets a batch that nobody can hear of any more.
    fn forget_if_over(&mut self, token: Uuid) {
        if let Some(batch) = self.batches.get(&token)
            && batch.fenced
            && batch.is_over()
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
                    commands.push(Command::Settle(flight.clone()));
                }
                continue;
            }
            if batch.again_at.is_some_and(|at| at > now) {
                continue;
            }
            batch.again_at = None;
            if let Some(settle) = due_flush(batch, &self.lanes, &mut self.rng, now).map(Arc::new) {
                batch.flight = Some(settle.clone());
                if planted!("call-before-start") {
                    run_started(batch, &self.lanes, now, commands);
                }
                commands.push(Command::Settle(settle));
                if planted!("settled-before-commit") {
                    self.settled(token, Flushed::Known(Guarded::Done), now, commands);
                }
            }
        }
    }

    fn settled(&mut self, token: Uuid, answer: Flushed, now: Duration, commands: &mut Vec<Command>) {
        let Some(batch) = self.batches.get_mut(&token) else { return };
        if batch.flight.is_none() {
            return;
        }
        match answer {
            Flushed::Unknown if planted!("unknown-commit-failed") => batch.unsettled(now),
            Flushed::Unknown => {
                batch.again_at = Some(now + batch.pause);
                batch.pause = (batch.pause * 2).min(LONGEST_PAUSE);
            }
            Flushed::Refused(error) => {
                batch.refused(&error, now);
                self.lines_refused(token);
            }
            Flushed::Known(Guarded::Fenced) => {
                if planted!("start-without-lease") {
                    run_started(batch, &self.lanes, now, commands);
                }
                self.fence(token, commands);
            }
            Flushed::Known(Guarded::Done) => {
                batch.pause = FIRST_PAUSE;
                let close = batch.flight.take().is_some_and(|f| f.close);
                batch.each(|_, entry| {
                    if let Slot::Settling(_) = entry.slot {
                        entry.slot = Slot::Settled;
                    }
                });
                let mut following = Vec::new();
                if !self.lines.is_empty() {
                    let settled = |index: usize| matches!(batch.entries()[index].slot, Slot::Settled);
                    let (opened, holds) = self.lines.on_record(token, settled, || self.keyed.tokens());
                    self.hungry |= opened;
                    following = holds;
                }
                run_started(batch, &self.lanes, now, commands);
                for hold in following {
                    self.comes(hold);
                }
                if close {
                    self.batches.remove(&token);
                } else if self.phase == Phase::StoppingNow {
                    self.take(Event::StopNow, now, commands);
                }
            }
        }
    }

    /// Asks now and then whether what lies ready is still to be handed out: claims see a pause by themselves,
    /// and what was claimed before it does not.
    fn ask(&mut self, now: Duration, commands: &mut Vec<Command>) {
        if self.queue.is_empty() && self.gathers_nothing() && self.lines.none_behind() {
            self.ask_at = None;
            return;
        }
        if self.asking || *self.ask_at.get_or_insert(now + PAUSES) > now {
            return;
        }
        let mut queued: Vec<SubscriptionId> =
            self.lanes.values().filter(|(_, load)| load.queued > 0).map(|(lane, _)| lane.id).collect();
        queued.extend(self.lines.subscriptions_behind());
        queued.sort_unstable();
        queued.dedup();
        self.asking = true;
        commands.push(Command::AskPaused(queued));
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

/// Runs what has its start on record.
fn run_started(
    batch: &mut Batch,
    lanes: &HashMap<SubscriptionId, (Lane, Load)>,
    now: Duration,
    commands: &mut Vec<Command>,
) {
    let starting = |(_, entry): &(usize, &Entry)| matches!(entry.slot, Slot::Starting);
    let starting: Vec<usize> = batch.entries().iter().enumerate().filter(starting).map(|(index, _)| index).collect();
    for index in starting {
        let Some((lane, _)) = lanes.get(&batch.entries()[index].item.subscription) else { continue };
        commands.push(run(batch, index, lane));
        batch.put(index, Slot::Running { deadline: now.saturating_add(lane.timeout), cancelled: false });
    }
}

/// Calls the handler with one delivery.
fn run(batch: &mut Batch, index: usize, lane: &Lane) -> Command {
    if lane.gather.is_some() {
        batch.next_part += 1;
        return Command::RunBatch(vec![batch.member(index, batch.next_part - 1)]);
    }
    let item = &batch.entries()[index].item;
    Command::Run((batch.lease.token, index), batch.lease, Box::new(item.clone()), item.attempts + 1)
}

/// Its last worker died, and may have died of it.
fn is_suspect(lane: &Lane, item: &Item) -> bool {
    item.lost > 0 && lane.policy.kind != Kind::Operation
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
