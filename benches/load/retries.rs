//! A storm of retries: every message of a backlog is nacked with a delay, and comes again.
//!
//! A message's due time is its nack's stamp in the log plus the delay. This side knows only when it
//! sent the nack, which is before that: so what is measured is the lateness plus the nack's own way,
//! and what comes earlier than sent + delay is early whatever the stamp was.
//!
//! The consumer is as the client crate has it by default. One with a larger prefetch has more on the way, each way, and
//! so waits longer for what is due, at the same rate.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millpond_client::{Backoff, Nack, StartAt, SubscriptionConfig};

use crate::publish::{self, Pump};
use crate::sample::{Meter, Sample};
use crate::scenarios::Bench;

pub async fn storm(bench: &Bench<'_>) -> Result<Sample> {
    let count = bench.plan.size.retries;
    let publisher = bench.connect("bench-publisher").await?;
    let mut pump = Pump::open(&publisher, 1, MESSAGE_BYTES, WINDOW).await?;
    pump.publish(u64::from(count)).await?;
    pump.close().await?;
    publisher.close().await;

    let client = bench.connect("bench-consumer").await?;
    let config = SubscriptionConfig {
        backoff: Backoff::Fixed {
            wait_ms: DELAY.as_millis() as u64,
        },
        max_in_flight: count,
        ..SubscriptionConfig::default()
    };
    let mut deliveries = client
        .subscribe(publish::topic(0), "load")
        .create(config, StartAt::Earliest)
        .open()
        .await?;
    let mut nacked = vec![None; count as usize];
    let (mut first, mut again) = (0, 0);
    let (mut early, mut nacks, mut acks) = (0_u64, Vec::new(), Vec::new());
    let mut meter = Meter::start(bench.server())?;
    while again < count {
        let delivery = deliveries
            .next()
            .await
            .context("the subscription ended")??;
        let now = Instant::now();
        let place = nacked
            .get_mut(delivery.offset().0 as usize)
            .context("an offset beyond what was published")?;
        match *place {
            None => {
                *place = Some(now);
                first += 1;
                nacks.push(delivery.nack_later(Nack::new("storm").delay(DELAY)));
            }
            Some(since) => {
                let waited = now - since;
                early += u64::from(waited < DELAY);
                meter.record(waited.saturating_sub(DELAY));
                meter.count(1);
                again += 1;
                acks.push(delivery.ack_later());
            }
        }
    }
    let sample = meter.stop(MESSAGE_BYTES as u64);
    ensure!(first == count, "{first} of {count} messages came at first");
    for receipt in nacks.into_iter().chain(acks) {
        receipt.await?;
    }
    deliveries.close().await;
    client.close().await;
    Ok(sample?.with("early", early as f64))
}

const MESSAGE_BYTES: usize = 128;
const WINDOW: usize = 4_096;
const DELAY: Duration = Duration::from_secs(1);
