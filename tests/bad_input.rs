//! One table of bad input (in the testkit) through every door: here Rust on PostgreSQL, Rust on SQLite,
//! and SQL; the command's `--jsonl` in its own tests. The verdicts are the same.

use postbox::store::Store;
use postbox::{Draft, Envelope, Error, JsonError, Postgres, PublishError, Sqlite, TopicError};
use postbox_testkit::Testable;
use postbox_testkit::bad_input::{Input, Verdict, table};
use sqlx::Row;

use Verdict::*;

fn draft(input: &Input) -> Result<Draft, PublishError> {
    let mut draft = match &input.bytes {
        Some((content_type, bytes)) => Envelope::bytes(input.topic.as_str(), content_type.as_str(), bytes.as_slice()),
        None => Envelope::raw(input.topic.as_str(), input.payload.as_str())?,
    };
    if let Some(key) = &input.key {
        draft = draft.key(key);
    }
    if let Some(dedup) = &input.dedup {
        draft = draft.dedup(dedup);
    }
    if let Some(id) = &input.external_id {
        draft = draft.external_id(id);
    }
    if let Some((name, value)) = &input.header {
        draft = draft.header(name, value);
    }
    if let Some(after) = input.after {
        draft = draft.after(after);
    }
    if let Some(attempts) = input.max_attempts {
        draft = draft.max_attempts(attempts.try_into().expect("not negative"));
    }
    Ok(draft)
}

fn verdict_of(error: &PublishError) -> Verdict {
    match error {
        PublishError::Topic(TopicError::TooLong { .. } | TopicError::Empty { .. }) | PublishError::Topic(_) => Topic,
        PublishError::Json(JsonError::Syntax(_)) | PublishError::Json(_) => Json,
        PublishError::PayloadTooLarge { .. } | PublishError::HeadersTooLarge { .. } => TooLarge,
        PublishError::TooLong { .. } => TooLong,
        PublishError::EmptyDedupKey | PublishError::EmptyHeaderName => Empty,
        PublishError::TooFar { .. } | PublishError::MaxAttempts { .. } => Range,
        PublishError::ContentType { .. } => ContentType,
        other => panic!("an error without a verdict: {other}"),
    }
}

/// What SQL's refusal means.
fn verdict_of_sql(error: &sqlx::Error, input: &Input) -> Verdict {
    let error = error.as_database_error().unwrap_or_else(|| panic!("{}: {error}", input.what));
    let (code, words) = (error.code().unwrap_or_default().into_owned(), error.message());
    match code.as_str() {
        // Invalid text, an untranslatable character, a number out of range: the cast to jsonb.
        "22P02" | "22P05" | "22003" => Json,
        "22023" if words.contains("topic") => Topic,
        "22023" if words.contains("no media type") => ContentType,
        "22023" if words.contains("nested deeper") => Json,
        "22023" if words.contains("limit is 1048576") || words.contains("limit is 32768") => TooLarge,
        "22023"
            if words.contains("the limit is 255")
                || words.contains("names of 1 to 255") && input.verdict == TooLong =>
        {
            TooLong
        }
        "22023" if words.contains("must not be empty") || words.contains("names of 1 to 255") => Empty,
        "22023" if words.contains("10 years") || words.contains("1 to 1000") => Range,
        _ => panic!("{}: {code} {words}", input.what),
    }
}

async fn through_rust<Db: Testable>() {
    let fresh = Db::fresh().await;
    for input in table() {
        let verdict = match draft(&input) {
            Err(error) => verdict_of(&error),
            Ok(draft) => match fresh.postbox.publish_now([draft]).await {
                Ok(published) => {
                    let (stored, _) = fresh.postbox.admin().message(published[0].id).await.expect("it is there");
                    let (content_type, bytes) = match &input.bytes {
                        Some((content_type, bytes)) => (content_type.as_str(), bytes.as_slice()),
                        None => ("application/json", input.payload.as_bytes()),
                    };
                    assert!(stored.payload_bytes() == bytes, "{}: kept as it is, to the last digit", input.what);
                    assert_eq!(stored.content_type(), content_type, "{}", input.what);
                    assert_eq!(stored.key, input.key.clone().filter(|k| !k.is_empty()), "{}", input.what);
                    Taken
                }
                Err(Error::Publish(error)) => {
                    let words = error.to_string();
                    assert!(words.len() < 600, "{}: the error does not repeat the input: {words}", input.what);
                    verdict_of(&error)
                }
                Err(other) => panic!("{}: {other}", input.what),
            },
        };
        assert_eq!(verdict, input.verdict, "{}", input.what);
    }
}

