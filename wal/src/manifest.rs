//! The manifest: the durable list of what the log consists of.
//!
//! Owns the file `manifest`: appended records, each a change, whose fold is the [`State`]. So a missing
//! segment is noticed, an epoch is raised before anything is written in it, and a cut, a cleaning or a
//! loss that was accepted is one durable step.
//!
//! ```text
//! record, on a block of its own:
//!  0 magic "MPMF"  4 crc u32  8 payload bytes u32  12 version u16  14 zero u16  16 sequence u64
//! 24 durable index u64  32 previous record's crc u32  36 zero u32   40 payload (postcard), zeros
//! ```
//!
//! Invariants: one record is in flight at a time, so bad bytes with a good record behind them are
//! damage and bad bytes at the end are a torn record; sequences ascend by one; `epoch` never falls; the
//! file is preallocated, so a start needs no new space. When it is nearly full, one record with the whole
//! state begins a new file that replaces it by a rename.
//!
//! It deliberately does not look at the files it names.

use std::collections::BTreeMap;
use std::io;

use serde::{Deserialize, Serialize};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::buffer::BufferPool;
use crate::entry::LogIndex;
use crate::error::{IndexRange, OpenError};
use crate::planted::{self, Bug};
use crate::segment::{Contents, SegmentId, file_name};
use crate::storage::{BLOCK_BYTES, Storage, StorageFile, is_full, is_zero};

/// One step of the log's life. Variants are only ever added, at the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Change {
    /// The first record of a file: everything before it, folded.
    Base(State),
    /// A start: the new epoch; how the segments that were open ended; those that held nothing; the
    /// snapshots that cannot be read.
    Started {
        epoch: u32,
        cut: Vec<(SegmentId, Cut)>,
        dropped: Vec<SegmentId>,
        lost_snapshots: Vec<u64>,
    },
    Began {
        id: SegmentId,
        uuid: [u8; 16],
        first: LogIndex,
        epoch: u32,
        file_bytes: u64,
    },
    Sealed {
        id: SegmentId,
        last: LogIndex,
        file_bytes: u64,
    },
    Removed {
        ids: Vec<SegmentId>,
    },
    Cleaned {
        id: SegmentId,
        generation: u32,
        uuid: [u8; 16],
        last: LogIndex,
        file_bytes: u64,
    },
    Snapshot(SnapshotEntry),
    /// Entries at or above `from` are void, and so is what they vouched for: the segments that hold them end
    /// before or are dropped, and later entries have a higher epoch.
    Truncated {
        from: LogIndex,
        epoch: u32,
        cut: Vec<(SegmentId, Cut)>,
        dropped: Vec<SegmentId>,
    },
    /// The loss of these entries was accepted.
    Skipped(IndexRange),
}

