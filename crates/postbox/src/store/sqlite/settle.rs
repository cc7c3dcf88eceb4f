//! Settling: one flush of a batch, a transactional handler's end, and moves in general.

use serde_json::{Value, json};
use sqlx::SqliteConnection;
use uuid::Uuid;

use super::doubt::keep;
use super::held::Held;
use super::publish::follow;
use super::work::Work;
use super::{SqliteStore, json_of, keys, millis, millis_up, unique};
use crate::crash;
use crate::error::Error;
use crate::lifecycle::State;
use crate::message::Draft;
use crate::planted::planted;
use crate::store::{DeliveryId, Guarded, LeaseRef, Move, Settle, Success, decide};

pub(super) async fn settle(store: &SqliteStore, settle: &Settle) -> Result<Guarded, Error> {
    let mut lease = settle.lease;
    if planted!("follow-ups-apart") {
        let mut apart = store.write().await?;
        follow(apart.on(), &settle.follow_ups).await?;
        apart.commit().await?;
    }
    let mut work = store.write().await?;
    if !write_part(work.on(), settle).await? && !planted!("part-written-twice") {
        // The answer to an earlier try was lost; it had committed.
        work.rollback().await?;
        return Ok(Guarded::Done);
    }
    if planted!("settle-without-lease") {
        // Each statement looks for the token, too: without the check it would be whoever has it now.
        lease.token = holder(work.on(), settle).await?.unwrap_or(lease.token);
    }
    if !write_outcomes(work.on(), lease, settle).await? {
        work.rollback().await?;
        return Ok(Guarded::Fenced);
    }
    unique::free(work.on(), &store.shared.uniques.ended(settle)).await?;
    if !planted!("follow-ups-apart") {
        follow(work.on(), &settle.follow_ups).await?;
    }
    begin(work.on(), lease, &settle.starts).await?;
    if settle.close {
        close(work.on(), lease.token).await?;
    }
    if settle.successes.is_empty() && settle.moves.is_empty() {
        work.commit().await?;
    } else {
        crash::commit("outcome-commit-sent", work.commit()).await?;
    }
    let ready = |m: &Move| m.standing.state == State::Pending;
    if !settle.follow_ups.is_empty() || !settle.released.is_empty() || settle.moves.iter().any(ready) {
        store.shared.bell.ring();
    }
    Ok(Guarded::Done)
}

/// Whether it was not written before.
async fn write_part(db: &mut SqliteConnection, settle: &Settle) -> Result<bool, Error> {
    let part = sqlx::query(
        "insert into postbox_part (batch, part, at) select ?1, ?2, now from postbox_clock where true on conflict do nothing",
    );
    let written = part.bind(settle.lease.batch).bind(settle.part).execute(db).await?;
    Ok(written.rows_affected() > 0)
}

/// What ended and what is handed back, if the lease is there (still).
async fn write_outcomes(db: &mut SqliteConnection, lease: LeaseRef, settle: &Settle) -> Result<bool, Error> {
    let Some(mut held) = Held::of(db, lease).await? else { return Ok(false) };
    succeed(db, lease, &mut held, &settle.successes).await?;
    let mut moves: Vec<Move> = settle.moves.clone();
    moves.extend(settle.released.iter().map(decide::released));
    let rows = moves.iter().map(|m| m.delivery).chain(settle.starts.iter().map(|(delivery, _)| *delivery));
    held.restore(db, rows).await?;
    held.keep(db).await?;
    apply(db, &moves, Some(lease)).await?;
    for seen in &settle.seen {
        keep(db, seen).await?;
    }
    Ok(true)
}

/// Whose the deliveries of a flush are, whoever sends it: for a planted bug.
async fn holder(db: &mut SqliteConnection, settle: &Settle) -> Result<Option<Uuid>, Error> {
    let ended = settle.successes.iter().map(|s| s.delivery).chain(settle.moves.iter().map(|m| m.delivery)).next();
    let token = sqlx::query_scalar("select token from postbox_every where id = ?1").bind(ended);
    Ok(token.fetch_optional(db).await?.flatten())
}

/// A lease ends when it holds nothing: what would be left behind would be nobody's.
pub(super) async fn close(db: &mut SqliteConnection, token: Uuid) -> Result<(), Error> {
    let closed = sqlx::query(
        "delete from postbox_lease
         where token = ?1 and items = '[]' and not exists (select 1 from postbox_delivery d where d.token = ?1)",
    )
    .bind(token)
    .execute(db)
    .await?
    .rows_affected();
    match closed {
        0 => Err(Error::Refused("a lease that still holds deliveries cannot end; nothing was settled".into())),
        _ => Ok(()),
    }
}

