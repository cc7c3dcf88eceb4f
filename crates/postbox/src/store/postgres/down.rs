//! Going back: one migration a transaction, and never past messages that somebody may still want.

use sqlx::Row;

use super::migrate::{MIGRATIONS, applied, down, lock, newer, tail};
use super::{PgStore, Work};
use crate::error::Error;
use crate::store::down::{Holdings, Loss, too_far};

pub(super) async fn to(store: &PgStore, version: u32, loss: Loss) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    loop {
        let mut work = store.work().await?;
        lock(store, &mut work).await?;
        // Whoever is slow to commit is waited for, not for ever: others queue behind us.
        sqlx::raw_sql("set local lock_timeout = '5s'").execute(work.on()).await?;
        let done = applied(store, &mut work).await?.len();
        if done > MIGRATIONS.len() {
            return Err(newer(store, done));
        }
        if names.is_empty() && version as usize > done {
            return Err(too_far(&store.schema, done as u32, version));
        }
        let Some(migration) = done.checked_sub(1).filter(|_| done > version as usize).map(|n| &MIGRATIONS[n]) else {
            work.rollback().await?;
            return Ok(names);
        };
        if loss == Loss::Refused {
            // The first step speaks for all: nobody wants to learn half-way that it cannot go on.
            let leaves = &MIGRATIONS[version as usize..done];
            let holds_data = leaves.iter().any(|m| m.holds_data);
            let (schedules, inbox) =
                (leaves.iter().any(|m| m.name == "schedules"), leaves.iter().any(|m| m.name == "inbox"));
            if let Some(refused) = refusal(store, &mut work, version, (holds_data, schedules, inbox)).await? {
                work.rollback().await?;
                return Err(refused);
            }
        }
        let mut sql = down(migration, done, &store.schema);
        sql.push_str(&match done {
            1 => tail(&store.schema),
            _ => format!("delete from {}.migration where version = {done};", store.schema),
        });
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(work.on()).await?;
        work.commit().await?;
        names.push(format!("{done:04} {}", migration.name));
    }
}

/// Why it must not go on: live workers, or messages. Nobody publishes between this look and the drop.
async fn refusal(
    store: &PgStore,
    work: &mut Work,
    to: u32,
    (holds_data, schedules, inbox): (bool, bool, bool),
) -> Result<Option<Error>, Error> {
    let schema = &store.schema;
    let sql = format!(
        "select pg_catalog.count(*) as alive from {schema}.worker w where w.expires_at > pg_catalog.clock_timestamp()"
    );
    let mut held =
        Holdings { workers: store.dynamic(sql).fetch_one(work.on()).await?.try_get("alive")?, ..Holdings::default() };
    if schedules && held.workers == 0 {
        let sql = format!("select pg_catalog.count(*) as schedules from {schema}.schedule");
        held.schedules = store.dynamic(sql).fetch_one(work.on()).await?.try_get("schedules")?;
    }
    if inbox && held.workers == 0 {
        let sql = format!(
            "select pg_catalog.count(*) as quarantined from (select from {schema}.quarantine q where q.ended_at is null limit 100001) q"
        );
        held.quarantined = store.dynamic(sql).fetch_one(work.on()).await?.try_get("quarantined")?;
    }
    if holds_data && held.workers == 0 {
        // In the order in which publishing locks them.
        let sql = format!("lock table {schema}.routing, {schema}.dedup, {schema}.message in access exclusive mode");
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(work.on()).await?;
        let sql = format!(
            "select (select pg_catalog.count(*) from (select from {schema}.message limit 100001) m) as messages,
                (select pg_catalog.count(*) from (select from {schema}.doubt limit 100001) d) as in_doubt,
                (select pg_catalog.count(*) from (select from {schema}.ready limit 100001) r)
                + (select pg_catalog.count(*) from (select from {schema}.scheduled limit 100001) s)
                + (select pg_catalog.count(*) from {schema}.leased l) as waiting"
        );
        let row = store.dynamic(sql).fetch_one(work.on()).await?;
        held.messages = row.try_get("messages")?;
        held.in_doubt = row.try_get("in_doubt")?;
        held.unfinished = row.try_get::<i64, _>("waiting")? + held.in_doubt;
    }
    Ok(held.refusal(schema, to))
}
