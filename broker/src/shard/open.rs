//! Opening a shard: the log recovers, the queue is restored from the snapshot and folds what came
//! after it, and a `Start` record begins the new incarnation.

use millpond_protocol::message::FIXED_BYTES as MESSAGE_FIXED_BYTES;
use millpond_protocol::{LogIndex, Offset, Stamp, TopicId};
use millpond_queue::{Effect, Loss, LostRun, Queue, Record, RecordError, RestoreError, kind};
use millpond_wal::storage::Storage;
use millpond_wal::{
    Folding, Log, LogError, LostEntries, OpenError, Options, RecoveryReport, ReplayEnd,
    ReplayError, ReplayRecord, Replayed, Row,
};

use super::answer::{Origin, row_of};
use super::maintain::{Maintenance, place_of, replay_bytes};
use super::{Gates, Shard};
use crate::clock::{Clock, Stamper};

/// How a shard is laid out.
#[derive(Clone, Debug)]
pub struct ShardOptions {
    pub log: Options,
    /// Bytes of log after which a snapshot is taken, so that replay is bounded.
    pub snapshot_every_bytes: u64,
}

/// Why a shard cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenShardError {
    #[error(transparent)]
    Log(#[from] OpenError),
    #[error("the log cannot be replayed: {0}")]
    Replay(#[from] LogError),
    #[error("{file} cannot be restored ({error}); `millpond log verify DIR` tells more")]
    Restore { file: String, error: RestoreError },
    #[error(
        "entry {entry} of the log holds a record that this version cannot read ({error}); use a newer version"
    )]
    Record { entry: u64, error: RecordError },
    #[error("the start could not be written: {0}")]
    Start(#[from] super::Fatal),
}

/// What opening found, for the broker's log and metrics.
#[derive(Debug)]
pub struct Recovered {
    pub report: RecoveryReport,
    pub replayed_records: u64,
    pub replayed_bytes: u64,
    pub damaged: bool,
    /// What the replay took, in bytes of messages that take as long.
    replay_cost: u64,
}

impl<S: Storage, C: Clock> Shard<S, C> {
    /// Recovers what the storage holds and begins a new incarnation.
    pub fn open(
        storage: S,
        clock: C,
        saved_clock: Option<&[u8]>,
        options: ShardOptions,
    ) -> Result<(Self, Recovered), OpenShardError> {
        let (mut opened, queue) = Log::open_beside(storage, options.log, restore)?;
        let snapshot = opened.snapshot.as_ref();
        let number = snapshot.map_or(0, |snapshot| snapshot.info().number);
        let queue = queue.map_err(|error| OpenShardError::Restore {
            file: millpond_wal::snapshot::file_name(number),
            error,
        })?;
        let mut fold = Fold {
            last: queue.last_stamp(),
            queue,
            gap: millpond_wal::LogIndex::NONE,
            records: 0,
            bytes: 0,
            cost: 0,
            effects: Vec::new(),
        };
        let end = fold.replay(&mut opened.log)?;
        let damaged = matches!(end, ReplayEnd::Damaged { .. });
        let recovered = Recovered {
            report: opened.log.report().clone(),
            replayed_records: fold.records,
            replayed_bytes: fold.bytes,
            damaged,
            replay_cost: fold.cost,
        };
        let stamper = Stamper::restore(clock, saved_clock, fold.last);
        let shard = Self::assemble(
            opened.log,
            fold.queue,
            stamper,
            options.snapshot_every_bytes,
            &recovered,
        )?;
        Ok((shard, recovered))
    }

    fn assemble(
        log: Log<S>,
        queue: Queue,
        stamper: Stamper<C>,
        snapshot_every_bytes: u64,
        recovered: &Recovered,
    ) -> Result<Self, OpenShardError> {
        let group = log.new_group();
        let expected_us = stamper.clock().boottime_us();
        let mut shard = Self {
            maintenance: Maintenance::new(snapshot_every_bytes, recovered.replay_cost),
            gates: Gates {
                read_only: recovered.damaged,
                ..Gates::default()
            },
            group,
            log,
            queue,
            stamper,
            pending: Vec::new(),
            group_offsets: 0,
            touched: None,
            refused: Vec::new(),
            awaited: false,
            upsets: false,
            idle_since_us: 0,
            held_until_us: None,
            vouch_since_us: None,
            expected_us,
            attached: std::collections::BTreeMap::new(),
            next_session: 0,
            effects: Vec::new(),
            proposals: Vec::new(),
            scratch: Vec::new(),
            more_to_dispatch: true,
        };
        if !shard.gates.read_only {
            let recovery_epoch = shard.log.recovery_epoch();
            shard.push(&Record::Start { recovery_epoch }, Origin::Own);
            for loss in shard.queue.open_losses() {
                shard.push(&loss, Origin::Own);
            }
            shard.commit(&mut super::Outbox::default())?;
        }
        Ok(shard)
    }
}

