//! What an operator may set: every value with its default, its range and what it costs.
//!
//! Owns reading the TOML file and checking it. A key that is not known is an error, so that a
//! misspelt limit is not silently a default. `memory.budget_bytes` is what the process may have
//! resident of its own (`RssAnon`; files that are mapped are the page cache's). It is split so:
//!
//! ```text
//! 40 MiB  the process itself, and the log's buffers for one entry of the largest size
//!    1/8  what the allocator cannot give back, and the state of topics and subscriptions
//!   1/16  recent bodies, for consumers at the tail
//!   1/32  idle buffers of the log
//!   1/16  received by QUIC and not yet read          (one connection at most a quarter of what is free)
//!   1/16  written to QUIC and not yet acknowledged   (likewise)
//!   half of the rest   connections and their streams; beyond it newcomers are refused
//!   half of the rest   messages on their way in and out; beyond it they wait
//! ```
//!
//! It does not look at the disk or the network: that a folder is writable or a port is free is
//! found out by whoever uses it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use millpond_protocol::limits::FRAME_BYTES_MAX;
use rustls_pki_types::ServerName;
use serde::{Deserialize, Deserializer};

/// Everything an operator may set. `Config::default()` is what `millpond serve` runs with.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The folder of the log, the certificates and the reserve. Default `./millpond-data`.
    pub data: PathBuf,
    /// Where QUIC listens (UDP). Default `127.0.0.1:7400`; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where health and metrics are served (TCP), `"off"` for nowhere. Default `127.0.0.1:8080`.
    #[serde(deserialize_with = "address_or_off")]
    pub http: Option<SocketAddr>,
    /// Whether clients must show a token. Default: exactly when `listen` is not loopback.
    pub require_tokens: Option<bool>,
    /// Makes a token of this name when the store has none yet; it is told once, at that start.
    pub first_token: Option<String>,
    /// How long a shutdown waits for settlements of what is out, in ms. Default 10,000; at most
    /// 600,000. What is then still out is released uncharged.
    pub shutdown_grace_ms: u64,
    /// Threads that read sealed segments. Default 2; 1 to 64; each costs a stack and one read
    /// buffer of the largest message.
    pub read_threads: usize,
    pub tls: TlsConfig,
    pub memory: MemoryConfig,
    pub log: LogConfig,
    pub disk: DiskConfig,
    pub quic: QuicConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data: PathBuf::from("./millpond-data"),
            listen: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 7400),
            http: Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080)),
            require_tokens: None,
            first_token: None,
            shutdown_grace_ms: 10_000,
            read_threads: 2,
            tls: TlsConfig::default(),
            memory: MemoryConfig::default(),
            log: LogConfig::default(),
            disk: DiskConfig::default(),
            quic: QuicConfig::default(),
        }
    }
}

/// The server's certificate.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// A certificate chain in PEM, instead of the generated one. Needs `key`.
    pub cert: Option<PathBuf>,
    /// The private key of `cert`, in PEM.
    pub key: Option<PathBuf>,
    /// DNS names and IP addresses that the generated certificate also holds. At most 64.
    pub names: Vec<String>,
}

/// How much memory the broker may take. Shares keep one user from taking all that messages may.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Bytes that the process may have resident, files aside. Default 512 MiB; at least 192 MiB, of
    /// which the process takes 40. The file's head says how it is split.
    pub budget_bytes: u64,
    /// Most of the messages' part that one connection may hold. Default 25 %.
    pub connection_percent: u8,
    /// Most of the messages' part that one topic's publishes may hold. Default 50 %.
    pub topic_percent: u8,
    /// Most of the messages' part that all connections of one token may hold. Default 50 %.
    pub token_percent: u8,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            budget_bytes: 512 << 20,
            connection_percent: 25,
            topic_percent: 50,
            token_percent: 50,
        }
    }
}

impl MemoryConfig {
    /// Bytes of one connection's share.
    #[must_use]
    pub fn connection_bytes(&self) -> u64 {
        self.share(self.connection_percent)
    }

    /// Bytes of one topic's share.
    #[must_use]
    pub fn topic_bytes(&self) -> u64 {
        self.share(self.topic_percent)
    }

