//! Batch handlers: one call for several deliveries, and an outcome for each of them.

use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::{Attempt, BoxFuture, Call, Failure, FromDelivery, FromRef, IntoVerdict, Payload, Rejection, State, Tx};
use crate::content::Bytes;
use crate::context::Context;
use crate::error::PublishError;
use crate::message::{Draft, Envelope, IntoDraft};
use crate::operation::Done;
use crate::store::{Database, DeliveryId};

/// How deliveries come together for a batch handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gather {
    /// So many at the most.
    pub(crate) most: usize,
    /// The first waits so long for others at the most.
    pub(crate) within: Duration,
}

/// One delivery of a [`Batch`].
#[derive(Debug, Clone)]
pub struct Delivered<T> {
    /// Its message's payload, decoded.
    pub payload: T,
    /// Which attempt this is.
    pub attempt: Attempt,
    envelope: Arc<Envelope>,
    place: usize,
}

impl<T> Delivered<T> {
    /// Its message: topic, key, headers and the rest.
    pub fn envelope(&self) -> &Envelope {
        &self.envelope
    }

    /// Its message's id.
    pub fn id(&self) -> Uuid {
        self.envelope.id
    }

    /// Its message's key.
    pub fn key(&self) -> Option<&str> {
        self.envelope.key.as_deref()
    }

    /// A message that this one causes: it carries on the correlation id and the trace context, and names this
    /// one as its cause. In a batch that does not go by itself; in the outcome of this delivery
    /// ([`Done::then`](crate::Done::then)) it does.
    ///
    /// # Errors
    /// The message does not serialize.
    pub fn causes(&self, message: impl IntoDraft) -> Result<Draft, PublishError> {
        Ok(Context::of(&self.envelope).fill(message.into_draft()?))
    }
}

/// What a batch handler is called with: one delivery or more, of one subscription, in the order in which they
/// were claimed. Those whose payload does not decode are not among them: each is dead by itself.
#[derive(Debug)]
pub struct Batch<T> {
    items: Vec<Delivered<T>>,
}

impl<T> Batch<T> {
    /// Outcomes for all of them: each has succeeded, until something else is said.
    pub fn outcomes(&self) -> Outcomes {
        let verdicts = self.items.iter().map(|item| (item.attempt.delivery, Ok(Done::new())));
        Outcomes { verdicts: verdicts.collect(), stray: None }
    }
}

impl<T> Deref for Batch<T> {
    type Target = [Delivered<T>];

    fn deref(&self) -> &[Delivered<T>] {
        &self.items
    }
}

impl<T> IntoIterator for Batch<T> {
    type Item = Delivered<T>;
    type IntoIter = std::vec::IntoIter<Delivered<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.into_iter()
    }
}

impl<'a, T> IntoIterator for &'a Batch<T> {
    type Item = &'a Delivered<T>;
    type IntoIter = std::slice::Iter<'a, Delivered<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.items.iter()
    }
}

/// An outcome for each delivery of a [`Batch`]: [`Batch::outcomes`].
#[derive(Debug)]
#[must_use = "return them, so that they are put on record"]
pub struct Outcomes {
    verdicts: Vec<(DeliveryId, Result<Done, Failure>)>,
    stray: Option<DeliveryId>,
}

impl Outcomes {
    /// This one has failed.
    pub fn fail<T>(&mut self, delivered: &Delivered<T>, failure: impl Into<Failure>) {
        self.put(delivered, Err(failure.into()));
    }

    /// What this one came to: what a handler of single messages may return.
    pub fn set<T>(&mut self, delivered: &Delivered<T>, verdict: impl IntoVerdict) {
        self.put(delivered, verdict.into_verdict());
    }

    fn put<T>(&mut self, delivered: &Delivered<T>, verdict: Result<Done, Failure>) {
        match self.verdicts.get_mut(delivered.place) {
            Some((delivery, place)) if *delivery == delivered.attempt.delivery => *place = verdict,
            _ => self.stray = Some(delivered.attempt.delivery),
        }
    }
}

/// What a batch handler returned.
#[doc(hidden)]
#[derive(Debug)]
pub struct Answers(Answered);

#[derive(Debug)]
enum Answered {
    All(Result<(), Failure>),
    Each(Vec<Result<Done, Failure>>),
    Stray(DeliveryId),
}

impl Answers {
    pub(crate) fn of(each: Vec<Result<Done, Failure>>) -> Answers {
        Answers(Answered::Each(each))
    }

    /// An answer for each of so many, or what the call failed of as a whole.
    pub(crate) fn each(self, count: usize) -> Result<Vec<Result<Done, Failure>>, Failure> {
        let wrong = |what: String| Failure::retry(format!("{what}; nothing of the batch counts as done"));
        match self.0 {
            Answered::All(Ok(())) => Ok((0..count).map(|_| Ok(Done::new())).collect()),
            Answered::All(Err(failure)) => Err(failure),
            Answered::Each(each) if each.len() == count => Ok(each),
            Answered::Each(each) => {
                Err(wrong(format!("the handler gave {} outcomes for a batch of {count}", each.len())))
            }
            Answered::Stray(delivery) => {
                Err(wrong(format!("the handler gave an outcome for delivery {delivery}, which is not in the batch")))
            }
        }
    }
}

