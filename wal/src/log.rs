//! The log: appending entries, and everything that changes what the log consists of.
//!
//! Owned by one thread, which writes inline: when `append_durable` returns, the entry is durable and
//! readers may see it.
//!
//! Invariants: `removed < snapshot <= sealed <= applied <= durable == appended`;
//! `vouched <= durable`; sealing only below applied; nothing is appended in an epoch that is not durable
//! in the manifest. After any failed write or sync the log is poisoned for good: what the disk holds is
//! unknown, and a second try that succeeds would prove nothing.
//!
//! Opening is in `recover`, folding what was recovered in `replay`.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;
use xxhash_rust::xxh3::Xxh3;

use crate::buffer::BufferPool;
use crate::directory::{OpenTable, Row, Spot};
use crate::entry::{EntryHeader, EntryKind, LogIndex};
use crate::error::{IndexRange, JobError, LogError};
use crate::info::LogStats;
use crate::manifest::{Change, Manifest};
use crate::options::Options;
use crate::planted::{self, Bug};
use crate::reader::LogReader;
use crate::record::{Group, RECORD_HEADER_BYTES, RecordHead, table_slot};
use crate::recover::{RecoveryReport, Start};
use crate::retire::{Held, Retirement};
use crate::seal::{Ended, SealDone, SealJob, seal_room};
use crate::segment::{Contents, ENTRIES_START, SegmentHeader, SegmentId, derive_uuid};
use crate::snapshot::Snapshot;
use crate::spare::{STEP_BYTES_MAX, Spare, SpareDone, SpareJob, fill_with_zeros};
use crate::storage::{BLOCK_BYTES, Storage, StorageFile, is_full};
use crate::tables::{Body, Segment, Tables};
use crate::unlink::UnlinkJob;
use crate::watermark::{Watermark, WatermarkReader};

/// See the module.
pub struct Log<S: Storage> {
    pub(crate) storage: S,
    pub(crate) options: Options,
    pub(crate) pool: BufferPool,
    pub(crate) manifest: Manifest<S>,
    pub(crate) tables: Arc<RwLock<Tables<S::File>>>,
    /// Keeps removed segments' files until no reader needs them.
    pub(crate) retirement: Retirement<Segment<S::File>>,
    pub(crate) watermark: Watermark,
    pub(crate) health: Health,
    /// What recovery still has to write; done by replay.
    pub(crate) start: Option<Start>,
    pub(crate) report: RecoveryReport,
    /// None until the first append after opening, rolling or truncating.
    pub(crate) active: Option<Active<S::File>>,
    /// Finished, oldest first; sealed once applied.
    pub(crate) ended: VecDeque<Ended<S::File>>,
    /// Segments that cleaning found damaged since opening.
    pub(crate) damaged: BTreeSet<SegmentId>,
    pub(crate) spares: VecDeque<Spare>,
    pub(crate) next_spare: u64,
    pub(crate) next_snapshot: u64,
    /// The base of the next one.
    pub(crate) newest_snapshot: Option<Snapshot<S>>,
    /// Whose files the next one uses again.
    pub(crate) older_snapshot: Option<Snapshot<S>>,
    /// The last segment's uuid and last header crc, for the next one's header.
    pub(crate) predecessor: ([u8; 16], u32),
    pub(crate) durable: LogIndex,
    pub(crate) applied: LogIndex,
    /// What a later entry or the manifest says is durable.
    pub(crate) vouched: LogIndex,
    /// The last entry that is not blank.
    pub(crate) last_normal: LogIndex,
    /// Of the last entries, on the average; newer ones count for more.
    pub(crate) entry_bytes: u64,
    pub(crate) stats: LogStats,
}

/// Whether the log may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    /// Opened, not yet replayed to its end.
    Unreplayed,
    Good,
    Damaged(IndexRange),
    Poisoned,
}

