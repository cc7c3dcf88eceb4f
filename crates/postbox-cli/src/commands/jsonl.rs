//! `postbox publish --jsonl FILE|-`: a message a line. A bad line is told by its number and stops
//! nobody else.

#[path = "jsonl_line.rs"]
mod line;

use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use postbox::{Database, Draft, Postbox};
use serde::Serialize;

use crate::commands::Ended;
use crate::desk::Desk;
use crate::failure::{FAILED, Failure};
use crate::text::plain;

use line::{BadLine, draft};

/// Messages that are committed together.
const BATCH: usize = 500;
/// A batch that weighs more than this is committed early, in bytes.
const BATCH_BYTES: u64 = 8 << 20;
/// What a line may weigh beside its payload: ids, key, headers, escapes.
const BESIDE_PAYLOAD: usize = 1 << 20;
const DAY: Duration = Duration::from_secs(86_400);

/// What became of a file.
#[derive(Debug, Default, Serialize)]
struct Summary {
    published: u64,
    duplicates: u64,
    bad: u64,
}

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, file: &Path, window: Option<Duration>) -> Ended {
    let tried = format!("publish the lines of {}", file.display());
    let failed = |why: String| Failure::new(FAILED, &tried, why, desk.command("publish --help"));
    let payload_limit =
        desk.settings.max_payload_bytes().map_err(|e| Failure::of(&e, &tried, desk.command("config show --origin")))?;
    let (reader, size) = open(file).map_err(|e| failure_to_read(&tried, &e, desk))?;
    let postbox = desk.open_or_create::<Db>().await?;
    let bar = bar(size);
    let mut lines = Lines { reader, number: 0, bytes: 0, limit: in_base64(payload_limit) + BESIDE_PAYLOAD };
    let mut publishing = Publishing { desk, postbox, bar: &bar, summary: Summary::default() };
    let mut batch = Vec::with_capacity(BATCH);
    let mut sent_up_to = 0;
    let mut unsent = None;
    loop {
        let line = lines.next().map_err(|e| failed(format!("line {} could not be read: {e}", lines.number)));
        let line = match line {
            Ok(Some(line)) => line,
            Ok(None) => break,
            Err(failure) => {
                unsent = Some(failure);
                break;
            }
        };
        bar.set_position(lines.bytes);
        match line.and_then(|text| draft(&text, window.unwrap_or(DAY))) {
            Ok(Some(draft)) => batch.push((lines.number, draft)),
            Ok(None) => {}
            Err(bad) => publishing.bad(lines.number, &bad.to_string()),
        }
        if batch.len() == BATCH || lines.bytes - sent_up_to > BATCH_BYTES {
            sent_up_to = lines.bytes;
            publishing.send(&mut batch, &tried).await?;
        }
    }
    publishing.send(&mut batch, &tried).await?;
    bar.finish_and_clear();
    let summary = publishing.summary;
    if desk.output.json {
        desk.output.object(&summary)?;
    } else {
        let Summary { published, duplicates, bad } = summary;
        desk.output.line(&format!("published {published}, duplicates {duplicates}, bad {bad}"))?;
        if bad > 0 {
            desk.output.prose(
                "next: mend the lines told above and publish the file again; lines with an id are not published twice",
            );
        }
    }
    match unsent {
        Some(failure) => Err(failure),
        None => Ok(if summary.bad > 0 { FAILED } else { 0 }),
    }
}

/// How long so many bytes are in base64.
fn in_base64(bytes: usize) -> usize {
    bytes.div_ceil(3) * 4
}

fn failure_to_read(tried: &str, error: &io::Error, desk: &Desk<'_>) -> Failure {
    let code = if error.kind() == io::ErrorKind::NotFound { crate::failure::NOT_FOUND } else { crate::failure::USAGE };
    Failure::new(code, tried, error.to_string(), desk.command("publish --jsonl -"))
}

struct Publishing<'a, Db: Database> {
    desk: &'a Desk<'a>,
    postbox: Postbox<Db>,
    bar: &'a ProgressBar,
    summary: Summary,
}

impl<Db: Database> Publishing<'_, Db> {
    fn bad(&mut self, number: u64, why: &str) {
        self.summary.bad += 1;
        let line = format!("line {number}: {}", plain(why));
        self.bar.suspend(|| self.desk.output.prose(&line));
    }

    /// Commits the good ones of a batch.
    async fn send(&mut self, batch: &mut Vec<(u64, Draft)>, tried: &str) -> Result<(), Failure> {
        let (numbers, drafts): (Vec<u64>, Vec<Draft>) = batch.drain(..).unzip();
        let (Some(first), Some(last)) = (numbers.first(), numbers.last()) else { return Ok(()) };
        let published = self.postbox.publish_each_now(drafts).await.map_err(|e| {
            self.bar.finish_and_clear();
            let Summary { published, duplicates, .. } = self.summary;
            let tried = format!(
                "{tried}: lines {first} to {last} (before them: published {published}, duplicates {duplicates})"
            );
            let next = "the same command again; lines with an id are not published twice";
            Failure::of(&e, tried, next)
        })?;
        for (number, published) in numbers.into_iter().zip(published) {
            match published {
                Ok(message) if message.is_duplicate() => self.summary.duplicates += 1,
                Ok(_) => self.summary.published += 1,
                Err(error) => self.bad(number, &error.to_string()),
            }
        }
        Ok(())
    }
}

