//! Webhooks out and pushes, through the engine, against servers on loopback.

use std::collections::HashMap;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use postbox::admin::{DeliveryDetail, Filter};
use postbox::lifecycle::State as Standing;
use postbox::signature::{Secret, TOLERANCE, standard};
use postbox::sink::{EnvelopeStyle, WebhookSink, webhook_to};
use postbox::source::webhook;
use postbox::testing::{Arrived, SinkBench, sink_suite};
use postbox::{Envelope, Payload, Router, Worker, handler, push, relay};
use postbox_testkit::{Fresh, Testable, deliveries, on_both_stores};
use serde_json::{Value, json};

on_both_stores!(
    the_suite_for_sinks,
    an_endpoint_that_is_gone_pauses_its_relay,
    what_an_endpoint_answers_is_kept,
    from_one_postbox_into_another_and_back,
    a_push_does_what_its_status_says,
    an_operation_is_called_once_and_its_doubts_stay,
    what_was_not_sent_is_sent_again_under_the_same_key,
    a_doubt_is_asked_about,
);

#[test]
fn planted_bugs_are_caught() {
    postbox_testkit::planted::each_is_caught(module_path!());
}

const WHSEC: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

#[derive(Debug, Clone)]
struct Got {
    path: String,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Got {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("ASCII"))
    }

    fn is_signed(&self) -> bool {
        let secrets = [Secret::standard(WHSEC).expect("a secret")];
        let header = |name| self.header(name);
        let (id, time, signature) = (header(standard::ID), header(standard::TIMESTAMP), header(standard::SIGNATURE));
        let now = jiff::Timestamp::now();
        standard::verify(&secrets, id, time, signature, &self.body, now, TOLERANCE).is_ok()
    }
}

/// Whoever is called. `/400` answers 400 and so on; `/silence` takes the request and says nothing more; `/count/N`
/// fails N times with 500.
#[derive(Clone, Default)]
struct Remote {
    got: Arc<Mutex<Vec<Got>>>,
    mute: Arc<AtomicBool>,
    finds: Arc<Mutex<Option<&'static str>>>,
}

impl Remote {
    async fn start(&self) -> String {
        self.start_at("127.0.0.1:0").await
    }

    async fn start_at(&self, address: &str) -> String {
        let app = axum::Router::new().fallback(any(called)).with_state(self.clone());
        let listener = tokio::net::TcpListener::bind(address).await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("its address"));
        tokio::spawn(async move { axum::serve(listener, app).await });
        url
    }

    fn got(&self) -> Vec<Got> {
        self.got.lock().expect("what it got").clone()
    }

    /// Of this path only.
    fn of(&self, path: &str) -> Vec<Got> {
        self.got().into_iter().filter(|got| got.path == path).collect()
    }
}

async fn called(State(remote): State<Remote>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let path = head.uri.path().to_owned();
    let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body").to_vec();
    if remote.mute.load(Ordering::SeqCst) {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if path == "/find" {
        let finds = remote.finds.lock().expect("what it finds");
        return finds.map_or_else(|| StatusCode::NOT_FOUND.into_response(), IntoResponse::into_response);
    }
    let before = remote.of(&path).len();
    remote.got.lock().expect("what it got").push(Got { path: path.clone(), headers: head.headers, body });
    match path.rsplit('/').next().unwrap_or_default() {
        "silence" => std::future::pending().await,
        "long" => "long ".repeat(2000).into_response(),
        failures if path.starts_with("/count/") => {
            let failures: usize = failures.parse().expect("a number");
            if before < failures { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::OK }.into_response()
        }
        "hasty" if before == 0 => (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "1")]).into_response(),
        "gone" if before > 1 => StatusCode::GONE.into_response(),
        status => match status.parse::<u16>().ok().and_then(|s| StatusCode::from_u16(s).ok()) {
            Some(status) => (status, "its own words").into_response(),
            None => "thank you".into_response(),
        },
    }
}

async fn start<Db: Testable>(fresh: &Fresh<Db>, router: Router<Db>) -> Worker<Db> {
    fresh.postbox.worker(router).poll_interval(Duration::from_millis(20)).start().await.expect("started")
}

