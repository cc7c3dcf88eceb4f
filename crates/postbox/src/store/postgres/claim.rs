//! Claiming: promote what is due, lease a batch.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sqlx::{Column, Row};

use super::marks::{From, Place};
use super::read::Items;
use super::{PgStore, promote};
use crate::error::Error;
use crate::store::{ClaimRequest, Claimed, SubscriptionId};

pub(super) async fn claim(store: &PgStore, request: &ClaimRequest) -> Result<Claimed, Error> {
    let (subscriptions, rooms): (Vec<i32>, Vec<i32>) =
        request.wanted.iter().map(|(id, room)| (*id, i32::try_from(*room).unwrap_or(i32::MAX))).unzip();
    if store.calm.load(Ordering::Relaxed)
        && let Some(wait) = look(store, &subscriptions).await?
    {
        return Ok(Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: wait });
    }
    let mut work = store.claiming().await?;
    promote::promote(store, &mut work).await?;
    let begun = Instant::now();
    let froms: Vec<From> = subscriptions.iter().map(|id| store.marks.from(*id, begun)).collect();
    let rows = store
        .query(store.sql.claim)
        .bind(request.worker)
        .bind(request.token)
        .bind(subscriptions)
        .bind(rooms)
        .bind(froms.iter().map(|from| from.after.0).collect::<Vec<_>>())
        .bind(froms.iter().map(|from| from.after.1).collect::<Vec<_>>())
        .fetch_all(work.on())
        .await?;
    let took = begun.elapsed();
    let next_due = match rows.is_empty() {
        true => store.query(store.sql.next_due).fetch_optional(work.on()).await?,
        false => None,
    };
    if rows.len() >= request.wanted.iter().map(|(_, room)| *room as usize).sum::<usize>() {
        // A full batch: there may be more than one worker can do.
        let sql = format!(
            "select pg_catalog.pg_notify(r.channel, '') from {0}.routing r
             where exists (select from {0}.worker w where w.asleep and w.id <> $1)",
            store.schema
        );
        store.dynamic(sql).bind(request.worker).execute(work.on()).await?;
    }
    work.commit().await?;

    let mut last: HashMap<SubscriptionId, (Place, u32)> = HashMap::new();
    let at = |name: &str| rows.first().map_or(Ok(0), |row| row.try_column(name).map(Column::ordinal));
    let (subscription, priority, pos) = (at("subscription")?, at("priority")?, at("pos")?);
    for row in &rows {
        let place = (row.try_get(priority)?, row.try_get(pos)?);
        let (furthest, taken) = last.entry(row.try_get(subscription)?).or_insert((place, 0));
        *furthest = place.max(*furthest);
        *taken += 1;
    }
    // Only now: what a lost COMMIT has taken may be there again.
    for ((subscription, room), from) in request.wanted.iter().zip(froms) {
        let (place, taken) = last.get(subscription).map_or((None, 0), |(place, taken)| (Some(*place), *taken));
        store.marks.found(*subscription, from, place, taken >= *room, begun, took);
    }

    store.calm.store(rows.is_empty(), Ordering::Relaxed);
    store.claimed.fetch_or(!rows.is_empty(), Ordering::Relaxed);
    let mut claimed = Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: None };
    if let Some(row) = next_due {
        claimed.next_due = Some(Duration::from_millis(row.try_get::<i64, _>("wait_ms")?.max(0) as u64));
    }
    let Some(first) = rows.first() else { return Ok(claimed) };
    claimed.batch = first.try_get("batch")?;
    let columns = Items::of(first)?;
    let mut items = Vec::with_capacity(rows.len());
    for row in &rows {
        let place: Place = (row.try_get(priority)?, row.try_get(pos)?);
        items.push((place, columns.read(row)?));
    }
    items.sort_unstable_by_key(|(place, _)| *place);
    claimed.items = items.into_iter().map(|(_, item)| item).collect();
    Ok(claimed)
}

/// One statement in the place of a claim's three, where the last claim found nothing. `None`: there is
/// something to claim; else how long until there is.
async fn look(store: &PgStore, subscriptions: &[SubscriptionId]) -> Result<Option<Option<Duration>>, Error> {
    let begun = Instant::now();
    let froms: Vec<From> = subscriptions.iter().map(|id| store.marks.from(*id, begun)).collect();
    let recent = store.promoted.recent(begun);
    let mut work = store.claiming().await?;
    let row = store
        .query(store.sql.look)
        .bind(subscriptions.to_vec())
        .bind(froms.iter().map(|from| from.after.0).collect::<Vec<_>>())
        .bind(froms.iter().map(|from| from.after.1).collect::<Vec<_>>())
        .bind(recent)
        .fetch_one(work.on())
        .await?;
    work.rollback().await?;
    let took = begun.elapsed();
    let wait = row.try_get::<Option<i64>, _>("wait_ms")?.map(|ms| Duration::from_millis(ms.max(0) as u64));
    if row.try_get("ready")? || wait == Some(Duration::ZERO) {
        return Ok(None);
    }
    for (subscription, from) in subscriptions.iter().zip(froms) {
        store.marks.found(*subscription, from, None, false, begun, took);
    }
    if recent.is_none() {
        store.promoted.swept(begun, took);
    }
    Ok(Some(wait))
}
