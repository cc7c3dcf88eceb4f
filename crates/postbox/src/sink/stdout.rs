//! Standard output as a sink: a line of JSON a message, for a pipe.

use std::io::{self, Write};

use super::{Outgoing, Sent, Sink, Unsent};
use crate::error::BrokerError;

/// Writes messages to standard output: made by [`stdout`].
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct Stdout {}

/// A sink that writes a line of JSON a message, as [`Envelope::to_json`](crate::Envelope::to_json) has it, to
/// standard output. A message counts as sent when it is flushed. A reader that has gone away is a failure, and the
/// message is written again.
pub fn stdout() -> Stdout {
    Stdout {}
}

impl Sink for Stdout {
    fn kind(&self) -> &'static str {
        "stdout"
    }

    fn name(&self) -> String {
        "stdout".into()
    }

    async fn open(&self) -> Result<Vec<String>, BrokerError> {
        Ok(Vec::new())
    }

    async fn send(&self, batch: &[Outgoing]) -> Sent {
        let lines: String = batch.iter().map(|message| line(&message.to_json())).collect();
        // A reader that is slow holds up this thread, and nobody else.
        let written = tokio::task::spawn_blocking(move || {
            let mut out = io::stdout().lock();
            out.write_all(lines.as_bytes()).and_then(|()| out.flush())
        });
        let outcome = match written.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Unsent::again(format!("standard output takes nothing: {error}"))),
            Err(_) => Err(Unsent::again("writing to standard output was broken off")),
        };
        vec![outcome; batch.len()]
    }
}

/// JSON text in one line: outside of strings a line end is white space, and inside there is none.
fn line(json: &str) -> String {
    json.replace(['\n', '\r'], " ") + "\n"
}

#[cfg(test)]
mod tests {
    use super::line;

    #[test]
    fn a_message_is_one_line() {
        assert_eq!(line("{\r\n\"a\": \"\\n\"}"), "{  \"a\": \"\\n\"}\n");
    }
}
