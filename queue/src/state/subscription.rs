//! A subscription: which messages of its topic are finished, leased, waiting.
//!
//! Queue mode. Every offset of the topic is in one place:
//! - below `floor`: finished, unless in `reopened` (redriven);
//! - `floor..cursor`: finished if in `done`; else leased, waiting in `retries`, `again` (a delayed
//!   message that came due, or one whose hand-out was refused), or delayed in the topic;
//! - from `cursor` on: finished if in `done` (expired unread), leased, in `retries` (redriven) or in
//!   `again` (came due before the cursor came by); else never handed out.
//!
//! Invariants: `floor <= cursor <= next` and `done` has nothing below `floor` nor the floor itself.
//! Stream mode uses only `floor`, the committed consumer offset, and `done` for what was let go before
//! the subscription began or went back there, and for where letters were taken away.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use millpond_protocol::control::MessageState;
use millpond_protocol::{
    Offset, SessionId, Stamp, SubscriptionConfig, SubscriptionId, SubscriptionMode, TopicId,
};

use crate::policy::due_by;
use crate::state::dirty::{self, Dirty};
use crate::state::lease::{LeaseRun, Leases};
use crate::state::offset_set::OffsetSet;
use crate::state::redelivery::{Retries, Retry};
use crate::state::topic::Topic;

#[derive(Debug)]
pub struct Subscription {
    pub id: SubscriptionId,
    pub topic: TopicId,
    pub name: Arc<str>,
    pub config: SubscriptionConfig,
    pub created_at: Stamp,
    /// Where its dead letters go; none if its own topic is a dead-letter topic.
    pub dead_topic: Option<TopicId>,
    pub paused: bool,
    /// Below it there is nothing for this subscription.
    pub start: u64,
    pub floor: u64,
    pub cursor: u64,
    /// Delivery numbers of this life begin after it; raised by seek, so that old ones stay old.
    pub delivery_base: u32,
    /// The highest delivery number ever given.
    pub delivery_top: u32,
    /// Messages below it have outlived `max_age`.
    pub age_floor: u64,
    pub done: OffsetSet,
    pub again: OffsetSet,
    pub reopened: OffsetSet,
    /// Dead in a dead-letter topic: finished here, but kept.
    pub parked: OffsetSet,
    pub leases: Leases,
    pub retries: Retries,
    /// Where each dead message of this subscription lies.
    pub dead: BTreeMap<u64, (TopicId, u64)>,
    pub sessions: BTreeSet<SessionId>,
    /// Stream mode: who reads.
    pub active: Option<SessionId>,
    pub hand: Hand,
}

/// Hand-outs that have been proposed and not been applied yet. Volatile.
#[derive(Debug, Default)]
pub struct Hand {
    /// The next never handed out offset to propose; at least the subscription's cursor.
    pub cursor: u64,
    /// Proposals by (first offset, delivery).
    pub overlay: BTreeMap<(u64, u32), Proposed>,
    /// Messages in it.
    pub count: u64,
    /// Proposals in it that moved `cursor`.
    pub fresh: u64,
    /// From the first to before the second there is nothing for the cursor; it will stay so.
    pub skipped: (u64, u64),
    /// The next odd hand-out goes to a new message rather than to a retry.
    pub new_first: bool,
    /// The session served last.
    pub served: SessionId,
    /// Sessions with credit left, as far as is known.
    pub creditors: BTreeSet<SessionId>,
    /// A session that gets nothing until it is empty, so that a suspect can go to it alone.
    pub draining: Option<SessionId>,
    pub age_proposed: u64,
}

#[derive(Copy, Clone, Debug)]
pub struct Proposed {
    pub end: u64,
    pub session: SessionId,
    pub fresh: bool,
}

impl Subscription {
    pub fn new(
        id: SubscriptionId,
        topic: TopicId,
        name: Arc<str>,
        config: SubscriptionConfig,
        created_at: Stamp,
    ) -> Self {
        Self {
            id,
            topic,
            name,
            config,
            created_at,
            dead_topic: None,
            paused: false,
            start: 0,
            floor: 0,
            cursor: 0,
            delivery_base: 0,
            delivery_top: 0,
            age_floor: 0,
            done: OffsetSet::default(),
            again: OffsetSet::default(),
            reopened: OffsetSet::default(),
            parked: OffsetSet::default(),
            leases: Leases::default(),
            retries: Retries::default(),
            dead: BTreeMap::new(),
            sessions: BTreeSet::new(),
            active: None,
            hand: Hand::default(),
        }
    }

    pub fn is_queue(&self) -> bool {
        self.config.mode == SubscriptionMode::Queue
    }

    pub fn is_finished(&self, offset: u64) -> bool {
        if offset < self.floor {
            !self.reopened.contains(offset)
        } else {
            self.done.contains(offset)
        }
    }

    /// Finishes offsets that are not finished yet and nowhere else any more.
    pub fn finish(&mut self, first: u64, end: u64, dirty: &mut Dirty) {
        dirty.mark_sets(self.id, first, end);
        while let Some(offset) = self.again.next_present(first)
            && offset < end
        {
            self.again.remove(offset);
        }
        let below = self.floor.clamp(first, end);
        (first..below).for_each(|offset| {
            self.reopened.remove(offset);
        });
        if below == end {
            return;
        }
        if below == self.floor {
            self.set_floor(end, dirty);
        } else {
            self.done.insert_range(below, end);
        }
    }

