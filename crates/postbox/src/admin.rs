//! What operators see and do: the same for the command, the dashboard and programs.

mod inbox;
mod keys;
mod replay;
mod schedules;
mod wish;

use std::str::FromStr;
use std::time::Duration;

use jiff::{Span, SpanRelativeTo, Timestamp};
use serde::Serialize;
use uuid::Uuid;

use crate::error::Error;
use crate::lifecycle::{Answer, State};
use crate::message::{Envelope, MAX_PAYLOAD_BYTES};
use crate::postbox::Postbox;
use crate::priority::Priority;
use crate::retention::Retention;
use crate::schedule::Missed;
pub use crate::schedule::{ScheduleEdit, ScheduleRow};
pub use crate::store::Stranded;
use crate::store::{Database, DeliveryId, Pause, Store};

pub use self::inbox::{QuarantineDetail, QuarantineFilter, QuarantineRow, QuarantineWish, SinkRow, SourceRow};
pub(crate) use self::inbox::{no_source, not_in_quarantine};
pub use self::keys::{KeyFilter, KeyRow, KeyWish};
pub(crate) use self::keys::{key_moved_on, not_in_order};
pub(crate) use self::replay::COUNTED;
pub use self::replay::{Replay, ReplayCount, ReplayPreview, Replayed, Replaying, Replays};
pub(crate) use self::wish::Wish;

/// Which deliveries: `state:dead,in_doubt topic:orders.* subscription:crm key:42 since:2h`.
///
/// Words are joined by *and*, commas within a word by *or*. `since:` and `until:` take a time with its
/// offset (`2027-01-31T09:00:00Z`) or how long ago that is on this machine's clock (`90s`, `2h`, `7d`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Filter {
    /// In one of these states; empty: in any.
    pub states: Vec<State>,
    /// Of one of these topics; patterns are allowed.
    pub topics: Vec<crate::pattern::Pattern>,
    /// For one of these subscriptions, by name.
    pub subscriptions: Vec<String>,
    /// With one of these keys.
    pub keys: Vec<String>,
    /// Of subscriptions of one of these applications.
    pub applications: Vec<String>,
    /// Whose message was recorded at this time or later, to the millisecond.
    pub since: Option<Timestamp>,
    /// Whose message was recorded before this time.
    pub until: Option<Timestamp>,
}

/// A time, or how long ago it is.
fn moment(field: &str, text: &str) -> Result<Timestamp, Error> {
    let unreadable = || {
        Error::Settings(format!(
            "`{field}:{}` is no time; write `{field}:2h` (that long ago) or `{field}:2027-01-31T09:00:00Z`",
            text.escape_debug()
        ))
    };
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let span: Span = text.parse().map_err(|_| unreadable())?;
    let ago = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(|_| unreadable())?;
    if ago.is_negative() {
        return Err(unreadable());
    }
    Timestamp::now().checked_sub(ago).map_err(|_| unreadable())
}

/// Given once, and once only.
fn once(slot: &mut Option<Timestamp>, field: &str, value: &str) -> Result<(), Error> {
    match slot.replace(moment(field, value)?) {
        None => Ok(()),
        Some(_) => Err(Error::Settings(format!("the filter `{field}:` takes one time"))),
    }
}

impl FromStr for Filter {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut filter = Filter::default();
        for word in text.split_whitespace() {
            let Some((field, values)) = word.split_once(':') else {
                return Err(Error::Settings(format!(
                    "`{}` is no filter; write `state:dead`, `topic:orders.*`, `subscription:NAME`, `application:NAME`, `key:KEY`, `since:2h` or `until:2h`",
                    word.escape_debug()
                )));
            };
            let values: Vec<&str> = values.split(',').filter(|v| !v.is_empty()).collect();
            if values.is_empty() {
                return Err(Error::Settings(format!("the filter `{field}:` needs a value")));
            }
            for value in values {
                match field {
                    "state" => filter.states.push(value.parse().map_err(Error::Settings)?),
                    "topic" => filter.topics.push(value.parse().map_err(crate::error::PublishError::from)?),
                    "subscription" => filter.subscriptions.push(value.to_owned()),
                    "key" => filter.keys.push(value.to_owned()),
                    "application" => filter.applications.push(value.to_owned()),
                    "since" => once(&mut filter.since, field, value)?,
                    "until" => once(&mut filter.until, field, value)?,
                    _ => {
                        return Err(Error::Settings(format!(
                            "there is no filter `{}:`; there are state:, topic:, subscription:, application:, key:, since: and until:",
                            field.escape_debug()
                        )));
                    }
                }
            }
        }
        Ok(filter)
    }
}

