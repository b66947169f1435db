//! Peers that break the protocol: each is told why, and nobody else notices.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use millpond_client::{Client, Error, ErrorCode, Message, StartAt};
use millpond_protocol::WireError;
use millpond_protocol::control::{
    CloseProducer, LeaseName, Leaving, OpenProducer, OpenSettlements, Outcome, ProducerEnded,
    ProducerOpened, ProducerResume, RejectKind, Settle, SettleItem, SettleRefused, Settled,
};
use millpond_protocol::frame::{FrameType, body_bytes_max};
use millpond_protocol::hot::{
    AckKind, AckRun, ConsumerCredit, Credit, PublishAck, decode_deliver, encode_acks,
};
use millpond_protocol::ids::{Delivery, Offset, ProducerHandle, Sequence, SessionId};
use millpond_protocol::limits::{
    PRODUCER_ID_BYTES_MAX, REASON_BYTES_MAX, SETTLE_OFFSETS_MAX, STREAM_PRODUCERS_MAX,
};
use quinn::ConnectionError;
use tokio::time::{sleep, timeout};

use crate::common::{PATIENCE, broker, broker_with, builder, next, publish, quick_retries, text};
use crate::health::get;
use crate::raw::{
    FIRST, Peer, Raw, Wire, head, hello, open_producer, publish as publish_frame, publish_of, whole,
};

/// Asserts that others are served as if nothing had happened.
pub async fn still_serves(client: &Client) {
    let name = "witness";
    let witness = client.subscribe("orders", name);
    let witness = witness.create(quick_retries(1, 3), StartAt::Latest);
    let mut consumer = witness.open().await.unwrap();
    publish(client, &["still there"]).await;
    let delivery = next(&mut consumer).await;
    assert_eq!(text(&delivery), "still there");
    delivery.ack().await.unwrap();
    consumer.close().await;
    client.delete_subscription("orders", name).await.unwrap();
}

fn is(error: &WireError, code: ErrorCode, what: FrameType) {
    assert_eq!(error.code, code, "{what:?}: {error}");
    assert!(error.message.len() > 10, "{what:?}: {error}");
}

