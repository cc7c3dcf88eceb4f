//! Where the database is and how a worker behaves: from code, the environment, `postbox.toml`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use crate::error::Error;
use crate::message::MAX_PAYLOAD_BYTES;
use crate::retention::{Keeps, MIN_KEEP};

/// Settings, with where each came from. What code sets wins over the environment, that over
/// `postbox.toml`, that over the default.
///
/// | setting | variable (the first that is set and not empty) | default |
/// |---|---|---|
/// | `database_url` | `POSTBOX_DATABASE_URL`, `DATABASE_URL` | none |
/// | `host`, `port`, `user`, `password`, `database` | `POSTBOX_HOST` …, `PGHOST` … | `localhost`, 5432, the user's name, none, the user's |
/// | `application` | `POSTBOX_APPLICATION`, `PGAPPNAME` | the program's name |
/// | `schema` | `POSTBOX_SCHEMA` | `postbox` |
/// | `channel` | `POSTBOX_CHANNEL` | the schema's name |
/// | `concurrency` | `POSTBOX_CONCURRENCY` | 5 |
/// | `poll_interval` | `POSTBOX_POLL_INTERVAL` | `1s` |
/// | `lease` | `POSTBOX_LEASE` | `30s`, at least `1s` |
/// | `max_payload_bytes` | `POSTBOX_MAX_PAYLOAD_BYTES` | 1048576 |
/// | `wake_ups` | `POSTBOX_WAKE_UPS` | `true`; `false` polls only (pgbouncer) |
/// | `prepared_statements` | `POSTBOX_PREPARED_STATEMENTS` | `true`; `false` behind pgbouncer |
/// | `publish_through_function` | `POSTBOX_PUBLISH_THROUGH_FUNCTION` | `false`: only when the role may not insert |
/// | `pool_size` | `POSTBOX_POOL_SIZE` | concurrency + 5 |
/// | `busy_timeout` | `POSTBOX_BUSY_TIMEOUT` | `30s`: how long SQLite waits for another writer |
/// | `keep_succeeded` | `POSTBOX_KEEP_SUCCEEDED` | `30d`: how long deliveries that succeeded stay on record |
/// | `keep_dead` | `POSTBOX_KEEP_DEAD` | `90d`: the same for dead and cancelled ones |
/// | `keep_operations` | `POSTBOX_KEEP_OPERATIONS` | `400d`: the same for operations, if that is longer |
/// | `keep_unrouted` | `POSTBOX_KEEP_UNROUTED` | `forever`: messages that nobody is subscribed to |
/// | `keep_ids` | `POSTBOX_KEEP_IDS` | `7d`: how long ids that sources have brought are remembered |
/// | `max_backlog` | `POSTBOX_MAX_BACKLOG` | 100000: nothing is received while so many deliveries are due |
#[derive(Debug, Clone)]
pub struct Settings {
    values: BTreeMap<&'static str, (String, String)>,
}

/// Every setting's name, in the order in which they are shown.
pub const SETTINGS: [&str; 24] = [
    "database_url",
    "host",
    "port",
    "user",
    "password",
    "database",
    "application",
    "schema",
    "channel",
    "concurrency",
    "poll_interval",
    "lease",
    "max_payload_bytes",
    "wake_ups",
    "prepared_statements",
    "publish_through_function",
    "pool_size",
    "busy_timeout",
    "keep_succeeded",
    "keep_dead",
    "keep_operations",
    "keep_unrouted",
    "keep_ids",
    "max_backlog",
];

/// What else may stand in `postbox.toml`: what `postbox serve` reads, and reads by itself.
const OF_SERVE: [&str; 4] = ["http", "source", "relay", "push"];

/// Where a text is no TOML, and why, in one line. What stands there is not repeated: it may be a password.
fn no_toml(text: &str, origin: &str, error: &toml::de::Error) -> String {
    let place = error.span().map_or_else(String::new, |span| {
        let before = text.get(..span.start).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        format!(", line {line}, column {column}")
    });
    let why: Vec<&str> = error.message().lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    format!("{origin}{place}: this is no TOML: {}", why.join("; "))
}

fn text_of(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|e| Error::Settings(format!("cannot read {}: {e}", path.display())))
}

