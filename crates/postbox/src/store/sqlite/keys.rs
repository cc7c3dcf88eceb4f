//! Keys in order: one whose delivery has not succeeded holds back the others of its key, until it has, or until
//! somebody decides.

use sqlx::SqliteConnection;

use super::admin::{Action, record};
use super::lanes::{held_of, lane_of};
use super::{SqliteStore, json_of, timestamp};
use crate::admin::{AuditEntry, KeyFilter, KeyRow, KeyWish, key_moved_on, not_in_order};
use crate::error::Error;
use crate::store::lanes::{Followed, LET_THROUGH};
use crate::store::{DeliveryId, KeyTurn, Move, SubscriptionId, no_subscription};

/// After these moves, in their transaction: what comes before all others of its key now, and which keys go on.
pub(super) async fn follow(db: &mut SqliteConnection, moves: &[Move]) -> Result<(), Error> {
    let followed = Followed::of(moves.iter());
    if followed.is_nothing() {
        return Ok(());
    }
    for one in &followed.leading {
        block(db, one).await?;
    }
    let over: Vec<DeliveryId> = followed.over.iter().map(|one| one.delivery).collect();
    free(db, &over, &followed.dead()).await
}

/// One goes before all others of its key.
async fn block(db: &mut SqliteConnection, one: &Move) -> Result<(), Error> {
    let found: Option<(Option<String>, String)> = sqlx::query_as(
        "select m.key, s.on_dead from postbox_subscription s join postbox_message m on m.id = ?2
         where s.id = ?1 and s.ordered",
    )
    .bind(one.subscription)
    .bind(one.message)
    .fetch_optional(&mut *db)
    .await?;
    let Some((Some(key), on_dead)) = found else { return Ok(()) };
    let state = match (one.standing.state.as_str(), on_dead.as_str()) {
        ("dead", "skip") => return Ok(()),
        ("dead", "park") => "parked",
        ("dead", _) => "blocked",
        ("in_doubt", _) => "in_doubt",
        _ => "retrying",
    };
    sqlx::query(
        "insert into postbox_key_state as k (subscription, key, lane, held, head, state, since, cause)
         select ?1, ?2, ?3, ?4, ?5, ?6, now, ?7 from postbox_clock where true
         on conflict (subscription, key) do update
             set head = excluded.head, cause = excluded.cause, upto = null,
                 state = case k.state when 'parked' then 'parked' else excluded.state end,
                 since = case when k.head = excluded.head then k.since else excluded.since end
             -- The first of those that were taken from one worker goes first.
             where k.state = 'draining' or k.head is null or k.head >= excluded.head",
    )
    .bind(one.subscription)
    .bind(&key)
    .bind(lane_of(Some(&key), one.message))
    .bind(held_of(&key))
    .bind(one.delivery)
    .bind(state)
    .bind(&one.note)
    .execute(db)
    .await?;
    Ok(())
}

/// Lets keys go on whose head is done with, or dead where that is skipped.
async fn free(db: &mut SqliteConnection, over: &[DeliveryId], dead: &[DeliveryId]) -> Result<(), Error> {
    sqlx::query(
        "update postbox_key_state set head = null
         where state = 'parked' and head in (select value from json_each(?1))",
    )
    .bind(json_of(over)?)
    .execute(&mut *db)
    .await?;
    let keys: Vec<(SubscriptionId, String)> = sqlx::query_as(
        "select k.subscription, k.key from postbox_key_state k join postbox_subscription s on s.id = k.subscription
         where k.state <> 'parked' and (k.head in (select value from json_each(?1))
             or k.head in (select value from json_each(?2)) and s.on_dead = 'skip')",
    )
    .bind(json_of(over)?)
    .bind(json_of(dead)?)
    .fetch_all(&mut *db)
    .await?;
    for (subscription, key) in keys {
        let_through(db, subscription, &key).await?;
    }
    Ok(())
}

/// So many of a key go back to their lane; the last of them lets the next come.
async fn let_through(db: &mut SqliteConnection, subscription: SubscriptionId, key: &str) -> Result<(), Error> {
    let freed: Vec<DeliveryId> = sqlx::query_scalar(
        "update postbox_delivery as d set priority = k.lane from postbox_key_state k
         where k.subscription = ?1 and k.key = ?2 and d.id in (
             select w.id from postbox_delivery w join postbox_message m on m.id = w.message
             where w.subscription = ?1 and w.state = 'pending' and w.due_at is null and w.priority = ?4 and m.key = ?2
             order by w.priority, w.pos, w.id limit ?3)
         returning id",
    )
    .bind(subscription)
    .bind(key)
    .bind(LET_THROUGH as i64)
    .bind(held_of(key))
    .fetch_all(&mut *db)
    .await?;
    let last = freed.iter().max().filter(|_| freed.len() >= LET_THROUGH);
    let sql = match last {
        None => "delete from postbox_key_state where subscription = ?1 and key = ?2 and ?3 is null",
        Some(_) => {
            "update postbox_key_state
             set head = ?3, upto = ?3, state = 'draining', since = (select now from postbox_clock),
                 cause = 'more wait than are let through at once'
             where subscription = ?1 and key = ?2"
        }
    };
    sqlx::query(sql).bind(subscription).bind(key).bind(last).execute(db).await?;
    Ok(())
}

