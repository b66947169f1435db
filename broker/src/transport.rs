//! How the server speaks QUIC: every window, limit and timeout, set explicitly.
//!
//! Until a connection is authenticated it has [`UNAUTHENTICATED_STREAMS`] streams; [`admit`] allows
//! more. Its windows begin at [`BASE_WINDOW_BYTES`], which every connection is charged for, and grow
//! with what is lent from the memory budget when streams need them ([`Windows`]):
//!
//! ```text
//! received, not read         <= base + loans      (of all connections: charged + the receive pool)
//! written, not acknowledged  <= base + loans      (of all connections: charged + the send pool)
//! ```
//!
//! While the pool has room, a connection's window covers its streams' windows. Beyond that one stream
//! that is not read takes from the others, but stops nobody for ever: a stream is left unread only while
//! memory is waited for, and that memory comes back by commits and by time, never by what is behind it.
//!
//! It does not decide whom to accept, retry or authenticate: that is the accept loop's.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{AckFrequencyConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::config::{Config, QuicConfig};
use crate::memory::{Loan, MemoryBudget};
use crate::start_error::{Door, StartError};
use crate::tls;

/// The whole server configuration: certificate, transport, limits before acceptance. As
/// [`tls::server_config`] it may be made again while serving, to renew the certificate.
///
/// # Errors
/// As [`tls::server_config`].
pub fn server_config(config: &Config, wall_us: u64) -> Result<quinn::ServerConfig, StartError> {
    let crypto = tls::server_config(config, wall_us)?;
    let crypto = QuicServerConfig::try_from(crypto).map_err(|error| StartError::Certificate {
        path: tls::folder(&config.data),
        problem: error.to_string(),
    })?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    server
        .transport_config(Arc::new(server_transport(&config.quic)))
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(INCOMING_BYTES_MAX)
        .incoming_buffer_size_total(
            INCOMING_BYTES_TOTAL_MAX.min(config.memory.budget_bytes / INCOMING_PART),
        );
    Ok(server)
}

/// What every connection starts with.
#[must_use]
pub fn server_transport(quic: &QuicConfig) -> TransportConfig {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(quic.max_mtu);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_EVERY_PACKETS))
        .max_ack_delay(Some(ACK_DELAY_MAX));

    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(UNAUTHENTICATED_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(quic.stream_window_bytes))
        .receive_window(var(BASE_WINDOW_BYTES))
        .send_window(BASE_WINDOW_BYTES)
        .max_idle_timeout(Some(IdleTimeout::from(var(quic.idle_timeout_ms))))
        .keep_alive_interval(Some(Duration::from_millis(quic.keep_alive_ms)))
        .mtu_discovery_config(Some(mtu))
        .ack_frequency_config(Some(acks))
        .enable_segmentation_offload(true);
    transport
}

/// Gives an authenticated connection its first streams.
pub fn admit(connection: &quinn::Connection, quic: &QuicConfig) {
    let first = quic.streams_max.min(FIRST_STREAMS);
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(first));
}

/// How many streams a connection may have open. It begins with few and is doubled while the peer uses
/// more than half, because the library keeps about 90 bytes for each that is allowed, used or not.
pub struct Allowance {
    allowed: u32,
    max: u32,
    /// One for each open stream, and one.
    open: Arc<()>,
}

impl Allowance {
    /// As [`admit`] leaves a connection.
    #[must_use]
    pub fn new(quic: &QuicConfig) -> Self {
        Self {
            allowed: quic.streams_max.min(FIRST_STREAMS),
            max: quic.streams_max,
            open: Arc::new(()),
        }
    }

    /// Counts a stream in until what is returned is dropped.
    pub fn take(&mut self, connection: &quinn::Connection) -> Arc<()> {
        let used = Arc::clone(&self.open);
        let wanted = Arc::strong_count(&self.open).saturating_mul(2);
        if self.allowed < self.max && wanted > self.allowed as usize {
            self.allowed = self.allowed.saturating_mul(2).min(self.max);
            connection.set_max_concurrent_bi_streams(VarInt::from_u32(self.allowed));
        }
        used
    }
}

