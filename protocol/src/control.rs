//! Everything that is not hot: handshakes, opening streams, settlements other than acks, and the
//! control stream's requests and responses. Encoded with postcard.
//!
//! Evolution: variants and fields are only appended; a golden-byte test holds the present ones.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::{ErrorCode, WireError};
use crate::hot::Credit;
use crate::ids::{
    Delivery, Epoch, Offset, ProducerHandle, Sequence, SessionId, Stamp, SubscriptionId, TopicId,
};
use crate::limits::REASON_BYTES_MAX;
use crate::policy::{
    StartAt, SubscriptionConfig, SubscriptionMode, SubscriptionPatch, TopicConfig, TopicPatch,
};

/// The first frame of a connection's control stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub version_min: u16,
    pub version_max: u16,
    /// The API token as its holder has it; absent where none is required.
    pub token: Option<String>,
    /// Shown in the broker's log and in dead letters; at most 200 bytes.
    pub client_name: String,
}

/// The broker's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version both will speak.
    pub version: u16,
    /// The store's id: another one means another broker behind the same address.
    pub store_id: [u8; 16],
    /// Raised at every start of the broker.
    pub recovery_epoch: u32,
    /// The broker's software version, for people.
    pub broker_version: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoAway {
    /// Milliseconds until the broker closes the connection. Settle and reconnect.
    pub deadline_ms: u32,
    pub reason: String,
}

/// Opens a producer on a publish stream; the first one makes the stream one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenProducer {
    /// Higher than every other one on this stream before it.
    pub handle: ProducerHandle,
    pub topic: String,
    /// Names the dedup state; absent: the state lives until the producer is closed for good.
    pub producer_id: Option<String>,
    /// An anonymous producer that reconnects names the state that it had before.
    pub resume: Option<ProducerResume>,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProducerResume {
    pub producer: crate::ids::ProducerKey,
    pub epoch: Epoch,
    /// The last sequence that the client knows to be accepted.
    pub last_known: Sequence,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProducerOpened {
    pub handle: ProducerHandle,
    pub topic: TopicId,
    pub producer: crate::ids::ProducerKey,
    /// This incarnation; lower ones are fenced from now on.
    pub epoch: Epoch,
    /// The last accepted sequence; 0: none.
    pub last_sequence: Sequence,
    pub credit: Credit,
}

/// Nothing of a publish frame was appended. The producer's frames behind it are refused too, as a gap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishRefused {
    pub handle: ProducerHandle,
    /// `previous` of the refused frame, so that the sender finds it.
    pub previous: Sequence,
    pub count: u32,
    /// The last accepted sequence, from which a sender re-syncs.
    pub last_accepted: Sequence,
    pub error: WireError,
}

/// The client leaves a producer. What was published before is still taken, but perhaps not answered.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloseProducer {
    pub handle: ProducerHandle,
    pub leaving: Leaving,
}

/// Whether a producer that leaves will be back.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Leaving {
    /// It is done: the dedup state of an anonymous one goes.
    ForGood,
    /// It may resume: its state stays.
    ForNow,
}

/// Nothing more comes for this producer, and what it still sends is passed over. The others of its
/// stream go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProducerEnded {
    pub handle: ProducerHandle,
    /// Why; absent if the client closed it.
    pub error: Option<WireError>,
}

