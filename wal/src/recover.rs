//! Opening a log: finding out what is there, what may be cut, and what is damaged.
//!
//! Owns the judgement of section "voucher rule": with V the highest index that any entry header, the manifest
//! or a snapshot says is durable, bad bytes above V are a torn tail, which is saved aside and cut; bad bytes
//! at or below V are damage to acknowledged data, which is never cut and never deleted.
//!
//! Order of effects, so that a crash at any point is harmless: read everything; save torn bytes; raise the
//! epoch and record every cut in one manifest record; only then delete what the manifest does not name.
//! A damaged log gets no write at all.

mod folder;
pub(crate) mod judge;
mod report;

use std::io;
use std::sync::Arc;

use parking_lot::RwLock;

use self::folder::Folder;
use self::judge::Judged;
pub use self::report::{EntryDamage, RecoveryReport, SegmentDamage, TornTail};
use crate::buffer::BufferPool;
use crate::entry::LogIndex;
use crate::error::OpenError;
use crate::info::LogStats;
use crate::log::{Health, Log};
use crate::manifest::{Change, Manifest, State};
use crate::options::Options;
use crate::planted::{self, Bug};
use crate::snapshot::{Snapshot, SnapshotError};
use crate::storage::{Storage, StorageFile};
use crate::watermark::Watermark;

/// An open log, to be replayed before it is written.
pub struct Opened<S: Storage> {
    pub log: Log<S>,
    pub report: RecoveryReport,
    /// The newest readable snapshot, all of it verified; replay begins behind it.
    pub snapshot: Option<Snapshot<S>>,
}

impl<S: Storage> Log<S> {
    /// Recovers what is in the folder, or begins a new store in an empty one. Raises the recovery
    /// epoch durably, unless the log is damaged.
    pub fn open(storage: S, options: Options) -> Result<Opened<S>, OpenError> {
        options.check()?;
        let pool = BufferPool::new(options.buffer_bytes_idle);
        let folder = Folder::list(&storage, options.segment_bytes)?;
        let mut manifest = if folder.has_manifest {
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
        let snapshot = choose_snapshot(&storage, manifest.state(), &mut report)?;
        let replay_from = snapshot.as_ref().map_or(LogIndex::NONE, Snapshot::index);
        let found = judge::find(&storage, manifest.state(), replay_from)?;
        let judged = found.judge(manifest.state(), &mut report);
        if judged.damage.is_none() {
            start(&storage, &options, &mut manifest, &judged, &mut report)?;
            folder.delete_unnamed(&storage, manifest.state());
        }
        report.epoch = manifest.state().epoch;
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
            predecessor: judged.predecessor,
            ended: judged.ended,
            tables: Arc::new(RwLock::new(judged.tables)),
            retirement: judged.retirement,
            watermark: Watermark::new(durable),
            active: None,
            next_spare: folder.next_spare,
            spares: folder.spares.into(),
            next_snapshot,
            newest_snapshot: snapshot.clone(),
            durable,
            applied: replay_from,
            vouched: durable,
            last_normal: durable,
            stats: LogStats::default(),
            storage,
            options,
            pool,
            manifest,
        };
        Ok(Opened {
            log,
            report,
            snapshot,
        })
    }
}

/// Makes the new epoch and all cuts durable.
fn start<S: Storage>(
    storage: &S,
    options: &Options,
    manifest: &mut Manifest<S>,
    judged: &Judged<S::File>,
    report: &mut RecoveryReport,
) -> Result<(), OpenError> {
    for tail in &mut report.torn {
        tail.saved_as = save_aside(storage, manifest.state(), tail)?;
    }
    let change = Change::Started {
        epoch: manifest.state().epoch + u32::from(!planted::is(Bug::NoRecoveryEpoch)),
        cut: judged.cuts.clone(),
        dropped: judged.dropped.clone(),
        lost_snapshots: report.snapshots_lost.clone(),
    };
    manifest
        .append(change, judged.durable)
        .map_err(|error| start_error(options, error.0))
}

/// Copies torn bytes into a file of their own; without room for it they are only reported.
fn save_aside<S: Storage>(
    storage: &S,
    state: &State,
    tail: &TornTail,
) -> Result<Option<String>, OpenError> {
    let Some(source_name) = state.file_name(tail.segment) else {
        return Ok(None);
    };
    let name = format!("torn-{:016x}-{:08x}.bin", tail.segment.0, state.epoch + 1);
    let copy = || {
        match storage.remove(&name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let source = storage.open(&source_name)?;
        let target = storage.create(&name)?;
        let most = tail.bytes.min(COPY_BYTES as u64);
        let mut chunk = vec![0; most as usize];
        let mut at = 0;
        while at < tail.bytes {
            let step = most.min(tail.bytes - at) as usize;
            let read = source.read_uncached_at(tail.position + at, &mut chunk[..step])?;
            target.write_at(at, &chunk[..read])?;
            at += step as u64;
        }
        target.sync_data()?;
        storage.sync_dir()
    };
    match copy() {
        Ok(()) => Ok(Some(name)),
        Err(error) if error.kind() == io::ErrorKind::StorageFull => {
            let _ = storage.remove(&name);
            Ok(None)
        }
        Err(source) => Err(io_error("write", &name, source)),
    }
}

pub(crate) fn choose_snapshot<S: Storage>(
    storage: &S,
    state: &State,
    report: &mut RecoveryReport,
) -> Result<Option<Snapshot<S>>, OpenError> {
    for named in state.snapshots.iter().rev() {
        let opened = Snapshot::open(storage.clone(), state.store, named.number);
        let read = opened.and_then(|snapshot| snapshot.verify().map(|()| snapshot));
        match read {
            Ok(snapshot) => {
                let info = snapshot.info();
                if (info.index, info.digest) == (named.index, named.digest) {
                    report.snapshot = Some(named.index);
                    return Ok(Some(snapshot));
                }
            }
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

fn start_error(options: &Options, source: io::Error) -> OpenError {
    match source.kind() {
        io::ErrorKind::StorageFull => OpenError::DiskFull {
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
