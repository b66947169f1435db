//! The hot frames: publishes, their acknowledgements, deliveries, acks, credit. Fixed layouts.
//!
//! ```text
//! Publish        0 u64 previous | 8 u32 count | 12 u32 handle | 16 messages
//! PublishAck     0 u64 max_messages | 8 u64 max_bytes | 16 u32 handle | 20 u16 pressure | 22 u16 zero
//!                24 u32 retry_after_ms | 28 u32 zero
//!                32 rows of 24: u64 last_sequence, u64 offset, u32 count, u32 kind
//! ConsumerCredit 0 u64 max_messages | 8 u64 max_bytes | 16 u64 begun
//! Deliver        0 u32 runs | 4 u32 messages | 8 what `DeliverHead` tells | messages
//! Acks           0 u32 count | 4 u32 zero | 8 rows of 16: u64 offset, u32 delivery, u32 run
//! Commit         0 u64 next offset
//! ```
//!
//! Credit is cumulative since the producer or the delivery stream was opened: messages and bytes that
//! may have been sent in all, so that a repeated or late grant does no harm. Answers come in the order
//! of the questions; on a publish stream that holds for each producer by itself.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::ErrorCode;
use crate::frame::{FrameError, FrameType, HEADER_BYTES, header};
use crate::ids::{Delivery, Offset, ProducerHandle, Sequence, Stamp};
use crate::limits::{
    BATCH_MESSAGES_MAX, DELIVER_MESSAGES_MAX, FRAME_BYTES_MAX, SETTLE_OFFSETS_MAX, SETTLE_ROWS_MAX,
};

/// A batch of messages whose sequences rise, and the sequence accepted before them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    pub handle: ProducerHandle,
    /// The last sequence sent before this batch; 0 if none ever was.
    pub previous: Sequence,
    pub count: u32,
    /// The messages, one behind the other. Not yet verified.
    pub messages: Bytes,
}

/// Bytes of a publish frame before its messages, without the frame header.
pub const PUBLISH_FIXED: usize = 16;

impl Publish {
    /// The fixed part with its frame header, to be followed by `messages_bytes` of messages.
    #[must_use]
    pub fn prefix(
        handle: ProducerHandle,
        previous: Sequence,
        count: u32,
        messages_bytes: usize,
    ) -> [u8; HEADER_BYTES + PUBLISH_FIXED] {
        let mut out = [0; HEADER_BYTES + PUBLISH_FIXED];
        out[..8].copy_from_slice(&header(FrameType::Publish, PUBLISH_FIXED + messages_bytes));
        out[8..16].copy_from_slice(&previous.0.to_le_bytes());
        out[16..20].copy_from_slice(&count.to_le_bytes());
        out[20..24].copy_from_slice(&handle.0.to_le_bytes());
        out
    }

    /// Whose publish this is, from the beginning of its body.
    pub fn peek_handle(body: &[u8]) -> Result<ProducerHandle, FrameError> {
        let (fixed, _) = prefix_of::<PublishFixed>(body)?;
        Ok(ProducerHandle(fixed.handle.get()))
    }

    /// Reads the fixed part; the messages are checked by whoever walks them.
    pub fn decode(body: &Bytes) -> Result<Self, FrameError> {
        let (fixed, _) = prefix_of::<PublishFixed>(body)?;
        let count = fixed.count.get();
        if count == 0 || count > BATCH_MESSAGES_MAX {
            return Err(FrameError::Body("a publish has 1 to 4,096 messages"));
        }
        Ok(Self {
            handle: ProducerHandle(fixed.handle.get()),
            previous: Sequence(fixed.previous.get()),
            count,
            messages: body.slice(PUBLISH_FIXED..),
        })
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct PublishFixed {
    previous: U64,
    count: U32,
    handle: U32,
}

/// What became of the next `count` messages of a producer.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct AckRow {
    /// The sequence of the last of them.
    pub last_sequence: Sequence,
    /// The offset of the first of them; they are consecutive. Meaningless for `DuplicateUnknown`.
    pub offset: Offset,
    pub count: u32,
    pub kind: AckKind,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum AckKind {
    /// Appended and durable.
    Appended,
    /// Was there already; the offset is the original one.
    Duplicate,
    /// Was there already, too long ago to tell the offset.
    DuplicateUnknown,
}

/// Acknowledgements and credit for a producer. Zero rows: credit only.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct PublishAck {
    pub handle: ProducerHandle,
    pub credit: Credit,
    /// Why credit is short, if it is.
    pub pressure: Option<ErrorCode>,
    pub retry_after_ms: u32,
    pub rows: Vec<AckRow>,
}

/// How much may have been sent since the producer or the delivery stream was opened, in all.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Credit {
    pub max_messages: u64,
    pub max_bytes: u64,
}