/// Where the entries of an unsealed segment end for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cut {
    pub last: LogIndex,
    pub entries_end: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotEntry {
    pub number: u64,
    pub index: LogIndex,
    pub digest: [u8; 16],
    /// All files that hold its chunks, its own index file last.
    pub files: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SegmentEntry {
    pub generation: u32,
    pub uuid: [u8; 16],
    pub first: LogIndex,
    pub epoch: u32,
    pub contents: Contents,
    pub end: SegmentEnd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SegmentEnd {
    /// Still written, or was when the broker stopped. The file was made this long before it was named
    /// here, so a shorter one has lost its end.
    Open {
        file_bytes: u64,
    },
    Cut(Cut),
    Sealed {
        last: LogIndex,
        file_bytes: u64,
    },
}

/// The fold of all changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    pub store: [u8; 16],
    pub epoch: u32,
    pub next_segment: u64,
    pub segments: BTreeMap<SegmentId, SegmentEntry>,
    /// Oldest first, at most [`SNAPSHOTS_KEPT`].
    pub snapshots: Vec<SnapshotEntry>,
    pub skipped: Vec<IndexRange>,
    /// The highest index that any record vouched for.
    pub durable: LogIndex,
}

impl State {
    pub fn apply(&mut self, change: &Change, durable: LogIndex) {
        self.durable = self.durable.max(durable);
        match change {
            Change::Base(state) => *self = state.clone(),
            Change::Started {
                epoch,
                cut,
                dropped,
                lost_snapshots,
            } => {
                self.epoch = self.epoch.max(*epoch);
                self.end_segments(cut, dropped);
                self.snapshots
                    .retain(|snapshot| !lost_snapshots.contains(&snapshot.number));
            }
            Change::Began {
                id,
                uuid,
                first,
                epoch,
                file_bytes,
            } => {
                self.next_segment = self.next_segment.max(id.0 + 1);
                let entry = SegmentEntry {
                    generation: 0,
                    uuid: *uuid,
                    first: *first,
                    epoch: *epoch,
                    contents: Contents::Whole,
                    end: SegmentEnd::Open {
                        file_bytes: *file_bytes,
                    },
                };
                self.segments.insert(*id, entry);
            }
            Change::Sealed {
                id,
                last,
                file_bytes,
            } => {
                if let Some(entry) = self.segments.get_mut(id) {
                    entry.end = SegmentEnd::Sealed {
                        last: *last,
                        file_bytes: *file_bytes,
                    };
                }
            }
            Change::Removed { ids } => self.remove(ids),
            Change::Cleaned {
                id,
                generation,
                uuid,
                last,
                file_bytes,
            } => {
                if let Some(entry) = self.segments.get_mut(id) {
                    entry.generation = *generation;
                    entry.uuid = *uuid;
                    entry.contents = Contents::Sparse;
                    entry.end = SegmentEnd::Sealed {
                        last: *last,
                        file_bytes: *file_bytes,
                    };
                }
            }
            Change::Snapshot(entry) => {
                self.snapshots.push(entry.clone());
                let excess = self.snapshots.len().saturating_sub(SNAPSHOTS_KEPT);
                self.snapshots.drain(..excess);
                self.forget_skips();
            }
            Change::Truncated {
                from,
                epoch,
                cut,
                dropped,
            } => {
                self.epoch = self.epoch.max(*epoch);
                self.durable = self.durable.min(from.previous());
                self.end_segments(cut, dropped);
            }
            Change::Skipped(range) => {
                self.skipped.push(*range);
                self.skipped.sort();
            }
        }
    }

    pub fn is_skipped(&self, index: LogIndex) -> bool {
        self.skip_at(index).is_some()
    }

    /// The accepted loss that `index` lies in.
    pub fn skip_at(&self, index: LogIndex) -> Option<IndexRange> {
        self.skipped
            .iter()
            .find(|range| range.contains(index))
            .copied()
    }

    /// Up to here every kept snapshot covers the log. A single one covers nothing: were it damaged, the
    /// whole log would have to be replayed.
    pub fn covered(&self) -> LogIndex {
        match &self.snapshots[..] {
            [oldest, _, ..] => oldest.index,
            _ => LogIndex::NONE,
        }
    }

    fn end_segments(&mut self, cut: &[(SegmentId, Cut)], dropped: &[SegmentId]) {
        for (id, cut) in cut {
            if let Some(entry) = self.segments.get_mut(id) {
                entry.end = SegmentEnd::Cut(*cut);
            }
        }
        self.remove(dropped);
    }

    fn remove(&mut self, ids: &[SegmentId]) {
        for id in ids {
            self.segments.remove(id);
        }
    }

    /// Skips below the oldest kept snapshot are never replayed again.
    fn forget_skips(&mut self) {
        let covered = self.covered();
        self.skipped.retain(|range| range.last > covered);
    }
}

/// The open manifest.
pub(crate) struct Manifest<S: Storage> {
    storage: S,
    file: S::File,
    pool: BufferPool,
    bytes_max: u64,
    end: u64,
    sequence: u64,
    previous_crc: u32,
    state: State,
    torn: Option<Stretch>,
}

/// Bytes of the file that are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub position: u64,
    pub bytes: u64,
}

