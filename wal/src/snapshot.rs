//! Snapshots: the folded state at an index, in chunks, of which only the dirty ones are written.
//!
//! Owns the snapshot file and the job that writes one off the hot path. A snapshot is a table of all
//! live chunks, each with the file that holds it; its own file holds the chunks that changed since
//! the snapshot before the last, and the table. So a snapshot needs its own file and some older ones,
//! and [`SnapshotInfo::files`] says which; the two generations that are kept share none.
//!
//! ```text
//! block 0     header
//! blocks 1..  chunks back to back, then zeros to the next block
//!             table, zeros to the next block; the same again; the header again; end of the file
//!
//! header  0 magic "MPSNAPS1"  8 version u16  10 zero u16    12 crc u32 (of the block, 0 in its place)
//!        16 store uuid [16]  32 number u64   40 log index u64  48 table offset u64
//!        56 files u32        60 chunks u32   64 chunk bytes u64 (in this file)
//!        72 xxh3-128 of the table's blocks [16], little-endian    zeros to the end of the block
//! table   per file needed, by number:  0 number u64  8 chunk bytes u64
//!         per chunk, by id:  0 id u64  8 file number u64  16 offset u64  24 bytes u32  28 crc u32
//! ```
//!
//! Invariants: numbers ascend; a file that a job finished is never written again; every chunk of the
//! table lies in a file of the table; at most [`FILES_MAX`] files, and each older one at least
//! half alive when the snapshot was made, so the files hold at most about twice the state.
//!
//! It deliberately does not know which snapshot counts: the manifest names it after the job is done, and
//! files that no kept snapshot needs are removed by the log.

mod job;
mod layout;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;

pub use self::job::{Base, SnapshotDone, SnapshotJob};
use self::layout::{Header, decode_table, table_blocks};
use crate::entry::LogIndex;
use crate::storage::{BLOCK_BYTES, Storage, StorageFile, is_zero, read_exact_at};

/// The caller's name of a part of its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub u64);

/// What a manifest keeps of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    pub number: u64,
    /// The last entry whose effects it holds.
    pub index: LogIndex,
    /// Of its table, and so of everything in it.
    pub digest: [u8; 16],
    /// All files it needs, its own last.
    pub files: Vec<String>,
}

/// Why a snapshot could not be written or read.
#[derive(Debug, Error)]
pub enum SnapshotError {
    #[error("{file} is damaged ({what}); an older snapshot or a full replay must take its place")]
    Damaged { file: String, what: Damage },
    #[error("{file} belongs to another store; restore the whole folder from one backup")]
    ForeignStore { file: String },
    #[error(
        "{file} was written by a newer millpond (format {found}, this one knows {known}); start \
         that version"
    )]
    NewerFormat {
        file: String,
        found: u16,
        known: u16,
    },
    #[error(
        "a part of the state has {bytes} bytes, the limit is {CHUNK_BYTES_MAX}; report this, and what the broker holds"
    )]
    ChunkTooLarge { bytes: usize },
    #[error("cannot {what} {file}")]
    Io {
        what: &'static str,
        file: String,
        source: io::Error,
    },
}

/// What is wrong with a snapshot file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Damage {
    #[error("both headers are bad")]
    Headers,
    #[error("both tables are bad")]
    Tables,
    #[error("chunk {} is bad", .0.0)]
    Chunk(ChunkId),
}

/// A readable snapshot.
#[derive(Clone)]
pub struct Snapshot<S> {
    storage: S,
    table: Arc<Table>,
}

impl<S: Storage> Snapshot<S> {
    /// Reads the table; chunks are read when asked for. A single bad copy of header or table is
    /// made up for by the other.
    pub fn open(storage: S, store: [u8; 16], number: u64) -> Result<Snapshot<S>, SnapshotError> {
        let name = file_name(number);
        let io = |source| SnapshotError::Io {
            what: "read",
            file: name.clone(),
            source,
        };
        let file = storage.open_read(&name).map_err(io)?;
        let (_, table) = read_whole(&file, &name, store, number)?;
        Ok(Snapshot {
            storage,
            table: Arc::new(table),
        })
    }

    /// The snapshot that a job has just written.
    pub fn of(storage: S, done: &SnapshotDone) -> Snapshot<S> {
        Snapshot {
            storage,
            table: done.table.clone(),
        }
    }

    pub fn info(&self) -> SnapshotInfo {
        self.table.info()
    }

    pub fn index(&self) -> LogIndex {
        self.table.index
    }

