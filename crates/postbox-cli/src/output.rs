//! Data on standard output, prose on standard error.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use postbox::lifecycle::State;
use serde::Serialize;

use crate::text::inert_json;

/// Where answers go. A reader that closed the pipe is no error: the rest is left unsaid.
#[derive(Debug, Clone)]
pub(crate) struct Output {
    /// JSON is wanted.
    pub(crate) json: bool,
    coloured: bool,
    closed: Arc<AtomicBool>,
}

/// What a colour is to say; the words say it too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Good,
    Bad,
    Doubt,
    Busy,
    Faint,
    Strong,
}

impl Output {
    pub(crate) fn new(json: bool) -> Output {
        Output { json, coloured: !json && colour_allowed() && io::stdout().is_terminal(), closed: Arc::default() }
    }

    /// A line of data.
    pub(crate) fn line(&self, text: &str) -> io::Result<()> {
        if self.is_closed() {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        match writeln!(out, "{text}").and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.closed.store(true, Ordering::Relaxed);
                Ok(())
            }
            other => other,
        }
    }

    /// One JSON object on a line of its own.
    pub(crate) fn object(&self, value: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_string(value).map_err(io::Error::other)?;
        self.line(&inert_json(&text))
    }

    /// A line for people, on standard error. If that is closed, nobody wants it.
    pub(crate) fn prose(&self, text: &str) {
        let _ = writeln!(io::stderr(), "{text}");
    }

    /// Nobody reads the data any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Colours are shown.
    pub(crate) fn coloured(&self) -> bool {
        self.coloured
    }

    /// In colour, on a terminal that shows it.
    pub(crate) fn paint(&self, tone: Tone, text: &str) -> String {
        if !self.coloured {
            return text.to_owned();
        }
        let code = match tone {
            Tone::Good => "32",
            Tone::Bad => "31",
            Tone::Doubt => "1;33",
            Tone::Busy => "36",
            Tone::Faint => "2",
            Tone::Strong => "1",
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }
}

/// `NO_COLOR` is not set (to anything), and the terminal is not a dumb one.
pub(crate) fn colour_allowed() -> bool {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty());
    set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb")
}

/// A state's mark, word and tone.
pub(crate) fn state_sign(state: State) -> (&'static str, Tone) {
    match state {
        State::Succeeded => ("+ SUCCEEDED", Tone::Good),
        State::Dead => ("x DEAD", Tone::Bad),
        State::InDoubt => ("? IN-DOUBT", Tone::Doubt),
        State::Running => ("> RUNNING", Tone::Busy),
        State::Pending => (". PENDING", Tone::Strong),
        State::Cancelled => ("- CANCELLED", Tone::Faint),
    }
}

/// The same for a state in words, as the audit keeps it.
pub(crate) fn state_word(word: &str) -> String {
    match word.parse::<State>() {
        Ok(state) => state_sign(state).0.to_owned(),
        Err(_) => crate::text::plain(word),
    }
}
