//! Redis Streams through the engine, on both stores: the suites that every source and every sink passes, from one
//! postbox to another, and real events.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postbox::sink::{EnvelopeStyle, RedisSink, redis};
use postbox::source::{Format, Mapping, Raw, RedisSource, Source, redis_stream};
use postbox::testing::{Arrived, SinkBench, SourceBench, sink_suite, source_suite};
use postbox::{Database, Draft, Envelope, Fate, Router, handler, relay};
use postbox_testkit::{Fresh, Lost, Proxy, RedisServer, Testable, on_both_stores, shared_redis_url, until};
use redis::aio::MultiplexedConnection;
use redis::cmd;
use serde_json::json;

on_both_stores!(
    a_correct_source,
    a_correct_sink,
    from_one_postbox_to_another,
    real_events_come_in_as_they_are,
    real_events_come_back_as_they_went,
    an_entry_without_an_id_is_known_by_where_it_stands,
    what_comes_too_often_and_what_is_lost_is_put_aside,
    what_may_come_again_for_longer_than_it_is_remembered_is_refused,
);

/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(60);

async fn connect(url: &str) -> MultiplexedConnection {
    let client = redis::Client::open(url).expect("a URL");
    let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
    client.get_multiplexed_async_connection_with_config(&config).await.expect("a connection")
}

fn name(what: &str) -> String {
    format!("postbox-test-{what}-{}", uuid::Uuid::now_v7())
}

async fn add(redis: &mut MultiplexedConnection, stream: &str, fields: &[(&str, &[u8])]) -> String {
    let mut add = cmd("XADD");
    add.arg(stream).arg("*");
    for (name, value) in fields {
        add.arg(*name).arg(*value);
    }
    add.query_async(redis).await.expect("added")
}

type Fields = Vec<(Vec<u8>, Vec<u8>)>;

struct Stream {
    url: String,
    name: String,
    redis: MultiplexedConnection,
}

impl SourceBench for Stream {
    type Source = RedisSource;

    async fn source(&self) -> RedisSource {
        redis_stream(&self.name).url(&self.url).group("suite").consumer_prefix("suite").block(LOOK)
    }

    async fn again(&self) -> RedisSource {
        self.source().await
    }

    async fn put(&self, id: &str, topic: &str, n: usize) {
        let payload = json!({ "n": n }).to_string();
        let fields = [("event_id", id.as_bytes()), ("event_type", topic.as_bytes()), ("payload", payload.as_bytes())];
        add(&mut self.redis.clone(), &self.name, &fields).await;
    }

    async fn clear(&self) {
        cmd("DEL").arg(&self.name).exec_async(&mut self.redis.clone()).await.expect("deleted");
    }
}

async fn a_correct_source<Db: Testable>() {
    let fresh = Db::fresh().await;
    let url = shared_redis_url();
    let stream = Stream { redis: connect(&url).await, url, name: name("source") };
    source_suite(&stream, &fresh.postbox).await;
}

struct Other {
    server: RedisServer,
    proxy: Proxy,
    seen: Mutex<String>,
}

impl SinkBench for Other {
    type Sink = RedisSink;

    async fn sink(&self) -> RedisSink {
        redis("suite").url(format!("redis://127.0.0.1:{}", self.proxy.port()))
    }

    async fn arrived(&self) -> Vec<Arrived> {
        let mut redis = connect(&self.server.url()).await;
        let after = self.seen.lock().expect("an id").clone();
        let entries: Vec<(String, Fields)> =
            cmd("XRANGE").arg("suite").arg(after).arg("+").query_async(&mut redis).await.expect("entries");
        if let Some((last, _)) = entries.last() {
            *self.seen.lock().expect("an id") = format!("({last}");
        }
        let read = |(id, fields): (String, Fields)| {
            let draft = Format::default().read(&Raw { fields, body: None }, "suite", &id).expect("read").draft;
            let read = postbox::testing::outgoing(draft);
            Arrived {
                id: read.external_id.as_deref().and_then(|id| id.parse().ok()).expect("an id"),
                topic: read.topic.clone(),
                key: read.key.clone(),
                payload: read.payload_bytes().to_vec(),
            }
        };
        entries.into_iter().map(read).collect()
    }

