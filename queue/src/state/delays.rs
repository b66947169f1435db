//! A topic's messages that are not due yet: one entry each, whatever the number of subscriptions.
//!
//! Millions may wait for a day, so an entry is small: the due time stands once, beside the offset in a
//! chunk of neighbours, and the offset once more in the slot of its due time, unsorted. Only the
//! earliest slot is kept in order.
//!
//! Invariants: `near` is the whole of the earliest slot, and empty only if nothing waits; `far` has every
//! later entry, and perhaps `stale` ones, whose message is gone or due at another time.

use std::collections::{BTreeMap, BTreeSet};

use millpond_protocol::Stamp;

/// Offsets of a chunk.
const CHUNK: u64 = 512;
/// A slot is 2 to this power of microseconds: about a second.
const SLOT_BITS: u32 = 20;
/// So many stale entries may always be there; beyond it no more than there are good ones.
const STALE_MIN: u64 = 1_024;

#[derive(Clone, Debug, Default)]
pub struct Delays {
    chunks: BTreeMap<u64, Chunk>,
    near: BTreeSet<(Stamp, u64)>,
    /// By slot and upper half of the offset: the lower halves.
    far: BTreeMap<(u64, u32), Vec<u32>>,
    count: u64,
    stale: u64,
}

/// Neighbours, by offset: where each stands in the chunk, and when it is due.
#[derive(Clone, Debug, Default)]
struct Chunk {
    at: Vec<u16>,
    due: Vec<Stamp>,
}

impl Delays {
    pub fn insert(&mut self, offset: u64, due: Stamp) {
        self.remove(offset);
        let chunk = self.chunks.entry(offset / CHUNK).or_default();
        let place = chunk.at.partition_point(|at| *at < within(offset));
        chunk.at.insert(place, within(offset));
        chunk.due.insert(place, due);
        self.count += 1;
        let slot = slot(due);
        match self.near_slot() {
            Some(near) if near < slot => return self.put_far(slot, offset),
            Some(near) if near > slot => self.put_back(near),
            _ => {}
        }
        self.near.insert((due, offset));
    }

    pub fn remove(&mut self, offset: u64) -> Option<Stamp> {
        let chunk = self.chunks.get_mut(&(offset / CHUNK))?;
        let place = chunk.at.binary_search(&within(offset)).ok()?;
        chunk.at.remove(place);
        let due = chunk.due.remove(place);
        if chunk.at.is_empty() {
            self.chunks.remove(&(offset / CHUNK));
        }
        self.count -= 1;
        if !self.near.remove(&(due, offset)) {
            self.stale += 1;
        }
        self.tidy();
        Some(due)
    }

    pub fn contains(&self, offset: u64) -> bool {
        self.get(offset).is_some()
    }

    pub fn get(&self, offset: u64) -> Option<Stamp> {
        let chunk = self.chunks.get(&(offset / CHUNK))?;
        let place = chunk.at.binary_search(&within(offset)).ok()?;
        chunk.due.get(place).copied()
    }

    /// The first delayed offset in `first..end`.
    pub fn next_in(&self, first: u64, end: u64) -> Option<u64> {
        self.range(first, end).next().map(|(offset, _)| offset)
    }

    pub fn head(&self) -> Option<Stamp> {
        self.near.first().map(|(due, _)| *due)
    }

    /// Those that are due by `now`, by (due, offset).
    pub fn ready(&self, now: Stamp) -> impl Iterator<Item = (Stamp, u64)> {
        let near = self.near.range(..=(now, u64::MAX)).copied();
        // Looked at only once nothing near is left.
        let far = std::iter::once_with(move || self.far_ready(now)).flatten();
        near.chain(far)
    }

    /// The earliest due time after `now`.
    pub fn next_due(&self, now: Stamp) -> Option<Stamp> {
        if let Some((due, _)) = self.near.range((now.next(), 0)..).next() {
            return Some(*due);
        }
        let mut found: Option<Stamp> = None;
        for ((slot, high), lows) in self.far.range((slot(now), 0)..) {
            if found.is_some_and(|due| self::slot(due) < *slot) {
                break;
            }
            let dues = self.good(*slot, *high, lows).map(|(due, _)| due);
            let first = dues.filter(|due| *due > now).min();
            found = found.into_iter().chain(first).min();
        }
        found
    }

