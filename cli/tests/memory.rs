//! Memory of the real binary: whatever clients do, its resident anonymous memory stays within the
//! configured budget, and its descriptors stay few.
//!
//! The broker is a process of its own, so what is measured is what an operator sees. The peers share
//! one UDP socket, so the test needs few descriptors itself, whatever `ulimit -n` allows.

#![allow(clippy::unwrap_used, reason = "a helper of tests fails as a test does")]

mod common;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use millpond_client::{Client, Message, Producer, StartAt, SubscriptionConfig, TopicConfig};
use millpond_protocol::ALPN;
use millpond_protocol::control::{
    ConsumerOpened, CreateSubscription, Hello, OpenConsumer, Welcome,
};
use millpond_protocol::frame::{self, Frame, FrameType};
use millpond_protocol::hot::{ConsumerCredit, Credit};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, Endpoint, RecvStream, SendStream, TransportConfig, VarInt};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::common::Broker;

const LOAD: Duration = Duration::from_secs(3);

/// Everything that a scenario holds on to until it is over.
struct Load {
    broker: Broker,
    client: Client,
    peers: Endpoint,
    idle: Vec<Raw>,
    producers: Vec<tokio::task::JoinHandle<()>>,
    hoarders: Vec<millpond_client::Subscription>,
    published: Arc<AtomicU64>,
    sampler: Sampler,
}

impl Load {
    async fn on(budget: u64) -> Self {
        let broker = Broker::with(&format!("[memory]\nbudget_bytes = {budget}\n"));
        let client = connect(&broker).await;
        client
            .create_topic("orders", TopicConfig::default())
            .await
            .unwrap();
        let sampler = Sampler::start(broker.pid());
        let peers = peers(&broker);
        Self {
            broker,
            client,
            peers,
            idle: Vec::new(),
            producers: Vec::new(),
            hoarders: Vec::new(),
            published: Arc::default(),
            sampler,
        }
    }

    /// Producers that never stop, one for each size.
    async fn producers(&mut self, sizes: &[usize]) {
        for &size in sizes {
            let client = connect(&self.broker).await;
            let producer = client.producer("orders").open().await.unwrap();
            let published = Arc::clone(&self.published);
            self.producers
                .push(tokio::spawn(publish(producer, size, published)));
        }
    }

    /// Consumers that take all they get and never acknowledge.
    async fn hoarders(&mut self, count: usize) {
        for n in 0..count {
            let hoarder = self
                .client
                .subscribe("orders", format!("hoarder-{n}"))
                .prefetch(1_000_000)
                .prefetch_bytes(256 << 20)
                .create(SubscriptionConfig::default(), StartAt::Earliest);
            self.hoarders.push(hoarder.open().await.unwrap());
        }
    }

    /// Consumers that give credit for everything and read nothing.
    async fn deaf(&mut self, count: usize) {
        for n in 0..count {
            let raw = self.raw().await;
            let mut wire = Wire::open(&raw.connection).await;
            let open = OpenConsumer {
                topic: "orders".to_owned(),
                subscription: format!("deaf-{n}"),
                create: Some(CreateSubscription {
                    config: SubscriptionConfig::default(),
                    start: StartAt::Earliest,
                }),
                resume: None,
                consumer_name: "deaf".to_owned(),
            };
            wire.write(FrameType::OpenConsumer, &open).await;
            let _: ConsumerOpened = wire.read().await;
            let credit = ConsumerCredit {
                credit: Credit {
                    max_messages: 1 << 30,
                    max_bytes: 1 << 40,
                },
                begun: 0,
            };
            wire.send.write_all(&credit.encode()).await.unwrap();
            self.idle.push(Raw {
                _wires: vec![wire],
                ..raw
            });
        }
    }

    async fn idle(&mut self, count: usize) {
        for _ in 0..count {
            let raw = self.raw().await;
            self.idle.push(raw);
        }
    }

    async fn raw(&self) -> Raw {
        let at = self.broker.listen.parse().unwrap();
        let connection = self.peers.connect(at, "localhost").unwrap().await.unwrap();
        let mut control = Wire::open(&connection).await;
        let hello = Hello {
            version_min: 1,
            version_max: 1,
            token: None,
            client_name: "raw".to_owned(),
        };
        control.write(FrameType::Hello, &hello).await;
        let _: Welcome = control.read().await;
        Raw {
            connection,
            _wires: Vec::new(),
            _control: control,
        }
    }

    async fn run(self, what: &str, budget: u64) {
        tokio::time::sleep(LOAD).await;
        let descriptors = descriptors(self.broker.pid());
        let published = self.published.load(Ordering::Relaxed);
        let alive = tokio::time::timeout(Duration::from_secs(10), self.client.ping()).await;
        for task in &self.producers {
            task.abort();
        }
        let peak = self.sampler.stop();
        tell(&format!(
            "durability: rss_anon_peak_mib_{what}_of_{} {:.1}",
            budget >> 20,
            peak as f64 / f64::from(1 << 20)
        ));
        tell(&format!(
            "{what}: {descriptors} descriptors, {} MiB published",
            published >> 20
        ));
        alive.expect("it answers").unwrap();
        assert!(
            peak <= budget,
            "{what}: {peak} bytes at a budget of {budget}"
        );
        assert!(descriptors <= DESCRIPTORS_MAX, "{descriptors} descriptors");
    }
}

