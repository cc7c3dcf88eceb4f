//! One unfinished delivery of a key at a time: who has the keys of a subscription.

use sqlx::SqliteConnection;
use uuid::Uuid;

use super::{SqliteStore, json_of, timestamp};
use crate::admin::{CoalescedRow, key_is_taken};
use crate::error::{Error, PublishError};
use crate::message::Draft;
use crate::store::uniques::Uniques;
use crate::store::{Declared, DeliveryId, Stored, SubscriptionId};

/// Writes what a subscription declares.
pub(super) async fn declare(
    db: &mut SqliteConnection,
    subscription: SubscriptionId,
    declared: &Declared,
) -> Result<(), Error> {
    let Some(unique) = declared.unique else {
        for table in ["one_per_key", "key_holder"] {
            let sql = format!("delete from postbox_{table} where subscription = ?1");
            sqlx::query(sqlx::AssertSqlSafe(sql)).bind(subscription).execute(&mut *db).await?;
        }
        return Ok(());
    };
    let known = "select exists (select 1 from postbox_one_per_key where subscription = ?1)";
    let known: bool = sqlx::query_scalar(known).bind(subscription).fetch_one(&mut *db).await?;
    sqlx::query(
        "insert into postbox_one_per_key (subscription, policy) values (?1, ?2)
         on conflict do update set policy = excluded.policy",
    )
    .bind(subscription)
    .bind(unique.as_str())
    .execute(&mut *db)
    .await?;
    if known {
        return Ok(());
    }
    // What is unfinished stays: as long as one of them is, a key is not free.
    sqlx::query(
        "insert into postbox_key_holder (subscription, key, delivery, others)
         select ?1, m.key, min(w.id), nullif(json_group_array(w.id), json_array(min(w.id)))
         from (
             select id, message from postbox_delivery
             where subscription = ?1 and state in ('pending', 'running', 'in_doubt')
             union all
             select id, message from postbox_held where subscription = ?1
         ) w join postbox_message m on m.id = w.message
         where m.key is not null
         group by m.key
         on conflict do nothing",
    )
    .bind(subscription)
    .execute(db)
    .await?;
    Ok(())
}

/// What stands for messages that were stored just now.
pub(super) async fn told(
    db: &mut SqliteConnection,
    stored: &mut [Option<Stored>],
    keyed: &[(usize, Uuid)],
) -> Result<(), PublishError> {
    let ids: Vec<String> = keyed.iter().map(|(_, id)| id.simple().to_string()).collect();
    let json = serde_json::to_string(&ids).map_err(|e| sqlx::Error::Encode(Box::new(e)))?;
    let rows: Vec<(Uuid, DeliveryId)> = sqlx::query_as(
        "select c.message, c.delivery from json_each(?1) i
         join postbox_coalesced c on c.message = unhex(i.value) order by c.subscription",
    )
    .bind(json)
    .fetch_all(db)
    .await?;
    for (message, delivery) in rows {
        let Some((place, _)) = keyed.iter().find(|(_, id)| *id == message) else { continue };
        match &mut stored[*place] {
            Some(Stored::Coalesced { into, .. }) => into.push(delivery),
            other => *other = Some(Stored::Coalesced { id: message, into: vec![delivery] }),
        }
    }
    Ok(())
}

/// Whether there is somebody to refuse to, from here on. For as long as a statement of this transaction runs:
/// it is not committed.
pub(super) async fn lenient(db: &mut SqliteConnection, lenient: bool) -> Result<(), sqlx::Error> {
    sqlx::query("update postbox_one_per_key set lenient = ?1 where policy = 'refuse'")
        .bind(lenient)
        .execute(db)
        .await?;
    Ok(())
}

/// Publishes where nobody could do anything about a refusal: the delivery in flight stands for the message.
pub(super) async fn publish(db: &mut SqliteConnection, drafts: &[Draft]) -> Result<Vec<Stored>, PublishError> {
    match super::publish::publish(db, drafts).await {
        // Its statement has changed nothing.
        Err(PublishError::KeyInFlight { .. }) => {
            lenient(db, true).await?;
            let stored = super::publish::publish(db, drafts).await?;
            lenient(db, false).await?;
            Ok(stored)
        }
        stored => stored,
    }
}

