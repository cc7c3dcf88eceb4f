//! Registering a worker with its subscriptions, and its sign of life.

use sqlx::SqliteConnection;
use uuid::Uuid;

use super::alive::Locked;
use super::{SqliteStore, json_of, lanes, limits, millis, millis_up, unique};
use crate::error::Error;
use crate::keys::Keys;
use crate::lifecycle::Kind;
use crate::retention;
use crate::store::{Declared, Pulse, Registration, Start, SubscriptionId};

pub(super) async fn register(store: &SqliteStore, registration: &Registration) -> Result<Vec<SubscriptionId>, Error> {
    // Locked before it is on record: a row without a lock would be taken for dead.
    let lock = store.shared.alive.lock(registration.worker)?;
    let mut work = store.write().await?;
    let ids = route(work.on(), &registration.application, &registration.subscriptions).await?;
    enlist(work.on(), registration, &ids, &lock).await?;
    work.commit().await?;
    store.shared.alive.keep(registration.worker, lock);
    Ok(ids)
}

/// The same without a worker.
pub(super) async fn declare(
    store: &SqliteStore,
    application: &str,
    subscriptions: &[Declared],
) -> Result<Vec<SubscriptionId>, Error> {
    let mut work = store.write().await?;
    let ids = route(work.on(), application, subscriptions).await?;
    work.commit().await?;
    Ok(ids)
}

/// Finds or makes the subscriptions, and moves the routing epoch on if publishers must fan out anew.
async fn route(
    db: &mut SqliteConnection,
    application: &str,
    subscriptions: &[Declared],
) -> Result<Vec<SubscriptionId>, Error> {
    // All of them as they are stored before anything is renamed: their order does not count.
    let stored = recognise(db, application, subscriptions).await?;
    let epoch: i64 = sqlx::query_scalar("select epoch from postbox_routing").fetch_one(&mut *db).await?;
    let mut ids = Vec::with_capacity(subscriptions.len());
    let mut rerouted = false;
    for (declared, stored) in subscriptions.iter().zip(stored) {
        let (id, changed) = subscribe(db, application, declared, stored, epoch + 1).await?;
        limits::declare(db, id, &declared.limits).await?;
        if declared.keys.is_some() {
            lanes::declare(db, id).await?;
        }
        unique::declare(db, id, declared).await?;
        ids.push(id);
        rerouted |= changed;
    }
    if rerouted {
        sqlx::query("update postbox_routing set epoch = ?1").bind(epoch + 1).execute(db).await?;
    }
    Ok(ids)
}

/// Goes on under a new id: the worker's row and lock, and nothing else.
pub(super) async fn revive(
    store: &SqliteStore,
    registration: &Registration,
    subscriptions: &[SubscriptionId],
) -> Result<(), Error> {
    let lock = store.shared.alive.lock(registration.worker)?;
    let mut work = store.write().await?;
    enlist(work.on(), registration, subscriptions, &lock).await?;
    work.commit().await?;
    store.shared.alive.keep(registration.worker, lock);
    Ok(())
}

/// Writes the worker's row.
async fn enlist(
    db: &mut SqliteConnection,
    registration: &Registration,
    subscriptions: &[SubscriptionId],
    lock: &Locked,
) -> Result<(), Error> {
    sqlx::query(
        "insert into postbox_worker (id, name, application, subscriptions, idempotent, lease_ms, lock_file, started_at)
         select ?1, ?2, ?3, ?4, ?7, ?5, ?6, now from postbox_clock",
    )
    .bind(registration.worker)
    .bind(&registration.name)
    .bind(&registration.application)
    .bind(json_of(subscriptions)?)
    .bind(millis(registration.lease))
    .bind(lock.name())
    .bind(json_of(&registration.idempotent(subscriptions))?)
    .execute(db)
    .await?;
    Ok(())
}

row! {
    /// A subscription under which a declared one is stored already.
    struct Known {
        id: SubscriptionId,
        name: String,
        pattern: String,
        kind: String,
        by_key: bool,
    }
}

