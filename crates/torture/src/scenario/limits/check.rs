//! What the remote saw of limited subscriptions, and whether the limits were kept.

use std::collections::HashMap;

use super::{AT_ONCE, BURST, FEW, HIGH, LOWEST, PER, RATE};
use crate::child::LEASE;
use crate::fault::Kind;
use crate::scenario::crew::Stop;

/// A call that took its time at the remote. All times are of the machine's clock, in microseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pass {
    pub(crate) what: String,
    pub(crate) delivery: i64,
    pub(crate) process: i64,
    /// When its handler began, when it came, when its caller was gone before the end, and when it was over.
    pub(crate) begun: u64,
    pub(crate) came: u64,
    pub(crate) gone: Option<u64>,
    pub(crate) left: Option<u64>,
}

impl Pass {
    pub(crate) fn is_slow(&self) -> bool {
        self.what == HIGH || self.what == LOWEST
    }
}

/// A delivery that was claimed, as a witness in the claim's own transaction saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) subscription: String,
    pub(crate) delivery: i64,
    pub(crate) process: i64,
    /// When its token was taken, if it took one; and when that was seen.
    pub(crate) token: u64,
    pub(crate) at: u64,
}

/// Reads the remote's log, in the order in which calls came.
pub(crate) fn passes(log: &str) -> Vec<Pass> {
    let mut passes: Vec<Pass> = Vec::new();
    let mut numbers = HashMap::new();
    for line in log.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let time = words.last().and_then(|time| time.parse::<u64>().ok());
        match (words.as_slice(), time) {
            (["came", number, what, delivery, process, begun, _], Some(came)) => {
                let (Ok(delivery), Ok(process), Ok(begun)) = (delivery.parse(), process.parse(), begun.parse()) else {
                    continue;
                };
                numbers.insert((*number).to_owned(), passes.len());
                let what = (*what).to_owned();
                passes.push(Pass { what, delivery, process, begun, came, gone: None, left: None });
            }
            ([end @ ("gone" | "left"), number, _], Some(time)) => {
                let Some(pass) = numbers.get(*number).and_then(|at| passes.get_mut(*at)) else { continue };
                if *end == "gone" { &mut pass.gone } else { &mut pass.left }.replace(time);
            }
            _ => {}
        }
    }
    passes
}

/// A worker is not taken over sooner than this after its last sign of life.
fn surely_leased() -> u64 {
    (LEASE * 2 / 3).as_micros() as u64
}

/// From when to when a call counts against the limit, if it does.
///
/// Whose caller was killed counts to its end on PostgreSQL: its worker's permits are held for the rest of a
/// lease, and no call takes as long. On SQLite a dead worker is known to be dead at once.
///
/// Whose caller was stopped counts until that may have been taken over: on PostgreSQL. On SQLite it lives.
fn counts(pass: &Pass, kind: Kind, stops: &[Stop]) -> Option<(u64, u64)> {
    let mut end = pass.left.unwrap_or(u64::MAX);
    match kind {
        Kind::Sqlite => end = pass.gone.map_or(end, |gone| gone.min(end)),
        Kind::Postgres => {
            for stop in stops.iter().filter(|stop| stop.pid == pass.process) {
                if pass.begun <= stop.to && end > stop.from && stop.to - stop.from > surely_leased() {
                    end = end.min(stop.from + surely_leased());
                }
            }
        }
    }
    (pass.came < end).then_some((pass.came, end))
}

/// The most that were in progress at once, and what is wrong with that.
pub(crate) fn at_once(passes: &[Pass], kind: Kind, stops: &[Stop]) -> (u32, Option<String>) {
    let mut changes: Vec<(u64, i32, &Pass)> = Vec::new();
    for pass in passes.iter().filter(|pass| pass.what == FEW) {
        if let Some((from, to)) = counts(pass, kind, stops) {
            changes.extend([(from, 1, pass), (to, -1, pass)]);
        }
    }
    // At the same time, first who leaves.
    changes.sort_by_key(|(time, change, _)| (*time, *change));
    let (mut now, mut most, mut broken): (Vec<&Pass>, usize, Option<String>) = (Vec::new(), 0, None);
    for (time, change, pass) in changes {
        if change < 0 {
            now.retain(|other| *other != pass);
            continue;
        }
        now.push(pass);
        if now.len() > most {
            most = now.len();
            broken = (most > AT_ONCE as usize).then(|| {
                let who: Vec<String> = now.iter().map(|p| format!("{} of process {}", p.delivery, p.process)).collect();
                format!("limit: {most} of {AT_ONCE} in progress at {time}: deliveries {}", who.join(", "))
            });
        }
    }
    (most as u32, broken)
}

