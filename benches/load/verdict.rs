//! Each scenario's value, the floor under it, and what is claimed of both, within one round.

use serde::Serialize;

use crate::floors::{Floor, WINDOW};
use crate::report::Spread;
use crate::rounds::Measured;
use crate::sample::Sample;
use crate::scenarios::Scenario;

/// A scenario's headline: its value, its floor in the same unit, and their ratio.
#[derive(Clone, Debug, Serialize)]
pub struct Headline {
    pub value: Spread,
    pub unit: &'static str,
    /// What the machine gave to the same work without a broker, where there is such a thing.
    pub floor: Option<Spread>,
    pub ratio: Option<Spread>,
    /// What raw quinn with a disk behind it gave, and nothing else of a broker, where that is comparable.
    pub bare: Option<Spread>,
    pub of_bare: Option<Spread>,
}

/// Something that is claimed, and what was found.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    pub claim: &'static str,
    pub bound: Bound,
    pub found: Spread,
    pub met: bool,
}

#[derive(Copy, Clone, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Bound {
    fn is_met(self, found: f64) -> bool {
        match self {
            Self::AtLeast(least) => found >= least,
            Self::AtMost(most) => found <= most,
        }
    }
}

/// What one round measured.
#[derive(Copy, Clone)]
struct Round<'a> {
    measured: &'a Measured,
    nth: usize,
}

impl Round<'_> {
    fn floor(&self, kind: Floor) -> Option<&Sample> {
        let row = self.measured.floor(kind)?;
        row.samples.get(self.nth)?.as_ref().ok()
    }

    fn scenario(&self, kind: Scenario) -> Option<&Sample> {
        let row = self.measured.scenario(kind)?;
        row.samples.get(self.nth)?.as_ref().ok()
    }

    fn figure(&self, kind: Scenario, name: &str) -> Option<f64> {
        self.scenario(kind)?.figures.get(name).copied()
    }

    fn rate(&self, kind: Scenario) -> Option<f64> {
        Some(self.scenario(kind)?.per_second())
    }

    fn quinn(&self, kind: Floor) -> Option<f64> {
        Some(self.floor(kind)?.per_second())
    }

    /// The round trip and so many syncs, in microseconds.
    fn trip_and_syncs(&self, sync: Floor, syncs: f64) -> Option<f64> {
        let trip = self.floor(Floor::QuinnRoundTrip)?.latency?.p50_us;
        Some(trip + syncs * self.floor(sync)?.latency?.p50_us)
    }

    /// A windowed publish can be no faster than quinn, nor than its window allows.
    fn windowed(&self, quinn: Floor, window: u64, sync: Floor) -> Option<f64> {
        let each_us = self.trip_and_syncs(sync, 1.5)? / window as f64;
        Some(self.quinn(quinn)?.min(1e6 / each_us))
    }

    fn value(&self, kind: Scenario) -> Option<f64> {
        let sample = self.scenario(kind)?;
        match kind {
            Scenario::BulkIn | Scenario::BulkOut => Some(sample.mb_per_second()),
            Scenario::AckAlone | Scenario::EndToEnd => Some(sample.latency?.p50_us),
            Scenario::RetryStorm => Some(sample.latency?.p99_us / 1e3),
            Scenario::Scheduled => self.figure(kind, "bytes_each"),
            Scenario::Restart => self.figure(kind, "ms"),
            Scenario::Connections => self.figure(kind, "kib_each"),
            Scenario::Idle => self.figure(kind, "core_percent"),
            _ => Some(sample.per_second()),
        }
    }

    fn floor_under(&self, kind: Scenario) -> Option<f64> {
        let bulk = || Some(self.floor(Floor::QuinnBulk)?.mb_per_second());
        match kind {
            Scenario::Publish1k => self.windowed(Floor::Quinn1k, WINDOW, Floor::Sync64k),
            Scenario::Publish128 => self.windowed(Floor::Quinn128, WINDOW, Floor::Sync4k),
            Scenario::Publish1kDeep
            | Scenario::Publish1k8
            | Scenario::Topics1000
            | Scenario::ConsumeAck1k => self.quinn(Floor::Quinn1kDeep),
            Scenario::Publish128Deep | Scenario::ConsumeAck128 => self.quinn(Floor::Quinn128Deep),
            Scenario::BulkIn | Scenario::BulkOut => bulk(),
            Scenario::AckAlone | Scenario::EndToEnd => self.trip_and_syncs(Floor::Sync4k, 1.0),
            Scenario::Connections => self.figure(kind, "quinn_kib_each"),
            _ => None,
        }
    }

    /// The same unit from [`crate::raw_disk`].
    fn bare(&self, kind: Scenario) -> Option<f64> {
        match kind {
            Scenario::Publish1k => self.quinn(Floor::Synced1k),
            Scenario::Publish1kDeep | Scenario::Publish1k8 | Scenario::Topics1000 => {
                self.quinn(Floor::Synced1kDeep)
            }
            Scenario::Publish128 => self.quinn(Floor::Synced128),
            Scenario::Publish128Deep => self.quinn(Floor::Synced128Deep),
            Scenario::BulkIn => Some(self.floor(Floor::Synced1kDeep)?.mb_per_second()),
            Scenario::BulkOut => Some(self.floor(Floor::ReadBulk)?.mb_per_second()),
            Scenario::ConsumeAck1k => self.quinn(Floor::ReadBulk),
            Scenario::AckAlone | Scenario::EndToEnd => {
                Some(self.floor(Floor::SyncedAlone)?.latency?.p50_us)
            }
            _ => None,
        }
    }

    fn of_bare(&self, kind: Scenario) -> Option<f64> {
        Some(self.value(kind)? / self.bare(kind)?)
    }

    fn ratio(&self, kind: Scenario) -> Option<f64> {
        Some(self.value(kind)? / self.floor_under(kind)?)
    }
}

