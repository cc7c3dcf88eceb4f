//! CloudEvents 1.0: one JSON object (structured), or attributes beside the content (binary).
//!
//! Source: CloudEvents 1.0.2, its JSON event format, its HTTP and Kafka bindings, and its extensions for
//! partitioning and distributed tracing.

use std::borrow::Cow;
use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::reading::{
    Members, Parts, Payload, Times, body, check, content_type, field, headers, is_json, name, scalar, shown, text,
};
use crate::planted::planted;
use crate::source::Raw;

/// How an attribute's name begins beside the content, in the bindings for HTTP and NATS, Kafka, AMQP.
const PREFIXES: [&str; 4] = ["ce-", "ce_", "cloudevents:", "cloudevents_"];

/// The attribute that a field carries, in lower case.
fn attribute(field: &[u8]) -> Option<String> {
    let field = std::str::from_utf8(field).ok()?.to_ascii_lowercase();
    PREFIXES.iter().find_map(|prefix| field.strip_prefix(prefix)).map(str::to_owned)
}

/// Whether an entry is an event in binary mode.
pub(super) fn is_binary(raw: &Raw) -> bool {
    raw.fields.iter().filter_map(|(name, _)| attribute(name)).any(|name| REQUIRED.contains(&name.as_str()))
}

/// What every event has.
const REQUIRED: [&str; 4] = ["specversion", "id", "source", "type"];

pub(super) fn binary(raw: &Raw, times: Times) -> Result<Parts, String> {
    let mut attributes = BTreeMap::new();
    for (field, value) in &raw.fields {
        let Some(name) = attribute(field) else { continue };
        let value = text(&format!("the field {}", shown(field)), value)?;
        // Values in HTTP headers are escaped; a broker's are not.
        let http = raw.body.is_some() && field.get(..3).is_some_and(|prefix| prefix.eq_ignore_ascii_case(b"ce-"));
        let value = if http { unescaped(field, value)? } else { value.to_owned() };
        attributes.entry(name).or_insert(value);
    }
    let declared = attributes.remove("datacontenttype").filter(|declared| !declared.is_empty());
    let given = declared.or(content_type(raw)?.map(str::to_owned));
    let json = given.as_deref().is_none_or(is_json);
    let payload = match body(raw) {
        // An event may have no data.
        Some((_, bytes)) if json && bytes.is_empty() => Payload::default(),
        Some((what, bytes)) => payload(what, given, bytes.into())?,
        None => Payload::default(),
    };
    let mut parts = event(attributes, payload, times)?;
    // What a webhook signs is this id and the body, not the attributes beside it: with another `ce-id` a request
    // that was seen once would be another message.
    let signed = field(raw, "webhook-id")?.filter(|id| raw.body.is_some() && !id.is_empty());
    if let Some(signed) = signed.filter(|_| !planted!("identity-not-signed")) {
        parts.identity = Some(signed.to_owned());
    }
    let used = |name: &str| {
        attribute(name.as_bytes()).is_some()
            || matches!(name, "data" | "content-type" | "content_type" | "datacontenttype")
    };
    headers(raw, used, &mut parts.headers)?;
    Ok(parts)
}

