//! What dedup compares: the key and the payload, however its JSON is spelled.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use crate::content::{Bytes, Content};

/// A hash of a key and a checked payload.
pub(crate) fn hash(key: Option<&str>, payload: &Content) -> [u8; 32] {
    match payload {
        Content::Json(text) => hash_json(key, text.get()),
        Content::Bytes(bytes) => hash_bytes(key, bytes),
    }
}

/// A hash of a key and bytes. They are told apart from JSON, and the key and the content type from each
/// other, by zero bytes, which a text cannot have.
fn hash_bytes(key: Option<&str>, bytes: &Bytes) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for text in [key.unwrap_or_default(), bytes.content_type()] {
        hasher.update([0]);
        hasher.update(text);
    }
    hasher.update([0]);
    hasher.update(bytes);
    hasher.finalize().into()
}

/// A hash of a key and a checked JSON text. Spaces, the order of an object's names and the escapes
/// of its strings do not count; numbers count digit by digit.
fn hash_json(key: Option<&str>, payload: &str) -> [u8; 32] {
    let mut canonical = String::with_capacity(payload.len());
    value(payload, 0, &mut canonical);
    let mut hasher = Sha256::new();
    hasher.update(key.unwrap_or_default());
    hasher.update("\n");
    hasher.update(canonical);
    hasher.finalize().into()
}

fn byte(text: &str, at: usize) -> u8 {
    text.as_bytes().get(at).copied().unwrap_or(0)
}

fn skip_space(text: &str, mut at: usize) -> usize {
    while matches!(byte(text, at), b' ' | b'\t' | b'\n' | b'\r') {
        at += 1;
    }
    at
}

/// Writes the value that starts at `at`; the offset behind it. The text is valid JSON, at most 128
/// levels deep; anything else would end early, not panic.
fn value(text: &str, at: usize, out: &mut String) -> usize {
    let at = skip_space(text, at);
    match byte(text, at) {
        b'{' => object(text, at + 1, out),
        b'[' => array(text, at + 1, out),
        b'"' => string(text, at, out),
        _ => {
            let rest = &text[at.min(text.len())..];
            let end = rest.find([',', ']', '}', ' ', '\t', '\n', '\r']).unwrap_or(rest.len());
            out.push_str(&rest[..end]);
            at + end
        }
    }
}

fn array(text: &str, mut at: usize, out: &mut String) -> usize {
    out.push('[');
    loop {
        at = skip_space(text, at);
        match byte(text, at) {
            b']' | 0 => break,
            b',' => {
                out.push(',');
                at += 1;
            }
            _ => at = value(text, at, out),
        }
    }
    out.push(']');
    at + 1
}

fn object(text: &str, mut at: usize, out: &mut String) -> usize {
    // The last of several equal names counts, as for readers and in PostgreSQL.
    let mut members = BTreeMap::new();
    loop {
        at = skip_space(text, at);
        match byte(text, at) {
            b'}' | 0 => break,
            b',' => at += 1,
            _ => {
                let (mut name, mut content) = (String::new(), String::new());
                at = skip_space(text, string(text, at, &mut name));
                at = value(text, at + 1, &mut content);
                members.insert(name, content);
            }
        }
    }
    out.push('{');
    for (i, (name, content)) in members.iter().enumerate() {
        if i > 0 {
            out.push(',');
        }
        out.push_str(name);
        out.push(':');
        out.push_str(content);
    }
    out.push('}');
    at + 1
}

/// Writes a string with the escapes that `serde_json` would choose.
fn string(text: &str, at: usize, out: &mut String) -> usize {
    let mut end = at + 1;
    loop {
        match byte(text, end) {
            b'\\' => end += 2,
            b'"' => {
                end += 1;
                break;
            }
            0 if end >= text.len() => {
                end = text.len();
                break;
            }
            _ => end += 1,
        }
    }
    let spelled = text.get(at..end).unwrap_or_default();
    match serde_json::from_str::<String>(spelled) {
        Ok(plain) => out.push_str(&serde_json::Value::String(plain).to_string()),
        Err(_) => out.push_str(spelled),
    }
    end
}

#[cfg(test)]
mod tests {
    use super::{hash_bytes, hash_json as hash};
    use crate::content::Bytes;

    #[test]
    fn spelling_does_not_count_and_digits_do() {
        let same = |a, b| hash(None, a) == hash(None, b);
        assert!(same(r#"{"b": [1, 2 ], "a": "é\/x"}"#, "{\"a\":\"\\u00e9/x\",\n\t\"b\":[1,2]}"));
        assert!(same(r#"{"a":1,"a":2}"#, r#"{"a":2}"#));
        assert!(same(r#" {"a":{"c":null,"b":true}} "#, r#"{"a":{"b":true,"c":null}}"#));
        assert!(same("[ ]", "[]") && same("{ }", "{}") && same(" 7 ", "7"));
        assert!(!same("12345678901234567890123", "12345678901234567890124"));
        assert!(!same(r#"["a","b"]"#, r#"["a,b"]"#) && !same(r#"{"a":"}"}"#, r#"{"a":"]"}"#));
        assert!(!same(r#""\\""#, r#""\"""#) && !same("[[]]", "[]"));
        assert_ne!(hash(Some("k"), "1"), hash(None, "1"));
    }

    #[test]
    fn each_part_of_bytes_counts() {
        let of = |key, content_type: &str, bytes: &[u8]| hash_bytes(key, &Bytes::new(content_type, bytes));
        let one = of(Some("k"), "a/b", b"1");
        for other in
            [of(None, "a/b", b"1"), of(Some("k"), "a/c", b"1"), of(Some("k"), "a/b", b"2"), hash(Some("k"), "1")]
        {
            assert_ne!(one, other);
        }
    }

    #[test]
    fn deep_and_broken_texts_come_to_an_end() {
        let deep = format!("{}{}", "[".repeat(128), "]".repeat(128));
        assert_eq!(hash(None, &deep), hash(None, &deep.replace('[', "[ ")));
        for broken in ["", "{", "[1,", "\"a", "{\"a\"", "{\"a\":", "\"\\", "{x}"] {
            hash(None, broken);
        }
    }
}
