//! When a retry is due: the only place that decides it.
//!
//! The wait after the n-th failure comes from the subscription's backoff, or begins with the message's
//! own `backoff_initial`; jitter is a hash, decided once and never computed again. A list of waits
//! knows no initial wait, so the message's own has no effect on it.

use millpond_protocol::control::RejectKind;
use millpond_protocol::limits::DELAY_MS_MAX;
use millpond_protocol::policy::{Backoff, Jitter};
use millpond_protocol::{Stamp, SubscriptionConfig, SubscriptionId};

use millpond_protocol::control::DeadReason;

use crate::planted::{self, Bug};

/// Who fails, for the n-th time.
#[derive(Copy, Clone, Debug)]
pub struct Failing {
    pub seed: u64,
    pub subscription: SubscriptionId,
    pub offset: u64,
    /// This failure included; at least 1.
    pub failures: u32,
    /// The message's own first wait; 0: it has none.
    pub initial_ms: u32,
}

/// When the next attempt is due after a failure at `now`.
pub fn due_after_failure(config: &SubscriptionConfig, failing: Failing, now: Stamp) -> Stamp {
    let wait_us = wait_ms(&config.backoff, failing).saturating_mul(1_000);
    let wait_us = wait_us >> u32::from(planted::is(Bug::BackoffHalved));
    let hash = hash(failing);
    let wait_us = match config.jitter {
        Jitter::None => wait_us,
        Jitter::Equal => wait_us - wait_us / 2 + hash % (wait_us / 2 + 1),
        Jitter::Full => hash % (wait_us + 1),
    };
    Stamp(now.0.saturating_add(wait_us))
}

/// What is due by then may be handed out at `now`.
pub fn due_by(now: Stamp) -> Stamp {
    now.plus_ms(u64::from(planted::is(Bug::DueOneEarly)))
}

/// When a message is due whose settlement named a delay.
pub fn due_after_delay(delay_ms: u64, now: Stamp) -> Stamp {
    now.plus_ms(delay_ms.min(DELAY_MS_MAX))
}

pub fn reason_of_reject(kind: RejectKind) -> DeadReason {
    match kind {
        RejectKind::Rejected => DeadReason::Rejected,
        RejectKind::Undecodable => DeadReason::Undecodable,
    }
}

fn wait_ms(backoff: &Backoff, failing: Failing) -> u64 {
    let own = (failing.initial_ms > 0).then_some(u64::from(failing.initial_ms));
    match backoff {
        Backoff::Exponential {
            initial_ms,
            multiplier_milli,
            max_ms,
        } => exponential(
            own.unwrap_or(*initial_ms),
            *multiplier_milli,
            *max_ms,
            failing.failures,
        ),
        Backoff::Fixed { wait_ms } => own.unwrap_or(*wait_ms).min(DELAY_MS_MAX),
        Backoff::List { waits_ms } => {
            let step = (failing.failures.max(1) - 1) as usize;
            let wait = waits_ms.get(step).or(waits_ms.last());
            wait.copied().unwrap_or(0)
        }
    }
}

/// `initial * multiplier^(failures-1)`, at most `max`; thousandths are kept on the way.
fn exponential(initial_ms: u64, multiplier_milli: u32, max_ms: u64, failures: u32) -> u64 {
    let max = u128::from(max_ms.min(DELAY_MS_MAX)) * 1_000;
    let mut wait = u128::from(initial_ms) * 1_000;
    if multiplier_milli > 1_000 {
        for _ in 1..failures {
            if wait >= max {
                break;
            }
            wait = wait * u128::from(multiplier_milli) / 1_000;
        }
    }
    (wait.min(max) / 1_000) as u64
}

fn hash(failing: Failing) -> u64 {
    let who = u64::from(failing.subscription.0) << 32 | u64::from(failing.failures);
    mix(mix(mix(failing.seed) ^ who) ^ failing.offset)
}

/// The finalizer of splitmix64: every input bit changes about half of the output bits.
fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failing(failures: u32) -> Failing {
        Failing {
            seed: 7,
            subscription: SubscriptionId(1),
            offset: 9,
            failures,
            initial_ms: 0,
        }
    }

    fn due_ms(config: &SubscriptionConfig, failing: Failing) -> u64 {
        due_after_failure(config, failing, Stamp(0)).0 / 1_000
    }

    fn config(backoff: Backoff, jitter: Jitter) -> SubscriptionConfig {
        SubscriptionConfig {
            backoff,
            jitter,
            ..Default::default()
        }
    }

    // SEMANTICS 2
    #[test]
    fn the_default_doubles_from_one_second_to_ten_minutes() {
        let config = config(Backoff::default(), Jitter::None);
        let waits: Vec<_> = [1, 2, 3, 10, 11, 65_535]
            .map(|n| due_ms(&config, failing(n)))
            .into();
        assert_eq!(waits, [1_000, 2_000, 4_000, 512_000, 600_000, 600_000]);
    }

    // SEMANTICS 2
    #[test]
    fn equal_jitter_keeps_half_and_full_jitter_keeps_nothing() {
        let equal = config(Backoff::default(), Jitter::Equal);
        let full = config(Backoff::default(), Jitter::Full);
        let mut seen = std::collections::BTreeSet::new();
        for offset in 0..200 {
            let failing = Failing {
                offset,
                ..failing(1)
            };
            assert!((500..=1_000).contains(&due_ms(&equal, failing)));
            assert!(due_ms(&full, failing) <= 1_000);
            seen.insert(due_ms(&full, failing) / 100);
        }
        assert!(seen.len() >= 9, "spread over the whole wait: {seen:?}");
    }

    // SEMANTICS 2
    #[test]
    fn jitter_is_the_same_at_every_replay() {
        let config = config(Backoff::default(), Jitter::Equal);
        assert_eq!(due_ms(&config, failing(3)), due_ms(&config, failing(3)));
        assert_eq!(
            due_after_failure(&config, failing(3), Stamp(0)),
            Stamp(2_298_056)
        );
    }

    // SEMANTICS 2
    #[test]
    fn a_list_ends_with_its_last_wait() {
        let backoff = Backoff::List {
            waits_ms: vec![10, 20],
        };
        let config = config(backoff, Jitter::None);
        let waits: Vec<_> = [1, 2, 3].map(|n| due_ms(&config, failing(n))).into();
        assert_eq!(waits, [10, 20, 20]);
    }

    // SEMANTICS 2
    #[test]
    fn a_message_may_have_its_own_first_wait() {
        let config = config(Backoff::default(), Jitter::None);
        let own = Failing {
            initial_ms: 50,
            ..failing(2)
        };
        assert_eq!(due_ms(&config, own), 100);
    }

    // SEMANTICS 2
    #[test]
    fn a_named_delay_is_clamped_to_thirty_days() {
        assert_eq!(
            due_after_delay(u64::MAX, Stamp(5)).0,
            5 + DELAY_MS_MAX * 1_000
        );
        assert_eq!(due_after_delay(0, Stamp(5)), Stamp(5));
    }
}