#[tokio::test]
async fn through_rust_on_postgres() {
    through_rust::<Postgres>().await;
}

#[tokio::test]
async fn through_rust_on_sqlite() {
    through_rust::<Sqlite>().await;
}

#[tokio::test]
async fn through_sql() {
    let fresh = Postgres::fresh().await;
    let sql = format!(
        "select {}.publish($1, $2::text::jsonb, key => $3, dedup_key => $4, external_id => $5, headers => $6::text::jsonb,
            after => $7::bigint * interval '1 second', max_attempts => $8, body => $9, content_type => $10) as id",
        fresh.schema()
    );
    for input in table() {
        let headers = input.header.as_ref().map(|(name, value)| serde_json::json!({ name: value }).to_string());
        let result = sqlx::query(sqlx::AssertSqlSafe(sql.as_str()))
            .bind(&input.topic)
            .bind(input.bytes.is_none().then_some(&input.payload))
            .bind(&input.key)
            .bind(&input.dedup)
            .bind(&input.external_id)
            .bind(headers)
            .bind(input.after.map(|d| d.as_secs() as i64))
            .bind(input.max_attempts)
            .bind(input.bytes.as_ref().map(|(_, bytes)| bytes))
            .bind(input.bytes.as_ref().map(|(content_type, _)| content_type))
            .fetch_one(&fresh.pool)
            .await;
        let verdict = match &result {
            Ok(row) => {
                row.try_get::<uuid::Uuid, _>("id").expect("an id");
                Taken
            }
            Err(error) => verdict_of_sql(error, &input),
        };
        assert_eq!(verdict, input.verdict, "{}: {result:?}", input.what);
    }
    // Only through SQL: a null payload, and two things at once.
    for (call, code) in [
        ("publish('t', null)", "22004"),
        ("publish(null, '{}')", "22023"),
        ("publish('t', '{}', after => '1 s', at => now())", "22023"),
        ("publish('t', '{}', after => '-1 s')", "22023"),
        ("publish('t', '{}', headers => '[]')", "22023"),
        ("publish('t')", "22004"),
        ("publish('t', '{}', body => '1', content_type => 'a/b')", "22023"),
        ("publish('t', body => '1')", "22023"),
        ("publish('t', '{}', content_type => 'a/b')", "22023"),
        ("publish('t', '{}', headers => '{\"a\": 1}')", "22023"),
    ] {
        let sql = format!("select {}.{call}", fresh.schema());
        let error = sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&fresh.pool).await.expect_err(call);
        let found = error.as_database_error().and_then(|e| e.code()).unwrap_or_default().into_owned();
        assert_eq!(found, code, "{call}: {error}");
    }
}

