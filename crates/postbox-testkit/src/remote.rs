//! A remote that keeps its own log of what it was asked, and does what a test says.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

/// What the remote has seen and done.
#[derive(Debug, Default)]
struct Log {
    calls: HashMap<String, u32>,
    applied: HashSet<String>,
    silent: bool,
    /// Calls that it is busy with now, and the most it was busy with at once.
    busy: usize,
    most: usize,
}

/// A remote on loopback: `charge KEY` is applied and answered, `find KEY` says whether it was, `note
/// KEY` is counted, and `work KEY` keeps it busy for a while, or until the caller hangs up.
#[derive(Debug, Clone)]
pub struct Remote {
    address: String,
    log: Arc<Mutex<Log>>,
}

impl Remote {
    /// Starts one on the current runtime.
    ///
    /// # Panics
    /// There is no free port.
    pub async fn start() -> Remote {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("its address").to_string();
        let log: Arc<Mutex<Log>> = Arc::default();
        let remote = Remote { address, log: log.clone() };
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let log = log.clone();
                tokio::spawn(async move {
                    let (read, mut write) = stream.into_split();
                    let (mut read, mut line) = (BufReader::new(read), String::new());
                    if read.read_line(&mut line).await.is_err() {
                        return;
                    }
                    if line.starts_with("work ") {
                        begin(&log);
                        let mut more = String::new();
                        tokio::time::timeout(WORK, read.read_line(&mut more)).await.ok();
                        log.lock().expect("the log").busy -= 1;
                    }
                    let answer = answer(&log, line.trim());
                    if log.lock().expect("the log").silent {
                        // Holds the connection open, and says nothing.
                        std::future::pending::<()>().await;
                    }
                    write.write_all(answer.as_bytes()).await.ok();
                });
            }
        });
        remote
    }

    /// Starts one that takes every call and never answers.
    ///
    /// # Panics
    /// There is no free port.
    pub async fn silent() -> Remote {
        let remote = Remote::start().await;
        remote.log.lock().expect("the log").silent = true;
        remote
    }

    /// Where it listens: host:port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// With how many calls it was busy at once at the most.
    pub fn most_at_once(&self) -> usize {
        self.log.lock().expect("the log").most
    }

    /// How often each key was charged, noted or worked on.
    pub fn calls(&self) -> HashMap<String, u32> {
        self.log.lock().expect("the log").calls.clone()
    }
}

/// How long `work` takes.
const WORK: std::time::Duration = std::time::Duration::from_millis(10);

fn begin(log: &Mutex<Log>) {
    let mut log = log.lock().expect("the log");
    log.busy += 1;
    log.most = log.most.max(log.busy);
}

fn answer(log: &Mutex<Log>, line: &str) -> &'static str {
    let mut log = log.lock().expect("the log");
    match line.split_once(' ') {
        Some(("charge" | "note" | "work", key)) => {
            *log.calls.entry(key.to_owned()).or_default() += 1;
            log.applied.insert(key.to_owned());
            "done\n"
        }
        Some(("find", key)) if log.applied.contains(key) => "found\n",
        Some(("find", _)) => "nothing\n",
        _ => "what?\n",
    }
}
