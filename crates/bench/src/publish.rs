//! Publishing: in a business transaction beside an outbox table written by hand, and in bulk.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use postbox::{Draft, Failure, Postbox, Postgres, Router, handler};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};

use crate::figure::{Bar, Figure};
use crate::load::{TOPIC, draft, payload};
use crate::site::{Fresh, Site};
use crate::{Extent, Problem};

/// Connections that publish at once.
pub(crate) const CLIENTS: u32 = 8;
/// Rows that the business transactions change.
const ACCOUNTS: u32 = 10_000;

/// How a business transaction says that something has happened.
#[derive(Clone)]
pub(crate) enum Way {
    /// An insert into a table of its own: a uuid as the key, an index on what is not published.
    ByHand(Arc<str>),
    /// By the library.
    Postbox(Box<Postbox<Postgres>>),
    /// By the SQL function.
    Function(Arc<str>),
}

/// The tables of a business, with an outbox written by hand.
pub(crate) struct Business {
    pub(crate) account: String,
    pub(crate) by_hand: Way,
}

impl Business {
    pub(crate) async fn new(site: &Site) -> Result<Business, Problem> {
        let (outbox, account) = (site.table("outbox"), site.table("account"));
        site.run(&format!(
            "drop table if exists {account}, {outbox};
             create table {account} (id int primary key, balance bigint not null);
             insert into {account} select n, 0 from generate_series(0, {ACCOUNTS} - 1) n;
             create table {outbox} (id uuid primary key default gen_random_uuid(), topic text not null,
                 payload jsonb not null, created_at timestamptz not null default now(), published_at timestamptz);
             create index on {outbox} (created_at) where published_at is null"
        ))
        .await?;
        let by_hand = Way::ByHand(format!("insert into {outbox} (topic, payload) values ($1, $2::jsonb)").into());
        Ok(Business { account, by_hand })
    }
}

pub(crate) async fn in_transactions(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let Business { account, by_hand } = Business::new(site).await?;
    let (one, five, asleep) = (subscribed(site, 1).await?, subscribed(site, 5).await?, subscribed(site, 1).await?);
    sleep_on(site, &asleep).await?;
    let function = format!("select {}.publish($1, $2::jsonb)", one.schema);
    let ways = [
        ("", by_hand, Bar::None),
        ("publish in a transaction, workers busy", Way::Postbox(Box::new(one.postbox.clone())), Bar::Ratio(0.88)),
        ("publish in a transaction, workers asleep", Way::Postbox(Box::new(asleep.postbox.clone())), Bar::Ratio(0.78)),
        ("publish in a transaction, SQL function", Way::Function(function.into()), Bar::Ratio(0.8)),
        ("publish in a transaction, 5 subscriptions", Way::Postbox(Box::new(five.postbox.clone())), Bar::Ratio(0.72)),
    ];
    let clients = site.clients(CLIENTS).await?;
    let mut rounds = vec![Vec::new(); ways.len()];
    for round in 0..=extent.rounds {
        for (rates, (_, way, _)) in rounds.iter_mut().zip(&ways) {
            let rate = transactions(&clients, &account, way, extent.seconds).await?;
            // The first one warms up: statements are prepared, relations extended.
            if round > 0 {
                rates.push(rate);
            }
        }
    }
    clients.close().await;
    for fresh in [one, five, asleep] {
        fresh.drop(site).await?;
    }
    let (by_hand, ours) = (&rounds[0], rounds.iter().zip(&ways).skip(1));
    Ok(ours.map(|(rates, (name, _, bar))| Figure::beside(name, rates, by_hand, "tx/s", *bar)).collect())
}

/// A postbox with so many subscriptions of the topic, whose routes are stored as a worker stores them.
pub(crate) async fn subscribed(site: &Site, subscriptions: usize) -> Result<Fresh, Problem> {
    let fresh = site.fresh().await?;
    let router = (0..subscriptions).fold(Router::new(), |router, number| {
        router.on(TOPIC, handler(async || Ok::<(), Failure>(())).named(format!("bench_{number}")))
    });
    crate::load::register(&fresh, router).await?;
    site.run(&format!(
        "insert into {0}.route (topic, epoch, subscriptions)
         select '{TOPIC}', r.epoch, array(select id from {0}.subscription order by id) from {0}.routing r",
        fresh.schema
    ))
    .await?;
    Ok(fresh)
}

/// How long the worker that is woken is busy: a claim, its handlers, and the look that finds nothing more.
const BUSY: Duration = Duration::from_millis(5);

