//! What flows: topics, subscriptions, and what each promises.

use crate::fault::Kind;

/// A subscription as the workers, or those who pull, declare it.
#[derive(Debug)]
pub(crate) struct Subscribed {
    pub(crate) name: &'static str,
    pub(crate) topics: &'static [&'static str],
    pub(crate) kind: Behind,
    pub(crate) max_attempts: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behind {
    Plain,
    Transactional,
    Operation,
    /// An operation whose remote applies once per idempotency key, declared as such.
    Idempotent,
    /// Pulled, with the effect in the puller's own transaction.
    Pulled,
}

impl Behind {
    /// The remote is called, under an idempotency key.
    pub(crate) fn calls(self) -> bool {
        matches!(self, Behind::Operation | Behind::Idempotent)
    }

    /// The effect is a row in the transaction of the success.
    pub(crate) fn commits_its_effect(self) -> bool {
        matches!(self, Behind::Transactional | Behind::Pulled)
    }
}

const fn of(name: &'static str, topics: &'static [&'static str], kind: Behind, max_attempts: u32) -> Subscribed {
    Subscribed { name, topics, kind, max_attempts }
}

/// Enough that plain handlers get through whatever happens to them.
pub(crate) const MANY: u32 = 40;
/// Few enough that operations die of it now and then.
pub(crate) const FEW: u32 = 4;

/// How often what nobody can handle is tried before it is dead.
pub(crate) const POISON_ATTEMPTS: u32 = 3;

/// The subscription that the library pulls from, and the one that is consumed in SQL.
pub(crate) const PULLED: &str = "pulled";
pub(crate) const PULLED_IN_SQL: &str = "pulled_in_sql";

/// The topic, and the subscription, that keep no history.
pub(crate) const FLEETING: &str = "fleeting";

pub(crate) const SUBSCRIPTIONS: &[Subscribed] = &[
    of("note", &["note"], Behind::Plain, MANY),
    of("late", &["late"], Behind::Plain, MANY),
    of("project", &["project"], Behind::Transactional, MANY),
    // Two subscriptions of one topic, each with its own delivery.
    of("pair_note", &["pair.left", "pair.right"], Behind::Plain, MANY),
    of("pair_project", &["pair.left", "pair.right"], Behind::Transactional, MANY),
    of("charge", &["charge"], Behind::Operation, FEW),
    of("blind", &["blind"], Behind::Operation, FEW),
    of("repeat", &["repeat"], Behind::Idempotent, FEW),
    of("chain_one", &["chain.one"], Behind::Operation, FEW),
    of("chain_two", &["chain.two"], Behind::Transactional, MANY),
    of("chain_three", &["chain.three"], Behind::Plain, MANY),
    // Its history is removed by retention while all goes on.
    of(FLEETING, &[FLEETING], Behind::Plain, MANY),
    of("hog", &["hog"], Behind::Transactional, MANY),
    of(PULLED, &["pull.good", "pull.poison"], Behind::Pulled, MANY),
    of(PULLED_IN_SQL, &["sql.good", "sql.poison"], Behind::Pulled, MANY),
];

/// The subscription of that name.
pub(crate) fn subscribed(name: &str) -> Option<&'static Subscribed> {
    SUBSCRIPTIONS.iter().find(|s| s.name == name)
}

/// Whoever handles a message of this topic rolls back, each time.
pub(crate) fn is_poison(topic: &str) -> bool {
    topic.ends_with(".poison")
}

/// How many attempts a delivery of this topic may make for a subscription.
pub(crate) fn most_attempts(behind: &Subscribed, topic: &str) -> u32 {
    if is_poison(topic) { POISON_ATTEMPTS } else { behind.max_attempts }
}

/// What follows from a success on this topic: another topic, and how its external id ends.
pub(crate) fn follows(topic: &str) -> Option<(&'static str, &'static str)> {
    match topic {
        "chain.one" => Some(("chain.two", "/2")),
        "chain.two" => Some(("chain.three", "/3")),
        _ => None,
    }
}

/// A topic for the next message: a mixed load. SQLite has no SQL form of pulling.
pub(crate) fn topic(dice: &mut fastrand::Rng, kind: Kind) -> &'static str {
    match dice.u32(..100) {
        0..12 => "note",
        12..18 => FLEETING,
        18..32 => "project",
        32..37 => "pair.left",
        37..42 => "pair.right",
        42..60 => "charge",
        60..66 => "blind",
        66..76 => "repeat",
        76..84 => "chain.one",
        84..89 => "pull.good",
        89 => "pull.poison",
        90..93 if kind == Kind::Postgres => "sql.good",
        93 if kind == Kind::Postgres => "sql.poison",
        90..94 => "pull.good",
        _ => "late",
    }
}