/// So many deliveries, once all of them are so; each by its subscription.
async fn until<Db: Testable>(
    fresh: &Fresh<Db>,
    count: usize,
    so: impl Fn(Standing) -> bool,
) -> HashMap<String, DeliveryDetail> {
    let all = deliveries(fresh, count, so).await;
    all.into_iter().map(|detail| (detail.row.subscription.clone(), detail)).collect()
}

fn ended(state: Standing) -> bool {
    !matches!(state, Standing::Pending | Standing::Running)
}

fn draft(topic: &str) -> postbox::Draft {
    Envelope::json(topic, &json!({ "n": 1 })).expect("a draft").key("k")
}

struct Bench {
    remote: Remote,
    url: String,
}

impl SinkBench for Bench {
    type Sink = WebhookSink;

    async fn sink(&self) -> WebhookSink {
        webhook_to(&self.url).secret(WHSEC).allow_private_addresses()
    }

    async fn arrived(&self) -> Vec<Arrived> {
        let got = std::mem::take(&mut *self.remote.got.lock().expect("what it got"));
        let arrived = got.into_iter().map(|got| Arrived {
            id: got.header("webhook-id").parse().expect("an id"),
            topic: got.header("ce-type").into(),
            key: Some(got.header("ce-partitionkey")).filter(|key| !key.is_empty()).map(str::to_owned),
            payload: got.body,
        });
        arrived.collect()
    }

    async fn answers(&self, does: bool) {
        self.remote.mute.store(!does, Ordering::SeqCst);
    }
}

async fn the_suite_for_sinks<Db: Testable>() {
    let fresh = Db::fresh().await;
    let remote = Remote::default();
    let bench = Bench { url: remote.start().await, remote };
    sink_suite(&bench, &fresh.postbox).await;
}

async fn an_endpoint_that_is_gone_pauses_its_relay<Db: Testable>() {
    let fresh = Db::fresh().await;
    let remote = Remote::default();
    let url = remote.start().await;
    let sink = webhook_to(format!("{url}/gone")).secret(WHSEC).allow("127.0.0.1").at_once(1);
    let worker = start(&fresh, Router::new().relay("orders.*", relay(sink).named("partner"))).await;
    fresh.postbox.publish_now((0..5).map(|_| draft("orders.placed"))).await.expect("published");
    let admin = fresh.postbox.admin();
    let paused = async {
        loop {
            let sinks = admin.sinks().await.expect("sinks");
            if sinks.iter().any(|s| s.state == "paused" && s.sent == 2) {
                break sinks;
            }
            tokio::task::yield_now().await;
        }
    };
    let sinks = tokio::time::timeout(Duration::from_secs(60), paused).await.expect("it is paused");
    assert_eq!((sinks[0].kind.as_str(), sinks[0].lag, sinks[0].dead), ("webhook", 3, 0), "{sinks:?}");
    let audit = admin.audit(10).await.expect("the audit");
    assert!(audit.iter().any(|entry| format!("{entry:?}").contains("410 Gone")), "{audit:?}");
    worker.stop(None).await.expect("stopped");
    assert_eq!(remote.got().len(), 3, "nothing was sent after that");
}

/// With the attempt, up to 4 KiB; unless it is not wanted, or there is nothing to keep.
async fn what_an_endpoint_answers_is_kept<Db: Testable>() {
    let fresh = Db::fresh().await;
    let remote = Remote::default();
    let url = remote.start().await;
    let sink = |path: &str| webhook_to(format!("{url}{path}")).allow("127.0.0.1");
    let router = Router::new()
        .relay("orders.*", relay(sink("/orders")).named("kept"))
        .relay("orders.*", relay(sink("/orders").keep_responses(false)).named("not-kept"))
        .relay("orders.*", relay(sink("/long")).named("long"))
        .relay("orders.*", relay(sink("/204")).named("empty"))
        .on("orders.*", push(format!("{url}/orders")).handler().named("pushed"))
        .on("orders.*", push(format!("{url}/orders")).keep_responses(false).handler().named("not-kept-pushed"))
        .on("orders.*", push(format!("{url}/orders")).keep_responses(false).operation().named("charge"));
    let worker = start(&fresh, router).await;
    fresh.postbox.publish_now([draft("orders.placed")]).await.expect("published");
    let ends = until(&fresh, 7, |state| state == Standing::Succeeded).await;
    worker.stop(None).await.expect("stopped");
    let thanks = Some(json!({ "status": 200, "body": "thank you" }));
    let long = Some(json!({ "status": 200, "body": "long ".repeat(2000)[..4096].trim() }));
    for (name, kept) in [
        ("kept", thanks.clone()),
        ("not-kept", None),
        ("long", long),
        ("empty", None),
        ("pushed", thanks.clone()),
        ("not-kept-pushed", None),
        ("charge", thanks),
    ] {
        let attempts = &ends[name].attempts;
        assert_eq!((attempts.len(), &attempts[0].receipt), (1, &kept), "{name}");
    }
}

