//! The entries of a subscription, on shelves of as many offsets as a chunk of the snapshot has.
//!
//! A start leaves a shelf closed: it is its chunk, all of which was looked at, until one of its entries changes or
//! comes due. So a start with a million entries makes none of them. Invariants: no shelf is empty; a waiting entry
//! of an open shelf is in exactly one of `due` and `alone`, and those of a closed one are in neither; no closed
//! shelf has an entry that may have to be delivered alone. `bytes` is what all entries take once they are open.
//!
//! A snapshot holds the shelves that it wants and is told them a few at a time: whatever changes a shelf that is
//! held tells it first, so that all are told as they stood when they were held.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use bytes::Bytes;
use millpond_protocol::{SessionId, Stamp};

use super::Retry;
use crate::effect::Place;
use crate::planted::{self, Bug};
use crate::state::dirty::ENTRIES_SHIFT;
use crate::state::snapshot::retries::{self, entries_of, glances_of};

#[derive(Debug, Default)]
pub struct Retries {
    shelves: BTreeMap<u64, Shelf>,
    due: BTreeSet<(Stamp, u64)>,
    alone: BTreeSet<(Stamp, u64)>,
    /// Closed shelves on which entries wait, by the first due time.
    closed: BTreeSet<(Stamp, u64)>,
    /// Entries that wait on closed shelves.
    closed_waiting: u64,
    /// See `take_opened`.
    opened: bool,
    bytes: u64,
    /// Open shelves that are to be told as they stand.
    held: BTreeSet<u64>,
    /// Those that were told, with what was on them.
    told: Vec<(u64, Bytes)>,
}

#[derive(Debug)]
enum Shelf {
    Open(Entries),
    Closed(Closed),
}

/// By offset. An entry stands by itself, so that a tree moves no more than where it is.
type Entries = BTreeMap<u64, Box<Retry>>;

#[derive(Debug)]
struct Closed {
    chunk: Bytes,
    waiting: u64,
    /// The first and the last due time.
    due: Option<(Stamp, Stamp)>,
    /// Made when one is asked for.
    entries: OnceLock<Entries>,
    /// Of all that wait, rising; made when it is asked how many are due.
    dues: OnceLock<Box<[Stamp]>>,
}

/// What must be known of an entry to leave its shelf closed.
#[derive(Debug)]
pub struct Glance {
    pub due: Option<Stamp>,
    /// The record of its last failure.
    pub place: Option<Place>,
    /// It may have to be delivered alone.
    pub is_suspect: bool,
    pub bytes: u64,
}

/// What must be known of a chunk to leave its shelf closed.
#[derive(Debug, Default)]
pub struct Told {
    shelf: u64,
    bytes: u64,
    waiting: u64,
    due: Option<(Stamp, Stamp)>,
    /// An entry may have to be delivered alone.
    pub has_suspects: bool,
    /// The records that tell the entries' stories, and of how many each.
    pub places: Vec<(Place, u32)>,
}

impl Told {
    /// `None` unless there are entries and all are good, of one shelf, by rising offsets.
    pub fn of(entries: impl Iterator<Item = Option<(u64, Glance)>>) -> Option<Self> {
        let mut told: Option<Self> = None;
        let mut last = None;
        for entry in entries {
            let (offset, glance) = entry?;
            let told = told.get_or_insert_with(|| Self {
                shelf: shelf_of(offset),
                ..Self::default()
            });
            if last.is_some_and(|last| offset <= last) || shelf_of(offset) != told.shelf {
                return None;
            }
            last = Some(offset);
            told.add(&glance);
        }
        told
    }

    fn add(&mut self, glance: &Glance) {
        self.bytes += glance.bytes;
        self.has_suspects |= glance.is_suspect;
        if let Some(due) = glance.due {
            self.waiting += 1;
            let (first, last) = self.due.unwrap_or((due, due));
            self.due = Some((first.min(due), last.max(due)));
        }
        match (glance.place, self.places.last_mut()) {
            // One record often tells of many.
            (Some(place), Some((last, count))) if *last == place => *count += 1,
            (Some(place), _) => self.places.push((place, 1)),
            (None, _) => {}
        }
    }
}

