//! Claiming: promote what is due, lease a batch.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};
use uuid::Uuid;

use super::settle::all;
use super::work::Work;
use super::{SqliteStore, json_of, limits, occurred};
use crate::content::Content;
use crate::error::Error;
use crate::message::{Envelope, minted_at};
use crate::planted::planted;
use crate::priority::Priority;
use crate::store::turns::Turns;
use crate::store::{ClaimRequest, Claimed, DeliveryId, Item, SubscriptionId};

/// What becomes due in one claim at most.
const PROMOTED: i64 = 1000;

pub(super) async fn claim(store: &SqliteStore, request: &ClaimRequest) -> Result<Claimed, Error> {
    let wanted: Vec<SubscriptionId> = request.wanted.iter().filter(|(_, room)| *room > 0).map(|(id, _)| *id).collect();
    let wanted = json_of(&wanted)?;
    let mut claimed = Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: None, dry: Vec::new() };
    // Looking does not need the writer, so that an idle worker is in nobody's way.
    let (due, wait): (bool, Option<i64>) =
        sqlx::query_as(include_str!("due.sql")).bind(&wanted).fetch_one(&store.reader).await?;
    claimed.next_due = wait.map(wait_of);
    if !due {
        return Ok(claimed);
    }

    // A lease that is lost with the machine was its worker's, who is gone, too.
    let mut work = Work::write_lightly(&store.writer).await?;
    let lives: bool = sqlx::query_scalar("select exists (select 1 from postbox_worker where id = ?1)")
        .bind(request.worker)
        .fetch_one(work.on())
        .await?;
    if !lives && !planted!("claim-without-life") {
        work.rollback().await?;
        return Ok(claimed);
    }
    let mut claimed = claim_in(&mut work, &store.shared.turns, request, Keep::InLease).await?;
    let (_, wait): (bool, Option<i64>) =
        sqlx::query_as(include_str!("due.sql")).bind(&wanted).fetch_one(work.on()).await?;
    claimed.next_due = wait.map(wait_of);
    work.commit().await?;
    Ok(claimed)
}

/// How a claimed delivery is kept while it is leased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// In its lease, if it goes the straight way.
    InLease,
    /// In a row of its own.
    InRow,
}

/// The claim itself, in a transaction that holds the write lock.
pub(super) async fn claim_in(
    work: &mut Work,
    turns: &Turns,
    request: &ClaimRequest,
    keep: Keep,
) -> Result<Claimed, Error> {
    let wanted: Vec<SubscriptionId> = request.wanted.iter().filter(|(_, room)| *room > 0).map(|(id, _)| *id).collect();
    let wanted = json_of(&wanted)?;
    let mut claimed = Claimed { batch: 0, token: request.token, items: Vec::new(), next_due: None, dry: Vec::new() };
    sqlx::query(include_str!("promote.sql")).bind(&wanted).bind(PROMOTED).execute(work.on()).await?;
    let tokens = limits::take(work.on(), request).await?;
    // Looked at here, so that a pause holds at once for all.
    let open = "select id, kind = 'plain' from postbox_subscription
         where paused_at is null and id in (select value from json_each(?1))";
    let open: HashMap<SubscriptionId, bool> =
        sqlx::query_as(open).bind(&wanted).fetch_all(work.on()).await?.into_iter().collect();
    let mut picked = Vec::new();
    for (subscription, room) in &request.wanted {
        let Some(plain) = open.get(subscription) else { continue };
        let straight = *plain && keep == Keep::InLease;
        // A lower level has its share first; what it had comes again among all.
        let room = tokens.room(*subscription, *room);
        let share = turns.share(*subscription, room);
        let mut own: Vec<Picked> = Vec::new();
        for (most, level) in [(share.most, Some(share.level)), (room, None)].into_iter().filter(|(most, _)| *most > 0) {
            let sql = include_str!("claim.sql");
            let sql = sql.replace("{level}", if level.is_some() { "and d.priority = ?3" } else { "" });
            let query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(subscription).bind(most);
            let query = match level {
                Some(level) => query.bind(level.level()),
                None => query,
            };
            let shared = own.len();
            for row in query.fetch_all(work.on()).await? {
                let one = Picked::read(&row, *subscription, straight)?;
                if own.len() < room as usize && own[..shared].iter().all(|p| p.item.delivery != one.item.delivery) {
                    own.push(one);
                }
            }
        }
        if let Some(top) = own.iter().map(|p| p.item.priority).min() {
            turns.took(*subscription, share, own.len() as u32, Priority::of(top));
        }
        picked.extend(own);
    }
    let used = |id| picked.iter().filter(|p: &&Picked| p.item.subscription == id).count() as u32;
    limits::give_back(work.on(), &tokens, used).await?;
    claimed.dry = tokens.dry;
    if picked.is_empty() {
        return Ok(claimed);
    }
    picked.sort_by_key(|p| (p.item.priority, p.pos, p.item.delivery));
    claimed.batch = lease(work.on(), request, &picked).await?;
    claimed.items = picked.into_iter().map(|p| p.item).collect();
    Ok(claimed)
}