/// One delivery in a list.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct DeliveryRow {
    /// Its number.
    pub id: DeliveryId,
    /// Where it stands.
    #[serde(serialize_with = "as_word")]
    pub state: State,
    /// Its revision; operators act on it.
    pub rev: i32,
    /// Its message.
    pub message: Uuid,
    /// The message's topic.
    pub topic: String,
    /// The message's key.
    pub key: Option<String>,
    /// The id its producer gave the message.
    pub external_id: Option<String>,
    /// Whose subscription.
    pub application: String,
    /// For which subscription.
    pub subscription: String,
    /// What stands behind it: `plain`, `transactional` or `operation`.
    pub kind: String,
    /// Attempts counted so far.
    pub attempt: u32,
    /// How many it may make.
    pub max_attempts: u32,
    /// When it is due, if it waits for a time.
    pub next_due_at: Option<Timestamp>,
    /// What the last attempt that did not succeed said.
    pub last_error: Option<String>,
    /// When it said so.
    pub last_error_at: Option<Timestamp>,
    /// When the message was recorded.
    pub recorded_at: Timestamp,
    /// When it came to stand where it stands, if that is known.
    pub since: Option<Timestamp>,
    /// Why it is in doubt, dead or cancelled.
    pub note: Option<String>,
    /// Its message's priority.
    pub priority: Priority,
    /// The delivery that an operator had repeated as this one.
    pub replay_of: Option<DeliveryId>,
}

fn as_word<S: serde::Serializer>(state: &State, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(state.as_str())
}

/// One attempt in a history.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct AttemptRow {
    /// From 1.
    pub number: u32,
    /// Its outcome; `None` while it runs.
    pub outcome: Option<String>,
    /// Which worker made it.
    pub worker: Uuid,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// What went wrong.
    pub error: Option<String>,
    /// The remote's receipt.
    pub receipt: Option<serde_json::Value>,
}

/// Something on record beside the attempts: a resolution, an observation, an operator's action.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct RecordRow {
    /// When.
    pub at: Timestamp,
    /// `resolution`, `observation` or `audit`.
    pub record: String,
    /// Who: an operator, `reconcile`, `evidence`, a worker.
    pub actor: String,
    /// What: an answer, what was seen, the action.
    pub what: String,
    /// In words.
    pub detail: Option<String>,
}

/// One delivery with everything that is on record.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct DeliveryDetail {
    /// As it stands in a list.
    #[serde(flatten)]
    pub row: DeliveryRow,
    /// The idempotency key of an operation: the same for all its attempts.
    pub idempotency_key: String,
    /// Its message; `None` when retention took it.
    pub envelope: Option<Envelope>,
    /// The worker that holds it.
    pub worker: Option<String>,
    /// All its attempts, in order.
    pub attempts: Vec<AttemptRow>,
    /// What else is on record, in order of time.
    pub records: Vec<RecordRow>,
    /// Messages that this one's message caused: id and topic.
    pub effects: Vec<(Uuid, String)>,
    /// Replays that operators made of it, at most 100.
    pub replays: Vec<DeliveryId>,
    /// Messages that it stands for beside its own, at most 100: its subscription takes one delivery of a key
    /// at a time.
    pub coalesced: Vec<Uuid>,
}

/// Why a delivery cannot wait again: its subscription takes one of a key at a time.
pub(crate) fn key_is_taken(delivery: DeliveryId, holder: DeliveryId) -> Error {
    Error::Conflict(format!(
        "delivery {holder} has the key of delivery {delivery} and is unfinished, and their subscription takes one of a key at a time; wait until that one has ended, or cancel it"
    ))
}

