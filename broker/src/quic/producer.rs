//! A publish stream: publishes of several producers in; what goes out is in `acknowledge.rs`.
//!
//! A publish is verified here, message by message, before the shard sees it. Memory for a frame is
//! taken from the budget before it is read; while there is none the stream is not read, and QUIC's
//! window slows the sender down. What is waited for is given back by the shard and never by this
//! stream, so waiting ends. Of a client that does not read what it is told little is taken in either
//! (`untold.rs`).
//!
//! Producers share the stream and nothing else: each has its own credit, and what one of them does
//! wrong ends that one (`ProducerEnded`). Only bytes that are no frame, a handle that was never given
//! out, and a frame that does not arrive end the stream, because what follows cannot be told apart.

mod acknowledge;
mod untold;

use std::sync::Arc;

use millpond_protocol::control::{CloseProducer, OpenProducer};
use millpond_protocol::frame::{Frame, FrameType};
use millpond_protocol::hot::{PUBLISH_FIXED, Publish};
use millpond_protocol::message::{MessageError, MessageView};
use millpond_protocol::{ErrorCode, ProducerHandle, WireError};
use millpond_wal::storage::Storage;
use parking_lot::Mutex;
use tokio::sync::Notify;

use self::untold::{Untold, answer_bytes};
use super::both::both;
use super::connection::Peer;
use super::frames::{FrameReader, FrameWriter, StreamError};
use super::inbound::{arrive, room};
use super::members::{Done, Members, Producer};
use super::{Context, Registered, inbound, random_u64};
use crate::mailbox;
use crate::memory::Permit;
use crate::shard::io::{Input, Output, StreamId};

/// What a client may send here.
const KINDS: [FrameType; 3] = [
    FrameType::Publish,
    FrameType::OpenProducer,
    FrameType::CloseProducer,
];

/// Runs one publish stream to its end.
pub async fn run<S: Storage>(
    context: Arc<Context<S>>,
    peer: Peer,
    mut writer: FrameWriter,
    reader: FrameReader,
    first: Frame,
) {
    let Ok(registered) = context.register().await else {
        return;
    };
    let id = registered.id;
    peer.windows.add_producer();
    let result = session(&context, &peer, &mut writer, reader, first, registered).await;
    peer.windows.remove_producer();
    context.unregister(id).await;
    writer.conclude(result, "publish").await;
}

async fn session<S: Storage>(
    context: &Context<S>,
    peer: &Peer,
    writer: &mut FrameWriter,
    reader: FrameReader,
    first: Frame,
    registered: Registered,
) -> Result<(), StreamError> {
    let Registered {
        id,
        mut outputs,
        own,
    } = registered;
    let session = Session {
        context,
        peer,
        id,
        own: own.clone(),
        members: Mutex::default(),
        opened: Notify::new(),
        untold: Untold::default(),
    };
    let reading = session.read(reader, first);
    let writing = session.write(writer, &mut outputs);
    both(reading, own, writing).await
}

/// What reading and writing share.
struct Session<'a, S: Storage> {
    context: &'a Context<S>,
    peer: &'a Peer,
    id: StreamId,
    own: mailbox::Sender<Output>,
    members: Mutex<Members>,
    /// The shard has answered an opening.
    opened: Notify,
    untold: Untold,
}

