//! Reading from other threads: which records hold an offset, and their bytes.
//!
//! Owns nothing; every call looks at the current segments and then reads without a lock. Only what
//! is durable is ever in the tables. May block on the disk, so it belongs on reader threads.
//!
//! It deliberately caches nothing: the page cache does, and hot entries are kept as `Bytes` by who
//! appended them.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;

use crate::buffer::BufferPool;
use crate::directory::{Row, Spot, Unreadable};
use crate::entry::{EntryHeader, EntryKind, HEADER_BYTES, Place};
use crate::error::{IndexRange, ReadError};
use crate::record::{RECORD_HEADER_BYTES, RecordBytes, RecordHead, table_slot_at};
use crate::retire::Held;
use crate::segment::Contents;
use crate::storage::{Storage, StorageFile};
use crate::tables::{Body, SealedBody, Segment, Tables};

/// A handle for reading. Clones share the log's tables.
pub struct LogReader<S: Storage> {
    pub(crate) tables: Arc<RwLock<Tables<S::File>>>,
    pub(crate) pool: BufferPool,
}

impl<S: Storage> LogReader<S> {
    pub(crate) fn new(tables: Arc<RwLock<Tables<S::File>>>, pool: BufferPool) -> LogReader<S> {
        LogReader { tables, pool }
    }

    /// The row that holds `offset`, or the topic's next one behind it.
    pub fn find(&self, topic: u32, offset: u64) -> Result<Option<Row>, ReadError> {
        Ok(self.rows(topic, offset, 1)?.pop())
    }

    /// Up to `max` rows in order, beginning with the one that holds `from`, or the next behind it.
    pub fn rows(&self, topic: u32, from: u64, max: usize) -> Result<Vec<Row>, ReadError> {
        let mut rows = Vec::new();
        let mut offset = from;
        while rows.len() < max {
            let segments = self.tables.read().with_topic(topic, offset);
            let before = rows.len();
            for segment in segments {
                rows_of(&segment, topic, offset, max, &mut rows)?;
            }
            match rows.last() {
                Some(last) if rows.len() > before => offset = last.end(),
                _ => break,
            }
        }
        Ok(rows)
    }

    /// The lost entries that may have held an offset for which there is no row; `None` if it was let go.
    pub fn lost_with(&self, topic: u32, offset: u64) -> Option<IndexRange> {
        self.tables.read().lost_with(topic, offset)
    }

    /// Offset of the topic's first message with a stamp of at least `stamp`.
    pub fn offset_at_stamp(&self, topic: u32, stamp: u64) -> Result<Option<u64>, ReadError> {
        let (sealed, open) = {
            let tables = self.tables.read();
            let late = |segment: &&Held<Segment<S::File>>| {
                let span = segment.sealed().and_then(|sealed| sealed.span(topic));
                span.is_some_and(|span| span.last_stamp >= stamp)
            };
            let sealed = tables
                .sealed_with_topic(topic)
                .find(late)
                .and_then(Held::pin);
            (
                sealed,
                tables.open().filter_map(Held::pin).collect::<Vec<_>>(),
            )
        };
        if let Some(segment) = sealed
            && let Some(body) = segment.sealed()
            && let Some(span) = body.span(topic)
        {
            let mut directory = body.directory();
            let row = directory
                .row_at_stamp(span, stamp)
                .and_then(|nth| directory.nth_row(nth));
            return row
                .map(|row| Some(row.base))
                .map_err(|error| segment.unreadable(error));
        }
        let mut tables = open.iter().filter_map(|segment| segment.open_table());
        Ok(tables
            .find_map(|table| table.read().find_stamp(topic, stamp))
            .map(|row| row.base))
    }

    /// One record, verified by its checksum.
    pub fn record(&self, place: Place) -> Result<RecordBytes, ReadError> {
        self.record_within(place, usize::MAX)
    }

