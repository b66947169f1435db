//! What is read ahead of a sequential reader: a piece of the log, at once and past the page cache, where the
//! topic has most of it; record by record where it has not, or where anything is not as expected.

use std::sync::Arc;

use millpond_protocol::{Offset, TopicId};
use millpond_wal::storage::Storage;
use millpond_wal::{LogReader, Row, SideBySide, Stretch};
use tokio::sync::oneshot;

use super::{BodyError, RECORD_BYTES_FREE, ROWS_MAX, Run, read_log, run_of};
use crate::memory::Permit;

/// Bytes that are read at once, if entries end there.
pub const BYTES: usize = 1 << 20;
/// Bytes that a piece may take: its last entry or record is read whole.
pub const BYTES_MAX: usize = BYTES + RECORD_BYTES_FREE;

/// Runs without holes, and what pays for their memory.
pub struct Piece {
    pub runs: Vec<Run>,
    pub paid: Arc<Permit>,
}

/// Where a reader reads on.
#[derive(Copy, Clone, Debug)]
pub struct Wanted {
    pub topic: TopicId,
    pub offset: Offset,
    /// About what a message has.
    pub message_bytes: usize,
}

/// What follows there; at least one message. Says where that should end as soon as it is known, mostly before
/// it is read. Blocks.
pub fn read<S: Storage>(
    reader: &LogReader<S>,
    wanted: Wanted,
    paid: Arc<Permit>,
    tell_end: oneshot::Sender<Offset>,
) -> Result<Piece, BodyError> {
    let Wanted { topic, offset, .. } = wanted;
    let mut tell_end = Some(tell_end);
    let mut tell = |end| {
        if let Some(tell) = tell_end.take() {
            // Who reads on may be gone.
            let _ = tell.send(end);
        }
    };
    if let Some((rows, entries)) = side_by_side(reader, wanted)
        && let Some(last) = rows.last()
    {
        tell(Offset(last.end()));
        if let Some(stretch) = entries.read() {
            let runs = runs_of(&stretch.keeping(paid.clone()), &rows, offset);
            if !runs.is_empty() {
                return Ok(Piece { runs, paid });
            }
        }
    }
    let runs = read_log(reader, topic, offset, u32::MAX, BYTES)?;
    if let Some(last) = runs.last() {
        tell(last.end());
        if let Ok(Some(row)) = reader.find(topic.0, last.base.0) {
            let read = runs.iter().map(|run| run.messages.len()).sum();
            reader.reads_on(row.place, read);
        }
    }
    Ok(Piece { runs, paid })
}

/// The entries with the next rows of a topic, if at least half of their bytes should be its messages.
fn side_by_side<S: Storage>(
    reader: &LogReader<S>,
    wanted: Wanted,
) -> Option<(Vec<Row>, SideBySide<S>)> {
    let mut rows = reader
        .rows(wanted.topic.0, wanted.offset.0, ROWS_MAX)
        .ok()?;
    let (first, last) = (rows.first()?.place.index, rows.last()?.place.index);
    let entries = reader.side_by_side(first, last, BYTES, BYTES_MAX)?;
    rows.retain(|row| row.place.index <= entries.last());
    let messages: u64 = rows.iter().map(|row| u64::from(row.count)).sum();
    let expected = messages.saturating_mul(wanted.message_bytes as u64);
    (expected >= entries.bytes() as u64 / 2).then_some((rows, entries))
}

