//! Schedules: messages that are published at the times of a cron expression in a time zone.
//!
//! Pure decisions: when the ticks are, which of them are due, what becomes of a schedule that somebody
//! changes. The time comes in from the database.

mod calendar;
mod change;
mod tick;

use std::collections::BTreeMap;
use std::str::FromStr;

use jiff::{Timestamp, Zoned};
use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use crate::error::{Error, PublishError};
use crate::json;
use crate::message::Envelope;
pub(crate) use calendar::Calendar;
pub(crate) use change::{Decided, Place, decide};
pub use change::{ScheduleEdit, Scheduled, Wish};
pub(crate) use tick::{fire, tell_of};

/// What a schedule's name may have: the dedup key of a tick holds it, beside the application's.
const MAX_NAME: usize = 128;

/// What becomes of ticks that nobody could publish in time, because no worker ran. Late is what was due
/// more than a minute ago.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Missed {
    /// They are passed over.
    Skip,
    /// One message, of the latest.
    #[default]
    Once,
    /// A message for each, the oldest first, and at most 1000.
    All,
}

impl Missed {
    /// The word for it, in SQL, JSON and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Missed::Skip => "skip",
            Missed::Once => "once",
            Missed::All => "all",
        }
    }
}

impl FromStr for Missed {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        [Missed::Skip, Missed::Once, Missed::All].into_iter().find(|missed| missed.as_str() == text).ok_or_else(|| {
            Error::Settings(format!("`{}` is no policy for missed ticks; say skip, once or all", text.escape_debug()))
        })
    }
}

impl Serialize for Missed {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.as_str())
    }
}

/// When the ticks of a schedule are, and what each of them publishes.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Plan {
    /// Five fields (minute, hour, day of month, month, day of week), six with seconds before them, or a
    /// name like `@daily`.
    pub cron: String,
    /// The IANA name of the time zone in whose clock it is read, like `Europe/Berlin`.
    pub time_zone: String,
    /// The topic of its messages.
    pub topic: String,
    /// Their key.
    pub key: Option<String>,
    /// Their payload, JSON.
    pub payload: Box<RawValue>,
    /// Their headers, beside those that tell of the tick.
    pub headers: BTreeMap<String, String>,
    /// What becomes of ticks that were missed.
    pub missed: Missed,
}

impl Plan {
    fn is_same(&self, other: &Plan) -> bool {
        let of = |plan: &Plan| (plan.cron.clone(), plan.time_zone.clone(), plan.topic.clone(), plan.key.clone());
        of(self) == of(other)
            && self.payload.get() == other.payload.get()
            && self.headers == other.headers
            && self.missed == other.missed
    }

    /// The same, its empty key taken as none, once all of it can be used.
    fn checked(mut self, place: &Place<'_>, max_payload_bytes: usize) -> Result<Plan, Error> {
        Calendar::of(&self.cron, &self.time_zone)?;
        self.key.take_if(|key| key.is_empty());
        // As a tick will have it; the longest that a tick's own headers and key get.
        let draft = tick::message(place.application, place.name, &self, Timestamp::MAX, true)?;
        draft.checked(max_payload_bytes).map(|_| self).map_err(Error::from)
    }
}

/// A schedule as it is stored.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ScheduleRow {
    /// Whose it is.
    pub application: String,
    /// Its name.
    pub name: String,
    /// When, and what.
    #[serde(flatten)]
    pub plan: Plan,
    /// Its next tick; `None` while it is paused, and when there is none to come.
    pub next_at: Option<Timestamp>,
    /// The last tick that was published.
    pub last_at: Option<Timestamp>,
    /// Since when it is paused.
    pub paused_at: Option<Timestamp>,
    /// Somebody wants a message now: since when. A worker publishes it.
    pub run_at: Option<Timestamp>,
    /// Its revision: each change of what it says adds one.
    pub rev: i32,
    /// Who made it.
    pub made_by: String,
    /// The operator who added or edited it last: what a program declares does not change it any more.
    pub edited_by: Option<String>,
}

impl ScheduleRow {
    /// Its next ticks, in its time zone, at most `count`: from the one it waits for on, or after `now` if it
    /// waits for none.
    ///
    /// # Errors
    /// What is stored is not understood by this version.
    pub fn upcoming(&self, now: Timestamp, count: usize) -> Result<Vec<Zoned>, Error> {
        let calendar = Calendar::of(&self.plan.cron, &self.plan.time_zone)?;
        let first = self.next_at.or_else(|| calendar.after(now));
        let ticks = std::iter::successors(first, |tick| calendar.after(*tick));
        Ok(ticks.take(count).map(|tick| tick.to_zoned(calendar.zone().clone())).collect())
    }

