//! What a topic and a subscription are configured with: units, ranges and defaults.

use serde::{Deserialize, Serialize};

use crate::ids::{Offset, Stamp};
use crate::limits::{BACKOFF_LIST_MAX, DELAY_MS_MAX, MAX_IN_FLIGHT_MAX};

/// What happens to a publish, or to the oldest messages, when a topic has reached its limit.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnLimit {
    /// Publishes are refused with `backlog_limit` until consumers catch up.
    #[default]
    RefusePublish,
    /// The oldest unsettled messages go to the dead-letter topics, with reason `expired`.
    DeadLetter,
    /// The oldest messages go, settled or not.
    Drop,
}

/// A topic's policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicConfig {
    /// How long a settled message is kept for replay, in milliseconds; default 0: not beyond need.
    pub retention_ms: u64,
    /// Most bytes of messages kept; `None`: no limit but the disk.
    pub max_bytes: Option<u64>,
    /// Most messages kept; `None`: no limit.
    pub max_messages: Option<u64>,
    /// What happens at the limit.
    pub on_limit: OnLimit,
    /// Time to live of a message that names none, in milliseconds; `None`: it never expires.
    pub ttl_ms: Option<u64>,
}

#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SubscriptionMode {
    /// Each message is leased to one consumer and settled one by one.
    #[default]
    Queue,
    /// One active consumer reads in strict offset order and commits a consumer offset.
    Stream,
}

/// How the random part of a backoff is chosen. It is a hash, decided once.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Jitter {
    /// Half fixed, half random.
    #[default]
    Equal,
    /// Anywhere from 0 to the whole wait.
    Full,
    /// Exactly the wait.
    None,
}

/// How long to wait after the n-th failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backoff {
    /// `initial * multiplier^(failures-1)`, at most `max`. The multiplier is in thousandths.
    Exponential {
        initial_ms: u64,
        multiplier_milli: u32,
        max_ms: u64,
    },
    /// Always the same wait.
    Fixed { wait_ms: u64 },
    /// The n-th wait of the list, then its last; never empty.
    List { waits_ms: Vec<u64> },
}

impl Default for Backoff {
    /// 1 s, doubling, at most 10 min.
    fn default() -> Self {
        Self::Exponential {
            initial_ms: 1_000,
            multiplier_milli: 2_000,
            max_ms: 600_000,
        }
    }
}

/// A subscription's policy. Three knobs that must not be one: `lease_ms`, `processing_timeout_ms`
/// and `backoff`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubscriptionConfig {
    pub mode: SubscriptionMode,
    /// Is the consumer alive? Renewed by the client. Milliseconds, 1,000 to 12 h, default 30 s.
    pub lease_ms: u64,
    /// How long a handler may take once begun. Milliseconds, 100 to 24 h, default 5 min.
    pub processing_timeout_ms: u64,
    /// How long a message may wait unbegun at a live consumer. Milliseconds, default 1 min.
    pub hold_max_ms: u64,
    pub backoff: Backoff,
    pub jitter: Jitter,
    /// Failures after which a message is dead. 1 to 65,535, default 16.
    pub max_attempts: u32,
    /// Hand-outs of any kind after which a message is dead. Default 100.
    pub max_deliveries: u32,
    /// Age since publishing at which an unfinished message is dead, in milliseconds.
    pub max_age_ms: Option<u64>,
    /// Most messages leased at once over all consumers. Default 100,000. Waiting retries are no part.
    pub max_in_flight: u32,
    /// The dead-letter topic; `None`: `TOPIC.SUBSCRIPTION.dead`.
    pub dead_letter: Option<String>,
}

impl Default for SubscriptionConfig {
    fn default() -> Self {
        Self {
            mode: SubscriptionMode::Queue,
            lease_ms: 30_000,
            processing_timeout_ms: 300_000,
            hold_max_ms: 60_000,
            backoff: Backoff::default(),
            jitter: Jitter::default(),
            max_attempts: 16,
            max_deliveries: 100,
            max_age_ms: None,
            max_in_flight: 100_000,
            dead_letter: None,
        }
    }
}

/// Changes to a subscription; what is `None` stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubscriptionPatch {
    pub lease_ms: Option<u64>,
    pub processing_timeout_ms: Option<u64>,
    pub hold_max_ms: Option<u64>,
    pub backoff: Option<Backoff>,
    pub jitter: Option<Jitter>,
    pub max_attempts: Option<u32>,
    pub max_deliveries: Option<u32>,
    /// `Some(None)` takes the limit away.
    pub max_age_ms: Option<Option<u64>>,
    pub max_in_flight: Option<u32>,
    /// Later dead letters go there; earlier ones stay where they are.
    pub dead_letter: Option<String>,
}

/// Changes to a topic; what is `None` stays, `Some(None)` takes a limit away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicPatch {
    pub retention_ms: Option<u64>,
    pub max_bytes: Option<Option<u64>>,
    pub max_messages: Option<Option<u64>>,
    pub on_limit: Option<OnLimit>,
    pub ttl_ms: Option<Option<u64>>,
}

/// Where a new subscription begins, or an existing one is moved to.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartAt {
    /// The earliest message kept.
    #[default]
    Earliest,
    /// Only what comes after now.
    Latest,
    Offset(Offset),
    /// The first message published at or after this time.
    Time(Stamp),
}

