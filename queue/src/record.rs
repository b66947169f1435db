//! Records: every change of state as it stands in the log.
//!
//! Owns the kinds and their bytes. A kind is never reused and a layout never changes: a new need
//! gets a new kind. The hot ones (publish, lease, settle, commit) have fixed little-endian layouts,
//! see `hot.rs`; the others are postcard. The stamp and the place of a record stand beside it in the
//! log's entry, not in it.

mod hot;

pub use hot::{LEASE_FIXED_BYTES, PUBLISH_FIXED_BYTES, publish_header};

use millpond_protocol::control::{DeadFilter, LeaseName, Outcome, ProducerResume, RedriveTarget};
use millpond_protocol::hot::AckRun;
use millpond_protocol::policy::{SubscriptionConfig, SubscriptionPatch, TopicConfig, TopicPatch};
use millpond_protocol::{
    Delivery, Epoch, LogIndex, Offset, ProducerKey, Sequence, SessionId, Stamp, SubscriptionId,
    TopicId,
};
use serde::de::Deserialize as De;
use serde::{Deserialize, Serialize};

/// One change of state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// The first record after every start of the broker.
    Start {
        recovery_epoch: u32,
    },
    TopicCreate {
        name: &'a str,
        config: TopicConfig,
    },
    TopicUpdate {
        topic: TopicId,
        patch: TopicPatch,
    },
    /// Removes every message; offsets go on.
    TopicPurge {
        topic: TopicId,
    },
    TopicDelete {
        topic: TopicId,
    },
    SubscriptionCreate {
        topic: TopicId,
        name: &'a str,
        config: SubscriptionConfig,
        start: StartPosition,
    },
    SubscriptionUpdate {
        subscription: SubscriptionId,
        patch: SubscriptionPatch,
    },
    SubscriptionPause {
        subscription: SubscriptionId,
    },
    SubscriptionResume {
        subscription: SubscriptionId,
    },
    SubscriptionSeek {
        subscription: SubscriptionId,
        to: StartPosition,
    },
    SubscriptionDelete {
        subscription: SubscriptionId,
    },
    OpenProducer {
        topic: TopicId,
        /// Absent: an anonymous producer, whose state lives as long as its stream.
        producer_id: Option<&'a str>,
        resume: Option<ProducerResume>,
        /// Random; tells anonymous producers apart in the log.
        owner: u64,
    },
    /// An anonymous producer's stream is over: its state goes. A named one's stays.
    CloseProducer {
        producer: ProducerKey,
        epoch: Epoch,
    },
    Publish {
        topic: TopicId,
        producer: ProducerKey,
        epoch: Epoch,
        /// The last sequence sent before this batch; 0 if none ever was.
        previous: Sequence,
        count: u32,
        /// The messages one behind the other, in the protocol's layout.
        messages: &'a [u8],
    },
    SessionOpen {
        subscription: SubscriptionId,
        session: SessionId,
        token: u64,
        consumer_name: &'a str,
    },
    SessionEnd {
        session: SessionId,
        /// A close that the client asked for: everything is released, nothing charged.
        clean: bool,
        /// Which leases had been begun when the session was lost; empty when clean.
        begun: Vec<OffsetRun>,
        /// If exactly one had been begun: what memory held of it.
        story: Option<Story>,
    },
    Lease {
        subscription: SubscriptionId,
        session: SessionId,
        ranges: Vec<LeaseRange>,
    },
    Settle {
        subscription: SubscriptionId,
        session: SessionId,
        acks: Vec<AckRun>,
        items: Vec<SettleEntry>,
    },
    Expire(Expired),
    /// Stream mode: the next offset to be read.
    Commit {
        subscription: SubscriptionId,
        session: SessionId,
        next: Offset,
    },
    /// Messages below `first` go, as retention or the topic's limit wants it.
    Trim {
        topic: TopicId,
        first: Offset,
    },
    /// Starts sending back the letters of (source topic, subscription) that lie in `topic`.
    Redrive {
        /// The dead-letter topic.
        topic: TopicId,
        source_topic: &'a str,
        subscription: &'a str,
        filter: DeadFilter,
        rate_per_s: Option<u32>,
        target: RedriveTarget,
    },
    /// The next letters of a job, and where it goes on after them.
    RedriveStep {
        job: u64,
        letters: Vec<Offset>,
        next: Offset,
    },
    RedriveCancel {
        job: u64,
    },
    /// Removes the letters of (source topic, subscription) that lie in `topic`.
    DeadPurge {
        /// The dead-letter topic.
        topic: TopicId,
        source_topic: &'a str,
        subscription: &'a str,
        filter: DeadFilter,
    },
    TokenAdd {
        name: &'a str,
        hash: [u8; 32],
    },
    TokenRevoke {
        name: &'a str,
    },
    /// The log's entries from `from` to `to` inclusive were damaged and accepted as lost: the records behind
    /// them, up to this one, were decided with them.
    Skip {
        from: LogIndex,
        to: LogIndex,
        /// Most messages that a topic may have lost in them without anything behind them telling.
        messages_max: u64,
    },
    /// What the state said when this group was begun, of what its records are about. Changes nothing, unless
    /// entries before it are lost: then it tells what they had done.
    Mark(Mark<'a>),
    /// Bodies that were found to be unreadable: queue subscriptions dead-letter them.
    Damaged {
        topic: TopicId,
        ranges: Vec<OffsetRun>,
    },
    /// The bodies of these messages, which nobody needs, are about to go.
    LetGo {
        topic: TopicId,
        ranges: Vec<OffsetRun>,
    },
}