/// All of them, or none: a delivery that is not in the lease any more is a mistake in the caller.
pub(super) fn all(moved: u64, wanted: usize) -> Result<(), Error> {
    match moved == wanted as u64 {
        true => Ok(()),
        false => Err(Error::Refused(format!(
            "{moved} of {wanted} deliveries are where they were thought to be; nothing was changed"
        ))),
    }
}

async fn succeed(
    db: &mut SqliteConnection,
    lease: LeaseRef,
    held: &mut Held,
    successes: &[Success],
) -> Result<(), Error> {
    let (records, successes) = held.succeed(successes);
    for record in records {
        record.write(db, lease).await?;
    }
    if successes.is_empty() {
        return Ok(());
    }
    let rows = json_of(&successes.iter().map(|s| (s.delivery, millis(s.ran))).collect::<Vec<_>>())?;
    sqlx::query(include_str!("successes.sql"))
        .bind(&rows)
        .bind(lease.batch)
        .bind(lease.worker)
        .bind(lease.token)
        .execute(&mut *db)
        .await?;
    let moved = sqlx::query(
        "update postbox_delivery
         set state = 'succeeded', attempt = attempt + 1 - begun, begun = 0, lost = 0, rev = rev + 1, token = null,
             since = (select now from postbox_clock)
         where id in (select value ->> 0 from json_each(?1)) and token = ?2",
    )
    .bind(&rows)
    .bind(lease.token)
    .execute(db)
    .await?;
    all(moved.rows_affected(), successes.len())
}

/// Writes moves, under a lease or outside of one.
pub(super) async fn apply(db: &mut SqliteConnection, moves: &[Move], lease: Option<LeaseRef>) -> Result<(), Error> {
    if moves.is_empty() {
        return Ok(());
    }
    let rows = Value::Array(moves.iter().map(row).collect()).to_string();
    if let Some(lease) = lease {
        sqlx::query(include_str!("outcomes.sql"))
            .bind(&rows)
            .bind(lease.batch)
            .bind(lease.worker)
            .bind(lease.token)
            .execute(&mut *db)
            .await?;
    }
    let moved =
        sqlx::query(include_str!("moves.sql")).bind(&rows).bind(lease.map(|l| l.token)).execute(&mut *db).await?;
    all(moved.rows_affected(), moves.len())?;
    keys::follow(db, moves).await
}

fn row(m: &Move) -> Value {
    let mut row = json!({
        "delivery": m.delivery,
        "rev": m.rev,
        "state": m.standing.state.as_str(),
        "attempts": m.standing.attempts,
        "lost": m.standing.lost,
        "wait_ms": millis_up(m.delay),
        "quiet_ms": millis_up(m.quiet),
        "note": m.note,
    });
    if let Some(outcome) = &m.outcome {
        row["number"] = outcome.number.into();
        row["kind"] = outcome.kind.into();
        row["error"] = outcome.error.clone().into();
        row["receipt"] = outcome.receipt.as_ref().map(Value::to_string).into();
        row["ran_ms"] = millis(outcome.ran).into();
        row["ago_ms"] = millis(outcome.ago).into();
    }
    row
}

/// Attempts that begin once this is committed.
pub(super) async fn begin(
    db: &mut SqliteConnection,
    lease: LeaseRef,
    starts: &[(DeliveryId, u32)],
) -> Result<(), Error> {
    if starts.is_empty() {
        return Ok(());
    }
    let rows = json_of(starts)?;
    let begun = sqlx::query(
        "update postbox_delivery as d set begun = 1, attempt = s.value ->> 1
         from json_each(?1) s where d.id = s.value ->> 0 and d.token = ?2 and d.begun = 0",
    )
    .bind(&rows)
    .bind(lease.token)
    .execute(&mut *db)
    .await?;
    all(begun.rows_affected(), starts.len())?;
    sqlx::query(
        "insert into postbox_attempt (delivery, number, batch, worker, started_at)
         select s.value ->> 0, s.value ->> 1, ?2, ?3, c.now from json_each(?1) s cross join postbox_clock c",
    )
    .bind(&rows)
    .bind(lease.batch)
    .bind(lease.worker)
    .execute(db)
    .await?;
    Ok(())
}

/// What tells whether a handler's transaction is still the one that was opened for it.
const GUARD: &str = "SAVEPOINT postbox_guard";

