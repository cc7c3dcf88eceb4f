use super::*;

async fn drain(shop: &Shop) {
    while shop.store.backfill().await.expect("backfills") {}
}

/// The numbers that a subscription got, in the order of its deliveries.
async fn got(shop: &Shop, name: &'static str) -> Vec<i64> {
    sqlx::query_scalar(
        "select cast(m.payload as integer) from postbox_delivery d join postbox_message m on m.id = d.message
         join postbox_subscription s on s.id = d.subscription where s.name = ?1 order by d.id",
    )
    .bind(name)
    .fetch_all(&shop.store.reader)
    .await
    .expect("reads")
}

fn starting(name: &str, pattern: &str, start: Start) -> Declared {
    Declared { start, ..declared(name, pattern) }
}

#[tokio::test]
async fn what_nobody_was_subscribed_to_goes_to_all_that_come_first() {
    let shop = Shop::new().await;
    let many: Vec<Draft> = (0..700).map(|n| draft(if n < 600 { "a.x" } else { "b.x" }, n)).collect();
    shop.publish(&many).await;
    shop.register(vec![
        declared("one", "a.*"),
        declared("two", "a.>"),
        starting("now", "a.*", Start::Now),
        starting("all", "a.*", Start::Beginning),
    ])
    .await;
    shop.publish(&[draft("a.x", 1000)]).await;
    // Registered later, and too late for what the first ones take.
    shop.register(vec![declared("three", "a.*"), starting("late", "*.x", Start::Beginning), declared("four", "b.*")])
        .await;
    drain(&shop).await;
    let old: Vec<i64> = (0..600).collect();
    let with = |last: &[i64]| [&old[..], last].concat();
    let sorted = async |name| {
        let mut numbers = got(&shop, name).await;
        numbers.sort();
        numbers
    };
    assert_eq!(sorted("one").await, with(&[1000]));
    assert_eq!(sorted("two").await, with(&[1000]));
    assert_eq!(sorted("all").await, with(&[1000]));
    assert_eq!(got(&shop, "now").await, [1000]);
    assert_eq!(got(&shop, "three").await, [0i64; 0]);
    assert_eq!(got(&shop, "four").await, (600..700).collect::<Vec<i64>>());
    assert_eq!(sorted("late").await, [(0..700).collect::<Vec<i64>>(), vec![1000]].concat());
    assert_eq!(shop.count("select count(*) from postbox_unrouted").await, 0);
    // Nothing runs again by surprise.
    shop.register(vec![declared("one", "a.*"), starting("late", "*.x", Start::Beginning)]).await;
    drain(&shop).await;
    assert_eq!(got(&shop, "one").await.len(), 601);
    assert_eq!(got(&shop, "late").await.len(), 701);
}

#[tokio::test]
async fn from_a_time_on() {
    let shop = Shop::new().await;
    shop.publish(&[draft("a", 1)]).await;
    tokio::time::sleep(Duration::from_millis(5)).await;
    let time = jiff::Timestamp::now();
    tokio::time::sleep(Duration::from_millis(5)).await;
    shop.publish(&[draft("a", 2), draft("b", 3)]).await;
    shop.register(vec![starting("some", "a", Start::Time(time))]).await;
    drain(&shop).await;
    assert_eq!(got(&shop, "some").await, [2]);
    assert_eq!(shop.count("select count(*) from postbox_unrouted").await, 2, "1 is too old for it, 3 does not match");
}

#[tokio::test]
async fn a_due_time_holds_for_late_deliveries_too() {
    let shop = Shop::new().await;
    shop.publish(&[draft("a", 1).after(Duration::from_secs(60)), draft("a", 2)]).await;
    let (worker, ids) = shop.register(vec![declared("one", "a")]).await;
    drain(&shop).await;
    let (claimed, _) = claim(&shop.store, worker, ids[0], 10).await;
    assert_eq!(claimed.items.len(), 1);
    assert!(claimed.next_due.is_some());
}

#[tokio::test]
async fn renamed_changed_and_removed_subscriptions() {
    let shop = Shop::new().await;
    let (_, first) = shop.register(vec![declared("old", "a")]).await;
    shop.publish(&[draft("a", 1), draft("b", 2)]).await;
    let renamed = Declared { renamed_from: vec!["older".into(), "old".into()], ..declared("new", "a") };
    let (_, second) = shop.register(vec![renamed.clone()]).await;
    assert_eq!(first, second, "its deliveries come along");
    let epoch = shop.count("select epoch from postbox_routing").await;
    // Another pattern: what nobody took, and from then on.
    let (_, third) = shop.register(vec![Declared { pattern: "*".parse().expect("a pattern"), ..renamed }]).await;
    assert_eq!(first, third);
    assert_eq!(shop.count("select epoch from postbox_routing").await, epoch + 1);
    drain(&shop).await;
    assert_eq!(got(&shop, "new").await, [1, 2]);

    let entry = shop.store.remove_subscription("shop", "new", "ana", "done").await.expect("removes");
    assert_eq!((entry.seq, entry.action.as_str()), (1, "remove subscription"));
    assert!(shop.store.remove_subscription("shop", "new", "ana", "again").await.is_err());
    shop.publish(&[draft("a", 3)]).await;
    assert_eq!(got(&shop, "new").await, [1, 2]);
    let rows = shop.store.subscriptions().await.expect("lists");
    assert!(rows.iter().any(|s| s.name == "new" && s.removed_at.is_some() && s.pending == 2), "{rows:?}");
    let (_, anew) = shop.register(vec![declared("new", "a")]).await;
    assert_ne!(anew, first);
    drain(&shop).await;
    assert_eq!(got(&shop, "new").await, [1, 2, 3]);
}