    /// A time as its clock shows it, with the offset: `2026-03-29 03:00:00 +02:00`.
    ///
    /// # Errors
    /// As [`upcoming`](Self::upcoming).
    pub fn shown(&self, time: Timestamp) -> Result<String, Error> {
        let zone = calendar::zone(&self.plan.time_zone)?;
        Ok(time.to_zoned(zone).strftime("%Y-%m-%d %H:%M:%S %:z").to_string())
    }
}

/// A schedule as a program declares it:
/// `Schedule::cron("nightly", "0 3 * * *").time_zone("Europe/Berlin").publishes("reports.nightly")`.
///
/// Given to [`Postbox::schedule`](crate::Postbox::schedule) or
/// [`WorkerBuilder::schedule`](crate::WorkerBuilder::schedule). Nothing is checked before.
#[derive(Debug)]
#[must_use = "a schedule does nothing until it is given to a postbox or a worker"]
pub struct Schedule {
    name: String,
    plan: Plan,
    /// What is wrong with the payload.
    wrong: Option<PublishError>,
}

impl Schedule {
    /// With a name that is its own within the application (1 to 128 bytes, no spaces, no colons), and a cron
    /// expression: five fields (minute, hour, day of month, month, day of week), six with seconds before
    /// them, or a name like `@daily`. In UTC, with the payload `null`, unless it says something else.
    pub fn cron(name: impl Into<String>, expression: impl Into<String>) -> Schedule {
        Schedule {
            name: name.into(),
            plan: Plan {
                cron: expression.into(),
                time_zone: "UTC".into(),
                topic: String::new(),
                key: None,
                payload: RawValue::NULL.to_owned(),
                headers: BTreeMap::new(),
                missed: Missed::default(),
            },
            wrong: None,
        }
    }

    /// The time zone in whose clock the expression is read, by its IANA name. Default `UTC`.
    pub fn time_zone(mut self, name: impl Into<String>) -> Self {
        self.plan.time_zone = name.into();
        self
    }

    /// The topic of its messages.
    pub fn publishes(mut self, topic: impl Into<String>) -> Self {
        self.plan.topic = topic.into();
        self
    }

    /// The payload of its messages. Default `null`.
    pub fn payload<P: Serialize + ?Sized>(mut self, payload: &P) -> Self {
        match serde_json::value::to_raw_value(payload) {
            Ok(payload) => self.plan.payload = payload,
            Err(error) => self.wrong = Some(PublishError::Json(json::JsonError::Syntax(error.to_string()))),
        }
        self
    }

    /// The same from JSON text, kept digit for digit.
    pub fn payload_json(mut self, text: &str) -> Self {
        match raw(text) {
            Ok(payload) => self.plan.payload = payload,
            Err(error) => self.wrong = Some(error),
        }
        self
    }

    /// The key of its messages.
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.plan.key = Some(key.into());
        self
    }

    /// Adds a header to its messages, beside `postbox-schedule` and `postbox-schedule-tick`.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.plan.headers.insert(name.into(), value.into());
        self
    }

    /// What becomes of ticks that were missed. Default [`Missed::Once`].
    pub fn missed(mut self, policy: Missed) -> Self {
        self.plan.missed = policy;
        self
    }

    /// Its name, and the plan once all of it can be used.
    pub(crate) fn checked(self, application: &str, max_payload_bytes: usize) -> Result<(String, Plan), Error> {
        let name = self.name;
        if name.is_empty()
            || name.len() > MAX_NAME
            || name.chars().any(|c| c == ':' || c.is_control() || c.is_whitespace())
        {
            return Err(Error::Settings(format!(
                "the schedule name `{}` must be 1 to {MAX_NAME} bytes without spaces, colons or control characters",
                name.escape_debug()
            )));
        }
        if let Some(wrong) = self.wrong {
            return Err(wrong.into());
        }
        if self.plan.topic.is_empty() {
            return Err(Error::Settings(format!(
                "the schedule `{name}` names no topic; say `.publishes(\"reports.nightly\")`, or `--topic` on the command line"
            )));
        }
        let plan = self.plan.checked(&Place { application, name: &name }, max_payload_bytes)?;
        Ok((name, plan))
    }
}

/// JSON text that can be stored as it is.
fn raw(text: &str) -> Result<Box<RawValue>, PublishError> {
    // The checks are those of a message.
    let draft = Envelope::raw("", text)?;
    let text = draft.payload.json().unwrap_or("null").to_owned();
    RawValue::from_string(text).map_err(|e| PublishError::Json(json::JsonError::Syntax(e.to_string())))
}