pub(super) async fn open(store: &SqliteStore) -> Result<Work, Error> {
    let mut work = store.write().await?;
    sqlx::query(GUARD).execute(work.on()).await?;
    Ok(work)
}

/// Before anything is written: without the transaction, each statement would commit by itself.
async fn unguard(work: &mut Work) -> Result<(), Error> {
    if sqlx::query("RELEASE postbox_guard").execute(work.on()).await.is_err() {
        // What the handler may have begun in its place is rolled back with the connection.
        return Err(Error::Refused(
            "the handler ended its own transaction (COMMIT or ROLLBACK in raw SQL); what it committed before that is not undone, and the attempt counts as failed".into(),
        ));
    }
    Ok(())
}

pub(super) async fn settle_together(
    store: &SqliteStore,
    mut work: Work,
    settles: &[Settle],
) -> Result<Vec<Uuid>, Error> {
    unguard(&mut work).await?;
    if planted!("effects-before-outcome") {
        work.commit().await?;
        work = store.write().await?;
    }
    let mut gone = Vec::new();
    for settle in settles {
        if !write_part(work.on(), settle).await? || !write_outcomes(work.on(), settle.lease, settle).await? {
            gone.push(settle.lease.token);
            continue;
        }
        follow(work.on(), &settle.follow_ups).await?;
    }
    if !gone.is_empty() {
        work.rollback().await?;
        return Ok(gone);
    }
    crash::commit("outcome-commit-sent", work.commit()).await?;
    // The handler may have published in it.
    store.shared.bell.ring();
    Ok(gone)
}

pub(super) async fn recheck_part(store: &SqliteStore, lease: LeaseRef, part: i32) -> Result<Option<bool>, Error> {
    // Waits for a connection that is still committing; only then is the answer final.
    let mut work = store.write().await?;
    let (held, found): (bool, bool) = sqlx::query_as(
        "select exists (select 1 from postbox_lease where token = ?1),
            exists (select 1 from postbox_part where batch = ?2 and part = ?3)",
    )
    .bind(lease.token)
    .bind(lease.batch)
    .bind(part)
    .fetch_one(work.on())
    .await?;
    work.rollback().await?;
    Ok(if held || found { Some(found) } else { None })
}

pub(super) async fn settle_open(
    store: &SqliteStore,
    mut work: Work,
    lease: LeaseRef,
    outcome: &Move,
    follow_ups: &[Draft],
) -> Result<Guarded, Error> {
    unguard(&mut work).await?;
    if planted!("effects-before-outcome") {
        work.commit().await?;
        work = store.write().await?;
    }
    let Some(mut held) = Held::of(work.on(), lease).await? else {
        work.rollback().await?;
        return Ok(Guarded::Fenced);
    };
    held.restore(work.on(), std::iter::once(outcome.delivery)).await?;
    held.keep(work.on()).await?;
    let there: bool = sqlx::query_scalar("select exists (select 1 from postbox_delivery where id = ?1 and token = ?2)")
        .bind(outcome.delivery)
        .bind(lease.token)
        .fetch_one(work.on())
        .await?;
    if !there {
        work.rollback().await?;
        return Ok(Guarded::Fenced);
    }
    apply(work.on(), std::slice::from_ref(outcome), Some(lease)).await?;
    if store.shared.uniques.has(outcome.subscription) {
        unique::free(work.on(), &[outcome.delivery]).await?;
    }
    follow(work.on(), follow_ups).await?;
    crash::commit("outcome-commit-sent", work.commit()).await?;
    // The handler may have published in it.
    store.shared.bell.ring();
    Ok(Guarded::Done)
}

pub(super) async fn recheck(
    store: &SqliteStore,
    lease: LeaseRef,
    delivery: DeliveryId,
    number: u32,
) -> Result<Option<bool>, Error> {
    // Waits for a connection that is still committing; only then is the answer final.
    let mut work = store.write().await?;
    let (held, found): (bool, bool) = sqlx::query_as(
        "select exists (select 1 from postbox_lease where token = ?1),
            exists (select 1 from postbox_outcome where delivery = ?2 and number = ?3 and batch = ?4)",
    )
    .bind(lease.token)
    .bind(delivery)
    .bind(number)
    .bind(lease.batch)
    .fetch_one(work.on())
    .await?;
    work.rollback().await?;
    Ok(match (held, found) {
        (_, true) => Some(true),
        (true, false) => Some(false),
        (false, false) => None,
    })
}
