//! Which subscriptions of a process take one delivery of a key at a time.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};

use super::{Declared, DeliveryId, Settle, SubscriptionId};
use crate::lifecycle::State;

/// What a process knows of them. It may be wrong: who has a key is decided by what the deliveries are. This says
/// only whose keys are let go at once when they end, so that nobody need look for them later.
#[derive(Debug, Default)]
pub(crate) struct Uniques {
    /// Those that it has declared.
    own: Mutex<HashSet<SubscriptionId>>,
    /// How far it has looked through what has keys: a delivery's number.
    tidied: AtomicI64,
}

impl Uniques {
    /// How many rows are looked at in one page, and how many pages in one go.
    pub(crate) const PAGE: u16 = 200;
    pub(crate) const PAGES: usize = 20;

    /// Takes note of what was declared, and committed.
    pub(crate) fn declared(&self, subscriptions: &[Declared], ids: &[SubscriptionId]) {
        let Ok(mut own) = self.own.lock() else { return };
        for (declared, id) in subscriptions.iter().zip(ids) {
            match declared.unique {
                Some(_) => own.insert(*id),
                None => own.remove(id),
            };
        }
    }

    /// Whether it is one.
    pub(crate) fn has(&self, subscription: SubscriptionId) -> bool {
        self.own.lock().is_ok_and(|own| own.contains(&subscription))
    }

    /// Deliveries of such subscriptions that a flush ends.
    pub(crate) fn ended(&self, settle: &Settle) -> Vec<DeliveryId> {
        let Ok(own) = self.own.lock() else { return Vec::new() };
        if own.is_empty() {
            return Vec::new();
        }
        let over = |state| matches!(state, State::Succeeded | State::Dead | State::Cancelled);
        let successes = settle.successes.iter().map(|s| (s.subscription, s.delivery));
        let moves = settle.moves.iter().filter(|m| over(m.standing.state)).map(|m| (m.subscription, m.delivery));
        successes.chain(moves).filter(|(subscription, _)| own.contains(subscription)).map(|(_, d)| d).collect()
    }

    /// Above which delivery the next look begins.
    pub(crate) fn tidied(&self) -> DeliveryId {
        self.tidied.load(Ordering::Relaxed)
    }

    /// The last one that was looked at; `None`: that was the end, and the next look begins at the start.
    pub(crate) fn tidied_to(&self, last: Option<DeliveryId>) {
        self.tidied.store(last.unwrap_or(0), Ordering::Relaxed);
    }
}
