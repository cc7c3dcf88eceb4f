//! `together((a, b))`: several handlers, one delivery, one transaction.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use postbox::admin::{DeliveryDetail, Filter};
use postbox::lifecycle::State as Standing;
use postbox::{
    Done, Draft, Envelope, Failure, Payload, Postbox, Postgres, Router, Sqlite, State, Tx, handler, together,
};
use postbox_testkit::{Fresh, Testable};
use serde_json::json;

fn draft(topic: &str, what: &str) -> Draft {
    Envelope::json(topic, &json!(what)).expect("valid")
}

/// What the handlers of these tests share: the table they write, and which of them were called.
#[derive(Clone)]
struct Shop {
    table: String,
    called: Arc<Mutex<Vec<&'static str>>>,
}

impl Shop {
    fn saw(&self, who: &'static str) {
        self.called.lock().expect("the calls").push(who);
    }
}

/// Waits until so many deliveries have ended.
async fn ended<Db: Testable>(postbox: &Postbox<Db>, count: usize) -> Vec<DeliveryDetail> {
    let all = async {
        loop {
            let rows = postbox.admin().list(&Filter::default(), 100).await.expect("list");
            let over = |s: Standing| matches!(s, Standing::Succeeded | Standing::Dead);
            if rows.iter().filter(|r| over(r.state)).count() == count && rows.len() == count {
                return rows;
            }
            tokio::task::yield_now().await;
        }
    };
    let rows = tokio::time::timeout(Duration::from_secs(60), all).await.expect("all have ended");
    let mut details = Vec::new();
    for row in rows {
        details.push(postbox.admin().show(row.id).await.expect("there"));
    }
    details
}

