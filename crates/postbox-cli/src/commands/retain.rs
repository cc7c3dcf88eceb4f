//! `postbox retain`: removes what was kept long enough, now; workers do it by themselves.

use postbox::Database;
use postbox::admin::RetentionPreview;

use crate::commands::Ended;
use crate::confirm::confirm;
use crate::desk::Desk;
use crate::failure::{FAILED, Failure};
use crate::flags::Retain;
use crate::output::{Tone, state_word};
use crate::table::{Columns, text};
use crate::text::{ago, count, plain};

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, wish: Retain) -> Ended {
    let tried = "remove what was kept long enough";
    let failed = |e| Failure::of(&e, tried, desk.command("config show --origin"));
    let keep_unrouted = desk.settings.keep_unrouted().map_err(failed)?;
    let postbox = desk.open::<Db>().await?;
    let admin = postbox.admin();
    let preview = admin.retention_preview(keep_unrouted).await.map_err(failed)?;
    if wish.preview {
        return show(desk, &preview);
    }
    let deliveries: i64 = preview.deliveries.iter().map(|row| row.deliveries).sum();
    if deliveries + preview.messages > 0 {
        desk.output.prose(&format!(
            "removes {} with their history, and {}: for good",
            counted(deliveries, "delivery", "deliveries"),
            counted(preview.messages, "message", "messages")
        ));
        confirm(wish.yes, tried, &desk.command("retain"))?;
    }
    let removed = admin.retain(keep_unrouted).await.map_err(failed)?;
    if desk.output.json {
        desk.output.object(&removed)?;
    } else {
        let plus = desk.output.paint(Tone::Good, "+");
        desk.output.line(&format!(
            "{plus} removed {} and {}",
            counted(removed.deliveries, "delivery", "deliveries"),
            counted(removed.messages, "message", "messages")
        ))?;
    }
    if removed.busy {
        let why = "somebody else is at it, or old messages are being handed out; the rest stays for now";
        return Err(Failure::new(FAILED, tried, why, desk.command("retain")));
    }
    Ok(0)
}

fn show(desk: &Desk<'_>, preview: &RetentionPreview) -> Ended {
    if desk.output.json {
        desk.output.object(preview)?;
        return Ok(0);
    }
    if preview.deliveries.is_empty() && preview.messages == 0 {
        desk.output.prose("nothing was kept long enough to go");
        return Ok(0);
    }
    let mut columns = Columns::new(&["APPLICATION", "SUBSCRIPTION", "OUTCOME", ">DELIVERIES", ">OLDEST"]);
    for row in &preview.deliveries {
        columns.row([
            text(plain(&row.application)),
            text(plain(&row.subscription)),
            text(state_word(&row.outcome)),
            text(count(row.deliveries)),
            text(ago(row.oldest)),
        ]);
    }
    columns.print(desk.output)?;
    desk.output
        .line(&format!("and {} that nothing refers to then", counted(preview.messages, "message", "messages")))?;
    Ok(0)
}

/// Not capped: the numbers are exact, and what they count is gone.
fn counted(number: i64, one: &str, more: &str) -> String {
    match number {
        0 => format!("0 {more}"),
        1 => format!("1 {one}"),
        _ => format!("{} {more}", count(number)),
    }
}
