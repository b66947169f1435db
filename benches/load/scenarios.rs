//! The scenarios: what users do, each against a fresh broker.

use anyhow::{Context, Result};
use millpond_client::Client;
use tokio::time::timeout;

use crate::args::{Plan, Role};
use crate::child::Child;
use crate::floors::{MTU_LARGE, WINDOW, WINDOW_DEEP};
use crate::sample::Sample;
use crate::{
    backlog, crowd, idle, open_loop, publish, replay, restart, retries, scheduled, spread, waiting,
};

#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scenario {
    Publish1k,
    Publish1kDeep,
    Publish1k8,
    Topics1000,
    ConsumeAck1k,
    Publish128,
    Publish128Deep,
    ConsumeAck128,
    BulkIn,
    BulkOut,
    BulkOut6400,
    AckAlone,
    EndToEnd,
    RetryStorm,
    Scheduled,
    Backlog,
    Restart,
    Connections,
    Idle,
}

impl Scenario {
    /// In the order of a round: what is compared stands side by side.
    pub const ALL: [Self; 19] = [
        Self::Publish1k,
        Self::Publish1kDeep,
        Self::Publish1k8,
        Self::Topics1000,
        Self::ConsumeAck1k,
        Self::Publish128,
        Self::Publish128Deep,
        Self::ConsumeAck128,
        Self::BulkIn,
        Self::BulkOut,
        Self::BulkOut6400,
        Self::AckAlone,
        Self::EndToEnd,
        Self::RetryStorm,
        Self::Scheduled,
        Self::Backlog,
        Self::Restart,
        Self::Connections,
        Self::Idle,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Publish1k => "publish_1k",
            Self::Publish1kDeep => "publish_1k_deep",
            Self::Publish1k8 => "publish_1k_8",
            Self::Topics1000 => "topics_1000",
            Self::ConsumeAck1k => "consume_ack_1k",
            Self::Publish128 => "publish_128",
            Self::Publish128Deep => "publish_128_deep",
            Self::ConsumeAck128 => "consume_ack_128",
            Self::BulkIn => "bulk_in",
            Self::BulkOut => "bulk_out",
            Self::BulkOut6400 => "bulk_out_6400",
            Self::AckAlone => "ack_alone",
            Self::EndToEnd => "end_to_end",
            Self::RetryStorm => "retry_storm",
            Self::Scheduled => "scheduled",
            Self::Backlog => "backlog",
            Self::Restart => "restart",
            Self::Connections => "connections",
            Self::Idle => "idle",
        }
    }

    pub fn what(self) -> &'static str {
        match self {
            Self::Publish1k => "1 KiB, one producer, 256 unanswered; latency: enqueue to durable",
            Self::Publish1kDeep => "as publish_1k, 4,096 unanswered",
            Self::Publish1k8 => "as publish_1k, 8 producers with 256 each",
            Self::Topics1000 => {
                "1 KiB, 1,000 producers, 16 unanswered each, a topic each; in turn: one topic"
            }
            Self::ConsumeAck1k => "1 KiB from a backlog, acked one by one; latency: ack to durable",
            Self::Publish128 => "as publish_1k with 128 B",
            Self::Publish128Deep => "as publish_1k_deep with 128 B",
            Self::ConsumeAck128 => "as consume_ack_1k with 128 B",
            Self::BulkIn => "1,000 x 1 KiB at a time, 16 such batches unanswered",
            Self::BulkOut => "1 KiB replayed from the start in stream mode",
            Self::BulkOut6400 => "as bulk_out at MTU 6400",
            Self::AckAlone => "1 KiB, one in flight; latency: send to durable",
            Self::EndToEnd => "1 KiB at 2,000 a second; latency: publish to delivered",
            Self::RetryStorm => "all nacked with 1 s delay; latency: later than that",
            Self::Scheduled => "messages delayed over a day: memory of each, publishes beside them",
            Self::Backlog => "128 B publishes and acked consumption on a deep backlog",
            Self::Restart => "killed under load; from start to a new client's first delivery",
            Self::Connections => "idle consumers, a connection each: memory, publishes beside them",
            Self::Idle => "CPU of an idle broker with 1,000 subscriptions",
        }
    }

    /// Measures it against a broker with an empty folder, which goes afterwards.
    pub async fn measure(self, plan: &Plan) -> Result<Sample> {
        let mtu = match self {
            Self::BulkOut6400 => MTU_LARGE,
            _ => plan.mtu,
        };
        with_fresh_broker(plan, mtu, async |bench| self.run(bench).await).await
    }

    async fn run(self, bench: &mut Bench<'_>) -> Result<Sample> {
        let (window, deep) = (WINDOW as usize, WINDOW_DEEP as usize);
        match self {
            Self::Publish1k => publish::pipelined(bench, 1, 1_024, window).await,
            Self::Publish1kDeep => publish::pipelined(bench, 1, 1_024, deep).await,
            Self::Publish1k8 => publish::pipelined(bench, 8, 1_024, 8 * window).await,
            Self::Topics1000 => spread::beside_one(bench, TOPICS_MANY, 1_024, TOPICS_WINDOW).await,
            Self::ConsumeAck1k => backlog::consume(bench, 1_024).await,
            Self::Publish128 => publish::pipelined(bench, 1, 128, window).await,
            Self::Publish128Deep => publish::pipelined(bench, 1, 128, deep).await,
            Self::ConsumeAck128 => backlog::consume(bench, 128).await,
            Self::BulkIn => publish::pipelined(bench, 1, 1_024, BULK_WINDOW).await,
            Self::BulkOut | Self::BulkOut6400 => replay::from_the_start(bench).await,
            Self::AckAlone => publish::alone(bench, 1_024).await,
            Self::EndToEnd => open_loop::end_to_end(bench, 1_024).await,
            Self::RetryStorm => retries::storm(bench).await,
            Self::Scheduled => scheduled::beside(bench).await,
            Self::Backlog => waiting::deep(bench).await,
            Self::Restart => restart::under_load(bench).await,
            Self::Connections => crowd::idle_consumers(bench).await,
            Self::Idle => idle::subscriptions(bench).await,
        }
    }
}

