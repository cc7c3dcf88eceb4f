//! Push: a handler in any language, behind a URL.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName};
use serde::Deserialize;

use crate::crash;
use crate::error::Error;
use crate::handler::{BoxFuture, Call, Failure, Handler, OperationHandler, ReconcileHook, Rejection, Tx};
use crate::http::{Answer, Meaning, Poster, Posting, Tested, Trouble, header_value, posting};
use crate::operation::{Done, Operation, OperationFailure, Receipt, Reconciled};
use crate::planted::planted;
use crate::router::{HandlerEntry, IntoSubscription, OperationEntry, Subscription, handler, operation};
use crate::store::Database;

/// Attempts of a push that was told no other number. With their waits they take 75 minutes on average: time enough to
/// start its program anew, or to mend it.
const ATTEMPTS: u32 = 20;
/// The key under which a remote makes repeats harmless.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// How much longer than a call its attempt may run.
const MARGIN: Duration = Duration::from_secs(10);

/// A handler behind a URL: [`push`].
#[derive(Debug, Clone)]
#[must_use = "it does nothing before it stands behind a topic"]
pub struct Push {
    posting: Posting,
    reconcile: Option<String>,
}

/// Posts a message to a program of your own, in any language: `Router::on("orders.placed", push("http://localhost:8000/events"))`.
///
/// It is signed as Standard Webhooks says, if there is a [`secret`](Push::secret). A 2xx is a success; other 4xx than
/// 408, 425 and 429 are permanent; anything else is tried again, up to 20 attempts with up to 15 minutes between them,
/// unless the entry is told otherwise. With [`operation`](Push::operation) a call whose end nobody saw is in doubt, and is
/// not repeated. See `docs/webhooks.md`.
///
/// Loopback and private addresses are called, link-local ones and the metadata services of clouds are not.
pub fn push(url: impl Into<String>) -> Push {
    let mut posting = Posting::to(url.into());
    posting.calling.guard.allow_own();
    Push { posting, reconcile: None }
}

impl Push {
    posting!();

    /// Where an operation's doubts are asked about: `GET` with the `Idempotency-Key`, answered with 200 and
    /// `{"status": "done"}`, `{"status": "not_done"}` (and it will not turn up later) or `{"status": "unknown"}`.
    /// Any other answer counts as unknown.
    pub fn reconcile(mut self, url: impl Into<String>) -> Push {
        self.reconcile = Some(url.into());
        self
    }

    /// Whether everything that was set can be used.
    ///
    /// # Errors
    /// [`Error::Settings`]: what cannot.
    pub fn check(&self) -> Result<(), Error> {
        self.ready().map(drop).map_err(Error::Settings)
    }

    /// Sends one message of the topic `postbox.test`, and says how it went.
    ///
    /// # Errors
    /// [`Error::Settings`]: what was set cannot be used.
    pub async fn test(&self) -> Result<Tested, Error> {
        let (poster, _) = self.ready().map_err(Error::Settings)?;
        Ok(poster.test().await)
    }

    fn ready(&self) -> Result<(Poster, Option<Poster>), String> {
        let poster = self.posting.ready()?;
        let asked = self.reconcile.as_ref().map(|url| Posting { url: url.clone(), ..self.posting.clone() }.ready());
        let asked = asked.transpose().map_err(|why| format!("where doubts are asked about: {why}"))?;
        Ok((poster, asked))
    }

    #[track_caller]
    fn wired(&self) -> (Poster, Option<Poster>) {
        match self.ready() {
            Ok(ready) => ready,
            Err(why) => panic!("the push cannot be used: {why}"),
        }
    }

    fn name(&self) -> String {
        format!("push:{}", self.posting.host())
    }

    /// As a plain handler, to be given options. Its durable name is `push:HOST` until it is given another.
    ///
    /// # Panics
    /// What was set cannot be used; see [`check`](Push::check).
    #[track_caller]
    pub fn handler(self) -> HandlerEntry<Pushing> {
        let timeout = self.posting.calling.timeout;
        let (poster, _) = self.wired();
        let entry = handler(Pushing { poster, asked: None }).named(self.name()).max_attempts(ATTEMPTS);
        entry.timeout(timeout.saturating_add(MARGIN))
    }

    /// As an operation, to be given options: each call has an `Idempotency-Key`, and one whose end nobody saw is in
    /// doubt. Its durable name is `push:HOST` until it is given another.
    ///
    /// # Panics
    /// What was set cannot be used; see [`check`](Push::check).
    #[track_caller]
    pub fn operation<S: 'static>(mut self) -> OperationEntry<S> {
        // A connection that its server closes under a request would be a doubt.
        self.posting.calling.reuse = false;
        let timeout = self.posting.calling.timeout;
        let (poster, asked) = self.wired();
        let pushing = Pushing { poster, asked };
        let entry = operation(pushing.clone()).named(self.name()).max_attempts(ATTEMPTS);
        let entry = entry.timeout(timeout.saturating_add(MARGIN));
        if pushing.asked.is_some() { entry.reconcile(pushing) } else { entry }
    }
}

