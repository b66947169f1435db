//! What happened in a world, as the oracle is told it: plain data in the order of events.
//!
//! Clients' operations appear twice: when they are invoked (sent, or taken in by the shard) and when
//! their answer leaves the process; one without an answer is unknown. Topics, subscriptions and
//! consumers are named by their number in the world's plan. All stamps are the broker's.

/// A number of the plan.
pub type TopicNo = usize;
pub type SubNo = usize;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    pub topics: Vec<TopicRules>,
    pub subs: Vec<SubRules>,
    pub events: Vec<Event>,
}

/// What the oracle must know of a topic.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TopicRules {
    /// Nothing is let go during the history: every accepted message must be there at the end.
    pub keeps_all: bool,
}

/// What the oracle must know of a subscription.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SubRules {
    pub topic: TopicNo,
    pub is_stream: bool,
    pub max_attempts: u32,
    pub max_deliveries: u32,
    /// The shortest wait after the first failure, the second, …; the last holds for the rest.
    pub least_waits_ms: Vec<u64>,
}

impl SubRules {
    /// The shortest wait after this many failures, in microseconds.
    pub fn least_wait_us(&self, failures: u32) -> u64 {
        let step = failures.max(1) as usize - 1;
        let wait = self.least_waits_ms.get(step).or(self.least_waits_ms.last());
        wait.copied().unwrap_or(0) * 1_000
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The process serves; what it recovered of the topics, as far as it was not seen before.
    Started {
        at: u64,
        topics: Vec<TopicSeen>,
    },
    /// The store is not served any more although the disk kept every promise.
    Unserved {
        why: String,
    },
    /// The process is gone, and with it every connection.
    Stopped,
    /// A write or a sync of the log has failed in this process.
    SyncFailed,
    /// Any answer left the process; only told after `SyncFailed`.
    AnsweredAfterFailure,

    /// A client sent these messages to be appended.
    Send {
        producer: Identity,
        topic: TopicNo,
        messages: Vec<Sent>,
    },
    /// The shard took them in.
    SendTaken {
        messages: Vec<Sent>,
        at: u64,
    },
    /// Durable, said the shard.
    Accepted {
        producer: Identity,
        topic: TopicNo,
        messages: Vec<Placed>,
    },
    /// A producer was told that sequences are forgotten which it knows to be accepted.
    Forgotten {
        producer: u64,
        last_known: u64,
    },
    /// A producer was opened.
    ProducerOpened {
        producer: Identity,
        last_sequence: u64,
        last_known: u64,
    },

    /// A consumer's stay has begun.
    SessionOpened {
        session: u64,
    },
    Delivered(Delivery),
    /// The client told that it has begun with this delivery.
    Begun {
        sub: SubNo,
        offset: u64,
        delivery: u32,
    },
    /// The session was told that these leases, by offset and delivery, are over.
    Lost {
        sub: SubNo,
        session: u64,
        leases: Vec<(u64, u32)>,
    },
    /// The shard took settlements in.
    SettleTaken {
        id: u64,
        sub: SubNo,
        session: u64,
        items: Vec<Settling>,
        at: u64,
    },
    /// Durable, said the shard; those with these ordinals were refused.
    Settled {
        id: u64,
        refused: Vec<usize>,
    },

    /// Stream mode: the session reads from here.
    Active {
        sub: SubNo,
        session: u64,
        from: u64,
    },
    CommitTaken {
        id: u64,
        sub: SubNo,
        next: u64,
    },
    Committed {
        id: u64,
        refused: bool,
    },
    /// The ack floor or consumer offset as somebody was shown it.
    Floor {
        sub: SubNo,
        floor: u64,
    },

    /// The shard took a change of a subscription or topic in, which may or may not be applied.
    Admin(Admin),
    /// Everything stands still.
    End(End),
}

/// A producer's state in the broker, in one of its incarnations.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Identity {
    pub key: u64,
    pub epoch: u32,
}

#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    pub sequence: u64,
    /// Of the message's bytes; no two messages are alike.
    pub digest: u64,
    pub delay_ms: u64,
    pub ttl_ms: u64,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    pub sequence: u64,
    pub digest: u64,
    /// None: a duplicate of something too old.
    pub offset: Option<u64>,
    pub is_duplicate: bool,
}

/// A topic as it stands on the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TopicSeen {
    pub topic: TopicNo,
    /// From here on it was read.
    pub from: u64,
    pub first_kept: u64,
    pub next: u64,
    pub messages: Vec<Seen>,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub offset: u64,
    pub sequence: u64,
    pub digest: u64,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    pub sub: SubNo,
    pub session: u64,
    pub offset: u64,
    /// 0 in stream mode.
    pub delivery: u32,
    pub attempt: u32,
    /// None: the body could not be had.
    pub digest: Option<u64>,
    pub at: u64,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Settling {
    pub offset: u64,
    pub delivery: u32,
    pub how: How,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum How {
    Ack,
    Nack { delay_ms: Option<u64> },
    Reject,
    Release { delay_ms: Option<u64> },
    Extend,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Admin {
    Seek { sub: SubNo },
    Redrive { sub: SubNo },
    DeadPurge { sub: SubNo },
    Purge { topic: TopicNo },
}

/// What is left when the faults have stopped and time enough has passed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct End {
    pub topics: Vec<TopicSeen>,
    pub subs: Vec<SubEnd>,
    /// What has not come to rest although it should.
    pub stuck: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SubEnd {
    pub sub: SubNo,
    pub floor: u64,
    pub backlog: u64,
    pub letters: Vec<LetterSeen>,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct LetterSeen {
    /// In the source topic.
    pub offset: u64,
    pub reason: millpond_protocol::control::DeadReason,
    pub failures: u32,
    pub deliveries: u32,
    pub redrives: u32,
}