    /// As `record`, if its body has at most so many bytes; else nothing is allocated for it.
    pub fn record_within(&self, place: Place, bytes_max: usize) -> Result<RecordBytes, ReadError> {
        let index = place.index;
        let (segment, damage) = {
            let tables = self.tables.read();
            (
                tables.holding(index).and_then(Held::pin),
                tables.damage_at(index),
            )
        };
        let segment = segment.ok_or(ReadError::NotFound(index))?;
        let Some(spot) = segment.spot(index)? else {
            // An entry that is whole stays in its segment until the segment is cleaned.
            let is_lost = segment.contents == Contents::Whole && segment.range().contains(index);
            let one = IndexRange {
                first: index,
                last: index,
            };
            let damage = damage.or(is_lost.then_some(one));
            return Err(damage.map_or(ReadError::NotFound(index), ReadError::Damaged));
        };
        read_record(&segment, spot, place, bytes_max, &self.pool)
    }

    /// Who is about to read these records of one segment and what is between them, at most `bytes`, has the
    /// disk asked for all of it at once. Only of a segment that is mapped.
    pub fn reads(&self, first: Place, last: Place, bytes: usize) {
        let pinned = self.tables.read().holding(first.index).and_then(Held::pin);
        if let Some(segment) = pinned
            && let Some(map) = segment.map()
            && let Ok(Some(first)) = segment.spot(first.index)
            && let Ok(Some(last)) = segment.spot(last.index)
        {
            let (from, to) = (
                first.position() as usize,
                last.position() as usize + last.bytes(),
            );
            map.will_need(from..to.min(from.saturating_add(bytes)));
        }
    }

    /// Who has just read up to this record, `bytes` of it and before, reads on: has as much read into
    /// memory, so far ahead that it is there in time. Only of a segment that is mapped.
    pub fn reads_on(&self, place: Place, bytes: usize) {
        let pinned = self.tables.read().holding(place.index).and_then(Held::pin);
        if let Some(segment) = pinned
            && let Some(map) = segment.map()
            && let Ok(Some(spot)) = segment.spot(place.index)
        {
            let from = spot.position() as usize + spot.bytes() + AHEAD_BYTES;
            map.will_need(from..from.saturating_add(bytes));
        }
    }
}

impl<S: Storage> Clone for LogReader<S> {
    fn clone(&self) -> Self {
        LogReader {
            tables: self.tables.clone(),
            pool: self.pool.clone(),
        }
    }
}

fn rows_of<F: StorageFile>(
    segment: &Segment<F>,
    topic: u32,
    offset: u64,
    max: usize,
    rows: &mut Vec<Row>,
) -> Result<(), ReadError> {
    match &segment.body {
        Body::Open { table, .. } => {
            let table = table.read();
            let all = table.topics.get(&topic).map_or(&[][..], Vec::as_slice);
            let from = all.partition_point(|row| row.end() <= offset);
            rows.extend(all[from..].iter().take(max - rows.len()));
            Ok(())
        }
        Body::Sealed(sealed) => {
            sealed_rows(sealed, topic, offset, max, rows).map_err(|error| segment.unreadable(error))
        }
        Body::Lost { .. } => Ok(()),
    }
}

fn sealed_rows<F: StorageFile>(
    sealed: &SealedBody<F>,
    topic: u32,
    offset: u64,
    max: usize,
    rows: &mut Vec<Row>,
) -> Result<(), Unreadable> {
    let Some(span) = sealed.span(topic) else {
        return Ok(());
    };
    let mut directory = sealed.directory();
    let end = u64::from(span.first_row) + u64::from(span.rows);
    let from = directory.row_at(span, offset)?;
    for nth in from..end.min(from + (max - rows.len()) as u64) {
        rows.push(directory.nth_row(nth)?);
    }
    Ok(())
}

