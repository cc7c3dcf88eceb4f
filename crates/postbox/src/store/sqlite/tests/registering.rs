use super::*;
use crate::error::Error;
use crate::lifecycle::Answer;
use crate::store::Beat;

fn registration(subscriptions: Vec<Declared>) -> Registration {
    Registration {
        worker: Uuid::now_v7(),
        name: "host:2".into(),
        application: "shop".into(),
        lease: Duration::from_secs(30),
        subscriptions,
    }
}

/// What is stored of subscriptions, workers and the routing, to see that nothing was touched.
async fn stored(shop: &Shop) -> (String, i64, i64) {
    let rows: Option<String> = sqlx::query_scalar(
        "select group_concat(id || name || kind || pattern || epoch || timeout_ms || quiet_ms || max_attempts, ',')
         from postbox_subscription",
    )
    .fetch_one(&shop.store.reader)
    .await
    .expect("reads");
    let epoch = shop.count("select epoch from postbox_routing").await;
    (rows.unwrap_or_default(), epoch, shop.count("select count(*) from postbox_worker").await)
}

fn locks(shop: &Shop) -> usize {
    let files = std::fs::read_dir(shop.folder.path()).expect("lists").filter_map(Result::ok);
    files.filter(|f| f.file_name().to_string_lossy().ends_with(".lock")).count()
}

fn from(name: &str, former: &[&str]) -> Declared {
    Declared { renamed_from: former.iter().map(|n| (*n).into()).collect(), ..declared(name, "orders.placed") }
}

#[tokio::test]
async fn each_registration_stores_how_long_calls_take() {
    let shop = Shop::new().await;
    shop.register(vec![operation()]).await;
    let ms = async || {
        let (timeout, quiet): (i64, i64) = sqlx::query_as("select timeout_ms, quiet_ms from postbox_subscription")
            .fetch_one(&shop.store.reader)
            .await
            .expect("reads");
        (timeout, quiet)
    };
    assert_eq!(ms().await, (60_000, 20_000));
    let slower =
        Declared { timeout: Duration::from_secs(70), quiet: Duration::from_nanos(5_000_000_001), ..operation() };
    shop.register(vec![slower]).await;
    assert_eq!(ms().await, (70_000, 5_001));
}

#[tokio::test]
async fn a_dead_workers_call_is_waited_for_as_long_as_it_may_be_on_its_way() {
    for (quiet, milliseconds) in [
        (Duration::from_secs(7), 37_000),
        (Duration::ZERO, 30_000),
        (Duration::MAX, crate::message::MAX_WAIT.as_millis() as i64),
    ] {
        let shop = Shop::new().await;
        let other = shop.other().await;
        let (worker, ids) = register(&other, vec![Declared { quiet, timeout: Duration::MAX, ..operation() }]).await;
        shop.publish(&[draft("orders.placed", 1)]).await;
        let (claimed, lease) = claim(&other, worker, ids[0], 1).await;
        other
            .settle(&Settle { starts: vec![(claimed.items[0].delivery, 1)], ..flush(lease, 0) })
            .await
            .expect("begins");
        drop(other);
        let taken = shop.store.take_over(0.5).await.expect("looks").expect("it is dead");
        assert_eq!(taken.in_doubt, 1);
        assert_eq!(shop.count("select quiet_at - since from postbox_delivery").await, milliseconds);
        let due = shop.store.doubts(&ids, 1, Duration::MAX).await.expect("looks");
        assert!(!due[0].quiet);
    }
}

#[tokio::test]
async fn a_revived_worker_touches_no_subscription() {
    let shop = Shop::new().await;
    let (_, ids) = shop.register(vec![declared("old", "orders.placed"), declared("gone", "b")]).await;
    shop.store.remove_subscription("shop", "gone", "ana", "done").await.expect("removes");
    shop.register(vec![from("new", &["old"])]).await;
    let (rows, epoch, workers) = stored(&shop).await;

    // It still knows the old names: they are not undone.
    let revived = registration(vec![declared("old", "*"), declared("gone", "b")]);
    let other = shop.other().await;
    other.revive(&revived, &ids).await.expect("revives");
    assert_eq!(stored(&shop).await, (rows, epoch, workers + 1));
    assert_eq!(locks(&shop), 3);
    let beat = Beat { worker: revived.worker, lease: revived.lease };
    assert!(shop.store.beat(beat).await.expect("beats").is_some());
    assert_eq!(shop.store.take_over(0.5).await.expect("looks"), None, "it lives");
    assert!(other.revive(&revived, &ids).await.is_err(), "an id is good for one life");
    shop.publish(&[draft("orders.placed", 1)]).await;
    let (claimed, _) = claim(&other, revived.worker, ids[0], 1).await;
    assert_eq!(claimed.items.len(), 1, "it claims for what it stands behind");
    drop(other);
    let taken = shop.store.take_over(0.5).await.expect("looks").expect("it is dead");
    assert_eq!((taken.worker, taken.name.as_str()), (revived.worker, "host:2"));
}

