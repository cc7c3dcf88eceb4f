//! Redis in and out, with everything that fails while it runs: processes are really killed, Redis and PostgreSQL
//! restarted, connections cut. In: one row for each id, what is malformed in quarantine byte for byte, and nothing
//! acknowledged without a row. Out: everything confirmed is there, in order of each key.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use postbox::admin::{Filter, QuarantineFilter};
use postbox::lifecycle::State;
use postbox::{Envelope, Postgres, Sqlite};
use postbox_testkit::{Fresh, Lost, Proxy, RedisServer, Server, Testable, WorkerProcess, fresh_on};
use redis::aio::MultiplexedConnection;
use redis::{Value, cmd};
use serde_json::json;

const BRIDGE: &str = env!("CARGO_BIN_EXE_postbox-test-bridge");
const PATIENCE: Duration = Duration::from_secs(180);
/// Between two looks: those who are looked at work on the same two cores.
const LOOK: Duration = Duration::from_millis(20);
const STREAM: &str = "payments";

/// Each starts processes enough for the whole machine.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

type Fields = Vec<(Vec<u8>, Vec<u8>)>;

/// What is put into the stream: the entries, and the id of each, or none if it is malformed.
struct Load {
    entries: Vec<(Option<String>, Fields)>,
    /// How many have been added.
    added: usize,
    /// The entry's id in the stream, for those.
    at: Vec<String>,
}

impl Load {
    /// 10,000: one of a hundred is malformed, five of a hundred are there twice.
    fn new() -> Load {
        let mut entries = Vec::new();
        let mut fresh = 0;
        for n in 0..10_000 {
            let again = n % 20 == 11 && n > 100;
            if n % 100 == 50 {
                entries.push((None, malformed(n)));
            } else if again {
                // From a while ago, or from the same batch.
                let back = if n % 40 == 11 { 77 } else { 3 };
                let earlier: (Option<String>, Fields) = entries[n - back].clone();
                entries.push(if earlier.0.is_some() { earlier } else { entries[n - back - 1].clone() });
            } else {
                fresh += 1;
                entries.push((Some(format!("p-{fresh}")), wellformed(fresh)));
            }
        }
        Load { entries, added: 0, at: Vec::new() }
    }

    fn ids(&self) -> BTreeSet<&str> {
        self.entries.iter().filter_map(|(id, _)| id.as_deref()).collect()
    }

    fn malformed(&self) -> Vec<&Fields> {
        self.entries.iter().filter(|(id, _)| id.is_none()).map(|(_, fields)| fields).collect()
    }

    async fn add(&mut self, redis: &mut MultiplexedConnection, entries: usize) {
        let upto = self.entries.len().min(self.added + entries);
        let mut pipe = redis::pipe();
        for (_, fields) in &self.entries[self.added..upto] {
            pipe.cmd("XADD").arg(STREAM).arg("*");
            for (name, value) in fields {
                pipe.arg(name.as_slice()).arg(value.as_slice());
            }
        }
        let ids: Vec<String> = pipe.query_async(redis).await.expect("added");
        self.added = upto;
        self.at.extend(ids);
    }
}

fn fields(pairs: &[(&str, &[u8])]) -> Fields {
    pairs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec())).collect()
}

