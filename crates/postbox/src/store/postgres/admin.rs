//! What operators see and do.

use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::lanes::LEVELS;
use super::read::envelope;
use super::{PgStore, Work, doubt, inbox, relays, schedules, timestamp};
use crate::admin::{
    AttemptRow, AuditEntry, DeliveryDetail, DeliveryRow, Filter, HELD_BACK, HeldBack, LimitsRow, RecordRow, Resolution,
    ScheduleStatus, Status, SubscriptionRow, WorkerRow, no_delivery,
};
use crate::error::Error;
use crate::lifecycle::{Answer, State};
use crate::message::{Envelope, first_id_at, minted_at};
use crate::operation::idempotency_key;
use crate::priority::Priority;
use crate::store::{Answered, DeliveryId, Speaker, Stranded, Word, no_subscription};

/// Where a delivery in a state can be, as columns that `list.sql` reads.
const PLACES: [(State, &str); 8] = [
    (
        State::Pending,
        "select r.delivery, 'pending', r.subscription, r.message, r.priority, r.attempt, r.rev,
            null::timestamp with time zone, null::timestamp with time zone, null::pg_catalog.uuid, null::pg_catalog.text
         from {schema}.ready r",
    ),
    (
        State::Pending,
        "select r.delivery, 'pending', r.subscription, r.message, r.priority, r.attempt, r.rev, r.due_at, null::timestamp with time zone, null::pg_catalog.uuid, null::pg_catalog.text
         from {schema}.scheduled r",
    ),
    (
        State::Pending,
        "select r.delivery, 'pending', r.subscription, r.message, r.priority, r.attempt, r.rev, null::timestamp with time zone, r.claimed_at, r.worker,
            'claimed, not begun'
         from {schema}.leased r join {schema}.subscription k on k.id = r.subscription
         where not r.begun and k.kind = 'operation'",
    ),
    (
        State::Running,
        "select r.delivery, 'running', r.subscription, r.message, r.priority, r.attempt + r.begun::int, r.rev, null::timestamp with time zone,
            r.claimed_at, r.worker, null::pg_catalog.text
         from {schema}.leased r join {schema}.subscription k on k.id = r.subscription
         where r.begun or k.kind <> 'operation'",
    ),
    (
        State::InDoubt,
        "select r.delivery, 'in_doubt', r.subscription, r.message, r.priority, r.attempt, r.rev, null::timestamp with time zone, r.since, null::pg_catalog.uuid, r.cause
         from {schema}.doubt r",
    ),
    (
        State::Dead,
        "select r.delivery, r.state, r.subscription, r.message, r.priority, r.attempt, r.rev, null::timestamp with time zone, r.at, null::pg_catalog.uuid, r.reason
         from {schema}.dead_letter r",
    ),
    (
        State::Succeeded,
        "select r.delivery, 'succeeded', r.subscription, r.message, 0::smallint, r.number, r.rev, null::timestamp with time zone, r.at, r.worker, null::pg_catalog.text
         from (select o.delivery, o.subscription, o.message, o.number, o.rev, o.finished_at as at, o.worker
                from {schema}.outcome o where o.state_after = 'succeeded'
                union all
                select o.delivery, o.subscription, o.message, o.number, o.rev, o.at, null::pg_catalog.uuid
                from {schema}.resolution o where o.state_after = 'succeeded') r",
    ),
    (
        State::Succeeded,
        "select r.delivery, 'succeeded', r.subscription, r.message, 0::smallint, 1, 2, null::timestamp with time zone, r.finished_at, r.worker, null::pg_catalog.text
         from (select u.delivery, u.subscription, u.message, p.finished_at, p.worker
                from (select * from {schema}.outcome_part p where p.highest is not null {parts}) p
                cross join lateral unnest(p.deliveries, p.messages, p.subscriptions) as u(delivery, message, subscription)) r",
    ),
];

/// Names for the columns of a place.
const COLUMNS: &str = "p(delivery, state, subscription, message, priority, attempt, rev, due_at, since, worker, note)";

/// Which of the deliveries that match are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Page {
    /// The newest `$1`.
    Newest,
    /// The oldest `$1` of those above `$8`, up to `$9`.
    Between,
}

