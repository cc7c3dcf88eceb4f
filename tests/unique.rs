//! One unfinished delivery of a key at a time, on both stores.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use postbox::admin::{Cancel, Filter, Replay, Resolution, Retry};
use postbox::lifecycle::{Answer, End, Kind, State};
use postbox::store::{Claimed, Declared, Guarded, Move, Settle, Start, Store};
use postbox::{
    Done, Draft, Envelope, Error, Failure, Postgres, PublishError, Published, Retention, Router, Tx, Unique, handler,
};
use postbox_testkit::hand::{self, Hand, declared, success};
use postbox_testkit::{Fresh, Testable, end_window, on_both_stores};
use uuid::Uuid;

on_both_stores!(
    a_key_has_one_delivery,
    whatever_is_unfinished_has_its_key,
    a_refusal_names_it_and_writes_nothing,
    many_at_once_are_as_one_after_the_other,
    a_dead_one_comes_back_only_to_a_free_key,
    replays_of_many_keep_to_it,
    what_was_there_before_stays,
    a_new_subscription_takes_the_first_of_a_key,
    its_own_follow_up_has_a_delivery,
    there_is_nobody_to_refuse_a_follow_up_to,
    a_message_stays_as_long_as_what_stands_for_it,
    keys_that_stayed_behind_are_let_go,
    eight_publishers_at_once,
    many_keys_in_any_order,
);

const FAILED: End = End::Failed { permanent: false, retry_after: None };
const REFUSED: End = End::Failed { permanent: true, retry_after: None };

fn one(unique: Unique) -> Declared {
    Declared { unique: Some(unique), ..declared("one", "t", Kind::Plain) }
}

fn draft(key: &str) -> Draft {
    let draft = Envelope::json("t", &1).expect("a draft");
    if key.is_empty() { draft } else { draft.key(key) }
}

async fn publish<Db: Testable>(fresh: &Fresh<Db>, key: &str) -> Published {
    fresh.postbox.publish_now([draft(key)]).await.expect("publishes").remove(0)
}

/// Those that are for no delivery of their own.
fn coalesced(published: &[Published]) -> usize {
    published.iter().filter(|p| !p.coalesced_into().is_empty()).count()
}

async fn succeed<Db: Testable>(hand: &Hand<Db>, room: u32) -> Vec<i64> {
    let claimed = hand.claim(room).await;
    done(hand, &claimed).await;
    claimed.items.iter().map(|i| i.delivery).collect()
}

async fn done<Db: Testable>(hand: &Hand<Db>, claimed: &Claimed) {
    if !claimed.items.is_empty() {
        let successes = claimed.items.iter().map(success).collect();
        let settle = Settle { successes, close: true, ..hand.flush(claimed, 1) };
        assert_eq!(hand.settle(settle).await, Guarded::Done);
    }
}

/// One that is due ends like this, and is tried again, if at all, in an hour.
async fn ends<Db: Testable>(hand: &Hand<Db>, kind: Kind, end: End) -> i64 {
    let claimed = hand.claim(1).await;
    let item = &claimed.items[0];
    let begun = kind == Kind::Operation;
    if begun {
        hand.begin(&claimed, 1, &[item]).await;
    }
    let moves = vec![Move { delay: Duration::from_secs(3600), ..hand::ended(item, kind, end, begun) }];
    assert_eq!(hand.settle(Settle { moves, close: true, ..hand.flush(&claimed, 2) }).await, Guarded::Done);
    item.delivery
}

fn table<Db: Testable>(fresh: &Fresh<Db>, name: &str) -> String {
    match <Db as Testable>::NAME {
        "postgres" => format!("{}.{name}", fresh.schema()),
        _ => format!("postbox_{name}"),
    }
}

async fn rows<Db: Testable>(fresh: &Fresh<Db>, name: &str) -> i64 {
    Db::count(fresh, &format!("select count(*) from {}", table(fresh, name))).await
}

/// Keys of which more than one delivery is unfinished.
async fn doubled<Db: Testable>(fresh: &Fresh<Db>) -> Vec<String> {
    let mut keys: HashMap<String, usize> = HashMap::new();
    for row in fresh.postbox.admin().list(&Filter::default(), 100_000).await.expect("list") {
        if matches!(row.state, State::Pending | State::Running | State::InDoubt)
            && let Some(key) = row.key
        {
            *keys.entry(key).or_default() += 1;
        }
    }
    keys.into_iter().filter(|(_, many)| *many > 1).map(|(key, _)| key).collect()
}

