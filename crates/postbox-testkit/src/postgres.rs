//! A private PostgreSQL server: started from the installed binaries, as a user that is not root, on a
//! free port, in a temporary folder. It ends when the process that started it ends, however it ends.

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Crashes of processes are what is tested: nothing waits for a disk.
const TOUGH: &[(&str, &str)] =
    &[("fsync", "off"), ("full_page_writes", "off"), ("max_connections", "500"), ("max_prepared_transactions", "20")];

const LONGEST_START: Duration = Duration::from_secs(60);

/// A server of one's own: for tests that restart it, or kill it.
pub struct Server {
    bin: PathBuf,
    port: u16,
    account: Option<(u32, u32)>,
    settings: Vec<(String, String)>,
    /// Variables that it is started with.
    variables: Vec<(String, String)>,
    keeper: Option<Child>,
    folder: tempfile::TempDir,
    data: PathBuf,
}

/// On which disks a server keeps what it has: empty folders of the account that it runs as.
#[derive(Debug, Clone, Copy)]
pub struct Disks<'a> {
    /// Its tables and everything else.
    pub data: &'a Path,
    /// Its write-ahead log.
    pub wal: &'a Path,
}

/// The server all tests of this process share.
///
/// # Panics
/// No server is named in `DATABASE_URL`, and none can be started.
pub fn shared_url() -> String {
    static SHARED: OnceLock<(String, Option<Server>)> = OnceLock::new();
    let (url, _) = SHARED.get_or_init(|| match std::env::var("DATABASE_URL") {
        Ok(url) if url.starts_with("postgres") => (url, None),
        _ => {
            let server = Server::start();
            (server.url(), Some(server))
        }
    });
    url.clone()
}

impl Server {
    /// Makes a cluster and starts it. Crashes of processes are what is tested here, not of the machine:
    /// it does not wait for its disk.
    ///
    /// # Panics
    /// PostgreSQL's binaries are not installed, or the server does not come up.
    pub fn start() -> Server {
        Server::with(TOUGH, None)
    }

    /// The same on disks that get full: a write-ahead log that takes little, a megabyte at a time, and no
    /// more of it ahead.
    ///
    /// # Panics
    /// As [`start`](Self::start).
    pub fn start_on(disks: Disks<'_>) -> Server {
        let small = [("max_wal_size", "64MB"), ("min_wal_size", "2MB"), ("wal_recycle", "off")];
        Server::with(TOUGH.iter().chain(&small), Some(disks))
    }

    /// One that keeps what it has committed, whatever happens to the machine, with these settings.
    ///
    /// # Panics
    /// As [`start`](Self::start).
    pub fn durable(settings: &[(&str, &str)]) -> Server {
        Server::with(settings, None)
    }

