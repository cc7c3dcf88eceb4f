//! `postbox quarantine [list]`, `show`, `retry` and `drop`: what came in and could not become a message.

use std::time::Duration;

use postbox::admin::{QuarantineDetail, QuarantineFilter, QuarantineRow};
use postbox::source::Raw;
use postbox::{Database, Error, Postbox};

use crate::commands::Ended;
use crate::commands::sources::{is_meant, not_there};
use crate::desk::Desk;
use crate::failure::{FAILED, Failure};
use crate::flags::{OneQuarantined, Quarantine, QuarantineCommand, QuarantineList};
use crate::output::Tone;
use crate::table::{Columns, text, toned};
use crate::text::{ago, many, plain, shortened};

/// How long a retry is waited for: whoever receives from the source looks every second.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked what came of it.
const LOOK: Duration = Duration::from_millis(200);
/// What is shown of a value, in characters.
const SHOWN: usize = 2000;

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, quarantine: Quarantine) -> Ended {
    match quarantine.command {
        None => list::<Db>(desk, quarantine.list).await,
        Some(QuarantineCommand::List(wish)) => list::<Db>(desk, wish).await,
        Some(QuarantineCommand::Show { number }) => show::<Db>(desk, number).await,
        Some(QuarantineCommand::Retry(wish)) => retry::<Db>(desk, wish).await,
        Some(QuarantineCommand::Drop(wish)) => drop_it::<Db>(desk, wish).await,
    }
}

fn tone(kind: &str) -> Tone {
    match kind {
        "conflict" => Tone::Doubt,
        "lost" => Tone::Faint,
        _ => Tone::Bad,
    }
}

async fn list<Db: Database>(desk: &Desk<'_>, wish: QuarantineList) -> Ended {
    let postbox = desk.open::<Db>().await?;
    let filter = QuarantineFilter {
        application: desk.application.clone(),
        source: wish.source,
        kind: wish.kind.map(|kind| kind.as_str().to_owned()),
        ended: wish.all,
    };
    let rows = postbox.admin().quarantine(&filter, wish.limit).await;
    let failed = |e: Error| Failure::of(&e, "list the quarantine", desk.command("status"));
    let rows = rows.map_err(failed)?;
    if let (true, Some(name)) = (rows.is_empty(), &filter.source) {
        let sources = postbox.admin().sources().await.map_err(failed)?;
        if !sources.iter().any(|row| is_meant(desk, name, row)) {
            return Err(not_there(desk, name, "list the quarantine"));
        }
    }
    if desk.output.json {
        for row in &rows {
            desk.output.object(row)?;
        }
        return Ok(0);
    }
    if rows.is_empty() {
        let wanted = filter.application.is_some() || filter.source.is_some() || filter.kind.is_some();
        desk.output.prose(if wanted { "nothing that fits is in quarantine" } else { "nothing is in quarantine" });
        return Ok(0);
    }
    let mut columns = Columns::new(&[">ID", "SOURCE", "KIND", "POSITION", ">BYTES", "CAME", "REASON"]);
    for row in &rows {
        let reason = match (&row.retried, row.retry_at) {
            (_, Some(_)) => format!("(to be read again) {}", row.reason),
            (Some(retried), None) => retried.clone(),
            (None, None) => row.reason.clone(),
        };
        columns.row([
            text(row.id.to_string()),
            text(plain(&row.source)),
            toned(tone(&row.kind), plain(&row.kind)),
            text(shortened(&plain(&row.position), 40)),
            text(row.bytes.to_string()),
            text(format!("{} ago", ago(row.at))),
            text(shortened(&plain(&reason), 80)),
        ]);
    }
    columns.print(desk.output)?;
    if let Some(row) = rows.first() {
        desk.output.prose(&format!("next: {}", desk.command(&format!("quarantine show {}", row.id))));
    }
    if rows.len() == wish.limit as usize {
        desk.output.prose(&format!("there may be more than these {}; --limit shows more", wish.limit));
    }
    Ok(0)
}

async fn found<Db: Database>(
    desk: &Desk<'_>,
    postbox: &Postbox<Db>,
    number: i64,
    tried: &str,
) -> Result<QuarantineDetail, Failure> {
    let detail = postbox.admin().quarantined(number).await;
    detail.map_err(|e| Failure::of(&e, tried, desk.command("quarantine list")))
}