/// The first mistake, with its place, if there is one.
fn told(mistakes: &[Mistake], origin: &str) -> Result<(), Error> {
    match mistakes.first() {
        Some((line, why)) => Err(Error::Settings(format!("{origin}, line {line}: {why}"))),
        None => Ok(()),
    }
}

/// Which database a set of settings points at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// PostgreSQL 14 or later.
    Postgres,
    /// A SQLite file.
    Sqlite,
}

/// A setting in a file that is none: its line, from 1, and what is wrong.
type Mistake = (usize, String);

impl Settings {
    /// Nothing but defaults.
    pub fn defaults() -> Settings {
        Settings { values: BTreeMap::new() }
    }

    /// Defaults, then `./postbox.toml` if there is one, then the environment.
    ///
    /// # Errors
    /// A file that does not parse, a setting that is none, with the file and line.
    pub fn load() -> Result<Settings, Error> {
        let file = Path::new("postbox.toml");
        Self::load_from(file.exists().then_some(file))
    }

    /// Defaults, then this file if one is given, then the environment.
    ///
    /// # Errors
    /// As [`load`](Self::load); or the file is not there.
    pub fn load_from(file: Option<&Path>) -> Result<Settings, Error> {
        let (settings, mistakes) = Self::load_with_mistakes(file)?;
        match file {
            Some(file) => told(&mistakes, &file.display().to_string()).map(|()| settings),
            None => Ok(settings),
        }
    }

    /// The same for who tells all mistakes at once: a setting that is none is left out, and told with its line.
    ///
    /// # Errors
    /// The file is not there, or is no TOML.
    pub fn load_with_mistakes(file: Option<&Path>) -> Result<(Settings, Vec<(usize, String)>), Error> {
        let mut settings = Settings::defaults();
        let mistakes = match file {
            Some(file) => settings.take_toml(&text_of(file)?, &file.display().to_string())?,
            None => Vec::new(),
        };
        settings.read_env(|name| std::env::var(name).ok());
        Ok((settings, mistakes))
    }

    /// Takes the settings of a TOML file.
    ///
    /// # Errors
    /// The file cannot be read or does not parse; the message names the line.
    pub fn read_file(&mut self, path: &Path) -> Result<(), Error> {
        self.read_toml(&text_of(path)?, &path.display().to_string())
    }

    pub(crate) fn read_toml(&mut self, text: &str, origin: &str) -> Result<(), Error> {
        told(&self.take_toml(text, origin)?, origin)
    }

    /// Takes what is a setting, and says what is none, in the order of the file.
    fn take_toml(&mut self, text: &str, origin: &str) -> Result<Vec<Mistake>, Error> {
        let table = DeTable::parse(text).map_err(|e| Error::Settings(no_toml(text, origin, &e)))?;
        let mut mistakes = Vec::new();
        for (name, value) in table.get_ref() {
            let line = text[..name.span().start.min(text.len())].matches('\n').count() + 1;
            let name = name.get_ref();
            if OF_SERVE.contains(&name.as_ref()) {
                continue;
            }
            let Some(known) = SETTINGS.into_iter().find(|s| s == name) else {
                let name = name.escape_debug();
                let (all, serve) = (SETTINGS.join(", "), OF_SERVE.join(", "));
                mistakes.push((
                    line,
                    format!("there is no setting `{name}`; there are {all}, and for `postbox serve` {serve}"),
                ));
                continue;
            };
            let value = match value.get_ref() {
                DeValue::String(text) => text.to_string(),
                // One that is too large stays as it is written, and is refused when it is needed.
                DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
                    .map_or_else(|_| number.as_str().to_owned(), |number| number.to_string()),
                DeValue::Boolean(on) => on.to_string(),
                _ => {
                    mistakes
                        .push((line, format!("the setting `{known}` must be a text, a whole number, true or false")));
                    continue;
                }
            };
            self.values.insert(known, (value, format!("{origin}, line {line}")));
        }
        mistakes.sort();
        Ok(mistakes)
    }

    pub(crate) fn read_env(&mut self, var: impl Fn(&str) -> Option<String>) {
        for name in SETTINGS {
            let also = match name {
                "database_url" => Some("DATABASE_URL"),
                "host" => Some("PGHOST"),
                "port" => Some("PGPORT"),
                "user" => Some("PGUSER"),
                "password" => Some("PGPASSWORD"),
                "database" => Some("PGDATABASE"),
                "application" => Some("PGAPPNAME"),
                _ => None,
            };
            let own = format!("POSTBOX_{}", name.to_ascii_uppercase());
            for variable in [Some(own.as_str()), also].into_iter().flatten() {
                if let Some(value) = var(variable).filter(|v| !v.is_empty()) {
                    self.values.insert(name, (value, format!("${variable}")));
                    break;
                }
            }
        }
    }

