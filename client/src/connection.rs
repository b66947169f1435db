//! One QUIC connection to a broker: made, verified, welcomed.
//!
//! Windows, timeouts and socket buffers are set here and nowhere else. Whether and when to connect
//! again is the supervisor's business.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use millpond_protocol::control::{Hello, Welcome};
use millpond_protocol::frame::FrameType;
use millpond_protocol::limits::UDP_PAYLOAD_MIN;
use millpond_protocol::{VERSION_MAX, VERSION_MIN};
use parking_lot::Mutex;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{AckFrequencyConfig, EndpointConfig, TokioRuntime, TransportConfig};
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, MtuDiscoveryConfig, VarInt};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::address::Address;
use crate::control::{Ask, ControlStream};
use crate::error::Error;
use crate::io::{self, StreamEnd};
use crate::limits::{
    ACK_DELAY_MAX, ACK_EVERY_PACKETS, CONNECTION_WINDOW_BYTES, IDLE_TIMEOUT, INITIAL_RTT,
    KEEP_ALIVE, SEND_WINDOW_BYTES, SOCKET_BUFFER_BYTES, STREAM_WINDOW_BYTES,
};
use crate::producer::PublishStreams;

/// A connection that the broker has welcomed.
pub struct Link {
    pub connection: Connection,
    pub control: mpsc::Sender<Ask>,
    pub welcome: Welcome,
    /// The broker wants this connection to end: finish what is under way and leave.
    pub leaving: CancellationToken,
    /// Whoever has something under way on it.
    pub users: TaskTracker,
    /// Where its producers are.
    pub publishing: PublishStreams,
}

impl Link {
    /// True if nothing more should be begun on it.
    pub fn is_over(&self) -> bool {
        self.connection.close_reason().is_some() || self.leaving.is_cancelled()
    }
}

/// Makes connections to one broker.
pub struct Dialer {
    address: Address,
    hello: Hello,
    config: ClientConfig,
    max_mtu: u16,
    /// One socket per address family, made when first needed.
    endpoints: Mutex<[Option<Endpoint>; 2]>,
}

impl Dialer {
    pub fn new(address: Address, hello: Hello, tls: QuicClientConfig, max_mtu: u16) -> Self {
        let mut config = ClientConfig::new(Arc::new(tls));
        config.transport_config(Arc::new(transport(max_mtu)));
        Self {
            address,
            hello,
            config,
            max_mtu,
            endpoints: Mutex::new([None, None]),
        }
    }

    /// One attempt, handshake and welcome included. The control stream's task is left to the caller.
    pub async fn dial(&self, limit: Duration) -> Result<(Link, ControlStream), Error> {
        let deadline = Instant::now() + limit;
        let silent = || {
            Error::Connect(format!(
                "no answer from {} within {limit:?}; is the broker running there, and is its UDP port open?",
                self.address
            ))
        };
        let Ok(addresses) = timeout_at(deadline, self.address.resolve()).await else {
            return Err(silent());
        };
        let made = in_turn(&addresses?, deadline, |at| self.dial_one(at)).await;
        made.map_err(|error| error.unwrap_or_else(silent))
    }

    /// Waits until the other side has been told that connections are closed.
    pub async fn wait_idle(&self) {
        let endpoints: Vec<_> = self.endpoints.lock().iter().flatten().cloned().collect();
        for endpoint in endpoints {
            endpoint.wait_idle().await;
        }
    }

    async fn dial_one(&self, at: SocketAddr) -> Result<(Link, ControlStream), Error> {
        let endpoint = self.endpoint(at)?;
        let connecting = endpoint
            .connect_with(self.config.clone(), at, &self.address.server_name)
            .map_err(|error| Error::Connect(format!("{at} cannot be dialled: {error}")))?;
        let connection = connecting.await.map_err(|error| self.explain(&error))?;
        let opened = io::open(
            &connection,
            FrameType::Hello,
            &self.hello,
            FrameType::Welcome,
        )
        .await;
        let (send, reader, welcome) = match opened {
            Ok(opened) => opened,
            Err(StreamEnd::Lost) => {
                return Err(match connection.close_reason() {
                    Some(reason) => self.explain(&reason),
                    None => Error::Connect("the broker ended the control stream".to_owned()),
                });
            }
            Err(end) => return Err(end.into()),
        };
        let welcome: Welcome = welcome.decode()?;
        if !(VERSION_MIN..=VERSION_MAX).contains(&welcome.version) {
            return Err(Error::Version(format!(
                "the broker chose version {}, this client speaks {VERSION_MIN} to {VERSION_MAX}",
                welcome.version
            )));
        }
        let leaving = CancellationToken::new();
        let (control, stream) = ControlStream::new(send, reader, leaving.clone());
        let link = Link {
            connection,
            control,
            welcome,
            leaving,
            users: TaskTracker::new(),
            publishing: PublishStreams::default(),
        };
        Ok((link, stream))
    }

    fn endpoint(&self, remote: SocketAddr) -> Result<Endpoint, Error> {
        let mut endpoints = self.endpoints.lock();
        let slot = &mut endpoints[usize::from(remote.is_ipv6())];
        if let Some(endpoint) = slot {
            return Ok(endpoint.clone());
        }
        let made = bind(remote.is_ipv6(), self.max_mtu)
            .map_err(|error| Error::Connect(format!("no UDP socket can be opened: {error}")))?;
        Ok(slot.insert(made).clone())
    }

