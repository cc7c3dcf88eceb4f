//! What a batch is as commands, and what the replies say of each message.

use std::collections::HashMap;

use redis::{Cmd, Pipeline, ServerError, Value, pipe};

use crate::message::Envelope;
use crate::redis_client::Known;
use crate::sink::{Encoded, EnvelopeStyle, Outgoing, Sent, Unsent};

/// The commands of a batch, and whose they are.
pub(super) struct Plan {
    pipeline: Pipeline,
    /// In the order of the commands: messages, by their place in the batch. One is an XADD; several are a
    /// transaction.
    groups: Vec<Vec<usize>>,
    /// By its place in the batch; `None`: it is among the commands.
    outcomes: Vec<Option<Unsent>>,
}

impl Plan {
    /// `add` gives the command and its stream; its errors are final.
    pub(super) fn new(batch: &[Outgoing], mut add: impl FnMut(&Envelope) -> Result<(Cmd, String), String>) -> Plan {
        let (mut groups, mut commands) = (Vec::<Vec<usize>>::new(), Vec::new());
        let mut by_key = HashMap::new();
        let mut outcomes = Vec::with_capacity(batch.len());
        for (at, message) in batch.iter().enumerate() {
            let (command, stream) = match add(message) {
                Ok(added) => added,
                Err(why) => {
                    outcomes.push(Some(Unsent::rejected(why)));
                    commands.push(None);
                    continue;
                }
            };
            outcomes.push(None);
            commands.push(Some(command));
            match &message.key {
                Some(key) => {
                    let group = *by_key.entry((stream, key.as_str())).or_insert(groups.len());
                    match groups.get_mut(group) {
                        Some(group) => group.push(at),
                        None => groups.push(vec![at]),
                    }
                }
                None => groups.push(vec![at]),
            }
        }
        let mut pipeline = pipe();
        for group in &groups {
            let several = group.len() > 1;
            if several {
                pipeline.cmd("MULTI");
            }
            for at in group {
                if let Some(command) = commands[*at].take() {
                    pipeline.add_command(command);
                }
            }
            if several {
                pipeline.cmd("EXEC");
            }
        }
        pipeline.ignore_errors();
        Plan { pipeline, groups, outcomes }
    }

    /// Nothing is to be sent.
    pub(super) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    pub(super) fn pipeline(&mut self) -> &mut Pipeline {
        &mut self.pipeline
    }

    /// No reply came, for this reason.
    pub(super) fn unsent(self, why: &str) -> Sent {
        self.outcomes.into_iter().map(|outcome| Err(outcome.unwrap_or_else(|| Unsent::again(why)))).collect()
    }

    /// What the replies say.
    pub(super) fn settle(self, replies: Vec<Value>, known: &Known) -> Sent {
        let mut sent: Sent = self.outcomes.into_iter().map(|outcome| outcome.map_or(Ok(()), Err)).collect();
        let mut replies = replies.into_iter();
        for group in self.groups {
            if let [at] = group[..] {
                sent[at] = judged(replies.next(), known);
                continue;
            }
            // MULTI, one for each that is taken into the transaction, and then EXEC.
            let begun = refused(replies.next(), known);
            let queued: Vec<Option<Unsent>> = group.iter().map(|_| refused(replies.next(), known)).collect();
            match replies.next() {
                Some(Value::Array(done)) if done.len() == group.len() => {
                    for (at, reply) in group.into_iter().zip(done) {
                        sent[at] = judged(Some(reply), known);
                    }
                }
                // Nothing was done: each has what was said of it. The others have not been tried where one of them was
                // to blame, else what was said of them all.
                reply => {
                    let of_all = begun.or_else(|| refused(reply, known));
                    let blamed = of_all.is_some() && queued.iter().any(Option::is_some);
                    let of_all = of_all.unwrap_or_else(no_reply);
                    let of_others = || match blamed {
                        true => Unsent::not_tried(&of_all.error),
                        false => Unsent::again(&of_all.error),
                    };
                    for (at, of_one) in group.into_iter().zip(queued) {
                        sent[at] = Err(of_one.unwrap_or_else(of_others));
                    }
                }
            }
        }
        sent
    }
}

fn no_reply() -> Unsent {
    Unsent::again("Redis gave no reply to it")
}

/// The reply to an XADD: the entry's id, if it was added.
fn judged(reply: Option<Value>, known: &Known) -> Result<(), Unsent> {
    match reply {
        Some(Value::BulkString(_) | Value::SimpleString(_)) => Ok(()),
        reply => Err(refused(reply, known).unwrap_or_else(no_reply)),
    }
}

fn refused(reply: Option<Value>, known: &Known) -> Option<Unsent> {
    match reply {
        Some(Value::ServerError(error)) => {
            let words = known.server_words(&error);
            Some(if is_final(&error) { Unsent::rejected(words) } else { Unsent::again(words) })
        }
        _ => None,
    }
}

/// Whether this message will never be taken there: the key holds something else, the entry is too large, or the
/// stream is at its end. Everything else may pass or be mended: no memory, a replica, a server that loads, rights.
fn is_final(error: &ServerError) -> bool {
    let about = error.details().unwrap_or_default();
    match error.code() {
        "WRONGTYPE" => true,
        "ERR" => about.contains("too large") || about.contains("exhausted the last possible ID"),
        _ => false,
    }
}

/// Names and values of an entry.
pub(super) type Fields = Vec<(String, Vec<u8>)>;

/// XADD of one entry.
pub(super) fn add(stream: &str, max_len: Option<u64>, fields: &Fields) -> Cmd {
    let bytes = fields.iter().map(|(name, value)| name.len() + value.len()).sum();
    let mut command = Cmd::with_capacity(2 * fields.len() + 6, bytes);
    command.arg("XADD").arg(stream);
    if let Some(entries) = max_len {
        command.arg("MAXLEN").arg("~").arg(entries);
    }
    command.arg("*");
    for (name, value) in fields {
        command.arg(name).arg(value);
    }
    command
}

/// A message as an entry.
pub(super) fn fields(envelope: &Envelope, style: EnvelopeStyle, source: Option<&str>) -> Fields {
    match style {
        EnvelopeStyle::Payload => flattened(envelope),
        style => {
            let encoded = Encoded::new(envelope, style, source);
            encoded.fields().map(|(name, value)| (name, value.to_vec())).collect()
        }
    }
}

/// The payload in one field, and what is needed to read it as the message that it is in others: the names that
/// the flattened format of sources has.
fn flattened(envelope: &Envelope) -> Fields {
    let own = |name: &str, value: String| Some((name.to_owned(), value.into_bytes()));
    let optional = |name: &str, value: Option<&str>| value.and_then(|value| own(name, value.to_owned()));
    let content_type = envelope.payload_json().is_none().then(|| envelope.content_type());
    let fields = [
        own("event_id", envelope.id.to_string()),
        own("event_type", envelope.topic.clone()),
        optional("aggregate_id", envelope.key.as_deref()),
        own("correlation_id", envelope.correlation()),
        optional("causation_id", envelope.causation_id.as_deref()),
        own("occurred_on", envelope.occurred_at.to_string()),
        optional("traceparent", envelope.traceparent()),
        optional("content-type", content_type),
        Some(("payload".to_owned(), envelope.payload_bytes().to_vec())),
    ];
    fields.into_iter().flatten().collect()
}
