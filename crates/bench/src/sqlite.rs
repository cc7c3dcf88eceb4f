//! The embedded store: a drain beside raw inserts and deletes on a file with the same settings.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postbox::{Draft, Envelope, Failure, Postbox, Router, Settings, Sqlite, handler};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection};

use crate::figure::{Bar, Figure};
use crate::load::{BATCH, TOPIC, payload};
use crate::{Extent, Problem};

pub(crate) async fn drain(extent: Extent) -> Result<Vec<Figure>, Problem> {
    let messages = extent.messages / 2;
    let folder = tempfile::tempdir()?;
    let (mut raw, mut ours, mut bulk) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..extent.rounds {
        raw.push(raw_cycle(&folder.path().join(format!("raw{round}.db")), messages).await?);
        let (published, drained) = cycle(&folder.path().join(format!("postbox{round}.db")), messages).await?;
        bulk.push(published);
        ours.push(drained);
    }
    Ok(vec![
        Figure::beside("SQLite, drain (baseline: insert and delete)", &ours, &raw, "msg/s", Bar::Ratio(0.5)),
        Figure::beside("SQLite, bulk publish (baseline: insert and delete)", &bulk, &raw, "msg/s", Bar::None),
    ])
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        // As postbox has it: the thread of the connection does not stop in the middle of a batch.
        .row_buffer_size(512)
}

/// Inserts and deletes so many, in batches: messages a second.
async fn raw_cycle(path: &Path, messages: usize) -> Result<f64, Problem> {
    let mut db: SqliteConnection = options(path).connect().await?;
    sqlx::raw_sql("create table queue (id integer primary key, topic text not null, payload text not null)")
        .execute(&mut db)
        .await?;
    let payloads: Vec<String> = (0..messages).map(payload).collect();
    let begun = Instant::now();
    for chunk in payloads.chunks(BATCH) {
        let mut tx = db.begin_with("begin immediate").await?;
        sqlx::query("insert into queue (topic, payload) select ?1, value from json_each(?2)")
            .bind(TOPIC)
            .bind(serde_json::to_string(chunk)?)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
    }
    let mut taken = 0;
    loop {
        let mut tx = db.begin_with("begin immediate").await?;
        let rows = sqlx::query(
            "delete from queue where id in (select id from queue order by id limit ?1 + 0) returning id, topic, payload",
        )
        .bind(BATCH as i64)
        .fetch_all(&mut *tx)
        .await?;
        tx.commit().await?;
        if rows.is_empty() {
            break;
        }
        taken += rows.len();
    }
    let took = begun.elapsed();
    db.close().await?;
    if taken != messages {
        return Err(format!("the raw drain has taken {taken} of {messages}").into());
    }
    Ok(messages as f64 / took.as_secs_f64())
}

/// Publishes so many in bulk, then drains them: messages a second of each.
async fn cycle(path: &Path, messages: usize) -> Result<(f64, f64), Problem> {
    let settings = Settings::defaults().url(format!("sqlite:{}", path.display())).set("application", "bench");
    let postbox = Postbox::<Sqlite>::migrate(settings).await?;
    let done = Arc::new(AtomicU64::new(0));
    let router = || {
        let done = done.clone();
        let count = move || {
            done.fetch_add(1, Ordering::Relaxed);
            std::future::ready(Ok::<(), Failure>(()))
        };
        Router::<Sqlite>::new().on(TOPIC, handler(count).named("bench"))
    };
    postbox.worker(router()).start().await?.stop(None).await?;
    let begun = Instant::now();
    for first in (0..messages).step_by(BATCH) {
        let drafts = (first..messages.min(first + BATCH)).map(|n| Envelope::raw(TOPIC, payload(n)));
        let drafts: Vec<Draft> = drafts.collect::<Result<_, _>>()?;
        postbox.publish_now(drafts).await?;
    }
    let published = messages as f64 / begun.elapsed().as_secs_f64();

    let mut reader = options(path).read_only(true).connect().await?;
    let succeeded = "select count(*) from postbox_every where state = 'succeeded'";
    let left = "select exists (select 1 from postbox_delivery where state <> 'succeeded')
            or exists (select 1 from postbox_lease)";
    let begun = Instant::now();
    let worker = postbox.worker(router()).concurrency(100).start().await?;
    // The record is looked at once the handlers are through: looking is not free.
    while done.load(Ordering::Relaxed) < messages as u64 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    while sqlx::query_scalar::<_, bool>(left).fetch_one(&mut reader).await? {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let took = begun.elapsed();
    worker.stop(None).await?;
    let counted: i64 = sqlx::query_scalar(succeeded).fetch_one(&mut reader).await?;
    postbox.close().await;
    if counted != messages as i64 {
        return Err(format!("{counted} of {messages} messages have succeeded").into());
    }
    Ok((published, messages as f64 / took.as_secs_f64()))
}
