//! Subscriptions: who gets what of history, names that change, patterns that change.

use std::time::Duration;

use postbox::admin::Filter;
use postbox::lifecycle::Kind;
use postbox::store::{Beat, Declared, Start, Store};
use postbox::{Envelope, Error};
use postbox_testkit::Testable;
use postbox_testkit::hand::{Hand, declared, publish, registration};

pub(super) async fn new_subscriptions_take_their_history<Db: Testable>() {
    let fresh = Db::fresh().await;
    let before = publish(&fresh, "t.early", 3).await;
    let start = |name: &str, start| Declared { start, ..declared(name, "t.*", Kind::Plain) };
    // The first registration: all of its subscriptions take what nobody had.
    let first = Hand::register(
        &fresh,
        vec![start("first", Start::Unrouted), start("twin", Start::Unrouted), start("now", Start::Now)],
    )
    .await;
    publish(&fresh, "t.late", 2).await;
    // The second: nothing is unrouted any more.
    let second = Hand::register(
        &fresh,
        vec![
            start("second", Start::Unrouted),
            start("all", Start::Beginning),
            start("some", Start::Time(jiff::Timestamp::now() + Duration::from_secs(3600))),
        ],
    )
    .await;
    publish(&fresh, "t.later", 1).await;
    let mut counts = std::collections::BTreeMap::new();
    for row in fresh.postbox.admin().list(&Filter::default(), 1000).await.expect("list") {
        *counts.entry(row.subscription).or_insert(0) += 1;
    }
    let expected = [("all", 6), ("first", 6), ("now", 3), ("second", 1), ("some", 1), ("twin", 6)];
    assert_eq!(counts, expected.map(|(n, c)| (n.to_owned(), c)).into());
    let (_, deliveries) = fresh.postbox.admin().message(before[0]).await.expect("the message");
    assert_eq!(deliveries.len(), 3, "first, twin and all");
    drop((first, second));
    let (_, late) = fresh.postbox.admin().message(before[0]).await.expect("the message");
    assert_eq!(late, deliveries, "and no later look hands it out again");
    // A time in the future is nobody's taker: what is older waits for who wants it.
    publish(&fresh, "v", 1).await;
    let future = Start::Time(jiff::Timestamp::now() + Duration::from_secs(3600));
    let _later = Hand::register(&fresh, vec![Declared { start: future, ..declared("later", "v", Kind::Plain) }]).await;
    let taker = Hand::register(&fresh, vec![declared("taker", "v", Kind::Plain)]).await;
    assert_eq!(taker.claim(10).await.items.len(), 1);
    // Nobody's: shown, and waiting for whoever comes.
    publish(&fresh, "u", 2).await;
    let status = fresh.postbox.admin().status().await.expect("status");
    assert_eq!((status.unrouted, status.unrouted_topics), (2, vec!["u".to_owned()]));
}

pub(super) async fn two_workers_hand_out_history_at_once<Db: Testable>() {
    let fresh = Db::fresh().await;
    for topic in ["orders.x", "payments.x"] {
        publish(&fresh, topic, 1200).await;
    }
    let worker = |name, pattern| registration(vec![declared(name, pattern, Kind::Plain)]);
    let store = fresh.postbox.store();
    store.register(&worker("orders", "orders.x")).await.expect("register");
    store.register(&worker("payments", "payments.x")).await.expect("register");
    let hand_out = (0..2).map(|_| async {
        for _ in 0..50 {
            while store.backfill().await.expect("backfill") {}
        }
    });
    futures_util::future::join_all(hand_out).await;
    let status = fresh.postbox.admin().status().await.expect("status");
    assert_eq!(status.unrouted, 0, "nothing is left to nobody");
    for subscription in status.subscriptions {
        assert_eq!((subscription.pending, subscription.backfilling), (1200, false), "{}", subscription.name);
    }
}

pub(super) async fn an_operation_is_not_taken_for_something_else<Db: Testable>() {
    let fresh = Db::fresh().await;
    let _charge = Hand::register(&fresh, vec![declared("charge", "t", Kind::Operation)]).await;
    let plain = registration(vec![declared("charge", "t", Kind::Plain)]);
    let refused = fresh.postbox.store().register(&plain).await.expect_err("refused");
    assert!(matches!(&refused, Error::Refused(why) if why.contains("`charge` is an operation")), "{refused}");
    let both = registration(vec![
        declared("charge", "t", Kind::Operation),
        Declared { renamed_from: vec!["charge".into()], ..declared("bill", "t", Kind::Operation) },
    ]);
    let refused = fresh.postbox.store().register(&both).await.expect_err("refused");
    assert!(matches!(&refused, Error::Refused(why) if why.contains("`charge`") && why.contains("`bill`")), "{refused}");
}

pub(super) async fn a_reborn_worker_changes_no_subscription<Db: Testable>() {
    let fresh = Db::fresh().await;
    let old = Hand::register(&fresh, vec![declared("old", "t", Kind::Plain)]).await;
    let renamed = Declared { renamed_from: vec!["old".into()], ..declared("new", "t", Kind::Plain) };
    let _new = Hand::register(&fresh, vec![renamed]).await;
    let reborn = registration(vec![declared("old", "t", Kind::Plain)]);
    old.store().revive(&reborn, &old.subscriptions).await.expect("revive");
    let beat = Beat { worker: reborn.worker, lease: Duration::from_secs(60) };
    assert!(old.store().beat(beat).await.expect("beat").is_some(), "it lives again");
    let subscriptions = fresh.postbox.admin().subscriptions().await.expect("subscriptions");
    let names: Vec<&str> = subscriptions.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["new"], "the renaming is not undone, and nothing is doubled");
    assert_eq!(subscriptions[0].workers, 3);
}

