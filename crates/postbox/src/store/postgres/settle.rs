//! Settling: one flush of a batch, a transactional handler's end, and moves in general.

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::publish::Refusing;
use super::{BEGIN_DURABLE, PgStore, Work, doubt, keys, micros, millis, publish, unique};
use crate::crash;
use crate::error::Error;
use crate::lifecycle::State;
use crate::message::{Draft, MAX_WAIT};
use crate::planted::planted;
use crate::store::{DeliveryId, Guarded, LeaseRef, Move, OutcomeRecord, Settle, Stored, decide};

/// Which transaction a connection is in.
const XID: &str = "pg_catalog.pg_current_xact_id()::pg_catalog.text";
const OWN_XID: &str = "select pg_catalog.pg_current_xact_id()::pg_catalog.text as xid";

pub(super) async fn settle(store: &PgStore, settle: &Settle) -> Result<Guarded, Error> {
    let lease = settle.lease;
    if planted!("follow-ups-apart") {
        let mut apart = store.work().await?;
        follow(store, apart.on(), &settle.follow_ups).await?;
        apart.commit().await?;
    }
    // Those that others of their key wait for.
    let awaited = settle.moves.iter().any(|m| m.leads && plain_success(m).is_some());
    // Nothing but the one statement: it is the whole transaction, and says itself that its commit is durable.
    let ended = store.uniques.ended(settle);
    let single = store.alone()
        && ended.is_empty()
        && settle.moves.iter().all(|m| plain_success(m).is_some())
        && settle.released.is_empty()
        && settle.seen.is_empty()
        && settle.follow_ups.is_empty()
        && !awaited
        && !planted!("part-written-twice");
    let mut work = match single {
        true => Work::single(&store.pool).await?,
        false => store.durable().await?,
    };
    let part = write_part(store, &mut work, settle).await?;
    if part == Part::NotHeld {
        let found = store.query(store.sql.part_exists).bind(lease.batch).bind(settle.part).fetch_one(work.on()).await?;
        match single {
            true => work.over(),
            false => work.rollback().await?,
        }
        return Ok(if found.try_get("found")? { Guarded::Done } else { Guarded::Fenced });
    }
    if single {
        // An earlier try had committed, or this one has.
        work.over();
        return Ok(Guarded::Done);
    }
    if part == Part::Repeated && !planted!("part-written-twice") {
        // The answer to an earlier try was lost; it had committed.
        work.rollback().await?;
        return Ok(Guarded::Done);
    }
    write_rest(store, &mut work, settle).await?;
    if !planted!("follow-ups-apart") {
        follow(store, work.on(), &settle.follow_ups).await?;
    }
    if settle.successes.is_empty() && settle.moves.is_empty() {
        work.commit().await?;
    } else {
        crash::commit("outcome-commit-sent", work.commit()).await?;
    }
    Ok(Guarded::Done)
}

/// What became of a flush's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Written,
    /// An earlier try has written it.
    Repeated,
    NotHeld,
}

/// The part of a flush, and what needs nothing else: under the lease's lock.
async fn write_part(store: &PgStore, work: &mut Work, settle: &Settle) -> Result<Part, Error> {
    let lease = settle.lease;
    // What left the lease without an outcome: the lease does not hold it any more.
    let left = settle.moves.iter().filter(|m| m.outcome.is_none()).map(|m| m.delivery);
    let left = settle.released.iter().map(|i| i.delivery).chain(left);
    let (deliveries, numbers): (Vec<i64>, Vec<i32>) = settle.starts.iter().map(|(d, n)| (*d, *n as i32)).unzip();
    // Successes go nowhere: their rows are all there is to write.
    let done: Vec<(&Move, &OutcomeRecord)> = settle.moves.iter().filter_map(plain_success).collect();
    let held = store
        .query(store.sql.settle_part)
        .bind(lease.token)
        .bind(lease.batch)
        .bind(settle.part)
        .bind(lease.worker)
        .bind(settle.successes.iter().map(|s| s.delivery).collect::<Vec<_>>())
        .bind(settle.successes.iter().map(|s| s.message).collect::<Vec<_>>())
        .bind(settle.successes.iter().map(|s| s.subscription).collect::<Vec<_>>())
        .bind(settle.successes.iter().map(|s| micros(s.ran)).collect::<Vec<_>>())
        .bind(left.collect::<Vec<_>>())
        .bind(deliveries)
        .bind(numbers)
        .bind(done.iter().map(|(m, _)| m.delivery).collect::<Vec<_>>())
        .bind(done.iter().map(|(_, o)| o.number as i32).collect::<Vec<_>>())
        .bind(done.iter().map(|(m, _)| m.rev).collect::<Vec<_>>())
        .bind(done.iter().map(|(m, _)| m.subscription).collect::<Vec<_>>())
        .bind(done.iter().map(|(m, _)| m.message).collect::<Vec<_>>())
        .bind(done.iter().map(|(_, o)| micros(o.ran)).collect::<Vec<_>>())
        .bind(done.iter().map(|(_, o)| micros(o.ago)).collect::<Vec<_>>())
        .bind(done.iter().map(|(_, o)| o.receipt.as_ref().map(|r| r.to_string())).collect::<Vec<_>>())
        .bind(settle.close)
        .fetch_one(work.on())
        .await?;
    Ok(match (held.try_get::<i64, _>("held")?, held.try_get::<i64, _>("written")?) {
        (0, _) => Part::NotHeld,
        (_, 0) => Part::Repeated,
        _ => Part::Written,
    })
}