    async fn answers(&self, does: bool) {
        self.proxy.refuse(!does);
    }
}

async fn a_correct_sink<Db: Testable>() {
    let fresh = Db::fresh().await;
    let server = RedisServer::start();
    let proxy = Proxy::start(server.port()).await;
    sink_suite(&Other { server, proxy, seen: Mutex::new("-".into()) }, &fresh.postbox).await;
}

/// What a handler was given: the producer's id, and topic, key and payload.
type Seen = Arc<Mutex<Vec<(String, String)>>>;

fn noting<Db: Database>(pattern: &str, seen: &Seen) -> Router<Db> {
    let seen = seen.clone();
    let note = move |envelope: Envelope| {
        let key = envelope.key.as_deref().unwrap_or_default();
        let said = format!("{} {key} {}", envelope.topic, envelope.payload_json().unwrap_or_default());
        seen.lock().expect("a list").push((envelope.external_id.unwrap_or_default(), said));
        std::future::ready(())
    };
    Router::new().on(pattern, handler(note).named("note"))
}

async fn received<Db: Testable>(fresh: &Fresh<Db>) -> (i64, i64, i64) {
    let row = fresh.postbox.admin().sources().await.expect("sources").pop();
    row.map_or((0, 0, 0), |row| (row.received, row.quarantined, row.lag.unwrap_or(-1)))
}

async fn from_one_postbox_to_another<Db: Testable>() {
    let (from, to) = (Db::fresh().await, Db::fresh().await);
    let server = RedisServer::start();
    let proxy = Proxy::start(server.port()).await;
    let url = format!("redis://127.0.0.1:{}", proxy.port());
    let sending = relay(redis("{topic}").url(&url)).backoff(LOOK, LOOK * 5);
    let sender = from.postbox.worker(Router::new().relay("orders.*", sending)).start().await.expect("it starts");
    let seen = Seen::default();
    let source = redis_stream("orders.placed").url(&url).group("other").block(LOOK).batch(50);
    let receiver = to.postbox.worker(noting("orders.*", &seen)).receive(source).start().await.expect("it starts");
    let mut published = Vec::new();
    let faults = [(Lost::Reply, "XADD"), (Lost::Reply, "XACK"), (Lost::Request, "XADD"), (Lost::Reply, "XREADGROUP")];
    for (round, (lost, word)) in faults.into_iter().enumerate() {
        proxy.arm(lost, word);
        let drafts = (0..250).map(|n| {
            let n = round * 250 + n;
            Envelope::json("orders.placed", &json!({ "n": n })).map(|draft| draft.key(format!("k{}", n % 50)))
        });
        published.extend(from.postbox.publish_now(drafts).await.expect("it publishes"));
        proxy.cut().await;
    }
    until("all are handled", async || seen.lock().expect("a list").len() >= 1000).await;
    until("all is acknowledged", async || received(&to).await.2 == 0).await;
    sender.stop(Some(PATIENCE)).await.expect("it stops");
    receiver.stop(Some(PATIENCE)).await.expect("it stops");
    let mut handled = seen.lock().expect("a list").clone();
    handled.sort();
    let said = |n: usize| format!(r#"orders.placed k{} {{"n":{n}}}"#, n % 50);
    let mut wanted: Vec<(String, String)> =
        published.iter().enumerate().map(|(n, one)| (one.id.to_string(), said(n))).collect();
    wanted.sort();
    assert_eq!(handled, wanted, "each once, as it was published");
    assert_eq!((received(&to).await.0, received(&to).await.1), (1000, 0));
}

/// A line of the file of real events.
#[derive(serde::Deserialize)]
struct Event {
    id: String,
    topic: String,
    key: String,
    payload: Box<serde_json::value::RawValue>,
}

impl Event {
    /// What a handler is to see of it, beside the id.
    fn seen(&self) -> String {
        format!("{} {} {}", self.topic, self.key, self.payload)
    }
}

fn events() -> Vec<Event> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/data/github-events.jsonl");
    let text = std::fs::read_to_string(path).expect("the real events");
    text.lines().map(|line| serde_json::from_str(line).expect("an event")).collect()
}

