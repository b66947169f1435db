//! A producer's stream: publishes in, acknowledgements and credit out.
//!
//! A publish is verified here, message by message, before the shard sees it. Memory for a frame is
//! taken from the budget before it is read; while there is none the stream is not read, and QUIC's
//! window slows the sender down.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use millpond_protocol::control::{OpenProducer, ProducerOpened, PublishRefused};
use millpond_protocol::frame::{Frame, FrameType};
use millpond_protocol::hot::{AckRow, Credit, Publish, PublishAck};
use millpond_protocol::limits::{MESSAGE_BYTES_MAX, PRODUCER_ID_BYTES_MAX};
use millpond_protocol::message::{MessageError, MessageView};
use millpond_protocol::{Epoch, ErrorCode, ProducerKey, Sequence, TopicId, WireError};
use millpond_wal::storage::Storage;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::connection::Peer;
use super::frames::{FrameReader, FrameWriter, StreamError};
use super::{Context, Pressure, Registered, random_u64};
use crate::memory::{Class, Permit, Share};
use crate::shard::io::{Input, Output, StreamId};

/// Messages that a producer may have unanswered when nothing presses.
const WINDOW_MESSAGES: u64 = 16_384;
/// Bytes that a producer may have unanswered when nothing presses. The memory budget, not this,
/// guards memory; under pressure the window still holds one message of the largest size.
const WINDOW_BYTES: u64 = 64 << 20;
/// The windows under pressure.
const PRESSED_MESSAGES: u64 = 256;
const PRESSED_BYTES: u64 = 2 * MESSAGE_BYTES_MAX as u64;
/// Answers of the shard that are put into one frame.
const COALESCE_MAX: usize = 1_024;
/// How long a frame may take to arrive once its memory is taken, when others want it. The largest
/// one comes in time at 8 MiB/s.
const ARRIVAL: Duration = Duration::from_secs(2);

const _: () = assert!(PRESSED_BYTES <= WINDOW_BYTES);

/// Runs one producer's stream to its end.
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
    let result = session(&context, &peer, &mut writer, reader, first, registered).await;
    context.unregister(id).await;
    writer.conclude(result, "producer").await;
}

struct Handle {
    topic: TopicId,
    producer: ProducerKey,
    epoch: Epoch,
}

async fn session<S: Storage>(
    context: &Context<S>,
    peer: &Peer,
    writer: &mut FrameWriter,
    reader: FrameReader,
    first: Frame,
    mut registered: Registered,
) -> Result<(), StreamError> {
    let open: OpenProducer = first.decode()?;
    if open
        .producer_id
        .as_ref()
        .is_some_and(|id| id.is_empty() || id.len() > PRODUCER_ID_BYTES_MAX)
    {
        let text = format!("a producer id has 1 to {PRODUCER_ID_BYTES_MAX} bytes");
        return Err(WireError::new(ErrorCode::InvalidName, text).into());
    }
    context
        .shard
        .input(Input::OpenProducer {
            stream: registered.id,
            open,
            owner: random_u64(),
        })
        .await?;
    let (handle, anonymous, opened) = match registered.outputs.recv().await {
        Some(Output::ProducerOpened {
            topic,
            producer,
            epoch,
            last_sequence,
            anonymous,
        }) => {
            let credit = Answered::default().credit(*context.pressure.borrow());
            let opened = ProducerOpened {
                topic,
                producer,
                epoch,
                last_sequence,
                credit,
            };
            (
                Handle {
                    topic,
                    producer,
                    epoch,
                },
                anonymous,
                opened,
            )
        }
        Some(Output::End(error)) => return Err(error.into()),
        _ => return Err(StreamError::Gone("the shard gave no answer".to_owned())),
    };
    writer
        .write_control(FrameType::ProducerOpened, &opened)
        .await?;
    let granted = Granted::new(opened.credit);
    let reading = read(context, peer, reader, &handle, registered.id, &granted);
    let own = registered.own.clone();
    let mut outputs = registered.outputs;
    let writing = write(context, writer, &mut outputs, &granted);
    let result = both(reading, own, writing).await;
    if anonymous && result.is_ok() {
        let input = Input::CloseProducer {
            producer: handle.producer,
            epoch: handle.epoch,
        };
        context.shard.input(input).await?;
    }
    result
}

