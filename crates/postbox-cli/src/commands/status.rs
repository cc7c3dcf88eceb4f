//! `postbox status`: everything at a glance, and what needs somebody.

use jiff::Timestamp;
use postbox::Database;
use postbox::admin::{HeldBack, ScheduleStatus, SinkRow, Status, Stranded, SubscriptionRow};
use serde_json::json;

use crate::commands::subscriptions::paused;
use crate::commands::{Ended, sources};
use crate::desk::Desk;
use crate::failure::Failure;
use crate::output::Tone;
use crate::table::{Columns, names, notable, text, toned};
use crate::text::{ago, capped, count, many, plain, quoted, span, until};

/// So many schedules are shown: those whose next tick comes first.
const SCHEDULES: usize = 5;
/// So many topics of unrouted messages are named.
const TOPICS: usize = 5;

pub(super) async fn run<Db: Database>(desk: &Desk<'_>) -> Ended {
    let postbox = desk.open::<Db>().await?;
    let status = postbox
        .admin()
        .status()
        .await
        .map_err(|e| Failure::of(&e, "look at the postbox", desk.command("config show --origin")))?;
    let output = desk.output;
    if output.json {
        let mut object = serde_json::to_value(&status).map_err(std::io::Error::other)?;
        object["needs_you"] = json!(needs_you(&status));
        output.object(&object)?;
        return Ok(0);
    }
    output.line(&headline(desk, &status))?;
    table(&status.subscriptions).print(output)?;
    if status.subscriptions.is_empty() {
        output.line(
            "no subscriptions yet: a worker makes them when it first starts; `postbox subscriptions add` does, too",
        )?;
    }
    if !status.sources.is_empty() {
        sources::print(&status.sources, output)?;
    }
    if !status.sinks.is_empty() {
        sinks(&status.sinks).print(output)?;
    }
    if !status.schedules.is_empty() {
        schedules(&status.schedules).print(output)?;
        if status.schedules.len() > SCHEDULES {
            let more = many((status.schedules.len() - SCHEDULES) as i64, "more schedule", "more schedules");
            output.line(&format!("{more}: {}", desk.command("schedules")))?;
        }
    }
    if status.unrouted > 0 {
        let mut topics: Vec<_> = status.unrouted_topics.iter().take(TOPICS).map(|t| plain(t)).collect();
        if status.unrouted_topics.len() > TOPICS {
            topics.push("…".into());
        }
        let messages = many(status.unrouted, "message matches", "messages match");
        output.line(&format!("unrouted  {messages} no subscription: {}", topics.join(", ")))?;
    }
    if status.workers.iter().all(|w| !w.alive) {
        for row in status.subscriptions.iter().filter(|row| row.backfilling) {
            let run = desk.command("maintain");
            output.line(&format!("history  {} waits for a worker to hand it out, or: {run}", plain(&row.name)))?;
        }
    }
    for row in status.subscriptions.iter().filter(|row| row.removed_at.is_none()) {
        let Some(paused) = paused(row) else { continue };
        output.line(&format!(
            "{}  {} for {}/{}, {paused}; go on: {}",
            output.paint(Tone::Doubt, "paused"),
            many(row.pending + row.scheduled, "delivery waits", "deliveries wait"),
            plain(&row.application),
            plain(&row.name),
            resume(desk, row)
        ))?;
    }
    for stranded in &status.stranded {
        let what = match removed(&status, stranded) {
            None => {
                let pulled = if is_operation(&status, stranded) { "" } else { " pull them," };
                format!(
                    "which no live worker stands behind: start one,{pulled} rename with `renamed_from`, or `postbox subscriptions remove`"
                )
            }
            Some(row) if row.in_doubt == stranded.waiting + stranded.later => {
                "which was removed: say how they ended with `postbox resolve`".to_owned()
            }
            Some(_) => format!("which was removed: {}", call_off(desk, stranded)),
        };
        let later = match stranded.later {
            0 => String::new(),
            later => format!(", and {} due later,", capped(later)),
        };
        output.line(&format!(
            "{}  {}{later} for {}/{}, {what}",
            output.paint(Tone::Doubt, "! stranded"),
            many(stranded.waiting, "delivery waits", "deliveries wait"),
            plain(&stranded.application),
            plain(&stranded.subscription),
        ))?;
    }
    if let Some(held_back) = &status.held_back {
        output.line(&format!("{}  {}", output.paint(Tone::Doubt, "! old rows"), old_rows(held_back)))?;
    }
    if let Some(next) = next(desk, &status) {
        output.line(&format!("next: {next}"))?;
    }
    Ok(0)
}

