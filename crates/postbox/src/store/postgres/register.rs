//! Registering a worker with its subscriptions, and giving new subscriptions their history.

use sqlx::Row;
use uuid::Uuid;

use super::{PgStore, Work, lanes, limits, millis, retain, unique};
use crate::error::Error;
use crate::keys::Keys;
use crate::lifecycle::Kind;
use crate::planted::planted;
use crate::retention;
use crate::store::{Declared, Registration, Start, SubscriptionId};

pub(super) async fn register(store: &PgStore, registration: &Registration) -> Result<Vec<SubscriptionId>, Error> {
    let mut work = store.work().await?;
    let ids = route(store, &mut work, &registration.application, &registration.subscriptions).await?;
    enlist(store, &mut work, registration, &ids).await?;
    work.commit().await?;
    Ok(ids)
}

/// The same without a worker.
pub(super) async fn declare(
    store: &PgStore,
    application: &str,
    subscriptions: &[Declared],
) -> Result<Vec<SubscriptionId>, Error> {
    let mut work = store.work().await?;
    let ids = route(store, &mut work, application, subscriptions).await?;
    work.commit().await?;
    Ok(ids)
}

/// Finds or makes the subscriptions, and moves the routing epoch on if publishers must fan out anew.
async fn route(
    store: &PgStore,
    work: &mut Work,
    application: &str,
    subscriptions: &[Declared],
) -> Result<Vec<SubscriptionId>, Error> {
    for heir in subscriptions {
        let in_use = |other: &&Declared| other.name != heir.name && heir.renamed_from.contains(&other.name);
        if let Some(other) = subscriptions.iter().find(in_use) {
            return Err(same_stored(&other.name, &heir.name));
        }
    }
    if let Some(ids) = unchanged(store, work, application, subscriptions).await? {
        return Ok(ids);
    }
    // One registration at a time: the routing row is locked first.
    let sql = format!("select epoch, channel from {}.routing for update", store.schema);
    let routing = store.dynamic(sql).fetch_one(work.on()).await?;
    let epoch: i64 = routing.try_get("epoch")?;
    if routing.try_get::<String, _>("channel")? != store.channel {
        let sql = format!("update {}.routing set channel = $1", store.schema);
        store.dynamic(sql).bind(&store.channel).execute(work.on()).await?;
    }
    let mut ids = Vec::with_capacity(subscriptions.len());
    let mut rerouted = false;
    for declared in subscriptions {
        let (id, changed) = subscribe(store, work, application, declared, epoch + 1).await?;
        limits::declare(store, work, id, &declared.limits).await?;
        if declared.keys.is_some() {
            lanes::declare(store, work, id).await?;
        }
        rerouted |= unique::declare(store, work, id, declared).await?;
        if let Some(other) = ids.iter().position(|known| *known == id) {
            return Err(same_stored(&subscriptions[other].name, &declared.name));
        }
        ids.push(id);
        rerouted |= changed;
    }
    if rerouted {
        let sql = format!("update {}.routing set epoch = $1", store.schema);
        store.dynamic(sql).bind(epoch + 1).execute(work.on()).await?;
    }
    Ok(ids)
}

/// The ids, if everything is stored as it is declared. Then the routing row is left alone: a restart
/// does not wait for publishers of a strict isolation, who share it until they end.
async fn unchanged(
    store: &PgStore,
    work: &mut Work,
    application: &str,
    subscriptions: &[Declared],
) -> Result<Option<Vec<SubscriptionId>>, Error> {
    let sql = format!(
        "select s.id from {0}.subscription s cross join {0}.routing r
         left join {0}.flow_limit f on f.subscription = s.id
         left join {0}.one_per_key u on u.subscription = s.id
         where s.application = $1 and s.name = $2 and s.kind = $3 and s.max_attempts = $4 and s.retry_base_ms = $5
             and s.retry_cap_ms = $6 and s.reconciles = $7 and s.continues = $8 and s.pattern = $9 and s.timeout_ms = $10
             and s.quiet_ms = $11 and s.keep_succeeded_ms = $12 and s.keep_dead_ms = $13 and s.idempotent = $14
             and s.removed_at is null and r.channel = $15 and f.at_once is not distinct from $16
             and f.token_us is not distinct from $17 and f.burst is not distinct from $18
             and s.per_key is not distinct from $19 and s.ordered = $20 and s.on_dead = $21
             and u.policy is not distinct from $22",
        store.schema
    );
    let mut ids = Vec::with_capacity(subscriptions.len());
    for declared in subscriptions {
        let policy = declared.policy;
        let (keep_succeeded, keep_dead) = retention::stored(policy.kind, declared.keep);
        let (at_once, token_us, burst) = limits::stored(&declared.limits);
        let keys = by_key(declared.keys);
        let found = store
            .dynamic(sql.clone())
            .bind(application)
            .bind(&declared.name)
            .bind(policy.kind.as_str())
            .bind(policy.retry.max_attempts as i32)
            .bind(millis(policy.retry.base))
            .bind(millis(policy.retry.cap))
            .bind(declared.reconciles)
            .bind(declared.continues)
            .bind(declared.pattern.as_str())
            .bind(millis(declared.timeout))
            .bind(millis(declared.quiet))
            .bind(keep_succeeded)
            .bind(keep_dead)
            .bind(policy.repeats())
            .bind(&store.channel)
            .bind(at_once)
            .bind(token_us)
            .bind(burst)
            .bind(keys.0)
            .bind(keys.1)
            .bind(keys.2)
            .bind(declared.unique.map(|unique| unique.as_str()))
            .fetch_optional(work.on())
            .await?;
        match found {
            Some(row) => ids.push(row.try_get("id")?),
            None => return Ok(None),
        }
    }
    // With none to find, nothing was compared.
    Ok((!ids.is_empty()).then_some(ids))
}

