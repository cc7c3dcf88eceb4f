//! Receiving: each message once, whatever happens between the read, the commit and the acknowledgement.

use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use postbox::admin::{QuarantineFilter, SourceRow};
use postbox::source::{Entry, Format, Mapping, Raw, Read, Source, Standing};
use postbox::store::Store;
use postbox::testing::{SourceBench, source_suite};
use postbox::{BrokerError, Envelope, Error, Fate, Router, handler};
use postbox_testkit::{Testable, on_both_stores, until};
use tokio::sync::Notify;

on_both_stores!(
    the_suite,
    nothing_is_acknowledged_without_a_row,
    entries_become_messages_once,
    another_body_is_a_conflict,
    what_is_malformed_is_kept_byte_for_byte,
    a_retry_reads_it_with_the_format_of_now,
    what_comes_too_often_and_what_is_lost_is_told,
    a_pause_holds_for_every_process,
    a_backlog_holds_it_up,
    a_broker_that_comes_and_goes,
    the_checkpoint_is_kept,
    what_cannot_work_is_told_at_the_start,
    ids_are_forgotten_in_time,
    many_bring_the_same_at_once,
    a_panic_of_a_source_stops_nothing_else,
);

#[test]
fn planted_bugs_are_caught() {
    postbox_testkit::planted::each_is_caught(module_path!());
}

const PATIENCE: Duration = Duration::from_secs(60);

/// A broker in memory: entries are handed out in order, and are somebody's until they are acknowledged.
#[derive(Default)]
struct Broker {
    state: Mutex<Shelf>,
    filled: Notify,
    down: AtomicBool,
    panics: AtomicBool,
    opened: AtomicUsize,
    /// How often something was acknowledged that is not on record.
    lies: AtomicUsize,
}

#[derive(Default)]
struct Shelf {
    new: VecDeque<(String, Raw)>,
    /// By position: whose it is, how often it was handed out.
    held: BTreeMap<String, (Raw, String, u32)>,
    lost: Vec<String>,
    acknowledged: usize,
    checkpoints: Vec<Option<String>>,
    next: usize,
}

impl Broker {
    fn put(&self, raw: Raw) -> String {
        let mut shelf = self.state.lock().expect("the shelf");
        shelf.next += 1;
        let position = format!("{:08}-0", shelf.next);
        shelf.new.push_back((position.clone(), raw));
        self.filled.notify_waiters();
        position
    }

    fn acknowledged(&self) -> usize {
        self.state.lock().expect("the shelf").acknowledged
    }

    fn clear(&self) {
        let next = self.state.lock().expect("the shelf").next;
        *self.state.lock().expect("the shelf") = Shelf { next, ..Shelf::default() };
    }
}

/// One that reads it.
struct FromMemory {
    broker: Arc<Broker>,
    name: String,
    consumer: String,
    format: Format,
    horizon: Option<Duration>,
    refuses: bool,
    own: bool,
    witness: Option<Witness>,
}

/// How many ids are on record.
type Witness = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = i64> + Send>> + Send + Sync>;

fn from(broker: &Arc<Broker>) -> FromMemory {
    FromMemory {
        broker: broker.clone(),
        name: "memory".into(),
        consumer: "one".into(),
        format: Format::default(),
        horizon: None,
        refuses: false,
        own: true,
        witness: None,
    }
}

impl FromMemory {
    fn up(&self) -> Result<(), BrokerError> {
        match self.broker.down.load(Ordering::SeqCst) {
            true => Err(BrokerError::Unavailable("the broker is down".into())),
            false => Ok(()),
        }
    }
}

impl Source for FromMemory {
    fn kind(&self) -> &'static str {
        "memory"
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn format(&self) -> &Format {
        &self.format
    }

    fn max_deliveries(&self) -> u32 {
        3
    }

    fn replay_horizon(&self) -> Option<Duration> {
        self.horizon
    }