/// Tells the impls apart.
#[doc(hidden)]
pub struct Pushes;

#[diagnostic::do_not_recommend]
impl<Db: Database, S: Clone + Send + Sync + 'static> IntoSubscription<Db, S, Pushes> for Push {
    #[track_caller]
    fn into_subscription(self) -> Subscription<Db, S> {
        self.handler().into_subscription()
    }
}

/// What stands behind a push.
#[doc(hidden)]
#[derive(Debug, Clone)]
pub struct Pushing {
    poster: Poster,
    asked: Option<Poster>,
}

// Where somebody's own handler does not fit, nobody asks for this one.
#[diagnostic::do_not_recommend]
impl<Db: Database, S> Handler<Db, S, Pushes> for Pushing {
    const TRANSACTIONAL: bool = false;

    fn call(&self, call: &Call, _: &S, _: Option<Tx<Db>>) -> Result<BoxFuture<Result<Done, Failure>>, Rejection> {
        let (poster, message) = (self.poster.clone(), call.envelope.clone());
        Ok(Box::pin(async move {
            let answer = poster.post(&message, HeaderMap::new()).await;
            crash::point("pushed");
            let receipt = answer.as_ref().ok().and_then(|answer| poster.kept(answer));
            handled(answer, &poster.endpoint.origin()).map(|done| Done { receipt, ..done })
        }))
    }
}

#[diagnostic::do_not_recommend]
impl<S> OperationHandler<S, Pushes> for Pushing {
    fn call(&self, call: &Call, _: &S) -> Result<BoxFuture<Result<Receipt, OperationFailure>>, Rejection> {
        let (poster, message, attempt) = (self.poster.clone(), call.envelope.clone(), call.attempt);
        let operation = Operation::of(message.id, attempt.delivery, attempt.number);
        Ok(Box::pin(async move {
            let answer = poster.post(&message, keyed(&operation)).await;
            crash::point("operated");
            operated(answer, &poster.endpoint.origin())
        }))
    }
}

#[diagnostic::do_not_recommend]
impl<S> ReconcileHook<S, Pushes> for Pushing {
    fn call(&self, call: &Call, _: &S) -> Result<BoxFuture<Result<Reconciled, Failure>>, Rejection> {
        let asked = self.asked.clone().ok_or_else(|| Rejection::new("there is nobody to ask"))?;
        let (id, attempt) = (call.envelope.id, call.attempt);
        let operation = Operation::of(id, attempt.delivery, attempt.number);
        Ok(Box::pin(async move {
            let answer = asked.ask(id, keyed(&operation)).await;
            Ok(reconciled(&answer.map_err(|trouble| Failure::retry(trouble.words()))?))
        }))
    }
}

fn keyed(operation: &Operation) -> HeaderMap {
    HeaderMap::from_iter([(IDEMPOTENCY_KEY, header_value(operation.idempotency_key()))])
}

/// What a plain push comes to.
fn handled(answer: Result<Answer, Trouble>, origin: &str) -> Result<Done, Failure> {
    let answer = answer.map_err(|trouble| Failure::retry(trouble.words()))?;
    let words = || answer.words(origin);
    match (answer.meaning(), answer.wait()) {
        (Meaning::Done, _) => Ok(Done::new()),
        (Meaning::Gone | Meaning::Refused, _) => Err(Failure::permanent(words())),
        (Meaning::NotNow | Meaning::Failed, Some(wait)) => Err(Failure::retry_after(words(), wait)),
        (Meaning::NotNow | Meaning::Failed, None) => Err(Failure::retry(words())),
    }
}

/// What an operation's push comes to. That it did not happen is believed only of answers that say so.
fn operated(answer: Result<Answer, Trouble>, origin: &str) -> Result<Receipt, OperationFailure> {
    let answer = match answer {
        Ok(answer) => answer,
        Err(Trouble::NotSent(words)) => return Err(OperationFailure::not_done(words)),
        Err(Trouble::Unknown(words)) if planted!("no-answer-is-not-done") => {
            return Err(OperationFailure::not_done(words));
        }
        Err(Trouble::Unknown(words)) => return Err(OperationFailure::in_doubt(words)),
    };
    let words = answer.words(origin);
    let not_done = |error, retry_after| Err(OperationFailure::NotDone { error, retry_after });
    match (answer.status, answer.wait()) {
        (200..=299, _) => Ok(Receipt::of(answer.receipt())),
        // Too early, too many: refused before anything was done.
        (425 | 429, wait) => not_done(words, wait),
        // "Come again later" was said on purpose. Without the header it may be a proxy that lost its server half-way.
        (503, Some(wait)) => not_done(words, Some(wait)),
        // To be asked elsewhere, with the same method and body: nothing was done here.
        (307 | 308, _) => Err(OperationFailure::refused(words)),
        // After a form was taken, a browser is sent on: that may well be a success. And a request that timed out
        // there may have timed out on its way to those who do the work.
        (300..=399 | 408, _) => Err(OperationFailure::in_doubt(words)),
        (400..=499, _) => Err(OperationFailure::refused(words)),
        _ => Err(OperationFailure::in_doubt(words)),
    }
}

