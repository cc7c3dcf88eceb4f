//! What goes through the inbox's verbs: arrivals, and what they came to.

use std::collections::HashMap;
use std::time::Duration;

use uuid::Uuid;

use crate::message::Draft;
use crate::raw::Raw;

/// A source's number.
pub type SourceId = i32;

/// A source, as a process that receives from it finds it.
#[derive(Debug, Clone)]
pub struct OpenedSource {
    /// Its number.
    pub id: SourceId,
    /// An operator wants nothing received from it.
    pub paused: bool,
    /// Everything up to here is acknowledged.
    pub checkpoint: Option<String>,
}

/// What a process tells of a source every few seconds.
#[derive(Debug, Clone, Default)]
pub struct SourceReport {
    /// How many entries nobody has acknowledged yet, if that is known.
    pub lag: Option<i64>,
    /// Everything up to here is acknowledged; `None` leaves what is stored.
    pub checkpoint: Option<String>,
    /// What keeps it from receiving.
    pub trouble: Option<String>,
}

/// Why something is put aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aside {
    /// It cannot become a message.
    Malformed,
    /// Its id was taken by a message with another body.
    Conflict,
    /// It was handed out too often without an end.
    Undeliverable,
    /// The broker does not have it any more.
    Lost,
}

impl Aside {
    /// The word for it, in SQL and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Aside::Malformed => "malformed",
            Aside::Conflict => "conflict",
            Aside::Undeliverable => "undeliverable",
            Aside::Lost => "lost",
        }
    }
}

/// One thing that has come in.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// Where it stands at its broker.
    pub position: String,
    /// As it was read.
    pub raw: Raw,
    /// What it is.
    pub what: Arrived,
}

/// What has come in, once somebody has looked at it.
#[derive(Debug, Clone)]
pub enum Arrived {
    /// A message that may be stored: it is checked.
    Message {
        /// The message.
        draft: Box<Draft>,
        /// What it has in common with its own repetitions, and with nothing else of its source.
        identity: String,
        /// Of its topic, key and payload.
        body_hash: Vec<u8>,
    },
    /// Something else.
    Aside {
        /// Why.
        kind: Aside,
        /// In words.
        reason: String,
    },
}

/// What became of an arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// It is a message now.
    New(Uuid),
    /// It was one already.
    Duplicate(Uuid),
    /// Another body has its id.
    Conflict {
        /// The message that has it.
        existing: Uuid,
        /// Where this one is kept.
        quarantine: i64,
    },
    /// It is kept aside.
    Quarantined(i64),
}

/// Counts of one transaction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) received: i64,
    pub(crate) duplicate: i64,
    pub(crate) conflict: i64,
    pub(crate) quarantined: i64,
    pub(crate) lost: i64,
}

/// What has come in, sorted: which are to be published, and which are not.
pub(crate) struct Sorted<'a> {
    arrivals: &'a [Arrival],
    /// Places of messages that nobody has brought before.
    pub(crate) fresh: Vec<usize>,
    /// Places of others, and the place, or the message, of the one that came first.
    repeated: Vec<(usize, First)>,
}

#[derive(Debug, Clone, Copy)]
enum First {
    Stored(Uuid, bool),
    Place(usize),
}

