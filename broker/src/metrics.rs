//! What the broker counts of itself, and how all metrics are written down for a scrape.
//!
//! Two kinds, one text. What happens too often to be asked for is counted here as it happens:
//! commits, waits, bytes, connections. What is a state, or is counted by the queue, comes as
//! [`Sample`]s at the moment of the scrape. All names begin with `millpond_`.

mod sample;

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use millpond_protocol::ErrorCode;
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

pub use sample::{Sample, Value, of_counters, of_disk, of_memory, of_status};

/// The counters of one broker. Updating one is an atomic addition.
#[derive(Debug)]
pub struct BrokerMetrics {
    registry: Registry,
    sync_seconds: Histogram,
    group_records: Histogram,
    group_bytes: Histogram,
    credit_wait: Family<Reason, Histogram>,
    refused: Family<Reason, Counter>,
    messages_in: Counter,
    bytes_in: Counter,
    messages_out: Counter,
    bytes_out: Counter,
    connections: Gauge,
    accepted: Counter,
    handshakes: Gauge,
    streams: Gauge,
    recovery_seconds: Gauge<f64, AtomicU64>,
}

impl BrokerMetrics {
    #[must_use]
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            sync_seconds: Histogram::new(SYNC_SECONDS),
            group_records: Histogram::new(GROUP_RECORDS),
            group_bytes: Histogram::new(GROUP_BYTES),
            credit_wait: Family::new_with_constructor(|| Histogram::new(WAIT_SECONDS)),
            refused: Family::default(),
            messages_in: Counter::default(),
            bytes_in: Counter::default(),
            messages_out: Counter::default(),
            bytes_out: Counter::default(),
            connections: Gauge::default(),
            accepted: Counter::default(),
            handshakes: Gauge::default(),
            streams: Gauge::default(),
            recovery_seconds: Gauge::default(),
        };
        metrics.registry = metrics.register();
        metrics
    }

    fn register(&self) -> Registry {
        let mut all = Registry::with_prefix(PREFIX);
        let a = &mut all;
        let sync = "How long the log took to write and sync one commit group";
        a.register("sync_seconds", sync, self.sync_seconds.clone());
        let records = "Records in one commit group";
        a.register("commit_group_records", records, self.group_records.clone());
        let bytes = "Bytes of one commit group";
        a.register("commit_group_bytes", bytes, self.group_bytes.clone());
        let wait = "How long a producer's stream was without credit, by reason";
        a.register("credit_wait_seconds", wait, self.credit_wait.clone());
        let refused = "Connections and requests refused, by reason";
        a.register("refused", refused, self.refused.clone());
        let messages_in = "Messages received in publishes, duplicates included";
        a.register("received_messages", messages_in, self.messages_in.clone());
        let bytes_in = "Bytes of messages received in publishes";
        a.register("received_bytes", bytes_in, self.bytes_in.clone());
        let messages_out = "Messages sent in deliveries, redeliveries included";
        a.register("sent_messages", messages_out, self.messages_out.clone());
        let bytes_out = "Bytes of messages sent in deliveries";
        a.register("sent_bytes", bytes_out, self.bytes_out.clone());
        let connections = "Connections that are open";
        a.register("connections", connections, self.connections.clone());
        let accepted = "Connections accepted since the start";
        a.register("connections_accepted", accepted, self.accepted.clone());
        let handshakes = "Connections that have not yet been authenticated";
        a.register("handshakes", handshakes, self.handshakes.clone());
        let streams = "Streams that are open";
        a.register("streams", streams, self.streams.clone());
        let recovery = "How long the last start took to recover the log";
        a.register("recovery_seconds", recovery, self.recovery_seconds.clone());
        all
    }

    /// One commit group was made durable.
    pub fn observe_commit(&self, records: u32, bytes: usize, sync: Duration) {
        self.group_records.observe(f64::from(records));
        self.group_bytes.observe(bytes as f64);
        self.sync_seconds.observe(sync.as_secs_f64());
    }

    /// A producer that had used up its credit got some again after `wait`.
    pub fn observe_credit_wait(&self, reason: ErrorCode, wait: Duration) {
        let histogram = self.credit_wait.get_or_create(&Reason::of(reason));
        histogram.observe(wait.as_secs_f64());
    }

    /// A connection, stream or request was refused.
    pub fn refused(&self, reason: ErrorCode) {
        self.refused.get_or_create(&Reason::of(reason)).inc();
    }

    /// A publish frame was read.
    pub fn received(&self, messages: u64, bytes: u64) {
        self.messages_in.inc_by(messages);
        self.bytes_in.inc_by(bytes);
    }

    /// A deliver frame was written.
    pub fn sent(&self, messages: u64, bytes: u64) {
        self.messages_out.inc_by(messages);
        self.bytes_out.inc_by(bytes);
    }

    /// The log was recovered in `took`.
    pub fn recovered(&self, took: Duration) {
        self.recovery_seconds.set(took.as_secs_f64());
    }

    /// Counts a connection for as long as the answer lives.
    #[must_use]
    pub fn open_connection(&self) -> Open {
        self.accepted.inc();
        Open::new(&self.connections)
    }

    /// Counts a connection that is not authenticated for as long as the answer lives.
    #[must_use]
    pub fn begin_handshake(&self) -> Open {
        Open::new(&self.handshakes)
    }

    /// Counts a stream for as long as the answer lives.
    #[must_use]
    pub fn open_stream(&self) -> Open {
        Open::new(&self.streams)
    }

    /// Connections that are open.
    #[must_use]
    pub fn connections(&self) -> usize {
        usize::try_from(self.connections.get()).unwrap_or(0)
    }

    /// Connections that have not yet been authenticated.
    #[must_use]
    pub fn handshakes(&self) -> usize {
        usize::try_from(self.handshakes.get()).unwrap_or(0)
    }

    /// Everything in the text format that Prometheus reads, `samples` included.
    #[must_use]
    pub fn encode(&self, samples: Vec<Sample>) -> String {
        let mut sampled = Registry::with_prefix(PREFIX);
        sampled.register_collector(Box::new(sample::Samples::new(samples)));
        let mut out = String::new();
        encode_registry(&mut out, &self.registry)
            .and_then(|()| encode_registry(&mut out, &sampled))
            .and_then(|()| encode_eof(&mut out))
            .expect("a String takes whatever is written to it");
        out
    }
}

