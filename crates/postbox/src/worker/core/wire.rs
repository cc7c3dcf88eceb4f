//! What goes into the decisions and what comes out: events with the time, and commands.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::handler::Gather;
use crate::keys::Keys;
use crate::lifecycle::{End, Policy};
use crate::message::Draft;
use crate::store::{
    ClaimRequest, Claimed, Guarded, Item, LeaseRef, Observation, PermitWish, Permits, Settle, SubscriptionId,
};

/// What a worker is made of.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) worker: Uuid,
    pub(crate) concurrency: usize,
    /// A fixed size of batches, instead of one that follows the load.
    pub(crate) batch: Option<u32>,
    pub(crate) poll_interval: Duration,
    pub(crate) subscriptions: Vec<Lane>,
    /// Tokens and jitter come from here.
    pub(crate) seed: u64,
}

/// A subscription as the decisions see it.
#[derive(Debug, Clone)]
pub(crate) struct Lane {
    pub(crate) id: SubscriptionId,
    pub(crate) policy: Policy,
    pub(crate) timeout: Duration,
    /// How long a call that was sent may still be on its way to the remote.
    pub(crate) quiet: Duration,
    /// The same for a call of a worker that was lost, and may only be paused.
    pub(crate) late: Duration,
    pub(crate) concurrency: Option<usize>,
    /// What holds for those of one key.
    pub(crate) keys: Option<Keys>,
    /// How deliveries come together, for a batch handler.
    pub(crate) gather: Option<Gather>,
    /// How many run at once is limited across workers.
    pub(crate) limited: bool,
    /// How many begin in a time is limited across workers.
    pub(crate) metered: bool,
}

/// One delivery in hand: the batch's token and its place in the batch.
pub(crate) type Hold = (Uuid, usize);

/// One of the deliveries that a batch handler is called with.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) hold: Hold,
    pub(crate) lease: LeaseRef,
    pub(crate) item: Item,
    /// Which attempt this is.
    pub(crate) number: u32,
    /// The number of the flush that settles it, if that is in its handler's transaction.
    pub(crate) part: i32,
}

/// How an attempt ended, as the runner reports it.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub(crate) end: End,
    pub(crate) error: Option<String>,
    pub(crate) receipt: Option<serde_json::Value>,
    pub(crate) follow_ups: Vec<Draft>,
    pub(crate) ran: Duration,
    /// A transactional handler's transaction has committed its outcome already.
    pub(crate) settled: bool,
    /// The lease was found to be gone.
    pub(crate) fenced: bool,
    /// Its task was cancelled, and may not have let go yet.
    pub(crate) cut_off: bool,
    /// The handler was never called, for a reason that is not its own.
    pub(crate) not_called: bool,
}

impl Ended {
    /// With this end, and nothing else to tell.
    pub(crate) fn of(end: End) -> Ended {
        Ended {
            end,
            error: None,
            receipt: None,
            follow_ups: Vec::new(),
            ran: Duration::ZERO,
            settled: false,
            fenced: false,
            cut_off: false,
            not_called: false,
        }
    }
}

/// What became of a flush.
#[derive(Debug)]
pub(crate) enum Flushed {
    /// The store said so.
    Known(Guarded),
    /// The answer was lost, or the database is away.
    Unknown,
    /// The database will not take what is in it.
    Refused(String),
}

/// What happens to a worker.
#[derive(Debug)]
pub(crate) enum Event {
    /// Something may be there.
    Woken,
    /// A claim returned; `None`: its answer was lost or an error.
    Claimed(Uuid, Option<Claimed>),
    /// Permits that this worker has asked for; `None`: the answer was lost or an error.
    Permitted(Uuid, Option<Vec<Permits>>),
    /// A flush returned.
    Settled(Uuid, Flushed),
    /// A handback of an unknown claim returned.
    Disowned(Uuid, bool),
    /// An attempt ended.
    Ended(Hold, Box<Ended>),
    /// Attempts of one call ended.
    EndedTogether(Vec<(Hold, Box<Ended>)>),
    /// Its task is gone, and with it the permit; of a call with several, the first tells it for all.
    Freed(Hold),
    /// A heartbeat, sent at this time, found these leases.
    Pulse(Duration, Vec<Uuid>),
    /// The worker was taken over; it goes on as this one.
    Reborn(Uuid),
    /// Of what lies ready, these subscriptions are paused.
    Paused(Vec<SubscriptionId>),
    /// No new claims, and nothing new starts.
    Stop,
    /// What still runs is cancelled.
    StopNow,
    /// Time has passed.
    Tick,
}

/// Why a handler is cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cancel {
    TimedOut,
    Stopped,
    Fenced,
}

/// What a worker wants done.
#[derive(Debug)]
pub(crate) enum Command {
    Claim(ClaimRequest),
    /// Asks for permits, as this worker.
    Permits(Uuid, Vec<PermitWish>),
    Settle(Arc<Settle>),
    Disown(Uuid),
    Run(Hold, LeaseRef, Box<Item>, u32),
    /// Calls a batch handler with these.
    RunBatch(Vec<Member>),
    /// Cancels the call that this one is in.
    Cancel(Hold, Cancel),
    Observe(Vec<Observation>),
    Asleep(bool),
    /// Tell which of these are paused.
    AskPaused(Vec<SubscriptionId>),
}
