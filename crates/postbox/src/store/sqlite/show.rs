//! What operators see.

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};
use uuid::Uuid;

use super::work::Work;
use super::{SqliteStore, inbox, json_of, messages, relays, schedules, timestamp};
use crate::admin::{
    AttemptRow, DeliveryDetail, DeliveryRow, Filter, LimitsRow, RecordRow, ScheduleStatus, Status, SubscriptionRow,
    WorkerRow,
};
use crate::error::Error;
use crate::lifecycle::State;
use crate::message::{Envelope, first_id_at, minted_at};
use crate::operation::idempotency_key;
use crate::priority::Priority;
use crate::store::{DeliveryId, Stranded, SubscriptionId};

/// A list as a JSON array; an empty one asks for nothing.
fn wish<T: serde::Serialize>(values: Vec<T>) -> Result<Option<String>, Error> {
    if values.is_empty() { Ok(None) } else { json_of(&values).map(Some) }
}

/// All deliveries above the number `?10`, which successes are found by.
const ABOVE: (&str, &str) = ("postbox_every", "d.id > ?10 and d.highest > ?10");
/// Those that have not succeeded, who are few: each place of theirs has an index.
const REST: (&str, &str) = ("postbox_unfinished", "true");
const ONE: (&str, &str) = ("postbox_every", "d.id = ?6 and d.lowest <= ?6 and d.highest >= ?6");
/// How many numbers below the newest are looked at first, for each row that is wanted; then more and more.
pub(super) const LOOK: i64 = 4;
pub(super) const WIDER: i64 = 8;

async fn deliveries(
    db: &mut SqliteConnection,
    filter: &Filter,
    one: Option<DeliveryId>,
    limit: u32,
) -> Result<Vec<SqliteRow>, Error> {
    let (from, which) = match one {
        Some(_) => ONE,
        None if filter.states.is_empty() || filter.states.contains(&State::Succeeded) => ABOVE,
        None => REST,
    };
    let sql = include_str!("list.sql").replace("{from}", from).replace("{which}", which);
    if which != ABOVE.1 {
        return Ok(filtered(sql, filter, one, limit)?.fetch_all(db).await?);
    }
    // The newest first: nothing older is unpacked when there are enough of them.
    let newest: i64 = sqlx::query_scalar("select delivery from postbox_last").fetch_one(&mut *db).await?;
    let mut width = i64::from(limit).saturating_mul(LOOK);
    loop {
        let above = newest.saturating_sub(width).max(0);
        let rows = filtered(sql.clone(), filter, one, limit)?.bind(above).fetch_all(&mut *db).await?;
        if above == 0 || rows.len() >= limit as usize {
            return Ok(rows);
        }
        width = width.saturating_mul(WIDER);
    }
}

/// A statement over deliveries with `?1` limit, `?6` one of them, and what a filter says in `{filter}`.
pub(super) fn filtered(
    sql: String,
    filter: &Filter,
    one: Option<DeliveryId>,
    limit: u32,
) -> Result<sqlx::query::Query<'static, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>, Error> {
    let sql = sql.replace("{filter}", include_str!("filter.sql"));
    Ok(sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(limit)
        .bind(wish(filter.states.iter().map(|s| s.as_str()).collect())?)
        .bind(wish(filter.subscriptions.iter().collect())?)
        .bind(wish(filter.topics.iter().map(|t| t.segments().collect::<Vec<_>>()).collect())?)
        .bind(wish(filter.keys.iter().collect())?)
        .bind(one)
        .bind(filter.since.map(first_id_at))
        .bind(filter.until.map(first_id_at))
        .bind(wish(filter.applications.iter().collect())?))
}

fn delivery_row(row: &SqliteRow) -> Result<DeliveryRow, Error> {
    let message: Uuid = row.try_get("message")?;
    let time = |name| row.try_get::<Option<i64>, _>(name).map(|t| t.map(timestamp));
    Ok(DeliveryRow {
        id: row.try_get("id")?,
        state: row.try_get::<String, _>("state")?.parse().map_err(Error::Refused)?,
        rev: row.try_get("rev")?,
        message,
        topic: row.try_get("topic")?,
        key: row.try_get("key")?,
        external_id: row.try_get("external_id")?,
        application: row.try_get("application")?,
        subscription: row.try_get("subscription")?,
        kind: row.try_get("kind")?,
        attempt: row.try_get("attempt")?,
        max_attempts: row.try_get("max_attempts")?,
        next_due_at: time("due_at")?,
        last_error: row.try_get("last_error")?,
        last_error_at: time("last_error_at")?,
        recorded_at: minted_at(message),
        since: time("since")?,
        note: row.try_get("note")?,
        priority: Priority::of(row.try_get("priority")?),
        replay_of: row.try_get("replay_of")?,
    })
}

