//! Suites for sources and sinks of one's own: what a correct one does, as checks that can be run against it.
//!
//! They panic where something is not as it has to be, so they are called from tests. See
//! `examples/custom_sink.rs`.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;
use uuid::Uuid;

use crate::handler::Attempt;
use crate::message::{Draft, Envelope, minted_at};
use crate::postbox::Postbox;
use crate::router::{Router, handler, relay};
use crate::sink::{Outgoing, Sink, Then, Unsent};
use crate::source::{Entry, Source};
use crate::store::Database;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long it is looked between two tries.
const LOOK: Duration = Duration::from_millis(20);

/// A broker with something that reads it: what [`source_suite`] needs of it.
pub trait SourceBench: Sync {
    /// What is tested.
    type Source: Source;

    /// Another source that reads the same, in the same group: what another process would have.
    fn source(&self) -> impl Future<Output = Self::Source> + Send;
    /// The same again, after its process ended: whatever tells it from others is as it was.
    fn again(&self) -> impl Future<Output = Self::Source> + Send;
    /// Puts a message of this id and topic, with the payload `{"n": n}`, into the broker, in the source's format.
    fn put(&self, id: &str, topic: &str, n: usize) -> impl Future<Output = ()> + Send;
    /// Nobody may have read it before: an empty stream, queue or topic.
    fn clear(&self) -> impl Future<Output = ()> + Send;
}

/// Checks a source: what is put is read, in order, and not twice; what is not acknowledged comes again once it is opened
/// anew; two of one group share; and through the engine each message is handled once.
///
/// # Panics
/// Something is not as it has to be.
pub async fn source_suite<Db: Database, B: SourceBench>(bench: &B, postbox: &Postbox<Db>) {
    an_empty_read_ends(bench).await;
    what_is_not_acknowledged_comes_again(bench).await;
    two_share(bench).await;
    each_is_handled_once(bench, postbox).await;
}

async fn opened<B: SourceBench>(source: &mut B::Source) {
    source.open(None).await.expect("the source opens");
}

/// Reads until so many are there.
async fn read<S: Source>(source: &mut S, wanted: usize) -> Vec<Entry> {
    let begun = Instant::now();
    let mut entries = Vec::new();
    while entries.len() < wanted {
        assert!(begun.elapsed() < PATIENCE, "only {} of {wanted} entries were read", entries.len());
        let read = source.read().await.expect("the source reads");
        assert!(read.lost.is_empty(), "told as lost: {:?}", read.lost);
        entries.extend(read.entries);
    }
    entries
}

fn positions(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|entry| entry.position.clone()).collect()
}

fn ids<S: Source>(source: &S, entries: &[Entry]) -> Vec<String> {
    let read = |entry: &Entry| {
        source.format().read(&entry.raw, &source.name(), &entry.position).map(|incoming| incoming.identity)
    };
    entries.iter().map(|entry| read(entry).expect("the entry can be read")).collect()
}

async fn an_empty_read_ends<B: SourceBench>(bench: &B) {
    bench.clear().await;
    let mut source = bench.source().await;
    assert!(!source.kind().is_empty() && !source.name().is_empty(), "a source has a kind and a name");
    opened::<B>(&mut source).await;
    let read = tokio::time::timeout(PATIENCE, source.read()).await.expect("a read of nothing ends");
    assert_eq!(read.expect("the source reads").entries, Vec::new(), "there is nothing to read");
    source.acknowledge(&[]).await.expect("nothing can be acknowledged, too");
    source.close().await;
}

async fn what_is_not_acknowledged_comes_again<B: SourceBench>(bench: &B) {
    bench.clear().await;
    let mut source = bench.source().await;
    opened::<B>(&mut source).await;
    for n in 0..6 {
        bench.put(&format!("again-{n}"), "suite.again", n).await;
    }
    let first = read(&mut source, 6).await;
    let (known, places) = (ids(&source, &first), positions(&first));
    assert_eq!(places.iter().collect::<BTreeSet<_>>().len(), 6, "positions are one each: {places:?}");
    let lag = source.standing().await.expect("it tells how it stands").lag;
    assert!(lag.is_none_or(|lag| lag == 6), "6 are not acknowledged, and the lag is {lag:?}");
    let more = source.read().await.expect("the source reads");
    assert_eq!(ids(&source, &more.entries), Vec::<String>::new(), "what the worker has does not come twice");
    source.acknowledge(&places[..4]).await.expect("it acknowledges");
    source.acknowledge(&places[..4]).await.expect("it acknowledges again");
    drop(source);
    let mut source = bench.again().await;
    opened::<B>(&mut source).await;
    let second = read(&mut source, 2).await;
    assert_eq!(ids(&source, &second), known[4..], "what was not acknowledged comes again, in its order");
    assert_eq!(positions(&second), places[4..], "and stands where it stood");
    source.acknowledge(&positions(&second)).await.expect("it acknowledges");
    let lag = source.standing().await.expect("it tells how it stands").lag;
    assert!(lag.is_none_or(|lag| lag == 0), "all are acknowledged, and the lag is {lag:?}");
    source.close().await;
    let mut source = bench.again().await;
    opened::<B>(&mut source).await;
    let rest = source.read().await.expect("the source reads");
    assert_eq!(rest.entries, Vec::new(), "what is acknowledged does not come again");
    source.close().await;
}

