//! The thread that owns the shard: takes inputs, commits, answers, and hands long work to the
//! upkeep thread. Everything that leaves goes through `Router`.
//!
//! One round: drain what has come in (up to a full group), let the queue hand out, commit if anybody
//! waits, answer, let the queue hand out what is new, answer again. Writing inline, without a log
//! thread, saves two thread hops a commit; what comes in during a sync gathers in the inbox and makes
//! the next group.
//!
//! What adds nothing to a group does not wait with what does: while a full disk holds back a full group, the inbox
//! stands still, and asides are heard.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use millpond_protocol::limits::BATCH_BYTES_TARGET;
use millpond_wal::storage::Storage;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

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
/// Asides waiting for the shard; about 30 bytes each, taken at the start.
const ASIDES_MAX: usize = 64;
/// How long a full inbox is left alone before the next try.
const INBOX_RETRY: Duration = Duration::from_millis(1);
/// How long the last commit and the sealing of the log may take.
const STOP_MAX: Duration = Duration::from_secs(30);

/// What the shard thread is told, in order.
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all are inputs, and none of them is to be allocated"
)]
pub enum Message {
    Register(StreamId, mailbox::Sender<Output>),
    Unregister(StreamId),
    Input(Input<Option<Permit>>),
    /// There is an aside: the shard may be waiting for a message.
    Nudge,
}

/// What it is told beside that: it is heard in every round, before what the inbox has, and though that may wait.
pub enum Aside<S: Storage> {
    Done(Box<Done<S>>),
    Gates {
        disk_low: bool,
        no_leases: bool,
    },
    Look(Glance),
    Drain,
    /// Ends the shard when it has taken in what is there, or cannot.
    Stop(StopReply),
}

impl Message {
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
    inbox: Sender<Message>,
    asides: Sender<Aside<S>>,
}

impl<S: Storage> Clone for ShardHandle<S> {
    fn clone(&self) -> Self {
        Self {
            inbox: self.inbox.clone(),
            asides: self.asides.clone(),
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
    pub fn send(&self, message: Message) -> impl Future<Output = Result<(), Stopped>> {
        send(&self.inbox, message)
    }

    /// Tells an aside, as `send` does.
    pub fn tell(&self, aside: Aside<S>) -> impl Future<Output = Result<(), Stopped>> {
        let sent = send(&self.asides, aside);
        async move {
            sent.await?;
            self.nudge();
            Ok(())
        }
    }

    /// The same on a thread that may wait.
    fn tell_blocking(&self, aside: Aside<S>) -> Result<(), Stopped> {
        self.asides.send(aside).map_err(|_| Stopped)?;
        self.nudge();
        Ok(())
    }

    /// A shard whose inbox is full does not wait for a message.
    fn nudge(&self) {
        let _ = self.inbox.try_send(Message::Nudge);
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
        self.tell(Aside::Look(look)).await?;
        told.await.map_err(|_| Stopped)
    }
}

/// Only what waits keeps the message: otherwise all that send would have room for one, and idle
/// streams are thousands.
fn send<T>(to: &Sender<T>, message: T) -> impl Future<Output = Result<(), Stopped>> {
    let sent = match to.try_send(message) {
        Ok(()) => Ok(None),
        Err(TrySendError::Disconnected(_)) => Err(Stopped),
        Err(TrySendError::Full(back)) => Ok(Some(Box::pin(send_later(to, back)))),
    };
    async move {
        match sent? {
            Some(waiting) => waiting.await,
            None => Ok(()),
        }
    }
}

async fn send_later<T>(to: &Sender<T>, mut message: T) -> Result<(), Stopped> {
    loop {
        tokio::time::sleep(INBOX_RETRY).await;
        match to.try_send(message) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Disconnected(_)) => return Err(Stopped),
            Err(TrySendError::Full(back)) => message = back,
        }
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
        let (asides, heard) = bounded(ASIDES_MAX);
        let (jobs, todo) = bounded::<Job<S>>(JOBS_MAX);
        let (tell_failed, failed) = watch::channel(None);
        let handle = ShardHandle { inbox, asides };
        let done = handle.clone();
        let upkeep = std::thread::Builder::new()
            .name("millpond-upkeep".to_owned())
            .spawn(move || {
                for job in todo {
                    if done
                        .tell_blocking(Aside::Done(Box::new(job.run())))
                        .is_err()
                    {
                        return;
                    }
                }
            })?;
        let mut rounds = Rounds {
            shard,
            messages,
            asides: heard,
            router: Router::new(cache, metrics, jobs),
            taken: VecDeque::with_capacity(TAKEN_MAX),
            out: Outbox::default(),
            stop: None,
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
            handle,
            failed,
            shard,
            upkeep,
        })
    }

    /// Commits, seals and ends both threads; those of a shard that does not answer in time are left alone.
    pub async fn stop(self) -> Result<[u8; ANCHOR_BYTES], StopError> {
        let (tell, told) = oneshot::channel();
        let handle = self.handle;
        let stopped = async {
            handle.tell(Aside::Stop(tell)).await?;
            told.await.map_err(|_| Stopped)
        };
        let result = match timeout(STOP_MAX, stopped).await {
            Ok(Ok(result)) => result.map_err(StopError::Fatal),
            Ok(Err(Stopped)) => Err(StopError::Gone),
            Err(_) => return Err(StopError::Late),
        };
        drop(handle);
        let join = move || {
            // A panic in either has been reported by its own thread.
            let _ = (self.shard.join(), self.upkeep.join());
        };
        let _ = tokio::task::spawn_blocking(join).await;
        result
    }
}

