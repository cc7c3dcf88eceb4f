//! Higher ones go first, wherever a delivery has been meanwhile; and a flood of them keeps nobody waiting for
//! good.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use postbox::admin::{Cancel, Filter, Replay, Retry};
use postbox::lifecycle::{End, Kind};
use postbox::store::{Item, Settle};
use postbox::{AsConnection, Draft, Envelope, Failure, Postbox, Postgres, Priority, Router, handler};
use postbox_testkit::hand::{Hand, declared, ended, success};
use postbox_testkit::{Fresh, Login, Testable, on_both_stores};
use sqlx::Connection;

on_both_stores!(
    a_flood_leaves_the_others_an_eighth,
    one_at_a_time_the_eighth_is_a_lower_one,
    a_high_one_is_found_at_once_wherever_claims_have_come_to,
    it_goes_along_wherever_a_delivery_goes,
    it_is_known_to_those_who_come_later,
    a_worker_comes_to_low_ones_in_front_of_a_backlog_of_high_ones,
    who_pulls_gets_a_low_one_among_high_ones,
);

const PATIENCE: Duration = Duration::from_secs(60);
const LEVELS: [Priority; 3] = Priority::ALL;

fn draft(priority: Priority) -> Draft {
    Envelope::json("t", &priority).expect("JSON").priority(priority)
}

async fn publish<Db: Testable>(fresh: &Fresh<Db>, priority: Priority, count: usize) {
    fresh.postbox.publish_now((0..count).map(|_| draft(priority))).await.expect("publish");
}

async fn hand<Db: Testable>(fresh: &Fresh<Db>) -> Hand<Db> {
    Hand::register(fresh, vec![declared("s", "t", Kind::Plain)]).await
}

/// Claims up to so many and has them all succeed: the level of each.
async fn take<Db: Testable>(hand: &Hand<Db>, room: u32) -> Vec<i16> {
    let claimed = hand.claim(room).await;
    assert!(claimed.items.len() <= room as usize, "no more than was asked for");
    if !claimed.items.is_empty() {
        let successes = claimed.items.iter().map(success).collect();
        hand.settle(Settle { successes, close: true, ..hand.flush(&claimed, 1) }).await;
    }
    for item in &claimed.items {
        let said: Priority =
            item.envelope.as_ref().expect("its message").decode::<String>().expect("a word").parse().expect("one");
        assert_eq!(item.priority, LEVELS.iter().position(|p| *p == said).expect("one of them") as i16 - 1);
    }
    claimed.items.iter().map(|item| item.priority).collect()
}

fn count(levels: &[i16]) -> [usize; 3] {
    [-1, 0, 1].map(|level| levels.iter().filter(|l| **l == level).count())
}

async fn a_flood_leaves_the_others_an_eighth<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = hand(&fresh).await;
    for (priority, count) in [(Priority::Low, 30), (Priority::Normal, 30), (Priority::High, 64)] {
        publish(&fresh, priority, count).await;
    }
    let waits = &fresh.postbox.admin().subscriptions().await.expect("rows")[0];
    assert_eq!((waits.pending, waits.pending_high, waits.pending_low), (124, 64, 30), "as operators see it");
    let mut all = Vec::new();
    // Claims of 16: two of them belong to the others, in turn. There are always more than enough high ones.
    for claim in 0..30 {
        let levels = take(&hand, 16).await;
        assert!(levels.len() == 16 && levels.is_sorted(), "in order: {levels:?}");
        let [high, normal, low] = count(&levels);
        let (normals, lows) = if claim % 2 == 0 { (0, 2) } else { (2, 0) };
        assert_eq!([high, normal, low], [14, normals, lows], "claim {claim}");
        publish(&fresh, Priority::High, 14).await;
        all.extend(levels);
    }
    assert_eq!(count(&all), [420, 30, 30], "nobody was left");
    // A share is no limit: where nobody else is, all room is theirs.
    assert_eq!(count(&take(&hand, 500).await), [64, 0, 0]);
    publish(&fresh, Priority::Low, 300).await;
    publish(&fresh, Priority::High, 3).await;
    assert_eq!(count(&take(&hand, 200).await), [3, 0, 197]);
    publish(&fresh, Priority::High, 3).await;
    assert_eq!(count(&take(&hand, 200).await), [3, 0, 103]);
    assert!(take(&hand, 200).await.is_empty());
}

