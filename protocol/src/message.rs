//! The one layout of a message: in a publish frame, in a log record, in a deliver frame.
//!
//! ```text
//!  0  u32  length            the whole message, this field included
//!  4  u32  crc               crc32 of bytes 8..length
//!  8  u64  sequence          the producer's number for it
//! 16  u32  delay_ms          first delivery not before published + delay; 0 = none
//! 20  u32  ttl_ms            expires at published + ttl; 0 = none
//! 24  u16  max_attempts      overrides the subscription's; 0 = does not
//! 26  u16  flags             must be 0
//! 28  u32  backoff_initial_ms overrides the subscription's; 0 = does not
//! 32  u16  key_length
//! 34  u16  header_count
//! 36  u32  headers_length
//! 40  key, headers (u16 name_length, u32 value_length, name, value, ...), payload
//! ```
//!
//! Little-endian. What the broker adds (offset, stamp, attempt) stands beside it, so these bytes are
//! hashed once by the producer and moved as slices from then on.

use bytes::{BufMut, Bytes, BytesMut};

use crate::ids::Sequence;
use crate::limits::{
    DELAY_MS_MAX, HEADERS_BYTES_MAX, HEADERS_MAX, KEY_BYTES_MAX, MESSAGE_BYTES_MAX,
    PAYLOAD_BYTES_MAX, TTL_MS_MAX,
};

/// Bytes of the fixed part.
pub const FIXED_BYTES: usize = 40;
/// Headers that begin so belong to the broker; publishing them is an error.
pub const RESERVED_PREFIX: &str = "mp-";

/// Why bytes are no message, or a message may not be published. The producer must change it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    #[error("the message ends after {have} bytes, {need} are needed")]
    Short { have: usize, need: usize },
    #[error("the message is {0} bytes long, the limit is {MESSAGE_BYTES_MAX}")]
    TooLong(usize),
    #[error("the payload is {0} bytes long, the limit is {PAYLOAD_BYTES_MAX}")]
    PayloadTooLong(usize),
    #[error("the key is {0} bytes long, the limit is {KEY_BYTES_MAX}")]
    KeyTooLong(usize),
    #[error(
        "the headers take {bytes} bytes in {count}, the limits are {HEADERS_BYTES_MAX} and {HEADERS_MAX}"
    )]
    HeadersTooLong { bytes: usize, count: usize },
    #[error("the header {0:?} is reserved: names beginning with \"mp-\" belong to the broker")]
    ReservedHeader(String),
    #[error("the delay is {0} ms, the limit is {DELAY_MS_MAX}")]
    DelayTooLong(u64),
    #[error("the time to live is {0} ms, the limit is {TTL_MS_MAX}")]
    TtlTooLong(u64),
    #[error("the message's checksum does not match its bytes")]
    Checksum,
    #[error("the message's lengths contradict each other")]
    Lengths,
    #[error("the message has flags that this version does not know: {0:#06x}")]
    Flags(u16),
}

/// Builds messages straight into a batch buffer.
#[derive(Clone, Debug, Default)]
pub struct MessageBuilder {
    pub key: Bytes,
    pub headers: Vec<(String, Bytes)>,
    pub payload: Bytes,
    pub delay_ms: u64,
    pub ttl_ms: u64,
    pub max_attempts: u16,
    pub backoff_initial_ms: u32,
}

/// A message as a user builds it: payload, key, headers, delay, time to live.
pub type Message = MessageBuilder;

impl MessageBuilder {
    /// A message with this payload and nothing else.
    pub fn new(payload: impl Into<Bytes>) -> Self {
        Self {
            payload: payload.into(),
            ..Self::default()
        }
    }

    /// Bytes that `encode` will write.
    #[must_use]
    pub fn encoded_bytes(&self) -> usize {
        FIXED_BYTES + self.key.len() + self.headers_bytes() + self.payload.len()
    }

    /// Checks every limit, and that no header is reserved.
    pub fn check(&self) -> Result<(), MessageError> {
        if self.payload.len() > PAYLOAD_BYTES_MAX {
            return Err(MessageError::PayloadTooLong(self.payload.len()));
        }
        if self.key.len() > KEY_BYTES_MAX {
            return Err(MessageError::KeyTooLong(self.key.len()));
        }
        let bytes = self.headers_bytes();
        if bytes > HEADERS_BYTES_MAX || self.headers.len() > HEADERS_MAX {
            let count = self.headers.len();
            return Err(MessageError::HeadersTooLong { bytes, count });
        }
        if let Some((name, _)) = self
            .headers
            .iter()
            .find(|(name, _)| is_reserved(name.as_bytes()))
        {
            return Err(MessageError::ReservedHeader(name.clone()));
        }
        if self.delay_ms > DELAY_MS_MAX {
            return Err(MessageError::DelayTooLong(self.delay_ms));
        }
        if self.ttl_ms > TTL_MS_MAX {
            return Err(MessageError::TtlTooLong(self.ttl_ms));
        }
        Ok(())
    }

