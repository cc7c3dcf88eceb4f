//! Publishing on the caller's connection, and the second look at dedup keys that were taken.

use std::collections::HashMap;
use std::sync::Mutex;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use super::{PgStore, micros, millis};
use crate::error::PublishError;
use crate::message::{Draft, Due};
use crate::planted::planted;
use crate::priority::Priority;
use crate::store::Stored;

/// The columns of a batch, as `publish.sql` takes them.
#[derive(Default)]
struct Columns<'a> {
    topics: Vec<&'a str>,
    keys: Vec<Option<&'a str>>,
    payloads: Vec<Option<&'a str>>,
    headers: Vec<Option<String>>,
    occurred_us: Vec<Option<i64>>,
    sources: Vec<Option<&'a str>>,
    external_ids: Vec<Option<&'a str>>,
    correlation_ids: Vec<Option<&'a str>>,
    causation_ids: Vec<Option<&'a str>>,
    max_attempts: Vec<Option<i32>>,
    delay_ms: Vec<Option<i64>>,
    due_us: Vec<Option<i64>>,
    dedup_keys: Vec<Option<&'a str>>,
    dedup_ms: Vec<Option<i64>>,
    bodies: Vec<Option<&'a [u8]>>,
    content_types: Vec<Option<&'a str>>,
    priorities: Vec<Option<i16>>,
}

impl<'a> Columns<'a> {
    fn of(drafts: impl Iterator<Item = &'a Draft>) -> Result<Self, PublishError> {
        let mut columns = Columns::default();
        for draft in drafts {
            let headers = match draft.headers.is_empty() {
                true => None,
                false => Some(serde_json::to_string(&draft.headers).map_err(|e| sqlx::Error::Encode(Box::new(e)))?),
            };
            let (delay_ms, due_us) = match draft.due {
                Due::Now => (None, None),
                Due::After(delay) if planted!("due-by-a-clients-clock") => {
                    (None, Some(jiff::Timestamp::now().as_microsecond() - 3_600_000_000 + micros(delay)))
                }
                Due::After(delay) => (Some(millis(delay)), None),
                Due::At(time) => (None, Some(time.as_microsecond())),
            };
            columns.topics.push(&draft.topic);
            columns.keys.push(draft.key.as_deref());
            columns.payloads.push(draft.payload.json());
            columns.headers.push(headers);
            columns.occurred_us.push(draft.occurred_at.map(|t| t.as_microsecond()));
            columns.sources.push(draft.source.as_deref());
            columns.external_ids.push(draft.external_id.as_deref());
            columns.correlation_ids.push(draft.correlation_id.as_deref());
            columns.causation_ids.push(draft.causation_id.as_deref());
            columns.max_attempts.push(draft.max_attempts.map(|n| n as i32));
            columns.delay_ms.push(delay_ms);
            columns.due_us.push(due_us);
            columns.dedup_keys.push(draft.dedup.as_ref().map(|d| d.key.as_str()));
            columns.dedup_ms.push(draft.dedup.as_ref().map(|d| micros(d.window) / 1000));
            columns.bodies.push(draft.payload.typed().map(|b| &**b));
            columns.content_types.push(draft.payload.typed().map(|b| b.content_type()));
            columns.priorities.push(draft.priority.stored());
        }
        Ok(columns)
    }
}

/// A column in which nothing is set is left out: the statement fills it up.
fn some<T>(column: Vec<Option<T>>) -> Option<Vec<Option<T>>> {
    column.iter().any(Option::is_some).then_some(column)
}

/// Who is told that a key is in flight, where a subscription refuses a second delivery of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusing {
    /// The caller, who publishes nothing then.
    Callers,
    /// Nobody could do anything about it: the delivery in flight stands for the message.
    Nobody,
}

