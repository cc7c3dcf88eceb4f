//! How often and how soon a delivery is tried again.

use std::time::Duration;

/// What a subscription does with a failed attempt: how many it makes, and the waits between them.
///
/// The wait before attempt *n + 1* is drawn evenly from `0 ..= min(cap, base × 2ⁿ⁻¹)`: exponential
/// backoff with full jitter, which spreads a crowd of failures best ("Exponential Backoff And
/// Jitter", AWS Architecture Blog, 2015).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts in all, the first one included; at least 1. Default 4.
    pub max_attempts: u32,
    /// The longest wait after the first failure. Default 1 s.
    pub base: Duration,
    /// The longest wait at all. Default 15 min.
    pub cap: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        RetryPolicy { max_attempts: 4, base: Duration::from_secs(1), cap: Duration::from_secs(900) }
    }
}

impl RetryPolicy {
    /// The longest wait after attempt `attempt` (counted from 1) has failed.
    pub fn ceiling(&self, attempt: u32) -> Duration {
        let doublings = attempt.saturating_sub(1).min(31);
        self.base.saturating_mul(1 << doublings).min(self.cap)
    }

    /// The wait after attempt `attempt` has failed; `draw` in `0.0 ..= 1.0` is the jitter.
    pub fn backoff(&self, attempt: u32, draw: f64) -> Duration {
        self.ceiling(attempt).mul_f64(draw.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_cap() {
        let policy = RetryPolicy::default();
        assert_eq!(policy.ceiling(1), Duration::from_secs(1));
        assert_eq!(policy.ceiling(4), Duration::from_secs(8));
        assert_eq!(policy.ceiling(11), Duration::from_secs(900));
        assert_eq!(policy.ceiling(u32::MAX), Duration::from_secs(900));
        assert_eq!(policy.backoff(3, 0.5), Duration::from_secs(2));
        assert_eq!(policy.backoff(3, 0.0), Duration::ZERO);
    }
}