/// What each declared subscription is stored as, if it is; refused where that would mix things up.
async fn recognise(
    db: &mut SqliteConnection,
    application: &str,
    declared: &[Declared],
) -> Result<Vec<Option<Known>>, Error> {
    let mut stored = Vec::with_capacity(declared.len());
    for one in declared {
        let known = known(db, application, one).await?;
        if let Some(known) = &known
            && known.kind == Kind::Operation.as_str()
            && one.policy.kind != Kind::Operation
        {
            return Err(Error::Refused(format!(
                "the subscription `{}` is an operation: an attempt of it that may have happened must not be taken for a plain one; give the new handler another name, and remove the old one with `postbox subscriptions remove` when nothing of it is left",
                known.name
            )));
        }
        // One that is renamed may not take a name from another that still goes by it, stored or new.
        if known.as_ref().is_none_or(|k| k.name != one.name)
            && let Some(former) = one.renamed_from.iter().find(|former| {
                known.as_ref().is_some_and(|k| k.name == **former)
                    || declared.iter().any(|other| other.name == **former)
            })
            && let Some(other) = declared.iter().find(|other| other.name == *former && other.name != one.name)
        {
            return Err(same(&one.name, &other.name));
        }
        stored.push(known);
    }
    // Two that were both renamed from a third.
    for (at, one) in stored.iter().enumerate() {
        let twin = stored[..at].iter().position(|s| matches!((s, one), (Some(s), Some(one)) if s.id == one.id));
        if let Some(twin) = twin {
            return Err(same(&declared[twin].name, &declared[at].name));
        }
    }
    Ok(stored)
}

fn same(one: &str, other: &str) -> Error {
    Error::Refused(format!(
        "the subscriptions `{one}` and `{other}` are the same stored one (`renamed_from`); a name that is still in use cannot be renamed"
    ))
}

/// Its own name counts first, then those it had before.
async fn known(db: &mut SqliteConnection, application: &str, declared: &Declared) -> Result<Option<Known>, Error> {
    let mut names = vec![declared.name.as_str()];
    names.extend(declared.renamed_from.iter().map(String::as_str));
    let found: Vec<Known> = sqlx::query_as(
        "select s.id, s.name, s.pattern, s.kind, s.per_key is not null as by_key
         from json_each(?2) n join postbox_subscription s on s.application = ?1 and s.name = n.value
         where s.removed_at is null order by n.key",
    )
    .bind(application)
    .bind(json_of(&names)?)
    .fetch_all(db)
    .await?;
    let mut found = found.into_iter();
    let known = found.next();
    declared.tell_of_former(&found.map(|former| former.name).collect::<Vec<_>>());
    Ok(known)
}

/// A subscription may begin to deliver by key when nothing of it is unfinished, and does not end to.
async fn by_key_changes(db: &mut SqliteConnection, id: SubscriptionId, name: &str, was: bool) -> Result<(), Error> {
    if was {
        return Err(Keys::for_good(name));
    }
    let unfinished: bool = sqlx::query_scalar(
        "select exists (select 1 from postbox_delivery d
                 where d.subscription = ?1 and d.state in ('pending', 'running', 'in_doubt'))
             or exists (select 1 from postbox_held h where h.subscription = ?1)",
    )
    .bind(id)
    .fetch_one(db)
    .await?;
    if unfinished { Err(Keys::too_late(name)) } else { Ok(()) }
}

