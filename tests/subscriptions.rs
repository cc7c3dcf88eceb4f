//! Who gets what: new subscriptions, renamed and removed ones, with publishers in the middle of it.
//! Each message is delivered once to each subscription that it belongs to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use postbox::lifecycle::{Kind, Policy};
use postbox::store::{Declared, Registration, Start, Store};
use postbox::{
    Database, Draft, Envelope, Keep, Limits, Postbox, Postgres, PublishError, RetryPolicy, Settings, Sqlite,
};
use postbox_testkit::{Fresh, Server, Testable, on_both_stores};
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

on_both_stores!(
    a_pattern_that_changes_during_a_scan_loses_and_doubles_nothing,
    one_name_in_two_applications_is_two_subscriptions,
    a_name_that_was_removed_may_come_back,
);

fn declared(name: &str, pattern: &str) -> Declared {
    Declared {
        name: name.into(),
        renamed_from: Vec::new(),
        pattern: pattern.parse().expect("a pattern"),
        policy: Policy { kind: Kind::Plain, idempotent: false, retry: RetryPolicy::default() },
        timeout: Duration::from_secs(60),
        quiet: Duration::from_secs(60),
        reconciles: false,
        continues: false,
        start: Start::Unrouted,
        keep: Keep::default(),
        limits: Limits::default(),
        keys: None,
        unique: None,
    }
}

fn starting(name: &str, pattern: &str, start: Start) -> Declared {
    Declared { start, ..declared(name, pattern) }
}

fn registration(application: &str, subscriptions: Vec<Declared>) -> Registration {
    Registration {
        worker: Uuid::now_v7(),
        name: "hand".into(),
        application: application.into(),
        lease: Duration::from_secs(600),
        subscriptions,
    }
}

async fn register<Db: Database>(postbox: &Postbox<Db>, application: &str, subscriptions: Vec<Declared>) -> Vec<i32> {
    postbox.store().register(&registration(application, subscriptions)).await.expect("register")
}

/// Hands out history until nothing is left of it.
async fn handed_out<Db: Database>(postbox: &Postbox<Db>) {
    let all = async {
        loop {
            while postbox.store().backfill().await.expect("backfill") {}
            let subscriptions = postbox.admin().subscriptions().await.expect("subscriptions");
            if subscriptions.iter().all(|s| !s.backfilling) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all).await.expect("history ends");
}

fn draft(topic: &str) -> Draft {
    Envelope::json(topic, &1).expect("valid")
}

async fn publish<Db: Database>(postbox: &Postbox<Db>, topic: &str, count: usize) -> BTreeSet<Uuid> {
    let drafts = (0..count).map(|_| draft(topic));
    postbox.publish_now(drafts).await.expect("publish").iter().map(|p| p.id).collect()
}

/// A store whose deliveries can be read as a whole.
trait Deliveries: Testable {
    /// How often each message is delivered to each subscription.
    fn deliveries(fresh: &Fresh<Self>) -> impl Future<Output = BTreeMap<(i32, Uuid), i64>> + Send;
}

impl Deliveries for Postgres {
    async fn deliveries(fresh: &Fresh<Postgres>) -> BTreeMap<(i32, Uuid), i64> {
        pg_deliveries(&fresh.pool, &fresh.schema()).await
    }
}

async fn pg_deliveries(pool: &sqlx::PgPool, schema: &str) -> BTreeMap<(i32, Uuid), i64> {
    let sql = format!("select subscription, message, count(*) from {schema}.delivery group by 1, 2");
    let rows: Vec<(i32, Uuid, i64)> =
        sqlx::query_as(sqlx::AssertSqlSafe(sql)).fetch_all(pool).await.expect("the deliveries");
    rows.into_iter().map(|(s, m, n)| ((s, m), n)).collect()
}

impl Deliveries for Sqlite {
    async fn deliveries(fresh: &Fresh<Sqlite>) -> BTreeMap<(i32, Uuid), i64> {
        let sql = "select subscription, message, count(*) from postbox_every group by 1, 2";
        let rows: Vec<(i32, Uuid, i64)> = sqlx::query_as(sql).fetch_all(&fresh.pool).await.expect("the deliveries");
        rows.into_iter().map(|(s, m, n)| ((s, m), n)).collect()
    }
}

/// Exactly these messages are delivered to it, once each.
fn gets(deliveries: &BTreeMap<(i32, Uuid), i64>, subscription: i32, messages: &BTreeSet<Uuid>, what: &str) {
    let given: BTreeSet<Uuid> = deliveries.keys().filter(|(s, _)| *s == subscription).map(|(_, m)| *m).collect();
    let missed: Vec<_> = messages.difference(&given).collect();
    let unwanted: Vec<_> = given.difference(messages).collect();
    assert!(missed.is_empty() && unwanted.is_empty(), "{what}: missed {missed:?}, unwanted {unwanted:?}");
    let doubled: Vec<_> = deliveries.iter().filter(|((s, _), n)| *s == subscription && **n != 1).collect();
    assert!(doubled.is_empty(), "{what}: {doubled:?}");
}

fn union<'a>(sets: impl IntoIterator<Item = &'a BTreeSet<Uuid>>) -> BTreeSet<Uuid> {
    sets.into_iter().flatten().copied().collect()
}

