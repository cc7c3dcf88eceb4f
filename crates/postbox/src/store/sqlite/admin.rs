//! What operators do; each action leaves an audit row in the same transaction.

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};

use super::operate::stands;
use super::work::Work;
use super::{SqliteStore, doubt, timestamp};
use crate::admin::{AuditEntry, Resolution, no_delivery};
use crate::error::Error;
use crate::lifecycle::{Answer, State};
use crate::store::{Answered, DeliveryId, Speaker, SubscriptionId, Word, no_subscription};

/// What an operator's action is recorded with.
pub(super) struct Action<'a> {
    pub(super) actor: &'a str,
    pub(super) action: &'a str,
    pub(super) reason: &'a str,
    pub(super) delivery: Option<DeliveryId>,
    pub(super) subscription: Option<SubscriptionId>,
    pub(super) rev: Option<(i32, i32)>,
    pub(super) state: Option<(State, State)>,
    pub(super) detail: Option<serde_json::Value>,
}

/// What retention has removed, as its own entry.
pub(super) async fn note_retention(
    db: &mut SqliteConnection,
    reason: &str,
    detail: serde_json::Value,
) -> Result<(), Error> {
    sqlx::query("update postbox_audit_counter set seq = seq + 1").execute(&mut *db).await?;
    sqlx::query(
        "insert into postbox_audit (seq, actor, action, reason, detail, at)
         select a.seq, 'retention', 'retain', ?1, ?2, c.now from postbox_audit_counter a cross join postbox_clock c",
    )
    .bind(reason)
    .bind(detail.to_string())
    .execute(db)
    .await?;
    Ok(())
}

/// Writes it down under a number that leaves no gap.
pub(super) async fn record(work: &mut Work, action: Action<'_>) -> Result<AuditEntry, Error> {
    let seq: i64 =
        sqlx::query_scalar("update postbox_audit_counter set seq = seq + 1 returning seq").fetch_one(work.on()).await?;
    let row = sqlx::query(
        "insert into postbox_audit (seq, actor, action, delivery, subscription, rev_before, rev_after, state_before,
             state_after, reason, detail, at)
         select ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, now from postbox_clock
         returning seq, at, actor, action, delivery,
             (select s.name from postbox_subscription s where s.id = postbox_audit.subscription) as name, state_before, state_after, rev_after, reason,
             detail",
    )
    .bind(seq)
    .bind(action.actor)
    .bind(action.action)
    .bind(action.delivery)
    .bind(action.subscription)
    .bind(action.rev.map(|r| r.0))
    .bind(action.rev.map(|r| r.1))
    .bind(action.state.map(|s| s.0.as_str()))
    .bind(action.state.map(|s| s.1.as_str()))
    .bind(action.reason)
    .bind(action.detail.map(|d| d.to_string()))
    .fetch_one(work.on())
    .await?;
    entry(&row)
}

fn entry(row: &SqliteRow) -> Result<AuditEntry, Error> {
    Ok(AuditEntry {
        seq: row.try_get("seq")?,
        at: timestamp(row.try_get("at")?),
        actor: row.try_get("actor")?,
        login: None,
        action: row.try_get("action")?,
        delivery: row.try_get("delivery")?,
        subscription: row.try_get("name")?,
        state_before: row.try_get("state_before")?,
        state_after: row.try_get("state_after")?,
        rev_after: row.try_get("rev_after")?,
        reason: row.try_get("reason")?,
        detail: row.try_get::<Option<String>, _>("detail")?.and_then(|d| serde_json::from_str(&d).ok()),
    })
}

/// The loser of a race is on record too, in a transaction of its own.
pub(super) async fn lost_race(
    store: &SqliteStore,
    work: Work,
    (actor, action, reason): (&str, &str, &str),
    delivery: DeliveryId,
    error: Error,
) -> Error {
    let recorded = async {
        work.rollback().await?;
        let mut work = store.write().await?;
        let detail = Some(serde_json::json!({ "refused": error.to_string() }));
        let action = Action {
            actor,
            action,
            reason,
            delivery: Some(delivery),
            subscription: None,
            rev: None,
            state: None,
            detail,
        };
        record(&mut work, action).await?;
        work.commit().await
    };
    match recorded.await {
        Ok(()) => error,
        Err(failure) => failure,
    }
}

pub(super) fn moved_on(delivery: DeliveryId, seen: i32, now: i32) -> Error {
    Error::Conflict(format!(
        "delivery {delivery} is at version {now}, not {seen}: somebody changed it meanwhile; look again with `postbox show {delivery}`"
    ))
}

