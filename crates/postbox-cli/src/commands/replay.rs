//! `postbox replay ID... | FILTER...`: new deliveries of messages that were delivered before.

use postbox::admin::{self, Filter, ReplayPreview, Replayed};
use postbox::lifecycle::State;
use postbox::{Database, Postbox};

use crate::commands::Ended;
use crate::commands::bulk::{self, Cut, Interrupt, Pace, Preview, Verb, Wanted, Which};
use crate::desk::{Desk, usage};
use crate::failure::Failure;
use crate::flags::Replay;
use crate::output::Tone;
use crate::text::{many, plain, quoted};

const ENDED: &[State] = &[State::Succeeded, State::Dead, State::Cancelled];
static VERB: Verb = Verb { name: "replay", past: "replayed", states: ENDED, usual: ENDED };

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, replay: Replay) -> Ended {
    let mut beside = String::new();
    if replay.irreversible {
        beside.push_str(" --irreversible");
    }
    if replay.above > 0 {
        beside.push_str(&format!(" --above {}", replay.above));
    }
    let wanted = Wanted::read(desk, &VERB, replay.bulk, &beside)?;
    if replay.irreversible {
        wanted.one_only(desk, "operations are replayed one by one: --irreversible", "--irreversible")?;
    }
    let postbox = match &wanted.which {
        Which::Ids(ids) if replay.above > 0 => {
            let next = desk.command(&format!("replay {} --reason …", ids[0]));
            return Err(usage(&wanted.tried, "--above goes with a filter or --all", next));
        }
        _ => desk.open::<Db>().await?,
    };
    match &wanted.which {
        Which::Ids(ids) => singly(desk, &postbox, &wanted, ids, &beside, replay.irreversible).await,
        Which::Those(filter) => by_filter(desk, &postbox, &wanted, filter, replay.above).await,
    }
}

async fn singly<Db: Database>(
    desk: &Desk<'_>,
    postbox: &Postbox<Db>,
    wanted: &Wanted,
    ids: &[i64],
    beside: &str,
    irreversible: bool,
) -> Ended {
    if wanted.bulk.dry_run || irreversible {
        let rows = bulk::look(desk, postbox, wanted, ids, beside).await?;
        for row in rows.iter().filter(|row| row.kind == "operation" && ENDED.contains(&row.state)) {
            desk.output.prose(&format!(
                "delivery {} is an operation: its effect happens again, under a new idempotency key, so that the remote cannot tell it from a new one",
                row.id
            ));
        }
        if irreversible {
            for row in rows.iter().filter(|row| row.kind != "operation") {
                desk.output.prose(&format!("delivery {} is no operation: it needs no --irreversible", row.id));
            }
        }
        if wanted.bulk.dry_run {
            return Ok(0);
        }
    }
    let reason = wanted.reason(desk)?;
    if irreversible {
        wanted.confirmed(&reason)?;
    }
    let wish = admin::Replay { actor: desk.actor.clone(), reason, irreversible };
    let mut outcomes = Vec::with_capacity(ids.len());
    for id in ids {
        outcomes.push((*id, postbox.admin().replay(*id, &wish).await));
    }
    bulk::told(desk, VERB.name, outcomes, tell)
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

async fn by_filter<Db: Database>(
    desk: &Desk<'_>,
    postbox: &Postbox<Db>,
    wanted: &Wanted,
    filter: &Filter,
    above: i64,
) -> Ended {
    let failed = |e: postbox::Error| Failure::of(&e, &wanted.tried, desk.command("status"));
    let found = postbox.admin().replay_preview_above(filter, above).await.map_err(failed)?;
    let Some(reason) = wanted.agreed(desk, &preview(wanted, found)?)? else { return Ok(0) };
    let wish = admin::Replay { actor: desk.actor.clone(), reason, irreversible: false };
    let mut run = postbox.admin().replay_all(filter, &wish, above).await.map_err(failed)?;
    let (mut pace, mut interrupt) = (Pace::new(wanted.bulk.rate), Interrupt::listen(desk));
    let ended = loop {
        let before = run.so_far().replayed;
        let left = wanted.bulk.limit.map_or(u64::MAX, |limit| limit.saturating_sub(before));
        if left == 0 {
            break None;
        }
        if interrupt.came() {
            break Some(Cut::Interrupted);
        }
        match run.next_of(usize::try_from(left.min(pace.at_once())).unwrap_or(usize::MAX)).await {
            Ok(Some(so_far)) => interrupt.or_after(&mut pace, so_far.replayed - before).await,
            Ok(None) => break None,
            Err(error) => break Some(Cut::Failed(error)),
        }
    };
    let so_far = run.so_far();
    let go_on = || {
        let flags = flags(&wanted.bulk);
        let typed = &wanted.typed;
        let reason = quoted(&plain(&wish.reason));
        desk.action(&format!("replay {typed}{flags} --above {} --reason {reason} --yes", so_far.upto))
    };
    if desk.output.json {
        desk.output.object(&so_far)?;
    } else {
        let plus = desk.output.paint(Tone::Good, "+");
        desk.output.line(&format!("{plus} replayed {}, left out {}", so_far.replayed, so_far.left_out))?;
        if ended.is_none() && wanted.bulk.limit == Some(so_far.replayed) {
            desk.output.prose(&format!("the next ones: {}", go_on()));
        }
    }
    match ended {
        None => Ok(0),
        Some(cut) => Err(cut.failure(format!("{} to its end", wanted.tried), go_on())),
    }
}

/// The flags of a run that goes on at the same pace.
fn flags(bulk: &crate::flags::Bulk) -> String {
    let limit = bulk.limit.map_or_else(String::new, |limit| format!(" --limit {limit}"));
    let rate = bulk.rate.map_or_else(String::new, |rate| format!(" --rate {rate}"));
    limit + &rate
}

fn preview(wanted: &Wanted, found: ReplayPreview) -> std::io::Result<Preview> {
    let mut object = serde_json::to_value(&found).map_err(std::io::Error::other)?;
    let lines = found
        .by_subscription
        .iter()
        .map(|count| {
            let note = match (count.operation, count.removed) {
                (_, true) => "  left out: removed",
                (true, _) => "  left out: operations are replayed one by one, with --irreversible",
                _ => "",
            };
            (count.deliveries, format!("{} of {}{note}", plain(&count.subscription), plain(&count.application)))
        })
        .collect();
    let limit = wanted.bulk.limit.and_then(|l| i64::try_from(l).ok()).unwrap_or(i64::MAX);
    object["deliveries"] = found.deliveries.min(limit).into();
    object["matched"] = found.deliveries.into();
    let matched = many(found.deliveries, "new delivery", "new deliveries");
    let words = match limit < found.deliveries {
        true => format!("makes {} of {matched}, the oldest first, due now", limit),
        false => format!("makes {matched}, due now"),
    };
    Ok(Preview { deliveries: found.deliveries.min(limit), lines, sample: found.sample, words, object })
}