    /// Sets one from code. An empty value takes it back to what is below: the default.
    ///
    /// # Panics
    /// `name` is none of [`SETTINGS`].
    #[track_caller]
    #[must_use]
    pub fn set(self, name: &str, value: impl ToString) -> Settings {
        self.set_from(name, value, "code")
    }

    /// Sets one, and says where it comes from: a flag, a form.
    ///
    /// # Panics
    /// `name` is none of [`SETTINGS`].
    #[track_caller]
    #[must_use]
    pub fn set_from(mut self, name: &str, value: impl ToString, origin: &str) -> Settings {
        let known = SETTINGS
            .into_iter()
            .find(|s| *s == name)
            .unwrap_or_else(|| panic!("there is no setting `{name}`; there are {}", SETTINGS.join(", ")));
        let value = value.to_string();
        if value.is_empty() {
            self.values.remove(known);
        } else {
            self.values.insert(known, (value, origin.into()));
        }
        self
    }

    /// The database's URL: `postgres://…` or `sqlite:FILE`.
    #[must_use]
    pub fn url(self, url: impl Into<String>) -> Settings {
        self.set("database_url", url.into())
    }

    /// Each setting's value and origin; passwords are hidden.
    pub fn shown(&self) -> Vec<(&'static str, String, String)> {
        SETTINGS
            .into_iter()
            .map(|name| {
                let (value, origin) = match self.values.get(name) {
                    Some((value, origin)) => (value.clone(), origin.clone()),
                    None => (self.default_of(name), "default".to_owned()),
                };
                let value = match name {
                    "password" if !value.is_empty() => "***".to_owned(),
                    "database_url" => hide_password(&value),
                    _ => value,
                };
                (name, value, origin)
            })
            .collect()
    }

    fn default_of(&self, name: &str) -> String {
        match name {
            "application" => program_name(),
            "schema" => "postbox".into(),
            "channel" => self.text("schema"),
            "concurrency" => "5".into(),
            "poll_interval" => "1s".into(),
            "lease" => "30s".into(),
            "max_payload_bytes" => MAX_PAYLOAD_BYTES.to_string(),
            "wake_ups" | "prepared_statements" => "true".into(),
            "publish_through_function" => "false".into(),
            "pool_size" => self.concurrency().map_or_else(|_| "10".into(), |c| (c + 5).to_string()),
            "busy_timeout" => "30s".into(),
            "keep_succeeded" => "30d".into(),
            "keep_dead" => "90d".into(),
            "keep_operations" => "400d".into(),
            "keep_unrouted" => "forever".into(),
            "keep_ids" => "7d".into(),
            "max_backlog" => "100000".into(),
            _ => String::new(),
        }
    }

    fn text(&self, name: &'static str) -> String {
        self.values.get(name).map_or_else(|| self.default_of(name), |(value, _)| value.clone())
    }

    fn wrong(&self, name: &'static str, why: impl std::fmt::Display) -> Error {
        let origin = self.values.get(name).map_or("default", |(_, origin)| origin.as_str());
        Error::Settings(format!("the setting `{name}` = `{}` ({origin}) {why}", self.text(name).escape_debug()))
    }

    fn whole(&self, name: &'static str, range: std::ops::RangeInclusive<u64>) -> Result<u64, Error> {
        let number = self.text(name).parse().ok().filter(|n| range.contains(n));
        number.ok_or_else(|| {
            self.wrong(name, format!("must be a whole number from {} to {}", range.start(), range.end()))
        })
    }

    fn switch(&self, name: &'static str) -> Result<bool, Error> {
        match self.text(name).as_str() {
            "true" | "1" | "on" | "yes" => Ok(true),
            "false" | "0" | "off" | "no" => Ok(false),
            _ => Err(self.wrong(name, "must be true or false")),
        }
    }

