//! The SQL in `docs/from/`, on tables as those programs have them: what is unfinished arrives once, however often it
//! is run, and what is finished stays.

use std::collections::BTreeMap;
use std::path::Path;

use jiff::Timestamp;
use postbox::admin::{DeliveryRow, Filter};
use postbox::{Pattern, Postgres};
use postbox_testkit::{Fresh, Testable};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

/// A document's statements by their names.
fn statements(document: &str) -> BTreeMap<String, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/from").join(document);
    let text = std::fs::read_to_string(path).expect("the document");
    let marked = text.split("<!-- sql: ").skip(1).map(|rest| {
        let (name, rest) = rest.split_once(" -->\n```sql\n").expect("a marker stands right above its statement");
        (name.to_owned(), rest.split("```").next().unwrap_or_default().to_owned())
    });
    let statements: BTreeMap<String, String> = marked.collect();
    assert_eq!(statements.len(), text.matches("```sql").count(), "each statement of {document} has a name, and a test");
    statements
}

/// A database with an old table, in a session that finds it, and a subscription to everything.
struct Moving {
    fresh: Fresh<Postgres>,
    session: PgConnection,
    statements: BTreeMap<String, String>,
}

impl Moving {
    async fn from(document: &str, old: &str) -> Moving {
        let fresh = Postgres::fresh().await;
        let all: Pattern = ">".parse().expect("a pattern");
        fresh.postbox.subscription("all").pattern(all.as_str()).declare().await.expect("declare");
        let mut session = PgConnection::connect(&fresh.url()).await.expect("a session");
        // As the old program's tables: found without a schema.
        let sql = format!("create temporary table none(); set search_path = pg_temp, pg_catalog; {old}");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut session).await.expect("the old table");
        Moving { fresh, session, statements: statements(document) }
    }

    fn sql(&mut self, name: &str) -> String {
        let sql = self.statements.remove(name).unwrap_or_else(|| panic!("there is no statement {name}"));
        sql.replace("postbox.", &format!("{}.", self.fresh.schema()))
    }

    /// Runs a statement twice; it says the same both times.
    async fn run(&mut self, name: &str) -> i64 {
        let sql = self.sql(name);
        let mut moved = Vec::new();
        for _ in 0..2 {
            let sql = AssertSqlSafe(sql.clone());
            moved.push(sqlx::query_scalar::<_, i64>(sql).fetch_one(&mut self.session).await.expect(name));
        }
        assert_eq!(moved[0], moved[1], "{name}");
        moved[0]
    }

    /// What has arrived, by its number in the old table.
    async fn arrived(&self) -> BTreeMap<String, DeliveryRow> {
        let rows = self.fresh.postbox.admin().list(&Filter::default(), 100).await.expect("list");
        let many = rows.len();
        let by_id: BTreeMap<_, _> =
            rows.into_iter().map(|row| (row.external_id.clone().expect("its number"), row)).collect();
        assert_eq!(by_id.len(), many, "each once");
        by_id
    }

    async fn ids(&self) -> Vec<String> {
        self.arrived().await.into_keys().collect()
    }

    fn is_over(&self) {
        assert!(self.statements.is_empty(), "never run: {:?}", self.statements.keys());
    }
}

/// As SQLAlchemy makes it: an enum of names, and `json`.
const EVENTS: &str = "
    create type eventstatus as enum ('PENDING', 'PROCESSING', 'COMPLETED', 'FAILED', 'RETRYING');
    create table events (id serial primary key, type varchar(255) not null, payload json not null,
        status eventstatus not null, retry_count int not null default 0, run_at timestamptz, error_message text,
        created_at timestamptz not null default '2026-01-02 03:04:05+00', processed_at timestamptz);
    insert into events (type, payload, status, run_at) values
        ('orders.placed', '{\"n\": 1.10}', 'PENDING', null),
        ('orders.placed', '{\"n\": 2}', 'PENDING', '2999-01-01 00:00:00+00'),
        ('orders.placed', '{\"n\": 3}', 'RETRYING', null),
        ('orders.placed', '{\"n\": 4}', 'PROCESSING', null),
        ('orders.placed', '{\"n\": 5}', 'COMPLETED', null),
        ('orders.placed', '{\"n\": 6}', 'FAILED', '2020-01-01 00:00:00+00');";

fn far() -> Timestamp {
    "2999-01-01T00:00:00Z".parse().expect("a time")
}

