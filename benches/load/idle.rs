//! A broker that has nothing to do but to keep a thousand subscriptions with a consumer each.

use anyhow::Result;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use millpond_client::{Client, StartAt, Subscription, SubscriptionConfig};

use crate::publish::open;
use crate::sample::{Meter, Sample};
use crate::scenarios::Bench;

pub async fn subscriptions(bench: &Bench<'_>) -> Result<Sample> {
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS {
        clients.push(bench.connect("bench-idle").await?);
    }
    let idle: Vec<Subscription> = stream::iter(0..SUBSCRIPTIONS)
        .map(|nth| idle_subscription(&clients[nth % CONNECTIONS], nth))
        .buffered(OPENING_MAX)
        .try_collect()
        .await?;
    bench.broker.settle().await?;
    let mut meter = Meter::start(bench.server())?;
    tokio::time::sleep(bench.plan.pace.total() * 3).await;
    meter.count(1);
    let sample = meter.stop(0)?;
    for subscription in idle {
        subscription.close().await;
    }
    for client in clients {
        client.close().await;
    }
    let cpu = sample.server_cpu_s.unwrap_or_default();
    let percent = 100.0 * cpu / sample.seconds;
    Ok(sample.with("core_percent", percent))
}

async fn idle_subscription(client: &Client, nth: usize) -> Result<Subscription> {
    let topic = format!("idle-{nth}");
    open(client, &topic).await?.close().await;
    let config = SubscriptionConfig::default();
    let subscribing = client.subscribe(topic, "idle");
    Ok(subscribing.create(config, StartAt::Earliest).open().await?)
}

const CONNECTIONS: usize = 10;
const SUBSCRIPTIONS: usize = 1_000;
const OPENING_MAX: usize = 64;
