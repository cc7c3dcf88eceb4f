//! What a worker leaves behind: taken over when it died, handed back when its claim's answer was lost.

use std::time::Duration;

use sqlx::SqliteConnection;
use uuid::Uuid;

use super::held::restore_all;
use super::work::Work;
use super::{SqliteStore, settle};
use crate::error::Error;
use crate::lifecycle::{Kind, Standing, State};
use crate::store::decide::{self, Left};
use crate::store::{DeliveryId, LeaseRef, SubscriptionId, TakenOver, policy_of};

row! {
    /// A delivery that a lease still holds.
    struct Leftover {
        id: DeliveryId,
        message: Uuid,
        subscription: SubscriptionId,
        priority: i16,
        attempt: u32,
        lost: u32,
        rev: i32,
        begun: bool,
        batch: i64,
        token: Uuid,
        kind: String,
        max_attempts: i32,
        retry_base_ms: i64,
        retry_cap_ms: i64,
        quiet_ms: i64,
        ran_ms: i64,
    }
}

fn duration(millis: i64) -> Duration {
    Duration::from_millis(millis.max(0) as u64)
}

async fn leftover(db: &mut SqliteConnection, worker: Uuid, token: Option<Uuid>) -> Result<Vec<Leftover>, Error> {
    Ok(sqlx::query_as(include_str!("leftover.sql")).bind(worker).bind(token).fetch_all(db).await?)
}

pub(super) async fn take_over(store: &SqliteStore, draw: f64) -> Result<Option<TakenOver>, Error> {
    let workers: Vec<Uuid> =
        sqlx::query_scalar("select id from postbox_worker order by started_at").fetch_all(&store.reader).await?;
    for worker in workers {
        // The dead worker's lock is ours until its row is gone: nobody else takes it over meanwhile.
        let Some(dead) = store.shared.alive.dead(worker) else { continue };
        let mut work = store.write().await?;
        let row: Option<(String, i64, String)> =
            sqlx::query_as("select name, lease_ms, idempotent from postbox_worker where id = ?1")
                .bind(worker)
                .fetch_optional(work.on())
                .await?;
        let Some((name, lease_ms, idempotent)) = row else {
            work.rollback().await?;
            dead.bury();
            continue;
        };
        let idempotent: Vec<SubscriptionId> = serde_json::from_str(&idempotent).unwrap_or_default();
        let taken = settle_leftover(&mut work, worker, name, &idempotent, duration(lease_ms), draw).await?;
        work.commit().await?;
        dead.bury();
        store.shared.bell.ring();
        return Ok(Some(taken));
    }
    Ok(None)
}

async fn settle_leftover(
    work: &mut Work,
    worker: Uuid,
    name: String,
    idempotent: &[SubscriptionId],
    lease: Duration,
    draw: f64,
) -> Result<TakenOver, Error> {
    let mut taken = TakenOver { worker, name, pending: 0, in_doubt: 0, dead: 0 };
    restore_all(work.on(), worker, None).await?;
    for left in leftover(work.on(), worker, None).await? {
        let facts = left.facts(idempotent, lease)?;
        let moved = decide::lost(&facts, &taken.name, draw).map_err(|e| Error::Refused(e.to_string()))?;
        match moved.standing.state {
            State::InDoubt => taken.in_doubt += 1,
            State::Dead => taken.dead += 1,
            _ => taken.pending += 1,
        }
        if decide::unseen(&facts, &moved) {
            sqlx::query(
                "insert into postbox_observation (delivery, number, worker, kind, detail, at)
                 select ?1, ?2, ?3, 'lost', ?4, now from postbox_clock",
            )
            .bind(left.id)
            .bind(left.attempt + 1)
            .bind(worker)
            .bind(format!("worker {} died holding it; whether it had started is not known", taken.name))
            .execute(work.on())
            .await?;
        }
        let held = LeaseRef { worker, batch: left.batch, token: left.token };
        settle::apply(work.on(), &[moved], Some(held)).await?;
    }
    sqlx::query("delete from postbox_lease where worker = ?1").bind(worker).execute(work.on()).await?;
    sqlx::query("delete from postbox_worker where id = ?1").bind(worker).execute(work.on()).await?;
    Ok(taken)
}

impl Leftover {
    /// What the decision needs to know. The process is gone, and its timeout with it; what it had sent
    /// may still be on its way.
    fn facts(&self, idempotent: &[SubscriptionId], lease: Duration) -> Result<Left, Error> {
        let kind: Kind = self.kind.parse().map_err(Error::Refused)?;
        // By what it was begun under, whatever was declared since.
        let declared = idempotent.contains(&self.subscription);
        Ok(Left {
            delivery: self.id,
            message: self.message,
            subscription: self.subscription,
            priority: self.priority,
            rev: self.rev,
            standing: Standing { state: State::Running, attempts: self.attempt, begun: self.begun, lost: self.lost },
            policy: policy_of(kind, declared, self.max_attempts, self.retry_base_ms, self.retry_cap_ms),
            ran: duration(self.ran_ms),
            quiet: decide::quiet_after_loss(lease, Duration::ZERO, duration(self.quiet_ms)),
        })
    }
}

/// Hands back what was pulled and never handed out, as if it had not been leased.
pub(super) async fn forgo(store: &SqliteStore, worker: Uuid, token: Uuid) -> Result<(), Error> {
    let mut work = store.write().await?;
    sqlx::query(
        "delete from postbox_attempt where (delivery, number) in (
             select d.id, d.attempt from postbox_lease l join postbox_delivery d on d.token = l.token
             where l.token = ?1 and l.worker = ?2 and d.begun)",
    )
    .bind(token)
    .bind(worker)
    .execute(work.on())
    .await?;
    sqlx::query(
        "update postbox_delivery set begun = 0, attempt = attempt - 1
         where begun and token = (select token from postbox_lease where token = ?1 and worker = ?2)",
    )
    .bind(token)
    .bind(worker)
    .execute(work.on())
    .await?;
    hand_back(store, work, worker, token).await
}

/// Hands back one lease's deliveries, none of which has started.
pub(super) async fn disown(store: &SqliteStore, worker: Uuid, token: Uuid) -> Result<(), Error> {
    let work = store.write().await?;
    hand_back(store, work, worker, token).await
}

async fn hand_back(store: &SqliteStore, mut work: Work, worker: Uuid, token: Uuid) -> Result<(), Error> {
    let held: Option<i64> = sqlx::query_scalar("select batch from postbox_lease where token = ?1 and worker = ?2")
        .bind(token)
        .bind(worker)
        .fetch_optional(work.on())
        .await?;
    let Some(batch) = held else {
        work.rollback().await?;
        return Ok(());
    };
    restore_all(work.on(), worker, Some(token)).await?;
    let mut moves = Vec::new();
    for left in leftover(work.on(), worker, Some(token)).await? {
        match decide::handed_back(&left.facts(&[], Duration::ZERO)?) {
            Ok(moved) => moves.push(moved),
            Err(_) => {
                work.rollback().await?;
                return Err(Error::Refused(format!(
                    "delivery {} has begun and cannot be handed back; it is taken over when its worker ends",
                    left.id
                )));
            }
        }
    }
    settle::apply(work.on(), &moves, Some(LeaseRef { worker, batch, token })).await?;
    settle::close(work.on(), token).await?;
    work.commit().await?;
    store.shared.bell.ring();
    Ok(())
}