/// See [`Record::Mark`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark<'a> {
    pub next_topic: u32,
    pub next_subscription: u32,
    pub next_producer: u64,
    /// The topics that the group publishes to.
    #[serde(borrow)]
    pub topics: Vec<TopicMark<'a>>,
    /// The producers that publish in it.
    #[serde(borrow)]
    pub producers: Vec<ProducerMark<'a>>,
}

/// A topic and the offset of its next message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicMark<'a> {
    pub topic: TopicId,
    pub name: &'a str,
    pub first: Offset,
    pub next: Offset,
    /// Of the messages from `first` on.
    pub bytes: u64,
}

/// A producer and the last of its sequences that was accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProducerMark<'a> {
    pub producer: ProducerKey,
    pub topic: TopicId,
    pub name: Option<&'a str>,
    pub epoch: Epoch,
    pub last: Sequence,
}

/// Where a subscription begins or is moved to; times have been resolved to offsets before.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartPosition {
    Earliest,
    Latest,
    At(Offset),
}

/// Consecutive offsets.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OffsetRun {
    pub offset: Offset,
    pub count: u32,
}

/// Consecutive offsets with one delivery number.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRange {
    pub offset: Offset,
    pub count: u32,
    pub delivery: Delivery,
}

/// A settlement other than an ack, with what memory held of the message before it, so that this
/// record alone tells the story of a dead letter. `Queue::enrich` fills the last two fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettleEntry {
    pub lease: LeaseName,
    pub outcome: Outcome,
    pub begun_at: Option<Stamp>,
    pub history: Vec<HistoryItem>,
}

/// What memory held of a message when its lease was taken away; that failure is the last of `history`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Story {
    pub begun_at: Option<Stamp>,
    pub history: Vec<HistoryItem>,
}

/// One failure of a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryItem {
    pub at: Stamp,
    /// How long the handler had it; 0 if that is unknown.
    pub duration_ms: u64,
    pub consumer: String,
    pub outcome: FailureKind,
    /// The user's code; 0 if none.
    pub code: u32,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FailureKind {
    Nack,
    Reject,
    ProcessingTimeout,
    SessionLost,
}

impl FailureKind {
    /// The failure as headers, JSON and metrics spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nack => "nack",
            Self::Reject => "reject",
            Self::ProcessingTimeout => "processing_timeout",
            Self::SessionLost => "session_lost",
        }
    }
}