impl<'a> Sorted<'a> {
    /// `known`: of each identity that is stored, its message and the hash of its body.
    pub(crate) fn new(arrivals: &'a [Arrival], known: &HashMap<String, (Uuid, Vec<u8>)>) -> Sorted<'a> {
        let mut sorted = Sorted { arrivals, fresh: Vec::new(), repeated: Vec::new() };
        let mut here = HashMap::new();
        for (place, arrival) in arrivals.iter().enumerate() {
            let Arrived::Message { identity, body_hash, .. } = &arrival.what else { continue };
            if let Some((message, hash)) = known.get(identity) {
                sorted.repeated.push((place, First::Stored(*message, hash == body_hash)));
            } else if let Some(first) = here.get(identity.as_str()) {
                sorted.repeated.push((place, First::Place(*first)));
            } else {
                here.insert(identity.as_str(), place);
                sorted.fresh.push(place);
            }
        }
        sorted
    }

    /// The messages to publish, in their order.
    pub(crate) fn drafts(&self) -> Vec<Draft> {
        let draft = |place: &usize| match &self.arrivals[*place].what {
            Arrived::Message { draft, .. } => Some((**draft).clone()),
            Arrived::Aside { .. } => None,
        };
        self.fresh.iter().filter_map(draft).collect()
    }

    /// What everything comes to, once the fresh ones have these ids; and what is to be kept aside.
    pub(crate) fn taken(&self, ids: &[Uuid]) -> (Vec<Option<Taken>>, Vec<Kept<'a>>) {
        let mut taken: Vec<Option<Taken>> = vec![None; self.arrivals.len()];
        let mut aside = Vec::new();
        for (place, id) in self.fresh.iter().zip(ids) {
            taken[*place] = Some(Taken::New(*id));
        }
        let hash = |place: usize| match &self.arrivals[place].what {
            Arrived::Message { body_hash, .. } => Some(body_hash),
            Arrived::Aside { .. } => None,
        };
        for (place, first) in &self.repeated {
            let (message, same) = match first {
                First::Stored(message, same) => (Some(*message), *same),
                First::Place(first) => match taken[*first] {
                    Some(Taken::New(id)) => (Some(id), hash(*first) == hash(*place)),
                    _ => (None, false),
                },
            };
            let Some(message) = message else { continue };
            if same {
                taken[*place] = Some(Taken::Duplicate(message));
            } else {
                aside.push(Kept { place: *place, arrival: &self.arrivals[*place], existing: Some(message) });
            }
        }
        for (place, arrival) in self.arrivals.iter().enumerate() {
            if matches!(arrival.what, Arrived::Aside { .. }) {
                aside.push(Kept { place, arrival, existing: None });
            }
        }
        aside.sort_by_key(|kept| kept.place);
        (taken, aside)
    }
}

/// Something that goes into quarantine.
pub(crate) struct Kept<'a> {
    pub(crate) place: usize,
    pub(crate) arrival: &'a Arrival,
    existing: Option<Uuid>,
}

impl Kept<'_> {
    pub(crate) fn kind(&self) -> Aside {
        match (&self.arrival.what, self.existing) {
            (Arrived::Aside { kind, .. }, _) => *kind,
            (Arrived::Message { .. }, _) => Aside::Conflict,
        }
    }

    pub(crate) fn reason(&self) -> String {
        match (&self.arrival.what, self.existing) {
            (Arrived::Aside { reason, .. }, _) => reason.clone(),
            (Arrived::Message { .. }, existing) => format!(
                "the id is that of message {}, which has another topic, key or payload; the first is kept",
                existing.unwrap_or_default()
            ),
        }
    }

    pub(crate) fn identity(&self) -> Option<&str> {
        match &self.arrival.what {
            Arrived::Message { identity, .. } => Some(identity),
            Arrived::Aside { .. } => None,
        }
    }

    pub(crate) fn message(&self) -> Option<Uuid> {
        self.existing
    }

    /// Once it has its number; one that was there before counts as a repetition.
    pub(crate) fn taken(&self, quarantine: i64) -> Taken {
        match self.existing {
            Some(existing) => Taken::Conflict { existing, quarantine },
            None => Taken::Quarantined(quarantine),
        }
    }
}

