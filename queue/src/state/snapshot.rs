//! The folded state as chunks: written by what changed, read back as a whole.
//!
//! A chunk's bytes depend on the state alone, so that equal states have equal snapshots. What follows
//! from other chunks (pins, indexes by name, counts) and what is volatile is not written.

mod read;
pub(in crate::state) mod retries;

use std::collections::BTreeSet;

use bytes::Bytes;
use millpond_protocol::control::{DeadFilter, DeadReason, RedriveTarget};
use millpond_protocol::{
    Epoch, Offset, ProducerKey, Sequence, SessionId, Stamp, SubscriptionConfig, SubscriptionId,
    TopicConfig, TopicId,
};
use serde::{Deserialize, Serialize};

use crate::effect::{Place, SnapshotDelta};
use crate::planted::{self, Bug};
use crate::queue::Queue;
use crate::state::dirty::{self, ENTRIES_SHIFT, ROWS_SHIFT, SETS_SHIFT, Telling};
use crate::state::offset_set::OffsetSet;
use crate::state::redelivery::{Answer, Retries};
use crate::state::topic::Topic;

/// The format that this version writes. The one before had retries otherwise, see `retries/format_1.rs`.
pub const FORMAT: u32 = 2;

/// The oldest format that this version reads.
const FORMAT_MIN: u32 = 1;

#[derive(Serialize, Deserialize)]
struct MetaChunk {
    format: u32,
    last: Stamp,
    recovery_epoch: u32,
    next_topic: u32,
    next_subscription: u32,
    next_producer: u64,
    next_job: u64,
}

#[derive(Serialize, Deserialize)]
struct JobChunk {
    key: u64,
    topic: TopicId,
    source_topic: String,
    subscription: String,
    filter: DeadFilter,
    rate_per_s: Option<u32>,
    target: RedriveTarget,
    next: u64,
    end: u64,
    total: u64,
    done: u64,
    finished: bool,
    cancelled: bool,
}

#[derive(Serialize, Deserialize)]
struct TopicChunk {
    name: String,
    config: TopicConfig,
    created_at: Stamp,
    first: u64,
    next: u64,
    total_bytes: u64,
    ttl_floor: u64,
    is_dead_letter: bool,
}

/// Bytes of the largest chunk of rows: each message of its span was published more than a row's time after the
/// one before. No other chunk is larger.
pub const ROWS_CHUNK_BYTES_MAX: usize = (ROW_CHUNK_BYTES_MAX << ROWS_SHIFT) + VARINT_BYTES_MAX;
const ROW_CHUNK_BYTES_MAX: usize = 4 * VARINT_BYTES_MAX;
const VARINT_BYTES_MAX: usize = 10;

#[derive(Serialize, Deserialize)]
struct RowChunk {
    first: u64,
    stamp: Stamp,
    last: Stamp,
    before: u64,
}

#[derive(Serialize, Deserialize)]
struct ExtraChunk {
    offset: u64,
    max_attempts: u16,
    backoff_initial_ms: u32,
    expires_at: Option<Stamp>,
    /// Its end of life is still to come.
    lives: bool,
    due: Option<Stamp>,
}

#[derive(Serialize, Deserialize)]
struct LettersChunk {
    letters: Vec<LetterChunk>,
    aliases: Vec<(u64, TopicId, Offset)>,
}

#[derive(Serialize, Deserialize)]
struct LetterChunk {
    offset: u64,
    source: TopicId,
    source_offset: Offset,
    source_topic: String,
    subscription: String,
    subscription_id: SubscriptionId,
    body: (TopicId, Offset),
    reason: DeadReason,
    place: Place,
    failures: u32,
    deliveries: u32,
    releases: u32,
    redrives: u32,
    first_attempt_at: Option<Stamp>,
    dead_at: Stamp,
    delivery: u32,
    session: SessionId,
    answered: Option<Answer>,
    own: OwnChunk,
}

/// `max_attempts` and `backoff_initial_ms` of a message.
type OwnChunk = (u16, u32);

#[derive(Serialize, Deserialize)]
struct SubscriptionChunk {
    topic: TopicId,
    name: String,
    config: SubscriptionConfig,
    created_at: Stamp,
    dead_topic: Option<TopicId>,
    paused: bool,
    start: u64,
    floor: u64,
    cursor: u64,
    delivery_base: u32,
    delivery_top: u32,
    age_floor: u64,
    active: Option<SessionId>,
}

