//! Folding on over entries of the log that are damaged and given up.
//!
//! What follows a gap was decided with what is lost, so each group says what the state was when it was begun
//! ([`Mark`]); from that the fold learns which offsets are lost, and messages behind the gap keep
//! theirs. A topic of which no later group tells may have lost as many messages as had room in the gap: so
//! many offsets are left out before its next message, because none may ever be given twice.
//!
//! Invariant: while gaps are open, a topic's `next` is at most what it was when the same record was first applied.
//!
//! It does not bring back what only the lost entries said: settings, subscriptions, settlements.

use std::collections::BTreeMap;
use std::sync::Arc;

use millpond_protocol::control::LostReason;
use millpond_protocol::{
    Epoch, LogIndex, Offset, ProducerKey, Sequence, Stamp, TopicConfig, TopicId,
};

use crate::effect::Outcome;
use crate::queue::{At, Queue};
use crate::record::{Mark, ProducerMark, Record, TopicMark};
use crate::state::dedup::Producer;
use crate::state::dirty;

/// Entries of the log that are given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    pub from: LogIndex,
    pub to: LogIndex,
    /// What they had appended, if that is known.
    pub appended: Option<Vec<LostRun>>,
    /// Else: they had at most so many messages.
    pub messages_max: u64,
}

/// Offsets of a topic whose messages are lost.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct LostRun {
    pub topic: TopicId,
    pub first: Offset,
    pub end: Offset,
}

/// Volatile: a replay from before the gap finds it again.
#[derive(Debug, Default)]
pub(crate) struct Mending {
    /// The gaps passed whose end was not read yet, with the most messages they had.
    open: BTreeMap<(LogIndex, LogIndex), u64>,
    /// Gaps that have ended while others are open, with what their ends say.
    ended: BTreeMap<(LogIndex, LogIndex), u64>,
    /// The gaps in which a topic may have lost messages, while nothing behind them told.
    unsure: BTreeMap<TopicId, Vec<(LogIndex, LogIndex)>>,
}

impl Queue {
    /// These entries are lost; the next record stands behind them.
    pub fn give_up(&mut self, loss: &Loss) {
        let gap = (loss.from, loss.to);
        let unknown = loss.appended.as_ref().map_or(loss.messages_max, |_| 0);
        self.mending.open.insert(gap, unknown);
        match &loss.appended {
            Some(runs) => runs.iter().for_each(|run| {
                self.next_topic = self.next_topic.max(run.topic.0.saturating_add(1));
                self.lose_upto(run.topic, run.end, 0);
            }),
            None => {
                for id in self.topics.keys() {
                    self.mending.unsure.entry(*id).or_default().push(gap);
                }
            }
        }
    }

    /// Whether records are folded that were decided with entries that are lost.
    #[must_use]
    pub fn is_mending(&self) -> bool {
        !self.mending.open.is_empty()
    }

