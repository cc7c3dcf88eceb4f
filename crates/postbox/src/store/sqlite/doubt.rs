//! Deliveries in doubt: who asks, what is answered, what late outcomes prove.

use std::time::Duration;

use sqlx::SqliteConnection;
use uuid::Uuid;

use super::work::Work;
use super::{SqliteStore, json_of, messages, millis, publish, settle};
use crate::error::Error;
use crate::lifecycle::{Kind, State};
use crate::store::{
    Answered, DeliveryId, Doubtful, MOST_SNOOZES, Observation, SubscriptionId, Word, decide, policy_of,
};

row! {
    struct Due {
        id: DeliveryId,
        subscription: SubscriptionId,
        message: Uuid,
        rev: i32,
        attempt: u32,
        asks: u32,
        quiet: bool,
        word: Option<String>,
    }
}

pub(super) async fn doubts(
    store: &SqliteStore,
    subscriptions: &[SubscriptionId],
    limit: u32,
    hold: Duration,
) -> Result<Vec<Doubtful>, Error> {
    let subscriptions = json_of(subscriptions)?;
    // Mostly there are none: looking does not need the writer.
    let ask = || sqlx::query_as::<_, Due>(include_str!("doubts.sql")).bind(subscriptions.clone()).bind(limit);
    if ask().fetch_all(&store.reader).await?.is_empty() {
        return Ok(Vec::new());
    }
    let mut work = store.write().await?;
    let due = ask().fetch_all(work.on()).await?;
    sqlx::query(
        "update postbox_delivery set ask_at = c.now + ?2 from postbox_clock c
         where id in (select value from json_each(?1))",
    )
    .bind(json_of(&due.iter().map(|d| d.id).collect::<Vec<_>>())?)
    .bind(millis(hold))
    .execute(work.on())
    .await?;
    let envelopes = messages(work.on(), &due.iter().map(|d| d.message).collect::<Vec<_>>()).await?;
    work.commit().await?;
    let doubtful = due.into_iter().map(|d| Doubtful {
        delivery: d.id,
        subscription: d.subscription,
        rev: d.rev,
        attempts: d.attempt,
        quiet: d.quiet,
        asks: d.asks,
        word: d.word.and_then(|w| serde_json::from_str::<Word>(&w).ok()),
        envelope: envelopes.get(&d.message).cloned(),
    });
    Ok(doubtful.collect())
}

pub(super) async fn unanswered(store: &SqliteStore, doubt: &Doubtful, wait: Duration) -> Result<(), Error> {
    let mut work = store.write().await?;
    sqlx::query(
        // Not later than when a "no" can be believed. Another worker may have told of this ask.
        "update postbox_delivery
         set asks = asks + 1, ask_at = min(c.now + ?4, iif(quiet_at > c.now, quiet_at, 9223372036854775807))
         from postbox_clock c
         where id = ?1 and rev = ?2 and asks = ?3 and state = 'in_doubt'",
    )
    .bind(doubt.delivery)
    .bind(doubt.rev)
    .bind(doubt.asks)
    .bind(millis(wait))
    .execute(work.on())
    .await?;
    work.commit().await
}

row! {
    /// A delivery in doubt, under the write lock.
    pub(super) struct Doubt {
        pub(super) message: Uuid,
        pub(super) subscription: SubscriptionId,
        priority: i16,
        pub(super) attempt: u32,
        pub(super) rev: i32,
        pub(super) word: Option<String>,
        kind: String,
        idempotent: bool,
        max_attempts: i32,
        retry_base_ms: i64,
        retry_cap_ms: i64,
        pub(super) continues: bool,
    }
}

impl Doubt {
    /// What the decision needs to know.
    fn facts(&self) -> Result<decide::Doubt, Error> {
        let kind: Kind = self.kind.parse().map_err(Error::Refused)?;
        Ok(decide::Doubt {
            message: self.message,
            subscription: self.subscription,
            priority: self.priority,
            attempts: self.attempt,
            rev: self.rev,
            word: self.word.is_some(),
            policy: policy_of(kind, self.idempotent, self.max_attempts, self.retry_base_ms, self.retry_cap_ms),
        })
    }
}

