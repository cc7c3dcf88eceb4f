//! Virtual time: what happens when, to whom, and what goes wrong. The workers' shell is played here.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use uuid::Uuid;

use super::super::{Cancel, Command, Core, Ended, Event, Flushed, Hold, Lane, Setup};
use super::remote::{Fate, Remote};
use super::store::{Locks, Model, Place, Said, Verb};
use super::{CHARGE, Checked, Hits, LEASE, PLAIN, QUIET, TIMEOUT, TRANSACTIONAL, WIRE, ensure, policy};
use crate::lifecycle::{Answer, End, Kind};
use crate::operation::{Receipt, Reconciled};
use crate::store::{
    Answered, DeliveryId, Doubtful, Guarded, Item, LeaseRef, Observation, Speaker, SubscriptionId, decide,
};
use crate::worker::ran_out;

/// What must have happened in some seed.
pub(super) const FAULTS: [&str; 17] = [
    "crash",
    "pause before the call",
    "pause past the lease",
    "stall",
    "stop",
    "stop now",
    "taken over",
    "reborn",
    "committed, answer lost",
    "rolled back, answer lost",
    "flush refused",
    "fenced",
    "late outcome",
    "call not made after the lease",
    "not done, not believed",
    "reconciled",
    "operator",
];

/// A worker process: its place and its life.
type At = (usize, u32);

#[derive(Debug)]
enum Happening {
    Publish(SubscriptionId),
    Published { delivery: DeliveryId, subscription: SubscriptionId, pos: i64, due: Duration },
    Start(usize),
    Tick(At),
    Tell(At, Event),
    Arrive(Request),
    Commit(u64),
    Reply(At, Verb, Context, Option<Said>),
    Refuse(At, Uuid),
    Send(At, Hold),
    Land { delivery: DeliveryId, call: usize, fate: Fate },
    Return(At, Hold, End),
    Beat(At),
    Round(At),
    Ask(At),
    Asked(At, Box<Doubtful>),
    Fault,
    Operator,
}

/// What the asker of a verb remembers.
#[derive(Debug, Clone, Copy)]
enum Context {
    Nothing,
    Attempt(Hold),
    Sent(Duration),
}

#[derive(Debug)]
struct Request {
    from: At,
    verb: Verb,
    context: Context,
}

#[derive(Debug)]
struct Open {
    request: Request,
    locks: Locks,
    lost: bool,
    answered: bool,
    ends: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Working,
    /// Its end is being written.
    Sealed,
    /// Cancelled, and deaf to it.
    Deaf,
}

#[derive(Debug)]
struct Run {
    item: Item,
    number: u32,
    lease: LeaseRef,
    kind: Kind,
    stage: Stage,
    sent: bool,
    /// When the clock was looked at, for an operation.
    checked: Duration,
}

#[derive(Debug)]
struct Node {
    life: u32,
    core: Option<Core>,
    origin: Duration,
    /// As the decisions know it, and as the heart does.
    worker: Uuid,
    beating: Uuid,
    /// Whom the heart told the decisions of last.
    told: Uuid,
    /// The last renewal that came through: of whom, and when it was sent.
    renewed: (Uuid, Duration),
    paused: Duration,
    stalled: Duration,
    asleep: bool,
    tick: Option<Duration>,
    running: BTreeMap<Hold, Run>,
}

#[derive(Debug)]
pub(super) struct World {
    now: Duration,
    dice: fastrand::Rng,
    queue: BTreeMap<(Duration, u64), Happening>,
    count: u64,
    store: Model,
    remote: Remote,
    nodes: Vec<Node>,
    open: BTreeMap<u64, Open>,
    unpublished: usize,
    heals: Duration,
    /// How many of 100 commits lose their answer.
    losses: u32,
    hits: Hits,
    trace: Option<Vec<String>>,
}

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn ended(end: End) -> Ended {
    Ended { ran: ms(1), ..Ended::of(end) }
}

const AGAIN: End = End::Failed { permanent: false, retry_after: None };