    /// Bytes of one token's share.
    #[must_use]
    pub fn token_bytes(&self) -> u64 {
        self.share(self.token_percent)
    }

    /// A share always has room for one frame of the largest size beside small ones, or that frame
    /// could never be read.
    fn share(&self, percent: u8) -> u64 {
        (self.message_bytes() / 100 * u64::from(percent)).max(SHARE_BYTES_MIN)
    }

    /// Bytes of recent bodies.
    #[must_use]
    pub fn cache_bytes(&self) -> u64 {
        self.budget_bytes / 16
    }

    /// Bytes of idle buffers that the log keeps for its next entries.
    #[must_use]
    pub fn log_idle_bytes(&self) -> u64 {
        self.budget_bytes / 32
    }

    /// Bytes that may have been received and not read, of all connections.
    #[must_use]
    pub fn receive_bytes(&self) -> u64 {
        self.budget_bytes / 16
    }

    /// Bytes that may have been written and not acknowledged, of all connections.
    #[must_use]
    pub fn send_bytes(&self) -> u64 {
        self.budget_bytes / 16
    }

    /// Bytes of connections and their streams, by what one costs at least
    /// (`memory::CONNECTION_BYTES`, `memory::STREAM_BYTES`).
    #[must_use]
    pub fn session_bytes(&self) -> u64 {
        self.rest_bytes() / 2
    }

    /// Bytes of messages on their way in and out.
    #[must_use]
    pub fn message_bytes(&self) -> u64 {
        self.rest_bytes() - self.session_bytes()
    }

    fn rest_bytes(&self) -> u64 {
        let parts =
            self.cache_bytes() + self.log_idle_bytes() + self.receive_bytes() + self.send_bytes();
        let free = self.budget_bytes.saturating_sub(PROCESS_BYTES);
        free.saturating_sub(self.budget_bytes / 8 + parts)
    }
}

/// The write-ahead log.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Bytes after which a segment is sealed; the first of a store ends after 8 MiB at the latest. Default
    /// 72 MiB; 1 MiB to 4 GiB. Space comes back in units of this. A snapshot ends its segment too, so a
    /// little more than `snapshot_every_bytes` wastes the least of what was filled with zeros ahead.
    pub segment_bytes: u64,
    /// Log bytes after which a snapshot is written, which bounds what a restart replays to about
    /// twice this. Default 64 MiB; at least 1 MiB.
    pub snapshot_every_bytes: u64,
    /// Whether sealed segments are read through maps; without, a bad disk is an error of one
    /// read instead of the end of the process. Default true.
    pub mmap: bool,
    /// Segments filled with zeros ahead of need, which makes syncs cheaper. Default 2; 1 to 16;
    /// each takes `segment_bytes` of disk. The last one is left for the next start, which so needs no
    /// new space.
    pub spare_segments: usize,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            segment_bytes: 72 << 20,
            snapshot_every_bytes: 64 << 20,
            mmap: true,
            spare_segments: 2,
        }
    }
}

/// When the disk counts as low. Of a percentage and a number of bytes the smaller one rules.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskConfig {
    /// Free space below which credit shrinks. Default 15 % or 10 GiB.
    pub soft_percent: u8,
    pub soft_bytes: u64,
    /// Free space below which publishes are refused. Default 5 % or 2 GiB.
    pub hard_percent: u8,
    pub hard_bytes: u64,
    /// Disk kept back for settlements, one cleaning and one snapshot. Default 320 MiB; at least
    /// `log.segment_bytes`.
    pub reserve_bytes: u64,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            soft_percent: 15,
            soft_bytes: 10 << 30,
            hard_percent: 5,
            hard_bytes: 2 << 30,
            reserve_bytes: 320 << 20,
        }
    }
}

