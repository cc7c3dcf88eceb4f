//! A batch in hand: its deliveries, where each stands, and how many stand where.

use std::sync::Arc;
use std::time::Duration;

use super::FIRST_PAUSE;
use super::flush::{FLUSH_AFTER, FLUSH_COUNT, WAVE_AFTER};
use super::wire::Ended;
use crate::store::{Item, LeaseRef, Settle};

/// Where a delivery of a batch stands in this worker.
#[derive(Debug)]
pub(super) enum Slot {
    /// Waits for a permit.
    Queued,
    /// Waits for others of its key.
    Behind,
    /// Has a permit, waits for its attempt to be on record.
    Reserved,
    /// Its attempt is being put on record.
    Starting,
    Running {
        deadline: Duration,
        cancelled: bool,
    },
    /// Could not be called; tried again from this time on.
    Paused(Duration),
    /// An operation that was cut off and has not let go: it may still do its work.
    CutOff(Box<Ended>),
    /// Ended, waits to be settled.
    Ended(Box<Ended>, Duration),
    /// Handed back, waits to be settled.
    Released,
    /// An operation that must not be called again; its doubt waits to be settled.
    Withheld,
    /// In the flush that is under way; how it ended is kept, in case the flush is fenced.
    Settling(Option<Box<Ended>>),
    Settled,
}

/// A delivery of a batch.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) item: Item,
    pub(super) operation: bool,
    pub(super) slot: Slot,
}

/// How many deliveries of a batch stand where, so that nobody walks over all of them to see that there is
/// nothing to do.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Tally {
    /// Ended, and waiting to be settled.
    pub(super) ended: usize,
    /// Of those, operations.
    pub(super) operations: usize,
    /// Operations that run.
    pub(super) calling: usize,
    pub(super) reserved: usize,
    /// Waiting to be handed back, or withheld.
    pub(super) released: usize,
    pub(super) settled: usize,
    /// When the first of those ended that wait to be settled.
    pub(super) oldest: Option<Duration>,
    /// Nothing that runs or pauses is due before.
    pub(super) due: Option<Duration>,
}

impl Tally {
    fn enter(&mut self, entry: &Entry) {
        let earlier = |one: Option<Duration>, other: Duration| Some(one.map_or(other, |one| one.min(other)));
        match &entry.slot {
            Slot::Ended(_, at) => {
                self.ended += 1;
                self.operations += usize::from(entry.operation);
                self.oldest = earlier(self.oldest, *at);
            }
            Slot::Reserved => self.reserved += 1,
            Slot::Released | Slot::Withheld => self.released += 1,
            Slot::Settled => self.settled += 1,
            Slot::Running { deadline, cancelled } => {
                self.calling += usize::from(entry.operation);
                if !cancelled {
                    self.due = earlier(self.due, *deadline);
                }
            }
            Slot::Paused(at) => self.due = earlier(self.due, *at),
            _ => {}
        }
    }

    /// The times stay: nothing is earlier for it.
    fn leave(&mut self, entry: &Entry) {
        match &entry.slot {
            Slot::Ended(..) => {
                self.ended -= 1;
                self.operations -= usize::from(entry.operation);
            }
            Slot::Reserved => self.reserved -= 1,
            Slot::Released | Slot::Withheld => self.released -= 1,
            Slot::Settled => self.settled -= 1,
            Slot::Running { .. } => self.calling -= usize::from(entry.operation),
            _ => {}
        }
    }

    /// When what has ended is written at the latest; the others of an operation's wave end at about the same
    /// time, and share its flush.
    pub(super) fn ripe_at(&self) -> Option<Duration> {
        let wait = match self {
            Tally { ended: FLUSH_COUNT.., .. } => Duration::ZERO,
            Tally { operations: 0, .. } => FLUSH_AFTER,
            Tally { calling: 0, .. } => Duration::ZERO,
            _ => WAVE_AFTER,
        };
        self.oldest.filter(|_| self.ended > 0).map(|at| at + wait)
    }
}

/// A leased batch.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) lease: LeaseRef,
    entries: Vec<Entry>,
    tally: Tally,
    pub(super) claimed_at: Duration,
    pub(super) next_part: i32,
    /// The flush under way, kept for trying again: its answer may get lost.
    pub(super) flight: Option<Arc<Settle>>,
    pub(super) again_at: Option<Duration>,
    pub(super) pause: Duration,
    pub(super) fenced: bool,
    /// A flush was refused: what is in it is settled one by one, to find the one that is.
    pub(super) one_by_one: bool,
}

impl Batch {
    pub(super) fn new(lease: LeaseRef, entries: Vec<Entry>, claimed_at: Duration) -> Batch {
        let mut batch = Batch {
            lease,
            entries,
            tally: Tally::default(),
            claimed_at,
            next_part: 0,
            flight: None,
            again_at: None,
            pause: FIRST_PAUSE,
            fenced: false,
            one_by_one: false,
        };
        batch.each(|_, _| {});
        batch
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub(super) fn tally(&self) -> Tally {
        self.tally
    }

    pub(super) fn is_over(&self) -> bool {
        self.tally.settled == self.entries.len()
    }

    /// Puts one where it stands now; where it stood before.
    pub(super) fn put(&mut self, index: usize, slot: Slot) -> Slot {
        let entry = &mut self.entries[index];
        self.tally.leave(entry);
        let before = std::mem::replace(&mut entry.slot, slot);
        self.tally.enter(entry);
        before
    }

    /// Goes over all of them; where they stand then is counted anew.
    pub(super) fn each(&mut self, mut place: impl FnMut(usize, &mut Entry)) {
        self.tally = Tally::default();
        for (index, entry) in self.entries.iter_mut().enumerate() {
            place(index, entry);
            self.tally.enter(entry);
        }
    }
}
