//! Disks that really get full: file systems in memory, each made as small as what is on it, and large again.
//!
//! They are mounted in a mount namespace of this process and its children. Nobody else sees them, and they
//! are gone with the last of these, however it ends.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// What this program is started with to try it out.
const TRY: &str = "--try-disk";
/// What fits when there is room. It is a limit: only what is written takes memory.
const ROOM: u64 = 4 << 30;

/// A disk of the run's own.
#[derive(Debug)]
pub(crate) struct Disk {
    at: PathBuf,
}

impl Disk {
    /// Mounts one on an empty folder, for an account (user and group).
    pub(crate) fn mount(at: PathBuf, account: Option<(u32, u32)>) -> io::Result<Disk> {
        std::fs::create_dir(&at)?;
        let owner = account.map(|(uid, gid)| format!(",uid={uid},gid={gid}")).unwrap_or_default();
        system::mount(&at, &format!("size={ROOM},mode=0700{owner}"))?;
        Ok(Disk { at })
    }

    pub(crate) fn at(&self) -> &Path {
        &self.at
    }

    /// Nothing more fits. What is given back on it is room: so again, for as long as it is to be full.
    pub(crate) fn fill(&self) -> io::Result<()> {
        let mut filled = Ok(());
        // Refused if somebody writes between the look and the resizing.
        for _ in 0..1000 {
            filled = system::resize(&self.at, system::used(&self.at)?);
            if filled.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::InvalidInput) {
                continue;
            }
            break;
        }
        filled
    }

    pub(crate) fn make_room(&self) -> io::Result<()> {
        system::resize(&self.at, ROOM)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        system::unmount(&self.at);
    }
}

/// From here on this process may have disks. It must have one thread only.
///
/// `Err`: why not, in words; nothing has changed then.
pub(crate) fn prepare() -> Result<(), String> {
    // In a process of its own first: half a namespace could not be left again.
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let tried = Command::new(program).arg(TRY).stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
    if !tried.status.success() {
        return Err(String::from_utf8_lossy(&tried.stderr).trim().to_owned());
    }
    system::own_mounts().map_err(|e| e.to_string())
}

/// Whether a disk can be had here, gets full, and has room again.
pub(crate) fn attempt() -> ExitCode {
    match tried() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn tried() -> io::Result<()> {
    let told = |what: &'static str| move |e: io::Error| io::Error::other(format!("{what}: {e}"));
    let folder = tempfile::tempdir()?;
    system::own_mounts().map_err(told("no mounts of its own"))?;
    let disk = Disk::mount(folder.path().join("disk"), None).map_err(told("a tmpfs cannot be mounted"))?;
    let mut file = std::fs::File::create(disk.at().join("file"))?;
    file.write_all(&[1; 10_000])?;
    disk.fill().map_err(told("it cannot be made small"))?;
    if file.write_all(&[1; 10_000]).is_ok() {
        return Err(io::Error::other("it does not get full"));
    }
    disk.make_room().map_err(told("it cannot be made large"))?;
    file.write_all(&[1; 10_000])
}

#[cfg(target_os = "linux")]
mod system {
    use std::io;
    use std::path::Path;

    use nix::mount::{MntFlags, MsFlags, umount2};
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::statvfs::statvfs;
    use nix::unistd::{getegid, geteuid};

    const NONE: Option<&str> = None;

    pub(super) fn own_mounts() -> io::Result<()> {
        let (uid, gid) = (geteuid(), getegid());
        if uid.is_root() {
            unshare(CloneFlags::CLONE_NEWNS)?;
        } else {
            // Who is not root may mount in a namespace of its users' own, where it is who it was.
            unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
            std::fs::write("/proc/self/setgroups", "deny")?;
            std::fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
            std::fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
        }
        // What is mounted from here on does not spread to where this came from.
        Ok(nix::mount::mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?)
    }

    pub(super) fn mount(at: &Path, options: &str) -> io::Result<()> {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        Ok(nix::mount::mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(options))?)
    }

    /// Bytes in use.
    pub(super) fn used(at: &Path) -> io::Result<u64> {
        let all = statvfs(at)?;
        Ok((all.blocks() - all.blocks_free()) * all.fragment_size())
    }

    pub(super) fn resize(at: &Path, bytes: u64) -> io::Result<()> {
        // None at all would be without a limit.
        let size = format!("size={}", bytes.max(1));
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        Ok(nix::mount::mount(NONE, at, NONE, flags, Some(size.as_str()))?)
    }

    pub(super) fn unmount(at: &Path) {
        // Whoever still has a file open there keeps it until then.
        umount2(at, MntFlags::MNT_DETACH).ok();
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::io;
    use std::path::Path;

    fn nowhere<T>() -> io::Result<T> {
        Err(io::Error::other("only Linux has mounts of a process's own"))
    }

    pub(super) fn own_mounts() -> io::Result<()> {
        nowhere()
    }

    pub(super) fn mount(_: &Path, _: &str) -> io::Result<()> {
        nowhere()
    }

    pub(super) fn used(_: &Path) -> io::Result<u64> {
        nowhere()
    }

    pub(super) fn resize(_: &Path, _: u64) -> io::Result<()> {
        nowhere()
    }

    pub(super) fn unmount(_: &Path) {}
}
