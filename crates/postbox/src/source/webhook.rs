//! Webhooks in: `POST /in/NAME`, signed, and answered when the message is committed.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::{ALLOW, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use axum::routing::post;
use futures_util::StreamExt;
use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use super::{Entry, Format, Mapping, Raw};
use crate::crash;
use crate::error::Error;
use crate::inbox::{Fate, Inbox};
use crate::pattern::MAX_NAME_BYTES;
use crate::planted::planted;
use crate::postbox::Postbox;
use crate::signature::{self, Secret, SignatureError, github, standard, stripe};
use crate::store::Database;

/// The largest body that is taken, unless something else is set: 1 MiB.
const BODY_LIMIT: usize = 1 << 20;
/// How long a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(30);
/// How long the database may take. What it stores after that is recognised when it comes again.
const STORING_TIME: Duration = Duration::from_secs(10);
/// When to come again while nothing is taken, in seconds.
const COME_AGAIN: HeaderValue = HeaderValue::from_static("30");

/// For how long senders try: what Standard Webhooks recommends ends after 75 hours.
const REPLAYED_FOR: Duration = Duration::from_secs(75 * 3600);

/// Headers that prove who is asking. They are never stored.
const SECRETS: [HeaderName; 11] = [
    HeaderName::from_static("authorization"),
    HeaderName::from_static("proxy-authorization"),
    HeaderName::from_static("cookie"),
    HeaderName::from_static(standard::SIGNATURE),
    HeaderName::from_static("svix-signature"),
    HeaderName::from_static(github::SIGNATURE),
    HeaderName::from_static("x-hub-signature"),
    HeaderName::from_static(stripe::SIGNATURE),
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("x-auth-token"),
    HeaderName::from_static("x-gitlab-token"),
];

/// How requests are signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Standard,
    GitHub,
    Stripe,
}

/// A source that is posted to: [`webhook`].
#[derive(Debug, Clone)]
#[must_use = "it takes nothing before its routes are served"]
pub struct Webhook {
    name: String,
    scheme: Option<Scheme>,
    secrets: Vec<Secret>,
    format: Option<Format>,
    body_limit: usize,
    tolerance: Duration,
    /// The first thing that is wrong with what was set.
    wrong: Option<String>,
}

/// Takes webhooks at `/in/NAME`. Say how they are signed: [`standard`](Webhook::standard),
/// [`github`](Webhook::github) or [`stripe`](Webhook::stripe).
///
/// ```no_run
/// # async fn serve(postbox: postbox::Postbox<postbox::Postgres>) -> Result<(), Box<dyn std::error::Error>> {
/// let secret = std::env::var("GITHUB_SECRET")?;
/// let app: axum::Router = postbox::source::webhook("github").github(secret).routes(&postbox).await?;
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:7070").await?;
/// axum::serve(listener, app).await?;
/// # Ok(()) }
/// ```
pub fn webhook(name: impl Into<String>) -> Webhook {
    Webhook {
        name: name.into(),
        scheme: None,
        secrets: Vec::new(),
        format: None,
        body_limit: BODY_LIMIT,
        tolerance: signature::TOLERANCE,
        wrong: None,
    }
}

impl Webhook {
    /// Signed as Standard Webhooks says. Each of the secrets is good: `whsec_` and base64, or any text.
    pub fn standard<T: AsRef<str>>(self, secrets: impl IntoIterator<Item = T>) -> Webhook {
        let secrets = secrets.into_iter().map(|secret| Secret::standard(secret.as_ref()));
        self.signed(Scheme::Standard, secrets.collect())
    }

    /// Signed as GitHub does. Called again, it adds a secret.
    pub fn github(self, secret: impl AsRef<str>) -> Webhook {
        self.signed(Scheme::GitHub, Secret::bytes(secret.as_ref()).map(|secret| vec![secret]))
    }

