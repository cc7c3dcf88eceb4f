//! A publisher in a process of its own: business rows and messages in one transaction, and a log of
//! what was told about each.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use postbox::{Draft, Envelope, Error, Postbox, PublishError, crash};
use sqlx::Pool;

use super::drops::{Cut, PATIENCE};
use super::races::races;
use super::{ChildPlan, hit, listen, say};
use crate::fault::{Fault, Kind};
use crate::full::PUBLISHER_TOLD;
use crate::log::Log;
use crate::site::{Session, Site, code, is_refused_as_full, number};
use crate::traffic::{POISON_ATTEMPTS, is_poison, topic};

/// Publishers at once in one process.
const LANES: usize = 3;
/// Races at once, beside them.
const RACES: usize = 2;
/// Nothing is published while this many deliveries are unfinished: healing shall not take long.
const MOST_UNFINISHED: i64 = 250;

/// What a publisher was told about a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    Ok,
    Fail,
    Unknown,
}

impl Told {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Told::Ok => "ok",
            Told::Fail => "fail",
            Told::Unknown => "unknown",
        }
    }
}

/// Connections of postbox's own, and beside it.
pub(crate) const POOL_SIZE: u32 = 14;
const OWN_POOL_SIZE: u32 = 10;

pub(crate) struct Publisher<Db: Site> {
    pub(crate) plan: ChildPlan,
    pub(crate) postbox: Postbox<Db>,
    /// Its own transactions, the way the plan says.
    pub(crate) pool: Pool<Db>,
    /// For looking, always direct.
    pub(crate) direct: Pool<Db>,
    pub(crate) log: Log,
    last: AtomicU64,
    pub(crate) quiet: AtomicBool,
    full: AtomicBool,
    idle: AtomicUsize,
}

pub(crate) async fn run<Db: Site>(plan: ChildPlan) -> Result<(), Box<dyn std::error::Error>> {
    let postbox = match Postbox::<Db>::open(plan.settings()).await {
        Ok(postbox) => postbox,
        Err(error) => {
            eprintln!("not started: {error}");
            std::process::exit(super::worker::NOT_STARTED);
        }
    };
    let publisher = Arc::new(Publisher::<Db> {
        pool: Db::pool(&plan.url, OWN_POOL_SIZE, Duration::from_secs(10))?,
        direct: Db::pool(&plan.direct, 2, Duration::from_secs(2))?,
        log: Log::open(&plan.log)?,
        postbox,
        last: AtomicU64::new(0),
        quiet: AtomicBool::new(false),
        full: AtomicBool::new(false),
        idle: AtomicUsize::new(0),
        plan,
    });
    let told = publisher.clone();
    listen(move |line| {
        if line == "quiet" {
            told.quiet.store(true, Ordering::SeqCst);
        }
    });
    tokio::spawn(publisher.clone().watch());
    let mut lanes = tokio::task::JoinSet::new();
    for lane in 0..LANES as u64 {
        let dice = fastrand::Rng::with_seed(publisher.plan.seed.wrapping_add(lane * 7919));
        lanes.spawn(publisher.clone().publish(dice));
    }
    for race in 0..RACES as u64 {
        let dice = fastrand::Rng::with_seed(publisher.plan.seed ^ (0x5eed + race));
        lanes.spawn(races(publisher.clone(), dice));
    }
    let mut all = LANES + RACES;
    if publisher.is_hasty() {
        all += 1;
        lanes.spawn(publisher.clone().linger(fastrand::Rng::with_seed(publisher.plan.seed ^ 0x11)));
    }
    while lanes.join_next().await.is_some_and(|ended| ended.is_ok()) {}
    // A lane that panicked has said so on stderr; the others' silence would hide it.
    match publisher.idle.load(Ordering::SeqCst) {
        idle if idle == all => {}
        _ => std::process::exit(101),
    }
    publisher.clone().sound().await;
    say("quiet");
    // Its connections stay open: a poisoned one would be seen from outside.
    std::future::pending::<()>().await;
    Ok(())
}

impl<Db: Site> Publisher<Db> {
    /// An id that nobody else has, known before anything is written.
    pub(crate) fn external_id(&self) -> String {
        let n = self.last.fetch_add(1, Ordering::SeqCst);
        format!("{}-{}-{n}", self.plan.name, self.plan.life)
    }

    pub(crate) fn draft(&self, topic: &str, ext: &str, dice: &mut fastrand::Rng) -> Result<Draft, PublishError> {
        let size = if dice.u32(..50) == 0 { dice.usize(..60_000) } else { dice.usize(..100) };
        let body = serde_json::json!({ "ext": ext, "fill": "x".repeat(size) });
        let draft = Envelope::json(topic, &body)?.external_id(ext);
        Ok(match topic {
            topic if is_poison(topic) => draft.max_attempts(POISON_ATTEMPTS),
            "late" => draft.after(Duration::from_millis(dice.u64(100..2500))),
            _ => draft,
        })
    }

