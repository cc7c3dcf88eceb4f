//! `postbox keys [list]`, and `unblock`, `skip` and `park`.

use postbox::admin::{KeyFilter, KeyRow, KeyWish};
use postbox::{Database, Error};

use crate::commands::Ended;
use crate::commands::subscriptions::{rows, the_one};
use crate::desk::{Desk, usage};
use crate::failure::Failure;
use crate::flags::{Keys, KeysCommand, KeysList, OneKey};
use crate::output::Tone;
use crate::table::{Columns, text, toned};
use crate::text::{ago, plain, quoted, shortened};

/// What a key's deliveries are counted up to.
const COUNTED: i64 = 10_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Unblock,
    Skip,
    Park,
}

impl Verb {
    fn as_str(self) -> &'static str {
        match self {
            Verb::Unblock => "unblock",
            Verb::Skip => "skip",
            Verb::Park => "park",
        }
    }
}

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, keys: Keys) -> Ended {
    match keys.command {
        None => list::<Db>(desk, keys.list).await,
        Some(KeysCommand::List(wish)) => list::<Db>(desk, wish).await,
        Some(KeysCommand::Unblock(wish)) => turn::<Db>(desk, wish, Verb::Unblock).await,
        Some(KeysCommand::Skip(wish)) => turn::<Db>(desk, wish, Verb::Skip).await,
        Some(KeysCommand::Park(wish)) => turn::<Db>(desk, wish, Verb::Park).await,
    }
}

/// What to type for a key that waits.
fn typed(desk: &Desk<'_>, verb: &str, row: &KeyRow) -> String {
    let whose = desk.of(&row.application);
    let (key, subscription) = (quoted(&plain(&row.key)), quoted(&plain(&row.subscription)));
    desk.action(&format!("keys {verb} {key} --subscription {subscription}{whose} --reason …"))
}

async fn list<Db: Database>(desk: &Desk<'_>, wish: KeysList) -> Ended {
    let postbox = desk.open::<Db>().await?;
    let filter = KeyFilter { application: desk.application.clone(), subscription: wish.subscription, key: None };
    let limit = wish.limit;
    let tried = "list the keys that wait";
    let rows =
        postbox.admin().keys(&filter, limit).await.map_err(|e| Failure::of(&e, tried, desk.command("status")))?;
    if let Some(name) = filter.subscription.as_ref().filter(|_| rows.is_empty()) {
        // Nothing waits in one that there is not: that is a slip of the pen.
        let all = self::rows(desk, &postbox, tried).await?;
        if !all.iter().any(|row| row.name == *name) {
            the_one(desk, &all, "list", name, tried)?;
        }
    }
    if desk.output.json {
        for row in &rows {
            desk.output.object(row)?;
        }
        return Ok(0);
    }
    if rows.is_empty() {
        desk.output.prose("no key waits");
        return Ok(0);
    }
    let mut columns =
        Columns::new(&["APPLICATION", "SUBSCRIPTION", "KEY", "STATE", ">DELIVERY", ">WAITING", "SINCE", "CAUSE"]);
    for row in &rows {
        let tone = match row.state.as_str() {
            "blocked" => Tone::Bad,
            "in_doubt" => Tone::Doubt,
            "parked" => Tone::Faint,
            _ => Tone::Busy,
        };
        columns.row([
            text(plain(&row.application)),
            text(plain(&row.subscription)),
            text(shortened(&plain(&row.key), 40)),
            toned(tone, row.state.replace('_', " ")),
            text(row.head.map(|head| head.to_string()).unwrap_or_else(|| "-".into())),
            text(if row.waiting > COUNTED { format!("{COUNTED}+") } else { row.waiting.to_string() }),
            text(ago(row.since)),
            text(shortened(&plain(&row.cause), 60)),
        ]);
    }
    columns.print(desk.output)?;
    if let Some(row) = rows.iter().find(|row| row.state == "blocked" || row.state == "parked") {
        desk.output.prose(&format!("next: {}", typed(desk, "unblock", row)));
    } else if let Some(head) = rows.iter().find(|row| row.state == "in_doubt").and_then(|row| row.head) {
        desk.output.prose(&format!("next: {}", desk.command(&format!("show {head}"))));
    }
    if rows.len() == limit as usize {
        desk.output.prose(&format!("there may be more than these {limit}; --limit shows more"));
    }
    Ok(0)
}

async fn turn<Db: Database>(desk: &Desk<'_>, wish: OneKey, verb: Verb) -> Ended {
    let (key, subscription) = (plain(&wish.key), plain(&wish.subscription));
    let tried = format!("{} the key {key}", verb.as_str());
    let again = format!("keys {} {} --subscription {}", verb.as_str(), quoted(&key), quoted(&subscription));
    if wish.key.is_empty() {
        return Err(usage(
            &tried,
            "messages without a key are in no order, so none of them waits",
            desk.command("keys"),
        ));
    }
    let hint = match verb {
        Verb::Unblock => "what was mended",
        Verb::Skip => "why the others may go on",
        Verb::Park => "why",
    };
    let reason = desk.reason(wish.reason, &tried, &desk.action(&again), hint)?;
    let postbox = desk.open::<Db>().await?;
    let subscriptions = rows(desk, &postbox, &tried).await?;
    let row = the_one(desk, &subscriptions, "list", &wish.subscription, &tried)?;
    let wish = KeyWish {
        application: row.application.clone(),
        subscription: row.name.clone(),
        key: wish.key,
        actor: desk.actor.clone(),
        reason,
    };
    let admin = postbox.admin();
    let turned = match verb {
        Verb::Unblock => admin.unblock_key(&wish).await,
        Verb::Skip => admin.skip_key(&wish).await,
        Verb::Park => admin.park_key(&wish).await,
    };
    let next = |_: &Error| desk.command("keys");
    let entry = turned.map_err(|e| Failure::of(&e, &tried, next(&e)))?;
    if desk.output.json {
        desk.output.object(&entry)?;
        return Ok(0);
    }
    let plus = desk.output.paint(Tone::Good, "+");
    let done = match (verb, entry.delivery) {
        (Verb::Unblock, Some(head)) => format!("delivery {head} is tried again; what waits of the key comes after it"),
        (Verb::Unblock, None) => "the key goes on".to_owned(),
        (Verb::Skip, Some(head)) => format!("the key goes on without delivery {head}"),
        (Verb::Skip, None) => "the key goes on".to_owned(),
        (Verb::Park, _) => "nothing of the key is handed out until it is unblocked".to_owned(),
    };
    desk.output.line(&format!("{plus} {done}; by {}, audit {}", plain(&entry.actor), entry.seq))?;
    if verb == Verb::Park {
        let again = format!("keys unblock {} --subscription {} --reason …", quoted(&key), quoted(&subscription));
        desk.output.prose(&format!("next: {}", desk.action(&again)));
    }
    Ok(0)
}
