//! Calls to endpoints: the address is looked at before it is called, nothing is followed, and nothing large is read.

use std::fmt;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::http::header::{HOST, RETRY_AFTER, USER_AGENT};
use axum::http::{HeaderMap, HeaderValue, Method, Request, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::TokioExecutor;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tower_service::Service;
use url::{Host, Url};

mod answer;
mod guard;
mod post;

pub(crate) use self::answer::{Answer, Meaning};
pub(crate) use self::guard::Guard;
pub use self::post::Tested;
pub(crate) use self::post::{Poster, Posting, posting};
use crate::error::BrokerError;
use crate::sink::escaped;

/// How much of an answer's body is read, and kept: 4 KiB.
pub(crate) const MAX_BODY: usize = 4 << 10;
/// How long an endpoint may take to answer, unless something else is set.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);
/// How long it may take to connect.
const CONNECT: Duration = Duration::from_secs(10);
/// A connection that rested longer is not used again: many servers close theirs after 5 s, and a request that meets
/// the close is lost.
const REST: Duration = Duration::from_secs(4);
/// How long the body of an answer is waited for, once its status is there.
const BODY: Duration = Duration::from_secs(5);

/// How an endpoint is called.
#[derive(Debug, Clone)]
pub(crate) struct Calling {
    pub(crate) guard: Guard,
    pub(crate) timeout: Duration,
    /// Certificates that are trusted beside the public ones, as PEM.
    pub(crate) roots: Vec<Vec<u8>>,
    /// Whether a connection may be used for several calls. One that its server closes meanwhile loses the call.
    pub(crate) reuse: bool,
}

impl Default for Calling {
    fn default() -> Calling {
        Calling { guard: Guard::default(), timeout: TIMEOUT, roots: Vec::new(), reuse: true }
    }
}

/// A URL that can be called.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    client: Client<Limited<HttpsConnector<HttpConnector<Guarded>>>, Full<Bytes>>,
    url: Url,
    uri: Uri,
    timeout: Duration,
    guarded: Guarded,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Nothing of the request has left this machine but what it takes to connect.
    NotSent(String),
    /// It may have arrived.
    Unknown(String),
}

impl Trouble {
    pub(crate) fn words(&self) -> &str {
        let (Trouble::NotSent(words) | Trouble::Unknown(words)) = self;
        words
    }
}

/// Reads a URL that may be called. What is wrong is said without the URL: paths and queries can be secrets.
fn read(url: &str, guard: &Guard) -> Result<Url, String> {
    let url: Url = url.trim().parse().map_err(|e| format!("the URL does not parse: {e}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("the URL begins with `{}:`; only http and https are called", url.scheme()));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("the URL has a user name or a password in it, which would turn up in logs; what proves who is \
                    calling is the signature"
            .into());
    }
    let literal = match url.host() {
        Some(Host::Ipv4(ip)) => Some(IpAddr::V4(ip)),
        Some(Host::Ipv6(ip)) => Some(IpAddr::V6(ip)),
        Some(Host::Domain(_)) => None,
        None => return Err("the URL names no host".into()),
    };
    match literal.map(|ip| guard.permits(ip)) {
        Some(Err(refused)) => Err(refused.to_string()),
        _ => Ok(url),
    }
}

impl Endpoint {
    /// An endpoint at this URL.
    pub(crate) fn new(url: &str, calling: Calling) -> Result<Endpoint, String> {
        Endpoint::resolved_by(url, calling, Arc::new(System))
    }

    fn resolved_by(url: &str, calling: Calling, lookup: Arc<dyn Lookup>) -> Result<Endpoint, String> {
        let url = read(url, &calling.guard)?;
        if calling.timeout.is_zero() {
            return Err("the timeout is zero".into());
        }
        // A URL without what no request has: what begins with a `#`.
        let uri = url.as_str().split('#').next().unwrap_or_default().parse::<Uri>();
        let uri = uri.map_err(|e| format!("the URL cannot be called: {e}"))?;
        let guarded = Guarded { guard: calling.guard, lookup };
        // It asks for the addresses, connects to one of them, and knows of no proxy: that would look up the name itself.
        let mut tcp = HttpConnector::new_with_resolver(guarded.clone());
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        let tls = HttpsConnectorBuilder::new().with_tls_config(tls(&calling.roots)?).https_or_http().enable_http1();
        let connector = Limited { connector: tls.wrap_connector(tcp), limit: CONNECT.min(calling.timeout / 2) };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(hyper_util::rt::TokioTimer::new())
            .pool_idle_timeout(REST)
            .pool_max_idle_per_host(if calling.reuse { usize::MAX } else { 0 })
            .build(connector);
        Ok(Endpoint { client, url, uri, timeout: calling.timeout, guarded })
    }

    /// Scheme, host and port: what can be shown of it.
    pub(crate) fn origin(&self) -> String {
        self.url.origin().ascii_serialization()
    }

