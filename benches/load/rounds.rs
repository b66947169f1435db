//! A run: rounds, each of every floor and then every scenario.

use anyhow::Result;

use crate::args::Plan;
use crate::floors::Floor;
use crate::sample::Sample;
use crate::scenarios::Scenario;

/// What was found of one floor or scenario, round by round. The error is a whole sentence.
pub struct Row<K> {
    pub kind: K,
    pub samples: Vec<Result<Sample, String>>,
}

/// What a run found.
pub struct Measured {
    pub floors: Vec<Row<Floor>>,
    pub scenarios: Vec<Row<Scenario>>,
}

impl Measured {
    pub fn floor(&self, kind: Floor) -> Option<&Row<Floor>> {
        self.floors.iter().find(|row| row.kind == kind)
    }

    pub fn scenario(&self, kind: Scenario) -> Option<&Row<Scenario>> {
        self.scenarios.iter().find(|row| row.kind == kind)
    }
}

/// Measures what is planned. What fails is reported with the rest, and the run goes on.
pub async fn run(plan: &Plan) -> Result<Measured> {
    let mut measured = Measured {
        floors: plan.floors.iter().map(|&kind| Row::new(kind)).collect(),
        scenarios: plan.scenarios.iter().map(|&kind| Row::new(kind)).collect(),
    };
    for round in 1..=plan.rounds {
        for row in &mut measured.floors {
            let found = row.kind.measure(plan).await;
            row.push(row.kind.name(), round, found);
        }
        for row in &mut measured.scenarios {
            let found = row.kind.measure(plan).await;
            row.push(row.kind.name(), round, found);
        }
    }
    Ok(measured)
}

impl<K> Row<K> {
    pub fn new(kind: K) -> Self {
        Self {
            kind,
            samples: Vec::new(),
        }
    }

    pub fn good(&self) -> impl Iterator<Item = &Sample> {
        self.samples
            .iter()
            .filter_map(|sample| sample.as_ref().ok())
    }

    /// Keeps a sample, and tells of it while the run goes on.
    pub fn push(&mut self, name: &str, round: u32, found: Result<Sample>) {
        let found = found.map_err(|error| format!("{error:#}"));
        match &found {
            Ok(sample) => eprintln!(
                "round {round}: {name}: {:.0} /s, {:.1} MB/s",
                sample.per_second(),
                sample.mb_per_second()
            ),
            Err(error) => eprintln!("round {round}: {name} failed: {error}"),
        }
        self.samples.push(found);
    }
}
