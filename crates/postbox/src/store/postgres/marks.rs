//! Low-water marks: what lies below was claimed, so a claim does not walk over it again. What is dead
//! there stays in the index for as long as some old transaction might see it.
//!
//! A transaction that commits late can leave deliveries below a mark, and so can a claim that was rolled
//! back. Those a little below are found at once, because a claim begins [`SLACK`] places below its mark;
//! the others by a sweep from the start, every [`SWEEP`] or twenty times as long as the last one took,
//! and at least every [`SWEEP_MOST`].
//!
//! Large claims that run side by side leave a few behind, more than that below the mark: at the end of a
//! stretch that another claim was in. How far below is known, so once a later claim reaches the end, the
//! next one begins there: they may be the last.
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
    /// What large claims may have left behind since a claim looked there.
    behind: Option<Behind>,
    /// How many of those there were, ever.
    large: u64,
    /// Where the first of them began that have returned since the last look there began.
    recent: Option<i64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Behind {
    /// Nothing of it is before this place.
    after: i64,
    /// It may be all that is left.
    last: bool,
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
    pub(super) begins: Begins,
    /// A little below the mark.
    mark: i64,
    /// How many large claims there had been.
    large: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begins {
    /// A little below the mark.
    AtMark,
    /// Where large claims may have left something.
    Behind,
    AtStart,
}

impl Marks {
    /// Where the next claim of a subscription begins, for each level.
    pub(super) fn from(&self, subscription: SubscriptionId, now: Instant) -> [From; 3] {
        let unknown = From { after: START, begins: Begins::AtStart, mark: START, large: 0 };
        let Ok(mut marks) = self.0.lock() else { return [unknown; 3] };
        Priority::ALL.map(|level| marks.get_mut(&(subscription, level)).map_or(unknown, |mark| mark.from(now)))
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
        let new = Mark { place: START, swept: None, took: Duration::ZERO, behind: None, large: 0, recent: None };
        let mark = marks.entry(of).or_insert(new);
        let whole = much == Took::All || last.is_none();
        match last {
            // One that stopped early has not seen what comes after.
            Some(last) if !whole && from.is_thorough() => mark.place = last,
            Some(last) => mark.place = mark.place.max(last),
            None => {}
        }
        if from.begins == Begins::AtStart {
            (mark.swept, mark.took) = (Some(begun + took), took);
        }
        // Whether it has looked at all that others have left, up to where it stopped.
        let covers = mark.large == from.large && mark.behind.is_none_or(|behind| from.after <= behind.after);
        let left = match last {
            Some(_) if much == Took::FullOfStretches => Some(from.after),
            // Others, that began further on, go on from there.
            Some(last) if !whole && from.is_thorough() => Some(last),
            _ => None,
        };
        let before = mark.behind.is_some_and(|behind| behind.after < from.after);
        let known = match (covers, from.is_thorough()) {
            (true, _) if whole || left.is_some() => None,
            // It has not seen what those left that returned meanwhile; what was there before, it has.
            (false, true) if !before => mark.recent,
            _ => mark.behind.map(|behind| behind.after),
        };
        let was_last = mark.behind.is_some_and(|behind| behind.last);
        let last = left.is_none() && (whole || was_last);
        let after = [known, left].into_iter().flatten().min();
        mark.behind = after.map(|after| Behind { after, last });
        if much == Took::FullOfStretches {
            mark.large += 1;
            mark.recent = Some(mark.recent.map_or(from.after, |recent| recent.min(from.after)));
        }
    }
}

impl From {
    /// It sees what others have left below the mark.
    pub(super) fn is_thorough(self) -> bool {
        self.begins != Begins::AtMark
    }

    /// At the mark, whatever else is due.
    pub(super) fn at_mark(self) -> From {
        From { after: self.mark, begins: Begins::AtMark, ..self }
    }
}

impl Mark {
    fn from(&mut self, now: Instant) -> From {
        let mark = self.place.saturating_sub(SLACK);
        let (after, begins) = match self.behind {
            _ if self.is_due(now) => (START, Begins::AtStart),
            Some(Behind { after, last: true }) => (after.min(mark), Begins::Behind),
            _ => (mark, Begins::AtMark),
        };
        if begins != Begins::AtMark {
            self.recent = None;
        }
        From { after, begins, mark, large: self.large }
    }

    fn is_due(&self, now: Instant) -> bool {
        if planted!("no-sweep") && self.swept.is_some() {
            return false;
        }
        self.swept.is_none_or(|swept| sweep_is_due(swept, self.took, now))
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

    fn sweeps(from: From) -> bool {
        from.begins == Begins::AtStart
    }

    fn much(full: bool) -> Took {
        if full { Took::Full } else { Took::All }
    }

    #[test]
    fn a_claim_begins_a_little_below_what_was_claimed() {
        let (marks, now) = (Marks::default(), Instant::now());
        let first = from(&marks, 1, now);
        assert!(sweeps(first) && first.after == START, "nothing is known yet");
        found(&marks, first, Some(9_000), true, now, MS);
        assert_eq!((from(&marks, 1, now).after, from(&marks, 1, now).begins), (8_500, Begins::AtMark));
        assert!(sweeps(from(&marks, 2, now)), "another one has a mark of its own");
        found(&marks, from(&marks, 1, now), None, false, now, MS);
        assert_eq!(from(&marks, 1, now).after, 8_500, "nothing found, nothing learnt");
    }

    #[test]
    fn each_level_has_its_own() {
        let (marks, now) = (Marks::default(), Instant::now());
        found(&marks, from(&marks, 1, now), Some(9_000), true, now, MS);
        let [high, normal, low] = marks.from(1, now);
        assert!(high.after == START && sweeps(high), "what comes there is found, wherever the others are");
        assert!(low.after == START && sweeps(low) && normal.after == 8_500);
        // One that is full has found that there are no high ones.
        marks.found((1, Priority::High), high, None, Took::Full, now, MS);
        assert!(!sweeps(marks.from(1, now)[0]) && sweeps(marks.from(1, now)[2]));
        marks.found((1, Priority::Low), low, None, Took::All, now, MS);
        assert!(!sweeps(marks.from(1, now)[2]));
    }

    #[test]
    fn a_sweep_that_stops_early_takes_the_mark_back() {
        let (marks, now) = (Marks::default(), Instant::now());
        found(&marks, from(&marks, 1, now), Some(9_000), true, now, MS);
        let later = now + SWEEP + MS;
        let sweep = from(&marks, 1, later);
        assert!(sweeps(sweep) && sweep.at_mark().after == 8_500 && !sweep.at_mark().is_thorough());
        // A late commit left many below: the next claim goes on behind the last that was taken.
        found(&marks, sweep, Some(700), true, later, MS);
        assert_eq!(from(&marks, 1, later).after, 200);
        found(&marks, from(&marks, 1, later), Some(800), false, later, MS);
        assert_eq!(from(&marks, 1, later).after, 300);
    }

    #[test]
    fn sweeps_come_more_seldom_when_they_take_long_but_do_come() {
        let (marks, now) = (Marks::default(), Instant::now());
        let sweeps = |now| sweeps(from(&marks, 1, now));
        found(&marks, from(&marks, 1, now), Some(9_000), false, now, 100 * MS);
        let done = now + 100 * MS;
        assert!(!sweeps(done + 1_999 * MS));
        assert!(sweeps(done + 2_000 * MS));
        found(&marks, from(&marks, 1, done + 2_000 * MS), None, false, done, Duration::from_secs(100));
        let done = done + Duration::from_secs(100);
        assert!(!sweeps(done + SWEEP_MOST - MS) && sweeps(done + SWEEP_MOST));
    }

    #[test]
    fn what_claims_side_by_side_have_left_is_looked_for_when_the_end_is_reached() {
        let (marks, now) = (Marks::default(), Instant::now());
        let next = || from(&marks, 1, now);
        let take = |from, last, much| marks.found((1, Priority::Normal), from, last, much, now, MS);
        take(next(), Some(20_000), Took::Full);
        let first = next();
        take(first, Some(22_000), Took::FullOfStretches);
        let second = next();
        take(second, Some(24_000), Took::FullOfStretches);
        assert_eq!((next().after, next().begins), (23_500, Begins::AtMark), "there is enough ahead");
        take(next(), Some(24_100), Took::All);
        let look = next();
        assert_eq!((look.after, look.begins), (first.after, Begins::Behind), "from where the first of them began");
        take(look, Some(20_700), Took::All);
        assert_eq!((next().after, next().begins), (23_600, Begins::AtMark), "nothing is left behind");
        take(next(), None, Took::All);
        assert_eq!(next().begins, Begins::AtMark, "it was looked for once");
    }

    #[test]
    fn what_a_look_behind_has_not_come_to_is_not_forgotten() {
        let (marks, now) = (Marks::default(), Instant::now());
        let next = || from(&marks, 1, now);
        let take = |from, last, much| marks.found((1, Priority::Normal), from, last, much, now, MS);
        take(next(), Some(20_000), Took::Full);
        take(next(), Some(24_000), Took::FullOfStretches);
        let beside = next();
        take(next(), None, Took::All);
        take(next(), Some(20_500), Took::Full);
        take(beside, Some(25_000), Took::All);
        assert_eq!((next().after, next().begins), (20_500, Begins::Behind), "the other one had begun above it");
        take(next(), Some(25_100), Took::All);
        assert_eq!((next().after, next().begins), (24_600, Begins::AtMark));
        // The same after a sweep.
        let later = now + SWEEP + MS;
        take(from(&marks, 1, later), Some(700), Took::Full);
        take(next(), Some(900), Took::Full);
        take(next(), Some(950), Took::All);
        assert_eq!((next().after, next().begins), (450, Begins::AtMark), "it went through all that was left");
    }

    #[test]
    fn two_looks_at_once_forget_nothing() {
        let (marks, now) = (Marks::default(), Instant::now());
        let next = |now| from(&marks, 1, now);
        let take = |from, last, much| marks.found((1, Priority::Normal), from, last, much, now, MS);
        take(next(now), Some(20_000), Took::Full);
        take(next(now), Some(24_000), Took::FullOfStretches);
        take(next(now), None, Took::All);
        let (look, sweep) = (next(now), next(now + SWEEP + MS));
        assert!(look.begins == Begins::Behind && sweeps(sweep));
        take(sweep, Some(700), Took::Full);
        take(look, None, Took::All);
        assert_eq!((next(now).after, next(now).begins), (200, Begins::Behind), "the sweep has come to 700 only");
    }

    #[test]
    fn a_look_behind_goes_back_no_further_than_it_has_to() {
        let (marks, now) = (Marks::default(), Instant::now());
        let next = |now| from(&marks, 1, now);
        let take = |from, last, much| marks.found((1, Priority::Normal), from, last, much, now, MS);
        take(next(now), Some(20_000), Took::Full);
        take(next(now), Some(24_000), Took::FullOfStretches);
        take(next(now), Some(90_000), Took::FullOfStretches);
        let (beside, sweep) = (next(now), next(now + SWEEP + MS));
        take(beside, Some(92_000), Took::FullOfStretches);
        take(sweep, Some(89_000), Took::Full);
        assert_eq!((next(now).after, next(now).begins), (88_500, Begins::AtMark));
        take(next(now), Some(92_500), Took::All);
        assert_eq!((next(now).after, next(now).begins), (92_000, Begins::AtMark), "not once more from 19,500");
    }

    #[test]
    fn a_look_behind_does_not_hide_what_others_leave_meanwhile() {
        let (marks, now) = (Marks::default(), Instant::now());
        let next = || from(&marks, 1, now);
        let take = |from, last, much| marks.found((1, Priority::Normal), from, last, much, now, MS);
        take(next(), Some(20_000), Took::Full);
        take(next(), Some(22_000), Took::FullOfStretches);
        let beside = next();
        take(next(), None, Took::All);
        let look = next();
        take(beside, Some(23_000), Took::FullOfStretches);
        assert_eq!(next().begins, Begins::AtMark, "more has come");
        take(look, None, Took::All);
        assert_eq!((next().after, next().begins), (21_500, Begins::Behind), "what was before that, it has seen");
        // One that stopped early: what it has not seen is ahead again.
        take(next(), Some(21_700), Took::Full);
        assert_eq!((next().after, next().begins), (21_200, Begins::AtMark));
        take(next(), None, Took::All);
        assert_eq!((next().after, next().begins), (21_200, Begins::AtMark), "it went through that");
    }
}
