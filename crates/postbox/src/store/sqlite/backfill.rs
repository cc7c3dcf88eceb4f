//! Giving new subscriptions their history, in bounded pages.
//!
//! Whoever holds the write lock knows that no publisher is half-way: every message of an older epoch
//! is there to be seen.

use sqlx::SqliteConnection;
use uuid::Uuid;

use super::{SqliteStore, json_of};
use crate::error::Error;
use crate::store::SubscriptionId;

/// Messages looked at in one page.
const PAGE: i64 = 500;

row! {
    struct Newcomer {
        id: SubscriptionId,
        start: String,
        start_at: Option<i64>,
        epoch: i64,
        backfill_after: i64,
    }
}

/// One page for the newcomers of the lowest epoch; `true` when there may be more.
pub(super) async fn backfill(store: &SqliteStore) -> Result<bool, Error> {
    const WAITING: &str =
        "select exists (select 1 from postbox_subscription where not backfilled and removed_at is null)";
    if !sqlx::query_scalar::<_, bool>(WAITING).fetch_one(&store.reader).await? {
        return Ok(false);
    }
    let mut work = store.write().await?;
    // Epoch by epoch: an unrouted message goes to those who registered first after it. Within one,
    // the scans of history come last, because the unrouted messages they match are everybody's.
    let newcomers: Vec<Newcomer> = sqlx::query_as(
        "select id, start, start_at, epoch, backfill_after from postbox_subscription
         where not backfilled and removed_at is null
             and epoch = (select min(epoch) from postbox_subscription where not backfilled and removed_at is null)
         order by id",
    )
    .fetch_all(work.on())
    .await?;
    let plain: Vec<&Newcomer> = newcomers.iter().filter(|n| n.start == "unrouted").collect();
    let (given, ids) = if let Some(first) = plain.first() {
        (unrouted(work.on(), first, &newcomers).await?, plain.iter().map(|n| n.id).collect())
    } else if let Some(first) = newcomers.first() {
        (history(work.on(), first).await?, vec![first.id])
    } else {
        work.rollback().await?;
        return Ok(false);
    };
    sqlx::query(
        "update postbox_subscription
         set backfill_after = coalesce(?1, backfill_after), backfilled = ?1 is null
         where id in (select value from json_each(?2))",
    )
    .bind(given)
    .bind(json_of(&ids)?)
    .execute(work.on())
    .await?;
    let more = sqlx::query_scalar(WAITING).fetch_one(work.on()).await?;
    work.commit().await?;
    store.shared.bell.ring();
    Ok(more)
}

/// A page of messages that nobody was subscribed to, for all newcomers of an epoch at once. The last
/// one looked at; `None` when there was none left.
async fn unrouted(db: &mut SqliteConnection, first: &Newcomer, newcomers: &[Newcomer]) -> Result<Option<i64>, Error> {
    let last: Option<i64> = sqlx::query_scalar(
        "select max(seq) from (select seq from postbox_unrouted where seq > ?1 and epoch < ?2 order by seq limit ?3)",
    )
    .bind(first.backfill_after)
    .bind(first.epoch)
    .bind(PAGE)
    .fetch_one(&mut *db)
    .await?;
    let Some(last) = last else { return Ok(None) };
    let takers: Vec<SubscriptionId> = newcomers.iter().filter(|n| n.start == "unrouted").map(|n| n.id).collect();
    fan_out(db, first.backfill_after, last, first.epoch, Uuid::nil(), &takers, true).await?;
    for newcomer in newcomers {
        route(db, newcomer, first.backfill_after, last).await?;
    }
    Ok(Some(last))
}

/// A page of all that was published before, for a newcomer that wants it.
async fn history(db: &mut SqliteConnection, newcomer: &Newcomer) -> Result<Option<i64>, Error> {
    let last: Option<i64> = sqlx::query_scalar(
        "select max(seq) from (select seq from postbox_message where seq > ?1 and epoch < ?2 order by seq limit ?3)",
    )
    .bind(newcomer.backfill_after)
    .bind(newcomer.epoch)
    .bind(PAGE)
    .fetch_one(&mut *db)
    .await?;
    let Some(last) = last else { return Ok(None) };
    let oldest = newcomer.oldest();
    fan_out(db, newcomer.backfill_after, last, newcomer.epoch, oldest, &[newcomer.id], false).await?;
    route(db, newcomer, newcomer.backfill_after, last).await?;
    Ok(Some(last))
}

async fn fan_out(
    db: &mut SqliteConnection,
    after: i64,
    last: i64,
    epoch: i64,
    oldest: Uuid,
    takers: &[SubscriptionId],
    unrouted: bool,
) -> Result<(), Error> {
    sqlx::query(include_str!("backfill.sql"))
        .bind(after)
        .bind(last)
        .bind(epoch)
        .bind(oldest)
        .bind(json_of(takers)?)
        .bind(unrouted)
        .execute(db)
        .await?;
    Ok(())
}

/// What a newcomer takes, now or in its own scan, is unrouted no more.
async fn route(db: &mut SqliteConnection, newcomer: &Newcomer, after: i64, last: i64) -> Result<(), Error> {
    sqlx::query(
        "delete from postbox_unrouted
         where seq in (
             select x.seq from postbox_match x
             where x.seq > ?1 and x.seq <= ?2 and x.epoch < ?3 and x.message >= ?4 and x.subscription = ?5
                 and x.seq in (select u.seq from postbox_unrouted u where u.seq > ?1 and u.seq <= ?2))",
    )
    .bind(after)
    .bind(last)
    .bind(newcomer.epoch)
    .bind(newcomer.oldest())
    .bind(newcomer.id)
    .execute(db)
    .await?;
    Ok(())
}

impl Newcomer {
    /// The lowest id that a message it wants can have: ids begin with the time.
    fn oldest(&self) -> Uuid {
        let millis = self.start_at.filter(|_| self.start == "time").unwrap_or(0).clamp(0, (1 << 48) - 1);
        Uuid::from_u128((millis as u128) << 80)
    }
}
