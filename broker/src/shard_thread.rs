//! The thread that owns the shard: takes inputs, commits, answers, and hands long work to the
//! upkeep thread. Everything that leaves goes through `Router`.
//!
//! One round: drain what has come in (up to a full group), let the queue hand out, commit if anybody
//! waits, answer, let the queue hand out what is new, answer again. Writing inline, without a log
//! thread, saves two thread hops a commit; what comes in during a sync gathers in the inbox and makes
//! the next group.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use millpond_protocol::limits::BATCH_BYTES_TARGET;
use millpond_wal::storage::Storage;
use tokio::sync::{oneshot, watch};

use crate::bodies::Cache;
use crate::clock::{ANCHOR_BYTES, Clock};
use crate::mailbox;
use crate::memory::Permit;
use crate::metrics::BrokerMetrics;
use crate::router::Router;
use crate::shard::io::{Input, Output, StreamId};
use crate::shard::{Done, Fatal, Job, Outbox, Shard};

/// Messages waiting for the shard; about 200 bytes each, taken at the start, beside the bodies, which
/// hold permits.
const INBOX_MAX: usize = 8_192;
/// Messages that the shard takes from there at once.
const TAKEN_MAX: usize = 64;
/// What stands around the messages of one publish in a group, and a little.
const AROUND_BYTES: usize = 128;
/// Jobs waiting for the upkeep thread; the shard starts at most one of each kind.
const JOBS_MAX: usize = 8;
/// How long a full inbox is left alone before the next try.
const INBOX_RETRY: Duration = Duration::from_millis(1);

/// What the shard thread is told.
pub enum Message<S: Storage> {
    Register(StreamId, mailbox::Sender<Output>),
    Unregister(StreamId),
    Input(Input<Option<Permit>>),
    Done(Done<S>),
    Gates { disk_low: bool, no_leases: bool },
    Look(Glance),
    Stop(StopReply),
}

impl<S: Storage> Message<S> {
    /// What it adds to a group, where that is much and known.
    fn publish_bytes(&self) -> usize {
        match self {
            Self::Input(Input::Publish { messages, .. }) => messages.len() + AROUND_BYTES,
            _ => 0,
        }
    }
}

/// Something to be looked up on the shard thread; it tells whoever asked by itself.
type Glance = Box<dyn FnOnce(&mut dyn Look) + Send>;

/// What may be looked at on the shard thread between rounds.
pub trait Look {
    fn queue(&self) -> &millpond_queue::Queue;
    fn status(&self) -> millpond_protocol::control::StatusView;
    fn remarks(&self) -> Vec<String>;
}

impl<S: Storage, C: Clock> Look for Shard<S, C> {
    fn queue(&self) -> &millpond_queue::Queue {
        Shard::queue(self)
    }

    fn status(&self) -> millpond_protocol::control::StatusView {
        Shard::status(self)
    }

    fn remarks(&self) -> Vec<String> {
        Shard::remarks(self)
    }
}

/// The way to the shard; cheap to clone.
pub struct ShardHandle<S: Storage> {
    inbox: Sender<Message<S>>,
}

impl<S: Storage> Clone for ShardHandle<S> {
    fn clone(&self) -> Self {
        Self {
            inbox: self.inbox.clone(),
        }
    }
}

/// The shard has stopped; nothing more is acknowledged.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the broker has stopped")]
pub struct Stopped;

impl<S: Storage> ShardHandle<S> {
    /// Sends, when it is called if there is room, and else waiting while the inbox is full. Cancelled
    /// while it waits, nothing was sent.
    ///
    /// Only what waits keeps the message: otherwise all that send would have room for one, and idle
    /// streams are thousands.
    pub fn send(&self, message: Message<S>) -> impl Future<Output = Result<(), Stopped>> {
        let sent = match self.inbox.try_send(message) {
            Ok(()) => Ok(None),
            Err(TrySendError::Disconnected(_)) => Err(Stopped),
            Err(TrySendError::Full(back)) => Ok(Some(Box::pin(self.send_later(back)))),
        };
        async move {
            match sent? {
                Some(waiting) => waiting.await,
                None => Ok(()),
            }
        }
    }

    async fn send_later(&self, mut message: Message<S>) -> Result<(), Stopped> {
        loop {
            tokio::time::sleep(INBOX_RETRY).await;
            match self.inbox.try_send(message) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Disconnected(_)) => return Err(Stopped),
                Err(TrySendError::Full(back)) => message = back,
            }
        }
    }

    /// Sends an input, as `send` does.
    pub fn input(&self, input: Input<Option<Permit>>) -> impl Future<Output = Result<(), Stopped>> {
        self.send(Message::Input(input))
    }

    /// Runs `look` on the shard thread between rounds and returns what it found.
    pub async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut dyn Look) -> T + Send + 'static,
    ) -> Result<T, Stopped> {
        let (tell, told) = oneshot::channel();
        let look = Box::new(move |shard: &mut dyn Look| {
            // The asker may have gone.
            let _ = tell.send(look(shard));
        });
        self.send(Message::Look(look)).await?;
        told.await.map_err(|_| Stopped)
    }
}

/// The threads of one shard.
pub struct ShardThread<S: Storage> {
    pub handle: ShardHandle<S>,
    /// Becomes `Some` when the shard has failed; it has stopped then.
    pub failed: watch::Receiver<Option<Arc<Fatal>>>,
    shard: std::thread::JoinHandle<()>,
    upkeep: std::thread::JoinHandle<()>,
}

