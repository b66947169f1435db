//! The directory of a segment: which message offsets its records became.
//!
//! Owns the rows, the tables of an open segment in memory and their form in a sealed one. Apply's
//! decisions cannot be derived again once earlier records are gone, so the directory is
//! authoritative and is written twice; each block has its own crc, and a damaged block is read
//! from the other copy.
//!
//! ```text
//! block   0 crc u32   4 magic "MPDR"   8 number u32   12 tag u32 (start of the segment's uuid)
//!        16 items of one kind, zeros
//! blocks: topic spans (48 bytes each), then entry spots (16), then rows (40)
//! span    0 topic u32  4 rows u32  8 first row u32  12 zero u32  16 first offset u64  24 end offset u64
//!        32 first stamp u64  40 last stamp u64
//! spot    0 index u64  8 block u32  12 blocks u32
//! row     0 topic u32  4 count u32  8 base u64  16 index u64  24 record u32  28 skip u32  32 stamp u64
//! ```
//!
//! Invariants: spans ascend by topic, spots by index, rows by (topic, base); a topic's rows do not overlap
//! and their stamps do not fall.
//!
//! It deliberately gives topics and offsets no meaning; to the log they are keys.

mod layout;

use std::collections::BTreeMap;
use std::io;

use self::layout::{
    BLOCK_HEADER_BYTES, Item, PER_BLOCK_ROWS, PER_BLOCK_SPANS, PER_BLOCK_SPOTS, RawRow, RawSpan,
    RawSpot, Writer, block_is_good,
};
use crate::entry::{LogIndex, Place};
use crate::segment::Footer;
use crate::storage::BLOCK_BYTES;

/// The accepted messages of one record. 40 bytes, in memory as on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub topic: u32,
    /// Offset of the first accepted message.
    pub base: u64,
    /// How many messages were accepted.
    pub count: u32,
    /// Leading messages of the record that were duplicates.
    pub skip: u32,
    pub place: Place,
    pub stamp: u64,
}

impl Row {
    /// The offset behind the last message.
    pub fn end(&self) -> u64 {
        self.base.saturating_add(u64::from(self.count))
    }
}

/// The offsets of one topic that a segment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopicSpan {
    pub topic: u32,
    pub rows: u32,
    pub(crate) first_row: u32,
    pub first_offset: u64,
    pub end_offset: u64,
    pub first_stamp: u64,
    pub last_stamp: u64,
}

/// Where an entry stands in its segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spot {
    pub index: LogIndex,
    pub block: u32,
    pub blocks: u32,
}

impl Spot {
    pub fn position(&self) -> u64 {
        u64::from(self.block) * BLOCK_BYTES as u64
    }

    pub fn bytes(&self) -> usize {
        self.blocks as usize * BLOCK_BYTES
    }
}

/// The tables of a segment that is not sealed yet.
#[derive(Debug, Default)]
pub(crate) struct OpenTable {
    pub spots: Vec<Spot>,
    pub topics: BTreeMap<u32, Vec<Row>>,
    pub rows: usize,
}

impl OpenTable {
    pub fn add(&mut self, row: Row) {
        let rows = self.topics.entry(row.topic).or_default();
        debug_assert!(
            rows.last().is_none_or(|last| last.end() <= row.base),
            "offsets ascend"
        );
        rows.push(row);
        self.rows += 1;
    }

    pub fn spot(&self, index: LogIndex) -> Option<Spot> {
        let at = self
            .spots
            .binary_search_by_key(&index, |spot| spot.index)
            .ok()?;
        Some(self.spots[at])
    }

    /// The first row of the topic whose stamp is at least `stamp`.
    pub fn find_stamp(&self, topic: u32, stamp: u64) -> Option<Row> {
        let rows = self.topics.get(&topic)?;
        rows.get(rows.partition_point(|row| row.stamp < stamp))
            .copied()
    }

    pub fn spans(&self) -> Vec<TopicSpan> {
        let mut first_row = 0;
        let span = |(&topic, rows): (&u32, &Vec<Row>)| {
            let (first, last) = (rows.first()?, rows.last()?);
            let span = TopicSpan {
                topic,
                rows: rows.len() as u32,
                first_row,
                first_offset: first.base,
                end_offset: last.end(),
                first_stamp: first.stamp,
                last_stamp: last.stamp,
            };
            first_row += span.rows;
            Some(span)
        };
        self.topics.iter().filter_map(span).collect()
    }

    /// Removes everything about entries at or above `from`.
    pub fn truncate(&mut self, from: LogIndex) {
        self.spots.retain(|spot| spot.index < from);
        for rows in self.topics.values_mut() {
            rows.retain(|row| row.place.index < from);
        }
        self.topics.retain(|_, rows| !rows.is_empty());
        self.rows = self.topics.values().map(Vec::len).sum();
    }

