//! A run's history: what the three witnesses outside of postbox saw, and what its database says.

use std::collections::BTreeMap;

/// What the publishers' logs say of one external id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Publish {
    pub(crate) topic: String,
    /// A row of the business's own was written with it.
    pub(crate) business: bool,
    /// Many tried to publish it under one dedup key.
    pub(crate) dedup: bool,
    /// What each was told: ok, fail, unknown, duplicate, conflict; and with which body.
    pub(crate) told: Vec<(String, String)>,
}

/// Something the remote saw, by the line's first word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) ext: String,
    pub(crate) key: String,
    pub(crate) delivery: i64,
    pub(crate) number: u32,
    /// When it came, and when the remote was through with it; microseconds.
    pub(crate) received: u64,
    pub(crate) over: Option<u64>,
    pub(crate) applied: Vec<u64>,
    /// The attempt was not on record when it came.
    pub(crate) unrecorded: bool,
    /// The database's clock when the handler began, in milliseconds.
    pub(crate) clock: i64,
    /// What the remote did with it.
    pub(crate) how: String,
}

/// A handler that told that it ran.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) ext: String,
    pub(crate) delivery: i64,
    pub(crate) number: u32,
    pub(crate) clock: i64,
    /// It was told that it is done.
    pub(crate) done: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) id: String,
    pub(crate) topic: String,
    pub(crate) ext: String,
    pub(crate) due_ms: Option<i64>,
    pub(crate) body: Option<String>,
    pub(crate) deliveries: Vec<i64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub(crate) id: i64,
    pub(crate) state: String,
    pub(crate) subscription: String,
    pub(crate) message: String,
    pub(crate) attempts: u32,
    pub(crate) rev: i64,
    pub(crate) note: String,
    /// The delivery that an operator had repeated as this one.
    pub(crate) replay_of: Option<i64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attempt {
    pub(crate) delivery: i64,
    pub(crate) number: u32,
    /// `None`: open.
    pub(crate) outcome: Option<String>,
    pub(crate) started_ms: i64,
    pub(crate) finished_ms: Option<i64>,
    pub(crate) error: String,
    /// Worker and batch that put the start on record, and those that wrote the outcome.
    pub(crate) begun_by: Option<String>,
    pub(crate) ended_by: Option<String>,
}

/// A delivery that was leased, as the witness beside the leases saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Worker and batch.
    pub(crate) by: String,
    pub(crate) delivery: i64,
    pub(crate) rev: i64,
    /// Of the attempt that it is for.
    pub(crate) number: u32,
}

/// An attempt's outcome, whichever way it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Written {
    /// Worker and batch; `None`: no lease's.
    pub(crate) by: Option<String>,
    pub(crate) delivery: i64,
    pub(crate) number: u32,
    /// The delivery's revision with it.
    pub(crate) rev: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resolved {
    pub(crate) delivery: i64,
    pub(crate) number: u32,
    pub(crate) answer: String,
    pub(crate) source: String,
    pub(crate) state_after: String,
}

/// What was seen and changed no state by itself: mostly an outcome that came too late.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Observed {
    pub(crate) delivery: i64,
    pub(crate) number: u32,
    pub(crate) worker: String,
    /// An outcome's word, or `lost`.
    pub(crate) kind: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Audited {
    pub(crate) seq: i64,
    pub(crate) action: String,
    pub(crate) delivery: Option<i64>,
    pub(crate) rev_before: Option<i64>,
    pub(crate) rev_after: Option<i64>,
    pub(crate) state_before: String,
    pub(crate) state_after: String,
    /// The database's clock, in milliseconds.
    pub(crate) at_ms: i64,
    pub(crate) reason: String,
    pub(crate) replayed_as: Option<i64>,
}

/// What the operator was told is done, with its number in the audit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Acted {
    pub(crate) seq: i64,
    pub(crate) action: String,
    pub(crate) delivery: i64,
}

/// An operation's handler that came to its end, by its worker's own log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Which worker: its slot, and which life of it.
    pub(crate) life: String,
    pub(crate) delivery: i64,
    pub(crate) number: u32,
    pub(crate) word: String,
    /// How many signs of life its process left after it.
    pub(crate) lived: u32,
}

/// What somebody who pulled was told about the end of their transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pull {
    pub(crate) subscription: String,
    pub(crate) ext: String,
    pub(crate) delivery: i64,
    pub(crate) number: u32,
    /// ok, fail, unknown.
    pub(crate) told: String,
}

/// A delivery that was seen in an end state while faults were on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) state: String,
    pub(crate) rev: i64,
}

/// Everything the checks go by.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    pub(crate) publishes: BTreeMap<String, Publish>,
    pub(crate) calls: Vec<Call>,
    pub(crate) notes: Vec<Seen>,
    /// Rows that transactional handlers committed.
    pub(crate) effects: Vec<Seen>,
    /// Business rows, by external id.
    pub(crate) business: Vec<String>,
    pub(crate) messages: Vec<Message>,
    pub(crate) deliveries: Vec<Delivery>,
    pub(crate) attempts: Vec<Attempt>,
    pub(crate) claims: Vec<Claim>,
    pub(crate) written: Vec<Written>,
    pub(crate) resolutions: Vec<Resolved>,
    pub(crate) observations: Vec<Observed>,
    pub(crate) audit: Vec<Audited>,
    pub(crate) acted: Vec<Acted>,
    pub(crate) pulls: Vec<Pull>,
    pub(crate) ends: Vec<Ended>,
    pub(crate) samples: BTreeMap<i64, Vec<Sample>>,
    /// What is left that should not be after healing, in words.
    pub(crate) leftovers: Vec<String>,
}

