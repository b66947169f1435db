//! Message bodies by (topic, offset): from the cache of recent ones, else from the log.
//!
//! Sessions read here, never the shard thread. The cache holds what was just accepted, so that a
//! consumer at the tail costs no disk; older bodies are read by a bounded number of blocking
//! threads. Bytes of sealed segments are copied out of their maps there, never on an async worker.

pub mod piece;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use millpond_protocol::message::MessageView;
use millpond_protocol::{Offset, Stamp, TopicId};
use millpond_queue::PUBLISH_FIXED_BYTES;
use millpond_queue::Place;
use millpond_wal::storage::Storage;
use millpond_wal::{LogReader, ReadError, RecordBytes, Row};
use parking_lot::RwLock;
use tokio::sync::{Semaphore, oneshot};

use self::piece::{Piece, Wanted};
use crate::memory::Permit;
use crate::shard::io::Fresh;
use crate::shard::skip_messages;

/// Rows looked up at once when reading from the log.
const ROWS_MAX: usize = 256;
/// Bytes of a record that are read whatever was asked for: a batch of small messages, which is held only
/// until some of it is copied, by as many threads as may read.
pub const RECORD_BYTES_FREE: usize = 1 << 20;
/// A record of a message takes at least this much of the cache's bound, for its bookkeeping.
const RUN_BYTES_MIN: usize = 128;

/// Consecutive messages of one topic, published together.
#[derive(Clone, Debug)]
pub struct Run {
    pub base: Offset,
    pub count: u32,
    pub stamp: Stamp,
    /// The messages, one behind the other.
    pub messages: Bytes,
    /// Bytes of memory that a slice of them keeps alive and that nobody has paid for.
    pub pinned: usize,
}

impl Run {
    /// The offset behind its last message.
    #[must_use]
    pub fn end(&self) -> Offset {
        Offset(self.base.0 + u64::from(self.count))
    }

    /// Takes a part, which begins where this run begins, off its front.
    pub fn drop_front(&mut self, part: &Run) {
        self.base = Offset(self.base.0 + u64::from(part.count));
        self.count -= part.count;
        self.messages = self.messages.slice(part.messages.len()..);
    }

    /// The part from `offset` on, at most `count` messages and `bytes` bytes, but at least one message.
    #[must_use]
    pub fn part(&self, offset: Offset, count: u32, bytes: usize) -> Run {
        if offset == self.base && count >= self.count && bytes >= self.messages.len() {
            // All of it, and its messages need not be looked at.
            return self.clone();
        }
        let skip = offset
            .0
            .saturating_sub(self.base.0)
            .min(u64::from(self.count)) as u32;
        let behind = skip_messages(&self.messages, skip);
        let most = count.min(self.count - skip);
        let (taken, length) = measure(&behind, most, bytes);
        Run {
            base: offset,
            count: taken,
            stamp: self.stamp,
            messages: behind.slice(..length),
            pinned: self.pinned,
        }
    }
}

/// How many messages fit, and their bytes. At least one is taken.
fn measure(messages: &[u8], count: u32, bytes: usize) -> (u32, usize) {
    let (mut taken, mut rest) = (0, messages);
    while taken < count
        && let Ok((_, behind)) = MessageView::split(rest)
    {
        if taken > 0 && messages.len() - behind.len() > bytes {
            break;
        }
        (taken, rest) = (taken + 1, behind);
    }
    (taken, messages.len() - rest.len())
}

/// Why a body cannot be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// Its bytes are damaged on disk; the next readable offset is named.
    #[error("offsets {first} to before {next} are damaged on disk")]
    Damaged { first: Offset, next: Offset },
    /// The record that holds it takes more memory than was asked for.
    #[error("it takes {bytes} bytes to read it")]
    TooLarge { bytes: u64 },
    /// It is no longer kept.
    #[error("offset {0} is no longer kept")]
    Gone(Offset),
    #[error("the log cannot be read: {0}")]
    Io(String),
}

/// Shared by all sessions; cheap to clone.
pub struct Bodies<S: Storage> {
    cache: Arc<Cache>,
    reader: LogReader<S>,
    readers: Arc<Semaphore>,
}

impl<S: Storage> Clone for Bodies<S> {
    fn clone(&self) -> Self {
        Self {
            cache: self.cache.clone(),
            reader: self.reader.clone(),
            readers: self.readers.clone(),
        }
    }
}

