//! Many connections, each with a consumer that has nothing to do.

use anyhow::{Context, Result};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use millpond_client::{Client, StartAt, Subscription, SubscriptionConfig};

use crate::proc_stat::anon_bytes;
use crate::publish::{MESSAGE_BYTES_SMALL, open};
use crate::sample::Sample;
use crate::scenarios::Bench;
use crate::waiting::rate;

pub async fn idle_consumers(bench: &Bench<'_>) -> Result<Sample> {
    let count = bench.plan.size.connections;
    let without = rate(bench, "without", MESSAGE_BYTES_SMALL).await?;
    let admin = bench.connect("bench-admin").await?;
    open(&admin, TOPIC).await?.close().await;
    admin
        .create_subscription(
            TOPIC,
            "idle",
            SubscriptionConfig::default(),
            StartAt::Latest,
        )
        .await?;
    let before = anon_bytes(bench.broker.pid)?;
    let crowd: Vec<(Client, Subscription)> = stream::iter(0..count)
        .map(|nth| idle_consumer(bench, nth))
        .buffer_unordered(CONNECTING_MAX)
        .try_collect()
        .await?;
    let after = anon_bytes(bench.broker.pid)?;
    let with = rate(bench, "with", MESSAGE_BYTES_SMALL).await?;
    let each = after.saturating_sub(before) as f64 / count as f64;
    let ratio = with.per_second() / without.per_second();
    let mut leaving = stream::iter(crowd)
        .map(|(client, subscription)| async move {
            subscription.close().await;
            client.close().await;
        })
        .buffer_unordered(CONNECTING_MAX);
    while leaving.next().await.is_some() {}
    admin.close().await;
    Ok(with
        .with("kib_each", each / 1_024.0)
        .with("publish_ratio", ratio)
        .with("connections", count as f64))
}

async fn idle_consumer(bench: &Bench<'_>, nth: usize) -> Result<(Client, Subscription)> {
    let client = bench
        .connect("bench-idle")
        .await
        .with_context(|| format!("connection {nth}"))?;
    let subscription = client
        .subscribe(TOPIC, "idle")
        .open()
        .await
        .with_context(|| format!("consumer {nth}"))?;
    Ok((client, subscription))
}

const TOPIC: &str = "crowd";
const CONNECTING_MAX: usize = 32;
