//! Webhooks in and out while the processes that take and send them are killed with SIGKILL. In: senders that, like
//! those of GitHub, send again what got no 2xx; one message for each id, nothing answered 2xx without a row, what is
//! malformed in quarantine byte for byte. Out: everything arrives, what comes again has the id that it had, keys are
//! in order; an operation whose process was killed in between is in doubt, and is not called again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use postbox::Envelope;
use postbox::admin::{Filter, QuarantineFilter, Resolution};
use postbox::lifecycle::{Answer, State};
use postbox::signature::{Secret, TOLERANCE, standard};
use postbox_testkit::{Asked, Endpoint, Fresh, Testable, Then, WorkerProcess, on_both_stores};
use serde_json::{Value, json};
use tokio::sync::watch;

on_both_stores!(each_webhook_is_received_once, everything_is_sent_and_doubts_stay);

#[test]
fn planted_bugs_are_caught() {
    let _alone = ALONE.blocking_lock();
    postbox_testkit::planted::each_is_caught(module_path!());
}

const HOOKS: &str = env!("CARGO_BIN_EXE_postbox-test-hooks");
const WHSEC: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks, and before a sender tries again: those who are waited for work on the same two cores.
const LOOK: Duration = Duration::from_millis(10);

/// Each starts processes enough for the whole machine.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

async fn in_time<T>(what: &str, waiting: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("not in time: {what}"))
}

fn start<Db: Testable>(fresh: &Fresh<Db>, variables: &[(&str, &str)]) -> WorkerProcess {
    let mut all = vec![("TEST_SECRET", WHSEC)];
    all.extend(variables);
    WorkerProcess::start(HOOKS, fresh, &all)
}

fn messages<Db: Testable>(fresh: &Fresh<Db>) -> String {
    match <Db as Testable>::NAME {
        "postgres" => format!("{}.message", fresh.schema()),
        _ => "postbox_message".into(),
    }
}

/// How many messages have an id of these.
async fn stored<Db: Testable>(fresh: &Fresh<Db>, ids: &BTreeSet<&str>) -> i64 {
    let mut stored = 0;
    let listed: Vec<String> = ids.iter().map(|id| format!("'{id}'")).collect();
    for some in listed.chunks(1000) {
        let sql = format!("select count(*) from {} where external_id in ({})", messages(fresh), some.join(","));
        stored += Db::count(fresh, &sql).await;
    }
    stored
}

/// What is delivered: an id and a body.
#[derive(Debug, Clone, PartialEq)]
struct Delivery {
    id: String,
    body: Vec<u8>,
    malformed: bool,
}

