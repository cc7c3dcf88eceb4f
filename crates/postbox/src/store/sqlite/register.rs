//! Registering a worker with its subscriptions, and its sign of life.

use uuid::Uuid;

use super::{SqliteStore, json_of, millis};
use crate::error::Error;
use crate::store::{Declared, Pulse, Registration, Start, SubscriptionId};

pub(super) async fn register(store: &SqliteStore, registration: &Registration) -> Result<Vec<SubscriptionId>, Error> {
    // Locked before it is on record: a row without a lock would be taken for dead.
    let lock = store.shared.alive.lock(registration.worker)?;
    let mut work = store.write().await?;
    let epoch: i64 = sqlx::query_scalar("select epoch from postbox_routing").fetch_one(work.on()).await?;
    let mut ids = Vec::with_capacity(registration.subscriptions.len());
    let mut rerouted = false;
    for declared in &registration.subscriptions {
        let (id, changed) = subscribe(work.on(), &registration.application, declared, epoch + 1).await?;
        ids.push(id);
        rerouted |= changed;
    }
    if rerouted {
        sqlx::query("update postbox_routing set epoch = ?1").bind(epoch + 1).execute(work.on()).await?;
    }
    sqlx::query(
        "insert into postbox_worker (id, name, application, subscriptions, lease_ms, lock_file, started_at)
         select ?1, ?2, ?3, ?4, ?5, ?6, now from postbox_clock",
    )
    .bind(registration.worker)
    .bind(&registration.name)
    .bind(&registration.application)
    .bind(json_of(&ids)?)
    .bind(millis(registration.lease))
    .bind(lock.name())
    .execute(work.on())
    .await?;
    work.commit().await?;
    store.shared.alive.keep(registration.worker, lock);
    Ok(ids)
}

/// Finds, renames, changes or makes one subscription; whether publishers must fan out anew.
async fn subscribe(
    connection: &mut sqlx::SqliteConnection,
    application: &str,
    declared: &Declared,
    next_epoch: i64,
) -> Result<(SubscriptionId, bool), Error> {
    let mut names = vec![declared.name.as_str()];
    names.extend(declared.renamed_from.iter().map(String::as_str));
    let found: Option<(SubscriptionId, String)> = sqlx::query_as(
        "select s.id, s.pattern
         from json_each(?2) n join postbox_subscription s on s.application = ?1 and s.name = n.value
         where s.removed_at is null order by n.key limit 1",
    )
    .bind(application)
    .bind(json_of(&names)?)
    .fetch_optional(&mut *connection)
    .await?;
    let segments = json_of(&declared.pattern.segments().collect::<Vec<_>>())?;
    let retry = declared.policy.retry;
    if let Some((id, pattern)) = found {
        let changed = pattern != declared.pattern.as_str();
        // A changed pattern takes the unrouted messages that only the new one matches.
        sqlx::query(
            "update postbox_subscription
             set name = ?2, kind = ?3, max_attempts = ?4, retry_base_ms = ?5, retry_cap_ms = ?6, reconciles = ?7,
                 continues = ?8, pattern = ?9, segments = ?10,
                 epoch = case when ?11 then ?12 else epoch end,
                 start = case when ?11 then 'unrouted' else start end,
                 backfilled = case when ?11 then false else backfilled end,
                 backfill_after = case when ?11 then 0 else backfill_after end
             where id = ?1",
        )
        .bind(id)
        .bind(&declared.name)
        .bind(declared.policy.kind.as_str())
        .bind(retry.max_attempts)
        .bind(millis(retry.base))
        .bind(millis(retry.cap))
        .bind(declared.reconciles)
        .bind(declared.continues)
        .bind(declared.pattern.as_str())
        .bind(segments)
        .bind(changed)
        .bind(next_epoch)
        .execute(connection)
        .await?;
        return Ok((id, changed));
    }
    let (start, start_at) = match declared.start {
        Start::Unrouted => ("unrouted", None),
        Start::Now => ("now", None),
        Start::Beginning => ("beginning", None),
        Start::Time(time) => ("time", Some(time.as_millisecond())),
    };
    let id = sqlx::query_scalar(
        "insert into postbox_subscription (application, name, pattern, segments, kind, max_attempts, retry_base_ms,
             retry_cap_ms, reconciles, continues, start, start_at, epoch, backfilled, created_at)
         select ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?11 = 'now', now from postbox_clock
         returning id",
    )
    .bind(application)
    .bind(&declared.name)
    .bind(declared.pattern.as_str())
    .bind(segments)
    .bind(declared.policy.kind.as_str())
    .bind(retry.max_attempts)
    .bind(millis(retry.base))
    .bind(millis(retry.cap))
    .bind(declared.reconciles)
    .bind(declared.continues)
    .bind(start)
    .bind(start_at)
    .bind(next_epoch)
    .fetch_one(connection)
    .await?;
    Ok((id, true))
}

/// Reads only: a handler that holds the writer for long keeps nobody from living.
pub(super) async fn beat(store: &SqliteStore, worker: Uuid) -> Result<Option<Pulse>, Error> {
    let rows: Vec<(Option<Uuid>,)> = sqlx::query_as(
        "select l.token from postbox_worker w left join postbox_lease l on l.worker = w.id where w.id = ?1",
    )
    .bind(worker)
    .fetch_all(&store.reader)
    .await?;
    Ok((!rows.is_empty()).then(|| Pulse { tokens: rows.into_iter().filter_map(|(token,)| token).collect() }))
}

/// A worker that ends: its row goes if it holds nothing; otherwise its life ends now, and what it
/// holds is taken over.
pub(super) async fn retire(store: &SqliteStore, worker: Uuid) -> Result<(), Error> {
    let mut work = store.write().await?;
    let gone = sqlx::query(
        "delete from postbox_worker
         where id = ?1 and not exists (select 1 from postbox_lease l where l.worker = postbox_worker.id)",
    )
    .bind(worker)
    .execute(work.on())
    .await?
    .rows_affected();
    let left: i64 = sqlx::query_scalar("select count(*) from postbox_worker where id = ?1")
        .bind(worker)
        .fetch_one(work.on())
        .await?;
    work.commit().await?;
    store.shared.alive.let_go(worker, gone > 0 || left == 0);
    Ok(())
}