/// The bulk function takes a JSON text, so each input stands between two good ones in one.
#[tokio::test]
async fn through_sql_in_bulk() {
    let fresh = Postgres::fresh().await;
    let sql = format!("select id, duplicate from {}.publish_many($1::text::jsonb)", fresh.schema());
    let stored = format!("select count(*) from {}.message", fresh.schema());
    let mut before = 0;
    for input in table() {
        let text = |value: &str| serde_json::Value::from(value).to_string();
        let mut fields = vec![format!("\"topic\": {}", text(&input.topic))];
        let mut say = |name: &str, value: Option<String>| fields.extend(value.map(|v| format!("\"{name}\": {v}")));
        match &input.bytes {
            None => say("payload", Some(input.payload.clone())),
            Some((content_type, bytes)) => {
                let encoded: String = sqlx::query_scalar("select encode($1, 'base64')")
                    .bind(bytes)
                    .fetch_one(&fresh.pool)
                    .await
                    .expect("base64");
                say("body", Some(text(&encoded)));
                say("content_type", Some(text(content_type)));
            }
        }
        say("key", input.key.as_deref().map(text));
        say("dedup_key", input.dedup.as_deref().map(text));
        say("external_id", input.external_id.as_deref().map(text));
        let headers = input.header.as_ref().map(|(name, value)| serde_json::json!({ name: value }).to_string());
        say("headers", headers);
        say("after", input.after.map(|d| text(&format!("{} s", d.as_secs()))));
        say("max_attempts", input.max_attempts.map(|n| n.to_string()));
        let good = r#"{"topic": "good", "payload": null}"#;
        let array = format!("[{good}, {{{}}}, {good}]", fields.join(", "));
        let result = sqlx::query(sqlx::AssertSqlSafe(sql.as_str())).bind(array).fetch_all(&fresh.pool).await;
        let verdict = match &result {
            Ok(rows) => {
                let ids = rows.iter().map(|row| row.try_get::<uuid::Uuid, _>("id").expect("an id"));
                assert_eq!(ids.collect::<std::collections::HashSet<_>>().len(), 3, "{}", input.what);
                before += 3;
                Taken
            }
            Err(error) => verdict_of_sql(error, &input),
        };
        assert_eq!(verdict, input.verdict, "{}: {result:?}", input.what);
        assert_eq!(Postgres::count(&fresh, &stored).await, before, "{}: all or nothing", input.what);
    }
    for (array, words) in [
        ("null", "takes a JSON array"),
        ("{}", "takes a JSON array"),
        ("[1]", "message 1 of 1: it is no JSON object"),
        (r#"[{"topic": "t", "payload": 1}, {"payload": 1}]"#, "message 2 of 2: a topic must not be empty"),
        (r#"[{"topic": "t", "payload": 1, "dedup": "k"}]"#, "message 1 of 1: there is no `dedup`"),
        (r#"[{"topic": "t"}]"#, "message 1 of 1: the payload must not be null"),
        (
            r#"[{"topic": "t", "payload": 1, "after": "soon"}]"#,
            "message 1 of 1: invalid input syntax for type interval",
        ),
        (r#"[{"topic": "t", "payload": 1, "after": "1 s", "at": "2030-01-01"}]"#, "not both"),
        (r#"[{"topic": "t", "payload": 1, "at": "infinity"}]"#, "message 1 of 1: the due time is infinity"),
        (
            r#"[{"topic": "t", "payload": 1, "max_attempts": 1.5}]"#,
            "message 1 of 1: invalid input syntax for type integer",
        ),
        (r#"[{"topic": "t", "body": "!", "content_type": "a/b"}]"#, "message 1 of 1: invalid symbol"),
        (
            r#"[{"topic": "t", "payload": 1, "dedup_key": "k"}, {"topic": "t", "payload": 1, "dedup_key": "k"}]"#,
            "the dedup key `k` of topic `t` is there twice",
        ),
    ] {
        let result = sqlx::query(sqlx::AssertSqlSafe(sql.as_str())).bind(array).fetch_all(&fresh.pool).await;
        let error = result.expect_err(array).to_string();
        assert!(error.contains(words), "{array}: {error}");
    }
    let many = format!("[{}]", vec!["1"; 10_001].join(","));
    let result = sqlx::query(sqlx::AssertSqlSafe(sql.as_str())).bind(many).fetch_all(&fresh.pool).await;
    let error = result.expect_err("too many").to_string();
    assert!(error.contains("10001 messages; the limit of one call is 10000"), "{error}");
    assert_eq!(Postgres::count(&fresh, &stored).await, before, "nothing of all these is stored");
}

#[tokio::test]
async fn the_bulk_function_says_what_it_did() {
    let fresh = Postgres::fresh().await;
    let many = async |array: serde_json::Value| -> Result<Vec<(i32, uuid::Uuid, bool)>, sqlx::Error> {
        let sql = format!("select ord, id, duplicate from {}.publish_many($1)", fresh.schema());
        sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(array).fetch_all(&fresh.pool).await
    };
    let said = many(serde_json::json!([
        { "topic": "t", "payload": { "a": 1 }, "dedup_key": "k" },
        { "topic": "orders.placed", "payload": { "order_id": 42 }, "key": "42", "correlation_id": "c-1",
          "headers": { "h": "v" }, "at": "2030-01-01T00:00:00Z", "max_attempts": 3, "occurred_at": "2026-01-01T00:00:00Z" },
        { "topic": "pictures", "body": "AAEC", "content_type": "image/png" },
    ]));
    let said = said.await.expect("publishes");
    assert_eq!(said.iter().map(|s| (s.0, s.2)).collect::<Vec<_>>(), [(1, false), (2, false), (3, false)]);
    let (order, _) = fresh.postbox.admin().message(said[1].1).await.expect("it is there");
    assert_eq!(
        (order.topic.as_str(), order.key.as_deref(), order.max_attempts),
        ("orders.placed", Some("42"), Some(3))
    );
    assert_eq!((order.correlation_id.as_deref(), order.headers["h"].as_str()), (Some("c-1"), "v"));
    assert_eq!(order.occurred_at.to_string(), "2026-01-01T00:00:00Z");
    let due: String = sqlx::query_scalar(sqlx::AssertSqlSafe(format!(
        "select to_char(due_at at time zone 'UTC', 'YYYY-MM-DD') from {}.message where id = $1",
        fresh.schema()
    )))
    .bind(said[1].1)
    .fetch_one(&fresh.pool)
    .await
    .expect("the message");
    assert_eq!(due, "2030-01-01");
    let (picture, _) = fresh.postbox.admin().message(said[2].1).await.expect("it is there");
    assert_eq!((picture.payload_bytes(), picture.content_type()), ([0, 1, 2].as_slice(), "image/png"));

    let again = many(serde_json::json!([
        { "topic": "t", "payload": { "b": 1 } }, { "topic": "t", "payload": { "a": 1 }, "dedup_key": "k" },
    ]));
    let again = again.await.expect("publishes");
    assert_eq!((again[0].2, again[1]), (false, (2, said[0].1, true)));
    let error = many(serde_json::json!([
        { "topic": "t", "payload": { "c": 1 } }, { "topic": "t", "payload": { "a": 2 }, "dedup_key": "k" },
    ]));
    let error = error.await.expect_err("another body").to_string();
    assert!(error.contains("message 2 of 2") && error.contains("another body"), "{error}");
    assert_eq!(Postgres::count(&fresh, &format!("select count(*) from {}.message", fresh.schema())).await, 4);
    assert!(many(serde_json::json!([])).await.expect("nothing").is_empty());
}

#[tokio::test]
async fn the_sql_function_says_what_it_did() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    let publish = async |arguments: &str| -> Result<uuid::Uuid, sqlx::Error> {
        let sql = format!("select {schema}.publish({arguments})");
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&fresh.pool).await
    };
    let id =
        publish("'orders.placed', '{\"order_id\": 42}', key => '42', correlation_id => 'c-1'").await.expect("publish");
    let (stored, deliveries) = fresh.postbox.admin().message(id).await.expect("it is there");
    assert_eq!((stored.topic.as_str(), stored.key.as_deref(), deliveries.len()), ("orders.placed", Some("42"), 0));
    assert_eq!(stored.correlation_id.as_deref(), Some("c-1"));
    let first = publish("'t', '{\"a\": 1, \"b\": 2}', dedup_key => 'k'").await.expect("publish");
    assert_eq!(publish("'t', '{\"b\":2,\"a\":1}', dedup_key => 'k'").await.expect("the same body"), first);
    let error = publish("'t', '{\"a\": 3}', dedup_key => 'k'").await.expect_err("another body").to_string();
    assert!(error.contains(&first.to_string()) && error.contains("another body"), "{error}");
    // And the same key through Rust is the same key.
    let rust = Envelope::raw("t", r#"{"a":1,"b":2}"#).expect("json").dedup("k");
    let published = fresh.postbox.publish_now([rust]).await.expect("publish");
    assert_eq!((published[0].id, published[0].is_duplicate()), (first, true));

    // The function and the library run one text.
    let body: String = sqlx::query_scalar(sqlx::AssertSqlSafe(format!(
        "select prosrc from pg_proc where oid = '{schema}.publish_batch'::regproc"
    )))
    .fetch_one(&fresh.pool)
    .await
    .expect("the function");
    let inline = include_str!("../crates/postbox/src/store/postgres/publish.sql").replace("{schema}", &schema);
    assert!(body.contains(inline.trim()), "publish_batch and publish.sql have drifted apart: add a migration");
    // The short way: its parameters are the function's arguments there.
    let checked: String = sqlx::query_scalar(sqlx::AssertSqlSafe(format!(
        "select prosrc from pg_proc where pronamespace = '{schema}'::regnamespace and proname = 'publish_checked'"
    )))
    .fetch_one(&fresh.pool)
    .await
    .expect("the function");
    let short = include_str!("../crates/postbox/src/store/postgres/publish_one.sql").replace("{schema}", &schema);
    for line in short.lines().filter(|line| !line.contains('$') && !line.trim_start().starts_with("--")) {
        assert!(checked.contains(line.trim()), "publish_checked and publish_one.sql have drifted apart: {line}");
    }
    // Both ways were gone: a topic whose routes are stored takes the short one, and delivers the same.
    let worker = fresh
        .postbox
        .worker(postbox::Router::new().on("short.way", postbox::handler(async || {}).named("short")))
        .start()
        .await
        .expect("starts");
    worker.stop(None).await.expect("stops");
    let deliveries = async |id: uuid::Uuid| fresh.postbox.admin().message(id).await.expect("it is there").1.len();
    let long = publish("'short.way', '1'").await.expect("publish");
    fresh.postbox.store().learn_routes(&["short.way".to_owned()]).await.expect("learns");
    let short = publish("'short.way', '2', key => 'k', correlation_id => 'c-2', occurred_at => '2026-01-01'");
    let short = short.await.expect("publish");
    let inline = fresh.postbox.publish_now([Envelope::raw("short.way", "3").expect("json").key("k")]).await;
    let inline = inline.expect("publish")[0].id;
    for (id, payload) in [(long, "1"), (short, "2"), (inline, "3")] {
        assert_eq!(deliveries(id).await, 1, "{payload}");
        assert_eq!(fresh.postbox.admin().message(id).await.expect("it is there").0.payload_json(), Some(payload));
    }
    let (stored, _) = fresh.postbox.admin().message(short).await.expect("it is there");
    assert_eq!((stored.key.as_deref(), stored.correlation_id.as_deref()), (Some("k"), Some("c-2")));
    assert_eq!(stored.occurred_at.to_string(), "2026-01-01T00:00:00Z");
}

#[tokio::test]
async fn a_strict_snapshot_that_is_older_than_the_routing_is_refused() {
    let fresh = Postgres::fresh().await;
    let mut tx = fresh.pool.begin().await.expect("begin");
    sqlx::query("set transaction isolation level repeatable read").execute(&mut *tx).await.expect("set");
    sqlx::query("select 1 from pg_class limit 1").execute(&mut *tx).await.expect("a snapshot is taken");
    let worker =
        fresh.postbox.worker(postbox::Router::new().on("t", postbox::handler(|_: Envelope| async {}).named("late")));
    let worker = worker.start().await.expect("start");
    let error = fresh.postbox.publish(&mut tx, Envelope::json("t", &1)).await.expect_err("the routing has moved on");
    match error {
        PublishError::Database(e) => {
            assert_eq!(e.as_database_error().and_then(|e| e.code()).as_deref(), Some("40001"));
        }
        other => panic!("{other}"),
    }
    drop(tx);
    worker.stop(None).await.expect("stop");
}

#[tokio::test]
async fn content_types_are_judged_alike_in_rust_and_in_sql() {
    let fresh = Postgres::fresh().await;
    let sql = format!("select {}.publish('t', body => '', content_type => $1)", fresh.schema());
    // What the rule has a word for, in every order, from a fixed seed.
    let signs =
        ["a", "a/b", "/", ";", " ; ", "=", "x=y", "\"", "\\", "\\\"", "[", "]", "^", "~", "!", "\n", "\u{7f}", "é"];
    let mut seed = 42_u64;
    let mut draw = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let mut taken = 0;
    for _ in 0..400 {
        let start = if draw(2) == 0 { "a/b;x=\"" } else { "a/b" };
        let rest: String = (0..draw(6)).map(|_| signs[draw(signs.len())]).collect();
        let end = if draw(2) == 0 { "\"" } else { "" };
        let content_type = format!("{start}{rest}{end}");
        let rust = fresh.postbox.publish_now([Envelope::bytes("t", content_type.as_str(), *b"")]).await.is_ok();
        let asked = sqlx::query(sqlx::AssertSqlSafe(sql.as_str())).bind(&content_type).execute(&fresh.pool).await;
        assert_eq!(rust, asked.is_ok(), "{content_type:?}: {asked:?}");
        taken += usize::from(rust);
    }
    assert!((50..350).contains(&taken), "{taken} were taken: both sides are tried");
}
