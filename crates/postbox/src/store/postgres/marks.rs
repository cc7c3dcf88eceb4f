//! Low-water marks: what lies below was claimed, so a claim does not walk over it again. What is dead
//! there stays in the index for as long as some old transaction might see it.
//!
//! A transaction that commits late can leave deliveries below a mark, and so can a claim that was rolled
//! back. Those a little below are found at once, because a claim begins [`SLACK`] places below its mark;
//! the others by a sweep from the start, every [`SWEEP`] or twenty times as long as the last one took,
//! and at least every [`SWEEP_MOST`].
//!
//! Large claims that run side by side leave a few behind, more than that below the mark: at the end of a stretch that
//! another claim was in. Where such a claim has taken all it might, and a later one reaches the end, the next sweep
//! comes sooner: they may be the last.
//!
//! Each level of priority has a mark of its own: a high one that comes while low ones are being claimed is
//! above the mark of its level, and found by the next claim.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::planted::planted;
use crate::priority::Priority;
use crate::store::SubscriptionId;

/// How far below its mark a claim begins.
const SLACK: i64 = 500;
/// The least time between two sweeps, how many times as long as a sweep the pause is, and the most time.
const SWEEP: Duration = Duration::from_secs(1);
const SWEEP_SHARE: u32 = 20;
const SWEEP_MOST: Duration = Duration::from_secs(30);
/// The same when the last deliveries may be among those left behind: that comes once after a backlog.
const LAST_SHARE: u32 = 5;

/// Before all places.
const START: i64 = i64::MIN;

/// One for each subscription and level, for all who claim in this process.
#[derive(Debug, Default)]
pub(super) struct Marks(Mutex<HashMap<(SubscriptionId, Priority), Mark>>);

#[derive(Debug)]
struct Mark {
    /// The last that was claimed, with nothing left before it that could be seen.
    place: i64,
    swept: Option<Instant>,
    /// How long the last sweep took.
    took: Duration,
    /// What claims since then have left behind.
    behind: Behind,
}

/// Whether deliveries may have been passed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Behind {
    Nothing,
    /// Perhaps, but there is enough ahead.
    Some,
    /// Perhaps, and they are what is left.
    Last,
}

/// How much of a level a claim has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Took {
    /// All that there was from where it began, as far as it could see.
    All,
    /// As much as it might.
    Full,
    /// The same, from stretches that no other claim was in.
    FullOfStretches,
}

/// Where a claim begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct From {
    /// It takes what comes after this.
    pub(super) after: i64,
    /// The same, if it did not begin at the start.
    pub(super) mark: i64,
    /// It begins at the start.
    pub(super) sweeps: bool,
}

impl Marks {
    /// Where the next claim of a subscription begins, for each level.
    pub(super) fn from(&self, subscription: SubscriptionId, now: Instant) -> [From; 3] {
        let unknown = From { after: START, mark: START, sweeps: true };
        let Ok(marks) = self.0.lock() else { return [unknown; 3] };
        Priority::ALL.map(|level| match marks.get(&(subscription, level)) {
            Some(mark) => {
                let (below, sweeps) = (mark.place.saturating_sub(SLACK), mark.is_due(now));
                From { after: if sweeps { START } else { below }, mark: below, sweeps }
            }
            None => unknown,
        })
    }

    /// What a claim found of a level that it looked at from there: the last place it took, and how much it took of the
    /// subscription.
    pub(super) fn found(
        &self,
        of: (SubscriptionId, Priority),
        from: From,
        last: Option<i64>,
        much: Took,
        begun: Instant,
        took: Duration,
    ) {
        let Ok(mut marks) = self.0.lock() else { return };
        let new = Mark { place: START, swept: None, took: Duration::ZERO, behind: Behind::Nothing };
        let mark = marks.entry(of).or_insert(new);
        match last {
            // A sweep that stopped early has not seen what comes after.
            Some(last) if much != Took::All && from.sweeps => mark.place = last,
            Some(last) => mark.place = mark.place.max(last),
            None => {}
        }
        if from.sweeps {
            (mark.swept, mark.took, mark.behind) = (Some(begun + took), took, Behind::Nothing);
        } else {
            mark.behind = match (mark.behind, much) {
                (_, Took::FullOfStretches) => Behind::Some,
                (Behind::Some | Behind::Last, Took::All) => Behind::Last,
                (behind, _) => behind,
            };
        }
    }
}

impl From {
    /// Without beginning at the start, whenever that is due.
    pub(super) fn unswept(self) -> From {
        From { after: self.mark, sweeps: false, ..self }
    }
}

impl Mark {
    fn is_due(&self, now: Instant) -> bool {
        if planted!("no-sweep") && self.swept.is_some() {
            return false;
        }
        let Some(swept) = self.swept else { return true };
        match self.behind {
            Behind::Last => {
                now.saturating_duration_since(swept) >= self.took.saturating_mul(LAST_SHARE).min(SWEEP_MOST)
            }
            Behind::Nothing | Behind::Some => sweep_is_due(swept, self.took, now),
        }
    }
}

