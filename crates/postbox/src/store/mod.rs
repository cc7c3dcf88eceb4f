//! The port to a database: one method per verb of the engine, the same for every store.
//!
//! Everything here is set-based and guarded: what settles carries the lease's token, what an
//! operator does carries the revision it saw. Times are the database's own; durations come in.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use crate::admin::{
    AuditEntry, Cancel, CoalescedRow, DeliveryDetail, DeliveryRow, Filter, HeldBack, KeyFilter, KeyRow, KeyWish,
    MigrationStatus, QuarantineDetail, QuarantineFilter, QuarantineRow, QuarantineWish, Replay, ReplayCount, Replayed,
    Resolution, Retained, RetentionPreview, Retry, RoleRow, SinkRow, SourceRow, Status, SubscriptionRow,
};
use crate::error::{Error, PublishError};
use crate::keys::Keys;
use crate::lifecycle::{Answer, Kind, Policy, State};
use crate::limits::Limits;
use crate::message::{Draft, Envelope};
use crate::pattern::Pattern;
use crate::retention::{Keep, Retention};
use crate::schedule::{ScheduleRow, Scheduled, Wish};
use crate::unique::Unique;

pub(crate) mod decide;
pub(crate) mod down;
pub mod inbox;
pub(crate) mod lanes;
pub mod postgres;
pub(crate) mod relays;
pub mod sqlite;
pub(crate) mod tokens;
pub(crate) mod turns;
pub(crate) mod uniques;

pub use down::Loss;

use self::inbox::{Arrival, DeclaredRelay, Intake, OpenedSource, ReadAgain, Requested, SourceId, SourceReport, Taken};

/// A subscription's number in the database.
pub type SubscriptionId = i32;
/// A delivery's number in the database.
pub type DeliveryId = i64;

/// A database that postbox runs on: [`sqlx::Postgres`] or [`sqlx::Sqlite`].
pub trait Database: sqlx::Database<Connection: AsConnection<Self>> + sealed::Sealed {
    /// The verbs on it.
    #[doc(hidden)]
    type Store: Store<Db = Self>;
}

impl Database for sqlx::Postgres {
    type Store = postgres::PgStore;
}

impl Database for sqlx::Sqlite {
    type Store = sqlite::SqliteStore;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for sqlx::Postgres {}
    impl Sealed for sqlx::Sqlite {}
}

/// Something that lends a connection to publish on: a connection, a transaction, a handler's `Tx`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no connection to publish on with this postbox",
    label = "no connection of the postbox's database",
    note = "pass `&mut` a sqlx connection, transaction or pool connection, or a handler's `Tx`, of the postbox's own database: Postgres or Sqlite"
)]
pub trait AsConnection<Db: Database> {
    /// The connection.
    fn as_connection(&mut self) -> &mut Db::Connection;
}

macro_rules! lends {
    ($($db:ty, $connection:ty;)*) => { $(
        impl AsConnection<$db> for $connection {
            fn as_connection(&mut self) -> &mut $connection { self }
        }
    )* };
}
impl<Db: Database> AsConnection<Db> for sqlx::Transaction<'_, Db> {
    fn as_connection(&mut self) -> &mut Db::Connection {
        self
    }
}

impl<Db: Database> AsConnection<Db> for sqlx::pool::PoolConnection<Db> {
    fn as_connection(&mut self) -> &mut Db::Connection {
        self
    }
}

lends! {
    sqlx::Postgres, sqlx::PgConnection;
    sqlx::Sqlite, sqlx::SqliteConnection;
}

/// What became of one message of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored {
    /// It is there under this id, if the transaction commits.
    New(Uuid),
    /// The same, but for subscriptions that take one delivery of a key at a time and have one.
    Coalesced {
        /// The message.
        id: Uuid,
        /// Those deliveries, which stand for it there.
        into: Vec<DeliveryId>,
    },
    /// Its dedup key is taken.
    Duplicate {
        /// By this message.
        existing: Uuid,
        /// Whether that one has the same key and payload.
        same_body: bool,
    },
}

/// Which messages that were there before a subscription it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// Those that nobody was subscribed to.
    #[default]
    Unrouted,
    /// None.
    Now,
    /// All.
    Beginning,
    /// All recorded at this time or later.
    Time(Timestamp),
}

