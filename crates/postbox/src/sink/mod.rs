//! Sinks: brokers and webhooks that messages go to. A [relay](crate::Router::relay) is a subscription whose
//! handler is a sink.

mod envelope;
#[cfg(feature = "redis")]
mod redis;
mod stdout;
#[cfg(feature = "webhook")]
mod webhook;

use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

#[cfg(feature = "webhook")]
pub(crate) use self::envelope::escaped;
pub use self::envelope::{Encoded, EnvelopeStyle, Target};
#[cfg(feature = "redis")]
pub use self::redis::{RedisSink, redis};
pub use self::stdout::{Stdout, stdout};
#[cfg(feature = "webhook")]
pub use self::webhook::{WebhookSink, webhook_to};
use crate::error::BrokerError;
use crate::handler::Attempt;
use crate::message::Envelope;
use crate::operation::Receipt;
pub use crate::template::TemplateError;

/// A message on its way out; it reads like its [`Envelope`].
#[derive(Debug, Clone)]
pub struct Outgoing {
    envelope: Arc<Envelope>,
    attempt: Attempt,
    answer: OnceLock<Value>,
}

impl Outgoing {
    pub(crate) fn new(envelope: Arc<Envelope>, attempt: Attempt) -> Outgoing {
        Outgoing { envelope, attempt, answer: OnceLock::new() }
    }

    /// Which attempt this is, of which delivery. A message that an operator replays has the id it had, and a
    /// delivery of its own.
    pub fn attempt(&self) -> Attempt {
        self.attempt
    }

    /// The message.
    pub fn envelope(&self) -> &Envelope {
        &self.envelope
    }

    /// What the other side answered when it confirmed the message; anything that serializes to JSON. It is kept as the
    /// receipt of the attempt, if the message counts as sent, and costs a row of its own: without it, many successes
    /// share one. The first word stands; more than 64 KiB are cut.
    pub fn answered(&self, answer: impl Serialize) {
        if let Some(answer) = Receipt::of(answer).content {
            self.answer.set(answer).ok();
        }
    }

    pub(crate) fn into_answer(self) -> Option<Value> {
        self.answer.into_inner()
    }
}

impl Deref for Outgoing {
    type Target = Envelope;

    fn deref(&self) -> &Envelope {
        &self.envelope
    }
}

/// Why a message does not count as sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsent {
    pub(crate) error: String,
    pub(crate) then: Then,
}

/// What becomes of a message that does not count as sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// It is sent again, with the same id.
    Again { after: Option<Duration> },
    /// It is dead.
    Dead,
    /// The subscription is paused, and the message waits.
    Pause,
    /// Nobody was asked: it is handed in again.
    Untried,
}

impl Unsent {
    /// Nobody confirmed it; whether it has arrived may not be known. It is sent again, with the same id, as the
    /// subscription's policy says.
    pub fn again(error: impl fmt::Display) -> Unsent {
        Unsent { error: error.to_string(), then: Then::Again { after: None } }
    }

    /// The same, not before this wait is over.
    pub fn again_after(error: impl fmt::Display, wait: Duration) -> Unsent {
        Unsent { error: error.to_string(), then: Then::Again { after: Some(wait) } }
    }

    /// The other side will never take it (too large, no such subject, a 4xx), in its own words: dead.
    pub fn rejected(error: impl fmt::Display) -> Unsent {
        Unsent { error: error.to_string(), then: Then::Dead }
    }

    /// Nobody was asked, because another of the batch failed, say: it is handed in again after a second, and this
    /// counts as no attempt.
    pub fn not_tried(why: impl fmt::Display) -> Unsent {
        Unsent { error: why.to_string(), then: Then::Untried }
    }

    /// There is nobody any more who would take anything (410 Gone): the relay is paused with these words, and
    /// this message waits with the others.
    pub fn gone(error: impl fmt::Display) -> Unsent {
        Unsent { error: error.to_string(), then: Then::Pause }
    }
}

impl Unsent {
    /// Whether the other side will never take it: it is not sent again.
    pub fn is_final(&self) -> bool {
        self.then == Then::Dead
    }

    /// Whether nobody was asked.
    pub fn is_untried(&self) -> bool {
        self.then == Then::Untried
    }

    /// Why, in the other side's words.
    pub fn error(&self) -> &str {
        &self.error
    }
}

/// What a batch came to: one for each message, in their order.
pub type Sent = Vec<Result<(), Unsent>>;

/// A broker or an endpoint that messages are sent to: [`Router::relay`](crate::Router::relay).
pub trait Sink: Send + Sync + 'static {
    /// Which kind it is, in a word: `redis`.
    fn kind(&self) -> &'static str;
    /// The durable name of its relay unless it is given another: `redis:orders`.
    fn name(&self) -> String;
    /// Looks at the other side when a worker starts. Warnings for the log.
    ///
    /// # Errors
    /// [`BrokerError::Refused`]: settings that are not safe; the worker does not start.
    /// [`BrokerError::Unavailable`] is a warning.
    fn open(&self) -> impl Future<Output = Result<Vec<String>, BrokerError>> + Send;
    /// Sends messages, in their order where they have the same key, and says for each whether the other side has
    /// confirmed it. Called for several batches at once. If it runs longer than the relay's
    /// timeout it is dropped, and none of them counts as sent.
    fn send(&self, batch: &[Outgoing]) -> impl Future<Output = Sent> + Send;
}
