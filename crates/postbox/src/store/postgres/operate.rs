//! What an operator does to a delivery that waits or is dead: try it again, or call it off.

use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::admin::{Action, at_home, find, lost_race, moved_on, record};
use super::lanes;
use super::{PgStore, Work, keys, settle, unique};
use crate::admin::{AuditEntry, Cancel, Retry, Wish, no_delivery};
use crate::error::Error;
use crate::lifecycle::{Kind, Standing, State, transition};
use crate::store::lanes::FIRST_HELD;
use crate::store::{DeliveryId, Move, policy_of};

/// Takes a delivery out of a place that an operator may take it from.
async fn pull(store: &PgStore, work: &mut Work, delivery: DeliveryId) -> Result<Option<(PgRow, State)>, Error> {
    let schema = &store.schema;
    // What waits for its key goes back to its lane.
    let columns = format!(
        "message, subscription, attempt, rev, case when priority < {FIRST_HELD} then priority else
            (select {schema}.lane_of(m.key, delivery) from {schema}.message m where m.id = message) end as priority"
    );
    // Place by place, in separate statements: in one, a delivery on the move would be missed by all.
    for _ in 0..5 {
        for (state, sql) in [
            (
                None,
                format!("delete from {schema}.dead_letter where delivery = $1 returning {columns}, 0 as lost, state"),
            ),
            (
                Some(State::Pending),
                format!("delete from {schema}.scheduled where delivery = $1 returning {columns}, lost"),
            ),
            (
                Some(State::Pending),
                format!("delete from {schema}.ready where delivery = $1 and pos <> delivery returning {columns}, lost"),
            ),
            (
                Some(State::Pending),
                format!(
                    "delete from {schema}.ready where (subscription, priority) = (
                            select r.subscription, r.priority from {} where r.delivery = $1 limit 1)
                        and pos = $1 and slot = ($1 >> 20) & 3 and delivery = $1 returning {columns}, lost",
                    at_home("$1").replace("{schema}", schema)
                ),
            ),
        ] {
            if let Some(row) = store.dynamic(sql).bind(delivery).fetch_optional(work.on()).await? {
                let state = match state {
                    Some(state) => state,
                    None => row.try_get::<String, _>("state")?.parse().map_err(Error::Refused)?,
                };
                return Ok(Some((row, state)));
            }
        }
        if !matches!(find(store, work, delivery).await?, Some((row, _)) if matches!(row.state, State::Pending | State::Dead | State::Cancelled))
        {
            break;
        }
    }
    Ok(None)
}

pub(super) async fn retry(store: &PgStore, delivery: DeliveryId, retry: &Retry) -> Result<AuditEntry, Error> {
    carry_out(store, delivery, Wish::retry(retry)).await
}

pub(super) async fn cancel(store: &PgStore, delivery: DeliveryId, cancel: &Cancel) -> Result<AuditEntry, Error> {
    carry_out(store, delivery, Wish::cancel(cancel)).await
}

/// Those who claim from lanes lock no deliveries: they are kept away before one is taken out.
async fn hold_lanes(store: &PgStore, work: &mut Work, delivery: DeliveryId) -> Result<(), Error> {
    let Some((row, _)) = find(store, work, delivery).await? else { return Ok(()) };
    let sql = format!(
        "select s.id from {}.subscription s where s.application = $1 and s.name = $2 and s.per_key is not null",
        store.schema
    );
    let rows = store.dynamic(sql).bind(&row.application).bind(&row.subscription).fetch_all(work.on()).await?;
    for row in rows {
        lanes::hold(store, work.on(), &lanes::all(row.try_get("id")?)).await?;
    }
    Ok(())
}

