//! Raw quinn between two processes: the floor under any protocol over QUIC.
//!
//! A bidirectional stream begins with one byte that says what it is: a bulk stream is read to its end
//! and answered with one byte, an echo stream gets back what it sends, a window stream names the size
//! of its messages and is told, after each read, how many whole ones have come, a synced stream how many of
//! them are durable, and a read stream brings a file (both [`crate::raw_disk`]). The transport is the broker's
//! and the client's own (windows, MTU, offload, acknowledgement frequency), the cipher AES-128-GCM.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use millpond_broker::config::QuicConfig;
use millpond_broker::transport;
use millpond_client::limits;
use millpond_protocol::limits::UDP_PAYLOAD_MIN;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, Connection, Endpoint, EndpointConfig, MtuDiscoveryConfig, TransportConfig,
    VarInt,
};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{self, cipher_suite};
use rustls::version::TLS13;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::mpsc;

use crate::raw_disk;
use crate::sample::Meter;

/// A listening endpoint on a free port, and its certificate as PEM.
pub fn server(mtu: u16) -> Result<(Endpoint, String)> {
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
    let key = PrivateKeyDer::try_from(signing_key.serialize_der()).map_err(anyhow::Error::msg)?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
    let quic = QuicConfig {
        max_mtu: mtu,
        ..QuicConfig::default()
    };
    let mut transport = transport::server_transport(&quic);
    // The broker lends windows from its memory as streams need them; here there is all that they may get.
    transport
        .receive_window(VarInt::from_u32(limits::CONNECTION_WINDOW_BYTES))
        .send_window(u64::from(quic.send_window_bytes));
    config.transport_config(Arc::new(transport));
    Ok((endpoint(mtu, Some(config))?, cert.pem()))
}

/// Serves every connection.
pub async fn accept(endpoint: &Endpoint, dir: &Path) {
    while let Some(incoming) = endpoint.accept().await {
        let dir = dir.to_owned();
        tokio::spawn(async move {
            let Ok(connection) = incoming.await else {
                return;
            };
            transport::admit(&connection, &QuicConfig::default());
            while let Ok((send, receive)) = connection.accept_bi().await {
                let dir = dir.clone();
                // A stream that breaks is missed by the client, which reports it.
                tokio::spawn(async move { serve(send, receive, &dir).await.ok() });
            }
        });
    }
}

/// A stream that stays open.
pub type Idle = (quinn::SendStream, quinn::RecvStream);

/// When a window's messages are answered.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    WhenRead,
    WhenDurable,
}

/// The client's side of one connection.
pub struct Raw {
    endpoint: Endpoint,
    connection: Connection,
}

impl Raw {
    pub async fn connect(address: SocketAddr, ca_pem: &[u8], mtu: u16) -> Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca_pem)?)?;
        let mut tls = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
        config.transport_config(Arc::new(client_transport(mtu)));
        let endpoint = endpoint(mtu, None)?;
        let connection = endpoint
            .connect_with(config, address, "localhost")?
            .await
            .context("the sink cannot be reached")?;
        Ok(Self {
            endpoint,
            connection,
        })
    }

    /// Sends until so many bytes or so much time are over, and waits for the other side's word that
    /// it has all of them; how many they were.
    pub async fn bulk(&self, bytes_max: u64, time_max: Duration) -> Result<u64> {
        let (mut send, mut receive) = self.connection.open_bi().await?;
        let chunk = Bytes::from(vec![0x5a; BULK_CHUNK_BYTES]);
        send.write_all(&[BULK]).await?;
        let began = Instant::now();
        let mut bytes = 0;
        while bytes < bytes_max && began.elapsed() < time_max {
            send.write_chunk(chunk.clone()).await?;
            bytes += BULK_CHUNK_BYTES as u64;
        }
        send.finish()?;
        let answer = receive.read_to_end(1).await?;
        ensure!(answer == [BULK], "the sink ended without its word");
        Ok(bytes)
    }

    /// One small message there and back at a time.
    pub async fn round_trips(&self, time: Duration, meter: &mut Meter) -> Result<()> {
        let (mut send, mut receive) = self.connection.open_bi().await?;
        let message = [0x5a; ECHO_BYTES];
        send.write_all(&[ECHO]).await?;
        let mut back = [0; ECHO_BYTES];
        let end = Instant::now() + time;
        while Instant::now() < end {
            let began = Instant::now();
            send.write_all(&message).await?;
            receive.read_exact(&mut back).await?;
            meter.record(began.elapsed());
            meter.count(1);
        }
        ensure!(back == message, "the sink echoed something else");
        send.finish()?;
        Ok(())
    }

    /// Opens a stream for messages of one size, once the other side is ready to take them.
    pub async fn open_window(&self, answer: Answer, message_bytes: usize) -> Result<Window> {
        let (mut send, mut receive) = self.connection.open_bi().await?;
        let kind = match answer {
            Answer::WhenRead => WINDOW,
            Answer::WhenDurable => SYNCED,
        };
        send.write_all(&[kind]).await?;
        let size = u32::try_from(message_bytes)?;
        send.write_all(&size.to_le_bytes()).await?;
        receive.read_exact(&mut [0; READY.len()]).await?;
        Ok(Window {
            send,
            receive,
            message_bytes,
            sent: 0,
            answered: 0,
        })
    }

    /// A stream that brings a file from the disk, once the other side is ready to read it.
    pub async fn open_read(&self) -> Result<Reading> {
        let (mut send, mut receive) = self.connection.open_bi().await?;
        send.write_all(&[READ]).await?;
        receive.read_exact(&mut [0; READY.len()]).await?;
        Ok(Reading {
            _send: send,
            receive,
        })
    }

    /// Opens so many streams that have been used once, each way, and then say nothing.
    pub async fn idle(&self, streams: usize) -> Result<Vec<Idle>> {
        let mut idle = Vec::new();
        for _ in 0..streams {
            let (mut send, mut receive) = self.connection.open_bi().await?;
            send.write_all(&[ECHO; 2]).await?;
            receive.read_exact(&mut [0; 1]).await?;
            idle.push((send, receive));
        }
        Ok(idle)
    }

    pub async fn close(self) {
        self.connection.close(0_u32.into(), b"");
        self.endpoint.wait_idle().await;
    }
}

