//! What must be known to read the numbers: machine, date, versions, settings.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::args::Plan;

#[derive(Serialize)]
pub struct Facts {
    pub date: String,
    pub cores: usize,
    pub cpu: String,
    pub memory_gib: u64,
    pub kernel: String,
    pub file_system: String,
    /// How long an idle core of a virtual machine looks for work before it is given back; where the kernel can.
    pub halt_poll_us: Option<u64>,
    /// Runnable processes over the last minute, before the run: others disturb it.
    pub load_average: String,
    pub millpond: &'static str,
    pub commit: Option<String>,
    pub quinn: Option<&'static str>,
    pub rustls: Option<&'static str>,
    pub optimised: bool,
    pub mtu: u16,
    pub rounds: u32,
    pub seconds_each: f64,
    pub quick: bool,
}

impl Facts {
    pub fn gather(plan: &Plan) -> Result<Self> {
        let cpus = read("/proc/cpuinfo")?;
        let memory = read("/proc/meminfo")?;
        let load = read("/proc/loadavg")?;
        let memory_kib: u64 = value(&memory, "MemTotal")
            .and_then(first_number)
            .unwrap_or(0);
        Ok(Self {
            date: jiff::Timestamp::now()
                .strftime("%Y-%m-%dT%H:%M:%SZ")
                .to_string(),
            cores: std::thread::available_parallelism()?.get(),
            cpu: value(&cpus, "model name").unwrap_or("unknown").to_owned(),
            memory_gib: memory_kib >> 20,
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            file_system: file_system(plan.dir())?,
            halt_poll_us: halt_poll_us(),
            load_average: load.split(' ').next().unwrap_or_default().to_owned(),
            millpond: env!("CARGO_PKG_VERSION"),
            commit: commit(),
            quinn: locked_version("quinn"),
            rustls: locked_version("rustls"),
            optimised: !cfg!(debug_assertions),
            mtu: plan.mtu,
            rounds: plan.rounds,
            seconds_each: plan.pace.measured.as_secs_f64(),
            quick: plan.quick,
        })
    }

    /// The same for people.
    pub fn lines(&self) -> Vec<String> {
        let unknown = "unknown";
        let mut lines = vec![
            format!(
                "millpond {} (commit {}), quinn {}, rustls {}; {}",
                self.millpond,
                self.commit.as_deref().unwrap_or(unknown),
                self.quinn.unwrap_or(unknown),
                self.rustls.unwrap_or(unknown),
                self.date,
            ),
            format!(
                "{} cores of {}, {} GiB, Linux {}, {}; load average before: {}",
                self.cores,
                self.cpu,
                self.memory_gib,
                self.kernel,
                self.file_system,
                self.load_average,
            ),
            format!(
                "MTU {}, {} rounds of {} s each{}; every acknowledgement after a sync",
                self.mtu,
                self.rounds,
                self.seconds_each,
                if self.quick { ", small numbers" } else { "" },
            ),
        ];
        if let Some(us) = self.halt_poll_us {
            lines.push(format!(
                "a virtual machine whose idle cores look for work for {us} us (guest_halt_poll_ns)"
            ));
        }
        if !self.optimised {
            lines.push("NOT OPTIMISED: these numbers say nothing; use `cargo bench`".to_owned());
        }
        lines
    }
}

fn halt_poll_us() -> Option<u64> {
    let governor = read("/sys/devices/system/cpu/cpuidle/current_governor").ok()?;
    let ns = read("/sys/module/haltpoll/parameters/guest_halt_poll_ns").ok()?;
    let ns: u64 = ns.trim().parse().ok()?;
    (governor.trim() == "haltpoll").then_some(ns / 1_000)
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("{path} cannot be read"))
}

/// The first value of `name : value` or `name: value` lines.
fn value<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found.trim() == name).then_some(value.trim())
    })
}

fn first_number(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

/// The type of the file system that holds a folder: of the longest mount point above it.
fn file_system(dir: &Path) -> Result<String> {
    let dir = fs::canonicalize(dir)?;
    let mounts = read("/proc/self/mounts")?;
    let mut best = (0, "unknown");
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        let (Some(point), Some(kind)) = (fields.next(), fields.next()) else {
            continue;
        };
        if dir.starts_with(point) && point.len() >= best.0 {
            best = (point.len(), kind);
        }
    }
    Ok(best.1.to_owned())
}

/// The checked-out commit, if this is a checkout.
fn commit() -> Option<String> {
    let output = Command::new("git")
        .args(["-C", env!("CARGO_MANIFEST_DIR")])
        .args(["describe", "--always", "--dirty", "--abbrev=12"])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_owned())
}

/// The version that a package was built with.
fn locked_version(package: &str) -> Option<&'static str> {
    let (_, behind) = LOCK.split_once(&format!("name = \"{package}\"\nversion = \""))?;
    behind.split('"').next()
}

const LOCK: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock"));
