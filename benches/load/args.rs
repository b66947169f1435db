//! The command line, and the plan that it amounts to.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use tempfile::TempDir;

use crate::floors::Floor;
use crate::grow::series::Series;
use crate::scenarios::Scenario;

/// Load on a broker, and the floors under it, in one run.
#[derive(Debug, Parser)]
#[command(name = "load")]
pub struct Args {
    /// Measure for about a second each instead of four, and less of what takes many messages.
    #[arg(long)]
    quick: bool,
    /// How often everything is measured.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Only these floors and scenarios, of which a ratio's must all be among them; or these series.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Measure how cost grows, in series of points, instead of floors and scenarios.
    #[arg(long)]
    grow: bool,
    /// Also draws the series into this file, as one page of HTML.
    #[arg(long, value_name = "FILE", requires = "grow")]
    html: Option<PathBuf>,
    /// Also writes everything into this file, as one JSON object.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[arg(long, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Where brokers keep their data and the disk is measured; default: a temporary folder within
    /// the target directory.
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Upper bound of path MTU discovery, in bytes of UDP payload, for brokers and floors alike.
    #[arg(long, default_value_t = 1_452, value_parser = clap::value_parser!(u16).range(1_200..=6_400))]
    pub mtu: u16,
    /// Serve this role for a parent instead of measuring.
    #[arg(long, value_enum, hide = true, requires = "dir")]
    pub child: Option<Role>,
    /// What cargo passes to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

/// What a child process serves.
#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    Broker,
    QuinnSink,
}

/// What a run measures, and how.
pub struct Plan {
    pub floors: Vec<Floor>,
    pub scenarios: Vec<Scenario>,
    /// Series instead of both.
    pub grow: Option<Grow>,
    pub rounds: u32,
    pub pace: Pace,
    pub quick: bool,
    pub mtu: u16,
    pub size: Size,
    pub json: Option<PathBuf>,
    pub output: Output,
    folder: Folder,
}

/// Which series a run measures, and where they are drawn.
pub struct Grow {
    pub series: Vec<Series>,
    pub html: Option<PathBuf>,
}

/// How long and how much one measurement is.
#[derive(Copy, Clone, Debug)]
pub struct Pace {
    /// Not counted: paths find their MTU, windows open, segments are first touched.
    pub warm_up: Duration,
    pub measured: Duration,
    /// Payload bytes after which a measurement ends before its time.
    pub bytes_max: u64,
}

impl Pace {
    const FULL: Self = Self {
        warm_up: Duration::from_millis(500),
        measured: Duration::from_secs(4),
        bytes_max: 6 << 30,
    };
    const QUICK: Self = Self {
        warm_up: Duration::from_millis(200),
        measured: Duration::from_secs(1),
        bytes_max: 2 << 30,
    };

    pub fn total(&self) -> Duration {
        self.warm_up + self.measured
    }
}

/// How much of what is measured by number rather than by time.
#[derive(Copy, Clone, Debug)]
pub struct Size {
    /// Messages that are all nacked.
    pub retries: u32,
    /// Messages that wait for their time.
    pub scheduled: u64,
    /// Messages that wait in a deep backlog.
    pub backlog: u64,
    /// Messages stored when the broker is killed, and how many of them wait for a retry.
    pub stored: u64,
    pub retrying: u64,
    /// Connections with an idle consumer each.
    pub connections: usize,
    /// Beyond three times its pace and this a scenario is stuck, and not slow.
    pub slack: Duration,
}

impl Size {
    const FULL: Self = Self {
        retries: 100_000,
        scheduled: 10_000_000,
        backlog: 100_000_000,
        stored: 10_000_000,
        retrying: 1_000_000,
        connections: 10_000,
        slack: Duration::from_secs(900),
    };
    const QUICK: Self = Self {
        retries: 100_000,
        scheduled: 2_000_000,
        backlog: 2_000_000,
        stored: 1_000_000,
        retrying: 100_000,
        connections: 500,
        slack: Duration::from_secs(60),
    };
}

enum Folder {
    Given(PathBuf),
    Temporary(TempDir),
}

impl Args {
    pub fn plan(&self) -> Result<Plan> {
        let (floors, scenarios, series) = self.choice();
        let known: Vec<&str> = floors
            .iter()
            .map(|floor| floor.name())
            .chain(scenarios.iter().map(|scenario| scenario.name()))
            .chain(series.iter().map(|series| series.name()))
            .collect();
        for name in &self.only {
            ensure!(
                known.contains(&name.as_str()),
                "nothing is named {name}; there are {}",
                known.join(", ")
            );
        }
        let wanted = |name: &str| self.only.is_empty() || self.only.iter().any(|only| only == name);
        let folder = match &self.dir {
            Some(dir) => {
                std::fs::create_dir_all(dir)
                    .with_context(|| format!("the folder {} cannot be made", dir.display()))?;
                Folder::Given(dir.clone())
            }
            None => Folder::Temporary(
                tempfile::Builder::new()
                    .prefix("load-")
                    .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
                    .context("no temporary folder can be made in the target directory")?,
            ),
        };
        Ok(Plan {
            floors: chosen(floors, |floor| wanted(floor.name())),
            scenarios: chosen(scenarios, |scenario| wanted(scenario.name())),
            grow: self.grow.then(|| Grow {
                series: chosen(series, |series| wanted(series.name())),
                html: self.html.clone(),
            }),
            rounds: self.rounds,
            pace: if self.quick { Pace::QUICK } else { Pace::FULL },
            quick: self.quick,
            mtu: self.mtu,
            size: if self.quick { Size::QUICK } else { Size::FULL },
            json: self.json.clone(),
            output: self.output,
            folder,
        })
    }

    /// All that a run of this kind may measure.
    fn choice(&self) -> (&[Floor], &[Scenario], &[Series]) {
        if self.grow {
            (&[], &[], &Series::ALL)
        } else {
            (&Floor::ALL, &Scenario::ALL, &[])
        }
    }
}

fn chosen<K: Copy>(all: &[K], is_wanted: impl Fn(K) -> bool) -> Vec<K> {
    all.iter().copied().filter(|&one| is_wanted(one)).collect()
}

impl Plan {
    pub fn dir(&self) -> &Path {
        match &self.folder {
            Folder::Given(path) => path,
            Folder::Temporary(folder) => folder.path(),
        }
    }
}
