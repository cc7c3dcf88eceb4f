//! What can go wrong, in words that say what to do next.

use uuid::Uuid;

use crate::json::JsonError;
use crate::message::{MAX_HEADER_BYTES, MAX_WAIT};
use crate::pattern::{MAX_NAME_BYTES, TopicError};
use crate::unique::InFlight;

/// Why a message was not published. The caller's transaction is unharmed, unless the database
/// itself refused ([`PublishError::Database`]).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The topic is none.
    #[error(transparent)]
    Topic(#[from] TopicError),
    /// The payload is no JSON that can be kept as it is.
    #[error("the payload cannot be stored: {0}")]
    Json(#[from] JsonError),
    /// The payload is above the limit.
    #[error(
        "the payload is {bytes} bytes; the limit is {limit} (`max_payload_bytes`); store large content elsewhere and publish a reference"
    )]
    PayloadTooLarge {
        /// Its size.
        bytes: usize,
        /// The limit in force.
        limit: usize,
    },
    /// A key or id is above 255 bytes.
    #[error("the {what} is {bytes} bytes long; the limit is {MAX_NAME_BYTES}")]
    TooLong {
        /// Which text.
        what: &'static str,
        /// Its size.
        bytes: usize,
    },
    /// The content type of bytes is no media type.
    #[error(
        "the content type is no media type (byte {at}): write it like `image/png` or `text/plain; charset=utf-8`, 1 to {MAX_NAME_BYTES} bytes of visible ASCII"
    )]
    ContentType {
        /// Byte offset of what does not fit.
        at: usize,
    },
    /// A text has a NUL character.
    #[error("the {what} has a NUL character, which PostgreSQL cannot store")]
    Nul {
        /// Which text.
        what: &'static str,
    },
    /// A header has no name.
    #[error("a header name must not be empty")]
    EmptyHeaderName,
    /// The headers are above the limit together.
    #[error("the headers are {bytes} bytes together; the limit is {MAX_HEADER_BYTES}")]
    HeadersTooLarge {
        /// Their size.
        bytes: usize,
    },
    /// An empty dedup key would make all such messages one.
    #[error("the dedup key must not be empty; leave `dedup` out for a message that may repeat")]
    EmptyDedupKey,
    /// Outside 1 to 1000.
    #[error("max_attempts is {attempts}; it must be 1 to 1000")]
    MaxAttempts {
        /// What was given.
        attempts: u32,
    },
    /// A delay or window beyond ten years.
    #[error("the {what} is longer than 10 years ({} s)", MAX_WAIT.as_secs())]
    TooFar {
        /// Which wait.
        what: &'static str,
    },
    /// A time before the year 1.
    #[error("the {what} lies before the year 1, which not every store can keep")]
    TooEarly {
        /// Which time.
        what: &'static str,
    },
    /// The dedup key is taken by a message with another body. Nothing was stored.
    #[error(
        "the dedup key `{key}` of topic `{topic}` is taken by message {existing}, which has another body; nothing was published"
    )]
    DedupConflict {
        /// The topic.
        topic: String,
        /// The dedup key.
        key: String,
        /// The message that has it.
        existing: Uuid,
    },
    /// A subscription takes one delivery of a key at a time, and has one that is unfinished
    /// ([`Unique::Refuse`](crate::Unique::Refuse)). Nothing was stored. On PostgreSQL the caller's
    /// transaction can only be rolled back now, or to a savepoint before it.
    #[error(
        "the subscription `{subscription}` takes one delivery of a key at a time, and delivery {delivery} has the key `{key}`; nothing was published"
    )]
    KeyInFlight {
        /// The subscription.
        subscription: String,
        /// The message's key.
        key: String,
        /// The unfinished delivery.
        delivery: i64,
    },
    /// The database refused or did not answer. If it did not answer, whether the message is there
    /// is known when the caller's transaction has committed or not.
    #[error("the database did not take the message: {}", Plain(.0))]
    Database(#[source] sqlx::Error),
    /// A driver other than sqlx says the same of the caller's own connection.
    #[error("the database did not take the message: {words}")]
    Driver {
        /// What it says, without the values that it may quote.
        words: String,
        /// The SQLSTATE, if the database said it.
        code: Option<String>,
        /// The driver's own error. It can quote values: it is no `source`, so that logs do not have it.
        error: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What was read back is no answer to a statement of [`sql`](crate::sql).
    #[error("the rows do not answer the statement: {why}; run it as it is, and read all its rows as (ord, id, yes)")]
    Rows {
        /// What is wrong.
        why: String,
    },
    /// Another connection holds the SQLite file's write lock, or has written since the caller's
    /// transaction read. Nothing was stored.
    #[error(
        "the SQLite database is busy: another connection holds its write lock, or has written since this transaction read; begin your transaction with BEGIN IMMEDIATE, or try again"
    )]
    Busy(#[source] sqlx::Error),
}

impl From<sqlx::Error> for PublishError {
    fn from(error: sqlx::Error) -> Self {
        match in_flight(&error) {
            Some(refusal) => refusal.into(),
            None if is_busy(&error) => PublishError::Busy(error),
            None => PublishError::Database(error),
        }
    }
}

impl From<InFlight> for PublishError {
    fn from(InFlight { subscription, key, delivery }: InFlight) -> Self {
        PublishError::KeyInFlight { subscription, key, delivery }
    }
}

/// What the database says of a key that is in flight, if it says that.
fn in_flight(error: &sqlx::Error) -> Option<InFlight> {
    let error = error.as_database_error()?;
    if let Some(said) = error.message().strip_prefix(InFlight::WORDS) {
        return InFlight::read(said);
    }
    let error = error.try_downcast_ref::<sqlx::postgres::PgDatabaseError>()?;
    InFlight::read(error.detail().filter(|_| error.code() == InFlight::SQLSTATE)?)
}

