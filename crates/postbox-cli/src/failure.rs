//! What went wrong, for people and for scripts: what was tried, why it failed, what to run next.

use postbox::Error;

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
        Failure::new(code_of(error), tried, error.to_string(), next)
    }

    /// Says it on standard error.
    pub(crate) fn tell(&self, output: &Output) {
        output.prose(&format!("postbox: could not {}: {}", plain(&self.tried), plain(&self.why)));
        output.prose(&format!("next: {}", plain(&self.next)));
    }
}

/// The exit code of a library error.
pub(crate) fn code_of(error: &Error) -> u8 {
    match error {
        Error::NotFound(_) => NOT_FOUND,
        Error::Conflict(_) => CONFLICT,
        Error::Refused(_) => REFUSED,
        Error::Settings(_) => USAGE,
        _ => FAILED,
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::new(FAILED, "write the answer", error.to_string(), "make room, or send the output elsewhere")
    }
}
