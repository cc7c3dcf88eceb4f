//! The announcement server: what lies outside of the database and cannot be rolled back.
//!
//! It keeps what it did in a journal, a file that it reads for every answer, so that it still knows
//! after a kill -9. It does not look at the idempotency key when it announces: a release announced
//! twice would be seen.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{Path as UrlPath, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

/// How the server treats an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Script {
    /// Announces it and says so.
    Accept,
    /// Fails the first time, before doing anything (503); accepts the next.
    FailFirst,
    /// Announces it, and lets the client wait in vain for the answer.
    AcceptSilently,
    /// Refuses for good (422).
    Refuse,
}

impl Script {
    /// The script of the n-th release of the file, from 0.
    pub(crate) fn of_turn(turn: usize) -> Script {
        [Script::Accept, Script::FailFirst, Script::AcceptSilently, Script::Refuse][turn % 4]
    }
}

/// A wish to announce.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Announcement {
    pub(crate) event: String,
    pub(crate) key: String,
    pub(crate) text: String,
    /// Milliseconds since 1970. What reaches the server later is not begun: so a "no such
    /// announcement" after this time is final.
    pub(crate) not_after: u64,
}

/// What the server did with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Did {
    Announced,
    AnnouncedSilently,
    Failed,
    Refused,
    TooLate,
}

impl Did {
    pub(crate) fn announced(self) -> bool {
        matches!(self, Did::Announced | Did::AnnouncedSilently)
    }
}

/// One line of the journal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) did: Did,
    pub(crate) event: String,
    pub(crate) key: String,
    pub(crate) text: String,
}

/// What the server keeps.
#[derive(Debug)]
pub(crate) struct Journal(File);

impl Journal {
    pub(crate) fn open(file: &Path) -> io::Result<Journal> {
        let mut journal = Journal(OpenOptions::new().create(true).read(true).append(true).open(file)?);
        // A line that a kill cut off was never acted on; the next one must not continue it.
        if journal.text()?.bytes().last().is_some_and(|last| last != b'\n') {
            journal.0.write_all(b"\n")?;
        }
        Ok(journal)
    }

    fn text(&mut self) -> io::Result<String> {
        let mut text = String::new();
        self.0.seek(SeekFrom::Start(0))?;
        self.0.read_to_string(&mut text)?;
        Ok(text)
    }

    pub(crate) fn entries(&mut self) -> io::Result<Vec<Entry>> {
        Ok(self.text()?.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    fn add(&mut self, entry: &Entry) -> io::Result<()> {
        // One write a line: a kill of this process leaves all of it or nothing.
        self.0.write_all(format!("{}\n", serde_json::to_string(entry)?).as_bytes())
    }
}

#[derive(Debug)]
struct Server {
    journal: Mutex<Journal>,
    script: BTreeMap<String, Script>,
}

/// Starts it in a task of its own, on a free port. Its address.
pub(crate) async fn start(journal: Journal, script: BTreeMap<String, Script>) -> io::Result<String> {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = format!("http://{}", listener.local_addr()?);
    let app = Router::new()
        .route("/announcements", post(announce))
        .route("/announcements/{key}", get(find))
        .with_state(Arc::new(Server { journal: Mutex::new(journal), script }));
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, app).await {
            eprintln!("the announcement server ended: {error}");
        }
    });
    Ok(address)
}

/// Decides and puts on record under one lock, so that `find` never sees half of it.
impl Server {
    fn take(&self, wish: Announcement) -> io::Result<Did> {
        let mut journal = self.journal.lock().map_err(|_| io::Error::other("the journal is lost"))?;
        let before = journal.entries()?;
        let had = |wanted: &dyn Fn(Did) -> bool| before.iter().any(|e| e.event == wish.event && wanted(e.did));
        let did = match self.script.get(&wish.event) {
            _ if now() > wish.not_after => Did::TooLate,
            Some(Script::Refuse) => Did::Refused,
            Some(Script::FailFirst) if !had(&|did| did == Did::Failed) => Did::Failed,
            Some(Script::AcceptSilently) if !had(&Did::announced) => Did::AnnouncedSilently,
            _ => Did::Announced,
        };
        journal.add(&Entry { did, event: wish.event, key: wish.key, text: wish.text })?;
        Ok(did)
    }

    fn find(&self, key: &str) -> io::Result<Option<Entry>> {
        let mut journal = self.journal.lock().map_err(|_| io::Error::other("the journal is lost"))?;
        Ok(journal.entries()?.into_iter().find(|e| e.key == key && e.did.announced()))
    }
}

async fn announce(State(server): State<Arc<Server>>, Json(wish): Json<Announcement>) -> (StatusCode, &'static str) {
    match server.take(wish) {
        Ok(Did::Announced) => (StatusCode::CREATED, "announced"),
        Ok(Did::AnnouncedSilently) => {
            tokio::time::sleep(Duration::from_secs(60)).await;
            (StatusCode::CREATED, "announced")
        }
        Ok(Did::Failed) => (StatusCode::SERVICE_UNAVAILABLE, "out of paper; nothing was announced"),
        Ok(Did::Refused) => (StatusCode::UNPROCESSABLE_ENTITY, "this release may not be announced"),
        Ok(Did::TooLate) => (StatusCode::REQUEST_TIMEOUT, "came after its time; nothing was announced"),
        Err(error) => {
            eprintln!("the announcement server cannot keep its journal: {error}");
            (StatusCode::INTERNAL_SERVER_ERROR, "the journal cannot be written")
        }
    }
}

async fn find(
    State(server): State<Arc<Server>>,
    UrlPath(key): UrlPath<String>,
) -> Result<Json<Entry>, (StatusCode, &'static str)> {
    match server.find(&key) {
        Ok(Some(entry)) => Ok(Json(entry)),
        Ok(None) => Err((StatusCode::NOT_FOUND, "not announced, and it will not be any more")),
        Err(_) => Err((StatusCode::INTERNAL_SERVER_ERROR, "the journal cannot be read")),
    }
}

/// Milliseconds since 1970; client and server share the clock.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
