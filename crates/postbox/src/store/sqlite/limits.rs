//! Limits across workers: permits for what runs at once, tokens for what begins in a time.

use std::time::Duration;

use sqlx::SqliteConnection;
use uuid::Uuid;

use super::SqliteStore;
use crate::error::Error;
use crate::limits::Limits;
use crate::store::tokens::Taken;
use crate::store::{ClaimRequest, PermitWish, Permits, SubscriptionId};

/// Writes what a subscription declares.
pub(super) async fn declare(
    db: &mut SqliteConnection,
    subscription: SubscriptionId,
    limits: &Limits,
) -> Result<(), Error> {
    if limits.is_none() {
        // Its permits are nobody's then; they go with their workers.
        sqlx::query("delete from postbox_flow_limit where subscription = ?1").bind(subscription).execute(db).await?;
        return Ok(());
    }
    sqlx::query(
        "insert into postbox_flow_limit (subscription, at_once, token_us, burst, tokens, refilled_at)
         select ?1, ?2, ?3, ?4, coalesce(?4, 0), now from postbox_clock where true
         on conflict do update set at_once = excluded.at_once, token_us = excluded.token_us, burst = excluded.burst,
             tokens = min(tokens, excluded.tokens)",
    )
    .bind(subscription)
    .bind(limits.at_once)
    .bind(limits.rate.map(|rate| rate.token_us()))
    .bind(limits.rate.map(|rate| rate.burst()))
    .execute(db)
    .await?;
    Ok(())
}

row! {
    /// How a limit stands for one of the workers.
    struct Standing {
        at_once: Option<u32>,
        held: i64,
        short: bool,
        others: u32,
        lives: bool,
    }
}

pub(super) async fn permits(store: &SqliteStore, worker: Uuid, wishes: &[PermitWish]) -> Result<Vec<Permits>, Error> {
    let mut work = store.write().await?;
    sqlx::query("delete from postbox_permit where worker not in (select id from postbox_worker)")
        .execute(work.on())
        .await?;
    let mut answer = Vec::with_capacity(wishes.len());
    for wish in wishes {
        let standing: Standing = sqlx::query_as(
            "select f.at_once, coalesce(sum(p.permits), 0) as held, coalesce(max(p.wanted > p.permits), 0) as short,
                 count(p.worker) as others, exists (select 1 from postbox_worker where id = ?2) as lives
             from (select ?1 as id) s
             left join postbox_flow_limit f on f.subscription = s.id
             left join postbox_permit p on p.subscription = s.id and p.worker <> ?2
             group by s.id",
        )
        .bind(wish.subscription)
        .bind(worker)
        .fetch_one(work.on())
        .await?;
        let Standing { at_once, held, short, others, lives } = standing;
        if !lives {
            continue;
        }
        // The same for all who want, rounded up.
        let fair = at_once.filter(|_| short).map(|most| most.div_ceil(others + 1));
        let left = at_once.map_or(wish.wanted, |most| most.saturating_sub(u32::try_from(held).unwrap_or(u32::MAX)));
        let granted = wish.wanted.min(left).min(fair.unwrap_or(u32::MAX)).max(wish.keep);
        sqlx::query(
            "insert into postbox_permit (subscription, worker, wanted, permits) values (?1, ?2, ?3, ?4)
             on conflict do update set wanted = excluded.wanted, permits = excluded.permits",
        )
        .bind(wish.subscription)
        .bind(worker)
        .bind(wish.wanted)
        .bind(granted)
        .execute(work.on())
        .await?;
        answer.push(Permits { subscription: wish.subscription, granted, fair });
    }
    work.commit().await?;
    Ok(answer)
}

/// Puts back the tokens that a claim did not use.
pub(super) async fn give_back(
    db: &mut SqliteConnection,
    taken: &Taken,
    used: impl Fn(SubscriptionId) -> u32,
) -> Result<(), Error> {
    for (subscription, left) in taken.left(used) {
        sqlx::query("update postbox_flow_limit set tokens = tokens + ?2 where subscription = ?1")
            .bind(subscription)
            .bind(left)
            .execute(&mut *db)
            .await?;
    }
    Ok(())
}

/// Takes tokens for what a claim wants of metered subscriptions.
pub(super) async fn take(db: &mut SqliteConnection, request: &ClaimRequest) -> Result<Taken, Error> {
    let mut taken = Taken::default();
    for (subscription, room) in request.wanted.iter().filter(|(id, _)| request.metered.contains(id)) {
        let bucket: Option<(f64, f64, i64)> = sqlx::query_as(
            "select cast(min(f.burst, f.tokens + max(0, c.now - f.refilled_at) * 1000.0 / f.token_us) as real), f.token_us,
                 max(c.now, f.refilled_at)
             from postbox_flow_limit f cross join postbox_clock c where f.subscription = ?1 and f.token_us is not null",
        )
        .bind(subscription)
        .fetch_optional(&mut *db)
        .await?;
        // Without a bucket it is not metered any more.
        let Some((tokens, token_us, now)) = bucket else { continue };
        let got = tokens.floor().clamp(0.0, f64::from(*room)) as u32;
        let left = tokens - f64::from(got);
        sqlx::query("update postbox_flow_limit set tokens = ?2, refilled_at = ?3 where subscription = ?1")
            .bind(subscription)
            .bind(left)
            .bind(now)
            .execute(&mut *db)
            .await?;
        let next = Duration::from_micros(((1.0 - left).max(0.0) * token_us).ceil() as u64);
        taken.took(*subscription, *room, got, next);
    }
    Ok(taken)
}
