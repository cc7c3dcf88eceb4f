//! Draining a backlog: plain handlers, operations, transactional handlers; and the WAL of a whole cycle.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use postbox::{Failure, OperationFailure, Postgres, Receipt, Router, Tx, handler, operation};
use sqlx::AssertSqlSafe;

use crate::figure::{Bar, Figure};
use crate::load::{TOPIC, drained, fill, idle_handler, raw_drain, raw_queue, register};
use crate::site::{Fresh, Site};
use crate::{Extent, Problem};

/// Transactional handlers, and raw transactions, at once.
pub(crate) const AT_ONCE: u32 = 8;

pub(crate) async fn plain(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let (mut raw, mut analysed, mut new) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..extent.rounds {
        raw.push(raw_drain(site, extent.messages).await?);
        for (rates, analyse) in [(&mut analysed, true), (&mut new, false)] {
            let done = Arc::new(AtomicU64::new(0));
            let fresh = filled(site, idle_handler(&done), extent.messages, analyse).await?;
            let start = fresh.postbox.worker(idle_handler(&done)).concurrency(100).start();
            rates.push(drained(site, &fresh, &done, start, extent.messages).await?);
            fresh.drop(site).await?;
        }
    }
    Ok(vec![
        Figure::beside("drain, plain handlers", &analysed, &raw, "msg/s", Bar::Ratio(0.7)),
        Figure::beside("drain, plain handlers, never analysed", &new, &raw, "msg/s", Bar::Ratio(0.7)),
    ])
}

