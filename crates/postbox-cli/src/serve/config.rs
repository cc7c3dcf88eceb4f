//! What `postbox serve` is to do, as `postbox.toml` says it. `docs/serve.md` is the reference.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use postbox::signature::Secret;
use postbox::sink::{EnvelopeStyle, Target};
use postbox::source::{Format, Mapping, Template};
use postbox::{OnDead, Pattern, Settings};
use toml::de::DeTable;

use super::table::{At, File, Mistake, Table, tables};

const DAY: Duration = Duration::from_secs(86_400);
const MOMENT: Duration = Duration::from_millis(1);

/// Everything that is to run.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) http: Option<SocketAddr>,
    pub(crate) sources: Vec<Source>,
    pub(crate) relays: Vec<Relay>,
    pub(crate) pushes: Vec<Push>,
}

/// A `[[source]]`.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) from: Origin,
    /// None: what the kind usually sends.
    pub(crate) format: Option<Format>,
}

#[derive(Debug)]
pub(crate) enum Origin {
    Redis {
        url: String,
        stream: String,
        group: Option<String>,
        consumer: Option<String>,
        batch: Option<usize>,
        block: Option<Duration>,
        min_idle: Option<Duration>,
        max_deliveries: Option<u32>,
        replay_horizon: Option<Duration>,
    },
    Webhook {
        scheme: Scheme,
        secrets: Vec<String>,
        tolerance: Option<Duration>,
        max_body_bytes: Option<usize>,
    },
}

/// How webhooks are signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    Standard,
    GitHub,
    Stripe,
}

/// A `[[relay]]`.
#[derive(Debug)]
pub(crate) struct Relay {
    pub(crate) name: String,
    pub(crate) pattern: Pattern,
    pub(crate) to: To,
    pub(crate) ordered: bool,
    pub(crate) policy: Policy,
}

#[derive(Debug)]
pub(crate) enum To {
    Redis { url: String, to: Target, envelope: EnvelopeStyle, source: Option<String>, max_len: Option<u64> },
    Webhook(Endpoint),
    Stdout,
}

/// Where is posted to.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) url: String,
    pub(crate) secrets: Vec<String>,
    pub(crate) envelope: EnvelopeStyle,
    pub(crate) allow: Vec<String>,
    pub(crate) root_certificate: Option<Vec<u8>>,
    /// Of one call.
    pub(crate) timeout: Option<Duration>,
    /// Where an operation's doubts are asked about.
    pub(crate) reconcile: Option<String>,
    /// A sink's: one's own network may be called.
    pub(crate) allow_private_addresses: bool,
}

/// A `[[push]]`.
#[derive(Debug)]
pub(crate) struct Push {
    pub(crate) name: String,
    pub(crate) pattern: Pattern,
    pub(crate) endpoint: Endpoint,
    pub(crate) operation: bool,
    pub(crate) ordered: bool,
    pub(crate) policy: Policy,
}

/// What a relay or push may set beside where it goes; what it does not say is the library's default.
#[derive(Debug, Default)]
pub(crate) struct Policy {
    /// In order: what becomes of a key when one of its deliveries has died.
    pub(crate) on_dead: OnDead,
    /// So many go to a sink at once.
    pub(crate) up_to: Option<usize>,
    pub(crate) max_attempts: Option<u32>,
    pub(crate) backoff: Option<(Duration, Duration)>,
    pub(crate) concurrency: Option<usize>,
    /// So many in this time.
    pub(crate) rate: Option<(u32, Duration)>,
}

