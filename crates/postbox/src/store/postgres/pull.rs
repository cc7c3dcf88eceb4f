//! Pulling: one delivery leased beside the caller's transaction, and completed in it.

use std::time::Duration;

use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::read::Items;
use super::{PgStore, promote, unique};
use crate::error::Error;
use crate::lifecycle::Kind;
use crate::priority::Priority;
use crate::store::{Completion, Fate, LeaseRef, Move, PullRequest, PulledOne, SubscriptionId, policy_of};

pub(super) async fn stored(
    store: &PgStore,
    application: &str,
    name: &str,
) -> Result<Option<(SubscriptionId, Kind)>, Error> {
    let mut work = store.work().await?;
    let sql = format!(
        "select id, kind from {}.subscription where application = $1 and name = $2 and removed_at is null",
        store.schema
    );
    let row = store.dynamic(sql).bind(application).bind(name).fetch_optional(work.on()).await?;
    work.rollback().await?;
    row.map(|row| Ok((row.try_get("id")?, row.try_get::<String, _>("kind")?.parse().map_err(Error::Refused)?)))
        .transpose()
}

pub(super) async fn waiting(store: &PgStore, subscription: SubscriptionId) -> Result<(bool, Option<Duration>), Error> {
    let mut work = store.work().await?;
    let row = store.query(store.sql.waiting).bind(subscription).fetch_optional(work.on()).await?;
    work.rollback().await?;
    let Some(row) = row else { return Ok((false, None)) };
    let wait: Option<i64> = row.try_get("wait_ms")?;
    let due = wait.is_some_and(|ms| ms <= 0);
    Ok((row.try_get::<bool, _>("ready")? || due, wait.map(|ms| Duration::from_millis(ms.max(0) as u64))))
}

/// A savepoint is refused outside of a transaction, where the success would commit by itself.
pub(super) async fn admit(caller: &mut PgConnection) -> Result<(), Error> {
    let looked = sqlx::raw_sql("SAVEPOINT postbox_next; RELEASE SAVEPOINT postbox_next").execute(caller).await;
    looked.map(|_| ()).map_err(|error| match error.as_database_error().and_then(|e| e.code()).as_deref() {
        Some("25P01") => Error::Refused(
            "`next` needs a transaction: what it leases is completed by that one's commit; begin one, and pass it"
                .into(),
        ),
        _ => Error::from(error),
    })
}

pub(super) async fn pull(store: &PgStore, request: PullRequest) -> Result<Option<PulledOne>, Error> {
    let mut work = store.claiming().await?;
    promote::promote(store, &mut work).await?;
    let share = store.turns.share(request.subscription, 1);
    let row = store
        .query(store.sql.pull)
        .bind(request.worker)
        .bind(request.token)
        .bind(request.subscription)
        .bind((share.most > 0).then(|| share.level.level()))
        .fetch_optional(work.on())
        .await?;
    let Some(row) = row else {
        let sql = format!(
            "select exists (select from {}.worker where id = $1 and expires_at > pg_catalog.clock_timestamp()) as lives",
            store.schema
        );
        let lives: bool = store.dynamic(sql).bind(request.worker).fetch_one(work.on()).await?.try_get("lives")?;
        // What was promoted stays so.
        work.commit().await?;
        return if lives { Ok(None) } else { Err(taken_over()) };
    };
    work.commit().await?;
    store.turns.took(request.subscription, share, 1, Priority::of(row.try_get("priority")?));
    let kind: Kind = row.try_get::<String, _>("kind")?.parse().map_err(Error::Refused)?;
    Ok(Some(PulledOne {
        lease: LeaseRef { worker: request.worker, batch: row.try_get("batch")?, token: request.token },
        item: Items::of(&row)?.read(&row)?,
        policy: policy_of(
            kind,
            false,
            row.try_get("max_tries")?,
            row.try_get("retry_base_ms")?,
            row.try_get("retry_cap_ms")?,
        ),
    }))
}

fn taken_over() -> Error {
    Error::Conflict(
        "this process was silent for longer than its lease; its heartbeat registers it again, try then".into(),
    )
}

pub(super) async fn complete(
    store: &PgStore,
    caller: &mut PgConnection,
    lease: LeaseRef,
    outcome: &Move,
) -> Result<Completion, Error> {
    let number = outcome.outcome.as_ref().map_or(1, |o| o.number as i32);
    let row = store
        .query(store.sql.complete)
        .bind(lease.token)
        .bind(lease.batch)
        .bind(lease.worker)
        .bind(outcome.delivery)
        .bind(number)
        .bind(outcome.rev)
        .bind(outcome.subscription)
        .bind(outcome.message)
        .fetch_one(&mut *caller)
        .await?;
    if row.try_get::<i64, _>("held")? > 0 {
        if store.uniques.has(outcome.subscription) {
            unique::free(store, caller, vec![outcome.delivery]).await?;
        }
        return Ok(Completion::Done);
    }
    let mut work = store.work().await?;
    let sql = format!("select 1 from {}.lease where token = $1", store.schema);
    let there = store.dynamic(sql).bind(lease.token).fetch_optional(work.on()).await?.is_some();
    work.rollback().await?;
    Ok(if there { Completion::Unseen } else { Completion::Fenced })
}

pub(super) async fn fates(store: &PgStore, tokens: &[Uuid]) -> Result<Vec<(Uuid, Fate)>, Error> {
    let mut work = store.work().await?;
    let mut found = Vec::new();
    // Deleted and not yet committed: there, and locked.
    for lock in ["", "for key share skip locked"] {
        let sql = format!("select token from {}.lease where token = any ($1) {lock}", store.schema);
        let rows = store.dynamic(sql).bind(tokens.to_vec()).fetch_all(work.on()).await?;
        found.push(rows.iter().map(|r| r.try_get("token")).collect::<Result<Vec<Uuid>, _>>()?);
    }
    work.rollback().await?;
    let fate = |token: &Uuid| match (found[0].contains(token), found[1].contains(token)) {
        (_, true) => Fate::RolledBack,
        (true, false) => Fate::Open,
        (false, false) => Fate::Gone,
    };
    Ok(tokens.iter().map(|token| (*token, fate(token))).collect())
}
