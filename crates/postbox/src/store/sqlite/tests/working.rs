use super::*;
use crate::error::Error;
use crate::store::{Beat, Guarded, HandlerTx, Pulse};

fn beat(worker: Uuid) -> Beat {
    Beat { worker, lease: Duration::from_secs(30) }
}

#[tokio::test]
async fn a_batch_is_claimed_and_settled_once() {
    let shop = Shop::new().await;
    let (claimed, lease) = shop.claimed(declared("all", ">"), 4).await;
    let items = &claimed.items;
    assert_eq!(items.iter().map(|i| (i.rev, i.attempts)).collect::<Vec<_>>(), [(1, 0); 4]);
    assert_eq!(shop.store.beat(beat(lease.worker)).await.expect("beats"), Some(Pulse { tokens: vec![lease.token] }));
    let settle = Settle {
        successes: vec![success(&items[0])],
        moves: vec![
            Move { delay: Duration::from_secs(60), ..moved(&items[1], State::Pending, 1, "failed") },
            moved(&items[2], State::Dead, 1, "failed"),
        ],
        released: vec![items[3].clone()],
        follow_ups: vec![draft("mail.sent", 1).dedup("k")],
        close: true,
        ..flush(lease, 0)
    };
    assert_eq!(shop.store.settle(&settle).await.expect("settles"), Guarded::Done);
    assert_eq!(shop.store.settle(&settle).await.expect("again"), Guarded::Done, "its answer was lost");
    let late = Settle { part: 1, ..settle };
    assert_eq!(shop.store.settle(&late).await.expect("late"), Guarded::Fenced);
    assert_eq!(shop.count("select count(*) from postbox_part").await, 1);
    assert_eq!(shop.count("select count(*) from postbox_message where topic = 'mail.sent'").await, 1);
    assert_eq!(shop.store.beat(beat(lease.worker)).await.expect("beats"), Some(Pulse { tokens: vec![] }));

    let list = shop.store.list(&"topic:orders.placed".parse().expect("a filter"), 10).await.expect("lists");
    let rows: Vec<_> = list.iter().rev().map(|d| (d.state, d.attempt, d.rev, d.last_error.is_some())).collect();
    assert_eq!(
        rows,
        [
            (State::Succeeded, 1, 2, false),
            (State::Pending, 1, 2, true),
            (State::Dead, 1, 2, true),
            (State::Pending, 0, 2, false)
        ]
    );
    assert!(list[2].next_due_at.is_some() && list[1].note.is_some());
    let detail = shop.store.show(items[0].delivery).await.expect("shows").expect("is there");
    assert_eq!(detail.attempts.len(), 1);
    assert_eq!(detail.attempts[0].outcome.as_deref(), Some("succeeded"));
}

#[tokio::test]
async fn claims_go_by_room_and_only_for_the_living() {
    let shop = Shop::new().await;
    let (worker, ids) = shop.register(vec![declared("one", "a"), declared("two", "a")]).await;
    shop.publish(&(0..5).map(|n| draft("a", n)).collect::<Vec<_>>()).await;
    let token = Uuid::now_v7();
    let request = ClaimRequest {
        worker,
        token,
        wanted: vec![(ids[0], 2), (ids[1], 1)],
        metered: Vec::new(),
        by_key: Vec::new(),
        full: Vec::new(),
        sorts: true,
    };
    let claimed = shop.store.claim(&request).await.expect("claims");
    let subscriptions: Vec<_> = claimed.items.iter().map(|i| i.subscription).collect();
    assert_eq!(subscriptions, [ids[0], ids[1], ids[0]], "in the order of publishing");
    let (nothing, _) = claim(&shop.store, Uuid::now_v7(), ids[0], 5).await;
    assert!(nothing.items.is_empty(), "no such worker");

    // Handed back, they come after what waited.
    shop.store.disown(worker, token).await.expect("hands back");
    assert_eq!(shop.count("select count(*) from postbox_lease").await, 0);
    let (claimed, _) = claim(&shop.store, worker, ids[0], 10).await;
    let order: Vec<i64> =
        claimed.items.iter().map(|i| i.envelope.as_ref().expect("there").decode().expect("a number")).collect();
    assert_eq!(order, [2, 3, 4, 0, 1]);
}

