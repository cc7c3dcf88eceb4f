//! A line of `publish --jsonl`: what it has to look like. The fuzz target for envelopes includes this
//! file as it is, so it uses the library, serde and base64 only.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use postbox::{Draft, Envelope};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// A line as it has to look: a payload, or bytes with their content type.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: Option<String>,
    topic: String,
    key: Option<String>,
    #[serde(default, deserialize_with = "given")]
    payload: Option<Box<RawValue>>,
    data_base64: Option<String>,
    #[serde(alias = "datacontenttype")]
    content_type: Option<String>,
    headers: Option<BTreeMap<String, String>>,
    priority: Option<String>,
}

/// A `null` is a payload, too.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Box<RawValue>>, D::Error> {
    Box::<RawValue>::deserialize(deserializer).map(Some)
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
    let json = |why: &str| BadLine::Json(why.to_owned());
    let mut draft = match (line.payload, line.data_base64, line.content_type) {
        (Some(payload), None, None) => {
            Envelope::raw(line.topic, payload.get()).map_err(|e| BadLine::Message(e.to_string()))?
        }
        (None, Some(data), Some(content_type)) => {
            let bytes = STANDARD.decode(data).map_err(|e| BadLine::Json(format!("`data_base64` is no base64: {e}")))?;
            Envelope::bytes(line.topic, content_type, bytes)
        }
        (None, Some(_), None) => return Err(json("missing field `content_type`, which `data_base64` needs")),
        (Some(_), Some(_), _) => return Err(json("it has `payload` and `data_base64`; one of them")),
        (Some(_), None, Some(_)) => return Err(json("a `content_type` goes with `data_base64`; a `payload` is JSON")),
        (None, None, _) => {
            return Err(json("missing field `payload`, or `data_base64` with its `content_type`"));
        }
    };
    if let Some(key) = line.key {
        draft = draft.key(key);
    }
    for (name, value) in line.headers.into_iter().flatten() {
        draft = draft.header(name, value);
    }
    if let Some(word) = line.priority {
        draft = draft.priority(word.parse().map_err(BadLine::Message)?);
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
