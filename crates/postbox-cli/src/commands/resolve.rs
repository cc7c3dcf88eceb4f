//! `postbox resolve ID --happened|--did-not-happen|--abandon`: a person's word on a doubt.

use postbox::Database;
use postbox::admin::{AuditEntry, DeliveryRow, Resolution};
use postbox::lifecycle::{Answer, Event, Kind, Policy, Standing, State, transition};

use crate::commands::Ended;
use crate::confirm::confirm;
use crate::desk::Desk;
use crate::failure::Failure;
use crate::flags::Resolve;
use crate::output::{Tone, state_sign, state_word};
use crate::text::{plain, quoted};

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, resolve: Resolve) -> Ended {
    let id = resolve.id;
    let tried = format!("resolve delivery {id}");
    let mut typed = desk.action(&format!("resolve {id} {}", resolve.answer.flag()));
    if let Some(rev) = resolve.rev {
        typed.push_str(&format!(" --rev {rev}"));
    }
    if let Some(evidence) = &resolve.evidence {
        typed.push_str(&format!(" --evidence {}", quoted(&plain(evidence))));
    }
    let yes = if resolve.yes { " --yes" } else { "" };
    let reason = desk.reason(resolve.reason, &tried, &format!("{typed}{yes}"), "how you know")?;
    let answer = resolve.answer.answer();
    let postbox = desk.open::<Db>().await?;
    let failed = |e| Failure::of(&e, &tried, desk.look_at(id, &e));
    let detail = postbox.admin().show(id).await.map_err(failed)?;
    // What was shown is what is resolved: if it moves on meanwhile, nothing is done.
    let rev = resolve.rev.unwrap_or(detail.row.rev);
    if detail.row.state == State::InDoubt && rev == detail.row.rev {
        desk.output.prose(&preview(desk, &detail.row, answer));
        confirm(resolve.yes, &tried, &format!("{typed} --reason {}", quoted(&plain(&reason))))?;
    }
    let word = Resolution { rev: Some(rev), answer, evidence: resolve.evidence, actor: desk.actor.clone(), reason };
    let entry = postbox.admin().resolve(id, &word).await.map_err(failed)?;
    if desk.output.json {
        desk.output.object(&entry)?;
    } else {
        tell(desk, id, &entry)?;
    }
    Ok(0)
}

/// Where it stands, where it goes, and what that means.
fn preview(desk: &Desk<'_>, row: &DeliveryRow, answer: Answer) -> String {
    let sign = |state| {
        let (sign, tone) = state_sign(state);
        desk.output.paint(tone, sign)
    };
    let policy = Policy {
        kind: Kind::Operation,
        retry: postbox::RetryPolicy { max_attempts: row.max_attempts, ..Default::default() },
        idempotent: false,
    };
    let standing = Standing { state: row.state, attempts: row.attempt, begun: false, lost: 0 };
    let after =
        transition(standing, Event::Resolved(answer), &policy, 0.0).map_or(row.state, |next| next.standing.state);
    let means = match (answer, after) {
        (Answer::Happened, _) => "sends nothing; releases what follows from it",
        (Answer::DidNotHappen, State::Dead) => "sends nothing: its attempts are used up",
        (Answer::DidNotHappen, _) => "a worker calls the remote again",
        (Answer::Abandoned, _) => "sends nothing; on record as an outcome never known",
    };
    let from = format!("{} -> {}", plain(&row.topic), plain(&row.subscription));
    format!("{from}\n{} (v{}) -> {}    {means}", sign(row.state), row.rev, sign(after))
}

fn tell(desk: &Desk<'_>, id: i64, entry: &AuditEntry) -> std::io::Result<()> {
    let output = desk.output;
    let after = entry.state_after.as_deref();
    output.line(&format!(
        "{} resolved by {}, audit {}: {}",
        output.paint(Tone::Good, "+"),
        plain(&entry.actor),
        entry.seq,
        after.map_or_else(|| "on record".into(), state_word)
    ))?;
    if after == Some(State::InDoubt.as_str()) {
        output.prose("a worker carries it out, together with what follows from it");
    }
    output.prose(&format!("next: {}", desk.command(&format!("show {id}"))));
    Ok(())
}