/// One of a hundred is malformed, five of a hundred come twice (also of these), and a few have the id of another and a
/// body of their own.
fn deliveries(count: usize) -> Vec<Delivery> {
    let mut all: Vec<Delivery> = Vec::new();
    for n in 0..count {
        let event = |text: &str| json!({ "type": "in.paid", "data": { "n": n, "text": text } }).to_string();
        let fresh = Delivery { id: format!("msg_{n}"), body: event("paid").into_bytes(), malformed: false };
        let earlier = |back: usize| all[n - back].clone();
        all.push(match n {
            _ if n % 100 == 50 => {
                let mut body = format!(r#"{{"type": "in.paid", "n": {n}, "text": ""#).into_bytes();
                body.extend([0xff, 0xfe, b'"', b'}', b'\r', b'\n', 0]);
                Delivery { body, malformed: true, ..fresh }
            }
            // From a while ago, or while the first may still be on its way.
            _ if n % 20 == 11 && n > 100 => earlier(if n % 40 == 11 { 77 } else { 1 }),
            _ if n % 200 == 185 => Delivery { body: event("another").into_bytes(), ..earlier(93) },
            _ => fresh,
        });
    }
    all
}

/// What was answered to a delivery with a 2xx.
#[derive(Debug, Clone)]
struct Answered {
    n: usize,
    status: String,
    id: String,
}

/// Senders, and where they send to.
struct Senders {
    deliveries: Vec<Delivery>,
    /// The next that nobody has taken.
    next: AtomicUsize,
    /// So many may be sent: processes that are to be killed are there before what they are sent.
    due: watch::Sender<usize>,
    receivers: watch::Sender<Vec<String>>,
    answered: Mutex<Vec<Answered>>,
    done: watch::Sender<usize>,
    /// How often something was sent again.
    again: AtomicUsize,
}

impl Senders {
    fn new(count: usize) -> Arc<Senders> {
        Arc::new(Senders {
            deliveries: deliveries(count),
            next: AtomicUsize::new(0),
            due: watch::Sender::new(0),
            receivers: watch::Sender::default(),
            answered: Mutex::default(),
            done: watch::Sender::new(0),
            again: AtomicUsize::new(0),
        })
    }

    /// Sends one after the other, each until it is answered with a 2xx.
    async fn send(self: Arc<Senders>) {
        let client = reqwest::Client::builder().timeout(Duration::from_secs(30)).build().expect("a client");
        let (mut receivers, mut due) = (self.receivers.subscribe(), self.due.subscribe());
        loop {
            let n = self.next.fetch_add(1, Ordering::SeqCst);
            let Some(delivery) = self.deliveries.get(n) else { return };
            due.wait_for(|due| *due > n).await.expect("senders");
            for time in 0.. {
                let url = {
                    let there = receivers.wait_for(|there| !there.is_empty()).await.expect("receivers");
                    there[(n + time) % there.len()].clone()
                };
                if let Some(answered) = attempt(&client, &url, n, delivery).await {
                    self.answered.lock().expect("the answers").push(answered);
                    self.done.send_modify(|done| *done += 1);
                    break;
                }
                self.again.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(LOOK).await;
            }
        }
    }

    /// So many more are due; how many were before.
    fn go_on(&self, more: usize) -> usize {
        let due = *self.due.borrow();
        self.due.send_replace(due + more);
        due
    }

    /// Waits until so many are answered.
    async fn so_many(&self, wanted: usize) {
        let wanted = wanted.min(self.deliveries.len());
        let mut done = self.done.subscribe();
        in_time("answers", done.wait_for(|done| *done >= wanted)).await.expect("answers");
    }
}

/// One request, signed as of now.
async fn attempt(client: &reqwest::Client, url: &str, n: usize, delivery: &Delivery) -> Option<Answered> {
    let now = Timestamp::now();
    let signature = standard::sign(&[Secret::standard(WHSEC).expect("a secret")], &delivery.id, now, &delivery.body);
    let request = client
        .post(url)
        .header(standard::ID, &delivery.id)
        .header(standard::TIMESTAMP, now.as_second().to_string())
        .header(standard::SIGNATURE, signature)
        .body(delivery.body.clone());
    let response = request.send().await.ok()?;
    let status = response.status().as_u16();
    assert!(matches!(status, 200 | 202 | 503), "{status} to {delivery:?}");
    // The status is what a sender goes by, whether the rest arrives or not.
    if status == 503 {
        return None;
    }
    let said = response.json::<Value>().await.unwrap_or_default();
    let word = |name: &str| said[name].as_str().map(str::to_owned);
    let usual = if status == 202 { "quarantined" } else { "stored" };
    Some(Answered { n, status: word("status").unwrap_or_else(|| usual.into()), id: word("id").unwrap_or_default() })
}

/// Receivers in processes of their own.
struct Receivers<'a, Db: Testable> {
    fresh: &'a Fresh<Db>,
    senders: Arc<Senders>,
    alive: Vec<(String, WorkerProcess)>,
}

