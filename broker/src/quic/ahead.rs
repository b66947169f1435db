//! Reading ahead of one consumer: while frames are being sent, the next bodies come off the disk.
//!
//! Only for who reads one topic in offset order and misses the cache of recent bodies; retries and
//! consumers at the tail read what they need and no more. A disk gives its best when it is asked for
//! several pieces at once, so up to `PIECES_MAX` are read or held beyond the one that is being sent. Each is
//! paid for from the memory budget; where there is no memory, nothing is read ahead.

use std::collections::VecDeque;
use std::sync::Arc;

use millpond_protocol::{Offset, TopicId};
use millpond_wal::storage::Storage;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use crate::bodies::piece::{self, Piece};
use crate::bodies::{Bodies, BodyError, Run};
use crate::memory::{Class, MemoryBudget, Permit, Share};

/// Pieces that are being read or wait to be sent.
const PIECES_MAX: usize = 3;
/// Pieces that are read before it is looked at anew how large messages are.
const PIECES_IN_ALL: usize = 64;

/// One consumer's reading position and what has been read beyond it.
pub struct Ahead<S: Storage> {
    bodies: Bodies<S>,
    memory: MemoryBudget,
    share: Share,
    topic: TopicId,
    /// The end of the last read: who asks for it reads on.
    end: Offset,
    /// About what a message has, by the last read.
    message_bytes: usize,
    held: VecDeque<Run>,
    /// Pays for what is held.
    paid: Option<Arc<Permit>>,
    /// The pieces behind it, in order.
    coming: Option<mpsc::Receiver<Coming>>,
}

/// A piece that is being read, and the offset it begins with.
type Coming = (Offset, AbortOnDropHandle<Result<Piece, BodyError>>);

impl<S: Storage> Ahead<S> {
    pub fn new(bodies: Bodies<S>, memory: MemoryBudget, share: Share) -> Self {
        Self {
            bodies,
            memory,
            share,
            topic: TopicId(0),
            end: Offset(0),
            message_bytes: 0,
            held: VecDeque::new(),
            paid: None,
            coming: None,
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
            // What is read ahead of there is stale.
            self.forget();
            self.topic = topic;
            self.took(&runs);
            return Ok(runs);
        }
        let reads_on = topic == self.topic && offset == self.end;
        if !reads_on {
            self.forget();
            let runs = self.bodies.read(topic, offset, count, bytes).await?;
            self.topic = topic;
            self.took(&runs);
            return Ok(runs);
        }
        if self.held.is_empty() {
            self.fetch(offset).await;
        }
        let runs = self.take(offset, count, bytes);
        if runs.is_empty() {
            self.forget();
            let runs = self.bodies.read(topic, offset, count, bytes).await?;
            self.took(&runs);
            return Ok(runs);
        }
        self.took(&runs);
        Ok(runs)
    }

    fn took(&mut self, runs: &[Run]) {
        let Some(last) = runs.last() else { return };
        self.end = last.end();
        self.message_bytes = last.messages.len() / (last.count as usize).max(1);
    }

    /// Waits for the piece at `offset`. One that could not be read counts for nothing: it was asked for
    /// before its messages were, perhaps too early.
    async fn fetch(&mut self, offset: Offset) {
        let coming = self.coming.get_or_insert_with(|| {
            let (pieces, coming) = mpsc::channel(PIECES_MAX - 1);
            let next = Reading {
                bodies: self.bodies.clone(),
                memory: self.memory.clone(),
                share: self.share.clone(),
                topic: self.topic,
                message_bytes: self.message_bytes,
                pieces,
            };
            tokio::spawn(next.on_from(offset));
            coming
        });
        let piece = match coming.recv().await {
            Some((at, task)) if at == offset => task.await,
            _ => {
                self.coming = None;
                return;
            }
        };
        match piece {
            Ok(Ok(Piece { runs, paid })) => {
                self.held = runs.into();
                self.paid = Some(paid);
            }
            _ => self.coming = None,
        }
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
            if taken == 0 {
                break;
            }
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

    /// Whether memory is held for what may be wanted next.
    pub fn holds(&self) -> bool {
        self.paid.is_some() || self.coming.is_some()
    }

    /// Gives that memory up; what was read is read again if it is wanted.
    pub fn forget(&mut self) {
        self.held.clear();
        self.paid = None;
        self.coming = None;
    }
}

/// Has one piece read after the other, until nobody takes them, one cannot be read or memory is short.
struct Reading<S: Storage> {
    bodies: Bodies<S>,
    memory: MemoryBudget,
    share: Share,
    topic: TopicId,
    message_bytes: usize,
    pieces: mpsc::Sender<Coming>,
}

impl<S: Storage> Reading<S> {
    async fn on_from(self, mut offset: Offset) {
        for _ in 0..PIECES_IN_ALL {
            let Ok(slot) = self.pieces.reserve().await else {
                return;
            };
            let bytes = piece::BYTES_MAX as u64;
            let paid = self.memory.try_acquire(bytes, Class::Outbound, &self.share);
            let Some(paid) = paid.map(Arc::new) else {
                return;
            };
            let (tell_end, end) = oneshot::channel();
            let (bodies, topic, message_bytes) =
                (self.bodies.clone(), self.topic, self.message_bytes);
            let read = async move {
                let wanted = piece::Wanted {
                    topic,
                    offset,
                    message_bytes,
                };
                bodies.read_on(wanted, paid, tell_end).await
            };
            slot.send((offset, AbortOnDropHandle::new(tokio::spawn(read))));
            match end.await {
                Ok(end) => offset = end,
                Err(_) => return,
            }
        }
    }
}
