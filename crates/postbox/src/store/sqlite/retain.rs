//! Retention: what has ended and was kept long enough, in one short transaction a batch.

use std::time::Duration;

use sqlx::SqliteConnection;
use uuid::Uuid;

use super::{SqliteStore, admin, json_of, timestamp};
use crate::admin::{ExpiredRow, Retained, RetentionPreview};
use crate::crash;
use crate::error::Error;
use crate::retention::{Retention, millis};

/// How often what was removed goes on record, unless somebody wants to know.
const TOLD_EVERY_MS: i64 = 3_600_000;

/// The lowest id of a message that is young enough to stay, though nobody is subscribed to it.
async fn unrouted_bound(db: &mut SqliteConnection, keep: Duration) -> Result<Uuid, Error> {
    let now: i64 = sqlx::query_scalar("select now from postbox_clock").fetch_one(db).await?;
    let at = now.saturating_sub(millis(keep)).clamp(0, (1 << 48) - 1);
    Ok(Uuid::from_u128((at as u128) << 80))
}

/// Nobody new still looks for what it wants of them.
const UNWANTED: &str = "not exists (select 1 from postbox_subscription where not backfilled and removed_at is null)";

async fn idle(store: &SqliteStore, retention: &Retention) -> Result<bool, Error> {
    let mut read = store.read().await?;
    let bound = unrouted_bound(read.on(), retention.keep_unrouted).await?;
    let sql = format!(
        "select not exists (select 1 from postbox_expired) and not exists (select 1 from postbox_expired_success)
            and not (?2 and exists (select 1 from postbox_retention where deliveries + messages > 0))
            and not ({UNWANTED} and exists (
                select 1 from postbox_unrouted u join postbox_message m on m.seq = u.seq
                where u.seq = (select min(seq) from postbox_unrouted) and m.id < ?1))"
    );
    let idle =
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).bind(bound).bind(retention.tell).fetch_one(read.on()).await?;
    read.rollback().await?;
    Ok(idle)
}

pub(super) async fn retain(store: &SqliteStore, retention: &Retention) -> Result<Retained, Error> {
    // A look first: nothing to do must not wait for the writer.
    if idle(store, retention).await? {
        return Ok(Retained::default());
    }
    let mut work = store.write().await?;
    let db = work.on();
    let expired: Vec<(i64, Uuid, i64)> = sqlx::query_as("select id, message, since from postbox_expired limit ?1")
        .bind(retention.most)
        .fetch_all(&mut *db)
        .await?;
    let bound = unrouted_bound(db, retention.keep_unrouted).await?;
    let freed: Vec<(i64, Uuid)> = sqlx::query_as(sqlx::AssertSqlSafe(format!(
        "select u.seq, m.id from postbox_unrouted u join postbox_message m on m.seq = u.seq
         where m.id < ?1 and {UNWANTED} order by u.seq limit ?2"
    )))
    .bind(bound)
    .bind(retention.most)
    .fetch_all(&mut *db)
    .await?;
    let successes = successes(db, i64::from(retention.most) - expired.len() as i64).await?;
    let straight = || successes.iter().flat_map(|s| &s.items);
    let deliveries: Vec<i64> = expired.iter().map(|(id, ..)| *id).chain(straight().map(|(id, ..)| *id)).collect();
    let removed = i64::try_from(deliveries.len()).unwrap_or(i64::MAX);
    let deliveries = json_of(&deliveries)?;
    for table in ["attempt", "outcome", "resolution", "observation"] {
        let sql = format!("delete from postbox_{table} where delivery in (select value from json_each(?1))");
        sqlx::query(sqlx::AssertSqlSafe(sql)).bind(&deliveries).execute(&mut *db).await?;
    }
    sqlx::query("delete from postbox_delivery where id in (select value from json_each(?1))")
        .bind(&deliveries)
        .execute(&mut *db)
        .await?;
    sqlx::query("delete from postbox_success where id in (select value from json_each(?1))")
        .bind(json_of(&successes.iter().map(|s| s.id).collect::<Vec<_>>())?)
        .execute(&mut *db)
        .await?;
    sqlx::query("delete from postbox_unrouted where seq in (select value from json_each(?1))")
        .bind(json_of(&freed.iter().map(|(seq, _)| *seq).collect::<Vec<_>>())?)
        .execute(&mut *db)
        .await?;
    // What they stood for goes with them.
    let stood: Vec<Uuid> = sqlx::query_scalar(
        "delete from postbox_coalesced where delivery in (select value from json_each(?1)) returning message",
    )
    .bind(&deliveries)
    .fetch_all(&mut *db)
    .await?;
    let touched: Vec<String> = expired
        .iter()
        .map(|(_, message, _)| message)
        .chain(freed.iter().map(|(_, message)| message))
        .chain(&stood)
        .map(|message| message.simple().to_string().to_uppercase())
        .chain(straight().map(|(_, message, _)| message.clone()))
        .collect();
    let messages = sqlx::query(
        "delete from postbox_message
         where id in (select unhex(value) from json_each(?1))
             and not exists (select 1 from postbox_delivery d where d.message = postbox_message.id)
             and not exists (select 1 from postbox_unrouted u where u.seq = postbox_message.seq)
             and not exists (select 1 from postbox_coalesced c where c.message = postbox_message.id)
             and id not in (select h.message from postbox_held h)
             and id not in (
                 select d.message from postbox_succeeded d
                 where d.first_message <= unhex(?3) and d.last_message >= unhex(?2))",
    )
    .bind(json_of(&touched)?)
    .bind(touched.iter().min())
    .bind(touched.iter().max())
    .execute(&mut *db)
    .await?
    .rows_affected();
    let up_to = expired.iter().map(|(.., since)| *since).chain(successes.iter().map(|s| s.at)).max();
    note(db, removed, i64::try_from(messages).unwrap_or(i64::MAX), up_to, retention.tell).await?;
    match removed {
        0 => work.commit().await?,
        _ => crash::commit("retention", work.commit()).await?,
    }
    let full = |rows: usize| rows >= retention.most as usize;
    Ok(Retained {
        busy: false,
        deliveries: removed,
        messages: i64::try_from(messages).unwrap_or(i64::MAX),
        more: removed >= i64::from(retention.most) || full(freed.len()),
    })
}

