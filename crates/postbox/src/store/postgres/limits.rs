//! Limits across workers: permits for what runs at once, tokens for what begins in a time.

use std::time::Duration;

use sqlx::Row;
use uuid::Uuid;

use super::{PgStore, Work};
use crate::error::Error;
use crate::limits::Limits;
use crate::store::tokens::Taken;
use crate::store::{ClaimRequest, PermitWish, Permits, SubscriptionId};

/// Writes what a subscription declares.
pub(super) async fn declare(
    store: &PgStore,
    work: &mut Work,
    subscription: SubscriptionId,
    limits: &Limits,
) -> Result<(), Error> {
    let (at_once, token_us, burst) = stored(limits);
    let sql = match limits.is_none() {
        // Its permits are nobody's then; they go with their workers.
        true => format!("delete from {}.flow_limit where subscription = $1", store.schema),
        false => format!(
            "insert into {}.flow_limit as f (subscription, at_once, token_us, burst, tokens) values ($1, $2, $3, $4, coalesce($4, 0))
             on conflict (subscription) do update set at_once = excluded.at_once, token_us = excluded.token_us,
                 burst = excluded.burst, tokens = least(f.tokens, excluded.tokens)
             where (f.at_once, f.token_us, f.burst) is distinct from (excluded.at_once, excluded.token_us, excluded.burst)",
            store.schema
        ),
    };
    let query = store.dynamic(sql).bind(subscription);
    let query = if limits.is_none() { query } else { query.bind(at_once).bind(token_us).bind(burst) };
    query.execute(work.on()).await?;
    Ok(())
}

/// Limits as they are stored: at once, microseconds a token, the bucket's size.
pub(super) fn stored(limits: &Limits) -> (Option<i32>, Option<f64>, Option<i32>) {
    let at_once = limits.at_once.map(|n| i32::try_from(n).unwrap_or(i32::MAX));
    (at_once, limits.rate.map(|rate| rate.token_us()), limits.rate.map(|rate| rate.burst()))
}

pub(super) async fn permits(store: &PgStore, worker: Uuid, wishes: &[PermitWish]) -> Result<Vec<Permits>, Error> {
    let int = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    let subscriptions: Vec<SubscriptionId> = wishes.iter().map(|w| w.subscription).collect();
    let mut work = store.work().await?;
    // Locked first, read second: what another worker was given meanwhile is seen.
    let lock = format!(
        "select from {}.flow_limit f where f.subscription = any ($1) order by f.subscription for update",
        store.schema
    );
    store.dynamic(lock).bind(&subscriptions).execute(work.on()).await?;
    let rows = store
        .query(store.sql.permits)
        .bind(worker)
        .bind(&subscriptions)
        .bind(wishes.iter().map(|w| int(w.wanted)).collect::<Vec<_>>())
        .bind(wishes.iter().map(|w| int(w.keep)).collect::<Vec<_>>())
        .fetch_all(work.on())
        .await?;
    work.commit().await?;
    let read = |row: sqlx::postgres::PgRow| {
        Ok(Permits {
            subscription: row.try_get("subscription")?,
            granted: row.try_get::<i32, _>("permits")?.max(0) as u32,
            fair: row.try_get::<Option<i32>, _>("fair")?.map(|n| n.max(0) as u32),
        })
    };
    rows.into_iter().map(read).collect()
}

/// Puts back the tokens that a claim did not use.
pub(super) async fn give_back(
    store: &PgStore,
    work: &mut Work,
    taken: &Taken,
    used: impl Fn(SubscriptionId) -> u32,
) -> Result<(), Error> {
    for (subscription, left) in taken.left(used) {
        let sql = format!("update {}.flow_limit set tokens = tokens + $2 where subscription = $1", store.schema);
        store.dynamic(sql).bind(subscription).bind(f64::from(left)).execute(work.on()).await?;
    }
    Ok(())
}

/// Takes tokens for what a claim wants of metered subscriptions; their buckets are locked until it commits.
pub(super) async fn take(store: &PgStore, work: &mut Work, request: &ClaimRequest) -> Result<Taken, Error> {
    let mut taken = Taken::default();
    let mut metered = request.metered.clone();
    // In one order for all workers.
    metered.sort_unstable();
    for subscription in metered {
        let Some((_, room)) = request.wanted.iter().find(|(id, _)| *id == subscription) else { continue };
        let most = i32::try_from(*room).unwrap_or(i32::MAX);
        let tokens = store.query(store.sql.tokens).bind(subscription).bind(most).fetch_optional(work.on()).await?;
        // Without a bucket it is not metered any more.
        let Some(row) = tokens else { continue };
        let got = row.try_get::<i32, _>("taken")?.max(0) as u32;
        let next = Duration::from_micros(row.try_get::<i64, _>("wait_us")?.max(0) as u64);
        taken.took(subscription, *room, got, next);
    }
    Ok(taken)
}
