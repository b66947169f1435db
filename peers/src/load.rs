//! The load, the same for everybody.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use futures_util::TryStreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::measure::{Found, Meter};
use crate::peer::{Answer, Consumer, Peer, Producer};

#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    #[serde(rename = "publish_1k")]
    Publish1k,
    #[serde(rename = "publish_128")]
    Publish128,
    #[serde(rename = "consume_ack_1k")]
    ConsumeAck1k,
    EndToEnd,
    Redelivery,
}

impl Workload {
    pub const ALL: [Self; 5] = [
        Self::Publish1k,
        Self::Publish128,
        Self::ConsumeAck1k,
        Self::EndToEnd,
        Self::Redelivery,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Publish1k => "publish_1k",
            Self::Publish128 => "publish_128",
            Self::ConsumeAck1k => "consume_ack_1k",
            Self::EndToEnd => "end_to_end",
            Self::Redelivery => "redelivery",
        }
    }

    pub fn what(self) -> &'static str {
        match self {
            Self::Publish1k => "1 KiB, one producer, 256 unanswered; each answered by itself",
            Self::Publish128 => "128 B, one producer, 256 unanswered; each answered by itself",
            Self::ConsumeAck1k => "1 KiB from a backlog, each acknowledged by itself, 1,000 held",
            Self::EndToEnd => "1 KiB at 2,000 a second; latency: publish to delivered",
            Self::Redelivery => "handed back with a delay of 1 s; latency: how much later it comes",
        }
    }

    /// Measures it; `None` where the server cannot do it.
    pub async fn measure<P: Peer>(self, peer: &P, time: Duration) -> Result<Option<Found>> {
        let limit = time * 10 + SLACK;
        let run = async {
            match self {
                Self::Publish1k => publish(peer, 1_024, time).await.map(Some),
                Self::Publish128 => publish(peer, 128, time).await.map(Some),
                Self::ConsumeAck1k => consume(peer, time).await.map(Some),
                Self::EndToEnd => end_to_end(peer, time).await.map(Some),
                Self::Redelivery => redelivery(peer).await,
            }
        };
        within("end", limit, Box::pin(run)).await
    }
}

/// A server that takes a connection and then says nothing holds up its own measurement, and no other. Its
/// process ends with what is dropped here.
pub async fn within<T>(
    what: &str,
    limit: Duration,
    step: impl Future<Output = Result<T>>,
) -> Result<T> {
    let result = timeout(limit, step).await;
    result.with_context(|| format!("it did not {what} within {limit:?}"))?
}

async fn publish<P: Peer>(peer: &P, bytes: usize, time: Duration) -> Result<Found> {
    let mut producer = peer.producer().await?;
    pump(peer, &mut producer, bytes, time / 4).await?;
    let (found, _) = pump(peer, &mut producer, bytes, time).await?;
    Ok(found)
}

/// Keeps a window of messages without an answer for a time, then waits for all; what was found, and
/// how many messages it was.
async fn pump<P: Peer>(
    peer: &P,
    producer: &mut P::Producer,
    bytes: usize,
    time: Duration,
) -> Result<(Found, u64)> {
    let payload = Bytes::from(vec![0x5a; bytes]);
    let mut waiting = FuturesOrdered::new();
    let mut meter = Meter::start(peer.pid())?;
    let end = Instant::now() + time;
    let mut sent = 0;
    loop {
        let now = Instant::now();
        if now < end && waiting.len() < WINDOW {
            let answer = producer.send(payload.clone()).await?;
            waiting.push_back(async move { answer.await.map(|()| now) });
            sent += 1;
            continue;
        }
        let Some(since) = waiting.try_next().await? else {
            break;
        };
        meter.count();
        meter.record(since.elapsed());
    }
    Ok((meter.stop()?, sent))
}

async fn consume<P: Peer>(peer: &P, time: Duration) -> Result<Found> {
    let mut producer = peer.producer().await?;
    let (_, backlog) = pump(peer, &mut producer, 1_024, time).await?;
    let mut consumer = peer.consumer(PREFETCH).await?;
    let mut waiting = Waiting::default();
    let mut meter = Meter::start(peer.pid())?;
    let end = Instant::now() + time;
    for _ in 0..backlog {
        if Instant::now() >= end {
            break;
        }
        let delivery = consumer.next().await?;
        waiting.push(consumer.ack(delivery).await?).await?;
        meter.count();
    }
    waiting.rest().await?;
    meter.stop()
}

