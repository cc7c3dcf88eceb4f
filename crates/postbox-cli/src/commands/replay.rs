//! `postbox replay ID... | FILTER...`: new deliveries of messages that were delivered before.

use postbox::admin::{self, Filter, ReplayPreview, Replayed};
use postbox::lifecycle::State;
use postbox::{Database, Postbox};

use crate::commands::{Ended, list, retry};
use crate::confirm::confirm;
use crate::desk::{Desk, usage};
use crate::failure::{FAILED, Failure};
use crate::flags::Replay;
use crate::output::Tone;
use crate::text::{capped, plain, quoted};

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, replay: Replay) -> Ended {
    let typed = replay.which.iter().map(|w| quoted(w)).collect::<Vec<_>>().join(" ");
    let tried = format!("replay {}", replay.which.join(" "));
    let ids: Vec<i64> = replay.which.iter().filter_map(|word| word.parse().ok()).collect();
    if ids.is_empty() {
        return by_filter::<Db>(desk, replay, &tried, &typed).await;
    }
    if ids.len() < replay.which.len() {
        let why = "these are numbers and a filter together; give one or the other";
        return Err(usage(&tried, why, desk.command(&format!("replay {} --reason …", ids[0]))));
    }
    if replay.irreversible && ids.len() > 1 {
        let why = "operations are replayed one by one: --irreversible takes one ID";
        return Err(usage(&tried, why, desk.command(&format!("replay {} --irreversible --reason …", ids[0]))));
    }
    singly::<Db>(desk, replay, &ids, &tried, &typed).await
}

async fn singly<Db: Database>(desk: &Desk<'_>, replay: Replay, ids: &[i64], tried: &str, typed: &str) -> Ended {
    let irreversible = if replay.irreversible { " --irreversible" } else { "" };
    let same = desk.command(&format!("replay {typed}{irreversible}"));
    let postbox = desk.open::<Db>().await?;
    if replay.preview || replay.irreversible {
        let mut rows = Vec::with_capacity(ids.len());
        for id in ids {
            let row = postbox.admin().show(*id).await.map_err(|e| Failure::of(&e, tried, desk.look_at(*id, &e)))?.row;
            let ended = matches!(row.state, State::Succeeded | State::Dead | State::Cancelled);
            if row.kind == "operation" && ended {
                desk.output.prose(&format!(
                    "delivery {id} is an operation: its effect happens again, under a new idempotency key, so that the remote cannot tell it from a new one"
                ));
            } else if !ended {
                desk.output.prose(&format!("delivery {id} is {}: it cannot be replayed", row.state));
            }
            rows.push(row);
        }
        if replay.preview {
            if desk.output.json {
                for row in &rows {
                    desk.output.object(row)?;
                }
            } else {
                list::table(&rows, desk.output)?;
                desk.output.prose(&format!("next: {same} --reason \"why\""));
            }
            return Ok(0);
        }
    }
    let reason = desk.reason(replay.reason, tried, &same)?;
    if replay.irreversible {
        confirm(replay.yes, tried, &format!("{same} --reason {}", quoted(&plain(&reason))))?;
    }
    let wish = admin::Replay { actor: desk.actor.clone(), reason, irreversible: replay.irreversible };
    let mut outcomes = Vec::with_capacity(ids.len());
    for id in ids {
        outcomes.push((*id, postbox.admin().replay(*id, &wish).await));
    }
    retry::told(desk, "replay", outcomes, tell)
}

fn tell(desk: &Desk<'_>, replayed: &Replayed) -> std::io::Result<()> {
    if desk.output.json {
        return desk.output.object(replayed);
    }
    let key = replayed.idempotency_key.as_ref().map_or_else(String::new, |key| format!(", key {}", plain(key)));
    desk.output.line(&format!(
        "{} delivery {} is replayed as {}{key}, by {}, audit {}",
        desk.output.paint(Tone::Good, "+"),
        replayed.replay_of,
        replayed.delivery,
        plain(&replayed.audit.actor),
        replayed.audit.seq
    ))
}

async fn by_filter<Db: Database>(desk: &Desk<'_>, replay: Replay, tried: &str, typed: &str) -> Ended {
    let same = desk.command(&format!("replay {typed}"));
    if replay.irreversible {
        let why = "operations are replayed one by one: --irreversible takes one ID, no filter";
        return Err(usage(tried, why, desk.command("list state:succeeded,dead")));
    }
    let unreadable =
        |e: postbox::Error| Failure::new(crate::failure::USAGE, tried, e.to_string(), desk.command("replay --help"));
    let filter: Filter = replay.which.join(" ").parse().map_err(unreadable)?;
    let failed = |e: postbox::Error| Failure::of(&e, tried, desk.command(&format!("list {typed}")));
    let postbox = desk.open::<Db>().await?;
    let preview = postbox.admin().replay_preview(&filter).await.map_err(failed)?;
    if replay.preview {
        show(desk, &preview)?;
        if !desk.output.json && preview.deliveries > 0 {
            desk.output.prose(&format!("next: {same} --reason \"why\""));
        }
        return Ok(0);
    }
    let reason = desk.reason(replay.reason, tried, &same)?;
    if !desk.output.json {
        show(desk, &preview)?;
    }
    if preview.deliveries > 0 {
        confirm(replay.yes, tried, &format!("{same} --reason {}", quoted(&plain(&reason))))?;
    }
    let wish = admin::Replay { actor: desk.actor.clone(), reason, irreversible: false };
    carry_out(desk, &postbox, &filter, &wish, replay.above, (tried, &same)).await
}

async fn carry_out<Db: Database>(
    desk: &Desk<'_>,
    postbox: &Postbox<Db>,
    filter: &Filter,
    wish: &admin::Replay,
    above: i64,
    (tried, same): (&str, &str),
) -> Ended {
    let failed = |e: postbox::Error| Failure::of(&e, tried, desk.command("status"));
    let mut run = postbox.admin().replay_all(filter, wish, above).await.map_err(failed)?;
    let ended = loop {
        match run.next().await {
            Ok(Some(_)) => {}
            Ok(None) => break None,
            Err(error) => break Some(error),
        }
    };
    let so_far = run.so_far();
    if desk.output.json {
        desk.output.object(&so_far)?;
    } else {
        let plus = desk.output.paint(Tone::Good, "+");
        desk.output.line(&format!("{plus} replayed {}, left out {}", so_far.replayed, so_far.left_out))?;
    }
    match ended {
        None => Ok(0),
        Some(error) => {
            let next = format!("{same} --above {} --reason {} --yes", so_far.upto, quoted(&plain(&wish.reason)));
            Err(Failure::new(FAILED, format!("{tried} to its end"), error.to_string(), next))
        }
    }
}

fn show(desk: &Desk<'_>, preview: &ReplayPreview) -> std::io::Result<()> {
    let output = desk.output;
    if output.json {
        return output.object(preview);
    }
    for count in &preview.by_subscription {
        let note = match (count.operation, count.removed) {
            (_, true) => "  left out: removed",
            (true, _) => "  left out: operations are replayed one by one, with --irreversible",
            _ => "",
        };
        output.line(&format!(
            "{:>8}  {} of {}{note}",
            capped(count.deliveries),
            plain(&count.subscription),
            plain(&count.application)
        ))?;
    }
    if !preview.sample.is_empty() {
        list::table(&preview.sample, output)?;
    }
    output.prose(&format!("makes {} new deliveries, due now", capped(preview.deliveries)));
    Ok(())
}
