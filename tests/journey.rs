//! The whole story, on both stores: a shop publishes in its own transaction; a transactional, a plain
//! and an irreversible handler take it from there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use postbox::admin::Resolution;
use postbox::lifecycle::{Answer, State as Standing};
use postbox::{
    Attempt, Envelope, Failure, Message, Operation, OperationFailure, Payload, Postgres, Receipt, Router, Sqlite,
    State, Tx, handler, operation,
};
use postbox_testkit::{Fresh, Testable};
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize, Message)]
#[message(topic = "orders.placed", key = order_id)]
struct OrderPlaced {
    order_id: i64,
    cents: i64,
}

#[derive(Debug, Serialize, Deserialize, Message)]
#[message(topic = "orders.paid", key = order_id)]
struct OrderPaid {
    order_id: i64,
}

/// The payment provider: it charges, and for one order its answer gets lost on the way.
#[derive(Clone, Default)]
struct Psp {
    charges: Arc<AtomicU32>,
}

impl Psp {
    async fn charge(&self, order: &OrderPlaced, _key: &str) -> Result<String, std::io::Error> {
        self.charges.fetch_add(1, Ordering::SeqCst);
        match order.order_id {
            13 => Err(std::io::Error::other("connection reset after the request was sent")),
            id => Ok(format!("ch_{id}")),
        }
    }
}

async fn charge(
    op: Operation,
    Payload(order): Payload<OrderPlaced>,
    State(psp): State<Psp>,
) -> Result<Receipt, OperationFailure> {
    let id = psp.charge(&order, op.idempotency_key()).await?; // `?` after the call: in doubt, never guessed
    Ok(Receipt::of(id).then(&OrderPaid { order_id: order.order_id }))
}

async fn notify_crm(attempt: Attempt, Payload(_): Payload<OrderPlaced>) -> Result<(), Failure> {
    if attempt.number == 1 {
        return Err(Failure::retry_after("the CRM is restarting", Duration::ZERO));
    }
    Ok(())
}

macro_rules! journey {
    ($name:ident, $db:ty, $insert:literal) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            async fn reserve_stock(
                Payload(order): Payload<OrderPlaced>,
                State(table): State<String>,
                mut tx: Tx<$db>,
            ) -> Result<(), Failure> {
                let sql = format!($insert, table);
                sqlx::query(sqlx::AssertSqlSafe(sql)).bind(order.order_id).execute(&mut tx).await?;
                Ok(())
            }

            let shop: Fresh<$db> = <$db>::fresh().await;
            let (orders, stock) = (shop.table("orders"), shop.table("stock"));
            for table in [&orders, &stock] {
                let sql = format!("create table {table} (id bigint primary key)");
                sqlx::query(sqlx::AssertSqlSafe(sql)).execute(&shop.pool).await.expect("a table of the shop's own");
            }

            // 1. Publish: in the shop's own transaction. What is rolled back was never there.
            for (order_id, commits) in [(12, true), (13, true), (14, false)] {
                let mut tx = shop.pool.begin().await.expect("begin");
                let sql = format!($insert, orders);
                sqlx::query(sqlx::AssertSqlSafe(sql)).bind(order_id).execute(&mut *tx).await.expect("the order");
                let published =
                    shop.postbox.publish(&mut tx, &OrderPlaced { order_id, cents: 999 }).await.expect("publish");
                assert_eq!(
                    (published.topic.as_str(), published.key.as_deref()),
                    ("orders.placed", Some(&*order_id.to_string()))
                );
                match commits {
                    true => tx.commit().await.expect("commit"),
                    false => tx.rollback().await.expect("rollback"),
                }
            }

            // 2. Route, claim, attempt, settle. The worker starts after the fact; nothing is missed.
            let psp = Psp::default();
            let charging = Router::new().on("placed", operation(charge).max_attempts(1)).with_state(psp.clone());
            let stocking = Router::new().on("placed", reserve_stock).with_state(stock.clone());
            let app = Router::new()
                .nest("orders", Router::new().on("placed", handler(notify_crm)).merge(stocking).merge(charging))
                .on("orders.paid", handler(|_: Envelope| async {}).named("ship"));
            let worker =
                shop.postbox.worker(app).poll_interval(Duration::from_millis(20)).start().await.expect("start");
            let admin = shop.postbox.admin();
            let ended = |state: &'static str, count: usize| {
                let admin = admin.clone();
                async move {
                    loop {
                        let found =
                            admin.list(&format!("state:{state}").parse().expect("a filter"), 100).await.expect("list");
                        if found.len() >= count {
                            break found;
                        }
                        tokio::task::yield_now().await;
                    }
                }
            };
            // Two orders: stock, CRM and one charge each way; the paid one ships.
            let doubts = ended("in_doubt", 1).await;
            let done = ended("succeeded", 6).await;
            assert_eq!(done.len(), 6, "{done:#?}");
            assert!(done.iter().filter(|d| d.subscription == "notify_crm").all(|d| d.attempt == 2));
            assert_eq!(doubts[0].key.as_deref(), Some("13"));
            assert_eq!(psp.charges.load(Ordering::SeqCst), 2, "one call each: a doubt is never tried again by itself");
            let stocked: Vec<i64> =
                sqlx::query_scalar(sqlx::AssertSqlSafe(format!("select id from {stock} order by id")))
                    .fetch_all(&shop.pool)
                    .await
                    .expect("the stock");
            assert_eq!(stocked, [12, 13]);

            // 3. A person looks at the provider and says how it ended; it is on record.
            let word = Resolution {
                rev: Some(doubts[0].rev),
                answer: Answer::Happened,
                evidence: Some("ch_13".into()),
                actor: "ana".into(),
                reason: "seen in the provider's console".into(),
            };
            admin.resolve(doubts[0].id, &word).await.expect("resolve");
            let told = admin.show(doubts[0].id).await.expect("show");
            assert_eq!(told.row.state, Standing::Succeeded);
            assert_eq!(told.attempts.iter().map(|a| a.outcome.as_deref()).collect::<Vec<_>>(), [Some("in_doubt")]);
            assert_eq!(admin.audit(10).await.expect("audit")[0].actor, "ana");
            worker.stop(None).await.expect("stop");
        }
    };
}

journey!(on_postgres, Postgres, "insert into {} values ($1)");
journey!(on_sqlite, Sqlite, "insert into {} values (?1)");
