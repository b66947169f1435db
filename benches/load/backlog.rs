//! Consuming: a backlog is published, then one consumer takes it and acknowledges message by message.

use std::collections::VecDeque;
use std::time::Instant;

use anyhow::{Context, Result};
use millpond_client::{SettleReceipt, StartAt, Subscription, SubscriptionConfig};

use crate::floors::WINDOW_DEEP;
use crate::publish::{self, Pump};
use crate::sample::{Meter, Sample};
use crate::scenarios::Bench;

/// Publishes for a while, then consumes what was published.
pub async fn consume(bench: &Bench<'_>, message_bytes: usize) -> Result<Sample> {
    let pace = bench.plan.pace;
    let window = publish::window_deep(message_bytes);
    let publisher = bench.connect("bench-publisher").await?;
    let mut pump = Pump::open(&publisher, 1, message_bytes, window).await?;
    let messages_max = pace.bytes_max / message_bytes as u64;
    let published = pump
        .run(Instant::now() + pace.total(), messages_max, None)
        .await?;
    let backlog = published + pump.drain().await?;
    pump.close().await?;
    publisher.close().await;
    take(bench, &publish::topic(0), backlog, message_bytes).await
}

/// Consumes a backlog of at least so many messages in a topic, by a new subscription. A message counts
/// when its own acknowledgement is durable.
pub async fn take(
    bench: &Bench<'_>,
    topic: &str,
    backlog: u64,
    message_bytes: usize,
) -> Result<Sample> {
    let pace = bench.plan.pace;
    let client = bench.connect("bench-consumer").await?;
    let deliveries = client
        .subscribe(topic, "load")
        .create(SubscriptionConfig::default(), StartAt::Earliest)
        .prefetch(PREFETCH)
        .open()
        .await?;
    let mut intake = Intake {
        deliveries,
        left: backlog,
        window: WINDOW_DEEP as usize,
        taken: 0,
        waiting: VecDeque::new(),
    };
    let server = bench.server();
    // A task of the runtime, as a service's handlers are.
    let measured = tokio::spawn(async move {
        intake.run(Instant::now() + pace.warm_up, None).await?;
        let mut meter = Meter::start(server)?;
        intake
            .run(Instant::now() + pace.measured, Some(&mut meter))
            .await?;
        let sample = meter.stop(message_bytes as u64);
        intake.deliveries.close().await;
        sample
    });
    let sample = measured.await?;
    client.close().await;
    sample
}

/// A consumer and the acknowledgements that it has not had an answer to: at most `window`.
struct Intake {
    deliveries: Subscription,
    /// Messages of the backlog that have not been taken.
    left: u64,
    window: usize,
    taken: u64,
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    receipt: SettleReceipt,
    /// When it was acknowledged, if its latency is sampled.
    since: Option<Instant>,
}

impl Intake {
    /// Consumes until a time or until the backlog is gone and acknowledged.
    async fn run(&mut self, end: Instant, mut meter: Option<&mut Meter>) -> Result<()> {
        loop {
            self.fill().await?;
            let Some(Waiting { receipt, since }) = self.waiting.pop_front() else {
                return Ok(());
            };
            receipt.await?;
            if let Some(meter) = &mut meter {
                meter.count(1);
            }
            if let Some(since) = since {
                let now = Instant::now();
                if let Some(meter) = &mut meter {
                    meter.record(now - since);
                }
                if now >= end {
                    return Ok(());
                }
            }
        }
    }

    async fn fill(&mut self) -> Result<()> {
        while self.left > 0 && self.waiting.len() < self.window {
            let delivery = self.deliveries.next().await;
            let delivery = delivery.context("the subscription ended before its backlog")??;
            let since = self.taken.is_multiple_of(SAMPLE_EVERY).then(Instant::now);
            let receipt = delivery.ack_later();
            self.waiting.push_back(Waiting { receipt, since });
            self.taken += 1;
            self.left -= 1;
        }
        Ok(())
    }
}

/// Deliveries that the consumer holds.
const PREFETCH: u32 = 4_096;
/// One acknowledgement in so many has its latency taken.
const SAMPLE_EVERY: u64 = 16;
