//! Cleaning: getting the space of dead records back without moving the live ones in the log.
//!
//! Owns the copying of a sealed segment's live records into a sparse replacement. Each keeps its index
//! and record number, so every reference to it stays good and `apply` never learns of it; one manifest
//! record swaps the files. A record with several messages is copied whole as long as one of them lives.
//!
//! Only segments that every kept snapshot covers are cleaned, because a sparse one cannot be replayed. One
//! with damage in what is to be kept stays as it is: damaged bytes may be all that is left of a message.

use std::collections::BTreeSet;
use std::io;

use xxhash_rust::xxh3::Xxh3;

use crate::buffer::BufferPool;
use crate::directory::{OpenTable, Row, Spot, Unreadable};
use crate::entry::{EntryHeader, EntryKind, LogIndex, Place};
use crate::error::{IndexRange, JobError, LogError, ReadError};
use crate::log::Log;
use crate::manifest::Change;
use crate::planted::{self, Bug};
use crate::record::{Group, Records};
use crate::retire::Pin;
use crate::seal::{open_sealed, write_footer};
use crate::segment::{Contents, ENTRIES_START, Footer, SegmentHeader, SegmentId, derive_uuid};
use crate::storage::{BLOCK_BYTES, Storage, StorageFile};
use crate::tables::{Body, SealedBody, Segment};

/// Copies one segment's live records. [`run`](Self::run) may block for long.
pub struct CleanJob<S: Storage> {
    storage: S,
    pool: BufferPool,
    segment: Pin<Segment<S::File>>,
    header: SegmentHeader,
    rows: Vec<Row>,
    places: BTreeSet<Place>,
    rows_before: u64,
}

/// What a [`CleanJob`] made; for `Log::install_cleaned`.
pub struct CleanDone<S: Storage> {
    id: SegmentId,
    made: Result<Segment<S::File>, IndexRange>,
}

impl<S: Storage> CleanDone<S> {
    /// What is damaged in the segment, so that nothing was made.
    pub fn damaged(&self) -> Option<IndexRange> {
        self.made.as_ref().err().copied()
    }
}

impl<S: Storage> Log<S> {
    /// A job that keeps the rows that are `live` and, besides, the records at `kept`. The caller drops
    /// it if it would save too little; see [`CleanJob::live_rows`].
    pub fn clean_plan(
        &self,
        id: SegmentId,
        kept: impl IntoIterator<Item = Place>,
        live: impl Fn(&Row) -> bool,
    ) -> Result<CleanJob<S>, LogError> {
        self.check_writable()?;
        let segment = self.covered_segment(id)?;
        let segment = segment.pin().ok_or(LogError::UnknownSegment(id))?;
        let Some(sealed) = segment.sealed() else {
            return Err(LogError::NotSealed(id));
        };
        let rows = live_rows(sealed, live).map_err(|error| segment.unreadable(error))?;
        let range = segment.range();
        let mut places: BTreeSet<Place> = kept
            .into_iter()
            .filter(|place| range.contains(place.index))
            .collect();
        places.extend(rows.iter().map(|row| row.place));
        let generation = segment.generation + 1;
        let header = SegmentHeader {
            store: self.store_id(),
            uuid: derive_uuid(self.store_id(), id, generation, segment.epoch),
            id,
            generation,
            first: segment.first,
            epoch: segment.epoch,
            contents: Contents::Sparse,
            predecessor: segment.uuid,
            predecessor_crc: sealed.footer.last_crc,
        };
        let rows_before = sealed.footer.rows;
        let (storage, pool) = (self.storage.clone(), self.pool.clone());
        Ok(CleanJob {
            storage,
            pool,
            segment,
            header,
            rows,
            places,
            rows_before,
        })
    }

    /// Puts the replacement in place of the segment; returns the bytes that become free. A damaged segment
    /// stays, and is remembered as such.
    pub fn install_cleaned(&mut self, done: CleanDone<S>) -> Result<u64, LogError> {
        self.check_writable()?;
        let new = match done.made {
            Ok(new) => new,
            Err(_) => {
                self.damaged.insert(done.id);
                return Ok(0);
            }
        };
        let old = match self.covered_segment(new.id) {
            Ok(old) if old.generation + 1 == new.generation => old,
            Ok(old) if old.name == new.name => return Err(LogError::Outdated(new.id)),
            overtaken => {
                let error = overtaken.err().unwrap_or(LogError::Outdated(new.id));
                // Its file goes with the next job that deletes some.
                self.retirement.hold(new).retire();
                return Err(error);
            }
        };
        let bytes = |segment: &Segment<S::File>| {
            segment
                .sealed()
                .map_or(0, |sealed| sealed.footer.file_bytes())
        };
        let freed = bytes(&old).saturating_sub(bytes(&new));
        self.change(Change::Cleaned {
            id: new.id,
            generation: new.generation,
            uuid: new.uuid,
            last: new.last(),
            file_bytes: bytes(&new),
        })?;
        let new = self.retirement.hold(new);
        self.tables.write().put(new);
        old.retire();
        Ok(freed)
    }
}

impl<S: Storage> CleanJob<S> {
    /// Rows that stay, and rows that there were.
    pub fn live_rows(&self) -> (u64, u64) {
        (self.rows.len() as u64, self.rows_before)
    }

