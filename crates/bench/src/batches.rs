//! Batch handlers beside handlers of single messages: plain ones that read their payload and do nothing, plain
//! ones that insert a row for each message, and transactional ones that do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use postbox::{Batch, Failure, Payload, Postgres, Router, Tx, batch, handler};
use serde::Deserialize;
use sqlx::AssertSqlSafe;

use crate::drain::{AT_ONCE, filled};
use crate::figure::{Bar, Figure};
use crate::load::{TOPIC, drained};
use crate::site::Site;
use crate::{Extent, Problem};

/// Messages of a batch.
const OF: usize = 100;

/// What the payloads are.
#[derive(Deserialize)]
struct Order {
    order_id: u64,
    note: String,
}

impl Order {
    /// Looks at all of it: 1, so that nobody leaves it out.
    fn read(&self) -> u64 {
        u64::from(self.order_id < u64::MAX && !self.note.is_empty())
    }
}

/// Handlers that do nothing: what is left is claiming and settling, which are the same for both.
pub(crate) async fn idle(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let done = Arc::new(AtomicU64::new(0));
    let single = || {
        let done = done.clone();
        let count = move |Payload(order): Payload<Order>| {
            done.fetch_add(order.read(), Ordering::Relaxed);
            std::future::ready(())
        };
        Router::<Postgres>::new().on(TOPIC, handler(count).named("bench"))
    };
    let batches = || {
        let done = done.clone();
        let count = move |orders: Batch<Order>| {
            done.fetch_add(orders.iter().map(|order| order.payload.read()).sum(), Ordering::Relaxed);
            std::future::ready(())
        };
        Router::<Postgres>::new().on_batch(TOPIC, batch(count).named("bench").up_to(OF))
    };
    let name = "drain, batch handlers of 100, idle (baseline: single)";
    in_turns(site, extent, name, extent.messages, &done, 100, (&single, &batches)).await
}

/// Plain handlers that insert a row for each message, on connections of their own.
pub(crate) async fn plain(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let clients = site.clients(AT_ONCE).await?;
    let (one, many) = effects(site, "plain_effect").await?;
    let done = Arc::new(AtomicU64::new(0));
    let single = || {
        let (insert, done, clients) = (one.clone(), done.clone(), clients.clone());
        let effect = move |Payload(order): Payload<Order>| {
            let (insert, done, clients) = (insert.clone(), done.clone(), clients.clone());
            async move {
                sqlx::query(AssertSqlSafe(&*insert)).bind(order.note).execute(&clients).await?;
                done.fetch_add(1, Ordering::Relaxed);
                Ok::<(), Failure>(())
            }
        };
        Router::<Postgres>::new().on(TOPIC, handler(effect).named("bench"))
    };
    let batches = || {
        let (insert, done, clients) = (many.clone(), done.clone(), clients.clone());
        let effect = move |orders: Batch<Order>| {
            let (insert, done, clients) = (insert.clone(), done.clone(), clients.clone());
            async move {
                let notes: Vec<String> = orders.into_iter().map(|order| order.payload.note).collect();
                let count = notes.len() as u64;
                sqlx::query(AssertSqlSafe(&*insert)).bind(notes).execute(&clients).await?;
                done.fetch_add(count, Ordering::Relaxed);
                Ok::<(), Failure>(())
            }
        };
        Router::<Postgres>::new().on_batch(TOPIC, batch(effect).named("bench").up_to(OF))
    };
    let name = "drain, batch handlers of 100, that insert (baseline: single)";
    let messages = extent.messages / 10;
    let figures = in_turns(site, extent, name, messages, &done, AT_ONCE as usize, (&single, &batches)).await?;
    clients.close().await;
    Ok(figures)
}

/// A table for effects, and how one is written, and many.
async fn effects(site: &Site, name: &str) -> Result<(Arc<str>, Arc<str>), Problem> {
    let table = site.table(name);
    site.run(&format!("create table {table} (id bigint generated always as identity primary key, note text not null)"))
        .await?;
    let one = format!("insert into {table} (note) values ($1)");
    let many = format!("insert into {table} (note) select * from unnest($1::text[])");
    Ok((one.into(), many.into()))
}

type Routes<'a> = &'a (dyn Fn() -> Router<Postgres> + Sync);

/// Single, in batches, single, in batches.
async fn in_turns(
    site: &Site,
    extent: Extent,
    name: &str,
    messages: usize,
    done: &AtomicU64,
    at_once: usize,
    (single, batches): (Routes<'_>, Routes<'_>),
) -> Result<Vec<Figure>, Problem> {
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    for _ in 0..extent.rounds {
        for (rates, routes) in [(&mut alone, single), (&mut together, batches)] {
            let fresh = filled(site, routes(), messages, true).await?;
            let start = fresh.postbox.worker(routes()).concurrency(at_once).start();
            rates.push(drained(site, &fresh, done, start, messages).await?);
            fresh.drop(site).await?;
        }
    }
    Ok(vec![Figure::beside(name, &together, &alone, "msg/s", Bar::Ratio(1.3))])
}

pub(crate) async fn transactional(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let (one, many) = effects(site, "batch_effect").await?;
    let done = Arc::new(AtomicU64::new(0));
    let single = || {
        let (insert, done) = (one.clone(), done.clone());
        let effect = move |Payload(order): Payload<Order>, mut tx: Tx<Postgres>| {
            let (insert, done) = (insert.clone(), done.clone());
            async move {
                sqlx::query(AssertSqlSafe(&*insert)).bind(order.note).execute(&mut tx).await?;
                done.fetch_add(1, Ordering::Relaxed);
                Ok::<(), Failure>(())
            }
        };
        Router::<Postgres>::new().on(TOPIC, handler(effect).named("bench"))
    };
    let batches = || {
        let (insert, done) = (many.clone(), done.clone());
        let effect = move |orders: Batch<Order>, mut tx: Tx<Postgres>| {
            let (insert, done) = (insert.clone(), done.clone());
            async move {
                let notes: Vec<String> = orders.into_iter().map(|order| order.payload.note).collect();
                let count = notes.len() as u64;
                sqlx::query(AssertSqlSafe(&*insert)).bind(notes).execute(&mut tx).await?;
                done.fetch_add(count, Ordering::Relaxed);
                Ok::<(), Failure>(())
            }
        };
        Router::<Postgres>::new().on_batch(TOPIC, batch(effect).named("bench").up_to(OF))
    };
    let name = "drain, transactional batches of 100 (baseline: single)";
    let messages = extent.messages / 10;
    in_turns(site, extent, name, messages, &done, AT_ONCE as usize, (&single, &batches)).await
}
