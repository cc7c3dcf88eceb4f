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

/// Claims that are timed behind a pin, and how many deliveries a claim takes.
const CLAIMS: usize = 300;
const CLAIMED: u32 = 100;
/// What waits at least in front of a small backlog.
const SMALL: usize = 10_000;
/// Turns of a small backlog and a big one, and the claims of each.
const TURNS: usize = 10;
const TURN: usize = 100;
/// Of the small backlog.
const DRAINED: usize = 40_000;
const SHOWS: usize = 1000;
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
    let mut claimer = Claimer::new(&fresh.postbox).await?;
    claimer.claim(CLAIMS).await?;
    let claims = claimer.end().await?;
    if pin != Pin::Nothing {
        sqlx::raw_sql("rollback").execute(&mut *holder).await?;
    }
    drop(holder);
    fresh.drop(site).await?;
    Ok(Passed { rates, claims })
}

/// Claims and settles by hand.
struct Claimer {
    postbox: Postbox<Postgres>,
    registration: Registration,
    wanted: Vec<(SubscriptionId, u32)>,
    /// Milliseconds of each claim.
    took: Vec<f64>,
}

impl Claimer {
    async fn new(postbox: &Postbox<Postgres>) -> Result<Claimer, Problem> {
        let declared = declared("bench", TOPIC, Kind::Plain);
        let registration = Registration {
            application: "bench".into(),
            lease: Duration::from_secs(600),
            ..registration(vec![declared])
        };
        let subscriptions: Vec<SubscriptionId> = postbox.store().register(&registration).await?;
        let wanted = subscriptions.iter().map(|id| (*id, CLAIMED)).collect();
        Ok(Claimer { postbox: postbox.clone(), registration, wanted, took: Vec::new() })
    }

    /// So many claims, one after the other.
    async fn claim(&mut self, claims: usize) -> Result<(), Problem> {
        let store = self.postbox.store();
        for _ in 0..claims {
            let request = ClaimRequest {
                worker: self.registration.worker,
                token: Uuid::now_v7(),
                wanted: self.wanted.clone(),
                metered: Vec::new(),
                by_key: Vec::new(),
                full: Vec::new(),
                sorts: true,
            };
            let begun = Instant::now();
            let claimed = store.claim(&request).await?;
            self.took.push(begun.elapsed().as_secs_f64() * 1000.0);
            if claimed.items.len() != CLAIMED as usize {
                return Err(format!("a claim took {} of {CLAIMED}", claimed.items.len()).into());
            }
            store.settle(&all_succeeded(self.registration.worker, &claimed)).await?;
        }
        Ok(())
    }

    /// Milliseconds of each claim.
    async fn end(self) -> Result<Vec<f64>, Problem> {
        self.postbox.store().retire(self.registration.worker).await?;
        Ok(self.took)
    }
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

/// Claims in front of a big backlog beside claims in front of a small one, in turns; a worker's memory.
pub(crate) async fn backlog(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let waiting = if extent.long { 5_000_000 } else { 200_000.max(extent.messages * 5) };
    let small = Backlog::of(site, SMALL + TURN * CLAIMED as usize).await?;
    let big = Backlog::of(site, waiting).await?;
    let memory = crate::quiet::memory(&big.fresh).await?;
    let mut before_small = Claimer::new(&small.fresh.postbox).await?;
    let mut before_big = Claimer::new(&big.fresh.postbox).await?;
    for turn in 0..TURNS {
        if turn > 0 {
            fill(&small.fresh.postbox, TURN * CLAIMED as usize).await?;
        }
        before_small.claim(TURN).await?;
        before_big.claim(TURN).await?;
    }
    let claims = [before_big.end().await?, before_small.end().await?].map(|took| [percentile(&took, 0.99)]);
    fill(&small.fresh.postbox, DRAINED - SMALL).await?;
    site.settle_down().await?;
    let drains = [small.drain(site, DRAINED).await?, big.drain(site, waiting - TURNS * TURN * CLAIMED as usize).await?];
    let shows = big.shows(waiting).await?;
    small.fresh.drop(site).await?;
    big.fresh.drop(site).await?;
    let name = format!("claim of 100 in front of {waiting}, p99 (baseline: of 10k)");
    let shown = |what: &str, ms| {
        Figure::alone(&format!("show a delivery with {waiting} settled, {what}"), ms, "ms", Bar::AtMost(10.0))
    };
    Ok(vec![
        Figure::beside(&name, &claims[0], &claims[1], "ms", Bar::RatioAtMost(2.0)),
        Figure::alone(&format!("memory of a worker with {waiting} waiting"), memory, "MiB", Bar::AtMost(64.0)),
        Figure::beside(
            &format!("the drain of what is left of {waiting} (baseline: of {DRAINED})"),
            &drains[1..],
            &drains[..1],
            "msg/s",
            Bar::None,
        ),
        shown("p50", median(&shows)),
        shown("p99", percentile(&shows, 0.99)),
    ])
}

/// What waits somewhere.
struct Backlog {
    fresh: Fresh,
    done: Arc<AtomicU64>,
}

impl Backlog {
    async fn of(site: &Site, waiting: usize) -> Result<Backlog, Problem> {
        let fresh = site.fresh().await?;
        let done = Arc::new(AtomicU64::new(0));
        register(&fresh, idle_handler(&done)).await?;
        stuff(site, &fresh, waiting).await?;
        Ok(Backlog { fresh, done })
    }

    /// Until the so many that are left are gone: messages a second.
    async fn drain(&self, site: &Site, left: usize) -> Result<f64, Problem> {
        let start = self.fresh.postbox.worker(idle_handler(&self.done)).concurrency(100).start();
        drained(site, &self.fresh, &self.done, start, left).await
    }

    /// Milliseconds to show one delivery of those that are settled.
    async fn shows(&self, deliveries: usize) -> Result<Vec<f64>, Problem> {
        let mut shows = Vec::with_capacity(SHOWS);
        for number in 0..SHOWS {
            let delivery = (number * 7919 * 6151 % deliveries + 1) as i64;
            let begun = Instant::now();
            let shown = self.fresh.postbox.admin().show(delivery).await?;
            shows.push(begun.elapsed().as_secs_f64() * 1000.0);
            if shown.envelope.is_none() || shown.attempts.is_empty() {
                return Err(format!("delivery {delivery} is not shown with its message and its attempts").into());
            }
        }
        Ok(shows)
    }
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
    // What autovacuum would do of it meanwhile belongs to putting it there.
    site.run(&format!("vacuum analyze {schema}.ready")).await?;
    site.run(&format!("vacuum analyze {schema}.message")).await?;
    site.settle_down().await
}
