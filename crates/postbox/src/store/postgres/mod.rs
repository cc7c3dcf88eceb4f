//! The store on PostgreSQL: one `.sql` file per statement, schema-qualified, in short transactions.

mod admin;
mod claim;
mod doubt;
mod down;
mod inbox;
mod keys;
mod lanes;
mod limits;
mod marks;
mod migrate;
mod operate;
mod pause;
#[cfg(feature = "planted-bugs")]
mod planted;
mod promote;
mod publish;
mod pull;
mod read;
mod register;
mod relays;
mod replay;
mod retain;
mod roles;
mod schedules;
mod settle;
mod takeover;
mod unique;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPool, PgPoolOptions};
use sqlx::{Connection, PgConnection, Postgres, Row};
use tokio::sync::Notify;
use uuid::Uuid;

use self::lanes::FAR;
use self::marks::Marks;
use self::promote::Promoted;
use self::publish::{Fans, Refusing};
use crate::admin::{
    AuditEntry, Cancel, CoalescedRow, DeliveryDetail, DeliveryRow, Filter, HeldBack, KeyFilter, KeyRow, KeyWish,
    MigrationStatus, QuarantineDetail, QuarantineFilter, QuarantineRow, QuarantineWish, Replay, ReplayCount, Replayed,
    Resolution, Retained, RetentionPreview, Retry, RoleRow, SinkRow, SourceRow, Status, SubscriptionRow,
};
use crate::error::{Error, PublishError};
use crate::lifecycle::Kind;
use crate::message::{Draft, Envelope};
use crate::retention::Retention;
use crate::schedule::{ScheduleRow, Scheduled, Wish};
use crate::settings::Settings;
use crate::store::inbox::{
    Arrival, DeclaredRelay, Intake, OpenedSource, ReadAgain, Requested, SourceId, SourceReport, Taken,
};
use crate::store::lanes::{Balanced, FIRST_HELD, FIRST_LANE, LET_THROUGH};
use crate::store::turns::Turns;
use crate::store::uniques::Uniques;
use crate::store::{
    Answered, Beat, ClaimRequest, Claimed, Completion, Declared, DeliveryId, Doubtful, Ended, Fate, Guarded, HandlerTx,
    KeyTurn, LeaseRef, Loss, Move, Observation, Pause, PermitWish, Permits, PullRequest, PulledOne, Pulse,
    Registration, Settle, Store, Stored, Stranded, SubscriptionId, TakenOver, Ticked,
};

pub use migrate::{migrations_down_sql, migrations_sql};

