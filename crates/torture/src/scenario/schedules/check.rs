//! Which ticks there must be around a change of the clocks, and whether each fired once.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use jiff::tz::{TimeZone, TimeZoneDatabase};

use super::Wanted;

/// A moment at which the clocks of a zone change by an hour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) zone: String,
    /// Seconds since 1970.
    pub(crate) at: i64,
    /// They jump forward: an hour does not exist. Otherwise an hour comes twice.
    pub(crate) forward: bool,
    /// The hour that does not exist, or comes twice.
    pub(crate) hour: i8,
}

impl Change {
    /// The next one of this kind.
    pub(crate) fn next(zone: &str, forward: bool, now: Timestamp) -> Result<Change, String> {
        let clock: TimeZone = TimeZoneDatabase::bundled().get(zone).map_err(|e| e.to_string())?;
        let offset = |at: Timestamp| i64::from(clock.to_offset(at).seconds());
        for change in clock.following(now).take(8) {
            let at = change.timestamp();
            let before = at - jiff::SignedDuration::from_secs(1);
            let jump = offset(at) - offset(before);
            if jump.abs() == 3600 && (jump > 0) == forward {
                // What a clock that nobody has set shows then: forward it is left out; back, the hour before it is repeated.
                let hour = (at.as_second() + offset(before)).div_euclid(3600).rem_euclid(24);
                let hour = if forward { hour } else { (hour + 23) % 24 };
                return Ok(Change { zone: zone.to_owned(), at: at.as_second(), forward, hour: hour as i8 });
            }
        }
        Err(format!("the clocks of {zone} do not change by an hour"))
    }

    /// What is declared: one that is busy, two with intervals, and one with times of the day that are concerned.
    pub(crate) fn schedules(&self, prefix: &str) -> Vec<Wanted> {
        let hour = self.hour;
        let all = [
            ("seconds", "* * * * * *".to_owned()),
            ("hourly", "0 * * * *".to_owned()),
            ("quarters", format!("*/15 {hour} * * *")),
            ("fixed", format!("0,30 {hour} * * *")),
        ];
        let wanted = |(name, cron): (&str, String)| Wanted {
            name: format!("{prefix}{name}"),
            cron,
            time_zone: self.zone.clone(),
        };
        all.into_iter().map(wanted).collect()
    }

    /// The ticks of one of them after `from`, up to `to`, both less than a quarter of an hour from the change: by
    /// the table in docs/schedules.md, not by what postbox computes.
    fn ticks(&self, name: &str, from: i64, to: i64) -> BTreeSet<i64> {
        let fires = match name {
            "seconds" => return (from + 1..=to).collect(),
            "hourly" => true,
            // Intervals: what does not exist is left out, and what comes twice is twice.
            "quarters" => !self.forward,
            // Times of the day: at the jump, or the first time only, which was an hour before.
            _ => self.forward,
        };
        (fires && self.at > from && self.at <= to).then_some(self.at).into_iter().collect()
    }
}

/// A message of a tick, or a call about one: the schedule, the tick and the message's id.
pub(crate) type Tick = (String, i64, String);

/// Reads the calls about ticks from the remote's log.
pub(crate) fn calls(log: &str, prefix: &str) -> Vec<Tick> {
    let call = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let ["note", what, _, _, _, id, ..] = words.as_slice() else { return None };
        let (name, tick) = what.strip_prefix(prefix)?.split_once('@')?;
        Some((name.to_owned(), tick.parse::<Timestamp>().ok()?.as_second(), plain(id)))
    };
    log.lines().filter_map(call).collect()
}

/// An id as both stores write it.
pub(crate) fn plain(id: &str) -> String {
    id.replace('-', "").to_lowercase()
}

