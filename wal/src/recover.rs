//! Opening a log: finding out what is there, what may be cut, and what is damaged.
//!
//! Owns the judgement of section "voucher rule": with V the highest index that any entry header, the manifest
//! or a snapshot says is durable, bad bytes above V are a torn tail, which is saved aside and cut; bad bytes
//! at or below V are damage to acknowledged data, which is never cut and never deleted.
//!
//! Order of effects, so that a crash at any point is harmless: read everything and fold it; save torn bytes;
//! raise the epoch and record every cut in one manifest record; only then delete what the manifest does not
//! name. A log that is damaged, or that holds what this version cannot read, gets no write at all.

pub(crate) mod folder;
pub(crate) mod judge;
mod report;

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;

use self::folder::{Folder, FolderNames};
pub use self::report::{EntryDamage, RecoveryReport, SegmentDamage, TornManifest, TornTail};
use crate::buffer::BufferPool;
use crate::entry::LogIndex;
use crate::error::OpenError;
use crate::info::LogStats;
use crate::log::{Health, Log};
use crate::manifest::{Change, Cut, Manifest, State};
use crate::options::Options;
use crate::planted::{self, Bug};
use crate::segment::SegmentId;
use crate::snapshot::{ChunkId, Snapshot, SnapshotError};
use crate::storage::{Storage, StorageFile, is_full};
use crate::watermark::Watermark;

/// An open log, to be replayed before it is written.
pub struct Opened<S: Storage> {
    pub log: Log<S>,
    /// The newest readable snapshot, all of it verified; replay begins behind it.
    pub snapshot: Option<Snapshot<S>>,
}

/// What the fold begins with.
#[derive(Debug)]
pub struct Folding {
    pub store_id: [u8; 16],
    /// The chunks of the newest readable snapshot by ascending id, in the bytes that were verified.
    pub chunks: Option<Chunks>,
}

type Chunks = Vec<(ChunkId, Bytes)>;

impl<S: Storage> Log<S> {
    /// Judges what is in the folder, or begins a new store in an empty one. An existing one is not
    /// written to before [`Log::replay`] has read all of it.
    pub fn open(storage: S, options: Options) -> Result<Opened<S>, OpenError> {
        let (opened, ()) = Log::open_beside(storage, options, |_| ())?;
        Ok(opened)
    }

    /// The same, and reads and folds the snapshot while the segments are read, if the storage does two things at once.
    pub fn open_beside<T: Send>(
        storage: S,
        options: Options,
        fold: impl FnOnce(Folding) -> T + Send,
    ) -> Result<(Opened<S>, T), OpenError> {
        options.check()?;
        let pool = BufferPool::new(options.buffer_bytes_idle);
        let folder = Folder::list(&storage, options.segment_bytes)?;
        let manifest = if folder.has_manifest {
            storage
                .sync_dir()
                .map_err(|source| io_error("sync", ".", source))?;
            Manifest::read(storage.clone(), pool.clone(), options.manifest_bytes)?
        } else {
            folder.refuse_remains()?;
            let store = options.fresh_store_id;
            Manifest::create(storage.clone(), pool.clone(), options.manifest_bytes, store)
                .map_err(|source| start_error(&options, source))?
        };
        folder.refuse_strangers(&storage, manifest.state())?;
        let mut report = RecoveryReport {
            fresh: !folder.has_manifest,
            ..Default::default()
        };
        let state = manifest.state();
        let (folded, found) = storage.both(
            || {
                let (snapshot, chunks) = choose_snapshot(&storage, state, &mut report)?.unzip();
                let store_id = state.store;
                Ok((snapshot, fold(Folding { store_id, chunks })))
            },
            || judge::find(&storage, state),
        );
        let (snapshot, folded) = folded?;
        let replay_from = snapshot.as_ref().map_or(LogIndex::NONE, Snapshot::index);
        let judged = found?.judge(state, replay_from, &mut report);
        report.epoch = manifest.state().epoch;
        report.torn_manifest = manifest.torn().map(|torn| TornManifest {
            position: torn.position,
            bytes: torn.bytes,
            saved_as: None,
        });
        let next_snapshot = 1 + folder.last_snapshot.max(
            manifest
                .state()
                .snapshots
                .last()
                .map_or(0, |snapshot| snapshot.number),
        );
        let durable = judged.durable;
        let log = Log {
            health: judged.damage.map_or(Health::Unreplayed, Health::Damaged),
            start: judged.damage.is_none().then_some(Start {
                cut: judged.cuts,
                dropped: judged.dropped,
                names: folder.names,
            }),
            report,
            predecessor: judged.predecessor,
            ended: judged.ended,
            tables: Arc::new(RwLock::new(judged.tables)),
            retirement: judged.retirement,
            watermark: Watermark::new(durable),
            active: None,
            damaged: BTreeSet::new(),
            next_spare: folder.next_spare,
            spares: folder.spares.into(),
            next_snapshot,
            older_snapshot: older_snapshot(&storage, manifest.state(), snapshot.as_ref()),
            newest_snapshot: snapshot.clone(),
            durable,
            applied: replay_from,
            vouched: durable,
            last_normal: durable,
            entry_bytes: 0,
            stats: LogStats::default(),
            storage,
            options,
            pool,
            manifest,
        };
        Ok((Opened { log, snapshot }, folded))
    }

