//! Payloads of bytes, on both stores: kept to the last byte, from the publisher to every reader.

use std::time::Duration;

use postbox::admin::{DeliveryDetail, Filter, Retry};
use postbox::lifecycle::State;
use postbox::{
    Bytes, Content, Done, Draft, Envelope, Failure, FollowUps, Operation, OperationFailure, Payload, PublishError,
    Receipt, Reconciled, Router, handler, operation,
};
use postbox_testkit::{Fresh, Testable, on_both_stores};
use serde_json::{Value, json};
use sqlx::Executor;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

on_both_stores!(
    a_handler_takes_bytes,
    bytes_for_a_typed_payload_are_a_dead_letter,
    follow_ups_and_doubts_keep_them,
    a_retried_dead_letter_keeps_them,
    dedup_compares_bytes_and_content_type,
    a_message_has_one_payload,
    they_are_written_in_base64,
);

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n\0\xff\\\"{}'";

fn image() -> Draft {
    Envelope::bytes("images.added", "image/png", PNG)
}

type Seen = (String, Vec<u8>);

/// Tells what it was given.
fn teller(seen: &UnboundedSender<Seen>) -> impl Fn(Bytes) -> std::future::Ready<()> + Send + Sync + 'static {
    let seen = seen.clone();
    move |bytes: Bytes| {
        seen.send((bytes.content_type().to_owned(), bytes.to_vec())).unwrap_or_default();
        std::future::ready(())
    }
}

async fn next(arrived: &mut UnboundedReceiver<Seen>) -> Seen {
    tokio::time::timeout(Duration::from_secs(60), arrived.recv()).await.expect("in time").expect("one more")
}

