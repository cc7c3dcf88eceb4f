//! Lanes: which of them are a worker's own, and what it may claim from them.

use std::collections::HashMap;
use std::time::Instant;

use sha2::{Digest, Sha256};
use sqlx::{Row, SqliteConnection};
use uuid::Uuid;

use super::json_of;
use crate::error::Error;
use crate::store::lanes::{Balanced, FIRST_HELD, FIRST_LANE, HELD, LANES, Lane, of_each};
use crate::store::{DeliveryId, SubscriptionId};

/// The lane of a key. What has no key is in no order, and spread over the lanes.
pub(super) fn lane_of(key: Option<&str>, message: Uuid) -> i16 {
    let byte = match key {
        Some(key) => Sha256::digest(key)[0],
        None => message.as_bytes()[15],
    };
    FIRST_LANE + i16::from(byte) % LANES
}

/// The level at which deliveries of a key wait for another one of it.
pub(super) fn held_of(key: &str) -> i16 {
    let digest = Sha256::digest(key);
    FIRST_HELD + (i16::from(digest[1]) << 7 | i16::from(digest[2] >> 1)) % HELD
}

/// Makes the lanes of a subscription that goes by them.
pub(super) async fn declare(db: &mut SqliteConnection, subscription: SubscriptionId) -> Result<(), Error> {
    let levels: Vec<i16> = (FIRST_LANE..FIRST_LANE + LANES).collect();
    sqlx::query(
        "insert into postbox_lane (subscription, level) select ?1, value from json_each(?2) where true
         on conflict do nothing",
    )
    .bind(subscription)
    .bind(json_of(&levels)?)
    .execute(db)
    .await?;
    Ok(())
}

/// The worker's own lanes of a subscription, but for those that nothing more is wanted of.
pub(super) async fn own(
    db: &mut SqliteConnection,
    balanced: &Balanced,
    worker: Uuid,
    subscription: SubscriptionId,
    full: &[Lane],
) -> Result<Vec<i16>, Error> {
    sort(db, subscription).await?;
    if !balanced.due(worker, &[subscription], Instant::now()).is_empty() {
        balance(db, worker, subscription).await?;
    }
    let levels: Vec<i16> = sqlx::query_scalar(
        "select level from postbox_lane where subscription = ?1 and owner = ?2 and not leaving order by level",
    )
    .bind(subscription)
    .bind(worker)
    .fetch_all(db)
    .await?;
    Ok(levels.into_iter().filter(|level| !full.contains(&(subscription, *level))).collect())
}

/// Gives up lanes that others should have, and takes those that are nobody's: as many as are this worker's share.
async fn balance(db: &mut SqliteConnection, worker: Uuid, subscription: SubscriptionId) -> Result<(), Error> {
    let workers: i64 = sqlx::query_scalar(
        "select count(*) from postbox_worker w where ?1 in (select value from json_each(w.subscriptions))",
    )
    .bind(subscription)
    .fetch_one(&mut *db)
    .await?;
    let share = i64::from(LANES).unsigned_abs().div_ceil(workers.max(1).unsigned_abs());
    for sql in [
        "update postbox_lane set owner = null, leaving = 0
         where subscription = ?1 and owner = ?2 and leaving and ?3 and not exists (
             select 1 from postbox_lease l join postbox_delivery d on d.token = l.token
             where l.worker = ?2 and d.subscription = ?1 and d.priority = level)",
        "update postbox_lane set leaving = 1
         where subscription = ?1 and owner = ?2 and level in (
             select o.level from postbox_lane o where o.subscription = ?1 and o.owner = ?2 and not o.leaving
             order by o.level limit -1 offset ?3)",
        "update postbox_lane set owner = ?2, leaving = 0
         where subscription = ?1 and level in (
             select f.level from postbox_lane f
             where f.subscription = ?1 and (f.owner is null or f.owner not in (select w.id from postbox_worker w))
             order by f.level
             limit max(0, ?3 - (select count(*) from postbox_lane o where o.subscription = ?1 and o.owner = ?2)))",
    ] {
        sqlx::query(sql).bind(subscription).bind(worker).bind(share as i64).execute(&mut *db).await?;
    }
    Ok(())
}

