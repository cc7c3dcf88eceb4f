//! `postbox serve`: sources, relays and pushes from a file, with no Rust.

mod build;
mod check;
mod config;
mod http;
mod run;
mod table;
pub(crate) mod test;

use std::path::Path;

use serde_json::json;

use self::config::Plan;
pub(crate) use self::run::run;
use crate::commands::Ended;
use crate::desk::Desk;
use crate::failure::{FAILED, Failure};
use crate::text::plain;

/// Reads the plan of the settings' file; tells every mistake in it.
pub(crate) fn plan(desk: &Desk<'_>) -> Result<Plan, Failure> {
    let Some(path) = &desk.file else {
        let why = "there is no postbox.toml in this folder";
        return Err(Failure::new(
            FAILED,
            "find out what to serve",
            why,
            "postbox serve --config FILE; docs/serve.md has an example",
        ));
    };
    let tried = format!("read {}", path.display());
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::new(FAILED, &tried, error.to_string(), desk.command("serve --check")))?;
    let variable = |name: &str| std::env::var(name).ok();
    let mistakes = match Plan::read(&text, &desk.settings, &variable) {
        Ok(plan) => return Ok(plan),
        Err(mistakes) => mistakes,
    };
    if desk.output.json {
        let all: Vec<_> = mistakes
            .iter()
            .map(|mistake| json!({"line": (mistake.line > 0).then_some(mistake.line), "error": mistake.why}))
            .collect();
        desk.output.object(&json!({"ok": false, "file": path.display().to_string(), "errors": all}))?;
    }
    for mistake in &mistakes {
        let place = match mistake.line {
            0 => path.display().to_string(),
            line => format!("{}, line {line}", path.display()),
        };
        desk.output.prose(&format!("{}: {}", plain(&place), plain(&mistake.why)));
    }
    let why = match mistakes.len() {
        1 => "it has a mistake, told above".to_owned(),
        many => format!("it has {many} mistakes, told above"),
    };
    let next = format!("mend the file, then: {}", desk.command("serve --check"));
    Err(Failure::new(FAILED, tried, why, next))
}

/// Says what would run, and runs nothing.
pub(crate) fn check(desk: &Desk<'_>, plan: &Plan) -> Ended {
    let file = desk.file.as_deref().unwrap_or(Path::new("postbox.toml")).display().to_string();
    if desk.output.json {
        desk.output.object(&check::object(plan, &file))?;
        return Ok(0);
    }
    desk.output.line(&format!("{} is fine; it would", plain(&file)))?;
    for line in check::lines(plan, &desk.settings) {
        desk.output.line(&format!("  {line}"))?;
    }
    desk.output.prose("nothing was connected to");
    Ok(0)
}
