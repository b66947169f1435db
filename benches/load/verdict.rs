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
    /// What was found in place of it where there is no broker, only what any would stand on: raw quinn, with a
    /// thread and a disk behind it where the claim is about durable messages.
    pub bare: Option<Spread>,
    pub outcome: Outcome,
}

/// By the medians.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Met,
    /// Not met, and neither without a broker: this machine does not give it.
    Beyond,
    NotMet,
}

impl Outcome {
    fn of(bound: Bound, found: &Spread, bare: Option<&Spread>) -> Self {
        if bound.is_met(found.median) {
            Self::Met
        } else if bare.is_some_and(|bare| !bound.is_met(bare.median)) {
            Self::Beyond
        } else {
            Self::NotMet
        }
    }
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
            Scenario::BulkIn | Scenario::BulkOut | Scenario::BulkOut6400 => {
                Some(sample.mb_per_second())
            }
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
        let bulk = |floor| Some(self.floor(floor)?.mb_per_second());
        match kind {
            Scenario::Publish1k => self.windowed(Floor::Quinn1k, WINDOW, Floor::Sync64k),
            Scenario::Publish128 => self.windowed(Floor::Quinn128, WINDOW, Floor::Sync4k),
            Scenario::Publish1kDeep
            | Scenario::Publish1k8
            | Scenario::Topics1000
            | Scenario::ConsumeAck1k => self.quinn(Floor::Quinn1kDeep),
            Scenario::Publish128Deep | Scenario::ConsumeAck128 => self.quinn(Floor::Quinn128Deep),
            Scenario::BulkIn | Scenario::BulkOut => bulk(Floor::QuinnBulk),
            Scenario::BulkOut6400 => bulk(Floor::QuinnBulk6400),
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
            Scenario::BulkOut6400 => Some(self.floor(Floor::ReadBulk6400)?.mb_per_second()),
            Scenario::ConsumeAck1k => self.quinn(Floor::ReadBulk),
            Scenario::AckAlone => Some(self.floor(Floor::SyncedAlone)?.latency?.p50_us),
            Scenario::EndToEnd => Some(self.floor(Floor::SyncedPaced)?.latency?.p50_us),
            _ => None,
        }
    }

    fn of_bare(&self, kind: Scenario) -> Option<f64> {
        Some(self.value(kind)? / self.bare(kind)?)
    }

    fn ratio(&self, kind: Scenario) -> Option<f64> {
        Some(self.value(kind)? / self.floor_under(kind)?)
    }

    fn bare_ratio(&self, kind: Scenario) -> Option<f64> {
        Some(self.bare(kind)? / self.floor_under(kind)?)
    }

    /// Of raw quinn in bulk.
    fn of_bulk(&self, mb_per_second: f64) -> Option<f64> {
        Some(mb_per_second / self.floor(Floor::QuinnBulk)?.mb_per_second())
    }
}

fn unit(kind: Scenario) -> &'static str {
    match kind {
        Scenario::BulkIn | Scenario::BulkOut | Scenario::BulkOut6400 => "MB/s",
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
    let spread = |find: Find| Spread::of(rounds(measured).filter_map(|round| find(&round)));
    CLAIMS
        .iter()
        .filter_map(|claim| {
            let found = spread(claim.find)?;
            let bare = claim.bare.and_then(spread);
            Some(Verdict {
                claim: claim.text,
                bound: claim.bound,
                outcome: Outcome::of(claim.bound, &found, bare.as_ref()),
                found,
                bare,
            })
        })
        .collect()
}

fn rounds(measured: &Measured) -> impl Iterator<Item = Round<'_>> {
    let count = measured.scenarios.iter().map(|row| row.samples.len()).max();
    (0..count.unwrap_or(0)).map(move |nth| Round { measured, nth })
}