/// A worker that does nothing but sleep and wake: when it is told, it says that it is awake, and goes to sleep
/// again soon. One that has the messages to handle as well is awake for longer.
async fn sleep_on(site: &Site, fresh: &Fresh) -> Result<(), Problem> {
    let schema = fresh.schema.clone();
    let channel: String = sqlx::query_scalar(AssertSqlSafe(format!("select channel from {schema}.routing")))
        .fetch_one(&site.pool)
        .await?;
    let mut listener = sqlx::postgres::PgListener::connect_with(&site.pool).await?;
    listener.listen(&channel).await?;
    site.run(&format!(
        "insert into {schema}.worker (id, name, application, subscriptions, idempotent, lease_ms, expires_at, asleep)
         values (gen_random_uuid(), 'bench', 'bench', '{{}}', '{{}}', 3600000, now() + interval '1 hour', true)"
    ))
    .await?;
    let pool = site.pool.clone();
    tokio::spawn(async move {
        while listener.recv().await.is_ok() {
            for asleep in [false, true] {
                let sql = format!(
                    "begin; set local synchronous_commit = off; update {schema}.worker set asleep = {asleep}; commit"
                );
                if sqlx::raw_sql(AssertSqlSafe(sql)).execute(&pool).await.is_err() {
                    return;
                }
                if !asleep {
                    tokio::time::sleep(BUSY).await;
                }
            }
        }
    });
    Ok(())
}

/// Business transactions a second, by all clients at once.
pub(crate) async fn transactions(clients: &PgPool, account: &str, way: &Way, seconds: f64) -> Result<f64, Problem> {
    let update: Arc<str> = format!("update {account} set balance = balance + 1 where id = $1").into();
    let done = Arc::new(AtomicUsize::new(0));
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(seconds);
    let tasks = (0..CLIENTS).map(|_| {
        let (clients, way, done, update) = (clients.clone(), way.clone(), done.clone(), update.clone());
        tokio::spawn(async move {
            let mut connection = clients.acquire().await?;
            while Instant::now() < end {
                transaction(&mut connection, &update, &way).await?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<(), Problem>(())
        })
    });
    for task in futures_util::future::join_all(tasks).await {
        task??;
    }
    Ok(done.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64())
}

async fn transaction(connection: &mut PgConnection, update: &str, way: &Way) -> Result<(), Problem> {
    let number = fastrand::u32(..ACCOUNTS);
    let mut tx = connection.begin().await?;
    sqlx::query(AssertSqlSafe(update)).bind(number as i32).execute(&mut *tx).await?;
    match way {
        Way::Postbox(postbox) => {
            postbox.publish(&mut tx, draft(number as usize)?).await?;
        }
        Way::ByHand(sql) | Way::Function(sql) => {
            sqlx::query(AssertSqlSafe(&**sql)).bind(TOPIC).bind(payload(number as usize)).execute(&mut *tx).await?;
        }
    }
    tx.commit().await?;
    Ok(())
}

pub(crate) async fn in_bulk(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let table = site.table("bulk");
    site.run(&format!(
        "create table {table} (id uuid primary key default gen_random_uuid(), topic text not null,
             payload jsonb not null, created_at timestamptz not null default now())"
    ))
    .await?;
    let fresh = subscribed(site, 1).await?;
    let insert = format!("insert into {table} (topic, payload) select $1, p::jsonb from unnest($2::text[]) p");
    let many = format!("select {}.publish_many($1::jsonb)", fresh.schema);
    let (mut raw, mut library, mut function) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=extent.rounds {
        site.settle_down().await?;
        let payloads: Vec<String> = (0..extent.messages).map(payload).collect();
        let begun = Instant::now();
        for chunk in payloads.chunks(1000) {
            let mut tx = site.pool.begin().await?;
            sqlx::query(AssertSqlSafe(&*insert)).bind(TOPIC).bind(chunk).execute(&mut *tx).await?;
            tx.commit().await?;
        }
        let by_hand = begun.elapsed();

        let drafts: Vec<Draft> = (0..extent.messages).map(draft).collect::<Result<_, _>>()?;
        let begun = Instant::now();
        for chunk in drafts.chunks(1000) {
            let mut tx = site.pool.begin().await?;
            fresh.postbox.publish_all(&mut tx, chunk.iter().cloned()).await?;
            tx.commit().await?;
        }
        let ours = begun.elapsed();

        let arrays: Vec<String> = payloads
            .chunks(1000)
            .map(|chunk| {
                let messages: Vec<String> =
                    chunk.iter().map(|p| format!("{{\"topic\": \"{TOPIC}\", \"payload\": {p}}}")).collect();
                format!("[{}]", messages.join(","))
            })
            .collect();
        let begun = Instant::now();
        for array in arrays {
            let mut tx = site.pool.begin().await?;
            sqlx::query(AssertSqlSafe(&*many)).bind(array).execute(&mut *tx).await?;
            tx.commit().await?;
        }
        let in_sql = begun.elapsed();
        if round > 0 {
            let rate = |took: Duration| extent.messages as f64 / took.as_secs_f64();
            raw.push(rate(by_hand));
            library.push(rate(ours));
            function.push(rate(in_sql));
        }
    }
    fresh.drop(site).await?;
    Ok(vec![
        Figure::beside("bulk publish, library", &library, &raw, "msg/s", Bar::Ratio(0.6)),
        Figure::beside("bulk publish, SQL function publish_many", &function, &raw, "msg/s", Bar::None),
    ])
}
