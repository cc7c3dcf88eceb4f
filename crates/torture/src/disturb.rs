//! What is done to the database over connections of the run's own: sessions ended, history
//! made old.

use std::time::Duration;

use sqlx::Pool;

use crate::fault::Kind;
use crate::site::{Site, number};
use crate::traffic::FLEETING;
use crate::world::World;

/// Ends some sessions that the server chooses: whoever is there.
pub(crate) async fn end_backends<Db: Site>(world: &World, pool: &Pool<Db>, most: u32) {
    let sql = format!(
        "select cast(count(*) filter (where pg_terminate_backend(pid)) as text) from (
            select pid from pg_stat_activity
            where backend_type = 'client backend' and pid <> pg_backend_pid() and application_name <> 'witness'
            order by random() limit {most}) chosen"
    );
    if let Ok(Ok(mut connection)) = tokio::time::timeout(Duration::from_secs(2), Db::acquire(pool)).await
        && let Ok(rows) = Db::rows(&mut connection, sql).await
        && number(&rows) > 0
    {
        world.counts.add("F4", number(&rows) as u64);
    }
}

/// Makes one subscription's history old as soon as it is there, so that retention has something to
/// remove: keeping it for a shorter time than an hour is nothing that a worker would declare.
pub(crate) async fn age_soon<Db: Site>(pool: Pool<Db>) {
    let sql = match Db::KIND {
        Kind::Postgres => format!(
            "update postbox.outcome_part set finished_at = finished_at - interval '40 days'
             where finished_at > clock_timestamp() - interval '1 day'
                 and subscriptions <@ array(select id from postbox.subscription where name = '{FLEETING}');
             update postbox.outcome set finished_at = finished_at - interval '40 days'
             where finished_at > clock_timestamp() - interval '1 day' and state_after = 'succeeded'
                 and subscription in (select id from postbox.subscription where name = '{FLEETING}')"
        ),
        Kind::Sqlite => format!(
            "update postbox_delivery set since = since - 40 * 86400000
             where state = 'succeeded' and since > (select now from postbox_clock) - 86400000
                 and subscription in (select id from postbox_subscription where name = '{FLEETING}')"
        ),
    };
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let age = async {
            let mut connection = Db::acquire(&pool).await?;
            Db::run(&mut connection, sql.clone()).await
        };
        tokio::time::timeout(Duration::from_secs(5), age).await.ok();
    }
}
