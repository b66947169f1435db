//! Reading a snapshot back. Bytes from disk: every chunk may be wrong, none may panic.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use millpond_protocol::{Offset, ProducerKey, SubscriptionId, TopicId};
use serde::Deserialize;

use super::{
    ExtraChunk, FORMAT, FORMAT_MIN, GoneChunk, JobChunk, LeaseChunk, LetterChunk, LettersChunk,
    MetaChunk, ProducerChunk, RowChunk, SessionChunk, SetsChunk, SubscriptionChunk, TopicChunk,
};
use crate::effect::RestoreError;
use crate::limits::Options;
use crate::queue::Queue;
use crate::state::dead_letter::Letter;
use crate::state::dedup::{Producer, SequenceRun};
use crate::state::dirty;
use crate::state::lease::LeaseRun;
use crate::state::redrive::{Job, Pace};
use crate::state::session::{Live, Session};
use crate::state::subscription::Subscription;
use crate::state::topic::{Extra, Row, Topic};

pub(super) type Result<T> = std::result::Result<T, RestoreError>;

impl Queue {
    /// The state that a full snapshot holds: the latest bytes of every chunk, in any order. Sessions
    /// come back with no grace: the `Start` record gives it.
    pub fn restore(options: Options, chunks: impl Iterator<Item = (u64, Bytes)>) -> Result<Self> {
        let chunks: BTreeMap<u64, Bytes> = chunks.collect();
        let meta = chunks.get(&dirty::META).ok_or(RestoreError::NoHeader)?;
        let mut queue = Self::new(options);
        queue.read_meta(meta)?;
        let all = chunks.range(dirty::META + 1..);
        for (id, bytes) in all.filter(|(id, _)| !dirty::is_retries(**id)) {
            queue.read_chunk(*id, bytes)?;
        }
        queue.read_retries(&chunks)?;
        queue.derive()?;
        // The next snapshot builds on this one: it must take away what is gone since.
        queue.dirty.known = Some(chunks.keys().copied().collect());
        Ok(queue)
    }

    fn read_meta(&mut self, bytes: &[u8]) -> Result<()> {
        let (format, _): (u32, _) = postcard::take_from_bytes(bytes)
            .map_err(|_| RestoreError::Chunk { chunk: dirty::META })?;
        if !(FORMAT_MIN..=FORMAT).contains(&format) {
            return Err(RestoreError::Format(format));
        }
        let meta: MetaChunk = decode(dirty::META, bytes)?;
        self.last = meta.last;
        self.recovery_epoch = meta.recovery_epoch;
        self.next_topic = meta.next_topic;
        self.next_subscription = meta.next_subscription;
        self.next_producer = meta.next_producer;
        self.jobs.next = meta.next_job;
        Ok(())
    }

    fn read_chunk(&mut self, id: u64, bytes: &[u8]) -> Result<()> {
        let entity = dirty::entity(id);
        let (topic, sub) = (TopicId(entity), SubscriptionId(entity));
        match (id >> 60, id) {
            (0, dirty::TOKENS) => self.tokens = decode(id, bytes)?,
            (0, _) => self.read_jobs(decode(id, bytes)?),
            (1, _) => self.read_topic(topic, decode(id, bytes)?),
            (2, _) => self.read_rows(topic, decode(id, bytes)?)?,
            (3, _) => self.read_extras(topic, decode(id, bytes)?)?,
            (4, _) => self.read_letters(topic, decode(id, bytes)?)?,
            (5, _) => self.read_subscription(sub, decode(id, bytes)?)?,
            (6, _) => self.read_sets(sub, &decode(id, bytes)?)?,
            (7, _) => self.read_leases(sub, decode(id, bytes)?)?,
            (9, _) => self.read_sessions(sub, decode(id, bytes)?)?,
            (10, _) => {
                let key = ProducerKey(id & ((1 << 60) - 1));
                self.read_producer(key, decode(id, bytes)?);
            }
            (11, _) => self.read_gone(topic, &decode(id, bytes)?)?,
            _ => return Err(RestoreError::Chunk { chunk: id }),
        }
        Ok(())
    }

    fn read_jobs(&mut self, jobs: Vec<JobChunk>) {
        for job in jobs {
            let read = Job {
                topic: job.topic,
                source_topic: job.source_topic.into(),
                subscription: job.subscription.into(),
                filter: job.filter,
                rate_per_s: job.rate_per_s,
                target: job.target,
                next: job.next,
                end: job.end,
                total: job.total,
                done: job.done,
                finished: job.finished,
                cancelled: job.cancelled,
                pace: Pace::default(),
            };
            self.jobs.all.insert(job.key, read);
        }
    }

