//! A full disk (F16): nothing more fits for a while, then there is room again. A hit is one of which a
//! publisher was told, or that PostgreSQL went down of, and after which something was published.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Pool;

use crate::disk::Disk;
use crate::fault::Kind;
use crate::site::{Site, Texts};
use crate::world::{World, locked};

/// A disk is full for at most this long; for no longer than its time, if it was noticed.
pub(crate) const LONGEST: Duration = Duration::from_secs(8);
/// It stays full for so long after that: a server that went down does not come up at once.
const AFTERMATH: Duration = Duration::from_secs(1);
/// What says that a publisher, or a worker, was told.
pub(crate) const PUBLISHER_TOLD: &str = "F16:publisher:told";
pub(crate) const WORKER_TOLD: &str = "F16:worker:told";
/// What a worker says that was told and now does something.
pub(crate) const WORKER_WORKS: &str = "F16:worker:resumed";
/// By then nothing that was claimed before there was room is started any more: its lease is over.
const SURELY_CLAIMED_SINCE: Duration = Duration::from_secs(3);
const SHORTENED_WITHIN: Duration = Duration::from_secs(3);
/// Something is published again within this, if no other fault prevents it.
const PUBLISHED_WITHIN: Duration = Duration::from_secs(20);

/// The disks of a run.
pub(crate) struct Disks {
    disks: Vec<Disk>,
    /// When there was room again after one was full; `None`: there is none, or there was room always.
    room_since: std::sync::Mutex<Option<Instant>>,
    /// Goes after what is mounted in it.
    _folder: tempfile::TempDir,
}

impl Disks {
    /// For the server's account: its tables, and its write-ahead log; or for SQLite's files.
    pub(crate) fn new(kind: Kind) -> io::Result<Disks> {
        let account = postbox_testkit::unprivileged_account().filter(|_| kind == Kind::Postgres);
        let mut builder = tempfile::Builder::new();
        builder.prefix("postbox-disks-");
        // Root's own temporary folder may be closed to the account that the server runs as.
        let folder = if account.is_some() { builder.tempdir_in("/tmp") } else { builder.tempdir() }?;
        if let Some((uid, gid)) = account {
            std::os::unix::fs::chown(folder.path(), Some(uid), Some(gid))?;
        }
        let names: &[&str] = if kind == Kind::Postgres { &["data", "wal"] } else { &["files"] };
        let disks = names.iter().map(|name| Disk::mount(folder.path().join(name), account));
        Ok(Disks { disks: disks.collect::<io::Result<_>>()?, room_since: Default::default(), _folder: folder })
    }

    /// For tables, and for files.
    pub(crate) fn data(&self) -> &Disk {
        &self.disks[0]
    }

    /// For the write-ahead log, where that has one of its own.
    pub(crate) fn wal(&self) -> &Disk {
        &self.disks[self.disks.len() - 1]
    }

    /// Work that is told now was claimed after a disk had been full.
    pub(crate) fn surely_recovered(&self) -> bool {
        locked(&self.room_since).is_some_and(|since| since.elapsed() > SURELY_CLAIMED_SINCE)
    }
}

/// One spell of it.
pub(crate) async fn full<Db: Site>(world: &Arc<World>, pool: &Pool<Db>, wal: bool, time: Duration) {
    if Db::KIND == Kind::Sqlite {
        // A log that was long before takes what is written for a while, without any room.
        tokio::time::timeout(SHORTENED_WITHIN, shorten_log(pool)).await.ok();
    }
    let spell = {
        let world = world.clone();
        tokio::task::spawn_blocking(move || spell(&world, wal, time)).await
    };
    let noticed = match spell {
        Ok(Ok(noticed)) => noticed,
        Ok(Err(error)) => return world.broken(format!("the run itself: a disk that was to be full: {error}")),
        Err(error) => return world.broken(format!("F16: PostgreSQL did not come back when there was room: {error}")),
    };
    if noticed.went_down {
        world.counts.add("F16:server:restarted", 1);
    }
    if !noticed.any() {
        return eprintln!("a disk was full, and nobody was told of it");
    }
    if !published(pool).await {
        return eprintln!("a disk was full, and nothing was published within {PUBLISHED_WITHIN:?} of there being room");
    }
    if noticed.told {
        world.counts.add("F16:refused", 1);
    }
    if noticed.panicked {
        world.counts.add("F16:panic", 1);
    }
}

