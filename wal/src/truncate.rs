//! Cutting the end of the log off, for a replica whose last entries were never agreed on.
//!
//! The manifest record comes first. It raises the epoch and voids what the cut entries and later ones of
//! that epoch vouched for, so that nothing of them comes back after a crash; their bytes stay until the
//! segment is sealed over them.

use crate::entry::LogIndex;
use crate::error::LogError;
use crate::log::Log;
use crate::manifest::{Change, Cut};
use crate::scan::{Expect, scan};
use crate::storage::Storage;
use crate::tables::Body;

impl<S: Storage> Log<S> {
    /// Removes every entry from `from` on. Only entries that are not sealed can be cut, and with them
    /// goes what was applied of them: the caller's state must be that of an earlier index.
    pub fn truncate_suffix(&mut self, from: LogIndex) -> Result<(), LogError> {
        self.check_writable()?;
        if from > self.durable {
            return Ok(());
        }
        self.end_active();
        let sealed = self
            .ended
            .front()
            .map_or(self.durable, |ended| ended.segment.first.previous());
        if from <= sealed {
            return Err(LogError::TruncateCovered { from });
        }
        let last = from.previous();
        let mut cut = Vec::new();
        let mut dropped = Vec::new();
        for ended in &self.ended {
            if ended.segment.first >= from {
                dropped.push(ended.segment.id);
            } else if ended.last >= from
                && let Some(spot) = ended.segment.spot(from)?
            {
                cut.push((
                    ended.segment.id,
                    Cut {
                        last,
                        entries_end: spot.position(),
                    },
                ));
            }
        }
        let epoch = self.recovery_epoch() + 1;
        // A manifest record vouches for what is durable, which the cut entries are not any more.
        self.watermark.cut(last);
        self.durable = last;
        self.applied = self.applied.min(last);
        self.last_normal = self.last_normal.min(last);
        self.change(Change::Truncated {
            from,
            epoch,
            cut,
            dropped,
        })?;
        self.forget_from(from)
    }

    /// Brings the tables in line with the manifest.
    fn forget_from(&mut self, from: LogIndex) -> Result<(), LogError> {
        while let Some(ended) = self.ended.pop_back() {
            if ended.segment.first < from {
                self.ended.push_back(ended);
                break;
            }
            self.tables.write().remove(ended.segment.first);
            ended.segment.retire();
        }
        let Some(mut ended) = self.ended.pop_back() else {
            return Ok(());
        };
        if let (Body::Open { file, table }, true) = (&ended.segment.body, ended.last >= from) {
            table.write().truncate(from);
            let expect = Expect {
                uuid: ended.segment.uuid,
                epoch: ended.segment.epoch,
                first: ended.segment.first,
                end: table
                    .read()
                    .spots
                    .last()
                    .map(|spot| spot.position() + spot.bytes() as u64),
            };
            let name = ended.segment.name.clone();
            let left = scan(&**file, expect);
            let left = left.map_err(|source| self.poison_io("read", &name, source))?;
            ended.last = from.previous();
            ended.entries_end = left.entries_end;
            ended.records = left.records;
            ended.digest = left.digest.digest128().to_le_bytes();
            ended.last_crc = left.last_crc;
            ended.written = Default::default();
        }
        self.predecessor = (ended.segment.uuid, ended.last_crc);
        self.ended.push_back(ended);
        Ok(())
    }
}
