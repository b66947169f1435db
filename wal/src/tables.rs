//! The segments that exist now, as the log and all readers see them.
//!
//! Owns the list of segments, their tables and the index from topics to sealed segments. The log is the
//! only one that changes it; readers pin what they need under the lock and read without it, and a segment that
//! is removed meanwhile stays until the last pin of it is gone.
//!
//! Invariants: segments do not overlap; sealed ones come before open ones; a topic's offsets ascend with
//! the segments.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::directory::{Directory, OpenTable, Row, Spot, TopicSpan, Unreadable};
use crate::entry::{EntryHeader, LogIndex, check_payload};
use crate::error::{IndexRange, ReadError};
use crate::retire::{Held, Pin};
use crate::segment::{Contents, Footer, SegmentId};
use crate::storage::{BLOCK_BYTES, Map, StorageFile, read_exact_at};

/// One segment, open, sealed or lost.
#[derive(Debug)]
pub(crate) struct Segment<F> {
    pub id: SegmentId,
    pub generation: u32,
    pub uuid: [u8; 16],
    pub epoch: u32,
    pub first: LogIndex,
    pub contents: Contents,
    pub name: String,
    pub body: Body<F>,
}

#[derive(Debug)]
pub(crate) enum Body<F> {
    Open {
        file: Arc<F>,
        table: RwLock<OpenTable>,
    },
    Sealed(SealedBody<F>),
    /// The file is gone or nothing can be found in it.
    Lost {
        last: LogIndex,
    },
}

#[derive(Debug)]
pub(crate) struct SealedBody<F> {
    pub file: F,
    pub map: Option<Map>,
    pub footer: Footer,
    /// Shared with who asks what the log consists of.
    pub spans: Arc<[TopicSpan]>,
}

impl<F: StorageFile> Segment<F> {
    /// The last entry; the one before `first` if there is none yet.
    pub fn last(&self) -> LogIndex {
        match &self.body {
            Body::Open { table, .. } => table
                .read()
                .spots
                .last()
                .map_or(self.first.previous(), |spot| spot.index),
            Body::Sealed(sealed) => sealed.footer.last,
            Body::Lost { last } => *last,
        }
    }

    pub fn range(&self) -> IndexRange {
        IndexRange {
            first: self.first,
            last: self.last(),
        }
    }

    pub fn open_table(&self) -> Option<&RwLock<OpenTable>> {
        match &self.body {
            Body::Open { table, .. } => Some(table),
            _ => None,
        }
    }

    pub fn sealed(&self) -> Option<&SealedBody<F>> {
        match &self.body {
            Body::Sealed(sealed) => Some(sealed),
            _ => None,
        }
    }

    /// The topic's first offset in it.
    fn start_of(&self, topic: u32) -> Option<u64> {
        match &self.body {
            Body::Open { table, .. } => Some(table.read().topics.get(&topic)?.first()?.base),
            Body::Sealed(sealed) => Some(sealed.span(topic)?.first_offset),
            Body::Lost { .. } => None,
        }
    }

    /// The offset behind the topic's last one in it.
    fn end_of(&self, topic: u32) -> Option<u64> {
        match &self.body {
            Body::Open { table, .. } => Some(table.read().topics.get(&topic)?.last()?.end()),
            Body::Sealed(sealed) => Some(sealed.span(topic)?.end_offset),
            Body::Lost { .. } => None,
        }
    }

    /// Where the entry stands; `None` if the segment does not have it.
    pub fn spot(&self, index: LogIndex) -> Result<Option<Spot>, ReadError> {
        match &self.body {
            Body::Open { table, .. } => Ok(table.read().spot(index)),
            Body::Sealed(sealed) => sealed
                .directory()
                .spot(index)
                .map_err(|error| self.unreadable(error)),
            Body::Lost { .. } => Err(self.damaged()),
        }
    }

    /// Where the entries above `after` stand.
    pub fn spots_after(&self, after: LogIndex) -> Result<Vec<Spot>, ReadError> {
        let mut spots = match &self.body {
            Body::Open { table, .. } => table.read().spots.clone(),
            Body::Sealed(sealed) => {
                let mut directory = sealed.directory();
                let all = (0..sealed.footer.entries).map(|nth| directory.nth_spot(nth));
                all.collect::<Result<_, _>>()
                    .map_err(|error| self.unreadable(error))?
            }
            Body::Lost { .. } => Vec::new(),
        };
        spots.retain(|spot| spot.index > after);
        Ok(spots)
    }

