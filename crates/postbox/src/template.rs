//! Texts with placeholders: `github.{header:x-github-event}`, `shop.{topic}`. Parsed once, filled often.

use std::fmt;

/// A placeholder's name, and whether something follows it: `{topic}`, `{header:NAME}`.
pub(crate) type Vocabulary = &'static [(&'static str, Option<&'static str>)];

/// A text with placeholders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Text {
    written: String,
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Literal(String),
    Placeholder(Placeholder),
}

/// What stands between two braces: the first of these that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placeholder(Vec<Slot>);

/// Something that is looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    /// What it is, of the vocabulary.
    pub(crate) name: &'static str,
    /// What follows the colon; empty where nothing does.
    pub(crate) argument: String,
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.argument.as_str() {
            "" => f.write_str(self.name),
            argument => write!(f, "{}:{}", self.name, argument.replace('|', "||").escape_debug()),
        }
    }
}

impl fmt::Display for Placeholder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots: Vec<String> = self.0.iter().map(Slot::to_string).collect();
        write!(f, "{{{}}}", slots.join("|"))
    }
}

impl Placeholder {
    fn value<'a, E>(
        &'a self,
        mut value: impl FnMut(&'a Slot) -> Result<Option<String>, E>,
    ) -> Result<Option<String>, E> {
        for slot in &self.0 {
            if let Some(text) = value(slot)?.filter(|text| !text.is_empty()) {
                return Ok(Some(text));
            }
        }
        Ok(None)
    }
}

/// Why a template was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the template has a mistake at byte {at}: {why}")]
pub struct TemplateError {
    /// Where, in bytes from the start of the template.
    pub at: usize,
    /// What is wrong there.
    pub why: String,
}

impl Text {
    /// Reads a template whose placeholders are these. Braces that are meant are written twice, and so is a `|`
    /// between them.
    pub(crate) fn parse(text: &str, vocabulary: Vocabulary) -> Result<Text, TemplateError> {
        let wrong = |at, why: String| Err(TemplateError { at, why });
        let mut pieces = Vec::new();
        let mut literal = String::new();
        let mut at = 0;
        while let Some(found) = text[at..].find(['{', '}']) {
            literal.push_str(&text[at..at + found]);
            at += found;
            let rest = &text[at..];
            if rest.starts_with("{{") || rest.starts_with("}}") {
                literal.push_str(&rest[..1]);
                at += 2;
                continue;
            }
            if rest.starts_with('}') {
                return wrong(at, "a `}` closes nothing; write `}}` for one that is meant".into());
            }
            let Some(end) = rest.find('}') else {
                return wrong(at, "a `{` is not closed; write `{{` for one that is meant".into());
            };
            let placeholder = placeholder(&rest[1..end], vocabulary).map_err(|why| TemplateError { at, why })?;
            if !literal.is_empty() {
                pieces.push(Piece::Literal(std::mem::take(&mut literal)));
            }
            pieces.push(Piece::Placeholder(placeholder));
            at += end + 1;
        }
        literal.push_str(&text[at..]);
        if !literal.is_empty() {
            pieces.push(Piece::Literal(literal));
        }
        if pieces.is_empty() {
            return wrong(0, "it is empty".into());
        }
        Ok(Text { written: text.to_owned(), pieces })
    }

    /// Whether there is a placeholder in it.
    pub(crate) fn varies(&self) -> bool {
        self.pieces.iter().any(|piece| matches!(piece, Piece::Placeholder(_)))
    }

    /// What is looked up, if it is one thing and there is nothing else.
    pub(crate) fn alone(&self) -> Option<&Slot> {
        match self.pieces.as_slice() {
            [Piece::Placeholder(Placeholder(slots))] if slots.len() == 1 => slots.first(),
            _ => None,
        }
    }

    /// With its values; the first placeholder that has none, otherwise.
    pub(crate) fn fill<'a, E>(
        &'a self,
        mut value: impl FnMut(&'a Slot) -> Result<Option<String>, E>,
    ) -> Result<Result<String, &'a Placeholder>, E> {
        let mut filled = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Literal(text) => filled.push_str(text),
                Piece::Placeholder(placeholder) => match placeholder.value(&mut value)? {
                    Some(text) => filled.push_str(&text),
                    None => return Ok(Err(placeholder)),
                },
            }
        }
        Ok(Ok(filled))
    }

    /// With its values, as a dotted name: a segment whose placeholder has none is left out with its dot.
    pub(crate) fn fill_segments<E>(
        &self,
        mut value: impl FnMut(&Slot) -> Result<Option<String>, E>,
    ) -> Result<String, E> {
        // A segment, or none if something in it is absent.
        let mut segments = vec![Some(String::new())];
        for piece in &self.pieces {
            match piece {
                Piece::Literal(text) => {
                    for (n, part) in text.split('.').enumerate() {
                        if n > 0 {
                            segments.push(Some(String::new()));
                        }
                        if let Some(Some(segment)) = segments.last_mut() {
                            segment.push_str(part);
                        }
                    }
                }
                Piece::Placeholder(placeholder) => {
                    let value = placeholder.value(&mut value)?;
                    if let Some(last) = segments.last_mut() {
                        *last = last.take().zip(value).map(|(segment, value)| segment + &value);
                    }
                }
            }
        }
        let kept: Vec<String> = segments.into_iter().flatten().collect();
        Ok(kept.join("."))
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.written)
    }
}

