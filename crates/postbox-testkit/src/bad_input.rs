//! One table of bad input, for every door.

use std::time::Duration;

/// What is said of an input, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Stored as it is.
    Taken,
    /// No topic.
    Topic,
    /// No JSON, or none that can be kept.
    Json,
    /// Above a limit of size.
    TooLarge,
    /// A name above 255 bytes.
    TooLong,
    /// Empty where something is needed.
    Empty,
    /// A number out of range.
    Range,
    /// No media type.
    ContentType,
}
use Verdict::*;

/// One input, and what is to be said of it.
#[derive(Debug, Clone)]
pub struct Input {
    /// In words.
    pub what: &'static str,
    /// Its topic.
    pub topic: String,
    /// Its payload, as text.
    pub payload: String,
    /// Bytes instead of it, with their content type.
    pub bytes: Option<(String, Vec<u8>)>,
    /// Its key.
    pub key: Option<String>,
    /// Its dedup key.
    pub dedup: Option<String>,
    /// Its producer's id.
    pub external_id: Option<String>,
    /// One header.
    pub header: Option<(String, String)>,
    /// Its delay.
    pub after: Option<Duration>,
    /// Its own limit of attempts.
    pub max_attempts: Option<i32>,
    /// What every door says.
    pub verdict: Verdict,
}

fn input(what: &'static str, verdict: Verdict) -> Input {
    Input {
        what,
        topic: "t".into(),
        payload: "{}".into(),
        bytes: None,
        key: None,
        dedup: None,
        external_id: None,
        header: None,
        after: None,
        max_attempts: None,
        verdict,
    }
}

fn topic(what: &'static str, topic: impl Into<String>, verdict: Verdict) -> Input {
    Input { topic: topic.into(), ..input(what, verdict) }
}

fn payload(what: &'static str, payload: impl Into<String>, verdict: Verdict) -> Input {
    Input { payload: payload.into(), ..input(what, verdict) }
}

fn bytes(what: &'static str, content_type: impl Into<String>, bytes: impl Into<Vec<u8>>, verdict: Verdict) -> Input {
    Input { bytes: Some((content_type.into(), bytes.into())), ..input(what, verdict) }
}

fn nested(levels: usize) -> String {
    format!("{}1{}", "[".repeat(levels), "]".repeat(levels))
}

