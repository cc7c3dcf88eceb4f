//! What `postbox serve` is to do, as `postbox.toml` says it. `docs/serve.md` is the reference.

mod send;
mod source;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use postbox::sink::{EnvelopeStyle, Target};
use postbox::source::Format;
use postbox::{OnDead, Pattern, Settings};
use toml::de::DeTable;

use self::send::{push, relay, usual_source};
use self::source::source;
use super::table::{At, File, Mistake, Table, syntax, tables};

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
    Redis { url: String, to: Target, envelope: EnvelopeStyle, source: String, max_len: Option<u64> },
    Webhook(Endpoint),
    Stdout,
}

/// Where is posted to.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) url: String,
    pub(crate) secrets: Vec<String>,
    pub(crate) envelope: EnvelopeStyle,
    /// Of the CloudEvents that do not say theirs.
    pub(crate) source: String,
    pub(crate) allow: Vec<String>,
    pub(crate) root_certificate: Option<Vec<u8>>,
    /// Whether answers of messages that were taken are kept.
    pub(crate) keep_responses: bool,
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
    /// Reads the text of a file: the plan, or every mistake in it, with those of its settings.
    pub(crate) fn read(
        text: &str,
        settings: &Settings,
        no_settings: &[(usize, String)],
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Plan, Vec<Mistake>> {
        // What follows a mistake of this kind may be read as something else.
        let mistakes = syntax(text);
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        let (root, _) = DeTable::parse_recoverable(text);
        let file = File::new(text, variable);
        let root = root.get_ref();
        for (line, why) in no_settings {
            file.wrong(*line, why.as_str());
        }
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
        // One that cannot be used is told by now.
        let usual = usual_source(&settings.application().unwrap_or_default());
        let plan = Plan {
            http,
            sources: sources.into_iter().filter_map(|at| source(&file, at, &mut names)).collect(),
            relays: relays.into_iter().filter_map(|at| relay(&file, at, &mut subscriptions, &usual)).collect(),
            pushes: pushes.into_iter().filter_map(|at| push(&file, at, &mut subscriptions, &usual)).collect(),
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
