//! Tokens that a claim has taken, of subscriptions with a rate.

use std::collections::HashMap;
use std::time::Duration;

use super::SubscriptionId;
use crate::planted::planted;

/// What a claim has taken, and of which subscriptions there was less than it wanted.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    tokens: HashMap<SubscriptionId, u32>,
    /// With how long it takes until there is another one.
    pub(crate) dry: Vec<(SubscriptionId, Duration)>,
}

impl Taken {
    /// Of so many that were wanted, the bucket had these.
    pub(crate) fn took(&mut self, subscription: SubscriptionId, wanted: u32, got: u32, next: Duration) {
        if got < wanted {
            self.dry.push((subscription, next));
        }
        self.tokens.insert(subscription, got);
    }

    /// How many may be claimed of a subscription of which so many are wanted.
    pub(crate) fn room(&self, subscription: SubscriptionId, wanted: u32) -> u32 {
        match self.tokens.get(&subscription) {
            Some(tokens) if !planted!("rate-not-kept") => wanted.min(*tokens),
            _ => wanted,
        }
    }

    /// What was not used, and goes back.
    pub(crate) fn left(&self, used: impl Fn(SubscriptionId) -> u32) -> impl Iterator<Item = (SubscriptionId, u32)> {
        let left = move |(id, tokens): (&SubscriptionId, &u32)| (*id, tokens.saturating_sub(used(*id)));
        self.tokens.iter().map(left).filter(|(_, left)| *left > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_used_is_left() {
        let mut taken = Taken::default();
        taken.took(1, 8, 3, Duration::from_millis(5));
        taken.took(2, 4, 4, Duration::ZERO);
        assert_eq!((taken.room(1, 8), taken.room(1, 2), taken.room(3, 9)), (3, 2, 9), "the third has no rate");
        assert_eq!(taken.dry, [(1, Duration::from_millis(5))]);
        let used = |id| if id == 1 { 1 } else { 4 };
        assert_eq!(taken.left(used).collect::<Vec<_>>(), [(1, 2)]);
    }
}
