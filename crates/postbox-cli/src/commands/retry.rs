//! `postbox retry ID...`: the same deliveries again, now.

use postbox::Database;
use postbox::admin;

use crate::commands::Ended;
use crate::desk::{Desk, usage};
use crate::failure::{FAILED, Failure};
use crate::flags::Retry;
use crate::output::{Tone, state_word};
use crate::text::plain;

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, retry: Retry) -> Ended {
    let ids = retry.ids.iter().map(i64::to_string).collect::<Vec<_>>().join(" ");
    let tried = format!("retry {ids}");
    if retry.rev.is_some() && retry.ids.len() > 1 {
        let why = "--rev is one delivery's; give one ID";
        return Err(usage(&tried, why, desk.command(&format!("retry {} --rev N --reason …", retry.ids[0]))));
    }
    let reason = desk.reason(retry.reason, &tried, &desk.command(&tried))?;
    let wish = admin::Retry { rev: retry.rev, actor: desk.actor.clone(), reason };
    let postbox = desk.open::<Db>().await?;
    let mut outcomes = Vec::with_capacity(retry.ids.len());
    for id in &retry.ids {
        outcomes.push((*id, postbox.admin().retry(*id, &wish).await));
    }
    told(desk, "retry", outcomes, tell)
}

/// Tells what became of each, and ends with the code that says it for all.
pub(super) fn told<T>(
    desk: &Desk<'_>,
    verb: &str,
    outcomes: Vec<(i64, Result<T, postbox::Error>)>,
    tell: impl Fn(&Desk<'_>, &T) -> std::io::Result<()>,
) -> Ended {
    let (mut done, mut codes) = (0, std::collections::BTreeSet::new());
    for (id, outcome) in outcomes {
        match outcome {
            Ok(outcome) => {
                done += 1;
                tell(desk, &outcome)?;
            }
            Err(error) => {
                let failure = Failure::of(&error, format!("{verb} delivery {id}"), desk.look_at(id, &error));
                codes.insert(failure.code);
                failure.tell(desk.output);
            }
        }
    }
    Ok(match (done, codes.len(), codes.first()) {
        (_, 0, _) => 0,
        // All failed in the same way: the code says how.
        (0, 1, Some(code)) => *code,
        _ => FAILED,
    })
}

pub(super) fn tell(desk: &Desk<'_>, entry: &admin::AuditEntry) -> std::io::Result<()> {
    if desk.output.json {
        return desk.output.object(entry);
    }
    let word = |word: &Option<String>| word.as_deref().map_or_else(|| "?".into(), state_word);
    desk.output.line(&format!(
        "{} delivery {}: {} -> {}, by {}, audit {}",
        desk.output.paint(Tone::Good, "+"),
        entry.delivery.unwrap_or_default(),
        word(&entry.state_before),
        word(&entry.state_after),
        plain(&entry.actor),
        entry.seq
    ))
}
