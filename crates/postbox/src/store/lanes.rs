//! Lanes, as both stores have them: a subscription that delivers by key has its deliveries at a level for each hash
//! of a key, and each lane belongs to one worker at a time (decision 0030).

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::{Move, SubscriptionId};
use crate::lifecycle::State;
use crate::planted::planted;

/// The level of the first lane.
pub(crate) const FIRST_LANE: i16 = 64;
/// How many lanes a subscription has.
pub(crate) const LANES: i16 = 32;
/// The first of the levels at which deliveries wait for another one of their key.
pub(crate) const FIRST_HELD: i16 = 1024;
/// How many such levels there are. Several keys may share one.
pub(crate) const HELD: i16 = 8192;
/// How many deliveries of a key are let through at once when it goes on.
pub(crate) const LET_THROUGH: usize = 1000;

/// How often lanes are shared out anew.
const BALANCE: Duration = Duration::from_millis(500);
/// As many of a lane are taken at once at least, if there is room.
const LEAST: u32 = 16;

/// A lane: its subscription and its level.
pub(crate) type Lane = (SubscriptionId, i16);

/// Whether a level is a lane.
pub(crate) fn is_lane(level: i16) -> bool {
    (FIRST_LANE..FIRST_LANE + LANES).contains(&level)
}

/// How many of each lane are taken, where so many deliveries are wanted from so many lanes.
pub(crate) fn of_each(room: u32, lanes: usize) -> u32 {
    let share = room.saturating_mul(2) / u32::try_from(lanes).unwrap_or(u32::MAX).max(1);
    share.max(LEAST).min(room)
}

/// When this process has shared out the lanes of which subscription.
#[derive(Debug, Default)]
pub(crate) struct Balanced(Mutex<HashMap<(Uuid, SubscriptionId), Instant>>);

impl Balanced {
    /// Those whose turn it is. Who is told so does it: nobody else is told for a while.
    pub(crate) fn due(&self, worker: Uuid, subscriptions: &[SubscriptionId], now: Instant) -> Vec<SubscriptionId> {
        let Ok(mut last) = self.0.lock() else { return subscriptions.to_vec() };
        let mut due = Vec::new();
        for subscription in subscriptions {
            let at = last.get(&(worker, *subscription));
            if at.is_none_or(|at| now.saturating_duration_since(*at) >= BALANCE) {
                due.push(*subscription);
            }
        }
        // Incarnations of this process that are over.
        last.retain(|(of, _), at| *of == worker || now.saturating_duration_since(*at) < BALANCE);
        last.extend(due.iter().map(|subscription| ((worker, *subscription), now)));
        due
    }
}

/// What moves mean for the keys of their deliveries.
#[derive(Debug, Default)]
pub(crate) struct Followed<'m> {
    /// These come before all others of their key now.
    pub(crate) leading: Vec<&'m Move>,
    /// What waits for these, if anything does, goes on.
    pub(crate) over: Vec<&'m Move>,
}

impl<'m> Followed<'m> {
    pub(crate) fn of(moves: impl Iterator<Item = &'m Move>) -> Followed<'m> {
        let mut followed = Followed::default();
        for one in moves.filter(|one| is_lane(one.priority)) {
            match one.standing.state {
                State::Succeeded if one.leads => followed.over.push(one),
                State::Cancelled => followed.over.push(one),
                State::Succeeded => {}
                _ if one.leads && !planted!("key-not-held") => followed.leading.push(one),
                _ => {}
            }
        }
        followed
    }

    pub(crate) fn is_nothing(&self) -> bool {
        self.leading.is_empty() && self.over.is_empty()
    }

    /// Those whose lanes are concerned, each once, in order.
    pub(crate) fn lanes(&self) -> Vec<Lane> {
        let all = self.leading.iter().chain(&self.over);
        let mut lanes: Vec<Lane> = all.map(|one| (one.subscription, one.priority)).collect();
        lanes.sort_unstable();
        lanes.dedup();
        lanes
    }

    /// Of those that lead, the dead ones.
    pub(crate) fn dead(&self) -> Vec<i64> {
        self.leading.iter().filter(|one| one.standing.state == State::Dead).map(|one| one.delivery).collect()
    }
}
