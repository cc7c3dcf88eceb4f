//! Publishers that get into each other's way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use postbox::{Envelope, Error, Priority, PublishError};
use sqlx::pool::PoolConnection;
use tokio::sync::Barrier;

use super::drops::PATIENCE;
use super::handlers::was_noted;
use super::hit;
use super::publisher::{Publisher, Told, ended};
use crate::fault::{Fault, Kind};
use crate::site::{Session, Site, code};

/// Publishers at once with one dedup key.
const CROWD: usize = 8;
/// How long a transaction stalls at most while a later one is delivered: many longer ones would meet
/// an end of their connection first.
const DELIVERED_WITHIN: Duration = Duration::from_secs(10);
/// Business rows that are fought for.
pub(crate) const COUNTERS: i64 = 4;

/// One race after the other, as the faults say.
pub(crate) async fn races<Db: Site>(publisher: Arc<Publisher<Db>>, mut dice: fastrand::Rng) {
    let wanted: Vec<Fault> = [Fault::F12, Fault::F13, Fault::F15, Fault::F22, Fault::F24]
        .into_iter()
        .filter(|f| publisher.plan.wants(*f))
        .collect();
    let mut next = dice.usize(..10);
    while !publisher.resting() {
        tokio::time::sleep(Duration::from_millis(dice.u64(50..500))).await;
        if wanted.is_empty() {
            continue;
        }
        next += 1;
        match wanted[next % wanted.len()] {
            Fault::F12 if dice.bool() => publisher.deadlock(&mut dice).await,
            Fault::F12 => publisher.conflict(&mut dice).await,
            Fault::F13 => publisher.stall(&mut dice).await,
            Fault::F15 => publisher.hogs(&mut dice).await,
            Fault::F22 if dice.u32(..4) == 0 => publisher.disk_full(&mut dice).await,
            Fault::F22 => publisher.busy(&mut dice).await,
            _ => publisher.crowd(&mut dice).await,
        }
    }
    publisher.rest();
}

fn state(error: &PublishError) -> Option<String> {
    match error {
        PublishError::Database(e) | PublishError::Busy(e) => code(e),
        _ => None,
    }
}

impl<Db: Site> Publisher<Db> {
    /// Work for the handlers that hold connections, now and then.
    async fn hogs(&self, dice: &mut fastrand::Rng) {
        let most = if Db::KIND == Kind::Sqlite { 1 } else { 3 };
        let messages: Vec<_> = (0..most).map(|_| (self.external_id(), "hog")).collect();
        self.intend(&messages, "-").await;
        let drafts: Vec<_> = messages.iter().map(|(ext, topic)| self.draft(topic, ext, dice)).collect();
        let told = match tokio::time::timeout(PATIENCE, self.postbox.publish_now(drafts)).await {
            Ok(Ok(_)) => Told::Ok,
            _ => Told::Unknown,
        };
        self.told(&messages, told).await;
        tokio::time::sleep(Duration::from_millis(1000)).await;
    }

    /// A transaction that takes rows in this order and publishes, tried again until it is through.
    async fn contend(&self, begin: &str, rows: [i64; 2], meet: Option<&Barrier>, dice: &mut fastrand::Rng) {
        let messages = vec![(self.external_id(), "note")];
        self.intend(&messages, "business").await;
        let mut told = Told::Fail;
        for round in 0..10 {
            let meet = meet.filter(|_| round == 0);
            let tried = tokio::time::timeout(PATIENCE, self.contend_once(begin, rows, meet, &messages, dice)).await;
            told = match tried {
                Ok(Ok(told)) => told,
                Ok(Err(state)) => {
                    if ["40001", "40P01"].contains(&state.as_str()) {
                        hit(format_args!("F12:{state}"), 1);
                    }
                    Told::Fail
                }
                Err(_) => Told::Unknown,
            };
            if told != Told::Fail {
                break;
            }
            tokio::time::sleep(Duration::from_millis(dice.u64(1..30))).await;
        }
        self.told(&messages, told).await;
    }

    /// `Err`: the database's word for why not.
    async fn contend_once(
        &self,
        begin: &str,
        rows: [i64; 2],
        meet: Option<&Barrier>,
        messages: &[(String, &str)],
        dice: &mut fastrand::Rng,
    ) -> Result<Told, String> {
        let refused = |error: sqlx::Error| code(&error).unwrap_or_default();
        let mut session = Session::begin(&self.pool, begin).await.map_err(refused)?;
        for (index, row) in rows.into_iter().enumerate() {
            if index == 1
                && let Some(meet) = meet
            {
                tokio::time::timeout(Duration::from_secs(1), meet.wait()).await.ok();
            }
            let sql = format!("update {} set n = n + 1 where id = {row}", Db::table("counter"));
            session.run(sql).await.map_err(refused)?;
        }
        for (ext, topic) in messages {
            let row = format!("insert into {} (ext) values ('{ext}')", Db::table("business"));
            session.run(row).await.map_err(refused)?;
            let draft = self.draft(topic, ext, dice).map_err(|_| String::new())?;
            self.postbox.publish(session.on(), draft).await.map_err(|e| state(&e).unwrap_or_default())?;
        }
        let result = session.end("COMMIT").await;
        match ended(&result) {
            Told::Fail => Err(result.err().and_then(|e| code(&e)).unwrap_or_default()),
            told => Ok(told),
        }
    }