impl World {
    pub(super) fn new(seed: u64, traced: bool) -> World {
        let mut dice = fastrand::Rng::with_seed(seed);
        let (nodes, deliveries) = (dice.usize(1..4), dice.usize(2..9));
        let heals = ms(dice.u64(2_000..15_000));
        let losses = [0, 3, 6, 15][dice.usize(..4)];
        let mut world = World {
            now: Duration::ZERO,
            dice,
            queue: BTreeMap::new(),
            count: 0,
            store: Model::default(),
            remote: Remote::default(),
            nodes: Vec::new(),
            open: BTreeMap::new(),
            unpublished: deliveries,
            heals,
            losses,
            hits: Hits::new(),
            trace: traced.then(Vec::new),
        };
        for place in 0..nodes {
            world.nodes.push(Node {
                life: 0,
                core: None,
                origin: Duration::ZERO,
                worker: Uuid::nil(),
                beating: Uuid::nil(),
                told: Uuid::nil(),
                renewed: (Uuid::nil(), Duration::ZERO),
                paused: Duration::ZERO,
                stalled: Duration::ZERO,
                asleep: false,
                tick: None,
                running: BTreeMap::new(),
            });
            world.after(0..500, Happening::Start(place));
        }
        for _ in 0..deliveries {
            let subscription = [PLAIN, TRANSACTIONAL, CHARGE, CHARGE, CHARGE, WIRE][world.dice.usize(..6)];
            let latest = heals.as_millis() as u64 * 3 / 4;
            world.after(0..latest, Happening::Publish(subscription));
        }
        world.after(200..2_000, Happening::Fault);
        world.after(500..3_000, Happening::Operator);
        world
    }

    pub(super) fn over(self) -> (Hits, Vec<String>) {
        (self.hits, self.trace.unwrap_or_default())
    }

    fn at(&mut self, when: Duration, what: Happening) {
        self.count += 1;
        self.queue.insert((when.max(self.now), self.count), what);
    }

    fn within(&mut self, millis: std::ops::Range<u64>) -> Duration {
        Duration::from_micros(self.dice.u64(millis.start * 1000..millis.end * 1000))
    }

    fn after(&mut self, millis: std::ops::Range<u64>, what: Happening) {
        let wait = self.within(millis);
        self.at(self.now + wait, what);
    }

    fn chance(&mut self, of_100: u32) -> bool {
        self.dice.u32(..100) < of_100
    }

    fn healed(&self) -> bool {
        self.now >= self.heals
    }

    fn hit(&mut self, what: &'static str) {
        *self.hits.entry(what).or_default() += 1;
    }

