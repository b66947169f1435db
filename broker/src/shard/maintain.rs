//! Upkeep: snapshots, spare segments, segments that nothing needs, segments that are mostly dead.
//!
//! The long part of each is a `Job` for another thread; only planning it and installing its result
//! happen here, between commits. One job of a kind runs at a time.

use std::io::ErrorKind;

use millpond_protocol::{LogIndex, Offset, TopicId};
use millpond_queue::{Place, Record, SnapshotDelta};
use millpond_wal::snapshot::SnapshotError;
use millpond_wal::storage::{Storage, is_full};
use millpond_wal::{
    ChunkId, CleanDone, CleanJob, Contents, JobError, LogError, Row, SealDone, SealJob,
    SegmentInfo, SnapshotDone, SnapshotJob, SpareDone, SpareJob, Stage, UnlinkJob,
};

use super::{Fatal, Outbox, Shard};
use crate::clock::Clock;

/// How often upkeep looks for something to do, in microseconds.
pub(super) const UPKEEP_EVERY_US: u64 = 1_000_000;
/// A segment is cleaned when at most this share of its messages is still needed, in percent.
const CLEAN_LIVE_PERCENT: u64 = 25;
/// A nack or another end of a lease takes as long to replay as so many bytes of messages, at least.
const REPLAY_BYTES_OF_ITEM: u64 = 256;
/// Shelves of retries that a round tells a snapshot, at most: 512 retries each, at 0.1 us each.
const SHELVES_TOLD_MAX: usize = 8;
/// Runs of messages that one look for something to do lets go, at most; 16 bytes of log each.
const LET_GO_RUNS_MAX: usize = 4_096;

/// Long work for a thread of its own.
pub enum Job<S: Storage> {
    Snapshot(SnapshotJob<S>),
    Seal(SealJob<S>),
    Spare(SpareJob<S>),
    Clean(CleanJob<S>),
    Unlink(UnlinkJob<S>),
}

/// Its result, for `Shard::job_done`.
pub enum Done<S: Storage> {
    Snapshot(Result<SnapshotDone, SnapshotError>),
    Seal(Result<SealDone<S>, JobError>),
    Spare(Result<SpareDone, JobError>),
    Clean(Result<CleanDone<S>, JobError>),
    Unlink,
}

