//! The roles: made and given their rights by the same SQL as the migration's.

use sqlx::Row;

use super::{PgStore, Work, migrate};
use crate::admin::RoleRow;
use crate::error::Error;

/// Whether this role publishes with the library's statement; otherwise through the function.
pub(super) async fn may_insert(store: &PgStore) -> Result<bool, Error> {
    let mut work = store.read().await?;
    // Not by name: a role that may not use the schema is told so when it publishes. Before there is a
    // schema, whoever makes it may.
    let sql = "select pg_catalog.has_table_privilege(c.oid, 'insert') as may
         from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
         where n.nspname = $1 and c.relname = 'message'";
    let row = store.query(sql).bind(&store.schema).fetch_optional(work.on()).await?;
    work.rollback().await?;
    row.map_or(Ok(true), |row| Ok(row.try_get("may")?))
}

pub(super) async fn roles(store: &PgStore) -> Result<Vec<RoleRow>, Error> {
    let mut work = store.read().await?;
    let found = look(store, &mut work).await?;
    work.rollback().await?;
    Ok(found)
}

async fn look(store: &PgStore, work: &mut Work) -> Result<Vec<RoleRow>, Error> {
    let sql = "select pg_catalog.concat($1::pg_catalog.text, '_', k.kind) as name,
            exists (select from pg_catalog.pg_roles r
                where r.rolname = pg_catalog.concat($1::pg_catalog.text, '_', k.kind)::pg_catalog.name) as found
         from pg_catalog.unnest(array['publisher', 'worker', 'operator', 'viewer']) with ordinality as k(kind, ord)
         order by k.ord";
    let rows = store.query(sql).bind(&store.schema).fetch_all(work.on()).await?;
    rows.iter().map(|row| Ok(RoleRow { name: row.try_get("name")?, exists: row.try_get("found")? })).collect()
}

pub(super) async fn grant(store: &PgStore) -> Result<Vec<RoleRow>, Error> {
    let mut work = store.work().await?;
    migrate::lock(store, &mut work).await?;
    sqlx::raw_sql(store.sql.roles).execute(work.on()).await?;
    let roles = look(store, &mut work).await?;
    work.commit().await?;
    let missing: Vec<&str> = roles.iter().filter(|r| !r.exists).map(|r| r.name.as_str()).collect();
    if missing.is_empty() {
        return Ok(roles);
    }
    Err(Error::Refused(format!(
        "this login may not create roles, and {} {} not there; those that are there have their rights. Let somebody who may run: create role {} nologin; and then `postbox migrate roles` again",
        missing.join(", "),
        if missing.len() == 1 { "is" } else { "are" },
        missing.join(" nologin; create role "),
    )))
}
