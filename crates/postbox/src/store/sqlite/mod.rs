//! The store on SQLite: one file, one writer, WAL, `synchronous=FULL`.
//!
//! The same tables and verbs as on PostgreSQL, with one row a delivery. What writes begins with
//! `BEGIN IMMEDIATE`; what only looks reads beside the writer.

/// A struct that is read from a row, column by column.
macro_rules! row {
    ($(#[$meta:meta])* $vis:vis struct $name:ident { $($seen:vis $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        $vis struct $name { $($seen $field: $type,)* }

        impl sqlx::FromRow<'_, sqlx::sqlite::SqliteRow> for $name {
            fn from_row(row: &sqlx::sqlite::SqliteRow) -> Result<Self, sqlx::Error> {
                use sqlx::Row;
                Ok($name { $($field: row.try_get(stringify!($field))?,)* })
            }
        }
    };
}

mod admin;
mod alive;
mod backfill;
mod claim;
mod connect;
mod doubt;
mod held;
mod inbox;
mod keys;
mod lanes;
mod limits;
mod operate;
mod pause;
mod publish;
mod pull;
mod register;
mod relays;
mod replay;
mod retain;
mod schedules;
mod settle;
mod show;
mod takeover;
mod unique;
mod wake;
mod work;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, Sqlite, SqliteConnection, SqlitePool};
use uuid::Uuid;

use crate::admin::{
    AuditEntry, Cancel, CoalescedRow, DeliveryDetail, DeliveryRow, Filter, HeldBack, KeyFilter, KeyRow, KeyWish,
    MigrationStatus, QuarantineDetail, QuarantineFilter, QuarantineRow, QuarantineWish, Replay, ReplayCount, Replayed,
    Resolution, Retained, RetentionPreview, Retry, RoleRow, SinkRow, SourceRow, Status, SubscriptionRow,
};
use crate::content::Content;
use crate::error::{Error, PublishError};
use crate::lifecycle::Kind;
use crate::message::{Draft, Envelope, MAX_WAIT, minted_at};
use crate::retention::Retention;
use crate::schedule::{ScheduleRow, Scheduled, Wish};
use crate::settings::Settings;
use crate::store::inbox::{
    Arrival, DeclaredRelay, Intake, OpenedSource, ReadAgain, Requested, SourceId, SourceReport, Taken,
};
use crate::store::lanes::Balanced;
use crate::store::turns::Turns;
use crate::store::uniques::Uniques;
use crate::store::{
    Answered, Beat, ClaimRequest, Claimed, Completion, Declared, DeliveryId, Doubtful, Ended, Fate, Guarded, KeyTurn,
    LeaseRef, Loss, Move, Observation, Pause, PermitWish, Permits, PullRequest, PulledOne, Pulse, Registration, Settle,
    Store, Stored, Stranded, SubscriptionId, TakenOver, Ticked,
};

pub use connect::migrations_sql;
pub use work::Work;

/// What all tables' names begin with: they live beside the user's own.
const PREFIX: &str = "postbox_";

/// The store on a SQLite file.
#[derive(Debug, Clone)]
pub struct SqliteStore {
    writer: SqlitePool,
    reader: SqlitePool,
    /// Only the reader is its own: closing it leaves the others' connections open.
    alone: bool,
    shared: Arc<Shared>,
}

/// What clones of a store share.
#[derive(Debug)]
struct Shared {
    alive: alive::Alive,
    bell: wake::Bell,
    turns: Turns,
    balanced: Balanced,
    uniques: Uniques,
    options: sqlx::sqlite::SqliteConnectOptions,
    busy: Duration,
}

impl SqliteStore {
    async fn write(&self) -> Result<Work, Error> {
        Work::write(&self.writer).await
    }

    async fn read(&self) -> Result<Work, Error> {
        Work::read(&self.reader).await
    }
}

/// Milliseconds since the epoch, as the tables keep them.
fn timestamp(millis: i64) -> jiff::Timestamp {
    jiff::Timestamp::from_millisecond(millis).unwrap_or(jiff::Timestamp::UNIX_EPOCH)
}

/// At most [`MAX_WAIT`]: whatever a duration is added to or taken from stays far from an overflow.
fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.min(MAX_WAIT).as_millis()).unwrap_or(i64::MAX)
}

