//! `postbox schedules [list]`, and `add`, `edit`, `pause`, `resume`, `remove`, `run` and `next`.

use jiff::Timestamp;
use postbox::admin::{AuditEntry, ScheduleEdit};
use postbox::{Database, Error, Postbox, Schedule, ScheduleRow};
use serde_json::json;

use crate::commands::Ended;
use crate::confirm::confirm;
use crate::desk::{Desk, usage};
use crate::failure::{Failure, NOT_FOUND, USAGE, code_of};
use crate::flags::{
    AddSchedule, EditSchedule, NextTicks, OneSchedule, RemoveSchedule, ScheduleFlags, Schedules, SchedulesCommand,
};
use crate::output::Tone;
use crate::table::{Columns, text, toned};
use crate::text::{plain, quoted, until};

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, schedules: Schedules) -> Ended {
    match schedules.command {
        None | Some(SchedulesCommand::List) => list::<Db>(desk).await,
        Some(SchedulesCommand::Add(wish)) => add::<Db>(desk, wish).await,
        Some(SchedulesCommand::Edit(wish)) => edit::<Db>(desk, wish).await,
        Some(SchedulesCommand::Pause(wish)) => one::<Db>(desk, wish, Verb::Pause).await,
        Some(SchedulesCommand::Resume(wish)) => one::<Db>(desk, wish, Verb::Resume).await,
        Some(SchedulesCommand::Run(wish)) => one::<Db>(desk, wish, Verb::Run).await,
        Some(SchedulesCommand::Remove(wish)) => remove::<Db>(desk, wish).await,
        Some(SchedulesCommand::Next(wish)) => next::<Db>(desk, wish).await,
    }
}

async fn rows<Db: Database>(desk: &Desk<'_>, postbox: &Postbox<Db>, tried: &str) -> Result<Vec<ScheduleRow>, Failure> {
    postbox.admin().schedules().await.map_err(|e| Failure::of(&e, tried, desk.command("status")))
}

/// A time as the clock of its schedule shows it.
fn local(row: &ScheduleRow, tick: Option<Timestamp>) -> String {
    match tick {
        None => "-".into(),
        // In UTC, if this version does not know its zone.
        Some(tick) => row.shown(tick).unwrap_or_else(|_| format!("{tick:.0}")),
    }
}

async fn list<Db: Database>(desk: &Desk<'_>) -> Ended {
    let postbox = desk.open::<Db>().await?;
    let rows = rows(desk, &postbox, "list the schedules").await?;
    let wanted = |row: &&ScheduleRow| desk.application.as_ref().is_none_or(|a| *a == row.application);
    let rows: Vec<_> = rows.iter().filter(wanted).collect();
    if desk.output.json {
        for row in rows {
            desk.output.object(row)?;
        }
        return Ok(0);
    }
    if rows.is_empty() {
        desk.output.prose("no schedules yet");
        let next =
            "schedules add nightly '0 3 * * *' --topic reports.nightly --time-zone Europe/Berlin --application shop";
        desk.output.prose(&format!("next: {}", desk.command(next)));
        return Ok(0);
    }
    let mut columns =
        Columns::new(&["APPLICATION", "NAME", "CRON", "ZONE", "TOPIC", "NEXT", "", "LAST", "MISSED", ">REV", ""]);
    for row in rows {
        let (state, tone) = match (row.paused_at, row.run_at, row.next_at) {
            (_, Some(_), _) => ("to be run", Tone::Busy),
            (Some(_), ..) => ("paused", Tone::Doubt),
            (None, None, None) => ("no tick to come", Tone::Faint),
            _ => ("", Tone::Faint),
        };
        columns.row([
            text(plain(&row.application)),
            text(plain(&row.name)),
            text(plain(&row.plan.cron)),
            text(plain(&row.plan.time_zone)),
            text(plain(&row.plan.topic)),
            text(local(row, row.next_at)),
            text(row.next_at.map(until).unwrap_or_default()),
            text(local(row, row.last_at)),
            text(row.plan.missed.as_str()),
            text(row.rev.to_string()),
            toned(tone, state),
        ]);
    }
    columns.print(desk.output)?;
    Ok(0)
}

/// What to run when a schedule was not taken as it was typed.
fn again(desk: &Desk<'_>, error: &Error) -> String {
    match code_of(error) {
        USAGE => desk.command("schedules add nightly '0 3 * * *' --topic reports.nightly --time-zone Europe/Berlin"),
        _ => desk.command("schedules"),
    }
}

