//! The example on real input, as a user runs it: once, a second time, killed and started again. Each
//! time it says that all is equal, and its table is the same, on both stores.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use sqlx::Connection;

/// A restart has to wait before it believes that a lost call did not arrive.
const AT_MOST: Duration = Duration::from_secs(150);

/// Where the example finds its database.
struct House {
    folder: tempfile::TempDir,
    /// PostgreSQL: the server and a schema that nobody else has.
    postgres: Option<(String, String)>,
}

impl House {
    fn on_sqlite() -> House {
        House { folder: tempfile::tempdir().expect("a folder"), postgres: None }
    }

    fn on_postgres() -> House {
        let schema = format!("postbox_github_{}", &uuid::Uuid::now_v7().simple().to_string()[20..]);
        House {
            folder: tempfile::tempdir().expect("a folder"),
            postgres: Some((postbox_testkit::shared_url(), schema)),
        }
    }

    fn start(&self) -> Running {
        let mut command = Command::new(example());
        command.arg("--state").arg(self.folder.path()).current_dir(self.folder.path());
        // What is set around the tests must not pick the database.
        for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("POSTBOX_") || n.starts_with("PG")) {
            command.env_remove(name);
        }
        match &self.postgres {
            Some((url, schema)) => command.env("DATABASE_URL", url).args(["--schema", schema]),
            None => command.env_remove("DATABASE_URL").arg("--sqlite").arg(self.folder.path().join("github.db")),
        };
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the example starts");
        let mut stdout = child.stdout.take().expect("its output");
        let (said, heard) = channel();
        let lines = BufReader::new(child.stderr.take().expect("its words"));
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                eprintln!("  {line}");
                said.send(line).ok();
            }
        });
        let (send, printed) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut text = String::new();
            stdout.read_to_string(&mut text).ok();
            send.send(text).ok();
        });
        Running { child, printed, heard }
    }

    /// Runs it to its end; the table.
    fn run(&self) -> String {
        self.start().table()
    }

    /// What the announcement server did so far.
    fn journal(&self) -> String {
        let files = std::fs::read_dir(self.folder.path()).into_iter().flatten().flatten();
        let journals = files.map(|f| f.path()).filter(|f| f.extension().is_some_and(|e| e == "jsonl"));
        journals.filter_map(|f| std::fs::read_to_string(f).ok()).collect()
    }
}

impl Drop for House {
    fn drop(&mut self) {
        let Some((url, schema)) = self.postgres.clone() else { return };
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            if let Ok(mut connection) = sqlx::PgConnection::connect(&url).await {
                let sql =
                    format!("drop schema if exists {schema} cascade; drop schema if exists {schema}_example cascade");
                sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut connection).await.ok();
            }
        });
    }
}

/// The example as a process of its own; dropped, it is killed.
struct Running {
    child: Child,
    /// What it printed, once it has ended.
    printed: Receiver<String>,
    heard: Receiver<String>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Running {
    fn table(mut self) -> String {
        let table = self.printed.recv_timeout(AT_MOST).expect("the example ends");
        let status = self.child.wait().expect("its end");
        assert!(status.success(), "the example ended with {status}:\n{table}");
        table
    }

    fn kill_when(mut self, mut half_way: impl FnMut(&Running) -> bool) {
        let give_up = Instant::now() + AT_MOST;
        while !half_way(&self) {
            assert!(Instant::now() < give_up, "it never came that far");
            assert!(self.child.try_wait().expect("it can be asked").is_none(), "it ended before it could be killed");
            std::thread::yield_now();
        }
        self.child.kill().expect("it can be killed");
        assert_eq!(self.child.wait().expect("it ends").signal(), Some(9));
    }
}

/// The example's program: beside this test's, built if need be.
fn example() -> PathBuf {
    let test = std::env::current_exe().expect("this program");
    let folder = test.parent().and_then(Path::parent).expect("the folder of the build");
    let program = folder.join("examples").join(format!("github_events{}", std::env::consts::EXE_SUFFIX));
    let built = |file: &Path| file.metadata().and_then(|m| m.modified()).ok();
    // `cargo test --test suite` builds no examples. With the features of this program nothing else is built anew.
    let features = [
        ("postbox/redis", cfg!(feature = "redis")),
        ("postbox/tokio-postgres", cfg!(feature = "tokio-postgres")),
        ("postbox/webhook", cfg!(feature = "webhook")),
    ];
    let features: Vec<_> = features.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    static BUILD: std::sync::Once = std::sync::Once::new();
    BUILD.call_once(|| {
        if built(&program) < built(&test) {
            let mut cargo = Command::new(env!("CARGO"));
            cargo.args(["build", "--quiet", "--workspace", "--example", "github_events", "--features"]);
            cargo.arg(features.join(",")).current_dir(env!("CARGO_MANIFEST_DIR"));
            // What cargo tells this test is not meant for the build: it would build the dependencies anew.
            for (name, _) in
                std::env::vars().filter(|(n, _)| ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|p| n.starts_with(p)))
            {
                cargo.env_remove(name);
            }
            if folder.file_name().is_some_and(|name| name == "release") {
                cargo.arg("--release");
            }
            assert!(cargo.status().expect("cargo runs").success(), "the example does not build");
        }
    });
    program
}

fn again_and_again(house: House) -> String {
    let first = house.run();
    assert!(first.contains("are equal") && !first.contains("DIFFERS"), "{first}");
    assert_eq!(house.run(), first, "a second run changes nothing");
    first
}

fn killed_twice(house: House) -> String {
    // While it publishes: some batches are there, some are not.
    house.start().kill_when(|running| running.heard.try_iter().any(|line| line.starts_with("published 150 of")));
    // While the server has announced a release and the answer is awaited (for 300 ms); a little into
    // it, when what came before is settled, so that nothing else is in doubt.
    let mut since = None;
    house.start().kill_when(|_| {
        if since.is_none() && house.journal().contains("announced_silently") {
            since = Some(Instant::now());
        }
        since.is_some_and(|s| s.elapsed() > Duration::from_millis(150))
    });
    let table = house.run();
    assert_eq!(house.run(), table, "a second run changes nothing");
    table
}

#[test]
fn once_and_again_on_sqlite() {
    again_and_again(House::on_sqlite());
}

#[test]
fn once_and_again_on_postgres() {
    again_and_again(House::on_postgres());
}

#[test]
fn killed_and_started_again_on_sqlite() {
    let undisturbed = House::on_sqlite().run();
    assert_eq!(killed_twice(House::on_sqlite()), undisturbed);
}

#[test]
fn killed_and_started_again_on_postgres() {
    let undisturbed = House::on_sqlite().run();
    assert_eq!(killed_twice(House::on_postgres()), undisturbed, "and the stores agree");
}
