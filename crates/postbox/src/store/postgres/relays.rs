//! Which subscriptions are relays, and how much their sinks have confirmed.

use sqlx::Row;

use super::{PgStore, Work};
use crate::error::Error;
use crate::store::SubscriptionId;
use crate::store::inbox::DeclaredRelay;
use crate::store::relays::Relayed;

pub(super) async fn declare(store: &PgStore, relays: &[DeclaredRelay]) -> Result<(), Error> {
    let mut work = store.work().await?;
    for relay in relays {
        let sql = format!(
            "insert into {}.relay as r (subscription, kind, target) values ($1, $2, $3)
             on conflict (subscription) do update set kind = excluded.kind, target = excluded.target
             where (r.kind, r.target) is distinct from (excluded.kind, excluded.target)",
            store.schema
        );
        store.dynamic(sql).bind(relay.subscription).bind(relay.kind).bind(&relay.target).execute(work.on()).await?;
    }
    work.commit().await?;
    Ok(())
}

pub(super) async fn count(
    store: &PgStore,
    subscription: SubscriptionId,
    slot: i16,
    (sent, retried): (i64, i64),
) -> Result<(), Error> {
    let mut work = store.work().await?;
    let sql = format!(
        "insert into {}.relay_tally as t (subscription, slot, sent, retried) values ($1, $2, $3, $4)
         on conflict (subscription, slot) do update
             set sent = t.sent + excluded.sent, retried = t.retried + excluded.retried",
        store.schema
    );
    store.dynamic(sql).bind(subscription).bind(slot).bind(sent).bind(retried).execute(work.on()).await?;
    work.commit().await?;
    Ok(())
}

pub(super) async fn all(store: &PgStore, work: &mut Work) -> Result<Vec<Relayed>, Error> {
    let sql = format!(
        "select s.application, s.name, r.kind, r.target, coalesce(t.sent, 0)::bigint as sent, coalesce(t.retried, 0)::bigint as retried,
            (select pg_catalog.count(*) from (select from {0}.key_state k
                where k.subscription = s.id and k.state <> 'draining' limit 10001) k) as blocked
         from {0}.relay r join {0}.subscription s on s.id = r.subscription
         left join (
            select subscription, pg_catalog.sum(sent) as sent, pg_catalog.sum(retried) as retried
            from {0}.relay_tally group by subscription
         ) t on t.subscription = s.id
         where s.removed_at is null",
        store.schema
    );
    let rows = store.dynamic(sql).fetch_all(work.on()).await?;
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
