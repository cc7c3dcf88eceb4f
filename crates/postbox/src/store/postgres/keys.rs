//! Keys in order: one whose delivery has not succeeded holds back the others of its key, until it has, or until
//! somebody decides.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use super::admin::{Action, record};
use super::{PgStore, Work, lanes, timestamp};
use crate::admin::{AuditEntry, KeyFilter, KeyRow, KeyWish, key_moved_on, not_in_order};
use crate::error::Error;
use crate::store::lanes::Followed;
use crate::store::{DeliveryId, KeyTurn, Move, SubscriptionId, no_subscription};

/// After these moves, in their transaction: what comes before all others of its key now, and which keys go on.
pub(super) async fn follow<'m>(
    store: &PgStore,
    connection: &mut PgConnection,
    moves: impl Iterator<Item = &'m Move>,
) -> Result<(), Error> {
    let followed = Followed::of(moves);
    if followed.is_nothing() {
        return Ok(());
    }
    lanes::hold(store, connection, &followed.lanes()).await?;
    let Followed { leading, over } = &followed;
    if !leading.is_empty() {
        store
            .query(store.sql.keys_block)
            .bind(leading.iter().map(|m| m.subscription).collect::<Vec<_>>())
            .bind(leading.iter().map(|m| m.delivery).collect::<Vec<_>>())
            .bind(leading.iter().map(|m| m.message).collect::<Vec<_>>())
            .bind(leading.iter().map(|m| m.standing.state.as_str()).collect::<Vec<_>>())
            .bind(leading.iter().map(|m| m.note.as_str()).collect::<Vec<_>>())
            .execute(&mut *connection)
            .await?;
    }
    let dead = followed.dead();
    let over: Vec<i64> = over.iter().map(|m| m.delivery).collect();
    if !(over.is_empty() && dead.is_empty()) {
        store
            .query(store.sql.keys_free)
            .bind(over)
            .bind(dead)
            .bind(None::<i32>)
            .bind(None::<&str>)
            .execute(connection)
            .await?;
    }
    Ok(())
}

pub(super) async fn list(store: &PgStore, filter: &KeyFilter, limit: u32) -> Result<Vec<KeyRow>, Error> {
    let mut work = store.read().await?;
    let rows = store
        .query(store.sql.keys_list)
        .bind(&filter.application)
        .bind(&filter.subscription)
        .bind(&filter.key)
        .bind(i64::from(limit))
        .fetch_all(work.on())
        .await?;
    work.rollback().await?;
    let read = |row: PgRow| {
        Ok(KeyRow {
            application: row.try_get("application")?,
            subscription: row.try_get("subscription")?,
            key: row.try_get("key")?,
            state: row.try_get("state")?,
            head: row.try_get("head")?,
            since: timestamp(row.try_get("since_us")?),
            cause: row.try_get("cause")?,
            waiting: row.try_get("waiting")?,
        })
    };
    rows.into_iter().map(read).collect()
}

pub(super) async fn turn(
    store: &PgStore,
    wish: &KeyWish,
    turn: KeyTurn,
    head: Option<DeliveryId>,
) -> Result<AuditEntry, Error> {
    let mut work = store.durable().await?;
    let sql = format!(
        "select s.id, s.ordered, {0}.lane_of($3, 0) as lane from {0}.subscription s
         where s.application = $1 and s.name = $2 and s.removed_at is null",
        store.schema
    );
    let query = store.dynamic(sql).bind(&wish.application).bind(&wish.subscription).bind(&wish.key);
    let Some(found) = query.fetch_optional(work.on()).await? else {
        work.rollback().await?;
        return Err(no_subscription(&wish.application, &wish.subscription));
    };
    if !found.try_get::<bool, _>("ordered")? {
        work.rollback().await?;
        return Err(not_in_order(wish));
    }
    let subscription: SubscriptionId = found.try_get("id")?;
    lanes::hold(store, work.on(), &[(subscription, found.try_get("lane")?)]).await?;
    let sql = match turn {
        KeyTurn::Park => format!(
            "insert into {0}.key_state as k (subscription, key, head, state, cause) values ($1, $2, $3, 'parked', $4)
             on conflict (subscription, key) do update
                 set state = 'parked', head = case k.state when 'draining' then null else k.head end, upto = null,
                     cause = excluded.cause, since = excluded.since
             returning null::bigint as head",
            store.schema
        ),
        // What it waits for is let through again, wherever it was put.
        KeyTurn::Unpark => format!(
            "with turned as (
                update {0}.key_state k set cause = $4, state = case
                    when k.state <> 'parked' then k.state
                    when exists (select from {0}.dead_letter d where d.delivery = k.head) then 'blocked'
                    when exists (select from {0}.doubt d where d.delivery = k.head) then 'in_doubt'
                    else 'retrying' end
                where k.subscription = $1 and k.key = $2 and k.head is not distinct from $3
                returning k.head
             ),
             gone as (
                delete from {0}.ready r
                where r.delivery = (select t.head from turned t) and r.pos <> r.delivery and r.priority = {0}.held_of($2)
                returning r.*
             ),
             back as (
                insert into {0}.ready (subscription, priority, slot, pos, delivery, message, attempt, lost, rev)
                select g.subscription, {0}.lane_of($2, g.delivery), g.slot, g.delivery, g.delivery, g.message, g.attempt, g.lost, g.rev
                from gone g
             )
             select t.head from turned t",
            store.schema
        ),
        KeyTurn::LetGo => format!(
            "select k.head from {0}.key_state k
             where k.subscription = $1 and k.key = $2 and k.head is not distinct from $3 and $4::pg_catalog.text is not null",
            store.schema
        ),
    };
    let query = store.dynamic(sql).bind(subscription).bind(&wish.key).bind(head).bind(&wish.reason);
    let turned = query.fetch_optional(work.on()).await?;
    // Who was left out by a cancellation has let the key go already.
    if turned.is_none() && !(turn == KeyTurn::LetGo && head.is_some()) {
        work.rollback().await?;
        return Err(key_moved_on(wish));
    }
    if turned.is_some() && (turn == KeyTurn::LetGo || turn == KeyTurn::Unpark && head.is_none()) {
        store
            .query(store.sql.keys_free)
            .bind(Vec::<DeliveryId>::new())
            .bind(Vec::<DeliveryId>::new())
            .bind(subscription)
            .bind(&wish.key)
            .execute(work.on())
            .await?;
    }
    let action = Action {
        actor: &wish.actor,
        action: turn.action(),
        reason: &wish.reason,
        delivery: head,
        subscription: Some(subscription),
        rev: None,
        state: None,
        detail: Some(serde_json::json!({
            "application": wish.application, "name": wish.subscription, "key": wish.key
        })),
    };
    let entry = record(store, &mut work, action).await?;
    let sql = format!("select pg_catalog.pg_notify(r.channel, '') from {}.routing r", store.schema);
    store.dynamic(sql).execute(work.on()).await?;
    work.commit().await?;
    Ok(entry)
}

/// A dead head is tried again.
pub(super) async fn retried(store: &PgStore, work: &mut Work, head: DeliveryId) -> Result<(), Error> {
    let sql = format!("update {}.key_state set state = 'retrying' where head = $1 and state = 'blocked'", store.schema);
    store.dynamic(sql).bind(head).execute(work.on()).await?;
    Ok(())
}
