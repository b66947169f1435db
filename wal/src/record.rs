//! Records: the state changes inside an entry, and the group that gathers them.
//!
//! Owns the record header and the building of an entry's payload.
//!
//! ```text
//!  0  body bytes u32   4  crc u32   8  stamp u64   16  number u32   20  kind u8   21  zero [3]
//! 24  body, then zeros up to the next multiple of 8
//! ```
//!
//! Invariants: records lie back to back from the entry header to the table; numbers ascend (without
//! gaps, except in a cleaned entry); the crc covers the header after itself, the length and the body.
//!
//! It deliberately does not know what a body means.

use bytes::Bytes;
use crc32fast::Hasher;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::buffer::{AlignedBuf, BufferPool};
use crate::entry::{Defect, EntryHeader, EntryKind, HEADER_BYTES};
use crate::storage::BLOCK_BYTES;

/// Builder of one entry. Records are copied once, into the memory that is written to disk and that
/// the appended entry's slices share afterwards.
#[derive(Debug)]
pub struct Group {
    buf: AlignedBuf,
    offsets: Vec<u32>,
    headers: Hasher,
    stamp: u64,
}

impl Group {
    pub(crate) fn new(pool: &BufferPool) -> Group {
        let mut buf = pool.take(HEADER_BYTES + BLOCK_BYTES);
        buf.resize(HEADER_BYTES);
        Group {
            buf,
            offsets: Vec::new(),
            headers: Hasher::new(),
            stamp: 0,
        }
    }

    /// Adds a record whose body is the concatenation of `parts`; returns its number.
    pub fn push(&mut self, stamp: u64, kind: u8, parts: &[&[u8]]) -> u32 {
        let number = self.records();
        self.push_numbered(number, stamp, kind, parts);
        number
    }

    /// Bytes that the entry will have before padding.
    pub fn bytes(&self) -> usize {
        self.buf.len() + self.offsets.len() * TABLE_SLOT_BYTES
    }

    /// Makes room for so many bytes of records more, so that they are not moved as the entry grows.
    pub fn reserve(&mut self, bytes: usize) {
        self.buf.reserve(bytes + BLOCK_BYTES);
    }

    pub fn records(&self) -> u32 {
        // `push_numbered` keeps every offset, and so every count, within u32.
        self.offsets.len() as u32
    }

    pub fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    /// As `push`, under a number that was given before (cleaning keeps numbers).
    pub(crate) fn push_numbered(&mut self, number: u32, stamp: u64, kind: u8, parts: &[&[u8]]) {
        let offset = u32::try_from(self.buf.len()).expect("a group is bounded far below 4 GiB");
        let body_bytes: usize = parts.iter().map(|part| part.len()).sum();
        let mut raw = RawRecord {
            body_bytes: U32::new(
                u32::try_from(body_bytes).expect("a record is smaller than 4 GiB"),
            ),
            crc: U32::ZERO,
            stamp: U64::new(stamp),
            number: U32::new(number),
            kind,
            zero: [0; 3],
        };
        let mut hasher = raw.hasher();
        // With room for table and padding, so that completing the entry moves nothing.
        let after = (self.offsets.len() + 1) * TABLE_SLOT_BYTES + BLOCK_BYTES;
        self.buf
            .reserve(RECORD_HEADER_BYTES + padded(body_bytes) + after);
        self.buf.extend_from_slice(raw.as_bytes());
        // Summed and copied bit by bit: a bit is fetched from memory once.
        for bit in parts.iter().flat_map(|part| part.chunks(BIT_BYTES)) {
            hasher.update(bit);
            self.buf.extend_from_slice(bit);
        }
        raw.crc = U32::new(hasher.finalize());
        let at = offset as usize;
        self.buf[at..at + RECORD_HEADER_BYTES].copy_from_slice(raw.as_bytes());
        self.headers.update(raw.as_bytes());
        self.buf.resize(self.buf.len().next_multiple_of(8));
        self.offsets.push(offset);
        self.stamp = stamp;
    }

