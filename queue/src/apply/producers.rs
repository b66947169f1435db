//! Producers and publishes: duplicate or new, fenced or not, which offsets.
//!
//! Dedup changes here, when the log has the message, never before.

use std::collections::VecDeque;
use std::sync::Arc;

use millpond_protocol::control::ProducerResume;
use millpond_protocol::hot::{AckKind, AckRow};
use millpond_protocol::message::MessageView;
use millpond_protocol::policy::OnLimit;
use millpond_protocol::{
    Epoch, ErrorCode, Offset, ProducerKey, Sequence, Stamp, TopicId, WireError,
};

use super::unknown_topic;
use crate::dispatch::timers::Timer;
use crate::effect::{AppendedRun, Effect, Outcome};
use crate::limits::PRODUCER_IDLE_MS;
use crate::planted::{self, Bug};
use crate::queue::{At, Queue};
use crate::state::dedup::Producer;
use crate::state::dirty;
use crate::state::topic::Extra;

/// What one walk over a batch tells.
#[derive(Debug, Default)]
struct Batch {
    /// Messages at or below the last accepted sequence, at the beginning.
    duplicates: u32,
    /// The sequence before the first new one.
    before_new: Sequence,
    last: Sequence,
    new_bytes: u64,
    /// The new sequences are consecutive.
    is_dense: bool,
    /// A new message has a delay, a life or another policy of its own.
    has_extras: bool,
}

impl Queue {
    pub(crate) fn open_producer(
        &mut self,
        at: At,
        topic: TopicId,
        name: Option<&str>,
        resume: Option<ProducerResume>,
        owner: u64,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        if !self.topics.contains_key(&topic) {
            return unknown_topic();
        }
        let key = match name {
            Some(name) => self.producers.by_name(topic, name),
            None => resume.map(|resume| resume.producer),
        };
        let known = key.and_then(|key| Some((key, self.producers.get(key)?)));
        let known = known.filter(|(_, producer)| producer.topic == topic);
        let known = known.map(|(key, producer)| (key, producer.epoch, producer.last));
        let last_known = resume.map_or(Sequence(0), |resume| resume.last_known);
        if last_known > known.map_or(Sequence(0), |(_, _, last)| last) {
            return Outcome::error(
                ErrorCode::ProducerStateExpired,
                "the broker has forgotten sequences that this producer knows to be accepted; \
                 open it anew without resuming",
            );
        }
        let Some((key, epoch, last)) = known else {
            let key = self.new_producer(at.stamp, topic, name, owner);
            return Outcome::ProducerOpened {
                topic,
                producer: key,
                epoch: Epoch(1),
                last_sequence: Sequence(0),
            };
        };
        // Whoever comes back as an older incarnation must not fence its successor.
        if resume.is_some_and(|resume| resume.producer == key && resume.epoch < epoch) {
            return Outcome::Error(fenced());
        }
        let epoch = epoch.next();
        self.producers
            .update(key, at.stamp, |producer| producer.epoch = epoch);
        self.dirty.mark(dirty::producer(key));
        out.push(Effect::ProducerFenced {
            producer: key,
            epoch,
        });
        Outcome::ProducerOpened {
            topic,
            producer: key,
            epoch,
            last_sequence: last,
        }
    }

    fn new_producer(
        &mut self,
        stamp: Stamp,
        topic: TopicId,
        name: Option<&str>,
        owner: u64,
    ) -> ProducerKey {
        let key = ProducerKey(self.next_producer);
        self.next_producer += 1;
        let producer = Producer {
            topic,
            name: name.map(Arc::from),
            owner,
            epoch: Epoch(1),
            last: Sequence(0),
            used: stamp,
            runs: VecDeque::new(),
            batches: 0,
        };
        self.producers.insert(key, producer);
        self.dirty.mark(dirty::META);
        self.dirty.mark(dirty::producer(key));
        self.bound_producers(key);
        self.work
            .timers
            .arm(Timer::Producers, stamp.plus_ms(PRODUCER_IDLE_MS));
        key
    }

    /// Forgets the idlest producers while the table is over its bound.
    fn bound_producers(&mut self, keep: ProducerKey) {
        while self.producers.bytes() > self.options.dedup_bytes_max {
            match self.producers.idlest() {
                Some((_, key)) if key != keep => self.forget_producer(key),
                _ => return,
            }
        }
    }

    pub(crate) fn forget_producer(&mut self, key: ProducerKey) {
        if self.producers.remove(key).is_some() {
            self.dirty.mark(dirty::producer(key));
        }
    }

