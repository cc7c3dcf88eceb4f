//! The message: what is published, stored and handed to handlers.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::content::{self, Bytes, Content};
use crate::error::PublishError;
use crate::json;
use crate::pattern::{MAX_NAME_BYTES, check_topic};
use crate::priority::Priority;

/// The largest payload by default, in bytes: 1 MiB.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;
/// The most that all headers of a message may weigh together, as JSON, in bytes: 32 KiB.
pub const MAX_HEADER_BYTES: usize = 32 << 10;
/// The longest delay and the longest dedup window: 10 years.
pub const MAX_WAIT: Duration = Duration::from_secs(10 * 366 * 86_400);

/// A type that is published as a message. Derive it:
///
/// ```
/// use postbox::Message;
/// #[derive(serde::Serialize, Message)]
/// #[message(topic = "orders.placed", key = order_id)]
/// struct OrderPlaced { order_id: i64 }
/// #[derive(serde::Serialize, Message)]
/// struct StockRanOut { sku: String } // without `topic`, the type's name in snake case
///
/// assert_eq!(OrderPlaced { order_id: 42 }.key().as_deref(), Some("42"));
/// assert_eq!(StockRanOut::TOPIC, "stock_ran_out");
/// ```
pub trait Message: Serialize {
    /// The topic it is published under.
    const TOPIC: &'static str;

    /// What ordering and partitioning go by. Empty counts as none.
    fn key(&self) -> Option<String> {
        None
    }
}

/// What may stand in `#[message(key = field)]`. Implement it for a type of your own that does.
pub trait MessageKey {
    /// The key as text.
    fn message_key(&self) -> Option<String>;
}

macro_rules! keys {
    ($($t:ty),*) => { $(impl MessageKey for $t {
        fn message_key(&self) -> Option<String> { Some(self.to_string()) }
    })* };
}
keys!(String, str, i8, i16, i32, i64, i128, u8, u16, u32, u64, u128, isize, usize, bool, char, Uuid, Timestamp);

impl<K: MessageKey> MessageKey for Option<K> {
    fn message_key(&self) -> Option<String> {
        self.as_ref().and_then(K::message_key)
    }
}

impl<K: MessageKey + ?Sized> MessageKey for &K {
    fn message_key(&self) -> Option<String> {
        K::message_key(self)
    }
}

/// When the deliveries of a message become due, on the database's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Due {
    #[default]
    Now,
    After(Duration),
    At(Timestamp),
}

/// A message that is not published yet: made by [`Envelope::of`], [`Envelope::json`] or
/// [`Envelope::bytes`].
///
/// Nothing is checked before it is published.
#[derive(Debug, Clone)]
#[must_use = "a draft does nothing until it is published"]
pub struct Draft {
    pub(crate) topic: String,
    pub(crate) payload: Content,
    pub(crate) key: Option<String>,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) due: Due,
    pub(crate) dedup: Option<Dedup>,
    pub(crate) max_attempts: Option<u32>,
    pub(crate) priority: Priority,
    pub(crate) occurred_at: Option<Timestamp>,
    pub(crate) source: Option<String>,
    pub(crate) external_id: Option<String>,
    pub(crate) correlation_id: Option<String>,
    pub(crate) causation_id: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dedup {
    pub(crate) key: String,
    pub(crate) window: Duration,
}

impl Draft {
    fn new(topic: String, payload: Content) -> Draft {
        Draft {
            topic,
            payload,
            key: None,
            headers: BTreeMap::new(),
            due: Due::Now,
            dedup: None,
            max_attempts: None,
            priority: Priority::Normal,
            occurred_at: None,
            source: None,
            external_id: None,
            correlation_id: None,
            causation_id: None,
        }
    }