    fn explain(&self, error: &ConnectionError) -> Error {
        match error {
            ConnectionError::TransportError(cause) => {
                let tls = crate::tls::explain(cause.code, &cause.reason, &self.address.server_name);
                tls.unwrap_or_else(|| self.failed(&cause.to_string()))
            }
            ConnectionError::ConnectionClosed(close) => {
                let reason = String::from_utf8_lossy(&close.reason);
                let tls = crate::tls::explain(close.error_code, &reason, &self.address.server_name);
                tls.unwrap_or_else(|| self.failed(&close.to_string()))
            }
            ConnectionError::ApplicationClosed(close) => {
                let reason = String::from_utf8_lossy(&close.reason);
                match u16::try_from(close.error_code.into_inner()) {
                    Ok(code) if code != 0 => {
                        millpond_protocol::WireError::new(code.into(), reason).into()
                    }
                    _ => self.failed(&format!("it closed the connection: {reason}")),
                }
            }
            ConnectionError::VersionMismatch => {
                Error::Version("the server does not speak QUIC version 1".to_owned())
            }
            other => self.failed(&other.to_string()),
        }
    }

    fn failed(&self, why: &str) -> Error {
        Error::Connect(format!(
            "the broker at {} cannot be reached: {why}",
            self.address
        ))
    }
}

/// Dials one address after another. Each gets an equal share of the time that is left, so that a
/// silent one leaves some to those behind it. The error is the last that anybody told.
async fn in_turn<T, F>(
    addresses: &[SocketAddr],
    deadline: Instant,
    dial: impl Fn(SocketAddr) -> F,
) -> Result<T, Option<Error>>
where
    F: Future<Output = Result<T, Error>>,
{
    let mut told = None;
    for (&at, shares) in addresses.iter().zip((1..=addresses.len() as u32).rev()) {
        let left = deadline.saturating_duration_since(Instant::now());
        match timeout(left / shares, dial(at)).await {
            Ok(Ok(made)) => return Ok(made),
            Ok(Err(error)) => told = Some(error),
            Err(_) => {}
        }
    }
    Err(told)
}

/// What the first frame of a connection says of this client.
pub fn hello(token: Option<String>, client_name: String) -> Hello {
    Hello {
        version_min: VERSION_MIN,
        version_max: VERSION_MAX,
        token,
        client_name,
    }
}

fn transport(max_mtu: u16) -> TransportConfig {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(max_mtu);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_EVERY_PACKETS))
        .max_ack_delay(Some(ACK_DELAY_MAX));
    let idle_ms = VarInt::from_u32(IDLE_TIMEOUT.as_millis() as u32);
    let mut config = TransportConfig::default();
    config
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(idle_ms.into()))
        .initial_rtt(INITIAL_RTT)
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(Some(mtu))
        .ack_frequency_config(Some(acks));
    config
}

/// The other side sends no larger payloads than are taken here.
fn endpoint_config(max_mtu: u16) -> EndpointConfig {
    let mut config = EndpointConfig::default();
    config
        .max_udp_payload_size(max_mtu.max(UDP_PAYLOAD_MIN))
        .expect("the larger of a checked MTU and 1,472 is in 1,200..=65,527");
    config
}

fn bind(ipv6: bool, max_mtu: u16) -> std::io::Result<Endpoint> {
    let any = if ipv6 {
        SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))
    } else {
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
    };
    let socket = UdpSocket::bind(any)?;
    let buffers = socket2::SockRef::from(&socket);
    // The kernel may grant less; that costs speed and nothing else.
    let _ = buffers.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = buffers.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    Endpoint::new(
        endpoint_config(max_mtu),
        None,
        socket,
        Arc::new(TokioRuntime),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_broker_may_send_payloads_as_large_as_the_client_tries() {
        let takes = |max_mtu| endpoint_config(max_mtu).get_max_udp_payload_size();
        assert_eq!(takes(1_200), 1_472);
        assert_eq!(takes(6_400), 6_400);
    }

    fn hosts(last_bytes: impl IntoIterator<Item = u8>) -> Vec<SocketAddr> {
        let host = |n| SocketAddr::from((Ipv4Addr::new(10, 0, 0, n), 7400));
        last_bytes.into_iter().map(host).collect()
    }

    #[tokio::test]
    async fn silent_addresses_leave_time_for_those_behind_them() {
        let hosts = hosts(1..=3);
        let deadline = Instant::now() + Duration::from_millis(300);
        let answers = |at: SocketAddr| {
            let is_last = at == hosts[2];
            async move {
                if !is_last {
                    std::future::pending::<()>().await;
                }
                Ok(at)
            }
        };
        let made = timeout_at(deadline, in_turn(&hosts, deadline, answers)).await;
        assert_eq!(made, Ok(Ok(hosts[2])));
    }

    #[tokio::test]
    async fn what_an_address_told_is_not_forgotten_over_a_silent_one() {
        let hosts = hosts(1..=2);
        let deadline = Instant::now() + Duration::from_millis(20);
        let refused = |at: SocketAddr| {
            let is_first = at == hosts[0];
            async move {
                if !is_first {
                    std::future::pending::<()>().await;
                }
                Err::<(), _>(Error::Connect("refused".to_owned()))
            }
        };
        let told = in_turn(&hosts, deadline, refused).await;
        assert_eq!(told, Err(Some(Error::Connect("refused".to_owned()))));
        let nothing = in_turn(&hosts[1..], deadline, refused).await;
        assert_eq!(nothing, Err(None));
    }
}
