//! What workers do for all: take over from the dead, hand out history, ask about doubts, tidy, keep schedules.

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::FutureExt;

use super::attempt::{clean, clean_receipt, continued, panic_words};
use super::told;
use crate::admin::RETAIN_BATCH;
use crate::context::Context;
use crate::crash;
use crate::handler::{self, Call};
use crate::lifecycle::Answer;
use crate::operation::{Receipt, Reconciled};
use crate::postbox::Postbox;
use crate::retention::Retention;
use crate::router::{Bound, Route, Stands};
use crate::store::decide::believed;
use crate::store::{Answered, Claimed, Database, Doubtful, Registration, Speaker, Store, SubscriptionId};

/// How often it looks, give or take a fifth: six times in a lease, within these bounds.
const ROUND: Duration = Duration::from_secs(1);
const LONGEST_ROUND: Duration = Duration::from_secs(5);
/// The shortest and the longest pause between two looks for doubts; it grows while there are none.
const ASK_ROUND: Duration = Duration::from_millis(500);
const LONGEST_ASK_ROUND: Duration = Duration::from_secs(3);
/// The first wait between two asks about the same doubt, and the longest one.
const ASK_AGAIN: Duration = Duration::from_secs(2);
const ASK_AGAIN_MOST: Duration = Duration::from_secs(900);
/// How many doubts are asked about at once.
const ASKS: u32 = 10;
/// How often what has run out is removed.
const TIDY: Duration = Duration::from_secs(60);
/// How often what was kept long enough is looked for, and the pause between two batches of it.
const RETAIN: Duration = Duration::from_secs(60);
const RETAIN_PAUSE: Duration = Duration::from_millis(100);
/// How long a verb may take before it is tried in the next round.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often schedules are looked at when nobody says that they have changed.
const LOOK: Duration = Duration::from_secs(10);
/// How often routes are learnt anew.
const LEARN: Duration = Duration::from_secs(30);
/// Topics remembered between two rounds.
const MAX_TOPICS: usize = 1000;

/// Topics that were claimed: what they fan out to is stored for publishers to look up.
#[derive(Debug, Default)]
pub(super) struct Topics(Mutex<HashSet<String>>);

impl Topics {
    pub(super) fn saw(&self, claimed: &Claimed) {
        for envelope in claimed.items.iter().filter_map(|i| i.envelope.as_ref()) {
            self.saw_topic(&envelope.topic);
        }
    }

    pub(super) fn saw_topic(&self, topic: &str) {
        let Ok(mut topics) = self.0.lock() else { return };
        if topics.len() < MAX_TOPICS && !topics.contains(topic) {
            topics.insert(topic.to_owned());
        }
    }

    fn all(&self) -> Vec<String> {
        // In one order for all workers, so that two that learn at once cannot deadlock.
        let mut topics: Vec<String> = self.0.lock().map(|topics| topics.iter().cloned().collect()).unwrap_or_default();
        topics.sort_unstable();
        topics
    }
}

/// A task that ends with this.
pub(super) struct Keeper(Vec<tokio::task::JoinHandle<()>>);