/// The segment that is written.
pub(crate) struct Active<F> {
    pub segment: Held<Segment<F>>,
    pub file: Arc<F>,
    /// Beyond this the next segment begins, with its first entry excepted.
    pub bytes_max: u64,
    /// Where the next entry goes.
    pub end: u64,
    pub entries: u64,
    pub records: u64,
    pub digest: Xxh3,
    pub last_crc: u32,
}

/// An entry that is durable. Its bytes are shared, so records of it can be kept without a copy.
#[derive(Clone, Debug)]
pub struct Appended {
    pub index: LogIndex,
    pub bytes: Bytes,
}

impl Appended {
    /// The body of a record of this entry, sharing its memory; `None` if it has no such record.
    pub fn record_body(&self, record: u32) -> Option<Bytes> {
        let at = table_slot(&self.bytes, record)?;
        let head = RecordHead::decode(self.bytes.get(at..)?)?;
        let from = at + RECORD_HEADER_BYTES;
        let to = from + head.body_bytes();
        (to <= self.bytes.len()).then(|| self.bytes.slice(from..to))
    }
}

impl<S: Storage> Log<S> {
    /// An empty group; fill it and hand it to [`append_durable`](Self::append_durable).
    pub fn new_group(&self) -> Group {
        Group::new(&self.pool)
    }

    /// Appends the group as one entry and returns when it is durable. After `LogError::Disk` the log
    /// is poisoned and the process must stop; after `DiskFull` nothing was written and the group is
    /// lost.
    pub fn append_durable(&mut self, group: Group) -> Result<Appended, LogError> {
        self.check_writable()?;
        if group.is_empty() {
            return Err(LogError::EmptyGroup);
        }
        let (bytes, max) = (group.bytes(), self.options.entry_bytes_max);
        if bytes > max {
            return Err(LogError::GroupTooLarge { bytes, max });
        }
        let appended = self.append(EntryKind::Normal, group)?;
        self.last_normal = appended.index;
        Ok(appended)
    }

    /// Sees to it that the group has a segment to go into, so that appending it does not find the disk
    /// full; no other is appended before it. After `DiskFull` nothing has changed, and it may be asked again.
    pub fn make_room_for(&mut self, group: &Group) -> Result<(), LogError> {
        self.check_writable()?;
        let disk_bytes = group.bytes().next_multiple_of(BLOCK_BYTES) as u64;
        self.make_room(disk_bytes, u64::from(group.records()))
    }

    /// Writes an empty entry that vouches for the last one, if nothing does yet. To be called when 10 ms
    /// have passed after a commit with nothing behind it: until then a torn last entry cannot be told
    /// from one that was acknowledged and then damaged.
    pub fn vouch(&mut self) -> Result<(), LogError> {
        self.check_writable()?;
        if self.vouched < self.last_normal {
            let all_applied = self.applied == self.durable;
            let blank = self.new_group();
            let appended = self.append(EntryKind::Blank, blank)?;
            // There is nothing in it to apply.
            if all_applied {
                self.applied = appended.index;
            }
        }
        Ok(())
    }

    /// What apply decided about an appended message record, in order. Rows of segments that are sealed
    /// are known already and are ignored.
    pub fn add_row(&mut self, row: Row) {
        RowSink {
            tables: &self.tables,
        }
        .add(row);
    }

    /// Everything up to `index` is applied and its rows were added.
    pub fn set_applied(&mut self, index: LogIndex) {
        assert!(index <= self.durable, "applied {index} is not durable yet");
        self.applied = self.applied.max(index);
    }

    /// Ends the active segment, so that the next entry begins a new one; nothing if it is empty.
    pub fn roll(&mut self) -> Result<(), LogError> {
        self.check_writable()?;
        self.end_active();
        Ok(())
    }

    /// A finished and applied segment wants its directory: run the job, then install it. Without it,
    /// an append seals inline once more than [`ENDED_MAX`] segments wait.
    pub fn seal_job(&self) -> Option<SealJob<S>> {
        let ended = self
            .ended
            .front()
            .filter(|ended| ended.last <= self.applied)?;
        Some(SealJob::new(
            self.storage.clone(),
            self.pool.clone(),
            ended.clone(),
        ))
    }