/// The transport.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuicConfig {
    /// Most connections at once, if the memory budget has room for them (see
    /// `MemoryConfig::session_bytes`). Default 12,000; 1 to 1,000,000.
    pub max_connections: usize,
    /// Upper bound of path MTU discovery, in bytes of UDP payload. Default 1,452; 1,200 to 6,400
    /// (above that the kernel no longer sends several packets in one call).
    pub max_mtu: u16,
    /// Silence after which a connection counts as lost. Default 6,000 ms; 1,000 to 60,000.
    pub idle_timeout_ms: u64,
    /// Longest silence before a probe. Default 2,000 ms; at most a third of `idle_timeout_ms`.
    pub keep_alive_ms: u64,
    /// Longest time from the first packet to an authenticated hello. Default 5,000 ms; 100 to
    /// 60,000.
    pub handshake_deadline_ms: u64,
    /// Streams that one connection may have open. Default 1,100; 4 to 4,096.
    pub streams_max: u32,
    /// Bytes a peer may send ahead of being read, per stream, if the memory budget has room. Default
    /// 1 MiB; 64 KiB to 64 MiB. Bandwidth of one stream is at most this per round trip.
    pub stream_window_bytes: u32,
    /// Bytes written to a peer and not yet acknowledged by it, per connection, if the memory budget has
    /// room. Default 8 MiB; 64 KiB to 256 MiB.
    pub send_window_bytes: u32,
}

impl Default for QuicConfig {
    fn default() -> Self {
        Self {
            max_connections: 12_000,
            max_mtu: 1_452,
            idle_timeout_ms: 6_000,
            keep_alive_ms: 2_000,
            handshake_deadline_ms: 5_000,
            streams_max: 1_100,
            stream_window_bytes: 1 << 20,
            send_window_bytes: 8 << 20,
        }
    }
}

impl QuicConfig {
    /// Longest time from the first packet to an authenticated hello.
    #[must_use]
    pub fn handshake_deadline(&self) -> Duration {
        Duration::from_millis(self.handshake_deadline_ms)
    }
}

/// What is wrong with a configuration; the operator mends it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Unreadable {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the configuration file {} is not valid: {detail}", path.display())]
    Invalid { path: PathBuf, detail: String },
    #[error("the setting `{key}` {problem}")]
    Value { key: &'static str, problem: String },
}

impl Config {
    /// Reads and checks `path`, or takes the defaults without one.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, has a key that is not known, or a value out of range.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            path: path.to_path_buf(),
            source,
        })?;
        let config: Self = toml::from_str(&text).map_err(|error| ConfigError::Invalid {
            path: path.to_path_buf(),
            detail: error.to_string().trim_end().to_string(),
        })?;
        config.check()?;
        Ok(config)
    }

    /// Checks every range and relation. Called again at start, because callers may change fields.
    ///
    /// # Errors
    /// The first value that does not fit, with its key.
    pub fn check(&self) -> Result<(), ConfigError> {
        within("shutdown_grace_ms", self.shutdown_grace_ms, 0..=600_000)?;
        within("read_threads", self.read_threads, 1..=64)?;
        if self.require_tokens == Some(false) && !self.listens_on_loopback() {
            return Err(ConfigError::Value {
                key: "require_tokens",
                problem: format!(
                    "cannot be false while `listen` is {}, which others can reach: \
                     remove it, or listen on 127.0.0.1",
                    self.listen
                ),
            });
        }
        if let Some(name) = &self.first_token {
            within("first_token", name.len(), 1..=FIRST_TOKEN_NAME_BYTES_MAX)?;
        }
        self.tls.check()?;
        self.memory.check()?;
        self.log.check()?;
        self.disk.check(&self.log)?;
        self.quic.check()
    }

    /// Whether only this machine can reach the broker.
    #[must_use]
    pub fn listens_on_loopback(&self) -> bool {
        self.listen.ip().to_canonical().is_loopback()
    }

    /// Whether a client must show a token.
    #[must_use]
    pub fn tokens_required(&self) -> bool {
        self.require_tokens
            .unwrap_or_else(|| !self.listens_on_loopback())
    }

    /// How long a shutdown waits for settlements.
    #[must_use]
    pub fn shutdown_grace(&self) -> Duration {
        Duration::from_millis(self.shutdown_grace_ms)
    }
}

impl TlsConfig {
    fn check(&self) -> Result<(), ConfigError> {
        if self.cert.is_some() != self.key.is_some() {
            return Err(ConfigError::Value {
                key: "tls",
                problem: "must have both `cert` and `key`, or neither".to_string(),
            });
        }
        within("tls.names", self.names.len(), 0..=TLS_NAMES_MAX)?;
        for name in &self.names {
            if ServerName::try_from(name.as_str()).is_err() {
                return Err(ConfigError::Value {
                    key: "tls.names",
                    problem: format!("has `{name}`, which is neither a DNS name nor an address"),
                });
            }
        }
        Ok(())
    }
}

