//! When the ticks are: a cron expression and a time zone, and nothing of this machine.

use std::str::FromStr;
use std::sync::OnceLock;

use croner::Cron;
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone, TimeZoneDatabase};
use jiff::{SignedDuration, Timestamp};

use crate::error::Error;

const SECOND: SignedDuration = SignedDuration::from_secs(1);

/// The zones come with the program: workers of one version agree on them, whatever their machines have.
fn zones() -> &'static TimeZoneDatabase {
    static ZONES: OnceLock<TimeZoneDatabase> = OnceLock::new();
    ZONES.get_or_init(TimeZoneDatabase::bundled)
}

/// The time zone of that name.
pub(super) fn zone(name: &str) -> Result<TimeZone, Error> {
    zones().get(name).map_err(|_| {
        Error::Settings(format!(
            "there is no time zone `{}`; give an IANA name, like Europe/Berlin, America/New_York or UTC",
            name.escape_debug()
        ))
    })
}

/// A cron expression in the clock of a time zone.
///
/// Days and hours are of that clock, which jumps twice a year. As Vixie cron has it: an expression without
/// `*` in its hours, minutes and seconds means times of the day. Such a time that does not exist is at the
/// moment of the jump, and one that exists twice is the first. With a `*` it means intervals, and these go on
/// as the time does: what does not exist is left out, and what exists twice is twice.
#[derive(Debug)]
pub(crate) struct Calendar {
    cron: Cron,
    zone: TimeZone,
    /// It means times of the day.
    fixed: bool,
}

impl Calendar {
    pub(crate) fn of(cron: &str, time_zone: &str) -> Result<Calendar, Error> {
        let zone = zone(time_zone)?;
        let wrong = |why: &str| {
            Error::Settings(format!(
                "`{}` is no cron expression: {why}; write minute, hour, day of month, month and day of week, like `0 3 * * *`",
                cron.escape_debug()
            ))
        };
        let fields: Vec<&str> = cron.split_whitespace().collect();
        let fixed = match fields.as_slice() {
            [name] if name.starts_with('@') => !name.eq_ignore_ascii_case("@hourly"),
            [_, _, _, _, _] => means_times(&fields[..2]),
            [_, _, _, _, _, _] => means_times(&fields[..3]),
            other => return Err(wrong(&format!("it has {} fields, not 5 (or 6, with seconds first)", other.len()))),
        };
        // Longer ones say nothing more, and would take long to be read.
        if cron.len() > 1000 {
            return Err(wrong("it is longer than 1000 bytes"));
        }
        let parsed = Cron::from_str(cron.trim()).map_err(|e| wrong(&e.to_string()))?;
        let calendar = Calendar { cron: parsed, zone, fixed };
        match calendar.after(Timestamp::UNIX_EPOCH) {
            Some(_) => Ok(calendar),
            None => Err(wrong("there is no such day")),
        }
    }

    pub(crate) fn zone(&self) -> &TimeZone {
        &self.zone
    }

    /// The first tick after that time, if one is to come at all.
    pub(crate) fn after(&self, time: Timestamp) -> Option<Timestamp> {
        match self.fixed {
            true => self.time_after(time),
            false => self.interval_after(time),
        }
    }

    fn time_after(&self, time: Timestamp) -> Option<Timestamp> {
        let mut clock = self.zone.to_datetime(time);
        loop {
            clock = self.on_the_clock(clock)?;
            let tick = self.moment(clock)?;
            // Not so: another time of the same jump, or one that is past for the second time.
            if tick > time {
                return Some(tick);
            }
        }
    }

    fn interval_after(&self, time: Timestamp) -> Option<Timestamp> {
        // From change to change the clock goes evenly.
        let (mut begin, mut offset) = (time, self.zone.to_offset(time));
        let mut clock = offset.to_datetime(time);
        loop {
            let tick = offset.to_timestamp(self.on_the_clock(clock)?).ok()?;
            let Some(change) = self.zone.following(begin).next().filter(|change| change.timestamp() <= tick) else {
                return Some(tick);
            };
            (begin, offset) = (change.timestamp(), change.offset());
            // The moment of the change may be a tick itself.
            clock = offset.to_datetime(begin).checked_sub(SECOND).ok()?;
        }
    }

    /// When the clock shows that: at the jump, if it never does; the first time, if it does so twice.
    fn moment(&self, clock: DateTime) -> Option<Timestamp> {
        match self.zone.to_ambiguous_timestamp(clock).offset() {
            AmbiguousOffset::Unambiguous { offset } => offset.to_timestamp(clock).ok(),
            AmbiguousOffset::Fold { before, .. } => before.to_timestamp(clock).ok(),
            AmbiguousOffset::Gap { after, .. } => {
                // By the clock after the jump, this lies shortly before it.
                let jump = self.zone.following(after.to_timestamp(clock).ok()?).next()?;
                Some(jump.timestamp())
            }
        }
    }

