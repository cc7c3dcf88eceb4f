use proptest::prelude::*;

use super::*;
use crate::content::Content;

fn entry(fields: &[(&str, &str)]) -> Raw {
    let fields = fields.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect();
    Raw { fields, body: None }
}

fn request(headers: &[(&str, &str)], body: &str) -> Raw {
    Raw { body: Some(body.as_bytes().to_vec()), ..entry(headers) }
}

fn read(raw: &Raw) -> Incoming {
    Format::default().read(raw, "payments", "payments/1-0").unwrap_or_else(|why| panic!("{why}: {raw:?}"))
}

fn refused(raw: &Raw) -> String {
    let why = Format::default().read(raw, "payments", "payments/1-0").expect_err("malformed");
    assert!(!why.chars().any(char::is_control), "{why:?}");
    why
}

fn json(incoming: &Incoming) -> &str {
    incoming.draft.payload.json().expect("JSON")
}

fn header<'a>(incoming: &'a Incoming, name: &str) -> Option<&'a str> {
    incoming.draft.headers.get(name).map(String::as_str)
}

#[test]
fn json_in_one_field() {
    let read = read(&entry(&[(
        "data",
        r#"{"event_id":"e1","event_type":"orders.placed","aggregate_id":42,"correlation_id":"c","causation_id":null,
            "occurred_on":"2026-11-28T12:00:00+00:00","max_retries":3,"version":2,"payload":{"n": 1.10}}"#,
    )]));
    assert_eq!(
        (read.identity.as_str(), read.by_position, read.draft.topic(), json(&read)),
        ("e1", false, "orders.placed", r#"{"n": 1.10}"#)
    );
    let draft = &read.draft;
    assert_eq!(draft.external_id.as_deref(), Some("e1"));
    assert_eq!(draft.key.as_deref(), Some("42"));
    assert_eq!((draft.correlation_id.as_deref(), draft.causation_id.as_deref()), (Some("c"), None));
    assert_eq!(draft.occurred_at.expect("a time").to_string(), "2026-11-28T12:00:00Z");
    assert_eq!(draft.max_attempts, Some(4), "three retries come after the first attempt");
    assert_eq!(draft.source.as_deref(), Some("payments"));
    assert_eq!(header(&read, "postbox-position"), Some("payments/1-0"));
    assert_eq!(header(&read, "postbox-id-from"), None);
    assert_eq!(header(&read, "version"), Some("2"), "what is beside the payload is kept");
}

