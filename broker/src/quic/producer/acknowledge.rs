//! A publish stream, outwards: what the shard answered, coalesced into one write.
//!
//! Each producer with something to be told gets one acknowledgement with fresh credit; refusals and ends
//! go behind what was accepted before them.

use bytes::{Bytes, BytesMut};
use millpond_protocol::control::{ProducerEnded, PublishRefused};
use millpond_protocol::frame::{FrameError, FrameType, encode};
use millpond_protocol::{ErrorCode, ProducerHandle};
use millpond_wal::storage::Storage;

use super::super::Pressure;
use super::super::consumer::{DEPARTURE, STALLED_MAX, departs};
use super::super::frames::{FrameWriter, StreamError};
use super::super::members::{Members, Producer, Welcome};
use super::Session;
use super::untold::answer_bytes;
use crate::mailbox::Mailbox;
use crate::shard::io::Output;

/// Answers of the shard that are put into one write.
const COALESCE_MAX: usize = 1_024;

impl<S: Storage> Session<'_, S> {
    pub(super) async fn write(
        &self,
        writer: &mut FrameWriter,
        outputs: &mut Mailbox<Output>,
    ) -> Result<(), StreamError> {
        let mut pressure = self.context.pressure.clone();
        let mut round = Round::default();
        loop {
            let first = tokio::select! {
                output = outputs.recv() => Some(output),
                // Credit that grows again must be told although nothing is answered.
                Ok(()) = pressure.changed() => None,
            };
            round.pressure = *self.context.pressure.borrow();
            if first.is_none() {
                round.touched.extend(self.members.lock().handles());
            }
            let mut next = first;
            let mut end = None;
            for nth in 1..=COALESCE_MAX {
                match next {
                    Some(Output::End(error)) => end = Some(error),
                    Some(output) => self.take(output, &mut round).await?,
                    None => break,
                }
                // What is received is taken: at the bound there is no next one.
                next = if end.is_none() && nth < COALESCE_MAX {
                    outputs.try_recv()
                } else {
                    None
                };
            }
            round.put_acks(&mut self.members.lock());
            if !round.frames.is_empty() {
                self.peer.windows.answers(round.frames.len());
                let frames = round.frames.split().freeze();
                // Boxed, because an idle stream would keep the size of this.
                Box::pin(self.write_in_time(writer, frames)).await?;
            }
            self.untold.told(std::mem::take(&mut round.told));
            if let Some(error) = end {
                return Err(error.into());
            }
        }
    }

    /// While others wait for memory, a peer may not keep that of its answers by not reading them.
    async fn write_in_time(
        &self,
        writer: &mut FrameWriter,
        frames: Bytes,
    ) -> Result<(), StreamError> {
        let writing = writer.write(frames);
        let is_wanted = || self.context.memory.is_wanted(&self.peer.share);
        if let Some(written) = departs(writing, DEPARTURE, STALLED_MAX, is_wanted).await {
            return written;
        }
        writer.reset(ErrorCode::Memory);
        let text = "it did not read in time what became of its publishes";
        Err(StreamError::Gone(text.to_owned()))
    }

    async fn take(&self, output: Output, round: &mut Round) -> Result<(), StreamError> {
        match output {
            Output::Published {
                handle,
                rows,
                messages,
                bytes,
            } => {
                round.told += answer_bytes(messages);
                let mut members = self.members.lock();
                if members.answered(handle, messages, bytes, rows) {
                    round.touched.push(handle);
                }
            }
            Output::PublishRefused {
                handle,
                previous,
                count,
                bytes,
                last_accepted,
                error,
            } => {
                round.told += answer_bytes(u64::from(count));
                self.context.metrics.refused(error.code);
                let refused = PublishRefused {
                    handle,
                    previous,
                    count,
                    last_accepted,
                    error,
                };
                let mut members = self.members.lock();
                if members.answered(handle, u64::from(count), bytes, Vec::new()) {
                    // What was accepted before it is told before it.
                    members.put_ack(handle, round.pressure, &mut round.frames);
                    round.put(FrameType::PublishRefused, &refused)?;
                }
            }
            Output::ProducerOpened {
                handle,
                topic,
                producer,
                epoch,
                last_sequence,
                ..
            } => {
                round.told += answer_bytes(0);
                let of = Producer {
                    topic,
                    producer,
                    epoch,
                    share: self.context.memory.topic(&self.peer.share, topic),
                };
                let welcome = self
                    .members
                    .lock()
                    .opened(handle, of, last_sequence, round.pressure);
                match welcome {
                    Some(Welcome::Open(opened)) => {
                        round.put(FrameType::ProducerOpened, &opened)?;
                    }
                    Some(Welcome::Left(done, error)) => {
                        self.let_go(done).await?;
                        let ended = ProducerEnded { handle, error };
                        round.put(FrameType::ProducerEnded, &ended)?;
                    }
                    None => {}
                }
                self.opened.notify_one();
            }
            Output::ProducerEnded { handle, error } => {
                round.told += answer_bytes(0);
                let mut members = self.members.lock();
                members.put_ack(handle, round.pressure, &mut round.frames);
                members.forget(handle);
                drop(members);
                round.put(FrameType::ProducerEnded, &ProducerEnded { handle, error })?;
                self.opened.notify_one();
            }
            _ => {}
        }
        Ok(())
    }
}

/// What one write tells.
#[derive(Default)]
struct Round {
    pressure: Pressure,
    /// Who has something to be told by an acknowledgement; perhaps more than once.
    touched: Vec<ProducerHandle>,
    frames: BytesMut,
    /// What the answers among it took.
    told: u64,
}

impl Round {
    fn put<T: serde::Serialize>(&mut self, kind: FrameType, value: &T) -> Result<(), FrameError> {
        let frame: Bytes = encode(kind, value)?;
        self.frames.extend_from_slice(&frame);
        Ok(())
    }

    /// One acknowledgement for each who has something to be told.
    fn put_acks(&mut self, members: &mut Members) {
        self.touched.sort_unstable();
        self.touched.dedup();
        for handle in self.touched.drain(..) {
            members.put_ack(handle, self.pressure, &mut self.frames);
        }
    }
}
