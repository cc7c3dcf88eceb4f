//! Publishing on tokio-postgres: the caller's transaction, the same answers as on sqlx.

use postbox::sql::Statements;
use postbox::{Bytes, Envelope, Message, Postgres, PublishError, Router};
use postbox_testkit::{Fresh, Testable};
use tokio_postgres::{Client, NoTls};

#[derive(serde::Serialize, serde::Deserialize, Message)]
#[message(topic = "orders.placed", key = order_id)]
struct OrderPlaced {
    order_id: i64,
}

async fn client(fresh: &Fresh<Postgres>) -> Client {
    let (client, connection) = tokio_postgres::connect(&fresh.url(), NoTls).await.expect("a connection");
    tokio::spawn(connection);
    client
}

async fn messages(fresh: &Fresh<Postgres>) -> i64 {
    Postgres::count(fresh, &format!("select count(*) from {}.message", fresh.schema())).await
}

#[tokio::test]
async fn it_commits_with_the_callers_transaction_and_leaves_nothing_on_rollback() {
    let fresh = Postgres::fresh().await;
    let mut client = client(&fresh).await;
    let orders = fresh.table("orders");
    client.batch_execute(&format!("create table {orders} (id bigint)")).await.expect("a table");
    for commits in [false, true] {
        let tx = client.transaction().await.expect("begin");
        tx.execute(&format!("insert into {orders} values (42)"), &[]).await.expect("insert");
        let published = fresh.postbox.publish_on(&tx, &OrderPlaced { order_id: 42 }).await.expect("publish");
        assert_eq!((published.topic.as_str(), published.key.as_deref()), ("orders.placed", Some("42")));
        assert_eq!(messages(&fresh).await, 0, "nobody else sees it before the commit");
        if !commits {
            tx.rollback().await.expect("rollback");
            assert!(fresh.postbox.admin().message(published.id).await.is_err());
            continue;
        }
        tx.commit().await.expect("commit");
        let (stored, _) = fresh.postbox.admin().message(published.id).await.expect("it is there");
        assert_eq!(stored.decode::<OrderPlaced>().expect("decodes").order_id, 42);
    }
    assert_eq!(messages(&fresh).await, 1);
    assert_eq!(Postgres::count(&fresh, &format!("select count(*) from {orders}")).await, 1);
}

#[tokio::test]
async fn duplicates_and_conflicts_are_told() {
    let fresh = Postgres::fresh().await;
    // Without a postbox: only the schema's name.
    let outbox = Statements::new(fresh.schema()).expect("a plain name");
    let mut client = client(&fresh).await;
    let tx = client.transaction().await.expect("begin");
    let first = outbox.publish_on(&tx, Envelope::json("t", &1).map(|d| d.dedup("k"))).await.expect("publish");
    let again = outbox.publish_on(&tx, Envelope::json("t", &1).map(|d| d.dedup("k"))).await.expect("the same");
    assert_eq!((again.id, again.is_duplicate(), first.is_duplicate()), (first.id, true, false));
    let error = outbox.publish_on(&tx, Envelope::json("t", &2).map(|d| d.dedup("k"))).await.expect_err("another body");
    assert!(matches!(error, PublishError::DedupConflict { existing, .. } if existing == first.id), "{error}");
    // A refused message and a conflict leave the transaction as it was.
    outbox.publish_on(&tx, Envelope::json("no topic", &1)).await.expect_err("refused");
    outbox.publish_on(&tx, Envelope::json("t", &3)).await.expect("publish");
    tx.commit().await.expect("commit");
    assert_eq!(messages(&fresh).await, 2);
    // sqlx and this know the key as the same.
    let sqlx = fresh.postbox.publish_now([Envelope::json("t", &1).map(|d| d.dedup("k"))]).await.expect("publish");
    assert_eq!((sqlx[0].id, sqlx[0].is_duplicate()), (first.id, true));
}

#[tokio::test]
async fn bytes_and_thousands_reach_their_handler() {
    let fresh = Postgres::fresh().await;
    let (seen, mut arrived) = tokio::sync::mpsc::unbounded_channel();
    let take = move |bytes: Bytes| {
        let seen = seen.clone();
        async move { seen.send((bytes.content_type().to_owned(), bytes.to_vec())).unwrap_or_default() }
    };
    let router = Router::new().on("blobs.>", postbox::handler(take).named("take"));
    let worker = fresh.postbox.worker(router).start().await.expect("start");
    let mut client = client(&fresh).await;
    let tx = client.transaction().await.expect("begin");
    let drafts = (0..1500_u32).map(|n| Envelope::bytes("blobs.x", "application/octet-stream", n.to_be_bytes()));
    let published = fresh.postbox.publish_all_on(&tx, drafts).await.expect("publish");
    assert_eq!(published.len(), 1500);
    tx.commit().await.expect("commit");
    let mut numbers = Vec::new();
    while numbers.len() < 1500 {
        let (content_type, bytes) = arrived.recv().await.expect("one more");
        assert_eq!(content_type, "application/octet-stream");
        numbers.push(u32::from_be_bytes(bytes.try_into().expect("four bytes")));
    }
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 1500, "each one arrives");
    worker.stop(None).await.expect("stop");
}

#[tokio::test]
async fn on_a_bare_client_it_is_atomic_and_errors_have_their_code() {
    let fresh = Postgres::fresh().await;
    let client = client(&fresh).await;
    fresh.postbox.publish_on(&client, Envelope::json("t", &1)).await.expect("publish");
    assert_eq!(messages(&fresh).await, 1);
    let nowhere = Statements::new("postbox_nowhere").expect("a plain name");
    let error = nowhere.publish_on(&client, Envelope::json("t", &1)).await.expect_err("no schema");
    assert!(matches!(&error, PublishError::Driver { code: Some(code), .. } if code == "3F000"), "{error:?}");
    assert!(error.to_string().contains("(3F000)"), "{error}");
    assert!(!postbox::Error::from(error).is_transient());

    client.batch_execute("set application_name = 'to end'").await.expect("set");
    let pid: i32 = client.query_one("select pg_backend_pid()", &[]).await.expect("a pid").get(0);
    sqlx::query("select pg_terminate_backend($1)").bind(pid).execute(&fresh.pool).await.expect("ended");
    let error = fresh.postbox.publish_on(&client, Envelope::json("t", &1)).await.expect_err("the connection is gone");
    assert!(postbox::Error::from(error).is_transient());
}

/// Other threads may run it.
#[test]
fn its_future_is_send() {
    fn is_send<T: Send>(_: T) {}
    let outbox = Statements::new("postbox").expect("a plain name");
    let check = |client: &Client| is_send(outbox.publish_on(client, Envelope::json("t", &1)));
    let _ = check;
}