    /// The next time on the clock's face that the expression names, whether that exists or not.
    fn on_the_clock(&self, clock: DateTime) -> Option<DateTime> {
        // In UTC every time exists once.
        let even = clock.with().subsec_nanosecond(0).build().ok()?.to_zoned(TimeZone::UTC).ok()?;
        self.cron.find_next_occurrence(&even, false).ok().map(|next| next.datetime())
    }

    /// The last tick up to that time, if `first` is one of them.
    pub(crate) fn last(&self, first: Timestamp, upto: Timestamp) -> Timestamp {
        // Ticks are on whole seconds. After the lower one there is one in time, after the higher there is none.
        let (mut low, mut high) = (first.as_second() - 1, upto.as_second());
        let in_time = |second: i64| {
            let tick = Timestamp::from_second(second).ok().and_then(|time| self.after(time));
            tick.filter(|tick| *tick <= upto)
        };
        let mut last = first;
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match in_time(middle) {
                Some(tick) => (low, last) = (middle, tick),
                None => high = middle,
            }
        }
        last
    }
}

/// The fields say which times are meant, without a `*`.
fn means_times(fields: &[&str]) -> bool {
    fields.iter().all(|field| !field.contains(['*', '?']))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticks(cron: &str, zone: &str, after: &str, count: usize) -> Vec<String> {
        let calendar = Calendar::of(cron, zone).expect("a calendar");
        let after: Timestamp = after.parse().expect("a time");
        std::iter::successors(calendar.after(after), |tick| calendar.after(*tick))
            .take(count)
            .map(|tick| tick.to_string())
            .collect()
    }

    #[test]
    fn a_time_that_does_not_exist_is_at_the_jump() {
        // 2026-03-29, Berlin: 01:59:59+01:00 is followed by 03:00:00+02:00.
        let days = ["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"];
        assert_eq!(ticks("30 2 * * *", "Europe/Berlin", "2026-03-28T00:00:00Z", 3), days);
        // Several of the jump are one, also with the time at which it ends.
        let hour = ["2026-03-28T02:00:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:00:00Z"];
        assert_eq!(
            ticks("0,30 2,3 * * *", "Europe/Berlin", "2026-03-28T01:45:00Z", 4)[..2],
            [hour[0], "2026-03-28T02:30:00Z"]
        );
        assert_eq!(
            ticks("0,30 2,3 * * *", "Europe/Berlin", "2026-03-28T03:00:00Z", 3),
            [hour[1], "2026-03-29T01:30:00Z", hour[2]]
        );
        // 2026-03-08, New York: 01:59:59-05:00 is followed by 03:00:00-04:00.
        let days = ["2026-03-07T07:30:00Z", "2026-03-08T07:00:00Z", "2026-03-09T06:30:00Z"];
        assert_eq!(ticks("30 2 * * *", "America/New_York", "2026-03-07T00:00:00Z", 3), days);
    }

    #[test]
    fn a_time_that_exists_twice_is_the_first() {
        // 2026-10-25, Berlin: 02:59:59+02:00 is followed by 02:00:00+01:00.
        let days = ["2026-10-24T00:30:00Z", "2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"];
        assert_eq!(ticks("30 2 * * *", "Europe/Berlin", "2026-10-24T00:00:00Z", 3), days);
        assert_eq!(
            ticks("0 1-3 * * *", "Europe/Berlin", "2026-10-24T22:30:00Z", 3),
            ["2026-10-24T23:00:00Z", "2026-10-25T00:00:00Z", "2026-10-25T02:00:00Z"]
        );
        // Asked in the second of the two hours.
        assert_eq!(ticks("30 2 * * *", "Europe/Berlin", "2026-10-25T01:10:00Z", 1), ["2026-10-26T01:30:00Z"]);
        // 2026-11-01, New York: 01:59:59-04:00 is followed by 01:00:00-05:00.
        let days = ["2026-10-31T05:30:00Z", "2026-11-01T05:30:00Z", "2026-11-02T06:30:00Z"];
        assert_eq!(ticks("30 1 * * *", "America/New_York", "2026-10-31T00:00:00Z", 3), days);
    }

    #[test]
    fn intervals_go_on_as_the_time_does() {
        // Every half hour, whatever the clock shows; the jump itself is one of them.
        for (zone, after) in [
            ("Europe/Berlin", "2026-03-29T00:15:00Z"),
            ("Europe/Berlin", "2026-10-24T23:45:00Z"),
            ("America/New_York", "2026-03-08T05:45:00Z"),
            ("America/New_York", "2026-11-01T04:45:00Z"),
        ] {
            let calendar = Calendar::of("*/30 * * * *", zone).expect("a calendar");
            let first = calendar.after(after.parse().expect("a time")).expect("a tick");
            let ticks: Vec<i64> =
                std::iter::successors(Some(first), |t| calendar.after(*t)).take(9).map(|t| t.as_second()).collect();
            assert!(ticks.windows(2).all(|pair| pair[1] - pair[0] == 1800), "{zone} {after}: {ticks:?}");
        }
        assert_eq!(
            ticks("@hourly", "Europe/Berlin", "2026-10-24T23:30:00Z", 4),
            ["2026-10-25T00:00:00Z", "2026-10-25T01:00:00Z", "2026-10-25T02:00:00Z", "2026-10-25T03:00:00Z"]
        );
        // Every two hours of the clock: 00, 02, 04, of which 02 is twice in autumn, and not at all in spring.
        assert_eq!(
            ticks("0 */2 * * *", "Europe/Berlin", "2026-03-28T22:30:00Z", 2),
            ["2026-03-28T23:00:00Z", "2026-03-29T02:00:00Z"]
        );
        assert_eq!(
            ticks("0 */2 * * *", "Europe/Berlin", "2026-10-24T21:30:00Z", 4),
            ["2026-10-24T22:00:00Z", "2026-10-25T00:00:00Z", "2026-10-25T01:00:00Z", "2026-10-25T03:00:00Z"]
        );
    }

    #[test]
    fn expressions_as_people_write_them() {
        let from = "2026-11-28T10:00:00.5Z";
        for (cron, next) in [
            ("* * * * *", "2026-11-28T10:01:00Z"),
            ("* * * * * *", "2026-11-28T10:00:01Z"),
            ("*/10 * * * * *", "2026-11-28T10:00:10Z"),
            ("0 3 * * *", "2026-11-29T03:00:00Z"),
            ("0 9 * * MON-FRI", "2026-11-30T09:00:00Z"),
            ("0 0 1 * *", "2026-12-01T00:00:00Z"),
            ("0 0 L * *", "2026-11-30T00:00:00Z"),
            ("0 0 29 2 *", "2028-02-29T00:00:00Z"),
            ("@daily", "2026-11-29T00:00:00Z"),
        ] {
            assert_eq!(ticks(cron, "UTC", from, 1), [next], "{cron}");
        }
        // A quarter of an hour that is not UTC's, and a zone whose clock changes by half an hour.
        assert_eq!(ticks("0 0 * * *", "Asia/Kathmandu", from, 1), ["2026-11-28T18:15:00Z"]);
        assert_eq!(ticks("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T00:00:00Z", 1), ["2026-10-03T15:30:00Z"]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |cron: &str, zone: &str| Calendar::of(cron, zone).expect_err(cron).to_string();
        assert!(refused("0 3 * * *", "Europe/Berlim").contains("no time zone `Europe/Berlim`"));
        for cron in [
            "",
            "soon",
            "0 3 * *",
            "61 * * * *",
            "0 24 * * *",
            "0 3 * * * * *",
            "* * * * FOO",
            "0 0 30 2 *",
            "-1 * * * *",
        ] {
            let words = refused(cron, "UTC");
            assert!(
                words.contains(&format!("`{cron}` is no cron expression: ")) && words.contains("like `0 3 * * *`"),
                "{words}"
            );
        }
        assert!(refused("0 0 30 2 *", "UTC").contains("no such day"));
        assert!(refused(&format!("{} * * * *", "1,".repeat(1000) + "1"), "UTC").contains("1000 bytes"));
    }

    #[test]
    fn the_last_one_is_found_however_many_there_were() {
        let time = |text: &str| text.parse::<Timestamp>().expect("a time");
        for (cron, first, upto, last) in [
            ("* * * * * *", "2016-01-01T00:00:00Z", "2026-11-28T10:00:00.25Z", "2026-11-28T10:00:00Z"),
            ("0 3 * * *", "2026-01-01T03:00:00Z", "2026-11-28T02:59:59Z", "2026-11-27T03:00:00Z"),
            ("0 3 * * *", "2026-01-01T03:00:00Z", "2026-01-01T03:00:00Z", "2026-01-01T03:00:00Z"),
            ("0 3 1 1 *", "2026-01-01T03:00:00Z", "2026-12-31T00:00:00Z", "2026-01-01T03:00:00Z"),
        ] {
            let calendar = Calendar::of(cron, "UTC").expect("a calendar");
            assert_eq!(calendar.last(time(first), time(upto)), time(last), "{cron} upto {upto}");
        }
    }
}
