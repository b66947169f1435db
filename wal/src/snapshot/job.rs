//! Writing a snapshot, on a thread of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use bytes::Bytes;

use super::layout::{Header, encode_table, table_blocks};
use super::{
    CHUNK_BYTES_MAX, ChunkId, ChunkPlace, ChunkReader, FILES_MAX, FileUse, Snapshot, SnapshotError,
    SnapshotInfo, Table, file_name,
};
use crate::buffer::{AlignedBuf, BufferPool};
use crate::entry::LogIndex;
use crate::storage::{BLOCK_BYTES, Storage, StorageFile};

/// Everything that is needed to write one snapshot.
pub struct SnapshotJob<S: Storage> {
    storage: S,
    pool: BufferPool,
    /// What the state was when it was last snapshotted.
    base: Option<Arc<Table>>,
    /// Whose files may be used again.
    files: Option<Arc<Table>>,
    store: [u8; 16],
    number: u64,
    index: LogIndex,
    dirty: BTreeMap<ChunkId, Bytes>,
    removed: BTreeSet<ChunkId>,
}

/// What a snapshot builds on.
pub struct Base<'a, S> {
    /// The newest snapshot: what is not dirty is as it was there.
    pub state: &'a Snapshot<S>,
    /// The one whose files are used again where they hold the same. If that is not the newest, the two
    /// generations that are kept share no file, and a damaged or missing one costs only one of them.
    pub files: Option<&'a Snapshot<S>>,
}

/// A snapshot that is durable and not yet named by the manifest.
#[derive(Debug)]
pub struct SnapshotDone {
    pub(super) table: Arc<Table>,
    /// Bytes of chunks written, the carried ones included.
    pub chunk_bytes: u64,
    /// Chunks of older files that could not be read. The snapshot still points at them; the caller, who
    /// has their content, should give them as dirty next time.
    pub damaged: Vec<ChunkId>,
}

impl SnapshotDone {
    pub fn info(&self) -> SnapshotInfo {
        self.table.info()
    }
}

impl<S: Storage> SnapshotJob<S> {
    /// A snapshot of number `number` at `index`: the chunks of the base's state, without the `removed`, with
    /// the `dirty` ones put in or in place of the old. Without a base `dirty` is the whole state.
    ///
    /// Only one job may run at a time, and `number` must be above that of every snapshot that a
    /// manifest names.
    ///
    /// # Panics
    /// If `number` is not above the base's.
    pub fn new(
        storage: S,
        pool: BufferPool,
        store: [u8; 16],
        base: Option<Base<'_, S>>,
        (number, index): (u64, LogIndex),
        dirty: impl IntoIterator<Item = (ChunkId, Bytes)>,
        removed: impl IntoIterator<Item = ChunkId>,
    ) -> SnapshotJob<S> {
        let files = base.as_ref().and_then(|base| base.files);
        let files = files.map(|snapshot| snapshot.table.clone());
        let base = base.map(|base| base.state.table.clone());
        let dirty: BTreeMap<ChunkId, Bytes> = dirty.into_iter().collect();
        if let Some(base) = &base {
            assert!(base.number < number, "snapshot numbers ascend");
            assert!(base.index <= index, "a snapshot is not older than its base");
        }
        SnapshotJob {
            storage,
            pool,
            base,
            files,
            store,
            number,
            index,
            dirty,
            removed: removed.into_iter().collect(),
        }
    }

    /// Writes the file and returns when it and its name are durable. After an error nothing of it
    /// counts, and its file is gone: on a full disk each job that is tried would else leave another.
    pub fn run(self) -> Result<SnapshotDone, SnapshotError> {
        if let Some(bytes) = self.dirty.values().map(Bytes::len).max()
            && bytes > CHUNK_BYTES_MAX
        {
            return Err(SnapshotError::ChunkTooLarge { bytes });
        }
        let name = file_name(self.number);
        self.write(&name).inspect_err(|_| {
            // Best effort: the next opening deletes what the manifest does not name.
            let _ = self.storage.remove(&name);
        })
    }

