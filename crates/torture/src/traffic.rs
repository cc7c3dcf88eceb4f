//! What flows: topics, subscriptions, and what each promises.

/// A subscription as the workers declare it.
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
}

const fn of(name: &'static str, topics: &'static [&'static str], kind: Behind, max_attempts: u32) -> Subscribed {
    Subscribed { name, topics, kind, max_attempts }
}

/// Enough that plain handlers get through whatever happens to them.
pub(crate) const MANY: u32 = 40;
/// Few enough that operations die of it now and then.
pub(crate) const FEW: u32 = 4;

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
    of("chain_one", &["chain.one"], Behind::Operation, FEW),
    of("chain_two", &["chain.two"], Behind::Transactional, MANY),
    of("chain_three", &["chain.three"], Behind::Plain, MANY),
    // Its history is removed by retention while all goes on.
    of(FLEETING, &[FLEETING], Behind::Plain, MANY),
    of("hog", &["hog"], Behind::Transactional, MANY),
];

/// The subscription of that name.
pub(crate) fn subscribed(name: &str) -> Option<&'static Subscribed> {
    SUBSCRIPTIONS.iter().find(|s| s.name == name)
}

/// What follows from a success on this topic: another topic, and how its external id ends.
pub(crate) fn follows(topic: &str) -> Option<(&'static str, &'static str)> {
    match topic {
        "chain.one" => Some(("chain.two", "/2")),
        "chain.two" => Some(("chain.three", "/3")),
        _ => None,
    }
}

/// A topic for the next message: a mixed load.
pub(crate) fn topic(dice: &mut fastrand::Rng) -> &'static str {
    match dice.u32(..100) {
        0..16 => "note",
        16..22 => FLEETING,
        22..40 => "project",
        40..45 => "pair.left",
        45..50 => "pair.right",
        50..74 => "charge",
        74..80 => "blind",
        80..90 => "chain.one",
        _ => "late",
    }
}