fn read_record<F: StorageFile>(
    segment: &Segment<F>,
    spot: Spot,
    place: Place,
    bytes_max: usize,
    pool: &BufferPool,
) -> Result<RecordBytes, ReadError> {
    let damaged = || {
        ReadError::Damaged(IndexRange {
            first: place.index,
            last: place.index,
        })
    };
    let mut header = [0; HEADER_BYTES];
    segment.fill(spot.position(), &mut header)?;
    let (header, _) = EntryHeader::decode(&header).map_err(|_| damaged())?;
    if !stands_at(&header, segment.uuid, spot) {
        return Err(damaged());
    }
    if header.kind != EntryKind::Normal {
        return Err(ReadError::NotFound(place.index));
    }
    let entry = EntryAt {
        header,
        fill: |at, buf: &mut [u8]| segment.fill(spot.position() + at as u64, buf),
    };
    let (head, at) = match entry.seek(place.record) {
        Ok(found) => found,
        Err(Miss::Damaged) => return Err(damaged()),
        Err(Miss::Read(error)) => return Err(error),
        // Only an entry that is whole can say what it does not have.
        Err(Miss::Absent) => {
            segment.read_entry(spot, &mut Vec::new())?;
            return Err(ReadError::NotFound(place.index));
        }
    };
    let body_at = at + RECORD_HEADER_BYTES;
    if body_at + head.body_bytes() > entry.header.used_bytes() {
        return Err(damaged());
    }
    if head.body_bytes() > bytes_max {
        let bytes = head.body_bytes();
        return Err(ReadError::TooLarge { bytes });
    }
    let position = spot.position() + body_at as u64;
    let body = read_body(segment, position, head.body_bytes(), pool)?;
    head.with_body(body).ok_or_else(damaged)
}

/// Fresh memory for a large body costs page faults, so that memory is used again.
fn read_body<F: StorageFile>(
    segment: &Segment<F>,
    position: u64,
    bytes: usize,
    pool: &BufferPool,
) -> Result<Bytes, ReadError> {
    if let Some(mut body) = pool.take_to_fill(bytes) {
        segment.fill(position, &mut body)?;
        return Ok(body.freeze());
    }
    let mut body = vec![0; bytes];
    segment.fill(position, &mut body)?;
    Ok(Bytes::from(body))
}

/// True if this is the header of the entry that is said to stand there.
pub(crate) fn stands_at(header: &EntryHeader, segment: [u8; 16], spot: Spot) -> bool {
    let here = (header.index, header.segment, header.position);
    here == (spot.index, segment, spot.position()) && header.disk_bytes() <= spot.bytes()
}

/// An entry whose bytes are read as they are needed: `fill` reads from a place in it.
pub(crate) struct EntryAt<R> {
    pub header: EntryHeader,
    pub fill: R,
}

pub(crate) enum Miss {
    Absent,
    Damaged,
    Read(ReadError),
}

impl<R: Fn(usize, &mut [u8]) -> Result<(), ReadError>> EntryAt<R> {
    /// Finds a record by its number: at that place in the table, or before it if the entry was cleaned.
    pub fn seek(&self, number: u32) -> Result<(RecordHead, usize), Miss> {
        let (mut from, mut to) = (0, self.header.records);
        let mut nth = number.min(to.saturating_sub(1));
        while from < to {
            let (head, at) = self.nth(nth)?;
            match head.number().cmp(&number) {
                std::cmp::Ordering::Equal => return Ok((head, at)),
                std::cmp::Ordering::Less => from = nth + 1,
                std::cmp::Ordering::Greater => to = nth,
            }
            nth = from + (to - from) / 2;
        }
        Err(Miss::Absent)
    }

    fn nth(&self, nth: u32) -> Result<(RecordHead, usize), Miss> {
        let mut slot = [0; 4];
        let slot_at = table_slot_at(&self.header, nth);
        (self.fill)(slot_at, &mut slot).map_err(Miss::Read)?;
        let at = u32::from_le_bytes(slot) as usize;
        if at < HEADER_BYTES || at + RECORD_HEADER_BYTES > slot_at {
            return Err(Miss::Damaged);
        }
        let mut head = [0; RECORD_HEADER_BYTES];
        (self.fill)(at, &mut head).map_err(Miss::Read)?;
        Ok((RecordHead::decode(&head).ok_or(Miss::Damaged)?, at))
    }
}

/// How far ahead of a sequential reader the disk is asked.
const AHEAD_BYTES: usize = 4 << 20;