/// Runs both directions. What ends reading is told by the writing side, behind what it already has.
pub(super) async fn both(
    reading: impl Future<Output = Result<(), StreamError>>,
    own: mpsc::UnboundedSender<Output>,
    writing: impl Future<Output = Result<(), StreamError>>,
) -> Result<(), StreamError> {
    tokio::pin!(writing);
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

/// What may have been received, in all, since the stream was opened.
struct Granted {
    messages: AtomicU64,
    bytes: AtomicU64,
}

impl Granted {
    fn new(credit: Credit) -> Self {
        Self {
            messages: AtomicU64::new(credit.max_messages),
            bytes: AtomicU64::new(credit.max_bytes),
        }
    }

    fn raise(&self, credit: Credit) {
        self.messages
            .fetch_max(credit.max_messages, Ordering::Relaxed);
        self.bytes.fetch_max(credit.max_bytes, Ordering::Relaxed);
    }

    fn covers(&self, messages: u64, bytes: u64) -> bool {
        messages <= self.messages.load(Ordering::Relaxed)
            && bytes <= self.bytes.load(Ordering::Relaxed)
    }
}

async fn read<S: Storage>(
    context: &Context<S>,
    peer: &Peer,
    mut reader: FrameReader,
    handle: &Handle,
    stream: StreamId,
    granted: &Granted,
) -> Result<(), StreamError> {
    let share = context.memory.topic(&peer.share, handle.topic);
    let (mut messages, mut bytes) = (0, 0);
    while let Some((_, length)) = reader.header_of(&[FrameType::Publish]).await? {
        let permit = room(context, length as u64, &share).await?;
        let Some(frame) = arrive(context, &mut reader, &share).await? else {
            break;
        };
        let publish = Publish::decode(&frame.body)?;
        messages += u64::from(publish.count);
        bytes += publish.messages.len() as u64;
        if !granted.covers(messages, bytes) {
            let text =
                "more was sent than the broker gave credit for; use a client that honours credit";
            return Err(WireError::new(ErrorCode::CreditOverrun, text).into());
        }
        verify(&publish)?;
        context
            .metrics
            .received(u64::from(publish.count), publish.messages.len() as u64);
        let input = Input::Publish {
            stream,
            topic: handle.topic,
            producer: handle.producer,
            epoch: handle.epoch,
            previous: publish.previous,
            count: publish.count,
            messages: publish.messages,
            keep: Some(permit),
        };
        context.shard.input(input).await?;
    }
    Ok(())
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
    share: &Share,
) -> Result<Option<Frame>, StreamError> {
    loop {
        // What has been read stays in the reader.
        match timeout(ARRIVAL, reader.next()).await {
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

/// What has been answered since the stream was opened.
#[derive(Default)]
struct Answered {
    messages: u64,
    bytes: u64,
}

impl Answered {
    fn credit(&self, pressure: Pressure) -> Credit {
        let (messages, bytes) = match pressure.reason {
            None => (WINDOW_MESSAGES, WINDOW_BYTES),
            Some(_) => (PRESSED_MESSAGES, PRESSED_BYTES),
        };
        Credit {
            max_messages: self.messages + messages,
            max_bytes: self.bytes + bytes,
        }
    }
}

async fn write<S: Storage>(
    context: &Context<S>,
    writer: &mut FrameWriter,
    outputs: &mut mpsc::UnboundedReceiver<Output>,
    granted: &Granted,
) -> Result<(), StreamError> {
    let mut pressure = context.pressure.clone();
    let mut answered = Answered::default();
    let mut rows: Vec<AckRow> = Vec::new();
    let mut frames = BytesMut::new();
    loop {
        let first = tokio::select! {
            output = outputs.recv() => output,
            // Credit that grows again must be told although nothing is answered.
            Ok(()) = pressure.changed() => None,
        };
        let mut next = first;
        for _ in 0..COALESCE_MAX {
            match next {
                Some(Output::Published {
                    rows: more,
                    messages,
                    bytes,
                }) => {
                    answered.messages += messages;
                    answered.bytes += bytes;
                    merge(&mut rows, more);
                }
                Some(Output::PublishRefused {
                    previous,
                    count,
                    bytes,
                    last_accepted,
                    error,
                }) => {
                    context.metrics.refused(error.code);
                    answered.messages += u64::from(count);
                    answered.bytes += bytes;
                    put_acks(context, &mut rows, &answered, granted, &mut frames);
                    put_refused(previous, count, last_accepted, error, &mut frames)?;
                }
                Some(Output::End(error)) => {
                    put_acks(context, &mut rows, &answered, granted, &mut frames);
                    writer.write(frames.split().freeze()).await?;
                    return Err(error.into());
                }
                Some(_) | None => break,
            }
            next = outputs.try_recv().ok();
        }
        put_acks(context, &mut rows, &answered, granted, &mut frames);
        writer.write(frames.split().freeze()).await?;
    }
}

/// Joins rows that continue one another: a batch of messages that one commit took.
fn merge(rows: &mut Vec<AckRow>, more: Vec<AckRow>) {
    for row in more {
        match rows.last_mut() {
            Some(last) if last.kind == row.kind && continues(last, &row) => {
                last.count += row.count;
                last.last_sequence = row.last_sequence;
            }
            _ => rows.push(row),
        }
    }
}

fn continues(last: &AckRow, row: &AckRow) -> bool {
    let unknown = row.kind == millpond_protocol::hot::AckKind::DuplicateUnknown;
    unknown || last.offset.0 + u64::from(last.count) == row.offset.0
}

fn put_acks<S: Storage>(
    context: &Context<S>,
    rows: &mut Vec<AckRow>,
    answered: &Answered,
    granted: &Granted,
    frames: &mut BytesMut,
) {
    let pressure = *context.pressure.borrow();
    let credit = answered.credit(pressure);
    granted.raise(credit);
    let ack = PublishAck {
        credit,
        pressure: pressure.reason,
        retry_after_ms: pressure.retry_after.as_millis() as u32,
        rows: std::mem::take(rows),
    };
    ack.encode(frames);
}

fn put_refused(
    previous: Sequence,
    count: u32,
    last_accepted: Sequence,
    error: WireError,
    frames: &mut BytesMut,
) -> Result<(), StreamError> {
    let refused = PublishRefused {
        previous,
        count,
        last_accepted,
        error,
    };
    let frame: Bytes = millpond_protocol::frame::encode(FrameType::PublishRefused, &refused)?;
    frames.extend_from_slice(&frame);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use millpond_protocol::{Message, Offset, hot::AckKind};

    fn batch(sequences: &[u64]) -> Publish {
        let mut messages = BytesMut::new();
        for &sequence in sequences {
            Message::new("x").encode(Sequence(sequence), &mut messages);
        }
        Publish {
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

    #[test]
    fn rows_that_continue_become_one() {
        let row = |offset, count| AckRow {
            last_sequence: Sequence(offset + u64::from(count)),
            offset: Offset(offset),
            count,
            kind: AckKind::Appended,
        };
        let mut rows = vec![row(0, 2)];
        merge(&mut rows, vec![row(2, 3), row(9, 1)]);
        assert_eq!(rows, [row(0, 5), row(9, 1)]);
    }

    #[test]
    fn credit_never_shrinks_below_what_one_message_needs() {
        let pressed = Pressure {
            reason: Some(ErrorCode::DiskLow),
            ..Pressure::default()
        };
        let credit = Answered::default().credit(pressed);
        assert!(credit.max_bytes >= MESSAGE_BYTES_MAX as u64 && credit.max_messages > 0);
    }
}
