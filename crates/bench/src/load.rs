//! The load that all figures share: messages of 150 bytes, handlers that do nothing, and the end of it,
//! counted from the record.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postbox::{Draft, Envelope, Failure, Postbox, Postgres, Router, Worker};

use crate::Problem;
use crate::site::{Fresh, Site};

/// What all messages are published under.
pub(crate) const TOPIC: &str = "bench.placed";
/// Messages of a bulk publish that share a statement, and of a raw drain that share a claim.
pub(crate) const BATCH: usize = 500;
/// It gives up when the record does not get there.
const STUCK: Duration = Duration::from_secs(600);

/// JSON of 150 bytes.
pub(crate) fn payload(number: usize) -> String {
    let text = format!("{{\"order_id\": {number}, \"note\": \"");
    format!("{text}{:x<width$}\"}}", "", width = 150 - text.len() - 2)
}

pub(crate) fn draft(number: usize) -> Result<Draft, Problem> {
    Ok(Envelope::raw(TOPIC, payload(number))?)
}

/// Publishes this many, in bulk.
pub(crate) async fn fill(postbox: &Postbox<Postgres>, messages: usize) -> Result<(), Problem> {
    let mut number = 0;
    while number < messages {
        let upto = messages.min(number + 1000);
        let drafts: Vec<Draft> = (number..upto).map(draft).collect::<Result<_, _>>()?;
        postbox.publish_now(drafts).await?;
        number = upto;
    }
    Ok(())
}

/// A plain handler that does nothing but count.
pub(crate) fn idle_handler(done: &Arc<AtomicU64>) -> Router<Postgres> {
    limited_handler(done, None)
}

/// The same, perhaps with a limit of how many run at once in all workers.
pub(crate) fn limited_handler(done: &Arc<AtomicU64>, limit: Option<u32>) -> Router<Postgres> {
    let done = done.clone();
    let count = postbox::handler(move || {
        done.fetch_add(1, Ordering::Relaxed);
        std::future::ready(Ok::<(), Failure>(()))
    });
    let count = count.named("bench");
    Router::new().on(TOPIC, if let Some(limit) = limit { count.limit(limit) } else { count })
}

/// Registers what a router subscribes to, with nobody working on it.
pub(crate) async fn register(fresh: &Fresh, router: Router<Postgres>) -> Result<(), Problem> {
    let worker = fresh.postbox.worker(router).start().await?;
    worker.stop(None).await?;
    Ok(())
}

/// Starts a worker, and waits until every outcome is committed: how many a second, the start included.
pub(crate) async fn drained(
    site: &Site,
    fresh: &Fresh,
    done: &AtomicU64,
    start: impl Future<Output = Result<Worker<Postgres>, postbox::Error>>,
    messages: usize,
) -> Result<f64, Problem> {
    let before = (done.load(Ordering::Relaxed), succeeded(site, fresh).await?);
    let begun = Instant::now();
    let worker = start.await?;
    on_record(site, fresh, done, before, messages).await?;
    let took = begun.elapsed();
    worker.stop(None).await?;
    Ok(messages as f64 / took.as_secs_f64())
}

/// Waits until so many more than before are through and on record, and no more than those. The database is
/// asked only when the handlers are through: what is asked meanwhile would be measured, too.
pub(crate) async fn on_record(
    site: &Site,
    fresh: &Fresh,
    done: &AtomicU64,
    (done_before, before): (u64, f64),
    messages: usize,
) -> Result<(), Problem> {
    let deadline = Instant::now() + STUCK;
    while done.load(Ordering::Relaxed) < done_before + messages as u64 {
        if Instant::now() > deadline {
            return Err(format!("the handlers are not through after {STUCK:?}").into());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    loop {
        let counted = succeeded(site, fresh).await? - before;
        if counted == messages as f64 {
            return Ok(());
        }
        if counted > messages as f64 || Instant::now() > deadline {
            return Err(format!("{counted} of {messages} messages have succeeded").into());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Waits until nothing is left to do.
pub(crate) async fn finished(site: &Site, fresh: &Fresh) -> Result<(), Problem> {
    let sql = format!("select 1 from {0}.lease union all select 1 from {0}.ready limit 1", fresh.schema);
    let deadline = Instant::now() + STUCK;
    while sqlx::query(sqlx::AssertSqlSafe(&*sql)).fetch_optional(&site.pool).await?.is_some() {
        if Instant::now() > deadline {
            return Err(format!("not done after {STUCK:?}").into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// Deliveries that have succeeded, by the record.
pub(crate) async fn succeeded(site: &Site, fresh: &Fresh) -> Result<f64, Problem> {
    site.number(&format!(
        "(select coalesce(sum(cardinality(deliveries)), 0) from {0}.outcome_part)
         + (select count(*) from {0}.outcome where state_after = 'succeeded')",
        fresh.schema
    ))
    .await
}

/// A queue as one writes it by hand, with this many rows in it.
pub(crate) async fn raw_queue(site: &Site, messages: usize) -> Result<String, Problem> {
    let table = site.table("raw_queue");
    site.run(&format!(
        "drop table if exists {table};
         create table {table} (id bigint generated always as identity primary key, topic text not null,
             payload jsonb not null, created_at timestamptz not null default now())"
    ))
    .await?;
    let mut tx = site.pool.begin().await?;
    let payloads: Vec<String> = (0..messages).map(payload).collect();
    for chunk in payloads.chunks(1000) {
        let sql = format!("insert into {table} (topic, payload) select $1, p::jsonb from unnest($2::text[]) p");
        sqlx::query(sqlx::AssertSqlSafe(sql)).bind(TOPIC).bind(chunk).execute(&mut *tx).await?;
    }
    tx.commit().await?;
    Ok(table)
}

/// Drains it: `DELETE … SKIP LOCKED` in batches, by two connections, as a worker claims and settles with
/// two; messages a second.
pub(crate) async fn raw_drain(site: &Site, messages: usize) -> Result<f64, Problem> {
    let table = raw_queue(site, messages).await?;
    raw_drained(site, &table, messages).await
}

/// The same of a queue that is there.
pub(crate) async fn raw_drained(site: &Site, table: &str, messages: usize) -> Result<f64, Problem> {
    let sql: Arc<str> = format!(
        "delete from {table} where id in (
             select id from {table} order by id limit {BATCH} for update skip locked)
         returning id, topic, payload::text"
    )
    .into();
    let clients = site.clients(2).await?;
    let begun = Instant::now();
    let drainers = (0..2).map(|_| {
        let (clients, sql) = (clients.clone(), sql.clone());
        tokio::spawn(async move {
            let mut taken = 0;
            loop {
                let rows = sqlx::query(sqlx::AssertSqlSafe(sql.to_string())).fetch_all(&clients).await?;
                if rows.is_empty() {
                    return Ok::<usize, sqlx::Error>(taken);
                }
                taken += rows.len();
            }
        })
    });
    let mut taken = 0;
    for drainer in futures_util::future::join_all(drainers).await {
        taken += drainer??;
    }
    let took = begun.elapsed();
    clients.close().await;
    if taken != messages {
        return Err(format!("the raw drain has taken {taken} of {messages}").into());
    }
    Ok(messages as f64 / took.as_secs_f64())
}
