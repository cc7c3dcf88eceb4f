//! The file, and what must come out of it: computed from the file and the script alone.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use postbox::{Draft, Envelope, PublishError};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::Problem;
use crate::server::Script;

/// How long an event's id is remembered: a second run within this time publishes nothing new.
const REMEMBERED: Duration = Duration::from_secs(365 * 86_400);

/// One line of the file.
#[derive(Debug, Deserialize)]
pub(crate) struct Event {
    pub(crate) id: String,
    pub(crate) topic: String,
    #[serde(default)]
    key: String,
    /// The text as it stands in the file: no digit of it may change.
    payload: Box<RawValue>,
}

impl Event {
    /// The message: its id is what keeps a second publish from being a second message.
    pub(crate) fn draft(&self) -> Result<Draft, PublishError> {
        let draft = Envelope::raw(&self.topic, self.payload.get())?;
        Ok(draft.key(&self.key).external_id(&self.id).dedup_within(&self.id, REMEMBERED))
    }

    /// Dedup keys count per topic, so topic and id together name an event.
    fn name(&self) -> String {
        name(&self.topic, &self.id)
    }
}

/// What an event is called in the tables and at the server.
pub(crate) fn name(topic: &str, id: &str) -> String {
    format!("{topic} {id}")
}

/// Reads the file; an empty line is skipped, a bad one is reported with its number.
pub(crate) fn read(file: &Path) -> Result<Vec<Event>, Problem> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("cannot read {}: {e}", file.display()))?;
    let mut events = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let event: Event =
            serde_json::from_str(line).map_err(|e| format!("{}, line {}: {e}", file.display(), index + 1))?;
        events.push(event);
    }
    Ok(events)
}

/// Events of one repository.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) issues: i64,
    pub(crate) pull_requests: i64,
}

/// What must come out.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    pub(crate) repositories: BTreeMap<String, Counts>,
    /// The payload's text of each event that the audit must have.
    pub(crate) audit: BTreeMap<String, String>,
    /// What the server does with each release, in turns.
    pub(crate) releases: BTreeMap<String, Script>,
}

impl Expected {
    /// Looks at topics by hand: the patterns of postbox are what is tested.
    pub(crate) fn of(events: &[Event]) -> Result<Expected, Problem> {
        let mut expected = Expected::default();
        let mut seen = BTreeSet::new();
        for event in events.iter().filter(|e| seen.insert(e.name())) {
            let segments: Vec<&str> = event.topic.split('.').collect();
            match segments[..] {
                ["github", "issues", _] => expected.repository(event)?.issues += 1,
                ["github", "pull_request", _] => expected.repository(event)?.pull_requests += 1,
                ["github", "release", _] => {
                    let turn = expected.releases.len();
                    expected.releases.insert(event.name(), Script::of_turn(turn));
                }
                _ => {}
            }
            if let ["github", _, ..] = segments[..] {
                expected.audit.insert(event.name(), event.payload.get().to_owned());
            }
        }
        Ok(expected)
    }

    fn repository(&mut self, event: &Event) -> Result<&mut Counts, Problem> {
        let payload: Value = serde_json::from_str(event.payload.get())?;
        let name = payload.pointer("/repository/full_name").and_then(Value::as_str).unwrap_or("(none)");
        Ok(self.repositories.entry(name.to_owned()).or_default())
    }

    /// How many releases the server treats in one of these ways.
    pub(crate) fn scripted(&self, scripts: &[Script]) -> i64 {
        self.releases.values().filter(|s| scripts.contains(s)).count() as i64
    }
}