/// Names the type of each parameter, whichever of them the filters use.
pub(super) const GIVEN: &str =
    "with given as (select $2::pg_catalog.text[], $3::pg_catalog.text[], $4::pg_catalog.text[],
    $5::pg_catalog.uuid, $6::pg_catalog.uuid, $7::pg_catalog.text[])";

/// `$1` limit, `$2` to `$7` what the filter says.
pub(super) fn filtered<'q>(
    query: sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments>,
    filter: &Filter,
    limit: u32,
) -> sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments> {
    query
        .bind(i64::from(limit))
        .bind(filter.subscriptions.clone())
        .bind(filter.topics.iter().map(|t| t.to_regex()).collect::<Vec<_>>())
        .bind(filter.keys.clone())
        .bind(filter.since.map(first_id_at))
        .bind(filter.until.map(first_id_at))
        .bind(filter.applications.clone())
}

/// A union of where the deliveries that match can be, each part bounded.
pub(super) fn places(store: &PgStore, filter: &Filter, page: Page) -> String {
    let narrowed = *filter != Filter { states: filter.states.clone(), ..Filter::default() };
    let (order, parts_wanted) = match page {
        Page::Newest if narrowed => ("desc", ""),
        // The newest n deliveries are in the n parts with the highest ones.
        Page::Newest => ("desc", "order by p.highest desc limit $1"),
        Page::Between => ("asc", "and p.highest > $8 and p.lowest <= $9"),
    };
    let wanted = |state: State| {
        filter.states.is_empty()
            || filter.states.contains(&state)
            || state == State::Dead && filter.states.contains(&State::Cancelled)
    };
    let mut parts = Vec::new();
    for (state, place) in PLACES {
        if !wanted(state) {
            continue;
        }
        let place = place.replace("{parts}", parts_wanted);
        let mut filters: Vec<String> = Vec::new();
        if page == Page::Between {
            filters.push("p.delivery > $8 and p.delivery <= $9".into());
        }
        // A message's id tells when it was recorded.
        if filter.since.is_some() {
            filters.push("p.message >= $5".into());
        }
        if filter.until.is_some() {
            filters.push("p.message < $6".into());
        }
        if !filter.applications.is_empty() {
            filters
                .push("p.subscription in (select id from {schema}.subscription where application = any ($7))".into());
        }
        if state == State::Dead && !filter.states.is_empty() {
            let states: Vec<String> = filter.states.iter().map(|s| format!("'{s}'")).collect();
            filters.push(format!("p.state in ({})", states.join(", ")));
        }
        if !filter.subscriptions.is_empty() {
            filters.push("p.subscription in (select id from {schema}.subscription where name = any ($2))".into());
        }
        if !filter.topics.is_empty() || !filter.keys.is_empty() {
            let mut message = Vec::new();
            if !filter.topics.is_empty() {
                message.push("m.topic ~ any ($3)");
            }
            if !filter.keys.is_empty() {
                message.push("m.key = any ($4)");
            }
            filters.push(format!(
                "exists (select from {{schema}}.message m where m.id = p.message and {})",
                message.join(" and ")
            ));
        }
        let clause = if filters.is_empty() { String::new() } else { format!("where {}", filters.join(" and ")) };
        parts.push(format!("(select * from ({place}) {COLUMNS} {clause} order by p.delivery {order} limit $1)"));
    }
    parts.join("\nunion all\n").replace("{schema}", &store.schema)
}

pub(super) async fn list(store: &PgStore, filter: &Filter, limit: u32) -> Result<Vec<DeliveryRow>, Error> {
    let listed = store.sql.list.replace("{places}", &places(store, filter, Page::Newest));
    let mut work = store.read().await?;
    let rows = filtered(store.dynamic(format!("{GIVEN}\n{listed}")), filter, limit).fetch_all(work.on()).await?;
    work.rollback().await?;
    rows.iter().map(delivery_row).collect()
}