#[tokio::test]
async fn no_frame_but_an_opening_one_may_come_first() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    for &kind in FrameType::ALL {
        let mut wire = raw.stream().await;
        wire.bytes(&whole(kind, &[])).await;
        is(&wire.refusal().await, ErrorCode::Malformed, kind);
    }
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_body_that_is_garbage_ends_its_stream_only() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    for &kind in FrameType::ALL {
        let mut wire = raw.stream().await;
        wire.bytes(&whole(kind, &[0xff; 40])).await;
        let code = match body_bytes_max(kind) {
            0 => ErrorCode::TooLarge,
            _ => ErrorCode::Malformed,
        };
        is(&wire.refusal().await, code, kind);
    }
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_frame_that_is_cut_off_is_told_so() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    for &kind in FrameType::ALL {
        for cut in [1, 7, 9] {
            if body_bytes_max(kind) == 0 && cut > 8 {
                continue;
            }
            let mut wire = raw.stream().await;
            let length = body_bytes_max(kind).min(16) as u32;
            let bytes = [&head(kind as u8, length, 0)[..], &[1; 16]].concat();
            wire.bytes(&bytes[..cut]).await;
            wire.finish();
            is(&wire.refusal().await, ErrorCode::Malformed, kind);
        }
    }
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_length_beyond_the_limit_is_refused_by_the_header_alone() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    for &kind in FrameType::ALL {
        for length in [u32::MAX, body_bytes_max(kind) as u32 + 1] {
            let mut wire = raw.stream().await;
            wire.bytes(&head(kind as u8, length, 0)).await;
            is(&wire.refusal().await, ErrorCode::TooLarge, kind);
        }
    }
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn reserved_bits_and_unknown_types_are_refused() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    for &kind in FrameType::ALL {
        let mut flagged = head(kind as u8, 0, 0);
        for at in 5..8 {
            flagged[at] = 0x80;
            let mut wire = raw.stream().await;
            wire.bytes(&flagged).await;
            is(&wire.refusal().await, ErrorCode::Malformed, kind);
            flagged[at] = 0;
        }
    }
    for code in (0..=u8::MAX).filter(|&code| FrameType::try_from(code).is_err()) {
        let mut wire = raw.stream().await;
        wire.bytes(&head(code, 0, 0)).await;
        let error = wire.refusal().await;
        assert_eq!(error.code, ErrorCode::Malformed, "{code}: {error}");
    }
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn frames_that_do_not_belong_on_an_open_stream_end_it() {
    use FrameType as F;
    let (broker, client) = broker().await;
    let peer = Peer::new(&broker);
    let mut raw = peer.welcomed(&broker).await;
    for &kind in F::ALL {
        let frame = whole(kind, &[]);
        if kind != F::Publish {
            let (mut wire, _) = raw.producer().await;
            wire.bytes(&frame).await;
            is(&wire.refusal().await, ErrorCode::Malformed, kind);
        }
        if kind != F::ConsumerCredit {
            let (mut wire, _) = raw.consumer("c").await;
            wire.bytes(&frame).await;
            is(&wire.refusal().await, ErrorCode::Malformed, kind);
        }
        if ![F::Acks, F::Settle, F::Commit, F::Renew, F::CloseSession].contains(&kind) {
            let (_deliveries, opened) = raw.consumer("c").await;
            let mut wire = raw.settlements(&opened).await;
            wire.bytes(&frame).await;
            is(&wire.refusal().await, ErrorCode::Malformed, kind);
        }
        if kind != F::Request {
            let mut other = peer.welcomed(&broker).await;
            other.control.bytes(&frame).await;
            is(&other.control.refusal().await, ErrorCode::Malformed, kind);
            assert_closed(&other, ErrorCode::Malformed).await;
        }
    }
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn garbage_on_an_open_stream_ends_it() {
    use FrameType as F;
    let (broker, client) = broker().await;
    let peer = Peer::new(&broker);
    let mut raw = peer.welcomed(&broker).await;
    for body in [&[][..], &[0xff; 7], &[0xff; 60]] {
        let (mut wire, _) = raw.producer().await;
        wire.bytes(&whole(F::Publish, body)).await;
        is(&wire.refusal().await, ErrorCode::Malformed, F::Publish);
        for kind in [F::OpenProducer, F::CloseProducer] {
            let (mut wire, _) = raw.producer().await;
            wire.bytes(&whole(kind, body)).await;
            is(&wire.refusal().await, ErrorCode::Malformed, kind);
        }
        for kind in [F::Acks, F::Settle, F::Commit] {
            let (_deliveries, opened) = raw.consumer("c").await;
            let mut wire = raw.settlements(&opened).await;
            // A commit has room for fields to come behind its own.
            let body = if kind == F::Commit {
                &body[..body.len().min(7)]
            } else {
                body
            };
            wire.bytes(&whole(kind, body)).await;
            is(&wire.refusal().await, ErrorCode::Malformed, kind);
        }
        let mut other = peer.welcomed(&broker).await;
        other.control.bytes(&whole(F::Request, body)).await;
        is(
            &other.control.refusal().await,
            ErrorCode::Malformed,
            F::Request,
        );
        assert_closed(&other, ErrorCode::Malformed).await;
    }
    let (mut wire, _) = raw.consumer("c").await;
    wire.bytes(&whole(F::ConsumerCredit, &[0xff; 23])).await;
    is(
        &wire.refusal().await,
        ErrorCode::Malformed,
        F::ConsumerCredit,
    );
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn messages_that_lie_are_refused_and_nothing_of_them_is_appended() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    let good = || Message::new("m");
    let mut forged = good();
    forged.headers.push(("mp-dead-reason".into(), Bytes::new()));
    let mut flipped = publish_frame(0, 1, &[good()]).to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    let mut left_over = publish_frame(0, 1, &[good(), good()]).to_vec();
    left_over[16] = 1;
    let mut missing = publish_frame(0, 1, &[good()]).to_vec();
    missing[16] = 2;
    for (what, frame, code) in [
        (
            "a reserved header",
            publish_frame(0, 1, &[forged]).to_vec(),
            ErrorCode::ReservedHeader,
        ),
        ("a flipped bit", flipped, ErrorCode::Malformed),
        ("a message too many", left_over, ErrorCode::Malformed),
        ("a message too few", missing, ErrorCode::Malformed),
        (
            "a sequence that falls",
            publish_frame(5, 5, &[good()]).to_vec(),
            ErrorCode::Malformed,
        ),
    ] {
        let (mut wire, _) = raw.producer().await;
        wire.bytes(&frame).await;
        let ended: ProducerEnded = wire.expect(FrameType::ProducerEnded).await;
        let error = ended.error.unwrap();
        assert_eq!((ended.handle, error.code), (FIRST, code), "{what}: {error}");
        // The stream is as good as before for another one.
        wire.open_producer(ProducerHandle(2)).await;
    }
    assert_eq!(client.topic("orders").await.unwrap().next, Offset(0));
    let (mut wire, _) = raw.producer().await;
    wire.bytes(&publish_frame(0, 1, &[])).await;
    is(
        &wire.refusal().await,
        ErrorCode::Malformed,
        FrameType::Publish,
    );
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_version_that_is_not_spoken_is_refused_with_those_that_are() {
    let (broker, client) = broker().await;
    let peer = Peer::new(&broker);
    for (min, max) in [(2, 9), (0, 0), (u16::MAX, u16::MAX), (1, 0)] {
        let connection = peer.dial(&broker).await.unwrap();
        let mut control = Wire::open(&connection).await;
        control.control(FrameType::Hello, &hello(min, max)).await;
        let error = control.refusal().await;
        assert_eq!(error.code, ErrorCode::Version, "{min} to {max}: {error}");
        assert!(error.message.contains("1 to 1"), "{error}");
        let raw = Raw {
            connection,
            control,
        };
        assert_closed(&raw, ErrorCode::Version).await;
    }
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn who_does_not_say_hello_is_sent_away() {
    let (broker, client) = broker_with(|config| config.quic.handshake_deadline_ms = 300).await;
    let peer = Peer::new(&broker);
    let silent = peer.dial(&broker).await.unwrap();
    let half = peer.dial(&broker).await.unwrap();
    let mut wire = Wire::open(&half).await;
    wire.bytes(&head(FrameType::Hello as u8, 100, 0)).await;
    for connection in [silent, half] {
        let closed = timeout(PATIENCE, connection.closed()).await;
        let closed = closed.expect("its time is over");
        assert!(
            matches!(closed, ConnectionError::ApplicationClosed(_)),
            "{closed}"
        );
    }
    for &kind in FrameType::ALL {
        let connection = peer.dial(&broker).await.unwrap();
        let mut control = Wire::open(&connection).await;
        control.bytes(&whole(kind, &[])).await;
        is(&control.refusal().await, ErrorCode::Malformed, kind);
        let raw = Raw {
            connection,
            control,
        };
        assert_closed(&raw, ErrorCode::Malformed).await;
    }
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn another_protocol_and_another_ca_end_in_the_handshake() {
    let (broker, client) = broker().await;
    let web = Peer::speaking(&broker, b"h3").dial(&broker).await;
    const NO_APPLICATION_PROTOCOL: u64 = 0x100 + 120;
    match web {
        Err(ConnectionError::ConnectionClosed(close)) => {
            assert_eq!(u64::from(close.error_code), NO_APPLICATION_PROTOCOL);
        }
        other => panic!("{other:?}"),
    }
    let (stranger, _) = crate::common::broker().await;
    let error = builder(&stranger)
        .connect(&broker.url())
        .await
        .err()
        .unwrap();
    assert!(matches!(error, Error::Tls(_)), "{error:?}");
    assert!(
        error.to_string().contains("not signed by the CA"),
        "{error}"
    );
    assert!(!error.is_retriable());
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
    stranger.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_producer_that_overruns_its_credit_ends_alone() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    let (mut wire, _) = raw.producer().await;
    let second = ProducerHandle(2);
    wire.open_producer(second).await;
    const BATCH: u64 = 4_096;
    let messages = vec![Message::new(""); BATCH as usize];
    // However fast the broker commits, it is told faster.
    let batches = (0..).map(|n| publish_frame(n * BATCH, n * BATCH + 1, &messages));
    let ended = wire.flood(batches).await;
    assert_eq!(ended.handle, FIRST);
    let error = ended.error.unwrap();
    is(&error, ErrorCode::CreditOverrun, FrameType::Publish);
    drop(wire);
    let (mut wire, _) = raw.producer().await;
    wire.open_producer(second).await;
    wire.bytes(&publish_of(second, 0, 1, &[Message::new("m")]))
        .await;
    assert_eq!(acked(&mut wire).await, (second, 1));
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn what_ends_one_producer_of_a_stream_is_nothing_to_the_others() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    let (mut wire, _) = raw.producer().await;
    let [second, third] = [2, 3].map(ProducerHandle);
    wire.open_producer(second).await;
    let good = || [Message::new("m")];
    let mut flipped = publish_frame(0, 1, &good()).to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    wire.bytes(&flipped).await;
    // What it sends before it knows is passed over, however much it is.
    let large = [Message::new(vec![7; 1 << 20])];
    wire.bytes(&publish_frame(0, 1, &large)).await;
    wire.bytes(&publish_of(second, 0, 1, &good())).await;
    let ended: ProducerEnded = wire.expect(FrameType::ProducerEnded).await;
    assert_eq!(ended.handle, FIRST);
    assert_eq!(acked(&mut wire).await, (second, 1));

    let unknown = OpenProducer {
        topic: "nowhere".to_owned(),
        ..open_producer(third)
    };
    wire.control(FrameType::OpenProducer, &unknown).await;
    ended_with(&mut wire, third, ErrorCode::UnknownTopic).await;
    for (handle, id) in [
        (4, String::new()),
        (5, "x".repeat(PRODUCER_ID_BYTES_MAX + 1)),
    ] {
        let handle = ProducerHandle(handle);
        let named = OpenProducer {
            producer_id: Some(id),
            ..open_producer(handle)
        };
        wire.control(FrameType::OpenProducer, &named).await;
        ended_with(&mut wire, handle, ErrorCode::InvalidName).await;
    }
    wire.bytes(&publish_of(second, 1, 2, &good())).await;
    assert_eq!(acked(&mut wire).await, (second, 1));
    assert_eq!(client.topic("orders").await.unwrap().next, Offset(2));
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_handle_that_was_never_given_out_or_is_used_again_ends_the_stream() {
    use FrameType as F;
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    let good = [Message::new("m")];
    for handle in [0, 2, u32::MAX].map(ProducerHandle) {
        let (mut wire, _) = raw.producer().await;
        wire.bytes(&publish_of(handle, 0, 1, &good)).await;
        is(&wire.refusal().await, ErrorCode::Malformed, F::Publish);
        let (mut wire, _) = raw.producer().await;
        let close = CloseProducer {
            handle,
            leaving: Leaving::ForGood,
        };
        wire.control(F::CloseProducer, &close).await;
        is(
            &wire.refusal().await,
            ErrorCode::Malformed,
            F::CloseProducer,
        );
    }
    for handle in [0, 4, 5].map(ProducerHandle) {
        let (mut wire, _) = raw.producer().await;
        wire.open_producer(ProducerHandle(5)).await;
        wire.ask_for_producer(handle).await;
        is(&wire.refusal().await, ErrorCode::Malformed, F::OpenProducer);
    }
    let mut wire = raw.stream().await;
    wire.ask_for_producer(ProducerHandle(0)).await;
    is(&wire.refusal().await, ErrorCode::Malformed, F::OpenProducer);
    // Also not after it has ended.
    let (mut wire, _) = raw.producer().await;
    leave(&mut wire, FIRST, Leaving::ForGood).await;
    wire.ask_for_producer(FIRST).await;
    is(&wire.refusal().await, ErrorCode::Malformed, F::OpenProducer);
    assert_eq!(client.topic("orders").await.unwrap().next, Offset(0));
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_producer_that_left_is_passed_over_and_comes_back_unless_it_left_for_good() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    let (mut wire, mut opened) = raw.producer().await;
    let good = [Message::new("m")];
    wire.bytes(&publish_frame(0, 1, &good)).await;
    assert_eq!(acked(&mut wire).await, (FIRST, 1));
    leave(&mut wire, FIRST, Leaving::ForNow).await;
    wire.bytes(&publish_frame(1, 2, &good)).await;
    // To leave twice is nothing new.
    let close = CloseProducer {
        handle: FIRST,
        leaving: Leaving::ForGood,
    };
    wire.control(FrameType::CloseProducer, &close).await;
    for (handle, last) in [(2, 1), (3, 1)].map(|(n, last)| (ProducerHandle(n), Sequence(last))) {
        let resume = ProducerResume {
            producer: opened.producer,
            epoch: opened.epoch,
            last_known: last,
        };
        let back = OpenProducer {
            resume: Some(resume),
            ..open_producer(handle)
        };
        wire.control(FrameType::OpenProducer, &back).await;
        if handle == ProducerHandle(3) {
            ended_with(&mut wire, handle, ErrorCode::ProducerStateExpired).await;
            continue;
        }
        opened = wire.expect(FrameType::ProducerOpened).await;
        assert_eq!((opened.handle, opened.last_sequence), (handle, last));
        leave(&mut wire, handle, Leaving::ForGood).await;
    }
    assert_eq!(client.topic("orders").await.unwrap().next, Offset(1));
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_producer_too_many_on_a_stream_is_refused_alone() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    let mut wire = raw.stream().await;
    let most = STREAM_PRODUCERS_MAX as u32;
    for handle in 1..=most + 1 {
        wire.ask_for_producer(ProducerHandle(handle)).await;
    }
    ended_with(&mut wire, ProducerHandle(most + 1), ErrorCode::LimitReached).await;
    leave(&mut wire, FIRST, Leaving::ForGood).await;
    let last = ProducerHandle(most + 2);
    wire.ask_for_producer(last).await;
    loop {
        let opened: ProducerOpened = wire.expect(FrameType::ProducerOpened).await;
        if opened.handle == last {
            break;
        }
    }
    wire.bytes(&publish_of(last, 0, 1, &[Message::new("m")]))
        .await;
    assert_eq!(acked(&mut wire).await, (last, 1));
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

/// Leaves, and waits until the broker knows.
async fn leave(wire: &mut Wire, handle: ProducerHandle, leaving: Leaving) {
    let close = CloseProducer { handle, leaving };
    wire.control(FrameType::CloseProducer, &close).await;
    let ended: ProducerEnded = wire.expect(FrameType::ProducerEnded).await;
    assert_eq!((ended.handle, ended.error), (handle, None));
}

async fn ended_with(wire: &mut Wire, handle: ProducerHandle, code: ErrorCode) {
    let ended: ProducerEnded = wire.expect(FrameType::ProducerEnded).await;
    let error = ended.error.expect("it is told why");
    assert_eq!((ended.handle, error.code), (handle, code), "{error}");
}

/// Whose messages the next acknowledgement is of, and how many.
async fn acked(wire: &mut Wire) -> (ProducerHandle, u32) {
    loop {
        let frame = wire.next_of(FrameType::PublishAck).await;
        let ack = PublishAck::decode(&frame.body).unwrap();
        assert!(ack.rows.iter().all(|row| row.kind == AckKind::Appended));
        let count = ack.rows.iter().map(|row| row.count).sum();
        if count > 0 {
            return (ack.handle, count);
        }
    }
}

#[tokio::test]
async fn absurd_credit_is_taken_for_much_and_harms_nobody() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    let (mut wire, opened) = raw.consumer("c").await;
    let mut settlements = raw.settlements(&opened).await;
    let most = Credit {
        max_messages: u64::MAX,
        max_bytes: u64::MAX,
    };
    for (credit, begun) in [(most, u64::MAX), (Credit::default(), 0), (most, 3)] {
        wire.bytes(&ConsumerCredit { credit, begun }.encode()).await;
    }
    publish(&client, &["a", "b"]).await;
    let mut got = Vec::new();
    while got.len() < 2 {
        let frame = wire.next_of(FrameType::Deliver).await;
        got.extend(decode_deliver(frame.body).unwrap());
    }
    let runs: Vec<AckRun> = got
        .iter()
        .map(|got| run(got.meta.offset.0, got.meta.delivery, 1))
        .collect();
    settlements.bytes(&acks(&runs)).await;
    let settled: Settled = settlements.expect(FrameType::Settled).await;
    assert_eq!(settled.refused, []);
    let view = client.subscription("orders", "c").await.unwrap();
    assert_eq!(view.backlog, 0);
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn acks_of_what_was_never_delivered_are_refused_one_by_one() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    let (_wire, opened) = raw.consumer("c").await;
    publish(&client, &["a"]).await;
    let mut settlements = raw.settlements(&opened).await;
    let one = Delivery(1);
    let mut answered = 0;
    for (offset, count) in [(0, 1), (1_000_000, 3), (u64::MAX - 70_000, 65_536)] {
        settlements.bytes(&acks(&[run(offset, one, count)])).await;
        let mut refused: Vec<SettleRefused> = Vec::new();
        answered += u64::from(count);
        loop {
            let settled: Settled = settlements.expect(FrameType::Settled).await;
            refused.extend(settled.refused);
            if settled.upto == answered {
                break;
            }
        }
        assert_eq!(refused.len(), count as usize, "{offset} and {count} on");
        assert!(refused.iter().all(|one| one.code == ErrorCode::LeaseLost));
    }
    let view = client.subscription("orders", "c").await.unwrap();
    assert_eq!(
        (view.backlog, view.floor),
        (1, Offset(0)),
        "nothing was acknowledged"
    );
    for bad in [
        run(0, one, 65_537),
        run(0, one, 0),
        run(0, one, u32::MAX),
        run(u64::MAX, one, 2),
    ] {
        let (_wire, opened) = raw.consumer("c").await;
        let mut settlements = raw.settlements(&opened).await;
        settlements.bytes(&acks(&[bad])).await;
        is(
            &settlements.refusal().await,
            ErrorCode::Malformed,
            FrameType::Acks,
        );
    }
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

/// One small frame may ask for much work and a long answer. Of who does not read those, few are taken in.
#[tokio::test]
async fn acks_of_who_does_not_read_their_answers_are_not_taken_in() {
    let (broker, client) =
        broker_with(|config| config.http = Some(([127, 0, 0, 1], 0).into())).await;
    let http = broker.broker().http_addr().unwrap();
    let peer = Peer::new(&broker).windows(64 << 10, 8 << 20);
    let raw = peer.welcomed(&broker).await;
    let (_wire, opened) = raw.consumer("c").await;
    let mut settlements = raw.settlements(&opened).await;
    const FRAMES: u64 = 8;
    for _ in 0..FRAMES {
        let never_delivered = run(1 << 40, Delivery(1), SETTLE_OFFSETS_MAX as u32);
        settlements.bytes(&acks(&[never_delivered])).await;
    }
    sleep(Duration::from_secs(1)).await;
    let late = late_settlements(http).await;
    let most = 2 * SETTLE_OFFSETS_MAX;
    assert!((1..=most).contains(&late), "{late}");
    let mut refused = 0;
    loop {
        let settled: Settled = settlements.expect(FrameType::Settled).await;
        refused += settled.refused.len() as u64;
        if settled.upto == FRAMES * SETTLE_OFFSETS_MAX {
            break;
        }
    }
    assert_eq!(refused, FRAMES * SETTLE_OFFSETS_MAX, "each in its turn");
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

async fn late_settlements(http: SocketAddr) -> u64 {
    let (_, text) = get(http, "/metrics").await;
    let name = "millpond_settlements_late_total ";
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    value.unwrap().parse().unwrap()
}

/// Every producer within its credit, all of them together beyond what a stream may have untold.
#[tokio::test]
async fn publishes_of_who_does_not_read_the_answers_are_not_taken_in_for_ever() {
    let (broker, client) = broker().await;
    let peer = Peer::new(&broker).windows(1_024, 64 << 10);
    let raw = peer.welcomed(&broker).await;
    let (mut wire, _) = raw.producer().await;
    let others: Vec<_> = (2..=8).map(ProducerHandle).collect();
    for &other in &others {
        wire.open_producer(other).await;
    }
    const EACH: u64 = 8_000;
    let all = EACH * (1 + others.len() as u64);
    let mut frames = BytesMut::new();
    for n in 0..EACH {
        for &handle in [FIRST].iter().chain(&others) {
            frames.put_slice(&publish_of(handle, n, n + 1, &[Message::new("")]));
        }
    }
    let mut left = frames.freeze();
    while let Ok(written) = timeout(Duration::from_secs(2), wire.send.write(&left)).await {
        left.advance(written.unwrap());
        assert!(!left.is_empty(), "all {all} were taken in");
    }
    let taken = client.topic("orders").await.unwrap().next;
    assert!(taken > Offset(16_384) && taken < Offset(all / 2), "{taken}");
    // Once they are read, it goes on.
    let (mut told, mut writing) = (0, left);
    while told < all {
        if writing.is_empty() {
            told += u64::from(acked(&mut wire).await.1);
            continue;
        }
        tokio::select! {
            written = wire.send.write(&writing) => writing.advance(written.unwrap()),
            () = sleep(Duration::from_millis(1)) => {
                let acked = timeout(Duration::from_millis(100), acked(&mut wire)).await;
                told += acked.map_or(0, |(_, count)| u64::from(count));
            }
        }
    }
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_session_is_settled_by_nobody_who_does_not_have_its_token() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    let (_wire, opened) = raw.consumer("c").await;
    for (session, token) in [
        (opened.session, opened.token ^ 1),
        (SessionId(opened.session.0 + 1), opened.token),
        (SessionId(u64::MAX), 0),
    ] {
        let mut wire = raw.stream().await;
        let open = OpenSettlements { session, token };
        wire.control(FrameType::OpenSettlements, &open).await;
        is(
            &wire.refusal().await,
            ErrorCode::SessionEnded,
            FrameType::OpenSettlements,
        );
    }
    raw.ping().await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

async fn assert_closed(raw: &Raw, code: ErrorCode) {
    let closed = timeout(Duration::from_secs(5), raw.connection.closed()).await;
    match closed.expect("the connection ends with its control stream") {
        ConnectionError::ApplicationClosed(close) => {
            assert_eq!(u64::from(close.error_code), u64::from(u16::from(code)));
            assert!(!close.reason.is_empty());
        }
        other => panic!("{other}"),
    }
}

fn run(offset: u64, delivery: Delivery, run: u32) -> AckRun {
    AckRun {
        offset: Offset(offset),
        delivery,
        run,
    }
}

fn acks(runs: &[AckRun]) -> Bytes {
    let mut out = BytesMut::new();
    encode_acks(runs, &mut out);
    out.freeze()
}

/// What a reason says goes with every delivery of the dead letter.
#[tokio::test]
async fn a_reason_beyond_its_limit_is_refused_and_settles_nothing() {
    let (broker, client) = broker().await;
    let raw = Peer::new(&broker).welcomed(&broker).await;
    let (mut wire, opened) = raw.consumer("c").await;
    let mut settlements = raw.settlements(&opened).await;
    let credit = Credit {
        max_messages: 1,
        max_bytes: 1_000,
    };
    wire.bytes(&ConsumerCredit { credit, begun: 1 }.encode())
        .await;
    publish(&client, &["a"]).await;
    let frame = wire.next_of(FrameType::Deliver).await;
    let meta = decode_deliver(frame.body).unwrap()[0].meta;
    let item = SettleItem {
        lease: LeaseName {
            offset: meta.offset,
            delivery: meta.delivery,
        },
        outcome: Outcome::Reject {
            kind: RejectKind::Rejected,
            code: 0,
            reason: "x".repeat(REASON_BYTES_MAX + 1),
        },
    };
    let settle = Settle { items: vec![item] };
    settlements.control(FrameType::Settle, &settle).await;
    is(
        &settlements.refusal().await,
        ErrorCode::TooLarge,
        FrameType::Settle,
    );
    let view = client.subscription("orders", "c").await.unwrap();
    assert_eq!((view.backlog, view.dead), (1, 0));
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}
