//! Bytes of the snapshot file (see [`super`] for the picture).

use std::collections::BTreeMap;

use xxhash_rust::xxh3::xxh3_128;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{CHUNK_BYTES_MAX, ChunkId, ChunkPlace, FileUse, Table};
use crate::buffer::{AlignedBuf, BufferPool};
use crate::entry::LogIndex;
use crate::storage::BLOCK_BYTES;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) store: [u8; 16],
    pub(super) number: u64,
    pub(super) index: LogIndex,
    pub(super) table_offset: u64,
    pub(super) files: u32,
    pub(super) chunks: u32,
    pub(super) chunk_bytes: u64,
    pub(super) digest: [u8; 16],
}

impl Header {
    pub(super) fn encode(&self, pool: &BufferPool) -> AlignedBuf {
        let raw = RawHeader {
            magic: MAGIC,
            version: U16::new(VERSION),
            zero: U16::ZERO,
            crc: U32::ZERO,
            store: self.store,
            number: U64::new(self.number),
            index: U64::new(self.index.0),
            table_offset: U64::new(self.table_offset),
            files: U32::new(self.files),
            chunks: U32::new(self.chunks),
            chunk_bytes: U64::new(self.chunk_bytes),
            digest: self.digest,
        };
        let mut block = pool.take(BLOCK_BYTES);
        block.extend_from_slice(raw.as_bytes());
        block.pad_to_block();
        let crc = crc32fast::hash(&block);
        block[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// `None` if the block is not a good header; the version if it is one of a later format.
    pub(super) fn decode(block: &[u8]) -> Result<Option<Header>, u16> {
        let Ok((raw, _)) = RawHeader::read_from_prefix(block) else {
            return Ok(None);
        };
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&block[..CRC_AT]);
        hasher.update(&[0; 4]);
        hasher.update(&block[CRC_AT + 4..]);
        if raw.magic != MAGIC || block.len() != BLOCK_BYTES || hasher.finalize() != raw.crc.get() {
            return Ok(None);
        }
        if raw.version.get() != VERSION {
            return Err(raw.version.get());
        }
        Ok(Some(Header {
            store: raw.store,
            number: raw.number.get(),
            index: LogIndex(raw.index.get()),
            table_offset: raw.table_offset.get(),
            files: raw.files.get(),
            chunks: raw.chunks.get(),
            chunk_bytes: raw.chunk_bytes.get(),
            digest: raw.digest,
        }))
    }
}

/// The table in whole blocks, and their digest.
pub(super) fn encode_table(
    files: &BTreeMap<u64, FileUse>,
    chunks: &BTreeMap<ChunkId, ChunkPlace>,
) -> (Vec<u8>, [u8; 16]) {
    let mut bytes =
        Vec::with_capacity(files.len() * FILE_ROW_BYTES + chunks.len() * CHUNK_ROW_BYTES);
    for (&number, file) in files {
        let row = RawFile {
            number: U64::new(number),
            chunk_bytes: U64::new(file.chunk_bytes),
        };
        bytes.extend_from_slice(row.as_bytes());
    }
    for (id, place) in chunks {
        let row = RawChunk {
            id: U64::new(id.0),
            file: U64::new(place.file),
            offset: U64::new(place.offset),
            bytes: U32::new(place.bytes),
            crc: U32::new(place.crc),
        };
        bytes.extend_from_slice(row.as_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    let digest = xxh3_128(&bytes).to_le_bytes();
    (bytes, digest)
}

/// The table of these blocks, if they are what the header says and make sense.
pub(super) fn decode_table(header: &Header, bytes: &[u8]) -> Option<Table> {
    if xxh3_128(bytes).to_le_bytes() != header.digest {
        return None;
    }
    let (files, rest) =
        <[RawFile]>::ref_from_prefix_with_elems(bytes, header.files as usize).ok()?;
    let (chunks, _) =
        <[RawChunk]>::ref_from_prefix_with_elems(rest, header.chunks as usize).ok()?;
    let files: BTreeMap<u64, FileUse> = files
        .iter()
        .map(|row| {
            let chunk_bytes = row.chunk_bytes.get();
            (row.number.get(), FileUse { chunk_bytes })
        })
        .collect();
    let chunks: BTreeMap<ChunkId, ChunkPlace> = chunks
        .iter()
        .map(|row| {
            let place = ChunkPlace {
                file: row.file.get(),
                offset: row.offset.get(),
                bytes: row.bytes.get(),
                crc: row.crc.get(),
            };
            (ChunkId(row.id.get()), place)
        })
        .collect();
    let sound = files.len() == header.files as usize
        && chunks.len() == header.chunks as usize
        && files.keys().next_back() == Some(&header.number)
        && chunks.values().all(|chunk| {
            files.contains_key(&chunk.file) && chunk.bytes as usize <= CHUNK_BYTES_MAX
        });
    sound.then_some(Table {
        store: header.store,
        number: header.number,
        index: header.index,
        digest: header.digest,
        files,
        chunks,
    })
}

/// How many bytes one copy of the table takes.
pub(super) fn table_blocks(files: u32, chunks: u32) -> u64 {
    let rows =
        u64::from(files) * FILE_ROW_BYTES as u64 + u64::from(chunks) * CHUNK_ROW_BYTES as u64;
    rows.next_multiple_of(BLOCK_BYTES as u64)
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U16,
    zero: U16,
    crc: U32,
    store: [u8; 16],
    number: U64,
    index: U64,
    table_offset: U64,
    files: U32,
    chunks: U32,
    chunk_bytes: U64,
    digest: [u8; 16],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFile {
    number: U64,
    chunk_bytes: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawChunk {
    id: U64,
    file: U64,
    offset: U64,
    bytes: U32,
    crc: U32,
}

pub(super) const VERSION: u16 = 1;
const MAGIC: [u8; 8] = *b"MPSNAPS1";
const CRC_AT: usize = std::mem::offset_of!(RawHeader, crc);
const FILE_ROW_BYTES: usize = size_of::<RawFile>();
const CHUNK_ROW_BYTES: usize = size_of::<RawChunk>();

const _: () = assert!(size_of::<RawHeader>() == 88 && CRC_AT == 12);