impl<Db: Testable> Receivers<'_, Db> {
    /// Starts one, which is killed at this point if there is one.
    async fn start(&self, at: Option<&str>) -> (String, WorkerProcess) {
        let mut variables = vec![("TEST_LISTEN", "yes")];
        variables.extend(at.map(|at| ("POSTBOX_CRASH_POINT", at)));
        let mut process = start(self.fresh, &variables);
        let url = format!("http://{}/in/hooks", process.says("listening at ").await);
        self.senders.receivers.send_modify(|there| there.push(url.clone()));
        (url, process)
    }

    fn gone(&self, url: &str) {
        self.senders.receivers.send_modify(|there| there.retain(|known| known != url));
    }

    /// Another, beside those that live, which is killed at its point while so many come.
    async fn one_dies_at(&self, point: &str, time: usize, more: usize) {
        let (url, process) = self.start(Some(&format!("{point}:{time}"))).await;
        self.senders.go_on(more);
        process.kill_at(point).await;
        self.gone(&url);
        self.nothing_is_answered_without_a_row().await;
    }

    /// One of those that live, wherever it is, while so many come.
    async fn one_dies(&mut self, more: usize) {
        let due = self.senders.go_on(more);
        self.senders.so_many(due + fastrand::usize(1..more)).await;
        let (url, process) = self.alive.swap_remove(fastrand::usize(..self.alive.len()));
        process.kill().await;
        self.gone(&url);
        self.nothing_is_answered_without_a_row().await;
        let another = self.start(None).await;
        self.alive.push(another);
    }

    /// What was answered by now has its row, or stands in quarantine.
    async fn nothing_is_answered_without_a_row(&self) {
        let answered = self.senders.answered.lock().expect("the answers").clone();
        let (mut ids, mut aside) = (BTreeSet::new(), BTreeSet::new());
        for Answered { n, status, .. } in &answered {
            let id = self.senders.deliveries[*n].id.as_str();
            match status.as_str() {
                "conflict" | "quarantined" => aside.insert(id),
                _ => ids.insert(id),
            };
        }
        assert_eq!(stored(self.fresh, &ids).await, ids.len() as i64, "answered, and not there");
        let kept = self.fresh.postbox.admin().quarantine(&QuarantineFilter::default(), 10_000).await;
        let kept = kept.expect("quarantine");
        let kept: BTreeSet<&str> = kept.iter().map(|row| row.position.as_str()).collect();
        assert!(aside.is_subset(&kept), "answered, and not in quarantine: {aside:?}");
    }
}

async fn each_webhook_is_received_once<Db: Testable>() {
    let _alone = ALONE.lock().await;
    let fresh = Db::fresh().await;
    let (count, kills) = if <Db as Testable>::NAME == "postgres" { (1500, 8) } else { (750, 8) };
    let senders = Senders::new(count);
    let mut receivers = Receivers { fresh: &fresh, senders: senders.clone(), alive: Vec::new() };
    receivers.alive = vec![receivers.start(None).await];
    let sending: Vec<_> = (0..12).map(|_| tokio::spawn(senders.clone().send())).collect();
    // Before the commit; while it is under way; between it and the answer.
    let points = [("read", 12), ("receiving", 12), ("received", 12), ("received", 5), ("read", 3)];
    let more = count / (points.len() + kills + 1);
    for (point, time) in points {
        receivers.one_dies_at(point, time, more).await;
    }
    let second = receivers.start(None).await;
    receivers.alive.push(second);
    for _ in 0..kills {
        receivers.one_dies(more).await;
    }
    senders.go_on(count);
    senders.so_many(count).await;
    for sender in sending {
        sender.await.expect("a sender");
    }
    assert!(senders.again.load(Ordering::SeqCst) > 0, "nobody noticed that anything was killed");
    receivers.nothing_is_answered_without_a_row().await;
    one_message_for_each_id(&fresh, &senders).await;
    what_is_no_message_is_kept(&fresh, &senders.deliveries).await;
}

/// Each id has one message, with the body that came first, and all answers name it.
async fn one_message_for_each_id<Db: Testable>(fresh: &Fresh<Db>, senders: &Senders) {
    let mut bodies = BTreeMap::<&str, BTreeSet<&[u8]>>::new();
    for delivery in senders.deliveries.iter().filter(|delivery| !delivery.malformed) {
        bodies.entry(&delivery.id).or_default().insert(&delivery.body);
    }
    let table = messages(fresh);
    assert_eq!(Db::count(fresh, &format!("select count(*) from {table}")).await, bodies.len() as i64);
    assert_eq!(
        Db::count(fresh, &format!("select count(distinct external_id) from {table}")).await,
        bodies.len() as i64
    );
    let answered = senders.answered.lock().expect("the answers").clone();
    let (mut named, mut received) = (BTreeMap::new(), BTreeSet::new());
    for Answered { n, status, id } in answered.iter().filter(|answered| !answered.id.is_empty()) {
        let delivery = &senders.deliveries[*n];
        assert_eq!(named.entry(delivery.id.as_str()).or_insert(id.as_str()), id, "one id, one message");
        assert!(status != "received" || received.insert(&delivery.id), "{} was received twice", delivery.id);
    }
    // A stretch of them, and all that two bodies were sent for.
    let looked_at = named.iter().enumerate().filter(|(n, (id, _))| n % 10 == 0 || bodies[*id].len() > 1);
    for (_, (id, message)) in looked_at {
        let (stored, _) = fresh.postbox.admin().message(message.parse().expect("an id")).await.expect("a message");
        assert_eq!(stored.external_id.as_deref(), Some(*id));
        assert!(bodies[id].contains(stored.payload_json().unwrap_or_default().as_bytes()), "{stored:?}");
    }
    let source = fresh.postbox.admin().sources().await.expect("sources").pop().expect("a source");
    let malformed = senders.deliveries.iter().filter(|delivery| delivery.malformed);
    let (sent, malformed) =
        (malformed.clone().count(), malformed.map(|delivery| &delivery.id).collect::<BTreeSet<_>>());
    assert_eq!((source.received, source.quarantined), (bodies.len() as i64, malformed.len() as i64), "{source:?}");
    let repeated = senders.deliveries.len() - sent - bodies.values().map(BTreeSet::len).sum::<usize>();
    assert!(repeated > senders.deliveries.len() / 30 && source.duplicate >= repeated as i64, "{repeated} {source:?}");
}

