//! What a worker does for its relays beside handing them messages.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::LEAST_PATIENCE;
use crate::error::{BrokerError, Error};
use crate::router::{Attached, Relayed, Route, Stands};
use crate::store::inbox::DeclaredRelay;
use crate::store::{Database, Store, SubscriptionId};

/// How often it is counted what sinks have confirmed.
const COUNT: Duration = Duration::from_secs(1);
/// Processes count in so many rows of a relay.
const SLOTS: u32 = 16;

fn relay_of<Db: Database>(route: &Route<Db>) -> Option<&dyn Relayed<Db>> {
    match &route.handler {
        Stands::Batch(handler) => handler.relay(),
        Stands::Single(_) => None,
    }
}

/// Looks at the other side of each relay.
pub(super) async fn open<Db: Database>(routes: &[Route<Db>]) -> Result<(), Error> {
    for route in routes {
        let Some(relay) = relay_of(route) else { continue };
        let name = &route.declared.name;
        match relay.open().await {
            Ok(warnings) => {
                for words in warnings {
                    tracing::warn!(relay = name, words, "the other side is not set up as well as it could be");
                }
            }
            Err(BrokerError::Refused(words)) => {
                return Err(Error::Settings(format!("the relay `{name}` cannot send: {words}")));
            }
            Err(BrokerError::Unavailable(words)) => {
                tracing::warn!(relay = name, words, "the other side cannot be reached; messages wait until it can");
            }
        }
    }
    Ok(())
}

/// Says which subscriptions are relays, and tells the relays whose they are.
pub(super) async fn declare<Db: Database>(
    store: &Db::Store,
    application: &str,
    routes: &[(SubscriptionId, Route<Db>)],
) -> Result<(), Error> {
    let mut relays = Vec::new();
    for (id, route) in routes {
        let Some(relay) = relay_of(route) else { continue };
        relays.push(DeclaredRelay { subscription: *id, kind: relay.kind(), target: relay.target() });
        relay.attach(Attached {
            store: store.clone(),
            application: application.to_owned(),
            name: route.declared.name.clone(),
        });
    }
    if relays.is_empty() {
        return Ok(());
    }
    store.declare_relays(&relays).await
}

/// Counts what sinks have confirmed, until the worker ends.
pub(super) struct Counting<Db: Database> {
    store: Db::Store,
    routes: Arc<HashMap<SubscriptionId, Route<Db>>>,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl<Db: Database> Counting<Db> {
    pub(super) fn start(store: Db::Store, routes: Arc<HashMap<SubscriptionId, Route<Db>>>) -> Counting<Db> {
        let any = routes.values().any(|route| relay_of(route).is_some());
        let task = any.then(|| {
            let (store, routes) = (store.clone(), routes.clone());
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(COUNT).await;
                    count::<Db>(&store, &routes).await;
                }
            })
        });
        Counting { store, routes, task }
    }

    /// Counts the rest.
    pub(super) async fn end(mut self) {
        let Some(task) = self.task.take() else { return };
        task.abort();
        // What it had taken, and not written when it was stopped, is not counted: it is a second's worth.
        task.await.ok();
        tokio::time::timeout(LEAST_PATIENCE, count::<Db>(&self.store, &self.routes)).await.ok();
    }
}

impl<Db: Database> Drop for Counting<Db> {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

async fn count<Db: Database>(store: &Db::Store, routes: &HashMap<SubscriptionId, Route<Db>>) {
    let slot = i16::try_from(std::process::id() % SLOTS).unwrap_or_default();
    for (id, route) in routes {
        let Some(relay) = relay_of(route) else { continue };
        let (sent, retried) = relay.take_counts();
        if sent == 0 && retried == 0 {
            continue;
        }
        if let Err(error) = store.count_relayed(*id, slot, sent, retried).await {
            tracing::warn!(relay = route.declared.name, %error, "what was sent could not be counted; trying again");
            relay.put_back(sent, retried);
        }
    }
}
