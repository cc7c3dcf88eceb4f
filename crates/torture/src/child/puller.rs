//! Who pulls, in a process of its own: its effect is a row in the transaction that completes the
//! delivery. On PostgreSQL one lane does the same in SQL alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use postbox::{Failure, Postbox, PullSubscription, crash};
use sqlx::Pool;
use tokio::sync::Notify;

use super::drops::{Cut, PATIENCE};
use super::publisher::{Told, ended};
use super::{ChildPlan, hit, listen};
use crate::fault::{Fault, Kind};
use crate::log::Log;
use crate::site::{SCHEMA, Session, Site, Texts};
use crate::traffic::{MANY, PULLED, PULLED_IN_SQL, is_poison};

/// Pulls at once from the library, and how long each works in its transaction, in milliseconds: on
/// SQLite that is time in which nobody else writes.
const fn effort(kind: Kind) -> (u64, u64) {
    match kind {
        Kind::Postgres => (2, 20),
        Kind::Sqlite => (1, 4),
    }
}

struct Puller<Db: Site> {
    plan: ChildPlan,
    postbox: Postbox<Db>,
    pool: Pool<Db>,
    /// What became of each delivery that was handed out.
    log: Log,
    healing: AtomicBool,
    ending: AtomicBool,
}

/// A delivery in hand.
struct InHand {
    delivery: i64,
    number: u32,
    topic: String,
    ext: String,
}

/// How the caller's transaction ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Commit,
    /// Rolled back without a word.
    Silently,
    /// Rolled back, and said why.
    Told,
    /// In SQL: the work is rolled back to a savepoint, and the failure is committed.
    Savepoint,
}

pub(crate) async fn run<Db: Site>(plan: ChildPlan) -> Result<(), Box<dyn std::error::Error>> {
    let postbox = match Postbox::<Db>::open(plan.settings()).await {
        Ok(postbox) => postbox,
        Err(error) => {
            eprintln!("not started: {error}");
            std::process::exit(super::worker::NOT_STARTED);
        }
    };
    let puller = Arc::new(Puller::<Db> {
        pool: Db::pool(&plan.url, 6, Duration::from_secs(10))?,
        log: Log::open(&plan.log)?,
        healing: AtomicBool::new(plan.faults.is_empty()),
        ending: AtomicBool::new(false),
        postbox,
        plan,
    });
    let end = Arc::new(Notify::new());
    let (told, ends) = (puller.clone(), end.clone());
    listen(move |line| match line {
        "heal" => told.healing.store(true, Ordering::SeqCst),
        "end" => {
            told.ending.store(true, Ordering::SeqCst);
            ends.notify_one();
        }
        _ => {}
    });
    let mut lanes = tokio::task::JoinSet::new();
    for lane in 0..effort(Db::KIND).0 {
        lanes.spawn(puller.clone().pull(fastrand::Rng::with_seed(puller.plan.seed ^ (0xb011 + lane))));
    }
    if Db::KIND == Kind::Postgres {
        lanes.spawn(puller.clone().pull_in_sql(fastrand::Rng::with_seed(puller.plan.seed ^ 0x501)));
    }
    tokio::select! {
        () = end.notified() => {}
        // A lane ends when it is told to, or in a panic, which stderr has.
        _ = lanes.join_next() => if !puller.ending.load(Ordering::SeqCst) { std::process::exit(101) },
    }
    while lanes.join_next().await.is_some() {}
    puller.postbox.close().await;
    std::process::exit(0)
}

impl<Db: Site> Puller<Db> {
    fn goes_on(&self) -> bool {
        !self.ending.load(Ordering::SeqCst)
    }

    fn end(&self, of: &InHand, dice: &mut fastrand::Rng) -> End {
        let ends = dice.u32(..100);
        if is_poison(&of.topic) {
            return [End::Silently, End::Told, End::Savepoint][ends as usize % 3];
        }
        match ends {
            _ if self.healing.load(Ordering::SeqCst) => End::Commit,
            0..4 => End::Silently,
            4..8 => End::Told,
            8..10 => End::Savepoint,
            _ => End::Commit,
        }
    }