async fn one_at_a_time_the_eighth_is_a_lower_one<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = hand(&fresh).await;
    for priority in LEVELS {
        publish(&fresh, priority, 50).await;
    }
    let mut levels = Vec::new();
    for _ in 0..32 {
        levels.extend(take(&hand, 1).await);
    }
    let lower: Vec<(usize, i16)> = levels.iter().copied().enumerate().filter(|(_, level)| *level >= 0).collect();
    assert_eq!(lower, [(7, 1), (15, 0), (23, 1), (31, 0)]);
}

async fn a_high_one_is_found_at_once_wherever_claims_have_come_to<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = hand(&fresh).await;
    publish(&fresh, Priority::Low, 700).await;
    publish(&fresh, Priority::Normal, 1_500).await;
    for _ in 0..3 {
        assert_eq!(take(&hand, 400).await.len(), 400);
    }
    // Further than a claim looks back.
    publish(&fresh, Priority::High, 1).await;
    assert_eq!(take(&hand, 10).await[0], -1);
    while take(&hand, 400).await.iter().any(|level| *level < 1) {}
    publish(&fresh, Priority::Normal, 1).await;
    publish(&fresh, Priority::High, 1).await;
    assert_eq!(take(&hand, 10).await[..2], [-1, 0]);
    // And by one who had found nothing, and only looks.
    while !take(&hand, 400).await.is_empty() {}
    assert!(take(&hand, 400).await.is_empty());
    for priority in LEVELS {
        publish(&fresh, priority, 1).await;
        assert_eq!(take(&hand, 400).await.len(), 1);
        assert!(take(&hand, 400).await.is_empty() && take(&hand, 400).await.is_empty());
    }
}