    fn duration(&self, name: &'static str, range: std::ops::RangeInclusive<Duration>) -> Result<Duration, Error> {
        let parsed = self.text(name).parse::<jiff::SignedDuration>().ok();
        let duration = parsed.and_then(|d| Duration::try_from(d).ok()).filter(|d| range.contains(d));
        duration.ok_or_else(|| {
            self.wrong(
                name,
                format!("must be a duration from {:?} to {:?}, like 30s or 500ms", range.start(), range.end()),
            )
        })
    }

    /// The URL, if one is set.
    pub fn database_url(&self) -> Option<&str> {
        self.values.get("database_url").map(|(value, _)| value.as_str())
    }

    /// Which kind of database they point at.
    ///
    /// # Errors
    /// Nothing points at a database, or the URL is of neither kind.
    pub fn backend(&self) -> Result<Backend, Error> {
        match self.database_url() {
            Some(url) if url.starts_with("postgres:") || url.starts_with("postgresql:") => Ok(Backend::Postgres),
            Some(url) if url.starts_with("sqlite:") => Ok(Backend::Sqlite),
            Some(_) => Err(Error::Settings(
                "the database URL must start with postgres:// or sqlite:, like postgres://localhost/shop or sqlite:shop.db".into(),
            )),
            None if ["host", "port", "user", "database"].iter().any(|n| self.values.contains_key(n)) => Ok(Backend::Postgres),
            None => Err(Error::Settings(
                "no database is named; set DATABASE_URL to postgres://localhost/shop or sqlite:shop.db".into(),
            )),
        }
    }

    /// How to connect to PostgreSQL: the URL; without one, the separate fields. Where neither names a user, it is who
    /// runs this (`$USER`), else `postgres`.
    ///
    /// # Errors
    /// The URL or a field does not parse. Its password is not in the message.
    pub fn postgres(&self) -> Result<sqlx::postgres::PgConnectOptions, Error> {
        use sqlx::postgres::PgConnectOptions;
        let field = |name| Some(self.text(name)).filter(|v| !v.is_empty());
        let variable = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
        // As psql has it, where nobody is named.
        let login = || {
            let named = field("user").or_else(|| variable("USER")).or_else(|| variable("LOGNAME"));
            named.unwrap_or_else(|| "postgres".into())
        };
        let mut options: PgConnectOptions = match self.database_url() {
            // sqlx by itself would log in as `anonymous`.
            Some(url) => with_user(url, login)
                .parse()
                .map_err(|e| Error::Settings(format!("the database URL {} does not parse: {e}", hide_password(url))))?,
            None => {
                let options = PgConnectOptions::new_without_pgpass();
                let options = options.host(&field("host").unwrap_or_else(|| "localhost".into()));
                let options = options.port(match field("port") {
                    Some(_) => self.whole("port", 1..=65_535)? as u16,
                    None => 5432,
                });
                let options = options.username(&login()).database(&field("database").unwrap_or_else(login));
                match field("password") {
                    Some(password) => options.password(&password),
                    None => options,
                }
            }
        };
        if options.get_host().is_empty() {
            options = options.host("localhost");
        }
        options = options.application_name(&self.application()?);
        if !self.prepared_statements()? {
            options = options.statement_cache_capacity(0);
        }
        Ok(options)
    }

    /// The application that subscriptions belong to.
    ///
    /// # Errors
    /// Longer than 63 bytes, or with control characters.
    pub fn application(&self) -> Result<String, Error> {
        let name = self.text("application");
        if name.len() > 63 || name.chars().any(char::is_control) {
            return Err(self.wrong("application", "must be at most 63 bytes, without control characters"));
        }
        Ok(name)
    }

    /// The schema in PostgreSQL.
    ///
    /// # Errors
    /// Not `^[a-z_][a-z0-9_]{0,47}$`.
    pub fn schema(&self) -> Result<String, Error> {
        let schema = self.text("schema");
        if !plain_name(&schema) {
            return Err(self.wrong("schema", "must be 1 to 48 of a-z 0-9 _, not starting with a digit"));
        }
        Ok(schema)
    }

    /// The channel of wake-ups.
    ///
    /// # Errors
    /// Not `^[a-z_][a-z0-9_]{0,47}$`.
    pub fn channel(&self) -> Result<String, Error> {
        let channel = self.text("channel");
        if !plain_name(&channel) {
            return Err(self.wrong("channel", "must be 1 to 48 of a-z 0-9 _, not starting with a digit"));
        }
        Ok(channel)
    }