pub(super) async fn resolve(
    store: &SqliteStore,
    delivery: DeliveryId,
    resolution: &Resolution,
) -> Result<AuditEntry, Error> {
    let mut work = store.write().await?;
    let found = doubt::find(work.on(), delivery).await?;
    let conflict = match &found {
        None => match stands(&mut work, delivery).await? {
            None => {
                work.rollback().await?;
                return Err(no_delivery(delivery));
            }
            Some((_, state)) => Some(Error::Conflict(format!(
                "delivery {delivery} is {state} and not in doubt (any more); look again with `postbox show {delivery}`"
            ))),
        },
        Some(doubt) => match resolution.rev {
            Some(seen) if seen != doubt.rev => Some(moved_on(delivery, seen, doubt.rev)),
            // Giving up is the way out of a word that no worker ever carries out.
            _ => (resolution.answer != Answer::Abandoned && doubt.word.is_some()).then(|| {
                Error::Conflict(format!(
                    "delivery {delivery} was resolved already; a worker of its application carries it out"
                ))
            }),
        },
    };
    let (Some(doubt), None) = (&found, &conflict) else {
        let error = conflict.unwrap_or_else(|| no_delivery(delivery));
        let who = (resolution.actor.as_str(), "resolve refused", resolution.reason.as_str());
        return Err(lost_race(store, work, who, delivery, error).await);
    };
    let receipt = resolution.evidence.as_ref().map(|e| serde_json::json!({ "evidence": e }));
    let after = if resolution.answer == Answer::Happened && doubt.continues {
        // Only a worker knows the follow-ups: it is woken to settle this with them, in one commit.
        let word =
            Word { actor: resolution.actor.clone(), reason: resolution.reason.clone(), receipt: receipt.clone() };
        sqlx::query(
            "update postbox_delivery set word = ?2, rev = rev + 1, ask_at = (select now from postbox_clock) where id = ?1",
        )
        .bind(delivery)
        .bind(super::json_of(&word)?)
        .execute(work.on())
        .await?;
        State::InDoubt
    } else {
        let answered = Answered {
            delivery,
            rev: doubt.rev,
            answer: resolution.answer,
            speaker: Speaker::Operator,
            actor: resolution.actor.clone(),
            reason: Some(resolution.reason.clone()),
            receipt: receipt.clone(),
            follow_ups: Vec::new(),
            draw: 0.0,
        };
        doubt::end(&mut work, doubt, &answered).await?
    };
    let action = Action {
        actor: &resolution.actor,
        action: match resolution.answer {
            Answer::Happened => "resolve: happened",
            Answer::DidNotHappen => "resolve: did not happen",
            Answer::Abandoned => "resolve: abandoned",
        },
        reason: &resolution.reason,
        delivery: Some(delivery),
        subscription: Some(doubt.subscription),
        rev: Some((doubt.rev, doubt.rev + 1)),
        state: Some((State::InDoubt, after)),
        detail: receipt,
    };
    let entry = record(&mut work, action).await?;
    work.commit().await?;
    store.shared.bell.ring();
    Ok(entry)
}

pub(super) async fn remove_subscription(
    store: &SqliteStore,
    application: &str,
    name: &str,
    actor: &str,
    reason: &str,
) -> Result<AuditEntry, Error> {
    let mut work = store.write().await?;
    let removed: Option<SubscriptionId> = sqlx::query_scalar(
        "update postbox_subscription set removed_at = (select now from postbox_clock)
         where application = ?1 and name = ?2 and removed_at is null returning id",
    )
    .bind(application)
    .bind(name)
    .fetch_optional(work.on())
    .await?;
    let Some(id) = removed else {
        work.rollback().await?;
        return Err(no_subscription(application, name));
    };
    sqlx::query("update postbox_routing set epoch = epoch + 1").execute(work.on()).await?;
    let action = Action {
        actor,
        action: "remove subscription",
        reason,
        delivery: None,
        subscription: Some(id),
        rev: None,
        state: None,
        detail: Some(serde_json::json!({ "application": application, "name": name })),
    };
    let entry = record(&mut work, action).await?;
    work.commit().await?;
    Ok(entry)
}

pub(super) async fn audit(store: &SqliteStore, limit: u32) -> Result<Vec<AuditEntry>, Error> {
    let rows = sqlx::query(
        "select seq, at, actor, action, delivery,
             (select s.name from postbox_subscription s where s.id = postbox_audit.subscription) as name,
             state_before, state_after, rev_after, reason, detail
         from postbox_audit order by seq desc limit ?1",
    )
    .bind(limit)
    .fetch_all(&store.reader)
    .await?;
    rows.iter().map(entry).collect()
}
