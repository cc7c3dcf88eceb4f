//! Formats of one's own: where topic, id and the rest are.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde_json::value::RawValue;

use super::cloudevent;
use super::reading::{
    Members, Parts, Payload, Times, body, check, content_type, field, headers, is_json, scalar, shown, text,
};
use crate::source::Raw;
use crate::template::{Slot, TemplateError, Text, Vocabulary};

const PLACEHOLDERS: Vocabulary =
    &[("header", Some("NAME")), ("field", Some("NAME")), ("payload", Some("PATH")), ("position", None)];

/// A text with placeholders: `github.{header:x-github-event}.{payload:action}`.
///
/// | placeholder | what it stands for |
/// |---|---|
/// | `{header:NAME}`, `{field:NAME}` | a header or a field of the entry, in any case |
/// | `{payload:PATH}` | a text, number or boolean in the JSON content: `repository.full_name`, `items.0.id` |
/// | `{position}` | where the entry stands at the broker |
/// | `{payload:a.b\|header:c}` | the first of several that is there and not empty |
///
/// Braces that are meant are written twice, and so is a `|` between them.
///
/// ```
/// use postbox::source::Template;
/// assert!("github.{header:x-github-event}".parse::<Template>().is_ok());
/// assert!("{payload:repository.full_name|payload:organization.login}".parse::<Template>().is_ok());
/// let error = "github.{event}".parse::<Template>().expect_err("unknown").to_string();
/// assert!(error.contains("byte 7"), "{error}");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(Text);

impl Template {
    /// Whether it stands for something else in each entry.
    pub fn varies(&self) -> bool {
        self.0.varies()
    }

    /// Whether it can say where the payload is: one placeholder and nothing else, not `{position}`.
    pub fn is_a_place(&self) -> bool {
        self.0.alone().is_some_and(|slot| slot.name != "position")
    }
}

impl FromStr for Template {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Template, TemplateError> {
        Text::parse(text, PLACEHOLDERS).map(Template)
    }
}

impl TryFrom<&str> for Template {
    type Error = TemplateError;

    fn try_from(text: &str) -> Result<Template, TemplateError> {
        text.parse()
    }
}

impl TryFrom<String> for Template {
    type Error = TemplateError;