/// The windows of one connection: wider when a stream needs it and the memory budget has room. They are
/// not narrowed again while it lasts, because a peer may use at any time what it was once allowed.
pub struct Windows {
    connection: quinn::Connection,
    memory: MemoryBudget,
    stream_bytes: u64,
    send_bytes: u64,
    lent: Mutex<Lent>,
}

#[derive(Default)]
struct Lent {
    producers: Covered,
    consumers: Covered,
    receive: Vec<Loan>,
    send: Option<Loan>,
    /// Of the send window, for the answers to producers.
    answers: Option<Loan>,
}

/// Streams of one kind: how many are open, and for how many the window was widened.
#[derive(Default)]
struct Covered {
    open: u32,
    most: u32,
}

impl Covered {
    /// Counts one in; true if there were never as many.
    fn add(&mut self) -> bool {
        self.open += 1;
        let more = self.open > self.most;
        self.most = self.most.max(self.open);
        more
    }
}

impl Windows {
    #[must_use]
    pub fn new(connection: quinn::Connection, memory: MemoryBudget, quic: &QuicConfig) -> Self {
        Self {
            connection,
            memory,
            stream_bytes: u64::from(quic.stream_window_bytes),
            send_bytes: u64::from(quic.send_window_bytes),
            lent: Mutex::default(),
        }
    }

    /// A producer's stream has been opened.
    pub fn add_producer(&self) {
        let mut lent = self.lent.lock();
        if lent.producers.add() {
            self.widen(&mut lent, self.memory.receive_window(self.stream_bytes));
        }
    }

    pub fn remove_producer(&self) {
        self.lent.lock().producers.open -= 1;
    }

    /// A consumer's streams have been opened: acknowledgements are small.
    pub fn add_consumer(&self) {
        let mut lent = self.lent.lock();
        if lent.consumers.add() {
            let wanted = self.stream_bytes.min(ACKS_WINDOW_BYTES);
            self.widen(&mut lent, self.memory.small_receive_window(wanted));
        }
    }

    pub fn remove_consumer(&self) {
        self.lent.lock().consumers.open -= 1;
    }

    /// There is something to be sent, and more than a few bytes.
    pub fn sends(&self) {
        let mut lent = self.lent.lock();
        if lent.send.is_none() {
            lent.send = Some(self.memory.send_window(self.send_bytes));
            self.widen_send(&lent);
        }
    }

    /// So many bytes of answers to producers are written at once. Many producers' answers are more than
    /// the first window holds, and what does not fit waits until the peer acknowledges the rest, which
    /// it does late: a few small packets are no reason to hurry.
    pub fn answers(&self, bytes: usize) {
        if bytes < ANSWERS_LARGE_BYTES {
            return;
        }
        let mut lent = self.lent.lock();
        if lent.answers.is_none() {
            let wanted = self.send_bytes.min(ANSWERS_WINDOW_BYTES);
            lent.answers = Some(self.memory.send_window(wanted));
            self.widen_send(&lent);
        }
    }

    fn widen_send(&self, lent: &Lent) {
        let loans = [&lent.send, &lent.answers];
        let all: u64 = loans.into_iter().flatten().map(Loan::bytes).sum();
        self.connection.set_send_window(BASE_WINDOW_BYTES + all);
    }

    fn widen(&self, lent: &mut Lent, loan: Loan) {
        if loan.bytes() > 0 {
            lent.receive.push(loan);
            let all: u64 = lent.receive.iter().map(Loan::bytes).sum();
            self.connection
                .set_receive_window(var(BASE_WINDOW_BYTES + all));
        }
    }
}

/// A bound UDP socket with room for a burst; the system may grant less than asked.
///
/// # Errors
/// The address is taken or not this machine's.
pub fn bind_udp(address: SocketAddr) -> Result<UdpSocket, StartError> {
    let bound = || {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::DGRAM,
            Some(Protocol::UDP),
        )?;
        if address.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        socket.bind(&address.into())?;
        Ok(socket)
    };
    let socket = bound().map_err(|error| StartError::listen(Door::Quic, address, error))?;
    for (direction, raised) in [
        ("receive", socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)),
        ("send", socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)),
    ] {
        if let Err(error) = raised {
            tracing::warn!(%error, direction, "cannot raise the UDP socket's buffer");
        }
    }
    Ok(socket.into())
}