    pub fn install_sealed(&mut self, done: SealDone<S>) -> Result<(), LogError> {
        self.check_writable()?;
        let segment = done.segment;
        let waits = self
            .ended
            .front()
            .is_some_and(|ended| ended.segment.id == segment.id);
        if !waits {
            return Err(LogError::Outdated(segment.id));
        }
        let file_bytes = segment
            .sealed()
            .map_or(0, |sealed| sealed.footer.file_bytes());
        let (id, last) = (segment.id, segment.last());
        self.change(Change::Sealed {
            id,
            last,
            file_bytes,
        })?;
        let segment = self.retirement.hold(segment);
        self.tables.write().put(segment);
        self.ended.pop_front();
        Ok(())
    }

    /// A spare is missing: run the job on a background thread, one at a time, then install it.
    pub fn spare_job(&self) -> Option<SpareJob<S>> {
        let (storage, pool) = (self.storage.clone(), self.pool.clone());
        let wanted = self.spares.len() < self.options.spare_segments;
        wanted.then(|| {
            let bytes = self.options.segment_bytes;
            SpareJob::new(storage, pool, self.next_spare, bytes, self.entry_bytes)
        })
    }

    pub fn install_spare(&mut self, done: SpareDone) {
        self.next_spare = self.next_spare.max(done.0.number.saturating_add(1));
        self.spares.push_back(done.0);
    }

    /// Takes sealed segments that every kept snapshot covers out of the log; returns the bytes that an
    /// [`unlink_job`](Self::unlink_job) will free. Readers that are at one finish with it.
    pub fn remove_segments(&mut self, ids: &[SegmentId]) -> Result<u64, LogError> {
        self.check_writable()?;
        let mut doomed = Vec::with_capacity(ids.len());
        for &id in ids {
            doomed.push(self.covered_segment(id)?);
        }
        self.change(Change::Removed { ids: ids.to_vec() })?;
        let mut freed = 0;
        for segment in doomed {
            freed += bytes_of(&segment);
            self.tables.write().remove(segment.first);
            segment.retire();
        }
        Ok(freed)
    }

    /// Segments were removed, cleaned or cut off and no reader has them pinned any more: run the job on
    /// a background thread to delete their files. What is left at the end goes at the next opening.
    pub fn unlink_job(&self) -> Option<UnlinkJob<S>> {
        let freed = self.retirement.free();
        (!freed.is_empty()).then(|| UnlinkJob::new(self.storage.clone(), freed))
    }

    /// A clean shutdown: everything is vouched for and, as far as applied, sealed.
    pub fn close(mut self) -> Result<(), LogError> {
        match self.health {
            Health::Good => {}
            // Nothing was written that needs an end.
            Health::Unreplayed | Health::Damaged(_) => return Ok(()),
            Health::Poisoned => return Err(LogError::Poisoned),
        }
        match self.vouch() {
            // Everything is durable; it is vouched for and sealed after the next start.
            Err(LogError::DiskFull) => return Ok(()),
            vouched => vouched?,
        }
        self.end_active();
        self.seal_ended(0)
    }

    pub fn reader(&self) -> LogReader<S> {
        LogReader::new(self.tables.clone(), self.pool.clone())
    }

    /// What opening found out; complete once all is replayed.
    pub fn report(&self) -> &RecoveryReport {
        &self.report
    }

    /// The epoch of this start: raised durably by every replay that finds nothing wrong.
    pub fn recovery_epoch(&self) -> u32 {
        self.manifest.state().epoch
    }

    pub fn store_id(&self) -> [u8; 16] {
        self.manifest.state().store
    }

    /// The same indexes for other threads, with a way to wait.
    pub fn watermark(&self) -> WatermarkReader {
        self.watermark.reader()
    }

    /// The last entry that outlives a power loss.
    pub fn durable(&self) -> LogIndex {
        self.durable
    }

