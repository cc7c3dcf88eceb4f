//! How those of a lower priority come to their turn.

use std::collections::HashMap;
use std::sync::Mutex;

use super::SubscriptionId;
use crate::planted::planted;
use crate::priority::Priority;

/// One of so many deliveries is of a lower level, while one of those waits.
const SHARE: u32 = 8;

/// How many of a lower level a claim takes before all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) level: Priority,
    /// None: it takes all in their order.
    pub(crate) most: u32,
}

/// Whose turn it is, for each subscription, for all who claim in this process. It need not be known to other
/// processes: each gives the lower levels their share of what it takes itself.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<HashMap<SubscriptionId, Turn>>);

#[derive(Debug, Clone, Copy)]
struct Turn {
    /// Deliveries that were taken since a lower level had its share.
    since: u32,
    /// The highest level of those that were taken last: what is below may be waiting for ever.
    top: Priority,
    /// Which level had its share last.
    last: Priority,
}

impl Turns {
    /// What a claim of so many leaves to a lower level.
    pub(crate) fn share(&self, subscription: SubscriptionId, room: u32) -> Share {
        let turn = self.0.lock().ok().and_then(|turns| turns.get(&subscription).copied()).unwrap_or(Turn::FIRST);
        turn.share(room)
    }

    /// A claim took so many, of this level and below.
    pub(crate) fn took(&self, subscription: SubscriptionId, share: Share, taken: u32, top: Priority) {
        if let Ok(mut turns) = self.0.lock() {
            turns.entry(subscription).or_insert(Turn::FIRST).took(share, taken, top);
        }
    }
}

impl Turn {
    const FIRST: Turn = Turn { since: 0, top: Priority::High, last: Priority::Normal };

    fn share(self, room: u32) -> Share {
        let (level, most) = match (self.top, self.last) {
            (Priority::High, Priority::Low) => (Priority::Normal, self.since.saturating_add(room) / SHARE),
            (Priority::High | Priority::Normal, _) => (Priority::Low, self.since.saturating_add(room) / SHARE),
            // All that was taken is of the lowest level.
            (Priority::Low, _) => (Priority::Low, 0),
        };
        Share { level, most: if planted!("lowest-starve") { 0 } else { most.min(room) } }
    }

    fn took(&mut self, share: Share, taken: u32, top: Priority) {
        if taken == 0 {
            return;
        }
        let since = self.since.saturating_add(taken);
        self.since = if share.most > 0 { since % SHARE } else { since.min(SHARE) };
        if share.most > 0 {
            self.last = share.level;
        }
        self.top = top;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Claims of so many from what waits, by level; how many of each were taken.
    fn claim(turn: &mut Turn, room: u32, waiting: &mut [u32; 3]) -> [u32; 3] {
        let share = turn.share(room);
        let (mut left, mut taken) = (room, [0; 3]);
        let order = [(share.level, share.most)].into_iter().chain(Priority::ALL.map(|level| (level, room)));
        for (level, most) in order {
            let n = (level.level() + 1) as usize;
            let took = waiting[n].min(most).min(left);
            (waiting[n], left, taken[n]) = (waiting[n] - took, left - took, taken[n] + took);
        }
        let top = (0..3).find(|n| taken[*n] > 0).map_or(0, |n| n as i16 - 1);
        turn.took(share, taken.iter().sum(), Priority::of(top));
        taken
    }

    #[test]
    fn a_flood_leaves_an_eighth_to_those_below_in_turn() {
        for room in [1, 2, 3, 7, 8, 9, 60, 500] {
            let (mut turn, mut taken, mut total) = (Turn::FIRST, [0; 3], 0);
            while total < 8_000 {
                let mut waiting = [10_000; 3];
                for (n, took) in claim(&mut turn, room, &mut waiting).into_iter().enumerate() {
                    (taken[n], total) = (taken[n] + took, total + took);
                }
            }
            let [_, normal, low] = taken.map(|n| f64::from(n) / f64::from(total));
            assert!((0.05..0.075).contains(&normal) && (0.05..0.075).contains(&low), "{room}: {taken:?}");
            // What is normal is a flood to what is low.
            let (mut turn, mut taken) = (Turn::FIRST, [0; 3]);
            for _ in 0..8_000 / room {
                for (n, took) in claim(&mut turn, room, &mut [0, 10_000, 10_000]).into_iter().enumerate() {
                    taken[n] += took;
                }
            }
            let low = f64::from(taken[2]) / f64::from(taken[1] + taken[2]);
            assert!((0.11..0.14).contains(&low), "{room}: {taken:?}");
        }
    }

    #[test]
    fn a_share_is_no_limit() {
        for waiting in [[0, 500, 0], [0, 0, 500], [500, 0, 0], [3, 0, 497], [0, 3, 497], [400, 60, 40]] {
            let mut turn = Turn::FIRST;
            for _ in 0..20 {
                let taken = claim(&mut turn, 500, &mut waiting.clone());
                assert_eq!(taken, waiting, "all that is there is taken");
            }
        }
    }
}
