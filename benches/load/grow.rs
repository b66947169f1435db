//! How cost grows: series of points, each the same work with one number larger.
//!
//! Owns: the order of such a run, and what is kept of it. A round measures every series from its smallest
//! point to its largest, each against a broker of its own, so that neighbours in a series are neighbours
//! in time. Not here: a claim. A series shows a curve; whether it is good is the reader's to say.

pub mod chart;
pub mod page;
pub mod series;
pub mod table;

use anyhow::Result;
use serde::Serialize;

use crate::args::Plan;
use crate::grow::series::Series;
use crate::machine::Facts;
use crate::report::{Round, Spread, Summary};
use crate::rounds::Row;
use crate::sample::Sample;
use crate::scenarios;

/// What a run of series found.
#[derive(Serialize)]
pub struct Growth {
    pub facts: Facts,
    pub series: Vec<Grown>,
}

/// What was found of one series.
#[derive(Serialize)]
pub struct Grown {
    pub name: &'static str,
    pub what: &'static str,
    /// What grows.
    pub axis: &'static str,
    /// In ascending order of their values.
    pub points: Vec<Point>,
}

#[derive(Serialize)]
pub struct Point {
    /// How many of what grows.
    pub value: u64,
    /// `None` if every round failed.
    pub summary: Option<Summary>,
    pub rounds: Vec<Round>,
}

/// The samples of a series, a row for each of its values.
type Measured = (Series, Vec<Row<u64>>);

/// Measures what is planned. A point that fails is reported with the rest, and the run goes on.
pub async fn run(plan: &Plan, series: &[Series]) -> Vec<Measured> {
    let mut measured: Vec<Measured> = series
        .iter()
        .map(|&series| {
            let values = series.values(plan.quick).iter();
            (series, values.map(|&value| Row::new(value)).collect())
        })
        .collect();
    for round in 1..=plan.rounds {
        for (series, rows) in &mut measured {
            for row in rows {
                let found = measure(plan, *series, row.kind).await;
                let name = format!("{} {}", series.name(), grouped(row.kind));
                row.push(&name, round, found);
            }
        }
    }
    measured
}

async fn measure(plan: &Plan, series: Series, value: u64) -> Result<Sample> {
    scenarios::with_fresh_broker(plan, plan.mtu, async |bench| {
        series.measure(bench, value).await
    })
    .await
}

impl Growth {
    pub fn new(facts: Facts, measured: Vec<Measured>) -> Self {
        let series = measured
            .into_iter()
            .map(|(series, rows)| Grown {
                name: series.name(),
                what: series.what(),
                axis: series.axis(),
                points: rows.into_iter().map(Point::new).collect(),
            })
            .collect();
        Self { facts, series }
    }

    /// True if nothing failed in any round.
    pub fn is_complete(&self) -> bool {
        let mut points = self.series.iter().flat_map(|grown| &grown.points);
        points.all(|point| point.rounds.iter().all(Round::is_good))
    }
}

impl Point {
    fn new(row: Row<u64>) -> Self {
        Self {
            value: row.kind,
            summary: Summary::of(&row),
            rounds: Round::all_of(row),
        }
    }

    /// One figure of the point, if it has any.
    fn of(&self, figure: impl Fn(&Summary) -> Option<Spread>) -> Option<Spread> {
        self.summary.as_ref().and_then(figure)
    }

    fn rate(&self) -> Option<Spread> {
        self.of(|summary| Some(summary.per_second))
    }

    /// What went wrong, round by round.
    fn failures(&self) -> impl Iterator<Item = &str> {
        self.rounds.iter().filter_map(|round| match round {
            Round::Failed(error) => Some(error.as_str()),
            Round::Sample(_) => None,
        })
    }
}

/// A number with a comma before every three digits.
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (nth, digit) in digits.chars().enumerate() {
        if nth > 0 && (digits.len() - nth).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
