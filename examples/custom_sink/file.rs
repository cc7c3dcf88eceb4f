//! A sink of one's own: it appends messages to a file, a line of JSON each.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use postbox::BrokerError;
use postbox::sink::{Outgoing, Sent, Sink, Unsent};
use tokio::sync::Mutex;

/// Whoever reads the file takes no longer line, in bytes.
const LONGEST: usize = 1 << 20;

/// Appends to a file.
pub(crate) struct FileSink {
    path: PathBuf,
    /// One batch after the other: `send` is called for several at once.
    writing: Mutex<()>,
}

impl FileSink {
    pub(crate) fn at(path: impl Into<PathBuf>) -> FileSink {
        FileSink { path: path.into(), writing: Mutex::new(()) }
    }
}

impl Sink for FileSink {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn name(&self) -> String {
        format!("file:{}", self.path.display())
    }

    /// What can never work is refused, and the worker does not start; anything else is a warning.
    async fn open(&self) -> Result<Vec<String>, BrokerError> {
        if self.path.is_dir() {
            return Err(BrokerError::Refused(format!("{} is a folder; name a file in it", self.path.display())));
        }
        match self.path.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.is_dir()) {
            Some(folder) => Err(BrokerError::Unavailable(format!("there is no folder {}", folder.display()))),
            None => Ok(Vec::new()),
        }
    }

    /// Sent is what the disk has. After an error some lines may be there all the same: they are written again, with
    /// the ids that they had.
    async fn send(&self, batch: &[Outgoing]) -> Sent {
        let (mut lines, mut refused) = (String::new(), HashSet::new());
        let mut take = |message: &Outgoing| {
            // Outside of strings a line end is white space, and inside there is none.
            let line = message.to_json().replace(['\n', '\r'], " ") + "\n";
            if message.key.as_ref().is_some_and(|key| refused.contains(key)) {
                return Err(Unsent::not_tried("the one before it, of the same key, is too long"));
            }
            if line.len() > LONGEST {
                refused.extend(message.key.clone());
                return Err(Unsent::rejected(format!("it is {} bytes long; {LONGEST} are taken", line.len())));
            }
            lines.push_str(&line);
            Ok(())
        };
        let taken: Sent = batch.iter().map(&mut take).collect();
        let _one_at_a_time = self.writing.lock().await;
        let path = self.path.clone();
        let written = match tokio::task::spawn_blocking(move || append(&path, &lines)).await {
            Ok(written) => written,
            Err(broken) => Err(io::Error::other(broken)),
        };
        let answer = written.map_err(|error| Unsent::again(format!("{}: {error}", self.path.display())));
        taken.into_iter().map(|taken| taken.and(answer.clone())).collect()
    }
}

fn append(path: &Path, lines: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
    // A crash may have left half a line. It stays one of its own, which is no JSON.
    if !ends_a_line(&mut file)? {
        file.write_all(b"\n")?;
    }
    file.write_all(lines.as_bytes())?;
    file.sync_data()
}

fn ends_a_line(file: &mut File) -> io::Result<bool> {
    if file.seek(SeekFrom::End(0))? == 0 {
        return Ok(true);
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}