fn same_stored(one: &str, other: &str) -> Error {
    Error::Refused(format!(
        "the subscriptions `{one}` and `{other}` are the same stored one (`renamed_from`); a name that is still in use cannot be renamed"
    ))
}

/// Writes the worker's row.
pub(super) async fn enlist(
    store: &PgStore,
    work: &mut Work,
    registration: &Registration,
    ids: &[SubscriptionId],
) -> Result<(), Error> {
    let sql = format!(
        "insert into {}.worker (id, name, application, subscriptions, idempotent, lease_ms, expires_at)
         values ($1, $2, $3, $4, $6, $5, pg_catalog.clock_timestamp() + interval '1 millisecond' * $5::bigint::double precision)",
        store.schema
    );
    store
        .dynamic(sql)
        .bind(registration.worker)
        .bind(&registration.name)
        .bind(&registration.application)
        .bind(ids.to_vec())
        .bind(millis(registration.lease))
        .bind(registration.idempotent(ids))
        .execute(work.on())
        .await?;
    Ok(())
}

/// What holds for a key, as it is stored: how many at once, whether in order, and what a dead one does to its key.
fn by_key(keys: Option<Keys>) -> (Option<i32>, bool, &'static str) {
    let on_dead = keys.and_then(Keys::on_dead);
    let at_once = keys.map(|keys| i32::try_from(keys.at_once()).unwrap_or(i32::MAX));
    (at_once, on_dead.is_some(), on_dead.unwrap_or_default().as_str())
}

/// A subscription may begin to deliver by key when nothing of it is unfinished, and does not end to.
async fn by_key_changes(
    store: &PgStore,
    work: &mut Work,
    id: SubscriptionId,
    name: &str,
    was: bool,
) -> Result<(), Error> {
    if was {
        return Err(Keys::for_good(name));
    }
    let sql = format!(
        "select exists (select from {0}.ready r where r.subscription = $1)
            or exists (select from {0}.scheduled r where r.subscription = $1)
            or exists (select from {0}.doubt r where r.subscription = $1)
            or exists (select from {0}.leased r where r.subscription = $1) as unfinished",
        store.schema
    );
    let row = store.dynamic(sql).bind(id).fetch_one(work.on()).await?;
    if row.try_get("unfinished")? { Err(Keys::too_late(name)) } else { Ok(()) }
}

