//! Pulling: one delivery leased beside the caller's transaction, and completed in it.
//!
//! There is one writer. The lease is taken on a connection of the store's own, so the caller's
//! transaction must not have begun to read or to write; the completion then makes it the writer.

use std::time::{Duration, Instant};

use sqlx::SqliteConnection;
use uuid::Uuid;

use super::work::Work;
use super::{SqliteStore, claim, json_of, settle};
use crate::error::Error;
use crate::lifecycle::Kind;
use crate::store::{ClaimRequest, Completion, Fate, LeaseRef, Move, PullRequest, PulledOne, SubscriptionId, policy_of};

/// How long to wait for the write lock before asking whether it is the caller who holds it.
const SOON: Duration = Duration::from_millis(50);

pub(super) async fn stored(
    store: &SqliteStore,
    application: &str,
    name: &str,
) -> Result<Option<(SubscriptionId, Kind)>, Error> {
    let found: Option<(SubscriptionId, String)> = sqlx::query_as(
        "select id, kind from postbox_subscription where application = ?1 and name = ?2 and removed_at is null",
    )
    .bind(application)
    .bind(name)
    .fetch_optional(&store.reader)
    .await?;
    found.map(|(id, kind)| Ok((id, kind.parse().map_err(Error::Refused)?))).transpose()
}

pub(super) async fn waiting(
    store: &SqliteStore,
    subscription: SubscriptionId,
) -> Result<(bool, Option<Duration>), Error> {
    let (due, wait): (bool, Option<i64>) =
        sqlx::query_as(include_str!("due.sql")).bind(json_of(&[subscription])?).fetch_one(&store.reader).await?;
    Ok((due, wait.map(|ms| Duration::from_millis(ms.max(0) as u64))))
}

pub(super) async fn admit(caller: &mut SqliteConnection, writes: bool) -> Result<(), Error> {
    // Refused inside of a transaction, where it stops before the ROLLBACK.
    if sqlx::raw_sql("BEGIN; ROLLBACK").execute(&mut *caller).await.is_ok() {
        return Err(Error::Refused(
            "`next` needs a transaction: what it leases is completed by that one's commit; begin one, and pass it"
                .into(),
        ));
    }
    if writes { untouched(caller).await } else { Ok(()) }
}

/// Whether a transaction has neither read nor written yet.
async fn untouched(caller: &mut SqliteConnection) -> Result<(), Error> {
    // A checkpoint is refused (SQLITE_LOCKED) to a connection that reads or writes.
    let looked = sqlx::query("PRAGMA wal_checkpoint(PASSIVE)").fetch_one(caller).await;
    looked.map(|_| ()).map_err(|error| match error.as_database_error().and_then(|e| e.code()).as_deref() {
        Some("6") => Error::BusyTransaction(error),
        _ => Error::from(error),
    })
}

