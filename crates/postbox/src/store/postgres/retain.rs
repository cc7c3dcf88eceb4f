//! Retention: the work is in the schema's own functions, so that a role needs no right to delete.

use std::time::Duration;

use sqlx::Row;

use super::{PgStore, Work, timestamp};
use crate::admin::{ExpiredRow, Retained, RetentionPreview};
use crate::crash;
use crate::error::Error;
use crate::retention::{Retention, millis};

pub(super) async fn retain(store: &PgStore, retention: &Retention) -> Result<Retained, Error> {
    let mut work = store.work().await?;
    let sql = format!("select busy, deliveries, messages, more from {}.retain($1, $2, $3)", store.schema);
    let row = store
        .dynamic(sql)
        .bind(millis(retention.keep_unrouted))
        .bind(i32::try_from(retention.most).unwrap_or(i32::MAX))
        .bind(retention.tell)
        .fetch_one(work.on())
        .await?;
    let retained = Retained {
        busy: row.try_get("busy")?,
        deliveries: row.try_get("deliveries")?,
        messages: row.try_get("messages")?,
        more: row.try_get("more")?,
    };
    match retained.deliveries + retained.messages {
        0 => work.commit().await?,
        _ => crash::commit("retention", work.commit()).await?,
    }
    Ok(retained)
}

pub(super) async fn preview(store: &PgStore, keep_unrouted: Duration) -> Result<RetentionPreview, Error> {
    let mut work = store.read().await?;
    let rows = store.query(store.sql.retain_preview).bind(millis(keep_unrouted)).fetch_all(work.on()).await?;
    work.rollback().await?;
    let mut preview = RetentionPreview { deliveries: Vec::new(), messages: 0 };
    for row in rows {
        let many: i64 = row.try_get("many")?;
        match row.try_get::<Option<String>, _>("application")? {
            None => preview.messages = many,
            Some(application) => preview.deliveries.push(ExpiredRow {
                application,
                subscription: row.try_get("name")?,
                outcome: row.try_get("outcome")?,
                deliveries: many,
                oldest: timestamp(row.try_get("oldest_us")?),
            }),
        }
    }
    Ok(preview)
}

/// Before new deliveries of messages that are there already are made: nobody removes messages until
/// this transaction ends, and what a statement after this one finds will stay.
pub(super) async fn hold_messages(store: &PgStore, work: &mut Work) -> Result<(), Error> {
    store.dynamic(format!("select 1 from {}.retention for share", store.schema)).execute(work.on()).await?;
    Ok(())
}