/// What stands between two braces: one slot, or several with a `|` between them.
fn placeholder(inside: &str, vocabulary: Vocabulary) -> Result<Placeholder, String> {
    let slots = alternatives(inside);
    let several = slots.len() > 1;
    let read = |written: &String| {
        slot(written, vocabulary).map_err(|why| match several {
            true if written.trim().is_empty() => {
                "there is nothing on one side of a `|`; write `||` for one that is meant".into()
            }
            true => format!("{why}; a `|` stands between alternatives, write `||` for one that is meant"),
            false => why,
        })
    };
    slots.iter().map(read).collect::<Result<_, _>>().map(Placeholder)
}

/// Parts between single `|`; of two, one is meant.
fn alternatives(inside: &str) -> Vec<String> {
    let (mut parts, mut part, mut rest) = (Vec::new(), String::new(), inside.chars().peekable());
    while let Some(c) = rest.next() {
        match c {
            '|' if rest.next_if_eq(&'|').is_some() => part.push('|'),
            '|' => parts.push(std::mem::take(&mut part)),
            c => part.push(c),
        }
    }
    parts.push(part);
    parts
}

/// One thing that can be looked up.
fn slot(inside: &str, vocabulary: Vocabulary) -> Result<Slot, String> {
    let (name, argument) = match inside.split_once(':') {
        Some((name, argument)) => (name, Some(argument)),
        None => (inside, None),
    };
    let Some((name, wanted)) = vocabulary.iter().find(|(known, _)| *known == name) else {
        let known: Vec<String> = vocabulary
            .iter()
            .map(|(name, wanted)| wanted.map_or_else(|| format!("{{{name}}}"), |what| format!("{{{name}:{what}}}")))
            .collect();
        let shown: String = inside.chars().take(40).collect();
        return Err(format!("there is no placeholder `{{{}}}`; there are {}", shown.escape_debug(), known.join(", ")));
    };
    match (wanted, argument) {
        (None, None) => Ok(Slot { name, argument: String::new() }),
        (None, Some(_)) => Err(format!("`{{{name}}}` has nothing after it")),
        (Some(_), Some(argument)) if !argument.is_empty() => Ok(Slot { name, argument: argument.to_owned() }),
        (Some(what), _) => Err(format!("write it `{{{name}:{what}}}`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: Vocabulary = &[("topic", None), ("header", Some("NAME"))];

    fn values(slot: &Slot) -> Result<Option<String>, String> {
        match (slot.name, slot.argument.as_str()) {
            ("topic", _) => Ok(Some("a.b".into())),
            (_, "x") => Ok(Some("X".into())),
            (_, "empty") => Ok(Some(String::new())),
            (_, "bad") => Err("bad".into()),
            _ => Ok(None),
        }
    }

    #[test]
    fn placeholders_are_filled() {
        for (template, filled) in [
            ("shop.{topic}", "shop.a.b"),
            ("{topic}", "a.b"),
            ("{{{header:x}}}-}}", "{X}-}"),
            ("plain", "plain"),
            ("ü{header:x}ü", "üXü"),
        ] {
            let text = Text::parse(template, WORDS).expect(template);
            assert_eq!(text.fill(values), Ok(Ok(filled.into())), "{template}");
            assert_eq!(text.to_string(), template);
        }
        let text = Text::parse("a{header:none}", WORDS).expect("parses");
        assert_eq!(
            text.fill(values).map(|filled| filled.map_err(ToString::to_string)),
            Ok(Err("{header:none}".into()))
        );
        assert_eq!(Text::parse("{header:bad}", WORDS).expect("parses").fill(values), Err("bad".into()));
    }

    #[test]
    fn what_is_absent_takes_its_segment_with_it() {
        for (template, filled) in [
            ("github.{header:x}.{header:none}", "github.X"),
            ("github.{header:none}.{header:x}", "github.X"),
            ("{header:none}.github", "github"),
            ("a.b-{header:none}-c.d{header:x}", "a.dX"),
            ("a.{header:empty}.b", "a.b"),
            ("a.{header:none}{header:x}", "a"),
            ("{header:none}", ""),
            ("a.{header:none|header:x}.b", "a.X.b"),
            ("a.{header:none|header:empty}.b", "a.b"),
            // What is written twice is not put right in silence.
            ("a..{header:x}", "a..X"),
        ] {
            let text = Text::parse(template, WORDS).expect(template);
            assert_eq!(text.fill_segments(values), Ok(filled.into()), "{template}");
        }
    }

    #[test]
    fn mistakes_are_told_with_their_place() {
        for (template, at, why) in [
            ("", 0, "empty"),
            ("ab{topic", 2, "not closed"),
            ("ü}", 2, "closes nothing"),
            ("{topc}", 0, "there is no placeholder `{topc}`; there are {topic}, {header:NAME}"),
            ("x{header}", 1, "write it `{header:NAME}`"),
            ("x{header:}", 1, "write it `{header:NAME}`"),
            ("x{topic:a}", 1, "nothing after"),
            ("{}", 0, "no placeholder `{}`"),
            ("x{topic|key}", 1, "no placeholder `{key}`; there are {topic}, {header:NAME}; a `|` stands between"),
            ("x{header:a|b}", 1, "write `||` for one that is meant"),
            ("x{topic|}", 1, "nothing on one side of a `|`"),
            ("x{|topic}", 1, "nothing on one side of a `|`"),
            ("x{header:a|header}", 1, "write it `{header:NAME}`"),
            ("{|}", 0, "nothing on one side"),
        ] {
            let error = Text::parse(template, WORDS).expect_err(template);
            assert_eq!(error.at, at, "{template}: {error}");
            assert!(error.to_string().contains(why), "{template}: {error}");
        }
    }
}