/// Renames, changes or makes one subscription; whether publishers must fan out anew.
async fn subscribe(
    connection: &mut SqliteConnection,
    application: &str,
    declared: &Declared,
    stored: Option<Known>,
    next_epoch: i64,
) -> Result<(SubscriptionId, bool), Error> {
    let segments = json_of(&declared.pattern.segments().collect::<Vec<_>>())?;
    let retry = declared.policy.retry;
    let (keep_succeeded, keep_dead) = retention::stored(declared.policy.kind, declared.keep);
    let per_key = declared.keys.map(Keys::at_once);
    let on_dead = declared.keys.and_then(Keys::on_dead);
    if let Some(Known { id, name, pattern, by_key, .. }) = stored {
        if by_key != declared.keys.is_some() {
            by_key_changes(connection, id, &name, by_key).await?;
        }
        let changed = pattern != declared.pattern.as_str();
        // A changed pattern takes the unrouted messages that only the new one matches. A scan of history
        // that is not done goes on with the pattern it began with (decision 0020).
        sqlx::query(
            "update postbox_subscription
             set name = ?2, kind = ?3, max_attempts = ?4, retry_base_ms = ?5, retry_cap_ms = ?6, reconciles = ?7,
                 continues = ?8, pattern = ?9, segments = ?10,
                 epoch = case when ?11 then ?12 else epoch end,
                 start = case when ?11 then 'unrouted' else start end,
                 backfilled = case when ?11 then false else backfilled end,
                 backfill_after = case when ?11 then 0 else backfill_after end,
                 timeout_ms = ?13, quiet_ms = ?14, keep_succeeded_ms = ?15, keep_dead_ms = ?16, idempotent = ?17,
                 per_key = ?18, ordered = ?19, on_dead = ?20
             where id = ?1",
        )
        .bind(id)
        .bind(&declared.name)
        .bind(declared.policy.kind.as_str())
        .bind(i32::try_from(retry.max_attempts).unwrap_or(i32::MAX))
        .bind(millis(retry.base))
        .bind(millis(retry.cap))
        .bind(declared.reconciles)
        .bind(declared.continues)
        .bind(declared.pattern.as_str())
        .bind(segments)
        .bind(changed)
        .bind(next_epoch)
        .bind(millis_up(declared.timeout))
        .bind(millis_up(declared.quiet))
        .bind(keep_succeeded)
        .bind(keep_dead)
        .bind(declared.policy.repeats())
        .bind(per_key)
        .bind(on_dead.is_some())
        .bind(on_dead.unwrap_or_default().as_str())
        .execute(connection)
        .await?;
        return Ok((id, changed));
    }
    let (start, start_at) = match declared.start {
        Start::Unrouted => ("unrouted", None),
        Start::Now => ("now", None),
        Start::Beginning => ("beginning", None),
        Start::Time(time) => ("time", Some(time.as_millisecond())),
    };
    let id = sqlx::query_scalar(
        "insert into postbox_subscription (application, name, pattern, segments, kind, max_attempts, retry_base_ms,
             retry_cap_ms, reconciles, continues, start, start_at, epoch, backfilled, timeout_ms,
             quiet_ms, keep_succeeded_ms, keep_dead_ms, scan_pattern, scan_segments, scan_epoch, idempotent, per_key, ordered, on_dead,
             created_at)
         select ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?11 = 'now', ?14, ?15, ?16, ?17,
             case when ?11 in ('beginning', 'time') then ?3 end, case when ?11 in ('beginning', 'time') then ?4 end,
             case when ?11 in ('beginning', 'time') then ?13 end, ?18, ?19, ?20, ?21, now
         from postbox_clock
         returning id",
    )
    .bind(application)
    .bind(&declared.name)
    .bind(declared.pattern.as_str())
    .bind(segments)
    .bind(declared.policy.kind.as_str())
    .bind(i32::try_from(retry.max_attempts).unwrap_or(i32::MAX))
    .bind(millis(retry.base))
    .bind(millis(retry.cap))
    .bind(declared.reconciles)
    .bind(declared.continues)
    .bind(start)
    .bind(start_at)
    .bind(next_epoch)
    .bind(millis_up(declared.timeout))
    .bind(millis_up(declared.quiet))
    .bind(keep_succeeded)
    .bind(keep_dead)
    .bind(declared.policy.repeats())
    .bind(per_key)
    .bind(on_dead.is_some())
    .bind(on_dead.unwrap_or_default().as_str())
    .fetch_one(connection)
    .await?;
    Ok((id, true))
}

/// Reads only: a handler that holds the writer for long keeps nobody from living.
pub(super) async fn beat(store: &SqliteStore, worker: Uuid) -> Result<Option<Pulse>, Error> {
    let rows: Vec<(Option<Uuid>,)> = sqlx::query_as(
        "select l.token from postbox_worker w left join postbox_lease l on l.worker = w.id where w.id = ?1",
    )
    .bind(worker)
    .fetch_all(&store.reader)
    .await?;
    Ok((!rows.is_empty()).then(|| Pulse { tokens: rows.into_iter().filter_map(|(token,)| token).collect() }))
}

/// A worker that ends: its row goes if it holds nothing; otherwise its life ends now, and what it
/// holds is taken over.
pub(super) async fn retire(store: &SqliteStore, worker: Uuid) -> Result<(), Error> {
    let mut work = store.write().await?;
    let gone = sqlx::query(
        "delete from postbox_worker
         where id = ?1 and not exists (select 1 from postbox_lease l where l.worker = postbox_worker.id)",
    )
    .bind(worker)
    .execute(work.on())
    .await?
    .rows_affected();
    let left: i64 = sqlx::query_scalar("select count(*) from postbox_worker where id = ?1")
        .bind(worker)
        .fetch_one(work.on())
        .await?;
    work.commit().await?;
    store.shared.alive.let_go(worker, gone > 0 || left == 0);
    Ok(())
}
