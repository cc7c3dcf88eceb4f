//! A store in memory, in virtual time: rows, leases, locks. It takes the stores' own decisions, and
//! says when what it is told to write breaks an invariant.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use uuid::Uuid;

use super::{Checked, ensure, policy, subscription_kind};
use crate::lifecycle::{Answer, Event, Kind, Standing, State, transition};
use crate::store::decide::{self, Left};
use crate::store::{
    Answered, ClaimRequest, Claimed, DeliveryId, Doubtful, Guarded, Item, LeaseRef, Move, Observation, Settle, Speaker,
    SubscriptionId, Word,
};

/// Where a delivery is: in one place at any time.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Place {
    Ready(i64),
    Scheduled(Duration),
    Leased(Uuid),
    Doubt { quiet_at: Duration, ask_at: Duration, asks: u32, word: bool },
    Succeeded,
    Dead,
}

/// A delivery and its record.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) delivery: DeliveryId,
    pub(super) subscription: SubscriptionId,
    pub(super) place: Place,
    pub(super) attempts: u32,
    pub(super) lost: u32,
    pub(super) rev: i32,
    /// It must not start before.
    pub(super) due: Duration,
    /// A claim in flight holds it.
    locked: bool,
    /// Attempts put on record before their call.
    pub(super) begun: BTreeSet<u32>,
    /// How attempts ended, as it is written.
    pub(super) outcomes: BTreeMap<u32, &'static str>,
    pub(super) resolutions: Vec<(u32, Answer, Speaker)>,
    /// How often an operator allowed one more attempt.
    pub(super) allowed: u32,
    /// How often a worker died with it in its hands.
    pub(super) losses: u32,
}

impl Row {
    pub(super) fn kind(&self) -> Kind {
        subscription_kind(self.subscription)
    }
}

#[derive(Debug)]
pub(super) struct Lease {
    pub(super) batch: i64,
    pub(super) worker: Uuid,
    pub(super) held: BTreeMap<DeliveryId, Item>,
    begun: BTreeSet<DeliveryId>,
    shared: u32,
    exclusive: bool,
}

#[derive(Debug)]
pub(super) struct WorkerRow {
    pub(super) expires: Duration,
    lease: Duration,
    shared: u32,
    exclusive: bool,
}

/// What is asked of the store; each is one transaction.
#[derive(Debug, Clone)]
pub(super) enum Verb {
    Claim(ClaimRequest),
    Settle(Box<Settle>),
    SettleOpen { lease: LeaseRef, delivery: DeliveryId, number: u32, rev: i32 },
    Recheck { lease: LeaseRef, delivery: DeliveryId, number: u32 },
    Disown { worker: Uuid, token: Uuid },
    Beat { worker: Uuid, lease: Duration },
    Revive { worker: Uuid, lease: Duration },
    Retire { worker: Uuid },
    TakeOver { dead: Option<Uuid>, draw: f64 },
    Doubts { subscriptions: Vec<SubscriptionId>, put_off: Duration },
    Answer(Box<Answered>),
    Observe(Vec<Observation>),
}

/// What a verb comes to.
#[derive(Debug)]
pub(super) enum Said {
    Claimed(Claimed),
    Guarded(Guarded),
    Rechecked(Option<bool>),
    Disowned(bool),
    Beat(Option<Vec<Uuid>>),
    TookOver(bool),
    Doubts(Vec<Doubtful>),
    Nothing,
}

/// Locks that a transaction holds until it ends.
#[derive(Debug, Default)]
pub(super) struct Locks {
    leases: Vec<(Uuid, bool)>,
    workers: Vec<(Uuid, bool)>,
    part: Option<(i64, i32)>,
    picked: Vec<DeliveryId>,
}

#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) rows: BTreeMap<DeliveryId, Row>,
    pub(super) leases: BTreeMap<Uuid, Lease>,
    pub(super) workers: BTreeMap<Uuid, WorkerRow>,
    parts: BTreeSet<(i64, i32)>,
    writing: BTreeSet<(i64, i32)>,
    positions: i64,
    batches: i64,
}

