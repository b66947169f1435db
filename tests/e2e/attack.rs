//! Floods: of packets, handshakes, streams, frames. What others publish is measured meanwhile.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use millpond_broker::EmbeddedBroker;
use millpond_client::{Client, Message};
use millpond_protocol::frame::{FrameType, body_bytes_max};
use millpond_protocol::hot::{ConsumerCredit, Credit};
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::common::{PATIENCE, broker, broker_with, producer};
use crate::hostile::still_serves;
use crate::raw::{Peer, Wire, head, publish as publish_frame, whole};

/// The slowest hundredth of a good client's publishes takes no longer, whatever goes on beside it, in an
/// unoptimised build whose attackers run on the same two processors.
const P99_MAX: Duration = Duration::from_millis(250);
/// So many times what it took in peace may be added, for what else the machine is doing.
const IN_PEACE_TIMES: u32 = 5;
/// How long peace is measured, and each attack.
const PEACE: Duration = Duration::from_secs(1);
const ATTACK: Duration = Duration::from_secs(2);
/// A breath between two blows of one attacker, so that it is the broker that is tried and not the machine.
const BREATH: Duration = Duration::from_millis(1);

/// One attack at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

/// A good client, and how long its publishes take while nobody attacks.
struct Bystander<'a> {
    client: &'a Client,
    in_peace: Duration,
    _alone: MutexGuard<'static, ()>,
}

impl<'a> Bystander<'a> {
    async fn new(client: &'a Client) -> Self {
        let alone = ALONE.lock().await;
        Self {
            client,
            in_peace: p99_of_publishes(client, PEACE).await,
            _alone: alone,
        }
    }

    /// Publishes for as long as an attack lasts, and judges how long it took.
    async fn suffer(self, name: &str, mut attackers: JoinSet<()>) {
        let p99 = p99_of_publishes(self.client, ATTACK).await;
        let stopped = attackers.try_join_next();
        assert!(stopped.is_none(), "an attacker has stopped: {stopped:?}");
        attackers.shutdown().await;
        #[expect(clippy::print_stdout, reason = "figures for who runs it")]
        {
            println!(
                "durability: hostile_{name}_publish_p99_us {}",
                p99.as_micros()
            );
        }
        let most = P99_MAX + IN_PEACE_TIMES * self.in_peace;
        let in_peace = self.in_peace;
        assert!(p99 < most, "{name}: p99 is {p99:?}, in peace {in_peace:?}");
    }
}