impl MemoryConfig {
    fn check(&self) -> Result<(), ConfigError> {
        within(
            "memory.budget_bytes",
            self.budget_bytes,
            MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX,
        )?;
        within(
            "memory.connection_percent",
            self.connection_percent,
            1..=100,
        )?;
        within("memory.topic_percent", self.topic_percent, 1..=100)?;
        within("memory.token_percent", self.token_percent, 1..=100)
    }
}

impl LogConfig {
    fn check(&self) -> Result<(), ConfigError> {
        within("log.segment_bytes", self.segment_bytes, 1 << 20..=4 << 30)?;
        within(
            "log.snapshot_every_bytes",
            self.snapshot_every_bytes,
            1 << 20..=DISK_BYTES_MAX,
        )?;
        within("log.spare_segments", self.spare_segments, 1..=16)
    }
}

impl DiskConfig {
    fn check(&self, log: &LogConfig) -> Result<(), ConfigError> {
        within("disk.soft_percent", self.soft_percent, 0..=90)?;
        within("disk.hard_percent", self.hard_percent, 0..=90)?;
        within("disk.soft_bytes", self.soft_bytes, 0..=DISK_BYTES_MAX)?;
        within("disk.hard_bytes", self.hard_bytes, 0..=DISK_BYTES_MAX)?;
        if self.hard_percent > self.soft_percent || self.hard_bytes > self.soft_bytes {
            return Err(ConfigError::Value {
                key: "disk",
                problem: "must have its hard limits at or below its soft ones".to_string(),
            });
        }
        within(
            "disk.reserve_bytes",
            self.reserve_bytes,
            log.segment_bytes..=DISK_BYTES_MAX,
        )
    }
}

impl QuicConfig {
    fn check(&self) -> Result<(), ConfigError> {
        within("quic.max_connections", self.max_connections, 1..=1_000_000)?;
        within("quic.max_mtu", self.max_mtu, 1_200..=6_400)?;
        within("quic.idle_timeout_ms", self.idle_timeout_ms, 1_000..=60_000)?;
        within(
            "quic.keep_alive_ms",
            self.keep_alive_ms,
            100..=self.idle_timeout_ms / 3,
        )?;
        within(
            "quic.handshake_deadline_ms",
            self.handshake_deadline_ms,
            100..=60_000,
        )?;
        within("quic.streams_max", self.streams_max, 4..=4_096)?;
        within(
            "quic.stream_window_bytes",
            self.stream_window_bytes,
            64 << 10..=64 << 20,
        )?;
        within(
            "quic.send_window_bytes",
            self.send_window_bytes,
            64 << 10..=256 << 20,
        )
    }
}

fn within<T: PartialOrd + fmt::Display>(
    key: &'static str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), ConfigError> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(ConfigError::Value {
        key,
        problem: format!(
            "is {value}, but must be from {} to {}",
            range.start(),
            range.end()
        ),
    })
}

fn address_or_off<'de, D: Deserializer<'de>>(input: D) -> Result<Option<SocketAddr>, D::Error> {
    let text = String::deserialize(input)?;
    if text == "off" {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        serde::de::Error::custom(format!(
            "`{text}` is neither an address and port nor \"off\""
        ))
    })
}

