//! The three subscriptions.

use std::time::Duration;

use postbox::{
    Envelope, Failure, Operation, OperationFailure, Payload, Receipt, Reconciled, ResultExt, Router, State, Tx,
    handler, operation,
};
use serde::Deserialize;
use serde_json::Value;

use crate::input::{Counts, name};
use crate::server::{Announcement, now};
use crate::tables::{Names, Tables};

/// How long the server may take to answer.
const PATIENCE: Duration = Duration::from_millis(300);

pub(crate) const SUBSCRIPTIONS: [&str; 3] = ["projection", "audit", "announce"];

pub(crate) fn routes<Db: Tables>(names: Names, remote: Remote) -> Router<Db> {
    let tables = Router::new()
        // One subscription has one pattern: the handler picks its two kinds of event out of it.
        .on("github.*.*", handler(project::<Db>).named(SUBSCRIPTIONS[0]))
        .on("github.>", handler(audit::<Db>).named(SUBSCRIPTIONS[1]))
        .with_state(names);
    let announcing = operation(announce)
        .named(SUBSCRIPTIONS[2])
        .reconcile(find_announcement)
        .backoff(Duration::from_millis(50), Duration::from_secs(1))
        // A kill costs an attempt, and so does a busy machine.
        .max_attempts(20)
        // The server refuses what comes after the call's deadline: its "no" is final soon.
        .quiet_period(Duration::from_secs(1))
        .timeout(Duration::from_secs(2))
        // One at a time: a kill leaves few in doubt.
        .concurrency(1);
    Router::new().merge(tables).merge(Router::new().on("github.release.*", announcing).with_state(remote))
}

#[derive(Debug, Deserialize)]
struct Repository {
    full_name: Option<String>,
}

#[derive(Debug, Deserialize)]
struct InRepository {
    repository: Option<Repository>,
}

/// Counts per repository: the count and the record that this event is counted commit together.
async fn project<Db: Tables>(envelope: Envelope, State(names): State<Names>, mut tx: Tx<Db>) -> Result<(), Failure> {
    let more = match envelope.topic.split('.').nth(1) {
        Some("issues") => Counts { issues: 1, pull_requests: 0 },
        Some("pull_request") => Counts { issues: 0, pull_requests: 1 },
        _ => return Ok(()),
    };
    let payload: InRepository = envelope.decode().permanent()?;
    let repository = payload.repository.and_then(|r| r.full_name).unwrap_or_else(|| "(none)".into());
    Ok(Db::count(&mut tx, &names, &repository, more).await?)
}

/// Writes down every event, word for word. The table has no unique key: one written twice would show.
async fn audit<Db: Tables>(envelope: Envelope, State(names): State<Names>, mut tx: Tx<Db>) -> Result<(), Failure> {
    let event = name(&envelope.topic, envelope.external_id.as_deref().unwrap_or_default());
    // Its events are JSON, all of them.
    let text = envelope.payload_json().unwrap_or_default();
    Ok(Db::note(&mut tx, &names, &event, text).await?)
}

/// The way to the announcement server.
#[derive(Debug, Clone)]
pub(crate) struct Remote {
    address: String,
    client: reqwest::Client,
}

impl Remote {
    pub(crate) fn at(address: String) -> Result<Remote, reqwest::Error> {
        let client = reqwest::Client::builder().timeout(PATIENCE).no_proxy().build()?;
        Ok(Remote { address, client })
    }
}

#[derive(Debug, Deserialize)]
struct Release {
    tag_name: Option<String>,
}

#[derive(Debug, Deserialize)]
struct InRelease {
    release: Option<Release>,
}

/// Tells the world about a release. That cannot be taken back, so it is an operation.
async fn announce(
    op: Operation,
    envelope: Envelope,
    Payload(payload): Payload<InRelease>,
    State(remote): State<Remote>,
) -> Result<Receipt, OperationFailure> {
    let tag = payload.release.and_then(|r| r.tag_name).unwrap_or_default();
    let wish = Announcement {
        event: name(&envelope.topic, envelope.external_id.as_deref().unwrap_or_default()),
        key: op.idempotency_key().to_owned(),
        text: format!("{} {tag}", envelope.key.as_deref().unwrap_or_default()),
        not_after: now() + PATIENCE.as_millis() as u64,
    };
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let answer = match remote.client.post(format!("{}/announcements", remote.address)).json(&wish).send().await {
        Ok(answer) => answer,
        Err(error) if error.is_connect() => return Err(OperationFailure::not_done(error)),
        Err(error) => {
            // It may be on its way yet. After the deadline the server does not begin it any more.
            tokio::time::sleep_until(deadline).await;
            return Err(error.into());
        }
    };
    let status = answer.status().as_u16();
    let words = format!("the server answered {status}: {}", answer.text().await?);
    match status {
        201 => Ok(Receipt::of(words)),
        408 | 503 => Err(OperationFailure::not_done(words)),
        422 => Err(OperationFailure::refused(words)),
        _ => Err(OperationFailure::in_doubt(words)),
    }
}

/// Asks the server how a doubt ends; it knows, and its "no" is final.
async fn find_announcement(op: Operation, State(remote): State<Remote>) -> Result<Reconciled, Failure> {
    let url = format!("{}/announcements/{}", remote.address, op.idempotency_key());
    let answer = remote.client.get(url).send().await?;
    match answer.status().as_u16() {
        200 => Ok(Reconciled::Done(Receipt::of(answer.json::<Value>().await?))),
        404 => Ok(Reconciled::NotDone),
        _ => Ok(Reconciled::Unknown),
    }
}