impl<S: Storage> Bodies<S> {
    /// `cache_bytes` of recent bodies, `readers` blocking reads at once.
    pub fn new(reader: LogReader<S>, cache_bytes: usize, readers: usize) -> Self {
        let cache = Arc::new(Cache {
            bound: cache_bytes,
            held: RwLock::default(),
        });
        Self {
            cache,
            reader,
            readers: Arc::new(Semaphore::new(readers)),
        }
    }

    /// The cache's filling side, for the shard thread.
    #[must_use]
    pub fn cache(&self) -> Arc<Cache> {
        self.cache.clone()
    }

    /// As `read`, if the cache of recent bodies has it.
    #[must_use]
    pub fn cached(
        &self,
        topic: TopicId,
        offset: Offset,
        count: u32,
        bytes: usize,
    ) -> Option<Vec<Run>> {
        self.cache.read(topic, offset, count, bytes)
    }

    /// Runs from `offset` on, without holes, up to `count` messages and about `bytes` bytes; at least
    /// one message. A record larger than `bytes` and than [`RECORD_BYTES_FREE`] is not read. Cancel-safe.
    pub async fn read(
        &self,
        topic: TopicId,
        offset: Offset,
        count: u32,
        bytes: usize,
    ) -> Result<Vec<Run>, BodyError> {
        if let Some(runs) = self.cache.read(topic, offset, count, bytes) {
            return Ok(runs);
        }
        let reader = self.reader.clone();
        self.blocking(move || read_log(&reader, topic, offset, count, bytes))
            .await
    }

    /// As `read`, for who reads on behind it: what is at hand of about [`piece::BYTES`]. `paid` is kept for
    /// as long as what was read takes memory. See [`piece::read`].
    pub async fn read_on(
        &self,
        wanted: Wanted,
        paid: Arc<Permit>,
        tell_end: oneshot::Sender<Offset>,
    ) -> Result<Piece, BodyError> {
        let Wanted { topic, offset, .. } = wanted;
        if let Some(runs) = self.cache.read(topic, offset, u32::MAX, piece::BYTES) {
            if let Some(last) = runs.last() {
                let _ = tell_end.send(last.end());
            }
            return Ok(Piece { runs, paid });
        }
        let reader = self.reader.clone();
        self.blocking(move || piece::read(&reader, wanted, paid, tell_end))
            .await
    }

    /// One record's bytes, for the story of a dead letter.
    pub async fn record(&self, place: Place) -> Result<RecordBytes, BodyError> {
        let reader = self.reader.clone();
        let at = millpond_wal::Place {
            index: millpond_wal::LogIndex(place.index.0),
            record: place.record,
        };
        let read = move || reader.record(at).map_err(|e| BodyError::Io(e.to_string()));
        self.blocking(read).await
    }

    /// The first offset published at or after a time; `None` if there is none.
    pub async fn offset_at(
        &self,
        topic: TopicId,
        time: Stamp,
    ) -> Result<Option<Offset>, BodyError> {
        let reader = self.reader.clone();
        let find = move || match reader.offset_at_stamp(topic.0, time.0) {
            Ok(found) => Ok(found.map(Offset)),
            Err(error) => Err(BodyError::Io(error.to_string())),
        };
        self.blocking(find).await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, BodyError> + Send + 'static,
    ) -> Result<T, BodyError> {
        let stopped = |_| BodyError::Io("the broker is stopping".to_owned());
        let permit = self
            .readers
            .clone()
            .acquire_owned()
            .await
            .map_err(|_| BodyError::Io("closed".to_owned()))?;
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        task.await.map_err(stopped)?
    }
}