/// A subscription as a worker declares it.
#[derive(Debug, Clone)]
pub struct Declared {
    /// Its durable name.
    pub name: String,
    /// Names it had before.
    pub renamed_from: Vec<String>,
    /// What it listens to.
    pub pattern: Pattern,
    /// Its policy.
    pub policy: Policy,
    /// How long an attempt may run.
    pub timeout: Duration,
    /// How long a call that was sent may still be on its way to the remote.
    pub quiet: Duration,
    /// It can ask the remote about a doubt.
    pub reconciles: bool,
    /// Follow-ups hang on its success.
    pub continues: bool,
    /// What it takes of history when it is new.
    pub start: Start,
    /// How long its deliveries stay on record once they have ended.
    pub keep: Keep,
    /// How fast they run, over all workers.
    pub limits: Limits,
    /// What holds for those of one key.
    pub keys: Option<Keys>,
    /// One unfinished delivery of a key at a time.
    pub unique: Option<Unique>,
}

/// A worker that wants to start.
#[derive(Debug, Clone)]
pub struct Registration {
    /// Minted by the worker; a new one for each incarnation.
    pub worker: Uuid,
    /// For people: host and process.
    pub name: String,
    /// Whose subscriptions these are.
    pub application: String,
    /// How long it may stay silent.
    pub lease: Duration,
    /// What it stands behind.
    pub subscriptions: Vec<Declared>,
}

impl Registration {
    /// Which of its subscriptions, stored under these ids in the same order, it runs as
    /// declared-idempotent.
    pub fn idempotent(&self, ids: &[SubscriptionId]) -> Vec<SubscriptionId> {
        let stored = self.subscriptions.iter().zip(ids);
        stored.filter(|(declared, _)| declared.policy.repeats()).map(|(_, id)| *id).collect()
    }
}

/// A subscription that is stored, has deliveries waiting, and no live worker.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Stranded {
    /// Whose it is.
    pub application: String,
    /// Its name.
    pub subscription: String,
    /// How many deliveries wait (at most 100001 are counted).
    pub waiting: i64,
    /// How many more are due later (at most 100001 are counted).
    pub later: i64,
}

/// A worker's sign of life.
#[derive(Debug, Clone, Copy)]
pub struct Beat {
    /// Who.
    pub worker: Uuid,
    /// Alive for this long from now.
    pub lease: Duration,
}

/// What the database holds for a worker that is alive: the tokens of its leases.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulse {
    /// Live leases under this worker.
    pub tokens: Vec<Uuid>,
}

/// A wish for deliveries.
#[derive(Debug, Clone)]
pub struct ClaimRequest {
    /// Who asks.
    pub worker: Uuid,
    /// Minted by the worker before it asks, so that a lost answer can be told.
    pub token: Uuid,
    /// How many of each subscription at most.
    pub wanted: Vec<(SubscriptionId, u32)>,
    /// Those of them whose attempts take a token each.
    pub metered: Vec<SubscriptionId>,
    /// Those of them that deliver by key, through lanes.
    pub by_key: Vec<SubscriptionId>,
    /// Lanes of those that nothing more is wanted of.
    pub full: Vec<(SubscriptionId, i16)>,
    /// Whether it brings what has come due, and what is in no lane, to its place: of two claims by key that a worker
    /// makes at the same time, one does. Else the other could take what comes later first.
    pub sorts: bool,
}

/// A wish for permits of a subscription that has a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PermitWish {
    /// Of this subscription.
    pub subscription: SubscriptionId,
    /// How many the worker could use.
    pub wanted: u32,
    /// How many it keeps in any case: no more than it was given.
    pub keep: u32,
}

/// What a worker may run of a subscription that has a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Permits {
    /// Of this subscription.
    pub subscription: SubscriptionId,
    /// So many at once, from now until the next answer.
    pub granted: u32,
    /// Others have fewer than they want: what would be fair to keep.
    pub fair: Option<u32>,
}

/// What becomes of a key in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyTurn {
    /// It is put aside.
    Park,
    /// It is not any more: it waits for its delivery again, or for nothing.
    Unpark,
    /// It goes on without the delivery that it waits for.
    LetGo,
}

impl KeyTurn {
    /// What the audit calls it.
    pub(crate) fn action(self) -> &'static str {
        match self {
            KeyTurn::Park => "park key",
            KeyTurn::Unpark => "unblock key",
            KeyTurn::LetGo => "skip key",
        }
    }
}

