//! Publish to delivered at a fixed rate, whatever the answers do.
//!
//! The pace is kept by a thread of its own, which never waits for the broker: a slow answer delays no
//! later message, so that it is not hidden (coordinated omission).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millpond_client::{Message, Producer, StartAt, Subscription, SubscriptionConfig};
use tokio::task::spawn_blocking;

use crate::args::Pace;
use crate::publish;
use crate::sample::{Meter, Sample};
use crate::scenarios::Bench;

/// Two connections, one to publish and one to consume; both clocks are this process's.
pub async fn end_to_end(bench: &Bench<'_>, message_bytes: usize) -> Result<Sample> {
    let pace = bench.plan.pace;
    let publisher = bench.connect("bench-publisher").await?;
    let producer = publish::open(&publisher, TOPIC).await?;
    let consumer = bench.connect("bench-consumer").await?;
    let deliveries = consumer
        .subscribe(TOPIC, "load")
        .create(SubscriptionConfig::default(), StartAt::Earliest)
        .open()
        .await?;

    let origin = Instant::now();
    let all = messages_in(pace.total());
    let pacer = spawn_blocking(move || publish_paced(&producer, origin, all, message_bytes));
    // A task of the runtime, as a service's consumers are.
    let server = bench.server();
    let consuming = tokio::spawn(consume(deliveries, origin, pace, server, message_bytes));
    let sample = consuming.await?;
    pacer.await??;
    consumer.close().await;
    publisher.close().await;
    sample
}

/// Takes and acks what comes, and records how long each was on its way.
async fn consume(
    mut deliveries: Subscription,
    origin: Instant,
    pace: Pace,
    server: Option<u32>,
    message_bytes: usize,
) -> Result<Sample> {
    let (warm, all) = (messages_in(pace.warm_up), messages_in(pace.total()));
    let mut acks = VecDeque::new();
    let mut meter = None;
    for nth in 0..all {
        let delivery = deliveries
            .next()
            .await
            .context("the subscription ended")??;
        let delivered = origin.elapsed();
        if nth == warm {
            meter = Some(Meter::start(server)?);
        }
        if let Some(meter) = &mut meter {
            meter.record(delivered.saturating_sub(stamp(delivery.payload())?));
            meter.count(1);
        }
        acks.push_back(delivery.ack_later());
    }
    let sample = meter
        .context("nothing was measured")?
        .stop(message_bytes as u64);
    for ack in acks {
        ack.await?;
    }
    deliveries.close().await;
    sample
}

/// Publishes message after message when each is due; its payload begins with when it was.
fn publish_paced(producer: &Producer, origin: Instant, count: u64, bytes: usize) -> Result<()> {
    ensure!(bytes >= STAMP_BYTES, "a message must hold its stamp");
    let mut receipts = VecDeque::new();
    at_each(origin, count, || {
        let mut payload = vec![0x5a; bytes];
        let now = u64::try_from(origin.elapsed().as_nanos())?;
        payload[..STAMP_BYTES].copy_from_slice(&now.to_le_bytes());
        receipts.push_back(producer.try_send(Message::new(payload))?);
        Ok(())
    })
}

/// Does something so many times, at the pace of this scenario. Blocks.
pub fn at_each(origin: Instant, count: u64, mut act: impl FnMut() -> Result<()>) -> Result<()> {
    for nth in 0..count {
        let due = INTERVAL * u32::try_from(nth)?;
        std::thread::sleep(due.saturating_sub(origin.elapsed()));
        act()?;
    }
    Ok(())
}

/// When a message was published, from the origin.
fn stamp(payload: &[u8]) -> Result<Duration> {
    let bytes = payload.first_chunk().context("a message has no stamp")?;
    Ok(Duration::from_nanos(u64::from_le_bytes(*bytes)))
}

/// How many messages are due in this time.
pub fn messages_in(time: Duration) -> u64 {
    time.as_micros() as u64 / INTERVAL.as_micros() as u64
}

const TOPIC: &str = "load-paced";
const STAMP_BYTES: usize = size_of::<u64>();
/// 2,000 messages a second.
const INTERVAL: Duration = Duration::from_micros(500);
