//! Webhooks in: what is stored, what is refused, and what is answered.

use std::time::Duration;

use jiff::Timestamp;
use postbox::admin::QuarantineFilter;
use postbox::signature::{Secret, github, standard, stripe};
use postbox::source::{Format, Mapping, Webhook, webhook};
use postbox::{Database, Envelope, Postbox, Postgres, Settings};
use postbox_testkit::{Fresh, Server, Testable, on_both_stores};
use reqwest::{Response, StatusCode};
use serde_json::{Value, json};

on_both_stores!(
    a_signed_request_becomes_a_message_once,
    what_does_not_prove_itself_leaves_no_trace,
    what_cannot_be_understood_is_kept_aside_and_taken,
    headers_that_nobody_signed_do_not_make_another_message,
    each_scheme_has_its_ids,
    too_large_another_method_and_forms,
    a_paused_source_and_a_full_house_take_nothing,
    what_cannot_work_is_said_when_it_is_set_up,
    the_events_of_github_come_in_as_they_are,
);

#[test]
fn planted_bugs_are_caught() {
    postbox_testkit::planted::each_is_caught(module_path!());
}

const WHSEC: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const NEXT: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";

/// Serves a webhook on loopback; its URL.
async fn serve<Db: Database>(postbox: &Postbox<Db>, webhook: Webhook) -> String {
    let app = webhook.routes(postbox).await.expect("it can be served");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/in/hooks", listener.local_addr().expect("its address"));
    tokio::spawn(async move { axum::serve(listener, app).await });
    url
}

/// A request to be signed and sent.
#[derive(Clone)]
struct Call<'a> {
    id: &'a str,
    body: &'a [u8],
    secret: &'a str,
    /// How old it is.
    age: i64,
    headers: Vec<(&'a str, String)>,
}

impl<'a> Call<'a> {
    fn new(id: &'a str, body: &'a str) -> Call<'a> {
        Call { id, body: body.as_bytes(), secret: WHSEC, age: 0, headers: Vec::new() }
    }

    fn header(mut self, name: &'a str, value: impl Into<String>) -> Call<'a> {
        self.headers.push((name, value.into()));
        self
    }

    /// As Standard Webhooks signs.
    fn signed(self) -> Call<'a> {
        let time = Timestamp::from_second(Timestamp::now().as_second() - self.age).expect("a time");
        let secret = Secret::standard(self.secret).expect("a secret");
        let signature = standard::sign(&[secret], self.id, time, self.body);
        let id = self.id;
        self.header("webhook-id", id)
            .header("webhook-timestamp", time.as_second().to_string())
            .header("webhook-signature", signature)
    }

    async fn post(self, url: &str) -> Answer {
        let mut request = reqwest::Client::new().post(url).body(self.body.to_vec());
        for (name, value) in self.headers {
            request = request.header(name, value);
        }
        Answer::of(request.send().await.expect("an answer")).await
    }

    async fn send(self, url: &str) -> Answer {
        self.signed().post(url).await
    }
}

#[derive(Debug)]
struct Answer {
    status: StatusCode,
    retry_after: Option<String>,
    said: Value,
}

impl Answer {
    async fn of(response: Response) -> Answer {
        let status = response.status();
        let retry_after = response.headers().get("retry-after").map(|v| v.to_str().expect("ASCII").to_owned());
        Answer { status, retry_after, said: response.json().await.expect("JSON") }
    }

    /// The status, and what is said in a word.
    fn is(&self) -> (u16, &str) {
        (self.status.as_u16(), self.said["status"].as_str().expect("a status"))
    }

    fn reason(&self) -> &str {
        self.said["reason"].as_str().expect("a reason")
    }
}

