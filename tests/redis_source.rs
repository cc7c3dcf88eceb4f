//! The Redis source against a real server: what comes first, what comes again, what is lost, and where it goes on.

use std::collections::HashSet;
use std::time::Duration;

use postbox::BrokerError;
use postbox::source::{Read, RedisSource, Source, redis_stream};
use postbox_testkit::{Lost, Proxy, RedisServer, shared_redis_url};
use redis::aio::MultiplexedConnection;
use redis::{Value, cmd};

/// A stream of its own, and a connection to look at it.
struct Stream {
    url: String,
    name: String,
    redis: MultiplexedConnection,
}

impl Stream {
    async fn new() -> Stream {
        Stream::on(shared_redis_url()).await
    }

    async fn on(url: String) -> Stream {
        let redis = connect(&url).await;
        Stream { url, name: format!("postbox-test-{}", uuid::Uuid::now_v7()), redis }
    }

    /// A source that reads it; its consumers have this prefix.
    fn source(&self, prefix: &str) -> RedisSource {
        let source = redis_stream(&self.name).url(&self.url).group("shop").consumer_prefix(prefix);
        source.block(Duration::from_millis(100))
    }

    async fn opened(&self, prefix: &str) -> RedisSource {
        let mut source = self.source(prefix);
        source.open(None).await.expect("opens");
        source
    }

    /// Adds so many entries; their positions.
    async fn add(&mut self, entries: usize) -> Vec<String> {
        let mut pipe = redis::pipe();
        for n in 0..entries {
            pipe.cmd("XADD").arg(&self.name).arg("*").arg("n").arg(n);
        }
        let ids: Vec<String> = pipe.query_async(&mut self.redis).await.expect("added");
        ids.into_iter().map(|id| format!("{}/{id}", self.name)).collect()
    }

    /// A command on the stream.
    async fn run(&mut self, command: &[&str]) -> Value {
        let mut built = cmd(command[0]);
        for argument in &command[1..] {
            built.arg(if *argument == "STREAM" { &self.name } else { *argument });
        }
        built.query_async(&mut self.redis).await.expect("the test's command")
    }