    /// Looks up its name, and calls nobody. A name can come to mean something else: that is no reason not to begin.
    pub(crate) async fn look(&self) -> Result<(), BrokerError> {
        let Some(Host::Domain(name)) = self.url.host() else { return Ok(()) };
        let looking = tokio::time::timeout(CONNECT, self.guarded.permitted(name.to_owned()));
        let why = match looking.await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(why)) => why.to_string(),
            Err(_) => format!("no answer within {CONNECT:?}"),
        };
        Err(BrokerError::Unavailable(format!("the name of {} cannot be used: {why}", self.origin())))
    }

    /// How long a call may take.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Posts a body, and reads the answer.
    ///
    /// Cancel safety: dropped, it may have arrived.
    pub(crate) async fn post(&self, headers: HeaderMap, body: Vec<u8>) -> Result<Answer, Trouble> {
        self.call(Method::POST, headers, body).await
    }

    /// Gets it.
    pub(crate) async fn get(&self, headers: HeaderMap) -> Result<Answer, Trouble> {
        self.call(Method::GET, headers, Vec::new()).await
    }

    async fn call(&self, method: Method, mut headers: HeaderMap, body: Vec<u8>) -> Result<Answer, Trouble> {
        let begin = Instant::now();
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("postbox/", env!("CARGO_PKG_VERSION"))));
        headers.remove(HOST);
        let mut request = Request::new(Full::new(Bytes::from(body)));
        (*request.method_mut(), *request.uri_mut(), *request.headers_mut()) = (method, self.uri.clone(), headers);
        let (head, mut incoming) = match tokio::time::timeout(self.timeout, self.client.request(request)).await {
            Ok(Ok(response)) => response.into_parts(),
            Ok(Err(error)) => return Err(self.trouble(&error)),
            Err(_) => {
                let words = format!("{} did not answer within {:?}", self.origin(), self.timeout);
                return Err(Trouble::Unknown(words));
            }
        };
        let mut body = Vec::new();
        // The status is there, whatever becomes of the body.
        let reading = async {
            while body.len() < MAX_BODY {
                let Some(Ok(frame)) = incoming.frame().await else { break };
                let Ok(chunk) = frame.into_data() else { continue };
                body.extend_from_slice(&chunk[..chunk.len().min(MAX_BODY - body.len())]);
            }
        };
        tokio::time::timeout(BODY, reading).await.ok();
        let header = head.headers.get(RETRY_AFTER);
        let retry_after = header.and_then(|value| answer::retry_after(value.as_bytes(), jiff::Timestamp::now()));
        Ok(Answer { status: head.status.as_u16(), retry_after, body, took: begin.elapsed() })
    }

    fn trouble(&self, error: &Error) -> Trouble {
        let (origin, cause) = (self.origin(), innermost(error));
        // The client says so only if no connection came about: no byte of the request has been written.
        if error.is_connect() {
            return Trouble::NotSent(format!("no connection to {origin}: {cause}"));
        }
        Trouble::Unknown(format!("the connection to {origin} was lost before the answer was there: {cause}"))
    }
}

/// The cause at the bottom; what is above it only says what was being done.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// TLS by ring, whatever else the program has; the public certificates, and those that were given.
fn tls(roots: &[Vec<u8>]) -> Result<rustls::ClientConfig, String> {
    let mut store = rustls::RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    for pem in roots {
        let before = store.len();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|e| format!("a root certificate is no PEM: {e}"))?;
            store.add(certificate).map_err(|e| format!("a root certificate cannot be used: {e}"))?;
        }
        if store.len() == before {
            return Err("a root certificate is no PEM: nothing in it begins with `-----BEGIN CERTIFICATE-----`".into());
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider);
    let builder = builder.with_safe_default_protocol_versions().map_err(|e| format!("no TLS: {e}"))?;
    Ok(builder.with_root_certificates(store).with_no_client_auth())
}

/// A header's value from any text: escaped as the HTTP binding of CloudEvents does it.
pub(crate) fn header_value(text: &str) -> HeaderValue {
    // Visible ASCII: nothing else is left.
    HeaderValue::try_from(escaped(text)).unwrap_or(HeaderValue::from_static(""))
}

/// What stands for a name.
type Found = Pin<Box<dyn Future<Output = std::io::Result<Vec<IpAddr>>> + Send>>;

/// Looks up names.
trait Lookup: Send + Sync {
    fn lookup(&self, name: String) -> Found;
}

/// As the system does.
struct System;

impl Lookup for System {
    fn lookup(&self, name: String) -> Found {
        Box::pin(async move { Ok(tokio::net::lookup_host((name, 0)).await?.map(|address| address.ip()).collect()) })
    }
}

/// Gives the client those of a name's addresses that may be called. It connects to one of these, and looks up nothing
/// again.
#[derive(Clone)]
struct Guarded {
    guard: Guard,
    lookup: Arc<dyn Lookup>,
}

impl fmt::Debug for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.guard.fmt(f)
    }
}

impl Guarded {
    async fn permitted(&self, name: String) -> Result<Vec<SocketAddr>, Cause> {
        let (mut permitted, mut refused) = (Vec::new(), None);
        for ip in self.lookup.lookup(name).await? {
            match self.guard.permits(ip) {
                Ok(()) => permitted.push(SocketAddr::new(ip, 0)),
                Err(why) => refused = Some(why),
            }
        }
        match refused {
            Some(why) if permitted.is_empty() => Err(why.into()),
            _ => Ok(permitted),
        }
    }
}

/// What was refused, or went wrong.
type Cause = Box<dyn std::error::Error + Send + Sync>;

impl Service<Name> for Guarded {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = Cause;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Cause>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Cause>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let guarded = self.clone();
        Box::pin(async move { Ok(guarded.permitted(name.as_str().to_owned()).await?.into_iter()) })
    }
}

/// Connects, from the look-up of the name to the end of TLS's handshake, within a time.
#[derive(Debug, Clone)]
struct Limited<C> {
    connector: C,
    limit: Duration,
}

impl<C> Service<Uri> for Limited<C>
where
    C: Service<Uri, Error = Cause>,
    C::Future: Send + 'static,
{
    type Response = C::Response;
    type Error = Cause;
    type Future = Pin<Box<dyn Future<Output = Result<C::Response, Cause>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Cause>> {
        self.connector.poll_ready(context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (connecting, limit) = (self.connector.call(uri), self.limit);
        Box::pin(async move {
            let connected = tokio::time::timeout(limit, connecting).await;
            connected.map_err(|_| format!("none came about within {limit:?}"))?
        })
    }
}

#[cfg(test)]
mod tests;