/// What `Bodies::read` reads from the log. Blocks.
pub fn read_log<S: Storage>(
    reader: &LogReader<S>,
    topic: TopicId,
    offset: Offset,
    count: u32,
    bytes: usize,
) -> Result<Vec<Run>, BodyError> {
    let wanted = (count as usize).min(ROWS_MAX);
    let rows = match reader.rows(topic.0, offset.0, wanted) {
        Ok(rows) => rows,
        // Both copies of a directory: what else stands in it is asked for later.
        Err(ReadError::Damaged(_)) => {
            return Err(BodyError::Damaged {
                first: offset,
                next: offset.next(),
            });
        }
        Err(error) => return Err(BodyError::Io(error.to_string())),
    };
    if let [first, .., last] = &rows[..] {
        reader.reads(first.place, last.place, bytes);
    }
    let behind = rows.first().map(|row| row.base);
    let (mut runs, mut next, mut left, mut room) = (Vec::new(), offset, count, bytes);
    for row in rows {
        if row.base > next.0 {
            break;
        }
        let run = match read_row(reader, &row, bytes.max(RECORD_BYTES_FREE)) {
            Ok(run) => run.part(next, left, room),
            Err(_) if !runs.is_empty() => break,
            Err(error) => return Err(error),
        };
        if !runs.is_empty() && run.messages.len() > room {
            break;
        }
        next = Offset(run.base.0 + u64::from(run.count));
        left -= run.count;
        room = room.saturating_sub(run.messages.len());
        runs.push(run);
        if left == 0 || room == 0 {
            break;
        }
    }
    if !runs.is_empty() {
        return Ok(runs);
    }
    match reader.lost_with(topic.0, offset.0) {
        Some(_) => Err(BodyError::Damaged {
            first: offset,
            next: Offset(behind.unwrap_or(offset.0 + u64::from(count.max(1)))),
        }),
        None => Err(BodyError::Gone(offset)),
    }
}

fn read_row<S: Storage>(
    reader: &LogReader<S>,
    row: &Row,
    bytes_max: usize,
) -> Result<Run, BodyError> {
    let damaged = || BodyError::Damaged {
        first: Offset(row.base),
        next: Offset(row.base + u64::from(row.count)),
    };
    let record = match reader.record_within(row.place, bytes_max) {
        Ok(record) => record,
        Err(ReadError::TooLarge { bytes }) => {
            let bytes = bytes as u64;
            return Err(BodyError::TooLarge { bytes });
        }
        Err(ReadError::Damaged { .. }) => return Err(damaged()),
        Err(error) => return Err(BodyError::Io(error.to_string())),
    };
    let pinned = record.body.len();
    run_of(&record, row, pinned).ok_or_else(damaged)
}

/// The messages of a record that its row accepted.
fn run_of(record: &RecordBytes, row: &Row, pinned: usize) -> Option<Run> {
    if record.body.len() < PUBLISH_FIXED_BYTES {
        return None;
    }
    Some(Run {
        base: Offset(row.base),
        count: row.count,
        stamp: Stamp(row.stamp),
        messages: skip_messages(&record.body.slice(PUBLISH_FIXED_BYTES..), row.skip),
        pinned,
    })
}

/// The bodies that were accepted last, oldest out first.
pub struct Cache {
    /// Bytes; the buffers of big commit groups are shared, small ones are copied.
    bound: usize,
    held: RwLock<Held>,
}

#[derive(Default)]
struct Held {
    topics: BTreeMap<TopicId, VecDeque<Run>>,
    /// Topics in the order their runs came in, with what each run costs: the first run of the first
    /// topic is the oldest.
    order: VecDeque<(TopicId, usize)>,
    bytes: usize,
}

impl Cache {
    /// Takes in what one commit accepted. A body that is small against its group is copied, so
    /// that it does not keep the whole group's buffer alive.
    pub fn fill(&self, fresh: impl IntoIterator<Item = Fresh>, share: Share) {
        let mut held = self.held.write();
        for item in fresh {
            // A group's buffer has at most twice the bytes of its records.
            let (messages, bytes, pinned) = match share {
                Share::Buffer(group) => (item.messages.clone(), 2 * item.messages.len(), 2 * group),
                Share::Copy => {
                    let bytes = item.messages.len();
                    (Bytes::copy_from_slice(&item.messages), bytes, bytes)
                }
            };
            let run = Run {
                base: item.base,
                count: item.count,
                stamp: item.stamp,
                messages,
                pinned,
            };
            held.put(item.topic, run, bytes.max(RUN_BYTES_MIN));
        }
        while held.bytes > self.bound {
            held.evict();
        }
    }

