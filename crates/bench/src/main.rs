//! The benchmark: each figure of postbox beside raw SQL in the same run, on one machine.
//!
//! `docs/performance.md` says what the figures mean.

#![allow(clippy::print_stdout, reason = "the figures go to standard output")]

mod batches;
mod drain;
mod figure;
mod limits;
mod load;
mod order;
mod pinned;
mod plot;
mod profile;
mod publish;
mod quiet;
mod site;
mod sqlite;
mod streams;

use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use tracing_subscriber::filter::LevelFilter;

use crate::figure::Figure;
use crate::site::Site;

pub(crate) type Problem = Box<dyn std::error::Error + Send + Sync>;

/// Measures postbox beside raw SQL, in turns, in one run.
///
/// It starts a private PostgreSQL, or takes the server at DATABASE_URL, where it works in schemas of its
/// own and drops them. It exits with 1 if a bar was missed, and with 2 if it could not measure.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Cli {
    /// What to measure.
    #[arg(value_enum, default_values_t = [Part::All])]
    parts: Vec<Part>,
    /// The big ones as well: a backlog of five million.
    #[arg(long)]
    long: bool,
    /// One JSON object a line for each figure; everything else goes to stderr.
    #[arg(long)]
    json: bool,
    /// Fewer and shorter rounds: to see that it runs, not for figures.
    #[arg(long)]
    quick: bool,
    /// Writes plots of the figures into this folder, as SVG.
    #[arg(long, value_name = "FOLDER")]
    plots: Option<std::path::PathBuf>,
    /// Measures nothing: draws the ratios of an earlier run, of which this file has what `--json` printed.
    #[arg(long, value_name = "FILE", requires = "plots")]
    from: Option<std::path::PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Everything.
    All,
    /// Publishing in business transactions, and in bulk.
    Publish,
    /// Plain handlers, operations, transactional handlers, and the WAL of a whole cycle.
    Drain,
    /// Order per key.
    Order,
    /// What a limit across all workers costs.
    Limits,
    /// Batch handlers beside handlers of single messages.
    Batches,
    /// A transaction that pins the horizon, while many messages pass.
    Pinned,
    /// A big backlog, and a worker's memory in front of it.
    Backlog,
    /// Latency, and what an idle worker costs.
    Quiet,
    /// The embedded store.
    Sqlite,
    /// Redis into handled.
    RedisIn,
    /// A relay to Redis.
    Relay,
    /// Where the time goes: processor time of server and client, what was idle, and the statements. Not part of `all`.
    Profile,
}

/// How long and how often.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent {
    /// Rounds of each kind, taken in turns.
    pub(crate) rounds: usize,
    /// Seconds of a round that has a duration.
    pub(crate) seconds: f64,
    /// Messages in a round that has a number.
    pub(crate) messages: usize,
    pub(crate) long: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(LevelFilter::ERROR).init();
    let arguments: Vec<String> = std::env::args().collect();
    // The same program as a worker in a process of its own; started by itself only.
    if let [_, role, url, schema, subscriptions] = &arguments[..]
        && role == "worker-apart"
    {
        let subscriptions = subscriptions.parse().unwrap_or(1);
        return match quiet::apart(url, schema, subscriptions).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("bench: the worker apart: {error}");
                ExitCode::from(2)
            }
        };
    }
    let cli = Cli::parse();
    match run(&cli).await {
        Ok(figures) if figures.iter().all(|f| f.ok != Some(false)) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(2)
        }
    }
}

async fn run(cli: &Cli) -> Result<Vec<Figure>, Problem> {
    if let (Some(file), Some(folder)) = (&cli.from, &cli.plots) {
        let text = std::fs::read_to_string(file)?;
        let figures = text.lines().map(serde_json::from_str).collect::<Result<Vec<Figure>, _>>()?;
        plot::write(folder, &figures, &[])?;
        return Ok(Vec::new());
    }
    let extent = match cli.quick {
        true => Extent { rounds: 1, seconds: 0.5, messages: 5_000, long: false },
        false => Extent { rounds: 5, seconds: 3.0, messages: 60_000, long: cli.long },
    };
    let wants = |part| cli.parts.contains(&Part::All) || cli.parts.contains(&part);
    let begun = Instant::now();
    let site = Site::open().await?;
    eprintln!("postbox {} on {}", env!("CARGO_PKG_VERSION"), site::machine());
    eprintln!("{}", site.settings().await?);
    if cfg!(debug_assertions) {
        eprintln!("a debug build: say --release for figures");
    }
    if !cli.json {
        println!("{}", Figure::head());
    }
    let mut figures = Vec::new();
    let mut told_at = Instant::now();
    let mut tell = |part: Vec<Figure>| -> Result<(), Problem> {
        eprintln!("{:.0} s:", told_at.elapsed().as_secs_f64());
        told_at = Instant::now();
        for figure in part {
            match cli.json {
                true => println!("{}", serde_json::to_string(&figure)?),
                false => println!("{}", figure.line()),
            }
            std::io::stdout().flush()?;
            figures.push(figure);
        }
        Ok(())
    };
    if wants(Part::Publish) {
        tell(publish::in_transactions(&site, extent).await?)?;
        tell(publish::in_bulk(&site, extent).await?)?;
    }
    if wants(Part::Drain) {
        tell(drain::plain(&site, extent).await?)?;
        tell(drain::operations(&site, extent).await?)?;
        tell(drain::transactional(&site, extent).await?)?;
        tell(drain::wal(&site, extent).await?)?;
    }
    if wants(Part::Order) {
        tell(order::drain(&site, extent).await?)?;
    }
    if wants(Part::Limits) {
        tell(limits::cost(&site, extent).await?)?;
    }
    if wants(Part::Batches) {
        tell(batches::idle(&site, extent).await?)?;
        tell(batches::plain(&site, extent).await?)?;
        tell(batches::transactional(&site, extent).await?)?;
    }
    let mut curves = Vec::new();
    if wants(Part::Pinned) {
        let (part, drawn) = pinned::pinned(&site, extent).await?;
        curves = drawn;
        tell(part)?;
    }
    if wants(Part::Backlog) {
        tell(pinned::backlog(&site, extent).await?)?;
    }
    if wants(Part::Quiet) {
        tell(quiet::latency(&site, extent).await?)?;
        tell(quiet::idle(&site, extent).await?)?;
    }
    if wants(Part::Sqlite) {
        tell(sqlite::drain(extent).await?)?;
    }
    if wants(Part::RedisIn) {
        tell(streams::into_handled(&site, extent).await?)?;
    }
    if wants(Part::Relay) {
        tell(streams::relayed(&site, extent).await?)?;
    }
    if cli.parts.contains(&Part::Profile) {
        tell(profile::profile(&site, extent).await?)?;
    }
    site.close().await?;
    if let Some(folder) = &cli.plots {
        plot::write(folder, &figures, &curves)?;
    }
    eprintln!("{:.0} s in all", begun.elapsed().as_secs_f64());
    Ok(figures)
}