#[tokio::test]
async fn nothing_is_settled_by_halves() {
    let shop = Shop::new().await;
    let (claimed, lease) = shop.claimed(declared("all", ">"), 2).await;
    let settle = Settle {
        successes: vec![success(&claimed.items[0])],
        moves: vec![moved(&claimed.items[0], State::Dead, 1, "failed")],
        ..flush(lease, 0)
    };
    assert!(shop.store.settle(&settle).await.is_err(), "one delivery cannot end twice");
    assert_eq!(shop.state(claimed.items[0].delivery).await, State::Running);
    let early = Settle { successes: vec![success(&claimed.items[0])], close: true, ..flush(lease, 0) };
    assert!(matches!(shop.store.settle(&early).await, Err(Error::Refused(_))), "the other one would be nobody's");
    let settle = Settle { successes: claimed.items.iter().map(success).collect(), close: true, ..flush(lease, 0) };
    assert_eq!(shop.store.settle(&settle).await.expect("settles"), Guarded::Done);
}

#[tokio::test]
async fn a_dropped_transaction_lets_the_writer_go_and_leaves_nothing() {
    let shop = Shop::new().await;
    shop.run("create table effect (n integer)").await;
    let (claimed, lease) = shop.claimed(declared("all", ">"), 1).await;
    for _ in 0..3 {
        let mut tx = shop.store.open(lease, Duration::from_secs(1)).await.expect("opens");
        sqlx::query("insert into effect values (1)").execute(tx.connection()).await.expect("writes");
        drop(tx);
        // A second process can write at once, and so can this one.
        tokio::time::timeout(Duration::from_secs(1), shop.publish(&[draft("a", 1)])).await.expect("is free");
    }
    // A verb dropped at any await leaves no open transaction behind.
    for polls in 0..40 {
        let settle = Settle { starts: vec![(claimed.items[0].delivery, 1)], ..flush(lease, 7) };
        let mut verb = Box::pin(shop.store.settle(&settle));
        for _ in 0..polls {
            if tokio::time::timeout(Duration::from_micros(200), verb.as_mut()).await.is_ok() {
                break;
            }
        }
        drop(verb);
    }
    tokio::time::timeout(Duration::from_secs(1), shop.publish(&[draft("a", 1)])).await.expect("is free");
    assert_eq!(shop.count("select count(*) from effect").await, 0);
    assert_eq!(
        shop.count("select count(*) from postbox_attempt").await,
        shop.count("select count(*) from postbox_part").await
    );
}

#[tokio::test]
async fn effect_and_outcome_commit_together() {
    let shop = Shop::new().await;
    shop.run("create table effect (n integer)").await;
    let (claimed, lease) = shop.claimed(declared("all", "orders.>"), 2).await;
    let outcome = moved(&claimed.items[0], State::Succeeded, 1, "succeeded");
    assert_eq!(shop.store.recheck(lease, outcome.delivery, 1).await.expect("looks"), Some(false));
    let mut tx = shop.store.open(lease, Duration::from_secs(1)).await.expect("opens");
    sqlx::query("insert into effect values (1)").execute(tx.connection()).await.expect("writes");
    SqliteStore::publish(tx.connection(), &shop.store, &[draft("mail", 1)]).await.expect("publishes");
    let settled = shop.store.settle_open(tx, lease, &outcome, &[draft("mail", 2)]).await.expect("settles");
    assert_eq!(settled, Guarded::Done);
    assert_eq!(shop.count("select count(*) from effect").await, 1);
    assert_eq!(shop.count("select count(*) from postbox_message where topic = 'mail'").await, 2);
    assert_eq!(shop.state(outcome.delivery).await, State::Succeeded);
    assert_eq!(shop.store.recheck(lease, outcome.delivery, 1).await.expect("looks"), Some(true));

    // Another one's lease: the effect goes with it.
    let stolen = LeaseRef { token: Uuid::now_v7(), ..lease };
    let mut tx = shop.store.open(stolen, Duration::from_secs(1)).await.expect("opens");
    sqlx::query("insert into effect values (2)").execute(tx.connection()).await.expect("writes");
    let outcome = moved(&claimed.items[1], State::Succeeded, 1, "succeeded");
    assert_eq!(
        shop.store.settle_open(tx, stolen, &outcome, &[draft("mail", 3)]).await.expect("looks"),
        Guarded::Fenced
    );
    assert_eq!(shop.count("select count(*) from postbox_message where topic = 'mail'").await, 2);
    assert_eq!(shop.count("select count(*) from effect").await, 1);
    assert_eq!(shop.store.recheck(stolen, outcome.delivery, 1).await.expect("looks"), None);
}

