//! Receiving: a task for each source reads a batch, commits it, and then acknowledges it.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::watch;

use super::Stop;
use super::attempt::panic_words;
use crate::crash;
use crate::error::{BrokerError, Error};
use crate::inbox::Inbox;
use crate::planted::planted;
use crate::postbox::Postbox;
use crate::source::{Format, Read, Source};
use crate::store::Database;
use crate::store::inbox::Arrival;

/// The first and the longest wait after something went wrong, before jitter.
const WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// How often a source is asked how it stands.
const ASK: Duration = Duration::from_secs(3);
/// How often it is looked whether a source that is closed is open again.
const CLOSED: Duration = Duration::from_millis(200);
/// How long a graceful stop waits for a read that has begun.
const LAST_READ: Duration = Duration::from_secs(5);

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Begin<Db> = Box<dyn FnOnce(Inbox<Db>, watch::Receiver<Stop>) -> BoxFuture<Result<Reading, Error>> + Send>;
/// What goes on once it has begun.
pub(super) type Reading = BoxFuture<()>;

/// A source that a worker is to receive from.
pub(super) struct Receiver<Db: Database> {
    name: String,
    kind: &'static str,
    format: Format,
    horizon: Option<Duration>,
    begin: Begin<Db>,
}

impl<Db: Database> fmt::Debug for Receiver<Db> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").field("name", &self.name).field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl<Db: Database> Receiver<Db> {
    pub(super) fn new(source: impl Source) -> Receiver<Db> {
        Receiver {
            name: source.name(),
            kind: source.kind(),
            format: source.format().clone(),
            horizon: source.replay_horizon(),
            begin: Box::new(|inbox, stopping| Box::pin(begin(source, inbox, stopping))),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Opens it once, so that what cannot work is told at the start.
    pub(super) async fn start(
        self,
        postbox: &Postbox<Db>,
        application: &str,
        stopping: watch::Receiver<Stop>,
    ) -> Result<Reading, Error> {
        check_horizon(postbox, &self.name, self.horizon)?;
        let inbox = postbox.inbox_of(application, &self.name, self.kind, self.format).await?;
        (self.begin)(inbox, stopping).await
    }
}

/// Ids must be remembered for longer than the broker may hand something out again.
fn check_horizon<Db: Database>(postbox: &Postbox<Db>, name: &str, horizon: Option<Duration>) -> Result<(), Error> {
    let keep = postbox.settings().keep_ids()?;
    match horizon {
        Some(horizon) if horizon > keep => Err(Error::Settings(format!(
            "the source `{name}` may bring a message again for {} hours, and ids are remembered for {} hours only: set `keep_ids` to more than that",
            horizon.as_secs().div_ceil(3600),
            keep.as_secs() / 3600
        ))),
        _ => Ok(()),
    }
}

async fn begin<Db: Database, S: Source>(
    mut source: S,
    inbox: Inbox<Db>,
    stopping: watch::Receiver<Stop>,
) -> Result<Reading, Error> {
    let opened = match source.open(inbox.checkpoint().as_deref()).await {
        Ok(warnings) => {
            warn(&inbox, &warnings);
            true
        }
        Err(BrokerError::Refused(words)) => {
            return Err(Error::Settings(format!("the source `{}` cannot be received from: {words}", inbox.source())));
        }
        Err(BrokerError::Unavailable(words)) => {
            tracing::warn!(source = inbox.source(), words, "the broker cannot be reached; trying again");
            inbox.trouble(Some(words));
            false
        }
    };
    Ok(Box::pin(async move {
        let mut reader =
            Reader { source, inbox, stopping, unacknowledged: Vec::new(), wait: WAIT, failing: !opened, asked: None };
        let read = AssertUnwindSafe(reader.read_on(opened)).catch_unwind().await;
        if let Err(panic) = read {
            let words = format!("the source panicked: {}", panic_words(&*panic));
            tracing::error!(
                source = reader.inbox.source(),
                words,
                "nothing is received from it until the worker starts anew"
            );
            reader.inbox.trouble(Some(words));
            // Somebody should see that.
            stopped(&mut reader.stopping).await;
        }
    }))
}

fn warn<Db: Database>(inbox: &Inbox<Db>, warnings: &[String]) {
    for words in warnings {
        tracing::warn!(source = inbox.source(), words, "the broker is not set up as well as it could be");
    }
}

struct Reader<S, Db: Database> {
    source: S,
    inbox: Inbox<Db>,
    stopping: watch::Receiver<Stop>,
    /// Committed, and the broker does not know.
    unacknowledged: Vec<String>,
    wait: Duration,
    /// Nothing could be read, and it was said.
    failing: bool,
    asked: Option<Instant>,
}

impl<S: Source, Db: Database> Reader<S, Db> {
    fn is_stopping(&self) -> bool {
        *self.stopping.borrow() != Stop::No
    }

    /// Until the worker stops: with one connection after the other.
    async fn read_on(&mut self, mut opened: bool) {
        while !self.is_stopping() {
            if !opened {
                let checkpoint = self.inbox.checkpoint();
                let done = tokio::select! {
                    done = self.source.open(checkpoint.as_deref()) => done,
                    () = stopped(&mut self.stopping) => break,
                };
                match done {
                    Ok(warnings) => warn(&self.inbox, &warnings),
                    Err(error) => {
                        self.failed("the broker cannot be reached", &error).await;
                        continue;
                    }
                }
            }
            opened = false;
            if let Err(error) = self.read_while_connected().await {
                self.failed("the connection to the broker has failed", &error).await;
            }
        }
        self.source.close().await;
    }

    async fn failed(&mut self, what: &str, error: &BrokerError) {
        tracing::warn!(source = self.inbox.source(), %error, "{what}; trying again");
        self.failing = true;
        self.inbox.trouble(Some(error.to_string()));
        self.pause().await;
    }

    /// Waits, longer each time.
    async fn pause(&mut self) {
        pause(&mut self.wait, &mut self.stopping).await;
    }

    async fn acknowledge(&mut self) -> Result<(), BrokerError> {
        acknowledge(&mut self.source, &mut self.unacknowledged).await
    }

    /// Reads a batch, unless the source is closed; nothing if it is, or the worker stops.
    async fn next(&mut self) -> Result<Option<Read>, BrokerError> {
        if self.inbox.closed().is_none() {
            return read_next(&mut self.source, &mut self.stopping).await;
        }
        tokio::select! {
            () = tokio::time::sleep(CLOSED) => {}
            () = stopped(&mut self.stopping) => {}
        }
        Ok(None)
    }

    async fn read_while_connected(&mut self) -> Result<(), BrokerError> {
        self.acknowledge().await?;
        let mut ahead: Option<Batch> = None;
        loop {
            self.ask().await?;
            let batch = match ahead.take() {
                Some(batch) => batch,
                None if self.is_stopping() => return Ok(()),
                None => match self.next().await? {
                    Some(read) => Batch::understood(&self.inbox, &read, self.source.max_deliveries()),
                    None => continue,
                },
            };
            self.wait = WAIT;
            self.inbox.trouble(None);
            if std::mem::take(&mut self.failing) {
                tracing::info!(source = self.inbox.source(), "the broker is back");
            }
            if batch.positions.is_empty() {
                continue;
            }
            if planted!("acknowledge-first") {
                self.source.acknowledge(&batch.positions).await?;
            }
            crash::point("read");
            let Reader { source, inbox, stopping, unacknowledged, .. } = self;
            let most = source.max_deliveries();
            let reads_on = batch.more && *stopping.borrow() == Stop::No && inbox.closed().is_none();
            // While the database commits this, the broker hears of the batch before, and hands out the next one.
            let broker = async {
                acknowledge(source, unacknowledged).await?;
                if !reads_on {
                    return Ok::<_, BrokerError>(None);
                }
                let read = read_next(source, &mut stopping.clone()).await?;
                Ok(read.map(|read| Batch::understood(inbox, &read, most)))
            };
            let mut stop = stopping.clone();
            let (stored, came) = tokio::join!(persist(inbox, &mut stop, &batch.arrivals), broker);
            if !stored {
                // What nobody has committed stays with the broker.
                return Ok(());
            }
            crash::point("received");
            self.unacknowledged.extend(batch.positions);
            // Nothing after all, when the wait for it is over: nobody acknowledges this with a next batch.
            ahead = came?.filter(|batch| !batch.positions.is_empty());
            if ahead.is_none() {
                self.acknowledge().await?;
            }
        }
    }

    /// Asks how the source stands, now and then.
    async fn ask(&mut self) -> Result<(), BrokerError> {
        if self.asked.is_none_or(|at| at.elapsed() >= ASK) {
            let standing = self.source.standing().await?;
            self.inbox.stands(standing.lag, standing.checkpoint);
            self.asked = Some(Instant::now());
        }
        Ok(())
    }
}

/// What was read, and understood.
struct Batch {
    positions: Vec<String>,
    arrivals: Vec<Arrival>,
    /// More is there already.
    more: bool,
}

impl Batch {
    fn understood<Db: Database>(inbox: &Inbox<Db>, read: &Read, most: u32) -> Batch {
        let entries = read.entries.iter().map(|entry| entry.position.clone());
        let positions = entries.chain(read.lost.iter().cloned()).collect();
        Batch { positions, arrivals: inbox.understood(&read.entries, &read.lost, most), more: read.more }
    }
}

async fn stopped(stopping: &mut watch::Receiver<Stop>) {
    // Without a sender, nobody is left who would want anything.
    stopping.wait_for(|stop| *stop != Stop::No).await.ok();
}

/// Waits, longer each time; not beyond a stop.
async fn pause(wait: &mut Duration, stopping: &mut watch::Receiver<Stop>) {
    let now = wait.mul_f64(0.5 + fastrand::f64());
    *wait = (*wait * 2).min(LONGEST_WAIT);
    tokio::select! {
        () = tokio::time::sleep(now) => {}
        () = stopped(stopping) => {}
    }
}

/// Reads a batch; nothing if the worker stops, and a read that has begun brings nothing soon.
async fn read_next(
    source: &mut impl Source,
    stopping: &mut watch::Receiver<Stop>,
) -> Result<Option<Read>, BrokerError> {
    let mut read = std::pin::pin!(source.read());
    tokio::select! {
        read = &mut read => return read.map(Some),
        () = stopped(stopping) => {}
    }
    if *stopping.borrow() == Stop::Now {
        return Ok(None);
    }
    match tokio::time::timeout(LAST_READ, read).await {
        Ok(read) => read.map(Some),
        Err(_) => Ok(None),
    }
}

/// Tells the broker what is committed.
async fn acknowledge(source: &mut impl Source, committed: &mut Vec<String>) -> Result<(), BrokerError> {
    if !committed.is_empty() {
        source.acknowledge(committed).await?;
        committed.clear();
    }
    Ok(())
}

/// Commits, however long the database takes to come back; `false` if the worker stops meanwhile.
async fn persist<Db: Database>(inbox: &Inbox<Db>, stopping: &mut watch::Receiver<Stop>, arrivals: &[Arrival]) -> bool {
    let mut wait = WAIT;
    loop {
        let error = match inbox.take(arrivals).await {
            Ok(()) => return true,
            Err(error) => error,
        };
        tracing::warn!(source = inbox.source(), %error, "what was read could not be stored; trying again");
        inbox.trouble(Some(format!("the database: {error}")));
        if *stopping.borrow() != Stop::No {
            return false;
        }
        pause(&mut wait, stopping).await;
    }
}
