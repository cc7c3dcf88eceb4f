//! What an operator does to a delivery that waits or is dead: try it again, or call it off.

use std::time::Duration;

use super::admin::{Action, lost_race, moved_on, record};
use super::work::Work;
use super::{SqliteStore, keys, settle, unique};
use crate::admin::{AuditEntry, Cancel, Retry, Wish, no_delivery};
use crate::error::Error;
use crate::lifecycle::{Kind, Standing, State, transition};
use crate::store::{DeliveryId, Move, SubscriptionId, policy_of};

row! {
    pub(super) struct Stands {
        pub(super) message: uuid::Uuid,
        pub(super) subscription: SubscriptionId,
        pub(super) state: String,
        priority: i16,
        attempt: u32,
        lost: u32,
        rev: i32,
        kind: String,
        idempotent: bool,
        removed: bool,
        late_ms: i64,
    }
}

pub(super) async fn stands(work: &mut Work, delivery: DeliveryId) -> Result<Option<(Stands, State)>, Error> {
    let found: Option<Stands> = sqlx::query_as(
        // What was lost may still be on its way.
        "select d.message, d.subscription, d.state, d.priority, d.attempt, d.lost, d.rev, s.kind, s.idempotent,
             s.removed_at is not null as removed,
             s.quiet_ms + s.timeout_ms + coalesce((select max(w.lease_ms) from postbox_worker w), 30000) as late_ms
         from postbox_every d cross join postbox_subscription s on s.id = d.subscription
         where d.id = ?1 and d.lowest <= ?1 and d.highest >= ?1",
    )
    .bind(delivery)
    .fetch_optional(work.on())
    .await?;
    found.map(|found| found.state.parse().map(|state| (found, state)).map_err(Error::Refused)).transpose()
}

pub(super) async fn retry(store: &SqliteStore, delivery: DeliveryId, retry: &Retry) -> Result<AuditEntry, Error> {
    carry_out(store, delivery, Wish::retry(retry)).await
}

pub(super) async fn cancel(store: &SqliteStore, delivery: DeliveryId, cancel: &Cancel) -> Result<AuditEntry, Error> {
    carry_out(store, delivery, Wish::cancel(cancel)).await
}

async fn carry_out(store: &SqliteStore, delivery: DeliveryId, wish: Wish<'_>) -> Result<AuditEntry, Error> {
    let mut work = store.write().await?;
    let Some((found, state)) = stands(&mut work, delivery).await? else {
        work.rollback().await?;
        return Err(no_delivery(delivery));
    };
    let kind: Kind = found.kind.parse().map_err(Error::Refused)?;
    let policy = policy_of(kind, found.idempotent, 1, 0, 0);
    let now = Standing { state, attempts: found.attempt, begun: false, lost: found.lost };
    let refused = |error| {
        let who = (wish.actor, wish.refused, wish.reason);
        (who, error)
    };
    let waits = matches!(state, State::Pending | State::Dead | State::Cancelled);
    let error = match wish.rev {
        Some(seen) if waits && seen != found.rev => Some(moved_on(delivery, seen, found.rev)),
        _ if transition(now, wish.event, &policy, 0.0).is_err() => Some(wish.refusal(delivery, state)),
        _ if found.removed => wish.nobody(delivery),
        _ => None,
    };
    if let Some((who, error)) = error.map(refused) {
        return Err(lost_race(store, work, who, delivery, error).await);
    }
    let next = transition(now, wish.event, &policy, 0.0).map_err(|e| Error::Refused(e.to_string()))?;
    // One that waits has its key already.
    let own = (delivery, found.subscription, found.message);
    if matches!(state, State::Dead | State::Cancelled)
        && next.standing.state == State::Pending
        && let Some(error) = unique::again(work.on(), own).await?
    {
        let (who, error) = refused(error);
        return Err(lost_race(store, work, who, delivery, error).await);
    }
    let moved = Move {
        delivery,
        message: found.message,
        subscription: found.subscription,
        priority: found.priority,
        rev: found.rev + 1,
        standing: next.standing,
        delay: next.delay,
        quiet: Duration::from_millis(found.late_ms.max(0) as u64),
        note: wish.note,
        outcome: None,
        leads: false,
    };
    settle::apply(work.on(), &[moved], None).await?;
    if next.standing.state == State::Pending {
        keys::retried(work.on(), delivery).await?;
    }
    let action = Action {
        actor: wish.actor,
        action: wish.action,
        reason: wish.reason,
        delivery: Some(delivery),
        subscription: Some(found.subscription),
        rev: Some((found.rev, found.rev + 1)),
        state: Some((state, next.standing.state)),
        detail: None,
    };
    let entry = record(&mut work, action).await?;
    work.commit().await?;
    store.shared.bell.ring();
    Ok(entry)
}
