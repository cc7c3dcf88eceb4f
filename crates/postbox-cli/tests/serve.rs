//! `postbox serve` as it is run: a file, a real Redis, webhooks and a handler behind a URL; on both stores.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::HeaderMap;
use postbox::{Postgres, signature};
use postbox_testkit::{Server, Testable, shared_redis_url};
use redis::Commands;
use serde_json::{Value, json};
use tokio::sync::{Notify, mpsc};

use crate::place::{Place, Ran};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
const GITHUB_SECRET: &str = "it is a secret";
const PUSH_SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// What takes GitHub's webhooks.
const GITHUB: &str = r#"
http = "127.0.0.1:0"

[[source]]
name = "github"
kind = "webhook"
scheme = "github"
secret = { env = "GITHUB_SECRET" }
"#;

/// Where a store is, for the command.
struct House {
    place: Place,
    variables: Vec<(&'static str, String)>,
}

impl House {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.place.command(args);
        command
            .env("GITHUB_SECRET", GITHUB_SECRET)
            .env("CRM_SECRET", PUSH_SECRET)
            .env("POSTBOX_LOG", "warn,sqlx=error");
        command.envs(self.variables.iter().map(|(name, value)| (*name, value.as_str())));
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        Ran::of(&self.command(args).output().expect("runs"))
    }

    fn says(&self, file: &str) {
        std::fs::write(self.place.file("postbox.toml"), file).expect("written");
    }

    fn serve(&self) -> Serving {
        let mut command = self.command(&["serve"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
        let out = lines(child.stdout.take().expect("its data"));
        let err = lines(child.stderr.take().expect("its words"));
        Serving { child, out, err }
    }
}

/// A stream's lines, as they come.
fn lines(stream: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (send, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                break;
            }
        }
    });
    lines
}

/// A process that serves, and ends with the test.
struct Serving {
    child: Child,
    out: Receiver<String>,
    err: Receiver<String>,
}

impl Serving {
    /// The address, once it serves.
    fn address(&self) -> String {
        loop {
            let line = self.err.recv_timeout(PATIENCE).expect("it says that it serves");
            if let Some((_, address)) = line.split_once(", at ") {
                return address.split(';').next().expect("an address").to_owned();
            }
        }
    }

    fn message(&self) -> Value {
        let line = self.out.recv_timeout(PATIENCE).expect("a message");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"))
    }

    fn tell_to_stop(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill").success());
    }

    fn terminate(self) -> i32 {
        self.tell_to_stop();
        self.end()
    }