    /// Appends the message with its sequence to `out`. Call `check` first: over-long parts are a
    /// caller's bug and would be refused by the broker.
    pub fn encode(&self, sequence: Sequence, out: &mut BytesMut) {
        let start = out.len();
        let length = self.encoded_bytes();
        out.reserve(length);
        out.put_u32_le(length as u32);
        out.put_u32_le(0);
        out.put_u64_le(sequence.0);
        out.put_u32_le(self.delay_ms as u32);
        out.put_u32_le(self.ttl_ms as u32);
        out.put_u16_le(self.max_attempts);
        out.put_u16_le(0);
        out.put_u32_le(self.backoff_initial_ms);
        out.put_u16_le(self.key.len() as u16);
        out.put_u16_le(self.headers.len() as u16);
        out.put_u32_le(self.headers_bytes() as u32);
        out.put_slice(&self.key);
        for (name, value) in &self.headers {
            put_header(out, name, value);
        }
        out.put_slice(&self.payload);
        let crc = crc32fast::hash(&out[start + 8..]);
        out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
    }

    fn headers_bytes(&self) -> usize {
        let each = |(name, value): &(String, Bytes)| 6 + name.len() + value.len();
        self.headers.iter().map(each).sum()
    }
}

/// Appends one header in the message's header layout.
pub fn put_header(out: &mut impl BufMut, name: &str, value: &[u8]) {
    out.put_u16_le(name.len() as u16);
    out.put_u32_le(value.len() as u32);
    out.put_slice(name.as_bytes());
    out.put_slice(value);
}

fn is_reserved(name: &[u8]) -> bool {
    let prefix = RESERVED_PREFIX.as_bytes();
    name.len() >= prefix.len() && name[..prefix.len()].eq_ignore_ascii_case(prefix)
}

/// A message's bytes, looked at in place. Lengths are consistent by construction.
#[derive(Copy, Clone, Debug)]
pub struct MessageView<'a> {
    bytes: &'a [u8],
}

impl<'a> MessageView<'a> {
    /// Takes the first message off `input` without hashing it; use for bytes the log vouches for.
    pub fn split(input: &'a [u8]) -> Result<(Self, &'a [u8]), MessageError> {
        let short = |need| MessageError::Short {
            have: input.len(),
            need,
        };
        if input.len() < FIXED_BYTES {
            return Err(short(FIXED_BYTES));
        }
        let length = u32_at(input, 0) as usize;
        if length > MESSAGE_BYTES_MAX {
            return Err(MessageError::TooLong(length));
        }
        if length > input.len() {
            return Err(short(length));
        }
        let view = Self {
            bytes: &input[..length.max(FIXED_BYTES)],
        };
        if length < FIXED_BYTES + view.key_length() + view.headers_length() {
            return Err(MessageError::Lengths);
        }
        Ok((view, &input[length..]))
    }

    /// Checks what a producer may have got wrong: checksum, limits, header block, reserved names.
    pub fn verify(&self) -> Result<(), MessageError> {
        if self.key_length() > KEY_BYTES_MAX {
            return Err(MessageError::KeyTooLong(self.key_length()));
        }
        let count = usize::from(u16_at(self.bytes, 34));
        if self.headers_length() > HEADERS_BYTES_MAX || count > HEADERS_MAX {
            let bytes = self.headers_length();
            return Err(MessageError::HeadersTooLong { bytes, count });
        }
        if self.payload().len() > PAYLOAD_BYTES_MAX {
            return Err(MessageError::PayloadTooLong(self.payload().len()));
        }
        if u16_at(self.bytes, 26) != 0 {
            return Err(MessageError::Flags(u16_at(self.bytes, 26)));
        }
        if u64::from(self.delay_ms()) > DELAY_MS_MAX {
            return Err(MessageError::DelayTooLong(u64::from(self.delay_ms())));
        }
        if u64::from(self.ttl_ms()) > TTL_MS_MAX {
            return Err(MessageError::TtlTooLong(u64::from(self.ttl_ms())));
        }
        if crc32fast::hash(&self.bytes[8..]) != u32_at(self.bytes, 4) {
            return Err(MessageError::Checksum);
        }
        self.verify_headers(count)
    }

    fn verify_headers(&self, count: usize) -> Result<(), MessageError> {
        let mut found = 0;
        for header in self.headers() {
            let (name, _) = header?;
            if is_reserved(name.as_bytes()) {
                return Err(MessageError::ReservedHeader(name.to_owned()));
            }
            found += 1;
        }
        if found == count {
            Ok(())
        } else {
            Err(MessageError::Lengths)
        }
    }

