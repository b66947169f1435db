//! Reading ahead of one consumer: while a frame is being sent, the next bodies come off the disk.
//!
//! Only for who reads one topic in offset order and misses the cache of recent bodies; retries and
//! consumers at the tail read what they need and no more. Holds at most two pieces of `PIECE_BYTES`,
//! paid for from the memory budget; where there is no memory, nothing is read ahead.

use std::collections::VecDeque;

use millpond_protocol::{Offset, TopicId};
use millpond_wal::storage::Storage;
use tokio::task::JoinHandle;

use crate::bodies::{Bodies, BodyError, RECORD_BYTES_FREE, Run};
use crate::memory::{Class, MemoryBudget, Permit, Share};

/// Bytes of bodies that are read at once for a sequential reader.
const AHEAD_BYTES: usize = 1 << 20;
/// Bytes that a piece may take: its last record is read whole.
const PIECE_BYTES: u64 = AHEAD_BYTES as u64 + RECORD_BYTES_FREE as u64;
/// Messages that are read at once.
const AHEAD_MESSAGES: u32 = 16_384;

/// One consumer's reading position and what has been read beyond it.
pub struct Ahead<S: Storage> {
    bodies: Bodies<S>,
    memory: MemoryBudget,
    share: Share,
    topic: TopicId,
    /// The end of the last read: who asks for it reads on.
    end: Offset,
    held: VecDeque<Run>,
    coming: Option<(Offset, JoinHandle<Result<Piece, BodyError>>)>,
    /// Pays for what is held.
    paid: Option<Permit>,
}

struct Piece {
    runs: Vec<Run>,
    permit: Option<Permit>,
}

impl<S: Storage> Ahead<S> {
    pub fn new(bodies: Bodies<S>, memory: MemoryBudget, share: Share) -> Self {
        Self {
            bodies,
            memory,
            share,
            topic: TopicId(0),
            end: Offset(0),
            held: VecDeque::new(),
            coming: None,
            paid: None,
        }
    }

    /// As `Bodies::read`. Cancel-safe: what was read stays held.
    pub async fn read(
        &mut self,
        topic: TopicId,
        offset: Offset,
        count: u32,
        bytes: usize,
    ) -> Result<Vec<Run>, BodyError> {
        if let Some(runs) = self.bodies.cached(topic, offset, count, bytes) {
            self.end = end_of(&runs);
            self.topic = topic;
            return Ok(runs);
        }
        let reads_on = topic == self.topic && offset == self.end;
        if !reads_on {
            self.forget();
            let runs = self.bodies.read(topic, offset, count, bytes).await?;
            (self.topic, self.end) = (topic, end_of(&runs));
            return Ok(runs);
        }
        if self.held.is_empty() {
            self.fetch(offset).await;
        }
        let runs = self.take(offset, count, bytes);
        if runs.is_empty() {
            self.forget();
            return self.bodies.read(topic, offset, count, bytes).await;
        }
        self.end = end_of(&runs);
        Ok(runs)
    }

    /// Waits for the piece at `offset` and has the one behind it read meanwhile. A piece that could
    /// not be read counts for nothing: it was asked for before its messages were, perhaps too early.
    async fn fetch(&mut self, offset: Offset) {
        if self.coming.as_ref().is_none_or(|(at, _)| *at != offset) {
            self.start(offset);
        }
        let Some((_, task)) = &mut self.coming else {
            return;
        };
        let piece = task.await;
        self.coming = None;
        if let Ok(Ok(Piece { runs, permit })) = piece {
            self.held = runs.into();
            self.paid = permit;
            if let Some(last) = self.held.back() {
                self.start(Offset(last.base.0 + u64::from(last.count)));
            }
        }
    }

    fn start(&mut self, offset: Offset) {
        let Some(permit) = self
            .memory
            .try_acquire(PIECE_BYTES, Class::Outbound, &self.share)
        else {
            return;
        };
        let (bodies, topic) = (self.bodies.clone(), self.topic);
        let read = async move {
            let runs = bodies
                .read_on(topic, offset, AHEAD_MESSAGES, AHEAD_BYTES)
                .await?;
            Ok(Piece {
                runs,
                permit: Some(permit),
            })
        };
        self.coming = Some((offset, tokio::spawn(read)));
    }

    /// The part of what is held from `offset` on.
    fn take(&mut self, offset: Offset, count: u32, bytes: usize) -> Vec<Run> {
        let (mut runs, mut next, mut left, mut room) = (Vec::new(), offset, count, bytes);
        while left > 0 && room > 0 {
            let Some(front) = self.held.front_mut().filter(|front| front.base == next) else {
                break;
            };
            let part = front.part(next, left, room);
            if !runs.is_empty() && part.messages.len() > room {
                break;
            }
            let taken = part.count;
            room = room.saturating_sub(part.messages.len());
            left -= taken;
            next = Offset(next.0 + u64::from(taken));
            if taken == front.count {
                self.held.pop_front();
            } else {
                front.drop_front(&part);
            }
            runs.push(part);
        }
        runs
    }

    fn forget(&mut self) {
        self.held.clear();
        self.paid = None;
        if let Some((_, task)) = self.coming.take() {
            task.abort();
        }
    }
}

impl<S: Storage> Drop for Ahead<S> {
    fn drop(&mut self) {
        self.forget();
    }
}

fn end_of(runs: &[Run]) -> Offset {
    runs.last()
        .map_or(Offset(0), |run| Offset(run.base.0 + u64::from(run.count)))
}
