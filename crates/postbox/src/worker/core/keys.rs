//! Deliveries of one key: so many at a time, and in order, one after the other. What has to wait for others of its
//! key waits here; one that did not succeed in order sends those behind it back.

use std::collections::{BTreeSet, HashMap, VecDeque};

use uuid::Uuid;

use super::batch::{Batch, Slot};
use super::wire::{Hold, Lane};
use super::{Core, Load};
use crate::keys::Keys;
use crate::planted::planted;
use crate::store::{Item, SubscriptionId};

/// Nothing more is claimed from a lane of which so many wait for others of their key.
const FULL: usize = 128;

/// The deliveries of one key that are in hand.
#[derive(Debug, Default)]
struct Line {
    /// Queued, running, or otherwise on their way.
    going: usize,
    /// The lane of its key.
    level: i16,
    /// Behind them, in order.
    behind: VecDeque<Hold>,
    closed: Closed,
}

/// Whether more of a key may come.
#[derive(Debug, Default, PartialEq, Eq)]
enum Closed {
    #[default]
    No,
    /// Until it is on record that this one did not succeed.
    Settling(Hold),
    /// Until these claims have returned: they may have been made before it was on record.
    Claiming(BTreeSet<Uuid>),
}

/// What to do with a delivery that was claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Queue,
    Behind,
    /// One before it did not succeed.
    Back,
}

/// The lines of all keys in hand.
#[derive(Debug, Default)]
pub(super) struct Lines {
    of: HashMap<SubscriptionId, HashMap<String, Line>>,
    /// How many are behind others, by lane.
    behind: HashMap<(SubscriptionId, i16), usize>,
}

/// The key, if its subscription goes by keys.
fn key<'i>(lane: &Lane, item: &'i Item) -> Option<(Keys, &'i str)> {
    Some((lane.keys?, item.envelope.as_ref()?.key.as_deref()?))
}

impl Lines {
    pub(super) fn is_empty(&self) -> bool {
        self.of.is_empty()
    }

    /// Where a claimed delivery goes.
    pub(super) fn enter(&mut self, lane: &Lane, item: &Item, hold: Hold) -> Place {
        let Some((keys, key)) = key(lane, item) else { return Place::Queue };
        let line = self.of.entry(lane.id).or_default().entry(key.to_owned()).or_default();
        line.level = item.priority;
        if line.closed != Closed::No {
            return Place::Back;
        }
        if line.going < keys.at_once() as usize + usize::from(planted!("two-of-a-key")) {
            line.going += 1;
            return Place::Queue;
        }
        line.behind.push_back(hold);
        *self.behind.entry((lane.id, item.priority)).or_default() += 1;
        Place::Behind
    }

    /// One is not on its way any more: the next of its key.
    fn next(&mut self, lane: &Lane, item: &Item) -> Option<Hold> {
        let (_, key) = key(lane, item)?;
        let lines = self.of.get_mut(&lane.id)?;
        let line = lines.get_mut(key)?;
        line.going = line.going.saturating_sub(1);
        let next = line.behind.pop_front();
        if next.is_some() {
            line.going += 1;
            self.came_out(lane.id, item.priority, 1);
        } else if line.going == 0 && line.closed == Closed::No {
            lines.remove(key);
        }
        next
    }

    /// One in order has not succeeded: those behind it, which go back.
    fn close(&mut self, lane: &Lane, item: &Item, closed: Closed) -> Vec<Hold> {
        let Some((_, key)) = key(lane, item) else { return Vec::new() };
        let line = self.of.entry(lane.id).or_default().entry(key.to_owned()).or_default();
        line.going = line.going.saturating_sub(1);
        line.closed = closed;
        let behind: Vec<Hold> = std::mem::take(&mut line.behind).into();
        self.came_out(lane.id, item.priority, behind.len());
        behind
    }

    fn came_out(&mut self, subscription: SubscriptionId, level: i16, number: usize) {
        if let Some(behind) = self.behind.get_mut(&(subscription, level)) {
            *behind = behind.saturating_sub(number);
            if *behind == 0 {
                self.behind.remove(&(subscription, level));
            }
        }
    }

    /// Nothing of these subscriptions waits behind others any more.
    pub(super) fn empty(&mut self, which: impl Fn(SubscriptionId) -> bool) {
        self.behind.retain(|(subscription, _), _| !which(*subscription));
        for (_, lines) in self.of.iter_mut().filter(|(subscription, _)| which(**subscription)) {
            lines.values_mut().for_each(|line| line.behind.clear());
        }
    }

    /// What is behind others and belongs to this batch is not any more.
    fn forget(&mut self, token: Uuid, claiming: &BTreeSet<Uuid>) {
        self.on_record(token, |_| true, claiming);
        self.behind.clear();
        for (subscription, lines) in &mut self.of {
            for line in lines.values_mut() {
                line.behind.retain(|(of, _)| *of != token);
                if !line.behind.is_empty() {
                    *self.behind.entry((*subscription, line.level)).or_default() += line.behind.len();
                }
            }
        }
    }

    pub(super) fn none_behind(&self) -> bool {
        self.behind.is_empty()
    }

