//! Lanes: a subscription that delivers by key has its deliveries at a level of `ready` for each hash of a key,
//! and each lane belongs to one worker at a time (decision 0030).

use std::collections::HashMap;
use std::time::Instant;

use sqlx::Row;
use uuid::Uuid;

use super::{PgStore, Work};
use crate::error::Error;
use crate::store::lanes::{FIRST_LANE, LANES, Lane, of_each};
use crate::store::{ClaimRequest, SubscriptionId};

/// How far from its number the place of one that waits is: so it is found by its number.
pub(super) const FAR: i64 = 1 << 61;

/// The levels at which deliveries of the subscription `s` can be by their numbers.
pub(super) const LEVELS: &str = "(select pg_catalog.generate_series(-1, 1)::smallint
    union all select pg_catalog.generate_series(64, 95)::smallint where s.per_key is not null)";

/// What a claim takes from lanes, as the columns of its statement.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) subscriptions: Vec<i32>,
    pub(super) levels: Vec<i16>,
    /// Of each lane.
    pub(super) most: Vec<i32>,
    /// Of its subscription.
    pub(super) rooms: Vec<i32>,
}

impl Wanted {
    /// Puts aside what waits for others of its key; whether there was something.
    pub(super) async fn put_aside(&self, store: &PgStore, work: &mut Work) -> Result<bool, Error> {
        if self.levels.is_empty() {
            return Ok(false);
        }
        let query = store.query(store.sql.keys_aside).bind(&self.subscriptions).bind(&self.levels);
        Ok(query.execute(work.on()).await?.rows_affected() > 0)
    }
}

/// The worker's own lanes of these subscriptions, of which so many deliveries are wanted. Its row is locked from
/// here on: whoever blocks or frees a key waits until the claim has committed, or has committed before it begins.
pub(super) async fn wanted(
    store: &PgStore,
    work: &mut Work,
    request: &ClaimRequest,
    rooms: &[(SubscriptionId, u32)],
) -> Result<Wanted, Error> {
    let worker = request.worker;
    let subscriptions: Vec<SubscriptionId> = rooms.iter().map(|(id, _)| *id).collect();
    let due = store.balanced.due(worker, &subscriptions, Instant::now());
    let lock = if due.is_empty() { "key share" } else { "update" };
    let sql = format!(
        "select from {}.worker w where w.id = $1 and w.expires_at > pg_catalog.clock_timestamp() for {lock}",
        store.schema
    );
    let mut wanted = Wanted::default();
    if store.dynamic(sql).bind(worker).fetch_optional(work.on()).await?.is_none() {
        return Ok(wanted);
    }
    for subscription in due {
        balance(store, work, worker, subscription).await?;
    }
    let rows = store.query(store.sql.lanes).bind(worker).bind(&subscriptions).fetch_all(work.on()).await?;
    let mut owned: HashMap<SubscriptionId, Vec<i16>> = HashMap::new();
    let mut strays = Vec::new();
    for row in &rows {
        let subscription: SubscriptionId = row.try_get("subscription")?;
        if row.try_get("strays")? && !strays.contains(&subscription) {
            strays.push(subscription);
        }
        let levels: Vec<i16> = row.try_get("levels")?;
        owned.insert(
            subscription,
            levels.into_iter().filter(|level| !request.full.contains(&(subscription, *level))).collect(),
        );
    }
    if !strays.is_empty() && request.sorts {
        // One after the other, whichever worker: who sorts beside another does not see what that one has moved, and could
        // claim what comes after it.
        let sql = format!(
            "select s.id from pg_catalog.unnest($1::int[]) as s(id)
             where pg_catalog.pg_try_advisory_xact_lock('{}.lane'::pg_catalog.regclass::pg_catalog.oid::int, s.id)",
            store.schema
        );
        let rows = store.dynamic(sql).bind(&strays).fetch_all(work.on()).await?;
        let mine = rows.iter().map(|row| row.try_get("id")).collect::<Result<Vec<SubscriptionId>, _>>()?;
        if !mine.is_empty() {
            store.query(store.sql.strays).bind(&mine).execute(work.on()).await?;
        }
    }
    let int = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    for (subscription, room) in rooms.iter().filter(|(_, room)| *room > 0) {
        let Some(levels) = owned.get(subscription).filter(|levels| !levels.is_empty()) else { continue };
        for level in levels {
            wanted.subscriptions.push(*subscription);
            wanted.levels.push(*level);
            wanted.most.push(int(of_each(*room, levels.len())));
            wanted.rooms.push(int(*room));
        }
    }
    Ok(wanted)
}

/// Gives up lanes that others should have, and takes those that are nobody's: as many as are this worker's share.
async fn balance(store: &PgStore, work: &mut Work, worker: Uuid, subscription: SubscriptionId) -> Result<(), Error> {
    for sql in [store.sql.lanes_free, store.sql.lanes_leave, store.sql.lanes_take] {
        store.query(sql).bind(worker).bind(subscription).execute(work.on()).await?;
    }
    Ok(())
}

/// Makes the lanes of a subscription that goes by them.
pub(super) async fn declare(store: &PgStore, work: &mut Work, subscription: SubscriptionId) -> Result<(), Error> {
    let sql = format!(
        "insert into {}.lane (subscription, level)
         select $1, n from pg_catalog.generate_series($2::int, $3::int) n on conflict do nothing",
        store.schema
    );
    let last = i32::from(FIRST_LANE + LANES - 1);
    store.dynamic(sql).bind(subscription).bind(i32::from(FIRST_LANE)).bind(last).execute(work.on()).await?;
    Ok(())
}

/// Keeps everybody from claiming from these lanes until the transaction ends. What its next statement sees is
/// all that claims have done, and claims that come later see all that it does.
pub(super) async fn hold(store: &PgStore, connection: &mut sqlx::PgConnection, lanes: &[Lane]) -> Result<(), Error> {
    let (subscriptions, levels): (Vec<i32>, Vec<i16>) = lanes.iter().copied().unzip();
    let of = format!(
        "select l.owner from {}.lane l
         where (l.subscription, l.level) in (select u.s, u.l from unnest($1::int[], $2::smallint[]) as u(s, l))
         order by l.subscription, l.level",
        store.schema
    );
    let held = format!("{of} for update");
    let mut owners = owners(store, connection, of, &subscriptions, &levels).await?;
    loop {
        // First the owner, then the lane, as a worker does that shares out lanes.
        let sql = format!("select from {}.worker w where w.id = any ($1) order by w.id for update", store.schema);
        store.dynamic(sql).bind(&owners).execute(&mut *connection).await?;
        let now = self::owners(store, connection, held.clone(), &subscriptions, &levels).await?;
        if now.iter().all(|owner| owners.contains(owner)) {
            return Ok(());
        }
        // One was taken meanwhile.
        owners = now;
    }
}

async fn owners(
    store: &PgStore,
    connection: &mut sqlx::PgConnection,
    sql: String,
    subscriptions: &[i32],
    levels: &[i16],
) -> Result<Vec<Uuid>, Error> {
    let rows = store.dynamic(sql).bind(subscriptions).bind(levels).fetch_all(connection).await?;
    Ok(rows
        .iter()
        .map(|row| row.try_get("owner"))
        .collect::<Result<Vec<Option<Uuid>>, _>>()?
        .into_iter()
        .flatten()
        .collect())
}

/// All lanes of a subscription.
pub(super) fn all(subscription: SubscriptionId) -> Vec<Lane> {
    (FIRST_LANE..FIRST_LANE + LANES).map(|level| (subscription, level)).collect()
}