async fn two_share<B: SourceBench>(bench: &B) {
    bench.clear().await;
    let (mut one, mut other) = (bench.source().await, bench.source().await);
    opened::<B>(&mut one).await;
    opened::<B>(&mut other).await;
    for n in 0..20 {
        bench.put(&format!("share-{n}"), "suite.share", n).await;
    }
    let (mut seen, begun) = (Vec::new(), Instant::now());
    while seen.len() < 20 {
        assert!(begun.elapsed() < PATIENCE, "only {} of 20 entries were read by two", seen.len());
        for source in [&mut one, &mut other] {
            let entries = source.read().await.expect("the source reads").entries;
            seen.extend(ids(source, &entries));
            source.acknowledge(&positions(&entries)).await.expect("it acknowledges");
        }
    }
    let different: BTreeSet<_> = seen.iter().collect();
    assert_eq!((seen.len(), different.len()), (20, 20), "each goes to one of two: {seen:?}");
    one.close().await;
    other.close().await;
}

async fn each_is_handled_once<Db: Database, B: SourceBench>(bench: &B, postbox: &Postbox<Db>) {
    bench.clear().await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = seen.clone();
    let note = move |envelope: Envelope| {
        let noted = noted.clone();
        async move {
            noted.lock().expect("a list").push(envelope.external_id.unwrap_or_default());
        }
    };
    let router = Router::new().on("suite.once", handler(note).named("suite-once"));
    let worker = postbox.worker(router).receive(bench.source().await).start().await.expect("the worker starts");
    for n in 0..30 {
        // Each third one comes twice.
        for _ in 0..1 + usize::from(n % 3 == 0) {
            bench.put(&format!("once-{n}"), "suite.once", n).await;
        }
    }
    let begun = Instant::now();
    loop {
        let row = postbox.admin().sources().await.expect("the sources").into_iter().next_back();
        let (received, duplicate) = row.map_or((0, 0), |row| (row.received, row.duplicate));
        if (received, duplicate) == (30, 10) && seen.lock().expect("a list").len() >= 30 {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "received {received} of 30, duplicates {duplicate} of 10");
        tokio::time::sleep(LOOK).await;
    }
    worker.stop(Some(PATIENCE)).await.expect("the worker stops");
    let mut seen = seen.lock().expect("a list").clone();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 30, "each is handled: {seen:?}");
}

/// What has arrived on the other side of a sink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrived {
    /// The message's id.
    pub id: Uuid,
    /// Its topic.
    pub topic: String,
    /// Its key.
    pub key: Option<String>,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// Another side with a sink that sends to it: what [`sink_suite`] needs of it.
pub trait SinkBench: Sync {
    /// What is tested.
    type Sink: Sink;

    /// A sink that sends there.
    fn sink(&self) -> impl Future<Output = Self::Sink> + Send;
    /// What has arrived since the last call, in its order.
    fn arrived(&self) -> impl Future<Output = Vec<Arrived>> + Send;
    /// From now on nobody answers, or somebody does again.
    fn answers(&self, does: bool) -> impl Future<Output = ()> + Send;
}

/// Checks a sink: each message is confirmed and there, under its own id, in order by key; nothing counts as sent
/// that nobody has confirmed; and through the engine all arrive, also when nobody answers for a while.
///
/// # Panics
/// Something is not as it has to be.
pub async fn sink_suite<Db: Database, B: SinkBench>(bench: &B, postbox: &Postbox<Db>) {
    what_is_sent_is_there(bench).await;
    what_nobody_confirms_is_not_sent(bench).await;
    a_relay_sends_all(bench, postbox).await;
}

/// A message as a sink gets it, with an id of its own, at its first attempt.
pub fn outgoing(draft: Draft) -> Outgoing {
    let id = Uuid::now_v7();
    let envelope = Envelope {
        id,
        topic: draft.topic,
        key: draft.key,
        payload: draft.payload,
        headers: draft.headers,
        occurred_at: draft.occurred_at.unwrap_or_else(|| minted_at(id)),
        received_at: minted_at(id),
        source: draft.source,
        external_id: draft.external_id,
        correlation_id: draft.correlation_id,
        causation_id: draft.causation_id,
        max_attempts: draft.max_attempts,
    };
    Outgoing::new(Arc::new(envelope), Attempt { number: 1, max: 4, delivery: 1 })
}

fn numbered(topic: &str, key: &str, n: usize) -> Outgoing {
    outgoing(Envelope::json(topic, &json!({ "n": n })).expect("a draft").key(key))
}

