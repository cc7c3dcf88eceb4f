//! How a message is posted: signed over the exact bytes, with its id and what it belongs to in the headers.

use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use jiff::Timestamp;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{Answer, Calling, Endpoint, Meaning, Trouble, header_value};
use crate::content::Content;
use crate::message::Envelope;
use crate::signature::{Secret, standard};
use crate::sink::{Encoded, EnvelopeStyle};

/// What everything in one business process shares, whatever the envelope is.
const CORRELATION: HeaderName = HeaderName::from_static("x-correlation-id");
/// The message that caused this one.
const CAUSATION: HeaderName = HeaderName::from_static("x-causation-id");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Where messages are posted, and how, as it was set: not looked at yet.
#[derive(Debug, Clone)]
pub(crate) struct Posting {
    pub(crate) url: String,
    pub(crate) secrets: Vec<Secret>,
    pub(crate) style: EnvelopeStyle,
    pub(crate) source: Option<String>,
    pub(crate) calling: Calling,
    /// Whether the answer to a message that was taken is kept.
    pub(crate) keeps: bool,
    /// The first thing that is wrong with what was set.
    pub(crate) wrong: Option<String>,
}

impl Posting {
    pub(crate) fn to(url: String) -> Posting {
        let (secrets, style, source) = (Vec::new(), EnvelopeStyle::default(), None);
        Posting { url, secrets, style, source, calling: Calling::default(), keeps: true, wrong: None }
    }

    /// Adds a secret.
    pub(crate) fn secret(&mut self, text: &str) {
        match Secret::standard(text) {
            Ok(secret) => self.secrets.push(secret),
            Err(error) => {
                self.wrong.get_or_insert(error.to_string());
            }
        }
    }

    /// Adds a network that may be called.
    pub(crate) fn allow(&mut self, network: &str) {
        if let Err(error) = self.calling.guard.allow(network) {
            self.wrong.get_or_insert(error);
        }
    }

    /// Ready to post; or what is wrong, in words without secrets.
    pub(crate) fn ready(&self) -> Result<Poster, String> {
        if let Some(wrong) = &self.wrong {
            return Err(wrong.clone());
        }
        let endpoint = Endpoint::new(&self.url, self.calling.clone())?;
        let (secrets, source) = (self.secrets.clone(), self.source.clone());
        Ok(Poster { endpoint, secrets, style: self.style, source, keeps: self.keeps })
    }

    /// The host, for a name; nothing if the URL is none.
    pub(crate) fn host(&self) -> String {
        let url = self.url.trim().parse::<url::Url>().ok();
        let host = url.as_ref().and_then(|url| Some((url.host_str()?, url.port())));
        match host {
            Some((host, Some(port))) => format!("{host}:{port}"),
            Some((host, None)) => host.to_owned(),
            None => String::new(),
        }
    }
}

/// The options that a webhook sink and a push have in common.
macro_rules! posting {
    () => {
        /// Signs with this secret: `whsec_` and base64, or any text. Several, if it is called several times: each
        /// message is signed with all of them, so that a receiver may change from one to the next.
        pub fn secret(mut self, secret: impl AsRef<str>) -> Self {
            self.posting.secret(secret.as_ref());
            self
        }

        /// How a message is dressed. Default: a CloudEvent in binary mode.
        pub fn envelope(mut self, style: $crate::sink::EnvelopeStyle) -> Self {
            self.posting.style = style;
            self
        }

        /// The `source` of the CloudEvents that do not say theirs. Default `postbox`.
        pub fn source(mut self, source: impl Into<String>) -> Self {
            self.posting.source = Some(source.into());
            self
        }

        /// Whether what is answered when a message is taken is kept with the attempt, where there is a body: the status,
        /// and up to 4 KiB. Default: it is. Without it, a message that is taken at once needs no row of its own. What
        /// is answered otherwise is kept in any case, and so is an operation's receipt.
        pub fn keep_responses(mut self, keeps: bool) -> Self {
            self.posting.keeps = keeps;
            self
        }

        /// How long one call may take, from the look-up of the name to the answer. Default 20 s; 15 to 30 s is
        /// what receivers expect.
        pub fn timeout(mut self, timeout: std::time::Duration) -> Self {
            self.posting.calling.timeout = timeout;
            self
        }

        /// Addresses of this network may be called, whatever they are: `10.0.0.0/8`, `127.0.0.1`.
        pub fn allow(mut self, network: impl AsRef<str>) -> Self {
            self.posting.allow(network.as_ref());
            self
        }

        /// Trusts these certificates (PEM), too. Without it, those that browsers trust.
        pub fn root_certificate(mut self, pem: impl Into<Vec<u8>>) -> Self {
            self.posting.calling.roots.push(pem.into());
            self
        }
    };
}
pub(crate) use posting;

