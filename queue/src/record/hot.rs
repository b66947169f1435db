//! Fixed layouts of the records that every message causes. Little-endian.
//!
//! ```text
//! Publish  0 u32 topic | 4 u32 epoch | 8 u64 producer | 16 u64 previous | 24 u32 count | 28 u32 zero
//!          32 messages
//! Lease    0 u32 subscription | 4 u32 ranges | 8 u64 session
//!          16 ranges of 16: u64 offset, u32 count, u32 delivery
//! Settle   0 u32 subscription | 4 u32 acks | 8 u64 session
//!          16 acks of 16: u64 offset, u32 delivery, u32 run | postcard items, nothing if there are none
//! Commit   0 u32 subscription | 4 u32 zero | 8 u64 session | 16 u64 next
//! ```

use millpond_protocol::hot::AckRun;
use millpond_protocol::limits::{DELIVER_MESSAGES_MAX, SETTLE_OFFSETS_MAX};
use millpond_protocol::{
    Delivery, Epoch, Offset, ProducerKey, Sequence, SessionId, SubscriptionId, TopicId,
};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{LeaseRange, Record, RecordError, get, kind, put};

/// Bytes before the messages of a publish record.
pub const PUBLISH_FIXED_BYTES: usize = size_of::<PublishFixed>();
/// Bytes before the ranges of a lease record.
pub const LEASE_FIXED_BYTES: usize = size_of::<Fixed>();

const _: () = assert!(PUBLISH_FIXED_BYTES == 32);
const _: () = assert!(LEASE_FIXED_BYTES == 16);
// What bounds the offsets of a settlement bounds those of a hand-out too.
const _: () = assert!(DELIVER_MESSAGES_MAX as u64 <= SETTLE_OFFSETS_MAX);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct PublishFixed {
    topic: U32,
    epoch: U32,
    producer: U64,
    previous: U64,
    count: U32,
    zero: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Fixed {
    subscription: U32,
    count: U32,
    session: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Row {
    offset: U64,
    a: U32,
    b: U32,
}

/// The fixed part of a publish record; the messages follow it untouched.
#[must_use]
pub fn publish_header(
    topic: TopicId,
    producer: ProducerKey,
    epoch: Epoch,
    previous: Sequence,
    count: u32,
) -> [u8; PUBLISH_FIXED_BYTES] {
    let fixed = PublishFixed {
        topic: topic.0.into(),
        epoch: epoch.0.into(),
        producer: producer.0.into(),
        previous: previous.0.into(),
        count: count.into(),
        zero: 0.into(),
    };
    zerocopy::transmute!(fixed)
}

pub(super) fn encode(record: &Record<'_>, out: &mut Vec<u8>) {
    match record {
        Record::Publish {
            topic,
            producer,
            epoch,
            previous,
            count,
            messages,
        } => {
            out.extend_from_slice(&publish_header(
                *topic, *producer, *epoch, *previous, *count,
            ));
            out.extend_from_slice(messages);
        }
        Record::Lease {
            subscription,
            session,
            ranges,
        } => {
            fixed(*subscription, ranges.len(), *session, out);
            for range in ranges {
                row(range.offset, range.count, range.delivery.0, out);
            }
        }
        Record::Settle {
            subscription,
            session,
            acks,
            items,
        } => {
            fixed(*subscription, acks.len(), *session, out);
            for ack in acks {
                row(ack.offset, ack.delivery.0, ack.run, out);
            }
            if !items.is_empty() {
                put(items, out);
            }
        }
        Record::Commit {
            subscription,
            session,
            next,
        } => {
            fixed(*subscription, 0, *session, out);
            out.extend_from_slice(&next.0.to_le_bytes());
        }
        _ => unreachable!("only hot records come here"),
    }
}

pub(super) fn decode(kind: u8, bytes: &[u8]) -> Result<Record<'_>, RecordError> {
    read(kind, bytes).ok_or(RecordError::Layout { kind })
}

fn read(kind: u8, bytes: &[u8]) -> Option<Record<'_>> {
    if kind == kind::Publish {
        let (fixed, messages) = PublishFixed::ref_from_prefix(bytes).ok()?;
        return Some(Record::Publish {
            topic: TopicId(fixed.topic.get()),
            producer: ProducerKey(fixed.producer.get()),
            epoch: Epoch(fixed.epoch.get()),
            previous: Sequence(fixed.previous.get()),
            count: fixed.count.get(),
            messages,
        });
    }
    let (fixed, rest) = Fixed::ref_from_prefix(bytes).ok()?;
    let subscription = SubscriptionId(fixed.subscription.get());
    let session = SessionId(fixed.session.get());
    if kind == kind::Commit {
        let next = U64::ref_from_bytes(rest).ok()?;
        return Some(Record::Commit {
            subscription,
            session,
            next: Offset(next.get()),
        });
    }
    let (rows, rest) =
        <[Row]>::ref_from_prefix_with_elems(rest, fixed.count.get() as usize).ok()?;
    if rows.iter().any(|row| overflows(kind, row)) {
        return None;
    }
    // Each of them may have an answer of its own.
    let offsets = rows.iter().map(|row| u64::from(run_of(kind, row)));
    if offsets.sum::<u64>() > SETTLE_OFFSETS_MAX {
        return None;
    }
    if kind == kind::Lease {
        return rest.is_empty().then(|| Record::Lease {
            subscription,
            session,
            ranges: rows.iter().map(lease_range).collect(),
        });
    }
    let items = match rest {
        [] => Vec::new(),
        rest => get(kind, rest).ok()?,
    };
    Some(Record::Settle {
        subscription,
        session,
        acks: rows.iter().map(ack_run).collect(),
        items,
    })
}

/// A run that is empty or reaches past the last offset there can be.
fn overflows(kind: u8, row: &Row) -> bool {
    let run = run_of(kind, row);
    run == 0 || row.offset.get().checked_add(u64::from(run)).is_none()
}

fn run_of(kind: u8, row: &Row) -> u32 {
    let run = if kind == kind::Lease { row.a } else { row.b };
    run.get()
}

fn lease_range(row: &Row) -> LeaseRange {
    LeaseRange {
        offset: Offset(row.offset.get()),
        count: row.a.get(),
        delivery: Delivery(row.b.get()),
    }
}

fn ack_run(row: &Row) -> AckRun {
    AckRun {
        offset: Offset(row.offset.get()),
        delivery: Delivery(row.a.get()),
        run: row.b.get(),
    }
}

fn fixed(subscription: SubscriptionId, count: usize, session: SessionId, out: &mut Vec<u8>) {
    let fixed = Fixed {
        subscription: subscription.0.into(),
        count: (count as u32).into(),
        session: session.0.into(),
    };
    out.extend_from_slice(fixed.as_bytes());
}

fn row(offset: Offset, a: u32, b: u32, out: &mut Vec<u8>) {
    let row = Row {
        offset: offset.0.into(),
        a: a.into(),
        b: b.into(),
    };
    out.extend_from_slice(row.as_bytes());
}