/// What can go wrong with a postbox.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting cannot be used.
    #[error("{0}")]
    Settings(String),
    /// The database's schema is missing or of another version.
    #[error("the schema `{schema}` is at version {found}, this postbox needs {needed}; {mend}")]
    Schema {
        /// Its name.
        schema: String,
        /// Its version; 0 when there is none.
        found: u32,
        /// The version this build works on.
        needed: u32,
        /// The next command to run.
        mend: String,
    },
    /// A message could not be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// There is no such delivery, message or subscription.
    #[error("{0}")]
    NotFound(String),
    /// Somebody else changed it meanwhile; nothing was done.
    #[error("{0}")]
    Conflict(String),
    /// The rules do not allow it; nothing was done.
    #[error("{0}")]
    Refused(String),
    /// A SQLite file is held by another writer for longer than the busy timeout.
    #[error(
        "the SQLite database is busy: another connection holds its write lock; begin your transaction with BEGIN IMMEDIATE, or try again"
    )]
    Busy(#[source] sqlx::Error),
    /// SQLite: a delivery cannot be leased beside the caller's transaction, because that has read or
    /// written already. Nothing was leased.
    #[error(
        "this SQLite transaction has read or written already, so that no delivery can be leased beside it; call `next` before the first statement of a transaction that was begun with BEGIN (not BEGIN IMMEDIATE), once in each"
    )]
    BusyTransaction(#[source] sqlx::Error),
    /// The database refused or did not answer.
    #[error("the database did not answer as it should: {}", Plain(.0))]
    Database(#[source] sqlx::Error),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        if is_busy(&error) { Error::Busy(error) } else { Error::Database(error) }
    }
}

/// SQLITE_BUSY, and with it SQLITE_BUSY_RECOVERY, _SNAPSHOT and _TIMEOUT.
fn is_busy(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(|e| e.code()).is_some_and(|code| matches!(&*code, "5" | "261" | "517" | "773"))
}

impl Error {
    /// Whether the same call may succeed later: the connection broke, a lock or a serialization
    /// failure got in between, the disk is full or does not do its work.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Busy(_) | Error::Publish(PublishError::Busy(_)) => true,
            Error::Database(e) | Error::Publish(PublishError::Database(e)) => is_transient(e),
            // Without a code it is the connection.
            Error::Publish(PublishError::Driver { code, .. }) => code.as_deref().is_none_or(is_transient_code),
            _ => false,
        }
    }
}

/// Whether a database error may pass by itself.
pub(crate) fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::Protocol(_)
        | sqlx::Error::Tls(_) => true,
        sqlx::Error::Database(e) => e
            .code()
            .is_some_and(|code| is_transient_code(&code) || (ended_the_session(&**e) && !is_about_the_login(&code))),
        _ => false,
    }
}

/// PostgreSQL gave up the session, or itself: whatever the statement was, it is not to blame. A session that
/// begins on a full disk ends with an "internal error" (XX000), for example.
fn ended_the_session(error: &dyn sqlx::error::DatabaseError) -> bool {
    use sqlx::postgres::{PgDatabaseError, PgSeverity};
    let severity = error.try_downcast_ref::<PgDatabaseError>().map(|e| e.severity());
    matches!(severity, Some(PgSeverity::Fatal | PgSeverity::Panic))
}

/// Who may log in, and where: that is for somebody to mend.
fn is_about_the_login(code: &str) -> bool {
    code.starts_with("28") || code.starts_with("3D") || code == "42501"
}

fn is_transient_code(code: &str) -> bool {
    // A SQLSTATE has five characters; SQLite has numbers, whose low byte is the kind.
    if code.len() < 5 {
        // Busy, locked, I/O, full: none is the statement's fault.
        return code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 5 | 6 | 10 | 13));
    }
    // Connection, resources (a full disk is one), operator intervention, I/O, rollback; lock not available;
    // a session that was ended because its transaction rested or lasted too long.
    let class = code.get(..2).unwrap_or("");
    matches!(class, "08" | "53" | "57" | "58" | "40") || matches!(code, "55P03" | "25006" | "25P03" | "25P04")
}

/// A driver error without the values it may quote: PostgreSQL's `detail` can hold whole rows.
struct Plain<'a>(&'a sqlx::Error);

impl std::fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            sqlx::Error::Database(e) => match e.code() {
                Some(code) => write!(f, "{} ({code})", e.message()),
                None => f.write_str(e.message()),
            },
            other => write!(f, "{other}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_transient_code;

    #[test]
    fn what_passes_by_itself_is_told_from_what_does_not() {
        // Lost connections, timeouts, deadlocks, sessions that were ended for resting in a transaction.
        for code in
            ["08006", "53300", "57P01", "57014", "40001", "40P01", "55P03", "25P03", "25P04", "25006", "5", "517"]
        {
            assert!(is_transient_code(code), "{code}");
        }
        // A full disk, and one that fails; SQLite's words: full, and a write, a sync or the index that failed.
        for code in ["53100", "58030", "13", "10", "778", "1034", "4874"] {
            assert!(is_transient_code(code), "{code}");
        }
        // What the statement itself is to blame for, or that must be mended first; a bug; a broken file.
        for code in ["22P05", "23505", "42501", "42P01", "25P02", "XX000", "", "1", "11", "19", "2067"] {
            assert!(!is_transient_code(code), "{code}");
        }
    }
}

/// What is wrong between a source or a sink and its broker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// It cannot go on as it is set, or not safely: trying again would not help.
    #[error("{0}")]
    Refused(String),
    /// Not now: it is tried again.
    #[error("{0}")]
    Unavailable(String),
}
