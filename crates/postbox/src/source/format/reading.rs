//! What all formats have in common: texts, JSON members, times; and the message that they end in.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::Incoming;
use crate::json::{self, JsonError, MAX_JSON_DEPTH};
use crate::message::Envelope;
use crate::source::Raw;

/// Headers that begin like this are postbox's own word, and nobody else's.
const OWN: &str = "postbox-";

/// Of HTTP requests these headers are the message's, too; the others are the connection's, or secret.
const CARRIED: [&str; 3] = ["traceparent", "tracestate", "baggage"];

/// A message, understood and not checked yet.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) topic: String,
    /// None: the position stands in for it.
    pub(super) identity: Option<String>,
    pub(super) external_id: Option<String>,
    pub(super) key: Option<String>,
    pub(super) occurred_at: Option<Timestamp>,
    pub(super) source: Option<String>,
    pub(super) correlation_id: Option<String>,
    pub(super) causation_id: Option<String>,
    pub(super) max_attempts: Option<u32>,
    pub(super) headers: BTreeMap<String, String>,
    pub(super) payload: Payload,
}

/// A payload, as it came.
#[derive(Debug)]
pub(super) enum Payload {
    Json(String),
    Bytes { content_type: String, bytes: Vec<u8> },
}

impl Default for Payload {
    fn default() -> Payload {
        Payload::Json("null".into())
    }
}

impl Parts {
    pub(super) fn finish(self, source: &str, position: &str) -> Result<Incoming, String> {
        let mut draft = match self.payload {
            Payload::Json(text) => Envelope::raw(self.topic, text).map_err(|e| e.to_string())?,
            Payload::Bytes { content_type, bytes } => Envelope::bytes(self.topic, content_type, bytes),
        };
        for (name, value) in self.headers {
            if !name.get(..OWN.len()).is_some_and(|start| start.eq_ignore_ascii_case(OWN)) {
                draft = draft.header(name, value);
            }
        }
        draft.key = self.key;
        draft.occurred_at = self.occurred_at;
        draft.external_id = self.external_id;
        draft.correlation_id = self.correlation_id;
        draft.causation_id = self.causation_id;
        draft.max_attempts = self.max_attempts;
        draft = draft.source(self.source.unwrap_or_else(|| source.to_owned())).header("postbox-position", position);
        let by_position = self.identity.is_none();
        if by_position {
            draft = draft.header("postbox-id-from", "position");
        }
        // How large it may be is a setting of the inbox.
        let draft = draft.checked(usize::MAX).map_err(|e| e.to_string())?;
        Ok(Incoming { draft, identity: self.identity.unwrap_or_else(|| position.to_owned()), by_position })
    }
}

/// Something from outside, between the words of a reason.
pub(super) fn shown(text: impl AsRef<[u8]>) -> String {
    let text = String::from_utf8_lossy(text.as_ref());
    let cut: String = text.chars().take(60).collect();
    let more = if text.chars().nth(60).is_some() { "…" } else { "" };
    format!("`{}{more}`", cut.escape_debug())
}

/// Bytes as text.
pub(super) fn text<'a>(what: &str, bytes: &'a [u8]) -> Result<&'a str, String> {
    std::str::from_utf8(bytes).map_err(|e| format!("{what} is not UTF-8 (byte {})", e.valid_up_to()))
}

/// A field as text, if it is there.
pub(super) fn field<'a>(raw: &'a Raw, name: &str) -> Result<Option<&'a str>, String> {
    raw.field(name).map(|bytes| text(&format!("the field {}", shown(name)), bytes)).transpose()
}

/// Where the content is: the body, else the field `data`.
pub(super) fn body(raw: &Raw) -> Option<(&'static str, &[u8])> {
    match &raw.body {
        Some(body) => Some(("the body", body)),
        None => raw.field("data").map(|data| ("the field `data`", data)),
    }
}

/// The media type of the content, as it was given.
pub(super) fn content_type(raw: &Raw) -> Result<Option<&str>, String> {
    for name in ["content-type", "content_type", "datacontenttype"] {
        if let Some(given) = field(raw, name)? {
            return Ok(Some(given.trim()).filter(|given| !given.is_empty()));
        }
    }
    Ok(None)
}

