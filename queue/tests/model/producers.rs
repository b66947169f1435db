//! Producers and what they publish: one append for each sequence, with its offset for ever.

use millpond_protocol::control::ProducerResume;
use millpond_protocol::hot::AckKind;
use millpond_protocol::message::MessageView;
use millpond_protocol::policy::OnLimit;
use millpond_protocol::{Epoch, ErrorCode, ProducerKey, Sequence, Stamp, TopicId};
use millpond_queue::{Effect, Outcome};

use crate::fold::{Applied, reasons};
use crate::state::*;

impl Model {
    pub fn open_producer(
        &mut self,
        topic: TopicId,
        id: Option<&str>,
        resume: Option<ProducerResume>,
        to: &Applied<'_>,
    ) {
        let known = match (id, resume) {
            (Some(id), _) => {
                let named = |producer: &Producer| {
                    producer.topic == topic && producer.name.as_deref() == Some(id)
                };
                self.producers
                    .iter()
                    .find(|(_, producer)| named(producer))
                    .map(|(key, _)| *key)
            }
            (None, Some(resume)) => self
                .producers
                .contains_key(&resume.producer)
                .then_some(resume.producer),
            (None, None) => None,
        };
        let last = known.map_or(0, |key| self.producers[&key].last);
        let forgotten = resume.is_some_and(|resume| resume.last_known.0 > last);
        let older = |resume: ProducerResume| {
            known.is_some_and(|key| self.producers[&key].epoch > resume.epoch)
        };
        if resume.is_some_and(older) && to.code() == Some(ErrorCode::ProducerFenced) {
            return;
        }
        let lost = id.is_none() && resume.is_some() && known.is_none();
        if lost && to.code() == Some(ErrorCode::ProducerStateExpired) {
            return;
        }
        if !to.accepted(&reasons(&[
            (!self.topics.contains_key(&topic), ErrorCode::UnknownTopic),
            (forgotten, ErrorCode::ProducerStateExpired),
        ])) {
            return;
        }
        let Outcome::ProducerOpened {
            topic: of,
            producer: key,
            epoch,
            last_sequence,
        } = *to.outcome
        else {
            panic!("an opened producer has an epoch: {:?}", to.outcome);
        };
        assert_eq!(
            (of, last_sequence),
            (topic, Sequence(last)),
            "the last accepted sequence"
        );
        match known {
            Some(known) => {
                let old = self.producers[&known].epoch;
                assert_eq!(key, known, "the state that was there goes on");
                assert!(
                    epoch > old,
                    "a new incarnation has a higher epoch: {epoch} after {old}"
                );
                let fenced = Effect::ProducerFenced {
                    producer: key,
                    epoch,
                };
                assert!(
                    to.effects.contains(&fenced),
                    "{fenced:?} is missing in {:?}",
                    to.effects
                );
                self.counts.fenced += 1;
            }
            None => self.fresh_id(3, key.0),
        }
        let producer = self.producers.entry(key).or_insert_with(|| Producer {
            topic,
            name: id.map(str::to_owned),
            epoch,
            last: 0,
            accepted: Vec::new(),
            batches: Vec::new(),
            active: to.stamp,
        });
        producer.epoch = epoch;
        producer.active = to.stamp;
    }

    pub fn publish(
        &mut self,
        topic: TopicId,
        key: ProducerKey,
        epoch: Epoch,
        batch: &Batch,
        to: &Applied<'_>,
    ) {
        let Some(producer) = self
            .producers
            .get(&key)
            .filter(|found| found.topic == topic)
        else {
            to.accepted(&[
                ErrorCode::ProducerStateExpired,
                ErrorCode::UnknownTopic,
                ErrorCode::Deleted,
            ]);
            return;
        };
        if epoch < producer.epoch {
            to.accepted(&[ErrorCode::ProducerFenced]);
            return;
        }
        let last = producer.last;
        let skip = batch
            .messages
            .iter()
            .take_while(|(sequence, _)| *sequence <= last)
            .count();
        let before_rest = match skip {
            0 => batch.previous,
            n => batch.messages[n - 1].0,
        };
        let rest = &batch.messages[skip..];
        if !rest.is_empty() && before_rest != last {
            assert!(!to.accepted(&[ErrorCode::SequenceGap]));
            assert!(
                matches!(*to.outcome, Outcome::PublishRefused { last_accepted, .. } if last_accepted.0 == last)
            );
            self.counts.gaps += 1;
            return;
        }
        if let Some(code) = to.code() {
            assert!(
                !rest.is_empty(),
                "duplicates are answered, not refused: {code:?}"
            );
            assert_eq!(code, ErrorCode::BacklogLimit);
            assert!(
                self.may_be_full(topic, rest),
                "the topic is not at its limit"
            );
            assert!(
                matches!(*to.outcome, Outcome::PublishRefused { last_accepted, .. } if last_accepted.0 == last)
            );
            return;
        }
        assert!(
            rest.is_empty() || !self.is_full(topic),
            "the topic is beyond its limit"
        );
        self.check_rows(key, batch, skip, to);
        self.append(topic, key, rest, to.stamp);
        self.counts.dedup_hits += skip as u64;
    }

