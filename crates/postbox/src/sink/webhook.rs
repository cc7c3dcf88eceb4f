//! Webhooks out: each message is posted to an endpoint, signed as Standard Webhooks says.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::http::HeaderMap;
use futures_util::future::join_all;
use tokio::sync::Semaphore;

use super::{Outgoing, Sent, Sink, Unsent};
use crate::error::BrokerError;
use crate::http::{Answer, Meaning, Poster, Posting, Tested, Trouble, posting};

/// How many requests run at once, unless something else is set.
const AT_ONCE: usize = 8;

/// An endpoint that messages are posted to: [`webhook_to`].
#[derive(Debug, Clone)]
#[must_use = "it sends nothing before it stands behind a relay"]
pub struct WebhookSink {
    posting: Posting,
    permits: Arc<Semaphore>,
    poster: OnceLock<Result<Poster, String>>,
}

/// Posts to an endpoint: `Router::relay("orders.*", webhook_to("https://example.org/hooks").secret("whsec_…"))`.
///
/// Only addresses of the public internet are called, whatever the name resolves to, unless others are allowed
/// ([`allow`](WebhookSink::allow)). Nothing is redirected. See `docs/webhooks.md`.
pub fn webhook_to(url: impl Into<String>) -> WebhookSink {
    WebhookSink {
        posting: Posting::to(url.into()),
        permits: Arc::new(Semaphore::new(AT_ONCE)),
        poster: OnceLock::new(),
    }
}

impl WebhookSink {
    posting!();

    /// One's own addresses may be called, too: loopback, private, shared (CGNAT) and unique local ones. Not
    /// link-local ones, nor the metadata services of clouds: for these there is [`allow`](Self::allow).
    pub fn allow_private_addresses(mut self) -> Self {
        self.posting.calling.guard.allow_own();
        self
    }

    /// How many requests run at once, in this process. Default 8; zero counts as one.
    pub fn at_once(mut self, requests: usize) -> Self {
        self.permits = Arc::new(Semaphore::new(requests.clamp(1, Semaphore::MAX_PERMITS)));
        self
    }

    /// Sends one message of the topic `postbox.test`, and says how it went.
    ///
    /// # Errors
    /// [`BrokerError::Refused`]: what was set cannot be used.
    pub async fn test(&self) -> Result<Tested, BrokerError> {
        let poster = self.poster().map_err(|why| BrokerError::Refused(why.to_owned()))?;
        Ok(poster.test().await)
    }

    fn poster(&self) -> Result<&Poster, &str> {
        self.poster.get_or_init(|| self.posting.ready()).as_ref().map_err(String::as_str)
    }

    /// Messages of a key one after the other; what they came to, with their places in the batch.
    async fn in_order(
        &self,
        poster: &Poster,
        chain: Vec<(usize, &Outgoing)>,
        until: Instant,
    ) -> Vec<(usize, Result<(), Unsent>)> {
        let mut fates = Vec::with_capacity(chain.len());
        let mut stopped = None;
        for (place, message) in chain {
            let fate = match stopped {
                Some(why) => Err(Unsent::not_tried(why)),
                None => self.send_one(poster, message, until).await,
            };
            if fate.is_err() {
                stopped.get_or_insert("not sent: the one before it, of the same key, was not taken");
            }
            fates.push((place, fate));
        }
        fates
    }

    async fn send_one(&self, poster: &Poster, message: &Outgoing, until: Instant) -> Result<(), Unsent> {
        let late = || Unsent::not_tried("not sent: those before it took too long");
        let left = until.saturating_duration_since(Instant::now());
        let permit = tokio::time::timeout(left, self.permits.acquire()).await;
        let Ok(Ok(_permit)) = permit else { return Err(late()) };
        if until <= Instant::now() {
            return Err(late());
        }
        let answer = poster.post(message, HeaderMap::new()).await;
        if let Some(kept) = answer.as_ref().ok().and_then(|answer| poster.kept(answer)) {
            message.answered(kept);
        }
        judged(answer, &poster.endpoint.origin())
    }
}

/// What becomes of a message.
fn judged(answer: Result<Answer, Trouble>, origin: &str) -> Result<(), Unsent> {
    let answer = answer.map_err(|trouble| Unsent::again(trouble.words()))?;
    let words = || answer.words(origin);
    match (answer.meaning(), answer.wait()) {
        (Meaning::Done, _) => Ok(()),
        (Meaning::Gone, _) => Err(Unsent::gone(words())),
        (Meaning::Refused, _) => Err(Unsent::rejected(words())),
        (Meaning::NotNow | Meaning::Failed, Some(wait)) => Err(Unsent::again_after(words(), wait)),
        (Meaning::NotNow | Meaning::Failed, None) => Err(Unsent::again(words())),
    }
}

impl Sink for WebhookSink {
    fn kind(&self) -> &'static str {
        "webhook"
    }

    fn name(&self) -> String {
        format!("webhook:{}", self.posting.host())
    }

    async fn open(&self) -> Result<Vec<String>, BrokerError> {
        let poster = self.poster().map_err(|why| BrokerError::Refused(why.to_owned()))?;
        poster.endpoint.look().await?;
        Ok(poster.warnings())
    }

    async fn send(&self, batch: &[Outgoing]) -> Sent {
        let poster = match self.poster() {
            Ok(poster) => poster,
            Err(why) => return batch.iter().map(|_| Err(Unsent::again(why))).collect(),
        };
        // Nothing is begun that could end after two timeouts: whoever waits for the batch has one, too.
        let until = Instant::now() + poster.endpoint.timeout();
        let (mut chains, mut of_key) = (Vec::<Vec<(usize, &Outgoing)>>::new(), HashMap::<&str, usize>::new());
        for (place, message) in batch.iter().enumerate() {
            let alone = chains.len();
            let chain = message.key.as_deref().map_or(alone, |key| *of_key.entry(key).or_insert(alone));
            if chain == alone {
                chains.push(Vec::new());
            }
            chains[chain].push((place, message));
        }
        let sending = chains.into_iter().map(|chain| self.in_order(poster, chain, until));
        let mut fates: Vec<_> = join_all(sending).await.into_iter().flatten().collect();
        fates.sort_by_key(|(place, _)| *place);
        fates.into_iter().map(|(_, fate)| fate).collect()
    }
}

#[cfg(test)]
mod tests;