    /// All of the message's bytes.
    #[must_use]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    #[must_use]
    pub fn sequence(&self) -> Sequence {
        Sequence(u64_at(self.bytes, 8))
    }

    #[must_use]
    pub fn delay_ms(&self) -> u32 {
        u32_at(self.bytes, 16)
    }

    #[must_use]
    pub fn ttl_ms(&self) -> u32 {
        u32_at(self.bytes, 20)
    }

    #[must_use]
    pub fn max_attempts(&self) -> u16 {
        u16_at(self.bytes, 24)
    }

    #[must_use]
    pub fn backoff_initial_ms(&self) -> u32 {
        u32_at(self.bytes, 28)
    }

    #[must_use]
    pub fn key(&self) -> &'a [u8] {
        &self.bytes[FIXED_BYTES..FIXED_BYTES + self.key_length()]
    }

    #[must_use]
    pub fn payload(&self) -> &'a [u8] {
        &self.bytes[FIXED_BYTES + self.key_length() + self.headers_length()..]
    }

    /// The headers in the order they were published.
    #[must_use]
    pub fn headers(&self) -> Headers<'a> {
        let start = FIXED_BYTES + self.key_length();
        Headers::new(&self.bytes[start..start + self.headers_length()])
    }

    fn key_length(&self) -> usize {
        usize::from(u16_at(self.bytes, 32))
    }

    fn headers_length(&self) -> usize {
        u32_at(self.bytes, 36) as usize
    }
}

/// Iterates over a header block; stops after the first error.
#[derive(Clone, Debug)]
pub struct Headers<'a> {
    rest: &'a [u8],
}

impl<'a> Headers<'a> {
    /// Reads a block of headers in the message's layout.
    #[must_use]
    pub fn new(block: &'a [u8]) -> Self {
        Self { rest: block }
    }

    fn take(&mut self) -> Result<(&'a str, &'a [u8]), MessageError> {
        let rest = std::mem::take(&mut self.rest);
        if rest.len() < 6 {
            return Err(MessageError::Lengths);
        }
        let name_end = 6 + usize::from(u16_at(rest, 0));
        let value_end = name_end.saturating_add(u32_at(rest, 2) as usize);
        if value_end > rest.len() {
            return Err(MessageError::Lengths);
        }
        let name = std::str::from_utf8(&rest[6..name_end]).map_err(|_| MessageError::Lengths)?;
        self.rest = &rest[value_end..];
        Ok((name, &rest[name_end..value_end]))
    }
}

impl<'a> Iterator for Headers<'a> {
    type Item = Result<(&'a str, &'a [u8]), MessageError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            None
        } else {
            Some(self.take())
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoded(message: &Message, sequence: u64) -> BytesMut {
        let mut out = BytesMut::new();
        message.encode(Sequence(sequence), &mut out);
        out
    }

    #[test]
    fn what_was_encoded_is_read_back() {
        let mut message = Message::new("hello");
        message.key = Bytes::from_static(b"k");
        message
            .headers
            .push(("color".into(), Bytes::from_static(b"red")));
        message.delay_ms = 7;
        let out = encoded(&message, 42);
        let (view, rest) = MessageView::split(&out).unwrap();
        assert!(rest.is_empty());
        assert_eq!(view.verify(), Ok(()));
        assert_eq!((view.sequence(), view.delay_ms()), (Sequence(42), 7));
        assert_eq!((view.key(), view.payload()), (&b"k"[..], &b"hello"[..]));
        let headers: Vec<_> = view.headers().map(Result::unwrap).collect();
        assert_eq!(headers, [("color", &b"red"[..])]);
    }

    #[test]
    fn a_reserved_header_is_refused_in_any_case() {
        let mut message = Message::new("x");
        message
            .headers
            .push(("MP-dead-reason".into(), Bytes::new()));
        assert!(matches!(
            message.check(),
            Err(MessageError::ReservedHeader(_))
        ));
        let out = encoded(&message, 1);
        let (view, _) = MessageView::split(&out).unwrap();
        assert!(matches!(
            view.verify(),
            Err(MessageError::ReservedHeader(_))
        ));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok((view, _)) = MessageView::split(&bytes) {
                let _ = view.verify();
            }
        }

        #[test]
        fn a_flipped_bit_is_noticed(at in 4usize..70, bit in 0u8..8) {
            let mut message = Message::new(vec![7; 24]);
            message.headers.push(("a".into(), Bytes::from_static(b"bc")));
            let mut out = encoded(&message, 9);
            let at = at.min(out.len() - 1);
            out[at] ^= 1 << bit;
            let good = MessageView::split(&out).is_ok_and(|(view, _)| view.verify().is_ok());
            prop_assert!(!good);
        }
    }
}
