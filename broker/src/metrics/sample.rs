//! Metrics that are asked for at the moment of a scrape, and where they come from.
//!
//! Bounded by what they come from: a status holds so many topics and subscriptions, the queue's
//! counters so many error codes.

use std::fmt;

use millpond_protocol::control::{StatusView, SubscriptionView};
use millpond_queue::{Counters, LATE_BUCKETS_MS};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

use crate::disk::{DiskLevel, DiskMonitor};
use crate::memory::{Class, MemoryBudget};

/// One value of one metric. Samples of one name have the same help and kind of value.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Without the prefix; counters without `_total`.
    pub name: &'static str,
    pub help: &'static str,
    pub labels: Vec<(&'static str, String)>,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Gauge(f64),
    Counter(u64),
    Histogram {
        sum: f64,
        /// Upper bound of each bucket and what fell into it and not into the one before.
        buckets: Vec<(f64, u64)>,
    },
}

impl Sample {
    /// A value that goes up and down.
    #[must_use]
    pub fn gauge(name: &'static str, help: &'static str, value: f64) -> Self {
        Self::new(name, help, Value::Gauge(value))
    }

    /// A value that only rises.
    #[must_use]
    pub fn counter(name: &'static str, help: &'static str, value: u64) -> Self {
        Self::new(name, help, Value::Counter(value))
    }

    /// The same with one more label.
    #[must_use]
    pub fn with(mut self, label: &'static str, value: impl Into<String>) -> Self {
        self.labels.push((label, value.into()));
        self
    }

    fn new(name: &'static str, help: &'static str, value: Value) -> Self {
        Self {
            name,
            help,
            labels: Vec::new(),
            value,
        }
    }
}

/// Samples in the order in which they are written: those of one name together.
#[derive(Debug)]
pub(super) struct Samples(Vec<Sample>);

impl Samples {
    pub(super) fn new(mut samples: Vec<Sample>) -> Self {
        samples.sort_by_key(|sample| sample.name);
        Self(samples)
    }
}

impl Collector for Samples {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for family in self.0.chunk_by(|one, next| one.name == next.name) {
            let [first, ..] = family else { continue };
            let kind = first.value.kind();
            let mut metric = encoder.encode_descriptor(first.name, first.help, None, kind)?;
            for sample in family {
                if sample.labels.is_empty() {
                    sample.value.encode(&mut metric)?;
                } else {
                    sample
                        .value
                        .encode(&mut metric.encode_family(&sample.labels)?)?;
                }
            }
        }
        Ok(())
    }
}

impl Value {
    fn kind(&self) -> MetricType {
        match self {
            Self::Gauge(_) => MetricType::Gauge,
            Self::Counter(_) => MetricType::Counter,
            Self::Histogram { .. } => MetricType::Histogram,
        }
    }

    fn encode(&self, encoder: &mut MetricEncoder<'_>) -> fmt::Result {
        match self {
            Self::Gauge(value) => encoder.encode_gauge(value),
            Self::Counter(value) => encoder.encode_counter::<NoLabelSet, _, u64>(value, None),
            Self::Histogram { sum, buckets } => {
                let count = buckets.iter().map(|(_, count)| count).sum();
                encoder.encode_histogram::<NoLabelSet>(*sum, count, buckets, None)
            }
        }
    }
}

/// The state of the broker, its topics and subscriptions.
#[must_use]
pub fn of_status(status: &StatusView) -> Vec<Sample> {
    let number = |name, help, value: u64| Sample::gauge(name, help, value as f64);
    let mut out = vec![
        number(
            "ready",
            "Whether the broker takes and gives messages",
            u64::from(status.ready),
        ),
        number(
            "uptime_seconds",
            "Time since the start",
            status.uptime_ms / 1_000,
        ),
        number("log_bytes", "Bytes of the log on disk", status.log_bytes),
        number(
            "log_segments",
            "Segments of the log",
            u64::from(status.segments),
        ),
        number(
            "log_appended_index",
            "The last log entry written",
            status.appended,
        ),
        number(
            "log_durable_index",
            "The last log entry that survives a power cut",
            status.durable,
        ),
    ];
    for topic in &status.topics {
        let of = |sample: Sample| sample.with("topic", &topic.name);
        let kept = topic.next.0.saturating_sub(topic.first.0);
        let offsets = "Offsets from the first message kept to the next one";
        out.push(of(number("topic_offsets", offsets, kept)));
        out.push(of(number(
            "topic_bytes",
            "Bytes of the messages kept",
            topic.bytes,
        )));
        out.push(of(number(
            "topic_delayed",
            "Messages published but not yet due",
            topic.delayed,
        )));
        if let Some(letters) = topic.dead_letters {
            let help = "Letters in a dead-letter topic";
            out.push(of(number("dead_letters", help, letters)));
            let age_ms = topic.oldest_dead_at.map_or(0, |at| status.now.ms_since(at));
            let help = "Time since the oldest letter of a dead-letter topic died";
            let age = Sample::gauge("dead_letters_oldest_age_seconds", help, age_ms as f64 / 1e3);
            out.push(of(age));
        }
    }
    for subscription in &status.subscriptions {
        of_subscription(subscription, &mut out);
    }
    out
}