    /// One copy of the directory, as it is written.
    pub fn encode(&self, uuid: [u8; 16]) -> Vec<u8> {
        let mut out = Writer::new(uuid);
        out.items(self.spans().iter().map(RawSpan::from));
        out.items(self.spots.iter().map(RawSpot::from));
        out.items(self.topics.values().flatten().map(RawRow::from));
        out.finish()
    }
}

/// How many blocks one copy of a directory takes.
pub(crate) fn directory_blocks(topics: u64, entries: u64, rows: u64) -> u64 {
    topics.div_ceil(PER_BLOCK_SPANS)
        + entries.div_ceil(PER_BLOCK_SPOTS)
        + rows.div_ceil(PER_BLOCK_ROWS)
}

/// Searches a sealed segment's directory, a block at a time; nothing of it is kept.
pub(crate) struct Directory<'a, R> {
    footer: &'a Footer,
    /// Reads the block at a file position.
    read: R,
    /// The last block, because neighbours are asked for in a row, and its number, if it is good.
    block: [u8; BLOCK_BYTES],
    held: Option<u64>,
}

impl<'a, R: FnMut(u64, &mut [u8; BLOCK_BYTES]) -> io::Result<()>> Directory<'a, R> {
    pub fn new(footer: &'a Footer, read: R) -> Directory<'a, R> {
        Directory {
            footer,
            read,
            block: [0; BLOCK_BYTES],
            held: None,
        }
    }

    pub fn spans(&mut self) -> Result<Vec<TopicSpan>, Unreadable> {
        (0..self.footer.topics)
            .map(|nth| Ok(self.item::<RawSpan>(nth)?.into()))
            .collect()
    }

    pub fn spot(&mut self, index: LogIndex) -> Result<Option<Spot>, Unreadable> {
        let at = self.spot_at(index)?;
        if at == self.footer.entries {
            return Ok(None);
        }
        let spot = self.nth_spot(at)?;
        Ok((spot.index == index).then_some(spot))
    }

    /// The number of the first spot at or above `index`; one past the last if there is none.
    pub fn spot_at(&mut self, index: LogIndex) -> Result<u64, Unreadable> {
        let entries = self.footer.entries;
        self.partition::<RawSpot>(0, entries, |spot| spot.index.get() < index.0)
    }

    pub fn nth_spot(&mut self, nth: u64) -> Result<Spot, Unreadable> {
        Ok(self.item::<RawSpot>(nth)?.into())
    }

    pub fn nth_row(&mut self, nth: u64) -> Result<Row, Unreadable> {
        Ok(self.item::<RawRow>(nth)?.into())
    }

    /// The number of the topic's first row that ends behind `offset`; one past its last if none does.
    pub fn row_at(&mut self, span: &TopicSpan, offset: u64) -> Result<u64, Unreadable> {
        let (from, to) = span_rows(span);
        self.partition::<RawRow>(from, to, |row| Row::from(*row).end() <= offset)
    }

    /// The number of the topic's first row with at least this stamp.
    pub fn row_at_stamp(&mut self, span: &TopicSpan, stamp: u64) -> Result<u64, Unreadable> {
        let (from, to) = span_rows(span);
        self.partition::<RawRow>(from, to, |row| row.stamp.get() < stamp)
    }

    fn partition<T: Item>(
        &mut self,
        mut from: u64,
        mut to: u64,
        before: impl Fn(&T) -> bool,
    ) -> Result<u64, Unreadable> {
        while from < to {
            let middle = from + (to - from) / 2;
            if before(&self.item::<T>(middle)?) {
                from = middle + 1;
            } else {
                to = middle;
            }
        }
        Ok(from)
    }

    fn item<T: Item>(&mut self, nth: u64) -> Result<T, Unreadable> {
        let number = T::first_block(self.footer) + nth / T::PER_BLOCK;
        if self.held != Some(number) {
            self.read_block(number)?;
        }
        let at = BLOCK_HEADER_BYTES + (nth % T::PER_BLOCK) as usize * size_of::<T>();
        T::read_from_prefix(&self.block[at..])
            .map(|(item, _)| item)
            .map_err(|_| Unreadable::Damaged)
    }

    fn read_block(&mut self, number: u64) -> Result<(), Unreadable> {
        self.held = None;
        let mut failed = Unreadable::Damaged;
        for copy in 0..2 {
            let at = self.footer.copy_at(copy) + number * BLOCK_BYTES as u64;
            match (self.read)(at, &mut self.block) {
                Ok(()) if block_is_good(&self.block, number, self.footer.uuid) => {
                    self.held = Some(number);
                    return Ok(());
                }
                Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                    failed = Unreadable::Io(error);
                }
                _ => {}
            }
        }
        Err(failed)
    }
}

/// How many blocks of one directory copy are bad.
pub(crate) fn bad_blocks(copy: &[u8], uuid: [u8; 16]) -> u64 {
    let blocks = copy.chunks(BLOCK_BYTES).enumerate();
    blocks
        .filter(|(number, block)| !block_is_good(block, *number as u64, uuid))
        .count() as u64
}