async fn a_key_has_one_delivery<Db: Testable>() {
    let fresh = Db::fresh().await;
    let beside = declared("beside", "t", Kind::Plain);
    let hand = Hand::register(&fresh, vec![one(Unique::Coalesce), beside]).await;
    let (one, beside) = (hand.subscriptions[0], hand.subscriptions[1]);
    let first = publish(&fresh, "a").await;
    assert_eq!(first.coalesced_into(), [0; 0]);
    let stands = fresh.postbox.admin().message(first.id).await.expect("there").1[0];
    let second = publish(&fresh, "a").await;
    assert_eq!(second.coalesced_into(), [stands], "it is told at once");
    for key in ["b", "", ""] {
        assert_eq!(publish(&fresh, key).await.coalesced_into(), [0; 0], "{key}");
    }
    let claimed = hand.claim_of(&[one], 10).await;
    assert_eq!(claimed.items.len(), 4, "one of a, one of b, and both without a key");
    assert_eq!(hand.claim_of(&[beside], 10).await.items.len(), 5, "others are not concerned");

    // It is on record, and seen from both sides.
    let admin = fresh.postbox.admin();
    let detail = admin.show(stands).await.expect("there");
    assert_eq!((detail.row.message, detail.coalesced), (first.id, vec![second.id]));
    let told = admin.coalesced(second.id).await.expect("told");
    assert_eq!((told.len(), told[0].subscription.as_str(), told[0].delivery), (1, "one", stands));
    assert_eq!(admin.message(second.id).await.expect("stored as usual").1.len(), 1);
    assert_eq!(admin.coalesced(first.id).await.expect("told").len(), 0);

    // While it runs, too; and then its key is free.
    assert_eq!(publish(&fresh, "a").await.coalesced_into(), [stands]);
    done(&hand, &claimed).await;
    let next = publish(&fresh, "a").await;
    assert_eq!(next.coalesced_into(), [0; 0]);
    assert_eq!(hand.claim_of(&[one], 10).await.items.len(), 1);

    // What the subscription takes nothing of is not one that nobody is subscribed to.
    Hand::register(&fresh, vec![Declared { unique: Some(Unique::Coalesce), ..declared("alone", "u", Kind::Plain) }])
        .await;
    let two = [0, 1].map(|n| Envelope::json("u", &n).expect("a draft").key("k"));
    assert_eq!(coalesced(&fresh.postbox.publish_now(two).await.expect("publishes")), 1);
    assert_eq!(fresh.postbox.admin().status().await.expect("status").unrouted, 0);
}

async fn whatever_is_unfinished_has_its_key<Db: Testable>() {
    let fresh = Db::fresh().await;
    let operation = Declared { unique: Some(Unique::Coalesce), ..declared("op", "t", Kind::Operation) };
    let hand = Hand::register(&fresh, vec![operation]).await;
    let admin = fresh.postbox.admin();
    let taken = async |what: &str| assert_eq!(coalesced(&[publish(&fresh, "a").await]), 1, "{what}");

    let later = draft("a").after(Duration::from_secs(3600));
    fresh.postbox.publish_now([later]).await.expect("publishes");
    taken("due in an hour").await;
    let waits = admin.list(&Filter::default(), 10).await.expect("list")[0].id;
    let (actor, reason) = ("ana".to_owned(), "not to wait".to_owned());
    admin.retry(waits, &Retry { rev: None, actor: actor.clone(), reason: reason.clone() }).await.expect("due now");
    taken("due now, at another place").await;
    assert_eq!(ends(&hand, Kind::Operation, FAILED).await, waits);
    taken("to be tried again").await;
    admin.cancel(waits, &Cancel { rev: None, actor: actor.clone(), reason: reason.clone() }).await.expect("called off");

    publish(&fresh, "a").await;
    let doubtful = ends(&hand, Kind::Operation, End::InDoubt).await;
    assert_ne!(doubtful, waits, "what was called off has no key");
    taken("in doubt").await;
    let word = Resolution {
        rev: None,
        answer: Answer::Abandoned,
        evidence: None,
        actor: actor.clone(),
        reason: "nobody knows".into(),
    };
    admin.resolve(doubtful, &word).await.expect("resolved");
    assert_eq!(publish(&fresh, "a").await.coalesced_into(), [0; 0]);
    let dead = ends(&hand, Kind::Operation, REFUSED).await;
    assert_eq!(admin.show(dead).await.expect("there").row.state, State::Dead);
    assert_eq!(publish(&fresh, "a").await.coalesced_into(), [0; 0], "a dead one has no key");
    assert_eq!(doubled(&fresh).await, [""; 0]);

    // Taken over from a worker that died.
    let claimed = hand.claim(5).await;
    assert_eq!(claimed.items.len(), 1);
    let heir = Hand::register(
        &fresh,
        vec![Declared { unique: Some(Unique::Coalesce), ..declared("op", "t", Kind::Operation) }],
    )
    .await;
    hand.dies(&fresh).await;
    taken("taken over").await;
    assert_eq!(heir.claim(5).await.items.len(), 1);
}

