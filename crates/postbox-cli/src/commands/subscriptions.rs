//! `postbox subscriptions [list]`, `postbox subscriptions add NAME PATTERN` and `postbox subscriptions
//! remove NAME`; `pause` and `resume` are in `pause`.

use postbox::admin::{LimitsRow, SubscriptionRow};
use postbox::{Database, Pattern, Postbox};
use serde_json::json;

use crate::commands::{Ended, pause};
use crate::confirm::confirm;
use crate::desk::{Desk, usage};
use crate::failure::{Failure, NOT_FOUND, REFUSED, denied};
use crate::flags::{Add, From, Remove, Subscriptions, SubscriptionsCommand};
use crate::output::Tone;
use crate::table::{Columns, text, toned};
use crate::text::{ago, capped, often, plain, quoted, shortened};

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, subscriptions: Subscriptions) -> Ended {
    match subscriptions.command {
        None | Some(SubscriptionsCommand::List) => list::<Db>(desk).await,
        Some(SubscriptionsCommand::Add(wish)) => add::<Db>(desk, wish).await,
        Some(SubscriptionsCommand::Remove(wish)) => remove::<Db>(desk, wish).await,
        Some(SubscriptionsCommand::Pause(wish)) => pause::run::<Db>(desk, wish, true).await,
        Some(SubscriptionsCommand::Resume(wish)) => pause::run::<Db>(desk, wish, false).await,
    }
}

async fn list<Db: Database>(desk: &Desk<'_>) -> Ended {
    let postbox = desk.open::<Db>().await?;
    let rows = rows(desk, &postbox, "list subscriptions").await?;
    let wanted = |row: &&SubscriptionRow| desk.application.as_ref().is_none_or(|a| *a == row.application);
    let rows: Vec<_> = rows.iter().filter(wanted).collect();
    if desk.output.json {
        for row in rows {
            desk.output.object(row)?;
        }
        return Ok(0);
    }
    if rows.is_empty() {
        desk.output.prose("no subscriptions yet: a worker makes them when it first starts");
        return Ok(0);
    }
    // Most have no limits, and no priorities.
    let limited = rows.iter().any(|row| row.limits.is_some());
    let mut headings =
        vec!["APPLICATION", "NAME", "PATTERN", "KIND", ">TRIES", ">WORKERS", ">WAITING", ">IN-DOUBT", ">DEAD"];
    headings.extend(limited.then_some("LIMITS"));
    headings.push("");
    let mut columns = Columns::new(&headings);
    for row in rows {
        let paused = paused(row);
        let history = (row.backfilling).then(|| "taking history".to_owned());
        let note = match row.removed_at {
            Some(_) => "removed".to_owned(),
            None => paused.into_iter().chain(history).collect::<Vec<_>>().join(", "),
        };
        let workers = match row.workers {
            0 => toned(Tone::Doubt, "0"),
            n => text(n.to_string()),
        };
        let mut cells = vec![
            text(plain(&row.application)),
            text(plain(&row.name)),
            text(plain(&row.pattern)),
            text(if row.idempotent { "operation, idempotent".to_owned() } else { plain(&row.kind) }),
            text(row.max_attempts.to_string()),
            workers,
            text(waiting(row)),
            text(capped(row.in_doubt)),
            text(capped(row.dead)),
        ];
        if limited {
            cells.push(text(row.limits.as_ref().map(limits).unwrap_or_default()));
        }
        cells.push(text(note));
        columns.row(cells);
    }
    columns.print(desk.output)?;
    Ok(0)
}

/// Since when a subscription is paused, by whom and why, if it is.
pub(super) fn paused(row: &SubscriptionRow) -> Option<String> {
    let since = ago(row.paused_at?);
    let by = row.paused_by.as_ref().map(|by| format!(" by {}", plain(by))).unwrap_or_default();
    let why = row.paused_reason.as_ref().map(|why| format!(": {}", shortened(why, 60))).unwrap_or_default();
    Some(format!("paused for {since}{by}{why}"))
}

/// What waits, and how much of it is not of the priority that all have who say nothing.
fn waiting(row: &SubscriptionRow) -> String {
    let levels: Vec<String> = [(row.pending_high, "high"), (row.pending_low, "low")]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, level)| format!("{} {level}", capped(count)))
        .collect();
    let all = capped(row.pending + row.scheduled);
    if levels.is_empty() { all } else { format!("{all} ({})", levels.join(", ")) }
}

/// How limits stand: `8 of 10 permits held, 60/s (12 of 30 tokens)`.
fn limits(limits: &LimitsRow) -> String {
    let at_once = limits.at_once.map(|most| format!("{} of {most} permits held", limits.held));
    let rate = limits.per_second.map(|rate| {
        let tokens = limits.tokens.unwrap_or_default().max(0.0).floor();
        format!("{} ({tokens} of {} tokens)", often(rate), limits.burst.unwrap_or_default())
    });
    at_once.into_iter().chain(rate).collect::<Vec<_>>().join(", ")
}

pub(super) async fn rows<Db: Database>(
    desk: &Desk<'_>,
    postbox: &Postbox<Db>,
    tried: &str,
) -> Result<Vec<SubscriptionRow>, Failure> {
    postbox.admin().subscriptions().await.map_err(|e| Failure::of(&e, tried, desk.command("status")))
}

