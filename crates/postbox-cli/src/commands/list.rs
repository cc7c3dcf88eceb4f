//! `postbox list [FILTER...]`, and the table that other commands show deliveries in.

use postbox::Database;
use postbox::admin::{DeliveryRow, Filter};

use crate::commands::Ended;
use crate::desk::Desk;
use crate::failure::Failure;
use crate::flags::List;
use crate::output::{Output, state_sign};
use crate::table::{Columns, text, toned};
use crate::text::{ago, plain, shortened, until};

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, list: List) -> Ended {
    let tried = "list deliveries";
    let example = || desk.command("list state:dead,in_doubt");
    let filter: Filter = list.filter.join(" ").parse().map_err(|e| filter_failure(e, tried, example()))?;
    let postbox = desk.open::<Db>().await?;
    let rows = postbox.admin().list(&filter, list.limit).await.map_err(|e| Failure::of(&e, tried, example()))?;
    if desk.output.json {
        for row in &rows {
            desk.output.object(row)?;
        }
        return Ok(0);
    }
    if rows.is_empty() {
        let next = if filter.subscriptions.is_empty() { "status" } else { "subscriptions" };
        desk.output.prose(if filter == Filter::default() { "no deliveries yet" } else { "no delivery matches" });
        desk.output.prose(&format!("next: {}", desk.command(next)));
        return Ok(0);
    }
    table(&rows, desk.output)?;
    if rows.len() == list.limit as usize {
        desk.output.prose(&format!(
            "the newest {}; there may be more: --limit {}",
            rows.len(),
            u64::from(list.limit) * 2
        ));
    }
    Ok(0)
}

/// A filter that cannot be meant is a mistake in typing, whatever part of it is wrong.
fn filter_failure(error: postbox::Error, tried: &str, next: String) -> Failure {
    Failure::new(crate::failure::USAGE, tried, error.to_string(), next)
}

/// One row a delivery; the ids that producers gave only if there are any, the applications only if there
/// are several, the due times only if something waits for one.
pub(super) fn table(rows: &[DeliveryRow], output: &Output) -> std::io::Result<()> {
    let external = rows.iter().any(|r| r.external_id.is_some());
    let several = rows.iter().any(|r| r.application != rows[0].application);
    let mut headings = vec![">ID", "STATE", "TOPIC"];
    if several {
        headings.push("APPLICATION");
    }
    headings.extend(["SUBSCRIPTION", ">TRY", ">AGE"]);
    // What waits for a time only.
    let timed = rows.iter().any(|r| r.next_due_at.is_some());
    if timed {
        headings.push(">DUE");
    }
    if external {
        headings.push("EXTERNAL ID");
    }
    headings.push("LAST ERROR");
    let mut columns = Columns::new(&headings);
    for row in rows {
        let (sign, tone) = state_sign(row.state);
        let mut cells = vec![text(row.id.to_string()), toned(tone, sign), text(shortened(&row.topic, 40))];
        if several {
            cells.push(text(shortened(&row.application, 30)));
        }
        cells.push(text(shortened(&row.subscription, 40)));
        cells.push(text(format!("{}/{}", row.attempt, row.max_attempts)));
        cells.push(text(ago(row.since.unwrap_or(row.recorded_at))));
        if timed {
            cells.push(text(row.next_due_at.map_or_else(|| "-".into(), until)));
        }
        if external {
            cells.push(text(row.external_id.as_deref().map_or_else(|| "-".into(), |id| shortened(id, 24))));
        }
        cells.push(text(
            row.last_error.as_deref().or(row.note.as_deref()).map_or_else(|| "-".into(), |e| shortened(e, 60)),
        ));
        columns.row(cells);
    }
    columns.print(output)
}

/// What waits for a time, in words.
pub(super) fn due(row: &DeliveryRow) -> Option<String> {
    let due = row.next_due_at?;
    Some(format!("due {}", plain(&format!("{due:.0}"))))
}
