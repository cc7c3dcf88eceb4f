//! Claiming: promote what is due, lease a batch.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sqlx::{Column, Row};

use super::marks::{From, Place};
use super::read::Items;
use super::{LOCK_NOT_LONG, PgStore, limits, promote};
use crate::error::Error;
use crate::store::{ClaimRequest, Claimed, SubscriptionId};

/// From this size on, a claim locks stretches of the queue instead of rows (decision 0029).
const MANY: i64 = 128;

pub(super) async fn claim(store: &PgStore, request: &ClaimRequest) -> Result<Claimed, Error> {
    let subscriptions: Vec<i32> = request.wanted.iter().map(|(id, _)| *id).collect();
    if store.calm.load(Ordering::Relaxed)
        && let Some(wait) = look(store, &subscriptions).await?
    {
        return Ok(Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: wait, dry: Vec::new() });
    }
    let mut work = store.claiming_lightly().await?;
    promote::promote(store, &mut work).await?;
    let tokens = limits::take(store, &mut work, request).await?;
    let room = |(id, room): &(SubscriptionId, u32)| (*id, tokens.room(*id, *room));
    let wanted: Vec<(SubscriptionId, u32)> = request.wanted.iter().map(room).collect();
    let rooms: Vec<i32> = wanted.iter().map(|(_, room)| i32::try_from(*room).unwrap_or(i32::MAX)).collect();
    if rooms.iter().all(|room| *room == 0) {
        work.commit().await?;
        return Ok(Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: None, dry: tokens.dry });
    }
    let begun = Instant::now();
    let froms: Vec<From> = subscriptions.iter().map(|id| store.marks.from(*id, begun)).collect();
    let many = rooms.iter().map(|room| i64::from(*room)).sum::<i64>() >= MANY && froms.iter().all(|from| !from.sweeps);
    if many {
        sqlx::raw_sql(LOCK_NOT_LONG).execute(work.on()).await?;
    }
    let rows = store
        .query(if many { store.sql.claim_many } else { store.sql.claim })
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
    let full = rows.len() >= wanted.iter().map(|(_, room)| *room as usize).sum::<usize>();
    if full {
        // A full batch: there may be more than one worker can do.
        let sql = format!(
            "select pg_catalog.pg_notify(r.channel, '') from {0}.routing r
             where exists (select from {0}.worker w where w.asleep and w.id <> $1)",
            store.schema
        );
        store.dynamic(sql).bind(request.worker).execute(work.on()).await?;
    }

    let mut last: HashMap<SubscriptionId, (Place, u32)> = HashMap::new();
    let at = |name: &str| rows.first().map_or(Ok(0), |row| row.try_column(name).map(Column::ordinal));
    let (subscription, priority, pos) = (at("subscription")?, at("priority")?, at("pos")?);
    for row in &rows {
        let place = (row.try_get(priority)?, row.try_get(pos)?);
        let (furthest, taken) = last.entry(row.try_get(subscription)?).or_insert((place, 0));
        *furthest = place.max(*furthest);
        *taken += 1;
    }
    tokens.give_back(store, &mut work, |id| last.get(&id).map_or(0, |(_, taken)| *taken)).await?;
    work.commit().await?;
    // Only now: what a lost COMMIT has taken may be there again.
    for ((subscription, room), from) in wanted.iter().zip(froms).filter(|((_, room), _)| *room > 0) {
        let (place, taken) = last.get(subscription).map_or((None, 0), |(place, taken)| (Some(*place), *taken));
        store.marks.found(*subscription, from, place, taken >= *room, begun, took);
    }

    store.calm.store(rows.is_empty(), Ordering::Relaxed);
    store.claimed.fetch_or(!rows.is_empty(), Ordering::Relaxed);
    let mut claimed = Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: None, dry: tokens.dry };
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
    let mut work = store.claiming_lightly().await?;
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
