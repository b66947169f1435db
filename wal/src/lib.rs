//! The append-only segmented write-ahead log of Millpond.
//!
//! It stores opaque bytes and knows neither messages nor an async runtime. One thread owns the [`Log`]
//! and writes inline; readers, the snapshot writer, the cleaner and whoever prepares spare segments run
//! elsewhere, on handles and jobs that the log gives out.
//!
//! A day in its life: [`Log::open`] judges what the last one left behind; [`Log::replay`] folds what no
//! snapshot covers; [`Log::append_durable`] writes; [`LogReader`] reads; [`Log::close`] seals.

pub mod buffer;
mod cleaner;
mod directory;
mod entry;
mod error;
mod gate;
mod generations;
mod info;
mod log;
mod manifest;
mod mmap;
mod options;
pub mod planted;
mod reader;
mod record;
mod recover;
mod replay;
mod retire;
mod scan;
mod seal;
mod segment;
pub mod snapshot;
mod spare;
pub mod storage;
mod stretch;
mod sync;
mod tables;
mod truncate;
mod unlink;
mod verify;
mod watermark;

pub use storage::sim;

pub use cleaner::{CleanDone, CleanJob};
pub use directory::{Row, TopicSpan};
pub use entry::{Defect, EntryHeader, EntryKind, LogIndex, Place};
pub use error::{IndexRange, JobError, LogError, OpenError, ReadError};
pub use gate::{Acquire, Credit, CreditGate, Permit, Refused};
pub use info::{LogStats, SegmentInfo, Stage};
pub use log::{Appended, ENDED_MAX, Log, RowSink};
pub use options::Options;
pub use reader::LogReader;
pub use record::{Group, Record, RecordBytes, Records};
pub use recover::{
    EntryDamage, FORMAT, Folding, Opened, RecoveryReport, SegmentDamage, TornManifest, TornTail,
};
pub use replay::{LostEntries, ReplayEnd, ReplayEntry, ReplayError, ReplayRecord, Replayed};
pub use seal::{SealDone, SealJob};
pub use segment::{Contents, SegmentDefect, SegmentId};
pub use snapshot::{ChunkId, Snapshot, SnapshotDone, SnapshotJob};
pub use spare::{SpareDone, SpareJob};
pub use stretch::{SideBySide, Stretch};
pub use unlink::UnlinkJob;
pub use verify::{Dumped, Finding, Harm, VerifyReport, Wrong, dump, salvage_accept_loss, verify};
pub use watermark::{Waited, Watermark, WatermarkReader};
