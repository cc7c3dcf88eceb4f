//! `postbox keys`: what waits for its key, and what an operator does about it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::place::Place;
use postbox::{Envelope, Failure, Postbox, Router, Settings, Sqlite, handler};

/// A worker in order whose handler refuses what has the key `account-7`, until that is mended.
struct Shop {
    runtime: tokio::runtime::Runtime,
    worker: postbox::Worker<Sqlite>,
    mended: Arc<AtomicBool>,
}

impl Shop {
    fn at(place: &Place) -> Shop {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let mended = Arc::new(AtomicBool::new(false));
        let url = format!("sqlite:{}", place.file("shop.db").display());
        let is_mended = mended.clone();
        let worker = runtime.block_on(async move {
            let settings = Settings::defaults().url(url).set("application", "shop");
            let postbox = Postbox::<Sqlite>::migrate(settings).await.expect("opens");
            let apply = move |envelope: Envelope| {
                let well = is_mended.load(Ordering::SeqCst) || envelope.key.as_deref() != Some("account-7");
                async move { if well { Ok(()) } else { Err(Failure::permanent("no such account")) } }
            };
            let routes = Router::new().on("account.>", handler(apply).named("apply").ordered());
            let worker = postbox.worker(routes).poll_interval(Duration::from_millis(10)).start().await.expect("starts");
            for key in ["account-7", "account-7", "account-8", "account-7"] {
                let draft = Envelope::json("account.opened", &1).expect("a message").key(key);
                postbox.publish_now([draft]).await.expect("published");
            }
            worker
        });
        Shop { runtime, worker, mended }
    }

    /// Waits until so many have come to this state.
    fn has(&self, state: &str, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let filter = format!("state:{state}").parse().expect("a filter");
        loop {
            let admin = self.worker.postbox().admin();
            let found = self.runtime.block_on(admin.list(&filter, 100)).expect("a list").len();
            if found == count {
                return;
            }
            assert!(Instant::now() < deadline, "{found} are {state}, not {count}");
        }
    }
}

#[test]
fn keys_that_wait_are_seen_and_turned() {
    let place = Place::new();
    let shop = Shop::at(&place);
    shop.has("dead", 1);
    shop.has("succeeded", 1);
    let deadline = Instant::now() + Duration::from_secs(30);
    let row = loop {
        let rows = place.run(&["keys", "--json"]).ends(0).json_lines();
        if rows.first().is_some_and(|row| row["waiting"] == 2) {
            break rows[0].clone();
        }
        assert!(Instant::now() < deadline, "{rows:?}");
    };
    assert_eq!((&row["key"], &row["state"]), (&"account-7".into(), &"blocked".into()));
    assert_eq!((&row["application"], &row["subscription"]), (&"shop".into(), &"apply".into()));
    let table = place.run(&["keys"]).ends(0);
    assert!(table.out.contains("account-7") && table.out.contains("no such account"), "{}", table.out);
    assert!(table.err.contains("keys unblock account-7 --subscription apply --application shop"), "{}", table.err);
    let unknown = place.run(&["keys", "list", "--subscription", "aply"]).ends(3);
    assert!(unknown.err.contains("there is no subscription aply"), "{}", unknown.err);
    let refused = place.run(&["keys", "unblock", "account-7", "--subscription", "apply"]).ends(5);
    assert!(refused.err.contains("--reason"), "{}", refused.err);
    place.run(&["keys", "unblock", "account-9", "--subscription", "apply", "--reason", "x"]).ends(4);
    place.run(&["keys", "unblock", "account-7", "--subscription", "nobody", "--reason", "x"]).ends(3);
    place.run(&["keys", "park", "", "--subscription", "apply", "--reason", "x"]).ends(2);

    // Skipped: the next one dies, and then it is mended.
    let head = row["head"].as_i64().expect("a head");
    let told = place.run(&["keys", "skip", "account-7", "--subscription", "apply", "--reason", "closed"]).ends(0);
    assert!(told.out.contains(&format!("goes on without delivery {head}; by ana, audit 1")), "{}", told.out);
    shop.has("dead", 2);
    shop.mended.store(true, Ordering::SeqCst);
    let turn = ["keys", "unblock", "account-7", "--subscription", "apply", "--reason", "mended", "--json"];
    let entry = place.run(&turn).ends(0).json();
    assert_eq!(entry["action"], "unblock key");
    assert!(entry["delivery"].as_i64().is_some_and(|second| second > head), "{entry}");
    shop.has("succeeded", 3);

    let told = place.run(&["keys", "park", "account-7", "--subscription", "apply", "--reason", "looked at"]).ends(0);
    assert!(told.out.contains("until it is unblocked") && told.err.contains("keys unblock account-7"), "{}", told.err);
    place.run(&["publish", "account.closed", "1", "--key", "account-7"]).ends(0);
    let parked = &place.run(&["keys", "list", "--json"]).ends(0).json_lines()[0];
    assert_eq!((&parked["state"], &parked["head"]), (&"parked".into(), &serde_json::Value::Null));
    let told =
        place.run(&["keys", "unblock", "account-7", "--subscription", "apply", "--reason", "it is well"]).ends(0);
    assert!(told.out.contains("the key goes on"), "{}", told.out);
    shop.has("succeeded", 4);
    assert!(place.run(&["keys"]).ends(0).err.contains("no key waits"));
    let Shop { runtime, worker, .. } = shop;
    runtime.block_on(worker.stop(None)).expect("stops");
}
