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

    /// A bug that can be planted.
    #[derive(Debug, Clone, Copy)]
    pub struct Bug {
        /// Its name in `POSTBOX_PLANTED`.
        pub name: &'static str,
        /// What is wrong with it.
        pub what: &'static str,
        /// The file of tests that catches it.
        pub file: &'static str,
        /// The tests in it: one for each store that can have the bug.
        pub caught_by: &'static [&'static str],
    }

    /// In the decisions: seen by the simulation.
    const fn decided(name: &'static str, what: &'static str) -> Bug {
        Bug { name, what, file: "simulation", caught_by: &["worker::core::simulation::planted_bugs_are_caught"] }
    }

    /// In the stores: seen by a story of these.
    const fn stored(name: &'static str, what: &'static str, caught_by: &'static [&'static str]) -> Bug {
        Bug { name, what, file: "store_suite", caught_by }
    }

    /// In the stores, where two transactions meet.
    const fn raced(name: &'static str, what: &'static str, caught_by: &'static [&'static str]) -> Bug {
        Bug { name, what, file: "races", caught_by }
    }

    /// Across workers: seen by the torture's scenarios.
    const fn shared(name: &'static str, what: &'static str, caught_by: &'static [&'static str]) -> Bug {
        Bug { name, what, file: "scenarios", caught_by }
    }

    /// On the way in.
    const fn received(name: &'static str, what: &'static str, caught_by: &'static [&'static str]) -> Bug {
        Bug { name, what, file: "receiving", caught_by }
    }

    /// In webhooks, on the way in.
    const fn hooked(name: &'static str, what: &'static str, caught_by: &'static [&'static str]) -> Bug {
        Bug { name, what, file: "webhooks", caught_by }
    }

    /// In webhooks and pushes, on the way out.
    const fn pushed(name: &'static str, what: &'static str, caught_by: &'static [&'static str]) -> Bug {
        Bug { name, what, file: "webhooks_out", caught_by }
    }

    const LIMITS: &[&str] = &["limits_are_kept_and_used"];
    const TICKS: &[&str] = &["ticks_fire_once"];
    const ORDER: &[&str] = &["keys_are_in_order"];
    const SETTLING: &[&str] =
        &["postgres::a_settle_counts_once_and_needs_its_lease", "sqlite::a_settle_counts_once_and_needs_its_lease"];

    /// All of them.
    pub const BUGS: [Bug; 46] = [
        decided("call-before-start", "an operation is called before its attempt is committed"),
        decided("start-without-lease", "attempts whose start was fenced are made all the same"),
        decided("no-last-look", "a worker that slept through its lease calls without looking at the clock"),
        decided("lost-operation-retried", "an operation whose worker died is tried again, blindly"),
        decided("unseen-end-retried", "an operation that panicked or timed out is tried again, blindly"),
        decided("not-done-believed-at-once", "the remote's \"not done\" is believed while a call may be on its way"),
        decided("quiet-without-lease", "the quiet period forgets that the old worker may only be paused"),
        decided("unknown-commit-failed", "a flush whose answer was lost is taken for failed and written anew"),
        decided("settled-before-commit", "an outcome is taken for written when it is sent, not when it is committed"),
        decided("attempts-reset-at-release", "what is handed back at a stop begins to count again"),
        decided("lost-counted", "an attempt that nobody knows of is counted when its worker dies"),
        decided("attempts-without-end", "the limit of attempts is not looked at"),
        decided("key-per-attempt", "each attempt at an operation has an idempotency key of its own"),
        decided("undeclared-repeat", "what may have happened is called again by a worker that knows of no declaration"),
        decided(
            "dead-though-unseen",
            "an idempotent operation is given up for dead though an attempt may have happened",
        ),
        decided("success-without-follow-ups", "a first success is written the compact way, without what follows"),
        decided("evidence-without-follow-ups", "a late success ends the doubt without what follows from it"),
        stored(
            "late-outcome-overwrites",
            "a late outcome ends the doubt of another attempt",
            &["postgres::late_outcomes_are_evidence", "sqlite::late_outcomes_are_evidence"],
        ),
        stored("settle-without-lease", "a flush does not look for its lease", SETTLING),
        stored("part-written-twice", "a flush that is repeated is written again", SETTLING),
        stored(
            "dedup-conflict-swallowed",
            "another body under the same dedup key is taken for the same",
            &[
                "postgres::a_dedup_key_makes_one_row_from_eight_connections",
                "sqlite::a_dedup_key_makes_one_row_from_eight_connections",
            ],
        ),
        stored(
            "due-by-a-clients-clock",
            "a delay counts on the publisher's clock, which is an hour slow",
            &["postgres::nothing_starts_before_it_is_due", "sqlite::nothing_starts_before_it_is_due"],
        ),
        stored(
            "claim-without-life",
            "a worker that was taken over can claim",
            &["postgres::a_taken_over_worker_is_told", "sqlite::a_taken_over_worker_is_told"],
        ),
        raced(
            "takeover-by-age",
            "a lease is taken over when it is old, not when its worker is dead",
            &["a_slow_worker_that_lives_is_left_alone"],
        ),
        raced(
            "takeover-reads-first",
            "a takeover reads what a lease holds before it has locked it",
            &["a_settle_that_commits_during_a_takeover_is_seen"],
        ),
        raced(
            "sequence-as-cursor",
            "a claim goes on from the highest position that was settled",
            &["what_commits_late_is_not_passed_over"],
        ),
        raced(
            "no-sweep",
            "a claim never looks again at what lies far below its mark",
            &["what_commits_late_and_far_below_is_swept_up"],
        ),
        raced(
            "backfill-without-waiting",
            "history is handed out without waiting for publishers in flight",
            &["history_waits_for_publishers_in_flight"],
        ),
        raced(
            "disown-what-began",
            "a lease is handed back though something of it has begun",
            &["postgres::what_has_begun_is_not_handed_back", "sqlite::what_has_begun_is_not_handed_back"],
        ),
        raced(
            "follow-ups-apart",
            "what follows is published in a transaction of its own",
            &["postgres::a_fenced_flush_publishes_nothing", "sqlite::a_fenced_flush_publishes_nothing"],
        ),
        raced(
            "reborn-in-another-order",
            "a worker that was taken over declares another's operation idempotent when it comes back",
            &["a_reborn_worker_declares_the_same"],
        ),
        raced(
            "effects-before-outcome",
            "a handler's transaction commits before its outcome is written",
            &["postgres::a_fenced_transaction_leaves_no_effect", "sqlite::a_fenced_transaction_leaves_no_effect"],
        ),
        shared("limit-not-kept", "a worker begins attempts that it has no permit for", LIMITS),
        shared("rate-not-kept", "a claim takes more than the bucket had tokens", LIMITS),
        shared("lowest-starve", "deliveries of a lower priority have no share", LIMITS),
        shared("followers-go-on", "a worker goes on with a key whose delivery has failed", ORDER),
        shared("two-of-a-key", "a worker runs two of a key in order at once", ORDER),
        shared("key-not-held", "it is not on record that a key waits for a delivery that has failed", ORDER),
        shared("tick-apart", "a tick is published apart from its schedule's row, and has no dedup key", TICKS),
        shared("latest-tick-only", "of several ticks that are due only the latest is published", TICKS),
        received(
            "acknowledge-first",
            "what was read is acknowledged before it is committed",
            &["postgres::nothing_is_acknowledged_without_a_row", "sqlite::nothing_is_acknowledged_without_a_row"],
        ),
        received(
            "inbox-forgets",
            "nobody looks whether an id came before",
            &["postgres::entries_become_messages_once", "sqlite::entries_become_messages_once"],
        ),
        hooked(
            "stale-taken",
            "how old a signature is does not matter",
            &[
                "postgres::what_does_not_prove_itself_leaves_no_trace",
                "sqlite::what_does_not_prove_itself_leaves_no_trace",
            ],
        ),
        hooked(
            "identity-not-signed",
            "headers that nobody signed say which message a webhook is",
            &[
                "postgres::headers_that_nobody_signed_do_not_make_another_message",
                "sqlite::headers_that_nobody_signed_do_not_make_another_message",
            ],
        ),
        Bug {
            name: "answer-first",
            what: "a webhook is answered before it is committed",
            file: "webhook_crashes",
            caught_by: &["sqlite::each_webhook_is_received_once"],
        },
        pushed(
            "no-answer-is-not-done",
            "a push that nobody answered is taken for not done",
            &[
                "postgres::an_operation_is_called_once_and_its_doubts_stay",
                "sqlite::an_operation_is_called_once_and_its_doubts_stay",
            ],
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