    /// All chunks by ascending id, read and checked one by one.
    pub fn chunks(&self) -> impl Iterator<Item = Result<(ChunkId, Bytes), SnapshotError>> + '_ {
        let mut reader = ChunkReader::new(&self.storage);
        let chunks = self.table.chunks.iter();
        chunks.map(move |(&id, place)| Ok((id, Bytes::from(reader.read(id, place)?))))
    }

    /// Reads everything and keeps nothing.
    pub fn verify(&self) -> Result<(), SnapshotError> {
        self.chunks().try_for_each(|chunk| chunk.map(drop))
    }
}

/// What is wrong with one file of a snapshot, whether or not something makes up for it, and in which bytes.
pub(crate) fn flaws<S: Storage>(
    storage: &S,
    store: [u8; 16],
    number: u64,
) -> Result<Vec<(Flaw, Range<u64>)>, SnapshotError> {
    let name = file_name(number);
    let io = |source| SnapshotError::Io {
        what: "read",
        file: name.clone(),
        source,
    };
    let file = storage.open_read(&name).map_err(io)?;
    let (header, table) = read_whole(&file, &name, store, number)?;
    let mut flaws = Vec::new();
    let block_bytes = BLOCK_BYTES as u64;
    let table_bytes = table_blocks(header.files, header.chunks);
    let table_at = |copy| header.table_offset + copy * table_bytes;
    let (len, expected) = (file.len().map_err(io)?, table_at(2) + block_bytes);
    if len < expected {
        flaws.push((Flaw::Short, len..expected));
    }
    for (copy, at) in [(0, 0), (1, table_at(2))] {
        let mut block = vec![0; BLOCK_BYTES];
        file.read_at(at, &mut block).map_err(io)?;
        if Header::decode(&block) != Ok(Some(header)) {
            flaws.push((Flaw::HeaderCopy(copy), at..at + block_bytes));
        }
    }
    for copy in 0..2 {
        let mut raw = vec![0; usize::try_from(table_bytes).unwrap_or(0)];
        file.read_at(table_at(copy), &mut raw).map_err(io)?;
        if decode_table(&header, &raw).is_none() {
            flaws.push((Flaw::TableCopy(copy), table_at(copy)..table_at(copy + 1)));
        }
    }
    let mut reader = ChunkReader::new(storage);
    let own = table
        .chunks
        .iter()
        .filter(|(_, place)| place.file == number);
    for (&id, place) in own {
        if reader.read(id, place).is_err() {
            let bytes = place.offset..place.offset + u64::from(place.bytes);
            flaws.push((Flaw::Chunk(id), bytes));
        }
    }
    let padding_at = block_bytes + header.chunk_bytes;
    let padding = header.table_offset.saturating_sub(padding_at);
    let mut raw = vec![0; usize::try_from(padding).unwrap_or(0)];
    file.read_at(padding_at, &mut raw).map_err(io)?;
    if !is_zero(&raw) {
        flaws.push((Flaw::Padding, padding_at..header.table_offset));
    }
    Ok(flaws)
}

/// See [`flaws`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Flaw {
    #[error("copy {0} of its header is bad")]
    HeaderCopy(u64),
    #[error("copy {0} of its table is bad")]
    TableCopy(u64),
    #[error("chunk {} is bad", .0.0)]
    Chunk(ChunkId),
    #[error("its padding is not zero")]
    Padding,
    #[error("it is shorter than it was")]
    Short,
}

/// Which chunks there are and where.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Table {
    store: [u8; 16],
    number: u64,
    index: LogIndex,
    digest: [u8; 16],
    /// By number; all files that hold a chunk, and its own.
    files: BTreeMap<u64, FileUse>,
    chunks: BTreeMap<ChunkId, ChunkPlace>,
}

