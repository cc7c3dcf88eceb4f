//! What operators see and do of sources, quarantine and sinks.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::{Admin, AuditEntry, short_enough};
use crate::error::Error;
use crate::raw::Raw;
use crate::store::{Database, Pause, Store};

/// A source, and what it has brought.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct SourceRow {
    /// Whose it is.
    pub application: String,
    /// Its name.
    pub name: String,
    /// `redis`, `webhook`, …
    pub kind: String,
    /// `receiving`, `paused`, `failing` (see [`trouble`](Self::trouble)), or `stopped`: nobody receives from it.
    pub state: String,
    /// Entries at the broker that nobody has acknowledged yet, if that is known.
    pub lag: Option<i64>,
    /// New messages.
    pub received: i64,
    /// Ones that had come before.
    pub duplicate: i64,
    /// Ones that came with the id of another.
    pub conflict: i64,
    /// What could not become a message.
    pub quarantined: i64,
    /// What the broker did not have any more.
    pub lost: i64,
    /// When the last of these came.
    pub last_at: Option<Timestamp>,
    /// What keeps it from receiving.
    pub trouble: Option<String>,
    /// Since when it is paused, if it is.
    pub paused_at: Option<Timestamp>,
}

/// A relay, and what its sink has confirmed.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct SinkRow {
    /// Whose it is.
    pub application: String,
    /// The relay's name.
    pub name: String,
    /// `redis`, `webhook`, …
    pub kind: String,
    /// Where to.
    pub target: String,
    /// `sending`, `paused`, or `stopped`: no live worker stands behind it.
    pub state: String,
    /// Messages that are not sent yet: due, due later, or in a worker's hands (each counted up to 100001).
    pub lag: i64,
    /// How long the oldest that is due has waited, in seconds.
    pub oldest_age_s: Option<f64>,
    /// Messages that the other side has confirmed. Workers count them about every second; after a crash up to as
    /// much is missing.
    pub sent: i64,
    /// Attempts after which a message was to be sent again.
    pub retried: i64,
    /// Dead letters.
    pub dead: i64,
    /// Keys that wait for one of their messages, or for an operator (counted up to 10001).
    pub blocked_keys: i64,
}

/// Something that could not become a message.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct QuarantineRow {
    /// Its number.
    pub id: i64,
    /// Whose source.
    pub application: String,
    /// Which source.
    pub source: String,
    /// `malformed`; `conflict`: another body has its id; `undeliverable`: it was handed out too often; `lost`: the
    /// broker did not have it any more.
    pub kind: String,
    /// Where it stood at its broker.
    pub position: String,
    /// Why, in words.
    pub reason: String,
    /// Its id, if it has one.
    pub identity: Option<String>,
    /// The message that has its id, or that it became.
    pub message: Option<Uuid>,
    /// When it came.
    pub at: Timestamp,
    /// An operator wants it read again since then; a process that receives from its source does that.
    pub retry_at: Option<Timestamp>,
    /// What came of the last time.
    pub retried: Option<String>,
    /// When it became a message.
    pub ended_at: Option<Timestamp>,
    /// How large it is, in bytes.
    pub bytes: i64,
}

/// The same, with what was read.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct QuarantineDetail {
    /// As it stands in a list.
    #[serde(flatten)]
    pub row: QuarantineRow,
    /// As it was read; nothing for what was lost.
    #[serde(serialize_with = "as_read")]
    pub raw: Raw,
}

/// Texts as they are, anything else in base64.
fn as_read<S: serde::Serializer>(raw: &Raw, to: S) -> Result<S::Ok, S::Error> {
    use base64::Engine;
    use serde::ser::SerializeMap;
    let mut map = to.serialize_map(None)?;
    map.serialize_entry("fields", &raw.fields_json())?;
    match raw.body.as_deref().map(|body| (body, std::str::from_utf8(body))) {
        None => map.serialize_entry("body", &Value::Null)?,
        Some((_, Ok(text))) => map.serialize_entry("body", text)?,
        Some((bytes, Err(_))) => {
            map.serialize_entry("body_base64", &base64::engine::general_purpose::STANDARD.encode(bytes))?;
        }
    }
    map.end()
}

/// Which of what is in quarantine.
#[derive(Debug, Clone, Default)]
pub struct QuarantineFilter {
    /// Of this application only.
    pub application: Option<String>,
    /// Of sources of this name only.
    pub source: Option<String>,
    /// Of this kind only.
    pub kind: Option<String>,
    /// Also what became a message after all.
    pub ended: bool,
}

