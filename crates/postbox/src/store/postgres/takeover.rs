//! What a worker leaves behind: taken over when it died, handed back when it ends.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::{PgStore, Work, settle};
use crate::error::Error;
use crate::lifecycle::{Kind, Standing, State};
use crate::planted::planted;
use crate::store::decide::{self, Left};
use crate::store::{LeaseRef, Move, TakenOver, policy_of};

/// Dead workers looked at in one takeover.
const LOOKED_AT: i64 = 20;

pub(super) async fn take_over(store: &PgStore, draw: f64) -> Result<Option<TakenOver>, Error> {
    let mut work = store.durable().await?;
    let old = match planted!("takeover-by-age") {
        true => format!(
            "or id in (select l.worker from {}.lease l
                 where l.claimed_at < pg_catalog.clock_timestamp() - interval '1 millisecond' * lease_ms::double precision)",
            store.schema
        ),
        false => String::new(),
    };
    let sql = format!(
        "select id, name, lease_ms, idempotent from {}.worker where expires_at < pg_catalog.clock_timestamp() {old}
         order by pg_catalog.random() limit $1 for update skip locked",
        store.schema
    );
    let all = store.dynamic(sql).bind(LOOKED_AT).fetch_all(work.on()).await?;
    let mut found = None;
    for dead in &all {
        let early = match planted!("takeover-reads-first") {
            true => Some(unlocked(store, &mut work, dead.try_get("id")?).await?),
            false => None,
        };
        let (tokens, waits) = lock_leases(store, &mut work, dead.try_get("id")?).await?;
        // One whose leases are all in the hands of open transactions keeps nobody from the others.
        if !tokens.is_empty() || !waits {
            found = Some((dead, tokens, waits, early));
            break;
        }
    }
    let Some((dead, tokens, waits, early)) = found else {
        work.rollback().await?;
        return Ok(None);
    };
    let worker: Uuid = dead.try_get("id")?;
    let lease = Duration::from_millis(dead.try_get::<i64, _>("lease_ms")?.max(0) as u64);
    let name: String = dead.try_get("name")?;
    let idempotent: Vec<i32> = dead.try_get("idempotent")?;
    let mut taken = TakenOver { worker, name, pending: 0, in_doubt: 0, dead: 0 };
    let rows = match early {
        Some(rows) => rows,
        None => leftover(store, &mut work, &tokens).await?,
    };
    let mut batches: BTreeMap<Uuid, (LeaseRef, Vec<Move>)> = BTreeMap::new();
    let (mut unseen, mut numbers) = (Vec::new(), Vec::new());
    for row in rows {
        let left = left(&row, &idempotent, lease)?;
        let moved = decide::lost(&left, &taken.name, draw).map_err(|e| Error::Refused(e.to_string()))?;
        match moved.standing.state {
            State::InDoubt => taken.in_doubt += 1,
            State::Dead => taken.dead += 1,
            _ => taken.pending += 1,
        }
        if decide::unseen(&left, &moved) {
            unseen.push(moved.delivery);
            numbers.push(moved.standing.attempts as i32 + 1);
        }
        let held = LeaseRef { worker, batch: row.try_get("batch")?, token: row.try_get("token")? };
        batches.entry(held.token).or_insert_with(|| (held, Vec::new())).1.push(moved);
    }
    for (held, moves) in batches.values() {
        settle::apply(store, work.on(), moves, Some(*held)).await?;
    }
    let sql = format!(
        "insert into {}.observation (delivery, number, worker, kind, detail)
         select u.delivery, u.number, $3, 'lost', $4 from unnest($1::bigint[], $2::int[]) as u(delivery, number)",
        store.schema
    );
    store
        .dynamic(sql)
        .bind(unseen)
        .bind(numbers)
        .bind(worker)
        .bind(format!("worker {} died holding it; whether it had started is not known", taken.name))
        .execute(work.on())
        .await?;
    forget(store, &mut work, &tokens).await?;
    // While something is left for later the row stays, and no heartbeat brings it back to life: a paused
    // worker must not believe in its lease again after others have taken from it.
    let sql = match waits {
        false => format!("delete from {}.worker where id = $1", store.schema),
        true => format!(
            "update {}.worker set expires_at = timestamp with time zone '-infinity', asleep = false where id = $1",
            store.schema
        ),
    };
    store.dynamic(sql).bind(worker).execute(work.on()).await?;
    work.commit().await?;
    Ok(Some(taken))
}

/// Lock first: whoever settles these leases has committed, or will find them gone. A lease that an
/// open transaction holds (one that completes what it pulled) is left for later: whether there is one.
async fn lock_leases(store: &PgStore, work: &mut Work, worker: Uuid) -> Result<(Vec<Uuid>, bool), Error> {
    // Who has read before would have to wait for what it has read.
    let skip = if planted!("takeover-reads-first") { "" } else { "skip locked" };
    let sql = format!("select token from {}.lease where worker = $1 order by batch for update {skip}", store.schema);
    let rows = store.dynamic(sql).bind(worker).fetch_all(work.on()).await?;
    let tokens: Vec<Uuid> = rows.iter().map(|row| row.try_get("token")).collect::<Result<_, _>>()?;
    let sql = format!("select pg_catalog.count(*) as held from {}.lease where worker = $1", store.schema);
    let held: i64 = store.dynamic(sql).bind(worker).fetch_one(work.on()).await?.try_get("held")?;
    Ok((tokens.clone(), held > tokens.len() as i64))
}

