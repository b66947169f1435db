//! The producers of one publish stream: what each may send, what has been answered to it, and what
//! it is still to be told.
//!
//! ```text
//! opening -> open -> ending -> gone
//! received <= granted            for each by itself; who breaks it ends alone
//! ```
//!
//! Handles rise, so a handle that is not here was either never opened, which breaks the protocol, or
//! is over, and what its client sent before it knew is passed over. It does no I/O.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::BytesMut;
use millpond_protocol::control::{Leaving, OpenProducer, ProducerOpened};
use millpond_protocol::frame::FrameError;
use millpond_protocol::hot::{AckKind, AckRow, Credit, PublishAck};
use millpond_protocol::limits::{MESSAGE_BYTES_MAX, PRODUCER_ID_BYTES_MAX, STREAM_PRODUCERS_MAX};
use millpond_protocol::{
    Epoch, ErrorCode, ProducerHandle, ProducerKey, Sequence, TopicId, WireError,
};

use super::Pressure;
use crate::memory::Share;

/// Messages that a producer may have unanswered when nothing presses.
const WINDOW_MESSAGES: u64 = 16_384;
/// Bytes that a producer may have unanswered when nothing presses. The memory budget, not this,
/// guards memory; under pressure the window still holds one message of the largest size.
const WINDOW_BYTES: u64 = 64 << 20;
/// The windows under pressure.
const PRESSED_MESSAGES: u64 = 256;
const PRESSED_BYTES: u64 = 2 * MESSAGE_BYTES_MAX as u64;

const _: () = assert!(PRESSED_BYTES <= WINDOW_BYTES);

/// The producers of a stream by their handles.
#[derive(Default)]
pub struct Members {
    by_handle: HashMap<ProducerHandle, Member>,
    /// The highest handle ever used on the stream.
    highest: ProducerHandle,
}

enum Member {
    Opening {
        anonymous: bool,
        /// It was over before it was opened: how, and why if it was not left.
        left: Option<(Leaving, Option<WireError>)>,
    },
    Open(Box<Open>),
    /// What its client still sends is passed over; it is gone once the client has been told.
    Ending(Box<Open>),
}

/// What the shard needs to know of a publish beside its messages.
pub struct Producer {
    pub topic: TopicId,
    pub producer: ProducerKey,
    pub epoch: Epoch,
    /// The connection's share of memory, within that of the topic.
    pub share: Share,
}

struct Open {
    of: Arc<Producer>,
    anonymous: bool,
    received: Credit,
    granted: Credit,
    answered: Credit,
    rows: Vec<AckRow>,
}

/// An anonymous producer whose state may go.
pub struct Done {
    pub producer: ProducerKey,
    pub epoch: Epoch,
}

/// What a client is told when its producer has been opened.
pub enum Welcome {
    Open(ProducerOpened),
    /// It was over meanwhile.
    Left(Option<Done>, Option<WireError>),
}

impl Members {
    /// A producer is to be opened.
    ///
    /// # Errors
    /// Outside: the stream is over. Inside: this producer is.
    pub fn begin(&mut self, open: &OpenProducer) -> Result<Result<(), WireError>, FrameError> {
        if open.handle <= self.highest {
            return Err(FrameError::Body(
                "a producer's handle must be higher than those before it on the stream",
            ));
        }
        self.highest = open.handle;
        if self.by_handle.len() >= STREAM_PRODUCERS_MAX {
            let text = format!(
                "a stream has at most {STREAM_PRODUCERS_MAX} producers; open another stream"
            );
            return Ok(Err(WireError::new(ErrorCode::LimitReached, text)));
        }
        let id = open.producer_id.as_ref();
        if id.is_some_and(|id| id.is_empty() || id.len() > PRODUCER_ID_BYTES_MAX) {
            let text = format!("a producer id has 1 to {PRODUCER_ID_BYTES_MAX} bytes");
            return Ok(Err(WireError::new(ErrorCode::InvalidName, text)));
        }
        let opening = Member::Opening {
            anonymous: id.is_none(),
            left: None,
        };
        self.by_handle.insert(open.handle, opening);
        Ok(Ok(()))
    }