/// Publishes one message after the other.
async fn p99_of_publishes(client: &Client, time: Duration) -> Duration {
    let producer = producer(client).await;
    let mut took = Vec::new();
    let began = Instant::now();
    while began.elapsed() < time {
        let sent = Instant::now();
        producer.send(Message::new("x")).await.unwrap();
        took.push(sent.elapsed());
        sleep(BREATH).await;
    }
    took.sort();
    took[took.len() * 99 / 100]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_packets_that_are_none_slows_nobody_down() {
    let (broker, client) = broker().await;
    let at = broker.broker().listen_addr();
    let bystander = Bystander::new(&client).await;
    let mut attackers = JoinSet::new();
    for _ in 0..2 {
        attackers.spawn(async move {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            for n in 0u32.. {
                // Long headers with good and bad versions, short headers, and sizes of all kinds.
                let mut packet = vec![n as u8; 1 + (n as usize * 97) % 1_400];
                packet[0] = [0xc3, 0x40, 0xff, 0x00][n as usize % 4];
                if let Some(version) = packet.get_mut(1..5) {
                    version.copy_from_slice(&(n % 3).to_be_bytes());
                }
                let _ = socket.send_to(&packet, at);
                if n % 16 == 0 {
                    sleep(BREATH).await;
                }
            }
        });
    }
    bystander.suffer("packets", attackers).await;
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_handshakes_slows_nobody_down() {
    let (broker, client) = broker_with(|config| {
        config.quic.handshake_deadline_ms = 500;
    })
    .await;
    let broker = Arc::new(broker);
    let bystander = Bystander::new(&client).await;
    let mut attackers = JoinSet::new();
    for _ in 0..2 {
        let broker = Arc::clone(&broker);
        attackers.spawn(async move {
            let peer = Peer::new(&broker);
            let mut open = std::collections::VecDeque::new();
            loop {
                // None of them ever says hello; the broker ends them by itself.
                if let Ok(connection) = peer.dial(&broker).await {
                    open.push_back(connection);
                }
                if open.len() > 200 {
                    open.pop_front();
                }
                sleep(5 * BREATH).await;
            }
        });
    }
    bystander.suffer("handshakes", attackers).await;
    still_serves(&client).await;
    shut_down(broker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_streams_slows_nobody_down() {
    let (broker, client) = broker().await;
    let broker = Arc::new(broker);
    let bystander = Bystander::new(&client).await;
    let mut attackers = JoinSet::new();
    for n in 0..2usize {
        let broker = Arc::clone(&broker);
        attackers.spawn(async move {
            let raw = Peer::new(&broker).welcomed(&broker).await;
            let mut open = Vec::new();
            for (m, &kind) in FrameType::ALL.iter().cycle().enumerate() {
                // Some are ended by what they say, some are left open and say nothing more.
                let mut wire = raw.stream().await;
                match (n + m) % 3 {
                    0 => wire.bytes(&whole(kind, &[0xff; 30])).await,
                    1 => wire.bytes(&[0]).await,
                    _ => {
                        let _ = wire.send.reset(0u32.into());
                    }
                }
                open.push(wire);
                if open.len() > 300 {
                    open.clear();
                }
                sleep(BREATH).await;
            }
        });
    }
    bystander.suffer("streams", attackers).await;
    still_serves(&client).await;
    shut_down(broker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_frames_of_every_type_slow_nobody_down() {
    let (broker, client) = broker().await;
    let broker = Arc::new(broker);
    let bystander = Bystander::new(&client).await;
    let mut attackers = JoinSet::new();
    for n in 0..2usize {
        let broker = Arc::clone(&broker);
        attackers.spawn(async move {
            let peer = Peer::new(&broker);
            let mut raw = peer.welcomed(&broker).await;
            for (m, &kind) in FrameType::ALL.iter().cycle().enumerate() {
                let frame = match (n + m) % 4 {
                    0 => head(kind as u8, u32::MAX, 0).to_vec(),
                    1 => head(kind as u8, 4, 0x80).to_vec(),
                    2 => whole(kind, &[0xff; 40]),
                    _ => whole(kind, &[])[..5].to_vec(),
                };
                let mut wire = raw.producer().await.0;
                wire.bytes(&frame).await;
                wire.finish();
                let (mut deliveries, opened) = raw.consumer("c").await;
                let mut settlements = raw.settlements(&opened).await;
                deliveries.bytes(&frame).await;
                deliveries.finish();
                settlements.bytes(&frame).await;
                settlements.finish();
                if m % 8 == 0 {
                    // Its own connection ends with its control stream.
                    raw.control.bytes(&frame).await;
                    raw = peer.welcomed(&broker).await;
                }
                sleep(5 * BREATH).await;
            }
        });
    }
    bystander.suffer("malformed", attackers).await;
    still_serves(&client).await;
    shut_down(broker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_writers_and_slow_readers_slow_nobody_down() {
    let (broker, client) = broker_with(|config| config.memory.budget_bytes = 192 << 20).await;
    let broker = Arc::new(broker);
    let bystander = Bystander::new(&client).await;
    let mut attackers = JoinSet::new();
    for n in 0..4u64 {
        let broker = Arc::clone(&broker);
        attackers.spawn(async move {
            let raw = Peer::new(&broker).window(2_048).welcomed(&broker).await;
            // A frame that comes byte by byte, on each stream there is.
            let (mut writer, _) = raw.producer().await;
            let (mut reader, opened) = raw.consumer(&format!("slow-{n}")).await;
            let mut settlements = raw.settlements(&opened).await;
            let credit = match n {
                // Nothing may ever be sent to this one.
                0 => Credit::default(),
                _ => Credit {
                    max_messages: u64::MAX,
                    max_bytes: u64::MAX,
                },
            };
            let begun = u64::MAX;
            reader
                .bytes(&ConsumerCredit { credit, begun }.encode())
                .await;
            let frame = publish_frame(0, 1, &vec![Message::new(vec![7; 1_000]); 1_000]);
            let settle = whole(FrameType::Settle, &vec![0xff; 1 << 20]);
            for at in 0.. {
                writer.bytes(&frame[at..=at]).await;
                settlements.bytes(&settle[at..=at]).await;
                sleep(5 * BREATH).await;
            }
        });
    }
    bystander.suffer("slow", attackers).await;
    still_serves(&client).await;
    shut_down(broker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn producers_that_overrun_their_credit_slow_nobody_down() {
    let (broker, client) = broker().await;
    let broker = Arc::new(broker);
    let bystander = Bystander::new(&client).await;
    let mut attackers = JoinSet::new();
    let broker_too = Arc::clone(&broker);
    attackers.spawn(async move {
        let raw = Peer::new(&broker_too).welcomed(&broker_too).await;
        const BATCH: u64 = 4_096;
        let messages = vec![Message::new(""); BATCH as usize];
        loop {
            let (mut wire, _) = raw.producer().await;
            for n in 0..40 {
                wire.bytes(&publish_frame(n * BATCH, n * BATCH + 1, &messages))
                    .await;
                sleep(BREATH).await;
            }
            let _ = wire.send.reset(0u32.into());
        }
    });
    bystander.suffer("overrun", attackers).await;
    // Much of what it sent may still be on its way into the topic.
    timeout(PATIENCE, client.ping()).await.unwrap().unwrap();
    shut_down(broker).await;
}

/// Where a frame of another type belongs, one of the largest size is refused by its header: nothing is
/// kept of it, however slowly its body comes.
#[tokio::test]
async fn a_large_frame_that_does_not_belong_is_refused_before_it_is_there() {
    let (broker, client) = broker().await;
    let peer = Peer::new(&broker);
    let raw = peer.welcomed(&broker).await;
    let large = |kind: &&FrameType| body_bytes_max(**kind) > 64 << 10;
    for &kind in FrameType::ALL.iter().filter(large) {
        let head = head(kind as u8, body_bytes_max(kind) as u32, 0);
        let stranger = peer.dial(&broker).await.unwrap();
        let mut wires = vec![Wire::open(&stranger).await, raw.stream().await];
        let (deliveries, opened) = raw.consumer("c").await;
        if ![FrameType::Acks, FrameType::Settle].contains(&kind) {
            wires.push(raw.settlements(&opened).await);
        }
        wires.push(deliveries);
        if kind != FrameType::Publish {
            wires.push(raw.producer().await.0);
        }
        if kind != FrameType::Request {
            wires.push(peer.welcomed(&broker).await.control);
        }
        for (nth, mut wire) in wires.into_iter().enumerate() {
            wire.bytes(&head).await;
            let refused = timeout(Duration::from_secs(2), wire.refusal()).await;
            let refused = refused.unwrap_or_else(|_| panic!("{kind:?} is waited for, {nth}"));
            assert!(refused.message.contains("not expected"), "{refused}");
        }
    }
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

/// Answers that nobody reads are held for a few requests only; the rest is not read, however many answers
/// are read one by one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_of_who_reads_no_answers_are_not_taken_in() {
    let (broker, client) = broker_with(|config| config.quic.stream_window_bytes = 64 << 10).await;
    for n in 0..200 {
        let name = format!("topic-{n}");
        client
            .create_topic(&name, Default::default())
            .await
            .unwrap();
    }
    let peer = Peer::new(&broker).windows(1_024, 64 << 10);
    let mut raw = peer.welcomed(&broker).await;
    let request = millpond_protocol::control::RequestFrame {
        id: 7,
        request: millpond_client::Request::TopicList {
            after: Some("a".repeat(100 << 10)),
            limit: 1_000,
        },
    };
    let request = millpond_protocol::frame::encode(FrameType::Request, &request).unwrap();
    let (mut taken, mut at) = (0, 0);
    for _ in 0..3 {
        let mut write = async |at: usize| {
            let writing = raw.control.send.write(&request[at..]);
            timeout(Duration::from_millis(500), writing).await
        };
        while let Ok(written) = write(at).await {
            at += written.unwrap();
            if at == request.len() {
                (taken, at) = (taken + 1, 0);
                assert!(taken < 40, "{taken} requests were taken in");
            }
        }
        raw.control.next_of(FrameType::Response).await;
    }
    assert!(taken >= 8, "only {taken}");
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

/// Numbers that a client uses twice confuse nobody: every request has its answer.
#[tokio::test]
async fn requests_of_one_number_are_answered_one_by_one() {
    let (broker, client) = broker().await;
    let mut raw = Peer::new(&broker).welcomed(&broker).await;
    let request = |request| millpond_protocol::control::RequestFrame { id: 7, request };
    let names = ["a", "b", "c"];
    for name in names {
        let name = name.to_owned();
        let new = request(millpond_client::Request::TokenNew { name });
        raw.control.control(FrameType::Request, &new).await;
    }
    for name in names {
        let answer: millpond_protocol::control::ResponseFrame =
            raw.control.expect(FrameType::Response).await;
        match answer.result.unwrap() {
            millpond_client::Response::Token { name: told, .. } => assert_eq!(told, name),
            other => panic!("{other:?}"),
        }
    }
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

/// The first packet of a client that then falls silent: a spoofed address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_not_proven_gets_three_times_what_it_sent_and_no_datagram_more() {
    let (broker, client) = broker().await;
    let at = broker.broker().listen_addr();
    let front = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await;
    let front = front.unwrap();
    let dialled = front.local_addr().unwrap();
    let peer = Peer::new(&broker);
    let dialling = tokio::spawn(async move {
        // It never succeeds: nothing is sent back to it.
        let _ = peer.dial_at(dialled).await;
    });
    // What is sent to an address of which nothing is known.
    const DATAGRAM: usize = 1_200;
    let mut packet = [0; 2_048];
    let (sent, _) = timeout(PATIENCE, front.recv_from(&mut packet))
        .await
        .unwrap()
        .unwrap();
    let victim = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await;
    let victim = victim.unwrap();
    victim.send_to(&packet[..sent], at).await.unwrap();
    let mut got = 0;
    let listening = async {
        let mut buffer = [0; 2_048];
        loop {
            got += victim.recv_from(&mut buffer).await.unwrap().0;
        }
    };
    // Long enough for everything that would be sent again.
    let _: Result<(), _> = timeout(Duration::from_secs(3), listening).await;
    assert!(got > 0, "the broker answers it");
    // The transport sends a whole datagram if it may send any of it.
    assert!(got < 3 * sent + DATAGRAM, "{got} bytes for {sent}");
    dialling.abort();
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

#[tokio::test]
async fn nothing_is_taken_from_a_client_before_the_handshake_is_over() {
    let (broker, client) = broker().await;
    let peer = Peer::new(&broker).early();
    for _ in 0..2 {
        let connection = peer.dial(&broker).await.unwrap();
        // Time for a ticket to arrive, if one were sent.
        sleep(Duration::from_millis(50)).await;
        connection.close(0u32.into(), b"");
        assert!(
            !peer.can_begin_early(&broker),
            "the broker takes early data"
        );
    }
    still_serves(&client).await;
    broker.shutdown().await.unwrap();
}

/// What attackers held of it goes with their tasks.
async fn shut_down(broker: Arc<EmbeddedBroker>) {
    let deadline = Instant::now() + PATIENCE;
    let mut broker = broker;
    loop {
        match Arc::try_unwrap(broker) {
            Ok(alone) => return alone.shutdown().await.unwrap(),
            Err(shared) => broker = shared,
        }
        assert!(Instant::now() < deadline, "an attacker still holds it");
        sleep(BREATH).await;
    }
}