    async fn conflict(&self, dice: &mut fastrand::Rng) {
        let level = if dice.bool() { "SERIALIZABLE" } else { "REPEATABLE READ" };
        let begin = format!("BEGIN ISOLATION LEVEL {level}");
        let row = dice.i64(0..COUNTERS);
        let meet = Barrier::new(2);
        let (mut a, mut b) = (dice.fork(), dice.fork());
        tokio::join!(
            self.contend(&begin, [COUNTERS, row], Some(&meet), &mut a),
            self.contend(&begin, [COUNTERS + 1, row], Some(&meet), &mut b),
        );
    }

    async fn deadlock(&self, dice: &mut fastrand::Rng) {
        let begin = "BEGIN; SET LOCAL deadlock_timeout = '30ms'";
        let (one, other) = (dice.i64(0..2), dice.i64(2..COUNTERS));
        let meet = Barrier::new(2);
        let (mut a, mut b) = (dice.fork(), dice.fork());
        tokio::join!(
            self.contend(begin, [one, other], Some(&meet), &mut a),
            self.contend(begin, [other, one], Some(&meet), &mut b),
        );
    }

    /// A transaction takes its ids and stalls; later ones commit and are delivered; then it commits.
    async fn stall(&self, dice: &mut fastrand::Rng) {
        let early = vec![(self.external_id(), "note")];
        let later = vec![(self.external_id(), "note")];
        self.intend(&early, "-").await;
        self.intend(&later, "-").await;
        let (mut first, mut second) = (dice.fork(), dice.fork());
        // Both in one lane, where the one goes past the other: now among all the others, now before
        // them, so that a backlog which the machine cannot keep up with does not hide the later one.
        let lane = if dice.bool() { Priority::High } else { Priority::Normal };
        let Ok(mut session) = Session::begin(&self.pool, Db::BEGIN).await else {
            self.told(&early, Told::Fail).await;
            return self.told(&later, Told::Fail).await;
        };
        let stored = match self.draft("note", &early[0].0, &mut first) {
            Ok(draft) => self.postbox.publish(session.on(), draft.priority(lane)).await.is_ok(),
            Err(_) => false,
        };
        let draft = self.draft("note", &later[0].0, &mut second).map(|draft| draft.priority(lane));
        let publish = async {
            match tokio::time::timeout(PATIENCE, self.postbox.publish_now([draft])).await {
                Ok(Ok(_)) => Told::Ok,
                _ => Told::Unknown,
            }
        };
        let (told, overtaken) = match Db::KIND {
            Kind::Postgres => {
                let told = publish.await;
                (told, told == Told::Ok && self.delivered(&later[0].0).await)
            }
            // One writer: the later one waits for the one that stalls.
            Kind::Sqlite => {
                let mut publish = std::pin::pin!(publish);
                match tokio::time::timeout(Duration::from_millis(300), &mut publish).await {
                    Ok(told) => (told, false),
                    Err(_) => {
                        let committed = stored && session.end("COMMIT").await.is_ok();
                        self.told(&early, if committed { Told::Ok } else { Told::Unknown }).await;
                        let told = publish.await;
                        if committed && told == Told::Ok {
                            hit(Fault::F13, 1);
                        }
                        return self.told(&later, told).await;
                    }
                }
            }
        };
        self.told(&later, told).await;
        let told = if stored { ended(&session.end("COMMIT").await) } else { Told::Fail };
        if told == Told::Ok && overtaken {
            hit(Fault::F13, 1);
        }
        self.told(&early, told).await;
    }

