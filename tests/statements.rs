//! SQL and binds, run by a driver that only knows how to bind texts and read three columns.

use postbox::sql::{Publishing, Statements};
use postbox::{Draft, Envelope, Error, IntoDraft, Postbox, Postgres, PublishError, Published};
use postbox_testkit::{Fresh, Testable};
use proptest::prelude::*;
use sqlx::{PgConnection, Row};

/// All that is asked of a driver.
async fn run(connection: &mut PgConnection, publishing: &mut Publishing) -> Result<usize, PublishError> {
    let mut runs = 0;
    while let Some(statement) = publishing.statement().cloned() {
        let mut query = sqlx::query(sqlx::AssertSqlSafe(statement.text)).persistent(false);
        for bind in statement.binds {
            query = query.bind(bind);
        }
        let rows = query.fetch_all(&mut *connection).await?;
        publishing.read(rows.iter().map(|row| (row.get("ord"), row.get("id"), row.get("yes"))))?;
        runs += 1;
    }
    Ok(runs)
}

async fn publish<M: IntoDraft>(
    statements: &Statements,
    connection: &mut PgConnection,
    messages: impl IntoIterator<Item = M>,
) -> Result<Vec<Published>, PublishError> {
    let mut publishing = statements.publish(messages)?;
    run(connection, &mut publishing).await?;
    publishing.finish()
}

async fn stored(fresh: &Fresh<Postgres>, published: &Published) -> Envelope {
    fresh.postbox.admin().message(published.id).await.expect("it is there").0
}

/// What a message says, its id and times of recording aside.
fn said(envelope: &Envelope) -> String {
    let mut value: serde_json::Value = serde_json::from_str(&envelope.to_json()).expect("JSON");
    let members = value.as_object_mut().expect("an object");
    for own in ["id", "received_at", "occurred_at"] {
        members.remove(own);
    }
    value.to_string()
}

fn with_everything(draft: Draft) -> Draft {
    draft
        .key("k{\"},\\")
        .header("h", "NULL")
        .header("ü", "\u{1}\"")
        .source("{}")
        .external_id("ext")
        .correlation_id("NULL")
        .causation_id("'; drop")
        .occurred_at("2026-01-31T08:00:00.123456Z".parse().expect("a time"))
        .max_attempts(7)
}

