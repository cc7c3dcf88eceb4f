//! Redis Streams as a sink.
//!
//! A batch is one pipeline with one XADD for each message, and each reply is looked at. Messages of one key that go
//! to the same stream stand in a transaction of their own, so that none passes another that was refused (because
//! memory ran out between the two, say). A command names one stream, and a transaction as well: a cluster takes
//! them.

mod plan;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{Value, cmd};

use self::plan::Plan;
use super::{EnvelopeStyle, Outgoing, Sent, Sink, Target, Unsent};
use crate::error::BrokerError;
use crate::redis_client::{Known, Link, Server, Trouble, setting, unsafe_settings};

/// How long replies may take; then the connection counts as lost, and whether they were added as unknown.
const PATIENCE: Duration = Duration::from_secs(30);

/// Adds messages to Redis streams: made by [`redis`](fn@redis).
///
/// One connection serves all workers of the process; it is made again after it was lost.
pub struct RedisSink {
    to: String,
    style: EnvelopeStyle,
    source: Option<String>,
    server: Server,
    max_len: Option<u64>,
    name: Option<String>,
    /// The most bytes that Redis takes in one value. With more, it would hang up, and the whole batch with it.
    largest: AtomicU64,
    live: Mutex<Live>,
    /// Held by whoever makes the connection.
    connecting: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Live {
    ready: Option<Arc<Ready>>,
    connection: Option<MultiplexedConnection>,
    /// How many connections there were.
    number: u64,
}

/// The settings, once they are understood.
struct Ready {
    target: Target,
    known: Arc<Known>,
}

/// A sink that adds messages to this stream; its name may have `{topic}`, `{key}`, `{id}` and `{header:NAME}`.
///
/// ```
/// # #[cfg(feature = "redis")] {
/// use postbox::sink::redis;
/// let orders = redis("shop.{topic}").url("redis://localhost:6379");
/// # }
/// ```
pub fn redis(stream: impl Into<String>) -> RedisSink {
    RedisSink {
        to: stream.into(),
        style: EnvelopeStyle::default(),
        source: None,
        server: Server::default(),
        max_len: None,
        name: None,
        largest: AtomicU64::new(512 << 20),
        live: Mutex::default(),
        connecting: tokio::sync::Mutex::new(()),
    }
}

impl RedisSink {
    /// Which server: `redis://[user:password@]host[:port][/database]`, or `rediss://` for TLS. Without it
    /// `REDIS_URL` in the environment says it, else it is the one on this host.
    pub fn url(mut self, url: impl Into<String>) -> Self {
        self.server = Server::Url(url.into());
        self
    }

    /// A client of your own. Connections are made from it; yours are not used.
    pub fn client(mut self, client: redis::Client) -> Self {
        self.server = Server::Client(Box::new(client));
        self
    }

    /// How messages look. Default: CloudEvents in binary mode, as fields with the prefix `ce-`, and the payload in
    /// `data`.
    pub fn envelope(mut self, style: EnvelopeStyle) -> Self {
        self.style = style;
        self
    }

    /// The CloudEvents `source` of messages that do not say theirs. Default `postbox`.
    pub fn source(mut self, source: impl Into<String>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Trims each stream to about so many entries as it grows, whether they have been read or not. Without it
    /// nothing is trimmed.
    pub fn max_len_approx(mut self, entries: u64) -> Self {
        self.max_len = Some(entries);
        self
    }

    /// The name of its relay, unless that is given one. Default `redis:` and the stream as it is written.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ready(&self) -> Result<Arc<Ready>, BrokerError> {
        if let Some(ready) = &self.live().ready {
            return Ok(ready.clone());
        }
        let target = self.to.parse().map_err(|e| BrokerError::Refused(format!("the stream `{}`: {e}", self.to)))?;
        let ready = Arc::new(Ready { target, known: Arc::new(self.server.known()?) });
        self.live().ready = Some(ready.clone());
        Ok(ready)
    }

