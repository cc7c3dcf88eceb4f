//! What each role may do, by logins that have it and nothing else; the rest is 42501.

use std::time::Duration;

use postbox::admin::{Filter, Resolution, Retry, ScheduleEdit};
use postbox::lifecycle::{Answer, Kind, Policy};
use postbox::store::{ClaimRequest, Declared, LeaseRef, Registration, Settle, Start, Store};
use postbox::{
    Envelope, Error, Failure, Keep, Limits, Operation, OperationFailure, Postbox, Postgres, PublishError, Receipt,
    Reconciled, RetryPolicy, Router, Schedule, Scheduled, Settings, Tx, handler, operation,
};
use postbox_testkit::{Fresh, Login, Testable};
use serde_json::json;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

/// What is written once: no role may change it, or take it away.
const RECORD: [&str; 8] =
    ["message", "late_delivery", "attempt", "outcome", "outcome_part", "resolution", "observation", "audit"];

/// How long to wait for what a worker does.
const PATIENCE: Duration = Duration::from_secs(60);

async fn open(login: &Login) -> Postbox<Postgres> {
    Postbox::open(login.settings.clone()).await.expect("open as the login")
}

async fn connection(login: &Login) -> PgConnection {
    PgConnection::connect(&login.url()).await.expect("log in")
}

fn code(error: &sqlx::Error) -> String {
    error.as_database_error().and_then(|e| e.code()).map(|c| c.into_owned()).unwrap_or_else(|| error.to_string())
}

/// Says that each of these statements is refused to a login, because it may not.
async fn refused(login: &Login, statements: &[String]) {
    let mut connection = connection(login).await;
    for sql in statements {
        let error = sqlx::raw_sql(sqlx::AssertSqlSafe(sql.clone())).execute(&mut connection).await;
        let error = error.expect_err(&format!("{} may: {sql}", login.name));
        assert_eq!(code(&error), "42501", "{sql}: {error}");
    }
}

#[track_caller]
fn may_not<T: std::fmt::Debug>(result: Result<T, Error>) {
    match result {
        Err(Error::Database(error)) => assert_eq!(code(&error), "42501", "{error}"),
        other => panic!("expected 42501, got {other:?}"),
    }
}

async fn all_states(postbox: &Postbox<Postgres>) -> Vec<(String, String)> {
    let rows = postbox.admin().list(&Filter::default(), 1000).await.expect("list");
    rows.into_iter().map(|r| (r.subscription, r.state.to_string())).collect()
}