fn wait_of(millis: i64) -> Duration {
    Duration::from_millis(millis.max(0) as u64)
}

/// Writes the lease, and takes what it holds from where it waited.
async fn lease(db: &mut SqliteConnection, request: &ClaimRequest, picked: &[Picked]) -> Result<i64, Error> {
    let light: Vec<(DeliveryId, &str, SubscriptionId)> = picked
        .iter()
        .filter(|p| p.straight)
        .map(|p| (p.item.delivery, p.message.as_str(), p.item.subscription))
        .collect();
    let batch = sqlx::query_scalar(
        "insert into postbox_lease (token, worker, claimed_at, items)
         select ?1, ?2, now, ?3 from postbox_clock returning batch",
    )
    .bind(request.token)
    .bind(request.worker)
    .bind(json_of(&light)?)
    .fetch_one(&mut *db)
    .await?;
    for (subscription, _) in &request.wanted {
        let own = || picked.iter().filter(|p| p.straight && p.item.subscription == *subscription);
        let Some(last) = own().next_back() else { continue };
        // The picked ones come first, so that a range of the index has them all.
        let taken = sqlx::query(
            "delete from postbox_delivery
             where subscription = ?1 and state = 'pending' and due_at is null and priority = 0 and (pos, id) <= (?2, ?3)
                 and attempt = 0 and rev = 0 and lost = 0 and replay_of is null",
        )
        .bind(subscription)
        .bind(last.pos)
        .bind(last.item.delivery)
        .execute(&mut *db)
        .await?
        .rows_affected();
        all(taken, own().count())?;
    }
    let rest: Vec<DeliveryId> = picked.iter().filter(|p| !p.straight).map(|p| p.item.delivery).collect();
    if !rest.is_empty() {
        let taken = sqlx::query(
            "update postbox_delivery
             set state = 'running', token = ?1, begun = 0, rev = rev + 1, since = (select now from postbox_clock)
             where id in (select value from json_each(?2))",
        )
        .bind(request.token)
        .bind(json_of(&rest)?)
        .execute(&mut *db)
        .await?
        .rows_affected();
        all(taken, rest.len())?;
    }
    Ok(batch)
}

/// A delivery that is about to be leased.
struct Picked {
    item: Item,
    pos: i64,
    /// Of the message, in hexadecimal digits.
    message: String,
    /// It goes the straight way so far: the lease is all it needs.
    straight: bool,
}

/// What `claim.sql` puts into one array, in its order.
#[derive(Deserialize)]
struct About {
    delivery: DeliveryId,
    priority: i16,
    pos: i64,
    attempt: u32,
    lost: u32,
    rev: i32,
    replay_of: Option<DeliveryId>,
    message: String,
    topic: Option<String>,
    key: Option<String>,
    headers: Option<String>,
    occurred_us: Option<i64>,
    source: Option<String>,
    external_id: Option<String>,
    correlation_id: Option<String>,
    causation_id: Option<String>,
    max_attempts: Option<u32>,
    content_type: Option<String>,
}

impl Picked {
    fn read(row: &SqliteRow, subscription: SubscriptionId, plain: bool) -> Result<Picked, Error> {
        let decode = |e: serde_json::Error| sqlx::Error::Decode(Box::new(e));
        let about: About = serde_json::from_str(row.try_get(0)?).map_err(decode)?;
        let id = Uuid::try_parse(&about.message).map_err(|e| sqlx::Error::Decode(Box::new(e)))?;
        let straight = plain
            && (about.priority, about.attempt, about.lost, about.rev) == (0, 0, 0, 0)
            && about.replay_of.is_none();
        let envelope = match about.topic {
            None => None,
            Some(topic) => Some(Arc::new(Envelope {
                id,
                topic,
                key: about.key,
                payload: Content::stored(row.try_get(1)?, row.try_get(2)?, about.content_type).map_err(decode)?,
                headers: about
                    .headers
                    .map(|h| serde_json::from_str(&h))
                    .transpose()
                    .map_err(decode)?
                    .unwrap_or_default(),
                occurred_at: occurred(about.occurred_us, id),
                received_at: minted_at(id),
                source: about.source,
                external_id: about.external_id,
                correlation_id: about.correlation_id,
                causation_id: about.causation_id,
                max_attempts: about.max_attempts,
            })),
        };
        let item = Item {
            delivery: about.delivery,
            subscription,
            message: id,
            priority: about.priority,
            attempts: about.attempt,
            lost: about.lost,
            rev: about.rev + 1,
            envelope,
        };
        Ok(Picked { item, pos: about.pos, message: about.message, straight })
    }
}