const EXCLUSIVE: bool = true;
const SHARED: bool = false;

impl Model {
    /// A message's delivery, committed now; its place was drawn when its publisher began.
    pub(super) fn publish(&mut self, delivery: DeliveryId, subscription: SubscriptionId, pos: i64, due: Duration) {
        let place = if due > Duration::ZERO { Place::Scheduled(due) } else { Place::Ready(pos) };
        let row = Row {
            delivery,
            subscription,
            place,
            attempts: 0,
            lost: 0,
            rev: 0,
            due,
            locked: false,
            begun: BTreeSet::new(),
            outcomes: BTreeMap::new(),
            resolutions: Vec::new(),
            allowed: 0,
            losses: 0,
        };
        self.rows.insert(delivery, row);
    }

    pub(super) fn position(&mut self) -> i64 {
        self.positions += 1;
        self.positions
    }

    pub(super) fn enlist(&mut self, worker: Uuid, lease: Duration, now: Duration) {
        let row = WorkerRow { expires: now + lease, lease, shared: 0, exclusive: false };
        self.workers.insert(worker, row);
    }

    /// The locks that a verb takes first; `None`: somebody holds one of them, ask again when they end.
    pub(super) fn lock(&mut self, verb: &mut Verb, now: Duration, dice: &mut fastrand::Rng) -> Option<Locks> {
        let mut locks = Locks::default();
        match verb {
            Verb::Claim(request) => {
                // FOR KEY SHARE on the worker's row, which keeps a takeover from missing the lease.
                match self.workers.get(&request.worker) {
                    Some(row) if row.exclusive => return None,
                    Some(row) if row.expires > now => locks.workers.push((request.worker, SHARED)),
                    _ => return Some(locks),
                }
                for row in self.rows.values_mut() {
                    if matches!(row.place, Place::Scheduled(due) if due <= now) && !row.locked {
                        self.positions += 1;
                        row.place = Place::Ready(self.positions);
                    }
                }
                for (subscription, room) in &request.wanted {
                    let ready = self.rows.values().filter(|r| r.subscription == *subscription && !r.locked);
                    let mut found: Vec<(i64, DeliveryId)> = ready
                        .filter_map(|r| if let Place::Ready(pos) = r.place { Some((pos, r.delivery)) } else { None })
                        .collect();
                    found.sort_unstable();
                    locks.picked.extend(found.into_iter().take(*room as usize).map(|(_, delivery)| delivery));
                }
            }
            Verb::Settle(settle) => {
                if self.leases.get(&settle.lease.token).is_some_and(|l| l.batch == settle.lease.batch) {
                    locks.leases.push((settle.lease.token, SHARED));
                    // The unique key of the part waits for whoever is writing the same.
                    locks.part = Some((settle.lease.batch, settle.part));
                }
            }
            Verb::SettleOpen { lease, .. } => {
                locks.leases.extend(self.leases.contains_key(&lease.token).then_some((lease.token, SHARED)));
            }
            Verb::Recheck { lease, .. } => {
                locks.leases.extend(self.leases.contains_key(&lease.token).then_some((lease.token, EXCLUSIVE)));
            }
            Verb::Disown { worker, token } => {
                let own = self.leases.get(token).is_some_and(|l| l.worker == *worker);
                locks.leases.extend(own.then_some((*token, EXCLUSIVE)));
            }
            Verb::Beat { worker, .. } => {
                if self.workers.get(worker).is_some_and(|row| row.exclusive) {
                    return None;
                }
            }
            Verb::Retire { worker } => {
                locks.workers.extend(self.workers.contains_key(worker).then_some((*worker, EXCLUSIVE)));
            }
            Verb::TakeOver { dead, .. } => {
                if dead.is_none() {
                    // FOR UPDATE SKIP LOCKED, any of them.
                    let free = |r: &&Uuid| {
                        self.workers.get(r).is_some_and(|w| w.expires < now && !w.exclusive && w.shared == 0)
                    };
                    let found: Vec<Uuid> = self.workers.keys().filter(free).copied().collect();
                    if found.is_empty() {
                        return Some(locks);
                    }
                    let worker = found[dice.usize(..found.len())];
                    *dead = Some(worker);
                    // Held while the leases are waited for: a heartbeat of the dead waits too.
                    if let Some(row) = self.workers.get_mut(&worker) {
                        row.exclusive = true;
                    }
                }
                let worker = dead.unwrap_or_default();
                let leases = self.leases.iter().filter(|(_, l)| l.worker == worker);
                locks.leases = leases.map(|(token, _)| (*token, EXCLUSIVE)).collect();
                if self.waits(&locks) {
                    return None;
                }
                self.take(&locks);
                locks.workers.push((worker, EXCLUSIVE));
                return Some(locks);
            }
            Verb::Revive { .. } | Verb::Doubts { .. } | Verb::Answer(_) | Verb::Observe(_) => {}
        }
        if self.waits(&locks) {
            return None;
        }
        self.take(&locks);
        Some(locks)
    }

