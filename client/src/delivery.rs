//! A message as a consumer gets it: slices of what was received, copied only where datagrams part it.

use bytes::{Buf, Bytes};
use millpond_protocol::hot::{DeliverMeta, Delivered};
use millpond_protocol::message::{FIXED_BYTES, Headers};
use millpond_protocol::{MessageView, Offset, Stamp};

/// The readable part of a delivered message.
#[derive(Clone, Debug)]
pub struct Received {
    pub(crate) meta: DeliverMeta,
    extra: Bytes,
    /// Key and headers, in the message's layout.
    front: Bytes,
    key_bytes: usize,
    payload: Bytes,
    is_damaged: bool,
}

impl Received {
    pub(crate) fn new(delivered: Delivered) -> Self {
        let Delivered {
            meta,
            extra,
            message: mut rest,
        } = delivered;
        let parts = match MessageView::split(&rest) {
            Ok((view, [])) => Some((view.key().len(), view.payload().len())),
            // The broker shows no bytes of a message that is damaged.
            _ => None,
        };
        let (key_bytes, payload_bytes) = parts.unwrap_or_default();
        if parts.is_none() {
            rest.clear();
        }
        // A slice counts references, which two threads share: only what has bytes is one.
        rest.advance(rest.len().min(FIXED_BYTES));
        let front_bytes = rest.len() - payload_bytes;
        let front = if front_bytes == 0 {
            Bytes::new()
        } else {
            rest.split_to(front_bytes)
        };
        Self {
            meta,
            extra,
            front,
            key_bytes,
            payload: rest,
            is_damaged: parts.is_none(),
        }
    }

    /// The message's position in its topic.
    #[must_use]
    pub fn offset(&self) -> Offset {
        self.meta.offset
    }

    /// When the broker took it.
    #[must_use]
    pub fn published_at(&self) -> Stamp {
        self.meta.published_at
    }

    /// The key it was published with; empty if none.
    #[must_use]
    pub fn key(&self) -> &[u8] {
        self.front.get(..self.key_bytes).unwrap_or_default()
    }

    /// The broker's headers (their names begin with `mp-`), then the publisher's.
    pub fn headers(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let own = self.front.get(self.key_bytes..);
        Headers::new(&self.extra)
            .chain(Headers::new(own.unwrap_or_default()))
            .filter_map(Result::ok)
    }

    /// The first header of this name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers()
            .find_map(|(found, value)| (found == name).then_some(value))
    }

    /// The payload; empty if the stored bytes are damaged.
    ///
    /// Kept, it keeps the memory of what came with it: 64 KiB as a rule, more where datagrams were lost or small. Copy
    /// what is kept long.
    #[must_use]
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// True if the stored bytes are damaged and cannot be shown.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.is_damaged
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use millpond_protocol::message::put_header;
    use millpond_protocol::{Message, Sequence};

    fn delivered(message: &Message) -> Delivered {
        let mut bytes = BytesMut::new();
        message.encode(Sequence(1), &mut bytes);
        let mut extra = BytesMut::new();
        put_header(&mut extra, "mp-failures", b"2");
        Delivered {
            meta: DeliverMeta::default(),
            extra: extra.freeze(),
            message: bytes.freeze(),
        }
    }

    #[test]
    fn key_headers_and_payload_are_where_they_were_put() {
        let mut message = Message::new("payload");
        message.key = Bytes::from_static(b"key");
        message.headers.push(("a".into(), Bytes::from_static(b"b")));
        let received = Received::new(delivered(&message));
        assert_eq!(received.key(), b"key");
        assert_eq!(&received.payload()[..], b"payload");
        let headers: Vec<_> = received.headers().collect();
        assert_eq!(headers, [("mp-failures", &b"2"[..]), ("a", &b"b"[..])]);
        assert_eq!(received.header("a"), Some(&b"b"[..]));
        assert!(!received.is_damaged());
    }

    #[test]
    fn a_damaged_message_shows_nothing_but_its_place() {
        let mut delivered = delivered(&Message::new("x"));
        delivered.message = Bytes::new();
        let received = Received::new(delivered);
        assert!(received.is_damaged());
        assert!(received.payload().is_empty() && received.key().is_empty());
        assert_eq!(received.header("mp-failures"), Some(&b"2"[..]));
    }
}
