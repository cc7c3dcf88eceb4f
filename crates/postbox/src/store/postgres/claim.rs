//! Claiming: promote what is due, lease a batch.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sqlx::{Column, Row};

use super::marks::{Begins, From, Took};
use super::read::Items;
use super::{LOCK_NOT_LONG, PgStore, lanes, limits, promote};
use crate::error::Error;
use crate::priority::Priority;
use crate::store::lanes::is_lane;
use crate::store::turns::Share;
use crate::store::{ClaimRequest, Claimed, SubscriptionId};

/// From this size on, a claim locks stretches of the queue instead of rows (decision 0029).
const MANY: i64 = 128;

/// How often a claim that found nothing but what waits for others of its key looks again.
const LOOKS: u32 = 20;

/// A level and a place in it: the ready order of a subscription.
type Place = (i16, i64);

pub(super) async fn claim(store: &PgStore, request: &ClaimRequest) -> Result<Claimed, Error> {
    if store.calm.load(Ordering::Relaxed)
        && let Some(wait) = look(store, request).await?
    {
        return Ok(Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: wait, dry: Vec::new() });
    }
    let mut work = store.claiming().await?;
    if request.sorts {
        promote::promote(store, &mut work).await?;
    }
    let tokens = limits::take(store, &mut work, request).await?;
    let room = |(id, room): &(SubscriptionId, u32)| (*id, tokens.room(*id, *room));
    let wanted: Vec<(SubscriptionId, u32)> = request.wanted.iter().map(room).collect();
    let rooms: Vec<i32> = wanted.iter().map(|(_, room)| i32::try_from(*room).unwrap_or(i32::MAX)).collect();
    if rooms.iter().all(|room| *room == 0) {
        work.commit().await?;
        return Ok(Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: None, dry: tokens.dry });
    }
    let (in_lanes, wanted): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|(id, _)| request.by_key.contains(id));
    let lanes = match in_lanes.is_empty() {
        true => None,
        false => Some(lanes::wanted(store, &mut work, request, &in_lanes).await?),
    };
    let (subscriptions, rooms): (Vec<i32>, Vec<i32>) =
        wanted.iter().map(|(id, room)| (*id, i32::try_from(*room).unwrap_or(i32::MAX))).unzip();
    let begun = Instant::now();
    let mut froms: Vec<[From; 3]> = subscriptions.iter().map(|id| store.marks.from(*id, begun)).collect();
    let shares: Vec<Share> = wanted.iter().map(|(id, room)| store.turns.share(*id, *room)).collect();
    let many = lanes.is_none()
        && rooms.iter().map(|room| i64::from(*room)).sum::<i64>() >= MANY
        && froms
            .iter()
            .all(|[high, normal, low]| !high.is_thorough() && !normal.is_thorough() && low.begins != Begins::Behind);
    if many {
        // Seldom looked at behind so many others: swept by a smaller claim.
        for [.., low] in &mut froms {
            *low = low.at_mark();
        }
    }
    if many {
        sqlx::raw_sql(LOCK_NOT_LONG).execute(work.on()).await?;
    }
    let sql = match &lanes {
        Some(_) => store.sql.claim_lanes,
        None if many => store.sql.claim_many,
        None => store.sql.claim,
    };
    let mut looks = 0;
    let rows = loop {
        looks += 1;
        let query = store
            .query(sql)
            .bind(request.worker)
            .bind(request.token)
            .bind(&subscriptions)
            .bind(&rooms)
            .bind(shares.iter().map(|share| share.level.level()).collect::<Vec<_>>())
            .bind(shares.iter().map(|share| i32::try_from(share.most).unwrap_or(i32::MAX)).collect::<Vec<_>>())
            .bind(afters(&froms, 0))
            .bind(afters(&froms, 1))
            .bind(afters(&froms, 2));
        let query = match &lanes {
            Some(lanes) => query.bind(&lanes.subscriptions).bind(&lanes.levels).bind(&lanes.most).bind(&lanes.rooms),
            None => query,
        };
        let rows = query.fetch_all(work.on()).await?;
        // All that was found may have been put aside: there are others behind it.
        match &lanes {
            Some(lanes) if rows.is_empty() && looks < LOOKS && lanes.put_aside(store, &mut work).await? => {}
            _ => break rows,
        }
    };
    let took = begun.elapsed();
    let next_due = match rows.is_empty() {
        true => store.query(store.sql.next_due).fetch_optional(work.on()).await?,
        false => None,
    };
    let full = rows.len() >= wanted.iter().chain(&in_lanes).map(|(_, room)| *room as usize).sum::<usize>();
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
        // A level is looked at if those above have left it room, or it had a share of its own.
        let mut left = room.saturating_sub(share.most);
        for ((level, from), furthest) in Priority::ALL.into_iter().zip(froms).zip(taken.furthest) {
            if left > 0 || furthest.is_some() {
                let much = match taken.count >= *room {
                    true if many => Took::FullOfStretches,
                    true => Took::Full,
                    false => Took::All,
                };
                store.marks.found((*subscription, level), from, furthest, much, begun, took);
            }
            left = left.saturating_sub(taken.of[level as usize]);
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
        let mut item = columns.read(row)?;
        let mut place: Place = (row.try_get(priority)?, row.try_get(pos)?);
        if is_lane(place.0) {
            item.leads = row.try_get("leads")?;
            place.0 = 0;
        }
        items.push((place, item));
    }
    items.sort_unstable_by_key(|(place, _)| *place);
    claimed.items = items.into_iter().map(|(_, item)| item).collect();
    Ok(claimed)
}

/// What a claim took of a subscription.
#[derive(Default)]
struct Taken {
    count: u32,
    /// How many, and the last place, of each level.
    of: [u32; 3],
    furthest: [Option<i64>; 3],
}

impl Taken {
    fn add(&mut self, level: i16, pos: i64) {
        self.count += 1;
        self.of[Priority::of(level) as usize] += 1;
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
async fn look(store: &PgStore, request: &ClaimRequest) -> Result<Option<Option<Duration>>, Error> {
    let begun = Instant::now();
    let all = request.wanted.iter().map(|(id, _)| *id);
    let (in_lanes, subscriptions): (Vec<i32>, Vec<i32>) = all.partition(|id| request.by_key.contains(id));
    let froms: Vec<[From; 3]> = subscriptions.iter().map(|id| store.marks.from(*id, begun)).collect();
    let recent = store.promoted.recent(begun);
    let mut work = store.claiming().await?;
    let row = store
        .query(store.sql.look)
        .bind(&subscriptions)
        .bind(afters(&froms, 0))
        .bind(afters(&froms, 1))
        .bind(afters(&froms, 2))
        .bind(recent)
        .bind(in_lanes)
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
            store.marks.found((*subscription, level), from, None, Took::All, begun, took);
        }
    }
    if recent.is_none() {
        store.promoted.swept(begun, took);
    }
    Ok(Some(wait))
}