    fn write(&self, name: &str) -> Result<SnapshotDone, SnapshotError> {
        let io = |what| {
            let file = name.to_owned();
            move |source| SnapshotError::Io { what, file, source }
        };
        let plan = self.plan();
        match self.storage.remove(name) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io("replace")(e)),
            _ => {}
        }
        let file = self.storage.create(name).map_err(io("create"))?;
        file.preallocate(plan.file_bytes_max())
            .map_err(io("preallocate"))?;
        let mut writer = Writer::new(&file, &self.pool);
        let filled = self.write_chunks(plan, &mut writer)?;
        let done = self.finish(filled, writer).map_err(io("write"))?;
        file.sync_data().map_err(io("sync"))?;
        self.storage.sync_dir().map_err(io("sync the folder of"))?;
        Ok(done)
    }

    /// Which chunks stay where they are, and which are carried over: from files that are mostly dead, or
    /// that this snapshot shall not share.
    fn plan(&self) -> Plan {
        let (mut kept, mut carried) = (BTreeMap::new(), BTreeMap::new());
        let mut files = BTreeMap::new();
        if let Some(base) = &self.base {
            let mut reader = ChunkReader::new(&self.storage);
            for (&id, place) in &base.chunks {
                if self.dirty.contains_key(&id) || self.removed.contains(&id) {
                    continue;
                }
                match self.same_elsewhere(id, place, &mut reader) {
                    Some(place) => kept.insert(id, place),
                    None => carried.insert(id, *place),
                };
            }
        }
        if let Some(reused) = &self.files {
            files = reused.files.clone();
        }
        let mut live_bytes: BTreeMap<u64, u64> = BTreeMap::new();
        for place in kept.values() {
            *live_bytes.entry(place.file).or_default() += u64::from(place.bytes);
        }
        files.retain(|number, _| live_bytes.contains_key(number));
        let mut emptied: BTreeSet<u64> = files
            .iter()
            .filter(|(number, file)| live_bytes[number] * 2 < file.chunk_bytes)
            .map(|(&number, _)| number)
            .collect();
        let mut full: Vec<_> = files
            .keys()
            .filter(|n| !emptied.contains(n))
            .copied()
            .collect();
        full.sort_by_key(|number| live_bytes[number]);
        // The new file is one of them.
        emptied.extend(&full[..(full.len() + 1).saturating_sub(FILES_MAX)]);
        let merged = kept.iter().filter(|(_, at)| emptied.contains(&at.file));
        carried.extend(merged.map(|(&id, &place)| (id, place)));
        kept.retain(|_, place| !emptied.contains(&place.file));
        // A carried chunk that cannot be read stays where it is.
        if let Some(base) = &self.base {
            files.extend(base.files.iter().map(|(&number, &file)| (number, file)));
        }
        Plan {
            dirty_bytes: self.dirty.values().map(|chunk| chunk.len() as u64).sum(),
            dirty_chunks: self.dirty.len(),
            carried,
            kept,
            files,
        }
    }

    /// Where the files that are used again hold what the base has at `place`.
    fn same_elsewhere(
        &self,
        id: ChunkId,
        place: &ChunkPlace,
        reader: &mut ChunkReader<'_, S>,
    ) -> Option<ChunkPlace> {
        let reused = self.files.as_ref()?;
        let there = *reused.chunks.get(&id)?;
        if there == *place {
            return Some(there);
        }
        let alike = (there.bytes, there.crc) == (place.bytes, place.crc);
        // Written before the other snapshot was made, and not changed since.
        let unchanged = place.file < reused.number;
        let same =
            alike && (unchanged || reader.read(id, place).ok() == reader.read(id, &there).ok());
        same.then_some(there)
    }

    fn write_chunks(
        &self,
        plan: Plan,
        writer: &mut Writer<'_, S::File>,
    ) -> Result<Filled, SnapshotError> {
        let name = file_name(self.number);
        let io = |source| SnapshotError::Io {
            what: "write",
            file: name.clone(),
            source,
        };
        let Plan {
            carried,
            kept: mut chunks,
            mut files,
            ..
        } = plan;
        let mut damaged = Vec::new();
        for (&id, bytes) in &self.dirty {
            chunks.insert(id, self.write_chunk(bytes, writer).map_err(io)?);
        }
        let mut reader = ChunkReader::new(&self.storage);
        for (id, old) in carried {
            let place = match reader.read(id, &old) {
                Ok(bytes) => self.write_chunk(&bytes, writer).map_err(io)?,
                // Whether the bytes are wrong or the disk does not give them: a snapshot that still
                // points there is no worse than the last one.
                Err(_) => {
                    damaged.push(id);
                    old
                }
            };
            chunks.insert(id, place);
        }
        let chunk_bytes = writer.end() - BLOCK_BYTES as u64;
        let used: BTreeSet<u64> = chunks.values().map(|place| place.file).collect();
        files.retain(|number, _| used.contains(number));
        files.insert(self.number, FileUse { chunk_bytes });
        Ok(Filled {
            files,
            chunks,
            damaged,
            chunk_bytes,
        })
    }

    fn write_chunk(
        &self,
        bytes: &[u8],
        writer: &mut Writer<'_, S::File>,
    ) -> io::Result<ChunkPlace> {
        let place = ChunkPlace {
            file: self.number,
            offset: writer.end(),
            bytes: u32::try_from(bytes.len()).expect("checked: at most CHUNK_BYTES_MAX"),
            crc: crc32fast::hash(bytes),
        };
        writer.push(bytes)?;
        Ok(place)
    }

    /// Writes table and headers behind the chunks; the header in front comes last.
    fn finish(&self, filled: Filled, mut writer: Writer<'_, S::File>) -> io::Result<SnapshotDone> {
        writer.pad()?;
        let (table, digest) = encode_table(&filled.files, &filled.chunks);
        let header = Header {
            store: self.store,
            number: self.number,
            index: self.index,
            table_offset: writer.end(),
            files: u32::try_from(filled.files.len()).map_err(io::Error::other)?,
            chunks: u32::try_from(filled.chunks.len()).map_err(io::Error::other)?,
            chunk_bytes: filled.chunk_bytes,
            digest,
        };
        assert_eq!(
            table.len() as u64,
            table_blocks(header.files, header.chunks)
        );
        writer.push(&table)?;
        writer.push(&table)?;
        let block = header.encode(&self.pool);
        writer.push(&block)?;
        let end = writer.end();
        let file = writer.flush()?;
        // Shorter than planned where a damaged chunk was left in its place.
        if file.len()? != end {
            file.set_len(end)?;
        }
        file.write_durable_at(0, &block)?;
        Ok(SnapshotDone {
            table: Arc::new(Table {
                store: self.store,
                number: self.number,
                index: self.index,
                digest,
                files: filled.files,
                chunks: filled.chunks,
            }),
            chunk_bytes: filled.chunk_bytes,
            damaged: filled.damaged,
        })
    }
}

