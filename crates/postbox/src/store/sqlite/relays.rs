//! Which subscriptions are relays, and how much their sinks have confirmed.

use sqlx::{Row, SqliteConnection};

use super::SqliteStore;
use crate::error::Error;
use crate::store::SubscriptionId;
use crate::store::inbox::DeclaredRelay;
use crate::store::relays::Relayed;

pub(super) async fn declare(store: &SqliteStore, relays: &[DeclaredRelay]) -> Result<(), Error> {
    let mut work = store.write().await?;
    for relay in relays {
        sqlx::query(
            "insert into postbox_relay (subscription, kind, target) values (?1, ?2, ?3)
             on conflict (subscription) do update set kind = excluded.kind, target = excluded.target",
        )
        .bind(relay.subscription)
        .bind(relay.kind)
        .bind(&relay.target)
        .execute(work.on())
        .await?;
    }
    work.commit().await
}

pub(super) async fn count(
    store: &SqliteStore,
    subscription: SubscriptionId,
    (sent, retried): (i64, i64),
) -> Result<(), Error> {
    let mut work = store.write().await?;
    sqlx::query("update postbox_relay set sent = sent + ?2, retried = retried + ?3 where subscription = ?1")
        .bind(subscription)
        .bind(sent)
        .bind(retried)
        .execute(work.on())
        .await?;
    work.commit().await
}

pub(super) async fn all(db: &mut SqliteConnection) -> Result<Vec<Relayed>, Error> {
    let rows = sqlx::query(
        "select s.application, s.name, r.kind, r.target, r.sent, r.retried,
            (select count(*) from (select 1 from postbox_key_state k
                where k.subscription = s.id and k.state <> 'draining' limit 10001)) as blocked
         from postbox_relay r join postbox_subscription s on s.id = r.subscription
         where s.removed_at is null",
    )
    .fetch_all(db)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Relayed {
                application: row.try_get("application")?,
                name: row.try_get("name")?,
                kind: row.try_get("kind")?,
                target: row.try_get("target")?,
                sent: row.try_get("sent")?,
                retried: row.try_get("retried")?,
                blocked_keys: row.try_get("blocked")?,
            })
        })
        .collect()
}
