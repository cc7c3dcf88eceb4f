use super::*;
use crate::admin::{Resolution, Retry};
use crate::error::Error;
use crate::lifecycle::Answer;

fn retry(rev: Option<i32>) -> Retry {
    Retry { rev, actor: "ana".into(), reason: "fixed".into() }
}

#[tokio::test]
async fn retry_takes_what_waits_or_is_dead_and_nothing_else() {
    let shop = Shop::new().await;
    let (claimed, lease) = shop.claimed(operation(), 5).await;
    let [held, dead, later, doubt, done] = [0, 1, 2, 3, 4].map(|i| &claimed.items[i]);
    let settle = Settle {
        moves: vec![
            moved(dead, State::Dead, 1, "failed"),
            Move { delay: Duration::from_secs(60), ..moved(later, State::Pending, 1, "failed") },
            moved(doubt, State::InDoubt, 1, "in_doubt"),
            moved(done, State::Succeeded, 1, "succeeded"),
        ],
        ..flush(lease, 0)
    };
    shop.store.settle(&settle).await.expect("settles");
    let refused = async |item: &Item, rev| shop.store.retry(item.delivery, &retry(rev)).await.expect_err("refused");
    assert!(matches!(refused(held, None).await, Error::Conflict(_)), "a worker has it");
    assert!(matches!(refused(doubt, None).await, Error::Refused(_)));
    assert!(matches!(refused(done, None).await, Error::Refused(_)));
    assert!(matches!(refused(dead, Some(1)).await, Error::Conflict(_)), "it moved on");
    assert!(matches!(shop.store.retry(999, &retry(None)).await, Err(Error::NotFound(_))));
    let entry = shop.store.retry(dead.delivery, &retry(Some(2))).await.expect("retries");
    assert_eq!(
        (entry.state_before.as_deref(), entry.state_after.as_deref(), entry.rev_after),
        (Some("dead"), Some("pending"), Some(3))
    );
    shop.store.retry(later.delivery, &retry(None)).await.expect("retries");

    let (claimed, lease) = claim(&shop.store, lease.worker, held.subscription, 10).await;
    assert_eq!(
        claimed.items.iter().map(|i| (i.delivery, i.attempts)).collect::<Vec<_>>(),
        [(dead.delivery, 1), (later.delivery, 1)]
    );
    // The numbering goes on.
    let settle = Settle { moves: vec![moved(&claimed.items[0], State::Succeeded, 2, "succeeded")], ..flush(lease, 0) };
    shop.store.settle(&settle).await.expect("settles");
    let audit = shop.store.audit(100).await.expect("reads");
    assert_eq!(audit.iter().map(|a| a.seq).collect::<Vec<_>>(), [6, 5, 4, 3, 2, 1], "no gap");
    assert_eq!(audit.iter().filter(|a| a.action == "retry refused").count(), 4);
}

#[tokio::test]
async fn two_operators_resolve_one_wins_and_both_are_on_record() {
    let shop = Shop::new().await;
    let (claimed, lease) = shop.claimed(operation(), 1).await;
    let item = &claimed.items[0];
    let resolution = |actor: &str, answer| Resolution {
        rev: Some(item.rev + 1),
        answer,
        evidence: None,
        actor: actor.into(),
        reason: "I know".into(),
    };
    let early = shop.store.resolve(item.delivery, &resolution("eve", Answer::Happened)).await;
    assert!(matches!(early, Err(Error::Conflict(_))), "not in doubt yet");
    let settle = Settle { moves: vec![moved(item, State::InDoubt, 1, "in_doubt")], close: true, ..flush(lease, 0) };
    shop.store.settle(&settle).await.expect("settles");
    let both = [resolution("ana", Answer::Abandoned), resolution("bob", Answer::Happened)];
    let results = futures_util::future::join_all(both.iter().map(|r| shop.store.resolve(item.delivery, r))).await;
    assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1);
    assert!(results.iter().any(|r| matches!(r, Err(Error::Conflict(_)))));
    assert!(matches!(shop.state(item.delivery).await, State::Dead | State::Succeeded));
    let detail = shop.store.show(item.delivery).await.expect("shows").expect("is there");
    let said: Vec<_> = detail.records.iter().map(|r| r.record.as_str()).collect();
    assert_eq!(said.iter().filter(|r| **r == "audit").count(), 3);
    assert_eq!(said.iter().filter(|r| **r == "resolution").count(), 1);
}

#[tokio::test]
async fn counts_filters_and_what_nobody_stands_behind() {
    let shop = Shop::new().await;
    let (claimed, lease) = shop.claimed(operation(), 6).await;
    let settle = Settle {
        starts: vec![(claimed.items[0].delivery, 1)],
        moves: vec![
            moved(&claimed.items[1], State::Dead, 1, "failed"),
            moved(&claimed.items[2], State::InDoubt, 1, "in_doubt"),
            moved(&claimed.items[3], State::Succeeded, 1, "succeeded"),
            Move { delay: Duration::from_secs(60), ..moved(&claimed.items[4], State::Pending, 1, "failed") },
        ],
        ..flush(lease, 0)
    };
    shop.store.settle(&settle).await.expect("settles");
    shop.publish(&[draft("orders.placed", 9).key("42")]).await;
    let status = shop.store.status().await.expect("status");
    let row = &status.subscriptions[0];
    assert_eq!((row.pending, row.scheduled, row.running, row.in_doubt, row.dead), (2, 1, 1, 1, 1));
    assert_eq!((row.succeeded_last_hour, row.workers, row.max_attempts, status.schema_version), (1, 1, 3, 8));
    assert!(row.oldest_age_s.is_some_and(|age| age < 60.0));
    assert!(status.stranded.is_empty());
    let listed =
        async |filter: &str| shop.store.list(&filter.parse().expect("a filter"), 100).await.expect("lists").len();
    assert_eq!(listed("state:pending").await, 3, "one of them in its worker's hands");
    assert_eq!(listed("state:running,in_doubt").await, 2);
    assert_eq!(listed("state:succeeded,dead").await, 2);
    assert_eq!(listed("state:cancelled").await, 0);
    assert_eq!(listed("key:42 topic:orders.* subscription:charge").await, 1);
    assert_eq!(listed("key:43").await + listed("topic:other").await + listed("subscription:x").await, 0);
    assert_eq!(shop.store.list(&"".parse().expect("a filter"), 2).await.expect("lists").len(), 2);
    let detail = shop.store.show(claimed.items[5].delivery).await.expect("shows").expect("is there");
    assert_eq!((detail.row.state, detail.worker.as_deref()), (State::Pending, Some("host:1")));
    assert!(shop.store.show(999).await.expect("looks").is_none());

    // Nobody of the application stands behind the old name any more.
    let Shop { store, folder } = shop;
    drop(store);
    let store = open(folder.path()).await;
    store.take_over(0.5).await.expect("looks").expect("the first worker");
    register(&store, vec![declared("renamed", "orders.placed")]).await;
    let stranded = store.stranded().await.expect("looks");
    let told = &stranded[0];
    assert_eq!((told.subscription.as_str(), told.waiting, told.later), ("charge", 4, 1), "one is due later");
}