impl Shelf {
    fn entries(&self) -> &Entries {
        match self {
            Self::Open(entries) => entries,
            Self::Closed(closed) => closed.entries.get_or_init(|| closed.read()),
        }
    }
}

impl Closed {
    fn read(&self) -> Entries {
        let entries = entries_of(&self.chunk).map(|entry| {
            let Some((offset, retry)) = entry else {
                unreachable!("all of the chunk was looked at before the shelf was put there");
            };
            (offset, Box::new(retry))
        });
        // From what is sorted the tree is built leaf by leaf, and full.
        entries.collect()
    }

    /// Entries that are due by `now`.
    fn ready(&self, now: Stamp) -> usize {
        match self.due {
            Some((_, last)) if last <= now => self.waiting as usize,
            Some((first, _)) if first <= now => self.dues().partition_point(|due| *due <= now),
            _ => 0,
        }
    }

    /// The first due time after `now`.
    fn next_due(&self, now: Stamp) -> Option<Stamp> {
        self.due.filter(|(_, last)| *last > now)?;
        self.dues().get(self.ready(now)).copied()
    }

    fn dues(&self) -> &[Stamp] {
        self.dues.get_or_init(|| {
            let glances = glances_of(&self.chunk).flatten();
            let mut dues: Vec<_> = glances.filter_map(|(_, glance)| glance.due).collect();
            dues.sort_unstable();
            dues.into()
        })
    }
}

impl Retries {
    pub fn get(&self, offset: u64) -> Option<&Retry> {
        let shelf = self.shelves.get(&shelf_of(offset))?;
        Some(shelf.entries().get(&offset)?)
    }

    pub fn contains(&self, offset: u64) -> bool {
        self.get(offset).is_some()
    }

    /// The first entry within `first..end`.
    pub fn next_in(&self, first: u64, end: u64) -> Option<u64> {
        self.range(first, end).next().map(|(at, _)| at)
    }

    /// Puts an entry there; the one before must have been taken out.
    pub fn put(&mut self, offset: u64, retry: Box<Retry>, max_attempts: u32) {
        self.bytes += retry.bytes();
        if let Some(due) = retry.due() {
            if retry.is_alone(max_attempts) {
                self.alone.insert((due, offset));
            } else {
                self.due.insert((due, offset));
            }
        }
        let shelf = shelf_of(offset);
        let before = match self.open(shelf) {
            Some(entries) => entries.insert(offset, retry),
            None => {
                let entries = Entries::from([(offset, retry)]);
                self.shelves.insert(shelf, Shelf::Open(entries));
                None
            }
        };
        debug_assert!(before.is_none(), "entries are taken out before they change");
    }

    /// Puts the shelf of a chunk where there is none; false if there is one. Which last attempts are to be
    /// delivered alone is not known of it, if it has suspects.
    pub fn put_shelf(&mut self, told: &Told, chunk: Bytes) -> bool {
        let closed = Closed {
            chunk,
            waiting: told.waiting,
            due: told.due,
            entries: OnceLock::new(),
            dues: OnceLock::new(),
        };
        let first = told.due.map(|(first, _)| first);
        self.bytes += told.bytes;
        self.closed_waiting += told.waiting;
        self.closed.extend(first.map(|first| (first, told.shelf)));
        let before = self.shelves.insert(told.shelf, Shelf::Closed(closed));
        if told.has_suspects {
            self.open(told.shelf);
        }
        before.is_none()
    }

