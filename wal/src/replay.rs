//! Folding what was recovered: every entry behind the snapshot, in order.
//!
//! Stops at the first damage that nobody accepted: what follows it must not be applied, because it was
//! decided on a state that cannot be known any more. Only when all is folded is anything written.

use crate::directory::{Row, Spot};
use crate::entry::{EntryKind, LogIndex, Place};
use crate::error::{IndexRange, LogError, OpenError, ReadError};
use crate::log::{ENDED_MAX, Health, Log, RowSink};
use crate::manifest::SegmentEnd;
use crate::record::Records;
use crate::retire::Held;
use crate::segment::{Contents, ENTRIES_START};
use crate::storage::{Storage, StorageFile};
use crate::tables::Segment;

/// What replay comes to, in order.
#[derive(Clone, Debug)]
pub enum Replayed<'a> {
    Entry(ReplayEntry<'a>),
    Lost(LostEntries),
}

/// Entries that are damaged and whose loss was accepted. What follows was decided with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostEntries {
    pub range: IndexRange,
    /// What they had appended, where the segment's directory still says so.
    pub rows: Option<Vec<Row>>,
    /// They had at most so many bytes.
    pub bytes_max: u64,
}

/// One entry to be applied.
#[derive(Clone, Debug)]
pub struct ReplayEntry<'a> {
    pub index: LogIndex,
    /// The recovery epoch in which it was written.
    pub epoch: u32,
    records: Records<'a>,
}

/// One record to be applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplayRecord<'a> {
    pub place: Place,
    pub stamp: u64,
    pub kind: u8,
    pub body: &'a [u8],
}

impl<'a> ReplayEntry<'a> {
    pub fn records(&self) -> impl Iterator<Item = ReplayRecord<'a>> + use<'a> {
        let index = self.index;
        self.records.clone().map(move |record| ReplayRecord {
            place: Place {
                index,
                record: record.number,
            },
            stamp: record.stamp,
            kind: record.kind,
            body: record.body,
        })
    }
}

/// Why replay came to no end.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError<E> {
    #[error(transparent)]
    Log(#[from] LogError),
    /// All is folded, but the new epoch could not be written.
    #[error(transparent)]
    Start(OpenError),
    /// What `apply` said.
    #[error("an entry cannot be applied")]
    Apply(E),
}

/// How replay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplayEnd {
    /// All is applied and the log takes writes.
    Healthy,
    /// Everything before `range` is applied. The log stays read-only.
    Damaged { range: IndexRange },
}

impl<S: Storage> Log<S> {
    /// Hands every entry behind the snapshot to `apply`, which adds the rows it decides on to the sink;
    /// blank entries are left out, accepted losses are told. Afterwards the log takes writes, unless it is damaged. An error of
    /// `apply` ends the replay, and nothing has been written.
    pub fn replay<E>(
        &mut self,
        mut apply: impl FnMut(Replayed<'_>, &mut RowSink<'_, S::File>) -> Result<(), E>,
    ) -> Result<ReplayEnd, ReplayError<E>> {
        if matches!(self.health, Health::Good | Health::Poisoned) {
            self.check_writable()?;
            return Ok(ReplayEnd::Healthy);
        }
        let mut segments: Vec<_> = self.tables.read().iter().filter_map(Held::pin).collect();
        // Of an open one the last entries may be lost, or all.
        segments.retain(|segment| segment.last() > self.applied || segment.open_table().is_some());
        let mut unread = 0;
        for segment in segments {
            if let Some(range) = self.replay_segment(&segment, &mut unread, &mut apply)? {
                self.health = Health::Damaged(range);
                return Ok(ReplayEnd::Damaged { range });
            }
        }
        let bytes_max = self.entries_bytes_max(self.durable).max(unread);
        if let Some(range) = self.gap_to(self.durable.next(), bytes_max, &mut apply)? {
            self.health = Health::Damaged(range);
            return Ok(ReplayEnd::Damaged { range });
        }
        self.begin_epoch().map_err(ReplayError::Start)?;
        self.health = Health::Good;
        // A job seals the rest, so that the start need not wait for it, unless it may need the space that a
        // sealed segment gives back.
        let left = if self.spares.is_empty() { 0 } else { ENDED_MAX };
        self.seal_ended(left)?;
        Ok(ReplayEnd::Healthy)
    }

