//! What going back a version may cost, in words.

use crate::error::Error;

/// Whether messages may go with a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Nothing is done that would lose one.
    Refused,
    /// Somebody has said that they may.
    Accepted,
}

/// What a schema holds; counts above 100000 are given as 100001.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Holdings {
    /// Workers that are alive.
    pub(crate) workers: i64,
    /// Messages.
    pub(crate) messages: i64,
    /// Deliveries that are pending, running or in doubt.
    pub(crate) unfinished: i64,
    /// Of those, in doubt.
    pub(crate) in_doubt: i64,
    /// Schedules.
    pub(crate) schedules: i64,
    /// What could not become a message.
    pub(crate) quarantined: i64,
}

impl Holdings {
    /// Why nobody should go down to a version now, if so.
    pub(crate) fn refusal(&self, schema: &str, to: u32) -> Option<Error> {
        let capped = |n: i64| if n > 100_000 { "more than 100000".to_owned() } else { n.to_string() };
        if self.workers > 0 {
            return Some(Error::Refused(format!(
                "{} of the schema `{schema}` alive; stop {}, then go down to version {to}",
                if self.workers == 1 { "1 worker is".to_owned() } else { format!("{} workers are", self.workers) },
                if self.workers == 1 { "it" } else { "them" },
            )));
        }
        if self.messages == 0 && self.unfinished == 0 && self.schedules > 0 {
            return Some(Error::Refused(format!(
                "the schema `{schema}` has schedules ({}), which version {to} has not; `postbox schedules --json` shows what they say. Nothing was changed; if they may go, say so: `postbox migrate down --to {to} --and-lose-data`",
                self.schedules
            )));
        }
        if self.messages == 0 && self.unfinished == 0 && self.quarantined > 0 {
            return Some(Error::Refused(format!(
                "the schema `{schema}` has entries in quarantine ({}), which version {to} has not; `postbox quarantine list` shows them. Nothing was changed; if they may go, say so: `postbox migrate down --to {to} --and-lose-data`",
                capped(self.quarantined)
            )));
        }
        (self.messages > 0 || self.unfinished > 0).then(|| {
            Error::Refused(format!(
                "the schema `{schema}` is not empty (messages: {}, unfinished deliveries: {}, of them in doubt: {}); at version {to} all of it would be gone, and with it the record of what was done. Nothing was changed; if it may go, say so: `postbox migrate down --to {to} --and-lose-data`",
                capped(self.messages),
                capped(self.unfinished),
                capped(self.in_doubt),
            ))
        })
    }
}

/// Down is not up.
pub(crate) fn too_far(schema: &str, found: u32, to: u32) -> Error {
    Error::Refused(format!(
        "the schema `{schema}` is at version {found}: there is no going down to {to}; `postbox migrate up` goes up"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_would_be_lost() {
        assert!(Holdings::default().refusal("shop", 0).is_none());
        let words = |held: Holdings| held.refusal("shop", 0).map(|e| e.to_string()).unwrap_or_default();
        let words_of_two = words(Holdings { messages: 3, unfinished: 2, in_doubt: 1, ..Holdings::default() });
        assert!(
            words_of_two.contains("(messages: 3, unfinished deliveries: 2, of them in doubt: 1)"),
            "{words_of_two}"
        );
        assert!(words(Holdings { messages: 100_001, ..Holdings::default() }).contains("messages: more than 100000,"));
        assert!(words(Holdings { schedules: 2, ..Holdings::default() }).contains("has schedules (2)"));
        assert!(words(Holdings { quarantined: 4, ..Holdings::default() }).contains("entries in quarantine (4)"));
        assert!(words(Holdings { workers: 1, messages: 3, ..Holdings::default() }).contains("1 worker is"));
    }
}
