//! How long to wait before trying again: exponential, with jitter, bounded.
//!
//! Pure: the random part is an argument.

use std::time::Duration;

use crate::limits::{RECONNECT_FIRST, RECONNECT_MAX, REFUSED_WAIT, REFUSED_WAIT_MAX};

/// Waits of one series of attempts.
#[derive(Debug, Default)]
pub struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// The next wait: the first is at most `RECONNECT_FIRST`, then `2^n` times it, half of it
    /// random, at most `RECONNECT_MAX`.
    pub fn next(&mut self, random: u64) -> Duration {
        let doublings = self.attempts.min(20);
        self.attempts = self.attempts.saturating_add(1);
        let whole = RECONNECT_FIRST
            .saturating_mul(1 << doublings)
            .min(RECONNECT_MAX);
        let half = whole / 2;
        let nanos = half.as_nanos().max(1) as u64;
        half + Duration::from_nanos(random % nanos)
    }

    /// Waits taken so far.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }
}

/// The wait that a refusal asks for, bounded on both sides.
pub fn retry_after(ms: Option<u32>) -> Duration {
    match ms {
        Some(ms) if ms > 0 => Duration::from_millis(u64::from(ms)).min(REFUSED_WAIT_MAX),
        _ => REFUSED_WAIT,
    }
}

/// Random bits for jitter. Without entropy there is no jitter, which is harmless.
pub fn random() -> u64 {
    getrandom::u64().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_first_wait_is_short_and_none_is_longer_than_the_bound(random in any::<[u64; 40]>()) {
            let mut backoff = Backoff::default();
            prop_assert!(backoff.next(random[0]) <= Duration::from_millis(20));
            for random in random {
                prop_assert!(backoff.next(random) <= RECONNECT_MAX);
            }
            prop_assert!(backoff.next(0) >= RECONNECT_MAX / 2);
        }
    }

    #[test]
    fn a_brokers_wait_is_kept_within_bounds() {
        assert_eq!(retry_after(None), REFUSED_WAIT);
        assert_eq!(retry_after(Some(7)), Duration::from_millis(7));
        assert_eq!(retry_after(Some(u32::MAX)), REFUSED_WAIT_MAX);
    }
}
