//! Signatures and CloudEvents against the packages that others use, both ways, and pushes to a FastAPI application.
//! `scripts/webhook-interop` installs the packages and runs this.

use std::collections::BTreeMap;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use jiff::Timestamp;
use postbox::admin::Filter;
use postbox::lifecycle::State as Standing;
use postbox::signature::{Secret, TOLERANCE, github, standard, stripe};
use postbox::sink::{EnvelopeStyle, webhook_to};
use postbox::{Envelope, Router, Sqlite, push, relay};
use postbox_testkit::{Fresh, Testable};
use serde_json::{Value, json};

const WHSEC: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const OTHER: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
/// Bodies that a library which parses and prints would change.
const BODIES: [&str; 4] = [r#"{"n": 1.10,  "text": "é ☃ \u00e9"}"#, "{}", "[1e5,12345678901234567890]", "\"\\n\""];

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name}: run scripts/webhook-interop"))
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(name)
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Theirs {
    PyPi,
    Npm,
}

impl Theirs {
    /// What their packages answer.
    fn ask(self, questions: &[Value]) -> Vec<Value> {
        use std::io::Write;
        let mut command = match self {
            Theirs::PyPi => Command::new(variable("POSTBOX_TEST_PYTHON")),
            Theirs::Npm => Command::new("node"),
        };
        let script = if self == Theirs::PyPi { "tests/interop/theirs.py" } else { "tests/interop/theirs.mjs" };
        let command = command.arg(file(script)).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it runs");
        let mut stdin = child.stdin.take().expect("its input");
        stdin.write_all(&serde_json::to_vec(questions).expect("JSON")).expect("it reads");
        drop(stdin);
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{self:?}: {}", output.status);
        let answers: Vec<Value> = serde_json::from_slice(&output.stdout).expect("its answers");
        assert_eq!(answers.len(), questions.len());
        answers
    }

    /// Whom they have packages for.
    fn schemes(self) -> &'static [&'static str] {
        match self {
            Theirs::PyPi => &["standard", "stripe"],
            Theirs::Npm => &["standard", "github", "stripe"],
        }
    }
}

/// A secret as the scheme reads it.
fn secret(scheme: &str, text: &str) -> Secret {
    if scheme == "standard" { Secret::standard(text) } else { Secret::bytes(text) }.expect("a secret")
}

/// The headers of a signed body.
fn sign(scheme: &str, secrets: &[&str], now: Timestamp, body: &str) -> Value {
    let secrets: Vec<Secret> = secrets.iter().map(|text| secret(scheme, text)).collect();
    match scheme {
        "standard" => json!({
            "webhook-id": "msg_1",
            "webhook-timestamp": now.as_second().to_string(),
            "webhook-signature": standard::sign(&secrets, "msg_1", now, body.as_bytes()),
        }),
        "github" => json!({ "x-hub-signature-256": github::sign(&secrets[0], body.as_bytes()) }),
        _ => json!({ "stripe-signature": stripe::sign(&secrets, now, body.as_bytes()) }),
    }
}

fn verify(scheme: &str, text: &str, now: Timestamp, signature: &str, body: &str) -> bool {
    let (secrets, body) = ([secret(scheme, text)], body.as_bytes());
    let time = now.as_second().to_string();
    let verdict = match scheme {
        "standard" => standard::verify(&secrets, "msg_1", &time, signature, body, now, TOLERANCE),
        "github" => github::verify(&secrets, signature, body),
        _ => stripe::verify(&secrets, signature, body, now, TOLERANCE),
    };
    verdict.is_ok()
}

fn signatures_hold(theirs: Theirs) {
    let now = Timestamp::now();
    let stale = Timestamp::from_second(now.as_second() - 330).expect("a time");
    let mut questions = Vec::new();
    for scheme in theirs.schemes() {
        let rotating: &[&str] = if *scheme == "github" { &[WHSEC] } else { &[OTHER, WHSEC] };
        for body in BODIES {
            let question = |headers: Value, body: &str, secret: &str| json!({ "do": "verify", "scheme": scheme, "secret": secret, "headers": headers, "body": body });
            let ours = sign(scheme, &[WHSEC], now, body);
            let good = [question(ours.clone(), body, WHSEC), question(sign(scheme, rotating, now, body), body, WHSEC)];
            let mut bad = vec![question(ours.clone(), &format!("{body} "), WHSEC), question(ours, body, OTHER)];
            if *scheme != "github" {
                bad.push(question(sign(scheme, &[WHSEC], stale, body), body, WHSEC));
            }
            questions.extend(good.map(|question| (question, true)));
            questions.extend(bad.into_iter().map(|question| (question, false)));
        }
    }
    let asked: Vec<Value> = questions.iter().map(|(question, _)| question.clone()).collect();
    for ((question, good), answer) in questions.iter().zip(theirs.ask(&asked)) {
        assert_eq!(answer == "good", *good, "{theirs:?}: {question}: {answer}");
    }

    // What they sign is good here; with another body or secret it is not.
    let mut asked = Vec::new();
    for scheme in theirs.schemes() {
        for body in BODIES {
            let time = now.as_second();
            asked.push(json!({ "do": "sign", "scheme": scheme, "secret": WHSEC, "id": "msg_1", "timestamp": time, "body": body }));
        }
    }
    for (question, answer) in asked.iter().zip(theirs.ask(&asked)) {
        let text = |name: &str| question[name].as_str().expect("a text");
        let (scheme, body, signature) = (text("scheme"), text("body"), answer.as_str().expect("a signature"));
        assert!(verify(scheme, WHSEC, now, signature, body), "{theirs:?}: {question}: {signature}");
        assert!(!verify(scheme, OTHER, now, signature, body), "{theirs:?}: {question}: {signature}");
        assert!(!verify(scheme, WHSEC, now, signature, &format!("{body} ")), "{theirs:?}: {question}: {signature}");
    }
}

