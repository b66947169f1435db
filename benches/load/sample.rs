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

/// Counts from a moment on: operations, time, and the CPU time of both processes.
pub struct Meter {
    server: Option<u32>,
    began: Instant,
    server_cpu: Duration,
    client_cpu: Duration,
    anon: Option<AnonPeak>,
    operations: u64,
    latencies: Latencies,
}

impl Meter {
    /// Starts counting; `server` is the process that serves.
    pub fn start(server: Option<u32>) -> Result<Self> {
        let server_cpu = server.map(cpu_time).transpose()?.unwrap_or_default();
        Ok(Self {
            server,
            server_cpu,
            client_cpu: cpu_time(std::process::id())?,
            anon: server.map(AnonPeak::watch),
            operations: 0,
            latencies: Latencies::new(),
            began: Instant::now(),
        })
    }

    pub fn count(&mut self, operations: u64) {
        self.operations += operations;
    }

    pub fn record(&mut self, latency: Duration) {
        self.latencies.record(latency);
    }

    /// Stops counting. `operation_bytes` is the payload of each operation.
    pub fn stop(self, operation_bytes: u64) -> Result<Sample> {
        let seconds = self.began.elapsed().as_secs_f64();
        let used = |pid: u32, before: Duration| -> Result<f64> {
            Ok(cpu_time(pid)?.saturating_sub(before).as_secs_f64())
        };
        anyhow::ensure!(
            self.operations > 0,
            "nothing was done within {seconds:.1} s"
        );
        Ok(Sample {
            operations: self.operations,
            bytes: self.operations * operation_bytes,
            seconds,
            latency: self.latencies.percentiles(),
            server_cpu_s: self
                .server
                .map(|pid| used(pid, self.server_cpu))
                .transpose()?,
            client_cpu_s: used(std::process::id(), self.client_cpu)?,
            server_anon_mib: self.anon.map(|peak| peak.end() as f64 / f64::from(1 << 20)),
            figures: BTreeMap::new(),
        })
    }
}
