//! A place for a child process: starts it, hears what it says, does to it what the schedule wants, and
//! starts the next one when it is gone.

use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{ChildStdin, ChildStdout, Command};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::child::ChildPlan;
use crate::child::worker::{LEFT_OVER, NOT_STARTED};
use crate::fault::{Fault, Kind, PUBLISHER_POINTS, PULLER_POINTS, WORKER_POINTS};
use crate::plan::Child;
use crate::round::Round;

/// How long a process runs between two pauses at least.
const BREATH: Duration = Duration::from_millis(300);
/// A child that was told to end does it within this.
const LONGEST_STOP: Duration = Duration::from_secs(40);
/// An armed child that does not come to its point is killed where it is.
const ARMED_FOR: Duration = Duration::from_secs(7);

/// What is wanted of a child.
#[derive(Debug)]
pub(crate) enum Wish {
    Kill,
    Pause(Duration),
    Terminate(Duration),
    /// No faults any more; a child that a fault has crippled is replaced.
    Heal,
    /// Publishers: finish what is under way, and say so.
    Quiet(oneshot::Sender<()>),
    /// End for good, in order.
    End(oneshot::Sender<()>),
}

/// A running child and what is known of it.
struct Life {
    process: tokio::process::Child,
    input: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    pid: Pid,
    armed: Option<&'static str>,
    kill_at: Option<Instant>,
    drain_at: Option<Instant>,
    terminated: Option<Instant>,
    second_at: Option<Instant>,
    /// Handlers ran when the second signal came.
    second_busy: bool,
    signals: u32,
    aborted: bool,
    crippled: bool,
}

pub(crate) struct Slot {
    round: Arc<Round>,
    child: Child,
    wishes: mpsc::UnboundedReceiver<Wish>,
    quiet: Option<oneshot::Sender<()>>,
    is_quiet: bool,
    ending: Option<oneshot::Sender<()>>,
    lives: u32,
}