impl PublishAck {
    /// Appends the whole frame to `out`.
    pub fn encode(&self, out: &mut BytesMut) {
        out.put_slice(&header(FrameType::PublishAck, 32 + 24 * self.rows.len()));
        out.put_u64_le(self.credit.max_messages);
        out.put_u64_le(self.credit.max_bytes);
        out.put_u32_le(self.handle.0);
        out.put_u16_le(self.pressure.map_or(0, u16::from));
        out.put_u16_le(0);
        out.put_u32_le(self.retry_after_ms);
        out.put_u32_le(0);
        for row in &self.rows {
            out.put_u64_le(row.last_sequence.0);
            out.put_u64_le(row.offset.0);
            out.put_u32_le(row.count);
            out.put_u32_le(row.kind as u32);
        }
    }

    pub fn decode(body: &[u8]) -> Result<Self, FrameError> {
        let (fixed, rest) = prefix_of::<AckFixed>(body)?;
        let rows = rows_of::<AckRowRaw>(rest)?;
        let pressure = fixed.pressure.get();
        Ok(Self {
            handle: ProducerHandle(fixed.handle.get()),
            credit: Credit {
                max_messages: fixed.max_messages.get(),
                max_bytes: fixed.max_bytes.get(),
            },
            pressure: (pressure != 0).then(|| ErrorCode::from(pressure)),
            retry_after_ms: fixed.retry_after_ms.get(),
            rows: rows.iter().map(AckRowRaw::row).collect::<Result<_, _>>()?,
        })
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct AckFixed {
    max_messages: U64,
    max_bytes: U64,
    handle: U32,
    pressure: U16,
    zero: U16,
    retry_after_ms: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct AckRowRaw {
    last_sequence: U64,
    offset: U64,
    count: U32,
    kind: U32,
}

impl AckRowRaw {
    fn row(&self) -> Result<AckRow, FrameError> {
        let kind = match self.kind.get() {
            0 => AckKind::Appended,
            1 => AckKind::Duplicate,
            2 => AckKind::DuplicateUnknown,
            _ => return Err(FrameError::Body("unknown kind of acknowledgement")),
        };
        Ok(AckRow {
            last_sequence: Sequence(self.last_sequence.get()),
            offset: Offset(self.offset.get()),
            count: self.count.get(),
            kind,
        })
    }
}

/// What a consumer lets the broker send, and how far its user has taken it.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsumerCredit {
    pub credit: Credit,
    /// Deliveries of this stream, counted from its opening, that the user has begun.
    pub begun: u64,
}

impl ConsumerCredit {
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(HEADER_BYTES + 24);
        out.put_slice(&header(FrameType::ConsumerCredit, 24));
        out.put_u64_le(self.credit.max_messages);
        out.put_u64_le(self.credit.max_bytes);
        out.put_u64_le(self.begun);
        out.freeze()
    }

    pub fn decode(body: &[u8]) -> Result<Self, FrameError> {
        let (raw, _) = prefix_of::<[U64; 3]>(body)?;
        Ok(Self {
            credit: Credit {
                max_messages: raw[0].get(),
                max_bytes: raw[1].get(),
            },
            begun: raw[2].get(),
        })
    }
}

/// What the broker says beside a delivered message.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct DeliverMeta {
    pub offset: Offset,
    pub published_at: Stamp,
    /// The hand-out's number; names the lease together with offset and session. 0 in stream mode.
    pub delivery: Delivery,
    /// Failures so far + 1.
    pub attempt: u32,
}

/// One delivered message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivered {
    pub meta: DeliverMeta,
    /// Broker-made headers, in the message's header layout.
    pub extra: Bytes,
    /// The message's bytes as they were published. Empty: what is stored is damaged and cannot be shown.
    pub message: Bytes,
}

