//! A scripted broker: real QUIC on loopback, and every frame in the test's hands.

#![allow(
    dead_code,
    reason = "each test binary includes this file and uses a part"
)]
#![allow(clippy::unwrap_used, reason = "a helper's failure is its test's")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use millpond_client::{Client, ClientBuilder, Message, SubscriptionMode};
use millpond_protocol::control::{
    CloseProducer, ConsumerOpened, GoAway, Hello, LeaseName, OpenConsumer, OpenProducer,
    ProducerEnded, ProducerOpened, Request, RequestFrame, Response, ResponseFrame, Welcome,
};
use millpond_protocol::frame::{self, Frame, FrameType};
use millpond_protocol::hot::{
    AckKind, AckRow, Credit, DeliverHead, DeliverMeta, Publish, PublishAck,
};
use millpond_protocol::{
    Delivery, Epoch, ErrorCode, Offset, ProducerHandle, ProducerKey, Sequence, SessionId,
    SubscriptionId, TopicId, WireError,
};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls_pki_types::PrivatePkcs8KeyDer;
use serde::Serialize;

pub const WIDE: Credit = Credit {
    max_messages: 1 << 40,
    max_bytes: 1 << 40,
};
/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(10);

pub struct FakeBroker {
    endpoint: Endpoint,
    config: quinn::ServerConfig,
    pub ca_pem: String,
    pub address: SocketAddr,
}

impl FakeBroker {
    pub fn start() -> Self {
        let (config, ca_pem) = certified();
        let endpoint = Endpoint::server(config.clone(), "127.0.0.1:0".parse().unwrap()).unwrap();
        let address = endpoint.local_addr().unwrap();
        Self {
            endpoint,
            config,
            ca_pem,
            address,
        }
    }

    pub fn url(&self) -> String {
        format!("millpond://{}", self.address)
    }

    pub fn client(&self) -> ClientBuilder {
        Client::builder().ca_pem(self.ca_pem.clone()).name("test")
    }

    /// A connected client, and the broker's side of its connection.
    pub async fn connected(&self) -> (Client, FakeConnection) {
        self.connected_as(self.client()).await
    }

    pub async fn connected_as(&self, builder: ClientBuilder) -> (Client, FakeConnection) {
        let url = self.url();
        let (client, connection) = tokio::join!(builder.connect(&url), self.accept());
        (client.unwrap(), connection)
    }

    /// The next connection, welcomed.
    pub async fn accept(&self) -> FakeConnection {
        let (connection, _, mut control) = self.hello().await;
        let welcome = Welcome {
            version: 1,
            store_id: [7; 16],
            recovery_epoch: 1,
            broker_version: "fake".to_owned(),
        };
        control.write(FrameType::Welcome, &welcome).await;
        FakeConnection {
            connection,
            control,
        }
    }

    /// The next connection and its first words.
    pub async fn hello(&self) -> (Connection, Hello, Duplex) {
        let connection = patient(async {
            loop {
                let incoming = self.endpoint.accept().await.unwrap();
                if let Ok(connection) = incoming.await {
                    return connection;
                }
            }
        })
        .await;
        let (first, control) = accept_stream(&connection).await;
        let hello = first.expect(FrameType::Hello).unwrap().decode().unwrap();
        (connection, hello, control)
    }

    /// Goes away without a word; `start_again` takes the same port.
    pub async fn stop(self) -> Stopped {
        self.endpoint.close(0u32.into(), b"stopped");
        let stopped = Stopped {
            config: self.config,
            ca_pem: self.ca_pem,
            address: self.address,
        };
        self.endpoint.wait_idle().await;
        stopped
    }
}

pub struct Stopped {
    config: quinn::ServerConfig,
    ca_pem: String,
    address: SocketAddr,
}

