//! Ratios between what was measured in the same round, and what is claimed of them.

use serde::Serialize;

use crate::floors::Floor;
use crate::report::Spread;
use crate::rounds::{Measured, Row};
use crate::sample::Sample;
use crate::scenarios::Scenario;

/// A claim that a ratio is at least so much.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    pub claim: &'static str,
    pub least: f64,
    pub ratio: Spread,
    pub met: bool,
}

/// The claims that this run has measured both sides of.
pub fn verdicts(measured: &Measured) -> Vec<Verdict> {
    let bulk = measured.floor(Floor::QuinnBulk);
    let publish = measured.scenario(Scenario::Publish1k);
    let of_bulk = |row| {
        rounds(row, bulk?, |own, floor| {
            own.mb_per_second() / floor.mb_per_second()
        })
    };
    let of_publish = |row| {
        rounds(row, publish?, |own, other| {
            own.per_second() / other.per_second()
        })
    };
    [
        (
            "1 KiB publishes in MB/s, of raw quinn bulk",
            LEAST_OF_BULK,
            publish.and_then(of_bulk),
        ),
        (
            "1 KiB messages acked one by one, of the publish rate",
            LEAST_OF_PUBLISH,
            measured
                .scenario(Scenario::ConsumeAck1k)
                .and_then(of_publish),
        ),
        (
            "1,000 topics, of one topic",
            LEAST_OF_ONE_TOPIC,
            measured.scenario(Scenario::Topics1000).and_then(of_publish),
        ),
    ]
    .into_iter()
    .filter_map(|(claim, least, ratio)| {
        let ratio = ratio?;
        Some(Verdict {
            claim,
            least,
            met: ratio.median >= least,
            ratio,
        })
    })
    .collect()
}

/// What a scenario is of its floor: throughput of raw bulk, or latency over a round trip and a sync.
#[derive(Clone, Debug, Serialize)]
pub struct FloorRatio {
    pub floor: &'static str,
    pub ratio: Spread,
}

/// `None` if the floor was not measured.
pub fn floor_ratio(measured: &Measured, row: &Row<Scenario>) -> Option<FloorRatio> {
    match row.kind {
        Scenario::AckAlone | Scenario::EndToEnd => {
            let trip = measured.floor(Floor::QuinnRoundTrip)?;
            let sync = measured.floor(Floor::Sync4k)?;
            let floors = trip.samples.iter().zip(&sync.samples);
            let ratios = row
                .samples
                .iter()
                .zip(floors)
                .filter_map(|(own, (trip, sync))| Some(p50(own)? / (p50(trip)? + p50(sync)?)));
            let ratio = Spread::of(ratios)?;
            Some(FloorRatio {
                floor: "p50 over round trip + sync_4k",
                ratio,
            })
        }
        _ => {
            let bulk = measured.floor(Floor::QuinnBulk)?;
            let ratio = rounds(row, bulk, |own, floor| {
                own.mb_per_second() / floor.mb_per_second()
            })?;
            Some(FloorRatio {
                floor: "MB/s of quinn_bulk",
                ratio,
            })
        }
    }
}

fn rounds<A, B>(
    one: &Row<A>,
    other: &Row<B>,
    ratio: impl Fn(&Sample, &Sample) -> f64,
) -> Option<Spread> {
    let pairs = one.samples.iter().zip(&other.samples);
    Spread::of(pairs.filter_map(|pair| match pair {
        (Ok(one), Ok(other)) => Some(ratio(one, other)),
        _ => None,
    }))
}

fn p50(sample: &Result<Sample, String>) -> Option<f64> {
    Some(sample.as_ref().ok()?.latency?.p50_us)
}

/// Within two times.
const LEAST_OF_BULK: f64 = 0.5;
const LEAST_OF_PUBLISH: f64 = 1.0;
const LEAST_OF_ONE_TOPIC: f64 = 0.8;