/// A deliver frame up to its messages, which are to follow one behind the other.
///
/// ```text
///  0  u32 runs, u32 messages
///  8  the runs, 40 bytes each: u64 offset, u64 published_at, u32 delivery, u32 attempt, u32 count,
///     u32 extra_bytes, u64 0
///     a u32 for the length of each message
///     the broker-made headers of each run
///     the messages
/// ```
///
/// A run is of messages with consecutive offsets, of which all else that is said is the same.
#[derive(Debug, Default)]
pub struct DeliverHead {
    runs: BytesMut,
    lengths: BytesMut,
    extras: BytesMut,
    message_bytes: usize,
}

impl DeliverHead {
    /// Adds a run by its first message's meta, the headers of each of them, and the length of each: as many
    /// as the frame has room for. Returns how many they are.
    pub fn push(
        &mut self,
        first: DeliverMeta,
        extra: &[u8],
        lengths: impl IntoIterator<Item = usize>,
    ) -> u32 {
        let before = self.messages();
        let begun = self.body_bytes() + size_of::<RunRaw>() + extra.len();
        let mut room = FRAME_BYTES_MAX.saturating_sub(begun);
        for length in lengths {
            let bytes = size_of::<U32>() + length;
            if bytes > room || self.messages() == DELIVER_MESSAGES_MAX {
                break;
            }
            room -= bytes;
            self.lengths.put_u32_le(length as u32);
            self.message_bytes += length;
        }
        let count = self.messages() - before;
        if count > 0 {
            self.runs.put_u64_le(first.offset.0);
            self.runs.put_u64_le(first.published_at.0);
            self.runs.put_u32_le(first.delivery.0);
            self.runs.put_u32_le(first.attempt);
            self.runs.put_u32_le(count);
            self.runs.put_u32_le(extra.len() as u32);
            self.runs.put_u64_le(0);
            self.extras.put_slice(extra);
        }
        count
    }

    /// Messages of all runs.
    #[must_use]
    pub fn messages(&self) -> u32 {
        (self.lengths.len() / size_of::<U32>()) as u32
    }

    /// Bytes of them.
    #[must_use]
    pub fn message_bytes(&self) -> usize {
        self.message_bytes
    }

    /// Bytes of the frame's body, messages included.
    #[must_use]
    pub fn body_bytes(&self) -> usize {
        let tables = self.runs.len() + self.lengths.len() + self.extras.len();
        DELIVER_FIXED + tables + self.message_bytes
    }

    /// The frame's bytes before its messages.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let length = self.body_bytes();
        let mut out = BytesMut::with_capacity(HEADER_BYTES + length - self.message_bytes);
        out.put_slice(&header(FrameType::Deliver, length));
        out.put_u32_le((self.runs.len() / size_of::<RunRaw>()) as u32);
        out.put_u32_le(self.messages());
        out.put_slice(&self.runs);
        out.put_slice(&self.lengths);
        out.put_slice(&self.extras);
        out.freeze()
    }
}

/// Bytes of a deliver frame's body before its runs.
const DELIVER_FIXED: usize = 8;

#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RunRaw {
    offset: U64,
    published_at: U64,
    delivery: U32,
    attempt: U32,
    count: U32,
    extra_bytes: U32,
    /// A backoff's deadline etc. may be added here; 0 today.
    _reserved: U64,
}

/// Takes a deliver frame's body apart, which may lie in pieces. What `body` hands out without a copy is not
/// copied here either; of a `Bytes` that is all.
pub fn decode_deliver(mut body: impl Buf) -> Result<Vec<Delivered>, FrameError> {
    if body.remaining() < DELIVER_FIXED {
        return Err(TOO_SHORT);
    }
    let (runs, messages) = (body.get_u32_le(), body.get_u32_le());
    if messages > DELIVER_MESSAGES_MAX || runs > messages {
        return Err(FrameError::Body(
            "a deliver frame has at most 4,096 messages, and one in each run",
        ));
    }
    let runs = table(&mut body, runs as usize * size_of::<RunRaw>())?;
    let runs = rows_of::<RunRaw>(&runs)?;
    let lengths = table(&mut body, messages as usize * size_of::<U32>())?;
    let lengths = rows_of::<U32>(&lengths)?;
    let extras = runs.iter().map(|run| run.extra_bytes.get() as usize).sum();
    let mut extras = table(&mut body, extras)?;
    if lengths.iter().map(|l| l.get() as usize).sum::<usize>() > body.remaining() {
        return Err(WRONG);
    }
    let mut lengths = lengths.iter();
    let mut out = Vec::with_capacity(lengths.len());
    for run in runs {
        let first = run.first()?;
        if run.count.get() == 0 {
            return Err(WRONG);
        }
        let extra = extras.split_to(run.extra_bytes.get() as usize);
        for nth in 0..run.count.get() {
            let length = lengths.next().ok_or(WRONG)?;
            out.push(Delivered {
                meta: DeliverMeta {
                    offset: Offset(first.offset.0 + u64::from(nth)),
                    ..first
                },
                extra: extra.clone(),
                message: body.copy_to_bytes(length.get() as usize),
            });
        }
    }
    if lengths.next().is_some() {
        return Err(WRONG);
    }
    Ok(out)
}

