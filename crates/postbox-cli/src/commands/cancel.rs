//! `postbox cancel ID...`: deliveries that wait or are dead are called off.

use postbox::Database;
use postbox::admin;

use crate::commands::{Ended, retry};
use crate::desk::{Desk, usage};
use crate::flags::Cancel;

pub(super) async fn run<Db: Database>(desk: &Desk<'_>, cancel: Cancel) -> Ended {
    let ids = cancel.ids.iter().map(i64::to_string).collect::<Vec<_>>().join(" ");
    let tried = format!("cancel {ids}");
    if cancel.rev.is_some() && cancel.ids.len() > 1 {
        let why = "--rev is one delivery's; give one ID";
        return Err(usage(&tried, why, desk.command(&format!("cancel {} --rev N --reason …", cancel.ids[0]))));
    }
    let reason = desk.reason(cancel.reason, &tried, &desk.command(&tried))?;
    let wish = admin::Cancel { rev: cancel.rev, actor: desk.actor.clone(), reason };
    let postbox = desk.open::<Db>().await?;
    let mut outcomes = Vec::with_capacity(cancel.ids.len());
    for id in &cancel.ids {
        outcomes.push((*id, postbox.admin().cancel(*id, &wish).await));
    }
    retry::told(desk, "cancel", outcomes, retry::tell)
}