#[test]
fn without_a_payload_it_is_what_is_left() {
    let object = read(&request(&[], r#"{"event_id":"e","total":1.0,"event_type":"t","deep":{"a":[1]}}"#));
    assert_eq!(json(&object), r#"{"total":1.0,"deep":{"a":[1]}}"#);
    let fields = read(&entry(&[("event_id", "e"), ("event_type", "t"), ("total", "9"), ("traceparent", "00-1")]));
    assert_eq!((json(&fields), header(&fields, "traceparent")), (r#"{"total":"9"}"#, Some("00-1")));
}

#[test]
fn flattened_fields() {
    let read = read(&entry(&[
        ("event_id", "e1"),
        ("event_type", "orders.placed"),
        ("aggregate_id", ""),
        ("occurred_on", "2026-11-28T13:00:00.5+01:00"),
        ("payload", r#"{"n":9007199254740993}"#),
        ("max_retries", "0"),
        ("tenant", "acme"),
        ("Postbox-Position", "forged"),
    ]));
    assert_eq!((read.identity.as_str(), json(&read)), ("e1", r#"{"n":9007199254740993}"#));
    assert_eq!((read.draft.key.as_deref(), read.draft.max_attempts), (None, Some(1)));
    assert_eq!(read.draft.occurred_at.expect("a time").to_string(), "2026-11-28T12:00:00.5Z");
    assert_eq!((header(&read, "tenant"), header(&read, "Postbox-Position")), (Some("acme"), None));
    assert_eq!(header(&read, "postbox-position"), Some("payments/1-0"));
}

#[test]
fn cloudevents_in_structured_mode() {
    let event = r#"{"specversion":"1.0","id":"1","source":"/shop","type":"orders.placed","time":"2026-11-28T12:00:00Z",
        "partitionkey":"k","correlationid":"c","causationid":"z","traceparent":"00-ab","subject":"s","flag":true,"gone":null,
        "data":{"n": 1.10}}"#;
    for raw in
        [entry(&[("data", event)]), request(&[("Content-Type", "application/cloudevents+json; charset=utf-8")], event)]
    {
        let read = read(&raw);
        assert_eq!(
            (read.identity.as_str(), read.draft.topic(), json(&read)),
            ("/shop 1", "orders.placed", r#"{"n": 1.10}"#)
        );
        let draft = &read.draft;
        assert_eq!((draft.external_id.as_deref(), draft.source.as_deref()), (Some("1"), Some("/shop")));
        assert_eq!(
            (draft.key.as_deref(), draft.correlation_id.as_deref(), draft.causation_id.as_deref()),
            (Some("k"), Some("c"), Some("z"))
        );
        assert_eq!(
            (header(&read, "traceparent"), header(&read, "subject"), header(&read, "flag"), header(&read, "gone")),
            (Some("00-ab"), Some("s"), Some("true"), None)
        );
    }
}

#[test]
fn cloudevents_in_binary_mode() {
    for prefix in ["ce-", "ce_", "cloudEvents:", "cloudEvents_"] {
        let named = |name: &str| format!("{prefix}{name}");
        let [version, id, source, kind, extension] = ["specversion", "id", "source", "type", "tenant"].map(named);
        let mut raw = entry(&[
            (&version, "1.0"),
            (&id, "a b"),
            (&source, "/s"),
            (&kind, "t"),
            (&extension, "x"),
            ("content-type", "application/json"),
            ("data", " [1]"),
            ("other", "o"),
        ]);
        let read = read(&raw);
        assert_eq!((read.identity.as_str(), json(&read)), ("/s a b", "[1]"), "{prefix}");
        assert_eq!(
            (header(&read, "tenant"), header(&read, "other"), header(&read, "content-type")),
            (Some("x"), Some("o"), None)
        );
        // Of a request only what is the message's is taken.
        raw.body = Some(b"\x89PNG".to_vec());
        raw.fields.retain(|(name, _)| name != b"content-type");
        raw.fields
            .extend([(b"Content-Type".to_vec(), b"image/png".to_vec()), (b"TraceParent".to_vec(), b"00-1".to_vec())]);
        let read = self::read(&raw);
        let Content::Bytes(bytes) = &read.draft.payload else { panic!("bytes") };
        assert_eq!((&bytes[..], bytes.content_type()), (&b"\x89PNG"[..], "image/png"));
        assert_eq!((header(&read, "other"), header(&read, "traceparent")), (None, Some("00-1")));
    }
    let nothing = entry(&[("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "s"), ("ce-type", "t")]);
    assert_eq!(json(&read(&nothing)), "null", "an event may have no data");
}

#[test]
fn values_of_http_headers_are_decoded() {
    let event =
        |id: &str| request(&[("ce-specversion", "1.0"), ("ce-id", id), ("ce-source", "s"), ("ce-type", "t")], "1");
    for (sent, meant) in [
        ("Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),
        ("100%", "100%"),
        ("%zz%2", "%zz%2"),
        ("%2525", "%25"),
        (r#""a \"b\" %41""#, r#"a "b" A"#),
        ("\"", "\""),
    ] {
        assert_eq!(read(&event(sent)).draft.external_id.as_deref(), Some(meant), "{sent}");
    }
    assert!(refused(&event("%ff")).contains("`ce-id` is not UTF-8"));
    // A broker's fields are texts as they are.
    let raw = Raw { body: None, ..event("%41") };
    assert_eq!(read(&raw).draft.external_id.as_deref(), Some("%41"));
}

#[test]
fn source_and_id_are_the_identity_together() {
    let event = |source: &str, id: &str| {
        read(&entry(&[("ce-specversion", "1.0"), ("ce-id", id), ("ce-source", source), ("ce-type", "t")])).identity
    };
    assert_ne!(event("a b", "c"), event("a", "b c"));
    assert_ne!(event("a b", "c"), event("a%20b", "c"));
    let longest = event(&" ".repeat(255), &"x".repeat(255));
    assert!(longest.len() <= 1024, "{}", longest.len());
}

#[test]
fn content_of_any_type() {
    let event = |data: &str| {
        let text = format!(r#"{{"specversion":"1.0","id":"1","source":"s","type":"t",{data}}}"#);
        read(&entry(&[("data", &text)])).draft.payload
    };
    let text = event(r#""datacontenttype":"text/plain","data":"é\n""#);
    assert_eq!((text.bytes(), text.content_type()), ("é\n".as_bytes(), "text/plain"));
    let bytes = event(r#""datacontenttype":"image/png","data_base64":"AP8=""#);
    assert_eq!((bytes.bytes(), bytes.content_type()), (&[0, 255][..], "image/png"));
    assert_eq!(event(r#""datacontenttype":"application/vnd.a+json","data":{"a":1}"#).json(), Some(r#"{"a":1}"#));
    assert_eq!(event(r#""data_base64":"AA==""#).content_type(), "application/octet-stream");
    assert_eq!(event(r#""datacontenttype":"application/json","data_base64":"MQ==""#).json(), Some("1"));
    assert_eq!(event(r#""subject":"x""#).json(), Some("null"));
}

#[test]
fn standard_webhooks() {
    let body = r#"{"type":"contact.created","timestamp":"2026-11-28T12:00:00Z","data":{"id":1}}"#;
    let read = read(&request(&[("webhook-id", "msg_1"), ("authorization", "secret")], body));
    assert_eq!((read.identity.as_str(), read.draft.topic(), json(&read)), ("msg_1", "contact.created", body));
    assert!(read.draft.occurred_at.is_some() && header(&read, "authorization").is_none());
}

#[test]
fn what_is_malformed_is_said_in_words() {
    let deep = format!(r#"{{"event_id":"e","event_type":"t","payload":{}{}}}"#, "[".repeat(129), "]".repeat(129));
    let event = |members: &str| {
        entry(&[("data", &format!(r#"{{"specversion":"1.0","id":"1","source":"s","type":"t"{members}}}"#))])
    };
    let flat = |members: &str| entry(&[("data", &format!(r#"{{"event_id":"e","event_type":"t"{members}}}"#))]);
    let bad_utf8 = Raw { fields: vec![(b"data".to_vec(), b"{\"a\":\"\xff\"}".to_vec())], body: None };
    for (raw, why) in [
        (bad_utf8, "the field `data` is not UTF-8 (byte 6)"),
        (
            Raw { fields: vec![(b"event_id".to_vec(), b"\xff".to_vec())], body: None },
            "the field `event_id` is not UTF-8 (byte 0)",
        ),
        (
            Raw {
                fields: vec![
                    (b"event_id".to_vec(), b"1".to_vec()),
                    (b"event_type".to_vec(), b"t".to_vec()),
                    (b"a\xff".to_vec(), b"".to_vec()),
                    (b"payload".to_vec(), b"1".to_vec()),
                ],
                body: None,
            },
            "the name of the field `a\u{fffd}` is not UTF-8 (byte 1)",
        ),
        (
            request(&[], "{\"a\":1,\n \"b\":}"),
            "the body is not valid JSON: what stands at byte 13 does not belong there: `}`",
        ),
        (request(&[], ""), "the body is not valid JSON: it is empty"),
        (request(&[], "[1]"), "is no JSON object"),
        (request(&[], r#"{"a":1}"#), "of no known format"),
        (entry(&[("a", "1"), ("b\n", "2")]), "its fields: `a`, `b\\n`"),
        (entry(&[]), "its fields: none"),
        (entry(&[("event_type", "t"), ("payload", "1")]), "no `event_id`"),
        (entry(&[("event_id", "1"), ("payload", "1")]), "no `event_type`"),
        (entry(&[("event_id", ""), ("event_type", "t")]), "no `event_id`"),
        (
            entry(&[("event_id", "1"), ("event_type", "t"), ("payload", "{")]),
            "the field `payload` is not valid JSON: it ends at byte 1, before it is complete",
        ),
        (entry(&[("event_id", "1"), ("event_type", "a b"), ("payload", "1")]), "the topic `a b` has the character ' '"),
        (entry(&[("event_id", "1"), ("event_type", "t"), ("max_retries", "many")]), "`max_retries` is no whole number"),
        (entry(&[("event_id", "1"), ("event_type", "t"), ("max_retries", "1000")]), "from 0 to 999"),
        (
            entry(&[("event_id", "1"), ("event_type", "t"), ("occurred_on", "yesterday")]),
            "`occurred_on` is `yesterday`, which is no date",
        ),
        (
            entry(&[("event_id", "1"), ("event_type", "t"), ("occurred_on", "2026-11-28T12:00:00")]),
            "no offset from UTC",
        ),
        (entry(&[("event_id", &"e".repeat(256)), ("event_type", "t")]), "the external id is 256 bytes long"),
        (entry(&[("event_id", "1"), ("event_type", "t"), ("aggregate_id", &"k".repeat(256))]), "the key is 256 bytes"),
        (
            entry(&[("event_id", "1"), ("event_type", "t"), ("payload", "1"), ("h", &"v".repeat(40_000))]),
            "the headers are",
        ),
        (
            entry(&[("data", r#"{"event_id":1.5,"event_type":"t"}"#)]),
            "`event_id` is a number that is not whole; it must be a text",
        ),
        (entry(&[("data", r#"{"event_id":true,"event_type":"t"}"#)]), "`event_id` is true or false"),
        (entry(&[("data", r#"{"event_id":{"a":1},"event_type":"t"}"#)]), "`event_id` is an object"),
        (entry(&[("data", r#"{"event_id":null,"event_type":"t"}"#)]), "no `event_id`"),
        (entry(&[("data", r#"{"event_id":"a","event_id":"b","event_type":"t"}"#)]), "`event_id` is there twice"),
        (flat(r#","occurred_on":1700000000"#), "`occurred_on` is `1700000000`; it must be a text"),
        (flat(r#","payload":"\u0000""#), "\\u0000 at byte"),
        (entry(&[("data", &deep)]), "deeper than 128"),
        (entry(&[("data", &"[".repeat(100_000))]), "deeper than 128"),
        (event(r#","time":"2026-13-01T00:00:00Z""#), "`time` is `2026-13-01T00:00:00Z`, which is no date"),
        (event(r#","data":1,"data_base64":"""#), "one of them"),
        (event(r#","data_base64":"*""#), "no base64"),
        (event(r#","data_base64":1e3"#), "no base64"),
        (event(r#","data_base64":[]"#), "`data_base64` is no text"),
        (event(r#","datacontenttype":"text/plain","data":{}"#), "`data` is no text"),
        (event(r#","datacontenttype":"nonsense","data":"x""#), "no media type"),
        (event(r#","tenant":{"a":1}"#), "the attribute `tenant` is an object"),
        (event(r#","tenant":"a","tenant":"b""#), "`tenant` is there twice"),
        (entry(&[("data", r#"{"specversion":"0.3","id":"1","source":"s","type":"t"}"#)]), "version `0.3`; only 1.0"),
        (entry(&[("ce-id", "1"), ("ce-source", "s"), ("ce-type", "t")]), "has no `specversion`"),
        (entry(&[("ce-specversion", "1.0"), ("ce-source", "s"), ("ce-type", "t")]), "has no `id`"),
        (entry(&[("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "s")]), "has no `type`"),
        (
            entry(&[("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "s"), ("ce-type", "t"), ("data", "x")]),
            "not valid JSON",
        ),
        (request(&[("content-type", "application/cloudevents-batch+json")], "[]"), "a batch of CloudEvents"),
        (request(&[("content-type", "application/cloudevents+avro")], ""), "only JSON is read"),
        (request(&[("content-type", "application/cloudevents+json")], "{}"), "has no `specversion`"),
    ] {
        let said = refused(&raw);
        assert!(said.contains(why), "{said}\n  expected: {why}");
    }
}

#[test]
fn a_payload_may_be_as_deep_in_an_envelope_as_alone() {
    let payload = format!("{}{}", "[".repeat(128), "]".repeat(128));
    let event = format!(r#"{{"specversion":"1.0","id":"1","source":"s","type":"t","data":{payload}}}"#);
    assert_eq!(json(&read(&entry(&[("data", &event)]))), payload);
}

#[test]
fn times_without_an_offset_are_utc_if_somebody_says_so() {
    let raw = entry(&[("event_id", "1"), ("event_type", "t"), ("occurred_on", "2026-11-28T12:00:00.000001")]);
    let format = Format::default().times_without_offset_are_utc();
    let read = format.read(&raw, "s", "p").expect("UTC");
    assert_eq!(read.draft.occurred_at.expect("a time").to_string(), "2026-11-28T12:00:00.000001Z");
}

fn github() -> Format {
    Format::mapped(
        Mapping::new()
            .topic("github.{header:x-github-event}.{payload:action}")
            .id("{header:x-github-delivery}")
            .key("{payload:repository.full_name}"),
    )
}

#[test]
fn a_mapping() {
    let headers = [
        ("X-GitHub-Event", "issues"),
        ("X-GitHub-Delivery", "d1"),
        ("authorization", "secret"),
        ("traceparent", "00-1"),
    ];
    let body = r#"{"action":"opened","repository":{"full_name":"octo/repo"}}"#;
    let read = github().read(&request(&headers, body), "github", "d1").expect("an event");
    assert_eq!((read.draft.topic(), read.identity.as_str(), read.by_position), ("github.issues.opened", "d1", false));
    assert_eq!((read.draft.key.as_deref(), json(&read)), (Some("octo/repo"), body));
    assert_eq!((header(&read, "authorization"), header(&read, "traceparent")), (None, Some("00-1")));
    let push = request(&[("x-github-event", "push"), ("x-github-delivery", "d2")], r#"{"ref":"main"}"#);
    let read = github().read(&push, "github", "d2").expect("an event");
    assert_eq!((read.draft.topic(), read.draft.key.as_deref()), ("github.push", None));
    let why = github().read(&request(&headers[..1], body), "github", "").expect_err("no id");
    assert_eq!(why, "it has no id: {header:x-github-delivery} is not there");
    let odd = r#"{"action":{"a":1}}"#;
    let why = github().read(&request(&headers, odd), "github", "").expect_err("no text");
    assert_eq!(why, "{payload:action} is an object; it must be a text or a number");
}

#[test]
fn the_first_of_several_that_is_there() {
    let mapping = Mapping::new()
        .topic("github.{payload:action|header:x-github-event}")
        .id("{header:x-none|header:x-github-delivery|position}")
        .key("{payload:repository.full_name|payload:organization.login}");
    let format = Format::mapped(mapping.header("odd", "{payload:a||b}"));
    let read = |body: &str| {
        let headers = [("X-GitHub-Event", "ping"), ("X-GitHub-Delivery", "d1")];
        format
            .read(&request(&headers, body), "github", "d1")
            .map(|read| (read.draft.topic().to_owned(), read.draft.key))
    };
    let organization = r#""organization":{"login":"octo"}"#;
    for (body, topic, key) in [
        (
            format!(r#"{{"action":"added","repository":{{"full_name":"octo/repo"}},{organization}}}"#),
            "added",
            "octo/repo",
        ),
        (format!(r#"{{{organization}}}"#), "ping", "octo"),
        (format!(r#"{{"action":"","repository":null,{organization}}}"#), "ping", "octo"),
        (format!(r#"{{"repository":{{"full_name":""}},{organization}}}"#), "ping", "octo"),
    ] {
        assert_eq!(read(&body), Ok((format!("github.{topic}"), Some(key.to_owned()))), "{body}");
    }
    assert_eq!(read("{}"), Ok(("github.ping".to_owned(), None)));
    // What is there and no text is not passed over.
    let why = read(r#"{"action":["a"]}"#).expect_err("no text");
    assert_eq!(why, "{payload:action} is an array; it must be a text or a number");
    let barred = format.read(&request(&[], r#"{"action":"a","a|b":1}"#), "github", "p").expect("an event");
    assert_eq!((header(&barred, "odd"), barred.identity.as_str()), (Some("1"), "p"));
    let both = Mapping::new().topic("t").id("{payload:a|payload:b}");
    let why = Format::mapped(both).read(&request(&[], "{}"), "github", "").expect_err("no id");
    assert_eq!(why, "it has no id: {payload:a|payload:b} is not there");
}

#[test]
#[should_panic(expected = "is no place")]
fn a_payload_has_one_place() {
    let _ = Mapping::new().topic("t").payload("{payload:a|payload:b}");
}

#[test]
fn a_mapping_of_everything() {
    let format = Format::mapped(
        Mapping::new()
            .topic("bank.{payload:kind}")
            .time("{payload:created}")
            .correlation_id("{field:request}")
            .causation_id("{payload:lines.1.cause}")
            .payload("{payload:data.object}")
            .header("tenant", "t-{field:tenant}")
            .header("nobody", "{field:nobody}"),
    );
    let content = r#"{"kind":"paid","created":1764331200,"lines":[{},{"cause":"z"}],"data":{"object":{"n": 1.10}}}"#;
    let raw = entry(&[("data", content), ("request", "r"), ("tenant", "acme")]);
    let read = format.read(&raw, "bank", "bank/7-0").expect("an entry");
    assert_eq!((read.draft.topic(), json(&read)), ("bank.paid", r#"{"n": 1.10}"#));
    assert_eq!(read.draft.occurred_at.expect("a time").to_string(), "2025-11-28T12:00:00Z");
    assert_eq!((read.draft.correlation_id.as_deref(), read.draft.causation_id.as_deref()), (Some("r"), Some("z")));
    assert_eq!(
        (header(&read, "tenant"), header(&read, "nobody"), header(&read, "request")),
        (Some("t-acme"), None, None)
    );
    // Nobody gave it an id.
    assert_eq!((read.identity.as_str(), read.by_position, read.draft.external_id.as_deref()), ("bank/7-0", true, None));
    assert_eq!(header(&read, "postbox-id-from"), Some("position"));
    let native = entry(&[("data", content), ("message_id", "m1")]);
    assert_eq!(format.read(&native, "bank", "p").expect("an entry").identity, "m1");
    let why = format.read(&entry(&[("data", r#"{"kind":"paid"}"#)]), "bank", "p").expect_err("no payload");
    assert!(why.contains("`data.object` is not there"), "{why}");
}

#[test]
fn a_mapping_of_fields() {
    let format = |place: Option<&str>| {
        let mapping = Mapping::new().topic("legacy.{field:kind}").id("{position}");
        Format::mapped(match place {
            Some(place) => mapping.payload(place),
            None => mapping,
        })
    };
    let raw = entry(&[("kind", "a"), ("body", r#"{"n":1}"#)]);
    assert_eq!(json(&format(Some("{field:body}")).read(&raw, "s", "p").expect("an entry")), r#"{"n":1}"#);
    let all = format(None).read(&raw, "s", "p").expect("an entry");
    assert_eq!((json(&all), all.by_position), (r#"{"body":"{\"n\":1}","kind":"a"}"#, false));
    let form = request(&[("kind", "a"), ("content-type", "application/x-www-form-urlencoded")], "a=1");
    assert_eq!(format(None).read(&form, "s", "p").expect("a form").draft.payload.bytes(), b"a=1");
    assert_eq!(format(None).read(&entry(&[("x", "y")]), "s", "p").expect("an entry").draft.topic(), "legacy");
    let nothing = Format::mapped(Mapping::new().topic("{field:kind}"));
    assert!(nothing.read(&entry(&[("x", "y")]), "s", "p").expect_err("no topic").contains("nothing that its topic"));
}

#[test]
#[should_panic(expected = "the same for all")]
fn one_id_for_all_is_a_mistake() {
    let _ = Mapping::new().id("x");
}

#[test]
#[should_panic(expected = "says no topic")]
fn a_mapping_needs_a_topic() {
    let _ = Format::mapped(Mapping::new().id("{position}"));
}

/// Texts that come near to the formats.
fn near() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec![
        "specversion",
        "id",
        "source",
        "type",
        "time",
        "data",
        "data_base64",
        "datacontenttype",
        "event_id",
        "event_type",
        "payload",
        "occurred_on",
        "max_retries",
        "partitionkey",
        "x",
    ]);
    let value = prop::sample::select(vec![
        r#""1.0""#,
        r#""a.b""#,
        "1",
        "1.5",
        "null",
        "true",
        "{}",
        r#"[{"a":1}]"#,
        r#""2026-11-28T12:00:00Z""#,
        r#""AA==""#,
        r#""text/plain""#,
        r#""\u0000""#,
        r#""\ud800""#,
        "-",
        "{",
        r#""é€""#,
    ]);
    prop::collection::vec((name, value), 0..8).prop_map(|members| {
        let members: Vec<String> = members.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
        format!("{{{}}}", members.join(","))
    })
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        near().prop_map(String::into_bytes),
        prop::collection::vec(any::<u8>(), 0..30),
        prop::sample::select(vec![
            "1.0",
            "a.b",
            "%e2%82",
            "\"",
            "1",
            "{}",
            "application/cloudevents+json",
            "text/plain",
            ""
        ])
        .prop_map(|text| text.as_bytes().to_vec()),
    ]
}

fn raw() -> impl Strategy<Value = Raw> {
    let name = prop_oneof![
        4 => prop::sample::select(vec![
            "ce-id", "ce_source", "ce-type", "ce-specversion", "cloudEvents:time", "event_id", "event_type", "payload", "data",
            "content-type", "webhook-id", "traceparent", "postbox-position", "",
        ])
        .prop_map(|name| name.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..6),
    ];
    (prop::collection::vec((name, bytes()), 0..8), prop::option::of(bytes()))
        .prop_map(|(fields, body)| Raw { fields, body })
}

proptest! {
    #[test]
    fn nothing_panics(raw in raw()) {
        for format in [Format::default(), Format::default().times_without_offset_are_utc(), github()] {
            match format.read(&raw, "s", "p") {
                Ok(read) => {
                    prop_assert!(!read.identity.is_empty() && read.identity.len() <= 1024);
                    prop_assert_eq!(read.draft.headers.get("postbox-position").map(String::as_str), Some("p"));
                }
                Err(why) => {
                    prop_assert!(!why.is_empty());
                    prop_assert!(!why.chars().any(char::is_control), "{:?}", why);
                }
            }
        }
    }
}
