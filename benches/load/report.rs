//! What a run tells: facts, a line for each floor and scenario, verdicts.

pub mod json;
pub mod table;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::machine::Facts;
use crate::rounds::{Measured, Row};
use crate::sample::Sample;
use crate::scenarios::Scenario;
use crate::verdict::{self, Headline, Verdict};

#[derive(Serialize)]
pub struct Report {
    pub facts: Facts,
    pub floors: Vec<Line>,
    /// By name: value, floor, ratio.
    pub workloads: BTreeMap<&'static str, Headline>,
    pub scenarios: Vec<Line>,
    pub verdicts: Vec<Verdict>,
}

/// One floor or scenario.
#[derive(Serialize)]
pub struct Line {
    pub name: &'static str,
    pub what: &'static str,
    /// `None` if every round failed.
    pub summary: Option<Summary>,
    pub headline: Option<Headline>,
    pub rounds: Vec<Round>,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Round {
    Sample(Sample),
    Failed(String),
}

/// The rounds that did not fail, taken together.
#[derive(Serialize)]
pub struct Summary {
    pub per_second: Spread,
    pub mb_per_second: Spread,
    pub p50_us: Option<Spread>,
    pub p99_us: Option<Spread>,
    pub p999_us: Option<Spread>,
    pub server_cpu_s_per_million: Option<Spread>,
    pub client_cpu_s_per_million: Spread,
    pub server_anon_mib: Option<Spread>,
    /// What the scenario measures beside that.
    pub figures: BTreeMap<&'static str, Spread>,
}

#[derive(Copy, Clone, Debug, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Report {
    pub fn new(facts: Facts, measured: Measured) -> Self {
        let verdicts = verdict::verdicts(&measured);
        let headline = |kind: Scenario| verdict::headline(&measured, kind);
        let headlines: Vec<_> = measured
            .scenarios
            .iter()
            .map(|row| headline(row.kind))
            .collect();
        let workloads = measured
            .scenarios
            .iter()
            .filter_map(|row| Some((row.kind.name(), headline(row.kind)?)))
            .collect();
        Self {
            facts,
            workloads,
            floors: measured
                .floors
                .into_iter()
                .map(|row| Line::new(row.kind.name(), row.kind.what(), row, None))
                .collect(),
            scenarios: measured
                .scenarios
                .into_iter()
                .zip(headlines)
                .map(|(row, headline)| Line::new(row.kind.name(), row.kind.what(), row, headline))
                .collect(),
            verdicts,
        }
    }

    /// True if nothing failed in any round.
    pub fn is_complete(&self) -> bool {
        let mut lines = self.floors.iter().chain(&self.scenarios);
        lines.all(|line| line.rounds.iter().all(Round::is_good))
    }
}

impl Line {
    fn new<K>(
        name: &'static str,
        what: &'static str,
        row: Row<K>,
        headline: Option<Headline>,
    ) -> Self {
        Self {
            name,
            what,
            summary: Summary::of(&row),
            headline,
            rounds: Round::all_of(row),
        }
    }
}

impl Round {
    pub fn all_of<K>(row: Row<K>) -> Vec<Self> {
        row.samples
            .into_iter()
            .map(|sample| sample.map_or_else(Self::Failed, Self::Sample))
            .collect()
    }

    pub fn is_good(&self) -> bool {
        matches!(self, Self::Sample(_))
    }
}

impl Summary {
    /// `None` if every round failed.
    pub fn of<K>(row: &Row<K>) -> Option<Self> {
        let latency = |value: fn(&crate::latency::Percentiles) -> f64| {
            Spread::of(row.good().filter_map(|s| s.latency.as_ref()).map(value))
        };
        Some(Self {
            per_second: Spread::of(row.good().map(Sample::per_second))?,
            mb_per_second: Spread::of(row.good().map(Sample::mb_per_second))?,
            p50_us: latency(|l| l.p50_us),
            p99_us: latency(|l| l.p99_us),
            p999_us: latency(|l| l.p999_us),
            server_cpu_s_per_million: Spread::of(
                row.good().filter_map(Sample::server_cpu_s_per_million),
            ),
            client_cpu_s_per_million: Spread::of(row.good().map(Sample::client_cpu_s_per_million))?,
            server_anon_mib: Spread::of(row.good().filter_map(|s| s.server_anon_mib)),
            figures: figures(row),
        })
    }
}

fn figures<K>(row: &Row<K>) -> BTreeMap<&'static str, Spread> {
    let names: BTreeSet<_> = row.good().flat_map(|s| s.figures.keys().copied()).collect();
    let spread = |name| Spread::of(row.good().filter_map(|s| s.figures.get(name).copied()));
    names
        .into_iter()
        .filter_map(|name| Some((name, spread(name)?)))
        .collect()
}

impl Spread {
    /// `None` of nothing. The median of an even number is the mean of the middle two.
    pub fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let upper = *values.get(middle)?;
        let median = if values.len().is_multiple_of(2) {
            (values[middle - 1] + upper) / 2.0
        } else {
            upper
        };
        Some(Self {
            median,
            min: values[0],
            max: values[values.len() - 1],
        })
    }
}
