//! What a run happens in: servers, addresses, folders, and the counts of what took effect.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use postbox_testkit::Server;

use crate::child::{ChildPlan, hasty};
use crate::fault::{Fault, Kind};
use crate::full::{Disks, WORKER_WORKS};
use crate::plan::{self, Crew};
use crate::proxy::{Hit, Proxy, When};

/// Handlers that hold every connection hold them for this long: past the lease.
const HOG_MS: u64 = 1900;

/// Work that is told so long after nobody could hear any more was done while nobody could.
const SURELY_DEAF: Duration = Duration::from_millis(300);

/// Everything that outlives a round.
pub(crate) struct World {
    pub(crate) kind: Kind,
    pub(crate) faults: Vec<Fault>,
    pub(crate) folder: PathBuf,
    /// Everything is kept for a look.
    pub(crate) keep: bool,
    /// How long the faults of all rounds last.
    pub(crate) span: Duration,
    pub(crate) proxy: Option<Proxy>,
    pub(crate) server: Mutex<Option<Server>>,
    /// They go after the server.
    pub(crate) disks: Option<Disks>,
    server_port: u16,
    bouncer_port: Option<u16>,
    bouncer: Mutex<Option<Child>>,
    faketime: Option<PathBuf>,
    pub(crate) counts: std::sync::Arc<Counts>,
    broken: Mutex<Vec<String>>,
    pub(crate) healing: AtomicBool,
}

/// A mutex, also after somebody panicked with it: what is behind them here is whole at any time.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// How often what took effect.
#[derive(Debug, Default)]
pub(crate) struct Counts(Mutex<BTreeMap<String, u64>>);

impl Counts {
    /// `F1:claimed` counts for `F1`, too. `F3:outcome:before` does not: it is counted as `F3:before`.
    pub(crate) fn add(&self, id: &str, times: u64) {
        let mut counts = locked(&self.0);
        *counts.entry(id.to_owned()).or_default() += times;
        if let Some((fault, part)) = id.split_once(':')
            && !part.contains(':')
        {
            *counts.entry(fault.to_owned()).or_default() += times;
        }
    }

    pub(crate) fn of(&self, id: &str) -> u64 {
        locked(&self.0).get(id).copied().unwrap_or_default()
    }

    pub(crate) fn all(&self) -> BTreeMap<String, u64> {
        locked(&self.0).clone()
    }
}

impl World {
    /// Starts what the faults need.
    pub(crate) async fn start(
        kind: Kind,
        faults: Vec<Fault>,
        folder: &Path,
        keep: bool,
        span: Duration,
    ) -> Result<World, String> {
        let counts = std::sync::Arc::new(Counts::default());
        let mut world = World {
            kind,
            folder: folder.to_owned(),
            keep,
            span,
            proxy: None,
            server: Mutex::new(None),
            disks: None,
            server_port: 0,
            bouncer_port: None,
            bouncer: Mutex::new(None),
            faketime: None,
            counts,
            broken: Mutex::default(),
            healing: AtomicBool::new(false),
            faults,
        };
        if world.wants(Fault::F14) {
            world.faketime = Some(faketime()?);
        }
        if world.wants(Fault::F16) {
            world.disks = Some(Disks::new(kind).map_err(|e| format!("a disk for F16: {e}"))?);
        }
        if kind == Kind::Sqlite {
            return Ok(world);
        }
        let bouncer = if world.wants(Fault::F10) { Some(pgbouncer()?) } else { None };
        let places = world.disks.as_ref().map(|disks| (disks.data().at().to_owned(), disks.wal().at().to_owned()));
        let start = move || match &places {
            Some((data, wal)) => Server::start_on(postbox_testkit::Disks { data, wal }),
            None => Server::start(),
        };
        let server = tokio::task::spawn_blocking(start).await.map_err(|e| format!("PostgreSQL: {e}"))?;
        let port = server.url().rsplit(':').next().and_then(|rest| rest.split('/').next()?.parse().ok());
        world.server_port = port.ok_or("the server has no port")?;
        world.server = Mutex::new(Some(server));
        if world.wants(Fault::F3) || world.wants(Fault::F8) {
            let counts = world.counts.clone();
            let hit = move |hit: Hit| match hit {
                Hit::Frozen => counts.add("F8:frozen", 1),
                Hit::Cut(when, purpose) => {
                    let when = if when == When::Before { "before" } else { "after" };
                    counts.add(&format!("F3:{when}"), 1);
                    if let Some(purpose) = purpose {
                        counts.add(&format!("F3:{purpose}:{when}"), 1);
                    }
                }
            };
            world.proxy = Some(Proxy::start(world.server_port, hit).await.map_err(|e| format!("the proxy: {e}"))?);
        }
        if let Some(program) = bouncer {
            let (child, port) = world.start_bouncer(&program).map_err(|e| format!("pgbouncer: {e}"))?;
            world.bouncer = Mutex::new(Some(child));
            world.bouncer_port = Some(port);
        }
        Ok(world)
    }

