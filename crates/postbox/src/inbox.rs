//! The inbox: what a source has read becomes messages, each once, or goes into quarantine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::body;
use crate::error::{Error, PublishError, is_transient};
use crate::message::Draft;
use crate::pattern::MAX_NAME_BYTES;
use crate::postbox::Postbox;
use crate::raw::Raw;
use crate::source::{Entry, Format, Incoming};
use crate::store::inbox::{Arrival, Arrived, Aside, Intake, ReadAgain, SourceReport, Taken};
use crate::store::{Database, Store};

/// The longest identity, in bytes.
const MAX_IDENTITY_BYTES: usize = 1024;
/// How often it is looked whether the source is paused, too much waits, or something is to be read again; and told
/// how the source stands.
const LOOK: Duration = Duration::from_secs(1);
/// Entries of quarantine that are read again in one look.
const AGAIN: u32 = 100;
/// Processes count in so many rows of a source.
const SLOTS: i16 = 16;

/// What became of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is a message now, and committed.
    Received(Uuid),
    /// It was one already: this one, with the same topic, key and payload.
    Duplicate(Uuid),
    /// This message has its id, with another topic, key or payload. The first is kept, and so is this one, in
    /// quarantine.
    Conflict {
        /// The message.
        existing: Uuid,
        /// The number in quarantine.
        quarantine: i64,
    },
    /// It cannot become a message.
    Quarantined {
        /// The number in quarantine.
        quarantine: i64,
        /// Why.
        reason: String,
    },
}

/// The way in for what one source reads; [`Postbox::inbox`]. Workers have one for each source that they
/// [receive](crate::WorkerBuilder::receive) from.
///
/// While it lives, it looks every second whether the source is paused, and reads again what operators want of
/// its quarantine.
#[derive(Debug)]
pub struct Inbox<Db: Database> {
    shared: Arc<Shared<Db>>,
    tending: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
struct Shared<Db: Database> {
    postbox: Postbox<Db>,
    name: String,
    format: Format,
    intake: Intake,
    max_backlog: u32,
    paused: AtomicBool,
    crowded: AtomicBool,
    checkpoint: Option<String>,
    report: Mutex<SourceReport>,
}

impl<Db: Database> Drop for Inbox<Db> {
    fn drop(&mut self) {
        self.tending.abort();
    }
}

impl<Db: Database> Postbox<Db> {
    /// Opens the way in for a source of this application, by its name; it is made if it is not there. `kind` is a word
    /// like `webhook`.
    ///
    /// # Errors
    /// The name is none, a setting cannot be used, or the database did not answer.
    pub async fn inbox(&self, source: &str, kind: &str, format: Format) -> Result<Inbox<Db>, Error> {
        self.inbox_of(&self.settings().application()?, source, kind, format).await
    }

    pub(crate) async fn inbox_of(
        &self,
        application: &str,
        source: &str,
        kind: &str,
        format: Format,
    ) -> Result<Inbox<Db>, Error> {
        if source.is_empty()
            || source.len() > MAX_NAME_BYTES
            || source.chars().any(|c| c.is_control() || c.is_whitespace())
        {
            return Err(Error::Settings(format!(
                "the source name `{}` must be 1 to {MAX_NAME_BYTES} bytes without spaces or control characters",
                source.escape_debug()
            )));
        }
        let (remember, max_backlog) = (self.settings().keep_ids()?, self.settings().max_backlog()?);
        let opened = self.store().open_source(application, source, kind).await?;
        let slot = i16::try_from(std::process::id() % SLOTS.unsigned_abs() as u32).unwrap_or_default();
        let shared = Arc::new(Shared {
            postbox: self.clone(),
            name: source.to_owned(),
            format,
            intake: Intake { source: opened.id, remember, slot },
            max_backlog,
            paused: AtomicBool::new(opened.paused),
            crowded: AtomicBool::new(false),
            checkpoint: opened.checkpoint,
            report: Mutex::default(),
        });
        shared.look().await?;
        let tending = tokio::spawn(tend(shared.clone()));
        Ok(Inbox { shared, tending })
    }
}

impl<Db: Database> Inbox<Db> {
    /// The source's name.
    pub fn source(&self) -> &str {
        &self.shared.name
    }

    /// Why nothing should be read from the source now: it is paused, or too much waits already. What is handed over all
    /// the same is taken.
    pub fn closed(&self) -> Option<String> {
        if self.shared.paused.load(Ordering::Relaxed) {
            return Some(format!("the source `{}` is paused", self.shared.name));
        }
        self.shared
            .crowded
            .load(Ordering::Relaxed)
            .then(|| format!("{} deliveries or more wait to be handled (`max_backlog`)", self.shared.max_backlog))
    }

