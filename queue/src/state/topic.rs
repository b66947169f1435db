//! A topic: its offsets, its sparse index, and what single messages have of their own.
//!
//! Invariants: `first <= next`; index rows rise and the first one covers `first`; `extras` has a
//! message only if it differs from its topic's defaults; every delayed message that is not due yet
//! stands in `delays`; what is in `gone` is finished for every subscription, whenever it came. Bodies
//! are in the log, not here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use millpond_protocol::{Offset, Stamp, SubscriptionId, TopicConfig, TopicId};

use crate::state::dead_letter::Letter;
use crate::state::delays::Delays;
use crate::state::dirty::{self, Dirty};
use crate::state::offset_set::OffsetSet;

/// Messages after which the index gets a new row.
pub const ROW_MESSAGES: u64 = 1_024;
/// Time after which it gets one, in milliseconds: ages are known to this precision.
pub const ROW_MS: u64 = 1_000;

#[derive(Debug)]
pub struct Topic {
    pub id: TopicId,
    pub name: Arc<str>,
    pub config: TopicConfig,
    pub created_at: Stamp,
    pub first: u64,
    pub next: u64,
    pub index: Index,
    pub delays: Delays,
    pub extras: BTreeMap<u64, Extra>,
    /// Ends of life of messages that have their own.
    pub lives: BTreeSet<(Stamp, u64)>,
    /// Messages below it without a life of their own have outlived the topic's time to live.
    pub ttl_floor: u64,
    pub subscriptions: BTreeMap<Arc<str>, SubscriptionId>,
    /// Offsets from `first` on that were let go out of turn: their bodies may be cleaned away. Holes too, where
    /// letters were taken away.
    pub gone: OffsetSet,
    pub letters: BTreeMap<u64, Letter>,
    /// Messages redriven to this topic: where their bodies were published.
    pub aliases: BTreeMap<u64, (TopicId, Offset)>,
    /// Subscriptions whose dead letters come here.
    pub sources: BTreeSet<SubscriptionId>,
    /// Made for dead letters: subscriptions of it have no dead-letter topic of their own.
    pub is_dead_letter: bool,
    /// Volatile: until where expiries have been proposed.
    pub lives_proposed: Option<(Stamp, u64)>,
    pub ttl_proposed: u64,
    pub trim_proposed: u64,
}

/// What a message has of its own.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Extra {
    /// 0: the subscription's.
    pub max_attempts: u16,
    /// 0: the subscription's.
    pub backoff_initial_ms: u32,
    pub expires_at: Option<Stamp>,
}

impl Topic {
    pub fn new(id: TopicId, name: Arc<str>, config: TopicConfig, created_at: Stamp) -> Self {
        Self {
            id,
            name,
            config,
            created_at,
            first: 0,
            next: 0,
            index: Index::default(),
            delays: Delays::default(),
            extras: BTreeMap::new(),
            lives: BTreeSet::new(),
            ttl_floor: 0,
            subscriptions: BTreeMap::new(),
            gone: OffsetSet::default(),
            letters: BTreeMap::new(),
            aliases: BTreeMap::new(),
            sources: BTreeSet::new(),
            is_dead_letter: false,
            lives_proposed: None,
            ttl_proposed: 0,
            trim_proposed: 0,
        }
    }

    /// Assigns the next offsets to `count` messages of `bytes` together.
    pub fn append(&mut self, count: u64, bytes: u64, stamp: Stamp, dirty: &mut Dirty) -> u64 {
        let base = self.next;
        let row = self.index.push(base, bytes, stamp);
        self.next += count;
        dirty.mark(dirty::topic(self.id, 0));
        dirty.mark(dirty::rows(self.id, row));
        base
    }

    pub fn bytes(&self) -> u64 {
        self.bytes_between(self.first, self.next)
    }

    /// Bytes of the messages in `first..end`, as far as the index knows.
    pub fn bytes_between(&self, first: u64, end: u64) -> u64 {
        let upto = |offset| self.index.bytes_before(offset, self.next);
        upto(end).saturating_sub(upto(first))
    }

    /// The average size of a message, at least 1.
    pub fn average_bytes(&self) -> u64 {
        (self.bytes() / (self.next - self.first).max(1)).max(1)
    }

    pub fn is_over(&self, count: u64, bytes: u64) -> bool {
        let over = |limit: Option<u64>, have: u64| limit.is_some_and(|limit| have > limit);
        over(self.config.max_messages, self.next - self.first + count)
            || over(self.config.max_bytes, self.bytes() + bytes)
    }

    pub fn extra(&self, offset: u64) -> Extra {
        self.extras.get(&offset).copied().unwrap_or_default()
    }