    fn read_topic(&mut self, id: TopicId, chunk: TopicChunk) {
        let name: Arc<str> = chunk.name.into();
        let mut topic = Topic::new(id, name.clone(), chunk.config, chunk.created_at);
        topic.first = chunk.first;
        topic.next = chunk.next;
        topic.index.total = chunk.total_bytes;
        topic.ttl_floor = chunk.ttl_floor;
        topic.is_dead_letter = chunk.is_dead_letter;
        self.topic_names.insert(name, id);
        self.topics.insert(id, topic);
    }

    fn read_rows(&mut self, id: TopicId, rows: Vec<RowChunk>) -> Result<()> {
        let topic = self.topics.get_mut(&id).ok_or(ORPHAN)?;
        topic.index.rows.extend(rows.into_iter().map(|row| Row {
            first: row.first,
            stamp: row.stamp,
            last: row.last,
            before: row.before,
        }));
        Ok(())
    }

    fn read_extras(&mut self, id: TopicId, extras: Vec<ExtraChunk>) -> Result<()> {
        let topic = self.topics.get_mut(&id).ok_or(ORPHAN)?;
        for read in extras {
            let extra = Extra {
                max_attempts: read.max_attempts,
                backoff_initial_ms: read.backoff_initial_ms,
                expires_at: read.expires_at,
            };
            if extra != Extra::default() {
                topic.extras.insert(read.offset, extra);
            }
            if let Some(at) = read.expires_at.filter(|_| read.lives) {
                topic.lives.insert((at, read.offset));
            }
            if let Some(due) = read.due {
                topic.delays.insert(read.offset, due);
            }
        }
        Ok(())
    }

    fn read_letters(&mut self, id: TopicId, chunk: LettersChunk) -> Result<()> {
        let topic = self.topics.get_mut(&id).ok_or(ORPHAN)?;
        for read in chunk.letters {
            topic.letters.insert(read.offset, letter(read));
        }
        for (offset, source, body) in chunk.aliases {
            topic.aliases.insert(offset, (source, body));
        }
        Ok(())
    }

    fn read_gone(&mut self, id: TopicId, chunk: &GoneChunk) -> Result<()> {
        let topic = self.topics.get_mut(&id).ok_or(ORPHAN)?;
        if topic.gone.set_chunk(chunk.key, &chunk.gone) {
            Ok(())
        } else {
            Err(RestoreError::Contradiction("a set of offsets is none"))
        }
    }

    fn read_subscription(&mut self, id: SubscriptionId, chunk: SubscriptionChunk) -> Result<()> {
        let topic = self.topics.get_mut(&chunk.topic).ok_or(ORPHAN)?;
        let name: Arc<str> = chunk.name.into();
        topic.subscriptions.insert(name.clone(), id);
        if let Some(dead) = chunk.dead_topic {
            let dead = self.topics.get_mut(&dead).ok_or(ORPHAN)?;
            dead.sources.insert(id);
        }
        let sub = Subscription::new(id, chunk.topic, name, chunk.config, chunk.created_at);
        let sub = Subscription {
            dead_topic: chunk.dead_topic,
            paused: chunk.paused,
            start: chunk.start,
            floor: chunk.floor,
            cursor: chunk.cursor,
            delivery_base: chunk.delivery_base,
            delivery_top: chunk.delivery_top,
            age_floor: chunk.age_floor,
            active: chunk.active,
            ..sub
        };
        self.subscriptions.insert(id, sub);
        Ok(())
    }

    fn read_sets(&mut self, id: SubscriptionId, chunk: &SetsChunk) -> Result<()> {
        let sub = self.subscriptions.get_mut(&id).ok_or(ORPHAN)?;
        let good = sub.done.set_chunk(chunk.key, &chunk.done)
            & sub.again.set_chunk(chunk.key, &chunk.again)
            & sub.reopened.set_chunk(chunk.key, &chunk.reopened)
            & sub.parked.set_chunk(chunk.key, &chunk.parked);
        if good {
            Ok(())
        } else {
            Err(RestoreError::Contradiction("a set of offsets is none"))
        }
    }

    fn read_leases(&mut self, id: SubscriptionId, leases: Vec<LeaseChunk>) -> Result<()> {
        let sub = self.subscriptions.get_mut(&id).ok_or(ORPHAN)?;
        let mut edge = 0;
        for lease in leases {
            if lease.first >= lease.end || lease.first < edge {
                return Err(RestoreError::Contradiction("leases overlap"));
            }
            edge = lease.end;
            sub.leases.insert(LeaseRun {
                first: lease.first,
                end: lease.end,
                session: lease.session,
                delivery: lease.delivery,
                begun: None,
            });
        }
        Ok(())
    }

