//! Several handlers, one delivery, one transaction.

use std::sync::Arc;

use super::{BoxFuture, Call, Failure, Handler, Rejection, Tx};
use crate::operation::Done;
use crate::store::Database;

/// Handlers that stand behind one subscription: [`together`](crate::together).
pub struct Together<T>(Arc<T>);

impl<T> Together<T> {
    pub(crate) fn new(handlers: T) -> Self {
        Together(Arc::new(handlers))
    }
}

/// A tuple of two to eight, for [`together`](crate::together).
#[diagnostic::on_unimplemented(
    message = "`together` takes a tuple of two to eight handlers",
    label = "not two to eight handlers",
    note = "write `together((reserve_stock, notify_crm))`, with two pairs of parentheses"
)]
pub trait Several {}

/// Tells the impls of [`Handler`] apart.
#[doc(hidden)]
pub struct Joined;

/// The transaction, on its way from one handler to the next.
async fn one<Db: Database, H: Handler<Db, S, M>, S, M>(
    handler: &H,
    call: &Call,
    state: &S,
    tx: &mut Tx<Db>,
) -> Result<Done, Failure> {
    if !H::TRANSACTIONAL {
        return handler.call(call, state, None).map_err(rejected)?.await;
    }
    // One that an earlier handler kept is missed when all have ended, as it is with a single handler.
    let Some(inner) = tx.inner.take() else { return Ok(Done::new()) };
    let (lent, home) = Tx::lend(inner);
    let ended = handler.call(call, state, Some(lent)).map_err(rejected)?.await;
    tx.inner = home.lock().ok().and_then(|mut home| home.take());
    ended
}

/// What does not decode will not decode later either.
fn rejected(Rejection(why): Rejection) -> Failure {
    Failure::permanent(why)
}

macro_rules! together {
    ($($handler:ident $mark:ident $at:tt),*) => {
        impl<$($handler),*> Several for ($($handler,)*) {}

        // In lists of what is a handler, these would be noise.
        #[diagnostic::do_not_recommend]
        impl<Db, S, $($handler, $mark,)*> Handler<Db, S, (Joined, $($mark,)*)> for Together<($($handler,)*)>
        where
            Db: Database,
            S: Clone + Send + Sync + 'static,
            $($handler: Handler<Db, S, $mark>, $mark: 'static,)*
        {
            const TRANSACTIONAL: bool = $($handler::TRANSACTIONAL)||*;

            fn functions() -> Vec<&'static str> {
                let mut functions = Vec::new();
                $(functions.extend($handler::functions());)*
                functions
            }

            fn call(&self, call: &Call, state: &S, tx: Option<Tx<Db>>) -> Result<BoxFuture<Result<Done, Failure>>, Rejection> {
                let mut tx = tx.ok_or_else(|| Rejection::new("there is no transaction for handlers that share one"))?;
                let (handlers, call, state) = (self.0.clone(), call.clone(), state.clone());
                Ok(Box::pin(async move {
                    let mut done = Done::new();
                    $(done.follow_ups.append(one(&handlers.$at, &call, &state, &mut tx).await?.follow_ups);)*
                    Ok(done)
                }))
            }
        }
    };
}
together!(A MA 0, B MB 1);
together!(A MA 0, B MB 1, C MC 2);
together!(A MA 0, B MB 1, C MC 2, D MD 3);
together!(A MA 0, B MB 1, C MC 2, D MD 3, E ME 4);
together!(A MA 0, B MB 1, C MC 2, D MD 3, E ME 4, F MF 5);
together!(A MA 0, B MB 1, C MC 2, D MD 3, E ME 4, F MF 5, G MG 6);
together!(A MA 0, B MB 1, C MC 2, D MD 3, E ME 4, F MF 5, G MG 6, H MH 7);