/// For a planted bug: what the leases hold, read without a lock.
async fn unlocked(store: &PgStore, work: &mut Work, worker: Uuid) -> Result<Vec<PgRow>, Error> {
    let sql = format!("select token from {}.lease where worker = $1", store.schema);
    let rows = store.dynamic(sql).bind(worker).fetch_all(work.on()).await?;
    let tokens: Vec<Uuid> = rows.iter().map(|row| row.try_get("token")).collect::<Result<_, _>>()?;
    leftover(store, work, &tokens).await
}

/// Read second, in a statement of its own.
async fn leftover(store: &PgStore, work: &mut Work, tokens: &[Uuid]) -> Result<Vec<PgRow>, Error> {
    if tokens.is_empty() {
        return Ok(Vec::new());
    }
    Ok(store.query(store.sql.leftover).bind(tokens.to_vec()).fetch_all(work.on()).await?)
}

async fn forget(store: &PgStore, work: &mut Work, tokens: &[Uuid]) -> Result<(), Error> {
    let sql = format!("delete from {}.lease where token = any ($1)", store.schema);
    store.dynamic(sql).bind(tokens.to_vec()).execute(work.on()).await?;
    Ok(())
}

/// What the decision needs to know of a delivery in a lease.
fn left(row: &PgRow, idempotent: &[i32], lease: Duration) -> Result<Left, Error> {
    let kind: Kind = row.try_get::<String, _>("kind")?.parse().map_err(Error::Refused)?;
    // By what it was begun under, whatever was declared since.
    let declared = idempotent.contains(&row.try_get("subscription")?);
    let policy = policy_of(
        kind,
        declared,
        row.try_get("max_attempts")?,
        row.try_get("retry_base_ms")?,
        row.try_get("retry_cap_ms")?,
    );
    let begun: bool = row.try_get("begun")?;
    let attempts = row.try_get::<i32, _>("attempt")?.max(0) as u32 + u32::from(begun);
    let later = |column| row.try_get::<i64, _>(column).map(|ms| Duration::from_millis(ms.max(0) as u64));
    Ok(Left {
        delivery: row.try_get("delivery")?,
        message: row.try_get("message")?,
        subscription: row.try_get("subscription")?,
        priority: row.try_get("priority")?,
        rev: row.try_get("rev")?,
        standing: Standing {
            state: State::Running,
            attempts,
            begun,
            lost: row.try_get::<i32, _>("lost")?.max(0) as u32,
        },
        policy,
        ran: Duration::from_micros(row.try_get::<i64, _>("ran_us").unwrap_or(0).max(0) as u64),
        quiet: decide::quiet_after_loss(lease, later("timeout_ms")?, later("quiet_ms")?),
    })
}

/// Hands back one lease's deliveries, none of which has started.
pub(super) async fn disown(store: &PgStore, worker: Uuid, token: Uuid) -> Result<(), Error> {
    let mut work = store.work().await?;
    let sql = format!("select 1 from {}.lease where token = $1 and worker = $2 for update", store.schema);
    if store.dynamic(sql).bind(token).bind(worker).fetch_optional(work.on()).await?.is_some() {
        hand_back(store, &mut work, &[token]).await?;
    }
    Ok(work.commit().await?)
}

/// Hands back what was pulled and never handed out, as if it had not been leased.
pub(super) async fn forgo(store: &PgStore, worker: Uuid, token: Uuid) -> Result<(), Error> {
    let mut work = store.work().await?;
    let sql = format!("select 1 from {}.lease where token = $1 and worker = $2 for update", store.schema);
    if store.dynamic(sql).bind(token).bind(worker).fetch_optional(work.on()).await?.is_some() {
        let sql = format!("select {}.forgo_attempts($1, $2)", store.schema);
        store.dynamic(sql).bind(token).bind(worker).execute(work.on()).await?;
        hand_back(store, &mut work, &[token]).await?;
    }
    Ok(work.commit().await?)
}

async fn hand_back(store: &PgStore, work: &mut Work, tokens: &[Uuid]) -> Result<(), Error> {
    let mut moves = Vec::new();
    for row in leftover(store, work, tokens).await? {
        let left = left(&row, &[], Duration::ZERO)?;
        moves.push(decide::handed_back(&left).map_err(|_| {
            Error::Refused(format!(
                "delivery {} has begun and cannot be handed back; it is taken over when the lease runs out",
                left.delivery
            ))
        })?);
    }
    settle::apply(store, work.on(), &moves, None).await?;
    forget(store, work, tokens).await
}

/// A worker that ends: its row goes if it holds nothing; otherwise its life ends now, and what it
/// holds is taken over at once.
pub(super) async fn retire(store: &PgStore, worker: Uuid) -> Result<(), Error> {
    let mut work = store.work().await?;
    let sql = format!("select 1 from {}.worker where id = $1 for update", store.schema);
    store.dynamic(sql).bind(worker).execute(work.on()).await?;
    let sql = format!(
        "with gone as (
            delete from {0}.worker w where w.id = $1 and not exists (select from {0}.lease l where l.worker = w.id)
         )
         update {0}.worker w set expires_at = pg_catalog.clock_timestamp(), asleep = false
         where w.id = $1 and exists (select from {0}.lease l where l.worker = w.id)",
        store.schema
    );
    store.dynamic(sql).bind(worker).execute(work.on()).await?;
    Ok(work.commit().await?)
}
