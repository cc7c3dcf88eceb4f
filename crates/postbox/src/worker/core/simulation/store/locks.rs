//! Who waits for whom: the locks that a verb takes first, and holds until it ends.

use std::time::Duration;

use uuid::Uuid;

use super::{Model, Place, Verb};
use crate::store::DeliveryId;

/// Locks that a transaction holds until it ends.
#[derive(Debug, Default)]
pub(in super::super) struct Locks {
    leases: Vec<(Uuid, bool)>,
    workers: Vec<(Uuid, bool)>,
    part: Option<(i64, i32)>,
    pub(super) picked: Vec<DeliveryId>,
}

const EXCLUSIVE: bool = true;
const SHARED: bool = false;

impl Model {
    /// The locks that a verb takes first; `None`: somebody holds one of them, ask again when they end.
    pub(in super::super) fn lock(&mut self, verb: &mut Verb, now: Duration, dice: &mut fastrand::Rng) -> Option<Locks> {
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
            Verb::Revive { .. }
            | Verb::Doubts { .. }
            | Verb::Unanswered { .. }
            | Verb::Answer(_)
            | Verb::Observe(_) => {}
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

    pub(in super::super) fn unlock(&mut self, locks: &Locks) {
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
}
