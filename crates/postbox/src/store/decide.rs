//! What stores decide, apart from how they write it: pure, so that each store and the simulation
//! take the same decisions.

use std::time::Duration;

use uuid::Uuid;

use super::{Answered, DeliveryId, Item, Move, Observation, OutcomeRecord, Speaker, SubscriptionId};
use crate::lifecycle::{Answer, Event, Kind, Policy, Refused, Standing, State, transition};
use crate::operation::Reconciled;
use crate::planted::planted;

/// A delivery that a lease still holds when its worker does not work on it any more.
#[derive(Debug, Clone)]
pub(crate) struct Left {
    pub(crate) delivery: DeliveryId,
    pub(crate) message: Uuid,
    pub(crate) subscription: SubscriptionId,
    pub(crate) priority: i16,
    /// While it is leased.
    pub(crate) rev: i32,
    /// Running, with the attempt that is on record counted.
    pub(crate) standing: Standing,
    pub(crate) policy: Policy,
    /// How long it has been in the worker's hands.
    pub(crate) ran: Duration,
    /// How long a call that it sent may still be on its way: see [`quiet_after_loss`].
    pub(crate) quiet: Duration,
}

/// Where a dead worker's delivery goes.
pub(crate) fn lost(left: &Left, worker: &str, draw: f64) -> Result<Move, Refused> {
    let next = transition(left.standing, Event::WorkerLost, &left.policy, draw)?;
    let words = format!("worker {worker} was lost during the attempt");
    let outcome = left.standing.begun.then(|| OutcomeRecord {
        number: left.standing.attempts,
        kind: if next.standing.state == State::InDoubt { "in_doubt" } else { "lost" },
        error: Some(words.clone()),
        receipt: None,
        ran: left.ran,
        ago: Duration::ZERO,
    });
    // What may have begun comes first of its key, whatever has been published since: in the same order again.
    let leads = left.standing.begun || left.policy.kind != Kind::Operation;
    Ok(Move { note: words, quiet: left.quiet, outcome, delay: next.delay, leads, ..left.to(next.standing) })
}

/// Whether nobody knows if a lost delivery had started: that is kept as an observation.
pub(crate) fn unseen(left: &Left, moved: &Move) -> bool {
    moved.outcome.is_none() && moved.standing.lost > left.standing.lost
}

/// How long after a takeover a call of the old worker may still arrive. It may only be paused, right
/// before it sends: what it has left is its lease and its handler's timeout, and the call's own time.
pub(crate) fn quiet_after_loss(lease: Duration, timeout: Duration, quiet: Duration) -> Duration {
    if planted!("quiet-without-lease") {
        return quiet;
    }
    lease.saturating_add(timeout).saturating_add(quiet)
}

/// Where a delivery goes that a worker holds without knowing it.
pub(crate) fn handed_back(left: &Left) -> Result<Move, Refused> {
    let begun = left.standing.begun && !planted!("disown-what-began");
    let next = transition(Standing { begun, ..left.standing }, Event::Released, &left.policy, 0.0)?;
    Ok(left.to(next.standing))
}

/// What was leased and never started goes back as it was.
pub(crate) fn released(item: &Item) -> Move {
    let attempts = if planted!("attempts-reset-at-release") { 0 } else { item.attempts };
    Move {
        delivery: item.delivery,
        message: item.message,
        subscription: item.subscription,
        priority: item.priority,
        rev: item.rev + 1,
        standing: Standing { state: State::Pending, attempts, begun: false, lost: item.lost },
        delay: Duration::ZERO,
        quiet: Duration::ZERO,
        note: String::new(),
        outcome: None,
        leads: false,
    }
}

impl Left {
    fn to(&self, standing: Standing) -> Move {
        Move {
            delivery: self.delivery,
            message: self.message,
            subscription: self.subscription,
            priority: self.priority,
            rev: self.rev + 1,
            standing,
            delay: Duration::ZERO,
            quiet: Duration::ZERO,
            note: String::new(),
            outcome: None,
            leads: false,
        }
    }
}

/// A delivery in doubt.
#[derive(Debug, Clone)]
pub(crate) struct Doubt {
    pub(crate) message: Uuid,
    pub(crate) subscription: SubscriptionId,
    pub(crate) priority: i16,
    pub(crate) attempts: u32,
    pub(crate) rev: i32,
    /// An operator's "happened" waits to be carried out.
    pub(crate) word: bool,
    pub(crate) policy: Policy,
}

/// Where an answer leads.
pub(crate) fn end_of_doubt(doubt: &Doubt, answered: &Answered) -> Result<Move, Refused> {
    let now = Standing { state: State::InDoubt, attempts: doubt.attempts, begun: false, lost: 0 };
    let next = transition(now, Event::Resolved(answered.answer), &doubt.policy, answered.draw)?;
    let note = match answered.answer {
        Answer::Abandoned => "abandoned: outcome never known".to_owned(),
        _ => format!("{} said that it {}", answered.actor, answered.answer.as_str().replace('_', " ")),
    };
    Ok(Move {
        delivery: answered.delivery,
        message: doubt.message,
        subscription: doubt.subscription,
        priority: doubt.priority,
        rev: doubt.rev + 1,
        standing: next.standing,
        delay: next.delay,
        quiet: Duration::ZERO,
        note,
        outcome: None,
        leads: true,
    })
}

/// What a late outcome says about a doubt, if it proves anything: it is that of the attempt in doubt.
pub(crate) fn evidence(seen: &Observation, doubt: &Doubt) -> Option<Answered> {
    let evidence = seen.evidence.as_ref()?;
    let own = doubt.attempts == seen.number || planted!("late-outcome-overwrites");
    // An operator's "happened" that waits to be carried out is not overruled.
    let overruled = doubt.word && evidence.answer != Answer::Happened;
    (own && !overruled).then(|| Answered {
        delivery: seen.delivery,
        rev: doubt.rev,
        answer: evidence.answer,
        speaker: Speaker::Evidence,
        actor: format!("worker {}", seen.worker),
        reason: Some("its outcome came after its lease had run out".into()),
        receipt: evidence.receipt.clone(),
        follow_ups: evidence.follow_ups.clone(),
        draw: 1.0,
    })
}

/// What a reconcile hook's word is worth: a "not done" is not believed while a call that was cut off
/// may still be on its way.
pub(crate) fn believed(word: &Reconciled, quiet: bool) -> Option<Answer> {
    match word {
        Reconciled::Done(_) => Some(Answer::Happened),
        Reconciled::NotDone if quiet || planted!("not-done-believed-at-once") => Some(Answer::DidNotHappen),
        Reconciled::NotDone | Reconciled::Unknown => None,
    }
}