async fn show<Db: Database>(desk: &Desk<'_>, number: i64) -> Ended {
    let postbox = desk.open::<Db>().await?;
    let detail = found(desk, &postbox, number, &format!("show entry {number} of the quarantine")).await?;
    if desk.output.json {
        desk.output.object(&detail)?;
        return Ok(0);
    }
    let QuarantineDetail { row, raw, .. } = &detail;
    let line = |name: &str, value: &str| {
        let name = desk.output.paint(Tone::Faint, &format!("{name:10}"));
        desk.output.line(&format!("{name} {value}"))
    };
    let kind = desk.output.paint(tone(&row.kind), &plain(&row.kind));
    desk.output.line(&format!("{} {kind}, {} ago, from {}", row.id, ago(row.at), plain(&row.source)))?;
    line("reason", &plain(&row.reason))?;
    line("position", &plain(&row.position))?;
    if let Some(identity) = &row.identity {
        line("id", &plain(identity))?;
    }
    if let Some(message) = row.message {
        line("message", &message.to_string())?;
    }
    if let Some(at) = row.retry_at {
        line("retry", &format!("wanted {} ago; whoever receives from the source does it", ago(at)))?;
    }
    if let Some(retried) = &row.retried {
        line("retried", &plain(retried))?;
    }
    for (name, value) in &raw.fields {
        line(&shortened(&spelled(name), 40), &shortened(&spelled(value), SHOWN))?;
    }
    if let Some(body) = &raw.body {
        line("body", &shortened(&spelled(body), SHOWN))?;
    }
    if !long(raw) {
        return next(desk, row);
    }
    desk.output.prose(&format!("all of it: {}", desk.command(&format!("--json quarantine show {}", row.id))));
    next(desk, row)
}

fn long(raw: &Raw) -> bool {
    raw.fields.iter().map(|(_, value)| value).chain(&raw.body).any(|value| value.len() > SHOWN)
}

/// Text as it is, what is none in words.
fn spelled(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => plain(text),
        Err(_) => format!("{} that are no UTF-8: {}", many(bytes.len() as i64, "byte", "bytes"), bytes.escape_ascii()),
    }
}

fn next(desk: &Desk<'_>, row: &QuarantineRow) -> Ended {
    if row.ended_at.is_none() {
        let verb = if row.kind == "malformed" || row.kind == "undeliverable" { "retry" } else { "drop" };
        desk.output.prose(&format!("next: {} --reason …", desk.action(&format!("quarantine {verb} {}", row.id))));
    }
    Ok(0)
}

async fn retry<Db: Database>(desk: &Desk<'_>, wish: OneQuarantined) -> Ended {
    let number = wish.number;
    let tried = format!("have entry {number} of the quarantine read again");
    let typed = desk.action(&format!("quarantine retry {number}"));
    let reason = desk.reason(wish.reason, &tried, &typed, "what was mended")?;
    let postbox = desk.open::<Db>().await?;
    let entry = postbox.admin().retry_quarantined(number, &desk.actor, &reason).await;
    let entry = entry.map_err(|e| {
        let look = match e {
            Error::NotFound(_) => "quarantine list".to_owned(),
            _ => format!("quarantine show {number}"),
        };
        Failure::of(&e, &tried, desk.command(&look))
    })?;
    // Whoever receives from its source reads it again, with the format that is set there.
    let asked = tokio::time::Instant::now();
    let row = loop {
        let row = found(desk, &postbox, number, &tried).await?.row;
        if row.retry_at.is_none() || asked.elapsed() >= PATIENCE {
            break row;
        }
        tokio::time::sleep(LOOK).await;
    };
    let failed = row.retry_at.is_none() && row.ended_at.is_none();
    let code = if failed { FAILED } else { 0 };
    if desk.output.json {
        desk.output.object(&row)?;
        return Ok(code);
    }
    let came_to = plain(row.retried.as_deref().unwrap_or_default());
    let look = || desk.output.prose(&format!("next: {}", desk.command(&format!("quarantine show {number}"))));
    let by = format!("by {}, audit {}", plain(&entry.actor), entry.seq);
    if row.retry_at.is_some() {
        desk.output.line(&format!("{} it waits to be read again; {by}", desk.output.paint(Tone::Doubt, ".")))?;
        desk.output.prose(&format!(
            "what you wanted is on record, and nobody has done it yet: whoever receives from {} does, within about a second; is there one? {}",
            plain(&row.source),
            desk.command("sources"),
        ));
        look();
    } else if row.ended_at.is_some() {
        desk.output.line(&format!("{} {came_to}; {by}", desk.output.paint(Tone::Good, "+")))?;
    } else {
        desk.output.line(&format!("{} {came_to}; {by}", desk.output.paint(Tone::Bad, "x")))?;
        look();
    }
    Ok(code)
}

async fn drop_it<Db: Database>(desk: &Desk<'_>, wish: OneQuarantined) -> Ended {
    let number = wish.number;
    let tried = format!("drop entry {number} of the quarantine");
    let reason =
        desk.reason(wish.reason, &tried, &desk.action(&format!("quarantine drop {number}")), "why it is not wanted")?;
    let postbox = desk.open::<Db>().await?;
    let entry = postbox.admin().drop_quarantined(number, &desk.actor, &reason).await;
    let entry = entry.map_err(|e| Failure::of(&e, &tried, desk.command("quarantine list")))?;
    if desk.output.json {
        desk.output.object(&entry)?;
        return Ok(0);
    }
    let plus = desk.output.paint(Tone::Good, "+");
    desk.output.line(&format!(
        "{plus} dropped; that it was there stays on record: by {}, audit {}",
        plain(&entry.actor),
        entry.seq
    ))?;
    Ok(0)
}