/// What a batch handler may return: `()`, `Vec<Result<(), Failure>>` with one for each in their order,
/// [`Outcomes`], or a `Result` of one of these, whose error is that of all.
pub trait IntoOutcomes {
    /// The answers.
    #[doc(hidden)]
    fn into_outcomes(self) -> Answers;
}

impl IntoOutcomes for () {
    fn into_outcomes(self) -> Answers {
        Answers(Answered::All(Ok(())))
    }
}

impl IntoOutcomes for Outcomes {
    fn into_outcomes(self) -> Answers {
        Answers(match self.stray {
            Some(delivery) => Answered::Stray(delivery),
            None => Answered::Each(self.verdicts.into_iter().map(|(_, verdict)| verdict).collect()),
        })
    }
}

impl<V: IntoVerdict> IntoOutcomes for Vec<V> {
    fn into_outcomes(self) -> Answers {
        Answers(Answered::Each(self.into_iter().map(IntoVerdict::into_verdict).collect()))
    }
}

impl<T: IntoOutcomes> IntoOutcomes for Result<T, Failure> {
    fn into_outcomes(self) -> Answers {
        match self {
            Ok(outcomes) => outcomes.into_outcomes(),
            Err(failure) => Answers(Answered::All(Err(failure))),
        }
    }
}

/// What a [`Batch`] is of: anything that deserializes from JSON, or [`Bytes`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be the payload of a batch",
    note = "`Batch<T>` takes what deserializes from JSON, or `Bytes`"
)]
pub trait BatchPayload: Sized + Send + 'static {
    /// Reads it.
    ///
    /// # Errors
    /// The delivery is dead, the others of the batch are not.
    fn from_call(call: &Call) -> Result<Self, Rejection>;
}

impl<T: DeserializeOwned + Send + 'static> BatchPayload for T {
    fn from_call(call: &Call) -> Result<Self, Rejection> {
        Payload::from_delivery(call, &()).map(|Payload(payload)| payload)
    }
}

impl BatchPayload for Bytes {
    fn from_call(call: &Call) -> Result<Self, Rejection> {
        Bytes::from_delivery(call, &())
    }
}

/// A batch handler: an async function of `Batch<T>`, up to four `State<S>`, and `Tx<Db>` last if effects and
/// outcomes are to commit together.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no batch handler",
    label = "not a batch handler",
    note = "a batch handler is an async function whose arguments are Batch<T>, then State<S> (at most four), then Tx<Db> if it is transactional, and that returns (), Vec<Result<(), postbox::Failure>>, Outcomes, or a Result of one of these and postbox::Failure",
    note = "irreversible work is done one at a time: `operation(f)` goes to `on`, not to `on_batch`"
)]
pub trait BatchHandler<Db: Database, S, M>: Send + Sync + 'static {
    /// What the batch is of.
    type Payload: BatchPayload;

    /// Whether it takes a `Tx`.
    const TRANSACTIONAL: bool;

    /// Starts the function. `tx` is there if it takes one.
    #[doc(hidden)]
    fn call(&self, batch: Batch<Self::Payload>, state: &S, tx: Option<Tx<Db>>)
    -> Result<BoxFuture<Answers>, Rejection>;
}

macro_rules! batch_handlers {
    ($($arg:ident),*) => {
        #[allow(non_snake_case, unused_variables)]
        impl<Db, S, F, Fut, Out, T, $($arg,)*> BatchHandler<Db, S, (Db, Out, T, $($arg,)*)> for F
        where
            Db: Database,
            F: Fn(Batch<T>, $(State<$arg>),*) -> Fut + Send + Sync + 'static,
            Fut: Future<Output = Out> + Send + 'static,
            Out: IntoOutcomes + 'static,
            T: BatchPayload,
            $($arg: FromRef<S> + 'static,)*
        {
            type Payload = T;
            const TRANSACTIONAL: bool = false;

            fn call(&self, batch: Batch<T>, state: &S, _: Option<Tx<Db>>) -> Result<BoxFuture<Answers>, Rejection> {
                $(let $arg = State($arg::from_ref(state));)*
                let future = self(batch, $($arg),*);
                Ok(Box::pin(async move { future.await.into_outcomes() }))
            }
        }

        #[allow(non_snake_case, unused_variables)]
        impl<Db, S, F, Fut, Out, T, $($arg,)*> BatchHandler<Db, S, (Tx<Db>, Out, T, $($arg,)*)> for F
        where
            Db: Database,
            F: Fn(Batch<T>, $(State<$arg>,)* Tx<Db>) -> Fut + Send + Sync + 'static,
            Fut: Future<Output = Out> + Send + 'static,
            Out: IntoOutcomes + 'static,
            T: BatchPayload,
            $($arg: FromRef<S> + 'static,)*
        {
            type Payload = T;
            const TRANSACTIONAL: bool = true;

            fn call(&self, batch: Batch<T>, state: &S, tx: Option<Tx<Db>>) -> Result<BoxFuture<Answers>, Rejection> {
                let tx = tx.ok_or_else(|| Rejection::new("there is no transaction for a transactional handler"))?;
                $(let $arg = State($arg::from_ref(state));)*
                let future = self(batch, $($arg,)* tx);
                Ok(Box::pin(async move { future.await.into_outcomes() }))
            }
        }
    };
}
batch_handlers!();
batch_handlers!(A1);
batch_handlers!(A1, A2);
batch_handlers!(A1, A2, A3);
batch_handlers!(A1, A2, A3, A4);

/// Why one delivery is not in the batch that its handler is called with.
pub(crate) enum Unread {
    Rejected(Rejection),
    Panicked(Box<dyn std::any::Any + Send>),
}

/// The rest of a call: it takes the transaction, if the handler wants one.
pub(crate) type Start<Db> = Box<dyn FnOnce(Option<Tx<Db>>) -> Result<BoxFuture<Answers>, Rejection> + Send>;

/// Deliveries whose payloads are decoded, before their handler is called.
pub(crate) struct Reading<Db: Database> {
    /// By their places.
    pub(crate) unread: Vec<(usize, Unread)>,
    pub(crate) start: Start<Db>,
}

impl<Db: Database> fmt::Debug for Reading<Db> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reading({} unread)", self.unread.len())
    }
}