/// Leases the one that is ready.
async fn only<Db: Testable>(hand: &Hand<Db>) -> (postbox::store::Claimed, Item) {
    let wait = async {
        loop {
            let claimed = hand.claim(10).await;
            if let [item] = claimed.items.as_slice() {
                let item = item.clone();
                return (claimed, item);
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("one is ready")
}

async fn it_goes_along_wherever_a_delivery_goes<Db: Testable>() {
    let fresh = Db::fresh().await;
    let admin = fresh.postbox.admin();
    let hand = hand(&fresh).await;
    let soon = draft(Priority::Low).after(Duration::from_millis(1));
    fresh.postbox.publish_now([soon]).await.expect("publish");
    // Due; handed back; failed, and again in a while; taken over; dead, tried again, dead.
    let (claimed, item) = only(&hand).await;
    assert_eq!(item.priority, 1);
    hand.settle(Settle { released: vec![item], close: true, ..hand.flush(&claimed, 1) }).await;
    let (claimed, item) = only(&hand).await;
    assert_eq!(item.priority, 1, "released");
    let again = End::Failed { permanent: false, retry_after: None };
    let moves = vec![ended(&item, Kind::Plain, again, false)];
    hand.settle(Settle { moves, close: true, ..hand.flush(&claimed, 1) }).await;
    let (_, item) = only(&hand).await;
    assert_eq!(item.priority, 1, "failed");
    assert_eq!(hand.dies(&fresh).await, (1, 0, 0));
    let hand = self::hand(&fresh).await;
    let (claimed, item) = only(&hand).await;
    assert_eq!((item.priority, item.lost), (1, 1), "taken over");
    hand.begin(&claimed, 1, &[&item]).await;
    let dead = End::Failed { permanent: true, retry_after: None };
    let moves = vec![ended(&item, Kind::Plain, dead, true)];
    hand.settle(Settle { moves, close: true, ..hand.flush(&claimed, 2) }).await;
    let wish = Retry { rev: None, actor: "ana".into(), reason: "mended".into() };
    admin.retry(item.delivery, &wish).await.expect("retry");
    let (claimed, item) = only(&hand).await;
    assert_eq!(item.priority, 1, "tried again");
    assert_eq!(admin.show(item.delivery).await.expect("show").row.priority, Priority::Low);
    let successes = vec![ended(&item, Kind::Plain, End::Succeeded, false)];
    hand.settle(Settle { moves: successes, close: true, ..hand.flush(&claimed, 1) }).await;
    assert_eq!(admin.show(item.delivery).await.expect("show").row.priority, Priority::Low);
    let replay = Replay { irreversible: false, actor: "ana".into(), reason: "once more".into() };
    let replayed = admin.replay(item.delivery, &replay).await.expect("replay").delivery;
    let (_, item) = only(&hand).await;
    assert_eq!((item.delivery, item.priority), (replayed, 1), "replayed");

    // One that nobody has touched is found by its number, whatever its level.
    let wish = Cancel { rev: None, actor: "ana".into(), reason: "a mistake".into() };
    for priority in LEVELS {
        publish(&fresh, priority, 1).await;
        let newest = &admin.list(&Filter::default(), 1).await.expect("list")[0];
        assert_eq!(newest.priority, priority);
        assert_eq!(admin.show(newest.id).await.expect("show").row.priority, priority);
        admin.cancel(newest.id, &wish).await.expect("cancel");
    }
}

async fn it_is_known_to_those_who_come_later<Db: Testable>() {
    let fresh = Db::fresh().await;
    for priority in LEVELS {
        publish(&fresh, priority, 1).await;
    }
    let later = draft(Priority::High).after(Duration::from_secs(3600));
    fresh.postbox.publish_now([later]).await.expect("publish");
    let hand = hand(&fresh).await;
    assert_eq!(take(&hand, 10).await, [-1, 0, 1], "they were nobody's");
    let history =
        postbox::store::Declared { start: postbox::store::Start::Beginning, ..declared("all", "t", Kind::Plain) };
    let other = Hand::register(&fresh, vec![history]).await;
    let get_all = async {
        let mut all = Vec::new();
        while all.len() < 3 {
            other.backfill().await;
            all.extend(take(&other, 10).await);
        }
        all
    };
    assert_eq!(tokio::time::timeout(PATIENCE, get_all).await.expect("history"), [-1, 0, 1]);
    let pending = "state:pending".parse().expect("a filter");
    let waiting = fresh.postbox.admin().list(&pending, 10).await.expect("list");
    assert!(waiting.len() == 2 && waiting.iter().all(|d| d.priority == Priority::High), "{waiting:?}");
}

async fn a_worker_comes_to_low_ones_in_front_of_a_backlog_of_high_ones<Db: Testable>() {
    let fresh = Db::fresh().await;
    let low = Arc::new(AtomicUsize::new(0));
    let (high, normal) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counts = [high.clone(), normal, low.clone()];
    let count = move |message: Envelope| {
        let word: String = message.decode().unwrap_or_default();
        let level = word.parse().map_or(0, |priority: Priority| priority as usize);
        let seen = counts[level].clone();
        async move {
            // So that the backlog outlasts the test.
            tokio::time::sleep(Duration::from_millis(2)).await;
            seen.fetch_add(1, Ordering::SeqCst);
            Ok::<(), Failure>(())
        }
    };
    publish(&fresh, Priority::High, 4_000).await;
    publish(&fresh, Priority::Low, 20).await;
    let routes = Router::<Db>::new().on("t", handler(count).named("s"));
    let worker = fresh.postbox.worker(routes).concurrency(4).start().await.expect("start");
    let done = async {
        while low.load(Ordering::SeqCst) < 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, done).await.expect("all low ones");
    let before = high.load(Ordering::SeqCst);
    assert!((20..4_000).contains(&before), "{before} high ones went before them, and not all");
    worker.stop_now().await.expect("stop");
}

async fn who_pulls_gets_a_low_one_among_high_ones<Db: Testable>()
where
    for<'c> sqlx::Transaction<'c, Db>: AsConnection<Db>,
{
    let fresh = Db::fresh().await;
    let taken = fresh.postbox.subscription("taken").pattern("t");
    taken.declare().await.expect("declare");
    publish(&fresh, Priority::Low, 1).await;
    publish(&fresh, Priority::High, 20).await;
    let mut words = Vec::new();
    for _ in 0..8 {
        let mut tx = fresh.pool.begin().await.expect("begin");
        let one = taken.next(&mut tx).await.expect("next").expect("one of them");
        words.push(one.payload::<String>().expect("a word"));
        tx.commit().await.expect("commit");
    }
    let lows: Vec<usize> = (0..8).filter(|n| words[*n] == "low").collect();
    assert_eq!(lows, [7]);
    fresh.postbox.close().await;
}

#[tokio::test]
async fn in_sql_too() {
    let fresh = Postgres::fresh().await;
    let s = fresh.schema();
    Postgres::execute(&fresh, &format!("select {s}.subscribe('taken', 't', 'test')")).await;
    let publish = |how: &str| format!("select {s}.publish('t', '\"low\"', {how})");
    for _ in 0..3 {
        Postgres::execute(&fresh, &publish("priority => 'low'")).await;
    }
    for refused in [
        publish("priority => 'urgent'"),
        format!(r#"select * from {s}.publish_many('[{{"topic": "t", "payload": 1, "priority": "urgent"}}]')"#),
    ] {
        let error = sqlx::raw_sql(sqlx::AssertSqlSafe(refused)).execute(&fresh.pool).await.expect_err("refused");
        let error = error.as_database_error().expect("the function's word");
        assert!(
            error.code().as_deref() == Some("22023") && error.message().contains("high, normal and low"),
            "{error}"
        );
    }
    let many = format!(
        r#"select count(*) from {s}.publish_many((select jsonb_agg('{{"topic": "t", "payload": "high", "priority": "high"}}'::jsonb)
            from generate_series(1, 1000)))"#
    );
    assert_eq!(Postgres::count(&fresh, &many).await, 1000);
    // Told by its number after a rollback, whatever its level.
    let mut connection = sqlx::PgConnection::connect(&fresh.url()).await.expect("connect");
    let mut tx = connection.begin().await.expect("begin");
    let next = format!("select delivery from {s}.next('taken', 'test')");
    let delivery: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(next)).fetch_one(&mut *tx).await.expect("next");
    tx.rollback().await.expect("rollback");
    let failed = format!("select {s}.failed({delivery}, 'no', retry_after => '1 hour')::int::bigint");
    assert_eq!(Postgres::count(&fresh, &failed).await, 1);
    // One in sixteen, by chance, begins with the low ones; the one that failed may have been one.
    let lows = format!(
        "select count(*) from generate_series(1, 500) g
         cross join lateral {s}.next('taken', case when g > 0 then 'test' end) n where n.payload = '\"low\"'"
    );
    assert!((2..=3).contains(&Postgres::count(&fresh, &lows).await));
}

#[tokio::test]
async fn a_publisher_who_may_only_publish_says_it_too() {
    let fresh = Postgres::fresh().await;
    let hand = hand(&fresh).await;
    let login = Login::with(&fresh, &["publisher"]).await;
    let publisher: Postbox<Postgres> = Postbox::open(login.settings.clone()).await.expect("open");
    for priority in [Priority::Normal, Priority::Low, Priority::High] {
        publisher.publish_now([draft(priority)]).await.expect("publish");
    }
    assert_eq!(take(&hand, 10).await, [-1, 0, 1]);
}