/// An order's number, where its payment came from, and what it belongs to.
type Seen = (u64, Option<String>, String);

/// Out of one postbox, into another, and from there back: each message is handled once on each side.
async fn from_one_postbox_into_another_and_back<Db: Testable>() {
    let (shop, bank) = (Db::fresh().await, Db::fresh().await);
    let serve = async |fresh: &Fresh<Db>| {
        let app = webhook("partner").standard([WHSEC]).routes(&fresh.postbox).await.expect("routes");
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/in/partner", listener.local_addr().expect("its address"));
        tokio::spawn(async move { axum::serve(listener, app).await });
        url
    };
    let (to_shop, to_bank) = (serve(&shop).await, serve(&bank).await);
    let sink = |url: &str| webhook_to(url).secret(WHSEC).allow("127.0.0.0/8");
    let paid = |Payload(order): Payload<Value>| async move {
        postbox::Done::new().then(Envelope::json("orders.paid", &order).map(|d| d.key("k")))
    };
    let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
    let ship = {
        let seen = seen.clone();
        move |envelope: Envelope| {
            let seen = seen.clone();
            async move {
                let order: Value = envelope.decode().expect("JSON");
                let number = order["n"].as_u64().expect("a number");
                seen.lock().expect("seen").push((number, envelope.source.clone(), envelope.correlation()));
            }
        }
    };
    let shop_side = Router::new()
        .relay("orders.placed", relay(sink(&to_bank)).named("to-bank"))
        .on("orders.paid", handler(ship).named("ship"));
    // Structured one way, binary the other.
    let back = sink(&to_shop).envelope(EnvelopeStyle::CloudEventsStructured).source("/bank");
    let bank_side = Router::new()
        .on("orders.placed", handler(paid).named("pay"))
        .relay("orders.paid", relay(back).named("to-shop"));
    let workers = (start(&shop, shop_side).await, start(&bank, bank_side).await);
    let drafts = (0..50).map(|n| {
        let draft = Envelope::json("orders.placed", &json!({ "n": n })).expect("a draft");
        draft.key(format!("k{}", n % 7)).correlation_id(format!("order {n}"))
    });
    shop.postbox.publish_now(drafts).await.expect("published");
    // Each order has a delivery out and one back in; each payment one in and one out.
    until(&shop, 100, |state| state == Standing::Succeeded).await;
    until(&bank, 100, |state| state == Standing::Succeeded).await;
    let mut seen = seen.lock().expect("seen").clone();
    seen.sort();
    let expected: Vec<_> = (0..50).map(|n| (n, Some("/bank".to_owned()), format!("order {n}"))).collect();
    assert_eq!(seen, expected);
    workers.0.stop(None).await.expect("stopped");
    workers.1.stop(None).await.expect("stopped");
}

