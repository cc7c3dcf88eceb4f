//! What must hold for any input, one function a parser. The fuzz targets call these with what the
//! fuzzer finds; `tests/fuzz_corpus.rs` with the corpus, in every test run.

use std::time::Duration;

use postbox::admin::Filter;
use postbox::sink::{Encoded, EnvelopeStyle};
use postbox::source::{Format, Mapping, Raw};
use postbox::{Envelope, Pattern, fuzzing};

#[allow(unreachable_pub, dead_code, reason = "the command's own file")]
#[path = "../../crates/postbox-cli/src/commands/jsonl_line.rs"]
mod jsonl_line;

fn text(data: &[u8]) -> Option<&str> {
    std::str::from_utf8(data).ok()
}

/// A pattern, and after a line end a topic.
pub fn pattern(data: &[u8]) {
    let Some(text) = text(data) else { return };
    let (written, topic) = text.split_once('\n').unwrap_or((text, text));
    let is_topic = postbox::check_topic(topic).is_ok();
    let pattern = match written.parse::<Pattern>() {
        Ok(pattern) => pattern,
        Err(error) => {
            // Shown to people as it is.
            assert!(!error.to_string().chars().any(char::is_control), "{error:?}");
            return;
        }
    };
    assert_eq!(pattern.as_str(), written);
    assert_eq!(pattern.to_string().parse::<Pattern>().as_ref(), Ok(&pattern));
    assert!(written.len() <= postbox::MAX_NAME_BYTES);
    if postbox::check_topic(written).is_ok() {
        assert!(pattern.matches(written), "a topic matches itself");
    }
    if is_topic {
        let regex = regex::Regex::new(&fuzzing::regex(&pattern)).expect("a regular expression");
        assert_eq!(pattern.matches(topic), regex.is_match(topic), "{written} and {topic}, in Rust and in SQL");
    }
}

/// A line of `publish --jsonl`; as a whole it is also a payload.
pub fn envelope(data: &[u8]) {
    let day = Duration::from_secs(86_400);
    match jsonl_line::draft(data, day) {
        Ok(Some(draft)) => published(draft),
        Ok(None) => assert!(text(data).is_some_and(|t| t.trim().is_empty())),
        Err(error) => drop(error.to_string()),
    }
    let Some(text) = text(data) else { return };
    if let Ok(draft) = Envelope::raw("t", text) {
        published(draft);
    }
    let (key, rest) = text.split_once('\n').unwrap_or((text, ""));
    if let Ok(draft) = Envelope::json(key, &rest) {
        published(draft.key(key).dedup(rest).header(key, rest).source(rest).external_id(key).correlation_id(rest));
    }
}

