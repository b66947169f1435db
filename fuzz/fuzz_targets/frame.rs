//! Whatever arrives on a stream, in either direction: frames, and the body of each by its type.
#![no_main]

use std::fmt::Debug;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use millpond_protocol::control as c;
use millpond_protocol::frame::{self, Frame, FrameType, HEADER_BYTES, body_bytes_max};
use millpond_protocol::hot::{self, ConsumerCredit, Publish, PublishAck};
use millpond_protocol::{MessageView, WireError};
use serde::{Serialize, de::DeserializeOwned};

fuzz_target!(|input: &[u8]| {
    let Some((&cut, stream)) = input.split_first() else {
        return;
    };
    let whole = frames(&mut BytesMut::from(stream));
    // However it arrives, the same frames come out, and none before its end is there.
    let (first, second) = stream.split_at(usize::from(cut).min(stream.len()));
    let mut buffer = BytesMut::from(first);
    let mut pieces = frames(&mut buffer);
    if pieces.1.is_ok() {
        buffer.put_slice(second);
        let (more, end) = frames(&mut buffer);
        pieces.0.extend(more);
        pieces.1 = end;
    }
    assert_eq!(whole, pieces);
    whole.0.iter().for_each(body);
});

type Frames = (Vec<Frame>, Result<(), frame::FrameError>);

fn frames(buffer: &mut BytesMut) -> Frames {
    let mut out = Vec::new();
    loop {
        match frame::decode(buffer) {
            Ok(Some(frame)) => {
                assert!(frame.body.len() <= body_bytes_max(frame.kind));
                out.push(frame);
            }
            Ok(None) => return (out, Ok(())),
            Err(error) => return (out, Err(error)),
        }
    }
}

fn body(frame: &Frame) {
    use FrameType as F;
    let bytes = &frame.body;
    match frame.kind {
        F::Hello => control::<c::Hello>(frame),
        F::Welcome => control::<c::Welcome>(frame),
        F::Request => control::<c::RequestFrame>(frame),
        F::Response => control::<c::ResponseFrame>(frame),
        F::GoAway => control::<c::GoAway>(frame),
        F::Error => control::<WireError>(frame),
        F::OpenProducer => control::<c::OpenProducer>(frame),
        F::ProducerOpened => control::<c::ProducerOpened>(frame),
        F::Publish => publish(bytes),
        F::PublishAck => {
            if let Ok(ack) = PublishAck::decode(bytes) {
                let mut again = BytesMut::new();
                ack.encode(&mut again);
                assert_eq!(PublishAck::decode(&again[HEADER_BYTES..]), Ok(ack));
            }
        }
        F::PublishRefused => control::<c::PublishRefused>(frame),
        F::CloseProducer => control::<c::CloseProducer>(frame),
        F::ProducerEnded => control::<c::ProducerEnded>(frame),
        F::OpenConsumer => control::<c::OpenConsumer>(frame),
        F::ConsumerOpened => control::<c::ConsumerOpened>(frame),
        F::ConsumerCredit => {
            if let Ok(credit) = ConsumerCredit::decode(bytes) {
                let again = credit.encode();
                // A newer peer may send more behind it.
                assert_eq!(again[HEADER_BYTES..], bytes[..again.len() - HEADER_BYTES]);
            }
        }
        F::Deliver => deliver(bytes),
        F::ConsumerNotice => control::<c::ConsumerNotice>(frame),
        F::OpenSettlements => control::<c::OpenSettlements>(frame),
        F::Acks => {
            if let Ok(runs) = hot::decode_acks(bytes) {
                let mut again = BytesMut::new();
                hot::encode_acks(&runs, &mut again);
                assert_eq!(hot::decode_acks(&again[HEADER_BYTES..]), Ok(runs));
            }
        }
        F::Settle => control::<c::Settle>(frame),
        F::Commit => {
            if let Ok(next) = hot::decode_commit(bytes) {
                assert_eq!(hot::encode_commit(next)[HEADER_BYTES..], bytes[..8]);
            }
        }
        F::Settled => control::<c::Settled>(frame),
        F::SettlementsOpened | F::Renew | F::CloseSession | F::SessionClosed => {
            assert!(bytes.is_empty());
        }
    }
}

/// A control body: what was understood is understood again from its own bytes.
fn control<T: Serialize + DeserializeOwned + PartialEq + Debug>(frame: &Frame) {
    if let Ok(value) = frame.decode::<T>()
        && let Ok(again) = frame::encode(frame.kind, &value)
    {
        let body = again.slice(HEADER_BYTES..);
        let kind = frame.kind;
        assert_eq!(Frame { kind, body }.decode::<T>(), Ok(value));
    }
}

fn publish(body: &Bytes) {
    let handle = Publish::peek_handle(body);
    let Ok(publish) = Publish::decode(body) else {
        return;
    };
    assert_eq!(handle, Ok(publish.handle));
    let mut rest: &[u8] = &publish.messages;
    for _ in 0..publish.count {
        let Ok((view, behind)) = MessageView::split(rest) else {
            break;
        };
        let _ = view.verify();
        assert_eq!(view.bytes().len() + behind.len(), rest.len());
        rest = behind;
    }
}

/// A delivery is the same however its body lies, and its messages are no more than that.
fn deliver(body: &Bytes) {
    let whole = hot::decode_deliver(body.clone());
    let (front, back) = body.split_at(body.len() / 2);
    assert_eq!(whole, hot::decode_deliver(front.chain(back)));
    let Ok(delivered) = whole else {
        return;
    };
    // The headers are those of a run.
    let bytes = delivered.iter().map(|one| one.message.len());
    assert!(bytes.sum::<usize>() <= body.len());
    for one in &delivered {
        for header in millpond_protocol::message::Headers::new(&one.extra) {
            let _ = header;
        }
        if let Ok((view, _)) = MessageView::split(&one.message) {
            let _ = view.verify();
        }
    }
}
