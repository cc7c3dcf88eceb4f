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
}

/// A remote on loopback: `charge KEY` is applied and answered, `find KEY` says whether it was, `note
/// KEY` is counted.
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
                    let mut line = String::new();
                    if BufReader::new(read).read_line(&mut line).await.is_err() {
                        return;
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

    /// How often each key was charged or noted.
    pub fn calls(&self) -> HashMap<String, u32> {
        self.log.lock().expect("the log").calls.clone()
    }
}

fn answer(log: &Mutex<Log>, line: &str) -> &'static str {
    let mut log = log.lock().expect("the log");
    match line.split_once(' ') {
        Some(("charge" | "note", key)) => {
            *log.calls.entry(key.to_owned()).or_default() += 1;
            log.applied.insert(key.to_owned());
            "done\n"
        }
        Some(("find", key)) if log.applied.contains(key) => "found\n",
        Some(("find", _)) => "nothing\n",
        _ => "what?\n",
    }
}
