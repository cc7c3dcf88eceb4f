//! How fast a subscription's deliveries run, counted over all workers of a database.

use std::time::Duration;

/// The limits of a subscription that hold across all workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// How many attempts run at once at the most.
    pub at_once: Option<u32>,
    /// How many attempts begin in a time.
    pub rate: Option<Rate>,
}

impl Limits {
    /// There are none.
    pub(crate) fn is_none(&self) -> bool {
        *self == Limits::default()
    }
}

/// A token bucket: it holds up to `burst` tokens, and one comes every `per / count`. An attempt takes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    count: u32,
    per: Duration,
    burst: Option<u32>,
}

/// The longest time a rate is counted in.
const LONGEST: Duration = Duration::from_secs(366 * 86_400);
/// What comes in this time is what a bucket holds, unless it says how much.
const BURST: Duration = Duration::from_millis(100);

impl Rate {
    /// So many in a time.
    ///
    /// # Errors
    /// Zero, above a million a second, or a time above 366 days; in words.
    pub fn new(count: u32, per: Duration) -> Result<Rate, String> {
        if count == 0 || per.is_zero() || per > LONGEST {
            return Err(format!(
                "a rate of {count} in {per:?} cannot be kept; the count is above zero, the time above zero and at most 366 days"
            ));
        }
        if per.as_micros() < u128::from(count) {
            return Err(format!("a rate of {count} in {per:?} is above a million a second, which cannot be counted"));
        }
        Ok(Rate { count, per, burst: None })
    }

    /// The bucket holds so many, at least one.
    #[must_use]
    pub fn with_burst(mut self, burst: u32) -> Rate {
        self.burst = Some(burst.max(1));
        self
    }

    /// How often a token comes, in microseconds.
    pub(crate) fn token_us(self) -> f64 {
        self.per.as_secs_f64() * 1e6 / f64::from(self.count)
    }

    /// How many tokens the bucket holds.
    pub(crate) fn burst(self) -> i32 {
        let own = self.burst.map_or(BURST.as_secs_f64() * 1e6 / self.token_us(), f64::from);
        own.clamp(1.0, f64::from(i32::MAX)) as i32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_bucket() {
        let rate = Rate::new(100, Duration::from_secs(1)).expect("a rate");
        assert_eq!((rate.token_us(), rate.burst()), (10_000.0, 10));
        let slow = Rate::new(1, Duration::from_secs(60)).expect("a rate");
        assert_eq!((slow.token_us(), slow.burst(), slow.with_burst(3).burst()), (60_000_000.0, 1, 3));
        assert_eq!(slow.with_burst(0).burst(), 1);
        for (count, per) in [(0, 1), (1, 0), (1, 367 * 86_400)] {
            assert!(Rate::new(count, Duration::from_secs(per)).is_err(), "{count} in {per} s");
        }
        assert!(Rate::new(2, Duration::from_micros(1)).is_err());
    }
}
