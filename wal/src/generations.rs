//! Snapshots as the log sees them: which one may be taken, and which are kept.
//!
//! Invariants: a snapshot covers sealed segments only, because the rows of a segment exist nowhere else;
//! two generations are kept, which share no file, and segments stay until the older one covers them, so
//! that one damaged or missing file of a snapshot loses nothing.

use std::collections::BTreeSet;

use bytes::Bytes;

use crate::entry::LogIndex;
use crate::error::LogError;
use crate::log::Log;
use crate::manifest::{Change, SnapshotEntry};
use crate::planted::{self, Bug};
use crate::snapshot::{Base, ChunkId, Snapshot, SnapshotDone, SnapshotJob};
use crate::storage::Storage;

impl<S: Storage> Log<S> {
    /// Whether every segment that begins at or before this entry has its directory.
    pub fn is_sealed_to(&self, index: LogIndex) -> bool {
        if planted::is(Bug::SnapshotWithoutDirectory) {
            return true;
        }
        let tables = self.tables.read();
        tables.open().next().is_none_or(|open| open.first > index)
    }

    /// A snapshot of the state at `index`, which must be applied, and the last of its segment or of all: the chunks
    /// that changed since the last installed snapshot (all of them if there is none), and the ids of those that are
    /// gone. Seals up to there first, inline, unless that was done. Run the job on a background thread, one at a time.
    pub fn snapshot_job(
        &mut self,
        index: LogIndex,
        dirty: Vec<(ChunkId, Bytes)>,
        removed: Vec<ChunkId>,
    ) -> Result<SnapshotJob<S>, LogError> {
        self.check_writable()?;
        let is_sealed = self.is_sealed_to(index);
        // Blank entries behind it change no state.
        let index = if !is_sealed && index >= self.last_normal {
            self.durable
        } else {
            index
        };
        if index > self.applied {
            return Err(LogError::SnapshotTooNew { index });
        }
        if !is_sealed {
            if index == self.durable {
                self.end_active();
            }
            self.seal_ended(0)?;
            if !self.is_sealed_to(index) {
                return Err(LogError::SnapshotTooNew { index });
            }
        }
        let base = self.newest_snapshot.as_ref().map(|state| Base {
            state,
            files: self.older_snapshot.as_ref(),
        });
        let number = self.next_snapshot;
        self.next_snapshot += 1;
        let (storage, pool) = (self.storage.clone(), self.pool.clone());
        let store = self.store_id();
        Ok(SnapshotJob::new(
            storage,
            pool,
            store,
            base,
            (number, index),
            dirty,
            removed,
        ))
    }

    /// Makes a finished snapshot count, and deletes the files that no kept one needs.
    pub fn install_snapshot(&mut self, done: SnapshotDone) -> Result<(), LogError> {
        self.check_writable()?;
        let info = done.info();
        let before = self.snapshot_files();
        self.change(Change::Snapshot(SnapshotEntry {
            number: info.number,
            index: info.index,
            digest: info.digest,
            files: info.files,
        }))?;
        let new = Snapshot::of(self.storage.clone(), &done);
        self.older_snapshot = self.newest_snapshot.replace(new);
        for file in before.difference(&self.snapshot_files()) {
            self.unlink(file);
        }
        Ok(())
    }

    /// The index of the newest snapshot that counts.
    pub fn snapshot_index(&self) -> Option<LogIndex> {
        self.manifest
            .state()
            .snapshots
            .last()
            .map(|snapshot| snapshot.index)
    }

    fn snapshot_files(&self) -> BTreeSet<String> {
        let snapshots = &self.manifest.state().snapshots;
        snapshots
            .iter()
            .flat_map(|snapshot| snapshot.files.iter().cloned())
            .collect()
    }
}
