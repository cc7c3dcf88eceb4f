//! Replay: new deliveries of messages whose deliveries have ended.

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::admin::{GIVEN, Page, filtered, find, lost_race, places};
use super::{PgStore, Work, retain, timestamp, unique};
use crate::admin::{AuditEntry, COUNTED, Filter, Replay, ReplayCount, Replayed, no_delivery};
use crate::error::Error;
use crate::lifecycle::{Kind, State};
use crate::operation::idempotency_key;
use crate::store::{DeliveryId, Ended};

/// Where the replay of one delivery stands in the way of a rule.
pub(super) async fn one(store: &PgStore, delivery: DeliveryId, replay: &Replay) -> Result<Replayed, Error> {
    let mut work = store.durable().await?;
    retain::hold_messages(store, &mut work).await?;
    let Some((row, _)) = find(store, &mut work, delivery).await? else {
        work.rollback().await?;
        return Err(no_delivery(delivery));
    };
    let sql = format!(
        "select s.id, s.removed_at is not null as removed, exists (select from {0}.message m where m.id = $4) as kept
         from {0}.subscription s
         where s.id = coalesce(
            (select o.subscription from {0}.outcome o where o.delivery = $1 limit 1),
            (select o.subscription from {0}.resolution o where o.delivery = $1 limit 1),
            (select d.subscription from {0}.dead_letter d where d.delivery = $1),
            (select u.subscription from {0}.outcome_part p
                cross join lateral unnest(p.deliveries, p.subscriptions) as u(delivery, subscription)
                where p.highest is not null and pg_catalog.int8range(p.lowest, p.highest, '[]') @> $1
                    and u.delivery = $1 limit 1),
            (select k.id from {0}.subscription k where k.application = $2 and k.name = $3 order by k.id desc limit 1))",
        store.schema
    );
    let found = store
        .dynamic(sql)
        .bind(delivery)
        .bind(&row.application)
        .bind(&row.subscription)
        .bind(row.message)
        .fetch_one(work.on())
        .await?;
    let operation = row.kind == Kind::Operation.as_str();
    let mut refused = replay.refusal(&row, operation, found.try_get("removed")?, found.try_get("kept")?);
    let ended = Ended { delivery, message: row.message, subscription: found.try_get("id")?, state: row.state };
    if refused.is_none() && lasting(store, &mut work, std::slice::from_ref(&ended)).await?.is_empty() {
        refused = Some(Error::Conflict(format!(
            "delivery {delivery} was changed meanwhile; look again with `postbox show {delivery}`"
        )));
    }
    if let Some(error) = refused {
        return Err(lost_race(store, work, &replay.actor, "replay refused", &replay.reason, delivery, error).await);
    }
    if let Some(error) = unique::again(store, &mut work, (delivery, ended.subscription, ended.message)).await? {
        return Err(lost_race(store, work, &replay.actor, "replay refused", &replay.reason, delivery, error).await);
    }
    let rows = make(store, &mut work, &[ended], replay, replay.action(operation)).await?;
    work.commit().await?;
    let made = rows.first().ok_or_else(|| no_delivery(delivery))?;
    let fresh: DeliveryId = made.try_get("fresh")?;
    Ok(Replayed {
        delivery: fresh,
        replay_of: delivery,
        idempotency_key: operation.then(|| idempotency_key(row.message, fresh)),
        audit: AuditEntry {
            seq: made.try_get("seq")?,
            at: timestamp(made.try_get("at_us")?),
            actor: replay.actor.clone(),
            login: made.try_get("login")?,
            action: replay.action(operation).to_owned(),
            delivery: Some(delivery),
            subscription: made.try_get("name")?,
            state_before: Some(row.state.as_str().to_owned()),
            state_after: Some(row.state.as_str().to_owned()),
            rev_after: None,
            reason: Some(replay.reason.clone()),
            detail: Some(serde_json::json!({ "replayed_as": fresh })),
        },
    })
}

/// Those that are still as they were seen, and stay so until the transaction ends: a success is for
/// ever, a dead letter is held.
async fn lasting(store: &PgStore, work: &mut Work, ended: &[Ended]) -> Result<Vec<Ended>, Error> {
    let held: Vec<DeliveryId> = ended.iter().filter(|e| e.state != State::Succeeded).map(|e| e.delivery).collect();
    let sql = format!(
        "select delivery, state from {}.dead_letter where delivery = any ($1) order by delivery for share",
        store.schema
    );
    let rows = match held.is_empty() {
        true => Vec::new(),
        false => store.dynamic(sql).bind(held).fetch_all(work.on()).await?,
    };
    let held: Vec<(DeliveryId, String)> =
        rows.iter().map(|r| Ok((r.try_get("delivery")?, r.try_get("state")?))).collect::<Result<_, Error>>()?;
    let as_seen = |e: &Ended| held.iter().any(|(id, state)| *id == e.delivery && state == e.state.as_str());
    let stays = |e: &&Ended| e.state == State::Succeeded || as_seen(e);
    Ok(ended.iter().filter(stays).cloned().collect())
}