impl Tally {
    /// `new`: of what is kept aside, the places of those that were not there before.
    pub(crate) fn of(taken: &[Taken], aside: &[Kept<'_>], new: &[usize]) -> Tally {
        let mut tally = Tally::default();
        for one in taken {
            match one {
                Taken::New(_) => tally.received += 1,
                Taken::Duplicate(_) => tally.duplicate += 1,
                Taken::Conflict { .. } | Taken::Quarantined(_) => {}
            }
        }
        for kept in aside {
            match kept.kind() {
                _ if !new.contains(&kept.place) => tally.duplicate += 1,
                Aside::Conflict => tally.conflict += 1,
                Aside::Lost => tally.lost += 1,
                Aside::Malformed | Aside::Undeliverable => tally.quarantined += 1,
            }
        }
        tally
    }
}

/// Something in quarantine that an operator wants read again.
#[derive(Debug, Clone)]
pub struct Requested {
    /// Its number.
    pub quarantine: i64,
    /// Where it stood at its broker.
    pub position: String,
    /// As it was read.
    pub raw: Raw,
}

/// What reading it again came to.
#[derive(Debug, Clone)]
pub struct ReadAgain {
    /// Its number.
    pub quarantine: i64,
    /// The message that it is now, new or known; else what is still wrong with it.
    pub came_to: Result<Arrival, String>,
}

/// What one process brings in, and how it is counted.
#[derive(Debug, Clone, Copy)]
pub struct Intake {
    /// From this source.
    pub source: SourceId,
    /// For how long its ids are remembered.
    pub remember: Duration,
    /// Which row counts.
    pub slot: i16,
}

/// What reading an entry of quarantine again came to: in words, the message it is now, and whether that ends it.
pub(crate) fn came_to(taken: Option<&Taken>) -> (String, Option<Uuid>, bool) {
    match taken {
        Some(Taken::New(id)) => (format!("it is message {id} now"), Some(*id), true),
        Some(Taken::Duplicate(id)) => (format!("message {id} is the same, and was there already"), Some(*id), true),
        Some(Taken::Conflict { existing, quarantine }) => (
            format!("its id is that of message {existing}, which has another body; it is kept as entry {quarantine}"),
            Some(*existing),
            true,
        ),
        Some(Taken::Quarantined(_)) | None => ("nothing came of it".to_owned(), None, false),
    }
}

/// The word for how a source stands.
pub(crate) fn state(paused: bool, seen: bool, troubled: bool) -> &'static str {
    match (paused, seen, troubled) {
        (true, ..) => "paused",
        (_, false, _) => "stopped",
        (_, _, true) => "failing",
        _ => "receiving",
    }
}

/// What stands in the audit.
pub(crate) fn pause_action(pauses: bool) -> &'static str {
    if pauses { "pause source" } else { "resume source" }
}

/// What the audit keeps of an entry of quarantine.
pub(crate) fn detail(row: &crate::admin::QuarantineRow) -> serde_json::Value {
    serde_json::json!({
        "application": row.application, "source": row.source, "quarantine": row.id, "kind": row.kind,
        "position": row.position, "reason": row.reason,
    })
}

/// A relay as a worker declares it.
#[derive(Debug, Clone)]
pub struct DeclaredRelay {
    /// Its subscription.
    pub subscription: i32,
    /// The kind of its sink.
    pub kind: &'static str,
    /// Where to.
    pub target: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Envelope;

    fn message(identity: &str, hash: u8) -> Arrival {
        let draft = Box::new(Envelope::raw("t", "1").expect("a draft"));
        let what = Arrived::Message { draft, identity: identity.into(), body_hash: vec![hash] };
        Arrival { position: identity.into(), raw: Raw::default(), what }
    }

    #[test]
    fn repetitions_are_told_from_conflicts() {
        let (stored, one, other) = (Uuid::from_u128(1), Uuid::from_u128(2), Uuid::from_u128(3));
        let malformed = Arrived::Aside { kind: Aside::Malformed, reason: "no".into() };
        let arrivals = [
            message("a", 1),
            message("known", 7),
            message("a", 1),
            message("a", 2),
            Arrival { position: "p".into(), raw: Raw::default(), what: malformed },
            message("known", 8),
            message("b", 1),
        ];
        let known = HashMap::from([("known".to_owned(), (stored, vec![7]))]);
        let sorted = Sorted::new(&arrivals, &known);
        assert_eq!(sorted.fresh, [0, 6]);
        assert_eq!(sorted.drafts().len(), 2);
        let (taken, aside) = sorted.taken(&[one, other]);
        let said: Vec<_> = aside.iter().map(|kept| (kept.place, kept.kind(), kept.message())).collect();
        assert_eq!(
            said,
            [(3, Aside::Conflict, Some(one)), (4, Aside::Malformed, None), (5, Aside::Conflict, Some(stored))]
        );
        let mut taken = taken;
        for (number, kept) in aside.iter().enumerate() {
            taken[kept.place] = Some(kept.taken(number as i64));
        }
        let taken: Vec<Taken> = taken.into_iter().flatten().collect();
        assert_eq!(taken[..3], [Taken::New(one), Taken::Duplicate(stored), Taken::Duplicate(one)]);
        // The second conflict was there before: a crash came between commit and acknowledgement.
        let tally = Tally::of(&taken, &aside, &[3, 4]);
        assert_eq!(tally, Tally { received: 2, duplicate: 3, conflict: 1, quarantined: 1, lost: 0 });
    }
}
