//! What the kernel knows of a process: CPU seconds, bytes sent to the disk.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// User and system time of all threads, ended ones too, in steps of 10 ms.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("{path} cannot be read"))?;
    let ticks = cpu_ticks(&text).with_context(|| format!("{path} has no CPU times: {text}"))?;
    Ok(Duration::from_millis(ticks * 1_000 / TICKS_PER_SECOND))
}

/// Bytes that a process has caused to be written to the disk.
pub fn disk_bytes(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/io");
    let text = fs::read_to_string(&path).with_context(|| format!("{path} cannot be read"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("write_bytes: ")?.parse().ok())
        .with_context(|| format!("{path} has no write_bytes"))
}

/// Fields 14 and 15 (proc_pid_stat(5)). The command, field 2, stands in parentheses and may hold
/// anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, behind) = stat.rsplit_once(')')?;
    let mut fields = behind.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// What Linux shows to programs, whatever it counts in itself.
const TICKS_PER_SECOND: u64 = 100;