    /// What ordering and partitioning go by, at most 255 bytes. An empty key is no key.
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Adds a header, or replaces it.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.insert(name.into(), value.into());
        self
    }

    /// Becomes due this long after it was published, by the database's clock.
    pub fn after(mut self, delay: Duration) -> Self {
        self.due = Due::After(delay);
        self
    }

    /// Becomes due at this time, by the database's clock; a time in the past is now.
    pub fn at(mut self, time: Timestamp) -> Self {
        self.due = Due::At(time);
        self
    }

    /// Publishes once per topic and `key` (at most 255 bytes) within a day: a second one with the
    /// same body is answered with the first, another body is refused.
    pub fn dedup(self, key: impl Into<String>) -> Self {
        self.dedup_within(key, Duration::from_secs(86_400))
    }

    /// Like [`dedup`](Self::dedup), remembered for `window`.
    pub fn dedup_within(mut self, key: impl Into<String>, window: Duration) -> Self {
        self.dedup = Some(Dedup { key: key.into(), window });
        self
    }

    /// How many attempts each of its deliveries may make, whatever the subscription says.
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = Some(attempts);
        self
    }

    /// Which messages its deliveries go before; see `docs/priority.md`.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// When it happened in the world, if that is not now.
    pub fn occurred_at(mut self, time: Timestamp) -> Self {
        self.occurred_at = Some(time);
        self
    }

    /// Where it comes from: the `source` of a CloudEvent.
    pub fn source(mut self, source: impl Into<String>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The id that its producer gave it, at most 255 bytes; shown, and not used for dedup.
    pub fn external_id(mut self, id: impl Into<String>) -> Self {
        self.external_id = Some(id.into());
        self
    }

    /// The id that everything in one business process shares. Carried from handlers by itself.
    pub fn correlation_id(mut self, id: impl Into<String>) -> Self {
        self.correlation_id = Some(id.into());
        self
    }

    /// The id of the message that caused this one. Carried from handlers by itself.
    pub fn causation_id(mut self, id: impl Into<String>) -> Self {
        self.causation_id = Some(id.into());
        self
    }

    /// The topic it will have.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// Checks every limit; the same draft, its empty texts taken as none.
    pub(crate) fn checked(mut self, max_payload_bytes: usize) -> Result<Draft, PublishError> {
        check_topic(&self.topic)?;
        let bytes = self.payload.bytes().len();
        if bytes > max_payload_bytes {
            return Err(PublishError::PayloadTooLarge { bytes, limit: max_payload_bytes });
        }
        match &self.payload {
            Content::Json(text) => {
                json::check(text.get())?;
            }
            Content::Bytes(bytes) => check_content_type(bytes.content_type())?,
        }
        for (what, text) in [
            ("key", &mut self.key),
            ("source", &mut self.source),
            ("external id", &mut self.external_id),
            ("correlation id", &mut self.correlation_id),
            ("causation id", &mut self.causation_id),
        ] {
            text.take_if(|t| t.is_empty());
            if let Some(text) = text {
                check_text(what, text)?;
            }
        }
        if let Some(dedup) = &self.dedup {
            if dedup.key.is_empty() {
                return Err(PublishError::EmptyDedupKey);
            }
            check_text("dedup key", &dedup.key)?;
            check_wait("dedup window", dedup.window)?;
        }
        match self.due {
            Due::After(delay) => check_wait("delay", delay)?,
            Due::At(time) => check_time("due time", time)?,
            Due::Now => {}
        }
        if let Some(time) = self.occurred_at {
            check_time("time of occurrence", time)?;
        }
        if let Some(attempts @ (0 | 1001..)) = self.max_attempts {
            return Err(PublishError::MaxAttempts { attempts });
        }
        for (name, value) in &self.headers {
            if name.is_empty() {
                return Err(PublishError::EmptyHeaderName);
            }
            check_text("header name", name)?;
            if value.contains('\0') {
                return Err(PublishError::Nul { what: "header value" });
            }
        }
        let weight: usize = self.headers.iter().map(|(n, v)| n.len() + v.len() + 6).sum();
        if weight > MAX_HEADER_BYTES {
            return Err(PublishError::HeadersTooLarge { bytes: weight });
        }
        Ok(self)
    }
}

fn check_text(what: &'static str, text: &str) -> Result<(), PublishError> {
    if text.len() > MAX_NAME_BYTES {
        return Err(PublishError::TooLong { what, bytes: text.len() });
    }
    if text.contains('\0') {
        return Err(PublishError::Nul { what });
    }
    Ok(())
}