    /// Completes the entry: table, header, padding. The header's fields about the payload are set here.
    pub(crate) fn finish(mut self, mut header: EntryHeader) -> Finished {
        let mut headers = self.headers;
        let table_at = self.buf.len();
        for offset in &self.offsets {
            self.buf.extend_from_slice(&offset.to_le_bytes());
        }
        headers.update(&self.buf[table_at..]);
        header.records = self.offsets.len() as u32;
        header.payload_bytes = u32::try_from(self.buf.len() - HEADER_BYTES)
            .expect("a group is bounded far below 4 GiB");
        header.payload_crc = headers.finalize();
        header.stamp = self.stamp;
        let (bytes, crc) = header.encode();
        self.buf[..HEADER_BYTES].copy_from_slice(&bytes);
        self.buf.pad_to_block();
        Finished {
            header,
            crc,
            buf: self.buf,
        }
    }
}

/// A complete entry, ready to be written.
#[derive(Debug)]
pub(crate) struct Finished {
    pub header: EntryHeader,
    pub crc: u32,
    pub buf: AlignedBuf,
}

/// One record as it stands in an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    pub number: u32,
    pub stamp: u64,
    pub kind: u8,
    pub body: &'a [u8],
}

/// The records of an entry, in order. Stops at the first that does not fit, which cannot happen in an
/// entry that was checked.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    entry: &'a [u8],
    at: usize,
    end: usize,
    left: u32,
    payload_crc: u32,
}

impl<'a> Records<'a> {
    pub(crate) fn new(header: &EntryHeader, entry: &'a [u8]) -> Records<'a> {
        let used = header.used_bytes().min(entry.len());
        let table_bytes = header.records as usize * TABLE_SLOT_BYTES;
        Records {
            entry: &entry[..used],
            at: HEADER_BYTES,
            end: used.saturating_sub(table_bytes),
            left: header.records,
            payload_crc: header.payload_crc,
        }
    }

    /// Walks all records and the table, and compares every checksum.
    pub(crate) fn check(mut self) -> Result<(), Defect> {
        let mut headers = Hasher::new();
        let mut table = self.entry.get(self.end..).ok_or(Defect::Length)?;
        let mut last = None;
        while self.left > 0 {
            let (slot, rest) = U32::read_from_prefix(table).map_err(|_| Defect::Length)?;
            if slot.get() as usize != self.at {
                return Err(Defect::Length);
            }
            table = rest;
            let (raw, body) = self.step().ok_or(Defect::Length)?;
            if raw.crc_with(body) != raw.crc.get() {
                return Err(Defect::RecordCrc);
            }
            if last.is_some_and(|last| raw.number.get() <= last) {
                return Err(Defect::Index);
            }
            last = Some(raw.number.get());
            headers.update(raw.as_bytes());
        }
        if self.at != self.end || !table.is_empty() {
            return Err(Defect::Length);
        }
        headers.update(&self.entry[self.end..]);
        if headers.finalize() != self.payload_crc {
            return Err(Defect::PayloadCrc);
        }
        Ok(())
    }

    fn step(&mut self) -> Option<(RawRecord, &'a [u8])> {
        let rest = self.entry.get(self.at..self.end)?;
        let (raw, rest) = RawRecord::read_from_prefix(rest).ok()?;
        let body_bytes = raw.body_bytes.get() as usize;
        let body = rest.get(..body_bytes)?;
        let padding = rest.get(body_bytes..padded(body_bytes))?;
        if padding.iter().any(|&byte| byte != 0) {
            return None;
        }
        self.at += RECORD_HEADER_BYTES + padded(body_bytes);
        self.left -= 1;
        Some((raw, body))
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Record<'a>;

    fn next(&mut self) -> Option<Record<'a>> {
        if self.left == 0 {
            return None;
        }
        let (raw, body) = self.step()?;
        Some(Record {
            number: raw.number.get(),
            stamp: raw.stamp.get(),
            kind: raw.kind,
            body,
        })
    }
}

/// One record read back: its body shares the memory it was read into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordBytes {
    pub stamp: u64,
    pub kind: u8,
    pub body: Bytes,
}

/// The first bytes of a record, enough to know how long it is.
pub(crate) struct RecordHead(RawRecord);

impl RecordHead {
    pub fn decode(bytes: &[u8]) -> Option<RecordHead> {
        RawRecord::read_from_prefix(bytes)
            .ok()
            .map(|(raw, _)| RecordHead(raw))
    }

    pub fn number(&self) -> u32 {
        self.0.number.get()
    }

    pub fn body_bytes(&self) -> usize {
        self.0.body_bytes.get() as usize
    }

