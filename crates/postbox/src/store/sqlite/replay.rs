//! Replay: new deliveries of messages whose deliveries have ended.

use serde_json::json;

use super::admin::{Action, lost_race, record};
use super::operate::stands;
use super::show::{LOOK, WIDER, filtered};
use super::work::Work;
use super::{SqliteStore, json_of, unique};
use crate::admin::{AuditEntry, COUNTED, Filter, Replay, ReplayCount, Replayed, no_delivery};
use crate::error::Error;
use crate::lifecycle::Kind;
use crate::operation::idempotency_key;
use crate::store::{DeliveryId, Ended};

pub(super) async fn one(store: &SqliteStore, delivery: DeliveryId, replay: &Replay) -> Result<Replayed, Error> {
    let mut work = store.write().await?;
    let Some((found, state)) = stands(&mut work, delivery).await? else {
        work.rollback().await?;
        return Err(no_delivery(delivery));
    };
    let row = super::show::one(work.on(), delivery).await?.ok_or_else(|| no_delivery(delivery))?;
    let (removed, kept): (bool, bool) = sqlx::query_as(
        "select s.removed_at is not null, exists (select 1 from postbox_message m where m.id = ?2)
         from postbox_subscription s where s.id = ?1",
    )
    .bind(found.subscription)
    .bind(found.message)
    .fetch_one(work.on())
    .await?;
    let operation = row.kind == Kind::Operation.as_str();
    if let Some(error) = replay.refusal(&row, operation, removed, kept) {
        let who = (replay.actor.as_str(), "replay refused", replay.reason.as_str());
        return Err(lost_race(store, work, who, delivery, error).await);
    }
    let ended = Ended { delivery, message: found.message, subscription: found.subscription, state };
    let own = (delivery, ended.subscription, ended.message);
    if let Some(error) = unique::again(work.on(), own).await? {
        let who = (replay.actor.as_str(), "replay refused", replay.reason.as_str());
        return Err(lost_race(store, work, who, delivery, error).await);
    }
    let (fresh, audit) = make(&mut work, &ended, replay, replay.action(operation)).await?;
    work.commit().await?;
    store.shared.bell.ring();
    Ok(Replayed {
        delivery: fresh,
        replay_of: delivery,
        idempotency_key: operation.then(|| idempotency_key(found.message, fresh)),
        audit,
    })
}

/// A new delivery, due now, and its entry in the audit.
async fn make(
    work: &mut Work,
    ended: &Ended,
    replay: &Replay,
    action: &str,
) -> Result<(DeliveryId, AuditEntry), Error> {
    let fresh: DeliveryId = sqlx::query_scalar(
        "insert into postbox_delivery (id, message, subscription, state, priority, pos, since, replay_of)
         select l.delivery + 1, ?1, ?2, 'pending', coalesce((select m.priority from postbox_message m where m.id = ?1), 0),
             l.delivery + 1, c.now, ?3
         from postbox_last l cross join postbox_clock c
         returning id",
    )
    .bind(ended.message)
    .bind(ended.subscription)
    .bind(ended.delivery)
    .fetch_one(work.on())
    .await?;
    let action = Action {
        actor: &replay.actor,
        action,
        reason: &replay.reason,
        delivery: Some(ended.delivery),
        subscription: Some(ended.subscription),
        rev: None,
        state: Some((ended.state, ended.state)),
        detail: Some(json!({ "replayed_as": fresh })),
    };
    Ok((fresh, record(work, action).await?))
}

pub(super) async fn counts(store: &SqliteStore, filter: &Filter, above: DeliveryId) -> Result<Vec<ReplayCount>, Error> {
    let sql = "select s.application, s.name, s.kind, s.removed_at is not null as removed, count(*) as deliveries
        from (
            select d.subscription from postbox_every d
            cross join postbox_subscription s on s.id = d.subscription
            cross join postbox_message m on m.id = d.message
            where d.state in ('succeeded', 'dead', 'cancelled') and (?6 is null or d.id = ?6) and d.id > ?10
                and d.highest > ?10 {filter}
            limit ?1
        ) w join postbox_subscription s on s.id = w.subscription
        group by s.id order by s.application, s.name, s.id";
    let rows = filtered(sql.to_owned(), filter, None, COUNTED)?.bind(above).fetch_all(&store.reader).await?;
    let counts = rows.iter().map(|row| {
        use sqlx::Row;
        Ok(ReplayCount::new((
            row.try_get("application")?,
            row.try_get("name")?,
            row.try_get("kind")?,
            row.try_get("removed")?,
            row.try_get("deliveries")?,
        )))
    });
    counts.collect()
}

