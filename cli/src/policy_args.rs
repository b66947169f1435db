//! The options of a subscription's policy, and the policy or the change that they make.

use clap::{Args, ValueEnum};
use millpond_protocol::policy::{
    Backoff, Jitter, SubscriptionConfig, SubscriptionMode, SubscriptionPatch,
};

use crate::duration::{self, DurationError};
use crate::topic::{Limit, parse_duration_limit};

/// Options that `create` and `update` share. What is not named keeps its default or its value.
#[derive(Clone, Debug, Default, Args)]
#[group(id = "policy", multiple = true)]
pub struct PolicyArgs {
    /// Failures after which a message is dead [default: 16].
    #[arg(long, value_name = "N")]
    max_attempts: Option<u32>,
    /// Hand-outs of any kind after which a message is dead [default: 100].
    #[arg(long, value_name = "N")]
    max_deliveries: Option<u32>,
    /// Silence after which a consumer counts as gone [default: 30s].
    #[arg(long, value_name = "D", value_parser = duration::parse_ms)]
    lease: Option<u64>,
    /// How long a handler may work on one message [default: 5m].
    #[arg(long, value_name = "D", value_parser = duration::parse_ms)]
    processing_timeout: Option<u64>,
    /// How long a message may wait untouched at a consumer [default: 1m].
    #[arg(long, value_name = "D", value_parser = duration::parse_ms)]
    hold_max: Option<u64>,
    /// Wait after the first failure [default: 1s].
    #[arg(long, value_name = "D", value_parser = duration::parse_ms)]
    backoff_initial: Option<u64>,
    /// Factor from one wait to the next [default: 2].
    #[arg(long, value_name = "X", value_parser = parse_multiplier)]
    backoff_multiplier: Option<u32>,
    /// Longest wait [default: 10m].
    #[arg(long, value_name = "D", value_parser = duration::parse_ms)]
    backoff_max: Option<u64>,
    /// The waits one by one, the last of them from then on: `1s,10s,5m`.
    #[arg(
        long,
        value_name = "D,D,…",
        value_parser = parse_list,
        conflicts_with_all = ["backoff_initial", "backoff_multiplier", "backoff_max"]
    )]
    backoff_list: Option<Waits>,
    /// The random part of each wait [default: equal].
    #[arg(long, value_name = "HOW", value_enum)]
    jitter: Option<JitterArg>,
    /// The dead-letter topic [default: TOPIC.NAME.dead].
    #[arg(long, value_name = "TOPIC")]
    dead_letter: Option<String>,
    /// Age at which an unfinished message is dead, or `none` [default: none].
    #[arg(long, value_name = "D", value_parser = parse_duration_limit)]
    max_age: Option<Limit>,
    /// Most messages leased at once over all consumers [default: 100000].
    #[arg(long, value_name = "N")]
    max_in_flight: Option<u32>,
}

#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ModeArg {
    /// Each message goes to one consumer and is settled by itself.
    #[default]
    Queue,
    /// One consumer reads in order and commits how far it has come.
    Stream,
}

impl From<ModeArg> for SubscriptionMode {
    fn from(arg: ModeArg) -> Self {
        match arg {
            ModeArg::Queue => Self::Queue,
            ModeArg::Stream => Self::Stream,
        }
    }
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub enum JitterArg {
    /// Half fixed, half random.
    Equal,
    /// Anywhere from 0 to the whole wait.
    Full,
    /// Exactly the wait.
    None,
}

impl From<JitterArg> for Jitter {
    fn from(arg: JitterArg) -> Self {
        match arg {
            JitterArg::Equal => Self::Equal,
            JitterArg::Full => Self::Full,
            JitterArg::None => Self::None,
        }
    }
}

/// The waits of a backoff list, in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waits(Vec<u64>);

impl PolicyArgs {
    /// The policy of a new subscription.
    #[must_use]
    pub fn config(&self, mode: ModeArg) -> SubscriptionConfig {
        let fresh = SubscriptionConfig {
            mode: mode.into(),
            ..SubscriptionConfig::default()
        };
        fresh.patched(&self.patch(&fresh.backoff))
    }

