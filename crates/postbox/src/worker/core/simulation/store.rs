//! A store in memory, in virtual time: rows, leases, locks. It takes the stores' own decisions, and
//! says when what it is told to write breaks an invariant.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

mod locks;
mod record;

pub(super) use self::locks::Locks;
use super::{Checked, ensure, policy, policy_of, subscription_kind};
use crate::lifecycle::{Answer, Event, Kind, Standing, State, transition};
use crate::message::Draft;
use crate::planted::planted;
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
    /// Attempts that may have happened, and of which nobody has said yet what they came to.
    unseen: BTreeSet<u32>,
    /// How often what follows from it was published.
    followed: u32,
}

impl Row {
    pub(super) fn kind(&self) -> Kind {
        subscription_kind(self.subscription)
    }

    /// An attempt before this one may have happened, by what is on record.
    pub(super) fn may_have_happened(&self, before: u32) -> bool {
        self.unseen.range(..before).next().is_some()
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
    /// It runs [`PAY`](super::PAY) as declared idempotent.
    declares: bool,
    shared: u32,
    exclusive: bool,
}

/// What is asked of the store; each is one transaction.
#[derive(Debug, Clone)]
pub(super) enum Verb {
    Claim(ClaimRequest),
    Settle(Arc<Settle>),
    SettleOpen { lease: LeaseRef, delivery: DeliveryId, number: u32, rev: i32, follow_ups: Vec<Draft> },
    Recheck { lease: LeaseRef, delivery: DeliveryId, number: u32 },
    Disown { worker: Uuid, token: Uuid },
    Beat { worker: Uuid, lease: Duration },
    Revive { worker: Uuid, lease: Duration, declares: bool },
    Retire { worker: Uuid },
    TakeOver { dead: Option<Uuid>, draw: f64 },
    Doubts { subscriptions: Vec<SubscriptionId>, hold: Duration },
    Unanswered { doubt: Box<Doubtful>, wait: Duration },
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
            unseen: BTreeSet::new(),
            followed: 0,
        };
        self.rows.insert(delivery, row);
    }

    pub(super) fn position(&mut self) -> i64 {
        self.positions += 1;
        self.positions
    }

    pub(super) fn enlist(&mut self, worker: Uuid, lease: Duration, declares: bool, now: Duration) {
        let row = WorkerRow { expires: now + lease, lease, declares, shared: 0, exclusive: false };
        self.workers.insert(worker, row);
    }

    /// The transaction commits.
    pub(super) fn commit(&mut self, verb: &Verb, locks: &Locks, now: Duration) -> Checked<Said> {
        match verb {
            Verb::Claim(request) => self.claim(request, &locks.picked, now),
            Verb::Settle(settle) => self.settle(settle, now),
            Verb::SettleOpen { lease, delivery, number, rev, follow_ups } => {
                let settled = self.settle_open(*lease, *delivery, *number, *rev, now)?;
                if let Said::Guarded(Guarded::Done) = settled {
                    self.follow(follow_ups)?;
                }
                Ok(settled)
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
            Verb::Revive { worker, lease, declares } => {
                self.enlist(*worker, *lease, *declares, now);
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
            Verb::Doubts { subscriptions, hold } => Ok(Said::Doubts(self.doubts(subscriptions, *hold, now))),
            Verb::Unanswered { doubt, wait } => {
                self.unanswered(doubt, *wait, now);
                Ok(Said::Nothing)
            }
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
        let mut claimed =
            Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: None, dry: Vec::new() };
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
                leads: false,
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
            if planted!("follow-ups-apart") {
                self.follow(&settle.follow_ups)?;
            }
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
            let withheld = moved.standing.state == State::InDoubt;
            ensure!(
                moved.outcome.is_some() || withheld,
                "I11: an attempt of {} ended without an outcome",
                moved.delivery
            );
            self.moved(moved, now)?;
        }
        for item in &settle.released {
            let begun = self.leases.get(&token).is_some_and(|l| l.begun.contains(&item.delivery));
            ensure!(!begun, "I11: delivery {} has begun and is handed back", item.delivery);
            self.let_go(token, item.delivery)?;
            self.moved(&decide::released(item), now)?;
        }
        self.follow(&settle.follow_ups)?;
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
        let declares = self.workers.get(&worker).is_some_and(|w| w.declares);
        let left: Vec<Left> = lease.held.values().map(|item| left(lease, item, declares, Duration::ZERO)).collect();
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
                let left = left(&lease, item, row.declares, row.lease);
                let moved = decide::lost(&left, "w", draw).map_err(|e| format!("I6: {e}"))?;
                if let Some(row) = self.rows.get_mut(&item.delivery) {
                    row.losses += 1;
                }
                let unseen = left.standing.begun && left.policy.kind == Kind::Operation && !left.policy.repeats();
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

    fn doubts(&mut self, subscriptions: &[SubscriptionId], hold: Duration, now: Duration) -> Vec<Doubtful> {
        let mut due = Vec::new();
        for row in self.rows.values_mut().filter(|r| subscriptions.contains(&r.subscription)) {
            let Place::Doubt { quiet_at, ask_at, asks, word } = &mut row.place else { continue };
            if *ask_at > now || due.len() >= 10 {
                continue;
            }
            *ask_at = now + hold;
            let word = word.then(|| Word { actor: "ana".into(), reason: "seen".into(), receipt: None });
            due.push(Doubtful {
                delivery: row.delivery,
                subscription: row.subscription,
                rev: row.rev,
                attempts: row.attempts,
                quiet: *quiet_at <= now,
                asks: *asks,
                word,
                envelope: None,
            });
        }
        due
    }

    fn unanswered(&mut self, doubt: &Doubtful, wait: Duration, now: Duration) {
        let Some(row) = self.rows.get_mut(&doubt.delivery).filter(|row| row.rev == doubt.rev) else { return };
        let Place::Doubt { quiet_at, ask_at, asks, .. } = &mut row.place else { return };
        if *asks == doubt.asks {
            *asks += 1;
            *ask_at = if *quiet_at > now { (now + wait).min(*quiet_at) } else { now + wait };
        }
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
            // The word is about all its attempts.
            row.unseen.clear();
        }
        self.moved(&moved, now)?;
        if moved.standing.state == State::Succeeded { self.follow(&answered.follow_ups) } else { Ok(()) }
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
}

/// What a decision needs to know of an item in a lease.
fn left(lease: &Lease, item: &Item, declares: bool, lease_time: Duration) -> Left {
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
        policy: policy_of(item.subscription, declares),
        ran: Duration::ZERO,
        quiet: decide::quiet_after_loss(lease_time, super::TIMEOUT, super::QUIET),
    }
}