impl Default for BrokerMetrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Something that is counted while this lives.
#[derive(Debug)]
pub struct Open(Gauge);

impl Open {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// An error code as a label. The codes are a fixed list, so the series are bounded.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: Code,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, Hash)]
struct Code(ErrorCode);

impl Reason {
    fn of(code: ErrorCode) -> Self {
        Self { reason: Code(code) }
    }
}

impl EncodeLabelValue for Code {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), std::fmt::Error> {
        snake_case(&format!("{:?}", self.0)).encode(encoder)
    }
}

/// `DiskLow` as `disk_low`.
fn snake_case(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 4);
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.push(letter.to_ascii_lowercase());
    }
    out
}

const PREFIX: &str = "millpond";
/// From a fast NVMe's flush to a disk in trouble.
const SYNC_SECONDS: [f64; 14] = [
    0.000_05, 0.000_1, 0.000_2, 0.000_4, 0.000_8, 0.001_6, 0.003_2, 0.006_4, 0.012_8, 0.025_6, 0.1,
    0.4, 1.6, 6.4,
];
const GROUP_RECORDS: [f64; 8] = [1.0, 4.0, 16.0, 64.0, 256.0, 1_024.0, 4_096.0, 16_384.0];
const GROUP_BYTES: [f64; 8] = [
    4_096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
];
/// Up to the client's default `send_timeout`.
const WAIT_SECONDS: [f64; 9] = [0.001, 0.004, 0.016, 0.064, 0.25, 1.0, 4.0, 15.0, 30.0];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_in_the_text() {
        let metrics = BrokerMetrics::new();
        metrics.observe_commit(3, 5_000, Duration::from_micros(150));
        metrics.observe_credit_wait(ErrorCode::DiskLow, Duration::from_millis(2));
        metrics.received(3, 4_000);
        metrics.refused(ErrorCode::Unauthorized);
        metrics.recovered(Duration::from_millis(1_500));
        let text = metrics.encode(Vec::new());
        for line in [
            "millpond_sync_seconds_bucket{le=\"0.0002\"} 1",
            "millpond_sync_seconds_bucket{le=\"0.0001\"} 0",
            "millpond_commit_group_records_sum 3.0",
            "millpond_credit_wait_seconds_count{reason=\"disk_low\"} 1",
            "millpond_received_messages_total 3",
            "millpond_received_bytes_total 4000",
            "millpond_refused_total{reason=\"unauthorized\"} 1",
            "millpond_recovery_seconds 1.5",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn what_is_open_is_counted_until_it_is_dropped() {
        let metrics = BrokerMetrics::new();
        let first = metrics.open_connection();
        let second = metrics.open_connection();
        let handshake = metrics.begin_handshake();
        assert_eq!((metrics.connections(), metrics.handshakes()), (2, 1));
        drop((first, handshake));
        assert_eq!((metrics.connections(), metrics.handshakes()), (1, 0));
        drop(second);
        let text = metrics.encode(Vec::new());
        assert!(text.contains("millpond_connections 0\n"), "{text}");
        assert!(
            text.contains("millpond_connections_accepted_total 2\n"),
            "{text}"
        );
    }

    #[test]
    fn every_metric_has_one_help_line_and_the_prefix() {
        let metrics = BrokerMetrics::new();
        let text = metrics.encode(vec![Sample::gauge("now", "The present", 1.0)]);
        let mut names: Vec<_> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# HELP "))
            .map(|line| line.split(' ').next().unwrap())
            .collect();
        assert!(names.iter().all(|name| name.starts_with("millpond_")));
        assert!(names.contains(&"millpond_now"));
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all, "{text}");
    }
}
