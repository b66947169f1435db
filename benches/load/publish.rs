//! Publishing: a window of unacknowledged messages over some producers, or one message at a time.

use std::collections::VecDeque;
use std::time::Instant;

use anyhow::Result;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use millpond_client::{Client, Message, Producer, Receipt, TopicConfig};

use crate::floors::WINDOW_DEEP;
use crate::sample::{Meter, Sample};
use crate::scenarios::Bench;

/// Keeps a window of messages on their way to `topics` topics, turn by turn.
pub async fn pipelined(
    bench: &Bench<'_>,
    topics: usize,
    message_bytes: usize,
    window: usize,
) -> Result<Sample> {
    let client = bench.connect("bench-publisher").await?;
    let pump = Pump::open(&client, topics, message_bytes, window).await?;
    let sample = warm_then_measure(bench, pump, message_bytes).await;
    client.close().await;
    sample
}

/// Lets a pump run until it is warm, then measures it.
pub async fn warm_then_measure(
    bench: &Bench<'_>,
    mut pump: Pump,
    message_bytes: usize,
) -> Result<Sample> {
    let pace = bench.plan.pace;
    let messages_max = pace.bytes_max / message_bytes as u64;
    pump.run(Instant::now() + pace.warm_up, messages_max, None)
        .await?;
    let mut meter = Meter::start(bench.server())?;
    let end = Instant::now() + pace.measured;
    pump.run(end, messages_max, Some(&mut meter)).await?;
    let sample = meter.stop(message_bytes as u64);
    pump.close().await?;
    sample
}

/// Sends a message, waits until it is durable, sends the next.
pub async fn alone(bench: &Bench<'_>, message_bytes: usize) -> Result<Sample> {
    let client = bench.connect("bench-publisher").await?;
    let pace = bench.plan.pace;
    let producer = open(&client, "alone").await?;
    let message = message(message_bytes);
    let warm = Instant::now() + pace.warm_up;
    while Instant::now() < warm {
        producer.send(message.clone()).await?;
    }
    let mut meter = Meter::start(bench.server())?;
    let end = Instant::now() + pace.measured;
    while Instant::now() < end {
        let began = Instant::now();
        producer.send(message.clone()).await?;
        meter.record(began.elapsed());
        meter.count(1);
    }
    let sample = meter.stop(message_bytes as u64);
    producer.close().await;
    client.close().await;
    sample
}

/// Some producers and what they have not had an answer to: at most `window` messages.
pub struct Pump {
    producers: Vec<Producer>,
    make: MakeMessage,
    window: usize,
    sent: u64,
    waiting: VecDeque<Waiting>,
}

/// The message with this number.
type MakeMessage = Box<dyn Fn(u64) -> Message + Send>;

struct Waiting {
    receipt: Receipt,
    /// When it was enqueued, if its latency is sampled.
    since: Option<Instant>,
}

impl Pump {
    /// Makes the topics `load-0`, `load-1`, … with a producer for each.
    pub async fn open(
        client: &Client,
        topics: usize,
        message_bytes: usize,
        window: usize,
    ) -> Result<Self> {
        let producers = stream::iter(0..topics)
            .map(|nth| async move { open(client, &topic(nth)).await })
            .buffered(OPENING_MAX)
            .try_collect()
            .await?;
        Ok(Self::over(producers, message(message_bytes), window))
    }

    /// Publishes copies of one message over these producers.
    pub fn over(producers: Vec<Producer>, message: Message, window: usize) -> Self {
        Self {
            producers,
            make: Box::new(move |_| message.clone()),
            window,
            sent: 0,
            waiting: VecDeque::with_capacity(window),
        }
    }

    /// The same with other messages.
    pub fn making(mut self, make: impl Fn(u64) -> Message + Send + 'static) -> Self {
        self.make = Box::new(make);
        self
    }

    /// Publishes so many and waits for all of them.
    pub async fn publish(&mut self, messages: u64) -> Result<()> {
        for _ in 0..messages {
            if self.waiting.len() == self.window
                && let Some(Waiting { receipt, .. }) = self.waiting.pop_front()
            {
                receipt.await?;
            }
            self.push().await?;
        }
        self.drain().await?;
        Ok(())
    }

    /// Publishes until a time or a number of acknowledgements; how many came. Each is awaited, and
    /// counted by the meter, whose measurement ends with the last of them.
    pub async fn run(
        &mut self,
        end: Instant,
        messages_max: u64,
        mut meter: Option<&mut Meter>,
    ) -> Result<u64> {
        let mut acked = 0;
        while acked < messages_max {
            self.fill().await?;
            let Some(Waiting { receipt, since }) = self.waiting.pop_front() else {
                break;
            };
            receipt.await?;
            acked += 1;
            if let Some(meter) = &mut meter {
                meter.count(1);
            }
            if let Some(since) = since {
                let now = Instant::now();
                if let Some(meter) = &mut meter {
                    meter.record(now - since);
                }
                if now >= end {
                    break;
                }
            }
        }
        Ok(acked)
    }

    /// Waits for what is still on its way; how many they were.
    pub async fn drain(&mut self) -> Result<u64> {
        let mut acked = 0;
        while let Some(Waiting { receipt, .. }) = self.waiting.pop_front() {
            receipt.await?;
            acked += 1;
        }
        Ok(acked)
    }

    pub async fn close(mut self) -> Result<()> {
        self.drain().await?;
        for producer in self.producers {
            producer.close().await;
        }
        Ok(())
    }

    async fn fill(&mut self) -> Result<()> {
        while self.waiting.len() < self.window {
            self.push().await?;
        }
        Ok(())
    }

    async fn push(&mut self) -> Result<()> {
        let turn = self.sent as usize % self.producers.len();
        let since = self.sent.is_multiple_of(SAMPLE_EVERY).then(Instant::now);
        let message = (self.make)(self.sent);
        let receipt = self.producers[turn].enqueue(message).await?;
        self.waiting.push_back(Waiting { receipt, since });
        self.sent += 1;
        Ok(())
    }
}

/// The name of a pump's topic.
pub fn topic(nth: usize) -> String {
    format!("load-{nth}")
}

/// As many messages of a size as a deep window has, or as few as its bytes allow.
pub fn window_deep(message_bytes: usize) -> usize {
    (WINDOW_DEEP as usize).min(WINDOW_BYTES_MAX / message_bytes)
}

/// A message whose payload has so many bytes.
pub fn message(bytes: usize) -> Message {
    Message::new(Bytes::from(vec![0x5a; bytes]))
}

/// Makes a topic, and a producer for it.
pub async fn open(client: &Client, topic: &str) -> Result<Producer> {
    client.create_topic(topic, TopicConfig::default()).await?;
    Ok(client.producer(topic).open().await?)
}

/// Producers that are being opened at once.
pub const OPENING_MAX: usize = 64;
/// One message in so many has its latency taken.
const SAMPLE_EVERY: u64 = 16;
/// What a deep window holds at the most; a producer of the client has room for half of it.
const WINDOW_BYTES_MAX: usize = 64 << 20;
/// The payload of a small message.
pub const MESSAGE_BYTES_SMALL: usize = 128;
