//! How long what has ended stays on record: pure, no clock and no I/O.

use std::time::Duration;

use crate::lifecycle::Kind;

/// The shortest time that can be kept: a lost answer to a commit is looked up in the record.
pub const MIN_KEEP: Duration = Duration::from_secs(3600);

const DAY: Duration = Duration::from_secs(86_400);
/// What counts as for ever, in milliseconds: a hundred years.
const FOREVER_MS: i64 = 36_525 * 86_400_000;

/// What one subscription says about its own deliveries; `None` leaves it to the settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Keep {
    /// How long one that succeeded stays.
    pub succeeded: Option<Duration>,
    /// How long one that is dead or cancelled stays.
    pub dead: Option<Duration>,
}

/// What the settings say. `Duration::MAX` is for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keeps {
    /// Deliveries that succeeded.
    pub succeeded: Duration,
    /// Deliveries that are dead or cancelled.
    pub dead: Duration,
    /// Deliveries of operations, however they ended, if that is longer.
    pub operations: Duration,
}

impl Default for Keeps {
    fn default() -> Self {
        Keeps { succeeded: 30 * DAY, dead: 90 * DAY, operations: 400 * DAY }
    }
}

impl Keeps {
    /// What holds for a subscription: its own word, else the settings'.
    pub fn filled_in(&self, kind: Kind, own: Keep) -> Keep {
        let least = if kind == Kind::Operation { self.operations } else { Duration::ZERO };
        Keep {
            succeeded: Some(own.succeeded.unwrap_or(self.succeeded.max(least))),
            dead: Some(own.dead.unwrap_or(self.dead.max(least))),
        }
    }
}

/// One batch of retention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// How long a message that nobody is subscribed to stays. `Duration::MAX` is for ever.
    pub keep_unrouted: Duration,
    /// About how many deliveries may go.
    pub most: u32,
    /// What has been removed goes into the audit now, not once an hour.
    pub tell: bool,
}

/// As the stores keep it.
pub(crate) fn millis(keep: Duration) -> i64 {
    i64::try_from(keep.as_millis()).unwrap_or(i64::MAX).min(FOREVER_MS)
}

/// What a subscription row stores: succeeded and dead, in milliseconds.
pub(crate) fn stored(kind: Kind, own: Keep) -> (i64, i64) {
    let keep = Keeps::default().filled_in(kind, own);
    (keep.succeeded.map_or(FOREVER_MS, millis), keep.dead.map_or(FOREVER_MS, millis))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subscriptions_own_word_counts_and_operations_are_kept_longer() {
        let keeps = Keeps { succeeded: DAY, dead: 500 * DAY, operations: 400 * DAY };
        let own = Keep { succeeded: Some(2 * DAY), dead: None };
        assert_eq!(keeps.filled_in(Kind::Plain, Keep::default()), Keep { succeeded: Some(DAY), dead: Some(500 * DAY) });
        assert_eq!(keeps.filled_in(Kind::Operation, Keep::default()).succeeded, Some(400 * DAY));
        assert_eq!(keeps.filled_in(Kind::Operation, Keep::default()).dead, Some(500 * DAY), "the longer of both");
        assert_eq!(keeps.filled_in(Kind::Operation, own).succeeded, Some(2 * DAY), "said at the subscription itself");
        assert_eq!(millis(Duration::MAX), FOREVER_MS);
    }
}