/// Measures something against a broker with an empty folder, which goes afterwards.
pub async fn with_fresh_broker(
    plan: &Plan,
    mtu: u16,
    run: impl AsyncFnOnce(&mut Bench<'_>) -> Result<Sample>,
) -> Result<Sample> {
    let folder = tempfile::Builder::new()
        .prefix("broker-")
        .tempdir_in(plan.dir())
        .context("no folder can be made for the broker")?;
    let broker = Child::start(Role::Broker, folder.path(), mtu).await?;
    broker.settle().await?;
    let mut bench = Bench { plan, mtu, broker };
    let limit = plan.pace.total() * 3 + plan.size.slack;
    let measured = timeout(limit, run(&mut bench)).await;
    let stopped = bench.broker.stop().await;
    let sample = measured.with_context(|| format!("it did not end within {limit:?}"))??;
    stopped.context("the broker did not stop as it should")?;
    Ok(sample)
}

/// What a scenario works with.
pub struct Bench<'a> {
    pub plan: &'a Plan,
    mtu: u16,
    pub broker: Child,
}

impl Bench<'_> {
    /// A new connection to the broker.
    pub async fn connect(&self, name: &str) -> Result<Client> {
        let greeting = &self.broker.greeting;
        let client = Client::builder()
            .ca_file(&greeting.ca)
            .name(name)
            .max_mtu(self.mtu)
            .connect(&greeting.address.to_string())
            .await?;
        Ok(client)
    }

    /// The broker's process.
    pub fn server(&self) -> Option<u32> {
        Some(self.broker.pid)
    }
}

/// Topics of the scenario with many.
pub const TOPICS_MANY: usize = 1_000;
/// Unanswered messages over all of them: each pipelines, and one producer may have as many.
const TOPICS_WINDOW: usize = 16 * TOPICS_MANY;
/// Sixteen batches of a thousand.
const BULK_WINDOW: usize = 16 * 1_000;
