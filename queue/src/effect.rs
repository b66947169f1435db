//! What the core answers and asks for: plain data, comparable and printable.

use crate::state::snapshot::FORMAT;
use millpond_protocol::control::{
    ConsumerNotice, LeaseName, LostReason, MessageState, RedriveView,
};
use millpond_protocol::hot::AckRow;
use millpond_protocol::limits::{CONSUMER_NAME_BYTES_MAX, HISTORY_MAX, MAX_IN_FLIGHT_MAX};
use millpond_protocol::policy::SubscriptionMode;
use millpond_protocol::{
    Delivery, Epoch, ErrorCode, LogIndex, Offset, ProducerKey, Sequence, SessionId, SubscriptionId,
    TopicId, WireError,
};
use serde::{Deserialize, Serialize};

use crate::limits::EXPIRE_MAX;
use crate::record::{Expired, Record};

/// Where a record stands in the log.
#[derive(
    Copy, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Place {
    /// The entry.
    pub index: LogIndex,
    /// The record's number within it, from 0.
    pub record: u32,
}

/// What became of one record: the answer to whoever asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// Nothing changed; the caller's fault or the state's.
    Error(WireError),
    TopicCreated(TopicId),
    SubscriptionCreated(SubscriptionId),
    ProducerOpened {
        topic: TopicId,
        producer: ProducerKey,
        epoch: Epoch,
        /// The last accepted sequence; 0: none.
        last_sequence: Sequence,
    },
    Published {
        /// In the batch's order; together they cover all of its messages.
        rows: Vec<AckRow>,
        /// What was appended; absent if all were duplicates.
        appended: Option<AppendedRun>,
        last_accepted: Sequence,
    },
    /// Nothing of the batch was appended.
    PublishRefused {
        last_accepted: Sequence,
        error: WireError,
    },
    SessionOpened {
        session: SessionId,
        topic: TopicId,
        subscription: SubscriptionId,
        mode: SubscriptionMode,
        lease_ms: u64,
        /// Stream mode: the committed consumer offset, the next to be read.
        position: Offset,
        /// Queue mode: always; stream mode: this session reads, others stand by.
        active: bool,
    },
    SessionEnded,
    Settled {
        /// Offsets and items answered, refused ones included.
        count: u64,
        refused: Vec<Refusal>,
    },
    Committed {
        /// The committed offset as it stands now.
        next: Offset,
    },
    Redrive(RedriveView),
    Purged {
        count: u64,
    },
}

impl Outcome {
    /// A refusal.
    #[must_use]
    pub fn error(code: ErrorCode, message: impl Into<String>) -> Self {
        Self::Error(WireError::new(code, message))
    }
}

/// The messages that one publish record appended.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct AppendedRun {
    pub topic: TopicId,
    /// The offset of the first.
    pub base: Offset,
    pub count: u32,
    /// How many messages at the record's beginning were duplicates and were not appended.
    pub skip: u32,
}

/// A settlement that changed nothing.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Its ordinal within the record: every offset of the acks in order, then the items.
    pub ordinal: u64,
    pub code: ErrorCode,
    pub state: MessageState,
}

/// What a record did to others than the one who asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    LeasesLost {
        session: SessionId,
        leases: Vec<LeaseName>,
        reason: LostReason,
    },
    /// The session is over; its streams are to be closed with this code.
    SessionEnded {
        session: SessionId,
        code: ErrorCode,
    },
    /// Stream mode: this session is the active one and reads from here.
    Active {
        session: SessionId,
        from: Offset,
    },
    /// Stream mode: another session is the active one.
    Standby {
        session: SessionId,
    },
    /// Holders of an older epoch of this producer are fenced.
    ProducerFenced {
        producer: ProducerKey,
        /// The epoch that stands now.
        epoch: Epoch,
    },
    /// The producer's state was forgotten.
    ProducerGone {
        producer: ProducerKey,
    },
    TopicGone {
        topic: TopicId,
    },
    SubscriptionGone {
        subscription: SubscriptionId,
    },
}

