//! What the kernel knows of a process: CPU seconds, bytes sent to the disk, anonymous memory.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
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

/// Anonymous memory that a process has resident, in bytes.
pub fn anon_bytes(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("{path} cannot be read"))?;
    let kib = text.lines().find_map(|line| {
        let value = line.strip_prefix("RssAnon:")?.trim();
        value.strip_suffix(" kB")?.trim().parse::<u64>().ok()
    });
    Ok(kib.with_context(|| format!("{path} has no RssAnon"))? << 10)
}

/// Looks at a process's anonymous memory from time to time, and keeps the most.
pub struct AnonPeak {
    over: Arc<AtomicBool>,
    watcher: JoinHandle<u64>,
}

impl AnonPeak {
    pub fn watch(pid: u32) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let watcher = std::thread::spawn(move || {
            let mut most = 0;
            // A process that has ended has no memory.
            while let Ok(now) = anon_bytes(pid) {
                most = most.max(now);
                if told.load(Ordering::Relaxed) {
                    break;
                }
                std::thread::sleep(ANON_STEP);
            }
            most
        });
        Self { over, watcher }
    }

    /// Stops looking; the most that was seen, in bytes.
    pub fn end(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        self.watcher.join().unwrap_or_default()
    }
}

const ANON_STEP: Duration = Duration::from_millis(20);

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