    /// The shard has opened it.
    pub fn opened(
        &mut self,
        handle: ProducerHandle,
        of: Producer,
        last_sequence: Sequence,
        pressure: Pressure,
    ) -> Option<Welcome> {
        let Some(Member::Opening { anonymous, left }) = self.by_handle.remove(&handle) else {
            return None;
        };
        if let Some((leaving, error)) = left {
            return Some(Welcome::Left(done(leaving, anonymous, &of), error));
        }
        let credit = credit(Credit::default(), pressure);
        let opened = ProducerOpened {
            handle,
            topic: of.topic,
            producer: of.producer,
            epoch: of.epoch,
            last_sequence,
            credit,
        };
        let open = Open {
            of: Arc::new(of),
            anonymous,
            received: Credit::default(),
            granted: credit,
            answered: Credit::default(),
            rows: Vec::new(),
        };
        self.by_handle.insert(handle, Member::Open(Box::new(open)));
        Some(Welcome::Open(opened))
    }

    /// Whom a publish is from; `None`: of one that is over, to be passed over.
    ///
    /// # Errors
    /// Outside: the stream is over. Inside: this producer is.
    pub fn sender(
        &self,
        handle: ProducerHandle,
    ) -> Result<Option<Result<Arc<Producer>, WireError>>, FrameError> {
        self.check_used(handle)?;
        Ok(match self.by_handle.get(&handle) {
            Some(Member::Open(open)) => Some(Ok(Arc::clone(&open.of))),
            Some(Member::Opening { left: None, .. }) => Some(Err(overrun())),
            Some(Member::Opening { .. } | Member::Ending(_)) | None => None,
        })
    }

    /// Counts what was received against what was granted.
    pub fn receive(
        &mut self,
        handle: ProducerHandle,
        messages: u64,
        bytes: u64,
    ) -> Result<(), WireError> {
        let Some(Member::Open(open)) = self.by_handle.get_mut(&handle) else {
            return Err(overrun());
        };
        open.received.max_messages += messages;
        open.received.max_bytes += bytes;
        let covered = open.received.max_messages <= open.granted.max_messages
            && open.received.max_bytes <= open.granted.max_bytes;
        if covered { Ok(()) } else { Err(overrun()) }
    }

    /// Nothing more is taken from it. What is to be told now; one that is being opened is told then.
    pub fn end(&mut self, handle: ProducerHandle, error: WireError) -> Option<WireError> {
        if let Some(Member::Opening { left, .. }) = self.by_handle.get_mut(&handle) {
            *left = Some((Leaving::ForGood, Some(error)));
            return None;
        }
        self.close_door(handle);
        Some(error)
    }

    /// Its client leaves it. `Some`: it is to be told so, and what may go.
    pub fn leave(
        &mut self,
        handle: ProducerHandle,
        leaving: Leaving,
    ) -> Result<Option<Option<Done>>, FrameError> {
        self.check_used(handle)?;
        let done = match self.by_handle.get_mut(&handle) {
            Some(Member::Open(open)) => done(leaving, open.anonymous, &open.of),
            Some(Member::Opening { left, .. }) => {
                left.get_or_insert((leaving, None));
                return Ok(None);
            }
            Some(Member::Ending(_)) | None => return Ok(None),
        };
        self.close_door(handle);
        Ok(Some(done))
    }

    /// The client has ended the stream cleanly: everybody leaves for good.
    pub fn leave_all(&mut self) -> Vec<Done> {
        let handles: Vec<_> = self.by_handle.keys().copied().collect();
        let left = handles
            .into_iter()
            .filter_map(|handle| self.leave(handle, Leaving::ForGood).ok()?);
        left.flatten().collect()
    }

    /// True while the shard has not said of each whether it is open.
    pub fn is_opening(&self) -> bool {
        let opening = |member: &Member| matches!(member, Member::Opening { .. });
        self.by_handle.values().any(opening)
    }

    /// Its client knows, or is told behind this.
    pub fn forget(&mut self, handle: ProducerHandle) {
        self.by_handle.remove(&handle);
    }

    /// What a publish came to, to be told by the next acknowledgement. False if it is gone.
    pub fn answered(
        &mut self,
        handle: ProducerHandle,
        messages: u64,
        bytes: u64,
        rows: Vec<AckRow>,
    ) -> bool {
        let Some(Member::Open(open) | Member::Ending(open)) = self.by_handle.get_mut(&handle)
        else {
            return false;
        };
        open.answered.max_messages += messages;
        open.answered.max_bytes += bytes;
        merge(&mut open.rows, rows);
        true
    }