/// Whether it is time to begin at the start again, after a sweep that ended then and took so long.
pub(super) fn sweep_is_due(swept: Instant, took: Duration, now: Instant) -> bool {
    now.saturating_duration_since(swept) >= took.saturating_mul(SWEEP_SHARE).clamp(SWEEP, SWEEP_MOST)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn from(marks: &Marks, subscription: SubscriptionId, now: Instant) -> From {
        marks.from(subscription, now)[1]
    }

    fn found(marks: &Marks, from: From, last: Option<i64>, full: bool, begun: Instant, took: Duration) {
        marks.found((1, Priority::Normal), from, last, much(full), begun, took);
    }

    fn much(full: bool) -> Took {
        if full { Took::Full } else { Took::All }
    }

    #[test]
    fn a_claim_begins_a_little_below_what_was_claimed() {
        let (marks, now) = (Marks::default(), Instant::now());
        let first = from(&marks, 1, now);
        assert!(first.sweeps && first.after == START, "nothing is known yet");
        found(&marks, first, Some(9_000), true, now, MS);
        assert_eq!(from(&marks, 1, now), From { after: 8_500, mark: 8_500, sweeps: false });
        assert!(from(&marks, 2, now).sweeps, "another one has a mark of its own");
        found(&marks, from(&marks, 1, now), None, false, now, MS);
        assert_eq!(from(&marks, 1, now).after, 8_500, "nothing found, nothing learnt");
    }

    #[test]
    fn each_level_has_its_own() {
        let (marks, now) = (Marks::default(), Instant::now());
        found(&marks, from(&marks, 1, now), Some(9_000), true, now, MS);
        let [high, normal, low] = marks.from(1, now);
        assert!(high.after == START && high.sweeps, "what comes there is found, wherever the others are");
        assert!(low.after == START && low.sweeps && normal.after == 8_500);
        // One that is full has found that there are no high ones.
        marks.found((1, Priority::High), high, None, Took::Full, now, MS);
        assert!(!marks.from(1, now)[0].sweeps && marks.from(1, now)[2].sweeps);
        marks.found((1, Priority::Low), low, None, Took::All, now, MS);
        assert!(!marks.from(1, now)[2].sweeps);
    }

    #[test]
    fn a_sweep_that_stops_early_takes_the_mark_back() {
        let (marks, now) = (Marks::default(), Instant::now());
        found(&marks, from(&marks, 1, now), Some(9_000), true, now, MS);
        let later = now + SWEEP + MS;
        let sweep = from(&marks, 1, later);
        assert!(sweep.sweeps && sweep.unswept() == From { after: 8_500, mark: 8_500, sweeps: false });
        // A late commit left many below: the next claim goes on behind the last that was taken.
        found(&marks, sweep, Some(700), true, later, MS);
        assert_eq!(from(&marks, 1, later).after, 200);
        found(&marks, from(&marks, 1, later), Some(800), false, later, MS);
        assert_eq!(from(&marks, 1, later).after, 300);
    }

    #[test]
    fn sweeps_come_more_seldom_when_they_take_long_but_do_come() {
        let (marks, now) = (Marks::default(), Instant::now());
        found(&marks, from(&marks, 1, now), Some(9_000), false, now, 100 * MS);
        let done = now + 100 * MS;
        assert!(!from(&marks, 1, done + 1_999 * MS).sweeps);
        assert!(from(&marks, 1, done + 2_000 * MS).sweeps);
        found(&marks, from(&marks, 1, done + 2_000 * MS), None, false, done, Duration::from_secs(100));
        let done = done + Duration::from_secs(100);
        assert!(!from(&marks, 1, done + SWEEP_MOST - MS).sweeps && from(&marks, 1, done + SWEEP_MOST).sweeps);
    }

    #[test]
    fn what_claims_side_by_side_have_left_is_swept_when_the_end_is_reached() {
        let (marks, now) = (Marks::default(), Instant::now());
        let take = |last, much| marks.found((1, Priority::Normal), from(&marks, 1, now), last, much, now, MS);
        take(Some(500), Took::Full);
        let soon = now + MS + MS * LAST_SHARE;
        take(Some(1_011), Took::FullOfStretches);
        assert!(!from(&marks, 1, soon).sweeps, "there is enough ahead");
        take(Some(1_100), Took::All);
        assert!(!from(&marks, 1, soon - MS).sweeps, "not at once");
        assert!(from(&marks, 1, soon).sweeps);
        take(Some(1_611), Took::FullOfStretches);
        assert!(!from(&marks, 1, soon).sweeps, "more has come");
        take(None, Took::All);
        let sweep = from(&marks, 1, soon);
        assert!(sweep.sweeps, "nothing more was found");
        marks.found((1, Priority::Normal), sweep, Some(511), Took::All, soon, MS);
        let later = soon + MS + MS * LAST_SHARE;
        marks.found((1, Priority::Normal), from(&marks, 1, later), None, Took::All, later, MS);
        assert!(!from(&marks, 1, later).sweeps, "nothing is left behind");
        assert!(from(&marks, 1, soon + MS + SWEEP).sweeps);
    }
}