async fn add<Db: Database>(desk: &Desk<'_>, wish: Add) -> Ended {
    let tried = format!("add the subscription {}", wish.name);
    let next = || desk.command("subscriptions add orders 'orders.*'");
    let Some(application) = &desk.whose() else {
        // The command's own name would be the default, and nobody would look there.
        let why = "whose subscription it is has to be said; programs pull from it under that application";
        return Err(usage(
            &tried,
            why,
            desk.command(&format!(
                "subscriptions add {} {} --application shop",
                quoted(&wish.name),
                quoted(&wish.pattern)
            )),
        ));
    };
    let pattern: Pattern =
        wish.pattern.parse().map_err(|e: postbox::TopicError| usage(&tried, e.to_string(), next()))?;
    let postbox = desk.open::<Db>().await?;
    // A login that may declare, but not look, is not told what was there.
    let stored = match postbox.admin().subscriptions().await {
        Err(error) if denied(&error) => Vec::new(),
        rows => rows.map_err(|e| Failure::of(&e, &tried, desk.command("status")))?,
    };
    let is_it = |r: &&SubscriptionRow| r.name == wish.name && r.application == *application && r.removed_at.is_none();
    let stored = stored.iter().find(is_it);
    if let (Some(_), Some(_)) = (stored, &wish.from) {
        let why = "it is stored already, and --from says what a new one takes of the past; nothing was changed. Leave --from out to change the pattern; replay what it is to have again; or take the past with one of another name";
        let from = match wish.from {
            Some(From::Now) => "now".to_owned(),
            Some(From::Time(time)) => time.to_string(),
            _ => "beginning".to_owned(),
        };
        let name = quoted(&plain(&format!("{}_2", wish.name)));
        let next = format!("subscriptions add {name} {} --from {from}", quoted(pattern.as_str()));
        return Err(Failure::new(REFUSED, &tried, why, desk.command(&next)));
    }
    let subscription = postbox.subscription(&wish.name).application(application).max_attempts(wish.max_attempts);
    let subscription = subscription.listening_to(pattern.clone());
    let subscription = match wish.from {
        None => subscription,
        Some(From::Now) => subscription.from_now(),
        Some(From::Beginning) => subscription.from_beginning(),
        Some(From::Time(time)) => subscription.from(time),
    };
    subscription.declare().await.map_err(|e| Failure::of(&e, &tried, desk.command("subscriptions")))?;
    if desk.output.json {
        let added = json!({
            "application": application,
            "name": wish.name,
            "pattern": pattern.as_str(),
            "max_attempts": wish.max_attempts,
            "existed": stored.is_some(),
        });
        desk.output.object(&added)?;
    } else {
        let plus = desk.output.paint(Tone::Good, "+");
        let was = match stored {
            None => String::new(),
            Some(row) if row.pattern == pattern.as_str() => "; it was there already".to_owned(),
            Some(row) => format!("; it was there already, and listened to {}", plain(&row.pattern)),
        };
        desk.output.line(&format!(
            "{plus} {} of {} listens to {}{was}",
            plain(&wish.name),
            plain(application),
            plain(pattern.as_str())
        ))?;
    }
    Ok(0)
}

async fn remove<Db: Database>(desk: &Desk<'_>, wish: Remove) -> Ended {
    let name = &wish.name;
    let tried = format!("remove the subscription {name}");
    let typed = |application: &str| {
        desk.action(&format!("subscriptions remove {}{}", quoted(&plain(name)), desk.of(application)))
    };
    let postbox = desk.open::<Db>().await?;
    let rows = rows(desk, &postbox, &tried).await?;
    let row = the_one(desk, &rows, "remove", name, &tried)?;
    let application = &row.application;
    let yes = if wish.yes { " --yes" } else { "" };
    let reason = desk.reason(wish.reason, &tried, &format!("{}{yes}", typed(application)), "why")?;
    desk.output.prose(&format!(
        "removes {} of {}: nothing is fanned out to it any more; {} waiting and {} in doubt stay as they are",
        plain(name),
        plain(application),
        number(row.pending + row.scheduled),
        number(row.in_doubt)
    ));
    if row.pending + row.scheduled > 0 {
        let filter = format!("state:pending subscription:{name} application:{application}");
        let next = desk.command(&format!("cancel {} --reason …", quoted(&plain(&filter))));
        desk.output.prose(&format!("what waits can be called off: {next}"));
    }
    confirm(wish.yes, &tried, &format!("{} --reason {}", typed(application), quoted(&plain(&reason))))?;
    let entry = postbox
        .admin()
        .remove_subscription(application, name, &desk.actor, &reason)
        .await
        .map_err(|e| Failure::of(&e, &tried, desk.command("subscriptions")))?;
    if desk.output.json {
        desk.output.object(&entry)?;
    } else {
        let plus = desk.output.paint(Tone::Good, "+");
        desk.output.line(&format!("{plus} removed by {}, audit {}", plain(&entry.actor), entry.seq))?;
    }
    Ok(0)
}

/// In a sentence.
fn number(count: i64) -> String {
    if count == 0 { "0".into() } else { capped(count) }
}

/// The subscription that is meant: of the application that was named, or the only one of its name.
pub(super) fn the_one<'r>(
    desk: &Desk<'_>,
    rows: &'r [SubscriptionRow],
    verb: &str,
    name: &str,
    tried: &str,
) -> Result<&'r SubscriptionRow, Failure> {
    let meant: Vec<&SubscriptionRow> = rows
        .iter()
        .filter(|r| r.name == name && r.removed_at.is_none())
        .filter(|r| desk.application.as_ref().is_none_or(|a| *a == r.application))
        .collect();
    match meant.as_slice() {
        [one] => Ok(one),
        [] => {
            let whose = desk.application.as_ref().map_or_else(String::new, |a| format!(" of application {a}"));
            let why = format!("there is no subscription {name}{whose}");
            Err(Failure::new(NOT_FOUND, tried, why, desk.command("subscriptions")))
        }
        [first, ..] => {
            let why = "several applications have one of that name; say whose with --application";
            let next = format!("subscriptions {verb} {} --application {}", quoted(name), quoted(&first.application));
            Err(usage(tried, why, desk.command(&next)))
        }
    }
}