    /// The last entry written; the same as durable, because appending waits.
    pub fn appended(&self) -> LogIndex {
        self.durable
    }

    pub fn applied(&self) -> LogIndex {
        self.applied
    }

    /// Whether the last commit still lacks a voucher; see [`vouch`](Self::vouch).
    pub fn wants_vouching(&self) -> bool {
        self.vouched < self.last_normal
    }

    fn append(&mut self, kind: EntryKind, group: Group) -> Result<Appended, LogError> {
        let disk_bytes = group.bytes().next_multiple_of(BLOCK_BYTES) as u64;
        let records = u64::from(group.records());
        self.make_room(disk_bytes, records)?;
        let index = self.durable.next();
        let epoch = self.recovery_epoch();
        let Some(active) = &mut self.active else {
            unreachable!("make_room began a segment");
        };
        let finished = group.finish(EntryHeader {
            kind,
            index,
            term: 0,
            segment: active.segment.uuid,
            epoch,
            previous_crc: active.last_crc,
            durable: self.durable,
            stamp: 0,
            records: 0,
            payload_bytes: 0,
            payload_crc: 0,
            position: active.end,
        });
        debug_assert_eq!(finished.buf.len() as u64, disk_bytes);
        let mut written = match planted::is(Bug::AckBeforeSync) {
            true => active.file.write_at(active.end, &finished.buf),
            false => active.file.write_durable_at(active.end, &finished.buf),
        };
        if written.is_err() && planted::is(Bug::RetryFailedSync) {
            written = active.file.sync_data();
        }
        if let Err(source) = written {
            let name = active.segment.name.clone();
            return Err(self.poison_io("append to", &name, source));
        }
        active.take(&finished.header, finished.crc);
        self.vouched = self.durable;
        self.durable = index;
        self.watermark.set_appended(index);
        self.watermark.set_durable(index);
        self.stats.entries += 1;
        self.stats.records += records;
        self.stats.syncs += 1;
        self.stats.appended_bytes += disk_bytes;
        self.entry_bytes = (self.entry_bytes * 7 + disk_bytes) / 8;
        Ok(Appended {
            index,
            bytes: finished.buf.freeze(),
        })
    }

    /// Sees to it that an active segment has room for the entry and, later, its directory.
    fn make_room(&mut self, disk_bytes: u64, records: u64) -> Result<(), LogError> {
        if let Some(active) = &self.active
            && active.entries > 0
            && active.end + disk_bytes + active.seal_room(records) > active.bytes_max
        {
            self.end_active();
        }
        if self.active.is_none() {
            self.seal_ended(ENDED_MAX)?;
            let needed = ENTRIES_START + disk_bytes + seal_room(records, 1, records);
            self.begin_segment(needed.max(self.next_segment_bytes()))?;
        }
        Ok(())
    }

    /// The first segment of all is small, because it is filled when it is made; there are spares when it is full.
    fn next_segment_bytes(&self) -> u64 {
        let bytes = self.options.segment_bytes;
        if self.is_unwritten() {
            bytes.min(FIRST_SEGMENT_BYTES)
        } else {
            bytes
        }
    }

    /// Whether nothing was ever appended.
    fn is_unwritten(&self) -> bool {
        self.durable == LogIndex::NONE
    }

    pub(crate) fn end_active(&mut self) {
        if self
            .active
            .as_ref()
            .is_some_and(|active| active.entries == 0)
        {
            return;
        }
        let Some(active) = self.active.take() else {
            return;
        };
        self.predecessor = (active.segment.uuid, active.last_crc);
        self.ended.push_back(Ended {
            last: self.durable,
            entries_end: active.end,
            records: active.records,
            digest: active.digest.digest128().to_le_bytes(),
            last_crc: active.last_crc,
            segment: active.segment,
            written: Default::default(),
        });
    }