    pub(crate) fn close_producer(&mut self, key: ProducerKey, epoch: Epoch) -> Outcome {
        let known = self.producers.get(key);
        if known.is_some_and(|producer| producer.name.is_none() && producer.epoch == epoch) {
            self.forget_producer(key);
        }
        Outcome::Done
    }

    pub(crate) fn publish(
        &mut self,
        at: At,
        (topic, key, epoch): (TopicId, ProducerKey, Epoch),
        previous: Sequence,
        count: u32,
        messages: &[u8],
    ) -> Outcome {
        let Some(producer) = self.producers.get(key) else {
            let error = WireError::new(
                ErrorCode::ProducerStateExpired,
                "the broker has forgotten this producer; open it anew",
            );
            return refused(Sequence(0), error);
        };
        let last = match planted::is(Bug::DuplicateAppended) {
            true => previous,
            false => producer.last,
        };
        if producer.topic != topic || !self.topics.contains_key(&topic) {
            let error = WireError::new(ErrorCode::UnknownTopic, "the topic does not exist");
            return refused(last, error);
        }
        if producer.epoch != epoch {
            self.counters.producers_fenced += 1;
            return refused(last, fenced());
        }
        let Some(batch) = read_batch(last, previous, count, messages) else {
            let error = WireError::new(
                ErrorCode::Malformed,
                "the batch is cut, or its sequences do not rise",
            );
            return refused(last, error);
        };
        let new = count - batch.duplicates;
        let is_gap = batch.before_new != last && !planted::is(Bug::SequenceGapAccepted);
        if new > 0 && is_gap {
            self.counters.sequence_gaps += 1;
            let sentence = format!(
                "messages before this batch are missing: it follows {}, the last accepted is {last}",
                batch.before_new
            );
            return refused(last, WireError::new(ErrorCode::SequenceGap, sentence));
        }
        if new > 0 && !self.has_room(topic, new, batch.new_bytes) {
            let sentence = "the topic has reached its limit; wait until consumers catch up";
            let error = WireError::new(ErrorCode::BacklogLimit, sentence).retry_after(100);
            return refused(last, error);
        }
        self.accept(at, topic, key, count, &batch, messages)
    }

    /// Whether the topic takes these messages; makes room from finished ones first.
    fn has_room(&mut self, id: TopicId, count: u32, bytes: u64) -> bool {
        let count = u64::from(count);
        let over = |queue: &Self| {
            queue
                .topics
                .get(&id)
                .is_none_or(|t| t.is_over(count, bytes))
        };
        if !over(self) {
            return true;
        }
        self.trim_to_kept(id);
        if !over(self) {
            return true;
        }
        let topic = self.topics.get(&id);
        topic.is_some_and(|topic| topic.config.on_limit != OnLimit::RefusePublish)
    }

    fn accept(
        &mut self,
        at: At,
        id: TopicId,
        key: ProducerKey,
        count: u32,
        batch: &Batch,
        messages: &[u8],
    ) -> Outcome {
        let mut rows = Vec::with_capacity(1);
        if batch.duplicates > 0 {
            self.counters.dedup_hits += u64::from(batch.duplicates);
            let producer = self.producers.get(key);
            for view in views(messages).take(batch.duplicates as usize) {
                if let Some(producer) = producer {
                    producer.answer(view.sequence(), &mut rows);
                }
            }
        }
        let new = count - batch.duplicates;
        let last_accepted = self
            .producers
            .get(key)
            .map_or(batch.last, |p| p.last.max(batch.last));
        if new == 0 {
            self.producers.update(key, at.stamp, |_| ());
            self.dirty.mark(dirty::producer(key));
            return Outcome::Published {
                rows,
                appended: None,
                last_accepted,
            };
        }
        let base = self.append(at, id, new, batch, messages);
        self.remember(at, key, base, new, batch, messages);
        self.counters.published += u64::from(new);
        rows.push(AckRow {
            last_sequence: batch.last,
            offset: Offset(base + u64::from(planted::is(Bug::OffsetOffByOne))),
            count: new,
            kind: AckKind::Appended,
        });
        Outcome::Published {
            rows,
            appended: Some(AppendedRun {
                topic: id,
                base: Offset(base),
                count: new,
                skip: batch.duplicates,
            }),
            last_accepted,
        }
    }

