//! How a message looks on its way out: as a CloudEvent or as its payload alone; and where it goes.
//!
//! Source: CloudEvents 1.0.2, its JSON event format, its HTTP and Kafka bindings, and its extensions for
//! partitioning and distributed tracing.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::str::FromStr;

use crate::message::{DEFAULT_SOURCE, Envelope};
use crate::template::{TemplateError, Text, Vocabulary};

/// How a message looks on its way out.
///
/// ```
/// use postbox::sink::EnvelopeStyle;
/// assert_eq!("payload".parse(), Ok(EnvelopeStyle::Payload));
/// assert_eq!(EnvelopeStyle::default().to_string(), "cloudevents-binary");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum EnvelopeStyle {
    /// `cloudevents-binary`: the payload's bytes as they are, and the attributes beside them.
    #[default]
    CloudEventsBinary,
    /// `cloudevents-structured`: one JSON object with everything.
    CloudEventsStructured,
    /// `payload`: nothing but the payload. Who reads it does not learn the id, and cannot tell a repetition.
    Payload,
}

impl EnvelopeStyle {
    const ALL: [(&'static str, EnvelopeStyle); 3] = [
        ("cloudevents-binary", EnvelopeStyle::CloudEventsBinary),
        ("cloudevents-structured", EnvelopeStyle::CloudEventsStructured),
        ("payload", EnvelopeStyle::Payload),
    ];
}

impl fmt::Display for EnvelopeStyle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = EnvelopeStyle::ALL.iter().find(|(_, style)| style == self).map_or("", |(name, _)| name);
        f.write_str(name)
    }
}

impl FromStr for EnvelopeStyle {
    type Err = String;

    fn from_str(text: &str) -> Result<EnvelopeStyle, String> {
        let found = EnvelopeStyle::ALL.iter().find(|(name, _)| *name == text).map(|(_, style)| *style);
        found.ok_or_else(|| {
            let names: Vec<&str> = EnvelopeStyle::ALL.iter().map(|(name, _)| *name).collect();
            format!("there is no envelope `{}`; there are {}", text.escape_debug(), names.join(", "))
        })
    }
}

/// A message in the form in which it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// The media type of the body.
    pub content_type: String,
    /// CloudEvents attributes beside the body, without a prefix; none but in binary mode.
    pub attributes: Vec<(String, String)>,
    /// The message's other headers, whose names are no attribute's; none but in binary mode. For brokers that
    /// take any name: over HTTP they are not sent.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

/// What the envelope itself fills in; a header of this name does not go out.
const OWN: [&str; 10] = [
    "specversion",
    "id",
    "source",
    "type",
    "time",
    "datacontenttype",
    "partitionkey",
    "correlationid",
    "causationid",
    "data",
];

/// A name that CloudEvents allow for an extension.
fn is_attribute(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
}

/// A name that would be taken for something else beside the body.
fn is_taken(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["ce-", "ce_", "cloudevents:", "cloudevents_", "postbox-"].iter().any(|prefix| name.starts_with(prefix))
        || OWN.contains(&name.as_str())
        || ["data", "content-type", "content_type", ""].contains(&name.as_str())
}