    /// Bytes held now.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.held.read().bytes
    }

    fn read(&self, topic: TopicId, offset: Offset, count: u32, bytes: usize) -> Option<Vec<Run>> {
        let held = self.held.read();
        let runs = held.topics.get(&topic)?;
        let at = runs.partition_point(|run| run.base.0 + u64::from(run.count) <= offset.0);
        let (mut out, mut next, mut left, mut room) = (Vec::new(), offset, count, bytes);
        for run in runs.range(at..) {
            if run.base > next || left == 0 || room == 0 {
                break;
            }
            let part = run.part(next, left, room);
            if !out.is_empty() && part.messages.len() > room {
                break;
            }
            next = Offset(part.base.0 + u64::from(part.count));
            left -= part.count;
            room = room.saturating_sub(part.messages.len());
            out.push(part);
        }
        (!out.is_empty()).then_some(out)
    }
}

/// Whether the cache keeps a commit group's own buffer alive or copies out of it.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Share {
    /// The buffer of a group of so many bytes.
    Buffer(usize),
    Copy,
}

/// Groups of at least this many bytes are shared with the cache, smaller ones copied.
const SHARE_BYTES_MIN: usize = 512 << 10;

impl Share {
    /// What is cheaper for a group of this size, whose buffer holds at least a megabyte.
    #[must_use]
    pub fn of_group(bytes: usize) -> Self {
        if bytes >= SHARE_BYTES_MIN {
            Self::Buffer(bytes)
        } else {
            Self::Copy
        }
    }
}

impl Held {
    fn put(&mut self, topic: TopicId, run: Run, bytes: usize) {
        self.bytes += bytes;
        self.order.push_back((topic, bytes));
        self.topics.entry(topic).or_default().push_back(run);
    }

    fn evict(&mut self) {
        let Some((topic, bytes)) = self.order.pop_front() else {
            self.bytes = 0;
            return;
        };
        self.bytes = self.bytes.saturating_sub(bytes);
        let Some(runs) = self.topics.get_mut(&topic) else {
            return;
        };
        runs.pop_front();
        if runs.is_empty() {
            self.topics.remove(&topic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use millpond_protocol::{LogIndex, Message, Sequence};

    fn fresh(base: u64, payloads: &[&str]) -> Fresh {
        let mut messages = BytesMut::new();
        for (n, payload) in payloads.iter().enumerate() {
            Message::new(payload.as_bytes().to_vec())
                .encode(Sequence(base + n as u64 + 1), &mut messages);
        }
        Fresh {
            topic: TopicId(1),
            base: Offset(base),
            count: payloads.len() as u32,
            stamp: Stamp(5),
            place: Place {
                index: LogIndex(1),
                record: 0,
            },
            messages: messages.freeze(),
            is_wanted: true,
        }
    }

    fn payloads(runs: &[Run]) -> Vec<String> {
        let mut out = Vec::new();
        for run in runs {
            let mut rest: &[u8] = &run.messages;
            while !rest.is_empty() {
                let (view, behind) = MessageView::split(rest).unwrap();
                out.push(String::from_utf8(view.payload().to_vec()).unwrap());
                rest = behind;
            }
        }
        out
    }

    fn cache(bound: usize) -> Cache {
        Cache {
            bound,
            held: RwLock::default(),
        }
    }

    #[test]
    fn runs_are_joined_from_any_offset() {
        let cache = cache(1 << 20);
        cache.fill([fresh(0, &["a", "b"]), fresh(2, &["c", "d"])], Share::Copy);
        let runs = cache.read(TopicId(1), Offset(1), 2, 1 << 20).unwrap();
        assert_eq!(payloads(&runs), ["b", "c"]);
        assert_eq!(runs[0].base, Offset(1));
    }

    #[test]
    fn at_least_one_message_is_read_whatever_the_room() {
        let cache = cache(1 << 20);
        cache.fill([fresh(0, &["a", "b"])], Share::Copy);
        assert_eq!(
            payloads(&cache.read(TopicId(1), Offset(0), 9, 1).unwrap()),
            ["a"]
        );
    }

    #[test]
    fn the_oldest_go_first_and_the_bound_holds() {
        let cache = cache(RUN_BYTES_MIN * 2);
        cache.fill((0..5).map(|n| fresh(n, &["x"])), Share::Copy);
        assert!(cache.bytes() <= RUN_BYTES_MIN * 2);
        assert!(cache.read(TopicId(1), Offset(0), 1, 1).is_none());
        assert!(cache.read(TopicId(1), Offset(4), 1, 1).is_some());
    }
}
