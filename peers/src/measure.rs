//! What a measurement finds: a rate, latencies, CPU seconds, memory.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use serde::Serialize;

/// One measurement.
#[derive(Copy, Clone, Debug, Serialize)]
pub struct Found {
    pub per_second: f64,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    /// CPU seconds of the server per million messages, where its process is known.
    pub server_cpu_s_per_million: Option<f64>,
    /// Anonymous memory of the server at the end, in MiB.
    pub server_anon_mib: Option<f64>,
}

/// Counts from a moment on.
pub struct Meter {
    server: Option<u32>,
    began: Instant,
    cpu: Option<Duration>,
    messages: u64,
    latencies: Histogram<u64>,
}

impl Meter {
    pub fn start(server: Option<u32>) -> Result<Self> {
        Ok(Self {
            server,
            cpu: server.map(cpu_time).transpose()?,
            messages: 0,
            latencies: Histogram::new_with_bounds(1, LONGEST_NS, 3)?,
            began: Instant::now(),
        })
    }

    pub fn count(&mut self) {
        self.messages += 1;
    }

    pub fn record(&mut self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.latencies.saturating_record(ns.max(1));
    }

    pub fn stop(self) -> Result<Found> {
        let seconds = self.began.elapsed().as_secs_f64();
        anyhow::ensure!(self.messages > 0, "nothing was done");
        let cpu = self.server.map(cpu_time).transpose()?;
        let us = |quantile| {
            let some = !self.latencies.is_empty();
            some.then(|| self.latencies.value_at_quantile(quantile) as f64 / 1e3)
        };
        Ok(Found {
            per_second: self.messages as f64 / seconds,
            p50_us: us(0.5),
            p99_us: us(0.99),
            server_cpu_s_per_million: cpu.zip(self.cpu).map(|(after, before)| {
                after.saturating_sub(before).as_secs_f64() * 1e6 / self.messages as f64
            }),
            server_anon_mib: self.server.map(anon_mib).transpose()?,
        })
    }
}

/// User and system time of a process and of the children that it has waited for.
fn cpu_time(pid: u32) -> Result<Duration> {
    let mut ticks = 0;
    for pid in family(pid)? {
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue; // It has ended meanwhile.
        };
        let behind = stat.rsplit_once(')').context("a stat line")?.1;
        let mut fields = behind.split_ascii_whitespace().skip(11);
        for _ in 0..2 {
            ticks += fields.next().context("a CPU time")?.parse::<u64>()?;
        }
    }
    Ok(Duration::from_millis(ticks * 1_000 / TICKS_PER_SECOND))
}

fn anon_mib(pid: u32) -> Result<f64> {
    let mut kib = 0;
    for pid in family(pid)? {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let number = line.and_then(|line| line.split_ascii_whitespace().next());
        kib += number.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(kib as f64 / 1_024.0)
}

/// A process and all that descends from it: some servers are a process for each connection.
fn family(pid: u32) -> Result<Vec<u32>> {
    let mut all = vec![pid];
    let mut nth = 0;
    while let Some(&pid) = all.get(nth) {
        nth += 1;
        let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
            continue;
        };
        for thread in threads {
            let path = thread?.path().join("children");
            let children = std::fs::read_to_string(path).unwrap_or_default();
            all.extend(
                children
                    .split_ascii_whitespace()
                    .filter_map(|c| c.parse::<u32>().ok()),
            );
        }
        anyhow::ensure!(all.len() < FAMILY_MAX, "a server with too many processes");
    }
    Ok(all)
}

const LONGEST_NS: u64 = 60_000_000_000;
const TICKS_PER_SECOND: u64 = 100;
const FAMILY_MAX: usize = 1_000;
