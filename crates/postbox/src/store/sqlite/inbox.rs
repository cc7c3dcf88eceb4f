//! What comes in: dedup, quarantine, sources and their counts, in one transaction a batch.

use std::collections::HashMap;

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};
use uuid::Uuid;

use super::admin::{Action, record};
use super::{SqliteStore, Work, json_of, millis_up, timestamp, unique};
use crate::admin::{
    AuditEntry, QuarantineDetail, QuarantineFilter, QuarantineRow, QuarantineWish, SourceRow, no_source,
    not_in_quarantine,
};
use crate::crash;
use crate::error::Error;
use crate::message::chunks;
use crate::planted::planted;
use crate::raw::Raw;
use crate::store::inbox::{
    Arrival, Arrived, Intake, OpenedSource, ReadAgain, Requested, Sorted, SourceId, SourceReport, Taken, Tally,
};
use crate::store::{Pause, Stored};

pub(super) async fn open(
    store: &SqliteStore,
    application: &str,
    name: &str,
    kind: &str,
) -> Result<OpenedSource, Error> {
    let mut work = store.write().await?;
    let row = sqlx::query(
        "insert into postbox_source (application, name, kind) values (?1, ?2, ?3)
         on conflict (application, name) do update
             set checkpoint = case when kind = excluded.kind then checkpoint end, kind = excluded.kind
         returning id, paused_at is not null as paused, checkpoint",
    )
    .bind(application)
    .bind(name)
    .bind(kind)
    .fetch_one(work.on())
    .await?;
    work.commit().await?;
    Ok(OpenedSource { id: row.try_get("id")?, paused: row.try_get("paused")?, checkpoint: row.try_get("checkpoint")? })
}

pub(super) async fn report(store: &SqliteStore, source: SourceId, report: &SourceReport) -> Result<bool, Error> {
    let mut work = Work::write_lightly(&store.writer).await?;
    let paused: Option<bool> = sqlx::query_scalar(
        "update postbox_source set lag = ?2, checkpoint = coalesce(?3, checkpoint), trouble = ?4,
            seen_at = (select now from postbox_clock)
         where id = ?1 returning paused_at is not null",
    )
    .bind(source)
    .bind(report.lag)
    .bind(&report.checkpoint)
    .bind(&report.trouble)
    .fetch_optional(work.on())
    .await?;
    work.commit().await?;
    // One that is not there is nobody's.
    Ok(paused.unwrap_or(true))
}

pub(super) async fn crowded(store: &SqliteStore, most: u32) -> Result<bool, Error> {
    let waiting: i64 =
        sqlx::query_scalar("select count(*) from (select 1 from postbox_delivery where state = 'pending' limit ?1)")
            .bind(most)
            .fetch_one(&store.reader)
            .await?;
    Ok(waiting >= i64::from(most))
}

pub(super) async fn receive(store: &SqliteStore, intake: Intake, arrivals: &[Arrival]) -> Result<Vec<Taken>, Error> {
    let mut work = store.write().await?;
    let (taken, tally) = take(work.on(), intake, arrivals).await?;
    count(work.on(), intake.source, tally).await?;
    crash::commit("receiving", work.commit()).await?;
    if tally.received > 0 {
        store.shared.bell.ring();
    }
    Ok(taken)
}

