//! Framing: what stands around every frame on every stream.
//!
//! ```text
//! 0  u32  length   bytes after this header
//! 4  u8   type
//! 5  u8   flags    must be 0
//! 6  u16  reserved must be 0
//! 8  body
//! ```
//!
//! The first frame on a stream says what the stream is for. Hot frames have fixed little-endian
//! bodies (`hot`); the others are postcard-encoded, versioned enums (`control`).

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};

use crate::error::{ErrorCode, WireError};
use crate::limits::{
    CONTROL_BYTES_MAX, FRAME_BYTES_MAX, LEASES_BYTES_MAX, PUBLISH_BYTES_MAX, RESPONSE_BYTES_MAX,
};

/// Bytes of a frame header.
pub const HEADER_BYTES: usize = 8;

macro_rules! frame_types {
    ($($(#[$doc:meta])* $name:ident = $code:literal,)*) => {
        /// What a frame is.
        #[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum FrameType { $($(#[$doc])* $name = $code,)* }

        impl FrameType {
            /// Every frame type, for exhaustive tests.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
        }

        impl TryFrom<u8> for FrameType {
            type Error = FrameError;

            fn try_from(code: u8) -> Result<Self, FrameError> {
                match code {
                    $($code => Ok(Self::$name),)*
                    other => Err(FrameError::Type(other)),
                }
            }
        }
    };
}

frame_types! {
    /// Control stream, client first: `control::Hello`.
    Hello = 1,
    /// Its answer: `control::Welcome`.
    Welcome = 2,
    /// `control::RequestFrame`.
    Request = 3,
    /// `control::ResponseFrame`.
    Response = 4,
    /// Broker to client on the control stream: `control::GoAway`.
    GoAway = 5,
    /// A `WireError` that ends this stream.
    Error = 6,
    /// Publish stream, the first frame and any later one: `control::OpenProducer`.
    OpenProducer = 16,
    /// Its answer: `control::ProducerOpened`, or `ProducerEnded`.
    ProducerOpened = 17,
    /// `hot::Publish`.
    Publish = 18,
    /// `hot::PublishAck`.
    PublishAck = 19,
    /// `control::PublishRefused`: nothing of that publish frame was appended.
    PublishRefused = 20,
    /// `control::CloseProducer`: the client leaves this producer; answered by `ProducerEnded`.
    CloseProducer = 21,
    /// `control::ProducerEnded`: nothing more comes for this producer. The others go on.
    ProducerEnded = 22,
    /// Delivery stream, first: `control::OpenConsumer`.
    OpenConsumer = 32,
    /// Its answer: `control::ConsumerOpened`.
    ConsumerOpened = 33,
    /// `hot::ConsumerCredit`, client to broker.
    ConsumerCredit = 34,
    /// `hot::Deliver`.
    Deliver = 35,
    /// `control::ConsumerNotice`, broker to client: leases lost, activity of a stream consumer.
    ConsumerNotice = 36,
    /// Settlement stream, first: `control::OpenSettlements`.
    OpenSettlements = 48,
    /// Its answer, empty body.
    SettlementsOpened = 49,
    /// `hot::Acks`.
    Acks = 50,
    /// `control::Settle`: nack, reject, release, extend.
    Settle = 51,
    /// Renews every lease of the session; empty body, not answered.
    Renew = 52,
    /// `hot::Commit`: a stream subscription's consumer offset.
    Commit = 53,
    /// `control::Settled`: answers to acks, settlements and commits, in order.
    Settled = 54,
    /// Clean end of the session; empty body. The broker answers `SessionClosed`.
    CloseSession = 55,
    /// Everything settled before is durable and the session has ended; empty body.
    SessionClosed = 56,
}

/// Why bytes are no frame. The stream is closed with `ErrorCode::Malformed` or `TooLarge`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("unknown frame type {0}")]
    Type(u8),
    #[error("a frame of {found} bytes is longer than the limit of {max}")]
    TooLong { found: usize, max: usize },
    #[error("reserved bits of the frame header are set")]
    Reserved,
    #[error("the frame's body is malformed: {0}")]
    Body(&'static str),
    #[error("a {found:?} frame is not expected here")]
    Unexpected { found: FrameType },
}

impl From<FrameError> for WireError {
    fn from(error: FrameError) -> Self {
        let code = match error {
            FrameError::TooLong { .. } => ErrorCode::TooLarge,
            _ => ErrorCode::Malformed,
        };
        Self::new(code, error.to_string())
    }
}

/// One frame: its type and its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: FrameType,
    pub body: Bytes,
}

impl Frame {
    /// Decodes a postcard body. Trailing bytes are ignored: a newer peer may append fields.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, FrameError> {
        match postcard::take_from_bytes(&self.body) {
            Ok((value, _)) => Ok(value),
            Err(_) => Err(FrameError::Body("its fields cannot be decoded")),
        }
    }

    /// The frame itself if it is of this type.
    pub fn expect(self, kind: FrameType) -> Result<Self, FrameError> {
        if self.kind == kind {
            Ok(self)
        } else {
            Err(FrameError::Unexpected { found: self.kind })
        }
    }
}

/// Writes a frame header for a body of `length` bytes.
#[must_use]
pub fn header(kind: FrameType, length: usize) -> [u8; HEADER_BYTES] {
    assert!(
        length <= FRAME_BYTES_MAX.max(RESPONSE_BYTES_MAX),
        "a frame is built within the limit"
    );
    let mut out = [0; HEADER_BYTES];
    out[..4].copy_from_slice(&(length as u32).to_le_bytes());
    out[4] = kind as u8;
    out
}