/// Handlers with a `Tx` name their database, so these are written for each.
macro_rules! both {
    ($name:ident, $db:ty, $insert:literal) => {
        mod $name {
            use super::*;

            async fn write(tx: &mut Tx<$db>, shop: &Shop, who: &'static str) -> Result<(), sqlx::Error> {
                shop.saw(who);
                let sql = format!($insert, shop.table);
                sqlx::query(sqlx::AssertSqlSafe(sql)).bind(who).execute(tx).await?;
                Ok(())
            }

            async fn reserve(State(shop): State<Shop>, mut tx: Tx<$db>) -> Result<Done, Failure> {
                write(&mut tx, &shop, "reserve").await?;
                Ok(Done::new().then(draft("followed", "reserve")))
            }

            async fn note(Payload(what): Payload<String>, State(shop): State<Shop>) -> Result<Done, Failure> {
                shop.saw("note");
                match what.as_str() {
                    "refuse" => Err(Failure::permanent("noted and refused")),
                    _ => Ok(Done::new().then(draft("followed", "note"))),
                }
            }

            async fn book(envelope: Envelope, State(shop): State<Shop>, mut tx: Tx<$db>) -> Result<(), Failure> {
                let sql = format!("select count(*) from {}", shop.table);
                let seen: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&mut tx).await?;
                assert_eq!(seen, 1, "it sees what the one before it wrote");
                write(&mut tx, &shop, "book").await?;
                match envelope.decode::<String>()?.as_str() {
                    "fail" => Err(Failure::permanent("the last one fails")),
                    "panic" => panic!("a planned panic"),
                    _ => Ok(()),
                }
            }

            async fn number(Payload(_): Payload<u64>, State(shop): State<Shop>, _: Tx<$db>) {
                shop.saw("number");
            }

            async fn keep(State(shop): State<Shop>, tx: Tx<$db>) {
                shop.saw("keep");
                std::mem::forget(tx);
            }

            async fn fresh_shop() -> (Fresh<$db>, Shop) {
                let fresh: Fresh<$db> = <$db>::fresh().await;
                let table = fresh.table("effects");
                let sql = format!("create table {table} (who text primary key)");
                sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&fresh.pool).await.expect("a table");
                (fresh, Shop { table, called: Arc::default() })
            }

            async fn effects(fresh: &Fresh<$db>, shop: &Shop) -> Vec<String> {
                let sql = format!("select who from {} order by who", shop.table);
                sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_all(&fresh.pool).await.expect("the effects")
            }

            fn calls(shop: &Shop) -> Vec<&'static str> {
                std::mem::take(&mut *shop.called.lock().expect("the calls"))
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn all_commit_or_none() {
                let (fresh, shop) = fresh_shop().await;
                let router = Router::new()
                    .on("t", together((reserve, note, book)).max_attempts(1))
                    .on("followed", handler(|_: Envelope| async {}).named("followed"))
                    .with_state(shop.clone());
                let names: Vec<&str> = router.subscriptions().map(|(name, _)| name).collect();
                assert_eq!(names, ["reserve+note+book", "followed"]);
                let worker = fresh.postbox.worker(router).start().await.expect("start");
                // Whatever goes wrong, nothing is left, and the verdict is that of the one it went wrong in.
                let mut over = 0;
                for (what, outcome, error, called) in [
                    ("refuse", "failed", "noted and refused", &["reserve", "note"][..]),
                    ("fail", "failed", "the last one fails", &["reserve", "note", "book"]),
                    ("panic", "panicked", "a planned panic", &["reserve", "note", "book"]),
                ] {
                    fresh.postbox.publish_now([draft("t", what)]).await.expect("publish");
                    over += 1;
                    let detail = ended(&fresh.postbox, over).await.remove(0);
                    assert_eq!(
                        (detail.row.state, detail.row.kind.as_str()),
                        (Standing::Dead, "transactional"),
                        "{what}"
                    );
                    assert_eq!(detail.attempts[0].outcome.as_deref(), Some(outcome), "{what}");
                    assert!(detail.attempts[0].error.as_deref().is_some_and(|e| e.contains(error)), "{detail:?}");
                    assert_eq!(calls(&shop), called, "in order, and no further");
                    assert_eq!(effects(&fresh, &shop).await, [""; 0], "{what}");
                }
                fresh.postbox.publish_now([draft("t", "fine")]).await.expect("publish");
                // One delivery, and what two of the three wanted published.
                let details = ended(&fresh.postbox, over + 3).await;
                assert_eq!(details.iter().filter(|d| d.row.state == Standing::Succeeded).count(), 3);
                assert_eq!(effects(&fresh, &shop).await, ["book", "reserve"]);
                let mut followed: Vec<String> = details
                    .iter()
                    .filter(|d| d.row.topic == "followed")
                    .filter_map(|d| d.envelope.as_ref()?.decode::<String>().ok())
                    .collect();
                followed.sort();
                assert_eq!(followed, ["note", "reserve"]);
                worker.stop(None).await.expect("stop");
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn what_one_cannot_read_rolls_the_others_back() {
                let (fresh, shop) = fresh_shop().await;
                let router = Router::new().on("t", together((reserve, number)).named("both")).with_state(shop.clone());
                assert_eq!(router.subscriptions().next().map(|(name, _)| name.to_owned()), Some("both".into()));
                fresh.postbox.publish_now([draft("t", "no number")]).await.expect("publish");
                let worker = fresh.postbox.worker(router).start().await.expect("start");
                let detail = ended(&fresh.postbox, 1).await.remove(0);
                assert_eq!((detail.row.state, detail.row.attempt), (Standing::Dead, 1), "trying again would not help");
                assert_eq!(effects(&fresh, &shop).await, [""; 0]);
                assert_eq!(calls(&shop), ["reserve"]);
                worker.stop(None).await.expect("stop");
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn one_that_keeps_the_transaction_is_found_out() {
                let (fresh, shop) = fresh_shop().await;
                let router =
                    Router::new().on("t", together((reserve, keep, book)).named("kept")).with_state(shop.clone());
                let worker = fresh.postbox.worker(router).start().await.expect("start");
                fresh.postbox.publish_now([draft("t", "x")]).await.expect("publish");
                // SQLite's one writer is gone with the transaction that was leaked.
                if <$db as Testable>::NAME == "postgres" {
                    let detail = ended(&fresh.postbox, 1).await.remove(0);
                    assert_eq!(detail.row.state, Standing::Dead);
                    let error = detail.row.last_error.expect("an error");
                    assert!(error.contains("moved its Tx"), "{error}");
                    assert_eq!(effects(&fresh, &shop).await, [""; 0]);
                    assert_eq!(calls(&shop), ["reserve", "keep"], "the last one had no transaction to work in");
                }
                worker.stop_now().await.ok();
            }
        }
    };
}
both!(postgres, Postgres, "insert into {} values ($1)");
both!(sqlite, Sqlite, "insert into {} values (?1)");
