//! Deliveries in doubt: who asks, what is answered, what late outcomes prove.

use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::read::envelope;
use super::{PgStore, Work, keys, millis, settle};
use crate::error::Error;
use crate::lifecycle::{Kind, State};
use crate::store::{Answered, DeliveryId, Doubtful, MOST_SNOOZES, Observation, SubscriptionId, decide, policy_of};

pub(super) async fn doubts(
    store: &PgStore,
    subscriptions: &[SubscriptionId],
    limit: u32,
    hold: Duration,
) -> Result<Vec<Doubtful>, Error> {
    let mut work = store.work().await?;
    let rows = store
        .query(store.sql.doubts)
        .bind(subscriptions.to_vec())
        .bind(i64::from(limit))
        .bind(millis(hold))
        .fetch_all(work.on())
        .await?;
    work.commit().await?;
    rows.iter()
        .map(|row| {
            Ok(Doubtful {
                delivery: row.try_get("delivery")?,
                subscription: row.try_get("subscription")?,
                rev: row.try_get("rev")?,
                attempts: row.try_get::<i32, _>("attempt")?.max(0) as u32,
                quiet: row.try_get("quiet")?,
                asks: row.try_get::<i32, _>("asks")?.max(0) as u32,
                word: row.try_get::<Option<String>, _>("word")?.and_then(|w| serde_json::from_str(&w).ok()),
                envelope: envelope(row)?,
            })
        })
        .collect()
}

pub(super) async fn unanswered(store: &PgStore, doubt: &Doubtful, wait: Duration) -> Result<(), Error> {
    let mut work = store.work().await?;
    store
        .query(store.sql.unanswered)
        .bind(doubt.delivery)
        .bind(doubt.rev)
        .bind(i32::try_from(doubt.asks).unwrap_or(i32::MAX))
        .bind(millis(wait))
        .execute(work.on())
        .await?;
    Ok(work.commit().await?)
}

/// One doubt, locked.
pub(super) struct Locked {
    pub(super) row: PgRow,
    pub(super) rev: i32,
    pub(super) attempts: u32,
}

impl Locked {
    /// What the decision needs to know.
    fn facts(&self) -> Result<decide::Doubt, Error> {
        let row = &self.row;
        let kind: Kind = row.try_get::<String, _>("kind")?.parse().map_err(Error::Refused)?;
        let policy = policy_of(
            kind,
            row.try_get("idempotent")?,
            row.try_get("max_attempts")?,
            row.try_get("retry_base_ms")?,
            row.try_get("retry_cap_ms")?,
        );
        Ok(decide::Doubt {
            message: row.try_get("message")?,
            subscription: row.try_get("subscription")?,
            priority: row.try_get("priority")?,
            attempts: self.attempts,
            rev: self.rev,
            word: row.try_get::<Option<String>, _>("word")?.is_some(),
            policy,
        })
    }
}

pub(super) async fn lock(store: &PgStore, work: &mut Work, delivery: DeliveryId) -> Result<Option<Locked>, Error> {
    let row = store.query(store.sql.doubt_for_update).bind(delivery).fetch_optional(work.on()).await?;
    row.map(|row| {
        let rev = row.try_get("rev")?;
        let attempts = row.try_get::<i32, _>("attempt")?.max(0) as u32;
        Ok(Locked { row, rev, attempts })
    })
    .transpose()
}

/// Ends a locked doubt: the resolution, the move, and on success the follow-ups. The state after.
pub(super) async fn end(store: &PgStore, work: &mut Work, doubt: &Locked, answered: &Answered) -> Result<State, Error> {
    let row = &doubt.row;
    let moved = decide::end_of_doubt(&doubt.facts()?, answered).map_err(|e| Error::Refused(e.to_string()))?;
    let state = moved.standing.state;
    store
        .query(store.sql.resolution)
        .bind(answered.delivery)
        .bind(doubt.rev + 1)
        .bind(doubt.attempts as i32)
        .bind(row.try_get::<i32, _>("subscription")?)
        .bind(row.try_get::<uuid::Uuid, _>("message")?)
        .bind(answered.answer.as_str())
        .bind(answered.speaker.as_str())
        .bind(&answered.actor)
        .bind(&answered.reason)
        .bind(answered.receipt.as_ref().map(|r| r.to_string()))
        .bind(state.as_str())
        .execute(work.on())
        .await?;
    if state == State::Succeeded {
        settle::follow(store, work.on(), &answered.follow_ups).await?;
        keys::follow(store, work.on(), std::iter::once(&moved)).await?;
    } else {
        settle::apply(store, work.on(), &[moved], None).await?;
    }
    Ok(state)
}

pub(super) async fn answer(store: &PgStore, answered: &Answered) -> Result<bool, Error> {
    let mut work = store.durable().await?;
    let Some(doubt) = lock(store, &mut work, answered.delivery).await?.filter(|d| d.rev == answered.rev) else {
        work.rollback().await?;
        return Ok(false);
    };
    end(store, &mut work, &doubt, answered).await?;
    work.commit().await?;
    Ok(true)
}

pub(super) async fn observe(store: &PgStore, observations: &[Observation]) -> Result<(), Error> {
    for seen in observations {
        let mut work = store.durable().await?;
        keep(store, &mut work, seen).await?;
        if seen.evidence.is_some()
            && let Some(doubt) = lock(store, &mut work, seen.delivery).await?
            && let Some(answered) = decide::evidence(seen, &doubt.facts()?)
        {
            end(store, &mut work, &doubt, &answered).await?;
        }
        work.commit().await?;
    }
    Ok(())
}

/// Writes down what was seen. A handler may snooze for ever: so many of one attempt tell enough.
pub(super) async fn keep(store: &PgStore, work: &mut Work, seen: &Observation) -> Result<(), Error> {
    let sql = format!(
        "insert into {0}.observation (delivery, number, worker, kind, detail)
         select $1, $2, $3, $4, $5
         where $4 <> 'snoozed' or $6 > (
            select pg_catalog.count(*) from {0}.observation o where o.delivery = $1 and o.number = $2 and o.kind = 'snoozed')",
        store.schema
    );
    store
        .dynamic(sql)
        .bind(seen.delivery)
        .bind(seen.number as i32)
        .bind(seen.worker)
        .bind(seen.kind)
        .bind(&seen.detail)
        .bind(MOST_SNOOZES)
        .execute(work.on())
        .await?;
    Ok(())
}