/// The first delivery that this filter finds, when there is one.
async fn found<Db: Testable>(fresh: &Fresh<Db>, filter: &str) -> DeliveryDetail {
    let filter: Filter = filter.parse().expect("a filter");
    let looking = async {
        loop {
            if let Some(row) = fresh.postbox.admin().list(&filter, 1).await.expect("list").first() {
                break fresh.postbox.admin().show(row.id).await.expect("show");
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), looking).await.expect("it turns up")
}

async fn a_handler_takes_bytes<Db: Testable>() {
    let fresh = Db::fresh().await;
    let (seen, mut arrived) = unbounded_channel();
    let router = Router::new().on("images.>", handler(teller(&seen)).named("take"));
    let worker = fresh.postbox.worker(router).start().await.expect("start");
    let text = r#"{"n": 1.10}"#;
    let empty = Envelope::bytes("images.added", "a/b; q=\"\\\"\"", *b"");
    for (draft, expected) in [
        (Ok(image()), ("image/png", PNG)),
        (Ok(empty), ("a/b; q=\"\\\"\"", &[][..])),
        // JSON is bytes as well.
        (Envelope::raw("images.described", text), ("application/json", text.as_bytes())),
    ] {
        let published = fresh.postbox.publish_now([draft]).await.expect("publish");
        assert_eq!((published[0].content_type(), published[0].payload_bytes()), expected);
        assert_eq!(next(&mut arrived).await, (expected.0.to_owned(), expected.1.to_vec()));
        let (stored, _) = fresh.postbox.admin().message(published[0].id).await.expect("it is there");
        assert_eq!((stored.content_type(), stored.payload_bytes()), expected);
    }
    worker.stop(None).await.expect("stop");
}

async fn bytes_for_a_typed_payload_are_a_dead_letter<Db: Testable>() {
    let fresh = Db::fresh().await;
    let router = Router::new().on("images.>", handler(|_: Payload<Value>| async {}).named("typed")).on(
        "images.>",
        handler(|e: Envelope| async move {
            Err::<(), Failure>(Failure::permanent(e.decode::<Value>().expect_err("bytes")))
        })
        .named("decodes"),
    );
    fresh.postbox.publish_now([image()]).await.expect("publish");
    let worker = fresh.postbox.worker(router).start().await.expect("start");
    for (name, words) in [
        ("typed", "the payload is bytes of image/png; take `Bytes`"),
        ("decodes", "it is bytes of image/png; take `Bytes`, or read `Envelope::payload_bytes`"),
    ] {
        let dead = found(&fresh, &format!("state:dead subscription:{name}")).await;
        let said = dead.row.note.or(dead.row.last_error).unwrap_or_default();
        assert!(said.contains(words), "{said}");
    }
    worker.stop(None).await.expect("stop");
}

async fn follow_ups_and_doubts_keep_them<Db: Testable>() {
    let fresh = Db::fresh().await;
    let (seen, mut arrived) = unbounded_channel();
    let passed_on = |topic: &str, bytes: &[u8]| Envelope::bytes(topic, "image/x", [bytes, b"\0"].concat());
    let router = Router::new()
        .on(
            "images.added",
            handler(move |bytes: Bytes| async move {
                Ok::<_, Failure>(Done::new().then(passed_on("images.plain", &bytes)))
            })
            .named("plain"),
        )
        .on(
            "images.added",
            // In doubt; the hook reads the same bytes, and what follows is made from the message.
            operation(|_: Operation| async { Err::<Receipt, _>(OperationFailure::in_doubt("the line broke")) })
                .named("sent")
                .reconcile(move |bytes: Bytes| async move {
                    let receipt = Receipt::none().then(passed_on("images.reconciled", &bytes));
                    Ok::<_, Failure>(Reconciled::Done(receipt))
                })
                .then_from(move |envelope, _| {
                    FollowUps::none().and(passed_on("images.followed", envelope.payload_bytes()))
                }),
        )
        .on("images.plain", handler(teller(&seen)).named("p"))
        .on("images.reconciled", handler(teller(&seen)).named("r"))
        .on("images.followed", handler(teller(&seen)).named("f"));
    fresh.postbox.publish_now([image()]).await.expect("publish");
    let worker = fresh.postbox.worker(router).start().await.expect("start");
    let expected = ("image/x".to_owned(), [PNG, b"\0"].concat());
    for _ in 0..3 {
        assert_eq!(next(&mut arrived).await, expected);
    }
    let followed = found(&fresh, "subscription:f").await.envelope.expect("the message");
    assert!(followed.causation_id.is_some() && followed.payload_bytes() == expected.1);
    worker.stop(None).await.expect("stop");
}

async fn a_retried_dead_letter_keeps_them<Db: Testable>() {
    let fresh = Db::fresh().await;
    let (seen, mut arrived) = unbounded_channel();
    let tell = teller(&seen);
    let router = Router::new().on(
        "images.>",
        handler(move |attempt: postbox::Attempt, bytes: Bytes| {
            let first = attempt.number == 1;
            let told = (!first).then(|| tell(bytes));
            async move {
                if let Some(told) = told {
                    told.await;
                }
                if first { Err(Failure::permanent("at first")) } else { Ok(()) }
            }
        })
        .named("second_try"),
    );
    fresh.postbox.publish_now([image()]).await.expect("publish");
    let worker = fresh.postbox.worker(router).start().await.expect("start");
    let dead = found(&fresh, "state:dead").await;
    assert_eq!(dead.envelope.expect("the message").payload_bytes(), PNG);
    let retry = Retry { rev: Some(dead.row.rev), actor: "ana".into(), reason: "mended".into() };
    fresh.postbox.admin().retry(dead.row.id, &retry).await.expect("retry");
    assert_eq!(next(&mut arrived).await, ("image/png".to_owned(), PNG.to_vec()));
    assert_eq!(found(&fresh, "state:succeeded").await.row.state, State::Succeeded);
    worker.stop(None).await.expect("stop");
}

async fn dedup_compares_bytes_and_content_type<Db: Testable>() {
    let fresh = Db::fresh().await;
    let first = fresh.postbox.publish_now([image().dedup("k")]).await.expect("publish").remove(0);
    let again = fresh.postbox.publish_now([image().dedup("k")]).await.expect("the same").remove(0);
    assert_eq!((again.id, again.is_duplicate(), again.payload_bytes()), (first.id, true, PNG));
    for other in [
        Envelope::bytes("images.added", "image/jpeg", PNG),
        Envelope::bytes("images.added", "image/png", *b"other"),
        image().key("another"),
        Envelope::json("images.added", &1).expect("JSON"),
    ] {
        let error = fresh.postbox.publish_now([other.dedup("k")]).await.expect_err("another body");
        let postbox::Error::Publish(PublishError::DedupConflict { existing, .. }) = error else { panic!("{error}") };
        assert_eq!(existing, first.id);
    }
    // The same bytes as JSON text are another body, too.
    let json = || Envelope::raw("t", "1").expect("JSON").dedup("j");
    fresh.postbox.publish_now([json()]).await.expect("publish");
    let bytes = Envelope::bytes("t", "application/json", *b"1").dedup("j");
    fresh.postbox.publish_now([bytes]).await.expect_err("another body");
    assert!(fresh.postbox.publish_now([json()]).await.expect("the same")[0].is_duplicate());
}

async fn a_message_has_one_payload<Db: Testable>()
where
    for<'c> &'c sqlx::Pool<Db>: Executor<'c, Database = Db>,
{
    let fresh = Db::fresh().await;
    let published = fresh.postbox.publish_now([image()]).await.expect("publish");
    // PostgreSQL's function checks it, which is the door of whoever is not the library; SQLite's table does.
    let wrong: Vec<String> = match <Db as Testable>::NAME {
        "postgres" => [
            "'1', body => 'x', content_type => 'image/png'",
            "body => 'x'",
            "'1', content_type => 'image/png'",
            "content_type => 'image/png'",
        ]
        .map(|given| format!("select {}('t', {given})", fresh.table("publish")))
        .into(),
        _ => ["payload = '1'", "body = null", "content_type = null", "body = null, content_type = null"]
            .map(|set| format!("update postbox_message set {set} where id = x'{}'", published[0].id.simple()))
            .into(),
    };
    for sql in wrong {
        let error = fresh.pool.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(&*sql))).await.err().expect(&sql);
        let error = error.to_string().to_lowercase();
        assert!(error.contains("check") || error.contains("postbox: "), "{sql}: {error}");
    }
}