    pub fn take(&mut self, offset: u64) -> Option<Box<Retry>> {
        let shelf = shelf_of(offset);
        let entries = self.open(shelf)?;
        let retry = entries.remove(&offset)?;
        if entries.is_empty() {
            self.shelves.remove(&shelf);
        }
        self.bytes -= retry.bytes();
        if let Some(due) = retry.due() {
            self.wait_no_more(due, offset);
        }
        Some(retry)
    }

    /// Leases an entry that waits, where it stands, if it `may` be; whether it was. `None`: there is no entry.
    pub fn lease(
        &mut self,
        offset: u64,
        session: SessionId,
        delivery: u32,
        may: impl FnOnce(&Retry) -> bool,
    ) -> Option<bool> {
        let retry = self.open(shelf_of(offset))?.get_mut(&offset)?;
        if !may(retry) {
            return Some(false);
        }
        let before = (retry.bytes(), retry.due());
        retry.lease(session, delivery);
        let after = retry.bytes();
        self.bytes = self.bytes - before.0 + after;
        if let Some(due) = before.1 {
            self.wait_no_more(due, offset);
        }
        Some(true)
    }

    /// Opens the closed shelf on which an entry is due first.
    pub fn open_first(&mut self) {
        if let Some(&(_, shelf)) = self.closed.first() {
            self.open(shelf);
        }
    }

    /// When the first entry on a closed shelf is due.
    pub fn first_closed(&self) -> Option<Stamp> {
        self.closed.first().map(|(due, _)| *due)
    }

    /// Whether a shelf was opened since this was asked: what is due on it later may be known to no timer.
    pub fn take_opened(&mut self) -> bool {
        std::mem::take(&mut self.opened)
    }

    /// The shelf that begins at this offset is to be told as it stands; false if there is none.
    pub fn hold(&mut self, first: u64) -> bool {
        let shelf = shelf_of(first);
        match self.shelves.get(&shelf) {
            None => return false,
            Some(Shelf::Closed(closed)) => self.told.push((shelf, closed.chunk.clone())),
            Some(Shelf::Open(_)) => {
                self.held.insert(shelf);
            }
        }
        true
    }

    /// Whether shelves are held that were not told.
    pub fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// Tells as many of the shelves that are held, at most; returns how many.
    pub fn tell(&mut self, most: usize) -> usize {
        let mut count = 0;
        while count < most
            && let Some(&shelf) = self.held.first()
        {
            self.tell_shelf(shelf);
            count += 1;
        }
        count
    }

    /// What was told since this was asked: the first offset of each shelf, and its chunk.
    pub fn take_told(&mut self) -> impl Iterator<Item = (u64, Bytes)> {
        let told = std::mem::take(&mut self.told).into_iter();
        told.map(|(shelf, chunk)| (shelf << ENTRIES_SHIFT, chunk))
    }

    fn tell_shelf(&mut self, shelf: u64) {
        if self.held.remove(&shelf) {
            let chunk = self.chunk(shelf << ENTRIES_SHIFT);
            self.told.extend(chunk.map(|chunk| (shelf, chunk)));
        }
    }

    /// A shelf's entries, to change them.
    fn open(&mut self, shelf: u64) -> Option<&mut Entries> {
        if !planted::is(Bug::SnapshotMoves) {
            self.tell_shelf(shelf);
        }
        let held = self.shelves.get_mut(&shelf)?;
        if let Shelf::Closed(closed) = held {
            let entries = closed.entries.take().unwrap_or_else(|| closed.read());
            for (offset, retry) in &entries {
                if let Some(due) = retry.due() {
                    let order = if retry.suspect {
                        &mut self.alone
                    } else {
                        &mut self.due
                    };
                    order.insert((due, *offset));
                }
            }
            self.closed_waiting -= closed.waiting;
            if let Some((first, _)) = closed.due {
                self.closed.remove(&(first, shelf));
            }
            *held = Shelf::Open(entries);
            self.opened = true;
        }
        match held {
            Shelf::Open(entries) => Some(entries),
            Shelf::Closed(_) => None,
        }
    }