/// What an operator wants of something in quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuarantineWish {
    /// It is to be read again.
    Retry,
    /// It is not wanted.
    Drop,
}

impl QuarantineWish {
    /// What stands in the audit.
    pub(crate) fn action(self) -> &'static str {
        match self {
            QuarantineWish::Retry => "retry quarantined",
            QuarantineWish::Drop => "drop quarantined",
        }
    }

    /// Why that cannot be done.
    pub(crate) fn refusal(self, row: &QuarantineRow) -> Option<Error> {
        if row.ended_at.is_some() {
            return Some(Error::Conflict(format!(
                "entry {} became message {} after all; nothing is left to do",
                row.id,
                row.message.unwrap_or_default()
            )));
        }
        match (self, row.kind.as_str()) {
            (QuarantineWish::Retry, "lost") => Some(Error::Refused(format!(
                "entry {0} is not here: the broker did not have it any more; drop it with `postbox quarantine drop {0} --reason …`",
                row.id
            ))),
            (QuarantineWish::Retry, "conflict") => Some(Error::Refused(format!(
                "entry {0} has the id of message {1}, and would have it again; publish what is wanted of it under another id, and drop it with `postbox quarantine drop {0} --reason …`",
                row.id,
                row.message.unwrap_or_default()
            ))),
            _ => None,
        }
    }
}

pub(crate) fn no_source(application: &str, name: &str) -> Error {
    Error::NotFound(format!(
        "application `{application}` has no source `{name}`; `postbox sources` shows what there is"
    ))
}

pub(crate) fn not_in_quarantine(id: i64) -> Error {
    Error::NotFound(format!("nothing in quarantine has the number {id}; `postbox quarantine list` shows what there is"))
}

impl<Db: Database> Admin<Db> {
    /// The sources, by application and name.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn sources(&self) -> Result<Vec<SourceRow>, Error> {
        self.store.sources().await
    }

    /// The relays with their sinks, by application and name.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn sinks(&self) -> Result<Vec<SinkRow>, Error> {
        self.store.sinks().await
    }

    /// Stops reading from a source, in every process, within about a second; a webhook answers 503. What was read is
    /// stored and acknowledged first.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Refused`] if the reason is too long; or the database did not answer.
    pub async fn pause_source(
        &self,
        application: &str,
        name: &str,
        actor: &str,
        reason: &str,
    ) -> Result<AuditEntry, Error> {
        short_enough(reason)?;
        self.store.pause_source(application, name, &Pause { pauses: true, actor, reason }).await
    }

    /// Ends a [`pause_source`](Self::pause_source).
    ///
    /// # Errors
    /// As that.
    pub async fn resume_source(
        &self,
        application: &str,
        name: &str,
        actor: &str,
        reason: &str,
    ) -> Result<AuditEntry, Error> {
        short_enough(reason)?;
        self.store.pause_source(application, name, &Pause { pauses: false, actor, reason }).await
    }

    /// What could not become a message, newest first.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn quarantine(&self, filter: &QuarantineFilter, limit: u32) -> Result<Vec<QuarantineRow>, Error> {
        self.store.quarantine(filter, limit).await
    }

    /// One of these, with what was read.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database did not answer.
    pub async fn quarantined(&self, id: i64) -> Result<QuarantineDetail, Error> {
        self.store.quarantined(id).await?.ok_or_else(|| not_in_quarantine(id))
    }

    /// Has it read again, by a process that receives from its source, with the format that is set there now. What
    /// came of that stands in its [row](QuarantineRow::retried).
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Refused`] for a conflict, and for what was lost; [`Error::Conflict`] if it
    /// became a message already; or the database did not answer.
    pub async fn retry_quarantined(&self, id: i64, actor: &str, reason: &str) -> Result<AuditEntry, Error> {
        short_enough(reason)?;
        self.store.wish_quarantined(id, QuarantineWish::Retry, actor, reason).await
    }

    /// Removes it for good; that it was there, and where it came from, stays on record.
    ///
    /// # Errors
    /// As [`retry_quarantined`](Self::retry_quarantined).
    pub async fn drop_quarantined(&self, id: i64, actor: &str, reason: &str) -> Result<AuditEntry, Error> {
        short_enough(reason)?;
        self.store.wish_quarantined(id, QuarantineWish::Drop, actor, reason).await
    }
}
