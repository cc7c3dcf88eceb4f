//! Bugs that are planted on purpose, to see that the tests catch them: in builds with the feature
//! `planted-bugs` only. Elsewhere `planted!` is the word `false`, and nothing of this is compiled.

/// Whether this bug is planted now.
#[cfg(feature = "planted-bugs")]
macro_rules! planted {
    ($bug:literal) => {
        $crate::planted::is($bug)
    };
}

#[cfg(not(feature = "planted-bugs"))]
macro_rules! planted {
    ($bug:literal) => {
        false
    };
}

pub(crate) use planted;

#[cfg(feature = "planted-bugs")]
pub(crate) use bugs::is;
#[cfg(all(feature = "planted-bugs", test))]
pub(crate) use bugs::with;
#[cfg(feature = "planted-bugs")]
pub use bugs::{BUGS, Bug};

#[cfg(feature = "planted-bugs")]
mod bugs {
    use std::cell::Cell;
    use std::sync::OnceLock;

    /// A bug that can be planted: its name in `POSTBOX_PLANTED`.
    #[derive(Debug, Clone, Copy)]
    pub struct Bug {
        /// Its name.
        pub name: &'static str,
        /// What is wrong with it.
        pub what: &'static str,
        /// The test binary that catches it, and the test in it: on each store where it can be.
        pub caught_by: (&'static str, &'static str),
    }

    const fn bug(name: &'static str, what: &'static str, binary: &'static str, test: &'static str) -> Bug {
        Bug { name, what, caught_by: (binary, test) }
    }

    /// In the decisions: seen by the simulation.
    const fn decided(name: &'static str, what: &'static str) -> Bug {
        bug(name, what, "simulation", "seeds")
    }

    /// All of them.
    pub const BUGS: [Bug; 25] = [
        decided("call-before-start", "an operation is called before its attempt is committed"),
        decided("start-without-lease", "attempts whose start was fenced are made all the same"),
        decided("no-last-look", "a worker that slept through its lease calls without looking at the clock"),
        decided("lost-operation-retried", "an operation whose worker died is tried again, blindly"),
        decided("unseen-end-retried", "an operation that panicked or timed out is tried again, blindly"),
        decided("not-done-believed-at-once", "the remote's \"not done\" is believed while a call may be on its way"),
        decided("quiet-without-lease", "the quiet period forgets that the old worker may only be paused"),
        decided("late-outcome-overwrites", "a late outcome ends the doubt of another attempt"),
        decided("unknown-commit-failed", "a flush whose answer was lost is taken for failed and written anew"),
        decided("settled-before-commit", "an outcome is taken for written when it is sent, not when it is committed"),
        decided("attempts-reset-at-release", "what is handed back at a stop begins to count again"),
        decided("lost-counted", "an attempt that nobody knows of is counted when its worker dies"),
        decided("attempts-without-end", "the limit of attempts is not looked at"),
        decided("disown-what-began", "an unknown lease is handed back though something of it has begun"),
        bug(
            "settle-without-lease",
            "a flush does not look for its lease",
            "store_suite",
            "a_settle_counts_once_and_needs_its_lease",
        ),
        bug(
            "part-written-twice",
            "a repeated flush is written again",
            "store_suite",
            "a_settle_counts_once_and_needs_its_lease",
        ),
        bug(
            "dedup-conflict-swallowed",
            "another body under the same dedup key is taken for the same",
            "store_suite",
            "a_dedup_key_makes_one_row_from_eight_connections",
        ),
        bug(
            "due-by-a-clients-clock",
            "what is due goes by a clock that is an hour fast",
            "store_suite",
            "nothing_starts_before_it_is_due",
        ),
        bug(
            "takeover-by-age",
            "a lease is taken over when it is old, not when its worker is dead",
            "races",
            "a_slow_worker_that_lives_is_left_alone",
        ),
        bug(
            "takeover-reads-first",
            "a takeover reads what a lease holds before it has locked it",
            "races",
            "a_settle_that_commits_while_a_takeover_waits_is_seen",
        ),
        bug(
            "sequence-as-cursor",
            "a claim goes on from the highest position it has seen",
            "races",
            "what_commits_late_is_not_passed_over",
        ),
        bug(
            "backfill-without-waiting",
            "history is handed out without waiting for publishers in flight",
            "races",
            "history_waits_for_publishers_in_flight",
        ),
        bug(
            "follow-ups-apart",
            "what follows is published in a transaction of its own",
            "races",
            "a_fenced_flush_publishes_nothing",
        ),
        bug(
            "effects-before-outcome",
            "a handler's transaction commits before its outcome is written",
            "races",
            "a_fenced_transaction_leaves_no_effect",
        ),
        bug(
            "claim-without-life",
            "a worker that was taken over can claim",
            "store_suite",
            "a_taken_over_worker_is_told",
        ),
    ];

    thread_local! {
        static HERE: Cell<Option<&'static str>> = const { Cell::new(None) };
    }

    /// What `POSTBOX_PLANTED` names, for the whole process.
    fn everywhere() -> Option<&'static str> {
        static NAMED: OnceLock<Option<String>> = OnceLock::new();
        let named = NAMED.get_or_init(|| {
            let named = std::env::var("POSTBOX_PLANTED").ok().filter(|name| !name.is_empty());
            if let Some(name) = &named {
                assert!(BUGS.iter().any(|bug| bug.name == name), "there is no planted bug `{name}`");
                tracing::warn!(name, "a bug is planted in this process");
            }
            named
        });
        named.as_deref()
    }

    pub(crate) fn is(bug: &str) -> bool {
        debug_assert!(BUGS.iter().any(|known| known.name == bug), "`{bug}` is not in the list");
        HERE.get().or_else(everywhere) == Some(bug)
    }

    /// Runs with a bug planted in this thread only.
    #[cfg(test)]
    pub(crate) fn with<T>(bug: &'static str, run: impl FnOnce() -> T) -> T {
        struct Back;
        impl Drop for Back {
            fn drop(&mut self) {
                HERE.set(None);
            }
        }
        HERE.set(Some(bug));
        let _back = Back;
        run()
    }
}
