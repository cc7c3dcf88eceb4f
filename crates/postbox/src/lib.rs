//! Postbox: a transactional outbox and inbox, and honest irreversible operations.
#![doc = ""]

mod context;
#[cfg(not(feature = "crash-points"))]
mod crash;
mod error;
mod handler;
mod json;
mod message;
mod operation;
mod pattern;
mod postbox;
mod retry;
mod router;
mod settings;

pub mod admin;
#[cfg(feature = "crash-points")]
#[doc(hidden)]
pub mod crash;
pub mod lifecycle;
#[doc(hidden)]
pub mod store;
pub mod worker;

pub use error::{Error, PublishError};
pub use handler::{
    Attempt, Call, Failure, FromDelivery, FromRef, Handler, IntoVerdict, Metadata, NotDone, OperationHandler, Payload,
    Permanent, ReconcileHook, Rejection, ResultExt, RetryAfter, State, Tx,
};
pub use json::{JsonError, MAX_JSON_DEPTH};
pub use message::{
    DecodeError, Draft, Envelope, IntoDraft, MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, MAX_WAIT, Message, MessageKey,
};
pub use operation::{Done, FollowUps, Operation, OperationFailure, Receipt, Reconciled};
pub use pattern::{MAX_NAME_BYTES, Pattern, TopicError, check_topic};
pub use postbox::{Postbox, Published};
pub use postbox_macros::Message;
pub use retry::RetryPolicy;
pub use router::{HandlerEntry, IntoSubscription, OperationEntry, Router, handler, operation};
pub use settings::{Backend, SETTINGS, Settings, hide_password};
pub use sqlx::{Postgres, Sqlite};
pub use store::postgres::migrations_sql;
pub use store::{AsConnection, Database};
pub use worker::{Worker, WorkerBuilder};