/// The unfinished delivery, other than this one, that has a message's key.
pub(super) async fn holder(
    db: &mut SqliteConnection,
    subscription: SubscriptionId,
    message: Uuid,
    delivery: DeliveryId,
) -> Result<Option<DeliveryId>, Error> {
    let holder = sqlx::query_scalar(
        "select f.delivery from postbox_one_per_key u cross join postbox_message m
         join postbox_key_in_flight f on f.subscription = u.subscription and f.key = m.key
         where u.subscription = ?1 and m.id = ?2 and f.delivery <> ?3 limit 1",
    )
    .bind(subscription)
    .bind(message)
    .bind(delivery)
    .fetch_optional(db)
    .await?;
    Ok(holder)
}

/// Takes the key for a delivery that is to wait again; a conflict if another one has it.
pub(super) async fn again(
    db: &mut SqliteConnection,
    (delivery, subscription, message): (DeliveryId, SubscriptionId, Uuid),
) -> Result<Option<Error>, Error> {
    if let Some(holder) = holder(db, subscription, message, delivery).await? {
        return Ok(Some(key_is_taken(delivery, holder)));
    }
    sqlx::query(
        "insert into postbox_key_holder (subscription, key, delivery)
         select u.subscription, m.key, ?3 from postbox_one_per_key u cross join postbox_message m
         where u.subscription = ?1 and m.id = ?2 and m.key is not null
         on conflict (subscription, key) do update set delivery = excluded.delivery, others = null",
    )
    .bind(subscription)
    .bind(message)
    .bind(delivery)
    .execute(db)
    .await?;
    Ok(None)
}

/// Puts on record that a delivery stands for a message once more.
pub(super) async fn coalesce(
    db: &mut SqliteConnection,
    (delivery, subscription, message): (DeliveryId, SubscriptionId, Uuid),
) -> Result<(), Error> {
    sqlx::query(
        "insert into postbox_coalesced (message, subscription, delivery, at)
         select ?1, ?2, ?3, now from postbox_clock where true on conflict do nothing",
    )
    .bind(message)
    .bind(subscription)
    .bind(delivery)
    .execute(db)
    .await?;
    Ok(())
}

/// Lets keys go whose deliveries end in this transaction.
pub(super) async fn free(db: &mut SqliteConnection, ended: &[DeliveryId]) -> Result<(), Error> {
    if !ended.is_empty() {
        sqlx::query(
            "delete from postbox_key_holder where others is null and delivery in (select value from json_each(?1))",
        )
        .bind(json_of(ended)?)
        .execute(db)
        .await?;
    }
    Ok(())
}

/// Lets go of what stayed behind, some pages of it. A look first: nothing to do must not wait for the writer.
pub(super) async fn tidy(store: &SqliteStore) -> Result<(), Error> {
    const LOOK: &str = "select h.delivery, not exists (
             select 1 from postbox_key_in_flight f where f.subscription = h.subscription and f.key = h.key)
         from postbox_key_holder h where h.delivery > ?1 order by h.delivery limit ?2";
    let uniques = &store.shared.uniques;
    for _ in 0..Uniques::PAGES {
        let page: Vec<(DeliveryId, bool)> =
            sqlx::query_as(LOOK).bind(uniques.tidied()).bind(Uniques::PAGE).fetch_all(&store.reader).await?;
        let over: Vec<DeliveryId> = page.iter().filter(|(_, over)| *over).map(|(delivery, _)| *delivery).collect();
        if !over.is_empty() {
            let mut work = store.write().await?;
            sqlx::query(
                "delete from postbox_key_holder where delivery in (select value from json_each(?1))
                     and not exists (
                         select 1 from postbox_key_in_flight f
                         where f.subscription = postbox_key_holder.subscription and f.key = postbox_key_holder.key)",
            )
            .bind(json_of(&over)?)
            .execute(work.on())
            .await?;
            work.commit().await?;
        }
        let last = page.last().map(|(delivery, _)| *delivery);
        uniques.tidied_to(last);
        if last.is_none() {
            break;
        }
    }
    Ok(())
}

row! {
    struct StoodFor {
        application: String,
        name: String,
        delivery: DeliveryId,
        at: i64,
    }
}

pub(super) async fn coalesced(store: &SqliteStore, message: Uuid) -> Result<Vec<CoalescedRow>, Error> {
    let rows: Vec<StoodFor> = sqlx::query_as(
        "select s.application, s.name, c.delivery, c.at
         from postbox_coalesced c join postbox_subscription s on s.id = c.subscription
         where c.message = ?1 order by c.delivery",
    )
    .bind(message)
    .fetch_all(&store.reader)
    .await?;
    let read = |row: StoodFor| CoalescedRow {
        application: row.application,
        subscription: row.name,
        delivery: row.delivery,
        at: timestamp(row.at),
    };
    Ok(rows.into_iter().map(read).collect())
}
