//! One entry of the log: a commit group on disk.
//!
//! Owns the entry header and the judgement whether bytes are an entry. Integers are little-endian.
//!
//! ```text
//!  0  magic "MPEN"   4  version u16   6  flags u16     8  header crc u32   12  payload bytes u32
//! 16  kind u8       17  zero [3]     20  records u32  24  index u64
//! 32  term u64      40  segment uuid [16]
//! 56  epoch u32     60  previous header's crc u32     64  durable index u64
//! 72  stamp u64     80  payload crc u32               84  zero u32         88  file position u64
//! 96  records (see `record`), then their table: one u32 offset from the entry's start for each
//!     zeros up to the next block
//! ```
//!
//! Invariants: an entry begins on a block; a valid header never consists of zeros (the magic) and no
//! length is believed before the header's own crc; `durable < index`. The payload crc covers the record
//! headers and the table; each record header covers its own body, so bodies are hashed once.
//! The position makes a copy of an entry inside somebody's payload, or a misdirected write, invalid.
//!
//! It deliberately does not know files: where an entry stands is the segment's business.

use std::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::record::Records;
use crate::storage::{BLOCK_BYTES, is_zero};

/// Position of an entry in the log: 1, 2, 3…; 0 means "nothing yet".
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct LogIndex(pub u64);

impl LogIndex {
    pub const NONE: LogIndex = LogIndex(0);

    pub fn next(self) -> LogIndex {
        LogIndex(self.0 + 1)
    }

    /// The index before this one; `NONE` has none before it.
    pub fn previous(self) -> LogIndex {
        LogIndex(self.0.saturating_sub(1))
    }
}

impl fmt::Display for LogIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One record: its entry and its number in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub index: LogIndex,
    pub record: u32,
}

/// What an entry is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A commit group.
    Normal,
    /// Empty; it vouches for the entries before it.
    Blank,
    /// A change of the replicas' membership; none is written yet.
    Membership,
}

/// The header of one entry, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryHeader {
    pub kind: EntryKind,
    pub index: LogIndex,
    pub term: u64,
    pub segment: [u8; 16],
    /// The recovery epoch in which it was written.
    pub epoch: u32,
    pub previous_crc: u32,
    /// What was durable when it was written: it vouches for this index.
    pub durable: LogIndex,
    /// The last record's stamp; 0 without records.
    pub stamp: u64,
    pub records: u32,
    pub payload_bytes: u32,
    pub payload_crc: u32,
    pub position: u64,
}

impl EntryHeader {
    /// The 96 bytes and their crc, which the next entry's header repeats.
    pub(crate) fn encode(&self) -> ([u8; HEADER_BYTES], u32) {
        debug_assert!(self.durable < self.index);
        let mut raw = RawHeader {
            magic: MAGIC,
            version: U16::new(VERSION),
            flags: U16::ZERO,
            header_crc: U32::ZERO,
            payload_bytes: U32::new(self.payload_bytes),
            kind: self.kind.code(),
            zero: [0; 3],
            records: U32::new(self.records),
            index: U64::new(self.index.0),
            term: U64::new(self.term),
            segment: self.segment,
            epoch: U32::new(self.epoch),
            previous_crc: U32::new(self.previous_crc),
            durable: U64::new(self.durable.0),
            stamp: U64::new(self.stamp),
            payload_crc: U32::new(self.payload_crc),
            zero_too: U32::ZERO,
            position: U64::new(self.position),
        };
        let crc = crc32fast::hash(raw.as_bytes());
        raw.header_crc = U32::new(crc);
        (zerocopy::transmute!(raw), crc)
    }

