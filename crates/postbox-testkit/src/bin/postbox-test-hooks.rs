//! A process that takes webhooks, or sends them, for tests that kill it. Everything comes from the environment: the
//! store as for any postbox, `TEST_SECRET`, and one of `TEST_LISTEN` (takes Standard Webhooks at `/in/hooks`, and says
//! where it listens) and `TEST_HOOKS` (a URL: relays `out.>` to `/relay` in order and `loose.>` to `/loose` in none,
//! pushes `push.>` to `/push`, and `op.>` to `/op` as an operation), with `TEST_CONCURRENCY`.

use std::io::Write;
use std::time::Duration;

use postbox::sink::{WebhookSink, webhook_to};
use postbox::source::webhook;
use postbox::{Database, Postbox, Postgres, Push, Router, Settings, Sqlite, push, relay};

const SOON: Duration = Duration::from_millis(20);

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

async fn listen<Db: Database>(postbox: &Postbox<Db>, secret: &str) -> Result<(), postbox::Error> {
    let routes = webhook("hooks").standard([secret]).routes(postbox).await?;
    let failed = |error: std::io::Error| postbox::Error::Settings(format!("it cannot listen: {error}"));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    writeln!(std::io::stdout(), "listening at {address}").map_err(failed)?;
    axum::serve(listener, routes).await.map_err(failed)
}

fn routes<Db: Database>(url: &str, secret: &str) -> Router<Db> {
    let to = |path: &str| -> WebhookSink { webhook_to(format!("{url}{path}")).secret(secret).allow("127.0.0.1") };
    let at = |path: &str| -> Push { push(format!("{url}{path}")).secret(secret) };
    Router::new()
        .relay("out.>", relay(to("/relay")).named("in-order").backoff(SOON, SOON * 10))
        .relay("loose.>", relay(to("/loose")).named("loose").unordered().backoff(SOON, SOON * 10))
        .on("push.>", at("/push").handler().named("crm").max_attempts(1000).backoff(SOON, SOON * 10))
        .on("op.>", at("/op").operation().named("charge").max_attempts(1000).backoff(SOON, SOON * 10))
}

async fn work<Db: Database>(settings: Settings) -> Result<(), postbox::Error> {
    let secret = variable("TEST_SECRET").unwrap_or_default();
    let postbox = Postbox::<Db>::open(settings).await?;
    if variable("TEST_LISTEN").is_some() {
        return listen(&postbox, &secret).await;
    }
    let url = variable("TEST_HOOKS").unwrap_or_default();
    let concurrency = variable("TEST_CONCURRENCY").and_then(|n| n.parse().ok()).unwrap_or(50);
    let worker = postbox.worker(routes(&url, &secret)).lease(Duration::from_secs(1)).concurrency(concurrency);
    worker.poll_interval(Duration::from_millis(50)).run().await
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<(), postbox::Error> {
    let settings = Settings::load()?;
    match settings.backend()? {
        postbox::Backend::Postgres => work::<Postgres>(settings).await,
        postbox::Backend::Sqlite => work::<Sqlite>(settings).await,
    }
}
