//! Moving what is due from scheduled to ready.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::{PgStore, Work};
use crate::error::Error;

/// How many deliveries are moved at once; as in `promote.sql`.
const MOST: u64 = 1000;
/// Between two looks from the start. Those in between see what came due in the last [`RECENT`], and do not
/// walk over what was moved before and is still in the index.
const SWEEP: Duration = Duration::from_secs(1);
const SWEEP_SHARE: u32 = 20;
const SWEEP_MOST: Duration = Duration::from_secs(30);
const RECENT: Duration = Duration::from_secs(5);

/// When this process looked from the start, and how long that took.
#[derive(Debug, Default)]
pub(super) struct Promoted(Mutex<Option<(Instant, Duration)>>);

impl Promoted {
    fn is_due(&self, now: Instant) -> bool {
        let Ok(swept) = self.0.lock() else { return true };
        swept.is_none_or(|(at, took)| {
            now.saturating_duration_since(at) >= took.saturating_mul(SWEEP_SHARE).clamp(SWEEP, SWEEP_MOST)
        })
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
    let sweeps = store.promoted.is_due(begun);
    let recent = if sweeps { None } else { Some(super::millis(RECENT)) };
    let moved = store.query(store.sql.promote).bind(recent).execute(work.on()).await?.rows_affected();
    if moved >= MOST {
        store.promoted.again();
    } else if sweeps && let Ok(mut swept) = store.promoted.0.lock() {
        *swept = Some((Instant::now(), begun.elapsed()));
    }
    Ok(())
}