pub(super) async fn a_renamed_subscription_keeps_its_deliveries<Db: Testable>() {
    let fresh = Db::fresh().await;
    let old = Hand::register(&fresh, vec![declared("old", "t", Kind::Plain)]).await;
    publish(&fresh, "t", 2).await;
    let renamed = Declared { renamed_from: vec!["older".into(), "old".into()], ..declared("new", "t", Kind::Plain) };
    let new = Hand::register(&fresh, vec![renamed.clone()]).await;
    assert_eq!(new.subscriptions, old.subscriptions, "the same subscription");
    assert_eq!(new.claim(10).await.items.len(), 2);
    let again = Hand::register(&fresh, vec![renamed]).await;
    assert_eq!(again.subscriptions, old.subscriptions);
    let names: Vec<String> =
        fresh.postbox.admin().subscriptions().await.expect("subscriptions").into_iter().map(|s| s.name).collect();
    assert_eq!(names, ["new"]);
}

pub(super) async fn a_changed_pattern_leaves_old_deliveries_and_takes_new_ones<Db: Testable>() {
    let fresh = Db::fresh().await;
    let _narrow = Hand::register(&fresh, vec![declared("a", "t.x", Kind::Plain)]).await;
    publish(&fresh, "t.x", 1).await;
    publish(&fresh, "t.y", 1).await;
    let moved = Hand::register(&fresh, vec![declared("a", "t.y", Kind::Plain)]).await;
    publish(&fresh, "t.x", 1).await;
    publish(&fresh, "t.y", 1).await;
    let mut topics: Vec<String> =
        moved.claim(10).await.items.into_iter().filter_map(|i| i.envelope).map(|e| e.topic.clone()).collect();
    topics.sort();
    assert_eq!(topics, ["t.x", "t.y", "t.y"], "the old one stays, the unrouted one is taken, new ones match anew");
    fresh.postbox.admin().remove_subscription("test", "a", "ana", "gone").await.expect("remove");
    publish(&fresh, "t.y", 1).await;
    assert_eq!(moved.claim(10).await.items.len(), 0, "publishers fan out to it no more");
    assert!(matches!(
        fresh.postbox.admin().remove_subscription("test", "a", "ana", "again").await,
        Err(Error::NotFound(_))
    ));
}

pub(super) async fn routes_that_were_learnt_fan_out_the_same<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("a", "t.*", Kind::Plain), declared("b", "t.x", Kind::Plain)]).await;
    hand.store().learn_routes(&["t.x".into(), "t.y".into(), "other".into()]).await.expect("learn");
    for topic in ["t.x", "t.y", "t.z", "other"] {
        publish(&fresh, topic, 1).await;
    }
    assert_eq!(hand.claim(10).await.items.len(), 4, "x twice, y and z once, other for nobody");
    // A new registration outdates what was learnt.
    let wider = Hand::register(&fresh, vec![declared("c", "t.>", Kind::Plain)]).await;
    publish(&fresh, "t.x", 1).await;
    assert_eq!(wider.claim(10).await.items.len(), 1);
    assert_eq!(hand.claim(10).await.items.len(), 2);
}

pub(super) async fn stranded_deliveries_are_told<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![declared("old_name", "t", Kind::Plain)]).await;
    publish(&fresh, "t", 2).await;
    assert_eq!(hand.store().stranded().await.expect("stranded"), []);
    hand.store().retire(hand.worker).await.expect("retire");
    let stranded = fresh.postbox.store().stranded().await.expect("stranded");
    assert_eq!((stranded[0].subscription.as_str(), stranded[0].waiting), ("old_name", 2));
    let status = fresh.postbox.admin().status().await.expect("status");
    assert_eq!(status.stranded, stranded);
}

pub(super) async fn what_is_due_later_waits_for_nobody_yet<Db: Testable>() {
    let fresh = Db::fresh().await;
    let names = ["both", "later", "soon"];
    let hand = Hand::register(&fresh, names.map(|name| declared(name, name, Kind::Plain)).into()).await;
    publish(&fresh, "both", 1).await;
    let later = |topic: &str, time| Envelope::json(topic, &1).expect("a draft").after(time);
    let hour = Duration::from_secs(3600);
    let drafts = [later("both", hour), later("both", hour), later("later", hour)];
    fresh.postbox.publish_now(drafts).await.expect("publish");
    fresh.postbox.publish_now([later("soon", Duration::from_millis(50))]).await.expect("publish");
    hand.store().retire(hand.worker).await.expect("retire");
    // What was due later is due now, and nobody is there to see to it.
    let stranded = async {
        loop {
            let stranded = fresh.postbox.store().stranded().await.expect("stranded");
            if stranded.iter().any(|s| s.subscription == "soon") {
                break stranded;
            }
            tokio::task::yield_now().await;
        }
    };
    let stranded = tokio::time::timeout(Duration::from_secs(60), stranded).await.expect("within a minute");
    let told: Vec<_> = stranded.iter().map(|s| (s.subscription.as_str(), s.waiting, s.later)).collect();
    assert_eq!(told, [("both", 1, 2), ("soon", 1, 0)]);
}
