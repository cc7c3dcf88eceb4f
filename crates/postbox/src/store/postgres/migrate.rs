//! Numbered migrations, embedded; applied in one transaction each, or printed for another tool.

use sqlx::Row;

use super::{PgStore, Work, timestamp, without};
use crate::admin::MigrationStatus;
use crate::crash;
use crate::error::Error;
use crate::settings::plain_name;
use crate::store::lanes::{FIRST_HELD, FIRST_LANE, HELD, LANES};

/// A numbered migration: its version is its place, from 1.
pub(super) struct Migration {
    pub(super) name: &'static str,
    up: &'static str,
    pub(super) down: &'static str,
    /// Messages and deliveries are lost with it.
    pub(super) holds_data: bool,
}

macro_rules! migration {
    ($number:literal, $name:literal, holds_data: $holds_data:literal) => {
        Migration {
            name: $name,
            up: include_str!(concat!("migrations/", $number, "_", $name, ".sql")),
            down: include_str!(concat!("migrations/", $number, "_", $name, ".down.sql")),
            holds_data: $holds_data,
        }
    };
}

/// The first migration of the present shape: those before it make the tables and functions of the earlier one.
const PRESENT: usize = 7;

pub(super) const MIGRATIONS: [Migration; 17] = [
    migration!("0001", "engine", holds_data: true),
    migration!("0002", "pull", holds_data: false),
    migration!("0003", "roles", holds_data: false),
    migration!("0004", "publish_many", holds_data: false),
    migration!("0005", "publish_one", holds_data: false),
    migration!("0006", "pull_by_place", holds_data: false),
    migration!("0007", "windows_and_ring", holds_data: false),
    migration!("0008", "lighter_arrays", holds_data: false),
    migration!("0009", "limits", holds_data: false),
    migration!("0010", "schedules", holds_data: false),
    migration!("0011", "pause_and_priority", holds_data: false),
    migration!("0012", "order", holds_data: false),
    migration!("0013", "unique", holds_data: false),
    migration!("0014", "inbox", holds_data: false),
    migration!("0015", "find_delivery", holds_data: false),
    migration!("0016", "batch_ids", holds_data: false),
    migration!("0017", "due_in_turn", holds_data: false),
];

/// The version that this migration leads to.
fn since(name: &str) -> usize {
    MIGRATIONS.iter().take_while(|migration| migration.name != name).count() + 1
}

/// The text of a migration, up or down, with the functions of the shape that it leaves behind.
fn render(text: &str, leaves: usize, schema: &str, channel: &str) -> String {
    let (publish, publish_one, retain) = match leaves < PRESENT {
        true => (
            include_str!("migrations/earlier/publish.sql"),
            of_function(include_str!("migrations/earlier/publish_one.sql")),
            include_str!("migrations/earlier/retain.sql"),
        ),
        false => (
            match leaves {
                _ if leaves < since("pause_and_priority") => {
                    include_str!("migrations/earlier/publish_without_priority.sql")
                }
                _ if leaves < since("order") => include_str!("migrations/earlier/publish_without_lanes.sql"),
                _ if leaves < since("unique") => include_str!("migrations/earlier/publish_without_unique.sql"),
                _ if leaves < since("batch_ids") => {
                    include_str!("migrations/earlier/publish_with_ids_of_their_own.sql")
                }
                _ => include_str!("publish.sql"),
            },
            short_ways(match leaves {
                _ if leaves < since("order") => include_str!("migrations/earlier/publish_one_without_lanes.sql"),
                _ if leaves < since("unique") => include_str!("migrations/earlier/publish_one_without_unique.sql"),
                _ => include_str!("publish_one.sql"),
            }),
            include_str!("retain_functions.sql"),
        ),
    };
    text.replace("{publish}", publish.trim_end())
        .replace("{publish_one}", &publish_one)
        .replace("{duplicates}", include_str!("duplicates.sql"))
        .replace("{roles}", include_str!("roles.sql"))
        .replace("{retain}", retain.trim_end())
        .replace("{lanes}", &FIRST_LANE.to_string())
        .replace("{held}", &FIRST_HELD.to_string())
        .replace("{of_lanes}", &format!("{}::bigint", LANES - 1))
        .replace("{of_held}", &format!("{}::bigint", HELD - 1))
        .replace("{schema}", schema)
        .replace("{channel}", channel)
}

