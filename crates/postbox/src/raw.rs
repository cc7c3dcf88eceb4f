//! What a source has read, before anybody understood it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

/// What was read, as it was read. It is kept like this, byte for byte, if it cannot become a message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Raw {
    /// Names and values beside the body: headers, or the fields of an entry that has no body.
    pub fields: Vec<(Vec<u8>, Vec<u8>)>,
    /// The body, where the broker has such a thing.
    pub body: Option<Vec<u8>>,
}

impl Raw {
    /// The first field of this name, in any case.
    pub fn field(&self, name: &str) -> Option<&[u8]> {
        let found = self.fields.iter().find(|(n, _)| n.eq_ignore_ascii_case(name.as_bytes()));
        found.map(|(_, value)| value.as_slice())
    }

    /// The fields as JSON: pairs of a name and a value, each a text, or `{"base64": …}` if it is none, or holds
    /// a character that PostgreSQL cannot keep.
    pub(crate) fn fields_json(&self) -> Value {
        let spelled = |bytes: &[u8]| match std::str::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => json!(text),
            _ => json!({ "base64": STANDARD.encode(bytes) }),
        };
        self.fields.iter().map(|(name, value)| json!([spelled(name), spelled(value)])).collect()
    }

    /// What was stored; `None` if these are no such fields.
    pub(crate) fn stored(fields: Option<&str>, body: Option<Vec<u8>>) -> Option<Raw> {
        let read = |value: &Value| match value {
            Value::String(text) => Some(text.clone().into_bytes()),
            Value::Object(_) => STANDARD.decode(value.get("base64")?.as_str()?).ok(),
            _ => None,
        };
        let fields = match fields {
            Some(json) => serde_json::from_str::<Vec<(Value, Value)>>(json)
                .ok()?
                .iter()
                .map(|(name, value)| Some((read(name)?, read(value)?)))
                .collect::<Option<_>>()?,
            None => Vec::new(),
        };
        Some(Raw { fields, body })
    }
}

#[cfg(test)]
mod tests {
    use super::Raw;

    #[test]
    fn any_bytes_come_back() {
        let raw = Raw {
            fields: vec![
                (b"data".to_vec(), "{\"a\": \"\u{e9}\"}".as_bytes().to_vec()),
                (vec![0xff, 0], vec![0xc3, 0x28]),
                (b"nul".to_vec(), b"a\0b".to_vec()),
                (Vec::new(), Vec::new()),
            ],
            body: Some(vec![0, 255]),
        };
        let json = raw.fields_json().to_string();
        assert!(!json.contains("\\u0000"), "{json}");
        assert_eq!(Raw::stored(Some(&json), raw.body.clone()), Some(raw));
        assert_eq!(Raw::stored(Some("[[1, \"x\"]]"), None), None);
        assert_eq!(Raw::stored(None, None), Some(Raw::default()));
    }

    #[test]
    fn names_are_found_in_any_case() {
        let raw = Raw { fields: vec![(b"CE-Id".to_vec(), b"7".to_vec())], body: None };
        assert_eq!(raw.field("ce-id"), Some(&b"7"[..]));
        assert_eq!(raw.field("ce"), None);
    }
}
