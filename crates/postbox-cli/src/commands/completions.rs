//! `postbox completions SHELL`, and the manual page.

use std::io::Write;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::commands::Ended;
use crate::flags::Flags;

/// The script that a shell completes from. No database is needed.
pub(super) fn print(shell: Shell) -> Ended {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Flags::command(), "postbox", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(0)
}

/// The page, in the form that `man` reads.
pub(super) fn manual() -> Ended {
    let mut page = Vec::new();
    clap_mangen::Man::new(Flags::command()).render(&mut page)?;
    std::io::stdout().write_all(&page)?;
    Ok(0)
}
