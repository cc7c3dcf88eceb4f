//! `postbox cancel ID... | FILTER...`: deliveries that wait or are dead are called off.

use postbox::Database;
use postbox::admin;
use postbox::lifecycle::State;

use crate::commands::Ended;
use crate::commands::bulk::{self, Verb, Wanted, Which};
use crate::desk::Desk;
use crate::flags::Cancel;

/// Dead letters are called off only if somebody names them: nothing becomes of them by itself.
static VERB: Verb =
    Verb { name: "cancel", past: "cancelled", states: &[State::Pending, State::Dead], usual: &[State::Pending] };

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, cancel: Cancel) -> Ended {
    let beside = cancel.rev.map_or_else(String::new, |rev| format!(" --rev {rev}"));
    let wanted = Wanted::read(desk, &VERB, cancel.bulk, &beside)?;
    if cancel.rev.is_some() {
        wanted.one_only(desk, "--rev", "--rev N")?;
    }
    match &wanted.which {
        Which::Those(filter) => {
            let postbox = desk.open::<Db>().await?;
            let act = |id, rev, reason| {
                let wish = admin::Cancel { rev: Some(rev), actor: desk.actor.clone(), reason };
                let admin = postbox.admin();
                async move { admin.cancel(id, &wish).await }
            };
            bulk::one_by_one(desk, &postbox, &wanted, filter, act).await
        }
        Which::Ids(ids) if wanted.bulk.dry_run => {
            let postbox = desk.open::<Db>().await?;
            bulk::look(desk, &postbox, &wanted, ids, &beside).await?;
            Ok(0)
        }
        Which::Ids(ids) => {
            let reason = wanted.reason(desk)?;
            let wish = admin::Cancel { rev: cancel.rev, actor: desk.actor.clone(), reason };
            let postbox = desk.open::<Db>().await?;
            let mut outcomes = Vec::with_capacity(ids.len());
            for id in ids {
                outcomes.push((*id, postbox.admin().cancel(*id, &wish).await));
            }
            bulk::told(desk, VERB.name, outcomes, bulk::tell)
        }
    }
}