fn check_content_type(text: &str) -> Result<(), PublishError> {
    if text.len() > MAX_NAME_BYTES {
        return Err(PublishError::TooLong { what: "content type", bytes: text.len() });
    }
    content::check_content_type(text).map_err(|at| PublishError::ContentType { at })
}

fn check_wait(what: &'static str, wait: Duration) -> Result<(), PublishError> {
    if wait > MAX_WAIT {
        return Err(PublishError::TooFar { what });
    }
    Ok(())
}

/// From the year 1 on: what every store can keep. jiff ends with the year 9999.
fn check_time(what: &'static str, time: Timestamp) -> Result<(), PublishError> {
    if time.as_second() < -62_135_596_800 {
        return Err(PublishError::TooEarly { what });
    }
    Ok(())
}

/// What [`publish`](crate::Postbox::publish) takes: a reference to a [`Message`], or a [`Draft`].
pub trait IntoDraft {
    /// The message to publish.
    ///
    /// # Errors
    /// The payload does not serialize.
    fn into_draft(self) -> Result<Draft, PublishError>;
}

impl IntoDraft for Draft {
    fn into_draft(self) -> Result<Draft, PublishError> {
        Ok(self)
    }
}

impl<M: Message> IntoDraft for &M {
    fn into_draft(self) -> Result<Draft, PublishError> {
        Envelope::of(self)
    }
}

impl IntoDraft for Result<Draft, PublishError> {
    fn into_draft(self) -> Result<Draft, PublishError> {
        self
    }
}

/// What one statement stores at most: so many messages, and so many bytes of payloads (or one message).
const CHUNK: usize = 1000;
const CHUNK_BYTES: usize = 2 << 20;

/// Runs that one statement can take: within these, and no dedup key twice.
pub(crate) fn chunks(drafts: &[Draft]) -> impl Iterator<Item = &[Draft]> {
    let mut rest = drafts;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut seen = std::collections::HashSet::new();
        let mut bytes = 0;
        let ends = rest.iter().take(CHUNK).enumerate().position(|(n, draft)| {
            bytes += draft.payload.bytes().len();
            let repeated =
                draft.dedup.as_ref().is_some_and(|dedup| !seen.insert((draft.topic.as_str(), dedup.key.as_str())));
            repeated || (n > 0 && bytes > CHUNK_BYTES)
        });
        let (chunk, tail) = rest.split_at(ends.unwrap_or(rest.len().min(CHUNK)));
        rest = tail;
        Some(chunk)
    })
}

/// A message as it is stored: it has its id, and nothing in it changes any more.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Envelope {
    /// Minted in the database, time-ordered (UUIDv7).
    pub id: Uuid,
    /// Dotted name; the CloudEvents `type`.
    pub topic: String,
    /// What ordering and partitioning go by.
    pub key: Option<String>,
    /// The JSON text, digit for digit as it was published; or bytes with a content type.
    #[serde(flatten)]
    pub payload: Content,
    /// Names and values, as given.
    pub headers: BTreeMap<String, String>,
    /// When it happened: as given, else when it was recorded.
    pub occurred_at: Timestamp,
    /// When it was recorded here, by the database's clock, in milliseconds.
    pub received_at: Timestamp,
    /// Where it came from, if it was received or said so.
    pub source: Option<String>,
    /// The id its producer gave it.
    pub external_id: Option<String>,
    /// What everything in one business process shares.
    pub correlation_id: Option<String>,
    /// The message that caused this one.
    pub causation_id: Option<String>,
    /// Its own limit of attempts, before the subscription's.
    pub max_attempts: Option<u32>,
}

impl Envelope {
    /// A draft of a typed message, for options that [`publish`](crate::Postbox::publish) alone
    /// does not have.
    ///
    /// # Errors
    /// The payload does not serialize (a map with keys that are no strings, say).
    pub fn of<M: Message>(message: &M) -> Result<Draft, PublishError> {
        let mut draft = Envelope::json(M::TOPIC, message)?;
        draft.key = message.key();
        Ok(draft)
    }

