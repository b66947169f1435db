//! What the log consists of, for decisions about space and for metrics.

use std::sync::Arc;

use crate::directory::TopicSpan;
use crate::entry::LogIndex;
use crate::log::{Log, bytes_of};
use crate::retire::Held;
use crate::segment::{Contents, SegmentId};
use crate::storage::Storage;
use crate::tables::{Body, Segment};

/// Counters for metrics; since opening, except for what exists now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogStats {
    pub entries: u64,
    pub records: u64,
    /// Durable writes of entries.
    pub syncs: u64,
    pub appended_bytes: u64,
    /// Size of all segments that exist now.
    pub log_bytes: u64,
    pub segments: usize,
    pub spares: usize,
}

/// One segment, for decisions about space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentInfo {
    pub id: SegmentId,
    pub generation: u32,
    pub first: LogIndex,
    /// The one before `first` if there is no entry yet.
    pub last: LogIndex,
    pub bytes: u64,
    pub stage: Stage,
    pub contents: Contents,
    /// Covered by every kept snapshot: may be cleaned or removed.
    pub covered: bool,
    /// Cleaning found damage in it: it cannot be cleaned.
    pub damaged: bool,
    pub topics: Arc<[TopicSpan]>,
}

/// Where a segment is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Open,
    Sealed,
    /// Its file is gone or unreadable as a whole.
    Lost,
}

impl<S: Storage> Log<S> {
    /// All segments in order. What a sealed one says of its topics is shared, not copied.
    pub fn segments(&self) -> Vec<SegmentInfo> {
        let covered = self.manifest.state().covered();
        let info = |segment: &Held<Segment<S::File>>| {
            let (stage, topics) = match &segment.body {
                Body::Open { table, .. } => (Stage::Open, table.read().spans().into()),
                Body::Sealed(sealed) => (Stage::Sealed, sealed.spans.clone()),
                Body::Lost { .. } => (Stage::Lost, Arc::default()),
            };
            SegmentInfo {
                id: segment.id,
                generation: segment.generation,
                first: segment.first,
                last: segment.last(),
                bytes: bytes_of(segment),
                stage,
                contents: segment.contents,
                damaged: self.damaged.contains(&segment.id),
                covered: stage != Stage::Open && segment.last() <= covered,
                topics,
            }
        };
        self.tables.read().iter().map(info).collect()
    }

    pub fn stats(&self) -> LogStats {
        let tables = self.tables.read();
        LogStats {
            log_bytes: tables.iter().map(|segment| bytes_of(segment)).sum(),
            segments: tables.iter().count(),
            spares: self.spares.len(),
            ..self.stats
        }
    }
}
