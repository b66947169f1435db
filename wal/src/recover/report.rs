//! What opening a log found out.

use crate::entry::{Defect, LogIndex};
use crate::error::IndexRange;
use crate::segment::{SegmentDefect, SegmentId};

/// For the operator's log and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// The store was made by this opening.
    pub fresh: bool,
    /// The recovery epoch of this start.
    pub epoch: u32,
    /// Where the snapshot that replay begins behind stands.
    pub snapshot: Option<LogIndex>,
    /// Numbers of snapshots that the manifest names and that cannot be read.
    pub snapshots_lost: Vec<u64>,
    /// Segments that had to be scanned because they were not sealed: none after a clean stop.
    pub scanned: usize,
    /// Never acknowledged bytes that were cut.
    pub torn: Vec<TornTail>,
    /// Bytes behind the manifest's last good record: a change that never counted.
    pub torn_manifest: Option<TornManifest>,
    /// Segments that are lost as a whole.
    pub lost: Vec<SegmentDamage>,
    /// Damaged acknowledged entries in segments that were not sealed, skips left out.
    pub damaged: Vec<EntryDamage>,
}

impl RecoveryReport {
    /// The log was closed before, and nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.scanned == 0
            && self.torn.is_empty()
            && self.torn_manifest.is_none()
            && self.lost.is_empty()
            && self.damaged.is_empty()
            && self.snapshots_lost.is_empty()
    }
}

/// Bytes behind the last entry that anything vouches for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TornTail {
    pub segment: SegmentId,
    /// The index that was expected where they begin.
    pub index: LogIndex,
    pub position: u64,
    pub bytes: u64,
    /// The first thing that is wrong in the segment.
    pub defect: Option<Defect>,
    /// The file they were copied to; none if the disk was full.
    pub saved_as: Option<String>,
}

/// What follows the manifest's last good record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TornManifest {
    pub position: u64,
    pub bytes: u64,
    /// The file they were copied to; none if the disk was full.
    pub saved_as: Option<String>,
}

/// A segment that the manifest names and that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentDamage {
    pub segment: SegmentId,
    pub range: IndexRange,
    pub defect: SegmentDefect,
}

/// Entries of a segment that was not sealed, vouched for and bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryDamage {
    pub segment: SegmentId,
    pub range: IndexRange,
}