    /// Moves the floor up to `to` and over what is done behind it. Everything below is finished.
    pub fn set_floor(&mut self, to: u64, dirty: &mut Dirty) {
        debug_assert!(to >= self.floor);
        dirty.mark(dirty::subscription(self.id, 0));
        self.floor = to;
        if !self.done.is_empty() {
            let from = self.done.next_present(0).unwrap_or(to);
            self.floor = self.done.next_absent(to);
            dirty.mark_sets(self.id, from, self.floor);
            self.done.remove_below(self.floor);
        }
        self.cursor = self.cursor.max(self.floor);
        self.hand.cursor = self.hand.cursor.max(self.cursor);
    }

    /// The earliest offset that must be kept for it.
    pub fn keeps(&self) -> u64 {
        let parked = self.parked.next_present(0);
        parked.map_or(self.floor, |parked| parked.min(self.floor))
    }

    /// Where a message is; `topic` is this subscription's.
    pub fn state_of(&self, offset: u64, topic: &Topic, now: Stamp) -> MessageState {
        if offset >= topic.next || offset < self.start {
            return MessageState::Gone;
        }
        if self.leases.get(offset).is_some() {
            return MessageState::Leased;
        }
        if let Some(retry) = self.retries.get(offset) {
            return match retry.due() {
                Some(due) if due > now => MessageState::Scheduled,
                _ => MessageState::Ready,
            };
        }
        if self.is_finished(offset) {
            return if self.dead.contains_key(&offset) || self.parked.contains(offset) {
                MessageState::Dead
            } else {
                MessageState::Acked
            };
        }
        if topic.delays.contains(offset) {
            MessageState::Scheduled
        } else {
            MessageState::Ready
        }
    }

    /// A hand-out begins behind the cursor: what it leaves out and is ready comes again.
    pub fn pass_over(&mut self, to: u64, topic: &Topic, dirty: &mut Dirty) {
        let mut at = self.cursor;
        while at < to {
            if self.done.contains(at) {
                at = self.done.next_absent(at);
                continue;
            }
            if let Some(run) = self.leases.get(at) {
                at = run.end;
                continue;
            }
            if !topic.delays.contains(at) && !self.retries.contains(at) {
                self.again.insert(at);
                dirty.mark_sets(self.id, at, at + 1);
            }
            at += 1;
        }
    }

    /// Leases a message that is ready although it is not the cursor's next; false if it is not.
    pub fn lease_again(
        &mut self,
        offset: u64,
        session: SessionId,
        delivery: u32,
        now: Stamp,
        dirty: &mut Dirty,
    ) -> bool {
        let base = self.delivery_base;
        let may = |retry: &Retry| {
            let is_due = retry.due().is_some_and(|due| due <= due_by(now));
            is_due && delivery == retry.delivery.max(base) + 1
        };
        match self.retries.lease(offset, session, delivery, may) {
            Some(true) => dirty.mark(dirty::retries(self.id, offset)),
            None if delivery == base + 1 && self.again.remove(offset) => {
                dirty.mark_sets(self.id, offset, offset + 1);
            }
            Some(false) | None => return false,
        }
        self.leases.insert(LeaseRun {
            first: offset,
            end: offset + 1,
            session,
            delivery,
            begun: None,
        });
        true
    }

    /// Makes a message wait as its entry says.
    pub fn wait(&mut self, offset: u64, retry: Box<Retry>, max_attempts: u32, dirty: &mut Dirty) {
        debug_assert!(retry.due().is_some(), "a waiting message has a due time");
        dirty.mark(dirty::retries(self.id, offset));
        self.retries.put(offset, retry, max_attempts);
    }

    pub fn take_retry(&mut self, offset: u64, dirty: &mut Dirty) -> Option<Box<Retry>> {
        let retry = self.retries.take(offset)?;
        dirty.mark(dirty::retries(self.id, offset));
        Some(retry)
    }

    /// Unfinished messages.
    pub fn backlog(&self, next: u64) -> u64 {
        (next - self.floor.min(next) + self.reopened.len()).saturating_sub(self.done.len())
    }

    pub fn memory_bytes(&self) -> u64 {
        let sets = [&self.done, &self.again, &self.reopened, &self.parked];
        let sets: u64 = sets.iter().map(|set| set.memory_bytes()).sum();
        let dead = self.dead.len() as u64 * 40;
        size_of::<Self>() as u64 + sets + dead + self.leases.memory_bytes() + self.retries.bytes()
    }

    pub fn position(&self) -> Offset {
        Offset(self.floor)
    }
}

impl Hand {
    pub fn propose(
        &mut self,
        first: u64,
        end: u64,
        delivery: u32,
        session: SessionId,
        fresh: bool,
    ) {
        self.count += end - first;
        self.fresh += u64::from(fresh);
        let proposed = Proposed {
            end,
            session,
            fresh,
        };
        self.overlay.insert((first, delivery), proposed);
    }

    /// A proposal's record has come to be applied.
    pub fn settle(&mut self, first: u64, delivery: u32) -> Option<Proposed> {
        let proposed = self.overlay.remove(&(first, delivery))?;
        self.count -= proposed.end - first;
        self.fresh -= u64::from(proposed.fresh);
        Some(proposed)
    }

    /// One past the proposal that holds this offset, if one does.
    pub fn proposed_until(&self, offset: u64) -> Option<u64> {
        let (_, proposed) = self.overlay.range(..=(offset, u32::MAX)).next_back()?;
        (offset < proposed.end).then_some(proposed.end)
    }

    /// Forgets all proposals: their records will be refused or find their messages elsewhere.
    pub fn reset(&mut self, cursor: u64) {
        self.cursor = cursor;
        self.skipped = (0, 0);
        self.overlay.clear();
        self.count = 0;
        self.fresh = 0;
    }
}