async fn they_are_written_in_base64<Db: Testable>() {
    let fresh = Db::fresh().await;
    let published = fresh.postbox.publish_now([Envelope::bytes("a.b", "image/png", [0, 255]).key("k")]).await;
    let (envelope, _) = fresh.postbox.admin().message(published.expect("publish")[0].id).await.expect("it is there");
    assert!(matches!(&envelope.payload, Content::Bytes(bytes) if **bytes == [0, 255]));
    assert_eq!(
        (envelope.payload_json(), format!("{:?}", envelope.payload)),
        (None, "Bytes(Bytes(2 of \"image/png\"))".into())
    );
    let read = |text: String| serde_json::from_str::<Value>(&text).expect("JSON");
    let json = read(envelope.to_json());
    assert_eq!((&json["datacontenttype"], &json["data_base64"]), (&json!("image/png"), &json!("AP8=")));
    assert_eq!(json.get("payload"), None);
    let event = read(envelope.to_cloudevent());
    assert_eq!((&event["datacontenttype"], &event["data_base64"]), (&json!("image/png"), &json!("AP8=")));
    assert_eq!((event.get("data"), &event["partitionkey"]), (None, &json!("k")));

    let published = fresh.postbox.publish_now([Envelope::raw("a.b", "[1.10]")]).await.expect("publish");
    let json = published[0].to_json();
    assert!(json.contains(r#""payload":[1.10]"#) && !json.contains("datacontenttype"), "{json}");
    let event = published[0].to_cloudevent();
    assert!(event.contains(r#""datacontenttype":"application/json""#) && event.contains(r#""data":[1.10]"#), "{event}");
}