fn of_subscription(view: &SubscriptionView, out: &mut Vec<Sample>) {
    let of = |name, help, value: f64| {
        Sample::gauge(name, help, value)
            .with("topic", &view.topic)
            .with("subscription", &view.name)
    };
    for (state, count) in [
        ("ready", view.ready),
        ("in_flight", view.in_flight),
        ("scheduled", view.scheduled),
        ("dead", view.dead),
    ] {
        let help = "Messages of a subscription by state";
        out.push(of("messages", help, count as f64).with("state", state));
    }
    out.push(of(
        "consumers",
        "Consumers that are attached",
        f64::from(view.consumers),
    ));
    let pinned = "Bytes that only stay because the subscription has not finished them";
    out.push(of("pinned_bytes", pinned, view.pinned_bytes as f64));
    let stalled = f64::from(u8::from(view.stalled.is_some()));
    out.push(of(
        "stalled",
        "Whether something holds deliveries back",
        stalled,
    ));
    let age = view.oldest_ready_ms.unwrap_or(0) as f64 / 1_000.0;
    out.push(of(
        "oldest_ready_age_seconds",
        "Age of the oldest message that is ready",
        age,
    ));
    if let Some(due) = view.next_due {
        let help = "When the next scheduled message is due, in seconds since 1970";
        out.push(of("next_due_timestamp_seconds", help, due.0 as f64 / 1e6));
    }
}

/// What the queue has counted since the start.
#[must_use]
pub fn of_counters(counters: &Counters) -> Vec<Sample> {
    let c = Sample::counter;
    let mut out = vec![
        c("published", "Messages appended", counters.published),
        c(
            "dedup_hits",
            "Messages that were there already",
            counters.dedup_hits,
        ),
        c(
            "producers_fenced",
            "Producers fenced by a newer epoch",
            counters.producers_fenced,
        ),
        c(
            "sequence_gaps",
            "Publishes refused because of a gap",
            counters.sequence_gaps,
        ),
        c(
            "lost",
            "Messages in damaged entries whose loss was accepted, of what was replayed",
            counters.lost,
        ),
        c("delivered", "Hand-outs", counters.delivered),
        c(
            "released",
            "Messages handed back untouched",
            counters.released,
        ),
        c(
            "settlements_late",
            "Settlements refused for a lost lease",
            counters.settlements_late,
        ),
        c("redriven", "Dead letters sent back", counters.redriven),
        c("purged", "Messages and letters purged", counters.purged),
    ];
    let attempt = |outcome: &str, code: u32, count| {
        c(
            "attempts",
            "Attempts by outcome and the consumer's code",
            count,
        )
        .with("outcome", outcome)
        .with("code", code.to_string())
    };
    out.push(attempt("ack", 0, counters.acked));
    for ((kind, code), count) in &counters.failures {
        out.push(attempt(kind.as_str(), *code, *count));
    }
    for (reason, count) in &counters.dead {
        let sample = c(
            "dead",
            "Messages that became dead letters, by reason",
            *count,
        );
        out.push(sample.with("reason", reason.as_str()));
    }
    for (reason, count) in &counters.leases_lost {
        out.push(c("leases_lost", "Leases lost, by reason", *count).with("reason", *reason));
    }
    out.push(lateness(counters));
    out
}

fn lateness(counters: &Counters) -> Sample {
    let bounds = LATE_BUCKETS_MS.iter().map(|ms| *ms as f64 / 1_000.0);
    let buckets = bounds.chain([f64::INFINITY]).zip(counters.redelivery_late);
    let value = Value::Histogram {
        sum: counters.redelivery_late_us as f64 / 1e6,
        buckets: buckets.collect(),
    };
    let help = "How late redeliveries were handed out";
    Sample::new("redelivery_late_seconds", help, value)
}

/// The memory budget, and who else takes memory: (what, bytes).
#[must_use]
pub fn of_memory(budget: &MemoryBudget, others: &[(&str, u64)]) -> Vec<Sample> {
    let classes = Class::ALL.map(|class| (class.name(), budget.used(class)));
    let lent = budget.lent();
    let mut out: Vec<_> = classes
        .iter()
        .chain(&lent)
        .chain(others)
        .map(|(what, bytes)| {
            let sample = Sample::gauge("memory_bytes", "Memory by what takes it", *bytes as f64);
            sample.with("budget", *what)
        })
        .collect();
    let limit = "The configured memory budget of the process";
    out.push(Sample::gauge(
        "memory_budget_bytes",
        limit,
        budget.limit() as f64,
    ));
    let waiting = "Requests that wait for memory";
    out.push(Sample::gauge(
        "memory_waiting",
        waiting,
        budget.waiting() as f64,
    ));
    out
}