/// The pace is kept by a thread that waits for nobody: what a slow answer delays counts as late.
async fn end_to_end<P: Peer>(peer: &P, time: Duration) -> Result<Found> {
    let mut producer = peer.producer().await?;
    let mut consumer = peer.consumer(PREFETCH).await?;
    let count = (time.as_micros() / PACE.as_micros()) as u32;
    let origin = Instant::now() + PACE;
    let (tick, mut ticks) = mpsc::unbounded_channel();
    let pacer = tokio::task::spawn_blocking(move || {
        for nth in 0..count {
            std::thread::sleep((origin + PACE * nth).saturating_duration_since(Instant::now()));
            if tick.send(Instant::now()).is_err() {
                return;
            }
        }
    });
    let publish = async {
        let mut waiting = Waiting::default();
        while let Some(tick) = ticks.recv().await {
            let mut payload = vec![0x5a; 1_024];
            let since = tick.saturating_duration_since(origin).as_nanos() as u64;
            payload[..8].copy_from_slice(&since.to_le_bytes());
            waiting.push(producer.send(payload.into()).await?).await?;
        }
        waiting.rest().await
    };
    let mut meter = Meter::start(peer.pid())?;
    let receive = async {
        let mut waiting = Waiting::default();
        for _ in 0..count {
            let delivery = consumer.next().await?;
            let since = P::Consumer::payload(&delivery).first_chunk().copied();
            let since = u64::from_le_bytes(since.context("a message without its time")?);
            meter.record(origin.elapsed().saturating_sub(Duration::from_nanos(since)));
            meter.count();
            waiting.push(consumer.ack(delivery).await?).await?;
        }
        waiting.rest().await
    };
    let (published, received) = tokio::join!(publish, receive);
    published?;
    received?;
    pacer.await?;
    meter.stop()
}

async fn redelivery<P: Peer>(peer: &P) -> Result<Option<Found>> {
    let mut producer = peer.producer().await?;
    let mut waiting = Waiting::default();
    for nth in 0..RETRIES as u32 {
        let payload = nth.to_le_bytes().to_vec();
        waiting.push(producer.send(payload.into()).await?).await?;
    }
    waiting.rest().await?;
    let mut consumer = peer.consumer(RETRIES as u32).await?;
    let mut since = vec![None; RETRIES];
    let mut left = RETRIES;
    let mut meter = Meter::start(peer.pid())?;
    let mut settled = Waiting::default();
    while left > 0 {
        let delivery = consumer.next().await?;
        let now = Instant::now();
        let nth = P::Consumer::payload(&delivery).first_chunk().copied();
        let nth = u32::from_le_bytes(nth.context("a message without its number")?);
        let place = since.get_mut(nth as usize).context("an unknown number")?;
        match *place {
            None => {
                *place = Some(now);
                let Some(answer) = consumer.retry(delivery, WAIT).await? else {
                    return Ok(None);
                };
                settled.push(answer).await?;
            }
            Some(since) => {
                meter.record((now - since).saturating_sub(WAIT));
                meter.count();
                left -= 1;
                settled.push(consumer.ack(delivery).await?).await?;
            }
        }
    }
    settled.rest().await?;
    meter.stop().map(Some)
}

/// Answers that have not come, a window at most. Whoever waits for the oldest drives all of them: a client
/// may hold back a question for which its own queue has no room until its answer is asked for again.
#[derive(Default)]
struct Waiting(FuturesOrdered<Answer>);

impl Waiting {
    async fn push(&mut self, answer: Answer) -> Result<()> {
        if self.0.len() >= WINDOW {
            self.0.try_next().await?;
        }
        self.0.push_back(answer);
        Ok(())
    }

    async fn rest(mut self) -> Result<()> {
        while self.0.try_next().await?.is_some() {}
        Ok(())
    }
}

const WINDOW: usize = 256;
const PREFETCH: u32 = 1_000;
/// 2,000 messages a second.
const PACE: Duration = Duration::from_micros(500);
const RETRIES: usize = 10_000;
const WAIT: Duration = Duration::from_secs(1);
const SLACK: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_that_says_nothing_is_left_out() {
        let silent = std::future::pending::<Result<()>>();
        let limit = Duration::from_millis(1);
        let error = within("start", limit, silent).await.unwrap_err();
        assert_eq!(error.to_string(), "it did not start within 1ms");
    }
}