    /// What these entries appended; none if only they themselves could tell.
    pub fn rows_of_entries(&self, range: IndexRange) -> Result<Option<Vec<Row>>, ReadError> {
        let Body::Sealed(sealed) = &self.body else {
            return Ok(None);
        };
        let mut directory = sealed.directory();
        let all = (0..sealed.footer.rows).map(|nth| directory.nth_row(nth));
        match all.collect::<Result<Vec<_>, _>>() {
            Ok(mut rows) => {
                rows.retain(|row| range.contains(row.place.index));
                Ok(Some(rows))
            }
            Err(Unreadable::Damaged) => Ok(None),
            Err(error) => Err(self.unreadable(error)),
        }
    }

    /// Reads a whole entry into `buf` and checks all of it.
    pub fn read_entry(&self, spot: Spot, buf: &mut Vec<u8>) -> Result<EntryHeader, ReadError> {
        let damaged = ReadError::Damaged(IndexRange {
            first: spot.index,
            last: spot.index,
        });
        if !self.has_room_for(spot) {
            return Err(damaged);
        }
        buf.resize(spot.bytes(), 0);
        match self.fill(spot.position(), buf) {
            Err(ReadError::Damaged(_)) => return Err(damaged),
            filled => filled?,
        }
        let Ok((header, _)) = EntryHeader::decode(buf) else {
            let newer = EntryHeader::newer(buf, self.uuid, self.epoch, spot.position());
            let newer = newer.map(|found| ReadError::NewerFormat {
                file: self.name.clone(),
                found,
            });
            return Err(newer.unwrap_or(damaged));
        };
        let expected = (spot.index, self.uuid, spot.position());
        let here = (header.index, header.segment, header.position) == expected;
        if here && check_payload(&header, buf).is_ok() {
            Ok(header)
        } else {
            Err(damaged)
        }
    }

    /// A directory may claim anything; an entry lies within the segment's entries.
    fn has_room_for(&self, spot: Spot) -> bool {
        match &self.body {
            Body::Sealed(sealed) => {
                spot.position() + spot.bytes() as u64 <= sealed.footer.entries_end
            }
            Body::Open { .. } | Body::Lost { .. } => true,
        }
    }

    /// Fills `buf` from a position of the file.
    pub fn fill(&self, position: u64, buf: &mut [u8]) -> Result<(), ReadError> {
        let filled = match &self.body {
            Body::Open { file, .. } => read_exact_at(&**file, position, buf),
            Body::Sealed(sealed) => sealed.fill(position, buf),
            Body::Lost { .. } => return Err(self.damaged()),
        };
        filled.map_err(|source| match source.kind() {
            // The file is shorter than it was.
            io::ErrorKind::UnexpectedEof => self.damaged(),
            _ => ReadError::Io {
                file: self.name.clone(),
                source,
            },
        })
    }

    /// The map of a sealed segment, if there is one.
    pub fn map(&self) -> Option<&Map> {
        self.sealed().and_then(|sealed| sealed.map.as_ref())
    }

    pub fn unreadable(&self, error: Unreadable) -> ReadError {
        match error {
            Unreadable::Damaged => self.damaged(),
            Unreadable::Io(source) => ReadError::Io {
                file: self.name.clone(),
                source,
            },
        }
    }

    pub fn damaged(&self) -> ReadError {
        ReadError::Damaged(self.range())
    }
}

impl<F: StorageFile> SealedBody<F> {
    /// Reads the topics by calls and maps the file only then: where the disk reads ahead by megabytes, the first
    /// fault of a cold map waits for all of them, in every segment at a start.
    pub fn open(file: F, footer: Footer) -> Result<SealedBody<F>, Unreadable> {
        let mut body = SealedBody {
            file,
            map: None,
            footer,
            spans: Arc::default(),
        };
        let spans = body.directory().spans();
        body.spans = spans?.into();
        // A process has a bound on its maps too; without one it is read by calls.
        body.map = body.file.map().unwrap_or(None);
        Ok(body)
    }

