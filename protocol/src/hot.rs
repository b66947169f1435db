//! The hot frames: publishes, their acknowledgements, deliveries, acks, credit. Fixed layouts.
//!
//! ```text
//! Publish        0 u64 previous | 8 u32 count | 12 u32 handle | 16 messages
//! PublishAck     0 u64 max_messages | 8 u64 max_bytes | 16 u32 handle | 20 u16 pressure | 22 u16 zero
//!                24 u32 retry_after_ms | 28 u32 zero
//!                32 rows of 24: u64 last_sequence, u64 offset, u32 count, u32 kind
//! ConsumerCredit 0 u64 max_messages | 8 u64 max_bytes | 16 u64 begun
//! Deliver        0 u32 count | 4 u32 zero | 8 metas of 40 | extra header blocks | messages
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
    BATCH_MESSAGES_MAX, DELIVER_MESSAGES_MAX, SETTLE_OFFSETS_MAX, SETTLE_ROWS_MAX,
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
    /// Bytes of broker-made headers for it in the block behind the metas.
    pub extra_bytes: u32,
    /// Bytes of the message. 0: the stored bytes are damaged and cannot be shown.
    pub message_bytes: u32,
    /// Backoff deadline etc. may be added here; 0 today.
    pub reserved: u64,
}

/// Bytes of a deliver frame's body before its metas.
const DELIVER_FIXED: usize = 8;
/// Bytes of one meta.
pub const DELIVER_META_BYTES: usize = 40;

impl DeliverMeta {
    /// Appends the meta to `out`.
    pub fn encode(&self, out: &mut impl BufMut) {
        out.put_u64_le(self.offset.0);
        out.put_u64_le(self.published_at.0);
        out.put_u32_le(self.delivery.0);
        out.put_u32_le(self.attempt);
        out.put_u32_le(self.extra_bytes);
        out.put_u32_le(self.message_bytes);
        out.put_u64_le(self.reserved);
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct MetaRaw {
    offset: U64,
    published_at: U64,
    delivery: U32,
    attempt: U32,
    extra_bytes: U32,
    message_bytes: U32,
    reserved: U64,
}

/// One delivered message.
#[derive(Clone, Debug)]
pub struct Delivered {
    pub meta: DeliverMeta,
    /// Broker-made headers, in the message's header layout.
    pub extra: Bytes,
    /// The message's bytes as they were published.
    pub message: Bytes,
}

/// The fixed part of a deliver frame with its frame header: to be followed by the metas, the extra
/// blocks and the messages, `rest_bytes` in all.
#[must_use]
pub fn deliver_prefix(count: u32, rest_bytes: usize) -> [u8; HEADER_BYTES + DELIVER_FIXED] {
    let mut out = [0; HEADER_BYTES + DELIVER_FIXED];
    out[..8].copy_from_slice(&header(FrameType::Deliver, DELIVER_FIXED + rest_bytes));
    out[8..12].copy_from_slice(&count.to_le_bytes());
    out
}

/// Takes a deliver frame's body apart, which may lie in pieces. What `body` hands out without a copy is not
/// copied here either; of a `Bytes` that is all.
pub fn decode_deliver(mut body: impl Buf) -> Result<Vec<Delivered>, FrameError> {
    const WRONG: FrameError = FrameError::Body("the lengths of a delivery contradict each other");
    if body.remaining() < DELIVER_FIXED {
        return Err(TOO_SHORT);
    }
    let (count, _zero) = (body.get_u32_le(), body.get_u32_le());
    if count > DELIVER_MESSAGES_MAX {
        return Err(FrameError::Body(
            "a deliver frame has at most 4,096 messages",
        ));
    }
    let metas_bytes = count as usize * DELIVER_META_BYTES;
    if metas_bytes > body.remaining() {
        return Err(WRONG);
    }
    let metas = body.copy_to_bytes(metas_bytes);
    let metas = rows_of::<MetaRaw>(&metas)?;
    let extras: usize = metas.iter().map(|m| m.extra_bytes.get() as usize).sum();
    let messages: usize = metas.iter().map(|m| m.message_bytes.get() as usize).sum();
    if extras + messages > body.remaining() {
        return Err(WRONG);
    }
    let mut extras = body.copy_to_bytes(extras);
    let apart = metas.iter().map(|meta| Delivered {
        meta: meta.meta(),
        extra: extras.split_to(meta.extra_bytes.get() as usize),
        message: body.copy_to_bytes(meta.message_bytes.get() as usize),
    });
    Ok(apart.collect())
}

impl MetaRaw {
    fn meta(&self) -> DeliverMeta {
        DeliverMeta {
            offset: Offset(self.offset.get()),
            published_at: Stamp(self.published_at.get()),
            delivery: Delivery(self.delivery.get()),
            attempt: self.attempt.get(),
            extra_bytes: self.extra_bytes.get(),
            message_bytes: self.message_bytes.get(),
            reserved: self.reserved.get(),
        }
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
    use crate::message::Message;
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
        let mut message = BytesMut::new();
        Message::new("payload").encode(Sequence(1), &mut message);
        let meta = DeliverMeta {
            offset: Offset(7),
            delivery: Delivery(2),
            attempt: 2,
            extra_bytes: 3,
            message_bytes: message.len() as u32,
            ..Default::default()
        };
        let mut body = BytesMut::new();
        body.put_slice(&deliver_prefix(1, DELIVER_META_BYTES + 3 + message.len()));
        meta.encode(&mut body);
        body.put_slice(b"abc");
        body.put_slice(&message);
        let got = decode_deliver(body.freeze().slice(HEADER_BYTES..)).unwrap();
        assert_eq!(got.len(), 1);
        assert_eq!(got[0].meta, meta);
        assert_eq!(&got[0].extra[..], b"abc");
        assert_eq!(&got[0].message[..], &message[..]);
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
            let _ = decode_deliver(&body[..]);
            let _ = decode_acks(&body);
            let _ = decode_commit(&body);
        }
    }
}
