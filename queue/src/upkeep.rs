//! What the owner of the log asks when it reclaims space, writes snapshots, and starts.

use millpond_protocol::{LogIndex, Offset, ProducerKey, Sequence, Stamp, TopicId};

use crate::effect::{Outcome, Place};
use crate::queue::Queue;
use crate::record::OffsetRun;
use crate::state::dirty;
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
            return to - from - state.gone.count_between(from, to);
        }
        let kept_for_replay = to - self.replay_end(state).clamp(from, to);
        let of_each = state.subscriptions.values();
        let of_each = of_each.filter_map(|id| self.subscriptions.get(id));
        let wanted: u64 = of_each
            .map(|subscription| subscription.unfinished_between(from, to))
            .sum();
        (wanted + kept_for_replay + pinned).min(to - from + pinned)
    }

    /// Whether all bodies published from `first` to before `end` are let go: nobody will ever be given
    /// them, whatever comes.
    #[must_use]
    pub fn is_let_go(&self, topic: TopicId, first: Offset, end: Offset) -> bool {
        if self.pins.bodies_between(topic, first, end) > 0 {
            return false;
        }
        let Some(state) = self.topics.get(&topic) else {
            return true;
        };
        let from = first.0.max(state.first);
        from >= end.0 || state.gone.next_absent(from) >= end.0
    }

    /// Runs of messages from `first` to before `end` that nobody needs any more and no record has let
    /// go, at most `most`: they are to be let go before their bodies are.
    #[must_use]
    pub fn unneeded_between(
        &self,
        topic: TopicId,
        first: Offset,
        end: Offset,
        most: usize,
    ) -> Vec<OffsetRun> {
        let mut runs = Vec::new();
        let Some(state) = self.topics.get(&topic) else {
            return runs;
        };
        if state.subscriptions.is_empty() {
            return runs;
        }
        let end = end.0.min(self.replay_end(state));
        let mut at = first.0.max(state.first);
        while at < end && runs.len() < most {
            at = state.gone.next_absent(at);
            if at >= end {
                break;
            }
            let needed = self.needed_from(state, at, end);
            if needed > at {
                let stop = needed.min(state.gone.next_present(at).unwrap_or(end));
                let stop = stop.min(at.saturating_add(u64::from(u32::MAX)));
                runs.push(OffsetRun {
                    offset: Offset(at),
                    count: (stop - at) as u32,
                });
                at = stop;
            } else {
                at = self.unneeded_from(state, at, end);
            }
        }
        runs
    }

    /// Lets messages go, except those that somebody has come to need meanwhile.
    pub(crate) fn let_go(&mut self, id: TopicId, ranges: &[OffsetRun]) -> Outcome {
        for range in ranges {
            let (first, end) = (
                range.offset,
                Offset(range.offset.0 + u64::from(range.count)),
            );
            let runs = self.unneeded_between(id, first, end, usize::MAX);
            let Some(topic) = self.topics.get_mut(&id) else {
                break;
            };
            for run in runs {
                let (first, end) = (run.offset.0, run.offset.0 + u64::from(run.count));
                topic.gone.insert_range(first, end);
                let gone = |at| dirty::gone(id, at);
                self.dirty.mark_span(gone, dirty::SETS_SHIFT, first, end);
            }
        }
        Outcome::Done
    }

    /// The first offset from `at` on that somebody needs; `end` if there is none before it.
    fn needed_from(&self, topic: &Topic, at: u64, end: u64) -> u64 {
        let subs = topic.subscriptions.values();
        let subs = subs.filter_map(|id| self.subscriptions.get(id));
        let needed = subs.map(|sub| sub.needed_from(at));
        let pinned = self.pins.next_body(topic.id, Offset(at), Offset(end));
        // References have their bodies elsewhere, where they are pinned.
        let references = [
            topic.letters.range(at..end).next().map(|(at, _)| *at),
            topic.aliases.range(at..end).next().map(|(at, _)| *at),
        ];
        let kept = references.into_iter().flatten();
        let kept = kept.chain(pinned.map(|offset| offset.0));
        needed.chain(kept).fold(end, u64::min)
    }

    /// Somewhere behind `at`, which is needed, and not behind the next offset that is not.
    fn unneeded_from(&self, topic: &Topic, at: u64, end: u64) -> u64 {
        let subs = topic.subscriptions.values();
        let subs = subs.filter_map(|id| self.subscriptions.get(id));
        let over = subs.map(|sub| sub.needed_until(at, end));
        over.fold(at + 1, u64::max)
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
        if from >= to || self.done.next_absent(from) >= to {
            return reopened + parked;
        }
        to - from - self.done.count_between(from, to) + reopened + parked
    }

    /// The first offset from `at` on whose body it needs.
    fn needed_from(&self, at: u64) -> u64 {
        let open = self.done.next_absent(at.max(self.floor));
        let kept = [&self.reopened, &self.parked].map(|set| set.next_present(at));
        kept.into_iter().flatten().fold(open, u64::min)
    }

    /// One past the consecutive offsets from `at` on that it has not finished; `at` if it has.
    fn needed_until(&self, at: u64, end: u64) -> u64 {
        if at < self.floor || self.done.contains(at) {
            return at;
        }
        self.done.next_present(at).unwrap_or(end)
    }
}
