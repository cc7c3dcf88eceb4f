//! What can be typed.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use jiff::{Span, SpanRelativeTo, Timestamp};
use postbox::lifecycle::Answer;
use postbox::{Missed, Priority};

/// A transactional outbox and inbox, and honest irreversible operations, on PostgreSQL and SQLite.
#[derive(Debug, Parser)]
#[command(
    name = "postbox",
    version,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 ok, 1 failed or partial, 2 usage, 3 not found, 4 conflict (the version moved), 5 refused.\n\
                  Settings come from flags, then POSTBOX_* and PG* variables (DATABASE_URL too), then postbox.toml."
)]
pub(crate) struct Flags {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags that every command takes.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Where the database is: postgres://localhost/shop or sqlite:shop.db
    #[arg(long, global = true, value_name = "URL", help_heading = "Everywhere")]
    pub(crate) database_url: Option<String>,
    /// The schema in PostgreSQL
    #[arg(long, global = true, value_name = "NAME", help_heading = "Everywhere")]
    pub(crate) schema: Option<String>,
    /// The application that subscriptions belong to
    #[arg(long, global = true, value_name = "NAME", help_heading = "Everywhere")]
    pub(crate) application: Option<String>,
    /// Settings file, instead of ./postbox.toml
    #[arg(long, global = true, value_name = "FILE", help_heading = "Everywhere")]
    pub(crate) config: Option<PathBuf>,
    /// Who acts, for the audit [default: $USER]
    #[arg(long, global = true, value_name = "NAME", help_heading = "Everywhere")]
    pub(crate) actor: Option<String>,
    /// Prints JSON: one object, or one a line for lists
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// A small shop that runs by itself, to look at: needs nothing
    Demo(Demo),
    /// Bring a database to this version, take it back, or see how
    #[command(subcommand)]
    Migrate(Migrate),
    /// Publish a message, or a file of them
    Publish(Box<Publish>),
    /// Everything at a glance, and what needs you
    Status,
    /// Deliveries, newest first
    List(List),
    /// One delivery with its history, or a message with its deliveries
    Show(Show),
    /// Try deliveries again, now; their attempts go on counting
    #[command(after_help = "A filter that names no state means the dead ones.")]
    Retry(Retry),
    /// Call deliveries off that wait or are dead
    #[command(after_help = "A filter that names no state means those that wait.")]
    Cancel(Cancel),
    /// Deliver again what has ended: a new delivery, linked to the old one
    #[command(after_help = "A filter that names no state means all that succeeded, is dead or was cancelled. \
                            Operations are left out: they are replayed by their numbers, with --irreversible.")]
    Replay(Replay),
    /// Say how a doubt ends
    Resolve(Resolve),
    /// Who listens to what
    Subscriptions(Subscriptions),
    /// Keys in order whose deliveries wait for one of them
    #[command(args_conflicts_with_subcommands = true)]
    Keys(Keys),
    /// Brokers and webhooks that messages come from
    Sources(Sources),
    /// What came in and could not become a message
    #[command(args_conflicts_with_subcommands = true)]
    Quarantine(Quarantine),
    /// Messages that are published at set times
    Schedules(Schedules),
    /// Receive, relay and push as postbox.toml says, without Rust: sources, relays, pushes
    #[command(
        after_help = "The file is ./postbox.toml, or that of --config. See docs/serve.md. SIGTERM or Ctrl-C stops it: sources \
                            first, then what runs is waited for; a second one ends it at once."
    )]
    Serve(Serve),
    /// Endpoints of postbox.toml: relays of the kind webhook, and pushes
    #[command(subcommand)]
    Webhooks(Webhooks),
    /// Keep house for programs without a Rust worker: takeover, history of new subscriptions, schedules, tidying
    Maintain,
    /// Remove what has ended and was kept long enough, now; workers do it by themselves
    Retain(Retain),
    /// What operators did, newest first
    Audit(Audit),
    /// The settings in force
    #[command(subcommand)]
    Config(Config),
    /// Completions for a shell, to be put where it looks for them
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// The manual page, for `man`
    #[command(hide = true)]
    Manual,
    /// The payment provider of the demo, a process of its own
    #[command(hide = true)]
    DemoProvider,
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Ends by itself after this long, like 10s; without it, Ctrl-C ends it
    #[arg(long = "for", value_name = "DURATION", value_parser = duration)]
    pub(crate) lasting: Option<Duration>,
    /// Where to keep the shop's database; a new file [default: in the temporary directory]
    #[arg(long, value_name = "PATH")]
    pub(crate) keep: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Webhooks {
    /// Send one signed message of the topic postbox.test, and show the answer
    Test {
        /// Of a relay or a push
        name: String,
    },
}

