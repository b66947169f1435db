//! The scenarios: what users do, each against a fresh broker.

use std::time::Duration;

use anyhow::{Context, Result};
use millpond_client::Client;
use tokio::time::timeout;

use crate::args::{Plan, Role};
use crate::child::Child;
use crate::sample::Sample;
use crate::{backlog, open_loop, publish};

#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scenario {
    Publish1k,
    Topics1000,
    ConsumeAck1k,
    Publish128,
    ConsumeAck128,
    AckAlone,
    EndToEnd,
}

impl Scenario {
    /// In the order of a round: what is compared stands side by side.
    pub const ALL: [Self; 7] = [
        Self::Publish1k,
        Self::Topics1000,
        Self::ConsumeAck1k,
        Self::Publish128,
        Self::ConsumeAck128,
        Self::AckAlone,
        Self::EndToEnd,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Publish1k => "publish_1k",
            Self::Topics1000 => "topics_1000",
            Self::ConsumeAck1k => "consume_ack_1k",
            Self::Publish128 => "publish_128",
            Self::ConsumeAck128 => "consume_ack_128",
            Self::AckAlone => "ack_alone",
            Self::EndToEnd => "end_to_end",
        }
    }

    pub fn what(self) -> &'static str {
        match self {
            Self::Publish1k => "1 KiB, one pipelining producer; latency: enqueue to durable",
            Self::Topics1000 => "1 KiB, 1,000 pipelining producers of one connection, a topic each",
            Self::ConsumeAck1k => "1 KiB from a backlog, acked one by one; latency: ack to durable",
            Self::Publish128 => "as publish_1k with 128 B",
            Self::ConsumeAck128 => "as consume_ack_1k with 128 B",
            Self::AckAlone => "1 KiB, one in flight; latency: send to durable",
            Self::EndToEnd => "1 KiB at 2,000 a second; latency: publish to delivered",
        }
    }

    /// Measures it against a broker with an empty folder, which goes afterwards.
    pub async fn measure(self, plan: &Plan) -> Result<Sample> {
        let folder = tempfile::Builder::new()
            .prefix("broker-")
            .tempdir_in(plan.dir())
            .context("no folder can be made for the broker")?;
        let broker = Child::start(Role::Broker, folder.path(), plan.mtu).await?;
        broker.settle().await?;
        let limit = plan.pace.total() * 3 + SLACK;
        let measured = timeout(limit, self.run(plan, &broker)).await;
        let stopped = broker.stop().await;
        let sample = measured.with_context(|| format!("it did not end within {limit:?}"))??;
        stopped.context("the broker did not stop as it should")?;
        Ok(sample)
    }

    async fn run(self, plan: &Plan, broker: &Child) -> Result<Sample> {
        let bench = Bench { plan, broker };
        match self {
            Self::Publish1k => publish::pipelined(&bench, 1, 1_024).await,
            Self::Topics1000 => publish::pipelined(&bench, TOPICS_MANY, 1_024).await,
            Self::ConsumeAck1k => backlog::consume(&bench, 1_024).await,
            Self::Publish128 => publish::pipelined(&bench, 1, 128).await,
            Self::ConsumeAck128 => backlog::consume(&bench, 128).await,
            Self::AckAlone => publish::alone(&bench, 1_024).await,
            Self::EndToEnd => open_loop::end_to_end(&bench, 1_024).await,
        }
    }
}

/// What a scenario works with.
pub struct Bench<'a> {
    pub plan: &'a Plan,
    broker: &'a Child,
}

impl Bench<'_> {
    /// A new connection to the broker.
    pub async fn connect(&self, name: &str) -> Result<Client> {
        let greeting = &self.broker.greeting;
        let client = Client::builder()
            .ca_file(&greeting.ca)
            .name(name)
            .max_mtu(self.plan.mtu)
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
/// Beyond three times its pace a scenario is stuck, and not slow.
const SLACK: Duration = Duration::from_secs(30);