/// One delivery as it stands in a list.
pub(super) async fn one(db: &mut SqliteConnection, delivery: DeliveryId) -> Result<Option<DeliveryRow>, Error> {
    let found = deliveries(db, &Filter::default(), Some(delivery), 1).await?;
    found.first().map(delivery_row).transpose()
}

pub(super) async fn list(store: &SqliteStore, filter: &Filter, limit: u32) -> Result<Vec<DeliveryRow>, Error> {
    let mut connection = store.reader.acquire().await?;
    deliveries(&mut connection, filter, None, limit).await?.iter().map(delivery_row).collect()
}

pub(super) async fn show(store: &SqliteStore, delivery: DeliveryId) -> Result<Option<DeliveryDetail>, Error> {
    let mut work = store.read().await?;
    let found = deliveries(work.on(), &Filter::default(), Some(delivery), 1).await?;
    let Some(found) = found.first() else {
        work.rollback().await?;
        return Ok(None);
    };
    let row = delivery_row(found)?;
    let holder: Option<Uuid> = found.try_get("worker_id")?;
    let name: Option<String> = found.try_get("worker")?;
    let envelope = messages(work.on(), &[row.message]).await?.remove(&row.message);
    let attempts = sqlx::query(include_str!("show_attempts.sql")).bind(delivery).fetch_all(work.on()).await?;
    let records = sqlx::query(include_str!("show_records.sql")).bind(delivery).fetch_all(work.on()).await?;
    let effects =
        sqlx::query_as("select id, topic from postbox_message where causation_id = ?1 order by seq limit 100")
            .bind(row.message.to_string())
            .fetch_all(work.on())
            .await?;
    let replays = sqlx::query_scalar("select id from postbox_delivery where replay_of = ?1 order by id limit 100")
        .bind(delivery)
        .fetch_all(work.on())
        .await?;
    let coalesced =
        sqlx::query_scalar("select message from postbox_coalesced where delivery = ?1 order by message limit 100")
            .bind(delivery)
            .fetch_all(work.on())
            .await?;
    work.rollback().await?;
    Ok(Some(DeliveryDetail {
        idempotency_key: idempotency_key(row.message, delivery),
        envelope,
        worker: name.or(holder.map(|h| h.to_string())),
        attempts: attempts.iter().map(attempt_row).collect::<Result<_, _>>()?,
        records: records.iter().map(record_row).collect::<Result<_, _>>()?,
        effects,
        replays,
        coalesced,
        row,
    }))
}

fn attempt_row(row: &SqliteRow) -> Result<AttemptRow, Error> {
    Ok(AttemptRow {
        number: row.try_get("number")?,
        outcome: row.try_get("kind")?,
        worker: row.try_get("worker")?,
        started_at: timestamp(row.try_get("started_at")?),
        finished_at: row.try_get::<Option<i64>, _>("finished_at")?.map(timestamp),
        error: row.try_get("error")?,
        receipt: row.try_get::<Option<String>, _>("receipt")?.and_then(|r| serde_json::from_str(&r).ok()),
    })
}

fn record_row(row: &SqliteRow) -> Result<RecordRow, Error> {
    Ok(RecordRow {
        at: timestamp(row.try_get("at")?),
        record: row.try_get("record")?,
        actor: row.try_get("actor")?,
        what: row.try_get("what")?,
        detail: row.try_get("detail")?,
    })
}

pub(super) async fn deliveries_of(store: &SqliteStore, id: Uuid) -> Result<Option<(Envelope, Vec<DeliveryId>)>, Error> {
    let mut work = store.read().await?;
    let envelope = messages(work.on(), &[id]).await?.remove(&id);
    let of_it = "select id from postbox_every
         where message = ?1 and first_message <= ?1 and last_message >= ?1 order by id";
    let deliveries = sqlx::query_scalar(of_it).bind(id).fetch_all(work.on()).await?;
    work.rollback().await?;
    Ok(envelope.map(|envelope| (envelope, deliveries)))
}

async fn workers(store: &SqliteStore, work: &mut Work) -> Result<Vec<(WorkerRow, Vec<SubscriptionId>)>, Error> {
    let rows: Vec<(Uuid, String, String, i64, String)> = sqlx::query_as(
        "select id, name, application, started_at, subscriptions from postbox_worker order by application, name, started_at",
    )
    .fetch_all(work.on())
    .await?;
    let worker = |(id, name, application, started_at, subscriptions): (Uuid, String, String, i64, String)| {
        let row =
            WorkerRow { id, name, application, started_at: timestamp(started_at), alive: store.shared.alive.lives(id) };
        (row, serde_json::from_str(&subscriptions).unwrap_or_default())
    };
    Ok(rows.into_iter().map(worker).collect())
}