/// A row of successes that were all kept long enough.
struct Old {
    id: i64,
    at: i64,
    items: Vec<(i64, String, i64)>,
}

/// About so many of them: a row goes as a whole.
async fn successes(db: &mut SqliteConnection, most: i64) -> Result<Vec<Old>, Error> {
    let mut old = Vec::new();
    let mut many = 0;
    let rows: Vec<(i64, i64)> = sqlx::query_as("select id, deliveries from postbox_expired_success limit ?1")
        .bind(most)
        .fetch_all(&mut *db)
        .await?;
    for (id, deliveries) in rows {
        if many >= most {
            break;
        }
        many += deliveries;
        let (at, items): (i64, String) =
            sqlx::query_as("select at, items from postbox_success where id = ?1").bind(id).fetch_one(&mut *db).await?;
        let items = serde_json::from_str(&items).map_err(|e| sqlx::Error::Decode(Box::new(e)))?;
        old.push(Old { id, at, items });
    }
    Ok(old)
}

/// Adds it up, and puts it on record now and then.
async fn note(
    db: &mut SqliteConnection,
    deliveries: i64,
    messages: i64,
    up_to: Option<i64>,
    tell: bool,
) -> Result<(), Error> {
    let (deliveries, messages, up_to, due): (i64, i64, Option<i64>, bool) = sqlx::query_as(
        "update postbox_retention
         set deliveries = deliveries + ?1, messages = messages + ?2, up_to = max(coalesce(up_to, ?3), coalesce(?3, up_to))
         returning deliveries, messages, up_to,
             ?4 or told_at is null or told_at < (select now from postbox_clock) - ?5",
    )
    .bind(deliveries)
    .bind(messages)
    .bind(up_to)
    .bind(tell)
    .bind(TOLD_EVERY_MS)
    .fetch_one(&mut *db)
    .await?;
    if !due || deliveries + messages == 0 {
        return Ok(());
    }
    let by = up_to.map(timestamp);
    let reason = format!(
        "removed {deliveries} deliveries that ended by {}, and {messages} messages",
        by.map_or_else(|| "now".to_owned(), |at| format!("{at:.0}"))
    );
    let detail = serde_json::json!({ "deliveries": deliveries, "messages": messages, "up_to": by });
    admin::note_retention(db, &reason, detail).await?;
    sqlx::query(
        "update postbox_retention
         set deliveries = 0, messages = 0, up_to = null, told_at = (select now from postbox_clock)",
    )
    .execute(db)
    .await?;
    Ok(())
}

row! {
    struct Expired {
        application: String,
        name: String,
        state: String,
        many: i64,
        oldest: i64,
    }
}

pub(super) async fn preview(store: &SqliteStore, keep_unrouted: Duration) -> Result<RetentionPreview, Error> {
    let mut read = store.read().await?;
    let rows: Vec<Expired> = sqlx::query_as(
        "select s.application, s.name, e.state, sum(e.deliveries) as many, min(e.since) as oldest
         from (
             select subscription, state, since, 1 as deliveries from postbox_expired
             union all
             select subscription, 'succeeded', at, deliveries from postbox_expired_success
         ) e join postbox_subscription s on s.id = e.subscription
         group by s.id, e.state order by s.application, s.name, e.state",
    )
    .fetch_all(read.on())
    .await?;
    let bound = unrouted_bound(read.on(), keep_unrouted).await?;
    let sought: bool =
        sqlx::query_scalar(sqlx::AssertSqlSafe(format!("select not {UNWANTED}"))).fetch_one(read.on()).await?;
    let messages: i64 =
        sqlx::query_scalar(include_str!("retain_preview.sql")).bind(bound).bind(sought).fetch_one(read.on()).await?;
    read.rollback().await?;
    let deliveries = rows
        .into_iter()
        .map(|row| ExpiredRow {
            application: row.application,
            subscription: row.name,
            outcome: row.state,
            deliveries: row.many,
            oldest: timestamp(row.oldest),
        })
        .collect();
    Ok(RetentionPreview { deliveries, messages })
}
