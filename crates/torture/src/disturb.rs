//! What is done to the database over connections of the run's own: sessions ended, tables locked, storms
//! of notifications, old snapshots, history made old.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::Pool;

use crate::fault::Kind;
use crate::site::{SCHEMA, Session, Site, number};
use crate::traffic::FLEETING;
use crate::world::World;

/// Between two looks at a snapshot that is held.
const LOOK: Duration = Duration::from_millis(500);
/// A snapshot that was held for this long is old; in a very short run, half of the run is.
const OLD: Duration = Duration::from_secs(5);
/// Very old is one that as many deliveries came to their end before.
const DELIVERED: i64 = 1000;

/// Ends some sessions that the server chooses: whoever is there.
pub(crate) async fn end_backends<Db: Site>(world: &World, pool: &Pool<Db>, most: u32) {
    let sql = format!(
        "select cast(count(*) filter (where pg_terminate_backend(pid)) as text) from (
            select pid from pg_stat_activity
            where backend_type = 'client backend' and pid <> pg_backend_pid() and application_name <> 'witness'
            order by random() limit {most}) chosen"
    );
    if let Ok(Ok(mut connection)) = tokio::time::timeout(Duration::from_secs(2), Db::acquire(pool)).await
        && let Ok(rows) = Db::rows(&mut connection, sql).await
        && number(&rows) > 0
    {
        world.counts.add("F4", number(&rows) as u64);
    }
}

/// Lets nobody write to one of postbox's tables for a while.
pub(crate) async fn lock_table<Db: Site>(pool: &Pool<Db>, table: &str, time: Duration) {
    let lock = async {
        // Those that come later queue up behind it, also while it waits.
        let mut session = Session::begin(pool, "BEGIN; SET LOCAL lock_timeout = '200ms'").await?;
        let seconds = time.as_secs_f64();
        session.run(format!("lock table {SCHEMA}.{table} in share mode; select pg_sleep({seconds})")).await?;
        session.end("ROLLBACK").await
    };
    tokio::time::timeout(Duration::from_secs(3), lock).await.ok();
}

/// Notifications that differ, so that none is left out, on postbox's channel and on another one.
pub(crate) async fn storm<Db: Site>(world: &World, pool: &Pool<Db>, notifications: u32, open: Duration) {
    let storm = async {
        let mut session = Session::begin(pool, "BEGIN").await?;
        // Postbox's channel has the name of its schema.
        let burst = format!(
            "select count(pg_notify(case n % 3 when 0 then 'torture_storm' else '{SCHEMA}' end,
                 n || repeat('!', n % 100))) from generate_series(1, {notifications}) n;
             select pg_sleep({})",
            open.as_secs_f64()
        );
        session.run(burst).await?;
        session.end("COMMIT").await
    };
    if matches!(tokio::time::timeout(Duration::from_secs(20), storm).await, Ok(Ok(()))) {
        world.counts.add("F9", 1);
    }
}

/// Holds a snapshot, and a new one when it is lost, until the time is over and one has grown old, or
/// until the round is over.
pub(crate) async fn old_snapshots<Db: Site>(
    world: &World,
    pool: &Pool<Db>,
    over: &AtomicBool,
    time: Duration,
    writer: bool,
) {
    let begun = Instant::now();
    let one_is_old = AtomicBool::new(false);
    let enough = || begun.elapsed() >= time && one_is_old.load(Ordering::SeqCst);
    let goes_on = || !enough() && !over.load(Ordering::SeqCst);
    while goes_on() {
        if hold(world, pool, writer, goes_on, &one_is_old).await.is_err() {
            // The server was away.
            tokio::time::sleep(LOOK).await;
        }
    }
}

