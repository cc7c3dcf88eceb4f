//! Pulling in SQL, as other languages do it: `subscribe`, `next`, `failed`.

use std::time::Duration;

use postbox::admin::AttemptRow;
use postbox::lifecycle::State;
use postbox::{Envelope, Pattern, Postgres, RetryPolicy};
use postbox_testkit::{Fresh, Testable};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use sqlx::{PgConnection, Row};

async fn declared(attempts: i32) -> Fresh<Postgres> {
    let fresh = Postgres::fresh().await;
    let sql = format!("select {}.subscribe('orders', 'orders.>', max_attempts => {attempts})", fresh.schema());
    assert!(Postgres::count(&fresh, &sql.replace("select ", "select count(*) from ")).await == 1);
    fresh
}

async fn publish(fresh: &Fresh<Postgres>, count: usize) {
    let messages = (0..count).map(|n| Envelope::json("orders.placed", &n));
    fresh.postbox.publish_now(messages).await.expect("publish");
}

async fn next(fresh: &Fresh<Postgres>, on: &mut PgConnection) -> Option<(i64, i32)> {
    let sql = format!("select * from {}.next('orders')", fresh.schema());
    let row = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_optional(on).await.expect("next");
    row.map(|row| (row.get("delivery"), row.get("attempt")))
}

async fn failed(fresh: &Fresh<Postgres>, on: &mut PgConnection, delivery: i64, why: &str) -> bool {
    let sql = format!("select {}.failed($1, $2, '0 s')", fresh.schema());
    sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).bind(delivery).bind(why).fetch_one(on).await.expect("failed")
}

async fn standing(fresh: &Fresh<Postgres>, delivery: i64) -> (State, Vec<AttemptRow>) {
    let shown = fresh.postbox.admin().show(delivery).await.expect("show");
    (shown.row.state, shown.attempts)
}

async fn refused(fresh: &Fresh<Postgres>, sql: &str) -> (String, String) {
    let sql = sql.replace("{schema}", &fresh.schema());
    let error = sqlx::query(sqlx::AssertSqlSafe(sql.clone())).execute(&fresh.pool).await.expect_err(&sql);
    let error = error.into_database_error().expect("the database's word");
    (error.code().unwrap_or_default().into_owned(), error.message().to_owned())
}

#[tokio::test]
async fn a_commit_completes_and_a_rollback_is_no_attempt() {
    let fresh = declared(2).await;
    publish(&fresh, 1).await;
    let mut tx = fresh.pool.begin().await.expect("begin");
    let (delivery, attempt) = next(&fresh, &mut tx).await.expect("one is there");
    assert_eq!(attempt, 1);
    assert_eq!(next(&fresh, &mut tx).await, None, "it is taken");
    let mut other = fresh.pool.begin().await.expect("begin");
    assert_eq!(next(&fresh, &mut other).await, None, "for others, too");
    tx.rollback().await.expect("rollback");
    assert_eq!(next(&fresh, &mut other).await, Some((delivery, 1)), "uncounted");
    other.commit().await.expect("commit");
    let (state, attempts) = standing(&fresh, delivery).await;
    assert_eq!((state, attempts.len()), (State::Succeeded, 1));
    assert_eq!(attempts[0].outcome.as_deref(), Some("succeeded"));
}

#[tokio::test]
async fn what_it_returns() {
    let fresh = declared(2).await;
    let message = Envelope::json("orders.eu.placed", &serde_json::json!({"cents": 12345678901234567890_u64}))
        .expect("a draft")
        .key("k")
        .header("h", "v")
        .max_attempts(7);
    let published = fresh.postbox.publish_now([message]).await.expect("publish").remove(0);
    let sql = format!(
        "select id, topic, key, payload ->> 'cents' as cents, headers ->> 'h' as h, max_attempts, occurred_at is not null as at
         from {}.next('orders', application => 'sql')",
        fresh.schema()
    );
    let row = sqlx::query(sqlx::AssertSqlSafe(sql)).fetch_one(&fresh.pool).await.expect("next");
    assert_eq!(row.get::<uuid::Uuid, _>("id"), published.id);
    assert_eq!(
        (row.get::<&str, _>("topic"), row.get::<&str, _>("key"), row.get::<&str, _>("cents"), row.get::<&str, _>("h")),
        ("orders.eu.placed", "k", "12345678901234567890", "v")
    );
    assert_eq!((row.get::<i32, _>("max_attempts"), row.get::<bool, _>("at")), (7, true));
}