async fn add<Db: Database>(desk: &Desk<'_>, wish: AddSchedule) -> Ended {
    let tried = format!("add the schedule {}", wish.name);
    let Some(application) = desk.whose() else {
        // The command's own name would be the default, and nobody would look there.
        let why = "whose schedule it is has to be said";
        let next = format!(
            "schedules add {} {} --topic {} --application shop",
            quoted(&plain(&wish.name)),
            quoted(&plain(&wish.cron)),
            quoted(&plain(&wish.topic))
        );
        return Err(usage(&tried, why, desk.command(&next)));
    };
    let ScheduleFlags { time_zone, payload, key, headers, missed } = wish.says;
    let mut schedule = Schedule::cron(&wish.name, &wish.cron).publishes(&wish.topic);
    if let Some(time_zone) = time_zone {
        schedule = schedule.time_zone(time_zone);
    }
    if let Some(payload) = payload {
        schedule = schedule.payload_json(&payload);
    }
    if let Some(key) = key {
        schedule = schedule.key(key);
    }
    for (name, value) in headers {
        schedule = schedule.header(name, value);
    }
    schedule = schedule.missed(missed.unwrap_or_default());
    let reason = wish.reason.unwrap_or_else(|| "added".into());
    let postbox = desk.open::<Db>().await?;
    let added = postbox.admin().add_schedule(&application, schedule, &desk.actor, &reason).await;
    let entry = added.map_err(|e| Failure::of(&e, &tried, again(desk, &e)))?;
    told(desk, &entry, &application, &wish.name, "added")
}

async fn edit<Db: Database>(desk: &Desk<'_>, wish: EditSchedule) -> Ended {
    let tried = format!("edit the schedule {}", wish.name);
    let ScheduleFlags { time_zone, payload, key, headers, missed } = wish.says;
    let headers = (!headers.is_empty()).then(|| headers.into_iter().collect());
    let edit =
        ScheduleEdit { rev: wish.rev, cron: wish.cron, time_zone, topic: wish.topic, payload, key, headers, missed };
    let typed = format!("schedules edit {}", quoted(&plain(&wish.name)));
    if edit.is_empty() {
        let why =
            "nothing is to be changed; say what: --cron, --time-zone, --topic, --payload, --key, --header or --missed";
        return Err(usage(&tried, why, desk.action(&format!("{typed} --cron '30 2 * * *' --reason …"))));
    }
    let reason = desk.reason(wish.reason, &tried, &desk.action(&format!("{typed} …")), "why")?;
    let postbox = desk.open::<Db>().await?;
    let rows = rows(desk, &postbox, &tried).await?;
    let row = the_one(desk, &rows, &wish.name, "edit", &tried)?;
    let edited = postbox.admin().edit_schedule(&row.application, &row.name, &edit, &desk.actor, &reason).await;
    let entry = edited.map_err(|e| Failure::of(&e, &tried, again(desk, &e)))?;
    told(desk, &entry, &row.application, &row.name, "edited")
}

/// What is done to one, with nothing but a reason.
#[derive(Clone, Copy)]
enum Verb {
    Pause,
    Resume,
    Run,
}

impl Verb {
    fn word(self) -> &'static str {
        match self {
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::Run => "run",
        }
    }
}

async fn one<Db: Database>(desk: &Desk<'_>, wish: OneSchedule, verb: Verb) -> Ended {
    let word = verb.word();
    let tried = format!("{word} the schedule {}", wish.name);
    let typed = desk.action(&format!("schedules {word} {}", quoted(&plain(&wish.name))));
    let reason = desk.reason(wish.reason, &tried, &typed, "why")?;
    let postbox = desk.open::<Db>().await?;
    let rows = rows(desk, &postbox, &tried).await?;
    let row = the_one(desk, &rows, &wish.name, word, &tried)?;
    let (admin, application, name, actor) = (postbox.admin(), &row.application, &row.name, &desk.actor);
    let (done, past) = match verb {
        Verb::Pause => (admin.pause_schedule(application, name, actor, &reason).await, "paused"),
        Verb::Resume => (admin.resume_schedule(application, name, actor, &reason).await, "resumed"),
        Verb::Run => (admin.run_schedule(application, name, actor, &reason).await, "to be run by a worker"),
    };
    let entry = done.map_err(|e| Failure::of(&e, &tried, desk.command("schedules")))?;
    told(desk, &entry, application, name, past)
}