/// A delivery in a worker's hands.
#[derive(Debug, Clone)]
pub struct Item {
    /// Its number.
    pub delivery: DeliveryId,
    /// For this subscription.
    pub subscription: SubscriptionId,
    /// Its message's id.
    pub message: Uuid,
    /// Lower goes first.
    pub priority: i16,
    /// Attempts counted so far.
    pub attempts: u32,
    /// Workers that died holding it without a record of its start.
    pub lost: u32,
    /// Its revision while leased.
    pub rev: i32,
    /// Others of its key wait for its success.
    pub leads: bool,
    /// The message; `None` if it is gone, which makes the delivery dead.
    pub envelope: Option<Arc<Envelope>>,
}

/// A leased batch.
#[derive(Debug, Clone)]
pub struct Claimed {
    /// The batch's number.
    pub batch: i64,
    /// The lease's token.
    pub token: Uuid,
    /// Its deliveries, in order. Empty: there was nothing, and there is no lease.
    pub items: Vec<Item>,
    /// How long until something scheduled is due, if anything is.
    pub next_due: Option<Duration>,
    /// Metered subscriptions that got fewer tokens than were wanted, and how long until the next one comes.
    pub dry: Vec<(SubscriptionId, Duration)>,
}

/// A lease, as every guarded write names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseRef {
    /// The worker.
    pub worker: Uuid,
    /// The batch.
    pub batch: i64,
    /// The token.
    pub token: Uuid,
}

impl Declared {
    /// A former name that is stored beside the new one: only one of them can have been renamed.
    pub(crate) fn tell_of_former(&self, names: &[String]) {
        for name in names {
            tracing::warn!(
                subscription = self.name,
                former = name,
                "both names are stored, so nothing was renamed: an older program may have come back; what waits for the former name stays with it until `postbox subscriptions remove`"
            );
        }
    }
}

/// How many snoozes of one attempt are on record.
pub(crate) const MOST_SNOOZES: i64 = 100;

/// A wish for one delivery, to be settled in its caller's transaction.
#[derive(Debug, Clone, Copy)]
pub struct PullRequest {
    /// The puller's worker row.
    pub worker: Uuid,
    /// Minted before it asks, so that a lost answer can be told.
    pub token: Uuid,
    /// Of this subscription.
    pub subscription: SubscriptionId,
}

/// One leased delivery, whose attempt is on record as begun.
#[derive(Debug, Clone)]
pub struct PulledOne {
    /// Under this lease, which holds nothing else.
    pub lease: LeaseRef,
    /// The delivery; its attempts without the one that has begun.
    pub item: Item,
    /// Its subscription's policy, with the message's own limit of attempts.
    pub policy: Policy,
}

/// What became of a success that was written in the caller's transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// It counts if the caller commits.
    Done,
    /// The lease is not this puller's any more: nothing changed.
    Fenced,
    /// The caller's snapshot is older than the lease: nothing changed.
    Unseen,
}

/// How the transaction ended that completes a pulled delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It has not ended.
    Open,
    /// It was rolled back: the lease is still there, and nobody's.
    RolledBack,
    /// The lease is gone: it was committed, or the lease was taken over.
    Gone,
}

/// How one attempt ended, as it is written.
#[derive(Debug, Clone)]
pub struct OutcomeRecord {
    /// The attempt's number, from 1.
    pub number: u32,
    /// `succeeded`, `failed`, `in_doubt`, `panicked`, `timed_out`, `snoozed`, `discarded` or `lost`.
    pub kind: &'static str,
    /// What went wrong, redacted and bounded.
    pub error: Option<String>,
    /// The remote's receipt.
    pub receipt: Option<serde_json::Value>,
    /// How long it ran.
    pub ran: Duration,
    /// How long ago it ended.
    pub ago: Duration,
}

/// One delivery's move to where it goes next.
#[derive(Debug, Clone)]
pub struct Move {
    /// Which delivery.
    pub delivery: DeliveryId,
    /// Its message.
    pub message: Uuid,
    /// Its subscription.
    pub subscription: SubscriptionId,
    /// Its priority.
    pub priority: i16,
    /// Its revision after the move.
    pub rev: i32,
    /// Where it goes: the standing that `transition` gave.
    pub standing: crate::lifecycle::Standing,
    /// For a pending one, when it is due from now.
    pub delay: Duration,
    /// For one in doubt: how long until "did not happen" can be believed.
    pub quiet: Duration,
    /// For one in doubt, dead or cancelled: why.
    pub note: String,
    /// The attempt that ended with it, if one did; without one it leaves its lease uncounted.
    pub outcome: Option<OutcomeRecord>,
    /// In an ordered subscription: the others of its key wait for it, or have waited for this success.
    pub leads: bool,
}

