//! One round: a fresh database, the faults, the healing, and the history for the checker. An hour is
//! made of many, so that memory and disk stay bounded and what breaks is told early.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use sqlx::Pool;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;
use tokio::sync::{mpsc, oneshot};

use crate::child::publisher::POOL_SIZE;
use crate::child::{ChildPlan, LEASE};
use crate::disturb;
use crate::dump;
use crate::fault::{Fault, Kind};
use crate::full::full;
use crate::ground::prepare;
use crate::history::{Acted, History, Sample};
use crate::operator;
use crate::plan::{Action, Child, schedule};
use crate::point::point_of_its_own;
use crate::site::{Site, number};
use crate::slot::{Wish, keep};
use crate::world::World;

/// A fault that has not been hit by the end of its time is tried for this much longer.
const OVERTIME: Duration = Duration::from_secs(90);
/// A run in which also the smallest parts of a fault have their turn.
const LONG: Duration = Duration::from_secs(600);
/// After healing, all is quiet within this.
const HEALED_WITHIN: Duration = Duration::from_secs(120);

/// What the children's keepers know of a round.
pub(crate) struct Round {
    pub(crate) world: Arc<World>,
    pub(crate) number: u32,
    pub(crate) seed: u64,
    pub(crate) folder: PathBuf,
    remote: String,
    /// What the operator was told is done.
    pub(crate) acted: Mutex<Vec<Acted>>,
    /// Whether a worker of this process is on record; asked here, as the keepers know no database.
    look: LookOut,
}

type LookOut = mpsc::UnboundedSender<(String, oneshot::Sender<Option<bool>>)>;

impl Round {
    /// What all children have in common.
    pub(crate) fn plan(&self) -> ChildPlan {
        let direct = self.world.direct(self.number);
        ChildPlan {
            kind: self.world.kind,
            url: direct.clone(),
            direct,
            prepared: true,
            wake_ups: true,
            pool_size: POOL_SIZE,
            seed: self.seed,
            name: String::new(),
            life: 0,
            log: PathBuf::new(),
            remote: self.remote.clone(),
            faults: self.world.faults.clone(),
            tag: None,
            hog_ms: None,
            patience_ms: None,
        }
    }

    /// A child with a trouble of its own, which healing ends.
    pub(crate) fn odd(&self, child: Child) -> bool {
        let world = &self.world;
        let troubled = match child {
            Child::Worker(slot) => {
                world.hogs(slot) || (world.wants(Fault::F14) && world.kind == Kind::Postgres && slot == 3)
            }
            _ => false,
        };
        troubled || world.is_hasty(child)
    }

    /// Whether the worker of this process is on record; `None`: the database does not say.
    pub(crate) async fn worker_is_there(&self, pid: Pid) -> Option<bool> {
        let (answer, answered) = oneshot::channel();
        let sql = format!(
            "select cast(count(*) as text) from {} where name like '%:{pid}'",
            match self.world.kind {
                Kind::Postgres => "postbox.worker",
                Kind::Sqlite => "postbox_worker",
            }
        );
        self.look.send((sql, answer)).ok()?;
        answered.await.ok().flatten()
    }
}

/// What a round adds up to.
#[derive(Debug, Default, Clone)]
pub(crate) struct Outcome {
    pub(crate) messages: u64,
    pub(crate) operations: u64,
    pub(crate) in_doubt: u64,
    pub(crate) broken: Vec<String>,
}

