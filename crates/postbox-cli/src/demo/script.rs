//! What goes wrong in the shop, and with which order: a script, so that every run shows the same.

use std::time::Duration;

/// How long the shop waits for the provider.
pub(super) const PATIENCE: Duration = Duration::from_millis(400);
/// How long the provider keeps silent when it does not answer in time.
pub(super) const SILENCE: Duration = Duration::from_millis(1500);
/// Between two orders.
pub(super) const PACE: Duration = Duration::from_millis(250);
/// With these, everything has gone wrong once.
pub(super) const WHOLE_STORY: i64 = 7;

/// What the provider does with an order's charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Charging {
    /// Charges and answers.
    Smooth,
    /// Charges, and does not answer in time; tells when it is asked later.
    Silent,
    /// Charges, does not answer in time, and cannot tell later.
    Forgotten,
    /// Is overloaded at the first try, and charges nothing.
    Overloaded,
    /// Refuses the card.
    Declined,
}

/// What happens to an order's mail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mailing {
    /// Goes out.
    Smooth,
    /// The mail server hangs up twice.
    Shaky,
    /// There is no such address.
    Nowhere,
}

pub(super) fn charging(order: i64) -> Charging {
    match order {
        // Only one, so that the visitor has one thing to settle.
        4 => Charging::Forgotten,
        n if n % 10 == 3 => Charging::Silent,
        n if n % 10 == 5 => Charging::Overloaded,
        n if n % 20 == 7 => Charging::Declined,
        _ => Charging::Smooth,
    }
}

pub(super) fn mailing(order: i64) -> Mailing {
    match order {
        n if n % 20 == 2 => Mailing::Nowhere,
        n if n % 10 == 6 => Mailing::Shaky,
        _ => Mailing::Smooth,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_goes_wrong_within_the_whole_story() {
        let orders = || 1..=WHOLE_STORY;
        for fate in [Charging::Silent, Charging::Forgotten, Charging::Overloaded, Charging::Declined] {
            assert!(orders().any(|n| charging(n) == fate), "{fate:?}");
        }
        for fate in [Mailing::Nowhere, Mailing::Shaky] {
            assert!(orders().any(|n| mailing(n) == fate), "{fate:?}");
        }
        assert_eq!((1..100_000).filter(|n| charging(*n) == Charging::Forgotten).count(), 1);
    }
}
