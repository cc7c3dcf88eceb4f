//! Sources: brokers and webhooks that messages come from. A source reads and acknowledges; what is between the
//! two, once and only once, is the [inbox](crate::Inbox)'s.

mod format;
#[cfg(feature = "redis")]
mod redis;
#[cfg(feature = "webhook")]
mod webhook;

use std::future::Future;
use std::time::Duration;

pub use self::format::{Format, Incoming, Mapping, Template};
#[cfg(feature = "redis")]
pub use self::redis::{RedisSource, redis_stream};
#[cfg(feature = "webhook")]
pub use self::webhook::{Webhook, webhook};
use crate::error::BrokerError;
pub use crate::raw::Raw;
pub use crate::template::TemplateError;

/// One thing that a source has read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands at the broker (stream and entry id, say): what is acknowledged, at most 255 bytes.
    pub position: String,
    /// What it is.
    pub raw: Raw,
    /// How often the broker has handed it out, this time included; 1 if it does not count.
    pub deliveries: u32,
}

/// What one read came to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Read {
    /// What is there, in the broker's order; none if nothing came in time.
    pub entries: Vec<Entry>,
    /// Positions that were this group's to read and are gone: the broker does not have them any more. They are
    /// acknowledged like entries, once it is on record.
    pub lost: Vec<String>,
    /// More is there already, most likely: the worker reads the next batch while it commits this one.
    pub more: bool,
}

/// How a source stands with its broker.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standing {
    /// How many entries nobody has acknowledged yet; `None` if the broker cannot tell.
    pub lag: Option<u64>,
    /// Everything up to here is acknowledged: where to go on from if the broker forgets who read what.
    pub checkpoint: Option<String>,
}

/// A broker, read by a worker: [`WorkerBuilder::receive`](crate::WorkerBuilder::receive).
///
/// The worker reads a batch, commits it to the inbox, and then acknowledges it, one batch after the other; where
/// [more](Read::more) is there, it reads the next one meanwhile, and no further. After an error it waits, with jitter,
/// and opens the source again. Nothing is read while the database is down (but the one batch ahead), while the source
/// is paused, or while too much waits.
///
/// Cancel safety: any of these futures may be dropped; what was read by one that was dropped has to come back.
pub trait Source: Send + 'static {
    /// Which kind it is, in a word: `redis`.
    fn kind(&self) -> &'static str;
    /// Its durable name; dedup goes by it. At most 255 bytes, without spaces or control characters.
    fn name(&self) -> String;
    /// How entries become messages.
    fn format(&self) -> &Format;
    /// An entry that was handed out more often than this goes into quarantine. Default 20.
    fn max_deliveries(&self) -> u32 {
        20
    }
    /// For how long the broker may hand out an entry again, if that is known; ids are remembered for longer.
    fn replay_horizon(&self) -> Option<Duration> {
        None
    }
    /// Connects, and makes what it needs at the broker. `checkpoint` is the last one that was told. Warnings for
    /// the log.
    fn open(&mut self, checkpoint: Option<&str>) -> impl Future<Output = Result<Vec<String>, BrokerError>> + Send;
    /// Reads a batch: first what was handed to it before it was opened last, and not acknowledged. What it has handed
    /// over since then is the worker's, acknowledged or not, and does not come again until it is opened anew. It waits
    /// only if nothing is there, for a second or so.
    fn read(&mut self) -> impl Future<Output = Result<Read, BrokerError>> + Send;
    /// Acknowledges what is committed; positions of an earlier connection may be among them.
    fn acknowledge(&mut self, positions: &[String]) -> impl Future<Output = Result<(), BrokerError>> + Send;
    /// How it stands; asked every few seconds.
    fn standing(&mut self) -> impl Future<Output = Result<Standing, BrokerError>> + Send;
    /// Lets go of the broker. Nothing is read after that.
    fn close(&mut self) -> impl Future<Output = ()> + Send;
}