/// Posts so many pieces of 100 bytes; the answer.
async fn chunked(url: &str, pieces: usize) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let host = url.strip_prefix("http://").and_then(|rest| rest.split('/').next()).expect("a host");
    let mut stream = tokio::net::TcpStream::connect(host).await.expect("a connection");
    let head = "POST /in/hooks HTTP/1.1\r\nhost: hooks\r\ntransfer-encoding: chunked\r\n\r\n";
    let piece = format!("64\r\n{}\r\n", "x".repeat(100));
    // It may be cut off before it has sent everything.
    stream.write_all(format!("{head}{}0\r\n\r\n", piece.repeat(pieces)).as_bytes()).await.ok();
    let mut answer = vec![0; 1000];
    let read = stream.read(&mut answer).await.expect("an answer");
    String::from_utf8_lossy(&answer[..read]).into_owned()
}

fn event(kind: &str, n: u32) -> String {
    json!({ "type": kind, "timestamp": "2026-11-28T12:00:00Z", "data": { "n": n } }).to_string()
}

async fn message<Db: Testable>(fresh: &Fresh<Db>, answer: &Answer) -> Envelope {
    let id = answer.said["id"].as_str().expect("an id").parse().expect("an id");
    fresh.postbox.admin().message(id).await.expect("it is there").0
}

/// Received, duplicate, conflict, quarantined.
async fn counts<Db: Testable>(fresh: &Fresh<Db>) -> [i64; 4] {
    let sources = fresh.postbox.admin().sources().await.expect("the sources");
    let hooks = sources.iter().find(|source| source.name == "hooks");
    hooks.map_or([0; 4], |s| [s.received, s.duplicate, s.conflict, s.quarantined])
}

async fn a_signed_request_becomes_a_message_once<Db: Testable>() {
    let fresh = Db::fresh().await;
    let url = serve(&fresh.postbox, webhook("hooks").standard([WHSEC, NEXT])).await;
    let body = event("orders.placed", 1);
    let first = Call::new("msg_1", &body).header("authorization", "Bearer hidden").send(&url).await;
    assert_eq!(first.is(), (200, "received"));
    let stored = message(&fresh, &first).await;
    assert_eq!((stored.topic.as_str(), stored.payload_json()), ("orders.placed", Some(body.as_str())));
    assert_eq!((stored.external_id.as_deref(), stored.source.as_deref()), (Some("msg_1"), Some("hooks")));
    assert_eq!(stored.occurred_at.to_string(), "2026-11-28T12:00:00Z");
    assert!(!stored.to_json().contains("hidden") && !stored.to_json().contains("v1,"), "{stored:?}");

    // The same request again, one that its sender signed anew, and one with the secret that comes next.
    let (old, aged) = (Call::new("msg_1", &body), Call { age: 299, ..Call::new("msg_1", &body) });
    for again in [old.clone(), aged, Call { secret: NEXT, ..old }] {
        let again = again.send(&url).await;
        assert_eq!(again.is(), (200, "duplicate"));
        assert_eq!(again.said["id"], first.said["id"]);
    }
    let changed = event("orders.placed", 2);
    let conflict = Call::new("msg_1", &changed).send(&url).await;
    assert_eq!(conflict.is(), (202, "conflict"));
    assert_eq!(conflict.said["id"], first.said["id"]);
    let kept = fresh.postbox.admin().quarantined(conflict.said["quarantine"].as_i64().expect("a number")).await;
    assert_eq!(kept.expect("it is kept").raw.body.as_deref(), Some(changed.as_bytes()));
    assert_eq!(counts(&fresh).await, [1, 3, 1, 0]);
}

