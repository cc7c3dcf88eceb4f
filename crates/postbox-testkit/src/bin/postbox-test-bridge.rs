//! A worker that receives from Redis, or relays to it, in a process of its own, for tests that kill it. Everything
//! comes from the environment: the store as for any postbox, `TEST_REDIS` (a URL), `TEST_STREAM` (receives from it,
//! and notes each message in `TEST_TABLE`), `TEST_TO` (relays `out.>` to it), `TEST_CONCURRENCY`.

use std::time::Duration;

use postbox::sink::redis;
use postbox::source::redis_stream;
use postbox::{Batch, Database, Failure, Postbox, Postgres, Router, Settings, Sqlite, Tx, batch, relay};

const SOON: Duration = Duration::from_millis(20);

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

async fn work<Db: Database>(settings: Settings, notes: Router<Db>) -> Result<(), postbox::Error> {
    let url = variable("TEST_REDIS").unwrap_or_default();
    let postbox = Postbox::<Db>::open(settings).await?;
    let mut router = Router::new();
    if let Some(to) = variable("TEST_TO") {
        let sending = relay(redis(to).url(&url)).named("to-redis").backoff(SOON, SOON * 10);
        router = router.relay("out.>", sending);
    }
    if variable("TEST_STREAM").is_some() {
        router = router.merge(notes);
    }
    let concurrency = variable("TEST_CONCURRENCY").and_then(|n| n.parse().ok()).unwrap_or(100);
    let mut worker = postbox
        .worker(router)
        .lease(Duration::from_secs(1))
        .poll_interval(Duration::from_millis(50))
        .concurrency(concurrency);
    if let Some(stream) = variable("TEST_STREAM") {
        let source = redis_stream(stream).url(&url).group("shop").batch(50);
        worker = worker.receive(source.block(Duration::from_millis(50)).min_idle(Duration::from_secs(2)));
    }
    worker.run().await
}

macro_rules! notes {
    ($db:ty, $insert:literal) => {{
        /// By the id of its producer, in the transaction that ends its delivery.
        async fn note(messages: Batch<serde_json::Value>, mut tx: Tx<$db>) -> Result<(), Failure> {
            let table = variable("TEST_TABLE").unwrap_or_default();
            for message in &messages {
                let sql = sqlx::query(sqlx::AssertSqlSafe(format!($insert, table)));
                let id = message.envelope().external_id.clone().unwrap_or_default();
                sql.bind(id).execute(&mut tx).await?;
            }
            Ok(())
        }
        Router::new().on_batch("in.>", batch(note).up_to(50).within(SOON).backoff(SOON, SOON * 10))
    }};
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), postbox::Error> {
    let settings = Settings::load()?;
    match settings.backend()? {
        postbox::Backend::Postgres => {
            work::<Postgres>(settings, notes!(Postgres, "insert into {} (message) values ($1)")).await
        }
        postbox::Backend::Sqlite => {
            work::<Sqlite>(settings, notes!(Sqlite, "insert into {} (message) values (?1)")).await
        }
    }
}