    /// I3: one append per (producer, epoch, sequence), answered with the original offset for ever.
    fn check_rows(&self, key: ProducerKey, batch: &Batch, skip: usize, to: &Applied<'_>) {
        let Outcome::Published {
            rows,
            appended,
            last_accepted,
        } = to.outcome
        else {
            panic!("a publish is answered with rows: {:?}", to.outcome);
        };
        let producer = &self.producers[&key];
        let base = self.topics[&producer.topic].next();
        let mut at = 0;
        for row in rows {
            assert!(
                row.count > 0 && at + row.count as usize <= batch.messages.len(),
                "{rows:?}"
            );
            for i in 0..u64::from(row.count) {
                let (sequence, _) = batch.messages[at];
                let found = (row.kind, row.offset.0 + i);
                if at >= skip {
                    // I4: offsets are gapless in append order.
                    assert_eq!(found, (AckKind::Appended, base + (at - skip) as u64));
                } else if let Some(offset) = producer.remembered(sequence) {
                    assert_eq!(
                        found,
                        (AckKind::Duplicate, offset),
                        "of sequence {sequence}"
                    );
                } else if row.kind != AckKind::DuplicateUnknown {
                    let original = producer
                        .accepted
                        .iter()
                        .find(|(known, _)| *known == sequence);
                    assert_eq!(row.kind, AckKind::Duplicate);
                    let original = original.map(|(_, offset)| *offset);
                    assert_eq!(
                        original,
                        Some(found.1),
                        "of sequence {sequence}, long ago or never"
                    );
                }
                at += 1;
            }
            assert_eq!(row.last_sequence.0, batch.messages[at - 1].0);
        }
        assert_eq!(at, batch.messages.len(), "rows cover the batch: {rows:?}");
        let rest = batch.messages.len() - skip;
        let run =
            appended.map(|run| (run.topic, run.base.0, run.count as usize, run.skip as usize));
        let expected = (rest > 0).then_some((producer.topic, base, rest, skip));
        assert_eq!(run, expected, "what was appended");
        let last = batch.messages.last().map_or(0, |(sequence, _)| *sequence);
        assert_eq!(last_accepted.0, producer.last.max(last));
    }

    fn append(&mut self, topic: TopicId, key: ProducerKey, rest: &[(u64, Message)], stamp: Stamp) {
        let producer = self.producers.get_mut(&key).unwrap();
        producer.active = stamp;
        if rest.is_empty() {
            return;
        }
        producer.batches.push(producer.accepted.len());
        for (sequence, message) in rest {
            let offset = self.topics[&topic].next();
            let producer = self.producers.get_mut(&key).unwrap();
            producer.accepted.push((*sequence, offset));
            producer.last = *sequence;
            let body = (topic, offset);
            self.add_message(
                topic,
                Message {
                    published: stamp,
                    body,
                    ..message.clone()
                },
            );
        }
        self.counts.published += rest.len() as u64;
    }

    fn is_full(&self, id: TopicId) -> bool {
        let topic = &self.topics[&id];
        let needed = (topic.first..topic.next()).filter(|offset| self.is_unread(id, *offset));
        let limit = topic.config.max_messages;
        topic.config.on_limit == OnLimit::RefusePublish
            && limit.is_some_and(|limit| needed.count() as u64 >= limit)
    }

    fn may_be_full(&self, id: TopicId, rest: &[(u64, Message)]) -> bool {
        let topic = &self.topics[&id];
        let kept = &topic.messages[topic.first as usize..];
        let bytes: u64 = kept
            .iter()
            .map(|m| m.bytes)
            .chain(rest.iter().map(|(_, m)| m.bytes))
            .sum();
        let count = (kept.len() + rest.len()) as u64;
        topic.config.on_limit == OnLimit::RefusePublish
            && (topic.config.max_messages.is_some_and(|limit| count > limit)
                || topic
                    .config
                    .max_bytes
                    .is_some_and(|limit| bytes > limit / 2))
    }
}

impl Producer {
    /// The offset of a sequence within the last 1,024 batches.
    fn remembered(&self, sequence: u64) -> Option<u64> {
        let batch = self
            .batches
            .len()
            .checked_sub(1_024)
            .map_or(0, |from| self.batches[from]);
        let recent = &self.accepted[batch..];
        recent
            .iter()
            .find(|(known, _)| *known == sequence)
            .map(|(_, offset)| *offset)
    }
}

/// A publish as read back from its bytes.
pub struct Batch {
    pub previous: u64,
    pub messages: Vec<(u64, Message)>,
}

impl Batch {
    pub fn read(previous: Sequence, count: u32, mut bytes: &[u8]) -> Self {
        let mut messages = Vec::new();
        for _ in 0..count {
            let (view, rest) = MessageView::split(bytes).unwrap();
            bytes = rest;
            let message = Message {
                published: Stamp(0),
                bytes: view.bytes().len() as u64,
                delay_ms: u64::from(view.delay_ms()),
                ttl_ms: u64::from(view.ttl_ms()),
                max_attempts: u32::from(view.max_attempts()),
                initial_ms: u64::from(view.backoff_initial_ms()),
                body: (TopicId(0), 0),
                letter: None,
                copy: false,
            };
            messages.push((view.sequence().0, message));
        }
        Self {
            previous: previous.0,
            messages,
        }
    }
}
