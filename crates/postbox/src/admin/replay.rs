//! Replay: a new delivery of a message that was delivered before, linked to the old one.

use serde::Serialize;

use super::{AuditEntry, DeliveryRow, Filter};
use crate::error::Error;
use crate::lifecycle::State;
use crate::store::{Database, DeliveryId, Ended, Store};

/// Where counting ends.
pub(crate) const COUNTED: u32 = 100_001;
/// The states that can be replayed.
const ENDED: [State; 3] = [State::Succeeded, State::Dead, State::Cancelled];
/// Deliveries looked up at once, and replayed in one transaction.
const LOOKED_UP: u32 = 20_000;
const PAGE: usize = 500;

/// An operator's wish to have deliveries repeated.
#[derive(Debug, Clone)]
pub struct Replay {
    /// Who.
    pub actor: String,
    /// Why; an operation needs it.
    pub reason: String,
    /// For a single operation: its effect is meant to happen again.
    pub irreversible: bool,
}

impl Replay {
    /// As the audit names it.
    pub(crate) fn action(&self, operation: bool) -> &'static str {
        if operation { "replay: irreversible" } else { "replay" }
    }

    /// Why this delivery cannot be replayed in this way.
    pub(crate) fn refusal(&self, row: &DeliveryRow, operation: bool, removed: bool, kept: bool) -> Option<Error> {
        let id = row.id;
        let why = match row.state {
            State::InDoubt => format!(
                "delivery {id} is in doubt: it may have happened; say how it ended with `postbox resolve {id}` first"
            ),
            State::Pending | State::Running => {
                format!("delivery {id} is {}: it is still on its way, so there is nothing to replay", row.state)
            }
            _ if removed => format!(
                "the subscription `{}` of delivery {id} was removed: nobody would take a replay",
                row.subscription
            ),
            _ if !kept => format!("the message of delivery {id} is gone: there is nothing to replay"),
            _ if operation && !self.irreversible => format!(
                "delivery {id} is an operation: a replay makes its effect happen again, under a new idempotency key, so that the remote cannot tell; if that is meant, say so with --irreversible"
            ),
            _ if operation && self.reason.trim().is_empty() => {
                format!("replaying the operation of delivery {id} needs a reason, which goes on record")
            }
            _ => return None,
        };
        Some(Error::Refused(why))
    }
}

/// A delivery that was replayed.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Replayed {
    /// The new delivery.
    pub delivery: DeliveryId,
    /// The old one.
    pub replay_of: DeliveryId,
    /// The new idempotency key, if it is an operation.
    pub idempotency_key: Option<String>,
    /// What is on record about it.
    pub audit: AuditEntry,
}

/// Ended deliveries of one subscription.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ReplayCount {
    /// Whose subscription.
    pub application: String,
    /// Its name.
    pub subscription: String,
    /// It is an operation: left out, for operations are replayed one by one.
    pub operation: bool,
    /// It was removed: left out.
    pub removed: bool,
    /// How many.
    pub deliveries: i64,
}

impl ReplayCount {
    pub(crate) fn new(
        (application, subscription, kind, removed, deliveries): (String, String, String, bool, i64),
    ) -> ReplayCount {
        let operation = kind == crate::lifecycle::Kind::Operation.as_str();
        ReplayCount { application, subscription, operation, removed, deliveries }
    }
}

/// What a replay by filter would do.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ReplayPreview {
    /// How many deliveries it would make (counted up to 100001).
    pub deliveries: i64,
    /// Operations that match and are left out.
    pub operations: i64,
    /// Deliveries that are left out because their subscription was removed.
    pub removed: i64,
    /// The counts by subscription, those left out included.
    pub by_subscription: Vec<ReplayCount>,
    /// Some of what matches, the newest first; operations may be among them.
    pub sample: Vec<DeliveryRow>,
}