    fn wait_no_more(&mut self, due: Stamp, offset: u64) {
        if !self.due.remove(&(due, offset)) {
            self.alone.remove(&(due, offset));
        }
    }

    pub fn clear(&mut self) {
        self.tell(usize::MAX);
        let told = std::mem::take(&mut self.told);
        *self = Self {
            told,
            ..Self::default()
        };
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, &Retry)> {
        let all = self.shelves.values().flat_map(Shelf::entries);
        all.map(|(offset, retry)| (*offset, &**retry))
    }

    /// Entries of `first..end`.
    pub fn range(&self, first: u64, end: u64) -> impl Iterator<Item = (u64, &Retry)> {
        // Without the shelf behind, which may be closed.
        let last = end.saturating_sub(1).max(first);
        self.shelves
            .range(shelf_of(first)..=shelf_of(last))
            .flat_map(move |(_, shelf)| shelf.entries().range(first..end))
            .map(|(offset, retry)| (*offset, &**retry))
    }

    /// Entries whose last failure was the loss of a session.
    pub fn lost(&self) -> impl Iterator<Item = (u64, &Retry)> {
        let open = self.shelves.values().filter_map(|shelf| match shelf {
            Shelf::Open(entries) => Some(entries),
            Shelf::Closed(_) => None,
        });
        let all = open.flatten().map(|(offset, retry)| (*offset, &**retry));
        all.filter(|(_, retry)| retry.lost)
    }

    /// The first offset of every shelf.
    pub fn shelves(&self) -> impl Iterator<Item = u64> {
        self.shelves.keys().map(|shelf| shelf << ENTRIES_SHIFT)
    }

    /// The chunk of the shelf that begins at this offset; a closed one is as a snapshot told it.
    pub fn chunk(&self, first: u64) -> Option<Bytes> {
        match self.shelves.get(&shelf_of(first))? {
            Shelf::Closed(closed) => Some(closed.chunk.clone()),
            Shelf::Open(entries) => {
                let entries = entries.iter();
                retries::shelf(entries.map(|(offset, retry)| (*offset, &**retry)))
            }
        }
    }

    /// Whether the shelf that begins at this offset is as a snapshot told it.
    #[cfg(test)]
    pub fn is_closed(&self, first: u64) -> bool {
        matches!(self.shelves.get(&shelf_of(first)), Some(Shelf::Closed(_)))
    }

    /// Waiting entries of open shelves that may go to any session, by (due, offset).
    pub fn due(&self) -> &BTreeSet<(Stamp, u64)> {
        &self.due
    }

    /// Waiting entries that go to a session that holds nothing else.
    pub fn alone(&self) -> &BTreeSet<(Stamp, u64)> {
        &self.alone
    }

    /// Entries that wait.
    pub fn waiting(&self) -> u64 {
        (self.due.len() + self.alone.len()) as u64 + self.closed_waiting
    }

    /// Entries that are due.
    pub fn ready(&self, now: Stamp) -> u64 {
        let open = due_in(&self.due, now) + due_in(&self.alone, now);
        let closed = self.closed_by(now).map(|closed| closed.ready(now));
        (open + closed.sum::<usize>()) as u64
    }

    /// The earliest due time of all.
    pub fn first_due(&self) -> Option<Stamp> {
        let firsts = [&self.due, &self.alone, &self.closed].map(BTreeSet::first);
        firsts.into_iter().flatten().map(|(due, _)| *due).min()
    }

    /// The earliest due time after `now`.
    pub fn next_due(&self, now: Stamp) -> Option<Stamp> {
        let closed = self
            .closed_by(now)
            .filter_map(|closed| closed.next_due(now));
        self.next_known_due(now).into_iter().chain(closed).min()
    }