impl<S: Storage> Job<S> {
    /// Does the work. May take seconds.
    #[must_use]
    pub fn run(self) -> Done<S> {
        match self {
            Self::Snapshot(job) => Done::Snapshot(job.run()),
            Self::Seal(job) => Done::Seal(job.run()),
            Self::Spare(job) => Done::Spare(job.run()),
            Self::Clean(job) => Done::Clean(job.run()),
            Self::Unlink(job) => {
                job.run();
                Done::Unlink
            }
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Maintenance {
    snapshot_every_bytes: u64,
    /// What a start would replay, in bytes of messages that take as long.
    bytes_since_snapshot: u64,
    snapshot_running: bool,
    /// The snapshot that was begun and waits for its job.
    telling: Option<Telling>,
    /// What the running snapshot has: to be written again if it fails.
    snapshot_chunks: Vec<u64>,
    seal_running: bool,
    /// Not before, after one that failed.
    next_seal_us: u64,
    spare_running: bool,
    clean_running: bool,
    unlink_running: bool,
    next_us: u64,
}

/// A snapshot that is not complete: of the state behind this entry, and what was told when it was.
#[derive(Debug)]
struct Telling {
    index: millpond_wal::LogIndex,
    delta: Option<SnapshotDelta>,
}

impl Maintenance {
    pub(super) fn new(snapshot_every_bytes: u64, bytes_since_snapshot: u64) -> Self {
        Self {
            snapshot_every_bytes,
            bytes_since_snapshot,
            ..Self::default()
        }
    }

    /// A start would have more to replay, in bytes of messages that take as long.
    pub(super) fn note_replay(&mut self, bytes: u64) {
        self.bytes_since_snapshot += bytes;
    }

    pub(super) fn wait_us(&self, clock_us: u64) -> u64 {
        if self
            .telling
            .as_ref()
            .is_some_and(|telling| telling.delta.is_none())
        {
            return 0;
        }
        self.next_us
            .saturating_sub(clock_us)
            .clamp(1, UPKEEP_EVERY_US)
    }
}

/// What a record takes to replay beside its bytes.
pub(super) fn replay_bytes(record: &Record<'_>) -> u64 {
    match record {
        Record::Settle { items, .. } => items.len() as u64 * REPLAY_BYTES_OF_ITEM,
        _ => 0,
    }
}

impl<S: Storage, C: Clock> Shard<S, C> {
    /// Plans what is due. Cheap when nothing is.
    pub fn upkeep(&mut self, out: &mut Outbox<S>) -> Result<(), Fatal> {
        if self.gates.read_only {
            return Ok(());
        }
        self.tell_snapshot(out)?;
        if self.maintenance.bytes_since_snapshot >= self.maintenance.snapshot_every_bytes {
            self.begin_snapshot()?;
        }
        let clock_us = self.stamper.clock().boottime_us();
        self.plan_seal(clock_us, out);
        if clock_us < self.maintenance.next_us {
            return Ok(());
        }
        self.maintenance.next_us = clock_us + UPKEEP_EVERY_US;
        if !self.maintenance.spare_running
            && let Some(job) = self.log.spare_job()
        {
            self.maintenance.spare_running = true;
            out.jobs.push(Job::Spare(job));
        }
        self.reclaim(out)?;
        self.plan_unlink(out);
        Ok(())
    }

    /// Takes the result of a job in.
    ///
    /// # Errors
    /// A full disk leaves everything as it was; the job is tried again. Any other failed write is fatal:
    /// what the disk holds is unknown.
    pub fn job_done(&mut self, done: Done<S>) -> Result<(), Fatal> {
        match done {
            Done::Snapshot(result) => {
                self.maintenance.snapshot_running = false;
                match result {
                    Ok(done) => {
                        // Chunks of an older snapshot that could not be read are written anew.
                        let damaged: Vec<_> = done.damaged.iter().map(|id| id.0).collect();
                        self.queue.snapshot_lost(&damaged);
                        self.log.install_snapshot(done)?;
                    }
                    Err(error) if is_disk_full(&error) => {
                        tracing::warn!(%error, "a snapshot could not be written; the next one has its changes too");
                        self.queue.snapshot_lost(&self.maintenance.snapshot_chunks);
                    }
                    Err(error @ SnapshotError::ChunkTooLarge { .. }) => {
                        tracing::error!(%error, "a snapshot could not be written: starts take longer, and no space is freed");
                        self.queue.snapshot_lost(&self.maintenance.snapshot_chunks);
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            // Sealed by an append in the meantime, and cleaned or removed after that.
            Done::Seal(Err(error)) if error.source.kind() == ErrorKind::NotFound => {
                self.maintenance.seal_running = false;
                self.seal_later();
            }
            Done::Seal(result) => {
                self.maintenance.seal_running = false;
                match unless_full(result, "a segment could not be sealed")? {
                    Some(done) => unless_overtaken(self.log.install_sealed(done))?,
                    None => self.seal_later(),
                }
            }
            Done::Spare(result) => {
                self.maintenance.spare_running = false;
                if let Some(done) = unless_full(result, "a spare segment could not be prepared")? {
                    self.log.install_spare(done);
                    // Another may be missing: a fresh log has none, and its first segment is small.
                    self.maintenance.next_us = 0;
                }
            }
            Done::Clean(result) => {
                self.maintenance.clean_running = false;
                if let Some(done) = unless_full(result, "a segment could not be cleaned")? {
                    if let Some(range) = done.damaged() {
                        tracing::warn!(%range, "a segment is damaged and is not cleaned");
                    }
                    unless_overtaken(self.log.install_cleaned(done))?;
                }
            }
            Done::Unlink => self.maintenance.unlink_running = false,
        }
        Ok(())
    }

    fn seal_later(&mut self) {
        let clock_us = self.stamper.clock().boottime_us();
        self.maintenance.next_seal_us = clock_us + UPKEEP_EVERY_US;
    }

    fn plan_seal(&mut self, clock_us: u64, out: &mut Outbox<S>) {
        if !self.maintenance.seal_running
            && clock_us >= self.maintenance.next_seal_us
            && let Some(job) = self.log.seal_job()
        {
            self.maintenance.seal_running = true;
            out.jobs.push(Job::Seal(job));
        }
    }

    fn plan_unlink(&mut self, out: &mut Outbox<S>) {
        if !self.maintenance.unlink_running
            && let Some(job) = self.log.unlink_job()
        {
            self.maintenance.unlink_running = true;
            out.jobs.push(Job::Unlink(job));
        }
    }

    /// Of the state as it stands. The segment ends here, so that it can be sealed up to here by a job.
    fn begin_snapshot(&mut self) -> Result<(), Fatal> {
        if self.maintenance.snapshot_running {
            return Ok(());
        }
        self.maintenance.snapshot_running = true;
        self.maintenance.bytes_since_snapshot = 0;
        self.log.roll()?;
        self.queue.begin_snapshot();
        self.maintenance.telling = Some(Telling {
            index: self.log.durable(),
            delta: None,
        });
        Ok(())
    }

    /// A part of it in every round, so that none waits for all. The job follows once the log is sealed that far.
    fn tell_snapshot(&mut self, out: &mut Outbox<S>) -> Result<(), Fatal> {
        let Some(telling) = &mut self.maintenance.telling else {
            return Ok(());
        };
        let index = telling.index;
        if telling.delta.is_none() {
            telling.delta = self.queue.tell_snapshot(SHELVES_TOLD_MAX);
        }
        if !self.log.is_sealed_to(index) {
            return Ok(());
        }
        let Some(SnapshotDelta { dirty, removed }) = telling.delta.take() else {
            return Ok(());
        };
        self.maintenance.telling = None;
        let chunks = dirty.iter().map(|(id, _)| id).chain(&removed);
        self.maintenance.snapshot_chunks = chunks.copied().collect();
        let dirty = dirty
            .into_iter()
            .map(|(id, bytes)| (ChunkId(id), bytes))
            .collect();
        let removed = removed.into_iter().map(ChunkId).collect();
        let job = self.log.snapshot_job(index, dirty, removed)?;
        out.jobs.push(Job::Snapshot(job));
        Ok(())
    }

    /// Removes the segments that nothing needs and plans the cleaning of one that is mostly dead.
    /// Before a body goes, a record has said so: whoever seeks back passes over it.
    fn reclaim(&mut self, out: &mut Outbox<S>) -> Result<(), Fatal> {
        let mut dead = Vec::new();
        let mut mostly_dead = None;
        // While a full disk holds the group, it would be told of the same again and again.
        let mut runs_left = match self.held_until_us {
            Some(_) => 0,
            None => LET_GO_RUNS_MAX,
        };
        for segment in self.log.segments() {
            if segment.stage != Stage::Sealed || !segment.covered {
                continue;
            }
            let live = self.live_percent(&segment);
            let is_whole = segment.contents != Contents::Sparse;
            let may_go = live.is_none_or(|percent| percent <= CLEAN_LIVE_PERCENT && is_whole);
            if !may_go || self.propose_letting_go(&segment, &mut runs_left) {
                continue;
            }
            match live {
                None => dead.push(segment.id),
                Some(_) if segment.damaged => {}
                Some(_) => mostly_dead = mostly_dead.or(Some(segment)),
            }
        }
        if !dead.is_empty() {
            let bytes = self.log.remove_segments(&dead)?;
            tracing::info!(
                segments = dead.len(),
                bytes,
                "removed segments that nothing needs"
            );
        }
        match mostly_dead {
            Some(segment) if !self.maintenance.clean_running => self.plan_clean(&segment, out),
            _ => Ok(()),
        }
    }

    /// Proposes to let go what nobody needs of a segment; false: all of that is let go already.
    fn propose_letting_go(&mut self, segment: &SegmentInfo, runs_left: &mut usize) -> bool {
        let mut is_open = false;
        for range in segment.topics.iter() {
            let topic = TopicId(range.topic);
            let (first, end) = (Offset(range.first_offset), Offset(range.end_offset));
            let most = (*runs_left).max(1);
            let ranges = self.queue.unneeded_between(topic, first, end, most);
            if ranges.is_empty() {
                continue;
            }
            is_open = true;
            if *runs_left > 0 {
                *runs_left = runs_left.saturating_sub(ranges.len());
                self.push_unawaited(&Record::LetGo { topic, ranges });
            }
        }
        is_open
    }

    fn plan_clean(&mut self, segment: &SegmentInfo, out: &mut Outbox<S>) -> Result<(), Fatal> {
        let queue = &self.queue;
        let row_lives = |row: &Row| {
            let end = Offset(row.base + u64::from(row.count));
            !queue.is_let_go(TopicId(row.topic), Offset(row.base), end)
        };
        let pins = queue.pins_between(LogIndex(segment.first.0), LogIndex(segment.last.0));
        let kept = pins.map(|place| millpond_wal::Place {
            index: millpond_wal::LogIndex(place.index.0),
            record: place.record,
        });
        match self.log.clean_plan(segment.id, kept, row_lives) {
            Ok(job) => {
                self.maintenance.clean_running = true;
                out.jobs.push(Job::Clean(job));
                Ok(())
            }
            // What cannot be read is not thrown away.
            Err(LogError::Read(error)) => {
                tracing::warn!(%error, "a segment is damaged and is not cleaned");
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// How much of a segment is needed, or at least if that is too much for cleaning; `None`: nothing at all.
    fn live_percent(&self, segment: &SegmentInfo) -> Option<u64> {
        let mut pins = self
            .queue
            .pins_between(LogIndex(segment.first.0), LogIndex(segment.last.0));
        let pinned = pins.next().is_some();
        let spans = segment.topics.iter();
        let asked: u64 = spans.map(|span| span.end_offset - span.first_offset).sum();
        let percent = |live: u64| live * 100 / asked.max(1);
        let mut live = 0;
        for range in segment.topics.iter() {
            let topic = TopicId(range.topic);
            live += self.queue.live_between(
                topic,
                Offset(range.first_offset),
                Offset(range.end_offset),
            );
            // With thousands of topics in hundreds of segments, asking for the rest takes too long.
            if percent(live) > CLEAN_LIVE_PERCENT {
                break;
            }
        }
        if live == 0 && !pinned {
            None
        } else {
            Some(percent(live))
        }
    }
}

/// What a job made, unless the disk was full.
fn unless_full<T>(result: Result<T, JobError>, what: &str) -> Result<Option<T>, Fatal> {
    match result {
        Ok(done) => Ok(Some(done)),
        Err(error) if error.is_disk_full() => {
            tracing::warn!(%error, "{what}: the disk is full");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

const _: () =
    assert!(millpond_queue::ROWS_CHUNK_BYTES_MAX <= millpond_wal::snapshot::CHUNK_BYTES_MAX);

fn is_disk_full(error: &SnapshotError) -> bool {
    matches!(error, SnapshotError::Io { source, .. } if is_full(source.kind()))
}

/// A job whose segment was sealed by an append, or removed, while it waited has nothing to install.
fn unless_overtaken<T>(installed: Result<T, LogError>) -> Result<(), Fatal> {
    match installed {
        Ok(_) | Err(LogError::Outdated(_) | LogError::UnknownSegment(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn place_of(place: millpond_wal::Place) -> Place {
    Place {
        index: LogIndex(place.index.0),
        record: place.record,
    }
}