/// A delivery that stands for a message of the same key, which has none of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CoalescedRow {
    /// Whose subscription it is.
    pub application: String,
    /// Its name.
    pub subscription: String,
    /// The delivery.
    pub delivery: DeliveryId,
    /// When the message was published.
    pub at: Timestamp,
}

/// Counts of one subscription.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct SubscriptionRow {
    /// Whose it is.
    pub application: String,
    /// Its name.
    pub name: String,
    /// What it listens to.
    pub pattern: String,
    /// `plain`, `transactional` or `operation`.
    pub kind: String,
    /// Of an operation: its remote was declared to make repeats under one idempotency key harmless.
    pub idempotent: bool,
    /// Attempts in all.
    pub max_attempts: u32,
    /// Live workers that stand behind it.
    pub workers: i64,
    /// Due now (counted up to 100001).
    pub pending: i64,
    /// Of these, the ones of a high priority (counted up to 100001).
    pub pending_high: i64,
    /// Of these, the ones of a low priority (counted up to 100001).
    pub pending_low: i64,
    /// Due later (counted up to 100001).
    pub scheduled: i64,
    /// In a worker's hands.
    pub running: i64,
    /// In doubt.
    pub in_doubt: i64,
    /// Dead letters.
    pub dead: i64,
    /// Successes in the last hour.
    pub succeeded_last_hour: i64,
    /// How long the oldest that is due has waited, in seconds.
    pub oldest_age_s: Option<f64>,
    /// When it was removed, if it was.
    pub removed_at: Option<Timestamp>,
    /// Since when it is paused, if it is.
    pub paused_at: Option<Timestamp>,
    /// Who paused it, as the audit has it.
    pub paused_by: Option<String>,
    /// Why.
    pub paused_reason: Option<String>,
    /// Its limits across all workers, if it has some.
    pub limits: Option<LimitsRow>,
    /// Its history is still being handed out.
    pub backfilling: bool,
}

/// The limits of a subscription across all workers, and how they stand.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LimitsRow {
    /// How many attempts run at once at the most; `None`: no limit of that.
    pub at_once: Option<u32>,
    /// How many permits for that the workers hold. Each runs no more attempts than it holds.
    pub held: i64,
    /// How many attempts begin in a second at the most; `None`: no limit of that.
    pub per_second: Option<f64>,
    /// How many tokens the bucket holds.
    pub burst: Option<u32>,
    /// How many are in it.
    pub tokens: Option<f64>,
}

impl LimitsRow {
    /// From what is stored; `None`: there are none.
    pub(crate) fn of(
        at_once: Option<i64>,
        held: i64,
        token_us: Option<f64>,
        burst: Option<i64>,
        tokens: Option<f64>,
    ) -> Option<LimitsRow> {
        let whole = |n: i64| u32::try_from(n).unwrap_or(u32::MAX);
        let limits = LimitsRow {
            at_once: at_once.map(whole),
            held,
            // To a millionth: what was declared as 60 is 60.
            per_second: token_us.map(|us| (1e12 / us).round() / 1e6),
            burst: burst.map(whole),
            tokens,
        };
        (limits.at_once.is_some() || limits.per_second.is_some()).then_some(limits)
    }
}

/// A live or lately dead worker.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct WorkerRow {
    /// Its id.
    pub id: Uuid,
    /// Host and process.
    pub name: String,
    /// Whose.
    pub application: String,
    /// When it started.
    pub started_at: Timestamp,
    /// Whether its lease is alive.
    pub alive: bool,
}

/// Everything at a glance.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Status {
    /// The database's schema version.
    pub schema_version: u32,
    /// The workers on record.
    pub workers: Vec<WorkerRow>,
    /// One row a subscription.
    pub subscriptions: Vec<SubscriptionRow>,
    /// The sources, and what they have brought.
    pub sources: Vec<SourceRow>,
    /// The relays, and what their sinks have confirmed.
    pub sinks: Vec<SinkRow>,
    /// The schedules, those whose next tick comes first before the others.
    pub schedules: Vec<ScheduleStatus>,
    /// Messages that matched no subscription (counted up to 100001).
    pub unrouted: i64,
    /// Some of their topics.
    pub unrouted_topics: Vec<String>,
    /// Deliveries that are due, and that no live worker stands behind.
    pub stranded: Vec<Stranded>,
    /// What has kept PostgreSQL from removing dead rows for a minute or longer.
    pub held_back: Option<HeldBack>,
}