pub(crate) async fn operations(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let done = Arc::new(AtomicU64::new(0));
    let routes = || idle_operation(&done);
    let (mut raw, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..extent.rounds {
        raw.push(raw_drain(site, extent.messages).await?);
        let fresh = filled(site, routes(), extent.messages, true).await?;
        let start = fresh.postbox.worker(routes()).concurrency(100).start();
        ours.push(drained(site, &fresh, &done, start, extent.messages).await?);
        fresh.drop(site).await?;
    }
    let name = "drain, operations, attempt committed before, 100 at once";
    Ok(vec![Figure::beside(name, &ours, &raw, "msg/s", Bar::Ratio(0.35))])
}

/// An operation that does nothing but count.
pub(crate) fn idle_operation(done: &Arc<AtomicU64>) -> Router<Postgres> {
    let done = done.clone();
    let charge = move || {
        done.fetch_add(1, Ordering::Relaxed);
        std::future::ready(Ok::<Receipt, OperationFailure>(Receipt::none()))
    };
    Router::new().on(TOPIC, operation(charge).named("bench"))
}

/// Where handlers and raw transactions leave their effect: the statement that does.
pub(crate) async fn effect(site: &Site) -> Result<Arc<str>, Problem> {
    let effect = site.table("effect");
    site.run(&format!(
        "create table if not exists {effect} (id bigint generated always as identity primary key, note text not null)"
    ))
    .await?;
    Ok(format!("insert into {effect} (note) values ($1)").into())
}

/// A transactional handler that leaves an effect, and counts.
pub(crate) fn inserting(insert: &Arc<str>, done: &Arc<AtomicU64>) -> Router<Postgres> {
    let (insert, done) = (insert.clone(), done.clone());
    let effect = move |mut tx: Tx<Postgres>| {
        let (insert, done) = (insert.clone(), done.clone());
        async move {
            done.fetch_add(1, Ordering::Relaxed);
            sqlx::query(AssertSqlSafe(&*insert)).bind("done").execute(&mut tx).await?;
            Ok::<(), Failure>(())
        }
    };
    Router::new().on(TOPIC, handler(effect).named("bench"))
}

pub(crate) async fn transactional(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let messages = extent.messages / 10;
    let insert = effect(site).await?;
    let done = Arc::new(AtomicU64::new(0));
    let routes = || inserting(&insert, &done);
    let (mut raw, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..extent.rounds {
        let table = raw_queue(site, messages).await?;
        raw.push(raw_transactions(site, &table, &insert, messages).await?);
        let fresh = filled(site, routes(), messages, true).await?;
        let start = fresh.postbox.worker(routes()).concurrency(AT_ONCE as usize).start();
        ours.push(drained(site, &fresh, &done, start, messages).await?);
        fresh.drop(site).await?;
    }
    Ok(vec![Figure::beside("drain, transactional handlers, 8 at once", &ours, &raw, "msg/s", Bar::Ratio(0.8))])
}

/// A row taken, its effect, and the commit: by as many connections as there are handlers.
pub(crate) async fn raw_transactions(
    site: &Site,
    table: &str,
    insert: &Arc<str>,
    messages: usize,
) -> Result<f64, Problem> {
    let take: Arc<str> = format!(
        "delete from {table} where id = (select id from {table} order by id limit 1 for update skip locked)
         returning id, topic, payload::text"
    )
    .into();
    let clients = site.clients(AT_ONCE).await?;
    let begun = Instant::now();
    let tasks = (0..AT_ONCE).map(|_| {
        let (clients, take, insert) = (clients.clone(), take.clone(), insert.clone());
        tokio::spawn(async move {
            let mut taken = 0;
            loop {
                let mut tx = clients.begin().await?;
                if sqlx::query(AssertSqlSafe(&*take)).fetch_optional(&mut *tx).await?.is_none() {
                    return Ok::<usize, sqlx::Error>(taken);
                }
                sqlx::query(AssertSqlSafe(&*insert)).bind("done").execute(&mut *tx).await?;
                tx.commit().await?;
                taken += 1;
            }
        })
    });
    let mut taken = 0;
    for task in futures_util::future::join_all(tasks).await {
        taken += task??;
    }
    let took = begun.elapsed();
    clients.close().await;
    if taken != messages {
        return Err(format!("the raw transactions have taken {taken} of {messages}").into());
    }
    Ok(messages as f64 / took.as_secs_f64())
}

pub(crate) async fn wal(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let messages = extent.messages;
    let fresh = site.fresh().await?;
    let done = Arc::new(AtomicU64::new(0));
    register(&fresh, idle_handler(&done)).await?;
    // A first cycle: later ones find their pages there, and none is written whole after a checkpoint.
    let mut written = (0.0, 0.0);
    for _ in 0..2 {
        let before = site.wal().await?;
        fill(&fresh.postbox, messages).await?;
        let published = site.wal().await?;
        let start = fresh.postbox.worker(idle_handler(&done)).concurrency(100).start();
        drained(site, &fresh, &done, start, messages).await?;
        written = (published - before, site.wal().await? - published);
    }
    fresh.drop(site).await?;

    let before = site.wal().await?;
    raw_drain(site, messages).await?;
    let raw = site.wal().await? - before;
    let each = |bytes: f64| bytes / messages as f64;
    Ok(vec![
        Figure::alone("WAL, publish in bulk", each(written.0), "B/msg", Bar::None),
        Figure::alone("WAL, drain", each(written.1), "B/msg", Bar::None),
        Figure::alone("WAL, whole cycle", each(written.0 + written.1), "B/msg", Bar::AtMost(700.0)),
        Figure::alone("WAL, raw queue, insert and delete", each(raw), "B/msg", Bar::None),
    ])
}

/// A postbox with a backlog, as a newcomer has it or as one that has lived for a while.
pub(crate) async fn filled(
    site: &Site,
    router: Router<Postgres>,
    messages: usize,
    analyse: bool,
) -> Result<Fresh, Problem> {
    let fresh = site.fresh().await?;
    if !analyse {
        site.run(&format!(
            "do $off$ declare hot regclass; begin
                 for hot in select c.oid from pg_class c where c.relnamespace = '{0}'::regnamespace and c.relkind = 'r'
                     and (c.relispartition or c.relname in ('lease', 'outcome_part'))
                 loop execute format('alter table %s set (autovacuum_enabled = off)', hot); end loop;
             end $off$",
            fresh.schema
        ))
        .await?;
    }
    register(&fresh, router).await?;
    fill(&fresh.postbox, messages).await?;
    if analyse {
        site.run(&format!("vacuum analyze {0}.ready; ", fresh.schema)).await?;
        site.run(&format!("vacuum analyze {0}.message", fresh.schema)).await?;
    }
    site.settle_down().await?;
    Ok(fresh)
}
