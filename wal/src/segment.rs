//! A segment: one file of the log.
//!
//! Owns the segment's header, footer and file names.
//!
//! ```text
//! block 0        segment header, zeros
//! blocks 1..     entries, each on a block of its own
//! sealed only:   directory, footer, directory again, footer again, end of the file
//!
//! header  0 magic "MPSEGMT1"  8 version u16  10 flags u16 (1: sparse)  12 crc u32  16 store uuid [16]
//!        32 segment uuid [16] 48 id u64      56 first index u64        64 epoch u32
//!        68 checksum u32 (1: crc32 and xxh3-128)  72 predecessor uuid [16]
//!        88 predecessor's last header crc u32     92 generation u32
//! footer  0 magic "MPFOOTR1"  8 version u16  10 zero u16  12 crc u32  16 segment uuid [16]
//!        32 first index u64  40 last index u64  48 end of entries u64 (bytes)  56 entries u64
//!        64 records u64      72 rows u64        80 topics u64   88 digest [16]
//!       104 last header crc u32  108 directory blocks u32
//! ```
//!
//! Invariants: every entry of a segment has its uuid and its epoch; indexes ascend by one, in a sparse
//! (cleaned) segment with gaps; a sealed segment is never written again. The digest is xxh3-128 over the
//! entry headers in order: each of them covers its payload.

use std::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::entry::LogIndex;
use crate::storage::BLOCK_BYTES;

/// A segment's number; never used again.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct SegmentId(pub u64);

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The header in block 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    pub store: [u8; 16],
    pub uuid: [u8; 16],
    pub id: SegmentId,
    /// 0 as first written, raised by one with each cleaning.
    pub generation: u32,
    pub first: LogIndex,
    pub epoch: u32,
    pub contents: Contents,
    /// All zeros before the first segment.
    pub predecessor: [u8; 16],
    pub predecessor_crc: u32,
}

/// Whether a segment still has every entry of its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Contents {
    Whole,
    /// Cleaned: only live records are left.
    Sparse,
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut raw = RawHeader {
            magic: HEADER_MAGIC,
            version: U16::new(VERSION),
            flags: U16::new(u16::from(self.contents == Contents::Sparse)),
            crc: U32::ZERO,
            store: self.store,
            uuid: self.uuid,
            id: U64::new(self.id.0),
            first: U64::new(self.first.0),
            epoch: U32::new(self.epoch),
            checksum: U32::new(CHECKSUM),
            predecessor: self.predecessor,
            predecessor_crc: U32::new(self.predecessor_crc),
            generation: U32::new(self.generation),
        };
        raw.crc = U32::new(crc32fast::hash(raw.as_bytes()));
        block_of(raw.as_bytes())
    }

    pub(crate) fn decode(block: &[u8]) -> Result<SegmentHeader, SegmentDefect> {
        let (raw, _) = RawHeader::read_from_prefix(block).map_err(|_| SegmentDefect::Header)?;
        let mut unsigned = raw;
        unsigned.crc = U32::ZERO;
        if raw.magic != HEADER_MAGIC || crc32fast::hash(unsigned.as_bytes()) != raw.crc.get() {
            return Err(SegmentDefect::Header);
        }
        let contents = match (raw.version.get(), raw.flags.get(), raw.checksum.get()) {
            (VERSION, 0, CHECKSUM) => Contents::Whole,
            (VERSION, 1, CHECKSUM) => Contents::Sparse,
            (VERSION, ..) => return Err(SegmentDefect::Version(VERSION + 1)),
            (found, ..) => return Err(SegmentDefect::Version(found)),
        };
        Ok(SegmentHeader {
            store: raw.store,
            uuid: raw.uuid,
            id: SegmentId(raw.id.get()),
            generation: raw.generation.get(),
            first: LogIndex(raw.first.get()),
            epoch: raw.epoch.get(),
            contents,
            predecessor: raw.predecessor,
            predecessor_crc: raw.predecessor_crc.get(),
        })
    }

    pub(crate) fn file_name(&self) -> String {
        file_name(self.id, self.generation)
    }
}