async fn a_pattern_that_changes_during_a_scan_loses_and_doubles_nothing<Db: Deliveries>() {
    // Whether somebody has taken the first ones already, or they are nobody's yet; and from when on.
    for (taken, start) in [
        (true, Start::Beginning),
        (false, Start::Beginning),
        (true, Start::Time(jiff::Timestamp::now() - Duration::from_secs(3600))),
    ] {
        let fresh = Db::fresh().await;
        if taken {
            register(&fresh.postbox, "test", vec![declared("base", "t.x")]).await;
        }
        let x = publish(&fresh.postbox, "t.x", 2500).await;
        let nobodys = publish(&fresh.postbox, "t.y", 3).await;
        let id = register(&fresh.postbox, "test", vec![starting("a", "t.x", start)]).await[0];
        let between = publish(&fresh.postbox, "t.x", 2).await;
        let nobodys_either = publish(&fresh.postbox, "t.y", 2).await;
        // Into the middle of the scan, and no further.
        while Db::deliveries(&fresh).await.keys().filter(|(s, _)| *s == id).count() <= between.len() {
            fresh.postbox.store().backfill().await.expect("backfill");
        }
        let so_far = Db::deliveries(&fresh).await.keys().filter(|(s, _)| *s == id).count();
        assert!(so_far < x.len(), "the scan is not over: {so_far}");
        let changed = register(&fresh.postbox, "test", vec![starting("a", "t.y", start)]).await[0];
        assert_eq!(changed, id, "the same subscription");
        publish(&fresh.postbox, "t.x", 2).await;
        let after = publish(&fresh.postbox, "t.y", 2).await;
        // And once more, back to where it was, and wider.
        register(&fresh.postbox, "test", vec![starting("a", "t.>", start)]).await;
        let wide = union(&[publish(&fresh.postbox, "t.x", 1).await, publish(&fresh.postbox, "t.z", 1).await]);
        handed_out(&fresh.postbox).await;
        let deliveries = Db::deliveries(&fresh).await;
        // The history with the pattern it was asked for; what was nobody's with the last one; the rest
        // as it was when it was published. t.x between the changes is the base's, or nobody's.
        let mut expected = union(&[x, between, nobodys, nobodys_either, after, wide]);
        let unrouted_x: BTreeSet<Uuid> = match taken {
            true => BTreeSet::new(),
            false => deliveries.keys().filter(|(s, m)| *s == id && !expected.contains(m)).map(|(_, m)| *m).collect(),
        };
        assert_eq!(unrouted_x.len(), if taken { 0 } else { 2 }, "nobody else's t.x of the time between");
        expected.extend(unrouted_x);
        gets(&deliveries, id, &expected, "the one that changed");
        assert_eq!(fresh.postbox.admin().status().await.expect("status").unrouted, 0);
    }
}

