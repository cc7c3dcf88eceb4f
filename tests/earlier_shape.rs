//! A database of the earlier shape, with work of every kind in it, is carried over.

use std::collections::BTreeMap;
use std::time::Duration;

use postbox::admin::Filter;
use postbox::lifecycle::{End, Kind};
use postbox::store::{Move, Settle, Store};
use postbox::{Envelope, Postbox, Postgres, Retention, migrations_sql};
use postbox_testkit::hand::{self, Hand, success};
use postbox_testkit::{Testable, end_window};

/// The last version of the earlier shape.
const EARLIER: u32 = 6;

async fn sql(fresh: &postbox_testkit::Fresh<Postgres>, text: &str) {
    Postgres::execute(fresh, &text.replace("{s}", &fresh.schema())).await;
}

/// Every delivery: its state, its attempts, its message.
async fn deliveries(postbox: &Postbox<Postgres>) -> BTreeMap<i64, (String, u32, uuid::Uuid)> {
    let rows = postbox.admin().list(&Filter::default(), 100).await.expect("list");
    rows.into_iter().map(|r| (r.id, (r.state.as_str().to_owned(), r.attempt, r.message))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unfinished_work_is_carried_over_and_goes_on() {
    let fresh = Postgres::fresh().await;
    let admin = fresh.postbox.admin();
    let declared = vec![
        hand::declared("plain", "p.*", Kind::Plain),
        hand::declared("second", "p.two", Kind::Plain),
        hand::declared("charge", "o", Kind::Operation),
    ];
    let hand = Hand::register(&fresh, declared).await;
    let (plain, second, charge) = (hand.subscriptions[0], hand.subscriptions[1], hand.subscriptions[2]);
    let publish = async |topic: &str| {
        fresh.postbox.publish_now([Envelope::json(topic, &1).expect("valid")]).await.expect("publish")[0].id
    };
    // One that succeeded, one that is dead, one that failed and waits, one in doubt, one that runs.
    publish("p.one").await;
    let claimed = hand.claim_of(&[plain], 1).await;
    hand.settle(Settle { successes: vec![success(&claimed.items[0])], close: true, ..hand.flush(&claimed, 1) }).await;
    for end in [End::Failed { permanent: true, retry_after: None }, End::Failed { permanent: false, retry_after: None }]
    {
        publish("p.one").await;
        let claimed = hand.claim_of(&[plain], 1).await;
        let delay = Duration::from_secs(3600);
        let moves = vec![Move { delay, ..hand::ended(&claimed.items[0], Kind::Plain, end, false) }];
        hand.settle(Settle { moves, close: true, ..hand.flush(&claimed, 1) }).await;
    }
    publish("o").await;
    let claimed = hand.claim_of(&[charge], 1).await;
    hand.settle(Settle { starts: vec![(claimed.items[0].delivery, 1)], ..hand.flush(&claimed, 1) }).await;
    let moves = vec![hand::ended(&claimed.items[0], Kind::Operation, End::InDoubt, true)];
    hand.settle(Settle { moves, close: true, ..hand.flush(&claimed, 2) }).await;
    publish("p.one").await;
    let running = hand.claim_of(&[plain], 1).await;
    // What waits: for one subscription, for two, until tomorrow, and for nobody; one with a dedup key.
    publish("p.one").await;
    let two = publish("p.two").await;
    let later = Envelope::json("p.one", &1).expect("valid").after(Duration::from_secs(86_400)).dedup("once");
    fresh.postbox.publish_now([later]).await.expect("publish");
    publish("nobody").await;
    let before = deliveries(&fresh.postbox).await;
    assert_eq!(before.len(), 9);

    // With a worker that is alive: nothing is lost by this step.
    let names = fresh.postbox.migrate_down_and_lose_data(EARLIER).await.expect("down");
    let stepped = [
        "0017 due_in_turn",
        "0016 batch_ids",
        "0015 find_delivery",
        "0014 inbox",
        "0013 unique",
        "0012 order",
        "0011 pause_and_priority",
        "0010 schedules",
        "0009 limits",
        "0008 lighter_arrays",
        "0007 windows_and_ring",
    ];
    assert_eq!(names, stepped);
    // It is the earlier shape, and its own function publishes into it.
    assert_eq!(Postgres::count(&fresh, &format!("select count(*) from pg_partitioned_table t join pg_class c on c.oid = t.partrelid where c.relnamespace = '{}'::regnamespace", fresh.schema())).await, 0);
    sql(&fresh, r#"select {s}.publish('p.two', '{"earlier": true}')"#).await;
    let up: Vec<String> = names.into_iter().rev().collect();
    assert_eq!(fresh.postbox.migrate_up().await.expect("up"), up);

    let after = deliveries(&fresh.postbox).await;
    assert_eq!(after.len(), 11, "and the two of the function's");
    for (delivery, stood) in &before {
        assert_eq!(after.get(delivery), Some(stood), "{delivery}");
        let detail = admin.show(*delivery).await.expect("there");
        assert!(detail.envelope.is_some() && detail.attempts.len() == stood.1 as usize, "{delivery}");
    }
    let (_, of_two) = admin.message(two).await.expect("there");
    assert_eq!(of_two.len(), 2, "a message knows its deliveries");
    assert_eq!(admin.status().await.expect("status").unrouted, 1);
    let again = Envelope::json("p.one", &1).expect("valid").dedup("once");
    assert!(fresh.postbox.publish_now([again]).await.expect("publish")[0].is_duplicate());
    // A lease of before settles, the rest is delivered, and what comes goes to the new tables.
    let successes = running.items.iter().map(success).collect();
    hand.settle(Settle { successes, close: true, ..hand.flush(&running, 1) }).await;
    publish("p.two").await;
    let mut left = Vec::new();
    for subscription in [plain, second] {
        let claimed = hand.claim_of(&[subscription], 100).await;
        left.push(claimed.items.len());
        assert!(claimed.items.iter().all(|i| i.envelope.is_some()));
        let successes = claimed.items.iter().map(success).collect();
        hand.settle(Settle { successes, close: true, ..hand.flush(&claimed, 1) }).await;
    }
    assert_eq!(left, [4, 3]);
    // In time, what has ended goes, from the tables of before as well.
    sql(&fresh, "update {s}.subscription set keep_succeeded_ms = 0, keep_dead_ms = 0").await;
    end_window(&fresh).await;
    let retention = Retention { keep_unrouted: Duration::MAX, most: 100, tell: false };
    let mut gone = (0, 0);
    loop {
        let step = fresh.postbox.store().retain(&retention).await.expect("retain");
        gone = (gone.0 + step.deliveries, gone.1 + step.messages);
        if !step.more {
            break;
        }
    }
    assert_eq!(gone, (10, 7), "what waits, what is in doubt and what nobody takes stays");
    let left: Vec<String> = deliveries(&fresh.postbox).await.into_values().map(|(state, ..)| state).collect();
    assert_eq!(left, ["pending", "in_doubt", "pending"]);
}

#[tokio::test]
async fn a_printed_schema_of_the_earlier_shape_goes_on_by_itself() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    fresh.postbox.migrate_down_and_lose_data(0).await.expect("down");
    let text = migrations_sql(&schema).expect("a plain name");
    let (earlier, _) = text.split_once("\n-- 0007 ").expect("the migration of the present shape");
    Postgres::execute(&fresh, earlier).await;
    sql(&fresh, "select {s}.subscribe('taken', 't.>', 'app')").await;
    sql(&fresh, "select {s}.publish('t.' || n, to_json(n)::jsonb) from generate_series(1, 20) n").await;
    fresh.postbox.migrate_up().await.expect("up");
    let kinds = format!("select count(*) from {schema}.ready r join {schema}.message m on m.id = r.message");
    assert_eq!(Postgres::count(&fresh, &kinds).await, 20);
    sql(&fresh, "do $$ begin perform {s}.next('taken', 'app') from generate_series(1, 20); end $$").await;
    assert_eq!(Postgres::count(&fresh, &kinds).await, 0);
}
