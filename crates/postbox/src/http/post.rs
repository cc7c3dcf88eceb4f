//! How a message is posted: signed over the exact bytes, with its id and what it belongs to in the headers.

use std::time::Duration;

use jiff::Timestamp;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use uuid::Uuid;

use super::{Answer, Calling, Endpoint, Trouble, header_value};
use crate::content::Content;
use crate::message::Envelope;
use crate::signature::{Secret, standard};
use crate::sink::EnvelopeStyle;

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
    pub(crate) calling: Calling,
    /// The first thing that is wrong with what was set.
    pub(crate) wrong: Option<String>,
}

impl Posting {
    pub(crate) fn to(url: String) -> Posting {
        let (secrets, style) = (Vec::new(), EnvelopeStyle::default());
        Posting { url, secrets, style, calling: Calling::default(), wrong: None }
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
        Ok(Poster { endpoint, secrets: self.secrets.clone(), style: self.style })
    }

    /// The host, for a name; nothing if the URL is none.
    pub(crate) fn host(&self) -> String {
        let url = self.url.trim().parse::<reqwest::Url>().ok();
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
        #[must_use]
        pub fn secret(mut self, secret: impl AsRef<str>) -> Self {
            self.posting.secret(secret.as_ref());
            self
        }

        /// How a message is dressed. Default: a CloudEvent in binary mode.
        #[must_use]
        pub fn envelope(mut self, style: $crate::sink::EnvelopeStyle) -> Self {
            self.posting.style = style;
            self
        }

        /// How long one call may take, from the look-up of the name to the answer. Default 20 s; 15 to 30 s is
        /// what receivers expect.
        #[must_use]
        pub fn timeout(mut self, timeout: std::time::Duration) -> Self {
            self.posting.calling.timeout = timeout;
            self
        }

        /// Addresses of this network may be called, whatever they are: `10.0.0.0/8`, `127.0.0.1`.
        #[must_use]
        pub fn allow(mut self, network: impl AsRef<str>) -> Self {
            self.posting.allow(network.as_ref());
            self
        }

        /// Trusts these certificates (PEM), too. Without it, those that browsers trust.
        #[must_use]
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
}

impl Poster {
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
            let mut signature = header_value(&standard::sign(&self.secrets, &id, now, body));
            signature.set_sensitive(true);
            headers.insert(standard::SIGNATURE, signature);
        }
        headers.insert(standard::ID, header_value(&id));
        headers.insert(standard::TIMESTAMP, HeaderValue::from(now.as_second()));
    }

    /// Its headers and its body.
    fn dressed(&self, message: &Envelope) -> (HeaderMap, Vec<u8>) {
        let mut headers = HeaderMap::new();
        headers.insert(CORRELATION, header_value(&message.correlation()));
        if let Some(id) = &message.causation_id {
            headers.insert(CAUSATION, header_value(id));
        }
        if let Some(traceparent) = message.traceparent() {
            headers.insert(TRACEPARENT, header_value(traceparent));
        }
        todo!()
    }

    pub(crate) fn is_signed(&self) -> bool {
        !self.secrets.is_empty()
    }
}