impl Keeper {
    pub(super) fn abort(self) {
        drop(self);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

pub(super) fn start<Db: Database>(
    postbox: Postbox<Db>,
    registration: Registration,
    routes: Arc<HashMap<SubscriptionId, Route<Db>>>,
    topics: Arc<Topics>,
) -> Keeper {
    let lease = registration.lease;
    let asker = tokio::spawn(ask(postbox.clone(), registration, routes));
    let remover = tokio::spawn(retain(postbox.clone()));
    let ticker = tokio::spawn(tick(postbox.store().clone()));
    Keeper(vec![tokio::spawn(keep(postbox.store().clone(), topics, lease)), asker, remover, ticker])
}

/// Publishes the ticks of schedules, whoever's they are: when the next one is due, when somebody says that
/// they have changed, and now and then.
async fn tick<S: Store>(store: S) {
    loop {
        let wait = match told("tick", PATIENCE, store.tick()).await {
            Some(ticked) => ticked.next.unwrap_or(LOOK).min(LOOK),
            None => ROUND,
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = store.rescheduled() => {}
        }
    }
}

pub(super) async fn keep<S: Store>(store: S, topics: Arc<Topics>, lease: Duration) {
    let round = (lease / 6).clamp(ROUND, LONGEST_ROUND);
    let (mut tidied, mut learnt, mut known) = (None::<Instant>, Instant::now(), 0);
    loop {
        while let Some(Some(taken)) = told("take over", PATIENCE, store.take_over(fastrand::f64())).await {
            tracing::warn!(
                worker = taken.name,
                pending = taken.pending,
                in_doubt = taken.in_doubt,
                dead = taken.dead,
                "a worker died; its work was taken over"
            );
        }
        while told("backfill", PATIENCE, store.backfill()).await == Some(true) {}
        // Again now and then: a new routing epoch has outdated what was learnt.
        let seen = topics.all();
        let due = seen.len() != known || learnt.elapsed() >= LEARN;
        if due && !seen.is_empty() && told("learn routes", PATIENCE, store.learn_routes(&seen)).await.is_some() {
            (learnt, known) = (Instant::now(), seen.len());
        }
        told("rotate", PATIENCE, store.rotate()).await;
        if tidied.is_none_or(|at| at.elapsed() >= TIDY) {
            tidied = Some(Instant::now());
            while told("tidy", PATIENCE, store.tidy()).await.is_some_and(|removed| removed >= 1000) {}
        }
        tokio::time::sleep(round.mul_f64(0.8 + 0.4 * fastrand::f64())).await;
    }
}

/// Removes what was kept long enough, gently: takeover and history do not wait for it.
async fn retain<Db: Database>(postbox: Postbox<Db>) {
    // A setting that cannot be used was refused when the worker started.
    let keep_unrouted = postbox.settings().keep_unrouted().unwrap_or(Duration::MAX);
    let retention = Retention { keep_unrouted, most: RETAIN_BATCH, tell: false };
    loop {
        let pause = match told("retain", PATIENCE, postbox.store().retain(&retention)).await {
            Some(removed) if removed.more && !removed.busy => RETAIN_PAUSE,
            _ => RETAIN,
        };
        tokio::time::sleep(pause.mul_f64(0.8 + 0.4 * fastrand::f64())).await;
    }
}

/// Asks the remotes about doubts, and carries out operators' words.
async fn ask<Db: Database>(
    postbox: Postbox<Db>,
    registration: Registration,
    routes: Arc<HashMap<SubscriptionId, Route<Db>>>,
) {
    let store = postbox.store();
    let max_payload_bytes = postbox.settings().max_payload_bytes().unwrap_or(crate::message::MAX_PAYLOAD_BYTES);
    let able: Vec<SubscriptionId> = routes
        .iter()
        .filter(|(_, route)| route.declared.reconciles || route.declared.continues)
        .map(|(id, _)| *id)
        .collect();
    if able.is_empty() {
        return;
    }
    // For as long as an ask can take. One that dies asking, or whose answer is lost, makes no wait longer.
    let longest = routes.values().map(|route| route.declared.timeout).max().unwrap_or_default();
    let hold = ASK_AGAIN.saturating_add(longest);
    let worker = registration.name;
    let mut pause = ASK_ROUND;
    loop {
        let due = told("ask", PATIENCE, store.doubts(&able, ASKS, hold)).await.unwrap_or_default();
        let (found, more) = (!due.is_empty(), due.len() >= ASKS as usize);
        let asks = due.into_iter().map(async |doubt| {
            let Some(route) = routes.get(&doubt.subscription) else { return };
            crash::point("reconciling");
            match settle(route, &doubt, &worker, max_payload_bytes).await {
                Some(answered) => {
                    crash::point("resolving");
                    told("answer", PATIENCE, store.answer(&answered)).await;
                }
                None => {
                    told("ask later", PATIENCE, store.unanswered(&doubt, ask_again(doubt.asks))).await;
                }
            }
        });
        futures_util::future::join_all(asks).await;
        if !more {
            pause = if found { ASK_ROUND } else { (pause * 2).min(LONGEST_ASK_ROUND) };
            tokio::time::sleep(pause.mul_f64(0.8 + 0.4 * fastrand::f64())).await;
        }
    }
}

/// How long until a doubt is asked about again, after so many asks that taught nothing, and one more.
pub(super) fn ask_again(asks: u32) -> Duration {
    ASK_AGAIN.saturating_mul(1 << asks.min(20)).min(ASK_AGAIN_MOST)
}

/// What one doubt comes to, if anything.
async fn settle<Db: Database>(
    route: &Route<Db>,
    doubt: &Doubtful,
    worker: &str,
    max_payload_bytes: usize,
) -> Option<Answered> {
    // Only operations are ever in doubt.
    let Stands::Single(handler) = &route.handler else { return None };
    let policy = route.declared.policy;
    let Some(envelope) = doubt.envelope.clone().map(Arc::new) else {
        // Its message is gone, and with it whatever would have followed: an operator's word still counts.
        let word = doubt.word.clone()?;
        return Some(Answered {
            delivery: doubt.delivery,
            rev: doubt.rev,
            answer: Answer::Happened,
            speaker: Speaker::Operator,
            actor: word.actor,
            reason: Some(format!("{} (its message is gone: nothing could follow)", word.reason)),
            receipt: word.receipt,
            follow_ups: Vec::new(),
            draw: 0.0,
        });
    };
    let context = Context::of(&envelope);
    let call = Call {
        attempt: handler::Attempt {
            number: doubt.attempts,
            max: envelope.max_attempts.unwrap_or(policy.retry.max_attempts),
            delivery: doubt.delivery,
        },
        envelope,
    };
    let (answer, receipt, speaker, actor, reason) = match doubt.word.clone() {
        Some(word) => {
            let receipt = Receipt { content: word.receipt, ..Receipt::none() };
            (Answer::Happened, receipt, Speaker::Operator, word.actor, Some(word.reason))
        }
        None => {
            let word = context.clone().scope(reconcile(route, &**handler, &call)).await?;
            let answer = believed(&word, doubt.quiet)?;
            let receipt = if let Reconciled::Done(receipt) = word { receipt } else { Receipt::none() };
            (answer, receipt, Speaker::Reconcile, format!("reconcile by {worker}"), None)
        }
    };
    let content = receipt.content.clone().map(clean_receipt);
    let follow_ups = match answer {
        Answer::Happened => match context.scope_sync(|| continued(&**handler, &call, receipt, max_payload_bytes)) {
            Ok(follow_ups) => follow_ups,
            Err(error) => {
                tracing::error!(
                    delivery = doubt.delivery,
                    error,
                    "it happened, but what follows cannot be published; it stays in doubt"
                );
                return None;
            }
        },
        _ => Vec::new(),
    };
    Some(Answered {
        delivery: doubt.delivery,
        rev: doubt.rev,
        answer,
        speaker,
        actor,
        reason,
        receipt: content,
        follow_ups,
        draw: fastrand::f64(),
    })
}

async fn reconcile<Db: Database>(route: &Route<Db>, handler: &dyn Bound<Db>, call: &Call) -> Option<Reconciled> {
    let timeout = route.declared.timeout;
    let asked = async {
        match handler.reconcile(call)? {
            Ok(future) => Some(future.await.map_err(|failure| failure.error)),
            Err(rejection) => Some(Err(rejection.0)),
        }
    };
    let words = match tokio::time::timeout(timeout, AssertUnwindSafe(asked).catch_unwind()).await {
        Ok(Ok(Some(Ok(reconciled)))) => return Some(reconciled),
        Ok(Ok(None)) => return None,
        Ok(Ok(Some(Err(words)))) => words,
        Ok(Err(panic)) => panic_words(&*panic),
        Err(_) => format!("no answer after {timeout:?}"),
    };
    tracing::warn!(
        subscription = route.declared.name,
        error = clean(words),
        "reconciling failed; it stays in doubt and is asked again"
    );
    None
}
