//! Redis Streams as a source: a consumer in a consumer group.
//!
//! What was handed to this consumer and not acknowledged comes first, then what is new; what others have left
//! lying is taken over now and then. An entry leaves the group's pending list only by an acknowledgement, so that
//! whatever is dropped on the way comes again.

mod consumer;
mod group;
mod reply;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::{Cmd, Value, cmd, pipe};

use self::consumer::Consumer;
use self::reply::{Id, Listed, Odd};
use super::{Entry, Format, Raw, Read, Source, Standing};
use crate::error::BrokerError;
use crate::redis_client::{Known, Link, Server, Trouble};

/// How long an answer may take beyond what a command waits by itself.
const PATIENCE: Duration = Duration::from_secs(10);
/// Stream names are part of positions, which are at most 255 bytes.
const MAX_STREAM_BYTES: usize = 200;
/// The most ids in one acknowledgement.
const IDS_AT_ONCE: usize = 1000;

/// Reads a Redis stream in a consumer group: made by [`redis_stream`].
///
/// Any number of processes may read with the same group; each entry goes to one of them. The group is made where
/// it is missing, from the beginning of the stream, never from its end.
pub struct RedisSource {
    stream: String,
    group: String,
    prefix: Option<String>,
    server: Server,
    batch: usize,
    block: Duration,
    min_idle: Duration,
    forget_after: Duration,
    max_deliveries: u32,
    replay_horizon: Option<Duration>,
    name: Option<String>,
    format: Format,
    /// Held from the first [`open`](Source::open) on.
    consumer: Option<Consumer>,
    /// The last that was told: where a group that is gone begins anew.
    checkpoint: Option<String>,
    /// What was told as lost and not acknowledged: Redis tells of some of it only once.
    lost: Vec<String>,
    session: Option<Session>,
}

/// From [`open`](Source::open) to [`close`](Source::close).
struct Session {
    /// For reads, which block.
    reader: Link,
    /// For everything else.
    control: Link,
    /// What was handed over and not acknowledged: it is the worker's.
    handed: HashSet<String>,
    /// Own pending entries beyond this id have not been looked at; `None`: there are none but those.
    own: Option<Id>,
    /// Where the next claim goes on, and when.
    cursor: Id,
    claim_at: Instant,
}

/// A source that reads this stream.
///
/// ```
/// # #[cfg(feature = "redis")] {
/// use postbox::source::redis_stream;
/// let payments = redis_stream("payments").url("redis://localhost:6379").group("shop").batch(100);
/// # }
/// ```
pub fn redis_stream(stream: impl Into<String>) -> RedisSource {
    RedisSource {
        stream: stream.into(),
        group: "postbox".into(),
        prefix: None,
        server: Server::default(),
        batch: 10,
        block: Duration::from_secs(1),
        min_idle: Duration::from_secs(60),
        forget_after: Duration::from_secs(86_400),
        max_deliveries: 20,
        replay_horizon: None,
        name: None,
        format: Format::default(),
        consumer: None,
        checkpoint: None,
        lost: Vec::new(),
        session: None,
    }
}

impl RedisSource {
    /// Which server: `redis://[user:password@]host[:port][/database]`, or `rediss://` for TLS. Without it
    /// `REDIS_URL` in the environment says it, else it is the one on this host.
    pub fn url(mut self, url: impl Into<String>) -> Self {
        self.server = Server::Url(url.into());
        self
    }

    /// Whether the server's URL can be used at all. Connects to nothing.
    ///
    /// # Errors
    /// [`BrokerError::Refused`]; the URL is not in it.
    pub fn check_url(&self) -> Result<(), BrokerError> {
        self.server.known().map(drop)
    }

    /// A client of your own. Connections are made from it; yours are not used.
    pub fn client(mut self, client: redis::Client) -> Self {
        self.server = Server::Client(Box::new(client));
        self
    }