    async fn open(&mut self, checkpoint: Option<&str>) -> Result<Vec<String>, BrokerError> {
        self.broker.opened.fetch_add(1, Ordering::SeqCst);
        if self.refuses {
            return Err(BrokerError::Refused("it is set up badly".into()));
        }
        self.up()?;
        self.broker.state.lock().expect("the shelf").checkpoints.push(checkpoint.map(str::to_owned));
        self.own = true;
        Ok(Vec::new())
    }

    async fn read(&mut self) -> Result<Read, BrokerError> {
        assert!(!self.broker.panics.load(Ordering::SeqCst), "a bug of the source's own");
        let filled = self.broker.filled.notified();
        self.up()?;
        let own = std::mem::take(&mut self.own);
        let take = |broker: &Broker| {
            let mut shelf = broker.state.lock().expect("the shelf");
            let mut read = Read { lost: std::mem::take(&mut shelf.lost), ..Read::default() };
            if own {
                for (position, (raw, consumer, deliveries)) in &mut shelf.held {
                    if *consumer == self.consumer {
                        *deliveries += 1;
                        let (position, raw) = (position.clone(), raw.clone());
                        read.entries.push(Entry { position, raw, deliveries: *deliveries });
                    }
                }
            }
            while read.entries.len() < 10
                && let Some((position, raw)) = shelf.new.pop_front()
            {
                shelf.held.insert(position.clone(), (raw.clone(), self.consumer.clone(), 1));
                read.entries.push(Entry { position, raw, deliveries: 1 });
            }
            // After the last full batch this is not true, and the worker waits for nothing.
            read.more = read.entries.len() >= 10;
            read
        };
        let read = take(&self.broker);
        if read != Read::default() {
            return Ok(read);
        }
        tokio::time::timeout(Duration::from_millis(100), filled).await.ok();
        Ok(take(&self.broker))
    }

    async fn acknowledge(&mut self, positions: &[String]) -> Result<(), BrokerError> {
        self.up()?;
        if let Some(witness) = &self.witness {
            let (on_record, acknowledged) = (witness().await, self.broker.acknowledged() + positions.len());
            if on_record < acknowledged as i64 {
                self.broker.lies.fetch_add(1, Ordering::SeqCst);
            }
        }
        let mut shelf = self.broker.state.lock().expect("the shelf");
        for position in positions {
            if shelf.held.remove(position).is_some() {
                shelf.acknowledged += 1;
            }
        }
        Ok(())
    }

    async fn standing(&mut self) -> Result<Standing, BrokerError> {
        self.up()?;
        let shelf = self.broker.state.lock().expect("the shelf");
        let lag = (shelf.new.len() + shelf.held.len()) as u64;
        Ok(Standing { lag: Some(lag), checkpoint: Some(format!("{:08}-0", shelf.next)) })
    }

    async fn close(&mut self) {}
}