/// Encodes a control frame: header and postcard body.
///
/// # Errors
/// `TooLong` if the body exceeds what a receiver takes of this type; the caller pages its answer.
pub fn encode<T: Serialize>(kind: FrameType, value: &T) -> Result<Bytes, FrameError> {
    let body = postcard::to_stdvec(value).map_err(|_| FrameError::Body("it cannot be encoded"))?;
    let max = body_bytes_max(kind);
    if body.len() > max {
        let found = body.len();
        return Err(FrameError::TooLong { found, max });
    }
    let mut out = BytesMut::with_capacity(HEADER_BYTES + body.len());
    out.put_slice(&header(kind, body.len()));
    out.put_slice(&body);
    Ok(out.freeze())
}

/// A frame without a body.
#[must_use]
pub fn empty(kind: FrameType) -> Bytes {
    Bytes::copy_from_slice(&header(kind, 0))
}

/// Takes the next whole frame off `buffer`; `None` until it is complete. The body is split off
/// without a copy.
pub fn decode(buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    let Some((kind, length)) = peek(buffer)? else {
        return Ok(None);
    };
    if buffer.len() < HEADER_BYTES + length {
        return Ok(None);
    }
    buffer.advance(HEADER_BYTES);
    let body = buffer.split_to(length).freeze();
    Ok(Some(Frame { kind, body }))
}

/// Type and body length of the frame at the front, once its header is there. The length is within
/// the limit for its type, so that a receiver may reserve it.
pub fn peek(buffer: &[u8]) -> Result<Option<(FrameType, usize)>, FrameError> {
    let Some(head) = buffer.first_chunk::<HEADER_BYTES>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let kind = FrameType::try_from(head[4])?;
    if head[5..8] != [0, 0, 0] {
        return Err(FrameError::Reserved);
    }
    let max = body_bytes_max(kind);
    if length > max {
        return Err(FrameError::TooLong { found: length, max });
    }
    Ok(Some((kind, length)))
}

/// The longest body of a frame of this type.
#[must_use]
pub const fn body_bytes_max(kind: FrameType) -> usize {
    match kind {
        FrameType::Publish => PUBLISH_BYTES_MAX,
        FrameType::Deliver => FRAME_BYTES_MAX,
        FrameType::SettlementsOpened
        | FrameType::Renew
        | FrameType::CloseSession
        | FrameType::SessionClosed => 0,
        FrameType::ConsumerCredit | FrameType::Commit | FrameType::CloseProducer => 64,
        FrameType::Hello | FrameType::OpenProducer | FrameType::OpenSettlements => 4096,
        FrameType::OpenConsumer => 16 << 10,
        FrameType::Response => RESPONSE_BYTES_MAX,
        FrameType::ConsumerOpened | FrameType::ConsumerNotice => LEASES_BYTES_MAX,
        _ => CONTROL_BYTES_MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{ConsumerNotice, ConsumerOpened, LeaseName, LostReason};
    use crate::limits::MAX_IN_FLIGHT_MAX;
    use crate::{Delivery, Offset, SessionId, SubscriptionId, SubscriptionMode, TopicId};
    use proptest::prelude::*;

    #[test]
    fn a_frame_arrives_whole_or_not_at_all() {
        let bytes = encode(FrameType::GoAway, &7u32).unwrap();
        let mut buffer = BytesMut::from(&bytes[..bytes.len() - 1]);
        assert_eq!(decode(&mut buffer), Ok(None));
        buffer.put_u8(bytes[bytes.len() - 1]);
        let frame = decode(&mut buffer).unwrap().unwrap();
        assert_eq!(frame.kind, FrameType::GoAway);
        assert_eq!(frame.decode::<u32>(), Ok(7));
        assert!(buffer.is_empty());
    }

    #[test]
    fn an_oversized_frame_is_refused_by_its_header() {
        let mut head = header(FrameType::Hello, 100);
        head[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(peek(&head), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn what_a_receiver_would_refuse_as_too_long_is_not_encoded() {
        for &kind in FrameType::ALL {
            let body = "x".repeat(body_bytes_max(kind) + 1);
            let encoded = encode(kind, &body);
            assert!(
                matches!(encoded, Err(FrameError::TooLong { .. })),
                "{kind:?}"
            );
        }
    }

    #[test]
    fn a_session_with_as_many_leases_as_there_may_be_is_resumed_and_told_that_they_are_lost() {
        let longest = LeaseName {
            offset: Offset(u64::MAX),
            delivery: Delivery(u32::MAX),
        };
        let leases = vec![longest; MAX_IN_FLIGHT_MAX as usize];
        let opened = ConsumerOpened {
            session: SessionId(u64::MAX),
            token: u64::MAX,
            topic: TopicId(u32::MAX),
            subscription: SubscriptionId(u32::MAX),
            mode: SubscriptionMode::Queue,
            lease_ms: u64::MAX,
            leases: leases.clone(),
            resumed: true,
            position: Offset(u64::MAX),
        };
        encode(FrameType::ConsumerOpened, &opened).unwrap();
        let reason = LostReason::Purged;
        let lost = ConsumerNotice::LeasesLost { leases, reason };
        encode(FrameType::ConsumerNotice, &lost).unwrap();
    }

    #[test]
    fn types_survive_their_numbers() {
        for &kind in FrameType::ALL {
            assert_eq!(FrameType::try_from(kind as u8), Ok(kind));
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(frame)) = decode(&mut buffer) {
                let _ = frame.decode::<crate::control::RequestFrame>();
            }
        }
    }
}