/// For waits: rounded up, so that nothing is due too early.
fn millis_up(duration: Duration) -> i64 {
    i64::try_from(duration.min(MAX_WAIT).as_nanos().div_ceil(1_000_000)).unwrap_or(i64::MAX)
}

fn json_of<T: serde::Serialize + ?Sized>(value: &T) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|e| Error::Database(sqlx::Error::Encode(Box::new(e))))
}

/// The messages that are there, by id.
async fn messages(db: &mut SqliteConnection, ids: &[Uuid]) -> Result<HashMap<Uuid, Envelope>, Error> {
    let ids: Vec<String> = ids.iter().map(|id| id.simple().to_string()).collect();
    let rows = sqlx::query(
        "select id, topic, key, payload, body, content_type, headers, occurred_us, source, external_id, correlation_id, causation_id,
             max_attempts
         from postbox_message where id in (select unhex(value) from json_each(?1))",
    )
    .bind(json_of(&ids)?)
    .fetch_all(db)
    .await?;
    rows.iter().map(|row| envelope(row).map(|e| (e.id, e)).map_err(Error::from)).collect()
}

fn envelope(row: &SqliteRow) -> Result<Envelope, sqlx::Error> {
    let id: Uuid = row.try_get("id")?;
    let headers: Option<String> = row.try_get("headers")?;
    let occurred_us: Option<i64> = row.try_get("occurred_us")?;
    let decode = |e: serde_json::Error| sqlx::Error::Decode(Box::new(e));
    Ok(Envelope {
        id,
        topic: row.try_get("topic")?,
        key: row.try_get("key")?,
        payload: Content::stored(row.try_get("payload")?, row.try_get("body")?, row.try_get("content_type")?)
            .map_err(decode)?,
        headers: headers.map(|h| serde_json::from_str(&h)).transpose().map_err(decode)?.unwrap_or_default(),
        occurred_at: occurred(occurred_us, id),
        received_at: minted_at(id),
        source: row.try_get("source")?,
        external_id: row.try_get("external_id")?,
        correlation_id: row.try_get("correlation_id")?,
        causation_id: row.try_get("causation_id")?,
        max_attempts: row.try_get("max_attempts")?,
    })
}

/// When it happened: as it was said, else when it was recorded.
fn occurred(micros: Option<i64>, id: Uuid) -> jiff::Timestamp {
    micros.and_then(|us| jiff::Timestamp::from_microsecond(us).ok()).unwrap_or(minted_at(id))
}

impl Store for SqliteStore {
    type Db = Sqlite;
    type Tx = Work;

    async fn connect(settings: &Settings) -> Result<Self, Error> {
        let opened = connect::open(settings).await?;
        let store = SqliteStore {
            writer: opened.writer,
            reader: opened.reader,
            alone: false,
            shared: Arc::new(Shared {
                alive: alive::Alive::new(opened.file),
                bell: wake::Bell::new(opened.options.clone(), settings.wake_ups()?),
                turns: Turns::default(),
                balanced: Balanced::default(),
                uniques: Uniques::default(),
                options: opened.options,
                busy: opened.busy,
            }),
        };
        connect::migrate(&store).await?;
        Ok(store)
    }

    async fn alone(&self) -> Result<Self, Error> {
        Ok(SqliteStore { reader: connect::readers(&self.shared.options, 1), alone: true, ..self.clone() })
    }

    async fn close(&self) {
        self.reader.close().await;
        if !self.alone {
            self.shared.bell.close();
            self.writer.close().await;
        }
    }

    async fn migrate(&self) -> Result<Vec<String>, Error> {
        connect::migrate(self).await
    }

    async fn migration_status(&self) -> Result<MigrationStatus, Error> {
        connect::status(self).await
    }

    async fn migrate_down(&self, to: u32, loss: Loss) -> Result<Vec<String>, Error> {
        connect::migrate_down(self, to, loss).await
    }

    // A file has no logins, and so no roles.
    async fn roles(&self) -> Result<Vec<RoleRow>, Error> {
        Ok(Vec::new())
    }

    async fn grant_roles(&self) -> Result<Vec<RoleRow>, Error> {
        Ok(Vec::new())
    }

    async fn publish(
        connection: &mut SqliteConnection,
        _: &Self,
        messages: &[Draft],
    ) -> Result<Vec<Stored>, PublishError> {
        publish::publish(connection, messages).await
    }

    async fn lock_key(_: &mut SqliteConnection, _: &Self, _: &str) -> Result<(), Error> {
        Ok(())
    }