/// A stream that brings what the other side reads from its disk; dropped, it wants no more.
pub struct Reading {
    _send: quinn::SendStream,
    receive: quinn::RecvStream,
}

impl Reading {
    /// Takes what comes for so long; how many bytes.
    pub async fn run(&mut self, time: Duration) -> Result<u64> {
        let mut chunks = vec![Bytes::new(); limits::READ_CHUNKS];
        let end = Instant::now() + time;
        let mut bytes = 0;
        while Instant::now() < end {
            let read = self.receive.read_chunks(&mut chunks).await?;
            let read = read.context("the sink ended before it was told to")?;
            bytes += chunks[..read].iter().map(|c| c.len() as u64).sum::<u64>();
        }
        Ok(bytes)
    }
}

/// A stream of messages of one size.
pub struct Window {
    send: quinn::SendStream,
    receive: quinn::RecvStream,
    message_bytes: usize,
    sent: u64,
    answered: u64,
}

impl Window {
    /// Keeps so many messages without an answer; what may go goes as one write, as a client that batches
    /// would do it. With a single one, its latency is recorded.
    pub async fn run(&mut self, window: u64, time: Duration, meter: &mut Meter) -> Result<()> {
        let messages = Bytes::from(vec![0x5a; window as usize * self.message_bytes]);
        let end = Instant::now() + time;
        while Instant::now() < end {
            let began = Instant::now();
            let free = (self.answered + window - self.sent) as usize;
            self.send
                .write_chunk(messages.slice(..free * self.message_bytes))
                .await?;
            self.sent += free as u64;
            let mut told = [0; size_of::<u64>()];
            self.receive.read_exact(&mut told).await?;
            let told = u64::from_le_bytes(told);
            meter.count(told - self.answered);
            self.answered = told;
            if window == 1 {
                meter.record(began.elapsed());
            }
        }
        Ok(())
    }
}

impl Window {
    /// Sends a message whenever `due` says so, whatever the answers do, and records how long each was on its way
    /// to its answer; until there is no more to send. The first `warm` are not recorded.
    pub async fn run_paced(
        mut self,
        mut due: mpsc::Receiver<Instant>,
        warm: u64,
        meter: &mut Meter,
    ) -> Result<()> {
        let message = Bytes::from(vec![0x5a; self.message_bytes]);
        let (sent, mut waiting) = mpsc::channel(PACED_MAX);
        let sending = async {
            while let Some(since) = due.recv().await {
                sent.send(since).await?;
                self.send.write_chunk(message.clone()).await?;
            }
            drop(sent);
            anyhow::Ok(())
        };
        let answering = async {
            let (mut answered, mut told) = (0, 0);
            while let Some(since) = waiting.recv().await {
                while told == answered {
                    let mut next = [0; size_of::<u64>()];
                    self.receive.read_exact(&mut next).await?;
                    told = u64::from_le_bytes(next);
                }
                answered += 1;
                if answered > warm {
                    meter.record(since.elapsed());
                    meter.count(1);
                }
            }
            anyhow::Ok(())
        };
        tokio::try_join!(sending, answering)?;
        Ok(())
    }
}

