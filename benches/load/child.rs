//! A child process that serves: started, known by its address, ended with this one.
//!
//! The child says where it is in one line of JSON on its standard output, and ends when its standard
//! input does: whatever becomes of this process, no server is left behind.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child as Process, Command};
use tokio::time::{sleep, timeout};

use crate::args::Role;
use crate::proc_stat;

/// Where a child serves.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Greeting {
    pub address: SocketAddr,
    /// The certificate to trust, as PEM.
    pub ca: PathBuf,
}

pub struct Child {
    process: Process,
    role: Role,
    dir: PathBuf,
    mtu: u16,
    pub pid: u32,
    pub greeting: Greeting,
}

impl Child {
    /// Starts this program again in a role, and waits until it serves.
    pub async fn start(role: Role, dir: &Path, mtu: u16) -> Result<Self> {
        let name = clap::ValueEnum::to_possible_value(&role).context("every role has a name")?;
        let mut process = Command::new(std::env::current_exe()?)
            .args(["--child", name.get_name()])
            .arg("--dir")
            .arg(dir)
            .args(["--mtu", &mtu.to_string()])
            .env_remove(crate::TUNABLES)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("a child process cannot be started")?;
        let pid = process.id().context("the child has ended at once")?;
        let output = process
            .stdout
            .take()
            .context("the child's output is piped")?;
        let mut line = String::new();
        let mut output = BufReader::new(output);
        match timeout(START_MAX, output.read_line(&mut line)).await {
            Ok(read) => read?,
            Err(_) => bail!("the {} did not serve within {START_MAX:?}", name.get_name()),
        };
        let greeting = serde_json::from_str(&line)
            .with_context(|| format!("the {} did not start; it said: {line:?}", name.get_name()))?;
        Ok(Self {
            process,
            role,
            dir: dir.to_owned(),
            mtu,
            pid,
            greeting,
        })
    }

    /// Waits until the child has stopped writing to the disk: what it prepares in the background
    /// after its start is no part of a measurement.
    pub async fn settle(&self) -> Result<()> {
        let deadline = Instant::now() + SETTLE_MAX;
        let mut written = proc_stat::disk_bytes(self.pid)?;
        let mut quiet = Duration::ZERO;
        while quiet < SETTLE_QUIET && Instant::now() < deadline {
            sleep(SETTLE_STEP).await;
            let now = proc_stat::disk_bytes(self.pid)?;
            quiet = if now == written {
                quiet + SETTLE_STEP
            } else {
                Duration::ZERO
            };
            written = now;
        }
        Ok(())
    }

    /// Kills the child, lets something happen, and starts another on its folder; when that began.
    pub async fn kill_and_restart(&mut self, between: impl FnOnce()) -> Result<Instant> {
        self.process.kill().await?;
        between();
        let began = Instant::now();
        *self = Self::start(self.role, &self.dir, self.mtu).await?;
        Ok(began)
    }

    /// Ends the child gracefully.
    pub async fn stop(mut self) -> Result<()> {
        drop(self.process.stdin.take());
        match timeout(STOP_MAX, self.process.wait()).await {
            Ok(status) => {
                let status = status?;
                anyhow::ensure!(status.success(), "the child ended with {status}");
                Ok(())
            }
            Err(_) => bail!("the child did not end within {STOP_MAX:?}, and was killed"),
        }
    }
}

const START_MAX: Duration = Duration::from_secs(20);
const STOP_MAX: Duration = Duration::from_secs(20);
const SETTLE_MAX: Duration = Duration::from_secs(15);
/// Longer than a broker pauses between one spare segment and the next.
const SETTLE_QUIET: Duration = Duration::from_secs(1);
const SETTLE_STEP: Duration = Duration::from_millis(50);