#[tokio::test]
async fn failed_counts_in_the_transaction_in_a_savepoint_and_after_a_rollback() {
    let fresh = declared(4).await;
    publish(&fresh, 1).await;
    // In the transaction of next.
    let mut tx = fresh.pool.begin().await.expect("begin");
    let (delivery, _) = next(&fresh, &mut tx).await.expect("one is there");
    assert!(failed(&fresh, &mut tx, delivery, "at postgres://ana:secret@db/shop").await);
    tx.commit().await.expect("commit");
    let (state, attempts) = standing(&fresh, delivery).await;
    assert_eq!((state, attempts.len()), (State::Pending, 1));
    assert_eq!(attempts[0].error.as_deref(), Some("at postgres://ana:***@db/shop"));
    // In a savepoint of it.
    let mut tx = fresh.pool.begin().await.expect("begin");
    sqlx::raw_sql("create temporary table burnt_xid (); savepoint a").execute(&mut *tx).await.expect("savepoint");
    assert_eq!(next(&fresh, &mut tx).await, Some((delivery, 2)));
    sqlx::raw_sql("savepoint b").execute(&mut *tx).await.expect("savepoint");
    assert!(failed(&fresh, &mut tx, delivery, "two").await);
    sqlx::raw_sql("release b; release a; drop table burnt_xid").execute(&mut *tx).await.expect("release");
    tx.commit().await.expect("commit");
    // After its savepoint was rolled back.
    let mut tx = fresh.pool.begin().await.expect("begin");
    sqlx::raw_sql("savepoint a").execute(&mut *tx).await.expect("savepoint");
    assert_eq!(next(&fresh, &mut tx).await, Some((delivery, 3)));
    sqlx::raw_sql("rollback to a").execute(&mut *tx).await.expect("rollback");
    assert!(failed(&fresh, &mut tx, delivery, "three").await);
    tx.commit().await.expect("commit");
    // After a rollback; the last attempt.
    let mut tx = fresh.pool.begin().await.expect("begin");
    assert_eq!(next(&fresh, &mut tx).await, Some((delivery, 4)));
    let mut other = fresh.pool.acquire().await.expect("a connection");
    assert!(!failed(&fresh, &mut other, delivery, "not yours").await, "somebody has it");
    tx.rollback().await.expect("rollback");
    assert!(failed(&fresh, &mut other, delivery, "four").await);
    let (state, attempts) = standing(&fresh, delivery).await;
    assert_eq!(state, State::Dead);
    let errors: Vec<_> = attempts.iter().map(|a| (a.number, a.error.as_deref().unwrap_or_default())).collect();
    assert_eq!(errors[1..], [(2, "two"), (3, "three"), (4, "four")]);
    assert!(!failed(&fresh, &mut other, delivery, "once more").await, "it is dead");
    // An attempt that is named: that one, or none.
    publish(&fresh, 1).await;
    let at = format!("select {}.failed($1, 'late', '0 s', attempt => $2)", fresh.schema());
    let mut tx = fresh.pool.begin().await.expect("begin");
    let (delivery, _) = next(&fresh, &mut tx).await.expect("one is there");
    tx.rollback().await.expect("rollback");
    for (number, counted) in [(2, false), (1, true), (1, false), (2, true)] {
        let told: bool = sqlx::query_scalar(sqlx::AssertSqlSafe(at.clone()))
            .bind(delivery)
            .bind(number)
            .fetch_one(&mut *other)
            .await
            .expect("failed");
        assert_eq!(told, counted, "attempt {number}");
    }
    let mut tx = fresh.pool.begin().await.expect("begin");
    assert_eq!(next(&fresh, &mut tx).await, Some((delivery, 3)));
    let told: bool =
        sqlx::query_scalar(sqlx::AssertSqlSafe(at)).bind(delivery).bind(2).fetch_one(&mut *tx).await.expect("failed");
    assert!(!told, "the third is in hand");
    tx.commit().await.expect("commit");
    assert_eq!(standing(&fresh, delivery).await.0, State::Succeeded);
    // Once for each time that `next` gave it, however often it is said.
    publish(&fresh, 1).await;
    let mut tx = fresh.pool.begin().await.expect("begin");
    let (delivery, _) = next(&fresh, &mut tx).await.expect("one is there");
    assert!(failed(&fresh, &mut tx, delivery, "one").await);
    assert!(!failed(&fresh, &mut tx, delivery, "one again").await);
    assert_eq!(next(&fresh, &mut tx).await, Some((delivery, 2)));
    assert!(failed(&fresh, &mut tx, delivery, "two").await);
    assert!(!failed(&fresh, &mut tx, delivery, "two again").await);
    assert_eq!(next(&fresh, &mut tx).await, Some((delivery, 3)));
    tx.commit().await.expect("commit");
    assert_eq!(standing(&fresh, delivery).await.1.len(), 3);
    // What somebody else's transaction completed is not undone.
    publish(&fresh, 1).await;
    let mut tx = fresh.pool.begin().await.expect("begin");
    let (delivery, _) = next(&fresh, &mut tx).await.expect("one is there");
    let mut later = fresh.pool.begin().await.expect("begin");
    sqlx::query("select pg_current_xact_id()").execute(&mut *later).await.expect("an id");
    tx.commit().await.expect("commit");
    assert!(!failed(&fresh, &mut later, delivery, "too late").await);
    later.commit().await.expect("commit");
    assert_eq!(standing(&fresh, delivery).await.0, State::Succeeded);
}