#[tokio::test]
async fn a_publisher_publishes_and_reads_nothing() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    let login = Login::with(&fresh, &["publisher"]).await;
    let publisher = open(&login).await;
    assert!(publisher.migration_status().await.expect("it may know").migrations.iter().all(|(_, _, at)| at.is_some()));

    // In its own transaction, as with any other role.
    let mut caller = connection(&login).await;
    let mut tx = caller.begin().await.expect("begin");
    publisher.publish(&mut tx, Envelope::json("orders.placed", &1)).await.expect("publish");
    tx.rollback().await.expect("rollback");
    assert_eq!(Postgres::count(&fresh, &format!("select count(*) from {schema}.message")).await, 0);

    let due = jiff::Timestamp::now() + Duration::from_secs(3600);
    let draft = || {
        let draft = Envelope::raw("orders.placed", r#"{"a": 1.10, "b": "é"}"#).expect("JSON");
        draft.key("42").header("h", "v").dedup("once").max_attempts(7).source("shop").external_id("x-1")
    };
    let draft = || draft().correlation_id("c-1").causation_id("c-0").occurred_at(due).after(Duration::from_secs(60));
    let mut tx = caller.begin().await.expect("begin");
    let first = publisher.publish(&mut tx, draft()).await.expect("publish");
    assert!(!first.is_duplicate());
    let again = publisher.publish(&mut tx, draft()).await.expect("publish");
    assert_eq!((again.id, again.is_duplicate()), (first.id, true));
    let other = Envelope::json("orders.placed", &2).map(|d| d.dedup("once"));
    match publisher.publish(&mut tx, other).await {
        Err(PublishError::DedupConflict { existing, .. }) => assert_eq!(existing, first.id),
        other => panic!("{other:?}"),
    }
    // The conflict cost nothing: the transaction goes on.
    let many = publisher.publish_all(&mut tx, (0..3).map(|n| Envelope::json("orders.many", &n))).await.expect("more");
    let at = publisher.publish(&mut tx, Envelope::json("orders.due", &0).map(|d| d.at(due))).await.expect("publish");
    tx.commit().await.expect("commit");
    let now = publisher.publish_now([Envelope::json("orders.now", &0)]).await.expect("publish");

    let (stored, _) = fresh.postbox.admin().message(first.id).await.expect("it is there");
    assert_eq!(stored.decode::<serde_json::Value>().expect("JSON"), json!({"a": 1.10, "b": "é"}));
    assert_eq!((stored.key.as_deref(), stored.max_attempts), (Some("42"), Some(7)));
    assert_eq!((stored.source.as_deref(), stored.external_id.as_deref()), (Some("shop"), Some("x-1")));
    assert_eq!(stored.headers.get("h").map(String::as_str), Some("v"));
    assert_eq!((stored.correlation_id.as_deref(), stored.causation_id.as_deref()), (Some("c-1"), Some("c-0")));
    assert_eq!(stored.occurred_at.as_microsecond(), due.as_microsecond());
    for published in many.iter().chain([&at, &now[0]]) {
        fresh.postbox.admin().message(published.id).await.expect("it is there");
    }
    let due_at = format!(
        "select count(*) from {schema}.message where id in ('{}', '{}') and due_at > clock_timestamp() + interval '50 s'",
        first.id, at.id
    );
    assert_eq!(Postgres::count(&fresh, &due_at).await, 2);
    // The function's own limit, told before the transaction could fail of it.
    let large = login.settings.clone().set("max_payload_bytes", 4 << 20);
    let large: Postbox<Postgres> = Postbox::open(large).await.expect("open");
    match large.publish(&mut caller, Envelope::json("t", &"x".repeat(2 << 20))).await {
        Err(PublishError::PayloadTooLarge { limit, .. }) => assert_eq!(limit, 1 << 20),
        other => panic!("{:?}", other.map(|p| p.id)),
    }

    // And nothing else.
    let nulls = vec!["null"; 17].join(", ");
    let mut statements: Vec<String> = ["message", "ready", "dedup", "audit", "migration", "delivery", "attempts"]
        .iter()
        .map(|table| format!("select * from {schema}.{table}"))
        .collect();
    statements.extend(RECORD.iter().map(|table| format!("delete from {schema}.{table}")));
    statements.push(format!("select * from {schema}.publish_batch({nulls})"));
    statements.push(format!("select {schema}.uuid7()"));
    statements.push(format!("select {schema}.record_action('a', 'b', 1, 1, 1, 1, 'c', 'd', 'e', null)"));
    statements.push(format!("select nextval('{schema}.delivery_id')"));
    statements.push(format!("create table {schema}.mine (a int)"));
    refused(&login, &statements).await;
    may_not(publisher.admin().list(&Filter::default(), 10).await);
    may_not(publisher.admin().status().await);
    may_not(publisher.admin().pause("test", "plain", "ana", "x").await);
    may_not(publisher.worker(Router::new()).start().await.map(|_| ()));
    may_not(publisher.migrate_down_and_lose_data(0).await);
}