async fn a_refusal_names_it_and_writes_nothing<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![one(Unique::Refuse)]).await;
    let other = Envelope::json("other", &1).expect("a draft");
    publish(&fresh, "a").await;
    let delivery = fresh.postbox.admin().list(&Filter::default(), 10).await.expect("list")[0].id;
    let refused = |result: Result<Vec<Published>, Error>| match result {
        Err(Error::Publish(PublishError::KeyInFlight { subscription, key, delivery })) => (subscription, key, delivery),
        result => panic!("a refusal was expected: {result:?}"),
    };
    let named = ("one".to_owned(), "a".to_owned(), delivery);
    assert_eq!(refused(fresh.postbox.publish_now([other.clone(), draft("b"), draft("a")]).await), named);
    assert_eq!(rows(&fresh, "message").await, 1, "nothing of it is there");
    // Twice in one call is no better.
    let (subscription, key, _) = refused(fresh.postbox.publish_now([draft("b"), other.clone(), draft("b")]).await);
    assert_eq!((subscription.as_str(), key.as_str()), ("one", "b"));
    assert_eq!((rows(&fresh, "message").await, rows(&fresh, "coalesced").await), (1, 0));
    fresh.postbox.publish_now([draft("b"), other, draft("")]).await.expect("nobody has it");
    assert_eq!(succeed(&hand, 10).await.len(), 3);
    publish(&fresh, "a").await;
}

async fn many_at_once_are_as_one_after_the_other<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![one(Unique::Coalesce)]).await;
    let many = (0..1500).map(|n| draft(&format!("k{}", n % 10)));
    let published = fresh.postbox.publish_now(many).await.expect("publishes");
    assert_eq!(coalesced(&published), 1490, "in one statement and over several");
    assert!(published[..10].iter().all(|p| p.coalesced_into().is_empty()), "the first of each");
    let claimed = hand.claim(100).await;
    assert_eq!(claimed.items.len(), 10);
    let first: Vec<Uuid> = published[..10].iter().map(|p| p.id).collect();
    assert!(claimed.items.iter().all(|i| first.contains(&i.message)));
    // What fans out is learnt, and each is published by itself then.
    done(&hand, &claimed).await;
    fresh.postbox.store().learn_routes(&["t".into()]).await.expect("learns");
    let mut alone = Vec::new();
    for n in 0..40 {
        alone.push(publish(&fresh, &format!("k{}", n % 4)).await);
    }
    assert_eq!(coalesced(&alone), 36);
    assert_eq!(doubled(&fresh).await, [""; 0]);
    assert_eq!(hand.claim(100).await.items.len(), 4);
}