async fn real_events_come_in_as_they_are<Db: Testable>() {
    let (events, url) = (events(), shared_redis_url());
    let mut redis = connect(&url).await;
    let (one_field, flattened) = (name("one-field"), name("flattened"));
    for event in &events {
        let (id, topic, key) = (event.id.as_bytes(), event.topic.as_bytes(), event.key.as_bytes());
        let payload = event.payload.get();
        let fields = [("event_id", id), ("event_type", topic), ("aggregate_id", key), ("payload", payload.as_bytes())];
        add(&mut redis, &flattened, &fields).await;
        let [id, topic, key] = [&event.id, &event.topic, &event.key].map(|text| json!(text).to_string());
        let object =
            format!(r#"{{"event_id": {id}, "event_type": {topic}, "aggregate_id": {key}, "payload": {payload}}}"#);
        add(&mut redis, &one_field, &[("data", object.as_bytes())]).await;
    }
    let wanted: BTreeMap<String, String> = events.iter().map(|event| (event.id.clone(), event.seen())).collect();
    for stream in [one_field, flattened] {
        let (fresh, seen) = (Db::fresh().await, Seen::default());
        let source = redis_stream(&stream).url(&url).group("shop").block(LOOK).batch(100);
        let worker = fresh.postbox.worker(noting("github.>", &seen)).receive(source).start().await.expect("it starts");
        until("all are handled", async || seen.lock().expect("a list").len() >= wanted.len()).await;
        worker.stop(Some(PATIENCE)).await.expect("it stops");
        let handled = seen.lock().expect("a list").clone();
        assert_eq!(handled.len(), wanted.len(), "each once");
        assert!(handled.into_iter().collect::<BTreeMap<_, _>>() == wanted, "{stream}: not equal to the file");
    }
}

async fn real_events_come_back_as_they_went<Db: Testable>() {
    let (events, url) = (events(), shared_redis_url());
    for style in [EnvelopeStyle::CloudEventsBinary, EnvelopeStyle::CloudEventsStructured, EnvelopeStyle::Payload] {
        let (from, to, seen) = (Db::fresh().await, Db::fresh().await, Seen::default());
        let stream = name("github");
        let sending = redis(&stream).url(&url).envelope(style).named("to-redis");
        let sender = from.postbox.worker(Router::new().relay("github.>", sending)).start().await.expect("it starts");
        let source = redis_stream(&stream).url(&url).group("other").block(LOOK).batch(100);
        let receiver = to.postbox.worker(noting("github.>", &seen)).receive(source).start().await.expect("it starts");
        let drafts = events.iter().map(|event| -> Result<Draft, postbox::PublishError> {
            Ok(Envelope::raw(&event.topic, event.payload.get())?.key(&event.key))
        });
        let published = from.postbox.publish_now(drafts).await.expect("it publishes");
        until("all are handled", async || seen.lock().expect("a list").len() >= events.len()).await;
        sender.stop(Some(PATIENCE)).await.expect("it stops");
        receiver.stop(Some(PATIENCE)).await.expect("it stops");
        let handled: BTreeMap<String, String> = seen.lock().expect("a list").iter().cloned().collect();
        let wanted: BTreeMap<String, String> =
            published.iter().zip(&events).map(|(one, event)| (one.id.to_string(), event.seen())).collect();
        assert!(handled == wanted, "{style}: not equal to the file");
    }
}

async fn an_entry_without_an_id_is_known_by_where_it_stands<Db: Testable>() {
    let (fresh, url) = (Db::fresh().await, shared_redis_url());
    let (mut redis, stream) = (connect(&url).await, name("positions"));
    let id = add(&mut redis, &stream, &[("kind", b"placed"), ("body", b"{}")]).await;
    let format = || Format::mapped(Mapping::new().topic("orders.{field:kind}").payload("{field:body}"));
    let inbox = fresh.postbox.inbox("positions", "redis", format()).await.expect("an inbox");
    let mut source = redis_stream(&stream).url(&url).group("shop").block(LOOK).format(format());
    for again in [false, true] {
        source.open(None).await.expect("opens");
        let read = source.read().await.expect("reads");
        assert_eq!(read.entries[0].position, format!("{stream}/{id}"));
        let fates = inbox.receive(&read.entries).await.expect("it is stored");
        assert_eq!(matches!(&fates[..], [Fate::Duplicate(_)]), again, "{fates:?}");
    }
    assert_eq!(received(&fresh).await.0, 1);
}

async fn what_comes_too_often_and_what_is_lost_is_put_aside<Db: Testable>() {
    let (fresh, url) = (Db::fresh().await, shared_redis_url());
    let (mut redis, stream) = (connect(&url).await, name("often"));
    let mut ids = Vec::new();
    for id in ["stops-everybody", "deleted", "fine"] {
        let fields = [("event_id", id.as_bytes()), ("event_type", b"orders.placed"), ("payload", b"{}")];
        ids.push(add(&mut redis, &stream, &fields).await);
    }
    // Another consumer has had them, the first of them more often than anything may come, and is gone.
    cmd("XGROUP").arg("CREATE").arg(&stream).arg("shop").arg("0").exec_async(&mut redis).await.expect("a group");
    let gone = ["GROUP", "shop", "gone", "COUNT", "10", "STREAMS"];
    cmd("XREADGROUP").arg(&gone).arg(&stream).arg(">").exec_async(&mut redis).await.expect("read");
    let often = ["XCLAIM", &stream, "shop", "gone", "0", &ids[0], "RETRYCOUNT", "5"];
    cmd(often[0]).arg(&often[1..]).exec_async(&mut redis).await.expect("claimed");
    cmd("XDEL").arg(&stream).arg(&ids[1]).exec_async(&mut redis).await.expect("deleted");
    let seen = Seen::default();
    let source = redis_stream(&stream).url(&url).group("shop").block(LOOK).min_idle(LOOK).max_deliveries(5);
    let worker = fresh.postbox.worker(noting("orders.*", &seen)).receive(source).start().await.expect("it starts");
    until("one is handled", async || !seen.lock().expect("a list").is_empty()).await;
    until("all is acknowledged", async || received(&fresh).await.2 == 0).await;
    worker.stop(Some(PATIENCE)).await.expect("it stops");
    let handled: Vec<String> = seen.lock().expect("a list").iter().map(|(id, _)| id.clone()).collect();
    assert_eq!(handled, ["fine"]);
    let kept = fresh.postbox.admin().quarantine(&Default::default(), 10).await.expect("quarantine");
    let kept: BTreeMap<String, String> = kept.into_iter().map(|row| (row.position, row.kind)).collect();
    let wanted = [(&ids[0], "undeliverable"), (&ids[1], "lost")];
    assert_eq!(kept, wanted.map(|(id, kind)| (format!("{stream}/{id}"), kind.to_owned())).into());
    let pending: (usize, redis::Value, redis::Value, redis::Value) =
        cmd("XPENDING").arg(&stream).arg("shop").query_async(&mut redis).await.expect("pending");
    assert_eq!(pending.0, 0, "and acknowledged");
}

async fn what_may_come_again_for_longer_than_it_is_remembered_is_refused<Db: Testable>() {
    let fresh = Db::fresh().await;
    let month = Duration::from_secs(30 * 86_400);
    let source = redis_stream("payments").url(shared_redis_url()).replay_horizon(month);
    let refused = fresh.postbox.worker(Router::new()).receive(source).start().await.expect_err("refused");
    assert!(refused.to_string().contains("keep_ids"), "{refused}");
}
