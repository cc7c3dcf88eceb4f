//! Three workers publish the ticks of schedules around a change of the clocks, with their own clocks an hour apart.
//! They are killed, and all of them are away for more than a minute.

pub(crate) mod check;
pub(crate) mod member;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::crew::{Crew, Place, Trouble, each};
use super::place::{Ground, Remote};
use super::{Found, Part, Scenario, Setting, now_us};
use crate::fault::Kind;
use crate::site::{Site, Texts, number};
use crate::world::{faketime, set_clock};
use check::{Change, Tick};

/// A schedule that members declare.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wanted {
    pub(crate) name: String,
    pub(crate) cron: String,
    pub(crate) time_zone: String,
}

/// Zones whose clocks change by an hour, at different times of the day.
const ZONES: &[&str] = &["Europe/Berlin", "America/New_York", "America/Santiago", "Africa/Cairo", "Australia/Sydney"];
const WORKERS: usize = 3;
const HOUR: i64 = 3600;

const TROUBLE: Trouble =
    Trouble { rest: (300, 1500), stops: 2, stopped: (2000, 2700), points: &["ticking", "outcome-commit-sent"] };
/// A round has faults for so long at least, and in a long run about so long.
const LEAST: Duration = Duration::from_secs(3);
const ROUND: Duration = Duration::from_secs(12);
/// Until the workers of a round work, mostly.
const SET_UP: i64 = 4;
/// When they were away, faults go on for so long.
const AFTERWARDS: Duration = Duration::from_secs(2);
/// After the last fault, all that is due was published and handed out within this.
const HEALED_WITHIN: Duration = Duration::from_secs(10);
/// The first tick is there so many seconds after the workers say that they work.
const BEGUN_WITHIN: i64 = 3;

/// A round that was not set up in time for the change.
struct TooLate;

struct Season<'a, Db: Site> {
    setting: &'a Setting<'a>,
    ground: &'a mut Ground<Db>,
    remote: &'a mut Remote,
    faketime: PathBuf,
    dice: fastrand::Rng,
    crew: Arc<Crew>,
}

pub(super) async fn play<Db: Site>(setting: &Setting<'_>) -> Result<Found, String> {
    let mut ground = Ground::<Db>::new().await?;
    let mut remote = Remote::start(setting.kind, &ground.url, setting.folder).await?;
    let mut found = Found::default();
    let mut dice = fastrand::Rng::with_seed(setting.seed);
    let rounds = (setting.span.as_secs() / ROUND.as_secs()).max(2) as u32;
    let span = (setting.span / rounds).max(LEAST);
    // Both changes come in the first two rounds, and both ways to be away.
    let (forward, away) = (dice.bool(), dice.bool());
    let crew = Crew::new(setting);
    for round in 0..rounds {
        let forward = forward ^ !round.is_multiple_of(2);
        let away = away ^ !round.div_ceil(2).is_multiple_of(2);
        let zone = ZONES[dice.usize(..ZONES.len())];
        let change = Change::next(zone, forward, Timestamp::now())?;
        let mut season = Season {
            setting,
            ground: &mut ground,
            remote: &mut remote,
            faketime: faketime()?,
            dice: dice.fork(),
            crew: crew.clone(),
        };
        // A machine that is busy may take longer.
        let mut patience = SET_UP;
        let broken = loop {
            let name = format!("s{round}-{patience}-");
            match season.play(&change, &name, patience, span, away, &mut found).await? {
                Ok(broken) => break broken,
                Err(TooLate) if patience < SET_UP * 8 => patience *= 2,
                Err(TooLate) => return Err("the workers do not come to work in time".into()),
            }
        };
        let how = if forward { "forward" } else { "back" };
        let during = if away { "while nobody works" } else { "while all work" };
        eprintln!("round {round}: {zone} {how}, {during}: {} broken", broken.len());
        if !broken.is_empty() {
            found.broken.extend(broken);
            break;
        }
    }
    if setting.counts.of("F1") == 0 {
        found.broken.push("the run itself: nobody was killed; let it run for longer".into());
    }
    Ok(found)
}