#[tokio::test]
async fn a_handler_that_ends_its_transaction_is_noticed() {
    let shop = Shop::new().await;
    shop.run("create table effect (n integer)").await;
    let (claimed, lease) = shop.claimed(declared("all", "orders.>"), 1).await;
    let outcome = moved(&claimed.items[0], State::Succeeded, 1, "succeeded");
    for ending in ["commit", "rollback", "commit; begin immediate", "rollback; begin"] {
        let mut tx = shop.store.open(lease, Duration::from_secs(1)).await.expect("opens");
        sqlx::query("insert into effect values (7)").execute(tx.connection()).await.expect("writes");
        sqlx::raw_sql(ending).execute(tx.connection()).await.expect(ending);
        let error = shop.store.settle_open(tx, lease, &outcome, &[draft("mail", 1)]).await.expect_err(ending);
        assert!(
            matches!(&error, Error::Refused(words) if words.contains("ended its own transaction")),
            "{ending}: {error}"
        );
        assert_eq!(shop.count("select count(*) from postbox_outcome").await, 0);
        assert_eq!(shop.count("select count(*) from postbox_message where topic = 'mail'").await, 0, "{ending}");
        assert_eq!(shop.state(outcome.delivery).await, State::Running);
    }
    assert_eq!(shop.count("select count(*) from effect").await, 2, "what it committed itself stays");
    shop.run("delete from effect").await;
    // A savepoint of its own that it left open is no harm.
    let mut tx = shop.store.open(lease, Duration::from_secs(1)).await.expect("opens");
    sqlx::raw_sql("savepoint mine; insert into effect values (1)").execute(tx.connection()).await.expect("writes");
    assert_eq!(shop.store.settle_open(tx, lease, &outcome, &[]).await.expect("settles"), Guarded::Done);
    assert_eq!(shop.count("select count(*) from effect").await, 1);
}

#[tokio::test]
async fn the_living_are_left_alone_and_the_dead_taken_over() {
    let shop = Shop::new().await;
    let other = shop.other().await;
    let (worker, ids) = register(
        &other,
        vec![
            declared("plain", "p"),
            Declared { name: "charge".into(), pattern: "c".parse().expect("c"), ..operation() },
        ],
    )
    .await;
    shop.publish(&[draft("p", 1), draft("p", 2), draft("c", 3), draft("c", 4)]).await;
    let token = Uuid::now_v7();
    let claimed = other
        .claim(&ClaimRequest {
            worker,
            token,
            wanted: vec![(ids[0], 2), (ids[1], 2)],
            metered: Vec::new(),
            by_key: Vec::new(),
            full: Vec::new(),
            sorts: true,
        })
        .await
        .expect("claims");
    let lease = LeaseRef { worker, batch: claimed.batch, token };
    let [p1, p2, c1, c2] = [0, 1, 2, 3].map(|i| claimed.items[i].delivery);
    other.settle(&Settle { starts: vec![(p1, 1), (c1, 1)], ..flush(lease, 0) }).await.expect("begins");
    assert_eq!(shop.state(c1).await, State::Running);
    assert_eq!(shop.state(c2).await, State::Pending, "it waits in its worker's hands");
    assert_eq!(shop.state(p2).await, State::Running);

    assert_eq!(shop.store.take_over(0.5).await.expect("looks"), None, "it lives");
    assert!(shop.store.status().await.expect("status").workers[0].alive);
    let locks = || {
        std::fs::read_dir(shop.folder.path())
            .expect("lists")
            .filter(|f| f.as_ref().is_ok_and(|f| f.file_name().to_string_lossy().ends_with(".lock")))
            .count()
    };
    assert_eq!(locks(), 1);
    drop(other);

    assert_eq!(shop.store.stranded().await.expect("looks").len(), 2);
    let taken = shop.store.take_over(0.5).await.expect("looks").expect("it is dead");
    assert_eq!((taken.worker, taken.pending, taken.in_doubt, taken.dead), (worker, 3, 1, 0));
    assert_eq!(shop.store.take_over(0.5).await.expect("looks"), None);
    assert_eq!(
        (shop.state(p1).await, shop.state(c1).await, shop.state(c2).await),
        (State::Pending, State::InDoubt, State::Pending)
    );
    assert_eq!((locks(), shop.count("select count(*) from postbox_lease").await), (0, 0));
    let show = async |delivery| shop.store.show(delivery).await.expect("shows").expect("is there");
    let (p1, p2, c1, c2) = (show(p1).await, show(p2).await, show(c1).await, show(c2).await);
    assert_eq!((p1.row.attempt, p1.attempts[0].outcome.as_deref()), (1, Some("lost")));
    assert_eq!((p2.row.attempt, p2.attempts.len(), p2.records[0].what.as_str()), (0, 0, "lost"));
    assert_eq!((c1.row.attempt, c1.attempts[0].outcome.as_deref()), (1, Some("in_doubt")));
    assert_eq!((c2.row.attempt, c2.attempts.len(), c2.records.len()), (0, 0, 0));
    assert_eq!(
        shop.count(
            "select lost from postbox_delivery where message = (select id from postbox_message where payload = '2')"
        )
        .await,
        1
    );
}