/// Puts deliveries into their lanes that are in none: history, and what is repeated.
async fn sort(db: &mut SqliteConnection, subscription: SubscriptionId) -> Result<(), Error> {
    let strays: Vec<(DeliveryId, Uuid, Option<String>)> = sqlx::query_as(
        "select d.id, d.message, m.key from postbox_delivery d left join postbox_message m on m.id = d.message
         where d.subscription = ?1 and d.state = 'pending' and d.due_at is null and d.priority < ?2
         order by d.id limit 5000",
    )
    .bind(subscription)
    .bind(FIRST_LANE)
    .fetch_all(&mut *db)
    .await?;
    if strays.is_empty() {
        return Ok(());
    }
    let places: Vec<(DeliveryId, i16)> =
        strays.iter().map(|(id, message, key)| (*id, lane_of(key.as_deref(), *message))).collect();
    sqlx::query(
        "update postbox_delivery as d set priority = s.value ->> 1, pos = 0
         from json_each(?1) s where d.id = s.value ->> 0",
    )
    .bind(json_of(&places)?)
    .execute(db)
    .await?;
    Ok(())
}

/// What a claim of a subscription's lanes finds.
pub(super) struct Found {
    /// As `claim.sql` has them, and whether each leads its key.
    pub(super) rows: Vec<(sqlx::sqlite::SqliteRow, bool)>,
    /// Some had to be put aside: there may be others behind them.
    pub(super) again: bool,
}

/// Up to so many deliveries from these lanes, in order. Those that wait for another one of their key are put aside.
pub(super) async fn pick(
    db: &mut SqliteConnection,
    subscription: SubscriptionId,
    levels: &[i16],
    room: u32,
) -> Result<Found, Error> {
    let mut found = Found { rows: Vec::new(), again: false };
    if levels.is_empty() || room == 0 {
        return Ok(found);
    }
    let each = of_each(room, levels.len());
    let of_lane = |level: &i16| {
        format!(
            "select * from (select d.id, d.message from postbox_delivery d
                 where d.subscription = ?1 and d.state = 'pending' and d.due_at is null and d.priority = {level}
                 order by d.priority, d.pos, d.id limit {each})"
        )
    };
    let lanes = levels.iter().map(of_lane).collect::<Vec<_>>().join(" union all ");
    let sql = format!(
        "select l.id, m.key, k.subscription is not null and not (coalesce(l.id <= k.upto, 0)
                 or k.state <> 'parked' and coalesce(k.head = l.id, 0)) as waits,
             coalesce(k.head = l.id, 0) as leads
         from ({lanes}) l
         left join postbox_message m on m.id = l.message
         left join postbox_key_state k on k.subscription = ?1 and k.key = m.key
         order by l.id limit ?2 + 0"
    );
    let rows: Vec<(DeliveryId, Option<String>, bool, bool)> =
        sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(subscription).bind(room).fetch_all(&mut *db).await?;
    let aside: Vec<(DeliveryId, i16)> = rows
        .iter()
        .filter(|(.., waits, _)| *waits)
        .filter_map(|(id, key, ..)| Some((*id, held_of(key.as_deref()?))))
        .collect();
    if !aside.is_empty() {
        found.again = true;
        sqlx::query(
            "update postbox_delivery as d set priority = s.value ->> 1 from json_each(?1) s where d.id = s.value ->> 0",
        )
        .bind(json_of(&aside)?)
        .execute(&mut *db)
        .await?;
    }
    let leads: HashMap<DeliveryId, bool> =
        rows.iter().filter(|(.., waits, _)| !waits).map(|(id, .., leads)| (*id, *leads)).collect();
    if leads.is_empty() {
        return Ok(found);
    }
    let mut ids: Vec<DeliveryId> = leads.keys().copied().collect();
    ids.sort_unstable();
    let sql = include_str!("claim.sql").replace(
        "where d.subscription = ?1 and d.state = 'pending' and d.due_at is null {level}",
        "where d.id in (select value from json_each(?1))",
    );
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(json_of(&ids)?).bind(room).fetch_all(db).await?;
    for row in rows {
        let id: DeliveryId = serde_json::from_str::<Vec<serde_json::Value>>(row.try_get(0)?)
            .ok()
            .and_then(|about| about.first()?.as_i64())
            .unwrap_or_default();
        found.rows.push((row, leads.get(&id).copied().unwrap_or_default()));
    }
    Ok(found)
}