pub(super) async fn replayable(
    store: &SqliteStore,
    filter: &Filter,
    (above, upto): (DeliveryId, DeliveryId),
    limit: u32,
) -> Result<Vec<Ended>, Error> {
    let sql = "select d.id, d.message, d.subscription, d.state from postbox_every d
        cross join postbox_subscription s on s.id = d.subscription
        cross join postbox_message m on m.id = d.message
        where d.id > ?10 and d.highest > ?10 and d.id <= ?11 and d.lowest <= ?11
            and d.state in ('succeeded', 'dead', 'cancelled') {filter}
        order by d.id limit ?1";
    // The lowest first: nothing above is unpacked when there are enough of them.
    let mut width = i64::from(limit).saturating_mul(LOOK);
    let rows = loop {
        let end = above.saturating_add(width).min(upto);
        let rows =
            filtered(sql.to_owned(), filter, None, limit)?.bind(above).bind(end).fetch_all(&store.reader).await?;
        if end == upto || rows.len() >= limit as usize {
            break rows;
        }
        width = width.saturating_mul(WIDER);
    };
    let ended = rows.iter().map(|row| {
        use sqlx::Row;
        Ok(Ended {
            delivery: row.try_get("id")?,
            message: row.try_get("message")?,
            subscription: row.try_get("subscription")?,
            state: row.try_get::<String, _>("state")?.parse().map_err(Error::Refused)?,
        })
    });
    ended.collect()
}

pub(super) async fn newest(store: &SqliteStore) -> Result<DeliveryId, Error> {
    Ok(sqlx::query_scalar("select delivery from postbox_last").fetch_one(&store.reader).await?)
}

pub(super) async fn page(store: &SqliteStore, ended: &[Ended], replay: &Replay) -> Result<u64, Error> {
    let mut work = store.write().await?;
    // Operations are replayed one by one, with a word on each; a removed subscription has nobody behind it.
    // Only what is as it was seen: what was changed since is not replayed by an old look.
    let wanted: Vec<DeliveryId> = sqlx::query_scalar(
        "select d.id from postbox_every d
         join postbox_subscription s on s.id = d.subscription and s.removed_at is null and s.kind <> 'operation'
         where (d.id, d.state) in (select value ->> 0, value ->> 1 from json_each(?1))
             and d.id >= ?2 and d.highest >= ?2 and d.id <= ?3 and d.lowest <= ?3
             and d.state in ('succeeded', 'dead', 'cancelled')
             and exists (select 1 from postbox_message m where m.id = d.message)",
    )
    .bind(json_of(&ended.iter().map(|e| (e.delivery, e.state.as_str())).collect::<Vec<_>>())?)
    .bind(ended.iter().map(|e| e.delivery).min())
    .bind(ended.iter().map(|e| e.delivery).max())
    .fetch_all(work.on())
    .await?;
    let wanted: std::collections::HashSet<DeliveryId> = wanted.into_iter().collect();
    let mut made = 0;
    for ended in ended.iter().filter(|e| wanted.contains(&e.delivery)) {
        // Of a key that is in flight, that one stands for it.
        if let Some(holder) = unique::holder(work.on(), ended.subscription, ended.message, ended.delivery).await? {
            unique::coalesce(work.on(), (holder, ended.subscription, ended.message)).await?;
            continue;
        }
        make(&mut work, ended, replay, replay.action(false)).await?;
        made += 1;
    }
    work.commit().await?;
    store.shared.bell.ring();
    Ok(made)
}