    /// From here on messages are to be looked at again for the end of their lives: a subscription
    /// begins or goes back there.
    pub fn reconsider_lives(&mut self, from: u64, dirty: &mut Dirty) {
        self.ttl_floor = self.ttl_floor.min(from);
        self.ttl_proposed = self.ttl_floor;
        self.lives_proposed = None;
        for (offset, extra) in self.extras.range(from..) {
            if let Some(expires_at) = extra.expires_at
                && self.lives.insert((expires_at, *offset))
            {
                dirty.mark(dirty::extras(self.id, *offset));
            }
        }
    }

    pub fn memory_bytes(&self) -> u64 {
        let letters = self.letters.len() * (size_of::<Letter>() + 16);
        let rows = self.index.rows.len() * size_of::<Row>();
        let others = self.extras.len() * 56 + self.lives.len() * 24 + self.aliases.len() * 40;
        let sets = self.delays.memory_bytes() + self.gone.memory_bytes();
        (size_of::<Self>() + letters + rows + others) as u64 + sets
    }

    /// Whether the message's time to live is over, as far as records have said so.
    pub fn is_expired(&self, offset: u64, stamp: Stamp) -> bool {
        match self.extra(offset).expires_at {
            Some(at) => at <= stamp,
            None => offset < self.ttl_floor,
        }
    }
}

/// The sparse index: when and where in the topic's bytes every so many messages begin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    pub rows: VecDeque<Row>,
    /// Bytes ever appended.
    pub total: u64,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub first: u64,
    pub stamp: Stamp,
    /// The stamp of the row's last message: it and all before it are at least this old.
    pub last: Stamp,
    /// Bytes ever appended before the row.
    pub before: u64,
}

impl Index {
    /// Returns where the row begins that has it.
    fn push(&mut self, offset: u64, bytes: u64, stamp: Stamp) -> u64 {
        let before = self.total;
        self.total += bytes;
        if let Some(row) = self.rows.back_mut()
            && offset - row.first < ROW_MESSAGES
            && stamp.ms_since(row.stamp) < ROW_MS
        {
            row.last = stamp;
            return row.first;
        }
        self.rows.push_back(Row {
            first: offset,
            stamp,
            last: stamp,
            before,
        });
        offset
    }

    /// The row that has this offset, and its number.
    fn row(&self, offset: u64) -> Option<(usize, &Row)> {
        let at = self.rows.partition_point(|row| row.first <= offset);
        let at = at.checked_sub(1)?;
        Some((at, self.rows.get(at)?))
    }

    fn bytes_before(&self, offset: u64, next: u64) -> u64 {
        if offset >= next {
            return self.total;
        }
        let Some((at, row)) = self.row(offset) else {
            return self.rows.front().map_or(self.total, |row| row.before);
        };
        let (end, after) = match self.rows.get(at + 1) {
            Some(row) => (row.first, row.before),
            None => (next, self.total),
        };
        let part = u128::from(after - row.before) * u128::from(offset - row.first);
        row.before + (part / u128::from((end - row.first).max(1))) as u64
    }

    /// A time at which the message was surely published.
    pub fn published_by(&self, offset: u64) -> Option<Stamp> {
        self.row(offset).map(|(_, row)| row.last)
    }

    /// The first offset that may be younger than `ms` at `now`.
    pub fn older_end(&self, now: Stamp, ms: u64, next: u64) -> u64 {
        let at = self.rows.partition_point(|row| row.last.plus_ms(ms) <= now);
        self.rows.get(at).map_or(next, |row| row.first)
    }

    /// When the message at `offset` turns `ms` old at the latest.
    pub fn turns(&self, offset: u64, ms: u64) -> Option<Stamp> {
        Some(self.published_by(offset)?.plus_ms(ms))
    }

    /// The first offset with at most `bytes` from it to the end.
    pub fn tail(&self, bytes: u64, next: u64) -> u64 {
        let from = self.total.saturating_sub(bytes);
        let at = self.rows.partition_point(|row| row.before < from);
        let Some(row) = at.checked_sub(1).and_then(|at| self.rows.get(at)) else {
            return self.rows.front().map_or(next, |row| row.first);
        };
        let (end, after) = match self.rows.get(at) {
            Some(row) => (row.first, row.before),
            None => (next, self.total),
        };
        let part = u128::from(from - row.before) * u128::from(end - row.first);
        row.first + part.div_ceil(u128::from((after - row.before).max(1))) as u64
    }

    pub fn drop_below(&mut self, offset: u64) {
        while self.rows.get(1).is_some_and(|row| row.first <= offset) {
            self.rows.pop_front();
        }
    }
}