    fn end(mut self) -> i32 {
        let ended = self.child.wait().expect("it ends");
        for line in self.err.try_iter() {
            eprintln!("  {line}");
        }
        ended.code().unwrap_or(-1)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A program of one's own in any language: takes what is pushed, and proves who sent it.
async fn program() -> (String, mpsc::UnboundedReceiver<(HeaderMap, Bytes)>) {
    let (send, taken) = mpsc::unbounded_channel();
    let take = move |headers: HeaderMap, body: Bytes| {
        send.send((headers, body)).ok();
        async {}
    };
    let routes = axum::Router::new().route("/events", axum::routing::post(take));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/events", listener.local_addr().expect("an address"));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (url, taken)
}

/// From a stream, a webhook and a table to a pipe, a stream and a program, and a stop.
async fn the_whole_way(variables: Vec<(&'static str, String)>) {
    let house = House { place: Place::new(), variables };
    let redis_url = shared_redis_url();
    let mine = uuid::Uuid::now_v7().simple().to_string();
    let (program, mut taken) = program().await;
    house.says(&format!(
        r#"
application = "shop"
http = "127.0.0.1:0"

[[source]]
name = "payments"
kind = "redis"
url = "{redis_url}"
stream = "{mine}:payments"
group = "shop"
block = "100ms"

[[source]]
name = "github"
kind = "webhook"
scheme = "github"
secret = {{ env = "GITHUB_SECRET" }}
topic = "github.{{header:x-github-event}}.{{payload:action}}"
id = "{{header:x-github-delivery}}"
key = "{{payload:repository.full_name}}"

[[relay]]
name = "to-redis"
pattern = "orders.>"
kind = "redis"
url = "{redis_url}"
to = "{mine}:{{topic}}"
ordered = true

[[relay]]
name = "to-the-pipe"
pattern = ">"
kind = "stdout"
ordered = false

[[push]]
name = "crm"
pattern = "payment.settled"
url = "{program}"
secret = {{ env = "CRM_SECRET" }}
source = "urn:shop:crm"
operation = true
"#
    ));
    let mut redis = redis::Client::open(redis_url).and_then(|client| client.get_connection()).expect("Redis");
    let serving = house.serve();
    let address = serving.address();
    let http = reqwest::Client::builder().no_proxy().build().expect("a client");
    let get =
        async |path: &str| http.get(format!("{address}{path}")).send().await.expect("an answer").status().as_u16();
    assert_eq!((get("/health").await, get("/ready").await, get("/in/github").await), (200, 200, 405));

    // In: from the stream. One that is malformed holds nobody up.
    let stream = format!("{mine}:payments");
    let _: String = redis.xadd(&stream, "*", &[("event_type", "payment.settled"), ("payload", "1")]).expect("added");
    for _ in 0..2 {
        let fields = [
            ("event_id", "e1"),
            ("event_type", "payment.settled"),
            ("aggregate_id", "42"),
            ("payload", r#"{"n": 1.10}"#),
        ];
        let _: String = redis.xadd(&stream, "*", &fields).expect("added");
    }
    let message = serving.message();
    assert_eq!(
        (&message["topic"], &message["key"], &message["external_id"]),
        (&json!("payment.settled"), &json!("42"), &json!("e1"))
    );
    let (headers, body) = tokio::time::timeout(PATIENCE, taken.recv()).await.expect("in time").expect("a push");
    assert_eq!(body, r#"{"n": 1.10}"#);
    let value = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    assert_eq!((value("ce-type"), value("webhook-id")), ("payment.settled", message["id"].as_str().expect("an id")));
    assert!(!value("idempotency-key").is_empty() && value("webhook-signature").starts_with("v1,"));

    // In: a webhook, twice; and one that nobody signed.
    let body = r#"{"action":"opened","repository":{"full_name":"octo/repo"}}"#;
    let secret = signature::Secret::bytes(GITHUB_SECRET).expect("a secret");
    for (signed, status) in [
        (signature::github::sign(&secret, body.as_bytes()), 200),
        ("sha256=00".into(), 401),
        (signature::github::sign(&secret, body.as_bytes()), 200),
    ] {
        let request = http.post(format!("{address}/in/github")).header("x-hub-signature-256", signed);
        let request = request.header("x-github-event", "issues").header("x-github-delivery", "d1").body(body);
        assert_eq!(request.send().await.expect("an answer").status().as_u16(), status);
    }
    let message = serving.message();
    assert_eq!((&message["topic"], &message["key"]), (&json!("github.issues.opened"), &json!("octo/repo")));

    // Out: from the table to another stream.
    house.run(&["publish", "orders.placed", r#"{"order_id": 42}"#, "--key", "42"]).ends(0);
    let message = serving.message();
    assert_eq!(message["topic"], "orders.placed");
    let target = format!("{mine}:orders.placed");
    let entries: redis::streams::StreamReadReply = redis
        .xread_options(&[&target], &["0"], &redis::streams::StreamReadOptions::default().block(60_000))
        .expect("an entry");
    let entry = &entries.keys[0].ids[0];
    let field = |name: &str| entry.get::<String>(name).unwrap_or_default();
    assert_eq!(
        (field("ce-id"), field("ce-type"), field("data")),
        (message["id"].as_str().expect("an id").to_owned(), "orders.placed".into(), r#"{"order_id": 42}"#.into())
    );
    assert_eq!(field("ce-source"), "/shop", "the application");

    // What happened is on record.
    let told = house.run(&["status", "--json"]).ends(0).json();
    let source = |name: &str| {
        let sources = told["sources"].as_array().expect("sources");
        sources.iter().find(|source| source["name"] == name).cloned().unwrap_or_else(|| panic!("no {name} in {told}"))
    };
    let counts = |name: &str| ["received", "duplicate", "quarantined"].map(|count| source(name)[count].as_i64());
    assert_eq!(counts("payments"), [Some(1), Some(1), Some(1)]);
    assert_eq!(counts("github"), [Some(1), Some(1), Some(0)]);

    // The endpoint of the push, by hand.
    let tested = house.run(&["webhooks", "test", "crm"]).ends(0);
    assert!(tested.out.contains("+ TAKEN"), "{}", tested.out);
    let (headers, _) = tokio::time::timeout(PATIENCE, taken.recv()).await.expect("in time").expect("a test");
    assert!(headers.contains_key("webhook-signature"));
    assert_eq!(headers["ce-source"], "urn:shop:crm");
    let nobody = house.run(&["webhooks", "test", "nobody"]).ends(3);
    assert!(nobody.err.contains("there are: crm"), "{}", nobody.err);

    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_way_on_sqlite() {
    the_whole_way(Vec::new()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_way_on_postgres() {
    let fresh = Postgres::fresh().await;
    the_whole_way(vec![("DATABASE_URL", fresh.url()), ("POSTBOX_SCHEMA", fresh.schema())]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_put_aside_is_read_again_by_whoever_serves() {
    let house = House { place: Place::new(), variables: Vec::new() };
    house.says(GITHUB);
    let serving = house.serve();
    let address = serving.address();
    let secret = signature::Secret::bytes(GITHUB_SECRET).expect("a secret");
    let http = reqwest::Client::builder().no_proxy().build().expect("a client");
    let request = http.post(format!("{address}/in/github")).header("x-github-event", "issues").body("nonsense");
    let signed = request
        .header("x-github-delivery", "d1")
        .header("x-hub-signature-256", signature::github::sign(&secret, b"nonsense"));
    assert_eq!(signed.send().await.expect("an answer").status().as_u16(), 202);
    let entry = house.run(&["quarantine", "--json"]).ends(0).json();
    let number = entry["id"].to_string();

    // A name that is none is no empty list.
    for (application, name) in [("shop", "nope"), ("other", "github")] {
        let ran = house.run(&["quarantine", "list", "--source", name, "--application", application]).ends(3);
        let why = format!("there is no source {name} of application {application}");
        assert!(ran.err.contains(&why) && ran.err.contains("sources") && ran.out.is_empty(), "{}", ran.err);
    }
    for command in [
        &["quarantine", "--source", "nope", "--json"][..],
        &["sources", "pause", "nope"],
        &["sources", "resume", "nope"],
    ] {
        let ran = house.run(command).ends(3);
        assert!(ran.err.contains("there is no source nope") && ran.err.contains(" sources\n"), "{}", ran.err);
    }
    let ran = house.run(&["quarantine", "list", "--source", "github", "--kind", "lost"]).ends(0);
    assert!(ran.err.contains("nothing that fits is in quarantine"), "{}", ran.err);

    // It is what it was.
    let retry = ["quarantine", "retry", &number, "--reason", "it is mended"];
    let ran = house.run(&retry).ends(1);
    assert!(ran.out.starts_with("x still: "), "{}", ran.out);
    assert!(ran.err.contains(&format!("quarantine show {number}")), "{}", ran.err);
    let ran = house.run(&[&retry[..], &["--json"]].concat());
    assert_eq!((ran.code, &ran.json()["retry_at"]), (1, &Value::Null));

    // The audit says which entry it was, and of which source.
    house.run(&["sources", "pause", "github", "--reason", "a look"]).ends(0);
    let audit = house.run(&["audit", "--json"]).ends(0).json_lines();
    assert_eq!(audit[0]["detail"], json!({"application": "postbox", "source": "github"}));
    assert_eq!((&audit[1]["detail"]["quarantine"], &audit[1]["detail"]["source"]), (&entry["id"], &json!("github")));
    let table = house.run(&["audit"]).ends(0).out;
    let what = format!("entry {number}, source github");
    assert!(table.contains("WHAT") && table.matches(&what).count() == 2, "{table}");
    house.run(&["sources", "resume", "github", "--reason", "seen"]).ends(0);

    // Nobody is there: what was asked for is on record, and waits.
    assert_eq!(serving.terminate(), 0);
    let ran = house.run(&retry).ends(0);
    assert!(ran.out.starts_with(". it waits to be read again; by ana, audit "), "{}", ran.out);
    assert!(ran.err.contains("nobody has done it yet") && ran.err.contains("quarantine show"), "{}", ran.err);
    assert!(house.run(&["quarantine", "show", &number, "--json"]).ends(0).json()["retry_at"].is_string());
}

#[test]
fn a_pipe_that_nobody_reads_is_a_failure() {
    let house = House { place: Place::new(), variables: Vec::new() };
    house.says("http = \"127.0.0.1:0\"\n[[relay]]\nname = \"pipe\"\npattern = \">\"\nkind = \"stdout\"\n");
    let mut command = house.command(&["serve"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    // The reader is gone before anything is written.
    drop(child.stdout.take());
    let err = lines(child.stderr.take().expect("its words"));
    let serving = Serving { child, out: channel().1, err };
    serving.address();
    house.run(&["publish", "orders.placed", "1"]).ends(0);
    let begun = std::time::Instant::now();
    loop {
        let row = house.run(&["list", "--json"]).ends(0).json();
        if let Some(error) = row["last_error"].as_str() {
            assert!(error.contains("standard output takes nothing"), "{error}");
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "it has not failed: {row}");
    }
    assert_eq!(serving.terminate(), 0);
}

#[test]
fn two_cannot_listen_at_one_address() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address");
    let house = House { place: Place::new(), variables: Vec::new() };
    house.says(&format!("http = \"{address}\"\n[[relay]]\nname = \"pipe\"\npattern = \">\"\nkind = \"stdout\"\n"));
    let ran = house.run(&["serve"]).ends(1);
    assert!(ran.err.contains(&format!("could not listen at {address}")), "{}", ran.err);
}

#[test]
fn a_source_that_cannot_be_read_needs_somebody() {
    let house = House { place: Place::new(), variables: Vec::new() };
    house.run(&["migrate", "up"]).ends(0);
    // Nobody listens at port 1.
    house.says(
        "[[source]]\nname = \"payments\"\nkind = \"redis\"\nurl = \"redis://127.0.0.1:1\"\nstream = \"p\"\ngroup = \"g\"\n",
    );
    let serving = house.serve();
    let begun = std::time::Instant::now();
    let told = loop {
        let told = house.run(&["status", "--json"]).ends(0).json();
        if told["sources"][0]["state"] == "failing" {
            break told;
        }
        assert!(begun.elapsed() < PATIENCE, "it says that it fails: {told}");
    };
    assert_eq!(told["needs_you"], 1, "{told}");
    let words = house.run(&["status"]).ends(0).out;
    assert!(words.contains("! 1 needs you") && words.contains("failing  payments: "), "{words}");
    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_not_ready_while_the_database_is_down() {
    let mut server = Server::start();
    let house = House { place: Place::new(), variables: vec![("DATABASE_URL", server.url())] };
    house.run(&["migrate", "up"]).ends(0);
    house.says("http = \"127.0.0.1:0\"\n[[relay]]\nname = \"pipe\"\npattern = \">\"\nkind = \"stdout\"\n");
    let serving = house.serve();
    let address = serving.address();
    let http = reqwest::Client::builder().no_proxy().build().expect("a client");
    let ready = async || {
        let answer = http.get(format!("{address}/ready")).send().await.expect("an answer");
        (answer.status().as_u16(), answer.json::<Value>().await.expect("JSON"))
    };
    assert_eq!(ready().await, (200, json!({"ready": true})));
    server.crash();
    let (status, told) = ready().await;
    let reason = told["reasons"][0].as_str().unwrap_or_default();
    assert!(status == 503 && reason.starts_with("the database did not answer"), "{status} {told}");
    let health = http.get(format!("{address}/health")).send().await.expect("an answer");
    assert_eq!(health.status().as_u16(), 200, "the process lives");
    server.up();
    let begun = std::time::Instant::now();
    while ready().await.0 != 200 {
        assert!(begun.elapsed() < PATIENCE, "it is ready again when the database is back");
    }
    assert_eq!(serving.terminate(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_turns_senders_away_and_waits_for_what_runs() {
    // A program that takes its time.
    let (begun, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let slow = {
        let (begun, go_on) = (begun.clone(), go_on.clone());
        move || async move {
            begun.notify_one();
            go_on.notified().await;
        }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let program = format!("http://{}/", listener.local_addr().expect("an address"));
    let routes = axum::Router::new().route("/", axum::routing::post(slow));
    tokio::spawn(async move { axum::serve(listener, routes).await });
    let house = House { place: Place::new(), variables: Vec::new() };
    house.says(&format!(
        r#"
{GITHUB}
[[push]]
name = "slow"
pattern = "orders.>"
url = "{program}"
operation = true
"#
    ));
    let serving = house.serve();
    let address = serving.address();
    house.run(&["publish", "orders.placed", "1"]).ends(0);
    tokio::time::timeout(PATIENCE, begun.notified()).await.expect("the push has begun");
    serving.tell_to_stop();
    let http = reqwest::Client::builder().no_proxy().build().expect("a client");
    let secret = signature::Secret::bytes(GITHUB_SECRET).expect("a secret");
    let mut tries = 0;
    let turned_away = loop {
        let request = http.post(format!("{address}/in/github")).header("x-github-event", "ping").body("{}");
        let request = request.header("x-hub-signature-256", signature::github::sign(&secret, b"{}"));
        let answer = request.header("x-github-delivery", format!("d{tries}")).send().await.expect("an answer");
        if answer.status() != 200 {
            break answer;
        }
        tries += 1;
    };
    assert_eq!(turned_away.status(), 503);
    assert!(turned_away.headers().contains_key("retry-after"));
    let ready = http.get(format!("{address}/ready")).send().await.expect("an answer");
    assert_eq!(ready.status(), 503);
    assert_eq!(ready.json::<Value>().await.expect("JSON")["reasons"], json!(["it is stopping"]));
    go_on.notify_one();
    assert_eq!(serving.end(), 0);
    let row = house.run(&["list", "topic:orders.>", "--json"]).ends(0).json();
    assert_eq!(row["state"], "succeeded", "its end was waited for: {row}");
}