#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Serve {
    /// Reads the file, the variables and files it names, and says what would run; connects to nothing
    #[arg(long)]
    pub(crate) check: bool,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum Migrate {
    /// Bring the schema to this version
    Up,
    /// Which migrations there are, and which were applied
    Status,
    /// Take migrations back, the newest first
    Down(Down),
    /// Make the roles for programs (PostgreSQL), and give them their rights; can be repeated
    Roles,
    /// The migrations as plain SQL (PostgreSQL), for a migration tool of your own
    Print {
        /// What takes them back, instead
        #[arg(long)]
        down: bool,
    },
}

#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Down {
    /// The version to go down to; 0 leaves nothing [default: one below the schema's]
    #[arg(long, value_name = "VERSION")]
    pub(crate) to: Option<u32>,
    /// Also if messages, deliveries and the record of what was done are lost, and workers are alive
    #[arg(long)]
    pub(crate) and_lose_data: bool,
    /// Does not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Publish {
    /// The topic, like orders.placed
    #[arg(required_unless_present = "jsonl")]
    pub(crate) topic: Option<String>,
    /// The payload, JSON; `-` reads it from standard input [default: null]
    #[arg(conflicts_with = "file")]
    pub(crate) payload: Option<String>,
    /// Reads the payload from a file
    #[arg(long, value_name = "PATH")]
    pub(crate) file: Option<PathBuf>,
    /// The payload is bytes of this media type, like image/png, and not JSON
    #[arg(long, value_name = "TYPE")]
    pub(crate) content_type: Option<String>,
    /// What the message is about, like an order's number; `list key:KEY` finds it
    #[arg(long)]
    pub(crate) key: Option<String>,
    /// A header, name=value; may be repeated
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    pub(crate) headers: Vec<(String, String)>,
    /// Due this long from now, like 10m or 1h30m
    #[arg(long, value_name = "DURATION", value_parser = duration, conflicts_with = "at")]
    pub(crate) after: Option<Duration>,
    /// Due at this time, like 2027-01-31T09:00:00+01:00
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub(crate) at: Option<Timestamp>,
    /// Publishes once per topic and key
    #[arg(long, value_name = "KEY")]
    pub(crate) dedup: Option<String>,
    /// How long the dedup key (with --jsonl: the ids) is remembered [default: 1d]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) dedup_window: Option<Duration>,
    /// Attempts that each delivery may make, whatever the subscription says
    #[arg(long, value_name = "NUMBER")]
    pub(crate) max_attempts: Option<u32>,
    /// Which others it goes before: high, normal or low [default: normal]
    #[arg(long, value_name = "PRIORITY")]
    pub(crate) priority: Option<Priority>,
    /// A file with a message a line, or `-`: {"id"?, "topic", "key"?, "payload", "headers"?, "priority"?}; instead of
    /// the payload bytes, as "data_base64" with "content_type"; an id is a dedup key, and shown as the
    /// external id
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["topic", "payload", "file", "content_type", "key", "headers", "after", "at", "dedup", "max_attempts", "priority"]
    )]
    pub(crate) jsonl: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// state:dead,in_doubt topic:orders.* subscription:NAME application:NAME key:KEY since:2h until:TIME;
    /// each name narrows, commas widen. The states: pending, running, in_doubt, succeeded, dead, cancelled
    #[arg(value_name = "FILTER")]
    pub(crate) filter: Vec<String>,
    /// How many at most
    #[arg(long, default_value_t = 50, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) limit: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// A delivery's number, or a message's id (a UUID)
    pub(crate) id: String,
}

/// Which deliveries, and how: the same for all that can be done to many.
#[derive(Debug, Args)]
pub(crate) struct Bulk {
    /// Deliveries' numbers, or a filter as for `list`: subscription:NAME since:2h state:dead
    #[arg(required_unless_present = "all", value_name = "ID|FILTER")]
    pub(crate) which: Vec<String>,
    /// Instead of a filter: all in the states that are meant where a filter names none (see below)
    #[arg(long, conflicts_with = "which")]
    pub(crate) all: bool,
    /// Shows what would be done, and does nothing
    #[arg(long, visible_alias = "preview")]
    pub(crate) dry_run: bool,
    /// With a filter: to so many at most
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    /// With a filter: to so many a second at most, like 20 or 0.5
    #[arg(long, value_name = "NUMBER", value_parser = rate)]
    pub(crate) rate: Option<f64>,
    /// Why; goes on record
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// Does not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Retry {
    #[command(flatten)]
    pub(crate) bulk: Bulk,
    /// The revision you saw; if it has moved on, nothing is done (one ID only)
    #[arg(long, value_name = "NUMBER", value_parser = rev)]
    pub(crate) rev: Option<i32>,
}

