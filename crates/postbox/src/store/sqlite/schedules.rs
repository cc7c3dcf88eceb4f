//! Schedules: publishing their ticks, and what programs and operators want of them.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::value::RawValue;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use super::admin::{Action, record};
use super::{SqliteStore, json_of, timestamp, unique};
use crate::admin::AuditEntry;
use crate::crash;
use crate::error::Error;
use crate::planted::planted;
use crate::schedule::{Decided, Place, Plan, ScheduleRow, Scheduled, Wish, decide, fire, tell_of};
use crate::store::{IN_OTHER_HANDS, Stored, Ticked};

/// How often it is looked whether another process has changed them.
const LOOK: Duration = Duration::from_secs(1);
/// What one statement publishes: so many bytes of payloads, about, and so many messages.
const BYTES: usize = 2 << 20;
const MESSAGES: usize = 500;

pub(super) async fn tick(store: &SqliteStore) -> Result<Ticked, Error> {
    let wait: Option<i64> = sqlx::query_scalar(
        "select case when s.run_at is not null then 0 else max(0, s.next_at - c.now) end
         from postbox_schedule s cross join postbox_clock c
         where s.run_at is not null or s.next_at is not null
         order by s.run_at is null, s.next_at limit 1",
    )
    .fetch_optional(&store.reader)
    .await?;
    let wait = wait.map(|ms| Duration::from_millis(ms.unsigned_abs()));
    if wait != Some(Duration::ZERO) {
        return Ok(Ticked { published: 0, next: wait });
    }
    let mut work = store.write().await?;
    // Somebody else may have been there meanwhile.
    let now = clock(work.on()).await?;
    let due = sqlx::query(
        "select * from postbox_schedule where run_at is not null or next_at <= ?1 order by next_at limit 100",
    )
    .bind(now.as_millisecond())
    .fetch_all(work.on())
    .await?;
    let (mut published, mut served) = (0, 0);
    for row in &due {
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
            let stored = unique::publish(work.on(), drafts).await?;
            published += stored.iter().filter(|stored| !matches!(stored, Stored::Duplicate { .. })).count();
        }
        fired.tell(&schedule);
        if planted!("tick-apart") {
            crash::commit("ticking", work.commit()).await?;
            work = store.write().await?;
        }
        sqlx::query(
            "update postbox_schedule set next_at = ?3, last_at = ?4, run_at = null where application = ?1 and name = ?2",
        )
        .bind(&schedule.application)
        .bind(&schedule.name)
        .bind(fired.next_at.map(Timestamp::as_millisecond))
        .bind(fired.last_at.map(Timestamp::as_millisecond))
        .execute(work.on())
        .await?;
        served += 1;
    }
    crash::commit("ticking", work.commit()).await?;
    if published > 0 {
        store.shared.bell.ring();
    }
    Ok(Ticked { published, next: Some(if served > 0 { Duration::ZERO } else { IN_OTHER_HANDS }) })
}

async fn clock(db: &mut SqliteConnection) -> Result<Timestamp, Error> {
    Ok(timestamp(sqlx::query_scalar("select now from postbox_clock").fetch_one(db).await?))
}

pub(super) async fn rescheduled() {
    tokio::time::sleep(LOOK).await;
}

pub(super) async fn all(store: &SqliteStore) -> Result<Vec<ScheduleRow>, Error> {
    let sql = "select * from postbox_schedule order by application, name";
    sqlx::query(sql).fetch_all(&store.reader).await?.iter().map(read).collect()
}

pub(super) async fn change(
    store: &SqliteStore,
    application: &str,
    name: &str,
    wish: &Wish,
    actor: &str,
    reason: &str,
) -> Result<(Scheduled, Option<AuditEntry>), Error> {
    let mut work = store.write().await?;
    let found = sqlx::query("select * from postbox_schedule where application = ?1 and name = ?2")
        .bind(application)
        .bind(name)
        .fetch_optional(work.on())
        .await?;
    let found = found.as_ref().map(read).transpose()?;
    let now = clock(work.on()).await?;
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
            write(work.on(), &row).await?;
            (scheduled, row.rev)
        }
        Decided::Remove => {
            sqlx::query("delete from postbox_schedule where application = ?1 and name = ?2")
                .bind(application)
                .bind(name)
                .execute(work.on())
                .await?;
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
            Some(record(&mut work, action).await?)
        }
    };
    work.commit().await?;
    Ok((scheduled, entry))
}

async fn write(db: &mut SqliteConnection, row: &ScheduleRow) -> Result<(), Error> {
    let plan = &row.plan;
    let millis = |time: Option<Timestamp>| time.map(Timestamp::as_millisecond);
    sqlx::query(
        "insert or replace into postbox_schedule (application, name, cron, time_zone, topic, key, payload, headers, missed,
             next_at, last_at, paused_at, run_at, rev, made_by, edited_by)
         values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)",
    )
    .bind(&row.application)
    .bind(&row.name)
    .bind(&plan.cron)
    .bind(&plan.time_zone)
    .bind(&plan.topic)
    .bind(&plan.key)
    .bind(plan.payload.get())
    .bind(json_of(&plan.headers)?)
    .bind(plan.missed.as_str())
    .bind(millis(row.next_at))
    .bind(millis(row.last_at))
    .bind(millis(row.paused_at))
    .bind(millis(row.run_at))
    .bind(row.rev)
    .bind(&row.made_by)
    .bind(&row.edited_by)
    .execute(db)
    .await?;
    Ok(())
}

fn read(row: &SqliteRow) -> Result<ScheduleRow, Error> {
    let decode = |e: serde_json::Error| sqlx::Error::Decode(Box::new(e));
    let time = |name| row.try_get::<Option<i64>, _>(name).map(|ms| ms.map(timestamp));
    Ok(ScheduleRow {
        application: row.try_get("application")?,
        name: row.try_get("name")?,
        plan: Plan {
            cron: row.try_get("cron")?,
            time_zone: row.try_get("time_zone")?,
            topic: row.try_get("topic")?,
            key: row.try_get("key")?,
            payload: RawValue::from_string(row.try_get("payload")?).map_err(decode)?,
            headers: serde_json::from_str(row.try_get("headers")?).map_err(decode)?,
            missed: row.try_get::<String, _>("missed")?.parse()?,
        },
        next_at: time("next_at")?,
        last_at: time("last_at")?,
        paused_at: time("paused_at")?,
        run_at: time("run_at")?,
        rev: row.try_get("rev")?,
        made_by: row.try_get("made_by")?,
        edited_by: row.try_get("edited_by")?,
    })
}