/// Which fault, and which part of one, has not been hit.
pub(crate) fn missing(world: &World, span: Duration) -> Vec<String> {
    let mut wanted: Vec<String> = world.faults.iter().map(|f| f.id().to_owned()).collect();
    // A short run cannot come to every point.
    if span >= Duration::from_secs(60) {
        let parts = |f: &Fault| f.parts(world.kind).into_iter().map(|part| format!("{f}:{part}")).collect::<Vec<_>>();
        wanted.extend(world.faults.iter().flat_map(parts));
        // It acts while faults are on.
        if !world.faults.is_empty() {
            wanted.extend(operator::DEEDS.iter().map(|deed| (*deed).to_owned()));
        }
    }
    if span >= LONG {
        let parts = |f: &Fault| f.small_parts().into_iter().map(|part| format!("{f}:{part}")).collect::<Vec<_>>();
        wanted.extend(world.faults.iter().flat_map(parts));
    }
    // No snapshot outlives a crash of the server: between two there may be no time for so many.
    let crashes = world.wants(Fault::F6) || world.wants(Fault::F16);
    wanted.retain(|id| id != "F17:delivered:1000" || !crashes);
    wanted.retain(|id| world.counts.of(id) == 0);
    wanted
}

/// What the load of a run that was long enough never had: known in the end only.
pub(crate) fn lacking(world: &World, span: Duration) -> Vec<&'static str> {
    if span < Duration::from_secs(60) {
        return Vec::new();
    }
    let wanted = ["load:repeated-calls", "load:pulled", "load:poisoned", "load:pulled-in-sql", "load:poisoned-in-sql"];
    let there = |what: &&str| world.kind == Kind::Postgres || !what.ends_with("-in-sql");
    wanted.into_iter().filter(there).filter(|what| world.counts.of(what) == 0).collect()
}

pub(crate) struct Stage<Db: Site> {
    round: Arc<Round>,
    pool: Pool<Db>,
    slots: Vec<(Child, mpsc::UnboundedSender<Wish>, tokio::task::JoinHandle<()>)>,
    remote: tokio::process::Child,
    samples: Arc<Mutex<BTreeMap<i64, Vec<Sample>>>>,
    helpers: Vec<tokio::task::JoinHandle<()>>,
    /// For faults; those who look wait for none of them.
    rough: Pool<Db>,
    /// The time of the faults is over: what has no end of its own ends.
    over: Arc<AtomicBool>,
}

/// One round, from an empty database to the verdict.
pub(crate) async fn play<Db: Site>(
    world: &Arc<World>,
    number: u32,
    seed: u64,
    span: Duration,
    last: bool,
    whole: Duration,
) -> Result<Outcome, String> {
    world.healing.store(world.faults.is_empty(), Ordering::SeqCst);
    let stage = Stage::<Db>::set(world, number, seed).await?;
    stage.hostilities(seed, span, last.then_some(whole)).await;
    stage.heal_and_check().await
}

impl<Db: Site> Stage<Db> {
    async fn set(world: &Arc<World>, number: u32, seed: u64) -> Result<Stage<Db>, String> {
        let folder = world.folder.join(format!("round-{number}"));
        std::fs::create_dir_all(&folder).map_err(|e| e.to_string())?;
        let pool = Db::pool(&world.direct(number), 6, Duration::from_secs(20)).map_err(|e| e.to_string())?;
        let rough = Db::pool(&world.direct(number), 8, Duration::from_secs(5)).map_err(|e| e.to_string())?;
        prepare::<Db>(&pool, &world.direct(number)).await.map_err(|e| format!("a fresh database: {e}"))?;
        let (look, mut asked) = mpsc::unbounded_channel::<(String, oneshot::Sender<Option<bool>>)>();
        let mut round =
            Round { world: world.clone(), number, seed, folder, remote: String::new(), acted: Mutex::default(), look };
        let (remote, address) = start_remote(&round).await.map_err(|e| format!("the remote: {e}"))?;
        round.remote = address;
        let round = Arc::new(round);
        let mut helpers = Vec::new();
        let looking = pool.clone();
        helpers.push(tokio::spawn(async move {
            while let Some((sql, answer)) = asked.recv().await {
                answer.send(look_at::<Db>(&looking, sql).await).ok();
            }
        }));
        let samples: Arc<Mutex<BTreeMap<i64, Vec<Sample>>>> = Arc::default();
        helpers.push(tokio::spawn(take_samples::<Db>(pool.clone(), samples.clone())));
        helpers.push(tokio::spawn(disturb::age_soon::<Db>(pool.clone())));
        helpers.push(tokio::spawn(operator::operate::<Db>(round.clone(), world.direct(number), round.remote.clone())));
        let children = (0..world.workers()).map(Child::Worker).chain((0..world.publishers()).map(Child::Publisher));
        let children = children.chain((0..world.crew().pullers).map(Child::Puller));
        let slots = children
            .map(|child| {
                let (wishes, task) = keep(round.clone(), child);
                (child, wishes, task)
            })
            .collect();
        Ok(Stage { round, pool, slots, remote, samples, helpers, rough, over: Arc::default() })
    }

