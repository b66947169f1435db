//! Folding what was recovered: every entry behind the snapshot, in order.
//!
//! Stops at the first damage that nobody accepted: what follows it must not be applied, because it was
//! decided on a state that cannot be known any more. Only when all is folded is anything written.

use crate::entry::{EntryKind, LogIndex, Place};
use crate::error::{IndexRange, LogError, OpenError, ReadError};
use crate::log::{Health, Log, RowSink};
use crate::record::Records;
use crate::retire::Held;
use crate::segment::Contents;
use crate::storage::Storage;
use crate::tables::Segment;

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
    /// blank entries are left out. Afterwards the log takes writes, unless it is damaged. An error of
    /// `apply` ends the replay, and nothing has been written.
    pub fn replay<E>(
        &mut self,
        mut apply: impl FnMut(ReplayEntry<'_>, &mut RowSink<'_, S::File>) -> Result<(), E>,
    ) -> Result<ReplayEnd, ReplayError<E>> {
        if matches!(self.health, Health::Good | Health::Poisoned) {
            self.check_writable()?;
            return Ok(ReplayEnd::Healthy);
        }
        let mut segments: Vec<_> = self.tables.read().iter().filter_map(Held::pin).collect();
        segments.retain(|segment| segment.last() > self.applied);
        for segment in segments {
            if let Some(range) = self.replay_segment(&segment, &mut apply)? {
                self.health = Health::Damaged(range);
                return Ok(ReplayEnd::Damaged { range });
            }
        }
        if let Some(range) = self.gap_to(self.durable.next()) {
            self.health = Health::Damaged(range);
            return Ok(ReplayEnd::Damaged { range });
        }
        self.begin_epoch().map_err(ReplayError::Start)?;
        self.health = Health::Good;
        self.seal_ended(0)?;
        Ok(ReplayEnd::Healthy)
    }

    fn replay_segment<E>(
        &mut self,
        segment: &Segment<S::File>,
        apply: &mut impl FnMut(ReplayEntry<'_>, &mut RowSink<'_, S::File>) -> Result<(), E>,
    ) -> Result<Option<IndexRange>, ReplayError<E>> {
        if segment.contents == Contents::Sparse {
            let first = segment.first.max(self.applied.next());
            return Ok(Some(IndexRange {
                first,
                last: segment.last(),
            }));
        }
        let mut entry = Vec::new();
        let spots = match segment.spots_after(self.applied) {
            Ok(spots) => spots,
            Err(ReadError::Damaged(range)) => return Ok(Some(range)),
            Err(error) => return Err(LogError::from(error).into()),
        };
        for spot in spots {
            if let Some(range) = self.gap_to(spot.index) {
                return Ok(Some(range));
            }
            match segment.read_entry(spot, &mut entry) {
                Ok(header) if header.kind == EntryKind::Normal => {
                    let records = Records::new(&header, &entry);
                    let replayed = ReplayEntry {
                        index: header.index,
                        epoch: header.epoch,
                        records,
                    };
                    let mut rows = RowSink {
                        tables: &self.tables,
                    };
                    apply(replayed, &mut rows).map_err(ReplayError::Apply)?;
                }
                Ok(_) => {}
                Err(ReadError::Damaged(_)) if self.manifest.state().is_skipped(spot.index) => {}
                Err(ReadError::Damaged(range)) => return Ok(Some(range)),
                Err(error) => return Err(LogError::from(error).into()),
            }
            self.applied = spot.index;
        }
        Ok(self.gap_to(segment.last().next()))
    }

    /// Steps over skipped entries before `next`; the range that is missing, if one is.
    fn gap_to(&mut self, next: LogIndex) -> Option<IndexRange> {
        while self.applied.next() < next {
            let missing = self.applied.next();
            let Some(skipped) = self.manifest.state().skip_at(missing) else {
                return Some(IndexRange {
                    first: missing,
                    last: next.previous(),
                });
            };
            self.applied = skipped.last.min(next.previous());
        }
        None
    }
}
