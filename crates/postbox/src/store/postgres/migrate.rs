//! Numbered migrations, embedded; applied in one transaction each, or printed for another tool.

use sqlx::Row;

use super::{PgStore, Work, timestamp};
use crate::admin::MigrationStatus;
use crate::crash;
use crate::error::Error;
use crate::settings::plain_name;

/// Version and name are the position and the file's.
const MIGRATIONS: [(&str, &str); 1] = [("engine", include_str!("migrations/0001_engine.sql"))];

fn render(text: &str, schema: &str, channel: &str) -> String {
    let publish = include_str!("publish.sql");
    text.replace("{publish}", publish).replace("{schema}", schema).replace("{channel}", channel)
}

fn head(schema: &str) -> String {
    format!(
        "create schema if not exists {schema};\n\
         create table if not exists {schema}.migration (\n    \
             version int primary key,\n    \
             name text not null,\n    \
             applied_at timestamptz not null default pg_catalog.clock_timestamp()\n);\n"
    )
}

fn record(schema: &str, version: usize, name: &str) -> String {
    format!("insert into {schema}.migration (version, name) values ({version}, '{name}');\n")
}

/// All migrations for a schema as one SQL text, for the user's own migration tool.
///
/// # Errors
/// The schema's name is not `^[a-z_][a-z0-9_]{0,47}$`.
pub fn migrations_sql(schema: &str) -> Result<String, Error> {
    if !plain_name(schema) {
        return Err(Error::Settings(format!(
            "the schema name `{}` must be 1 to 48 of a-z 0-9 _, not starting with a digit",
            schema.escape_debug()
        )));
    }
    let mut text = head(schema);
    for (version, (name, migration)) in (1..).zip(MIGRATIONS) {
        text.push_str(&format!("\n-- {version:04} {name}\n"));
        text.push_str(&render(migration, schema, schema));
        text.push_str(&record(schema, version, name));
    }
    Ok(text)
}

async fn exists(store: &PgStore, work: &mut Work) -> Result<bool, Error> {
    let table = format!("{}.migration", store.schema);
    let row =
        store.query("select pg_catalog.to_regclass($1) is not null as found").bind(table).fetch_one(work.on()).await?;
    Ok(row.try_get("found")?)
}

async fn applied(store: &PgStore, work: &mut Work) -> Result<Vec<(i32, String, i64)>, Error> {
    if !exists(store, work).await? {
        return Ok(Vec::new());
    }
    let sql = format!(
        "select version, name, (extract(epoch from applied_at) * 1000000::numeric)::bigint as at_us
         from {}.migration order by version",
        store.schema
    );
    let rows = store.dynamic(sql).fetch_all(work.on()).await?;
    rows.iter().map(|r| Ok((r.try_get("version")?, r.try_get("name")?, r.try_get("at_us")?))).collect()
}

fn newer(store: &PgStore, found: usize) -> Error {
    Error::Schema {
        schema: store.schema.clone(),
        found: found as u32,
        needed: MIGRATIONS.len() as u32,
        mend: "this postbox is older than the schema: update the program".into(),
    }
}

pub(super) async fn status(store: &PgStore) -> Result<MigrationStatus, Error> {
    let mut work = store.read().await?;
    let done = applied(store, &mut work).await?;
    work.rollback().await?;
    if done.len() > MIGRATIONS.len() {
        return Err(newer(store, done.len()));
    }
    let migrations = (1..).zip(MIGRATIONS).map(|(version, (name, _))| {
        let at = done.iter().find(|(v, ..)| *v == version).map(|(_, _, at)| timestamp(*at));
        (version as u32, name.to_owned(), at)
    });
    Ok(MigrationStatus { schema: store.schema.clone(), migrations: migrations.collect() })
}

pub(super) async fn up(store: &PgStore) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    loop {
        let mut work = store.work().await?;
        // One migrator at a time, released with the transaction (pgbouncer has no sessions).
        let lock = "select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('postbox.migrate.' || $1, 0))";
        store.query(lock).bind(&store.schema).execute(work.on()).await?;
        let done = applied(store, &mut work).await?.len();
        if done > MIGRATIONS.len() {
            return Err(newer(store, done));
        }
        let Some((name, migration)) = MIGRATIONS.get(done) else {
            work.rollback().await?;
            return Ok(names);
        };
        let version = done + 1;
        // A role that may not create schemas can still migrate one that was made for it.
        let mut sql = match schema_exists(store, &mut work).await? {
            true => head(&store.schema).split_once('\n').map_or_else(String::new, |(_, rest)| rest.to_owned()),
            false => head(&store.schema),
        };
        sql.push_str(&render(migration, &store.schema, &store.channel));
        sql.push_str(&record(&store.schema, version, name));
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(work.on()).await?;
        crash::point("migrating");
        work.commit().await?;
        names.push(format!("{version:04} {name}"));
    }
}

async fn schema_exists(store: &PgStore, work: &mut Work) -> Result<bool, Error> {
    let row = store
        .query("select exists (select from pg_catalog.pg_namespace where nspname = $1) as found")
        .bind(&store.schema)
        .fetch_one(work.on())
        .await?;
    Ok(row.try_get("found")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_what_it_applies_and_refuses_odd_names() {
        let text = migrations_sql("shop_box").expect("a plain name");
        assert!(text.contains("create table shop_box.message"));
        assert!(["{schema}", "{publish}", "{channel}"].iter().all(|blank| !text.contains(blank)));
        assert!(text.contains("insert into shop_box.migration (version, name) values (1, 'engine')"));
        for odd in ["x\"; drop", "", "Shop", &"x".repeat(49)] {
            assert!(migrations_sql(odd).is_err(), "{odd}");
        }
    }
}
