//! What Redis answers about streams, read with nothing lost: field names may repeat and need not be text.

use std::fmt;
use std::str::FromStr;

use redis::Value;

/// An entry's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Id {
    milliseconds: u64,
    sequence: u64,
}

impl Id {
    /// Before any entry.
    pub(super) const ZERO: Id = Id { milliseconds: 0, sequence: 0 };

    /// The id just below.
    pub(super) fn before(self) -> Id {
        match self.sequence.checked_sub(1) {
            Some(sequence) => Id { sequence, ..self },
            None => match self.milliseconds.checked_sub(1) {
                Some(milliseconds) => Id { milliseconds, sequence: u64::MAX },
                None => Id::ZERO,
            },
        }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.milliseconds, self.sequence)
    }
}

impl FromStr for Id {
    type Err = ();

    fn from_str(text: &str) -> Result<Id, ()> {
        let (milliseconds, sequence) = text.split_once('-').ok_or(())?;
        let number = |text: &str| text.parse().map_err(|_| ());
        Ok(Id { milliseconds: number(milliseconds)?, sequence: number(sequence)? })
    }
}

/// Names and values, in the entry's order.
pub(super) type Fields = Vec<(Vec<u8>, Vec<u8>)>;
/// An entry; without fields if it has been deleted.
pub(super) type Listed = (Id, Option<Fields>);

/// What was not in the answer that should have been.
#[derive(Debug)]
pub(super) struct Odd;

/// XREADGROUP on one stream: its entries, none after a wait for nothing.
pub(super) fn read(value: Value) -> Result<Vec<Listed>, Odd> {
    match value {
        Value::Nil => Ok(Vec::new()),
        // Protocol 3: a map from stream to entries.
        Value::Map(mut streams) if streams.len() == 1 => entries(streams.remove(0).1),
        Value::Array(mut streams) if streams.len() == 1 => match streams.remove(0) {
            Value::Array(mut stream) if stream.len() == 2 => entries(stream.remove(1)),
            _ => Err(Odd),
        },
        Value::Array(streams) if streams.is_empty() => Ok(Vec::new()),
        _ => Err(Odd),
    }
}

/// XAUTOCLAIM: where to go on, what was claimed, and what of it is gone.
pub(super) fn claim(value: Value) -> Result<(Id, Vec<Listed>, Vec<Id>), Odd> {
    let Value::Array(parts) = value else { return Err(Odd) };
    let mut parts = parts.into_iter();
    let next = id(&parts.next().ok_or(Odd)?)?;
    let claimed = entries(parts.next().ok_or(Odd)?)?;
    // Redis 6.2 has no third part: there the deleted ones are listed with the claimed, without fields.
    let gone = match parts.next() {
        Some(Value::Array(ids)) => ids.iter().map(id).collect::<Result<_, _>>()?,
        _ => Vec::new(),
    };
    Ok((next, claimed, gone))
}

/// XPENDING of a single id: how often it was handed out; nothing if it is acknowledged.
pub(super) fn deliveries(value: &Value) -> Option<u32> {
    let [Value::Array(pending)] = array(value)? else { return None };
    integer(pending.get(3)?).and_then(|count| u32::try_from(count).ok())
}

/// XPENDING of the group: the smallest id that is not acknowledged.
pub(super) fn smallest_pending(value: &Value) -> Option<Id> {
    id(array(value)?.get(1)?).ok()
}

/// Where a group stands, of XINFO GROUPS.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) last_delivered: Id,
    pub(super) pending: u64,
    /// How many entries it has been handed or has passed; Redis cannot always tell.
    pub(super) read: Option<u64>,
    /// How many entries nobody was handed; Redis cannot always tell.
    pub(super) lag: Option<u64>,
}

pub(super) fn group(value: &Value, name: &str) -> Option<Group> {
    array(value)?.iter().find_map(|info| {
        let named = field(info, "name").is_some_and(|n| bytes(n) == Some(name.as_bytes()));
        named.then(|| Group {
            last_delivered: field(info, "last-delivered-id").and_then(|v| id(v).ok()).unwrap_or_default(),
            pending: count(info, "pending").unwrap_or_default(),
            read: count(info, "entries-read"),
            lag: count(info, "lag"),
        })
    })
}

/// An id in XINFO STREAM, by the name of its field.
pub(super) fn stream_id(value: &Value, name: &str) -> Option<Id> {
    id(field(value, name)?).ok()
}

/// A number in XINFO, by the name of its field.
pub(super) fn count(value: &Value, name: &str) -> Option<u64> {
    field(value, name).and_then(integer).and_then(|number| number.try_into().ok())
}

/// What has this name in a flat list of names and values, or in a map.
fn field<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    let is = |key: &Value| bytes(key) == Some(name.as_bytes());
    match value {
        Value::Map(pairs) => pairs.iter().find(|(key, _)| is(key)).map(|(_, value)| value),
        Value::Array(flat) => flat.chunks_exact(2).find(|pair| is(&pair[0])).map(|pair| &pair[1]),
        _ => None,
    }
}

fn entries(value: Value) -> Result<Vec<Listed>, Odd> {
    let Value::Array(listed) = value else { return Err(Odd) };
    listed.into_iter().filter(|one| !matches!(one, Value::Nil)).map(entry).collect()
}

