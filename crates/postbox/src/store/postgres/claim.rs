//! Claiming: promote what is due, lease a batch.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sqlx::{Column, Row};

use super::marks::From;
use super::read::Items;
use super::{LOCK_NOT_LONG, PgStore, limits, promote};
use crate::error::Error;
use crate::priority::Priority;
use crate::store::turns::Share;
use crate::store::{ClaimRequest, Claimed, SubscriptionId};

/// From this size on, a claim locks stretches of the queue instead of rows (decision 0029).
const MANY: i64 = 128;

/// A level and a place in it: the ready order of a subscription.
type Place = (i16, i64);

pub(super) async fn claim(store: &PgStore, request: &ClaimRequest) -> Result<Claimed, Error> {
    let subscriptions: Vec<i32> = request.wanted.iter().map(|(id, _)| *id).collect();
    if store.calm.load(Ordering::Relaxed)
        && let Some(wait) = look(store, &subscriptions).await?
    {
        return Ok(Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: wait, dry: Vec::new() });
    }
    let mut work = store.claiming().await?;
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
    let froms: Vec<[From; 3]> = subscriptions.iter().map(|id| store.marks.from(*id, begun)).collect();
    let shares: Vec<Share> = wanted.iter().map(|(id, room)| store.turns.share(*id, *room)).collect();
    let many = rooms.iter().map(|room| i64::from(*room)).sum::<i64>() >= MANY
        && froms.iter().all(|[_, normal, _]| !normal.sweeps);
    if many {
        sqlx::raw_sql(LOCK_NOT_LONG).execute(work.on()).await?;
    }
    let rows = store
        .query(if many { store.sql.claim_many } else { store.sql.claim })
        .bind(request.worker)
        .bind(request.token)
        .bind(subscriptions)
        .bind(rooms)
        .bind(shares.iter().map(|share| share.level.level()).collect::<Vec<_>>())
        .bind(shares.iter().map(|share| i32::try_from(share.most).unwrap_or(i32::MAX)).collect::<Vec<_>>())
        .bind(afters(&froms, 0))
        .bind(afters(&froms, 1))
        .bind(afters(&froms, 2))
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

    let mut last: HashMap<SubscriptionId, Taken> = HashMap::new();
    let at = |name: &str| rows.first().map_or(Ok(0), |row| row.try_column(name).map(Column::ordinal));
    let (subscription, priority, pos) = (at("subscription")?, at("priority")?, at("pos")?);
    for row in &rows {
        last.entry(row.try_get(subscription)?).or_default().add(row.try_get(priority)?, row.try_get(pos)?);
    }
    limits::give_back(store, &mut work, &tokens, |id| last.get(&id).map_or(0, |taken| taken.count)).await?;
    work.commit().await?;
    // Only now: what a lost COMMIT has taken may be there again.
    for (((subscription, room), froms), share) in
        wanted.iter().zip(froms).zip(shares).filter(|(((_, room), _), _)| *room > 0)
    {
        let taken = last.remove(subscription).unwrap_or_default();
        // A sweep finds what a claim without row locks passes over: that is none of this level.
        let levels = Priority::ALL.into_iter().zip(froms).zip(taken.furthest);
        for ((level, from), furthest) in levels.filter(|((_, from), _)| !(many && from.sweeps)) {
            store.marks.found((*subscription, level), from, furthest, taken.count >= *room, begun, took);
        }
        if let Some(top) = taken.top() {
            store.turns.took(*subscription, share, taken.count, top);
        }
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

/// What a claim took of a subscription.
#[derive(Default)]
struct Taken {
    count: u32,
    /// The last place, of each level.
    furthest: [Option<i64>; 3],
}

impl Taken {
    fn add(&mut self, level: i16, pos: i64) {
        self.count += 1;
        let furthest = &mut self.furthest[Priority::of(level) as usize];
        *furthest = (*furthest).max(Some(pos));
    }

    fn top(&self) -> Option<Priority> {
        Priority::ALL.into_iter().zip(self.furthest).find_map(|(level, furthest)| furthest.map(|_| level))
    }
}

/// Where the claim of a level begins, for each subscription.
fn afters(froms: &[[From; 3]], level: usize) -> Vec<i64> {
    froms.iter().map(|from| from[level].after).collect()
}

/// One statement in the place of a claim's three, where the last claim found nothing. `None`: there is
/// something to claim; else how long until there is.
async fn look(store: &PgStore, subscriptions: &[SubscriptionId]) -> Result<Option<Option<Duration>>, Error> {
    let begun = Instant::now();
    let froms: Vec<[From; 3]> = subscriptions.iter().map(|id| store.marks.from(*id, begun)).collect();
    let recent = store.promoted.recent(begun);
    let mut work = store.claiming().await?;
    let row = store
        .query(store.sql.look)
        .bind(subscriptions.to_vec())
        .bind(afters(&froms, 0))
        .bind(afters(&froms, 1))
        .bind(afters(&froms, 2))
        .bind(recent)
        .fetch_one(work.on())
        .await?;
    work.rollback().await?;
    let took = begun.elapsed();
    let wait = row.try_get::<Option<i64>, _>("wait_ms")?.map(|ms| Duration::from_millis(ms.max(0) as u64));
    if row.try_get("ready")? || wait == Some(Duration::ZERO) {
        return Ok(None);
    }
    for (subscription, froms) in subscriptions.iter().zip(froms) {
        for (level, from) in Priority::ALL.into_iter().zip(froms) {
            store.marks.found((*subscription, level), from, None, false, begun, took);
        }
    }
    if recent.is_none() {
        store.promoted.swept(begun, took);
    }
    Ok(Some(wait))
}
