//! A publish stream: publishes of several producers in, acknowledgements and credit out.
//!
//! A publish is verified here, message by message, before the shard sees it. Memory for a frame is
//! taken from the budget before it is read; while there is none the stream is not read, and QUIC's
//! window slows the sender down. What is waited for is given back by the shard and never by this
//! stream, so waiting ends.
//!
//! Producers share the stream and nothing else: each has its own credit, and what one of them does
//! wrong ends that one (`ProducerEnded`). Only bytes that are no frame, a handle that was never given
//! out, and a frame that does not arrive end the stream, because what follows cannot be told apart.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use millpond_protocol::control::{CloseProducer, OpenProducer, ProducerEnded, PublishRefused};
use millpond_protocol::frame::{Frame, FrameError, FrameType, encode};
use millpond_protocol::hot::{PUBLISH_FIXED, Publish};
use millpond_protocol::message::{MessageError, MessageView};
use millpond_protocol::{ErrorCode, ProducerHandle, WireError};
use millpond_wal::storage::Storage;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

use super::connection::Peer;
use super::frames::{FrameReader, FrameWriter, StreamError};
use super::members::{Done, Members, Producer, Welcome};
use super::{Context, Pressure, Registered, inbound, random_u64};
use crate::memory::{Class, Permit, Share};
use crate::shard::io::{Input, Output, StreamId};

/// What a client may send here.
const KINDS: [FrameType; 3] = [
    FrameType::Publish,
    FrameType::OpenProducer,
    FrameType::CloseProducer,
];
/// Answers of the shard that are put into one write.
const COALESCE_MAX: usize = 1_024;
/// How long a frame may take to arrive once its memory is taken, when others want it: this, and a second
/// for so many bytes.
const ARRIVAL: Duration = Duration::from_millis(500);
const ARRIVAL_BYTES_PER_SECOND: u64 = 8 << 20;

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
    };
    let reading = session.read(reader, first);
    let writing = session.write(writer, &mut outputs);
    both(reading, own, writing).await
}

/// Runs both directions. What ends reading is told by the writing side, behind what it already has.
///
/// Boxed before anything is awaited: a future keeps what it was given by value beside what it made of it,
/// and thousands of streams are idle.
pub(super) fn both(
    reading: impl Future<Output = Result<(), StreamError>>,
    own: mpsc::UnboundedSender<Output>,
    writing: impl Future<Output = Result<(), StreamError>>,
) -> impl Future<Output = Result<(), StreamError>> {
    let (reading, mut writing) = (Box::pin(reading), Box::pin(writing));
    async move {
        let read = tokio::select! {
            read = reading => read,
            written = &mut writing => return written,
        };
        match read {
            Ok(()) => Ok(()),
            Err(StreamError::Refused(error)) => {
                // The writing side is there: it is polled below.
                let _ = own.send(Output::End(error));
                drop(own);
                writing.await
            }
            Err(error) => Err(error),
        }
    }
}

/// What reading and writing share.
struct Session<'a, S: Storage> {
    context: &'a Context<S>,
    peer: &'a Peer,
    id: StreamId,
    own: mpsc::UnboundedSender<Output>,
    members: Mutex<Members>,
    /// The shard has answered an opening.
    opened: Notify,
}

impl<S: Storage> Session<'_, S> {
    async fn read(&self, mut reader: FrameReader, first: Frame) -> Result<(), StreamError> {
        self.open(&first).await?;
        while let Some((kind, length)) = reader.header_of(&KINDS).await? {
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
        // The writing side is there as long as the reading side.
        let _ = self.own.send(Output::ProducerEnded { handle, error });
    }

    async fn let_go(&self, done: Option<Done>) -> Result<(), StreamError> {
        if let Some(Done { producer, epoch }) = done {
            let input = Input::CloseProducer { producer, epoch };
            self.context.shard.input(input).await?;
        }
        Ok(())
    }

    async fn write(
        &self,
        writer: &mut FrameWriter,
        outputs: &mut mpsc::UnboundedReceiver<Output>,
    ) -> Result<(), StreamError> {
        let mut pressure = self.context.pressure.clone();
        let mut round = Round::default();
        loop {
            let first = tokio::select! {
                output = outputs.recv() => output,
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
                    outputs.try_recv().ok()
                } else {
                    None
                };
            }
            round.put_acks(&mut self.members.lock());
            if !round.frames.is_empty() {
                writer.write(round.frames.split().freeze()).await?;
            }
            if let Some(error) = end {
                return Err(error.into());
            }
        }
    }

    async fn take(&self, output: Output, round: &mut Round) -> Result<(), StreamError> {
        match output {
            Output::Published {
                handle,
                rows,
                messages,
                bytes,
            } => {
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

/// Memory for a frame, waited for if need be.
pub(super) async fn room<S: Storage>(
    context: &Context<S>,
    bytes: u64,
    share: &Share,
) -> Result<Permit, WireError> {
    if let Some(permit) = context.memory.try_acquire(bytes, Class::Inbound, share) {
        return Ok(permit);
    }
    let began = tokio::time::Instant::now();
    let permit = context.memory.acquire(bytes, Class::Inbound, share).await;
    context
        .metrics
        .observe_credit_wait(ErrorCode::Memory, began.elapsed());
    Ok(permit?)
}

/// The frame whose header is there and whose memory is taken. While others wait for memory, it may
/// not keep its own without filling it.
pub(super) async fn arrive<S: Storage>(
    context: &Context<S>,
    reader: &mut FrameReader,
    bytes: u64,
    share: &Share,
) -> Result<Option<Frame>, StreamError> {
    let in_time = ARRIVAL + Duration::from_millis(bytes * 1_000 / ARRIVAL_BYTES_PER_SECOND);
    loop {
        // What has been read stays in the reader.
        match timeout(in_time, reader.next()).await {
            Ok(frame) => return frame,
            Err(_) if !context.memory.is_wanted(share) => {}
            Err(_) => {
                let text = "a frame did not arrive in time while others waited for the memory that was kept for it; send it again";
                return Err(WireError::new(ErrorCode::Memory, text).into());
            }
        }
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