/// Something whose time is over. Time alone changes nothing: this record does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Expired {
    /// Handlers that took longer than `processing_timeout`.
    Processing {
        subscription: SubscriptionId,
        session: SessionId,
        items: Vec<Overdue>,
    },
    /// Messages that waited unbegun longer than `hold_max`.
    Held {
        subscription: SubscriptionId,
        session: SessionId,
        ranges: Vec<LeaseRange>,
    },
    /// Messages whose own time to live is over.
    Ttl {
        topic: TopicId,
        offsets: Vec<Offset>,
    },
    /// Messages below it are older than the topic's time to live.
    TopicTtl { topic: TopicId, below: Offset },
    /// Messages below it are older than the subscription's `max_age`.
    MaxAge {
        subscription: SubscriptionId,
        below: Offset,
    },
    /// Producers that were idle too long.
    Producers { producers: Vec<ProducerKey> },
}

/// A lease whose handler took too long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overdue {
    pub lease: LeaseName,
    pub story: Story,
}

/// Bytes that are no record of this version. The operator must run a newer version, or the log is
/// damaged in a way that its checksums did not see.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("the log has a record of kind {0}, which this version does not know; run a newer one")]
    Kind(u8),
    #[error("a record of kind {kind} does not have the layout of its kind")]
    Layout { kind: u8 },
}

macro_rules! kinds {
    ($($name:ident = $code:literal),* $(,)?) => {
        /// The number of each kind of record. Never reused.
        pub mod kind {
            $(#[allow(non_upper_case_globals, reason = "named as the variant")]
            pub const $name: u8 = $code;)*
        }
    };
}

kinds! {
    Start = 1,
    TopicCreate = 2, TopicUpdate = 3, TopicPurge = 4, TopicDelete = 5,
    SubscriptionCreate = 10, SubscriptionUpdate = 11, SubscriptionPause = 12,
    SubscriptionResume = 13, SubscriptionSeek = 14, SubscriptionDelete = 15,
    OpenProducer = 20, CloseProducer = 21, Publish = 22,
    SessionOpen = 30, SessionEnd = 31, Lease = 32, Settle = 33, Commit = 34, Expire = 35,
    Trim = 40, Redrive = 41, RedriveStep = 42, RedriveCancel = 43, DeadPurge = 44,
    TokenAdd = 50, TokenRevoke = 51,
    Skip = 60, Damaged = 61, LetGo = 62, Mark = 63,
}

impl<'a> Record<'a> {
    /// The number that stands beside the record's bytes.
    #[must_use]
    pub const fn kind(&self) -> u8 {
        match self {
            Self::Start { .. } => kind::Start,
            Self::TopicCreate { .. } => kind::TopicCreate,
            Self::TopicUpdate { .. } => kind::TopicUpdate,
            Self::TopicPurge { .. } => kind::TopicPurge,
            Self::TopicDelete { .. } => kind::TopicDelete,
            Self::SubscriptionCreate { .. } => kind::SubscriptionCreate,
            Self::SubscriptionUpdate { .. } => kind::SubscriptionUpdate,
            Self::SubscriptionPause { .. } => kind::SubscriptionPause,
            Self::SubscriptionResume { .. } => kind::SubscriptionResume,
            Self::SubscriptionSeek { .. } => kind::SubscriptionSeek,
            Self::SubscriptionDelete { .. } => kind::SubscriptionDelete,
            Self::OpenProducer { .. } => kind::OpenProducer,
            Self::CloseProducer { .. } => kind::CloseProducer,
            Self::Publish { .. } => kind::Publish,
            Self::SessionOpen { .. } => kind::SessionOpen,
            Self::SessionEnd { .. } => kind::SessionEnd,
            Self::Lease { .. } => kind::Lease,
            Self::Settle { .. } => kind::Settle,
            Self::Commit { .. } => kind::Commit,
            Self::Expire(_) => kind::Expire,
            Self::Trim { .. } => kind::Trim,
            Self::Redrive { .. } => kind::Redrive,
            Self::RedriveStep { .. } => kind::RedriveStep,
            Self::RedriveCancel { .. } => kind::RedriveCancel,
            Self::DeadPurge { .. } => kind::DeadPurge,
            Self::TokenAdd { .. } => kind::TokenAdd,
            Self::TokenRevoke { .. } => kind::TokenRevoke,
            Self::Skip { .. } => kind::Skip,
            Self::Damaged { .. } => kind::Damaged,
            Self::LetGo { .. } => kind::LetGo,
            Self::Mark(_) => kind::Mark,
        }
    }