async fn connect(broker: &Broker) -> Client {
    let url = format!("millpond://{}", broker.listen);
    Client::builder()
        .ca_file(broker.data.join("tls").join("ca.pem"))
        .connect(&url)
        .await
        .unwrap()
}

async fn publish(producer: Producer, size: usize, published: Arc<AtomicU64>) {
    let payload = Bytes::from(vec![7; size]);
    loop {
        // Backpressure is what is wanted here.
        match producer.enqueue(Message::new(payload.clone())).await {
            Ok(_) => {
                published.fetch_add(size as u64, Ordering::Relaxed);
            }
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

fn peers(broker: &Broker) -> Endpoint {
    let mut roots = rustls::RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(broker.data.join("tls").join("ca.pem")).unwrap();
    roots.add(ca).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(4 << 20))
        .keep_alive_interval(Some(Duration::from_secs(2)));
    config.transport_config(Arc::new(transport));
    let mut endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    endpoint.set_default_client_config(config);
    endpoint
}

/// A connection that was welcomed.
struct Raw {
    connection: Connection,
    _wires: Vec<Wire>,
    _control: Wire,
}

/// One stream.
struct Wire {
    send: SendStream,
    recv: RecvStream,
    buffer: BytesMut,
}

impl Wire {
    async fn open(connection: &Connection) -> Self {
        let (send, recv) = connection.open_bi().await.unwrap();
        Self {
            send,
            recv,
            buffer: BytesMut::new(),
        }
    }

    async fn write<T: Serialize>(&mut self, kind: FrameType, value: &T) {
        let frame = frame::encode(kind, value).unwrap();
        self.send.write_all(&frame).await.unwrap();
    }

    async fn read<T: DeserializeOwned>(&mut self) -> T {
        let frame: Frame = loop {
            if let Some(frame) = frame::decode(&mut self.buffer).unwrap() {
                break frame;
            }
            let chunk = self
                .recv
                .read_chunk(usize::MAX, true)
                .await
                .unwrap()
                .unwrap();
            self.buffer.extend_from_slice(&chunk.bytes);
        };
        frame.decode().unwrap()
    }
}

/// Looks at a process's memory all the time, from a thread of its own.
struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Sampler {
    fn start(pid: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut peak = 0;
            while !stopped.load(Ordering::Relaxed) {
                peak = peak.max(rss_anon(pid));
                std::thread::sleep(SAMPLE_EVERY);
            }
            peak
        });
        Self { stop, thread }
    }

    /// The most that was seen.
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

#[expect(clippy::print_stdout, reason = "it is read in the log of a run")]
fn tell(what: &str) {
    println!("{what}");
}

/// Bytes of memory that are the process's own, not the page cache's.
fn rss_anon(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

const SAMPLE_EVERY: Duration = Duration::from_millis(10);
/// Connections that are begun, in all.
const FLOOD: usize = 2_000;
const DESCRIPTORS_MAX: usize = 128;
const BUDGETS: [u64; 2] = [192 << 20, 512 << 20];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_are_given_up() {
    for budget in BUDGETS {
        let load = Load::on(budget).await;
        let at = load.broker.listen.parse().unwrap();
        let mut begun = std::collections::VecDeque::new();
        // Each is dropped while it is under way or has just ended, and nothing is ever said on it.
        for _ in 0..FLOOD {
            begun.push_back(load.peers.connect(at, "localhost").unwrap());
            if begun.len() > 200 {
                begun.pop_front();
            }
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
        load.run("handshakes", budget).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_but_a_topic() {
    for budget in BUDGETS {
        let load = Load::on(budget).await;
        load.run("idle", budget).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections() {
    for budget in BUDGETS {
        let mut load = Load::on(budget).await;
        load.idle(1_000).await;
        load.run("connections_1000", budget).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_messages() {
    for budget in BUDGETS {
        let mut load = Load::on(budget).await;
        load.producers(&[128, 128, 1 << 10, 1 << 10]).await;
        load.run("small", budget).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_messages() {
    for budget in BUDGETS {
        let mut load = Load::on(budget).await;
        load.producers(&[64 << 10, 1 << 20, 3 << 20, 15 << 20])
            .await;
        load.run("large", budget).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hoarders() {
    for budget in BUDGETS {
        let mut load = Load::on(budget).await;
        load.hoarders(2).await;
        load.producers(&[128, 64 << 10]).await;
        load.run("never_ack", budget).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deaf_consumers() {
    for budget in BUDGETS {
        let mut load = Load::on(budget).await;
        load.deaf(8).await;
        load.producers(&[64 << 10, 3 << 20]).await;
        load.run("never_read", budget).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_together() {
    for budget in BUDGETS {
        let mut load = Load::on(budget).await;
        load.idle(1_000).await;
        load.hoarders(2).await;
        load.deaf(4).await;
        load.producers(&[128, 64 << 10, 3 << 20, 15 << 20]).await;
        load.run("all", budget).await;
    }
}