#[tokio::test]
async fn an_operation_does_not_turn_into_something_that_is_simply_tried_again() {
    let shop = Shop::new().await;
    shop.register(vec![operation()]).await;
    let before = stored(&shop).await;
    for kind in [Kind::Plain, Kind::Transactional] {
        let same = Declared { policy: policy(kind), ..operation() };
        let renamed = Declared { name: "pay".into(), renamed_from: vec!["charge".into()], ..same.clone() };
        for changed in [same, renamed] {
            let wish = registration(vec![declared("fresh", "orders.placed"), changed]);
            let error = shop.store.register(&wish).await.expect_err("refused");
            assert!(
                matches!(&error, Error::Refused(words) if words.starts_with("the subscription `charge` is an operation: ")
                    && words.contains("postbox subscriptions remove")),
                "{error}"
            );
            assert_eq!((stored(&shop).await, locks(&shop)), (before.clone(), 1), "all of it");
        }
    }
    // The other way is no harm, and the way out works.
    shop.register(vec![declared("plain", "orders.placed")]).await;
    shop.register(vec![Declared { policy: policy(Kind::Operation), ..declared("plain", "orders.placed") }]).await;
    shop.store.remove_subscription("shop", "charge", "ana", "nothing is left").await.expect("removes");
    shop.register(vec![declared("charge", "orders.placed")]).await;
}

#[tokio::test]
async fn a_name_in_use_is_not_renamed() {
    let refused = async |shop: &Shop, subscriptions: Vec<Declared>| {
        let before = (stored(shop).await, locks(shop));
        let error = shop.store.register(&registration(subscriptions)).await.expect_err("refused");
        let words = error.to_string();
        assert!(matches!(error, Error::Refused(_)) && words.contains("are the same stored one"), "{words}");
        assert!(words.contains("`a`") && words.contains("`b`"), "{words}");
        assert_eq!((stored(shop).await, locks(shop)), before);
    };
    let b = || declared("b", "orders.placed");
    // Whether it is stored yet or not, and in whatever order.
    for known in [false, true] {
        let shop = Shop::new().await;
        if known {
            shop.register(vec![b()]).await;
        }
        refused(&shop, vec![b(), from("a", &["b"])]).await;
        refused(&shop, vec![from("a", &["b"]), b()]).await;
    }
    // Two heirs of one.
    let shop = Shop::new().await;
    shop.register(vec![declared("c", "orders.placed")]).await;
    refused(&shop, vec![from("a", &["c"]), from("b", &["c"])]).await;
    // One that was renamed long ago leaves its name to a new one.
    let (_, first) = shop.register(vec![from("a", &["c"])]).await;
    let (_, both) = shop.register(vec![declared("c", "orders.placed"), from("a", &["c"])]).await;
    assert!(both[1] == first[0] && both[0] != first[0]);
}

#[tokio::test]
async fn no_wait_is_too_long_for_the_tables() {
    let shop = Shop::new().await;
    let forever = Duration::from_secs(u64::MAX);
    let retry = RetryPolicy { max_attempts: u32::MAX, base: Duration::MAX, cap: Duration::MAX };
    let endless = Declared {
        timeout: Duration::MAX,
        quiet: forever,
        policy: Policy { kind: Kind::Operation, retry, idempotent: false },
        ..operation()
    };
    let (claimed, lease) = shop.claimed(endless, 3).await;
    let long = |item: &Item, state, kind| {
        let mut moved = Move { delay: forever, quiet: Duration::MAX, ..moved(item, state, 1, kind) };
        if let Some(outcome) = &mut moved.outcome {
            (outcome.ran, outcome.ago) = (Duration::MAX, forever);
        }
        moved
    };
    let settle = Settle {
        successes: vec![crate::store::Success { ran: Duration::MAX, ..success(&claimed.items[0]) }],
        moves: vec![
            long(&claimed.items[1], State::Pending, "failed"),
            long(&claimed.items[2], State::InDoubt, "in_doubt"),
        ],
        close: true,
        ..flush(lease, 0)
    };
    shop.store.settle(&settle).await.expect("settles");
    let limit = crate::message::MAX_WAIT.as_millis() as i64;
    assert_eq!(shop.count("select max(due_at - since) from postbox_delivery").await, limit);
    assert_eq!(shop.count("select max(quiet_at - since) from postbox_delivery").await, limit);
    let doubtful = &claimed.items[2];
    assert_eq!(shop.store.doubts(&[doubtful.subscription], 1, Duration::MAX).await.expect("looks").len(), 1);
    let (nothing, _) = claim(&shop.store, lease.worker, doubtful.subscription, 5).await;
    assert!(nothing.items.is_empty() && nothing.next_due.is_some_and(|wait| wait > Duration::from_secs(1 << 28)));
    let answered = crate::store::Answered {
        delivery: doubtful.delivery,
        rev: doubtful.rev + 1,
        answer: Answer::DidNotHappen,
        speaker: crate::store::Speaker::Reconcile,
        actor: "reconcile".into(),
        reason: None,
        receipt: None,
        follow_ups: Vec::new(),
        draw: 1.0,
    };
    assert!(shop.store.answer(&answered).await.expect("answers"), "with the longest backoff there is");
    assert_eq!(shop.store.list(&"".parse().expect("a filter"), 10).await.expect("lists").len(), 3);
    shop.store.status().await.expect("status");
}
