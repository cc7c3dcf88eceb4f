//! Asks before something is done that cannot be taken back.

use std::io::{self, BufRead, IsTerminal, Write};

use crate::failure::{Failure, REFUSED};

/// Goes on if `yes`, or if somebody at the terminal says so.
pub(crate) fn confirm(yes: bool, tried: &str, same_command: &str) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        let why = "nobody is there to confirm it, and --yes was not given; nothing was done";
        return Err(Failure::new(REFUSED, tried, why, format!("{same_command} --yes")));
    }
    let mut answer = String::new();
    write!(io::stderr(), "Proceed? [y/N] ")?;
    io::stdin().lock().read_line(&mut answer)?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => {
            Err(Failure::new(REFUSED, tried, "it was not confirmed; nothing was done", format!("{same_command} --yes")))
        }
    }
}