    /// `unread` are the bytes behind the last entry that can be found in an open segment, where others may have
    /// stood: of the segment before this one, and then of this one.
    fn replay_segment<E>(
        &mut self,
        segment: &Segment<S::File>,
        unread: &mut u64,
        apply: &mut impl FnMut(Replayed<'_>, &mut RowSink<'_, S::File>) -> Result<(), E>,
    ) -> Result<Option<IndexRange>, ReplayError<E>> {
        let bytes_max = match std::mem::take(unread) {
            0 => self.entries_bytes_max(segment.first.previous()),
            unread => unread,
        };
        if let Some(range) = self.gap_to(segment.first, bytes_max, apply)? {
            return Ok(Some(range));
        }
        // What was cleaned away was applied once, and cannot be again.
        let spots = match segment.contents {
            Contents::Sparse => Err(ReadError::Damaged(segment.range())),
            Contents::Whole => segment.spots_after(self.applied),
        };
        let spots = match spots {
            Ok(spots) => spots,
            Err(ReadError::Damaged(_)) => return self.pass_over(segment, apply),
            Err(error) => return Err(LogError::from(error).into()),
        };
        let mut entry = Vec::new();
        let mut end = ENTRIES_START;
        for spot in spots {
            let between = spot.position().saturating_sub(end);
            if let Some(range) = self.gap_to(spot.index, between, apply)? {
                return Ok(Some(range));
            }
            end = spot.position() + spot.bytes() as u64;
            match segment.read_entry(spot, &mut entry) {
                Ok(header) if header.kind == EntryKind::Normal => {
                    let replayed = ReplayEntry {
                        index: header.index,
                        epoch: header.epoch,
                        records: Records::new(&header, &entry),
                    };
                    self.hand(Replayed::Entry(replayed), apply)?;
                }
                Ok(_) => {}
                Err(ReadError::Damaged(_)) if self.manifest.state().is_skipped(spot.index) => {
                    let lost = lost_entry(segment, spot)?;
                    self.hand(Replayed::Lost(lost), apply)?;
                }
                Err(ReadError::Damaged(range)) => return Ok(Some(range)),
                Err(error) => return Err(LogError::from(error).into()),
            }
            self.applied = spot.index;
        }
        let behind = self.file_bytes(segment).saturating_sub(end);
        if segment.open_table().is_some() {
            *unread = behind;
            return Ok(None);
        }
        self.gap_to(segment.last().next(), behind, apply)
    }

    fn hand<E>(
        &self,
        replayed: Replayed<'_>,
        apply: &mut impl FnMut(Replayed<'_>, &mut RowSink<'_, S::File>) -> Result<(), E>,
    ) -> Result<(), ReplayError<E>> {
        let mut rows = RowSink {
            tables: &self.tables,
        };
        apply(replayed, &mut rows).map_err(ReplayError::Apply)
    }

    /// A segment whose entries cannot be found, or not all of them: lost, if that was accepted.
    fn pass_over<E>(
        &mut self,
        segment: &Segment<S::File>,
        apply: &mut impl FnMut(Replayed<'_>, &mut RowSink<'_, S::File>) -> Result<(), E>,
    ) -> Result<Option<IndexRange>, ReplayError<E>> {
        let range = IndexRange {
            first: segment.first.max(self.applied.next()),
            last: segment.last(),
        };
        let state = self.manifest.state();
        if !(state.is_skipped(range.first) && state.is_skipped(range.last)) {
            return Ok(Some(range));
        }
        let lost = LostEntries {
            range,
            rows: segment.rows_of_entries(range).map_err(LogError::from)?,
            bytes_max: self.file_bytes(segment),
        };
        self.hand(Replayed::Lost(lost), apply)?;
        self.applied = range.last;
        Ok(None)
    }

    /// At least the bytes that the segment's entries had.
    fn file_bytes(&self, segment: &Segment<S::File>) -> u64 {
        let named = self.manifest.state().segments.get(&segment.id);
        match named.map(|named| named.end) {
            Some(SegmentEnd::Open { file_bytes }) => file_bytes,
            // Shorter than it was, if a start has given its end up.
            Some(SegmentEnd::Sealed { file_bytes, .. }) => {
                file_bytes.max(self.options.segment_bytes)
            }
            Some(SegmentEnd::Cut(cut)) => cut.entries_end.max(self.options.segment_bytes),
            None => self.options.segment_bytes,
        }
    }

    /// At least the bytes of the entries that are not applied, up to `last`.
    fn entries_bytes_max(&self, last: LogIndex) -> u64 {
        let missing = last.0.saturating_sub(self.applied.0);
        missing.saturating_mul(self.options.entry_bytes_max as u64)
    }

    /// Steps over skipped entries before `next`, which had at most so many bytes; the range that is missing,
    /// if one is.
    fn gap_to<E>(
        &mut self,
        next: LogIndex,
        bytes_max: u64,
        apply: &mut impl FnMut(Replayed<'_>, &mut RowSink<'_, S::File>) -> Result<(), E>,
    ) -> Result<Option<IndexRange>, ReplayError<E>> {
        while self.applied.next() < next {
            let first = self.applied.next();
            let Some(skipped) = self.manifest.state().skip_at(first) else {
                let last = next.previous();
                return Ok(Some(IndexRange { first, last }));
            };
            let last = skipped.last.min(next.previous());
            let lost = LostEntries {
                range: IndexRange { first, last },
                rows: None,
                bytes_max,
            };
            self.hand(Replayed::Lost(lost), apply)?;
            self.applied = last;
        }
        Ok(None)
    }
}

fn lost_entry<F: StorageFile>(segment: &Segment<F>, spot: Spot) -> Result<LostEntries, LogError> {
    let range = IndexRange {
        first: spot.index,
        last: spot.index,
    };
    Ok(LostEntries {
        range,
        rows: segment.rows_of_entries(range)?,
        bytes_max: spot.bytes() as u64,
    })
}