    /// The same, without what is due later on a closed shelf where something is due now: for a timer, which is set
    /// again when a shelf was opened.
    pub fn next_known_due(&self, now: Stamp) -> Option<Stamp> {
        let later = |order: &BTreeSet<(Stamp, u64)>| {
            let next = order.range((now.next(), 0)..).next();
            next.map(|(due, _)| *due)
        };
        let later = [&self.due, &self.alone, &self.closed].map(later);
        later.into_iter().flatten().min()
    }

    /// Closed shelves on which something is due.
    fn closed_by(&self, now: Stamp) -> impl Iterator<Item = &Closed> {
        let closed = self.closed.range(..=(now, u64::MAX));
        closed.filter_map(|(_, shelf)| match self.shelves.get(shelf)? {
            Shelf::Closed(closed) => Some(closed),
            Shelf::Open(_) => None,
        })
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn check_invariants(&self) {
        let (mut waiting, mut closed_waiting) = (0, 0);
        for (number, shelf) in &self.shelves {
            let entries = shelf.entries();
            let all_here = entries.keys().all(|at| shelf_of(*at) == *number);
            assert!(all_here && !entries.is_empty(), "shelves hold their own");
            let is_open = matches!(shelf, Shelf::Open(_));
            for (offset, retry) in entries {
                assert!(
                    is_open || !(retry.suspect || retry.lost),
                    "suspects stand on open shelves"
                );
                let Some(due) = retry.due() else {
                    continue;
                };
                let at = (due, *offset);
                let orders = [&self.due, &self.alone].map(|order| order.contains(&at));
                let places = orders.into_iter().filter(|is_there| *is_there).count();
                assert_eq!(
                    places,
                    usize::from(is_open),
                    "a waiting entry stands in one order"
                );
                waiting += 1;
                closed_waiting += u64::from(!is_open);
            }
            if let Shelf::Closed(closed) = shelf {
                let mut dues: Vec<_> = entries.values().filter_map(|retry| retry.due()).collect();
                dues.sort_unstable();
                assert_eq!(
                    closed.dues(),
                    dues,
                    "a closed shelf tells when its entries are due"
                );
                let dues = dues.first().copied().zip(dues.last().copied());
                assert_eq!(closed.due, dues, "a closed shelf knows when it is due");
                let is_told = dues.is_none_or(|(first, _)| self.closed.contains(&(first, *number)));
                assert!(is_told, "and is opened then");
            }
        }
        assert_eq!(
            waiting,
            self.waiting(),
            "only waiting entries stand in an order"
        );
        assert_eq!(closed_waiting, self.closed_waiting, "what waits is counted");
        let bytes: u64 = self.iter().map(|(_, retry)| retry.bytes()).sum();
        assert_eq!(bytes, self.bytes, "retry state is counted");
        let is_open = |shelf| matches!(self.shelves.get(shelf), Some(Shelf::Open(_)));
        assert!(
            self.held.iter().all(is_open),
            "what is held has not been told"
        );
    }
}

/// How many are due. Counted as far as there are others that are not: mostly nearly all are due, or nearly none.
fn due_in(order: &BTreeSet<(Stamp, u64)>, now: Stamp) -> usize {
    let mut later = order.range((now.next(), 0)..);
    let due = order.range(..=(now, u64::MAX));
    let counted = due.take_while(|_| later.next().is_some()).count();
    if later.next().is_some() {
        counted
    } else {
        order.len() - counted
    }
}

fn shelf_of(offset: u64) -> u64 {
    offset >> ENTRIES_SHIFT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_are_due_are_counted_whether_they_are_few_or_many() {
        for (due, later) in [(0, 0), (0, 5), (5, 0), (3, 3), (2, 7), (7, 2)] {
            let due_at = |offset| (Stamp(10 - offset % 2), offset);
            let later_at = |offset| (Stamp(11 + offset % 2), offset);
            let order = (0..due).map(due_at).chain((0..later).map(later_at));
            let order: BTreeSet<_> = order.collect();
            assert_eq!(due_in(&order, Stamp(10)), due as usize, "{due} and {later}");
        }
    }
}