fn entry(value: Value) -> Result<Listed, Odd> {
    let Value::Array(mut parts) = value else { return Err(Odd) };
    if parts.len() != 2 {
        return Err(Odd);
    }
    let (fields, id) = (parts.remove(1), id(&parts[0])?);
    let flat = match fields {
        Value::Nil => return Ok((id, None)),
        Value::Array(flat) if flat.len() % 2 == 0 => flat,
        _ => return Err(Odd),
    };
    let mut flat = flat.into_iter();
    let mut fields = Vec::with_capacity(flat.len() / 2);
    while let (Some(name), Some(value)) = (flat.next(), flat.next()) {
        fields.push((owned(name)?, owned(value)?));
    }
    Ok((id, Some(fields)))
}

fn owned(value: Value) -> Result<Vec<u8>, Odd> {
    match value {
        Value::BulkString(bytes) => Ok(bytes),
        Value::SimpleString(text) => Ok(text.into_bytes()),
        Value::Int(number) => Ok(number.to_string().into_bytes()),
        _ => Err(Odd),
    }
}

fn bytes(value: &Value) -> Option<&[u8]> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.as_bytes()),
        _ => None,
    }
}

fn id(value: &Value) -> Result<Id, Odd> {
    let text = bytes(value).and_then(|b| std::str::from_utf8(b).ok()).ok_or(Odd)?;
    text.parse().map_err(|()| Odd)
}

fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::Int(number) => Some(*number),
        _ => None,
    }
}

fn array(value: &Value) -> Option<&[Value]> {
    match value {
        Value::Array(items) => Some(items),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    #[test]
    fn ids_go_down_and_compare_as_numbers() {
        let id = |text: &str| text.parse::<Id>().expect("an id");
        assert!(id("9-9") < id("10-0"));
        assert_eq!(id("5-1").before(), id("5-0"));
        assert_eq!(id("5-0").before().to_string(), format!("4-{}", u64::MAX));
        assert_eq!(Id::ZERO.before(), Id::ZERO);
        for odd in ["", "5", "5-", "-1", "a-b", "5-1-1", "18446744073709551616-0"] {
            assert!(odd.parse::<Id>().is_err(), "{odd}");
        }
    }

    #[test]
    fn fields_keep_their_order_and_their_bytes() {
        let fields = vec![text("a"), text("1"), text("a"), Value::BulkString(vec![0xff, 0]), text(""), text("")];
        let listed = Value::Array(vec![text("7-1"), Value::Array(fields)]);
        let deleted = Value::Array(vec![text("7-2"), Value::Nil]);
        let stream = Value::Array(vec![text("s"), Value::Array(vec![listed.clone(), deleted.clone()])]);
        let wanted = vec![(b"a".to_vec(), b"1".to_vec()), (b"a".to_vec(), vec![0xff, 0]), (vec![], vec![])];
        let entries = read(Value::Array(vec![stream])).expect("entries");
        assert_eq!(entries, [("7-1".parse().expect("an id"), Some(wanted)), ("7-2".parse().expect("an id"), None)]);
        let map = Value::Map(vec![(text("s"), Value::Array(vec![listed]))]);
        assert_eq!(read(map).expect("entries").len(), 1, "protocol 3");
        assert!(read(Value::Nil).expect("nothing").is_empty());
        for odd in [Value::Okay, Value::Array(vec![Value::Nil]), Value::Array(vec![Value::Array(vec![text("s")])])] {
            assert!(read(odd).is_err());
        }
    }

    #[test]
    fn what_was_claimed_is_told_from_what_is_gone() {
        let claimed = Value::Array(vec![text("7-1"), Value::Array(vec![text("a"), text("1")])]);
        let parts = vec![text("7-3"), Value::Array(vec![claimed]), Value::Array(vec![text("7-2")])];
        let (next, entries, gone) = claim(Value::Array(parts.clone())).expect("a claim");
        assert_eq!((next.to_string(), entries.len(), gone.len()), ("7-3".into(), 1, 1));
        let (_, entries, gone) = claim(Value::Array(parts[..2].to_vec())).expect("a claim of Redis 6");
        assert_eq!((entries.len(), gone.len()), (1, 0));
    }

    #[test]
    fn a_group_is_found_in_both_protocols() {
        let pairs = |lag: Value| {
            [("name", text("shop")), ("pending", Value::Int(3)), ("last-delivered-id", text("9-1")), ("lag", lag)]
        };
        let flat = |lag| Value::Array(pairs(lag).into_iter().flat_map(|(name, value)| [text(name), value]).collect());
        let map = |lag| Value::Map(pairs(lag).into_iter().map(|(name, value)| (text(name), value)).collect());
        let wanted = |lag| Some(Group { last_delivered: "9-1".parse().expect("an id"), pending: 3, read: None, lag });
        assert_eq!(group(&Value::Array(vec![flat(Value::Int(4))]), "shop"), wanted(Some(4)));
        assert_eq!(group(&Value::Array(vec![map(Value::Nil)]), "shop"), wanted(None));
        assert_eq!(group(&Value::Array(vec![flat(Value::Nil)]), "other"), None);
    }
}
