use super::*;
use crate::admin::{Filter, Replay};
use crate::retention::Retention;
use crate::store::Guarded;

/// Two subscriptions that share each message; what the first has succeeded is kept in rows of ten, in the
/// wrong order. The deliveries of the first, and of the second.
async fn drained(shop: &Shop, messages: usize) -> (Vec<i64>, Vec<i64>) {
    let (worker, ids) = shop.register(vec![declared("one", "a"), declared("two", "a")]).await;
    shop.publish(&(0..messages).map(|n| draft("a", n).key(format!("k{n}"))).collect::<Vec<_>>()).await;
    let (claimed, lease) = claim(&shop.store, worker, ids[0], messages as u32).await;
    for (part, items) in claimed.items.rchunks(10).enumerate() {
        let successes = items.iter().map(success).collect();
        let settle = Settle { successes, close: (part + 1) * 10 >= messages, ..flush(lease, part as i32) };
        assert_eq!(shop.store.settle(&settle).await.expect("settles"), Guarded::Done);
    }
    let two = "select id from postbox_delivery order by id";
    let two = sqlx::query_scalar(two).fetch_all(&shop.store.reader).await.expect("reads");
    (claimed.items.iter().map(|i| i.delivery).collect(), two)
}

#[tokio::test]
async fn successes_are_found_by_number_message_and_filter() {
    let shop = Shop::new().await;
    let (one, two) = drained(&shop, 100).await;
    assert_eq!((one.len(), two.len()), (100, 100));
    assert_eq!(shop.count("select count(*) from postbox_success").await, 10);
    assert_eq!(shop.count("select count(*) from postbox_outcome").await, 0, "none of them has a row of its own");
    let listed = async |filter: &str, limit| -> Vec<i64> {
        let filter: Filter = filter.parse().expect("a filter");
        shop.store.list(&filter, limit).await.expect("lists").iter().map(|d| d.id).collect()
    };
    let newest: Vec<i64> = one.iter().rev().copied().collect();
    assert_eq!(listed("state:succeeded", 200).await, newest);
    assert_eq!(listed("state:succeeded", 7).await, newest[..7]);
    assert_eq!(listed("state:succeeded key:k3", 7).await, [one[3]], "however old it is");
    assert_eq!(listed("", 500).await.len(), 200);
    assert_eq!(listed("subscription:two", 500).await.len(), 100);
    let shown = shop.store.show(one[42]).await.expect("shows").expect("is there");
    assert_eq!((shown.row.state, shown.row.attempt, shown.row.rev), (State::Succeeded, 1, 2));
    assert_eq!((shown.attempts.len(), shown.attempts[0].outcome.as_deref()), (1, Some("succeeded")));
    let (envelope, deliveries) = shop.store.deliveries_of(shown.row.message).await.expect("looks").expect("is there");
    assert_eq!((envelope.key.as_deref(), deliveries), (Some("k42"), vec![one[42], two[42]]));
    assert_eq!(shop.store.newest().await.expect("looks"), one.iter().chain(&two).copied().max().expect("some"));
    let status = shop.store.status().await.expect("status");
    let counts: Vec<_> = status.subscriptions.iter().map(|s| (s.pending, s.running, s.succeeded_last_hour)).collect();
    assert_eq!(counts, [(0, 0, 100), (100, 0, 0)]);
}

#[tokio::test]
async fn successes_are_replayed_like_any_other() {
    let shop = Shop::new().await;
    let (one, _) = drained(&shop, 30).await;
    let replay = Replay { actor: "ana".into(), reason: "again".into(), irreversible: false };
    let fresh = shop.store.replay(one[3], &replay).await.expect("replays");
    assert_eq!(fresh.replay_of, one[3]);
    let filter: Filter = "state:succeeded".parse().expect("a filter");
    let upto = shop.store.newest().await.expect("looks");
    let counts = shop.store.replay_counts(&filter, 0).await.expect("counts");
    assert_eq!(counts.iter().map(|c| c.deliveries).sum::<i64>(), 30);
    let (mut above, mut replayed) = (0, 0);
    loop {
        let page = shop.store.replayable(&filter, above, upto, 7).await.expect("looks");
        let Some(last) = page.last() else { break };
        above = last.delivery;
        replayed += shop.store.replay_page(&page, &replay).await.expect("replays");
    }
    assert_eq!(replayed, 30);
    assert_eq!(shop.count("select count(*) from postbox_delivery where replay_of is not null").await, 31);
}

#[tokio::test]
async fn retention_takes_successes_and_leaves_what_others_need() {
    let shop = Shop::new().await;
    drained(&shop, 20).await;
    shop.run("update postbox_success set at = 0").await;
    let retention = Retention { keep_unrouted: Duration::MAX, most: 1000, tell: true };
    let preview = shop.store.retention_preview(Duration::MAX).await.expect("looks");
    assert_eq!((preview.deliveries.len(), preview.deliveries[0].deliveries, preview.messages), (1, 20, 0));
    let gone = shop.store.retain(&retention).await.expect("retains");
    assert_eq!((gone.deliveries, gone.messages, gone.more), (20, 0, false), "the other subscription waits for them");
    // Claimed, and succeeded: still they are somebody's.
    let ids: Vec<SubscriptionId> = sqlx::query_scalar("select id from postbox_subscription order by id")
        .fetch_all(&shop.store.reader)
        .await
        .expect("reads");
    let (worker, _) = shop.register(vec![declared("one", "a"), declared("two", "a")]).await;
    let (claimed, lease) = claim(&shop.store, worker, ids[1], 20).await;
    let successes = claimed.items[..15].iter().map(success).collect();
    shop.store.settle(&Settle { successes, ..flush(lease, 0) }).await.expect("settles");
    let settle = Settle { successes: claimed.items[15..19].iter().map(success).collect(), ..flush(lease, 1) };
    shop.store.settle(&settle).await.expect("settles");
    shop.run("update postbox_success set at = 0 where deliveries = 15").await;
    let preview = shop.store.retention_preview(Duration::MAX).await.expect("looks");
    assert_eq!((preview.deliveries[0].deliveries, preview.messages), (15, 15));
    let gone = shop.store.retain(&retention).await.expect("retains");
    assert_eq!((gone.deliveries, gone.messages), (15, 15));
    assert_eq!(shop.count("select count(*) from postbox_message").await, 5, "one is leased, four are kept");
    assert_eq!(shop.store.list(&Filter::default(), 100).await.expect("lists").len(), 5);
}
