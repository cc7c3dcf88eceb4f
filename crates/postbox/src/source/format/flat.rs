//! Events by the names that event buses in Python write: `event_id`, `event_type`, `payload` and so on, as
//! members of one JSON object or as the fields of an entry.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use super::cloudevent;
use super::reading::{Members, Parts, Payload, Times, body, content_type, field, headers, name, scalar, shown};
use crate::source::Raw;

/// The envelope's own names.
const NAMES: [&str; 8] = [
    "event_id",
    "event_type",
    "aggregate_id",
    "correlation_id",
    "causation_id",
    "occurred_on",
    "max_retries",
    "payload",
];

/// Whether an entry's fields are an event.
pub(super) fn is_flat(raw: &Raw) -> bool {
    raw.field("event_id").is_some() || raw.field("event_type").is_some()
}

/// Whether an object is one.
pub(super) fn is_envelope(members: &Members<'_>) -> bool {
    members.0.iter().any(|(name, _)| matches!(name.as_str(), "event_id" | "event_type"))
}

/// What the names stand for, whatever they were read from.
struct Named {
    event_id: Option<String>,
    event_type: Option<String>,
    aggregate_id: Option<String>,
    correlation_id: Option<String>,
    causation_id: Option<String>,
    occurred_on: Option<String>,
    max_retries: Option<String>,
}

impl Named {
    fn read(mut value: impl FnMut(&'static str) -> Result<Option<String>, String>) -> Result<Named, String> {
        Ok(Named {
            event_id: value("event_id")?,
            event_type: value("event_type")?,
            aggregate_id: value("aggregate_id")?,
            correlation_id: value("correlation_id")?,
            causation_id: value("causation_id")?,
            occurred_on: value("occurred_on")?,
            max_retries: value("max_retries")?,
        })
    }

    fn parts(self, payload: Payload, times: Times) -> Result<Parts, String> {
        let id = self.event_id.ok_or("it has no `event_id`")?;
        let occurred_at = self.occurred_on.map(|time| times.read("occurred_on", &time)).transpose()?;
        Ok(Parts {
            topic: self.event_type.ok_or("it has no `event_type`")?,
            identity: Some(id.clone()),
            external_id: Some(id),
            key: self.aggregate_id,
            occurred_at,
            correlation_id: self.correlation_id,
            causation_id: self.causation_id,
            max_attempts: self.max_retries.map(|text| attempts(&text)).transpose()?,
            payload,
            ..Parts::default()
        })
    }
}

/// Retries come after the first attempt.
fn attempts(retries: &str) -> Result<u32, String> {
    let retries = retries.parse::<u32>().ok().filter(|retries| *retries < 1000);
    retries.map(|n| n + 1).ok_or_else(|| "`max_retries` is no whole number from 0 to 999".into())
}

/// An event whose envelope is the fields.
pub(super) fn fields(raw: &Raw, times: Times) -> Result<Parts, String> {
    let named = Named::read(|name| Ok(field(raw, name)?.map(str::to_owned).filter(|value| !value.is_empty())))?;
    let content = raw.field("payload").map(|bytes| ("the field `payload`", bytes)).or_else(|| body(raw));
    let Some((what, bytes)) = content else {
        // What is left is the payload.
        let mut rest = BTreeMap::new();
        headers(raw, |name| NAMES.contains(&name), &mut rest)?;
        let carried = rest.extract_if(.., |name, _| name.starts_with("trace") || name == "baggage").collect();
        let text = serde_json::to_string(&rest).map_err(|e| format!("its fields are no payload: {e}"))?;
        let parts = named.parts(Payload::Json(text), times)?;
        return Ok(Parts { headers: carried, ..parts });
    };
    let content_type = content_type(raw)?.map(str::to_owned);
    let payload = cloudevent::payload(what, content_type, bytes.into())?;
    let mut parts = named.parts(payload, times)?;
    let used = |name: &str| {
        NAMES.contains(&name)
            || matches!(name, "content-type" | "content_type" | "datacontenttype")
            || (name == "data" && what == "the field `data`")
    };
    headers(raw, used, &mut parts.headers)?;
    Ok(parts)
}

/// An event that is one object.
pub(super) fn object(raw: &Raw, members: &Members<'_>, times: Times) -> Result<Parts, String> {
    let named = Named::read(|what| match members.get(what)? {
        Some(value) if what == "occurred_on" && !value.get().starts_with(['"', 'n']) => {
            Err(format!("`occurred_on` is {}; it must be a text", shown(value.get())))
        }
        Some(value) => name(what, value),
        None => Ok(None),
    })?;
    let payload = members.get("payload")?;
    let others = || members.0.iter().filter(|(name, _)| !NAMES.contains(&name.as_str()));
    let content = match payload {
        Some(payload) => payload.get().to_owned(),
        None => object_of(others().map(|(name, value)| (name.as_str(), *value)))?,
    };
    let mut parts = named.parts(Payload::Json(content), times)?;
    if payload.is_some() {
        for (name, value) in others() {
            // What is no text is kept as its JSON.
            let text = scalar(value).unwrap_or_else(|_| Some(value.get().to_owned()));
            parts.headers.extend(text.map(|text| (name.clone(), text)));
        }
    }
    headers(
        raw,
        |name| matches!(name, "data" | "content-type" | "content_type" | "datacontenttype"),
        &mut parts.headers,
    )?;
    Ok(parts)
}

/// An object of these members, each as it is written.
fn object_of<'a>(members: impl Iterator<Item = (&'a str, &'a RawValue)>) -> Result<String, String> {
    let mut text = String::from("{");
    for (name, value) in members {
        if text.len() > 1 {
            text.push(',');
        }
        text += &serde_json::to_string(name).map_err(|e| e.to_string())?;
        text.push(':');
        text += value.get();
    }
    text.push('}');
    Ok(text)
}
