//! The tests of the library in one program, a file each: one is linked, and while a test waits for something another
//! one runs. Those of one file: `scripts/test --test suite handlers::`. Programs of their own are the tests that nobody
//! else may disturb: `architecture` reads sources only, `cost` hears every statement of its process, `wiring` has its
//! panic hook; and those of other packages, such as `faults`.

mod bad_input;
mod batches;
mod custom_sink;
mod earlier_shape;
mod fuzz_corpus;
mod github_events;
mod going_back;
mod handlers;
mod journey;
mod limits;
mod moving;
mod operators;
mod order;
mod pause;
mod payloads;
mod priority;
mod pull;
mod pull_sql;
mod python_examples;
mod races;
mod receiving;
#[cfg(feature = "redis")]
mod redis;
#[cfg(feature = "redis")]
mod redis_sink;
#[cfg(feature = "redis")]
mod redis_source;
mod relaying;
mod retention;
mod roles;
mod rotation;
mod schedules;
mod statements;
mod store_suite;
mod subscriptions;
mod together;
#[cfg(feature = "tokio-postgres")]
mod tokio_postgres;
mod unique;
#[cfg(feature = "webhook")]
mod webhooks;
#[cfg(feature = "webhook")]
mod webhooks_out;