impl ReplayPreview {
    pub(super) async fn of<S: Store>(store: &S, filter: &Filter, above: DeliveryId) -> Result<ReplayPreview, Error> {
        let filter = ended_only(filter)?;
        let by_subscription = store.replay_counts(&filter, above).await?;
        let sum = |wanted: fn(&ReplayCount) -> bool| {
            by_subscription.iter().filter(|c| wanted(c)).map(|c| c.deliveries).sum::<i64>()
        };
        Ok(ReplayPreview {
            deliveries: sum(|c| !c.operation && !c.removed),
            operations: sum(|c| c.operation && !c.removed),
            removed: sum(|c| c.removed),
            sample: store.list(&filter, 5).await?.into_iter().filter(|row| row.id > above).collect(),
            by_subscription,
        })
    }
}

/// The filter, narrowed to what can be replayed.
fn ended_only(filter: &Filter) -> Result<Filter, Error> {
    if *filter == Filter::default() {
        return Err(Error::Refused(
            "a filter that says nothing would replay everything there ever was; say which, like `subscription:NAME since:2h`"
                .into(),
        ));
    }
    if let Some(other) = filter.states.iter().find(|state| !ENDED.contains(state)) {
        return Err(Error::Refused(format!(
            "what is {other} cannot be replayed: only what is succeeded, dead or cancelled"
        )));
    }
    let states = if filter.states.is_empty() { ENDED.to_vec() } else { filter.states.clone() };
    Ok(Filter { states, ..filter.clone() })
}

/// How far a replay by filter has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct Replays {
    /// New deliveries that were made.
    pub replayed: u64,
    /// Deliveries that matched and were left out: operations, what nobody would take, what moved on.
    pub left_out: u64,
    /// Everything up to this delivery was seen to. After an interruption, go on above it.
    pub upto: DeliveryId,
}

/// A replay by filter on its way: [`Admin::replay_all`](super::Admin::replay_all).
#[derive(Debug)]
#[must_use = "nothing is replayed before `next` is called"]
pub struct Replaying<Db: Database> {
    store: Db::Store,
    filter: Filter,
    replay: Replay,
    /// What is newer was not there at the start: it may be what this run makes.
    newest: DeliveryId,
    found: std::collections::VecDeque<Ended>,
    so_far: Replays,
}

impl<Db: Database> Replaying<Db> {
    pub(super) async fn start(
        store: Db::Store,
        filter: &Filter,
        replay: &Replay,
        above: DeliveryId,
    ) -> Result<Self, Error> {
        let filter = ended_only(filter)?;
        let newest = store.newest().await?;
        let so_far = Replays { upto: above, ..Replays::default() };
        Ok(Replaying { store, filter, replay: replay.clone(), newest, found: Default::default(), so_far })
    }

    /// How far it has come; true also after an error.
    pub fn so_far(&self) -> Replays {
        self.so_far
    }

    /// Replays up to 500 deliveries in one transaction, each with an entry in the audit. `None` when
    /// there are no more. Dropping the future loses the count of its page, nothing else: the page is
    /// either done or not, as the audit tells.
    ///
    /// # Errors
    /// The database did not answer: the pages before are done, as [`so_far`](Self::so_far) says.
    pub async fn next(&mut self) -> Result<Option<Replays>, Error> {
        self.next_of(PAGE).await
    }

    /// The same for so many deliveries, at least 1 and at most 500: for a pace, or a limit.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub async fn next_of(&mut self, most: usize) -> Result<Option<Replays>, Error> {
        if self.found.is_empty() {
            let found = self.store.replayable(&self.filter, self.so_far.upto, self.newest, LOOKED_UP).await?;
            self.found = found.into();
        }
        let page: Vec<Ended> = self.found.iter().take(most.clamp(1, PAGE)).cloned().collect();
        let Some(last) = page.last() else { return Ok(None) };
        let made = self.store.replay_page(&page, &self.replay).await?;
        self.so_far.replayed += made;
        self.so_far.left_out += (page.len() as u64).saturating_sub(made);
        self.so_far.upto = last.delivery;
        self.found.drain(..page.len());
        Ok(Some(self.so_far))
    }
}
