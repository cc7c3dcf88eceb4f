//! What happens in the shop, told as it happens.

use std::time::Instant;

use crate::output::{Output, Tone};
use crate::text::plain;

/// Tells on standard output; where that is to be one line of JSON, on standard error.
#[derive(Debug, Clone)]
pub(super) struct Story {
    output: Output,
    start: Instant,
}

impl Story {
    pub(super) fn new(output: &Output) -> Story {
        Story { output: output.clone(), start: Instant::now() }
    }

    /// Something that befell an order.
    pub(super) fn tell(&self, order: i64, what: &str, tone: Tone, words: &str) {
        let words = self.output.paint(tone, &plain(words));
        let seconds = self.start.elapsed().as_secs_f64();
        self.say(&format!("{seconds:6.2}s  order {order:<4} {what:<7} {words}"));
    }

    /// A line.
    pub(super) fn say(&self, line: &str) {
        // Who does not listen is not told; the shop goes on.
        if self.output.json {
            self.output.prose(line);
        } else {
            let _ = self.output.line(line);
        }
    }

    /// Nobody reads it any more.
    pub(super) fn is_unheard(&self) -> bool {
        self.output.is_closed()
    }
}