#[tokio::test]
async fn eight_consumers_take_each_once() {
    let fresh = declared(4).await;
    publish(&fresh, 80).await;
    let mut consumers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let (pool, sql) = (fresh.pool.clone(), format!("select delivery from {}.next('orders')", fresh.schema()));
        consumers.spawn(async move {
            let mut mine: Vec<i64> = Vec::new();
            loop {
                let mut tx = pool.begin().await.expect("begin");
                let one = sqlx::query_scalar(sqlx::AssertSqlSafe(sql.clone())).fetch_optional(&mut *tx).await;
                match one.expect("next") {
                    Some(delivery) => mine.push(delivery),
                    None => return mine,
                }
                tx.commit().await.expect("commit");
            }
        });
    }
    let mut all: Vec<i64> = consumers.join_all().await.into_iter().flatten().collect();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 80);
    let left = format!("select count(*) from {}.delivery where state <> 'succeeded'", fresh.schema());
    assert_eq!(Postgres::count(&fresh, &left).await, 0);
}

#[tokio::test]
async fn retries_wait_their_time_and_are_not_overtaken_for_ever() {
    let fresh = declared(4).await;
    let schema = fresh.schema();
    publish(&fresh, 1).await;
    let mut connection = fresh.pool.acquire().await.expect("a connection");
    let (delivery, _) = next(&fresh, &mut connection).await.expect("it commits by itself");
    assert_eq!(standing(&fresh, delivery).await.0, State::Succeeded, "outside of a transaction: at most once");

    publish(&fresh, 1).await;
    let mut tx = fresh.pool.begin().await.expect("begin");
    let (delivery, _) = next(&fresh, &mut tx).await.expect("one is there");
    let sql = format!("select {schema}.failed($1, 'later', '1 hour')");
    let counted: bool =
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).bind(delivery).fetch_one(&mut *tx).await.expect("failed");
    assert!(counted);
    tx.commit().await.expect("commit");
    assert_eq!(next(&fresh, &mut connection).await, None, "due in an hour");
    assert!(!failed(&fresh, &mut connection, delivery, "again").await, "it was counted already");
    // Due since long ago, it goes before what was published meanwhile; no worker has promoted it.
    publish(&fresh, 3).await;
    Postgres::execute(&fresh, &format!("update {schema}.scheduled set due_at = now() - interval '2 hours'")).await;
    // Whatever level it begins with, as it does once in a while.
    for _ in 0..200 {
        let mut tx = fresh.pool.begin().await.expect("begin");
        assert_eq!(next(&fresh, &mut tx).await, Some((delivery, 2)));
        tx.rollback().await.expect("rollback");
    }
}

