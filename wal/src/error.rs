//! What can go wrong, by who must act.
//!
//! One enum per operation. A disk's error carries the file it happened on. No operation retries a
//! write or a sync that failed.

use std::io;

use crate::entry::LogIndex;
use crate::segment::SegmentId;
use crate::storage::is_full;

/// The entries `first..=last`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct IndexRange {
    pub first: LogIndex,
    pub last: LogIndex,
}

impl IndexRange {
    pub fn contains(&self, index: LogIndex) -> bool {
        self.first <= index && index <= self.last
    }
}

impl std::fmt::Display for IndexRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}..={}", self.first, self.last)
    }
}

/// Why a log cannot be opened. Nothing was deleted.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "the data folder has segments ({example}) but no manifest: it was damaged or partly \
         restored; restore the whole folder from a backup, or give an empty one"
    )]
    ManifestMissing { example: String },
    #[error(
        "the manifest is damaged at byte {at}, before its last record; restore it from a backup"
    )]
    ManifestDamaged { at: u64 },
    #[error(
        "the manifest is older than {file}, which it does not know; restore the whole folder from \
         one backup"
    )]
    ManifestBehind { file: String },
    #[error(
        "{file} was written by a newer millpond (format {found}, this one knows {known}); start that version"
    )]
    NewerFormat {
        file: String,
        found: u16,
        known: u16,
    },
    #[error("the data folder is read-only; make it writable for this user")]
    ReadOnlyFolder(#[source] io::Error),
    #[error("the disk is full, and no room was left to start; free at least {needed_bytes} bytes")]
    DiskFull { needed_bytes: u64 },
    #[error(
        "no snapshot can be read and the log begins at entry {first}; restore the folder from a backup"
    )]
    HistoryMissing { first: LogIndex },
    #[error("option {name} is {value}, and must be at least {min}")]
    Option {
        name: &'static str,
        value: u64,
        min: u64,
    },
    #[error("cannot {what} {file}")]
    Io {
        what: &'static str,
        file: String,
        #[source]
        source: io::Error,
    },
}

impl OpenError {
    /// Bytes or files are not what they were, rather than something that the user can change.
    pub fn is_damage(&self) -> bool {
        matches!(
            self,
            OpenError::ManifestMissing { .. }
                | OpenError::ManifestDamaged { .. }
                | OpenError::ManifestBehind { .. }
                | OpenError::HistoryMissing { .. }
        )
    }
}

/// Why the log refused a change.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error(
        "an earlier write or sync of the log failed; the process must be stopped and started again"
    )]
    Poisoned,
    #[error("cannot {what} {file}; what the disk holds is unknown, the process must stop now")]
    Disk {
        what: &'static str,
        file: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "entries {damaged} are damaged, the log takes no writes; restore the folder from a backup, \
         or stop the broker and accept the loss with `millpond log salvage DIR --accept-loss`, DIR \
         being its data folder"
    )]
    ReadOnly { damaged: IndexRange },
    #[error("the log was not replayed to its end before it was written to")]
    NotReplayed,
    #[error("a group needs at least one record")]
    EmptyGroup,
    #[error("a group of {bytes} bytes is larger than the limit of {max}")]
    GroupTooLarge { bytes: usize, max: usize },
    #[error("the disk is full; free space before more is written")]
    DiskFull,
    #[error("there is no segment {0}")]
    UnknownSegment(SegmentId),
    #[error("segment {0} is not sealed yet")]
    NotSealed(SegmentId),
    #[error("segment {0} is not covered by every kept snapshot; it is still needed for recovery")]
    NotCovered(SegmentId),
    #[error("segment {0} has changed since the job was made; make a new one")]
    Outdated(SegmentId),
    #[error(
        "entry {index} is not applied, or its segment cannot be sealed; a snapshot may not cover it"
    )]
    SnapshotTooNew { index: LogIndex },
    #[error("entries from {from} on cannot be cut: a seal or a snapshot covers them")]
    TruncateCovered { from: LogIndex },
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Why something could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("entries {0} are damaged")]
    Damaged(IndexRange),
    #[error("entry {0} is not in the log")]
    NotFound(LogIndex),
    #[error("{file} was written by a newer millpond (format {found}); start that version")]
    NewerFormat { file: String, found: u16 },
    #[error("the record has {bytes} bytes, more than were asked for")]
    TooLarge { bytes: usize },
    #[error("cannot read {file}")]
    Io {
        file: String,
        #[source]
        source: io::Error,
    },
}

/// Why a background job failed. Its effect counts for nothing; after anything but a full disk the
/// process should stop, because what the disk holds is unknown.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {file}")]
pub struct JobError {
    pub what: &'static str,
    pub file: String,
    #[source]
    pub source: io::Error,
}

impl JobError {
    /// The job can be made and run again once there is space.
    pub fn is_disk_full(&self) -> bool {
        is_full(self.source.kind())
    }
}