fn delivery_row(row: &PgRow) -> Result<DeliveryRow, Error> {
    let message: Uuid = row.try_get("message")?;
    let number = |name| row.try_get::<i32, _>(name).map(|n| n.max(0) as u32);
    Ok(DeliveryRow {
        id: row.try_get("delivery")?,
        state: row.try_get::<String, _>("state")?.parse().map_err(Error::Refused)?,
        rev: row.try_get("rev")?,
        message,
        topic: row.try_get("topic")?,
        key: row.try_get("key")?,
        external_id: row.try_get("external_id")?,
        application: row.try_get("application")?,
        subscription: row.try_get("subscription")?,
        kind: row.try_get("kind")?,
        attempt: number("attempt")?,
        max_attempts: number("max_attempts")?,
        next_due_at: row.try_get::<Option<i64>, _>("due_us")?.map(timestamp),
        last_error: row.try_get("last_error")?,
        last_error_at: row.try_get::<Option<i64>, _>("last_error_us")?.map(timestamp),
        recorded_at: minted_at(message),
        since: row.try_get::<Option<i64>, _>("since_us")?.map(timestamp),
        note: row.try_get("note")?,
        priority: Priority::of(row.try_get("priority")?),
        replay_of: row.try_get("replay_of")?,
    })
}

/// Rows of `ready`, as `r`, that are where their number says: by the index, level by level, however many rows that
/// are gone are still in the table.
pub(super) fn at_home(delivery: &str) -> String {
    format!(
        "{{schema}}.subscription s cross join lateral {LEVELS} as l(priority)
         cross join lateral (select * from {{schema}}.ready h
            where h.subscription = s.id and h.priority = l.priority and h.pos = {delivery}
                and h.slot = ({delivery} >> 20) & 3 offset 0) r"
    )
}

/// One delivery, wherever it is: each place is asked by what it is indexed by. Where most are is asked alone first:
/// to plan for all places takes several times as long as to read one.
pub(super) async fn find(
    store: &PgStore,
    work: &mut Work,
    delivery: DeliveryId,
) -> Result<Option<(DeliveryRow, Option<String>)>, Error> {
    let ended = places_of(|state| matches!(state, State::Dead | State::Succeeded));
    if let Some(found) = find_in(store, work, delivery, &ended).await? {
        return Ok(Some(found));
    }
    // All of them in one statement: one on the move between places would be missed by two.
    let mut all = places_of(|_| true);
    // Ready rows are kept by position; one that never moved has its own number there.
    all.push(one_in(&format!("{} where r.pos <> r.delivery", PLACES[0].1)));
    all.push(one_in(&PLACES[0].1.replace("{schema}.ready r", &at_home("$2"))));
    find_in(store, work, delivery, &all).await
}

/// The delivery `$2` in a place. One at most: said, it keeps whoever plans this from expecting thousands, and from
/// reading whole tables.
fn one_in(place: &str) -> String {
    format!("(select * from ({place}) {COLUMNS} where p.delivery = $2 limit 1)")
}

/// The delivery `$2` in the places of such states, but ready ones.
fn places_of(wanted: impl Fn(State) -> bool) -> Vec<String> {
    let part = "and pg_catalog.int8range(p.lowest, p.highest, '[]') @> $2";
    let places = PLACES[1..].iter().filter(|(state, _)| wanted(*state));
    places.map(|(_, place)| one_in(&place.replace("{parts}", part))).collect()
}

async fn find_in(
    store: &PgStore,
    work: &mut Work,
    delivery: DeliveryId,
    places: &[String],
) -> Result<Option<(DeliveryRow, Option<String>)>, Error> {
    let places = places.join("\nunion all\n").replace("{schema}", &store.schema);
    let sql = store.sql.list.replace("{places}", &places);
    let rows = store.dynamic(sql).bind(1_i64).bind(delivery).fetch_all(work.on()).await?;
    rows.first().map(|row| Ok((delivery_row(row)?, row.try_get("worker")?))).transpose()
}

pub(super) async fn show(store: &PgStore, delivery: DeliveryId) -> Result<Option<DeliveryDetail>, Error> {
    let mut work = store.look_up().await?;
    let Some((row, worker)) = find(store, &mut work, delivery).await? else {
        work.rollback().await?;
        return Ok(None);
    };
    let envelope = message(store, &mut work, row.message).await?.map(|(envelope, _)| envelope);
    let attempts = store.query(store.sql.show_attempts).bind(delivery).fetch_all(work.on()).await?;
    let records = store.query(store.sql.show_records).bind(delivery).fetch_all(work.on()).await?;
    let query = store.query(store.sql.show_linked).bind(delivery).bind(row.message.to_string());
    let linked = query.fetch_all(work.on()).await?;
    work.rollback().await?;
    let (mut effects, mut replays, mut coalesced) = (Vec::new(), Vec::new(), Vec::new());
    for row in &linked {
        match row.try_get("what")? {
            "effect" => effects.push((row.try_get("message")?, row.try_get("topic")?)),
            "replay" => replays.push(row.try_get("delivery")?),
            _ => coalesced.push(row.try_get("message")?),
        }
    }
    // A union promises no order.
    effects.sort();
    replays.sort_unstable();
    coalesced.sort_unstable();
    Ok(Some(DeliveryDetail {
        idempotency_key: idempotency_key(row.message, delivery),
        envelope,
        worker,
        attempts: attempts.iter().map(attempt_row).collect::<Result<_, _>>()?,
        records: records.iter().map(record_row).collect::<Result<_, _>>()?,
        effects,
        replays,
        coalesced,
        row,
    }))
}

