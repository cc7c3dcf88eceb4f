//! The ground of a round: an empty database with the tables of both, and a witness in it that keeps
//! who claimed what.

use sqlx::Pool;

use crate::child::races::COUNTERS;
use crate::fault::Kind;
use crate::site::{SCHEMA, Site};

/// An empty database with the tables of both.
pub(crate) async fn prepare<Db: Site>(pool: &Pool<Db>, url: &str) -> Result<(), Box<dyn std::error::Error>> {
    let settings = postbox::Settings::defaults().url(url).set("schema", SCHEMA).set("application", "torture");
    let number = if Db::KIND == Kind::Postgres { "bigint" } else { "integer" };
    if Db::KIND == Kind::Postgres {
        let fresh =
            "drop schema if exists postbox cascade; drop schema if exists torture cascade; create schema torture";
        Db::run(&mut *Db::acquire(pool).await?, fresh.into()).await?;
    }
    // This makes SQLite's file.
    let postbox = postbox::Postbox::<Db>::migrate(settings).await?;
    postbox.close().await;
    let mut tables = format!(
        "create table {} (ext text primary key);
         create table {} (delivery {number} not null, number {number} not null, ext text not null, clock {number} not null);
         create table {counter} (id {number} primary key, n {number} not null);",
        Db::table("business"),
        Db::table("effect"),
        counter = Db::table("counter"),
    );
    let mut connection = Db::acquire(pool).await?;
    for id in 0..COUNTERS + 2 {
        tables.push_str(&format!("insert into {} (id, n) values ({id}, 0);", Db::table("counter")));
    }
    tables.push_str(witness(Db::KIND));
    Db::run(&mut connection, tables).await?;
    Ok(())
}

/// Keeps each claim, in its transaction: leases are gone when they have ended. It only inserts, into a
/// table without a key, and so waits for nobody.
fn witness(kind: Kind) -> &'static str {
    match kind {
        Kind::Postgres => {
            "create table torture.claim (token uuid not null, batch bigint not null, worker uuid not null,
                 deliveries bigint[] not null, revs int[] not null, attempts int[] not null);
             create function torture.keep_claim() returns trigger language plpgsql as $$
             begin
                 insert into torture.claim (token, batch, worker, deliveries, revs, attempts)
                 values (new.token, new.batch, new.worker, new.deliveries, new.revs, new.attempts);
                 return null;
             end $$;
             create trigger torture_claim after insert on postbox.lease
                 for each row execute function torture.keep_claim();"
        }
        // The lease is written first, with what it holds itself; then each other delivery gets its token.
        Kind::Sqlite => {
            "create table torture_claim (token blob not null, batch integer not null, worker blob not null,
                 delivery integer not null, rev integer not null, attempt integer not null);
             create trigger torture_keep_claim after update of token on postbox_delivery
             when new.token is not null and new.token is not old.token
             begin
                 insert into torture_claim (token, batch, worker, delivery, rev, attempt)
                 select l.token, l.batch, l.worker, new.id, new.rev, new.attempt
                 from postbox_lease l where l.token = new.token;
             end;
             create trigger torture_keep_lease after insert on postbox_lease
             begin
                 insert into torture_claim (token, batch, worker, delivery, rev, attempt)
                 select new.token, new.batch, new.worker, i.value ->> 0, 1, 0 from json_each(new.items) i;
             end;"
        }
    }
}
