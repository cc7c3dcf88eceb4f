//! The tests whose workers are processes of this package: they are killed, starved of servers, and lied to about the
//! time. One program, a file each; those of one file: `scripts/test --test faults crashes::`.

mod clocks;
mod crashes;
#[cfg(feature = "redis")]
mod redis_faults;
#[cfg(feature = "webhook")]
mod webhook_crashes;