async fn what_does_not_prove_itself_leaves_no_trace<Db: Testable>() {
    let fresh = Db::fresh().await;
    let url = serve(&fresh.postbox, webhook("hooks").standard([WHSEC])).await;
    let body = event("orders.placed", 1);
    let signed = || Call::new("msg_1", &body).signed();
    let other = event("orders.placed", 2);
    let without = |name: &str| {
        let mut call = signed();
        call.headers.retain(|(n, _)| *n != name);
        call
    };
    let changed = |name: &'static str, value: &str| without(name).header(name, value);
    for (call, words) in [
        (Call { body: other.as_bytes(), ..signed() }, "not that of this body"),
        (Call { secret: NEXT, ..Call::new("msg_1", &body) }.signed(), "not that of this body"),
        (changed("webhook-id", "msg_2"), "not that of this body"),
        (changed("webhook-timestamp", "1614265330"), "not that of this body"),
        (changed("webhook-signature", "v1,AAAA"), "not that of this body"),
        (changed("webhook-signature", "AAAA"), "malformed"),
        (changed("webhook-timestamp", "yesterday"), "malformed"),
        (without("webhook-signature"), "`webhook-signature` is missing"),
        (without("webhook-timestamp"), "`webhook-timestamp` is missing"),
        (without("webhook-id"), "`webhook-id` is missing"),
        (changed("webhook-id", ""), "`webhook-id` is missing"),
        (signed().header("webhook-id", "msg_1"), "more than once"),
        (Call { headers: Vec::new(), ..signed() }, "missing"),
        (Call { age: 302, ..Call::new("msg_1", &body) }.signed(), "s old; 300 s are tolerated"),
        (Call { age: -302, ..Call::new("msg_1", &body) }.signed(), "in the future"),
    ] {
        let refused = call.post(&url).await;
        assert_eq!(refused.is(), (401, "refused"), "{words}");
        assert!(refused.reason().contains(words), "{words}: {refused:?}");
    }
    assert_eq!(counts(&fresh).await, [0; 4]);
    let kept = fresh.postbox.admin().quarantine(&QuarantineFilter::default(), 10).await.expect("the quarantine");
    assert!(kept.is_empty(), "{kept:?}");
    assert_eq!(signed().post(&url).await.is(), (200, "received"), "and it is taken when it is as it should be");
    // What is tolerated can be set.
    let url = serve(&fresh.postbox, webhook("hooks").standard([WHSEC]).tolerance(Duration::from_secs(10))).await;
    assert_eq!(Call { age: 12, ..Call::new("msg_3", &body) }.send(&url).await.is(), (401, "refused"));
}

