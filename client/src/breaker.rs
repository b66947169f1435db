//! The circuit breaker: after enough failures in a row, requests fail at once instead of waiting.
//!
//! Closed -> (failures in a row) -> open -> (cooldown) -> half open: one probe -> closed, or open
//! again for twice as long. Pure: the time is an argument.

use std::time::{Duration, Instant};

use crate::limits::BREAKER_COOLDOWN_MAX;

/// Counts failures in a row and says whether a request may be made.
#[derive(Debug)]
pub struct Breaker {
    failures_max: u32,
    cooldown: Duration,
    failures: u32,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    until: Instant,
    cooldown: Duration,
    /// When the probe was let through; another follows if it never reports.
    probe: Option<Instant>,
}

impl Breaker {
    pub fn new(failures_max: u32, cooldown: Duration) -> Self {
        Self {
            failures_max: failures_max.max(1),
            cooldown,
            failures: 0,
            open: None,
        }
    }

    /// May a request be made now? If not: in how long.
    pub fn allow(&mut self, now: Instant) -> Result<(), Duration> {
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        let next = open.probe.map_or(open.until, |at| at + open.cooldown);
        if now < next {
            return Err(next - now);
        }
        open.probe = Some(now);
        Ok(())
    }

    /// The broker answered.
    pub fn success(&mut self) {
        self.failures = 0;
        self.open = None;
    }

    /// No connection, or no answer in time.
    pub fn failure(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        if let Some(open) = &mut self.open {
            if open.probe.take().is_some() {
                open.cooldown = (open.cooldown * 2).min(BREAKER_COOLDOWN_MAX.max(self.cooldown));
                open.until = now + open.cooldown;
            }
        } else if self.failures >= self.failures_max {
            self.open = Some(Open {
                until: now + self.cooldown,
                cooldown: self.cooldown,
                probe: None,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn opened(now: Instant) -> Breaker {
        let mut breaker = Breaker::new(3, SECOND);
        for _ in 0..3 {
            assert_eq!(breaker.allow(now), Ok(()));
            breaker.failure(now);
        }
        breaker
    }

    #[test]
    fn it_opens_after_failures_in_a_row_only() {
        let now = Instant::now();
        let mut breaker = Breaker::new(2, SECOND);
        breaker.failure(now);
        breaker.success();
        breaker.failure(now);
        assert_eq!(breaker.allow(now), Ok(()));
        breaker.failure(now);
        assert_eq!(breaker.allow(now), Err(SECOND));
    }

    #[test]
    fn after_the_cooldown_one_probe_goes_through_and_closes_it() {
        let now = Instant::now();
        let mut breaker = opened(now);
        assert_eq!(breaker.allow(now + SECOND / 2), Err(SECOND / 2));
        assert_eq!(breaker.allow(now + SECOND), Ok(()));
        assert!(breaker.allow(now + SECOND).is_err(), "only one probe");
        breaker.success();
        assert_eq!(breaker.allow(now + SECOND), Ok(()));
    }

    #[test]
    fn a_failed_probe_doubles_the_cooldown() {
        let now = Instant::now();
        let mut breaker = opened(now);
        assert_eq!(breaker.allow(now + SECOND), Ok(()));
        breaker.failure(now + SECOND);
        assert_eq!(breaker.allow(now + SECOND), Err(2 * SECOND));
    }

    #[test]
    fn a_probe_that_never_reports_does_not_block_for_ever() {
        let now = Instant::now();
        let mut breaker = opened(now);
        assert_eq!(breaker.allow(now + SECOND), Ok(()));
        assert_eq!(breaker.allow(now + 2 * SECOND), Ok(()));
    }
}