async fn a_dead_one_comes_back_only_to_a_free_key<Db: Testable>() {
    for unique in [Unique::Coalesce, Unique::Refuse] {
        let fresh = Db::fresh().await;
        let hand = Hand::register(&fresh, vec![one(unique)]).await;
        let admin = fresh.postbox.admin();
        publish(&fresh, "a").await;
        let dead = ends(&hand, Kind::Plain, REFUSED).await;
        publish(&fresh, "a").await;
        let held = hand.claim(1).await;
        let holder = held.items[0].delivery;
        let retry = Retry { rev: None, actor: "ana".into(), reason: "mended".into() };
        let again = Replay { actor: "ana".into(), reason: "once more".into(), irreversible: false };
        let words = |result: Result<(), Error>| match result {
            Err(Error::Conflict(words)) => words,
            other => panic!("a conflict was expected: {other:?}"),
        };
        let named = format!("delivery {holder} has the key of delivery {dead}");
        let refused = words(admin.retry(dead, &retry).await.map(drop));
        assert!(refused.contains(&named), "{refused}");
        let refused = words(admin.replay(dead, &again).await.map(drop));
        assert!(refused.contains(&named), "{refused}");
        assert_eq!(admin.show(dead).await.expect("there").row.state, State::Dead);
        let asked = admin.audit(10).await.expect("audit").iter().filter(|e| e.action.contains("refused")).count();
        assert_eq!((asked, rows(&fresh, "coalesced").await), (2, 0), "asked for, refused, and nothing came of it");

        done(&hand, &held).await;
        admin.retry(dead, &retry).await.expect("its key is free");
        match unique {
            Unique::Coalesce => assert_eq!(publish(&fresh, "a").await.coalesced_into(), [dead]),
            Unique::Refuse => {
                assert!(fresh.postbox.publish_now([draft("a")]).await.is_err(), "it has its key again");
            }
        }
        assert_eq!(succeed(&hand, 5).await, [dead]);
        let made = admin.replay(dead, &again).await.expect("free again").delivery;
        assert!(fresh.postbox.publish_now([draft("a")]).await.map_or(true, |p| p[0].coalesced_into() == [made]));
        assert_eq!(succeed(&hand, 5).await, [made]);
    }
}

async fn replays_of_many_keep_to_it<Db: Testable>() {
    for unique in [Unique::Coalesce, Unique::Refuse] {
        let fresh = Db::fresh().await;
        let hand = Hand::register(&fresh, vec![one(unique)]).await;
        for _ in 0..3 {
            for key in ["a", "b"] {
                publish(&fresh, key).await;
            }
            assert_eq!(succeed(&hand, 10).await.len(), 2);
        }
        let filter: Filter = "state:succeeded".parse().expect("a filter");
        let ended = fresh.postbox.store().replayable(&filter, 0, i64::MAX, 100).await.expect("looked up");
        assert_eq!(ended.len(), 6);
        let again = Replay { actor: "ana".into(), reason: "all of it".into(), irreversible: false };
        assert_eq!(fresh.postbox.store().replay_page(&ended, &again).await.expect("replays"), 2);
        assert_eq!((doubled(&fresh).await.len(), rows(&fresh, "coalesced").await), (0, 4));
        assert_eq!(succeed(&hand, 10).await.len(), 2);
    }
}

async fn what_was_there_before_stays<Db: Testable>() {
    let fresh = Db::fresh().await;
    let before = Hand::register(&fresh, vec![declared("one", "t", Kind::Plain)]).await;
    for key in ["a", "a", "a", "b", ""] {
        publish(&fresh, key).await;
    }
    let running = before.claim(1).await;
    let hand = Hand::register(&fresh, vec![one(Unique::Coalesce)]).await;
    assert_eq!(hand.subscriptions, before.subscriptions);
    // One of a runs, two of them wait: as long as one of them is there, no other comes.
    assert_eq!(coalesced(&[publish(&fresh, "a").await, publish(&fresh, "b").await]), 2);
    done(&before, &running).await;
    for left in [2, 1] {
        assert_eq!(coalesced(&[publish(&fresh, "a").await]), 1, "{left} are left");
        let claimed = hand.claim(1).await;
        done(&hand, &claimed).await;
    }
    let next = publish(&fresh, "a").await;
    assert_eq!(next.coalesced_into(), [0; 0], "none is left");
    assert_eq!(coalesced(&[publish(&fresh, "a").await]), 1);
    assert_eq!(succeed(&hand, 10).await.len(), 3, "b, the one without a key, and the new one of a");

    // What one start declares, the next can take back.
    publish(&fresh, "a").await;
    Hand::register(&fresh, vec![declared("one", "t", Kind::Plain)]).await;
    assert_eq!(coalesced(&[publish(&fresh, "a").await, publish(&fresh, "a").await]), 0);
    Hand::register(&fresh, vec![one(Unique::Refuse)]).await;
    assert!(fresh.postbox.publish_now([draft("a")]).await.is_err());
    assert_eq!(succeed(&hand, 10).await.len(), 3);
    publish(&fresh, "a").await;
}