    fn try_from(text: String) -> Result<Template, TemplateError> {
        text.parse()
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where topic, id and the rest are in entries of a format of one's own. A topic is needed.
///
/// ```
/// use postbox::source::{Format, Mapping};
/// let github = Mapping::new()
///     .topic("github.{header:x-github-event}.{payload:action}") // a push has no action: `github.push`
///     .id("{header:x-github-delivery}")
///     .key("{payload:repository.full_name}");
/// let format = Format::mapped(github);
/// ```
#[derive(Debug, Clone, Default)]
pub struct Mapping {
    topic: Option<Template>,
    id: Option<Template>,
    key: Option<Template>,
    time: Option<Template>,
    correlation_id: Option<Template>,
    causation_id: Option<Template>,
    payload: Option<Template>,
    headers: Vec<(String, Template)>,
}

/// Parses a template, or panics at the caller's line.
#[track_caller]
fn wired<T: TryInto<Template, Error: fmt::Display>>(what: &str, template: T) -> Template {
    template.try_into().unwrap_or_else(|e| panic!("the mapping of the {what}: {e}"))
}

impl Mapping {
    /// Nothing yet.
    pub fn new() -> Mapping {
        Mapping::default()
    }

    /// The topic. A placeholder that an entry has nothing for takes its whole segment with it.
    ///
    /// # Panics
    /// The template has a mistake.
    #[track_caller]
    #[must_use]
    pub fn topic(mut self, template: impl TryInto<Template, Error: fmt::Display>) -> Mapping {
        self.topic = Some(wired("topic", template));
        self
    }

    /// What the same message has when it comes again, and no other has. An entry without it is malformed. If
    /// this is not mapped, it is the header `webhook-id` or `nats-msg-id` or the field `event_id` or
    /// `message_id`; where there is none of them, the position at the broker, which a producer that sends
    /// again does not repeat.
    ///
    /// # Panics
    /// The template has a mistake, or no placeholder: all entries would be one message.
    #[track_caller]
    #[must_use]
    pub fn id(mut self, template: impl TryInto<Template, Error: fmt::Display>) -> Mapping {
        let template = wired("id", template);
        assert!(template.varies(), "the mapping of the id: `{template}` is the same for all; give it a placeholder");
        self.id = Some(template);
        self
    }

    /// What order goes by; none where something is absent.
    ///
    /// # Panics
    /// The template has a mistake.
    #[track_caller]
    #[must_use]
    pub fn key(mut self, template: impl TryInto<Template, Error: fmt::Display>) -> Mapping {
        self.key = Some(wired("key", template));
        self
    }

    /// When it happened: as RFC 3339 writes it, or in whole seconds since 1970; none where something is absent.
    ///
    /// # Panics
    /// The template has a mistake.
    #[track_caller]
    #[must_use]
    pub fn time(mut self, template: impl TryInto<Template, Error: fmt::Display>) -> Mapping {
        self.time = Some(wired("time", template));
        self
    }

    /// What everything in one business process shares; none where something is absent.
    ///
    /// # Panics
    /// The template has a mistake.
    #[track_caller]
    #[must_use]
    pub fn correlation_id(mut self, template: impl TryInto<Template, Error: fmt::Display>) -> Mapping {
        self.correlation_id = Some(wired("correlation id", template));
        self
    }

    /// The message that caused this one; none where something is absent.
    ///
    /// # Panics
    /// The template has a mistake.
    #[track_caller]
    #[must_use]
    pub fn causation_id(mut self, template: impl TryInto<Template, Error: fmt::Display>) -> Mapping {
        self.causation_id = Some(wired("causation id", template));
        self
    }

    /// Where the payload is: `{field:NAME}`, or `{payload:PATH}` in the content. By default it is all of the
    /// content, which is the body or the field `data`; an entry that has neither is an object of its fields.
    ///
    /// # Panics
    /// The template has a mistake, or is more than one placeholder.
    #[track_caller]
    #[must_use]
    pub fn payload(mut self, place: impl TryInto<Template, Error: fmt::Display>) -> Mapping {
        let place = wired("payload", place);
        assert!(
            place.is_a_place(),
            "the mapping of the payload: `{place}` is no place; write `{{field:NAME}}` or `{{payload:PATH}}`"
        );
        self.payload = Some(place);
        self
    }

    /// A header of the message; none where something is absent.
    ///
    /// # Panics
    /// The template has a mistake.
    #[track_caller]
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, template: impl TryInto<Template, Error: fmt::Display>) -> Mapping {
        self.headers.push((name.into(), wired("header", template)));
        self
    }

    pub(super) fn has_topic(&self) -> bool {
        self.topic.is_some()
    }

    pub(super) fn read(&self, raw: &Raw, position: &str, times: Times) -> Result<Parts, String> {
        let content = self.content(raw)?;
        let entry = Mapped { raw, position, json: content.json.as_deref() };
        let value = |slot: &Slot| entry.value(slot);
        let optional = |template: &Option<Template>| match template {
            Some(template) => template.0.fill(value).map(Result::ok),
            None => Ok(None),
        };
        let topic = self.topic.as_ref().map(|topic| topic.0.fill_segments(value)).transpose()?.unwrap_or_default();
        if topic.is_empty() {
            return Err("nothing that its topic is made of is there".into());
        }
        let identity = match &self.id {
            Some(id) => {
                let filled = id.0.fill(value)?;
                Some(filled.map_err(|absent| format!("it has no id: {absent} is not there"))?)
            }
            None => native_id(raw)?,
        };
        let occurred_at = match optional(&self.time)? {
            Some(text) => Some(match text.parse::<i64>() {
                Ok(seconds) => jiff::Timestamp::from_second(seconds).map_err(|_| {
                    format!("its time {} is out of range; a number is seconds since 1970", shown(&text))
                })?,
                Err(_) => times.read("its time", &text)?,
            }),
            None => None,
        };
        let mut parts = Parts {
            topic,
            external_id: identity.clone(),
            identity,
            key: optional(&self.key)?,
            occurred_at,
            correlation_id: optional(&self.correlation_id)?,
            causation_id: optional(&self.causation_id)?,
            ..Parts::default()
        };
        for (name, template) in &self.headers {
            if let Ok(text) = template.0.fill(value)? {
                parts.headers.insert(name.clone(), text);
            }
        }
        // What nobody maps is not taken over, but for the trace.
        headers(raw, |name| !name.starts_with("trace") && name != "baggage", &mut parts.headers)?;
        parts.payload = match self.place("payload") {
            Some(path) => {
                let json = content.json.as_deref().unwrap_or_default();
                let found =
                    find(json, path)?.ok_or_else(|| format!("it has no payload: {} is not there", shown(path)))?;
                Payload::Json(found.get().to_owned())
            }
            None => content.payload,
        };
        Ok(parts)
    }

    /// Where the payload is, if it is a place of this kind.
    fn place(&self, kind: &str) -> Option<&str> {
        let slot = self.payload.as_ref()?.0.alone()?;
        (slot.name == kind).then_some(slot.argument.as_str())
    }

    /// The content that paths go into.
    fn content(&self, raw: &Raw) -> Result<Content, String> {
        let elsewhere = self.place("field").or_else(|| self.place("header"));
        let (what, bytes) = match elsewhere {
            Some(name) => {
                let what = format!("the field {}", shown(name));
                let bytes = raw.field(name).ok_or_else(|| format!("it has no payload: {what} is not there"))?;
                (what, bytes)
            }
            None => match body(raw) {
                Some((what, bytes)) => (what.to_owned(), bytes),
                None => {
                    let mut fields = BTreeMap::new();
                    headers(raw, |_| false, &mut fields)?;
                    let text = serde_json::to_string(&fields).map_err(|e| e.to_string())?;
                    check("the entry", &text)?;
                    return Ok(Content { json: Some(text.clone()), payload: Payload::Json(text) });
                }
            },
        };
        // A content type tells of the content, not of another field.
        let given = if elsewhere.is_some() { None } else { content_type(raw)?.map(str::to_owned) };
        if given.as_deref().is_some_and(|given| !is_json(given)) {
            return Ok(Content { json: None, payload: cloudevent::payload(&what, given, bytes.into())? });
        }
        let json = text(&what, bytes)?;
        check(&what, json)?;
        Ok(Content { json: Some(json.to_owned()), payload: Payload::Json(json.to_owned()) })
    }
}

struct Content {
    /// None if it is no JSON.
    json: Option<String>,
    payload: Payload,
}

/// Ids that brokers and webhooks carry beside the content.
fn native_id(raw: &Raw) -> Result<Option<String>, String> {
    for name in ["webhook-id", "nats-msg-id", "event_id", "message_id"] {
        if let Some(id) = field(raw, name)?.filter(|id| !id.is_empty()) {
            return Ok(Some(id.to_owned()));
        }
    }
    Ok(None)
}

/// An entry that templates are filled from.
struct Mapped<'a> {
    raw: &'a Raw,
    position: &'a str,
    json: Option<&'a str>,
}

