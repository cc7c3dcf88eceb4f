//! How a relay stands: its subscription's counts, and what its sink has confirmed.

use crate::admin::{SinkRow, SubscriptionRow};

/// What is stored of a relay beside its subscription.
pub(crate) struct Relayed {
    pub(crate) application: String,
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) target: String,
    pub(crate) sent: i64,
    pub(crate) retried: i64,
    pub(crate) blocked_keys: i64,
}

/// The rows of relays, in the order of the subscriptions.
pub(crate) fn rows(subscriptions: &[SubscriptionRow], relayed: Vec<Relayed>) -> Vec<SinkRow> {
    let row = |subscription: &SubscriptionRow| {
        let found = relayed.iter().find(|r| r.name == subscription.name && r.application == subscription.application);
        let relay = found.filter(|_| subscription.removed_at.is_none())?;
        let state = match (subscription.paused_at, subscription.workers) {
            (Some(_), _) => "paused",
            (None, 0) => "stopped",
            _ => "sending",
        };
        Some(SinkRow {
            application: relay.application.clone(),
            name: relay.name.clone(),
            kind: relay.kind.clone(),
            target: relay.target.clone(),
            state: state.into(),
            lag: subscription.pending + subscription.scheduled + subscription.running,
            oldest_age_s: subscription.oldest_age_s,
            sent: relay.sent,
            retried: relay.retried,
            dead: subscription.dead,
            blocked_keys: relay.blocked_keys,
        })
    };
    subscriptions.iter().filter_map(row).collect()
}