type Find = fn(&Round<'_>) -> Option<f64>;

struct Claim {
    text: &'static str,
    bound: Bound,
    find: Find,
    /// The same without a broker.
    bare: Option<Find>,
}

/// A claim about something that only a broker does.
const fn claim(text: &'static str, bound: Bound, find: Find) -> Claim {
    Claim {
        text,
        bound,
        find,
        bare: None,
    }
}

impl Claim {
    const fn beside(self, bare: Find) -> Self {
        Self {
            bare: Some(bare),
            ..self
        }
    }
}

use Bound::{AtLeast, AtMost};
use Scenario as S;

const CLAIMS: &[Claim] = &[
    claim("publish_1k, of its floor", AtLeast(0.6), |r| {
        r.ratio(S::Publish1k)
    })
    .beside(|r| r.bare_ratio(S::Publish1k)),
    claim("publish_1k_deep, of quinn", AtLeast(0.75), |r| {
        r.ratio(S::Publish1kDeep)
    })
    .beside(|r| r.bare_ratio(S::Publish1kDeep)),
    claim(
        "publish_1k_deep in MB/s, of raw quinn bulk",
        AtLeast(0.5),
        |r| r.of_bulk(r.scenario(S::Publish1kDeep)?.mb_per_second()),
    )
    .beside(|r| r.of_bulk(r.floor(Floor::Synced1kDeep)?.mb_per_second())),
    claim("publish_128 a second", AtLeast(0.7e6), |r| {
        r.rate(S::Publish128)
    })
    .beside(|r| r.bare(S::Publish128)),
    claim("publish_128_deep a second", AtLeast(1.5e6), |r| {
        r.rate(S::Publish128Deep)
    })
    .beside(|r| r.bare(S::Publish128Deep)),
    claim("publish_1k_8, of publish_1k", AtLeast(1.0), |r| {
        Some(r.rate(S::Publish1k8)? / r.rate(S::Publish1k)?)
    }),
    claim(
        "topics_1000, of as many producers on one topic",
        AtLeast(0.9),
        |r| r.figure(S::Topics1000, "of_one_topic"),
    ),
    claim("consume_ack_1k, of publish_1k_deep", AtLeast(1.0), |r| {
        Some(r.rate(S::ConsumeAck1k)? / r.rate(S::Publish1kDeep)?)
    }),
    claim("consume_ack_1k, of quinn", AtLeast(0.6), |r| {
        r.ratio(S::ConsumeAck1k)
    })
    .beside(|r| r.bare_ratio(S::ConsumeAck1k)),
    claim("consume_ack_128 a second", AtLeast(1.0e6), |r| {
        r.rate(S::ConsumeAck128)
    }),
    claim("bulk_in, of raw quinn bulk", AtLeast(0.85), |r| {
        r.ratio(S::BulkIn)
    })
    .beside(|r| r.bare_ratio(S::BulkIn)),
    claim("bulk_out, of raw quinn bulk", AtLeast(0.85), |r| {
        r.ratio(S::BulkOut)
    })
    .beside(|r| r.bare_ratio(S::BulkOut)),
    claim("bulk_out_6400 in MB/s", AtLeast(2_200.0), |r| {
        r.value(S::BulkOut6400)
    })
    .beside(|r| r.bare(S::BulkOut6400)),
    claim(
        "ack_alone p50, of a round trip and a sync",
        AtMost(1.4),
        |r| r.ratio(S::AckAlone),
    )
    .beside(|r| r.bare_ratio(S::AckAlone)),
    claim("end_to_end p50 in us", AtMost(200.0), |r| {
        r.value(S::EndToEnd)
    })
    .beside(|r| r.bare(S::EndToEnd)),
    claim("end_to_end p99 in us", AtMost(700.0), |r| {
        Some(r.scenario(S::EndToEnd)?.latency?.p99_us)
    })
    .beside(|r| Some(r.floor(Floor::SyncedPaced)?.latency?.p99_us)),
    claim("retry_storm lateness p99 in ms", AtMost(10.0), |r| {
        r.value(S::RetryStorm)
    }),
    claim("retry_storm early ones", AtMost(0.0), |r| {
        r.figure(S::RetryStorm, "early")
    }),
    claim("scheduled bytes each", AtMost(24.0), |r| {
        r.value(S::Scheduled)
    }),
    claim(
        "publishing beside scheduled ones, of without",
        AtLeast(0.9),
        |r| r.figure(S::Scheduled, "publish_ratio"),
    ),
    claim(
        "publishing on a deep backlog, of without",
        AtLeast(0.9),
        |r| r.figure(S::Backlog, "publish_ratio"),
    ),
    claim(
        "consuming from a deep backlog, of without",
        AtLeast(0.9),
        |r| r.figure(S::Backlog, "consume_ratio"),
    ),
    claim("memory with a deep backlog in MiB", AtMost(1_024.0), |r| {
        r.scenario(S::Backlog)?.server_anon_mib
    }),
    claim("restart in ms", AtMost(150.0), |r| r.value(S::Restart)),
    claim("idle consumers' KiB each", AtMost(32.0), |r| {
        r.value(S::Connections)
    })
    .beside(|r| r.figure(S::Connections, "quinn_kib_each")),
    claim(
        "publishing beside idle consumers, of without",
        AtLeast(0.9),
        |r| r.figure(S::Connections, "publish_ratio"),
    )
    .beside(|r| r.figure(S::Connections, "quinn_publish_ratio")),
    claim("idle broker, percent of a core", AtMost(0.5), |r| {
        r.value(S::Idle)
    }),
];