/// How a schedule stands; [`Admin::schedules`] tells all of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ScheduleStatus {
    /// Whose it is.
    pub application: String,
    /// Its name.
    pub name: String,
    /// The IANA name of its time zone.
    pub time_zone: String,
    /// Its next tick; `None` while it is paused, and when there is none to come.
    pub next_at: Option<Timestamp>,
    /// The last tick that was published.
    pub last_at: Option<Timestamp>,
    /// What becomes of ticks that were missed.
    pub missed: Missed,
    /// Since when it is paused.
    pub paused_at: Option<Timestamp>,
}

impl ScheduleStatus {
    /// Of all of them, the next first.
    pub(crate) fn of(rows: &[ScheduleRow]) -> Vec<ScheduleStatus> {
        let status = |row: &ScheduleRow| ScheduleStatus {
            application: row.application.clone(),
            name: row.name.clone(),
            time_zone: row.plan.time_zone.clone(),
            next_at: row.next_at,
            last_at: row.last_at,
            missed: row.plan.missed,
            paused_at: row.paused_at,
        };
        let mut all: Vec<ScheduleStatus> = rows.iter().map(status).collect();
        // They come by application and name.
        all.sort_by_key(|row| (row.next_at.is_none(), row.next_at));
        all
    }
}

/// How old what holds vacuum back has to be for [`Admin::status`] to tell of it.
pub(crate) const HELD_BACK: Duration = Duration::from_secs(60);

/// What keeps PostgreSQL from removing dead rows, so that tables and indexes grow: of all the one that goes
/// back furthest.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct HeldBack {
    /// `transaction`, `prepared transaction`, `replication slot` or `standby`.
    pub kind: String,
    /// The session's process on the server, if there is one.
    pub pid: Option<i32>,
    /// The session's application name, or the name of the transaction or slot.
    pub name: Option<String>,
    /// Whose it is.
    pub login: Option<String>,
    /// What the session does; `None` also when this login may not see it.
    pub state: Option<String>,
    /// For how long, in seconds; `None`: this login may not see it, or it is not known.
    pub age_s: Option<f64>,
    /// How many transactions have begun since.
    pub transactions: i64,
    /// Dead rows in `ready`, as the statistics have it.
    pub dead_rows: i64,
}

/// Which migrations there are.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct MigrationStatus {
    /// The schema's name; for SQLite, the table prefix.
    pub schema: String,
    /// Version and name of each, and when it was applied.
    pub migrations: Vec<(u32, String, Option<Timestamp>)>,
}

/// A role that programs can be given in PostgreSQL.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct RoleRow {
    /// Its name, like `postbox_worker`.
    pub name: String,
    /// Whether the server has it.
    pub exists: bool,
}

/// An operator's wish to try again.
#[derive(Debug, Clone)]
pub struct Retry {
    /// The revision the operator saw; `None` takes what is there.
    pub rev: Option<i32>,
    /// Who.
    pub actor: String,
    /// Why.
    pub reason: String,
}

/// An operator's wish to call a delivery off.
#[derive(Debug, Clone)]
pub struct Cancel {
    /// The revision the operator saw; `None` takes what is there.
    pub rev: Option<i32>,
    /// Who.
    pub actor: String,
    /// Why.
    pub reason: String,
}

/// An operator's word on a doubt.
#[derive(Debug, Clone)]
pub struct Resolution {
    /// The revision the operator saw; `None` takes what is there.
    pub rev: Option<i32>,
    /// How it ends.
    pub answer: Answer,
    /// What was seen at the remote.
    pub evidence: Option<String>,
    /// Who.
    pub actor: String,
    /// Why; must not be empty.
    pub reason: String,
}

