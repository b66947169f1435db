//! QUIC: the endpoint, connections and their streams.
//!
//! A connection begins with its control stream, which authenticates it. Then every stream says with
//! its first frame what it is for, and has one task: what it reads becomes inputs of the shard, what
//! the shard answers becomes frames. A stream that breaks the protocol is told why and ended; the
//! others go on.

mod ahead;
mod both;
pub mod connection;
mod consumer;
mod control;
mod deliver;
mod frames;
mod inbound;
mod letters;
mod members;
mod producer;
mod settlement;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use millpond_wal::storage::Storage;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::bodies::Bodies;
use crate::config::Config;
use crate::mailbox::{self, Mailbox};
use crate::memory::MemoryBudget;
use crate::metrics::BrokerMetrics;
use crate::shard::io::{Output, StreamId};
use crate::shard_thread::{Message, ShardHandle, Stopped};

/// Inputs of one stream that the shard has not answered; the stream is not read beyond that.
pub const UNANSWERED_MAX: u64 = 256;

/// What every session needs. One per broker.
pub struct Context<S: Storage> {
    pub shard: ShardHandle<S>,
    pub bodies: Bodies<S>,
    pub memory: MemoryBudget,
    pub metrics: Arc<BrokerMetrics>,
    pub config: Config,
    pub store_id: [u8; 16],
    pub recovery_epoch: u32,
    pub tasks: TaskTracker,
    /// How much the disk and memory slow producers down.
    pub pressure: watch::Receiver<Pressure>,
    /// Becomes true when the broker drains.
    pub draining: watch::Receiver<bool>,
    pub look: crate::broker::Surroundings,
    next_stream: AtomicU64,
}

/// What slows producers down at the moment, if anything.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    pub reason: Option<millpond_protocol::ErrorCode>,
    pub retry_after: Duration,
}

/// A stream that the shard can answer.
pub struct Registered {
    pub id: StreamId,
    pub outputs: Mailbox<Output>,
    /// For what the session tells itself, in order with the shard's answers.
    pub own: mailbox::Sender<Output>,
}

impl<S: Storage> Context<S> {
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a part of the broker, given once"
    )]
    pub fn new(
        shard: ShardHandle<S>,
        bodies: Bodies<S>,
        memory: MemoryBudget,
        metrics: Arc<BrokerMetrics>,
        config: Config,
        identity: ([u8; 16], u32),
        pressure: watch::Receiver<Pressure>,
        draining: watch::Receiver<bool>,
        look: crate::broker::Surroundings,
    ) -> Self {
        let (store_id, recovery_epoch) = identity;
        Self {
            shard,
            bodies,
            memory,
            metrics,
            config,
            store_id,
            recovery_epoch,
            tasks: TaskTracker::new(),
            pressure,
            draining,
            look,
            next_stream: AtomicU64::new(1),
        }
    }

    /// Makes a stream known to the shard. `unregister` must follow, whatever happens.
    pub async fn register(&self) -> Result<Registered, Stopped> {
        let id = StreamId(self.next_stream.fetch_add(1, Ordering::Relaxed));
        let (own, outputs) = mailbox::mailbox();
        self.shard.send(Message::Register(id, own.clone())).await?;
        Ok(Registered { id, outputs, own })
    }

    /// Forgets a stream.
    pub async fn unregister(&self, id: StreamId) {
        // A stopped shard knows no streams.
        let _ = self.shard.send(Message::Unregister(id)).await;
    }
}

/// Sixty-four random bits, for secrets that live as long as a session.
pub fn random_u64() -> u64 {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).expect("the kernel has random numbers");
    u64::from_le_bytes(bytes)
}