async fn a_new_subscription_takes_the_first_of_a_key<Db: Testable>() {
    for unique in [Unique::Coalesce, Unique::Refuse] {
        for start in [Start::Unrouted, Start::Beginning] {
            let fresh = Db::fresh().await;
            let mut published = Vec::new();
            for n in 0..12 {
                let message = publish(&fresh, ["a", "b", ""][n % 3]).await;
                // Ids of one millisecond sort in any order on PostgreSQL.
                while jiff::Timestamp::now().as_millisecond() == message.received_at.as_millisecond() {
                    tokio::task::yield_now().await;
                }
                published.push(message);
            }
            let hand = Hand::register(&fresh, vec![Declared { start, ..one(unique) }]).await;
            let claimed = hand.claim(100).await;
            let taken: Vec<Uuid> = claimed.items.iter().map(|i| i.message).collect();
            let first: Vec<Uuid> = [0, 1, 2, 5, 8, 11].map(|n: usize| published[n].id).to_vec();
            assert_eq!(taken, first, "{unique:?} {start:?}");
            assert_eq!(rows(&fresh, "coalesced").await, 6);
            assert_eq!(fresh.postbox.admin().status().await.expect("status").unrouted, 0);
        }
    }
}

/// Handlers that publish what is of their own key: while they run, and with their end.
async fn its_own_follow_up_has_a_delivery<Db: Testable>() {
    let fresh = Db::fresh().await;
    let ran = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = ran.clone();
    let plain = move |envelope: Envelope| {
        let seen = seen.clone();
        async move {
            let left: u32 = envelope.decode()?;
            seen.lock().expect("no panic").push((envelope.topic.clone(), left));
            let next = Envelope::json(&*envelope.topic, &left.saturating_sub(1))?.key("k");
            Ok::<_, Failure>(if left > 0 { Done::new().then(next) } else { Done::new() })
        }
    };
    let seen = ran.clone();
    let transactional = move |envelope: Envelope, _: Tx<Db>| {
        let seen = seen.clone();
        async move {
            let left: u32 = envelope.decode()?;
            seen.lock().expect("no panic").push((envelope.topic.clone(), left));
            let next = Envelope::json(&*envelope.topic, &left.saturating_sub(1))?.key("k");
            Ok::<_, Failure>(if left > 0 { Done::new().then(next) } else { Done::new() })
        }
    };
    let routes = Router::<Db>::new()
        .on("plain", handler(plain).named("plain").unique(Unique::Refuse))
        .on("tx", handler(transactional).named("tx").unique(Unique::Refuse));
    let worker = fresh.postbox.worker(routes).poll_interval(Duration::from_millis(20)).start().await.expect("starts");
    let two = ["plain", "tx"].map(|topic| Envelope::json(topic, &3).expect("a draft").key("k"));
    fresh.postbox.publish_now(two).await.expect("publishes");
    let through = async {
        while ran.lock().expect("no panic").len() < 8 {
            tokio::task::yield_now().await;
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(60), through).await;
    assert!(in_time.is_ok(), "{:?}", ran.lock());
    worker.stop(None).await.expect("stops");
    assert_eq!(rows(&fresh, "coalesced").await, 0);
}

async fn there_is_nobody_to_refuse_a_follow_up_to<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![one(Unique::Refuse), declared("other", "u", Kind::Plain)]).await;
    publish(&fresh, "a").await;
    fresh.postbox.publish_now([Envelope::json("u", &1)]).await.expect("publishes");
    let claimed = hand.claim_of(&hand.subscriptions[1..], 10).await;
    let successes = claimed.items.iter().map(success).collect();
    let follow_ups = vec![draft("a"), draft("b")];
    let settle = Settle { successes, follow_ups, close: true, ..hand.flush(&claimed, 1) };
    assert_eq!(hand.settle(settle).await, Guarded::Done);
    assert_eq!((rows(&fresh, "message").await, rows(&fresh, "coalesced").await), (4, 1));
    // And who can be told is told still.
    assert!(fresh.postbox.publish_now([draft("a")]).await.is_err());
}

