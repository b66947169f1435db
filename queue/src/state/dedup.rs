//! Producers: who wrote, which incarnation, and which of its messages were accepted.
//!
//! Invariants: sequences within a producer only rise; an entry per (topic, producer id) that has a
//! name; `idle` has every producer once, under its last use; `bytes` is the cost of all. Idle ones go
//! first when the table is full.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use millpond_protocol::hot::{AckKind, AckRow};
use millpond_protocol::limits::DEDUP_BATCHES_MAX;
use millpond_protocol::{Epoch, Offset, ProducerKey, Sequence, Stamp, TopicId};

/// Most runs of sequences per producer; more than batches, because sequences may skip.
pub const RUNS_MAX: usize = 4 * DEDUP_BATCHES_MAX;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Producer {
    pub topic: TopicId,
    /// `None`: anonymous.
    pub name: Option<Arc<str>>,
    pub owner: u64,
    pub epoch: Epoch,
    pub last: Sequence,
    pub used: Stamp,
    pub runs: VecDeque<SequenceRun>,
    /// Batches that `runs` remembers.
    pub batches: u32,
}

/// Consecutive sequences at consecutive offsets.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct SequenceRun {
    pub first: u64,
    pub count: u64,
    pub offset: u64,
    /// Batches that end in it.
    pub batches: u32,
}

impl Producer {
    /// Remembers consecutive sequences of a batch; `ends` if they are the batch's last.
    pub fn remember(&mut self, first: u64, count: u64, offset: u64, ends: u32) {
        self.batches += ends;
        match self.runs.back_mut() {
            Some(run) if run.first + run.count == first && run.offset + run.count == offset => {
                run.count += count;
                run.batches += ends;
            }
            _ => self.runs.push_back(SequenceRun {
                first,
                count,
                offset,
                batches: ends,
            }),
        }
        while let Some(run) = self.runs.front() {
            let enough = (self.batches - run.batches) as usize >= DEDUP_BATCHES_MAX;
            if !(enough || self.runs.len() > RUNS_MAX) {
                break;
            }
            self.batches -= run.batches;
            self.runs.pop_front();
        }
    }

    /// Adds the answer to a sequence that was accepted before.
    pub fn answer(&self, sequence: Sequence, rows: &mut Vec<AckRow>) {
        let at = self.runs.partition_point(|run| run.first <= sequence.0);
        let run = at.checked_sub(1).and_then(|at| self.runs.get(at));
        let known = run.filter(|run| sequence.0 < run.first + run.count);
        let (kind, offset) = match known {
            Some(run) => (AckKind::Duplicate, run.offset + (sequence.0 - run.first)),
            None => (AckKind::DuplicateUnknown, 0),
        };
        if let Some(row) = rows.last_mut()
            && row.kind == kind
            && (kind == AckKind::DuplicateUnknown || row.offset.0 + u64::from(row.count) == offset)
        {
            row.count += 1;
            row.last_sequence = sequence;
            return;
        }
        rows.push(AckRow {
            last_sequence: sequence,
            offset: Offset(offset),
            count: 1,
            kind,
        });
    }

    pub fn bytes(&self) -> u64 {
        let name = self.name.as_ref().map_or(0, |name| name.len());
        (size_of::<Self>() + 160 + name + self.runs.len() * size_of::<SequenceRun>()) as u64
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Producers {
    all: BTreeMap<ProducerKey, Producer>,
    names: BTreeMap<(TopicId, Arc<str>), ProducerKey>,
    idle: BTreeSet<(Stamp, ProducerKey)>,
    bytes: u64,
}

impl Producers {
    pub fn get(&self, key: ProducerKey) -> Option<&Producer> {
        self.all.get(&key)
    }

    pub fn by_name(&self, topic: TopicId, name: &str) -> Option<ProducerKey> {
        self.names.get(&(topic, Arc::from(name))).copied()
    }

    pub fn insert(&mut self, key: ProducerKey, producer: Producer) {
        self.bytes += producer.bytes();
        self.idle.insert((producer.used, key));
        if let Some(name) = &producer.name {
            self.names.insert((producer.topic, name.clone()), key);
        }
        self.all.insert(key, producer);
    }

    /// Changes a producer that is used now.
    pub fn update(&mut self, key: ProducerKey, now: Stamp, change: impl FnOnce(&mut Producer)) {
        let Some(producer) = self.all.get_mut(&key) else {
            return;
        };
        self.bytes -= producer.bytes();
        self.idle.remove(&(producer.used, key));
        change(producer);
        producer.used = now;
        self.idle.insert((now, key));
        self.bytes += producer.bytes();
    }

    pub fn remove(&mut self, key: ProducerKey) -> Option<Producer> {
        let producer = self.all.remove(&key)?;
        self.bytes -= producer.bytes();
        self.idle.remove(&(producer.used, key));
        if let Some(name) = &producer.name {
            self.names.remove(&(producer.topic, name.clone()));
        }
        Some(producer)
    }

    /// The producer that has been idle longest, and since when.
    pub fn idlest(&self) -> Option<(Stamp, ProducerKey)> {
        self.idle.first().copied()
    }

    /// Producers idle since before `then`, longest first.
    pub fn idle_before(&self, then: Stamp) -> impl Iterator<Item = ProducerKey> {
        self.idle
            .range(..(then, ProducerKey(0)))
            .map(|(_, key)| *key)
    }

    pub fn of_topic(&self, topic: TopicId) -> Vec<ProducerKey> {
        let of = self
            .all
            .iter()
            .filter(|(_, producer)| producer.topic == topic);
        of.map(|(key, _)| *key).collect()
    }

    pub fn iter(&self) -> impl Iterator<Item = (ProducerKey, &Producer)> {
        self.all.iter().map(|(key, producer)| (*key, producer))
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn check_invariants(&self) {
        assert_eq!(
            self.idle.len(),
            self.all.len(),
            "every producer has a last use"
        );
        let bytes: u64 = self.all.values().map(Producer::bytes).sum();
        assert_eq!(bytes, self.bytes, "dedup state is counted");
    }
}