async fn what_cannot_be_understood_is_kept_aside_and_taken<Db: Testable>() {
    let fresh = Db::fresh().await;
    let url = serve(&fresh.postbox, webhook("hooks").standard([WHSEC])).await;
    let deep = format!(r#"{{"type":"t","data":{}{}}}"#, "[".repeat(200), "]".repeat(200));
    for (n, (body, words)) in [
        (&b"{\"type\": \"t\""[..], "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"", "not valid JSON"),
        (br#"{"data": 1}"#, "no known format"),
        (br#"{"type": "t", "text": "a\u0000b"}"#, "cannot be kept"),
        (br#"{"type": "no topic at all"}"#, "topic"),
        (deep.as_bytes(), "cannot be kept"),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("msg_{n}");
        let taken = Call { body, ..Call::new(&id, "") }.send(&url).await;
        assert_eq!(taken.is(), (202, "quarantined"), "{words}: {taken:?}");
        assert!(taken.reason().contains(words), "{words}: {taken:?}");
        let kept = fresh.postbox.admin().quarantined(taken.said["quarantine"].as_i64().expect("a number")).await;
        let kept = kept.expect("it is kept");
        assert_eq!((kept.row.kind.as_str(), kept.row.position.as_str()), ("malformed", id.as_str()));
        assert_eq!(kept.raw.body.as_deref(), Some(body), "byte for byte");
        assert_eq!(kept.raw.field("webhook-id"), Some(id.as_bytes()));
        assert_eq!(kept.raw.field("webhook-signature"), None, "what proves who is calling is not kept");
    }
    let too_long = "x".repeat(2000);
    assert_eq!(Call::new(&too_long, &event("t", 1)).send(&url).await.is(), (202, "quarantined"));
    assert_eq!(counts(&fresh).await[3], 8);
}

async fn headers_that_nobody_signed_do_not_make_another_message<Db: Testable>() {
    let fresh = Db::fresh().await;
    let url = serve(&fresh.postbox, webhook("hooks").standard([WHSEC])).await;
    // Somebody has seen a request, and sends it again as something else.
    let sent = |id: &'static str, source: &str, ce_id: &str| {
        Call::new(id, r#"{"n": 1}"#)
            .header("content-type", "application/json")
            .header("ce-specversion", "1.0")
            .header("ce-type", "orders.placed")
            .header("ce-source", source)
            .header("ce-id", ce_id)
    };
    let first = sent("msg_1", "/shop", "1").send(&url).await;
    assert_eq!(first.is(), (200, "received"));
    let stored = message(&fresh, &first).await;
    assert_eq!((stored.topic.as_str(), stored.source.as_deref()), ("orders.placed", Some("/shop")));
    for forged in [sent("msg_1", "/shop", "2"), sent("msg_1", "/other", "1")] {
        assert_eq!(forged.send(&url).await.is(), (200, "duplicate"));
    }
    let body = event("orders.placed", 7);
    assert_eq!(Call::new("msg_2", &body).send(&url).await.is(), (200, "received"));
    let forged = Call::new("msg_2", &body).header("event_id", "e").header("event_type", "orders.cancelled");
    assert_eq!(forged.send(&url).await.is(), (200, "duplicate"));
    assert_eq!(counts(&fresh).await, [2, 3, 0, 0]);
}

async fn each_scheme_has_its_ids<Db: Testable>() {
    let fresh = Db::fresh().await;
    let url = serve(&fresh.postbox, webhook("hooks").github("first").github("second")).await;
    let secret = Secret::bytes("second").expect("a secret");
    let body = r#"{"action":"opened","number":7,"repository":{"full_name":"octo/repo"}}"#;
    let delivery = |id: &'static str| {
        Call::new(id, body)
            .header("x-github-event", "pull_request")
            .header("x-github-delivery", id)
            .header("x-hub-signature-256", github::sign(&secret, body.as_bytes()))
    };
    let first = delivery("d-1").post(&url).await;
    assert_eq!(first.is(), (200, "received"));
    let stored = message(&fresh, &first).await;
    assert_eq!((stored.topic.as_str(), stored.key.as_deref()), ("github.pull_request.opened", Some("octo/repo")));
    assert_eq!(stored.external_id.as_deref(), Some("d-1"));
    assert_eq!(delivery("d-1").post(&url).await.is(), (200, "duplicate"));
    assert_eq!(delivery("d-2").post(&url).await.is(), (200, "received"));
    let refused = Call { body: b"{}", ..delivery("d-3") }.post(&url).await;
    assert_eq!(refused.is(), (401, "refused"));

    let url = serve(&fresh.postbox, webhook("stripe").stripe(WHSEC)).await.replace("hooks", "stripe");
    let secret = [Secret::bytes(WHSEC).expect("a secret")];
    let body = r#"{"id":"evt_1","type":"invoice.paid","created":1764331200,"data":{}}"#;
    let event =
        |now: Timestamp| Call::new("", body).header("stripe-signature", stripe::sign(&secret, now, body.as_bytes()));
    let first = event(Timestamp::now()).post(&url).await;
    assert_eq!(first.is(), (200, "received"));
    let stored = message(&fresh, &first).await;
    assert_eq!((stored.topic.as_str(), stored.external_id.as_deref()), ("stripe.invoice.paid", Some("evt_1")));
    assert_eq!(stored.occurred_at.as_second(), 1_764_331_200);
    assert_eq!(event(Timestamp::now()).post(&url).await.is(), (200, "duplicate"));
    let stale = event(Timestamp::from_second(1_764_331_200).expect("a time")).post(&url).await;
    assert_eq!(stale.is(), (401, "refused"));
    assert!(stale.reason().contains("300 s are tolerated"), "{stale:?}");

    // A format of one's own says otherwise.
    let own = Mapping::new().topic("bank.{payload:kind}").id("{payload:nr}").key("{payload:account}");
    let partner = webhook("partner").standard(["a secret that is long enough"]).format(Format::mapped(own));
    let url = serve(&fresh.postbox, partner).await.replace("hooks", "partner");
    let call =
        |id| Call { secret: "a secret that is long enough", ..Call::new(id, r#"{"kind":"in","nr":5,"account":"a"}"#) };
    let stored = message(&fresh, &call("one").send(&url).await).await;
    assert_eq!((stored.topic.as_str(), stored.key.as_deref()), ("bank.in", Some("a")));
    assert_eq!(call("two").send(&url).await.is(), (200, "duplicate"), "its own id counts");
}

async fn too_large_another_method_and_forms<Db: Testable>() {
    let fresh = Db::fresh().await;
    let url = serve(&fresh.postbox, webhook("hooks").standard([WHSEC]).body_limit(1000)).await;
    let fitting = format!(r#"{{"type":"t","data":"{}"}}"#, "x".repeat(978));
    assert_eq!(fitting.len(), 1000);
    assert_eq!(Call::new("msg_1", &fitting).send(&url).await.is(), (200, "received"));
    let large = format!("{fitting} ");
    let refused = Call::new("msg_2", &large).send(&url).await;
    assert_eq!(refused.is(), (413, "refused"));
    assert!(refused.reason().contains("1000 bytes"), "{refused:?}");
    // Nobody says beforehand how large it is.
    assert!(chunked(&url, 100).await.starts_with("HTTP/1.1 413 "));
    let got = reqwest::Client::new().get(&url).send().await.expect("an answer");
    assert_eq!(got.headers()["allow"], "POST");
    assert_eq!(Answer::of(got).await.is(), (405, "refused"));
    let nowhere = reqwest::Client::new().post(url.replace("hooks", "other")).send().await.expect("an answer");
    assert_eq!(nowhere.status(), 404);

    let url = serve(&fresh.postbox, webhook("github").github("secret")).await.replace("hooks", "github");
    let body = "payload=%7B%7D";
    let form = Call::new("", body)
        .header("content-type", "application/x-www-form-urlencoded")
        .header("x-hub-signature-256", github::sign(&Secret::bytes("secret").expect("one"), body.as_bytes()));
    let refused = form.post(&url).await;
    assert_eq!(refused.is(), (415, "refused"));
    assert!(refused.reason().contains("application/json"), "{refused:?}");
    assert_eq!(counts(&fresh).await, [1, 0, 0, 0]);
}

async fn a_paused_source_and_a_full_house_take_nothing<Db: Testable>() {
    let fresh = Db::fresh_with(|settings| settings.set("max_backlog", 3)).await;
    let url = serve(&fresh.postbox, webhook("hooks").standard([WHSEC])).await;
    let admin = fresh.postbox.admin();
    admin.pause_source("test", "hooks", "ana", "the shop is closed").await.expect("paused");
    let body = event("orders.placed", 1);
    let mut n = 0;
    let mut until = async |status: u16| loop {
        n += 1;
        let answer = Call::new(&format!("msg_{n}"), &body).send(&url).await;
        if answer.is().0 == status {
            break answer;
        }
        assert!(n < 10_000, "{answer:?}");
    };
    let paused = until(503).await;
    assert_eq!((paused.is(), paused.retry_after.as_deref()), ((503, "unavailable"), Some("30")));
    assert!(paused.reason().contains("paused"), "{paused:?}");
    admin.resume_source("test", "hooks", "ana", "it is open").await.expect("resumed");
    until(200).await;
    // Somebody is subscribed, and nobody works.
    let router = postbox::Router::new().on("orders.>", postbox::handler(async || {}).named("stock"));
    let worker = fresh.postbox.worker(router).start().await.expect("started");
    worker.stop(None).await.expect("stopped");
    let full = until(503).await;
    assert_eq!(full.retry_after.as_deref(), Some("30"));
    assert!(full.reason().contains("max_backlog"), "{full:?}");
}

async fn what_cannot_work_is_said_when_it_is_set_up<Db: Testable>() {
    let fresh = Db::fresh().await;
    for (webhook, words) in [
        (webhook("hooks"), "standard, github or stripe"),
        (webhook("hooks").standard(Vec::<String>::new()), "no secret"),
        (webhook("hooks").standard(["whsec_?"]), "base64"),
        (webhook("hooks").github(""), "empty"),
        (webhook("hooks").github("a").stripe("b"), "two ways"),
        (webhook("").github("a"), "part of the address"),
        (webhook("a/b").github("a"), "part of the address"),
        (webhook("{name}").github("a"), "part of the address"),
        (webhook("x".repeat(256)).github("a"), "part of the address"),
    ] {
        let error = webhook.routes(&fresh.postbox).await.expect_err(words).to_string();
        assert!(error.contains(words), "{error}");
    }
    let forgetful = Db::fresh_with(|settings| settings.set("keep_ids", "74h")).await;
    let error = webhook("hooks").github("a").routes(&forgetful.postbox).await.expect_err("too short").to_string();
    assert!(error.contains("75 hours") && error.contains("keep_ids"), "{error}");
    let enough = Db::fresh_with(|settings| settings.set("keep_ids", "75h")).await;
    let _ = webhook("hooks").github("a").routes(&enough.postbox).await.expect("enough");
}

/// The real events: signed as GitHub signs them, and stored digit for digit.
async fn the_events_of_github_come_in_as_they_are<Db: Testable>() {
    #[derive(serde::Deserialize)]
    struct Line {
        id: String,
        topic: String,
        #[serde(default)]
        key: String,
        payload: Box<serde_json::value::RawValue>,
    }
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/data/github-events.jsonl");
    let text = std::fs::read_to_string(file).expect("the events");
    let lines: Vec<Line> = text.lines().map(|line| serde_json::from_str(line).expect("an event")).collect();
    assert!(lines.len() > 300);
    let fresh = Db::fresh().await;
    let url = serve(&fresh.postbox, webhook("hooks").github("It's a Secret to Everybody")).await;
    let secret = Secret::bytes("It's a Secret to Everybody").expect("a secret");
    let client = reqwest::Client::new();
    for line in &lines {
        let event = line.topic.split('.').nth(1).expect("an event");
        let body = line.payload.get();
        let request = client
            .post(&url)
            .header("content-type", "application/json")
            .header("x-github-event", event)
            .header("x-github-delivery", &line.id)
            .header("x-hub-signature-256", github::sign(&secret, body.as_bytes()))
            .body(body.to_owned());
        let answer = Answer::of(request.send().await.expect("an answer")).await;
        assert_eq!(answer.is(), (200, "received"), "{}: {answer:?}", line.id);
        let stored = message(&fresh, &answer).await;
        assert_eq!(stored.payload_json(), Some(body), "{}", line.id);
        assert_eq!(stored.external_id.as_ref(), Some(&line.id));
        // What belongs to no repository goes by its organization, if it has one.
        let key = Some(&line.key).filter(|key| !key.is_empty());
        assert_eq!((&stored.topic, stored.key.as_ref()), (&line.topic, key), "{}", line.id);
    }
    assert_eq!(counts(&fresh).await, [lines.len() as i64, 0, 0, 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_down_is_told_and_nothing_is_lost() {
    let mut server = Server::start();
    let settings = Settings::defaults().url(server.url()).set("application", "test");
    let postbox: Postbox<Postgres> = Postbox::migrate(settings).await.expect("migrated");
    let url = serve(&postbox, webhook("hooks").standard([WHSEC])).await;
    let body = event("orders.placed", 1);
    assert_eq!(Call::new("msg_1", &body).send(&url).await.is(), (200, "received"));
    server.crash();
    let down = Call::new("msg_2", &body).send(&url).await;
    assert_eq!((down.is(), down.retry_after.as_deref()), ((503, "unavailable"), Some("30")), "{down:?}");
    assert!(down.reason().contains("database"), "{down:?}");
    server.up();
    // What was known before is known, and what was refused is taken.
    let mut answers = Vec::new();
    for id in ["msg_1", "msg_2"] {
        let answer = loop {
            let answer = Call::new(id, &body).send(&url).await;
            if answer.status != StatusCode::SERVICE_UNAVAILABLE {
                break answer;
            }
        };
        answers.push(answer.is().1.to_owned());
    }
    // The second may have been stored after its caller was told to come again.
    assert_eq!(answers[0], "duplicate");
    assert!(matches!(answers[1].as_str(), "received" | "duplicate"), "{answers:?}");
    let sources = postbox.admin().sources().await.expect("the sources");
    assert_eq!(sources[0].received, 2);
}