fn tokens_in(time_us: u64) -> f64 {
    f64::from(RATE) * time_us as f64 / PER.as_micros() as f64
}

/// The bucket, as the claims emptied it: what is wrong with that.
pub(crate) fn overdrawn(claims: &[Claim]) -> Option<String> {
    let mut taken: Vec<u64> = claims.iter().map(|claim| claim.token).collect();
    taken.sort_unstable();
    let (mut level, mut last) = (f64::from(BURST), *taken.first()?);
    for token in taken {
        level = f64::from(BURST).min(level + tokens_in(token - last)) - 1.0;
        last = token;
        if level < -0.001 {
            return Some(format!(
                "rate: a token was taken at {token} that was not there; the bucket stands at {level:.2}"
            ));
        }
    }
    None
}

/// The most that began at the remote within a time, and what is wrong with it.
///
/// What came in a window was claimed in it, or before it by as much as such a call may be late. What a
/// stopped process had claimed is left out: it comes when that goes on.
pub(crate) fn crowded(passes: &[Pass], claims: &[Claim], stops: &[Stop], window_us: u64) -> (usize, Vec<String>) {
    let mut tokens: HashMap<(i64, i64), Vec<u64>> = HashMap::new();
    for claim in claims {
        tokens.entry((claim.delivery, claim.process)).or_default().push(claim.token);
    }
    let (mut begins, mut broken) = (Vec::new(), Vec::new());
    for pass in passes.iter().filter(|pass| pass.is_slow()) {
        let own = tokens.get(&(pass.delivery, pass.process));
        let Some(token) = own.and_then(|own| own.iter().filter(|token| **token <= pass.came).max()) else {
            broken.push(format!(
                "rate: delivery {} was called by {}, which had not claimed it",
                pass.delivery, pass.process
            ));
            continue;
        };
        let stopped = |stop: &Stop| stop.pid == pass.process && stop.from <= pass.came && stop.to >= *token;
        if !stops.iter().any(stopped) {
            begins.push((pass.came, pass.came - token));
        }
    }
    begins.sort_unstable();
    let (mut most, mut end) = (0, 0);
    for (first, (came, _)) in begins.iter().enumerate() {
        while begins.get(end).is_some_and(|(other, _)| *other <= came + window_us) {
            end += 1;
        }
        let late = begins[first..end].iter().map(|(_, late)| *late).max().unwrap_or_default();
        let may = f64::from(BURST) + tokens_in(window_us + late);
        if (end - first) as f64 > may + 0.001 && broken.is_empty() {
            let window = window_us / 1000;
            broken.push(format!("rate: {} began in the {window} ms from {came} on; {may:.1} may", end - first));
        }
        most = most.max(end - first);
    }
    (most, broken)
}