    /// The changes to a policy whose backoff is now `backoff`.
    #[must_use]
    pub fn patch(&self, backoff: &Backoff) -> SubscriptionPatch {
        SubscriptionPatch {
            lease_ms: self.lease,
            processing_timeout_ms: self.processing_timeout,
            hold_max_ms: self.hold_max,
            backoff: self.backoff(backoff),
            jitter: self.jitter.map(Jitter::from),
            max_attempts: self.max_attempts,
            max_deliveries: self.max_deliveries,
            max_age_ms: self.max_age.map(Limit::value),
            max_in_flight: self.max_in_flight,
            dead_letter: self.dead_letter.clone(),
        }
    }

    /// Whether the change depends on the backoff that the subscription has now.
    #[must_use]
    pub fn changes_part_of_backoff(&self) -> bool {
        self.backoff_initial.is_some()
            || self.backoff_multiplier.is_some()
            || self.backoff_max.is_some()
    }

    fn backoff(&self, now: &Backoff) -> Option<Backoff> {
        if let Some(Waits(waits_ms)) = &self.backoff_list {
            return Some(Backoff::List {
                waits_ms: waits_ms.clone(),
            });
        }
        if !self.changes_part_of_backoff() {
            return None;
        }
        let (initial_ms, multiplier_milli, max_ms) = parts(now);
        let initial_ms = self.backoff_initial.unwrap_or(initial_ms);
        Some(Backoff::Exponential {
            initial_ms,
            multiplier_milli: self.backoff_multiplier.unwrap_or(multiplier_milli),
            // A longer first wait than the longest is meant to raise both, unless both are named.
            max_ms: self.backoff_max.unwrap_or(max_ms.max(initial_ms)),
        })
    }
}

/// The parts of an exponential backoff; of another kind, the default's.
const fn parts(backoff: &Backoff) -> (u64, u32, u64) {
    match backoff {
        Backoff::Exponential {
            initial_ms,
            multiplier_milli,
            max_ms,
        } => (*initial_ms, *multiplier_milli, *max_ms),
        Backoff::Fixed { .. } | Backoff::List { .. } => (1_000, 2_000, 600_000),
    }
}

fn parse_multiplier(text: &str) -> Result<u32, MultiplierError> {
    let value: f64 = text.parse().map_err(|_| MultiplierError)?;
    if (1.0..=100.0).contains(&value) {
        Ok((value * 1_000.0).round() as u32)
    } else {
        Err(MultiplierError)
    }
}

/// Why a text is no multiplier. The user must write another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a multiplier is a number from 1 to 100, like 2 or 1.5")]
struct MultiplierError;

fn parse_list(text: &str) -> Result<Waits, DurationError> {
    let waits: Result<Vec<u64>, _> = text.split(',').map(duration::parse_ms).collect();
    waits.map(Waits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_subscription_has_the_defaults_and_what_is_named() {
        let args = PolicyArgs {
            max_attempts: Some(3),
            ..PolicyArgs::default()
        };
        let expected = SubscriptionConfig {
            mode: SubscriptionMode::Stream,
            max_attempts: 3,
            ..SubscriptionConfig::default()
        };
        assert_eq!(args.config(ModeArg::Stream), expected);
    }

    #[test]
    fn a_part_of_a_backoff_keeps_the_other_parts() {
        let now = Backoff::Exponential {
            initial_ms: 5,
            multiplier_milli: 3_000,
            max_ms: 50,
        };
        let args = PolicyArgs {
            backoff_max: Some(70),
            ..PolicyArgs::default()
        };
        let expected = Backoff::Exponential {
            initial_ms: 5,
            multiplier_milli: 3_000,
            max_ms: 70,
        };
        assert_eq!(args.patch(&now).backoff, Some(expected));
        assert_eq!(PolicyArgs::default().patch(&now).backoff, None);
    }

    #[test]
    fn a_long_first_wait_raises_the_longest() {
        let args = PolicyArgs {
            backoff_initial: Some(3_600_000),
            ..PolicyArgs::default()
        };
        assert_eq!(args.config(ModeArg::Queue).check(), Ok(()));
    }

    #[test]
    fn multipliers_and_lists_are_read() {
        assert_eq!(parse_multiplier("1.5"), Ok(1_500));
        assert_eq!(parse_multiplier("0.5"), Err(MultiplierError));
        assert_eq!(parse_multiplier("NaN"), Err(MultiplierError));
        assert_eq!(parse_list("1s,2m"), Ok(Waits(vec![1_000, 120_000])));
        assert!(parse_list("1s,,2m").is_err());
    }
}
