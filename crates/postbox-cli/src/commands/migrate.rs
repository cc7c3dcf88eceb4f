//! `postbox migrate up|down|status|roles|print`.

use postbox::{Database, Postbox};
use serde_json::json;

use crate::commands::Ended;
use crate::confirm::confirm;
use crate::desk::Desk;
use crate::failure::{Failure, denied};
use crate::flags::{Down, Migrate};
use crate::output::Tone;
use crate::text::plain;

/// The SQL for the user's own migration tool. No database is needed.
pub(super) fn print(desk: &Desk<'_>, down: bool) -> Ended {
    let next = || desk.command("migrate print --schema postbox");
    let failed = |e| Failure::of(&e, "print the migrations", next());
    let schema = desk.settings.schema().map_err(failed)?;
    let text = if down { postbox::migrations_down_sql } else { postbox::migrations_sql };
    let sql = text(&schema).map_err(failed)?;
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
        Migrate::Down(wish) => down::<Db>(desk, wish).await,
        Migrate::Roles => roles::<Db>(desk).await,
        Migrate::Print { down } => print(desk, down),
    }
}

async fn up<Db: Database>(desk: &Desk<'_>) -> Ended {
    let made = desk.makes_a_file();
    let postbox = unchecked::<Db>(desk).await?;
    let tried = "bring the schema to this version";
    let failed = |e| refused(desk, &e, tried, "migrate status");
    let mut applied = postbox.migrate_up().await.map_err(failed)?;
    let status = postbox.migration_status().await.map_err(failed)?;
    if made {
        // Opening a SQLite file brings it to this version.
        applied = status.migrations.iter().map(|(version, name, _)| format!("{version:04} {name}")).collect();
    }
    let missing = missing(&postbox).await.map_err(failed)?;
    if desk.output.json {
        let version = status.migrations.last().map_or(0, |(version, ..)| *version);
        desk.output.object(
            &json!({"schema": status.schema, "version": version, "applied": applied, "missing_roles": missing}),
        )?;
        return Ok(0);
    }
    for name in &applied {
        desk.output.line(&format!("{} {}", desk.output.paint(Tone::Good, "+"), plain(name)))?;
    }
    if made {
        desk.output.prose("opening it made the file");
    }
    let words = if applied.is_empty() { "was current already" } else { "is current now" };
    desk.output.prose(&format!("the schema {} {words}", plain(&status.schema)));
    if !missing.is_empty() {
        desk.output.prose(&format!("not there: the roles {}", plain(&missing.join(", "))));
        desk.output.prose(&format!("next, as a role that may create roles: {}", desk.command("migrate roles")));
    }
    Ok(0)
}

/// The roles that programs could be given, and that the server does not have.
async fn missing<Db: Database>(postbox: &Postbox<Db>) -> Result<Vec<String>, postbox::Error> {
    Ok(postbox.roles().await?.into_iter().filter(|r| !r.exists).map(|r| r.name).collect())
}

async fn down<Db: Database>(desk: &Desk<'_>, wish: Down) -> Ended {
    let postbox = desk.open_as_it_is::<Db>().await?;
    let tried = "take migrations back";
    let failed = |e| refused(desk, &e, tried, "migrate status");
    let status = postbox.migration_status().await.map_err(failed)?;
    let found = status.migrations.iter().filter(|(_, _, at)| at.is_some()).count() as u32;
    let to = wish.to.unwrap_or(found.saturating_sub(1));
    let lose = if wish.and_lose_data { " --and-lose-data" } else { "" };
    for (version, name, _) in status.migrations.iter().rev().filter(|(version, _, at)| at.is_some() && *version > to) {
        desk.output.prose(&format!("takes back {version:04} {}", plain(name)));
    }
    if found > to && to == 0 {
        desk.output.prose("all messages and deliveries go with the tables, and the record of what was done");
    } else if found > to {
        desk.output.prose("messages, deliveries and the record of what was done stay: only version 0 is without them");
    }
    confirm(wish.yes, tried, &desk.command(&format!("migrate down --to {to}{lose}")))?;
    let gone = match wish.and_lose_data {
        true => postbox.migrate_down_and_lose_data(to).await,
        false => postbox.migrate_down(to).await,
    };
    let gone = gone.map_err(failed)?;
    let kept: Vec<String> =
        postbox.roles().await.map_err(failed)?.into_iter().filter(|r| r.exists).map(|r| r.name).collect();
    if desk.output.json {
        desk.output.object(&json!({"schema": status.schema, "version": to, "gone": gone, "roles": kept}))?;
        return Ok(0);
    }
    for name in &gone {
        desk.output.line(&format!("{} {}", desk.output.paint(Tone::Good, "-"), plain(name)))?;
    }
    if gone.is_empty() {
        desk.output.prose(&format!("the schema {} was at version {to} already", plain(&status.schema)));
    }
    if gone.iter().any(|name| name.ends_with(" roles")) && !kept.is_empty() {
        let kept = plain(&kept.join(", "));
        desk.output.prose(&format!(
            "these roles have members or other rights, or are not this login's to drop, and stay: {kept}"
        ));
    }
    Ok(0)
}

async fn roles<Db: Database>(desk: &Desk<'_>) -> Ended {
    let postbox = desk.open::<Db>().await?;
    let roles =
        postbox.grant_roles().await.map_err(|e| refused(desk, &e, "give the roles their rights", "migrate status"))?;
    if desk.output.json {
        let names: Vec<&str> = roles.iter().map(|r| r.name.as_str()).collect();
        desk.output.object(&json!({"roles": names}))?;
        return Ok(0);
    }
    for role in &roles {
        desk.output.line(&format!("{} {}", desk.output.paint(Tone::Good, "+"), plain(&role.name)))?;
    }
    if roles.is_empty() {
        desk.output.prose("SQLite has no roles: who may read and write the file may do everything");
    }
    Ok(0)
}

async fn status<Db: Database>(desk: &Desk<'_>) -> Ended {
    let postbox = desk.open_as_it_is::<Db>().await?;
    let status = postbox
        .migration_status()
        .await
        .map_err(|e| refused(desk, &e, "look at the migrations", "config show --origin"))?;
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
    let width = status.migrations.iter().map(|(_, name, _)| name.len()).max().unwrap_or_default();
    for (version, name, applied_at) in &status.migrations {
        let name = plain(name);
        let line = match applied_at {
            Some(at) => {
                format!("{} {version:04} {name:<width$}  applied {at:.0}", desk.output.paint(Tone::Good, "+"))
            }
            None => format!("{} {version:04} {name:<width$}  not applied", desk.output.paint(Tone::Doubt, ".")),
        };
        desk.output.line(&line)?;
    }
    if status.migrations.iter().any(|(_, _, at)| at.is_none()) {
        desk.output.prose(&format!("next: {}", desk.command("migrate up")));
    }
    Ok(0)
}

/// The schema is its owner's: no role of the postbox may migrate it.
fn refused(desk: &Desk<'_>, error: &postbox::Error, tried: &str, next: &str) -> Failure {
    let next = match denied(error) {
        true => "run it as the login that owns the schema, or may make it; see docs/roles.md".to_owned(),
        false => desk.command(next),
    };
    Failure::of(error, tried, next)
}

async fn unchecked<Db: Database>(desk: &Desk<'_>) -> Result<Postbox<Db>, Failure> {
    Postbox::open_unchecked(desk.settings.clone()).await.map_err(|e| desk.no_connection(&e))
}
