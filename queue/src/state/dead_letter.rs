//! A message in a dead-letter topic, and what dead letters keep alive.
//!
//! Invariant: a body is pinned once for every letter, alias and reopened message that shows it, a
//! record once for every letter and retry that tells its story by it.

use std::collections::BTreeMap;
use std::sync::Arc;

use millpond_protocol::control::DeadReason;
use millpond_protocol::{LogIndex, Offset, SessionId, Stamp, SubscriptionId, TopicId};

use crate::effect::Place;
use crate::state::redelivery::Answer;
use crate::state::topic::Extra;

/// A message in a dead-letter topic. Error text, code, consumer and history stand in the record at
/// `place`; the message's bytes at `body`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letter {
    /// The message in the topic in which it failed.
    pub source: TopicId,
    pub source_offset: Offset,
    pub source_topic: Arc<str>,
    pub subscription: Arc<str>,
    pub subscription_id: SubscriptionId,
    /// The topic and offset under which the message was published.
    pub body: (TopicId, Offset),
    pub reason: DeadReason,
    /// The record of the last failure, or of what made it dead if it never failed.
    pub place: Place,
    pub failures: u32,
    pub deliveries: u32,
    pub releases: u32,
    pub redrives: u32,
    pub first_attempt_at: Option<Stamp>,
    pub dead_at: Stamp,
    /// The last lease: its number, whose it was, and whether its own settlement ended it.
    pub(crate) delivery: u32,
    pub(crate) session: SessionId,
    pub(crate) answered: Option<Answer>,
    /// What the message has of its own, other than its time to live.
    pub(crate) own: Extra,
}

impl Letter {
    /// Whether it belongs to this subscription, by name: also of one that was deleted.
    #[must_use]
    pub fn is_of(&self, topic: &str, subscription: &str) -> bool {
        &*self.source_topic == topic && &*self.subscription == subscription
    }
}

/// Counts of what must stay readable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pins {
    bodies: BTreeMap<(TopicId, Offset), u32>,
    records: BTreeMap<Place, u32>,
}

impl Pins {
    pub fn pin_body(&mut self, body: (TopicId, Offset)) {
        *self.bodies.entry(body).or_default() += 1;
    }

    pub fn unpin_body(&mut self, body: (TopicId, Offset)) {
        unpin(&mut self.bodies, body);
    }

    pub fn pin_record(&mut self, place: Option<Place>) {
        if let Some(place) = place {
            *self.records.entry(place).or_default() += 1;
        }
    }

    /// Pins all of them at once, each so many times; nothing may be pinned yet.
    pub fn pin_first_records(&mut self, mut places: Vec<(Place, u32)>) {
        debug_assert!(self.records.is_empty());
        places.sort_unstable();
        let alike = places.chunk_by(|(one, _), (next, _)| one == next);
        let pinned = |run: &[(Place, u32)]| (run[0].0, run.iter().map(|(_, count)| count).sum());
        self.records = alike.map(pinned).collect();
    }

    pub fn unpin_record(&mut self, place: Option<Place>) {
        if let Some(place) = place {
            unpin(&mut self.records, place);
        }
    }

    pub fn has_body(&self, body: (TopicId, Offset)) -> bool {
        self.bodies.contains_key(&body)
    }

    pub fn has_record(&self, place: Place) -> bool {
        self.records.contains_key(&place)
    }

    pub fn bodies_between(&self, topic: TopicId, first: Offset, end: Offset) -> u64 {
        let range = (topic, first)..(topic, end.max(first));
        self.bodies.range(range).count() as u64
    }

    /// The first pinned body from `first` to before `end`.
    pub fn next_body(&self, topic: TopicId, first: Offset, end: Offset) -> Option<Offset> {
        let range = (topic, first)..(topic, end.max(first));
        self.bodies.range(range).next().map(|((_, at), _)| *at)
    }

    pub fn records_between(&self, first: LogIndex, last: LogIndex) -> impl Iterator<Item = Place> {
        let at = |index, record| Place { index, record };
        let range = at(first, 0)..=at(last.max(first), u32::MAX);
        self.records.range(range).map(|(place, _)| *place)
    }

    pub fn memory_bytes(&self) -> u64 {
        (self.bodies.len() + self.records.len()) as u64 * 36
    }
}

fn unpin<K: Ord>(pins: &mut BTreeMap<K, u32>, key: K) {
    if let Some(count) = pins.get_mut(&key) {
        *count -= 1;
        if *count == 0 {
            pins.remove(&key);
        }
    }
}