impl Encoded {
    /// A message in this style. `source` is for messages that do not say theirs; by default it is `postbox`.
    ///
    /// The id is the message's, the same on every attempt. Headers go out as extension attributes where
    /// CloudEvents allow their names (lower-case letters and digits), else as they are; those that begin with
    /// `postbox-` stay here.
    pub fn new(envelope: &Envelope, style: EnvelopeStyle, source: Option<&str>) -> Encoded {
        let source = source.unwrap_or(DEFAULT_SOURCE);
        let extensions = || {
            let named = envelope.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
            named.filter(|(name, _)| is_attribute(name) && !OWN.contains(name))
        };
        let mut encoded = Encoded {
            content_type: envelope.content_type().to_owned(),
            attributes: Vec::new(),
            headers: Vec::new(),
            body: Vec::new(),
        };
        match style {
            EnvelopeStyle::Payload => encoded.body = envelope.payload_bytes().to_vec(),
            EnvelopeStyle::CloudEventsStructured => {
                encoded.content_type = "application/cloudevents+json".into();
                let extensions: BTreeMap<&str, &str> = extensions().collect();
                encoded.body = envelope.cloudevent(source, extensions).into_bytes();
            }
            EnvelopeStyle::CloudEventsBinary => {
                encoded.body = envelope.payload_bytes().to_vec();
                let mut add = |name: &str, value: String| encoded.attributes.push((name.to_owned(), value));
                add("specversion", "1.0".into());
                add("id", envelope.id.to_string());
                add("source", envelope.source.clone().unwrap_or_else(|| source.to_owned()));
                add("type", envelope.topic.clone());
                add("time", envelope.occurred_at.to_string());
                if let Some(key) = &envelope.key {
                    add("partitionkey", key.clone());
                }
                add("correlationid", envelope.correlation());
                if let Some(cause) = &envelope.causation_id {
                    add("causationid", cause.clone());
                }
                for (name, value) in extensions() {
                    add(name, value.to_owned());
                }
                let others = envelope.headers.iter().filter(|(name, _)| !is_attribute(name) && !is_taken(name));
                encoded.headers = others.map(|(name, value)| (name.clone(), value.clone())).collect();
            }
        }
        encoded
    }

    /// As the fields of an entry: the attributes with the prefix `ce-`, the other headers, `content-type`, and
    /// the body as `data`. Texts are plain UTF-8.
    pub fn fields(&self) -> impl Iterator<Item = (String, &[u8])> {
        let attributes = self.attributes.iter().map(|(name, value)| (format!("ce-{name}"), value.as_bytes()));
        let headers = self.headers.iter().map(|(name, value)| (name.clone(), value.as_bytes()));
        let content = [("content-type".into(), self.content_type.as_bytes()), ("data".into(), self.body.as_slice())];
        attributes.chain(headers).chain(content)
    }

    /// As the headers of an HTTP request with this body: `content-type`, the attributes with the prefix `ce-`
    /// and their values escaped (HTTP binding, 3.1.3.2), and the trace context once more under its own names.
    pub fn http_headers(&self) -> impl Iterator<Item = (String, String)> {
        let attributes = self.attributes.iter().map(|(name, value)| (format!("ce-{name}"), escaped(value)));
        let trace = self.attributes.iter().filter(|(name, value)| {
            matches!(name.as_str(), "traceparent" | "tracestate") && value.bytes().all(|c| matches!(c, b' '..=b'~'))
        });
        [("content-type".to_owned(), self.content_type.clone())].into_iter().chain(attributes).chain(trace.cloned())
    }
}

/// A value as HTTP headers carry it.
pub(crate) fn escaped(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'!'..=b'~' if !matches!(byte, b'"' | b'%') => escaped.push(char::from(byte)),
            _ => {
                // Writing to a string does not fail.
                let _ = write!(escaped, "%{byte:02X}");
            }
        }
    }
    escaped
}

const PLACEHOLDERS: Vocabulary = &[("topic", None), ("key", None), ("id", None), ("header", Some("NAME"))];

/// Where a message goes at the broker: a name, with `{topic}`, `{key}`, `{id}` and `{header:NAME}`.
///
/// ```
/// use postbox::sink::Target;
/// assert!("shop.{topic}".parse::<Target>().is_ok());
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target(Text);

impl Target {
    /// The name for this message.
    ///
    /// # Errors
    /// The message has nothing for one of the placeholders.
    pub fn of(&self, envelope: &Envelope) -> Result<String, String> {
        let filled = self.0.fill(|slot| {
            Ok::<_, String>(match slot.name {
                "topic" => Some(envelope.topic.clone()),
                "key" => envelope.key.clone(),
                "id" => Some(envelope.id.to_string()),
                _ => envelope.headers.get(&slot.argument).cloned(),
            })
        })?;
        filled.map_err(|absent| {
            format!("it goes to `{}`, and the message has no {absent}", self.0.to_string().escape_debug())
        })
    }

    /// The name, if it is the same for all messages.
    pub fn fixed(&self) -> Option<String> {
        if self.0.varies() {
            return None;
        }
        self.0.fill(|_| Ok::<_, String>(None)).ok()?.ok()
    }
}