struct Plan {
    dirty_bytes: u64,
    dirty_chunks: usize,
    /// With their old places.
    carried: BTreeMap<ChunkId, ChunkPlace>,
    kept: BTreeMap<ChunkId, ChunkPlace>,
    /// Files that may still hold something alive.
    files: BTreeMap<u64, FileUse>,
}

impl Plan {
    /// What the file takes if all that is to be carried is good.
    fn file_bytes_max(&self) -> u64 {
        let carried: u64 = self
            .carried
            .values()
            .map(|place| u64::from(place.bytes))
            .sum();
        let chunks = (self.kept.len() + self.carried.len() + self.dirty_chunks) as u64;
        let table = (FILES_MAX as u64 + chunks) * 32;
        let blocks = |bytes: u64| bytes.next_multiple_of(BLOCK_BYTES as u64);
        2 * BLOCK_BYTES as u64 + blocks(self.dirty_bytes + carried) + 2 * blocks(table)
    }
}

struct Filled {
    files: BTreeMap<u64, FileUse>,
    chunks: BTreeMap<ChunkId, ChunkPlace>,
    damaged: Vec<ChunkId>,
    chunk_bytes: u64,
}

/// Writes bytes one behind the other from block 1 on, in large durable steps, so that the disk is
/// never busy with a snapshot for longer than one step.
struct Writer<'a, F> {
    file: &'a F,
    buf: AlignedBuf,
    /// Where the buffer begins in the file.
    start: u64,
}

impl<'a, F: StorageFile> Writer<'a, F> {
    fn new(file: &'a F, pool: &BufferPool) -> Writer<'a, F> {
        Writer {
            file,
            buf: pool.take(STEP_BYTES),
            start: BLOCK_BYTES as u64,
        }
    }

    fn end(&self) -> u64 {
        self.start + self.buf.len() as u64
    }

    fn push(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(STEP_BYTES - self.buf.len()));
            self.buf.extend_from_slice(now);
            if self.buf.len() == STEP_BYTES {
                self.write_out()?;
            }
            bytes = later;
        }
        Ok(())
    }

    fn pad(&mut self) -> io::Result<()> {
        self.buf.pad_to_block();
        if self.buf.len() == STEP_BYTES {
            self.write_out()?;
        }
        Ok(())
    }

    fn flush(mut self) -> io::Result<&'a F> {
        self.write_out()?;
        Ok(self.file)
    }

    fn write_out(&mut self) -> io::Result<()> {
        self.file.write_durable_at(self.start, &self.buf)?;
        self.start += self.buf.len() as u64;
        self.buf.resize(0);
        Ok(())
    }
}

const STEP_BYTES: usize = 1 << 20;

const _: () = assert!(STEP_BYTES.is_multiple_of(BLOCK_BYTES));