async fn what_is_sent_is_there<B: SinkBench>(bench: &B) {
    let sink = bench.sink().await;
    assert!(!sink.kind().is_empty() && !sink.name().is_empty(), "a sink has a kind and a name");
    sink.open().await.expect("the other side is there");
    assert_eq!(sink.send(&[]).await, Vec::new(), "nothing can be sent, too");
    let batch: Vec<Outgoing> = (0..40).map(|n| numbered("suite.sent", &format!("k{}", n % 4), n)).collect();
    assert_eq!(sink.send(&batch).await, vec![Ok(()); 40], "each is confirmed");
    let arrived = bench.arrived().await;
    assert_eq!(arrived.len(), 40, "each is there once");
    for one in &batch {
        let there = arrived.iter().find(|there| there.id == one.id);
        let there = there.unwrap_or_else(|| panic!("message {} is confirmed, and not there", one.id));
        assert_eq!((there.topic.as_str(), there.key.as_deref()), (one.topic.as_str(), one.key.as_deref()));
        let same = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).ok();
        assert_eq!(same(&there.payload), same(one.payload_bytes()), "the payload is the same");
    }
    in_order(&batch.iter().map(|one| (one.key.clone(), one.id)).collect::<Vec<_>>(), &arrived);
    assert_eq!(sink.send(&batch[..1]).await, vec![Ok(())], "it can be sent again");
    let repeated = bench.arrived().await;
    assert!(repeated.iter().all(|there| there.id == batch[0].id), "what is sent again has the id it had");
}

/// Of each key, what arrived first came first.
fn in_order(sent: &[(Option<String>, Uuid)], arrived: &[Arrived]) {
    let mut first = HashMap::new();
    for (place, there) in arrived.iter().enumerate() {
        first.entry(there.id).or_insert(place);
    }
    let mut last: HashMap<&Option<String>, usize> = HashMap::new();
    for (key, id) in sent {
        let place = first[id];
        if let Some(before) = last.insert(key, place) {
            assert!(before < place, "message {id} of the key {key:?} has overtaken another");
        }
    }
}

async fn what_nobody_confirms_is_not_sent<B: SinkBench>(bench: &B) {
    let sink = bench.sink().await;
    sink.open().await.expect("the other side is there");
    bench.answers(false).await;
    let batch: Vec<Outgoing> = (0..3).map(|n| numbered("suite.unsent", "k", n)).collect();
    let sent = tokio::time::timeout(PATIENCE, sink.send(&batch)).await.expect("sending to nobody ends");
    assert_eq!(sent.len(), 3, "one answer for each");
    let again =
        |answer: &Result<(), Unsent>| matches!(answer, Err(unsent) if matches!(unsent.then, Then::Again { .. }));
    let untried = |answer: &Result<(), Unsent>| answer.as_ref().is_err_and(Unsent::is_untried);
    assert!(again(&sent[0]), "it counts as an attempt at the first, or it would be tried without end: {:?}", sent[0]);
    for answer in &sent {
        assert!(again(answer) || untried(answer), "nobody has confirmed it, so it is sent again: {answer:?}");
    }
    bench.answers(true).await;
    let arrived = bench.arrived().await;
    for (message, _) in batch.iter().zip(&sent).filter(|(_, answer)| untried(answer)) {
        assert!(
            arrived.iter().all(|there| there.id != message.id),
            "message {} was not tried, and is there",
            message.id
        );
    }
    let begun = Instant::now();
    while sink.send(&batch).await != vec![Ok(()); 3] {
        assert!(begun.elapsed() < PATIENCE, "somebody answers again, and nothing is confirmed");
        tokio::time::sleep(LOOK).await;
    }
    bench.arrived().await;
}

async fn a_relay_sends_all<Db: Database, B: SinkBench>(bench: &B, postbox: &Postbox<Db>) {
    bench.arrived().await;
    let backoff = Duration::from_millis(50);
    let relayed = relay(bench.sink().await).named("suite-relay").backoff(backoff, backoff * 4);
    let worker = postbox.worker(Router::new().relay("suite.relayed", relayed)).start().await.expect("it starts");
    let mut sent = Vec::new();
    for round in 0..4 {
        bench.answers(round % 2 == 0).await;
        let drafts = (0..25).map(|n| {
            Envelope::json("suite.relayed", &json!({ "n": round * 25 + n })).map(|d| d.key(format!("k{}", n % 5)))
        });
        let published = postbox.publish_now(drafts).await.expect("it publishes");
        sent.extend(published.into_iter().map(|one| (one.key.clone(), one.id)));
    }
    bench.answers(true).await;
    let (mut arrived, begun) = (Vec::new(), Instant::now());
    let wanted: BTreeSet<Uuid> = sent.iter().map(|(_, id)| *id).collect();
    loop {
        arrived.extend(bench.arrived().await);
        let there: BTreeSet<Uuid> = arrived.iter().map(|one: &Arrived| one.id).collect();
        if wanted.is_subset(&there) {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "only {} of {} have arrived", there.len(), wanted.len());
        tokio::time::sleep(LOOK).await;
    }
    worker.stop(Some(PATIENCE)).await.expect("the worker stops");
    in_order(&sent, &arrived);
}
