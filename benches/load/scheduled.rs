//! Messages that wait for their time, over a day: what each costs in memory, and what they cost the
//! publishes beside them.

use anyhow::Result;

use crate::floors::WINDOW_DEEP;
use crate::proc_stat::anon_bytes;
use crate::publish::{MESSAGE_BYTES_SMALL, Pump, message};
use crate::sample::Sample;
use crate::scenarios::Bench;
use crate::waiting::rate;

pub async fn beside(bench: &Bench<'_>) -> Result<Sample> {
    let count = bench.plan.size.scheduled;
    let client = bench.connect("bench-publisher").await?;
    let without = rate(bench, "without", MESSAGE_BYTES_SMALL).await?;
    let before = anon_bytes(bench.broker.pid)?;
    let waiting = message(MESSAGE_BYTES_SMALL);
    let mut pump = Pump::open(&client, 1, MESSAGE_BYTES_SMALL, WINDOW_DEEP as usize)
        .await?
        .making(move |nth| {
            let mut message = waiting.clone();
            message.delay_ms = SOONEST_MS + nth * SPREAD % DAY_MS;
            message
        });
    pump.publish(count).await?;
    let after = anon_bytes(bench.broker.pid)?;
    let with = rate(bench, "with", MESSAGE_BYTES_SMALL).await?;
    let ratio = with.per_second() / without.per_second();
    pump.close().await?;
    client.close().await;
    let each = after.saturating_sub(before) as f64 / count as f64;
    Ok(with
        .with("bytes_each", each)
        .with("publish_ratio", ratio)
        .with("scheduled", count as f64))
}

const DAY_MS: u64 = 86_400_000;
/// None of them comes while this is measured.
const SOONEST_MS: u64 = 3_600_000;
/// Coprime to a day: neighbours in the log are far apart in time.
const SPREAD: u64 = 7_919_077;
