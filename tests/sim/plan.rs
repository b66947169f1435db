//! What a world consists of and what may go wrong in it: drawn from the seed before it begins.

use millpond_broker::shard::ShardOptions;
use millpond_protocol::policy::{Backoff, Jitter};
use millpond_protocol::{SubscriptionConfig, SubscriptionMode, TopicConfig};
use millpond_wal::Options;

use crate::history::{History, SubNo, SubRules, TopicNo, TopicRules};
use crate::rng::Rng;

#[derive(Clone, Debug)]
pub struct Plan {
    pub topics: Vec<TopicPlan>,
    pub subs: Vec<SubPlan>,
    pub producers: Vec<ProducerPlan>,
    /// Which subscription each consumer reads.
    pub consumers: Vec<SubNo>,
    /// How long things go wrong, in microseconds.
    pub chaos_us: u64,
    pub faults: Faults,
    pub pace: Pace,
    pub log: ShardOptions,
}

#[derive(Clone, Debug)]
pub struct TopicPlan {
    pub name: String,
    pub config: TopicConfig,
}

#[derive(Clone, Debug)]
pub struct SubPlan {
    pub topic: TopicNo,
    pub name: String,
    pub config: SubscriptionConfig,
}

#[derive(Clone, Debug)]
pub struct ProducerPlan {
    pub topic: TopicNo,
    /// None: anonymous.
    pub name: Option<String>,
    pub messages: u64,
    /// Messages that may be unacknowledged.
    pub window: usize,
    /// Sequence numbers skip, in percent of the messages.
    pub skip_percent: u64,
    pub body_bytes: u64,
    pub delay_percent: u64,
    pub ttl_percent: u64,
}

/// Most worlds are small and crash all the time; some are large, so that much is recovered at once.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Size {
    Small,
    Large,
}

/// Of all worlds, in percent.
const LARGE_PERCENT: u64 = 4;

/// How often what goes wrong, each in thousandths of the occasions it has.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Between two crashes on the average, in microseconds.
    pub crash_every_us: u64,
    /// Of crashes: the machine's rather than the process's, in percent.
    pub power_percent: u64,
    /// Of starts: interrupted by another crash, in percent.
    pub crash_again_percent: u64,
    /// Of starts: with a call that fails, in percent.
    pub start_error_percent: u64,
    pub disk_error_every_us: u64,
    /// Of crashes: one copy of a directory is damaged, in percent.
    pub rot_percent: u64,
    pub clock_jump_every_us: u64,
    pub break_permille: u64,
    pub client_crash_permille: u64,
    pub stall_permille: u64,
    pub admin_permille: u64,
    /// Wall clock jumps at a crash, in percent.
    pub wall_jump_percent: u64,
}

/// Typical waits in microseconds.
#[derive(Clone, Debug)]
pub struct Pace {
    pub network_us: u64,
    pub round_us: u64,
    pub produce_us: u64,
    pub consume_us: u64,
    pub job_us: u64,
}

impl Plan {
    pub fn draw(rng: &mut Rng) -> Self {
        let size = match rng.percent(LARGE_PERCENT) {
            true => Size::Large,
            false => Size::Small,
        };
        let (topics, subs_each) = match size {
            Size::Small => (*rng.pick(&[1, 1, 1, 2]), 1),
            Size::Large => (rng.between(1, 2), 2),
        };
        let topics: Vec<_> = (0..topics).map(|n| topic(rng, n)).collect();
        let mut subs = Vec::new();
        for no in 0..topics.len() {
            for n in 0..rng.between(1, subs_each) {
                subs.push(subscription(rng, no, n));
            }
        }
        if size == Size::Small && rng.percent(25) {
            subs.push(subscription(rng, 0, 1));
        }
        let producers = match size {
            Size::Small => rng.between(1, 2),
            Size::Large => rng.between(1, 3),
        };
        let producers = (0..producers).map(|n| producer(rng, size, topics.len() as u64, n));
        let producers = producers.collect();
        let mut consumers = Vec::new();
        for sub in 0..subs.len() {
            let count = rng.between(1, 2);
            consumers.extend((0..count).map(|_| sub));
        }
        let chaos_us = match size {
            Size::Small => rng.between(1_000_000, 4_000_000),
            Size::Large => rng.between(4_000_000, 20_000_000),
        };
        Self {
            topics,
            subs,
            producers,
            consumers,
            chaos_us,
            faults: faults(rng, size, chaos_us),
            pace: pace(rng, size),
            log: log(rng),
        }
    }

    /// An empty history with the rules of this world.
    pub fn history(&self) -> History {
        let topics = self.topics.iter().map(|topic| TopicRules {
            keeps_all: topic.config.retention_ms > 0 && topic.config.max_messages.is_none(),
        });
        let subs = self.subs.iter().map(|sub| SubRules {
            topic: sub.topic,
            is_stream: sub.config.mode == SubscriptionMode::Stream,
            max_attempts: sub.config.max_attempts,
            max_deliveries: sub.config.max_deliveries,
            least_waits_ms: least_waits_ms(&sub.config),
        });
        History {
            topics: topics.collect(),
            subs: subs.collect(),
            events: Vec::new(),
        }
    }
}

fn topic(rng: &mut Rng, n: u64) -> TopicPlan {
    let retention_ms = if rng.percent(50) {
        0
    } else {
        30 * 24 * 3_600_000
    };
    let mut config = TopicConfig {
        retention_ms,
        ..TopicConfig::default()
    };
    if rng.percent(15) {
        config.max_messages = Some(rng.between(10, 60));
    }
    TopicPlan {
        name: format!("t{n}"),
        config,
    }
}