/// What a write of the manifest failed at; nothing is known about the record.
#[derive(Debug)]
pub(crate) struct ManifestError(pub io::Error);

impl<S: Storage> Manifest<S> {
    /// Writes the first record of a new folder.
    pub fn create(
        storage: S,
        pool: BufferPool,
        bytes_max: u64,
        store: [u8; 16],
    ) -> io::Result<Self> {
        let state = State {
            store,
            next_segment: 1,
            ..State::default()
        };
        Self::write_base(storage, pool, bytes_max, state, 0)
    }

    /// Reads and folds the file. A torn last record counts as never written.
    pub fn read(storage: S, pool: BufferPool, bytes_max: u64) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io {
            what: "read",
            file: NAME.into(),
            source,
        };
        let file = storage.open(NAME).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                OpenError::ReadOnlyFolder(source)
            }
            _ => io(source),
        })?;
        // What is folded here must still be there after the next power loss.
        file.sync_data().map_err(io)?;
        let bytes = read_all(&file).map_err(io)?;
        let folded = fold(&bytes)?;
        Ok(Manifest {
            storage,
            file,
            pool,
            bytes_max,
            end: folded.end,
            sequence: folded.sequence,
            previous_crc: folded.crc,
            state: folded.state,
            torn: folded.torn,
        })
    }

    /// What stands behind the last good record: one that was torn, as far as anybody can tell.
    pub fn torn(&self) -> Option<Stretch> {
        self.torn
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    /// Appends a change and returns when it is durable.
    pub fn append(&mut self, change: Change, durable: LogIndex) -> Result<(), ManifestError> {
        if self.end + RESERVE_BYTES > self.bytes_max {
            self.renew()?;
        }
        let bytes = encode(
            &self.pool,
            &change,
            self.sequence + 1,
            durable,
            self.previous_crc,
        );
        let written = match planted::is(Bug::ManifestNotSynced) {
            true => self.file.write_at(self.end, &bytes.0),
            false => self.file.write_durable_at(self.end, &bytes.0),
        };
        written.map_err(ManifestError)?;
        self.end += bytes.0.len() as u64;
        self.sequence += 1;
        self.previous_crc = bytes.1;
        self.state.apply(&change, durable);
        Ok(())
    }

    /// Begins a new file if there is room for one; a full disk leaves the old one in use, which then
    /// grows over its bound.
    fn renew(&mut self) -> Result<(), ManifestError> {
        let (storage, pool) = (self.storage.clone(), self.pool.clone());
        let state = self.state.clone();
        match Self::write_base(storage, pool, self.bytes_max, state, self.sequence) {
            Ok(new) => *self = new,
            Err(error) if is_full(error.kind()) => {}
            Err(error) => return Err(ManifestError(error)),
        }
        Ok(())
    }

    fn write_base(
        storage: S,
        pool: BufferPool,
        bytes_max: u64,
        state: State,
        sequence: u64,
    ) -> io::Result<Self> {
        match storage.remove(NEW_NAME) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = storage.create(NEW_NAME)?;
        let durable = state.durable;
        let change = Change::Base(state);
        let (bytes, crc) = encode(&pool, &change, sequence + 1, durable, 0);
        // A large state must leave room for changes, or every one of them would begin a new file.
        let bytes_max = bytes_max.max(2 * bytes.len() as u64 + MANIFEST_BYTES_MIN);
        file.preallocate(bytes_max)?;
        file.write_durable_at(0, &bytes)?;
        file.sync_data()?;
        // From the rename on no error may look like a full disk: the old file could be gone.
        storage.rename(NEW_NAME, NAME).map_err(io::Error::other)?;
        storage.sync_dir().map_err(io::Error::other)?;
        let Change::Base(state) = change else {
            unreachable!("made above")
        };
        let end = bytes.len() as u64;
        let sequence = sequence + 1;
        Ok(Manifest {
            storage,
            file,
            pool,
            bytes_max,
            end,
            sequence,
            previous_crc: crc,
            state,
            torn: None,
        })
    }
}