    fn wish(&self, wanted: Child, wish: Wish) {
        if let Some((_, wishes, _)) = self.slots.iter().find(|(child, ..)| *child == wanted) {
            wishes.send(wish).ok();
        }
    }

    /// The faults, as the seed says; in the end, longer for those that have not been hit.
    async fn hostilities(&self, seed: u64, span: Duration, whole: Option<Duration>) {
        let world = &self.round.world;
        let begun = Instant::now();
        let plan = schedule(seed, &world.faults, world.kind, span + OVERTIME, world.crew());
        let mut under_way = tokio::task::JoinSet::new();
        for (at, action) in plan {
            let until = at.min(span).saturating_sub(begun.elapsed());
            tokio::time::sleep(until).await;
            if at >= span {
                let lacking = whole.map(|whole| missing(world, whole)).unwrap_or_default();
                if lacking.is_empty() {
                    break;
                }
                tokio::time::sleep(at.saturating_sub(begun.elapsed())).await;
            }
            self.perform(action, &mut under_way);
        }
        tokio::time::sleep(span.saturating_sub(begun.elapsed())).await;
        // Faults that no schedule has (of publishers, of handlers) have their overtime as well.
        while begun.elapsed() < span + OVERTIME && whole.is_some_and(|whole| !missing(world, whole).is_empty()) {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        self.over.store(true, Ordering::SeqCst);
        while under_way.join_next().await.is_some() {}
        eprintln!("the faults were on for {:.1?}", begun.elapsed());
    }

    fn perform(&self, action: Action, under_way: &mut tokio::task::JoinSet<()>) {
        let (world, rough) = (self.round.world.clone(), self.rough.clone());
        match action {
            Action::Kill(child) => self.wish(child, Wish::Kill),
            Action::Pause(slot, time) => self.wish(Child::Worker(slot), Wish::Pause(time)),
            Action::Terminate(slot, second) => self.wish(Child::Worker(slot), Wish::Terminate(second)),
            Action::Cut(cut) => {
                if let Some(proxy) = &world.proxy {
                    proxy.arm(cut);
                }
            }
            Action::EndBackends(most) => {
                let pool = self.pool.clone();
                under_way.spawn(async move { disturb::end_backends(&world, &pool, most).await });
            }
            Action::Crash(away) => {
                under_way.spawn(async move { world.crash_server(away).await });
            }
            Action::Point(point) => {
                let round = self.round.clone();
                let pool = self.pool.clone();
                let nth = fastrand::u64(..);
                under_way.spawn(async move { point_of_its_own::<Db>(&round, &pool, point, nth).await });
            }
            Action::Deafen(time) => {
                if let Some(proxy) = world.proxy.clone() {
                    under_way.spawn(async move { proxy.deafen_for(time).await });
                }
            }
            Action::Lock(table, time) => {
                under_way.spawn(async move { disturb::lock_table(&rough, table, time).await });
            }
            Action::Storm(notifications, open) => {
                under_way.spawn(async move { disturb::storm(&world, &rough, notifications, open).await });
            }
            Action::Full { wal, time } => {
                under_way.spawn(async move { full(&world, &rough, wal, time).await });
            }
            Action::OldSnapshot(time, writer) => {
                let over = self.over.clone();
                under_way.spawn(async move { disturb::old_snapshots(&world, &rough, &over, time, writer).await });
            }
        }
    }

    async fn heal_and_check(mut self) -> Result<Outcome, String> {
        let world = self.round.world.clone();
        let begun = Instant::now();
        let mut healed = Vec::new();
        world.healing.store(true, Ordering::SeqCst);
        if let Some(proxy) = &world.proxy {
            proxy.disarm();
        }
        if let Some(input) = self.remote.stdin.as_mut() {
            input.write_all(b"heal\n").await.map_err(|e| e.to_string())?;
        }
        let mut history = History::default();
        let mut silent = Vec::new();
        for (child, wishes, _) in &self.slots {
            wishes.send(Wish::Heal).ok();
            if matches!(child, Child::Publisher(_)) {
                let (done, quiet) = oneshot::channel();
                wishes.send(Wish::Quiet(done)).ok();
                silent.push((*child, quiet));
            }
        }
        for (child, quiet) in silent {
            if tokio::time::timeout(Duration::from_secs(60), quiet).await.is_err() {
                history.leftovers.push(format!("{child:?} did not come to an end with its last messages"));
            }
        }
        healed.push(format!("publishers done after {:.1?}", begun.elapsed()));
        self.wait_until_quiet(&mut history).await;
        healed.push(format!("all quiet after {:.1?}", begun.elapsed()));
        // The children still have their connections open: a poisoned one would show.
        match dump::idle_in_transaction(&self.pool).await {
            Ok(idle) => history.leftovers.extend(idle),
            Err(error) => history.leftovers.push(format!("the database does not answer after healing: {error}")),
        }
        self.stop().await;
        healed.push(format!("stopped after {:.1?}", begun.elapsed()));
        eprintln!("healing: {}", healed.join(", "));
        for helper in &self.helpers {
            helper.abort();
        }
        match dump::leftovers(&self.pool).await {
            Ok(left) => history.leftovers.extend(left),
            Err(error) => history.leftovers.push(format!("the database does not answer after healing: {error}")),
        }
        self.remote.kill().await.ok();
        self.collect(history).await
    }

    async fn wait_until_quiet(&self, history: &mut History) {
        let begun = Instant::now();
        loop {
            let left = dump::unfinished(&self.pool).await;
            match left {
                Ok((0, _)) => break,
                Ok((left, told)) if begun.elapsed() > HEALED_WITHIN => {
                    let within = HEALED_WITHIN.as_secs();
                    history
                        .leftovers
                        .push(format!("{left} deliveries are unfinished {within} s after healing: {told}"));
                    break;
                }
                Err(error) if begun.elapsed() > HEALED_WITHIN => {
                    history.leftovers.push(format!("the database does not answer after healing: {error}"));
                    break;
                }
                _ => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
        // Dead workers' rows go when somebody looks.
        let expired = match Db::KIND {
            Kind::Postgres => {
                "select cast(count(*) as text) from postbox.worker where expires_at < clock_timestamp() - interval '500 ms'"
            }
            Kind::Sqlite => "select '0'",
        };
        let begun = Instant::now();
        while look_at::<Db>(&self.pool, expired.into()).await != Some(false) {
            if begun.elapsed() > LEASE + Duration::from_secs(15) {
                history.leftovers.push("expired workers are not taken over".into());
                break;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn stop(&mut self) {
        let mut ends = Vec::new();
        for (_, wishes, _) in &self.slots {
            let (done, ended) = oneshot::channel();
            wishes.send(Wish::End(done)).ok();
            ends.push(ended);
        }
        for ended in ends {
            tokio::time::timeout(Duration::from_secs(60), ended).await.ok();
        }
        for (_, _, task) in self.slots.drain(..) {
            tokio::time::timeout(Duration::from_secs(5), task).await.ok();
        }
    }

    async fn collect(self, mut history: History) -> Result<Outcome, String> {
        dump::dump(&self.pool, &mut history).await.map_err(|e| format!("the dump: {e}"))?;
        history.samples = self.samples.lock().map(|samples| samples.clone()).unwrap_or_default();
        self.pool.close().await;
        self.rough.close().await;
        let folder = &self.round.folder;
        for slot in 0..self.round.world.publishers() {
            let log = std::fs::read_to_string(folder.join(format!("p{slot}.witness"))).unwrap_or_default();
            history.read_publisher(&log);
        }
        for slot in 0..self.round.world.crew().pullers {
            let log = std::fs::read_to_string(folder.join(format!("q{slot}.witness"))).unwrap_or_default();
            history.read_puller(&log);
        }
        for slot in 0..self.round.world.workers() {
            let name = format!("w{slot}");
            let log = std::fs::read_to_string(folder.join(format!("{name}.witness"))).unwrap_or_default();
            history.read_worker(&name, &log);
        }
        history.acted = self.round.acted.lock().map(|acted| acted.clone()).unwrap_or_default();
        let log =
            std::fs::read_to_string(folder.join("remote.witness")).map_err(|e| format!("the remote's log: {e}"))?;
        history.read_remote(&log);
        let operations: std::collections::HashSet<i64> = (history.deliveries.iter())
            .filter(|d| crate::traffic::subscribed(&d.subscription).is_some_and(|s| s.kind.calls()))
            .map(|d| d.id)
            .collect();
        let doubts: std::collections::HashSet<i64> = (history.attempts.iter())
            .filter(|a| matches!(a.outcome.as_deref(), Some("in_doubt" | "panicked" | "timed_out")))
            .map(|a| a.delivery)
            .filter(|d| operations.contains(d))
            .collect();
        for (what, times) in crate::check::load::seen(&history) {
            self.round.world.counts.add(what, times);
        }
        let broken = crate::check::check(&history);
        if self.round.world.keep || !broken.is_empty() {
            std::fs::write(folder.join("history.txt"), format!("{history:#?}")).ok();
            self.round.world.keep_database(self.round.number, folder).await;
        }
        Ok(Outcome {
            messages: history.messages.len() as u64,
            operations: operations.len() as u64,
            in_doubt: doubts.len() as u64,
            broken,
        })
    }
}

/// Whether there is one; `None`: the database does not say.
async fn look_at<Db: Site>(pool: &Pool<Db>, sql: String) -> Option<bool> {
    let look = async {
        let mut connection = Db::acquire(pool).await?;
        Db::rows(&mut connection, sql).await
    };
    match tokio::time::timeout(Duration::from_secs(2), look).await {
        Ok(Ok(rows)) => Some(number(&rows) > 0),
        _ => None,
    }
}

async fn take_samples<Db: Site>(pool: Pool<Db>, samples: Arc<Mutex<BTreeMap<i64, Vec<Sample>>>>) {
    loop {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let Ok(Ok(seen)) = tokio::time::timeout(Duration::from_secs(5), dump::sample(&pool)).await else { continue };
        let Ok(mut samples) = samples.lock() else { return };
        for (delivery, sample) in seen {
            let known = samples.entry(delivery).or_default();
            if !known.contains(&sample) {
                known.push(sample);
            }
        }
    }
}

async fn start_remote(round: &Round) -> std::io::Result<(tokio::process::Child, String)> {
    let plan = ChildPlan { name: "remote".into(), log: round.folder.join("remote.witness"), ..round.plan() };
    let log = std::fs::File::create(round.folder.join("remote.log"))?;
    let mut process = Command::new(std::env::current_exe()?)
        .arg("remote")
        .arg(serde_json::to_string(&plan)?)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()?;
    let output = process.stdout.take().ok_or_else(|| std::io::Error::other("no output"))?;
    let line = BufReader::new(output).lines().next_line().await?.unwrap_or_default();
    match line.strip_prefix("listening ") {
        Some(address) => Ok((process, address.to_owned())),
        None => Err(std::io::Error::other("it did not start; see remote.log")),
    }
}
