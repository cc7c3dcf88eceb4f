//! Text for terminals. Whatever came from outside is made inert first.

use std::time::Duration;

use jiff::Timestamp;

/// Text that a terminal only shows: control characters, line ends and the invisible ones that turn
/// text around are written out as escapes.
pub(crate) fn plain(text: &str) -> String {
    let mut inert = String::with_capacity(text.len());
    for c in text.chars() {
        if acts(c) { inert.extend(c.escape_default()) } else { inert.push(c) }
    }
    inert
}

/// The same for JSON text, which stays the same JSON: outside of strings such characters can only
/// be white space, inside they are written as JSON escapes.
pub(crate) fn inert_json(text: &str) -> String {
    let mut inert = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\r' | '\t' => inert.push(' '),
            c if acts(c) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    inert.push_str(&format!("\\u{unit:04x}"));
                }
            }
            c => inert.push(c),
        }
    }
    inert
}

/// Characters that do something to a terminal or to the text around them.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
        || matches!(c, '\u{e0000}'..='\u{e007f}')
}

/// At most this many characters, with an ellipsis if there were more.
pub(crate) fn shortened(text: &str, limit: usize) -> String {
    let text = plain(text);
    if text.chars().count() <= limit {
        return text;
    }
    text.chars().take(limit.saturating_sub(1)).chain(['…']).collect()
}

/// How long ago: `0.8s`, `14m`, `3h`, `2d`.
pub(crate) fn ago(then: Timestamp) -> String {
    span(Timestamp::now().duration_since(then).as_secs_f64())
}

/// How long it is until then: `in 14m`; `now` when it is over.
pub(crate) fn until(then: Timestamp) -> String {
    match then.duration_since(Timestamp::now()).as_secs_f64() {
        left if left > 0.0 => format!("in {}", span(left)),
        _ => "now".to_owned(),
    }
}

/// A length of time in one unit.
pub(crate) fn span(seconds: f64) -> String {
    match seconds.max(0.0) {
        s if s < 9.95 => format!("{s:.1}s"),
        s if s < 120.0 => format!("{s:.0}s"),
        s if s < 7200.0 => format!("{:.0}m", s / 60.0),
        s if s < 172_800.0 => format!("{:.0}h", s / 3600.0),
        s => format!("{:.0}d", s / 86_400.0),
    }
}

/// A run time: `41ms`, `1.9s`.
pub(crate) fn took(time: Duration) -> String {
    if time < Duration::from_secs(1) { format!("{}ms", time.as_millis()) } else { span(time.as_secs_f64()) }
}

/// How often, in the unit in which it is one or more: `60/s`, `2.5/min`, `1/d`.
pub(crate) fn often(per_second: f64) -> String {
    let units = [(1.0, "s"), (60.0, "min"), (3600.0, "h"), (86_400.0, "d")];
    let at_least_one = |(seconds, _): &(f64, &str)| per_second * seconds > 0.9999;
    let (seconds, unit) = units.into_iter().find(at_least_one).unwrap_or(units[3]);
    // Rounded to a hundredth; what is whole has no point.
    format!("{}/{unit}", (per_second * seconds * 100.0).round() / 100.0)
}

/// `4180` as `4,180`; `-` for none.
pub(crate) fn count(number: i64) -> String {
    if number == 0 {
        return "-".into();
    }
    let digits = number.unsigned_abs().to_string();
    let mut grouped = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    if number < 0 { format!("-{grouped}") } else { grouped }
}

/// A count that the database stops at 100,001.
pub(crate) fn capped(number: i64) -> String {
    if number > 100_000 { "100k+".into() } else { count(number) }
}

/// `1 message`, `2 messages`.
pub(crate) fn many(number: i64, one: &str, more: &str) -> String {
    match number {
        1 => format!("1 {one}"),
        n if n > 100_000 => format!("100k+ {more}"),
        0 => format!("0 {more}"),
        n => format!("{} {more}", count(n)),
    }
}

/// A word as a shell takes it.
pub(crate) fn quoted(word: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || "_-./:=@,+%*".contains(c);
    // `*` needs no quotes in a filter that matches no file, but shells differ.
    if !word.is_empty() && word.chars().all(|c| safe(c) && c != '*') {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_inert() {
        assert_eq!(plain("a\u{1b}[31mb\r\nc\u{9b}d\u{202e}"), "a\\u{1b}[31mb\\r\\nc\\u{9b}d\\u{202e}");
        assert_eq!(plain("naïve ✓"), "naïve ✓");
        let json = "{\n\t\"a\": \"x\u{9b}\u{e0041}\"}";
        let inert = inert_json(json);
        assert_eq!(inert, "{  \"a\": \"x\\u009b\\udb40\\udc41\"}");
        let read = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("still JSON");
        assert_eq!(read(json), read(&inert));
    }

    #[test]
    fn numbers_as_people_read_them() {
        assert_eq!((count(0).as_str(), count(4180).as_str(), count(1_234_567).as_str()), ("-", "4,180", "1,234,567"));
        assert_eq!(capped(100_001), "100k+");
        for (seconds, text) in
            [(0.81, "0.8s"), (-3.0, "0.0s"), (75.0, "75s"), (840.0, "14m"), (10_800.0, "3h"), (1e6, "12d")]
        {
            assert_eq!(span(seconds), text);
        }
        assert_eq!(took(Duration::from_micros(41_900)), "41ms");
        for (rate, text) in
            [(60.0, "60/s"), (0.5, "30/min"), (1.0 / 60.0, "1/min"), (0.04, "2.4/min"), (1.0 / 604_800.0, "0.14/d")]
        {
            assert_eq!(often(rate), text);
        }
    }

    #[test]
    fn shells_read_one_word() {
        assert_eq!(quoted("sqlite:a/b.db"), "sqlite:a/b.db");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }
}