async fn carry_out(store: &PgStore, delivery: DeliveryId, wish: Wish<'_>) -> Result<AuditEntry, Error> {
    let mut work = store.durable().await?;
    // A consumer in SQL holds what it has for as long as its transaction is open.
    store.query("set local lock_timeout = 5000").execute(work.on()).await?;
    hold_lanes(store, &mut work, delivery).await?;
    let pulled = match pull(store, &mut work, delivery).await {
        Err(Error::Database(error))
            if error.as_database_error().is_some_and(|e| e.code().as_deref() == Some("55P03")) =>
        {
            let error = Error::Conflict(format!(
                "delivery {delivery} is in the hands of an open transaction; try again when that has ended"
            ));
            return Err(lost_race(store, work, wish.actor, wish.refused, wish.reason, delivery, error).await);
        }
        pulled => pulled?,
    };
    let Some((row, state)) = pulled else {
        let Some((found, _)) = find(store, &mut work, delivery).await? else {
            work.rollback().await?;
            return Err(no_delivery(delivery));
        };
        let error = wish.refusal(delivery, found.state);
        return Err(lost_race(store, work, wish.actor, wish.refused, wish.reason, delivery, error).await);
    };
    let rev: i32 = row.try_get("rev")?;
    if let Some(seen) = wish.rev.filter(|seen| *seen != rev) {
        let error = moved_on(delivery, seen, rev);
        return Err(lost_race(store, work, wish.actor, wish.refused, wish.reason, delivery, error).await);
    }
    let subscription: i32 = row.try_get("subscription")?;
    // What was lost may still be on its way, for as long as its worker may only be paused.
    let sql = format!(
        "select s.kind, s.idempotent, s.removed_at is not null as removed, s.quiet_ms + s.timeout_ms
            + coalesce((select pg_catalog.max(w.lease_ms) from {0}.worker w), 30000::bigint) as late_ms
         from {0}.subscription s where s.id = $1",
        store.schema
    );
    let declared = store.dynamic(sql).bind(subscription).fetch_one(work.on()).await?;
    let kind: Kind = declared.try_get::<String, _>("kind")?.parse().map_err(Error::Refused)?;
    let policy = policy_of(kind, declared.try_get("idempotent")?, 1, 0, 0);
    let number = |name| row.try_get::<i32, _>(name).map(|n| n.max(0) as u32);
    let now = Standing { state, attempts: number("attempt")?, begun: false, lost: number("lost")? };
    let Ok(next) = transition(now, wish.event, &policy, 0.0) else {
        let error = wish.refusal(delivery, state);
        return Err(lost_race(store, work, wish.actor, wish.refused, wish.reason, delivery, error).await);
    };
    if let Some(error) = declared.try_get::<bool, _>("removed")?.then(|| wish.nobody(delivery)).flatten() {
        return Err(lost_race(store, work, wish.actor, wish.refused, wish.reason, delivery, error).await);
    }
    let message = row.try_get("message")?;
    // One that waits has its key already.
    if matches!(state, State::Dead | State::Cancelled)
        && next.standing.state == State::Pending
        && let Some(error) = unique::again(store, &mut work, (delivery, subscription, message)).await?
    {
        return Err(lost_race(store, work, wish.actor, wish.refused, wish.reason, delivery, error).await);
    }
    let moved = Move {
        delivery,
        message,
        subscription,
        priority: row.try_get("priority")?,
        rev: rev + 1,
        standing: next.standing,
        delay: next.delay,
        quiet: Duration::from_millis(declared.try_get::<i64, _>("late_ms")?.max(0) as u64),
        note: wish.note,
        outcome: None,
        leads: false,
    };
    settle::apply(store, work.on(), &[moved], None).await?;
    if next.standing.state == State::Pending {
        keys::retried(store, &mut work, delivery).await?;
    }
    let action = Action {
        actor: wish.actor,
        action: wish.action,
        reason: wish.reason,
        delivery: Some(delivery),
        subscription: Some(subscription),
        rev: Some((rev, rev + 1)),
        state: Some((state, next.standing.state)),
        detail: None,
    };
    let entry = record(store, &mut work, action).await?;
    work.commit().await?;
    Ok(entry)
}
