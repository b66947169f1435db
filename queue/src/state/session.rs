//! A consumer's stay: who it is, and, volatile, what it may still be sent and when it is over.
//!
//! Invariant: `begun <= handed` within one attachment; `sent` has hand-outs by rising ordinal.

use std::collections::VecDeque;
use std::sync::Arc;

use millpond_protocol::hot::Credit;
use millpond_protocol::{SessionId, Stamp, SubscriptionId};

use crate::record::LeaseRange;

#[derive(Debug)]
pub struct Session {
    pub id: SessionId,
    pub subscription: SubscriptionId,
    pub token: u64,
    pub consumer: Arc<str>,
    pub opened_at: Stamp,
    /// Leases that it holds.
    pub leases: u64,
    pub live: Live,
}

/// What is lost at a restart.
#[derive(Debug, Default)]
pub struct Live {
    pub attached: bool,
    /// Its end has been proposed.
    pub ending: bool,
    /// When it is lost unless it shows a sign of life.
    pub deadline: Stamp,
    pub credit: Credit,
    /// Messages handed out in this attachment, in all.
    pub handed: u64,
    /// Of those, what has really been sent: messages and bytes.
    pub sent_messages: u64,
    pub sent_bytes: u64,
    pub begun: u64,
    /// Hand-outs that are not begun yet, oldest first.
    pub sent: VecDeque<Sent>,
    /// Processing clocks, oldest first; some may be of leases that are over.
    pub clocks: VecDeque<Clock>,
    /// Begun before their lease was applied.
    pub early: Vec<Clock>,
    /// Messages in proposals that are not applied yet.
    pub proposed: u64,
    /// The message that it has been given alone.
    pub alone: Option<u64>,
    /// What it held was called back, and it has begun nothing since.
    pub stuck: bool,
    /// Stream mode: the next offset to be sent.
    pub read: u64,
}

#[derive(Copy, Clone, Debug)]
pub struct Sent {
    /// The number of its first message among all handed out in this attachment.
    pub ordinal: u64,
    pub first: u64,
    pub count: u64,
    pub delivery: u32,
    pub at: Stamp,
}

#[derive(Copy, Clone, Debug)]
pub struct Clock {
    pub at: Stamp,
    pub first: u64,
    pub end: u64,
    pub delivery: u32,
}

impl Live {
    /// Takes a hand-out back that the consumer never sees: those behind it are counted as if it had not been.
    pub fn drop_unsent(&mut self, range: &LeaseRange) {
        let (first, count) = (range.offset.0, u64::from(range.count));
        self.handed = self.handed.saturating_sub(count);
        let holds = |sent: &Sent| {
            sent.delivery == range.delivery.0
                && sent.first <= first
                && first + count <= sent.first + sent.count
        };
        // What is not there was called back, and was older than all that is.
        let at = self.sent.iter().position(holds);
        for sent in self.sent.iter_mut().skip(at.map_or(0, |at| at + 1)) {
            sent.ordinal = sent.ordinal.saturating_sub(count);
        }
        let Some(at) = at else { return };
        let sent = self.sent[at];
        let before = first - sent.first;
        let behind = sent.count - before - count;
        let parts = [
            Sent {
                count: before,
                ..sent
            },
            Sent {
                ordinal: sent.ordinal + before,
                first: first + count,
                count: behind,
                ..sent
            },
        ];
        self.sent.remove(at);
        for part in parts.into_iter().rev().filter(|part| part.count > 0) {
            self.sent.insert(at, part);
        }
    }
}

impl Session {
    /// Messages that may be handed out to it, by count and by bytes at this average size.
    pub fn room(&self, average_bytes: u64) -> u64 {
        let live = &self.live;
        if !live.attached || live.ending {
            return 0;
        }
        let messages = live.credit.max_messages.saturating_sub(live.handed);
        let unsent = live.handed.saturating_sub(live.sent_messages);
        let bytes = live
            .sent_bytes
            .saturating_add(unsent.saturating_mul(average_bytes));
        match live.credit.max_bytes.saturating_sub(bytes) {
            0 => 0,
            // One message may be larger than all credit and must still come through.
            left => messages.min((left / average_bytes).max(1)),
        }
    }

    pub fn memory_bytes(&self) -> u64 {
        let sent = self.live.sent.len() * size_of::<Sent>();
        let clocks = self.live.clocks.len() * size_of::<Clock>();
        (size_of::<Self>() + self.consumer.len() + sent + clocks) as u64
    }

    /// Whether nothing is leased to it, applied or proposed.
    pub fn is_empty(&self) -> bool {
        self.leases == 0 && self.live.proposed == 0
    }

    /// A new attachment begins.
    pub fn attach(&mut self, deadline: Stamp, read: u64) {
        self.live = Live {
            attached: true,
            deadline,
            read,
            proposed: self.live.proposed,
            alone: self.live.alone,
            clocks: std::mem::take(&mut self.live.clocks),
            ..Live::default()
        };
    }

    /// When time alone does something to it.
    pub fn next_deadline(&self, processing_ms: u64, hold_ms: u64) -> Stamp {
        let clock = self.live.clocks.front();
        let clock = clock.map(|clock| clock.at.plus_ms(processing_ms));
        let hold = self.live.sent.front().map(|sent| sent.at.plus_ms(hold_ms));
        let first = clock.into_iter().chain(hold).min();
        first.map_or(self.live.deadline, |at| at.min(self.live.deadline))
    }
}
