//! What comes in: dedup, quarantine, sources and their counts, in one transaction a batch.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;

use sqlx::Row;
use sqlx::postgres::PgRow;
use uuid::Uuid;

use super::admin::{Action, record};
use super::publish::{Refusing, publish};
use super::{PgStore, Work, micros, timestamp};
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
    Arrival, Arrived, Intake, OpenedSource, ReadAgain, Requested, Sorted, SourceId, SourceReport, Taken, Tally, came_to,
};
use crate::store::{Pause, Stored};

pub(super) async fn open(store: &PgStore, application: &str, name: &str, kind: &str) -> Result<OpenedSource, Error> {
    let mut work = store.work().await?;
    // Twice: somebody else may make it at the same time.
    for _ in 0..2 {
        let sql = format!(
            "select id, paused_at is not null as paused, checkpoint, kind from {}.source where application = $1 and name = $2",
            store.schema
        );
        if let Some(row) = store.dynamic(sql).bind(application).bind(name).fetch_optional(work.on()).await? {
            let id = row.try_get("id")?;
            if row.try_get::<String, _>("kind")? != kind {
                let sql = format!("update {}.source set kind = $2, checkpoint = null where id = $1", store.schema);
                store.dynamic(sql).bind(id).bind(kind).execute(work.on()).await?;
            }
            work.commit().await?;
            return Ok(OpenedSource { id, paused: row.try_get("paused")?, checkpoint: row.try_get("checkpoint")? });
        }
        let sql = format!(
            "insert into {}.source (application, name, kind) values ($1, $2, $3) on conflict (application, name) do nothing",
            store.schema
        );
        store.dynamic(sql).bind(application).bind(name).bind(kind).execute(work.on()).await?;
    }
    Err(no_source(application, name))
}

pub(super) async fn report(store: &PgStore, source: SourceId, report: &SourceReport) -> Result<bool, Error> {
    let mut work = store.work().await?;
    let sql = format!(
        "update {}.source set lag = $2, checkpoint = coalesce($3, checkpoint), trouble = $4, seen_at = pg_catalog.clock_timestamp()
         where id = $1 returning paused_at is not null as paused",
        store.schema
    );
    let query = store.dynamic(sql).bind(source).bind(report.lag).bind(&report.checkpoint).bind(&report.trouble);
    let row = query.fetch_optional(work.on()).await?;
    work.commit().await?;
    // One that is not there is nobody's.
    row.map_or(Ok(true), |row| Ok(row.try_get("paused")?))
}

pub(super) async fn crowded(store: &PgStore, most: u32) -> Result<bool, Error> {
    let mut work = store.read().await?;
    let sql = format!("select pg_catalog.count(*) as waiting from (select from {}.ready r limit $1) r", store.schema);
    let row = store.dynamic(sql).bind(i64::from(most)).fetch_one(work.on()).await?;
    work.rollback().await?;
    Ok(row.try_get::<i64, _>("waiting")? >= i64::from(most))
}

/// How often two processes may have brought the same id at the same time, one after the other.
const ROUNDS: usize = 100;
/// After something that had come before, this many more batches look their ids up first.
const LOOKS: u32 = 100;

pub(super) async fn receive(store: &PgStore, intake: Intake, arrivals: &[Arrival]) -> Result<Vec<Taken>, Error> {
    // As a rule nothing comes twice, and then nobody needs to look: writing the ids down tells. That costs a transaction,
    // and a line in the server's log, so it is told once for many batches.
    let mut looks = store.looks.load(Ordering::Relaxed) > 0;
    for _ in 0..ROUNDS {
        let mut work = store.durable().await?;
        let Some((taken, tally)) = take(store, &mut work, intake, arrivals, looks).await? else {
            // One of these was brought before, or by somebody else this moment: the next look sees it.
            work.rollback().await?;
            looks = true;
            store.looks.store(LOOKS, Ordering::Relaxed);
            continue;
        };
        if tally.duplicate + tally.conflict > 0 {
            store.looks.store(LOOKS, Ordering::Relaxed);
        } else if looks {
            store.looks.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).ok();
        }
        count(store, &mut work, intake, tally).await?;
        crash::commit("receiving", work.commit()).await?;
        return Ok(taken);
    }
    Err(Error::Busy(sqlx::Error::Protocol("the ids keep changing hands; trying again".into())))
}