async fn hold<Db: Site>(
    world: &World,
    pool: &Pool<Db>,
    writer: bool,
    goes_on: impl Fn() -> bool,
    one_is_old: &AtomicBool,
) -> Result<(), sqlx::Error> {
    let mut reader = Session::begin(pool, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let clock = format!("select cast({} as text)", Db::CLOCK);
    let since = number(&Db::rows(reader.on(), clock).await?);
    let mut idler = None;
    if writer {
        let mut session = Session::begin(pool, "BEGIN").await?;
        session.run("select pg_current_xact_id()").await?;
        idler = Some(session);
    }
    let begun = Instant::now();
    let (mut old, mut very_old) = (false, false);
    while goes_on() {
        tokio::time::sleep(LOOK).await;
        // It is there still: otherwise this fails.
        reader.run("select 1").await?;
        if !very_old && begun.elapsed() >= OLD.min(world.span / 2) {
            let delivered = delivered(pool, since).await?;
            if !old && delivered > 0 {
                old = true;
                one_is_old.store(true, Ordering::SeqCst);
                world.counts.add("F17", 1);
            }
            if delivered >= DELIVERED {
                very_old = true;
                world.counts.add("F17:delivered:1000", 1);
            }
        }
    }
    if let Some(idler) = idler {
        idler.end("ROLLBACK").await?;
    }
    reader.end("ROLLBACK").await
}

/// How many deliveries have succeeded since then.
async fn delivered<Db: Site>(pool: &Pool<Db>, since_ms: i64) -> Result<i64, sqlx::Error> {
    let since = format!("to_timestamp({since_ms} / 1000.0)");
    let sql = format!(
        "select cast(
             (select count(*) from {SCHEMA}.outcome where finished_at > {since} and state_after = 'succeeded')
             + (select coalesce(sum(cardinality(deliveries)), 0) from {SCHEMA}.outcome_part where finished_at > {since})
         as text)"
    );
    let mut connection = Db::acquire(pool).await?;
    Ok(number(&Db::rows(&mut connection, sql).await?))
}

/// As after a million messages, and after some days: the next slot of the ring is written to, and the window of
/// messages ends, so that workers have slots to empty and windows to let go.
fn later_on() -> String {
    format!(
        "select setval('postbox.delivery_id', ((last_value >> 20) + 1) << 20) from postbox.delivery_id;
         update postbox.ring set look_at = '-infinity';
         update postbox.subscription set keep_succeeded_ms = 0 where name = '{FLEETING}' and keep_succeeded_ms > 0;
         update postbox.message_window set look_at = '-infinity' where look_at > clock_timestamp();
         select postbox.cut_window(clock_timestamp()) where (select count(*) from postbox.message_window) < 12"
    )
}

/// Makes one subscription's history old as soon as it is there, so that retention has something to
/// remove: keeping it for a shorter time than an hour is nothing that a worker would declare.
pub(crate) async fn age_soon<Db: Site>(pool: Pool<Db>) {
    let sql = match Db::KIND {
        Kind::Postgres => format!(
            "update postbox.outcome_part set finished_at = finished_at - interval '40 days'
             where finished_at > clock_timestamp() - interval '1 day'
                 and subscriptions <@ array(select id from postbox.subscription where name = '{FLEETING}');
             update postbox.outcome set finished_at = finished_at - interval '40 days'
             where finished_at > clock_timestamp() - interval '1 day' and state_after = 'succeeded'
                 and subscription in (select id from postbox.subscription where name = '{FLEETING}')"
        ),
        Kind::Sqlite => format!(
            "update postbox_delivery set since = since - 40 * 86400000
             where state = 'succeeded' and since > (select now from postbox_clock) - 86400000
                 and subscription in (select id from postbox_subscription where name = '{FLEETING}');
             update postbox_success set at = at - 40 * 86400000
             where at > (select now from postbox_clock) - 86400000
                 and subscription in (select id from postbox_subscription where name = '{FLEETING}')"
        ),
    };
    let mut turn = 0_u32;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        turn += 1;
        let age = async {
            let mut connection = Db::acquire(&pool).await?;
            Db::run(&mut connection, sql.clone()).await?;
            if Db::KIND == Kind::Postgres && turn.is_multiple_of(3) {
                Db::run(&mut connection, later_on()).await?;
            }
            Ok::<(), sqlx::Error>(())
        };
        tokio::time::timeout(Duration::from_secs(5), age).await.ok();
    }
}
