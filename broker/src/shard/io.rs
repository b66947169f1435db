//! What goes into the shard and what comes out of it: plain data, no runtime types, so that a
//! simulation can drive the shard from a seed.

use bytes::Bytes;
use millpond_protocol::control::{
    ConsumerNotice, OpenConsumer, OpenProducer, Request, Response, SettleItem,
};
use millpond_protocol::hot::{AckRow, AckRun, ConsumerCredit};
use millpond_protocol::{
    Delivery, Epoch, ErrorCode, Offset, ProducerHandle, ProducerKey, Sequence, SessionId, Stamp,
    SubscriptionMode, TopicId, WireError,
};
use millpond_queue::{LeaseRange, Letter, Place, StartPosition};

/// Names whoever asked, so that the answer finds its way back. Never reused within a run.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// A question or a fact for the shard. `K` is kept until the input has been taken into the log or
/// refused: memory permits travel in it.
#[derive(Debug)]
pub enum Input<K> {
    OpenProducer {
        stream: StreamId,
        open: OpenProducer,
        owner: u64,
    },
    Publish {
        stream: StreamId,
        handle: ProducerHandle,
        topic: TopicId,
        producer: ProducerKey,
        epoch: Epoch,
        previous: Sequence,
        count: u32,
        /// Verified messages, one behind the other.
        messages: Bytes,
        keep: K,
    },
    /// An anonymous producer is done; its state goes.
    CloseProducer {
        producer: ProducerKey,
        epoch: Epoch,
    },
    OpenConsumer {
        stream: StreamId,
        open: OpenConsumer,
        /// A new session's secret.
        token: u64,
        /// Where a subscription that is created begins, times already resolved.
        start: StartPosition,
    },
    OpenSettlements {
        stream: StreamId,
        session: SessionId,
        token: u64,
    },
    /// Counts are of one attachment: from another stream than the session's they mean nothing.
    Credit {
        stream: StreamId,
        session: SessionId,
        credit: ConsumerCredit,
    },
    Renew {
        session: SessionId,
    },
    /// What has really been sent of the hand-outs.
    Sent {
        stream: StreamId,
        session: SessionId,
        messages: u64,
        bytes: u64,
    },
    /// What has been handed out and will never be sent: a seek made it void, it is damaged, or it is gone.
    Dropped {
        stream: StreamId,
        session: SessionId,
        ranges: Vec<LeaseRange>,
    },
    Settle {
        stream: StreamId,
        session: SessionId,
        acks: Vec<AckRun>,
        items: Vec<SettleItem>,
    },
    Commit {
        stream: StreamId,
        session: SessionId,
        next: Offset,
    },
    /// The delivery stream broke without a clean end: the session's grace begins.
    Detach {
        session: SessionId,
        stream: StreamId,
    },
    CloseSession {
        stream: StreamId,
        session: SessionId,
    },
    Request {
        stream: StreamId,
        id: u64,
        request: ResolvedRequest,
    },
    Authenticate {
        stream: StreamId,
        hash: Option<[u8; 32]>,
    },
    /// Bodies could not be read: their bytes are damaged on disk.
    Damaged {
        topic: TopicId,
        first: Offset,
        next: Offset,
    },
    /// No new leases; settlements are still taken.
    Drain,
}

/// A control request with what only a session can find out already done.
#[derive(Debug)]
pub enum ResolvedRequest {
    Plain(Request),
    /// `SubscriptionCreate` or `SubscriptionSeek` whose time has become an offset.
    At(Request, StartPosition),
    /// The session could not make sense of it; answered in its turn.
    Refused(WireError),
    /// `TokenNew`: the secret has been drawn; only its hash comes here.
    TokenAdd {
        name: String,
        hash: [u8; 32],
    },
}

/// What the shard tells a stream.
#[derive(Debug)]
pub enum Output {
    ProducerOpened {
        handle: ProducerHandle,
        topic: TopicId,
        producer: ProducerKey,
        epoch: Epoch,
        last_sequence: Sequence,
        anonymous: bool,
    },
    /// Durable.
    Published {
        handle: ProducerHandle,
        rows: Vec<AckRow>,
        messages: u64,
        bytes: u64,
    },
    PublishRefused {
        handle: ProducerHandle,
        previous: Sequence,
        count: u32,
        bytes: u64,
        last_accepted: Sequence,
        error: WireError,
    },
    /// One producer of the stream is over; `None`: its client left it.
    ProducerEnded {
        handle: ProducerHandle,
        error: Option<WireError>,
    },
    ConsumerOpened(Box<Opened>),
    SettlementsOpened,
    Deliver(Handout),
    Notice(ConsumerNotice),
    Settled {
        count: u64,
        /// Ordinal within what was asked, code, state.
        refused: Vec<(u64, ErrorCode, millpond_protocol::control::MessageState)>,
    },
    SessionClosed,
    Response {
        id: u64,
        answer: Box<Answer>,
    },
    Authenticated {
        /// The token's name; `None` if no such token exists.
        name: Option<String>,
    },
    /// A token was revoked; connections that came in with it end.
    Revoked {
        token: String,
    },
    /// The stream is over, for this reason.
    End(WireError),
}

/// A consumer's session as it was opened or taken up again.
#[derive(Debug)]
pub struct Opened {
    pub session: SessionId,
    pub token: u64,
    pub topic: TopicId,
    pub subscription: millpond_protocol::SubscriptionId,
    pub mode: SubscriptionMode,
    pub lease_ms: u64,
    pub leases: Vec<millpond_protocol::control::LeaseName>,
    pub resumed: bool,
    pub position: Offset,
}

/// A run of messages of one topic for one consumer. Their bodies are read by the session.
#[derive(Clone, Debug)]
pub struct Handout {
    pub topic: TopicId,
    pub offset: Offset,
    pub count: u32,
    /// 0 in stream mode.
    pub delivery: Delivery,
    pub attempt: u32,
    pub elsewhere: Option<Box<Elsewhere>>,
}

/// Where the body of a handed-out message stands, if not at its own offset: dead letters and what
/// was redriven to its topic are references.
#[derive(Clone, Debug)]
pub struct Elsewhere {
    pub topic: TopicId,
    pub offset: Offset,
    pub letter: Option<Letter>,
}

/// The answer to a control request; some need bodies, which the session reads.
#[derive(Debug)]
pub enum Answer {
    Ready(Box<Result<Response, WireError>>),
    Peek {
        topic: TopicId,
        first: Offset,
        /// Where the looking ended.
        end: Offset,
        /// The topic's next offset.
        next: Offset,
        /// Those among the offsets whose bodies stand elsewhere; as many as are asked for, if there are more.
        elsewhere: Vec<(Offset, Elsewhere)>,
        limit: u32,
    },
    DeadLetters {
        letters: Vec<(Offset, Letter)>,
        next: Offset,
        more: bool,
    },
}

/// What became of a publish, for the cache of recent bodies.
#[derive(Clone, Debug)]
pub struct Fresh {
    pub topic: TopicId,
    pub base: Offset,
    pub count: u32,
    pub stamp: Stamp,
    pub place: Place,
    /// The accepted messages.
    pub messages: Bytes,
    /// Somebody subscribes to the topic and will ask for the bodies.
    pub is_wanted: bool,
}
