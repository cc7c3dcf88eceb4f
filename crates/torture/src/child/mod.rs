//! What runs in processes of its own: workers, publishers, those who pull, the fake remote, migrations.

pub(crate) mod drops;
pub(crate) mod handlers;
pub(crate) mod hasty;
pub(crate) mod publisher;
pub(crate) mod puller;
pub(crate) mod races;
pub(crate) mod remote;
pub(crate) mod stderr;
pub(crate) mod worker;

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use postbox::Settings;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::fault::{Fault, Kind};
use crate::site::SCHEMA;

/// Everything a child has to know, passed as one argument.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ChildPlan {
    pub(crate) kind: Kind,
    /// Where postbox connects: directly, through the proxy or through pgbouncer.
    pub(crate) url: String,
    /// Always the database itself.
    pub(crate) direct: String,
    pub(crate) prepared: bool,
    pub(crate) wake_ups: bool,
    pub(crate) pool_size: u32,
    pub(crate) seed: u64,
    /// `p0`: its number; and which life of it this is.
    pub(crate) name: String,
    pub(crate) life: u32,
    /// Where the witness's log is.
    pub(crate) log: PathBuf,
    /// host:port of the fake remote.
    pub(crate) remote: String,
    pub(crate) faults: Vec<Fault>,
    /// What this child is a hit of, mostly by its work: it is behind pgbouncer, or has a wrong clock.
    pub(crate) tag: Option<Fault>,
    /// It takes the handlers that hold connections for long, and how long they do, in milliseconds.
    pub(crate) hog_ms: Option<u64>,
    /// How long a SIGTERM waits for what runs; without one, until a second SIGTERM.
    pub(crate) patience_ms: Option<u64>,
}

/// Leases, and with them everything else, are short, so that much happens.
pub(crate) const LEASE: Duration = Duration::from_millis(1500);
/// How long an operation may run.
pub(crate) const TIMEOUT: Duration = Duration::from_millis(1500);
/// How long a call may be on its way: the remote applies nothing later.
pub(crate) const QUIET: Duration = Duration::from_secs(2);

impl ChildPlan {
    pub(crate) fn wants(&self, fault: Fault) -> bool {
        self.faults.contains(&fault)
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings::defaults()
            .url(&self.url)
            .set("schema", SCHEMA)
            .set("application", "torture")
            .set("prepared_statements", self.prepared)
            .set("wake_ups", self.wake_ups)
            .set("pool_size", self.pool_size)
            .set("lease", format!("{}ms", LEASE.as_millis()))
            .set("poll_interval", "100ms")
            .set("busy_timeout", "10s")
    }
}

/// A line to the parent: what took effect, how often.
pub(crate) fn hit(id: impl std::fmt::Display, times: u64) {
    say(format_args!("hit {id} {times}"));
}

/// A line to the parent.
pub(crate) fn say(line: impl std::fmt::Display) {
    // A parent that is gone hears nothing, and its children end with it.
    writeln!(std::io::stdout().lock(), "{line}").ok();
}

/// Hands on the parent's lines; ends the process when the parent is gone.
pub(crate) fn listen(mut heard: impl FnMut(&str) + Send + 'static) {
    tokio::spawn(async move {
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            heard(line.trim());
        }
        std::process::exit(0);
    });
}

/// Migrates, and ends.
pub(crate) async fn migrate<Db: crate::site::Site>(plan: ChildPlan) -> Result<(), Box<dyn std::error::Error>> {
    // A schema of its own where there are schemas; a file of its own elsewhere.
    let settings = plan.settings().set("schema", &plan.name);
    let postbox = postbox::Postbox::<Db>::open_unchecked(settings).await?;
    postbox.migrate_up().await?;
    postbox.close().await;
    Ok(())
}
