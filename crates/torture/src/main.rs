//! The history checker: publishers, workers and a fake remote as child processes, faults by seed, three
//! witnesses outside of postbox, and at the end a check of every promise against what they saw.
//!
//! `docs/reliability.md` says what is promised, and what each fault does here.

mod check;
mod child;
mod disk;
mod disturb;
mod dump;
mod fault;
mod full;
mod ground;
mod history;
mod log;
mod operator;
mod plan;
mod point;
mod proxy;
mod round;
mod scenario;
mod site;
mod slot;
mod traffic;
mod world;

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, Subcommand};
use postbox::{Postgres, Sqlite};
use serde::Serialize;

use crate::child::ChildPlan;
use crate::fault::{Fault, Kind, Wanted};
use crate::round::{Outcome, lacking, missing, play};
use crate::scenario::{Part, Scenario, Setting};
use crate::world::{Counts, World};

/// Longer runs are made of rounds of this length, each on a fresh database.
const ROUND: Duration = Duration::from_secs(1200);

/// Runs publishers, workers and a fake remote under faults, and holds postbox to its promises.
///
/// It starts servers of its own (PostgreSQL, pgbouncer) and kills them: no other database is touched.
/// It prints its seed first; the same seed gives the same schedule of faults and the same traffic.
/// It exits with 1 if anything was broken, and a fault that was wanted and never took effect counts.
#[derive(Debug, Parser)]
#[command(name = "torture", version, args_conflicts_with_subcommands = true)]
struct Cli {
    /// What follows from chance follows from this; without it, a random one.
    #[arg(long)]
    seed: Option<u64>,
    /// What it is about: everything at once, or one promise by itself.
    #[arg(long, value_enum, default_value_t = Scenario::Mix)]
    scenario: Scenario,
    /// How long the faults last; healing and checking come after: 90, 60s, 5m, 1h.
    #[arg(long = "for", value_name = "TIME", default_value = "60s", value_parser = time)]
    span: Duration,
    /// Which store.
    #[arg(long, value_enum, default_value_t = Kind::Postgres)]
    store: Kind,
    /// `all` (those that there are on the store), `none`, or a list like F1,F3.
    #[arg(long, default_value = "all")]
    faults: Wanted,
    /// The last line on stdout is one JSON object; everything else goes to stderr.
    #[arg(long)]
    json: bool,
    /// Keeps the folder with the logs, what the checker went by, and the databases.
    #[arg(long)]
    keep: bool,
    /// Whether a disk of its own can be had; started by itself only.
    #[arg(long, hide = true)]
    try_disk: bool,
    #[command(subcommand)]
    child: Option<ChildCommand>,
}

/// The same program in its other roles; started by itself only.
#[derive(Debug, Subcommand)]
enum ChildCommand {
    #[command(hide = true)]
    Publisher { plan: String },
    #[command(hide = true)]
    Worker { plan: String },
    #[command(hide = true)]
    Puller { plan: String },
    #[command(hide = true)]
    Remote { plan: String },
    #[command(hide = true)]
    Migrate { plan: String },
    #[command(hide = true)]
    Member { plan: String },
}

fn time(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| format!("`{text}` is no time; write it like 60s, 5m or 1h"))?;
    let seconds = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        unit => return Err(format!("`{unit}` is no unit; there are s, m and h")),
    };
    match number.saturating_mul(seconds) {
        0 => Err("the faults must last for a second at least".into()),
        seconds => Ok(Duration::from_secs(seconds)),
    }
}

/// The last line.
#[derive(Debug, Serialize)]
struct Report {
    seed: u64,
    scenario: Scenario,
    store: Kind,
    seconds: f64,
    messages: u64,
    operations: u64,
    faults: BTreeMap<String, u64>,
    in_doubt: u64,
    broken: Vec<String>,
    /// Faults that cannot be had here, and why.
    not_available: Absent,
    /// Figures of a scenario.
    measured: BTreeMap<String, f64>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // This is for a process without threads.
    if cli.try_disk {
        return disk::attempt();
    }
    let absent = match not_available(&cli) {
        Ok(absent) => absent,
        Err(error) => return failed(&error),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&format!("no runtime: {error}")),
    };
    let result = match cli.child {
        Some(child) => runtime.block_on(run_child(child)).map(|()| true),
        None => runtime.block_on(async {
            let run = async {
                match cli.scenario {
                    Scenario::Mix => run(cli, absent).await,
                    _ => run_scenario(cli).await,
                }
            };
            tokio::select! {
                result = run => result,
                () = interrupted() => Err("interrupted; nothing was checked".into()),
            }
        }),
    };
    // Children that are stopped or deaf go, too.
    drop(runtime);
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => failed(&error),
    }
}

/// Faults that a run which wants all goes without, and why. One that names them cannot run.
type Absent = BTreeMap<&'static str, String>;