fn event(id: &str, topic: &str, n: usize) -> Raw {
    let data = format!(r#"{{"event_id":"{id}","event_type":"{topic}","aggregate_id":"a{n}","payload":{{"n":{n}}}}}"#);
    Raw { fields: vec![(b"data".to_vec(), data.into_bytes())], body: None }
}

struct InMemory(Arc<Broker>, AtomicUsize);

impl SourceBench for InMemory {
    type Source = FromMemory;

    async fn source(&self) -> FromMemory {
        let number = self.1.fetch_add(1, Ordering::SeqCst);
        FromMemory { consumer: format!("consumer-{number}"), ..from(&self.0) }
    }

    async fn again(&self) -> FromMemory {
        let number = self.1.load(Ordering::SeqCst) - 1;
        FromMemory { consumer: format!("consumer-{number}"), ..from(&self.0) }
    }

    async fn put(&self, id: &str, topic: &str, n: usize) {
        self.0.put(event(id, topic, n));
    }

    async fn clear(&self) {
        self.0.clear();
    }
}

async fn the_suite<Db: Testable>() {
    let fresh = Db::fresh().await;
    source_suite(&InMemory(Arc::default(), AtomicUsize::new(0)), &fresh.postbox).await;
}

async fn row<Db: Testable>(fresh: &postbox_testkit::Fresh<Db>) -> SourceRow {
    fresh.postbox.admin().sources().await.expect("the sources").pop().expect("one source")
}

/// Received, duplicate, conflict, quarantined, lost.
async fn counts<Db: Testable>(fresh: &postbox_testkit::Fresh<Db>) -> (i64, i64, i64, i64, i64) {
    let row = row(fresh).await;
    (row.received, row.duplicate, row.conflict, row.quarantined, row.lost)
}

async fn messages<Db: Testable>(fresh: &postbox_testkit::Fresh<Db>) -> i64 {
    let table = if <Db as Testable>::NAME == "postgres" {
        format!("{}.message", fresh.schema())
    } else {
        "postbox_message".into()
    };
    Db::count(fresh, &format!("select count(*) from {table}")).await
}

async fn nothing_is_acknowledged_without_a_row<Db: Testable>() {
    let fresh = Arc::new(Db::fresh().await);
    let broker = Arc::new(Broker::default());
    let looks = fresh.clone();
    let witness: Witness = Arc::new(move || {
        let fresh = looks.clone();
        Box::pin(async move {
            let table = match <Db as Testable>::NAME {
                "postgres" => format!("{}.inbox", fresh.schema()),
                _ => "postbox_inbox".into(),
            };
            Db::count(&fresh, &format!("select count(*) from {table}")).await
        })
    });
    for n in 0..50 {
        broker.put(event(&format!("e{n}"), "t", n));
    }
    let source = FromMemory { witness: Some(witness), ..from(&broker) };
    let worker = fresh.postbox.worker(Router::new()).receive(source).start().await.expect("it starts");
    until("all are acknowledged", async || broker.acknowledged() == 50).await;
    worker.stop(Some(PATIENCE)).await.expect("it stops");
    assert_eq!(broker.lies.load(Ordering::SeqCst), 0, "something was acknowledged before it was on record");
}

fn entry(position: &str, raw: Raw) -> Entry {
    Entry { position: position.into(), raw, deliveries: 1 }
}

async fn entries_become_messages_once<Db: Testable>() {
    let fresh = Db::fresh().await;
    let inbox = fresh.postbox.inbox("partner", "http", Format::default()).await.expect("an inbox");
    let batch = [entry("1", event("e1", "orders.placed", 1)), entry("2", event("e2", "orders.placed", 2))];
    let fates = inbox.receive(&batch).await.expect("it is stored");
    let [Fate::Received(one), Fate::Received(other)] = fates[..] else { panic!("{fates:?}") };
    // Again, as after a crash, with one that is new, and one that comes twice in one batch.
    let again = [
        batch[0].clone(),
        entry("3", event("e3", "orders.placed", 3)),
        entry("4", event("e3", "orders.placed", 3)),
        batch[1].clone(),
    ];
    let fates = inbox.receive(&again).await.expect("it is stored");
    let [Fate::Duplicate(first), Fate::Received(third), Fate::Duplicate(same), Fate::Duplicate(second)] = fates[..]
    else {
        panic!("{fates:?}")
    };
    assert_eq!((first, second, same), (one, other, third));
    assert_eq!(messages(&fresh).await, 3);
    assert_eq!(counts(&fresh).await, (3, 3, 0, 0, 0));
    let (envelope, _) = fresh.postbox.admin().message(one).await.expect("a message");
    assert_eq!(envelope.external_id.as_deref(), Some("e1"));
    assert_eq!(envelope.key.as_deref(), Some("a1"));
    assert_eq!(envelope.source.as_deref(), Some("partner"));
    assert_eq!(envelope.headers.get("postbox-position").map(String::as_str), Some("1"));
    // Another source may bring the same id.
    let other = fresh.postbox.inbox("another", "http", Format::default()).await.expect("an inbox");
    let fates = other.receive(&batch[..1]).await.expect("it is stored");
    assert!(matches!(fates[..], [Fate::Received(_)]), "{fates:?}");
}

async fn another_body_is_a_conflict<Db: Testable>() {
    let fresh = Db::fresh().await;
    let inbox = fresh.postbox.inbox("partner", "http", Format::default()).await.expect("an inbox");
    let fates = inbox.receive(&[entry("1", event("e1", "t", 1))]).await.expect("stored");
    let [Fate::Received(first)] = fates[..] else { panic!("{fates:?}") };
    for (position, raw) in [("2", event("e1", "t", 2)), ("3", event("e1", "u", 1))] {
        for _ in 0..2 {
            let fates = inbox.receive(&[entry(position, raw.clone())]).await.expect("stored");
            let [Fate::Conflict { existing, .. }] = fates[..] else { panic!("{fates:?}") };
            assert_eq!(existing, first);
        }
    }
    // The same with other spaces in it is the same.
    let spaced = br#"{ "event_id" : "e1", "event_type": "t", "aggregate_id": "a1", "payload": { "n" :1 } }"#;
    let raw = Raw { fields: vec![(b"data".to_vec(), spaced.to_vec())], body: None };
    let fates = inbox.receive(&[entry("4", raw)]).await.expect("stored");
    assert_eq!(fates, [Fate::Duplicate(first)]);
    assert_eq!(messages(&fresh).await, 1);
    // What comes twice from one place is one entry, and counts as a repetition.
    assert_eq!(counts(&fresh).await, (1, 3, 2, 0, 0));
    let admin = fresh.postbox.admin();
    let rows = admin.quarantine(&QuarantineFilter::default(), 10).await.expect("the quarantine");
    assert_eq!(
        rows.iter().map(|row| (row.kind.as_str(), row.message)).collect::<Vec<_>>(),
        [("conflict", Some(first)); 2]
    );
    let refused = admin.retry_quarantined(rows[0].id, "ana", "why not").await.expect_err("it would be one again");
    assert!(refused.to_string().contains("under another id"), "{refused}");
    admin.drop_quarantined(rows[0].id, "ana", "known").await.expect("it is dropped");
    let gone = admin.quarantined(rows[0].id).await.expect_err("it is gone");
    assert!(matches!(gone, Error::NotFound(_)), "{gone}");
    let audit = admin.audit(5).await.expect("the audit");
    assert_eq!((audit[0].action.as_str(), audit[0].reason.as_deref()), ("drop quarantined", Some("known")));
    let detail = audit[0].detail.as_ref().expect("which entry it was");
    assert_eq!((&detail["quarantine"], &detail["source"]), (&rows[0].id.into(), &"partner".into()), "{detail}");
}

async fn what_is_malformed_is_kept_byte_for_byte<Db: Testable>() {
    let fresh = Db::fresh().await;
    let inbox = fresh.postbox.inbox("partner", "http", Format::default()).await.expect("an inbox");
    let data = |bytes: &[u8]| Raw { fields: vec![(b"data".to_vec(), bytes.to_vec())], body: None };
    let deep = format!(r#"{{"event_id":"d","event_type":"t","payload":{}{}}}"#, "[".repeat(200), "]".repeat(200));
    let large = format!(r#"{{"event_id":"l","event_type":"t","payload":"{}"}}"#, "x".repeat(2 << 20));
    let raws = [
        Raw::default(),
        data(b"{\"event_id\": \"\xc3\x28\"}"),
        data(b"{\"event_id\": "),
        data(br#"{"event_type":"t","payload":1}"#),
        data(br#"{"event_id":"n","event_type":"t","payload":"\u0000"}"#),
        data(br#"{"event_id":"n","event_type":"a b","payload":1}"#),
        data(br#"{"event_id":"n","event_type":"t","occurred_on":"soon","payload":1}"#),
        data(deep.as_bytes()),
        data(large.as_bytes()),
        Raw { fields: vec![(vec![0, 255], vec![254, 0])], body: Some(vec![0, 1, 255]) },
    ];
    let batch: Vec<Entry> = raws.iter().enumerate().map(|(n, raw)| entry(&n.to_string(), raw.clone())).collect();
    let mut numbers = Vec::new();
    for fate in inbox.receive(&batch).await.expect("they are kept") {
        let Fate::Quarantined { quarantine, reason } = fate else { panic!("{fate:?}") };
        assert!(!reason.is_empty());
        numbers.push(quarantine);
    }
    assert_eq!((messages(&fresh).await, counts(&fresh).await), (0, (0, 0, 0, 10, 0)));
    for (number, raw) in numbers.iter().zip(&raws) {
        let detail = fresh.postbox.admin().quarantined(*number).await.expect("it is there");
        assert_eq!(detail.raw, *raw, "{}", detail.row.reason);
    }
    // A crash before the acknowledgement: nothing is there twice.
    inbox.receive(&batch).await.expect("they are kept");
    let rows = fresh.postbox.admin().quarantine(&QuarantineFilter::default(), 100).await.expect("the quarantine");
    assert_eq!((rows.len(), counts(&fresh).await), (10, (0, 10, 0, 10, 0)));
    let only = QuarantineFilter { source: Some("elsewhere".into()), ..QuarantineFilter::default() };
    assert!(fresh.postbox.admin().quarantine(&only, 100).await.expect("the quarantine").is_empty());
}

async fn a_retry_reads_it_with_the_format_of_now<Db: Testable>() {
    let fresh = Db::fresh().await;
    let admin = fresh.postbox.admin();
    let raw = Raw { fields: vec![(b"n".to_vec(), b"7".to_vec())], body: Some(br#"{"what":"paid"}"#.to_vec()) };
    let inbox = fresh.postbox.inbox("partner", "http", Format::default()).await.expect("an inbox");
    let fates = inbox.receive(&[entry("p7", raw)]).await.expect("it is kept");
    let [Fate::Quarantined { quarantine, .. }] = fates[..] else { panic!("{fates:?}") };
    // The format is as it was: so is what comes of it.
    admin.retry_quarantined(quarantine, "ana", "try").await.expect("it is wanted");
    until("the retry has been told", async || {
        admin.quarantined(quarantine).await.expect("it is there").row.retried.is_some()
    })
    .await;
    let row = admin.quarantined(quarantine).await.expect("it is there").row;
    assert!(row.retried.is_some_and(|words| words.starts_with("still: ")) && row.retry_at.is_none());
    drop(inbox);
    let mapping = Mapping::new().topic("partner.{payload:what}").id("{field:n}");
    let inbox = fresh.postbox.inbox("partner", "http", Format::mapped(mapping)).await.expect("an inbox");
    admin.retry_quarantined(quarantine, "ana", "it is mapped").await.expect("it is wanted");
    until("the entry has become a message", async || {
        admin.quarantined(quarantine).await.expect("it is there").row.ended_at.is_some()
    })
    .await;
    let row = admin.quarantined(quarantine).await.expect("it is there").row;
    let (envelope, _) = fresh.postbox.admin().message(row.message.expect("an id")).await.expect("a message");
    assert_eq!((envelope.topic.as_str(), envelope.external_id.as_deref()), ("partner.paid", Some("7")));
    assert_eq!((messages(&fresh).await, counts(&fresh).await), (1, (1, 0, 0, 1, 0)));
    let over = admin.retry_quarantined(quarantine, "ana", "again").await.expect_err("it is a message");
    assert!(matches!(over, Error::Conflict(_)), "{over}");
    let open = admin.quarantine(&QuarantineFilter::default(), 10).await.expect("the quarantine");
    let all = QuarantineFilter { ended: true, ..QuarantineFilter::default() };
    assert_eq!((open.len(), admin.quarantine(&all, 10).await.expect("the quarantine").len()), (0, 1));
    drop(inbox);
}

async fn what_comes_too_often_and_what_is_lost_is_told<Db: Testable>() {
    let fresh = Db::fresh().await;
    let broker = Arc::new(Broker::default());
    let position = broker.put(event("e1", "t", 1));
    {
        let mut shelf = broker.state.lock().expect("the shelf");
        let (_, raw) = shelf.new.pop_front().expect("an entry");
        shelf.held.insert(position.clone(), (raw, "one".into(), 3));
        shelf.lost.push("00000000-7".into());
    }
    let worker = fresh.postbox.worker(Router::new()).receive(from(&broker)).start().await.expect("it starts");
    until("it is acknowledged", async || broker.acknowledged() == 1).await;
    worker.stop(Some(PATIENCE)).await.expect("it stops");
    assert_eq!(counts(&fresh).await, (0, 0, 0, 1, 1));
    let rows = fresh.postbox.admin().quarantine(&QuarantineFilter::default(), 10).await.expect("the quarantine");
    let mut told: Vec<_> = rows.iter().map(|row| (row.kind.as_str(), row.position.as_str())).collect();
    told.sort_unstable();
    assert_eq!(told, [("lost", "00000000-7"), ("undeliverable", position.as_str())]);
    let lost = rows.iter().find(|row| row.kind == "lost").expect("it is told");
    let refused = fresh.postbox.admin().retry_quarantined(lost.id, "ana", "x").await.expect_err("it is not here");
    assert!(matches!(refused, Error::Refused(_)), "{refused}");
}

async fn a_pause_holds_for_every_process<Db: Testable>() {
    let fresh = Db::fresh().await;
    let broker = Arc::new(Broker::default());
    let second = postbox::Postbox::<Db>::open(fresh.settings.clone()).await.expect("another process's");
    let admin = fresh.postbox.admin();
    let one = fresh.postbox.worker(Router::new()).receive(from(&broker)).start().await.expect("it starts");
    let other = FromMemory { consumer: "other".into(), ..from(&broker) };
    let other = second.worker(Router::new()).receive(other).start().await.expect("it starts");
    broker.put(event("before", "t", 1));
    until("it is received", async || broker.acknowledged() == 1).await;
    assert_eq!(row(&fresh).await.state, "receiving");
    admin.pause_source("test", "memory", "ana", "they migrate").await.expect("it is paused");
    assert_eq!(row(&fresh).await.state, "paused");
    // Each looks once more before it stops reading: wait for looks after the pause.
    let inbox = fresh.postbox.inbox("memory", "memory", Format::default()).await.expect("an inbox");
    assert!(inbox.closed().is_some_and(|why| why.contains("paused")), "{:?}", inbox.closed());
    until("nobody reads", async || {
        let filled = broker.put(event(&format!("probe-{}", broker.acknowledged()), "t", 1));
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut shelf = broker.state.lock().expect("the shelf");
        let waits = shelf.new.iter().any(|(position, _)| *position == filled);
        shelf.new.clear();
        waits
    })
    .await;
    let before = broker.acknowledged();
    broker.put(event("meanwhile", "t", 1));
    admin.resume_source("test", "memory", "ana", "they are done").await.expect("it goes on");
    until("it is received", async || broker.acknowledged() > before).await;
    let nobody = admin.pause_source("test", "nothing", "ana", "x").await.expect_err("no such source");
    assert!(nobody.to_string().contains("postbox sources"), "{nobody}");
    one.stop(Some(PATIENCE)).await.expect("it stops");
    other.stop(Some(PATIENCE)).await.expect("it stops");
}

async fn a_backlog_holds_it_up<Db: Testable>() {
    let fresh = Db::fresh_with(|settings| settings.set("max_backlog", 15)).await;
    let broker = Arc::new(Broker::default());
    let release = Arc::new(Notify::new());
    let gate = release.clone();
    let slow = move |_: Envelope| {
        let gate = gate.clone();
        async move { gate.notified().await }
    };
    let router = Router::new().on("t", handler(slow).named("slow"));
    for n in 0..200 {
        broker.put(event(&format!("e{n}"), "t", n));
    }
    let worker = fresh.postbox.worker(router).concurrency(1).batch(1).receive(from(&broker)).start();
    let worker = worker.await.expect("it starts");
    let inbox = fresh.postbox.inbox("memory", "memory", Format::default()).await.expect("an inbox");
    until("too much waits", async || inbox.closed().is_some_and(|why| why.contains("max_backlog"))).await;
    // It is held up: all of it was never taken in.
    until("it is released and handled", async || {
        release.notify_waiters();
        release.notify_one();
        broker.acknowledged() == 200
    })
    .await;
    assert_eq!(counts(&fresh).await.0, 200);
    worker.stop_now().await.expect("it stops");
}

async fn a_broker_that_comes_and_goes<Db: Testable>() {
    let fresh = Db::fresh().await;
    let broker = Arc::new(Broker::default());
    broker.down.store(true, Ordering::SeqCst);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = seen.clone();
    let note = move |envelope: Envelope| {
        let noted = noted.clone();
        async move { noted.lock().expect("a list").push(envelope.external_id.unwrap_or_default()) }
    };
    let router = Router::new().on("t", handler(note).named("note"));
    let worker = fresh.postbox.worker(router).receive(from(&broker)).start().await.expect("it starts all the same");
    until("the trouble is told", async || {
        let row = row(&fresh).await;
        row.state == "failing" && row.trouble.is_some_and(|words| words.contains("is down"))
    })
    .await;
    for n in 0..40 {
        broker.put(event(&format!("e{n:02}"), "t", n));
        if n % 10 == 5 {
            broker.down.store(n % 20 == 5, Ordering::SeqCst);
        }
    }
    broker.down.store(false, Ordering::SeqCst);
    until("all are acknowledged", async || broker.acknowledged() == 40).await;
    until("all are handled", async || seen.lock().expect("a list").len() >= 40).await;
    until("nothing is wrong any more", async || row(&fresh).await.state == "receiving").await;
    worker.stop(Some(PATIENCE)).await.expect("it stops");
    let mut seen = seen.lock().expect("a list").clone();
    seen.sort();
    assert_eq!(seen, (0..40).map(|n| format!("e{n:02}")).collect::<Vec<_>>());
    assert_eq!((counts(&fresh).await.0, messages(&fresh).await), (40, 40));
}

async fn the_checkpoint_is_kept<Db: Testable>() {
    let fresh = Db::fresh().await;
    let broker = Arc::new(Broker::default());
    broker.put(event("e1", "t", 1));
    let checkpoints = || broker.state.lock().expect("the shelf").checkpoints.clone();
    let worker = fresh.postbox.worker(Router::new()).receive(from(&broker)).start().await.expect("it starts");
    assert_eq!(checkpoints(), [None]);
    until("it is told", async || {
        let inbox = fresh.postbox.inbox("memory", "memory", Format::default()).await.expect("an inbox");
        drop(inbox);
        let table = match <Db as Testable>::NAME {
            "postgres" => format!("{}.source", fresh.schema()),
            _ => "postbox_source".into(),
        };
        Db::count(&fresh, &format!("select count(*) from {table} where checkpoint = '00000001-0'")).await == 1
    })
    .await;
    worker.stop(Some(PATIENCE)).await.expect("it stops");
    let worker = fresh.postbox.worker(Router::new()).receive(from(&broker)).start().await.expect("it starts");
    assert_eq!(checkpoints()[1].as_deref(), Some("00000001-0"));
    worker.stop(Some(PATIENCE)).await.expect("it stops");
}

async fn what_cannot_work_is_told_at_the_start<Db: Testable>() {
    let fresh = Db::fresh().await;
    let broker = Arc::new(Broker::default());
    let start = async |source: FromMemory| {
        let started = fresh.postbox.worker(Router::new()).receive(source).start().await;
        started.expect_err("it cannot be received from").to_string()
    };
    let refused = start(FromMemory { refuses: true, ..from(&broker) }).await;
    assert!(refused.contains("`memory`") && refused.contains("set up badly"), "{refused}");
    let month = Some(Duration::from_secs(30 * 86_400));
    let refused = start(FromMemory { horizon: month, ..from(&broker) }).await;
    assert!(refused.contains("720 hours") && refused.contains("`keep_ids`"), "{refused}");
    let refused = start(FromMemory { name: "a b".into(), ..from(&broker) }).await;
    assert!(refused.contains("without spaces"), "{refused}");
    let week = Some(Duration::from_secs(7 * 86_400));
    let worker = fresh.postbox.worker(Router::new()).receive(FromMemory { horizon: week, ..from(&broker) });
    worker.start().await.expect("as long as ids are remembered").stop(None).await.expect("it stops");
    let two = std::panic::AssertUnwindSafe(|| {
        fresh.postbox.worker(Router::new()).receive(from(&broker)).receive(from(&broker))
    });
    std::panic::catch_unwind(two).map(|_| ()).expect_err("two of one name");
}

async fn ids_are_forgotten_in_time<Db: Testable>() {
    let fresh = Db::fresh().await;
    let inbox = fresh.postbox.inbox("partner", "http", Format::default()).await.expect("an inbox");
    let batch: Vec<Entry> = (0..3).map(|n| entry(&n.to_string(), event(&format!("e{n}"), "t", n))).collect();
    inbox.receive(&batch).await.expect("stored");
    let (table, past) = match <Db as Testable>::NAME {
        "postgres" => (format!("{}.inbox", fresh.schema()), "clock_timestamp() - interval '1 second'".to_owned()),
        _ => ("postbox_inbox".to_owned(), "(select now from postbox_clock) - 1000".to_owned()),
    };
    Db::execute(&fresh, &format!("update {table} set expires_at = {past} where identity <> 'e0'")).await;
    // One that has run out is brought anew, before it was tidied and after.
    let fates = inbox.receive(&batch[..2]).await.expect("stored");
    assert!(matches!(fates[..], [Fate::Duplicate(_), Fate::Received(_)]), "{fates:?}");
    fresh.postbox.store().tidy().await.expect("it is tidied");
    assert_eq!(Db::count(&fresh, &format!("select count(*) from {table}")).await, 2);
    let fates = inbox.receive(&batch).await.expect("stored");
    assert!(matches!(fates[..], [Fate::Duplicate(_), Fate::Duplicate(_), Fate::Received(_)]), "{fates:?}");
}

async fn many_bring_the_same_at_once<Db: Testable>() {
    let fresh = Db::fresh().await;
    let mut tasks = tokio::task::JoinSet::new();
    for start in 0..6 {
        let postbox = postbox::Postbox::<Db>::open(fresh.settings.clone()).await.expect("another process's");
        tasks.spawn(async move {
            let inbox = postbox.inbox("partner", "http", Format::default()).await.expect("an inbox");
            // Each in an order of its own.
            for round in 0..10 {
                let numbers = (0..20).map(|n| round * 20 + (n * 7 + start * 3) % 20);
                let batch: Vec<Entry> =
                    numbers.map(|n| entry(&format!("{start}-{n}"), event(&format!("e{n}"), "t", n))).collect();
                let mut tries = 0;
                while let Err(error) = inbox.receive(&batch).await {
                    assert!(error.is_transient() && tries < 50, "{error}");
                    tries += 1;
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("no task fails");
    }
    let (received, duplicate, conflict, quarantined, _) = counts(&fresh).await;
    assert_eq!((received, duplicate, conflict, quarantined), (200, 1000, 0, 0));
    assert_eq!(messages(&fresh).await, 200);
}

async fn a_panic_of_a_source_stops_nothing_else<Db: Testable>() {
    let fresh = Db::fresh().await;
    let (bad, good) = (Arc::new(Broker::default()), Arc::new(Broker::default()));
    bad.panics.store(true, Ordering::SeqCst);
    let other = FromMemory { name: "good".into(), ..from(&good) };
    let worker = fresh.postbox.worker(Router::new()).receive(from(&bad)).receive(other).start().await;
    let worker = worker.expect("it starts");
    good.put(event("e1", "t", 1));
    until("the other one is received from", async || good.acknowledged() == 1).await;
    until("the panic is told", async || {
        let rows = fresh.postbox.admin().sources().await.expect("the sources");
        rows.iter().any(|row| row.trouble.as_deref().is_some_and(|words| words.contains("a bug of the source's own")))
    })
    .await;
    worker.stop(Some(PATIENCE)).await.expect("it stops");
}