/// Stores what has not come before; nothing, if one of them has and nobody looked, or has come meanwhile.
async fn take(
    store: &PgStore,
    work: &mut Work,
    intake: Intake,
    arrivals: &[Arrival],
    looks: bool,
) -> Result<Option<(Vec<Taken>, Tally)>, Error> {
    let known = match looks && !planted!("inbox-forgets") {
        true => known(store, work, intake.source, arrivals).await?,
        false => HashMap::new(),
    };
    let sorted = Sorted::new(arrivals, &known);
    let drafts = sorted.drafts();
    let mut ids = Vec::with_capacity(drafts.len());
    for chunk in chunks(&drafts) {
        for stored in publish(work.on(), store, chunk, Refusing::Nobody).await? {
            ids.push(match stored {
                Stored::New(id) | Stored::Coalesced { id, .. } | Stored::Duplicate { existing: id, .. } => id,
            });
        }
    }
    if !planted!("inbox-forgets") && !remember(store, work, intake, &sorted, arrivals, &ids, looks).await? {
        return Ok(None);
    }
    let (mut taken, aside) = sorted.taken(&ids);
    let mut new = Vec::new();
    for kept in &aside {
        let raw = &kept.arrival.raw;
        let sql = format!(
            "insert into {0}.quarantine (source, kind, position, identity, reason, message, fields, body)
             values ($1, $2, $3, $4, $5, $6, $7::pg_catalog.json, $8)
             on conflict (source, kind, position) do nothing returning id",
            store.schema
        );
        let query = store
            .dynamic(sql)
            .bind(intake.source)
            .bind(kept.kind().as_str())
            .bind(&kept.arrival.position)
            .bind(kept.identity())
            .bind(kept.reason())
            .bind(kept.message())
            .bind((!raw.fields.is_empty()).then(|| raw.fields_json().to_string()))
            .bind(raw.body.as_deref());
        let id: i64 = match query.fetch_optional(work.on()).await? {
            Some(row) => {
                new.push(kept.place);
                row.try_get("id")?
            }
            None => {
                let sql = format!(
                    "select q.id from {}.quarantine q where q.source = $1 and q.kind = $2 and q.position = $3",
                    store.schema
                );
                let query = store.dynamic(sql).bind(intake.source).bind(kept.kind().as_str());
                match query.bind(&kept.arrival.position).fetch_optional(work.on()).await? {
                    Some(row) => row.try_get("id")?,
                    // An operator has dropped it this moment.
                    None => return Ok(None),
                }
            }
        };
        taken[kept.place] = Some(kept.taken(id));
    }
    let taken: Vec<Taken> = taken.into_iter().flatten().collect();
    let tally = Tally::of(&taken, &aside, &new);
    Ok(Some((taken, tally)))
}

async fn known(
    store: &PgStore,
    work: &mut Work,
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
    if identities.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = store.query(store.sql.inbox_known).bind(source).bind(identities).fetch_all(work.on()).await?;
    let read = |row: &PgRow| Ok((row.try_get("identity")?, (row.try_get("message")?, row.try_get("body_hash")?)));
    rows.iter().map(read).collect()
}

/// Puts down the ids of what was published; `false` if somebody else was there before.
async fn remember(
    store: &PgStore,
    work: &mut Work,
    intake: Intake,
    sorted: &Sorted<'_>,
    arrivals: &[Arrival],
    ids: &[Uuid],
    looks: bool,
) -> Result<bool, Error> {
    // In one order for all, so that two cannot wait for each other.
    let mut rows = BTreeMap::new();
    for (place, id) in sorted.fresh.iter().zip(ids) {
        if let Arrived::Message { identity, body_hash, .. } = &arrivals[*place].what {
            rows.insert(identity.as_str(), (*id, body_hash.as_slice()));
        }
    }
    if rows.is_empty() {
        return Ok(true);
    }
    let wanted = rows.len() as u64;
    let done = store
        .query(if looks { store.sql.inbox_remember } else { store.sql.inbox_remember_new })
        .bind(intake.source)
        .bind(rows.keys().copied().collect::<Vec<_>>())
        .bind(rows.values().map(|(id, _)| *id).collect::<Vec<_>>())
        .bind(rows.values().map(|(_, hash)| *hash).collect::<Vec<_>>())
        .bind(micros(intake.remember))
        .execute(work.on())
        .await;
    match done {
        Ok(done) => Ok(done.rows_affected() == wanted),
        Err(sqlx::Error::Database(error)) if !looks && error.is_unique_violation() => Ok(false),
        Err(error) => Err(error.into()),
    }
}

async fn count(store: &PgStore, work: &mut Work, intake: Intake, tally: Tally) -> Result<(), Error> {
    store
        .query(store.sql.inbox_count)
        .bind(intake.source)
        .bind(intake.slot)
        .bind(tally.received)
        .bind(tally.duplicate)
        .bind(tally.conflict)
        .bind(tally.quarantined)
        .bind(tally.lost)
        .execute(work.on())
        .await?;
    Ok(())
}