    /// Appends an acknowledgement of what is answered, with fresh credit.
    pub fn put_ack(&mut self, handle: ProducerHandle, pressure: Pressure, out: &mut BytesMut) {
        let Some(Member::Open(open) | Member::Ending(open)) = self.by_handle.get_mut(&handle)
        else {
            return;
        };
        let credit = credit(open.answered, pressure);
        open.granted.max_messages = open.granted.max_messages.max(credit.max_messages);
        open.granted.max_bytes = open.granted.max_bytes.max(credit.max_bytes);
        let mut ack = PublishAck {
            handle,
            credit,
            pressure: pressure.reason,
            retry_after_ms: pressure.retry_after.as_millis() as u32,
            rows: std::mem::take(&mut open.rows),
        };
        ack.encode(out);
        ack.rows.clear();
        open.rows = ack.rows;
    }

    /// Those that may be told of credit.
    pub fn handles(&self) -> impl Iterator<Item = ProducerHandle> {
        let open = |(&handle, member): (_, &Member)| {
            matches!(member, Member::Open(_) | Member::Ending(_)).then_some(handle)
        };
        self.by_handle.iter().filter_map(open)
    }

    fn close_door(&mut self, handle: ProducerHandle) {
        if let Some(Member::Open(open) | Member::Ending(open)) = self.by_handle.remove(&handle) {
            self.by_handle.insert(handle, Member::Ending(open));
        }
    }

    fn check_used(&self, handle: ProducerHandle) -> Result<(), FrameError> {
        if handle > self.highest || handle == ProducerHandle(0) {
            return Err(FrameError::Body(
                "it names a producer that was never opened on this stream",
            ));
        }
        Ok(())
    }
}

fn done(leaving: Leaving, anonymous: bool, of: &Producer) -> Option<Done> {
    (anonymous && leaving == Leaving::ForGood).then_some(Done {
        producer: of.producer,
        epoch: of.epoch,
    })
}

/// How much may have been sent in all, when so much has been answered.
fn credit(answered: Credit, pressure: Pressure) -> Credit {
    let (messages, bytes) = match pressure.reason {
        None => (WINDOW_MESSAGES, WINDOW_BYTES),
        Some(_) => (PRESSED_MESSAGES, PRESSED_BYTES),
    };
    Credit {
        max_messages: answered.max_messages + messages,
        max_bytes: answered.max_bytes + bytes,
    }
}

fn overrun() -> WireError {
    let text = "more was sent than the broker gave credit for; use a client that honours credit";
    WireError::new(ErrorCode::CreditOverrun, text)
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
    let unknown = row.kind == AckKind::DuplicateUnknown;
    unknown || last.offset.0 + u64::from(last.count) == row.offset.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use millpond_protocol::Offset;

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
        let credit = credit(Credit::default(), pressed);
        assert!(credit.max_bytes >= MESSAGE_BYTES_MAX as u64 && credit.max_messages > 0);
    }

    #[test]
    fn a_handle_is_used_once_and_none_is_made_up() {
        let mut members = Members::default();
        assert!(members.sender(ProducerHandle(1)).is_err(), "never opened");
        assert_eq!(members.begin(&open(3)), Ok(Ok(())));
        for used in [0, 1, 3] {
            assert!(members.begin(&open(used)).is_err(), "{used}");
        }
        assert!(members.sender(ProducerHandle(0)).is_err());
        assert!(members.sender(ProducerHandle(4)).is_err());
        assert!(members.leave(ProducerHandle(4), Leaving::ForNow).is_err());
        let passed_over = members.sender(ProducerHandle(2));
        assert!(matches!(passed_over, Ok(None)));
    }

    #[test]
    fn a_stream_holds_a_bounded_number_of_producers() {
        let mut members = Members::default();
        for handle in 1..=STREAM_PRODUCERS_MAX as u32 {
            assert_eq!(members.begin(&open(handle)), Ok(Ok(())));
        }
        let next = open(STREAM_PRODUCERS_MAX as u32 + 1);
        let refused = members.begin(&next).unwrap().unwrap_err();
        assert_eq!(refused.code, ErrorCode::LimitReached);
        members.forget(ProducerHandle(7));
        let next = open(STREAM_PRODUCERS_MAX as u32 + 2);
        assert_eq!(members.begin(&next), Ok(Ok(())));
    }

    fn open(handle: u32) -> OpenProducer {
        OpenProducer {
            handle: ProducerHandle(handle),
            topic: "t".to_owned(),
            producer_id: None,
            resume: None,
        }
    }
}