struct Fold {
    queue: Queue,
    /// The first entry of the last gap that was passed.
    gap: millpond_wal::LogIndex,
    last: Stamp,
    records: u64,
    bytes: u64,
    cost: u64,
    effects: Vec<Effect>,
}

impl Fold {
    fn replay<S: Storage>(&mut self, log: &mut Log<S>) -> Result<ReplayEnd, OpenShardError> {
        let end = log.replay(|step, rows| {
            let entry = match step {
                Replayed::Entry(entry) => entry,
                Replayed::Lost(lost) => {
                    self.lose(lost);
                    return Ok(());
                }
            };
            let unreadable = |error| (entry.index.0, error);
            if self.queue.is_mending() {
                for record in entry.records().filter(|record| record.kind == kind::Mark) {
                    let lost = self.mend(&record).map_err(unreadable)?;
                    lost.into_iter().for_each(|row| rows.add(row));
                }
            }
            for record in entry.records() {
                let row = self.fold(&record).map_err(unreadable)?;
                row.into_iter().for_each(|row| rows.add(row));
            }
            Ok(())
        });
        end.map_err(|error| match error {
            ReplayError::Log(error) => OpenShardError::Replay(error),
            ReplayError::Start(error) => OpenShardError::Log(error),
            ReplayError::Apply((entry, error)) => OpenShardError::Record { entry, error },
        })
    }

    fn lose(&mut self, lost: LostEntries) {
        self.gap = lost.range.first;
        let run = |row: Row| LostRun {
            topic: TopicId(row.topic),
            first: Offset(row.base),
            end: Offset(row.end()),
        };
        let loss = Loss {
            from: LogIndex(lost.range.first.0),
            to: LogIndex(lost.range.last.0),
            appended: lost.rows.map(|rows| rows.into_iter().map(run).collect()),
            messages_max: lost.bytes_max / MESSAGE_FIXED_BYTES as u64,
        };
        tracing::warn!(entries = %lost.range, "entries of the log are lost, as was accepted");
        self.queue.give_up(&loss);
    }

    /// The lost offsets, as rows that lead to a lost entry: who asks for one is told that it is damaged.
    fn mend(&mut self, record: &ReplayRecord<'_>) -> Result<Vec<Row>, RecordError> {
        let Record::Mark(mark) = Record::decode(record.kind, record.body)? else {
            return Ok(Vec::new());
        };
        let place = millpond_wal::Place {
            index: self.gap,
            record: 0,
        };
        let row = |run: LostRun| {
            let (topic, base) = (run.topic.0, run.first.0);
            tracing::warn!(topic, first = base, end = run.end.0, "messages are lost");
            Row {
                topic,
                base,
                count: u32::try_from(run.end.0 - base).unwrap_or(u32::MAX),
                skip: 0,
                place,
                stamp: self.last.0,
            }
        };
        let lost = self.queue.mend(Stamp(record.stamp), &mark);
        Ok(lost.into_iter().map(row).collect())
    }

    /// Applies one record; nobody is there to be told of its outcome.
    fn fold(&mut self, record: &ReplayRecord<'_>) -> Result<Option<Row>, RecordError> {
        let decoded = Record::decode(record.kind, record.body)?;
        let place = place_of(record.place);
        self.last = Stamp(record.stamp);
        self.records += 1;
        let bytes = record.body.len() as u64;
        self.bytes += bytes;
        self.cost += bytes + replay_bytes(&decoded);
        self.effects.clear();
        let outcome = self
            .queue
            .apply(place, self.last, &decoded, &mut self.effects);
        Ok(row_of(record.place, self.last, &outcome))
    }
}

/// The state as the snapshot holds it; an empty one if there is none.
fn restore(folding: Folding) -> Result<Queue, RestoreError> {
    let options = millpond_queue::Options {
        seed: seed_of(folding.store_id),
        ..millpond_queue::Options::default()
    };
    match folding.chunks {
        Some(chunks) => {
            Queue::restore(options, chunks.into_iter().map(|(id, bytes)| (id.0, bytes)))
        }
        None => Ok(Queue::new(options)),
    }
}

fn seed_of(store_id: [u8; 16]) -> u64 {
    let mut seed = [0; 8];
    seed.copy_from_slice(&store_id[..8]);
    u64::from_le_bytes(seed)
}