    /// The consumer group. Default `postbox`.
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.group = group.into();
        self
    }

    /// What the consumer's name begins with; a number follows, so that each process of a host has its own and has
    /// it again when it is started again. Default the host's name: give another where hosts share theirs.
    pub fn consumer_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// The most entries of one read, at least 1. Default 10.
    pub fn batch(mut self, entries: usize) -> Self {
        self.batch = entries.max(1);
        self
    }

    /// How long a read waits for the first entry, at least 1 ms. Default 1 s.
    pub fn block(mut self, wait: Duration) -> Self {
        self.block = wait.max(Duration::from_millis(1));
        self
    }

    /// An entry that another consumer has had for so long without acknowledging it is taken over. It has to be
    /// longer than it ever takes to store a batch; shorter, entries are handed out twice, and stored once.
    /// Default 60 s.
    pub fn min_idle(mut self, idle: Duration) -> Self {
        self.min_idle = idle;
        self
    }

    /// Consumers of the group that nobody has heard of for so long, and that have nothing pending, are deleted
    /// when the source is opened. Default one day.
    pub fn forget_after(mut self, idle: Duration) -> Self {
        self.forget_after = idle;
        self
    }

    /// An entry that was handed out more often than this goes into quarantine. Default 20.
    pub fn max_deliveries(mut self, deliveries: u32) -> Self {
        self.max_deliveries = deliveries;
        self
    }

    /// For how long entries may come again: as long as the stream keeps them, if it is trimmed by age. Redis does
    /// not say; with this, ids are remembered for longer.
    pub fn replay_horizon(mut self, horizon: Duration) -> Self {
        self.replay_horizon = Some(horizon);
        self
    }

    /// Its durable name. Default `redis:` and the stream.
    pub fn named(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// How entries become messages. Default: the known formats, told apart by their fields.
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// Which consumer of the group this is, once it is open.
    pub fn consumer(&self) -> Option<&str> {
        self.consumer.as_ref().map(|consumer| consumer.name.as_str())
    }

    fn check(&self) -> Result<(), BrokerError> {
        if self.stream.is_empty() || self.stream.len() > MAX_STREAM_BYTES {
            let bytes = self.stream.len();
            let why = format!("the name of the stream is {bytes} bytes long; 1 to {MAX_STREAM_BYTES} can be read");
            return Err(BrokerError::Refused(why));
        }
        if self.group.is_empty() || self.prefix.as_deref() == Some("") {
            return Err(BrokerError::Refused("the group and the consumer prefix must not be empty".into()));
        }
        Ok(())
    }

    fn session(&mut self) -> Result<&mut Session, BrokerError> {
        self.session.as_mut().ok_or_else(|| BrokerError::Unavailable("the source is not open".into()))
    }

    fn position(&self, id: Id) -> String {
        format!("{}/{id}", self.stream)
    }

    /// The ids among these positions.
    fn ids(&self, positions: &[String]) -> Vec<Id> {
        let ids = positions.iter().filter_map(|position| position.strip_prefix(&self.stream)?.strip_prefix('/'));
        ids.filter_map(|id| id.parse().ok()).collect()
    }

    /// A command that names stream and group first.
    fn command(&self, name: &str) -> Cmd {
        let mut command = cmd(name);
        command.arg(&self.stream).arg(&self.group);
        command
    }

    async fn look(&mut self) -> Result<Read, Trouble> {
        while let Some(after) = self.session()?.own {
            let read = self.read_own(after).await?;
            if self.is_something(&read) {
                return Ok(read);
            }
        }
        if Instant::now() >= self.session()?.claim_at {
            let read = self.claim().await?;
            if self.is_something(&read) {
                return Ok(read);
            }
        }
        self.read_new().await
    }

    fn is_something(&self, read: &Read) -> bool {
        let told = |position| self.session.as_ref().is_some_and(|session| session.handed.contains(position));
        !read.entries.is_empty() || !self.lost.iter().all(told)
    }

    /// What was handed to this consumer, is not acknowledged, and not the worker's.
    async fn read_own(&mut self, after: Id) -> Result<Read, Trouble> {
        let read = self.read_group(after.to_string(), None);
        let listed = understood(self.session()?.reader.ask(&read).await, reply::read)?;
        let last = listed.last().map(|(id, _)| *id);
        let read = self.handed_again(listed).await?;
        self.session()?.own = last;
        Ok(read)
    }

    /// What nobody was handed yet.
    async fn read_new(&mut self) -> Result<Read, Trouble> {
        let read = self.read_group(">".into(), Some(self.block));
        let session = self.session()?;
        // If this is dropped on the way, what comes is this consumer's, and is read as that.
        session.own = Some(Id::ZERO);
        let listed = understood(session.reader.ask(&read).await, reply::read)?;
        session.own = None;
        Ok(self.told(listed, |_| 1))
    }

    /// What another consumer has had for too long; or this one, without knowing it.
    async fn claim(&mut self) -> Result<Read, Trouble> {
        let mut command = self.command("XAUTOCLAIM");
        let interval = (self.min_idle / 4).clamp(Duration::from_millis(50), Duration::from_secs(15));
        let (min_idle, batch) = (millis(self.min_idle), self.batch);
        command.arg(self.consumer().unwrap_or_default());
        let session = self.session()?;
        command.arg(min_idle).arg(session.cursor.to_string()).arg("COUNT").arg(batch);
        session.own = Some(Id::ZERO);
        let (next, claimed, gone) = understood(session.control.ask(&command).await, reply::claim)?;
        session.cursor = next;
        if next == Id::ZERO {
            session.claim_at = Instant::now() + interval;
        }
        for id in gone {
            self.note_lost(self.position(id));
        }
        let read = self.handed_again(claimed).await?;
        self.session()?.own = None;
        Ok(read)
    }

    fn read_group(&self, after: String, block: Option<Duration>) -> Cmd {
        let mut read = cmd("XREADGROUP");
        read.arg("GROUP").arg(&self.group).arg(self.consumer().unwrap_or_default()).arg("COUNT").arg(self.batch);
        if let Some(block) = block {
            read.arg("BLOCK").arg(millis(block).max(1));
        }
        read.arg("STREAMS").arg(&self.stream).arg(after);
        read
    }

    /// Entries that were handed out before, each with its count, but those that are the worker's.
    async fn handed_again(&mut self, mut listed: Vec<Listed>) -> Result<Read, Trouble> {
        let known = |id: Id| self.session.as_ref().is_some_and(|s| s.handed.contains(&self.position(id)));
        listed.retain(|(id, _)| !known(*id));
        if listed.is_empty() {
            return Ok(Read::default());
        }
        let mut ask = pipe();
        for (id, _) in &listed {
            let id = id.to_string();
            ask.cmd("XPENDING").arg(&self.stream).arg(&self.group).arg(&id).arg(&id).arg(1);
        }
        let answers = self.session()?.control.ask_all(&mut ask).await?;
        let count = |at: usize| answers.get(at).and_then(reply::deliveries).unwrap_or(1).max(1);
        Ok(self.told(listed, count))
    }

    /// What a read came to, and is the worker's from now on; what is lost is told by [`Self::untold`].
    fn told(&mut self, listed: Vec<Listed>, deliveries: impl Fn(usize) -> u32) -> Read {
        let mut read = Read { more: listed.len() >= self.batch, ..Read::default() };
        for (at, (id, fields)) in listed.into_iter().enumerate() {
            let position = self.position(id);
            match fields {
                Some(fields) => {
                    let raw = Raw { fields, body: None };
                    read.entries.push(Entry { position, raw, deliveries: deliveries(at) });
                }
                None => self.note_lost(position),
            }
        }
        if let Some(session) = &mut self.session {
            session.handed.extend(read.entries.iter().map(|entry| entry.position.clone()));
        }
        read
    }

    fn note_lost(&mut self, position: String) {
        if !self.lost.contains(&position) {
            self.lost.push(position);
        }
    }

    /// What is lost and the worker has not been told since the source was opened.
    fn untold(&mut self) -> Vec<String> {
        let Some(session) = &mut self.session else { return Vec::new() };
        let untold = self.lost.iter().filter(|position| session.handed.insert((*position).clone()));
        untold.cloned().collect()
    }

    async fn acknowledge_ids(&mut self, ids: &[Id]) -> Result<(), BrokerError> {
        for some in ids.chunks(IDS_AT_ONCE) {
            let mut command = self.command("XACK");
            for id in some {
                command.arg(id.to_string());
            }
            self.session()?.control.ask(&command).await?;
        }
        Ok(())
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn understood<T>(answer: Result<Value, Trouble>, read: impl Fn(Value) -> Result<T, Odd>) -> Result<T, Trouble> {
    let odd = |Odd| BrokerError::Unavailable("Redis gave an answer that is none to what was asked".into());
    Ok(read(answer?).map_err(odd)?)
}

/// The group is gone; the last is what Redis 7.0 says to who waits while its stream goes.
fn group_is_gone(trouble: &Trouble) -> bool {
    trouble.is("NOGROUP") || trouble.is("UNBLOCKED")
}

impl Source for RedisSource {
    fn kind(&self) -> &'static str {
        "redis"
    }

    fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| format!("redis:{}", self.stream))
    }

    fn format(&self) -> &Format {
        &self.format
    }

    fn max_deliveries(&self) -> u32 {
        self.max_deliveries
    }

    fn replay_horizon(&self) -> Option<Duration> {
        self.replay_horizon
    }

    async fn open(&mut self, checkpoint: Option<&str>) -> Result<Vec<String>, BrokerError> {
        self.check()?;
        let known: Arc<Known> = Arc::new(self.server.known()?);
        if let Some(checkpoint) = checkpoint {
            self.checkpoint = Some(checkpoint.to_owned());
        }
        let mut warnings = Vec::new();
        if self.consumer.is_none() {
            let prefix = self.prefix.clone().unwrap_or_else(consumer::host);
            let scope = format!("{}\n{}\n{}", known.address(), self.stream, self.group);
            let (consumer, warning) = consumer::take(&prefix, &scope);
            warnings.extend(warning);
            self.consumer = Some(consumer);
        }
        self.session = Some(Session {
            reader: Link::new(known.clone(), self.block + PATIENCE),
            control: Link::new(known, PATIENCE),
            handed: HashSet::new(),
            own: Some(Id::ZERO),
            cursor: Id::ZERO,
            claim_at: Instant::now(),
        });
        self.make_group().await?;
        self.forget_consumers().await?;
        warnings.extend(self.warnings().await?);
        Ok(warnings)
    }

    async fn read(&mut self) -> Result<Read, BrokerError> {
        let read = match self.look().await {
            Err(trouble) if group_is_gone(&trouble) => {
                tracing::warn!(stream = self.stream, group = self.group, "the consumer group is gone and made anew");
                self.make_group().await?;
                self.look().await
            }
            read => read,
        };
        if read.is_err()
            && let Some(session) = &mut self.session
        {
            session.own = Some(Id::ZERO);
        }
        let mut read = read?;
        read.lost = self.untold();
        Ok(read)
    }

    async fn acknowledge(&mut self, positions: &[String]) -> Result<(), BrokerError> {
        self.acknowledge_ids(&self.ids(positions)).await?;
        let session = self.session()?;
        for position in positions {
            session.handed.remove(position);
        }
        self.lost.retain(|position| !positions.contains(position));
        Ok(())
    }

    async fn standing(&mut self) -> Result<Standing, BrokerError> {
        let mut ask = pipe();
        // In this order: what was handed out by the first and is acknowledged by the second is done.
        ask.cmd("XINFO").arg("GROUPS").arg(&self.stream).cmd("XPENDING").arg(&self.stream).arg(&self.group);
        let answers = self.session()?.control.ask_all(&mut ask).await?;
        let [groups, pending] = &answers[..] else { return Ok(Standing::default()) };
        // Without the group nothing is known; the next read makes it.
        let Some(group) = reply::group(groups, &self.group) else { return Ok(Standing::default()) };
        if matches!(pending, Value::ServerError(_)) {
            return Ok(Standing::default());
        }
        let done = match reply::smallest_pending(pending) {
            Some(smallest) => group.last_delivered.min(smallest.before()),
            None => group.last_delivered,
        };
        let checkpoint = done.to_string();
        self.checkpoint = Some(checkpoint.clone());
        Ok(Standing { lag: group.lag.map(|lag| lag + group.pending), checkpoint: Some(checkpoint) })
    }

    async fn close(&mut self) {
        self.session = None;
        self.consumer = None;
    }
}