impl Stopped {
    pub async fn start_again(self) -> FakeBroker {
        let endpoint = patient(async {
            loop {
                // The old socket is closed by a task that may still run.
                match Endpoint::server(self.config.clone(), self.address) {
                    Ok(endpoint) => return endpoint,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        })
        .await;
        FakeBroker {
            endpoint,
            config: self.config,
            ca_pem: self.ca_pem,
            address: self.address,
        }
    }
}

pub struct FakeConnection {
    pub connection: Connection,
    pub control: Duplex,
}

impl FakeConnection {
    /// The next control request.
    pub async fn request(&mut self) -> (u64, Request) {
        let frame = self.control.read(FrameType::Request).await;
        let RequestFrame { id, request } = frame.decode().unwrap();
        (id, request)
    }

    pub async fn respond(&mut self, id: u64, result: Result<Response, WireError>) {
        let frame = ResponseFrame { id, result };
        self.control.write(FrameType::Response, &frame).await;
    }

    /// The next stream and its first frame.
    pub async fn stream(&self) -> (Frame, Duplex) {
        accept_stream(&self.connection).await
    }

    /// The next stream, which must be for publishing, with its first producer opened.
    pub async fn producer(&self, last: u64, credit: Credit) -> (OpenProducer, Duplex) {
        let (open, mut stream) = self.producer_asks().await;
        stream.opened(open.handle, last, credit).await;
        (open, stream)
    }

    pub async fn producer_asks(&self) -> (OpenProducer, Duplex) {
        let (first, mut stream) = self.stream().await;
        let open = first.expect(FrameType::OpenProducer).unwrap();
        let open: OpenProducer = open.decode().unwrap();
        stream.handle = open.handle;
        (open, stream)
    }

    /// The next two streams, which must be a consumer's.
    pub async fn consumer(&self, opened: &ConsumerOpened) -> (OpenConsumer, Duplex, Duplex) {
        let (first, mut deliveries) = self.stream().await;
        let open = first.expect(FrameType::OpenConsumer).unwrap();
        let open = open.decode().unwrap();
        deliveries.write(FrameType::ConsumerOpened, opened).await;
        let (first, mut settlements) = self.stream().await;
        first.expect(FrameType::OpenSettlements).unwrap();
        settlements
            .write_bytes(frame::empty(FrameType::SettlementsOpened))
            .await;
        (open, deliveries, settlements)
    }

    /// Asks the client to leave.
    pub async fn go_away(&mut self) {
        let away = GoAway {
            deadline_ms: 60_000,
            reason: "test".to_owned(),
        };
        self.control.write(FrameType::GoAway, &away).await;
    }

    /// Breaks the connection.
    pub fn break_off(self) {
        self.connection.close(0u32.into(), b"broken");
    }
}

/// One stream, both ways.
pub struct Duplex {
    send: SendStream,
    recv: RecvStream,
    buffer: BytesMut,
    /// The producer that acknowledgements are for.
    pub handle: ProducerHandle,
}

impl Duplex {
    /// The producer with this handle is open.
    pub async fn opened(&mut self, handle: ProducerHandle, last: u64, credit: Credit) {
        self.opened_as(handle, Epoch(1), last, credit).await;
    }

    pub async fn opened_as(
        &mut self,
        handle: ProducerHandle,
        epoch: Epoch,
        last: u64,
        credit: Credit,
    ) {
        let opened = ProducerOpened {
            handle,
            topic: TopicId(1),
            producer: ProducerKey(5),
            epoch,
            last_sequence: Sequence(last),
            credit,
        };
        self.write(FrameType::ProducerOpened, &opened).await;
    }

    /// Another producer on the stream, opened.
    pub async fn next_producer(&mut self, last: u64, credit: Credit) -> OpenProducer {
        let open = self.read(FrameType::OpenProducer).await;
        let open: OpenProducer = open.decode().unwrap();
        self.opened(open.handle, last, credit).await;
        open
    }

    pub async fn producer_leaves(&mut self) -> CloseProducer {
        let close = self.read(FrameType::CloseProducer).await;
        close.decode().unwrap()
    }

    pub async fn end_producer(&mut self, handle: ProducerHandle, error: Option<WireError>) {
        let ended = ProducerEnded { handle, error };
        self.write(FrameType::ProducerEnded, &ended).await;
    }

    /// The next frame; `None` at the end of the stream.
    pub async fn next(&mut self) -> Option<Frame> {
        patient(async {
            loop {
                if let Some(frame) = frame::decode(&mut self.buffer).unwrap() {
                    return Some(frame);
                }
                let chunk = self.recv.read_chunk(1 << 20, true).await.ok()??;
                self.buffer.extend_from_slice(&chunk.bytes);
            }
        })
        .await
    }

    /// The next frame, which must be of this type.
    pub async fn read(&mut self, kind: FrameType) -> Frame {
        let frame = self.next().await.expect("the stream has a frame");
        frame.expect(kind).unwrap()
    }

    pub async fn publish(&mut self) -> Publish {
        Publish::decode(&self.read(FrameType::Publish).await.body).unwrap()
    }

    pub async fn write<T: Serialize>(&mut self, kind: FrameType, value: &T) {
        self.write_bytes(frame::encode(kind, value).unwrap()).await;
    }

    pub async fn write_bytes(&mut self, bytes: Bytes) {
        self.send.write_chunk(bytes).await.unwrap();
    }

    /// Acknowledges `count` messages of the stream's producer that begin at `offset`.
    pub async fn ack(&mut self, last: u64, offset: u64, count: u32, kind: AckKind) {
        let ack = PublishAck {
            handle: self.handle,
            credit: WIDE,
            rows: vec![AckRow {
                last_sequence: Sequence(last),
                offset: Offset(offset),
                count,
                kind,
            }],
            ..PublishAck::default()
        };
        self.write_ack(&ack).await;
    }

    pub async fn write_ack(&mut self, ack: &PublishAck) {
        let mut out = BytesMut::new();
        ack.encode(&mut out);
        self.write_bytes(out.freeze()).await;
    }

    /// Delivers these offsets, each with its offset as payload.
    pub async fn deliver(&mut self, delivery: u32, offsets: impl IntoIterator<Item = u64>) {
        let mut head = DeliverHead::default();
        let mut messages = BytesMut::new();
        let mut offsets = offsets.into_iter().peekable();
        while let Some(first) = offsets.next() {
            let mut lengths = Vec::new();
            let mut next = Some(first);
            while let Some(offset) = next {
                let before = messages.len();
                Message::new(offset.to_string()).encode(Sequence(offset + 1), &mut messages);
                lengths.push(messages.len() - before);
                next = offsets.next_if_eq(&(offset + 1));
            }
            let meta = DeliverMeta {
                offset: Offset(first),
                delivery: Delivery(delivery),
                attempt: delivery.max(1),
                ..DeliverMeta::default()
            };
            head.push(meta, &[], lengths);
        }
        let mut out = BytesMut::from(&head.encode()[..]);
        out.put_slice(&messages);
        self.write_bytes(out.freeze()).await;
    }

    pub fn reset(&mut self, code: ErrorCode) {
        self.send.reset(u32::from(u16::from(code)).into()).unwrap();
    }

    pub fn finish(&mut self) {
        self.send.finish().unwrap();
    }
}

pub fn opened(session: u64, mode: SubscriptionMode) -> ConsumerOpened {
    ConsumerOpened {
        session: SessionId(session),
        token: 99,
        topic: TopicId(1),
        subscription: SubscriptionId(1),
        mode,
        lease_ms: 30_000,
        leases: vec![],
        resumed: false,
        position: Offset(0),
    }
}

pub fn lease(offset: u64, delivery: u32) -> LeaseName {
    LeaseName {
        offset: Offset(offset),
        delivery: Delivery(delivery),
    }
}

/// What must happen soon, or the test fails.
pub async fn patient<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what)
        .await
        .expect("it happens within the test's patience")
}

async fn accept_stream(connection: &Connection) -> (Frame, Duplex) {
    let (send, recv) = patient(connection.accept_bi()).await.unwrap();
    let mut stream = Duplex {
        send,
        recv,
        buffer: BytesMut::new(),
        handle: ProducerHandle::default(),
    };
    let first = stream.next().await.unwrap();
    (first, stream)
}

fn certified() -> (quinn::ServerConfig, String) {
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
    let issuer = Issuer::new(ca, ca_key);
    let key = KeyPair::generate().unwrap();
    let names = vec!["localhost".to_owned()];
    let params = CertificateParams::new(names).unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        )
        .unwrap();
    tls.alpn_protocols = vec![millpond_protocol::ALPN.to_vec()];
    let crypto = QuicServerConfig::try_from(tls).unwrap();
    (quinn::ServerConfig::with_crypto(Arc::new(crypto)), ca_pem)
}
