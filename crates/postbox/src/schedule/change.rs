//! What becomes of a schedule that a program declares or an operator changes.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::{Calendar, Missed, Plan, ScheduleRow, raw};
use crate::error::Error;

/// What an operator wants a schedule to say: what is not given stays as it is.
#[derive(Debug, Clone, Default)]
pub struct ScheduleEdit {
    /// The revision the operator saw; `None` takes what is there.
    pub rev: Option<i32>,
    /// Another cron expression.
    pub cron: Option<String>,
    /// Another time zone.
    pub time_zone: Option<String>,
    /// Another topic.
    pub topic: Option<String>,
    /// Another payload, JSON text.
    pub payload: Option<String>,
    /// Another key; an empty one is none.
    pub key: Option<String>,
    /// These headers, instead of those it has.
    pub headers: Option<BTreeMap<String, String>>,
    /// Another policy.
    pub missed: Option<Missed>,
}

impl ScheduleEdit {
    /// It asks for nothing.
    pub fn is_empty(&self) -> bool {
        self.cron.is_none()
            && self.time_zone.is_none()
            && self.topic.is_none()
            && self.payload.is_none()
            && self.key.is_none()
            && self.headers.is_none()
            && self.missed.is_none()
    }

    fn applied(&self, plan: &Plan) -> Result<Plan, Error> {
        let mut plan = plan.clone();
        for (new, old) in
            [(&self.cron, &mut plan.cron), (&self.time_zone, &mut plan.time_zone), (&self.topic, &mut plan.topic)]
        {
            if let Some(new) = new {
                old.clone_from(new);
            }
        }
        if let Some(text) = &self.payload {
            plan.payload = raw(text)?;
        }
        if self.key.is_some() {
            plan.key.clone_from(&self.key);
        }
        if let Some(headers) = &self.headers {
            plan.headers.clone_from(headers);
        }
        plan.missed = self.missed.unwrap_or(plan.missed);
        Ok(plan)
    }
}

/// What somebody wants of a schedule.
#[doc(hidden)]
#[derive(Debug, Clone)]
pub enum Wish {
    /// A program says that it is so.
    Declare(Plan),
    /// An operator adds it.
    Add(Plan),
    /// An operator changes what it says; payloads have at most so many bytes.
    Edit(ScheduleEdit, usize),
    /// No ticks until it is resumed.
    Pause,
    /// Its next tick is the first to come.
    Resume,
    /// A message now, beside its ticks.
    Run,
    /// It is gone.
    Remove,
}

impl Wish {
    /// What goes on record; nothing of what programs declare.
    pub(crate) fn action(&self) -> Option<&'static str> {
        match self {
            Wish::Declare(_) => None,
            Wish::Add(_) => Some("add schedule"),
            Wish::Edit(..) => Some("edit schedule"),
            Wish::Pause => Some("pause schedule"),
            Wish::Resume => Some("resume schedule"),
            Wish::Run => Some("run schedule"),
            Wish::Remove => Some("remove schedule"),
        }
    }
}

/// What became of a schedule that a program declared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scheduled {
    /// It is new.
    Made,
    /// It says now what was declared.
    Changed,
    /// It was so already.
    AsItWas,
    /// It says something else, because an operator wants it so: nothing was changed.
    Edited,
}

/// Whose schedule, and which.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) application: &'a str,
    pub(crate) name: &'a str,
}

/// What is to be done about it.
#[derive(Debug)]
pub(crate) enum Decided {
    /// Nothing.
    Keep(Scheduled),
    /// It is like this from now on.
    Write(Scheduled, Box<ScheduleRow>),
    /// Its row goes.
    Remove,
}

/// Decides what becomes of the schedule that is there, if one is, by the database's time.
pub(crate) fn decide(
    row: Option<&ScheduleRow>,
    place: Place<'_>,
    wish: &Wish,
    actor: &str,
    now: Timestamp,
) -> Result<Decided, Error> {
    let Some(row) = row else { return decide_new(place, wish, actor, now) };
    let mut new = row.clone();
    match wish {
        Wish::Declare(plan) if row.plan.is_same(plan) => return Ok(Decided::Keep(Scheduled::AsItWas)),
        Wish::Declare(_) if row.edited_by.is_some() => return Ok(Decided::Keep(Scheduled::Edited)),
        Wish::Declare(plan) => {
            new.plan = plan.clone();
            new.rev += 1;
        }
        Wish::Add(_) => {
            return Err(Error::Refused(format!(
                "application `{}` has a schedule `{}` already; change it with `postbox schedules edit`",
                place.application, place.name
            )));
        }
        Wish::Edit(edit, max_payload_bytes) => {
            if let Some(seen) = edit.rev.filter(|seen| *seen != row.rev) {
                return Err(Error::Conflict(format!(
                    "the schedule `{}` is at version {}, not {seen}: somebody changed it meanwhile; look again with `postbox schedules`",
                    place.name, row.rev
                )));
            }
            new.plan = edit.applied(&row.plan)?.checked(&place, *max_payload_bytes)?;
            new.rev += 1;
            new.edited_by = Some(actor.to_owned());
        }
        Wish::Pause if row.paused_at.is_some() => {
            return Err(Error::Refused(format!(
                "the schedule `{}` is paused already; `postbox schedules resume` goes on with it",
                place.name
            )));
        }
        Wish::Pause => {
            new.paused_at = Some(now);
        }
        Wish::Resume if row.paused_at.is_none() => {
            return Err(Error::Refused(format!(
                "the schedule `{}` is not paused; `postbox schedules` shows its next tick",
                place.name
            )));
        }
        Wish::Resume => {
            new.paused_at = None;
        }
        // Asked for twice before a worker has seen it, it is one message.
        Wish::Run => {
            new.run_at = row.run_at.or(Some(now));
            return Ok(Decided::Write(Scheduled::AsItWas, Box::new(new)));
        }
        Wish::Remove => return Ok(Decided::Remove),
    }
    let same_times = new.plan.cron == row.plan.cron && new.plan.time_zone == row.plan.time_zone;
    if !(same_times && new.paused_at == row.paused_at) {
        // What is due and not published yet is not published any more; and no tick is published twice.
        new.next_at = next(&new.plan, new.paused_at, row.last_at.map_or(now, |last| last.max(now)))?;
    }
    Ok(Decided::Write(Scheduled::Changed, Box::new(new)))
}

fn decide_new(place: Place<'_>, wish: &Wish, actor: &str, now: Timestamp) -> Result<Decided, Error> {
    let (plan, edited_by) = match wish {
        Wish::Declare(plan) => (plan, None),
        Wish::Add(plan) => (plan, Some(actor.to_owned())),
        _ => {
            return Err(Error::NotFound(format!(
                "application `{}` has no schedule `{}`; `postbox schedules` shows what there is",
                place.application, place.name
            )));
        }
    };
    let row = ScheduleRow {
        application: place.application.to_owned(),
        name: place.name.to_owned(),
        next_at: next(plan, None, now)?,
        plan: plan.clone(),
        last_at: None,
        paused_at: None,
        run_at: None,
        rev: 1,
        made_by: actor.to_owned(),
        edited_by,
    };
    Ok(Decided::Write(Scheduled::Made, Box::new(row)))
}

fn next(plan: &Plan, paused_at: Option<Timestamp>, after: Timestamp) -> Result<Option<Timestamp>, Error> {
    Ok(match paused_at {
        Some(_) => None,
        None => Calendar::of(&plan.cron, &plan.time_zone)?.after(after),
    })
}