/// What is wrong with the ticks up to a time. The first must be there by `begun`.
pub(crate) fn judge(change: &Change, ticks: &[Tick], calls: &[Tick], begun: i64, to: i64) -> Vec<String> {
    let mut broken = Vec::new();
    let own = |name: &str| ticks.iter().filter(|(of, ..)| of == name).cloned().collect::<Vec<_>>();
    let Some(first) = own("seconds").iter().map(|(_, tick, _)| *tick).min() else {
        return vec!["schedules: no tick at all".into()];
    };
    if first > begun {
        broken.push(format!("schedules: the first tick is {first}, and they were declared before {begun}"));
    }
    for Wanted { name, cron, .. } in change.schedules("") {
        let expected = change.ticks(&name, first - 1, to);
        let mut fired: BTreeMap<i64, Vec<String>> = BTreeMap::new();
        for (_, tick, id) in own(&name).into_iter().filter(|(_, tick, _)| *tick <= to) {
            fired.entry(tick).or_default().push(id);
        }
        let missed: Vec<i64> = expected.iter().copied().filter(|tick| !fired.contains_key(tick)).collect();
        let twice = fired.iter().filter(|(_, ids)| ids.len() > 1).map(|(tick, _)| *tick).collect();
        let unwanted = fired.keys().copied().filter(|tick| !expected.contains(tick)).collect();
        let called =
            |tick: &i64, ids: &[String]| calls.iter().any(|(of, at, id)| *of == name && at == tick && ids.contains(id));
        let unheard = fired.iter().filter(|(tick, ids)| !called(tick, ids)).map(|(tick, _)| *tick).collect();
        let kinds: [(&str, Vec<i64>); 4] = [
            ("missed", missed),
            ("fired more than once", twice),
            ("fired and should not have", unwanted),
            ("published, and no handler came to know of it", unheard),
        ];
        for (what, ticks) in kinds.into_iter().filter(|(_, ticks)| !ticks.is_empty()) {
            let shown: Vec<String> = ticks.iter().take(5).map(|tick| at(change, *tick)).collect();
            let count = ticks.len();
            broken.push(format!("schedules: {name} (`{cron}`, {}): {count} {what}: {}", change.zone, shown.join(", ")));
        }
    }
    let there: BTreeSet<(&str, i64, &str)> = ticks.iter().map(|(name, tick, id)| (&**name, *tick, &**id)).collect();
    if let Some((name, tick, _)) = calls.iter().find(|(name, tick, id)| !there.contains(&(&**name, *tick, &**id))) {
        broken.push(format!("schedules: {name}: a handler was called for {}, which is no message", at(change, *tick)));
    }
    broken
}

/// A tick by its distance from the change.
fn at(change: &Change, tick: i64) -> String {
    format!("{tick} ({:+} s)", tick - change.at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn berlin(forward: bool) -> Change {
        let now = "2026-11-28T12:00:00Z".parse().expect("a time");
        Change::next("Europe/Berlin", forward, now).expect("they change there")
    }

    #[test]
    fn changes_are_found() {
        let time = |text: &str| text.parse::<Timestamp>().expect("a time").as_second();
        let spring = berlin(true);
        assert_eq!((spring.at, spring.hour), (time("2027-03-28T01:00:00Z"), 2));
        let autumn = berlin(false);
        assert_eq!((autumn.at, autumn.hour), (time("2027-10-31T01:00:00Z"), 2));
        for zone in super::super::ZONES {
            for forward in [true, false] {
                let change = Change::next(zone, forward, "2026-11-28T12:00:00Z".parse().expect("a time"));
                assert_eq!(change.expect("they change there").forward, forward);
            }
        }
        assert!(Change::next("UTC", true, Timestamp::UNIX_EPOCH).is_err());
    }

    /// What fires if all goes well, from five seconds before the change to five after it.
    fn well(change: &Change) -> Vec<Tick> {
        let mut ticks = Vec::new();
        for wanted in change.schedules("") {
            for tick in change.ticks(&wanted.name, change.at - 6, change.at + 5) {
                ticks.push((wanted.name.clone(), tick, format!("{}{tick}", wanted.name)));
            }
        }
        ticks
    }

    #[test]
    fn what_fires_once_is_well() {
        for forward in [true, false] {
            let change = berlin(forward);
            let ticks = well(&change);
            assert_eq!(ticks.len(), 11 + 2, "each second, at the hour, and one of the others");
            assert_eq!(judge(&change, &ticks, &ticks, change.at - 5, change.at + 5), Vec::<String>::new());
        }
    }

    #[test]
    fn each_fault_is_seen() {
        let change = berlin(true);
        let good = well(&change);
        let found =
            |ticks: &[Tick], calls: &[Tick]| judge(&change, ticks, calls, change.at - 5, change.at + 5).join("; ");
        let without =
            |at: usize| good.iter().enumerate().filter(|(n, _)| *n != at).map(|(_, t)| t.clone()).collect::<Vec<_>>();
        assert!(found(&without(3), &without(3)).contains("1 missed"));
        assert!(found(&without(0), &without(0)).contains("the first tick"));
        assert!(found(&good, &without(3)).contains("no handler"));
        assert!(found(&without(3), &good).contains("is no message"));
        let again = [&good[..], &[(good[3].0.clone(), good[3].1, "another".into())]].concat();
        assert!(found(&again, &again).contains("more than once"));
        let unwanted = [&good[..], &[("quarters".into(), change.at, "q".into())]].concat();
        assert!(found(&unwanted, &unwanted).contains("should not have"));
        assert!(found(&[], &[]).contains("no tick at all"));
    }

    #[test]
    fn calls_are_read() {
        let log = "note s1-fixed@2027-03-28T01:00:00Z 7 1 0 0195-AB 12 done\nnote s2-fixed@2027-03-28T01:00:00Z 7 1 0 x 1 done\nsynced";
        let change = berlin(true);
        assert_eq!(calls(log, "s1-"), [("fixed".to_owned(), change.at, "0195ab".to_owned())]);
    }
}