    /// Signed as Stripe does, with the whole text that Stripe shows as the secret, `whsec_` included. Called again,
    /// it adds a secret.
    pub fn stripe(self, secret: impl AsRef<str>) -> Webhook {
        self.signed(Scheme::Stripe, Secret::bytes(secret.as_ref()).map(|secret| vec![secret]))
    }

    fn signed(mut self, scheme: Scheme, secrets: Result<Vec<Secret>, SignatureError>) -> Webhook {
        if self.scheme.replace(scheme).is_some_and(|other| other != scheme) {
            self.wrong.get_or_insert("two ways of signing are set; an address takes one".into());
        }
        match secrets {
            Ok(secrets) => self.secrets.extend(secrets),
            Err(error) => {
                self.wrong.get_or_insert(error.to_string());
            }
        }
        self
    }

    /// How requests become messages. Without it: CloudEvents and Standard Webhooks as they say themselves; of
    /// GitHub `github.EVENT.ACTION`, by delivery, with the repository as the key, or else the organization; of Stripe
    /// `stripe.TYPE`, by event.
    pub fn format(mut self, format: Format) -> Webhook {
        self.format = Some(format);
        self
    }

    /// The largest body that is taken, in bytes. Default 1 MiB. A message's payload has a limit of its own
    /// (`max_payload_bytes`).
    pub fn body_limit(mut self, bytes: usize) -> Webhook {
        self.body_limit = bytes;
        self
    }

    /// How far a signed time may be from this machine's clock, either way. Default 300 s. GitHub signs none.
    pub fn tolerance(mut self, tolerance: Duration) -> Webhook {
        self.tolerance = tolerance;
        self
    }

    /// The routes, to be served or merged into those of your own application: `POST /in/NAME`.
    ///
    /// # Errors
    /// [`Error::Settings`]: what is wrong with it; or the database did not answer.
    pub async fn routes<Db: Database>(self, postbox: &Postbox<Db>) -> Result<axum::Router, Error> {
        let name = self.name.clone();
        let wrong = |why: String| Error::Settings(format!("the webhook `{}`: {why}", name.escape_debug()));
        let scheme = self.checked().map_err(wrong)?;
        if scheme == Scheme::Standard && self.secrets.iter().any(Secret::is_short) {
            tracing::warn!(source = name, "a secret is shorter than 24 bytes: it can be guessed");
        }
        let remembered = postbox.settings().keep_ids()?;
        if remembered < REPLAYED_FOR {
            return Err(wrong(format!(
                "senders try for up to 75 hours, and ids are remembered for {} hours only: set `keep_ids` to more than that",
                remembered.as_secs() / 3600
            )));
        }
        let usual = self.format.is_none();
        let format = self.format.unwrap_or_else(|| usual_format(scheme));
        let inbox = postbox.inbox(&self.name, "webhook", format).await?;
        let path = format!("/in/{}", self.name);
        let door = Door {
            name: self.name,
            scheme,
            secrets: self.secrets,
            body_limit: self.body_limit,
            tolerance: self.tolerance,
            usual,
            inbox,
        };
        let methods = post(take::<Db>).fallback(another_method);
        Ok(axum::Router::new().route(&path, methods).with_state(Arc::new(door)))
    }

    fn checked(&self) -> Result<Scheme, String> {
        if let Some(wrong) = &self.wrong {
            return Err(wrong.clone());
        }
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '~');
        if self.name.is_empty() || self.name.len() > MAX_NAME_BYTES || !self.name.chars().all(fits) {
            return Err("the name is a part of the address: 1 to 255 letters, digits and `-_.~`".into());
        }
        let scheme = self.scheme.ok_or("nothing says how requests are signed: standard, github or stripe")?;
        if self.secrets.is_empty() {
            return Err("it has no secret".into());
        }
        Ok(scheme)
    }
}

