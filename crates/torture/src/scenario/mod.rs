//! Scenarios beside the mix of all faults: one promise each, with workers that are killed and stopped, held
//! against what the remote has seen.

pub(crate) mod crew;
pub(crate) mod limits;
mod place;
pub(crate) mod schedules;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use postbox::{Postgres, Settings, Sqlite};
use serde::{Deserialize, Serialize};

use crate::child::LEASE;
use crate::fault::Kind;
use crate::site::{SCHEMA, Site};
use crate::world::Counts;

/// What a run is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Scenario {
    /// Everything at once, under the faults that `--faults` names.
    Mix,
    /// Limits across workers are kept, and used; a pause holds.
    Limits,
    /// Each tick of a schedule fires once.
    Schedules,
}

/// The name under which all members work.
pub(crate) const APPLICATION: &str = "torture";

/// What a member of a scenario has to know, passed as one argument.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) scenario: Scenario,
    pub(crate) kind: Kind,
    pub(crate) url: String,
    /// host:port of the remote.
    pub(crate) remote: String,
    pub(crate) name: String,
    /// The schedules that it declares.
    pub(crate) schedules: Vec<schedules::Wanted>,
}

impl Part {
    pub(crate) fn settings(&self) -> Settings {
        Settings::defaults()
            .url(&self.url)
            .set("schema", SCHEMA)
            .set("application", APPLICATION)
            .set("pool_size", 5)
            .set("lease", format!("{}ms", LEASE.as_millis()))
            .set("poll_interval", "100ms")
            .set("busy_timeout", "10s")
    }
}

/// What a scenario found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) messages: u64,
    pub(crate) broken: Vec<String>,
    /// Figures, by their names.
    pub(crate) measured: BTreeMap<String, f64>,
}

impl Found {
    /// Keeps a figure, to a hundredth.
    fn measure(&mut self, name: impl Into<String>, value: f64) {
        self.measured.insert(name.into(), (value * 100.0).round() / 100.0);
    }
}

/// What a scenario goes by.
pub(crate) struct Setting<'a> {
    pub(crate) kind: Kind,
    pub(crate) seed: u64,
    /// How long the faults last.
    pub(crate) span: Duration,
    pub(crate) folder: &'a Path,
    /// Whose processes were killed how often, and where.
    pub(crate) counts: Arc<Counts>,
}

/// Runs one, on its store.
pub(crate) async fn play(scenario: Scenario, setting: Setting<'_>) -> Result<Found, String> {
    match (scenario, setting.kind) {
        (Scenario::Mix, _) => Err("the mix is no scenario of its own".into()),
        (Scenario::Limits, Kind::Postgres) => limits::play::<Postgres>(&setting).await,
        (Scenario::Limits, Kind::Sqlite) => limits::play::<Sqlite>(&setting).await,
        (Scenario::Schedules, Kind::Postgres) => schedules::play::<Postgres>(&setting).await,
        (Scenario::Schedules, Kind::Sqlite) => schedules::play::<Sqlite>(&setting).await,
    }
}

/// A member, in its process.
pub(crate) async fn member<Db: Site>(part: Part) -> Result<(), Box<dyn std::error::Error>> {
    match part.scenario {
        Scenario::Mix => Err("the mix has other children".into()),
        Scenario::Limits => limits::member::work::<Db>(part).await,
        Scenario::Schedules => schedules::member::work::<Db>(part).await,
    }
}

/// The machine's clock, in microseconds: one for all processes whose clocks nobody has set.
pub(crate) fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_micros() as u64)
}
