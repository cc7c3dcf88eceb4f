//! `postbox subscriptions pause NAME` and `postbox subscriptions resume NAME`.

use jiff::Timestamp;
use postbox::Database;
use postbox::admin::AuditEntry;

use crate::commands::Ended;
use crate::commands::subscriptions::{rows, the_one};
use crate::desk::Desk;
use crate::failure::Failure;
use crate::flags::Pause;
use crate::output::Tone;
use crate::text::{ago, many, plain, quoted};

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, wish: Pause, pauses: bool) -> Ended {
    let (verb, hint) = verb(pauses);
    let name = &wish.name;
    let tried = format!("{verb} the subscription {name}");
    let typed = |verb: &str, application: &str| {
        desk.action(&format!("subscriptions {verb} {}{}", quoted(&plain(name)), desk.of(application)))
    };
    let postbox = desk.open::<Db>().await?;
    let rows = rows(desk, &postbox, &tried).await?;
    let row = the_one(desk, &rows, verb, name, &tried)?;
    let application = &row.application;
    let reason = desk.reason(wish.reason, &tried, &typed(verb, application), hint)?;
    let admin = postbox.admin();
    let entry = match pauses {
        true => admin.pause(application, name, &desk.actor, &reason).await,
        false => admin.resume(application, name, &desk.actor, &reason).await,
    }
    .map_err(|e| Failure::of(&e, &tried, desk.command("subscriptions")))?;
    if told(desk, &entry, pauses, row.paused_at)? && pauses {
        let waiting = many(row.pending + row.scheduled, "delivery waits", "deliveries wait");
        desk.output.prose(&format!("{waiting}; what runs goes on to its end"));
        desk.output.prose(&format!("next: {} --reason …", typed("resume", application)));
    }
    Ok(0)
}

/// What is done, and the hint for its reason.
pub(super) fn verb(pauses: bool) -> (&'static str, &'static str) {
    if pauses { ("pause", "why") } else { ("resume", "what was mended") }
}

/// Tells what is on record now; whether people read it, who are told what follows.
pub(super) fn told(
    desk: &Desk<'_>,
    entry: &AuditEntry,
    pauses: bool,
    paused_at: Option<Timestamp>,
) -> Result<bool, Failure> {
    if desk.output.json {
        desk.output.object(entry)?;
        return Ok(false);
    }
    let plus = desk.output.paint(Tone::Good, "+");
    let was = match (pauses, paused_at) {
        (true, Some(since)) => format!("; it has been paused for {} already", ago(since)),
        (false, None) => "; it was not paused".to_owned(),
        _ => String::new(),
    };
    let done = if pauses { "paused" } else { "resumed" };
    desk.output.line(&format!("{plus} {done} by {}, audit {}{was}", plain(&entry.actor), entry.seq))?;
    Ok(true)
}
