//! Pausing a subscription: its row says so, and every claim looks at that.

use super::admin::{Action, record};
use super::{SqliteStore, json_of};
use crate::admin::AuditEntry;
use crate::error::Error;
use crate::store::{Pause, SubscriptionId, no_subscription};

pub(super) async fn pause(
    store: &SqliteStore,
    application: &str,
    name: &str,
    pause: &Pause<'_>,
) -> Result<AuditEntry, Error> {
    let mut work = store.write().await?;
    let found: Option<SubscriptionId> = sqlx::query_scalar(
        "update postbox_subscription
         set paused_at = case when ?3 then coalesce(paused_at, (select now from postbox_clock)) end
         where application = ?1 and name = ?2 and removed_at is null returning id",
    )
    .bind(application)
    .bind(name)
    .bind(pause.pauses)
    .fetch_optional(work.on())
    .await?;
    let Some(id) = found else {
        work.rollback().await?;
        return Err(no_subscription(application, name));
    };
    let action = Action {
        actor: pause.actor,
        action: pause.action(),
        reason: pause.reason,
        delivery: None,
        subscription: Some(id),
        rev: None,
        state: None,
        detail: Some(serde_json::json!({ "application": application, "name": name })),
    };
    let entry = record(&mut work, action).await?;
    work.commit().await?;
    // Whoever sleeps looks at what has piled up.
    store.shared.bell.ring();
    Ok(entry)
}

pub(super) async fn paused(
    store: &SqliteStore,
    subscriptions: &[SubscriptionId],
) -> Result<Vec<SubscriptionId>, Error> {
    let paused = "select id from postbox_subscription
         where paused_at is not null and id in (select value from json_each(?1))";
    Ok(sqlx::query_scalar(paused).bind(json_of(subscriptions)?).fetch_all(&store.reader).await?)
}