    fn waits(&self, locks: &Locks) -> bool {
        locks.leases.iter().any(|(token, exclusive)| {
            self.leases.get(token).is_some_and(|l| l.exclusive || (*exclusive && l.shared > 0))
        }) || locks.workers.iter().any(|(worker, exclusive)| {
            self.workers.get(worker).is_some_and(|w| w.exclusive || (*exclusive && w.shared > 0))
        }) || locks.part.is_some_and(|part| self.writing.contains(&part))
    }

    fn take(&mut self, locks: &Locks) {
        for (token, exclusive) in &locks.leases {
            if let Some(lease) = self.leases.get_mut(token) {
                lease.exclusive |= *exclusive;
                lease.shared += u32::from(!*exclusive);
            }
        }
        for (worker, exclusive) in &locks.workers {
            if let Some(row) = self.workers.get_mut(worker) {
                row.exclusive |= *exclusive;
                row.shared += u32::from(!*exclusive);
            }
        }
        self.writing.extend(locks.part);
        for delivery in &locks.picked {
            if let Some(row) = self.rows.get_mut(delivery) {
                row.locked = true;
            }
        }
    }

    pub(super) fn unlock(&mut self, locks: &Locks) {
        for (token, exclusive) in &locks.leases {
            if let Some(lease) = self.leases.get_mut(token) {
                lease.exclusive &= !*exclusive;
                lease.shared -= u32::from(!*exclusive);
            }
        }
        for (worker, exclusive) in &locks.workers {
            if let Some(row) = self.workers.get_mut(worker) {
                row.exclusive &= !*exclusive;
                row.shared -= u32::from(!*exclusive);
            }
        }
        if let Some(part) = &locks.part {
            self.writing.remove(part);
        }
        for delivery in &locks.picked {
            if let Some(row) = self.rows.get_mut(delivery) {
                row.locked = false;
            }
        }
    }