/// First frame of a delivery stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenConsumer {
    pub topic: String,
    pub subscription: String,
    /// Creates the subscription if it is missing.
    pub create: Option<CreateSubscription>,
    /// Comes back to a session after a broken connection or a broker restart.
    pub resume: Option<SessionResume>,
    /// Shown in dead letters; at most 200 bytes.
    pub consumer_name: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateSubscription {
    pub config: SubscriptionConfig,
    pub start: StartAt,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionResume {
    pub session: SessionId,
    /// The secret given when the session was opened.
    pub token: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsumerOpened {
    pub session: SessionId,
    pub token: u64,
    pub topic: TopicId,
    pub subscription: SubscriptionId,
    pub mode: SubscriptionMode,
    pub lease_ms: u64,
    /// Leases of the resumed session that still stand; the rest are lost. Empty for a new one.
    pub leases: Vec<LeaseName>,
    /// True: the session that was named has been taken up; false: this is a new one.
    pub resumed: bool,
    /// Stream mode: the committed consumer offset, the next to be read.
    pub position: Offset,
}

/// A lease by name (the session is the stream's).
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LeaseName {
    pub offset: Offset,
    pub delivery: Delivery,
}

/// First frame of a settlement stream.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenSettlements {
    pub session: SessionId,
    pub token: u64,
}

/// Settlements other than acks; each is answered in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settle {
    pub items: Vec<SettleItem>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettleItem {
    pub lease: LeaseName,
    pub outcome: Outcome,
}

/// What a consumer says of a delivery, other than that it is finished.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Failed; comes again after the backoff, or after `delay_ms` if given (at most 30 days).
    Nack {
        delay_ms: Option<u64>,
        /// The user's own code, for metrics and dead letters; 0 if none.
        code: u32,
        reason: String,
    },
    /// Failed for good: dead at once.
    Reject {
        kind: RejectKind,
        code: u32,
        reason: String,
    },
    /// Handed back untouched; comes again at once, or after the delay. Costs nothing.
    Release { delay_ms: Option<u64> },
    /// Still working: the processing clock starts again. Volatile.
    Extend,
}

/// Cuts a reason to its limit at a character boundary.
#[must_use]
pub fn cut_reason(mut reason: String) -> String {
    if reason.len() > REASON_BYTES_MAX {
        let mut end = REASON_BYTES_MAX;
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        reason.truncate(end);
    }
    reason
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RejectKind {
    Rejected,
    Undecodable,
}

/// Answers to acks (one per offset), settle items and commits, in the order they were sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    /// How many have been answered since the stream was opened, in all; durable.
    pub upto: u64,
    /// Those among the newly answered that were refused: ordinal since opening (from 0) and why.
    pub refused: Vec<SettleRefused>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettleRefused {
    pub ordinal: u64,
    pub code: ErrorCode,
    pub state: MessageState,
}

/// Where a message is within one queue subscription.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MessageState {
    Ready,
    /// Leased to a session: another's, or this one's under a newer delivery number.
    Leased,
    Scheduled,
    Acked,
    Dead,
    /// Not in the subscription (purged, or before its start).
    Gone,
}

/// Broker to client on the delivery stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsumerNotice {
    /// These leases are over; work on them may be done by another.
    LeasesLost {
        leases: Vec<LeaseName>,
        reason: LostReason,
    },
    /// Stream mode: this session is the active one and reads from here.
    Active { from: Offset },
    /// Stream mode: another session is active; this one stands by.
    Standby,
    /// Nothing is delivered, for this reason, although there may be messages.
    Paused { reason: String },
    /// Stored bytes from `first` to before `next` are damaged (stream mode skips them when told).
    Corrupt { first: Offset, next: Offset },
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LostReason {
    LeaseExpired,
    ProcessingTimeout,
    HoldMax,
    Seek,
    Purged,
    Deleted,
    Expired,
    Draining,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestFrame {
    /// Chosen by the client; the response carries it.
    pub id: u64,
    pub request: Request,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResponseFrame {
    pub id: u64,
    pub result: Result<Response, WireError>,
}

/// What can be asked on the control stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    Ping,
    TopicCreate {
        name: String,
        config: TopicConfig,
    },
    TopicList {
        after: Option<String>,
        limit: u32,
    },
    TopicShow {
        name: String,
    },
    TopicUpdate {
        name: String,
        patch: TopicPatch,
    },
    /// Removes every message; offsets go on.
    TopicPurge {
        name: String,
    },
    /// With its subscriptions; refused while one has dead letters elsewhere unless `force`.
    TopicDelete {
        name: String,
        force: bool,
    },
    SubscriptionCreate {
        topic: String,
        name: String,
        config: SubscriptionConfig,
        start: StartAt,
    },
    SubscriptionList {
        topic: String,
    },
    SubscriptionShow {
        topic: String,
        name: String,
    },
    SubscriptionUpdate {
        topic: String,
        name: String,
        patch: SubscriptionPatch,
    },
    SubscriptionPause {
        topic: String,
        name: String,
    },
    SubscriptionResume {
        topic: String,
        name: String,
    },
    SubscriptionSeek {
        topic: String,
        name: String,
        to: StartAt,
    },
    SubscriptionDelete {
        topic: String,
        name: String,
    },
    /// Letters of one subscription, oldest first, from this dead-letter offset on.
    DeadList {
        topic: String,
        subscription: String,
        from: Offset,
        limit: u32,
    },
    DeadRedrive {
        topic: String,
        subscription: String,
        filter: DeadFilter,
        rate_per_s: Option<u32>,
        target: RedriveTarget,
    },
    DeadPurge {
        topic: String,
        subscription: String,
        filter: DeadFilter,
    },
    Peek {
        topic: String,
        from: Offset,
        limit: u32,
    },
    TokenNew {
        name: String,
    },
    TokenList,
    TokenRevoke {
        name: String,
    },
    Status,
    /// How far a redrive job is.
    RedriveShow {
        job: u64,
    },
    RedriveCancel {
        job: u64,
    },
}

/// Which dead letters are meant. All conditions must hold; the default means all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadFilter {
    /// Offsets in the dead-letter topic, at most [`DEAD_OFFSETS_MAX`](crate::limits::DEAD_OFFSETS_MAX); empty: any.
    pub offsets: Vec<Offset>,
    pub reason: Option<DeadReason>,
    /// Most letters to take.
    pub limit: Option<u64>,
}

