//! A private Redis server: started from the installed binary on a free port, in a temporary folder. What it has
//! confirmed is on disk, so that a kill loses nothing of it. It ends when the process that started it ends,
//! however it ends.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::postgres::free_port;

const LONGEST_START: Duration = Duration::from_secs(60);

/// Every write is on disk before it is confirmed.
const DURABLE: [(&str, &str); 3] = [("appendonly", "yes"), ("appendfsync", "always"), ("save", "")];

/// A Redis server of one's own.
pub struct RedisServer {
    port: u16,
    settings: Vec<(String, String)>,
    running: Option<Running>,
    folder: tempfile::TempDir,
}

struct Running {
    /// A shell that ends the server when its standard input closes: when this process is gone.
    keeper: Child,
    server: u32,
}

/// The server that all tests of this process share: the one at `REDIS_URL` if it is set, else a private one.
/// Tests take names of their own on it.
///
/// # Panics
/// None is named, and none can be started.
pub fn shared_redis_url() -> String {
    static SHARED: OnceLock<(String, Option<RedisServer>)> = OnceLock::new();
    let (url, _) = SHARED.get_or_init(|| match std::env::var("REDIS_URL") {
        Ok(url) if url.starts_with("redis") => (url, None),
        _ => {
            let server = RedisServer::start();
            (server.url(), Some(server))
        }
    });
    url.clone()
}

impl RedisServer {
    /// Starts one.
    ///
    /// # Panics
    /// `redis-server` is not installed, or it does not come up.
    pub fn start() -> RedisServer {
        RedisServer::with(&[])
    }

    /// The same with more settings, as in `redis.conf`.
    ///
    /// # Panics
    /// As [`start`](Self::start).
    pub fn with(settings: &[(&str, &str)]) -> RedisServer {
        let folder = tempfile::Builder::new().prefix("postbox-redis-").tempdir().expect("a temporary folder");
        let settings = DURABLE.iter().chain(settings).map(|(name, value)| ((*name).into(), (*value).into()));
        let mut server = RedisServer { port: free_port(), settings: settings.collect(), running: None, folder };
        server.up();
        server
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Where it listens, on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Starts it (again), on the port and with the data that it had.
    ///
    /// # Panics
    /// It does not come up within a minute.
    pub fn up(&mut self) {
        let script = "\"$0\" \"$@\" >>log 2>&1 & server=$!; echo $server; cat >/dev/null; kill $server; wait $server";
        let mut keeper = Command::new("/bin/sh")
            .args(["-c", script])
            .arg(binary())
            .args(["--bind", "127.0.0.1", "--port", &self.port.to_string()])
            .args(self.settings.iter().flat_map(|(name, value)| [format!("--{name}"), value.clone()]))
            .current_dir(self.folder.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("a shell");
        let mut line = String::new();
        let output = keeper.stdout.take().expect("its output");
        BufReader::new(output).read_line(&mut line).expect("the server's process id");
        let server = line.trim().parse().expect("a process id");
        self.running = Some(Running { keeper, server });
        let deadline = Instant::now() + LONGEST_START;
        while !self.answers() {
            if Instant::now() > deadline {
                let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
                panic!("Redis did not come up on port {}:\n{log}", self.port);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether it has all its data and takes commands.
    fn answers(&self) -> bool {
        let ask = || -> std::io::Result<bool> {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            stream.write_all(b"PING\r\n")?;
            let mut answer = [0; 5];
            stream.read_exact(&mut answer)?;
            // Who asks for a password has its data as well.
            Ok(matches!(&answer, b"+PONG" | b"-NOAU"))
        };
        ask().unwrap_or(false)
    }

    /// Kills it with SIGKILL; [`up`](Self::up) starts it again.
    ///
    /// # Panics
    /// There is no `kill`.
    pub fn kill(&mut self) {
        if let Some(running) = &self.running {
            Command::new("kill").args(["-9", &running.server.to_string()]).status().expect("kill runs");
        }
        self.end();
    }

    fn end(&mut self) {
        if let Some(mut running) = self.running.take() {
            drop(running.keeper.stdin.take());
            running.keeper.wait().ok();
        }
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.end();
    }
}

/// `redis-server` as it is installed; `POSTBOX_REDIS` names another.
fn binary() -> PathBuf {
    if let Some(program) = std::env::var_os("POSTBOX_REDIS") {
        return program.into();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join("redis-server")).find(|program| program.exists());
    found.unwrap_or_else(|| {
        panic!(
            "redis-server is not installed; run ./scripts/test, which installs what the tests need, or set REDIS_URL"
        )
    })
}