    /// A draft of an untyped message: any topic, any payload that serializes to JSON.
    ///
    /// # Errors
    /// The payload does not serialize.
    pub fn json<P: Serialize + ?Sized>(topic: impl Into<String>, payload: &P) -> Result<Draft, PublishError> {
        let payload = serde_json::value::to_raw_value(payload)
            .map_err(|e| PublishError::Json(json::JsonError::Syntax(e.to_string())))?;
        Ok(Draft::new(topic.into(), Content::Json(payload.into())))
    }

    /// A draft whose payload is JSON text already; it is stored digit for digit.
    ///
    /// # Errors
    /// The text is no JSON, or something that PostgreSQL would refuse or change.
    pub fn raw(topic: impl Into<String>, json_text: impl Into<String>) -> Result<Draft, PublishError> {
        let text = json_text.into();
        json::check(&text)?;
        let payload =
            RawValue::from_string(text).map_err(|e| PublishError::Json(json::JsonError::Syntax(e.to_string())))?;
        Ok(Draft::new(topic.into(), Content::Json(payload.into())))
    }

    /// A draft whose payload is bytes of a content type: a media type like `image/png` or
    /// `text/plain; charset=utf-8`, 1 to 255 bytes of ASCII.
    pub fn bytes(
        topic: impl Into<String>,
        content_type: impl Into<std::sync::Arc<str>>,
        bytes: impl Into<std::sync::Arc<[u8]>>,
    ) -> Draft {
        Draft::new(topic.into(), Content::Bytes(Bytes::new(content_type, bytes)))
    }

    /// The payload as it is stored: the bytes, or those of the JSON text.
    pub fn payload_bytes(&self) -> &[u8] {
        self.payload.bytes()
    }

    /// The payload's JSON text; none if it is bytes.
    pub fn payload_json(&self) -> Option<&str> {
        self.payload.json()
    }

    /// The payload's media type; `application/json` for JSON.
    pub fn content_type(&self) -> &str {
        self.payload.content_type()
    }

    /// Reads the payload as `T`.
    ///
    /// # Errors
    /// The JSON path at which it does not fit, and why; or the payload is bytes.
    pub fn decode<T: DeserializeOwned + 'static>(&self) -> Result<T, DecodeError> {
        let text = match &self.payload {
            Content::Json(text) => text.get(),
            Content::Bytes(bytes) => {
                let reason =
                    format!("it is bytes of {}; take `Bytes`, or read `Envelope::payload_bytes`", bytes.content_type());
                return Err(DecodeError { path: ".".into(), reason });
            }
        };
        if std::any::TypeId::of::<T>() == std::any::TypeId::of::<serde_json::Value>()
            && let Ok(json::Findings { lossy_number: Some(at) }) = json::check(text)
        {
            return Err(DecodeError {
                path: ".".into(),
                reason: format!(
                    "the number at byte {at} would be changed by serde_json::Value; decode into a type of its own, or read `Envelope::payload_json`"
                ),
            });
        }
        json::read(text).map_err(|e| DecodeError { path: e.path().to_string(), reason: e.into_inner().to_string() })
    }

    /// The id that everything in one business process shares: the given one, else its own.
    pub fn correlation(&self) -> String {
        self.correlation_id.clone().unwrap_or_else(|| self.id.to_string())
    }

    /// The W3C trace context that came with it.
    pub fn traceparent(&self) -> Option<&str> {
        self.headers.get("traceparent").map(String::as_str)
    }

    /// The whole envelope as one JSON object, as text: the payload's digits are kept. Bytes are
    /// `data_base64`, with `datacontenttype`.
    pub fn to_json(&self) -> String {
        // Every field serializes: the payload is valid JSON, the maps have string keys.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// A CloudEvent 1.0 in structured JSON, as text: the payload as `data` (bytes as
    /// `data_base64`), the key as `partitionkey`.
    ///
    /// Source: CloudEvents 1.0.2, JSON event format, and its partitioning and tracing extensions.
    pub fn to_cloudevent(&self) -> String {
        let trace = self.traceparent().map(|trace| ("traceparent", trace));
        self.cloudevent(DEFAULT_SOURCE, trace.into_iter().collect())
    }

    /// The same with a source for messages that have none, and with these extensions.
    pub(crate) fn cloudevent(&self, source: &str, extensions: BTreeMap<&str, &str>) -> String {
        let event = CloudEvent {
            specversion: "1.0",
            id: self.id,
            source: self.source.as_deref().unwrap_or(source),
            kind: &self.topic,
            time: self.occurred_at,
            datacontenttype: self.content_type(),
            partitionkey: self.key.as_deref(),
            correlationid: self.correlation(),
            causationid: self.causation_id.as_deref(),
            extensions,
            data: match &self.payload {
                Content::Json(text) => Some(text),
                Content::Bytes(_) => None,
            },
            data_base64: self.payload.typed().map(|bytes| content::base64(bytes)),
        };
        serde_json::to_string(&event).unwrap_or_default()
    }
}

