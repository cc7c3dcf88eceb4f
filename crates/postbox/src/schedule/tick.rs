//! Which ticks are due, and the messages that they are.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::{Calendar, Missed, Plan, ScheduleRow};
use crate::error::{Error, PublishError};
use crate::message::{Draft, Envelope};
use crate::planted::planted;

/// What is later than this was missed.
const GRACE: SignedDuration = SignedDuration::from_secs(60);
/// How many missed ticks are published at most.
const MOST: usize = 1000;
/// How long a tick's dedup key is kept. The schedule's row says what was published; this is for one that was
/// removed and made again while the database's clock was set back.
const WINDOW: Duration = Duration::from_secs(86_400);

/// What a schedule that is due comes to.
#[derive(Debug)]
pub(crate) struct Fired {
    /// The messages, the oldest tick first.
    pub(crate) drafts: Vec<Draft>,
    /// The last tick that was published.
    pub(crate) last_at: Option<Timestamp>,
    /// The next one.
    pub(crate) next_at: Option<Timestamp>,
    /// From which tick to which they were missed and are not published.
    pub(crate) passed_over: Option<(Timestamp, Timestamp)>,
}

impl Fired {
    /// Says what is not published.
    pub(crate) fn tell(&self, row: &ScheduleRow) {
        if let Some((from, to)) = self.passed_over {
            tracing::warn!(
                application = row.application,
                schedule = row.name,
                policy = row.plan.missed.as_str(),
                published = self.drafts.len(),
                %from,
                %to,
                "ticks of a schedule were missed and are not published"
            );
        }
    }
}

/// A schedule that this version cannot publish.
pub(crate) fn tell_of(row: &ScheduleRow, error: &Error) {
    tracing::error!(
        application = row.application,
        schedule = row.name,
        %error,
        "a schedule is due and cannot be published; mend it with `postbox schedules edit`"
    );
}

/// What is due of a schedule at this time.
pub(crate) fn fire(row: &ScheduleRow, now: Timestamp) -> Result<Fired, Error> {
    let calendar = Calendar::of(&row.plan.cron, &row.plan.time_zone)?;
    let due = match row.next_at.filter(|next| *next <= now) {
        Some(next) => due(&calendar, next, now, row.plan.missed),
        None => Due { ticks: Vec::new(), passed_over: None, next: row.next_at },
    };
    let message = |tick, asked| message(&row.application, &row.name, &row.plan, tick, asked);
    let mut drafts = due.ticks.iter().map(|tick| message(*tick, false)).collect::<Result<Vec<_>, _>>()?;
    if let Some(asked_at) = row.run_at {
        drafts.push(message(asked_at, true)?);
    }
    Ok(Fired {
        drafts,
        last_at: due.ticks.last().copied().or(row.last_at),
        next_at: due.next,
        passed_over: due.passed_over,
    })
}

/// The message of a tick, or of the moment at which somebody asked for one.
pub(super) fn message(
    application: &str,
    name: &str,
    plan: &Plan,
    tick: Timestamp,
    asked: bool,
) -> Result<Draft, PublishError> {
    let mut draft = Envelope::raw(&plan.topic, plan.payload.get())?;
    draft.key = plan.key.clone();
    draft.headers = plan.headers.clone();
    let kind = if asked { "schedule-run" } else { "schedule" };
    let draft =
        draft.header("postbox-schedule", name).header("postbox-schedule-tick", tick.to_string()).occurred_at(tick);
    if planted!("tick-apart") {
        return Ok(draft);
    }
    // A name has no colon: whose it is, is what stands before it.
    Ok(draft.dedup_within(format!("{kind}:{application}:{name}:{tick}"), WINDOW))
}

#[derive(Debug, PartialEq, Eq)]
struct Due {
    ticks: Vec<Timestamp>,
    passed_over: Option<(Timestamp, Timestamp)>,
    next: Option<Timestamp>,
}

