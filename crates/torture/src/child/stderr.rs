//! What is logged goes to stderr. What the database told this process, as the lines say it, is told the parent.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use tracing_subscriber::fmt::MakeWriter;

use super::{ChildPlan, hit};
use crate::fault::{Fault, TIMEOUTS};
use crate::full::WORKER_TOLD;

/// This process was told that the disk is full.
static TOLD_FULL: AtomicBool = AtomicBool::new(false);

/// Whether this process was told that the disk is full, by now.
pub(crate) fn was_told_full() -> bool {
    TOLD_FULL.load(Ordering::SeqCst)
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Log {
    hasty: bool,
    /// A worker whose database's disk gets full. Publishers look at each error themselves.
    gets_full: bool,
}

impl Log {
    pub(crate) fn of(plan: &ChildPlan) -> Log {
        Log { hasty: plan.tag == Some(Fault::F11), gets_full: plan.wants(Fault::F16) && plan.name.starts_with('w') }
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        if self.hasty {
            timeouts(&text).for_each(|state| hit(format_args!("F11:{state}"), 1));
        }
        if self.gets_full && tells_full(&text) {
            TOLD_FULL.store(true, Ordering::SeqCst);
            hit(WORKER_TOLD, 1);
        }
        io::stderr().write_all(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Log;

    fn make_writer(&'a self) -> Log {
        *self
    }
}

/// The timeouts that a line speaks of, as postbox tells of them.
fn timeouts(line: &str) -> impl Iterator<Item = &'static str> {
    TIMEOUTS.iter().copied().filter(move |state| line.contains(&format!("({state})")))
}

/// PostgreSQL's word for it, and SQLite's.
fn tells_full(line: &str) -> bool {
    line.contains("(53100)") || line.contains("is full (13)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read() {
        let line = "WARN the database did not do as asked error=canceling statement due to lock timeout (55P03)\n";
        assert_eq!(timeouts(line).collect::<Vec<_>>(), ["55P03"]);
        assert_eq!(timeouts("57014 messages, and a deadlock (40P01)").count(), 0);
    }

    #[test]
    fn full_disks_are_read() {
        assert!(tells_full("error=could not extend file \"base/5/16\": No space left on device (53100)\n"));
        assert!(tells_full("error=database or disk is full (13)\n"));
        assert!(!tells_full("13 messages, 53100 bytes (130)\n"));
    }
}