async fn remove<Db: Database>(desk: &Desk<'_>, wish: RemoveSchedule) -> Ended {
    let name = &wish.one.name;
    let tried = format!("remove the schedule {name}");
    let typed = desk.action(&format!("schedules remove {}", quoted(&plain(name))));
    let yes = if wish.yes { " --yes" } else { "" };
    let reason = desk.reason(wish.one.reason, &tried, &format!("{typed}{yes}"), "why")?;
    let postbox = desk.open::<Db>().await?;
    let rows = rows(desk, &postbox, &tried).await?;
    let row = the_one(desk, &rows, name, "remove", &tried)?;
    let declared = match row.edited_by {
        None => "; a program declares it, and makes it again when it next starts: pause it to stop it for good",
        Some(_) => "",
    };
    desk.output.prose(&format!("removes {} of {}{declared}", plain(name), plain(&row.application)));
    confirm(wish.yes, &tried, &format!("{typed} --reason {}", quoted(&plain(&reason))))?;
    let removed = postbox.admin().remove_schedule(&row.application, name, &desk.actor, &reason).await;
    let entry = removed.map_err(|e| Failure::of(&e, &tried, desk.command("schedules")))?;
    told(desk, &entry, &row.application, name, "removed")
}

async fn next<Db: Database>(desk: &Desk<'_>, wish: NextTicks) -> Ended {
    let tried = format!("tell the next ticks of {}", wish.name);
    let postbox = desk.open::<Db>().await?;
    let rows = rows(desk, &postbox, &tried).await?;
    let row = the_one(desk, &rows, &wish.name, "next", &tried)?;
    let ticks = row.upcoming(Timestamp::now(), wish.count as usize);
    let ticks = ticks.map_err(|e| Failure::of(&e, &tried, desk.command("schedules")))?;
    if desk.output.json {
        for tick in ticks {
            let local = tick.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string();
            desk.output
                .object(&json!({ "tick": tick.timestamp(), "local": local, "paused": row.paused_at.is_some() }))?;
        }
        return Ok(0);
    }
    let mut columns = Columns::new(&["TICK", "UTC", ""]);
    for tick in ticks {
        columns.row([
            text(tick.strftime("%a %Y-%m-%d %H:%M:%S %:z").to_string()),
            text(format!("{:.0}", tick.timestamp())),
            text(until(tick.timestamp())),
        ]);
    }
    columns.print(desk.output)?;
    if row.paused_at.is_some() {
        let next = desk.action(&format!("schedules resume {} --reason …", quoted(&plain(&row.name))));
        desk.output.prose(&format!("it is paused: none of these is published; to go on: {next}"));
    }
    Ok(0)
}

/// The entry in the audit; for people, what was done.
fn told(desk: &Desk<'_>, entry: &AuditEntry, application: &str, name: &str, past: &str) -> Ended {
    if desk.output.json {
        desk.output.object(entry)?;
    } else {
        let plus = desk.output.paint(Tone::Good, "+");
        let (name, application, actor) = (plain(name), plain(application), plain(&entry.actor));
        desk.output.line(&format!("{plus} {name} of {application}: {past}, by {actor}, audit {}", entry.seq))?;
    }
    Ok(0)
}

/// The schedule that is meant: of the application that was named, or the only one of its name.
fn the_one<'r>(
    desk: &Desk<'_>,
    rows: &'r [ScheduleRow],
    name: &str,
    verb: &str,
    tried: &str,
) -> Result<&'r ScheduleRow, Failure> {
    let of = |row: &&ScheduleRow| {
        row.name == name && desk.application.as_ref().is_none_or(|application| *application == row.application)
    };
    let meant: Vec<&ScheduleRow> = rows.iter().filter(of).collect();
    match meant.as_slice() {
        [one] => Ok(one),
        [] => {
            let whose = desk.application.as_ref().map_or_else(String::new, |a| format!(" of application {a}"));
            let why = format!("there is no schedule {name}{whose}");
            Err(Failure::new(NOT_FOUND, tried, why, desk.command("schedules")))
        }
        [first, ..] => {
            let why = "several applications have one of that name; say whose with --application";
            let next = format!(
                "schedules {verb} {} --application {}",
                quoted(&plain(name)),
                quoted(&plain(&first.application))
            );
            Err(usage(tried, why, desk.command(&next)))
        }
    }
}