/// What dispatch wants to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Proposal {
    /// Log the record and send the deliveries, in this order of ranges.
    Lease {
        record: Record<'static>,
        session: SessionId,
        subscription: SubscriptionId,
        topic: TopicId,
        ranges: Vec<Handout>,
    },
    /// Log the record.
    Log(Record<'static>),
    /// Stream mode: send these to the active session. No record.
    Stream {
        session: SessionId,
        subscription: SubscriptionId,
        topic: TopicId,
        offset: Offset,
        count: u32,
    },
    /// Tell the session.
    Notice {
        session: SessionId,
        notice: ConsumerNotice,
    },
}

/// Bytes of the largest record that time alone asks for: a session's end with as many runs as a subscription may
/// have, or messages that took too long with all of their history.
pub(crate) const TIMED_BYTES_MAX: usize = {
    let begun = RUN_BYTES * MAX_IN_FLIGHT_MAX as usize / 2;
    let item = ITEM_BYTES + HISTORY_MAX * (LINE_BYTES + CONSUMER_NAME_BYTES_MAX);
    let overdue = EXPIRE_MAX as usize * item;
    let story = FIXED_BYTES + item;
    story + if begun > overdue { begun } else { overdue }
};
/// A record's other fields.
const FIXED_BYTES: usize = 64;
/// A lease, and when it was begun.
const ITEM_BYTES: usize = 64;
/// A line of history without its consumer's name.
const LINE_BYTES: usize = 40;
/// An offset and a count.
const RUN_BYTES: usize = 20;

impl Proposal {
    /// Bytes of a record that time alone has asked for, at the most; hand-outs count for nothing here.
    pub(crate) fn bytes(&self) -> usize {
        let Self::Log(record) = self else { return 0 };
        FIXED_BYTES
            + match record {
                Record::Expire(Expired::Processing { items, .. }) => {
                    let lines = items.iter().flat_map(|item| &item.story.history);
                    let names: usize = lines.map(|line| LINE_BYTES + line.consumer.len()).sum();
                    ITEM_BYTES * items.len() + names
                }
                Record::Expire(Expired::Held { ranges, .. }) => ITEM_BYTES * ranges.len(),
                Record::Expire(Expired::Ttl { offsets, .. }) => RUN_BYTES * offsets.len(),
                Record::SessionEnd { begun, .. } => RUN_BYTES * begun.len(),
                Record::RedriveStep { letters, .. } => RUN_BYTES * letters.len(),
                _ => 0,
            }
    }
}

/// Consecutive offsets handed out with one delivery number.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Handout {
    pub offset: Offset,
    pub count: u32,
    pub delivery: Delivery,
    /// Failures so far + 1.
    pub attempt: u32,
}

/// A session that was taken up again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    pub topic: TopicId,
    pub subscription: SubscriptionId,
    pub mode: SubscriptionMode,
    pub lease_ms: u64,
    /// The leases that still stand.
    pub leases: Vec<LeaseName>,
    /// Stream mode: the committed consumer offset.
    pub position: Offset,
    /// As in `Outcome::SessionOpened`.
    pub active: bool,
}

/// Chunks of the folded state that changed since the snapshot before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotDelta {
    /// Chunk id and its new bytes, by rising id.
    pub dirty: Vec<(u64, bytes::Bytes)>,
    /// Chunks that are gone, by rising id.
    pub removed: Vec<u64>,
}

/// Why a snapshot cannot be read. The operator must use the older one or run a newer version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    #[error("the snapshot has no header; use the older snapshot")]
    NoHeader,
    #[error("the snapshot has format {0}, this version knows {FORMAT}; run a newer version")]
    Format(u32),
    #[error("chunk {chunk:#018x} of the snapshot cannot be read; use the older snapshot")]
    Chunk { chunk: u64 },
    #[error("the snapshot contradicts itself: {0}; use the older snapshot")]
    Contradiction(&'static str),
}
