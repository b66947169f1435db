//! Peers that take what there is: time, streams, connections, memory. Others go on.

use std::time::{Duration, Instant};

use millpond_client::{Client, ErrorCode, Message, Subscription};
use millpond_protocol::frame::{FrameType, HEADER_BYTES};
use millpond_protocol::hot::{ConsumerCredit, Credit};
use millpond_protocol::limits::PUBLISH_BYTES_MAX;
use tokio::time::timeout;

use crate::common::{
    PATIENCE, broker, broker_with, next, producer, quick_retries, subscribe, text,
};
use crate::hostile::still_serves;
use crate::raw::{Peer, Wire, head, publish as publish_frame};

/// Longest that a publish and its delivery may take while others misbehave: a busy machine's worth.
const BOUNDED: Duration = Duration::from_secs(3);

#[tokio::test]
async fn a_consumer_that_never_reads_slows_nobody_down() {
    let (broker, client) = broker().await;
    let mut good = subscribe(&client, "good", quick_retries(1, 3)).await;
    let mut raw = Peer::new(&broker).window(4_096).welcomed(&broker).await;
    let mut deaf = Vec::new();
    for name in ["deaf", "deaf too", "deaf", "deaf too"] {
        let (mut wire, _) = raw.consumer(&name.replace(' ', "-")).await;
        let credit = Credit {
            max_messages: u64::MAX,
            max_bytes: u64::MAX,
        };
        wire.bytes(&ConsumerCredit { credit, begun: 0 }.encode())
            .await;
        deaf.push(wire);
    }
    let slowest = publish_and_take(&client, &mut good, 300, 32 << 10).await;
    assert!(slowest < BOUNDED, "a message took {slowest:?}");
    raw.ping().await;
    still_serves(&client).await;
    drop(deaf);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_crowd_that_never_reads_keeps_no_memory_from_others() {
    let (broker, client) = broker_with(|config| config.memory.budget_bytes = 192 << 20).await;
    let mut good = subscribe(&client, "good", quick_retries(1, 3)).await;
    publish_and_take(&client, &mut good, 20, 32 << 10).await;
    let peer = Peer::new(&broker).window(4_096);
    let (mut raws, mut deaf) = (Vec::new(), Vec::new());
    // 300 frames of 256 KiB are more than the budget.
    for n in 0..5 {
        let raw = peer.welcomed(&broker).await;
        for m in 0..60 {
            let (mut wire, _) = raw.consumer(&format!("deaf-{n}-{m}")).await;
            let credit = Credit {
                max_messages: u64::MAX,
                max_bytes: u64::MAX,
            };
            wire.bytes(&ConsumerCredit { credit, begun: 0 }.encode())
                .await;
            deaf.push(wire);
        }
        raws.push(raw);
    }
    let slowest = publish_and_take(&client, &mut good, 20, 1_000).await;
    assert!(slowest < 2 * BOUNDED, "a message took {slowest:?}");
    still_serves(&client).await;
    drop(deaf);
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn frames_that_are_announced_and_never_sent_keep_their_memory_only_while_nobody_waits() {
    let (broker, client) = broker_with(|config| config.memory.budget_bytes = 192 << 20).await;
    let mut good = subscribe(&client, "good", quick_retries(1, 3)).await;
    let peer = Peer::new(&broker);
    let (mut raws, mut wires) = (Vec::new(), Vec::new());
    // The first has what the topic may have, the others wait for it one after the other.
    for _ in 0..2 {
        let mut raw = peer.welcomed(&broker).await;
        let (mut wire, _) = raw.producer().await;
        let head = head(FrameType::Publish as u8, PUBLISH_BYTES_MAX as u32, 0);
        // With so much of it that the broker knows whose it is.
        let fixed = &publish_frame(0, 1, &[])[HEADER_BYTES..];
        wire.bytes(&[&head, fixed].concat()).await;
        raw.ping().await;
        wires.push(wire);
        raws.push(raw);
    }
    let slowest = publish_and_take(&client, &mut good, 20, 1_000).await;
    assert!(slowest < 2 * BOUNDED, "a message took {slowest:?}");
    assert_eq!(wires[0].refusal().await.code, ErrorCode::Memory);
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_idle_connections_are_no_burden() {
    let (broker, client) = broker().await;
    let mut good = subscribe(&client, "good", quick_retries(1, 3)).await;
    let peer = Peer::new(&broker);
    let mut idle = Vec::new();
    for _ in 0..500 {
        idle.push(peer.welcomed(&broker).await);
    }
    let slowest = publish_and_take(&client, &mut good, 100, 1_000).await;
    assert!(slowest < BOUNDED, "a message took {slowest:?}");
    assert_eq!(client.status().await.unwrap().connections, 501);
    // They idle for longer than a connection may be silent, and are still there.
    for raw in idle.iter_mut().step_by(50) {
        raw.ping().await;
    }
    for raw in &idle {
        assert!(raw.connection.close_reason().is_none());
        raw.connection.close(0u32.into(), b"");
    }
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn connections_beyond_the_limit_are_refused_and_the_rest_goes_on() {
    let (broker, client) = broker_with(|config| config.quic.max_connections = 4).await;
    let peer = Peer::new(&broker);
    let mut raws = Vec::new();
    for _ in 0..3 {
        raws.push(peer.welcomed(&broker).await);
    }
    for _ in 0..3 {
        assert!(peer.dial(&broker).await.is_err(), "the fifth is refused");
    }
    still_serves(&client).await;
    let leaves = raws.pop().unwrap().connection;
    leaves.close(0u32.into(), b"");
    let deadline = Instant::now() + PATIENCE;
    while peer.dial(&broker).await.is_err() {
        assert!(
            Instant::now() < deadline,
            "its place is not given to another"
        );
    }
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn streams_beyond_the_limit_wait_and_silent_ones_are_ended() {
    let (broker, client) = broker_with(|config| {
        config.quic.streams_max = 8;
        config.quic.handshake_deadline_ms = 500;
    })
    .await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    let mut flood = Vec::new();
    // The control stream is one of the eight. A stream exists once something is said on it.
    for _ in 0..7 {
        let mut wire = raw.stream().await;
        wire.bytes(&[1]).await;
        flood.push(wire);
    }
    let ninth = timeout(Duration::from_millis(100), raw.connection.open_bi()).await;
    assert!(ninth.is_err(), "a ninth stream was opened");
    raw.ping().await;
    for wire in &mut flood {
        assert_eq!(wire.refusal().await.code, ErrorCode::Malformed);
        let _ = wire.send.reset(0u32.into());
    }
    let mut wire: Wire = raw.stream().await;
    wire.bytes(&head(FrameType::Hello as u8, 0, 0)).await;
    assert_eq!(wire.refusal().await.code, ErrorCode::Malformed);
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_requester_that_reads_no_answers_keeps_nobody_from_theirs() {
    let (broker, client) = broker().await;
    for n in 0..200 {
        let name = format!("topic-{n}");
        client
            .create_topic(&name, Default::default())
            .await
            .unwrap();
    }
    let mut raw = Peer::new(&broker).window(1_024).welcomed(&broker).await;
    let list = millpond_protocol::control::RequestFrame {
        id: 1,
        request: millpond_client::Request::TopicList {
            after: None,
            limit: 1_000,
        },
    };
    let list = millpond_protocol::frame::encode(FrameType::Request, &list).unwrap();
    let asking = async {
        for _ in 0..2_000 {
            raw.control.bytes(&list).await;
        }
    };
    // The broker stops reading what it cannot answer; the rest stays with the asker.
    let _ = timeout(Duration::from_millis(500), asking).await;
    let mut good = subscribe(&client, "good", quick_retries(1, 3)).await;
    let slowest = publish_and_take(&client, &mut good, 50, 1_000).await;
    assert!(slowest < BOUNDED, "a message took {slowest:?}");
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

/// Publishes one message after the other and takes each; the longest that one took.
async fn publish_and_take(
    client: &Client,
    consumer: &mut Subscription,
    count: usize,
    bytes: usize,
) -> Duration {
    let producer = producer(client).await;
    let mut slowest = Duration::ZERO;
    for n in 0..count {
        let began = Instant::now();
        let payload = format!("{n:0>bytes$}");
        producer.send(Message::new(payload.clone())).await.unwrap();
        let delivery = next(consumer).await;
        slowest = slowest.max(began.elapsed());
        assert_eq!(text(&delivery), payload);
        delivery.ack().await.unwrap();
    }
    slowest
}
