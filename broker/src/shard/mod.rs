//! The one place where log and queue meet. Synchronous, generic over storage and clock.
//!
//! Inputs become records in the open commit group; `commit` appends the group, and returns from the
//! sync before anything of it is applied; only then do answers leave. So, at every moment:
//!
//! ```text
//! applied == durable <= appended      what `apply` has seen survives a power cut
//! answered <= applied                 nobody is told of what is not durable
//! ```
//!
//! It does not know sockets, threads or a wall clock, and never waits: who calls it decides when.

mod answer;
mod input;
pub mod io;
mod maintain;
mod open;
mod propose;
mod request;
#[cfg(test)]
mod tests;
mod view;

use std::collections::BTreeMap;

use millpond_protocol::limits::SETTLE_OFFSETS_MAX;
use millpond_protocol::{LogIndex, ProducerKey, SessionId, Stamp, SubscriptionId, TopicId};
use millpond_queue::{Effect, Place, Proposal, Queue, Record, publish_header};
use millpond_wal::storage::Storage;
use millpond_wal::{Group, Log, LogError};

use crate::clock::{ANCHOR_BYTES, Clock, Stamper};
use crate::shard::answer::Origin;
pub(crate) use crate::shard::answer::skip_messages;
use crate::shard::io::{Fresh, Input, Output, StreamId};
pub use crate::shard::maintain::{Done, Job};
pub use crate::shard::open::{OpenShardError, Recovered, ShardOptions};
pub(crate) use crate::shard::view::PEEK_HOLES_MAX;

/// Bytes of records after which the open group is committed although more is waiting.
pub const GROUP_BYTES_TARGET: usize = 1 << 20;
/// Records after which the open group is committed although more is waiting.
pub const GROUP_RECORDS_MAX: usize = 8_192;
/// Offsets of acknowledgements after which the open group is committed although more is waiting: each is
/// looked up, also where nothing is leased, so that these take some 30 ms.
pub const GROUP_OFFSETS_MAX: u64 = 4 * SETTLE_OFFSETS_MAX;
/// Proposals taken from the queue in one round.
const DISPATCH_BUDGET: usize = 8_192;
/// A group with nothing but hand-outs, which nobody waits for, is committed within this time.
pub const LEASE_COMMIT_US: u64 = 5_000;
/// A group that a full disk holds back is tried again after this time.
const HELD_RETRY_US: u64 = 20_000;
/// A commit with nothing behind it is vouched for after this time.
pub const VOUCH_AFTER_US: u64 = 10_000;
/// A shard that is late by so much was away: a disk stood still, the machine slept, or the start
/// took long. Shorter waits are what leases and grace have room for.
const AWAY_US: u64 = 500_000;