    /// Stores entries in one transaction of its own, and commits it: a fate for each, in order. An id that came
    /// before is recognised for as long as ids are remembered (`keep_ids`).
    ///
    /// Cancel safety: dropped, everything is stored or nothing; given again, it is recognised.
    ///
    /// # Errors
    /// The database did not answer; nothing is stored, or it is not known whether it is. Give them again.
    pub async fn receive(&self, entries: &[Entry]) -> Result<Vec<Fate>, Error> {
        let arrivals: Vec<Arrival> = entries.iter().map(|entry| self.shared.arrival(entry)).collect();
        self.shared.take(&arrivals).await
    }

    /// Stores what was understood before, like [`receive`](Self::receive).
    pub(crate) async fn take(&self, arrivals: &[Arrival]) -> Result<(), Error> {
        self.shared.take(arrivals).await.map(drop)
    }

    /// What entries come to, and what the broker has lost; entries that were handed out more often than `most` are put
    /// aside.
    pub(crate) fn understood(&self, entries: &[Entry], lost: &[String], most: u32) -> Vec<Arrival> {
        let arrival = |entry: &Entry| match entry.deliveries > most {
            true => Arrival {
                position: entry.position.clone(),
                raw: entry.raw.clone(),
                what: Arrived::Aside {
                    kind: Aside::Undeliverable,
                    reason: format!(
                        "it was handed out {} times without an end; the limit is {most}: something stops whoever reads it",
                        entry.deliveries
                    ),
                },
            },
            false => self.shared.arrival(entry),
        };
        let gone = |position: &String| {
            Arrival {
            position: position.clone(),
            raw: Raw::default(),
            what: Arrived::Aside {
                kind: Aside::Lost,
                reason: "the broker had handed it out, and does not have it any more: it was deleted or trimmed before anybody acknowledged it".into(),
            },
        }
        };
        entries.iter().map(arrival).chain(lost.iter().map(gone)).collect()
    }

    /// Everything up to here was acknowledged when somebody told last.
    pub(crate) fn checkpoint(&self) -> Option<String> {
        let told = self.shared.report.lock().ok().and_then(|report| report.checkpoint.clone());
        told.or_else(|| self.shared.checkpoint.clone())
    }

    /// How the source stands, for the next look.
    pub(crate) fn stands(&self, lag: Option<u64>, checkpoint: Option<String>) {
        if let Ok(mut report) = self.shared.report.lock() {
            report.lag = lag.map(|lag| i64::try_from(lag).unwrap_or(i64::MAX));
            if checkpoint.is_some() {
                report.checkpoint = checkpoint;
            }
        }
    }

    /// What keeps it from receiving; `None`: nothing does any more.
    pub(crate) fn trouble(&self, words: Option<String>) {
        if let Ok(mut report) = self.shared.report.lock() {
            report.trouble = words;
        }
    }
}

impl<Db: Database> Shared<Db> {
    fn arrival(&self, entry: &Entry) -> Arrival {
        let what = match self.read(&entry.raw, &entry.position) {
            Ok(incoming) => arrived(incoming),
            Err(reason) => Arrived::Aside { kind: Aside::Malformed, reason },
        };
        Arrival { position: entry.position.clone(), raw: entry.raw.clone(), what }
    }

    fn read(&self, raw: &Raw, position: &str) -> Result<Incoming, String> {
        let mut incoming = self.format.read(raw, &self.name, position)?;
        if incoming.identity.is_empty() {
            return Err("the id is empty".into());
        }
        if incoming.identity.len() > MAX_IDENTITY_BYTES {
            return Err(format!("the id is {} bytes long; the limit is {MAX_IDENTITY_BYTES}", incoming.identity.len()));
        }
        if incoming.identity.contains('\0') {
            return Err("the id has a NUL character, which PostgreSQL cannot store".into());
        }
        // Its id alone says whether it came before.
        incoming.draft.dedup = None;
        incoming.draft = incoming.draft.checked(self.postbox.max_payload_bytes()).map_err(|error| error.to_string())?;
        Ok(incoming)
    }