    /// Handlers that run at once in a worker.
    ///
    /// # Errors
    /// Not 1 to 10000.
    pub fn concurrency(&self) -> Result<usize, Error> {
        Ok(self.whole("concurrency", 1..=10_000)? as usize)
    }

    /// The longest a worker sleeps without looking.
    ///
    /// # Errors
    /// Not 5 ms to 1 h.
    pub fn poll_interval(&self) -> Result<Duration, Error> {
        self.duration("poll_interval", Duration::from_millis(5)..=Duration::from_secs(3600))
    }

    /// How long a worker may stay silent before its work is taken over.
    ///
    /// # Errors
    /// Not 1 s to 1 h.
    pub fn lease(&self) -> Result<Duration, Error> {
        self.duration("lease", Duration::from_secs(1)..=Duration::from_secs(3600))
    }

    /// The largest payload, in bytes.
    ///
    /// # Errors
    /// Not 1 to 64 MiB.
    pub fn max_payload_bytes(&self) -> Result<usize, Error> {
        Ok(self.whole("max_payload_bytes", 1..=(64 << 20))? as usize)
    }

    /// Whether workers listen for wake-ups.
    ///
    /// # Errors
    /// Neither true nor false.
    pub fn wake_ups(&self) -> Result<bool, Error> {
        self.switch("wake_ups")
    }

    /// Whether statements are prepared by name.
    ///
    /// # Errors
    /// Neither true nor false.
    pub fn prepared_statements(&self) -> Result<bool, Error> {
        self.switch("prepared_statements")
    }

    /// Whether PostgreSQL's function publishes, whatever the role of the postbox may do itself: for
    /// connections that belong to another one.
    ///
    /// # Errors
    /// Neither true nor false.
    pub fn publish_through_function(&self) -> Result<bool, Error> {
        self.switch("publish_through_function")
    }

    /// Connections at most, the heartbeat's and the listener's not counted.
    ///
    /// # Errors
    /// Not 2 to 10100.
    pub fn pool_size(&self) -> Result<u32, Error> {
        Ok(self.whole("pool_size", 2..=10_100)? as u32)
    }

    /// How long ids that sources have brought are remembered, and their repetitions recognised.
    ///
    /// # Errors
    /// Not 1 h to 100 years, or `forever`.
    pub fn keep_ids(&self) -> Result<Duration, Error> {
        // The calendar of every store reaches that far.
        Ok(self.keep("keep_ids")?.min(Duration::from_secs(36_525 * 86_400)))
    }

    /// Nothing is received while so many deliveries are due and not claimed.
    ///
    /// # Errors
    /// Not 1 to 100000000.
    pub fn max_backlog(&self) -> Result<u32, Error> {
        Ok(self.whole("max_backlog", 1..=100_000_000)? as u32)
    }

    /// A time that something stays: days and weeks too, or `forever`.
    fn keep(&self, name: &'static str) -> Result<Duration, Error> {
        let text = self.text(name);
        if text == "forever" {
            return Ok(Duration::MAX);
        }
        let span = text.parse::<jiff::Span>().ok();
        let length = span.and_then(|s| s.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).ok());
        let longest = Duration::from_secs(36_525 * 86_400);
        let keep = length.and_then(|d| Duration::try_from(d).ok()).filter(|d| (MIN_KEEP..=longest).contains(d));
        keep.ok_or_else(|| {
            self.wrong(name, "must be an hour to a hundred years, in hours, days or weeks like 30d, or `forever`")
        })
    }

    /// How long what has ended stays on record, where a subscription says nothing else.
    ///
    /// # Errors
    /// One of `keep_succeeded`, `keep_dead` and `keep_operations` is not 1 h to 100 years or `forever`.
    pub fn keeps(&self) -> Result<Keeps, Error> {
        Ok(Keeps {
            succeeded: self.keep("keep_succeeded")?,
            dead: self.keep("keep_dead")?,
            operations: self.keep("keep_operations")?,
        })
    }

    /// How long messages that nobody is subscribed to stay; `Duration::MAX` is for ever.
    ///
    /// # Errors
    /// Not 1 h to 100 years or `forever`.
    pub fn keep_unrouted(&self) -> Result<Duration, Error> {
        self.keep("keep_unrouted")
    }

    /// SQLite: how long to wait for another writer.
    ///
    /// # Errors
    /// Not 0 s to 1 h.
    pub fn busy_timeout(&self) -> Result<Duration, Error> {
        self.duration("busy_timeout", Duration::ZERO..=Duration::from_secs(3600))
    }
}