#[tokio::test]
async fn wrong_uses_are_told() {
    let fresh = declared(4).await;
    for (sql, code, words) in [
        ("select * from {schema}.next('nobody')", "42704", "no subscription `nobody`"),
        ("select * from {schema}.next('orders', 'shop')", "42704", "of application `shop`"),
        ("select * from {schema}.next(null)", "42704", "no subscription"),
        ("select {schema}.subscribe('', 'a.b')", "22023", "1 to 255 bytes"),
        ("select {schema}.subscribe('x y', 'a.b')", "22023", "without spaces"),
        ("select {schema}.subscribe('x', '')", "22023", "must not be empty"),
        ("select {schema}.subscribe('x', 'a..b')", "22023", "empty segment"),
        ("select {schema}.subscribe('x', 'a.>.b')", "22023", "misplaced wildcard"),
        ("select {schema}.subscribe('x', repeat('a', 256))", "22023", "256 bytes"),
        ("select {schema}.subscribe('x', 'a', max_attempts => 0)", "22023", "1 to 1000"),
        ("select {schema}.subscribe('x', 'a', start => 'soon')", "22023", "beginning"),
        ("select {schema}.subscribe('x', 'a', application => repeat('a', 64))", "22023", "63 bytes"),
        ("select {schema}.subscribe('x', 'a', start => 'infinity')", "22023", "beginning"),
        ("select {schema}.subscribe('x', 'a', start => '200000-01-01')", "22023", "beginning"),
        ("select {schema}.failed(1, 'x', '-1 s')", "22023", "retry_after"),
        ("select {schema}.failed(1, 'x', attempt => 0)", "22023", "from 1"),
        ("select {schema}.failed(1, 'x', attempt => -2147483648)", "22023", "from 1"),
        ("select {schema}.publish('a', '1', at => 'infinity')", "22008", "due time"),
        ("select {schema}.publish('a', '1', at => '200000-01-01')", "22008", "year 9999"),
        ("select {schema}.publish('a', '1', occurred_at => '-infinity')", "22008", "time of occurrence"),
        ("select {schema}.publish('a', '1', occurred_at => '4000-01-01 BC')", "22008", "year 1"),
    ] {
        let (found, message) = refused(&fresh, sql).await;
        assert!(found == code && message.contains(words), "{sql}: {found} {message}");
    }
    Postgres::execute(&fresh, &format!("select {}.subscribe('orders', 'a', application => 'shop')", fresh.schema()))
        .await;
    let (code, message) = refused(&fresh, "select * from {schema}.next('orders')").await;
    assert!(code == "22023" && message.contains("shop, sql"), "{code} {message}");
    let operation = format!("update {}.subscription set kind = 'operation' where application = 'shop'", fresh.schema());
    Postgres::execute(&fresh, &operation).await;
    for sql in ["select * from {schema}.next('orders', 'shop')", "select {schema}.subscribe('orders', 'b', 'shop')"] {
        let (code, message) = refused(&fresh, sql).await;
        assert!(code == "22023" && message.contains("operation"), "{sql}: {code} {message}");
    }
}

