//! Worker processes that tests start and kill.

use std::process::Stdio;

use postbox::Database;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::Fresh;

/// A worker in a process of its own; killed with SIGKILL when it is dropped.
pub struct WorkerProcess {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl WorkerProcess {
    /// Starts `program` on this store, with more variables.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start<Db: Database>(program: &str, fresh: &Fresh<Db>, variables: &[(&str, &str)]) -> WorkerProcess {
        let mut child = Command::new(program)
            .env("POSTBOX_DATABASE_URL", fresh.url())
            .env("POSTBOX_SCHEMA", fresh.schema())
            .env("POSTBOX_APPLICATION", "test")
            .env("TEST_TABLE", fresh.table("projected"))
            .env_remove("POSTBOX_CRASH_POINT")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the worker process");
        let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        WorkerProcess { child, lines }
    }

    /// Waits until it stands at a crash point, and kills it there with SIGKILL.
    ///
    /// # Panics
    /// It ended, or did not get there within a minute.
    pub async fn kill_at(mut self, point: &str) {
        let wanted = format!("crash point {point}");
        while !self.says(&wanted).await.is_empty() {}
        self.kill().await;
    }

    /// Waits until it writes a line that begins so; the rest of that line.
    ///
    /// # Panics
    /// It ended, or wrote none within a minute.
    pub async fn says(&mut self, beginning: &str) -> String {
        let said = async {
            loop {
                let line = self.lines.next_line().await.expect("its output");
                let line = line.unwrap_or_else(|| panic!("the process ended before it said `{beginning}`"));
                if let Some(rest) = line.strip_prefix(beginning) {
                    return rest.to_owned();
                }
            }
        };
        let said = tokio::time::timeout(std::time::Duration::from_secs(60), said).await;
        said.unwrap_or_else(|_| panic!("it never said `{beginning}`"))
    }

    /// Kills it with SIGKILL.
    ///
    /// # Panics
    /// It cannot be killed.
    pub async fn kill(mut self) {
        self.child.kill().await.expect("SIGKILL");
    }

    /// Its process id, while it lives.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits for its end; its exit code.
    ///
    /// # Panics
    /// It cannot be waited for.
    pub async fn ended(&mut self) -> Option<i32> {
        self.child.wait().await.expect("its end").code()
    }
}
