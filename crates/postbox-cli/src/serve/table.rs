//! Tables of the configuration, with the line of everything in them. A mistake is noted and does not end the
//! reading, so that all are told at once.

use std::cell::RefCell;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

/// Something wrong in the file, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mistake {
    /// From 1; 0 if it is no line's.
    pub(crate) line: usize,
    /// In characters, from 1; 0 if it is the whole line's.
    pub(crate) column: usize,
    /// What is wrong, and what to write.
    pub(crate) why: String,
}

fn line(text: &str, at: usize) -> usize {
    text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1
}

/// What keeps a text from being TOML.
pub(crate) fn syntax(text: &str) -> Vec<Mistake> {
    let (_, errors) = DeTable::parse_recoverable(text);
    let mistake = |error: &toml::de::Error| {
        let words: Vec<&str> = error.message().lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let why = format!("this is no TOML: {}", words.join("; "));
        let Some(at) = error.span().map(|span| span.start) else { return Mistake { line: 0, column: 0, why } };
        let before = text.get(..at).unwrap_or(text);
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Mistake { line: line(text, at), column, why }
    };
    let mut mistakes: Vec<Mistake> = errors.iter().map(mistake).collect();
    mistakes.sort();
    mistakes.dedup();
    mistakes
}

/// The text of the file, and what is wrong with it.
pub(crate) struct File<'a> {
    text: &'a str,
    mistakes: RefCell<Vec<Mistake>>,
    variable: &'a dyn Fn(&str) -> Option<String>,
}

impl<'a> File<'a> {
    pub(crate) fn new(text: &'a str, variable: &'a dyn Fn(&str) -> Option<String>) -> File<'a> {
        File { text, mistakes: RefCell::default(), variable }
    }

    pub(crate) fn line(&self, at: usize) -> usize {
        line(self.text, at)
    }

    /// Notes a mistake.
    pub(crate) fn wrong(&self, line: usize, why: impl Into<String>) {
        self.mistakes.borrow_mut().push(Mistake { line, column: 0, why: why.into() });
    }

    /// All of them, in the order of the file.
    pub(crate) fn mistakes(self) -> Vec<Mistake> {
        let mut mistakes = self.mistakes.into_inner();
        mistakes.sort();
        mistakes.dedup();
        mistakes
    }
}

/// A value with its line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct At<T> {
    pub(crate) line: usize,
    pub(crate) value: T,
}

/// A table, and what was asked of it.
pub(crate) struct Table<'a> {
    pub(crate) file: &'a File<'a>,
    members: &'a DeTable<'a>,
    /// What it is, in words: `[[source]] github`.
    pub(crate) what: String,
    pub(crate) line: usize,
    known: RefCell<Vec<&'static str>>,
}

/// What a TOML value is, in words.
fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