    pub fn len(&self) -> u64 {
        self.count
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, Stamp)> {
        self.range(0, u64::MAX)
    }

    pub fn range(&self, first: u64, end: u64) -> impl Iterator<Item = (u64, Stamp)> {
        let chunks = self.chunks.range(first / CHUNK..=end / CHUNK);
        let all = chunks.flat_map(move |(number, chunk)| {
            let base = number * CHUNK;
            let from = first.saturating_sub(base).min(CHUNK) as u16;
            let skipped = chunk.at.partition_point(|at| *at < from);
            let offsets = chunk.at.iter().map(move |at| base + u64::from(*at));
            offsets.zip(chunk.due.iter().copied()).skip(skipped)
        });
        all.take_while(move |(offset, _)| *offset < end)
    }

    pub fn memory_bytes(&self) -> u64 {
        let near = self.near.len() as u64;
        let far = self.count + self.stale - near.min(self.count);
        let heads = self.chunks.len() as u64 * 112 + self.far.len() as u64 * 64;
        self.count * 10 + near * 28 + far * 6 + heads
    }

    fn near_slot(&self) -> Option<u64> {
        self.head().map(slot)
    }

    fn put_far(&mut self, slot: u64, offset: u64) {
        let lows = self.far.entry((slot, (offset >> 32) as u32)).or_default();
        lows.push(offset as u32);
    }

    /// What was the earliest slot is one of the later ones.
    fn put_back(&mut self, slot: u64) {
        for (_, offset) in std::mem::take(&mut self.near) {
            self.put_far(slot, offset);
        }
    }

    /// The entries of a slot that still stand.
    fn good(&self, slot: u64, high: u32, lows: &[u32]) -> impl Iterator<Item = (Stamp, u64)> {
        let offsets = lows
            .iter()
            .map(move |low| u64::from(high) << 32 | u64::from(*low));
        let all = offsets.filter_map(|offset| Some((self.get(offset)?, offset)));
        all.filter(move |(due, _)| self::slot(*due) == slot)
    }

    fn far_ready(&self, now: Stamp) -> BTreeSet<(Stamp, u64)> {
        let slots = self.far.range(..=(slot(now), u32::MAX));
        let all = slots.flat_map(|((slot, high), lows)| self.good(*slot, *high, lows));
        all.filter(|(due, _)| *due <= now).collect()
    }

    /// The earliest slot comes near, and stale entries stay few.
    fn tidy(&mut self) {
        if self.count == 0 {
            *self = Self::default();
        }
        while self.near.is_empty()
            && let Some(((slot, high), lows)) = self.far.pop_first()
        {
            let mut near: BTreeSet<_> = self.good(slot, high, &lows).collect();
            let mut entries = lows.len();
            while let Some(next) = self.far.first_entry().filter(|next| next.key().0 == slot) {
                let ((_, high), lows) = next.remove_entry();
                near.extend(self.good(slot, high, &lows));
                entries += lows.len();
            }
            self.stale = self.stale.saturating_sub((entries - near.len()) as u64);
            self.near = near;
        }
        if self.stale > self.count.max(STALE_MIN) {
            self.far.clear();
            self.stale = 0;
            let near = self.near_slot();
            let all: Vec<_> = self
                .iter()
                .map(|(offset, due)| (slot(due), offset))
                .collect();
            for (slot, offset) in all {
                if Some(slot) != near {
                    self.put_far(slot, offset);
                }
            }
        }
    }
}

fn within(offset: u64) -> u16 {
    (offset % CHUNK) as u16
}

