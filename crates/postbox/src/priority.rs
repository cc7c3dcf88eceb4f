//! How urgent a message is.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// How urgent a message is. Of the deliveries of a subscription that are due, higher ones go first; lower
/// ones are never left waiting for good: an eighth of what is handed out is theirs while they wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Before the others.
    High,
    /// As all messages that say nothing.
    #[default]
    Normal,
    /// After the others.
    Low,
}

impl Priority {
    /// From the highest to the lowest.
    pub const ALL: [Priority; 3] = [Priority::High, Priority::Normal, Priority::Low];

    /// The word for it, in SQL, JSON and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Priority::High => "high",
            Priority::Normal => "normal",
            Priority::Low => "low",
        }
    }

    /// As it is stored; lower goes first.
    pub(crate) fn level(self) -> i16 {
        match self {
            Priority::High => -1,
            Priority::Normal => 0,
            Priority::Low => 1,
        }
    }

    /// What is stored, if it is not what all are.
    pub(crate) fn stored(self) -> Option<i16> {
        (self != Priority::Normal).then_some(self.level())
    }

    pub(crate) fn of(level: i16) -> Priority {
        match level {
            ..0 => Priority::High,
            1 => Priority::Low,
            // Lanes have none.
            0 | 2.. => Priority::Normal,
        }
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Priority {
    type Err = String;

    fn from_str(word: &str) -> Result<Priority, String> {
        Priority::ALL
            .into_iter()
            .find(|priority| priority.as_str() == word)
            .ok_or_else(|| format!("`{}` is no priority; there are high, normal and low", word.escape_debug()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_and_others_refused() {
        for priority in Priority::ALL {
            assert_eq!(priority.as_str().parse(), Ok(priority));
            assert_eq!(Priority::of(priority.level()), priority);
        }
        assert!("urgent".parse::<Priority>().expect_err("refused").contains("high, normal and low"));
        assert!(Priority::High < Priority::Normal && Priority::Normal.stored().is_none());
    }
}
