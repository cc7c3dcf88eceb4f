//! Virtual time: what happens when, and to whom. The workers' shell, the way to the database and what
//! goes wrong are played in its modules.

mod database;
mod process;
mod trouble;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use uuid::Uuid;

use super::super::{Core, Ended, Event, Flushed, Hold};
use super::remote::{Fate, Remote};
use super::store::{Locks, Model, Place, Said, Verb};
use super::{CHARGE, Checked, Hits, LEASE, PAY, PLAIN, TRANSACTIONAL, WIRE};
use crate::lifecycle::{End, Kind};
use crate::store::{DeliveryId, Doubtful, Item, LeaseRef, SubscriptionId};

/// What must have happened in some seed.
pub(super) const FAULTS: [&str; 24] = [
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
    "repeated under its key",
    "withheld",
    "followed",
    "followed by evidence",
    "followed by an answer",
    "paused",
    "a batch",
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
    /// Its worker knows that a repeat is harmless.
    declares: bool,
    /// The call of a batch handler that it is in, by the first of that.
    call: Option<Hold>,
}

/// A call of a batch handler: what is in it, and which of it has ended.
type Call = (Vec<Hold>, Vec<(Hold, Box<Ended>)>);

#[derive(Debug)]
struct Node {
    life: u32,
    core: Option<Core>,
    origin: Duration,
    /// As the decisions know it, and as the heart does.
    worker: Uuid,
    beating: Uuid,
    /// It knows what is declared idempotent.
    declares: bool,
    /// Whom the heart told the decisions of last.
    told: Uuid,
    /// The last renewal that came through: of whom, and when it was sent.
    renewed: (Uuid, Duration),
    paused: Duration,
    stalled: Duration,
    asleep: bool,
    tick: Option<Duration>,
    running: BTreeMap<Hold, Run>,
    calls: BTreeMap<Hold, Call>,
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
                declares: true,
                told: Uuid::nil(),
                renewed: (Uuid::nil(), Duration::ZERO),
                paused: Duration::ZERO,
                stalled: Duration::ZERO,
                asleep: false,
                tick: None,
                running: BTreeMap::new(),
                calls: BTreeMap::new(),
            });
            world.after(0..500, Happening::Start(place));
        }
        for _ in 0..deliveries {
            let subscription =
                [PLAIN, TRANSACTIONAL, CHARGE, CHARGE, CHARGE, WIRE, PAY, PAY, PAY][world.dice.usize(..9)];
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
                self.wake();
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
                let verb = Verb::Doubts { subscriptions: vec![CHARGE, PAY], hold: Duration::from_secs(4) };
                self.ask(at, verb, Context::Nothing);
                self.after(400..700, Happening::Ask(at));
            }
            Happening::Asked(at, doubt) => self.asked(at, *doubt),
            Happening::Fault => self.fault()?,
            Happening::Operator => self.operate()?,
        }
        Ok(())
    }

    fn wake(&mut self) {
        for place in 0..self.nodes.len() {
            if self.nodes[place].asleep && self.chance(80) {
                let at = (place, self.nodes[place].life);
                self.after(0..3, Happening::Tell(at, Event::Woken));
            }
        }
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
}