/// What a scheme's senders send.
fn usual_format(scheme: Scheme) -> Format {
    match scheme {
        Scheme::Standard => Format::default(),
        Scheme::GitHub => Format::mapped(
            Mapping::new()
                .topic("github.{header:x-github-event}.{payload:action}")
                .id("{header:x-github-delivery}")
                .key("{payload:repository.full_name|payload:organization.login}"),
        ),
        Scheme::Stripe => {
            Format::mapped(Mapping::new().topic("stripe.{payload:type}").id("{payload:id}").time("{payload:created}"))
        }
    }
}

/// Behind an address.
struct Door<Db: Database> {
    name: String,
    scheme: Scheme,
    secrets: Vec<Secret>,
    body_limit: usize,
    tolerance: Duration,
    /// Nobody has said how requests become messages.
    usual: bool,
    inbox: Inbox<Db>,
}

/// What is answered, as JSON.
#[derive(Debug, Default, Serialize)]
struct Said {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<Uuid>,
    #[serde(skip_serializing_if = "Option::is_none")]
    quarantine: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

fn answer(code: StatusCode, said: &Said) -> Response {
    let body = serde_json::to_string(said).unwrap_or_default();
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn refused(code: StatusCode, reason: impl Into<String>) -> Response {
    answer(code, &Said { status: "refused", reason: Some(reason.into()), ..Said::default() })
}

fn not_now(reason: impl Into<String>) -> Response {
    let said = Said { status: "unavailable", reason: Some(reason.into()), ..Said::default() };
    let mut response = answer(StatusCode::SERVICE_UNAVAILABLE, &said);
    response.headers_mut().insert(RETRY_AFTER, COME_AGAIN);
    response
}

async fn another_method() -> Response {
    let mut response = refused(StatusCode::METHOD_NOT_ALLOWED, "only POST is taken here");
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
    response
}

/// One request. What proves itself is stored, whether it can be understood or not; nothing else leaves a trace.
async fn take<Db: Database>(State(door): State<Arc<Door<Db>>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let declared = head.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|bytes| bytes > door.body_limit as u64) {
        return too_large(door.body_limit);
    }
    let body = match tokio::time::timeout(BODY_TIME, read(body, door.body_limit)).await {
        Ok(Ok(body)) => body,
        Ok(Err(response)) => return response,
        Err(_) => return refused(StatusCode::REQUEST_TIMEOUT, "the body did not arrive within 30 s"),
    };
    if let Err(error) = door.verify(&head.headers, &body, Timestamp::now()) {
        tracing::warn!(source = door.name, %error, "a webhook was refused");
        return refused(StatusCode::UNAUTHORIZED, error.to_string());
    }
    let content_type = head.headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    if door.scheme == Scheme::GitHub && content_type.starts_with(b"application/x-www-form-urlencoded") {
        let reason = "the body is a form; set the webhook's content type to application/json";
        return refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, reason);
    }
    if let Some(reason) = door.inbox.closed() {
        return not_now(reason);
    }
    let entry = door.entry(&head.headers, body);
    // A caller that hangs up does not end it half-way; one that waits is told before it gives up.
    let receiving = tokio::spawn({
        let door = door.clone();
        async move {
            crash::point("read");
            let fates = door.inbox.receive(&[entry]).await;
            crash::point("received");
            fates
        }
    });
    if planted!("answer-first") {
        return told(Fate::Received(Uuid::nil()));
    }
    match tokio::time::timeout(STORING_TIME, receiving).await {
        Ok(Ok(Ok(fates))) => fates.into_iter().next().map_or_else(|| broken("no fate"), told),
        Ok(Ok(Err(error))) if error.is_transient() => {
            tracing::warn!(source = door.name, %error, "a webhook could not be stored");
            not_now("the database does not take it now")
        }
        Ok(Ok(Err(error))) => broken(error),
        Ok(Err(error)) => broken(error),
        Err(_) => not_now("the database takes too long"),
    }
}