#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RedriveTarget {
    /// The subscription in which the message failed, and no other.
    #[default]
    Subscription,
    /// The source topic: every subscription sees a new message.
    Topic,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeadReason {
    MaxAttempts,
    Rejected,
    MaxDeliveries,
    MaxAge,
    Expired,
    Undecodable,
    Damaged,
}

impl DeadReason {
    /// Every reason, for metrics and for reading it from text.
    pub const ALL: [Self; 7] = [
        Self::MaxAttempts,
        Self::Rejected,
        Self::MaxDeliveries,
        Self::MaxAge,
        Self::Expired,
        Self::Undecodable,
        Self::Damaged,
    ];

    /// The reason as headers, JSON and metrics spell it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::MaxAttempts => "max_attempts",
            Self::Rejected => "rejected",
            Self::MaxDeliveries => "max_deliveries",
            Self::MaxAge => "max_age",
            Self::Expired => "expired",
            Self::Undecodable => "undecodable",
            Self::Damaged => "damaged",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    Done,
    Topic(TopicView),
    Topics {
        topics: Vec<TopicView>,
        more: bool,
    },
    Subscription(SubscriptionView),
    Subscriptions(Vec<SubscriptionView>),
    DeadLetters {
        letters: Vec<DeadLetterView>,
        next: Offset,
        more: bool,
    },
    /// A redrive or purge of dead letters has begun or is done.
    Redrive(RedriveView),
    Purged {
        count: u64,
    },
    Messages {
        messages: Vec<PeekedMessage>,
        next: Offset,
        more: bool,
    },
    /// The only time that the token is shown.
    Token {
        name: String,
        token: String,
    },
    Tokens(Vec<TokenView>),
    Status(Box<StatusView>),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicView {
    pub name: String,
    pub id: TopicId,
    pub config: TopicConfig,
    /// The earliest offset kept, and the next to be assigned.
    pub first: Offset,
    pub next: Offset,
    pub bytes: u64,
    /// Messages that are published but not yet due.
    pub delayed: u64,
    pub subscriptions: u32,
    pub created_at: Stamp,
    /// For a dead-letter topic: the letters that it holds.
    pub dead_letters: Option<u64>,
    /// When the oldest of them died.
    pub oldest_dead_at: Option<Stamp>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubscriptionView {
    pub topic: String,
    pub name: String,
    pub id: SubscriptionId,
    pub config: SubscriptionConfig,
    pub dead_letter: String,
    pub paused: bool,
    /// Everything below it is finished.
    pub floor: Offset,
    /// Not finished, in all: ready, in flight, scheduled.
    pub backlog: u64,
    pub ready: u64,
    pub in_flight: u64,
    pub scheduled: u64,
    /// Letters of this subscription.
    pub dead: u64,
    pub consumers: u32,
    pub oldest_ready_ms: Option<u64>,
    pub next_due: Option<Stamp>,
    /// Bytes of messages that only stay because this subscription has not finished them.
    pub pinned_bytes: u64,
    /// Why nothing is handed out, if something holds it back.
    pub stalled: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetterView {
    pub offset: Offset,
    pub source_topic: String,
    pub source_offset: Offset,
    pub subscription: String,
    pub reason: DeadReason,
    pub error_code: u32,
    pub error: String,
    pub failures: u32,
    pub deliveries: u32,
    pub releases: u32,
    pub redrives: u32,
    pub published_at: Stamp,
    pub first_attempt_at: Option<Stamp>,
    pub dead_at: Stamp,
    pub consumer: String,
    /// The last 10 failures, oldest first.
    pub history: Vec<HistoryView>,
    /// The message as published; empty if its bytes are damaged.
    pub message: Bytes,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryView {
    pub at: Stamp,
    pub duration_ms: u64,
    pub consumer: String,
    /// `nack`, `reject`, `processing_timeout`, `session_lost`.
    pub outcome: String,
    pub code: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RedriveView {
    pub job: u64,
    pub total: u64,
    pub done: u64,
    pub finished: bool,
    pub cancelled: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeekedMessage {
    pub offset: Offset,
    pub published_at: Stamp,
    /// Broker-made headers, in the message's header layout.
    pub extra: Bytes,
    /// The message as published; empty if its bytes are damaged.
    pub message: Bytes,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenView {
    pub name: String,
    pub created_at: Stamp,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusView {
    pub broker_version: String,
    pub store_id: [u8; 16],
    pub recovery_epoch: u32,
    pub ready: bool,
    /// Why it is not ready, or what needs attention.
    pub remarks: Vec<String>,
    pub now: Stamp,
    pub uptime_ms: u64,
    pub topics: Vec<TopicView>,
    pub subscriptions: Vec<SubscriptionView>,
    pub connections: u32,
    pub log_bytes: u64,
    pub segments: u32,
    /// Log indexes: what has been appended, and what survives a power cut.
    pub appended: u64,
    pub durable: u64,
    pub memory_used: u64,
    pub memory_budget: u64,
    pub disk_free: u64,
    pub disk_total: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let found = cut_reason(format!("x{}", "é".repeat(REASON_BYTES_MAX)));
        assert_eq!(found.len(), REASON_BYTES_MAX - 1);
        assert!(found.ends_with('é'));
    }
    use crate::frame::{FrameType, HEADER_BYTES, encode};

    #[test]
    fn the_first_bytes_of_a_handshake_are_fixed_for_ever() {
        let hello = Hello {
            version_min: 1,
            version_max: 2,
            token: Some("t".into()),
            client_name: "c".into(),
        };
        let bytes = encode(FrameType::Hello, &hello).unwrap();
        assert_eq!(&bytes[HEADER_BYTES..], &[1, 2, 1, 1, b't', 1, b'c']);
        let request = RequestFrame {
            id: 3,
            request: Request::TopicShow { name: "a".into() },
        };
        let bytes = encode(FrameType::Request, &request).unwrap();
        assert_eq!(&bytes[HEADER_BYTES..], &[3, 3, 1, b'a']);
    }

    #[test]
    fn the_frames_around_a_producer_have_these_bytes() {
        fn body<T: Serialize>(kind: FrameType, value: &T) -> Vec<u8> {
            encode(kind, value).unwrap()[HEADER_BYTES..].to_vec()
        }
        let handle = ProducerHandle(9);
        let open = OpenProducer {
            handle,
            topic: "t".into(),
            producer_id: None,
            resume: None,
        };
        let golden = [9, 1, b't', 0, 0];
        assert_eq!(body(FrameType::OpenProducer, &open), golden);
        for (leaving, golden) in [(Leaving::ForGood, [9, 0]), (Leaving::ForNow, [9, 1])] {
            let close = CloseProducer { handle, leaving };
            assert_eq!(body(FrameType::CloseProducer, &close), golden);
        }
        let error = Some(WireError::new(ErrorCode::ProducerFenced, "f"));
        for (error, golden) in [(None, &[9, 0][..]), (error, &[9, 1, 30, 1, b'f', 0])] {
            let ended = ProducerEnded { handle, error };
            assert_eq!(body(FrameType::ProducerEnded, &ended), golden);
        }
    }
}