    async fn begin(&self) -> Result<Work, Error> {
        self.write().await
    }

    async fn commit(&self, tx: Work) -> Result<(), Error> {
        tx.commit().await?;
        self.shared.bell.ring();
        Ok(())
    }

    async fn register(&self, registration: &Registration) -> Result<Vec<SubscriptionId>, Error> {
        let ids = register::register(self, registration).await?;
        self.shared.uniques.declared(&registration.subscriptions, &ids);
        Ok(ids)
    }

    async fn revive(&self, registration: &Registration, subscriptions: &[SubscriptionId]) -> Result<(), Error> {
        register::revive(self, registration, subscriptions).await
    }

    async fn declare(&self, application: &str, subscriptions: &[Declared]) -> Result<Vec<SubscriptionId>, Error> {
        let ids = register::declare(self, application, subscriptions).await?;
        self.shared.uniques.declared(subscriptions, &ids);
        Ok(ids)
    }

    async fn stored(&self, application: &str, name: &str) -> Result<Option<(SubscriptionId, Kind)>, Error> {
        pull::stored(self, application, name).await
    }

    async fn attend(&self, worker: Uuid, subscriptions: &[SubscriptionId]) -> Result<(), Error> {
        let mut work = self.write().await?;
        sqlx::query("update postbox_worker set subscriptions = ?2 where id = ?1")
            .bind(worker)
            .bind(json_of(subscriptions)?)
            .execute(work.on())
            .await?;
        work.commit().await
    }

    async fn beat(&self, beat: Beat) -> Result<Option<Pulse>, Error> {
        register::beat(self, beat.worker).await
    }

    async fn retire(&self, worker: Uuid) -> Result<(), Error> {
        register::retire(self, worker).await
    }

    async fn asleep(&self, _: Uuid, _: bool) -> Result<(), Error> {
        // Nobody has to be told: whoever sleeps watches the file.
        Ok(())
    }

    async fn woken(&self) {
        self.shared.bell.woken().await;
    }

    async fn claim(&self, request: &ClaimRequest) -> Result<Claimed, Error> {
        claim::claim(self, request).await
    }

    async fn permits(&self, worker: Uuid, wishes: &[PermitWish]) -> Result<Vec<Permits>, Error> {
        limits::permits(self, worker, wishes).await
    }

    async fn settle(&self, settle: &Settle) -> Result<Guarded, Error> {
        settle::settle(self, settle).await
    }

    async fn open(&self, _: LeaseRef, _: Duration) -> Result<Work, Error> {
        settle::open(self).await
    }

    async fn settle_open(
        &self,
        tx: Work,
        lease: LeaseRef,
        outcome: &Move,
        follow_ups: &[Draft],
    ) -> Result<Guarded, Error> {
        settle::settle_open(self, tx, lease, outcome, follow_ups).await
    }

    async fn settle_together(&self, tx: Work, settles: &[Settle]) -> Result<Vec<Uuid>, Error> {
        settle::settle_together(self, tx, settles).await
    }

    async fn recheck_part(&self, lease: LeaseRef, part: i32) -> Result<Option<bool>, Error> {
        settle::recheck_part(self, lease, part).await
    }

    async fn recheck(&self, lease: LeaseRef, delivery: DeliveryId, number: u32) -> Result<Option<bool>, Error> {
        settle::recheck(self, lease, delivery, number).await
    }

    async fn disown(&self, worker: Uuid, token: Uuid) -> Result<(), Error> {
        takeover::disown(self, worker, token).await
    }

    async fn waiting(&self, subscription: SubscriptionId) -> Result<(bool, Option<Duration>), Error> {
        pull::waiting(self, subscription).await
    }

    async fn admit(&self, caller: &mut SqliteConnection, writes: bool) -> Result<(), Error> {
        pull::admit(caller, writes).await
    }

    async fn pull(&self, caller: &mut SqliteConnection, request: PullRequest) -> Result<Option<PulledOne>, Error> {
        pull::pull(self, caller, request).await
    }

    async fn complete(
        &self,
        caller: &mut SqliteConnection,
        lease: LeaseRef,
        outcome: &Move,
    ) -> Result<Completion, Error> {
        pull::complete(caller, lease, outcome).await
    }

    async fn fates(&self, tokens: &[Uuid]) -> Result<Vec<(Uuid, Fate)>, Error> {
        pull::fates(self, tokens).await
    }