fn told(fate: Fate) -> Response {
    match fate {
        Fate::Received(id) => answer(StatusCode::OK, &Said { status: "received", id: Some(id), ..Said::default() }),
        Fate::Duplicate(id) => answer(StatusCode::OK, &Said { status: "duplicate", id: Some(id), ..Said::default() }),
        // Stored, and nothing follows from it before somebody has looked: sending again would not help.
        Fate::Conflict { existing, quarantine } => {
            let reason = Some("another message with this id, and another body, is there already".into());
            let said = Said { status: "conflict", id: Some(existing), quarantine: Some(quarantine), reason };
            answer(StatusCode::ACCEPTED, &said)
        }
        Fate::Quarantined { quarantine, reason } => {
            let said = Said { status: "quarantined", quarantine: Some(quarantine), reason: Some(reason), id: None };
            answer(StatusCode::ACCEPTED, &said)
        }
    }
}

/// Not the sender's fault, and not told to it.
fn broken(error: impl std::fmt::Display) -> Response {
    tracing::error!(%error, "a webhook could not be stored");
    let said = Said { status: "failed", reason: Some("it could not be stored".into()), ..Said::default() };
    answer(StatusCode::INTERNAL_SERVER_ERROR, &said)
}

fn too_large(limit: usize) -> Response {
    refused(StatusCode::PAYLOAD_TOO_LARGE, format!("the body is larger than {limit} bytes"))
}

async fn read(body: Body, limit: usize) -> Result<Vec<u8>, Response> {
    let (mut bytes, mut chunks) = (Vec::new(), body.into_data_stream());
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|_| refused(StatusCode::BAD_REQUEST, "the body broke off"))?;
        if bytes.len() + chunk.len() > limit {
            return Err(too_large(limit));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// The one header of this name.
fn one<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<&'a str, SignatureError> {
    let mut all = headers.get_all(name).iter();
    match (all.next().map(HeaderValue::to_str), all.next()) {
        (Some(Ok(value)), None) if !value.is_empty() => Ok(value),
        (Some(Err(_)), None) => Err(SignatureError::Malformed { header: name, why: "it is no ASCII" }),
        _ => Err(SignatureError::Missing(name)),
    }
}

impl<Db: Database> Door<Db> {
    fn verify(&self, headers: &HeaderMap, body: &[u8], now: Timestamp) -> Result<(), SignatureError> {
        let secrets = &self.secrets;
        match self.scheme {
            Scheme::Standard => {
                let (id, time) = (one(headers, standard::ID)?, one(headers, standard::TIMESTAMP)?);
                let signature = one(headers, standard::SIGNATURE)?;
                standard::verify(secrets, id, time, signature, body, now, self.tolerance)
            }
            Scheme::GitHub => github::verify(secrets, one(headers, github::SIGNATURE)?, body),
            Scheme::Stripe => stripe::verify(secrets, one(headers, stripe::SIGNATURE)?, body, now, self.tolerance),
        }
    }

    fn entry(&self, headers: &HeaderMap, body: Vec<u8>) -> Entry {
        let delivery = match self.scheme {
            Scheme::Standard => one(headers, standard::ID).ok(),
            Scheme::GitHub => one(headers, github::ID).ok(),
            Scheme::Stripe => None,
        };
        let position = delivery.filter(|id| id.len() <= MAX_NAME_BYTES).map(str::to_owned);
        let position = position.unwrap_or_else(|| Uuid::now_v7().to_string());
        // Headers are not signed. Those that would say themselves what message this is, and no specification knows,
        // are left out.
        let forged = |name: &HeaderName| self.usual && matches!(name.as_str(), "event_id" | "event_type");
        let kept = headers.iter().filter(|(name, _)| !SECRETS.contains(name) && !forged(name));
        let fields = kept.map(|(name, value)| (name.as_str().into(), value.as_bytes().into())).collect();
        Entry { position, raw: Raw { fields, body: Some(body) }, deliveries: 1 }
    }
}
