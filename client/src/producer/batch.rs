//! A batch of encoded messages: filled, closed, sent, kept until it is answered.
//!
//! `answered <= count`; the messages before `answered` have their results. What is kept of the bytes
//! begins at the first unanswered message once a batch has been taken back.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use millpond_protocol::limits::{BATCH_BYTES_TARGET, BATCH_MESSAGES_MAX};
use millpond_protocol::{Message, MessageView, Offset, Sequence};

use crate::completion::{Slots, Wakeups};
use crate::error::Error;
use crate::limits::BATCH_CAPACITY_MIN;

/// What became of a run of messages: the first one's offset, if it is known.
pub type Outcome = Result<Accepted, Error>;

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    pub offset: Option<Offset>,
    pub duplicate: bool,
}

/// A batch that still takes messages.
pub struct Filling {
    bytes: BytesMut,
    count: u32,
    first: Sequence,
    last: Sequence,
    slots: Arc<Slots<Outcome>>,
    pub created: Instant,
}

impl Filling {
    /// An empty batch with room for about `capacity` bytes.
    pub fn new(capacity: usize, now: Instant) -> Self {
        let capacity = capacity.clamp(BATCH_CAPACITY_MIN, BATCH_BYTES_TARGET + BATCH_CAPACITY_MIN);
        Self {
            bytes: BytesMut::with_capacity(capacity),
            count: 0,
            first: Sequence(0),
            last: Sequence(0),
            slots: Arc::new(Slots::new()),
            created: now,
        }
    }

    /// Encodes a message behind the others; its slot.
    pub fn push(&mut self, message: &Message, sequence: Sequence) -> (Arc<Slots<Outcome>>, u32) {
        debug_assert!(self.count < BATCH_MESSAGES_MAX);
        if self.count == 0 {
            self.first = sequence;
        }
        message.encode(sequence, &mut self.bytes);
        self.last = sequence;
        self.count += 1;
        (Arc::clone(&self.slots), self.count - 1)
    }

    /// True if a message of this size should go into the next batch.
    pub fn is_full_for(&self, bytes: usize) -> bool {
        self.count > 0 && self.bytes.len() + bytes > BATCH_BYTES_TARGET
    }

    /// True if no further message should be added.
    pub fn is_full(&self) -> bool {
        self.count == BATCH_MESSAGES_MAX || self.bytes.len() >= BATCH_BYTES_TARGET
    }

    pub fn first(&self) -> Sequence {
        self.first
    }

    pub fn bytes_len(&self) -> usize {
        self.bytes.len()
    }

    pub fn close(self) -> Batch {
        Batch {
            bytes: self.bytes.freeze(),
            count: self.count,
            first: self.first,
            last: self.last,
            previous: Sequence(0),
            slots: self.slots,
            slot: 0,
            answered: 0,
            created: self.created,
            in_doubt: false,
            abandoned: false,
            alone: false,
        }
    }
}

/// A closed batch.
pub struct Batch {
    pub bytes: Bytes,
    pub count: u32,
    pub first: Sequence,
    pub last: Sequence,
    /// What it was sent with.
    pub previous: Sequence,
    slots: Arc<Slots<Outcome>>,
    /// The slot of its first message.
    slot: u32,
    pub answered: u32,
    pub created: Instant,
    /// Sent on a stream that broke before the answer.
    pub in_doubt: bool,
    /// Its messages have been given up as `Ambiguous`; only its place among the answers matters.
    pub abandoned: bool,
    /// One of its messages is wrong: send them one by one.
    pub alone: bool,
}

impl Batch {
    pub fn unanswered(&self) -> u32 {
        self.count - self.answered
    }

    /// The next `count` messages have this outcome.
    pub fn answer(&mut self, count: u32, outcome: Outcome, wakeups: &mut Wakeups) {
        assert!(count <= self.unanswered(), "answers match questions");
        if !self.abandoned {
            let slot = self.slot + self.answered;
            self.slots.resolve(slot, count, outcome, wakeups);
        }
        self.answered += count;
    }

    /// Every unanswered message has this outcome.
    pub fn answer_all(&mut self, outcome: Outcome, wakeups: &mut Wakeups) {
        let count = self.unanswered();
        if count > 0 {
            self.answer(count, outcome, wakeups);
        }
    }

    /// Tells users that the outcome is unknown while the answer may still come.
    pub fn abandon(&mut self, wakeups: &mut Wakeups) {
        if !self.abandoned {
            let (slot, count) = (self.slot + self.answered, self.unanswered());
            self.slots
                .resolve(slot, count, Err(Error::Ambiguous), wakeups);
            self.abandoned = true;
        }
    }

    /// Forgets the answered messages, so that the rest can be sent as a batch.
    pub fn trim(self) -> Self {
        let answered = self.answered;
        if answered == 0 {
            return self;
        }
        let (_, rest) = self.split(answered);
        rest
    }

    /// The first `count` messages, and the rest.
    pub fn split(self, count: u32) -> (Self, Self) {
        assert!(count < self.count, "a split leaves messages on both sides");
        let mut cut = 0;
        let mut last = self.first;
        for view in self.views().take(count as usize) {
            cut += view.bytes().len();
            last = view.sequence();
        }
        let mut front = self;
        let bytes = front.bytes.split_off(cut);
        let rest = Self {
            first: first_of(&bytes),
            bytes,
            count: front.count - count,
            slots: Arc::clone(&front.slots),
            slot: front.slot + count,
            answered: front.answered.saturating_sub(count),
            ..front
        };
        front.count = count;
        front.last = last;
        front.answered = front.answered.min(count);
        (front, rest)
    }

    /// One batch for each message.
    pub fn singles(self, out: &mut VecDeque<Self>) {
        let mut rest = self;
        while rest.count > 1 {
            let (mut front, back) = rest.split(1);
            front.alone = false;
            out.push_back(front);
            rest = back;
        }
        rest.alone = false;
        out.push_back(rest);
    }

    /// How many messages from the front fit.
    pub fn fitting(&self, messages: u64, bytes: u64) -> u32 {
        let mut used = 0;
        let mut count = 0;
        for view in self.views() {
            used += view.bytes().len() as u64;
            if u64::from(count) >= messages || used > bytes {
                break;
            }
            count += 1;
        }
        count
    }

    fn views(&self) -> impl Iterator<Item = MessageView<'_>> {
        let mut rest: &[u8] = &self.bytes;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let (view, tail) = MessageView::split(rest).expect("encoded by this client");
            rest = tail;
            Some(view)
        })
    }
}

fn first_of(bytes: &[u8]) -> Sequence {
    MessageView::split(bytes).map_or(Sequence(0), |(view, _)| view.sequence())
}
