//! Batch handlers beside handlers of single messages: plain ones that read their payload and do nothing, and
//! transactional ones that insert a row for each message.

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

pub(crate) async fn plain(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
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
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    for _ in 0..extent.rounds {
        let fresh = filled(site, single(), extent.messages, true).await?;
        let start = fresh.postbox.worker(single()).concurrency(100).start();
        alone.push(drained(site, &fresh, &done, start, extent.messages).await?);
        fresh.drop(site).await?;
        let fresh = filled(site, batches(), extent.messages, true).await?;
        let start = fresh.postbox.worker(batches()).concurrency(100).start();
        together.push(drained(site, &fresh, &done, start, extent.messages).await?);
        fresh.drop(site).await?;
    }
    let name = "drain, batch handlers of 100 (baseline: single)";
    Ok(vec![Figure::beside(name, &together, &alone, "msg/s", Bar::Ratio(1.3))])
}

pub(crate) async fn transactional(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let messages = extent.messages / 10;
    let effect = site.table("batch_effect");
    site.run(&format!(
        "create table {effect} (id bigint generated always as identity primary key, note text not null)"
    ))
    .await?;
    let one: Arc<str> = format!("insert into {effect} (note) values ($1)").into();
    let many: Arc<str> = format!("insert into {effect} (note) select * from unnest($1::text[])").into();
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
    let at_once = AT_ONCE as usize;
    let (mut alone, mut together) = (Vec::new(), Vec::new());
    for _ in 0..extent.rounds {
        let fresh = filled(site, single(), messages, true).await?;
        let start = fresh.postbox.worker(single()).concurrency(at_once).start();
        alone.push(drained(site, &fresh, &done, start, messages).await?);
        fresh.drop(site).await?;
        let fresh = filled(site, batches(), messages, true).await?;
        let start = fresh.postbox.worker(batches()).concurrency(at_once).start();
        together.push(drained(site, &fresh, &done, start, messages).await?);
        fresh.drop(site).await?;
    }
    let name = "drain, transactional batches of 100 (baseline: single)";
    Ok(vec![Figure::beside(name, &together, &alone, "msg/s", Bar::Ratio(1.3))])
}