pub(super) async fn find(db: &mut SqliteConnection, delivery: DeliveryId) -> Result<Option<Doubt>, Error> {
    let found = sqlx::query_as(
        "select d.message, d.subscription, d.priority, d.attempt, d.rev, d.word, s.kind, s.idempotent,
             coalesce(m.max_attempts, s.max_attempts) as max_attempts, s.retry_base_ms, s.retry_cap_ms, s.continues
         from postbox_delivery d
         join postbox_subscription s on s.id = d.subscription
         left join postbox_message m on m.id = d.message
         where d.id = ?1 and d.state = 'in_doubt'",
    )
    .bind(delivery)
    .fetch_optional(db)
    .await?;
    Ok(found)
}

/// Ends a doubt: the resolution, the move, and on success the follow-ups. The state after.
pub(super) async fn end(work: &mut Work, doubt: &Doubt, answered: &Answered) -> Result<State, Error> {
    let moved = decide::end_of_doubt(&doubt.facts()?, answered).map_err(|e| Error::Refused(e.to_string()))?;
    let state = moved.standing.state;
    let receipt = answered.receipt.as_ref().map(serde_json::Value::to_string);
    sqlx::query(
        "insert into postbox_resolution (delivery, rev, number, subscription, message, answer, source, actor, reason,
             receipt, state_after, at)
         select ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, now from postbox_clock",
    )
    .bind(answered.delivery)
    .bind(doubt.rev + 1)
    .bind(doubt.attempt)
    .bind(doubt.subscription)
    .bind(doubt.message)
    .bind(answered.answer.as_str())
    .bind(answered.speaker.as_str())
    .bind(&answered.actor)
    .bind(&answered.reason)
    .bind(&receipt)
    .bind(state.as_str())
    .execute(work.on())
    .await?;
    settle::apply(work.on(), &[moved], None).await?;
    if state == State::Succeeded {
        publish::follow(work.on(), &answered.follow_ups).await?;
    }
    Ok(state)
}

pub(super) async fn answer(store: &SqliteStore, answered: &Answered) -> Result<bool, Error> {
    let mut work = store.write().await?;
    let Some(doubt) = find(work.on(), answered.delivery).await?.filter(|d| d.rev == answered.rev) else {
        work.rollback().await?;
        return Ok(false);
    };
    end(&mut work, &doubt, answered).await?;
    work.commit().await?;
    store.shared.bell.ring();
    Ok(true)
}

pub(super) async fn observe(store: &SqliteStore, observations: &[Observation]) -> Result<(), Error> {
    if observations.is_empty() {
        return Ok(());
    }
    let mut work = store.write().await?;
    for seen in observations {
        keep(work.on(), seen).await?;
        if seen.evidence.is_some()
            && let Some(doubt) = find(work.on(), seen.delivery).await?
            && let Some(answered) = decide::evidence(seen, &doubt.facts()?)
        {
            end(&mut work, &doubt, &answered).await?;
        }
    }
    work.commit().await?;
    store.shared.bell.ring();
    Ok(())
}

/// Writes down what was seen.
pub(super) async fn keep(db: &mut SqliteConnection, seen: &Observation) -> Result<(), Error> {
    sqlx::query(
        "insert into postbox_observation (delivery, number, worker, kind, detail, at)
         select ?1, ?2, ?3, ?4, ?5, now from postbox_clock
         where ?4 <> 'snoozed' or ?6 > (
            select count(*) from postbox_observation o where o.delivery = ?1 and o.number = ?2 and o.kind = 'snoozed')",
    )
    .bind(seen.delivery)
    .bind(seen.number)
    .bind(seen.worker)
    .bind(seen.kind)
    .bind(&seen.detail)
    .bind(MOST_SNOOZES)
    .execute(db)
    .await?;
    Ok(())
}