/// Most extra names in a certificate: clients read all of them in every handshake.
const TLS_NAMES_MAX: usize = 64;
/// Longest name of a token, in bytes.
const FIRST_TOKEN_NAME_BYTES_MAX: usize = 200;
/// The process itself (about 15 MiB on 2 cores), and the log's buffers while it writes a message of the
/// largest size: the group that had to grow for it, and the one before.
const PROCESS_BYTES: u64 = 40 << 20;
/// The least with which a message of the largest size can come in and go out beside small ones. At 160 MiB
/// producers of 64 KiB to 15 MiB, idle connections and consumers that take and never finish reached 159 resident.
pub const MEMORY_BYTES_MIN: u64 = 192 << 20;
/// One frame of the largest size, and small ones beside it.
pub const SHARE_BYTES_MIN: u64 = FRAME_BYTES_MAX as u64 + (4 << 20);
/// No machine has more (16 TiB); a larger number is a slip.
const MEMORY_BYTES_MAX: u64 = 16 << 40;
/// No disk has more (1 EiB); a larger number is a slip.
const DISK_BYTES_MAX: u64 = 1 << 60;

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::load(Some(file.path()))
    }

    #[test]
    fn the_defaults_pass_their_own_check() {
        Config::default().check().unwrap();
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn a_section_keeps_the_defaults_of_what_it_leaves_out() {
        let config = parse("http = \"off\"\n[memory]\nbudget_bytes = 268435456\n").unwrap();
        assert_eq!(config.http, None);
        assert_eq!(config.memory.budget_bytes, 256 << 20);
        assert_eq!(config.memory.topic_percent, 50);
    }

    #[test]
    fn a_misspelt_key_is_named_in_the_error() {
        let error = parse("[quic]\nmax_mut = 1452\n").unwrap_err().to_string();
        assert!(error.contains("max_mut"), "{error}");
        assert!(error.contains("line 2"), "{error}");
    }

    #[test]
    fn a_value_out_of_range_tells_key_value_and_range() {
        let error = parse("[quic]\nmax_mtu = 9000\n").unwrap_err().to_string();
        assert_eq!(
            error,
            "the setting `quic.max_mtu` is 9000, but must be from 1200 to 6400"
        );
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::load(Some(Path::new("/nowhere/millpond.toml"))).unwrap_err();
        assert!(error.to_string().contains("/nowhere/millpond.toml"));
    }

    #[test]
    fn tokens_are_required_exactly_beyond_loopback() {
        let mut config = Config::default();
        assert!(!config.tokens_required());
        for (listen, required) in [
            ("[::1]:1", false),
            ("127.9.9.9:1", false),
            ("[::ffff:127.0.0.1]:1", false),
            ("0.0.0.0:1", true),
            ("[::]:1", true),
            ("10.0.0.1:1", true),
        ] {
            config.listen = listen.parse().unwrap();
            assert_eq!(config.tokens_required(), required, "{listen}");
        }
        config.require_tokens = Some(false);
        assert!(config.check().is_err(), "open to others without tokens");
    }

    #[test]
    fn every_share_holds_the_largest_frame() {
        let memory = MemoryConfig {
            budget_bytes: MEMORY_BYTES_MIN,
            connection_percent: 1,
            ..MemoryConfig::default()
        };
        assert_eq!(memory.connection_bytes(), SHARE_BYTES_MIN);
        assert!(memory.message_bytes() >= SHARE_BYTES_MIN);
        let default = MemoryConfig::default();
        assert_eq!(default.topic_bytes(), default.message_bytes() / 100 * 50);
    }

    #[test]
    fn the_parts_of_the_budget_are_the_budget() {
        for mib in [192, 193, 512, 4096] {
            let memory = MemoryConfig {
                budget_bytes: mib << 20,
                ..MemoryConfig::default()
            };
            let parts = PROCESS_BYTES
                + memory.budget_bytes / 8
                + memory.cache_bytes()
                + memory.log_idle_bytes()
                + memory.receive_bytes()
                + memory.send_bytes()
                + memory.session_bytes()
                + memory.message_bytes();
            assert_eq!(parts, memory.budget_bytes);
        }
    }

    #[test]
    fn a_budget_too_small_for_the_largest_message_is_refused() {
        let error = parse("[memory]\nbudget_bytes = 67108864\n").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the setting `memory.budget_bytes` is 67108864, but must be from 201326592 to 17592186044416"
        );
    }

    #[test]
    fn half_a_certificate_and_a_bad_name_are_refused() {
        assert!(parse("[tls]\ncert = \"a.pem\"\n").is_err());
        assert!(parse("[tls]\nnames = [\"not a name\"]\n").is_err());
        assert!(parse("[tls]\nnames = [\"q.example.org\", \"10.0.0.7\"]\n").is_ok());
    }

    #[test]
    fn a_reserve_smaller_than_a_segment_is_refused() {
        let error = parse("[disk]\nreserve_bytes = 1048576\n").unwrap_err();
        assert!(error.to_string().contains("disk.reserve_bytes"), "{error}");
    }
}