/// Every statement, with the schema's name filled in.
macro_rules! statements {
    ($($name:ident $(= $from:ident without $($section:literal)+)?),* $(,)?) => {
        #[derive(Debug)]
        struct Sql { $($name: &'static str,)* }

        impl Sql {
            fn render(schema: &str) -> Sql {
                Sql { $($name: statements!(@text schema, $name $(= $from without $($section)+)?),)* }
            }
        }
    };
    (@text $schema:ident, $name:ident) => {{
        let sql = include_str!(concat!(stringify!($name), ".sql"));
        #[cfg(feature = "planted-bugs")]
        let sql = planted::vary(stringify!($name), sql);
        with_levels(sql).replace("{schema}", $schema).leak()
    }};
    (@text $schema:ident, $name:ident = $from:ident without $($section:literal)+) => {{
        let sql: &'static str = statements!(@text $schema, $from);
        [$($section),+].iter().fold(sql.to_owned(), |sql, section| without(&sql, section)).leak()
    }};
}
statements! {
    audit, beat, inbox_count, inbox_known, inbox_remember,
    inbox_remember_new = inbox_remember without "known", claim = claim without "many" "lanes", claim_many = claim without "few" "lanes",
    claim_lanes = claim without "many" "plain", complete, doubt_for_update, doubts, duplicates, free_keys, history, keys_aside,
    keys_block, keys_free, keys_list, lanes, lanes_free, lanes_leave, lanes_take, learn_routes, leftover, lock_holders,
    look, moves, permits, tokens, only_moves = moves without "ended", next_due, part_exists, paused, promote, publish, publish_checked,
    publish_one = publish_one without "several", publish_several = publish_one without "one", pull, replay, resolution, retain_preview, roles,
    schedules_due, schedules_look,
    held_back, settle_open, settle_part, suspects, unrouted,
    list, show_attempts, show_linked, show_records, strays, subscriptions, stranded, unanswered, waiting,
}

impl Sql {
    /// The statements for a schema: rendered once a process, so that they can be `'static`.
    fn of(schema: &str) -> &'static Sql {
        static RENDERED: OnceLock<Mutex<HashMap<String, &'static Sql>>> = OnceLock::new();
        let mut rendered = match RENDERED.get_or_init(Mutex::default).lock() {
            Ok(rendered) => rendered,
            Err(poisoned) => poisoned.into_inner(),
        };
        rendered.entry(schema.to_owned()).or_insert_with(|| Box::leak(Box::new(Sql::render(schema))))
    }
}

/// The levels of `ready` that are lanes and those at which deliveries wait for others of their key, and how far
/// the places there are from the numbers of deliveries.
fn with_levels(sql: impl AsRef<str>) -> String {
    sql.as_ref()
        .replace("{lanes}", &FIRST_LANE.to_string())
        .replace("{held}", &FIRST_HELD.to_string())
        .replace("{let_through}", &LET_THROUGH.to_string())
        .replace("{far}", &format!("{FAR}::bigint"))
}

/// A statement without the lines between `-- {section` and `-- section}`.
fn without(sql: &str, section: &str) -> String {
    let (begin, end) = (format!("-- {{{section}\n"), format!("-- {section}}}\n"));
    let mut kept = String::with_capacity(sql.len());
    let mut rest = sql;
    while let Some((before, (_, after))) =
        rest.split_once(&begin).and_then(|(before, cut)| Some((before, cut.split_once(&end)?)))
    {
        kept.push_str(before);
        rest = after;
    }
    kept + rest
}

/// The store on PostgreSQL.
#[derive(Debug, Clone)]
pub struct PgStore {
    pool: PgPool,
    options: PgConnectOptions,
    sql: &'static Sql,
    schema: String,
    channel: String,
    prepared: bool,
    wake_ups: bool,
    /// Publishes with the function, one by one: the role may do no more.
    through_function: bool,
    bell: Arc<Bell>,
    marks: Arc<Marks>,
    turns: Arc<Turns>,
    fans: Arc<Fans>,
    uniques: Arc<Uniques>,
    promoted: Arc<Promoted>,
    balanced: Arc<Balanced>,
    /// The last claim found nothing, and nobody has rung since.
    calm: Arc<AtomicBool>,
    /// Something was claimed since the ring of ready tables was looked through, or some of it was left there.
    claimed: Arc<AtomicBool>,
    /// How many more batches of what comes in look their ids up first.
    looks: Arc<AtomicU32>,
}

/// Rings when a publisher has told that there is something.
#[derive(Debug, Default)]
struct Bell {
    rung: Notify,
    /// Somebody has changed a schedule.
    rescheduled: Notify,
    listener: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

/// What somebody has told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    /// There are messages.
    Messages,
    /// A schedule has changed.
    Schedules,
    /// Either, and nobody has heard it.
    Unknown,
}

impl Bell {
    /// Rings for those who wait now, and for the next one who comes.
    fn ring(&self, told: Told) {
        for (bell, other) in [(&self.rung, Told::Schedules), (&self.rescheduled, Told::Messages)] {
            if told != other {
                bell.notify_waiters();
                bell.notify_one();
            }
        }
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        if let Ok(mut listener) = self.listener.lock()
            && let Some(task) = listener.take()
        {
            task.abort();
        }
    }
}

/// A transaction of the store's own. Dropped before its commit, it closes its connection: no open
/// transaction goes back to the pool, wherever a future was dropped (sqlx issue 4393).
#[derive(Debug)]
pub struct Work {
    connection: Option<PoolConnection<Postgres>>,
    xid: Option<String>,
}

impl Work {
    async fn begin(pool: &PgPool, statements: &str) -> Result<Work, sqlx::Error> {
        let mut work = Work { connection: Some(pool.acquire().await?), xid: None };
        sqlx::raw_sql(sqlx::AssertSqlSafe(statements)).execute(work.on()).await?;
        Ok(work)
    }

    fn on(&mut self) -> &mut PgConnection {
        // `connection` is taken by `commit` and `drop` only, which consume the Work.
        self.connection.as_mut().expect("a Work holds its connection until it ends")
    }

    /// A connection for one statement that is a transaction by itself.
    async fn single(pool: &PgPool) -> Result<Work, sqlx::Error> {
        Ok(Work { connection: Some(pool.acquire().await?), xid: None })
    }

    /// Gives the connection back after a statement that was a transaction by itself.
    fn over(mut self) {
        self.connection.take();
    }

    async fn commit(mut self) -> Result<(), sqlx::Error> {
        sqlx::raw_sql("COMMIT").execute(self.on()).await?;
        self.connection.take();
        Ok(())
    }

    async fn rollback(mut self) -> Result<(), sqlx::Error> {
        sqlx::raw_sql("ROLLBACK").execute(self.on()).await?;
        self.connection.take();
        Ok(())
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Some(mut connection) = self.connection.take() {
            connection.close_on_drop();
        }
    }
}

impl HandlerTx<Postgres> for Work {
    fn connection(&mut self) -> &mut PgConnection {
        self.on()
    }
}

/// How long a connection may take.
const CONNECT_PATIENCE: Duration = Duration::from_secs(30);

/// Takeovers lock first and read second: each statement must see what was committed before it,
/// whatever the role's default isolation is.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL jit = off";

/// Claims delete by place: a plan made while a table was empty must not read it whole once it is full. There is
/// one good plan, and to make it takes longer than to claim a few; so it is made once a connection.
const BEGIN_CLAIM: &str = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL jit = off; SET LOCAL enable_seqscan = off; \
     SET LOCAL plan_cache_mode = force_generic_plan";

/// A claim that locks nothing before it deletes waits for whoever deletes the same at this moment: not for long,
/// and not for longer than the login may.
const LOCK_NOT_LONG: &str = "SELECT pg_catalog.set_config('lock_timeout', '1s', true) WHERE \
     pg_catalog.current_setting('lock_timeout')::interval NOT BETWEEN interval '1 microsecond' AND interval '1 second'";

/// Irreversible effects hang on these commits: asynchronous ones are raised to `on`. Compiling these
/// short statements would take longer than running them, whatever the planner's estimate says. One SELECT
/// for both: each statement of a simple query is parsed and planned by itself.
const BEGIN_DURABLE: &str = "BEGIN ISOLATION LEVEL READ COMMITTED; SELECT pg_catalog.set_config('jit', 'off', true), \
     CASE WHEN pg_catalog.current_setting('synchronous_commit') IN ('off', 'local') \
     THEN pg_catalog.set_config('synchronous_commit', 'on', true) END";

impl PgStore {
    fn query(&self, sql: &'static str) -> sqlx::query::Query<'static, Postgres, sqlx::postgres::PgArguments> {
        sqlx::query(sql).persistent(self.prepared)
    }

    /// A statement that is put together at run time from checked names.
    fn dynamic(&self, sql: String) -> sqlx::query::Query<'static, Postgres, sqlx::postgres::PgArguments> {
        sqlx::query(sqlx::AssertSqlSafe(sql)).persistent(self.prepared)
    }

    async fn work(&self) -> Result<Work, sqlx::Error> {
        Work::begin(&self.pool, BEGIN).await
    }

    async fn claiming(&self) -> Result<Work, sqlx::Error> {
        Work::begin(&self.pool, BEGIN_CLAIM).await
    }

    async fn durable(&self) -> Result<Work, sqlx::Error> {
        Work::begin(&self.pool, BEGIN_DURABLE).await
    }

    /// Whether one statement may be a transaction by itself: what goes between it and its server keeps to it.
    fn alone(&self) -> bool {
        self.prepared && !crate::crash::is_armed()
    }

    /// Reads what is asked for by its key: there is one good plan for that, and to make it takes longer than to read.
    async fn look_up(&self) -> Result<Work, sqlx::Error> {
        let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL jit = off; SET LOCAL plan_cache_mode = force_generic_plan";
        Work::begin(&self.pool, begin).await
    }

    async fn read(&self) -> Result<Work, sqlx::Error> {
        Work::begin(&self.pool, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL jit = off").await
    }

    /// Listens on the channel, reconnecting by itself, for as long as the store lives.
    fn listen(&self) {
        let Ok(mut listener) = self.bell.listener.lock() else { return };
        if !self.wake_ups || listener.is_some() {
            return;
        }
        let options = self.options.clone();
        let channel = self.channel.clone();
        let bell = Arc::downgrade(&self.bell);
        *listener = Some(tokio::spawn(async move {
            let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(options);
            let mut pause = Duration::from_millis(100);
            loop {
                let heard = async {
                    let mut listener = PgListener::connect_with(&pool).await?;
                    listener.listen(&channel).await?;
                    // What was told before is not heard; publishers' words are looked for by the next claim.
                    let mut told = Told::Schedules;
                    loop {
                        let Some(bell) = bell.upgrade() else { return Ok::<(), sqlx::Error>(()) };
                        bell.ring(told);
                        drop(bell);
                        // A broken connection is mended inside; what was missed meanwhile is looked for.
                        told = match listener.try_recv().await? {
                            None => Told::Unknown,
                            Some(told) if told.payload() == schedules::RESCHEDULED => Told::Schedules,
                            Some(_) => Told::Messages,
                        };
                    }
                };
                match heard.await {
                    Ok(()) => return,
                    Err(error) => {
                        tracing::warn!(%error, "cannot listen for wake-ups; polling goes on");
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(Duration::from_secs(10));
                    }
                }
            }
        }));
    }
}

/// Microseconds since the epoch, as the statements give them.
fn timestamp(micros: i64) -> jiff::Timestamp {
    jiff::Timestamp::from_microsecond(micros).unwrap_or(jiff::Timestamp::UNIX_EPOCH)
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

impl Store for PgStore {
    type Db = Postgres;
    type Tx = Work;

    async fn connect(settings: &Settings) -> Result<Self, Error> {
        let schema = settings.schema()?;
        let options = settings.postgres()?;
        // A pool tries again for as long as it may, and then tells of a timeout: the first connection is
        // made beside it, so that what is wrong is told at once and in the server's words.
        let first = PgConnection::connect_with(&options);
        match tokio::time::timeout(CONNECT_PATIENCE, first).await {
            Ok(connection) => connection?.close().await?,
            Err(_) => return Err(sqlx::Error::PoolTimedOut.into()),
        }
        let pool = PgPoolOptions::new()
            .max_connections(settings.pool_size()?)
            .acquire_timeout(CONNECT_PATIENCE)
            .connect_lazy_with(options.clone());
        let mut store = PgStore {
            pool,
            options,
            sql: Sql::of(&schema),
            channel: settings.channel()?,
            schema,
            prepared: settings.prepared_statements()?,
            wake_ups: settings.wake_ups()?,
            through_function: settings.publish_through_function()?,
            bell: Arc::default(),
            marks: Arc::default(),
            turns: Arc::default(),
            fans: Arc::default(),
            uniques: Arc::default(),
            promoted: Arc::default(),
            balanced: Arc::default(),
            calm: Arc::default(),
            claimed: Arc::default(),
            looks: Arc::default(),
        };
        store.through_function |= !roles::may_insert(&store).await?;
        Ok(store)
    }

    async fn alone(&self) -> Result<Self, Error> {
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(Duration::from_secs(5))
            .connect_lazy_with(self.options.clone());
        Ok(PgStore { pool, bell: Arc::default(), ..self.clone() })
    }

    async fn close(&self) {
        self.pool.close().await;
    }

    async fn migrate(&self) -> Result<Vec<String>, Error> {
        migrate::up(self).await
    }

    async fn migration_status(&self) -> Result<MigrationStatus, Error> {
        migrate::status(self).await
    }

    async fn migrate_down(&self, to: u32, loss: Loss) -> Result<Vec<String>, Error> {
        down::to(self, to, loss).await
    }

    async fn roles(&self) -> Result<Vec<RoleRow>, Error> {
        roles::roles(self).await
    }

    async fn grant_roles(&self) -> Result<Vec<RoleRow>, Error> {
        roles::grant(self).await
    }

    async fn publish(
        connection: &mut PgConnection,
        store: &Self,
        messages: &[Draft],
    ) -> Result<Vec<Stored>, PublishError> {
        publish::publish(connection, store, messages, Refusing::Callers).await
    }

    async fn lock_key(connection: &mut PgConnection, store: &Self, key: &str) -> Result<(), Error> {
        let sql = format!("select {}.lock_key($1)", store.schema);
        store.dynamic(sql).bind(key).execute(connection).await?;
        Ok(())
    }

    async fn begin(&self) -> Result<Work, Error> {
        Ok(self.work().await?)
    }

    async fn commit(&self, tx: Work) -> Result<(), Error> {
        Ok(tx.commit().await?)
    }

    async fn register(&self, registration: &Registration) -> Result<Vec<SubscriptionId>, Error> {
        self.listen();
        let ids = register::register(self, registration).await?;
        self.uniques.declared(&registration.subscriptions, &ids);
        // Engines that only speak PostgreSQL's protocol may not know their timeline.
        if let Err(error) = register::suspect(self, registration.worker).await {
            tracing::debug!(%error, "the server does not tell its timeline; a promoted standby goes unnoticed");
        }
        Ok(ids)
    }

    async fn revive(&self, registration: &Registration, subscriptions: &[SubscriptionId]) -> Result<(), Error> {
        let mut work = self.work().await?;
        register::enlist(self, &mut work, registration, subscriptions).await?;
        Ok(work.commit().await?)
    }

    async fn declare(&self, application: &str, subscriptions: &[Declared]) -> Result<Vec<SubscriptionId>, Error> {
        let ids = register::declare(self, application, subscriptions).await?;
        self.uniques.declared(subscriptions, &ids);
        Ok(ids)
    }

    async fn stored(&self, application: &str, name: &str) -> Result<Option<(SubscriptionId, Kind)>, Error> {
        pull::stored(self, application, name).await
    }

    async fn attend(&self, worker: Uuid, subscriptions: &[SubscriptionId]) -> Result<(), Error> {
        let mut work = self.work().await?;
        let sql = format!("update {}.worker set subscriptions = $2 where id = $1", self.schema);
        self.dynamic(sql).bind(worker).bind(subscriptions.to_vec()).execute(work.on()).await?;
        Ok(work.commit().await?)
    }

    async fn beat(&self, beat: Beat) -> Result<Option<Pulse>, Error> {
        let mut work = self.work().await?;
        let row =
            self.query(self.sql.beat).bind(beat.worker).bind(millis(beat.lease)).fetch_optional(work.on()).await?;
        work.commit().await?;
        row.map(|row| Ok(Pulse { tokens: row.try_get("tokens")? })).transpose()
    }

    async fn retire(&self, worker: Uuid) -> Result<(), Error> {
        takeover::retire(self, worker).await
    }

    async fn asleep(&self, worker: Uuid, asleep: bool) -> Result<(), Error> {
        if !self.wake_ups {
            return Ok(());
        }
        // Losing this write to a crash costs a poll's latency, no message.
        let mut work =
            Work::begin(&self.pool, "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = off").await?;
        let sql = format!("update {}.worker set asleep = $2 where id = $1 and asleep <> $2", self.schema);
        self.dynamic(sql).bind(worker).bind(asleep).execute(work.on()).await?;
        Ok(work.commit().await?)
    }

    async fn woken(&self) {
        self.bell.rung.notified().await;
        self.calm.store(false, Ordering::Relaxed);
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

    async fn open(&self, lease: LeaseRef, timeout: Duration) -> Result<Work, Error> {
        settle::open(self, lease, timeout).await
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

    async fn admit(&self, caller: &mut PgConnection, _: bool) -> Result<(), Error> {
        pull::admit(caller).await
    }

    async fn pull(&self, _: &mut PgConnection, request: PullRequest) -> Result<Option<PulledOne>, Error> {
        pull::pull(self, request).await
    }

    async fn complete(&self, caller: &mut PgConnection, lease: LeaseRef, outcome: &Move) -> Result<Completion, Error> {
        pull::complete(self, caller, lease, outcome).await
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
        register::backfill(self).await
    }

    async fn learn_routes(&self, topics: &[String]) -> Result<(), Error> {
        let mut work = self.work().await?;
        // Locked first, looked at second: what is stored is of the epoch that holds until this commits, and
        // the one who begins the next removes it.
        self.dynamic(format!("select 1 from {}.routing for share", self.schema)).execute(work.on()).await?;
        self.query(self.sql.learn_routes).bind(topics.to_vec()).execute(work.on()).await?;
        Ok(work.commit().await?)
    }

    async fn tidy(&self) -> Result<u64, Error> {
        let mut work = self.work().await?;
        let sql = format!(
            "delete from {0}.dedup d using (
                select topic, key from {0}.dedup where expires_at <= pg_catalog.statement_timestamp()
                order by expires_at limit 1000 for update skip locked) gone
             where d.topic = gone.topic and d.key = gone.key",
            self.schema
        );
        let removed = self.dynamic(sql).execute(work.on()).await?.rows_affected();
        unique::tidy(self, &mut work).await?;
        let removed = removed.max(inbox::tidy(self, &mut work).await?);
        work.commit().await?;
        // A transaction of its own: for a moment it holds a lock that publishers wait for.
        let mut work = self.work().await?;
        self.dynamic(format!("select {}.open_windows()", self.schema)).execute(work.on()).await?;
        work.commit().await?;
        // Who pulls in SQL claims as well, and nobody here knows of it.
        self.claimed.store(true, Ordering::Relaxed);
        Ok(removed)
    }

    async fn rotate(&self) -> Result<(), Error> {
        if !self.claimed.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let mut work = self.work().await?;
        let sql = format!("select {}.rotate() as left_over", self.schema);
        let left_over: i32 = self.dynamic(sql).fetch_one(work.on()).await?.try_get("left_over")?;
        work.commit().await?;
        self.claimed.fetch_or(left_over > 0, Ordering::Relaxed);
        Ok(())
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
        let rows = inbox::sources(self, &mut work).await?;
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
        slot: i16,
        sent: i64,
        retried: i64,
    ) -> Result<(), Error> {
        relays::count(self, subscription, slot, (sent, retried)).await
    }

    async fn sinks(&self) -> Result<Vec<SinkRow>, Error> {
        let subscriptions = self.subscriptions().await?;
        let mut work = self.read().await?;
        let relayed = relays::all(self, &mut work).await?;
        work.rollback().await?;
        Ok(crate::store::relays::rows(&subscriptions, relayed))
    }

    async fn tick(&self) -> Result<Ticked, Error> {
        schedules::tick(self).await
    }

    async fn rescheduled(&self) {
        schedules::rescheduled(self).await;
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
        admin::status(self).await
    }

    async fn list(&self, filter: &Filter, limit: u32) -> Result<Vec<DeliveryRow>, Error> {
        admin::list(self, filter, limit).await
    }

    async fn show(&self, delivery: DeliveryId) -> Result<Option<DeliveryDetail>, Error> {
        admin::show(self, delivery).await
    }

    async fn coalesced(&self, message: Uuid) -> Result<Vec<CoalescedRow>, Error> {
        unique::coalesced(self, message).await
    }

    async fn deliveries_of(&self, message: Uuid) -> Result<Option<(Envelope, Vec<DeliveryId>)>, Error> {
        admin::deliveries_of(self, message).await
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
        admin::subscriptions(self).await
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
        admin::stranded(self).await
    }

    async fn held_back(&self, longer_than: Duration) -> Result<Option<HeldBack>, Error> {
        admin::held_back(self, longer_than).await
    }

    async fn audit(&self, limit: u32) -> Result<Vec<AuditEntry>, Error> {
        admin::audit(self, limit).await
    }
}