/// What retention removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Retained {
    /// Deliveries, with their history.
    pub deliveries: i64,
    /// Messages that nothing referred to any more.
    pub messages: i64,
    /// There is more that may go.
    pub more: bool,
    /// Nothing was done: another one is at it, or old messages are being handed out.
    pub busy: bool,
}

/// What retention would remove now.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct RetentionPreview {
    /// By subscription and outcome.
    pub deliveries: Vec<ExpiredRow>,
    /// Messages that nothing would refer to any more.
    pub messages: i64,
}

/// Deliveries of one subscription and outcome that were kept long enough.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ExpiredRow {
    /// Whose subscription.
    pub application: String,
    /// Its name.
    pub subscription: String,
    /// `succeeded`, `dead` or `cancelled`.
    pub outcome: String,
    /// How many.
    pub deliveries: i64,
    /// When the oldest of them ended.
    pub oldest: Timestamp,
}

/// One operator's action on record.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct AuditEntry {
    /// Gap-free.
    pub seq: i64,
    /// When.
    pub at: Timestamp,
    /// Who, as they said.
    pub actor: String,
    /// Who was logged in to the database; `None` on SQLite, which has no logins.
    pub login: Option<String>,
    /// What.
    pub action: String,
    /// On which delivery.
    pub delivery: Option<DeliveryId>,
    /// On which subscription, or whose delivery it is: its name.
    pub subscription: Option<String>,
    /// From this state.
    pub state_before: Option<String>,
    /// To this one.
    pub state_after: Option<String>,
    /// Its revision now.
    pub rev_after: Option<i32>,
    /// Why.
    pub reason: Option<String>,
    /// On what else, and what came of it: an object, like `{"source": …, "quarantine": 17}` or `{"replayed_as": 18}`.
    pub detail: Option<serde_json::Value>,
}

/// Deliveries that one batch of retention removes, about.
pub(crate) const RETAIN_BATCH: u32 = 1000;
/// How often, and after how long, a command asks again when somebody else is at it.
const RETAIN_TRIES: u32 = 300;
const RETAIN_PAUSE: Duration = Duration::from_millis(200);

/// A reason takes so many bytes at most.
pub const MAX_REASON_BYTES: usize = 4096;

/// It goes on record for ever, and is shown in lists.
fn short_enough(reason: &str) -> Result<(), Error> {
    match reason.len() {
        bytes if bytes <= MAX_REASON_BYTES => Ok(()),
        bytes => Err(Error::Refused(format!(
            "the reason is {bytes} bytes long; the limit is {MAX_REASON_BYTES}: keep long texts elsewhere and name the place"
        ))),
    }
}

/// The operator's door: [`Postbox::admin`].
#[derive(Debug)]
pub struct Admin<Db: Database> {
    store: Db::Store,
    max_payload_bytes: usize,
}

impl<Db: Database> Clone for Admin<Db> {
    fn clone(&self) -> Self {
        Admin { store: self.store.clone(), max_payload_bytes: self.max_payload_bytes }
    }
}

impl<Db: Database> Admin<Db> {
    pub(crate) fn new(postbox: &Postbox<Db>) -> Self {
        // A setting that cannot be used was refused when the postbox was opened.
        let max_payload_bytes = postbox.settings().max_payload_bytes().unwrap_or(MAX_PAYLOAD_BYTES);
        Admin { store: postbox.store().clone(), max_payload_bytes }
    }