fn subscription(rng: &mut Rng, topic: TopicNo, n: u64) -> SubPlan {
    let mode = if rng.percent(20) {
        SubscriptionMode::Stream
    } else {
        SubscriptionMode::Queue
    };
    let backoff = match rng.below(3) {
        0 => Backoff::Fixed {
            wait_ms: rng.between(0, 3_000),
        },
        1 => Backoff::List {
            waits_ms: (0..rng.between(1, 4))
                .map(|_| rng.between(0, 5_000))
                .collect(),
        },
        _ => Backoff::Exponential {
            initial_ms: rng.between(1, 500),
            multiplier_milli: rng.between(1_000, 3_000) as u32,
            max_ms: 8_000,
        },
    };
    let max_deliveries = if rng.percent(20) {
        rng.between(3, 8) as u32
    } else {
        1_000
    };
    let config = SubscriptionConfig {
        mode,
        lease_ms: rng.between(1_000, 8_000),
        processing_timeout_ms: rng.between(200, 6_000),
        hold_max_ms: rng.between(1_000, 6_000),
        backoff,
        jitter: *rng.pick(&[Jitter::None, Jitter::Equal, Jitter::Full]),
        max_attempts: rng.between(1, 5) as u32,
        max_deliveries,
        max_in_flight: rng.between(1, 40) as u32,
        ..SubscriptionConfig::default()
    };
    SubPlan {
        topic,
        name: format!("s{n}"),
        config,
    }
}

fn producer(rng: &mut Rng, size: Size, topics: u64, n: u64) -> ProducerPlan {
    ProducerPlan {
        topic: rng.below(topics) as usize,
        name: rng.percent(70).then(|| format!("p{n}")),
        messages: match size {
            Size::Small => rng.between(5, 60),
            Size::Large => rng.between(20, 150),
        },
        window: rng.between(1, 40) as usize,
        skip_percent: *rng.pick(&[0, 0, 20]),
        body_bytes: *rng.pick(&[40, 300, 1_000, 3_000]),
        delay_percent: *rng.pick(&[0, 0, 10]),
        ttl_percent: *rng.pick(&[0, 0, 5]),
    }
}

fn faults(rng: &mut Rng, size: Size, chaos_us: u64) -> Faults {
    let crash_every_us = match size {
        Size::Small => chaos_us / rng.between(32, 44),
        Size::Large => rng.between(500_000, 4_000_000),
    };
    Faults {
        crash_every_us,
        power_percent: *rng.pick(&[50, 80, 95, 100]),
        crash_again_percent: *rng.pick(&[0, 20, 50]),
        start_error_percent: *rng.pick(&[0, 0, 5, 15]),
        disk_error_every_us: crash_every_us * *rng.pick(&[2, 8, 1_000]),
        rot_percent: *rng.pick(&[0, 0, 20]),
        clock_jump_every_us: crash_every_us * *rng.pick(&[1, 4, 1_000]),
        break_permille: *rng.pick(&[0, 5, 30]),
        client_crash_permille: *rng.pick(&[0, 2, 10]),
        stall_permille: *rng.pick(&[0, 3, 20]),
        admin_permille: *rng.pick(&[0, 0, 100, 300]),
        wall_jump_percent: *rng.pick(&[0, 20, 50]),
    }
}

fn pace(rng: &mut Rng, size: Size) -> Pace {
    let produce_us = match size {
        Size::Small => *rng.pick(&[3_000, 10_000, 30_000]),
        Size::Large => *rng.pick(&[1_000, 10_000, 50_000]),
    };
    Pace {
        network_us: *rng.pick(&[20, 200, 2_000]),
        round_us: *rng.pick(&[50, 300, 2_000]),
        produce_us,
        consume_us: *rng.pick(&[3_000, 10_000, 30_000]),
        job_us: *rng.pick(&[100, 10_000, 500_000]),
    }
}

fn log(rng: &mut Rng) -> ShardOptions {
    let mut store = [0; 16];
    store[..8].copy_from_slice(&rng.next().to_le_bytes());
    store[8..].copy_from_slice(&rng.next().to_le_bytes());
    ShardOptions {
        log: Options {
            segment_bytes: *rng.pick(&[64, 64, 96, 256]) << 10,
            entry_bytes_max: 2 << 20,
            spare_segments: rng.below(3) as usize,
            buffer_bytes_idle: 1 << 20,
            manifest_bytes: 64 << 10,
            fresh_store_id: store,
        },
        snapshot_every_bytes: *rng.pick(&[2, 8, 32, 256]) << 10,
    }
}

/// The shortest waits that the policy allows after the first failures.
fn least_waits_ms(config: &SubscriptionConfig) -> Vec<u64> {
    let full = |n: u32| match &config.backoff {
        Backoff::Fixed { wait_ms } => *wait_ms,
        Backoff::List { waits_ms } => waits_ms[(n as usize - 1).min(waits_ms.len() - 1)],
        Backoff::Exponential {
            initial_ms,
            multiplier_milli,
            max_ms,
        } => {
            let factor = (f64::from(*multiplier_milli) / 1_000.0).powi(n as i32 - 1);
            // Rounding of the exact computation may take a little more than this one.
            ((*initial_ms as f64 * factor) as u64)
                .min(*max_ms)
                .saturating_sub(n as u64)
        }
    };
    let least = |wait: u64| match config.jitter {
        Jitter::None => wait,
        Jitter::Equal => wait / 2,
        Jitter::Full => 0,
    };
    (1..=config.max_attempts.max(1))
        .map(|n| least(full(n)))
        .collect()
}
