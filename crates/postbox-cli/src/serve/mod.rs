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
use self::table::Mistake;
use crate::commands::Ended;
use crate::desk::{Desk, about_file, settings_file};
use crate::failure::{FAILED, Failure};
use crate::flags::Global;
use crate::output::Output;
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
    Plan::read(&text, &desk.settings, &desk.mistakes, &variable)
        .map_err(|mistakes| told(&mistakes, path, desk.output, &desk.command("serve --check")))
}

/// Whether the file can be read at all, before its settings are: tells every mistake that keeps it from being TOML.
pub(crate) fn readable(global: &Global, output: &Output) -> Result<(), Failure> {
    // One that is not there, or cannot be read, is told by whoever needs it.
    let Some(path) = settings_file(global) else { return Ok(()) };
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(()) };
    match table::syntax(&text) {
        mistakes if mistakes.is_empty() => Ok(()),
        mistakes => Err(told(&mistakes, &path, output, &about_file(global, "serve --check"))),
    }
}

/// Tells mistakes, each with its place; what is left to be said.
fn told(mistakes: &[Mistake], path: &Path, output: &Output, check: &str) -> Failure {
    let tried = format!("read {}", path.display());
    if output.json {
        let place = |number: usize| (number > 0).then_some(number);
        let all: Vec<_> = mistakes
            .iter()
            .map(|Mistake { line, column, why }| match place(*column) {
                Some(column) => json!({"line": place(*line), "column": column, "error": why}),
                None => json!({"line": place(*line), "error": why}),
            })
            .collect();
        let object = json!({"ok": false, "file": path.display().to_string(), "errors": all});
        if let Err(failure) = output.object(&object) {
            return failure.into();
        }
    }
    for Mistake { line, column, why } in mistakes {
        let mut place = path.display().to_string();
        for (what, number) in [("line", line), ("column", column)] {
            if *number > 0 {
                place.push_str(&format!(", {what} {number}"));
            }
        }
        output.prose(&format!("{}: {}", plain(&place), plain(why)));
    }
    let why = match mistakes.len() {
        1 => "it has a mistake, told above".to_owned(),
        many => format!("it has {many} mistakes, told above"),
    };
    Failure::new(FAILED, tried, why, format!("mend the file, then: {check}"))
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
