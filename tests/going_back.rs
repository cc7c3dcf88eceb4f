//! Migrations taken back, killed half-way, and met by programs of other versions.

use std::time::Duration;

use postbox::admin::{Filter, Retry};
use postbox::{Envelope, Error, Failure, Postbox, Postgres, Router, handler};
use postbox_testkit::{Fresh, Testable, on_both_stores};
use sqlx::{Connection, PgConnection};

on_both_stores!(nothing_is_lost_unasked, down_leaves_nothing_and_up_brings_it_back);

fn refused(result: Result<Vec<String>, Error>) -> String {
    match result {
        Err(Error::Refused(words)) => words,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

async fn version<Db: Testable>(postbox: &Postbox<Db>) -> usize {
    let status = postbox.migration_status().await.expect("status");
    status.migrations.iter().filter(|(_, _, at)| at.is_some()).count()
}

async fn nothing_is_lost_unasked<Db: Testable>() {
    let fresh = Db::fresh().await;
    let all = version(&fresh.postbox).await;
    assert!(refused(fresh.postbox.migrate_down(99).await).contains("no going down to 99"));
    let app = || Router::new().on("t", handler(async |_: Envelope| {}).named("h"));
    let worker = fresh.postbox.worker(app()).start().await.expect("start");
    assert!(refused(fresh.postbox.migrate_down(0).await).contains("1 worker"));
    worker.stop(None).await.expect("stop");
    fresh.postbox.publish_now([Envelope::json("t", &1), Envelope::json("u", &2)]).await.expect("publish");
    let words = refused(fresh.postbox.migrate_down(0).await);
    assert!(words.contains("messages: 2, unfinished deliveries: 1, of them in doubt: 0"), "{words}");
    assert_eq!(version(&fresh.postbox).await, all, "not even the first step");
    // A finished message is one, too.
    let worker = fresh.postbox.worker(app()).start().await.expect("start");
    loop {
        let done = fresh.postbox.admin().list(&"state:succeeded".parse().expect("a filter"), 10).await.expect("list");
        if done.len() == 1 {
            break;
        }
        tokio::task::yield_now().await;
    }
    worker.stop(None).await.expect("stop");
    let words = refused(fresh.postbox.migrate_down(0).await);
    assert!(words.contains("messages: 2, unfinished deliveries: 0"), "{words}");
    assert_eq!(fresh.postbox.migrate_down_and_lose_data(0).await.expect("down").len(), all);
}

async fn down_leaves_nothing_and_up_brings_it_back<Db: Testable>() {
    let fresh = Db::fresh().await;
    let all = version(&fresh.postbox).await;
    for _ in 0..2 {
        let gone = fresh.postbox.migrate_down(0).await.expect("down");
        assert_eq!((gone.len(), gone.last().map(String::as_str)), (all, Some("0001 engine")));
        assert_eq!(version(&fresh.postbox).await, 0);
        assert_eq!(things(&fresh).await, 0, "something is left");
        assert_eq!(fresh.postbox.migrate_down(0).await.expect("nothing to do"), [""; 0]);
        assert_eq!(fresh.postbox.migrate_up().await.expect("up").len(), all);
    }
    fresh.postbox.publish_now([Envelope::json("t", &1)]).await.expect("publish");
}

/// Whatever postbox makes in a database.
async fn things<Db: Testable>(fresh: &Fresh<Db>) -> i64 {
    let schema = fresh.schema();
    let sql = match <Db as Testable>::NAME {
        "sqlite" => "select count(*) from sqlite_schema where name like 'postbox%'".to_owned(),
        _ => format!(
            "select (select count(*) from pg_namespace where nspname = '{schema}')
                + (select count(*) from pg_roles where rolname ~ '^{schema}_(publisher|worker|operator|viewer)$')"
        ),
    };
    Db::count(fresh, &sql).await
}

async fn sql(fresh: &Fresh<Postgres>, text: &str) {
    Postgres::execute(fresh, &text.replace("{s}", &fresh.schema())).await;
}

/// From this version down to the first, no step changes `subscription`.
const CHANGES_NOTHING_READ: u32 = 10;

/// The version that made `message` what it is; going back from it makes it anew.
const PRESENT: usize = 7;

#[tokio::test]
async fn what_others_put_there_stays_or_stops_it() {
    let fresh = Postgres::fresh().await;
    let all = version(&fresh.postbox).await;
    sql(&fresh, "create table {s}.theirs (a int); create view {s}.report as select id from {s}.message").await;
    // Their view stands on a table of ours: a step fails, and leaves the version before it, whole.
    let error = fresh.postbox.migrate_down(0).await.expect_err("the view is in the way").to_string();
    assert!(error.contains("2BP01"), "{error}");
    assert_eq!(version(&fresh.postbox).await, PRESENT);
    sql(&fresh, "drop view {s}.report").await;
    assert_eq!(fresh.postbox.migrate_down(0).await.expect("down").len(), PRESENT);
    let schema = fresh.schema();
    let tables = format!("select count(*) from pg_class where relnamespace = '{schema}'::regnamespace");
    assert_eq!(Postgres::count(&fresh, &tables).await, 1, "their table, and its schema");
    assert_eq!(fresh.postbox.migrate_up().await.expect("up").len(), all);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_half_way_it_is_of_one_version() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    let all = version(&fresh.postbox).await;
    let mut settings = fresh.settings.clone();
    settings = settings.set("application", format!("{schema}_down"));
    let postbox: Postbox<Postgres> = Postbox::open(settings).await.expect("open");
    // Steps above change the table that is read below.
    fresh.postbox.migrate_down(CHANGES_NOTHING_READ).await.expect("down");
    // Some steps are done; the last waits for somebody who reads a table of the engine, mid-way.
    let mut reader = PgConnection::connect(&fresh.url()).await.expect("connect");
    let mut reading = reader.begin().await.expect("begin");
    let read = format!("select count(*) from {schema}.subscription");
    sqlx::query(sqlx::AssertSqlSafe(read)).execute(&mut *reading).await.expect("read");
    let going = tokio::spawn(async move { postbox.migrate_down(0).await });
    let waits = format!(
        "select count(*) from pg_stat_activity where application_name = '{schema}_down' and wait_event_type = 'Lock'"
    );
    // A step before may have to wait a moment, too: roles are everybody's.
    let waits_there = format!("{waits} and query like '%what 0001_engine made%'");
    while Postgres::count(&fresh, &waits_there).await == 0 {
        assert!(!going.is_finished(), "it did not wait");
        tokio::task::yield_now().await;
    }
    let kill = format!(
        "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = '{schema}_down'"
    );
    Postgres::count(&fresh, &kill).await;
    assert!(going.await.expect("no panic").is_err());
    assert_eq!(version(&fresh.postbox).await, 1, "the engine is whole");
    reading.rollback().await.expect("rollback");
    assert_eq!(fresh.postbox.migrate_up().await.expect("up").len(), all - 1);
    fresh.postbox.publish_now([Envelope::json("t", &1)]).await.expect("publish");

    // The way up, killed in its first migration: nothing is there, and the next try does it all.
    fresh.postbox.migrate_down_and_lose_data(0).await.expect("down");
    let mut other = PgConnection::connect(&fresh.url()).await.expect("connect");
    let mut making = other.begin().await.expect("begin");
    // Somebody else makes the schema at the same moment: this one waits on its name.
    let make = format!("create schema {schema}");
    sqlx::query(sqlx::AssertSqlSafe(make)).execute(&mut *making).await.expect("made");
    let settings = fresh.settings.clone().set("application", format!("{schema}_down"));
    let going = tokio::spawn(async move { Postbox::<Postgres>::migrate(settings).await.map(|_| ()) });
    while Postgres::count(&fresh, &waits).await == 0 {
        assert!(!going.is_finished(), "it did not wait");
        tokio::task::yield_now().await;
    }
    Postgres::count(&fresh, &kill).await;
    assert!(going.await.expect("no panic").is_err());
    making.rollback().await.expect("rollback");
    assert_eq!((version(&fresh.postbox).await, things(&fresh).await), (0, 0));
    assert_eq!(fresh.postbox.migrate_up().await.expect("up").len(), all);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_of_another_version_work_or_refuse() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    let all = version(&fresh.postbox).await;
    let opened = |what: &'static str| {
        let settings = fresh.settings.clone();
        async move {
            match Postbox::<Postgres>::open(settings).await {
                Err(error @ Error::Schema { .. }) => error.to_string(),
                other => panic!("{what}: {:?}", other.map(|_| ())),
            }
        }
    };
    // A running worker, and the schema goes on to a version that it does not know: it works on.
    let app = || {
        Router::new()
            .on("t", handler(async |_: Envelope| {}).named("h"))
            .on("dies", handler(async || Err::<(), Failure>(Failure::permanent("no"))).named("d"))
    };
    let worker = fresh.postbox.worker(app()).poll_interval(Duration::from_millis(20)).start().await.expect("start");
    let next = format!("insert into {{s}}.migration (version, name) values ({}, 'later')", all + 1);
    sql(&fresh, &next).await;
    let words = opened("newer").await;
    assert!(words.contains("update the program"), "{words}");
    for refusal in [fresh.postbox.migrate_up().await, fresh.postbox.migrate_down(0).await] {
        assert!(matches!(refusal, Err(Error::Schema { .. })), "{refusal:?}");
    }
    let done = async |count: usize| {
        fresh.postbox.publish_now([Envelope::json("t", &1)]).await.expect("publish");
        let filter: Filter = "state:succeeded".parse().expect("a filter");
        while fresh.postbox.admin().list(&filter, 10).await.expect("list").len() < count {
            tokio::task::yield_now().await;
        }
    };
    done(1).await;
    sql(&fresh, &format!("delete from {{s}}.migration where version = {}", all + 1)).await;

    // It goes back to one that it does not know any more: what still can, works; the rest is an error
    // and changes nothing.
    fresh.postbox.publish_now([Envelope::json("dies", &1)]).await.expect("publish");
    let dead = loop {
        let dead = fresh.postbox.admin().list(&"state:dead".parse().expect("a filter"), 10).await.expect("list");
        if let [dead] = dead.as_slice() {
            break dead.clone();
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(fresh.postbox.migrate_down_and_lose_data(1).await.expect("down").len(), all - 1);
    let words = opened("older").await;
    assert!(words.contains("is at version 1") && words.contains("migrate up"), "{words}");
    // Its tables have another shape.
    let refused = fresh.postbox.publish_now([Envelope::json("t", &1)]).await.expect_err("there is no such column");
    assert!(format!("{refused:?}").contains("42703"), "{refused:?}");
    let wish = Retry { rev: None, actor: "ana".into(), reason: "mended".into() };
    let error = fresh.postbox.admin().retry(dead.id, &wish).await.expect_err("there is no such column");
    assert!(error.to_string().contains("42703"), "{error}");
    fresh.postbox.migrate_up().await.expect("up");
    let seen = fresh.postbox.admin().show(dead.id).await.expect("show");
    assert_eq!((seen.row.state, seen.row.rev), (dead.state, dead.rev), "not half");
    done(2).await;
    assert_eq!(fresh.postbox.admin().retry(dead.id, &wish).await.expect("retry").seq, 1);
    worker.stop(None).await.expect("stop");
    let _ = schema;
}