impl<S: Storage> Session<'_, S> {
    async fn read(&self, mut reader: FrameReader, first: Frame) -> Result<(), StreamError> {
        self.open(&first).await?;
        loop {
            self.may_read().await?;
            let Some((kind, length)) = reader.header_of(&KINDS).await? else {
                break;
            };
            if kind == FrameType::Publish {
                self.publish(&mut reader, length).await?;
                continue;
            }
            let share = &self.peer.share;
            let taken = inbound::take(self.context, &mut reader, share, &KINDS).await?;
            let Some((frame, _permit)) = taken else {
                break;
            };
            match kind {
                FrameType::OpenProducer => self.open(&frame).await?,
                _ => self.close(&frame).await?,
            }
        }
        let left = self.members.lock().leave_all();
        for done in left {
            self.let_go(Some(done)).await?;
        }
        // Those that are being opened are let go by the writing side.
        loop {
            let opened = self.opened.notified();
            if !self.members.lock().is_opening() {
                return Ok(());
            }
            opened.await;
        }
    }

    /// Waits while much has not been told, and takes memory for that.
    async fn may_read(&self) -> Result<(), WireError> {
        self.untold.few().await;
        while self.untold.is_unpaid() {
            let step = room(self.context, untold::STEP_BYTES, &self.peer.share);
            self.untold.pay(Box::pin(step).await?);
        }
        Ok(())
    }

    async fn open(&self, frame: &Frame) -> Result<(), StreamError> {
        let open: OpenProducer = frame.decode()?;
        let begun = self.members.lock().begin(&open)?;
        if let Err(error) = begun {
            self.tell_end(open.handle, Some(error));
            return Ok(());
        }
        let input = Input::OpenProducer {
            stream: self.id,
            open,
            owner: random_u64(),
        };
        self.untold.owe(answer_bytes(0));
        Ok(self.context.shard.input(input).await?)
    }

    async fn close(&self, frame: &Frame) -> Result<(), StreamError> {
        let CloseProducer { handle, leaving } = frame.decode()?;
        let left = self.members.lock().leave(handle, leaving)?;
        if let Some(done) = left {
            self.tell_end(handle, None);
            self.let_go(done).await?;
        }
        Ok(())
    }

    /// The publish whose header is there.
    async fn publish(&self, reader: &mut FrameReader, length: usize) -> Result<(), StreamError> {
        let handle = Publish::peek_handle(reader.beginning(PUBLISH_FIXED).await?)?;
        let sender = self.members.lock().sender(handle)?;
        let taken = match sender {
            None => return reader.skip().await,
            Some(Ok(producer)) => {
                let share = &producer.share;
                let permit = room(self.context, length as u64, share).await;
                permit.map(|permit| (producer, permit))
            }
            Some(Err(error)) => Err(error),
        };
        let (producer, permit) = match taken {
            Ok(taken) => taken,
            Err(error) => {
                self.end(handle, error);
                return reader.skip().await;
            }
        };
        let Some(frame) = arrive(self.context, reader, length as u64, &producer.share).await?
        else {
            return Ok(());
        };
        let publish = Publish::decode(&frame.body)?;
        match self.check(&publish) {
            Ok(()) => self.pass_on(producer, publish, permit).await,
            Err(error) => {
                self.end(handle, error);
                Ok(())
            }
        }
    }

    fn check(&self, publish: &Publish) -> Result<(), WireError> {
        let (messages, bytes) = (u64::from(publish.count), publish.messages.len() as u64);
        let mut members = self.members.lock();
        members.receive(publish.handle, messages, bytes)?;
        drop(members);
        verify(publish)?;
        self.context.metrics.received(messages, bytes);
        Ok(())
    }

    async fn pass_on(
        &self,
        producer: Arc<Producer>,
        publish: Publish,
        permit: Permit,
    ) -> Result<(), StreamError> {
        self.untold.owe(answer_bytes(u64::from(publish.count)));
        let input = Input::Publish {
            stream: self.id,
            handle: publish.handle,
            topic: producer.topic,
            producer: producer.producer,
            epoch: producer.epoch,
            previous: publish.previous,
            count: publish.count,
            messages: publish.messages,
            keep: Some(permit),
        };
        Ok(self.context.shard.input(input).await?)
    }

    /// Ends one producer; its client is told behind what is answered already.
    fn end(&self, handle: ProducerHandle, error: WireError) {
        let told = self.members.lock().end(handle, error);
        if told.is_some() {
            self.tell_end(handle, told);
        }
    }

    fn tell_end(&self, handle: ProducerHandle, error: Option<WireError>) {
        self.untold.owe(answer_bytes(0));
        // The writing side is there as long as the reading side.
        self.own.send(Output::ProducerEnded { handle, error });
    }

    async fn let_go(&self, done: Option<Done>) -> Result<(), StreamError> {
        if let Some(Done { producer, epoch }) = done {
            let input = Input::CloseProducer { producer, epoch };
            self.context.shard.input(input).await?;
        }
        Ok(())
    }
}

/// Checks every message of a batch, that their sequences rise, and that nothing is left over.
fn verify(publish: &Publish) -> Result<(), WireError> {
    let mut rest: &[u8] = &publish.messages;
    let mut last = publish.previous;
    for _ in 0..publish.count {
        let (view, behind) = MessageView::split(rest).map_err(refused)?;
        view.verify().map_err(refused)?;
        if view.sequence() <= last {
            let text = format!(
                "sequence {} does not follow {last}: a producer's sequences rise",
                view.sequence()
            );
            return Err(WireError::new(ErrorCode::Malformed, text));
        }
        (last, rest) = (view.sequence(), behind);
    }
    if rest.is_empty() {
        Ok(())
    } else {
        Err(WireError::new(
            ErrorCode::Malformed,
            "bytes are left over behind the last message of a batch",
        ))
    }
}

fn refused(error: MessageError) -> WireError {
    let code = match error {
        MessageError::ReservedHeader(_) => ErrorCode::ReservedHeader,
        MessageError::TooLong(_)
        | MessageError::PayloadTooLong(_)
        | MessageError::KeyTooLong(_)
        | MessageError::HeadersTooLong { .. } => ErrorCode::TooLarge,
        _ => ErrorCode::Malformed,
    };
    WireError::new(code, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use millpond_protocol::{Message, Sequence};

    fn batch(sequences: &[u64]) -> Publish {
        let mut messages = BytesMut::new();
        for &sequence in sequences {
            Message::new("x").encode(Sequence(sequence), &mut messages);
        }
        Publish {
            handle: ProducerHandle(1),
            previous: Sequence(4),
            count: sequences.len() as u32,
            messages: messages.freeze(),
        }
    }

    #[test]
    fn sequences_must_rise_above_the_previous_one() {
        assert_eq!(verify(&batch(&[5, 9])), Ok(()));
        assert_eq!(verify(&batch(&[4])).unwrap_err().code, ErrorCode::Malformed);
        assert_eq!(
            verify(&batch(&[6, 6])).unwrap_err().code,
            ErrorCode::Malformed
        );
    }

    #[test]
    fn bytes_behind_the_last_message_are_refused() {
        let mut publish = batch(&[5, 6]);
        publish.count = 1;
        assert_eq!(verify(&publish).unwrap_err().code, ErrorCode::Malformed);
    }
}