pub(super) async fn requested(store: &PgStore, source: SourceId, limit: u32) -> Result<Vec<Requested>, Error> {
    let mut work = store.read().await?;
    let sql = format!(
        "select q.id, q.position, q.fields::pg_catalog.text as fields, q.body
         from {}.quarantine q where q.source = $1 and q.retry_at is not null order by q.id limit $2",
        store.schema
    );
    let rows = store.dynamic(sql).bind(source).bind(i64::from(limit)).fetch_all(work.on()).await?;
    work.rollback().await?;
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

pub(super) async fn read_again(store: &PgStore, intake: Intake, again: &ReadAgain) -> Result<Option<Uuid>, Error> {
    for _ in 0..ROUNDS {
        let mut work = store.durable().await?;
        // Another process may be at it.
        let sql = format!(
            "select from {}.quarantine q where q.id = $1 and q.retry_at is not null and q.ended_at is null for update skip locked",
            store.schema
        );
        if store.dynamic(sql).bind(again.quarantine).fetch_optional(work.on()).await?.is_none() {
            work.rollback().await?;
            return Ok(None);
        }
        let (words, message, ends) = match &again.came_to {
            Err(words) => (words.clone(), None, false),
            Ok(arrival) => match take(store, &mut work, intake, std::slice::from_ref(arrival), true).await? {
                None => {
                    work.rollback().await?;
                    continue;
                }
                Some((taken, tally)) => {
                    count(store, &mut work, intake, tally).await?;
                    came_to(taken.first())
                }
            },
        };
        let sql = format!(
            "update {}.quarantine set retry_at = null, retried = $2, message = coalesce($3, message),
                ended_at = case when $4 then pg_catalog.clock_timestamp() end where id = $1",
            store.schema
        );
        store.dynamic(sql).bind(again.quarantine).bind(words).bind(message).bind(ends).execute(work.on()).await?;
        work.commit().await?;
        return Ok(message);
    }
    Err(Error::Busy(sqlx::Error::Protocol("the ids keep changing hands; trying again".into())))
}

/// Ids that need not be remembered any longer, and entries of quarantine that became messages a month ago.
pub(super) async fn tidy(store: &PgStore, work: &mut Work) -> Result<u64, Error> {
    // Without statistics, the whole table would be walked.
    store.query("set local enable_seqscan = off").execute(work.on()).await?;
    let sql = format!(
        "delete from {0}.inbox i using (
            select source, identity from {0}.inbox where expires_at <= pg_catalog.statement_timestamp()
            limit 1000 for update skip locked) gone
         where i.source = gone.source and i.identity = gone.identity",
        store.schema
    );
    let removed = store.dynamic(sql).execute(work.on()).await?.rows_affected();
    let sql = format!(
        "delete from {0}.quarantine q where q.id in (
            select id from {0}.quarantine where ended_at < pg_catalog.statement_timestamp() - interval '30 days'
            limit 1000 for update skip locked)",
        store.schema
    );
    store.dynamic(sql).execute(work.on()).await?;
    Ok(removed)
}

pub(super) async fn sources(store: &PgStore, work: &mut Work) -> Result<Vec<SourceRow>, Error> {
    let sql = format!(
        "select s.application, s.name, s.kind, s.lag, s.trouble,
            (extract(epoch from s.paused_at) * 1000000::numeric)::bigint as paused_us,
            coalesce(s.seen_at > pg_catalog.statement_timestamp() - interval '20 seconds', false) as seen,
            coalesce(t.received, 0)::bigint as received, coalesce(t.duplicate, 0)::bigint as duplicate,
            coalesce(t.conflict, 0)::bigint as conflict, coalesce(t.quarantined, 0)::bigint as quarantined,
            coalesce(t.lost, 0)::bigint as lost, t.last_us
         from {0}.source s
         left join (
            select source, pg_catalog.sum(received) as received, pg_catalog.sum(duplicate) as duplicate,
                pg_catalog.sum(conflict) as conflict, pg_catalog.sum(quarantined) as quarantined,
                pg_catalog.sum(lost) as lost, (extract(epoch from pg_catalog.max(last_at)) * 1000000::numeric)::bigint as last_us
            from {0}.source_tally group by source
         ) t on t.source = s.id
         order by s.application, s.name",
        store.schema
    );
    let read = |row: &PgRow| {
        let paused_at = row.try_get::<Option<i64>, _>("paused_us")?.map(timestamp);
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
            last_at: row.try_get::<Option<i64>, _>("last_us")?.map(timestamp),
            trouble: trouble.filter(|_| seen),
            paused_at,
        })
    };
    store.dynamic(sql).fetch_all(work.on()).await?.iter().map(read).collect()
}