impl FromStr for Target {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Target, TemplateError> {
        Text::parse(text, PLACEHOLDERS).map(Target)
    }
}

impl TryFrom<&str> for Target {
    type Error = TemplateError;

    fn try_from(text: &str) -> Result<Target, TemplateError> {
        text.parse()
    }
}

impl TryFrom<String> for Target {
    type Error = TemplateError;

    fn try_from(text: String) -> Result<Target, TemplateError> {
        text.parse()
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::content::{Bytes, Content};
    use crate::source::{Format, Raw};

    fn envelope() -> Envelope {
        Envelope {
            id: uuid::Uuid::now_v7(),
            topic: "orders.placed".into(),
            key: Some("k 1%é\"".into()),
            payload: Content::stored(Some(r#"{"n": 1.10}"#.into()), None, None).expect("JSON"),
            headers: BTreeMap::new(),
            occurred_at: "2026-11-28T12:00:00.123456Z".parse().expect("a time"),
            received_at: jiff::Timestamp::now(),
            source: None,
            external_id: None,
            correlation_id: None,
            causation_id: None,
            max_attempts: None,
        }
    }

    fn headers(headers: &[(&str, &str)]) -> BTreeMap<String, String> {
        headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn binary_mode() {
        let sent = Envelope {
            headers: headers(&[
                ("traceparent", "00-1"),
                ("tenant", "acme"),
                ("X-Team", "a"),
                ("postbox-position", "p"),
                ("data", "no"),
                ("ce-id", "no"),
                ("id", "no"),
            ]),
            ..envelope()
        };
        let encoded = Encoded::new(&sent, EnvelopeStyle::CloudEventsBinary, Some("/shop"));
        let id = sent.id.to_string();
        let fields: Vec<(String, String)> =
            encoded.fields().map(|(name, value)| (name, String::from_utf8_lossy(value).into_owned())).collect();
        let expected = [
            ("ce-specversion", "1.0"),
            ("ce-id", &id),
            ("ce-source", "/shop"),
            ("ce-type", "orders.placed"),
            ("ce-time", "2026-11-28T12:00:00.123456Z"),
            ("ce-partitionkey", "k 1%é\""),
            ("ce-correlationid", &id),
            ("ce-tenant", "acme"),
            ("ce-traceparent", "00-1"),
            ("X-Team", "a"),
            ("content-type", "application/json"),
            ("data", r#"{"n": 1.10}"#),
        ];
        assert_eq!(fields, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
        let http: BTreeMap<String, String> = encoded.http_headers().collect();
        assert_eq!(http["ce-partitionkey"], "k%201%25%C3%A9%22");
        assert_eq!((http["traceparent"].as_str(), http.get("X-Team")), ("00-1", None));
    }

    #[test]
    fn structured_mode_and_payload_alone() {
        let sent = Envelope { headers: headers(&[("tenant", "acme"), ("X-Team", "a"), ("id", "no")]), ..envelope() };
        let structured = Encoded::new(&sent, EnvelopeStyle::CloudEventsStructured, None);
        assert_eq!(structured.content_type, "application/cloudevents+json");
        let text = String::from_utf8(structured.body).expect("UTF-8");
        assert!(text.ends_with(r#""tenant":"acme","data":{"n": 1.10}}"#), "{text}");
        assert!(text.contains(r#""source":"postbox""#) && !text.contains("X-Team"), "{text}");
        let payload = Encoded::new(&sent, EnvelopeStyle::Payload, None);
        assert_eq!(payload.body, sent.payload_bytes());
        assert!(payload.attributes.is_empty() && payload.headers.is_empty());
    }

    #[test]
    fn targets() {
        let target = |text: &str| text.parse::<Target>().expect("a target");
        assert_eq!(target("shop.{topic}").of(&envelope()), Ok("shop.orders.placed".into()));
        assert_eq!(target("shop-{{x}}").fixed(), Some("shop-{x}".into()));
        assert_eq!(target("{key}").fixed(), None);
        let why = target("{key}").of(&Envelope { key: None, ..envelope() }).expect_err("no key");
        assert_eq!(why, "it goes to `{key}`, and the message has no {key}");
        assert!("{payload:a}".parse::<Target>().is_err());
    }

    #[test]
    fn styles_are_read_as_they_are_written() {
        for (name, style) in EnvelopeStyle::ALL {
            assert_eq!((name.parse(), style.to_string()), (Ok(style), name.to_owned()));
        }
        assert!("xml".parse::<EnvelopeStyle>().expect_err("none").contains("cloudevents-structured, payload"));
    }

    /// What a source makes of what a sink has sent.
    fn received(sent: &Envelope, raw: Raw) -> Result<(), TestCaseError> {
        let read = Format::default().read(&raw, "in", "in/1-0").map_err(TestCaseError::fail)?;
        let draft = read.draft;
        let id = sent.id.to_string();
        let correlation = sent.correlation();
        prop_assert_eq!(draft.topic(), &sent.topic);
        prop_assert_eq!(&draft.key, &sent.key);
        prop_assert_eq!(draft.payload.bytes(), sent.payload_bytes());
        prop_assert_eq!(draft.payload.content_type(), sent.content_type());
        prop_assert_eq!(draft.occurred_at, Some(sent.occurred_at));
        prop_assert_eq!(draft.external_id, Some(id));
        prop_assert_eq!(draft.source.as_deref(), Some(sent.source.as_deref().unwrap_or("postbox")));
        prop_assert_eq!(draft.correlation_id, Some(correlation));
        prop_assert_eq!(&draft.causation_id, &sent.causation_id);
        let mut headers = draft.headers;
        headers.remove("postbox-position");
        prop_assert_eq!(&headers, &sent.headers);
        prop_assert!(!read.by_position);
        Ok(())
    }

    /// Texts that every store keeps.
    fn text() -> impl Strategy<Value = String> {
        "[^\\x00]{1,30}"
    }

    fn content() -> impl Strategy<Value = Content> {
        let json = prop::sample::select(vec![
            r#"{"n": 1.10}"#,
            "null",
            "[1e5, \"\\u00e9\"]",
            "12345678901234567890123",
            "\"é\"",
        ]);
        prop_oneof![
            json.prop_map(|text| Content::stored(Some(text.into()), None, None).expect("JSON")),
            prop::collection::vec(any::<u8>(), 0..40).prop_map(|bytes| Content::Bytes(Bytes::new("image/png", bytes))),
            "[^\\x00]{1,20}"
                .prop_map(|text| Content::Bytes(Bytes::new("text/plain; charset=utf-8", text.into_bytes()))),
        ]
    }

    prop_compose! {
        fn message()(
            key in prop::option::of(text()),
            payload in content(),
            headers in prop::collection::btree_map("[a-z][a-z0-9]{3,9}x", text(), 0..4),
            seconds in -62_135_596_800..253_402_200_000_i64,
            nanos in 0..1_000_000_000_i32,
            source in prop::option::of(text()),
            correlation_id in prop::option::of(text()),
            causation_id in prop::option::of(text()),
        ) -> Envelope {
            let occurred_at = jiff::Timestamp::new(seconds.max(-62_135_596_799), nanos).expect("a time");
            Envelope { key, payload, headers, occurred_at, source, correlation_id, causation_id, ..envelope() }
        }
    }

    proptest! {
        #[test]
        fn what_goes_out_comes_in_equal(sent in message()) {
            for style in [EnvelopeStyle::CloudEventsBinary, EnvelopeStyle::CloudEventsStructured] {
                let encoded = Encoded::new(&sent, style, None);
                let fields = encoded.fields().map(|(name, value)| (name.into_bytes(), value.to_vec())).collect();
                received(&sent, Raw { fields, body: None })?;
                let fields = encoded.http_headers().map(|(name, value)| {
                    assert!(value.bytes().all(|c| matches!(c, b' '..=b'~')), "{value:?} fits into a header");
                    (name.into_bytes(), value.into_bytes())
                });
                received(&sent, Raw { fields: fields.collect(), body: Some(encoded.body.clone()) })?;
            }
        }
    }
}