/// An event as one object.
pub(super) fn structured(raw: &Raw, members: &Members<'_>, times: Times) -> Result<Parts, String> {
    let mut attributes = BTreeMap::new();
    for (member, value) in &members.0 {
        if matches!(member.as_str(), "data" | "data_base64") {
            continue;
        }
        let value = match member.as_str() {
            "id" | "source" | "type" | "partitionkey" | "correlationid" | "causationid" => name(member, value)?,
            _ => scalar(value).map_err(|kind| format!("the attribute {} is {kind}", shown(member)))?,
        };
        if value.is_some_and(|value| attributes.insert(member.clone(), value).is_some()) {
            return Err(format!("the attribute {} is there twice", shown(member)));
        }
    }
    let given = attributes.remove("datacontenttype").filter(|given| !given.is_empty());
    let payload = match (members.get("data")?, members.get("data_base64")?) {
        (Some(_), Some(_)) => return Err("it has `data` and `data_base64`; one of them".into()),
        (None, None) => Payload::default(),
        (Some(data), None) => match given {
            Some(content_type) if !is_json(&content_type) => match scalar(data) {
                Ok(Some(text)) if data.get().starts_with('"') => {
                    Payload::Bytes { content_type, bytes: text.into_bytes() }
                }
                _ => return Err(format!("`data` is no text, and its content type is {}", shown(content_type))),
            },
            _ => Payload::Json(data.get().to_owned()),
        },
        (None, Some(data)) => {
            let Ok(Some(encoded)) = scalar(data) else { return Err("`data_base64` is no text".into()) };
            let bytes = STANDARD.decode(encoded).map_err(|e| format!("`data_base64` is no base64: {e}"))?;
            let content_type = given.unwrap_or_else(|| "application/octet-stream".into());
            match std::str::from_utf8(&bytes) {
                Ok(text) if is_json(&content_type) && check("", text).is_ok() => Payload::Json(text.to_owned()),
                _ => Payload::Bytes { content_type, bytes },
            }
        }
    };
    let mut parts = event(attributes, payload, times)?;
    let used = |name: &str| matches!(name, "data" | "content-type" | "content_type" | "datacontenttype");
    headers(raw, used, &mut parts.headers)?;
    Ok(parts)
}

/// Content beside its attributes. Without a content type it has to be JSON.
pub(super) fn payload(what: &str, given: Option<String>, bytes: Cow<'_, [u8]>) -> Result<Payload, String> {
    match given {
        Some(content_type) if !is_json(&content_type) => Ok(Payload::Bytes { content_type, bytes: bytes.into_owned() }),
        _ => {
            let json = text(what, &bytes)?;
            check(what, json)?;
            Ok(Payload::Json(json.to_owned()))
        }
    }
}

fn event(mut attributes: BTreeMap<String, String>, payload: Payload, times: Times) -> Result<Parts, String> {
    let mut required = |name: &str| {
        let value = attributes.remove(name).filter(|value| !value.is_empty());
        value.ok_or_else(|| format!("the CloudEvent has no `{name}`"))
    };
    let version = required("specversion")?;
    if version != "1.0" {
        return Err(format!("the CloudEvent is of version {}; only 1.0 is read", shown(version)));
    }
    let (id, source, topic) = (required("id")?, required("source")?, required("type")?);
    let mut parts = Parts {
        topic,
        identity: Some(identity(&source, &id)),
        external_id: Some(id),
        source: Some(source),
        key: attributes.remove("partitionkey"),
        correlation_id: attributes.remove("correlationid"),
        causation_id: attributes.remove("causationid"),
        payload,
        ..Parts::default()
    };
    if let Some(time) = attributes.remove("time").filter(|time| !time.is_empty()) {
        parts.occurred_at = Some(times.read("time", &time)?);
    }
    parts.headers = attributes;
    Ok(parts)
}

/// Source and id together are what no other event has. A source is a URI, which has no spaces; one that has
/// them all the same is told from another by an escape.
fn identity(source: &str, id: &str) -> String {
    format!("{} {id}", source.replace('%', "%25").replace(' ', "%20"))
}

/// The value of an HTTP header: quotes go first, then one round of percent-decoding (HTTP binding, 3.1.3.2).
fn unescaped(field: &[u8], value: &str) -> Result<String, String> {
    let value = value.trim();
    let bare = match value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        Some(quoted) => {
            let (mut bare, mut chars) = (String::new(), quoted.chars());
            while let Some(c) = chars.next() {
                bare.extend(if c == '\\' { chars.next() } else { Some(c) });
            }
            bare
        }
        None => value.to_owned(),
    };
    let bytes = bare.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let digits = bytes.get(at + 1..at + 3).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let byte = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok());
        match byte {
            Some(byte) if bytes[at] == b'%' => {
                decoded.push(byte);
                at += 3;
            }
            _ => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8(decoded).map_err(|_| format!("the field {} is not UTF-8 when it is decoded", shown(field)))
}