fn attempt_row(row: &PgRow) -> Result<AttemptRow, Error> {
    Ok(AttemptRow {
        number: row.try_get::<i32, _>("number")?.max(0) as u32,
        outcome: row.try_get("kind")?,
        worker: row.try_get("worker")?,
        started_at: timestamp(row.try_get("started_us")?),
        finished_at: row.try_get::<Option<i64>, _>("finished_us")?.map(timestamp),
        error: row.try_get("error")?,
        receipt: row.try_get::<Option<String>, _>("receipt")?.and_then(|r| serde_json::from_str(&r).ok()),
    })
}

fn record_row(row: &PgRow) -> Result<RecordRow, Error> {
    Ok(RecordRow {
        at: timestamp(row.try_get("at_us")?),
        record: row.try_get("record")?,
        actor: row.try_get("actor")?,
        what: row.try_get("what")?,
        detail: row.try_get("detail")?,
    })
}

async fn message(store: &PgStore, work: &mut Work, id: Uuid) -> Result<Option<(Envelope, Vec<DeliveryId>)>, Error> {
    let sql = format!(
        "select m.id as message, m.topic, m.key, m.payload::pg_catalog.text as payload, m.body, m.content_type, m.headers::pg_catalog.text as headers,
            (extract(epoch from m.occurred_at) * 1000000::numeric)::bigint as occurred_us,
            m.source, m.external_id, m.correlation_id, m.causation_id, m.max_attempts,
            pg_catalog.array_cat(coalesce(m.deliveries, pg_catalog.array_remove(array[m.delivery], null)), array(
                select l.delivery from {0}.late_delivery l where l.message = m.id order by l.delivery)) as deliveries
         from {0}.message m where m.id = $1",
        store.schema
    );
    let Some(row) = store.dynamic(sql).bind(id).fetch_optional(work.on()).await? else { return Ok(None) };
    let deliveries = row.try_get("deliveries")?;
    Ok(envelope(&row)?.map(|envelope| (envelope, deliveries)))
}

pub(super) async fn deliveries_of(store: &PgStore, id: Uuid) -> Result<Option<(Envelope, Vec<DeliveryId>)>, Error> {
    let mut work = store.look_up().await?;
    let found = message(store, &mut work, id).await?;
    work.rollback().await?;
    Ok(found)
}

pub(super) async fn subscriptions(store: &PgStore) -> Result<Vec<SubscriptionRow>, Error> {
    let mut work = store.read().await?;
    let rows = store.query(store.sql.subscriptions).fetch_all(work.on()).await?;
    work.rollback().await?;
    let rows: Vec<SubscriptionRow> = rows.iter().map(subscription_row).collect::<Result<_, _>>()?;
    let holds = |s: &SubscriptionRow| s.pending + s.scheduled + s.running + s.in_doubt + s.dead > 0;
    Ok(rows.into_iter().filter(|s| s.removed_at.is_none() || holds(s)).collect())
}

