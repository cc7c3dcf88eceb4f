//! Which consumer of its group a process is: a name that is its own on this host, and that it has again when it
//! is started again, so that it finds what it had not acknowledged.
//!
//! The name is a prefix (the host's name, if none is given) and a number, the first that no process of this host
//! holds. The system lets go of the number when the process ends, however it ends. On Linux it is held by a name
//! in the abstract socket namespace: containers that share the host's name share that as well, whatever they
//! have for a file system. Elsewhere it is a lock on a file in the temporary folder.

use std::io;

use sha2::{Digest, Sha256};

/// Processes of one host in one group, beyond which names are no longer stable.
const MOST: u32 = 512;

/// A consumer's name, held.
pub(super) struct Consumer {
    pub(super) name: String,
    _held: Option<Held>,
}

/// Takes the first name that is free. `scope`: server, stream and group; names are held for each apart.
pub(super) fn take(prefix: &str, scope: &str) -> (Consumer, Option<String>) {
    let mut digest = Sha256::new();
    digest.update(prefix.as_bytes());
    digest.update([0]);
    digest.update(scope.as_bytes());
    let scope: String = digest.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    for number in 1..=MOST {
        // One that cannot be held is somebody else's.
        if let Ok(held) = hold(&format!("postbox-consumer-{scope}-{number}")) {
            return (Consumer { name: format!("{prefix}-{number}"), _held: Some(held) }, None);
        }
    }
    let name = format!("{prefix}-{}", uuid::Uuid::now_v7().simple());
    let warning = format!(
        "no name of a consumer from {prefix}-1 to {prefix}-{MOST} can be held on this host; this process is {name}, and what it leaves unacknowledged is taken over only after the min idle time"
    );
    (Consumer { name, _held: None }, Some(warning))
}

/// The host's name: the prefix unless another is given.
pub(super) fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("HOSTNAME").ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".into())
}

#[cfg(target_os = "linux")]
type Held = std::os::unix::net::UnixListener;

#[cfg(target_os = "linux")]
fn hold(name: &str) -> io::Result<Held> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener};
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)
}

#[cfg(not(target_os = "linux"))]
type Held = std::fs::File;

#[cfg(not(target_os = "linux"))]
fn hold(name: &str) -> io::Result<Held> {
    let path = std::env::temp_dir().join(format!("{name}.lock"));
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
    file.try_lock().map_err(io::Error::from)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_held_once_and_had_again() {
        let scope = format!("test {}", uuid::Uuid::now_v7());
        let (first, warning) = take("host", &scope);
        let (second, _) = take("host", &scope);
        let (elsewhere, _) = take("host", &format!("{scope} of another stream"));
        assert_eq!(
            (first.name.as_str(), second.name.as_str(), elsewhere.name.as_str()),
            ("host-1", "host-2", "host-1")
        );
        assert_eq!(warning, None);
        drop(first);
        assert_eq!(take("host", &scope).0.name, "host-1", "the one that is free again");
        assert_eq!(take("other", &scope).0.name, "other-1", "another prefix has numbers of its own");
    }
}
