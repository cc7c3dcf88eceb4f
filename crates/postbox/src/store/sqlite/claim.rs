//! Claiming: promote what is due, lease a batch.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use sqlx::{Row, SqliteConnection};

use super::work::Work;
use super::{SqliteStore, json_of, messages};
use crate::error::Error;
use crate::planted::planted;
use crate::store::{ClaimRequest, Claimed, DeliveryId, Item, SubscriptionId};

/// What becomes due in one claim at most.
const PROMOTED: i64 = 1000;

pub(super) async fn claim(store: &SqliteStore, request: &ClaimRequest) -> Result<Claimed, Error> {
    let wanted: Vec<SubscriptionId> = request.wanted.iter().filter(|(_, room)| *room > 0).map(|(id, _)| *id).collect();
    let wanted = json_of(&wanted)?;
    let mut claimed = Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: None };
    // Looking does not need the writer, so that an idle worker is in nobody's way.
    let (due, wait): (bool, Option<i64>) =
        sqlx::query_as(include_str!("due.sql")).bind(&wanted).fetch_one(&store.reader).await?;
    claimed.next_due = wait.map(wait_of);
    if !due {
        return Ok(claimed);
    }

    let mut work = store.write().await?;
    let lives: bool = sqlx::query_scalar("select exists (select 1 from postbox_worker where id = ?1)")
        .bind(request.worker)
        .fetch_one(work.on())
        .await?;
    if !lives && !planted!("claim-without-life") {
        work.rollback().await?;
        return Ok(claimed);
    }
    let mut claimed = claim_in(&mut work, request).await?;
    let (_, wait): (bool, Option<i64>) =
        sqlx::query_as(include_str!("due.sql")).bind(&wanted).fetch_one(work.on()).await?;
    claimed.next_due = wait.map(wait_of);
    work.commit().await?;
    Ok(claimed)
}

/// The claim itself, in a transaction that holds the write lock.
pub(super) async fn claim_in(work: &mut Work, request: &ClaimRequest) -> Result<Claimed, Error> {
    let wanted: Vec<SubscriptionId> = request.wanted.iter().filter(|(_, room)| *room > 0).map(|(id, _)| *id).collect();
    let mut claimed = Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: None };
    sqlx::query(include_str!("promote.sql")).bind(json_of(&wanted)?).bind(PROMOTED).execute(work.on()).await?;
    let picked = pick(work.on(), request).await?;
    if !picked.is_empty() {
        claimed.batch = sqlx::query_scalar(
            "insert into postbox_lease (token, worker, claimed_at) select ?1, ?2, now from postbox_clock returning batch",
        )
        .bind(request.token)
        .bind(request.worker)
        .fetch_one(work.on())
        .await?;
        claimed.items = lease(work.on(), request, &picked).await?;
    }
    Ok(claimed)
}

fn wait_of(millis: i64) -> Duration {
    Duration::from_millis(millis.max(0) as u64)
}

async fn pick(db: &mut SqliteConnection, request: &ClaimRequest) -> Result<Vec<DeliveryId>, Error> {
    let mut picked = Vec::new();
    for (subscription, room) in &request.wanted {
        let some: Vec<DeliveryId> = sqlx::query_scalar(
            "select id from postbox_delivery
             where subscription = ?1 and state = 'pending' and due_at is null
             order by priority, pos, id limit ?2",
        )
        .bind(subscription)
        .bind(room)
        .fetch_all(&mut *db)
        .await?;
        picked.extend(some);
    }
    Ok(picked)
}

async fn lease(db: &mut SqliteConnection, request: &ClaimRequest, picked: &[DeliveryId]) -> Result<Vec<Item>, Error> {
    let picked = json_of(picked)?;
    sqlx::query(
        "update postbox_delivery
         set state = 'running', token = ?1, begun = 0, rev = rev + 1, since = (select now from postbox_clock)
         where id in (select value from json_each(?2))",
    )
    .bind(request.token)
    .bind(&picked)
    .execute(&mut *db)
    .await?;
    let rows = sqlx::query(
        "select id, subscription, message, priority, attempt, lost, rev from postbox_delivery
         where token = ?1 order by priority, pos, id",
    )
    .bind(request.token)
    .fetch_all(&mut *db)
    .await?;
    let mut items = Vec::with_capacity(rows.len());
    for row in rows {
        items.push(Item {
            delivery: row.try_get("id")?,
            subscription: row.try_get("subscription")?,
            message: row.try_get("message")?,
            priority: row.try_get("priority")?,
            attempts: row.try_get("attempt")?,
            lost: row.try_get("lost")?,
            rev: row.try_get("rev")?,
            envelope: None,
        });
    }
    let ids: Vec<_> = items.iter().map(|item| item.message).collect();
    let envelopes = messages(db, &ids).await?.into_iter().map(|(id, envelope)| (id, Arc::new(envelope)));
    let envelopes: HashMap<_, _> = envelopes.collect();
    for item in &mut items {
        item.envelope = envelopes.get(&item.message).cloned();
    }
    Ok(items)
}