/// Starts keeping a child.
pub(crate) fn keep(round: Arc<Round>, child: Child) -> (mpsc::UnboundedSender<Wish>, tokio::task::JoinHandle<()>) {
    let (sender, wishes) = mpsc::unbounded_channel();
    let slot = Slot { round, child, wishes, quiet: None, is_quiet: false, ending: None, lives: 0 };
    (sender, tokio::spawn(slot.run()))
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

impl Slot {
    fn name(&self) -> String {
        match self.child {
            Child::Worker(n) => format!("w{n}"),
            Child::Publisher(n) => format!("p{n}"),
            Child::Puller(n) => format!("q{n}"),
        }
    }

    async fn run(mut self) {
        while self.ending.is_none() {
            self.lives += 1;
            match self.start().await {
                Ok(life) => self.live(life).await,
                Err(error) => {
                    let name = self.name();
                    self.round.world.broken(format!("the run itself: {name} could not be started: {error}"));
                    return;
                }
            }
            // A publisher that has gone quiet needs no successor.
            if self.is_quiet && self.ending.is_none() {
                self.wait_for_the_end().await;
            }
        }
        if let Some(done) = self.ending.take() {
            done.send(()).ok();
        }
    }

    async fn wait_for_the_end(&mut self) {
        while let Some(wish) = self.wishes.recv().await {
            match wish {
                Wish::End(done) => return self.ending = Some(done),
                Wish::Quiet(done) => drop(done.send(())),
                _ => {}
            }
        }
        self.ending = Some(oneshot::channel().0);
    }

    /// Every second life has a point at which it ends; which, follows from the seed. A point that was
    /// never hit goes before: each shall have been.
    fn arm(&self, dice: &mut fastrand::Rng) -> Option<(&'static str, u32)> {
        let world = &self.round.world;
        let (points, slot) = match self.child {
            // The others have a trouble of their own.
            Child::Worker(slot) if slot < 3 => (WORKER_POINTS, slot),
            Child::Worker(_) => return None,
            Child::Publisher(slot) => (PUBLISHER_POINTS, slot),
            Child::Puller(slot) => (PULLER_POINTS, slot),
        };
        if !world.wants(Fault::F1) || !world.hostile() {
            return None;
        }
        let (often, some) = (dice.u32(1..12), dice.u32(1..3));
        let never: Vec<&str> = points.iter().copied().filter(|p| world.counts.of(&format!("F1:{p}")) == 0).collect();
        // Retention looks once a minute, and when a worker starts.
        let nth = |point: &str, wanted: u32| if point == "retention" { 1 } else { wanted };
        if !never.is_empty() {
            let point = never[(self.lives as usize + slot) % never.len()];
            return Some((point, nth(point, some)));
        }
        if self.lives.is_multiple_of(2) {
            return None;
        }
        let point = points[(self.round.seed as usize % 64 + self.lives as usize / 2 * 3 + slot) % points.len()];
        let seldom = ["reconciling", "resolving", "draining"].contains(&point);
        Some((point, nth(point, if seldom { some } else { often })))
    }

    /// How long a SIGTERM waits for what runs, in every second life; the end that never came goes before.
    fn patience(&self, dice: &mut fastrand::Rng) -> Option<u64> {
        let never = |part: &str| self.round.world.counts.of(part) == 0;
        let (patient, wait) = (dice.bool(), dice.u64(10..120));
        match (never("F19:deadline"), never("F19:second")) {
            (true, false) => Some(wait),
            (false, true) => None,
            _ => patient.then_some(wait),
        }
    }

    async fn start(&self) -> std::io::Result<Life> {
        let round = &self.round;
        let name = self.name();
        let slot_seed = match self.child {
            Child::Worker(n) => 100 + n as u64,
            Child::Publisher(n) => 200 + n as u64,
            Child::Puller(n) => 300 + n as u64,
        };
        let mut dice = fastrand::Rng::with_seed(round.seed ^ (slot_seed << 32) ^ u64::from(self.lives));
        let plan = ChildPlan {
            seed: dice.u64(..),
            life: self.lives,
            log: round.folder.join(format!("{name}.witness")),
            patience_ms: self.patience(&mut dice),
            name: name.clone(),
            ..round.plan()
        };
        let (role, plan) = match self.child {
            Child::Worker(slot) => ("worker", round.world.worker_plan(slot, plan)),
            Child::Publisher(slot) => ("publisher", round.world.publisher_plan(slot, plan)),
            Child::Puller(_) => ("puller", round.world.puller_plan(plan)),
        };
        let armed = self.arm(&mut dice);
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(round.folder.join(format!("{name}.log")))?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg(role)
            .arg(serde_json::to_string(&plan)?)
            .env_remove("POSTBOX_CRASH_POINT")
            // Panics are part of the game: naming every frame of each takes seconds of a runtime's thread.
            .env("RUST_BACKTRACE", "0")
            .envs(armed.map(|(point, nth)| ("POSTBOX_CRASH_POINT", format!("{point}:{nth}"))))
            .envs(round.world.wrong_clock(&plan))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true);
        let mut process = command.spawn()?;
        let pid = Pid::from_raw(process.id().unwrap_or_default() as i32);
        let lines = match process.stdout.take() {
            Some(output) => BufReader::new(output).lines(),
            None => return Err(std::io::Error::other("a child without output")),
        };
        let now = Instant::now();
        Ok(Life {
            input: process.stdin.take(),
            process,
            lines,
            pid,
            armed: armed.map(|(point, _)| point),
            kill_at: armed.map(|_| now + ARMED_FOR),
            drain_at: armed
                .filter(|(point, _)| *point == "draining")
                .map(|_| now + Duration::from_millis(dice.u64(800..2000))),
            terminated: None,
            second_at: None,
            second_busy: false,
            signals: 0,
            aborted: false,
            crippled: false,
        })
    }

    /// Until this child is gone.
    async fn live(&mut self, mut life: Life) {
        if self.quiet.is_some() || (self.is_quiet && self.ending.is_none()) {
            life.tell("quiet").await;
        }
        loop {
            tokio::select! {
                line = life.lines.next_line() => match line {
                    Ok(Some(line)) => if self.heard(&mut life, &line).await { return },
                    _ => return self.gone(life).await,
                },
                wish = self.wishes.recv() => match wish {
                    Some(wish) => if self.wished(&mut life, wish).await { return },
                    None => { life.kill().await; return self.ending = Some(oneshot::channel().0) }
                },
                () = at(life.kill_at) => {
                    life.kill().await;
                    return self.killed("random");
                }
                () = at(life.drain_at) => {
                    life.drain_at = None;
                    life.terminate();
                }
                () = at(life.second_at) => {
                    life.second_at = None;
                    life.terminate();
                }
                () = at(life.terminated.map(|t| t + LONGEST_STOP)) => {
                    let name = self.name();
                    self.round.world.broken(format!(
                        "F19: {name} (process {}) did not end within {LONGEST_STOP:?} of SIGTERM; its threads: {}",
                        life.pid,
                        threads(life.pid)
                    ));
                    life.kill().await;
                    return;
                }
            }
        }
    }

    fn killed(&self, how: &str) {
        let world = &self.round.world;
        if !world.wants(Fault::F1) {
            return;
        }
        world.counts.add(&format!("F1:{how}"), 1);
        if world.kind == Kind::Sqlite && world.wants(Fault::F22) {
            world.counts.add("F22:kill", 1);
        }
    }

    /// Takes a line; whether the child is gone with it.
    async fn heard(&mut self, life: &mut Life, line: &str) -> bool {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["crash", "point", point] => {
                life.kill().await;
                self.killed(point);
                return true;
            }
            ["hit", id, times] => {
                self.round.world.hit(id, times.parse().unwrap_or(1));
                match *id {
                    "F18:abort" => life.aborted = true,
                    // A thread is gone for good: after a while, so is the process.
                    "F18:block" => {
                        life.crippled = true;
                        life.kill_at.get_or_insert(Instant::now() + Duration::from_secs(4));
                    }
                    _ => {}
                }
            }
            ["broken", what @ ..] => self.round.world.broken(format!("{} ({})", what.join(" "), self.name())),
            ["terminated", running] => {
                life.signals += 1;
                life.second_busy = life.signals > 1 && *running != "0";
            }
            ["quiet"] => {
                self.is_quiet = true;
                if let Some(done) = self.quiet.take() {
                    done.send(()).ok();
                }
            }
            _ => {}
        }
        false
    }

    /// Does as wished; whether the child is gone with it.
    async fn wished(&mut self, life: &mut Life, wish: Wish) -> bool {
        match wish {
            Wish::Kill => {
                life.kill().await;
                self.killed("random");
                true
            }
            Wish::Pause(time) => {
                self.pause(life, time).await;
                false
            }
            Wish::Terminate(second) => {
                life.terminate();
                life.second_at = Some(Instant::now() + second);
                false
            }
            Wish::Heal => {
                let odd = self.round.odd(self.child);
                if life.armed.is_some() || life.crippled || odd {
                    life.kill().await;
                    return true;
                }
                life.kill_at = None;
                life.tell("heal").await;
                false
            }
            Wish::Quiet(done) => {
                self.quiet = Some(done);
                life.tell("quiet").await;
                false
            }
            Wish::End(done) => {
                self.ending = Some(done);
                match self.child {
                    Child::Worker(_) => {
                        life.terminate();
                        false
                    }
                    Child::Publisher(_) => {
                        life.kill().await;
                        true
                    }
                    // In order, so that its worker row goes with it.
                    Child::Puller(_) => {
                        life.tell("end").await;
                        life.terminated.get_or_insert_with(Instant::now);
                        false
                    }
                }
            }
        }
    }

    /// Stops the process for longer than a lease, and lets it go on.
    async fn pause(&mut self, life: &Life, time: Duration) {
        let there = self.round.worker_is_there(life.pid).await;
        if kill(life.pid, Signal::SIGSTOP).is_err() {
            return;
        }
        // Whatever the database does meanwhile, the pause ends in time, and the process has time to draw
        // breath before the next one: pauses stay within the assumption.
        let (sleep, look) = (tokio::time::sleep, self.round.worker_is_there(life.pid));
        let look = async {
            sleep(time.saturating_sub(Duration::from_millis(250))).await;
            tokio::time::timeout(Duration::from_millis(200), look).await.ok().flatten()
        };
        let ((), still) = tokio::join!(sleep(time), look);
        kill(life.pid, Signal::SIGCONT).ok();
        sleep(BREATH).await;
        // On PostgreSQL it was taken over; on SQLite it lives for as long as its process does.
        let wanted = Some(self.round.world.kind == Kind::Sqlite);
        if there == Some(true) && still == wanted {
            self.round.world.counts.add("F2", 1);
        }
    }

    async fn gone(&mut self, mut life: Life) {
        let Ok(status) = life.process.wait().await else { return };
        if life.second_busy && life.terminated.is_some() {
            self.round.world.counts.add("F19:second", 1);
        }
        if !self.expected(&life, status) {
            let name = self.name();
            self.round.world.broken(format!("the run itself: {name} ended by itself ({status}); see {name}.log"));
        }
        if self.ending.is_none() {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    fn expected(&self, life: &Life, status: ExitStatus) -> bool {
        use std::os::unix::process::ExitStatusExt;
        match (status.code(), status.signal()) {
            // The database was away when it started.
            (Some(NOT_STARTED), _) => true,
            (Some(0 | LEFT_OVER), _) => life.terminated.is_some(),
            (_, Some(signal)) if signal == Signal::SIGABRT as i32 => life.aborted,
            // A signal that came before it listened.
            (_, Some(signal)) if signal == Signal::SIGTERM as i32 => life.terminated.is_some(),
            _ => false,
        }
    }
}

/// What each thread of a process is at: its name, its state, and where in the kernel it waits.
fn threads(pid: Pid) -> String {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return "gone".into() };
    let told = tasks.flatten().map(|task| {
        let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        // After the name in parentheses: the state, and from there on numbers; the times are the 12th and 13th.
        let stat = read("stat");
        let rest: Vec<&str> = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').collect();
        let at = |n: usize| rest.get(n).copied().unwrap_or("?").to_owned();
        format!("{} {} {} ({}+{})", read("comm").trim(), at(0), read("wchan").trim(), at(11), at(12))
    });
    told.collect::<Vec<_>>().join(", ")
}

impl Life {
    async fn kill(&mut self) {
        self.process.kill().await.ok();
    }

    fn terminate(&mut self) {
        if kill(self.pid, Signal::SIGTERM).is_ok() {
            self.terminated.get_or_insert_with(Instant::now);
        }
    }

    async fn tell(&mut self, line: &str) {
        if let Some(input) = &mut self.input {
            input.write_all(format!("{line}\n").as_bytes()).await.ok();
        }
    }
}
