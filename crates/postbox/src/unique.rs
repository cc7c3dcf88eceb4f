//! One unfinished delivery of a key at a time.

/// What becomes of a message whose key a subscription has an unfinished delivery of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Unique {
    /// It is stored, and the subscription makes no delivery for it: the one that is unfinished stands for
    /// both, and that is on record.
    Coalesce,
    /// It is not published: [`PublishError::KeyInFlight`](crate::PublishError::KeyInFlight).
    Refuse,
}

/// Why it is not declared together with what holds for several of a key.
pub(crate) const ALONE: &str = "a subscription that takes one delivery of a key at a time (`unique`) has no several of a key to keep in order or to limit: leave one of them out";

impl Unique {
    /// As it is stored.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Unique::Coalesce => "coalesce",
            Unique::Refuse => "refuse",
        }
    }
}

/// What a store says of a refusal, as JSON.
#[derive(Debug, PartialEq, Eq, serde::Deserialize)]
pub(crate) struct InFlight {
    pub(crate) subscription: String,
    pub(crate) key: String,
    pub(crate) delivery: i64,
}

impl InFlight {
    /// The SQLSTATE of a refusal on PostgreSQL.
    pub(crate) const SQLSTATE: &str = "PB001";
    /// What a refusal begins with on SQLite; JSON follows.
    pub(crate) const WORDS: &str = "postbox: key in flight: ";

    /// Reads what the store said, if it is that.
    pub(crate) fn read(said: &str) -> Option<InFlight> {
        serde_json::from_str(said).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_read() {
        let said = r#"{"application": "shop", "subscription": "sync", "key": "a \"b\"", "delivery": 42}"#;
        let read = InFlight { subscription: "sync".into(), key: "a \"b\"".into(), delivery: 42 };
        assert_eq!(InFlight::read(said), Some(read));
        assert_eq!(InFlight::read("something else"), None);
    }
}
