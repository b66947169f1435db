//! The message layout: what verifies has exactly one encoding, and every length in it is believed only as
//! far as the bytes reach.
#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use millpond_protocol::{Message, MessageView};

fuzz_target!(|input: &[u8]| {
    walk(input);
    // The same behind a good checksum.
    let mut mended = input.to_vec();
    if mended.len() >= 8 {
        let length = u32::from_le_bytes([mended[0], mended[1], mended[2], mended[3]]) as usize;
        let end = length.clamp(8, mended.len());
        let crc = crc32fast::hash(&mended[8..end]);
        mended[4..8].copy_from_slice(&crc.to_le_bytes());
        walk(&mended);
    }
});

fn walk(input: &[u8]) {
    let mut rest = input;
    while let Ok((view, behind)) = MessageView::split(rest) {
        assert_eq!(view.bytes().len() + behind.len(), rest.len());
        if view.verify().is_ok() {
            assert_eq!(&again(&view)[..], view.bytes());
        }
        for header in view.headers() {
            let _ = header;
        }
        rest = behind;
    }
}

/// The message built anew from what its view says.
fn again(view: &MessageView<'_>) -> BytesMut {
    let headers = view.headers().map(|header| {
        let (name, value) = header.expect("it was verified");
        (name.to_owned(), Bytes::copy_from_slice(value))
    });
    let message = Message {
        key: Bytes::copy_from_slice(view.key()),
        headers: headers.collect(),
        payload: Bytes::copy_from_slice(view.payload()),
        delay_ms: view.delay_ms().into(),
        ttl_ms: view.ttl_ms().into(),
        max_attempts: view.max_attempts(),
        backoff_initial_ms: view.backoff_initial_ms(),
    };
    assert_eq!(message.check(), Ok(()), "what verifies may be sent");
    let mut out = BytesMut::new();
    message.encode(view.sequence(), &mut out);
    out
}