fn slot(due: Stamp) -> u64 {
    due.0 >> SLOT_BITS
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64, u64),
        Remove(u64),
        RemoveBelow(u64),
        Mature(u64),
    }

    /// Few offsets and times, some around the bounds of chunks, slots and halves.
    fn step() -> impl Strategy<Value = Step> {
        let offset = (0..3u64, 0..700u64).prop_map(|(high, low)| (high << 32) + low);
        let due = (0..5u64, 0..4u64).prop_map(|(slot, us)| (slot << SLOT_BITS) + us);
        prop_oneof![
            6 => (offset.clone(), due.clone()).prop_map(|(offset, due)| Step::Insert(offset, due)),
            2 => offset.clone().prop_map(Step::Remove),
            1 => offset.prop_map(Step::RemoveBelow),
            1 => due.prop_map(Step::Mature),
        ]
    }

    fn agree(delays: &Delays, model: &BTreeMap<u64, Stamp>) {
        let by_due: BTreeSet<_> = model.iter().map(|(offset, due)| (*due, *offset)).collect();
        assert_eq!(delays.len(), model.len() as u64);
        let all = model.iter().map(|(offset, due)| (*offset, *due));
        assert!(delays.iter().eq(all));
        assert_eq!(delays.head(), by_due.first().map(|(due, _)| *due));
        for (first, end) in [
            (0, 5),
            (500, 520),
            (600, 1 << 32),
            ((1 << 32) + 9, u64::MAX),
        ] {
            let next = model.range(first..end).next().map(|(offset, _)| *offset);
            assert_eq!(delays.next_in(first, end), next);
        }
        for (slot, us) in [(0, 0), (0, 2), (1, 1), (2, 0), (4, 3), (9, 0)] {
            let now = Stamp((slot << SLOT_BITS) + us);
            let ready = by_due.iter().filter(|(due, _)| *due <= now).copied();
            assert!(delays.ready(now).eq(ready), "ready at {now:?}");
            let next = by_due.iter().map(|(due, _)| *due).find(|due| *due > now);
            assert_eq!(delays.next_due(now), next, "next after {now:?}");
        }
    }

    proptest! {
        #[test]
        fn delays_are_a_map_in_two_orders(steps in prop::collection::vec(step(), 1..60)) {
            let (mut delays, mut model) = (Delays::default(), BTreeMap::new());
            for step in steps {
                match step {
                    Step::Insert(offset, due) => {
                        delays.insert(offset, Stamp(due));
                        model.insert(offset, Stamp(due));
                    }
                    Step::Remove(offset) => {
                        prop_assert_eq!(delays.remove(offset), model.remove(&offset));
                    }
                    Step::RemoveBelow(first) => {
                        while let Some(offset) = delays.next_in(0, first) {
                            prop_assert_eq!(delays.remove(offset), model.remove(&offset));
                        }
                    }
                    Step::Mature(now) => {
                        let ready: Vec<_> = delays.ready(Stamp(now)).collect();
                        for (_, offset) in ready {
                            prop_assert_eq!(delays.remove(offset), model.remove(&offset));
                        }
                    }
                }
                agree(&delays, &model);
            }
        }
    }

    #[test]
    fn what_is_gone_early_does_not_stay_in_memory() {
        let mut delays = Delays::default();
        let day = 86_400_000_000;
        for offset in 0..100_000 {
            delays.insert(offset, Stamp(day + offset * 50_000));
            if offset >= 10 {
                delays.remove(offset - 10);
            }
            assert!(delays.stale <= STALE_MIN.max(delays.count) + 1);
        }
        assert_eq!(delays.len(), 10);
        assert!(delays.memory_bytes() < 100_000, "{}", delays.memory_bytes());
    }

    #[test]
    fn a_million_over_a_day_take_less_than_24_bytes_each() {
        let mut delays = Delays::default();
        let day = 86_400_000_000;
        for offset in 0..1_000_000u64 {
            delays.insert(
                offset,
                Stamp(offset.wrapping_mul(0x9e37_79b9_7f4a_7c15) % day),
            );
        }
        let each = delays.memory_bytes() as f64 / 1e6;
        assert!(each < 24.0, "{each} B");
    }
}
