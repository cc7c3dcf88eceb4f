//! Futures that are dropped before their end, at an await that the dice choose.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

/// When a future is dropped: at its n-th await that has to wait, or after a time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    waits: u32,
    time: Duration,
}

/// Late enough for whatever is not stuck.
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);

impl Cut {
    /// Not before it looks stuck.
    pub(crate) const LATE: Cut = Cut { waits: u32::MAX, time: PATIENCE };

    /// Soon: timers are too coarse for what takes a fraction of a millisecond, so mostly by awaits.
    pub(crate) fn soon(dice: &mut fastrand::Rng, most_waits: u32) -> Cut {
        match dice.u32(..4) {
            0 => Cut { waits: u32::MAX, time: Duration::from_millis(dice.u64(..5)) },
            _ => Cut { waits: dice.u32(..most_waits), time: PATIENCE },
        }
    }

    pub(crate) fn is_soon(self) -> bool {
        self.waits < u32::MAX || self.time < PATIENCE
    }

    /// The future's value, or `None` if it was dropped before.
    pub(crate) async fn off<F: Future>(self, future: F) -> Option<F::Output> {
        let mut future = pin!(future);
        let mut left = self.waits;
        let polled = poll_fn(|context| match future.as_mut().poll(context) {
            Poll::Ready(value) => Poll::Ready(Some(value)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => {
                left -= 1;
                Poll::Pending
            }
        });
        tokio::time::timeout(self.time, polled).await.unwrap_or(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drops_at_the_await_that_was_chosen() {
        let three = || async {
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
        };
        assert_eq!(Cut { waits: 2, time: PATIENCE }.off(three()).await, None);
        assert_eq!(Cut { waits: 3, time: PATIENCE }.off(three()).await, Some(()));
        assert_eq!(Cut::LATE.off(three()).await, Some(()));
        assert!(!Cut::LATE.is_soon());
    }
}
