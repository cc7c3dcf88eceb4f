//! What went wrong, for people and for scripts: what was tried, why it failed, what to run next.

use std::sync::OnceLock;

use postbox::{Error, PublishError};

use crate::output::Output;
use crate::text::plain;

/// It failed, or a part of it did.
pub(crate) const FAILED: u8 = 1;
/// It was asked for in a way that cannot be meant.
pub(crate) const USAGE: u8 = 2;
/// There is no such thing.
pub(crate) const NOT_FOUND: u8 = 3;
/// The version moved; nothing was done.
pub(crate) const CONFLICT: u8 = 4;
/// The rules do not allow it; nothing was done.
pub(crate) const REFUSED: u8 = 5;

/// The end of a command that did not do what it was asked for.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The exit code.
    pub(crate) code: u8,
    tried: String,
    why: String,
    next: String,
}

impl Failure {
    pub(crate) fn new(code: u8, tried: impl Into<String>, why: impl Into<String>, next: impl Into<String>) -> Failure {
        Failure { code, tried: tried.into(), why: why.into(), next: next.into() }
    }

    /// Something that the library refused or could not do.
    pub(crate) fn of(error: &Error, tried: impl Into<String>, next: impl Into<String>) -> Failure {
        let next = match (denied(error), ROLE.get()) {
            (true, Some(role)) => {
                format!("somebody who may grants this login a role that may: {role}; see docs/roles.md")
            }
            _ => next.into(),
        };
        Failure::new(code_of(error), tried, error.to_string(), next)
    }

    /// Says it on standard error.
    pub(crate) fn tell(&self, output: &Output) {
        output.prose(&format!("postbox: could not {}: {}", plain(&self.tried), plain(&self.why)));
        output.prose(&format!("next: {}", plain(&self.next)));
    }
}

/// The role that the command needs on PostgreSQL, once that is known.
static ROLE: OnceLock<String> = OnceLock::new();

/// Says which role that is.
pub(crate) fn needs_role(role: String) {
    // The first one stands: a process runs one command.
    let _ = ROLE.set(role);
}

/// The exit code of a library error.
pub(crate) fn code_of(error: &Error) -> u8 {
    match error {
        Error::NotFound(_) => NOT_FOUND,
        Error::Conflict(_) => CONFLICT,
        Error::Refused(_) => REFUSED,
        Error::Settings(_) => USAGE,
        Error::Publish(refused) => match refused {
            PublishError::DedupConflict { .. } | PublishError::KeyInFlight { .. } => CONFLICT,
            PublishError::Busy(_) | PublishError::Rows { .. } => FAILED,
            PublishError::Database(_) | PublishError::Driver { .. } => by_sqlstate(error),
            // The others say what is wrong with the message.
            _ => USAGE,
        },
        _ => by_sqlstate(error),
    }
}

/// What the server said, if it said something that has a code of its own here.
fn by_sqlstate(error: &Error) -> u8 {
    match sqlstate(error).as_deref() {
        Some("42501") => REFUSED,
        // Of the functions that publish, with a message of their own.
        Some("22023" | "22004") if error.to_string().contains("postbox:") => USAGE,
        Some("23505") if error.to_string().contains("postbox:") => CONFLICT,
        _ => FAILED,
    }
}

/// The login may not do it.
pub(crate) fn denied(error: &Error) -> bool {
    sqlstate(error).as_deref() == Some("42501")
}

/// The server's code for it.
pub(crate) fn sqlstate(error: &Error) -> Option<String> {
    match error {
        Error::Database(e) | Error::Publish(PublishError::Database(e)) => {
            Some(e.as_database_error()?.code()?.into_owned())
        }
        _ => None,
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::new(FAILED, "write the answer", error.to_string(), "make room, or send the output elsewhere")
    }
}