async fn a_push_does_what_its_status_says<Db: Testable>() {
    let fresh = Db::fresh().await;
    let remote = Remote::default();
    let url = remote.start().await;
    let to = |path: &str| push(format!("{url}{path}")).secret(WHSEC);
    let quick = Duration::from_millis(10);
    let router = Router::new()
        .on("orders.placed", to("/crm"))
        .on("orders.placed", to("/422").handler().named("refuses"))
        .on("orders.placed", to("/410").handler().named("gone"))
        .on("orders.placed", to("/count/2").handler().named("recovers").backoff(quick, quick))
        .on("orders.placed", to("/hasty").handler().named("hasty").backoff(quick, quick))
        .on(
            "orders.placed",
            to("/silence")
                .timeout(Duration::from_millis(200))
                .handler()
                .named("silent")
                .max_attempts(2)
                .backoff(quick, quick),
        );
    let worker = start(&fresh, router).await;
    let published = fresh.postbox.publish_now([draft("orders.placed")]).await.expect("published");
    let ends = until(&fresh, 6, ended).await;
    let name = format!("push:{}", url.strip_prefix("http://").expect("a host"));
    let end = |name: &str| (ends[name].row.state, ends[name].attempts.len());
    assert_eq!(end(&name), (Standing::Succeeded, 1));
    assert_eq!(end("refuses"), (Standing::Dead, 1));
    assert_eq!(end("gone"), (Standing::Dead, 1));
    assert_eq!(end("recovers"), (Standing::Succeeded, 3));
    assert_eq!(end("hasty"), (Standing::Succeeded, 2));
    assert_eq!(end("silent"), (Standing::Dead, 2), "a timeout is tried again");
    let error = |name: &str| ends[name].attempts[0].error.clone().unwrap_or_default();
    assert!(error("refuses").contains("answered 422 Unprocessable Entity: its own words"), "{}", error("refuses"));
    assert!(error("silent").contains("did not answer within 200ms"), "{}", error("silent"));
    let first = |name: &str| ends[name].attempts[0].finished_at.expect("an end");
    let second = ends["hasty"].attempts[1].started_at;
    assert!(second.duration_since(first("hasty")).as_millis() >= 900, "the wait that was asked for is kept");
    worker.stop(None).await.expect("stopped");
    for got in remote.got() {
        assert!(got.is_signed(), "{got:?}");
        assert_eq!(got.header("webhook-id"), published[0].id.to_string());
        assert_eq!((got.header("ce-type"), got.body.as_slice()), ("orders.placed", &br#"{"n":1}"#[..]));
        assert_eq!(got.header("idempotency-key"), "", "an operation has one");
    }
}

async fn an_operation_is_called_once_and_its_doubts_stay<Db: Testable>() {
    let fresh = Db::fresh().await;
    let remote = Remote::default();
    let url = remote.start().await;
    let to = |path: &str| {
        let to = push(format!("{url}{path}")).secret(WHSEC).timeout(Duration::from_millis(500)).operation();
        to.max_attempts(4)
    };
    let quick = Duration::from_millis(10);
    let router = Router::new()
        .on("orders.placed", to("/charge"))
        .on("orders.placed", to("/422").named("refuses"))
        .on("orders.placed", to("/500").named("fails"))
        .on("orders.placed", to("/503").named("busy"))
        .on("orders.placed", to("/silence").named("silent"))
        .on("orders.placed", to("/hasty").named("hasty").backoff(quick, quick));
    let worker = start(&fresh, router).await;
    fresh.postbox.publish_now([draft("orders.placed")]).await.expect("published");
    let ends = until(&fresh, 6, ended).await;
    worker.stop(None).await.expect("stopped");
    let name = format!("push:{}", url.strip_prefix("http://").expect("a host"));
    let end = |name: &str| (ends[name].row.state, ends[name].attempts.len());
    assert_eq!(end(&name), (Standing::Succeeded, 1));
    assert_eq!(ends[&name].attempts[0].receipt, Some(json!({ "status": 200, "body": "thank you" })));
    assert_eq!(end("refuses"), (Standing::Dead, 1));
    for doubtful in ["fails", "busy", "silent"] {
        assert_eq!(end(doubtful), (Standing::InDoubt, 1), "{doubtful}");
    }
    assert_eq!(end("hasty"), (Standing::Succeeded, 2), "429 says that it was not done");
    for path in ["/charge", "/422", "/500", "/503", "/silence"] {
        assert_eq!(remote.of(path).len(), 1, "{path}: nothing is called twice");
    }
    let keys: Vec<String> = remote.of("/hasty").iter().map(|got| got.header("idempotency-key").to_owned()).collect();
    assert_eq!(keys, [ends["hasty"].idempotency_key.clone(), ends["hasty"].idempotency_key.clone()]);
    assert_eq!(remote.of("/charge")[0].header("idempotency-key"), ends[&name].idempotency_key);
    assert!(remote.got().iter().all(Got::is_signed));
}

async fn what_was_not_sent_is_sent_again_under_the_same_key<Db: Testable>() {
    let fresh = Db::fresh().await;
    // Nobody listens there yet.
    let reserved = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = reserved.local_addr().expect("its address").to_string();
    drop(reserved);
    let quick = Duration::from_millis(100);
    let charge = push(format!("http://{address}/charge")).operation().named("charge");
    let router = Router::new().on("orders.placed", charge.max_attempts(1000).backoff(quick, quick));
    let worker = start(&fresh, router).await;
    fresh.postbox.publish_now([draft("orders.placed")]).await.expect("published");
    let admin = fresh.postbox.admin();
    let failed = async {
        loop {
            let rows = admin.list(&Filter::default(), 10).await.expect("list");
            let attempts = admin.show(rows[0].id).await.expect("show").attempts;
            if attempts.iter().any(|attempt| attempt.outcome.as_deref() == Some("failed")) {
                break;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), failed).await.expect("nobody took the call");
    let remote = Remote::default();
    remote.start_at(&address).await;
    let ends = until(&fresh, 1, ended).await;
    worker.stop(None).await.expect("stopped");
    let charged = &ends["charge"];
    assert_eq!(charged.row.state, Standing::Succeeded);
    assert!(charged.attempts.len() >= 2);
    let error = charged.attempts[0].error.clone().unwrap_or_default();
    assert!(error.contains("no connection to http://127.0.0.1"), "{error}");
    assert_eq!(remote.got().len(), 1);
    assert_eq!(remote.got()[0].header("idempotency-key"), charged.idempotency_key);
}

async fn a_doubt_is_asked_about<Db: Testable>() {
    for (finds, state) in [
        (Some(r#"{"status": "done", "charge": 7}"#), Standing::Succeeded),
        (Some(r#"{"status": "unknown"}"#), Standing::InDoubt),
        (None, Standing::InDoubt),
    ] {
        let fresh = Db::fresh().await;
        let remote = Remote::default();
        *remote.finds.lock().expect("what it finds") = finds;
        let url = remote.start().await;
        let charge = push(format!("{url}/500")).secret(WHSEC).reconcile(format!("{url}/find"));
        let charge = charge.operation().named("charge").quiet_period(Duration::ZERO);
        let worker = start(&fresh, Router::new().on("orders.placed", charge)).await;
        fresh.postbox.publish_now([draft("orders.placed")]).await.expect("published");
        let asked = |row: Standing| if state == Standing::Succeeded { row == state } else { ended(row) };
        let ends = until(&fresh, 1, asked).await;
        worker.stop(None).await.expect("stopped");
        assert_eq!(ends["charge"].row.state, state, "{finds:?}");
        assert_eq!(remote.got().len(), 1, "it is called once");
    }
}

/// A proxy that the environment names would look up names itself, and connect to anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_of_the_environment_is_not_used() {
    let (remote, proxy) = (Remote::default(), Remote::default());
    let (url, proxy_url) = (remote.start().await, proxy.start().await);
    if let Ok(url) = std::env::var("POSTBOX_TEST_CALL") {
        let tested = webhook_to(url).allow("127.0.0.1").test().await.expect("it can be used");
        assert!(tested.taken, "{tested:?}");
        return;
    }
    let mut again = Command::new(std::env::current_exe().expect("this program"));
    again.args(["--exact", "webhooks_out::a_proxy_of_the_environment_is_not_used"]).env("POSTBOX_TEST_CALL", url);
    for name in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"] {
        again.env(name, &proxy_url);
    }
    let ran = tokio::task::spawn_blocking(move || again.output()).await.expect("it runs").expect("it runs");
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stdout));
    assert_eq!((remote.got().len(), proxy.got().len()), (1, 0));
}

#[test]
#[should_panic(expected = "the push cannot be used: the address 169.254.169.254 is a cloud's metadata service")]
fn a_push_that_cannot_be_used_panics_where_it_is_wired() {
    let _ = push("http://169.254.169.254/").handler();
}

#[tokio::test]
async fn a_push_can_be_checked_and_tried() {
    let remote = Remote::default();
    let url = remote.start().await;
    let fine = push(format!("{url}/events")).secret(WHSEC);
    fine.check().expect("it can be used");
    assert!(fine.test().await.expect("it can be used").taken);
    assert!(remote.got()[0].is_signed());
    for (wrong, words) in [
        (push("localhost:8000/events"), "only http and https"),
        (push(&url).secret("whsec_!"), "base64"),
        (push(&url).reconcile("ftp://a/"), "where doubts are asked about"),
        (push("http://user:hidden@localhost/"), "user name or a password"),
    ] {
        let error = wrong.check().expect_err(words).to_string();
        assert!(error.contains(words) && !error.contains("hidden"), "{error}");
    }
}
