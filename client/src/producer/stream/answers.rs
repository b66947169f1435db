//! A publish stream, inwards: which producer an answer is for, and what it means for its place.

use std::sync::Arc;

use millpond_protocol::control::{ProducerEnded, ProducerOpened, PublishRefused};
use millpond_protocol::frame::{Frame, FrameError, FrameType};
use millpond_protocol::hot::PublishAck;
use millpond_protocol::{ProducerHandle, WireError};

use super::super::core::Core;
use super::super::pipeline::Verdict;
use super::{Lost, Member, PublishStream};
use crate::error::Error;
use crate::io::{FrameReader, StreamEnd};

impl PublishStream {
    pub(super) async fn read(&self, reader: &mut FrameReader) -> StreamEnd {
        loop {
            let taken = match reader.next().await {
                Ok(frame) => self.take_in(&frame),
                Err(end) => Err(end),
            };
            if let Err(end) = taken {
                return end;
            }
        }
    }

    fn take_in(&self, frame: &Frame) -> Result<(), StreamEnd> {
        match frame.kind {
            FrameType::PublishAck => {
                let ack = PublishAck::decode(&frame.body)?;
                if let Some(core) = self.core(ack.handle)? {
                    let acked = core.acked(self, ack.handle, &ack);
                    self.judge(ack.handle, acked.map(|()| Verdict::Fine));
                }
            }
            FrameType::PublishRefused => {
                let refused: PublishRefused = frame.decode()?;
                if let Some(core) = self.core(refused.handle)? {
                    let verdict = core.refused(self, refused.handle, &refused);
                    self.judge(refused.handle, verdict);
                }
            }
            FrameType::ProducerOpened => {
                let opened: ProducerOpened = frame.decode()?;
                let mut state = self.state.lock();
                let member = state.members.get_mut(&opened.handle);
                if let Some(tell) = member.and_then(|member| member.opening.take()) {
                    // Who gave up waiting leaves by dropping the seat.
                    let _ = tell.send(Ok(opened));
                }
            }
            FrameType::ProducerEnded => {
                let ProducerEnded { handle, error } = frame.decode()?;
                let member = self.state.lock().members.remove(&handle);
                if let Some(member) = member {
                    member.end(error);
                }
            }
            found => return Err(FrameError::Unexpected { found }.into()),
        }
        Ok(())
    }

    /// Who has this handle; `None` if it has left, or has not begun.
    fn core(&self, handle: ProducerHandle) -> Result<Option<Arc<Core>>, StreamEnd> {
        let state = self.state.lock();
        if handle > state.highest {
            return Err(StreamEnd::Malformed(
                "it answered a producer that was never opened".to_owned(),
            ));
        }
        let member = state.members.get(&handle);
        Ok(member.and_then(|member| member.core.clone()))
    }

    /// What an answer means for its producer.
    fn judge(&self, handle: ProducerHandle, verdict: Result<Verdict, String>) {
        let ended = match verdict {
            Ok(Verdict::Fine) => return,
            Ok(Verdict::Reopen) => Lost::Again,
            Ok(Verdict::Fatal(error)) => Lost::Fatal(error),
            Err(what) => {
                tracing::warn!(what, "the broker broke the protocol");
                Lost::Again
            }
        };
        let mut state = self.state.lock();
        let member = state.members.get_mut(&handle);
        if let Some(tell) = member.and_then(|member| member.ended.take()) {
            // Who has left already need not know.
            let _ = tell.send(ended);
        }
    }
}

impl Member {
    /// The broker has ended it: only what ends the producer is fatal; the rest is tried again.
    fn end(self, error: Option<WireError>) {
        // Who has left already need not know.
        if let Some(tell) = self.opening {
            if let Some(error) = error {
                let _ = tell.send(Err(error));
            }
            return;
        }
        let ended = match error.map(Error::from) {
            None => Lost::Again,
            Some(Error::Fenced) => Lost::Fatal(Error::Fenced),
            Some(error) => {
                tracing::info!(%error, "the broker ended a producer");
                Lost::Again
            }
        };
        if let Some(tell) = self.ended {
            let _ = tell.send(ended);
        }
    }
}
