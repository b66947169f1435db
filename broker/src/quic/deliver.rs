//! From handed-out runs to deliver frames: bodies are sliced, not copied, behind their head, unless a
//! slice would keep much more memory alive than it has bytes until the peer acknowledges it.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};
use millpond_protocol::hot::{DeliverHead, DeliverMeta};
use millpond_protocol::limits::DELIVER_MESSAGES_MAX;
use millpond_protocol::message::MessageView;
use millpond_protocol::{Offset, TopicId};
use millpond_queue::LeaseRange;
use millpond_wal::storage::Storage;

use super::ahead::Ahead;
use super::frames::StreamError;
use super::{Context, letters};
use crate::bodies::{BodyError, Run};
use crate::shard::io::Handout;

/// Messages smaller than this are copied together: a piece of its own costs more than the copy.
const COPY_BYTES_MAX: usize = 4 << 10;

/// A deliver frame in pieces.
pub struct DeliverFrame {
    pub pieces: Vec<Bytes>,
    pub messages: u64,
    /// Bytes of messages, as credit counts them.
    pub bytes: u64,
}

/// What could be gathered, what of the runs will never be sent, the damaged range that ended it, and the bytes that
/// the first message wants if they are more than it may have.
pub struct Gathered {
    pub frame: Option<DeliverFrame>,
    pub dropped: Vec<LeaseRange>,
    pub damaged: Option<(TopicId, Offset, Offset)>,
    pub wanted: Option<u64>,
}

/// Takes runs off `pending` until a frame has about `room` bytes: one more message like those in it would
/// exceed it. One that is larger than they are may, and the frame has at most twice as many then.
pub async fn gather<S: Storage>(
    context: &Context<S>,
    ahead: &mut Ahead<S>,
    pending: &mut VecDeque<Handout>,
    room: u64,
) -> Result<Gathered, StreamError> {
    let mut builder = Builder::default();
    let limit = usize::try_from(room).unwrap_or(usize::MAX).max(1);
    let (mut damaged, mut wanted, mut dropped) = (None, None, Vec::new());
    let mut is_full = false;
    while !is_full && builder.has_room(limit) {
        let Some(mut run) = pending.pop_front() else {
            break;
        };
        let most = run
            .count
            .min(DELIVER_MESSAGES_MAX - builder.head.messages());
        match read(context, ahead, &run, most, builder.room(limit)).await {
            Ok((bodies, _)) if bytes_of(&bodies) > limit => {
                wanted = Some(bytes_of(&bodies) as u64);
            }
            Ok((bodies, extra)) => {
                let taken = builder.push(&run, &bodies, &extra);
                skip(&mut run, taken);
                is_full = taken == 0;
            }
            Err(BodyError::Damaged { .. }) if run.elsewhere.is_some() => {
                let next = Offset(run.offset.0 + 1);
                damaged = Some((run.topic, run.offset, next));
                dropped.push(drop_front(&mut run, 1));
            }
            Err(BodyError::Damaged { first, next }) => {
                let first = first.max(run.offset);
                damaged = Some((run.topic, first, next));
                let beyond = next
                    .0
                    .saturating_sub(run.offset.0)
                    .min(u64::from(run.count)) as u32;
                dropped.push(drop_front(&mut run, beyond.max(1)));
            }
            Err(BodyError::TooLarge { bytes }) => wanted = Some(bytes),
            Err(BodyError::Gone(_)) => dropped.push(drop_front(&mut run, 1)),
            Err(BodyError::Io(text)) => return Err(StreamError::Gone(text)),
        }
        if run.count > 0 {
            pending.push_front(run);
        }
        if damaged.is_some() || wanted.is_some() {
            break;
        }
    }
    let frame = builder.finish();
    if is_full && frame.is_none() {
        return Err(StreamError::Gone(
            "a message does not fit into a frame".to_owned(),
        ));
    }
    Ok(Gathered {
        // What is gathered goes first; then the large one is the first.
        wanted: wanted.filter(|_| frame.is_none()),
        frame,
        dropped,
        damaged,
    })
}

fn bytes_of(bodies: &[Run]) -> usize {
    bodies.iter().map(|run| run.messages.len()).sum()
}

/// The first `count` messages of a run, by the names of their leases.
pub fn range(run: &Handout, count: u32) -> LeaseRange {
    LeaseRange {
        offset: run.offset,
        count,
        delivery: run.delivery,
    }
}

fn drop_front(run: &mut Handout, count: u32) -> LeaseRange {
    let dropped = range(run, count.min(run.count));
    skip(run, count);
    dropped
}

fn skip(run: &mut Handout, taken: u32) {
    run.offset = Offset(run.offset.0 + u64::from(taken));
    run.count -= taken.min(run.count);
}

/// The bodies at the front of a run, and the headers that the broker adds to a dead letter.
async fn read<S: Storage>(
    context: &Context<S>,
    ahead: &mut Ahead<S>,
    run: &Handout,
    count: u32,
    bytes: usize,
) -> Result<(Vec<Run>, Bytes), BodyError> {
    let Some(elsewhere) = &run.elsewhere else {
        let bodies = ahead.read(run.topic, run.offset, count, bytes).await?;
        return Ok((bodies, Bytes::new()));
    };
    let bodies = context
        .bodies
        .read(elsewhere.topic, elsewhere.offset, 1, bytes)
        .await?;
    let extra = match &elsewhere.letter {
        Some(letter) => {
            let story = letters::story(&context.bodies, letter).await;
            letters::headers(letter, &story, bodies.first().map(|run| run.stamp))
        }
        None => Bytes::new(),
    };
    Ok((bodies, extra))
}

