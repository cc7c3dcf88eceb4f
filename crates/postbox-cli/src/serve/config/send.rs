//! `[[relay]]` and `[[push]]`: where messages go.

use std::time::Duration;

use postbox::sink::{EnvelopeStyle, Target};
use postbox::{OnDead, Pattern};

use super::source::redis_url;
use super::{DAY, Endpoint, Found, MOMENT, Names, Policy, Push, Relay, To, no_such_kind};
use crate::serve::table::{File, Table};

pub(super) fn relay(file: &File<'_>, (line, members): Found<'_>, names: &mut Names, usual: &str) -> Option<Relay> {
    let mut table = Table::new(file, members, line, "[[relay]]".into());
    let name = names.take(&mut table, "name = \"to-redis\"");
    let pattern = pattern(&table);
    let kind = table.needed("kind", "kind = \"redis\"")?;
    let to = match kind.value {
        "redis" => redis_sink(&table, usual),
        "webhook" => endpoint(&table, false, usual).map(To::Webhook),
        "stdout" => Some(To::Stdout),
        _ => {
            no_such_kind(&table, &kind, "redis, webhook and stdout");
            return None;
        }
    };
    let ordered = table.switch("ordered").unwrap_or(true);
    let policy = policy(&table, true);
    table.finish();
    Some(Relay { name: name?, pattern: pattern?, to: to?, ordered, policy })
}

fn pattern(table: &Table<'_>) -> Option<Pattern> {
    let text = table.needed("pattern", "pattern = \"orders.>\"")?;
    table.parse("pattern", &text).map(|pattern| pattern.value)
}

fn envelope(table: &Table<'_>) -> EnvelopeStyle {
    table.parsed("envelope").map(|style| style.value).unwrap_or_default()
}

/// The `source` of CloudEvents that do not say theirs.
fn event_source(table: &Table<'_>, usual: &str) -> String {
    table.text("source").map_or(usual, |source| source.value).to_owned()
}

/// That of an application: a URI reference.
pub(super) fn usual_source(application: &str) -> String {
    let mut source = String::from("/");
    for byte in application.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => source.push(char::from(byte)),
            _ => source.push_str(&format!("%{byte:02X}")),
        }
    }
    source
}

fn redis_sink(table: &Table<'_>, usual: &str) -> Option<To> {
    let url = table.text_or_elsewhere("url", "url = \"redis://localhost:6379\"");
    let url = url.and_then(|url| redis_url(table, url));
    let to = table.needed("to", "to = \"shop.{topic}\"").and_then(|to| table.parse::<Target>("to", &to));
    let envelope = envelope(table);
    let source = event_source(table, usual);
    let max_len = table.whole("max_len", 1..=u64::MAX);
    Some(To::Redis { url: url?, to: to?.value, envelope, source, max_len })
}

fn endpoint(table: &Table<'_>, push: bool, usual: &str) -> Option<Endpoint> {
    let like = if push { "url = \"http://localhost:8000/events\"" } else { "url = \"https://example.com/hooks\"" };
    let url = table.text_or_elsewhere("url", like);
    let url = url.filter(|url| {
        let fits = ["http://", "https://"].iter().any(|scheme| url.value.starts_with(scheme));
        if !fits {
            table.wrong(url.line, format!("`url` must begin with https:// or http://, like {like}"));
        }
        fits
    });
    let secrets = table.secrets("secret").into_iter().map(|secret| secret.value).collect();
    let envelope = envelope(table);
    let source = event_source(table, usual);
    let allow = table.texts("allow").into_iter().map(|network| network.value.to_owned()).collect();
    let root_certificate = table.text("root_certificate").and_then(|path| match std::fs::read(path.value) {
        Ok(pem) => Some(pem),
        Err(error) => {
            table.wrong(
                path.line,
                format!("`root_certificate`: cannot read {}: {error}; it is a file with PEM", path.value),
            );
            None
        }
    });
    let timeout = table.duration("timeout", Duration::from_millis(100)..=DAY / 24);
    let reconcile = if push { table.text("reconcile").map(|url| url.value.to_owned()) } else { None };
    let allow_private_addresses = !push && table.switch("allow_private_addresses").unwrap_or(false);
    let endpoint = Endpoint {
        url: url?.value,
        secrets,
        envelope,
        source,
        allow,
        root_certificate,
        keep_responses: table.switch("keep_responses").unwrap_or(true),
        timeout,
        reconcile,
        allow_private_addresses,
    };
    if let Err(error) = endpoint.push().check() {
        table.wrong(table.line, error);
    }
    Some(endpoint)
}

pub(super) fn push(file: &File<'_>, (line, members): Found<'_>, names: &mut Names, usual: &str) -> Option<Push> {
    let mut table = Table::new(file, members, line, "[[push]]".into());
    let name = names.take(&mut table, "name = \"crm\"");
    let pattern = pattern(&table);
    let endpoint = endpoint(&table, true, usual);
    let operation = table.switch("operation").unwrap_or(false);
    let ordered = table.switch("ordered").unwrap_or(false);
    let policy = policy(&table, false);
    if endpoint.as_ref().is_some_and(|endpoint| endpoint.reconcile.is_some()) && !operation {
        table.wrong(
            table.line,
            "`reconcile` is for operations, whose end may not be known; add operation = true, or leave it out",
        );
    }
    table.finish();
    Some(Push { name: name?, pattern: pattern?, endpoint: endpoint?, operation, ordered, policy })
}

fn policy(table: &Table<'_>, relay: bool) -> Policy {
    let on_dead = table.parsed::<OnDead>("on_dead").map(|on_dead| on_dead.value).unwrap_or_default();
    let first = table.duration("backoff", MOMENT..=DAY);
    let longest = table.duration("max_backoff", MOMENT..=DAY);
    let backoff = match (first, longest) {
        (None, None) => None,
        (first, longest) => {
            let first = first.unwrap_or(Duration::from_secs(1));
            // As the library has it for each.
            let usual = Duration::from_secs(if relay { 300 } else { 900 });
            Some((first, longest.unwrap_or(usual).max(first)))
        }
    };
    let rate = table.parsed::<Rate>("rate").map(|rate| (rate.value.0, rate.value.1));
    let up_to = if relay { table.whole("up_to", 1..=1000) } else { None };
    Policy {
        on_dead,
        up_to: up_to.and_then(|n| usize::try_from(n).ok()),
        max_attempts: table.whole("max_attempts", 1..=1000).and_then(|n| u32::try_from(n).ok()),
        backoff,
        concurrency: table.whole("concurrency", 1..=10_000).and_then(|n| usize::try_from(n).ok()),
        rate,
    }
}

/// `100/s`, `30/min`, `5/h`.
struct Rate(u32, Duration);

impl std::str::FromStr for Rate {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Rate, &'static str> {
        let read = || {
            let (count, unit) = text.split_once('/')?;
            let seconds = match unit.trim() {
                "s" => 1,
                "min" => 60,
                "h" => 3600,
                _ => return None,
            };
            let count = count.trim().parse().ok().filter(|count| (1..=1_000_000).contains(count))?;
            Some(Rate(count, Duration::from_secs(seconds)))
        };
        read().ok_or("a rate is a whole number by a time, like 100/s, 30/min or 5/h")
    }
}

#[cfg(test)]
mod tests {
    use super::usual_source;

    #[test]
    fn an_application_is_a_source() {
        for (application, source) in
            [("shop", "/shop"), ("my shop", "/my%20shop"), ("bäckerei/1?", "/b%C3%A4ckerei/1%3F")]
        {
            assert_eq!(usual_source(application), source);
        }
    }
}
