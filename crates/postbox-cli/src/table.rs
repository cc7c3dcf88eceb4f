//! Tables for people.

use std::collections::BTreeSet;

use comfy_table::{Attribute, Cell, CellAlignment, Color, ContentArrangement, Table};

use crate::output::{Output, Tone};
use crate::text::plain;

/// A table without lines, its columns as wide as they need.
pub(crate) struct Columns {
    table: Table,
    right: Vec<usize>,
}

/// A cell: an inert text, and its tone if it has one.
pub(crate) type Text = (String, Option<Tone>);

impl Columns {
    /// With these headings; a `>` before one sets its column to the right.
    pub(crate) fn new(headings: &[&str]) -> Columns {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
        let right = headings.iter().enumerate().filter(|(_, h)| h.starts_with('>')).map(|(i, _)| i).collect();
        let mut columns = Columns { table, right };
        columns.row(headings.iter().map(|h| (h.trim_start_matches('>').to_owned(), Some(Tone::Faint))));
        columns
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = Text>) {
        let cells = cells.into_iter().enumerate().map(|(i, (text, tone))| {
            let side = if self.right.contains(&i) { CellAlignment::Right } else { CellAlignment::Left };
            let cell = Cell::new(text).set_alignment(side);
            match tone {
                None => cell,
                Some(Tone::Good) => cell.fg(Color::DarkGreen),
                Some(Tone::Bad) => cell.fg(Color::DarkRed),
                Some(Tone::Doubt) => cell.fg(Color::DarkYellow).add_attribute(Attribute::Bold),
                Some(Tone::Busy) => cell.fg(Color::DarkCyan),
                Some(Tone::Faint) => cell.add_attribute(Attribute::Dim),
                Some(Tone::Strong) => cell.add_attribute(Attribute::Bold),
            }
        });
        let cells: Vec<Cell> = cells.collect();
        self.table.add_row(cells);
    }

    /// Prints it.
    pub(crate) fn print(mut self, output: &Output) -> std::io::Result<()> {
        if output.coloured() {
            self.table.enforce_styling();
        } else {
            self.table.force_no_tty();
        }
        for (i, column) in self.table.column_iter_mut().enumerate() {
            column.set_padding(if i == 0 { (0, 1) } else { (1, 1) });
        }
        for line in self.table.lines() {
            output.line(line.trim_end())?;
        }
        Ok(())
    }
}

/// Names of what belongs to applications: with the application where there are several.
pub(crate) fn names<'a>(applications: impl Iterator<Item = &'a str>) -> impl Fn(&str, &str) -> String {
    let several = applications.collect::<BTreeSet<_>>().len() > 1;
    move |application, name| match several {
        true => format!("{}/{}", plain(application), plain(name)),
        false => plain(name),
    }
}

/// A number that stands out if there is any.
pub(crate) fn notable(tone: Tone, number: i64, shown: fn(i64) -> String) -> Text {
    if number > 0 { toned(tone, shown(number)) } else { text("-") }
}

/// A cell without a tone.
pub(crate) fn text(text: impl Into<String>) -> Text {
    (text.into(), None)
}

/// A cell with a tone.
pub(crate) fn toned(tone: Tone, text: impl Into<String>) -> Text {
    (text.into(), Some(tone))
}
