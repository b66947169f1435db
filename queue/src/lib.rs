//! The pure state machine of Millpond: topics, leases, retries, dead letters.
//!
//! State is the fold of records: [`Queue::apply`] takes one [`Record`] with its place and stamp and
//! decides everything: duplicate or new, fenced or not, which offset, good settlement or stale one,
//! retry or dead letter, when due. [`Queue::dispatch`] proposes hand-outs and expiries, which become
//! records before they become state. No clock, no randomness, no I/O, no unordered map; the stamps
//! of records are the only time there is.
//!
//! Volatile beside the state, lost at a restart and never part of a decision of `apply`: credit,
//! begin marks, renewals, deadlines, the read-ahead of streams, and the overlay of proposals that
//! have not been applied yet.

mod apply;
mod counters;
mod dispatch;
mod effect;
mod limits;
pub mod planted;
mod policy;
mod queue;
mod record;
mod state;
mod upkeep;
mod view;

pub use apply::loss::{Loss, LostRun};
pub use counters::{Counters, FAILURE_CODES_MAX, LATE_BUCKETS_MS};
pub use effect::{
    AppendedRun, Attached, Effect, Handout, Outcome, Place, Proposal, Refusal, RestoreError,
    SnapshotDelta,
};
pub use limits::{Options, PRODUCER_IDLE_MS, PROPOSED_BYTES_MAX, SESSION_GRACE_MS};
pub use queue::Queue;
pub use record::{
    Expired, FailureKind, HistoryItem, LEASE_FIXED_BYTES, LeaseRange, Mark, OffsetRun, Overdue,
    PUBLISH_FIXED_BYTES, ProducerMark, Record, RecordError, SettleEntry, StartPosition, Story,
    TopicMark, kind, publish_header,
};
pub use state::dead_letter::Letter;
pub use state::snapshot::{FORMAT as SNAPSHOT_FORMAT, ROWS_CHUNK_BYTES_MAX};
pub use view::DeadPage;

#[cfg(test)]
mod tests;
