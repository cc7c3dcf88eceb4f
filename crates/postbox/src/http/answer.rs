//! What an answer means.

use std::time::{Duration, SystemTime};

use jiff::Timestamp;

/// The longest wait that an endpoint can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(86_400);

/// What an endpoint answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// When it wants to be asked again, if it said so.
    pub(crate) retry_after: Option<Duration>,
    /// The beginning of the body.
    pub(crate) body: Vec<u8>,
    /// From the beginning of the call to the end of the answer.
    pub(crate) took: Duration,
}

/// What it comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Taken.
    Done,
    /// Nobody is there any more who would take anything.
    Gone,
    /// Not taken, and it would not be the next time.
    Refused,
    /// Not now, and it was not taken: too many, or not ready yet.
    NotNow,
    /// Something went wrong there; whether it was before or after the message was taken is not known.
    Failed,
}

impl Answer {
    /// What its status means.
    pub(crate) fn meaning(&self) -> Meaning {
        match self.status {
            200..=299 => Meaning::Done,
            410 => Meaning::Gone,
            // The request came too slowly, too early, too often.
            408 | 425 | 429 => Meaning::NotNow,
            300..=499 => Meaning::Refused,
            _ => Meaning::Failed,
        }
    }

    /// How long to wait, where the status is one that says so, and it does not ask for none.
    pub(crate) fn wait(&self) -> Option<Duration> {
        let honoured = matches!(self.status, 429 | 502 | 503 | 504);
        self.retry_after.filter(|wait| honoured && !wait.is_zero())
    }

    /// The body as text that can be shown: what controls a terminal does not.
    pub(crate) fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.body);
        let shown = text.chars().map(|c| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c });
        shown.collect::<String>().trim().to_owned()
    }

    /// What is kept of it: the status, and the beginning of the body.
    pub(crate) fn receipt(&self) -> serde_json::Value {
        serde_json::json!({ "status": self.status, "body": self.text() })
    }

    /// In words for an operator.
    pub(crate) fn words(&self, origin: &str) -> String {
        let status = self.status;
        let meant = match axum::http::StatusCode::from_u16(status).ok().and_then(|s| s.canonical_reason()) {
            Some(reason) => format!("{origin} answered {status} {reason}"),
            None => format!("{origin} answered {status}"),
        };
        if matches!(status, 300..=399) {
            return format!("{meant}: redirects are not followed; set the URL to where it is now");
        }
        match self.text() {
            text if text.is_empty() => meant,
            text => format!("{meant}: {text}"),
        }
    }
}

/// The wait that a `Retry-After` asks for: seconds or a date, and a day at most.
pub(super) fn retry_after(value: &[u8], now: Timestamp) -> Option<Duration> {
    let text = std::str::from_utf8(value).ok()?.trim();
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        // More digits than fit are a long time, too.
        return Some(text.parse().map_or(MAX_RETRY_AFTER, Duration::from_secs).min(MAX_RETRY_AFTER));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    let wait = date.duration_since(SystemTime::from(now)).unwrap_or_default();
    Some(wait.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(status: u16, retry_after: Option<u64>) -> Answer {
        let retry_after = retry_after.map(Duration::from_secs);
        Answer { status, retry_after, body: b"no \x1b[31mred\0 here\n".to_vec(), took: Duration::ZERO }
    }

    #[test]
    fn each_status_means_something() {
        for (statuses, meaning) in [
            (&[200, 201, 202, 204, 299][..], Meaning::Done),
            (&[300, 301, 302, 304, 307, 308, 400, 401, 403, 404, 405, 409, 413, 422, 451, 499], Meaning::Refused),
            (&[410], Meaning::Gone),
            (&[408, 425, 429], Meaning::NotNow),
            (&[500, 501, 502, 503, 504, 507, 599, 600, 999, 100, 101], Meaning::Failed),
        ] {
            for status in statuses {
                assert_eq!(answered(*status, None).meaning(), meaning, "{status}");
            }
        }
    }

    #[test]
    fn a_wait_is_honoured_where_it_means_something() {
        for status in [429, 502, 503, 504] {
            assert_eq!(answered(status, Some(7)).wait(), Some(Duration::from_secs(7)), "{status}");
            assert_eq!(answered(status, Some(0)).wait(), None, "{status}");
            assert_eq!(answered(status, None).wait(), None, "{status}");
        }
        for status in [200, 301, 404, 408, 410, 500, 501] {
            assert_eq!(answered(status, Some(7)).wait(), None, "{status}");
        }
    }

    #[test]
    fn waits_are_seconds_or_a_date_and_end() {
        let now: Timestamp = "1994-11-06T08:49:07Z".parse().expect("a time");
        for (value, seconds) in [
            ("120", Some(120)),
            (" 5 ", Some(5)),
            ("0", Some(0)),
            ("99999999999999999999999", Some(86_400)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(30)),
            ("Sunday, 06-Nov-94 08:49:37 GMT", Some(30)),
            ("Sun Nov  6 08:49:37 1994", Some(30)),
            ("Sun, 06 Nov 1994 08:49:00 GMT", Some(0)),
            ("Fri, 31 Dec 9999 23:59:59 GMT", Some(86_400)),
            ("-5", None),
            ("5.5", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(retry_after(value.as_bytes(), now), seconds.map(Duration::from_secs), "{value}");
        }
        assert_eq!(retry_after(b"\xff", now), None);
    }

    #[test]
    fn words_say_what_was_answered_and_control_no_terminal() {
        let words = answered(422, None).words("https://example.org");
        assert_eq!(words, "https://example.org answered 422 Unprocessable Entity: no \u{fffd}[31mred\u{fffd} here");
        assert!(answered(302, None).words("https://example.org").contains("redirects are not followed"));
        assert_eq!(Answer { body: Vec::new(), ..answered(599, None) }.words("http://a"), "http://a answered 599");
    }
}