    fn append(&mut self, at: At, id: TopicId, new: u32, batch: &Batch, messages: &[u8]) -> u64 {
        let Some(topic) = self.topics.get_mut(&id) else {
            return 0;
        };
        let base = topic.append(u64::from(new), batch.new_bytes, at.stamp, &mut self.dirty);
        let limited = topic.is_over(0, 0);
        if batch.has_extras {
            for (view, offset) in views(messages).skip(batch.duplicates as usize).zip(base..) {
                self.keep_extras(at.stamp, id, offset, view);
            }
        }
        if limited {
            self.work.timers.arm(Timer::Topic(id), at.stamp);
        }
        self.arm_ages(id, at.stamp);
        self.wake_topic(id);
        base
    }

    fn keep_extras(&mut self, stamp: Stamp, id: TopicId, offset: u64, view: MessageView<'_>) {
        let Some(topic) = self.topics.get_mut(&id) else {
            return;
        };
        let life = u64::from(view.ttl_ms());
        let expires_at = (life > 0).then(|| stamp.plus_ms(life));
        let extra = Extra {
            max_attempts: view.max_attempts(),
            backoff_initial_ms: view.backoff_initial_ms(),
            expires_at,
        };
        if extra != Extra::default() {
            topic.extras.insert(offset, extra);
            self.dirty.mark(dirty::extras(id, offset));
        }
        if let Some(expires_at) = expires_at {
            topic.lives.insert((expires_at, offset));
            self.work.timers.arm(Timer::Topic(id), expires_at);
        }
        if view.delay_ms() > 0 {
            let due = stamp.plus_ms(u64::from(view.delay_ms()));
            let head = topic.delays.head();
            topic.delays.insert(offset, due);
            if head.is_none_or(|head| due < head) {
                if let Some(head) = head {
                    self.delay_heads.remove(&(head, id));
                }
                self.delay_heads.insert((due, id));
            }
            self.dirty.mark(dirty::extras(id, offset));
            self.work.timers.arm(Timer::Topic(id), due);
        }
    }

    fn remember(
        &mut self,
        at: At,
        key: ProducerKey,
        base: u64,
        new: u32,
        batch: &Batch,
        messages: &[u8],
    ) {
        self.dirty.mark(dirty::producer(key));
        self.producers.update(key, at.stamp, |producer| {
            producer.last = batch.last;
            if batch.is_dense {
                let first = batch.last.0 + 1 - u64::from(new);
                producer.remember(first, u64::from(new), base, 1);
                return;
            }
            let fresh = views(messages).skip(batch.duplicates as usize);
            for (view, offset) in fresh.zip(base..) {
                let ends = u32::from(view.sequence() == batch.last);
                producer.remember(view.sequence().0, 1, offset, ends);
            }
        });
        self.bound_producers(key);
    }
}

fn refused(last_accepted: Sequence, error: WireError) -> Outcome {
    Outcome::PublishRefused {
        last_accepted,
        error,
    }
}

fn fenced() -> WireError {
    WireError::new(
        ErrorCode::ProducerFenced,
        "a newer incarnation of this producer exists; this one is over",
    )
}

/// The messages of a batch that was read before.
fn views(messages: &[u8]) -> impl Iterator<Item = MessageView<'_>> {
    let mut rest = messages;
    std::iter::from_fn(move || {
        let (view, after) = MessageView::split(rest).ok()?;
        rest = after;
        Some(view)
    })
}

/// Walks the batch once; none if it is malformed.
fn read_batch(last: Sequence, previous: Sequence, count: u32, messages: &[u8]) -> Option<Batch> {
    let mut batch = Batch {
        before_new: previous,
        last: previous,
        is_dense: true,
        ..Batch::default()
    };
    let mut rest = messages;
    for _ in 0..count {
        let (view, after) = MessageView::split(rest).ok()?;
        rest = after;
        let sequence = view.sequence();
        if sequence <= batch.last {
            return None;
        }
        if sequence <= last {
            batch.duplicates += 1;
            batch.before_new = sequence;
        } else {
            let is_first = batch.new_bytes == 0;
            batch.is_dense &= is_first || sequence.0 == batch.last.0 + 1;
            batch.new_bytes += view.bytes().len() as u64;
            batch.has_extras |= view.delay_ms() > 0
                || view.ttl_ms() > 0
                || view.max_attempts() > 0
                || view.backoff_initial_ms() > 0;
        }
        batch.last = sequence;
    }
    (rest.is_empty() && count > 0).then_some(batch)
}
