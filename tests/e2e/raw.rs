//! A peer that speaks bytes by hand, as no client would.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use millpond_broker::EmbeddedBroker;
use millpond_protocol::control::{
    ConsumerOpened, CreateSubscription, Hello, OpenConsumer, OpenProducer, OpenSettlements,
    ProducerEnded, ProducerOpened, Request, RequestFrame, Response, ResponseFrame, Welcome,
};
use millpond_protocol::frame::{self, Frame, FrameType, HEADER_BYTES};
use millpond_protocol::hot::Publish;
use millpond_protocol::{ALPN, Message, ProducerHandle, Sequence, StartAt, WireError};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, ConnectionError, Endpoint, RecvStream, SendStream, VarInt};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::Serialize;
use tokio::time::timeout;

use crate::common::{PATIENCE, quick_retries};

/// The first producer of a stream.
pub const FIRST: ProducerHandle = ProducerHandle(1);

/// Dials brokers; one socket for all its connections.
pub struct Peer {
    endpoint: Endpoint,
    tls: rustls::ClientConfig,
    config: quinn::ClientConfig,
}

impl Peer {
    pub fn new(broker: &EmbeddedBroker) -> Self {
        Self::speaking(broker, ALPN)
    }

    /// A peer that offers another application protocol.
    pub fn speaking(broker: &EmbeddedBroker, alpn: &[u8]) -> Self {
        let mut roots = rustls::RootCertStore::empty();
        let ca = broker.ca_pem().unwrap();
        roots
            .add(CertificateDer::from_pem_slice(&ca).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![alpn.to_vec()];
        let endpoint = Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        Self::with(endpoint, tls)
    }

    fn with(endpoint: Endpoint, tls: rustls::ClientConfig) -> Self {
        let quic = QuicClientConfig::try_from(tls.clone()).unwrap();
        Self {
            endpoint,
            tls,
            config: quinn::ClientConfig::new(Arc::new(quic)),
        }
    }

    /// With this much room for what it does not read, per stream.
    pub fn window(self, bytes: u32) -> Self {
        self.windows(bytes, 8 << 20)
    }

    /// The same, and this much for what it has written and nobody has acknowledged.
    pub fn windows(mut self, received: u32, sent: u64) -> Self {
        let mut transport = quinn::TransportConfig::default();
        transport.stream_receive_window(VarInt::from_u32(received));
        transport.send_window(sent);
        transport.keep_alive_interval(Some(Duration::from_secs(1)));
        self.config.transport_config(Arc::new(transport));
        self
    }

    /// That would like to say something before the handshake is over.
    pub fn early(self) -> Self {
        let Self { endpoint, tls, .. } = self;
        let mut tls = tls;
        tls.enable_early_data = true;
        Self::with(endpoint, tls)
    }

    /// Whether a broker that it knows has promised to listen to that.
    pub fn can_begin_early(&self, broker: &EmbeddedBroker) -> bool {
        let at = broker.broker().listen_addr();
        let connecting = self
            .endpoint
            .connect_with(self.config.clone(), at, "localhost");
        connecting.unwrap().into_0rtt().is_ok()
    }

    pub async fn dial(&self, broker: &EmbeddedBroker) -> Result<Connection, ConnectionError> {
        self.dial_at(broker.broker().listen_addr()).await
    }

    pub async fn dial_at(&self, at: SocketAddr) -> Result<Connection, ConnectionError> {
        let connecting = self
            .endpoint
            .connect_with(self.config.clone(), at, "localhost");
        timeout(PATIENCE, connecting.unwrap()).await.unwrap()
    }

    /// Dials and is welcomed.
    pub async fn welcomed(&self, broker: &EmbeddedBroker) -> Raw {
        let connection = self.dial(broker).await.unwrap();
        let mut control = Wire::open(&connection).await;
        control.control(FrameType::Hello, &hello(1, 1)).await;
        let welcome: Welcome = control.expect(FrameType::Welcome).await;
        assert_eq!(welcome.version, 1);
        Raw {
            connection,
            control,
        }
    }
}

pub fn hello(version_min: u16, version_max: u16) -> Hello {
    Hello {
        version_min,
        version_max,
        token: None,
        client_name: "raw".to_owned(),
    }
}

/// A connection that was welcomed.
pub struct Raw {
    pub connection: Connection,
    pub control: Wire,
}

impl Raw {
    pub async fn stream(&self) -> Wire {
        Wire::open(&self.connection).await
    }

    /// A publish stream with a producer of `orders`.
    pub async fn producer(&self) -> (Wire, ProducerOpened) {
        let mut wire = self.stream().await;
        let opened = wire.open_producer(FIRST).await;
        (wire, opened)
    }

    /// A consumer's delivery stream of a subscription of `orders`.
    pub async fn consumer(&self, subscription: &str) -> (Wire, ConsumerOpened) {
        let mut wire = self.stream().await;
        let open = OpenConsumer {
            topic: "orders".to_owned(),
            subscription: subscription.to_owned(),
            create: Some(CreateSubscription {
                config: quick_retries(1, 3),
                start: StartAt::Earliest,
            }),
            resume: None,
            consumer_name: "raw".to_owned(),
        };
        wire.control(FrameType::OpenConsumer, &open).await;
        let opened = wire.expect(FrameType::ConsumerOpened).await;
        (wire, opened)
    }

    pub async fn settlements(&self, opened: &ConsumerOpened) -> Wire {
        let mut wire = self.stream().await;
        let open = OpenSettlements {
            session: opened.session,
            token: opened.token,
        };
        wire.control(FrameType::OpenSettlements, &open).await;
        wire.next_of(FrameType::SettlementsOpened).await;
        wire
    }

