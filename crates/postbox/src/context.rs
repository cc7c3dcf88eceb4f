//! What a running handler's message hands on to those that it publishes.

use tokio::task_local;

use crate::message::{Draft, Envelope};

#[derive(Debug, Clone)]
pub(crate) struct Context {
    correlation: String,
    causation: String,
    traceparent: Option<String>,
}

task_local! {
    static CURRENT: Context;
}

impl Context {
    pub(crate) fn of(envelope: &Envelope) -> Context {
        Context {
            correlation: envelope.correlation(),
            causation: envelope.id.to_string(),
            traceparent: envelope.traceparent().map(str::to_owned),
        }
    }

    /// Runs a future in this context.
    pub(crate) async fn scope<F: Future>(self, future: F) -> F::Output {
        CURRENT.scope(self, future).await
    }

    /// Runs a function in this context.
    pub(crate) fn scope_sync<T>(self, function: impl FnOnce() -> T) -> T {
        CURRENT.sync_scope(self, function)
    }

    /// Fills in what the draft does not say itself.
    pub(crate) fn fill(&self, mut draft: Draft) -> Draft {
        draft.correlation_id.get_or_insert_with(|| self.correlation.clone());
        draft.causation_id.get_or_insert_with(|| self.causation.clone());
        if let Some(traceparent) = &self.traceparent {
            draft.headers.entry("traceparent".into()).or_insert_with(|| traceparent.clone());
        }
        draft
    }
}

/// Inside a handler: the draft with what its message hands on. Elsewhere: the draft.
pub(crate) fn inherit(draft: Draft) -> Draft {
    match CURRENT.try_with(Clone::clone) {
        Ok(context) => context.fill(draft),
        Err(_) => draft,
    }
}