/// What of the rows follows from `offset` on without a hole.
fn runs_of(stretch: &Stretch, rows: &[Row], offset: Offset) -> Vec<Run> {
    let (mut runs, mut next) = (Vec::new(), offset);
    for row in rows {
        // The stretch's memory is paid for as a whole.
        let run = stretch
            .record(row.place)
            .filter(|_| row.base <= next.0)
            .and_then(|record| run_of(&record, row, 0));
        let Some(run) = run else { break };
        let run = run.part(next, u32::MAX, usize::MAX);
        next = Offset(row.end());
        runs.push(run);
    }
    runs
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use millpond_protocol::{Message, Sequence};
    use millpond_queue::PUBLISH_FIXED_BYTES;
    use millpond_wal::sim::SimStorage;
    use millpond_wal::{Log, Options, Place};

    use super::*;
    use crate::config::MemoryConfig;
    use crate::memory::{Class, MemoryBudget};

    const MINE: TopicId = TopicId(3);
    const MESSAGE_BYTES: usize = 1_000;

    /// A log in small segments, an entry for each of these batches of messages.
    fn log(batches: impl IntoIterator<Item = (TopicId, u32)>) -> Log<SimStorage> {
        let options = Options {
            segment_bytes: 1 << 20,
            ..Options::default()
        };
        let mut log = Log::open(SimStorage::new(1), options).unwrap().log;
        log.replay(|_, _| Ok::<(), std::convert::Infallible>(()))
            .unwrap();
        let mut next = std::collections::BTreeMap::new();
        for (topic, count) in batches {
            let base: &mut u64 = next.entry(topic).or_default();
            let mut messages = BytesMut::zeroed(PUBLISH_FIXED_BYTES);
            for nth in 0..u64::from(count) {
                Message::new(vec![(*base + nth) as u8; MESSAGE_BYTES])
                    .encode(Sequence(*base + nth + 1), &mut messages);
            }
            let mut group = log.new_group();
            group.push(1, 1, &[&messages]);
            let index = log.append_durable(group).unwrap().index;
            log.add_row(Row {
                topic: topic.0,
                base: *base,
                count,
                skip: 0,
                place: Place { index, record: 0 },
                stamp: 1,
            });
            log.set_applied(index);
            *base += u64::from(count);
        }
        while let Some(job) = log.seal_job() {
            log.install_sealed(job.run().unwrap()).unwrap();
        }
        log
    }

    fn wanted(offset: u64) -> Wanted {
        Wanted {
            topic: MINE,
            offset: Offset(offset),
            message_bytes: MESSAGE_BYTES,
        }
    }

    fn paid() -> (MemoryBudget, Arc<Permit>) {
        let budget = MemoryBudget::new(&MemoryConfig::default());
        let share = budget.connection(None);
        let permit = budget.try_acquire(BYTES_MAX as u64, Class::Outbound, &share);
        (budget, Arc::new(permit.unwrap()))
    }

    #[test]
    fn a_topic_that_fills_the_log_is_read_at_once_and_paid_for_until_its_memory_is_free() {
        let log = log((0..40).map(|_| (MINE, 50)));
        let (budget, paid) = paid();
        let (tell_end, mut end) = oneshot::channel();
        assert!(side_by_side(&log.reader(), wanted(20)).is_some());
        let piece = read(&log.reader(), wanted(20), paid, tell_end).unwrap();
        let last = piece.runs.last().unwrap().end();
        assert_eq!(end.try_recv(), Ok(last));
        assert!(last.0 > 400, "most of a segment, {last}");
        let mut next = Offset(20);
        for run in &piece.runs {
            assert_eq!(run.base, next);
            next = run.end();
        }
        let slice = piece.runs[0].messages.slice(..10);
        drop(piece);
        assert_eq!(budget.used(Class::Outbound), BYTES_MAX as u64);
        drop(slice);
        assert_eq!(budget.used(Class::Outbound), 0);
    }

    #[test]
    fn a_topic_that_is_strewn_over_the_log_is_read_record_by_record() {
        let log = log((0..40).map(|nth| {
            if nth % 3 == 0 {
                (MINE, 1)
            } else {
                (TopicId(9), 20)
            }
        }));
        assert!(side_by_side(&log.reader(), wanted(0)).is_none());
        let (_budget, paid) = paid();
        let (tell_end, mut end) = oneshot::channel();
        let piece = read(&log.reader(), wanted(0), paid, tell_end).unwrap();
        assert!(!piece.runs.is_empty());
        assert_eq!(end.try_recv(), Ok(piece.runs.last().unwrap().end()));
    }
}