async fn what_is_no_message_is_kept<Db: Testable>(fresh: &Fresh<Db>, deliveries: &[Delivery]) {
    let admin = fresh.postbox.admin();
    let mut kept = BTreeMap::<String, Vec<(String, Vec<u8>)>>::new();
    for row in admin.quarantine(&QuarantineFilter::default(), 10_000).await.expect("quarantine") {
        let body = admin.quarantined(row.id).await.expect("an entry").raw.body.expect("a body");
        kept.entry(row.kind).or_default().push((row.position, body));
    }
    let malformed = deliveries.iter().filter(|delivery| delivery.malformed);
    let malformed: BTreeSet<_> = malformed.map(|delivery| (delivery.id.clone(), delivery.body.clone())).collect();
    assert!(malformed.len() >= deliveries.len() / 100);
    assert_eq!(kept["malformed"].len(), malformed.len());
    assert_eq!(kept["malformed"].iter().cloned().collect::<BTreeSet<_>>(), malformed, "byte for byte");
    let mut first = HashMap::<&str, &[u8]>::new();
    let twice =
        deliveries.iter().filter(|delivery| *first.entry(&delivery.id).or_insert(&delivery.body) != delivery.body);
    let twice: BTreeSet<&str> = twice.map(|delivery| delivery.id.as_str()).collect();
    let conflicts: BTreeSet<&str> = kept["conflict"].iter().map(|(position, _)| position.as_str()).collect();
    assert!(!twice.is_empty());
    assert_eq!((conflicts, kept["conflict"].len()), (twice.clone(), twice.len()), "one of each");
}

/// Keys of what goes out, and messages of each.
const KEYS: usize = 20;
const OF_EACH: usize = 30;
/// How many attempts a worker makes at once.
const WINDOW: usize = 40;

/// A worker's worth of the test that sends.
struct Outside<'a, Db: Testable> {
    fresh: &'a Fresh<Db>,
    endpoint: Endpoint,
    /// What was published, by the id of its message.
    published: BTreeMap<String, (&'static str, Value)>,
    alive: Vec<WorkerProcess>,
    /// Processes that were killed, and connections that were cut.
    losses: usize,
}