fn not_available(cli: &Cli) -> Result<Absent, String> {
    let mut absent = Absent::new();
    if cli.scenario != Scenario::Mix {
        return match cli.faults {
            Wanted::All => Ok(absent),
            Wanted::Some(_) => Err("a scenario has its own faults; --faults is for the mix".into()),
        };
    }
    if cli.child.is_none()
        && cli.faults.on(cli.store)?.contains(&Fault::F16)
        && let Err(why) = disk::prepare()
    {
        if cli.faults != Wanted::All {
            return Err(format!("F16 needs a disk of its own: {why}; run it as root, or leave F16 out"));
        }
        absent.insert(Fault::F16.id(), why);
    }
    Ok(absent)
}

/// SIGINT or SIGTERM.
async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(mut interrupt), Ok(mut terminate)) => {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        _ => std::future::pending().await,
    }
}

fn failed(error: &str) -> ExitCode {
    eprintln!("torture: {error}");
    ExitCode::from(2)
}

async fn run_child(command: ChildCommand) -> Result<(), String> {
    if let ChildCommand::Member { plan } = &command {
        let part: Part =
            serde_json::from_str(plan).map_err(|e| format!("this role is started by the program itself: {e}"))?;
        tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
        let ended = match part.kind {
            Kind::Postgres => scenario::member::<Postgres>(part).await,
            Kind::Sqlite => scenario::member::<Sqlite>(part).await,
        };
        return ended.map_err(|e| e.to_string());
    }
    let (ChildCommand::Publisher { plan }
    | ChildCommand::Worker { plan }
    | ChildCommand::Puller { plan }
    | ChildCommand::Remote { plan }
    | ChildCommand::Migrate { plan }
    | ChildCommand::Member { plan }) = &command;
    let plan: ChildPlan =
        serde_json::from_str(plan).map_err(|e| format!("this role is started by the program itself: {e}"))?;
    tracing_subscriber::fmt().with_writer(child::stderr::Log::of(&plan)).with_ansi(false).init();
    let ended = match (&command, plan.kind) {
        (ChildCommand::Publisher { .. }, Kind::Postgres) => child::publisher::run::<Postgres>(plan).await,
        (ChildCommand::Publisher { .. }, Kind::Sqlite) => child::publisher::run::<Sqlite>(plan).await,
        (ChildCommand::Worker { .. }, Kind::Postgres) => child::worker::run::<Postgres>(plan).await,
        (ChildCommand::Worker { .. }, Kind::Sqlite) => child::worker::run::<Sqlite>(plan).await,
        (ChildCommand::Puller { .. }, Kind::Postgres) => child::puller::run::<Postgres>(plan).await,
        (ChildCommand::Puller { .. }, Kind::Sqlite) => child::puller::run::<Sqlite>(plan).await,
        (ChildCommand::Remote { .. }, Kind::Postgres) => child::remote::run::<Postgres>(plan).await,
        (ChildCommand::Remote { .. }, Kind::Sqlite) => child::remote::run::<Sqlite>(plan).await,
        (ChildCommand::Migrate { .. }, Kind::Postgres) => child::migrate::<Postgres>(plan).await,
        (ChildCommand::Migrate { .. }, Kind::Sqlite) => child::migrate::<Sqlite>(plan).await,
        (ChildCommand::Member { .. }, _) => return Ok(()),
    };
    ended.map_err(|e| e.to_string())
}

/// Whether the promises of a scenario were kept.
async fn run_scenario(cli: Cli) -> Result<bool, String> {
    let seed = cli.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    let name = clap::ValueEnum::to_possible_value(&cli.scenario).map_or_else(String::new, |v| v.get_name().to_owned());
    eprintln!("seed {seed}, {}, {} s, scenario {name}", cli.store, cli.span.as_secs());
    let folder = tempfile::Builder::new().prefix("postbox-torture-").tempdir().map_err(|e| format!("a folder: {e}"))?;
    let begun = std::time::Instant::now();
    let counts = Arc::new(Counts::default());
    let setting = Setting { kind: cli.store, seed, span: cli.span, folder: folder.path(), counts: counts.clone() };
    let mut found = scenario::play(cli.scenario, setting).await.unwrap_or_else(|error| scenario::Found {
        broken: vec![format!("the run itself did not come to its end: {error}")],
        ..scenario::Found::default()
    });
    found.broken.iter().for_each(|broken| eprintln!("broken: {broken}"));
    if cli.keep || !found.broken.is_empty() {
        eprintln!("the logs are kept in {}", folder.keep().display());
    }
    let report = Report {
        seed,
        scenario: cli.scenario,
        store: cli.store,
        seconds: (begun.elapsed().as_secs_f64() * 10.0).round() / 10.0,
        messages: found.messages,
        operations: 0,
        faults: counts.all(),
        in_doubt: 0,
        broken: std::mem::take(&mut found.broken),
        not_available: Absent::new(),
        measured: found.measured,
    };
    tell(&report, cli.json)?;
    Ok(report.broken.is_empty())
}