const WRONG: FrameError = FrameError::Body("the lengths of a delivery contradict each other");

/// The next bytes of a body, which are there.
fn table(body: &mut impl Buf, bytes: usize) -> Result<Bytes, FrameError> {
    if bytes > body.remaining() {
        return Err(WRONG);
    }
    Ok(body.copy_to_bytes(bytes))
}

impl RunRaw {
    /// What is said of its first message; all of its offsets can be told.
    fn first(&self) -> Result<DeliverMeta, FrameError> {
        let offset = self.offset.get();
        if offset.checked_add(u64::from(self.count.get())).is_none() {
            return Err(FrameError::Body("a delivery's offsets overflow"));
        }
        Ok(DeliverMeta {
            offset: Offset(offset),
            published_at: Stamp(self.published_at.get()),
            delivery: Delivery(self.delivery.get()),
            attempt: self.attempt.get(),
        })
    }
}

/// Acknowledges `run` consecutive offsets from `offset`, all leased with the same delivery number.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct AckRun {
    pub offset: Offset,
    pub delivery: Delivery,
    pub run: u32,
}

/// Appends an acks frame to `out`.
pub fn encode_acks(runs: &[AckRun], out: &mut BytesMut) {
    out.put_slice(&header(FrameType::Acks, 8 + 16 * runs.len()));
    out.put_u32_le(runs.len() as u32);
    out.put_u32_le(0);
    for run in runs {
        out.put_u64_le(run.offset.0);
        out.put_u32_le(run.delivery.0);
        out.put_u32_le(run.run);
    }
}

/// Reads an acks frame. Every run has at least one offset and does not overflow.
pub fn decode_acks(body: &[u8]) -> Result<Vec<AckRun>, FrameError> {
    let ([count, _zero], rest) = prefix_of::<[U32; 2]>(body)?;
    let rows = rows_of::<AckRunRaw>(rest)?;
    if rows.len() != count.get() as usize || count.get() > SETTLE_ROWS_MAX {
        return Err(FrameError::Body(
            "an acks frame has as many rows as it says, at most 8,192",
        ));
    }
    let runs: Vec<_> = rows.iter().map(AckRunRaw::run).collect::<Result<_, _>>()?;
    let offsets: u64 = runs.iter().map(|run| u64::from(run.run)).sum();
    if offsets > SETTLE_OFFSETS_MAX {
        return Err(FrameError::Body(
            "an acks frame covers at most 65,536 offsets",
        ));
    }
    Ok(runs)
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct AckRunRaw {
    offset: U64,
    delivery: U32,
    run: U32,
}

impl AckRunRaw {
    fn run(&self) -> Result<AckRun, FrameError> {
        let (offset, run) = (self.offset.get(), self.run.get());
        if run == 0 || offset.checked_add(u64::from(run)).is_none() {
            return Err(FrameError::Body(
                "a run of acknowledgements is empty or too long",
            ));
        }
        Ok(AckRun {
            offset: Offset(offset),
            delivery: Delivery(self.delivery.get()),
            run,
        })
    }
}

/// Encodes a commit of a stream subscription's consumer offset: the next offset to be read.
#[must_use]
pub fn encode_commit(next: Offset) -> Bytes {
    let mut out = BytesMut::with_capacity(HEADER_BYTES + 8);
    out.put_slice(&header(FrameType::Commit, 8));
    out.put_u64_le(next.0);
    out.freeze()
}

pub fn decode_commit(body: &[u8]) -> Result<Offset, FrameError> {
    let (next, _) = prefix_of::<U64>(body)?;
    Ok(Offset(next.get()))
}

const TOO_SHORT: FrameError = FrameError::Body("it is too short");

fn prefix_of<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    body: &[u8],
) -> Result<(&T, &[u8]), FrameError> {
    T::ref_from_prefix(body).map_err(|_| TOO_SHORT)
}