async fn one_name_in_two_applications_is_two_subscriptions<Db: Deliveries>() {
    let fresh = Db::fresh().await;
    let early = publish(&fresh.postbox, "t", 3).await;
    let shop = register(&fresh.postbox, "shop", vec![declared("same", "t")]).await[0];
    let between = publish(&fresh.postbox, "t", 2).await;
    handed_out(&fresh.postbox).await;
    let billing = register(&fresh.postbox, "billing", vec![starting("same", "t", Start::Beginning)]).await[0];
    let late = publish(&fresh.postbox, "t", 2).await;
    handed_out(&fresh.postbox).await;
    fresh.postbox.admin().remove_subscription("shop", "same", "ana", "gone").await.expect("remove");
    let last = publish(&fresh.postbox, "t", 1).await;
    let deliveries = Db::deliveries(&fresh).await;
    let all = union(&[early, between, late]);
    gets(&deliveries, shop, &all, "shop");
    gets(&deliveries, billing, &union(&[all, last]), "billing");
}

async fn a_name_that_was_removed_may_come_back<Db: Deliveries>() {
    let fresh = Db::fresh().await;
    let first = register(&fresh.postbox, "test", vec![declared("a", "t")]).await[0];
    let before = publish(&fresh.postbox, "t", 2).await;
    fresh.postbox.admin().remove_subscription("test", "a", "ana", "gone").await.expect("remove");
    let nobodys = publish(&fresh.postbox, "t", 2).await;
    let second = register(&fresh.postbox, "test", vec![declared("a", "t")]).await[0];
    let third = register(&fresh.postbox, "test", vec![starting("all", "t", Start::Beginning)]).await[0];
    let after = publish(&fresh.postbox, "t", 1).await;
    handed_out(&fresh.postbox).await;
    let deliveries = Db::deliveries(&fresh).await;
    gets(&deliveries, first, &before, "the one that was removed");
    gets(&deliveries, second, &union(&[nobodys.clone(), after.clone()]), "the one that came back, as a new one");
    gets(&deliveries, third, &union(&[before, nobodys, after]), "one that wants everything");
}

const ISOLATIONS: [&str; 3] = ["read committed", "repeatable read", "serializable"];

async fn connect(url: &str) -> PgConnection {
    PgConnection::connect(url).await.expect("a connection")
}

async fn sql(connection: &mut PgConnection, text: &str) {
    sqlx::raw_sql(sqlx::AssertSqlSafe(text.to_owned())).execute(connection).await.expect("the statement");
}

/// Whether the transaction must be tried again.
fn is_stale(error: &PublishError) -> bool {
    let PublishError::Database(error) = error else { return false };
    error.as_database_error().and_then(|e| e.code()).as_deref() == Some("40001")
}

