//! Where the time of a load goes: the server's processor time, the client's, and what was idle, for each message and
//! beside raw SQL; and which statements the server was at.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use postbox::{Postgres, Router};
use sqlx::{AssertSqlSafe, Row};

use crate::figure::{Bar, Figure};
use crate::load::{drained, idle_handler, raw_drained, raw_queue};
use crate::publish::{Business, Way};
use crate::site::Site;
use crate::{Extent, Problem, drain, publish};

/// Statements that are told of, those that take longest first.
const STATEMENTS: usize = 6;
/// The kernel counts processor time in hundredths of a second, whatever it counts in itself.
const TICKS: f64 = 100.0;
const ROUNDS: usize = 3;

/// Microseconds for each message, of all cores together.
#[derive(Debug, Clone, Copy, Default)]
struct Spent {
    server: f64,
    client: f64,
    idle: f64,
}

/// Processor time at a moment.
struct Meter {
    postmaster: String,
    server: f64,
    client: f64,
    begun: Instant,
}

impl Meter {
    async fn start(site: &Site) -> Result<Meter, Problem> {
        let backend = site.number("pg_catalog.pg_backend_pid()").await?;
        let stat = stat(&format!("{backend:.0}")).ok_or("the server is on another machine, or /proc is not there")?;
        let postmaster = stat.parent.clone();
        let (server, client) = (of_server(&postmaster), of_client());
        Ok(Meter { postmaster, server, client, begun: Instant::now() })
    }

    /// Since then, for each of so many messages.
    fn stop(self, messages: f64) -> Spent {
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let all = self.begun.elapsed().as_secs_f64() * cores;
        let (server, client) = (of_server(&self.postmaster) - self.server, of_client() - self.client);
        let each = |seconds: f64| seconds * 1e6 / messages;
        Spent { server: each(server), client: each(client), idle: each((all - server - client).max(0.0)) }
    }
}

struct Stat {
    parent: String,
    /// Seconds of its own, and of its children that have ended.
    own: f64,
    ended: f64,
}

fn stat(pid: &str) -> Option<Stat> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|t| t.parse::<f64>().ok()).unwrap_or_default() / TICKS;
    Some(Stat { parent: (*fields.get(1)?).to_owned(), own: ticks(11) + ticks(12), ended: ticks(13) + ticks(14) })
}

fn of_client() -> f64 {
    stat("self").map_or(0.0, |stat| stat.own)
}

fn of_server(postmaster: &str) -> f64 {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let stats = processes.filter_map(|entry| stat(entry.file_name().to_str()?));
    let children: f64 = stats.filter(|stat| stat.parent == postmaster).map(|stat| stat.own).sum();
    stat(postmaster).map_or(0.0, |stat| stat.own + stat.ended) + children
}

/// What the rounds of a load have spent, and the statements of the last one of ours.
struct Load {
    name: &'static str,
    raw: Vec<Spent>,
    ours: Vec<Spent>,
    /// What it is, and the server's microseconds for each message.
    statements: Vec<(String, f64)>,
}

impl Load {
    fn new(name: &'static str) -> Load {
        Load { name, raw: Vec::new(), ours: Vec::new(), statements: Vec::new() }
    }

    fn figures(&self) -> Vec<Figure> {
        type Part = fn(&Spent) -> f64;
        let of = |spent: &[Spent], part: Part| spent.iter().map(part).collect::<Vec<_>>();
        let parts: [(&str, Part); 3] = [("server", |s| s.server), ("client", |s| s.client), ("idle", |s| s.idle)];
        let beside = parts.map(|(part, get)| {
            let name = format!("{}: {part}", self.name);
            Figure::beside(&name, &of(&self.ours, get), &of(&self.raw, get), "µs/msg", Bar::None)
        });
        let statements = self.statements.iter();
        let statements = statements.map(|(what, each)| Figure::alone(&format!("  {what}"), *each, "µs/msg", Bar::None));
        beside.into_iter().chain(statements).collect()
    }
}

pub(crate) async fn profile(site: &Site, extent: Extent) -> Result<Vec<Figure>, Problem> {
    let knows = site.run("create extension if not exists pg_stat_statements").await.is_ok();
    let mut figures = Vec::new();
    for load in [
        publishing(site, extent, knows).await?,
        plain(site, extent, knows).await?,
        operations(site, extent, knows).await?,
        transactional(site, extent, knows).await?,
    ] {
        figures.extend(load.figures());
    }
    Ok(figures)
}

/// What a round has spent on so many messages.
async fn metered(
    site: &Site,
    messages: usize,
    round: impl Future<Output = Result<f64, Problem>>,
) -> Result<Spent, Problem> {
    let meter = Meter::start(site).await?;
    round.await?;
    Ok(meter.stop(messages as f64))
}

