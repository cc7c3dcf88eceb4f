//! One unfinished delivery of a key at a time: who has the keys of a subscription.

use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::{PgStore, Work, timestamp};
use crate::admin::{CoalescedRow, key_is_taken};
use crate::error::Error;
use crate::store::uniques::Uniques;
use crate::store::{Declared, DeliveryId, SubscriptionId};

/// Writes what a subscription declares; whether publishers must fan out anew.
pub(super) async fn declare(
    store: &PgStore,
    work: &mut Work,
    subscription: SubscriptionId,
    declared: &Declared,
) -> Result<bool, Error> {
    let sql = format!("select {}.declare_unique($1, $2) as rerouted", store.schema);
    let policy = declared.unique.map(|unique| unique.as_str());
    let row = store.dynamic(sql).bind(subscription).bind(policy).fetch_one(work.on()).await?;
    Ok(row.try_get("rerouted")?)
}

/// Lets keys go whose deliveries end in this transaction.
pub(super) async fn free(store: &PgStore, connection: &mut PgConnection, ended: Vec<DeliveryId>) -> Result<(), Error> {
    if !ended.is_empty() {
        store.query(store.sql.free_keys).bind(ended).execute(connection).await?;
    }
    Ok(())
}

/// Takes the key for a delivery that is to wait again; a conflict if another one has it.
pub(super) async fn again(
    store: &PgStore,
    work: &mut Work,
    (delivery, subscription, message): (DeliveryId, SubscriptionId, Uuid),
) -> Result<Option<Error>, Error> {
    let sql = format!("select {}.take_key_again($1, $2, $3) as holder", store.schema);
    let row = store.dynamic(sql).bind(subscription).bind(message).bind(delivery).fetch_one(work.on()).await?;
    Ok(row.try_get::<Option<DeliveryId>, _>("holder")?.map(|holder| key_is_taken(delivery, holder)))
}

/// Lets go of what stayed behind, some pages of it.
pub(super) async fn tidy(store: &PgStore, work: &mut Work) -> Result<(), Error> {
    let sql = format!("select {}.tidy_keys($1, $2) as last", store.schema);
    for _ in 0..Uniques::PAGES {
        let above = store.uniques.tidied();
        let query = store.dynamic(sql.clone()).bind(above).bind(i32::from(Uniques::PAGE));
        let last: Option<DeliveryId> = query.fetch_one(work.on()).await?.try_get("last")?;
        store.uniques.tidied_to(last);
        if last.is_none() {
            break;
        }
    }
    Ok(())
}

pub(super) async fn coalesced(store: &PgStore, message: Uuid) -> Result<Vec<CoalescedRow>, Error> {
    let sql = format!(
        "select s.application, s.name, c.delivery, (extract(epoch from c.at) * 1000000::numeric)::bigint as at_us
         from {0}.coalesced c join {0}.subscription s on s.id = c.subscription
         where c.message = $1 order by c.delivery",
        store.schema
    );
    let mut work = store.read().await?;
    let rows = store.dynamic(sql).bind(message).fetch_all(work.on()).await?;
    work.rollback().await?;
    let read = |row: &sqlx::postgres::PgRow| {
        Ok(CoalescedRow {
            application: row.try_get("application")?,
            subscription: row.try_get("name")?,
            delivery: row.try_get("delivery")?,
            at: timestamp(row.try_get("at_us")?),
        })
    };
    rows.iter().map(read).collect()
}