    /// The transaction commits.
    pub(super) fn commit(&mut self, verb: &Verb, locks: &Locks, now: Duration) -> Checked<Said> {
        match verb {
            Verb::Claim(request) => self.claim(request, &locks.picked, now),
            Verb::Settle(settle) => self.settle(settle, now),
            Verb::SettleOpen { lease, delivery, number, rev } => {
                self.settle_open(*lease, *delivery, *number, *rev, now)
            }
            Verb::Recheck { lease, delivery, number } => {
                let held = self.leases.contains_key(&lease.token);
                let found = self.rows.get(delivery).and_then(|r| r.outcomes.get(number)) == Some(&"succeeded");
                Ok(Said::Rechecked(match (held, found) {
                    (_, true) => Some(true),
                    (true, false) => Some(false),
                    (false, false) => None,
                }))
            }
            Verb::Disown { worker, token } => self.disown(*worker, *token, now),
            Verb::Beat { worker, lease } => {
                let Some(row) = self.workers.get_mut(worker) else { return Ok(Said::Beat(None)) };
                row.expires = now + *lease;
                let own = self.leases.iter().filter(|(_, l)| l.worker == *worker);
                Ok(Said::Beat(Some(own.map(|(token, _)| *token).collect())))
            }
            Verb::Revive { worker, lease } => {
                self.enlist(*worker, *lease, now);
                Ok(Said::Nothing)
            }
            Verb::Retire { worker } => {
                if self.leases.values().any(|l| l.worker == *worker) {
                    if let Some(row) = self.workers.get_mut(worker) {
                        row.expires = now;
                    }
                } else {
                    self.workers.remove(worker);
                }
                Ok(Said::Nothing)
            }
            Verb::TakeOver { dead: None, .. } => Ok(Said::TookOver(false)),
            Verb::TakeOver { dead: Some(dead), draw } => self.take_over(*dead, *draw, now),
            Verb::Doubts { subscriptions, put_off } => Ok(Said::Doubts(self.doubts(subscriptions, *put_off, now))),
            Verb::Answer(answered) => {
                let asked = self.doubt(answered.delivery).is_some_and(|d| d.rev == answered.rev);
                if asked {
                    self.end_doubt(answered, now)?;
                }
                Ok(Said::Nothing)
            }
            Verb::Observe(observations) => {
                for seen in observations {
                    let Some(doubt) = self.doubt(seen.delivery) else { continue };
                    if let Some(answered) = decide::evidence(seen, &doubt) {
                        self.end_doubt(&answered, now)?;
                    }
                }
                Ok(Said::Nothing)
            }
        }
    }

