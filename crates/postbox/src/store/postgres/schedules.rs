//! Schedules: publishing their ticks, and what programs and operators want of them.

use std::time::Duration;

use serde_json::value::RawValue;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;
use sqlx::{Postgres, Row};

use super::admin::{Action, record};
use super::{PgStore, Work, publish, timestamp};
use crate::admin::AuditEntry;
use crate::crash;
use crate::error::Error;
use crate::message::Draft;
use crate::planted::planted;
use crate::schedule::{Decided, Place, Plan, ScheduleRow, Scheduled, Wish, decide, fire, tell_of};
use crate::store::{IN_OTHER_HANDS, Stored, Ticked};

/// Schedules whose ticks are published in one transaction.
const AT_ONCE: i64 = 100;
/// What one statement publishes: so many bytes of payloads, about, and so many messages.
const BYTES: usize = 2 << 20;
const MESSAGES: usize = 500;

pub(super) async fn tick(store: &PgStore) -> Result<Ticked, Error> {
    let wait = look(store).await?;
    if wait != Some(Duration::ZERO) {
        return Ok(Ticked { published: 0, next: wait });
    }
    let mut work = store.work().await?;
    let due = store.query(store.sql.schedules_due).bind(AT_ONCE).fetch_all(work.on()).await?;
    let (mut published, mut served) = (0, 0);
    for row in &due {
        let now = timestamp(row.try_get("now_us")?);
        let schedule = read(row)?;
        // What a later version has stored may not be understood by this one: it is left to others.
        let fired = match fire(&schedule, now) {
            Ok(fired) => fired,
            Err(error) => {
                tell_of(&schedule, &error);
                continue;
            }
        };
        let bytes = schedule.plan.payload.get().len().max(1);
        for drafts in fired.drafts.chunks((BYTES / bytes).clamp(1, MESSAGES)) {
            published += send(store, &mut work, drafts).await?;
        }
        fired.tell(&schedule);
        if planted!("tick-apart") {
            crash::commit("ticking", work.commit()).await?;
            work = store.work().await?;
        }
        let sql = format!(
            "update {}.schedule set next_at = {}, last_at = {}, run_at = null where application = $1 and name = $2",
            store.schema,
            time(3),
            time(4)
        );
        store
            .dynamic(sql)
            .bind(&schedule.application)
            .bind(&schedule.name)
            .bind(fired.next_at.map(|t| t.as_microsecond()))
            .bind(fired.last_at.map(|t| t.as_microsecond()))
            .execute(work.on())
            .await?;
        served += 1;
    }
    crash::commit("ticking", work.commit()).await?;
    Ok(Ticked { published, next: Some(if served > 0 { Duration::ZERO } else { IN_OTHER_HANDS }) })
}

/// How long until something is due: one statement, for all the time in which nothing is.
async fn look(store: &PgStore) -> Result<Option<Duration>, Error> {
    let single = store.alone();
    let mut work = if single { Work::single(&store.pool).await? } else { store.read().await? };
    let row = store.query(store.sql.schedules_look).fetch_optional(work.on()).await?;
    match single {
        true => work.over(),
        false => work.rollback().await?,
    }
    let wait = row.map(|row| row.try_get::<i64, _>("wait_ms")).transpose()?;
    Ok(wait.map(|ms| Duration::from_millis(ms.max(0).unsigned_abs())))
}

/// A tick that is there already was published: that is what its dedup key is for.
async fn send(store: &PgStore, work: &mut Work, drafts: &[Draft]) -> Result<usize, Error> {
    let stored = publish::publish(work.on(), store, drafts, publish::Refusing::Nobody).await?;
    Ok(stored.iter().filter(|stored| !matches!(stored, Stored::Duplicate { .. })).count())
}

pub(super) async fn rescheduled(store: &PgStore) {
    match store.wake_ups {
        true => store.bell.rescheduled.notified().await,
        false => tokio::time::sleep(Duration::from_secs(1)).await,
    }
}

pub(super) async fn all(store: &PgStore) -> Result<Vec<ScheduleRow>, Error> {
    let mut work = store.read().await?;
    let sql = format!("select {} from {}.schedule s order by s.application, s.name", columns(), store.schema);
    let rows = store.dynamic(sql).fetch_all(work.on()).await?;
    work.rollback().await?;
    rows.iter().map(read).collect()
}