/// A plain handler's success at its first attempt.
#[derive(Debug, Clone)]
pub struct Success {
    /// Which delivery.
    pub delivery: DeliveryId,
    /// Its message.
    pub message: Uuid,
    /// Its subscription.
    pub subscription: SubscriptionId,
    /// How long it ran.
    pub ran: Duration,
}

/// One flush of a batch: what ended, what is handed back, what starts.
#[derive(Debug, Clone)]
pub struct Settle {
    /// Under this lease.
    pub lease: LeaseRef,
    /// The flush's number within the batch; a repeated one changes nothing.
    pub part: i32,
    /// Compact successes.
    pub successes: Vec<Success>,
    /// Everything else that ended.
    pub moves: Vec<Move>,
    /// Handed back unstarted and uncounted, in order: delivery, subscription, message, priority,
    /// attempts, lost and rev as they were leased.
    pub released: Vec<Item>,
    /// What is on record beside the outcomes: snoozes that are no attempts. Evidence is not looked at.
    pub seen: Vec<Observation>,
    /// Messages that commit with these outcomes.
    pub follow_ups: Vec<Draft>,
    /// Attempts that begin once this is committed: delivery and number.
    pub starts: Vec<(DeliveryId, u32)>,
    /// Nothing of the batch is left: the lease ends.
    pub close: bool,
}

/// What became of a guarded write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guarded {
    /// It is committed (now, or by an earlier try).
    Done,
    /// The lease is not this worker's any more: nothing changed.
    Fenced,
}

/// Something seen that changes no state by itself.
#[derive(Debug, Clone)]
pub struct Observation {
    /// Of this delivery.
    pub delivery: DeliveryId,
    /// Of this attempt.
    pub number: u32,
    /// By this worker.
    pub worker: Uuid,
    /// What was seen: an outcome's word, or `lost`.
    pub kind: &'static str,
    /// In words.
    pub detail: Option<String>,
    /// A late answer that may settle the doubt: a separate, recorded transition.
    pub evidence: Option<Evidence>,
}

/// What a late outcome proves.
#[derive(Debug, Clone)]
pub struct Evidence {
    /// The answer.
    pub answer: Answer,
    /// The receipt that came with it.
    pub receipt: Option<serde_json::Value>,
    /// Messages that commit with a success.
    pub follow_ups: Vec<Draft>,
}

/// What was taken over from a worker that died.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakenOver {
    /// Who died.
    pub worker: Uuid,
    /// Its name.
    pub name: String,
    /// How many deliveries went back to pending.
    pub pending: usize,
    /// How many are in doubt now.
    pub in_doubt: usize,
    /// How many are dead now.
    pub dead: usize,
}

/// A delivery in doubt that it is time to ask about, or whose word is to be carried out.
#[derive(Debug, Clone)]
pub struct Doubtful {
    /// Its number.
    pub delivery: DeliveryId,
    /// For this subscription.
    pub subscription: SubscriptionId,
    /// Its revision.
    pub rev: i32,
    /// Attempts so far; the last is the one in doubt.
    pub attempts: u32,
    /// "Did not happen" can be believed now.
    pub quiet: bool,
    /// How often the remote was asked before this and told nothing.
    pub asks: u32,
    /// An operator said that it happened: only the follow-ups are wanted, with this receipt.
    pub word: Option<Word>,
    /// The message, unless it is gone.
    pub envelope: Option<Envelope>,
}

/// An operator's "happened", waiting for a worker to release what hangs on it.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Word {
    /// Who said it.
    pub actor: String,
    /// Why.
    pub reason: String,
    /// What they saw.
    pub receipt: Option<serde_json::Value>,
}

/// Who says how a doubt ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaker {
    /// A person, through the command line, the dashboard or the library.
    Operator,
    /// The reconcile hook.
    Reconcile,
    /// A late outcome.
    Evidence,
}

impl Speaker {
    /// The word for it, in SQL and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Speaker::Operator => "operator",
            Speaker::Reconcile => "reconcile",
            Speaker::Evidence => "evidence",
        }
    }
}

/// A reconcile hook's answer, or a carried-out word.
#[derive(Debug, Clone)]
pub struct Answered {
    /// Which delivery.
    pub delivery: DeliveryId,
    /// The revision that was asked about; another one changes nothing.
    pub rev: i32,
    /// The answer.
    pub answer: Answer,
    /// Whose answer it is.
    pub speaker: Speaker,
    /// By name.
    pub actor: String,
    /// Why, if somebody said so.
    pub reason: Option<String>,
    /// What proves it.
    pub receipt: Option<serde_json::Value>,
    /// Messages that commit with a success.
    pub follow_ups: Vec<Draft>,
    /// The jitter.
    pub draw: f64,
}