    /// The record, if `body` is what the checksum was made of.
    pub fn with_body(&self, body: Bytes) -> Option<RecordBytes> {
        (self.0.crc_with(&body) == self.0.crc.get()).then(|| RecordBytes {
            stamp: self.0.stamp.get(),
            kind: self.0.kind,
            body,
        })
    }
}

/// Where record `number` begins, by the table of an entry in memory.
pub(crate) fn table_slot(entry: &[u8], number: u32) -> Option<usize> {
    let (header, _) = EntryHeader::decode(entry).ok()?;
    if header.kind != EntryKind::Normal || number >= header.records {
        return None;
    }
    let at = table_slot_at(&header, number);
    let (slot, _) = U32::read_from_prefix(entry.get(at..)?).ok()?;
    Some(slot.get() as usize)
}

/// Where the table's slot for the `nth` record lies in its entry.
pub(crate) fn table_slot_at(header: &EntryHeader, nth: u32) -> usize {
    header
        .used_bytes()
        .saturating_sub((header.records - nth) as usize * TABLE_SLOT_BYTES)
}

fn padded(body_bytes: usize) -> usize {
    body_bytes.next_multiple_of(8)
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecord {
    body_bytes: U32,
    crc: U32,
    stamp: U64,
    number: U32,
    kind: u8,
    zero: [u8; 3],
}

impl RawRecord {
    /// The checksum of the header; the body comes behind it.
    fn hasher(&self) -> Hasher {
        let mut unsigned = *self;
        unsigned.crc = U32::ZERO;
        let mut hasher = Hasher::new();
        hasher.update(unsigned.as_bytes());
        hasher
    }

    fn crc_with(&self, body: &[u8]) -> u32 {
        let mut hasher = self.hasher();
        hasher.update(body);
        hasher.finalize()
    }
}

/// Bytes of a body that are summed and copied at a time; well within a core's first cache.
const BIT_BYTES: usize = 8 << 10;
pub(crate) const RECORD_HEADER_BYTES: usize = 24;
const _: () = assert!(size_of::<RawRecord>() == RECORD_HEADER_BYTES);
pub(crate) const TABLE_SLOT_BYTES: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{LogIndex, check_payload};

    fn entry() -> Vec<u8> {
        let mut group = Group::new(&BufferPool::new(0));
        group.push(5, 1, &[b"abc", b"", b"defgh"]);
        group.push(6, 2, &[]);
        group.push(7, 3, &[b"0123456789"]);
        let header = EntryHeader {
            kind: EntryKind::Normal,
            index: LogIndex(9),
            term: 0,
            segment: [3; 16],
            epoch: 1,
            previous_crc: 0,
            durable: LogIndex(8),
            stamp: 0,
            records: 0,
            payload_bytes: 0,
            payload_crc: 0,
            position: 4096,
        };
        group.finish(header).buf.to_vec()
    }

    fn judge(bytes: &[u8]) -> Result<(), Defect> {
        let (header, _) = EntryHeader::decode(bytes)?;
        check_payload(&header, bytes)
    }

    #[test]
    fn records_come_back_in_order() {
        let entry = entry();
        assert_eq!(judge(&entry), Ok(()));
        let (header, _) = EntryHeader::decode(&entry).unwrap();
        assert_eq!((header.records, header.stamp), (3, 7));
        let records: Vec<_> = Records::new(&header, &entry)
            .map(|record| (record.number, record.stamp, record.kind, record.body))
            .collect();
        let expected: [(u32, u64, u8, &[u8]); 3] = [
            (0, 5, 1, b"abcdefgh"),
            (1, 6, 2, b""),
            (2, 7, 3, b"0123456789"),
        ];
        assert_eq!(records, expected);
    }

    #[test]
    fn every_flipped_bit_of_an_entry_is_noticed() {
        let good = entry();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(judge(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn an_entry_that_was_cut_short_is_noticed() {
        let good = entry();
        for len in [0, 95, 96, 200, good.len() - 1] {
            assert!(judge(&good[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn completing_a_group_moves_nothing() {
        let pool = BufferPool::new(0);
        for body in [0, 100, 8000 - 64, 60_000, 262_000] {
            let mut group = Group::new(&pool);
            group.push(1, 1, &[&vec![7; body]]);
            let before = group.buf.as_ptr();
            let (header, _) = EntryHeader::decode(&entry()).unwrap();
            assert_eq!(group.finish(header).buf.as_ptr(), before, "{body} bytes");
        }
    }
}
