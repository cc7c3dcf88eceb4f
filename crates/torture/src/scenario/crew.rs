//! The members of a scenario: worker processes that are started, stopped, and killed with SIGKILL.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::Instant;

use super::{Part, Setting, now_us};
use crate::world::{Counts, locked};

/// How long a member may take until it works.
const LONGEST_START: Duration = Duration::from_secs(40);

/// What is done to members while faults are on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Trouble {
    /// Between two blows, in milliseconds.
    pub(crate) rest: (u64, u64),
    /// Of ten blows so many are stops.
    pub(crate) stops: u32,
    /// How long a stop lasts, in milliseconds: longer than the lease.
    pub(crate) stopped: (u64, u64),
    /// Points at which some lives end.
    pub(crate) points: &'static [&'static str],
}

/// A process that was stopped, by the machine's clock in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stop {
    pub(crate) pid: i64,
    pub(crate) from: u64,
    pub(crate) to: u64,
}

/// What all members have in common.
pub(crate) struct Crew {
    pub(crate) folder: PathBuf,
    pub(crate) counts: Arc<Counts>,
    pub(crate) stops: Mutex<Vec<Stop>>,
}

impl Crew {
    pub(crate) fn new(setting: &Setting<'_>) -> Arc<Crew> {
        let (folder, counts) = (setting.folder.to_owned(), setting.counts.clone());
        Arc::new(Crew { folder, counts, stops: Mutex::default() })
    }
}

/// Does this with all places at once.
pub(crate) async fn each(
    places: &mut [Place],
    act: impl AsyncFn(&mut Place) -> Result<(), String>,
) -> Result<(), String> {
    let all = futures_util::future::join_all(places.iter_mut().map(|place| act(place))).await;
    all.into_iter().collect()
}

/// A place for a member: one process after the other.
pub(crate) struct Place {
    crew: Arc<Crew>,
    part: Part,
    /// Variables of its processes.
    clock: Vec<(&'static str, String)>,
    dice: fastrand::Rng,
    process: Option<Process>,
    lives: usize,
}

struct Process {
    child: Child,
    /// The member ends when this closes.
    _input: Option<ChildStdin>,
    pid: Pid,
    armed: bool,
}

impl Place {
    pub(crate) fn new(crew: &Arc<Crew>, part: Part, seed: u64) -> Place {
        let dice = fastrand::Rng::with_seed(seed);
        Place { crew: crew.clone(), part, clock: Vec::new(), dice, process: None, lives: 0 }
    }

