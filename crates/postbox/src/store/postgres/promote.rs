//! Moving what is due from scheduled to ready.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::marks::sweep_is_due;
use super::{PgStore, Work};
use crate::error::Error;

/// How many deliveries are moved at once; as in `promote.sql`.
const MOST: u64 = 1000;
/// Looks from the start come as seldom as a claim's sweeps. Those in between see what came due in this time,
/// and do not walk over what was moved before and is still in the index.
const RECENT: Duration = Duration::from_secs(5);

/// When this process looked from the start, and how long that took.
#[derive(Debug, Default)]
pub(super) struct Promoted(Mutex<Option<(Instant, Duration)>>);

impl Promoted {
    fn is_due(&self, now: Instant) -> bool {
        let Ok(swept) = self.0.lock() else { return true };
        swept.is_none_or(|(at, took)| sweep_is_due(at, took, now))
    }

    /// How far back this look has to go, in milliseconds; `None`: to the start.
    pub(super) fn recent(&self, now: Instant) -> Option<i64> {
        if self.is_due(now) { None } else { Some(super::millis(RECENT)) }
    }

    /// A look went back to the start, and left nothing behind.
    pub(super) fn swept(&self, begun: Instant, took: Duration) {
        if let Ok(mut swept) = self.0.lock() {
            *swept = Some((begun + took, took));
        }
    }

    /// Something may be left behind: the next look is from the start.
    fn again(&self) {
        if let Ok(mut swept) = self.0.lock() {
            *swept = None;
        }
    }
}

/// Moves up to a thousand.
pub(super) async fn promote(store: &PgStore, work: &mut Work) -> Result<(), Error> {
    let begun = Instant::now();
    let recent = store.promoted.recent(begun);
    let moved = store.query(store.sql.promote).bind(recent).execute(work.on()).await?.rows_affected();
    if moved >= MOST {
        store.promoted.again();
    } else if recent.is_none() {
        store.promoted.swept(begun, begun.elapsed());
    }
    Ok(())
}