#[tokio::test]
async fn it_says_the_same_as_the_library() {
    let fresh = Postgres::fresh().await;
    let statements = Statements::new(fresh.schema()).expect("a plain name");
    assert_eq!(statements, fresh.postbox.statements());
    assert_eq!(Some(statements.clone()), Statements::of(&fresh.settings).ok());
    let json = || with_everything(Envelope::raw("a.b", r#"{"n": 1.10, "q": "\"{},\\"}"#).expect("JSON"));
    let bytes = || with_everything(Envelope::bytes("a.b", "text/x; q=\"\\\"\"", *b"\x00\\x{\",\xff"));
    for draft in [&json as &dyn Fn() -> Draft, &bytes] {
        let mut connection = fresh.pool.acquire().await.expect("a connection");
        let theirs = publish(&statements, &mut connection, [draft()]).await.expect("publish");
        let ours = fresh.postbox.publish_now([draft()]).await.expect("publish");
        let (theirs_stored, ours_stored) = (stored(&fresh, &theirs[0]).await, stored(&fresh, &ours[0]).await);
        assert_eq!(said(&theirs_stored), said(&ours_stored));
        assert_eq!(said(&theirs[0]), said(&theirs_stored));
        assert_eq!(theirs_stored.occurred_at, ours_stored.occurred_at);
        assert_eq!(theirs_stored.payload_bytes(), ours_stored.payload_bytes());
    }
    // Delays and due times are counted by the database.
    let hour = std::time::Duration::from_secs(3600);
    let due = jiff::Timestamp::now() + hour;
    let later = [Envelope::json("t", &1).map(|d| d.after(hour)), Envelope::json("t", &2).map(|d| d.at(due))];
    let mut connection = fresh.pool.acquire().await.expect("a connection");
    publish(&statements, &mut connection, later).await.expect("publish");
    let sql = format!(
        "select count(*) from {}.message where due_at between now() + interval '59 min' and now() + interval '61 min'",
        fresh.schema()
    );
    assert_eq!(Postgres::count(&fresh, &sql).await, 2);
}

#[tokio::test]
async fn duplicates_are_told_and_another_body_is_a_conflict() {
    let fresh = Postgres::fresh().await;
    let statements = fresh.postbox.statements();
    let mut tx = fresh.pool.begin().await.expect("begin");
    let drafts = || [Envelope::bytes("t", "a/b", *b"1").dedup("x"), Envelope::bytes("t", "a/b", *b"2").dedup("y")];
    let first = publish(&statements, &mut tx, drafts()).await.expect("publish");
    let mut publishing = statements.publish(drafts()).expect("checked");
    assert_eq!(run(&mut tx, &mut publishing).await.expect("run"), 2, "the statement and the second look");
    let second = publishing.finish().expect("the same");
    for (first, second) in first.iter().zip(&second) {
        assert_eq!((first.id, first.is_duplicate(), second.is_duplicate()), (second.id, false, true));
    }
    for other in [Envelope::bytes("t", "a/c", *b"1"), Envelope::bytes("t", "a/b", *b"3")] {
        let error = publish(&statements, &mut tx, [other.dedup("x")]).await.expect_err("another body");
        assert!(matches!(error, PublishError::DedupConflict { existing, .. } if existing == first[0].id), "{error}");
    }
    // The library knows the key as the same.
    let ours = fresh.postbox.publish(&mut tx, Envelope::bytes("t", "a/b", *b"1").dedup("x")).await.expect("publish");
    assert_eq!((ours.id, ours.is_duplicate()), (first[0].id, true));
    tx.rollback().await.expect("rollback");
    assert_eq!(Postgres::count(&fresh, &format!("select count(*) from {}.message", fresh.schema())).await, 0);
}

#[tokio::test]
async fn thousands_are_stored_in_order() {
    let fresh = Postgres::fresh().await;
    let mut tx = fresh.pool.begin().await.expect("begin");
    let all: Vec<_> = (0..2500).map(|n| Envelope::json("t", &n)).collect();
    let published = publish(&fresh.postbox.statements(), &mut tx, all).await.expect("publish");
    tx.commit().await.expect("commit");
    assert_eq!(published.len(), 2500);
    for n in [0, 999, 1000, 2499] {
        assert_eq!(stored(&fresh, &published[n]).await.payload_json(), Some(n.to_string().as_str()));
    }
}

#[tokio::test]
async fn the_second_look_is_one_text_too() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    let body: String = sqlx::query_scalar(sqlx::AssertSqlSafe(format!(
        "select prosrc from pg_proc where oid = '{schema}.publish_duplicates'::regproc"
    )))
    .fetch_one(&fresh.pool)
    .await
    .expect("the function");
    let inline = include_str!("../crates/postbox/src/store/postgres/duplicates.sql").replace("{schema}", &schema);
    assert_eq!(body.trim(), inline.trim(), "publish_duplicates and duplicates.sql have drifted apart");
}

/// Texts that array literals, SQL and JSON have signs for.
fn hostile() -> impl Strategy<Value = String> {
    let signs = prop::sample::select(vec![
        "{", "}", ",", "\"", "\\", "'", "NULL", "\\x", "$1", "--", ";", " ", "\t", "\n", "\r", "é", "😀", "\u{202e}",
        "a",
    ]);
    prop::collection::vec(prop_oneof![signs.prop_map(str::to_owned), any::<char>().prop_map(String::from)], 0..20)
        .prop_map(|parts| parts.concat().replace('\0', ""))
}

#[test]
fn hostile_texts_come_back_as_they_were() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let fresh = runtime.block_on(Postgres::fresh());
    let statements = fresh.postbox.statements();
    let cases = (
        prop::collection::vec((hostile(), hostile(), hostile(), prop::collection::vec(any::<u8>(), 0..40)), 1..4),
        any::<bool>(),
    );
    let config = ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |((messages, json) in cases)| {
        let draft = |(key, header, text, bytes): &(String, String, String, Vec<u8>)| {
            let draft = match json {
                true => Envelope::json("t", text).expect("JSON"),
                false => Envelope::bytes("t", "a/b", bytes.as_slice()),
            };
            draft.key(key).source(text).header("h", header)
        };
        runtime.block_on(async {
            let mut connection = fresh.pool.acquire().await.expect("a connection");
            let published = publish(&statements, &mut connection, messages.iter().map(draft)).await.expect("publish");
            for (published, message) in published.iter().zip(&messages) {
                let (key, header, text, bytes) = message;
                let stored = stored(&fresh, published).await;
                assert_eq!(stored.key.as_deref().unwrap_or_default(), key);
                assert_eq!(stored.source.as_deref().unwrap_or_default(), text);
                assert_eq!(&stored.headers["h"], header);
                match json {
                    true => assert_eq!(&stored.decode::<String>().expect("a text"), text),
                    false => assert_eq!(stored.payload_bytes(), bytes),
                }
            }
        });
    });
}

#[tokio::test]
async fn a_schema_that_is_not_there_is_the_drivers_error() {
    let fresh = Postgres::fresh().await;
    let nowhere = Statements::new("postbox_nowhere").expect("a plain name");
    let mut connection = fresh.pool.acquire().await.expect("a connection");
    let error = publish(&nowhere, &mut connection, [Envelope::json("t", &1)]).await.expect_err("no schema");
    assert!(error.to_string().contains("3F000"), "{error}");
    let refused: Result<Postbox<Postgres>, Error> = Postbox::open(fresh.settings.clone().set("schema", "X")).await;
    assert!(refused.is_err());
}
