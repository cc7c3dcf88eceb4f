//! `postbox sources [list]`, `pause` and `resume`.

use postbox::Database;
use postbox::admin::SourceRow;

use crate::commands::Ended;
use crate::commands::pause::{told, verb};
use crate::desk::{Desk, usage};
use crate::failure::{Failure, NOT_FOUND};
use crate::flags::{Pause, Sources, SourcesCommand};
use crate::output::{Output, Tone};
use crate::table::{Columns, names, notable, text, toned};
use crate::text::{ago, count, plain, quoted, shortened};

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, sources: Sources) -> Ended {
    match sources.command {
        None | Some(SourcesCommand::List) => list::<Db>(desk).await,
        Some(SourcesCommand::Pause(wish)) => pause::<Db>(desk, wish, true).await,
        Some(SourcesCommand::Resume(wish)) => pause::<Db>(desk, wish, false).await,
    }
}

async fn list<Db: Database>(desk: &Desk<'_>) -> Ended {
    let postbox = desk.open::<Db>().await?;
    let rows = postbox.admin().sources().await;
    let mut rows = rows.map_err(|e| Failure::of(&e, "list the sources", desk.command("status")))?;
    rows.retain(|row| desk.application.as_ref().is_none_or(|wanted| *wanted == row.application));
    if desk.output.json {
        for row in &rows {
            desk.output.object(row)?;
        }
        return Ok(0);
    }
    if rows.is_empty() {
        desk.output.prose(
            "nothing is received from anywhere: a worker's `receive` makes a source, and `postbox serve` does, too",
        );
        return Ok(0);
    }
    print(&rows, desk.output)?;
    if rows.iter().any(|row| row.quarantined + row.conflict > 0) {
        desk.output.prose(&format!("next: {}", desk.command("quarantine list")));
    }
    Ok(0)
}

/// The sources as a table, and why some of them fail: for `status`, too.
pub(super) fn print(rows: &[SourceRow], output: &Output) -> std::io::Result<()> {
    table(rows).print(output)?;
    for row in rows.iter().filter(|row| row.state == "failing") {
        let trouble = plain(row.trouble.as_deref().unwrap_or_default());
        output.line(&format!("{}  {}: {trouble}", output.paint(Tone::Bad, "failing"), plain(&row.name)))?;
    }
    Ok(())
}

fn table(rows: &[SourceRow]) -> Columns {
    let mut columns = Columns::new(&[
        "source",
        "kind",
        "state",
        ">lag",
        ">received",
        ">duplicate",
        ">conflict",
        ">quarantined",
        ">lost",
        "last",
    ]);
    let name = names(rows.iter().map(|row| row.application.as_str()));
    let bad = |number: i64| notable(Tone::Bad, number, count);
    for row in rows {
        let state = match row.state.as_str() {
            "receiving" => toned(Tone::Good, "receiving"),
            "failing" => toned(Tone::Bad, "failing"),
            "paused" => toned(Tone::Doubt, "paused"),
            other => toned(Tone::Faint, plain(other)),
        };
        columns.row([
            text(name(&row.application, &row.name)),
            text(plain(&row.kind)),
            state,
            text(row.lag.map_or_else(|| "-".into(), count)),
            text(count(row.received)),
            text(count(row.duplicate)),
            bad(row.conflict),
            bad(row.quarantined),
            bad(row.lost),
            text(row.last_at.map_or_else(|| "-".into(), |at| format!("{} ago", ago(at)))),
        ]);
    }
    columns
}

/// Whether a source is one that this name may mean here.
pub(super) fn is_meant(desk: &Desk<'_>, name: &str, row: &SourceRow) -> bool {
    row.name == name && desk.application.as_ref().is_none_or(|wanted| *wanted == row.application)
}

/// There is no source of that name.
pub(super) fn not_there(desk: &Desk<'_>, name: &str, tried: &str) -> Failure {
    let whose = desk.application.as_ref().map_or_else(String::new, |a| format!(" of application {a}"));
    let why = format!("there is no source {}{whose}", shortened(name, 80));
    Failure::new(NOT_FOUND, tried, why, desk.command("sources"))
}

async fn pause<Db: Database>(desk: &Desk<'_>, wish: Pause, pauses: bool) -> Ended {
    let (verb, hint) = verb(pauses);
    let name = plain(&wish.name);
    let tried = format!("{verb} the source {}", shortened(&name, 80));
    let postbox = desk.open::<Db>().await?;
    let failed = |e| Failure::of(&e, &tried, desk.command("sources"));
    let rows = postbox.admin().sources().await.map_err(failed)?;
    let mut found = rows.iter().filter(|row| is_meant(desk, &wish.name, row));
    let row = match (found.next(), found.next()) {
        (Some(row), None) => row,
        (None, _) => return Err(not_there(desk, &wish.name, &tried)),
        (Some(first), Some(_)) => {
            let why = "several applications have one of that name; say whose with --application";
            let next = format!("sources {verb} {} --application {}", quoted(&name), quoted(&plain(&first.application)));
            return Err(usage(&tried, why, desk.command(&next)));
        }
    };
    let whose = desk.of(&row.application);
    let typed = |verb: &str| desk.action(&format!("sources {verb} {}{whose}", quoted(&name)));
    let reason = desk.reason(wish.reason, &tried, &typed(verb), hint)?;
    let admin = postbox.admin();
    let entry = match pauses {
        true => admin.pause_source(&row.application, &row.name, &desk.actor, &reason).await,
        false => admin.resume_source(&row.application, &row.name, &desk.actor, &reason).await,
    }
    .map_err(failed)?;
    if told(desk, &entry, pauses, row.paused_at)? && pauses {
        desk.output.prose("what was read is stored and acknowledged; within about a second nothing more is read");
        desk.output.prose(&format!("next: {} --reason …", typed("resume")));
    }
    Ok(0)
}