/// The table.
pub fn table() -> Vec<Input> {
    vec![
        input("as it should be", Taken),
        topic("an empty topic", "", Topic),
        topic("an empty segment", "orders..placed", Topic),
        topic("a dot at the end", "orders.", Topic),
        topic("a space", "orders placed", Topic),
        topic("a wildcard", "orders.*", Topic),
        topic("a letter that is not ASCII", "ordérs", Topic),
        topic("a line break", "orders\nplaced", Topic),
        topic("255 bytes of topic", "x".repeat(255), Taken),
        topic("256 bytes of topic", "x".repeat(256), Topic),
        payload("no JSON", "{", Json),
        payload("two values", "1 2", Json),
        payload("nothing", "", Json),
        payload("\\u0000", r#"{"a":"\u0000"}"#, Json),
        payload("\\u0000 in a name", r#"{"\u0000":1}"#, Json),
        payload("an escaped backslash before u0000", r#""\\u0000""#, Taken),
        payload("a lone high surrogate", r#""\ud800x""#, Json),
        payload("a lone low surrogate", r#""\udc00""#, Json),
        payload("a surrogate pair", r#""\ud83d\ude00""#, Taken),
        payload("128 levels", nested(128), Taken),
        payload("129 levels", nested(129), Json),
        payload("many brackets, shallow", format!("[{}[]]", "[],".repeat(300)), Taken),
        payload("an integer above 2^53", "9007199254740993", Taken),
        payload("an integer above 2^64", "123456789012345678901234567890", Taken),
        payload("a number beyond numeric", "1e200000", Json),
        payload("a fraction beyond numeric", "1e-20000", Json),
        payload("a payload at the limit", format!("\"{}\"", "x".repeat((1 << 20) - 2)), Taken),
        payload("a payload above the limit", format!("\"{}\"", "x".repeat((1 << 20) - 1)), TooLarge),
        payload("script", r#""<script>alert(1)</script>""#, Taken),
        bytes("bytes", "image/png", b"\x89PNG\r\n\x1a\n\0\xff\\\"{}".as_slice(), Taken),
        bytes("no bytes at all", "image/png", [], Taken),
        bytes("bytes that are no JSON", "application/json", b"{".as_slice(), Taken),
        bytes("parameters", "text/plain; charset=utf-8;x=\"a \\\" [b]^~\"", b"x".as_slice(), Taken),
        bytes("255 bytes of content type", format!("a/{}", "b".repeat(253)), b"x".as_slice(), Taken),
        bytes("256 bytes of content type", format!("a/{}", "b".repeat(254)), b"x".as_slice(), TooLong),
        bytes("no content type", "", b"x".as_slice(), ContentType),
        bytes("no subtype", "image", b"x".as_slice(), ContentType),
        bytes("a space in a content type", "image /png", b"x".as_slice(), ContentType),
        bytes("a line break in a content type", "image/png\r\nx: y", b"x".as_slice(), ContentType),
        bytes("a line break at the end of a content type", "image/png\n", b"x".as_slice(), ContentType),
        bytes("a line break in quotes", "a/b; q=\"\n\"", b"x".as_slice(), ContentType),
        bytes("a parameter without a value", "text/plain; charset", b"x".as_slice(), ContentType),
        bytes("an open quote", "text/plain; charset=\"utf-8", b"x".as_slice(), ContentType),
        bytes("an escape at the end of quotes", "text/plain; charset=\"\\\"", b"x".as_slice(), ContentType),
        bytes("a content type that is not ASCII", "im\u{e9}ge/png", b"x".as_slice(), ContentType),
        bytes("bytes at the limit", "a/b", vec![0; 1 << 20], Taken),
        bytes("bytes above the limit", "a/b", vec![0; (1 << 20) + 1], TooLarge),
        Input { key: Some("k".repeat(255)), ..input("255 bytes of key", Taken) },
        Input { key: Some("k".repeat(256)), ..input("256 bytes of key", TooLong) },
        Input { key: Some(String::new()), ..input("an empty key is no key", Taken) },
        Input { dedup: Some("d".repeat(256)), ..input("256 bytes of dedup key", TooLong) },
        Input { dedup: Some(String::new()), ..input("an empty dedup key", Empty) },
        Input { external_id: Some("e".repeat(256)), ..input("256 bytes of external id", TooLong) },
        Input { header: Some(("h".into(), "v".into())), ..input("a header", Taken) },
        Input { header: Some((String::new(), "v".into())), ..input("a header without a name", Empty) },
        Input { header: Some(("h".repeat(256), "v".into())), ..input("256 bytes of header name", TooLong) },
        Input { header: Some(("h".into(), "v".repeat(40_000))), ..input("40000 bytes of headers", TooLarge) },
        Input { after: Some(Duration::from_secs(400 * 366 * 86_400)), ..input("400 years", Range) },
        Input { max_attempts: Some(0), ..input("no attempts", Range) },
        Input { max_attempts: Some(1001), ..input("1001 attempts", Range) },
    ]
}

/// The verdict that an error's words tell, for doors that have only words.
pub fn verdict_of_words(words: &str) -> Option<Verdict> {
    let says = |part: &str| words.contains(part);
    if says("topic") && !says("is no message") {
        Some(Topic)
    } else if says("no media type") {
        Some(ContentType)
    } else if says("cannot be stored") || says("is no message") {
        Some(Json)
    } else if says("limit is 1048576") || says("limit is 32768") {
        Some(TooLarge)
    } else if says("the limit is 255") {
        Some(TooLong)
    } else if says("must not be empty") {
        Some(Empty)
    } else {
        None
    }
}