#[derive(Serialize, Deserialize)]
struct SetsChunk {
    key: u64,
    done: Vec<u8>,
    again: Vec<u8>,
    reopened: Vec<u8>,
    parked: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct GoneChunk {
    key: u64,
    gone: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct LeaseChunk {
    first: u64,
    end: u64,
    session: SessionId,
    delivery: u32,
}

#[derive(Serialize, Deserialize)]
struct SessionChunk {
    id: SessionId,
    token: u64,
    consumer: String,
    opened_at: Stamp,
}

#[derive(Serialize, Deserialize)]
struct ProducerChunk {
    topic: TopicId,
    name: Option<String>,
    owner: u64,
    epoch: Epoch,
    last: Sequence,
    used: Stamp,
    runs: Vec<(u64, u64, u64, u32)>,
}

impl Queue {
    /// Chunks that changed since the last snapshot; all of them the first time.
    pub fn snapshot(&mut self) -> SnapshotDelta {
        self.begin_snapshot();
        let delta = self.tell_snapshot(usize::MAX);
        delta.expect("all of a snapshot that was begun is told at once")
    }

    /// Begins a snapshot of the state as it stands, which [`tell_snapshot`](Self::tell_snapshot) returns. Panics while
    /// another is not told to its end.
    pub fn begin_snapshot(&mut self) {
        assert!(self.dirty.telling.is_none(), "one snapshot at a time");
        let mut known = self.dirty.known.take();
        let mut dirty = self.dirty.take();
        if known.is_none() {
            dirty = self.all_chunks();
        }
        dirty.insert(dirty::META);
        let mut telling = Telling::default();
        let known_now = known.get_or_insert_with(BTreeSet::new);
        for id in dirty {
            let is_there = if dirty::is_retries(id) {
                self.hold_shelf(id, &mut telling)
            } else if let Some(bytes) = self.chunk(id) {
                telling.delta.dirty.push((id, bytes));
                true
            } else {
                false
            };
            if is_there {
                known_now.insert(id);
            } else if known_now.remove(&id) {
                telling.delta.removed.push(id);
            }
        }
        self.dirty.known = known;
        self.dirty.telling = Some(telling);
    }

    /// Goes on with the snapshot that was begun, by so many shelves of retries at most, 512 offsets each, which are
    /// the most of a large state. `None`: it is not told to its end.
    pub fn tell_snapshot(&mut self, mut most: usize) -> Option<SnapshotDelta> {
        let telling = self.dirty.telling.as_mut()?;
        while let Some(&id) = telling.subscriptions.first() {
            // What was told of one that is gone was taken when it went.
            if let Some(sub) = self.subscriptions.get_mut(&id) {
                most -= sub.retries.tell(most);
                telling.add(id, sub.retries.take_told());
                if sub.retries.holds() {
                    return None;
                }
            }
            telling.subscriptions.remove(&id);
        }
        let mut delta = self.dirty.telling.take()?.delta;
        delta.dirty.sort_unstable_by_key(|(id, _)| *id);
        Some(delta)
    }

    /// A chunk of retries is to be told as it stands; false if nothing is in it.
    fn hold_shelf(&mut self, chunk: u64, telling: &mut Telling) -> bool {
        let id = SubscriptionId(dirty::entity(chunk));
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return false;
        };
        let first = shelf_of(chunk, &sub.retries);
        let is_there = first.is_some_and(|first| sub.retries.hold(first));
        if is_there {
            telling.subscriptions.insert(id);
        }
        is_there
    }

    /// The whole state as chunks by id, as a first snapshot would hold it; equal states give equal bytes.
    #[must_use]
    pub fn chunks(&self) -> Vec<(u64, Bytes)> {
        let ids = self.all_chunks().into_iter();
        ids.filter_map(|id| Some((id, self.chunk(id)?))).collect()
    }

    fn all_chunks(&self) -> BTreeSet<u64> {
        let mut all = BTreeSet::from([dirty::META, dirty::TOKENS, dirty::JOBS]);
        for (id, topic) in &self.topics {
            all.insert(dirty::topic(*id, 0));
            all.extend(
                topic
                    .index
                    .rows
                    .iter()
                    .map(|row| dirty::rows(*id, row.first)),
            );
            let extras = topic.extras.keys().copied();
            let extras = extras.chain(topic.delays.iter().map(|(at, _)| at));
            all.extend(extras.map(|at| dirty::extras(*id, at)));
            let letters = topic.letters.keys().chain(topic.aliases.keys());
            all.extend(letters.map(|at| dirty::letters(*id, *at)));
            let gone = topic.gone.chunk_keys();
            all.extend(gone.map(|key| dirty::gone(*id, key << SETS_SHIFT)));
        }
        for (id, sub) in &self.subscriptions {
            for chunk in [dirty::subscription, dirty::leases, dirty::sessions] {
                all.insert(chunk(*id, 0));
            }
            let sets = [&sub.done, &sub.again, &sub.reopened, &sub.parked];
            let keys = sets.iter().flat_map(|set| set.chunk_keys());
            all.extend(keys.map(|key| dirty::sets(*id, key << SETS_SHIFT)));
            all.extend(sub.retries.shelves().map(|at| dirty::retries(*id, at)));
        }
        all.extend(self.producers.iter().map(|(key, _)| dirty::producer(key)));
        all
    }

    /// A chunk's bytes; none if nothing is in it.
    fn chunk(&self, id: u64) -> Option<Bytes> {
        let (class, entity, part) = (id >> 60, (id >> 32 & 0x0fff_ffff) as u32, id & 0xffff_ffff);
        let (topic, sub) = (TopicId(entity), SubscriptionId(entity));
        match (class, id) {
            (0, dirty::META) => some(&self.meta_chunk()),
            (0, dirty::TOKENS) => filled(self.tokens.by_name.is_empty(), &self.tokens),
            (0, _) => self.jobs_chunk(),
            (1, _) => some(&topic_chunk(self.topics.get(&topic)?)),
            (2, _) => self.rows_chunk(topic, part),
            (3, _) => self.extras_chunk(topic, part),
            (4, _) => self.letters_chunk(topic, part),
            (5, _) => self.subscription_chunk(sub),
            (6, _) => self.sets_chunk(sub, part),
            (7, _) => self.leases_chunk(sub),
            (8, _) => self.retries_chunk(sub, part),
            (9, _) => self.sessions_chunk(sub),
            (11, _) => self.gone_chunk(topic, part),
            _ => self.producer_chunk(ProducerKey(id & ((1 << 60) - 1))),
        }
    }

    fn meta_chunk(&self) -> MetaChunk {
        MetaChunk {
            format: FORMAT,
            last: self.last,
            recovery_epoch: self.recovery_epoch,
            next_topic: self.next_topic,
            next_subscription: self.next_subscription,
            next_producer: self.next_producer,
            next_job: self.jobs.next,
        }
    }

    fn jobs_chunk(&self) -> Option<Bytes> {
        let chunk = |(key, job): (&u64, &crate::state::redrive::Job)| JobChunk {
            key: *key,
            topic: job.topic,
            source_topic: job.source_topic.to_string(),
            subscription: job.subscription.to_string(),
            filter: job.filter.clone(),
            rate_per_s: job.rate_per_s,
            target: job.target,
            next: job.next,
            end: job.end,
            total: job.total,
            done: job.done,
            finished: job.finished,
            cancelled: job.cancelled,
        };
        list(self.jobs.all.iter().map(chunk))
    }

    fn rows_chunk(&self, id: TopicId, part: u64) -> Option<Bytes> {
        let rows = &self.topics.get(&id)?.index.rows;
        let (first, end) = span(part, ROWS_SHIFT, rows.front()?.first);
        let from = rows.partition_point(|row| row.first < first);
        let rows = rows.range(from..).take_while(|row| row.first < end);
        list(rows.map(|row| RowChunk {
            first: row.first,
            stamp: row.stamp,
            last: row.last,
            before: row.before,
        }))
    }

    fn extras_chunk(&self, id: TopicId, part: u64) -> Option<Bytes> {
        let topic = self.topics.get(&id)?;
        let (first, end) = span(part, ENTRIES_SHIFT, topic.first);
        let extras = topic.extras.range(first..end).map(|(at, _)| *at);
        let delays = topic.delays.range(first, end).map(|(at, _)| at);
        let offsets: BTreeSet<u64> = extras.chain(delays).collect();
        list(offsets.into_iter().map(|offset| {
            let extra = topic.extra(offset);
            let lives = extra.expires_at;
            ExtraChunk {
                offset,
                max_attempts: extra.max_attempts,
                backoff_initial_ms: extra.backoff_initial_ms,
                expires_at: extra.expires_at,
                lives: lives.is_some_and(|at| topic.lives.contains(&(at, offset))),
                due: topic.delays.get(offset),
            }
        }))
    }

    fn letters_chunk(&self, id: TopicId, part: u64) -> Option<Bytes> {
        let topic = self.topics.get(&id)?;
        // What was redriven and then reopened may be an alias below the topic's first message.
        let alias = topic.aliases.keys().next();
        let lowest = alias.map_or(topic.first, |alias| topic.first.min(*alias));
        let (first, end) = span(part, ENTRIES_SHIFT, lowest);
        let letter = |(offset, letter): (&u64, &super::dead_letter::Letter)| LetterChunk {
            offset: *offset,
            source: letter.source,
            source_offset: letter.source_offset,
            source_topic: letter.source_topic.to_string(),
            subscription: letter.subscription.to_string(),
            subscription_id: letter.subscription_id,
            body: letter.body,
            reason: letter.reason,
            place: letter.place,
            failures: letter.failures,
            deliveries: letter.deliveries,
            releases: letter.releases,
            redrives: letter.redrives,
            first_attempt_at: letter.first_attempt_at,
            dead_at: letter.dead_at,
            delivery: letter.delivery,
            session: letter.session,
            answered: letter.answered,
            own: (letter.own.max_attempts, letter.own.backoff_initial_ms),
        };
        let letters: Vec<_> = topic.letters.range(first..end).map(letter).collect();
        let aliases = topic.aliases.range(first..end);
        let aliases: Vec<_> = aliases
            .map(|(at, (topic, offset))| (*at, *topic, *offset))
            .collect();
        let is_empty = letters.is_empty() && aliases.is_empty();
        filled(is_empty, &LettersChunk { letters, aliases })
    }

    fn subscription_chunk(&self, id: SubscriptionId) -> Option<Bytes> {
        let sub = self.subscriptions.get(&id)?;
        some(&SubscriptionChunk {
            topic: sub.topic,
            name: sub.name.to_string(),
            config: sub.config.clone(),
            created_at: sub.created_at,
            dead_topic: sub.dead_topic,
            paused: sub.paused,
            start: sub.start,
            floor: sub.floor,
            cursor: sub.cursor,
            delivery_base: sub.delivery_base,
            delivery_top: sub.delivery_top,
            age_floor: sub.age_floor,
            active: sub.active,
        })
    }

    fn sets_chunk(&self, id: SubscriptionId, part: u64) -> Option<Bytes> {
        let sub = self.subscriptions.get(&id)?;
        let sets = [&sub.done, &sub.again, &sub.reopened, &sub.parked];
        let next = self.topics.get(&sub.topic).map_or(0, |topic| topic.next);
        let key = key_of(part, next, &sets)?;
        let bytes = |set: &OffsetSet| set.chunk_bytes(key);
        some(&SetsChunk {
            key,
            done: match planted::is(Bug::DoneNotInSnapshot) {
                true => Vec::new(),
                false => bytes(&sub.done),
            },
            again: bytes(&sub.again),
            reopened: bytes(&sub.reopened),
            parked: bytes(&sub.parked),
        })
    }

    fn gone_chunk(&self, id: TopicId, part: u64) -> Option<Bytes> {
        let topic = self.topics.get(&id)?;
        let key = key_of(part, topic.next, &[&topic.gone])?;
        let gone = topic.gone.chunk_bytes(key);
        some(&GoneChunk { key, gone })
    }

    fn leases_chunk(&self, id: SubscriptionId) -> Option<Bytes> {
        let sub = self.subscriptions.get(&id)?;
        let mut runs: Vec<LeaseChunk> = Vec::new();
        for run in sub.leases.iter() {
            match runs.last_mut() {
                Some(last)
                    if (last.end, last.session, last.delivery)
                        == (run.first, run.session, run.delivery) =>
                {
                    last.end = run.end;
                }
                _ => runs.push(LeaseChunk {
                    first: run.first,
                    end: run.end,
                    session: run.session,
                    delivery: run.delivery,
                }),
            }
        }
        filled(runs.is_empty(), &runs)
    }

    fn retries_chunk(&self, id: SubscriptionId, part: u64) -> Option<Bytes> {
        let retries = &self.subscriptions.get(&id)?.retries;
        retries.chunk(shelf_of(part, retries)?)
    }

    fn sessions_chunk(&self, id: SubscriptionId) -> Option<Bytes> {
        let sub = self.subscriptions.get(&id)?;
        let sessions = sub.sessions.iter().filter_map(|id| self.sessions.get(id));
        list(sessions.map(|session| SessionChunk {
            id: session.id,
            token: session.token,
            consumer: session.consumer.to_string(),
            opened_at: session.opened_at,
        }))
    }

    fn producer_chunk(&self, key: ProducerKey) -> Option<Bytes> {
        if planted::is(Bug::DedupNotInSnapshot) {
            return None;
        }
        let producer = self.producers.get(key)?;
        let runs = producer.runs.iter();
        some(&ProducerChunk {
            topic: producer.topic,
            name: producer.name.as_ref().map(ToString::to_string),
            owner: producer.owner,
            epoch: producer.epoch,
            last: producer.last,
            used: producer.used,
            runs: runs
                .map(|run| (run.first, run.count, run.offset, run.batches))
                .collect(),
        })
    }
}

fn topic_chunk(topic: &Topic) -> TopicChunk {
    TopicChunk {
        name: topic.name.to_string(),
        config: topic.config.clone(),
        created_at: topic.created_at,
        first: topic.first,
        next: topic.next,
        total_bytes: topic.index.total,
        ttl_floor: topic.ttl_floor,
        is_dead_letter: topic.is_dead_letter,
    }
}

/// Which chunk of the sets a part is, if they have it. Keys wrap far beyond what lives at one time: the
/// one that has members is meant.
fn key_of(part: u64, next: u64, sets: &[&OffsetSet]) -> Option<u64> {
    let wrapped = |key: &u64| key & 0xffff_ffff == part;
    let near = ((next >> SETS_SHIFT) & !0xffff_ffff) | part;
    let candidates = [near, near.wrapping_sub(1 << 32)];
    let has = |key: &u64| sets.iter().any(|set| !set.chunk_bytes(*key).is_empty());
    candidates.into_iter().filter(wrapped).find(has)
}

/// The first offset of the shelf that a chunk, or its part, is of.
fn shelf_of(chunk: u64, retries: &Retries) -> Option<u64> {
    let lowest = retries.shelves().next()?;
    Some(span(chunk & 0xffff_ffff, ENTRIES_SHIFT, lowest).0)
}

/// The offsets of a part, of which none that is meant lies below `lowest`: parts wrap at 2^32.
fn span(part: u64, shift: u32, lowest: u64) -> (u64, u64) {
    let base = lowest >> shift;
    let mut key = (base & !0xffff_ffff) | part;
    if key < base {
        key = key.wrapping_add(1 << 32);
    }
    let first = key.checked_shl(shift).unwrap_or(u64::MAX);
    (first, first.saturating_add(1 << shift))
}

fn some<T: Serialize>(value: &T) -> Option<Bytes> {
    let bytes = postcard::to_allocvec(value).expect("encoding into memory cannot fail");
    Some(Bytes::from(bytes))
}

fn filled<T: Serialize>(is_empty: bool, value: &T) -> Option<Bytes> {
    if is_empty { None } else { some(value) }
}

fn list<T: Serialize>(items: impl Iterator<Item = T>) -> Option<Bytes> {
    let items: Vec<T> = items.collect();
    filled(items.is_empty(), &items)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_at_most_the_bytes_that_are_counted_for_it() {
        let row = RowChunk {
            first: u64::MAX,
            stamp: Stamp(u64::MAX),
            last: Stamp(u64::MAX),
            before: u64::MAX,
        };
        let bytes = postcard::to_stdvec(&row).unwrap();
        assert_eq!(bytes.len(), ROW_CHUNK_BYTES_MAX);
    }
}