row! {
    struct Listed {
        application: String,
        subscription: String,
        key: String,
        state: String,
        head: Option<DeliveryId>,
        since: i64,
        cause: String,
        waiting: i64,
    }
}

pub(super) async fn list(store: &SqliteStore, filter: &KeyFilter, limit: u32) -> Result<Vec<KeyRow>, Error> {
    let rows: Vec<Listed> = sqlx::query_as(
        "select s.application, s.name as subscription, k.key, k.state, k.head, k.since, k.cause,
             (select count(*) from (
                 select 1 from postbox_delivery w join postbox_message m on m.id = w.message
                 where w.subscription = k.subscription and w.state = 'pending' and w.due_at is null
                     and w.priority = k.held and m.key = k.key
                 limit 10001)) as waiting
         from postbox_key_state k join postbox_subscription s on s.id = k.subscription
         where (?1 is null or s.application = ?1) and (?2 is null or s.name = ?2) and (?3 is null or k.key = ?3)
             and (s.removed_at is null or k.head is not null)
         order by k.since, k.subscription, k.key limit ?4",
    )
    .bind(&filter.application)
    .bind(&filter.subscription)
    .bind(&filter.key)
    .bind(limit)
    .fetch_all(&store.reader)
    .await?;
    let read = |row: Listed| KeyRow {
        application: row.application,
        subscription: row.subscription,
        key: row.key,
        state: row.state,
        head: row.head,
        since: timestamp(row.since),
        cause: row.cause,
        waiting: row.waiting,
    };
    Ok(rows.into_iter().map(read).collect())
}

pub(super) async fn turn(
    store: &SqliteStore,
    wish: &KeyWish,
    turn: KeyTurn,
    head: Option<DeliveryId>,
) -> Result<AuditEntry, Error> {
    let mut work = store.write().await?;
    let found: Option<(SubscriptionId, bool)> = sqlx::query_as(
        "select id, ordered from postbox_subscription where application = ?1 and name = ?2 and removed_at is null",
    )
    .bind(&wish.application)
    .bind(&wish.subscription)
    .fetch_optional(work.on())
    .await?;
    let subscription = match found {
        Some((id, true)) => id,
        found => {
            work.rollback().await?;
            return Err(match found {
                None => no_subscription(&wish.application, &wish.subscription),
                Some(_) => not_in_order(wish),
            });
        }
    };
    let sql = match turn {
        KeyTurn::Park => {
            "insert into postbox_key_state as k (subscription, key, lane, held, head, state, since, cause)
             select ?1, ?2, ?5, ?6, ?3, 'parked', now, ?4 from postbox_clock where true
             on conflict (subscription, key) do update
                 set state = 'parked', head = case k.state when 'draining' then null else k.head end, upto = null,
                     cause = excluded.cause, since = excluded.since"
        }
        KeyTurn::Unpark => {
            "update postbox_key_state as k set cause = ?4, state = case
                 when k.state <> 'parked' then k.state
                 when exists (select 1 from postbox_delivery d where d.id = k.head and d.state = 'dead') then 'blocked'
                 when exists (select 1 from postbox_delivery d where d.id = k.head and d.state = 'in_doubt') then 'in_doubt'
                 else 'retrying' end
             where k.subscription = ?1 and k.key = ?2 and k.head is ?3 and (?5 + ?6) is not null"
        }
        // It is let through below.
        KeyTurn::LetGo => {
            "update postbox_key_state set cause = ?4
             where subscription = ?1 and key = ?2 and head is ?3 and (?5 + ?6) is not null"
        }
    };
    let turned = sqlx::query(sql)
        .bind(subscription)
        .bind(&wish.key)
        .bind(head)
        .bind(&wish.reason)
        .bind(lane_of(Some(&wish.key), uuid::Uuid::nil()))
        .bind(held_of(&wish.key))
        .execute(work.on())
        .await?
        .rows_affected();
    // Who was left out by a cancellation has let the key go already.
    if turned == 0 && !(turn == KeyTurn::LetGo && head.is_some()) {
        work.rollback().await?;
        return Err(key_moved_on(wish));
    }
    if turned > 0 && (turn == KeyTurn::LetGo || turn == KeyTurn::Unpark && head.is_none()) {
        let_through(work.on(), subscription, &wish.key).await?;
    } else if turn == KeyTurn::Unpark {
        // What it waits for is let through again, wherever it was put.
        sqlx::query("update postbox_delivery set priority = ?2 where id = ?1 and priority = ?3")
            .bind(head)
            .bind(lane_of(Some(&wish.key), uuid::Uuid::nil()))
            .bind(held_of(&wish.key))
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
    let entry = record(&mut work, action).await?;
    work.commit().await?;
    store.shared.bell.ring();
    Ok(entry)
}

/// A dead head is tried again.
pub(super) async fn retried(db: &mut SqliteConnection, head: DeliveryId) -> Result<(), Error> {
    sqlx::query("update postbox_key_state set state = 'retrying' where head = ?1 and state = 'blocked'")
        .bind(head)
        .execute(db)
        .await?;
    Ok(())
}
