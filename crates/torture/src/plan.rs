//! The schedule: what is done to whom and when, from the seed alone.

use std::time::Duration;

use crate::fault::{Fault, Kind, OTHER_POINTS};
use crate::full::LONGEST;
use crate::proxy::{ABOUTS, Cut, When};

/// Something that is done to the world.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    /// kill -9 of a child.
    Kill(Child),
    /// SIGSTOP of a worker for this long.
    Pause(usize, Duration),
    /// SIGTERM of a worker, and a second one this much later, if it is still there.
    Terminate(usize, Duration),
    Cut(Cut),
    /// pg_terminate_backend of so many.
    EndBackends(u32),
    /// PostgreSQL stops in immediate mode, and starts again after this long.
    Crash(Duration),
    /// A process of its own is killed at a named point.
    Point(&'static str),
    /// Who listens behind the proxy hears nothing for this long.
    Deafen(Duration),
    /// So many notifications in a transaction that stays open for this long.
    Storm(u32, Duration),
    /// Nobody writes to this table for this long.
    Lock(&'static str, Duration),
    /// An old snapshot for this long, and whether a writer idles beside it.
    OldSnapshot(Duration, bool),
    /// A disk is full for this long: the one of the write-ahead log, where that has one, or the other one.
    Full {
        wal: bool,
        time: Duration,
    },
}

/// A child process of the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Child {
    Worker(usize),
    Publisher(usize),
    Puller(usize),
}

/// How many children of each kind the schedule knows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Crew {
    pub(crate) workers: usize,
    pub(crate) publishers: usize,
    pub(crate) pullers: usize,
}

/// Tables that are locked now and then, so that others wait for them.
const LOCKED: &[&str] = &["ready", "lease", "message", "attempt", "worker"];

/// What a fault does next, for the how manieth time, and how long it rests after.
fn action(fault: Fault, nth: usize, dice: &mut fastrand::Rng, crew: Crew) -> Option<(Duration, Action)> {
    let Crew { workers, publishers, pullers } = crew;
    let ms = Duration::from_millis;
    let some = match fault {
        Fault::F1 => match dice.u32(..10) {
            0..6 => (ms(dice.u64(1000..4000)), Action::Kill(Child::Worker(dice.usize(..workers)))),
            6 => (ms(dice.u64(1000..4000)), Action::Kill(Child::Publisher(dice.usize(..publishers)))),
            7 => (ms(dice.u64(1000..4000)), Action::Kill(Child::Puller(dice.usize(..pullers)))),
            _ => (ms(dice.u64(1000..4000)), Action::Point(OTHER_POINTS[dice.usize(..OTHER_POINTS.len())])),
        },
        // Longer than the lease, and a good deal shorter than what a "not done" waits for.
        Fault::F2 => (ms(dice.u64(1500..5000)), Action::Pause(dice.usize(..workers), ms(dice.u64(2800..3600)))),
        Fault::F3 => {
            let when = if dice.bool() { When::Before } else { When::After };
            (ms(dice.u64(100..900)), Action::Cut(Cut { when, about: ABOUTS[dice.usize(..ABOUTS.len())] }))
        }
        Fault::F4 => (ms(dice.u64(200..2000)), Action::EndBackends(dice.u32(1..4))),
        Fault::F6 => {
            let away = if dice.u32(..5) == 0 { dice.u64(4000..10_000) } else { dice.u64(1000..3000) };
            (ms(dice.u64(8000..25_000)), Action::Crash(ms(away)))
        }
        Fault::F19 => (ms(dice.u64(1000..3000)), Action::Terminate(dice.usize(..workers), ms(dice.u64(100..700)))),
        Fault::F8 => (ms(dice.u64(8000..13_000)), Action::Deafen(ms(dice.u64(3000..8000)))),
        Fault::F9 => {
            let open = if dice.u32(..3) == 0 { dice.u64(500..3000) } else { 0 };
            (ms(dice.u64(1500..6000)), Action::Storm(dice.u32(1000..5000), ms(open)))
        }
        Fault::F11 => (ms(dice.u64(600..2500)), Action::Lock(LOCKED[dice.usize(..LOCKED.len())], ms(150))),
        Fault::F17 => {
            let time = ms(dice.u64(10_000..40_000));
            (time + ms(dice.u64(1000..4000)), Action::OldSnapshot(time, dice.bool()))
        }
        Fault::F16 => {
            let time = ms(dice.u64(1500..4000));
            (LONGEST + ms(dice.u64(10_000..20_000)), Action::Full { wal: nth % 2 == 1, time })
        }
        _ => return None,
    };
    Some(some)
}

/// Everything that happens within this time, in order. A fault comes at least once, early.
pub(crate) fn schedule(seed: u64, faults: &[Fault], kind: Kind, span: Duration, crew: Crew) -> Vec<(Duration, Action)> {
    let mut schedule = Vec::new();
    for fault in faults.iter().filter(|f| f.applies_to(kind)) {
        // A stream of dice for each fault: leaving one out does not move the others.
        let mut dice = fastrand::Rng::with_seed(seed ^ (*fault as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut at = Duration::from_millis(dice.u64(300..2000));
        for nth in 0.. {
            let Some((rest, action)) = action(*fault, nth, &mut dice, crew).filter(|_| at < span) else { break };
            schedule.push((at, action));
            at += rest;
        }
    }
    schedule.sort_by_key(|(at, _)| *at);
    schedule
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_schedule() {
        let crew = Crew { workers: 5, publishers: 2, pullers: 1 };
        let plan = |seed| schedule(seed, Fault::ALL, Kind::Postgres, Duration::from_secs(60), crew);
        assert_eq!(plan(7), plan(7));
        assert_ne!(plan(7), plan(8));
        assert!(plan(7).windows(2).all(|pair| pair[0].0 <= pair[1].0));
        let first = ["Kill", "Pause", "Cut", "EndBackends", "Crash", "Terminate", "Point"];
        for wanted in first.into_iter().chain(["Deafen", "Storm", "Lock", "OldSnapshot", "Full"]) {
            let there = plan(7).iter().any(|(_, action)| format!("{action:?}").starts_with(wanted));
            assert!(there, "{wanted} comes within a minute");
        }
        // Without F4, the others stay where they are.
        let without: Vec<Fault> = Fault::ALL.iter().copied().filter(|f| *f != Fault::F4).collect();
        let mut rest = plan(7);
        rest.retain(|(_, action)| !matches!(action, Action::EndBackends(_)));
        assert_eq!(schedule(7, &without, Kind::Postgres, Duration::from_secs(60), crew), rest);
    }

    #[test]
    fn what_lasts_ends_before_the_next_begins() {
        let crew = Crew { workers: 5, publishers: 2, pullers: 1 };
        for fault in [Fault::F8, Fault::F16, Fault::F17] {
            let plan = schedule(7, &[fault], Kind::Postgres, Duration::from_secs(3600), crew);
            let ends = |(at, action): &(Duration, Action)| match action {
                Action::Deafen(time) | Action::OldSnapshot(time, _) => *at + *time,
                Action::Full { .. } => *at + LONGEST,
                other => panic!("{fault} does {other:?}"),
            };
            assert!(plan.len() > 60 && plan.windows(2).all(|pair| ends(&pair[0]) <= pair[1].0), "{fault}");
        }
    }
}