/// What goes somewhere, or was seen besides.
async fn write_rest(store: &PgStore, work: &mut Work, settle: &Settle) -> Result<(), Error> {
    let mut moves: Vec<Move> = settle.moves.iter().filter(|m| plain_success(m).is_none()).cloned().collect();
    moves.extend(settle.released.iter().map(decide::released));
    apply(store, work.on(), &moves, Some(settle.lease)).await?;
    unique::free(store, work.on(), store.uniques.ended(settle)).await?;
    // Those that others of their key wait for.
    let awaited = settle.moves.iter().filter(|m| m.leads && plain_success(m).is_some());
    keys::follow(store, work.on(), awaited).await?;
    for seen in &settle.seen {
        doubt::keep(store, work, seen).await?;
    }
    Ok(())
}

/// A success with a row of its own, and with nothing else to it.
fn plain_success(m: &Move) -> Option<(&Move, &OutcomeRecord)> {
    let outcome = m.outcome.as_ref()?;
    let plain = m.standing.state == State::Succeeded && outcome.kind == "succeeded" && outcome.error.is_none();
    plain.then_some((m, outcome))
}

/// Writes moves, under a lease or outside of one.
pub(super) async fn apply(
    store: &PgStore,
    connection: &mut PgConnection,
    moves: &[Move],
    lease: Option<LeaseRef>,
) -> Result<(), Error> {
    if moves.is_empty() {
        return Ok(());
    }
    let rows: Vec<Value> = moves.iter().enumerate().map(|(ord, m)| row(ord, m, lease)).collect();
    let placed = match moves.iter().any(|m| m.outcome.is_some()) {
        true => store.query(store.sql.moves),
        // The moves alone: rights are asked for the whole statement, and operators have none on outcomes.
        false => store.query(store.sql.only_moves),
    };
    placed.bind(Value::Array(rows)).execute(&mut *connection).await?;
    keys::follow(store, connection, moves.iter()).await
}

fn row(ord: usize, m: &Move, lease: Option<LeaseRef>) -> Value {
    let mut row = json!({
        "ord": ord,
        "delivery": m.delivery,
        "message": m.message,
        "subscription": m.subscription,
        "priority": m.priority,
        "rev": m.rev,
        "state": m.standing.state.as_str(),
        "attempts": m.standing.attempts,
        "lost": m.standing.lost,
        "wait_ms": millis(m.delay.min(MAX_WAIT)),
        "quiet_ms": millis(m.quiet.min(MAX_WAIT)),
        "note": m.note,
    });
    if let Some(outcome) = &m.outcome {
        row["number"] = outcome.number.into();
        row["kind"] = outcome.kind.into();
        row["error"] = outcome.error.clone().into();
        row["receipt"] = outcome.receipt.clone().unwrap_or(Value::Null);
        row["ran_us"] = micros(outcome.ran).into();
        row["ago_us"] = micros(outcome.ago).into();
        row["batch"] = lease.map_or(0, |l| l.batch).into();
        row["worker"] = lease.map_or(Uuid::nil(), |l| l.worker).to_string().into();
    }
    row
}

/// Publishes follow-ups in the transaction of the outcome. One whose dedup key is taken is there
/// already: that is what its key is for.
pub(super) async fn follow(store: &PgStore, connection: &mut PgConnection, drafts: &[Draft]) -> Result<(), Error> {
    for draft in drafts {
        let stored = publish::publish(connection, store, std::slice::from_ref(draft), Refusing::Nobody).await?;
        if let [Stored::Duplicate { existing, same_body: false }] = stored.as_slice() {
            tracing::warn!(topic = draft.topic, %existing, "a follow-up's dedup key is taken by a message with another body; the first is kept");
        }
    }
    Ok(())
}

pub(super) async fn open(store: &PgStore, lease: LeaseRef, timeout: Duration) -> Result<Work, Error> {
    let _ = lease;
    let idle = millis(timeout).clamp(1, i64::from(i32::MAX));
    // Which transaction it is comes with its beginning: a round trip less for each delivery.
    let begin = format!(
        "{BEGIN_DURABLE}, pg_catalog.set_config('idle_in_transaction_session_timeout', '{idle}', true), {XID} as xid"
    );
    let mut work = Work { connection: Some(store.pool.acquire().await?), xid: None };
    let rows = sqlx::raw_sql(sqlx::AssertSqlSafe(begin)).fetch_all(work.on()).await?;
    let last = rows.last().ok_or(sqlx::Error::RowNotFound)?;
    work.xid = Some(last.try_get("xid")?);
    Ok(work)
}

