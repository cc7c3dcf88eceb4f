//! One file a command; here the database's kind, known at run time, becomes a type.

mod audit;
mod bulk;
mod cancel;
mod completions;
mod config;
mod jsonl;
mod keys;
mod list;
mod maintain;
mod migrate;
mod pause;
mod publish;
mod quarantine;
mod replay;
mod resolve;
mod retain;
mod retry;
mod schedules;
mod show;
mod sources;
mod status;
mod subscriptions;

use postbox::{Backend, Database, Postgres, Sqlite};

use crate::demo;
use crate::desk::Desk;
use crate::failure::{Failure, needs_role};
use crate::flags::{
    Command, Flags, Keys, KeysCommand, Migrate, Quarantine, QuarantineCommand, Schedules, SchedulesCommand, Serve,
    Sources, SourcesCommand, Subscriptions, SubscriptionsCommand, Webhooks,
};
use crate::output::Output;
use crate::serve;

/// How a command ended that did what it could: its exit code.
pub(crate) type Ended = Result<u8, Failure>;

/// Runs what was typed.
pub(crate) async fn run(flags: Flags, output: &Output) -> Ended {
    match flags.command {
        Command::Demo(demo) => return demo::run(demo, output).await,
        Command::DemoProvider => return demo::provider::run().await,
        Command::Completions { shell } => return completions::print(shell),
        Command::Manual => return completions::manual(),
        _ => {}
    }
    // It tells all the mistakes of the file at once.
    let serves = matches!(flags.command, Command::Serve(_) | Command::Webhooks(_));
    if serves {
        serve::readable(&flags.global, output)?;
    }
    let desk = Desk::new(flags.global, output)?;
    if !serves {
        desk.no_mistakes()?;
    }
    match flags.command {
        Command::Config(command) => config::run(&desk, command),
        Command::Migrate(Migrate::Print { down }) => migrate::print(&desk, down),
        Command::Webhooks(Webhooks::Test { name }) => serve::test::run(&desk, &name).await,
        Command::Serve(Serve { check }) => {
            let plan = serve::plan(&desk)?;
            if check {
                return serve::check(&desk, &plan);
            }
            match desk.backend()? {
                Backend::Postgres => serve::run::<Postgres>(&desk, plan).await,
                Backend::Sqlite => serve::run::<Sqlite>(&desk, plan).await,
            }
        }
        command => match desk.backend()? {
            Backend::Postgres => {
                tell_role(&desk, &command);
                on::<Postgres>(&desk, command).await
            }
            Backend::Sqlite => on::<Sqlite>(&desk, command).await,
        },
    }
}

/// Says which role a login needs for it, if the server refuses.
fn tell_role(desk: &Desk<'_>, command: &Command) {
    let Ok(schema) = desk.settings.schema() else { return };
    let role = match command {
        Command::Publish(_) => "publisher",
        Command::Retry(_) | Command::Cancel(_) | Command::Replay(_) | Command::Resolve(_) => "operator",
        Command::Subscriptions(Subscriptions { command: Some(command) }) => match command {
            SubscriptionsCommand::Remove(_) | SubscriptionsCommand::Pause(_) | SubscriptionsCommand::Resume(_) => {
                "operator"
            }
            SubscriptionsCommand::Add(_) => "worker",
            SubscriptionsCommand::List => "viewer",
        },
        Command::Schedules(Schedules { command: None | Some(SchedulesCommand::List | SchedulesCommand::Next(_)) }) => {
            "viewer"
        }
        Command::Schedules(_) => "operator",
        Command::Keys(Keys { command: None | Some(KeysCommand::List(_)), .. }) => "viewer",
        Command::Keys(_) => "operator",
        Command::Sources(Sources { command: None | Some(SourcesCommand::List) }) => "viewer",
        Command::Sources(_) => "operator",
        Command::Quarantine(Quarantine {
            command: None | Some(QuarantineCommand::List(_) | QuarantineCommand::Show { .. }),
            ..
        }) => "viewer",
        Command::Quarantine(_) => "operator",
        Command::Maintain => "worker",
        Command::Retain(retain) if !retain.preview => "worker",
        // The owner of the schema migrates.
        Command::Migrate(_) => return,
        _ => "viewer",
    };
    needs_role(format!("{schema}_{role}"));
}

async fn on<Db: Database>(desk: &Desk<'_>, command: Command) -> Ended {
    match command {
        Command::Migrate(command) => migrate::run::<Db>(desk, command).await,
        Command::Publish(publish) => publish::run::<Db>(desk, *publish).await,
        Command::Status => status::run::<Db>(desk).await,
        Command::List(list) => list::run::<Db>(desk, list).await,
        Command::Show(show) => show::run::<Db>(desk, show).await,
        Command::Retry(retry) => retry::run::<Db>(desk, retry).await,
        Command::Cancel(cancel) => cancel::run::<Db>(desk, cancel).await,
        Command::Replay(replay) => replay::run::<Db>(desk, replay).await,
        Command::Resolve(resolve) => resolve::run::<Db>(desk, resolve).await,
        Command::Subscriptions(subscriptions) => subscriptions::run::<Db>(desk, subscriptions).await,
        Command::Keys(keys) => keys::run::<Db>(desk, keys).await,
        Command::Sources(sources) => sources::run::<Db>(desk, sources).await,
        Command::Quarantine(quarantine) => quarantine::run::<Db>(desk, quarantine).await,
        Command::Schedules(schedules) => schedules::run::<Db>(desk, schedules).await,
        Command::Maintain => maintain::run::<Db>(desk).await,
        Command::Retain(retain) => retain::run::<Db>(desk, retain).await,
        Command::Audit(audit) => audit::run::<Db>(desk, audit).await,
        // These need no database and were served above.
        Command::Config(_)
        | Command::Demo(_)
        | Command::Serve(_)
        | Command::Webhooks(_)
        | Command::DemoProvider
        | Command::Completions { .. }
        | Command::Manual => Ok(0),
    }
}