/// What may be published is one JSON object, as it is and as a CloudEvent, with the payload as it came.
fn published(draft: postbox::Draft) {
    match fuzzing::envelope(draft) {
        Ok(envelope) => {
            use base64::Engine;
            // Bytes travel as base64, beside what they are.
            let (field, data, expected) = match envelope.payload_json() {
                Some(json) => ("payload", "data", json.to_owned()),
                None => {
                    let text = base64::engine::general_purpose::STANDARD.encode(envelope.payload_bytes());
                    ("data_base64", "data_base64", format!("\"{text}\""))
                }
            };
            assert!(postbox::check_topic(&envelope.topic).is_ok());
            for (json, field) in [(envelope.to_json(), field), (envelope.to_cloudevent(), data)] {
                let mut parser = serde_json::Deserializer::from_str(&json);
                parser.disable_recursion_limit();
                let read: std::collections::BTreeMap<String, Box<serde_json::value::RawValue>> =
                    serde::Deserialize::deserialize(&mut parser).expect("one object");
                parser.end().expect("and nothing after it");
                assert_eq!(read.get(field).map(|p| p.get()), Some(&*expected), "digit for digit");
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// A filter, as it is typed.
pub fn filter(data: &[u8]) {
    let Some(text) = text(data) else { return };
    let filter: Filter = match text.parse() {
        Ok(filter) => filter,
        Err(error) => return drop(error.to_string()),
    };
    let mut words = Vec::new();
    let mut word = |field: &str, values: Vec<String>| {
        if !values.is_empty() {
            words.push(format!("{field}:{}", values.join(",")));
        }
    };
    word("state", filter.states.iter().map(|s| s.to_string()).collect());
    word("topic", filter.topics.iter().map(|t| t.to_string()).collect());
    word("subscription", filter.subscriptions.clone());
    word("key", filter.keys.clone());
    let again: Filter = words.join(" ").parse().expect("what it says is a filter");
    assert_eq!(
        (&again.states, &again.topics, &again.subscriptions, &again.keys),
        (&filter.states, &filter.topics, &filter.subscriptions, &filter.keys)
    );
}

/// A settings file; after a NUL, variables, one a line.
pub fn settings(data: &[u8]) {
    let Some(text) = text(data) else { return };
    let (toml, environment) = text.split_once('\0').unwrap_or((text, ""));
    let variable = |name: &str| {
        let lines = environment.lines().filter_map(|line| line.split_once('='));
        lines.filter(|(n, _)| *n == name).map(|(_, value)| value.to_owned()).next_back()
    };
    let settings = match fuzzing::settings(toml, variable) {
        Ok(settings) => settings,
        Err(error) => return drop(error.to_string()),
    };
    let shown = settings.shown();
    assert_eq!(shown.len(), postbox::SETTINGS.len());
    for (name, value, origin) in shown {
        assert!(name != "password" || value.is_empty() || value == "***");
        assert!(!origin.is_empty());
    }
    settings.backend().ok();
    settings.postgres().ok();
    for error in [
        settings.application().err(),
        settings.schema().err(),
        settings.channel().err(),
        settings.concurrency().err(),
        settings.poll_interval().err(),
        settings.lease().err(),
        settings.max_payload_bytes().err(),
        settings.wake_ups().err(),
        settings.prepared_statements().err(),
        settings.pool_size().err(),
        settings.busy_timeout().err(),
        settings.keeps().err(),
        settings.keep_unrouted().err(),
    ]
    .into_iter()
    .flatten()
    {
        let words = error.to_string();
        assert!(words.contains("the setting `"), "it names the setting: {words}");
        assert!(!words.chars().any(char::is_control), "{words:?}");
    }
}

/// An entry of a source: fields, one `name=value` a line; after an empty line, a body.
pub fn entry(data: &[u8]) {
    let cut = data.windows(2).position(|two| two == b"\n\n");
    let (head, body) = match cut {
        Some(at) => (&data[..at], Some(data[at + 2..].to_vec())),
        None => (data, None),
    };
    let field = |line: &[u8]| {
        let at = line.iter().position(|byte| *byte == b'=')?;
        Some((line[..at].to_vec(), line[at + 1..].to_vec()))
    };
    let raw = Raw { fields: head.split(|byte| *byte == b'\n').filter_map(field).collect(), body };
    let mapping = Mapping::new().topic("a.{field:x}.{payload:b.0}").key("{payload:k}").time("{payload:t}");
    for format in [Format::default().times_without_offset_are_utc(), Format::mapped(mapping)] {
        let read = match format.read(&raw, "source", "position") {
            Ok(read) => read,
            Err(why) => {
                assert!(!why.is_empty() && !why.chars().any(char::is_control), "shown to people as it is: {why:?}");
                continue;
            }
        };
        assert!(!read.identity.is_empty() && read.identity.len() <= 1024);
        let Ok(sent) = fuzzing::envelope(read.draft) else {
            panic!("what was read may be published");
        };
        // What a relay makes of it is read again, and is the same.
        let encoded = Encoded::new(&sent, EnvelopeStyle::CloudEventsStructured, None);
        let fields = encoded.fields().map(|(name, value)| (name.into_bytes(), value.to_vec())).collect();
        let again =
            Format::default().read(&Raw { fields, body: None }, "other", "elsewhere").expect("it is a CloudEvent");
        let again = fuzzing::envelope(again.draft).expect("it may be published");
        assert_eq!(
            (again.topic, again.key, again.occurred_at),
            (sent.topic.clone(), sent.key.clone(), sent.occurred_at)
        );
        assert_eq!(again.payload.bytes(), sent.payload.bytes());
    }
}
