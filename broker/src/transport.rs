//! How the server speaks QUIC: every window, limit and timeout, set explicitly.
//!
//! Two stages. Until a connection is authenticated it has [`UNAUTHENTICATED_STREAMS`] streams and
//! a window for just those; [`admit`] raises both. The connection's window always covers the sum
//! of its streams' windows (`streams_max * stream_window <= connection_window`), so that a stream
//! that nobody reads cannot starve another's acknowledgements.
//!
//! It does not decide whom to accept, retry or authenticate: that is the accept loop's.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicServerConfig;
use quinn::{AckFrequencyConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use socket2::{Domain, Protocol, Socket, Type};

use crate::config::{Config, QuicConfig};
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
        .incoming_buffer_size_total(INCOMING_BYTES_TOTAL_MAX);
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
        .receive_window(window(UNAUTHENTICATED_STREAMS, quic.stream_window_bytes))
        .send_window(u64::from(quic.send_window_bytes))
        .max_idle_timeout(Some(IdleTimeout::from(millis(quic.idle_timeout_ms))))
        .keep_alive_interval(Some(Duration::from_millis(quic.keep_alive_ms)))
        .mtu_discovery_config(Some(mtu))
        .ack_frequency_config(Some(acks))
        .enable_segmentation_offload(true);
    transport
}

/// Gives an authenticated connection its streams and the window that covers them.
pub fn admit(connection: &quinn::Connection, quic: &QuicConfig) {
    connection.set_receive_window(window(quic.streams_max, quic.stream_window_bytes));
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(quic.streams_max));
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

fn window(streams: u32, stream_window_bytes: u32) -> VarInt {
    let bytes = u64::from(streams) * u64::from(stream_window_bytes);
    VarInt::from_u64(bytes).unwrap_or(VarInt::MAX)
}

fn millis(ms: u64) -> VarInt {
    VarInt::from_u64(ms).unwrap_or(VarInt::MAX)
}

/// Streams before authentication: the control stream and one more.
pub const UNAUTHENTICATED_STREAMS: u32 = 2;
/// Connection attempts that wait for the accept loop; further ones are refused.
const INCOMING_MAX: usize = 1_024;
/// Bytes kept for one such attempt: a hello of several packets.
const INCOMING_BYTES_MAX: u64 = 64 << 10;
/// Bytes kept for all of them.
const INCOMING_BYTES_TOTAL_MAX: u64 = 8 << 20;
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

    #[test]
    fn the_connection_window_covers_all_streams_at_every_setting() {
        let largest = QuicConfig {
            streams_max: 4_096,
            stream_window_bytes: 64 << 20,
            ..QuicConfig::default()
        };
        for quic in [QuicConfig::default(), largest] {
            let window = window(quic.streams_max, quic.stream_window_bytes);
            assert_eq!(window.into_inner(), quic.connection_window_bytes());
        }
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