async fn publishing(site: &Site, extent: Extent, knows: bool) -> Result<Load, Problem> {
    let mut load = Load::new("publish in a transaction");
    let business = Business::new(site).await?;
    let fresh = publish::subscribed(site, 1).await?;
    let ours = Way::Postbox(Box::new(fresh.postbox.clone()));
    let clients = site.clients(publish::CLIENTS).await?;
    for round in 0..=extent.rounds.min(ROUNDS) {
        for (spent, way) in [(&mut load.raw, &business.by_hand), (&mut load.ours, &ours)] {
            forget(site, knows).await?;
            let meter = Meter::start(site).await?;
            let published =
                publish::transactions(&clients, &business.account, way, extent.seconds).await? * extent.seconds;
            let each = meter.stop(published);
            load.statements = statements(site, knows, published).await?;
            // The first one warms up.
            if round > 0 {
                spent.push(each);
            }
        }
    }
    clients.close().await;
    fresh.drop(site).await?;
    Ok(load)
}

async fn plain(site: &Site, extent: Extent, knows: bool) -> Result<Load, Problem> {
    let done = Arc::new(AtomicU64::new(0));
    beside_raw_drains(Load::new("drain, plain handlers"), site, extent, knows, &done, &|| idle_handler(&done)).await
}

async fn operations(site: &Site, extent: Extent, knows: bool) -> Result<Load, Problem> {
    let done = Arc::new(AtomicU64::new(0));
    beside_raw_drains(Load::new("drain, operations"), site, extent, knows, &done, &|| drain::idle_operation(&done))
        .await
}

async fn beside_raw_drains(
    mut load: Load,
    site: &Site,
    extent: Extent,
    knows: bool,
    done: &AtomicU64,
    routes: &(dyn Fn() -> Router<Postgres> + Sync),
) -> Result<Load, Problem> {
    let messages = extent.messages;
    for _ in 0..extent.rounds.min(ROUNDS) {
        let table = raw_queue(site, messages).await?;
        load.raw.push(metered(site, messages, raw_drained(site, &table, messages)).await?);
        load.ours.push(ours(site, messages, knows, 100, done, routes, &mut load.statements).await?);
    }
    Ok(load)
}

async fn transactional(site: &Site, extent: Extent, knows: bool) -> Result<Load, Problem> {
    let mut load = Load::new("drain, transactional handlers");
    let messages = extent.messages / 10;
    let (insert, done) = (drain::effect(site).await?, Arc::new(AtomicU64::new(0)));
    let routes = || drain::inserting(&insert, &done);
    for _ in 0..extent.rounds.min(ROUNDS) {
        let table = raw_queue(site, messages).await?;
        load.raw.push(metered(site, messages, drain::raw_transactions(site, &table, &insert, messages)).await?);
        load.ours.push(ours(site, messages, knows, drain::AT_ONCE, &done, &routes, &mut load.statements).await?);
    }
    Ok(load)
}

/// A backlog of our own, drained.
async fn ours(
    site: &Site,
    messages: usize,
    knows: bool,
    at_once: u32,
    done: &AtomicU64,
    routes: &(dyn Fn() -> Router<Postgres> + Sync),
    said: &mut Vec<(String, f64)>,
) -> Result<Spent, Problem> {
    let fresh = drain::filled(site, routes(), messages, true).await?;
    forget(site, knows).await?;
    let start = fresh.postbox.worker(routes()).concurrency(at_once as usize).start();
    let spent = metered(site, messages, drained(site, &fresh, done, start, messages)).await?;
    *said = statements(site, knows, messages as f64).await?;
    fresh.drop(site).await?;
    Ok(spent)
}

/// What the statements have taken so far is forgotten.
async fn forget(site: &Site, knows: bool) -> Result<(), Problem> {
    match knows {
        true => site.run("select pg_stat_statements_reset()").await,
        false => Ok(()),
    }
}

/// The statements that took longest, by the comment they begin with, else by their first words.
async fn statements(site: &Site, knows: bool, messages: f64) -> Result<Vec<(String, f64)>, Problem> {
    if !knows {
        return Ok(Vec::new());
    }
    let sql = "select case when s.query like '--%' then pg_catalog.substring(s.query, '^-- ([^.\\n]*)')
                else pg_catalog.left(pg_catalog.regexp_replace(s.query, '\\s+', ' ', 'g'), 44) end as what,
            pg_catalog.sum(s.total_exec_time)::float8 * 1000 as took
        from pg_stat_statements s where s.dbid = (select oid from pg_catalog.pg_database where datname = current_database())
        group by 1 order by 2 desc limit $1";
    let rows = sqlx::query(AssertSqlSafe(sql)).bind(STATEMENTS as i64).fetch_all(&site.pool).await?;
    let read = |row: &sqlx::postgres::PgRow| Ok((row.try_get("what")?, row.try_get::<f64, _>("took")? / messages));
    rows.iter().map(read).collect()
}