/// In each of the formats in turn.
fn wellformed(n: usize) -> Fields {
    let (id, payload) = (format!("p-{n}"), format!(r#"{{"n": {n}}}"#));
    let key = format!("customer-{}", n % 97);
    match n % 3 {
        0 => fields(&[
            ("ce-specversion", b"1.0"),
            ("ce-id", id.as_bytes()),
            ("ce-source", b"/pay"),
            ("ce-type", b"in.paid"),
            ("ce-partitionkey", key.as_bytes()),
            ("data", payload.as_bytes()),
        ]),
        1 => fields(&[
            ("event_id", id.as_bytes()),
            ("event_type", b"in.paid"),
            ("aggregate_id", key.as_bytes()),
            ("occurred_on", b"2026-11-28T12:00:00Z"),
            ("payload", payload.as_bytes()),
        ]),
        _ => {
            let event =
                format!(r#"{{"event_id":"{id}","event_type":"in.paid","aggregate_id":"{key}","payload":{payload}}}"#);
            fields(&[("data", event.as_bytes())])
        }
    }
}

fn malformed(n: usize) -> Fields {
    let mark = format!("m-{n}");
    match n / 100 % 6 {
        0 => fields(&[("event_id", mark.as_bytes()), ("event_type", b"in.paid"), ("payload", &[0xff, 0xfe, b'{', 0])]),
        1 => fields(&[("event_id", mark.as_bytes()), ("event_type", b"in.paid"), ("payload", b"{\"n\": ")]),
        2 => fields(&[("event_type", b"in.paid"), ("payload", b"{}"), ("mark", mark.as_bytes())]),
        3 => fields(&[("event_id", mark.as_bytes()), ("event_type", b"in.paid"), ("payload", b"\"a\\u0000b\"")]),
        4 => fields(&[
            ("event_id", mark.as_bytes()),
            ("event_type", b"in.paid"),
            ("occurred_on", b"the day before yesterday"),
            ("payload", b"{}"),
        ]),
        _ => vec![(vec![0xc3, 0x28], mark.into_bytes()), (b"nothing".to_vec(), b"known".to_vec())],
    }
}

/// A store, a Redis server, and a proxy between the workers and it.
struct House<Db: Testable> {
    fresh: Fresh<Db>,
    redis: RedisServer,
    proxy: Proxy,
}

impl<Db: Testable> House<Db> {
    async fn new(fresh: Fresh<Db>) -> House<Db> {
        let redis = RedisServer::start();
        let proxy = Proxy::start(redis.port()).await;
        let table = format!("create table {} (message text not null)", fresh.table("projected"));
        Db::execute(&fresh, &table).await;
        House { fresh, redis, proxy }
    }

    fn start(&self, variables: &[(&str, &str)]) -> WorkerProcess {
        let url = format!("redis://127.0.0.1:{}", self.proxy.port());
        let mut all = vec![("TEST_REDIS", url.as_str())];
        all.extend(variables);
        WorkerProcess::start(BRIDGE, &self.fresh, &all)
    }

    async fn connect(&self) -> MultiplexedConnection {
        let client = redis::Client::open(self.redis.url()).expect("a URL");
        let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
        client.get_multiplexed_async_connection_with_config(&config).await.expect("a connection")
    }

    fn messages(&self) -> String {
        match <Db as Testable>::NAME {
            "postgres" => format!("{}.message", self.fresh.schema()),
            _ => "postbox_message".into(),
        }
    }

    async fn count(&self, what: &str, from: &str) -> i64 {
        Db::count(&self.fresh, &format!("select {what} from {from}")).await
    }

    /// Waits until so many messages are in the test's table.
    async fn noted(&self, wanted: i64) {
        let table = self.fresh.table("projected");
        let looking = async {
            while self.count("count(*)", &table).await < wanted {
                tokio::time::sleep(LOOK).await;
            }
        };
        if tokio::time::timeout(PATIENCE, looking).await.is_err() {
            let sources = self.fresh.postbox.admin().sources().await.expect("sources");
            panic!("only {} of {wanted} are noted: {sources:?}", self.count("count(*)", &table).await);
        }
    }

    /// Waits until so many consumers read.
    async fn consumers(&self, redis: &mut MultiplexedConnection, wanted: usize) {
        let looking = async {
            loop {
                let asked: Result<Vec<Value>, _> =
                    cmd("XINFO").arg("CONSUMERS").arg(STREAM).arg("shop").query_async(redis).await;
                if asked.is_ok_and(|consumers| consumers.len() >= wanted) {
                    return;
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::time::timeout(PATIENCE, looking).await.expect("consumers");
    }

    /// What is acknowledged at this moment has its row, or stands in quarantine.
    async fn nothing_is_acknowledged_without_a_row(&self, load: &Load, redis: &mut MultiplexedConnection) -> usize {
        let groups: Vec<HashMap<String, Value>> =
            cmd("XINFO").arg("GROUPS").arg(STREAM).query_async(redis).await.expect("groups");
        let last: String = redis::from_redis_value(groups[0]["last-delivered-id"].clone()).expect("an id");
        // Those that were handed out by then, and are not pending now.
        let pending: Vec<(String, String, u64, u64)> = cmd("XPENDING")
            .arg(STREAM)
            .arg("shop")
            .arg("-")
            .arg("+")
            .arg(100_000)
            .query_async(redis)
            .await
            .expect("pending");
        let pending: BTreeSet<&str> = pending.iter().map(|(id, ..)| id.as_str()).collect();
        let handed_out = load.at.iter().position(|id| *id == last).map_or(0, |at| at + 1);
        let (mut ids, mut positions) = (BTreeSet::new(), BTreeSet::new());
        for (at, (id, _)) in load.at[..handed_out].iter().zip(&load.entries) {
            match id {
                _ if pending.contains(at.as_str()) => {}
                Some(id) => {
                    ids.insert(id.as_str());
                }
                None => {
                    positions.insert(format!("{STREAM}/{at}"));
                }
            }
        }
        let listed: Vec<String> = ids.iter().map(|id| format!("'{id}'")).collect();
        for some in listed.chunks(2000) {
            let from = format!("{} where external_id in ({})", self.messages(), some.join(","));
            assert_eq!(self.count("count(*)", &from).await, some.len() as i64, "acknowledged, and not there");
        }
        let kept =
            self.fresh.postbox.admin().quarantine(&QuarantineFilter::default(), 10_000).await.expect("quarantine");
        let kept: BTreeSet<String> = kept.into_iter().map(|row| row.position).collect();
        assert!(positions.is_subset(&kept), "acknowledged, and not in quarantine: {positions:?}");
        ids.len() + positions.len()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_is_received_once_on_postgres() {
    let _alone = ALONE.lock().await;
    let mut server = Server::start();
    let house = House::<Postgres>::new(fresh_on(&server).await).await;
    let restart = || {
        server.crash();
        server.up();
    };
    each_is_received_once(house, restart).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_is_received_once_on_sqlite() {
    let _alone = ALONE.lock().await;
    let house = House::new(Sqlite::fresh().await).await;
    each_is_received_once(house, || {}).await;
}

async fn each_is_received_once<Db: Testable>(mut house: House<Db>, mut restart_database: impl FnMut()) {
    let (mut load, mut redis) = (Load::new(), house.connect().await);
    let receives = ("TEST_STREAM", STREAM);
    let start = |house: &House<Db>| house.start(&[receives]);
    let doomed = |house: &House<Db>, at: &'static str| house.start(&[receives, ("POSTBOX_CRASH_POINT", at)]);

    // Three, of whom one is killed between its commit and its acknowledgement.
    // At its first batch: the others may be quicker with the rest, where one writes at a time.
    let dying = doomed(&house, "received");
    let mut alive = vec![start(&house), start(&house)];
    house.consumers(&mut redis, 3).await;
    load.add(&mut redis, 2000).await;
    dying.kill_at("received").await;
    assert!(house.nothing_is_acknowledged_without_a_row(&load, &mut redis).await > 0);
    alive.push(start(&house));

    // Redis is killed, and comes again.
    house.noted(1000).await;
    house.redis.kill();
    house.redis.up();
    redis = house.connect().await;
    load.add(&mut redis, 2000).await;
    house.noted(2500).await;

    // The database likewise.
    restart_database();
    load.add(&mut redis, 2000).await;
    house.noted(4200).await;
    house.nothing_is_acknowledged_without_a_row(&load, &mut redis).await;

    // Connections are cut around what they say.
    for (lost, word) in [(Lost::Reply, "XREADGROUP"), (Lost::Request, "XACK"), (Lost::Reply, "XACK")] {
        house.proxy.arm(lost, word);
        load.add(&mut redis, 600).await;
        house.proxy.cut().await;
    }
    house.proxy.cut_all();
    house.nothing_is_acknowledged_without_a_row(&load, &mut redis).await;

    // All are killed wherever they are, and one when it has read and nothing is committed.
    for worker in alive.drain(..) {
        worker.kill().await;
    }
    let dying = doomed(&house, "read:2");
    load.add(&mut redis, 1000).await;
    dying.kill_at("read").await;
    house.nothing_is_acknowledged_without_a_row(&load, &mut redis).await;
    alive.extend([start(&house), start(&house), start(&house)]);
    while load.added < load.entries.len() {
        load.add(&mut redis, 100).await;
    }

    let wanted = load.ids().len() as i64;
    house.noted(wanted).await;
    let done = async {
        while house.nothing_is_acknowledged_without_a_row(&load, &mut redis).await < wanted as usize + 100 {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(PATIENCE, done).await.expect("all is acknowledged");
    let (messages, table) = (house.messages(), house.fresh.table("projected"));
    assert_eq!(house.count("count(*)", &messages).await, wanted, "one row for each id");
    assert_eq!(house.count("count(distinct external_id)", &messages).await, wanted);
    assert_eq!(house.count("count(*)", &table).await, wanted, "and each was handled once");
    assert_eq!(house.count("count(distinct message)", &table).await, wanted);
    let admin = house.fresh.postbox.admin();
    let source = admin.sources().await.expect("sources").pop().expect("a source");
    assert_eq!((source.received, source.quarantined), (wanted, 100), "{source:?}");
    assert_eq!((source.conflict, source.lost), (0, 0), "{source:?}");
    let repeated = load.entries.len() as i64 - wanted - 100;
    assert!(repeated > 490 && source.duplicate >= repeated, "{repeated} came twice: {source:?}");
    let mut kept = Vec::new();
    for row in admin.quarantine(&QuarantineFilter::default(), 1000).await.expect("quarantine") {
        assert_eq!(row.kind, "malformed");
        kept.push(admin.quarantined(row.id).await.expect("an entry").raw.fields);
    }
    let mut malformed: Vec<Fields> = load.malformed().into_iter().cloned().collect();
    kept.sort();
    malformed.sort();
    assert_eq!(kept, malformed, "byte for byte");
    for worker in alive {
        worker.kill().await;
    }
}

/// Keys.
const KEYS: usize = 500;
/// The one whose stream is none.
const POISONED: usize = 13;
/// How many messages a relay has in its hands at the most.
const WINDOW: usize = 200;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_are_sent_in_order_on_postgres() {
    let _alone = ALONE.lock().await;
    all_are_sent_in_order(House::<Postgres>::new(Postgres::fresh().await).await, 40).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_are_sent_in_order_on_sqlite() {
    let _alone = ALONE.lock().await;
    all_are_sent_in_order(House::<Sqlite>::new(Sqlite::fresh().await).await, 12).await;
}

/// So many messages of each key.
async fn all_are_sent_in_order<Db: Testable>(mut house: House<Db>, of_each: usize) {
    let mut redis = house.connect().await;
    let poisoned = format!("out-k{POISONED}");
    cmd("SET").arg(&poisoned).arg("text").exec_async(&mut redis).await.expect("a text");
    let window = WINDOW.to_string();
    let relays = [("TEST_TO", "out-{key}"), ("TEST_CONCURRENCY", window.as_str())];
    let doomed =
        |house: &House<Db>, at: &'static str| house.start(&[relays[0], relays[1], ("POSTBOX_CRASH_POINT", at)]);
    let publish = |fresh: &Fresh<Db>, rounds: std::ops::Range<usize>| {
        let postbox = fresh.postbox.clone();
        async move {
            for n in rounds {
                let drafts = (0..KEYS).map(|key| {
                    Envelope::json("out.placed", &json!({ "n": n })).map(|draft| draft.key(format!("k{key}")))
                });
                postbox.publish_now(drafts).await.expect("it publishes");
            }
        }
    };
    let admin = house.fresh.postbox.admin();
    let first = of_each / 3;
    let mut crashes = 1;
    let dying = doomed(&house, "relayed:3");
    // What is published before there is anybody to send it is taken up later, in no order with what is published then.
    let declared = async {
        while admin.sinks().await.expect("sinks").is_empty() {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(PATIENCE, declared).await.expect("the relay is declared");
    publish(&house.fresh, 0..first).await;
    let mut alive = vec![house.start(&relays)];
    dying.kill_at("relayed").await;
    alive.push(house.start(&relays));
    for (n, lost) in [Lost::Request, Lost::Reply, Lost::Reply].into_iter().enumerate() {
        house.proxy.arm(lost, "XADD");
        publish(&house.fresh, first + n..first + n + 1).await;
        house.proxy.cut().await;
        crashes += 1;
    }
    publish(&house.fresh, first + 3..first + 4).await;
    house.redis.kill();
    house.redis.up();
    house.proxy.arm(Lost::Reply, "XADD");
    publish(&house.fresh, first + 4..first + 5).await;
    house.proxy.cut().await;
    // With Redis, both of them; then one connection; then both processes, wherever they are.
    crashes += 5;
    for worker in alive.drain(..) {
        worker.kill().await;
    }
    let dying = doomed(&house, "relayed:3");
    crashes += 1;
    publish(&house.fresh, first + 5..of_each).await;
    dying.kill_at("relayed").await;
    alive.extend([house.start(&relays), house.start(&relays)]);

    let sent = (KEYS - 1) * of_each;
    let blocked = of_each - 1;
    let looking = async {
        loop {
            let sink = admin.sinks().await.expect("sinks").pop().expect("a relay");
            if sink.lag == blocked as i64 {
                return sink;
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    let sink = match tokio::time::timeout(PATIENCE, looking).await {
        Ok(sink) => sink,
        Err(_) => panic!("not all are sent: {:?}", admin.sinks().await),
    };
    assert_eq!((sink.dead, sink.blocked_keys), (1, 1), "the poisoned key waits for somebody, alone: {sink:?}");
    let mut filter = Filter::default();
    filter.states = vec![State::Dead];
    let dead = admin.list(&filter, 10).await.expect("dead letters");
    assert_eq!(dead.len(), 1);
    assert!(format!("{dead:?}").contains("WRONGTYPE"), "{dead:?}");

    let mut redis = house.connect().await;
    let (mut there, mut repeated) = (0, 0);
    for key in (0..KEYS).filter(|key| *key != POISONED) {
        let entries: Vec<(String, BTreeMap<String, String>)> =
            cmd("XRANGE").arg(format!("out-k{key}")).arg("-").arg("+").query_async(&mut redis).await.expect("entries");
        let (mut seen, mut order) = (HashMap::new(), Vec::new());
        for (_, fields) in &entries {
            let n = seen.entry(fields["ce-id"].clone()).or_insert_with(|| {
                order.push(fields["data"].clone());
                fields["data"].clone()
            });
            assert_eq!(*n, fields["data"], "what comes again is the same");
        }
        let wanted: Vec<String> = (0..of_each).map(|n| format!("{{\"n\":{n}}}")).collect();
        assert_eq!(order, wanted, "the order of key k{key}");
        there += order.len();
        repeated += entries.len() - order.len();
    }
    assert_eq!(there, sent, "each is there");
    assert!(repeated <= crashes * WINDOW, "{repeated} came again, after {crashes} crashes and cuts");
    for worker in alive {
        worker.kill().await;
    }
}