    fn note(&mut self, words: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{now:?} {}", words()));
        }
    }

    /// To the end: everything is settled, and nothing is left behind.
    pub(super) fn run(&mut self) -> Checked {
        for _ in 0..300_000 {
            let Some(((when, _), what)) = self.queue.pop_first() else { return Err("I14: nothing happens".into()) };
            self.now = when;
            if self.trace.is_some() {
                let words = format!("{what:?}");
                self.note(|| words);
            }
            let look = matches!(what, Happening::Round(_));
            if let Err(broken) = self.happens(what) {
                self.note(|| broken.clone());
                return Err(broken);
            }
            if look && self.healed() && self.quiet() {
                return self.store.rows.values().try_for_each(|row| self.remote.agrees(row));
            }
            if self.now > self.heals + Duration::from_secs(600) {
                break;
            }
        }
        let left = self.store.rows.values().filter(|r| !matches!(r.place, Place::Succeeded | Place::Dead));
        let left: Vec<_> = left.map(|r| (r.delivery, &r.place)).collect();
        Err(format!("I14: no end in sight: {left:?}, leases {:?}", self.store.leases))
    }

    fn quiet(&self) -> bool {
        let settled = self.store.rows.values().all(|r| matches!(r.place, Place::Succeeded | Place::Dead));
        let alive: BTreeSet<Uuid> = self.nodes.iter().filter(|n| n.core.is_some()).map(|n| n.beating).collect();
        settled
            && self.unpublished == 0
            && self.open.is_empty()
            && self.store.leases.is_empty()
            && self.store.workers.keys().all(|worker| alive.contains(worker))
            && !self.remote.under_way()
    }

    fn happens(&mut self, what: Happening) -> Checked {
        let Some(what) = self.awake(what) else { return Ok(()) };
        match what {
            Happening::Publish(subscription) => {
                // Its place in the queue is drawn now, and seen when it commits.
                let pos = self.store.position();
                let due = if self.chance(20) { self.now + self.within(1..3_000) } else { Duration::ZERO };
                let delivery = pos;
                let late = if self.chance(20) { 1..1_000 } else { 0..5 };
                self.after(late, Happening::Published { delivery, subscription, pos, due });
            }
            Happening::Published { delivery, subscription, pos, due } => {
                self.store.publish(delivery, subscription, pos, due);
                self.unpublished -= 1;
                for place in 0..self.nodes.len() {
                    if self.nodes[place].asleep && self.chance(80) {
                        let at = (place, self.nodes[place].life);
                        self.after(0..3, Happening::Tell(at, Event::Woken));
                    }
                }
            }
            Happening::Start(place) => self.start(place),
            Happening::Tick((place, life)) => {
                if self.nodes[place].tick == Some(self.now) {
                    self.nodes[place].tick = None;
                    self.step((place, life), Event::Tick)?;
                }
            }
            Happening::Tell(at, event) => {
                match &event {
                    Event::Freed(hold) => {
                        self.nodes[at.0].running.remove(hold);
                    }
                    Event::Reborn(worker) => self.nodes[at.0].worker = *worker,
                    _ => {}
                }
                self.step(at, event)?;
            }
            Happening::Arrive(request) => self.arrive(request),
            Happening::Commit(open) => self.commit(open)?,
            Happening::Reply(at, verb, context, said) => self.reply(at, verb, context, said)?,
            Happening::Refuse(at, token) => {
                self.step(at, Event::Settled(token, Flushed::Refused("interval out of range".into())))?;
            }
            Happening::Send(at, hold) => self.send(at, hold)?,
            Happening::Land { delivery, call, fate } => {
                if let Some(row) = self.store.rows.get(&delivery) {
                    self.remote.arrives(row, call, fate, self.now)?;
                }
            }
            Happening::Return(at, hold, end) => self.returned(at, hold, end),
            Happening::Beat(at) => {
                let (worker, sent) = (self.nodes[at.0].beating, self.now);
                self.ask(at, Verb::Beat { worker, lease: LEASE }, Context::Sent(sent));
            }
            Happening::Round(at) => {
                let draw = self.dice.f64();
                self.ask(at, Verb::TakeOver { dead: None, draw }, Context::Nothing);
            }
            Happening::Ask(at) => {
                let verb = Verb::Doubts { subscriptions: vec![CHARGE], put_off: Duration::from_secs(2) };
                self.ask(at, verb, Context::Nothing);
                self.after(400..700, Happening::Ask(at));
            }
            Happening::Asked(at, doubt) => self.asked(at, *doubt),
            Happening::Fault => self.fault()?,
            Happening::Operator => self.operate()?,
        }
        Ok(())
    }

    /// What is meant for a process that is gone never happens; for one that sleeps, when it wakes.
    fn awake(&mut self, what: Happening) -> Option<Happening> {
        let (place, life) = match &what {
            Happening::Tick(at)
            | Happening::Tell(at, _)
            | Happening::Reply(at, ..)
            | Happening::Refuse(at, _)
            | Happening::Send(at, _)
            | Happening::Return(at, ..)
            | Happening::Beat(at)
            | Happening::Round(at)
            | Happening::Ask(at)
            | Happening::Asked(at, _) => *at,
            _ => return Some(what),
        };
        let node = &self.nodes[place];
        if node.life != life || node.core.is_none() {
            return None;
        }
        let heart =
            matches!(&what, Happening::Beat(_) | Happening::Reply(_, Verb::Beat { .. } | Verb::Revive { .. }, ..));
        let until = if heart { node.paused } else { node.paused.max(node.stalled) };
        if until > self.now {
            if let Happening::Tick(_) = &what {
                self.nodes[place].tick = Some(until);
            }
            self.at(until, what);
            return None;
        }
        Some(what)
    }

    // --- the database ---

    fn ask(&mut self, from: At, verb: Verb, context: Context) {
        self.after(0..3, Happening::Arrive(Request { from, verb, context }));
    }

    fn arrive(&mut self, mut request: Request) {
        let Some(locks) = self.store.lock(&mut request.verb, self.now, &mut self.dice) else {
            // Waits for the first that ends, and looks again.
            let ends = self.open.values().map(|o| o.ends).min().unwrap_or(self.now + ms(1));
            self.at(ends + Duration::from_micros(1), Happening::Arrive(request));
            return;
        };
        let slow = !self.healed() && self.chance(2);
        let takes = if slow { self.within(100..4_000) } else { self.within(0..6) };
        let ends = self.now + takes;
        let mut open = Open { request, locks, lost: false, answered: true, ends };
        if !self.healed() {
            if self.chance(self.losses) {
                open.answered = false;
                open.lost = self.dice.bool();
                self.hit(if open.lost { "rolled back, answer lost" } else { "committed, answer lost" });
            } else if takes > LEASE {
                // Nobody waits that long.
                open.answered = false;
            } else if let Verb::Settle(settle) = &open.request.verb
                && !(settle.moves.is_empty() && settle.successes.is_empty())
                // One that has committed is not written again, whatever is in it.
                && !self.store.written(settle)
                && self.dice.u32(..400) == 0
            {
                let (from, token) = (open.request.from, settle.lease.token);
                (open.lost, open.answered) = (true, true);
                self.hit("flush refused");
                self.at(ends, Happening::Refuse(from, token));
            }
        }
        if !open.answered {
            // Perhaps while the server is still at it.
            let told = self.now + self.within(0..takes.as_millis() as u64 + 50).min(LEASE);
            let Request { from, verb, context } = &open.request;
            let unknown = Happening::Reply(*from, verb.clone(), *context, None);
            self.at(told, unknown);
        }
        self.count += 1;
        let number = self.count;
        self.open.insert(number, open);
        self.at(ends, Happening::Commit(number));
    }

    fn commit(&mut self, number: u64) -> Checked {
        let Some(Open { request, locks, lost, answered, .. }) = self.open.remove(&number) else { return Ok(()) };
        self.store.unlock(&locks);
        if lost {
            return Ok(());
        }
        let said = self.store.commit(&request.verb, &locks, self.now)?;
        if let Said::TookOver(true) = said {
            self.hit("taken over");
        }
        if answered {
            self.after(0..3, Happening::Reply(request.from, request.verb, request.context, Some(said)));
        }
        Ok(())
    }

    fn reply(&mut self, at: At, verb: Verb, context: Context, said: Option<Said>) -> Checked {
        match (verb, context, said) {
            (Verb::Claim(request), _, said) => {
                let claimed = said.and_then(|s| if let Said::Claimed(claimed) = s { Some(claimed) } else { None });
                self.step(at, Event::Claimed(request.token, claimed))?;
            }
            (Verb::Settle(settle), _, said) => {
                let flushed = match said {
                    Some(Said::Guarded(guarded)) => Flushed::Known(guarded),
                    _ => Flushed::Unknown,
                };
                if let Flushed::Known(Guarded::Fenced) = flushed {
                    self.hit("fenced");
                }
                self.step(at, Event::Settled(settle.lease.token, flushed))?;
            }
            (Verb::SettleOpen { lease, delivery, number, .. }, Context::Attempt(hold), said) => match said {
                Some(Said::Guarded(Guarded::Done)) => {
                    self.end(at, hold, Ended { settled: true, ..ended(End::Succeeded) });
                }
                Some(_) => self.end(at, hold, Ended { fenced: true, ..ended(AGAIN) }),
                None => self.ask(at, Verb::Recheck { lease, delivery, number }, context),
            },
            (verb @ Verb::Recheck { .. }, Context::Attempt(hold), said) => match said {
                Some(Said::Rechecked(Some(true))) => {
                    self.end(at, hold, Ended { settled: true, ..ended(End::Succeeded) });
                }
                Some(Said::Rechecked(Some(false))) => self.end(at, hold, ended(AGAIN)),
                Some(_) => self.end(at, hold, Ended { fenced: true, ..ended(AGAIN) }),
                None => self.after(50..51, Happening::Arrive(Request { from: at, verb, context })),
            },
            (Verb::Disown { token, .. }, _, said) => {
                let done = matches!(said, Some(Said::Disowned(true)));
                self.step(at, Event::Disowned(token, done))?;
            }
            (Verb::Beat { worker, .. }, Context::Sent(sent), said) => self.beaten(at, worker, sent, said),
            (Verb::Revive { worker, .. }, Context::Sent(sent), said) => match said {
                Some(_) => {
                    self.hit("reborn");
                    (self.nodes[at.0].renewed, self.nodes[at.0].told) = ((worker, sent), worker);
                    self.after(0..1, Happening::Tell(at, Event::Reborn(worker)));
                    self.after(1_000..1_001, Happening::Beat(at));
                }
                None => self.after(200..201, Happening::Beat(at)),
            },
            (Verb::TakeOver { .. }, _, Some(Said::TookOver(true))) => self.after(0..1, Happening::Round(at)),
            (Verb::TakeOver { .. }, ..) => self.after(800..1_200, Happening::Round(at)),
            (Verb::Doubts { .. }, _, Some(Said::Doubts(doubts))) => {
                for doubt in doubts {
                    self.after(0..40, Happening::Asked(at, Box::new(doubt)));
                }
            }
            (verb @ Verb::Observe(_), _, None) => {
                self.after(1_000..1_001, Happening::Arrive(Request { from: at, verb, context }));
            }
            _ => {}
        }
        Ok(())
    }

    /// What the heart makes of an answer.
    fn beaten(&mut self, at: At, worker: Uuid, sent: Duration, said: Option<Said>) {
        let node = &mut self.nodes[at.0];
        match said {
            Some(Said::Beat(Some(tokens))) => {
                node.renewed = (worker, sent);
                let (sent, reborn) = (sent.saturating_sub(node.origin), node.told != worker);
                node.told = worker;
                if reborn {
                    self.after(0..1, Happening::Tell(at, Event::Reborn(worker)));
                }
                self.after(1..2, Happening::Tell(at, Event::Pulse(sent, tokens)));
                self.after(1_000..1_001, Happening::Beat(at));
            }
            Some(_) => {
                node.beating = Uuid::from_u128(self.dice.u128(..));
                let (worker, sent) = (node.beating, self.now);
                self.ask(at, Verb::Revive { worker, lease: LEASE }, Context::Sent(sent));
            }
            None => self.after(300..301, Happening::Beat(at)),
        }
    }

    // --- a worker process ---

    fn start(&mut self, place: usize) {
        let worker = Uuid::from_u128(self.dice.u128(..));
        let late = QUIET + TIMEOUT + LEASE;
        let lane = |id| Lane { id, policy: policy(id), timeout: TIMEOUT, quiet: QUIET, late, concurrency: None };
        let setup = Setup {
            worker,
            concurrency: self.dice.usize(1..4),
            batch: None,
            poll_interval: Duration::from_secs(2),
            subscriptions: [PLAIN, TRANSACTIONAL, CHARGE, WIRE].map(lane).into(),
            seed: self.dice.u64(..),
        };
        let now = self.now;
        self.store.enlist(worker, LEASE, now);
        let node = &mut self.nodes[place];
        node.life += 1;
        node.core = Some(Core::new(setup));
        (node.origin, node.worker, node.beating, node.told) = (now, worker, worker, worker);
        node.renewed = (worker, now);
        (node.paused, node.stalled, node.asleep) = (now, now, false);
        node.tick = Some(now);
        let at = (place, node.life);
        self.at(now, Happening::Tick(at));
        self.after(1_000..1_001, Happening::Beat(at));
        self.after(0..1_200, Happening::Round(at));
        self.after(0..700, Happening::Ask(at));
    }

    /// The process ends: what it had sent is on its way all the same.
    fn ends(&mut self, place: usize, again: std::ops::Range<u64>) {
        let node = &mut self.nodes[place];
        node.core = None;
        node.running.clear();
        self.after(again, Happening::Start(place));
    }

    fn step(&mut self, at: At, event: Event) -> Checked {
        let node = &mut self.nodes[at.0];
        let own = self.now.saturating_sub(node.origin);
        let Some(core) = &mut node.core else { return Ok(()) };
        let commands = core.step([event], own);
        if self.trace.is_some() {
            let words = format!("  {at:?} {commands:?}");
            self.note(|| words);
        }
        for command in commands {
            self.perform(at, command)?;
        }
        let node = &mut self.nodes[at.0];
        let Some(core) = &node.core else { return Ok(()) };
        if core.is_done(own) {
            let worker = node.worker;
            self.ask(at, Verb::Retire { worker }, Context::Nothing);
            self.ends(at.0, 10..2_000);
            return Ok(());
        }
        if let Some(next) = core.next_tick() {
            let when = (node.origin + next).max(self.now + Duration::from_micros(1));
            if node.tick.is_none_or(|tick| tick > when || tick < self.now) {
                node.tick = Some(when);
                self.at(when, Happening::Tick(at));
            }
        }
        Ok(())
    }

    fn perform(&mut self, at: At, command: Command) -> Checked {
        match command {
            Command::Claim(request) => self.ask(at, Verb::Claim(request), Context::Nothing),
            Command::Settle(settle) => self.ask(at, Verb::Settle(settle), Context::Nothing),
            Command::Disown(token) => {
                let worker = self.nodes[at.0].worker;
                self.ask(at, Verb::Disown { worker, token }, Context::Nothing);
            }
            Command::Observe(seen) => {
                self.hit("late outcome");
                ensure!(seen.iter().all(|s: &Observation| s.number > 0), "I11: an observation of attempt 0");
                self.ask(at, Verb::Observe(seen), Context::Nothing);
            }
            Command::Asleep(asleep) => {
                self.nodes[at.0].asleep = asleep;
                self.after(0..5, Happening::Tell(at, Event::Woken));
            }
            Command::Run(hold, lease, item, number) => self.attempt(at, hold, lease, *item, number)?,
            Command::Cancel(hold, why) => self.cancel(at, hold, why),
        }
        Ok(())
    }

    fn attempt(&mut self, at: At, hold: Hold, lease: LeaseRef, item: Item, number: u32) -> Checked {
        let Some(row) = self.store.rows.get(&item.delivery) else { return Ok(()) };
        // One that was taken over meanwhile may be waiting for its retry.
        let own = row.place == Place::Leased(lease.token);
        ensure!(!own || row.due <= self.now, "I13: delivery {} starts before it is due", item.delivery);
        let kind = row.kind();
        let renewed = self.nodes[at.0].renewed;
        let over = renewed.0 != lease.worker || ran_out(self.now.saturating_sub(renewed.1), LEASE);
        if kind == Kind::Operation && over {
            self.hit("call not made after the lease");
            self.tell_end(at, hold, ended(AGAIN));
            return Ok(());
        }
        let run = Run { item, number, lease, kind, stage: Stage::Working, sent: false, checked: self.now };
        self.nodes[at.0].running.insert(hold, run);
        if kind == Kind::Transactional {
            let end = if self.healed() || self.chance(80) { End::Succeeded } else { AGAIN };
            self.after(1..60, Happening::Return(at, hold, end));
            return Ok(());
        }
        if kind == Kind::Operation && !self.healed() && self.chance(4) {
            // The worst moment: the clock was looked at, the call is not sent. As long as is assumed.
            self.hit("pause before the call");
            self.nodes[at.0].paused = self.now + self.within(3_500..4_980);
        }
        let wait = if !self.healed() && self.chance(5) { 0..2_400 } else { 0..8 };
        self.after(wait, Happening::Send(at, hold));
        Ok(())
    }

    /// The handler calls its remote.
    fn send(&mut self, at: At, hold: Hold) -> Checked {
        let (now, healed) = (self.now, self.healed());
        let Some(run) = self.nodes[at.0].running.get_mut(&hold) else { return Ok(()) };
        if std::mem::replace(&mut run.sent, true) {
            return Ok(());
        }
        let (delivery, number, operation) = (run.item.delivery, run.number, run.kind == Kind::Operation);
        if !healed && self.chance(6) {
            // Nothing is sent, and the handler knows it.
            self.after(0..5, Happening::Return(at, hold, AGAIN));
            return Ok(());
        }
        let Some(row) = self.store.rows.get(&delivery) else { return Ok(()) };
        let call = self.remote.sent(row, number, now)?;
        let fate = match self.dice.u32(..100) {
            _ if healed => Fate::Done,
            0..65 => Fate::Done,
            65..80 => Fate::DoneUnheard,
            80..94 => Fate::Lost,
            _ => Fate::Refused,
        };
        let slow = !healed && self.chance(10);
        let longest = QUIET.as_millis() as u64 - 10;
        let travel = if slow { self.within(50..longest) } else { self.within(1..50) };
        self.at(now + travel, Happening::Land { delivery, call, fate });
        let heard = now + travel + self.within(1..20);
        match fate {
            Fate::Done => self.at(heard, Happening::Return(at, hold, End::Succeeded)),
            Fate::Refused => {
                self.at(heard, Happening::Return(at, hold, End::Failed { permanent: true, retry_after: None }));
            }
            Fate::DoneUnheard | Fate::Lost => {
                let unheard = if operation { End::InDoubt } else { AGAIN };
                match self.dice.u32(..4) {
                    0 => {}
                    1 => self.after(0..1_000, Happening::Return(at, hold, End::Panicked)),
                    _ => self.after(0..1_000, Happening::Return(at, hold, unheard)),
                }
            }
        }
        Ok(())
    }

    fn returned(&mut self, at: At, hold: Hold, end: End) {
        let Some(run) = self.nodes[at.0].running.get_mut(&hold) else { return };
        match run.stage {
            Stage::Sealed => {}
            Stage::Deaf => self.after(0..3, Happening::Tell(at, Event::Freed(hold))),
            Stage::Working if run.kind == Kind::Transactional && end == End::Succeeded => {
                run.stage = Stage::Sealed;
                let (lease, item, number) = (run.lease, &run.item, run.number);
                let verb = Verb::SettleOpen { lease, delivery: item.delivery, number, rev: item.rev + 1 };
                self.ask(at, verb, Context::Attempt(hold));
            }
            Stage::Working => self.end(at, hold, ended(end)),
        }
    }

    fn end(&mut self, at: At, hold: Hold, ended: Ended) {
        if self.nodes[at.0].running.remove(&hold).is_some() {
            self.tell_end(at, hold, ended);
        }
    }

    fn tell_end(&mut self, at: At, hold: Hold, ended: Ended) {
        self.at(self.now, Happening::Tell(at, Event::Ended(hold, Box::new(ended))));
        self.after(0..3, Happening::Tell(at, Event::Freed(hold)));
    }

    fn cancel(&mut self, at: At, hold: Hold, why: Cancel) {
        let deaf = self.chance(15);
        let Some(run) = self.nodes[at.0].running.get_mut(&hold).filter(|r| r.stage == Stage::Working) else { return };
        let end = match why {
            Cancel::TimedOut => End::TimedOut,
            Cancel::Stopped | Cancel::Fenced if run.kind == Kind::Operation => End::InDoubt,
            Cancel::Stopped | Cancel::Fenced => End::Failed { permanent: false, retry_after: Some(Duration::ZERO) },
        };
        let ended = Ended { fenced: why == Cancel::Fenced, cut_off: true, ..ended(end) };
        run.stage = Stage::Deaf;
        self.at(self.now, Happening::Tell(at, Event::Ended(hold, Box::new(ended))));
        if deaf {
            // It goes on for a while, and may even send now.
            self.after(1..1_500, Happening::Tell(at, Event::Freed(hold)));
        } else {
            self.nodes[at.0].running.remove(&hold);
            self.after(0..3, Happening::Tell(at, Event::Freed(hold)));
        }
    }

    /// The reconcile hook, or an operator's word to carry out.
    fn asked(&mut self, at: At, doubt: Doubtful) {
        let (answer, speaker) = match &doubt.word {
            Some(_) => (Some(Answer::Happened), Speaker::Operator),
            None => {
                let said = match self.remote.applied(doubt.delivery) {
                    _ if !self.healed() && self.chance(10) => Reconciled::Unknown,
                    true => Reconciled::Done(Receipt::none()),
                    false => Reconciled::NotDone,
                };
                let answer = decide::believed(&said, doubt.quiet);
                if let (Reconciled::NotDone, None) = (&said, answer) {
                    self.hit("not done, not believed");
                }
                (answer, Speaker::Reconcile)
            }
        };
        let Some(answer) = answer else { return };
        self.hit("reconciled");
        let draw = self.dice.f64();
        self.ask(
            at,
            Verb::Answer(Box::new(answered(doubt.delivery, doubt.rev, answer, speaker, draw))),
            Context::Nothing,
        );
    }

    // --- what goes wrong, and who helps ---

    fn fault(&mut self) -> Checked {
        if self.healed() {
            return Ok(());
        }
        let place = self.dice.usize(..self.nodes.len());
        let at = (place, self.nodes[place].life);
        if self.nodes[place].core.is_some() {
            match self.dice.u32(..10) {
                0..2 => {
                    self.hit("crash");
                    self.ends(place, 10..4_000);
                }
                2..4 => {
                    let pause = self.within(10..3_000);
                    self.pause(at, pause)?;
                }
                4..6 => {
                    self.hit("pause past the lease");
                    let pause = self.within(3_000..14_000);
                    self.pause(at, pause)?;
                }
                6..8 => {
                    self.hit("stall");
                    self.nodes[place].stalled = self.now + self.within(10..4_000);
                }
                8 => {
                    self.hit("stop");
                    self.after(0..1, Happening::Tell(at, Event::Stop));
                }
                _ => {
                    self.hit("stop now");
                    self.after(0..1, Happening::Tell(at, Event::Stop));
                    self.after(1..500, Happening::Tell(at, Event::StopNow));
                }
            }
        }
        self.after(200..3_000, Happening::Fault);
        Ok(())
    }

    /// The whole process stands still. What is assumed of it (RULES 13): between its last look at the
    /// clock and its call it never sleeps for longer than its lease and its timeout; so a call that
    /// would be sent later than that is sent right before.
    fn pause(&mut self, at: At, pause: Duration) -> Checked {
        let until = self.now + pause;
        let late = |run: &&Run| run.kind == Kind::Operation && !run.sent && until >= run.checked + LEASE + TIMEOUT;
        let running = &self.nodes[at.0].running;
        let holds: Vec<Hold> = running.iter().filter(|(_, run)| late(run)).map(|(hold, _)| *hold).collect();
        for hold in holds {
            self.send(at, hold)?;
        }
        self.nodes[at.0].paused = until;
        Ok(())
    }

    fn operate(&mut self) -> Checked {
        let healed = self.healed();
        let deliveries: Vec<DeliveryId> = self.store.rows.keys().copied().collect();
        for delivery in deliveries {
            let Some(row) = self.store.rows.get(&delivery) else { continue };
            let (rev, subscription, place) = (row.rev, row.subscription, row.place.clone());
            match place {
                Place::Doubt { word: false, .. } if subscription == WIRE || (!healed && self.chance(10)) => {
                    if !healed && self.chance(50) {
                        continue;
                    }
                    self.hit("operator");
                    let answer = match self.dice.u32(..10) {
                        0 => Answer::Abandoned,
                        1 => Answer::DidNotHappen,
                        _ if self.remote.applied(delivery) => Answer::Happened,
                        _ => Answer::DidNotHappen,
                    };
                    if answer == Answer::Happened && subscription == CHARGE {
                        self.store.note_word(delivery, self.now);
                    } else {
                        self.store.end_doubt(&answered(delivery, rev, answer, Speaker::Operator, 0.0), self.now)?;
                    }
                }
                Place::Dead | Place::Scheduled(_) | Place::Ready(_) if !healed && self.chance(5) => {
                    self.hit("operator");
                    self.store.retry(delivery, self.now)?;
                }
                _ => {}
            }
        }
        self.after(500..4_000, Happening::Operator);
        Ok(())
    }
}

fn answered(delivery: DeliveryId, rev: i32, answer: Answer, speaker: Speaker, draw: f64) -> Answered {
    Answered {
        delivery,
        rev,
        answer,
        speaker,
        actor: speaker.as_str().to_owned(),
        reason: None,
        receipt: None,
        follow_ups: Vec::new(),
        draw,
    }
}
