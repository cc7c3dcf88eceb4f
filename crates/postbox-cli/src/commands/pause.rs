//! `postbox subscriptions pause NAME` and `postbox subscriptions resume NAME`.

use postbox::Database;

use crate::commands::Ended;
use crate::commands::subscriptions::{rows, the_one};
use crate::desk::Desk;
use crate::failure::Failure;
use crate::flags::Pause;
use crate::output::Tone;
use crate::text::{ago, many, plain, quoted};

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, wish: Pause, pauses: bool) -> Ended {
    let (verb, hint) = if pauses { ("pause", "why") } else { ("resume", "what was mended") };
    let name = &wish.name;
    let tried = format!("{verb} the subscription {name}");
    let typed = |verb: &str, application: &str| {
        let whose = match desk.application {
            Some(_) => String::new(),
            None => format!(" --application {}", quoted(&plain(application))),
        };
        desk.action(&format!("subscriptions {verb} {}{whose}", quoted(&plain(name))))
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
    if desk.output.json {
        desk.output.object(&entry)?;
        return Ok(0);
    }
    let plus = desk.output.paint(Tone::Good, "+");
    let was = match (pauses, row.paused_at) {
        (true, Some(since)) => format!("; it has been paused for {} already", ago(since)),
        (false, None) => "; it was not paused".to_owned(),
        _ => String::new(),
    };
    let done = if pauses { "paused" } else { "resumed" };
    desk.output.line(&format!("{plus} {done} by {}, audit {}{was}", plain(&entry.actor), entry.seq))?;
    if pauses {
        let waiting = many(row.pending + row.scheduled, "delivery waits", "deliveries wait");
        desk.output.prose(&format!("{waiting}; what runs goes on to its end"));
        desk.output.prose(&format!("next: {} --reason …", typed("resume", application)));
    }
    Ok(0)
}