fn subscription_row(row: &PgRow) -> Result<SubscriptionRow, Error> {
    Ok(SubscriptionRow {
        application: row.try_get("application")?,
        name: row.try_get("name")?,
        pattern: row.try_get("pattern")?,
        kind: row.try_get("kind")?,
        idempotent: row.try_get("idempotent")?,
        max_attempts: row.try_get::<i32, _>("max_attempts")?.max(0) as u32,
        workers: row.try_get("workers")?,
        pending: row.try_get("pending")?,
        pending_high: row.try_get("pending_high")?,
        pending_low: row.try_get("pending_low")?,
        scheduled: row.try_get("scheduled")?,
        running: row.try_get("running")?,
        in_doubt: row.try_get("in_doubt")?,
        dead: row.try_get("dead")?,
        succeeded_last_hour: row.try_get("succeeded_last_hour")?,
        oldest_age_s: row.try_get("oldest_age_s")?,
        removed_at: row.try_get::<Option<i64>, _>("removed_us")?.map(timestamp),
        paused_at: row.try_get::<Option<i64>, _>("paused_us")?.map(timestamp),
        paused_by: row.try_get("paused_by")?,
        paused_reason: row.try_get("paused_reason")?,
        limits: LimitsRow::of(
            row.try_get::<Option<i32>, _>("at_once")?.map(i64::from),
            row.try_get("held")?,
            row.try_get("token_us")?,
            row.try_get::<Option<i32>, _>("burst")?.map(i64::from),
            row.try_get("tokens")?,
        ),
        backfilling: row.try_get("backfilling")?,
    })
}

pub(super) async fn stranded(store: &PgStore) -> Result<Vec<Stranded>, Error> {
    let mut work = store.read().await?;
    let rows = store.query(store.sql.stranded).fetch_all(work.on()).await?;
    work.rollback().await?;
    rows.iter()
        .map(|row| {
            Ok(Stranded {
                application: row.try_get("application")?,
                subscription: row.try_get("name")?,
                waiting: row.try_get("waiting")?,
                later: row.try_get("later")?,
            })
        })
        .collect()
}

/// Where its age in seconds may not be seen, an old one is so many transactions old.
const OLD_TRANSACTIONS: i32 = 50_000;

pub(super) async fn held_back(store: &PgStore, longer_than: Duration) -> Result<Option<HeldBack>, Error> {
    let mut work = store.read().await?;
    let query = store.query(store.sql.held_back).bind(longer_than.as_secs_f64()).bind(OLD_TRANSACTIONS);
    let row = query.fetch_optional(work.on()).await?;
    work.rollback().await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(HeldBack {
        kind: row.try_get("kind")?,
        pid: row.try_get("pid")?,
        name: row.try_get("name")?,
        login: row.try_get("login")?,
        state: row.try_get("state")?,
        age_s: row.try_get("age_s")?,
        transactions: row.try_get::<i32, _>("transactions")?.into(),
        dead_rows: row.try_get::<Option<i64>, _>("dead_rows")?.unwrap_or(0),
    }))
}

pub(super) async fn status(store: &PgStore) -> Result<Status, Error> {
    let subscriptions = subscriptions(store).await?;
    let stranded = stranded(store).await?;
    let held_back = held_back(store, HELD_BACK).await?;
    let schedules = ScheduleStatus::of(&schedules::all(store).await?);
    let mut work = store.read().await?;
    let schema = &store.schema;
    let sql = format!(
        "select id, name, application, (extract(epoch from started_at) * 1000000::numeric)::bigint as started_us,
            expires_at > pg_catalog.statement_timestamp() as alive
         from {schema}.worker order by application, name, started_at"
    );
    let workers = store.dynamic(sql).fetch_all(work.on()).await?;
    let sql = format!(
        "select (select pg_catalog.max(version) from {schema}.migration) as version,
            (select pg_catalog.count(*) from (select from {schema}.unrouted limit 100001) u) as unrouted,
            array(select distinct u.topic from (select topic from {schema}.unrouted limit 1000) u order by 1 limit 20) as topics"
    );
    let row = store.dynamic(sql).fetch_one(work.on()).await?;
    let sources = inbox::sources(store, &mut work).await?;
    let relayed = relays::all(store, &mut work).await?;
    work.rollback().await?;
    Ok(Status {
        sources,
        sinks: crate::store::relays::rows(&subscriptions, relayed),
        schema_version: row.try_get::<Option<i32>, _>("version")?.unwrap_or(0).max(0) as u32,
        workers: workers
            .iter()
            .map(|row| {
                Ok(WorkerRow {
                    id: row.try_get("id")?,
                    name: row.try_get("name")?,
                    application: row.try_get("application")?,
                    started_at: timestamp(row.try_get("started_us")?),
                    alive: row.try_get("alive")?,
                })
            })
            .collect::<Result<_, Error>>()?,
        subscriptions,
        schedules,
        unrouted: row.try_get("unrouted")?,
        unrouted_topics: row.try_get("topics")?,
        stranded,
        held_back,
    })
}