/// A delivery that has ended, as it was seen: succeeded, dead or cancelled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Which.
    pub delivery: DeliveryId,
    /// Its message.
    pub message: Uuid,
    /// Its subscription.
    pub subscription: SubscriptionId,
    /// How it ended.
    pub state: State,
}

/// What a look for schedules that are due came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticked {
    /// How many messages were published.
    pub published: usize,
    /// How long until the next look is worth it; `None`: no schedule waits for a tick.
    pub next: Option<Duration>,
}

/// How long to leave alone what is due, and in another worker's hands or not understood.
pub(crate) const IN_OTHER_HANDS: Duration = Duration::from_secs(1);

/// An operator's wish that a subscription's deliveries wait, or do not wait any longer.
#[derive(Debug, Clone, Copy)]
pub struct Pause<'a> {
    /// Else it ends a pause.
    pub pauses: bool,
    /// Who.
    pub actor: &'a str,
    /// Why.
    pub reason: &'a str,
}

impl Pause<'_> {
    /// What stands in the audit.
    pub(crate) fn action(self) -> &'static str {
        if self.pauses { "pause subscription" } else { "resume subscription" }
    }
}

/// The future that a verb returns.
pub trait Verb<T>: Future<Output = Result<T, Error>> + Send {}
impl<T, F: Future<Output = Result<T, Error>> + Send> Verb<T> for F {}

/// A transaction that a handler works in, until it is settled or dropped (which rolls it back).
pub trait HandlerTx<Db: Database>: Send + 'static {
    /// Its connection.
    fn connection(&mut self) -> &mut Db::Connection;
}

