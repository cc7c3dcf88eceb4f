//! Claims: how many deliveries of which subscriptions are asked for, how many claims at once, and what one brings.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use uuid::Uuid;

use super::batch::{Batch, Entry, Slot};
use super::keys::Place;
use super::wire::{Command, Lane};
use super::{Core, FIRST_PAUSE, LONGEST_PAUSE, Load, Phase};
use crate::lifecycle::Kind;
use crate::store::lanes::{FIRST_LANE, LANES, is_lane};
use crate::store::{ClaimRequest, Claimed, LeaseRef, SubscriptionId};

/// The most that is claimed at once.
pub(super) const MAX_BATCH: u32 = 500;
/// How many claims run at the same time at the most.
const CLAIMS: usize = 2;
/// How much work lies ready in memory: about what is done in this time.
const AHEAD: Duration = Duration::from_millis(250);
/// The first wait of the fallback poll; it doubles up to the poll interval.
pub(super) const FIRST_POLL: Duration = Duration::from_millis(5);

/// Which lanes a claim of deliveries by key is of. Two at the same time have none in common: what is claimed later is
/// later in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    All,
    Even,
    Odd,
}

impl Part {
    fn has(self, level: i16) -> bool {
        match self {
            Part::All => true,
            Part::Even => level % 2 == 0,
            Part::Odd => level % 2 != 0,
        }
    }
}

/// Claims under way that want deliveries by key, and of which lanes.
///
/// Two halves begin as a pair, and the next one when both are over. In between, whoever waits for the worker's row gets
/// it: claims share it, and if there were always one of them, nobody else would have it.
#[derive(Debug)]
pub(super) struct Keyed {
    under_way: BTreeMap<Uuid, Part>,
    /// There is enough for claims of halves: the last claim of all lanes was full, and found about as much in either
    /// half, and each one of a half has been full since.
    halved: bool,
    /// The half that is next, so that each has its turn where there is only one claim at a time.
    turn: Part,
    /// One of a pair has begun, and the other may.
    begun: bool,
    /// The same of any two claims: those of other subscriptions share the worker's row, too.
    open: bool,
}

impl Default for Keyed {
    fn default() -> Keyed {
        Keyed { under_way: BTreeMap::new(), halved: false, turn: Part::Even, begun: false, open: false }
    }
}

impl Keyed {
    pub(super) fn tokens(&self) -> BTreeSet<Uuid> {
        self.under_way.keys().copied().collect()
    }

    /// Which lanes the next claim may be of, if any. `deep`: there is more than one claim takes.
    fn next(&self, deep: bool) -> Option<Part> {
        match (deep && self.halved, self.under_way.is_empty()) {
            (false, true) => Some(Part::All),
            (true, true) => Some(self.turn),
            (true, false) if self.begun => Some(self.turn),
            _ => None,
        }
    }

    /// Whether it is the only one under way.
    fn begin(&mut self, token: Uuid, part: Part) -> bool {
        let alone = self.under_way.is_empty();
        self.under_way.insert(token, part);
        self.begun = alone && part != Part::All;
        self.turn = if part == Part::Even { Part::Odd } else { Part::Even };
        alone
    }

    /// A claim has returned deliveries of these levels, and whether they are all that it had asked for. Whether it was
    /// of one half of the lanes.
    fn returned(&mut self, token: Uuid, levels: impl Iterator<Item = i16>, full: bool) -> bool {
        let Some(part) = self.under_way.remove(&token) else { return false };
        self.begun = false;
        let (even, odd): (Vec<i16>, Vec<i16>) =
            levels.filter(|level| is_lane(*level)).partition(|n| Part::Even.has(*n));
        let balanced = even.len().min(odd.len()) * 4 >= even.len() + odd.len();
        self.halved = full && if part == Part::All { balanced } else { self.halved };
        part != Part::All
    }
}

