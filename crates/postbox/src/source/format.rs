//! How what a source reads becomes a message.

use super::Raw;
use crate::message::Draft;

/// What an entry says, once it is understood.
#[derive(Debug, Clone)]
pub struct Incoming {
    /// The message.
    pub draft: Draft,
    /// What the same message has when it comes again, and no other of its source has: at most 1024 bytes.
    pub identity: String,
    /// Its producer gave it no id: the identity is the broker's position.
    pub by_position: bool,
}

/// How entries become messages.
#[derive(Debug, Clone, Default)]
pub struct Format {
    mapping: Option<Mapping>,
}

/// Where topic, id and the rest are in entries of a format of one's own.
#[derive(Debug, Clone, Default)]
pub struct Mapping {}

impl Format {
    /// Reads an entry.
    ///
    /// # Errors
    /// What is wrong with it, in words for an operator.
    pub fn read(&self, _raw: &Raw, _source: &str, _position: &str) -> Result<Incoming, String> {
        match &self.mapping {
            _ => Err("not built yet".into()),
        }
    }
}