/// An old setting that some databases still have: backslashes in plain strings are escapes.
#[tokio::test]
async fn backslashes_mean_the_same_under_the_old_setting() {
    let fresh = declared(4).await;
    let mut on = fresh.pool.acquire().await.expect("a connection");
    sqlx::raw_sql("set standard_conforming_strings = off; set escape_string_warning = off")
        .execute(&mut *on)
        .await
        .expect("set");
    let publish = format!("select {}.publish($1, body => 'x', content_type => $2)", fresh.schema());
    for (topic, content_type, taken) in [
        ("orders.placed", r#"text/plain; a="b\"c""#, true),
        ("ordersxplaced", "text/plain", true),
        ("orders..placed", "text/plain", false),
        ("orders.placed", r#"text/plain; a="b\""#, false),
        ("orders.placed", r#"text/plain; a="b"c""#, false),
    ] {
        let told = sqlx::query(sqlx::AssertSqlSafe(publish.clone())).bind(topic).bind(content_type).execute(&mut *on);
        let told = told.await;
        assert_eq!(told.is_ok(), taken, "{topic} {content_type}: {told:?}");
    }
    let (delivery, _) = next(&fresh, &mut on).await.expect("one is there");
    assert_eq!(standing(&fresh, delivery).await.0, State::Succeeded);
    // The next connection from the pool is not one with that setting.
    on.close().await.expect("close");
}

#[tokio::test]
async fn subscribing_keeps_the_routing_protocol() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    publish(&fresh, 2).await; // unrouted
    let subscribe = |more: &str| format!("select {schema}.subscribe('orders', {more})");
    Postgres::execute(&fresh, &subscribe("'orders.placed'")).await;
    let epoch = format!("select epoch from {schema}.routing");
    assert_eq!(Postgres::count(&fresh, &epoch).await, 2);
    Postgres::execute(&fresh, &subscribe("'orders.placed'")).await;
    assert_eq!(Postgres::count(&fresh, &epoch).await, 2, "nothing new");
    while fresh.postbox.store_backfill().await {}
    let waiting = format!("select count(*) from {schema}.ready");
    assert_eq!(Postgres::count(&fresh, &waiting).await, 2, "what nobody was subscribed to");
    Postgres::execute(&fresh, &subscribe("'orders.*', max_attempts => 9")).await;
    assert_eq!(Postgres::count(&fresh, &epoch).await, 3);
    publish(&fresh, 1).await;
    assert_eq!(Postgres::count(&fresh, &waiting).await, 3);
    // From the beginning, and as a worker with the same name finds it.
    Postgres::execute(&fresh, &subscribe("'orders.*', application => 'audit', start => 'beginning'")).await;
    while fresh.postbox.store_backfill().await {}
    assert_eq!(Postgres::count(&fresh, &waiting).await, 6);
    let orders = fresh.postbox.subscription("orders").application("sql");
    let mut tx = fresh.pool.begin().await.expect("begin");
    assert_eq!(orders.next(&mut tx).await.expect("next").expect("one is there").max_attempts(), 9);
    tx.commit().await.expect("commit");
}

/// The store's verb, by a short name.
trait Backfill {
    async fn store_backfill(&self) -> bool;
}

impl Backfill for postbox::Postbox<Postgres> {
    async fn store_backfill(&self) -> bool {
        use postbox::store::Store;
        self.store().backfill().await.expect("backfill")
    }
}

/// Texts that are patterns, nearly patterns, or neither.
fn texts() -> Vec<String> {
    let segment = prop_oneof![Just("*".to_owned()), Just(">".to_owned()), "[a-c+:/@_-]{1,3}", "[a-c*>. é+]{0,4}"];
    let text = prop::collection::vec(segment, 1..4).prop_map(|segments| segments.join("."));
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    (0..500).map(|_| text.new_tree(&mut runner).expect("a text").current()).collect()
}

#[tokio::test]
async fn patterns_mean_the_same_in_sql_as_in_the_library() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    let mut connection = fresh.pool.acquire().await.expect("a connection");
    let mut accepted = 0;
    for (n, text) in texts().iter().enumerate() {
        let parsed = text.parse::<Pattern>();
        let sql = format!("select {schema}.subscribe($1, $2)");
        let told =
            sqlx::query(sqlx::AssertSqlSafe(sql)).bind(format!("s{n}")).bind(text).execute(&mut *connection).await;
        assert_eq!(parsed.is_ok(), told.is_ok(), "{text}: {parsed:?} {told:?}");
        let Ok(pattern) = parsed else { continue };
        accepted += 1;
        // The library stores its own matcher under the same pattern: the texts are the same.
        fresh.postbox.subscription(format!("s{n}")).listening_to(pattern).declare().await.expect("declare");
    }
    assert!(accepted > 100, "only {accepted} patterns: this checks little");
    let different = format!(
        "select count(*) from {schema}.subscription a join {schema}.subscription b using (name)
         where a.application = 'sql' and b.application = 'test' and (a.matcher <> b.matcher
             or (a.retry_base_ms, a.retry_cap_ms, a.max_attempts, a.timeout_ms, a.quiet_ms)
                 <> (b.retry_base_ms, b.retry_cap_ms, b.max_attempts, b.timeout_ms, b.quiet_ms))"
    );
    assert_eq!(Postgres::count(&fresh, &different).await, 0);
}

#[tokio::test]
async fn the_backoff_is_the_librarys() {
    let fresh = declared(10).await;
    let schema = fresh.schema();
    for (base, cap) in [(1000_i64, 900_000_i64), (1, 7), (0, 0), (5000, 5000), (315_360_000_000, 315_360_000_000)] {
        let policy = RetryPolicy {
            max_attempts: 1000,
            base: Duration::from_millis(base as u64),
            cap: Duration::from_millis(cap as u64),
        };
        for attempt in [1, 2, 3, 10, 11, 31, 32, 33, 1000] {
            let sql = format!("select {schema}.backoff_ceiling_ms({base}, {cap}, {attempt})");
            let ceiling = Postgres::count(&fresh, &sql).await;
            assert_eq!(
                ceiling as u128,
                policy.ceiling(attempt).as_millis(),
                "base {base}, cap {cap}, attempt {attempt}"
            );
        }
    }
    // What `failed` draws lies below it, and is not always the same. All are taken first: on a slow
    // machine those that failed would be due again meanwhile.
    publish(&fresh, 30).await;
    let mut tx = fresh.pool.begin().await.expect("begin");
    let mut taken = Vec::new();
    while let Some((delivery, _)) = next(&fresh, &mut tx).await {
        taken.push(delivery);
    }
    for delivery in taken {
        let sql = format!("select {schema}.failed($1, 'no')");
        sqlx::query(sqlx::AssertSqlSafe(sql)).bind(delivery).execute(&mut *tx).await.expect("failed");
    }
    tx.commit().await.expect("commit");
    let waits = format!(
        "select count(distinct due_at - o.finished_at) from {schema}.scheduled s join {schema}.outcome o using (delivery)
         where s.due_at - o.finished_at between interval '-1 s' and interval '1 s'"
    );
    assert!(Postgres::count(&fresh, &waits).await > 20, "spread over the first second");
}

#[tokio::test]
async fn objects_of_the_session_change_nothing() {
    let fresh = declared(4).await;
    publish(&fresh, 1).await;
    let schema = fresh.schema();
    let mut tx = fresh.pool.begin().await.expect("begin");
    let plant = format!(
        "create temporary table outcome (); create temporary table ready ();
         create function pg_temp.clock_timestamp() returns timestamptz language sql as 'select 1 / 0, now()::timestamptz';
         set local search_path = pg_temp, {schema}; set local standard_conforming_strings = off"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(plant.replace("'select 1 / 0, now()::timestamptz'", "'select now()'")))
        .execute(&mut *tx)
        .await
        .expect("planted");
    let (delivery, _) = next(&fresh, &mut tx).await.expect("one is there");
    assert!(failed(&fresh, &mut tx, delivery, "no").await);
    let sql = format!("select {schema}.subscribe('other', 'a.*.c+d.>')");
    sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&mut *tx).await.expect("subscribe");
    tx.commit().await.expect("commit");
    let same =
        format!("select count(*) from {schema}.subscription where matcher = E'^a\\\\.[^.]+\\\\.c\\\\+d\\\\..+$'");
    assert_eq!(Postgres::count(&fresh, &same).await, 1);
}