impl Core {
    /// A claim has brought this; `None`: its answer was lost.
    pub(super) fn claimed(
        &mut self,
        token: Uuid,
        claimed: Option<Claimed>,
        now: Duration,
        commands: &mut Vec<Command>,
    ) {
        let asked = self.claiming.remove(&token);
        self.keyed.open = false;
        let items = claimed.as_ref().map_or(&[][..], |claimed| &claimed.items);
        self.deep = claimed.is_some() && asked.is_some_and(|asked| items.len() >= asked as usize);
        let is_half = self.keyed.returned(token, items.iter().map(|item| item.priority), self.deep);
        let Some(claimed) = claimed else {
            self.hungry |= self.lines.returned(token);
            self.lost_claims.insert(token, None);
            commands.push(Command::Disown(token));
            self.poll_at = now + self.pause;
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            return;
        };
        self.pause = FIRST_PAUSE;
        self.dry(claimed.dry, now);
        if claimed.items.is_empty() {
            self.hungry |= self.lines.returned(token);
            if is_half {
                // The other half may have enough.
                self.hungry = true;
            } else if self.asleep {
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
        let mut entries = Vec::with_capacity(claimed.items.len());
        for (index, item) in claimed.items.into_iter().enumerate() {
            let mut operation = false;
            let mut place = Place::Queue;
            if let Some((lane, load)) = self.lanes.get_mut(&item.subscription) {
                place = self.lines.enter(lane, &item, (token, index));
                if place == Place::Queue {
                    load.line_up(lane, &item, (token, index), &mut self.queue, now);
                }
                operation = lane.policy.kind == Kind::Operation;
            }
            let slot = match place {
                Place::Queue => Slot::Queued,
                Place::Behind => Slot::Behind,
                Place::Back => Slot::Released,
            };
            entries.push(Entry { item, operation, slot });
        }
        self.hungry |= self.lines.returned(token);
        self.batches.insert(token, Batch::new(lease, entries, now));
        if self.phase != Phase::Working {
            self.release_queued();
        }
    }

    /// How many deliveries should lie ready.
    pub(super) fn target(&self) -> u32 {
        if let Some(batch) = self.setup.batch {
            return batch;
        }
        let concurrency = self.setup.concurrency as u32;
        let ran = self.lanes.values().filter_map(|(_, load)| load.ran).max();
        ahead(concurrency, ran)
    }

    /// How many of which subscriptions could be claimed now; `None` when nothing is wanted.
    pub(super) fn wanted(&self) -> Option<Vec<(SubscriptionId, u32)>> {
        let under_way: u32 = self.claiming.values().sum();
        // In front of a backlog a second claim runs beside the first: the server has more than one core.
        let most = if self.deep && self.setup.batch.is_none() { CLAIMS } else { 1 };
        if self.phase != Phase::Working || self.claiming.len() >= most {
            return None;
        }
        let goes_by_keys = self.lanes.values().any(|(lane, _)| lane.keys.is_some());
        if goes_by_keys && !self.claiming.is_empty() && !self.keyed.open {
            return None;
        }
        let target = self.target();
        // What waits for a permit of its own subscription does not keep the others waiting.
        let queued = self.lanes.values().map(|(lane, load)| load.startable(lane)).sum::<usize>() as u32;
        let per_call = |(lane, _): &(Lane, Load)| lane.gather.map_or(1, |gather| gather.most as u32);
        let most_per_call = self.lanes.values().map(per_call).max().unwrap_or(1);
        if queued * 2 > target
            || under_way > target.saturating_mul(most_per_call)
            || (self.setup.batch.is_some() && queued > 0)
        {
            return None;
        }
        let part = self.next_part().filter(|_| self.lost_claims.is_empty());
        // In front of a backlog a claim takes as much as it may: what it costs itself is shared by more.
        let room = if self.deep && self.setup.batch.is_none() { target } else { target.saturating_sub(queued) };
        let mut wanted: Vec<(SubscriptionId, u32)> = self
            .lanes
            .values()
            .filter_map(|of| {
                let (lane, load) = of;
                if load.allowance.dry_until.is_some() {
                    return None;
                }
                // Claims of a key come one after the other: what an earlier one has taken, or may have, comes first.
                if lane.keys.is_some() && part.is_none() {
                    return None;
                }
                let limit = load.most_at_once(lane, self.setup.concurrency) as u32;
                let room = room.saturating_mul(per_call(of));
                // A token is taken for what can begin, not for what will.
                let room = match lane.metered {
                    true => room.min(limit.saturating_sub((load.running + load.queued) as u32)),
                    false if limit == 0 => 0,
                    false => room,
                };
                let share = match self.setup.batch {
                    Some(batch) => batch.max(per_call(of)),
                    None => load.share(lane, limit),
                };
                let ready = load.waiting.turns as u32 * per_call(of);
                let room = match self.deep {
                    true if ready * 2 > share => 0,
                    true => room.min(share),
                    false => room.min(share.saturating_sub(load.queued as u32)),
                };
                let room = room.min(self.setup.batch.unwrap_or(u32::MAX));
                (room > 0).then_some((lane.id, room))
            })
            .collect();
        wanted.sort_unstable();
        (!wanted.is_empty()).then_some(wanted)
    }

    /// Of which lanes the next claim may be.
    fn next_part(&self) -> Option<Part> {
        self.keyed.next(self.deep && self.setup.batch.is_none())
    }

    pub(super) fn claim(&mut self, now: Duration, commands: &mut Vec<Command>) {
        if !self.hungry && now < self.poll_at {
            return;
        }
        while let Some(wanted) = self.wanted() {
            let token = uuid::Builder::from_random_bytes(self.rng.u128(..).to_be_bytes()).into_uuid();
            self.keyed.open = self.claiming.is_empty();
            self.claiming.insert(token, wanted.iter().map(|(_, room)| room).sum());
            self.hungry = false;
            let metered = wanted.iter().map(|(id, _)| *id);
            let metered = metered.filter(|id| self.lanes.get(id).is_some_and(|(lane, _)| lane.metered)).collect();
            let by_key = self.by_key(&wanted);
            let (mut full, mut sorts) = (self.lines.full(), self.keyed.under_way.is_empty());
            if let Some(part) = self.next_part().filter(|_| !by_key.is_empty()) {
                sorts = self.keyed.begin(token, part);
                let others = (FIRST_LANE..FIRST_LANE + LANES).filter(|level| !part.has(*level));
                full.extend(others.flat_map(|level| by_key.iter().map(move |id| (*id, level))));
            }
            commands.push(Command::Claim(ClaimRequest {
                worker: self.setup.worker,
                token,
                by_key,
                full,
                sorts,
                wanted,
                metered,
            }));
        }
    }

    /// Which of these deliver by key.
    fn by_key(&self, wanted: &[(SubscriptionId, u32)]) -> Vec<SubscriptionId> {
        let ids = wanted.iter().map(|(id, _)| *id);
        ids.filter(|id| self.lanes.get(id).is_some_and(|(lane, _)| lane.keys.is_some())).collect()
    }
}

/// What `concurrency` handlers do in the time that is worked ahead.
pub(super) fn ahead(concurrency: u32, ran: Option<Duration>) -> u32 {
    let per_handler = match ran {
        Some(ran) => (AHEAD.as_nanos() / ran.as_nanos().max(1)).min(u128::from(MAX_BATCH)) as u32,
        None => 2,
    };
    concurrency.saturating_mul(per_handler.max(1)).min(MAX_BATCH.max(concurrency))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn returned(keyed: &mut Keyed, claim: u128, lanes: &[i16], full: bool) -> bool {
        keyed.returned(Uuid::from_u128(claim), lanes.iter().map(|lane| FIRST_LANE + lane), full)
    }

    /// Which lanes it is of, and whether nothing was under way.
    fn begins(keyed: &mut Keyed, claim: u128, deep: bool) -> Option<(Part, bool)> {
        let part = keyed.next(deep)?;
        Some((part, keyed.begin(Uuid::from_u128(claim), part)))
    }

    fn halved() -> Keyed {
        let mut keyed = Keyed::default();
        begins(&mut keyed, 1, false);
        returned(&mut keyed, 1, &[0, 1, 2, 3], true);
        keyed
    }

    #[test]
    fn two_claims_at_once_have_no_lane_in_common() {
        let mut keyed = Keyed::default();
        assert_eq!(begins(&mut keyed, 1, false), Some((Part::All, true)));
        assert_eq!(begins(&mut keyed, 2, true), None, "one is under way, of all lanes");
        assert!(!returned(&mut keyed, 1, &[0, 1, 2, 3], true));
        assert_eq!(begins(&mut keyed, 2, true), Some((Part::Even, true)));
        assert_eq!(begins(&mut keyed, 3, true), Some((Part::Odd, false)));
        assert_eq!(begins(&mut keyed, 4, true), None);
        assert_eq!(keyed.tokens(), [2, 3].map(Uuid::from_u128).into());
        let levels = |part: Part| (FIRST_LANE..FIRST_LANE + LANES).filter(|n| part.has(*n)).count();
        assert_eq!((levels(Part::Even), levels(Part::Odd), levels(Part::All)), (16, 16, 32));
    }

    #[test]
    fn between_two_pairs_no_claim_is_under_way() {
        let mut keyed = halved();
        begins(&mut keyed, 2, true);
        begins(&mut keyed, 3, true);
        assert!(returned(&mut keyed, 2, &[0, 2, 2, 4], true));
        assert_eq!(begins(&mut keyed, 4, true), None, "the other of the pair is under way");
        assert!(returned(&mut keyed, 3, &[1, 1, 3, 5], true));
        assert_eq!(begins(&mut keyed, 4, true), Some((Part::Even, true)));
        assert!(returned(&mut keyed, 4, &[0, 2, 2, 4], true));
        assert_eq!(begins(&mut keyed, 5, true), Some((Part::Odd, true)), "one alone: each half has its turn");
        assert!(returned(&mut keyed, 5, &[1, 1, 3, 5], true));
        assert_eq!(begins(&mut keyed, 6, true), Some((Part::Even, true)));
    }

    #[test]
    fn what_lies_in_one_half_is_claimed_from_all_lanes() {
        let mut keyed = Keyed::default();
        begins(&mut keyed, 1, false);
        returned(&mut keyed, 1, &[0, 0, 0, 0, 1], true);
        assert_eq!(keyed.next(true), Some(Part::All), "there is next to nothing in the other half");
        for full_comes_first in [true, false] {
            let mut keyed = halved();
            begins(&mut keyed, 2, true);
            begins(&mut keyed, 3, true);
            let answers: [(u128, &[i16], bool); 2] = [(3, &[1, 1, 1], true), (2, &[], false)];
            for (claim, lanes, full) in if full_comes_first { answers } else { [answers[1], answers[0]] } {
                assert!(keyed.next(false).is_none() && returned(&mut keyed, claim, lanes, full));
            }
            assert_eq!(keyed.next(true), Some(Part::All), "one half was empty, and that is remembered");
        }
    }
}