/// The short way to publish, as a statement of `publish_checked`: its parameters are that one's arguments.
fn of_function(publish_one: &str) -> String {
    const ARGUMENTS: [&str; 12] = [
        "publish_checked.topic",
        "nullif(publish_checked.key, '')",
        "text_payload",
        "publish_checked.headers::pg_catalog.text",
        "(extract(epoch from publish_checked.occurred_at) * 1000000::numeric)",
        "nullif(publish_checked.source, '')",
        "nullif(publish_checked.external_id, '')",
        "nullif(publish_checked.correlation_id, '')",
        "nullif(publish_checked.causation_id, '')",
        "publish_checked.max_attempts",
        "publish_checked.body",
        "publish_checked.content_type",
    ];
    let text = publish_one.lines().filter(|line| !line.trim_start().starts_with("--"));
    let text = text.collect::<Vec<_>>().join("\n");
    // The last first: `$1` is the beginning of `$12`.
    let text = ARGUMENTS
        .iter()
        .enumerate()
        .rev()
        .fold(text, |text, (n, argument)| text.replace(&format!("${}", n + 1), argument));
    format!("{text} into new_id, told;")
}

/// A topic with one subscription first: most have one.
fn short_ways(publish_one: &str) -> String {
    let [one, several] = ["several", "one"].map(|other| of_function(&without(publish_one, other)));
    format!("{one}\n        if new_id is null then\n{several}\n        end if;")
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
    checked(schema)?;
    let mut text = head(schema);
    for (version, migration) in (1..).zip(&MIGRATIONS) {
        text.push_str(&format!("\n-- {version:04} {}\n", migration.name));
        text.push_str(&render(migration.up, version, schema, schema));
        text.push_str(&record(schema, version, migration.name));
    }
    Ok(text)
}

/// What takes all migrations back, newest first, as one SQL text. It asks nobody whether the messages
/// may go.
///
/// # Errors
/// As [`migrations_sql`].
pub fn migrations_down_sql(schema: &str) -> Result<String, Error> {
    checked(schema)?;
    let mut text = String::new();
    for (version, migration) in (1..).zip(&MIGRATIONS).collect::<Vec<(usize, _)>>().into_iter().rev() {
        text.push_str(&format!("-- {version:04} {}, down\n", migration.name));
        text.push_str(&down(migration, version, schema));
        text.push_str(&format!("delete from {schema}.migration where version = {version};\n\n"));
    }
    text.push_str(&tail(schema));
    Ok(text)
}

fn checked(schema: &str) -> Result<(), Error> {
    if plain_name(schema) {
        return Ok(());
    }
    Err(Error::Settings(format!(
        "the schema name `{}` must be 1 to 48 of a-z 0-9 _, not starting with a digit",
        schema.escape_debug()
    )))
}

/// What takes the migration of this version back.
pub(super) fn down(migration: &Migration, version: usize, schema: &str) -> String {
    render(migration.down, version - 1, schema, schema)
}

/// What is left at version 0: the list of migrations, and the schema if nobody else uses it.
pub(super) fn tail(schema: &str) -> String {
    format!(
        "drop table {schema}.migration;\n\
         do $tail$ begin\n    \
             drop schema {schema};\n\
         exception when dependent_objects_still_exist or insufficient_privilege then\n    \
             raise notice 'postbox: the schema {schema} stays: %', sqlerrm;\n\
         end $tail$;\n"
    )
}