/// What an operator's action is recorded with.
pub(super) struct Action<'a> {
    pub(super) actor: &'a str,
    pub(super) action: &'a str,
    pub(super) reason: &'a str,
    pub(super) delivery: Option<DeliveryId>,
    pub(super) subscription: Option<i32>,
    pub(super) rev: Option<(i32, i32)>,
    pub(super) state: Option<(State, State)>,
    pub(super) detail: Option<serde_json::Value>,
}

pub(super) async fn record(store: &PgStore, work: &mut Work, action: Action<'_>) -> Result<AuditEntry, Error> {
    let row = store
        .query(store.sql.audit)
        .bind(action.actor)
        .bind(action.action)
        .bind(action.delivery)
        .bind(action.subscription)
        .bind(action.rev.map(|r| r.0))
        .bind(action.rev.map(|r| r.1))
        .bind(action.state.map(|s| s.0.as_str()))
        .bind(action.state.map(|s| s.1.as_str()))
        .bind(action.reason)
        .bind(action.detail.as_ref().map(|d| d.to_string()))
        .fetch_one(work.on())
        .await?;
    Ok(AuditEntry {
        seq: row.try_get("seq")?,
        at: timestamp(row.try_get("at_us")?),
        actor: action.actor.to_owned(),
        login: row.try_get("login")?,
        action: action.action.to_owned(),
        delivery: action.delivery,
        subscription: row.try_get("subscription")?,
        state_before: action.state.map(|s| s.0.as_str().to_owned()),
        state_after: action.state.map(|s| s.1.as_str().to_owned()),
        rev_after: action.rev.map(|r| r.1),
        reason: Some(action.reason.to_owned()),
        detail: action.detail,
    })
}

/// The loser of a race is on record too, in a transaction of its own.
pub(super) async fn lost_race(
    store: &PgStore,
    work: Work,
    actor: &str,
    action: &str,
    reason: &str,
    delivery: DeliveryId,
    error: Error,
) -> Error {
    let recorded = async {
        work.rollback().await?;
        let mut work = store.work().await?;
        let detail = Some(serde_json::json!({ "refused": error.to_string() }));
        let action = Action {
            actor,
            action,
            reason,
            delivery: Some(delivery),
            subscription: None,
            rev: None,
            state: None,
            detail,
        };
        record(store, &mut work, action).await?;
        work.commit().await?;
        Ok::<(), Error>(())
    };
    match recorded.await {
        Ok(()) => error,
        Err(failure) => failure,
    }
}

pub(super) fn moved_on(delivery: DeliveryId, seen: i32, now: i32) -> Error {
    Error::Conflict(format!(
        "delivery {delivery} is at version {now}, not {seen}: somebody changed it meanwhile; look again with `postbox show {delivery}`"
    ))
}

