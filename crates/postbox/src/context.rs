//! What a running handler's message hands on to those that it publishes.

use std::sync::Arc;

use tokio::task_local;

use crate::message::{Draft, Envelope};

/// The message that is handled.
#[derive(Debug, Clone)]
pub(crate) struct Context(Arc<Envelope>);

task_local! {
    static CURRENT: Context;
}

impl Context {
    pub(crate) fn of(envelope: &Arc<Envelope>) -> Context {
        Context(envelope.clone())
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
        draft.correlation_id.get_or_insert_with(|| self.0.correlation());
        draft.causation_id.get_or_insert_with(|| self.0.id.to_string());
        if let Some(traceparent) = self.0.traceparent() {
            draft.headers.entry("traceparent".into()).or_insert_with(|| traceparent.to_owned());
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
