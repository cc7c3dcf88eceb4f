//! What is listened for: webhooks, and whether the process lives and can work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use postbox::{Alive, Database, Postbox};
use serde_json::json;

/// How long the database may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// When senders of webhooks come again that were turned away while it stops.
const COME_AGAIN: &str = "5";

/// Set when it stops: nothing is taken any more.
#[derive(Debug, Clone, Default)]
pub(super) struct Stopping(Arc<AtomicBool>);

impl Stopping {
    pub(super) fn begins(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

struct Ready<Db: Database> {
    postbox: Postbox<Db>,
    worker: Alive,
    stopping: Stopping,
}

/// `GET /health`, `GET /ready`, and the webhooks.
pub(super) fn routes<Db: Database>(
    postbox: Postbox<Db>,
    worker: Alive,
    stopping: Stopping,
    webhooks: Router,
) -> Router {
    let webhooks = webhooks.layer(middleware::from_fn_with_state(stopping.clone(), open));
    Router::new()
        .route("/ready", get(ready::<Db>))
        .with_state(Arc::new(Ready { postbox, worker, stopping }))
        .route("/health", get(|| async { Json(json!({"status": "alive"})) }))
        .merge(webhooks)
}

/// While it stops, senders come again later: to the next process, or to this one when it is back.
async fn open(State(stopping): State<Stopping>, request: Request, next: Next) -> Response {
    if stopping.is_on() {
        let words = Json(json!({"status": "unavailable", "reason": "postbox is stopping"}));
        return (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, COME_AGAIN)], words).into_response();
    }
    next.run(request).await
}

/// Whether it can work: 200, or 503 and why not.
async fn ready<Db: Database>(State(ready): State<Arc<Ready<Db>>>) -> Response {
    let mut reasons = Vec::new();
    if ready.stopping.is_on() {
        reasons.push("it is stopping".to_owned());
    } else if !ready.worker.is_alive() {
        reasons.push("the worker has ended".to_owned());
    }
    match tokio::time::timeout(PATIENCE, ready.postbox.migration_status()).await {
        Ok(Ok(_)) => {}
        // Its words may quote the address; the log has them.
        Ok(Err(error)) => {
            tracing::warn!(%error, "asked whether it is ready: the database did not answer as it should");
            reasons.push("the database did not answer as it should".into());
        }
        Err(_) => reasons.push(format!("the database did not answer within {} s", PATIENCE.as_secs())),
    }
    match reasons.is_empty() {
        true => Json(json!({"ready": true})).into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"ready": false, "reasons": reasons}))).into_response(),
    }
}