/// Why the shard must stop at once. The process ends; nothing unacknowledged is claimed.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    #[error("the log failed and nothing more may be acknowledged: {0}")]
    Log(#[from] millpond_wal::LogError),
    #[error("a record that was just written cannot be read back: {0}")]
    Record(#[from] millpond_queue::RecordError),
    #[error("upkeep failed, and what the disk holds is unknown: {0}")]
    Job(#[from] millpond_wal::JobError),
    #[error("a snapshot failed, and what the disk holds is unknown: {0}")]
    Snapshot(#[from] millpond_wal::snapshot::SnapshotError),
    #[error("the record at {0:?} that was just written is not there")]
    Vanished(Place),
}

/// What a round of the shard produced, in order.
pub struct Outbox<S: Storage> {
    pub replies: Vec<(StreamId, Output)>,
    /// Messages that were just accepted; the cache of recent bodies takes those that are wanted.
    pub fresh: Vec<Fresh>,
    /// Long work for another thread; its `Done` comes back through `Shard::job_done`.
    pub jobs: Vec<Job<S>>,
    /// Names of tokens that have just been revoked.
    pub revoked: Vec<String>,
    /// Sync times in microseconds and sizes of the groups committed in this round.
    pub commits: Vec<CommitFigures>,
}

impl<S: Storage> Default for Outbox<S> {
    fn default() -> Self {
        Self {
            replies: Vec::new(),
            fresh: Vec::new(),
            jobs: Vec::new(),
            revoked: Vec::new(),
            commits: Vec::new(),
        }
    }
}

#[derive(Copy, Clone, Debug)]
pub struct CommitFigures {
    pub records: u32,
    pub bytes: usize,
    pub sync_us: u64,
}

/// A consumer's session that has a stream to deliver to.
#[derive(Clone, Debug)]
struct Attachment {
    deliveries: StreamId,
    settlements: Option<StreamId>,
    token: u64,
    subscription: SubscriptionId,
}

struct Pending {
    origin: Origin,
    kind: u8,
    stamp: Stamp,
}

/// Log, queue and the group that is open between them.
pub struct Shard<S: Storage, C: Clock> {
    log: Log<S>,
    queue: Queue,
    stamper: Stamper<C>,
    group: Group,
    pending: Vec<Pending>,
    /// What the acknowledgements in it cover.
    group_offsets: u64,
    /// Whose state the open group's mark is to tell; none if it needs no mark.
    touched: Option<Vec<(TopicId, ProducerKey)>>,
    /// Publishes that were refused while a group was open; answered behind it.
    refused: Vec<input::Refused>,
    /// Somebody waits for the open group.
    awaited: bool,
    /// The open group may change who is there and what is there: no lease may be put behind that.
    upsets: bool,
    /// When the first record of a group that nobody waits for was put in.
    idle_since_us: u64,
    /// When the open group is tried again, while a full disk holds it back.
    held_until_us: Option<u64>,
    /// When the last commit ended, while it is not vouched for.
    vouch_since_us: Option<u64>,
    /// Until when the shard was awake, or meant to rest.
    expected_us: u64,
    attached: BTreeMap<SessionId, Attachment>,
    next_session: u32,
    effects: Vec<Effect>,
    proposals: Vec<Proposal>,
    scratch: Vec<u8>,
    more_to_dispatch: bool,
    maintenance: maintain::Maintenance,
    gates: Gates,
}

/// What the surroundings forbid at the moment.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Gates {
    /// Publishes are refused: the disk is nearly full.
    pub disk_low: bool,
    /// Nothing may be written: the log above the snapshot is damaged.
    pub read_only: bool,
    /// The disk reserve is gone: no new leases either.
    pub no_leases: bool,
    draining: bool,
}

impl<S: Storage, C: Clock> Shard<S, C> {
    /// Takes one input in. Its answer comes in this round, or with the commit that carries it.
    pub fn input<K>(&mut self, input: Input<K>, out: &mut Outbox<S>) {
        self.handle(input, out);
    }

    /// True if the open group should be committed before more is taken in.
    #[must_use]
    pub fn is_group_full(&self) -> bool {
        self.group.bytes() >= GROUP_BYTES_TARGET
            || self.pending.len() >= GROUP_RECORDS_MAX
            || self.group_offsets >= GROUP_OFFSETS_MAX
    }

    /// Bytes that the open group still takes.
    #[must_use]
    pub fn group_room(&self) -> usize {
        GROUP_BYTES_TARGET.saturating_sub(self.group.bytes())
    }

    /// Prepares the open group for so many bytes more.
    pub fn expect(&mut self, bytes: usize) {
        self.group.reserve(bytes);
    }

    /// False while a full disk holds back a group that is full: more would be too much for one entry.
    #[must_use]
    pub fn takes_more(&self) -> bool {
        self.held_until_us.is_none() || !self.is_group_full()
    }

    /// Appends the open group, returns from its sync, applies it and answers.
    ///
    /// # Errors
    /// Any error is fatal, a full disk too: the log is poisoned and nothing of the group was answered.
    pub fn commit(&mut self, out: &mut Outbox<S>) -> Result<(), Fatal> {
        if self.pending.is_empty() {
            return Ok(());
        }
        self.put_mark();
        let group = std::mem::replace(&mut self.group, self.log.new_group());
        let (records, bytes) = (group.records(), group.bytes());
        let before = self.stamper.clock().boottime_us();
        let appended = self.log.append_durable(group)?;
        let after = self.stamper.clock().boottime_us();
        let sync_us = after.saturating_sub(before);
        out.commits.push(CommitFigures {
            records,
            bytes,
            sync_us,
        });
        (self.awaited, self.upsets) = (false, false);
        self.group_offsets = 0;
        self.vouch_since_us = Some(after);
        self.apply_group(&appended, out)?;
        self.log.set_applied(appended.index);
        self.maintenance.note_replay(bytes as u64);
        Ok(())
    }

    /// Commits if somebody waits, or if hand-outs have waited long enough.
    pub fn commit_if_due(&mut self, out: &mut Outbox<S>) -> Result<(), Fatal> {
        let idle_us = self
            .stamper
            .clock()
            .boottime_us()
            .saturating_sub(self.idle_since_us);
        if self.awaited
            || self.is_group_full()
            || (!self.pending.is_empty() && idle_us >= LEASE_COMMIT_US)
        {
            self.commit_if_room(out)?;
        }
        Ok(())
    }

    /// A full disk is no failure: nothing has been written. The group waits, publishes are refused and
    /// nothing is handed out, until an operator, cleaning or the reserve has made room.
    fn commit_if_room(&mut self, out: &mut Outbox<S>) -> Result<(), Fatal> {
        let now = self.stamper.clock().boottime_us();
        if self.held_until_us.is_some_and(|until| now < until) {
            return Ok(());
        }
        self.put_mark();
        match self.log.make_room_for(&self.group) {
            Err(LogError::DiskFull) => {
                if self.held_until_us.replace(now + HELD_RETRY_US).is_none() {
                    tracing::warn!("the disk is full: nothing is committed until space is freed");
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
            Ok(()) => {
                if self.held_until_us.take().is_some() {
                    tracing::warn!("there is space again: commits go on");
                }
                self.commit(out)
            }
        }
    }

    /// Vouches for the last commit if nothing has followed it for a while.
    pub fn vouch_if_due(&mut self) -> Result<(), Fatal> {
        let now = self.stamper.clock().boottime_us();
        if self
            .vouch_since_us
            .is_some_and(|since| now.saturating_sub(since) >= VOUCH_AFTER_US)
        {
            self.vouch_since_us = None;
            match self.log.vouch() {
                Err(LogError::DiskFull) => self.vouch_since_us = Some(now),
                vouched => vouched?,
            }
        }
        Ok(())
    }

    /// To be called after every rest and every commit, before anything is taken in or dispatched: if
    /// the shard was away longer than it meant to, that time counts against no consumer, who may
    /// have come back, or renewed its leases, and was not heard yet.
    pub fn wake(&mut self) {
        let now_us = self.stamper.clock().boottime_us();
        let away_us = now_us.saturating_sub(self.expected_us);
        if away_us >= AWAY_US {
            self.queue.was_away(away_us.div_ceil(1_000));
        }
        self.expected_us = now_us;
    }

    /// Microseconds until there is something to do without any input; 0: at once.
    #[must_use]
    pub fn wait_us(&mut self) -> u64 {
        let clock_us = self.stamper.clock().boottime_us();
        let wait_us = self.rest_us(clock_us);
        self.expected_us = clock_us.saturating_add(wait_us);
        wait_us
    }

    fn rest_us(&mut self, clock_us: u64) -> u64 {
        if self.gates.read_only {
            // Nothing is written, so there is nothing to propose, to commit or to keep up.
            return maintain::UPKEEP_EVERY_US;
        }
        if let Some(until) = self.held_until_us {
            return until.saturating_sub(clock_us);
        }
        if self.more_to_dispatch || self.awaited {
            return 0;
        }
        let until = |since: u64, wait: u64| (since + wait).saturating_sub(clock_us);
        let lease = (!self.pending.is_empty()).then(|| until(self.idle_since_us, LEASE_COMMIT_US));
        let vouch = self
            .vouch_since_us
            .map(|since| until(since, VOUCH_AFTER_US));
        let now = self.stamper.now();
        let due = self
            .queue
            .next_wakeup(now)
            .map(|at| at.0.saturating_sub(now.0));
        let upkeep = self.maintenance.wait_us(clock_us);
        [lease, vouch, due]
            .into_iter()
            .flatten()
            .fold(upkeep, u64::min)
    }

    /// Ends cleanly: commits what is open and seals the log. Returns the clock's anchor, to be saved.
    pub fn close(mut self, out: &mut Outbox<S>) -> Result<[u8; ANCHOR_BYTES], Fatal> {
        self.commit(out)?;
        let anchor = self.stamper.anchor();
        if self.gates.read_only {
            Ok(anchor)
        } else {
            self.log.close().map(|()| anchor).map_err(Fatal::from)
        }
    }

    /// The clock's anchor as it stands, to be saved.
    pub fn anchor(&self) -> [u8; ANCHOR_BYTES] {
        self.stamper.anchor()
    }

    /// Adds a token without a session, before anybody can connect.
    pub fn add_token(&mut self, name: &str, hash: [u8; 32]) -> Result<(), Fatal> {
        self.push(&Record::TokenAdd { name, hash }, Origin::Own);
        self.commit(&mut Outbox::default())
    }

    /// The present time on the broker's own scale.
    pub fn now(&mut self) -> Stamp {
        self.stamper.now()
    }

    /// The queue, to look at.
    #[must_use]
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The log, to look at.
    #[must_use]
    pub fn log(&self) -> &Log<S> {
        &self.log
    }

    /// Changes what the surroundings forbid.
    pub fn set_gates(&mut self, disk_low: bool, no_leases: bool) {
        self.gates.disk_low = disk_low;
        self.gates.no_leases = no_leases;
        self.queue
            .hold_leases(no_leases.then_some("the disk reserve is used up"));
    }

    /// What is forbidden now.
    #[must_use]
    pub fn gates(&self) -> Gates {
        self.gates
    }

    fn apply_group(
        &mut self,
        appended: &millpond_wal::Appended,
        out: &mut Outbox<S>,
    ) -> Result<(), Fatal> {
        let index = LogIndex(appended.index.0);
        let pending = std::mem::take(&mut self.pending);
        for (
            number,
            Pending {
                origin,
                kind,
                stamp,
            },
        ) in pending.into_iter().enumerate()
        {
            let place = Place {
                index,
                record: number as u32,
            };
            let body = appended
                .record_body(place.record)
                .ok_or(Fatal::Vanished(place))?;
            let record = Record::decode(kind, &body)?;
            let outcome = self.queue.apply(place, stamp, &record, &mut self.effects);
            self.note_row(place, stamp, &body, &outcome, out);
            self.answer(origin, outcome, out);
            self.route_effects(out);
        }
        self.answer_refused(out);
        Ok(())
    }

    /// Puts a record into the open group; somebody waits for it.
    fn push(&mut self, record: &Record<'_>, origin: Origin) {
        self.awaited = true;
        self.upsets |= !matches!(
            record,
            Record::Publish { .. } | Record::Settle { .. } | Record::Commit { .. }
        );
        self.put(record, origin);
    }

    /// Puts a record into the open group; nobody waits for it.
    fn push_unawaited(&mut self, record: &Record<'_>) {
        if self.pending.is_empty() {
            self.idle_since_us = self.stamper.clock().boottime_us();
        }
        self.put(record, Origin::Own);
    }

    fn put(&mut self, record: &Record<'_>, origin: Origin) {
        let stamp = self.stamper.next();
        let kind = record.kind();
        self.scratch.clear();
        match record {
            Record::Publish {
                topic,
                producer,
                epoch,
                previous,
                count,
                messages,
            } => {
                let header = publish_header(*topic, *producer, *epoch, *previous, *count);
                self.group.push(stamp.0, kind, &[&header, messages]);
            }
            other => {
                self.maintenance.note_replay(maintain::replay_bytes(other));
                other.encode(&mut self.scratch);
                self.group.push(stamp.0, kind, &[&self.scratch]);
            }
        }
        self.pending.push(Pending {
            origin,
            kind,
            stamp,
        });
        self.touch(record);
    }

    fn touch(&mut self, record: &Record<'_>) {
        match record {
            Record::Publish {
                topic, producer, ..
            } => {
                let touched = self.touched.get_or_insert_default();
                if touched.last() != Some(&(*topic, *producer)) {
                    touched.push((*topic, *producer));
                }
            }
            Record::TopicCreate { .. }
            | Record::SubscriptionCreate { .. }
            | Record::OpenProducer { .. } => {
                self.touched.get_or_insert_default();
            }
            _ => {}
        }
    }

    /// Lets the open group tell what the state is before it: should entries be lost, what follows them shows
    /// what they had done.
    fn put_mark(&mut self) {
        let Some(touched) = self.touched.take() else {
            return;
        };
        let mut mark = std::mem::take(&mut self.scratch);
        mark.clear();
        let record = self.queue.mark(&touched);
        let kind = record.kind();
        record.encode(&mut mark);
        let stamp = self.stamper.next();
        self.group.push(stamp.0, kind, &[&mark]);
        self.scratch = mark;
        self.pending.push(Pending {
            origin: Origin::Own,
            kind,
            stamp,
        });
    }
}
