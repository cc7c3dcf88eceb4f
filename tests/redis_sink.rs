//! The Redis sink against a real server: what is confirmed is there, and what is not is told as such.

use std::collections::HashMap;
use std::time::Duration;

use postbox::sink::{EnvelopeStyle, Outgoing, RedisSink, Sink, Unsent, redis};
use postbox::source::{Format, Raw};
use postbox::testing::outgoing;
use postbox::{BrokerError, Draft, Envelope};
use postbox_testkit::{Lost, Proxy, RedisServer, shared_redis_url};
use redis::aio::MultiplexedConnection;
use redis::{Value, cmd};
use serde_json::json;

/// A server, names that nobody else has on it, and a connection to look at it.
struct House {
    url: String,
    prefix: String,
    redis: MultiplexedConnection,
}

type Fields = Vec<(Vec<u8>, Vec<u8>)>;

impl House {
    async fn new() -> House {
        House::on(shared_redis_url()).await
    }

    async fn on(url: String) -> House {
        let client = redis::Client::open(url.as_str()).expect("a URL");
        let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(Duration::from_secs(30)));
        let redis = client.get_multiplexed_async_connection_with_config(&config).await.expect("a connection");
        House { url, prefix: format!("postbox-test-{}", uuid::Uuid::now_v7()), redis }
    }

    /// A sink to streams that begin with the prefix.
    fn sink(&self, stream: &str) -> RedisSink {
        redis(format!("{}.{stream}", self.prefix)).url(&self.url)
    }

    async fn run(&self, command: &[&str]) -> Value {
        let mut built = cmd(command[0]);
        for argument in &command[1..] {
            built.arg(argument.replace("PREFIX", &self.prefix));
        }
        built.query_async(&mut self.redis.clone()).await.expect("the test's command")
    }

    /// The entries of a stream, in its order.
    async fn entries(&self, stream: &str) -> Vec<Fields> {
        let name = format!("{}.{stream}", self.prefix);
        let listed: Vec<(String, Vec<Vec<u8>>)> =
            cmd("XRANGE").arg(name).arg("-").arg("+").query_async(&mut self.redis.clone()).await.expect("entries");
        let pairs = |flat: Vec<Vec<u8>>| flat.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
        listed.into_iter().map(|(_, flat)| pairs(flat)).collect()
    }

    /// The ids of the messages in a stream, in its order.
    async fn ids(&self, stream: &str) -> Vec<String> {
        self.entries(stream).await.into_iter().map(|fields| text(&fields, "ce-id")).collect()
    }
}

fn text(fields: &Fields, name: &str) -> String {
    let found = fields.iter().find(|(n, _)| n == name.as_bytes());
    found.map(|(_, value)| String::from_utf8_lossy(value).into_owned()).unwrap_or_default()
}

fn draft(topic: &str, key: &str) -> Draft {
    Envelope::json(topic, &json!({ "n": 1 })).expect("a draft").key(key)
}

fn ids(batch: &[Outgoing]) -> Vec<String> {
    batch.iter().map(|message| message.id.to_string()).collect()
}

fn is_again(answer: &Result<(), Unsent>) -> bool {
    answer.as_ref().is_err_and(|unsent| !unsent.is_final())
}

fn is_rejected(answer: &Result<(), Unsent>) -> bool {
    answer.as_ref().is_err_and(Unsent::is_final)
}

fn words(answer: &Result<(), Unsent>) -> &str {
    answer.as_ref().err().map_or("sent", Unsent::error)
}