    async fn take(&self, arrivals: &[Arrival]) -> Result<Vec<Fate>, Error> {
        if arrivals.is_empty() {
            return Ok(Vec::new());
        }
        match self.postbox.store().receive(self.intake, arrivals).await {
            Ok(taken) => Ok(fates(arrivals, taken)),
            // One of them is to blame, and the others are not.
            Err(error) if is_about_content(&error) => {
                let mut all = Vec::with_capacity(arrivals.len());
                for arrival in arrivals {
                    all.extend(self.take_alone(arrival.clone()).await?);
                }
                Ok(all)
            }
            Err(error) => Err(error),
        }
    }

    async fn take_alone(&self, mut arrival: Arrival) -> Result<Vec<Fate>, Error> {
        let store = self.postbox.store();
        let taken = match store.receive(self.intake, std::slice::from_ref(&arrival)).await {
            Err(error) if is_about_content(&error) && matches!(arrival.what, Arrived::Message { .. }) => {
                let reason = format!("the database refuses it: {error}");
                arrival.what = Arrived::Aside { kind: Aside::Malformed, reason };
                store.receive(self.intake, std::slice::from_ref(&arrival)).await?
            }
            taken => taken?,
        };
        Ok(fates(std::slice::from_ref(&arrival), taken))
    }

    /// One look.
    async fn look(&self) -> Result<(), Error> {
        let store = self.postbox.store();
        let report = self.report.lock().map(|report| report.clone()).unwrap_or_default();
        let paused = store.report_source(self.intake.source, &report).await?;
        self.paused.store(paused, Ordering::Relaxed);
        self.crowded.store(store.crowded(self.max_backlog).await?, Ordering::Relaxed);
        for requested in store.requested(self.intake.source, AGAIN).await? {
            let came_to = self.read(&requested.raw, &requested.position).map(|incoming| Arrival {
                position: requested.position.clone(),
                raw: requested.raw,
                what: arrived(incoming),
            });
            let again = ReadAgain {
                quarantine: requested.quarantine,
                came_to: came_to.map_err(|reason| format!("still: {reason}")),
            };
            match store.read_again(self.intake, &again).await {
                Err(error) if is_about_content(&error) && again.came_to.is_ok() => {
                    let came_to = Err(format!("still: the database refuses it: {error}"));
                    store.read_again(self.intake, &ReadAgain { came_to, ..again }).await?;
                }
                done => {
                    done?;
                }
            }
        }
        Ok(())
    }
}

async fn tend<Db: Database>(shared: Arc<Shared<Db>>) {
    loop {
        tokio::time::sleep(LOOK.mul_f64(0.9 + 0.2 * fastrand::f64())).await;
        if let Err(error) = shared.look().await {
            tracing::warn!(source = shared.name, %error, "the database did not answer how the source stands; trying again");
        }
    }
}

fn arrived(incoming: Incoming) -> Arrived {
    let body_hash = body_hash(&incoming.draft);
    Arrived::Message { draft: Box::new(incoming.draft), identity: incoming.identity, body_hash }
}

/// Half a hash is enough to tell two bodies of one id apart.
fn body_hash(draft: &Draft) -> Vec<u8> {
    let mut hasher = Sha256::new();
    hasher.update(&draft.topic);
    hasher.update([0]);
    hasher.update(body::hash(draft.key.as_deref(), &draft.payload));
    hasher.finalize()[..16].to_vec()
}

fn fates(arrivals: &[Arrival], taken: Vec<Taken>) -> Vec<Fate> {
    let fate = |(arrival, taken): (&Arrival, Taken)| match taken {
        Taken::New(id) => Fate::Received(id),
        Taken::Duplicate(id) => Fate::Duplicate(id),
        Taken::Conflict { existing, quarantine } => Fate::Conflict { existing, quarantine },
        Taken::Quarantined(quarantine) => {
            let reason = match &arrival.what {
                Arrived::Aside { reason, .. } => reason.clone(),
                Arrived::Message { .. } => String::new(),
            };
            Fate::Quarantined { quarantine, reason }
        }
    };
    arrivals.iter().zip(taken).map(fate).collect()
}

/// Whether what was to be stored is to blame: data that the database refuses, or that is too much for it.
fn is_about_content(error: &Error) -> bool {
    let refused = |error: &sqlx::Error| match error {
        _ if is_transient(error) => false,
        sqlx::Error::Encode(_) => true,
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| matches!(code.get(..2), Some("22" | "23" | "54")) || code == "18")
        }
        _ => false,
    };
    match error {
        Error::Database(error) | Error::Publish(PublishError::Database(error)) => refused(error),
        Error::Publish(error) => !matches!(error, PublishError::Busy(_) | PublishError::Driver { .. }),
        _ => false,
    }
}