    /// Appends the record's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Publish { .. } | Self::Lease { .. } | Self::Settle { .. } => {
                hot::encode(self, out)
            }
            Self::Commit { .. } => hot::encode(self, out),
            Self::Start { recovery_epoch } => put(recovery_epoch, out),
            Self::TopicCreate { name, config } => put(&(name, config), out),
            Self::TopicUpdate { topic, patch } => put(&(topic, patch), out),
            Self::TopicPurge { topic } | Self::TopicDelete { topic } => put(topic, out),
            Self::SubscriptionCreate {
                topic,
                name,
                config,
                start,
            } => put(&(topic, name, config, start), out),
            Self::SubscriptionUpdate {
                subscription,
                patch,
            } => put(&(subscription, patch), out),
            Self::SubscriptionPause { subscription }
            | Self::SubscriptionResume { subscription }
            | Self::SubscriptionDelete { subscription } => put(subscription, out),
            Self::SubscriptionSeek { subscription, to } => put(&(subscription, to), out),
            Self::OpenProducer {
                topic,
                producer_id,
                resume,
                owner,
            } => put(&(topic, producer_id, resume, owner), out),
            Self::CloseProducer { producer, epoch } => put(&(producer, epoch), out),
            Self::SessionOpen {
                subscription,
                session,
                token,
                consumer_name,
            } => put(&(subscription, session, token, consumer_name), out),
            Self::SessionEnd {
                session,
                clean,
                begun,
                story,
            } => put(&(session, clean, begun, story), out),
            Self::Expire(expired) => put(expired, out),
            Self::Trim { topic, first } => put(&(topic, first), out),
            Self::Redrive {
                topic,
                source_topic,
                subscription,
                filter,
                rate_per_s,
                target,
            } => put(
                &(
                    topic,
                    source_topic,
                    subscription,
                    filter,
                    rate_per_s,
                    target,
                ),
                out,
            ),
            Self::RedriveStep { job, letters, next } => put(&(job, letters, next), out),
            Self::RedriveCancel { job } => put(job, out),
            Self::DeadPurge {
                topic,
                source_topic,
                subscription,
                filter,
            } => put(&(topic, source_topic, subscription, filter), out),
            Self::TokenAdd { name, hash } => put(&(name, hash), out),
            Self::TokenRevoke { name } => put(name, out),
            Self::Skip {
                from,
                to,
                messages_max,
            } => put(&(from, to, messages_max), out),
            Self::Mark(mark) => put(mark, out),
            Self::Damaged { topic, ranges } | Self::LetGo { topic, ranges } => {
                put(&(topic, ranges), out)
            }
        }
    }

    /// Reads a record that stands in the log under this kind.
    pub fn decode(kind: u8, bytes: &'a [u8]) -> Result<Self, RecordError> {
        Ok(match kind {
            kind::Publish | kind::Lease | kind::Settle | kind::Commit => {
                return hot::decode(kind, bytes);
            }
            kind::Start => {
                let recovery_epoch = get(kind, bytes)?;
                Self::Start { recovery_epoch }
            }
            kind::TopicCreate => {
                let (name, config) = get(kind, bytes)?;
                Self::TopicCreate { name, config }
            }
            kind::TopicUpdate => {
                let (topic, patch) = get(kind, bytes)?;
                Self::TopicUpdate { topic, patch }
            }
            kind::TopicPurge => {
                let topic = get(kind, bytes)?;
                Self::TopicPurge { topic }
            }
            kind::TopicDelete => {
                let topic = get(kind, bytes)?;
                Self::TopicDelete { topic }
            }
            kind::SubscriptionCreate => {
                let (topic, name, config, start) = get(kind, bytes)?;
                Self::SubscriptionCreate {
                    topic,
                    name,
                    config,
                    start,
                }
            }
            kind::SubscriptionUpdate => {
                let (subscription, patch) = get(kind, bytes)?;
                Self::SubscriptionUpdate {
                    subscription,
                    patch,
                }
            }
            kind::SubscriptionPause => {
                let subscription = get(kind, bytes)?;
                Self::SubscriptionPause { subscription }
            }
            kind::SubscriptionResume => {
                let subscription = get(kind, bytes)?;
                Self::SubscriptionResume { subscription }
            }
            kind::SubscriptionSeek => {
                let (subscription, to) = get(kind, bytes)?;
                Self::SubscriptionSeek { subscription, to }
            }
            kind::SubscriptionDelete => {
                let subscription = get(kind, bytes)?;
                Self::SubscriptionDelete { subscription }
            }
            kind::OpenProducer => {
                let (topic, producer_id, resume, owner) = get(kind, bytes)?;
                Self::OpenProducer {
                    topic,
                    producer_id,
                    resume,
                    owner,
                }
            }
            kind::CloseProducer => {
                let (producer, epoch) = get(kind, bytes)?;
                Self::CloseProducer { producer, epoch }
            }
            kind::SessionOpen => {
                let (subscription, session, token, consumer_name) = get(kind, bytes)?;
                Self::SessionOpen {
                    subscription,
                    session,
                    token,
                    consumer_name,
                }
            }
            kind::SessionEnd => {
                let (session, clean, begun, story) = get(kind, bytes)?;
                Self::SessionEnd {
                    session,
                    clean,
                    begun,
                    story,
                }
            }
            kind::Expire => Self::Expire(get(kind, bytes)?),
            kind::Trim => {
                let (topic, first) = get(kind, bytes)?;
                Self::Trim { topic, first }
            }
            kind::Redrive => {
                let (topic, source_topic, subscription, filter, rate_per_s, target) =
                    get(kind, bytes)?;
                Self::Redrive {
                    topic,
                    source_topic,
                    subscription,
                    filter,
                    rate_per_s,
                    target,
                }
            }
            kind::RedriveStep => {
                let (job, letters, next) = get(kind, bytes)?;
                Self::RedriveStep { job, letters, next }
            }
            kind::RedriveCancel => {
                let job = get(kind, bytes)?;
                Self::RedriveCancel { job }
            }
            kind::DeadPurge => {
                let (topic, source_topic, subscription, filter) = get(kind, bytes)?;
                Self::DeadPurge {
                    topic,
                    source_topic,
                    subscription,
                    filter,
                }
            }
            kind::TokenAdd => {
                let (name, hash) = get(kind, bytes)?;
                Self::TokenAdd { name, hash }
            }
            kind::TokenRevoke => {
                let name = get(kind, bytes)?;
                Self::TokenRevoke { name }
            }
            kind::Skip => {
                let (from, to, messages_max) = get(kind, bytes)?;
                Self::Skip {
                    from,
                    to,
                    messages_max,
                }
            }
            kind::Mark => Self::Mark(get(kind, bytes)?),
            kind::Damaged => {
                let (topic, ranges) = get(kind, bytes)?;
                Self::Damaged { topic, ranges }
            }
            kind::LetGo => {
                let (topic, ranges) = get(kind, bytes)?;
                Self::LetGo { topic, ranges }
            }
            _ => return Err(RecordError::Kind(kind)),
        })
    }
}

fn put<T: Serialize>(value: &T, out: &mut Vec<u8>) {
    let bytes = postcard::to_allocvec(value).expect("encoding into memory cannot fail");
    out.extend_from_slice(&bytes);
}

fn get<'a, T: De<'a>>(kind: u8, bytes: &'a [u8]) -> Result<T, RecordError> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        _ => Err(RecordError::Layout { kind }),
    }
}

#[cfg(test)]
mod tests;