/// Finds, renames, changes or makes one subscription; whether publishers must fan out anew.
async fn subscribe(
    store: &PgStore,
    work: &mut Work,
    application: &str,
    declared: &Declared,
    next_epoch: i64,
) -> Result<(SubscriptionId, bool), Error> {
    let mut names = vec![declared.name.clone()];
    names.extend(declared.renamed_from.iter().cloned());
    let sql = format!(
        "select s.id, s.name, s.pattern, s.kind, s.per_key is not null as by_key from {}.subscription s
         where s.application = $1 and s.name = any ($2) and s.removed_at is null
         order by pg_catalog.array_position($2, s.name)",
        store.schema
    );
    let mut rows = store.dynamic(sql).bind(application).bind(&names).fetch_all(work.on()).await?.into_iter();
    let found = rows.next();
    declared.tell_of_former(&rows.map(|row| row.try_get("name")).collect::<Result<Vec<String>, _>>()?);
    let policy = declared.policy;
    let (keep_succeeded, keep_dead) = retention::stored(policy.kind, declared.keep);
    let keys = by_key(declared.keys);
    if let Some(row) = found {
        let id: SubscriptionId = row.try_get("id")?;
        let kind: String = row.try_get("kind")?;
        if kind == Kind::Operation.as_str() && policy.kind != Kind::Operation {
            return Err(Error::Refused(format!(
                "the subscription `{}` is an operation: an attempt of it that may have happened must not be taken for a plain one; give the new handler another name, and remove the old one with `postbox subscriptions remove` when nothing of it is left",
                row.try_get::<String, _>("name")?
            )));
        }
        let was_by_key: bool = row.try_get("by_key")?;
        if was_by_key != declared.keys.is_some() {
            by_key_changes(store, work, id, &row.try_get::<String, _>("name")?, was_by_key).await?;
        }
        let changed = row.try_get::<String, _>("pattern")? != declared.pattern.as_str();
        let rerouted = changed || was_by_key != declared.keys.is_some();
        // A changed pattern takes the unrouted messages that only the new one matches. A scan of history
        // that is not done goes on with the pattern it began with (decision 0020).
        let sql = format!(
            "update {}.subscription set name = $2, kind = $3, max_attempts = $4, retry_base_ms = $5, retry_cap_ms = $6,
                 reconciles = $7, continues = $8, pattern = $9, matcher = $10,
                 epoch = case when $11 then $12 else epoch end,
                 start = case when $11 then 'unrouted' else start end,
                 backfilled = case when $11 then false else backfilled end,
                 backfill_waits = case when $11 then null else backfill_waits end,
                 timeout_ms = $13, quiet_ms = $14, keep_succeeded_ms = $15, keep_dead_ms = $16, idempotent = $17,
                 per_key = $18, ordered = $19, on_dead = $20
             where id = $1",
            store.schema
        );
        store
            .dynamic(sql)
            .bind(id)
            .bind(&declared.name)
            .bind(policy.kind.as_str())
            .bind(policy.retry.max_attempts as i32)
            .bind(millis(policy.retry.base))
            .bind(millis(policy.retry.cap))
            .bind(declared.reconciles)
            .bind(declared.continues)
            .bind(declared.pattern.as_str())
            .bind(declared.pattern.to_regex())
            .bind(changed)
            .bind(next_epoch)
            .bind(millis(declared.timeout))
            .bind(millis(declared.quiet))
            .bind(keep_succeeded)
            .bind(keep_dead)
            .bind(policy.repeats())
            .bind(keys.0)
            .bind(keys.1)
            .bind(keys.2)
            .execute(work.on())
            .await?;
        return Ok((id, rerouted));
    }
    let (start, start_us) = match declared.start {
        Start::Unrouted => ("unrouted", None),
        Start::Now => ("now", None),
        Start::Beginning => ("beginning", None),
        Start::Time(time) => ("time", Some(time.as_microsecond())),
    };
    let sql = format!(
        "insert into {}.subscription (application, name, pattern, matcher, kind, max_attempts, retry_base_ms, retry_cap_ms,
             reconciles, continues, start, start_at, epoch, backfilled, timeout_ms, quiet_ms, keep_succeeded_ms, keep_dead_ms,
             scan_matcher, scan_epoch, idempotent, per_key, ordered, on_dead)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, pg_catalog.to_timestamp($12::bigint::double precision / 1000000::double precision), $13, $11 = 'now', $14, $15, $16, $17,
             case when $11 in ('beginning', 'time') then $4 end, case when $11 in ('beginning', 'time') then $13::bigint end, $18, $19, $20, $21)
         returning id",
        store.schema
    );
    let row = store
        .dynamic(sql)
        .bind(application)
        .bind(&declared.name)
        .bind(declared.pattern.as_str())
        .bind(declared.pattern.to_regex())
        .bind(policy.kind.as_str())
        .bind(policy.retry.max_attempts as i32)
        .bind(millis(policy.retry.base))
        .bind(millis(policy.retry.cap))
        .bind(declared.reconciles)
        .bind(declared.continues)
        .bind(start)
        .bind(start_us)
        .bind(next_epoch)
        .bind(millis(declared.timeout))
        .bind(millis(declared.quiet))
        .bind(keep_succeeded)
        .bind(keep_dead)
        .bind(policy.repeats())
        .bind(keys.0)
        .bind(keys.1)
        .bind(keys.2)
        .fetch_one(work.on())
        .await?;
    Ok((row.try_get("id")?, true))
}

