//! A line of `publish --jsonl`: what it has to look like. The fuzz target for envelopes includes this
//! file as it is, so it uses the library and serde only.

use std::collections::BTreeMap;
use std::time::Duration;

use postbox::{Draft, Envelope};
use serde::Deserialize;
use serde_json::value::RawValue;

/// A line as it has to look.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: Option<String>,
    topic: String,
    key: Option<String>,
    payload: Box<RawValue>,
    headers: Option<BTreeMap<String, String>>,
}

/// Why a line is no message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum BadLine {
    Utf8 { at: usize },
    TooLong { limit: usize },
    Json(String),
    Message(String),
}

impl std::fmt::Display for BadLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BadLine::Utf8 { at } => write!(f, "it is not UTF-8 (byte {at})"),
            BadLine::TooLong { limit } => write!(f, "it is longer than {limit} bytes"),
            BadLine::Json(why) => write!(f, "it is no message: {why}"),
            BadLine::Message(why) => f.write_str(why),
        }
    }
}

/// A line's message; none for a blank line.
pub(crate) fn draft(bytes: &[u8], window: Duration) -> Result<Option<Draft>, BadLine> {
    let text = std::str::from_utf8(bytes).map_err(|e| BadLine::Utf8 { at: e.valid_up_to() })?;
    if text.trim().is_empty() {
        return Ok(None);
    }
    // The payload's depth is judged by the library, with its own words.
    let mut parser = serde_json::Deserializer::from_str(text);
    parser.disable_recursion_limit();
    let line = Line::deserialize(&mut parser)
        .and_then(|line| parser.end().map(|()| line))
        .map_err(|e| BadLine::Json(without_line(&e)))?;
    let mut draft = Envelope::raw(line.topic, line.payload.get()).map_err(|e| BadLine::Message(e.to_string()))?;
    if let Some(key) = line.key {
        draft = draft.key(key);
    }
    for (name, value) in line.headers.into_iter().flatten() {
        draft = draft.header(name, value);
    }
    if let Some(id) = line.id {
        draft = draft.external_id(&id).dedup_within(id, window);
    }
    Ok(Some(draft))
}

/// The parser counts lines from its own text, which is always one.
fn without_line(error: &serde_json::Error) -> String {
    error.to_string().replace(" at line 1 column ", " at column ").replace(" at line 0 column 0", "")
}