    /// What is to be logged once all records are folded: the losses end there.
    #[must_use]
    pub fn open_losses(&self) -> Vec<Record<'static>> {
        let open = self.mending.open.iter();
        let record = |(&(from, to), &messages_max)| Record::Skip {
            from,
            to,
            messages_max,
        };
        open.map(record).collect()
    }

    /// What a group with these publishes says of the state.
    #[must_use]
    pub fn mark(&self, touched: &[(TopicId, ProducerKey)]) -> Record<'_> {
        let mut topics: Vec<_> = touched.iter().map(|(topic, _)| *topic).collect();
        let mut producers: Vec<_> = touched.iter().map(|(_, producer)| *producer).collect();
        topics.sort_unstable();
        topics.dedup();
        producers.sort_unstable();
        producers.dedup();
        let topics = topics.into_iter().filter_map(|id| self.topics.get(&id));
        let producers = producers.into_iter();
        let producers = producers.filter_map(|key| Some((key, self.producers.get(key)?)));
        Record::Mark(Mark {
            next_topic: self.next_topic,
            next_subscription: self.next_subscription,
            next_producer: self.next_producer,
            topics: topics
                .map(|topic| TopicMark {
                    topic: topic.id,
                    name: &topic.name,
                    first: Offset(topic.first),
                    next: Offset(topic.next),
                    bytes: topic.bytes(),
                })
                .collect(),
            producers: producers
                .map(|(key, producer)| ProducerMark {
                    producer: key,
                    topic: producer.topic,
                    name: producer.name.as_deref(),
                    epoch: producer.epoch,
                    last: producer.last,
                })
                .collect(),
        })
    }

    /// Learns from the mark of the next group what the lost entries had done; tells the offsets that are
    /// lost. To be called before the group's records are applied, while [`is_mending`](Self::is_mending).
    pub fn mend(&mut self, stamp: Stamp, mark: &Mark<'_>) -> Vec<LostRun> {
        for topic in &mark.topics {
            self.mend_topic(stamp, topic);
        }
        self.next_topic = self.next_topic.max(mark.next_topic);
        self.next_subscription = self.next_subscription.max(mark.next_subscription);
        self.next_producer = self.next_producer.max(mark.next_producer);
        self.dirty.mark(dirty::META);
        for producer in &mark.producers {
            self.mend_producer(stamp, producer);
        }
        let mut lost = Vec::new();
        for mark in &mark.topics {
            lost.extend(self.lose_upto(mark.topic, mark.next, mark.bytes));
            self.lose_below(mark.topic, mark.first.0);
        }
        lost
    }

    /// What the topic had let go by then is finished.
    fn lose_below(&mut self, id: TopicId, first: u64) {
        let Some(topic) = self.topics.get(&id).filter(|topic| topic.first < first) else {
            return;
        };
        let subscriptions: Vec<_> = topic.subscriptions.values().copied().collect();
        for sub in subscriptions {
            self.drop_below(sub, first, LostReason::Purged, &mut Vec::new());
        }
        self.trim(id, first);
    }

    /// The offsets before `end` were given to messages that are lost; the topic had so many bytes.
    fn lose_upto(&mut self, id: TopicId, end: Offset, bytes: u64) -> Option<LostRun> {
        let topic = self.topics.get_mut(&id)?;
        self.mending.unsure.remove(&id);
        let count = end.0.checked_sub(topic.next).filter(|count| *count > 0)?;
        let bytes = bytes.saturating_sub(topic.bytes());
        let first = topic.append(count, bytes, self.last, &mut self.dirty);
        self.counters.lost += count;
        self.wake_topic(id);
        Some(LostRun {
            topic: id,
            first: Offset(first),
            end,
        })
    }

    /// Its creation may be lost: it is made again under its name, with the default settings.
    fn mend_topic(&mut self, stamp: Stamp, mark: &TopicMark<'_>) {
        if self.topics.contains_key(&mark.topic) {
            return;
        }
        // Whoever had the name was deleted by a record that is lost.
        if let Some(&old) = self.topic_names.get(mark.name) {
            self.topic_delete(old, &mut Vec::new());
        }
        if self.topic_names.contains_key(mark.name) {
            return;
        }
        let at = At {
            place: Default::default(),
            stamp,
        };
        let next = std::mem::replace(&mut self.next_topic, mark.topic.0);
        self.new_topic(at, mark.name, TopicConfig::default());
        self.next_topic = self.next_topic.max(next);
    }

    fn mend_producer(&mut self, stamp: Stamp, mark: &ProducerMark<'_>) {
        let (key, topic) = (mark.producer, mark.topic);
        if let Some(name) = mark.name
            && let Some(other) = self.producers.by_name(topic, name)
            && other != key
        {
            self.forget_producer(other);
        }
        self.dirty.mark(dirty::producer(key));
        if self
            .producers
            .get(key)
            .is_some_and(|known| known.topic != topic)
        {
            self.forget_producer(key);
        }
        if self.producers.get(key).is_none() {
            let producer = Producer {
                topic,
                name: mark.name.map(Arc::from),
                owner: 0,
                epoch: mark.epoch,
                last: mark.last,
                used: stamp,
                runs: Default::default(),
                batches: 0,
            };
            self.producers.insert(key, producer);
            return;
        }
        self.producers.update(key, stamp, |producer| {
            producer.epoch = Epoch(producer.epoch.0.max(mark.epoch.0));
            producer.last = Sequence(producer.last.0.max(mark.last.0));
        });
    }

    /// A start has folded over these entries; what is logged from here on knows that they are lost.
    pub(crate) fn end_loss(&mut self, from: LogIndex, to: LogIndex, messages_max: u64) -> Outcome {
        if self.mending.open.remove(&(from, to)).is_none() {
            return Outcome::Done;
        }
        self.mending.ended.insert((from, to), messages_max);
        if self.is_mending() {
            return Outcome::Done;
        }
        let Mending { ended, unsure, .. } = std::mem::take(&mut self.mending);
        let entries = ended.keys().map(|(from, to)| to.0 - from.0 + 1);
        let ids = entries.sum::<u64>().saturating_mul(IDS_PER_ENTRY);
        let few = u32::try_from(ids).unwrap_or(u32::MAX).min(IDS_LEFT_OUT_MAX);
        self.next_topic = self.next_topic.saturating_add(few);
        self.next_subscription = self.next_subscription.saturating_add(few);
        self.next_producer = self.next_producer.saturating_add(ids);
        self.dirty.mark(dirty::META);
        for (id, gaps) in unsure {
            let most = gaps.iter().filter_map(|gap| ended.get(gap));
            self.leave_out(id, most.sum());
        }
        Outcome::Done
    }

    /// The topic's next offsets may have been given: they are given to nobody.
    fn leave_out(&mut self, id: TopicId, count: u64) {
        let Some(topic) = self.topics.get_mut(&id) else {
            return;
        };
        if count == 0 {
            return;
        }
        let first = topic.append(count, 0, self.last, &mut self.dirty);
        let end = first + count;
        topic.gone.insert_range(first, end);
        let gone = |at| dirty::gone(id, at);
        self.dirty.mark_span(gone, dirty::SETS_SHIFT, first, end);
        for sub in topic.subscriptions.values() {
            if let Some(sub) = self.subscriptions.get_mut(sub) {
                sub.finish(first, end, &mut self.dirty);
            }
        }
        self.finished.insert(id);
    }
}

/// Records, and so creations, that an entry has at most.
const IDS_PER_ENTRY: u64 = 8_192;
/// Ids of topics and subscriptions are few and 28 bits wide.
const IDS_LEFT_OUT_MAX: u32 = 1 << 16;
