//! What the Redis source and the Redis sink share: which server, a connection to it, and words for what went wrong.

use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, ErrorKind, Pipeline, RedisError, ServerError, Value};

use crate::error::BrokerError;

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);
const DEFAULT_URL: &str = "redis://127.0.0.1:6379";

/// Which server.
#[derive(Clone, Default)]
pub(crate) enum Server {
    /// `REDIS_URL`, else the one on this host.
    #[default]
    Environment,
    Url(String),
    Client(Box<Client>),
}

impl Server {
    pub(crate) fn known(&self) -> Result<Known, BrokerError> {
        let url = match self {
            Server::Client(client) => return Ok(Known::new((**client).clone())),
            Server::Url(url) => url.clone(),
            Server::Environment => std::env::var("REDIS_URL").unwrap_or_else(|_| DEFAULT_URL.into()),
        };
        // The URL itself is not told: it may have a password.
        let client = Client::open(url);
        client.map(Known::new).map_err(|e| BrokerError::Refused(format!("the URL of Redis cannot be used: {e}")))
    }
}

/// A server that has been looked up: what is said of it in errors, and what is not.
pub(crate) struct Known {
    client: Client,
    address: String,
    secret: Option<String>,
}

impl Known {
    fn new(client: Client) -> Known {
        let info = client.get_connection_info();
        let secret = info.redis_settings().password().map(str::to_owned).filter(|p| !p.is_empty());
        Known { address: info.addr().to_string(), secret, client }
    }

    /// Host and port.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// A connection of its own; it counts as lost when an answer takes longer than `patience`.
    pub(crate) async fn connect(&self, patience: Duration) -> Result<MultiplexedConnection, BrokerError> {
        if matches!(self.client.get_connection_info().addr(), redis::ConnectionAddr::TcpTls { .. }) {
            // Without a default, rustls guesses, and panics if it cannot. One that is set already stays.
            rustls::crypto::ring::default_provider().install_default().ok();
        }
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT))
            .set_response_timeout(Some(patience))
            // A whole pipeline at once.
            .set_write_backpressure_boundary(64 << 10);
        let connected = self.client.get_multiplexed_async_connection_with_config(&config).await;
        connected.map_err(|error| self.broker_error(&error))
    }

    /// What went wrong, in the server's own words if they are its.
    pub(crate) fn words(&self, error: &RedisError) -> String {
        let words = match (error.kind(), error.code()) {
            (ErrorKind::Server(_) | ErrorKind::Extension, Some(code)) => joined(code, error.detail()),
            _ if error.is_timeout() => format!("Redis at {} did not answer in time", self.address),
            _ => format!("Redis at {}: {error}", self.address),
        };
        self.discreet(words)
    }

    /// What the server said.
    pub(crate) fn server_words(&self, error: &ServerError) -> String {
        self.discreet(joined(error.code(), error.details()))
    }

    fn discreet(&self, words: String) -> String {
        match &self.secret {
            Some(secret) => words.replace(secret.as_str(), "***"),
            None => words,
        }
    }

    fn broker_error(&self, error: &RedisError) -> BrokerError {
        let settings = matches!(error.kind(), ErrorKind::InvalidClientConfig | ErrorKind::AuthenticationFailed);
        verdict(settings, error.code(), self.words(error))
    }
}

fn joined(code: &str, detail: Option<&str>) -> String {
    format!("{code} {}", detail.unwrap_or_default()).trim_end().to_owned()
}

/// Whether somebody has to mend a setting, or it may pass by itself.
fn verdict(settings: bool, code: Option<&str>, words: String) -> BrokerError {
    if settings || matches!(code, Some("WRONGTYPE" | "WRONGPASS" | "NOAUTH" | "NOPERM")) {
        BrokerError::Refused(words)
    } else {
        BrokerError::Unavailable(words)
    }
}

/// Why there is no answer to a command.
pub(crate) enum Trouble {
    /// None came.
    Broker(BrokerError),
    /// The server answers with an error.
    Server { code: String, words: String },
}

impl Trouble {
    /// Whether the server's error has this code.
    pub(crate) fn is(&self, wanted: &str) -> bool {
        matches!(self, Trouble::Server { code, .. } if code == wanted)
    }
}

impl From<BrokerError> for Trouble {
    fn from(error: BrokerError) -> Trouble {
        Trouble::Broker(error)
    }
}

impl From<Trouble> for BrokerError {
    fn from(trouble: Trouble) -> BrokerError {
        match trouble {
            Trouble::Broker(error) => error,
            Trouble::Server { code, words } => verdict(false, Some(&code), words),
        }
    }
}

/// A connection that is made when it is needed, and again after it was lost.
pub(crate) struct Link {
    known: Arc<Known>,
    patience: Duration,
    connection: Option<MultiplexedConnection>,
}

impl Link {
    pub(crate) fn new(known: Arc<Known>, patience: Duration) -> Link {
        Link { known, patience, connection: None }
    }

    /// One command, one answer.
    pub(crate) async fn ask(&mut self, command: &Cmd) -> Result<Value, Trouble> {
        let answers = self.ask_all(redis::pipe().add_command(command.clone())).await?;
        self.answer(answers.into_iter().next().unwrap_or(Value::Nil))
    }

