//! What is posted, and what becomes of it, against a server on loopback.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use uuid::Uuid;

use super::*;
use crate::content::Content;
use crate::handler::Attempt;
use crate::message::Envelope;
use crate::signature::{Secret, TOLERANCE, standard};
use crate::sink::{EnvelopeStyle, Then};

/// A request, as it came.
#[derive(Debug, Clone)]
struct Got {
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Got {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("ASCII"))
    }

    /// By the rules of the receiving side.
    fn verify(&self, secrets: &[Secret]) -> Result<(), crate::signature::SignatureError> {
        let header = |name| self.header(name);
        let (id, time, signature) = (header(standard::ID), header(standard::TIMESTAMP), header(standard::SIGNATURE));
        standard::verify(secrets, id, time, signature, &self.body, jiff::Timestamp::now(), TOLERANCE)
    }
}

/// What it says to the messages of a key, one after the other; then, and to all others, 204.
type Script = HashMap<&'static str, Vec<u16>>;

#[derive(Clone, Default)]
struct Receiver {
    got: Arc<Mutex<Vec<Got>>>,
    script: Arc<Mutex<Script>>,
    retry_after: Option<&'static str>,
    busy: Arc<Mutex<(usize, usize)>>,
}

impl Receiver {
    fn saying(script: &[(&'static str, &[u16])]) -> Receiver {
        let script = script.iter().map(|(key, statuses)| (*key, statuses.to_vec())).collect();
        Receiver { script: Arc::new(Mutex::new(script)), ..Receiver::default() }
    }

    /// Serves; its URL.
    async fn start(&self) -> String {
        let app = axum::Router::new().fallback(any(receive)).with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/hooks", listener.local_addr().expect("its address"));
        tokio::spawn(async move { axum::serve(listener, app).await });
        url
    }

    fn got(&self) -> Vec<Got> {
        self.got.lock().expect("what it got").clone()
    }

    /// The numbers of a key, in the order in which they came.
    fn of_key(&self, key: &str) -> Vec<String> {
        let of_key = self.got().into_iter().filter(|got| got.header("ce-partitionkey") == key);
        of_key.map(|got| String::from_utf8(got.body).expect("UTF-8")).collect()
    }
}

async fn receive(State(receiver): State<Receiver>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.expect("a body").to_vec();
    let got = Got { headers: head.headers, body };
    let key = got.header("ce-partitionkey").to_owned();
    receiver.got.lock().expect("what it got").push(got);
    {
        let mut busy = receiver.busy.lock().expect("how busy");
        busy.0 += 1;
        busy.1 = busy.1.max(busy.0);
    }
    // Long enough that others come meanwhile, if they may.
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
    receiver.busy.lock().expect("how busy").0 -= 1;
    let mut script = receiver.script.lock().expect("the script");
    let status = script.get_mut(key.as_str()).filter(|rest| !rest.is_empty()).map_or(204, |rest| rest.remove(0));
    let status = StatusCode::from_u16(status).expect("a status");
    let mut response = if status == 204 { status.into_response() } else { (status, "its own words").into_response() };
    if let Some(wait) = receiver.retry_after {
        response.headers_mut().insert("retry-after", wait.parse().expect("a header"));
    }
    response
}

fn message(key: Option<&str>, payload: &str) -> Outgoing {
    let envelope = Envelope {
        id: Uuid::now_v7(),
        topic: "orders.placed".into(),
        key: key.map(str::to_owned),
        payload: Content::stored(Some(payload.into()), None, None).expect("JSON"),
        headers: BTreeMap::new(),
        occurred_at: jiff::Timestamp::now(),
        received_at: jiff::Timestamp::now(),
        source: None,
        external_id: None,
        correlation_id: None,
        causation_id: None,
        max_attempts: None,
    };
    Outgoing::new(Arc::new(envelope), Attempt { number: 1, max: 4, delivery: 1 })
}

fn sink(url: &str) -> WebhookSink {
    webhook_to(url).allow("127.0.0.1").timeout(Duration::from_secs(10))
}

fn then(fate: &Result<(), Unsent>) -> Option<Then> {
    fate.as_ref().err().map(|unsent| unsent.then)
}

const WHSEC: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

#[tokio::test]
async fn a_message_is_posted_signed_over_its_exact_bytes() {
    let receiver = Receiver::default();
    let url = receiver.start().await;
    let mut envelope = message(Some("é 1"), r#"{"n": 1.10,  "t": "é"}"#).envelope().clone();
    envelope.headers.insert("traceparent".into(), "00-1-2-01".into());
    envelope.correlation_id = Some("c 7\r\nx-evil: 1".into());
    envelope.causation_id = Some("cause".into());
    let sent = Outgoing::new(Arc::new(envelope), Attempt { number: 1, max: 4, delivery: 1 });
    assert_eq!(sink(&url).secret(WHSEC).send(std::slice::from_ref(&sent)).await, [Ok(())]);
    let got = receiver.got().remove(0);
    got.verify(&[Secret::standard(WHSEC).expect("a secret")]).expect("a good signature");
    assert_eq!(got.body, r#"{"n": 1.10,  "t": "é"}"#.as_bytes());
    let id = sent.id.to_string();
    for (name, value) in [
        ("webhook-id", id.as_str()),
        ("content-type", "application/json"),
        ("ce-id", &id),
        ("ce-type", "orders.placed"),
        ("ce-partitionkey", "%C3%A9%201"),
        ("traceparent", "00-1-2-01"),
        ("x-correlation-id", "c%207%0D%0Ax-evil:%201"),
        ("x-causation-id", "cause"),
        ("x-evil", ""),
    ] {
        assert_eq!(got.header(name), value, "{name}");
    }
    let other = Got { body: b"{}".to_vec(), ..got };
    other.verify(&[Secret::standard(WHSEC).expect("a secret")]).expect_err("tampered with");
}

#[tokio::test]
async fn envelopes_are_dressed_as_it_is_set() {
    let receiver = Receiver::default();
    let url = receiver.start().await;
    let sent = [message(Some("k"), "7")];
    let structured = sink(&url).envelope(EnvelopeStyle::CloudEventsStructured).source("/shop");
    assert_eq!(structured.send(&sent).await, [Ok(())]);
    assert_eq!(sink(&url).envelope(EnvelopeStyle::Payload).send(&sent).await, [Ok(())]);
    let [structured, payload] = receiver.got().try_into().expect("two");
    assert_eq!(structured.header("content-type"), "application/cloudevents+json");
    let event: serde_json::Value = serde_json::from_slice(&structured.body).expect("JSON");
    assert_eq!((&event["data"], &event["source"]), (&7.into(), &"/shop".into()));
    assert_eq!((payload.body.as_slice(), payload.header("ce-id")), (&b"7"[..], ""));
    assert_eq!(payload.header("webhook-id"), sent[0].id.to_string());
    assert_eq!(payload.header("webhook-signature"), "", "nothing to sign with");
}

#[tokio::test]
async fn every_secret_signs_and_each_attempt_has_its_own_time() {
    let receiver = Receiver::default();
    let url = receiver.start().await;
    let rotating = sink(&url).secret(WHSEC).secret("the next one, in plain text");
    let sent = [message(None, "1")];
    assert_eq!(rotating.send(&sent).await, [Ok(())]);
    // The time goes by in seconds.
    tokio::time::sleep_until(tokio::time::Instant::now() + Duration::from_millis(1001)).await;
    assert_eq!(rotating.send(&sent).await, [Ok(())]);
    let [first, second] = receiver.got().try_into().expect("two");
    for got in [&first, &second] {
        assert_eq!(got.header(standard::SIGNATURE).split(' ').count(), 2);
        for known in [WHSEC, "the next one, in plain text"] {
            got.verify(&[Secret::standard(known).expect("a secret")]).expect("a good signature");
        }
    }
    assert_eq!(first.header("webhook-id"), second.header("webhook-id"));
    assert_ne!(first.header("webhook-timestamp"), second.header("webhook-timestamp"));
    assert_ne!(first.header("webhook-signature"), second.header("webhook-signature"));
}

#[tokio::test]
async fn each_status_does_what_it_means() {
    for (status, expected) in [
        (200, None),
        (204, None),
        (302, Some(Then::Dead)),
        (400, Some(Then::Dead)),
        (404, Some(Then::Dead)),
        (408, Some(Then::Again { after: None })),
        (410, Some(Then::Pause)),
        (413, Some(Then::Dead)),
        (425, Some(Then::Again { after: None })),
        (429, Some(Then::Again { after: None })),
        (500, Some(Then::Again { after: None })),
        (503, Some(Then::Again { after: None })),
    ] {
        let receiver = Receiver::saying(&[("k", &[status])]);
        let url = receiver.start().await;
        let fates = sink(&url).send(&[message(Some("k"), "1")]).await;
        assert_eq!(then(&fates[0]), expected, "{status}");
        if let Err(unsent) = &fates[0] {
            assert!(unsent.error.contains(&format!(" answered {status} ")), "{}", unsent.error);
            assert!(unsent.error.contains("its own words") || status == 302, "{}", unsent.error);
        }
    }
}

#[tokio::test]
async fn a_wait_that_is_asked_for_is_kept() {
    for (status, wait, after) in [
        (429, "7", Some(Duration::from_secs(7))),
        (503, "99999999", Some(Duration::from_secs(86_400))),
        (502, "Fri, 31 Dec 9999 23:59:59 GMT", Some(Duration::from_secs(86_400))),
        (504, "soon", None),
        (500, "7", None),
    ] {
        let receiver = Receiver { retry_after: Some(wait), ..Receiver::saying(&[("k", &[status])]) };
        let url = receiver.start().await;
        let fates = sink(&url).send(&[message(Some("k"), "1")]).await;
        assert_eq!(then(&fates[0]), Some(Then::Again { after }), "{status} {wait}");
    }
}

#[tokio::test]
async fn a_failing_key_stops_itself_and_no_other() {
    let receiver = Receiver::saying(&[("a", &[204, 500]), ("b", &[204, 204, 422])]);
    let url = receiver.start().await;
    let mut batch = Vec::new();
    for number in 0..4 {
        for key in ["a", "b", "c"] {
            batch.push(message(Some(key), &number.to_string()));
        }
    }
    batch.push(message(None, "10"));
    let fates = sink(&url).send(&batch).await;
    let taken = |key: Option<&str>| -> Vec<bool> {
        let of_key = batch.iter().zip(&fates).filter(|(message, _)| message.key.as_deref() == key);
        of_key.map(|(_, fate)| fate.is_ok()).collect()
    };
    assert_eq!(taken(Some("a")), [true, false, false, false]);
    assert_eq!(taken(Some("b")), [true, true, false, false]);
    assert_eq!(taken(Some("c")), [true, true, true, true]);
    assert_eq!(taken(None), [true]);
    assert_eq!(receiver.of_key("a"), ["0", "1"], "in order, and nothing after the one that failed");
    assert_eq!(receiver.of_key("b"), ["0", "1", "2"]);
    assert_eq!(receiver.of_key("c"), ["0", "1", "2", "3"]);
}

#[tokio::test]
async fn so_many_run_at_once_and_no_more() {
    for (at_once, most) in [(1, 1), (3, 3), (0, 1)] {
        let receiver = Receiver::default();
        let url = receiver.start().await;
        let limited = sink(&url).at_once(at_once);
        let batches: Vec<Vec<Outgoing>> =
            (0..4).map(|_| (0..8).map(|number| message(None, &number.to_string())).collect()).collect();
        let sent = join_all(batches.iter().map(|batch| limited.send(batch))).await;
        assert!(sent.iter().flatten().all(Result::is_ok), "{sent:?}");
        assert_eq!(receiver.got().len(), 32);
        let busiest = receiver.busy.lock().expect("how busy").1;
        assert!(busiest <= most, "{busiest} at once, and {at_once} were allowed");
    }
}

#[tokio::test]
async fn a_batch_ends_within_two_timeouts() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/", silent.local_addr().expect("its address"));
    let batch: Vec<Outgoing> = (0..10).map(|number| message(Some("k"), &number.to_string())).collect();
    let more: Vec<Outgoing> = (0..10).map(|number| message(None, &number.to_string())).collect();
    let begin = Instant::now();
    let slow = sink(&url).timeout(Duration::from_millis(200)).at_once(2);
    let fates = [slow.send(&batch).await, slow.send(&more).await].concat();
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    let tried = |fates: &[Result<(), Unsent>]| -> Vec<bool> {
        let tried = fates.iter().map(|fate| match then(fate) {
            Some(Then::Again { after: None }) => true,
            Some(Then::Untried) => false,
            other => panic!("{other:?}: {fates:?}"),
        });
        tried.collect()
    };
    assert_eq!(tried(&fates[..10]), [true, false, false, false, false, false, false, false, false, false]);
    let of_no_key = tried(&fates[10..]).into_iter().filter(|tried| *tried).count();
    assert!((1..10).contains(&of_no_key), "{of_no_key} of 10 were tried, two at once: {fates:?}");
}

#[tokio::test]
async fn what_was_set_wrong_is_said_before_anything_is_sent() {
    for (sink, words) in [
        (webhook_to("https://127.0.0.1/"), "loopback"),
        (webhook_to("ftp://example.org/"), "only http and https"),
        (webhook_to("https://example.org/").secret("whsec_?"), "base64"),
        (webhook_to("https://example.org/").allow("everything"), "no network"),
        (webhook_to("https://example.org/").root_certificate(*b"none"), "BEGIN CERTIFICATE"),
        (webhook_to("https://example.org/").timeout(Duration::ZERO), "timeout"),
        (webhook_to("https://169.254.169.254/").allow_private_addresses(), "metadata"),
    ] {
        let refused = sink.open().await.expect_err(words);
        assert!(matches!(&refused, BrokerError::Refused(why) if why.contains(words)), "{refused:?}");
        assert!(matches!(then(&sink.send(&[message(None, "1")]).await[0]), Some(Then::Again { .. })));
    }
    let own = webhook_to("http://127.0.0.1:9/").allow_private_addresses().secret("short");
    let warnings = own.open().await.expect("it can be used").join("; ");
    assert!(warnings.contains("can be guessed") && warnings.contains("read on the way"), "{warnings}");
    let unsigned = webhook_to("https://1.1.1.1/").open().await.expect("it can be used");
    assert!(unsigned[0].contains("not signed"), "{unsigned:?}");
    assert_eq!((own.kind(), own.name().as_str()), ("webhook", "webhook:127.0.0.1:9"));
    let unknown = webhook_to("https://no-such-name.invalid/").open().await.expect_err("no such name");
    assert!(matches!(unknown, BrokerError::Unavailable(_)), "{unknown:?}");
}

#[tokio::test]
async fn an_endpoint_can_be_tried() {
    let receiver = Receiver::default();
    let url = receiver.start().await;
    let tested = sink(&url).secret(WHSEC).test().await.expect("it can be used");
    assert_eq!((tested.status, tested.taken, tested.body.as_str()), (Some(204), true, ""));
    let got = receiver.got().remove(0);
    got.verify(&[Secret::standard(WHSEC).expect("a secret")]).expect("a good signature");
    assert_eq!((got.header("ce-type"), got.header("webhook-id")), ("postbox.test", &*tested.id.to_string()));
    let nobody = webhook_to("http://127.0.0.1:1/").allow("127.0.0.1").test().await.expect("it can be used");
    assert_eq!((nobody.status, nobody.taken), (None, false));
    assert!(nobody.words.contains("no connection"), "{nobody:?}");
    webhook_to("http://127.0.0.1:1/").test().await.expect_err("not allowed");
}