    /// Seals inline, oldest first, until at most `left` applied segments wait.
    pub(crate) fn seal_ended(&mut self, left: usize) -> Result<(), LogError> {
        while self.ended.len() > left {
            let Some(job) = self.seal_job() else {
                break;
            };
            match job.run() {
                Ok(done) => self.install_sealed(done)?,
                // The entries are durable without it; it is tried again later.
                Err(error) if error.is_disk_full() => break,
                Err(error) => return Err(self.poison(error)),
            }
        }
        Ok(())
    }

    fn begin_segment(&mut self, bytes: u64) -> Result<(), LogError> {
        let state = self.manifest.state();
        let (id, epoch) = (SegmentId(state.next_segment), state.epoch);
        let first = self.durable.next();
        let header = SegmentHeader {
            store: state.store,
            uuid: derive_uuid(state.store, id, 0, epoch),
            id,
            generation: 0,
            first,
            epoch,
            contents: Contents::Whole,
            predecessor: self.predecessor.0,
            predecessor_crc: self.predecessor.1,
        };
        let name = header.file_name();
        let file = self.new_segment_file(&name, bytes)?;
        let mut block = self.pool.take(BLOCK_BYTES);
        block.extend_from_slice(&header.encode());
        let written = file
            .write_durable_at(0, &block)
            .and_then(|()| file.sync_data())
            .and_then(|()| match planted::is(Bug::NoDirectorySync) {
                true => Ok(()),
                false => self.storage.sync_dir(),
            });
        let length = written.and_then(|()| file.len());
        let file_bytes = length.map_err(|source| self.poison_io("begin", &name, source))?;
        self.change(Change::Began {
            id,
            uuid: header.uuid,
            first,
            epoch,
            file_bytes,
        })?;
        let file = Arc::new(file);
        let body = Body::Open {
            file: file.clone(),
            table: RwLock::new(OpenTable::default()),
        };
        let segment = self.retirement.hold(Segment {
            id,
            generation: 0,
            uuid: header.uuid,
            epoch,
            first,
            contents: Contents::Whole,
            name,
            body,
        });
        self.tables.write().put(segment.clone());
        self.active = Some(Active {
            segment,
            file,
            bytes_max: bytes.max(file_bytes.min(self.options.segment_bytes)),
            end: ENTRIES_START,
            entries: 0,
            records: 0,
            digest: Xxh3::new(),
            last_crc: self.predecessor.1,
        });
        Ok(())
    }

    /// A spare if one is large enough, else a new file: the first of all filled, any other only reserved, because
    /// the log waits for it. A full disk leaves things as they were.
    fn new_segment_file(&mut self, name: &str, bytes: u64) -> Result<S::File, LogError> {
        let fits = self
            .spares
            .front()
            .is_some_and(|spare| spare.bytes >= bytes);
        if fits
            && self.may_take_spare()
            && let Some(spare) = self.spares.pop_front()
        {
            let renamed = self.storage.rename(&spare.name(), name);
            let file = renamed.and_then(|()| self.storage.open(name));
            return file.map_err(|source| self.poison_io("begin", name, source));
        }
        let reserved = self.storage.create(name).and_then(|file| {
            if self.is_unwritten() {
                fill_with_zeros(&file, &self.pool, bytes, STEP_BYTES_MAX)?;
            } else {
                file.preallocate(bytes)?;
            }
            Ok(file)
        });
        reserved.map_err(|source| {
            if !is_full(source.kind()) {
                return self.poison_io("begin", name, source);
            }
            self.unlink(name);
            LogError::DiskFull
        })
    }

    /// The last spare is left for the next start, which must need no new space, unless this is that start.
    fn may_take_spare(&self) -> bool {
        self.spares.len() > 1 || self.stats.entries == 0
    }

    /// A sealed (or lost) segment that recovery no longer needs.
    pub(crate) fn covered_segment(
        &self,
        id: SegmentId,
    ) -> Result<Held<Segment<S::File>>, LogError> {
        let tables = self.tables.read();
        let segment = tables.by_id(id).ok_or(LogError::UnknownSegment(id))?;
        if segment.open_table().is_some() {
            return Err(LogError::NotSealed(id));
        }
        if segment.last() > self.manifest.state().covered() {
            return Err(LogError::NotCovered(id));
        }
        Ok(segment.clone())
    }