    fn claim(&mut self, request: &ClaimRequest, picked: &[DeliveryId], now: Duration) -> Checked<Said> {
        let mut claimed = Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: None };
        for delivery in picked {
            let Some(row) = self.rows.get_mut(delivery) else { continue };
            ensure!(matches!(row.place, Place::Ready(_)), "I6: delivery {delivery} is claimed from {:?}", row.place);
            ensure!(row.due <= now, "I13: delivery {delivery} is claimed before it is due");
            row.rev += 1;
            row.place = Place::Leased(request.token);
            claimed.items.push(Item {
                delivery: *delivery,
                subscription: row.subscription,
                message: Uuid::from_u128(*delivery as u128),
                priority: 0,
                attempts: row.attempts,
                lost: row.lost,
                rev: row.rev,
                envelope: None,
            });
        }
        if claimed.items.is_empty() {
            let next =
                self.rows.values().filter_map(|r| if let Place::Scheduled(due) = r.place { Some(due) } else { None });
            claimed.next_due = next.min().map(|due| due.saturating_sub(now));
            return Ok(Said::Claimed(claimed));
        }
        self.batches += 1;
        claimed.batch = self.batches;
        let held = claimed.items.iter().map(|item| (item.delivery, item.clone())).collect();
        let lease = Lease {
            batch: claimed.batch,
            worker: request.worker,
            held,
            begun: BTreeSet::new(),
            shared: 0,
            exclusive: false,
        };
        self.leases.insert(request.token, lease);
        Ok(Said::Claimed(claimed))
    }

    fn settle(&mut self, settle: &Settle, now: Duration) -> Checked<Said> {
        if self.parts.contains(&(settle.lease.batch, settle.part)) {
            return Ok(Said::Guarded(Guarded::Done));
        }
        let token = settle.lease.token;
        if self.leases.get(&token).is_none_or(|l| l.batch != settle.lease.batch) {
            return Ok(Said::Guarded(Guarded::Fenced));
        }
        self.parts.insert((settle.lease.batch, settle.part));
        for success in &settle.successes {
            let item = self.let_go(token, success.delivery)?;
            let Some(row) = self.rows.get_mut(&item.delivery) else { continue };
            ensure!(row.kind() == Kind::Plain, "I3: delivery {} succeeded without a record", row.delivery);
            ensure!(row.outcomes.is_empty(), "I11: delivery {} succeeded first after others", row.delivery);
            row.outcomes.insert(1, "succeeded");
            (row.attempts, row.rev, row.lost) = (1, row.rev + 1, 0);
            row.place = Place::Succeeded;
        }
        for moved in &settle.moves {
            self.let_go(token, moved.delivery)?;
            ensure!(moved.outcome.is_some(), "I11: an attempt of {} ended without an outcome", moved.delivery);
            self.moved(moved, now)?;
        }
        for item in &settle.released {
            let begun = self.leases.get(&token).is_some_and(|l| l.begun.contains(&item.delivery));
            ensure!(!begun, "I11: delivery {} has begun and is handed back", item.delivery);
            self.let_go(token, item.delivery)?;
            self.moved(&decide::released(item), now)?;
        }
        for (delivery, number) in &settle.starts {
            self.begin(token, *delivery, *number)?;
        }
        if settle.close {
            let left = self.leases.get(&token).map_or(0, |l| l.held.len());
            ensure!(left == 0, "I1: a lease ends that still holds {left}");
            self.leases.remove(&token);
        }
        Ok(Said::Guarded(Guarded::Done))
    }

    /// An earlier try of this flush has committed.
    pub(super) fn written(&self, settle: &Settle) -> bool {
        self.parts.contains(&(settle.lease.batch, settle.part))
    }

    fn let_go(&mut self, token: Uuid, delivery: DeliveryId) -> Checked<Item> {
        let Some(lease) = self.leases.get_mut(&token) else { return Err("I6: settled without a lease".into()) };
        lease.begun.remove(&delivery);
        lease.held.remove(&delivery).ok_or_else(|| format!("I6: delivery {delivery} is settled, and not in the lease"))
    }

    fn begin(&mut self, token: Uuid, delivery: DeliveryId, number: u32) -> Checked {
        let held = self.leases.get_mut(&token).filter(|l| l.held.contains_key(&delivery));
        let Some(lease) = held else { return Err(format!("I6: delivery {delivery} begins, and is not in the lease")) };
        ensure!(lease.begun.insert(delivery), "I11: delivery {delivery} begins twice");
        let Some(row) = self.rows.get_mut(&delivery) else { return Ok(()) };
        ensure!(row.begun.insert(number), "I11: attempt {number} of {delivery} begins twice");
        let next = row.outcomes.len() as u32 + 1;
        ensure!(number == next, "I11: attempt {number} of {delivery} begins where {next} is next");
        within_limit(row, number)
    }

    fn settle_open(
        &mut self,
        lease: LeaseRef,
        delivery: DeliveryId,
        number: u32,
        rev: i32,
        now: Duration,
    ) -> Checked<Said> {
        let held = self.leases.get(&lease.token).is_some_and(|l| l.held.contains_key(&delivery));
        if !held {
            return Ok(Said::Guarded(Guarded::Fenced));
        }
        let item = self.let_go(lease.token, delivery)?;
        let standing = Standing { state: State::Succeeded, attempts: number, begun: false, lost: 0 };
        let outcome = Some(super::outcome(number, "succeeded"));
        let moved = Move { rev, standing, outcome, ..decide::released(&item) };
        self.moved(&moved, now)?;
        Ok(Said::Guarded(Guarded::Done))
    }

    fn disown(&mut self, worker: Uuid, token: Uuid, now: Duration) -> Checked<Said> {
        let Some(lease) = self.leases.get(&token).filter(|l| l.worker == worker) else {
            return Ok(Said::Disowned(true));
        };
        let left: Vec<Left> = lease.held.values().map(|item| left(lease, item, Duration::ZERO)).collect();
        let moves: Result<Vec<Move>, _> = left.iter().map(decide::handed_back).collect();
        // Something of it has begun: it is left to a takeover.
        let Ok(moves) = moves else { return Ok(Said::Disowned(false)) };
        self.leases.remove(&token);
        for moved in &moves {
            self.moved(moved, now)?;
        }
        Ok(Said::Disowned(true))
    }

    fn take_over(&mut self, dead: Uuid, draw: f64, now: Duration) -> Checked<Said> {
        let Some(row) = self.workers.remove(&dead) else { return Ok(Said::TookOver(false)) };
        let tokens: Vec<Uuid> = self.leases.iter().filter(|(_, l)| l.worker == dead).map(|(t, _)| *t).collect();
        for token in tokens {
            let Some(lease) = self.leases.remove(&token) else { continue };
            for item in lease.held.values() {
                let left = left(&lease, item, row.lease);
                let moved = decide::lost(&left, "w", draw).map_err(|e| format!("I6: {e}"))?;
                if let Some(row) = self.rows.get_mut(&item.delivery) {
                    row.losses += 1;
                }
                let unseen = left.standing.begun && left.policy.kind == Kind::Operation;
                ensure!(
                    !unseen || moved.standing.state == State::InDoubt,
                    "I5: the open attempt of {} is {} after its worker died",
                    item.delivery,
                    moved.standing.state
                );
                self.moved(&moved, now)?;
            }
        }
        Ok(Said::TookOver(true))
    }

    fn doubts(&mut self, subscriptions: &[SubscriptionId], put_off: Duration, now: Duration) -> Vec<Doubtful> {
        let mut due = Vec::new();
        for row in self.rows.values_mut().filter(|r| subscriptions.contains(&r.subscription)) {
            let Place::Doubt { quiet_at, ask_at, asks, word } = &mut row.place else { continue };
            if *ask_at > now || due.len() >= 10 {
                continue;
            }
            let quiet = *quiet_at <= now;
            *ask_at = now + (put_off * (1 << (*asks).min(20))).min(Duration::from_secs(900));
            if !quiet {
                *ask_at = (*ask_at).min(*quiet_at);
            }
            *asks += 1;
            let word = word.then(|| Word { actor: "ana".into(), reason: "seen".into(), receipt: None });
            due.push(Doubtful {
                delivery: row.delivery,
                subscription: row.subscription,
                rev: row.rev,
                attempts: row.attempts,
                quiet,
                asks: *asks - 1,
                word,
                envelope: None,
            });
        }
        due
    }

    fn doubt(&self, delivery: DeliveryId) -> Option<decide::Doubt> {
        let row = self.rows.get(&delivery)?;
        let Place::Doubt { word, .. } = row.place else { return None };
        Some(decide::Doubt {
            message: Uuid::from_u128(delivery as u128),
            subscription: row.subscription,
            priority: 0,
            attempts: row.attempts,
            rev: row.rev,
            word,
            policy: policy(row.subscription),
        })
    }

    pub(super) fn end_doubt(&mut self, answered: &Answered, now: Duration) -> Checked {
        let Some(doubt) = self.doubt(answered.delivery) else { return Ok(()) };
        let moved = decide::end_of_doubt(&doubt, answered).map_err(|e| format!("I6: {e}"))?;
        if let Some(row) = self.rows.get_mut(&answered.delivery) {
            row.resolutions.push((row.attempts, answered.answer, answered.speaker));
        }
        self.moved(&moved, now)
    }

    /// An operator's "happened" that a worker is to carry out.
    pub(super) fn note_word(&mut self, delivery: DeliveryId, now: Duration) {
        let Some(row) = self.rows.get_mut(&delivery) else { return };
        if let Place::Doubt { ask_at, word, .. } = &mut row.place {
            (*word, *ask_at) = (true, now);
            row.rev += 1;
        }
    }

    /// An operator wants it tried again, now.
    pub(super) fn retry(&mut self, delivery: DeliveryId, now: Duration) -> Checked {
        let Some(row) = self.rows.get_mut(&delivery).filter(|r| !r.locked) else { return Ok(()) };
        let state = match row.place {
            Place::Ready(_) | Place::Scheduled(_) => State::Pending,
            Place::Dead => State::Dead,
            _ => return Ok(()),
        };
        let standing = Standing { state, attempts: row.attempts, begun: false, lost: row.lost };
        let next =
            transition(standing, Event::Retried, &policy(row.subscription), 0.0).map_err(|e| format!("I6: {e}"))?;
        row.allowed += u32::from(state == State::Dead);
        // From here on it is due, whatever its due time was.
        row.due = now;
        row.rev += 1;
        row.lost = next.standing.lost;
        self.positions += 1;
        row.place = Place::Ready(self.positions);
        Ok(())
    }

    /// Puts a delivery where it goes next, and checks that it may.
    fn moved(&mut self, moved: &Move, now: Duration) -> Checked {
        let Some(row) = self.rows.get_mut(&moved.delivery) else { return Err("I2: a delivery that is none".into()) };
        let delivery = moved.delivery;
        ensure!(moved.rev == row.rev + 1, "I6: delivery {delivery} goes from revision {} to {}", row.rev, moved.rev);
        ensure!(
            !matches!(row.place, Place::Succeeded | Place::Dead),
            "I6: delivery {delivery} leaves {:?} by itself",
            row.place
        );
        if let Some(outcome) = &moved.outcome {
            let next = row.outcomes.len() as u32 + 1;
            ensure!(outcome.number == next, "I11: outcome {} of {delivery} where {next} is next", outcome.number);
            let recorded = row.begun.contains(&next);
            ensure!(row.kind() != Kind::Operation || recorded, "I3: attempt {next} of {delivery} ends without a start");
            within_limit(row, next)?;
            row.outcomes.insert(next, outcome.kind);
            let unseen = matches!(outcome.kind, "in_doubt" | "panicked" | "timed_out" | "lost");
            ensure!(
                row.kind() != Kind::Operation || !unseen || moved.standing.state == State::InDoubt,
                "I5: delivery {delivery} is {} though nobody saw how it ended",
                moved.standing.state
            );
        }
        ensure!(
            moved.standing.attempts as usize == row.outcomes.len(),
            "I11: delivery {delivery} counts {} attempts and has {}",
            moved.standing.attempts,
            row.outcomes.len()
        );
        (row.attempts, row.lost, row.rev) = (moved.standing.attempts, moved.standing.lost, moved.rev);
        row.place = match moved.standing.state {
            State::Pending if moved.delay.is_zero() => {
                self.positions += 1;
                Place::Ready(self.positions)
            }
            State::Pending => {
                row.due = now + moved.delay;
                Place::Scheduled(row.due)
            }
            State::InDoubt => {
                ensure!(row.kind() == Kind::Operation, "I5: delivery {delivery} is no operation, and in doubt");
                Place::Doubt { quiet_at: now + moved.quiet, ask_at: now, asks: 0, word: false }
            }
            State::Succeeded => Place::Succeeded,
            State::Dead => Place::Dead,
            other => return Err(format!("I6: delivery {delivery} goes to {other}")),
        };
        Ok(())
    }
}

fn within_limit(row: &Row, number: u32) -> Checked {
    let most = policy(row.subscription).retry.max_attempts + row.allowed;
    ensure!(number <= most, "I11: attempt {number} of {}, which may have {most}", row.delivery);
    Ok(())
}

/// What a decision needs to know of an item in a lease.
fn left(lease: &Lease, item: &Item, lease_time: Duration) -> Left {
    let begun = lease.begun.contains(&item.delivery);
    Left {
        delivery: item.delivery,
        message: item.message,
        subscription: item.subscription,
        priority: item.priority,
        rev: item.rev,
        standing: Standing {
            state: State::Running,
            attempts: item.attempts + u32::from(begun),
            begun,
            lost: item.lost,
        },
        policy: policy(item.subscription),
        ran: Duration::ZERO,
        quiet: decide::quiet_after_loss(lease_time, super::TIMEOUT, super::QUIET),
    }
}