impl Plan {
    /// Reads the text of a file: the plan, or every mistake in it.
    pub(crate) fn read(
        text: &str,
        settings: &Settings,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Plan, Vec<Mistake>> {
        let (root, errors) = DeTable::parse_recoverable(text);
        let file = File::new(text, variable);
        for error in &errors {
            let line = error.span().map_or(0, |span| file.line(span.start));
            file.wrong(line, format!("this is no TOML: {}", error.message()));
        }
        if !errors.is_empty() {
            // What follows a mistake of this kind may be read as something else.
            return Err(file.mistakes());
        }
        let root = root.get_ref();
        check_settings(&file, settings);
        let whole = Table::new(&file, root, 1, "the file".into());
        let http = whole.parsed::<SocketAddr>("http").map(|http| http.value);
        let sources = tables(&file, root, "source");
        let relays = tables(&file, root, "relay");
        let pushes = tables(&file, root, "push");
        if sources.is_empty() && relays.is_empty() && pushes.is_empty() {
            file.wrong(0, "there is nothing to serve; add a [[source]], a [[relay]] or a [[push]]");
        }
        let (mut names, mut subscriptions) = (Names::default(), Names::default());
        let plan = Plan {
            http,
            sources: sources.into_iter().filter_map(|at| source(&file, at, &mut names)).collect(),
            relays: relays.into_iter().filter_map(|at| relay(&file, at, &mut subscriptions)).collect(),
            pushes: pushes.into_iter().filter_map(|at| push(&file, at, &mut subscriptions)).collect(),
        };
        if !whole.has("http")
            && let Some(webhook) = plan.sources.iter().find(|source| matches!(source.from, Origin::Webhook { .. }))
        {
            let why = format!(
                "the webhook `{}` is posted to, and nothing listens; add http = \"127.0.0.1:7070\" at the top of the file",
                webhook.name
            );
            file.wrong(0, why);
        }
        let mistakes = file.mistakes();
        if mistakes.is_empty() { Ok(plan) } else { Err(mistakes) }
    }
}

/// Settings are read when they are needed; here all are wanted at once.
fn check_settings(file: &File<'_>, settings: &Settings) {
    let errors = [
        settings.backend().map(drop),
        settings.application().map(drop),
        settings.schema().map(drop),
        settings.channel().map(drop),
        settings.concurrency().map(drop),
        settings.poll_interval().map(drop),
        settings.lease().map(drop),
        settings.max_payload_bytes().map(drop),
        settings.wake_ups().map(drop),
        settings.prepared_statements().map(drop),
        settings.publish_through_function().map(drop),
        settings.pool_size().map(drop),
        settings.busy_timeout().map(drop),
        settings.keeps().map(drop),
        settings.keep_unrouted().map(drop),
        settings.keep_ids().map(drop),
        settings.max_backlog().map(drop),
    ];
    for error in errors.into_iter().filter_map(Result::err) {
        file.wrong(0, error.to_string());
    }
}

/// Names that are given once.
#[derive(Default)]
struct Names(HashMap<String, (usize, String)>);

impl Names {
    /// The name of a table; its mistakes are told with it from then on.
    fn take(&mut self, table: &mut Table<'_>, like: &str) -> Option<String> {
        let name = table.needed("name", like)?;
        let odd = |c: char| c.is_whitespace() || c.is_control();
        if name.value.len() > 255 || name.value.contains(odd) {
            table.wrong(
                name.line,
                "`name` must be at most 255 bytes, without spaces; it is durable: what is stored goes by it",
            );
            return None;
        }
        table.what = format!("{} `{}`", table.what, name.value);
        if let Some((line, what)) = self.0.get(name.value) {
            table.wrong(name.line, format!("{what} in line {line} has this name already; give each its own"));
            return None;
        }
        self.0.insert(name.value.to_owned(), (name.line, table.what.clone()));
        Some(name.value.to_owned())
    }
}

type Found<'a> = (usize, &'a DeTable<'a>);

/// What there is in this version, and what is not yet.
fn no_such_kind(table: &Table<'_>, kind: &At<&str>, there_are: &str) {
    let why = match kind.value {
        "nats" | "amqp" | "kafka" => {
            format!("the kind `{}` comes with a later version; there are {there_are}", kind.value)
        }
        other => format!(
            "there is no kind `{}`; there are {there_are} (nats, amqp and kafka come with a later version)",
            other.escape_debug()
        ),
    };
    table.wrong(kind.line, why);
}

fn source(file: &File<'_>, (line, members): Found<'_>, names: &mut Names) -> Option<Source> {
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

fn redis_url(table: &Table<'_>, url: At<String>) -> Option<String> {
    if ["redis://", "rediss://", "redis+unix://", "unix://"].iter().any(|scheme| url.value.starts_with(scheme)) {
        return Some(url.value);
    }
    table.wrong(
        url.line,
        "`url` is no address of a Redis server; write it like redis://localhost:6379, or rediss:// for TLS",
    );
    None
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
        table.wrong(payload.line, "`payload` must be one placeholder, {field:NAME} or {payload:PATH}");
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

fn relay(file: &File<'_>, (line, members): Found<'_>, names: &mut Names) -> Option<Relay> {
    let mut table = Table::new(file, members, line, "[[relay]]".into());
    let name = names.take(&mut table, "name = \"to-redis\"");
    let pattern = pattern(&table);
    let kind = table.needed("kind", "kind = \"redis\"")?;
    let to = match kind.value {
        "redis" => redis_sink(&table),
        "webhook" => endpoint(&table, false).map(To::Webhook),
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

fn redis_sink(table: &Table<'_>) -> Option<To> {
    let url = table.text_or_elsewhere("url", "url = \"redis://localhost:6379\"");
    let url = url.and_then(|url| redis_url(table, url));
    let to = table.needed("to", "to = \"shop.{topic}\"").and_then(|to| table.parse::<Target>("to", &to));
    let envelope = envelope(table);
    let source = table.text("source").map(|source| source.value.to_owned());
    let max_len = table.whole("max_len", 1..=u64::MAX);
    Some(To::Redis { url: url?, to: to?.value, envelope, source, max_len })
}

fn endpoint(table: &Table<'_>, push: bool) -> Option<Endpoint> {
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
    let url = url?.value;
    let endpoint =
        Endpoint { url, secrets, envelope, allow, root_certificate, timeout, reconcile, allow_private_addresses };
    if let Err(error) = endpoint.push().check() {
        table.wrong(table.line, error);
    }
    Some(endpoint)
}

fn push(file: &File<'_>, (line, members): Found<'_>, names: &mut Names) -> Option<Push> {
    let mut table = Table::new(file, members, line, "[[push]]".into());
    let name = names.take(&mut table, "name = \"crm\"");
    let pattern = pattern(&table);
    let endpoint = endpoint(&table, true);
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
