//! Pausing a subscription: its row says so, and every claim looks at that.

use sqlx::Row;

use super::admin::{Action, record};
use super::{PgStore, Work};
use crate::admin::AuditEntry;
use crate::error::Error;
use crate::store::{Pause, SubscriptionId, no_subscription};

pub(super) async fn pause(
    store: &PgStore,
    application: &str,
    name: &str,
    pause: &Pause<'_>,
) -> Result<AuditEntry, Error> {
    let mut work = store.durable().await?;
    let sql = format!(
        "update {}.subscription
         set paused_at = case when $3 then coalesce(paused_at, pg_catalog.clock_timestamp()) end
         where application = $1 and name = $2 and removed_at is null returning id",
        store.schema
    );
    let query = store.dynamic(sql).bind(application).bind(name).bind(pause.pauses);
    let Some(row) = query.fetch_optional(work.on()).await? else {
        work.rollback().await?;
        return Err(no_subscription(application, name));
    };
    let action = Action {
        actor: pause.actor,
        action: pause.action(),
        reason: pause.reason,
        delivery: None,
        subscription: Some(row.try_get("id")?),
        rev: None,
        state: None,
        detail: Some(serde_json::json!({ "application": application, "name": name })),
    };
    let entry = record(store, &mut work, action).await?;
    if !pause.pauses {
        // Whoever sleeps looks at what has piled up.
        let sql = format!("select pg_catalog.pg_notify(r.channel, '') from {}.routing r", store.schema);
        store.dynamic(sql).execute(work.on()).await?;
    }
    work.commit().await?;
    Ok(entry)
}

pub(super) async fn paused(store: &PgStore, subscriptions: &[SubscriptionId]) -> Result<Vec<SubscriptionId>, Error> {
    let single = store.alone();
    let mut work = match single {
        true => Work::single(&store.pool).await?,
        false => store.work().await?,
    };
    let rows = store.query(store.sql.paused).bind(subscriptions.to_vec()).fetch_all(work.on()).await?;
    match single {
        true => work.over(),
        false => work.rollback().await?,
    }
    Ok(rows.iter().map(|row| row.try_get("id")).collect::<Result<_, _>>()?)
}