#[derive(Debug, Args)]
pub(crate) struct Cancel {
    #[command(flatten)]
    pub(crate) bulk: Bulk,
    /// The revision you saw; if it has moved on, nothing is done (one ID only)
    #[arg(long, value_name = "NUMBER", value_parser = rev)]
    pub(crate) rev: Option<i32>,
}

#[derive(Debug, Args)]
pub(crate) struct Replay {
    #[command(flatten)]
    pub(crate) bulk: Bulk,
    /// For one operation: its effect is meant to happen again, under a new idempotency key
    #[arg(long)]
    pub(crate) irreversible: bool,
    /// With a filter: only deliveries above this number, to go on where an interrupted replay came to
    #[arg(long, value_name = "ID", default_value_t = 0)]
    pub(crate) above: i64,
}

#[derive(Debug, Args)]
pub(crate) struct Resolve {
    /// The delivery's number
    pub(crate) id: i64,
    #[command(flatten)]
    pub(crate) answer: Word,
    /// How you know; goes on record
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// What you saw at the remote: a charge's number, a link
    #[arg(long, value_name = "TEXT")]
    pub(crate) evidence: Option<String>,
    /// The revision you saw; if it has moved on, nothing is done
    #[arg(long, value_name = "NUMBER", value_parser = rev)]
    pub(crate) rev: Option<i32>,
    /// Does not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

/// How a doubt ends: exactly one of these.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Word {
    /// The effect is there
    #[arg(long)]
    happened: bool,
    /// The effect is not there, and will not come any more
    #[arg(long)]
    did_not_happen: bool,
    /// It will never be known
    #[arg(long)]
    abandon: bool,
}

impl Word {
    pub(crate) fn answer(&self) -> Answer {
        match (self.happened, self.did_not_happen) {
            (true, _) => Answer::Happened,
            (_, true) => Answer::DidNotHappen,
            _ => Answer::Abandoned,
        }
    }