/// Whether sealing of the segment `uuid` wrote this block (perhaps before it was interrupted).
pub(crate) fn is_directory_block(block: &[u8], uuid: [u8; 16]) -> bool {
    layout::belongs_to(block, uuid)
}

/// A directory block cannot be had from either copy.
#[derive(Debug)]
pub(crate) enum Unreadable {
    Damaged,
    Io(io::Error),
}

fn span_rows(span: &TopicSpan) -> (u64, u64) {
    let first = u64::from(span.first_row);
    (first, first + u64::from(span.rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: [u8; 16] = [5; 16];

    fn table(rows_per_topic: u64) -> OpenTable {
        let mut table = OpenTable::default();
        for nth in 0..rows_per_topic {
            let index = LogIndex(nth + 1);
            table.spots.push(Spot {
                index,
                block: nth as u32 + 1,
                blocks: 1,
            });
            for topic in [3, 8] {
                let place = Place {
                    index,
                    record: topic,
                };
                // Three messages a row, and a hole of one offset behind each.
                table.add(Row {
                    topic,
                    base: nth * 4,
                    count: 3,
                    skip: 0,
                    place,
                    stamp: 100 + nth,
                });
            }
        }
        table
    }

    fn sealed(table: &OpenTable) -> (Footer, Vec<u8>) {
        let copy = table.encode(UUID);
        let footer = Footer {
            uuid: UUID,
            first: LogIndex(1),
            last: LogIndex(table.spots.len() as u64),
            entries_end: 0,
            entries: table.spots.len() as u64,
            records: 0,
            rows: table.rows as u64,
            topics: table.topics.len() as u64,
            digest: [0; 16],
            last_crc: 0,
            directory_blocks: (copy.len() / BLOCK_BYTES) as u32,
        };
        let mut file = copy.clone();
        file.extend(footer.encode());
        file.extend(copy);
        file.extend(footer.encode());
        (footer, file)
    }

    fn find(table: &OpenTable, topic: u32, offset: u64) -> Option<Row> {
        let rows = &table.topics[&topic];
        rows.get(rows.partition_point(|row| row.end() <= offset))
            .copied()
    }

    fn reader(file: &[u8]) -> impl FnMut(u64, &mut [u8; BLOCK_BYTES]) -> io::Result<()> {
        move |at, block| {
            block.copy_from_slice(&file[at as usize..at as usize + BLOCK_BYTES]);
            Ok(())
        }
    }

    #[test]
    fn a_sealed_directory_answers_as_the_open_one() {
        let table = table(700);
        let (footer, file) = sealed(&table);
        let blocks = directory_blocks(footer.topics, footer.entries, footer.rows);
        assert_eq!(u64::from(footer.directory_blocks), blocks);
        let mut directory = Directory::new(&footer, reader(&file));
        let spans = directory.spans().unwrap();
        assert_eq!(spans, table.spans());
        for offset in [0, 1, 3, 4, 1000, 1003, 2798, 2799, 5000] {
            let at = directory.row_at(&spans[1], offset).unwrap();
            let (_, end) = span_rows(&spans[1]);
            let found = (at < end).then(|| directory.nth_row(at).unwrap());
            assert_eq!(found, find(&table, 8, offset), "offset {offset}");
        }
        for index in [1, 255, 256, 700] {
            assert_eq!(
                directory.spot(LogIndex(index)).unwrap(),
                table.spot(LogIndex(index))
            );
        }
        assert_eq!(directory.spot(LogIndex(701)).unwrap(), None);
        let at = directory.row_at_stamp(&spans[0], 400).unwrap();
        assert_eq!(
            Some(directory.nth_row(at).unwrap()),
            table.find_stamp(3, 400)
        );
    }

    #[test]
    fn a_block_that_is_damaged_in_one_copy_is_read_from_the_other() {
        let table = table(700);
        let (footer, mut file) = sealed(&table);
        for block in 0..footer.directory_blocks as usize {
            // Alternate the copies, so that neither is good as a whole.
            let at = footer.copy_at(block as u64 % 2) as usize + block * BLOCK_BYTES;
            file[at + 77] ^= 4;
        }
        let mut directory = Directory::new(&footer, reader(&file));
        let rows: Vec<Row> = (0..footer.rows)
            .map(|nth| directory.nth_row(nth).unwrap())
            .collect();
        assert!(rows.iter().eq(table.topics.values().flatten()));
    }

    #[test]
    fn a_block_that_is_damaged_in_both_copies_is_unreadable() {
        let (footer, mut file) = sealed(&table(10));
        for copy in 0..2 {
            file[footer.copy_at(copy) as usize + 20] ^= 1;
        }
        let spans = Directory::new(&footer, reader(&file)).spans();
        assert!(matches!(spans, Err(Unreadable::Damaged)));
    }
}