    /// An answer, its error taken out.
    pub(crate) fn answer(&self, value: Value) -> Result<Value, Trouble> {
        match value {
            Value::ServerError(error) => {
                Err(Trouble::Server { code: error.code().to_owned(), words: self.known.server_words(&error) })
            }
            value => Ok(value),
        }
    }

    /// Several commands in one round trip, and an answer for each, errors of the server among them.
    ///
    /// Cancel safety: the commands are carried out or not; the next ones wait for them, on the same connection.
    pub(crate) async fn ask_all(&mut self, pipeline: &mut Pipeline) -> Result<Vec<Value>, BrokerError> {
        let mut connection = match &self.connection {
            Some(connection) => connection.clone(),
            None => self.connection.insert(self.known.connect(self.patience).await?).clone(),
        };
        match pipeline.ignore_errors().query_async(&mut connection).await {
            Ok(Value::Array(answers)) => Ok(answers),
            Ok(_) => Ok(Vec::new()),
            Err(error) => {
                self.connection = None;
                Err(self.known.broker_error(&error))
            }
        }
    }
}

/// One of the server's settings; none if it does not tell.
pub(crate) async fn setting(link: &mut Link, name: &str) -> Result<Option<String>, BrokerError> {
    match link.ask(redis::cmd("CONFIG").arg("GET").arg(name)).await {
        Ok(answer) => {
            let pair: Vec<String> = redis::from_redis_value(answer).unwrap_or_default();
            Ok(pair.into_iter().nth(1))
        }
        Err(Trouble::Server { .. }) => Ok(None),
        Err(Trouble::Broker(error)) => Err(error),
    }
}

/// What in the server's settings may lose messages, for the log. Nothing if it does not tell its settings.
pub(crate) async fn unsafe_settings(link: &mut Link) -> Result<Vec<String>, BrokerError> {
    let mut settings = std::collections::HashMap::new();
    for name in ["maxmemory", "maxmemory-policy", "appendonly", "save"] {
        settings.insert(name, setting(link, name).await?);
    }
    Ok(warnings(|name| settings.get(name).cloned().flatten()))
}

fn warnings(setting: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut warnings = Vec::new();
    let policy = setting("maxmemory-policy").filter(|policy| policy.starts_with("allkeys"));
    if let Some(policy) = policy
        && setting("maxmemory").is_some_and(|bytes| bytes != "0")
    {
        warnings.push(format!(
            "Redis may evict whole streams when its memory is full (maxmemory-policy {policy}); noeviction refuses new messages instead, and they are sent later"
        ));
    }
    if setting("appendonly").as_deref() == Some("no") {
        warnings.push(match setting("save").as_deref() {
            Some("") => "Redis keeps nothing on disk (appendonly no, save \"\"): when it ends, all that it has confirmed is lost".into(),
            _ => "Redis writes snapshots only (appendonly no): if it crashes, what it has confirmed since the last one is lost".into(),
        });
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_settings_are_warned_of() {
        let warnings = |settings: &[(&str, &str)]| {
            warnings(|name| settings.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
        };
        assert!(warnings(&[]).is_empty(), "it does not tell");
        let evicting = ("maxmemory-policy", "allkeys-lru");
        assert!(warnings(&[evicting, ("maxmemory", "0"), ("appendonly", "yes")]).is_empty(), "without a limit");
        assert!(warnings(&[evicting, ("maxmemory", "1048576")])[0].contains("allkeys-lru"));
        assert!(warnings(&[("maxmemory-policy", "volatile-lru"), ("maxmemory", "1048576")]).is_empty());
        assert!(warnings(&[("appendonly", "no"), ("save", "")])[0].contains("nothing"));
        assert!(warnings(&[("appendonly", "no"), ("save", "3600 1")])[0].contains("snapshots"));
    }

    #[test]
    fn a_password_is_never_told() {
        let known = Server::Url("redis://shop:hunter2@127.0.0.1:1/0".into()).known().expect("a URL");
        let error = RedisError::from((ErrorKind::Io, "refused", "by shop:hunter2".into()));
        for words in [known.words(&error), known.address().to_owned()] {
            assert!(!words.contains("hunter2"), "{words}");
            assert!(words.contains("127.0.0.1:1"), "{words}");
        }
        let Err(BrokerError::Refused(words)) = Server::Url("redes://shop:hunter2@host".into()).known() else {
            panic!("no URL of Redis");
        };
        assert!(!words.contains("hunter2"), "{words}");
    }

    #[test]
    fn settings_are_told_from_what_passes() {
        let verdict = |code| BrokerError::from(Trouble::Server { code: String::from(code), words: String::new() });
        for code in ["WRONGTYPE", "WRONGPASS", "NOAUTH", "NOPERM"] {
            assert!(matches!(verdict(code), BrokerError::Refused(_)), "{code}");
        }
        for code in ["LOADING", "READONLY", "MASTERDOWN", "OOM", "MOVED", "CLUSTERDOWN", "TRYAGAIN", "MISCONF", "ERR"] {
            assert!(matches!(verdict(code), BrokerError::Unavailable(_)), "{code}");
        }
    }
}