async fn counted(work: &mut Work, workers: &[(WorkerRow, Vec<SubscriptionId>)]) -> Result<Vec<SubscriptionRow>, Error> {
    let live: Vec<_> = workers.iter().filter(|(worker, _)| worker.alive).map(|(_, stands)| stands).collect();
    let rows = sqlx::query(include_str!("subscriptions.sql")).bind(json_of(&live)?).fetch_all(work.on()).await?;
    rows.iter().map(subscription_row).collect()
}

fn subscription_row(row: &SqliteRow) -> Result<SubscriptionRow, Error> {
    Ok(SubscriptionRow {
        application: row.try_get("application")?,
        name: row.try_get("name")?,
        pattern: row.try_get("pattern")?,
        kind: row.try_get("kind")?,
        idempotent: row.try_get("idempotent")?,
        max_attempts: row.try_get("max_attempts")?,
        workers: row.try_get("workers")?,
        pending: row.try_get("pending")?,
        pending_high: row.try_get("pending_high")?,
        pending_low: row.try_get("pending_low")?,
        scheduled: row.try_get("scheduled")?,
        running: row.try_get("running")?,
        in_doubt: row.try_get("in_doubt")?,
        dead: row.try_get("dead")?,
        succeeded_last_hour: row.try_get("succeeded_last_hour")?,
        oldest_age_s: Some(row.try_get::<f64, _>("oldest_age_s")?).filter(|age| *age >= 0.0),
        removed_at: row.try_get::<Option<i64>, _>("removed_at")?.map(timestamp),
        paused_at: row.try_get::<Option<i64>, _>("paused_at")?.map(timestamp),
        paused_by: row.try_get("paused_by")?,
        paused_reason: row.try_get("paused_reason")?,
        limits: LimitsRow::of(
            row.try_get::<Option<i64>, _>("at_once")?,
            row.try_get("held")?,
            row.try_get("token_us")?,
            row.try_get::<Option<i64>, _>("burst")?,
            row.try_get("tokens")?,
        ),
        backfilling: row.try_get("backfilling")?,
    })
}

/// Removed ones are shown while they hold something.
fn shown(rows: Vec<SubscriptionRow>) -> Vec<SubscriptionRow> {
    let holds = |s: &SubscriptionRow| s.pending + s.scheduled + s.running + s.in_doubt + s.dead > 0;
    rows.into_iter().filter(|s| s.removed_at.is_none() || holds(s)).collect()
}

/// Deliveries that are due and not at an end, and that no live worker stands behind. What waits behind a
/// pause waits for its end.
fn left_alone(rows: &[SubscriptionRow]) -> Vec<Stranded> {
    let waiting = |s: &SubscriptionRow| (s.pending + s.running + s.in_doubt).min(100_001);
    rows.iter()
        .filter(|s| s.workers == 0 && s.paused_at.is_none() && waiting(s) > 0)
        .map(|s| Stranded {
            application: s.application.clone(),
            subscription: s.name.clone(),
            waiting: waiting(s),
            later: s.scheduled,
        })
        .collect()
}

pub(super) async fn subscriptions(store: &SqliteStore) -> Result<Vec<SubscriptionRow>, Error> {
    let mut work = store.read().await?;
    let workers = workers(store, &mut work).await?;
    let rows = counted(&mut work, &workers).await?;
    work.rollback().await?;
    Ok(shown(rows))
}

pub(super) async fn stranded(store: &SqliteStore) -> Result<Vec<Stranded>, Error> {
    let mut work = store.read().await?;
    let workers = workers(store, &mut work).await?;
    let rows = counted(&mut work, &workers).await?;
    work.rollback().await?;
    Ok(left_alone(&rows))
}

pub(super) async fn status(store: &SqliteStore) -> Result<Status, Error> {
    let schedules = ScheduleStatus::of(&schedules::all(store).await?);
    let mut work = store.read().await?;
    let workers = workers(store, &mut work).await?;
    let rows = counted(&mut work, &workers).await?;
    let (schema_version, unrouted): (u32, i64) = sqlx::query_as(
        "select (select coalesce(max(version), 0) from postbox_migration),
             (select count(*) from (select 1 from postbox_unrouted limit 100001))",
    )
    .fetch_one(work.on())
    .await?;
    let unrouted_topics = sqlx::query_scalar(
        "select distinct topic from (select topic from postbox_unrouted limit 1000) order by 1 limit 20",
    )
    .fetch_all(work.on())
    .await?;
    let sources = inbox::sources(work.on()).await?;
    let relayed = relays::all(work.on()).await?;
    work.rollback().await?;
    let (stranded, subscriptions) = (left_alone(&rows), shown(rows));
    Ok(Status {
        sources,
        sinks: crate::store::relays::rows(&subscriptions, relayed),
        schema_version,
        workers: workers.into_iter().map(|(worker, _)| worker).collect(),
        stranded,
        subscriptions,
        unrouted,
        unrouted_topics,
        held_back: None,
        schedules,
    })
}