/// Whether every promise was kept.
async fn run(cli: Cli, absent: Absent) -> Result<bool, String> {
    let seed = cli.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    let mut faults = cli.faults.on(cli.store)?;
    faults.retain(|fault| !absent.contains_key(fault.id()));
    let list: Vec<&str> = faults.iter().map(|f| f.id()).collect();
    let list = if list.is_empty() { "none".to_owned() } else { list.join(",") };
    eprintln!("seed {seed}, {}, {} s, faults {list}", cli.store, cli.span.as_secs());
    for (fault, why) in &absent {
        eprintln!("{fault} is not available here: {why}");
    }
    let folder = tempfile::Builder::new().prefix("postbox-torture-").tempdir().map_err(|e| format!("a folder: {e}"))?;
    let world = Arc::new(World::start(cli.store, faults, folder.path(), cli.keep, cli.span).await?);
    let begun = std::time::Instant::now();
    let mut sum = Outcome::default();
    let (mut left, mut number, mut known) = (cli.span, 0, 0);
    while !left.is_zero() {
        let span = left.min(ROUND);
        left -= span;
        let seed = seed.wrapping_add(u64::from(number).wrapping_mul(0x9e37_79b9));
        if number > 0 {
            eprintln!("round {number}: seed {seed} for {} s", span.as_secs());
        }
        let outcome = match cli.store {
            Kind::Postgres => play::<Postgres>(&world, number, seed, span, left.is_zero(), cli.span).await,
            Kind::Sqlite => play::<Sqlite>(&world, number, seed, span, left.is_zero(), cli.span).await,
        };
        let outcome = match outcome {
            Ok(outcome) => outcome,
            // What was found before is not forgotten, nor are the logs.
            Err(error) => {
                world.broken(format!("the run itself: round {number} did not come to its end: {error}"));
                break;
            }
        };
        let line = format!(
            "round {number}: {} messages, {} operations, {} in doubt, {} broken",
            outcome.messages,
            outcome.operations,
            outcome.in_doubt,
            outcome.broken.len()
        );
        eprintln!("{line}");
        for broken in &outcome.broken {
            eprintln!("broken: {broken}");
        }
        let clean = outcome.broken.is_empty() && world.all_broken().len() == known;
        known = world.all_broken().len();
        sum.messages += outcome.messages;
        sum.operations += outcome.operations;
        sum.in_doubt += outcome.in_doubt;
        sum.broken.extend(outcome.broken);
        if clean && !cli.keep {
            tidy(&world, number);
        }
        number += 1;
    }
    let mut broken = world.all_broken();
    broken.append(&mut sum.broken);
    broken.extend(missing(&world, cli.span).into_iter().map(|id| format!("{id} was wanted and never took effect")));
    broken.extend(lacking(&world, cli.span).into_iter().map(|what| format!("{what} was never there")));
    if cli.keep || !broken.is_empty() {
        eprintln!("the logs are kept in {}", folder.keep().display());
    }
    let report = Report {
        seed,
        scenario: Scenario::Mix,
        store: cli.store,
        seconds: (begun.elapsed().as_secs_f64() * 10.0).round() / 10.0,
        messages: sum.messages,
        operations: sum.operations,
        faults: counted(&world),
        in_doubt: sum.in_doubt,
        broken,
        not_available: absent,
        measured: BTreeMap::new(),
    };
    tell(&report, cli.json)?;
    Ok(report.broken.is_empty())
}

/// Each wanted fault and each part of one, with its hits; none is 0.
fn counted(world: &World) -> BTreeMap<String, u64> {
    let mut all = world.counts.all();
    for fault in &world.faults {
        all.entry(fault.id().to_owned()).or_default();
        for part in fault.parts(world.kind).into_iter().map(str::to_owned).chain(fault.small_parts()) {
            all.entry(format!("{fault}:{part}")).or_default();
        }
    }
    all
}

/// A round that kept every promise leaves nothing.
fn tidy(world: &World, round: u32) {
    std::fs::remove_dir_all(world.folder.join(format!("round-{round}"))).ok();
    for file in world.files_of(round) {
        std::fs::remove_file(file).ok();
    }
}

fn tell(report: &Report, json: bool) -> Result<(), String> {
    let mut text = String::new();
    if json {
        text = serde_json::to_string(report).map_err(|e| e.to_string())?;
    } else {
        match report.scenario {
            Scenario::Mix => text.push_str(&format!(
                "{} messages, {} operations, {} of them in doubt for a while, in {} s\n",
                report.messages, report.operations, report.in_doubt, report.seconds
            )),
            _ => text.push_str(&format!("{} messages, in {} s\n", report.messages, report.seconds)),
        }
        for (fault, hits) in &report.faults {
            let what = fault.parse::<Fault>().map_or("", Fault::what);
            text.push_str(&format!("{hits:>8}  {fault:<24} {what}\n"));
        }
        for (what, value) in &report.measured {
            text.push_str(&format!("{value:>8}  {what}\n"));
        }
        for (fault, why) in &report.not_available {
            text.push_str(&format!("{fault} was not tested, it is not available here: {why}\n"));
        }
        for broken in &report.broken {
            text.push_str(&format!("broken: {broken}\n"));
        }
        text.push_str(match report.broken.len() {
            0 if report.not_available.is_empty() => "every promise was kept",
            0 => "every promise was kept, as far as it was tested",
            _ => "promises were broken",
        });
    }
    writeln!(std::io::stdout().lock(), "{text}").map_err(|e| e.to_string())
}