    async fn forgo(&self, worker: Uuid, token: Uuid) -> Result<(), Error> {
        takeover::forgo(self, worker, token).await
    }

    async fn take_over(&self, draw: f64) -> Result<Option<TakenOver>, Error> {
        takeover::take_over(self, draw).await
    }

    async fn doubts(
        &self,
        subscriptions: &[SubscriptionId],
        limit: u32,
        hold: Duration,
    ) -> Result<Vec<Doubtful>, Error> {
        doubt::doubts(self, subscriptions, limit, hold).await
    }

    async fn unanswered(&self, doubt: &Doubtful, wait: Duration) -> Result<(), Error> {
        doubt::unanswered(self, doubt, wait).await
    }

    async fn answer(&self, answered: &Answered) -> Result<bool, Error> {
        doubt::answer(self, answered).await
    }

    async fn observe(&self, observations: &[Observation]) -> Result<(), Error> {
        doubt::observe(self, observations).await
    }

    async fn backfill(&self) -> Result<bool, Error> {
        backfill::backfill(self).await
    }

    async fn learn_routes(&self, _: &[String]) -> Result<(), Error> {
        // Publishing matches in SQL: there is nobody to wait for.
        Ok(())
    }

    async fn rotate(&self) -> Result<(), Error> {
        // Nobody's snapshot keeps what was deleted.
        Ok(())
    }

    async fn tidy(&self) -> Result<u64, Error> {
        unique::tidy(self).await?;
        publish::tidy(self).await
    }

    async fn retain(&self, retention: &Retention) -> Result<Retained, Error> {
        retain::retain(self, retention).await
    }

    async fn retention_preview(&self, keep_unrouted: Duration) -> Result<RetentionPreview, Error> {
        retain::preview(self, keep_unrouted).await
    }

    async fn open_source(&self, application: &str, name: &str, kind: &str) -> Result<OpenedSource, Error> {
        inbox::open(self, application, name, kind).await
    }

    async fn report_source(&self, source: SourceId, report: &SourceReport) -> Result<bool, Error> {
        inbox::report(self, source, report).await
    }

    async fn crowded(&self, most: u32) -> Result<bool, Error> {
        inbox::crowded(self, most).await
    }

    async fn receive(&self, intake: Intake, arrivals: &[Arrival]) -> Result<Vec<Taken>, Error> {
        inbox::receive(self, intake, arrivals).await
    }

    async fn requested(&self, source: SourceId, limit: u32) -> Result<Vec<Requested>, Error> {
        inbox::requested(self, source, limit).await
    }

    async fn read_again(&self, intake: Intake, again: &ReadAgain) -> Result<Option<Uuid>, Error> {
        inbox::read_again(self, intake, again).await
    }

    async fn sources(&self) -> Result<Vec<SourceRow>, Error> {
        let mut work = self.read().await?;
        let rows = inbox::sources(work.on()).await?;
        work.rollback().await?;
        Ok(rows)
    }

    async fn pause_source(&self, application: &str, name: &str, pause: &Pause<'_>) -> Result<AuditEntry, Error> {
        inbox::pause(self, application, name, pause).await
    }

    async fn quarantine(&self, filter: &QuarantineFilter, limit: u32) -> Result<Vec<QuarantineRow>, Error> {
        inbox::quarantine(self, filter, limit).await
    }

    async fn quarantined(&self, id: i64) -> Result<Option<QuarantineDetail>, Error> {
        inbox::quarantined(self, id).await
    }

    async fn wish_quarantined(
        &self,
        id: i64,
        wish: QuarantineWish,
        actor: &str,
        reason: &str,
    ) -> Result<AuditEntry, Error> {
        inbox::wish(self, id, wish, actor, reason).await
    }

    async fn declare_relays(&self, relays: &[DeclaredRelay]) -> Result<(), Error> {
        relays::declare(self, relays).await
    }

    async fn count_relayed(
        &self,
        subscription: SubscriptionId,
        _slot: i16,
        sent: i64,
        retried: i64,
    ) -> Result<(), Error> {
        relays::count(self, subscription, (sent, retried)).await
    }

    async fn sinks(&self) -> Result<Vec<SinkRow>, Error> {
        let subscriptions = self.subscriptions().await?;
        let mut work = self.read().await?;
        let relayed = relays::all(work.on()).await?;
        work.rollback().await?;
        Ok(crate::store::relays::rows(&subscriptions, relayed))
    }