/// How many ran on average from then to then: each from when its handler began, because how long a call needs to
/// get to the remote is the machine's affair.
pub(crate) fn in_use(passes: &[Pass], (from, to): (u64, u64)) -> f64 {
    let own = passes.iter().filter(|pass| pass.what == FEW);
    let time = own.map(|pass| pass.left.unwrap_or(to).min(to).saturating_sub(pass.begun.max(from)));
    time.sum::<u64>() as f64 / (to - from) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(what: &str, process: i64, came: u64, left: u64) -> Pass {
        let what = what.to_owned();
        Pass { what, delivery: came as i64, process, begun: came, came, gone: None, left: Some(left) }
    }

    const SECOND: u64 = 1_000_000;

    #[test]
    fn calls_are_read() {
        let log = "came 0 few 7 100 5 10\ncame 1 slow.low 8 100 6 11\nleft 1 12\ngone 0 13\nleft 0 14\ncame 2 fe";
        let read = passes(log);
        let first = Pass { delivery: 7, begun: 5, gone: Some(13), ..pass("few", 100, 10, 14) };
        assert_eq!((read.len(), &read[0], read[1].is_slow()), (2, &first, true));
    }

    #[test]
    fn one_too_many_is_seen() {
        let many = |count: u64| (0..count).map(|n| pass("few", 1, 10 + n, 100)).collect::<Vec<_>>();
        let mut full = many(u64::from(AT_ONCE));
        assert_eq!(at_once(&full, Kind::Postgres, &[]), (AT_ONCE, None));
        full.push(pass("few", 2, 100, 200));
        assert_eq!(at_once(&full, Kind::Postgres, &[]).0, AT_ONCE, "they have just left");
        assert!(at_once(&many(u64::from(AT_ONCE) + 1), Kind::Sqlite, &[]).1.is_some());
    }

    #[test]
    fn who_is_gone_counts_where_its_permits_are_held() {
        let mut all: Vec<Pass> = (0..u64::from(AT_ONCE)).map(|n| pass("few", 1, 10 + n, 100)).collect();
        all[0].gone = Some(50);
        all.push(pass("few", 2, 60, 90));
        assert_eq!(at_once(&all, Kind::Sqlite, &[]), (AT_ONCE, None));
        assert!(at_once(&all, Kind::Postgres, &[]).1.is_some());
    }

    #[test]
    fn who_was_stopped_for_a_lease_is_excused_for_what_had_begun() {
        let mut all: Vec<Pass> = (0..u64::from(AT_ONCE)).map(|n| pass("few", 1, 10 + n, 5 * SECOND)).collect();
        let stop = Stop { pid: 2, from: SECOND, to: 4 * SECOND };
        // Begun before the stop, and sent after it.
        all.push(Pass { begun: SECOND - 5, ..pass("few", 2, 4 * SECOND + 1, 5 * SECOND) });
        assert_eq!(at_once(&all, Kind::Postgres, &[stop]), (AT_ONCE, None));
        assert!(at_once(&all, Kind::Sqlite, &[stop]).1.is_some(), "it lives there");
        all.push(pass("few", 2, 4 * SECOND + 2, 5 * SECOND));
        assert!(at_once(&all, Kind::Postgres, &[stop]).1.is_some(), "it began after the stop");
        let short = Stop { pid: 2, from: 4 * SECOND - 10, to: 4 * SECOND };
        assert!(at_once(&all, Kind::Postgres, &[short]).1.is_some(), "nobody took it over");
    }

    fn claims(times: &[u64]) -> Vec<Claim> {
        let claim = |time: &u64| Claim {
            subscription: "slow".into(),
            delivery: *time as i64,
            process: 1,
            token: *time,
            at: *time,
        };
        times.iter().map(claim).collect()
    }

    #[test]
    fn a_token_that_was_not_there_is_seen() {
        let burst: Vec<u64> = std::iter::repeat_n(SECOND, BURST as usize).collect();
        assert_eq!(overdrawn(&claims(&burst)), None);
        let next = SECOND + PER.as_micros() as u64 / u64::from(RATE);
        assert_eq!(overdrawn(&claims(&[&burst[..], &[next + 1]].concat())), None);
        assert!(overdrawn(&claims(&[&burst[..], &[next - 100]].concat())).is_some());
    }

    #[test]
    fn a_crowd_is_seen() {
        let times: Vec<u64> = (0..u64::from(BURST + RATE)).map(|n| SECOND + n * 100).collect();
        let calls: Vec<Pass> = times.iter().map(|at| pass("slow.high", 1, *at, at + 10)).collect();
        let (most, broken) = crowded(&calls, &claims(&times), &[], SECOND);
        assert_eq!((most, broken), (times.len(), vec![]));
        let more: Vec<u64> = (0..u64::from(BURST + RATE) + 1).map(|n| SECOND + n * 100).collect();
        let calls: Vec<Pass> = more.iter().map(|at| pass("slow.low", 1, *at, at + 10)).collect();
        assert_eq!(crowded(&calls, &claims(&more), &[], SECOND).1.len(), 1);
        let (_, unclaimed) = crowded(&calls, &claims(&more[1..]), &[], SECOND);
        assert!(unclaimed[0].contains("had not claimed"), "{unclaimed:?}");
        let stop = Stop { pid: 1, from: 0, to: 2 * SECOND };
        assert_eq!(crowded(&calls, &claims(&more), &[stop], SECOND), (0, vec![]), "they come when it goes on");
    }

    #[test]
    fn use_is_an_average() {
        let calls = [pass("few", 1, 0, 100), pass("few", 1, 50, 200), pass("slow.low", 1, 0, 100)];
        assert!((in_use(&calls, (0, 100)) - 1.5).abs() < 1e-9);
        assert!((in_use(&calls, (100, 300)) - 0.5).abs() < 1e-9);
    }
}