/// `^[a-z_][a-z0-9_]{0,47}$`: what may stand in SQL without quotes.
pub(crate) fn plain_name(name: &str) -> bool {
    let mut chars = name.chars();
    name.len() <= 48
        && chars.next().is_some_and(|c| c.is_ascii_lowercase() || c == '_')
        && chars.all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

fn program_name() -> String {
    let path = std::env::current_exe().unwrap_or_default();
    let name = path.file_stem().and_then(|n| n.to_str()).unwrap_or("postbox");
    name.chars().take(40).collect()
}

/// A URL of PostgreSQL that names a user: this one, where it named none.
fn with_user(url: &str, user: impl FnOnce() -> String) -> Cow<'_, str> {
    let Some((_, rest)) = url.split_once("://") else { return url.into() };
    let (place, parameters) = rest.split_once('?').unwrap_or((rest, ""));
    let authority = place.split(['/', '#']).next().unwrap_or_default();
    let named = authority.rsplit_once('@').is_some_and(|(user, _)| !user.is_empty() && !user.starts_with(':'));
    if named || parameters.split('&').any(|parameter| parameter.starts_with("user=")) {
        return url.into();
    }
    // As a parameter it goes with every form of the place, a socket's as well.
    let encoded: String = user().bytes().map(|byte| format!("%{byte:02X}")).collect();
    format!("{url}{}user={encoded}", if rest.contains('?') { '&' } else { '?' }).into()
}

