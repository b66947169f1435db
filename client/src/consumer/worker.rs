//! A worker: takes deliveries, runs a handler for each, settles by what it returns.
//!
//! At most `concurrency` handlers run, and no more deliveries than that are asked for, so that
//! nothing waits here while another worker is idle. A handler's panic is a nack like any other
//! failure, where panics unwind.

use std::any::Any;
use std::fmt::Display;
use std::future::Future;
use std::ops::Deref;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use millpond_protocol::control::LostReason;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::SubscribeBuilder;
use super::delivery::{Delivery, Extender, Lease, Nack, Reject, SettleReceipt, release};
use crate::delivery::Received;
use crate::error::Error;
use crate::limits::DRAIN_TIMEOUT;

/// What a handler says of its delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ack,
    Nack(Nack),
    Reject(Reject),
    /// Handed back uncharged, to come again at once or after the delay.
    Release {
        delay: Option<Duration>,
    },
}

/// What a handler may return: an `Outcome`, nothing (an ack), or a result whose error is a nack
/// with its text as the reason.
pub trait IntoOutcome {
    fn into_outcome(self) -> Outcome;
}

impl IntoOutcome for Outcome {
    fn into_outcome(self) -> Outcome {
        self
    }
}

impl IntoOutcome for () {
    fn into_outcome(self) -> Outcome {
        Outcome::Ack
    }
}

impl<E: Display> IntoOutcome for Result<(), E> {
    fn into_outcome(self) -> Outcome {
        match self {
            Ok(()) => Outcome::Ack,
            Err(error) => Outcome::Nack(Nack::new(error.to_string())),
        }
    }
}

/// A delivery as a handler gets it. The worker settles it.
#[derive(Clone)]
pub struct Job {
    received: Received,
    extender: Extender,
}

impl Job {
    /// The ordinal of this hand-out of the message, from 1.
    #[must_use]
    pub fn delivery(&self) -> u32 {
        self.received.meta.delivery.0
    }

    /// Failures so far + 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.received.meta.attempt
    }

    /// Still working: starts the processing clock again.
    pub async fn extend(&self) -> Result<(), Error> {
        self.extender.extend().await
    }

    /// Why the lease is over, if the broker has said so: a long handler may stop.
    #[must_use]
    pub fn lost(&self) -> Option<LostReason> {
        self.extender.lost()
    }
}

impl Deref for Job {
    type Target = Received;

    fn deref(&self) -> &Received {
        &self.received
    }
}

/// What a worker did.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerStats {
    pub acked: u64,
    pub nacked: u64,
    pub rejected: u64,
    /// Released by handlers, or because the drain time was over.
    pub released: u64,
    /// Handlers that panicked; also counted as nacked.
    pub panicked: u64,
    /// Settlements that the broker refused, mostly because the lease was lost.
    pub refused: u64,
}

/// How a worker runs.
#[must_use = "a worker works in `run`"]
pub struct WorkerBuilder {
    subscribe: SubscribeBuilder,
    concurrency: usize,
    drain_timeout: Duration,
}

impl WorkerBuilder {
    pub(crate) fn new(subscribe: SubscribeBuilder) -> Self {
        let concurrency = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            subscribe,
            concurrency,
            drain_timeout: DRAIN_TIMEOUT,
        }
    }

    /// Most handlers at once; default: one for each processor.
    pub fn concurrency(mut self, handlers: usize) -> Self {
        self.concurrency = handlers.clamp(1, u32::MAX as usize);
        self
    }

    /// How long running handlers may go on after `shutdown`; default 30 s. What is not finished then
    /// is stopped and handed back.
    pub fn drain_timeout(mut self, limit: Duration) -> Self {
        self.drain_timeout = limit;
        self
    }

    /// Works until `shutdown` resolves, then lets running handlers finish and closes the session.
    ///
    /// # Errors
    /// Why the subscription cannot be opened, or ended by itself.
    pub async fn run<H, F>(
        self,
        handler: H,
        shutdown: impl Future<Output = ()>,
    ) -> Result<WorkerStats, Error>
    where
        H: Fn(Job) -> F + Send + Sync + 'static,
        F: Future<Output: IntoOutcome> + Send + 'static,
    {
        let handler = Arc::new(handler);
        let concurrency = self.concurrency;
        let mut subscription = self.subscribe.prefetch(concurrency as u32).open().await?;
        let mut running = JoinSet::new();
        let mut stats = WorkerStats::default();
        tokio::pin!(shutdown);
        let end = loop {
            tokio::select! {
                biased;
                () = &mut shutdown => break Ok(()),
                Some(done) = running.join_next() => stats.count(done.ok()),
                next = subscription.next(), if running.len() < concurrency => match next {
                    Some(Ok(delivery)) => {
                        running.spawn(work(Arc::clone(&handler), delivery));
                    }
                    Some(Err(error)) => break Err(error),
                    None => break Ok(()),
                },
            }
        };
        let drained = timeout(self.drain_timeout, async {
            while let Some(done) = running.join_next().await {
                stats.count(done.ok());
            }
        });
        if drained.await.is_err() {
            // What is stopped drops its lease, which hands the message back.
            running.abort_all();
            while let Some(done) = running.join_next().await {
                stats.count(done.ok());
            }
        }
        subscription.close().await;
        end.map(|()| stats)
    }
}

/// What one handler came to.
struct Done {
    outcome: Outcome,
    panicked: bool,
    answer: Result<(), Error>,
}

async fn work<H, F>(handler: Arc<H>, delivery: Delivery) -> Done
where
    H: Fn(Job) -> F,
    F: Future<Output: IntoOutcome>,
{
    let (received, lease) = delivery.into_parts();
    let job = Job {
        received,
        extender: lease.extender(),
    };
    let handling = AssertUnwindSafe(async move { handler(job).await });
    let (outcome, panicked) = match handling.catch_unwind().await {
        Ok(outcome) => (outcome.into_outcome(), false),
        Err(panic) => {
            let reason = format!("panic: {}", panic_text(&*panic));
            (Outcome::Nack(Nack::new(reason)), true)
        }
    };
    Done {
        answer: settle(lease, outcome.clone()).await,
        outcome,
        panicked,
    }
}

fn settle(lease: Lease, outcome: Outcome) -> SettleReceipt {
    lease.settle(match outcome {
        Outcome::Ack => None,
        Outcome::Nack(nack) => Some(nack.into()),
        Outcome::Reject(reject) => Some(reject.into()),
        Outcome::Release { delay } => Some(release(delay)),
    })
}

impl WorkerStats {
    /// `None`: a handler that was stopped at the end of the drain time.
    fn count(&mut self, done: Option<Done>) {
        let Some(done) = done else {
            self.released += 1;
            return;
        };
        match done.outcome {
            Outcome::Ack => self.acked += 1,
            Outcome::Nack(_) => self.nacked += 1,
            Outcome::Reject(_) => self.rejected += 1,
            Outcome::Release { .. } => self.released += 1,
        }
        self.panicked += u64::from(done.panicked);
        if let Err(error) = done.answer {
            self.refused += 1;
            tracing::warn!(%error, "a handler's outcome was not taken");
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("of an unprintable kind")
}
