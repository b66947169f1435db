//! What the owner of the log asks when it reclaims space, writes snapshots, and starts.

use millpond_protocol::{LogIndex, Offset, ProducerKey, Sequence, Stamp, TopicId};

use crate::effect::Place;
use crate::queue::Queue;
use crate::state::subscription::Subscription;
use crate::state::topic::Topic;

impl Queue {
    /// The stamp of the last record applied; the next must be later.
    #[must_use]
    pub fn last_stamp(&self) -> Stamp {
        self.last
    }

    /// The last accepted sequence of a producer; 0: none, or the producer is not known.
    #[must_use]
    pub fn last_accepted(&self, producer: ProducerKey) -> Sequence {
        self.producers
            .get(producer)
            .map_or(Sequence(0), |found| found.last)
    }

    /// How many of the bodies published from `first` to before `end` may still be read by somebody:
    /// exactly 0 if none, else at most about that many.
    #[must_use]
    pub fn live_between(&self, topic: TopicId, first: Offset, end: Offset) -> u64 {
        let pinned = self.pins.bodies_between(topic, first, end);
        let Some(state) = self.topics.get(&topic) else {
            return pinned;
        };
        let (from, to) = (first.0.max(state.first), end.0.min(state.next));
        if from >= to {
            return pinned;
        }
        if state.subscriptions.is_empty() {
            return to - from;
        }
        let kept_for_replay = to - self.replay_end(state).clamp(from, to);
        let of_each = state.subscriptions.values();
        let of_each = of_each.filter_map(|id| self.subscriptions.get(id));
        let wanted: u64 = of_each
            .map(|subscription| subscription.unfinished_between(from, to))
            .sum();
        (wanted + kept_for_replay + pinned).min(to - from + pinned)
    }

    /// Records in the entries `first..=last` by which a dead letter or a waiting retry tells its story.
    pub fn pins_between(&self, first: LogIndex, last: LogIndex) -> impl Iterator<Item = Place> {
        self.pins.records_between(first, last)
    }

    /// Leases that somebody holds, over all subscriptions.
    #[must_use]
    pub fn leases_held(&self) -> u64 {
        let each = self.subscriptions.values();
        each.map(|subscription| subscription.leases.count()).sum()
    }

    /// Whether any message of the topic is a reference to a body elsewhere.
    #[must_use]
    pub fn has_references(&self, topic: TopicId) -> bool {
        let state = self.topics.get(&topic);
        state.is_some_and(|topic| !topic.letters.is_empty() || !topic.aliases.is_empty())
    }

    /// These chunks of an earlier snapshot were not kept: the next one has them again.
    pub fn snapshot_lost(&mut self, chunks: &[u64]) {
        self.dirty.again(chunks);
    }

    /// Below it a message is not kept for replay any more, only for who has not finished it.
    fn replay_end(&self, topic: &Topic) -> u64 {
        match topic.config.retention_ms {
            0 => topic.next,
            ms => topic.index.older_end(self.last, ms, topic.next),
        }
    }
}

impl Subscription {
    /// How many of these offsets it has not finished: exactly 0 if none, else at most so many.
    fn unfinished_between(&self, from: u64, to: u64) -> u64 {
        let reopened = match self.reopened.next_present(from) {
            Some(offset) if offset < to => self.reopened.len(),
            _ => 0,
        };
        let parked = match self.parked.next_present(from) {
            Some(offset) if offset < to => self.parked.len(),
            _ => 0,
        };
        let from = from.max(self.floor);
        if from >= to || (self.is_queue() && self.done.next_absent(from) >= to) {
            return reopened + parked;
        }
        let open = if self.is_queue() {
            to - from - self.done.count_between(from, to)
        } else {
            to - from
        };
        open + reopened + parked
    }
}
