//! A restart: the broker is killed under load, its caches are dropped, and a new client waits for its
//! first delivery from the new process.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millpond_client::{Nack, StartAt, SubscriptionConfig, SubscriptionMode};
use tokio::task::JoinHandle;

use crate::floors::WINDOW_DEEP;
use crate::publish::{self, MESSAGE_BYTES_SMALL, Pump};
use crate::sample::{Meter, Sample};
use crate::scenarios::Bench;

pub async fn under_load(bench: &mut Bench<'_>) -> Result<Sample> {
    let size = bench.plan.size;
    let client = bench.connect("bench-publisher").await?;
    let topics = topics_for(size.retrying);
    let mut pump = Pump::open(&client, topics, MESSAGE_BYTES_SMALL, WINDOW_DEEP as usize).await?;
    pump.publish(size.stored).await?;
    pump.close().await?;
    let each = size.retrying / topics as u64;
    for nth in 0..topics {
        schedule_retries(bench, &publish::topic(nth), each).await?;
    }
    let load = load(bench).await?;
    tokio::time::sleep(LOAD).await;
    let mut cold = false;
    let dropped = || cold = drop_caches();
    let began = bench.broker.kill_and_restart(dropped).await?;
    load.abort();
    client.close().await;

    let mut meter = Meter::start(bench.server())?;
    let client = bench.connect("bench-newcomer").await?;
    let mut deliveries = client.subscribe(publish::topic(0), "load").open().await?;
    let delivery = deliveries
        .next()
        .await
        .context("the subscription ended")??;
    let took = began.elapsed();
    meter.record(took);
    meter.count(1);
    delivery.ack().await?;
    deliveries.close().await;
    for nth in 0..topics {
        let left = client.subscription(&publish::topic(nth), "load").await?;
        let scheduled = left.scheduled;
        ensure!(
            scheduled >= each,
            "{scheduled} of {each} retries are left of topic {nth}"
        );
    }
    client.close().await;
    Ok(meter
        .stop(MESSAGE_BYTES_SMALL as u64)?
        .with("ms", took.as_secs_f64() * 1e3)
        .with("cold", f64::from(u8::from(cold)))
        .with("stored", size.stored as f64)
        .with("retrying", size.retrying as f64))
}

/// A subscription whose retries take 64 MiB gets no first deliveries, so many of them need several.
fn topics_for(retrying: u64) -> usize {
    retrying.div_ceil(RETRIES_EACH).max(1) as usize
}

/// Lets the first messages of a topic's backlog wait for a retry in an hour.
async fn schedule_retries(bench: &Bench<'_>, topic: &str, count: u64) -> Result<()> {
    let client = bench.connect("bench-consumer").await?;
    let config = SubscriptionConfig {
        mode: SubscriptionMode::Queue,
        ..SubscriptionConfig::default()
    };
    let mut deliveries = client
        .subscribe(topic, "load")
        .create(config, StartAt::Earliest)
        .prefetch(PREFETCH)
        .open()
        .await?;
    let mut nacks = std::collections::VecDeque::new();
    for _ in 0..count {
        let delivery = deliveries
            .next()
            .await
            .context("the subscription ended")??;
        nacks.push_back(delivery.nack_later(Nack::new("later").delay(HOUR)));
        if nacks.len() >= WINDOW_DEEP as usize
            && let Some(oldest) = nacks.pop_front()
        {
            oldest.await?;
        }
    }
    for nack in nacks {
        nack.await?;
    }
    deliveries.close().await;
    client.close().await;
    Ok(())
}

/// Publishes for as long as there is a broker.
async fn load(bench: &Bench<'_>) -> Result<JoinHandle<()>> {
    let client = bench.connect("bench-load").await?;
    let producer = publish::open(&client, "load-beside").await?;
    let mut pump = Pump::over(vec![producer], publish::message(MESSAGE_BYTES_SMALL), 256);
    Ok(tokio::spawn(async move {
        // Its end is the broker's.
        let _ = pump.run(Instant::now() + HOUR, u64::MAX, None).await;
        client.close().await;
    }))
}

/// Only root may; the figure says which it was.
fn drop_caches() -> bool {
    std::fs::write("/proc/sys/vm/drop_caches", "1").is_ok()
}

const PREFETCH: u32 = 4_096;
/// About 56 MB of retry state.
const RETRIES_EACH: u64 = 200_000;
const HOUR: Duration = Duration::from_secs(3_600);
const LOAD: Duration = Duration::from_millis(500);