pub(super) async fn settle_open(
    store: &PgStore,
    mut work: Work,
    lease: LeaseRef,
    outcome: &Move,
    follow_ups: &[Draft],
) -> Result<Guarded, Error> {
    let mut xid = work.xid.clone().unwrap_or_default();
    if planted!("effects-before-outcome") {
        work.commit().await?;
        work = store.durable().await?;
        xid = store.query(OWN_XID).fetch_one(work.on()).await?.try_get("xid")?;
    }
    let record = outcome.outcome.as_ref();
    // Of one that has its key for itself, they come after its end: they may be of that key.
    let unique = store.uniques.has(outcome.subscription);
    if !follow_ups.is_empty() && !unique {
        // Not outside of the handler's transaction, if that is over.
        let row = store.query(OWN_XID).fetch_one(work.on()).await?;
        if row.try_get::<String, _>("xid")? != xid {
            work.rollback().await?;
            return Err(handler_ended_it());
        }
        follow(store, work.on(), follow_ups).await?;
    }
    // Locked and written last, so that the lease row is shared for a moment only.
    let row = store
        .query(store.sql.settle_open)
        .bind(lease.token)
        .bind(lease.batch)
        .bind(&xid)
        .bind(outcome.delivery)
        .bind(record.map_or(1, |r| r.number as i32))
        .bind(outcome.rev)
        .bind(outcome.subscription)
        .bind(outcome.message)
        .bind(lease.worker)
        .bind(record.map_or(0, |r| micros(r.ran)))
        .fetch_one(work.on())
        .await?;
    if row.try_get::<String, _>("xid")? != xid {
        work.rollback().await?;
        return Err(handler_ended_it());
    }
    if row.try_get::<i64, _>("held")? == 0 {
        work.rollback().await?;
        return Ok(Guarded::Fenced);
    }
    if outcome.leads {
        keys::follow(store, work.on(), std::iter::once(outcome)).await?;
    }
    if unique {
        unique::free(store, work.on(), vec![outcome.delivery]).await?;
        follow(store, work.on(), follow_ups).await?;
    }
    crash::commit("outcome-commit-sent", work.commit()).await?;
    Ok(Guarded::Done)
}

fn handler_ended_it() -> Error {
    Error::Refused(
        "the handler ended its own transaction (COMMIT or ROLLBACK in raw SQL); what it did before that is not undone, and the attempt counts as failed".into(),
    )
}

pub(super) async fn settle_together(store: &PgStore, mut work: Work, settles: &[Settle]) -> Result<Vec<Uuid>, Error> {
    let mut xid = work.xid.clone().unwrap_or_default();
    if planted!("effects-before-outcome") {
        work.commit().await?;
        work = store.durable().await?;
        xid = store.query(OWN_XID).fetch_one(work.on()).await?.try_get("xid")?;
    }
    // Not outside of the handler's transaction, if that is over.
    let row = store.query(OWN_XID).fetch_one(work.on()).await?;
    if row.try_get::<String, _>("xid")? != xid {
        work.rollback().await?;
        return Err(handler_ended_it());
    }
    for settle in settles {
        write_rest(store, &mut work, settle).await?;
        follow(store, work.on(), &settle.follow_ups).await?;
    }
    // Locked last, so that the lease rows are shared for a moment only.
    let mut gone = Vec::new();
    for settle in settles {
        if write_part(store, &mut work, settle).await? != Part::Written {
            gone.push(settle.lease.token);
        }
    }
    if !gone.is_empty() {
        work.rollback().await?;
        return Ok(gone);
    }
    crash::commit("outcome-commit-sent", work.commit()).await?;
    Ok(gone)
}

pub(super) async fn recheck_part(store: &PgStore, lease: LeaseRef, part: i32) -> Result<Option<bool>, Error> {
    let mut work = store.work().await?;
    // Waits for a backend that is still committing; only then is the answer final.
    let sql = format!("select 1 from {}.lease where token = $1 for update", store.schema);
    let held = store.dynamic(sql).bind(lease.token).fetch_optional(work.on()).await?.is_some();
    let found = store.query(store.sql.part_exists).bind(lease.batch).bind(part).fetch_one(work.on()).await?;
    let found: bool = found.try_get("found")?;
    work.rollback().await?;
    Ok(if held || found { Some(found) } else { None })
}

pub(super) async fn recheck(
    store: &PgStore,
    lease: LeaseRef,
    delivery: DeliveryId,
    number: u32,
) -> Result<Option<bool>, Error> {
    let mut work = store.work().await?;
    // Waits for a backend that is still committing; only then is the answer final.
    let sql = format!("select 1 from {}.lease where token = $1 for update", store.schema);
    let held = store.dynamic(sql).bind(lease.token).fetch_optional(work.on()).await?.is_some();
    let sql = format!("select 1 from {}.outcome where delivery = $1 and number = $2 and batch = $3", store.schema);
    let found = store
        .dynamic(sql)
        .bind(delivery)
        .bind(number as i32)
        .bind(lease.batch)
        .fetch_optional(work.on())
        .await?
        .is_some();
    work.rollback().await?;
    Ok(match (held, found) {
        (_, true) => Some(true),
        (true, false) => Some(false),
        (false, false) => None,
    })
}
