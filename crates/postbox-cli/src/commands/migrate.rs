//! `postbox migrate up|status|print`.

use postbox::{Database, Postbox};
use serde_json::json;

use crate::commands::Ended;
use crate::desk::Desk;
use crate::failure::Failure;
use crate::flags::Migrate;
use crate::output::Tone;
use crate::text::plain;

/// The SQL for the user's own migration tool. No database is needed.
pub(super) fn print(desk: &Desk<'_>) -> Ended {
    let next = || desk.command("migrate print --schema postbox");
    let failed = |e| Failure::of(&e, "print the migrations", next());
    let schema = desk.settings.schema().map_err(failed)?;
    let sql = postbox::migrations_sql(&schema).map_err(failed)?;
    if desk.output.json {
        desk.output.object(&json!({"schema": schema, "sql": sql}))?;
    } else {
        desk.output.line(sql.trim_end())?;
    }
    Ok(0)
}

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, command: Migrate) -> Ended {
    match command {
        Migrate::Up => up::<Db>(desk).await,
        Migrate::Status => status::<Db>(desk).await,
        Migrate::Print => print(desk),
    }
}

async fn up<Db: Database>(desk: &Desk<'_>) -> Ended {
    let postbox = unchecked::<Db>(desk).await?;
    let tried = "bring the schema to this version";
    let failed = |e| Failure::of(&e, tried, desk.command("migrate status"));
    let applied = postbox.migrate_up().await.map_err(failed)?;
    let status = postbox.migration_status().await.map_err(failed)?;
    if desk.output.json {
        let version = status.migrations.last().map_or(0, |(version, ..)| *version);
        desk.output.object(&json!({"schema": status.schema, "version": version, "applied": applied}))?;
        return Ok(0);
    }
    for name in &applied {
        desk.output.line(&format!("{} {}", desk.output.paint(Tone::Good, "+"), plain(name)))?;
    }
    let words = if applied.is_empty() { "was current already" } else { "is current now" };
    desk.output.prose(&format!("the schema {} {words}", plain(&status.schema)));
    Ok(0)
}

async fn status<Db: Database>(desk: &Desk<'_>) -> Ended {
    let postbox = desk.open_as_it_is::<Db>().await?;
    let status = postbox
        .migration_status()
        .await
        .map_err(|e| Failure::of(&e, "look at the migrations", desk.command("config show --origin")))?;
    if desk.output.json {
        let migrations: Vec<_> = status
            .migrations
            .iter()
            .map(|(version, name, applied_at)| json!({"version": version, "name": name, "applied_at": applied_at}))
            .collect();
        desk.output.object(&json!({"schema": status.schema, "migrations": migrations}))?;
        return Ok(0);
    }
    desk.output.line(&format!("schema {}", plain(&status.schema)))?;
    for (version, name, applied_at) in &status.migrations {
        let line = match applied_at {
            Some(at) => format!("{} {version:04} {}  applied {at:.0}", desk.output.paint(Tone::Good, "+"), plain(name)),
            None => format!("{} {version:04} {}  not applied", desk.output.paint(Tone::Doubt, "."), plain(name)),
        };
        desk.output.line(&line)?;
    }
    if status.migrations.iter().any(|(_, _, at)| at.is_none()) {
        desk.output.prose(&format!("next: {}", desk.command("migrate up")));
    }
    Ok(0)
}

async fn unchecked<Db: Database>(desk: &Desk<'_>) -> Result<Postbox<Db>, Failure> {
    Postbox::open_unchecked(desk.settings.clone()).await.map_err(|e| desk.no_connection(&e))
}