/// The `source` of messages that do not say theirs.
pub(crate) const DEFAULT_SOURCE: &str = "postbox";

/// A CloudEvent 1.0 in its structured JSON form.
#[derive(Serialize)]
struct CloudEvent<'a> {
    specversion: &'static str,
    id: Uuid,
    source: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    time: Timestamp,
    datacontenttype: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    partitionkey: Option<&'a str>,
    correlationid: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    causationid: Option<&'a str>,
    #[serde(flatten)]
    extensions: BTreeMap<&'a str, &'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_base64: Option<String>,
}

/// A payload that does not fit the type it was read as.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the payload does not decode at `{path}`: {reason}")]
pub struct DecodeError {
    /// The JSON path, `items[3].price`; `.` is the whole.
    pub path: String,
    /// What does not fit there.
    pub reason: String,
}

/// When a UUIDv7 was minted, in whole milliseconds.
pub(crate) fn minted_at(id: Uuid) -> Timestamp {
    let millis = (id.as_u128() >> 80) as i64;
    Timestamp::from_millisecond(millis).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// What is minted at this time or later is not below this; what was minted before is.
pub(crate) fn first_id_at(time: Timestamp) -> Uuid {
    // Rounded up to the whole milliseconds that ids tell.
    let millis = time.as_microsecond().max(0).unsigned_abs().div_ceil(1000);
    Uuid::from_u128(u128::from(millis.min((1 << 48) - 1)) << 80)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft() -> Draft {
        Envelope::raw("orders.placed", r#"{"n": 12345678901234567890123}"#).expect("valid")
    }

    #[test]
    fn empty_texts_are_none_and_digits_are_kept() {
        let checked = draft().key("").correlation_id("").checked(MAX_PAYLOAD_BYTES).expect("valid");
        assert_eq!((checked.key, checked.correlation_id), (None, None));
        assert_eq!(checked.payload.json(), Some(r#"{"n": 12345678901234567890123}"#));
    }

    #[test]
    fn limits_are_named() {
        let refused = |draft: Draft| draft.checked(64).expect_err("refused").to_string();
        assert!(refused(draft().key("k".repeat(256))).contains("255"));
        assert!(refused(draft().key("a\0b")).contains("NUL"));
        assert!(refused(draft().dedup("")).contains("empty"));
        assert!(refused(draft().max_attempts(0)).contains("1 to 1000"));
        assert!(refused(draft().after(MAX_WAIT * 2)).contains("10 years"));
        assert!(refused(draft().header("h", "v".repeat(40_000))).contains("32768"));
        assert!(refused(Envelope::bytes("t", "image", *b"x")).contains("media type (byte 5)"));
        assert!(refused(Envelope::bytes("t", "a/".to_owned() + &"b".repeat(254), *b"x")).contains("255"));
        assert!(refused(Envelope::bytes("t", "a/b", [0; 65])).contains("64"));
        let large = Envelope::json("orders.placed", &"x".repeat(100)).expect("valid");
        assert!(refused(large).contains("64"));
    }
}