fn unit(kind: Scenario) -> &'static str {
    match kind {
        Scenario::BulkIn | Scenario::BulkOut => "MB/s",
        Scenario::AckAlone | Scenario::EndToEnd => "us p50",
        Scenario::RetryStorm => "ms late p99",
        Scenario::Scheduled => "bytes each",
        Scenario::Restart => "ms",
        Scenario::Connections => "KiB each",
        Scenario::Idle => "% of a core",
        _ => "msg/s",
    }
}

/// `None` if the scenario failed in every round.
pub fn headline(measured: &Measured, kind: Scenario) -> Option<Headline> {
    let each = |value: fn(Round<'_>, Scenario) -> Option<f64>| {
        Spread::of(rounds(measured).filter_map(|round| value(round, kind)))
    };
    Some(Headline {
        value: each(|round, kind| round.value(kind))?,
        unit: unit(kind),
        floor: each(|round, kind| round.floor_under(kind)),
        ratio: each(|round, kind| round.ratio(kind)),
        bare: each(|round, kind| round.bare(kind)),
        of_bare: each(|round, kind| round.of_bare(kind)),
    })
}

/// The claims of which this run has measured everything that they are about.
pub fn verdicts(measured: &Measured) -> Vec<Verdict> {
    CLAIMS
        .iter()
        .filter_map(|&(claim, bound, find)| {
            let found = Spread::of(rounds(measured).filter_map(|round| find(&round)))?;
            Some(Verdict {
                claim,
                bound,
                met: bound.is_met(found.median),
                found,
            })
        })
        .collect()
}

fn rounds(measured: &Measured) -> impl Iterator<Item = Round<'_>> {
    let count = measured.scenarios.iter().map(|row| row.samples.len()).max();
    (0..count.unwrap_or(0)).map(move |nth| Round { measured, nth })
}

type Claim = (&'static str, Bound, fn(&Round<'_>) -> Option<f64>);