    /// Asserts that the connection is as good as it was.
    pub async fn ping(&mut self) {
        let ping = RequestFrame {
            id: 1,
            request: Request::Ping,
        };
        self.control.control(FrameType::Request, &ping).await;
        let answer: ResponseFrame = self.control.expect(FrameType::Response).await;
        assert_eq!(answer.result, Ok(Response::Done));
    }
}

/// One stream, in bytes.
pub struct Wire {
    pub send: SendStream,
    recv: RecvStream,
    buffer: BytesMut,
}

impl Wire {
    pub async fn open(connection: &Connection) -> Self {
        let opened = timeout(PATIENCE, connection.open_bi()).await;
        let (send, recv) = opened.expect("a stream may be opened").unwrap();
        Self {
            send,
            recv,
            buffer: BytesMut::new(),
        }
    }

    /// Writes whatever it is. The broker may have ended the stream meanwhile.
    pub async fn bytes(&mut self, bytes: &[u8]) {
        let _ = self.send.write_all(bytes).await;
    }

    pub async fn control<T: Serialize>(&mut self, kind: FrameType, value: &T) {
        let frame = frame::encode(kind, value).unwrap();
        self.bytes(&frame).await;
    }

    pub async fn ask_for_producer(&mut self, handle: ProducerHandle) {
        self.control(FrameType::OpenProducer, &open_producer(handle))
            .await;
    }

    pub async fn open_producer(&mut self, handle: ProducerHandle) -> ProducerOpened {
        self.ask_for_producer(handle).await;
        let opened: ProducerOpened = self.expect(FrameType::ProducerOpened).await;
        assert_eq!(opened.handle, handle);
        opened
    }

    pub fn finish(&mut self) {
        let _ = self.send.finish();
    }

    /// The next frame; `None` at the end of the stream.
    pub async fn next(&mut self) -> Option<Frame> {
        let reading = read(&mut self.recv, &mut self.buffer);
        let frame = timeout(PATIENCE, reading).await;
        frame.expect("the broker says something in time")
    }

    /// Writes frame after frame, without waiting for any answer, until the broker ends the producer.
    pub async fn flood(&mut self, frames: impl Iterator<Item = Bytes>) -> ProducerEnded {
        let flooding = async {
            for frame in frames {
                if self.send.write_all(&frame).await.is_err() {
                    break;
                }
            }
            std::future::pending().await
        };
        let refused = async {
            loop {
                let frame = read(&mut self.recv, &mut self.buffer).await;
                let frame = frame.expect("it is told why the producer ends");
                assert_ne!(frame.kind, FrameType::Error, "the stream goes on");
                if frame.kind == FrameType::ProducerEnded {
                    return frame.decode().unwrap();
                }
            }
        };
        let ended = timeout(PATIENCE, async {
            tokio::select! {
                refused = refused => refused,
                never = flooding => never,
            }
        });
        ended.await.expect("the broker ends it in time")
    }

    /// The next frame of this type; those before it are left out.
    pub async fn next_of(&mut self, kind: FrameType) -> Frame {
        loop {
            let frame = self.next().await;
            let frame = frame.unwrap_or_else(|| panic!("the stream ended before a {kind:?}"));
            if frame.kind == kind {
                return frame;
            }
            assert_ne!(
                frame.kind,
                FrameType::Error,
                "{:?}",
                frame.decode::<WireError>()
            );
        }
    }

    pub async fn expect<T: serde::de::DeserializeOwned>(&mut self, kind: FrameType) -> T {
        self.next_of(kind).await.decode().unwrap()
    }

    /// What the broker says at the end of the stream, which must be an error.
    pub async fn refusal(&mut self) -> WireError {
        loop {
            let frame = self.next().await.expect("it is told why the stream ends");
            if frame.kind == FrameType::Error {
                assert_eq!(self.next().await, None, "the error is the end");
                return frame.decode().unwrap();
            }
        }
    }
}

async fn read(recv: &mut RecvStream, buffer: &mut BytesMut) -> Option<Frame> {
    loop {
        if let Some(frame) = frame::decode(buffer).unwrap() {
            return Some(frame);
        }
        let chunk = recv.read_chunk(usize::MAX, true).await.ok()??;
        buffer.put_slice(&chunk.bytes);
    }
}

/// A frame header as it stands on the wire, whatever it says.
pub fn head(kind: u8, length: u32, flags: u8) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..4].copy_from_slice(&length.to_le_bytes());
    (out[4], out[5]) = (kind, flags);
    out
}

/// A whole frame with this body.
pub fn whole(kind: FrameType, body: &[u8]) -> Vec<u8> {
    let mut out = head(kind as u8, body.len() as u32, 0).to_vec();
    out.extend_from_slice(body);
    out
}

/// Asks for a producer of `orders` without an id.
pub fn open_producer(handle: ProducerHandle) -> OpenProducer {
    OpenProducer {
        handle,
        topic: "orders".to_owned(),
        producer_id: None,
        resume: None,
    }
}

/// A publish frame of the stream's first producer: these messages, numbered from `first`.
pub fn publish(previous: u64, first: u64, messages: &[Message]) -> Bytes {
    publish_of(FIRST, previous, first, messages)
}

pub fn publish_of(
    handle: ProducerHandle,
    previous: u64,
    first: u64,
    messages: &[Message],
) -> Bytes {
    let mut bodies = BytesMut::new();
    for (sequence, message) in (first..).zip(messages) {
        message.encode(Sequence(sequence), &mut bodies);
    }
    let mut out = BytesMut::new();
    out.put_slice(&Publish::prefix(
        handle,
        Sequence(previous),
        messages.len() as u32,
        bodies.len(),
    ));
    out.put_slice(&bodies);
    out.freeze()
}
