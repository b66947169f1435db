//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use clap::builder::PossibleValuesParser;

/// The same load on Millpond and on other queues, on one machine, in one run.
#[derive(Debug, Parser)]
#[command(name = "millpond-peers")]
pub struct Args {
    /// Measure for about a second each instead of four.
    #[arg(long)]
    pub quick: bool,
    /// How often everything is measured.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    pub rounds: u32,
    /// Only these servers.
    #[arg(long, value_delimiter = ',', value_name = "NAME", value_parser = PossibleValuesParser::new(SERVERS))]
    pub only: Vec<String>,
    /// The nats-server to start, where the one on the path is not the one to compare with.
    #[arg(long, default_value = "nats-server", value_name = "FILE")]
    pub nats_server: PathBuf,
    /// The iggy-server to start.
    #[cfg(feature = "iggy")]
    #[arg(long, default_value = "iggy-server", value_name = "FILE")]
    pub iggy_server: PathBuf,
    /// Measure the Iggy server that runs there, instead of one that is started; by the user in
    /// IGGY_ROOT_USERNAME and IGGY_ROOT_PASSWORD, or its default one.
    #[cfg(feature = "iggy")]
    #[arg(long, value_name = "ADDRESS", conflicts_with = "iggy_server")]
    pub iggy: Option<String>,
    /// Also writes everything into this file, as one JSON object.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Also draws it into this file, as one page.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Serve Millpond from this folder, for a parent.
    #[arg(long, hide = true)]
    pub serve: Option<PathBuf>,
}

impl Args {
    pub fn is_wanted(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }

    /// How long one measurement takes.
    pub fn time(&self) -> Duration {
        Duration::from_secs(if self.quick { 1 } else { 4 })
    }
}

/// Those that this program can measure.
const SERVERS: &[&str] = &[
    "millpond",
    "redis",
    "nats",
    "rabbitmq",
    "beanstalkd",
    "postgres",
    #[cfg(feature = "iggy")]
    "iggy",
];