    pub fn directory(
        &self,
    ) -> Directory<'_, impl FnMut(u64, &mut [u8; BLOCK_BYTES]) -> io::Result<()>> {
        Directory::new(&self.footer, |at, block| self.fill(at, block))
    }

    pub fn fill(&self, position: u64, buf: &mut [u8]) -> io::Result<()> {
        let Some(map) = &self.map else {
            return read_exact_at(&self.file, position, buf);
        };
        let from = usize::try_from(position).map_err(io::Error::other)?;
        if buf.len() > BLOCK_BYTES {
            map.will_need(from..from.saturating_add(buf.len()));
        }
        let slice = from.checked_add(buf.len()).and_then(|to| map.get(from..to));
        buf.copy_from_slice(slice.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    pub fn span(&self, topic: u32) -> Option<&TopicSpan> {
        let at = self
            .spans
            .binary_search_by_key(&topic, |span| span.topic)
            .ok()?;
        Some(&self.spans[at])
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Tables<F> {
    segments: BTreeMap<LogIndex, Held<Segment<F>>>,
    /// topic -> first offset in a sealed segment -> that segment's first index.
    topics: BTreeMap<u32, BTreeMap<u64, LogIndex>>,
    /// Entries that recovery found damaged in open segments.
    damaged: Vec<IndexRange>,
    /// The lost segments among them.
    lost: BTreeSet<LogIndex>,
}

impl<F: StorageFile> Tables<F> {
    pub fn new() -> Tables<F> {
        Tables {
            segments: BTreeMap::new(),
            topics: BTreeMap::new(),
            damaged: Vec::new(),
            lost: BTreeSet::new(),
        }
    }

    /// Adds a segment, or replaces the one with the same first index.
    pub fn put(&mut self, segment: Held<Segment<F>>) {
        self.remove(segment.first);
        for span in segment.sealed().map_or(&[][..], |sealed| &*sealed.spans) {
            self.topics
                .entry(span.topic)
                .or_default()
                .insert(span.first_offset, segment.first);
        }
        if let Body::Lost { .. } = segment.body {
            self.lost.insert(segment.first);
        }
        self.segments.insert(segment.first, segment);
    }

    pub fn remove(&mut self, first: LogIndex) -> Option<Held<Segment<F>>> {
        let segment = self.segments.remove(&first)?;
        self.lost.remove(&first);
        for span in segment.sealed().map_or(&[][..], |sealed| &*sealed.spans) {
            if let Some(firsts) = self.topics.get_mut(&span.topic) {
                firsts.remove(&span.first_offset);
                if firsts.is_empty() {
                    self.topics.remove(&span.topic);
                }
            }
        }
        Some(segment)
    }

    pub fn mark_damaged(&mut self, range: IndexRange) {
        self.damaged.push(range);
    }

    pub fn damage_at(&self, index: LogIndex) -> Option<IndexRange> {
        self.damaged
            .iter()
            .find(|range| range.contains(index))
            .copied()
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Held<Segment<F>>> {
        self.segments.values()
    }

    pub fn by_id(&self, id: SegmentId) -> Option<&Held<Segment<F>>> {
        self.segments.values().find(|segment| segment.id == id)
    }

    /// The segment whose range begins at or before `index`.
    pub fn holding(&self, index: LogIndex) -> Option<&Held<Segment<F>>> {
        self.segments
            .range(..=index)
            .next_back()
            .map(|(_, segment)| segment)
    }

    /// The lost segment that may have held an offset without a row: one between the topic's last row before
    /// the offset and its first behind it.
    pub fn lost_with(&self, topic: u32, offset: u64) -> Option<IndexRange> {
        let mut suspects = self
            .lost
            .iter()
            .filter_map(|first| self.segments.get(first));
        let found = suspects.find(|lost| {
            let before = self.segments.range(..lost.first).rev();
            let end = before
                .into_iter()
                .find_map(|(_, segment)| segment.end_of(topic));
            let mut behind = self.segments.range(lost.first.next()..);
            let start = behind.find_map(|(_, segment)| segment.start_of(topic));
            end.is_none_or(|end| end <= offset) && start.is_none_or(|start| offset < start)
        });
        found.map(|lost| lost.range())
    }

    /// The segments that may hold the topic's offsets from `offset` on, in order; open ones always.
    pub fn with_topic(&self, topic: u32, offset: u64) -> Vec<Pin<Segment<F>>> {
        let mut found = Vec::new();
        if let Some(firsts) = self.topics.get(&topic) {
            let start = firsts
                .range(..=offset)
                .next_back()
                .map_or(offset, |(&first, _)| first);
            let sealed = firsts
                .range(start..)
                .filter_map(|(_, first)| self.segments.get(first));
            found.extend(sealed.take(SEGMENTS_PER_LOOKUP).filter_map(Held::pin));
        }
        if found.len() < SEGMENTS_PER_LOOKUP {
            found.extend(self.open().filter_map(Held::pin));
        }
        found
    }

    /// The sealed segments with the topic, in order.
    pub fn sealed_with_topic(&self, topic: u32) -> impl Iterator<Item = &Held<Segment<F>>> {
        let firsts = self
            .topics
            .get(&topic)
            .into_iter()
            .flat_map(BTreeMap::values);
        firsts.filter_map(|first| self.segments.get(first))
    }

    /// The segments that are not sealed, in order.
    pub fn open(&self) -> impl Iterator<Item = &Held<Segment<F>>> {
        // Few, and all at the end.
        let from_end = self
            .segments
            .values()
            .rev()
            .take_while(|s| s.sealed().is_none());
        let open: Vec<_> = from_end.filter(|s| s.open_table().is_some()).collect();
        open.into_iter().rev()
    }
}

/// A lookup needs the segment with the offset and, if the offset fell into a hole, the next one; a
/// scan asks again from where it stopped.
const SEGMENTS_PER_LOOKUP: usize = 2;