/// What does not go on by itself, or may not: doubts, other deliveries that nobody stands behind, and sources that
/// cannot be read. Dead letters are shown, but may be old news.
fn needs_you(status: &Status) -> i64 {
    let stranded = status.stranded.iter().filter(|stranded| {
        let whose = |s: &&SubscriptionRow| s.name == stranded.subscription && s.application == stranded.application;
        status.subscriptions.iter().find(whose).is_none_or(|s| s.in_doubt < stranded.waiting)
    });
    let failing = status.sources.iter().filter(|source| source.state == "failing");
    status.subscriptions.iter().map(|s| s.in_doubt).sum::<i64>() + (stranded.count() + failing.count()) as i64
}

/// What waits can only be handled by a worker.
fn is_operation(status: &Status, stranded: &Stranded) -> bool {
    let same = |s: &&SubscriptionRow| s.name == stranded.subscription && s.application == stranded.application;
    status.subscriptions.iter().filter(same).any(|s| s.kind == "operation")
}

/// Its subscription, if that was removed: a later one of the same name may be there, too.
fn removed<'s>(status: &'s Status, stranded: &Stranded) -> Option<&'s SubscriptionRow> {
    let waits = |s: &SubscriptionRow| s.pending + s.scheduled + s.running + s.in_doubt;
    let waited = stranded.waiting + stranded.later;
    let same = |s: &&SubscriptionRow| s.name == stranded.subscription && s.application == stranded.application;
    let alone = |s: &&SubscriptionRow| same(s) && s.workers == 0 && waits(s) > 0;
    // What waits was counted a moment apart.
    let nearest = status.subscriptions.iter().filter(alone).min_by_key(|s| (waits(s) - waited).abs());
    nearest.filter(|s| s.removed_at.is_some())
}

/// Who keeps PostgreSQL from removing dead rows, and what ends that.
fn old_rows(held_back: &HeldBack) -> String {
    let HeldBack { kind, pid, name, login, state, age_s, transactions, dead_rows, .. } = held_back;
    let name = name.as_deref().map(|name| format!(" `{}`", plain(name))).unwrap_or_default();
    let whose: Vec<String> = (pid.iter().map(|pid| format!("process {pid}")))
        .chain(login.iter().map(|login| format!("login {}", plain(login))))
        .chain(state.iter().map(|state| plain(state)))
        .collect();
    let whose = if whose.is_empty() { String::new() } else { format!(" ({})", whose.join(", ")) };
    let age = match age_s {
        Some(age) => span(*age),
        None => many(*transactions, "transaction", "transactions"),
    };
    let end = way_out(kind, *pid, held_back.name.as_deref().unwrap_or_default());
    let dead = if *dead_rows == 0 { "0".to_owned() } else { count(*dead_rows) };
    format!(
        "a {kind}{name}{whose} has kept what is dead from being removed for {age}: {dead} dead rows in `ready`; {end}"
    )
}

/// The command that calls off what waits for a subscription.
fn call_off(desk: &Desk<'_>, stranded: &Stranded) -> String {
    let Stranded { application, subscription, .. } = stranded;
    let filter = format!("state:pending subscription:{subscription} application:{application}");
    format!("{} --reason …", desk.command(&format!("cancel {}", quoted(&plain(&filter)))))
}

/// The command that ends a pause.
fn resume(desk: &Desk<'_>, row: &SubscriptionRow) -> String {
    let whose = desk.of(&row.application);
    format!("{} --reason …", desk.command(&format!("subscriptions resume {}{whose}", quoted(&plain(&row.name)))))
}

/// What an operator does about who holds vacuum back.
fn way_out(kind: &str, pid: Option<i32>, name: &str) -> String {
    let named = format!("'{}'", plain(name).replace('\'', "''"));
    match (kind, pid) {
        ("transaction", Some(pid)) => format!("end it: select pg_terminate_backend({pid})"),
        ("prepared transaction", _) => format!("end it: rollback prepared {named}, or commit prepared {named}"),
        ("replication slot", None) => {
            format!("start who reads from it, or: select pg_drop_replication_slot({named})")
        }
        _ => "end the old transaction on the standby that it feeds".to_owned(),
    }
}

fn headline(desk: &Desk<'_>, status: &Status) -> String {
    let output = desk.output;
    let place = place(desk);
    let alive = status.workers.iter().filter(|w| w.alive).count();
    let needs = match needs_you(status) {
        0 => output.paint(Tone::Good, "nothing needs you"),
        1 => output.paint(Tone::Doubt, "! 1 needs you"),
        n => output.paint(Tone::Doubt, &format!("! {n} need you")),
    };
    format!(
        "{}  schema {} (current)   workers {alive}/{}   {needs}",
        output.paint(Tone::Strong, &place),
        status.schema_version,
        status.workers.len()
    )
}

/// The database's name, or that of its file.
fn place(desk: &Desk<'_>) -> String {
    let url = desk.settings.database_url().map(postbox::hide_password).unwrap_or_default();
    let named = url.split('?').next().unwrap_or_default().rsplit(['/', ':']).next().unwrap_or_default();
    if named.is_empty() { "postbox".into() } else { plain(named) }
}

