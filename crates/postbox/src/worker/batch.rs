//! One call of a batch handler: decode, call, and an end for each of its deliveries.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;

use super::attempt::{Means, ended_by, panic_words, succeeded};
use super::core::{Ended, Event, Hold, Lane, Member, settle_of};
use super::run::{Fate, Permit};
use super::told;
use crate::context::Context;
use crate::handler::{self, Answers, Call, Reading, Tx, Unread};
use crate::lifecycle::{End, Kind};
use crate::message::Envelope;
use crate::operation::Done;
use crate::router::BoundBatch;
use crate::store::{Database, Settle, Store};

/// What a batch handler is called with, and how.
pub(super) struct Called<Db: Database> {
    pub(super) means: Arc<Means<Db>>,
    pub(super) handler: Arc<dyn BoundBatch<Db>>,
    pub(super) lane: Lane,
    pub(super) members: Vec<Member>,
    pub(super) fate: Arc<Fate>,
}

/// Ends of some of the members, by their places.
type Ends = Vec<(usize, Ended)>;

/// Makes the call, in a task of its own.
pub(super) fn start<Db: Database>(called: Called<Db>) {
    let Some(first) = called.members.first() else { return };
    let permit = Permit(called.means.events.clone(), first.hold);
    let fate = called.fate.clone();
    let task = tokio::spawn(async move {
        let _permit = permit;
        if !called.fate.is_cancelled() {
            Box::pin(called.perform()).await;
        }
    });
    fate.goes_on(task.abort_handle());
}

impl<Db: Database> Called<Db> {
    async fn perform(self) {
        let begun = Instant::now();
        let means = self.means.clone();
        let (holds, fate): (Vec<Hold>, _) = (self.members.iter().map(|m| m.hold).collect(), self.fate.clone());
        let tell = move |ends: Ends| {
            let ran = begun.elapsed();
            let ends = ends.into_iter().map(|(place, ended)| (holds[place], Box::new(Ended { ran, ..ended })));
            means.events.send(Event::EndedTogether(ends.collect())).ok();
        };
        let (mut places, mut calls, mut unread) = (Vec::new(), Vec::new(), Ends::new());
        for (place, member) in self.members.iter().enumerate() {
            match &member.item.envelope {
                Some(envelope) => {
                    places.push(place);
                    calls.push(self.read(member, envelope));
                }
                None => {
                    let gone = "its message is gone: retention or a restore took it before it was delivered";
                    unread.push((place, Ended::failed(gone, true)));
                }
            }
        }
        let Reading { unread: left_out, start } = self.handler.read(calls);
        let out: Vec<usize> = left_out.iter().map(|(at, _)| places[*at]).collect();
        for (place, (_, why)) in out.iter().zip(left_out) {
            let ended = match why {
                Unread::Rejected(rejection) => Ended::failed(rejection.0, true),
                Unread::Panicked(panic) => Ended::new(End::Panicked, Some(panic_words(&*panic))),
            };
            unread.push((*place, ended));
        }
        places.retain(|place| out.binary_search(place).is_err());
        // Nothing that the handler does is theirs.
        if !unread.is_empty() {
            tell(unread);
        }
        if places.is_empty() {
            return;
        }
        if self.lane.policy.kind == Kind::Transactional {
            return self.transactional(places, start, begun, tell).await;
        }
        let ends = match called(|| start(None)).await {
            Ok(answers) => self.ends(&places, answers).unwrap_or_else(|all| alike(&places, &all)),
            Err(ended) => alike(&places, &ended),
        };
        if fate.seal() {
            tell(ends);
        }
    }

    fn read(&self, member: &Member, envelope: &Arc<Envelope>) -> Call {
        let max = envelope.max_attempts.unwrap_or(self.lane.policy.retry.max_attempts);
        let attempt = handler::Attempt { number: member.number, max, delivery: member.item.delivery };
        Call { envelope: envelope.clone(), attempt }
    }

    /// What each came to; or all of them, if the call failed as a whole.
    fn ends(&self, places: &[usize], answers: Answers) -> Result<Ends, Box<Ended>> {
        let each = answers.each(places.len()).map_err(|failure| Box::new(ended_by(failure)))?;
        let ended = |(place, verdict): (&usize, Result<Done, handler::Failure>)| {
            let ended = match verdict {
                Ok(done) => self.succeeded(*place, done),
                Err(failure) => ended_by(failure),
            };
            (*place, ended)
        };
        Ok(places.iter().zip(each).map(ended).collect())
    }

    fn succeeded(&self, place: usize, mut done: Done) -> Ended {
        if let Some(envelope) = &self.members[place].item.envelope {
            done.follow_ups = done.follow_ups.caused_by(&Context::of(envelope));
        }
        succeeded(done, self.means.max_payload_bytes)
    }

    /// Effects and outcomes of all commit together, or not at all.
    async fn transactional(
        self,
        places: Vec<usize>,
        start: handler::Start<Db>,
        begun: Instant,
        tell: impl Fn(Ends) + Send + Sync + 'static,
    ) {
        let fate = self.fate.clone();
        let ends = match self.in_transaction(&places, start).await {
            Ok((tx, ends)) => {
                // From here on nobody cancels: in a task of its own, so that an abort does not reach it.
                if fate.seal() {
                    tokio::spawn(async move { tell(self.commit(tx, ends, begun).await) }).await.ok();
                }
                return;
            }
            Err(ended) => alike(&places, &ended),
        };
        if fate.seal() {
            tell(ends);
        }
    }

