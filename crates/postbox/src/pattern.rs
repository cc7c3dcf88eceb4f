//! Topics and the patterns that subscriptions match them with.
//!
//! A topic is a dotted name of non-empty segments, `orders.placed`. A pattern is a topic in which
//! a segment may be `*` (exactly one segment) and the last may be `>` (one or more).

use std::fmt;
use std::str::FromStr;

/// The longest topic, key, pattern or name, in bytes.
pub const MAX_NAME_BYTES: usize = 255;

/// Why a topic or a pattern was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TopicError {
    /// Nothing was given.
    #[error("a {what} must not be empty; write it like `orders.placed`")]
    Empty {
        /// `topic` or `pattern`.
        what: &'static str,
    },
    /// Longer than [`MAX_NAME_BYTES`].
    #[error("the {what} is {bytes} bytes long; the limit is {MAX_NAME_BYTES}")]
    TooLong {
        /// `topic` or `pattern`.
        what: &'static str,
        /// How long it is.
        bytes: usize,
    },
    /// Two dots in a row, or a dot at an end.
    #[error("the {what} `{text}` has an empty segment; write it like `orders.placed`")]
    EmptySegment {
        /// `topic` or `pattern`.
        what: &'static str,
        /// The whole text.
        text: String,
    },
    /// A character outside `A-Z a-z 0-9 _ - : / @ +`.
    #[error(
        "the {what} `{text}` has the character {character:?}; allowed are letters, digits and _ - : / @ + between the dots"
    )]
    BadCharacter {
        /// `topic` or `pattern`.
        what: &'static str,
        /// The whole text, escaped.
        text: String,
        /// The first offender.
        character: char,
    },
    /// `*` or `>` beside other characters, or `>` before the end.
    #[error(
        "the pattern `{text}` has a misplaced wildcard; `*` stands for one whole segment, `>` for the rest and comes last"
    )]
    BadWildcard {
        /// The whole pattern.
        text: String,
    },
}

fn check(text: &str, what: &'static str, wildcards: bool) -> Result<(), TopicError> {
    if text.is_empty() {
        return Err(TopicError::Empty { what });
    }
    if text.len() > MAX_NAME_BYTES {
        return Err(TopicError::TooLong { what, bytes: text.len() });
    }
    let mut segments = text.split('.').peekable();
    while let Some(segment) = segments.next() {
        if segment.is_empty() {
            return Err(TopicError::EmptySegment { what, text: text.escape_debug().to_string() });
        }
        if wildcards && (segment == "*" || (segment == ">" && segments.peek().is_none())) {
            continue;
        }
        if wildcards && segment.contains(['*', '>']) {
            return Err(TopicError::BadWildcard { text: text.escape_debug().to_string() });
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || "_-:/@+".contains(c);
        if let Some(character) = segment.chars().find(|c| !allowed(*c)) {
            return Err(TopicError::BadCharacter { what, text: text.escape_debug().to_string(), character });
        }
    }
    Ok(())
}

/// Checks that `topic` is one: non-empty dotted segments, at most [`MAX_NAME_BYTES`].
pub fn check_topic(topic: &str) -> Result<(), TopicError> {
    check(topic, "topic", false)
}

/// What a subscription listens to: an exact topic, or one with wildcards.
///
/// ```
/// use postbox::Pattern;
/// let pattern: Pattern = "orders.*".parse()?;
/// assert!(pattern.matches("orders.placed"));
/// assert!(!pattern.matches("orders.placed.eu"));
/// assert!("orders.>".parse::<Pattern>()?.matches("orders.placed.eu"));
/// # Ok::<(), postbox::TopicError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pattern(String);

impl Pattern {
    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The segments between the dots.
    pub fn segments(&self) -> impl Iterator<Item = &str> {
        self.0.split('.')
    }

    /// Whether a message of this topic belongs to the subscription.
    pub fn matches(&self, topic: &str) -> bool {
        let mut topic = topic.split('.');
        for segment in self.segments() {
            match (segment, topic.next()) {
                (_, None) => return false,
                (">", Some(_)) => return true,
                ("*", Some(_)) => {}
                (literal, Some(given)) if literal == given => {}
                _ => return false,
            }
        }
        topic.next().is_none()
    }

    /// The same pattern as an anchored POSIX regular expression, for matching in PostgreSQL.
    pub(crate) fn to_regex(&self) -> String {
        let segments: Vec<String> = self
            .segments()
            .map(|segment| match segment {
                "*" => r"[^.]+".to_owned(),
                ">" => r".+".to_owned(),
                literal => literal.replace('+', r"\+"),
            })
            .collect();
        format!("^{}$", segments.join(r"\."))
    }

    /// `prefix.pattern`, as `nest` joins them.
    pub(crate) fn nested_in(&self, prefix: &str) -> Result<Pattern, TopicError> {
        format!("{prefix}.{}", self.0).parse()
    }
}

impl FromStr for Pattern {
    type Err = TopicError;

    fn from_str(text: &str) -> Result<Self, TopicError> {
        check(text, "pattern", true)?;
        Ok(Pattern(text.to_owned()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn wildcards_match_whole_segments() {
        for (text, topic, expected) in [
            ("orders.placed", "orders.placed", true),
            ("orders.placed", "orders.placed.eu", false),
            ("orders.placed", "orders", false),
            ("orders.*", "orders.placed", true),
            ("orders.*", "orders", false),
            ("orders.*", "orders.placed.eu", false),
            ("*", "orders", true),
            (">", "orders.placed.eu", true),
            ("orders.>", "orders", false),
            ("orders.>", "orders.placed.eu", true),
            ("a.*.c", "a.b.c", true),
            ("a.*.c.>", "a.x.y.c.z", false),
            ("a.*.c.>", "a.x.c.y.z", true),
            ("a+b", "a+b", true),
        ] {
            assert_eq!(pattern(text).matches(topic), expected, "{text} ~ {topic}");
        }
    }

    #[test]
    fn bad_ones_are_refused_with_the_reason() {
        for (text, reason) in [
            ("", "must not be empty"),
            ("orders..placed", "empty segment"),
            (".orders", "empty segment"),
            ("orders.>.x", "misplaced wildcard"),
            ("or*ers", "misplaced wildcard"),
            ("orders placed", "character ' '"),
            ("orders.é", "character 'é'"),
        ] {
            let error = text.parse::<Pattern>().expect_err(text).to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert!(check_topic("orders.*").is_err());
        assert!(check_topic(&"x".repeat(256)).is_err());
        assert!(check_topic(&"x".repeat(255)).is_ok());
    }
}