    async fn pull(self: Arc<Self>, mut dice: fastrand::Rng) {
        let quick = (Duration::from_millis(50), Duration::from_millis(400));
        let subscription =
            self.postbox.subscription(PULLED).pattern("pull.*").max_attempts(MANY).backoff(quick.0, quick.1);
        while self.goes_on() {
            // Nothing is open while it waits. A database that is away is asked again.
            match tokio::time::timeout(Duration::from_millis(500), subscription.ready()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(200)).await,
                Err(_) => continue,
            }
            tokio::time::timeout(PATIENCE, self.pull_one(&subscription, &mut dice)).await.ok();
        }
    }

    /// `None`: something was away, or there was nothing.
    async fn pull_one(&self, subscription: &PullSubscription<Db>, dice: &mut fastrand::Rng) -> Option<()> {
        // Deferred on SQLite, too: the lease is written beside this transaction.
        let mut session = Session::begin(&self.pool, "BEGIN").await.ok()?;
        let drops = self.plan.wants(Fault::F5) && !self.healing.load(Ordering::SeqCst) && dice.u32(..12) == 0;
        let cut = if drops { Cut::soon(dice, 12) } else { Cut::LATE };
        let Some(pulled) = cut.off(subscription.next(session.on())).await else {
            if drops {
                hit("F5:next", 1);
            }
            session.end("ROLLBACK").await.ok();
            return None;
        };
        let Ok(Some(pulled)) = pulled else {
            session.end("ROLLBACK").await.ok();
            return None;
        };
        let hand = InHand {
            delivery: pulled.delivery(),
            number: pulled.attempt(),
            topic: pulled.topic.clone(),
            ext: pulled.external_id.clone().unwrap_or_default(),
        };
        let end = self.end(&hand, dice);
        if self.effect(&mut session, &hand).await.is_err() {
            // The connection is closed, which rolls back.
            return None;
        }
        tokio::time::sleep(Duration::from_millis(dice.u64(..effort(Db::KIND).1))).await;
        if end == End::Commit {
            let told = ended(&crash::commit("pull-commit-sent", session.end("COMMIT")).await);
            self.told(PULLED, &hand, told).await;
            return Some(());
        }
        let rolled_back = session.end("ROLLBACK").await;
        self.told(PULLED, &hand, Told::Fail).await;
        if end != End::Silently && rolled_back.is_ok() {
            subscription.failed(&pulled, Failure::retry("as the dice fell")).await.ok();
        }
        Some(())
    }

    async fn effect(&self, session: &mut Session<Db>, hand: &InHand) -> Result<u64, sqlx::Error> {
        let insert = format!(
            "insert into {} (delivery, number, ext, clock) values ({}, {}, '{}', {})",
            Db::table("effect"),
            hand.delivery,
            hand.number,
            hand.ext,
            Db::CLOCK
        );
        session.run(insert).await
    }

    async fn told(&self, subscription: &str, hand: &InHand, told: Told) {
        let InHand { delivery, number, ext, .. } = hand;
        self.log.write(format!("{subscription} {ext} {delivery} {number} {}", told.word())).await;
    }

    async fn pull_in_sql(self: Arc<Self>, mut dice: fastrand::Rng) {
        let declare = format!(
            "select cast({SCHEMA}.subscribe('{PULLED_IN_SQL}', 'sql.*', application => 'torture', max_attempts => {MANY}) as text)"
        );
        let mut declared = false;
        while self.goes_on() {
            let turn = async {
                if !declared {
                    let mut connection = Db::acquire(&self.pool).await.ok()?;
                    Db::rows(&mut connection, declare.clone()).await.ok()?;
                    declared = true;
                }
                self.pull_one_in_sql(&mut dice).await
            };
            if !matches!(tokio::time::timeout(PATIENCE, turn).await, Ok(Some(()))) {
                tokio::time::sleep(Duration::from_millis(150)).await;
            }
        }
    }

    async fn pull_one_in_sql(&self, dice: &mut fastrand::Rng) -> Option<()> {
        let mut session = Session::begin(&self.pool, "BEGIN").await.ok()?;
        let next = format!(
            "select cast(delivery as text), cast(attempt as text), topic, external_id from {SCHEMA}.next('{PULLED_IN_SQL}', application => 'torture')"
        );
        let rows = Db::rows(session.on(), next).await.ok()?;
        let Some(hand) = rows.first().and_then(in_hand) else {
            session.end("ROLLBACK").await.ok();
            return None;
        };
        let end = self.end(&hand, dice);
        session.run("SAVEPOINT work").await.ok()?;
        self.effect(&mut session, &hand).await.ok()?;
        tokio::time::sleep(Duration::from_millis(dice.u64(..effort(Db::KIND).1))).await;
        let failed = format!(
            "select cast({SCHEMA}.failed({}, 'as the dice fell', retry_after => '50 ms') as text)",
            hand.delivery
        );
        match end {
            End::Commit => {
                let told = ended(&crash::commit("pull-commit-sent", session.end("COMMIT")).await);
                self.told(PULLED_IN_SQL, &hand, told).await;
            }
            End::Savepoint => {
                session.run("ROLLBACK TO SAVEPOINT work").await.ok()?;
                Db::rows(session.on(), failed).await.ok()?;
                session.end("COMMIT").await.ok();
            }
            // No attempt, if nobody counts one.
            End::Silently if !is_poison(&hand.topic) => session.end("ROLLBACK").await.ok()?,
            End::Silently | End::Told => {
                session.end("ROLLBACK").await.ok()?;
                let mut connection = Db::acquire(&self.pool).await.ok()?;
                Db::rows(&mut connection, failed).await.ok()?;
            }
        }
        Some(())
    }
}

fn in_hand(row: &Texts) -> Option<InHand> {
    let text = |index: usize| row.get(index).cloned().flatten();
    Some(InHand { delivery: text(0)?.parse().ok()?, number: text(1)?.parse().ok()?, topic: text(2)?, ext: text(3)? })
}