impl<Db: Testable> Outside<'_, Db> {
    fn start(&self, at: Option<&str>) -> WorkerProcess {
        let (url, window) = (self.endpoint.url(), WINDOW.to_string());
        let mut variables = vec![("TEST_HOOKS", url.as_str()), ("TEST_CONCURRENCY", window.as_str())];
        variables.extend(at.map(|at| ("POSTBOX_CRASH_POINT", at)));
        start(self.fresh, &variables)
    }

    async fn publish(&mut self, path: &'static str, topic: &str, numbers: std::ops::Range<usize>, keys: usize) {
        for n in numbers {
            let payloads: Vec<Value> = (0..keys).map(|key| json!({ "key": key, "n": n })).collect();
            let draft = |payload: &Value| Envelope::json(topic, payload).map(|d| d.key(format!("k{}", payload["key"])));
            let published = self.fresh.postbox.publish_now(payloads.iter().map(draft)).await.expect("published");
            let ids = published.iter().map(|message| message.id.to_string());
            self.published.extend(ids.zip(payloads.into_iter().map(|payload| (path, payload))));
        }
    }

    /// Something of everything.
    async fn publish_all(&mut self, numbers: std::ops::Range<usize>) {
        for n in numbers {
            self.publish("/relay", "out.placed", n..n + 1, KEYS).await;
            self.publish("/loose", "loose.placed", n..n + 1, KEYS / 4).await;
            self.publish("/push", "push.placed", n..n + 1, KEYS / 4).await;
            self.publish("/op", "op.charge", n..n + 1, 2).await;
        }
    }

    /// One that is alone is killed at this point.
    async fn one_dies_at(&mut self, point: &str, time: usize) {
        self.losses += 1;
        self.start(Some(&format!("{point}:{time}"))).kill_at(point).await;
        self.alive = vec![self.start(None)];
    }

    async fn kill_all(&mut self) {
        for worker in std::mem::take(&mut self.alive) {
            self.losses += 1;
            worker.kill().await;
        }
    }

    /// Deliveries in one of these states, of one subscription or of all.
    async fn standing(&self, states: &[State], of: Option<&str>) -> Vec<postbox::admin::DeliveryRow> {
        let mut filter = Filter::default();
        filter.states = states.to_vec();
        filter.subscriptions = of.map(str::to_owned).into_iter().collect();
        self.fresh.postbox.admin().list(&filter, 10_000).await.expect("a list")
    }

    /// Waits until nothing is left to do.
    async fn at_rest(&self) {
        let resting = async {
            while !self.standing(&[State::Pending, State::Running], None).await.is_empty() {
                tokio::time::sleep(LOOK).await;
            }
        };
        in_time("everything has an end", resting).await;
    }

    /// Whatever was published there has arrived, under one id; how often something came again.
    fn arrived(&self, path: &str) -> usize {
        let asked = self.endpoint.at(path);
        let mut seen = BTreeSet::new();
        for asked in &asked {
            let id = asked.header(standard::ID).to_owned();
            let body: Value = serde_json::from_slice(&asked.body).expect("JSON");
            assert_eq!(self.published.get(&id), Some(&(path_of(path), body)), "{asked:?}");
            assert!(is_signed(asked), "{asked:?}");
            seen.insert(id);
        }
        let wanted: BTreeSet<String> =
            self.published.iter().filter(|(_, (at, _))| *at == path).map(|(id, _)| id.clone()).collect();
        if path != "/op" {
            assert_eq!(seen, wanted, "each has arrived at {path}");
        }
        asked.len() - seen.len()
    }
}

fn path_of(path: &str) -> &'static str {
    ["/relay", "/loose", "/push", "/op"].into_iter().find(|known| *known == path).expect("a path")
}

fn is_signed(asked: &Asked) -> bool {
    let secrets = [Secret::standard(WHSEC).expect("a secret")];
    let (id, time) = (asked.header(standard::ID), asked.header(standard::TIMESTAMP));
    let signature = asked.header(standard::SIGNATURE);
    standard::verify(&secrets, id, time, signature, &asked.body, Timestamp::now(), TOLERANCE).is_ok()
}

async fn everything_is_sent_and_doubts_stay<Db: Testable>() {
    let _alone = ALONE.lock().await;
    let fresh = Db::fresh().await;
    let endpoint = Endpoint::start().await;
    let mut out = Outside { fresh: &fresh, endpoint, published: BTreeMap::new(), alive: Vec::new(), losses: 0 };
    out.alive = vec![out.start(None)];
    // What is published before there is anybody to send it is taken up later, in no order with what is published then.
    let admin = fresh.postbox.admin();
    let declared = async {
        while admin.subscriptions().await.expect("subscriptions").len() < 4 {
            tokio::time::sleep(LOOK).await;
        }
    };
    in_time("the subscriptions are there", declared).await;

    // Killed when all of a batch is answered and nothing is marked, and likewise after one answer.
    let mut n = 0;
    for (point, time) in [("relayed", 2), ("pushed", 4), ("operated", 2), ("operated", 1)] {
        out.kill_all().await;
        out.publish_all(n..n + 5).await;
        n += 5;
        out.one_dies_at(point, time).await;
    }
    // Connections are cut, before a request is read and after.
    let cuts =
        [("/relay", Then::Cut), ("/relay", Then::Cut), ("/loose", Then::Cut), ("/push", Then::Cut), ("/op", Then::Cut)];
    cuts.iter().for_each(|(path, then)| out.endpoint.next(path, *then));
    out.endpoint.cut_unread(3);
    out.losses += cuts.len() + 3;
    out.publish_all(n..n + 3).await;
    n += 3;
    in_time("connections are cut", out.endpoint.cut(cuts.len() + 3)).await;
    // Everybody is killed while an operation has arrived, and its answer is waited for.
    out.endpoint.next("/op", Then::Hold);
    out.publish_all(n..n + 2).await;
    n += 2;
    in_time("an operation is held", out.endpoint.held(1)).await;
    out.kill_all().await;
    // And wherever they are.
    for _ in 0..2 {
        out.alive = vec![out.start(None), out.start(None)];
        out.publish_all(n..n + 2).await;
        n += 2;
        let more = out.endpoint.count() + fastrand::usize(5..40);
        in_time("requests", out.endpoint.arrived(more)).await;
        out.kill_all().await;
    }
    out.alive = vec![out.start(None), out.start(None)];
    out.publish_all(n..OF_EACH).await;
    out.at_rest().await;

    for path in ["/relay", "/loose", "/push"] {
        let again = out.arrived(path);
        assert!(again <= out.losses * WINDOW, "{again} came again to {path}, after {} losses", out.losses);
    }
    keys_are_in_order(&out.endpoint.at("/relay"));
    assert!(out.standing(&[State::Dead], None).await.is_empty());
    assert_eq!(out.arrived("/op"), 0, "no operation is called twice");
    doubts_wait_for_a_word(&mut out).await;
    out.kill_all().await;
}

