//! Publishing on the caller's connection, and the second look at dedup keys that were taken.

use serde::Serialize;
use sqlx::{Row, SqliteConnection};
use uuid::Uuid;

use super::lanes::lane_of;
use super::{SqliteStore, millis_up, unique};
use crate::body;
use crate::error::{Error, PublishError};
use crate::message::{Draft, Due};
use crate::planted::planted;
use crate::store::Stored;

/// A message as `publish.sql` and `stored.sql` read it.
#[derive(Serialize)]
struct Input<'a> {
    id: String,
    topic: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    headers: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    occurred_us: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    external_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    causation_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_attempts: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    delay_ms: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    due_ms: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dedup_key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dedup_ms: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body_hash: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<i16>,
    lane: i16,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<&'a str>,
    /// In hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<String>,
}

/// A column of `postbox_publish`, how it is read, and whether a message has it.
type Column = (&'static str, &'static str, fn(&Input<'_>) -> bool);

const COLUMNS: [Column; 20] = [
    ("id", "unhex(value ->> 'id')", |_| true),
    ("topic", "value ->> 'topic'", |_| true),
    ("key", "value ->> 'key'", |i| i.key.is_some()),
    ("headers", "value ->> 'headers'", |i| i.headers.is_some()),
    ("occurred_us", "value ->> 'occurred_us'", |i| i.occurred_us.is_some()),
    ("source", "value ->> 'source'", |i| i.source.is_some()),
    ("external_id", "value ->> 'external_id'", |i| i.external_id.is_some()),
    ("correlation_id", "value ->> 'correlation_id'", |i| i.correlation_id.is_some()),
    ("causation_id", "value ->> 'causation_id'", |i| i.causation_id.is_some()),
    ("max_attempts", "value ->> 'max_attempts'", |i| i.max_attempts.is_some()),
    ("delay_ms", "value ->> 'delay_ms'", |i| i.delay_ms.is_some()),
    ("due_ms", "value ->> 'due_ms'", |i| i.due_ms.is_some()),
    ("dedup_key", "value ->> 'dedup_key'", |i| i.dedup_key.is_some()),
    ("dedup_ms", "value ->> 'dedup_ms'", |i| i.dedup_ms.is_some()),
    ("body_hash", "unhex(value ->> 'body_hash')", |i| i.body_hash.is_some()),
    ("priority", "value ->> 'priority'", |i| i.priority.is_some()),
    ("lane", "value ->> 'lane'", |_| true),
    ("content_type", "value ->> 'content_type'", |i| i.content_type.is_some()),
    ("payload", "value ->> 'payload'", |i| i.payload.is_some()),
    ("body", "unhex(value ->> 'body')", |i| i.body.is_some()),
];

/// The statement that stores them.
fn statement(inputs: &[Input<'_>]) -> String {
    let used: Vec<&Column> = COLUMNS.iter().filter(|(.., has)| inputs.iter().any(has)).collect();
    let list = |part: fn(&Column) -> &'static str| used.iter().map(|c| part(c)).collect::<Vec<_>>().join(", ");
    include_str!("publish.sql").replace("{columns}", &list(|c| c.0)).replace("{values}", &list(|c| c.1))
}

impl<'a> Input<'a> {
    fn of(draft: &'a Draft, id: Uuid) -> Result<Self, PublishError> {
        let headers = match draft.headers.is_empty() {
            true => None,
            false => Some(serde_json::to_string(&draft.headers).map_err(encode)?),
        };
        let (delay_ms, due_ms) = match draft.due {
            Due::Now => (None, None),
            Due::After(delay) if planted!("due-by-a-clients-clock") => {
                (None, Some(jiff::Timestamp::now().as_millisecond() - 3_600_000 + millis_up(delay)))
            }
            Due::After(delay) => (Some(millis_up(delay)), None),
            // Rounded up: nothing starts before its time.
            Due::At(time) => (
                None,
                Some(time.as_microsecond().div_euclid(1000) + i64::from(time.subsec_nanosecond() % 1_000_000 != 0)),
            ),
        };
        let dedup = draft.dedup.as_ref();
        Ok(Input {
            id: hex(id.as_bytes()),
            topic: &draft.topic,
            key: draft.key.as_deref(),
            headers,
            occurred_us: draft.occurred_at.map(|t| t.as_microsecond()),
            source: draft.source.as_deref(),
            external_id: draft.external_id.as_deref(),
            correlation_id: draft.correlation_id.as_deref(),
            causation_id: draft.causation_id.as_deref(),
            max_attempts: draft.max_attempts,
            delay_ms,
            due_ms,
            dedup_key: dedup.map(|d| d.key.as_str()),
            dedup_ms: dedup.map(|d| millis_up(d.window)),
            body_hash: dedup.map(|_| hex(&body::hash(draft.key.as_deref(), &draft.payload))),
            priority: draft.priority.stored(),
            lane: lane_of(draft.key.as_deref(), id),
            content_type: draft.payload.typed().map(|bytes| bytes.content_type()),
            payload: draft.payload.json(),
            body: draft.payload.typed().map(|bytes| hex(bytes)),
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}

fn encode(error: serde_json::Error) -> sqlx::Error {
    sqlx::Error::Encode(Box::new(error))
}

/// Stores checked drafts, in order.
pub(super) async fn publish(connection: &mut SqliteConnection, drafts: &[Draft]) -> Result<Vec<Stored>, PublishError> {
    let mut stored: Vec<Option<Stored>> = vec![None; drafts.len()];
    // A dedup row may run out between the two looks; then its message is published after all.
    for _ in 0..5 {
        let open: Vec<usize> = (0..drafts.len()).filter(|i| stored[*i].is_none()).collect();
        if open.is_empty() {
            break;
        }
        let ids: Vec<Uuid> = open.iter().map(|_| Uuid::now_v7()).collect();
        let mut inputs = Vec::with_capacity(open.len());
        for (i, id) in open.iter().zip(&ids) {
            inputs.push(Input::of(&drafts[*i], *id)?);
        }
        let json = serde_json::to_string(&inputs).map_err(encode)?;
        sqlx::query(sqlx::AssertSqlSafe(statement(&inputs))).bind(json).execute(&mut *connection).await?;

        let mut unsure = Vec::new();
        let keyed: Vec<(usize, Uuid)> = open.iter().copied().zip(ids.iter().copied()).collect();
        let keyed: Vec<_> = keyed.into_iter().filter(|(i, _)| drafts[*i].key.is_some()).collect();
        for ((i, id), mut input) in open.into_iter().zip(ids).zip(inputs) {
            if input.dedup_key.is_none() {
                stored[i] = Some(Stored::New(id));
            } else {
                (input.payload, input.body) = (None, None);
                unsure.push((i, id, input));
            }
        }
        if !keyed.is_empty() {
            unique::told(connection, &mut stored, &keyed).await?;
        }
        if unsure.is_empty() {
            break;
        }
        let json =
            serde_json::to_string(&unsure.iter().map(|(_, _, input)| input).collect::<Vec<_>>()).map_err(encode)?;
        let rows = sqlx::query(include_str!("stored.sql")).bind(json).fetch_all(&mut *connection).await?;
        for ((i, id, _), row) in unsure.into_iter().zip(rows) {
            if row.try_get("stored")? {
                stored[i].get_or_insert(Stored::New(id));
            } else if let Some(existing) = row.try_get("existing")? {
                let same_body = row.try_get::<bool, _>("same_body")? || planted!("dedup-conflict-swallowed");
                stored[i] = Some(Stored::Duplicate { existing, same_body });
            }
        }
    }
    stored
        .into_iter()
        .map(|s| s.ok_or_else(|| sqlx::Error::Protocol("a dedup key keeps changing hands; try again".into()).into()))
        .collect()
}

/// Publishes follow-ups in the transaction of the outcome. One whose dedup key is taken is there
/// already: that is what its key is for.
pub(super) async fn follow(connection: &mut SqliteConnection, drafts: &[Draft]) -> Result<(), PublishError> {
    for chunk in drafts.chunks(1000) {
        let stored = unique::publish(connection, chunk).await?;
        for (draft, stored) in chunk.iter().zip(stored) {
            if let Stored::Duplicate { existing, same_body: false } = stored {
                tracing::warn!(topic = draft.topic, %existing, "a follow-up's dedup key is taken by a message with another body; the first is kept");
            }
        }
    }
    Ok(())
}

/// Removes dedup windows that have run out, and the marks of flushes that nobody repeats any more.
pub(super) async fn tidy(store: &SqliteStore) -> Result<u64, Error> {
    let idle: bool = !sqlx::query_scalar::<_, bool>(include_str!("untidy.sql")).fetch_one(&store.reader).await?;
    if idle {
        return Ok(0);
    }
    let mut work = store.write().await?;
    let windows = sqlx::query(
        "delete from postbox_dedup where (topic, key) in (
             select topic, key from postbox_dedup where expires_at <= (select now from postbox_clock) limit 1000)",
    )
    .execute(work.on())
    .await?
    .rows_affected();
    sqlx::query(
        "delete from postbox_part where (batch, part) in (
             select p.batch, p.part from postbox_part p
             where p.at < (select now from postbox_clock) - 86400000
                 and not exists (select 1 from postbox_lease l where l.batch = p.batch) limit 1000)",
    )
    .execute(work.on())
    .await?;
    let forgotten = super::inbox::tidy(work.on()).await?;
    work.commit().await?;
    Ok(windows.max(forgotten))
}
