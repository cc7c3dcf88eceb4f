//! `postbox config show`.

use serde_json::json;

use crate::commands::Ended;
use crate::desk::Desk;
use crate::flags::Config;
use crate::table::{Columns, text};
use crate::text::plain;

pub(super) fn run(desk: &Desk<'_>, command: Config) -> Ended {
    let Config::Show { origin } = command;
    let settings = desk.settings.shown();
    if desk.output.json {
        for (name, value, from) in settings {
            desk.output.object(&json!({"setting": name, "value": value, "origin": from}))?;
        }
        return Ok(0);
    }
    let mut columns = Columns::new(if origin { &["SETTING", "VALUE", "ORIGIN"] } else { &["SETTING", "VALUE"] });
    for (name, value, from) in settings {
        let value = if value.is_empty() { "-".to_owned() } else { plain(&value) };
        let cells = [text(name), text(value), text(plain(&from))];
        columns.row(cells.into_iter().take(if origin { 3 } else { 2 }));
    }
    columns.print(desk.output)?;
    Ok(0)
}