pub(super) async fn change(
    store: &PgStore,
    application: &str,
    name: &str,
    wish: &Wish,
    actor: &str,
    reason: &str,
) -> Result<(Scheduled, Option<AuditEntry>), Error> {
    // Two may make the same one at the same time: the second finds it.
    loop {
        let mut work = store.work().await?;
        let sql = format!(
            "select {} from {}.schedule s where s.application = $1 and s.name = $2 for update",
            columns(),
            store.schema
        );
        let found = store.dynamic(sql).bind(application).bind(name).fetch_optional(work.on()).await?;
        let found = found.as_ref().map(read).transpose()?;
        let now = "select (extract(epoch from pg_catalog.statement_timestamp()) * 1000000::numeric)::bigint as now_us";
        let now = timestamp(store.query(now).fetch_one(work.on()).await?.try_get("now_us")?);
        let decided = match decide(found.as_ref(), Place { application, name }, wish, actor, now) {
            Ok(decided) => decided,
            Err(refused) => {
                work.rollback().await?;
                return Err(refused);
            }
        };
        let (scheduled, rev) = match decided {
            Decided::Keep(scheduled) => {
                work.rollback().await?;
                return Ok((scheduled, None));
            }
            Decided::Write(scheduled, row) => {
                let sql = if found.is_some() { update(store) } else { insert(store) };
                if bound(store.dynamic(sql), &row)?.execute(work.on()).await?.rows_affected() == 0 {
                    work.rollback().await?;
                    continue;
                }
                (scheduled, row.rev)
            }
            Decided::Remove => {
                let sql = format!("delete from {}.schedule where application = $1 and name = $2", store.schema);
                store.dynamic(sql).bind(application).bind(name).execute(work.on()).await?;
                (Scheduled::Changed, found.as_ref().map_or(0, |row| row.rev))
            }
        };
        let entry = match wish.action() {
            None => None,
            Some(action) => {
                let action = Action {
                    actor,
                    action: &format!("{action} {application}/{name}"),
                    reason,
                    delivery: None,
                    subscription: None,
                    rev: Some((found.as_ref().map_or(0, |row| row.rev), rev)),
                    state: None,
                    detail: Some(serde_json::json!({ "application": application, "schedule": name })),
                };
                Some(record(store, &mut work, action).await?)
            }
        };
        let sql = format!("select pg_catalog.pg_notify(r.channel, '{RESCHEDULED}') from {}.routing r", store.schema);
        store.dynamic(sql).execute(work.on()).await?;
        work.commit().await?;
        return Ok((scheduled, entry));
    }
}

/// What tells workers that schedules have changed, where publishers say nothing.
pub(super) const RESCHEDULED: &str = "schedules";

/// A parameter of microseconds as a time.
fn time(parameter: usize) -> String {
    format!("pg_catalog.to_timestamp(${parameter}::bigint::double precision / 1000000::double precision)")
}

fn insert(store: &PgStore) -> String {
    format!(
        "insert into {}.schedule (application, name, cron, time_zone, topic, key, payload, headers, missed, next_at, last_at,
             paused_at, run_at, rev, made_by, edited_by)
         values ($1, $2, $3, $4, $5, $6, $7::pg_catalog.json, $8::pg_catalog.json, $9, {}, {}, {}, {}, $14, $15, $16)
         on conflict do nothing",
        store.schema,
        time(10),
        time(11),
        time(12),
        time(13)
    )
}

fn update(store: &PgStore) -> String {
    format!(
        "update {}.schedule set cron = $3, time_zone = $4, topic = $5, key = $6, payload = $7::pg_catalog.json,
             headers = $8::pg_catalog.json, missed = $9, next_at = {}, last_at = {}, paused_at = {}, run_at = {}, rev = $14,
             made_by = $15, edited_by = $16
         where application = $1 and name = $2",
        store.schema,
        time(10),
        time(11),
        time(12),
        time(13)
    )
}

type Statement = Query<'static, Postgres, PgArguments>;

fn bound(statement: Statement, row: &ScheduleRow) -> Result<Statement, Error> {
    let plan = &row.plan;
    let headers = serde_json::to_string(&plan.headers).map_err(|e| sqlx::Error::Encode(Box::new(e)))?;
    let micros = |time: Option<jiff::Timestamp>| time.map(|t| t.as_microsecond());
    Ok(statement
        .bind(row.application.clone())
        .bind(row.name.clone())
        .bind(plan.cron.clone())
        .bind(plan.time_zone.clone())
        .bind(plan.topic.clone())
        .bind(plan.key.clone())
        .bind(plan.payload.get().to_owned())
        .bind(headers)
        .bind(plan.missed.as_str())
        .bind(micros(row.next_at))
        .bind(micros(row.last_at))
        .bind(micros(row.paused_at))
        .bind(micros(row.run_at))
        .bind(row.rev)
        .bind(row.made_by.clone())
        .bind(row.edited_by.clone()))
}

/// As `read` takes them.
fn columns() -> String {
    let times = ["next", "last", "paused", "run"]
        .map(|name| format!("(extract(epoch from s.{name}_at) * 1000000::numeric)::bigint as {name}_us"));
    format!(
        "s.*, s.payload::pg_catalog.text as payload_text, s.headers::pg_catalog.text as headers_text, {}",
        times.join(", ")
    )
}

fn read(row: &PgRow) -> Result<ScheduleRow, Error> {
    let decode = |e: serde_json::Error| sqlx::Error::Decode(Box::new(e));
    let time = |name| row.try_get::<Option<i64>, _>(name).map(|us| us.map(timestamp));
    Ok(ScheduleRow {
        application: row.try_get("application")?,
        name: row.try_get("name")?,
        plan: Plan {
            cron: row.try_get("cron")?,
            time_zone: row.try_get("time_zone")?,
            topic: row.try_get("topic")?,
            key: row.try_get("key")?,
            payload: RawValue::from_string(row.try_get("payload_text")?).map_err(decode)?,
            headers: serde_json::from_str(row.try_get("headers_text")?).map_err(decode)?,
            missed: row.try_get::<String, _>("missed")?.parse()?,
        },
        next_at: time("next_us")?,
        last_at: time("last_us")?,
        paused_at: time("paused_us")?,
        run_at: time("run_us")?,
        rev: row.try_get("rev")?,
        made_by: row.try_get("made_by")?,
        edited_by: row.try_get("edited_by")?,
    })
}
