//! Irreversible operations: their verdicts, receipts and reconcile hooks.

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::context::Context;
use crate::error::PublishError;
use crate::handler::{Discarded, NotDone, Permanent, RetryAfter, Snoozed, words};
use crate::message::{Draft, IntoDraft};
use crate::planted::planted;

/// What the remote answered, kept with the outcome, and the messages that follow from it.
#[derive(Debug, Default)]
#[must_use = "return the receipt, so that it is put on record"]
pub struct Receipt {
    pub(crate) content: Option<Value>,
    pub(crate) follow_ups: FollowUps,
}

impl Receipt {
    /// Done, and the remote said nothing worth keeping.
    pub fn none() -> Receipt {
        Receipt::default()
    }

    /// What the remote answered; anything that serializes to JSON.
    pub fn of(content: impl Serialize) -> Receipt {
        let content = serde_json::to_value(content)
            .unwrap_or_else(|e| Value::String(format!("(a receipt that does not serialize: {e})")));
        Receipt { content: Some(content), follow_ups: FollowUps::default() }
    }

    /// Publishes a message in the transaction that records the success.
    pub fn then(mut self, message: impl IntoDraft) -> Receipt {
        self.follow_ups.push(message);
        self
    }

    /// What the remote answered.
    pub fn content(&self) -> Option<&Value> {
        self.content.as_ref()
    }
}

/// A plain handler's success with messages that commit with its outcome.
#[derive(Debug, Default)]
#[must_use = "return it, so that the messages are published"]
pub struct Done {
    pub(crate) follow_ups: FollowUps,
    /// What the other side answered, if it is to be kept. Not for what runs in a transaction.
    pub(crate) receipt: Option<Value>,
}

impl Done {
    /// Done.
    pub fn new() -> Done {
        Done::default()
    }

    /// Publishes a message in the transaction that records the success.
    pub fn then(mut self, message: impl IntoDraft) -> Done {
        self.follow_ups.push(message);
        self
    }
}

/// Messages that commit with an outcome; the first that cannot be published is kept as an error.
#[derive(Debug, Default)]
pub struct FollowUps {
    drafts: Vec<Draft>,
    wrong: Option<PublishError>,
}

impl FollowUps {
    /// None.
    pub fn none() -> FollowUps {
        FollowUps::default()
    }

    /// Adds one.
    pub fn push(&mut self, message: impl IntoDraft) {
        match message.into_draft().map(crate::context::inherit) {
            Ok(draft) => self.drafts.push(draft),
            Err(error) => {
                self.wrong.get_or_insert(error);
            }
        }
    }

    /// Adds one.
    pub fn and(mut self, message: impl IntoDraft) -> FollowUps {
        self.push(message);
        self
    }

    pub(crate) fn append(&mut self, other: FollowUps) {
        self.drafts.extend(other.drafts);
        if self.wrong.is_none() {
            self.wrong = other.wrong;
        }
    }

    /// As what this message causes, where a draft does not say otherwise.
    pub(crate) fn caused_by(mut self, cause: &Context) -> FollowUps {
        self.drafts = self.drafts.into_iter().map(|draft| cause.fill(draft)).collect();
        self
    }

    /// The drafts, checked.
    pub(crate) fn checked(self, max_payload_bytes: usize) -> Result<Vec<Draft>, PublishError> {
        match self.wrong {
            Some(error) => Err(error),
            None => self.drafts.into_iter().map(|d| d.checked(max_payload_bytes)).collect(),
        }
    }
}

/// How an operation's attempt did not succeed. `?` on any error gives *in doubt*: the call may have
/// been sent, and nobody saw the end.
#[derive(Debug)]
pub enum OperationFailure {
    /// It may have happened.
    InDoubt {
        /// Why that is not known.
        error: String,
    },
    /// Nothing irreversible was sent: safe to try again. See [`ResultExt::not_done`](crate::ResultExt::not_done).
    NotDone {
        /// Why.
        error: String,
        /// The wait, if the backoff is not wanted.
        retry_after: Option<Duration>,
    },
    /// The remote refused for good: it did not happen, and trying again would not help.
    Refused {
        /// Its words.
        error: String,
    },
    /// Nothing irreversible was sent, and it is not wanted (any more): cancelled.
    Discarded {
        /// Why.
        reason: String,
    },
}

impl OperationFailure {
    /// It may have happened.
    pub fn in_doubt(error: impl std::fmt::Display) -> Self {
        OperationFailure::InDoubt { error: error.to_string() }
    }

    /// Nothing irreversible was sent.
    pub fn not_done(error: impl std::fmt::Display) -> Self {
        OperationFailure::NotDone { error: error.to_string(), retry_after: None }
    }

    /// The remote refused for good.
    pub fn refused(error: impl std::fmt::Display) -> Self {
        OperationFailure::Refused { error: error.to_string() }
    }

    /// Nothing irreversible was sent, and it is not wanted (any more): cancelled, and no dead letter.
    pub fn discard(reason: impl std::fmt::Display) -> Self {
        OperationFailure::Discarded { reason: reason.to_string() }
    }
}

impl From<Snoozed> for OperationFailure {
    /// The attempt is on record: it counts.
    fn from(Snoozed(error, wait): Snoozed) -> Self {
        OperationFailure::NotDone { error, retry_after: Some(wait) }
    }
}

impl From<Discarded> for OperationFailure {
    fn from(Discarded(reason): Discarded) -> Self {
        OperationFailure::Discarded { reason }
    }
}

impl<E: std::error::Error> From<E> for OperationFailure {
    fn from(error: E) -> Self {
        OperationFailure::InDoubt { error: words(&error) }
    }
}

impl From<NotDone> for OperationFailure {
    fn from(NotDone(error): NotDone) -> Self {
        OperationFailure::NotDone { error, retry_after: None }
    }
}

impl From<RetryAfter> for OperationFailure {
    /// A remote that asks to come back later has not done it.
    fn from(RetryAfter(error, wait): RetryAfter) -> Self {
        OperationFailure::NotDone { error, retry_after: Some(wait) }
    }
}

impl From<Permanent> for OperationFailure {
    fn from(Permanent(error): Permanent) -> Self {
        OperationFailure::Refused { error }
    }
}

/// What a reconcile hook found at the remote.
#[derive(Debug)]
pub enum Reconciled {
    /// The effect is there.
    Done(Receipt),
    /// The effect is not there, and the remote's answer is authoritative: it will not turn up later.
    NotDone,
    /// The remote cannot tell. The delivery stays in doubt and is asked about again.
    Unknown,
}

/// What stands between a worker and an irreversible effect: an attempt that is on record.
#[derive(Debug, Clone)]
pub struct Operation {
    pub(crate) key: String,
    pub(crate) attempt: u32,
}

impl Operation {
    /// As the handler of this attempt is given it.
    pub(crate) fn of(message: uuid::Uuid, delivery: i64, attempt: u32) -> Operation {
        let mut key = idempotency_key(message, delivery);
        if planted!("key-per-attempt") {
            key = format!("{key}-{attempt}");
        }
        Operation { key, attempt }
    }

    /// The key to send along with the call: the same for every attempt at this delivery, and for
    /// no other.
    pub fn idempotency_key(&self) -> &str {
        &self.key
    }

    /// Which attempt this is, from 1.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }
}

/// The idempotency key of a delivery.
pub(crate) fn idempotency_key(message: uuid::Uuid, delivery: i64) -> String {
    format!("{}-{delivery}", message.simple())
}