fn var(value: u64) -> VarInt {
    VarInt::from_u64(value).unwrap_or(VarInt::MAX)
}

/// Streams before authentication: the control stream and one more.
pub const UNAUTHENTICATED_STREAMS: u32 = 2;
/// Each window of a connection that has not needed more: a question and an answer.
pub const BASE_WINDOW_BYTES: u64 = 4 << 10;
/// What a consumer's acknowledgements may take of the receive window.
const ACKS_WINDOW_BYTES: u64 = 64 << 10;
/// What answers to producers may take of the send window: two writes with an answer to each of a
/// thousand producers, and room to spare.
const ANSWERS_WINDOW_BYTES: u64 = 256 << 10;
/// A write of answers from which on they get it; the first window holds several smaller ones.
const ANSWERS_LARGE_BYTES: usize = 512;
/// Streams of an admitted connection before it has used any.
const FIRST_STREAMS: u32 = 8;
/// Connection attempts that wait for the accept loop; further ones are refused.
const INCOMING_MAX: usize = 1_024;
/// Bytes kept for one such attempt: a hello of several packets.
const INCOMING_BYTES_MAX: u64 = 64 << 10;
/// Bytes kept for all of them, if the memory budget is large enough.
const INCOMING_BYTES_TOTAL_MAX: u64 = 8 << 20;
/// The part of the memory budget that they may take, of what is left to the allocator.
const INCOMING_PART: u64 = 64;
/// Packets after which a peer is asked to acknowledge, instead of every second one.
const ACK_EVERY_PACKETS: u32 = 10;
/// Longest a peer is asked to sit on an acknowledgement.
const ACK_DELAY_MAX: Duration = Duration::from_millis(5);
/// A burst of about 3,000 full packets between two wake-ups.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_udp_port_is_reported_as_such() {
        let first = bind_udp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = first.local_addr().unwrap();
        let error = bind_udp(address).unwrap_err();
        assert!(
            matches!(error, StartError::PortInUse { door: Door::Quic, address: a } if a == address),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_stranger_gets_two_streams_and_an_admitted_peer_the_rest() {
        let data = tempfile::tempdir().unwrap();
        let config = Config {
            data: data.path().to_path_buf(),
            ..Config::default()
        };
        let now_us = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_micros() as u64;
        let server = quinn::Endpoint::new(
            crate::identity::endpoint_config(data.path(), &config.quic).unwrap(),
            Some(server_config(&config, now_us).unwrap()),
            bind_udp("127.0.0.1:0".parse().unwrap()).unwrap(),
            Arc::new(quinn::TokioRuntime),
        )
        .unwrap();
        let client = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let connecting = client
            .connect_with(
                client_config(data.path()),
                server.local_addr().unwrap(),
                "localhost",
            )
            .unwrap();
        let (at_client, at_server) = tokio::join!(connecting, async {
            server.accept().await.unwrap().accept().unwrap().await
        });
        let (at_client, at_server) = (at_client.unwrap(), at_server.unwrap());

        let mut open = Vec::new();
        for _ in 0..UNAUTHENTICATED_STREAMS {
            open.push(at_client.open_bi().await.unwrap());
        }
        let mut third = Box::pin(at_client.open_bi());
        tokio::select! {
            biased;
            _ = &mut third => panic!("a third stream was open to a stranger"),
            () = std::future::ready(()) => {}
        }
        admit(&at_server, &config.quic);
        open.push(third.await.unwrap());
        assert_eq!(open.len(), 3);
        client.close(VarInt::from_u32(0), b"");
        server.close(VarInt::from_u32(0), b"");
    }

    fn client_config(data: &std::path::Path) -> quinn::ClientConfig {
        use rustls_pki_types::CertificateDer;
        use rustls_pki_types::pem::PemObject;

        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(tls::ca_path(data)).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut crypto = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        crypto.alpn_protocols = vec![millpond_protocol::ALPN.to_vec()];
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(crypto).unwrap();
        quinn::ClientConfig::new(Arc::new(crypto))
    }
}