/// By when each came first.
fn keys_are_in_order(asked: &[Asked]) {
    let (mut seen, mut next) = (BTreeSet::new(), BTreeMap::<u64, u64>::new());
    for asked in asked {
        if seen.insert(asked.header(standard::ID).to_owned()) {
            let body: Value = serde_json::from_slice(&asked.body).expect("JSON");
            let (key, n) = (body["key"].as_u64().expect("a key"), body["n"].as_u64().expect("a number"));
            let wanted = next.entry(key).or_default();
            assert_eq!(n, *wanted, "the order of key {key}");
            *wanted += 1;
        }
    }
    assert_eq!(next.len(), KEYS);
    assert!(next.values().all(|n| *n == OF_EACH as u64));
}

/// Those that were killed in between are in doubt, and stay so until somebody says what happened.
async fn doubts_wait_for_a_word<Db: Testable>(out: &mut Outside<'_, Db>) {
    let calls = |out: &Outside<'_, Db>, message: &str| {
        let calls = out.endpoint.at("/op");
        calls.into_iter().filter(|asked| asked.header(standard::ID) == message).collect::<Vec<_>>()
    };
    let succeeded = out.standing(&[State::Succeeded], Some("charge")).await;
    for row in &succeeded {
        assert_eq!(calls(out, &row.message.to_string()).len(), 1, "{row:?}");
    }
    let doubts = out.standing(&[State::InDoubt], Some("charge")).await;
    // Two killed after the answer, one before, and one whose connection was cut.
    assert!((4..=out.losses * WINDOW).contains(&doubts.len()), "{} doubts", doubts.len());
    assert_eq!(succeeded.len() + doubts.len(), out.published.values().filter(|(path, _)| *path == "/op").count());
    let mut called = doubts.iter().filter(|row| calls(out, &row.message.to_string()).len() == 1);
    let (happened, lost) = (called.next().expect("one that was called"), called.next().expect("another"));
    // Others go on meanwhile, and those do not.
    out.publish("/op", "op.charge", OF_EACH..OF_EACH + 1, 2).await;
    out.at_rest().await;
    assert_eq!(out.arrived("/op"), 0);
    assert_eq!(out.standing(&[State::InDoubt], Some("charge")).await.len(), doubts.len());
    let admin = out.fresh.postbox.admin();
    for (row, answer) in [(happened, Answer::Happened), (lost, Answer::DidNotHappen)] {
        let word = Resolution { rev: None, answer, evidence: None, actor: "ana".into(), reason: "looked there".into() };
        admin.resolve(row.id, &word).await.expect("settled");
    }
    out.at_rest().await;
    for (row, times) in [(happened, 1), (lost, 2)] {
        let detail = admin.show(row.id).await.expect("a delivery");
        assert_eq!(detail.row.state, State::Succeeded, "{detail:?}");
        let calls = calls(out, &row.message.to_string());
        assert_eq!(calls.len(), times);
        assert!(calls.iter().all(|call| call.header("idempotency-key") == detail.idempotency_key), "{calls:?}");
    }
}