#[tokio::test]
async fn from_pgebus() {
    let mut moving = Moving::from("pgebus.md", EVENTS).await;
    assert_eq!(moving.run("waiting").await, 3);
    let arrived = moving.arrived().await;
    assert_eq!(arrived.keys().collect::<Vec<_>>(), ["1", "2", "3"]);
    assert_eq!((arrived["1"].next_due_at, arrived["2"].next_due_at), (None, Some(far())));
    let message = moving.fresh.postbox.admin().message(arrived["1"].message).await.expect("the message").0;
    assert_eq!(message.payload_json(), Some(r#"{"n": 1.10}"#));
    assert_eq!((message.topic.as_str(), message.source.as_deref()), ("orders.placed", Some("pgebus")));
    assert_eq!(message.occurred_at.to_string(), "2026-01-02T03:04:05Z");
    assert_eq!(moving.run("processing").await, 1);
    assert_eq!(moving.ids().await, ["1", "2", "3", "4"]);
    assert_eq!(moving.run("failed").await, 1);
    assert_eq!(moving.ids().await, ["1", "2", "3", "4", "6"]);
    moving.is_over();
}

#[tokio::test]
async fn from_pgoutbox() {
    let mut moving = Moving::from("pgoutbox.md", EVENTS).await;
    assert_eq!(moving.run("waiting").await, 2);
    assert_eq!(moving.ids().await, ["1", "2"]);
    assert_eq!(moving.arrived().await["2"].next_due_at, Some(far()));
    let tried = AssertSqlSafe(moving.sql("tried"));
    assert_eq!(sqlx::query(tried).fetch_all(&mut moving.session).await.expect("a list").len(), 3);
    // One of them has happened.
    let seen = "update events set status = 'COMPLETED' where id = 4";
    sqlx::raw_sql(seen).execute(&mut moving.session).await.expect("noted");
    assert_eq!(moving.run("rest").await, 2);
    assert_eq!(moving.ids().await, ["1", "2", "3", "6"]);
    moving.is_over();
}

#[tokio::test]
async fn from_eventflow() {
    let old = "
        create table event_inbox (id serial primary key, event_id varchar(255) unique not null, stream_id varchar(255),
            event_type varchar(255) not null, aggregate_id varchar(255), correlation_id varchar(255),
            occurred_on timestamptz not null default '2026-01-02 03:04:05+00', payload jsonb not null,
            status varchar(20) not null, retry_count int not null default 0, max_retries int not null default 3,
            received_at timestamptz not null default now(), processed_at timestamptz, next_retry_at timestamptz,
            error_message text, last_error_at timestamptz);
        insert into event_inbox (event_id, stream_id, event_type, aggregate_id, correlation_id, payload, status, retry_count, next_retry_at) values
            ('a', 'payments', 'payment.settled', '42', 'c', '{\"n\": 1.10}', 'pending', 0, null),
            ('b', 'payments', 'payment.settled', null, null, '{}', 'failed', 2, '2999-01-01 00:00:00+00'),
            ('c', 'payments', 'payment.settled', '42', null, '{}', 'processing', 1, null),
            ('d', 'payments', 'payment.settled', '42', null, '{}', 'processed', 0, null),
            ('e', 'payments', 'payment.settled', '42', null, '{}', 'dead_letter', 3, null);";
    let mut moving = Moving::from("eventflow.md", old).await;
    assert_eq!(moving.run("waiting").await, 2);
    let arrived = moving.arrived().await;
    assert_eq!(arrived.keys().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!((arrived["a"].next_due_at, arrived["b"].next_due_at), (None, Some(far())));
    assert_eq!((arrived["a"].key.as_deref(), arrived["b"].key.as_deref()), (Some("42"), None));
    assert_eq!((arrived["a"].max_attempts, arrived["b"].max_attempts), (4, 2), "what is left of its retries");
    let message = moving.fresh.postbox.admin().message(arrived["a"].message).await.expect("the message").0;
    assert_eq!(message.payload_json(), Some(r#"{"n": 1.10}"#));
    assert_eq!((message.source.as_deref(), message.correlation_id.as_deref()), (Some("payments"), Some("c")));
    assert_eq!(moving.run("processing").await, 1);
    assert_eq!(moving.run("dead").await, 1);
    assert_eq!(moving.ids().await, ["a", "b", "c", "e"]);
    assert_eq!(moving.arrived().await["e"].max_attempts, 4, "it starts anew");
    moving.is_over();
}

#[tokio::test]
async fn from_pyxbox() {
    let old = "
        create table outbox (id uuid primary key, topic text not null, partition_key text, payload jsonb not null,
            created_at timestamptz not null default now(), sent_at timestamptz);
        insert into outbox (id, topic, partition_key, payload, sent_at) values
            ('00000000-0000-0000-0000-000000000001', 'orders.placed', '42', '{}', null),
            ('00000000-0000-0000-0000-000000000002', 'orders.placed', null, '{}', null),
            ('00000000-0000-0000-0000-000000000003', 'orders.placed', '42', '{}', now());";
    let mut moving = Moving::from("pyxbox.md", old).await;
    let view = AssertSqlSafe(moving.sql("view"));
    sqlx::raw_sql(view).execute(&mut moving.session).await.expect("the view");
    assert_eq!(moving.run("move").await, 2);
    let arrived = moving.arrived().await;
    let keys: Vec<Option<&str>> = arrived.values().map(|row| row.key.as_deref()).collect();
    assert_eq!(keys, [Some("42"), None]);
    moving.is_over();
}