#[derive(Default)]
struct Builder {
    head: DeliverHead,
    bodies: Vec<Bytes>,
    small: BytesMut,
}

impl Builder {
    /// Adds what was read for a run; returns how many of its messages that covers.
    fn push(&mut self, run: &Handout, bodies: &[Run], extra: &Bytes) -> u32 {
        let mut taken = 0;
        for body in bodies {
            let first = DeliverMeta {
                offset: Offset(run.offset.0 + u64::from(taken)),
                published_at: body.stamp,
                delivery: run.delivery,
                attempt: run.attempt,
            };
            let mut rest: &[u8] = &body.messages;
            let lengths = (0..body.count).map_while(|_| {
                let (view, behind) = MessageView::split(rest).ok()?;
                rest = behind;
                Some(view.bytes().len())
            });
            let before = self.head.message_bytes();
            let count = self.head.push(first, extra, lengths);
            self.body(body, self.head.message_bytes() - before);
            taken += count;
            if count < body.count {
                break;
            }
        }
        taken
    }

    /// What is left of so many bytes; the first message may have all of them.
    fn room(&self, limit: usize) -> usize {
        match self.head.messages() {
            0 => limit,
            _ => limit.saturating_sub(self.head.body_bytes()),
        }
    }

    /// Whether another message like those in it would exceed neither so many bytes nor their number.
    fn has_room(&self, limit: usize) -> bool {
        match self.head.messages() {
            0 => true,
            DELIVER_MESSAGES_MAX => false,
            messages => self.room(limit) >= self.head.body_bytes() / messages as usize,
        }
    }

    /// Adds the first bytes of a run: those of the messages that the head tells of.
    fn body(&mut self, run: &Run, bytes: usize) {
        if bytes < COPY_BYTES_MAX || bytes < run.pinned / 2 {
            self.small.put_slice(&run.messages[..bytes]);
            return;
        }
        self.close_small();
        self.bodies.push(run.messages.slice(..bytes));
    }

    fn close_small(&mut self) {
        if !self.small.is_empty() {
            self.bodies.push(self.small.split().freeze());
        }
    }

    fn finish(mut self) -> Option<DeliverFrame> {
        if self.head.messages() == 0 {
            return None;
        }
        self.close_small();
        let mut pieces = Vec::with_capacity(self.bodies.len() + 1);
        pieces.push(self.head.encode());
        pieces.append(&mut self.bodies);
        Some(DeliverFrame {
            pieces,
            messages: u64::from(self.head.messages()),
            bytes: self.head.message_bytes() as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millpond_protocol::frame::{FrameType, decode};
    use millpond_protocol::hot::decode_deliver;
    use millpond_protocol::{Delivery, Message, Sequence, Stamp};

    #[test]
    fn a_frame_of_pieces_is_what_a_client_decodes() {
        let mut messages = BytesMut::new();
        for n in 1..=3u64 {
            Message::new(format!("m{n}")).encode(Sequence(n), &mut messages);
        }
        let run = Handout {
            topic: TopicId(1),
            offset: Offset(10),
            count: 3,
            delivery: Delivery(2),
            attempt: 1,
            elsewhere: None,
        };
        let body = Run {
            base: Offset(10),
            count: 3,
            stamp: Stamp(99),
            messages: messages.freeze(),
            pinned: 0,
        };
        let mut builder = Builder::default();
        assert_eq!(builder.push(&run, &[body], &Bytes::new()), 3);
        let frame = builder.finish().unwrap();
        let mut wire = BytesMut::new();
        frame
            .pieces
            .iter()
            .for_each(|piece| wire.extend_from_slice(piece));
        let decoded = decode(&mut wire).unwrap().unwrap();
        assert_eq!(decoded.kind, FrameType::Deliver);
        let got = decode_deliver(decoded.body).unwrap();
        let offsets: Vec<_> = got.iter().map(|d| d.meta.offset.0).collect();
        assert_eq!(offsets, [10, 11, 12]);
        let (view, _) = MessageView::split(&got[2].message).unwrap();
        assert_eq!(view.payload(), b"m3");
    }

    #[test]
    fn a_frame_ends_where_another_large_message_would_not_fit() {
        let run = Handout {
            topic: TopicId(1),
            offset: Offset(0),
            count: 1,
            delivery: Delivery(1),
            attempt: 1,
            elsewhere: None,
        };
        let body = |bytes| {
            let mut messages = BytesMut::new();
            Message::new(vec![7; bytes]).encode(Sequence(1), &mut messages);
            Run {
                base: Offset(0),
                count: 1,
                stamp: Stamp(1),
                messages: messages.freeze(),
                pinned: 0,
            }
        };
        let (large, less) = (body(9_500_000), body(9_000_000));
        let limit = large.messages.len() + 32;
        let mut builder = Builder::default();
        assert_eq!(builder.room(limit), limit);
        assert_eq!(builder.push(&run, &[large], &Bytes::new()), 1);
        assert!(!builder.has_room(limit));
        // Together they would be more than a frame may have.
        assert_eq!(builder.push(&run, &[less], &Bytes::new()), 0);
        let frame = builder.finish().unwrap();
        assert_eq!((frame.messages, frame.pieces.len()), (1, 2));
    }
}