/// The disk and its reserve.
#[must_use]
pub fn of_disk(disk: &DiskMonitor) -> Vec<Sample> {
    let space = disk.space();
    let level = match disk.level() {
        DiskLevel::Normal => 0.0,
        DiskLevel::Soft => 1.0,
        DiskLevel::Hard => 2.0,
        DiskLevel::ReserveGone => 3.0,
    };
    let reserve = "Disk held back for settlements and cleaning";
    let help = "0 normal, 1 producers slowed, 2 publishes refused, 3 nothing handed out";
    vec![
        Sample::gauge("disk_free_bytes", "Disk left", space.free_bytes as f64),
        Sample::gauge(
            "disk_total_bytes",
            "Size of the disk",
            space.total_bytes as f64,
        ),
        Sample::gauge("disk_reserve_bytes", reserve, disk.reserve_bytes() as f64),
        Sample::gauge("disk_level", help, level),
    ]
}

#[cfg(test)]
mod tests {
    use millpond_protocol::control::DeadReason;
    use millpond_protocol::{Offset, SubscriptionConfig, SubscriptionId};
    use millpond_queue::FailureKind;

    use super::super::BrokerMetrics;
    use super::*;
    use crate::config::MemoryConfig;

    fn has(text: &str, line: &str) -> bool {
        text.lines().any(|found| found == line)
    }

    #[test]
    fn samples_of_one_name_stand_together_under_one_help_line() {
        let text = BrokerMetrics::new().encode(vec![
            Sample::gauge("x", "An x", 1.0).with("of", "a"),
            Sample::counter("y", "A y", 7),
            Sample::gauge("x", "An x", 2.5).with("of", "b\"\n"),
        ]);
        let together = "# HELP millpond_x An x\n# TYPE millpond_x gauge\n\
                        millpond_x{of=\"a\"} 1.0\nmillpond_x{of=\"b\\\"\\n\"} 2.5\n";
        assert!(text.contains(together), "{text}");
        assert!(has(&text, "millpond_y_total 7"), "{text}");
    }

    #[test]
    fn the_queues_counters_are_written_with_their_reasons() {
        let mut counters = Counters {
            acked: 4,
            redelivery_late_us: 2_500_000,
            ..Counters::default()
        };
        counters.failures.insert((FailureKind::Nack, 17), 3);
        counters.dead.insert(DeadReason::MaxAttempts, 1);
        counters.leases_lost.insert("seek", 2);
        counters.redelivery_late[0] = 5;
        counters.redelivery_late[8] = 1;
        let text = BrokerMetrics::new().encode(of_counters(&counters));
        for line in [
            "millpond_attempts_total{outcome=\"ack\",code=\"0\"} 4",
            "millpond_attempts_total{outcome=\"nack\",code=\"17\"} 3",
            "millpond_dead_total{reason=\"max_attempts\"} 1",
            "millpond_leases_lost_total{reason=\"seek\"} 2",
            "millpond_redelivery_late_seconds_sum 2.5",
            "millpond_redelivery_late_seconds_bucket{le=\"0.001\"} 5",
            "millpond_redelivery_late_seconds_bucket{le=\"1.0\"} 5",
            "millpond_redelivery_late_seconds_bucket{le=\"+Inf\"} 6",
        ] {
            assert!(has(&text, line), "{line}\n{text}");
        }
    }

    #[test]
    fn a_subscription_is_told_by_state_and_without_a_due_time_if_nothing_is_due() {
        let view = SubscriptionView {
            topic: "orders".to_owned(),
            name: "billing".to_owned(),
            id: SubscriptionId(1),
            config: SubscriptionConfig::default(),
            dead_letter: "orders.billing.dead".to_owned(),
            paused: false,
            floor: Offset(10),
            backlog: 6,
            ready: 1,
            in_flight: 2,
            scheduled: 3,
            dead: 4,
            consumers: 1,
            oldest_ready_ms: Some(1_500),
            next_due: None,
            pinned_bytes: 77,
            stalled: None,
        };
        let mut samples = Vec::new();
        of_subscription(&view, &mut samples);
        let text = BrokerMetrics::new().encode(samples);
        let of = "topic=\"orders\",subscription=\"billing\"";
        for line in [
            format!("millpond_messages{{{of},state=\"in_flight\"}} 2.0"),
            format!("millpond_messages{{{of},state=\"dead\"}} 4.0"),
            format!("millpond_oldest_ready_age_seconds{{{of}}} 1.5"),
            format!("millpond_pinned_bytes{{{of}}} 77.0"),
            format!("millpond_stalled{{{of}}} 0.0"),
        ] {
            assert!(has(&text, &line), "{line}\n{text}");
        }
        assert!(!text.contains("next_due"), "{text}");
    }

    #[test]
    fn memory_is_told_by_what_takes_it() {
        let budget = MemoryBudget::new(&MemoryConfig::default());
        let share = budget.connection(None);
        let _held = budget.try_acquire(100, Class::Outbound, &share).unwrap();
        let text = BrokerMetrics::new().encode(of_memory(&budget, &[("cache", 9)]));
        for line in [
            "millpond_memory_bytes{budget=\"inbound\"} 0.0",
            "millpond_memory_bytes{budget=\"outbound\"} 100.0",
            "millpond_memory_bytes{budget=\"cache\"} 9.0",
            "millpond_memory_budget_bytes 536870912.0",
        ] {
            assert!(has(&text, line), "{line}\n{text}");
        }
    }
}
