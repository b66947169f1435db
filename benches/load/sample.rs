//! What one measurement found, and the meter that takes it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::latency::{Latencies, Percentiles};
use crate::proc_stat::{AnonPeak, cpu_time};

/// One measurement of one floor or scenario.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Sample {
    /// Durable messages, round trips or syncs.
    pub operations: u64,
    /// Payload bytes of them.
    pub bytes: u64,
    pub seconds: f64,
    pub latency: Option<Percentiles>,
    /// CPU seconds of the serving process, if there is one.
    pub server_cpu_s: Option<f64>,
    pub client_cpu_s: f64,
    /// The most anonymous memory that the serving process had resident, in MiB.
    pub server_anon_mib: Option<f64>,
    /// What this scenario measures beside that, by name with its unit.
    pub figures: BTreeMap<&'static str, f64>,
}

impl Sample {
    /// The same with a figure more.
    pub fn with(mut self, name: &'static str, value: f64) -> Self {
        self.figures.insert(name, value);
        self
    }

    pub fn per_second(&self) -> f64 {
        self.operations as f64 / self.seconds
    }

    /// Payload, in millions of bytes.
    pub fn mb_per_second(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.seconds
    }

    pub fn server_cpu_s_per_million(&self) -> Option<f64> {
        self.server_cpu_s.map(|cpu| self.per_million(cpu))
    }

    pub fn client_cpu_s_per_million(&self) -> f64 {
        self.per_million(self.client_cpu_s)
    }

    fn per_million(&self, seconds: f64) -> f64 {
        seconds * 1e6 / self.operations as f64
    }
}

/// Counts from a moment on: operations, time, and the CPU time of both processes. It may pause.
pub struct Meter {
    server: Option<u32>,
    origin: Instant,
    /// When it last went on; none while it pauses.
    since: Option<Spent>,
    /// Between going on and pausing.
    spent: Spent,
    anon: Option<AnonPeak>,
    operations: u64,
    latencies: Latencies,
}

/// Time, and CPU time of both processes: of a moment, or between moments.
#[derive(Copy, Clone, Default)]
struct Spent {
    time: Duration,
    server_cpu: Duration,
    client_cpu: Duration,
}

impl Spent {
    fn now(server: Option<u32>, origin: Instant) -> Result<Self> {
        Ok(Self {
            server_cpu: server.map(cpu_time).transpose()?.unwrap_or_default(),
            client_cpu: cpu_time(std::process::id())?,
            time: origin.elapsed(),
        })
    }

    fn add(&mut self, from: Self, to: Self) {
        self.time += to.time.saturating_sub(from.time);
        self.server_cpu += to.server_cpu.saturating_sub(from.server_cpu);
        self.client_cpu += to.client_cpu.saturating_sub(from.client_cpu);
    }
}

impl Meter {
    /// Starts counting; `server` is the process that serves.
    pub fn start(server: Option<u32>) -> Result<Self> {
        let mut meter = Self {
            server,
            origin: Instant::now(),
            since: None,
            spent: Spent::default(),
            anon: server.map(AnonPeak::watch),
            operations: 0,
            latencies: Latencies::new(),
        };
        meter.go_on()?;
        Ok(meter)
    }

    /// What happens from now on counts again.
    pub fn go_on(&mut self) -> Result<()> {
        self.since = Some(Spent::now(self.server, self.origin)?);
        Ok(())
    }

    /// What happens until it goes on does not count.
    pub fn pause(&mut self) -> Result<()> {
        if let Some(since) = self.since.take() {
            self.spent.add(since, Spent::now(self.server, self.origin)?);
        }
        Ok(())
    }

    pub fn count(&mut self, operations: u64) {
        self.operations += operations;
    }

    pub fn record(&mut self, latency: Duration) {
        self.latencies.record(latency);
    }

    /// Stops counting. `operation_bytes` is the payload of each operation.
    pub fn stop(mut self, operation_bytes: u64) -> Result<Sample> {
        self.pause()?;
        let seconds = self.spent.time.as_secs_f64();
        anyhow::ensure!(
            self.operations > 0,
            "nothing was done within {seconds:.1} s"
        );
        Ok(Sample {
            operations: self.operations,
            bytes: self.operations * operation_bytes,
            seconds,
            latency: self.latencies.percentiles(),
            server_cpu_s: self.server.map(|_| self.spent.server_cpu.as_secs_f64()),
            client_cpu_s: self.spent.client_cpu.as_secs_f64(),
            server_anon_mib: self.anon.map(|peak| peak.end() as f64 / f64::from(1 << 20)),
            figures: BTreeMap::new(),
        })
    }
}
