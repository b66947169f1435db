//! Latencies of one measurement, in nanoseconds, with three significant digits.

use std::time::Duration;

use hdrhistogram::Histogram;

pub struct Latencies(Histogram<u64>);

/// What is told of many latencies, in microseconds.
#[derive(Copy, Clone, Debug, serde::Serialize)]
pub struct Percentiles {
    pub count: u64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    pub max_us: f64,
}

impl Latencies {
    pub fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, LONGEST_NS, 3);
        Self(histogram.expect("the bounds are at least two apart and three digits are allowed"))
    }

    /// One that is longer than the longest counts as the longest.
    pub fn record(&mut self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.0.saturating_record(ns);
    }

    /// `None` if there are no latencies.
    pub fn percentiles(&self) -> Option<Percentiles> {
        let us = |quantile| self.0.value_at_quantile(quantile) as f64 / 1e3;
        (!self.0.is_empty()).then(|| Percentiles {
            count: self.0.len(),
            p50_us: us(0.5),
            p99_us: us(0.99),
            p999_us: us(0.999),
            max_us: self.0.max() as f64 / 1e3,
        })
    }
}

/// A minute: longer than any message may wait for its answer.
const LONGEST_NS: u64 = 60_000_000_000;
