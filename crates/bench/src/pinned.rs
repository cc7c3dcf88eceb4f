//! What ages a queue: a transaction that pins the horizon, so that nothing dead can be removed, and a big
//! backlog.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postbox::lifecycle::Kind;
use postbox::store::{ClaimRequest, Claimed, LeaseRef, Registration, Settle, Store, SubscriptionId};
use postbox::{Draft, Postbox, Postgres};
use postbox_testkit::hand::{declared, registration, success};
use sqlx::postgres::PgConnection;
use uuid::Uuid;

use crate::figure::{Bar, Figure, median, percentile};
use crate::load::{TOPIC, draft, drained, fill, idle_handler, on_record, register, succeeded};
use crate::plot::Curve;
use crate::site::{Fresh, Site};
use crate::{Extent, Problem};

/// Claims that are timed, and how many deliveries each takes.
const CLAIMS: usize = 300;
const CLAIMED: u32 = 100;
/// Chunks at the start and at the end that a rate is the median of.
const EDGE: usize = 5;

/// What holds the horizon back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pin {
    Nothing,
    /// A read-only transaction with a snapshot: a long report, a forgotten `psql`.
    Snapshot,
    /// A transaction that has written once, and idles.
    Writer,
}

impl Pin {
    fn name(self) -> &'static str {
        match self {
            Pin::Nothing => "not pinned",
            Pin::Snapshot => "pinned by a snapshot",
            Pin::Writer => "pinned by an idle writer",
        }
    }

    async fn hold(self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        let sql = match self {
            Pin::Nothing => return Ok(()),
            Pin::Snapshot => {
                "begin isolation level repeatable read read only; select count(*) from pg_catalog.pg_namespace"
            }
            Pin::Writer => "begin; select pg_catalog.pg_current_xact_id()",
        };
        sqlx::raw_sql(sql).execute(connection).await?;
        Ok(())
    }
}

/// What came of one way to pin it.
struct Passed {
    /// Messages a second, chunk by chunk.
    rates: Vec<f64>,
    /// Milliseconds of each claim, at the end.
    claims: Vec<f64>,
}

pub(crate) async fn pinned(site: &Site, extent: Extent) -> Result<(Vec<Figure>, Vec<Curve>), Problem> {
    let free = pass(site, extent, Pin::Nothing).await?;
    let (mut figures, mut curves) = (Vec::new(), Vec::new());
    let usual = vec![median(&free.rates)];
    let usual_claim = vec![percentile(&free.claims, 0.99)];
    for pin in [Pin::Snapshot, Pin::Writer] {
        let held = pass(site, extent, pin).await?;
        let (start, end) = (first(&held.rates), last(&held.rates));
        for (when, rate) in [("at the start", start), ("after 1M messages", end)] {
            let name = format!("drain, horizon {}, {when}", pin.name());
            figures.push(Figure::beside(&name, &[rate], &usual, "msg/s", Bar::Ratio(0.9)));
        }
        let name = format!("claim of 100, horizon {}, p99", pin.name());
        figures.push(Figure::beside(
            &name,
            &[percentile(&held.claims, 0.99)],
            &usual_claim,
            "ms",
            Bar::RatioAtMost(2.0),
        ));
        curves.push(Curve { name: pin.name().into(), values: held.rates });
    }
    curves.insert(0, Curve { name: Pin::Nothing.name().into(), values: free.rates });
    Ok((figures, curves))
}

fn first(rates: &[f64]) -> f64 {
    median(&rates[..EDGE.min(rates.len())])
}

fn last(rates: &[f64]) -> f64 {
    median(&rates[rates.len().saturating_sub(EDGE)..])
}

/// A million messages, chunk by chunk, through one worker.
async fn pass(site: &Site, extent: Extent, pin: Pin) -> Result<Passed, Problem> {
    let chunk = extent.messages / 2;
    let fresh = site.fresh().await?;
    let done = Arc::new(AtomicU64::new(0));
    register(&fresh, idle_handler(&done)).await?;
    site.settle_down().await?;
    let mut holder = site.pool.acquire().await?;
    pin.hold(&mut holder).await?;
    let worker = fresh.postbox.worker(idle_handler(&done)).concurrency(100).start().await?;
    let mut rates = Vec::new();
    for _ in 0..20 {
        let before = (done.load(Ordering::Relaxed), succeeded(site, &fresh).await?);
        let mut tx = site.pool.begin().await?;
        let drafts: Vec<Draft> = (0..chunk).map(draft).collect::<Result<_, _>>()?;
        fresh.postbox.publish_all(&mut tx, drafts).await?;
        tx.commit().await?;
        let begun = Instant::now();
        on_record(site, &fresh, &done, before, chunk).await?;
        let took = begun.elapsed();
        rates.push(chunk as f64 / took.as_secs_f64());
    }
    worker.stop(None).await?;
    fill(&fresh.postbox, CLAIMS * CLAIMED as usize).await?;
    let claims = claims(&fresh.postbox).await?;
    if pin != Pin::Nothing {
        sqlx::raw_sql("rollback").execute(&mut *holder).await?;
    }
    drop(holder);
    fresh.drop(site).await?;
    Ok(Passed { rates, claims })
}

