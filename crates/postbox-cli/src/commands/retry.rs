//! `postbox retry ID... | FILTER...`: the same deliveries again, now.

use postbox::admin;
use postbox::lifecycle::State;
use postbox::{Database, Postbox};

use crate::commands::Ended;
use crate::commands::bulk::{self, Verb, Wanted, Which};
use crate::desk::Desk;
use crate::flags::Retry;

/// What was called off is tried again only if somebody names it, and what waits is tried anyway.
static VERB: Verb = Verb {
    name: "retry",
    past: "retried",
    states: &[State::Dead, State::Cancelled, State::Pending],
    usual: &[State::Dead],
};

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, retry: Retry) -> Ended {
    let beside = retry.rev.map_or_else(String::new, |rev| format!(" --rev {rev}"));
    let wanted = Wanted::read(desk, &VERB, retry.bulk, &beside)?;
    if retry.rev.is_some() {
        wanted.one_only(desk, "--rev", "--rev N")?;
    }
    match &wanted.which {
        Which::Those(filter) => {
            let postbox = desk.open::<Db>().await?;
            let act = |id, rev, reason| {
                let wish = admin::Retry { rev: Some(rev), actor: desk.actor.clone(), reason };
                let admin = postbox.admin();
                async move { admin.retry(id, &wish).await }
            };
            bulk::one_by_one(desk, &postbox, &wanted, filter, act).await
        }
        Which::Ids(ids) if wanted.bulk.dry_run => {
            let postbox: Postbox<Db> = desk.open().await?;
            bulk::look(desk, &postbox, &wanted, ids, &beside).await?;
            Ok(0)
        }
        Which::Ids(ids) => {
            let reason = wanted.reason(desk)?;
            let wish = admin::Retry { rev: retry.rev, actor: desk.actor.clone(), reason };
            let postbox = desk.open::<Db>().await?;
            let mut outcomes = Vec::with_capacity(ids.len());
            for id in ids {
                outcomes.push((*id, postbox.admin().retry(*id, &wish).await));
            }
            bulk::told(desk, VERB.name, outcomes, bulk::tell)
        }
    }
}