impl Table {
    fn info(&self) -> SnapshotInfo {
        SnapshotInfo {
            number: self.number,
            index: self.index,
            digest: self.digest,
            files: self.files.keys().map(|&number| file_name(number)).collect(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileUse {
    /// What it held when it was written, live or not.
    chunk_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ChunkPlace {
    file: u64,
    offset: u64,
    bytes: u32,
    crc: u32,
}

/// Reads chunks, and keeps the files open between them.
struct ChunkReader<'a, S: Storage> {
    storage: &'a S,
    files: BTreeMap<u64, S::File>,
}

impl<'a, S: Storage> ChunkReader<'a, S> {
    fn new(storage: &'a S) -> ChunkReader<'a, S> {
        ChunkReader {
            storage,
            files: BTreeMap::new(),
        }
    }

    fn read(&mut self, id: ChunkId, place: &ChunkPlace) -> Result<Vec<u8>, SnapshotError> {
        let file = || file_name(place.file);
        let io = |source| SnapshotError::Io {
            what: "read",
            file: file(),
            source,
        };
        let open = match self.files.entry(place.file) {
            std::collections::btree_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::btree_map::Entry::Vacant(slot) => {
                slot.insert(self.storage.open_read(&file()).map_err(io)?)
            }
        };
        // The length was checked against the limit with the table.
        let mut bytes = vec![0; place.bytes as usize];
        let read = open.read_at(place.offset, &mut bytes).map_err(io)?;
        if read < bytes.len() || crc32fast::hash(&bytes) != place.crc {
            return Err(SnapshotError::Damaged {
                file: file(),
                what: Damage::Chunk(id),
            });
        }
        Ok(bytes)
    }
}

/// The name of the file of snapshot `number`.
pub fn file_name(number: u64) -> String {
    format!("snapshot-{number:016x}")
}

/// The number in a file's name; `None` if it is not a snapshot's.
pub fn number_of(name: &str) -> Option<u64> {
    let number = u64::from_str_radix(name.strip_prefix("snapshot-")?, 16).ok()?;
    (file_name(number) == name).then_some(number)
}

enum HeaderError {
    Snapshot(SnapshotError),
    Io(io::Error),
}

impl HeaderError {
    fn or(self, io: impl FnOnce(io::Error) -> SnapshotError) -> SnapshotError {
        match self {
            HeaderError::Snapshot(e) => e,
            HeaderError::Io(e) => io(e),
        }
    }
}

/// Header and table, each from whichever copy is good.
fn read_whole(
    file: &impl StorageFile,
    name: &str,
    store: [u8; 16],
    number: u64,
) -> Result<(Header, Table), SnapshotError> {
    let io = |source| SnapshotError::Io {
        what: "read",
        file: name.to_owned(),
        source,
    };
    let header = read_header(file, name, number).map_err(|e| e.or(io))?;
    if header.store != store {
        let file = name.to_owned();
        return Err(SnapshotError::ForeignStore { file });
    }
    let table = read_table(file, &header).map_err(io)?;
    let table = table.ok_or_else(|| SnapshotError::Damaged {
        file: name.to_owned(),
        what: Damage::Tables,
    })?;
    Ok((header, table))
}

fn read_header(file: &impl StorageFile, name: &str, number: u64) -> Result<Header, HeaderError> {
    let mut block = vec![0; BLOCK_BYTES];
    let last = file.len().map_err(HeaderError::Io)?;
    let mut failed = None;
    for offset in [0, last.saturating_sub(BLOCK_BYTES as u64)] {
        let read = match file.read_at(offset, &mut block) {
            Ok(read) => read,
            Err(error) => {
                failed = Some(error);
                continue;
            }
        };
        match Header::decode(&block[..read]) {
            Ok(Some(header)) if header.number == number => return Ok(header),
            Ok(_) => {}
            Err(found) => {
                return Err(HeaderError::Snapshot(SnapshotError::NewerFormat {
                    file: name.to_owned(),
                    found,
                    known: layout::VERSION,
                }));
            }
        }
    }
    let damaged = SnapshotError::Damaged {
        file: name.to_owned(),
        what: Damage::Headers,
    };
    Err(failed.map_or(HeaderError::Snapshot(damaged), HeaderError::Io))
}

/// The table from whichever copy is good; a copy that the file has no room for is bad. An error only if
/// none is good and the disk failed to give one.
fn read_table(file: &impl StorageFile, header: &Header) -> io::Result<Option<Table>> {
    let bytes = table_blocks(header.files, header.chunks);
    let len = file.len()?;
    let mut failed = None;
    for copy in 0..2 {
        let offset = header.table_offset.saturating_add(copy * bytes);
        if offset.saturating_add(bytes) > len {
            continue;
        }
        let mut raw = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        match read_exact_at(file, offset, &mut raw) {
            Ok(()) => {
                if let Some(table) = decode_table(header, &raw) {
                    return Ok(Some(table));
                }
            }
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(None), Err)
}

/// The most files that one snapshot needs; beyond it the emptiest are merged into the newest.
pub const FILES_MAX: usize = 32;

/// The largest chunk: what one read allocates.
pub const CHUNK_BYTES_MAX: usize = 64 << 20;

#[cfg(test)]
mod tests;