pub(super) async fn pause(
    store: &PgStore,
    application: &str,
    name: &str,
    pause: &Pause<'_>,
) -> Result<AuditEntry, Error> {
    let mut work = store.durable().await?;
    let sql = format!(
        "update {}.source set paused_at = case when $3 then coalesce(paused_at, pg_catalog.clock_timestamp()) end
         where application = $1 and name = $2",
        store.schema
    );
    let done = store.dynamic(sql).bind(application).bind(name).bind(pause.pauses).execute(work.on()).await?;
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
    let entry = record(store, &mut work, action).await?;
    work.commit().await?;
    Ok(entry)
}

/// The columns of a row, in the table `q` with its source `s`.
fn columns() -> &'static str {
    "q.id, s.application, s.name, q.kind, q.position, q.reason, q.identity, q.message, q.retried,
     (extract(epoch from q.at) * 1000000::numeric)::bigint as at_us,
     (extract(epoch from q.retry_at) * 1000000::numeric)::bigint as retry_us,
     (extract(epoch from q.ended_at) * 1000000::numeric)::bigint as ended_us,
     (coalesce(pg_catalog.octet_length(q.fields::pg_catalog.text), 0) + coalesce(pg_catalog.octet_length(q.body), 0))::bigint as bytes"
}

fn row_of(row: &PgRow) -> Result<QuarantineRow, Error> {
    Ok(QuarantineRow {
        id: row.try_get("id")?,
        application: row.try_get("application")?,
        source: row.try_get("name")?,
        kind: row.try_get("kind")?,
        position: row.try_get("position")?,
        reason: row.try_get("reason")?,
        identity: row.try_get("identity")?,
        message: row.try_get("message")?,
        at: timestamp(row.try_get("at_us")?),
        retry_at: row.try_get::<Option<i64>, _>("retry_us")?.map(timestamp),
        retried: row.try_get("retried")?,
        ended_at: row.try_get::<Option<i64>, _>("ended_us")?.map(timestamp),
        bytes: row.try_get("bytes")?,
    })
}

pub(super) async fn quarantine(
    store: &PgStore,
    filter: &QuarantineFilter,
    limit: u32,
) -> Result<Vec<QuarantineRow>, Error> {
    let mut work = store.read().await?;
    let sql = format!(
        "select {} from {1}.quarantine q join {1}.source s on s.id = q.source
         where ($1::pg_catalog.text is null or s.application = $1) and ($2::pg_catalog.text is null or s.name = $2)
             and ($3::pg_catalog.text is null or q.kind = $3) and ($4 or q.ended_at is null)
         order by q.id desc limit $5",
        columns(),
        store.schema
    );
    let query = store.dynamic(sql).bind(&filter.application).bind(&filter.source).bind(&filter.kind);
    let rows = query.bind(filter.ended).bind(i64::from(limit)).fetch_all(work.on()).await?;
    work.rollback().await?;
    rows.iter().map(row_of).collect()
}

pub(super) async fn quarantined(store: &PgStore, id: i64) -> Result<Option<QuarantineDetail>, Error> {
    let mut work = store.read().await?;
    let sql = format!(
        "select {}, q.fields::pg_catalog.text as fields, q.body
         from {1}.quarantine q join {1}.source s on s.id = q.source where q.id = $1",
        columns(),
        store.schema
    );
    let row = store.dynamic(sql).bind(id).fetch_optional(work.on()).await?;
    work.rollback().await?;
    let Some(row) = row else { return Ok(None) };
    let fields: Option<String> = row.try_get("fields")?;
    let raw = Raw::stored(fields.as_deref(), row.try_get("body")?).unwrap_or_default();
    Ok(Some(QuarantineDetail { row: row_of(&row)?, raw }))
}

pub(super) async fn wish(
    store: &PgStore,
    id: i64,
    wish: QuarantineWish,
    actor: &str,
    reason: &str,
) -> Result<AuditEntry, Error> {
    let mut work = store.durable().await?;
    let sql = format!(
        "select {} from {1}.quarantine q join {1}.source s on s.id = q.source where q.id = $1 for update of q",
        columns(),
        store.schema
    );
    let Some(row) = store.dynamic(sql).bind(id).fetch_optional(work.on()).await? else {
        work.rollback().await?;
        return Err(not_in_quarantine(id));
    };
    let row = row_of(&row)?;
    if let Some(refused) = wish.refusal(&row) {
        work.rollback().await?;
        return Err(refused);
    }
    let (schema, query) = (&store.schema, |sql: String| store.dynamic(sql));
    match wish {
        QuarantineWish::Retry => {
            let sql = format!("update {schema}.quarantine set retry_at = pg_catalog.clock_timestamp() where id = $1");
            query(sql).bind(id).execute(work.on()).await?;
        }
        QuarantineWish::Drop => {
            query(format!("delete from {schema}.quarantine where id = $1")).bind(id).execute(work.on()).await?;
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
    let entry = record(store, &mut work, action).await?;
    work.commit().await?;
    Ok(entry)
}
