//! What a producer's handles and its task share: the pipeline under a short lock, and who waits.

use std::time::{Duration, Instant};

use millpond_protocol::control::{ProducerOpened, PublishRefused};
use millpond_protocol::hot::PublishAck;
use millpond_protocol::{Message, ProducerHandle, Sequence};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::pipeline::{Next, Pipeline, Pressure, Slot, Verdict};
use super::stream::{Place, PublishStream};
use crate::completion::Wakeups;
use crate::error::Error;

pub struct Core {
    send_timeout: Duration,
    state: Mutex<State>,
    /// One waiting sender may try again; it passes the word on if there is more room.
    room: Notify,
    /// Something was answered, or the producer ended.
    progress: Notify,
}

struct State {
    pipeline: Pipeline,
    /// Where it writes; none between two streams.
    place: Option<Place>,
    /// The stream's writer has nothing more of this producer, and is to be told when there is.
    writer_idle: bool,
    senders_waiting: usize,
    /// No further messages are taken.
    closing: bool,
    ended: Option<Error>,
}

impl State {
    /// Whom to tell that there is something to write, unless it will ask anyway.
    fn idle_writer(&mut self) -> Option<Place> {
        let place = self.place.as_ref()?;
        std::mem::take(&mut self.writer_idle).then(|| place.clone())
    }

    fn is_at(&self, stream: &PublishStream, handle: ProducerHandle) -> bool {
        let place = self.place.as_ref();
        place.is_some_and(|place| place.is(stream, handle))
    }
}

impl Core {
    pub fn new(pipeline: Pipeline, send_timeout: Duration) -> Self {
        Self {
            send_timeout,
            state: Mutex::new(State {
                pipeline,
                place: None,
                writer_idle: false,
                senders_waiting: 0,
                closing: false,
                ended: None,
            }),
            room: Notify::new(),
            progress: Notify::new(),
        }
    }

    /// Takes a message in if there is room.
    pub fn try_push(&self, message: &Message, sequence: Option<Sequence>) -> Result<Slot, Error> {
        message.check()?;
        let mut state = self.state.lock();
        if let Some(error) = &state.ended {
            return Err(error.clone());
        }
        if state.closing {
            return Err(Error::Closed);
        }
        let slot = state.pipeline.push(message, sequence, Instant::now)?;
        let writer = if state.pipeline.gathers() {
            None
        } else {
            state.idle_writer()
        };
        let pass_on = state.senders_waiting > 0 && state.pipeline.has_room(0);
        drop(state);
        if let Some(writer) = writer {
            writer.ready();
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

    /// The next frame for the writer of a stream; if there is none, the producer will say when to ask
    /// again. A stream that it has left gets none.
    pub fn next_frame(&self, stream: &PublishStream, handle: ProducerHandle) -> Next {
        let mut state = self.state.lock();
        if !state.is_at(stream, handle) {
            return Next::Wait(None);
        }
        let next = state.pipeline.next(Instant::now());
        state.writer_idle = match &next {
            Next::Write(frame) => !frame.more,
            Next::Wait(_) => true,
        };
        next
    }

    /// Takes what a stream's reader has; nothing from one that the producer has left.
    pub fn acked(
        &self,
        stream: &PublishStream,
        handle: ProducerHandle,
        ack: &PublishAck,
    ) -> Result<(), String> {
        self.answered_at(stream, handle, Ok(()), |pipeline, wakeups| {
            pipeline.acked(ack, wakeups)
        })
    }

    /// As `acked`.
    pub fn refused(
        &self,
        stream: &PublishStream,
        handle: ProducerHandle,
        refused: &PublishRefused,
    ) -> Result<Verdict, String> {
        self.answered_at(stream, handle, Ok(Verdict::Fine), |pipeline, wakeups| {
            pipeline.refused(refused, Instant::now(), wakeups)
        })
    }

    /// The place on a stream is gone.
    pub fn lost(&self) {
        self.state.lock().place = None;
        self.with(|pipeline, _| pipeline.lost());
    }

    /// Writes here from now on.
    pub fn begin(&self, place: Place) {
        let mut state = self.state.lock();
        state.place = Some(place.clone());
        state.writer_idle = false;
        drop(state);
        place.ready();
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
        let writer = state.idle_writer();
        drop(state);
        if let Some(writer) = writer {
            writer.ready();
        }
        self.room.notify_waiters();
        self.progress.notify_waiters();
    }

    /// The producer is over: everything pending fails.
    pub fn end(&self, error: &Error) {
        let mut state = self.state.lock();
        state.ended = Some(error.clone());
        state.place = None;
        drop(state);
        self.with(|pipeline, wakeups| pipeline.fail(error, wakeups));
        self.room.notify_waiters();
        self.progress.notify_waiters();
    }

    /// Waits until everything that was taken so far has its outcome.
    pub async fn flush(&self) -> Result<(), Error> {
        let (target, writer) = {
            let mut state = self.state.lock();
            state.pipeline.flush();
            (state.pipeline.last_assigned(), state.idle_writer())
        };
        if let Some(writer) = writer {
            writer.ready();
        }
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

    fn answered_at<T>(
        &self,
        stream: &PublishStream,
        handle: ProducerHandle,
        elsewhere: T,
        answer: impl FnOnce(&mut Pipeline, &mut Wakeups) -> T,
    ) -> T {
        let state = self.state.lock();
        if state.is_at(stream, handle) {
            self.change(state, answer)
        } else {
            elsewhere
        }
    }

    fn with<T>(&self, change: impl FnOnce(&mut Pipeline, &mut Wakeups) -> T) -> T {
        self.change(self.state.lock(), change)
    }

    /// Changes the pipeline, then wakes whoever it concerns, without the lock.
    fn change<T>(
        &self,
        mut state: MutexGuard<'_, State>,
        change: impl FnOnce(&mut Pipeline, &mut Wakeups) -> T,
    ) -> T {
        let mut wakeups = Wakeups::default();
        let result = change(&mut state.pipeline, &mut wakeups);
        let room = state.senders_waiting > 0 && state.pipeline.has_room(0);
        let writer = if state.pipeline.has_unsent() && !state.pipeline.gathers() {
            state.idle_writer()
        } else {
            None
        };
        drop(state);
        wakeups.wake();
        if let Some(writer) = writer {
            writer.ready();
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
