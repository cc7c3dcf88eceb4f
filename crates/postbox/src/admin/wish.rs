//! What an operator wants done to a delivery that waits or is dead: the same words on every store.

use super::{Cancel, Retry};
use crate::error::Error;
use crate::lifecycle::{Event, State};
use crate::store::DeliveryId;

/// To try it again, or to call it off.
#[derive(Debug)]
pub(crate) struct Wish<'a> {
    pub(crate) rev: Option<i32>,
    pub(crate) actor: &'a str,
    pub(crate) reason: &'a str,
    pub(crate) event: Event,
    /// As the audit names it, done and refused.
    pub(crate) action: &'static str,
    pub(crate) refused: &'static str,
    /// Why it is where it is then.
    pub(crate) note: String,
}

impl<'a> Wish<'a> {
    pub(crate) fn retry(retry: &'a Retry) -> Wish<'a> {
        Wish {
            rev: retry.rev,
            actor: &retry.actor,
            reason: &retry.reason,
            event: Event::Retried,
            action: "retry",
            refused: "retry refused",
            note: String::new(),
        }
    }

    pub(crate) fn cancel(cancel: &'a Cancel) -> Wish<'a> {
        let note = match cancel.reason.trim() {
            "" => format!("called off by {}", cancel.actor),
            reason => format!("called off by {}: {reason}", cancel.actor),
        };
        Wish {
            rev: cancel.rev,
            actor: &cancel.actor,
            reason: &cancel.reason,
            event: Event::Cancelled,
            action: "cancel",
            refused: "cancel refused",
            note,
        }
    }

    /// Why it cannot be done to a delivery of a subscription that was removed: nobody would take it.
    pub(crate) fn nobody(&self, delivery: DeliveryId) -> Option<Error> {
        (self.event == Event::Retried).then(|| {
            Error::Refused(format!(
                "the subscription of delivery {delivery} was removed: nobody would try it again; call it off with `postbox cancel {delivery}` if it waits"
            ))
        })
    }

    /// Why it cannot be done to a delivery in this state.
    pub(crate) fn refusal(&self, delivery: DeliveryId, state: State) -> Error {
        let cancel = self.event == Event::Cancelled;
        match state {
            State::InDoubt => Error::Refused(format!(
                "delivery {delivery} is in doubt: it may have happened, so it {}; say how it ended with `postbox resolve {delivery}`",
                if cancel { "cannot be called off" } else { "is not tried again" }
            )),
            State::Succeeded => Error::Refused(format!(
                "delivery {delivery} has succeeded; there is nothing to {}",
                if cancel { "call off" } else { "try again" }
            )),
            State::Cancelled if cancel => Error::Refused(format!("delivery {delivery} is cancelled already")),
            _ => Error::Conflict(format!(
                "delivery {delivery} is in a worker's hands{}; look again with `postbox show {delivery}`",
                if cancel { ": what runs cannot be cancelled" } else { "" }
            )),
        }
    }
}