    /// Asks the remote, not the database: looking for it there is work that hinders what is looked for.
    async fn delivered(&self, ext: &str) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < DELIVERED_WITHIN {
            if was_noted(&self.plan.remote, ext).await.unwrap_or_default() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    /// One dedup key from 8 connections at once, mostly with two bodies.
    async fn crowd(self: &Arc<Self>, dice: &mut fastrand::Rng) {
        let ext = format!("d-{}", self.external_id());
        self.log.write(format!("{ext} intent note dedup")).await;
        let bodies = if dice.u32(..4) == 0 { 1 } else { 2 };
        let mut crowd = tokio::task::JoinSet::new();
        for n in 0..CROWD {
            let (publisher, ext) = (self.clone(), ext.clone());
            let body = if n % bodies == 0 { "a" } else { "b" };
            crowd.spawn(async move {
                let draft = Envelope::json("note", &serde_json::json!({ "ext": ext, "body": body }))
                    .map(|draft| draft.external_id(&ext).dedup(&ext));
                let told = match tokio::time::timeout(PATIENCE, publisher.postbox.publish_now([draft])).await {
                    Ok(Ok(published)) if published.iter().any(|p| p.is_duplicate()) => "duplicate",
                    Ok(Ok(_)) => "ok",
                    Ok(Err(Error::Publish(PublishError::DedupConflict { .. }))) => "conflict",
                    _ => "unknown",
                };
                publisher.log.write(format!("{ext} {told} {body}")).await;
                told
            });
        }
        let told: Vec<&str> = crowd.join_all().await;
        if told.contains(&"ok") && (told.contains(&"duplicate") || told.contains(&"conflict")) {
            hit(Fault::F24, 1);
            if told.contains(&"conflict") {
                hit("F24:conflict", 1);
            }
        }
    }

    /// SQLite's disk is full, as far as one connection knows: an error that says so, and then it goes on.
    async fn disk_full(&self, dice: &mut fastrand::Rng) {
        let messages = vec![(self.external_id(), "note")];
        self.intend(&messages, "-").await;
        let fill = "x".repeat(300_000);
        let draft = Envelope::json("note", &serde_json::json!({ "ext": messages[0].0, "fill": fill }))
            .map(|draft| draft.external_id(&messages[0].0));
        let Ok(mut connection) = Db::acquire(&self.pool).await else { return self.told(&messages, Told::Fail).await };
        // Nobody else's writes are hindered: the limit is the connection's own.
        let limited = Db::run(&mut connection, "pragma max_page_count = 1".into()).await;
        let mut told = Told::Fail;
        if limited.is_ok() {
            match self.postbox.publish(&mut connection, draft).await {
                Ok(_) => told = Told::Ok,
                Err(error) if state(&error).as_deref() == Some("13") && error.to_string().contains("full") => {
                    hit("F22:full", 1);
                }
                Err(error) => eprintln!("a full disk was told like this: {error}"),
            }
        }
        self.told(&messages, told).await;
        self.again(connection, dice).await;
    }

    /// There is room again, on the same connection.
    async fn again(&self, mut connection: PoolConnection<Db>, dice: &mut fastrand::Rng) {
        let messages = vec![(self.external_id(), "note")];
        self.intend(&messages, "-").await;
        let mut told = Told::Fail;
        if Db::run(&mut connection, "pragma max_page_count = 1073741823".into()).await.is_ok()
            && let Ok(draft) = self.draft("note", &messages[0].0, dice)
        {
            told = match self.postbox.publish(&mut connection, draft).await {
                Ok(_) => Told::Ok,
                Err(PublishError::Busy(_)) => Told::Fail,
                Err(_) => Told::Unknown,
            };
        }
        connection.close_on_drop();
        self.told(&messages, told).await;
    }

    /// Another connection holds SQLite's only writer, or has written since this one read.
    async fn busy(&self, dice: &mut fastrand::Rng) {
        let messages = vec![(self.external_id(), "note")];
        self.intend(&messages, "-").await;
        let told = self.publish_while_busy(&messages[0].0, dice).await;
        self.told(&messages, told).await;
    }

    async fn publish_while_busy(&self, ext: &str, dice: &mut fastrand::Rng) -> Told {
        let stale = dice.bool();
        let Ok(draft) = self.draft("note", ext, dice) else { return Told::Fail };
        let Ok(mut late) = Session::begin(&self.pool, "pragma busy_timeout = 50; BEGIN").await else {
            return Told::Fail;
        };
        if stale && late.run(format!("select count(*) from {}", Db::table("counter"))).await.is_err() {
            return Told::Fail;
        }
        let Ok(mut writer) = Session::begin(&self.pool, Db::BEGIN).await else { return Told::Fail };
        let wrote = writer.run(format!("update {} set n = n + 1 where id = 0", Db::table("counter"))).await;
        if stale && (wrote.is_err() || writer.end("COMMIT").await.is_err()) {
            return Told::Fail;
        }
        match self.postbox.publish(late.on(), draft).await {
            Ok(_) => ended(&late.end("COMMIT").await),
            Err(PublishError::Busy(_)) => {
                hit(if stale { "F22:stale" } else { "F22:busy" }, 1);
                Told::Fail
            }
            Err(error) => {
                eprintln!("a busy database was told like this: {error}");
                Told::Fail
            }
        }
    }
}