    /// Makes a change of the manifest durable; it vouches for all that is durable.
    pub(crate) fn change(&mut self, change: Change) -> Result<(), LogError> {
        let durable = self.durable;
        let appended = self.manifest.append(change, durable);
        appended.map_err(|error| self.poison_io("append to", crate::manifest::NAME, error.0))?;
        self.vouched = durable;
        Ok(())
    }

    pub(crate) fn check_writable(&self) -> Result<(), LogError> {
        match self.health {
            Health::Good => Ok(()),
            Health::Unreplayed => Err(LogError::NotReplayed),
            Health::Damaged(damaged) => Err(LogError::ReadOnly { damaged }),
            Health::Poisoned => Err(LogError::Poisoned),
        }
    }

    fn poison(&mut self, error: JobError) -> LogError {
        self.poison_io(error.what, &error.file, error.source)
    }

    pub(crate) fn poison_io(
        &mut self,
        what: &'static str,
        file: &str,
        source: io::Error,
    ) -> LogError {
        self.health = Health::Poisoned;
        self.watermark.close();
        LogError::Disk {
            what,
            file: file.to_owned(),
            source,
        }
    }

    /// Deletes a file that the manifest does not name; what stays behind goes at the next opening.
    pub(crate) fn unlink(&self, name: &str) {
        let _ = self.storage.remove(name);
    }
}

/// Where rows go while records are applied.
pub struct RowSink<'a, F> {
    pub(crate) tables: &'a RwLock<Tables<F>>,
}

impl<F: StorageFile> RowSink<'_, F> {
    /// See `Log::add_row`.
    pub fn add(&mut self, row: Row) {
        let tables = self.tables.read();
        let segment = tables.holding(row.place.index);
        if let Some(table) = segment.and_then(|segment| segment.open_table()) {
            table.write().add(row);
        }
    }
}

impl<F> Active<F> {
    fn take(&mut self, header: &EntryHeader, crc: u32) {
        let Body::Open { table, .. } = &self.segment.body else {
            unreachable!("the active segment is open");
        };
        table.write().spots.push(Spot {
            index: header.index,
            block: (self.end / BLOCK_BYTES as u64) as u32,
            blocks: (header.disk_bytes() / BLOCK_BYTES) as u32,
        });
        self.digest.update(&header.encode().0);
        self.end += header.disk_bytes() as u64;
        self.entries += 1;
        self.records += u64::from(header.records);
        self.last_crc = crc;
    }

    /// What sealing needs if every record of one more entry becomes a row of a new topic.
    fn seal_room(&self, records: u64) -> u64 {
        let Body::Open { table, .. } = &self.segment.body else {
            return 0;
        };
        let table = table.read();
        let (topics, rows) = (table.topics.len() as u64, table.rows as u64);
        seal_room(topics + records, self.entries + 1, rows + records)
    }
}

pub(crate) fn bytes_of<F: StorageFile>(segment: &Segment<F>) -> u64 {
    match &segment.body {
        Body::Open { table, .. } => {
            let table = table.read();
            table
                .spots
                .last()
                .map_or(ENTRIES_START, |spot| spot.position() + spot.bytes() as u64)
        }
        Body::Sealed(sealed) => sealed.footer.file_bytes(),
        Body::Lost { .. } => 0,
    }
}

/// Finished segments that may wait for a background job before an append seals them itself. Each keeps
/// its directory in memory until then.
pub const ENDED_MAX: usize = 2;
/// The first segment of a log, in bytes, unless its segments are smaller. Filled with zeros when it is made, 7 ms on a
/// disk that writes 1.2 GB/s: into blocks that are only reserved, a small write took 221 us instead of 161.
const FIRST_SEGMENT_BYTES: u64 = 8 << 20;