/// Claims and settles by hand: milliseconds of each claim.
async fn claims(postbox: &Postbox<Postgres>) -> Result<Vec<f64>, Problem> {
    let declared = declared("bench", TOPIC, Kind::Plain);
    let registration =
        Registration { application: "bench".into(), lease: Duration::from_secs(600), ..registration(vec![declared]) };
    let store = postbox.store();
    let subscriptions: Vec<SubscriptionId> = store.register(&registration).await?;
    let wanted: Vec<(SubscriptionId, u32)> = subscriptions.iter().map(|id| (*id, CLAIMED)).collect();
    let mut took = Vec::with_capacity(CLAIMS);
    for _ in 0..CLAIMS {
        let request = ClaimRequest {
            worker: registration.worker,
            token: Uuid::now_v7(),
            wanted: wanted.clone(),
            metered: Vec::new(),
            by_key: Vec::new(),
            full: Vec::new(),
            sorts: true,
        };
        let begun = Instant::now();
        let claimed = store.claim(&request).await?;
        took.push(begun.elapsed().as_secs_f64() * 1000.0);
        if claimed.items.len() != CLAIMED as usize {
            return Err(format!("a claim took {} of {CLAIMED}", claimed.items.len()).into());
        }
        store.settle(&all_succeeded(registration.worker, &claimed)).await?;
    }
    store.retire(registration.worker).await?;
    Ok(took)
}

fn all_succeeded(worker: Uuid, claimed: &Claimed) -> Settle {
    Settle {
        lease: LeaseRef { worker, batch: claimed.batch, token: claimed.token },
        part: 0,
        successes: claimed.items.iter().map(success).collect(),
        moves: Vec::new(),
        released: Vec::new(),
        seen: Vec::new(),
        follow_ups: Vec::new(),
        starts: Vec::new(),
        close: true,
    }
}

/// Claims in front of a big backlog beside claims in front of a small one, and a worker's memory.
pub(crate) async fn backlog(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let big = if extent.long { 5_000_000 } else { 50_000.max(extent.messages * 5) };
    let small = in_front_of(site, CLAIMS * CLAIMED as usize + 10_000).await?;
    let big_one = in_front_of(site, big).await?;
    let p99 = |claims: &[f64]| percentile(claims, 0.99);
    let name = format!("claim of 100 in front of {big}, p99 (baseline: of 10k)");
    Ok(vec![
        Figure::beside(&name, &[p99(&big_one.claims)], &[p99(&small.claims)], "ms", Bar::RatioAtMost(2.0)),
        Figure::alone(&format!("memory of a worker with {big} waiting"), big_one.memory, "MiB", Bar::AtMost(64.0)),
        Figure::beside(
            &format!("the drain of all {big} (baseline: of 40k)"),
            &[big_one.drain],
            &[small.drain],
            "msg/s",
            Bar::None,
        ),
        Figure::alone(
            &format!("show a delivery with {big} settled, p50"),
            crate::figure::median(&big_one.shows),
            "ms",
            Bar::AtMost(10.0),
        ),
        Figure::alone(
            &format!("show a delivery with {big} settled, p99"),
            p99(&big_one.shows),
            "ms",
            Bar::AtMost(10.0),
        ),
    ])
}

/// What it is like in front of a backlog, and behind it.
struct Backlog {
    /// Milliseconds of each claim.
    claims: Vec<f64>,
    /// MiB that a worker takes.
    memory: f64,
    /// Messages a second until it is gone.
    drain: f64,
    /// Milliseconds to show one delivery of those that are settled.
    shows: Vec<f64>,
}

async fn in_front_of(site: &Site, waiting: usize) -> Result<Backlog, Problem> {
    let fresh = site.fresh().await?;
    let done = Arc::new(AtomicU64::new(0));
    register(&fresh, idle_handler(&done)).await?;
    stuff(site, &fresh, waiting).await?;
    let memory = crate::quiet::memory(&fresh).await?;
    let claims = claims(&fresh.postbox).await?;
    let left = waiting - CLAIMS * CLAIMED as usize;
    let start = fresh.postbox.worker(idle_handler(&done)).concurrency(100).start();
    let drain = drained(site, &fresh, &done, start, left).await?;
    let mut shows = Vec::with_capacity(CLAIMS);
    for number in 0..CLAIMS {
        let delivery = (number * 7919 * 6151 % waiting + 1) as i64;
        let begun = Instant::now();
        let shown = fresh.postbox.admin().show(delivery).await?;
        shows.push(begun.elapsed().as_secs_f64() * 1000.0);
        if shown.envelope.is_none() || shown.attempts.is_empty() {
            return Err(format!("delivery {delivery} is not shown with its message and its attempts").into());
        }
    }
    fresh.drop(site).await?;
    Ok(Backlog { claims, memory, drain, shows })
}

/// A backlog, put there in one statement: what it costs to publish it is another figure.
async fn stuff(site: &Site, fresh: &Fresh, messages: usize) -> Result<(), Problem> {
    fill(&fresh.postbox, 1).await?;
    let schema = &fresh.schema;
    site.run(&format!(
        "with made as (
             select {schema}.uuid7() as id, n, nextval('{schema}.delivery_id') as delivery
             from generate_series(1, {messages} - 1) n
         ), stored as (
             insert into {schema}.message (id, epoch, topic, payload, delivery)
             select made.id, m.epoch, m.topic, m.payload, made.delivery
             from made cross join (select * from {schema}.message limit 1) m
         )
         insert into {schema}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
         select r.subscription, 0, (made.delivery >> 20) & 3, made.delivery, made.delivery, made.id, 0, 0, 0
         from made cross join (select * from {schema}.ready limit 1) r"
    ))
    .await?;
    site.run(&format!("vacuum analyze {schema}.ready")).await?;
    site.settle_down().await
}