pub(super) async fn resolve(
    store: &PgStore,
    delivery: DeliveryId,
    resolution: &Resolution,
) -> Result<AuditEntry, Error> {
    let mut work = store.durable().await?;
    let locked = doubt::lock(store, &mut work, delivery).await?;
    let refused = match &locked {
        None => match find(store, &mut work, delivery).await? {
            None => {
                work.rollback().await?;
                return Err(no_delivery(delivery));
            }
            Some((row, _)) => Some(Error::Conflict(format!(
                "delivery {delivery} is {} and not in doubt (any more); look again with `postbox show {delivery}`",
                row.state
            ))),
        },
        Some(doubt) => match resolution.rev {
            Some(seen) if seen != doubt.rev => Some(moved_on(delivery, seen, doubt.rev)),
            _ if resolution.answer != Answer::Abandoned
                && doubt.row.try_get::<Option<String>, _>("word")?.is_some() =>
            {
                Some(Error::Conflict(format!(
                    "delivery {delivery} was resolved already (happened); a worker of its application carries it out"
                )))
            }
            _ => None,
        },
    };
    let (Some(doubt), None) = (&locked, &refused) else {
        let error = refused.unwrap_or_else(|| no_delivery(delivery));
        return Err(
            lost_race(store, work, &resolution.actor, "resolve refused", &resolution.reason, delivery, error).await
        );
    };
    let receipt = resolution.evidence.as_ref().map(|e| serde_json::json!({ "evidence": e }));
    let subscription: i32 = doubt.row.try_get("subscription")?;
    let carried_out = resolution.answer == Answer::Happened && doubt.row.try_get::<bool, _>("continues")?;
    let after = if carried_out {
        // Only a worker knows the follow-ups: it is woken to settle this with them, in one commit.
        let word = Word { actor: resolution.actor.clone(), reason: resolution.reason.clone(), receipt };
        let sql = format!(
            "update {}.doubt set word = $2::pg_catalog.json, rev = rev + 1, ask_at = pg_catalog.clock_timestamp() where delivery = $1",
            store.schema
        );
        let word = serde_json::to_string(&word).map_err(|e| Error::Refused(e.to_string()))?;
        store.dynamic(sql).bind(delivery).bind(word).execute(work.on()).await?;
        State::InDoubt
    } else {
        let answered = Answered {
            delivery,
            rev: doubt.rev,
            answer: resolution.answer,
            speaker: Speaker::Operator,
            actor: resolution.actor.clone(),
            reason: Some(resolution.reason.clone()),
            receipt,
            follow_ups: Vec::new(),
            draw: 0.0,
        };
        doubt::end(store, &mut work, doubt, &answered).await?
    };
    let action = Action {
        actor: &resolution.actor,
        action: match resolution.answer {
            Answer::Happened => "resolve: happened",
            Answer::DidNotHappen => "resolve: did not happen",
            Answer::Abandoned => "resolve: abandoned",
        },
        reason: &resolution.reason,
        delivery: Some(delivery),
        subscription: Some(subscription),
        rev: Some((doubt.rev, doubt.rev + 1)),
        state: Some((State::InDoubt, after)),
        detail: resolution.evidence.as_ref().map(|e| serde_json::json!({ "evidence": e })),
    };
    let entry = record(store, &mut work, action).await?;
    work.commit().await?;
    Ok(entry)
}

pub(super) async fn remove_subscription(
    store: &PgStore,
    application: &str,
    name: &str,
    actor: &str,
    reason: &str,
) -> Result<AuditEntry, Error> {
    let mut work = store.durable().await?;
    let schema = &store.schema;
    store.dynamic(format!("select 1 from {schema}.routing for update")).execute(work.on()).await?;
    let sql = format!(
        "update {schema}.subscription set removed_at = pg_catalog.clock_timestamp()
         where application = $1 and name = $2 and removed_at is null returning id"
    );
    let Some(row) = store.dynamic(sql).bind(application).bind(name).fetch_optional(work.on()).await? else {
        work.rollback().await?;
        return Err(no_subscription(application, name));
    };
    store.dynamic(format!("update {schema}.routing set epoch = epoch + 1")).execute(work.on()).await?;
    let action = Action {
        actor,
        action: "remove subscription",
        reason,
        delivery: None,
        subscription: Some(row.try_get("id")?),
        rev: None,
        state: None,
        detail: Some(serde_json::json!({ "application": application, "name": name })),
    };
    let entry = record(store, &mut work, action).await?;
    work.commit().await?;
    Ok(entry)
}

pub(super) async fn audit(store: &PgStore, limit: u32) -> Result<Vec<AuditEntry>, Error> {
    let mut work = store.read().await?;
    let sql = format!(
        "select a.seq, (extract(epoch from a.at) * 1000000::numeric)::bigint as at_us, a.actor, a.login, a.action,
            a.delivery, s.name as subscription, a.state_before, a.state_after, a.rev_after, a.reason,
            a.detail::pg_catalog.text as detail
         from {0}.audit a left join {0}.subscription s on s.id = a.subscription
         order by a.seq desc limit $1",
        store.schema
    );
    let rows = store.dynamic(sql).bind(i64::from(limit)).fetch_all(work.on()).await?;
    work.rollback().await?;
    rows.iter()
        .map(|row| {
            Ok(AuditEntry {
                seq: row.try_get("seq")?,
                at: timestamp(row.try_get("at_us")?),
                actor: row.try_get("actor")?,
                login: row.try_get("login")?,
                action: row.try_get("action")?,
                delivery: row.try_get("delivery")?,
                subscription: row.try_get("subscription")?,
                state_before: row.try_get("state_before")?,
                state_after: row.try_get("state_after")?,
                rev_after: row.try_get("rev_after")?,
                reason: row.try_get("reason")?,
                detail: row.try_get::<Option<String>, _>("detail")?.and_then(|d| serde_json::from_str(&d).ok()),
            })
        })
        .collect()
}
