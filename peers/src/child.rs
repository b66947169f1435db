//! A server's process: started with its output in its folder, ended with this process.

use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::net::TcpStream;
use tokio::process::{Child as Process, Command};
use tokio::time::{sleep, timeout};

pub struct Child {
    process: Process,
    pub pid: u32,
}

impl Child {
    /// Starts a server and waits until it takes connections on a port of loopback.
    pub async fn start(mut command: Command, dir: &Path, port: u16) -> Result<Self> {
        let log = File::create(dir.join("output.log"))?;
        let name = command.as_std().get_program().display().to_string();
        let mut process = command
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{name} cannot be started"))?;
        let pid = process.id().context("it has ended at once")?;
        let deadline = Instant::now() + START_MAX;
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            if let Some(status) = process.try_wait()? {
                let log = std::fs::read_to_string(dir.join("output.log")).unwrap_or_default();
                let tail: Vec<_> = log.lines().rev().take(3).collect();
                bail!("{name} ended with {status}: {}", tail.join(" | "));
            }
            anyhow::ensure!(Instant::now() < deadline, "{name} does not serve");
            sleep(START_STEP).await;
        }
        Ok(Self { process, pid })
    }

    /// Asks it to end, and ends it where it does not.
    pub async fn stop(mut self) -> Result<()> {
        let asked = Command::new("kill")
            .arg(self.pid.to_string())
            .status()
            .await;
        asked.context("kill(1) cannot be run")?;
        if timeout(STOP_MAX, self.process.wait()).await.is_err() {
            self.process.kill().await?;
        }
        Ok(())
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

const START_MAX: Duration = Duration::from_secs(40);
const START_STEP: Duration = Duration::from_millis(50);
const STOP_MAX: Duration = Duration::from_secs(20);
