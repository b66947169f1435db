//! What a child process does: serve a role until its standard input ends.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use millpond_broker::{Broker, Config};
use tokio::io::{AsyncReadExt, stdin};

use crate::args::{Args, Role};
use crate::child::Greeting;
use crate::raw_quic;

pub async fn serve(role: Role, args: &Args) -> Result<()> {
    let dir = args.dir.as_deref().context("a child is given its folder")?;
    match role {
        Role::Broker => broker(dir, args.mtu).await,
        Role::QuinnSink => sink(dir, args.mtu).await,
    }
}

/// A broker as `millpond serve` starts it, but for its addresses and its memory budget.
async fn broker(dir: &Path, mtu: u16) -> Result<()> {
    let mut config = Config {
        data: dir.to_owned(),
        listen: ([127, 0, 0, 1], 0).into(),
        http: None,
        ..Config::default()
    };
    config.quic.max_mtu = mtu;
    config.memory.budget_bytes = MEMORY_BYTES;
    let broker = Broker::start(config).await?;
    let ca = dir.join("bench-ca.pem");
    std::fs::write(&ca, broker.ca_pem()?)?;
    greet(&Greeting {
        address: broker.listen_addr(),
        ca,
    })?;
    tokio::select! {
        error = broker.failed() => return Err(error.into()),
        () = parent_gone() => {}
    }
    tokio::time::timeout(STOP_MAX, broker.shutdown()).await??;
    Ok(())
}

async fn sink(dir: &Path, mtu: u16) -> Result<()> {
    let (endpoint, pem) = raw_quic::server(mtu)?;
    let ca = dir.join("sink-ca.pem");
    std::fs::write(&ca, pem)?;
    greet(&Greeting {
        address: endpoint.local_addr()?,
        ca,
    })?;
    tokio::select! {
        () = raw_quic::accept(&endpoint, dir) => {}
        () = parent_gone() => {}
    }
    endpoint.close(0_u32.into(), b"");
    Ok(())
}

fn greet(greeting: &Greeting) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(greeting)?)?;
    out.flush()?;
    Ok(())
}

/// The parent writes nothing; it closes the pipe or ends.
async fn parent_gone() {
    let mut none = [0; 1];
    while matches!(stdin().read(&mut none).await, Ok(1..)) {}
}
/// Room for 10,000 connections; the default has it for fewer.
const MEMORY_BYTES: u64 = 2 << 30;
const STOP_MAX: Duration = Duration::from_secs(15);