/// The verbs. Cancel safety: dropping a verb's future leaves the database as if it had been
/// committed or not been called, never in between; its connection is closed, not reused.
pub trait Store: Clone + std::fmt::Debug + Send + Sync + 'static {
    /// The database.
    type Db: Database<Store = Self>;
    /// A handler's transaction.
    type Tx: HandlerTx<Self::Db>;

    /// Connects, and checks the schema (SQLite: migrates).
    fn connect(settings: &crate::settings::Settings) -> impl Verb<Self>;
    /// The same store with one connection of its own, so that nobody can keep it from a heartbeat.
    fn alone(&self) -> impl Verb<Self>;
    /// Closes the connections.
    fn close(&self) -> impl Future<Output = ()> + Send;
    /// Brings the schema to the version of this build.
    fn migrate(&self) -> impl Verb<Vec<String>>;
    /// Which migrations there are, and which were applied.
    fn migration_status(&self) -> impl Verb<MigrationStatus>;
    /// Takes migrations back, down to a version. The names of those, newest first.
    fn migrate_down(&self, to: u32, loss: Loss) -> impl Verb<Vec<String>>;
    /// The roles for programs; none where the database has no roles.
    fn roles(&self) -> impl Verb<Vec<RoleRow>>;
    /// Makes the roles that are not there, and gives all of them their rights.
    fn grant_roles(&self) -> impl Verb<Vec<RoleRow>>;

    /// Stores and fans out checked messages, in the caller's transaction; in order.
    fn publish(
        connection: &mut <Self::Db as sqlx::Database>::Connection,
        store: &Self,
        messages: &[Draft],
    ) -> impl Future<Output = Result<Vec<Stored>, PublishError>> + Send;
    /// Takes a key's lock until the caller's transaction ends.
    fn lock_key(
        connection: &mut <Self::Db as sqlx::Database>::Connection,
        store: &Self,
        key: &str,
    ) -> impl Future<Output = Result<(), Error>> + Send;
    /// A connection of the store's own to publish on, inside a transaction.
    fn begin(&self) -> impl Verb<Self::Tx>;
    /// Commits it.
    fn commit(&self, tx: Self::Tx) -> impl Verb<()>;

    /// Writes the worker's row and its subscriptions. The ids, in the order given.
    fn register(&self, registration: &Registration) -> impl Verb<Vec<SubscriptionId>>;
    /// Writes the row of a worker that was taken over and goes on under a new id. Its subscriptions
    /// stay as they are stored: what was renamed, changed or removed meanwhile is not undone.
    fn revive(&self, registration: &Registration, subscriptions: &[SubscriptionId]) -> impl Verb<()>;
    /// Writes subscriptions without a worker behind them. The ids, in the order given.
    fn declare(&self, application: &str, subscriptions: &[Declared]) -> impl Verb<Vec<SubscriptionId>>;
    /// The stored subscription of this name, unless it was removed.
    fn stored(&self, application: &str, name: &str) -> impl Verb<Option<(SubscriptionId, Kind)>>;
    /// Says which subscriptions a worker stands behind from now on.
    fn attend(&self, worker: Uuid, subscriptions: &[SubscriptionId]) -> impl Verb<()>;
    /// Renews the worker's life; `None` when it was taken over.
    fn beat(&self, beat: Beat) -> impl Verb<Option<Pulse>>;
    /// Ends a worker that holds nothing any more.
    fn retire(&self, worker: Uuid) -> impl Verb<()>;
    /// Sets or clears the wish to be woken.
    fn asleep(&self, worker: Uuid, asleep: bool) -> impl Verb<()>;
    /// Returns when something may be there to claim, or never. Lost wake-ups are allowed.
    fn woken(&self) -> impl Future<Output = ()> + Send;

    /// Promotes what is due, and leases a batch.
    fn claim(&self, request: &ClaimRequest) -> impl Verb<Claimed>;
    /// Shares out the permits of subscriptions that have a limit: together, live workers never hold more. A
    /// worker that is not alive gets none.
    fn permits(&self, worker: Uuid, wishes: &[PermitWish]) -> impl Verb<Vec<Permits>>;
    /// Writes one flush, all or nothing.
    fn settle(&self, settle: &Settle) -> impl Verb<Guarded>;
    /// Opens a transactional handler's transaction.
    fn open(&self, lease: LeaseRef, timeout: Duration) -> impl Verb<Self::Tx>;
    /// Records a transactional success in its own transaction and commits it.
    /// `Refused` when the handler ended the transaction itself; what it did before is committed.
    fn settle_open(&self, tx: Self::Tx, lease: LeaseRef, outcome: &Move, follow_ups: &[Draft]) -> impl Verb<Guarded>;
    /// Writes flushes under several leases in a handler's own transaction and commits it: all, or nothing when
    /// leases are gone, whose tokens it gives. `Refused` as by `settle_open`.
    fn settle_together(&self, tx: Self::Tx, settles: &[Settle]) -> impl Verb<Vec<Uuid>>;
    /// The same as `recheck`, for a flush.
    fn recheck_part(&self, lease: LeaseRef, part: i32) -> impl Verb<Option<bool>>;
    /// Whether an attempt's outcome is committed, once nobody else can still be committing it:
    /// for an unknown COMMIT. `None` when the lease is gone and there is no outcome.
    fn recheck(&self, lease: LeaseRef, delivery: DeliveryId, number: u32) -> impl Verb<Option<bool>>;
    /// Leases under this worker that it does not know are handed back (a claim whose answer was lost).
    fn disown(&self, worker: Uuid, token: Uuid) -> impl Verb<()>;

    /// Whether something is due for a subscription, and how long until something else is.
    fn waiting(&self, subscription: SubscriptionId) -> impl Verb<(bool, Option<Duration>)>;
    /// Refuses a caller's connection that is in no transaction. With `writes`, the store is about to
    /// write on connections of its own: one that would be in their way is refused, too.
    fn admit(&self, caller: &mut <Self::Db as sqlx::Database>::Connection, writes: bool) -> impl Verb<()>;
    /// Leases one delivery and puts its attempt on record, in a transaction of its own. The caller's
    /// connection is only looked at.
    fn pull(
        &self,
        caller: &mut <Self::Db as sqlx::Database>::Connection,
        request: PullRequest,
    ) -> impl Verb<Option<PulledOne>>;
    /// Ends the lease with a success, in the caller's transaction.
    fn complete(
        &self,
        caller: &mut <Self::Db as sqlx::Database>::Connection,
        lease: LeaseRef,
        outcome: &Move,
    ) -> impl Verb<Completion>;
    /// What became of the transactions that complete these leases; in any order.
    fn fates(&self, tokens: &[Uuid]) -> impl Verb<Vec<(Uuid, Fate)>>;
    /// Hands back what was leased by `pull` and never handed out: its attempt is struck off the record.
    fn forgo(&self, worker: Uuid, token: Uuid) -> impl Verb<()>;

    /// Takes over one dead worker, if there is one.
    fn take_over(&self, draw: f64) -> impl Verb<Option<TakenOver>>;
    /// Doubts of these subscriptions that are due to be asked about; each is held back for `hold`, so
    /// that one worker asks at a time.
    fn doubts(&self, subscriptions: &[SubscriptionId], limit: u32, hold: Duration) -> impl Verb<Vec<Doubtful>>;
    /// Nothing was learnt by asking about this doubt: the next ask comes after `wait`, or as soon as a
    /// "did not happen" can be believed. Nothing happens when it has moved on.
    fn unanswered(&self, doubt: &Doubtful, wait: Duration) -> impl Verb<()>;
    /// Ends a doubt. `false` when it had moved on.
    fn answer(&self, answered: &Answered) -> impl Verb<bool>;
    /// Records what was seen; evidence settles a doubt whose last attempt it is.
    fn observe(&self, observations: &[Observation]) -> impl Verb<()>;
    /// Gives new subscriptions their history, a bounded piece; `true` when there may be more.
    fn backfill(&self) -> impl Verb<bool>;
    /// Stores what these topics fan out to, for publishers to look up.
    fn learn_routes(&self, topics: &[String]) -> impl Verb<()>;
    /// Lets go of what claims have emptied, where that needs doing; bounded, and often nothing.
    fn rotate(&self) -> impl Verb<()>;
    /// Finds a source, or makes it.
    fn open_source(&self, application: &str, name: &str, kind: &str) -> impl Verb<OpenedSource>;
    /// Says how a source stands; whether it is paused.
    fn report_source(&self, source: SourceId, report: &SourceReport) -> impl Verb<bool>;
    /// Whether so many deliveries are due and not claimed.
    fn crowded(&self, most: u32) -> impl Verb<bool>;
    /// Stores what has come in, what cannot be stored in quarantine, in one transaction; in order.
    fn receive(&self, intake: Intake, arrivals: &[Arrival]) -> impl Verb<Vec<Taken>>;
    /// What of a source in quarantine is to be read again.
    fn requested(&self, source: SourceId, limit: u32) -> impl Verb<Vec<Requested>>;
    /// Puts down what reading it again came to. The message that it is now.
    fn read_again(&self, intake: Intake, again: &ReadAgain) -> impl Verb<Option<Uuid>>;
    /// The sources.
    fn sources(&self) -> impl Verb<Vec<SourceRow>>;
    /// An operator: nothing is read from a source, or is again.
    fn pause_source(&self, application: &str, name: &str, pause: &Pause<'_>) -> impl Verb<AuditEntry>;
    /// What is in quarantine, newest first.
    fn quarantine(&self, filter: &QuarantineFilter, limit: u32) -> impl Verb<Vec<QuarantineRow>>;
    /// One of it.
    fn quarantined(&self, id: i64) -> impl Verb<Option<QuarantineDetail>>;
    /// An operator: it is read again, or removed.
    fn wish_quarantined(&self, id: i64, wish: QuarantineWish, actor: &str, reason: &str) -> impl Verb<AuditEntry>;
    /// Says which subscriptions are relays.
    fn declare_relays(&self, relays: &[DeclaredRelay]) -> impl Verb<()>;
    /// Counts what a relay's sink has confirmed, and what is to be sent again.
    fn count_relayed(&self, subscription: SubscriptionId, slot: i16, sent: i64, retried: i64) -> impl Verb<()>;
    /// The relays.
    fn sinks(&self) -> impl Verb<Vec<SinkRow>>;

    /// Removes what has run out: dedup windows; and opens what messages of later days go to. How many
    /// dedup windows went.
    fn tidy(&self) -> impl Verb<u64>;
    /// Removes one batch of what has ended and was kept long enough; never anything unfinished.
    fn retain(&self, retention: &Retention) -> impl Verb<Retained>;
    /// What it would remove.
    fn retention_preview(&self, keep_unrouted: Duration) -> impl Verb<RetentionPreview>;

    /// Publishes what is due of schedules, and says when to look again. Any number may call it at once: each
    /// tick is published by one.
    fn tick(&self) -> impl Verb<Ticked>;
    /// Returns when schedules may have changed, or never; where nobody tells, after a second.
    fn rescheduled(&self) -> impl Future<Output = ()> + Send;
    /// Does what a program or an operator wants of a schedule. What operators do is on record.
    fn change_schedule(
        &self,
        application: &str,
        name: &str,
        wish: &Wish,
        actor: &str,
        reason: &str,
    ) -> impl Verb<(Scheduled, Option<AuditEntry>)>;
    /// All schedules, by application and name.
    fn schedules(&self) -> impl Verb<Vec<ScheduleRow>>;

    /// Counts for people and programs.
    fn status(&self) -> impl Verb<Status>;
    /// Deliveries that match, newest first.
    fn list(&self, filter: &Filter, limit: u32) -> impl Verb<Vec<DeliveryRow>>;
    /// One delivery with its history.
    fn show(&self, delivery: DeliveryId) -> impl Verb<Option<DeliveryDetail>>;
    /// The deliveries that stand for a message.
    fn coalesced(&self, message: Uuid) -> impl Verb<Vec<CoalescedRow>>;
    /// The deliveries of a message.
    fn deliveries_of(&self, message: Uuid) -> impl Verb<Option<(Envelope, Vec<DeliveryId>)>>;
    /// An operator: dead, cancelled or waiting to pending, now.
    fn retry(&self, delivery: DeliveryId, retry: &Retry) -> impl Verb<AuditEntry>;
    /// An operator: dead or waiting to cancelled.
    fn cancel(&self, delivery: DeliveryId, cancel: &Cancel) -> impl Verb<AuditEntry>;
    /// An operator: a new delivery of an ended one's message, due now and linked to it.
    fn replay(&self, delivery: DeliveryId, replay: &Replay) -> impl Verb<Replayed>;
    /// How many ended deliveries match, by subscription; counted up to 100001 in all.
    fn replay_counts(&self, filter: &Filter, above: DeliveryId) -> impl Verb<Vec<ReplayCount>>;
    /// The oldest ended deliveries that match, of those above one number and up to another.
    fn replayable(&self, filter: &Filter, above: DeliveryId, upto: DeliveryId, limit: u32) -> impl Verb<Vec<Ended>>;
    /// No delivery so far has a higher number; all that come have.
    fn newest(&self) -> impl Verb<DeliveryId>;
    /// Replays those of these that still can be, operations left out, in one transaction; how many.
    fn replay_page(&self, ended: &[Ended], replay: &Replay) -> impl Verb<u64>;
    /// An operator: ends a doubt.
    fn resolve(&self, delivery: DeliveryId, resolution: &Resolution) -> impl Verb<AuditEntry>;
    /// All subscriptions, the removed ones that still have deliveries included.
    fn subscriptions(&self) -> impl Verb<Vec<SubscriptionRow>>;
    /// An operator: publishers do not fan out to it any more.
    fn remove_subscription(&self, application: &str, name: &str, actor: &str, reason: &str) -> impl Verb<AuditEntry>;
    /// An operator: deliveries of a subscription are not handed out, or are again.
    fn pause(&self, application: &str, name: &str, pause: &Pause<'_>) -> impl Verb<AuditEntry>;
    /// Keys in order that wait, those that wait the longest first.
    fn keys(&self, filter: &KeyFilter, limit: u32) -> impl Verb<Vec<KeyRow>>;
    /// An operator: what becomes of a key, if it still waits for this delivery.
    fn turn_key(&self, wish: &KeyWish, turn: KeyTurn, head: Option<DeliveryId>) -> impl Verb<AuditEntry>;
    /// Those of these subscriptions that are paused.
    fn paused(&self, subscriptions: &[SubscriptionId]) -> impl Verb<Vec<SubscriptionId>>;
    /// Subscriptions with deliveries that no live worker stands behind.
    fn stranded(&self) -> impl Verb<Vec<Stranded>>;
    /// What keeps dead rows from being removed for as long as this already, if the database has such.
    fn held_back(&self, longer_than: Duration) -> impl Verb<Option<HeldBack>>;
    /// The audit, newest first.
    fn audit(&self, limit: u32) -> impl Verb<Vec<AuditEntry>>;
}

pub(crate) fn no_subscription(application: &str, name: &str) -> Error {
    Error::NotFound(format!(
        "application `{application}` has no subscription `{name}`; `postbox subscriptions` shows what there is"
    ))
}

/// The policy a subscription row tells.
pub(crate) fn policy_of(kind: Kind, idempotent: bool, max_attempts: i32, base_ms: i64, cap_ms: i64) -> Policy {
    Policy {
        kind,
        idempotent,
        retry: crate::retry::RetryPolicy {
            max_attempts: max_attempts.max(1) as u32,
            base: Duration::from_millis(base_ms.max(0) as u64),
            cap: Duration::from_millis(cap_ms.max(0) as u64),
        },
    }
}