/// Stores what has not come before. There is one writer: nobody else brings the same meanwhile.
async fn take(db: &mut SqliteConnection, intake: Intake, arrivals: &[Arrival]) -> Result<(Vec<Taken>, Tally), Error> {
    let known = match planted!("inbox-forgets") {
        true => HashMap::new(),
        false => known(db, intake.source, arrivals).await?,
    };
    let sorted = Sorted::new(arrivals, &known);
    let drafts = sorted.drafts();
    let mut ids = Vec::with_capacity(drafts.len());
    for chunk in chunks(&drafts) {
        for stored in unique::publish(db, chunk).await? {
            ids.push(match stored {
                Stored::New(id) | Stored::Coalesced { id, .. } | Stored::Duplicate { existing: id, .. } => id,
            });
        }
    }
    for (place, id) in sorted.fresh.iter().zip(&ids) {
        let Arrived::Message { identity, body_hash, .. } = &arrivals[*place].what else { continue };
        sqlx::query(
            "insert into postbox_inbox (source, identity, message, body_hash, expires_at)
             select ?1, ?2, ?3, ?4, now + ?5 from postbox_clock where true
             on conflict (source, identity) do update
                 set message = excluded.message, body_hash = excluded.body_hash, expires_at = excluded.expires_at",
        )
        .bind(intake.source)
        .bind(identity)
        .bind(id)
        .bind(body_hash)
        .bind(millis_up(intake.remember))
        .execute(&mut *db)
        .await?;
    }
    let (mut taken, aside) = sorted.taken(&ids);
    let mut new = Vec::new();
    for kept in &aside {
        let raw = &kept.arrival.raw;
        let made: Option<i64> = sqlx::query_scalar(
            "insert into postbox_quarantine (source, kind, position, identity, reason, message, fields, body, at)
             select ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, now from postbox_clock where true
             on conflict (source, kind, position) do nothing returning id",
        )
        .bind(intake.source)
        .bind(kept.kind().as_str())
        .bind(&kept.arrival.position)
        .bind(kept.identity())
        .bind(kept.reason())
        .bind(kept.message())
        .bind((!raw.fields.is_empty()).then(|| raw.fields_json().to_string()))
        .bind(raw.body.as_deref())
        .fetch_optional(&mut *db)
        .await?;
        let id = match made {
            Some(id) => {
                new.push(kept.place);
                id
            }
            None => {
                sqlx::query_scalar(
                    "select id from postbox_quarantine where source = ?1 and kind = ?2 and position = ?3",
                )
                .bind(intake.source)
                .bind(kept.kind().as_str())
                .bind(&kept.arrival.position)
                .fetch_one(&mut *db)
                .await?
            }
        };
        taken[kept.place] = Some(kept.taken(id));
    }
    let taken: Vec<Taken> = taken.into_iter().flatten().collect();
    let tally = Tally::of(&taken, &aside, &new);
    Ok((taken, tally))
}

async fn known(
    db: &mut SqliteConnection,
    source: SourceId,
    arrivals: &[Arrival],
) -> Result<HashMap<String, (Uuid, Vec<u8>)>, Error> {
    let identities: Vec<&str> = arrivals
        .iter()
        .filter_map(|arrival| match &arrival.what {
            Arrived::Message { identity, .. } => Some(identity.as_str()),
            Arrived::Aside { .. } => None,
        })
        .collect();
    let rows = sqlx::query(
        "select identity, message, body_hash from postbox_inbox
         where source = ?1 and identity in (select value from json_each(?2))
             and expires_at > (select now from postbox_clock)",
    )
    .bind(source)
    .bind(json_of(&identities)?)
    .fetch_all(db)
    .await?;
    let read = |row: &SqliteRow| Ok((row.try_get("identity")?, (row.try_get("message")?, row.try_get("body_hash")?)));
    rows.iter().map(read).collect()
}

async fn count(db: &mut SqliteConnection, source: SourceId, tally: Tally) -> Result<(), Error> {
    sqlx::query(
        "update postbox_source set received = received + ?2, duplicate = duplicate + ?3, conflict = conflict + ?4,
            quarantined = quarantined + ?5, lost = lost + ?6, last_at = (select now from postbox_clock)
         where id = ?1",
    )
    .bind(source)
    .bind(tally.received)
    .bind(tally.duplicate)
    .bind(tally.conflict)
    .bind(tally.quarantined)
    .bind(tally.lost)
    .execute(db)
    .await?;
    Ok(())
}

pub(super) async fn requested(store: &SqliteStore, source: SourceId, limit: u32) -> Result<Vec<Requested>, Error> {
    let rows = sqlx::query(
        "select id, position, fields, body from postbox_quarantine
         where source = ?1 and retry_at is not null order by id limit ?2",
    )
    .bind(source)
    .bind(limit)
    .fetch_all(&store.reader)
    .await?;
    rows.iter()
        .map(|row| {
            let fields: Option<String> = row.try_get("fields")?;
            Ok(Requested {
                quarantine: row.try_get("id")?,
                position: row.try_get("position")?,
                raw: Raw::stored(fields.as_deref(), row.try_get("body")?).unwrap_or_default(),
            })
        })
        .collect()
}

