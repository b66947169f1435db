//! Publishing spread over many topics, beside the same over one.
//!
//! Like with like: one connection to one broker, as many producers, and as many messages unanswered in
//! all. They take turns of a fraction of a second, because the machine drifts more from one second to
//! the next than they are apart. One producer alone, which sends larger frames, takes its turn too: that
//! tells what it costs to be many, where the other tells what it costs to have many topics.

use std::time::{Duration, Instant};

use anyhow::Result;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::publish::{OPENING_MAX, Pump, message, open};
use crate::sample::{Meter, Sample};
use crate::scenarios::Bench;

/// The rate over `topics` topics, a producer each; what part it is of the rates over one topic stands
/// beside it.
pub async fn beside_one(
    bench: &Bench<'_>,
    topics: usize,
    message_bytes: usize,
    window: usize,
) -> Result<Sample> {
    let client = bench.connect("bench-publisher").await?;
    let alone = vec![open(&client, "one").await?];
    let crowd: Vec<_> = stream::iter(0..topics)
        .map(|_| client.producer("one").open())
        .buffered(OPENING_MAX)
        .try_collect()
        .await?;
    let pumps = [
        Pump::open(&client, topics, message_bytes, window).await?,
        Pump::over(crowd, message(message_bytes), window),
        Pump::over(alone, message(message_bytes), window),
    ];
    let mut sides = Vec::new();
    for pump in pumps {
        sides.push(Side::warm(bench, pump).await?);
    }
    for _ in 0..TURNS {
        for side in &mut sides {
            side.turn(bench, message_bytes).await?;
        }
    }
    let mut samples = Vec::new();
    for side in sides {
        samples.push(side.stop(message_bytes).await?);
    }
    client.close().await;
    let rate = |nth: usize| samples.get(nth).map_or(f64::NAN, Sample::per_second);
    let (many, crowd, alone) = (rate(0), rate(1), rate(2));
    let sample = samples.swap_remove(0);
    Ok(sample
        .with("of_one_topic", many / crowd)
        .with("of_one_producer", many / alone)
        .with("one_topic_per_second", crowd)
        .with("one_producer_per_second", alone))
}

/// One of those that are compared.
struct Side {
    pump: Pump,
    meter: Meter,
}

impl Side {
    async fn warm(bench: &Bench<'_>, mut pump: Pump) -> Result<Self> {
        let end = Instant::now() + bench.plan.pace.warm_up;
        pump.run(end, u64::MAX, None).await?;
        pump.drain().await?;
        let mut meter = Meter::start(bench.server())?;
        meter.pause()?;
        Ok(Self { pump, meter })
    }

    /// Publishes for a while; filling the window before and emptying it afterwards are not counted.
    async fn turn(&mut self, bench: &Bench<'_>, message_bytes: usize) -> Result<()> {
        let pace = bench.plan.pace;
        let messages_max = pace.bytes_max / message_bytes as u64 / u64::from(TURNS);
        self.pump
            .run(Instant::now() + LEAD_IN, messages_max, None)
            .await?;
        self.meter.go_on()?;
        let end = Instant::now() + pace.measured / TURNS;
        self.pump
            .run(end, messages_max, Some(&mut self.meter))
            .await?;
        self.meter.pause()?;
        self.pump.drain().await?;
        Ok(())
    }

    async fn stop(self, message_bytes: usize) -> Result<Sample> {
        self.pump.close().await?;
        self.meter.stop(message_bytes as u64)
    }
}

/// Turns of each.
const TURNS: u32 = 8;
/// Long enough for several windows to be answered.
const LEAD_IN: Duration = Duration::from_millis(50);
