//! Entries that stand side by side in a sealed segment, read at once and past the page cache.
//!
//! For who reads much in order: one call of the disk brings many records, nothing is mapped in page by
//! page, and their bodies share the memory that they were read into.
//!
//! Invariant: a record is handed out only if its entry's header, its place in the table and its own
//! checksum agree. It deliberately has no errors: whatever is not as expected is `None`, and reading
//! that record by itself (see `reader`) says what is wrong.

use bytes::Bytes;

use crate::buffer::BufferPool;
use crate::directory::Spot;
use crate::entry::{EntryHeader, EntryKind, LogIndex, Place};
use crate::error::ReadError;
use crate::reader::{EntryAt, LogReader, stands_at};
use crate::record::{RECORD_HEADER_BYTES, RecordBytes};
use crate::retire::{Held, Pin};
use crate::storage::{Storage, StorageFile};
use crate::tables::Segment;

/// Entries that can be read at once; nothing is read yet.
pub struct SideBySide<S: Storage> {
    segment: Pin<Segment<S::File>>,
    spots: Vec<Spot>,
    pool: BufferPool,
}

impl<S: Storage> LogReader<S> {
    /// The entries from `first` up to `last`, if that stands in a sealed segment: at least one, until
    /// they have `bytes` or the next would make them larger than `bytes_max`.
    pub fn side_by_side(
        &self,
        first: LogIndex,
        last: LogIndex,
        bytes: usize,
        bytes_max: usize,
    ) -> Option<SideBySide<S>> {
        let segment = self.tables.read().holding(first).and_then(Held::pin)?;
        let sealed = segment.sealed()?;
        let mut directory = sealed.directory();
        let mut spots: Vec<Spot> = Vec::new();
        let mut total = 0;
        for nth in directory.spot_at(first).ok()?..sealed.footer.entries {
            let spot = directory.nth_spot(nth).ok()?;
            let behind = |before: &Spot| before.position() + before.bytes() as u64;
            let is_next = match spots.last() {
                None => spot.index == first,
                Some(before) => behind(before) == spot.position() && spot.index <= last,
            };
            if !is_next || total + spot.bytes() > bytes_max {
                break;
            }
            total += spot.bytes();
            spots.push(spot);
            if total >= bytes {
                break;
            }
        }
        drop(directory);
        (!spots.is_empty()).then(|| SideBySide {
            segment,
            spots,
            pool: self.pool.clone(),
        })
    }
}

impl<S: Storage> SideBySide<S> {
    /// Bytes that reading takes.
    pub fn bytes(&self) -> usize {
        self.spots.iter().map(Spot::bytes).sum()
    }

    /// The last of the entries.
    pub fn last(&self) -> LogIndex {
        self.spots.last().map_or(LogIndex::NONE, |spot| spot.index)
    }

    /// Reads them. Blocks on the disk.
    pub fn read(self) -> Option<Stretch> {
        let mut buf = self.pool.take_blocks(self.bytes());
        let from = self.spots.first()?.position();
        let file = &self.segment.sealed()?.file;
        let read = file.read_past_cache_at(from, &mut buf).ok()?;
        (read == buf.len()).then(|| Stretch {
            bytes: buf.freeze(),
            segment: self.segment.uuid,
            spots: self.spots,
        })
    }
}

/// Entries in memory.
pub struct Stretch {
    bytes: Bytes,
    segment: [u8; 16],
    spots: Vec<Spot>,
}

impl Stretch {
    /// Lets `what` live until the last of the memory's slices is dropped.
    #[must_use]
    pub fn keeping(self, what: impl Send + 'static) -> Stretch {
        let bytes = Bytes::from_owner(Keeping {
            bytes: self.bytes,
            _what: what,
        });
        Stretch { bytes, ..self }
    }

    /// One record, verified by its checksum; its body is a slice of the whole memory.
    pub fn record(&self, place: Place) -> Option<RecordBytes> {
        let nth = self
            .spots
            .binary_search_by_key(&place.index, |spot| spot.index);
        let spot = *self.spots.get(nth.ok()?)?;
        let from = (spot.position() - self.spots.first()?.position()) as usize;
        let entry = self.bytes.get(from..from + spot.bytes())?;
        let (header, _) = EntryHeader::decode(entry).ok()?;
        if !stands_at(&header, self.segment, spot) || header.kind != EntryKind::Normal {
            return None;
        }
        let fill = |at: usize, buf: &mut [u8]| {
            let there = at.checked_add(buf.len()).and_then(|to| entry.get(at..to));
            buf.copy_from_slice(there.ok_or(ReadError::NotFound(place.index))?);
            Ok(())
        };
        let (head, at) = EntryAt { header, fill }.seek(place.record).ok()?;
        let body = at + RECORD_HEADER_BYTES..at + RECORD_HEADER_BYTES + head.body_bytes();
        if body.end > header.used_bytes() {
            return None;
        }
        let body = self.bytes.slice(from + body.start..from + body.end);
        head.with_body(body)
    }
}

struct Keeping<T> {
    bytes: Bytes,
    _what: T,
}

impl<T> AsRef<[u8]> for Keeping<T> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}
