//! Save it in PostgreSQL (or SQLite), and then make it happen in the world, so that the database never
//! lies about what has, or has not, happened.
//!
//! The story in five rooms:
//!
//! 1. **publish**: [`Postbox::publish`] writes a [`Message`] and one delivery for each matching
//!    subscription, in *your* transaction. It never commits.
//! 2. **claim**: a [`Worker`] leases a batch of deliveries for the handlers of its [`Router`].
//! 3. **attempt**: a plain handler runs at least once; one that takes a [`Tx`] commits its effects
//!    together with its outcome; an [`operation`] has its attempt on record *before* it is called.
//! 4. **judge**: [`lifecycle::transition`], a pure function, says what comes next.
//! 5. **settle**: outcomes are written in batches, each guarded by its lease.
//!
//! ```no_run
//! use postbox::{Failure, Message, Payload, Postbox, Postgres, Router, Tx};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize, Message)]
//! #[message(topic = "orders.placed", key = order_id)]
//! struct OrderPlaced { order_id: i64 }
//!
//! async fn reserve_stock(Payload(order): Payload<OrderPlaced>, mut tx: Tx<Postgres>) -> Result<(), Failure> {
//!     sqlx::query("update stock set reserved = reserved + 1 where order_id = $1")
//!         .bind(order.order_id)
//!         .execute(&mut tx)
//!         .await?; // `?` means: roll back, try again later
//!     Ok(())
//! }
//!
//! # async fn shop(pool: sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
//! let postbox = Postbox::connect("postgres://localhost/shop").await?;
//! let mut tx = pool.begin().await?;
//! postbox.publish(&mut tx, &OrderPlaced { order_id: 42 }).await?;
//! tx.commit().await?;
//!
//! let app = Router::new().on("orders.placed", reserve_stock);
//! postbox.worker(app).run().await?; // until SIGINT or SIGTERM
//! # Ok(()) }
//! ```
//!
//! An operator's view of the same things is [`Postbox::admin`], and the `postbox` command on top of it.

mod body;
mod content;
mod context;
#[cfg(not(feature = "crash-points"))]
mod crash;
mod error;
mod handler;
#[cfg(feature = "webhook")]
mod http;
mod inbox;
mod json;
mod keys;
mod limits;
mod message;
mod operation;
mod pattern;
#[cfg(not(feature = "planted-bugs"))]
mod planted;
mod postbox;
mod priority;
mod pull;
#[cfg(feature = "webhook")]
mod push;
mod raw;
#[cfg(feature = "redis")]
mod redis_client;
mod retention;
mod retry;
mod router;
mod schedule;
mod settings;
mod template;
mod unique;

pub mod admin;
#[cfg(feature = "crash-points")]
#[doc(hidden)]
pub mod crash;
#[doc(hidden)]
pub mod fuzzing;
pub mod lifecycle;
#[cfg(feature = "planted-bugs")]
#[doc(hidden)]
pub mod planted;
#[cfg(feature = "webhook")]
pub mod signature;
pub mod sink;
pub mod source;
pub mod sql;
#[doc(hidden)]
pub mod store;
pub mod testing;
#[cfg(feature = "tokio-postgres")]
pub mod tokio_postgres;
pub mod worker;

pub use content::{Bytes, Content, JSON_CONTENT_TYPE};
pub use error::{BrokerError, Error, PublishError};
pub use handler::{
    Attempt, Batch, BatchHandler, BatchPayload, Call, Delivered, Discarded, Failure, FromDelivery, FromRef, Handler,
    IntoOutcomes, IntoVerdict, Metadata, NotDone, OperationHandler, Outcomes, Payload, Permanent, ReconcileHook,
    Rejection, ResultExt, RetryAfter, Several, Snoozed, State, Together, Tx,
};
#[cfg(feature = "webhook")]
pub use http::Tested;
pub use inbox::{Fate, Inbox};
pub use json::{JsonError, MAX_JSON_DEPTH};
#[doc(hidden)]
pub use keys::{Keys, OnDead};
pub use limits::{Limits, Rate};
pub use message::{
    DecodeError, Draft, Envelope, IntoDraft, MAX_HEADER_BYTES, MAX_PAYLOAD_BYTES, MAX_WAIT, Message, MessageKey,
};
pub use operation::{Done, FollowUps, Operation, OperationFailure, Receipt, Reconciled};
pub use pattern::{MAX_NAME_BYTES, Pattern, TopicError, check_topic};
pub use postbox::{Postbox, Published};
pub use postbox_macros::Message;
pub use priority::Priority;
pub use pull::{PullSubscription, Pulled};
#[cfg(feature = "webhook")]
pub use push::{Push, push};
pub use retention::MIN_KEEP;
pub use retention::{Keep, Keeps, Retention};
pub use retry::RetryPolicy;
pub use router::{
    BatchEntry, HandlerEntry, IntoBatch, IntoRelay, IntoSubscription, OperationEntry, RelayEntry, Router, batch,
    handler, operation, relay, together,
};
#[doc(hidden)]
pub use schedule::Wish as ScheduleWish;
pub use schedule::{Missed, Plan, Schedule, ScheduleRow, Scheduled};
pub use settings::{Backend, SETTINGS, Settings, hide_password};
pub use sqlx::{Postgres, Sqlite};
pub use store::postgres::{migrations_down_sql, migrations_sql};
pub use store::{AsConnection, Database};
pub use unique::Unique;
pub use worker::{Alive, Worker, WorkerBuilder};

/// The Rust in the texts is compiled with the doc-tests.
#[cfg(doctest)]
mod docs {
    #[cfg(feature = "redis")]
    #[doc = include_str!("../../../README.md")]
    mod readme {}
    #[doc = include_str!("../../../docs/bad-input.md")]
    mod bad_input {}
    #[doc = include_str!("../../../docs/batches.md")]
    mod batches {}
    #[doc = include_str!("../../../docs/formats.md")]
    mod formats {}
    #[doc = include_str!("../../../docs/lifecycle.md")]
    mod lifecycle {}
    #[doc = include_str!("../../../docs/operations.md")]
    mod operations {}
    #[doc = include_str!("../../../docs/order.md")]
    mod order {}
    #[doc = include_str!("../../../docs/pause.md")]
    mod pause {}
    #[doc = include_str!("../../../docs/priority.md")]
    mod priority {}
    #[cfg(feature = "tokio-postgres")]
    #[doc = include_str!("../../../docs/publishing.md")]
    mod publishing {}
    #[doc = include_str!("../../../docs/pull.md")]
    mod pull {}
    #[doc = include_str!("../../../docs/receiving.md")]
    mod receiving {}
    #[cfg(feature = "redis")]
    #[doc = include_str!("../../../docs/redis.md")]
    mod redis {}
    #[doc = include_str!("../../../docs/relays.md")]
    mod relays {}
    #[doc = include_str!("../../../docs/limits.md")]
    mod limits {}
    #[doc = include_str!("../../../docs/retention.md")]
    mod retention {}
    #[doc = include_str!("../../../docs/schedules.md")]
    mod schedules {}
    #[doc = include_str!("../../../docs/settings.md")]
    mod settings {}
    #[doc = include_str!("../../../docs/subscriptions.md")]
    mod subscriptions {}
    #[doc = include_str!("../../../docs/unique.md")]
    mod unique {}
    #[cfg(feature = "webhook")]
    #[doc = include_str!("../../../docs/webhooks.md")]
    mod webhooks {}
}