/// A value outside its range. The caller must change it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name} must be {min} to {max}, not {found}")]
pub struct PolicyError {
    pub name: &'static str,
    pub min: u64,
    pub max: u64,
    pub found: u64,
}

const HOUR_MS: u64 = 3_600_000;

impl Backoff {
    /// Checks ranges: waits up to 30 days, multiplier 1 to 100, a list of 1 to 64.
    pub fn check(&self) -> Result<(), PolicyError> {
        match self {
            Self::Exponential {
                initial_ms,
                multiplier_milli,
                max_ms,
            } => {
                within("backoff initial (ms)", *initial_ms, 1, DELAY_MS_MAX)?;
                within(
                    "backoff multiplier (thousandths)",
                    u64::from(*multiplier_milli),
                    1_000,
                    100_000,
                )?;
                within("backoff max (ms)", *max_ms, *initial_ms, DELAY_MS_MAX)
            }
            Self::Fixed { wait_ms } => within("backoff wait (ms)", *wait_ms, 0, DELAY_MS_MAX),
            Self::List { waits_ms } => {
                within(
                    "backoff list length",
                    waits_ms.len() as u64,
                    1,
                    BACKOFF_LIST_MAX as u64,
                )?;
                let each = |&ms| within("backoff list wait (ms)", ms, 0, DELAY_MS_MAX);
                waits_ms.iter().try_for_each(each)
            }
        }
    }
}

impl SubscriptionConfig {
    /// Checks every range.
    pub fn check(&self) -> Result<(), PolicyError> {
        self.backoff.check()?;
        within("lease (ms)", self.lease_ms, 1_000, 12 * HOUR_MS)?;
        within(
            "processing timeout (ms)",
            self.processing_timeout_ms,
            100,
            24 * HOUR_MS,
        )?;
        within("hold max (ms)", self.hold_max_ms, 1_000, 24 * HOUR_MS)?;
        within("max attempts", u64::from(self.max_attempts), 1, 65_535)?;
        within(
            "max deliveries",
            u64::from(self.max_deliveries),
            1,
            1_000_000,
        )?;
        let most = u64::from(MAX_IN_FLIGHT_MAX);
        within("max in flight", u64::from(self.max_in_flight), 1, most)?;
        match self.max_age_ms {
            Some(ms) => within("max age (ms)", ms, 1, u64::MAX / 2_000),
            None => Ok(()),
        }
    }

    /// This policy with the patch's changes; the mode never changes.
    #[must_use]
    pub fn patched(&self, patch: &SubscriptionPatch) -> Self {
        let mut next = self.clone();
        set(&mut next.lease_ms, &patch.lease_ms);
        set(
            &mut next.processing_timeout_ms,
            &patch.processing_timeout_ms,
        );
        set(&mut next.hold_max_ms, &patch.hold_max_ms);
        set(&mut next.backoff, &patch.backoff);
        set(&mut next.jitter, &patch.jitter);
        set(&mut next.max_attempts, &patch.max_attempts);
        set(&mut next.max_deliveries, &patch.max_deliveries);
        set(&mut next.max_age_ms, &patch.max_age_ms);
        set(&mut next.max_in_flight, &patch.max_in_flight);
        if patch.dead_letter.is_some() {
            next.dead_letter.clone_from(&patch.dead_letter);
        }
        next
    }
}

impl TopicConfig {
    /// Checks every range.
    pub fn check(&self) -> Result<(), PolicyError> {
        within("retention (ms)", self.retention_ms, 0, u64::MAX / 2_000)?;
        within("max bytes", self.max_bytes.unwrap_or(1), 1, u64::MAX)?;
        within("max messages", self.max_messages.unwrap_or(1), 1, u64::MAX)?;
        within("ttl (ms)", self.ttl_ms.unwrap_or(1), 1, u64::MAX / 2_000)
    }

    /// This policy with the patch's changes.
    #[must_use]
    pub fn patched(&self, patch: &TopicPatch) -> Self {
        let mut next = self.clone();
        set(&mut next.retention_ms, &patch.retention_ms);
        set(&mut next.max_bytes, &patch.max_bytes);
        set(&mut next.max_messages, &patch.max_messages);
        set(&mut next.on_limit, &patch.on_limit);
        set(&mut next.ttl_ms, &patch.ttl_ms);
        next
    }
}

fn set<T: Clone>(slot: &mut T, change: &Option<T>) {
    if let Some(value) = change {
        slot.clone_from(value);
    }
}

fn within(name: &'static str, found: u64, min: u64, max: u64) -> Result<(), PolicyError> {
    if (min..=max).contains(&found) {
        Ok(())
    } else {
        Err(PolicyError {
            name,
            min,
            max,
            found,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_within_their_ranges() {
        assert_eq!(SubscriptionConfig::default().check(), Ok(()));
        assert_eq!(TopicConfig::default().check(), Ok(()));
    }

    #[test]
    fn an_empty_backoff_list_is_refused() {
        assert!(Backoff::List { waits_ms: vec![] }.check().is_err());
    }

    #[test]
    fn a_patch_changes_only_what_it_names() {
        let patch = SubscriptionPatch {
            max_attempts: Some(3),
            ..Default::default()
        };
        let next = SubscriptionConfig::default().patched(&patch);
        assert_eq!(
            next,
            SubscriptionConfig {
                max_attempts: 3,
                ..Default::default()
            }
        );
    }
}