/// Decodes what a batch handler takes. One payload that cannot be decoded, or panics, concerns no other.
pub(crate) fn read<Db, S, H, M>(handler: &Arc<H>, state: &S, calls: Vec<Call>) -> Reading<Db>
where
    Db: Database,
    S: Clone + Send + 'static,
    H: BatchHandler<Db, S, M>,
    M: 'static,
{
    let (mut items, mut unread) = (Vec::with_capacity(calls.len()), Vec::new());
    for (place, call) in calls.into_iter().enumerate() {
        match catch_unwind(AssertUnwindSafe(|| H::Payload::from_call(&call))) {
            Ok(Ok(payload)) => {
                let place = items.len();
                items.push(Delivered { payload, attempt: call.attempt, envelope: call.envelope, place });
            }
            Ok(Err(rejection)) => unread.push((place, Unread::Rejected(rejection))),
            Err(panic) => unread.push((place, Unread::Panicked(panic))),
        }
    }
    let (handler, state) = (handler.clone(), state.clone());
    Reading { unread, start: Box::new(move |tx| handler.call(Batch { items }, &state, tx)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::End;

    fn batch(deliveries: std::ops::Range<i64>) -> Batch<i64> {
        let envelope = Arc::new(Envelope {
            id: Uuid::nil(),
            topic: "t".into(),
            key: None,
            payload: crate::content::Content::Bytes(Bytes::new("text/plain", *b"x")),
            headers: Default::default(),
            occurred_at: jiff::Timestamp::UNIX_EPOCH,
            received_at: jiff::Timestamp::UNIX_EPOCH,
            source: None,
            external_id: None,
            correlation_id: None,
            causation_id: None,
            max_attempts: None,
        });
        let items = deliveries.enumerate().map(|(place, delivery)| Delivered {
            payload: delivery,
            attempt: Attempt { number: 1, max: 4, delivery },
            envelope: envelope.clone(),
            place,
        });
        Batch { items: items.collect() }
    }

    fn ends(answers: Answers, count: usize) -> Result<Vec<Option<End>>, String> {
        let each = answers.each(count).map_err(|failure| failure.error)?;
        Ok(each.into_iter().map(|verdict| verdict.err().map(|failure| failure.end)).collect())
    }

    #[test]
    fn outcomes_are_kept_by_delivery() {
        let batch = batch(7..10);
        let mut outcomes = batch.outcomes();
        outcomes.fail(&batch[1], Failure::permanent("no"));
        outcomes.set(&batch[2], Ok::<(), Failure>(()));
        let dead = Some(End::Failed { permanent: true, retry_after: None });
        assert_eq!(ends(outcomes.into_outcomes(), 3), Ok(vec![None, dead, None]));
    }

    #[test]
    fn a_wrong_number_of_outcomes_is_the_failure_of_all() {
        let two: Vec<Result<(), Failure>> = vec![Ok(()), Ok(())];
        let words = "the handler gave 2 outcomes for a batch of 3; nothing of the batch counts as done";
        assert_eq!(ends(two.into_outcomes(), 3), Err(words.to_owned()));
        let (one, other) = (batch(1..3), batch(8..9));
        let mut outcomes = one.outcomes();
        outcomes.fail(&other[0], Failure::retry("not mine"));
        assert!(ends(outcomes.into_outcomes(), 2).is_err_and(|words| words.contains("delivery 8")));
        assert_eq!(ends(().into_outcomes(), 2), Ok(vec![None, None]));
        let failed: Result<Outcomes, Failure> = Err(Failure::retry("all of it"));
        assert_eq!(ends(failed.into_outcomes(), 2), Err("all of it".to_owned()));
    }
}
