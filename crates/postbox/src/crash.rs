//! Named points at which a test kills the process: `POSTBOX_CRASH_POINT=name[:nth]`, in builds with the
//! feature `crash-points` only. Elsewhere they are nothing.
//!
//! The engine's points: `claimed`, `attempt-committed`, `outcome-commit-sent`, `reconciling`, `resolving`,
//! `draining`, `migrating`, `ticking`. Of what comes in: `read` (nothing is stored), `receiving` (its COMMIT is sent),
//! `received` (nobody has been told). Of what goes out, when it is answered and not marked: `relayed` (a batch),
//! `pushed`, `operated` (a push as an operation). What a process calls or publishes has points of its own, named the same way.

/// Announces the point on stdout and waits there to be killed: nothing after it happens in this task.
#[cfg(feature = "crash-points")]
pub fn point(name: &str) {
    if armed(name) {
        use std::io::Write;
        let mut out = std::io::stdout().lock();
        writeln!(out, "crash point {name}").ok();
        out.flush().ok();
        loop {
            std::thread::park();
        }
    }
}

#[cfg(not(feature = "crash-points"))]
pub(crate) fn point(_name: &str) {}

/// Whether this process is to be killed at a point.
#[cfg(feature = "crash-points")]
pub(crate) fn is_armed() -> bool {
    std::env::var_os("POSTBOX_CRASH_POINT").is_some()
}

#[cfg(not(feature = "crash-points"))]
pub(crate) fn is_armed() -> bool {
    false
}

/// Whether this is the wanted point, for the wanted time.
#[cfg(feature = "crash-points")]
fn armed(name: &str) -> bool {
    use std::sync::atomic::{AtomicU32, Ordering};
    static HITS: AtomicU32 = AtomicU32::new(0);
    let Ok(wanted) = std::env::var("POSTBOX_CRASH_POINT") else { return false };
    let (wanted, nth) = wanted.split_once(':').unwrap_or((&wanted, "1"));
    wanted == name && HITS.fetch_add(1, Ordering::SeqCst) + 1 == nth.parse().unwrap_or(1)
}

/// Awaits a commit; at the point, its COMMIT has been sent and its answer is never read.
#[cfg(feature = "crash-points")]
pub async fn commit<F: Future>(name: &str, commit: F) -> F::Output {
    let mut commit = std::pin::pin!(commit);
    if let std::task::Poll::Ready(done) = futures_util::poll!(commit.as_mut()) {
        point(name);
        return done;
    }
    point(name);
    commit.await
}

#[cfg(not(feature = "crash-points"))]
pub(crate) async fn commit<F: Future>(_name: &str, commit: F) -> F::Output {
    commit.await
}
