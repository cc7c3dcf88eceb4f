//! A worker that is registered and driven by hand: each verb when the test says so.

use std::time::Duration;

use postbox::lifecycle::{End, Event, Kind, Policy, Standing, State, transition};
use postbox::store::{
    ClaimRequest, Claimed, Declared, Guarded, Item, LeaseRef, Move, OutcomeRecord, Registration, Settle, Start, Store,
    SubscriptionId, Success,
};
use postbox::{Envelope, Keep, Limits, Postbox, RetryPolicy};
use uuid::Uuid;

use crate::{Fresh, Testable};

/// A registered worker.
pub struct Hand<Db: Testable> {
    /// A postbox of its own: it can die by itself.
    pub postbox: Postbox<Db>,
    /// Who it is.
    pub worker: Uuid,
    /// What it stands behind, in the order in which it was declared.
    pub subscriptions: Vec<SubscriptionId>,
    /// Those of them that deliver by key.
    pub by_key: Vec<SubscriptionId>,
}

/// A subscription with nothing special about it.
pub fn declared(name: &str, pattern: &str, kind: Kind) -> Declared {
    Declared {
        name: name.into(),
        renamed_from: Vec::new(),
        pattern: pattern.parse().expect("a pattern"),
        policy: policy(kind),
        timeout: Duration::from_secs(60),
        quiet: Duration::from_secs(60),
        reconciles: kind == Kind::Operation,
        continues: false,
        start: Start::Unrouted,
        keep: Keep::default(),
        limits: Limits::default(),
        keys: None,
        unique: None,
    }
}

fn policy(kind: Kind) -> Policy {
    Policy { kind, retry: RetryPolicy::default(), idempotent: false }
}

/// A new worker of the application that tests belong to, alive for a minute.
pub fn registration(subscriptions: Vec<Declared>) -> Registration {
    Registration {
        worker: Uuid::now_v7(),
        name: "hand".into(),
        application: "test".into(),
        lease: Duration::from_secs(60),
        subscriptions,
    }
}

impl<Db: Testable> Hand<Db> {
    /// Registers, and hands out the history there is.
    pub async fn register(fresh: &Fresh<Db>, subscriptions: Vec<Declared>) -> Self {
        let hand = Hand::registered(fresh, &registration(subscriptions)).await;
        hand.backfill().await;
        hand
    }

    /// Registers, and nothing else.
    pub async fn registered(fresh: &Fresh<Db>, registration: &Registration) -> Self {
        let postbox: Postbox<Db> = Postbox::open(fresh.settings.clone()).await.expect("a second postbox");
        let subscriptions = postbox.store().register(registration).await.expect("register");
        let declared = registration.subscriptions.iter().zip(&subscriptions);
        let by_key = declared.filter(|(declared, _)| declared.keys.is_some()).map(|(_, id)| *id).collect();
        Hand { postbox, worker: registration.worker, subscriptions, by_key }
    }

    /// Its verbs.
    pub fn store(&self) -> &Db::Store {
        self.postbox.store()
    }

    /// Hands out history until there is none.
    pub async fn backfill(&self) {
        while self.store().backfill().await.expect("backfill") {}
    }

    /// Leases up to so many of each of its subscriptions.
    pub async fn claim(&self, room: u32) -> Claimed {
        self.claim_of(&self.subscriptions, room).await
    }

    /// Leases up to so many of each of these.
    pub async fn claim_of(&self, subscriptions: &[SubscriptionId], room: u32) -> Claimed {
        let request = ClaimRequest {
            worker: self.worker,
            token: Uuid::now_v7(),
            wanted: subscriptions.iter().map(|id| (*id, room)).collect(),
            metered: Vec::new(),
            by_key: self.by_key.clone(),
            full: Vec::new(),
            sorts: true,
        };
        self.store().claim(&request).await.expect("claim")
    }

    /// Its lease on a batch.
    pub fn lease(&self, claimed: &Claimed) -> LeaseRef {
        LeaseRef { worker: self.worker, batch: claimed.batch, token: claimed.token }
    }

    /// A flush with nothing in it.
    pub fn flush(&self, claimed: &Claimed, part: i32) -> Settle {
        Settle {
            lease: self.lease(claimed),
            part,
            successes: Vec::new(),
            moves: Vec::new(),
            released: Vec::new(),
            seen: Vec::new(),
            follow_ups: Vec::new(),
            starts: Vec::new(),
            close: false,
        }
    }

    /// Puts the starts of these on record.
    pub async fn begin(&self, claimed: &Claimed, part: i32, items: &[&Item]) {
        let starts = items.iter().map(|i| (i.delivery, i.attempts + 1)).collect();
        let settle = Settle { starts, ..self.flush(claimed, part) };
        assert_eq!(self.settle(settle).await, Guarded::Done);
    }

    /// Writes a flush.
    pub async fn settle(&self, settle: Settle) -> Guarded {
        self.store().settle(&settle).await.expect("settle")
    }

    /// Dies, and is taken over by somebody else: how many are pending, in doubt and dead now.
    pub async fn dies(self, fresh: &Fresh<Db>) -> (usize, usize, usize) {
        let worker = self.worker;
        Db::kill(fresh, self.postbox, worker).await;
        let taken = fresh.postbox.store().take_over(0.0).await.expect("take over").expect("somebody dead");
        assert_eq!(taken.worker, worker);
        (taken.pending, taken.in_doubt, taken.dead)
    }
}

/// Publishes so many messages in a transaction of their own: their ids.
pub async fn publish<Db: Testable>(fresh: &Fresh<Db>, topic: &str, count: usize) -> Vec<Uuid> {
    let drafts = (0..count).map(|n| Envelope::json(topic, &serde_json::json!({ "n": n })));
    let published = fresh.postbox.publish_now(drafts).await.expect("publish");
    published.iter().map(|p| p.id).collect()
}

/// A success, in the compact way.
pub fn success(item: &Item) -> Success {
    Success {
        delivery: item.delivery,
        message: item.message,
        subscription: item.subscription,
        ran: Duration::from_millis(1),
    }
}

/// An attempt's end, with an outcome row of its own; `begun`: its start is on record.
pub fn ended(item: &Item, kind: Kind, end: End, begun: bool) -> Move {
    let number = item.attempts + 1;
    let attempts = if begun { number } else { item.attempts };
    let standing = Standing { state: State::Running, attempts, begun, lost: item.lost };
    let next = transition(standing, Event::Ended(end), &policy(kind), 0.0).expect("allowed");
    Move {
        delivery: item.delivery,
        message: item.message,
        subscription: item.subscription,
        priority: item.priority,
        rev: item.rev + 1,
        standing: next.standing,
        delay: next.delay,
        quiet: Duration::ZERO,
        note: "as the test says".into(),
        outcome: Some(OutcomeRecord {
            number,
            kind: end.as_str(),
            error: Some("as the test says".into()),
            receipt: Some(serde_json::json!({ "id": 1 })),
            ran: Duration::from_millis(3),
            ago: Duration::ZERO,
        }),
        leads: next.standing.state != State::Succeeded || item.leads,
    }
}
