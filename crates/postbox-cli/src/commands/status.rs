//! `postbox status`: everything at a glance, and what needs somebody.

use postbox::Database;
use postbox::admin::{Status, Stranded, SubscriptionRow};
use serde_json::json;

use crate::commands::Ended;
use crate::desk::Desk;
use crate::failure::Failure;
use crate::output::Tone;
use crate::table::{Columns, Text, text, toned};
use crate::text::{capped, count, many, plain, quoted, span};

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
    for stranded in &status.stranded {
        let what = match removed(&status, stranded) {
            None => {
                let pulled = if is_operation(&status, stranded) { "" } else { " pull them," };
                format!(
                    "which no live worker stands behind: start one,{pulled} rename with `renamed_from`, or `postbox subscriptions remove`"
                )
            }
            Some(row) if row.in_doubt == stranded.waiting => {
                "which was removed: say how they ended with `postbox resolve`".to_owned()
            }
            Some(_) => format!("which was removed: {}", call_off(desk, stranded)),
        };
        output.line(&format!(
            "{}  {} for {}/{}, {what}",
            output.paint(Tone::Doubt, "! stranded"),
            many(stranded.waiting, "delivery waits", "deliveries wait"),
            plain(&stranded.application),
            plain(&stranded.subscription),
        ))?;
    }
    if let Some(next) = next(desk, &status) {
        output.line(&format!("next: {next}"))?;
    }
    Ok(0)
}

/// What does not go on by itself: doubts, and other deliveries that nobody stands behind. Dead
/// letters are shown, but may be old news.
fn needs_you(status: &Status) -> i64 {
    let stranded = status.stranded.iter().filter(|stranded| {
        let whose = |s: &&SubscriptionRow| s.name == stranded.subscription && s.application == stranded.application;
        status.subscriptions.iter().find(whose).is_none_or(|s| s.in_doubt < stranded.waiting)
    });
    status.subscriptions.iter().map(|s| s.in_doubt).sum::<i64>() + stranded.count() as i64
}

/// What waits can only be handled by a worker.
fn is_operation(status: &Status, stranded: &Stranded) -> bool {
    let same = |s: &&SubscriptionRow| s.name == stranded.subscription && s.application == stranded.application;
    status.subscriptions.iter().filter(same).any(|s| s.kind == "operation")
}

/// Its subscription, if that was removed: a later one of the same name may be there, too.
fn removed<'s>(status: &'s Status, stranded: &Stranded) -> Option<&'s SubscriptionRow> {
    let waits = |s: &SubscriptionRow| s.pending + s.scheduled + s.running + s.in_doubt;
    let same = |s: &&SubscriptionRow| s.name == stranded.subscription && s.application == stranded.application;
    let alone = |s: &&SubscriptionRow| same(s) && s.workers == 0 && waits(s) > 0;
    // What waits was counted a moment apart.
    let nearest = status.subscriptions.iter().filter(alone).min_by_key(|s| (waits(s) - stranded.waiting).abs());
    nearest.filter(|s| s.removed_at.is_some())
}

/// The command that calls off what waits for a subscription.
fn call_off(desk: &Desk<'_>, stranded: &Stranded) -> String {
    let Stranded { application, subscription, .. } = stranded;
    let filter = format!("state:pending subscription:{subscription} application:{application}");
    format!("{} --reason …", desk.command(&format!("cancel {}", quoted(&plain(&filter)))))
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
    let applications = subscriptions.iter().map(|s| s.application.as_str()).collect::<std::collections::BTreeSet<_>>();
    let warn = |tone, number: i64| -> Text { if number > 0 { toned(tone, capped(number)) } else { text("-") } };
    for row in subscriptions {
        let mut name = plain(&row.name);
        if applications.len() > 1 {
            name = format!("{}/{name}", plain(&row.application));
        }
        if row.removed_at.is_some() {
            name.push_str(" (removed)");
        }
        if row.backfilling {
            name.push_str(" (taking history)");
        }
        columns.row([
            text(name),
            text(capped(row.pending)),
            text(capped(row.scheduled)),
            text(count(row.running)),
            warn(Tone::Doubt, row.in_doubt),
            warn(Tone::Bad, row.dead),
            text(count(row.succeeded_last_hour)),
            text(row.oldest_age_s.map_or_else(|| "-".into(), span)),
        ]);
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
    (status.unrouted > 0).then(|| desk.command("subscriptions"))
}