    /// Until somebody waits at the server for entries; for servers of one's own.
    async fn somebody_waits(&self) {
        let mut redis = self.redis.clone();
        let waits = async {
            loop {
                let clients: String = cmd("INFO").arg("clients").query_async(&mut redis).await.expect("clients");
                if clients.contains("blocked_clients:1") {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(20), waits).await.expect("somebody waits");
    }

    /// What the group has not acknowledged.
    async fn pending(&mut self) -> usize {
        let pending: (usize, Value, Value, Value) =
            cmd("XPENDING").arg(&self.name).arg("shop").query_async(&mut self.redis).await.expect("pending");
        pending.0
    }
}

async fn connect(url: &str) -> MultiplexedConnection {
    let client = redis::Client::open(url).expect("a URL");
    let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(Duration::from_secs(30)));
    client.get_multiplexed_async_connection_with_config(&config).await.expect("a connection")
}

fn positions(read: &Read) -> Vec<String> {
    read.entries.iter().map(|entry| entry.position.clone()).collect()
}

fn deliveries(read: &Read) -> Vec<u32> {
    read.entries.iter().map(|entry| entry.deliveries).collect()
}

async fn acknowledge(source: &mut RedisSource, read: &Read) {
    source.acknowledge(&positions(read)).await.expect("acknowledges");
}

/// Reads until something comes: a take-over has to wait until it is due.
async fn something(source: &mut RedisSource) -> Read {
    let read = async {
        loop {
            let read = source.read().await.expect("reads");
            if read != Read::default() {
                return read;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), read).await.expect("something")
}

#[tokio::test]
async fn what_was_not_acknowledged_comes_first() {
    let mut stream = Stream::new().await;
    let mut first = stream.opened("host").await;
    let old = stream.add(3).await;
    let read = something(&mut first).await;
    assert_eq!((positions(&read), deliveries(&read)), (old.clone(), vec![1, 1, 1]));
    let name = first.consumer().map(str::to_owned);
    assert_eq!(name.as_deref(), Some("host-1"));
    // It ends without a word; meanwhile more has come.
    drop(first);
    let new = stream.add(2).await;
    let mut again = stream.source("host").batch(2);
    again.open(None).await.expect("opens");
    assert_eq!(again.consumer().map(str::to_owned), name, "the same consumer");
    let read = again.read().await.expect("reads");
    assert_eq!((positions(&read), deliveries(&read)), (old[..2].to_vec(), vec![2, 2]), "a batch is two");
    acknowledge(&mut again, &read).await;
    let read = again.read().await.expect("reads");
    assert_eq!((positions(&read), deliveries(&read)), (old[2..].to_vec(), vec![2]));
    acknowledge(&mut again, &read).await;
    let read = again.read().await.expect("reads");
    assert_eq!((positions(&read), deliveries(&read)), (new, vec![1, 1]));
    acknowledge(&mut again, &read).await;
    assert_eq!(again.read().await.expect("reads"), Read::default());
    assert_eq!(stream.pending().await, 0);
}

#[tokio::test]
async fn what_was_read_and_not_committed_comes_again_and_is_counted() {
    let mut stream = Stream::new().await;
    let mut source = stream.opened("host").await;
    let added = stream.add(2).await;
    for times in 1..=4 {
        let read = something(&mut source).await;
        assert_eq!((positions(&read), deliveries(&read)), (added.clone(), vec![times; 2]));
        assert_eq!(source.read().await.expect("reads"), Read::default(), "what the worker has does not come twice");
        source.open(None).await.expect("opens anew");
    }
    source.acknowledge(&added[..1]).await.expect("acknowledges");
    let read = something(&mut source).await;
    assert_eq!((positions(&read), deliveries(&read)), (added[1..].to_vec(), vec![5]));
}

#[tokio::test]
async fn a_read_that_is_dropped_loses_nothing() {
    let server = RedisServer::start();
    let mut stream = Stream::on(server.url()).await;
    let mut source = stream.source("host").block(Duration::from_secs(2));
    source.open(None).await.expect("opens");
    tokio::select! {
        biased;
        read = source.read() => panic!("nothing is there: {read:?}"),
        () = stream.somebody_waits() => {}
    }
    // It is dropped here, and still waits at the server: what comes now is handed to it.
    let added = stream.add(1).await;
    let read = something(&mut source).await;
    assert_eq!((positions(&read), deliveries(&read)), (added, vec![2]));
}

#[tokio::test]
async fn a_dead_consumers_entries_are_taken_over() {
    let mut stream = Stream::new().await;
    let mut dead = stream.source("dead").batch(25);
    dead.open(None).await.expect("opens");
    let added = stream.add(25).await;
    assert_eq!(something(&mut dead).await.entries.len(), 25);
    dead.close().await;
    let mut heir = stream.source("heir").min_idle(Duration::from_millis(30));
    heir.open(None).await.expect("opens");
    let mut taken = Vec::new();
    while taken.len() < 25 {
        let read = something(&mut heir).await;
        assert!(deliveries(&read).iter().all(|d| *d == 2), "{read:?}");
        taken.extend(positions(&read));
        acknowledge(&mut heir, &read).await;
    }
    assert_eq!(taken, added, "in their order, over several claims");
    assert_eq!(stream.pending().await, 0);
}

#[tokio::test]
async fn what_is_pending_and_deleted_is_told_as_lost() {
    let mut stream = Stream::new().await;
    let mut source = stream.opened("host").await;
    let added = stream.add(3).await;
    something(&mut source).await;
    let id = added[1].rsplit('/').next().expect("an id").to_owned();
    stream.run(&["XDEL", "STREAM", &id]).await;
    // Its own: until what was told is on record, it is told again.
    for _ in 0..2 {
        source.open(None).await.expect("opens anew");
        let read = source.read().await.expect("reads");
        assert_eq!(positions(&read), [added[0].clone(), added[2].clone()]);
        assert_eq!(read.lost, [added[1].clone()]);
    }
    source.acknowledge(&[added[0].clone(), added[2].clone()]).await.expect("acknowledges");
    assert_eq!(stream.pending().await, 1, "what was told as lost may not be on record");
    source.acknowledge(&added[1..2]).await.expect("acknowledges");
    assert_eq!(stream.pending().await, 0);
    source.open(None).await.expect("opens anew");
    assert_eq!(source.read().await.expect("reads"), Read::default());

    // Another's, that are claimed: Redis tells of them once, and this goes on until they are on record.
    let added = stream.add(2).await;
    something(&mut source).await;
    source.close().await;
    for position in &added {
        let id = position.rsplit('/').next().expect("an id").to_owned();
        stream.run(&["XDEL", "STREAM", &id]).await;
    }
    let mut heir = stream.source("heir").min_idle(Duration::ZERO);
    heir.open(None).await.expect("opens");
    let read = something(&mut heir).await;
    assert_eq!((read.entries.len(), read.lost), (0, added.clone()));
    heir.open(None).await.expect("opens anew");
    assert_eq!(heir.read().await.expect("reads").lost, added);
    assert_eq!(heir.read().await.expect("reads"), Read::default(), "they were told, and the source not opened again");
    heir.acknowledge(&added).await.expect("acknowledges");
    heir.open(None).await.expect("opens anew");
    assert_eq!(heir.read().await.expect("reads"), Read::default(), "they are on record");
    assert_eq!(stream.pending().await, 0);
}

#[tokio::test]
async fn a_group_that_is_gone_goes_on_from_the_checkpoint() {
    let mut stream = Stream::new().await;
    let mut source = stream.opened("host").await;
    let added = stream.add(5).await;
    source.read().await.expect("reads");
    source.acknowledge(&added[..3]).await.expect("acknowledges");
    let checkpoint = source.standing().await.expect("stands").checkpoint.expect("a checkpoint");
    assert_eq!(checkpoint, id_of(&added[2]));
    for told_at_open in [false, true] {
        stream.run(&["XGROUP", "DESTROY", "STREAM", "shop"]).await;
        if told_at_open {
            // Another process: it knows of the checkpoint what it is told.
            source = stream.source("other");
            source.open(Some(&checkpoint)).await.expect("opens");
        }
        let read = something(&mut source).await;
        assert_eq!((positions(&read), deliveries(&read)), (added[3..].to_vec(), vec![1, 1]));
    }
    // Without one it is the beginning, and never the end.
    stream.run(&["XGROUP", "DESTROY", "STREAM", "shop"]).await;
    let mut source = stream.opened("third").await;
    assert_eq!(positions(&something(&mut source).await), added);
}

fn id_of(position: &str) -> &str {
    position.rsplit('/').next().expect("an id")
}

#[tokio::test]
async fn another_stream_of_the_name_is_read_from_its_beginning() {
    let mut stream = Stream::new().await;
    let mut source = stream.opened("host").await;
    let added = stream.add(1).await;
    source.read().await.expect("reads");
    source.acknowledge(&added).await.expect("acknowledges");
    source.standing().await.expect("stands");
    stream.run(&["DEL", "STREAM"]).await;
    // Its ids are below the checkpoint of the one that is gone.
    stream.run(&["XADD", "STREAM", "1-1", "n", "1"]).await;
    let read = something(&mut source).await;
    assert_eq!(positions(&read), [format!("{}/1-1", stream.name)]);
    acknowledge(&mut source, &read).await;
    assert_eq!(source.standing().await.expect("stands").checkpoint.as_deref(), Some("1-1"));
}

#[tokio::test]
async fn a_stream_that_goes_while_somebody_waits_is_made_anew() {
    let server = RedisServer::start();
    let mut stream = Stream::on(server.url()).await;
    let mut source = stream.source("host").block(Duration::from_secs(20));
    source.open(None).await.expect("opens");
    let waiting = tokio::spawn(async move { source.read().await });
    stream.somebody_waits().await;
    stream.run(&["DEL", "STREAM"]).await;
    let added = stream.add(1).await;
    let read = waiting.await.expect("no panic").expect("reads");
    assert_eq!(positions(&read), added);
}

#[tokio::test]
async fn consumers_share_a_group() {
    let mut stream = Stream::new().await;
    let added: HashSet<String> = stream.add(500).await.into_iter().collect();
    let drain = |mut source: RedisSource| async move {
        source.open(None).await.expect("opens");
        let mut all = Vec::new();
        loop {
            let read = source.read().await.expect("reads");
            if read == Read::default() {
                return (source.consumer().map(str::to_owned), all);
            }
            acknowledge(&mut source, &read).await;
            all.extend(positions(&read));
        }
    };
    let (one, two, three) =
        tokio::join!(drain(stream.source("host")), drain(stream.source("host")), drain(stream.source("host")));
    let names: HashSet<_> = [&one.0, &two.0, &three.0].into_iter().collect();
    assert_eq!(names.len(), 3, "each has a name of its own: {names:?}");
    let all: Vec<String> = [one.1, two.1, three.1].concat();
    assert_eq!(all.len(), 500, "each went to one");
    assert_eq!(all.into_iter().collect::<HashSet<_>>(), added);
    assert_eq!(stream.pending().await, 0);
}

#[tokio::test]
async fn it_says_how_far_it_is() {
    let mut stream = Stream::new().await;
    let mut source = stream.opened("host").await;
    let standing = source.standing().await.expect("stands");
    assert_eq!((standing.lag, standing.checkpoint.as_deref()), (Some(0), Some("0-0")));
    let added = stream.add(14).await;
    assert_eq!(source.read().await.expect("reads").entries.len(), 10, "a batch by default");
    let standing = source.standing().await.expect("stands");
    let (checkpoint, first) = (standing.checkpoint.expect("a checkpoint"), id_of(&added[0]));
    assert_eq!(standing.lag, Some(14), "handed out and not acknowledged, and not handed out");
    assert!(below(&checkpoint, first), "{checkpoint} is below {first}");
    source.acknowledge(&[added[0].clone(), added[2].clone()]).await.expect("acknowledges");
    let standing = source.standing().await.expect("stands");
    let checkpoint = standing.checkpoint.expect("a checkpoint");
    assert!(!below(&checkpoint, first) && below(&checkpoint, id_of(&added[1])), "the second is not acknowledged");
    assert_eq!(standing.lag, Some(12));
    source.acknowledge(&added[..10]).await.expect("acknowledges");
    let standing = source.standing().await.expect("stands");
    assert_eq!((standing.lag, standing.checkpoint.as_deref()), (Some(4), Some(id_of(&added[9]))));
    // Redis cannot count any more where entries are gone from the middle.
    stream.run(&["XDEL", "STREAM", id_of(&added[12])]).await;
    assert_eq!(source.standing().await.expect("stands").lag, None);
}

fn below(a: &str, b: &str) -> bool {
    let parts = |id: &str| {
        let (ms, seq) = id.split_once('-').expect("an id");
        (ms.parse::<u64>().expect("a number"), seq.parse::<u64>().expect("a number"))
    };
    parts(a) < parts(b)
}

#[tokio::test]
async fn bytes_come_as_they_are() {
    let mut stream = Stream::new().await;
    let fields: [(&[u8], &[u8]); 4] = [(b"a", b"1"), (b"a", b"2"), (&[0xff, 0, b'\n'], &[0, 0xfe]), (b"", b"")];
    let mut add = cmd("XADD");
    add.arg(&stream.name).arg("*");
    for (name, value) in fields {
        add.arg(name).arg(value);
    }
    add.exec_async(&mut stream.redis).await.expect("added");
    let mut source = stream.opened("host").await;
    let read = something(&mut source).await;
    let wanted: Vec<_> = fields.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
    assert_eq!((read.entries[0].raw.fields.clone(), read.entries[0].raw.body.clone()), (wanted, None));
}

#[tokio::test]
async fn consumers_long_silent_are_deleted_unless_they_hold_something() {
    let mut stream = Stream::new().await;
    let mut holding = stream.opened("holding").await;
    stream.add(1).await;
    something(&mut holding).await;
    let mut idle = stream.opened("idle").await;
    idle.read().await.expect("reads");
    let consumers = |mut redis: MultiplexedConnection, stream: String| async move {
        let all: Vec<std::collections::HashMap<String, Value>> =
            cmd("XINFO").arg("CONSUMERS").arg(stream).arg("shop").query_async(&mut redis).await.expect("consumers");
        all.iter().filter_map(|c| redis::from_redis_value(c["name"].clone()).ok()).collect::<HashSet<String>>()
    };
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<HashSet<String>>();
    stream.opened("later").await;
    assert_eq!(consumers(stream.redis.clone(), stream.name.clone()).await, names(&["holding-1", "idle-1"]));
    let mut later = stream.source("later").forget_after(Duration::ZERO);
    later.open(None).await.expect("opens");
    assert_eq!(consumers(stream.redis.clone(), stream.name.clone()).await, names(&["holding-1"]));
    // Who was deleted goes on as if nothing had been.
    let added = stream.add(1).await;
    assert_eq!(positions(&something(&mut idle).await), added);
}

#[tokio::test]
async fn what_cannot_work_is_refused_and_what_may_pass_is_not() {
    let mut stream = Stream::new().await;
    let url = stream.url.clone();
    let refused = |mut source: RedisSource| async move {
        match source.open(None).await {
            Err(BrokerError::Refused(words)) => words,
            other => panic!("{other:?}"),
        }
    };
    assert!(refused(redis_stream("s").url("http://host")).await.contains("URL"));
    assert!(refused(redis_stream("").url(&url)).await.contains("0 bytes"));
    assert!(refused(redis_stream("s".repeat(201)).url(&url)).await.contains("201 bytes"));
    assert!(refused(redis_stream("s").url(&url).group("")).await.contains("empty"));
    stream.run(&["SET", "STREAM", "text"]).await;
    let words = refused(stream.source("host")).await;
    assert!(words.contains(&stream.name) && words.contains("WRONGTYPE"), "which key, and the server's words: {words}");
    let nobody = redis_stream("s").url("redis://:hunter2@127.0.0.1:1").open(None).await.expect_err("nobody is there");
    assert!(matches!(nobody, BrokerError::Unavailable(_)), "{nobody}");
    assert!(!nobody.to_string().contains("hunter2") && nobody.to_string().contains("127.0.0.1:1"), "{nobody}");
    let mut closed = stream.source("host");
    assert!(matches!(closed.read().await, Err(BrokerError::Unavailable(_))));

    let server = RedisServer::with(&[("requirepass", "right"), ("appendonly", "no")]);
    let with = |password: &str| redis_stream("s").url(format!("redis://:{password}@127.0.0.1:{}", server.port()));
    let words = refused(with("hunter2")).await;
    assert!(!words.contains("hunter2"), "{words}");
    let warnings = with("right").open(None).await.expect("opens");
    assert!(warnings.iter().any(|w| w.contains("nothing on disk")), "{warnings:?}");
    let client = redis::Client::open(format!("redis://:right@127.0.0.1:{}", server.port())).expect("a URL");
    redis_stream("s").client(client).open(None).await.expect("a client of one's own");
}

#[tokio::test]
async fn entries_that_were_trimmed_unread_are_warned_of() {
    let mut stream = Stream::new().await;
    let mut source = stream.source("host").batch(1);
    source.open(None).await.expect("opens");
    let added = stream.add(4).await;
    assert_eq!(source.read().await.expect("reads").entries.len(), 1);
    source.acknowledge(&added[..1]).await.expect("acknowledges");
    let about_trimmed = |warnings: Vec<String>| warnings.into_iter().find(|w| w.contains("trimmed"));
    stream.run(&["XTRIM", "STREAM", "MAXLEN", "3"]).await;
    assert_eq!(about_trimmed(source.open(None).await.expect("opens")), None, "what is trimmed was read");
    stream.run(&["XTRIM", "STREAM", "MAXLEN", "1"]).await;
    let warning = about_trimmed(source.open(None).await.expect("opens")).expect("a warning");
    assert!(warning.contains("at least 2 entries"), "{warning}");
    assert_eq!(positions(&something(&mut source).await), added[3..]);
}

#[tokio::test]
async fn a_server_that_was_killed_has_what_it_had() {
    let mut server = RedisServer::start();
    let mut stream = Stream::on(server.url()).await;
    let mut source = stream.opened("host").await;
    let added = stream.add(4).await;
    something(&mut source).await;
    source.acknowledge(&added[..1]).await.expect("acknowledges");
    server.kill();
    assert!(matches!(source.read().await, Err(BrokerError::Unavailable(_))));
    assert!(matches!(source.acknowledge(&added[1..2]).await, Err(BrokerError::Unavailable(_))));
    assert!(matches!(source.open(None).await, Err(BrokerError::Unavailable(_))));
    server.up();
    source.open(None).await.expect("opens");
    // Positions of the connection that was lost are still good.
    source.acknowledge(&added[1..2]).await.expect("acknowledges");
    let read = something(&mut source).await;
    assert_eq!((positions(&read), deliveries(&read)), (added[2..].to_vec(), vec![2, 2]));
}

#[tokio::test]
async fn a_connection_that_is_cut_loses_nothing() {
    let server = RedisServer::start();
    let mut stream = Stream::on(server.url()).await;
    let proxy = Proxy::start(server.port()).await;
    let mut source = stream.source("host").url(format!("redis://127.0.0.1:{}", proxy.port()));
    source.open(None).await.expect("opens");
    let mut added = stream.add(40).await;
    // Before a command, after it, and everything at once: each time the source is opened again.
    let cuts =
        [(Lost::Request, "XREADGROUP"), (Lost::Reply, "XREADGROUP"), (Lost::Request, "XACK"), (Lost::Reply, "XACK")];
    let mut taken = HashSet::new();
    let mut cuts = cuts.into_iter();
    while taken.len() < added.len() {
        match cuts.next() {
            Some((lost, word)) => proxy.arm(lost, word),
            None => proxy.cut_all(),
        }
        let read = match source.read().await {
            Ok(read) => read,
            Err(error) => {
                assert!(matches!(error, BrokerError::Unavailable(_)), "{error}");
                source.open(None).await.expect("opens again");
                source.read().await.expect("reads")
            }
        };
        if source.acknowledge(&positions(&read)).await.is_err() {
            source.open(None).await.expect("opens again");
            source.acknowledge(&positions(&read)).await.expect("acknowledges");
        }
        taken.extend(positions(&read));
    }
    added.sort();
    let mut taken: Vec<String> = taken.into_iter().collect();
    taken.sort();
    assert_eq!(taken, added);
    assert_eq!(stream.pending().await, 0);
}