/// Posts messages to an endpoint.
#[derive(Debug, Clone)]
pub(crate) struct Poster {
    pub(crate) endpoint: Endpoint,
    secrets: Vec<Secret>,
    style: EnvelopeStyle,
    source: Option<String>,
    keeps: bool,
}

impl Poster {
    /// What is kept of an answer, if the message was taken.
    pub(crate) fn kept(&self, answer: &Answer) -> Option<serde_json::Value> {
        let kept = self.keeps && answer.meaning() == Meaning::Done && !answer.body.is_empty();
        kept.then(|| answer.receipt())
    }

    /// Posts a message once. Its id is the same whenever that is done again; the time is that of this attempt.
    pub(crate) async fn post(&self, message: &Envelope, more: HeaderMap) -> Result<Answer, Trouble> {
        let (mut headers, body) = self.dressed(message);
        headers.extend(more);
        self.sign(&mut headers, message.id, &body, Timestamp::now());
        self.endpoint.post(headers, body).await
    }

    /// Asks with a signed request that has no body.
    pub(crate) async fn ask(&self, message: Uuid, mut headers: HeaderMap) -> Result<Answer, Trouble> {
        self.sign(&mut headers, message, &[], Timestamp::now());
        self.endpoint.get(headers).await
    }

    fn sign(&self, headers: &mut HeaderMap, id: Uuid, body: &[u8], now: Timestamp) {
        let id = id.to_string();
        if !self.secrets.is_empty() {
            let signature = standard::sign(&self.secrets, &id, now, body);
            // Base64, commas and spaces: always a header.
            if let Ok(mut signature) = HeaderValue::try_from(signature) {
                signature.set_sensitive(true);
                headers.insert(standard::SIGNATURE, signature);
            }
        }
        headers.insert(standard::ID, header_value(&id));
        headers.insert(standard::TIMESTAMP, HeaderValue::from(now.as_second()));
    }

    /// Its headers and its body.
    fn dressed(&self, message: &Envelope) -> (HeaderMap, Vec<u8>) {
        let encoded = Encoded::new(message, self.style, self.source.as_deref());
        let mut headers = HeaderMap::new();
        for (name, value) in encoded.http_headers() {
            // A header of the message may have a name or a value that HTTP does not take.
            if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                headers.insert(name, value);
            }
        }
        let belongs = [
            (TRACEPARENT, message.traceparent()),
            (CORRELATION, Some(&*message.correlation())),
            (CAUSATION, message.causation_id.as_deref()),
        ]
        .map(|(name, value)| Some((name, header_value(value?))));
        headers.extend(belongs.into_iter().flatten());
        (headers, encoded.body)
    }

    /// What an operator should know about it.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let origin = self.endpoint.origin();
        let mut warnings = Vec::new();
        if self.secrets.is_empty() {
            warnings.push(format!("what is sent to {origin} is not signed: give it a secret"));
        }
        if self.secrets.iter().any(Secret::is_short) {
            warnings.push(format!("a secret for {origin} is shorter than 24 bytes: it can be guessed"));
        }
        if origin.starts_with("http:") {
            warnings.push(format!("what is sent to {origin} can be read on the way: https is not"));
        }
        warnings
    }

    /// Posts one message of the topic `postbox.test`.
    pub(crate) async fn test(&self) -> Tested {
        let now = Timestamp::now();
        let message = Envelope {
            id: Uuid::now_v7(),
            topic: "postbox.test".into(),
            key: None,
            payload: Content::Json(RawValue::NULL.to_owned().into()),
            headers: Default::default(),
            occurred_at: now,
            received_at: now,
            source: None,
            external_id: None,
            correlation_id: None,
            causation_id: None,
            max_attempts: None,
        };
        let begin = Instant::now();
        let answer = self.post(&message, HeaderMap::new()).await;
        let took = begin.elapsed();
        match answer {
            Ok(answer) => {
                let words = answer.words(&self.endpoint.origin());
                let (status, body) = (Some(answer.status), answer.text());
                Tested { id: message.id, status, took, body, words, taken: answer.meaning() == Meaning::Done }
            }
            Err(trouble) => Tested {
                id: message.id,
                status: None,
                took,
                body: String::new(),
                words: trouble.words().to_owned(),
                taken: false,
            },
        }
    }
}

/// How a test of an endpoint went.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Tested {
    /// The id that was sent.
    pub id: Uuid,
    /// What was answered, if anything was.
    pub status: Option<u16>,
    /// From the beginning to the end of the answer.
    pub took: Duration,
    /// The beginning of the answer's body: 4 KiB at most.
    pub body: String,
    /// All of it in words.
    pub words: String,
    /// The endpoint has taken it: a 2xx.
    pub taken: bool,
}