#[tokio::test]
async fn the_honest_batch() {
    let shop = Shop::new().await;
    let other = shop.other().await;
    let (worker, ids) = register(&other, vec![operation()]).await;
    shop.publish(&(0..100).map(|n| draft("orders.placed", n)).collect::<Vec<_>>()).await;
    let (claimed, lease) = claim(&other, worker, ids[0], 100).await;
    other.settle(&Settle { starts: vec![(claimed.items[0].delivery, 1)], ..flush(lease, 0) }).await.expect("begins");
    drop(other);
    let taken = shop.store.take_over(0.5).await.expect("looks").expect("it is dead");
    assert_eq!((taken.in_doubt, taken.pending), (1, 99));
    let late = Settle { successes: vec![], close: true, ..flush(lease, 1) };
    assert_eq!(shop.store.settle(&late).await.expect("late"), Guarded::Fenced);
    assert_eq!(shop.store.beat(beat(worker)).await.expect("beats"), None);
    let listed =
        async |filter: &str| shop.store.list(&filter.parse().expect("a filter"), 1000).await.expect("lists").len();
    assert_eq!((listed("state:in_doubt").await, listed("state:pending").await, listed("").await), (1, 99, 100));
}

#[tokio::test]
async fn a_worker_that_retires_leaves_nothing_behind() {
    let shop = Shop::new().await;
    let (claimed, lease) = shop.claimed(declared("all", ">"), 1).await;
    shop.store.retire(lease.worker).await.expect("ends");
    let other = shop.other().await;
    let taken = other.take_over(0.5).await.expect("looks").expect("it held something");
    assert_eq!((taken.worker, taken.pending), (lease.worker, 1));
    let (worker, ids) = shop.register(vec![declared("all", ">")]).await;
    let (again, lease) = claim(&shop.store, worker, ids[0], 1).await;
    assert_eq!((again.items[0].delivery, again.items[0].lost), (claimed.items[0].delivery, 1));
    shop.store
        .settle(&Settle { successes: vec![success(&again.items[0])], close: true, ..flush(lease, 0) })
        .await
        .expect("settles");
    shop.store.retire(worker).await.expect("ends");
    assert_eq!(shop.count("select count(*) from postbox_worker").await, 0);
    assert_eq!(other.take_over(0.5).await.expect("looks"), None);
    let left: Vec<_> =
        std::fs::read_dir(shop.folder.path()).expect("lists").filter_map(Result::ok).map(|f| f.file_name()).collect();
    assert!(!left.iter().any(|f| f.to_string_lossy().ends_with(".lock")), "{left:?}");
}

#[tokio::test]
async fn whoever_sleeps_is_woken_by_others_and_by_this_process() {
    let shop = Shop::new().await;
    let other = shop.other().await;
    // What was rung before counts for one.
    for _ in 0..2 {
        let _ = tokio::time::timeout(Duration::from_millis(100), other.woken()).await;
    }
    assert!(tokio::time::timeout(Duration::from_millis(100), other.woken()).await.is_err(), "nothing happened");
    let (woken, _) = tokio::join!(tokio::time::timeout(Duration::from_millis(500), other.woken()), async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        shop.publish(&[draft("a", 1)]).await
    });
    woken.expect("another connection committed");
    let tx = other.begin().await.expect("begins");
    other.commit(tx).await.expect("commits");
    tokio::time::timeout(Duration::from_millis(500), other.woken()).await.expect("at once");
    let url = format!("sqlite:{}", shop.folder.path().join("shop.db").display());
    let deaf = SqliteStore::connect(&Settings::defaults().url(url).set("wake_ups", false)).await.expect("connects");
    shop.publish(&[draft("a", 1)]).await;
    assert!(tokio::time::timeout(Duration::from_millis(60), deaf.woken()).await.is_err());
}

#[tokio::test]
async fn a_held_writer_is_busy_for_others_and_stops_no_heartbeat() {
    let shop = Shop::new().await;
    let (_, lease) = shop.claimed(declared("all", ">"), 1).await;
    let tx = shop.store.open(lease, Duration::from_secs(1)).await.expect("opens");
    let alone = shop.store.alone().await.expect("is alone");
    assert!(alone.beat(beat(lease.worker)).await.expect("beats").is_some());
    alone.close().await;
    assert!(shop.store.beat(beat(lease.worker)).await.expect("beats").is_some(), "the others' connections stay open");
    let url = format!("sqlite:{}", shop.folder.path().join("shop.db").display());
    let hasty =
        SqliteStore::connect(&Settings::defaults().url(url).set("busy_timeout", "10ms")).await.expect("connects");
    assert!(matches!(hasty.begin().await, Err(Error::Busy(_))));
    let held = shop.other().await;
    drop(tx);
    held.commit(held.begin().await.expect("is free again")).await.expect("commits");
}