    /// Those of which something is behind others.
    pub(super) fn subscriptions_behind(&self) -> impl Iterator<Item = SubscriptionId> + '_ {
        self.behind.keys().map(|(subscription, _)| *subscription)
    }

    /// Lanes that have enough of their deliveries here, or of which a key is closed.
    pub(super) fn full(&self) -> Vec<(SubscriptionId, i16)> {
        let mut full: Vec<_> = self.behind.iter().filter(|(_, n)| **n >= FULL).map(|(lane, _)| *lane).collect();
        for (subscription, lines) in &self.of {
            full.extend(
                lines.values().filter(|line| line.closed != Closed::No).map(|line| (*subscription, line.level)),
            );
        }
        full.sort_unstable();
        full.dedup();
        full
    }

    /// What has ended in this batch is on record: claims that begin now know of it.
    /// Whether keys are open again for it.
    pub(super) fn on_record(
        &mut self,
        token: Uuid,
        settled: impl Fn(usize) -> bool,
        claiming: &BTreeSet<Uuid>,
    ) -> bool {
        self.each_closed(|closed| match closed {
            Closed::Settling((of, index)) if *of == token && settled(*index) => {
                *closed = Closed::Claiming(claiming.clone())
            }
            _ => {}
        })
    }

    /// A claim has returned, or never will. Whether keys are open again for it.
    pub(super) fn returned(&mut self, claim: Uuid) -> bool {
        self.each_closed(|closed| {
            if let Closed::Claiming(claims) = closed {
                claims.remove(&claim);
            }
        })
    }

    /// Whether some are open again.
    fn each_closed(&mut self, mut change: impl FnMut(&mut Closed)) -> bool {
        let mut opened = false;
        for lines in self.of.values_mut() {
            lines.retain(|_, line| {
                if line.closed == Closed::No {
                    return true;
                }
                change(&mut line.closed);
                if matches!(&line.closed, Closed::Claiming(claims) if claims.is_empty()) {
                    line.closed = Closed::No;
                    opened = true;
                }
                line.closed != Closed::No || line.going > 0
            });
        }
        opened
    }
}

impl Core {
    /// A delivery is not on its way any more: it ended well, or goes back without having begun. The next of its
    /// key may go.
    pub(super) fn passed(&mut self, subscription: SubscriptionId, item: &Item) {
        let Some((lane, load)) = self.lanes.get_mut(&subscription) else { return };
        let Some(next) = self.lines.next(lane, item) else { return };
        let Some(batch) = self.batches.get_mut(&next.0) else { return };
        // Whatever made it full.
        self.hungry = true;
        let item = &batch.entries()[next.1].item;
        load.line_up(lane, item, next, &mut self.queue, self.now);
        batch.put(next.1, Slot::Queued);
    }

    /// The same of one that goes back with all that was behind it.
    pub(super) fn went_back(&mut self, item: &Item) {
        if let Some((lane, _)) = self.lanes.get(&item.subscription) {
            self.lines.next(lane, item);
        }
    }

    /// A delivery has ended, well or not.
    pub(super) fn through(&mut self, hold: Hold, succeeded: bool) {
        let Some(item) = self.batches.get(&hold.0).map(|batch| batch.entries()[hold.1].item.clone()) else { return };
        let Some((lane, _)) = self.lanes.get(&item.subscription) else { return };
        match lane.keys {
            None => {}
            Some(Keys::Ordered(_)) if !succeeded && !planted!("followers-go-on") => {
                let behind = self.lines.close(lane, &item, Closed::Settling(hold));
                self.back(behind);
            }
            Some(_) => self.passed(item.subscription, &item),
        }
    }

    /// Those go back, unstarted.
    fn back(&mut self, holds: Vec<Hold>) {
        for (token, index) in holds {
            if let Some(batch) = self.batches.get_mut(&token)
                && matches!(batch.entries()[index].slot, Slot::Behind)
            {
                batch.put(index, Slot::Released);
            }
        }
    }

    /// The lease of a batch was lost: what of it was on its way is somebody else's, and with it all of its keys.
    pub(super) fn lines_lost(&mut self, token: Uuid, lost: Vec<(Item, bool)>) {
        if lost.is_empty() {
            return;
        }
        let claims = self.keyed.clone();
        self.lines.forget(token, &claims);
        for (item, going) in lost {
            let Some((lane, _)) = self.lanes.get(&item.subscription) else { continue };
            match lane.keys {
                None => {}
                Some(Keys::Ordered(_)) if going => {
                    let behind = self.lines.close(lane, &item, Closed::Claiming(claims.clone()));
                    self.back(behind);
                }
                Some(_) if going => self.passed(item.subscription, &item),
                Some(_) => {}
            }
        }
        // Where no claim is under way, nothing is waited for.
        self.hungry |= self.lines.returned(token);
    }

    /// Which of these deliver by key.
    pub(super) fn by_key(&self, wanted: &[(SubscriptionId, u32)]) -> Vec<SubscriptionId> {
        let ids = wanted.iter().map(|(id, _)| *id);
        ids.filter(|id| self.lanes.get(id).is_some_and(|(lane, _)| lane.keys.is_some())).collect()
    }
}

/// What of a batch was on its way, before its slots change.
pub(super) fn in_lines(batch: &Batch, lanes: &HashMap<SubscriptionId, (Lane, Load)>) -> Vec<(Item, bool)> {
    let by_key = |item: &Item| lanes.get(&item.subscription).is_some_and(|(lane, _)| lane.keys.is_some());
    let going = |slot: &Slot| {
        matches!(
            slot,
            Slot::Queued | Slot::Reserved | Slot::Starting | Slot::Running { .. } | Slot::Paused(_) | Slot::CutOff(_)
        )
    };
    let entries = batch.entries().iter().filter(|entry| by_key(&entry.item));
    entries.map(|entry| (entry.item.clone(), going(&entry.slot))).collect()
}