    /// From its next process on, its clock is this.
    pub(crate) fn set_clock(&mut self, clock: Vec<(&'static str, String)>) {
        self.clock = clock;
    }

    /// Sees to it that a process works here; some are to end at a point.
    async fn live(&mut self, points: &[&'static str]) -> Result<(), String> {
        if let Some(process) = &mut self.process
            && process.child.try_wait().is_ok_and(|ended| ended.is_none())
        {
            return Ok(());
        }
        self.process = None;
        let begun = Instant::now();
        while begun.elapsed() < LONGEST_START {
            self.lives += 1;
            // Each second life, each point in turn.
            let point =
                self.lives.is_multiple_of(2).then(|| points.get(self.lives / 2 % points.len().max(1))).flatten();
            let nth = self.dice.u32(1..4);
            let armed = point.map(|point| format!("{point}:{nth}"));
            if let Some(process) = self.start(armed).await.map_err(|e| format!("{}: {e}", self.part.name))? {
                self.process = Some(process);
                return Ok(());
            }
        }
        Err(format!("{} did not come to work within {LONGEST_START:?}; see its log", self.part.name))
    }

    /// `None`: it was gone before it worked.
    async fn start(&self, armed: Option<String>) -> std::io::Result<Option<Process>> {
        let log = self.crew.folder.join(format!("{}.log", self.part.name));
        let log = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let mut child = Command::new(std::env::current_exe()?)
            .arg("member")
            .arg(serde_json::to_string(&self.part)?)
            .env_remove("POSTBOX_CRASH_POINT")
            .env("RUST_BACKTRACE", "0")
            .envs(self.clock.iter().map(|(name, value)| (*name, value.as_str())))
            .envs(armed.iter().map(|point| ("POSTBOX_CRASH_POINT", point.as_str())))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()?;
        let pid = Pid::from_raw(child.id().unwrap_or_default() as i32);
        let output = child.stdout.take().ok_or_else(|| std::io::Error::other("no output"))?;
        let mut lines = BufReader::new(output).lines();
        let process = Process { _input: child.stdin.take(), child, pid, armed: armed.is_some() };
        loop {
            match tokio::time::timeout(LONGEST_START, lines.next_line()).await {
                Ok(Ok(Some(line))) if line == "ready" => break,
                Ok(Ok(Some(line))) => struck(&line, pid, &self.crew.counts),
                _ => return Ok(None),
            }
        }
        tokio::spawn(hear(lines, pid, self.crew.counts.clone()));
        Ok(Some(process))
    }

    /// Is killed and stopped until then, and works in the end.
    pub(crate) async fn suffer(&mut self, until: Instant, trouble: Trouble) -> Result<(), String> {
        let ms = |dice: &mut fastrand::Rng, (from, to): (u64, u64)| Duration::from_millis(dice.u64(from..to));
        while Instant::now() < until {
            self.live(trouble.points).await?;
            tokio::time::sleep_until(until.min(Instant::now() + ms(&mut self.dice, trouble.rest))).await;
            if Instant::now() >= until {
                break;
            }
            let stopped = ms(&mut self.dice, trouble.stopped);
            if self.dice.u32(..10) < trouble.stops {
                self.stop(stopped).await;
            } else {
                self.kill().await;
                tokio::time::sleep(ms(&mut self.dice, (20, 300))).await;
            }
        }
        // One that is to end at a point would do so when nobody expects it.
        if self.process.as_ref().is_some_and(|process| process.armed) {
            self.kill().await;
        }
        self.live(&[]).await
    }

    /// Sees to it that a process works here, which no point ends.
    pub(crate) async fn work(&mut self) -> Result<(), String> {
        self.live(&[]).await
    }

    /// Whether the process that worked here last works still.
    pub(crate) fn works(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.child.try_wait().is_ok_and(|ended| ended.is_none()))
    }

    /// kill -9, if there is one.
    pub(crate) async fn kill(&mut self) {
        if let Some(mut process) = self.process.take()
            && process.child.try_wait().is_ok_and(|ended| ended.is_none())
            && process.child.kill().await.is_ok()
        {
            self.crew.counts.add("F1:random", 1);
        }
    }

    /// SIGSTOP, and SIGCONT later.
    async fn stop(&mut self, time: Duration) {
        let Some(process) = &self.process else { return };
        let from = now_us();
        if kill(process.pid, Signal::SIGSTOP).is_err() {
            return;
        }
        tokio::time::sleep(time).await;
        let pid = i64::from(process.pid.as_raw());
        kill(process.pid, Signal::SIGCONT).ok();
        locked(&self.crew.stops).push(Stop { pid, from, to: now_us() });
        self.crew.counts.add("F2", 1);
    }
}

/// Hears what a member says, until it is gone.
async fn hear(mut lines: Lines<BufReader<ChildStdout>>, pid: Pid, counts: Arc<Counts>) {
    while let Ok(Some(line)) = lines.next_line().await {
        struck(&line, pid, &counts);
    }
}

/// One that stands at its point is killed there.
fn struck(line: &str, pid: Pid, counts: &Counts) {
    if let Some(point) = line.strip_prefix("crash point ")
        && kill(pid, Signal::SIGKILL).is_ok()
    {
        counts.add(&format!("F1:{point}"), 1);
    }
}