    /// Makes the new epoch and all cuts durable, and deletes what nothing names.
    pub(crate) fn begin_epoch(&mut self) -> Result<(), OpenError> {
        let Some(start) = self.start.take() else {
            return Ok(());
        };
        let state = self.manifest.state();
        let epoch = state.epoch + 1;
        for tail in &mut self.report.torn {
            let Some(source) = state.file_name(tail.segment) else {
                continue;
            };
            let name = format!("torn-{:016x}-{epoch:08x}.bin", tail.segment.0);
            tail.saved_as = save_aside(&self.storage, &source, (tail.position, tail.bytes), name)?;
        }
        if let Some(torn) = &mut self.report.torn_manifest {
            let name = format!("torn-manifest-{epoch:08x}.bin");
            let stretch = (torn.position, torn.bytes);
            torn.saved_as = save_aside(&self.storage, crate::manifest::NAME, stretch, name)?;
        }
        let change = Change::Started {
            epoch: state.epoch + u32::from(!planted::is(Bug::NoRecoveryEpoch)),
            cut: start.cut,
            dropped: start.dropped,
            lost_snapshots: self.report.snapshots_lost.clone(),
        };
        self.manifest
            .append(change, self.durable)
            .map_err(|error| start_error(&self.options, error.0))?;
        self.report.epoch = self.manifest.state().epoch;
        // Giving back a file of that size takes 20 ms: the next spare is made of it, if this start need not have
        // its space.
        let is_wanted = (1..self.options.spare_segments).contains(&self.spares.len());
        let unfinished = is_wanted.then_some(self.next_spare);
        start
            .names
            .delete_unnamed(&self.storage, self.manifest.state(), unfinished);
        Ok(())
    }
}

/// What recovery does once all is read and folded.
pub(crate) struct Start {
    cut: Vec<(SegmentId, Cut)>,
    /// Open segments without any entry.
    dropped: Vec<SegmentId>,
    names: FolderNames,
}

/// Copies torn bytes into a file of their own; without room for it they are only reported.
fn save_aside<S: Storage>(
    storage: &S,
    source_name: &str,
    (position, bytes): (u64, u64),
    name: String,
) -> Result<Option<String>, OpenError> {
    let copy = || {
        match storage.remove(&name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let source = storage.open(source_name)?;
        let target = storage.create(&name)?;
        let most = bytes.min(COPY_BYTES as u64);
        let mut chunk = vec![0; most as usize];
        let mut at = 0;
        while at < bytes {
            let step = most.min(bytes - at) as usize;
            let read = source.read_uncached_at(position + at, &mut chunk[..step])?;
            target.write_at(at, &chunk[..read])?;
            at += step as u64;
        }
        target.sync_data()?;
        storage.sync_dir()
    };
    match copy() {
        Ok(()) => Ok(Some(name)),
        Err(error) if is_full(error.kind()) => {
            let _ = storage.remove(&name);
            Ok(None)
        }
        Err(source) => Err(io_error("write", &name, source)),
    }
}

/// The newest readable snapshot with all of its chunks. They are read once: what is handed on are the bytes that
/// were checked, and not what a second reading may give.
pub(crate) fn choose_snapshot<S: Storage>(
    storage: &S,
    state: &State,
    report: &mut RecoveryReport,
) -> Result<Option<(Snapshot<S>, Chunks)>, OpenError> {
    for named in state.snapshots.iter().rev() {
        let opened = Snapshot::open(storage.clone(), state.store, named.number);
        let read = opened.and_then(|snapshot| {
            let chunks = snapshot.chunks().collect::<Result<Chunks, _>>()?;
            Ok((snapshot, chunks))
        });
        match read {
            Ok((snapshot, chunks)) => {
                let info = snapshot.info();
                if (info.index, info.digest) == (named.index, named.digest) {
                    report.snapshot = Some(named.index);
                    return Ok(Some((snapshot, chunks)));
                }
            }
            Err(SnapshotError::NewerFormat { file, found, .. }) => return Err(newer(file, found)),
            // A disk that fails now may not fail the next time; what is lost is lost for good.
            Err(SnapshotError::Io { file, source, .. }) if !is_missing(&source) => {
                return Err(io_error("read", &file, source));
            }
            Err(_) => {}
        }
        report.snapshots_lost.push(named.number);
    }
    let first = state.segments.values().map(|segment| segment.first).min();
    match first {
        Some(first) if first > LogIndex(1) => Err(OpenError::HistoryMissing { first }),
        None if !state.snapshots.is_empty() => Err(OpenError::HistoryMissing {
            first: state.durable.next(),
        }),
        _ => Ok(None),
    }
}

fn is_missing(error: &io::Error) -> bool {
    let kind = error.kind();
    kind == io::ErrorKind::NotFound || kind == io::ErrorKind::UnexpectedEof
}

/// The generation before the one that is used. Its chunks are not read: where one is damaged, the newer
/// generation is still whole.
fn older_snapshot<S: Storage>(
    storage: &S,
    state: &State,
    newest: Option<&Snapshot<S>>,
) -> Option<Snapshot<S>> {
    let newest = newest?.info().number;
    let mut older = state.snapshots.iter().rev();
    let named = older.find(|named| named.number < newest)?;
    Snapshot::open(storage.clone(), state.store, named.number).ok()
}

fn newer(file: String, found: u16) -> OpenError {
    OpenError::NewerFormat {
        file,
        found,
        known: FORMAT,
    }
}

fn start_error(options: &Options, source: io::Error) -> OpenError {
    match source.kind() {
        kind if is_full(kind) => OpenError::DiskFull {
            needed_bytes: options.manifest_bytes,
        },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            OpenError::ReadOnlyFolder(source)
        }
        _ => io_error("write", crate::manifest::NAME, source),
    }
}

fn io_error(what: &'static str, file: &str, source: io::Error) -> OpenError {
    OpenError::Io {
        what,
        file: file.to_owned(),
        source,
    }
}

const COPY_BYTES: usize = 1 << 20;
/// The format of segments, entries and snapshots that this version reads and writes.
pub const FORMAT: u16 = 1;