async fn a_message_stays_as_long_as_what_stands_for_it<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![one(Unique::Coalesce), declared("short", "t", Kind::Plain)]).await;
    publish(&fresh, "a").await;
    let second = publish(&fresh, "a").await.id;
    // The other subscription is done with both; the delivery that stands for the second one waits.
    assert_eq!(succeed_of(&hand, 1).await, 2);
    let retain = async || {
        let subscription = table(&fresh, "subscription");
        Db::execute(&fresh, &format!("update {subscription} set keep_succeeded_ms = 0, keep_dead_ms = 0")).await;
        if <Db as Testable>::NAME == "postgres" {
            let sql = format!("update {} set parts_after = null, swept_at = null", table(&fresh, "retention"));
            Db::execute(&fresh, &sql).await;
            end_window(&fresh).await;
        }
        let retention = Retention { keep_unrouted: Duration::MAX, most: 100, tell: false };
        let mut gone = (0, 0);
        loop {
            let step = fresh.postbox.store().retain(&retention).await.expect("retains");
            gone = (gone.0 + step.deliveries, gone.1 + step.messages);
            if !step.more {
                return gone;
            }
        }
    };
    assert_eq!(retain().await, (2, 0));
    assert_eq!(fresh.postbox.admin().coalesced(second).await.expect("told").len(), 1);
    assert_eq!(coalesced(&[publish(&fresh, "a").await]), 1, "its key is not free");
    assert_eq!(succeed_of(&hand, 0).await, 1);
    assert_eq!(succeed_of(&hand, 1).await, 1);
    assert_eq!(retain().await, (2, 3));
    assert_eq!((rows(&fresh, "message").await, rows(&fresh, "coalesced").await), (0, 0));
    assert_eq!(publish(&fresh, "a").await.coalesced_into(), [0; 0]);
}

/// All that is due of one of its subscriptions succeeds.
async fn succeed_of<Db: Testable>(hand: &Hand<Db>, place: usize) -> usize {
    let claimed = hand.claim_of(&hand.subscriptions[place..=place], 100).await;
    done(hand, &claimed).await;
    claimed.items.len()
}

/// A worker that does not know of it: what it ends has its row still, and the next of its key takes that over.
async fn unaware<Db: Testable>(fresh: &Fresh<Db>) -> Hand<Db> {
    Hand::registered(fresh, &hand::registration(vec![])).await
}

async fn keys_that_stayed_behind_are_let_go<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![one(Unique::Coalesce)]).await;
    let unaware = unaware(&fresh).await;
    let many = (0..500).map(|n| draft(&format!("k{n}")));
    fresh.postbox.publish_now(many).await.expect("publishes");
    let claimed = unaware.claim_of(&hand.subscriptions, 400).await;
    done(&unaware, &claimed).await;
    assert_eq!(rows(&fresh, "key_holder").await, 500);
    assert_eq!(publish(&fresh, "k0").await.coalesced_into(), [0; 0], "it is free all the same");
    fresh.postbox.store().tidy().await.expect("tidies");
    assert_eq!(rows(&fresh, "key_holder").await, 101);
    // Who knows lets go at once.
    assert_eq!(succeed(&hand, 200).await.len(), 101);
    assert_eq!(rows(&fresh, "key_holder").await, 0);
    fresh.postbox.store().tidy().await.expect("tidies");
}

