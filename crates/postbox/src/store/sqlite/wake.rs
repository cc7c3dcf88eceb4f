//! Wake-ups: what this process does itself, and what others commit to the file.

use std::time::Duration;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, SqliteConnection};
use tokio::sync::{Mutex, Notify};

use crate::error::Error;

/// How often the file is asked whether it changed: a look into shared memory, no read.
const LOOK: Duration = Duration::from_millis(20);
/// How long to wait after the file did not answer.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Bell {
    enabled: bool,
    rung: Notify,
    watch: Mutex<Watch>,
}

/// A connection of its own, and the version of the file that it saw last.
#[derive(Debug)]
struct Watch {
    options: SqliteConnectOptions,
    connection: Option<SqliteConnection>,
    seen: Option<i64>,
}

impl Bell {
    pub(super) fn new(options: SqliteConnectOptions, enabled: bool) -> Bell {
        Bell { enabled, rung: Notify::new(), watch: Mutex::new(Watch { options, connection: None, seen: None }) }
    }

    /// Wakes those who wait now, and the next one who comes.
    pub(super) fn ring(&self) {
        self.rung.notify_waiters();
        self.rung.notify_one();
    }

    pub(super) async fn woken(&self) {
        if !self.enabled {
            return std::future::pending().await;
        }
        tokio::select! {
            () = self.rung.notified() => {}
            () = self.watched() => self.rung.notify_waiters(),
        }
    }

    /// Returns when another connection has committed. One at a time looks, for all that wait.
    async fn watched(&self) {
        let mut watch = self.watch.lock().await;
        loop {
            match watch.changed().await {
                Ok(true) => return,
                Ok(false) => tokio::time::sleep(LOOK).await,
                Err(error) => {
                    tracing::debug!(%error, "cannot watch the file for changes; polling goes on");
                    watch.connection = None;
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    pub(super) fn close(&self) {
        // Whoever waits holds the watch; its connection then closes with the store.
        if let Ok(mut watch) = self.watch.try_lock() {
            watch.connection = None;
        }
    }
}

impl Watch {
    async fn changed(&mut self) -> Result<bool, Error> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            None => {
                // The number means something on one connection only.
                self.seen = None;
                self.connection.insert(self.options.connect().await?)
            }
        };
        let now: i64 = sqlx::query_scalar("pragma data_version").fetch_one(connection).await?;
        Ok(self.seen.replace(now).is_some_and(|seen| seen != now))
    }
}