#[tokio::test]
async fn messages_look_as_they_are_meant_to() {
    let house = House::new().await;
    let message = || {
        Envelope::raw("orders.placed", r#"{"total": 12345678901234567890.10}"#)
            .expect("JSON")
            .key("customer 7")
            .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
            .source("/shop")
            .correlation_id("c-1")
            .causation_id("c-0")
            .occurred_at("2026-11-28T12:00:00.5Z".parse().expect("a time"))
    };
    let styles = [
        ("binary", EnvelopeStyle::CloudEventsBinary),
        ("structured", EnvelopeStyle::CloudEventsStructured),
        ("flat", EnvelopeStyle::Payload),
    ];
    for (stream, style) in styles {
        let sent = outgoing(message());
        assert_eq!(house.sink(stream).envelope(style).send(std::slice::from_ref(&sent)).await, [Ok(())]);
        let entries = house.entries(stream).await;
        let [fields] = &entries[..] else { panic!("one entry, and not {}", entries.len()) };
        // Any source of ours reads it as it was.
        let read = Format::default().read(&Raw { fields: fields.clone(), body: None }, "in", "in/1-0").expect("read");
        let draft = read.draft;
        assert_eq!((draft.topic(), read.by_position), ("orders.placed", false), "{stream}");
        let again = outgoing(draft);
        assert_eq!(again.payload_json(), sent.payload_json(), "{stream}: digit for digit");
        assert_eq!(again.external_id, Some(sent.id.to_string()), "{stream}");
        assert_eq!((&again.key, again.occurred_at), (&sent.key, sent.occurred_at), "{stream}");
        assert_eq!(
            (&again.correlation_id, &again.causation_id),
            (&sent.correlation_id, &sent.causation_id),
            "{stream}"
        );
        assert_eq!(again.traceparent(), sent.traceparent(), "{stream}");
    }
    let binary = &house.entries("binary").await[0];
    let names: Vec<&[u8]> = binary.iter().map(|(name, _)| name.as_slice()).collect();
    let wanted = [
        "ce-specversion",
        "ce-id",
        "ce-source",
        "ce-type",
        "ce-time",
        "ce-partitionkey",
        "ce-correlationid",
        "ce-causationid",
        "ce-traceparent",
        "content-type",
        "data",
    ];
    assert_eq!(names, wanted.map(str::as_bytes));
    assert_eq!(text(binary, "data"), r#"{"total": 12345678901234567890.10}"#);
    let flat = &house.entries("flat").await[0];
    assert_eq!((text(flat, "event_type"), text(flat, "aggregate_id")), ("orders.placed".into(), "customer 7".into()));
}

#[tokio::test]
async fn each_message_has_an_answer_of_its_own() {
    let house = House::new().await;
    house.run(&["SET", "PREFIX.bad", "text"]).await;
    let sink = house.sink("{topic}");
    let keyless = outgoing(Envelope::json("good", &1).expect("a draft"));
    let batch = [
        outgoing(draft("good", "a")),
        outgoing(draft("bad", "b")),
        keyless,
        outgoing(draft("bad", "b")),
        outgoing(draft("other", "a")),
        outgoing(draft("good", "a")),
    ];
    let sent = sink.send(&batch).await;
    let (good, bad): (Vec<_>, Vec<_>) = sent.iter().enumerate().partition(|(_, answer)| answer.is_ok());
    assert_eq!(good.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, 2, 4, 5]);
    for (_, answer) in bad {
        assert!(is_rejected(answer), "{answer:?}");
        assert!(words(answer).starts_with("WRONGTYPE Operation against a key"), "its own words: {answer:?}");
    }
    let all = ids(&batch);
    assert_eq!(house.ids("good").await, [all[0].clone(), all[5].clone(), all[2].clone()], "in order of each key");
    assert_eq!(house.ids("other").await, [all[4].clone()]);
    // What a message does not have to be sent by is no reason to hold up others.
    let sink = house.sink("by.{key}");
    let sent = sink.send(&[batch[2].clone(), batch[0].clone()]).await;
    assert!(is_rejected(&sent[0]) && sent[1].is_ok(), "{sent:?}");
    assert_eq!(house.ids("by.a").await, [all[0].clone()]);
    assert!(is_rejected(&sink.send(&batch[2..3]).await[0]), "and nothing else is in the batch");
}

#[tokio::test]
async fn what_may_pass_is_sent_again_in_its_order() {
    let server = RedisServer::start();
    let house = House::on(server.url()).await;
    let sink = house.sink("{topic}");
    let batch: Vec<Outgoing> = (0..20).map(|n| outgoing(draft("t", ["a", "b"][n % 2]))).collect();
    // No memory for more; a replica; too few replicas. Nothing of that is the message's fault, and nothing is added.
    let troubles: [(&str, &[&str], &[&str]); 3] = [
        ("OOM", &["CONFIG", "SET", "maxmemory", "1"], &["CONFIG", "SET", "maxmemory", "0"]),
        ("READONLY", &["REPLICAOF", "127.0.0.1", "1"], &["REPLICAOF", "NO", "ONE"]),
        (
            "NOREPLICAS",
            &["CONFIG", "SET", "min-replicas-to-write", "1"],
            &["CONFIG", "SET", "min-replicas-to-write", "0"],
        ),
    ];
    for (code, begin, end) in troubles {
        house.run(begin).await;
        for answer in sink.send(&batch).await {
            assert!(is_again(&answer) && words(&answer).starts_with(code), "{code}: {answer:?}");
        }
        house.run(end).await;
        assert!(house.ids("t").await.is_empty(), "{code}: nothing of it was added");
    }
    assert_eq!(sink.send(&batch).await, vec![Ok(()); 20]);
    let there = house.ids("t").await;
    for key in 0..2 {
        let of_key: Vec<String> = ids(&batch).into_iter().skip(key).step_by(2).collect();
        let order: Vec<&String> = there.iter().filter(|id| of_key.contains(id)).collect();
        assert_eq!(order, of_key.iter().collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn what_is_too_large_holds_up_nobody() {
    let server = RedisServer::with(&[("proto-max-bulk-len", "1mb")]);
    let house = House::on(server.url()).await;
    let sink = house.sink("t");
    sink.open().await.expect("opens");
    let large = outgoing(Envelope::bytes("t", "application/octet-stream", vec![0; (1 << 20) + 1]));
    let batch = [outgoing(draft("t", "a")), large, outgoing(draft("t", "b"))];
    let sent = sink.send(&batch).await;
    assert!(sent[0].is_ok() && is_rejected(&sent[1]) && sent[2].is_ok(), "{sent:?}");
    assert!(words(&sent[1]).contains("1048577 bytes"), "{sent:?}");
}

#[tokio::test]
async fn a_reply_that_is_lost_is_no_confirmation() {
    let house = House::new().await;
    let port = house.url.rsplit(':').next().and_then(|port| port.trim_matches('/').parse().ok()).expect("a port");
    let proxy = Proxy::start(port).await;
    let sink = redis(format!("{}.{{topic}}", house.prefix)).url(format!("redis://127.0.0.1:{}", proxy.port()));
    // The first part reaches the server, the reply nobody; it was added, and comes once more with the same id.
    for (lost, topic, times) in [(Lost::Request, "never-came", 1), (Lost::Reply, "came", 2)] {
        let batch: Vec<Outgoing> = (0..5).map(|n| outgoing(draft(topic, &format!("k{n}")))).collect();
        proxy.arm(lost, "XADD");
        let sent = sink.send(&batch).await;
        assert!(sent.iter().all(is_again), "{lost:?}: {sent:?}");
        proxy.cut().await;
        assert_eq!(sink.send(&batch).await, vec![Ok(()); 5], "the connection is made again");
        let mut count = HashMap::new();
        for id in house.ids(topic).await {
            *count.entry(id).or_insert(0) += 1;
        }
        assert_eq!(count, ids(&batch).into_iter().map(|id| (id, times)).collect(), "{lost:?}");
    }
    // A connection that went while nothing was sent costs one try at the most.
    proxy.cut_all();
    let batch = [outgoing(draft("later", "k"))];
    while sink.send(&batch).await != [Ok(())] {}
    assert_eq!(house.ids("later").await.first(), Some(&batch[0].id.to_string()));
}

#[tokio::test]
async fn a_batch_that_is_dropped_on_the_way_is_sent_again_in_order() {
    let house = House::new().await;
    let sink = house.sink("t");
    let batch: Vec<Outgoing> = (0..3).map(|_| outgoing(draft("t", "k"))).collect();
    assert_eq!(sink.send(&batch[..1]).await, [Ok(())]);
    for message in &batch[1..] {
        {
            // As when a relay's timeout is over: whether it is there is not known.
            let sending = sink.send(std::slice::from_ref(message));
            tokio::pin!(sending);
            assert!(futures_util::poll!(&mut sending).is_pending());
        }
        assert_eq!(sink.send(std::slice::from_ref(message)).await, [Ok(())]);
    }
    let mut there = house.ids("t").await;
    there.dedup();
    assert_eq!(there, ids(&batch));
}

#[tokio::test]
async fn what_was_confirmed_outlives_a_kill() {
    let mut server = RedisServer::start();
    let house = House::on(server.url()).await;
    let sink = house.sink("t");
    let batch: Vec<Outgoing> = (0..300).map(|n| outgoing(draft("t", &format!("k{}", n % 7)))).collect();
    assert_eq!(sink.send(&batch).await, vec![Ok(()); 300]);
    server.kill();
    let sent = sink.send(&batch[..2]).await;
    assert!(sent.iter().all(is_again), "{sent:?}");
    server.up();
    let house = House { redis: House::on(server.url()).await.redis, ..house };
    let mut there = house.ids("t").await;
    let mut sent = ids(&batch);
    there.sort();
    sent.sort();
    assert_eq!(there, sent);
    while sink.send(&batch[..1]).await != [Ok(())] {}
}

#[tokio::test]
async fn it_is_looked_at_when_a_worker_starts() {
    let house = House::new().await;
    let refused = |sink: RedisSink| async move {
        match sink.open().await {
            Err(BrokerError::Refused(words)) => words,
            other => panic!("{other:?}"),
        }
    };
    assert!(refused(house.sink("{payload}")).await.contains("payload"));
    assert!(refused(redis("t").url("http://host")).await.contains("URL"));
    house.run(&["SET", "PREFIX.text", "text"]).await;
    assert!(refused(house.sink("text")).await.contains("holds a string"));
    let nobody = redis("t").url("redis://:hunter2@127.0.0.1:1");
    let error = nobody.open().await.expect_err("nobody is there");
    assert!(matches!(&error, BrokerError::Unavailable(words) if !words.contains("hunter2")), "{error}");
    assert!(is_again(&nobody.send(&[outgoing(draft("t", "k"))]).await[0]));

    let sink = house.sink("trimmed").max_len_approx(10);
    let warnings = sink.open().await.expect("opens");
    assert!(warnings.iter().any(|w| w.contains("trimmed to about 10 entries")), "{warnings:?}");
    let batch: Vec<Outgoing> = (0..1000).map(|n| outgoing(draft("t", &format!("k{n}")))).collect();
    assert_eq!(sink.send(&batch).await, vec![Ok(()); 1000]);
    let there = house.ids("trimmed").await.len();
    assert!((10..500).contains(&there), "{there} entries");

    let server = RedisServer::with(&[("appendonly", "no"), ("maxmemory", "1gb"), ("maxmemory-policy", "allkeys-lru")]);
    let warnings = redis("t").url(server.url()).open().await.expect("opens").join("\n");
    assert!(warnings.contains("nothing on disk") && warnings.contains("allkeys-lru"), "{warnings}");
    // Who may not see the settings is told nothing of them.
    let house = House::on(server.url()).await;
    house.run(&["ACL", "SETUSER", "shop", "on", ">pw", "~*", "+xadd", "+type"]).await;
    let restricted = redis("t").url(server.url().replace("//", "//shop:pw@"));
    assert_eq!(restricted.open().await, Ok(Vec::new()));
    assert_eq!(restricted.send(&[outgoing(draft("t", "k"))]).await, [Ok(())]);
}

#[tokio::test]
async fn a_cluster_takes_each_command() {
    // One node that has all slots: it refuses what names keys of two.
    let server = RedisServer::with(&[("cluster-enabled", "yes")]);
    let house = House::on(server.url()).await;
    house.run(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]).await;
    let (a, b) = (format!("{}.a", house.prefix), format!("{}.b", house.prefix));
    let batch: Vec<Outgoing> = (0..12).map(|n| outgoing(draft(["a", "b"][n % 2], ["k", "l", "m"][n % 3]))).collect();
    let sink = house.sink("{topic}");
    sink.open().await.expect("opens");
    // Until it has noticed that it has them.
    while sink.send(&batch[..1]).await != [Ok(())] {}
    let both = cmd("XREAD").arg("STREAMS").arg(&[&a, &b]).arg(&["0", "0"]).exec_async(&mut house.redis.clone()).await;
    assert!(both.expect_err("two slots").to_string().contains("CrossSlot"), "the node is that strict");
    assert_eq!(sink.send(&batch).await, vec![Ok(()); 12]);
    assert_eq!((house.ids("a").await.len(), house.ids("b").await.len()), (7, 6));
    let mut source = postbox::source::redis_stream(&a).url(&house.url).group("shop").min_idle(Duration::ZERO);
    for _ in 0..2 {
        // New, and its own again, or claimed.
        postbox::source::Source::open(&mut source, None).await.expect("opens");
        assert_eq!(postbox::source::Source::read(&mut source).await.expect("reads").entries.len(), 7);
        postbox::source::Source::standing(&mut source).await.expect("stands");
    }
}