/// A URL with `***` for its password, which may also be a parameter.
pub fn hide_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let authority_end = rest.find(['/', '?']).unwrap_or(rest.len());
    let hidden = rest[..authority_end].rfind('@').and_then(|at| {
        let (user, _) = rest[..at].split_once(':')?;
        Some(format!("{user}:***{}", &rest[at..]))
    });
    let rest = hidden.unwrap_or_else(|| rest.to_owned());
    let Some((place, parameters)) = rest.split_once('?') else { return format!("{scheme}://{rest}") };
    let shown: Vec<String> = parameters
        .split('&')
        .map(|parameter| match parameter.split_once('=') {
            Some((name @ ("password" | "pass"), _)) => format!("{name}=***"),
            _ => parameter.to_owned(),
        })
        .collect();
    format!("{scheme}://{place}?{}", shown.join("&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_precedence() {
        let mut settings = Settings::defaults();
        settings.read_toml("lease = \"10s\"\nconcurrency = 7\nschema = \"from_file\"", "postbox.toml").expect("parses");
        let env = [("POSTBOX_LEASE", "20s"), ("POSTBOX_SCHEMA", ""), ("PGHOST", "db"), ("POSTBOX_HOST", "own")];
        settings.read_env(|name| env.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()));
        let settings = settings.set("pool_size", 3);
        assert_eq!(settings.lease().expect("lease"), Duration::from_secs(20));
        assert_eq!(settings.concurrency().expect("concurrency"), 7);
        assert_eq!(settings.schema().expect("schema"), "from_file", "an empty variable counts as unset");
        assert_eq!(settings.channel().expect("channel"), "from_file");
        let origins: BTreeMap<_, _> = settings.shown().into_iter().map(|(n, v, o)| (n, (v, o))).collect();
        assert_eq!(origins["host"], ("own".into(), "$POSTBOX_HOST".into()));
        assert_eq!(origins["concurrency"].1, "postbox.toml, line 2");
        assert_eq!(origins["pool_size"].1, "code");
        assert_eq!(settings.backend().expect("backend"), Backend::Postgres);
    }

    #[test]
    fn who_logs_in() {
        let user = |url: &str| {
            let settings = Settings::defaults().url(url).set("user", "me & you");
            settings.postgres().expect("options").get_username().to_owned()
        };
        let nobody = ["postgres://h/d", "postgresql://h", "postgres://h/d?sslmode=disable", "postgres:///d?host=/tmp"];
        for url in nobody.into_iter().chain(["postgres://h:1/d?", "postgres://h/a@b", "postgres://:secret@h/d"]) {
            assert_eq!(user(url), "me & you", "{url}");
        }
        for url in
            ["postgres://her@h/d", "postgres://her:s@h", "postgres://h/d?user=her", "postgres:///d?host=/x&user=her"]
        {
            assert_eq!(user(url), "her", "{url}");
        }
    }

    #[test]
    fn errors_name_the_setting_and_its_origin() {
        let settings = Settings::defaults().set("lease", "10ms").set("schema", "x\"; drop");
        let error = settings.lease().expect_err("too short").to_string();
        assert!(error.contains("`lease`") && error.contains("code") && error.contains("1s"), "{error}");
        assert!(settings.schema().is_err());
        assert!(Settings::defaults().set("schema", "x".repeat(49)).schema().is_err());
        let error = Settings::defaults().read_toml("\nleese = 3", "postbox.toml").expect_err("unknown").to_string();
        assert!(error.contains("line 2") && error.contains("leese"), "{error}");
        let error = Settings::defaults().read_toml("lease = [1]", "postbox.toml").expect_err("a list").to_string();
        assert!(error.contains("line 1") && error.contains("`lease` must be a text"), "{error}");
        assert!(Settings::defaults().backend().expect_err("none").to_string().contains("DATABASE_URL"));
    }

    #[test]
    fn what_is_no_toml_is_told_in_one_line() {
        for (text, place) in [
            ("application = \"shop\"\nlease = \"10s\n", "postbox.toml, line 2, column "),
            ("ünïcode = = 3", "postbox.toml, line 1, column "),
            ("lease = \"1s\"\n\nlease = \"2s\"\n", "postbox.toml, line 3, column 1: "),
            ("[a\n", "postbox.toml, line 1, column "),
            ("lease", "postbox.toml, line 1, column "),
        ] {
            let error = Settings::defaults().read_toml(text, "postbox.toml").expect_err(text).to_string();
            assert!(error.contains(place) && error.contains("this is no TOML: "), "{error}");
            assert!(!error.contains('\n') && !error.contains('^'), "{error}");
        }
        let hidden = "database_url = \"postgres://ana:hidden@host/shop\nlease = 3\n";
        let error = Settings::defaults().read_toml(hidden, "postbox.toml").expect_err("not closed").to_string();
        assert!(!error.contains("hidden"), "{error}");
    }

    #[test]
    fn what_serve_reads_stands_in_the_same_file() {
        let mut settings = Settings::defaults();
        let file = "lease = \"10s\"\nhttp = \"127.0.0.1:7070\"\n[[source]]\nname = \"a\"\n[[relay]]\n[[push]]\n";
        settings.read_toml(file, "postbox.toml").expect("parses");
        assert_eq!(settings.lease().expect("lease"), Duration::from_secs(10));
    }

    #[test]
    fn times_to_keep_are_days_or_for_ever() {
        let settings = Settings::defaults();
        assert_eq!(settings.keeps().expect("defaults"), Keeps::default());
        assert_eq!(settings.keep_unrouted().expect("default"), Duration::MAX);
        let day = Duration::from_secs(86_400);
        for (text, keep) in [
            ("1h", Some(day / 24)),
            ("7d", Some(7 * day)),
            ("2 weeks", Some(14 * day)),
            ("forever", Some(Duration::MAX)),
        ] {
            assert_eq!(settings.clone().set("keep_unrouted", text).keep_unrouted().ok(), keep, "{text}");
        }
        for text in ["0", "59m", "1mo", "1y", "-3d", "soon", "40000 weeks", "30"] {
            let error = settings.clone().set("keep_dead", text).keeps().expect_err(text).to_string();
            assert!(error.contains("`keep_dead`") && error.contains("30d"), "{error}");
        }
    }

    #[test]
    fn passwords_are_hidden() {
        assert_eq!(hide_password("postgres://ana:se:cr@et@db/shop"), "postgres://ana:***@db/shop");
        assert_eq!(hide_password("postgres://ana@db/shop"), "postgres://ana@db/shop");
        assert_eq!(hide_password("sqlite:shop.db"), "sqlite:shop.db");
        assert_eq!(hide_password("postgres://db/shop?password=a&b=c"), "postgres://db/shop?password=***&b=c");
        assert_eq!(hide_password("unix:///run/redis.sock?db=1&pass=a"), "unix:///run/redis.sock?db=1&pass=***");
    }
}
