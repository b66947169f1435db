//! The servers, one after the other.

pub mod beanstalkd;
#[cfg(feature = "iggy")]
pub mod iggy;
pub mod millpond;
pub mod nats;
pub mod postgres;
pub mod rabbitmq;
pub mod redis;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::args::Args;
use crate::load::{Workload, within};
use crate::measure::Found;
use crate::peer::{Durability, Peer};
use crate::report::Report;

/// Measures everything that is wanted and installed, once.
pub async fn run_all(args: &Args, round: u32, report: &mut Report) -> Result<()> {
    let both = [Durability::Default, Durability::Strict];
    let mut runs = Runs {
        args,
        round,
        report,
    };
    runs.run::<millpond::Millpond>("millpond", &[Durability::Strict])
        .await;
    if runs.has("redis", "redis-server", &["--version"]) {
        runs.run::<redis::Redis>("redis", &both).await;
    }
    nats::choose(&args.nats_server);
    if runs.has(
        "nats",
        &args.nats_server.display().to_string(),
        &["--version"],
    ) {
        runs.run::<nats::Nats>("nats", &both).await;
    }
    if runs.has("beanstalkd", "beanstalkd", &["-v"]) {
        runs.run::<beanstalkd::Beanstalkd>("beanstalkd", &both)
            .await;
    }
    if let Some(initdb) = postgres::binary("postgres")
        && runs.has("postgres", &initdb.display().to_string(), &["--version"])
    {
        runs.run::<postgres::Postgres>("postgres", &both).await;
    }
    if runs.has("rabbitmq", "dpkg-query", &["-W", "rabbitmq-server"]) {
        runs.run::<rabbitmq::RabbitMq>("rabbitmq", &both).await;
    }
    #[cfg(feature = "iggy")]
    if let Some(address) = &args.iggy {
        let how = format!("at {address}, in its own durability");
        runs.report.version("iggy", &how);
        iggy::choose(iggy::Server::Address(address.clone()));
        runs.run::<iggy::Iggy>("iggy", &[Durability::Default]).await;
    } else if runs.has(
        "iggy",
        &args.iggy_server.display().to_string(),
        &["--version"],
    ) {
        iggy::choose(iggy::Server::Program(args.iggy_server.clone()));
        runs.run::<iggy::Iggy>("iggy", &both).await;
    }
    Ok(())
}

struct Runs<'a> {
    args: &'a Args,
    round: u32,
    report: &'a mut Report,
}

impl Runs<'_> {
    /// True if a server is wanted and installed; its version goes into the report.
    fn has(&mut self, name: &'static str, program: &str, version: &[&str]) -> bool {
        if !self.args.is_wanted(name) {
            return false;
        }
        match Command::new(program).args(version).output() {
            Ok(output) if output.status.success() => {
                let text = String::from_utf8_lossy(&output.stdout);
                let line = text.lines().next().unwrap_or_default().trim();
                self.report.version(name, line);
                true
            }
            _ => {
                self.report.version(name, "not installed");
                false
            }
        }
    }

    async fn run<P: Peer>(&mut self, name: &'static str, ways: &[Durability]) {
        if !self.args.is_wanted(name) {
            return;
        }
        for &durability in ways {
            for workload in Workload::ALL {
                let found = self.one::<P>(durability, workload).await;
                let found = found.map_err(|error| format!("{error:#}"));
                eprintln!("{}", line(self.round, name, durability, workload, &found));
                self.report.add(name, durability, workload, found);
            }
        }
    }

    /// Each measurement has a server and a folder of its own.
    async fn one<P: Peer>(
        &self,
        durability: Durability,
        workload: Workload,
    ) -> Result<Option<Found>> {
        let dir = tempfile::Builder::new()
            .prefix("millpond-peers-")
            .tempdir()
            .context("no temporary folder can be made")?;
        let peer = within("start", START_MAX, P::start(durability, dir.path())).await?;
        let found = workload.measure(&peer, self.args.time()).await;
        let stopped = within("stop", STOP_MAX, peer.stop()).await;
        let found = found?;
        stopped?;
        Ok(found)
    }
}

fn line(
    round: u32,
    name: &str,
    durability: Durability,
    workload: Workload,
    found: &Result<Option<Found>, String>,
) -> String {
    let head = format!("round {round}: {name} {durability:?} {}", workload.name());
    match found {
        Ok(Some(found)) => format!(
            "{head}: {:.0} /s, p50 {:.0} us, p99 {:.0} us",
            found.per_second,
            found.p50_us.unwrap_or(0.0),
            found.p99_us.unwrap_or(0.0)
        ),
        Ok(None) => format!("{head}: it cannot do that"),
        Err(error) => format!("{head} failed: {error}"),
    }
}

/// A folder that a server's own user may write to.
fn open_to_all(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o777))?;
    Ok(())
}

/// To serve, and to have what the load needs.
const START_MAX: Duration = Duration::from_secs(60);
/// To end by itself, or by force.
const STOP_MAX: Duration = Duration::from_secs(40);