/// What the manifest's bytes tell, without a claim to write it; for offline tools.
pub(crate) fn read_state(storage: &impl Storage) -> Result<Folded, OpenError> {
    let io = |source| OpenError::Io {
        what: "read",
        file: NAME.into(),
        source,
    };
    let file = storage.open_read(NAME).map_err(io)?;
    let bytes = read_all(&file).map_err(io)?;
    fold(&bytes)
}

impl State {
    pub fn file_name(&self, id: SegmentId) -> Option<String> {
        self.segments
            .get(&id)
            .map(|entry| file_name(id, entry.generation))
    }
}

pub(crate) struct Folded {
    pub state: State,
    /// Behind the last good record.
    pub torn: Option<Stretch>,
    /// Behind a good record's payload, within its block.
    pub dirty_padding: Option<Stretch>,
    end: u64,
    sequence: u64,
    crc: u32,
}

fn fold(bytes: &[u8]) -> Result<Folded, OpenError> {
    let mut folded = Folded {
        state: State::default(),
        torn: None,
        dirty_padding: None,
        end: 0,
        sequence: 0,
        crc: 0,
    };
    while let Some(record) = decode(behind(bytes, folded.end))? {
        // The first record of a file starts the chain at any number.
        let first = folded.end == 0 && matches!(record.change, Change::Base(_));
        if !first && (record.sequence != folded.sequence + 1 || record.previous_crc != folded.crc) {
            break;
        }
        folded.state.apply(&record.change, record.durable);
        folded.sequence = record.sequence;
        folded.crc = record.crc;
        let (from, end) = (folded.end + record.used_bytes, folded.end + record.bytes);
        let padding = bytes.get(from as usize..end as usize).unwrap_or_default();
        folded.dirty_padding = folded.dirty_padding.or(nonzero(padding, from));
        folded.end = end;
    }
    refuse_hole(bytes, &folded)?;
    if folded.sequence == 0 {
        return Err(OpenError::ManifestDamaged { at: 0 });
    }
    folded.torn = nonzero(behind(bytes, folded.end), folded.end);
    Ok(folded)
}

/// What follows `end`; nothing if the file was cut in its last record's padding.
fn behind(bytes: &[u8], end: u64) -> &[u8] {
    bytes.get(end as usize..).unwrap_or_default()
}

/// From the first to the last byte that is not zero.
fn nonzero(bytes: &[u8], position: u64) -> Option<Stretch> {
    if is_zero(bytes) {
        return None;
    }
    let first = bytes.iter().position(|&byte| byte != 0)?;
    let last = bytes.iter().rposition(|&byte| byte != 0)?;
    Some(Stretch {
        position: position + first as u64,
        bytes: (last - first + 1) as u64,
    })
}

/// Good records behind the end were written after something that is bad now.
fn refuse_hole(bytes: &[u8], folded: &Folded) -> Result<(), OpenError> {
    let behind = behind(bytes, folded.end);
    for at in (0..behind.len()).step_by(BLOCK_BYTES) {
        if let Ok(Some(record)) = decode(&behind[at..])
            && record.sequence > folded.sequence
        {
            return Err(OpenError::ManifestDamaged { at: folded.end });
        }
    }
    Ok(())
}

struct DecodedRecord {
    change: Change,
    sequence: u64,
    durable: LogIndex,
    previous_crc: u32,
    crc: u32,
    used_bytes: u64,
    /// In whole blocks.
    bytes: u64,
}

