//! The command `postbox`: publish, look, and settle what needs a person.

mod commands;
mod confirm;
mod demo;
mod desk;
mod failure;
mod flags;
mod output;
mod serve;
mod table;
mod text;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;

use crate::flags::{Command, Flags};
use crate::output::Output;
use crate::text::plain;

fn main() -> ExitCode {
    let flags = typed();
    tracing_to_stderr(&flags.command);
    let output = Output::new(flags.global.json);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output.prose(&format!("postbox: could not start: {error}"));
            return ExitCode::from(failure::FAILED);
        }
    };
    let ended = runtime.block_on(commands::run(flags, &output));
    // A read of standard input cannot be cancelled; nobody waits for it here.
    runtime.shutdown_background();
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.tell(&output);
            ExitCode::from(failure.code)
        }
    }
}

/// What was typed. What cannot be understood is repeated by the error, and must not act on the terminal.
fn typed() -> Flags {
    let error = match Flags::try_parse() {
        Ok(flags) => return flags,
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => error,
    };
    let args: Vec<String> = std::env::args_os().map(|arg| plain(&arg.to_string_lossy())).collect();
    match Flags::try_parse_from(args) {
        Err(same) if same.kind() == error.kind() => same.exit(),
        _ => {
            let lines = error.render().to_string();
            Output::new(false).prose(&lines.trim_end().split('\n').map(plain).collect::<Vec<_>>().join("\n"));
            std::process::exit(i32::from(failure::USAGE))
        }
    }
}

/// What the library logs, for people: warnings, unless `POSTBOX_LOG` says otherwise.
fn tracing_to_stderr(command: &Command) {
    let usual = match command {
        // The demo tells its story itself.
        Command::Demo(_) | Command::DemoProvider => "off",
        // A driver that finds a statement slow prints all of it.
        _ => "warn,sqlx=error",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("POSTBOX_LOG");
    tracing_subscriber::fmt()
        .with_env_filter(filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(usual)))
        .with_ansi(output::colour_allowed() && std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
}