/// A media type without its parameters, in lower case.
pub(super) fn essence(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// Whether content of this type is JSON.
pub(super) fn is_json(content_type: &str) -> bool {
    let essence = essence(content_type);
    essence.ends_with("/json") || essence.ends_with("+json")
}

/// Checks a JSON text that may hold a payload.
pub(super) fn check(what: &str, text: &str) -> Result<(), String> {
    match json::check_within(text, MAX_JSON_DEPTH + 1) {
        Ok(_) => Ok(()),
        Err(JsonError::Syntax(why)) => Err(format!("{what} is not valid JSON: {why}")),
        Err(error) => Err(format!("{what} cannot be kept: {error}")),
    }
}

/// The members of a JSON object in their order, each as its own text.
#[derive(Debug)]
pub(super) struct Members<'a>(pub(super) Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reading;
        impl<'de> Visitor<'de> for Reading {
            type Value = Vec<(String, &'de RawValue)>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(Reading).map(Members)
    }
}

impl<'a> Members<'a> {
    /// Of a text that was checked; none if it is no object.
    pub(super) fn of(text: &'a str) -> Option<Members<'a>> {
        let mut parser = serde_json::Deserializer::from_str(text);
        parser.disable_recursion_limit();
        Members::deserialize(&mut parser).ok()
    }

    /// The member of this name. Two of a name would mean one thing here and another elsewhere.
    pub(super) fn get(&self, name: &str) -> Result<Option<&'a RawValue>, String> {
        let mut found = self.0.iter().filter(|(n, _)| n == name).map(|(_, value)| *value);
        match (found.next(), found.next()) {
            (value, None) => Ok(value),
            _ => Err(format!("the member {} is there twice", shown(name))),
        }
    }
}

/// A JSON value's text: a string's characters, a number's digits. None for `null`.
pub(super) fn scalar(value: &RawValue) -> Result<Option<String>, &'static str> {
    let text = value.get().trim();
    match text.as_bytes().first() {
        Some(b'"') => serde_json::from_str(text).map(Some).map_err(|_| "no text"),
        Some(b'{') => Err("an object"),
        Some(b'[') => Err("an array"),
        Some(b'n') => Ok(None),
        _ => Ok(Some(text.to_owned())),
    }
}

/// The same for what is a name or an id: a text, or a whole number, whose digits are the text.
pub(super) fn name(what: &str, value: &RawValue) -> Result<Option<String>, String> {
    let wrong = |kind: &str| Err(format!("{} is {kind}; it must be a text", shown(what)));
    match (scalar(value), value.get().trim().as_bytes().first()) {
        (Err(kind), _) => wrong(kind),
        (_, Some(b't' | b'f')) => wrong("true or false"),
        (Ok(Some(number)), Some(b'-' | b'0'..=b'9')) if number.contains(['.', 'e', 'E']) => {
            wrong("a number that is not whole")
        }
        (Ok(text), _) => Ok(text.filter(|text| !text.is_empty())),
    }
}

/// How times are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Times {
    /// What a time without an offset is: UTC, or a mistake.
    pub(super) naive_is_utc: bool,
}

impl Times {
    /// A date and time with its offset from UTC (RFC 3339).
    pub(super) fn read(self, what: &str, text: &str) -> Result<Timestamp, String> {
        if let Ok(time) = text.parse::<Timestamp>() {
            return Ok(time);
        }
        match text.parse::<DateTime>() {
            Ok(time) if self.naive_is_utc => {
                let zoned = time.to_zoned(TimeZone::UTC);
                zoned.map(|z| z.timestamp()).map_err(|_| format!("{} is out of range: {}", shown(what), shown(text)))
            }
            Ok(_) => Err(format!(
                "{} is {}, which has no offset from UTC, like Z or +02:00; if its producer means UTC, say so with `times_without_offset = \"utc\"`",
                shown(what),
                shown(text)
            )),
            Err(_) => Err(format!(
                "{} is {}, which is no date and time as RFC 3339 writes it, like 2026-11-28T12:00:00Z",
                shown(what),
                shown(text)
            )),
        }
    }
}

/// What stands beside the content and belongs to the message: all fields of an entry, some of a request.
pub(super) fn headers(
    raw: &Raw,
    used: impl Fn(&str) -> bool,
    headers: &mut BTreeMap<String, String>,
) -> Result<(), String> {
    let request = raw.body.is_some();
    for (name, value) in &raw.fields {
        let carried = CARRIED.iter().find(|carried| name.eq_ignore_ascii_case(carried.as_bytes()));
        let name = match carried {
            Some(carried) => *carried,
            None if request => continue,
            None => text(&format!("the name of the field {}", shown(name)), name)?,
        };
        if !used(&name.to_ascii_lowercase()) && !headers.contains_key(name) {
            let value = text(&format!("the field {}", shown(name)), value)?;
            headers.insert(name.to_owned(), value.to_owned());
        }
    }
    Ok(())
}
