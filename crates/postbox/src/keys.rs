//! What holds for the deliveries of a subscription that have the same key: their order, and how many run at once.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use crate::error::Error;

/// What holds for deliveries of one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    /// One after the other, in the order in which they were published.
    Ordered(OnDead),
    /// In no order, so many at once across all workers.
    AtOnce(u32),
}

impl Keys {
    /// How many of a key run at once.
    pub(crate) fn at_once(self) -> u32 {
        match self {
            Keys::Ordered(_) => 1,
            Keys::AtOnce(n) => n,
        }
    }

    /// What becomes of a key in order whose delivery died; `None`: there is no order.
    pub(crate) fn on_dead(self) -> Option<OnDead> {
        match self {
            Keys::Ordered(on_dead) => Some(on_dead),
            Keys::AtOnce(_) => None,
        }
    }
}

impl Keys {
    /// A subscription that delivers by key cannot end to.
    pub(crate) fn for_good(name: &str) -> Error {
        Error::Refused(format!(
            "the subscription `{name}` delivers by key (an order or a limit for each), and its deliveries are stored for that; give the handler that does not another name, and remove the old one with `postbox subscriptions remove` when nothing of it is left"
        ))
    }

    /// A subscription that has unfinished deliveries cannot begin to deliver by key.
    pub(crate) fn too_late(name: &str) -> Error {
        Error::Refused(format!(
            "deliveries of `{name}` are unfinished, and were handed out in no order and without a limit for each key; start this worker when none are left, or give its handler another name"
        ))
    }
}

/// What becomes of a key in order when one of its deliveries has died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDead {
    /// The others wait until somebody has decided: `postbox keys`.
    #[default]
    Block,
    /// The dead one is left out, and the others go on.
    Skip,
    /// The key is put aside with all that is published for it, and counts as dealt with.
    Park,
}

impl OnDead {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            OnDead::Block => "block",
            OnDead::Skip => "skip",
            OnDead::Park => "park",
        }
    }
}

impl fmt::Display for OnDead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for OnDead {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        [OnDead::Block, OnDead::Skip, OnDead::Park]
            .into_iter()
            .find(|one| one.as_str() == word)
            .ok_or_else(|| format!("`{}` is none of block, skip and park", word.escape_debug()))
    }
}