    pub(crate) fn wants(&self, fault: Fault) -> bool {
        self.faults.contains(&fault)
    }

    /// A child tells a hit. Work behind the proxy is one only while those who listen there hear nothing,
    /// and that of a worker that was told of a full disk only when there has been room for long enough.
    pub(crate) fn hit(&self, id: &str, times: u64) {
        if id == WORKER_WORKS {
            if self.disks.as_ref().is_some_and(Disks::surely_recovered) {
                self.counts.add(id, times);
            }
            return;
        }
        if id != Fault::F8.id() {
            return self.counts.add(id, times);
        }
        let deaf = self.proxy.as_ref().and_then(Proxy::deaf_for);
        if deaf.is_some_and(|deaf| deaf > SURELY_DEAF) {
            self.counts.add("F8:worked", times);
        }
    }

    /// Something is not as promised, seen while the run goes on.
    pub(crate) fn broken(&self, what: impl Into<String>) {
        let what = what.into();
        eprintln!("broken: {what}");
        locked(&self.broken).push(what);
    }

    pub(crate) fn all_broken(&self) -> Vec<String> {
        locked(&self.broken).clone()
    }

    /// Faults are on.
    pub(crate) fn hostile(&self) -> bool {
        !self.healing.load(Ordering::SeqCst)
    }