    pub(crate) async fn intend(&self, exts: &[(String, &str)], flag: &str) {
        let lines: Vec<String> = exts.iter().map(|(ext, topic)| format!("{ext} intent {topic} {flag}")).collect();
        self.log.write(lines.join("\n")).await;
    }

    pub(crate) async fn told(&self, exts: &[(String, &str)], told: Told) {
        if told == Told::Ok && self.plan.tag == Some(Fault::F10) {
            hit(Fault::F10, exts.len() as u64);
        }
        let lines: Vec<String> = exts.iter().map(|(ext, _)| format!("{ext} {}", told.word())).collect();
        self.log.write(lines.join("\n")).await;
    }

    /// Looks how much is unfinished.
    async fn watch(self: Arc<Self>) {
        let sql = match Db::KIND {
            Kind::Postgres => {
                "select cast((select count(*) from postbox.ready) + (select count(*) from postbox.scheduled)
                 + (select coalesce(sum(cardinality(deliveries)), 0) from postbox.lease) as text)"
            }
            Kind::Sqlite => {
                "select cast((select count(*) from postbox_delivery where state in ('pending', 'running'))
                 + (select count(*) from postbox_held) as text)"
            }
        };
        loop {
            let look = async {
                let mut connection = Db::acquire(&self.direct).await?;
                Db::rows(&mut connection, sql.to_owned()).await
            };
            if let Ok(Ok(rows)) = tokio::time::timeout(Duration::from_secs(3), look).await {
                self.full.store(number(&rows) > MOST_UNFINISHED, Ordering::SeqCst);
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    pub(crate) fn resting(&self) -> bool {
        self.quiet.load(Ordering::SeqCst)
    }

    pub(crate) fn rest(&self) {
        self.idle.fetch_add(1, Ordering::SeqCst);
    }

    async fn publish(self: Arc<Self>, mut dice: fastrand::Rng) {
        while !self.resting() {
            let pause = if self.full.load(Ordering::SeqCst) { 150 } else { dice.u64(10..90) };
            tokio::time::sleep(Duration::from_millis(pause)).await;
            match dice.u32(..100) {
                0..55 => self.own_transaction(&mut dice).await,
                55..80 => self.publish_now(&mut dice, Cut::LATE).await,
                _ if self.plan.wants(Fault::F5) => self.dropped(&mut dice).await,
                _ => self.publish_now(&mut dice, Cut::LATE).await,
            }
        }
        self.rest();
    }

    /// After all that was dropped and cut: every connection of both pools still does its work, at once.
    async fn sound(self: Arc<Self>) {
        let mut probes = tokio::task::JoinSet::new();
        for n in 0..POOL_SIZE + OWN_POOL_SIZE {
            let publisher = self.clone();
            probes.spawn(async move {
                let mut dice = fastrand::Rng::with_seed(publisher.plan.seed ^ u64::from(n));
                // Who dies of its first use is mended by the second.
                for _ in 0..3 {
                    let messages = vec![(publisher.external_id(), "note")];
                    let told = if n < POOL_SIZE {
                        publisher.publish_these(&messages, &mut dice, Cut::LATE).await
                    } else {
                        publisher.intend(&messages, "business").await;
                        let transact = publisher.transact(&messages, false, &mut dice);
                        let told = tokio::time::timeout(PATIENCE, transact).await.unwrap_or(Told::Unknown);
                        publisher.told(&messages, told).await;
                        told
                    };
                    if told == Told::Ok {
                        return true;
                    }
                }
                false
            });
        }
        let sound = probes.join_all().await.into_iter().filter(|sound| *sound).count();
        if sound < (POOL_SIZE + OWN_POOL_SIZE) as usize {
            let all = POOL_SIZE + OWN_POOL_SIZE;
            say(format_args!("broken I14: {} of {all} publishes fail after healing", all as usize - sound));
        }
    }

    /// What this error is a hit of.
    pub(crate) fn saw(&self, error: &sqlx::Error) {
        self.saw_timeout(error);
        if self.plan.wants(Fault::F16) && is_refused_as_full(error) {
            hit(PUBLISHER_TOLD, 1);
        }
    }

    fn messages(&self, dice: &mut fastrand::Rng, most: usize) -> Vec<(String, &'static str)> {
        (0..dice.usize(1..=most)).map(|_| (self.external_id(), topic(dice, Db::KIND))).collect()
    }

    /// Business rows and messages: both, or none.
    async fn own_transaction(&self, dice: &mut fastrand::Rng) {
        let messages = self.messages(dice, 4);
        self.intend(&messages, "business").await;
        let rolled_back = dice.u32(..100) < 15;
        let told = match tokio::time::timeout(PATIENCE, self.transact(&messages, rolled_back, dice)).await {
            Ok(told) => told,
            Err(_) => Told::Unknown,
        };
        if told != Told::Ok && !rolled_back {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        self.told(&messages, told).await;
    }

    async fn transact(&self, messages: &[(String, &str)], rolled_back: bool, dice: &mut fastrand::Rng) -> Told {
        let Ok(mut session) = Session::begin(&self.pool, Db::BEGIN).await else { return Told::Fail };
        crash::point("before-insert");
        for (ext, topic) in messages {
            let row = format!("insert into {} (ext) values ('{ext}')", Db::table("business"));
            if let Err(error) = session.run(row).await {
                self.saw(&error);
                return Told::Fail;
            }
            let Ok(draft) = self.draft(topic, ext, dice) else { return Told::Fail };
            if let Err(error) = self.postbox.publish(session.on(), draft).await {
                if let PublishError::Database(error) = &error {
                    self.saw(error);
                }
                return Told::Fail;
            }
        }
        if rolled_back {
            session.end("ROLLBACK").await.ok();
            return Told::Fail;
        }
        crash::point("before-commit");
        let end = crash::commit("commit-sent", session.end("COMMIT")).await;
        if let Err(error) = &end {
            self.saw(error);
        }
        ended(&end)
    }

    pub(crate) async fn publish_now(&self, dice: &mut fastrand::Rng, cut: Cut) {
        let messages = self.messages(dice, 5);
        self.publish_these(&messages, dice, cut).await;
    }

    async fn publish_these(&self, messages: &[(String, &str)], dice: &mut fastrand::Rng, cut: Cut) -> Told {
        self.intend(messages, "-").await;
        let drafts: Vec<_> = messages.iter().map(|(ext, topic)| self.draft(topic, ext, dice)).collect();
        let told = match cut.off(self.postbox.publish_now(drafts)).await {
            Some(Ok(_)) => Told::Ok,
            Some(Err(error)) => {
                surprising(&error);
                match &error {
                    Error::Database(error) | Error::Publish(PublishError::Database(error)) => {
                        self.saw(error);
                        if is_refused_as_full(error) { Told::Fail } else { Told::Unknown }
                    }
                    _ => Told::Unknown,
                }
            }
            None => {
                if cut.is_soon() {
                    hit("F5:publish_now", 1);
                }
                Told::Unknown
            }
        };
        self.told(messages, told).await;
        told
    }

    /// Futures dropped at any await; what comes after on the same pools must be sound.
    async fn dropped(&self, dice: &mut fastrand::Rng) {
        match dice.u32(..5) {
            0 => {
                let cut = Cut::soon(dice, 12);
                self.publish_now(dice, cut).await;
            }
            1 => {
                if Cut::soon(dice, 12).off(self.postbox.admin().status()).await.is_none() {
                    hit("F5:status", 1);
                }
            }
            2 => {
                if Cut::soon(dice, 12).off(self.postbox.admin().list(&Default::default(), 50)).await.is_none() {
                    hit("F5:list", 1);
                }
            }
            // The publish is dropped in the caller's own transaction, which is rolled back.
            _ => {
                let messages = self.messages(dice, 1);
                self.intend(&messages, "business").await;
                if let Ok(mut session) = Session::begin(&self.pool, Db::BEGIN).await
                    && let [(ext, topic)] = messages.as_slice()
                    && let Ok(draft) = self.draft(topic, ext, dice)
                {
                    if Cut::soon(dice, 3).off(self.postbox.publish(session.on(), draft)).await.is_none() {
                        hit("F5:publish", 1);
                    }
                    tokio::time::timeout(PATIENCE, session.end("ROLLBACK")).await.ok();
                }
                self.told(&messages, Told::Fail).await;
            }
        }
        self.publish_now(dice, Cut::LATE).await;
    }
}

/// What the end of a COMMIT tells. Only the database's own refusal is a failure; anything else may
/// have committed.
pub(crate) fn ended(result: &Result<(), sqlx::Error>) -> Told {
    match result {
        Ok(()) => Told::Ok,
        Err(error) if is_refused_as_full(error) => Told::Fail,
        // SQLSTATEs have five characters; SQLite's numbers begin with the same digits by chance.
        Err(error) => match code(error).as_deref().filter(|c| c.len() == 5).and_then(|c| c.get(..2)) {
            Some("40" | "23" | "25") => Told::Fail,
            _ => Told::Unknown,
        },
    }
}

/// An error that no fault explains is for the reader of the log.
fn surprising(error: &Error) {
    if !error.is_transient() {
        eprintln!("publishing failed: {error}");
    }
}
