//! How what a source reads becomes a message. `docs/formats.md` has the rules.

mod cloudevent;
mod flat;
mod mapping;
mod reading;
#[cfg(test)]
mod tests;

pub use self::mapping::{Mapping, Template};
use self::reading::{
    Members, Parts, Payload, Times, body, check, content_type, essence, field, headers, name, shown, text,
};
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

/// How entries become messages. By default it knows by itself:
///
/// - CloudEvents 1.0, in structured mode (an object with `specversion`) and in binary mode (fields or headers
///   `ce-id`, `ce_id`, `cloudEvents:id` …);
/// - events with `event_id`, `event_type`, `aggregate_id`, `correlation_id`, `causation_id`, `occurred_on`,
///   `max_retries` and `payload`, as fields or as members of one JSON object;
/// - Standard Webhooks: the header `webhook-id`, and `type` in a JSON object.
///
/// The content is the body, or the field `data` of an entry that has no body. For anything else there is a
/// [`Mapping`].
#[derive(Debug, Clone, Default)]
pub struct Format {
    mapping: Option<Mapping>,
    naive_is_utc: bool,
}

impl Format {
    /// Entries of a format of one's own.
    ///
    /// # Panics
    /// The mapping has no topic.
    #[track_caller]
    pub fn mapped(mapping: Mapping) -> Format {
        assert!(mapping.has_topic(), "the mapping says no topic; add `.topic(\"…\")`");
        Format { mapping: Some(mapping), naive_is_utc: false }
    }

    /// Takes times without an offset as UTC, which producers in Python write like that. Otherwise they are
    /// malformed: nobody knows what they mean.
    #[must_use]
    pub fn times_without_offset_are_utc(mut self) -> Format {
        self.naive_is_utc = true;
        self
    }

    /// Reads an entry of a source of this name.
    ///
    /// # Errors
    /// What is wrong with it, in words for an operator.
    pub fn read(&self, raw: &Raw, source: &str, position: &str) -> Result<Incoming, String> {
        let times = Times { naive_is_utc: self.naive_is_utc };
        let parts = match &self.mapping {
            Some(mapping) => mapping.read(raw, position, times)?,
            None => recognised(raw, times)?,
        };
        parts.finish(source, position)
    }
}

fn recognised(raw: &Raw, times: Times) -> Result<Parts, String> {
    let media_type = content_type(raw)?.map(essence).unwrap_or_default();
    match media_type.as_str() {
        "application/cloudevents+json" => {}
        "application/cloudevents-batch+json" => {
            return Err("it is a batch of CloudEvents; only one at a time is read: send each by itself".into());
        }
        other if other.starts_with("application/cloudevents") => {
            return Err(format!("it is a CloudEvent as {}; only JSON is read", shown(other)));
        }
        _ if cloudevent::is_binary(raw) => return cloudevent::binary(raw, times),
        _ if flat::is_flat(raw) => return flat::fields(raw, times),
        _ => {}
    }
    let Some((what, bytes)) = body(raw) else {
        let names: Vec<String> = raw.fields.iter().take(5).map(|(name, _)| shown(name)).collect();
        let names = if names.is_empty() { "none".into() } else { names.join(", ") };
        return Err(format!(
            "it is of no known format: no `data`, no `event_id`, no `ce-id`; its fields: {names}. {MAP_IT}"
        ));
    };
    let json = text(what, bytes)?;
    check(what, json)?;
    let Some(members) = Members::of(json) else { return Err(format!("{what} is no JSON object. {MAP_IT}")) };
    if members.get("specversion")?.is_some() || media_type == "application/cloudevents+json" {
        return cloudevent::structured(raw, &members, times);
    }
    if flat::is_envelope(&members) {
        return flat::object(raw, &members, times);
    }
    match field(raw, "webhook-id")?.filter(|id| !id.is_empty()) {
        Some(id) if members.get("type")?.is_some() => standard_webhook(raw, id, json, &members, times),
        _ => Err(format!("{what} is of no known format: no `specversion`, no `event_id`. {MAP_IT}")),
    }
}

const MAP_IT: &str = "If it is as it should be, say where its topic is with a mapping";

/// The payload of a Standard Webhook is all of it: what lies beside `data` is not specified.
fn standard_webhook(raw: &Raw, id: &str, json: &str, members: &Members<'_>, times: Times) -> Result<Parts, String> {
    let named = |what| members.get(what).and_then(|value| value.map_or(Ok(None), |value| name(what, value)));
    let mut parts = Parts {
        topic: named("type")?.ok_or("it has no `type`")?,
        identity: Some(id.to_owned()),
        external_id: Some(id.to_owned()),
        occurred_at: named("timestamp")?.map(|time| times.read("timestamp", &time)).transpose()?,
        payload: Payload::Json(json.to_owned()),
        ..Parts::default()
    };
    headers(
        raw,
        |name| matches!(name, "data" | "content-type" | "content_type" | "datacontenttype"),
        &mut parts.headers,
    )?;
    Ok(parts)
}
