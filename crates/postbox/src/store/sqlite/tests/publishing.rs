use super::*;
use crate::error::{Error, PublishError};
use crate::pattern::Pattern;

#[tokio::test]
async fn urls_that_are_no_shared_file_are_refused() {
    for url in [
        "sqlite::memory:",
        "sqlite://:memory:",
        "sqlite:",
        "sqlite:x.db?mode=memory",
        "sqlite:x.db?mode=ro",
        "sqlite:file:x?mode=memory",
        "sqlite:file%3Ax%3Fmode=memory",
        "sqlite:%3Amemory%3A",
        "sqlite:x.db?mode=mem%6Fry",
        "sqlite:x.db?vfs=memdb",
        "postgres://localhost/x",
    ] {
        let refused = SqliteStore::connect(&Settings::defaults().url(url)).await;
        assert!(matches!(refused, Err(Error::Settings(_))), "{url}: {refused:?}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let nowhere = format!("sqlite:{}/none/shop.db", folder.path().display());
    let error = SqliteStore::connect(&Settings::defaults().url(nowhere)).await.expect_err("no folder");
    assert!(error.to_string().contains("none/shop.db"), "{error}");
}

#[tokio::test]
async fn migrates_once_and_refuses_a_newer_schema() {
    let shop = Shop::new().await;
    assert_eq!(shop.store.migrate().await.expect("is migrated"), Vec::<String>::new());
    let status = shop.store.migration_status().await.expect("status");
    assert!(status.migrations.iter().all(|(.., at)| at.is_some()));
    assert_eq!(shop.count("select count(*) from pragma_journal_mode where journal_mode = 'wal'").await, 1);
    shop.run("insert into postbox_migration values (99, 'later', 0)").await;
    let url = format!("sqlite:{}", shop.folder.path().join("shop.db").display());
    let error = SqliteStore::connect(&Settings::defaults().url(url)).await.expect_err("newer");
    assert!(matches!(error, Error::Schema { found: 99, .. }), "{error:?}");
}

#[tokio::test]
async fn many_open_a_new_file_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let opened = futures_util::future::join_all((0..6).map(|_| open(folder.path()))).await;
    assert_eq!(opened.len(), 6);
}

#[tokio::test]
async fn a_message_is_kept_as_it_was_given() {
    let shop = Shop::new().await;
    shop.register(vec![declared("all", ">")]).await;
    let text = r#"{"n": 12345678901234567890.10, "quote": "\"'; drop", "é": "😀"}"#;
    let at = "2020-01-02T03:04:05.678901Z".parse().expect("a time");
    let draft = Envelope::raw("orders.placed", text)
        .expect("valid")
        .key("k\"1")
        .header("a", "b\u{1}\"")
        .occurred_at(at)
        .source("src")
        .external_id("ext")
        .correlation_id("cor")
        .causation_id("cau")
        .max_attempts(7);
    let Stored::New(id) = shop.publish(&[draft]).await.remove(0) else { panic!("new") };
    let (envelope, deliveries) = shop.store.deliveries_of(id).await.expect("reads").expect("is there");
    assert_eq!(envelope.payload_json(), Some(text));
    assert_eq!((envelope.id, envelope.topic.as_str(), envelope.key.as_deref()), (id, "orders.placed", Some("k\"1")));
    assert_eq!(envelope.headers["a"], "b\u{1}\"");
    assert_eq!(envelope.occurred_at, at);
    assert_eq!(envelope.source.as_deref(), Some("src"));
    assert_eq!(envelope.external_id.as_deref(), Some("ext"));
    assert_eq!((envelope.correlation_id.as_deref(), envelope.causation_id.as_deref()), (Some("cor"), Some("cau")));
    assert_eq!(envelope.max_attempts, Some(7));
    assert_eq!(deliveries.len(), 1);
}

#[tokio::test]
async fn a_rolled_back_publish_leaves_nothing() {
    let shop = Shop::new().await;
    shop.register(vec![declared("all", ">")]).await;
    let mut connection = shop.connection().await;
    let mut tx = connection.begin().await.expect("begins");
    SqliteStore::publish(&mut tx, &shop.store, &[draft("a", 1).dedup("k"), draft("b", 2)]).await.expect("publishes");
    tx.rollback().await.expect("rolls back");
    for table in [
        "select count(*) from postbox_message",
        "select count(*) from postbox_delivery",
        "select count(*) from postbox_dedup",
    ] {
        assert_eq!(shop.count(table).await, 0, "{table}");
    }
}

#[tokio::test]
async fn dedup_in_and_out_of_its_window() {
    let shop = Shop::new().await;
    shop.register(vec![declared("all", ">")]).await;
    let keyed = |n: u32| draft("a", n).dedup("k");
    let first = shop.publish(&[keyed(1)]).await.remove(0);
    let Stored::New(id) = first else { panic!("{first:?}") };
    let again = shop.publish(&[draft("a", 5), keyed(1), keyed(2), draft("b", 1).dedup("k")]).await;
    assert!(
        matches!(again[0], Stored::New(_)) && matches!(again[3], Stored::New(_)),
        "the key is the topic's: {again:?}"
    );
    assert_eq!(again[1], Stored::Duplicate { existing: id, same_body: true });
    assert_eq!(again[2], Stored::Duplicate { existing: id, same_body: false });
    assert_eq!(shop.count("select count(*) from postbox_delivery").await, 3);
    assert_eq!(shop.store.tidy().await.expect("tidies"), 0);
    shop.run("update postbox_dedup set expires_at = 0").await;
    assert!(matches!(shop.publish(&[keyed(2)]).await[0], Stored::New(other) if other != id));
    shop.run("update postbox_dedup set expires_at = 0").await;
    assert_eq!(shop.store.tidy().await.expect("tidies"), 2);
    // Twice in one call: the second finds the first.
    let twice = shop.publish(&[keyed(3), keyed(3)]).await;
    assert!(
        matches!((&twice[0], &twice[1]), (Stored::New(a), Stored::Duplicate { existing: b, same_body: true }) if a == b)
    );
}

#[tokio::test]
async fn a_window_of_no_length_and_a_long_one() {
    let shop = Shop::new().await;
    let keyed = |window| draft("a", 1).dedup_within("k", window);
    for _ in 0..3 {
        assert!(matches!(shop.publish(&[keyed(Duration::ZERO)]).await[0], Stored::New(_)));
    }
    assert!(matches!(shop.publish(&[keyed(crate::message::MAX_WAIT)]).await[0], Stored::New(_)));
    assert!(matches!(shop.publish(&[keyed(Duration::ZERO)]).await[0], Stored::Duplicate { same_body: true, .. }));
}

#[tokio::test]
async fn one_key_from_many_connections_is_one_message() {
    let shop = Shop::new().await;
    let keyed = || draft("a", 1).dedup("k");
    let stored =
        futures_util::future::join_all((0..8).map(|_| async { shop.publish(&[keyed()]).await.remove(0) })).await;
    assert_eq!(stored.iter().filter(|s| matches!(s, Stored::New(_))).count(), 1);
    assert_eq!(shop.count("select count(*) from postbox_message").await, 1);
}

#[tokio::test]
async fn bulk_keeps_the_order_and_unrouted_ones_are_kept() {
    let shop = Shop::new().await;
    let (worker, ids) = shop.register(vec![declared("orders", "orders.*")]).await;
    let drafts: Vec<Draft> = (0..1000).map(|n| draft(if n % 10 == 0 { "other" } else { "orders.placed" }, n)).collect();
    let stored = shop.publish(&drafts).await;
    assert!(stored.iter().all(|s| matches!(s, Stored::New(_))));
    let (claimed, _) = claim(&shop.store, worker, ids[0], 2000).await;
    let order: Vec<i64> =
        claimed.items.iter().map(|i| i.envelope.as_ref().expect("there").decode().expect("a number")).collect();
    assert_eq!(order, (0..1000).filter(|n| n % 10 != 0).collect::<Vec<i64>>());
    let status = shop.store.status().await.expect("status");
    assert_eq!((status.unrouted, status.unrouted_topics), (100, vec!["other".to_owned()]));
}

#[tokio::test]
async fn a_transaction_that_read_first_and_lost_the_race_is_told_that_the_file_is_busy() {
    let shop = Shop::new().await;
    let mut late = shop.connection().await;
    let mut tx = late.begin().await.expect("begins");
    sqlx::query("select * from postbox_message").fetch_all(&mut *tx).await.expect("reads");
    shop.publish(&[draft("a", 1)]).await;
    let error = SqliteStore::publish(&mut tx, &shop.store, &[draft("a", 2)]).await.expect_err("cannot upgrade");
    assert!(matches!(error, PublishError::Busy(_)), "{error:?}");
    assert!(Error::from(error).is_transient());
}

#[tokio::test]
async fn the_view_matches_as_patterns_do() {
    let shop = Shop::new().await;
    let patterns = [
        "a",
        "a.b",
        "a.b.c",
        "*",
        "*.*",
        ">",
        "a.*",
        "a.>",
        "*.b",
        "*.>",
        "a.*.c",
        "a.*.c.>",
        "*.*.c",
        "a.b.>",
        "a.*.*",
        "a+b",
        "1.2",
        "1.*",
        "a-b.c_d:e/f@g",
        "A.b",
        "*.b.*.>",
        "123",
        "null",
        "true.*",
    ];
    let topics = [
        "a",
        "b",
        "a.b",
        "a.c",
        "a.b.c",
        "a.x.c",
        "a.x.c.y",
        "a.x.c.y.z",
        "a.x.y.c.z",
        "a.b.c.d",
        "1.2",
        "1.20",
        "a+b",
        "a-b.c_d:e/f@g",
        "A.b",
        "x.b.y.z",
        "x.b.y",
        "123",
        "null",
        "true.false",
    ];
    shop.register(patterns.iter().map(|p| declared(p, p)).collect()).await;
    shop.publish(&topics.map(|t| draft(t, 0))).await;
    let routed: Vec<(String, String)> = sqlx::query_as(
        "select s.pattern, m.topic from postbox_delivery d join postbox_subscription s on s.id = d.subscription
         join postbox_message m on m.id = d.message",
    )
    .fetch_all(&shop.store.reader)
    .await
    .expect("reads");
    for pattern in patterns {
        let parsed: Pattern = pattern.parse().expect("a pattern");
        let listed =
            shop.store.list(&format!("topic:{pattern}").parse().expect("a filter"), 10_000).await.expect("lists");
        for topic in topics {
            let expected = parsed.matches(topic);
            assert_eq!(routed.contains(&(pattern.into(), topic.into())), expected, "{pattern} ~ {topic}");
            assert_eq!(listed.iter().any(|d| d.topic == topic), expected, "list topic:{pattern} ~ {topic}");
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]
    #[test]
    fn the_view_matches_as_patterns_do_at_random(
        patterns in proptest::collection::vec("[ab*]([.][ab*]){0,3}([.]>)?", 20),
        topics in proptest::collection::vec("[ab]([.][ab]){0,4}", 20),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let shop = Shop::new().await;
            shop.register(patterns.iter().enumerate().map(|(i, p)| declared(&i.to_string(), p)).collect()).await;
            shop.publish(&topics.iter().map(|t| draft(t, 0)).collect::<Vec<_>>()).await;
            let expected = patterns.iter().flat_map(|p| {
                let pattern: Pattern = p.parse().expect("a pattern");
                topics.iter().filter(move |t| pattern.matches(t))
            });
            assert_eq!(shop.count("select count(*) from postbox_delivery").await, expected.count() as i64);
        });
    }
}

#[tokio::test]
async fn nothing_is_due_before_its_time() {
    let shop = Shop::new().await;
    let (worker, ids) = shop.register(vec![declared("all", ">")]).await;
    let soon = jiff::Timestamp::now() + Duration::from_secs(1);
    let past = jiff::Timestamp::now() - Duration::from_secs(60);
    shop.publish(&[draft("a", 1).after(Duration::from_secs(60)), draft("a", 2).at(soon), draft("a", 3).at(past)]).await;
    let (claimed, _) = claim(&shop.store, worker, ids[0], 10).await;
    assert_eq!(claimed.items.len(), 1);
    assert!(claimed.next_due.is_some_and(|wait| wait <= Duration::from_secs(1)));
    let (nothing, _) = claim(&shop.store, worker, ids[0], 10).await;
    assert!(nothing.items.is_empty());
    tokio::time::sleep(nothing.next_due.expect("something waits") + Duration::from_millis(2)).await;
    let (claimed, _) = claim(&shop.store, worker, ids[0], 10).await;
    assert_eq!(claimed.items.len(), 1);
    assert!(jiff::Timestamp::now() >= soon);
    assert!(claimed.next_due.is_some_and(|wait| wait > Duration::from_secs(50)));
}