/// One migrator at a time, released with the transaction (pgbouncer has no sessions).
pub(super) async fn lock(store: &PgStore, work: &mut Work) -> Result<(), Error> {
    let lock = "select pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('postbox.migrate.' || $1, 0))";
    store.query(lock).bind(&store.schema).execute(work.on()).await?;
    Ok(())
}

async fn exists(store: &PgStore, work: &mut Work) -> Result<bool, Error> {
    let table = format!("{}.migration", store.schema);
    let row =
        store.query("select pg_catalog.to_regclass($1) is not null as found").bind(table).fetch_one(work.on()).await?;
    Ok(row.try_get("found")?)
}

pub(super) async fn applied(store: &PgStore, work: &mut Work) -> Result<Vec<(i32, String, i64)>, Error> {
    if !exists(store, work).await? {
        return Ok(Vec::new());
    }
    // A publisher may not read the table, only what the function tells.
    let table = format!("{}.migration", store.schema);
    let may = "select pg_catalog.has_table_privilege($1, 'select') as may";
    let may: bool = store.query(may).bind(&table).fetch_one(work.on()).await?.try_get("may")?;
    let source = if may { table } else { format!("{}.schema_version()", store.schema) };
    let sql = format!(
        "select m.version, m.name, (extract(epoch from m.applied_at) * 1000000::numeric)::bigint as at_us
         from {source} m order by m.version"
    );
    let rows = store.dynamic(sql).fetch_all(work.on()).await?;
    rows.iter().map(|r| Ok((r.try_get("version")?, r.try_get("name")?, r.try_get("at_us")?))).collect()
}

pub(super) fn newer(store: &PgStore, found: usize) -> Error {
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
    let migrations = (1..).zip(&MIGRATIONS).map(|(version, migration)| {
        let at = done.iter().find(|(v, ..)| *v == version).map(|(_, _, at)| timestamp(*at));
        (version as u32, migration.name.to_owned(), at)
    });
    Ok(MigrationStatus { schema: store.schema.clone(), migrations: migrations.collect() })
}

pub(super) async fn up(store: &PgStore) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    loop {
        let mut work = store.work().await?;
        lock(store, &mut work).await?;
        let done = applied(store, &mut work).await?.len();
        if done > MIGRATIONS.len() {
            return Err(newer(store, done));
        }
        let Some(migration) = MIGRATIONS.get(done) else {
            work.rollback().await?;
            return Ok(names);
        };
        let version = done + 1;
        // A role that may not create schemas can still migrate one that was made for it.
        let mut sql = match schema_exists(store, &mut work).await? {
            true => head(&store.schema).split_once('\n').map_or_else(String::new, |(_, rest)| rest.to_owned()),
            false => head(&store.schema),
        };
        sql.push_str(&render(migration.up, version, &store.schema, &store.channel));
        sql.push_str(&record(&store.schema, version, migration.name));
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(work.on()).await?;
        crash::point("migrating");
        work.commit().await?;
        names.push(format!("{version:04} {}", migration.name));
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
        let blanks =
            ["{schema}", "{publish}", "{publish_one}", "{duplicates}", "{channel}", "{roles}", "{retain}", "{one"];
        assert!(blanks.iter().all(|blank| !text.contains(blank)));
        assert!(text.contains("insert into shop_box.migration (version, name) values (1, 'engine')"));
        let text = migrations_down_sql("shop_box").expect("a plain name");
        let [roles, engine] = ["drop function shop_box.record_action", "-- 0001 engine, down"].map(|t| text.find(t));
        assert!(roles.is_some() && roles < engine, "newest first: {text}");
        assert!(!text.contains("{schema}") && !text.contains("cascade"), "{text}");
        for odd in ["x\"; drop", "", "Shop", &"x".repeat(49)] {
            assert!(migrations_sql(odd).is_err() && migrations_down_sql(odd).is_err(), "{odd}");
        }
    }
}
