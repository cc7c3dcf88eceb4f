//! One look over a JSON text: what PostgreSQL or a reader would refuse or change is refused here,
//! with the same words for every store.

/// Deepest nesting of arrays and objects.
pub const MAX_JSON_DEPTH: usize = 128;

/// Why a JSON text cannot be a payload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JsonError {
    /// Not JSON at all.
    #[error("it is not valid JSON: {0}")]
    Syntax(String),
    /// `\u0000`, which PostgreSQL cannot keep as text.
    #[error("it has the character \\u0000 at byte {at}, which PostgreSQL cannot store; remove it or encode the value")]
    Nul {
        /// Byte offset of the escape.
        at: usize,
    },
    /// Half of a surrogate pair.
    #[error(
        "it has a lone surrogate (\\ud800 to \\udfff without its other half) at byte {at}; it stands for no character"
    )]
    LoneSurrogate {
        /// Byte offset of the escape.
        at: usize,
    },
    /// Deeper than [`MAX_JSON_DEPTH`].
    #[error("it is nested deeper than {MAX_JSON_DEPTH} levels")]
    TooDeep,
    /// Outside what PostgreSQL's `numeric` holds.
    #[error("the number at byte {at} is out of range: at most 131072 digits before the point and 16383 after")]
    NumberRange {
        /// Byte offset of the number.
        at: usize,
    },
}

/// What the look found besides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Findings {
    /// Byte offset of the first number that `serde_json::Value` would not keep as it is written.
    pub lossy_number: Option<usize>,
}

/// Checks a JSON text. Strings must be Rust strings already, so bad UTF-8 never gets here.
pub(crate) fn check(text: &str) -> Result<Findings, JsonError> {
    check_within(text, MAX_JSON_DEPTH)
}