    fn read_sessions(&mut self, id: SubscriptionId, sessions: Vec<SessionChunk>) -> Result<()> {
        let sub = self.subscriptions.get_mut(&id).ok_or(ORPHAN)?;
        for read in sessions {
            sub.sessions.insert(read.id);
            let held = sub.leases.of(read.id);
            let session = Session {
                id: read.id,
                subscription: id,
                token: read.token,
                consumer: read.consumer.into(),
                opened_at: read.opened_at,
                leases: held.iter().map(|run| run.end - run.first).sum(),
                live: Live::default(),
            };
            self.sessions.insert(read.id, session);
        }
        Ok(())
    }

    fn read_producer(&mut self, key: ProducerKey, read: ProducerChunk) {
        let run = |(first, count, offset, batches)| SequenceRun {
            first,
            count,
            offset,
            batches,
        };
        let runs: VecDeque<_> = read.runs.into_iter().map(run).collect();
        let producer = Producer {
            topic: read.topic,
            name: read.name.map(Arc::from),
            owner: read.owner,
            epoch: read.epoch,
            last: read.last,
            used: read.used,
            batches: runs
                .iter()
                .map(|run| run.batches)
                .fold(0, u32::saturating_add),
            runs,
        };
        self.producers.insert(key, producer);
    }

    /// Makes what follows from the chunks.
    fn derive(&mut self) -> Result<()> {
        for (id, topic) in &mut self.topics {
            let rows = topic.index.rows.make_contiguous();
            rows.sort_by_key(|row| row.first);
            let rising = rows.windows(2).all(|pair| pair[0].before <= pair[1].before);
            let within = rows
                .last()
                .is_none_or(|row| row.before <= topic.index.total);
            if topic.first > topic.next || !rising || !within {
                return Err(RestoreError::Contradiction("a topic's index does not rise"));
            }
            topic.trim_proposed = topic.first;
            topic.ttl_proposed = topic.ttl_floor;
            topic
                .delays
                .head()
                .map(|head| self.delay_heads.insert((head, *id)));
            for (offset, letter) in &topic.letters {
                self.pins.pin_body(letter.body);
                self.pins.pin_record(Some(letter.place));
                if let Some(sub) = self.subscriptions.get_mut(&letter.subscription_id) {
                    sub.dead.insert(letter.source_offset.0, (*id, *offset));
                }
            }
            for body in topic.aliases.values() {
                self.pins.pin_body(*body);
            }
        }
        let mut reopened = Vec::new();
        for sub in self.subscriptions.values_mut() {
            let next = self.topics.get(&sub.topic).map_or(0, |topic| topic.next);
            if sub.floor > sub.cursor || sub.cursor > next {
                return Err(RestoreError::Contradiction("a cursor is outside its topic"));
            }
            if sub.leases.count() > sub.backlog(next) {
                return Err(RestoreError::Contradiction(
                    "more is leased than is unfinished",
                ));
            }
            sub.hand.reset(sub.cursor);
            sub.hand.age_proposed = sub.age_floor;
            reopened.extend(
                sub.reopened
                    .iter()
                    .map(|offset| (sub.topic, Offset(offset))),
            );
        }
        for (topic, offset) in reopened {
            let body = self.body_of(topic, offset);
            self.pins.pin_body(body);
        }
        Ok(())
    }
}

pub(super) const ORPHAN: RestoreError = RestoreError::Contradiction("a chunk belongs to nothing");

fn decode<'a, T: Deserialize<'a>>(chunk: u64, bytes: &'a [u8]) -> Result<T> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        _ => Err(RestoreError::Chunk { chunk }),
    }
}

pub(super) fn own((max_attempts, backoff_initial_ms): super::OwnChunk) -> Extra {
    Extra {
        max_attempts,
        backoff_initial_ms,
        expires_at: None,
    }
}

fn letter(read: LetterChunk) -> Letter {
    Letter {
        source: read.source,
        source_offset: read.source_offset,
        source_topic: read.source_topic.into(),
        subscription: read.subscription.into(),
        subscription_id: read.subscription_id,
        body: read.body,
        reason: read.reason,
        place: read.place,
        failures: read.failures,
        deliveries: read.deliveries,
        releases: read.releases,
        redrives: read.redrives,
        first_attempt_at: read.first_attempt_at,
        dead_at: read.dead_at,
        delivery: read.delivery,
        session: read.session,
        answered: read.answered,
        own: own(read.own),
    }
}