/// Notices a promoted standby or a restored backup, and flags the operations that had begun before.
pub(super) async fn suspect(store: &PgStore, worker: Uuid) -> Result<(), Error> {
    let mut work = store.work().await?;
    let cluster = "select s.system_identifier::pg_catalog.text || '/'
            || pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) as cluster
         from pg_catalog.pg_control_system() s";
    let cluster: String = store.query(cluster).fetch_one(work.on()).await?.try_get("cluster")?;
    let moved = store.query(store.sql.suspects).bind(&cluster).bind(worker).fetch_optional(work.on()).await?;
    work.commit().await?;
    if let Some(row) = moved
        && let Some(before) = row.try_get::<Option<String>, _>("before")?
    {
        let suspects: i64 = row.try_get("suspects")?;
        tracing::warn!(
            before,
            now = cluster,
            suspects,
            "the server is on another timeline; operations begun before are suspect"
        );
    }
    Ok(())
}

/// Messages looked at in one page of history.
const PAGE: i64 = 1000;

/// One bounded piece of the new subscriptions' history; `true` when there may be more.
pub(super) async fn backfill(store: &PgStore) -> Result<bool, Error> {
    let mut work = store.work().await?;
    let sql = format!(
        "select s.id, s.scan_matcher is not null as scans, s.backfill_after, s.backfill_waits from {0}.subscription s
         where not s.backfilled and s.removed_at is null
             and s.id = (select pg_catalog.min(n.id) from {0}.subscription n where not n.backfilled and n.removed_at is null)
         for update skip locked",
        store.schema
    );
    let Some(row) = store.dynamic(sql).fetch_optional(work.on()).await? else {
        work.rollback().await?;
        return Ok(false);
    };
    let id: SubscriptionId = row.try_get("id")?;
    let history: bool = row.try_get("scans")?;

    retain::hold_messages(store, &mut work).await?;
    // Unrouted messages can be moved at any time: each leaves its row.
    let moved: i64 = store.query(store.sql.unrouted).fetch_one(work.on()).await?.try_get("moved")?;
    if moved > 0 {
        work.commit().await?;
        return Ok(true);
    }
    // The rest waits until nobody can commit a message of an older epoch any more.
    let holders: Vec<String> = store
        .query(store.sql.lock_holders)
        .fetch_all(work.on())
        .await?
        .iter()
        .filter(|_| !planted!("backfill-without-waiting"))
        .map(|r| r.try_get("holder"))
        .collect::<Result<_, _>>()?;
    let waits: Vec<String> = match row.try_get::<Option<Vec<String>>, _>("backfill_waits")? {
        // A transaction that was prepared for a two-phase commit goes on under another name (-1/xid).
        Some(waits) => {
            let mut waits: Vec<String> = waits.into_iter().filter(|w| holders.contains(w)).collect();
            waits.extend(holders.iter().filter(|h| h.starts_with("-1/")).cloned());
            waits.sort_unstable();
            waits.dedup();
            waits
        }
        None => {
            // The first look after the registration committed; one more look at the unrouted follows.
            remember(store, &mut work, id, &holders).await?;
            work.commit().await?;
            return Ok(true);
        }
    };
    if !waits.is_empty() {
        remember(store, &mut work, id, &waits).await?;
        work.commit().await?;
        return Ok(false);
    }
    let last: Option<Uuid> = match history {
        true => {
            let after: Uuid = row.try_get::<Option<Uuid>, _>("backfill_after")?.unwrap_or(Uuid::nil());
            let page = store.query(store.sql.history).bind(id).bind(after).bind(PAGE).fetch_optional(work.on()).await?;
            page.map(|r| r.try_get("last")).transpose()?
        }
        // Everything committed by now; was there anything left unrouted after the last holder ended?
        false => None,
    };
    let more = match last {
        Some(last) => {
            let sql = format!("update {}.subscription set backfill_after = $2 where id = $1", store.schema);
            store.dynamic(sql).bind(id).bind(last).execute(work.on()).await?;
            true
        }
        None => {
            // Decided by what is there, not by what a statement of ours moved: another may have been first.
            let sql = format!(
                "update {0}.subscription s set scan_matcher = null, scan_epoch = null, backfilled = true, backfill_waits = null
                 where s.id = $1
                     and not exists (select from {0}.unrouted u
                         where s.start = 'unrouted' and u.epoch < s.epoch and u.topic ~ s.matcher)
                     and not exists (select from {0}.unrouted u
                         where u.epoch < s.scan_epoch and u.topic ~ s.scan_matcher
                             and (s.start_at is null or {0}.minted_at(u.message) >= s.start_at))",
                store.schema
            );
            store.dynamic(sql).bind(id).execute(work.on()).await?;
            true
        }
    };
    work.commit().await?;
    Ok(more)
}

async fn remember(store: &PgStore, work: &mut Work, id: SubscriptionId, waits: &[String]) -> Result<(), Error> {
    let sql = format!("update {}.subscription set backfill_waits = $2 where id = $1", store.schema);
    store.dynamic(sql).bind(id).bind(waits.to_vec()).execute(work.on()).await?;
    Ok(())
}
