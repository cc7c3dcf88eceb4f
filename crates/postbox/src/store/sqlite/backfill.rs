//! Giving new subscriptions their history, in bounded pages.
//!
//! Whoever holds the write lock knows that no publisher is half-way: every message of an older epoch
//! is there to be seen.

use sqlx::SqliteConnection;
use uuid::Uuid;

use super::{SqliteStore, json_of, unique};
use crate::error::Error;
use crate::store::SubscriptionId;

/// Messages looked at in one page.
const PAGE: i64 = 500;

row! {
    struct Newcomer {
        id: SubscriptionId,
        // It looks through the messages themselves, not only through those that are nobody's.
        scan: bool,
        start_at: Option<i64>,
        epoch: i64,
        after: i64,
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
        "with newcomer as (
             select id, 0 as scan, null as start_at, epoch, backfill_after as after from postbox_subscription
             where not backfilled and removed_at is null and start = 'unrouted'
             union all
             select id, 1, start_at, scan_epoch, scan_after from postbox_subscription
             where scan_pattern is not null and removed_at is null
         )
         select id, scan, start_at, epoch, after from newcomer
         where epoch = (select min(epoch) from newcomer) order by id",
    )
    .fetch_all(work.on())
    .await?;
    let plain: Vec<&Newcomer> = newcomers.iter().filter(|n| !n.scan).collect();
    let (given, ids, how_far) = if let Some(first) = plain.first() {
        let how_far = "update postbox_subscription
             set backfill_after = coalesce(?1, backfill_after), backfilled = ?1 is null
             where id in (select value from json_each(?2))";
        (unrouted(work.on(), first, &newcomers).await?, plain.iter().map(|n| n.id).collect(), how_far)
    } else if let Some(first) = newcomers.first() {
        // One whose pattern has changed meanwhile has its unrouted ones before it, too.
        let how_far = "update postbox_subscription
             set scan_after = coalesce(?1, scan_after), scan_pattern = case when ?1 is not null then scan_pattern end,
                 backfilled = ?1 is null and start <> 'unrouted'
             where id in (select value from json_each(?2))";
        (history(work.on(), first).await?, vec![first.id], how_far)
    } else {
        work.rollback().await?;
        return Ok(false);
    };
    sqlx::query(how_far).bind(given).bind(json_of(&ids)?).execute(work.on()).await?;
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
    .bind(first.after)
    .bind(first.epoch)
    .bind(PAGE)
    .fetch_one(&mut *db)
    .await?;
    let Some(last) = last else { return Ok(None) };
    let takers: Vec<SubscriptionId> = newcomers.iter().filter(|n| !n.scan).map(|n| n.id).collect();
    let page = Page { after: first.after, last, epoch: first.epoch, oldest: Uuid::nil(), scan: false };
    fan_out(db, page, &takers).await?;
    for newcomer in newcomers {
        route(db, newcomer, first.after, last).await?;
    }
    Ok(Some(last))
}

/// A page of all that was published before, for a newcomer that wants it.
async fn history(db: &mut SqliteConnection, newcomer: &Newcomer) -> Result<Option<i64>, Error> {
    let last: Option<i64> = sqlx::query_scalar(
        "select max(seq) from (select seq from postbox_message where seq > ?1 and epoch < ?2 order by seq limit ?3)",
    )
    .bind(newcomer.after)
    .bind(newcomer.epoch)
    .bind(PAGE)
    .fetch_one(&mut *db)
    .await?;
    let Some(last) = last else { return Ok(None) };
    let page = Page { after: newcomer.after, last, epoch: newcomer.epoch, oldest: newcomer.oldest(), scan: true };
    fan_out(db, page, &[newcomer.id]).await?;
    route(db, newcomer, newcomer.after, last).await?;
    Ok(Some(last))
}

/// Which messages are looked at.
struct Page {
    after: i64,
    last: i64,
    epoch: i64,
    oldest: Uuid,
    scan: bool,
}

async fn fan_out(db: &mut SqliteConnection, page: Page, takers: &[SubscriptionId]) -> Result<(), Error> {
    unique::lenient(db, true).await?;
    sqlx::query(include_str!("backfill.sql"))
        .bind(page.after)
        .bind(page.last)
        .bind(page.epoch)
        .bind(page.oldest)
        .bind(json_of(takers)?)
        .bind(!page.scan)
        .bind(page.scan)
        .execute(&mut *db)
        .await?;
    unique::lenient(db, false).await?;
    Ok(())
}

/// What a newcomer takes, now or in its own scan, is unrouted no more.
async fn route(db: &mut SqliteConnection, newcomer: &Newcomer, after: i64, last: i64) -> Result<(), Error> {
    sqlx::query(
        "delete from postbox_unrouted
         where seq in (
             select x.seq from postbox_match x
             where x.seq > ?1 and x.seq <= ?2 and x.epoch < ?3 and x.message >= ?4 and x.subscription = ?5 and x.scan = ?6
                 and x.seq in (select u.seq from postbox_unrouted u where u.seq > ?1 and u.seq <= ?2))",
    )
    .bind(after)
    .bind(last)
    .bind(newcomer.epoch)
    .bind(newcomer.oldest())
    .bind(newcomer.id)
    .bind(newcomer.scan)
    .execute(db)
    .await?;
    Ok(())
}

impl Newcomer {
    /// The lowest id that a message it wants can have: ids begin with the time.
    fn oldest(&self) -> Uuid {
        let millis = self.start_at.unwrap_or(0).clamp(0, (1 << 48) - 1);
        Uuid::from_u128((millis as u128) << 80)
    }
}
