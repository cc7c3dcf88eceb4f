//! What operators do about keys in order that wait.

use jiff::Timestamp;
use serde::Serialize;

use super::{Admin, AuditEntry, Cancel, Retry, short_enough};
use crate::error::Error;
use crate::lifecycle::State;
use crate::store::{Database, DeliveryId, KeyTurn, Store};

/// A key whose deliveries wait for one of them, or for an operator.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct KeyRow {
    /// Whose subscription.
    pub application: String,
    /// Its name.
    pub subscription: String,
    /// The key.
    pub key: String,
    /// `retrying` and `draining` pass by themselves; `in_doubt` waits for an answer, `blocked` and `parked` for
    /// an operator.
    pub state: String,
    /// The delivery that the others wait for; `None` if an operator has parked a key of which none had failed.
    pub head: Option<DeliveryId>,
    /// Since when.
    pub since: Timestamp,
    /// Why.
    pub cause: String,
    /// How many wait behind it, counted up to 10001.
    pub waiting: i64,
}

/// Which keys.
#[derive(Debug, Clone, Default)]
pub struct KeyFilter {
    /// Of this application only.
    pub application: Option<String>,
    /// Of subscriptions of this name only.
    pub subscription: Option<String>,
    /// This one only.
    pub key: Option<String>,
}

/// One key of a subscription, and who decides about it.
#[derive(Debug, Clone)]
pub struct KeyWish {
    /// Whose subscription.
    pub application: String,
    /// Its name.
    pub subscription: String,
    /// The key.
    pub key: String,
    /// Who says so.
    pub actor: String,
    /// Why.
    pub reason: String,
}

impl KeyWish {
    fn filter(&self) -> KeyFilter {
        KeyFilter {
            application: Some(self.application.clone()),
            subscription: Some(self.subscription.clone()),
            key: Some(self.key.clone()),
        }
    }

    fn is_free(&self) -> Error {
        Error::Conflict(format!(
            "nothing of the key `{}` waits in the subscription `{}`; `postbox keys` shows those that do",
            self.key, self.subscription
        ))
    }
}

impl<Db: Database> Admin<Db> {
    /// Keys that wait, those that wait the longest first.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn keys(&self, filter: &KeyFilter, limit: u32) -> Result<Vec<KeyRow>, Error> {
        self.store.keys(filter, limit).await
    }

    /// Lets a key go on where it stopped: the delivery that it waits for is tried again now, and the others come
    /// after it. A parked one is not parked any more.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Conflict`] if nothing of it waits, or the delivery is in doubt: that one is
    /// resolved first; [`Error::Refused`] if the reason is too long; or the database did not answer.
    pub async fn unblock_key(&self, wish: &KeyWish) -> Result<AuditEntry, Error> {
        short_enough(&wish.reason)?;
        let row = self.key(wish).await?;
        let head = match row.head {
            Some(head) => self.store.show(head).await?.map(|shown| shown.row),
            None => None,
        };
        if let Some(head) = head.as_ref().filter(|head| head.state == State::InDoubt) {
            return Err(Error::Conflict(format!(
                "delivery {0}, which the key waits for, is in doubt; say how it ended: `postbox resolve {0}`",
                head.id
            )));
        }
        // One that retention has removed is not waited for.
        let turn = if head.is_none() && row.head.is_some() { KeyTurn::LetGo } else { KeyTurn::Unpark };
        let entry = self.store.turn_key(wish, turn, row.head).await?;
        if let Some(head) = head {
            let retry = Retry { rev: Some(head.rev), actor: wish.actor.clone(), reason: wish.reason.clone() };
            let waits = matches!(head.state, State::Dead | State::Pending | State::Cancelled);
            match self.store.retry(head.id, &retry).await {
                // It runs, or has moved on: it is being tried already.
                Err(Error::Conflict(_) | Error::Refused(_)) if !waits || head.state == State::Pending => {}
                done => {
                    done?;
                }
            }
        }
        Ok(entry)
    }

    /// Leaves out the delivery that a key waits for, and lets the others go on: a dead one stays a dead letter,
    /// a waiting one is cancelled, one in doubt stays in doubt.
    ///
    /// # Errors
    /// As [`unblock_key`](Self::unblock_key), but for the doubt; [`Error::Conflict`] if the delivery is running.
    pub async fn skip_key(&self, wish: &KeyWish) -> Result<AuditEntry, Error> {
        short_enough(&wish.reason)?;
        let row = self.key(wish).await?;
        if let Some(head) = row.head
            && let Some(head) = self.store.show(head).await?.map(|shown| shown.row)
        {
            if head.state == State::Running {
                return Err(Error::Conflict(format!(
                    "delivery {}, which the key waits for, is running; see how it ends",
                    head.id
                )));
            }
            if head.state == State::Pending && row.state != "draining" {
                let cancel = Cancel { rev: Some(head.rev), actor: wish.actor.clone(), reason: wish.reason.clone() };
                self.store.cancel(head.id, &cancel).await?;
            }
        }
        self.store.turn_key(wish, KeyTurn::LetGo, row.head).await
    }

    /// Puts a key aside: nothing of it is handed out, whatever is published for it, until it is
    /// [unblocked](Self::unblock_key). What runs goes on to its end.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Refused`] if the subscription is not in order, or the reason is too long; or
    /// the database did not answer.
    pub async fn park_key(&self, wish: &KeyWish) -> Result<AuditEntry, Error> {
        short_enough(&wish.reason)?;
        self.store.turn_key(wish, KeyTurn::Park, None).await
    }

    async fn key(&self, wish: &KeyWish) -> Result<KeyRow, Error> {
        self.store.keys(&wish.filter(), 1).await?.into_iter().next().ok_or_else(|| wish.is_free())
    }
}

/// A turn was decided on for another delivery than the key waits for now.
pub(crate) fn key_moved_on(wish: &KeyWish) -> Error {
    Error::Conflict(format!(
        "the key `{}` waits for another delivery by now, or for none; look again with `postbox keys`",
        wish.key
    ))
}

/// Only what is in order can be parked.
pub(crate) fn not_in_order(wish: &KeyWish) -> Error {
    Error::Refused(format!(
        "the subscription `{}` delivers in no order per key: a key of it cannot be parked; pause the whole with `postbox subscriptions pause`",
        wish.subscription
    ))
}