/// The same for a text that may be nested otherwise: an envelope is a level around its payload.
pub(crate) fn check_within(text: &str, levels: usize) -> Result<Findings, JsonError> {
    let mut findings = Findings::default();
    let bytes = text.as_bytes();
    let (mut at, mut depth) = (0, 0usize);
    while at < bytes.len() {
        match bytes[at] {
            b'[' | b'{' => {
                depth += 1;
                if depth > levels {
                    return Err(JsonError::TooDeep);
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => {
                at = string_end(bytes, at)?;
                continue;
            }
            b'-' | b'0'..=b'9' => {
                let start = at;
                while at < bytes.len() && matches!(bytes[at], b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E') {
                    at += 1;
                }
                number(&text[start..at], start, &mut findings)?;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    // The depth is bounded by now, so that the parser may go without a limit of its own.
    let mut parser = serde_json::Deserializer::from_str(text);
    parser.disable_recursion_limit();
    serde::de::IgnoredAny::deserialize(&mut parser)
        .and_then(|_| parser.end())
        .map_err(|e| JsonError::Syntax(no_json(text, &e)))?;
    Ok(findings)
}

/// Where a text stops being JSON, and what stands there; the parser's own words are for who writes parsers.
fn no_json(text: &str, error: &serde_json::Error) -> String {
    /// Characters that are shown.
    const SHOWN: usize = 20;
    if text.trim().is_empty() {
        return "it is empty".into();
    }
    if error.is_eof() {
        return format!("it ends at byte {}, before it is complete", text.len());
    }
    // The parser counts lines and columns.
    let lines: usize = text.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
    let mut at = (lines + error.column()).saturating_sub(1).min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    // A word is shown from its beginning, also when it began like one that may stand there.
    let in_word = |c: char| c.is_alphanumeric() || "_+-.".contains(c);
    if text[at..].starts_with(in_word) {
        at = text[..at].trim_end_matches(in_word).len();
    }
    let escaped = |c: char| if matches!(c, '"' | '\'') { c.to_string() } else { c.escape_debug().to_string() };
    let there: String = text[at..].chars().take(SHOWN).map(escaped).collect();
    let more = if text[at..].chars().nth(SHOWN).is_some() { "…" } else { "" };
    format!("what stands at byte {at} does not belong there: `{there}{more}`")
}

use serde::Deserialize;

/// Reads a checked text into a value, however deep it is.
pub(crate) fn read<'de, T: Deserialize<'de>>(
    text: &'de str,
) -> Result<T, serde_path_to_error::Error<serde_json::Error>> {
    let mut parser = serde_json::Deserializer::from_str(text);
    parser.disable_recursion_limit();
    serde_path_to_error::deserialize(&mut parser)
}

/// Walks over the string that starts at `at`; the offset behind its closing quote.
fn string_end(bytes: &[u8], mut at: usize) -> Result<usize, JsonError> {
    at += 1;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => return Ok(at + 1),
            b'\\' if bytes.get(at + 1) == Some(&b'u') => match escape(bytes, at) {
                Some(0) => return Err(JsonError::Nul { at }),
                Some(0xD800..=0xDBFF) => {
                    let low = (bytes.get(at + 6) == Some(&b'\\') && bytes.get(at + 7) == Some(&b'u'))
                        .then(|| escape(bytes, at + 6))
                        .flatten();
                    if !matches!(low, Some(0xDC00..=0xDFFF)) {
                        return Err(JsonError::LoneSurrogate { at });
                    }
                    at += 12;
                }
                Some(0xDC00..=0xDFFF) => return Err(JsonError::LoneSurrogate { at }),
                _ => at += 6,
            },
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    Ok(at)
}

fn escape(bytes: &[u8], at: usize) -> Option<u32> {
    let digits = std::str::from_utf8(bytes.get(at + 2..at + 6)?).ok()?;
    u32::from_str_radix(digits, 16).ok()
}

fn number(text: &str, at: usize, findings: &mut Findings) -> Result<(), JsonError> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i64>().unwrap_or(i64::MAX)),
        None => (text, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = whole.trim_start_matches('-').len() as i64;
    let scale = (fraction.len() as i64).saturating_sub(exponent);
    if digits.saturating_add(exponent) > 131_072 || scale > 16_383 || exponent == i64::MAX {
        return Err(JsonError::NumberRange { at });
    }
    let plain_integer = fraction.is_empty() && exponent == 0 && !text.contains(['.', 'e', 'E']);
    let kept = if plain_integer {
        text.parse::<i64>().is_ok() || text.parse::<u64>().is_ok()
    } else {
        text.parse::<f64>().is_ok_and(|f| f.is_finite() && significant(text) <= 17)
    };
    if !kept && findings.lossy_number.is_none() {
        findings.lossy_number = Some(at);
    }
    Ok(())
}

/// Significant digits: 17 is what a double can tell apart.
fn significant(text: &str) -> usize {
    let mantissa = text.split(['e', 'E']).next().unwrap_or(text);
    let digits: String = mantissa.chars().filter(char::is_ascii_digit).collect();
    digits.trim_start_matches('0').trim_end_matches('0').len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_is_wrong() {
        assert_eq!(check(r#"{"a":"x\u0000"}"#), Err(JsonError::Nul { at: 7 }));
        assert_eq!(check(r#""\ud800""#), Err(JsonError::LoneSurrogate { at: 1 }));
        assert_eq!(check(r#""\udc00""#), Err(JsonError::LoneSurrogate { at: 1 }));
        assert!(check(r#""\ud83d\ude00 \\u0000""#).is_ok());
        assert!(matches!(check("{"), Err(JsonError::Syntax(_))));
        assert!(matches!(check("1 2"), Err(JsonError::Syntax(_))));
        assert!(check(&format!("{}{}", "[".repeat(128), "]".repeat(128))).is_ok());
        assert_eq!(check(&format!("{}{}", "[".repeat(129), "]".repeat(129))), Err(JsonError::TooDeep));
        assert_eq!(check("[1e131073]"), Err(JsonError::NumberRange { at: 1 }));
        assert_eq!(check("1e-16384"), Err(JsonError::NumberRange { at: 0 }));
    }

    #[test]
    fn says_in_plain_words_what_is_no_json_where() {
        for (text, said) in [
            ("", "it is empty"),
            (" \n", "it is empty"),
            ("{\"a\": ", "it ends at byte 6, before it is complete"),
            ("\"a", "it ends at byte 2, before it is complete"),
            ("nope", "what stands at byte 0 does not belong there: `nope`"),
            ("[1, NaN]", "what stands at byte 4 does not belong there: `NaN]`"),
            ("[01]", "what stands at byte 1 does not belong there: `01]`"),
            ("{'a': 1}", "what stands at byte 1 does not belong there: `'a': 1}`"),
            ("{\"a\":1,\n \"b\":}", "what stands at byte 13 does not belong there: `}`"),
            ("{\"a\":1 \"b\":2}", "what stands at byte 7 does not belong there: `\"b\":2}`"),
            ("[1]\n\u{1b}[31mred", "what stands at byte 4 does not belong there: `\\u{1b}[31mred`"),
            ("\"a\nb\"", "what stands at byte 1 does not belong there: `a\\nb\"`"),
            ("[nulé]", "what stands at byte 1 does not belong there: `nulé]`"),
            ("é", "what stands at byte 0 does not belong there: `é`"),
            (
                "<html><body>Service Unavailable</body></html>",
                "what stands at byte 0 does not belong there: `<html><body>Service …`",
            ),
        ] {
            assert_eq!(check(text), Err(JsonError::Syntax(said.into())), "{text:?}");
        }
    }

    #[test]
    fn tells_numbers_that_a_value_would_change() {
        for (text, lossy) in [
            ("9007199254740993", false),
            ("18446744073709551615", false),
            ("18446744073709551616", true),
            ("0.1", false),
            ("0.10000000000000000555", true),
            ("1e400", true),
        ] {
            let found = check(text).expect(text).lossy_number.is_some();
            assert_eq!(found, lossy, "{text}");
        }
    }
}