pub(super) async fn read_again(store: &SqliteStore, intake: Intake, again: &ReadAgain) -> Result<Option<Uuid>, Error> {
    let mut work = store.write().await?;
    // Another process may have been at it.
    let wanted: Option<i64> = sqlx::query_scalar(
        "select id from postbox_quarantine where id = ?1 and retry_at is not null and ended_at is null",
    )
    .bind(again.quarantine)
    .fetch_optional(work.on())
    .await?;
    if wanted.is_none() {
        work.rollback().await?;
        return Ok(None);
    }
    let (words, message, ends) = match &again.came_to {
        Err(words) => (words.clone(), None, false),
        Ok(arrival) => {
            let (taken, tally) = take(work.on(), intake, std::slice::from_ref(arrival)).await?;
            count(work.on(), intake.source, tally).await?;
            crate::store::inbox::came_to(taken.first())
        }
    };
    sqlx::query(
        "update postbox_quarantine set retry_at = null, retried = ?2, message = coalesce(?3, message),
            ended_at = case when ?4 then (select now from postbox_clock) end
         where id = ?1",
    )
    .bind(again.quarantine)
    .bind(words)
    .bind(message)
    .bind(ends)
    .execute(work.on())
    .await?;
    work.commit().await?;
    store.shared.bell.ring();
    Ok(message)
}

/// Ids that need not be remembered any longer, and entries of quarantine that became messages a month ago.
pub(super) async fn tidy(db: &mut SqliteConnection) -> Result<u64, Error> {
    let removed = sqlx::query(
        "delete from postbox_inbox where (source, identity) in (
            select source, identity from postbox_inbox where expires_at <= (select now from postbox_clock) limit 1000)",
    )
    .execute(&mut *db)
    .await?
    .rows_affected();
    sqlx::query(
        "delete from postbox_quarantine where id in (
            select id from postbox_quarantine where ended_at < (select now from postbox_clock) - 2592000000 limit 1000)",
    )
    .execute(db)
    .await?;
    Ok(removed)
}

pub(super) async fn sources(db: &mut SqliteConnection) -> Result<Vec<SourceRow>, Error> {
    let rows = sqlx::query(
        "select s.*, coalesce(s.seen_at > c.now - 20000, false) as seen
         from postbox_source s cross join postbox_clock c order by s.application, s.name",
    )
    .fetch_all(db)
    .await?;
    let read = |row: &SqliteRow| {
        let paused_at = row.try_get::<Option<i64>, _>("paused_at")?.map(timestamp);
        let trouble: Option<String> = row.try_get("trouble")?;
        let seen = row.try_get("seen")?;
        Ok(SourceRow {
            application: row.try_get("application")?,
            name: row.try_get("name")?,
            kind: row.try_get("kind")?,
            state: crate::store::inbox::state(paused_at.is_some(), seen, trouble.is_some()).into(),
            lag: row.try_get("lag")?,
            received: row.try_get("received")?,
            duplicate: row.try_get("duplicate")?,
            conflict: row.try_get("conflict")?,
            quarantined: row.try_get("quarantined")?,
            lost: row.try_get("lost")?,
            last_at: row.try_get::<Option<i64>, _>("last_at")?.map(timestamp),
            trouble: trouble.filter(|_| seen),
            paused_at,
        })
    };
    rows.iter().map(read).collect()
}

pub(super) async fn pause(
    store: &SqliteStore,
    application: &str,
    name: &str,
    pause: &Pause<'_>,
) -> Result<AuditEntry, Error> {
    let mut work = store.write().await?;
    let done = sqlx::query(
        "update postbox_source set paused_at = case when ?3 then coalesce(paused_at, (select now from postbox_clock)) end
         where application = ?1 and name = ?2",
    )
    .bind(application)
    .bind(name)
    .bind(pause.pauses)
    .execute(work.on())
    .await?;
    if done.rows_affected() == 0 {
        work.rollback().await?;
        return Err(no_source(application, name));
    }
    let action = Action {
        actor: pause.actor,
        action: crate::store::inbox::pause_action(pause.pauses),
        reason: pause.reason,
        delivery: None,
        subscription: None,
        rev: None,
        state: None,
        detail: Some(serde_json::json!({ "application": application, "source": name })),
    };
    let entry = record(&mut work, action).await?;
    work.commit().await?;
    Ok(entry)
}