/// The ticks from `first` on that are to be published; `first` is due.
fn due(calendar: &Calendar, first: Timestamp, now: Timestamp, missed: Missed) -> Due {
    let next = calendar.after(now);
    let in_time = now.checked_sub(GRACE).unwrap_or(Timestamp::MIN);
    // Of the oldest; what follows them is passed over.
    let from = |tick: Option<Timestamp>| {
        let mut ticks: Vec<Timestamp> = std::iter::successors(tick, |tick| calendar.after(*tick))
            .take_while(|t| *t <= now)
            .take(MOST + 1)
            .collect();
        let more = (ticks.len() > MOST).then(|| ticks.pop()).flatten();
        (ticks, more.map(|more| (more, calendar.last(more, now))))
    };
    if planted!("latest-tick-only") {
        return Due { ticks: vec![calendar.last(first, now)], passed_over: None, next };
    }
    if first >= in_time || missed == Missed::All {
        let (ticks, passed_over) = from(Some(first));
        return Due { ticks, passed_over, next };
    }
    if missed == Missed::Once {
        return Due { ticks: vec![calendar.last(first, now)], passed_over: None, next };
    }
    let before = in_time.checked_sub(SignedDuration::from_nanos(1)).unwrap_or(first);
    let (ticks, _) = from(calendar.after(before));
    Due { ticks, passed_over: Some((first, calendar.last(first, before))), next }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn ticks(cron: &str, first: &str, now: &str, missed: Missed) -> (Vec<String>, Option<(String, String)>, String) {
        let calendar = Calendar::of(cron, "UTC").expect("a calendar");
        let due = due(&calendar, at(first), at(now), missed);
        let passed_over = due.passed_over.map(|(from, to)| (from.to_string(), to.to_string()));
        (due.ticks.iter().map(Timestamp::to_string).collect(), passed_over, due.next.expect("a next one").to_string())
    }

    const POLICIES: [Missed; 3] = [Missed::Skip, Missed::Once, Missed::All];

    #[test]
    fn what_is_hardly_late_is_published_whatever_the_policy() {
        for missed in POLICIES {
            let one = ticks("0 3 * * *", "2026-11-28T03:00:00Z", "2026-11-28T03:00:00.2Z", missed);
            assert_eq!(one, (vec!["2026-11-28T03:00:00Z".into()], None, "2026-11-29T03:00:00Z".into()), "{missed:?}");
            let (few, none, next) = ticks("* * * * * *", "2026-11-28T03:00:00Z", "2026-11-28T03:01:00Z", missed);
            assert_eq!((few.len(), none, next.as_str()), (61, None, "2026-11-28T03:01:01Z"), "{missed:?}");
        }
    }

    #[test]
    fn what_was_missed_is_for_the_policy() {
        // An hour without a worker.
        let of = |missed| ticks("*/10 * * * *", "2026-11-28T03:00:00Z", "2026-11-28T04:00:30Z", missed);
        let (skipped, passed_over, next) = of(Missed::Skip);
        assert_eq!((skipped, next.as_str()), (vec!["2026-11-28T04:00:00Z".to_owned()], "2026-11-28T04:10:00Z"));
        assert_eq!(passed_over, Some(("2026-11-28T03:00:00Z".into(), "2026-11-28T03:50:00Z".into())));
        assert_eq!(of(Missed::Once), (vec!["2026-11-28T04:00:00Z".into()], None, "2026-11-28T04:10:00Z".into()));
        let (all, passed_over, next) = of(Missed::All);
        assert_eq!((all.len(), all[0].as_str(), all[6].as_str()), (7, "2026-11-28T03:00:00Z", "2026-11-28T04:00:00Z"));
        assert_eq!((passed_over, next.as_str()), (None, "2026-11-28T04:10:00Z"));
        // Nothing of it is in time.
        let none = ticks("0 3 * * *", "2026-11-20T03:00:00Z", "2026-11-28T04:00:00Z", Missed::Skip);
        let passed_over = Some(("2026-11-20T03:00:00Z".into(), "2026-11-28T03:00:00Z".into()));
        assert_eq!(none, (Vec::new(), passed_over, "2026-11-29T03:00:00Z".into()));
        let one = ticks("0 3 * * *", "2026-11-20T03:00:00Z", "2026-11-28T04:00:00Z", Missed::Once);
        assert_eq!(one.0, ["2026-11-28T03:00:00Z"]);
    }

    #[test]
    fn a_thousand_at_most_and_the_rest_is_told() {
        let (all, passed_over, next) = ticks("* * * * *", "2026-11-01T00:00:00Z", "2026-11-28T00:00:30Z", Missed::All);
        assert_eq!(
            (all.len(), all[0].as_str(), all[999].as_str()),
            (1000, "2026-11-01T00:00:00Z", "2026-11-01T16:39:00Z")
        );
        assert_eq!(passed_over, Some(("2026-11-01T16:40:00Z".into(), "2026-11-28T00:00:00Z".into())));
        assert_eq!(next, "2026-11-28T00:01:00Z");
    }
}
