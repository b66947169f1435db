//! What a run tells: a table, JSON, and a page with bars.

mod page;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::args::Args;
use crate::load::Workload;
use crate::measure::Found;
use crate::peer::Durability;

#[derive(Serialize)]
pub struct Report {
    date: String,
    machine: String,
    rounds: u32,
    seconds_each: f64,
    versions: BTreeMap<&'static str, String>,
    results: Vec<Row>,
}

/// What was found of one server under one load, round by round.
#[derive(Serialize)]
struct Row {
    server: &'static str,
    durability: Durability,
    workload: Workload,
    rounds: Vec<Found>,
    failures: Vec<String>,
    /// The server has nothing of the kind.
    unable: bool,
}

/// The median and the ends of some rounds.
#[derive(Copy, Clone)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Report {
    pub fn new(args: &Args) -> Result<Self> {
        let mut versions = BTreeMap::new();
        versions.insert("millpond", env!("CARGO_PKG_VERSION").to_owned());
        Ok(Self {
            date: jiff::Timestamp::now()
                .strftime("%Y-%m-%d %H:%M UTC")
                .to_string(),
            machine: machine()?,
            rounds: args.rounds,
            seconds_each: args.time().as_secs_f64(),
            versions,
            results: Vec::new(),
        })
    }

    pub fn version(&mut self, server: &'static str, version: &str) {
        self.versions.insert(server, version.to_owned());
    }

    pub fn add(
        &mut self,
        server: &'static str,
        durability: Durability,
        workload: Workload,
        found: Result<Option<Found>, String>,
    ) {
        let key = (server, durability, workload);
        let known = self
            .results
            .iter()
            .position(|row| (row.server, row.durability, row.workload) == key);
        let place = known.unwrap_or_else(|| {
            self.results.push(Row {
                server,
                durability,
                workload,
                rounds: Vec::new(),
                failures: Vec::new(),
                unable: false,
            });
            self.results.len() - 1
        });
        let row = &mut self.results[place];
        match found {
            Ok(Some(found)) => row.rounds.push(found),
            Ok(None) => row.unable = true,
            Err(error) => row.failures.push(error),
        }
    }

    pub fn print(&self) -> Result<()> {
        let mut text = String::new();
        writeln!(text, "{}; {}", self.machine, self.date)?;
        writeln!(
            text,
            "{} rounds of {} s; medians (lowest-highest); CPU and memory are the server's",
            self.rounds, self.seconds_each
        )?;
        for (name, version) in &self.versions {
            writeln!(text, "  {name}: {version}")?;
        }
        for workload in Workload::ALL {
            writeln!(text, "\n{}: {}", workload.name(), workload.what())?;
            writeln!(
                text,
                "  {:<22} {:>10} {:>23} {:>10} {:>10} {:>9} {:>7}",
                "", "msg/s", "", "p50 us", "p99 us", "CPU s/M", "MiB"
            )?;
            for row in self.results.iter().filter(|row| row.workload == workload) {
                writeln!(text, "  {}", row.line())?;
            }
        }
        #[expect(clippy::print_stdout, reason = "this is what the command is for")]
        {
            print!("{text}");
        }
        Ok(())
    }

    pub fn save_json(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(path, text).with_context(|| format!("{} cannot be made", path.display()))
    }

    pub fn save_html(&self, path: &Path) -> Result<()> {
        let text = page::draw(self)?;
        std::fs::write(path, text).with_context(|| format!("{} cannot be made", path.display()))
    }
}

impl Row {
    fn name(&self) -> String {
        let durability = match self.durability {
            Durability::Default => "default",
            Durability::Strict => "strict",
        };
        format!("{} ({durability})", self.server)
    }

    fn of(&self, value: impl Fn(&Found) -> Option<f64>) -> Option<Spread> {
        let mut values: Vec<f64> = self.rounds.iter().filter_map(value).collect();
        values.sort_by(f64::total_cmp);
        Some(Spread {
            median: *values.get(values.len() / 2)?,
            min: *values.first()?,
            max: *values.last()?,
        })
    }

    fn line(&self) -> String {
        let Some(rate) = self.of(|found| Some(found.per_second)) else {
            let why = match self.failures.first() {
                Some(error) => format!("failed: {error}"),
                None => "it cannot do that".to_owned(),
            };
            return format!("{:<22} {why}", self.name());
        };
        let median = |spread: Option<Spread>, digits: usize| {
            spread.map_or_else(|| "-".to_owned(), |s| format!("{:.digits$}", s.median))
        };
        format!(
            "{:<22} {:>10.0} {:>23} {:>10} {:>10} {:>9} {:>7}",
            self.name(),
            rate.median,
            format!("({:.0}-{:.0})", rate.min, rate.max),
            median(self.of(|found| found.p50_us), 0),
            median(self.of(|found| found.p99_us), 0),
            median(self.of(|found| found.server_cpu_s_per_million), 2),
            median(self.of(|found| found.server_anon_mib), 0),
        )
    }
}

fn machine() -> Result<String> {
    let cpus = std::fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == "model name").then(|| value.trim().to_owned())
    });
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    Ok(format!(
        "{} cores of {}, Linux {}, load generator and server share them",
        std::thread::available_parallelism()?,
        model.unwrap_or_else(|| "unknown".to_owned()),
        kernel.trim()
    ))
}