#[tokio::test]
async fn a_caller_with_another_role_than_the_postbox_publishes_through_the_function() {
    let fresh = Postgres::fresh().await;
    let login = Login::with(&fresh, &["publisher"]).await;
    let mut caller = connection(&login).await;
    match fresh.postbox.publish(&mut caller, Envelope::json("t", &1)).await {
        Err(PublishError::Database(error)) => assert_eq!(code(&error), "42501"),
        other => panic!("{:?}", other.map(|p| p.id)),
    }
    let settings = fresh.settings.clone().set("publish_through_function", true);
    let postbox: Postbox<Postgres> = Postbox::open(settings).await.expect("open");
    let published = postbox.publish(&mut caller, Envelope::json("t", &1)).await.expect("publish");
    fresh.postbox.admin().message(published.id).await.expect("it is there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_works_and_the_record_stays_as_it_is() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    let login = Login::with(&fresh, &["worker"]).await;
    let postbox = open(&login).await;
    // There before the worker: its history.
    postbox.publish_now([Envelope::json("t.a", &1)]).await.expect("publish");
    let brief = Envelope::json("t.b", &1).map(|d| d.dedup_within("k", Duration::from_millis(1)));
    postbox.publish_now([brief]).await.expect("publish");
    let fails_once = async |attempt: postbox::Attempt| match attempt.number {
        1 => Err(Failure::retry_after("not yet", Duration::ZERO)),
        _ => Ok(()),
    };
    let app = Router::new()
        .on("t.*", handler(fails_once).named("plain"))
        .on(
            "t.*",
            handler(async |mut tx: Tx<Postgres>| -> Result<(), Failure> {
                sqlx::query("select 1").execute(&mut tx).await?;
                Ok(())
            })
            .named("in_tx")
            .from_beginning(),
        )
        .on(
            "t.*",
            operation(async |_: Operation| -> Result<Receipt, OperationFailure> {
                Err(std::io::Error::other("the connection broke after it was sent").into())
            })
            .named("charge")
            .reconcile(async |op: Operation| Ok(Reconciled::Done(Receipt::of(op.idempotency_key())))),
        )
        .on(
            "t.*",
            operation(async |_: Operation| -> Result<Receipt, OperationFailure> {
                Ok(Receipt::none().then(Envelope::json("u.followed", &1)))
            })
            .named("ship"),
        );
    let worker = postbox.worker(app).poll_interval(Duration::from_millis(20)).start().await.expect("start");
    let waited = async {
        loop {
            let done = all_states(&fresh.postbox).await;
            assert!(done.iter().all(|(_, state)| state != "dead"), "{done:?}");
            if done.iter().filter(|(_, state)| state == "succeeded").count() == 8 {
                break;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, waited).await.expect("all of it is done");
    worker.stop(None).await.expect("stop");

    // Another one dies with an operation begun, and a plain delivery in its hands.
    let declared = |name: &str, kind| Declared {
        name: name.into(),
        renamed_from: vec![],
        pattern: "v.*".parse().expect("a pattern"),
        policy: Policy { kind, idempotent: false, retry: RetryPolicy::default() },
        timeout: Duration::from_secs(60),
        quiet: Duration::ZERO,
        reconciles: false,
        continues: false,
        start: Start::Unrouted,
        keep: Keep::default(),
        limits: Limits::default(),
        keys: None,
        unique: None,
    };
    let registration = Registration {
        worker: Uuid::now_v7(),
        name: "hand".into(),
        application: "other".into(),
        lease: Duration::from_secs(60),
        subscriptions: vec![declared("begun", Kind::Operation), declared("held", Kind::Plain)],
    };
    let store = postbox.store();
    let ids = store.register(&registration).await.expect("register");
    postbox.publish_now([Envelope::json("v.w", &1)]).await.expect("publish");
    store.learn_routes(&["v.w".into()]).await.expect("learn");
    store.asleep(registration.worker, true).await.expect("sleep");
    let wanted = ids.iter().map(|id| (*id, 10)).collect();
    let claimed = store
        .claim(&ClaimRequest {
            worker: registration.worker,
            token: Uuid::now_v7(),
            wanted,
            metered: Vec::new(),
            by_key: Vec::new(),
            full: Vec::new(),
            sorts: true,
        })
        .await
        .expect("claim");
    let operation = claimed.items.iter().find(|i| i.subscription == ids[0]).expect("the operation");
    let begun = Settle {
        lease: LeaseRef { worker: registration.worker, batch: claimed.batch, token: claimed.token },
        part: 1,
        successes: vec![],
        moves: vec![],
        released: vec![],
        seen: vec![],
        follow_ups: vec![],
        starts: vec![(operation.delivery, 1)],
        close: false,
    };
    store.settle(&begun).await.expect("begin");
    Postgres::kill(&fresh, postbox.clone(), registration.worker).await;
    let taken = store.take_over(0.0).await.expect("take over").expect("somebody dead");
    assert_eq!((taken.pending, taken.in_doubt), (1, 1));
    assert_eq!(store.stranded().await.expect("stranded").len(), 2);
    let expired = format!("select count(*) from {schema}.dedup where expires_at < clock_timestamp()");
    if Postgres::count(&fresh, &expired).await > 0 {
        store.tidy().await.expect("tidy");
    }
    assert_eq!(Postgres::count(&fresh, &expired).await, 0, "what had run out is tidied");

    let mut statements: Vec<String> = Vec::new();
    for table in RECORD {
        let column = match table {
            "message" => "topic = 'x'",
            "outcome_part" => "part = 0",
            _ => "delivery = 0",
        };
        statements.push(format!("update {schema}.{table} set {column}"));
        statements.push(format!("delete from {schema}.{table}"));
        statements.push(format!("truncate {schema}.{table}"));
    }
    statements.push(format!("select * from {schema}.audit"));
    statements.push(format!("insert into {schema}.audit (seq, actor, action) values (1, 'a', 'b')"));
    statements.push(format!("update {schema}.audit_counter set seq = 0"));
    statements.push(format!("select {schema}.record_action('a', 'b', 1, 1, 1, 1, 'c', 'd', 'e', null)"));
    statements.push(format!("delete from {schema}.migration"));
    statements.push(format!("update {schema}.subscription set paused_at = now()"));
    refused(&login, &statements).await;
    // An operator's verbs are not a worker's.
    let doubt = postbox.store().doubts(&ids, 10, Duration::ZERO).await.expect("doubts");
    assert!(doubt.is_empty(), "it has no hook to ask");
    may_not(postbox.admin().resolve(operation.delivery, &word()).await);
    may_not(postbox.admin().pause("other", "held", "ana", "x").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_owners_least_time_holds_whatever_a_worker_declares() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    let login = Login::with(&fresh, &["worker"]).await;
    let postbox = open(&login).await;
    for topic in ["t.a", "unrouted"] {
        postbox.publish_now([Envelope::json(topic, &1)]).await.expect("publish");
    }
    let app = Router::new().on("t.a", handler(async |_: Envelope| {}).named("a"));
    let worker = postbox.worker(app).poll_interval(Duration::from_millis(20)).start().await.expect("start");
    let succeeded = async { while all_states(&fresh.postbox).await != [("a".into(), "succeeded".into())] {} };
    tokio::time::timeout(PATIENCE, succeeded).await.expect("done");
    worker.stop(None).await.expect("stop");

    // It says that nothing is to be kept; the owner says an hour.
    let mut connection = connection(&login).await;
    let least = format!("update {schema}.retention set keep_at_least_ms = 3600000");
    refused(&login, std::slice::from_ref(&least)).await;
    Postgres::execute(&fresh, &least).await;
    let shorten = format!("update {schema}.subscription set keep_succeeded_ms = 0, keep_dead_ms = 0");
    sqlx::query(sqlx::AssertSqlSafe(shorten)).execute(&mut connection).await.expect("its own word");
    let retain = format!("select deliveries + messages from {schema}.retain(0, 100, true)");
    let mut removed = async || -> i64 {
        sqlx::query_scalar(sqlx::AssertSqlSafe(retain.clone())).fetch_one(&mut connection).await.expect("retain")
    };
    assert_eq!(removed().await, 0);
    let preview = fresh.postbox.admin().retention_preview(Duration::ZERO).await.expect("preview");
    assert!(preview.deliveries.is_empty() && preview.messages == 0, "{preview:?}");
    Postgres::execute(&fresh, &format!("update {schema}.retention set keep_at_least_ms = 0")).await;
    postbox_testkit::end_window(&fresh).await;
    assert_eq!(removed().await, 3, "a delivery and two messages");
}

fn word() -> Resolution {
    Resolution {
        rev: None,
        answer: Answer::Happened,
        evidence: None,
        actor: "ana".into(),
        reason: "seen at the provider".into(),
    }
}

fn again() -> Retry {
    Retry { rev: None, actor: "ana".into(), reason: "mended".into() }
}

/// A delivery in doubt and a dead one.
async fn troubled(fresh: &Fresh<Postgres>) -> (i64, i64) {
    let app = Router::new()
        .on(
            "t",
            operation(async |_: Operation| -> Result<Receipt, OperationFailure> {
                Err(std::io::Error::other("the connection broke after it was sent").into())
            })
            .named("charge"),
        )
        .on("t", handler(async || Err::<(), Failure>(Failure::permanent("no"))).named("plain"));
    let worker = fresh.postbox.worker(app).poll_interval(Duration::from_millis(20)).start().await.expect("start");
    fresh.postbox.publish_now([Envelope::json("t", &1)]).await.expect("publish");
    let found = async {
        loop {
            let rows = fresh.postbox.admin().list(&Filter::default(), 10).await.expect("list");
            let of = |state: &str| rows.iter().find(|r| r.state.to_string() == state).map(|r| r.id);
            if let (Some(doubt), Some(dead)) = (of("in_doubt"), of("dead")) {
                break (doubt, dead);
            }
            tokio::task::yield_now().await;
        }
    };
    let found = tokio::time::timeout(PATIENCE, found).await.expect("a doubt and a dead letter");
    worker.stop(None).await.expect("stop");
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_operates_and_the_audit_names_the_login() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    let (doubt, dead) = troubled(&fresh).await;
    let login = Login::with(&fresh, &["operator"]).await;
    let postbox = open(&login).await;
    let admin = postbox.admin();
    admin.status().await.expect("status");
    assert_eq!(admin.show(doubt).await.expect("show").attempts.len(), 1);
    assert_eq!(admin.resolve(doubt, &word()).await.expect("resolve").seq, 1);
    assert!(matches!(admin.resolve(doubt, &word()).await, Err(Error::Conflict(_))), "the loser is on record");
    assert_eq!(admin.retry(dead, &again()).await.expect("retry").seq, 3);
    assert_eq!(admin.remove_subscription("test", "plain", "ana", "gone").await.expect("remove").seq, 4);
    assert_eq!(admin.audit(10).await.expect("audit").len(), 4);
    let logins = format!("select count(*) from {schema}.audit where login = '{}'", login.name);
    assert_eq!(Postgres::count(&fresh, &logins).await, 4, "whatever they call themselves");

    assert_eq!(admin.pause("test", "charge", "ana", "the bank is down").await.expect("pause").seq, 5);
    assert_eq!(admin.resume("test", "charge", "ana", "it is back").await.expect("resume").seq, 6);

    let mut statements: Vec<String> = RECORD.iter().map(|table| format!("delete from {schema}.{table}")).collect();
    statements.extend(RECORD.iter().map(|table| format!("truncate {schema}.{table}")));
    statements.push(format!("update {schema}.audit set actor = 'x'"));
    statements.push(format!("update {schema}.attempt set number = 2"));
    statements.push(format!("update {schema}.outcome set error = null"));
    statements.push(format!("update {schema}.resolution set reason = null"));
    statements.push(format!("insert into {schema}.audit (seq, actor, action) values (9, 'a', 'b')"));
    statements.push(format!("update {schema}.audit_counter set seq = 0"));
    statements.push(format!(
        "insert into {schema}.attempt (delivery, number, batch, worker) values (1, 9, 1, gen_random_uuid())"
    ));
    statements.push(format!("update {schema}.subscription set name = 'x'"));
    statements.push(format!("select {schema}.publish('t', '1')"));
    refused(&login, &statements).await;
    let outcome = format!(
        "insert into {schema}.outcome (delivery, number, kind, state_after, rev, subscription, message, batch, worker, started_at, finished_at)
         values ({dead}, 9, 'succeeded', 'succeeded', 9, 1, gen_random_uuid(), 1, gen_random_uuid(), now(), now())"
    );
    refused(&login, &[outcome]).await;
    may_not(postbox.worker(Router::new()).start().await.map(|_| ()));
    match postbox.publish_now([Envelope::json("t", &1)]).await {
        Err(Error::Publish(PublishError::Database(error))) => assert_eq!(code(&error), "42501"),
        other => panic!("{:?}", other.map(|p| p.len())),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_viewer_looks_at_everything_and_changes_nothing() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    let (doubt, dead) = troubled(&fresh).await;
    let login = Login::with(&fresh, &["viewer"]).await;
    let postbox = open(&login).await;
    let admin = postbox.admin();
    let status = admin.status().await.expect("status");
    assert_eq!((status.subscriptions.len(), admin.list(&Filter::default(), 10).await.expect("list").len()), (2, 2));
    let shown = admin.show(doubt).await.expect("show");
    assert_eq!(shown.envelope.map(|e| e.to_json().is_empty()), Some(false), "payloads, too");
    admin.audit(10).await.expect("audit");
    may_not(admin.resolve(doubt, &word()).await);
    may_not(admin.retry(dead, &again()).await);
    may_not(admin.remove_subscription("test", "plain", "ana", "gone").await);
    may_not(admin.pause("test", "plain", "ana", "x").await);
    assert_eq!(fresh.postbox.admin().audit(10).await.expect("audit").len(), 0);

    // All there is can be read; a relation that is new must be named in roles.sql.
    let unread = format!(
        "select coalesce(string_agg(c.relname, ', '), '') from pg_class c
         where c.relnamespace = '{schema}'::regnamespace and c.relkind in ('r', 'v', 'p')
             -- Partitions are read through their parent.
             and not c.relispartition and not has_table_privilege('{}', c.oid, 'select')",
        login.name
    );
    let unread: String = sqlx::query_scalar(sqlx::AssertSqlSafe(unread)).fetch_one(&fresh.pool).await.expect("names");
    assert_eq!(unread, "");
    let writes = format!(
        "select count(*) from pg_class c
         where c.relnamespace = '{schema}'::regnamespace and c.relkind in ('r', 'v', 'p')
             and (has_any_column_privilege('{0}', c.oid, 'insert') or has_any_column_privilege('{0}', c.oid, 'update')
                 or has_table_privilege('{0}', c.oid, 'delete') or has_table_privilege('{0}', c.oid, 'truncate'))",
        login.name
    );
    assert_eq!(Postgres::count(&fresh, &writes).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_changes_schedules_a_worker_publishes_them_and_a_viewer_sees_them() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    let [operator, working, viewer, publisher] = [
        Login::with(&fresh, &["operator"]).await,
        Login::with(&fresh, &["worker"]).await,
        Login::with(&fresh, &["viewer"]).await,
        Login::with(&fresh, &["publisher"]).await,
    ];
    let schedule = || Schedule::cron("s", "0 0 1 1 *").publishes("yearly");
    let operates = open(&operator).await;
    let admin = operates.admin();
    admin.add_schedule("test", schedule(), "ana", "wanted").await.expect("add");
    let edit = ScheduleEdit { payload: Some("2".into()), ..ScheduleEdit::default() };
    admin.edit_schedule("test", "s", &edit, "ana", "a new version").await.expect("edit");
    admin.pause_schedule("test", "s", "ana", "not now").await.expect("pause");
    admin.run_schedule("test", "s", "ana", "just once").await.expect("run");
    assert!(operates.store().tick().await.is_err(), "it may not publish");
    let works = open(&working).await;
    assert_eq!(works.store().tick().await.expect("tick").published, 1);
    assert_eq!(works.schedule(schedule()).await.expect("declare"), Scheduled::Edited);
    works.schedule(Schedule::cron("other", "@daily").publishes("daily")).await.expect("declare");
    may_not(works.admin().resume_schedule("test", "s", "ana", "x").await);
    let views = open(&viewer).await;
    assert_eq!(views.admin().schedules().await.expect("schedules").len(), 2);
    may_not(views.admin().run_schedule("test", "s", "ana", "x").await);
    may_not(views.schedule(schedule()).await);
    let publishes = open(&publisher).await;
    may_not(publishes.admin().schedules().await);
    refused(&publisher, &[format!("select * from {schema}.schedule"), format!("delete from {schema}.schedule")]).await;
    admin.remove_schedule("test", "s", "ana", "gone").await.expect("remove");
    assert_eq!(admin.audit(10).await.expect("audit").len(), 5);
}

#[tokio::test]
async fn nobody_may_change_the_record_and_functions_are_for_those_named() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    for role in ["publisher", "worker", "operator", "viewer"] {
        for table in RECORD {
            let may = format!(
                "select (has_any_column_privilege('{schema}_{role}', '{schema}.{table}', 'update')
                    or has_table_privilege('{schema}_{role}', '{schema}.{table}', 'delete, truncate, trigger, references'))::int::bigint"
            );
            assert_eq!(Postgres::count(&fresh, &may).await, 0, "{role} may change {table}");
        }
        let owns = format!(
            "select (has_schema_privilege('{schema}_{role}', '{schema}', 'create')
                or r.rolsuper or r.rolcanlogin or r.rolcreaterole or r.rolcreatedb)::int::bigint
             from pg_roles r where r.rolname = '{schema}_{role}'"
        );
        assert_eq!(Postgres::count(&fresh, &owns).await, 0, "{role}");
    }
    let open_to_all = format!(
        "select coalesce(string_agg(p.proname, ', '), '') from pg_proc p
         where p.pronamespace = '{schema}'::regnamespace
             and exists (select from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a where a.grantee = 0)"
    );
    let names: String =
        sqlx::query_scalar(sqlx::AssertSqlSafe(open_to_all)).fetch_one(&fresh.pool).await.expect("names");
    assert_eq!(names, "", "anybody may run these: name them in roles.sql");
    let soft = format!(
        "select coalesce(string_agg(p.proname, ', '), '') from pg_proc p
         where p.pronamespace = '{schema}'::regnamespace and p.prosecdef
             and not coalesce(p.proconfig, '{{}}') @> array['search_path=pg_catalog, pg_temp']"
    );
    let names: String = sqlx::query_scalar(sqlx::AssertSqlSafe(soft)).fetch_one(&fresh.pool).await.expect("names");
    assert_eq!(names, "", "these act for their owner on the caller's search path");
    // And somebody with no role at all.
    let login = Login::with(&fresh, &[]).await;
    refused(&login, &[format!("select {schema}.publish('t', '1')"), format!("select * from {schema}.message")]).await;
    may_not(Postbox::<Postgres>::open(login.settings.clone()).await.map(|_| ()));
}

#[tokio::test]
async fn planted_objects_do_not_run_with_the_owners_rights() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    let login = Login::with(&fresh, &["publisher", "operator"]).await;
    let evil = format!("{}_evil", login.name);
    Postgres::execute(&fresh, &format!("create schema {evil} authorization {}", login.name)).await;
    let mut attacker = connection(&login).await;
    // Better matches than the built-in ones, on a path that names the attacker's schema first.
    let trap = |head: &str, answer: &str| {
        format!(
            "create function {evil}.{head} language plpgsql as $$ begin
                insert into {evil}.caught values (current_user::pg_catalog.text); return {answer}; end $$;"
        )
    };
    let mut plant = format!("create table {evil}.caught (who text);");
    for (head, answer) in [
        ("now() returns timestamptz", "pg_catalog.now()"),
        ("clock_timestamp() returns timestamptz", "pg_catalog.clock_timestamp()"),
        ("octet_length(text) returns int", "1"),
        ("format(text, text, text, uuid) returns text", "'x'"),
        ("jsonb_typeof(jsonb) returns text", "'object'"),
        ("unnest(text[]) returns text", "'x'"),
        ("uuid7() returns uuid", "pg_catalog.gen_random_uuid()"),
        ("pg_notify(text, text) returns int", "1"),
        ("same(text, text) returns boolean", "true"),
        ("less(int, int) returns boolean", "false"),
        ("times(interval, bigint) returns interval", "interval '0'"),
        ("word(jsonb) returns text", "'{}'"),
    ] {
        plant.push_str(&trap(head, answer));
    }
    plant.push_str(&format!(
        "create operator {evil}.= (function = {evil}.same, leftarg = text, rightarg = text);
         create operator {evil}.~ (function = {evil}.same, leftarg = text, rightarg = text);
         create operator {evil}.> (function = {evil}.less, leftarg = int, rightarg = int);
         create operator {evil}.* (function = {evil}.times, leftarg = interval, rightarg = bigint);
         create temp table message (id uuid); create temp table dedup (topic text, key text);
         create temp table routing (epoch bigint, channel text); create temp table audit (seq bigint);
         create domain pg_temp.text as pg_catalog.int4; create domain pg_temp.uuid as pg_catalog.int4;
         create domain pg_temp.jsonb as pg_catalog.int4;
         create table {evil}.message (id int); create table {evil}.audit_counter (seq bigint);
         set search_path = {evil}, pg_temp, pg_catalog;"
    ));
    sqlx::raw_sql(sqlx::AssertSqlSafe(plant)).execute(&mut attacker).await.expect("planted");
    for call in [
        format!(
            "select {schema}.publish('a.b'::pg_catalog.text, '{{\"a\": [1, {{}}]}}'::pg_catalog.jsonb, key => 'k', headers => '{{\"h\": \"v\"}}', after => '1 s', dedup_key => 'd')"
        ),
        format!(
            "select stored from {schema}.publish_checked('a.b', '{{\"a\": [1, {{}}]}}', key => 'k', dedup_key => 'd')"
        ),
        format!("select * from {schema}.schema_version()"),
        format!("select * from {schema}.record_action('a', 'b', 1, 1, 1, 1, 'c', 'd', 'e', null)"),
    ] {
        sqlx::raw_sql(sqlx::AssertSqlSafe(call.clone()))
            .execute(&mut attacker)
            .await
            .unwrap_or_else(|e| panic!("{call}: {e}"));
    }
    // The traps work: by itself the attacker falls into them.
    sqlx::raw_sql("select now()").execute(&mut attacker).await.expect("now");
    let caught = sqlx::query_scalar::<_, String>(sqlx::AssertSqlSafe(format!(
        "select pg_catalog.string_agg(who, ', ') from {evil}.caught"
    )));
    assert_eq!(
        caught.fetch_one(&fresh.pool).await.expect("a list"),
        login.name,
        "a planted function ran for somebody else"
    );
    assert_eq!(Postgres::count(&fresh, &format!("select count(*) from {schema}.message")).await, 1);
    assert_eq!(Postgres::count(&fresh, &format!("select count(*) from {schema}.audit")).await, 1);
    attacker.close().await.ok();
}

#[tokio::test]
async fn a_login_that_may_not_create_roles_migrates_and_is_given_them_later() {
    let fresh = Postgres::fresh().await;
    let login = Login::with(&fresh, &[]).await;
    let schema = format!("{}_box", login.name.replace("postbox_login", "pb"));
    Postgres::execute(&fresh, &format!("create schema {schema} authorization {}", login.name)).await;
    let settings = login.settings.clone().set("schema", &schema);
    let postbox: Postbox<Postgres> = Postbox::migrate(settings.clone()).await.expect("it goes on without the roles");
    assert!(postbox.roles().await.expect("roles").iter().all(|r| !r.exists));
    match postbox.grant_roles().await {
        Err(Error::Refused(words)) => {
            assert!(words.contains(&format!("create role {schema}_viewer nologin")), "{words}")
        }
        other => panic!("{other:?}"),
    }
    postbox.publish_now([Envelope::json("t", &1)]).await.expect("it works as its owner");
    // Somebody who may makes them; the owner gives them their rights. Again changes nothing.
    for role in ["publisher", "worker", "operator", "viewer"] {
        Postgres::execute(&fresh, &format!("create role {schema}_{role}")).await;
    }
    for _ in 0..2 {
        assert!(postbox.grant_roles().await.expect("granted").iter().all(|r| r.exists));
    }
    let publisher = Login::with(&fresh, &[]).await;
    Postgres::execute(&fresh, &format!("grant {schema}_publisher to {}", publisher.name)).await;
    let publishing: Settings = publisher.settings.clone().set("schema", &schema);
    let publishing: Postbox<Postgres> = Postbox::open(publishing).await.expect("open");
    publishing.publish_now([Envelope::json("t", &1)]).await.expect("publish");
    assert_eq!(Postgres::count(&fresh, &format!("select count(*) from {schema}.message")).await, 2);
    publishing.close().await;

    // Going back, what has a member stays, without rights; and comes back with the next way up.
    let roles = postbox.migration_status().await.expect("status");
    let (version, ..) = roles.migrations.iter().find(|(_, name, _)| name == "roles").expect("the migration").clone();
    postbox.migrate_down(version - 1).await.expect("down");
    let may = format!("select has_schema_privilege('{schema}_publisher', '{schema}', 'usage')::int::bigint");
    assert_eq!(Postgres::count(&fresh, &may).await, 0);
    postbox.migrate_up().await.expect("up");
    assert_eq!(Postgres::count(&fresh, &may).await, 1);

    postbox.close().await;
    Postgres::execute(&fresh, &format!("drop schema {schema} cascade")).await;
    for role in ["publisher", "worker", "operator", "viewer"] {
        Postgres::execute(&fresh, &format!("drop role {schema}_{role}")).await;
    }
}