impl Mapped<'_> {
    fn value(&self, slot: &Slot) -> Result<Option<String>, String> {
        match slot.name {
            "position" => Ok(Some(self.position.to_owned())),
            "payload" => match self.json.map(|json| find(json, &slot.argument)).transpose()?.flatten() {
                Some(found) => {
                    scalar(found).map_err(|kind| format!("{{{slot}}} is {kind}; it must be a text or a number"))
                }
                None => Ok(None),
            },
            _ => Ok(field(self.raw, &slot.argument)?.map(str::to_owned)),
        }
    }
}

/// What is there in a checked JSON text: names of members and numbers of elements, between dots.
fn find<'a>(json: &'a str, path: &str) -> Result<Option<&'a RawValue>, String> {
    let Ok(mut at) = raw_value(json) else { return Ok(None) };
    for step in path.split('.') {
        let text = at.get();
        let next = if text.starts_with('{') {
            Members::of(text).map(|members| members.get(step)).transpose()?.flatten()
        } else if text.starts_with('[') {
            element(text, step)
        } else {
            None
        };
        match next {
            Some(value) => at = value,
            None => return Ok(None),
        }
    }
    Ok(Some(at))
}

fn raw_value(text: &str) -> Result<&RawValue, serde_json::Error> {
    let mut parser = serde_json::Deserializer::from_str(text);
    // Its depth is checked.
    parser.disable_recursion_limit();
    serde::Deserialize::deserialize(&mut parser)
}

fn element<'a>(array: &'a str, number: &str) -> Option<&'a RawValue> {
    let number: usize = number.parse().ok()?;
    let mut parser = serde_json::Deserializer::from_str(array);
    parser.disable_recursion_limit();
    let elements: Vec<&RawValue> = serde::Deserialize::deserialize(&mut parser).ok()?;
    elements.get(number).copied()
}