fn rows_of<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    body: &[u8],
) -> Result<&[T], FrameError> {
    <[T]>::ref_from_bytes(body).map_err(|_| FrameError::Body("its rows are cut"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{EXTRA_BYTES_MAX, MESSAGE_BYTES_MAX};
    use proptest::prelude::*;

    #[test]
    fn an_ack_frame_is_read_back() {
        let ack = PublishAck {
            handle: ProducerHandle(7),
            credit: Credit {
                max_messages: 5,
                max_bytes: 6,
            },
            pressure: Some(ErrorCode::DiskLow),
            retry_after_ms: 100,
            rows: vec![AckRow {
                last_sequence: Sequence(9),
                offset: Offset(3),
                count: 2,
                kind: AckKind::Duplicate,
            }],
        };
        let mut out = BytesMut::new();
        ack.encode(&mut out);
        assert_eq!(PublishAck::decode(&out[HEADER_BYTES..]), Ok(ack));
    }

    #[test]
    fn a_publish_and_its_ack_have_these_bytes() {
        let prefix = Publish::prefix(ProducerHandle(0x0a), Sequence(3), 2, 4);
        #[rustfmt::skip]
        let golden = [
            20, 0, 0, 0, 18, 0, 0, 0,
            3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0x0a, 0, 0, 0,
        ];
        assert_eq!(prefix, golden);
        let body = [&prefix[HEADER_BYTES..], b"mess"].concat();
        assert_eq!(Publish::peek_handle(&body), Ok(ProducerHandle(0x0a)));
        assert!(Publish::peek_handle(&body[..PUBLISH_FIXED - 1]).is_err());
        let publish = Publish::decode(&Bytes::from(body)).unwrap();
        assert_eq!(publish.handle, ProducerHandle(0x0a));
        assert_eq!((publish.previous, publish.count), (Sequence(3), 2));
        assert_eq!(&publish.messages[..], b"mess");

        let ack = PublishAck {
            handle: ProducerHandle(0x0a),
            credit: Credit {
                max_messages: 1,
                max_bytes: 2,
            },
            pressure: Some(ErrorCode::Memory),
            retry_after_ms: 4,
            rows: vec![AckRow {
                last_sequence: Sequence(5),
                offset: Offset(6),
                count: 7,
                kind: AckKind::DuplicateUnknown,
            }],
        };
        let mut out = BytesMut::new();
        ack.encode(&mut out);
        #[rustfmt::skip]
        let golden = [
            56, 0, 0, 0, 19, 0, 0, 0,
            1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0,
            0x0a, 0, 0, 0, 11, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0,
            5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 2, 0, 0, 0,
        ];
        assert_eq!(&out[..], golden);
    }

    #[test]
    fn a_delivery_is_taken_apart() {
        let first = DeliverMeta {
            offset: Offset(7),
            published_at: Stamp(9),
            delivery: Delivery(2),
            attempt: 3,
        };
        let alone = DeliverMeta {
            offset: Offset(20),
            ..first
        };
        let mut head = DeliverHead::default();
        assert_eq!(head.push(first, b"", [2, 0]), 2);
        assert_eq!(head.push(first, b"", []), 0);
        assert_eq!(head.push(alone, b"abc", [1]), 1);
        assert_eq!((head.messages(), head.message_bytes()), (3, 3));
        let body = [&head.encode()[HEADER_BYTES..], b"xyz"].concat();

        let got = decode_deliver(&body[..]).unwrap();
        let metas: Vec<_> = got.iter().map(|got| got.meta).collect();
        let second = DeliverMeta {
            offset: Offset(8),
            ..first
        };
        assert_eq!(metas, [first, second, alone]);
        let bytes: Vec<_> = got.iter().map(|d| (&d.extra[..], &d.message[..])).collect();
        assert_eq!(bytes, [(&b""[..], &b"xy"[..]), (b"", b""), (b"abc", b"z")]);
        for cut in 0..body.len() {
            assert!(decode_deliver(&body[..cut]).is_err());
        }
    }

    #[test]
    fn a_delivery_has_these_bytes() {
        let first = DeliverMeta {
            offset: Offset(7),
            published_at: Stamp(9),
            delivery: Delivery(2),
            attempt: 3,
        };
        let mut head = DeliverHead::default();
        head.push(first, b"abc", [2, 1]);
        #[rustfmt::skip]
        let golden = [
            62, 0, 0, 0, 35, 0, 0, 0,
            1, 0, 0, 0, 2, 0, 0, 0,
            7, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0,
            2, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            2, 0, 0, 0, 1, 0, 0, 0,
            b'a', b'b', b'c',
        ];
        assert_eq!(head.encode()[..], golden);
    }

    #[test]
    fn no_more_is_told_of_than_a_frame_has_room_for() {
        let meta = DeliverMeta::default();
        let half = FRAME_BYTES_MAX / 2;
        let mut head = DeliverHead::default();
        assert_eq!(head.push(meta, b"", [half, half]), 1);
        assert_eq!(head.push(meta, &vec![0; half], [0]), 0);
        assert_eq!(head.push(meta, b"", [half - 100, 1, 1]), 1);
        assert_eq!(head.body_bytes(), FRAME_BYTES_MAX - 4);
        assert_eq!(head.push(meta, b"", [0]), 0);
        assert_eq!(head.messages(), 2);
        // Encoding checks the frame's length.
        assert_eq!(head.encode().len(), HEADER_BYTES + 8 + 2 * 44);

        let mut head = DeliverHead::default();
        assert_eq!(head.push(meta, b"", [0; 5_000]), DELIVER_MESSAGES_MAX);
        assert_eq!(head.push(meta, b"", [0]), 0);
        let mut head = DeliverHead::default();
        let largest = (&[0; EXTRA_BYTES_MAX], [MESSAGE_BYTES_MAX]);
        assert_eq!(head.push(meta, largest.0, largest.1), 1);
    }

    #[test]
    fn a_delivery_that_contradicts_itself_is_malformed() {
        let frame = |offset: u64, count: u32, lengths: &[u32]| {
            let mut body = BytesMut::new();
            body.put_u32_le(1);
            body.put_u32_le(lengths.len() as u32);
            body.put_u64_le(offset);
            body.put_slice(&[0; 16]);
            body.put_u32_le(count);
            body.put_slice(&[0; 12]);
            lengths.iter().for_each(|&length| body.put_u32_le(length));
            body.put_slice(b"xy");
            decode_deliver(body).map(|all| all.len())
        };
        assert_eq!(frame(5, 2, &[1, 1]), Ok(2));
        assert_eq!(frame(5, 3, &[1, 1]), Err(WRONG));
        assert_eq!(frame(5, 1, &[1, 1]), Err(WRONG));
        assert_eq!(frame(5, 2, &[2, 1]), Err(WRONG));
        assert!(frame(u64::MAX, 1, &[1]).is_err());
        assert!(frame(5, 0, &[]).is_err());
        assert_eq!(frame(5, 4_096, &[0; 4_096]), Ok(4_096));
        assert!(frame(5, 4_097, &[0; 4_097]).is_err());
    }

    #[test]
    fn an_empty_run_of_acks_is_malformed() {
        let mut out = BytesMut::new();
        encode_acks(
            &[AckRun {
                offset: Offset(1),
                delivery: Delivery(1),
                run: 0,
            }],
            &mut out,
        );
        assert!(decode_acks(&out[HEADER_BYTES..]).is_err());
    }

    #[test]
    fn an_acks_frame_covers_a_bounded_number_of_offsets() {
        let run = AckRun {
            offset: Offset(0),
            delivery: Delivery(1),
            run: SETTLE_OFFSETS_MAX as u32,
        };
        let decode = |runs: &[AckRun]| {
            let mut out = BytesMut::new();
            encode_acks(runs, &mut out);
            decode_acks(&out[HEADER_BYTES..])
        };
        assert_eq!(decode(&[run]), Ok(vec![run]));
        assert!(decode(&[run, AckRun { run: 1, ..run }]).is_err());
    }

    proptest! {
        #[test]
        fn hostile_bodies_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let body = Bytes::from(bytes);
            let _ = Publish::decode(&body);
            let _ = PublishAck::decode(&body);
            let _ = ConsumerCredit::decode(&body);
            let (front, back) = body.split_at(body.len() / 2);
            prop_assert_eq!(decode_deliver(&body[..]), decode_deliver(front.chain(back)));
            let _ = decode_acks(&body);
            let _ = decode_commit(&body);
        }
    }
}