    pub fn run(self) -> Result<CleanDone<S>, JobError> {
        let name = self.header.file_name();
        self.copy(&name).map_err(|source| {
            // Best effort: the next opening deletes what the manifest does not name.
            let _ = self.storage.remove(&name);
            JobError {
                what: "clean into",
                file: name.clone(),
                source,
            }
        })
    }

    fn copy(&self, name: &str) -> io::Result<CleanDone<S>> {
        match self.storage.remove(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = self.storage.create(name)?;
        let mut block = self.pool.take(BLOCK_BYTES);
        block.extend_from_slice(&self.header.encode());
        file.write_at(0, &block)?;
        let mut copy = Copy {
            file: &file,
            pool: &self.pool,
            uuid: self.header.uuid,
            table: OpenTable::default(),
            end: ENTRIES_START,
            records: 0,
            digest: Xxh3::new(),
            last_crc: self.header.predecessor_crc,
        };
        for index in self.indexes() {
            let live = self.places.range(first_of(index)..first_of(index.next()));
            match self.entry(index) {
                Ok((header, bytes)) => copy.entry(&header, &bytes, live)?,
                Err(ReadError::Io { source, .. }) => return Err(source),
                Err(_) => {
                    self.storage.remove(name)?;
                    return Ok(CleanDone {
                        id: self.header.id,
                        made: Err(IndexRange {
                            first: index,
                            last: index,
                        }),
                    });
                }
            }
        }
        for row in &self.rows {
            copy.table.add(*row);
        }
        // Entries and header first: the footer says that they are all there.
        file.sync_data()?;
        let footer = copy.finish(&self.segment)?;
        self.storage.sync_dir()?;
        Ok(CleanDone {
            id: self.header.id,
            made: Ok(self.open(name, footer)?),
        })
    }

    fn open(&self, name: &str, footer: Footer) -> io::Result<Segment<S::File>> {
        let shell = Segment {
            id: self.header.id,
            generation: self.header.generation,
            uuid: self.header.uuid,
            epoch: self.header.epoch,
            first: self.header.first,
            contents: Contents::Sparse,
            name: name.to_owned(),
            body: Body::Lost { last: footer.last },
        };
        open_sealed(&self.storage, &shell, footer)
    }

    fn indexes(&self) -> Vec<LogIndex> {
        let mut indexes: Vec<_> = self.places.iter().map(|place| place.index).collect();
        indexes.dedup();
        indexes
    }

    /// One entry of the old segment, checked.
    fn entry(&self, index: LogIndex) -> Result<(EntryHeader, Vec<u8>), ReadError> {
        let spot = self
            .segment
            .spot(index)?
            .ok_or(ReadError::NotFound(index))?;
        let mut bytes = Vec::new();
        let header = self.segment.read_entry(spot, &mut bytes)?;
        Ok((header, bytes))
    }
}

/// The replacement while it is written.
struct Copy<'a, F> {
    file: &'a F,
    pool: &'a BufferPool,
    uuid: [u8; 16],
    table: OpenTable,
    end: u64,
    records: u64,
    digest: Xxh3,
    last_crc: u32,
}

impl<F: StorageFile> Copy<'_, F> {
    fn entry<'p>(
        &mut self,
        old: &EntryHeader,
        bytes: &[u8],
        live: impl Iterator<Item = &'p Place>,
    ) -> io::Result<()> {
        let live: BTreeSet<u32> = live.map(|place| place.record).collect();
        let mut group = Group::new(self.pool);
        for record in Records::new(old, bytes).filter(|record| live.contains(&record.number)) {
            group.push_numbered(record.number, record.stamp, record.kind, &[record.body]);
        }
        if group.is_empty() {
            return Ok(());
        }
        let new = group.finish(EntryHeader {
            kind: EntryKind::Normal,
            segment: self.uuid,
            previous_crc: self.last_crc,
            position: self.end,
            ..*old
        });
        self.file.write_at(self.end, &new.buf)?;
        self.table.spots.push(Spot {
            index: old.index,
            block: (self.end / BLOCK_BYTES as u64) as u32,
            blocks: (new.buf.len() / BLOCK_BYTES) as u32,
        });
        self.digest.update(&new.header.encode().0);
        self.records += u64::from(new.header.records);
        self.last_crc = new.crc;
        self.end += new.buf.len() as u64;
        Ok(())
    }

    fn finish(self, old: &Segment<F>) -> io::Result<Footer> {
        let directory = self.table.encode(self.uuid);
        let footer = Footer {
            uuid: self.uuid,
            first: old.first,
            last: old.last(),
            entries_end: self.end,
            entries: self.table.spots.len() as u64,
            records: self.records,
            rows: self.table.rows as u64,
            topics: self.table.topics.len() as u64,
            digest: self.digest.digest128().to_le_bytes(),
            last_crc: self.last_crc,
            directory_blocks: (directory.len() / BLOCK_BYTES) as u32,
        };
        write_footer(self.file, self.pool, &footer, &directory)?;
        Ok(footer)
    }
}

fn live_rows<F: StorageFile>(
    sealed: &SealedBody<F>,
    live: impl Fn(&Row) -> bool,
) -> Result<Vec<Row>, Unreadable> {
    let mut directory = sealed.directory();
    let mut rows = Vec::new();
    for nth in 0..sealed.footer.rows {
        let row = directory.nth_row(nth)?;
        if live(&row) {
            rows.push(row);
        }
    }
    if planted::is(Bug::CleaningDropsLive) {
        rows.pop();
    }
    Ok(rows)
}

fn first_of(index: LogIndex) -> Place {
    Place { index, record: 0 }
}
