//! `postbox maintain`.

use postbox::{Database, Error, Router};

use crate::commands::Ended;
use crate::desk::Desk;
use crate::failure::Failure;

/// A worker without handlers, until SIGINT or SIGTERM.
pub(super) async fn run<Db: Database>(desk: &Desk<'_>) -> Ended {
    let postbox = desk.open::<Db>().await?;
    let failed = |e: Error| {
        let next = if matches!(e, Error::Settings(_)) { "config show --origin" } else { "status" };
        Failure::of(&e, "keep house", desk.command(next))
    };
    desk.output.prose("keeping house until Ctrl-C: takeover, history of new subscriptions, schedules, tidying");
    postbox.worker(Router::new()).run().await.map_err(failed)?;
    postbox.close().await;
    Ok(0)
}