/// What a remote says of a doubt.
fn reconciled(answer: &Answer) -> Reconciled {
    #[derive(Deserialize)]
    struct Said {
        status: String,
    }
    let said = serde_json::from_slice::<Said>(&answer.body).ok().filter(|_| answer.status == 200);
    match said.as_ref().map(|said| said.status.as_str()) {
        Some("done") => Reconciled::Done(Receipt::of(answer.receipt())),
        Some("not_done") => Reconciled::NotDone,
        _ => Reconciled::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn answered(status: u16, wait: Option<u64>) -> Result<Answer, Trouble> {
        let retry_after = wait.map(Duration::from_secs);
        Ok(Answer { status, retry_after, body: b"words".to_vec(), took: Duration::ZERO })
    }

    #[test]
    fn an_operation_did_not_happen_only_if_the_answer_says_so() {
        let verdict = |status, wait| match operated(answered(status, wait), "http://a") {
            Ok(_) => "done",
            Err(OperationFailure::InDoubt { .. }) => "in doubt",
            Err(OperationFailure::NotDone { .. }) => "not done",
            Err(OperationFailure::Refused { .. }) => "refused",
            Err(OperationFailure::Discarded { .. }) => "discarded",
        };
        for (statuses, expected) in [
            (&[200, 201, 202, 204][..], "done"),
            (&[307, 308, 400, 401, 403, 404, 409, 410, 413, 422], "refused"),
            (&[425, 429], "not done"),
            (&[300, 301, 302, 303, 304, 408, 500, 501, 502, 503, 504, 599, 100], "in doubt"),
        ] {
            for status in statuses {
                assert_eq!(verdict(*status, None), expected, "{status}");
            }
        }
        assert_eq!(verdict(503, Some(5)), "not done");
        assert_eq!(verdict(503, Some(0)), "in doubt");
        assert_eq!(verdict(502, Some(5)), "in doubt", "a gateway may have lost its server half-way");
        assert_eq!(verdict(504, Some(5)), "in doubt");
        let doubt = operated(Err(Trouble::Unknown("lost".into())), "http://a");
        assert!(matches!(doubt, Err(OperationFailure::InDoubt { error }) if error == "lost"));
        let unsent = operated(Err(Trouble::NotSent("refused".into())), "http://a");
        assert!(matches!(unsent, Err(OperationFailure::NotDone { error, retry_after: None }) if error == "refused"));
        let receipt = operated(answered(201, None), "http://a").expect("done");
        assert_eq!(receipt.content(), Some(&json!({ "status": 201, "body": "words" })));
    }

    #[test]
    fn a_plain_push_is_tried_again_where_that_may_help() {
        let permanent = |status| {
            let failed = handled(answered(status, None), "http://a").expect_err("failed");
            format!("{failed:?}").contains("permanent: true")
        };
        for status in [301, 400, 404, 409, 410, 422] {
            assert!(permanent(status), "{status}");
        }
        for status in [408, 425, 429, 500, 502, 503] {
            assert!(!permanent(status), "{status}");
        }
        assert!(handled(answered(204, None), "http://a").is_ok());
        let later = handled(answered(503, Some(9)), "http://a").expect_err("failed");
        assert!(format!("{later:?}").contains("retry_after: Some(9s)"), "{later:?}");
    }

    #[test]
    fn a_doubt_ends_only_by_a_clear_word() {
        let verdict = |status, body: &str| {
            let answer = Answer { status, retry_after: None, body: body.into(), took: Duration::ZERO };
            match reconciled(&answer) {
                Reconciled::Done(_) => "done",
                Reconciled::NotDone => "not done",
                Reconciled::Unknown => "unknown",
            }
        };
        assert_eq!(verdict(200, r#"{"status": "done", "charge": 7}"#), "done");
        assert_eq!(verdict(200, r#"{"status": "not_done"}"#), "not done");
        for (status, body) in [
            (200, ""),
            (200, "{}"),
            (200, r#"{"status": "unknown"}"#),
            (200, r#"{"status": "Done"}"#),
            (200, r#"{"status": ["done"]}"#),
            (404, r#"{"status": "not_done"}"#),
            (404, ""),
            (500, r#"{"status": "done"}"#),
        ] {
            assert_eq!(verdict(status, body), "unknown", "{status} {body}");
        }
    }
}
