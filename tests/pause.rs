//! A subscription that is paused hands out nothing, to nobody, at once; what waits comes when it is resumed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use postbox::admin::{Filter, SubscriptionRow};
use postbox::lifecycle::Kind;
use postbox::{AsConnection, Envelope, Error, Failure, Postbox, Postgres, Router, handler};
use postbox_testkit::hand::{Hand, declared, publish};
use postbox_testkit::{Fresh, Testable, on_both_stores};
use tokio::sync::Semaphore;

on_both_stores!(
    a_pause_holds_at_once_and_what_waited_comes_after_it,
    what_was_claimed_and_not_started_goes_back_within_a_second,
    what_is_paused_is_on_record_and_not_stranded,
    nobody_pulls_from_a_paused_subscription,
);

const PATIENCE: Duration = Duration::from_secs(60);

async fn row<Db: Testable>(fresh: &Fresh<Db>, name: &str) -> SubscriptionRow {
    let rows = fresh.postbox.admin().subscriptions().await.expect("subscriptions");
    rows.into_iter().find(|r| r.name == name).expect("the subscription")
}

/// Looks again until it is so; how long that took.
async fn until<Db: Testable>(fresh: &Fresh<Db>, name: &str, so: impl Fn(&SubscriptionRow) -> bool) -> Duration {
    let begun = Instant::now();
    loop {
        let row = row(fresh, name).await;
        if so(&row) {
            return begun.elapsed();
        }
        assert!(begun.elapsed() < PATIENCE, "{row:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn pause<Db: Testable>(fresh: &Fresh<Db>, name: &str) {
    fresh.postbox.admin().pause("test", name, "ana", "the provider is down").await.expect("pause");
}

async fn resume<Db: Testable>(fresh: &Fresh<Db>, name: &str) {
    fresh.postbox.admin().resume("test", name, "ana", "it is back").await.expect("resume");
}

/// Two subscriptions of the same topic, each counted.
fn counted<Db: Testable>(counts: &[Arc<AtomicUsize>; 2]) -> Router<Db> {
    let count = |n: usize| {
        let seen = counts[n].clone();
        handler(move || {
            seen.fetch_add(1, Ordering::SeqCst);
            std::future::ready(Ok::<(), Failure>(()))
        })
    };
    Router::new().on("t", count(0).named("crm")).on("t", count(1).named("mail"))
}

async fn a_pause_holds_at_once_and_what_waited_comes_after_it<Db: Testable>() {
    let fresh = Db::fresh().await;
    let counts: [Arc<AtomicUsize>; 2] = Default::default();
    let other: Postbox<Db> = Postbox::open(fresh.settings.clone()).await.expect("a second postbox");
    let first = fresh.postbox.worker(counted(&counts)).start().await.expect("start");
    let second = other.worker(counted(&counts)).start().await.expect("start");
    publish(&fresh, "t", 50).await;
    until(&fresh, "mail", |r| r.succeeded_last_hour == 50).await;
    until(&fresh, "crm", |r| r.succeeded_last_hour == 50).await;

    pause(&fresh, "crm").await;
    let before = counts[0].load(Ordering::SeqCst);
    publish(&fresh, "t", 50).await;
    let later = Envelope::json("t", &1).map(|d| d.after(Duration::from_millis(1)));
    fresh.postbox.publish_now([later]).await.expect("publish");
    // Both are awake, and hand out what they may.
    until(&fresh, "mail", |r| r.succeeded_last_hour == 101).await;
    let waits = row(&fresh, "crm").await;
    assert_eq!((waits.pending + waits.scheduled, waits.running), (51, 0), "{waits:?}");
    assert!(waits.paused_at.is_some() && row(&fresh, "mail").await.paused_at.is_none());
    assert_eq!(counts[0].load(Ordering::SeqCst), before, "nothing was handed out");

    resume(&fresh, "crm").await;
    until(&fresh, "crm", |r| r.succeeded_last_hour == 101 && r.paused_at.is_none()).await;
    assert_eq!(counts.map(|c| c.load(Ordering::SeqCst)), [101, 101]);
    first.stop(None).await.expect("stop");
    second.stop(None).await.expect("stop");
}

async fn what_was_claimed_and_not_started_goes_back_within_a_second<Db: Testable>() {
    let fresh = Db::fresh().await;
    let gate = Arc::new(Semaphore::new(0));
    let routes = || {
        let gate = gate.clone();
        let waits = move || {
            let gate = gate.clone();
            async move {
                gate.acquire().await.expect("it is open").forget();
                Ok::<(), Failure>(())
            }
        };
        Router::<Db>::new().on("t", handler(waits).named("slow"))
    };
    publish(&fresh, "t", 20).await;
    let worker = fresh.postbox.worker(routes()).concurrency(2).start().await.expect("start");
    let mut best = PATIENCE;
    for _ in 0..3 {
        // Two run, and some more lie ready.
        until(&fresh, "slow", |r| r.running > 2).await;
        pause(&fresh, "slow").await;
        best = best.min(until(&fresh, "slow", |r| r.running == 2 && r.pending == 18).await);
        resume(&fresh, "slow").await;
    }
    // The machine may be slow; not three times.
    assert!(best < Duration::from_secs(1), "{best:?}");
    // What the last resume has let out is on its way, or not yet: it is waited for.
    until(&fresh, "slow", |r| r.running > 2).await;
    pause(&fresh, "slow").await;
    until(&fresh, "slow", |r| r.running == 2 && r.pending == 18).await;
    let pending = "state:pending".parse().expect("a filter");
    let waiting = fresh.postbox.admin().list(&pending, 100).await.expect("list");
    assert!(waiting.len() == 18 && waiting.iter().all(|d| d.attempt == 0), "uncounted");
    // What runs ends, and is settled.
    gate.add_permits(2);
    until(&fresh, "slow", |r| r.succeeded_last_hour == 2 && r.running == 0).await;
    gate.add_permits(100);
    resume(&fresh, "slow").await;
    until(&fresh, "slow", |r| r.succeeded_last_hour == 20).await;
    worker.stop(None).await.expect("stop");
}

async fn what_is_paused_is_on_record_and_not_stranded<Db: Testable>() {
    let fresh = Db::fresh().await;
    let admin = fresh.postbox.admin();
    let worker = fresh.postbox.worker(counted(&Default::default())).start().await.expect("start");
    worker.stop(None).await.expect("stop");
    publish(&fresh, "t", 3).await;
    assert_eq!(admin.status().await.expect("status").stranded.len(), 2);
    pause(&fresh, "crm").await;
    let status = admin.status().await.expect("status");
    assert_eq!(status.stranded.len(), 1, "a pause has an end: {:?}", status.stranded);
    let paused = row(&fresh, "crm").await;
    let since = paused.paused_at;
    assert!(since.is_some());
    assert_eq!(
        (paused.paused_by.as_deref(), paused.paused_reason.as_deref()),
        (Some("ana"), Some("the provider is down"))
    );

    let again = admin.pause("test", "crm", "bob", "still down").await.expect("pause");
    assert_eq!((again.actor.as_str(), again.subscription.as_deref()), ("bob", Some("crm")));
    let still = row(&fresh, "crm").await;
    assert_eq!((still.paused_at, still.paused_by.as_deref()), (since, Some("ana")), "since when, and by whom, it was");
    resume(&fresh, "crm").await;
    let resumed = row(&fresh, "crm").await;
    assert_eq!((resumed.paused_at, resumed.paused_by, resumed.paused_reason), (None, None, None));
    let said: Vec<(String, String)> =
        admin.audit(10).await.expect("audit").into_iter().map(|e| (e.action, e.reason.unwrap_or_default())).collect();
    let expected = [
        ("resume subscription", "it is back"),
        ("pause subscription", "still down"),
        ("pause subscription", "the provider is down"),
    ];
    assert_eq!(said, expected.map(|(action, reason)| (action.to_owned(), reason.to_owned())));

    // A worker that starts is no resume, and neither is an operator's retry.
    pause(&fresh, "crm").await;
    let id = admin.list(&Filter::default(), 1).await.expect("list")[0].id;
    let wish = postbox::admin::Retry { rev: None, actor: "ana".into(), reason: "now".into() };
    admin.retry(id, &wish).await.expect("retry");
    let counts: [Arc<AtomicUsize>; 2] = Default::default();
    let worker = fresh.postbox.worker(counted(&counts)).start().await.expect("start");
    until(&fresh, "mail", |r| r.succeeded_last_hour == 3).await;
    assert_eq!(counts[0].load(Ordering::SeqCst), 0);
    worker.stop(None).await.expect("stop");

    for refused in [admin.pause("test", "nobody", "ana", "x").await, admin.resume("other", "crm", "ana", "x").await] {
        assert!(matches!(refused, Err(Error::NotFound(_))), "{refused:?}");
    }
    let long = "x".repeat(postbox::admin::MAX_REASON_BYTES + 1);
    assert!(matches!(admin.pause("test", "crm", "ana", &long).await, Err(Error::Refused(_))));
}

async fn nobody_pulls_from_a_paused_subscription<Db: Testable>()
where
    for<'c> sqlx::Transaction<'c, Db>: AsConnection<Db>,
{
    let fresh = Db::fresh().await;
    let taken = fresh.postbox.subscription("taken").pattern("t");
    taken.declare().await.expect("declare");
    publish(&fresh, "t", 2).await;
    pause(&fresh, "taken").await;
    let mut tx = fresh.pool.begin().await.expect("begin");
    assert!(taken.next(&mut tx).await.expect("next").is_none());
    tx.rollback().await.expect("rollback");
    // It waits for the end of the pause, and hears of it.
    let (ready, ()) = tokio::join!(tokio::time::timeout(PATIENCE, taken.ready()), async {
        tokio::task::yield_now().await;
        resume(&fresh, "taken").await;
    });
    ready.expect("in time").expect("ready");
    let mut tx = fresh.pool.begin().await.expect("begin");
    assert!(taken.next(&mut tx).await.expect("next").is_some());
    tx.commit().await.expect("commit");
    fresh.postbox.close().await;
}

#[tokio::test]
async fn nobody_pulls_in_sql_either() {
    let fresh = Postgres::fresh().await;
    let schema = fresh.schema();
    Postgres::execute(&fresh, &format!("select {schema}.subscribe('taken', 't', 'test')")).await;
    publish(&fresh, "t", 1).await;
    let next = format!("select count(*) from {schema}.next('taken', 'test')");
    pause(&fresh, "taken").await;
    assert_eq!(Postgres::count(&fresh, &next).await, 0);
    resume(&fresh, "taken").await;
    assert_eq!(Postgres::count(&fresh, &next).await, 1);
}

#[tokio::test]
async fn a_claim_that_names_a_paused_subscription_gets_the_others() {
    let fresh = Postgres::fresh().await;
    let hand =
        Hand::register(&fresh, vec![declared("crm", "t", Kind::Plain), declared("mail", "t", Kind::Plain)]).await;
    publish(&fresh, "t", 5).await;
    pause(&fresh, "crm").await;
    let claimed = hand.claim(10).await;
    assert_eq!(claimed.items.len(), 5);
    assert!(claimed.items.iter().all(|i| i.subscription == hand.subscriptions[1]));
    // Found nothing twice: now it only looks, and sees no reason to claim.
    for _ in 0..3 {
        let claimed = hand.claim(10).await;
        assert!(claimed.items.is_empty() && claimed.next_due.is_none());
    }
    resume(&fresh, "crm").await;
    let found = async {
        while hand.claim(10).await.items.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, found).await.expect("the look sees that the pause is over");
}
