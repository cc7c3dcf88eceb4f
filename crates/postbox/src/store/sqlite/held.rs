//! What a lease holds without a row for each delivery: those that go the straight way.
//!
//! A claim takes their rows away and writes them into the lease; a success takes them from there to
//! the record. Whatever else becomes of one, it gets its row back first.

use std::collections::HashMap;

use sqlx::{Row, SqliteConnection};
use uuid::Uuid;

use super::json_of;
use crate::error::Error;
use crate::planted::planted;
use crate::store::{DeliveryId, LeaseRef, SubscriptionId, Success};

/// A delivery that only its lease holds: its number, its message's id in hexadecimal digits, its
/// subscription.
pub(super) type Light = (DeliveryId, String, SubscriptionId);

/// The deliveries that only their lease holds.
pub(super) struct Held {
    token: Uuid,
    items: HashMap<DeliveryId, (String, SubscriptionId)>,
    changed: bool,
}

impl Held {
    /// Of a lease; `None` if it is not there (any more).
    pub(super) async fn of(db: &mut SqliteConnection, lease: LeaseRef) -> Result<Option<Held>, Error> {
        let whoever = planted!("settle-without-lease");
        let found: Option<String> = sqlx::query_scalar(
            "select items from postbox_lease where token = ?1 and (batch = ?2 and worker = ?3 or ?4)",
        )
        .bind(lease.token)
        .bind(lease.batch)
        .bind(lease.worker)
        .bind(whoever)
        .fetch_optional(db)
        .await?;
        let items = match found {
            Some(items) => items,
            None if whoever => "[]".to_owned(),
            None => return Ok(None),
        };
        Held::read(lease.token, &items).map(Some)
    }

    fn read(token: Uuid, items: &str) -> Result<Held, Error> {
        let items: Vec<Light> =
            serde_json::from_str(items).map_err(|e| Error::Database(sqlx::Error::Decode(Box::new(e))))?;
        let items = items.into_iter().map(|(id, message, subscription)| (id, (message, subscription))).collect();
        Ok(Held { token, items, changed: false })
    }

    /// Takes out those that succeeded, per subscription; gives back the others, which have rows.
    pub(super) fn succeed<'a>(&mut self, successes: &'a [Success]) -> (Vec<Record>, Vec<&'a Success>) {
        let (mut records, mut rest): (Vec<Record>, Vec<&Success>) = (Vec::new(), Vec::new());
        for success in successes {
            let Some((message, subscription)) = self.items.remove(&success.delivery) else {
                rest.push(success);
                continue;
            };
            self.changed = true;
            let item = (success.delivery, message, super::millis(success.ran));
            match records.iter_mut().find(|r| r.subscription == subscription) {
                Some(record) => record.items.push(item),
                None => records.push(Record { subscription, items: vec![item] }),
            }
        }
        (records, rest)
    }

    /// Gives these their rows, if they have none.
    pub(super) async fn restore(
        &mut self,
        db: &mut SqliteConnection,
        deliveries: impl Iterator<Item = DeliveryId>,
    ) -> Result<(), Error> {
        if self.items.is_empty() {
            return Ok(());
        }
        let rows: Vec<Light> = deliveries
            .filter_map(|id| self.items.remove(&id).map(|(message, subscription)| (id, message, subscription)))
            .collect();
        if rows.is_empty() {
            return Ok(());
        }
        self.changed = true;
        sqlx::query(
            "insert into postbox_delivery (id, message, subscription, state, pos, rev, token, since)
             select i.value ->> 0, unhex(i.value ->> 1), i.value ->> 2, 'running', i.value ->> 0, 1, l.token, l.claimed_at
             from json_each(?1) i cross join postbox_lease l where l.token = ?2",
        )
        .bind(json_of(&rows)?)
        .bind(self.token)
        .execute(db)
        .await?;
        Ok(())
    }

    /// Writes down what is left.
    pub(super) async fn keep(self, db: &mut SqliteConnection) -> Result<(), Error> {
        if !self.changed {
            return Ok(());
        }
        let items: Vec<Light> =
            self.items.into_iter().map(|(id, (message, subscription))| (id, message, subscription)).collect();
        sqlx::query("update postbox_lease set items = ?2 where token = ?1")
            .bind(self.token)
            .bind(json_of(&items)?)
            .execute(db)
            .await?;
        Ok(())
    }
}

/// Gives a row to all that a worker's leases hold, or one lease of it.
pub(super) async fn restore_all(db: &mut SqliteConnection, worker: Uuid, token: Option<Uuid>) -> Result<(), Error> {
    let leases = sqlx::query(
        "select token, items from postbox_lease where worker = ?1 and (?2 is null or token = ?2) and items <> '[]'",
    )
    .bind(worker)
    .bind(token)
    .fetch_all(&mut *db)
    .await?;
    for lease in leases {
        let mut held = Held::read(lease.try_get(0)?, lease.try_get(1)?)?;
        let all: Vec<DeliveryId> = held.items.keys().copied().collect();
        held.restore(db, all.into_iter()).await?;
        held.keep(db).await?;
    }
    Ok(())
}

/// What succeeded in one flush, of one subscription.
pub(super) struct Record {
    subscription: SubscriptionId,
    items: Vec<(DeliveryId, String, i64)>,
}

impl Record {
    pub(super) async fn write(mut self, db: &mut SqliteConnection, lease: LeaseRef) -> Result<(), Error> {
        self.items.sort_unstable();
        let ids = || self.items.iter().map(|(id, ..)| *id);
        let messages = || self.items.iter().map(|(_, message, _)| message.as_str());
        sqlx::query(
            "insert into postbox_success (subscription, batch, worker, at, lowest, highest, first_message,
                 last_message, deliveries, items)
             select ?1, ?2, ?3, now, ?4, ?5, unhex(?6), unhex(?7), ?8, ?9 from postbox_clock",
        )
        .bind(self.subscription)
        .bind(lease.batch)
        .bind(lease.worker)
        .bind(ids().min())
        .bind(ids().max())
        .bind(messages().min())
        .bind(messages().max())
        .bind(i64::try_from(self.items.len()).unwrap_or(i64::MAX))
        .bind(json_of(&self.items)?)
        .execute(db)
        .await?;
        Ok(())
    }
}