    async fn tick(&self) -> Result<Ticked, Error> {
        schedules::tick(self).await
    }

    async fn rescheduled(&self) {
        schedules::rescheduled().await;
    }

    async fn change_schedule(
        &self,
        application: &str,
        name: &str,
        wish: &Wish,
        actor: &str,
        reason: &str,
    ) -> Result<(Scheduled, Option<AuditEntry>), Error> {
        schedules::change(self, application, name, wish, actor, reason).await
    }

    async fn schedules(&self) -> Result<Vec<ScheduleRow>, Error> {
        schedules::all(self).await
    }

    async fn status(&self) -> Result<Status, Error> {
        show::status(self).await
    }

    async fn list(&self, filter: &Filter, limit: u32) -> Result<Vec<DeliveryRow>, Error> {
        show::list(self, filter, limit).await
    }

    async fn show(&self, delivery: DeliveryId) -> Result<Option<DeliveryDetail>, Error> {
        show::show(self, delivery).await
    }

    async fn coalesced(&self, message: Uuid) -> Result<Vec<CoalescedRow>, Error> {
        unique::coalesced(self, message).await
    }

    async fn deliveries_of(&self, message: Uuid) -> Result<Option<(Envelope, Vec<DeliveryId>)>, Error> {
        show::deliveries_of(self, message).await
    }

    async fn retry(&self, delivery: DeliveryId, retry: &Retry) -> Result<AuditEntry, Error> {
        operate::retry(self, delivery, retry).await
    }

    async fn cancel(&self, delivery: DeliveryId, cancel: &Cancel) -> Result<AuditEntry, Error> {
        operate::cancel(self, delivery, cancel).await
    }

    async fn replay(&self, delivery: DeliveryId, replay: &Replay) -> Result<Replayed, Error> {
        replay::one(self, delivery, replay).await
    }

    async fn replay_counts(&self, filter: &Filter, above: DeliveryId) -> Result<Vec<ReplayCount>, Error> {
        replay::counts(self, filter, above).await
    }

    async fn replayable(
        &self,
        filter: &Filter,
        above: DeliveryId,
        upto: DeliveryId,
        limit: u32,
    ) -> Result<Vec<Ended>, Error> {
        replay::replayable(self, filter, (above, upto), limit).await
    }

    async fn newest(&self) -> Result<DeliveryId, Error> {
        replay::newest(self).await
    }

    async fn replay_page(&self, ended: &[Ended], replay: &Replay) -> Result<u64, Error> {
        replay::page(self, ended, replay).await
    }

    async fn resolve(&self, delivery: DeliveryId, resolution: &Resolution) -> Result<AuditEntry, Error> {
        admin::resolve(self, delivery, resolution).await
    }

    async fn subscriptions(&self) -> Result<Vec<SubscriptionRow>, Error> {
        show::subscriptions(self).await
    }

    async fn remove_subscription(
        &self,
        application: &str,
        name: &str,
        actor: &str,
        reason: &str,
    ) -> Result<AuditEntry, Error> {
        admin::remove_subscription(self, application, name, actor, reason).await
    }

    async fn pause(&self, application: &str, name: &str, pause: &Pause<'_>) -> Result<AuditEntry, Error> {
        pause::pause(self, application, name, pause).await
    }

    async fn keys(&self, filter: &KeyFilter, limit: u32) -> Result<Vec<KeyRow>, Error> {
        keys::list(self, filter, limit).await
    }

    async fn turn_key(&self, wish: &KeyWish, turn: KeyTurn, head: Option<DeliveryId>) -> Result<AuditEntry, Error> {
        keys::turn(self, wish, turn, head).await
    }

    async fn paused(&self, subscriptions: &[SubscriptionId]) -> Result<Vec<SubscriptionId>, Error> {
        pause::paused(self, subscriptions).await
    }

    async fn stranded(&self) -> Result<Vec<Stranded>, Error> {
        show::stranded(self).await
    }

    async fn held_back(&self, _: Duration) -> Result<Option<HeldBack>, Error> {
        // Rows are removed at once; an old reader keeps the write-ahead log long, which no table tells.
        Ok(None)
    }

    async fn audit(&self, limit: u32) -> Result<Vec<AuditEntry>, Error> {
        admin::audit(self, limit).await
    }
}

#[cfg(test)]
mod tests;
