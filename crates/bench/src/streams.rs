//! Redis Streams in and out, beside the engine without them and the client without the engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postbox::sink::{Encoded, EnvelopeStyle, redis};
use postbox::source::redis_stream;
use postbox::testing::outgoing;
use postbox::{Draft, Postgres, Router, relay};
use postbox_testkit::RedisServer;
use redis::aio::MultiplexedConnection;

use crate::figure::{Bar, Figure};
use crate::load::{TOPIC, draft, fill, idle_handler, on_record, payload, register, succeeded};
use crate::site::Site;
use crate::{Extent, Problem};

/// Entries of a read, messages of a publish.
const READ: usize = 1000;
/// Messages of a pipeline.
const PIPELINE: usize = 200;
/// Different keys, in turns.
const KEYS: usize = 1000;
const PATIENCE: Duration = Duration::from_secs(60);

/// Messages of a round: some seconds of it.
fn in_a_round(extent: Extent) -> usize {
    extent.messages * 2 / 3
}

async fn connect(server: &RedisServer) -> Result<MultiplexedConnection, Problem> {
    let config = redis::AsyncConnectionConfig::new().set_response_timeout(Some(PATIENCE));
    let client = redis::Client::open(server.url())?;
    Ok(client.get_multiplexed_async_connection_with_config(&config).await?)
}

/// A stream full of messages, until all are handled; beside publishing the same in bulk while a worker drains.
pub(crate) async fn into_handled(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let messages = in_a_round(extent);
    let server = tokio::task::spawn_blocking(RedisServer::start).await?;
    let mut connection = connect(&server).await?;
    let (mut received, mut published) = (Vec::new(), Vec::new());
    for round in 0..extent.rounds {
        let stream = format!("bench-{round}");
        for begin in (0..messages).step_by(READ) {
            let mut pipeline = redis::pipe();
            for number in begin..messages.min(begin + READ) {
                let add = pipeline.cmd("XADD").arg(&stream).arg("*").arg("event_id").arg(number);
                add.arg("event_type").arg(TOPIC).arg("payload").arg(payload(number));
            }
            pipeline.exec_async(&mut connection).await?;
        }
        for (rates, from_redis) in [(&mut published, false), (&mut received, true)] {
            let done = Arc::new(AtomicU64::new(0));
            let fresh = site.fresh().await?;
            register(&fresh, idle_handler(&done)).await?;
            site.settle_down().await?;
            let before = (0, succeeded(site, &fresh).await?);
            let worker = fresh.postbox.worker(idle_handler(&done)).concurrency(100);
            let begun = Instant::now();
            let worker = match from_redis {
                true => {
                    let source = redis_stream(&stream).url(server.url()).group("bench").batch(READ);
                    worker.receive(source).start().await?
                }
                false => {
                    let worker = worker.start().await?;
                    fill(&fresh.postbox, messages).await?;
                    worker
                }
            };
            on_record(site, &fresh, &done, before, messages).await?;
            rates.push(messages as f64 / begun.elapsed().as_secs_f64());
            worker.stop(None).await?;
            fresh.drop(site).await?;
        }
        redis::cmd("DEL").arg(&stream).exec_async(&mut connection).await?;
    }
    let name = "Redis into handled, beside publishing and draining";
    Ok(vec![Figure::beside(name, &received, &published, "msg/s", Bar::Ratio(0.6))])
}

/// A backlog, until Redis has confirmed all of it and that is on record; beside the same client that sends the same
/// entries from memory, one pipeline after the other.
pub(crate) async fn relayed(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let messages = in_a_round(extent);
    let server = tokio::task::spawn_blocking(RedisServer::start).await?;
    let mut connection = connect(&server).await?;
    let (mut from_memory, mut unordered, mut ordered) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..extent.rounds {
        from_memory.push(sent_from_memory(&mut connection, messages).await?);
        for (rates, in_order) in [(&mut unordered, false), (&mut ordered, true)] {
            redis::cmd("FLUSHALL").exec_async(&mut connection).await?;
            let routes = || {
                let sending = relay(redis("bench").url(server.url())).up_to(PIPELINE);
                Router::<Postgres>::new().relay(TOPIC, if in_order { sending } else { sending.unordered() })
            };
            let fresh = site.fresh().await?;
            register(&fresh, routes()).await?;
            for begin in (0..messages).step_by(READ) {
                let drafts = (begin..messages.min(begin + READ)).map(keyed);
                fresh.postbox.publish_now(drafts.collect::<Result<Vec<Draft>, Problem>>()?).await?;
            }
            site.run(&format!("vacuum analyze {0}.ready; ", fresh.schema)).await?;
            site.run(&format!("vacuum analyze {0}.message", fresh.schema)).await?;
            site.settle_down().await?;
            let begun = Instant::now();
            let worker = fresh.postbox.worker(routes()).concurrency(5 * PIPELINE).start().await?;
            let there = Arc::new(AtomicU64::new(0));
            while there.load(Ordering::Relaxed) < messages as u64 {
                tokio::time::sleep(Duration::from_millis(5)).await;
                let length: u64 = redis::cmd("XLEN").arg("bench").query_async(&mut connection).await?;
                there.store(length, Ordering::Relaxed);
            }
            on_record(site, &fresh, &there, (0, 0.0), messages).await?;
            rates.push(messages as f64 / begun.elapsed().as_secs_f64());
            worker.stop(None).await?;
            fresh.drop(site).await?;
        }
    }
    let name = |how: &str| format!("relay to Redis, {how}, beside its client alone");
    Ok(vec![
        Figure::beside(&name("unordered"), &unordered, &from_memory, "msg/s", Bar::Ratio(0.7)),
        Figure::beside(&name("1,000 keys in order"), &ordered, &from_memory, "msg/s", Bar::Ratio(0.7)),
    ])
}

fn keyed(number: usize) -> Result<Draft, Problem> {
    Ok(draft(number)?.key(format!("key-{}", number % KEYS)))
}

async fn sent_from_memory(connection: &mut MultiplexedConnection, messages: usize) -> Result<f64, Problem> {
    redis::cmd("FLUSHALL").exec_async(connection).await?;
    let mut entries = Vec::with_capacity(messages);
    for number in 0..messages {
        let message = outgoing(keyed(number)?);
        let encoded = Encoded::new(&message, EnvelopeStyle::default(), None);
        entries.push(encoded.fields().map(|(name, value)| (name, value.to_vec())).collect::<Vec<_>>());
    }
    let begun = Instant::now();
    for some in entries.chunks(PIPELINE) {
        let mut pipeline = redis::pipe();
        for fields in some {
            let add = pipeline.cmd("XADD").arg("bench").arg("*");
            for (name, value) in fields {
                add.arg(name).arg(value);
            }
        }
        pipeline.exec_async(connection).await?;
    }
    Ok(messages as f64 / begun.elapsed().as_secs_f64())
}