/// The record at the start of `bytes`; `None` if there is no good one.
fn decode(bytes: &[u8]) -> Result<Option<DecodedRecord>, OpenError> {
    let Ok((raw, rest)) = RawRecord::read_from_prefix(bytes) else {
        return Ok(None);
    };
    let payload_bytes = raw.payload_bytes.get() as usize;
    let Some(payload) = rest.get(..payload_bytes).filter(|_| raw.magic == MAGIC) else {
        return Ok(None);
    };
    if crc_of(&raw, payload) != raw.crc.get() {
        return Ok(None);
    }
    let newer = |found| OpenError::NewerFormat {
        file: NAME.to_owned(),
        found,
        known: VERSION,
    };
    if raw.version.get() != VERSION {
        return Err(newer(raw.version.get()));
    }
    // The checksum is right, so what cannot be understood was written by somebody who knows more.
    let change = postcard::from_bytes(payload).map_err(|_| newer(VERSION + 1))?;
    Ok(Some(DecodedRecord {
        change,
        sequence: raw.sequence.get(),
        durable: LogIndex(raw.durable.get()),
        previous_crc: raw.previous_crc.get(),
        crc: raw.crc.get(),
        used_bytes: (size_of::<RawRecord>() + payload_bytes) as u64,
        bytes: (size_of::<RawRecord>() + payload_bytes).next_multiple_of(BLOCK_BYTES) as u64,
    }))
}

fn encode(
    pool: &BufferPool,
    change: &Change,
    sequence: u64,
    durable: LogIndex,
    previous_crc: u32,
) -> (crate::buffer::AlignedBuf, u32) {
    let payload = postcard::to_stdvec(change).expect("a change has only plain, sized data");
    let mut raw = RawRecord {
        magic: MAGIC,
        crc: U32::ZERO,
        payload_bytes: U32::new(
            u32::try_from(payload.len()).expect("a manifest is far below 4 GiB"),
        ),
        version: U16::new(VERSION),
        zero: U16::ZERO,
        sequence: U64::new(sequence),
        durable: U64::new(durable.0),
        previous_crc: U32::new(previous_crc),
        zero_too: U32::ZERO,
    };
    let crc = crc_of(&raw, &payload);
    raw.crc = U32::new(crc);
    let mut buf = pool.take(size_of::<RawRecord>() + payload.len());
    buf.extend_from_slice(raw.as_bytes());
    buf.extend_from_slice(&payload);
    buf.pad_to_block();
    (buf, crc)
}

fn crc_of(raw: &RawRecord, payload: &[u8]) -> u32 {
    let mut unsigned = *raw;
    unsigned.crc = U32::ZERO;
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(unsigned.as_bytes());
    hasher.update(payload);
    hasher.finalize()
}

fn read_all(file: &impl StorageFile) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(file.len()?).map_err(io::Error::other)?];
    let read = file.read_uncached_at(0, &mut bytes)?;
    bytes.truncate(read);
    Ok(bytes)
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecord {
    magic: [u8; 4],
    crc: U32,
    payload_bytes: U32,
    version: U16,
    zero: U16,
    sequence: U64,
    durable: U64,
    previous_crc: U32,
    zero_too: U32,
}

