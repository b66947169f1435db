//! Monotonic metrics: what has happened since this process began. Volatile; gauges are in the views.

use std::collections::BTreeMap;

use millpond_protocol::Stamp;
use millpond_protocol::control::{DeadReason, LostReason};

use crate::record::FailureKind;

/// Counts since the process began, replay included.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Messages appended.
    pub published: u64,
    /// Messages that were there already.
    pub dedup_hits: u64,
    pub producers_fenced: u64,
    /// Publishes refused because of a gap.
    pub sequence_gaps: u64,
    /// Hand-outs.
    pub delivered: u64,
    pub acked: u64,
    pub released: u64,
    /// Settlements refused because the lease was lost.
    pub settlements_late: u64,
    /// Failed attempts by kind and the user's code; at most `FAILURE_CODES_MAX` pairs, more are
    /// counted under code `u32::MAX`.
    pub failures: BTreeMap<(FailureKind, u32), u64>,
    pub dead: BTreeMap<DeadReason, u64>,
    /// Leases lost, by reason as the wire names it.
    pub leases_lost: BTreeMap<&'static str, u64>,
    pub redriven: u64,
    pub purged: u64,
    /// Offsets whose messages were in entries of the log that were given up as lost.
    pub lost: u64,
    /// How late redeliveries were proposed: counts of at most 1, 2, 5, 10, 20, 50, 100, 1,000 ms,
    /// and more.
    pub redelivery_late: [u64; 9],
    /// The sum of that, in microseconds.
    pub redelivery_late_us: u64,
}

/// Upper bounds of `Counters::redelivery_late`, in milliseconds; the last bucket has none.
pub const LATE_BUCKETS_MS: [u64; 8] = [1, 2, 5, 10, 20, 50, 100, 1_000];
/// Most pairs of kind and code in `Counters::failures`.
pub const FAILURE_CODES_MAX: usize = 1_000;

impl Counters {
    pub(crate) fn failed(&mut self, kind: FailureKind, code: u32) {
        let is_full = self.failures.len() >= FAILURE_CODES_MAX;
        let code = match self.failures.contains_key(&(kind, code)) || !is_full {
            true => code,
            false => u32::MAX,
        };
        *self.failures.entry((kind, code)).or_default() += 1;
    }

    pub(crate) fn lost(&mut self, reason: LostReason, count: u64) {
        let reason = match reason {
            LostReason::LeaseExpired => "lease_expired",
            LostReason::ProcessingTimeout => "processing_timeout",
            LostReason::HoldMax => "hold_max",
            LostReason::Seek => "seek",
            LostReason::Purged => "purged",
            LostReason::Deleted => "deleted",
            LostReason::Expired => "expired",
            LostReason::Draining => "draining",
        };
        *self.leases_lost.entry(reason).or_default() += count;
    }

    pub(crate) fn redelivered(&mut self, due: Stamp, now: Stamp) {
        let late_us = now.0.saturating_sub(due.0);
        let bucket = LATE_BUCKETS_MS.iter().position(|ms| late_us <= ms * 1_000);
        self.redelivery_late[bucket.unwrap_or(LATE_BUCKETS_MS.len())] += 1;
        self.redelivery_late_us = self.redelivery_late_us.saturating_add(late_us);
    }
}