fn table(subscriptions: &[SubscriptionRow]) -> Columns {
    let mut columns = Columns::new(&["", ">pending", ">later", ">running", ">IN-DOUBT", ">dead", ">ok/1h", ">oldest"]);
    let named = names(subscriptions.iter().map(|row| row.application.as_str()));
    for row in subscriptions {
        let mut name = named(&row.application, &row.name);
        if row.removed_at.is_some() {
            name.push_str(" (removed)");
        }
        if row.paused_at.is_some() {
            name.push_str(" (paused)");
        }
        if row.backfilling {
            name.push_str(" (taking history)");
        }
        columns.row([
            text(name),
            text(capped(row.pending)),
            text(capped(row.scheduled)),
            text(count(row.running)),
            notable(Tone::Doubt, row.in_doubt, capped),
            notable(Tone::Bad, row.dead, capped),
            text(count(row.succeeded_last_hour)),
            text(row.oldest_age_s.map_or_else(|| "-".into(), span)),
        ]);
    }
    columns
}

fn sinks(rows: &[SinkRow]) -> Columns {
    let mut columns =
        Columns::new(&["relay", "kind", "state", ">lag", ">oldest", ">sent", ">retried", ">dead", ">blocked keys"]);
    let name = names(rows.iter().map(|row| row.application.as_str()));
    let bad = |number: i64| notable(Tone::Bad, number, capped);
    for row in rows {
        let state = match row.state.as_str() {
            "sending" => toned(Tone::Good, "sending"),
            "paused" => toned(Tone::Doubt, "paused"),
            other => toned(Tone::Faint, plain(other)),
        };
        columns.row([
            text(name(&row.application, &row.name)),
            text(plain(&row.kind)),
            state,
            text(capped(row.lag)),
            text(row.oldest_age_s.map_or_else(|| "-".into(), span)),
            text(count(row.sent)),
            text(count(row.retried)),
            bad(row.dead),
            bad(row.blocked_keys),
        ]);
    }
    columns
}

/// Late by less is no news: a worker looks within a second.
const HARDLY_LATE: f64 = 10.0;

fn schedules(schedules: &[ScheduleStatus]) -> Columns {
    let mut columns = Columns::new(&["", "next tick", "last tick", "if missed"]);
    let name = names(schedules.iter().map(|row| row.application.as_str()));
    for row in schedules.iter().take(SCHEDULES) {
        let late = |next: Timestamp| Timestamp::now().duration_since(next).as_secs_f64();
        let next = match (row.paused_at, row.next_at) {
            (Some(since), _) => text(format!("paused for {}", ago(since))),
            (None, None) => text("none to come"),
            (None, Some(next)) if late(next) > HARDLY_LATE => {
                toned(Tone::Doubt, format!("{} late: no worker publishes it", span(late(next))))
            }
            (None, Some(next)) => text(until(next)),
        };
        let last = row.last_at.map_or_else(|| "-".into(), |last| format!("{} ago", ago(last)));
        columns.row([text(name(&row.application, &row.name)), next, text(last), text(row.missed.as_str())]);
    }
    columns
}

/// The command that is most wanted now.
fn next(desk: &Desk<'_>, status: &Status) -> Option<String> {
    let any = |count: fn(&SubscriptionRow) -> i64| status.subscriptions.iter().any(|s| count(s) > 0);
    if any(|s| s.in_doubt) {
        return Some(desk.command("list state:in_doubt"));
    }
    if let Some(stranded) = status.stranded.first() {
        if removed(status, stranded).is_some() {
            return Some(call_off(desk, stranded));
        }
        let filter = format!("subscription:{}", stranded.subscription);
        return Some(desk.command(&format!("list {} state:pending", quoted(&filter))));
    }
    if any(|s| s.dead) {
        return Some(desk.command("list state:dead"));
    }
    if let Some(row) = status.subscriptions.iter().find(|row| row.paused_at.is_some() && row.removed_at.is_none()) {
        return Some(resume(desk, row));
    }
    (status.unrouted > 0).then(|| desk.command("subscriptions"))
}

#[cfg(test)]
mod tests {
    use super::way_out;

    #[test]
    fn whoever_holds_vacuum_back_can_be_ended() {
        assert_eq!(way_out("transaction", Some(7), "psql"), "end it: select pg_terminate_backend(7)");
        let prepared = way_out("prepared transaction", None, "ana's\u{1b}");
        assert!(prepared.contains("rollback prepared 'ana''s") && !prepared.contains('\u{1b}'), "{prepared}");
        assert!(way_out("replication slot", None, "old").ends_with("pg_drop_replication_slot('old')"));
        assert!(way_out("replication slot", Some(7), "old").contains("standby"));
        assert!(way_out("standby", Some(7), "walreceiver").contains("standby"));
    }
}
