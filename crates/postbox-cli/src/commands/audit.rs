//! `postbox audit`: what operators did.

use postbox::Database;
use postbox::admin::AuditEntry;
use serde_json::Value;

use crate::commands::Ended;
use crate::desk::Desk;
use crate::failure::Failure;
use crate::flags::Audit;
use crate::output::state_word;
use crate::table::{Columns, text};
use crate::text::{plain, shortened};

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, audit: Audit) -> Ended {
    let postbox = desk.open::<Db>().await?;
    let failed = |e| Failure::of(&e, "read the audit", desk.command("status"));
    let entries = postbox.admin().audit(audit.limit).await.map_err(failed)?;
    if desk.output.json {
        for entry in &entries {
            desk.output.object(entry)?;
        }
        return Ok(0);
    }
    if entries.is_empty() {
        desk.output.prose("no operator did anything yet");
        return Ok(0);
    }
    // SQLite has no logins.
    let logins = entries.iter().any(|entry| entry.login.is_some());
    let mut headings = vec![">AUDIT", "AT", "ACTOR"];
    if logins {
        headings.push("LOGIN");
    }
    headings.extend(["ACTION", ">DELIVERY", "SUBSCRIPTION"]);
    let whats: Vec<_> = entries.iter().map(what).collect();
    let others = whats.iter().any(Option::is_some);
    if others {
        headings.push("WHAT");
    }
    headings.extend(["CHANGE", "REASON"]);
    let mut columns = Columns::new(&headings);
    for (entry, what) in entries.into_iter().zip(whats) {
        let change = match (&entry.state_before, &entry.state_after) {
            (Some(before), Some(after)) => format!("{} -> {}", state_word(before), state_word(after)),
            (None, Some(after)) => state_word(after),
            _ => "-".into(),
        };
        let mut cells =
            vec![text(entry.seq.to_string()), text(format!("{:.0}", entry.at)), text(shortened(&entry.actor, 30))];
        if logins {
            cells.push(text(entry.login.as_deref().map_or_else(|| "-".into(), |login| shortened(login, 30))));
        }
        cells.extend([
            text(plain(&entry.action)),
            text(entry.delivery.map_or_else(|| "-".into(), |d| d.to_string())),
            text(entry.subscription.as_deref().map_or_else(|| "-".into(), plain)),
        ]);
        if others {
            cells.push(text(what.unwrap_or_else(|| "-".into())));
        }
        cells.extend([text(change), text(entry.reason.as_deref().map_or_else(|| "-".into(), plain))]);
        columns.row(cells);
    }
    columns.print(desk.output)?;
    Ok(0)
}

/// What it was about beside a delivery or a subscription, and what came of it: what else is on record is in the JSON.
fn what(entry: &AuditEntry) -> Option<String> {
    let detail = entry.detail.as_ref()?;
    let named = [
        ("quarantine", "entry"),
        ("source", "source"),
        ("key", "key"),
        ("replayed_as", "replayed as"),
        ("evidence", "evidence"),
        ("refused", "refused:"),
    ];
    let parts: Vec<String> = named
        .into_iter()
        .filter_map(|(name, word)| {
            Some(match detail.get(name)? {
                Value::Null => return None,
                Value::String(value) => format!("{word} {value}"),
                value => format!("{word} {value}"),
            })
        })
        .collect();
    (!parts.is_empty()).then(|| shortened(&parts.join(", "), 80))
}
