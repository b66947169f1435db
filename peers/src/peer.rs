//! What a server must be able to do to be measured.

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;

/// An answer that comes later.
pub type Answer = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// As the server is commonly run: an answer may come before the disk has it.
    Default,
    /// An answer comes after a sync.
    Strict,
}

/// A server that runs, alone.
pub trait Peer: Sized {
    type Producer: Producer;
    type Consumer: Consumer;

    /// Starts it with a folder of its own; waits until it serves.
    async fn start(durability: Durability, dir: &Path) -> Result<Self>;

    /// Its process, where it is one of this run.
    fn pid(&self) -> Option<u32>;

    async fn producer(&self) -> Result<Self::Producer>;

    /// A consumer of everything that was published; it holds at most `prefetch` messages.
    async fn consumer(&self, prefetch: u32) -> Result<Self::Consumer>;

    async fn stop(self) -> Result<()>;
}

pub trait Producer {
    /// Sends a message; the answer is awaited later.
    async fn send(&mut self, payload: Bytes) -> Result<Answer>;
}

pub trait Consumer {
    type Delivery;

    async fn next(&mut self) -> Result<Self::Delivery>;

    fn payload(delivery: &Self::Delivery) -> &[u8];

    /// Acknowledges one message; the answer is awaited later where the protocol has one.
    async fn ack(&mut self, delivery: Self::Delivery) -> Result<Answer>;

    /// Hands one back, to come again after a wait. `None` where the server cannot do that.
    async fn retry(&mut self, delivery: Self::Delivery, wait: Duration) -> Result<Option<Answer>>;
}

/// An answer whose question goes out now: a future that has never been polled has asked nothing.
pub fn asked(answer: impl Future<Output = Result<()>> + Send + 'static) -> Answer {
    let mut answer: Answer = Box::pin(answer);
    // The first poll is not a turn of the runtime's, which would let only so many of them ask.
    let mut first = tokio::task::unconstrained(answer.as_mut());
    match Pin::new(&mut first).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => Box::pin(std::future::ready(result)),
        // Whoever awaits it polls it again, with a waker.
        Poll::Pending => answer,
    }
}

/// An answer that has come.
pub fn answered() -> Answer {
    Box::pin(std::future::ready(Ok(())))
}
