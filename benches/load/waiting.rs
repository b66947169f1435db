//! A deep backlog: publishing and consuming beside many waiting messages, against an empty broker.

use std::time::Instant;

use anyhow::{Context, Result};

use crate::backlog;
use crate::floors::WINDOW_DEEP;
use crate::publish::{self, MESSAGE_BYTES_SMALL, Pump, message, open};
use crate::sample::{Meter, Sample};
use crate::scenarios::Bench;

/// One topic is published to and consumed from, another holds the backlog and then is too.
pub async fn deep(bench: &Bench<'_>) -> Result<Sample> {
    let size = bench.plan.size;
    let publish_empty = rate(bench, "empty", MESSAGE_BYTES_SMALL).await?;
    let shallow = publish_empty.operations;
    let consume_empty = backlog::take(bench, "empty", shallow, MESSAGE_BYTES_SMALL).await?;
    let client = bench.connect("bench-publisher").await?;
    let window = WINDOW_DEEP as usize;
    let mut pump = Pump::open(&client, 1, MESSAGE_BYTES_SMALL, window).await?;
    pump.publish(size.backlog).await?;
    pump.close().await?;
    client.close().await;
    let publish = rate(bench, "deep", MESSAGE_BYTES_SMALL).await?;
    let topic = publish::topic(0);
    let consume = backlog::take(bench, &topic, size.backlog, MESSAGE_BYTES_SMALL).await?;
    let publish_ratio = publish.per_second() / publish_empty.per_second();
    let consume_ratio = consume.per_second() / consume_empty.per_second();
    Ok(consume
        .with("publish_ratio", publish_ratio)
        .with("consume_ratio", consume_ratio)
        .with("waiting", size.backlog as f64))
}

/// The rate of publishing to a topic of its own, by a producer of its own.
pub async fn rate(bench: &Bench<'_>, topic: &str, message_bytes: usize) -> Result<Sample> {
    let pace = bench.plan.pace;
    let client = bench.connect("bench-beside").await?;
    let producer = open(&client, topic).await?;
    let mut pump = Pump::over(vec![producer], message(message_bytes), WINDOW_DEEP as usize);
    pump.run(Instant::now() + pace.warm_up, u64::MAX, None)
        .await?;
    let mut meter = Meter::start(bench.server())?;
    pump.run(Instant::now() + pace.measured, u64::MAX, Some(&mut meter))
        .await?;
    let sample = meter.stop(message_bytes as u64);
    pump.close().await?;
    client.close().await;
    sample.context("the rate beside")
}
