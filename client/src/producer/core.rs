//! What a producer's handles and its task share: the pipeline under a short lock, and who waits.

use std::time::{Duration, Instant};

use millpond_protocol::control::{ProducerOpened, PublishRefused};
use millpond_protocol::hot::PublishAck;
use millpond_protocol::{Message, Sequence};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::pipeline::{Next, Pipeline, Pressure, Slot, Verdict};
use crate::completion::Wakeups;
use crate::error::Error;

pub struct Core {
    send_timeout: Duration,
    state: Mutex<State>,
    /// The writer has something to do.
    work: Notify,
    /// One waiting sender may try again; it passes the word on if there is more room.
    room: Notify,
    /// Something was answered, or the producer ended.
    progress: Notify,
}

struct State {
    pipeline: Pipeline,
    /// The writer waits for `work`.
    writer_idle: bool,
    senders_waiting: usize,
    /// No further messages are taken.
    closing: bool,
    ended: Option<Error>,
}

impl Core {
    pub fn new(pipeline: Pipeline, send_timeout: Duration) -> Self {
        Self {
            send_timeout,
            state: Mutex::new(State {
                pipeline,
                writer_idle: false,
                senders_waiting: 0,
                closing: false,
                ended: None,
            }),
            work: Notify::new(),
            room: Notify::new(),
            progress: Notify::new(),
        }
    }

    /// Takes a message in if there is room.
    pub fn try_push(&self, message: &Message, sequence: Option<Sequence>) -> Result<Slot, Error> {
        message.check()?;
        let now = Instant::now();
        let mut state = self.state.lock();
        if let Some(error) = &state.ended {
            return Err(error.clone());
        }
        if state.closing {
            return Err(Error::Closed);
        }
        let slot = state.pipeline.push(message, sequence, now)?;
        let wake_writer = !state.pipeline.gathers() && std::mem::take(&mut state.writer_idle);
        let pass_on = state.senders_waiting > 0 && state.pipeline.has_room(0);
        drop(state);
        if wake_writer {
            self.work.notify_one();
        }
        if pass_on {
            self.room.notify_one();
        }
        Ok(slot)
    }

    /// Takes a message in, waiting for room up to the send timeout. Cancel-safe: a message whose
    /// future is dropped has not been taken.
    pub async fn push(&self, message: &Message, sequence: Option<Sequence>) -> Result<Slot, Error> {
        match self.try_push(message, sequence) {
            Err(error) if is_full(&error) => {}
            taken => return taken,
        }
        let deadline = tokio::time::Instant::now() + self.send_timeout;
        let _waiting = Waiting::new(self);
        loop {
            let room = self.room.notified();
            let full = match self.try_push(message, sequence) {
                Err(error) if is_full(&error) => error,
                taken => return taken,
            };
            if tokio::time::timeout_at(deadline, room).await.is_err() {
                return Err(full);
            }
        }
    }

    /// The next frame for the writer; if there is none, `work` will say when to ask again.
    pub fn next_frame(&self) -> Next {
        let mut state = self.state.lock();
        let next = state.pipeline.next(Instant::now());
        state.writer_idle = matches!(next, Next::Wait(_));
        next
    }

    pub async fn work(&self) {
        self.work.notified().await;
    }

    pub fn acked(&self, ack: &PublishAck) -> Result<(), String> {
        self.with(|pipeline, wakeups| pipeline.acked(ack, wakeups))
    }

    pub fn refused(&self, refused: &PublishRefused) -> Result<Verdict, String> {
        self.with(|pipeline, wakeups| pipeline.refused(refused, Instant::now(), wakeups))
    }

    pub fn lost(&self) {
        self.with(|pipeline, _| pipeline.lost());
    }

    /// Nothing more is sent on this stream.
    pub fn pause(&self) {
        self.with(|pipeline, _| pipeline.pause());
    }

    pub fn reopened(&self, opened: &ProducerOpened) -> Result<(), Error> {
        self.with(|pipeline, wakeups| pipeline.reopened(opened, wakeups))
    }

    pub fn expire(&self) {
        self.with(|pipeline, wakeups| pipeline.expire(Instant::now(), wakeups));
    }

    /// Takes no further messages.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closing = true;
        state.pipeline.flush();
        drop(state);
        self.work.notify_one();
        self.room.notify_waiters();
        self.progress.notify_waiters();
    }

    /// The producer is over: everything pending fails.
    pub fn end(&self, error: &Error) {
        self.state.lock().ended = Some(error.clone());
        self.with(|pipeline, wakeups| pipeline.fail(error, wakeups));
        self.room.notify_waiters();
        self.progress.notify_waiters();
    }

    /// Waits until everything that was taken so far has its outcome.
    pub async fn flush(&self) -> Result<(), Error> {
        let target = {
            let mut state = self.state.lock();
            state.pipeline.flush();
            state.pipeline.last_assigned()
        };
        self.work.notify_one();
        loop {
            let progress = self.progress.notified();
            {
                let mut state = self.state.lock();
                let oldest = state.pipeline.oldest_pending();
                if oldest.is_none_or(|oldest| oldest > target) {
                    return match state.pipeline.take_failure() {
                        Some(error) => Err(error),
                        None => Ok(()),
                    };
                }
            }
            progress.await;
        }
    }

    /// Waits until the producer is closed and nothing is pending.
    pub async fn finished(&self) {
        loop {
            let progress = self.progress.notified();
            if self.is_finished() {
                return;
            }
            progress.await;
        }
    }

    /// Waits until nothing is under way.
    pub async fn answered(&self) {
        loop {
            let progress = self.progress.notified();
            if !self.state.lock().pipeline.is_under_way() {
                return;
            }
            progress.await;
        }
    }

    pub fn is_finished(&self) -> bool {
        let state = self.state.lock();
        state.closing && state.pipeline.is_empty()
    }

    pub fn last_assigned(&self) -> Sequence {
        self.state.lock().pipeline.last_assigned()
    }

    pub fn accepted(&self) -> Sequence {
        self.state.lock().pipeline.accepted()
    }

    pub fn pressure(&self) -> Option<Pressure> {
        self.state.lock().pipeline.pressure()
    }

    pub fn send_timeout(&self) -> Duration {
        self.send_timeout
    }

    /// Changes the pipeline, then wakes whoever it concerns, without the lock.
    fn with<T>(&self, change: impl FnOnce(&mut Pipeline, &mut Wakeups) -> T) -> T {
        let mut wakeups = Wakeups::default();
        let mut state = self.state.lock();
        let result = change(&mut state.pipeline, &mut wakeups);
        let room = state.senders_waiting > 0 && state.pipeline.has_room(0);
        let wake_writer = std::mem::take(&mut state.writer_idle);
        drop(state);
        wakeups.wake();
        if wake_writer {
            self.work.notify_one();
        }
        if room {
            self.room.notify_one();
        }
        self.progress.notify_waiters();
        result
    }
}

/// Counts a waiting sender for as long as it waits.
struct Waiting<'a>(&'a Core);

impl<'a> Waiting<'a> {
    fn new(core: &'a Core) -> Self {
        core.state.lock().senders_waiting += 1;
        Self(core)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.state.lock().senders_waiting -= 1;
    }
}

fn is_full(error: &Error) -> bool {
    matches!(error, Error::Backpressure { .. } | Error::Timeout { .. })
}