impl History {
    /// Reads a publisher's log; a last line that a kill cut off is not there.
    pub(crate) fn read_publisher(&mut self, text: &str) {
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(ext), Some(word)) = (words.next(), words.next()) else { continue };
            let publish = self.publishes.entry(ext.to_owned()).or_default();
            match word {
                "intent" => {
                    publish.topic = words.next().unwrap_or_default().to_owned();
                    match words.next() {
                        Some("business") => publish.business = true,
                        Some("dedup") => publish.dedup = true,
                        _ => {}
                    }
                }
                told => publish.told.push((told.to_owned(), words.next().unwrap_or_default().to_owned())),
            }
        }
    }

    /// Reads the log of somebody who pulls.
    pub(crate) fn read_puller(&mut self, text: &str) {
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [subscription, ext, delivery, number, told] = words.as_slice() else { continue };
            self.pulls.push(Pull {
                subscription: (*subscription).to_owned(),
                ext: (*ext).to_owned(),
                delivery: delivery.parse().unwrap_or_default(),
                number: number.parse().unwrap_or_default(),
                told: (*told).to_owned(),
            });
        }
    }

    /// Reads the log of the worker in a slot: its lives, one after the other.
    pub(crate) fn read_worker(&mut self, slot: &str, text: &str) {
        // From the end, so that the signs of life that came after are known.
        let mut signs: BTreeMap<&str, u32> = BTreeMap::new();
        for line in text.lines().rev() {
            match line.split_whitespace().collect::<Vec<_>>().as_slice() {
                ["alive", life] => *signs.entry(life).or_default() += 1,
                ["ended", life, delivery, number, word] => self.ends.push(Ended {
                    life: format!("{slot}-{life}"),
                    delivery: delivery.parse().unwrap_or_default(),
                    number: number.parse().unwrap_or_default(),
                    word: (*word).to_owned(),
                    lived: signs.get(life).copied().unwrap_or_default(),
                }),
                _ => {}
            }
        }
    }

    /// Reads the remote's log.
    pub(crate) fn read_remote(&mut self, text: &str) {
        // The call of a key and a number that is under way: one after the other, if all is well.
        let mut open: BTreeMap<(String, u32), usize> = BTreeMap::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let ["note", ext, delivery, number, clock, rest @ ..] = words.as_slice() {
                self.notes.push(Seen {
                    ext: (*ext).to_owned(),
                    delivery: delivery.parse().unwrap_or_default(),
                    number: number.parse().unwrap_or_default(),
                    clock: clock.parse().unwrap_or_default(),
                    done: rest.last() == Some(&"done"),
                });
                continue;
            }
            let [what, ext, key, delivery, number, rest @ ..] = words.as_slice() else { continue };
            let number: u32 = number.parse().unwrap_or_default();
            let at = rest.first().and_then(|t| t.parse().ok()).unwrap_or_default();
            let id = ((*key).to_owned(), number);
            if *what == "call" {
                self.calls.push(Call {
                    ext: (*ext).to_owned(),
                    key: (*key).to_owned(),
                    delivery: delivery.parse().unwrap_or_default(),
                    number,
                    received: at,
                    over: None,
                    applied: Vec::new(),
                    unrecorded: false,
                    clock: rest.get(1).and_then(|t| t.parse().ok()).unwrap_or_default(),
                    how: String::new(),
                });
                open.insert(id, self.calls.len() - 1);
                continue;
            }
            let Some(call) = open.get(&id).and_then(|index| self.calls.get_mut(*index)) else { continue };
            match *what {
                "applied" => call.applied.push(at),
                "unrecorded" => call.unrecorded = true,
                "over" => {
                    call.over = Some(at);
                    call.how = rest[1..].join(" ");
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_are_read() {
        let mut history = History::default();
        history.read_publisher("p0-1 intent note business\np0-1 ok\nd-1 intent note dedup\nd-1 conflict b\n");
        assert!(history.publishes["p0-1"].business);
        assert_eq!(history.publishes["p0-1"].told, [("ok".to_owned(), String::new())]);
        assert!(history.publishes["d-1"].dedup);
        history.read_remote("call e k-7 7 1 100 555\nunrecorded e k-7 7 1\napplied e k-7 7 1 150\nover e k-7 7 1 160 Slow(3)\nnote e 8 2 777 plain 99 done\n");
        let [call] = history.calls.as_slice() else { panic!("one call") };
        assert!(call.unrecorded && call.applied == [150] && call.over == Some(160) && call.clock == 555);
        assert_eq!((history.notes[0].delivery, history.notes[0].number, history.notes[0].clock), (8, 2, 777));
        assert!(history.notes[0].done);
        history.read_worker(
            "w1",
            "alive 3\nended 3 7 1 failed\nalive 3\nalive 3\nended 4 8 2 succeeded\nalive 4\nended 4 9",
        );
        let [second, first] = history.ends.as_slice() else { panic!("two ends") };
        assert_eq!((first.life.as_str(), first.delivery, first.number, first.lived), ("w1-3", 7, 1, 2));
        assert_eq!((second.life.as_str(), second.word.as_str(), second.lived), ("w1-4", "succeeded", 1));
        history.read_puller("pulled e 9 2 ok\npulled e 9");
        let [pull] = history.pulls.as_slice() else { panic!("one pull") };
        assert_eq!((pull.delivery, pull.number, pull.told.as_str()), (9, 2, "ok"));
    }
}
