//! Which chunks of the state have changed since the last snapshot.
//!
//! A chunk id is a class, an entity and a part: small enough parts that a small change is a small
//! delta. Parts of offsets wrap at 2^32; what lives at one time is always narrower.

use std::collections::BTreeSet;

use bytes::Bytes;
use millpond_protocol::{ProducerKey, SubscriptionId, TopicId};

use crate::effect::SnapshotDelta;

#[derive(Debug, Default)]
pub struct Dirty {
    marked: BTreeSet<u64>,
    /// Chunks that the snapshots so far hold; `None` before the first.
    pub known: Option<BTreeSet<u64>>,
    /// The snapshot that was begun and is not told to its end.
    pub telling: Option<Telling>,
}

#[derive(Debug, Default)]
pub struct Telling {
    pub delta: SnapshotDelta,
    /// Which have shelves that are held for it, or told and not in it.
    pub subscriptions: BTreeSet<SubscriptionId>,
}

impl Telling {
    /// Takes what was told of a subscription's retries.
    pub fn add(&mut self, id: SubscriptionId, told: impl Iterator<Item = (u64, Bytes)>) {
        let told = told.map(|(first, chunk)| (retries(id, first), chunk));
        self.delta.dirty.extend(told);
    }
}

impl Dirty {
    pub fn mark(&mut self, id: u64) {
        if self.known.is_some() {
            self.marked.insert(id);
        }
    }

    /// Marks the parts that `first..end` touches.
    pub fn mark_span(&mut self, part: impl Fn(u64) -> u64, shift: u32, first: u64, end: u64) {
        if self.known.is_some() && first < end {
            for key in first >> shift..=(end - 1) >> shift {
                self.marked.insert(part(key << shift));
            }
        }
    }

    /// Marks the membership of `first..end` of a subscription.
    pub fn mark_sets(&mut self, subscription: SubscriptionId, first: u64, end: u64) {
        self.mark_span(|at| sets(subscription, at), SETS_SHIFT, first, end);
    }

    /// These chunks were in a snapshot that was not kept, as new bytes or as gone.
    pub fn again(&mut self, ids: &[u64]) {
        if let Some(known) = &mut self.known {
            known.extend(ids);
            self.marked.extend(ids);
        }
    }

    pub fn take(&mut self) -> BTreeSet<u64> {
        std::mem::take(&mut self.marked)
    }
}

pub const META: u64 = 0;
pub const TOKENS: u64 = 1;
pub const JOBS: u64 = 2;

/// Offsets per chunk of a subscription's sets: 4,096.
pub const SETS_SHIFT: u32 = 12;
/// Offsets per chunk of retries, letters, delays and the like: 512.
pub const ENTRIES_SHIFT: u32 = 9;
/// Offsets per chunk of a topic's index: 1,048,576.
pub const ROWS_SHIFT: u32 = 20;

macro_rules! classes {
    ($($(#[$doc:meta])* $name:ident($entity:ident) = $class:literal, $shift:expr;)*) => {
        $($(#[$doc])*
        pub fn $name(entity: $entity, at: u64) -> u64 {
            $class << 60 | u64::from(entity.0) << 32 | (at >> $shift & 0xffff_ffff)
        })*
    };
}

classes! {
    topic(TopicId) = 1, 0;
    rows(TopicId) = 2, ROWS_SHIFT;
    /// Delays, lives and overrides of messages that have any.
    extras(TopicId) = 3, ENTRIES_SHIFT;
    letters(TopicId) = 4, ENTRIES_SHIFT;
    subscription(SubscriptionId) = 5, 0;
    sets(SubscriptionId) = 6, SETS_SHIFT;
    leases(SubscriptionId) = 7, 0;
    retries(SubscriptionId) = 8, ENTRIES_SHIFT;
    sessions(SubscriptionId) = 9, 0;
    /// Offsets that were let go out of turn.
    gone(TopicId) = 11, SETS_SHIFT;
}

/// The entity part of an id is 28 bits wide.
pub const ENTITY_MAX: u32 = (1 << 28) - 1;

pub fn entity(id: u64) -> u32 {
    (id >> 32) as u32 & ENTITY_MAX
}

pub fn is_retries(id: u64) -> bool {
    id >> 60 == 8
}

pub fn producer(key: ProducerKey) -> u64 {
    10 << 60 | (key.0 & ((1 << 60) - 1))
}