/// What is known of a segment once it is sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    pub uuid: [u8; 16],
    pub first: LogIndex,
    pub last: LogIndex,
    /// File position behind the last entry, where the directory begins.
    pub entries_end: u64,
    pub entries: u64,
    pub records: u64,
    pub rows: u64,
    pub topics: u64,
    pub digest: [u8; 16],
    pub last_crc: u32,
    pub directory_blocks: u32,
}

impl Footer {
    pub(crate) fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut raw = RawFooter {
            magic: FOOTER_MAGIC,
            version: U16::new(VERSION),
            zero: U16::ZERO,
            crc: U32::ZERO,
            uuid: self.uuid,
            first: U64::new(self.first.0),
            last: U64::new(self.last.0),
            entries_end: U64::new(self.entries_end),
            entries: U64::new(self.entries),
            records: U64::new(self.records),
            rows: U64::new(self.rows),
            topics: U64::new(self.topics),
            digest: self.digest,
            last_crc: U32::new(self.last_crc),
            directory_blocks: U32::new(self.directory_blocks),
        };
        raw.crc = U32::new(crc32fast::hash(raw.as_bytes()));
        block_of(raw.as_bytes())
    }

    pub(crate) fn decode(block: &[u8]) -> Result<Footer, SegmentDefect> {
        let (raw, _) = RawFooter::read_from_prefix(block).map_err(|_| SegmentDefect::Footer)?;
        let mut unsigned = raw;
        unsigned.crc = U32::ZERO;
        if raw.magic != FOOTER_MAGIC || crc32fast::hash(unsigned.as_bytes()) != raw.crc.get() {
            return Err(SegmentDefect::Footer);
        }
        if raw.version.get() != VERSION {
            return Err(SegmentDefect::Version(raw.version.get()));
        }
        Ok(Footer {
            uuid: raw.uuid,
            first: LogIndex(raw.first.get()),
            last: LogIndex(raw.last.get()),
            entries_end: raw.entries_end.get(),
            entries: raw.entries.get(),
            records: raw.records.get(),
            rows: raw.rows.get(),
            topics: raw.topics.get(),
            digest: raw.digest,
            last_crc: raw.last_crc.get(),
            directory_blocks: raw.directory_blocks.get(),
        })
    }

    /// The format of a footer that a newer version wrote for this segment. Magic, version, crc and uuid keep
    /// their places in every format, so that a payload cannot pass for one.
    pub(crate) fn newer(block: &[u8], uuid: [u8; 16]) -> Option<u16> {
        let Err(SegmentDefect::Version(found)) = Footer::decode(block) else {
            return None;
        };
        let (raw, _) = RawFooter::read_from_prefix(block).ok()?;
        (raw.uuid == uuid).then_some(found)
    }

    /// The size of the sealed file.
    pub(crate) fn file_bytes(&self) -> u64 {
        sealed_bytes(self.entries_end, self.directory_blocks)
    }

    /// Where copy 0 or 1 of the directory begins; its footer follows it.
    pub(crate) fn copy_at(&self, copy: u64) -> u64 {
        self.entries_end + copy * copy_bytes(self.directory_blocks)
    }
}

/// The size of a file whose entries end at `entries_end` once it is sealed.
pub(crate) fn sealed_bytes(entries_end: u64, directory_blocks: u32) -> u64 {
    entries_end + 2 * copy_bytes(directory_blocks)
}

fn copy_bytes(directory_blocks: u32) -> u64 {
    (u64::from(directory_blocks) + 1) * BLOCK_BYTES as u64
}

/// Whether a block is one that sealing writes (a directory block is told by its own magic).
pub(crate) fn is_footer(block: &[u8]) -> bool {
    block.starts_with(&FOOTER_MAGIC)
}

pub(crate) fn file_name(id: SegmentId, generation: u32) -> String {
    format!("seg-{:016x}-{generation:04x}.log", id.0)
}