async fn serve(
    mut send: quinn::SendStream,
    mut receive: quinn::RecvStream,
    dir: &Path,
) -> Result<()> {
    let mut kind = [0; 1];
    receive.read_exact(&mut kind).await?;
    match kind {
        [BULK] => {
            let mut chunks = vec![Bytes::new(); limits::READ_CHUNKS];
            while receive.read_chunks(&mut chunks).await?.is_some() {}
            send.write_all(&[BULK]).await?;
        }
        [WINDOW] => {
            let size = message_bytes(&mut receive).await?;
            count(size, &mut send, &mut receive).await?;
        }
        [SYNCED] => {
            let size = message_bytes(&mut receive).await?;
            raw_disk::synced(dir, size, &mut send, &mut receive).await?;
        }
        [READ] => raw_disk::read(dir, &mut send).await?,
        _ => {
            while let Some(chunk) = receive.read_chunk(ECHO_BYTES, true).await? {
                send.write_chunk(chunk.bytes).await?;
            }
        }
    }
    send.finish()?;
    // Lets the last bytes arrive before the stream is dropped.
    send.stopped().await?;
    Ok(())
}

async fn message_bytes(receive: &mut quinn::RecvStream) -> Result<u64> {
    let mut size = [0; size_of::<u32>()];
    receive.read_exact(&mut size).await?;
    let size = u64::from(u32::from_le_bytes(size));
    ensure!(size > 0, "a message has bytes");
    Ok(size)
}

/// Tells the other side, after each read, how many whole messages have come.
async fn count(
    size: u64,
    send: &mut quinn::SendStream,
    receive: &mut quinn::RecvStream,
) -> Result<()> {
    send.write_all(&READY).await?;
    let mut chunks = vec![Bytes::new(); limits::READ_CHUNKS];
    let (mut bytes, mut told) = (0, 0);
    while let Some(read) = receive.read_chunks(&mut chunks).await? {
        bytes += chunks[..read].iter().map(|c| c.len() as u64).sum::<u64>();
        let whole = bytes / size;
        if whole > told {
            told = whole;
            send.write_all(&whole.to_le_bytes()).await?;
        }
    }
    Ok(())
}

/// The same as the client crate's, from its own limits.
fn client_transport(max_mtu: u16) -> TransportConfig {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(max_mtu);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(limits::ACK_EVERY_PACKETS))
        .max_ack_delay(Some(limits::ACK_DELAY_MAX));
    let mut config = TransportConfig::default();
    config
        .keep_alive_interval(Some(limits::KEEP_ALIVE))
        .initial_rtt(limits::INITIAL_RTT)
        .stream_receive_window(VarInt::from_u32(limits::STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(limits::CONNECTION_WINDOW_BYTES))
        .send_window(limits::SEND_WINDOW_BYTES)
        .mtu_discovery_config(Some(mtu))
        .ack_frequency_config(Some(acks));
    config
}

fn endpoint(mtu: u16, server: Option<quinn::ServerConfig>) -> Result<Endpoint> {
    let socket = transport::bind_udp(([127, 0, 0, 1], 0).into())?;
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(mtu.max(UDP_PAYLOAD_MIN))?;
    let runtime = Arc::new(quinn::TokioRuntime);
    Ok(Endpoint::new(config, server, socket, runtime)?)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![cipher_suite::TLS13_AES_128_GCM_SHA256],
        ..ring::default_provider()
    })
}

const ALPN: &[u8] = b"millpond-bench-raw";
const BULK: u8 = b'b';
const ECHO: u8 = b'e';
const WINDOW: u8 = b'w';
const SYNCED: u8 = b's';
const READ: u8 = b'r';
/// What the serving side of a window, or of a read stream, says first.
pub const READY: [u8; 1] = [b'y'];
/// Messages of a paced stream without an answer: several seconds of them.
const PACED_MAX: usize = 16 << 10;
const BULK_CHUNK_BYTES: usize = 256 << 10;
/// The size of a round trip's message.
pub const ECHO_BYTES: usize = 128;
