//! What leaves the shard: answers to their streams, bodies into the cache, jobs to the upkeep thread.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;
use millpond_wal::storage::Storage;

use crate::bodies::{Cache, Share};
use crate::mailbox;
use crate::metrics::BrokerMetrics;
use crate::shard::io::{Output, StreamId};
use crate::shard::{Job, Outbox};

/// The streams that answers are for.
pub struct Router<S: Storage> {
    streams: HashMap<StreamId, mailbox::Sender<Output>>,
    cache: Arc<Cache>,
    metrics: Arc<BrokerMetrics>,
    jobs: Sender<Job<S>>,
}

impl<S: Storage> Router<S> {
    pub fn new(cache: Arc<Cache>, metrics: Arc<BrokerMetrics>, jobs: Sender<Job<S>>) -> Self {
        Self {
            streams: HashMap::new(),
            cache,
            metrics,
            jobs,
        }
    }

    /// Lets everything out that the round has produced.
    pub fn flush(&mut self, out: &mut Outbox<S>) {
        let mut group_bytes = 0;
        for commit in out.commits.drain(..) {
            self.metrics.observe_commit(
                commit.records,
                commit.bytes,
                Duration::from_micros(commit.sync_us),
            );
            group_bytes = commit.bytes;
        }
        for (stream, output) in out.replies.drain(..) {
            self.send(stream, output);
        }
        // Behind the answers, which wait for nothing of it; hand-outs of these messages come later.
        out.fresh.retain(|fresh| fresh.is_wanted);
        if !out.fresh.is_empty() {
            self.cache
                .fill(out.fresh.drain(..), Share::of_group(group_bytes));
        }
        for name in out.revoked.drain(..) {
            self.revoke(&name);
        }
        for job in out.jobs.drain(..) {
            if self.jobs.try_send(job).is_err() {
                tracing::error!("the upkeep thread has ended; space is no longer reclaimed");
            }
        }
    }

    pub fn add(&mut self, stream: StreamId, sender: mailbox::Sender<Output>) {
        self.streams.insert(stream, sender);
    }

    pub fn remove(&mut self, stream: StreamId) {
        self.streams.remove(&stream);
    }

    fn send(&self, stream: StreamId, output: Output) {
        if let Some(sender) = self.streams.get(&stream) {
            // A stream that has gone will be unregistered by its session.
            sender.send(output);
        }
    }

    /// Every stream decides for itself whether the revoked token is its own.
    fn revoke(&self, name: &str) {
        for sender in self.streams.values() {
            sender.send(Output::Revoked {
                token: name.to_owned(),
            });
        }
    }
}
