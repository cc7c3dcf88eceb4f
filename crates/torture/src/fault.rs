//! The faults by their ids in the list of promises, and what a run wants of them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// On which store a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    Postgres,
    Sqlite,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Postgres => "postgres",
            Kind::Sqlite => "sqlite",
        })
    }
}

macro_rules! faults {
    ($($id:ident $store:ident $what:literal,)*) => {
        /// A fault by its id.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub(crate) enum Fault { $($id,)* }

        impl Fault {
            pub(crate) const ALL: &[Fault] = &[$(Fault::$id,)*];

            pub(crate) fn id(self) -> &'static str {
                match self { $(Fault::$id => stringify!($id),)* }
            }

            pub(crate) fn what(self) -> &'static str {
                match self { $(Fault::$id => $what,)* }
            }

            pub(crate) fn applies_to(self, kind: Kind) -> bool {
                let only = match self { $(Fault::$id => stringify!($store),)* };
                only == "both" || only == kind.to_string()
            }
        }
    };
}
faults! {
    F1 both "kill -9 at every named point and at random",
    F2 both "SIGSTOP past the lease, then SIGCONT",
    F3 postgres "the connection cut just before and just after COMMIT is forwarded",
    F4 postgres "pg_terminate_backend every 0.2 to 2 s",
    F5 both "futures dropped at any await",
    F6 postgres "PostgreSQL stopped in immediate mode and started again, away 1 to 10 s",
    F10 postgres "children behind pgbouncer in transaction mode",
    F12 postgres "deadlocks and serialization failures",
    F13 both "a transaction publishes and stalls while later ones commit",
    F14 postgres "a worker with its clock off by an hour",
    F15 both "handlers that hold every connection for longer than the lease",
    F18 both "handlers that panic, block for ever, ignore cancellation, abort the process",
    F19 both "SIGTERM with a deadline shorter than the handler; a second SIGTERM",
    F22 sqlite "SQLite: kill, second processes, BUSY, FULL",
    F24 both "one id from 8 connections at once, also with another body",
    // New ones come at the end: the place is part of the seed of a fault's dice.
    F8 postgres "LISTEN connections silently dead",
    F9 postgres "storms of NOTIFY",
    F11 postgres "statement, lock and idle timeouts of 50 to 100 ms",
    F17 postgres "an old snapshot held open, and a writer that idles",
    F16 both "a disk that gets full, and has room again",
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id())
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Fault, String> {
        Fault::ALL.iter().copied().find(|f| f.id().eq_ignore_ascii_case(text.trim())).ok_or_else(|| {
            let known: Vec<_> = Fault::ALL.iter().map(|f| f.id()).collect();
            format!("there is no fault `{}`; give `all`, `none` or some of {}", text.escape_debug(), known.join(","))
        })
    }
}

/// Which faults a run wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wanted {
    All,
    Some(Vec<Fault>),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Wanted, String> {
        match text {
            "all" => Ok(Wanted::All),
            "none" => Ok(Wanted::Some(Vec::new())),
            list => list.split(',').map(str::parse).collect::<Result<_, _>>().map(Wanted::Some),
        }
    }
}

impl Wanted {
    /// Those that there are on this store; one that was named and is not there is an error.
    pub(crate) fn on(&self, kind: Kind) -> Result<Vec<Fault>, String> {
        match self {
            Wanted::All => Ok(Fault::ALL.iter().copied().filter(|f| f.applies_to(kind)).collect()),
            Wanted::Some(list) => match list.iter().find(|f| !f.applies_to(kind)) {
                Some(fault) => Err(format!("{fault} ({}) does not exist on {kind}", fault.what())),
                None => {
                    let mut list = list.clone();
                    list.sort();
                    list.dedup();
                    Ok(list)
                }
            },
        }
    }
}

/// The named points at which workers are killed.
pub(crate) const WORKER_POINTS: &[&str] = &[
    "claimed",
    "attempt-committed",
    "request-sent",
    "reply-received",
    "outcome-commit-sent",
    "reconciling",
    "resolving",
    "draining",
    "retention",
];

/// The named points at which publishers are killed.
pub(crate) const PUBLISHER_POINTS: &[&str] = &["before-insert", "before-commit", "commit-sent"];

/// The named points at which those who pull are killed: leased and not handed out, handed out, and
/// with their COMMIT sent.
pub(crate) const PULLER_POINTS: &[&str] = &["pull-leased", "pulled", "pull-commit-sent"];

/// Other named points, each reached in a process of its own. A point of retention belongs here, too.
pub(crate) const OTHER_POINTS: &[&str] = &["migrating"];

/// What the COMMIT is for that F3 cuts.
pub(crate) const COMMITS: &[&str] = &["publish", "claim", "flush", "outcome", "resolution"];

/// What PostgreSQL says when a statement, a lock or an idle transaction took too long.
pub(crate) const TIMEOUTS: &[&str] = &["57014", "55P03", "25P03"];

impl Fault {
    /// Smaller parts, `F3:outcome:before`: only in a long run each has its turn.
    pub(crate) fn small_parts(self) -> Vec<String> {
        match self {
            Fault::F3 => COMMITS.iter().flat_map(|of| [format!("{of}:before"), format!("{of}:after")]).collect(),
            // The worker behind the proxy dies often, and may not come to work while nothing is heard.
            Fault::F8 => vec!["worked".to_owned()],
            Fault::F17 => vec!["delivered:1000".to_owned()],
            Fault::F16 => vec!["worker:resumed".to_owned()],
            _ => Vec::new(),
        }
    }

    /// What it is made of: each is counted by itself, as `F1:claimed`.
    pub(crate) fn parts(self, kind: Kind) -> Vec<&'static str> {
        match self {
            Fault::F1 => [WORKER_POINTS, PUBLISHER_POINTS, PULLER_POINTS, OTHER_POINTS, &["random"]].concat(),
            Fault::F3 => vec!["before", "after"],
            Fault::F5 => vec!["publish", "publish_now", "status", "list", "next"],
            Fault::F8 => vec!["frozen"],
            Fault::F11 => TIMEOUTS.to_vec(),
            Fault::F12 => vec!["40001", "40P01"],
            // SQLite's processes do not go down of it.
            Fault::F16 if kind == Kind::Sqlite => vec!["refused"],
            Fault::F16 => vec!["refused", "panic"],
            Fault::F18 => vec!["panic", "block", "ignore", "abort"],
            Fault::F19 => vec!["deadline", "second"],
            Fault::F22 => vec!["kill", "busy", "stale", "full"],
            Fault::F24 => vec!["conflict"],
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_keeps_its_place() {
        let places = [Fault::F1, Fault::F6, Fault::F15, Fault::F24, Fault::F16].map(|fault| fault as u64);
        assert_eq!(places, [0, 5, 10, 14, 19], "another place would move the schedule of every seed");
    }

    #[test]
    fn lists_are_read() {
        let all = Wanted::All.on(Kind::Sqlite).expect("all");
        assert!(all.contains(&Fault::F22) && !all.contains(&Fault::F4));
        assert_eq!("none".parse::<Wanted>().expect("none").on(Kind::Sqlite), Ok(vec![]));
        assert_eq!("f2,F1".parse::<Wanted>().expect("a list").on(Kind::Postgres), Ok(vec![Fault::F1, Fault::F2]));
        assert!("F4".parse::<Wanted>().expect("a list").on(Kind::Sqlite).is_err());
        assert!("F99".parse::<Wanted>().is_err());
    }
}
