//! Replay: a topic is read from its start in stream mode, committed as it goes.

use std::time::Instant;

use anyhow::{Context, Result};
use millpond_client::{Client, Offset, StartAt, SubscriptionConfig};

use crate::args::Pace;
use crate::floors::WINDOW_DEEP;
use crate::publish::{self, Pump};
use crate::sample::{Meter, Sample};
use crate::scenarios::Bench;

/// Counts messages as they come; the last commit is awaited.
pub async fn from_the_start(bench: &Bench<'_>) -> Result<Sample> {
    let pace = bench.plan.pace;
    let publisher = bench.connect("bench-publisher").await?;
    let mut pump = Pump::open(&publisher, 1, MESSAGE_BYTES, WINDOW_DEEP as usize).await?;
    let messages_max = pace.bytes_max / MESSAGE_BYTES as u64;
    let published = pump
        .run(Instant::now() + pace.total() * 2, messages_max, None)
        .await?;
    let total = published + pump.drain().await?;
    pump.close().await?;
    publisher.close().await;

    let client = bench.connect("bench-reader").await?;
    // A task of the runtime, as a service's readers are.
    tokio::spawn(read(client, total, pace, bench.server())).await?
}

async fn read(client: Client, total: u64, pace: Pace, server: Option<u32>) -> Result<Sample> {
    let mut messages = client
        .subscribe(publish::topic(0), "replay")
        .create(SubscriptionConfig::default(), StartAt::Earliest)
        .prefetch(PREFETCH)
        .open_stream()
        .await?;
    let warm_until = Instant::now() + pace.warm_up;
    let (mut end, mut meter) = (None, None);
    let mut next = Offset(0);
    for nth in 0..total {
        let message = messages.next().await.context("the replay ended early")??;
        next = Offset(message.offset().0 + 1);
        if let Some(meter) = &mut meter {
            Meter::count(meter, 1);
        }
        if nth % COMMIT_EVERY == 0 {
            // Commits are cumulative: only the last one's answer matters.
            drop(messages.commit_later(next));
            let now = Instant::now();
            if meter.is_none() && now >= warm_until {
                meter = Some(Meter::start(server)?);
                end = Some(now + pace.measured);
            }
            if end.is_some_and(|end| now >= end) {
                break;
            }
        }
    }
    let sample = meter
        .context("nothing was left to measure after the warm-up")?
        .stop(MESSAGE_BYTES as u64);
    messages.commit(next).await?;
    messages.close().await;
    client.close().await;
    sample
}

const MESSAGE_BYTES: usize = 1_024;
const PREFETCH: u32 = 16_384;
const COMMIT_EVERY: u64 = 4_096;
