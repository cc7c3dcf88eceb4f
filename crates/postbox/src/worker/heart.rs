//! The heartbeat: a thread and a connection of its own, so that no handler can starve it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use super::core::Event;
use super::{Life, Moment};
use crate::error::Error;
use crate::store::{Beat, Registration, Store, SubscriptionId};

/// Beats until it is dropped.
pub(super) struct Heart {
    _stop: watch::Sender<()>,
}

pub(super) fn start<S: Store>(
    store: &S,
    registration: &Registration,
    subscriptions: Vec<SubscriptionId>,
    life: Arc<Life>,
    events: mpsc::UnboundedSender<Event>,
) -> Result<Heart, Error> {
    let (stop, stopped) = watch::channel(());
    let (store, registration) = (store.clone(), registration.clone());
    std::thread::Builder::new()
        .name("postbox-heart".into())
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            match runtime {
                Ok(runtime) => runtime.block_on(beat(store, registration, subscriptions, life, events, stopped)),
                Err(error) => tracing::error!(%error, "the heartbeat has no runtime; the lease will run out"),
            }
        })
        .map_err(|e| Error::Settings(format!("cannot start the heartbeat's thread: {e}")))?;
    Ok(Heart { _stop: stop })
}

async fn beat<S: Store>(
    store: S,
    mut registration: Registration,
    subscriptions: Vec<SubscriptionId>,
    life: Arc<Life>,
    events: mpsc::UnboundedSender<Event>,
    mut stopped: watch::Receiver<()>,
) {
    let lease = registration.lease;
    let own = match store.alone().await {
        Ok(own) => own,
        Err(error) => {
            tracing::error!(%error, "the heartbeat has no connection; the lease will run out");
            return;
        }
    };
    let mut wait = lease / 3;
    let mut told = registration.worker;
    loop {
        tokio::select! {
            _ = stopped.changed() => break,
            () = tokio::time::sleep(wait) => {}
        }
        let sent = Moment::now();
        let beat = Beat { worker: registration.worker, lease };
        let answer = tokio::time::timeout(lease / 2, own.beat(beat)).await;
        wait = lease / 3;
        match answer {
            Ok(Ok(Some(pulse))) => {
                life.extend(registration.worker, sent, lease);
                // It was registered again though the answer got lost: the decisions must know.
                if told != registration.worker {
                    told = registration.worker;
                    events.send(Event::Reborn(told)).ok();
                }
                let at = sent.instant.saturating_duration_since(life.origin);
                events.send(Event::Pulse(at, pulse.tokens)).ok();
            }
            Ok(Ok(None)) => {
                tracing::warn!("this worker was taken over; it goes on under a new id");
                registration.worker = Uuid::now_v7();
                let sent = Moment::now();
                match own.revive(&registration, &subscriptions).await {
                    Ok(()) => {
                        life.extend(registration.worker, sent, lease);
                        told = registration.worker;
                        events.send(Event::Reborn(told)).ok();
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot register again yet");
                        wait = Duration::from_millis(200);
                    }
                }
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "a heartbeat failed");
                wait = (lease / 10).min(Duration::from_millis(500));
            }
            Err(_) => {
                tracing::warn!("a heartbeat got no answer");
                wait = (lease / 10).min(Duration::from_millis(500));
            }
        }
    }
}