/// The id and generation that a file's name tells, if it is a segment's.
pub(crate) fn parse_file_name(name: &str) -> Option<(SegmentId, u32)> {
    let (id, generation) = name
        .strip_prefix("seg-")?
        .strip_suffix(".log")?
        .split_once('-')?;
    let id = u64::from_str_radix(id, 16).ok()?;
    Some((SegmentId(id), u32::from_str_radix(generation, 16).ok()?))
}

/// A uuid that no other segment of any store has: a hash of the store's and what is unique in it.
pub(crate) fn derive_uuid(store: [u8; 16], id: SegmentId, generation: u32, epoch: u32) -> [u8; 16] {
    let mut seed = [0; 32];
    seed[..16].copy_from_slice(&store);
    seed[16..24].copy_from_slice(&id.0.to_le_bytes());
    seed[24..28].copy_from_slice(&generation.to_le_bytes());
    seed[28..].copy_from_slice(&epoch.to_le_bytes());
    xxhash_rust::xxh3::xxh3_128(&seed).to_le_bytes()
}

/// Why a file is not the segment that was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentDefect {
    #[error("the file is missing")]
    Missing,
    #[error("the segment header is damaged")]
    Header,
    #[error("both footers are damaged")]
    Footer,
    #[error("the directory is damaged in both copies")]
    Directory,
    #[error("the segment has a newer format ({0})")]
    Version(u16),
    #[error("the file is another segment than the manifest names")]
    Foreign,
}

fn block_of(bytes: &[u8]) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    block[..bytes.len()].copy_from_slice(bytes);
    block
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U16,
    flags: U16,
    crc: U32,
    store: [u8; 16],
    uuid: [u8; 16],
    id: U64,
    first: U64,
    epoch: U32,
    checksum: U32,
    predecessor: [u8; 16],
    predecessor_crc: U32,
    generation: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFooter {
    magic: [u8; 8],
    version: U16,
    zero: U16,
    crc: U32,
    uuid: [u8; 16],
    first: U64,
    last: U64,
    entries_end: U64,
    entries: U64,
    records: U64,
    rows: U64,
    topics: U64,
    digest: [u8; 16],
    last_crc: U32,
    directory_blocks: U32,
}

const HEADER_MAGIC: [u8; 8] = *b"MPSEGMT1";
const FOOTER_MAGIC: [u8; 8] = *b"MPFOOTR1";
const VERSION: u16 = 1;
/// crc32 for entries and records, xxh3-128 for the digest.
const CHECKSUM: u32 = 1;
/// Where a segment's entries begin.
pub(crate) const ENTRIES_START: u64 = BLOCK_BYTES as u64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_and_footer_come_back_as_they_were() {
        let header = SegmentHeader {
            store: [1; 16],
            uuid: [2; 16],
            id: SegmentId(3),
            generation: 4,
            first: LogIndex(5),
            epoch: 6,
            contents: Contents::Sparse,
            predecessor: [7; 16],
            predecessor_crc: 8,
        };
        assert_eq!(SegmentHeader::decode(&header.encode()), Ok(header));
        let footer = Footer {
            uuid: [2; 16],
            first: LogIndex(5),
            last: LogIndex(9),
            entries_end: 40960,
            entries: 5,
            records: 6,
            rows: 7,
            topics: 2,
            digest: [9; 16],
            last_crc: 10,
            directory_blocks: 3,
        };
        assert_eq!(Footer::decode(&footer.encode()), Ok(footer));
        assert_eq!(footer.file_bytes(), 40960 + 8 * 4096);
        let mut bad = header.encode();
        bad[50] ^= 1;
        assert_eq!(SegmentHeader::decode(&bad), Err(SegmentDefect::Header));
    }

    #[test]
    fn file_names_tell_id_and_generation() {
        let name = file_name(SegmentId(255), 2);
        assert_eq!(name, "seg-00000000000000ff-0002.log");
        assert_eq!(parse_file_name(&name), Some((SegmentId(255), 2)));
        assert_eq!(parse_file_name("seg-zz-1.log"), None);
    }
}