async fn eight_publishers_at_once<Db: Testable>() {
    const ROUNDS: usize = 25;
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![one(Unique::Coalesce)]).await;
    let unaware = unaware(&fresh).await;
    let publishing = AtomicBool::new(true);
    let publishers = (0..8).map(async |place| {
        let mut published = Vec::new();
        for round in 0..ROUNDS {
            let keys = (0..4).map(|n| draft(&format!("k{}", (place + round + n) % 5)));
            published.extend(fresh.postbox.publish_now(keys).await.expect("publishes"));
        }
        published
    });
    let published = async {
        let all = futures_util::future::join_all(publishers).await;
        publishing.store(false, Ordering::SeqCst);
        all.into_iter().flatten().collect::<Vec<_>>()
    };
    // Meanwhile they succeed, fail and wait, and die.
    let working = async {
        let (mut ended, mut turn) = (0, 0);
        while publishing.load(Ordering::SeqCst) || doubled(&fresh).await != [""; 0] || ended == 0 {
            turn += 1;
            let who = if turn % 2 == 0 { &hand } else { &unaware };
            let claimed = who.claim_of(&hand.subscriptions, 3).await;
            let ends = [End::Succeeded, FAILED, REFUSED][turn % 3];
            let moves: Vec<Move> = claimed
                .items
                .iter()
                .map(|i| Move { delay: Duration::ZERO, ..hand::ended(i, Kind::Plain, ends, false) })
                .collect();
            if !moves.is_empty() {
                ended += moves.len();
                let settle = Settle { moves, close: true, ..who.flush(&claimed, 1) };
                assert_eq!(who.settle(settle).await, Guarded::Done);
            }
            assert_eq!(doubled(&fresh).await, [""; 0]);
        }
    };
    let (published, ()) = tokio::join!(published, working);
    assert_eq!(published.len(), 8 * 4 * ROUNDS);
    // Each has a delivery of its own, or one of its key that stood for it.
    let rows = fresh.postbox.admin().list(&Filter::default(), 10_000).await.expect("list");
    let own = rows.iter().filter(|r| published.iter().any(|p| p.id == r.message)).count();
    assert_eq!((own + coalesced(&published), own), (published.len(), rows.len()));
    for message in &published {
        for stands in message.coalesced_into() {
            assert!(rows.iter().any(|r| r.id == *stands && r.key == message.key), "{message:?}");
        }
    }
    while !succeed(&hand, 10).await.is_empty() {}
    let last = (0..5).map(|n| draft(&format!("k{n}")));
    assert_eq!(coalesced(&fresh.postbox.publish_now(last).await.expect("publishes")), 0, "all are free");
}

async fn many_keys_in_any_order<Db: Testable>() {
    let fresh = Db::fresh().await;
    let hand = Hand::register(&fresh, vec![one(Unique::Coalesce)]).await;
    for _ in 0..3 {
        let publishers = (0..8).map(async |place: usize| {
            let keys = (0..60).map(|n| draft(&format!("k{}", (n * 7 + place * 13) % 60)));
            coalesced(&fresh.postbox.publish_now(keys).await.expect("nobody is in the way of another"))
        });
        let coalesced: usize = futures_util::future::join_all(publishers).await.into_iter().sum();
        assert_eq!(coalesced, 7 * 60);
        assert_eq!(succeed(&hand, 100).await.len(), 60);
    }
}

