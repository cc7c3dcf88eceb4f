//! Where a scenario happens: a database and a remote of its own.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use postbox_testkit::Server;
use sqlx::Pool;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::child::ChildPlan;
use crate::fault::Kind;
use crate::ground::prepare;
use crate::site::{Site, Texts};

/// How long one waits for a connection, or for another writer.
const BUSY: Duration = Duration::from_secs(20);

/// A database.
pub(crate) struct Ground<Db: Site> {
    server: Option<Server>,
    pub(crate) url: String,
    pub(crate) pool: Pool<Db>,
}

impl<Db: Site> Ground<Db> {
    /// A server with nothing on it; a file comes with `fresh`.
    pub(crate) async fn new() -> Result<Self, String> {
        let (server, url) = match Db::KIND {
            Kind::Postgres => {
                let server =
                    tokio::task::spawn_blocking(Server::start).await.map_err(|e| format!("PostgreSQL: {e}"))?;
                let url = format!("{}?sslmode=disable", server.url());
                (Some(server), url)
            }
            Kind::Sqlite => (None, "sqlite::memory:".to_owned()),
        };
        let pool = Db::pool(&url, 4, BUSY).map_err(|e| e.to_string())?;
        Ok(Ground { server, url, pool })
    }

    /// An empty database; on SQLite, in a file of this name.
    pub(crate) async fn fresh(&mut self, folder: &Path, name: &str) -> Result<(), String> {
        if Db::KIND == Kind::Sqlite {
            self.url = format!("sqlite:{}", folder.join(format!("{name}.db")).display());
            self.connect().await?;
        }
        prepare::<Db>(&self.pool, &self.url).await.map_err(|e| format!("a fresh database: {e}"))
    }

    /// The server stops as in a crash, and comes back with these variables. On SQLite there is none.
    pub(crate) async fn restart(&mut self, clock: Vec<(&'static str, String)>) -> Result<(), String> {
        let Some(mut server) = self.server.take() else { return Ok(()) };
        self.pool.close().await;
        let restart = move || {
            server.crash();
            server.up_in(&clock);
            server
        };
        self.server = Some(tokio::task::spawn_blocking(restart).await.map_err(|e| format!("PostgreSQL: {e}"))?);
        self.connect().await
    }

    async fn connect(&mut self) -> Result<(), String> {
        self.pool.close().await;
        self.pool = Db::pool(&self.url, 4, BUSY).map_err(|e| e.to_string())?;
        Ok(())
    }

    /// Runs statements.
    pub(crate) async fn run(&self, sql: String) -> Result<(), String> {
        let mut connection = Db::acquire(&self.pool).await.map_err(|e| e.to_string())?;
        Db::run(&mut connection, sql).await.map_err(|e| e.to_string())?;
        Ok(())
    }

    /// Rows of texts.
    pub(crate) async fn rows(&self, sql: String) -> Result<Vec<Texts>, String> {
        let mut connection = Db::acquire(&self.pool).await.map_err(|e| e.to_string())?;
        Db::rows(&mut connection, sql).await.map_err(|e| e.to_string())
    }
}

/// The remote, in a process of its own.
pub(crate) struct Remote {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
    pub(crate) address: String,
    log: PathBuf,
}

impl Remote {
    /// One that answers all calls.
    pub(crate) async fn start(kind: Kind, url: &str, folder: &Path) -> Result<Remote, String> {
        let log = folder.join("remote.witness");
        let plan = ChildPlan {
            kind,
            url: url.to_owned(),
            direct: url.to_owned(),
            prepared: true,
            wake_ups: true,
            pool_size: 1,
            seed: 0,
            name: "remote".into(),
            life: 0,
            log: log.clone(),
            remote: String::new(),
            faults: Vec::new(),
            tag: None,
            hog_ms: None,
            patience_ms: None,
        };
        Remote::spawn(&plan, folder, log).await.map_err(|e| format!("the remote: {e}"))
    }

    async fn spawn(plan: &ChildPlan, folder: &Path, log: PathBuf) -> std::io::Result<Remote> {
        let stderr = std::fs::File::create(folder.join("remote.log"))?;
        let mut process = Command::new(std::env::current_exe()?)
            .arg("remote")
            .arg(serde_json::to_string(plan)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()?;
        let output = process.stdout.take().ok_or_else(|| std::io::Error::other("no output"))?;
        let mut lines = BufReader::new(output).lines();
        let line = lines.next_line().await?.unwrap_or_default();
        match line.strip_prefix("listening ") {
            Some(address) => Ok(Remote { process, lines, address: address.to_owned(), log }),
            None => Err(std::io::Error::other("it did not start; see remote.log")),
        }
    }

    /// What it has seen until now.
    pub(crate) async fn seen(&mut self) -> Result<String, String> {
        self.written().await.map_err(|e| format!("the remote's log: {e}"))
    }

    async fn written(&mut self) -> std::io::Result<String> {
        let input = self.process.stdin.as_mut().ok_or_else(|| std::io::Error::other("no input"))?;
        input.write_all(b"sync\n").await?;
        while let Some(line) = self.lines.next_line().await? {
            if line == "synced" {
                return std::fs::read_to_string(&self.log);
            }
        }
        Err(std::io::Error::other("it is gone; see remote.log"))
    }
}