    fn with<'a>(settings: impl IntoIterator<Item = &'a (&'a str, &'a str)>, disks: Option<Disks<'_>>) -> Server {
        let settings = settings.into_iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let bin = binaries();
        let account = unprivileged_account();
        let mut builder = tempfile::Builder::new();
        builder.prefix("postbox-pg-");
        // Root's own temporary folder may be closed to the account that the server runs as.
        let folder = if account.is_some() { builder.tempdir_in("/tmp") } else { builder.tempdir() };
        let folder = folder.expect("a temporary folder");
        if let Some((uid, gid)) = account {
            chown(folder.path(), Some(uid), Some(gid)).expect("the folder can be given away");
        }
        let data = disks.map_or_else(|| folder.path().join("data"), |disks| disks.data.to_owned());
        let mut server = Server { bin, port: 0, account, settings, variables: Vec::new(), keeper: None, folder, data };
        let mut initdb = server.command("initdb");
        initdb.args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync", "-D"]);
        initdb.arg(&server.data);
        if let Some(disks) = disks {
            initdb.arg("--wal-segsize=1").arg("--waldir").arg(disks.wal);
        }
        let made = initdb.output().expect("initdb runs");
        assert!(made.status.success(), "initdb failed: {}", String::from_utf8_lossy(&made.stderr));
        if disks.is_some() {
            // What making it has left of the log would do for a while.
            let reset = server.command("pg_resetwal").arg("-D").arg(&server.data).output().expect("pg_resetwal runs");
            assert!(reset.status.success(), "pg_resetwal failed: {}", String::from_utf8_lossy(&reset.stderr));
        }
        server.up();
        server
    }

    /// What it has said since it was last started: on the disk of the temporary folders, whatever becomes of
    /// its own.
    pub fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        if let Some((uid, gid)) = self.account {
            command.uid(uid).gid(gid);
        }
        command.current_dir(self.folder.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts it (again) with other variables, now and from then on: for a clock of its own, say.
    ///
    /// # Panics
    /// It does not come up within a minute.
    pub fn up_in(&mut self, variables: &[(&str, String)]) {
        self.variables = variables.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        self.up();
    }

    /// Starts it (again), on the port it had.
    ///
    /// # Panics
    /// It does not come up within a minute.
    pub fn up(&mut self) {
        if self.port == 0 {
            self.port = free_port();
        }
        // The shell ends the server when its standard input closes: when this process is gone.
        let script = "\"$0\" \"$@\" & server=$!; cat >/dev/null; kill -INT $server; wait $server";
        let log = std::fs::File::create(self.log()).expect("a log file");
        let mut command = Command::new("/bin/sh");
        if let Some((uid, gid)) = self.account {
            command.uid(uid).gid(gid);
        }
        let keeper = command
            .args(["-c", script])
            .arg(self.bin.join("postgres"))
            .arg("-D")
            .arg(&self.data)
            .args(["-h", "127.0.0.1", "-k", "", "-p", &self.port.to_string()])
            .args(self.settings.iter().flat_map(|(name, value)| ["-c".to_owned(), format!("{name}={value}")]))
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .current_dir(self.folder.path())
            .stdin(Stdio::piped())
            .stdout(log.try_clone().expect("a log file"))
            .stderr(log)
            .spawn()
            .expect("a shell");
        self.keeper = Some(keeper);
        let deadline = Instant::now() + LONGEST_START;
        while !self.answers() {
            self.not_after(deadline);
        }
    }

    /// Waits until it answers, and starts it if it ended by itself, as an operator would. Whether it had to.
    ///
    /// # Panics
    /// It does not come up within a minute; pg_ctl cannot be run.
    pub fn revive(&mut self) -> bool {
        let deadline = Instant::now() + LONGEST_START;
        while !self.answers() {
            // 3: no server is running.
            let status = self.command("pg_ctl").args(["status", "-D"]).arg(&self.data).status().expect("pg_ctl runs");
            if status.code() == Some(3) {
                self.end();
                self.up();
                return true;
            }
            self.not_after(deadline);
        }
        false
    }

    fn answers(&self) -> bool {
        let port = self.port.to_string();
        let ready = self.command("pg_isready").args(["-h", "127.0.0.1", "-p", &port]).status();
        ready.is_ok_and(|s| s.success())
    }

    /// A moment later, if that is in time.
    fn not_after(&self, deadline: Instant) {
        if Instant::now() > deadline {
            let log = std::fs::read_to_string(self.log()).unwrap_or_default();
            panic!("PostgreSQL did not come up on port {}:\n{log}", self.port);
        }
        std::thread::sleep(Duration::from_millis(20));
    }

    /// Stops it at once, as a crash would; `up` starts it again.
    ///
    /// # Panics
    /// pg_ctl cannot be run.
    pub fn crash(&mut self) {
        let mut stop = self.command("pg_ctl");
        stop.args(["stop", "-m", "immediate", "-D"]).arg(&self.data).output().expect("pg_ctl runs");
        self.end();
    }

    /// Writes its database to a file, as SQL.
    ///
    /// # Errors
    /// pg_dump cannot be run, does not succeed, or the file cannot be written.
    pub fn dump(&self, to: &Path) -> std::io::Result<()> {
        let dumped = self.command("pg_dump").arg("-d").arg(self.url()).output()?;
        if !dumped.status.success() {
            return Err(std::io::Error::other(String::from_utf8_lossy(&dumped.stderr).into_owned()));
        }
        std::fs::write(to, dumped.stdout)
    }

    fn end(&mut self) {
        if let Some(mut keeper) = self.keeper.take() {
            drop(keeper.stdin.take().map(|mut input| input.flush()));
            keeper.wait().ok();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// The account that servers run as when this process is root: user and group.
pub fn unprivileged_account() -> Option<(u32, u32)> {
    is_root().then(unprivileged)
}

/// A port that is free now.
pub(crate) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0)
}

/// The account that PostgreSQL's package made, or nobody: PostgreSQL refuses to run as root.
fn unprivileged() -> (u32, u32) {
    let accounts = std::fs::read_to_string("/etc/passwd").expect("a list of accounts");
    let find = |name: &str| {
        let line = accounts.lines().find(|l| l.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    find("postgres").or_else(|| find("nobody")).expect("an account that is not root")
}

/// The newest installed server's programs; `POSTBOX_PG_BIN` names others.
fn binaries() -> PathBuf {
    if let Some(folder) = std::env::var_os("POSTBOX_PG_BIN") {
        return folder.into();
    }
    let mut found: Vec<(u32, PathBuf)> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path().join("bin"))))
        .filter(|(_, bin)| bin.join("initdb").exists())
        .collect();
    found.sort();
    let on_path = || {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).find(|folder| folder.join("initdb").exists())
    };
    found.pop().map(|(_, bin)| bin).or_else(on_path).unwrap_or_else(|| {
        panic!(
            "PostgreSQL's server programs are not installed; run ./scripts/test, which installs what the tests need, or set DATABASE_URL ({})",
            Path::new("/usr/lib/postgresql").display()
        )
    })
}