async fn sql(fresh: &Fresh<Postgres>, text: &str) {
    Postgres::execute(fresh, &text.replace("{s}", &fresh.schema())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_not_committed_is_waited_for() {
    let fresh = Postgres::fresh().await;
    let hand = Hand::register(&fresh, vec![one(Unique::Coalesce)]).await;
    let unaware = unaware(&fresh).await;
    // At first nobody had the key; then it is taken over from an ended one.
    for commits in [true, true, false] {
        let mut first = fresh.pool.begin().await.expect("begins");
        assert_eq!(fresh.postbox.publish(&mut first, draft("a")).await.expect("publishes").coalesced_into(), [0; 0]);
        let postbox = fresh.postbox.clone();
        let second = tokio::spawn(async move { postbox.publish_now([draft("a")]).await.expect("publishes") });
        // Others of the database do not wait.
        publish(&fresh, "b").await;
        let waits = format!(
            "select count(*) from pg_locks l join pg_stat_activity a on a.pid = l.pid
             where not l.granted and a.query like '%Stores messages%' and a.query like '%{}.%'",
            fresh.schema()
        );
        while Postgres::count(&fresh, &waits).await == 0 {
            assert!(!second.is_finished(), "it did not wait");
            tokio::task::yield_now().await;
        }
        match commits {
            true => first.commit().await.expect("commits"),
            false => first.rollback().await.expect("rolls back"),
        }
        assert_eq!(coalesced(&second.await.expect("no panic")), usize::from(commits));
        let claimed = unaware.claim_of(&hand.subscriptions, 10).await;
        assert_eq!(claimed.items.len(), 2);
        done(&unaware, &claimed).await;
    }
    let mut open = fresh.pool.begin().await.expect("begins");
    fresh.postbox.publish(&mut open, draft("a")).await.expect("publishes");
    fresh.postbox.publish(&mut open, draft("a")).await.expect("sees its own");
    open.commit().await.expect("commits");
    assert_eq!(succeed(&hand, 10).await.len(), 1);
}

#[tokio::test]
async fn after_a_refusal_a_transaction_goes_on_from_a_savepoint() {
    let fresh = Postgres::fresh().await;
    let hand = Hand::register(&fresh, vec![one(Unique::Refuse)]).await;
    publish(&fresh, "a").await;
    let mut tx = fresh.pool.begin().await.expect("begins");
    sqlx::raw_sql("savepoint before").execute(&mut *tx).await.expect("saved");
    let error = fresh.postbox.publish(&mut tx, draft("a")).await.expect_err("in flight");
    assert!(matches!(&error, PublishError::KeyInFlight { key, .. } if key == "a"), "{error:?}");
    sqlx::raw_sql("rollback to savepoint before").execute(&mut *tx).await.expect("back");
    fresh.postbox.publish(&mut tx, draft("c")).await.expect("published");
    tx.commit().await.expect("commits");
    assert_eq!(succeed(&hand, 10).await.len(), 2);
}

/// The same from SQL, and through the function that a publisher's role has.
#[tokio::test]
async fn from_sql() {
    let fresh = Postgres::fresh().await;
    let s = fresh.schema();
    sql(&fresh, "select {s}.subscribe('one', 't', 'app')").await;
    sql(&fresh, "select {s}.unique_in_flight('one', 'coalesce', 'app')").await;
    sql(&fresh, "select {s}.publish('t', '1', key => 'a') from generate_series(1, 3)").await;
    sql(&fresh, r#"select {s}.publish_many('[{"topic": "t", "payload": 1, "key": "a"}, {"topic": "t", "payload": 1, "key": "b"}]')"#).await;
    assert_eq!((rows(&fresh, "ready").await, rows(&fresh, "coalesced").await), (2, 3));
    let told = fresh.settings.clone().set("publish_through_function", "true");
    let through = postbox::Postbox::<Postgres>::open(told).await.expect("opens");
    assert_eq!(coalesced(&through.publish_now([draft("a")]).await.expect("publishes")), 1);

    let error = sqlx::raw_sql(sqlx::AssertSqlSafe(format!("select {s}.unique_in_flight('one', 'both', 'app')")))
        .execute(&fresh.pool)
        .await
        .expect_err("there is no such thing");
    assert!(error.to_string().contains("there are coalesce, refuse and null"), "{error}");
    sql(&fresh, "select {s}.unique_in_flight('one', 'refuse', 'app')").await;
    let error = sqlx::raw_sql(sqlx::AssertSqlSafe(format!("select {s}.publish('t', '2', key => 'a')")))
        .execute(&fresh.pool)
        .await
        .expect_err("in flight");
    let error = error.as_database_error().expect("the database's");
    assert_eq!(error.code().as_deref(), Some("PB001"));
    assert!(error.message().contains("`one` takes one delivery of a key at a time"), "{error}");
    let refused = through.publish_now([draft("a")]).await.expect_err("in flight");
    assert!(matches!(&refused, Error::Publish(PublishError::KeyInFlight { key, .. }) if key == "a"), "{refused:?}");

    // Taken and failed in one transaction, with another one of its key between.
    let mut tx = fresh.pool.begin().await.expect("begins");
    let taken: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(format!("select delivery from {s}.next('one', 'app')")))
        .fetch_one(&mut *tx)
        .await
        .expect("taken");
    let run = |text: String| sqlx::raw_sql(sqlx::AssertSqlSafe(text));
    run(format!("savepoint before; select {s}.failed({taken}, 'no', interval '0')"))
        .execute(&mut *tx)
        .await
        .expect("fails");
    run("rollback to savepoint before".into()).execute(&mut *tx).await.expect("back");
    run(format!("select {s}.publish('t', '3', key => 'a')")).execute(&mut *tx).await.expect("its key is free");
    let error =
        run(format!("select {s}.failed({taken}, 'no', interval '0')")).execute(&mut *tx).await.expect_err("two");
    assert_eq!(error.as_database_error().and_then(|e| e.code()).as_deref(), Some("PB001"));
    tx.rollback().await.expect("rolls back");
    sql(&fresh, "select {s}.unique_in_flight('one', null, 'app')").await;
    sql(&fresh, "select {s}.publish('t', '1', key => 'a') from generate_series(1, 3)").await;
    assert_eq!(rows(&fresh, "ready").await, 5);
}