    /// As it is typed.
    pub(crate) fn flag(&self) -> &'static str {
        match self.answer() {
            Answer::Happened => "--happened",
            Answer::DidNotHappen => "--did-not-happen",
            Answer::Abandoned => "--abandon",
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Subscriptions {
    #[command(subcommand)]
    pub(crate) command: Option<SubscriptionsCommand>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SubscriptionsCommand {
    /// Who listens to what, and what waits for them
    List,
    /// Declare a subscription that programs pull from; or change its pattern
    Add(Add),
    /// Stop fanning out to a subscription; the deliveries it has stay as they are
    Remove(Remove),
    /// Hand out nothing of a subscription, everywhere and at once; what is published for it waits
    Pause(Pause),
    /// Hand out what waits for a paused subscription
    Resume(Pause),
}

#[derive(Debug, Args)]
pub(crate) struct Add {
    /// The subscription's name; --application says whose
    pub(crate) name: String,
    /// What it listens to: orders.placed, orders.* or orders.>
    pub(crate) pattern: String,
    /// What it takes of the past when it is new: now (nothing), beginning, or a time [default: what
    /// nobody was subscribed to]
    #[arg(long, value_name = "now|beginning|TIME", value_parser = from)]
    pub(crate) from: Option<From>,
    /// Attempts in all, the first included
    #[arg(long, default_value_t = 4, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) max_attempts: u32,
}

/// How much of the past a new subscription takes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum From {
    Now,
    Beginning,
    Time(Timestamp),
}

#[derive(Debug, Args)]
pub(crate) struct Remove {
    /// The subscription's name; --application says whose, if several have one of that name
    pub(crate) name: String,
    /// Why; goes on record
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
    /// Does not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Keys {
    #[command(flatten)]
    pub(crate) list: KeysList,
    #[command(subcommand)]
    pub(crate) command: Option<KeysCommand>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Keys that wait, those that wait the longest first
    List(KeysList),
    /// Try the delivery again that a key waits for; the others come after it
    Unblock(OneKey),
    /// Leave that delivery out, and let the others go on
    Skip(OneKey),
    /// Put a key aside, with all that is published for it, until it is unblocked
    Park(OneKey),
}

#[derive(Debug, Args)]
pub(crate) struct Sources {
    #[command(subcommand)]
    pub(crate) command: Option<SourcesCommand>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SourcesCommand {
    /// The sources, and what they have brought
    List,
    /// Read nothing more from a source, in any process; a webhook answers 503
    Pause(Pause),
    /// End a pause
    Resume(Pause),
}

#[derive(Debug, Args)]
pub(crate) struct Quarantine {
    #[command(flatten)]
    pub(crate) list: QuarantineList,
    #[command(subcommand)]
    pub(crate) command: Option<QuarantineCommand>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum QuarantineCommand {
    /// What is there, newest first
    List(QuarantineList),
    /// One entry, with what was read, byte for byte
    Show {
        /// Its number
        number: i64,
    },
    /// Have it read again, after the format was mended
    #[command(
        after_help = "Whoever receives from its source reads it, within about a second. It ends with 0 when it became a \
                      message, and with 1 when it still cannot. When nobody has read it within 5 s, it waits for \
                      somebody who does, and that is 0, too: `quarantine show` says what came of it."
    )]
    Retry(OneQuarantined),
    /// Remove it for good
    Drop(OneQuarantined),
}

#[derive(Debug, Args)]
pub(crate) struct QuarantineList {
    /// Of this source only
    #[arg(long, value_name = "NAME")]
    pub(crate) source: Option<String>,
    /// Of this kind only
    #[arg(long, value_name = "KIND")]
    pub(crate) kind: Option<QuarantineKind>,
    /// Also what became a message after all
    #[arg(long)]
    pub(crate) all: bool,
    /// How many at most
    #[arg(long, value_name = "NUMBER", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) limit: u32,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum QuarantineKind {
    /// It cannot become a message
    Malformed,
    /// Another body has its id
    Conflict,
    /// It was handed out too often
    Undeliverable,
    /// The broker did not have it any more
    Lost,
}

impl QuarantineKind {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            QuarantineKind::Malformed => "malformed",
            QuarantineKind::Conflict => "conflict",
            QuarantineKind::Undeliverable => "undeliverable",
            QuarantineKind::Lost => "lost",
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct OneQuarantined {
    /// Its number
    pub(crate) number: i64,
    /// Why; goes on record
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct KeysList {
    /// Of this subscription only
    #[arg(long, value_name = "NAME")]
    pub(crate) subscription: Option<String>,
    /// How many at most
    #[arg(long, value_name = "NUMBER", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) limit: u32,
}

#[derive(Debug, Args)]
pub(crate) struct OneKey {
    /// The key
    pub(crate) key: String,
    /// The subscription; --application says whose, if several have one of that name
    #[arg(long, value_name = "NAME")]
    pub(crate) subscription: String,
    /// Why; goes on record
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Schedules {
    #[command(subcommand)]
    pub(crate) command: Option<SchedulesCommand>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SchedulesCommand {
    /// What is published when
    List,
    /// Add a schedule; a worker publishes its messages
    Add(AddSchedule),
    /// Change what a schedule says; what is not given stays
    Edit(EditSchedule),
    /// No more ticks until it is resumed; those of that time are not published
    Pause(OneSchedule),
    /// Go on with the first tick to come
    Resume(OneSchedule),
    /// Remove a schedule; what it has published stays
    Remove(RemoveSchedule),
    /// Have a worker publish its message now, beside its ticks
    Run(OneSchedule),
    /// Its next ticks, with their offsets
    Next(NextTicks),
}

#[derive(Debug, Args)]
pub(crate) struct AddSchedule {
    /// The schedule's name; --application says whose
    pub(crate) name: String,
    /// Minute, hour, day of month, month, day of week: '0 3 * * *'; with seconds first: six; or '@daily'
    pub(crate) cron: String,
    /// The topic of its messages, like reports.nightly
    #[arg(long)]
    pub(crate) topic: String,
    #[command(flatten)]
    pub(crate) says: ScheduleFlags,
    /// Why; goes on record [default: added]
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ScheduleFlags {
    /// In whose clock, like Europe/Berlin [default: UTC]
    #[arg(long, value_name = "ZONE")]
    pub(crate) time_zone: Option<String>,
    /// The payload of its messages, JSON [default: null]
    #[arg(long, value_name = "JSON")]
    pub(crate) payload: Option<String>,
    /// The key of its messages; an empty one is none
    #[arg(long)]
    pub(crate) key: Option<String>,
    /// A header, name=value; may be repeated
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    pub(crate) headers: Vec<(String, String)>,
    /// Of ticks that came while no worker ran: none, one for all, or each [default: once]
    #[arg(long, value_name = "skip|once|all", value_parser = missed)]
    pub(crate) missed: Option<Missed>,
}

#[derive(Debug, Args)]
pub(crate) struct EditSchedule {
    /// The schedule's name; --application says whose, if several have one of that name
    pub(crate) name: String,
    /// Other times: '30 2 * * *'
    #[arg(long, value_name = "EXPRESSION")]
    pub(crate) cron: Option<String>,
    /// Another topic
    #[arg(long)]
    pub(crate) topic: Option<String>,
    #[command(flatten)]
    pub(crate) says: ScheduleFlags,
    /// The revision you saw; if it has moved on, nothing is done
    #[arg(long, value_name = "NUMBER", value_parser = rev)]
    pub(crate) rev: Option<i32>,
    /// Why; goes on record
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct OneSchedule {
    /// The schedule's name; --application says whose, if several have one of that name
    pub(crate) name: String,
    /// Why; goes on record
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Pause {
    /// Its name; --application says whose, if several have one of that name
    pub(crate) name: String,
    /// Why; goes on record
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct RemoveSchedule {
    #[command(flatten)]
    pub(crate) one: OneSchedule,
    /// Does not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct NextTicks {
    /// The schedule's name; --application says whose, if several have one of that name
    pub(crate) name: String,
    /// How many
    #[arg(long, default_value_t = 5, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) count: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Retain {
    /// Shows what would go, and removes nothing
    #[arg(long, visible_alias = "dry-run")]
    pub(crate) preview: bool,
    /// Does not ask
    #[arg(long, short)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Audit {
    /// How many at most
    #[arg(long, default_value_t = 50, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) limit: u32,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum Config {
    /// Every setting's value; passwords are hidden
    Show {
        /// Where each value comes from, too
        #[arg(long)]
        origin: bool,
    },
}

/// `500ms`, `10m`, `1h30m`, `1d`; a day is 24 hours.
fn duration(text: &str) -> Result<Duration, String> {
    let span: Span = text.parse().map_err(|_| "write it like 500ms, 10m, 1h30m or 1d".to_owned())?;
    let signed = span
        .to_duration(SpanRelativeTo::days_are_24_hours())
        .map_err(|_| "months and years differ in length; write days, like 30d".to_owned())?;
    Duration::try_from(signed).map_err(|_| "it must not be negative".to_owned())
}

fn time(text: &str) -> Result<Timestamp, String> {
    text.parse().map_err(|_| {
        // A date, a time and an offset, and still no time: it is too far away.
        let whole = jiff::fmt::temporal::Pieces::parse(text).is_ok_and(|p| p.time().is_some() && p.offset().is_some());
        if whole {
            "times go from the year 1 to 9999-12-30T22:00:00Z".to_owned()
        } else {
            "write it with its offset, like 2027-01-31T09:00:00+01:00 or 2027-01-31T08:00:00Z".to_owned()
        }
    })
}

/// Deliveries a second.
fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (0.001..=1_000_000.0).contains(&rate) => Ok(rate),
        _ => Err("say how many a second, from 0.001 to 1000000".to_owned()),
    }
}

fn from(text: &str) -> Result<From, String> {
    match text {
        "now" => Ok(From::Now),
        "beginning" => Ok(From::Beginning),
        _ => time(text).map(From::Time).map_err(|e| format!("say now, beginning or a time; {e}")),
    }
}

fn header(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write it as name=value".to_owned()),
    }
}

fn missed(text: &str) -> Result<Missed, String> {
    text.parse().map_err(|e: postbox::Error| e.to_string())
}

/// `3` or, as `show` prints it, `v3`.
fn rev(text: &str) -> Result<i32, String> {
    text.strip_prefix('v')
        .unwrap_or(text)
        .parse()
        .map_err(|_| "write the number that `postbox show` prints, like 3".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_flags_hold_together() {
        Flags::command().debug_assert();
    }

    #[test]
    fn times_say_what_is_wrong_with_them() {
        assert!(time("2027-01-31T09:00:00+01:00").is_ok() && time("9999-12-30T22:00:00Z").is_ok());
        for (text, why) in
            [("9999-12-31T23:59:59Z", "9999-12-30"), ("2027-01-31T09:00:00", "offset"), ("soon", "offset")]
        {
            assert!(time(text).is_err_and(|e| e.contains(why)), "{text}");
        }
    }

    #[test]
    fn durations_as_people_write_them() {
        for (text, millis) in [("500ms", 500), ("10m", 600_000), ("1h30m", 5_400_000), ("1d", 86_400_000), ("0s", 0)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "10", "-1s", "1mo", "soon", "1 y"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