impl<Db: Site> Season<'_, Db> {
    /// Variables of a server or a worker whose clock is so far ahead.
    fn clock(&self, ahead: i64) -> Vec<(&'static str, String)> {
        set_clock(&self.faketime, ahead)
    }

    /// The database's clock, in seconds. On SQLite it is the one of the workers, that far ahead of ours.
    async fn now(&self, ahead: i64) -> Result<i64, String> {
        match Db::KIND {
            Kind::Postgres => {
                let rows = self.ground.rows(format!("select cast({} as text)", Db::CLOCK)).await?;
                Ok(number(&rows).div_euclid(1000))
            }
            Kind::Sqlite => Ok(now_us() as i64 / 1_000_000 + ahead),
        }
    }

    /// The workers' clocks: an hour apart where the database has one of its own.
    fn set_clocks(&self, places: &mut [Place], ahead: i64) {
        for (n, place) in places.iter_mut().enumerate() {
            let apart = if Db::KIND == Kind::Postgres { (n as i64 - 1) * HOUR } else { 0 };
            place.set_clock(self.clock(ahead + apart));
        }
    }

    /// One change of the clocks: what is wrong with it.
    async fn play(
        &mut self,
        change: &Change,
        name: &str,
        patience: i64,
        span: Duration,
        away: bool,
        found: &mut Found,
    ) -> Result<Result<Vec<String>, TooLate>, String> {
        let faults = span.as_secs() as i64;
        let lead = patience + if away { faults } else { 2 };
        let mut ahead = change.at - lead - now_us() as i64 / 1_000_000;
        let clock = self.clock(ahead);
        self.ground.restart(clock).await?;
        self.ground.fresh(self.setting.folder, name).await?;
        let part = Part {
            scenario: Scenario::Schedules,
            kind: self.setting.kind,
            url: self.ground.url.clone(),
            remote: self.remote.address.clone(),
            name: String::new(),
            schedules: change.schedules(name),
        };
        let mut places: Vec<Place> = (0..WORKERS)
            .map(|n| Place::new(&self.crew, Part { name: format!("w{n}"), ..part.clone() }, self.dice.u64(..)))
            .collect();
        self.set_clocks(&mut places, ahead);
        each(&mut places, async |place| place.work().await).await?;
        let begun = self.now(ahead).await?;
        if begun >= change.at - 1 {
            return Ok(Err(TooLate));
        }
        // Either the clocks change while they work, or while they are away.
        let time = match away {
            true => change.at - begun - 1,
            false => (change.at - begun + 2).max(faults),
        };
        let until = Instant::now() + Duration::from_secs(time.max(1) as u64);
        each(&mut places, async |place| place.suffer(until, TROUBLE).await).await?;
        each(&mut places, async |place| {
            place.kill().await;
            Ok(())
        })
        .await?;
        // Nobody works for more than a minute: the clocks go on without them.
        ahead += self.dice.i64(65..110);
        let clock = self.clock(ahead);
        self.ground.restart(clock).await?;
        self.set_clocks(&mut places, ahead);
        let until = Instant::now() + AFTERWARDS;
        each(&mut places, async |place| place.suffer(until, TROUBLE).await).await?;

        let to = self.now(ahead).await?;
        let deadline = Instant::now() + HEALED_WITHIN;
        loop {
            let (ticks, log) = (self.ticks(name).await?, self.remote.seen().await?);
            let broken = check::judge(change, &ticks, &check::calls(&log, name), begun + BEGUN_WITHIN, to);
            if broken.is_empty() || Instant::now() > deadline {
                found.messages += ticks.len() as u64;
                return Ok(Ok(broken));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// The messages of all ticks.
    async fn ticks(&self, prefix: &str) -> Result<Vec<Tick>, String> {
        let (of, id) = match Db::KIND {
            Kind::Postgres => {
                (["headers ->> 'postbox-schedule'", "headers ->> 'postbox-schedule-tick'"], "cast(id as text)")
            }
            Kind::Sqlite => {
                (["headers ->> '$.\"postbox-schedule\"'", "headers ->> '$.\"postbox-schedule-tick\"'"], "hex(id)")
            }
        };
        let table = Db::postbox("message");
        let rows = self.ground.rows(format!("select {}, {}, {id} from {table}", of[0], of[1])).await?;
        let tick = |row: &Texts| {
            let word = |at: usize| row.get(at).and_then(Clone::clone);
            let name = word(0)?.strip_prefix(prefix)?.to_owned();
            Some((name, word(1)?.parse::<Timestamp>().ok()?.as_second(), check::plain(&word(2)?)))
        };
        let ticks: Option<Vec<Tick>> = rows.iter().map(tick).collect();
        ticks.ok_or_else(|| "a message that is no tick".into())
    }
}
