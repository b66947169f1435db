//! Makes the checksums of a damaged file of the log right again, so that what reads it must judge the
//! numbers and lengths themselves.
//!
//! Walks a file block by block and knows every structure by its magic; the layouts are those at the top of
//! `wal/src/{entry,record,segment,manifest,snapshot}.rs`. What does not fit its file is left as it is.
//! The digests of whole tables are put right too, the one over a segment's entry headers is not: nothing but
//! `verify` looks at it.

use xxhash_rust::xxh3::xxh3_128;

pub const BLOCK_BYTES: usize = 4096;

/// Puts right whatever checksum stands in `file`.
pub fn reseal(file: &mut [u8]) {
    let mut chain = Chain::default();
    for at in (0..file.len()).step_by(BLOCK_BYTES) {
        let (before, rest) = file.split_at_mut(at);
        match rest {
            [b'M', b'P', b'E', b'N', ..] => entry(rest, &mut chain),
            [b'M', b'P', b'M', b'F', ..] => manifest_record(rest, &mut chain),
            [b'M', b'P', b'S', b'E', b'G', ..] => signed(rest, 96, 12),
            [b'M', b'P', b'F', b'O', b'O', ..] => signed(rest, 112, 12),
            [b'M', b'P', b'S', b'N', b'A', ..] => snapshot_header(before, rest),
            [_, _, _, _, b'M', b'P', b'D', b'R', ..] => directory_block(rest),
            _ => {}
        }
    }
}

/// The checksum of the structure before, which the next one repeats.
#[derive(Default)]
struct Chain(Option<u32>);

impl Chain {
    /// Links a structure to the one before it. The first keeps the link that it has.
    fn link(&self, bytes: &mut [u8], at: usize) {
        if let Some(crc) = self.0 {
            put(bytes, at, crc);
        }
    }
}

fn manifest_record(rest: &mut [u8], chain: &mut Chain) {
    const HEADER: usize = 40;
    let Some(payload_end) = end_of(rest, HEADER, 8) else {
        return;
    };
    let record = &mut rest[..payload_end];
    chain.link(record, 32);
    put(record, 4, 0);
    let crc = crc32fast::hash(record);
    put(record, 4, crc);
    chain.0 = Some(crc);
}

fn entry(rest: &mut [u8], chain: &mut Chain) {
    const HEADER: usize = 96;
    let Some(payload_end) = end_of(rest, HEADER, 12) else {
        return;
    };
    let records = u32_at(rest, 20) as usize;
    let table_bytes = records.saturating_mul(4);
    if let Some(table_at) = payload_end
        .checked_sub(table_bytes)
        .filter(|&at| at >= HEADER)
    {
        let crc = payload(&mut rest[..payload_end], HEADER, table_at, records);
        put(rest, 80, crc);
    }
    chain.link(rest, 56 + 4);
    let header = &mut rest[..HEADER];
    put(header, 8, 0);
    let crc = crc32fast::hash(header);
    put(header, 8, crc);
    chain.0 = Some(crc);
}

/// Each record's own checksum, and the one over their headers and the table.
fn payload(entry: &mut [u8], first: usize, table_at: usize, records: usize) -> u32 {
    const HEADER: usize = 24;
    let mut headers = crc32fast::Hasher::new();
    let mut at = first;
    for _ in 0..records {
        let Some(body_end) = end_of(&entry[at..table_at], HEADER, 0) else {
            break;
        };
        let record = &mut entry[at..at + body_end];
        put(record, 4, 0);
        let crc = crc32fast::hash(record);
        put(record, 4, crc);
        headers.update(&record[..HEADER]);
        at = (at + HEADER + (body_end - HEADER).next_multiple_of(8)).min(table_at);
    }
    headers.update(&entry[table_at..]);
    headers.finalize()
}

fn directory_block(rest: &mut [u8]) {
    if let Some(block) = rest.get_mut(..BLOCK_BYTES) {
        let crc = crc32fast::hash(&block[4..]);
        put(block, 0, crc);
    }
}

/// The last header's table lies before it, twice; its digest stands in the header.
fn snapshot_header(before: &[u8], rest: &mut [u8]) {
    let Some(block) = rest.get_mut(..BLOCK_BYTES) else {
        return;
    };
    let table_at = u64::from_le_bytes(std::array::from_fn(|n| block[48 + n])) as usize;
    let rows = u64::from(u32_at(block, 56)) * 16 + u64::from(u32_at(block, 60)) * 32;
    let table_bytes = rows.next_multiple_of(BLOCK_BYTES as u64) as usize;
    let table = table_at
        .checked_add(table_bytes)
        .and_then(|end| before.get(table_at..end));
    if let Some(table) = table {
        block[72..88].copy_from_slice(&xxh3_128(table).to_le_bytes());
    }
    signed(rest, BLOCK_BYTES, 12);
}

/// A structure of `bytes` bytes with its own checksum at `crc_at`.
fn signed(rest: &mut [u8], bytes: usize, crc_at: usize) {
    if let Some(block) = rest.get_mut(..bytes) {
        put(block, crc_at, 0);
        let crc = crc32fast::hash(block);
        put(block, crc_at, crc);
    }
}

/// Where something with a header and a length in it ends, if it fits.
fn end_of(bytes: &[u8], header: usize, length_at: usize) -> Option<usize> {
    if bytes.len() < header {
        return None;
    }
    let end = header.checked_add(u32_at(bytes, length_at) as usize)?;
    (end <= bytes.len()).then_some(end)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]))
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}