async fn make(
    store: &PgStore,
    work: &mut Work,
    ended: &[Ended],
    replay: &Replay,
    action: &str,
) -> Result<Vec<PgRow>, Error> {
    let rows = store
        .query(store.sql.replay)
        .bind(ended.iter().map(|e| e.delivery).collect::<Vec<_>>())
        .bind(ended.iter().map(|e| e.message).collect::<Vec<_>>())
        .bind(ended.iter().map(|e| e.subscription).collect::<Vec<_>>())
        .bind(ended.iter().map(|e| e.state.as_str()).collect::<Vec<_>>())
        .bind(&replay.actor)
        .bind(action)
        .bind(&replay.reason)
        .fetch_all(work.on())
        .await?;
    Ok(rows)
}

pub(super) async fn counts(store: &PgStore, filter: &Filter, above: DeliveryId) -> Result<Vec<ReplayCount>, Error> {
    let sql = format!(
        "{GIVEN}
         select s.application, s.name, s.kind, s.removed_at is not null as removed, pg_catalog.count(*) as deliveries
         from (select p.* from ({}) p limit $1) d
         join {1}.subscription s on s.id = d.subscription
         where exists (select from {1}.message m where m.id = d.message)
         group by s.id order by s.application, s.name, s.id",
        places(store, filter, if above > 0 { Page::Between } else { Page::Newest }),
        store.schema
    );
    let mut work = store.read().await?;
    let mut query = filtered(store.dynamic(sql), filter, COUNTED);
    if above > 0 {
        query = query.bind(above).bind(DeliveryId::MAX);
    }
    let rows = query.fetch_all(work.on()).await?;
    work.rollback().await?;
    let count = |row: &PgRow| {
        Ok(ReplayCount::new((
            row.try_get("application")?,
            row.try_get("name")?,
            row.try_get("kind")?,
            row.try_get("removed")?,
            row.try_get("deliveries")?,
        )))
    };
    rows.iter().map(count).collect()
}

pub(super) async fn replayable(
    store: &PgStore,
    filter: &Filter,
    (above, upto): (DeliveryId, DeliveryId),
    limit: u32,
) -> Result<Vec<Ended>, Error> {
    let sql = format!(
        "{GIVEN}
         select d.delivery, d.message, d.subscription, d.state
         from (select p.* from ({}) p order by p.delivery limit $1) d
         order by d.delivery",
        places(store, filter, Page::Between),
    );
    let mut work = store.read().await?;
    let rows = filtered(store.dynamic(sql), filter, limit).bind(above).bind(upto).fetch_all(work.on()).await?;
    work.rollback().await?;
    let ended = |row: &PgRow| {
        Ok(Ended {
            delivery: row.try_get("delivery")?,
            message: row.try_get("message")?,
            subscription: row.try_get("subscription")?,
            state: row.try_get::<String, _>("state")?.parse().map_err(Error::Refused)?,
        })
    };
    rows.iter().map(ended).collect()
}

pub(super) async fn newest(store: &PgStore) -> Result<DeliveryId, Error> {
    let mut work = store.read().await?;
    // Reading the sequence itself takes a right that an operator has no other use for.
    let sql = "select coalesce(pg_catalog.pg_sequence_last_value(pg_catalog.to_regclass($1)), 0::bigint) as newest";
    let sequence = format!("{}.delivery_id", store.schema);
    let newest = store.query(sql).bind(sequence).fetch_one(work.on()).await?.try_get("newest")?;
    work.rollback().await?;
    Ok(newest)
}

pub(super) async fn page(store: &PgStore, ended: &[Ended], replay: &Replay) -> Result<u64, Error> {
    let mut work = store.durable().await?;
    retain::hold_messages(store, &mut work).await?;
    let lasting = lasting(store, &mut work, ended).await?;
    // Operations are replayed one by one, with a word on each; a removed subscription has nobody behind it.
    let sql = format!(
        "select e.ord from unnest($1::pg_catalog.uuid[], $2::int[]) with ordinality as e(message, subscription, ord)
         join {0}.subscription s on s.id = e.subscription and s.removed_at is null and s.kind <> 'operation'
         where exists (select from {0}.message m where m.id = e.message)
         order by e.ord",
        store.schema
    );
    let rows = store
        .dynamic(sql)
        .bind(lasting.iter().map(|e| e.message).collect::<Vec<_>>())
        .bind(lasting.iter().map(|e| e.subscription).collect::<Vec<_>>())
        .fetch_all(work.on())
        .await?;
    let mut wanted = Vec::with_capacity(rows.len());
    for row in &rows {
        let ord = usize::try_from(row.try_get::<i64, _>("ord")? - 1).unwrap_or(usize::MAX);
        wanted.extend(lasting.get(ord).cloned());
    }
    if wanted.is_empty() {
        work.rollback().await?;
        return Ok(0);
    }
    let made = make(store, &mut work, &wanted, replay, replay.action(false)).await?;
    work.commit().await?;
    Ok(made.len() as u64)
}