pub(super) async fn pull(
    store: &SqliteStore,
    caller: &mut SqliteConnection,
    request: PullRequest,
) -> Result<Option<PulledOne>, Error> {
    // Looking does not need the writer.
    if !waiting(store, request.subscription).await?.0 {
        return Ok(None);
    }
    let mut work = write(store, caller).await?;
    let wanted = ClaimRequest {
        worker: request.worker,
        token: request.token,
        wanted: vec![(request.subscription, 1)],
        metered: Vec::new(),
        by_key: Vec::new(),
        full: Vec::new(),
        sorts: true,
    };
    let found: Option<(String, i32, i64, i64, bool)> = sqlx::query_as(
        "select s.kind, s.max_attempts, s.retry_base_ms, s.retry_cap_ms,
             exists (select 1 from postbox_worker where id = ?2)
         from postbox_subscription s where s.id = ?1",
    )
    .bind(request.subscription)
    .bind(request.worker)
    .fetch_optional(work.on())
    .await?;
    let Some((kind, max_attempts, base_ms, cap_ms, lives)) = found else {
        work.rollback().await?;
        return Ok(None);
    };
    if !lives {
        work.rollback().await?;
        return Err(Error::Conflict(
            "this process was taken for dead; its heartbeat registers it again, try then".into(),
        ));
    }
    let kind: Kind = kind.parse().map_err(Error::Refused)?;
    if kind == Kind::Operation {
        // An operation's attempt needs a handler that the engine calls.
        work.rollback().await?;
        return Ok(None);
    }
    let claimed = claim::claim_in(&mut work, &store.shared, &wanted, claim::Keep::InRow).await?;
    let lease = LeaseRef { worker: request.worker, batch: claimed.batch, token: request.token };
    let Some(item) = claimed.items.into_iter().next() else {
        work.commit().await?;
        return Ok(None);
    };
    settle::begin(work.on(), lease, &[(item.delivery, item.attempts + 1)]).await?;
    work.commit().await?;
    let own = item.envelope.as_ref().and_then(|e| e.max_attempts).and_then(|n| i32::try_from(n).ok());
    let policy = policy_of(kind, false, own.unwrap_or(max_attempts), base_ms, cap_ms);
    Ok(Some(PulledOne { lease, item, policy }))
}

/// The write lock; an error at once when it is the caller who holds it.
async fn write(store: &SqliteStore, caller: &mut SqliteConnection) -> Result<Work, Error> {
    let give_up = Instant::now() + store.shared.busy.max(SOON);
    loop {
        if let Some(work) = Work::write_soon(&store.writer, SOON, store.shared.busy).await? {
            return Ok(work);
        }
        untouched(caller).await?;
        if Instant::now() >= give_up {
            return Err(Error::Busy(sqlx::Error::PoolTimedOut));
        }
    }
}

pub(super) async fn complete(
    caller: &mut SqliteConnection,
    lease: LeaseRef,
    outcome: &Move,
) -> Result<Completion, Error> {
    // The first statement writes, so that it waits for the lock before it takes its snapshot. It changes
    // nothing, and the lease goes last: cut short anywhere, what the caller commits is still leased or done.
    let held = "update postbox_lease set worker = worker where token = ?1 and batch = ?2 and worker = ?3";
    let held = sqlx::query(held)
        .bind(lease.token)
        .bind(lease.batch)
        .bind(lease.worker)
        .execute(&mut *caller)
        .await
        .map_err(|error| match error.as_database_error().and_then(|e| e.code()).as_deref() {
            // Its snapshot is older than the lease.
            Some("517") => Error::BusyTransaction(error),
            _ => Error::from(error),
        })?
        .rows_affected();
    if held == 0 {
        return Ok(Completion::Fenced);
    }
    settle::apply(caller, std::slice::from_ref(outcome), Some(lease)).await?;
    settle::close(caller, lease.token).await?;
    Ok(Completion::Done)
}

pub(super) async fn fates(store: &SqliteStore, tokens: &[Uuid]) -> Result<Vec<(Uuid, Fate)>, Error> {
    const THERE: &str = "select l.token from postbox_lease l
         where l.token in (select unhex(value) from json_each(?1))";
    let wanted = json_of(&tokens.iter().map(|t| t.simple().to_string()).collect::<Vec<_>>())?;
    let mut there: Vec<Uuid> = sqlx::query_scalar(THERE).bind(&wanted).fetch_all(&store.reader).await?;
    let mut still = Fate::Open;
    // Whoever has the write lock knows that no transaction that completes something is open.
    if !there.is_empty()
        && let Some(mut work) = Work::write_soon(&store.writer, Duration::from_millis(1), store.shared.busy).await?
    {
        there = sqlx::query_scalar(THERE).bind(&wanted).fetch_all(work.on()).await?;
        still = Fate::RolledBack;
        work.rollback().await?;
    }
    Ok(tokens.iter().map(|token| (*token, if there.contains(token) { still } else { Fate::Gone })).collect())
}
