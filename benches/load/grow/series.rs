//! The series: what grows, through which values, and the work that is measured at each.

use anyhow::Result;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use millpond_client::{Client, StartAt, SubscriptionConfig};

use crate::floors::WINDOW_DEEP;
use crate::publish::{self, MESSAGE_BYTES_SMALL, OPENING_MAX, Pump};
use crate::sample::Sample;
use crate::scenarios::Bench;
use crate::{backlog, waiting};

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Series {
    PublishSize,
    ConsumeSize,
    Producers,
    Topics,
    Subscriptions,
    PublishBacklog,
    ConsumeBacklog,
}

impl Series {
    pub const ALL: [Self; 7] = [
        Self::PublishSize,
        Self::ConsumeSize,
        Self::Producers,
        Self::Topics,
        Self::Subscriptions,
        Self::PublishBacklog,
        Self::ConsumeBacklog,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::PublishSize => "publish_size",
            Self::ConsumeSize => "consume_size",
            Self::Producers => "producers",
            Self::Topics => "topics",
            Self::Subscriptions => "subscriptions",
            Self::PublishBacklog => "publish_backlog",
            Self::ConsumeBacklog => "consume_backlog",
        }
    }

    pub fn what(self) -> &'static str {
        match self {
            Self::PublishSize => "one producer, 4,096 unanswered or as many as 64 MiB hold",
            Self::ConsumeSize => "one consumer on a backlog, acked one by one",
            Self::Producers => "1 KiB, a topic each, 4,096 unanswered in all",
            Self::Topics => "1 KiB, a producer each, 16,000 unanswered in all",
            Self::Subscriptions => {
                "1 KiB to one topic, 4,096 unanswered; nobody consumes its subscriptions"
            }
            Self::PublishBacklog => "128 B published, 4,096 unanswered, beside another topic's",
            Self::ConsumeBacklog => "128 B consumed, acked one by one, beside another topic's",
        }
    }

    /// What grows.
    pub fn axis(self) -> &'static str {
        match self {
            Self::PublishSize | Self::ConsumeSize => "bytes a message",
            Self::Producers => "producers",
            Self::Topics => "topics",
            Self::Subscriptions => "subscriptions",
            Self::PublishBacklog | Self::ConsumeBacklog => "messages waiting",
        }
    }

    /// The values that it is measured at, in ascending order.
    pub fn values(self, quick: bool) -> &'static [u64] {
        match self {
            Self::PublishSize | Self::ConsumeSize => &SIZES,
            Self::Producers => &PRODUCERS,
            Self::Topics if quick => &TOPICS[..TOPICS.len() - 1],
            Self::Topics => &TOPICS,
            Self::Subscriptions => &SUBSCRIPTIONS,
            Self::PublishBacklog | Self::ConsumeBacklog if quick => &BACKLOGS[..BACKLOGS.len() - 1],
            Self::PublishBacklog | Self::ConsumeBacklog => &BACKLOGS,
        }
    }

    /// Measures one point against a broker that has nothing yet.
    pub async fn measure(self, bench: &Bench<'_>, value: u64) -> Result<Sample> {
        let (number, deep) = (value as usize, WINDOW_DEEP as usize);
        match self {
            Self::PublishSize => {
                publish::pipelined(bench, 1, number, publish::window_deep(number)).await
            }
            Self::ConsumeSize => backlog::consume(bench, number).await,
            Self::Producers => publish::pipelined(bench, number, MESSAGE_BYTES, deep).await,
            Self::Topics => publish::pipelined(bench, number, MESSAGE_BYTES, TOPICS_WINDOW).await,
            Self::Subscriptions => publish_subscribed(bench, number).await,
            Self::PublishBacklog => {
                fill(bench, value).await?;
                waiting::rate(bench, BESIDE, MESSAGE_BYTES_SMALL).await
            }
            Self::ConsumeBacklog => {
                fill(bench, value).await?;
                let published = waiting::rate(bench, BESIDE, MESSAGE_BYTES_SMALL).await?;
                backlog::take(bench, BESIDE, published.operations, MESSAGE_BYTES_SMALL).await
            }
        }
    }
}

/// Publishes to a topic that has so many subscriptions, none with a consumer.
async fn publish_subscribed(bench: &Bench<'_>, subscriptions: usize) -> Result<Sample> {
    let client = bench.connect("bench-publisher").await?;
    let pump = Pump::open(&client, 1, MESSAGE_BYTES, WINDOW_DEEP as usize).await?;
    subscribe(&client, subscriptions).await?;
    let sample = publish::warm_then_measure(bench, pump, MESSAGE_BYTES).await;
    client.close().await;
    sample
}

/// Lets so many messages wait in a subscription of a topic of their own. What the broker still writes of
/// them afterwards is no part of what is measured beside them.
async fn fill(bench: &Bench<'_>, messages: u64) -> Result<()> {
    if messages == 0 {
        return Ok(());
    }
    let client = bench.connect("bench-backlog").await?;
    let mut pump = Pump::open(&client, 1, MESSAGE_BYTES_SMALL, WINDOW_DEEP as usize).await?;
    subscribe(&client, 1).await?;
    pump.publish(messages).await?;
    pump.close().await?;
    client.close().await;
    bench.broker.settle().await
}

/// Makes subscriptions of a pump's first topic.
async fn subscribe(client: &Client, subscriptions: usize) -> Result<()> {
    let topic = &publish::topic(0);
    stream::iter(0..subscriptions)
        .map(|nth| async move {
            let (name, config) = (format!("waiting-{nth}"), SubscriptionConfig::default());
            client
                .create_subscription(topic, &name, config, StartAt::Earliest)
                .await?;
            anyhow::Ok(())
        })
        .buffer_unordered(OPENING_MAX)
        .try_collect()
        .await
}

const SIZES: [u64; 6] = [64, 256, 1_024, 4_096, 16_384, 65_536];
const PRODUCERS: [u64; 5] = [1, 4, 16, 64, 256];
/// A quick run leaves out the last, here and of the backlogs.
const TOPICS: [u64; 5] = [1, 10, 100, 1_000, 10_000];
const SUBSCRIPTIONS: [u64; 5] = [0, 1, 10, 100, 1_000];
const BACKLOGS: [u64; 5] = [0, 10_000, 100_000, 1_000_000, 10_000_000];
/// The payload where it is not what grows.
const MESSAGE_BYTES: usize = 1_024;
/// The same for one topic and for many, so that only their number differs.
const TOPICS_WINDOW: usize = 16_000;
/// The topic that is measured beside a backlog.
const BESIDE: &str = "beside";