impl<'a> Table<'a> {
    pub(crate) fn new(file: &'a File<'a>, members: &'a DeTable<'a>, line: usize, what: String) -> Table<'a> {
        Table { file, members, what, line, known: RefCell::default() }
    }

    /// Notes a mistake in this table.
    pub(crate) fn wrong(&self, line: usize, why: impl fmt::Display) {
        self.file.wrong(line, format!("{}: {why}", self.what));
    }

    fn member(&self, name: &'static str) -> Option<(usize, &'a DeValue<'a>)> {
        self.known.borrow_mut().push(name);
        let (key, value) = self.members.iter().find(|(key, _)| key.get_ref() == name)?;
        Some((self.file.line(key.span().start), value.get_ref()))
    }

    fn of_kind<T>(
        &self,
        name: &'static str,
        wanted: &str,
        read: impl FnOnce(&'a DeValue<'a>) -> Option<T>,
    ) -> Option<At<T>> {
        let (line, value) = self.member(name)?;
        let found = read(value);
        if found.is_none() {
            self.wrong(line, format!("`{name}` is {}; it must be {wanted}", kind(value)));
        }
        found.map(|value| At { line, value })
    }

    /// What must be there, and is not.
    pub(crate) fn missing(&self, name: &str, like: &str) {
        self.wrong(self.line, format!("it has no `{name}`; add one, like {like}"));
    }

    pub(crate) fn text(&self, name: &'static str) -> Option<At<&'a str>> {
        let text = self.of_kind(name, "a text", |value| match value {
            DeValue::String(text) => Some(&**text),
            _ => None,
        })?;
        if text.value.trim().is_empty() {
            self.wrong(text.line, format!("`{name}` is empty"));
            return None;
        }
        Some(text)
    }

    /// A text that must be there.
    pub(crate) fn needed(&self, name: &'static str, like: &str) -> Option<At<&'a str>> {
        if !self.has(name) {
            self.known.borrow_mut().push(name);
            self.missing(name, like);
            return None;
        }
        self.text(name)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.members.iter().any(|(key, _)| key.get_ref() == name)
    }

    /// A text that stands for something.
    pub(crate) fn parsed<T: FromStr<Err: fmt::Display>>(&self, name: &'static str) -> Option<At<T>> {
        let text = self.text(name)?;
        self.parse(name, &text)
    }

    pub(crate) fn parse<T: FromStr<Err: fmt::Display>>(&self, name: &str, text: &At<&str>) -> Option<At<T>> {
        match text.value.parse() {
            Ok(value) => Some(At { line: text.line, value }),
            Err(error) => {
                self.wrong(text.line, format!("`{name}` = `{}`: {error}", text.value.escape_debug()));
                None
            }
        }
    }

    pub(crate) fn switch(&self, name: &'static str) -> Option<bool> {
        let found = self.of_kind(name, "true or false", |value| match value {
            DeValue::Boolean(on) => Some(*on),
            _ => None,
        });
        found.map(|on| on.value)
    }

    pub(crate) fn whole(&self, name: &'static str, range: RangeInclusive<u64>) -> Option<u64> {
        let wanted = format!("a whole number from {} to {}", range.start(), range.end());
        let number = self.of_kind(name, &wanted, |value| match value {
            DeValue::Integer(number) => Some(u64::from_str_radix(number.as_str(), number.radix()).ok()),
            _ => None,
        })?;
        let fits = number.value.filter(|number| range.contains(number));
        if fits.is_none() {
            self.wrong(number.line, format!("`{name}` must be {wanted}"));
        }
        fits
    }

    pub(crate) fn duration(&self, name: &'static str, range: RangeInclusive<Duration>) -> Option<Duration> {
        let wanted = format!("a duration from {:?} to {:?}, like \"30s\" or \"500ms\"", range.start(), range.end());
        let text = self.of_kind(name, &wanted, |value| match value {
            DeValue::String(text) => Some(&**text),
            _ => None,
        })?;
        let parsed = text.value.parse::<jiff::SignedDuration>().ok().and_then(|d| Duration::try_from(d).ok());
        let fits = parsed.filter(|duration| range.contains(duration));
        if fits.is_none() {
            self.wrong(text.line, format!("`{name}` must be {wanted}"));
        }
        fits
    }

    /// A text or a list of texts.
    pub(crate) fn texts(&self, name: &'static str) -> Vec<At<&'a str>> {
        let found = self.of_kind(name, "a text or a list of texts", |value| match value {
            DeValue::String(text) => Some(vec![&**text]),
            DeValue::Array(texts) => texts.iter().map(|text| text.get_ref().as_str()).collect(),
            _ => None,
        });
        let Some(At { line, value }) = found else { return Vec::new() };
        value.into_iter().map(|value| At { line, value }).collect()
    }

    /// The texts of a table, by name.
    pub(crate) fn named_texts(&self, name: &'static str) -> Vec<(String, At<&'a str>)> {
        let found = self.of_kind(name, "a table of texts", |value| {
            let texts = value.as_table()?.iter().map(|(key, text)| {
                Some((
                    key.get_ref().to_string(),
                    At { line: self.file.line(key.span().start), value: text.get_ref().as_str()? },
                ))
            });
            texts.collect::<Option<Vec<_>>>()
        });
        found.map(|found| found.value).unwrap_or_default()
    }

    /// A text, or `{ env = "NAME" }` or `{ file = "PATH" }`, where it stands.
    pub(crate) fn text_or_elsewhere(&self, name: &'static str, like: &str) -> Option<At<String>> {
        match self.members.iter().find(|(key, _)| key.get_ref() == name).map(|(_, value)| value.get_ref()) {
            Some(DeValue::Table(place)) => {
                let (line, _) = self.member(name)?;
                self.elsewhere(name, line, place).map(|value| At { line, value })
            }
            _ => self.needed(name, like).map(|At { line, value }| At { line, value: value.to_owned() }),
        }
    }

    /// One secret or a list of them, each `{ env = "NAME" }` or `{ file = "PATH" }`.
    pub(crate) fn secrets(&self, name: &'static str) -> Vec<At<String>> {
        let Some((line, value)) = self.member(name) else { return Vec::new() };
        let one = |value: &DeValue<'_>| match value {
            DeValue::Table(place) => self.elsewhere(name, line, place).map(|value| At { line, value }),
            _ => {
                let example = self.example(name);
                self.wrong(line, format!("`{name}` is not written into this file; say where it is: {example}"));
                None
            }
        };
        match value {
            DeValue::Array(all) if all.is_empty() => {
                self.wrong(line, format!("`{name}` is an empty list; say where one is: {}", self.example(name)));
                Vec::new()
            }
            DeValue::Array(all) => all.iter().filter_map(|value| one(value.get_ref())).collect(),
            value => one(value).into_iter().collect(),
        }
    }

    /// How a value that stands elsewhere is written.
    pub(crate) fn example(&self, name: &str) -> String {
        let word = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        let owner: String =
            self.what.rsplit(' ').next().unwrap_or_default().chars().filter(|c| *c != '`').map(word).collect();
        let variable = format!("{owner}_{}", name.to_ascii_uppercase());
        let variable = variable.trim_start_matches('_');
        format!(
            "{name} = {{ env = \"{variable}\" }} or {{ file = \"/run/secrets/{}\" }}",
            variable.to_ascii_lowercase()
        )
    }

    fn elsewhere(&self, name: &str, line: usize, place: &DeTable<'_>) -> Option<String> {
        let named = |word: &str| place.iter().find(|(key, _)| key.get_ref() == word).map(|(_, value)| value.get_ref());
        let found = match (named("env"), named("file"), place.len()) {
            (Some(DeValue::String(variable)), None, 1) => match (self.file.variable)(variable) {
                Some(value) if !value.is_empty() => Ok(value),
                _ => Err(format!(
                    "`{name}`: the variable {variable} is not set; set it where postbox starts, like export {variable}=…"
                )),
            },
            (None, Some(DeValue::String(path)), 1) => match std::fs::read_to_string(&**path) {
                Ok(text) if !text.trim().is_empty() => Ok(text.trim_end_matches(['\r', '\n']).to_owned()),
                Ok(_) => Err(format!("`{name}`: the file {path} is empty; write the value into it")),
                Err(error) => Err(format!("`{name}`: cannot read {path}: {error}; make it, readable for postbox only")),
            },
            _ => Err(format!("`{name}` must say where the value is: {}", self.example(name))),
        };
        found.map_err(|why| self.wrong(line, why)).ok()
    }

    /// Notes what nobody has asked for.
    pub(crate) fn finish(self) {
        let known = self.known.borrow();
        for (key, _) in self.members {
            if !known.iter().any(|name| key.get_ref() == name) {
                let line = self.file.line(key.span().start);
                self.wrong(
                    line,
                    format!("there is no `{}` here; there are {}", key.get_ref().escape_debug(), known.join(", ")),
                );
            }
        }
    }
}

/// The tables of a list `[[name]]`.
pub(crate) fn tables<'a>(file: &'a File<'a>, root: &'a DeTable<'a>, name: &str) -> Vec<(usize, &'a DeTable<'a>)> {
    let Some((key, value)) = root.iter().find(|(key, _)| key.get_ref() == name) else { return Vec::new() };
    let not_a_list = || {
        file.wrong(file.line(key.span().start), format!("`{name}` is a list of tables: write [[{name}]] above each"))
    };
    let DeValue::Array(all) = value.get_ref() else {
        not_a_list();
        return Vec::new();
    };
    tables_of(file, all).unwrap_or_else(|| {
        not_a_list();
        Vec::new()
    })
}

fn tables_of<'a>(file: &'a File<'a>, all: &'a DeArray<'a>) -> Option<Vec<(usize, &'a DeTable<'a>)>> {
    all.iter()
        .map(|one: &Spanned<DeValue<'a>>| Some((file.line(one.span().start), one.get_ref().as_table()?)))
        .collect()
}