use Bound::{AtLeast, AtMost};
use Scenario as S;

const CLAIMS: &[Claim] = &[
    ("publish_1k, of its floor", AtLeast(0.6), |r| {
        r.ratio(S::Publish1k)
    }),
    ("publish_1k_deep, of quinn", AtLeast(0.75), |r| {
        r.ratio(S::Publish1kDeep)
    }),
    (
        "publish_1k_deep in MB/s, of raw quinn bulk",
        AtLeast(0.5),
        |r| {
            let bulk = r.floor(Floor::QuinnBulk)?.mb_per_second();
            Some(r.scenario(S::Publish1kDeep)?.mb_per_second() / bulk)
        },
    ),
    ("publish_128 a second", AtLeast(0.7e6), |r| {
        r.rate(S::Publish128)
    }),
    ("publish_128_deep a second", AtLeast(1.5e6), |r| {
        r.rate(S::Publish128Deep)
    }),
    ("publish_1k_8, of publish_1k", AtLeast(1.0), |r| {
        Some(r.rate(S::Publish1k8)? / r.rate(S::Publish1k)?)
    }),
    (
        "topics_1000, of as many producers on one topic",
        AtLeast(0.9),
        |r| r.figure(S::Topics1000, "of_one_topic"),
    ),
    ("consume_ack_1k, of publish_1k_deep", AtLeast(1.0), |r| {
        Some(r.rate(S::ConsumeAck1k)? / r.rate(S::Publish1kDeep)?)
    }),
    ("consume_ack_1k, of quinn", AtLeast(0.6), |r| {
        r.ratio(S::ConsumeAck1k)
    }),
    ("consume_ack_128 a second", AtLeast(1.0e6), |r| {
        r.rate(S::ConsumeAck128)
    }),
    ("bulk_in, of raw quinn bulk", AtLeast(0.85), |r| {
        r.ratio(S::BulkIn)
    }),
    ("bulk_out, of raw quinn bulk", AtLeast(0.85), |r| {
        r.ratio(S::BulkOut)
    }),
    (
        "ack_alone p50, of a round trip and a sync",
        AtMost(1.4),
        |r| r.ratio(S::AckAlone),
    ),
    ("end_to_end p50 in us", AtMost(200.0), |r| {
        r.value(S::EndToEnd)
    }),
    ("end_to_end p99 in us", AtMost(700.0), |r| {
        Some(r.scenario(S::EndToEnd)?.latency?.p99_us)
    }),
    ("retry_storm lateness p99 in ms", AtMost(10.0), |r| {
        r.value(S::RetryStorm)
    }),
    ("retry_storm early ones", AtMost(0.0), |r| {
        r.figure(S::RetryStorm, "early")
    }),
    ("scheduled bytes each", AtMost(24.0), |r| {
        r.value(S::Scheduled)
    }),
    (
        "publishing beside scheduled ones, of without",
        AtLeast(0.9),
        |r| r.figure(S::Scheduled, "publish_ratio"),
    ),
    (
        "publishing on a deep backlog, of without",
        AtLeast(0.9),
        |r| r.figure(S::Backlog, "publish_ratio"),
    ),
    (
        "consuming from a deep backlog, of without",
        AtLeast(0.9),
        |r| r.figure(S::Backlog, "consume_ratio"),
    ),
    ("memory with a deep backlog in MiB", AtMost(1_024.0), |r| {
        r.scenario(S::Backlog)?.server_anon_mib
    }),
    ("restart in ms", AtMost(150.0), |r| r.value(S::Restart)),
    ("idle consumers' KiB each", AtMost(32.0), |r| {
        r.value(S::Connections)
    }),
    (
        "publishing beside idle consumers, of without",
        AtLeast(0.9),
        |r| r.figure(S::Connections, "publish_ratio"),
    ),
    ("idle broker, percent of a core", AtMost(0.5), |r| {
        r.value(S::Idle)
    }),
];
