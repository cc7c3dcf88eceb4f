//! Limits that hold across workers: how many run at once, and how many begin in a time. On both stores.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use postbox::lifecycle::Kind;
use postbox::store::{ClaimRequest, Declared, PermitWish, Permits, Settle, Store, SubscriptionId, Success};
use postbox::{Envelope, Failure, Limits, Rate, Router, handler};
use postbox_testkit::hand::{Hand, declared, publish};
use postbox_testkit::{Fresh, Testable, on_both_stores};
use uuid::Uuid;

on_both_stores!(
    no_more_run_at_once_than_the_limit,
    permits_are_shared_out,
    the_permits_of_the_dead_come_back,
    no_more_begin_than_the_rate_has_tokens_for,
    workers_get_through_at_their_rate,
    what_was_not_there_gives_its_token_back,
    a_limit_is_changed_by_the_next_start,
    operators_see_how_limits_stand,
);

/// Handlers that are counted while they run.
#[derive(Clone, Default)]
struct Gauge(Arc<[AtomicUsize; 3]>);

impl Gauge {
    async fn pass(self) -> Result<(), Failure> {
        let [now, most, through] = &*self.0;
        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        // Long enough for others to come along, if they may.
        tokio::time::sleep(Duration::from_millis(3)).await;
        now.fetch_sub(1, Ordering::SeqCst);
        through.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn most(&self) -> usize {
        self.0[1].load(Ordering::SeqCst)
    }

    async fn through(&self, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.0[2].load(Ordering::SeqCst) < count {
            assert!(Instant::now() < deadline, "{} of {count} are through", self.0[2].load(Ordering::SeqCst));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn limited(at_once: u32) -> Declared {
    Declared { limits: Limits { at_once: Some(at_once), rate: None }, ..declared("few", "t", Kind::Plain) }
}

async fn no_more_run_at_once_than_the_limit<Db: Testable>() {
    let fresh = Db::fresh().await;
    let gauge = Gauge::default();
    let routes = || {
        let gauge = gauge.clone();
        Router::<Db>::new().on("t", handler(move || gauge.clone().pass()).named("few").limit(4))
    };
    publish(&fresh, "t", 120).await;
    let mut workers = Vec::new();
    for _ in 0..3 {
        let worker = fresh.postbox.worker(routes()).concurrency(5).poll_interval(Duration::from_millis(20));
        workers.push(worker.start().await.expect("starts"));
    }
    gauge.through(120).await;
    assert!((2..=4).contains(&gauge.most()), "{} at once", gauge.most());
    for worker in workers {
        worker.stop(None).await.expect("stops");
    }
}

/// What a worker is given that could use so many, and keeps some in any case.
async fn asks<Db: Testable>(hand: &Hand<Db>, wanted: u32, keep: u32) -> (u32, Option<u32>) {
    let wish = PermitWish { subscription: hand.subscriptions[0], wanted, keep };
    let answer = hand.store().permits(hand.worker, &[wish]).await.expect("permits");
    let [Permits { subscription, granted, fair }] = answer[..] else { panic!("one answer: {answer:?}") };
    assert_eq!(subscription, hand.subscriptions[0]);
    (granted, fair)
}

async fn permits_are_shared_out<Db: Testable>() {
    let fresh = Db::fresh().await;
    let first = Hand::register(&fresh, vec![limited(10)]).await;
    let second = Hand::register(&fresh, vec![limited(10)]).await;
    assert_eq!(asks(&first, 16, 0).await, (10, None));
    assert_eq!(asks(&second, 3, 0).await, (0, Some(5)), "none is left, and the first could use more");
    // The first hears that somebody wants some, and what would be fair; it decides what it can do without.
    assert_eq!(asks(&first, 16, 10).await, (10, Some(5)));
    assert_eq!(asks(&first, 16, 5).await, (5, Some(5)));
    assert_eq!(asks(&second, 3, 0).await, (3, Some(5)), "the first wants more than it has");
    assert_eq!(asks(&first, 16, 5).await, (7, None), "what nobody wants is free again");
    // Many at once never get more than there are.
    let mut hands = vec![first, second];
    for _ in 0..4 {
        hands.push(Hand::register(&fresh, vec![limited(10)]).await);
    }
    let keeps = [7, 3, 0, 0, 0, 0];
    let all = hands.iter().zip(keeps).map(|(hand, keep)| asks(hand, 4, keep));
    let granted: u32 = futures_util::future::join_all(all).await.iter().map(|(granted, _)| granted).sum();
    assert_eq!(granted, 10);
}

async fn the_permits_of_the_dead_come_back<Db: Testable>() {
    let fresh = Db::fresh().await;
    let dead = Hand::register(&fresh, vec![limited(2)]).await;
    let heir = Hand::register(&fresh, vec![limited(2)]).await;
    assert_eq!(asks(&dead, 2, 0).await.0, 2);
    assert_eq!(asks(&heir, 2, 0).await.0, 0);
    let (worker, store) = (dead.worker, heir.store().clone());
    let wish = PermitWish { subscription: heir.subscriptions[0], wanted: 2, keep: 0 };
    dead.dies(&fresh).await;
    assert_eq!(store.permits(worker, &[wish]).await.expect("answers"), [], "who is not alive gets none");
    assert_eq!(asks(&heir, 2, 0).await, (2, None));
}

fn metered(count: u32, burst: u32) -> Declared {
    let rate = Rate::new(count, Duration::from_secs(1)).expect("a rate").with_burst(burst);
    Declared { limits: Limits { at_once: None, rate: Some(rate) }, ..declared("slow", "t", Kind::Plain) }
}

/// Claims under the rate, and settles; how many there were, and how long the bucket is dry.
async fn takes<Db: Testable>(hand: &Hand<Db>, room: u32) -> (u32, Option<Duration>) {
    let id: SubscriptionId = hand.subscriptions[0];
    let request = ClaimRequest {
        worker: hand.worker,
        token: Uuid::now_v7(),
        wanted: vec![(id, room)],
        metered: vec![id],
        by_key: Vec::new(),
        full: Vec::new(),
        sorts: true,
    };
    let claimed = hand.store().claim(&request).await.expect("claims");
    let success = |i: &postbox::store::Item| Success {
        delivery: i.delivery,
        message: i.message,
        subscription: i.subscription,
        ran: Duration::ZERO,
    };
    let successes: Vec<Success> = claimed.items.iter().map(success).collect();
    if !successes.is_empty() {
        hand.settle(Settle { successes, close: true, ..hand.flush(&claimed, 0) }).await;
    }
    (claimed.items.len() as u32, claimed.dry.first().map(|(_, wait)| *wait))
}

async fn no_more_begin_than_the_rate_has_tokens_for<Db: Testable>() {
    let fresh = Db::fresh().await;
    let mut hands = Vec::new();
    for _ in 0..3 {
        hands.push(Hand::register(&fresh, vec![metered(200, 5)]).await);
    }
    publish(&fresh, "t", 200).await;
    let begun = Instant::now();
    let taken = AtomicUsize::new(0);
    let all = hands.iter().map(async |hand| {
        while taken.load(Ordering::SeqCst) < 100 {
            let (count, dry) = takes(hand, 3).await;
            let so_far = taken.fetch_add(count as usize, Ordering::SeqCst) + count as usize;
            // What is counted now was taken by now: a bucket cannot have had more.
            let most = 5.0 + 200.0 * begun.elapsed().as_secs_f64() + 1e-6;
            assert!(so_far as f64 <= most, "{so_far} taken, of {most}");
            assert!(count == 3 || dry.is_some(), "fewer than were wanted, and no word why");
            if let Some(wait) = dry {
                assert!(wait <= Duration::from_millis(5), "{wait:?} until the next token");
                tokio::time::sleep(wait).await;
            }
        }
    });
    futures_util::future::join_all(all).await;
}

async fn workers_get_through_at_their_rate<Db: Testable>() {
    let fresh = Db::fresh().await;
    let gauge = Gauge::default();
    let routes = || {
        let (gauge, beside) = (gauge.clone(), gauge.clone());
        Router::<Db>::new()
            .on("t", handler(move || gauge.clone().pass()).named("slow").rate(100, Duration::from_secs(1)).limit(2))
            .on("t", handler(move || beside.clone().pass()).named("beside"))
    };
    let mut workers = Vec::new();
    for _ in 0..2 {
        workers.push(fresh.postbox.worker(routes()).concurrency(4).start().await.expect("starts"));
    }
    let begun = Instant::now();
    publish(&fresh, "t", 40).await;
    gauge.through(80).await;
    assert!(begun.elapsed() >= Duration::from_millis(300), "10 at once, and 30 that come one every 10 ms");
    for worker in workers {
        worker.stop(None).await.expect("stops");
    }
}

async fn what_was_not_there_gives_its_token_back<Db: Testable>() {
    let fresh = Db::fresh().await;
    // A token in a thousand seconds: none comes while this runs.
    let rate = Rate::new(1, Duration::from_secs(1000)).expect("a rate").with_burst(4);
    let limits = Limits { at_once: None, rate: Some(rate) };
    let hand = Hand::register(&fresh, vec![Declared { limits, ..declared("slow", "t", Kind::Plain) }]).await;
    publish(&fresh, "t", 3).await;
    assert_eq!(takes(&hand, 8).await.0, 3);
    assert_eq!(takes(&hand, 8).await.0, 0);
    publish(&fresh, "t", 3).await;
    let (count, dry) = takes(&hand, 8).await;
    assert_eq!(count, 1, "one of the four was left");
    assert!(dry.is_some_and(|wait| wait > Duration::from_secs(900)), "{dry:?}");
}

async fn a_limit_is_changed_by_the_next_start<Db: Testable>() {
    let fresh: Fresh<Db> = Db::fresh().await;
    let before = Hand::register(&fresh, vec![limited(10)]).await;
    assert_eq!(asks(&before, 6, 0).await.0, 6);
    let after = Hand::register(&fresh, vec![limited(4)]).await;
    assert_eq!(before.subscriptions, after.subscriptions);
    assert_eq!(asks(&after, 4, 0).await.0, 0);
    // What runs keeps its permits until it is through.
    assert_eq!(asks(&before, 6, 6).await.0, 6);
    assert_eq!(asks(&before, 2, 1).await.0, 2);
    assert_eq!(asks(&after, 4, 0).await.0, 2);
    // Once it has no limit any more, who still asks gets what it wants.
    Hand::register(&fresh, vec![declared("few", "t", Kind::Plain)]).await;
    assert_eq!(asks(&before, 6, 2).await.0, 6);
    let draft = Envelope::json("t", &1).expect("a draft");
    fresh.postbox.publish_now([draft]).await.expect("publishes");
    assert_eq!(before.claim(5).await.items.len(), 1);
}

async fn operators_see_how_limits_stand<Db: Testable>() {
    let fresh: Fresh<Db> = Db::fresh().await;
    let rate = Rate::new(1, Duration::from_secs(1000)).expect("a rate").with_burst(4);
    let limits = Limits { at_once: Some(10), rate: Some(rate) };
    let hand = Hand::register(&fresh, vec![Declared { limits, ..declared("few", "t", Kind::Plain) }]).await;
    let other = Hand::register(&fresh, vec![declared("plain", "t", Kind::Plain)]).await;
    assert_eq!(asks(&hand, 6, 0).await.0, 6);
    publish(&fresh, "t", 3).await;
    assert_eq!(takes(&hand, 8).await.0, 3);
    let rows = fresh.postbox.admin().subscriptions().await.expect("rows");
    let few = rows.iter().find(|row| row.name == "few").and_then(|row| row.limits.clone()).expect("it has limits");
    assert_eq!((few.at_once, few.held, few.per_second, few.burst), (Some(10), 6, Some(0.001), Some(4)));
    assert!(few.tokens.is_some_and(|tokens| (1.0..1.5).contains(&tokens)), "{few:?}");
    assert!(rows.iter().any(|row| row.name == "plain" && row.limits.is_none()));
    drop(other);
}
