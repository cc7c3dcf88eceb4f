//! The sink of the example, held to what every sink promises.

#[path = "../examples/custom_sink/file.rs"]
mod file;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use file::FileSink;
use postbox::testing::{Arrived, SinkBench, sink_suite};
use postbox::{Postgres, Sqlite};
use postbox_testkit::Testable;
use serde_json::Value;
use serde_json::value::RawValue;

/// A folder that can be away.
struct Bench {
    folder: tempfile::TempDir,
    read: AtomicUsize,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("there")).expect("a folder");
        Bench { folder, read: AtomicUsize::new(0) }
    }

    fn place(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn arrived(line: &str) -> Arrived {
    let all: Value = serde_json::from_str(line).expect("a line is JSON");
    let payload: std::collections::BTreeMap<String, Box<RawValue>> = serde_json::from_str(line).expect("an object");
    Arrived {
        id: all["id"].as_str().and_then(|id| id.parse().ok()).expect("an id"),
        topic: all["topic"].as_str().expect("a topic").to_owned(),
        key: all["key"].as_str().map(str::to_owned),
        payload: payload["payload"].get().into(),
    }
}

impl SinkBench for Bench {
    type Sink = FileSink;

    async fn sink(&self) -> FileSink {
        FileSink::at(self.place("there").join("messages.jsonl"))
    }

    async fn arrived(&self) -> Vec<Arrived> {
        let there = [self.place("there"), self.place("away")].into_iter().find(|folder| folder.is_dir());
        let text = std::fs::read_to_string(there.expect("the folder").join("messages.jsonl")).unwrap_or_default();
        // What is being written has no end yet.
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        let lines: Vec<&str> = whole.lines().collect();
        let from = self.read.swap(lines.len(), Ordering::Relaxed);
        lines[from..].iter().map(|line| arrived(line)).collect()
    }

    async fn answers(&self, does: bool) {
        let (from, to) = if does { ("away", "there") } else { ("there", "away") };
        if self.place(from).is_dir() {
            std::fs::rename(self.place(from), self.place(to)).expect("moved");
        }
    }
}

async fn passes<Db: Testable>() {
    let fresh = Db::fresh().await;
    sink_suite(&Bench::new(), &fresh.postbox).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_on_sqlite() {
    passes::<Sqlite>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_on_postgres() {
    passes::<Postgres>().await;
}

#[tokio::test]
async fn half_a_line_stays_alone() {
    use postbox::Envelope;
    use postbox::sink::Sink;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("messages.jsonl");
    std::fs::write(&path, "{\"id\":").expect("as after a crash");
    let message = postbox::testing::outgoing(Envelope::json("a.b", &1).expect("a draft"));
    assert_eq!(FileSink::at(&path).send(&[message]).await, [Ok(())]);
    let text = std::fs::read_to_string(&path).expect("the file");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines.len(), lines[0]), (2, "{\"id\":"));
    assert_eq!(arrived(lines[1]).topic, "a.b");
}

#[tokio::test]
async fn what_follows_a_line_that_is_too_long_waits() {
    use postbox::Envelope;
    use postbox::sink::Sink;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("messages.jsonl");
    let message = |key: &str, length: usize| {
        postbox::testing::outgoing(Envelope::json("a.b", &"x".repeat(length)).expect("a draft").key(key))
    };
    let sent = FileSink::at(&path).send(&[message("k", 1 << 20), message("k", 1), message("l", 1)]).await;
    let [Err(long), Err(behind), Ok(())] = sent.as_slice() else { panic!("{sent:?}") };
    assert!(long.is_final() && long.error().contains("1048576 are taken"), "{long:?}");
    assert!(behind.is_untried() && !behind.is_final(), "{behind:?}");
    let text = std::fs::read_to_string(&path).expect("the file");
    assert_eq!(text.lines().map(|line| arrived(line).key).collect::<Vec<_>>(), [Some("l".to_owned())]);
}