/// Lines with their numbers, each bounded in size.
struct Lines {
    reader: Box<dyn BufRead>,
    number: u64,
    bytes: u64,
    limit: usize,
}

impl Lines {
    /// The next line without its end; `None` at the end of the file.
    fn next(&mut self) -> io::Result<Option<Result<Vec<u8>, BadLine>>> {
        let mut line = Vec::new();
        self.number += 1;
        let read = (&mut self.reader).take(self.limit as u64 + 1).read_until(b'\n', &mut line)?;
        self.bytes += read as u64;
        if read == 0 {
            return Ok(None);
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        } else if read > self.limit {
            self.bytes += self.reader.skip_until(b'\n')? as u64;
            return Ok(Some(Err(BadLine::TooLong { limit: self.limit })));
        }
        if self.number == 1 && line.starts_with(b"\xef\xbb\xbf") {
            line.drain(..3);
        }
        Ok(Some(Ok(line)))
    }
}

fn open(file: &Path) -> io::Result<(Box<dyn BufRead>, Option<u64>)> {
    if file == Path::new("-") {
        return Ok((Box::new(io::stdin().lock()), None));
    }
    let file = File::open(file)?;
    let about = file.metadata()?;
    if about.is_dir() {
        return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a directory"));
    }
    let size = about.is_file().then_some(about.len());
    Ok((Box::new(BufReader::with_capacity(1 << 16, file)), size))
}

/// On standard error, and only on a terminal.
fn bar(size: Option<u64>) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match size {
        Some(size) => (ProgressBar::new(size), "publishing {bar:30} {bytes}/{total_bytes} {eta}"),
        None => (ProgressBar::new_spinner(), "publishing {spinner} {bytes}"),
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bad(line: &[u8]) -> String {
        draft(line, DAY).expect_err("a bad line").to_string()
    }

    #[test]
    fn a_good_line() {
        let line =
            br#"{"id":"e1","topic":"a.b","key":"k","payload":{"n": 1.10000000000000000001},"headers":{"h":"v"}}"#;
        assert_eq!(draft(line, DAY).expect("good").expect("a message").topic(), "a.b");
        assert!(draft(b"  \r", DAY).expect("blank").is_none());
    }

    #[test]
    fn null_is_a_payload_and_bytes_are_too() {
        for line in [
            br#"{"topic":"a.b","payload":null}"#.as_slice(),
            br#"{"topic":"a.b","data_base64":"AP8=","content_type":"image/png"}"#,
            // As `show --json` and CloudEvents write it.
            br#"{"topic":"a.b","data_base64":"","datacontenttype":"image/png"}"#,
        ] {
            assert!(draft(line, DAY).expect("good").is_some());
        }
    }

    #[test]
    fn each_bad_line_says_why() {
        assert_eq!(bad(b"{\"topic\":\"a\xff\"}"), "it is not UTF-8 (byte 11)");
        assert!(bad(b"{").contains("EOF"), "{}", bad(b"{"));
        assert!(bad(br#"{"payload":1}"#).contains("missing field `topic`"));
        assert!(bad(br#"{"topic":"a"}"#).contains("missing field `payload`"));
        assert!(bad(br#"{"topic":"a","data_base64":"AA=="}"#).contains("missing field `content_type`"));
        assert!(bad(br#"{"topic":"a","payload":1,"data_base64":"AA=="}"#).contains("one of them"));
        assert!(bad(br#"{"topic":"a","payload":1,"content_type":"a/b"}"#).contains("`payload` is JSON"));
        assert!(bad(br#"{"topic":"a","data_base64":"A","content_type":"a/b"}"#).contains("no base64"));
        assert!(bad(br#"{"topic":"a","payload":1,"colour":"red"}"#).contains("unknown field `colour`"));
        assert!(bad(br#"{"topic":"a","payload":1} 2"#).contains("trailing"));
        assert!(bad(br#"{"topic":"a","payload":"\u0000"}"#).contains("\\u0000"));
        assert!(bad(br#"{"topic":"a","payload":"\ud800"}"#).contains("surrogate"));
        let deep = format!(r#"{{"topic":"a","payload":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert!(bad(deep.as_bytes()).contains("deeper than 128"));
        assert!(bad(b"[1]").contains("no message"));
    }

    #[test]
    fn a_long_line_is_bad_and_the_next_is_read() {
        let text: &[u8] = b"\xef\xbb\xbf{}\n123456789\nlast";
        let mut lines = Lines { reader: Box::new(text), number: 0, bytes: 0, limit: 8 };
        let mut all = Vec::new();
        while let Some(line) = lines.next().expect("reads") {
            all.push(line);
        }
        assert_eq!(all, [Ok(b"{}".to_vec()), Err(BadLine::TooLong { limit: 8 }), Ok(b"last".to_vec())]);
        assert_eq!(lines.bytes, text.len() as u64);
    }
}
