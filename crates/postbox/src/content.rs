//! What a message carries: JSON text, or bytes with a content type.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

/// What a JSON payload's content type is.
pub const JSON_CONTENT_TYPE: &str = "application/json";

/// Bytes with their content type: a payload that is no JSON. As a handler's argument it takes any
/// payload; that of a JSON message is its text, as `application/json`. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct Bytes {
    bytes: Arc<[u8]>,
    content_type: Arc<str>,
}

impl Bytes {
    /// Bytes of a content type like `image/png`. It is checked when they are published.
    pub fn new(content_type: impl Into<Arc<str>>, bytes: impl Into<Arc<[u8]>>) -> Bytes {
        Bytes { bytes: bytes.into(), content_type: content_type.into() }
    }

    /// Their media type, as it was given.
    pub fn content_type(&self) -> &str {
        &self.content_type
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Says how many there are, not which.
impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({} of {:?})", self.bytes.len(), self.content_type)
    }
}

/// A message's payload.
///
/// As JSON it is one or two members: `payload`, or `data_base64` and `datacontenttype`, as a
/// CloudEvent has them.
#[derive(Debug, Clone)]
pub enum Content {
    /// JSON text, digit for digit as it was published.
    Json(Arc<RawValue>),
    /// Bytes with a content type.
    Bytes(Bytes),
}

impl Content {
    /// The payload as it is stored: the bytes, or those of the JSON text.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Content::Json(text) => text.get().as_bytes(),
            Content::Bytes(bytes) => bytes,
        }
    }

    /// The JSON text; none if the payload is bytes, whatever their content type is.
    pub fn json(&self) -> Option<&str> {
        match self {
            Content::Json(text) => Some(text.get()),
            Content::Bytes(_) => None,
        }
    }

    /// Its media type; `application/json` for JSON.
    pub fn content_type(&self) -> &str {
        match self {
            Content::Json(_) => JSON_CONTENT_TYPE,
            Content::Bytes(bytes) => bytes.content_type(),
        }
    }

    /// The bytes with their content type, if it is no JSON.
    pub(crate) fn typed(&self) -> Option<&Bytes> {
        match self {
            Content::Json(_) => None,
            Content::Bytes(bytes) => Some(bytes),
        }
    }

    /// From the columns of a store, of which either the first or the other two are there.
    pub(crate) fn stored(
        json: Option<String>,
        body: Option<Vec<u8>>,
        content_type: Option<String>,
    ) -> Result<Content, serde_json::Error> {
        match (json, body, content_type) {
            (None, Some(body), Some(content_type)) => Ok(Content::Bytes(Bytes::new(content_type, body))),
            (json, ..) => Ok(Content::Json(RawValue::from_string(json.unwrap_or_default())?.into())),
        }
    }
}

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Content::Json(text) => {
                let mut members = serializer.serialize_struct("Content", 1)?;
                members.serialize_field("payload", text)?;
                members.end()
            }
            Content::Bytes(bytes) => {
                let mut members = serializer.serialize_struct("Content", 2)?;
                members.serialize_field("datacontenttype", bytes.content_type())?;
                members.serialize_field("data_base64", &base64(bytes))?;
                members.end()
            }
        }
    }
}

/// As RFC 4648, section 4, writes it.
pub(crate) fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// A token's character (RFC 9110, section 5.6.2).
fn in_token(c: u8) -> bool {
    c.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&c)
}

/// Checks a media type, `type/subtype` with optional `; name=value` (RFC 9110, section 8.3.1); the
/// offset of the first byte that does not fit. The SQL function `check_message` has the same rule.
pub(crate) fn check_content_type(text: &str) -> Result<(), usize> {
    let bytes = text.as_bytes();
    let token = |from: usize| {
        let length = bytes[from..].iter().take_while(|c| in_token(**c)).count();
        if length > 0 { Ok(from + length) } else { Err(from) }
    };
    let sign = |at: usize, sign: u8| if bytes.get(at) == Some(&sign) { Ok(at + 1) } else { Err(at) };
    let spaces = |from: usize| from + bytes[from..].iter().take_while(|c| **c == b' ').count();

    let mut at = token(sign(token(0)?, b'/')?)?;
    while at < bytes.len() {
        at = spaces(sign(spaces(at), b';')?);
        at = sign(token(at)?, b'=')?;
        at = if bytes.get(at) == Some(&b'"') { quoted_end(bytes, at)? } else { token(at)? };
    }
    Ok(())
}

/// Walks over the quoted string that starts at `at`; the offset behind its closing quote.
fn quoted_end(bytes: &[u8], mut at: usize) -> Result<usize, usize> {
    loop {
        at += 1;
        match bytes.get(at) {
            Some(b'"') => return Ok(at + 1),
            Some(b'\\') => {
                at += 1;
                if !matches!(bytes.get(at), Some(b' '..=b'~')) {
                    return Err(at);
                }
            }
            Some(b' '..=b'~') => {}
            _ => return Err(at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_types() {
        for good in [
            "image/png",
            "application/vnd.api+json",
            "text/plain; charset=utf-8",
            "text/plain;charset=\"a \\\" b;\"  ;  x=y",
            "a/b",
        ] {
            assert_eq!(check_content_type(good), Ok(()), "{good}");
        }
        for (bad, at) in [
            ("", 0),
            ("/png", 0),
            ("image", 5),
            ("image/", 6),
            ("image /png", 5),
            ("image/png;", 10),
            ("image/png; q", 12),
            ("image/png; q=", 13),
            ("image/png; q=\"x", 15),
            ("image/png; q=\"x\\", 16),
            ("image/png x", 10),
            ("image/png\r\nx: y", 9),
            ("image/png; q=\"\n\"", 14),
            ("ima\u{e9}/png", 3),
            ("image/png ", 10),
        ] {
            assert_eq!(check_content_type(bad), Err(at), "{bad:?}");
        }
    }

    #[test]
    fn bytes_are_not_printed() {
        assert_eq!(format!("{:?}", Bytes::new("image/png", *b"secret")), "Bytes(6 of \"image/png\")");
    }

    #[test]
    fn as_members() {
        let text = |content: &Content| serde_json::to_string(content).expect("serializes");
        let bytes = Content::Bytes(Bytes::new("a/b", [0, 255]));
        assert_eq!(text(&bytes), r#"{"datacontenttype":"a/b","data_base64":"AP8="}"#);
        let json = Content::stored(Some("1.10".into()), None, None).expect("JSON");
        assert_eq!(text(&json), r#"{"payload":1.10}"#);
        assert_eq!((json.bytes(), json.content_type(), json.typed()), (&b"1.10"[..], JSON_CONTENT_TYPE, None));
        assert!(Content::stored(None, None, None).is_err());
    }
}
