//! The state machine: one record in, one outcome out.

use bytes::Bytes;
use millpond_protocol::control::{LeaseName, MessageState};
use millpond_protocol::hot::ConsumerCredit;
use millpond_protocol::{ErrorCode, SessionId, Stamp};

use crate::counters::Counters;
use crate::effect::{Attached, Effect, Outcome, Place, Proposal, RestoreError, SnapshotDelta};
use crate::limits::Options;
use crate::record::{Record, SettleEntry};

/// Everything the broker knows of topics, subscriptions, producers and sessions.
#[derive(Debug)]
pub struct Queue {
    options: Options,
    last: Stamp,
    counters: Counters,
}

impl Queue {
    /// An empty state.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self {
            options,
            last: Stamp(0),
            counters: Counters::default(),
        }
    }

    /// The state that a full snapshot holds: the latest bytes of every chunk, in any order.
    pub fn restore(
        options: Options,
        _chunks: impl Iterator<Item = (u64, Bytes)>,
    ) -> Result<Self, RestoreError> {
        let _ = Self::new(options);
        Err(RestoreError::NoHeader)
    }

    /// Decides. `out` gets effects on others than the asker. Asserts that stamps rise.
    pub fn apply(
        &mut self,
        _place: Place,
        stamp: Stamp,
        _record: &Record<'_>,
        _out: &mut Vec<Effect>,
    ) -> Outcome {
        assert!(stamp > self.last, "stamps rise strictly");
        self.last = stamp;
        Outcome::error(ErrorCode::Recovering, "this record is not understood yet")
    }

    /// Proposes what there is to do now: hand-outs of about `budget` messages, expiries, trims.
    /// True: there is more to do at once.
    pub fn dispatch(&mut self, _now: Stamp, _budget: usize, _out: &mut Vec<Proposal>) -> bool {
        false
    }

    /// When `dispatch` has something to do by time alone; never earlier than needed for anything
    /// that is durable, maybe earlier than something is really due.
    #[must_use]
    pub fn next_wakeup(&self, _now: Stamp) -> Option<Stamp> {
        None
    }

    /// Fills `begun_at` and `history` before a settlement is encoded.
    pub fn enrich(&self, _session: SessionId, _items: &mut [SettleEntry]) {}

    /// Cumulative since the session was attached. The first `begun` deliveries of this attachment
    /// are begun from now on. Counts as a renewal.
    pub fn credit(&mut self, _session: SessionId, _credit: ConsumerCredit, _now: Stamp) {}

    /// What the broker has really sent of the hand-outs: messages and their bytes. Hand-outs are
    /// reckoned at the topic's average size until then.
    pub fn sent(&mut self, _session: SessionId, _messages: u64, _bytes: u64) {}

    /// The consumer is alive.
    pub fn renew(&mut self, _session: SessionId, _now: Stamp) {}

    /// The processing clock of one lease starts again.
    pub fn extend(
        &mut self,
        _session: SessionId,
        _lease: LeaseName,
        _now: Stamp,
    ) -> Result<(), (ErrorCode, MessageState)> {
        Err((ErrorCode::LeaseLost, MessageState::Gone))
    }

    /// A session comes back with its token. Counters of credit and begun deliveries start at 0 for
    /// the new attachment; what was begun stays begun.
    pub fn attach(&mut self, _session: SessionId, _token: u64, _now: Stamp) -> Option<Attached> {
        None
    }

    /// The connection broke without a close: the session has `SESSION_GRACE_MS` to come back.
    pub fn detach(&mut self, _session: SessionId, _now: Stamp) {}

    /// Graceful shutdown: no new leases from now on.
    pub fn drain(&mut self) {}

    /// No new leases while there is a reason, e.g. the disk's reserve is gone.
    pub fn hold_leases(&mut self, _reason: Option<&'static str>) {}

    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// An estimate of the bytes that the state takes, by what takes them.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        std::mem::size_of_val(&self.options) as u64
    }

    /// Chunks that changed since the last call; all of them the first time.
    pub fn snapshot(&mut self) -> SnapshotDelta {
        SnapshotDelta::default()
    }

    /// Asserts what must always hold.
    pub fn check_invariants(&self) {}
}