    /// The connection that there is, or a new one.
    async fn connection(&self, known: &Known) -> Result<Hold<'_>, BrokerError> {
        let there = || {
            let live = self.live();
            live.connection.clone().map(|connection| Hold { sink: self, connection, number: live.number, sound: false })
        };
        if let Some(hold) = there() {
            return Ok(hold);
        }
        let _one_at_a_time = self.connecting.lock().await;
        if let Some(hold) = there() {
            return Ok(hold);
        }
        let connection = known.connect(PATIENCE).await?;
        let mut live = self.live();
        live.number += 1;
        live.connection = Some(connection.clone());
        Ok(Hold { sink: self, connection, number: live.number, sound: false })
    }
}

/// A connection in use. Unless all replies came, it is not used again: what it still has under way must not be
/// added after what is sent next.
struct Hold<'a> {
    sink: &'a RedisSink,
    connection: MultiplexedConnection,
    number: u64,
    sound: bool,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut live = self.sink.live();
        if !self.sound && live.number == self.number {
            live.connection = None;
        }
    }
}

impl Sink for RedisSink {
    fn kind(&self) -> &'static str {
        "redis"
    }

    fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| format!("redis:{}", self.to))
    }

    async fn open(&self) -> Result<Vec<String>, BrokerError> {
        let ready = self.ready()?;
        let mut warnings = Vec::new();
        if let Some(entries) = self.max_len {
            warnings.push(format!(
                "streams are trimmed to about {entries} entries, whether they have been read or not: a consumer that is further behind loses messages"
            ));
        }
        let mut link = Link::new(ready.known.clone(), PATIENCE);
        if let Some(stream) = ready.target.fixed() {
            match link.ask(cmd("TYPE").arg(&stream)).await {
                Ok(Value::SimpleString(kind)) if !matches!(kind.as_str(), "none" | "stream") => {
                    return Err(BrokerError::Refused(format!("the key {stream} holds a {kind}, which is no stream")));
                }
                Ok(_) | Err(Trouble::Server { .. }) => {}
                Err(Trouble::Broker(error)) => return Err(error),
            }
        }
        warnings.extend(unsafe_settings(&mut link).await?);
        if let Some(bytes) = setting(&mut link, "proto-max-bulk-len").await?.and_then(|bytes| bytes.parse().ok()) {
            self.largest.store(bytes, Ordering::Relaxed);
        }
        Ok(warnings)
    }

    async fn send(&self, batch: &[Outgoing]) -> Sent {
        let all = |error: BrokerError| batch.iter().map(|_| Err(Unsent::again(&error))).collect();
        let ready = match self.ready() {
            Ok(ready) => ready,
            Err(error) => return all(error),
        };
        let largest = self.largest.load(Ordering::Relaxed);
        let mut plan = Plan::new(batch, |message| {
            let stream = ready.target.of(message)?;
            let fields = plan::fields(message, self.style, self.source.as_deref());
            match fields.iter().map(|(_, value)| value.len() as u64).find(|bytes| *bytes > largest) {
                None => Ok((plan::add(&stream, self.max_len, &fields), stream)),
                Some(bytes) => Err(format!("a value has {bytes} bytes; Redis takes {largest} (proto-max-bulk-len)")),
            }
        });
        if plan.is_empty() {
            return plan.unsent("");
        }
        let mut hold = match self.connection(&ready.known).await {
            Ok(hold) => hold,
            Err(error) => return plan.unsent(&error.to_string()),
        };
        match plan.pipeline().query_async(&mut hold.connection).await {
            Ok(Value::Array(replies)) => {
                hold.sound = true;
                plan.settle(replies, &ready.known)
            }
            Ok(_) => plan.unsent("Redis gave an answer that is none to what was asked"),
            Err(error) => plan.unsent(&ready.known.words(&error)),
        }
    }
}
