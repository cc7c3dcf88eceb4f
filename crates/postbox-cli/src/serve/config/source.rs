//! `[[source]]`: where messages come from, and how they become messages.

use std::time::Duration;

use postbox::signature::Secret;
use postbox::source::{Format, Mapping, Template, redis_stream};

use super::{DAY, Found, MOMENT, Names, Origin, Scheme, Source, no_such_kind};
use crate::serve::table::{At, File, Table};

pub(super) fn source(file: &File<'_>, (line, members): Found<'_>, names: &mut Names) -> Option<Source> {
    let mut table = Table::new(file, members, line, "[[source]]".into());
    let name = names.take(&mut table, "name = \"payments\"");
    let kind = table.needed("kind", "kind = \"redis\"")?;
    let from = match kind.value {
        "redis" => redis_source(&table),
        "webhook" => webhook_source(&table, name.as_deref(), kind.line),
        _ => {
            no_such_kind(&table, &kind, "redis and webhook");
            return None;
        }
    };
    let format = format(&table);
    table.finish();
    Some(Source { name: name?, from: from?, format })
}

fn redis_source(table: &Table<'_>) -> Option<Origin> {
    let url = table.text_or_elsewhere("url", "url = \"redis://localhost:6379\"");
    let url = url.and_then(|url| redis_url(table, url));
    let stream = table.needed("stream", "stream = \"payments\"").map(|stream| stream.value.to_owned());
    let text = |name| table.text(name).map(|text| text.value.to_owned());
    Some(Origin::Redis {
        group: text("group"),
        consumer: text("consumer"),
        batch: table.whole("batch", 1..=10_000).and_then(|n| usize::try_from(n).ok()),
        block: table.duration("block", MOMENT..=DAY / 24),
        min_idle: table.duration("min_idle", Duration::from_secs(1)..=DAY),
        max_deliveries: table.whole("max_deliveries", 1..=1_000_000).and_then(|n| u32::try_from(n).ok()),
        replay_horizon: table.duration("replay_horizon", Duration::from_secs(1)..=3660 * DAY),
        url: url?,
        stream: stream?,
    })
}

pub(super) fn redis_url(table: &Table<'_>, url: At<String>) -> Option<String> {
    let like = "redis://user:password@localhost:6379/0, or rediss:// for TLS";
    if !["redis://", "rediss://", "redis+unix://", "unix://"].iter().any(|scheme| url.value.starts_with(scheme)) {
        table.wrong(url.line, format!("`url` is no address of a Redis server; write it like {like}"));
        return None;
    }
    if redis_stream("any").url(&url.value).check_url().is_err() {
        // Where its password ends is not clear, so that nothing of it is told.
        let why = format!(
            "`url` cannot be used: the host, the port, the database or something around them is wrong; write it like {like}, with %40 for @ in a password, %2F for / and %3A for :"
        );
        table.wrong(url.line, why);
        return None;
    }
    Some(url.value)
}

fn webhook_source(table: &Table<'_>, name: Option<&str>, line: usize) -> Option<Origin> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '~');
    if name.is_some_and(|name| !name.chars().all(fits)) {
        table.wrong(line, "the name of a webhook is a part of its address: letters, digits and -_.~ only");
    }
    let scheme = table.needed("scheme", "scheme = \"standard\" (or github, or stripe)");
    let scheme = scheme.and_then(|scheme| match scheme.value {
        "standard" => Some(Scheme::Standard),
        "github" => Some(Scheme::GitHub),
        "stripe" => Some(Scheme::Stripe),
        other => {
            let why = format!("there is no scheme `{}`; there are standard, github and stripe", other.escape_debug());
            table.wrong(scheme.line, why);
            None
        }
    });
    let secrets = table.secrets("secret");
    if !table.has("secret") {
        table.missing("secret", &table.example("secret"));
    }
    for secret in &secrets {
        let read = match &scheme {
            Some(Scheme::Standard) => Secret::standard(&secret.value),
            _ => Secret::bytes(secret.value.as_str()),
        };
        if let Err(error) = read {
            table.wrong(secret.line, format!("`secret`: {error}"));
        }
    }
    let tolerance = table.duration("tolerance", Duration::from_secs(1)..=DAY);
    let max_body_bytes = table.whole("max_body_bytes", 1..=64 << 20).and_then(|n| usize::try_from(n).ok());
    let secrets = secrets.into_iter().map(|secret| secret.value).collect();
    Some(Origin::Webhook { scheme: scheme?, secrets, tolerance, max_body_bytes })
}

/// The mapping of a source, if it says one.
fn format(table: &Table<'_>) -> Option<Format> {
    let topic = table.parsed::<Template>("topic");
    let id = table.parsed::<Template>("id");
    let rest = ["key", "time", "correlation_id", "causation_id"].map(|name| table.parsed::<Template>(name));
    let payload = table.parsed::<Template>("payload");
    let headers: Vec<(String, Option<At<Template>>)> = table
        .named_texts("headers")
        .into_iter()
        .map(|(name, text)| (name.clone(), table.parse(&format!("headers.{name}"), &text)))
        .collect();
    let naive = table.text("times_without_offset");
    if let Some(naive) = &naive
        && naive.value != "utc"
    {
        table.wrong(naive.line, "`times_without_offset` can be \"utc\"; leave it out where each time has its offset");
    }
    if let Some(id) = id.as_ref().filter(|id| !id.value.varies()) {
        table.wrong(id.line, "`id` is the same for all entries, so that all but the first are duplicates; write a placeholder, like \"{header:x-github-delivery}\"");
        return None;
    }
    if let Some(payload) = payload.as_ref().filter(|payload| !payload.value.is_a_place()) {
        table.wrong(
            payload.line,
            "`payload` must be one placeholder, {field:NAME} or {payload:PATH}, without alternatives",
        );
        return None;
    }
    let mapped = id.is_some() || payload.is_some() || rest.iter().any(Option::is_some) || !headers.is_empty();
    let Some(topic) = topic else {
        if mapped && !table.has("topic") {
            table.missing("topic", "topic = \"github.{header:x-github-event}\"; a mapping needs it");
        }
        return naive.map(|_| Format::default().times_without_offset_are_utc());
    };
    let mut mapping = Mapping::new().topic(topic.value);
    let [key, time, correlation_id, causation_id] = rest;
    if let Some(id) = id {
        mapping = mapping.id(id.value);
    }
    if let Some(key) = key {
        mapping = mapping.key(key.value);
    }
    if let Some(time) = time {
        mapping = mapping.time(time.value);
    }
    if let Some(correlation_id) = correlation_id {
        mapping = mapping.correlation_id(correlation_id.value);
    }
    if let Some(causation_id) = causation_id {
        mapping = mapping.causation_id(causation_id.value);
    }
    if let Some(payload) = payload {
        mapping = mapping.payload(payload.value);
    }
    for (name, template) in headers {
        if let Some(template) = template {
            mapping = mapping.header(name, template.value);
        }
    }
    let format = Format::mapped(mapping);
    Some(if naive.is_some() { format.times_without_offset_are_utc() } else { format })
}