/// Leaves SQLite's write-ahead log empty, if nobody reads it just now.
async fn shorten_log<Db: Site>(pool: &Pool<Db>) -> Result<(), sqlx::Error> {
    let mut connection = Db::acquire(pool).await?;
    Db::rows(&mut connection, "pragma wal_checkpoint(truncate)".into()).await.map(|_| ())
}

#[derive(Debug, Default, Clone, Copy)]
struct Noticed {
    /// A publisher was told.
    told: bool,
    /// PostgreSQL stopped everything, because its log did not fit.
    panicked: bool,
    /// It did not come back by itself.
    went_down: bool,
}

impl Noticed {
    fn any(self) -> bool {
        self.told || self.panicked
    }
}

/// Nobody else stops or starts the server meanwhile.
fn spell(world: &World, wal: bool, time: Duration) -> io::Result<Noticed> {
    let Some(disks) = &world.disks else { return Ok(Noticed::default()) };
    let disk = if wal { disks.wal() } else { disks.data() };
    let mut server = locked(&world.server);
    let log = server.as_ref().map(|server| server.log());
    let so_far = log.as_ref().map_or(0, |log| std::fs::metadata(log).map_or(0, |log| log.len()));
    let told_before = world.counts.of(PUBLISHER_TOLD);
    let look = || Noticed {
        told: world.counts.of(PUBLISHER_TOLD) > told_before,
        panicked: log.as_ref().is_some_and(|log| panicked(&words(log, so_far).unwrap_or_default())),
        went_down: false,
    };
    *locked(&disks.room_since) = None;
    let begun = Instant::now();
    let (mut filled, mut noticed_at) = (Ok(()), None);
    let is_enough = |noticed_at: Option<Instant>| {
        begun.elapsed() >= time && noticed_at.is_some_and(|noticed_at| noticed_at.elapsed() >= AFTERMATH)
    };
    while filled.is_ok() && begun.elapsed() < LONGEST && !is_enough(noticed_at) {
        filled = disk.fill();
        if noticed_at.is_none() && look().any() {
            noticed_at = Some(Instant::now());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    disk.make_room()?;
    filled?;
    // What was told last is on its way.
    std::thread::sleep(Duration::from_millis(200));
    let mut noticed = look();
    noticed.went_down = server.as_mut().is_some_and(|server| server.revive());
    *locked(&disks.room_since) = Some(Instant::now());
    Ok(noticed)
}

/// What a log says after so many bytes.
fn words(log: &Path, after: u64) -> io::Result<String> {
    let (mut log, mut words) = (File::open(log)?, Vec::new());
    log.seek(SeekFrom::Start(after))?;
    log.read_to_end(&mut words)?;
    Ok(String::from_utf8_lossy(&words).into_owned())
}

fn panicked(log: &str) -> bool {
    log.lines().any(|line| line.contains("PANIC:") && line.contains("No space left on device"))
}

/// Whether there is a message more than now, soon.
async fn published<Db: Site>(pool: &Pool<Db>) -> bool {
    let begun = Instant::now();
    let mut first = None;
    while begun.elapsed() < PUBLISHED_WITHIN {
        if let Ok(Ok(last)) = tokio::time::timeout(Duration::from_secs(3), last_message(pool)).await {
            match &first {
                None => first = Some(last),
                Some(first) if *first != last => return true,
                Some(_) => {}
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    false
}

async fn last_message<Db: Site>(pool: &Pool<Db>) -> Result<Vec<Texts>, sqlx::Error> {
    let text = match Db::KIND {
        Kind::Postgres => "cast(id as text)",
        Kind::Sqlite => "hex(id)",
    };
    let mut connection = Db::acquire(pool).await?;
    Db::rows(&mut connection, format!("select {text} from {} order by id desc limit 1", Db::postbox("message"))).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_for_lack_of_room_is_told_from_others() {
        let log = |line: &str| panicked(&format!("LOG:  all is well\n{line}\n"));
        assert!(log("PANIC:  could not write to file \"pg_wal/xlogtemp.7\": No space left on device"));
        assert!(!log("ERROR:  could not extend file \"base/5/17\": No space left on device"));
        assert!(!log("PANIC:  could not locate a valid checkpoint record"));
    }
}