pub(super) async fn publish(
    connection: &mut PgConnection,
    store: &PgStore,
    drafts: &[Draft],
    refusing: Refusing,
) -> Result<Vec<Stored>, PublishError> {
    if store.through_function {
        if refusing == Refusing::Nobody {
            // The function has no argument for it.
            let sql = "select pg_catalog.set_config('postbox.refusals', 'coalesce', true)";
            store.query(sql).execute(&mut *connection).await?;
        }
        return through_function(connection, store, drafts).await;
    }
    if let [draft] = drafts
        && let Some(stored) = short_way(connection, store, draft).await?
    {
        return Ok(vec![stored]);
    }
    let mut stored: Vec<Option<Stored>> = vec![None; drafts.len()];
    // A dedup row may expire between the two looks; then its message is published after all.
    for _ in 0..5 {
        let open: Vec<usize> = (0..drafts.len()).filter(|i| stored[*i].is_none()).collect();
        if open.is_empty() {
            break;
        }
        let columns = Columns::of(open.iter().map(|i| &drafts[*i]))?;
        let rows = store
            .query(store.sql.publish)
            .bind(columns.topics)
            .bind(some(columns.keys))
            .bind(some(columns.payloads))
            .bind(some(columns.headers))
            .bind(some(columns.occurred_us))
            .bind(some(columns.sources))
            .bind(some(columns.external_ids))
            .bind(some(columns.correlation_ids))
            .bind(some(columns.causation_ids))
            .bind(some(columns.max_attempts))
            .bind(some(columns.delay_ms))
            .bind(some(columns.due_us))
            .bind(some(columns.dedup_keys))
            .bind(some(columns.dedup_ms))
            .bind(some(columns.bodies))
            .bind(some(columns.content_types))
            .bind(some(columns.priorities))
            .bind(refusing == Refusing::Callers)
            .fetch_all(&mut *connection)
            .await?;
        for row in rows {
            let ord: i64 = row.try_get("ord")?;
            if row.try_get("stored")? {
                stored[open[ord as usize - 1]] = Some(new(&row)?);
            }
        }
        let taken: Vec<usize> = open.into_iter().filter(|i| stored[*i].is_none()).collect();
        if taken.is_empty() {
            break;
        }
        for (i, duplicate) in duplicates(connection, store, drafts, &taken).await? {
            stored[i] = Some(duplicate);
        }
    }
    stored
        .into_iter()
        .map(|s| s.ok_or_else(|| sqlx::Error::Protocol("a dedup key keeps changing hands; try again".into()).into()))
        .collect()
}

/// A message that is there now.
fn new(row: &PgRow) -> Result<Stored, PublishError> {
    let id = row.try_get("id")?;
    Ok(match row.try_get::<Option<Vec<i64>>, _>("coalesced")? {
        Some(into) => Stored::Coalesced { id, into },
        None => Stored::New(id),
    })
}

/// Which way the last message of each topic went: the one to try first, no more.
#[derive(Debug, Default)]
pub(super) struct Fans(Mutex<HashMap<String, Way>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The short one, of topics with one subscription.
    ToOne,
    /// The short one, of topics with more.
    ToSeveral,
    /// The long one; and so will this many more be, before a short one is tried again.
    Long(u8),
}

impl Fans {
    /// As many topics as a program publishes to, as a rule.
    const MOST: usize = 10_000;
    /// What a topic fans out to is stored soon after it is seen first, or never.
    const PATIENCE: u8 = 16;

    /// The short ways to try, in order.
    fn ways(&self, topic: &str) -> &'static [Way] {
        let Ok(mut fans) = self.0.lock() else { return &[] };
        match fans.get_mut(topic) {
            Some(Way::Long(left)) if *left > 0 => {
                *left -= 1;
                &[]
            }
            Some(Way::ToSeveral) => &[Way::ToSeveral, Way::ToOne],
            _ => &[Way::ToOne, Way::ToSeveral],
        }
    }

    fn went(&self, topic: &str, way: Way) {
        let Ok(mut fans) = self.0.lock() else { return };
        let room = fans.len() < Self::MOST;
        if let Some(last) = fans.get_mut(topic) {
            *last = way;
        } else if room {
            fans.insert(topic.to_owned(), way);
        }
    }
}