    async fn in_transaction(
        &self,
        places: &[usize],
        start: handler::Start<Db>,
    ) -> Result<(<Db::Store as Store>::Tx, Ends), Box<Ended>> {
        let lease = self.members[0].lease;
        // An idle transaction must not outlive its lease.
        let opened = self.means.store.open(lease, self.lane.timeout.min(self.means.lease_time)).await;
        let tx = opened.map_err(|error| {
            // Not the handler's fault, and it was not called.
            tracing::warn!(deliveries = places.len(), %error, "no transaction could be opened; put off");
            let failed = Ended::failed(format!("no transaction could be opened: {error}"), false);
            Box::new(Ended { not_called: true, ..failed })
        })?;
        let (tx, home) = Tx::lend(tx);
        let answers = called(|| start(Some(tx))).await?;
        let ends = self.ends(places, answers)?;
        let returned = home.lock().ok().and_then(|mut home| home.take());
        let moved = "the handler moved its Tx to another task; it must be dropped when the handler returns";
        returned.map(|tx| (tx, ends)).ok_or_else(|| Box::new(Ended::failed(moved, true)))
    }

    async fn commit(self, tx: <Db::Store as Store>::Tx, mut ends: Ends, begun: Instant) -> Ends {
        let ran = begun.elapsed();
        ends.iter_mut().for_each(|(_, ended)| ended.ran = ran);
        let settles = self.flushes(&ends);
        let (store, patience) = (&self.means.store, self.means.patience);
        let all_done = |mut ends: Ends| {
            ends.iter_mut().for_each(|(_, ended)| ended.settled = true);
            ends
        };
        let error = match tokio::time::timeout(patience, store.settle_together(tx, &settles)).await {
            Ok(Ok(gone)) if gone.is_empty() => return all_done(ends),
            Ok(Ok(gone)) => return self.lost(ends, &gone),
            Ok(Err(error)) if error.is_transient() => error.to_string(),
            Ok(Err(error)) => return failed(ends, &Ended::failed(error, false)),
            Err(_) => "the commit got no answer".to_owned(),
        };
        let Some(first) = settles.first() else { return ends };
        // The COMMIT's answer was lost: ask, once nobody can still be committing it. One knows for all.
        let mut pause = Duration::from_millis(50);
        loop {
            let asked = store.recheck_part(first.lease, first.part);
            match told("recheck", patience, asked).await {
                Some(Some(true)) => return all_done(ends),
                Some(Some(false)) => return failed(ends, &Ended::failed(error, false)),
                Some(None) => return self.lost(ends, &[first.lease.token]),
                None => {}
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    /// What is written under each of its leases.
    fn flushes(&self, ends: &Ends) -> Vec<Settle> {
        let mut leases: BTreeMap<i64, Vec<&(usize, Ended)>> = BTreeMap::new();
        for end in ends {
            leases.entry(self.members[end.0].lease.batch).or_default().push(end);
        }
        let mut rng = fastrand::Rng::new();
        let flush = |ends: Vec<&(usize, Ended)>| {
            let Member { lease, part, .. } = &self.members[ends[0].0];
            let ended = ends.iter().map(|(place, ended)| (&self.members[*place].item, ended));
            settle_of((*lease, *part), ended, &self.lane, &mut rng)
        };
        leases.into_values().map(flush).collect()
    }

    /// Leases were lost, and everything was rolled back.
    fn lost(&self, ends: Ends, gone: &[uuid::Uuid]) -> Ends {
        let again = End::Failed { permanent: false, retry_after: Some(Duration::ZERO) };
        let ended = Ended::new(again, Some("the lease was lost; the transaction was rolled back".into()));
        let each = |(place, _): (usize, Ended)| {
            let fenced = gone.contains(&self.members[place].lease.token);
            (place, Ended { fenced, ..ended.clone() })
        };
        ends.into_iter().map(each).collect()
    }
}

/// Calls the handler, and waits for its end.
async fn called(
    start: impl FnOnce() -> Result<handler::BoxFuture<Answers>, handler::Rejection>,
) -> Result<Answers, Box<Ended>> {
    let panicked =
        |panic: Box<dyn std::any::Any + Send>| Box::new(Ended::new(End::Panicked, Some(panic_words(&*panic))));
    let future = match catch_unwind(AssertUnwindSafe(start)) {
        Ok(Ok(future)) => future,
        Ok(Err(rejection)) => return Err(Box::new(Ended::failed(rejection.0, true))),
        Err(panic) => return Err(panicked(panic)),
    };
    AssertUnwindSafe(future).catch_unwind().await.map_err(panicked)
}

/// The same end for all of these.
fn alike(places: &[usize], ended: &Ended) -> Ends {
    places.iter().map(|place| (*place, ended.clone())).collect()
}

fn failed(ends: Ends, ended: &Ended) -> Ends {
    ends.into_iter().map(|(place, _)| (place, ended.clone())).collect()
}
