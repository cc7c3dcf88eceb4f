//! Every verb on real files, each in a folder of its own.

use std::time::Duration;

use sqlx::{Connection, SqliteConnection};
use uuid::Uuid;

use super::SqliteStore;
use crate::lifecycle::{Kind, Policy, Standing, State};
use crate::limits::Limits;
use crate::message::{Draft, Envelope};
use crate::retention::Keep;
use crate::retry::RetryPolicy;
use crate::settings::Settings;
use crate::store::{
    ClaimRequest, Claimed, Declared, Item, LeaseRef, Move, OutcomeRecord, Registration, Settle, Start, Store, Stored,
    SubscriptionId,
};

mod backfilling;
mod doubting;
mod migrating;
mod operating;
mod publishing;
mod registering;
mod succeeding;
mod working;

/// A store on a file of its own.
struct Shop {
    store: SqliteStore,
    folder: tempfile::TempDir,
}

impl Shop {
    async fn new() -> Shop {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path()).await;
        Shop { store, folder }
    }

    /// Another process, as far as locks and files go.
    async fn other(&self) -> SqliteStore {
        open(self.folder.path()).await
    }

    /// A user's own connection.
    async fn connection(&self) -> SqliteConnection {
        let url = format!("sqlite:{}", self.folder.path().join("shop.db").display());
        SqliteConnection::connect(&url).await.expect("connects")
    }

    async fn publish(&self, drafts: &[Draft]) -> Vec<Stored> {
        let mut connection = self.connection().await;
        SqliteStore::publish(&mut connection, &self.store, drafts).await.expect("publishes")
    }

    async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.store.reader).await.expect(sql)
    }

    async fn register(&self, subscriptions: Vec<Declared>) -> (Uuid, Vec<SubscriptionId>) {
        register(&self.store, subscriptions).await
    }

    /// Registers one subscription, publishes so many messages and claims them.
    async fn claimed(&self, declared: Declared, messages: usize) -> (Claimed, LeaseRef) {
        let (worker, ids) = self.register(vec![declared]).await;
        let drafts: Vec<Draft> = (0..messages).map(|n| draft("orders.placed", n)).collect();
        self.publish(&drafts).await;
        claim(&self.store, worker, ids[0], messages as u32).await
    }

    /// Time travel and other mischief.
    async fn run(&self, sql: &'static str) {
        sqlx::raw_sql(sql).execute(&mut self.connection().await).await.expect(sql);
    }

    async fn state(&self, delivery: i64) -> State {
        self.store.show(delivery).await.expect("shows").expect("is there").row.state
    }
}

async fn open(folder: &std::path::Path) -> SqliteStore {
    let url = format!("sqlite:{}", folder.join("shop.db").display());
    SqliteStore::connect(&Settings::defaults().url(url).set("busy_timeout", "2s")).await.expect("connects")
}

fn draft(topic: &str, payload: impl serde::Serialize) -> Draft {
    Envelope::json(topic, &payload).and_then(|d| d.checked(1 << 20)).expect("valid")
}

fn declared(name: &str, pattern: &str) -> Declared {
    Declared {
        name: name.into(),
        renamed_from: Vec::new(),
        pattern: pattern.parse().expect("a pattern"),
        policy: policy(Kind::Plain),
        timeout: Duration::from_secs(60),
        quiet: Duration::from_secs(20),
        reconciles: false,
        continues: false,
        start: Start::Unrouted,
        keep: Keep::default(),
        limits: Limits::default(),
        keys: None,
        unique: None,
    }
}

fn operation() -> Declared {
    Declared { policy: policy(Kind::Operation), reconciles: true, ..declared("charge", "orders.placed") }
}

fn policy(kind: Kind) -> Policy {
    let retry = RetryPolicy { max_attempts: 3, base: Duration::from_secs(60), cap: Duration::from_secs(60) };
    Policy { kind, retry, idempotent: false }
}

async fn register(store: &SqliteStore, subscriptions: Vec<Declared>) -> (Uuid, Vec<SubscriptionId>) {
    let worker = Uuid::now_v7();
    let registration = Registration {
        worker,
        name: "host:1".into(),
        application: "shop".into(),
        lease: Duration::from_secs(30),
        subscriptions,
    };
    (worker, store.register(&registration).await.expect("registers"))
}

async fn claim(store: &SqliteStore, worker: Uuid, subscription: SubscriptionId, room: u32) -> (Claimed, LeaseRef) {
    let token = Uuid::now_v7();
    let claimed = store
        .claim(&ClaimRequest {
            worker,
            token,
            wanted: vec![(subscription, room)],
            metered: Vec::new(),
            by_key: Vec::new(),
            full: Vec::new(),
            sorts: true,
        })
        .await
        .expect("claims");
    let lease = LeaseRef { worker, batch: claimed.batch, token };
    (claimed, lease)
}

fn flush(lease: LeaseRef, part: i32) -> Settle {
    Settle {
        lease,
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

fn moved(item: &Item, state: State, attempts: u32, kind: &'static str) -> Move {
    Move {
        delivery: item.delivery,
        message: item.message,
        subscription: item.subscription,
        priority: item.priority,
        rev: item.rev + 1,
        standing: Standing { state, attempts, begun: false, lost: 0 },
        delay: Duration::ZERO,
        quiet: Duration::from_secs(60),
        note: "timeout after send".into(),
        outcome: Some(OutcomeRecord {
            number: attempts,
            kind,
            error: (kind != "succeeded").then(|| "timeout after send".into()),
            receipt: None,
            ran: Duration::from_millis(5),
            ago: Duration::ZERO,
        }),
        leads: false,
    }
}

fn success(item: &Item) -> crate::store::Success {
    crate::store::Success {
        delivery: item.delivery,
        message: item.message,
        subscription: item.subscription,
        ran: Duration::from_millis(3),
    }
}