pub(crate) const NAME: &str = "manifest";
pub(crate) const NEW_NAME: &str = "manifest.new";
/// Generations of snapshots that are kept, so that one damaged newest snapshot loses nothing.
pub(crate) const SNAPSHOTS_KEPT: usize = 2;
/// The least size of a manifest file: the reserve, a base and some changes.
pub(crate) const MANIFEST_BYTES_MIN: u64 = 16 * BLOCK_BYTES as u64;
/// Left free at the file's end for the records of a start on a full disk.
const RESERVE_BYTES: u64 = 8 * BLOCK_BYTES as u64;
const MAGIC: [u8; 4] = *b"MPMF";
const VERSION: u16 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::SimStorage;

    const BYTES_MAX: u64 = MANIFEST_BYTES_MIN;

    fn create(storage: &SimStorage) -> Manifest<SimStorage> {
        Manifest::create(storage.clone(), BufferPool::new(0), BYTES_MAX, [7; 16]).unwrap()
    }

    fn read(storage: &SimStorage) -> Result<Manifest<SimStorage>, OpenError> {
        Manifest::read(storage.clone(), BufferPool::new(0), BYTES_MAX)
    }

    fn began(id: u64) -> Change {
        let first = LogIndex(id * 10);
        Change::Began {
            id: SegmentId(id),
            uuid: [id as u8; 16],
            first,
            epoch: 1,
            file_bytes: 65536,
        }
    }

    /// Where the records stand: each takes one block.
    fn at(record: u64) -> u64 {
        record * BLOCK_BYTES as u64
    }

    #[test]
    fn the_state_outlives_new_beginnings_of_the_file() {
        let storage = SimStorage::new(1);
        let mut manifest = create(&storage);
        for id in 1..100 {
            manifest.append(began(id), LogIndex(id)).unwrap();
        }
        assert!(manifest.end <= manifest.bytes_max, "{} bytes", manifest.end);
        let state = manifest.state().clone();
        assert_eq!((state.segments.len(), state.next_segment), (99, 100));
        storage.restart();
        let again = read(&storage).unwrap();
        assert_eq!((again.state(), again.sequence), (&state, manifest.sequence));
    }

    #[test]
    fn a_torn_last_record_was_never_written() {
        let storage = SimStorage::new(1);
        let mut manifest = create(&storage);
        manifest.append(began(1), LogIndex(1)).unwrap();
        let before = manifest.state().clone();
        manifest.append(began(2), LogIndex(2)).unwrap();
        storage.corrupt(NAME, at(2) + 50, 1).unwrap();
        let mut manifest = read(&storage).unwrap();
        assert_eq!(manifest.state(), &before);
        manifest.append(began(3), LogIndex(3)).unwrap();
        assert_eq!(read(&storage).unwrap().state(), manifest.state());
    }

    #[test]
    fn a_file_that_was_cut_in_its_last_padding_is_whole() {
        let storage = SimStorage::new(1);
        let mut manifest = create(&storage);
        manifest.append(began(1), LogIndex(1)).unwrap();
        storage.open(NAME).unwrap().set_len(at(1) + 500).unwrap();
        let mut again = read(&storage).unwrap();
        assert_eq!(again.state(), manifest.state());
        again.append(began(2), LogIndex(2)).unwrap();
        assert_eq!(read(&storage).unwrap().state(), again.state());
    }

    #[test]
    fn a_file_without_a_record_is_damage() {
        let storage = SimStorage::new(1);
        let manifest = create(&storage);
        drop(manifest);
        storage.open(NAME).unwrap().set_len(0).unwrap();
        for refused in [read(&storage).map(drop), read_state(&storage).map(drop)] {
            assert!(matches!(refused, Err(OpenError::ManifestDamaged { at: 0 })));
        }
    }

    #[test]
    fn a_bad_record_before_a_good_one_is_damage() {
        let storage = SimStorage::new(1);
        let mut manifest = create(&storage);
        for id in 1..4 {
            manifest.append(began(id), LogIndex(id)).unwrap();
        }
        storage.corrupt(NAME, at(2) + 50, 1).unwrap();
        let refused = read(&storage).map(drop);
        assert!(
            matches!(refused, Err(OpenError::ManifestDamaged { at: 8192 })),
            "{refused:?}"
        );
    }

    #[test]
    fn a_full_disk_leaves_the_old_file_in_use() {
        let storage = SimStorage::new(1);
        let mut manifest = create(&storage);
        storage.set_capacity(manifest.bytes_max);
        let room = (manifest.bytes_max - manifest.end) / at(1);
        for id in 1..=room {
            manifest.append(began(id), LogIndex(id)).unwrap();
        }
        assert_eq!(read(&storage).unwrap().state(), manifest.state());
        assert_eq!(manifest.state().segments.len() as u64, room);
    }

    #[test]
    fn two_snapshots_are_kept_and_both_must_cover() {
        let mut state = State::default();
        for number in 1..=3 {
            let index = LogIndex(number * 10);
            let files = vec![format!("file {number}")];
            let entry = SnapshotEntry {
                number,
                index,
                digest: [0; 16],
                files,
            };
            state.apply(&Change::Snapshot(entry), index);
        }
        let numbers: Vec<u64> = state.snapshots.iter().map(|entry| entry.number).collect();
        assert_eq!((numbers, state.covered()), (vec![2, 3], LogIndex(20)));
    }
}