#[test]
fn signatures_hold_against_the_packages_of_pypi() {
    signatures_hold(Theirs::PyPi);
}

#[test]
fn signatures_hold_against_the_packages_of_npm() {
    signatures_hold(Theirs::Npm);
}

type Got = Arc<Mutex<Vec<(BTreeMap<String, String>, String)>>>;

async fn receive(State(got): State<Got>, request: Request) {
    let (head, body) = request.into_parts();
    let text = |value: &axum::http::HeaderValue| value.to_str().expect("ASCII").to_owned();
    let headers = head.headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect();
    let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body").to_vec();
    got.lock().expect("what it got").push((headers, String::from_utf8(body).expect("UTF-8")));
}

/// Waits until nothing is left to do.
async fn ended(fresh: &Fresh<Sqlite>, count: usize) -> Vec<postbox::admin::DeliveryRow> {
    let admin = fresh.postbox.admin();
    let begin = Instant::now();
    loop {
        let rows = admin.list(&Filter::default(), 1000).await.expect("list");
        let open = rows.iter().any(|row| matches!(row.state, Standing::Pending | Standing::Running));
        if rows.len() == count && !open {
            return rows;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{rows:#?}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_are_sent_are_read_by_the_packages_for_cloudevents() {
    let got = Got::default();
    let app = axum::Router::new().fallback(axum::routing::any(receive)).with_state(got.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/", listener.local_addr().expect("its address"));
    tokio::spawn(async move { axum::serve(listener, app).await });
    let fresh = Sqlite::fresh().await;
    let sink = |style| webhook_to(&url).secret(WHSEC).allow("127.0.0.1").envelope(style).source("/shop");
    let router = Router::new()
        .relay("orders.*", relay(sink(EnvelopeStyle::CloudEventsBinary)).named("binary"))
        .relay("orders.*", relay(sink(EnvelopeStyle::CloudEventsStructured)).named("structured"));
    let worker = fresh.postbox.worker(router).start().await.expect("started");
    let payload = json!({ "text": "é ☃", "n": 1.5, "list": [1, null] });
    let draft = Envelope::json("orders.placed", &payload).expect("a draft").key("clé 100 %\"");
    let draft =
        draft.correlation_id("corr 1").header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let message = fresh.postbox.publish_now([draft]).await.expect("published")[0].id.to_string();
    ended(&fresh, 2).await;
    worker.stop(None).await.expect("stopped");
    let got = std::mem::take(&mut *got.lock().expect("what it got"));
    let event = |(headers, body): &(_, _)| json!({ "do": "cloudevent", "headers": headers, "body": body });
    let questions: Vec<Value> = got.iter().map(event).collect();
    assert_eq!(questions.len(), 2);
    for theirs in [Theirs::PyPi, Theirs::Npm] {
        for (answer, (headers, _)) in theirs.ask(&questions).iter().zip(&got) {
            let attributes = &answer["attributes"];
            // The package of npm does not decode what the binding says is encoded in headers.
            let encoded = theirs == Theirs::Npm && headers.contains_key("ce-id");
            let (key, correlation) =
                if encoded { ("cl%C3%A9%20100%20%25%22", "corr%201") } else { ("clé 100 %\"", "corr 1") };
            for (name, value) in [
                ("id", message.as_str()),
                ("type", "orders.placed"),
                ("source", "/shop"),
                ("specversion", "1.0"),
                ("partitionkey", key),
                ("correlationid", correlation),
                ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
            ] {
                assert_eq!(attributes[name], value, "{theirs:?}, {name}: {answer}");
            }
            assert_eq!(answer["data"], payload, "{theirs:?}: {answer}");
        }
    }
}

/// The application of examples/fastapi; dropped, it ends.
struct Application {
    child: Child,
    url: String,
    _folder: tempfile::TempDir,
}

impl Drop for Application {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Application {
    fn start() -> Application {
        Application::with("http", &[])
    }

    fn with(scheme: &str, more: &[&str]) -> Application {
        let folder = tempfile::tempdir().expect("a folder");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        let mut command = Command::new(variable("POSTBOX_TEST_PYTHON"));
        let command = command
            .args(["-m", "uvicorn", "app:app", "--log-level", "warning", "--port", &port.to_string()])
            .args(more)
            .current_dir(file("examples/fastapi"))
            .env("CRM_SECRET", WHSEC)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("CRM_DATABASE", folder.path().join("crm.db"));
        let child = command.spawn().expect("it starts");
        let begin = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begin.elapsed() < Duration::from_secs(60), "it does not listen");
            std::thread::yield_now();
        }
        Application { child, url: format!("{scheme}://localhost:{port}"), _folder: folder }
    }

    fn report(&self) -> Value {
        let script = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())";
        let mut python = Command::new(variable("POSTBOX_TEST_PYTHON"));
        let output = python.args(["-c", script, &format!("{}/report", self.url)]).output().expect("it runs");
        serde_json::from_slice(&output.stdout).expect("a report")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fastapi_application_handles_what_is_pushed() {
    let application = Application::start();
    let fresh = Sqlite::fresh().await;
    let to = |path: &str| push(format!("{}{path}", application.url)).secret(WHSEC);
    let charge = to("/charges").reconcile(format!("{}/charges/find", application.url));
    let quick = Duration::from_millis(10);
    let router = Router::new()
        .on("orders.placed", to("/events").handler().named("crm").backoff(quick, quick))
        .on("orders.placed", charge.operation().named("charge").quiet_period(Duration::ZERO))
        // Somebody who does not know the secret.
        .on("orders.placed", push(format!("{}/events", application.url)).secret(OTHER).handler().named("stranger"));
    let worker = fresh.postbox.worker(router).start().await.expect("started");
    let drafts = (1..=20).map(|n| {
        // One has no amount, and at one the application fails after it has charged.
        let order =
            json!({ "order_id": n, "cents": if n == 7 { json!(null) } else { json!(n * 100) }, "crash": n == 9 });
        Envelope::json("orders.placed", &order).expect("a draft").key(n.to_string())
    });
    fresh.postbox.publish_now(drafts).await.expect("published");
    // A doubt is asked about, and ends: nothing is left in doubt.
    let begin = Instant::now();
    let rows = loop {
        let rows = ended(&fresh, 60).await;
        if rows.iter().all(|row| row.state != Standing::InDoubt) {
            break rows;
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{rows:#?}");
    };
    worker.stop(None).await.expect("stopped");
    for row in &rows {
        let seven = row.key.as_deref() == Some("7");
        let dead = seven || row.subscription == "stranger";
        assert_eq!(row.state, if dead { Standing::Dead } else { Standing::Succeeded }, "{row:?}");
        assert_eq!(row.attempt, 1, "{row:?}");
        let words = row.last_error.clone().unwrap_or_default();
        if row.subscription == "stranger" {
            assert!(words.contains("401 Unauthorized: ") && words.contains("the signature is not good"), "{words}");
        } else if seven {
            assert!(words.contains("422 Unprocessable") && words.contains("order 7 has no amount"), "{words}");
        }
    }
    let expected: Vec<Value> = (1..=20).filter(|n| *n != 7).map(|n| json!([n, n * 100])).collect();
    assert_eq!(application.report(), json!({ "orders": expected, "charges": expected }), "each once");
}

/// Makes an authority, and a certificate of it for `localhost`.
fn certificates(folder: &Path) {
    let config = "subjectAltName=DNS:localhost\nbasicConstraints=critical,CA:FALSE\n";
    std::fs::write(folder.join("extensions"), config).expect("a file");
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    for line in [
        format!("req -x509 {key} -keyout ca.key -out ca.pem -subj /CN=authority -days 2"),
        format!("req {key} -keyout key.pem -out request.pem -subj /CN=localhost"),
        "x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out cert.pem -extfile extensions"
            .to_owned(),
    ] {
        let made = Command::new("openssl").args(line.split(' ')).current_dir(folder).output().expect("openssl runs");
        assert!(made.status.success(), "{line}: {}", String::from_utf8_lossy(&made.stderr));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_checked() {
    let folder = tempfile::tempdir().expect("a folder");
    certificates(folder.path());
    let path = |name: &str| folder.path().join(name).display().to_string();
    let application =
        Application::with("https", &["--ssl-keyfile", &path("key.pem"), "--ssl-certfile", &path("cert.pem")]);
    let sink = || webhook_to(format!("{}/nowhere", application.url)).secret(WHSEC).allow_private_addresses();
    let authority = std::fs::read(folder.path().join("ca.pem")).expect("the authority");
    let trusted = sink().root_certificate(authority.clone()).test().await.expect("it can be used");
    assert_eq!(trusted.status, Some(404), "{trusted:?}");
    let unknown = sink().test().await.expect("it can be used");
    assert!(unknown.status.is_none() && unknown.words.contains("certificate"), "{unknown:?}");
    // The name has to be the certificate's.
    let elsewhere = application.url.replace("localhost", "127.0.0.1");
    let other = webhook_to(elsewhere).allow_private_addresses().root_certificate(authority).test().await;
    let other = other.expect("it can be used");
    assert!(other.status.is_none() && other.words.contains("certificate"), "{other:?}");
}