const COLUMNS: &str = "q.*, s.application, s.name,
    coalesce(length(cast(q.fields as blob)), 0) + coalesce(length(q.body), 0) as bytes
    from postbox_quarantine q join postbox_source s on s.id = q.source";

fn row_of(row: &SqliteRow) -> Result<QuarantineRow, Error> {
    Ok(QuarantineRow {
        id: row.try_get("id")?,
        application: row.try_get("application")?,
        source: row.try_get("name")?,
        kind: row.try_get("kind")?,
        position: row.try_get("position")?,
        reason: row.try_get("reason")?,
        identity: row.try_get("identity")?,
        message: row.try_get("message")?,
        at: timestamp(row.try_get("at")?),
        retry_at: row.try_get::<Option<i64>, _>("retry_at")?.map(timestamp),
        retried: row.try_get("retried")?,
        ended_at: row.try_get::<Option<i64>, _>("ended_at")?.map(timestamp),
        bytes: row.try_get("bytes")?,
    })
}

pub(super) async fn quarantine(
    store: &SqliteStore,
    filter: &QuarantineFilter,
    limit: u32,
) -> Result<Vec<QuarantineRow>, Error> {
    let sql = format!(
        "select {COLUMNS} where (?1 is null or s.application = ?1) and (?2 is null or s.name = ?2)
             and (?3 is null or q.kind = ?3) and (?4 or q.ended_at is null)
         order by q.id desc limit ?5"
    );
    let rows = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(&filter.application)
        .bind(&filter.source)
        .bind(&filter.kind)
        .bind(filter.ended)
        .bind(limit)
        .fetch_all(&store.reader)
        .await?;
    rows.iter().map(row_of).collect()
}

async fn one(db: &mut SqliteConnection, id: i64) -> Result<Option<SqliteRow>, Error> {
    let sql = format!("select {COLUMNS} where q.id = ?1");
    Ok(sqlx::query(sqlx::AssertSqlSafe(sql)).bind(id).fetch_optional(db).await?)
}

pub(super) async fn quarantined(store: &SqliteStore, id: i64) -> Result<Option<QuarantineDetail>, Error> {
    let mut work = store.read().await?;
    let row = one(work.on(), id).await?;
    work.rollback().await?;
    let Some(row) = row else { return Ok(None) };
    let fields: Option<String> = row.try_get("fields")?;
    let raw = Raw::stored(fields.as_deref(), row.try_get("body")?).unwrap_or_default();
    Ok(Some(QuarantineDetail { row: row_of(&row)?, raw }))
}

pub(super) async fn wish(
    store: &SqliteStore,
    id: i64,
    wish: QuarantineWish,
    actor: &str,
    reason: &str,
) -> Result<AuditEntry, Error> {
    let mut work = store.write().await?;
    let Some(row) = one(work.on(), id).await? else {
        work.rollback().await?;
        return Err(not_in_quarantine(id));
    };
    let row = row_of(&row)?;
    if let Some(refused) = wish.refusal(&row) {
        work.rollback().await?;
        return Err(refused);
    }
    match wish {
        QuarantineWish::Retry => {
            sqlx::query("update postbox_quarantine set retry_at = (select now from postbox_clock) where id = ?1")
                .bind(id)
                .execute(work.on())
                .await?;
        }
        QuarantineWish::Drop => {
            sqlx::query("delete from postbox_quarantine where id = ?1").bind(id).execute(work.on()).await?;
        }
    }
    let action = Action {
        actor,
        action: wish.action(),
        reason,
        delivery: None,
        subscription: None,
        rev: None,
        state: None,
        detail: Some(crate::store::inbox::detail(&row)),
    };
    let entry = record(&mut work, action).await?;
    work.commit().await?;
    Ok(entry)
}