/// The four ways to start, as subscriptions to `t`.
fn newcomers() -> Vec<Declared> {
    let long_ago = jiff::Timestamp::now() - Duration::from_secs(3600);
    vec![
        starting("unrouted", "t", Start::Unrouted),
        starting("now", "t", Start::Now),
        starting("beginning", "t", Start::Beginning),
        starting("time", "t", Start::Time(long_ago)),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_that_are_open_when_a_subscription_comes() {
    for isolation in ISOLATIONS {
        let fresh = Postgres::fresh().await;
        let postbox = &fresh.postbox;
        let earlier = publish(postbox, "t", 1).await;
        // One has published and stays open; a savepoint of it is rolled back.
        let mut open = connect(&fresh.url()).await;
        sql(&mut open, &format!("begin isolation level {isolation}")).await;
        let kept = postbox.publish(&mut open, draft("t")).await.expect("publish").id;
        sql(&mut open, "savepoint a").await;
        let undone = postbox.publish(&mut open, draft("t")).await.expect("publish").id;
        sql(&mut open, "rollback to a").await;
        // One has only looked at something yet.
        let mut looked = connect(&fresh.url()).await;
        sql(&mut looked, &format!("begin isolation level {isolation}; select 1 from {}.message", fresh.schema())).await;

        let registering = {
            let postbox = postbox.clone();
            tokio::spawn(async move { register(&postbox, "test", newcomers()).await })
        };
        if isolation != "read committed" {
            // The one that published shares the routing until it ends, so the newcomers wait for it.
            let waits = format!(
                "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%{}.routing%'",
                fresh.schema()
            );
            while Postgres::count(&fresh, &waits).await == 0 {
                assert!(!registering.is_finished(), "{isolation}: it does not wait");
                tokio::task::yield_now().await;
            }
        }
        let (ids, committed_late) = if isolation == "read committed" {
            let ids = registering.await.expect("registered");
            // History waits for it: it may still commit what nobody handed out.
            for _ in 0..20 {
                postbox.store().backfill().await.expect("backfill");
            }
            let waiting = postbox.admin().subscriptions().await.expect("subscriptions");
            assert!(waiting.iter().filter(|s| s.name != "now").all(|s| s.backfilling), "{waiting:?}");
            // In the same transaction, the next statement sees who is there.
            let next = postbox.publish(&mut open, draft("t")).await.expect("publish").id;
            sql(&mut open, "commit").await;
            (ids, BTreeSet::from([next]))
        } else {
            sql(&mut open, "commit").await;
            (registering.await.expect("registered"), BTreeSet::new())
        };
        // Whose snapshot is older than the newcomers cannot know them: it is told to try again.
        let published = postbox.publish(&mut looked, draft("t")).await;
        let after = match published {
            Ok(published) => {
                assert_eq!(isolation, "read committed");
                sql(&mut looked, "commit").await;
                published.id
            }
            Err(error) => {
                assert!(isolation != "read committed" && is_stale(&error), "{isolation}: {error}");
                sql(&mut looked, &format!("rollback; begin isolation level {isolation}")).await;
                let id = postbox.publish(&mut looked, draft("t")).await.expect("the second try").id;
                sql(&mut looked, "commit").await;
                id
            }
        };
        handed_out(postbox).await;
        let deliveries = Postgres::deliveries(&fresh).await;
        assert!(deliveries.keys().all(|(_, message)| *message != undone), "what was undone is nowhere");
        let new = union(&[committed_late, BTreeSet::from([after])]);
        let all = union(&[earlier, BTreeSet::from([kept]), new.clone()]);
        gets(&deliveries, ids[0], &all, &format!("{isolation}: unrouted"));
        gets(&deliveries, ids[1], &new, &format!("{isolation}: now"));
        gets(&deliveries, ids[2], &all, &format!("{isolation}: beginning"));
        gets(&deliveries, ids[3], &all, &format!("{isolation}: time"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prepared_transaction_is_waited_for() {
    // A server of its own: most allow no prepared transactions.
    let server = Server::start();
    let settings = Settings::defaults().url(server.url()).set("application", "test");
    let postbox: Postbox<Postgres> = Postbox::migrate(settings).await.expect("migrated");
    let pool = sqlx::PgPool::connect(&server.url()).await.expect("a pool");
    let mut open = connect(&server.url()).await;
    sql(&mut open, "begin").await;
    let first = postbox.publish(&mut open, draft("t")).await.expect("publish").id;
    sql(&mut open, "prepare transaction 'early'").await;
    sql(&mut open, "begin").await;
    let second = postbox.publish(&mut open, draft("t")).await.expect("publish").id;
    let ids = register(&postbox, "test", newcomers()).await;
    // It is looked at while it is open, and goes on under another name.
    for _ in 0..5 {
        postbox.store().backfill().await.expect("backfill");
    }
    sql(&mut open, "prepare transaction 'late'").await;
    for name in ["early", "late"] {
        for _ in 0..20 {
            postbox.store().backfill().await.expect("backfill");
        }
        let status = postbox.admin().subscriptions().await.expect("subscriptions");
        assert!(status.iter().any(|s| s.backfilling), "{name} is not over");
        sql(&mut open, &format!("commit prepared '{name}'")).await;
    }
    handed_out(&postbox).await;
    let deliveries = pg_deliveries(&pool, "postbox").await;
    let both = BTreeSet::from([first, second]);
    for (id, name) in [(ids[0], "unrouted"), (ids[2], "beginning"), (ids[3], "time")] {
        gets(&deliveries, id, &both, name);
    }
    gets(&deliveries, ids[1], &BTreeSet::new(), "now");
    pool.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_does_not_wait_for_publishers() {
    let fresh = Postgres::fresh().await;
    let same = || vec![declared("a", "t"), starting("b", "t.*", Start::Beginning)];
    let ids = register(&fresh.postbox, "test", same()).await;
    let mut open = connect(&fresh.url()).await;
    sql(&mut open, "begin isolation level serializable").await;
    fresh.postbox.publish(&mut open, draft("t")).await.expect("publish");
    let again = tokio::time::timeout(Duration::from_secs(20), register(&fresh.postbox, "test", same())).await;
    assert_eq!(again.expect("it does not wait"), ids);
    let workers = fresh.postbox.admin().status().await.expect("status").workers.len();
    assert_eq!(workers, 2, "and is on record");
    // What changes who gets what has to wait: the publisher could not know.
    let changed = vec![declared("a", "t.>"), starting("b", "t.*", Start::Beginning)];
    let changing = {
        let postbox = fresh.postbox.clone();
        tokio::spawn(async move { register(&postbox, "test", changed).await })
    };
    let waits = format!(
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%{}.routing%'",
        fresh.schema()
    );
    while Postgres::count(&fresh, &waits).await == 0 {
        assert!(!changing.is_finished(), "it does not wait");
        tokio::task::yield_now().await;
    }
    sql(&mut open, "commit").await;
    assert_eq!(changing.await.expect("registered"), ids);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_publisher_has_learnt_strands_nothing() {
    let fresh = Postgres::fresh().await;
    let postbox = &fresh.postbox;
    let a = register(postbox, "test", vec![declared("a", "t")]).await[0];
    // Its statements are prepared, and the route is stored, and one transaction has used both.
    let mut publisher = connect(&fresh.url()).await;
    for _ in 0..6 {
        postbox.publish(&mut publisher, draft("t")).await.expect("publish");
    }
    postbox.store().learn_routes(&["t".into()]).await.expect("learn");
    postbox.publish(&mut publisher, draft("t")).await.expect("publish");
    sql(&mut publisher, "begin").await;
    let inside = postbox.publish(&mut publisher, draft("t")).await.expect("publish").id;
    let b = register(postbox, "test", vec![starting("b", "t", Start::Now)]).await[0];
    let next = postbox.publish(&mut publisher, draft("t")).await.expect("publish").id;
    // Another worker stores the outdated route, as far as it is concerned, and the new one.
    postbox.store().learn_routes(&["t".into()]).await.expect("learn");
    let later = postbox.publish(&mut publisher, draft("t")).await.expect("publish").id;
    sql(&mut publisher, "commit").await;
    postbox.admin().remove_subscription("test", "a", "ana", "gone").await.expect("remove");
    let last = postbox.publish(&mut publisher, draft("t")).await.expect("publish").id;
    handed_out(postbox).await;
    let deliveries = Postgres::deliveries(&fresh).await;
    gets(&deliveries, b, &BTreeSet::from([next, later, last]), "the one that came");
    assert!(deliveries.contains_key(&(a, inside)) && !deliveries.contains_key(&(a, last)), "the one that went");
    assert!(deliveries.values().all(|n| *n == 1));
}

/// A message of the storm: its place among what happened, and whether it may be there at all.
struct Sent {
    id: Uuid,
    /// Changes that were over before its statement began.
    after: usize,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn everything_at_once_on_postgres() {
    let fresh = Postgres::fresh().await;
    let postbox = &fresh.postbox;
    let base = register(postbox, "test", vec![declared("base", "t"), declared("old", "t")]).await;
    let changes = std::sync::atomic::AtomicUsize::new(0);
    let over = AtomicBool::new(false);
    let publishing = |n: usize| {
        let (fresh, changes, over) = (&fresh, &changes, &over);
        async move {
            let mut random = fastrand::Rng::with_seed(n as u64);
            let mut connection = connect(&fresh.url()).await;
            let (mut sent, mut undone) = (Vec::new(), Vec::new());
            while !over.load(Ordering::SeqCst) {
                sql(&mut connection, &format!("begin isolation level {}", ISOLATIONS[n % 3])).await;
                let (mut mine, mut failed) = (Vec::new(), false);
                for _ in 0..random.usize(1..4) {
                    let back = random.u8(..) < 50;
                    if back {
                        sql(&mut connection, "savepoint a").await;
                    }
                    let after = changes.load(Ordering::SeqCst);
                    match fresh.postbox.publish(&mut connection, draft("t")).await {
                        Ok(published) if back => undone.push(published.id),
                        Ok(published) => mine.push(Sent { id: published.id, after }),
                        Err(error) => {
                            assert!(
                                is_stale(&error) && ISOLATIONS[n % 3] != ISOLATIONS[0],
                                "{}: {error}",
                                ISOLATIONS[n % 3]
                            );
                            failed = true;
                            break;
                        }
                    }
                    if back {
                        sql(&mut connection, "rollback to a").await;
                    }
                }
                if failed || random.u8(..) < 30 {
                    sql(&mut connection, "rollback").await;
                    undone.extend(mine.into_iter().map(|m| m.id));
                } else if sqlx::raw_sql("commit").execute(&mut connection).await.is_ok() {
                    sent.extend(mine);
                } else {
                    // Serializable ones may be told only now.
                    undone.extend(mine.into_iter().map(|m| m.id));
                }
            }
            (sent, undone)
        }
    };
    let handing_out = async {
        while !over.load(Ordering::SeqCst) {
            postbox.store().backfill().await.expect("backfill");
            postbox.store().learn_routes(&["t".into()]).await.expect("learn");
            tokio::task::yield_now().await;
        }
    };
    let changing = async {
        let done = || changes.fetch_add(1, Ordering::SeqCst) + 1;
        let mut ids = BTreeMap::new();
        for round in 0..4 {
            let name = |what: &str| format!("{what}{round}");
            let started = [("beginning", Start::Beginning), ("now", Start::Now), ("unrouted", Start::Unrouted)];
            for (what, start) in started {
                let id = register(postbox, "test", vec![starting(&name(what), "t", start)]).await[0];
                ids.insert(name(what), (id, done()));
            }
            let former = if round == 0 { "old".to_owned() } else { format!("renamed{}", round - 1) };
            let renamed = Declared { renamed_from: vec![former], ..declared(&name("renamed"), "t") };
            assert_eq!(register(postbox, "test", vec![renamed]).await[0], base[1]);
            done();
            let id = register(postbox, "other", vec![starting("base", "t", Start::Beginning)]).await[0];
            ids.entry("other".into()).or_insert((id, done()));
            let id = register(postbox, "test", vec![starting("comes and goes", "t", Start::Beginning)]).await[0];
            ids.insert(name("goes"), (id, 0));
            postbox.admin().remove_subscription("test", "comes and goes", "ana", "gone").await.expect("remove");
            ids.insert(name("gone"), (id, done()));
        }
        over.store(true, Ordering::SeqCst);
        ids
    };
    let (published, ids, ()) =
        tokio::join!(futures_util::future::join_all((0..6).map(publishing)), changing, handing_out);
    handed_out(postbox).await;
    let deliveries = Postgres::deliveries(&fresh).await;
    let (sent, undone): (Vec<_>, Vec<_>) = published.into_iter().unzip();
    let sent: Vec<Sent> = sent.into_iter().flatten().collect();
    let undone: BTreeSet<Uuid> = undone.into_iter().flatten().collect();
    let all: BTreeSet<Uuid> = sent.iter().map(|s| s.id).collect();
    assert!(all.len() > 50 && undone.len() > 10, "{} and {}: too little happened", all.len(), undone.len());
    assert!(deliveries.keys().all(|(_, m)| all.contains(m)), "what was undone is nowhere");
    let doubled: Vec<_> = deliveries.iter().filter(|(_, n)| **n != 1).collect();
    assert!(doubled.is_empty(), "{doubled:?}");
    gets(&deliveries, base[0], &all, "base");
    gets(&deliveries, base[1], &all, "the one that was renamed");
    gets(&deliveries, ids["other"].0, &all, "the other application's");
    for (name, (id, change)) in &ids {
        let given = |m: &Sent| deliveries.contains_key(&(*id, m.id));
        if name.starts_with("beginning") {
            gets(&deliveries, *id, &all, name);
        } else if name.starts_with("now") || name.starts_with("unrouted") {
            let missed = sent.iter().filter(|m| m.after >= *change && !given(m)).count();
            assert_eq!(missed, 0, "{name}: what came after it");
        } else if name.starts_with("gone") {
            let late = sent.iter().filter(|m| m.after >= *change && given(m)).count();
            assert_eq!(late, 0, "{name}: what came after it was removed");
        }
    }
}
