//! Many connections, each with a consumer that has nothing to do, and as many to a server that is nothing
//! but quinn.

use anyhow::{Context, Result};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use millpond_client::{Client, StartAt, Subscription, SubscriptionConfig};

use crate::args::{Plan, Role};
use crate::child::Child;
use crate::floors::synced_rate;
use crate::proc_stat::anon_bytes;
use crate::publish::{MESSAGE_BYTES_SMALL, open};
use crate::raw_quic::{Idle, Raw};
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
    let raw = RawCrowd::measure(bench.plan).await?;
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
        .with("quinn_kib_each", raw.bytes_each / 1_024.0)
        .with("publish_ratio", ratio)
        .with("quinn_publish_ratio", raw.rate_ratio)
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

/// What as many connections cost a server that is nothing but quinn and a file.
struct RawCrowd {
    /// Of memory, with as many streams.
    bytes_each: f64,
    /// The rate of messages over another connection, of that without them.
    rate_ratio: f64,
}

impl RawCrowd {
    async fn measure(plan: &Plan) -> Result<Self> {
        let count = plan.size.connections;
        let sink = Child::start(Role::QuinnSink, plan.dir(), plan.mtu).await?;
        let ca = std::fs::read(&sink.greeting.ca)?;
        let connect = || Raw::connect(sink.greeting.address, &ca, plan.mtu);
        let beside = connect().await?;
        let without = synced_rate(&beside, sink.pid, plan).await?;
        let before = anon_bytes(sink.pid)?;
        let crowd: Vec<(Raw, Vec<Idle>)> = stream::iter(0..count)
            .map(|_| async {
                let raw = connect().await?;
                let streams = raw.idle(STREAMS).await?;
                anyhow::Ok((raw, streams))
            })
            .buffer_unordered(CONNECTING_MAX)
            .try_collect()
            .await?;
        let after = anon_bytes(sink.pid)?;
        let with = synced_rate(&beside, sink.pid, plan).await?;
        let mut leaving = stream::iter(crowd)
            .map(|(raw, _)| raw.close())
            .buffer_unordered(CONNECTING_MAX);
        while leaving.next().await.is_some() {}
        beside.close().await;
        sink.stop().await?;
        Ok(Self {
            bytes_each: after.saturating_sub(before) as f64 / count as f64,
            rate_ratio: with / without,
        })
    }
}

const TOPIC: &str = "crowd";
/// For control, deliveries and settlements.
const STREAMS: usize = 3;
const CONNECTING_MAX: usize = 32;