/// Why a shard did not stop cleanly.
#[derive(Debug)]
pub enum StopError {
    Fatal(Fatal),
    /// It had stopped before.
    Gone,
    /// It does not answer: a disk that hangs, most likely.
    Late,
}

struct Rounds<S: Storage, C: Clock> {
    shard: Shard<S, C>,
    messages: Receiver<Message>,
    asides: Receiver<Aside<S>>,
    router: Router<S>,
    /// Taken from the inbox and not looked at.
    taken: VecDeque<Message>,
    out: Outbox<S>,
    /// Who has told it to stop.
    stop: Option<StopReply>,
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
            self.hear()?;
            self.take_in();
            if self.stop.is_some() && (self.is_idle() || !self.shard.takes_more()) {
                return Ok(self.stop.take());
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
        if !self.is_idle() {
            return Ok(());
        }
        let us = self.shard.wait_us();
        if us > 0 {
            let message = self.messages.recv_timeout(Duration::from_micros(us))?;
            self.taken.push_back(message);
        }
        Ok(())
    }

    /// Nothing waits for the shard.
    fn is_idle(&self) -> bool {
        self.taken.is_empty() && self.messages.is_empty() && self.asides.is_empty()
    }

    /// Hears the asides that have come.
    fn hear(&mut self) -> Result<(), Fatal> {
        for aside in self.asides.try_iter().take(ASIDES_MAX) {
            match aside {
                Aside::Done(done) => self.shard.job_done(*done)?,
                Aside::Gates {
                    disk_low,
                    no_leases,
                } => self.shard.set_gates(disk_low, no_leases),
                Aside::Look(look) => look(&mut self.shard),
                Aside::Drain => self
                    .shard
                    .input(Input::<Option<Permit>>::Drain, &mut self.out),
                Aside::Stop(reply) => self.stop = Some(reply),
            }
        }
        Ok(())
    }

    /// Takes in what has come, until the group is full.
    fn take_in(&mut self) {
        if !self.shard.takes_more() {
            return;
        }
        self.gather();
        while let Some(message) = self.taken.pop_front() {
            match message {
                Message::Input(input) => self.shard.input(input, &mut self.out),
                Message::Register(stream, sender) => self.router.add(stream, sender),
                Message::Unregister(stream) => self.router.remove(stream),
                // It is over with the wait.
                Message::Nudge => {}
            }
            if self.shard.is_group_full() {
                break;
            }
            if self.taken.is_empty() {
                self.gather();
            }
        }
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

#[cfg(test)]
mod tests {
    use millpond_protocol::TopicConfig;
    use millpond_protocol::control::Request;
    use millpond_wal::sim::SimStorage;

    use super::*;
    use crate::bodies::Bodies;
    use crate::clock::ManualClock;
    use crate::shard::ShardOptions;
    use crate::shard::io::ResolvedRequest;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn open(storage: &SimStorage) -> Shard<SimStorage, ManualClock> {
        let options = ShardOptions {
            log: millpond_wal::Options {
                segment_bytes: 1 << 20,
                spare_segments: 0,
                ..millpond_wal::Options::default()
            },
            snapshot_every_bytes: 1 << 30,
        };
        let opened = Shard::open(storage.clone(), ManualClock::new(1), None, options);
        opened.unwrap().0
    }

    fn start(storage: &SimStorage) -> ShardThread<SimStorage> {
        let shard = open(storage);
        let cache = Bodies::new(shard.log().reader(), 0, 1).cache();
        ShardThread::start(shard, cache, Arc::new(BrokerMetrics::new())).unwrap()
    }

    /// Asks for a topic of this number.
    fn create(number: u64) -> Message {
        let name = format!("topic-{number}");
        let config = TopicConfig::default();
        let request = ResolvedRequest::Plain(Request::TopicCreate { name, config });
        Message::Input(Input::Request {
            stream: StreamId(0),
            id: number,
            request,
        })
    }

    async fn remarks(thread: &ShardThread<SimStorage>) -> String {
        let looked = timeout(PATIENCE, thread.handle.look(|shard| shard.remarks()));
        let remarks = looked.await.expect("the shard hears");
        remarks.unwrap().join("; ")
    }

    #[tokio::test]
    async fn a_shard_with_a_full_group_that_a_full_disk_holds_back_hears_what_is_no_input() {
        let storage = SimStorage::new(1);
        let thread = start(&storage);
        let space = storage.space().unwrap();
        storage.set_capacity(space.total_bytes - space.free_bytes);
        let mut number = 0;
        let takes = Duration::from_millis(500);
        while let Ok(sent) = timeout(takes, thread.handle.send(create(number))).await {
            sent.unwrap();
            number += 1;
        }
        assert!(thread.handle.inbox.is_full());

        let said = remarks(&thread).await;
        assert!(said.contains("the disk is full"), "{said}");
        let drained = timeout(PATIENCE, thread.handle.tell(Aside::Drain)).await;
        drained.expect("the shard hears").unwrap();
        let said = remarks(&thread).await;
        assert!(said.contains("shutting down"), "{said}");
        let stopped = timeout(PATIENCE, thread.stop()).await.expect("it ends");
        assert!(matches!(stopped, Err(StopError::Fatal(_))), "{stopped:?}");
    }

    #[tokio::test]
    async fn what_came_before_the_stop_is_taken_in() {
        let storage = SimStorage::new(1);
        let thread = start(&storage);
        for number in 0..10_000 {
            thread.handle.send(create(number)).await.unwrap();
        }
        thread.stop().await.unwrap();
        storage.restart_process();
        let shard = open(&storage);
        assert!(shard.queue().topic_id("topic-9999").is_some());
    }
}