impl<S: Storage> ShardThread<S> {
    /// Starts the shard's thread and the upkeep thread.
    pub fn start<C: Clock>(
        shard: Shard<S, C>,
        cache: Arc<Cache>,
        metrics: Arc<BrokerMetrics>,
    ) -> std::io::Result<Self> {
        let (inbox, messages) = bounded(INBOX_MAX);
        let (jobs, todo) = bounded::<Job<S>>(JOBS_MAX);
        let (tell_failed, failed) = watch::channel(None);
        let done = inbox.clone();
        let upkeep = std::thread::Builder::new()
            .name("millpond-upkeep".to_owned())
            .spawn(move || {
                for job in todo {
                    if done.send(Message::Done(job.run())).is_err() {
                        return;
                    }
                }
            })?;
        let mut rounds = Rounds {
            shard,
            messages,
            router: Router::new(cache, metrics, jobs),
            taken: VecDeque::with_capacity(TAKEN_MAX),
            out: Outbox::default(),
        };
        let shard = std::thread::Builder::new().name("millpond-shard".to_owned()).spawn(move || {
            match rounds.run() {
                Ok(stopped) => rounds.close(stopped),
                Err(fatal) => {
                    tracing::error!(%fatal, "the broker stops: what was not acknowledged is unknown to its senders");
                    tell_failed.send_replace(Some(Arc::new(fatal)));
                }
            }
        })?;
        Ok(Self {
            handle: ShardHandle { inbox },
            failed,
            shard,
            upkeep,
        })
    }

    /// Commits, seals and ends both threads.
    pub async fn stop(self) -> Result<[u8; ANCHOR_BYTES], Option<Fatal>> {
        let (tell, told) = oneshot::channel();
        let sent = self.handle.send(Message::Stop(tell)).await;
        drop(self.handle);
        let result = match (sent, told.await) {
            (Ok(()), Ok(result)) => result.map_err(Some),
            _ => Err(None),
        };
        let join = move || {
            // A panic in either has been reported by its own thread.
            let _ = (self.shard.join(), self.upkeep.join());
        };
        let _ = tokio::task::spawn_blocking(join).await;
        result
    }
}

struct Rounds<S: Storage, C: Clock> {
    shard: Shard<S, C>,
    messages: Receiver<Message<S>>,
    router: Router<S>,
    /// Taken from the inbox and not looked at.
    taken: VecDeque<Message<S>>,
    out: Outbox<S>,
}

type StopReply = oneshot::Sender<Result<[u8; ANCHOR_BYTES], Fatal>>;

impl<S: Storage, C: Clock> Rounds<S, C> {
    /// Runs until told to stop, or until every handle is gone.
    fn run(&mut self) -> Result<Option<StopReply>, Fatal> {
        loop {
            if self.wait() == Err(RecvTimeoutError::Disconnected) {
                return Ok(None);
            }
            self.shard.wake();
            if let Some(stop) = self.take_in()? {
                return Ok(Some(stop));
            }
            self.shard.dispatch_early(&mut self.out);
            self.router.flush(&mut self.out);
            self.shard.commit_if_due(&mut self.out)?;
            self.shard.wake();
            self.router.flush(&mut self.out);
            self.shard.dispatch(&mut self.out);
            self.shard.upkeep(&mut self.out)?;
            self.router.flush(&mut self.out);
            self.shard.vouch_if_due()?;
        }
    }

    /// Waits for a message, or until the shard has something to do.
    fn wait(&mut self) -> Result<(), RecvTimeoutError> {
        if !self.shard.takes_more() {
            std::thread::sleep(Duration::from_micros(self.shard.wait_us()));
            return Ok(());
        }
        if !self.taken.is_empty() || !self.messages.is_empty() {
            return Ok(());
        }
        let us = self.shard.wait_us();
        if us > 0 {
            let message = self.messages.recv_timeout(Duration::from_micros(us))?;
            self.taken.push_back(message);
        }
        Ok(())
    }

    /// Takes in what has come, until the group is full.
    fn take_in(&mut self) -> Result<Option<StopReply>, Fatal> {
        if !self.shard.takes_more() {
            return Ok(None);
        }
        self.gather();
        while let Some(message) = self.taken.pop_front() {
            match message {
                Message::Input(input) => self.shard.input(input, &mut self.out),
                Message::Register(stream, sender) => self.router.add(stream, sender),
                Message::Unregister(stream) => self.router.remove(stream),
                Message::Done(done) => self.shard.job_done(done)?,
                Message::Gates {
                    disk_low,
                    no_leases,
                } => self.shard.set_gates(disk_low, no_leases),
                Message::Look(look) => look(&mut self.shard),
                Message::Stop(reply) => return Ok(Some(reply)),
            }
            if self.shard.is_group_full() {
                break;
            }
            if self.taken.is_empty() {
                self.gather();
            }
        }
        Ok(None)
    }

    /// Takes several messages at once, so that the group's buffer grows once for all of them.
    fn gather(&mut self) {
        let room = self.shard.group_room();
        let mut bytes: usize = self.taken.iter().map(Message::publish_bytes).sum();
        while self.taken.len() < TAKEN_MAX && (bytes < room || self.taken.is_empty()) {
            let Ok(message) = self.messages.try_recv() else {
                break;
            };
            bytes += message.publish_bytes();
            self.taken.push_back(message);
        }
        // No more than the group takes and the batch that fills it: what is kept of a group keeps all of its buffer.
        self.shard.expect(bytes.min(room + BATCH_BYTES_TARGET));
    }

    fn close(mut self, reply: Option<StopReply>) {
        let committed = self.shard.commit(&mut self.out);
        self.router.flush(&mut self.out);
        let result = committed.and_then(|()| self.shard.close(&mut Outbox::default()));
        if let Some(reply) = reply {
            // Whoever asked may have gone; the log is closed either way.
            let _ = reply.send(result);
        }
    }
}