    fn start_bouncer(&self, program: &Path) -> io::Result<(Child, u16)> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        // A folder of its own: it does not run as root, and the run's folder may be root's.
        let folder = std::env::temp_dir().join(format!("postbox-bouncer-{}-{port}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        let ini = folder.join("pgbouncer.ini");
        let text = format!(
            "[databases]\npostgres = host=127.0.0.1 port={} dbname=postgres user=postgres\n\n[pgbouncer]\n\
             listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n\
             pool_mode = transaction\ndefault_pool_size = 20\nmax_client_conn = 500\n\
             ignore_startup_parameters = extra_float_digits,options\nserver_login_retry = 0.3\n\
             query_wait_timeout = 10\nserver_connect_timeout = 3\n",
            self.server_port
        );
        std::fs::write(&ini, text)?;
        let log = std::fs::File::create(self.folder.join("pgbouncer.log"))?;
        // The shell ends it when its standard input closes: when this process is gone, however it went.
        let script = "\"$0\" \"$@\" & server=$!; cat >/dev/null; kill -INT $server; wait $server";
        let mut command = Command::new("/bin/sh");
        if let Some((uid, gid)) = postbox_testkit::unprivileged_account() {
            command.uid(uid).gid(gid);
        }
        let child = command
            .args(["-c", script])
            .arg(program)
            .arg("-q")
            .arg(&ini)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        Ok((child, port))
    }

    /// PostgreSQL stops as in a crash, and comes back.
    pub(crate) async fn crash_server(self: &std::sync::Arc<Self>, away: Duration) {
        let world = self.clone();
        let crashed = tokio::task::spawn_blocking(move || {
            let mut server = locked(&world.server);
            if let Some(server) = server.as_mut() {
                server.crash();
                std::thread::sleep(away);
                server.up();
            }
        });
        match crashed.await {
            Ok(()) => self.counts.add("F6", 1),
            Err(error) => self.broken(format!("the run itself: PostgreSQL did not come back: {error}")),
        }
    }

    /// Keeps a round's database in a folder: as SQL, with the server's log; or SQLite's files.
    pub(crate) async fn keep_database(self: &std::sync::Arc<Self>, round: u32, folder: &Path) {
        let (world, folder) = (self.clone(), folder.to_owned());
        let dumped = tokio::task::spawn_blocking(move || match locked(&world.server).as_ref() {
            Some(server) => {
                std::fs::copy(server.log(), folder.join("postgres.log"))?;
                server.dump(&folder.join("database.sql"))
            }
            None => world.files_of(round).try_for_each(|file| match file.file_name() {
                Some(name) => std::fs::copy(&file, folder.join(name)).map(|_| ()),
                None => Ok(()),
            }),
        });
        match dumped.await {
            Ok(Ok(())) => {}
            other => eprintln!("the database could not be dumped: {other:?}"),
        }
    }

    /// Where SQLite's files are.
    fn files(&self) -> &Path {
        self.disks.as_ref().map_or(&self.folder, |disks| disks.data().at())
    }

    /// SQLite's files of a round.
    pub(crate) fn files_of(&self, round: u32) -> impl Iterator<Item = PathBuf> {
        let prefix = format!("round-{round}.db");
        let all = std::fs::read_dir(self.files()).into_iter().flatten().flatten();
        all.filter(move |entry| entry.file_name().to_string_lossy().starts_with(&prefix)).map(|entry| entry.path())
    }

    /// Where the database really is.
    pub(crate) fn direct(&self, round: u32) -> String {
        match self.kind {
            Kind::Postgres => self.address(self.server_port, "witness"),
            Kind::Sqlite => format!("sqlite:{}", self.files().join(format!("round-{round}.db")).display()),
        }
    }

    fn address(&self, port: u16, name: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{port}/postgres?sslmode=disable&application_name={name}")
    }

    /// How the worker in this slot connects, and what is odd about it.
    pub(crate) fn worker_plan(&self, slot: usize, mut plan: ChildPlan) -> ChildPlan {
        let hostile = self.hostile();
        if self.hogs(slot) {
            // Both stores: all the connections there are, in hands that do not let go for a lease.
            plan.hog_ms = Some(if hostile { HOG_MS } else { 1 });
            plan.pool_size = if hostile { 3 } else { 11 };
            plan.tag = Some(Fault::F15).filter(|_| hostile);
        }
        if self.kind == Kind::Sqlite {
            return plan;
        }
        match slot {
            1 => {
                self.through_proxy(&mut plan);
                plan.tag = Some(Fault::F8).filter(|_| self.wants(Fault::F8) && hostile);
            }
            2 => self.through_bouncer(&mut plan),
            3 if self.wants(Fault::F14) && hostile => plan.tag = Some(Fault::F14),
            _ if self.is_hasty(plan::Child::Worker(slot)) => self.in_haste(!plan.life.is_multiple_of(2), &mut plan),
            _ => {}
        }
        plan
    }

    pub(crate) fn publisher_plan(&self, slot: usize, mut plan: ChildPlan) -> ChildPlan {
        match (self.kind, slot) {
            (Kind::Postgres, 0) => self.through_proxy(&mut plan),
            (Kind::Postgres, _) if self.is_hasty(plan::Child::Publisher(slot)) => {
                self.in_haste(plan.life.is_multiple_of(2), &mut plan);
            }
            (Kind::Postgres, _) => self.through_bouncer(&mut plan),
            _ => {}
        }
        plan
    }

    /// Those who pull take each way to connect in turn.
    pub(crate) fn puller_plan(&self, mut plan: ChildPlan) -> ChildPlan {
        if !self.hostile() {
            plan.faults.clear();
        }
        match (self.kind, plan.life % 3) {
            (Kind::Postgres, 1) => self.through_proxy(&mut plan),
            (Kind::Postgres, 2) => self.through_bouncer(&mut plan),
            _ => {}
        }
        plan
    }

    fn through_proxy(&self, plan: &mut ChildPlan) {
        if let Some(proxy) = &self.proxy {
            plan.url = self.address(proxy.port(), "proxied");
        }
    }

    fn through_bouncer(&self, plan: &mut ChildPlan) {
        if let Some(port) = self.bouncer_port {
            plan.url = self.address(port, "pooled");
            plan.prepared = false;
            plan.wake_ups = false;
            plan.tag = Some(Fault::F10);
        }
    }

    /// Its connections give up soon, while faults are on.
    fn in_haste(&self, lock_first: bool, plan: &mut ChildPlan) {
        if self.hostile() {
            plan.url = self.address(self.server_port, "hasty") + &hasty::options(lock_first);
            plan.tag = Some(Fault::F11);
        }
    }

    /// Those whom the schedule knows. The hasty ones come after them, so that they move nobody's dice.
    pub(crate) fn crew(&self) -> Crew {
        let workers = match self.kind {
            Kind::Postgres => 3 + usize::from(self.wants(Fault::F14)) + usize::from(self.wants(Fault::F15)),
            Kind::Sqlite => 2 + usize::from(self.wants(Fault::F15)),
        };
        Crew { workers, publishers: 2, pullers: 1 }
    }

    /// Workers at once: one for each way to connect that the faults want.
    pub(crate) fn workers(&self) -> usize {
        self.crew().workers + usize::from(self.wants(Fault::F11))
    }

    pub(crate) fn publishers(&self) -> usize {
        self.crew().publishers + usize::from(self.wants(Fault::F11))
    }

    /// Its handlers hold all the connections there are.
    pub(crate) fn hogs(&self, slot: usize) -> bool {
        self.wants(Fault::F15) && slot + 1 == self.crew().workers
    }

    /// A worker or a publisher whose connections give up soon.
    pub(crate) fn is_hasty(&self, child: plan::Child) -> bool {
        let crew = self.crew();
        match child {
            plan::Child::Worker(slot) => slot == crew.workers,
            plan::Child::Publisher(slot) => slot == crew.publishers,
            plan::Child::Puller(_) => false,
        }
    }

    /// Variables for a child whose clock is wrong.
    pub(crate) fn wrong_clock(&self, plan: &ChildPlan) -> Vec<(&'static str, String)> {
        let Some(library) = self.faketime.as_ref().filter(|_| plan.tag == Some(Fault::F14)) else { return Vec::new() };
        set_clock(library, if plan.life.is_multiple_of(2) { 3600 } else { -3600 })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Ok(mut bouncer) = self.bouncer.lock()
            && let Some(mut child) = bouncer.take()
        {
            drop(child.stdin.take());
            child.wait().ok();
            if let Some(port) = self.bouncer_port {
                let folder = std::env::temp_dir().join(format!("postbox-bouncer-{}-{port}", std::process::id()));
                std::fs::remove_dir_all(folder).ok();
            }
        }
    }
}

/// A program from PATH, or from where Debian puts servers.
fn pgbouncer() -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/usr/local/sbin".into()])
        .map(|folder: PathBuf| folder.join("pgbouncer"))
        .find(|program| program.exists())
        .ok_or_else(|| {
            "F10 needs pgbouncer; install Debian's package `pgbouncer` (scripts/test does), or leave F10 out".into()
        })
}

/// The library that sets a process's clock.
pub(crate) fn faketime() -> Result<PathBuf, String> {
    let found = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let mut found = found.map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
    found.find(|library| library.exists()).ok_or_else(|| {
        "F14 and the schedules need libfaketime; install Debian's package `libfaketime` (scripts/test does), or leave F14 out".into()
    })
}

/// Variables for a process whose clock is so many seconds ahead.
pub(crate) fn set_clock(faketime: &Path, ahead: i64) -> Vec<(&'static str, String)> {
    vec![
        ("LD_PRELOAD", faketime.display().to_string()),
        ("FAKETIME", format!("{ahead:+}s")),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ("DONT_FAKE_MONOTONIC", "1".to_owned()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hit_counts_once_for_its_fault() {
        let counts = Counts::default();
        counts.add("F3:before", 1);
        counts.add("F3:outcome:before", 1);
        counts.add("F2", 1);
        assert_eq!((counts.of("F3"), counts.of("F3:before"), counts.of("F3:outcome:before")), (1, 1, 1));
        assert_eq!((counts.of("F2"), counts.of("F1")), (1, 0));
    }
}
