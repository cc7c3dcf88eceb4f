//! A witness's log: a file of lines, on the disk before the writer goes on.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

use tokio::sync::oneshot;

/// Appends lines. Lines that come together are synced together.
#[derive(Debug, Clone)]
pub(crate) struct Log {
    lines: Sender<(String, oneshot::Sender<()>)>,
}

impl Log {
    /// Opens the file, or makes it.
    pub(crate) fn open(path: &Path) -> io::Result<Log> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let (lines, inbox) = channel();
        std::thread::Builder::new().name("log".into()).spawn(move || write(file, &inbox))?;
        Ok(Log { lines })
    }

    /// Returns when the lines are on the disk. A witness that cannot write ends its process.
    pub(crate) async fn write(&self, lines: impl Into<String>) {
        let (done, written) = oneshot::channel();
        let mut lines = lines.into();
        lines.push('\n');
        if self.lines.send((lines, done)).is_err() || written.await.is_err() {
            eprintln!("the witness's log cannot be written");
            std::process::exit(70);
        }
    }

    /// The same without waiting: who is killed right after it may not have said it.
    pub(crate) fn leave(&self, line: impl Into<String>) {
        let mut line = line.into();
        line.push('\n');
        self.lines.send((line, oneshot::channel().0)).ok();
    }
}

fn write(mut file: File, inbox: &Receiver<(String, oneshot::Sender<()>)>) {
    while let Ok((mut text, done)) = inbox.recv() {
        let mut waiting = vec![done];
        while let Ok((more, done)) = inbox.try_recv() {
            text.push_str(&more);
            waiting.push(done);
        }
        // One write, so that a kill leaves whole lines.
        if let Err(error) = file.write_all(text.as_bytes()).and_then(|()| file.sync_data()) {
            eprintln!("the witness's log cannot be written: {error}");
            return;
        }
        for done in waiting {
            done.send(()).ok();
        }
    }
}
