//! The directory's bytes: blocks and the items in them.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Row, Spot, TopicSpan};
use crate::entry::{LogIndex, Place};
use crate::planted::{self, Bug};
use crate::segment::Footer;
use crate::storage::BLOCK_BYTES;

/// Fills blocks with items; each kind begins a new one.
pub(super) struct Writer {
    uuid: [u8; 16],
    bytes: Vec<u8>,
    number: u32,
}

impl Writer {
    pub fn new(uuid: [u8; 16]) -> Writer {
        Writer {
            uuid,
            bytes: Vec::new(),
            number: 0,
        }
    }

    pub fn items<T: Item>(&mut self, items: impl Iterator<Item = T>) {
        let mut in_block = 0;
        for item in items {
            if in_block == 0 {
                self.begin_block();
            }
            self.bytes.extend_from_slice(item.as_bytes());
            in_block = (in_block + 1) % T::PER_BLOCK;
            if in_block == 0 {
                self.end_block();
            }
        }
        if in_block > 0 {
            self.end_block();
        }
    }

    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }

    fn begin_block(&mut self) {
        let header = BlockHeader {
            crc: U32::ZERO,
            magic: MAGIC,
            number: U32::new(self.number),
            tag: tag_of(self.uuid),
        };
        self.bytes.extend_from_slice(header.as_bytes());
        self.number += 1;
    }

    fn end_block(&mut self) {
        let end = self.bytes.len().next_multiple_of(BLOCK_BYTES);
        self.bytes.resize(end, 0);
        let block = &mut self.bytes[end - BLOCK_BYTES..];
        let crc = crc32fast::hash(&block[4..]);
        block[..4].copy_from_slice(&crc.to_le_bytes());
    }
}

pub(super) trait Item:
    FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned + Copy
{
    const PER_BLOCK: u64 = ((BLOCK_BYTES - BLOCK_HEADER_BYTES) / size_of::<Self>()) as u64;

    fn first_block(footer: &Footer) -> u64;
}

impl Item for RawSpan {
    fn first_block(_: &Footer) -> u64 {
        0
    }
}

impl Item for RawSpot {
    fn first_block(footer: &Footer) -> u64 {
        footer.topics.div_ceil(PER_BLOCK_SPANS)
    }
}

impl Item for RawRow {
    fn first_block(footer: &Footer) -> u64 {
        RawSpot::first_block(footer) + footer.entries.div_ceil(PER_BLOCK_SPOTS)
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct BlockHeader {
    pub crc: U32,
    pub magic: [u8; 4],
    pub number: U32,
    pub tag: [u8; 4],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawSpan {
    pub topic: U32,
    pub rows: U32,
    pub first_row: U32,
    pub zero: U32,
    pub first_offset: U64,
    pub end_offset: U64,
    pub first_stamp: U64,
    pub last_stamp: U64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawSpot {
    pub index: U64,
    pub block: U32,
    pub blocks: U32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct RawRow {
    pub topic: U32,
    pub count: U32,
    pub base: U64,
    pub index: U64,
    pub record: U32,
    pub skip: U32,
    pub stamp: U64,
}

impl From<&TopicSpan> for RawSpan {
    fn from(span: &TopicSpan) -> RawSpan {
        RawSpan {
            topic: U32::new(span.topic),
            rows: U32::new(span.rows),
            first_row: U32::new(span.first_row),
            zero: U32::ZERO,
            first_offset: U64::new(span.first_offset),
            end_offset: U64::new(span.end_offset),
            first_stamp: U64::new(span.first_stamp),
            last_stamp: U64::new(span.last_stamp),
        }
    }
}

impl From<RawSpan> for TopicSpan {
    fn from(raw: RawSpan) -> TopicSpan {
        TopicSpan {
            topic: raw.topic.get(),
            rows: raw.rows.get(),
            first_row: raw.first_row.get(),
            first_offset: raw.first_offset.get(),
            end_offset: raw.end_offset.get(),
            first_stamp: raw.first_stamp.get(),
            last_stamp: raw.last_stamp.get(),
        }
    }
}

impl From<&Spot> for RawSpot {
    fn from(spot: &Spot) -> RawSpot {
        RawSpot {
            index: U64::new(spot.index.0),
            block: U32::new(spot.block),
            blocks: U32::new(spot.blocks),
        }
    }
}

impl From<RawSpot> for Spot {
    fn from(raw: RawSpot) -> Spot {
        Spot {
            index: LogIndex(raw.index.get()),
            block: raw.block.get(),
            blocks: raw.blocks.get(),
        }
    }
}

impl From<&Row> for RawRow {
    fn from(row: &Row) -> RawRow {
        RawRow {
            topic: U32::new(row.topic),
            count: U32::new(row.count),
            base: U64::new(row.base),
            index: U64::new(row.place.index.0),
            record: U32::new(row.place.record),
            skip: U32::new(row.skip),
            stamp: U64::new(row.stamp),
        }
    }
}

impl From<RawRow> for Row {
    fn from(raw: RawRow) -> Row {
        Row {
            topic: raw.topic.get(),
            base: raw.base.get(),
            count: raw.count.get(),
            skip: raw.skip.get(),
            place: Place {
                index: LogIndex(raw.index.get()),
                record: raw.record.get(),
            },
            stamp: raw.stamp.get(),
        }
    }
}

/// Whether the block says that it is one of this segment's directory; its content may be bad.
pub(super) fn belongs_to(block: &[u8], uuid: [u8; 16]) -> bool {
    BlockHeader::read_from_prefix(block)
        .is_ok_and(|(header, _)| header.magic == MAGIC && header.tag == tag_of(uuid))
}

pub(super) fn block_is_good(block: &[u8], number: u64, uuid: [u8; 16]) -> bool {
    let Ok((header, _)) = BlockHeader::read_from_prefix(block) else {
        return false;
    };
    header.magic == MAGIC
        && u64::from(header.number.get()) == number
        && header.tag == tag_of(uuid)
        && (crc32fast::hash(&block[4..]) == header.crc.get()
            || planted::is(Bug::TrustDamagedDirectory))
}

fn tag_of(uuid: [u8; 16]) -> [u8; 4] {
    [uuid[0], uuid[1], uuid[2], uuid[3]]
}

pub(super) const BLOCK_HEADER_BYTES: usize = size_of::<BlockHeader>();
pub(super) const PER_BLOCK_SPANS: u64 = RawSpan::PER_BLOCK;
pub(super) const PER_BLOCK_SPOTS: u64 = RawSpot::PER_BLOCK;
pub(super) const PER_BLOCK_ROWS: u64 = RawRow::PER_BLOCK;
const MAGIC: [u8; 4] = *b"MPDR";
const _: () = assert!(PER_BLOCK_SPANS == 85 && PER_BLOCK_SPOTS == 255 && PER_BLOCK_ROWS == 102);