    /// Counts, workers, and what needs somebody.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn status(&self) -> Result<Status, Error> {
        self.store.status().await
    }

    /// Deliveries that match, newest first, at most `limit`.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn list(&self, filter: &Filter, limit: u32) -> Result<Vec<DeliveryRow>, Error> {
        self.store.list(filter, limit).await
    }

    /// One delivery with its history.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database did not answer.
    pub async fn show(&self, delivery: DeliveryId) -> Result<DeliveryDetail, Error> {
        self.store.show(delivery).await?.ok_or_else(|| no_delivery(delivery))
    }

    /// A message and its deliveries.
    ///
    /// # Errors
    /// [`Error::NotFound`], or the database did not answer.
    pub async fn message(&self, id: Uuid) -> Result<(Envelope, Vec<DeliveryId>), Error> {
        self.store.deliveries_of(id).await?.ok_or_else(|| {
            Error::NotFound(format!(
                "there is no message {id}: removed by retention or never there; `postbox list` shows what there is"
            ))
        })
    }

    /// The deliveries that stand for a message, where a subscription takes one delivery of a key at a time
    /// and had one.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn coalesced(&self, message: Uuid) -> Result<Vec<CoalescedRow>, Error> {
        self.store.coalesced(message).await
    }

    /// Tries a dead, cancelled or waiting delivery again, now; its attempts go on counting.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Conflict`] when it is running or moved on;
    /// [`Error::Refused`] when it is in doubt (only [`resolve`](Self::resolve) settles that) or
    /// has succeeded, its subscription was removed, or the reason is longer than [`MAX_REASON_BYTES`]; or
    /// the database did not answer.
    pub async fn retry(&self, delivery: DeliveryId, retry: &Retry) -> Result<AuditEntry, Error> {
        short_enough(&retry.reason)?;
        self.store.retry(delivery, retry).await
    }

    /// Calls off a delivery that waits or is dead: it is cancelled. A waiting one of a
    /// declared-idempotent operation of which an attempt may have happened comes to be in doubt instead:
    /// no further attempt is made, but nobody can say that it did not happen.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Conflict`] when it is in a worker's hands or moved on;
    /// [`Error::Refused`] when it is in doubt (only [`resolve`](Self::resolve) settles that), has
    /// succeeded or is cancelled, or the reason is longer than [`MAX_REASON_BYTES`]; or the database did not
    /// answer.
    pub async fn cancel(&self, delivery: DeliveryId, cancel: &Cancel) -> Result<AuditEntry, Error> {
        short_enough(&cancel.reason)?;
        self.store.cancel(delivery, cancel).await
    }

    /// Makes a new delivery of the message of one that has succeeded, is dead or was cancelled: for
    /// the same subscription, due now, with its attempts before it, and linked to the old one, which
    /// stays as it is.
    ///
    /// The effect of an operation **happens again**: the new delivery has another idempotency key, so
    /// the remote cannot know it from a new one. That takes [`Replay::irreversible`] and a reason.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Refused`] when it is in doubt or still on its way, its
    /// subscription was removed, its message is gone, it is an operation without the word, or the reason
    /// is longer than [`MAX_REASON_BYTES`];
    /// [`Error::Conflict`] when it moved on meanwhile; or the database did not answer.
    pub async fn replay(&self, delivery: DeliveryId, replay: &Replay) -> Result<Replayed, Error> {
        short_enough(&replay.reason)?;
        self.store.replay(delivery, replay).await
    }

    /// What [`replay_all`](Self::replay_all) would do.
    ///
    /// # Errors
    /// [`Error::Refused`] for a filter that selects everything, or states that cannot be replayed; or
    /// the database did not answer.
    pub async fn replay_preview(&self, filter: &Filter) -> Result<ReplayPreview, Error> {
        self.replay_preview_above(filter, 0).await
    }

    /// The same, of the deliveries above that number.
    ///
    /// # Errors
    /// As [`replay_preview`](Self::replay_preview).
    pub async fn replay_preview_above(&self, filter: &Filter, above: DeliveryId) -> Result<ReplayPreview, Error> {
        ReplayPreview::of(&self.store, filter, above).await
    }

    /// Replays the ended deliveries that match and are there now, the oldest first, page by page:
    /// nothing happens before [`Replaying::next`] is called. Operations are left out, and those whose
    /// subscription was removed. `above` leaves out the deliveries up to that number: where an
    /// interrupted run came to ([`Replays::upto`]), or 0.
    ///
    /// # Errors
    /// As [`replay_preview`](Self::replay_preview), or the reason is longer than [`MAX_REASON_BYTES`].
    pub async fn replay_all(
        &self,
        filter: &Filter,
        replay: &Replay,
        above: DeliveryId,
    ) -> Result<Replaying<Db>, Error> {
        short_enough(&replay.reason)?;
        Replaying::start(self.store.clone(), filter, replay, above).await
    }

    /// Says how a doubt ends.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Conflict`] when it is not in doubt any more or moved on;
    /// [`Error::Refused`] without a reason, or with one longer than [`MAX_REASON_BYTES`]; or the database
    /// did not answer.
    pub async fn resolve(&self, delivery: DeliveryId, resolution: &Resolution) -> Result<AuditEntry, Error> {
        if resolution.reason.trim().is_empty() {
            return Err(Error::Refused("resolving needs a reason: say how you know".into()));
        }
        short_enough(&resolution.reason)?;
        self.store.resolve(delivery, resolution).await
    }

    /// The subscriptions with their counts.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn subscriptions(&self) -> Result<Vec<SubscriptionRow>, Error> {
        self.store.subscriptions().await
    }

    /// Stops fanning out to a subscription; the deliveries it has are left as they are.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Refused`] if the reason is longer than [`MAX_REASON_BYTES`]; or the
    /// database did not answer.
    pub async fn remove_subscription(
        &self,
        application: &str,
        name: &str,
        actor: &str,
        reason: &str,
    ) -> Result<AuditEntry, Error> {
        short_enough(reason)?;
        self.store.remove_subscription(application, name, actor, reason).await
    }

    /// Stops handing out the deliveries of a subscription, for all workers and for those who pull; see
    /// `docs/pause.md`. What is published goes on to be fanned out to it, and waits. What runs goes on to its
    /// end; what a worker has claimed and not started is handed back within a second. One that is paused stays
    /// paused since when it was; that somebody asked again is on record.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Refused`] if the reason is longer than [`MAX_REASON_BYTES`]; or the
    /// database did not answer.
    pub async fn pause(&self, application: &str, name: &str, actor: &str, reason: &str) -> Result<AuditEntry, Error> {
        short_enough(reason)?;
        self.store.pause(application, name, &Pause { pauses: true, actor, reason }).await
    }

    /// Ends a [`pause`](Self::pause): what waited is handed out, in its order.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub async fn resume(&self, application: &str, name: &str, actor: &str, reason: &str) -> Result<AuditEntry, Error> {
        short_enough(reason)?;
        self.store.pause(application, name, &Pause { pauses: false, actor, reason }).await
    }

    /// What [`retain`](Self::retain) would remove now. `keep_unrouted` is the setting of that name.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn retention_preview(&self, keep_unrouted: Duration) -> Result<RetentionPreview, Error> {
        self.store.retention_preview(keep_unrouted).await
    }

    /// Removes what has ended and was kept long enough, batch by batch, until nothing is left of it,
    /// and puts it on record. Workers do the same by themselves. [`busy`](Retained::busy): somebody
    /// else was at it for more than a minute.
    ///
    /// Dropping the future stops it between two batches, or undoes the last one.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn retain(&self, keep_unrouted: Duration) -> Result<Retained, Error> {
        let mut sum = Retained::default();
        let mut patience = RETAIN_TRIES;
        let mut retention = Retention { keep_unrouted, most: RETAIN_BATCH, tell: false };
        loop {
            let step = self.store.retain(&retention).await?;
            sum.deliveries += step.deliveries;
            sum.messages += step.messages;
            if step.busy {
                patience -= 1;
                if patience == 0 {
                    return Ok(Retained { more: true, busy: true, ..sum });
                }
                tokio::time::sleep(RETAIN_PAUSE).await;
            } else if retention.tell {
                return Ok(sum);
            } else {
                // The last batch says what all of them came to.
                retention.tell = !step.more;
            }
        }
    }

    /// Operators' actions, newest first.
    ///
    /// # Errors
    /// The database did not answer.
    pub async fn audit(&self, limit: u32) -> Result<Vec<AuditEntry>, Error> {
        self.store.audit(limit).await
    }
}

pub(crate) fn no_delivery(delivery: DeliveryId) -> Error {
    Error::NotFound(format!(
        "there is no delivery {delivery}: removed by retention or never there; `postbox list` shows what there is"
    ))
}