    /// Judges the header at the start of `bytes` by itself; returns its crc too.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(EntryHeader, u32), Defect> {
        let (raw, _) = RawHeader::read_from_prefix(bytes).map_err(|_| Defect::Length)?;
        if raw.magic != MAGIC {
            return Err(Defect::Magic);
        }
        let mut unsigned = raw;
        unsigned.header_crc = U32::ZERO;
        let crc = crc32fast::hash(unsigned.as_bytes());
        if crc != raw.header_crc.get() {
            return Err(Defect::HeaderCrc);
        }
        let known = raw.version.get() == VERSION && raw.flags == U16::ZERO;
        let kind = EntryKind::from_code(raw.kind).filter(|_| known);
        let header = EntryHeader {
            kind: kind.ok_or(Defect::Version)?,
            index: LogIndex(raw.index.get()),
            term: raw.term.get(),
            segment: raw.segment,
            epoch: raw.epoch.get(),
            previous_crc: raw.previous_crc.get(),
            durable: LogIndex(raw.durable.get()),
            stamp: raw.stamp.get(),
            records: raw.records.get(),
            payload_bytes: raw.payload_bytes.get(),
            payload_crc: raw.payload_crc.get(),
            position: raw.position.get(),
        };
        if header.durable >= header.index {
            return Err(Defect::Index);
        }
        Ok((header, crc))
    }

    /// The format of an entry that a newer version wrote at `position` of this segment. Magic, version,
    /// header crc, segment, epoch and position keep their places in every format, so that a payload
    /// cannot pass for one.
    pub(crate) fn newer(bytes: &[u8], segment: [u8; 16], epoch: u32, position: u64) -> Option<u16> {
        if EntryHeader::decode(bytes) != Err(Defect::Version) {
            return None;
        }
        let (raw, _) = RawHeader::read_from_prefix(bytes).ok()?;
        let here = (raw.segment, raw.epoch.get(), raw.position.get());
        (here == (segment, epoch, position)).then(|| raw.version.get().max(VERSION + 1))
    }

    /// Header and payload without the padding.
    pub(crate) fn used_bytes(&self) -> usize {
        HEADER_BYTES + self.payload_bytes as usize
    }

    /// What the entry takes on disk.
    pub(crate) fn disk_bytes(&self) -> usize {
        self.used_bytes().next_multiple_of(BLOCK_BYTES)
    }
}

/// Judges a whole entry, header, records, table and padding, whose header was decoded before.
pub(crate) fn check_payload(header: &EntryHeader, entry: &[u8]) -> Result<(), Defect> {
    if entry.len() < header.disk_bytes() {
        return Err(Defect::Length);
    }
    let padding = &entry[header.used_bytes()..header.disk_bytes()];
    if !is_zero(padding) {
        return Err(Defect::Padding);
    }
    Records::new(header, entry).check()
}

/// Why bytes are not the entry that was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Defect {
    #[error("no entry begins here")]
    Magic,
    #[error("the header's checksum is wrong")]
    HeaderCrc,
    #[error("the entry has an unknown version or kind")]
    Version,
    #[error("the entry belongs to another segment or place")]
    Foreign,
    #[error("the index is out of order")]
    Index,
    #[error("the entry does not follow the one before it")]
    Chain,
    #[error("a length reaches beyond its container")]
    Length,
    #[error("the checksum over the record headers is wrong")]
    PayloadCrc,
    #[error("a record's checksum is wrong")]
    RecordCrc,
    #[error("padding is not zero")]
    Padding,
}

impl EntryKind {
    fn code(self) -> u8 {
        match self {
            EntryKind::Normal => 1,
            EntryKind::Blank => 2,
            EntryKind::Membership => 3,
        }
    }

    fn from_code(code: u8) -> Option<EntryKind> {
        match code {
            1 => Some(EntryKind::Normal),
            2 => Some(EntryKind::Blank),
            3 => Some(EntryKind::Membership),
            _ => None,
        }
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    version: U16,
    flags: U16,
    header_crc: U32,
    payload_bytes: U32,
    kind: u8,
    zero: [u8; 3],
    records: U32,
    index: U64,
    term: U64,
    segment: [u8; 16],
    epoch: U32,
    previous_crc: U32,
    durable: U64,
    stamp: U64,
    payload_crc: U32,
    zero_too: U32,
    position: U64,
}

pub(crate) const HEADER_BYTES: usize = 96;
const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

const MAGIC: [u8; 4] = *b"MPEN";
const VERSION: u16 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> EntryHeader {
        EntryHeader {
            kind: EntryKind::Normal,
            index: LogIndex(7),
            term: 0,
            segment: [9; 16],
            epoch: 3,
            previous_crc: 0xAABB_CCDD,
            durable: LogIndex(6),
            stamp: 1_000,
            records: 2,
            payload_bytes: 64,
            payload_crc: 5,
            position: 8192,
        }
    }

    #[test]
    fn a_header_comes_back_as_it_was() {
        let (bytes, crc) = header().encode();
        assert_eq!(EntryHeader::decode(&bytes), Ok((header(), crc)));
    }

    #[test]
    fn zeros_are_no_header() {
        assert_eq!(EntryHeader::decode(&[0; 4096]), Err(Defect::Magic));
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_noticed() {
        let (bytes, _) = header().encode();
        for bit in 0..HEADER_BYTES * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(EntryHeader::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_short_header_is_refused() {
        let (bytes, _) = header().encode();
        assert_eq!(EntryHeader::decode(&bytes[..95]), Err(Defect::Length));
    }
}