/// One message that is due now and has no priority, where what its topic fans out to is stored: a statement a third as long.
async fn short_way(
    connection: &mut PgConnection,
    store: &PgStore,
    draft: &Draft,
) -> Result<Option<Stored>, PublishError> {
    if draft.dedup.is_some() || draft.due != Due::Now || draft.priority != Priority::Normal {
        return Ok(None);
    }
    let columns = Columns::of(std::iter::once(draft))?;
    let ways = store.fans.ways(&draft.topic);
    for (tried, way) in ways.iter().enumerate() {
        let row = store
            .query(if *way == Way::ToOne { store.sql.publish_one } else { store.sql.publish_several })
            .bind(columns.topics[0])
            .bind(columns.keys[0])
            .bind(columns.payloads[0])
            .bind(columns.headers[0].as_deref())
            .bind(columns.occurred_us[0])
            .bind(columns.sources[0])
            .bind(columns.external_ids[0])
            .bind(columns.correlation_ids[0])
            .bind(columns.causation_ids[0])
            .bind(columns.max_attempts[0])
            .bind(columns.bodies[0])
            .bind(columns.content_types[0])
            .fetch_optional(&mut *connection)
            .await?;
        if let Some(row) = row {
            if tried > 0 {
                store.fans.went(&draft.topic, *way);
            }
            return Ok(Some(Stored::New(row.try_get("id")?)));
        }
    }
    if !ways.is_empty() {
        store.fans.went(&draft.topic, Way::Long(Fans::PATIENCE));
    }
    Ok(None)
}

/// What the function takes: it has no settings.
const FUNCTION_LIMIT: usize = 1 << 20;

/// For a role that has no more than the function, which takes one message at a time.
async fn through_function(
    connection: &mut PgConnection,
    store: &PgStore,
    drafts: &[Draft],
) -> Result<Vec<Stored>, PublishError> {
    // Refused here, because a refusal by the function would end the caller's transaction.
    if let Some(large) = drafts.iter().map(|d| d.payload.bytes().len()).find(|bytes| *bytes > FUNCTION_LIMIT) {
        return Err(PublishError::PayloadTooLarge { bytes: large, limit: FUNCTION_LIMIT });
    }
    let columns = Columns::of(drafts.iter())?;
    let mut stored = Vec::with_capacity(drafts.len());
    for i in 0..drafts.len() {
        let row = store
            .query(store.sql.publish_checked)
            .bind(columns.topics[i])
            .bind(columns.payloads[i])
            .bind(columns.keys[i])
            .bind(columns.headers[i].as_deref())
            .bind(columns.delay_ms[i])
            .bind(columns.due_us[i])
            .bind(columns.dedup_keys[i])
            .bind(columns.dedup_ms[i])
            .bind(columns.max_attempts[i])
            .bind(columns.external_ids[i])
            .bind(columns.sources[i])
            .bind(columns.correlation_ids[i])
            .bind(columns.causation_ids[i])
            .bind(columns.occurred_us[i])
            .bind(columns.bodies[i])
            .bind(columns.content_types[i])
            .bind(columns.priorities[i].map(|level| Priority::of(level).as_str()))
            .fetch_one(&mut *connection)
            .await?;
        let id: Uuid = row.try_get("id")?;
        stored.push(match row.try_get("stored")? {
            true => new(&row)?,
            false => Stored::Duplicate { existing: id, same_body: row.try_get("same_body")? },
        });
    }
    Ok(stored)
}

async fn duplicates(
    connection: &mut PgConnection,
    store: &PgStore,
    drafts: &[Draft],
    taken: &[usize],
) -> Result<Vec<(usize, Stored)>, PublishError> {
    let of = |i: &usize| &drafts[*i];
    let rows = store
        .query(store.sql.duplicates)
        .bind(taken.iter().map(|i| of(i).topic.clone()).collect::<Vec<_>>())
        .bind(taken.iter().map(|i| of(i).dedup.as_ref().map(|d| d.key.clone())).collect::<Vec<_>>())
        .bind(taken.iter().map(|i| of(i).key.clone()).collect::<Vec<_>>())
        .bind(taken.iter().map(|i| of(i).payload.json()).collect::<Vec<_>>())
        .bind(taken.iter().map(|i| of(i).payload.typed().map(|b| &**b)).collect::<Vec<_>>())
        .bind(taken.iter().map(|i| of(i).payload.typed().map(|b| b.content_type())).collect::<Vec<_>>())
        .fetch_all(connection)
        .await?;
    let mut found = Vec::with_capacity(rows.len());
    for row in rows {
        let ord: i64 = row.try_get("ord")?;
        let existing: Uuid = row.try_get("message")?;
        let same_body = row.try_get::<bool, _>("same_body")? || planted!("dedup-conflict-swallowed");
        found.push((taken[ord as usize - 1], Stored::Duplicate { existing, same_body }));
    }
    Ok(found)
}
