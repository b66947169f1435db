//! The simulated network and what crosses it.
//!
//! A connection has two streams (0: its main one, 1: settlements). What is sent on one stream arrives
//! in order, streams overtake each other, and a connection may end on one side before the other side
//! notices. Nothing is lost but by the loss of its connection, as with QUIC.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use millpond_broker::shard::io::{Output, ResolvedRequest, StreamId};
use millpond_protocol::control::{OpenConsumer, OpenProducer, SettleItem};
use millpond_protocol::hot::{AckRun, ConsumerCredit};
use millpond_protocol::{Epoch, Offset, ProducerHandle, ProducerKey, Sequence, SessionId, TopicId};

use crate::history::{Identity, Sent, Settling, TopicNo};

#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnId(pub u64);

pub type ClientNo = usize;
pub type Slot = usize;

/// Every producer's on its stream: it is alone there.
pub const HANDLE: ProducerHandle = ProducerHandle(1);
/// The streams of a connection.
pub const SLOTS: usize = 2;

impl ConnId {
    pub fn stream(self, slot: Slot) -> StreamId {
        StreamId(self.0 * SLOTS as u64 + slot as u64)
    }

    pub fn of(stream: StreamId) -> (Self, Slot) {
        let slots = SLOTS as u64;
        (Self(stream.0 / slots), (stream.0 % slots) as usize)
    }
}

/// From a client to the broker.
#[derive(Debug)]
pub enum Up {
    OpenProducer(OpenProducer),
    Publish {
        topic: TopicId,
        producer: ProducerKey,
        epoch: Epoch,
        previous: Sequence,
        count: u32,
        messages: Bytes,
        told: Vec<Sent>,
    },
    CloseProducer {
        producer: ProducerKey,
        epoch: Epoch,
    },
    OpenConsumer(Box<OpenConsumer>),
    OpenSettlements {
        session: SessionId,
        token: u64,
    },
    Credit {
        session: SessionId,
        credit: ConsumerCredit,
    },
    Renew(SessionId),
    Settle {
        id: u64,
        session: SessionId,
        acks: Vec<AckRun>,
        items: Vec<SettleItem>,
        told: Vec<Settling>,
    },
    Commit {
        id: u64,
        session: SessionId,
        next: Offset,
    },
    CloseSession(SessionId),
    Request {
        id: u64,
        request: Box<ResolvedRequest>,
    },
}

/// From the broker to a client.
#[derive(Debug)]
pub enum Down {
    Answer(Output),
    Messages(Vec<Message>),
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub offset: u64,
    pub delivery: u32,
}

/// What a stream has asked and the shard has not answered; answers come in this order.
#[derive(Clone, Debug)]
pub enum Asked {
    Publish {
        producer: Identity,
        topic: TopicNo,
        messages: Vec<Sent>,
    },
    Settle(u64),
    Commit(u64),
}

#[derive(Debug)]
pub struct Conn {
    pub client: ClientNo,
    /// The client's side is up.
    pub client_open: bool,
    /// The broker's side is up.
    pub broker_open: bool,
    /// The consumer session that was opened on it.
    pub session: Option<SessionId>,
    pub asked: [VecDeque<Asked>; SLOTS],
    /// When the last packet of each stream arrives.
    pub up_until: [u64; SLOTS],
    pub down_until: [u64; SLOTS],
}

impl Conn {
    pub fn new(client: ClientNo) -> Self {
        Self {
            client,
            client_open: true,
            broker_open: true,
            session: None,
            asked: Default::default(),
            up_until: [0; SLOTS],
            down_until: [0; SLOTS],
        }
    }
}

pub type Conns = BTreeMap<ConnId, Conn>;
