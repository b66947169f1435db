//! A publish stream: what the producers of one connection share.
//!
//! Owns the handles and whose turn it is to write; what the broker answers is in `stream/answers.rs`. One
//! task writes and reads for all of them, so that what many of them have goes out in few writes. Turns are
//! fair by frame, and a frame is bounded. What a producer sends is its pipeline's business, when it comes
//! back its driver's; a producer that ends, or breaks the protocol with the broker, leaves the others alone.
//!
//! The broker may answer to a producer that has left; a handle is never used twice, so such an answer
//! finds nobody.

mod answers;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};
use millpond_protocol::control::{CloseProducer, Leaving, OpenProducer, ProducerOpened};
use millpond_protocol::frame::{self, FrameType};
use millpond_protocol::hot::Publish;
use millpond_protocol::limits::STREAM_PRODUCERS_MAX;
use millpond_protocol::{ProducerHandle, WireError};
use parking_lot::Mutex;
use quinn::{Connection, SendStream};
use tokio::sync::{Notify, oneshot};
use tokio::time::{sleep_until, timeout};

use super::core::Core;
use super::pipeline::{Next, PublishFrame};
use crate::error::Error;
use crate::io::{self, FrameReader, StreamEnd};
use crate::limits::{COPY_BYTES_MAX, FINISH_TIMEOUT, WRITE_BYTES_TARGET};
use crate::supervisor::Shared;

/// The publish streams of one connection: one, until it is full.
#[derive(Default)]
pub struct PublishStreams {
    open: tokio::sync::Mutex<Vec<Arc<PublishStream>>>,
}

impl PublishStreams {
    /// Opens a producer on a stream that has room for it. `question` gets its handle here.
    pub async fn open(
        &self,
        shared: &Shared,
        connection: &Connection,
        question: OpenProducer,
    ) -> Result<(Seat, ProducerOpened), StreamEnd> {
        let (seat, answer) = {
            let mut open = self.open.lock().await;
            open.retain(|stream| !stream.state.lock().over);
            let seated = open.iter().find_map(|stream| stream.seat(&question));
            match seated {
                Some(seated) => seated?,
                None => {
                    let opened = connection.open_bi().await;
                    let (send, recv) = opened.map_err(|_| StreamEnd::Lost)?;
                    let stream = Arc::new(PublishStream::default());
                    // Before its task runs, which ends it if the connection is gone already.
                    let seated = stream.seat(&question);
                    let task = run(Arc::clone(&stream), send, FrameReader::new(recv));
                    shared.streams.spawn(task);
                    open.push(stream);
                    seated.expect("it is empty, and nothing has ended it yet")?
                }
            }
        };
        match answer.await {
            Ok(Ok(opened)) => Ok((seat, opened)),
            Ok(Err(error)) => Err(StreamEnd::Refused(error)),
            Err(_) => Err(StreamEnd::Lost),
        }
    }
}

/// One stream with its producers.
#[derive(Default)]
pub struct PublishStream {
    state: Mutex<State>,
    /// The writer has something to do.
    work: Notify,
}

#[derive(Default)]
struct State {
    /// The last handle given out.
    highest: ProducerHandle,
    members: HashMap<ProducerHandle, Member>,
    /// What the writer has not looked at: at most one turn, an opening and a closing a producer.
    todo: VecDeque<Todo>,
    /// The writer waits for `work`.
    writer_idle: bool,
    over: bool,
}

enum Todo {
    Write(Bytes),
    Turn(ProducerHandle),
}

struct Member {
    /// Whoever waits for the answer to its opening.
    opening: Option<oneshot::Sender<Result<ProducerOpened, WireError>>>,
    core: Option<Arc<Core>>,
    ended: Option<oneshot::Sender<Lost>>,
}

/// How a producer lost its place.
#[derive(Debug)]
pub enum Lost {
    /// It takes another one.
    Again,
    Fatal(Error),
}

/// Names a producer's place on a stream.
#[derive(Clone)]
pub struct Place {
    stream: Arc<PublishStream>,
    handle: ProducerHandle,
}

impl Place {
    /// The producer there has something to write. It must not say so again before it was asked.
    pub fn ready(&self) {
        self.stream.push(Todo::Turn(self.handle));
    }

    pub fn is(&self, stream: &PublishStream, handle: ProducerHandle) -> bool {
        self.handle == handle && std::ptr::eq(&*self.stream, stream)
    }
}

/// A producer's place, held. Dropping it leaves the stream.
pub struct Seat {
    place: Place,
    ended: oneshot::Receiver<Lost>,
    /// What the broker is told when the seat is dropped.
    leaving: Leaving,
}

impl Seat {
    pub fn place(&self) -> Place {
        self.place.clone()
    }

    /// From now on answers go to this producer. It may come back once it has left.
    pub fn take(&mut self, core: Arc<Core>) {
        self.leaving = Leaving::ForNow;
        let mut state = self.place.stream.state.lock();
        if let Some(member) = state.members.get_mut(&self.place.handle) {
            member.core = Some(core);
        }
    }

    /// Returns when the broker, or the loss of the stream, has ended it.
    pub async fn lost(&mut self) -> Lost {
        (&mut self.ended).await.unwrap_or(Lost::Again)
    }

    /// Leaves for good, and waits a moment until the broker knows.
    pub async fn finish(mut self) {
        self.leaving = Leaving::ForGood;
        self.place
            .stream
            .say_goodbye(self.place.handle, self.leaving);
        let _ = timeout(FINISH_TIMEOUT, &mut self.ended).await;
        self.place
            .stream
            .state
            .lock()
            .members
            .remove(&self.place.handle);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let Place { stream, handle } = &self.place;
        let member = stream.state.lock().members.remove(handle);
        if member.is_some() {
            stream.say_goodbye(*handle, self.leaving);
        }
    }
}

type Answer = oneshot::Receiver<Result<ProducerOpened, WireError>>;

impl PublishStream {
    /// A place for another producer, asked for; `None` if there is no room.
    fn seat(
        self: &Arc<Self>,
        question: &OpenProducer,
    ) -> Option<Result<(Seat, Answer), StreamEnd>> {
        let (tell_opened, answer) = oneshot::channel();
        let (tell_ended, ended) = oneshot::channel();
        let mut state = self.state.lock();
        let handle = state.highest.next();
        if state.over || state.members.len() >= STREAM_PRODUCERS_MAX || handle == state.highest {
            return None;
        }
        let question = OpenProducer {
            handle,
            ..question.clone()
        };
        let frame = match io::encode(FrameType::OpenProducer, &question) {
            Ok(frame) => frame,
            Err(end) => return Some(Err(end)),
        };
        state.highest = handle;
        let member = Member {
            opening: Some(tell_opened),
            core: None,
            ended: Some(tell_ended),
        };
        state.members.insert(handle, member);
        self.push_to(state, Todo::Write(frame));
        let place = Place {
            stream: Arc::clone(self),
            handle,
        };
        let leaving = match question.resume {
            Some(_) => Leaving::ForNow,
            None => Leaving::ForGood,
        };
        let seat = Seat {
            place,
            ended,
            leaving,
        };
        Some(Ok((seat, answer)))
    }

    fn say_goodbye(&self, handle: ProducerHandle, leaving: Leaving) {
        let close = CloseProducer { handle, leaving };
        let frame = frame::encode(FrameType::CloseProducer, &close);
        self.push(Todo::Write(frame.expect("two small numbers")));
    }

    fn push(&self, todo: Todo) {
        self.push_to(self.state.lock(), todo);
    }

    fn push_to(&self, mut state: parking_lot::MutexGuard<'_, State>, todo: Todo) {
        if state.over {
            return;
        }
        state.todo.push_back(todo);
        let wake = std::mem::take(&mut state.writer_idle);
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    /// Writes what the producers have, turn by turn.
    async fn write(&self, send: &mut SendStream) -> StreamEnd {
        let mut turns = Turns::default();
        let mut out = Outgoing::default();
        loop {
            turns.ring(Instant::now());
            self.take_todo(&mut turns, &mut out);
            self.gather(&mut turns, &mut out);
            if out.bytes > 0 {
                if let Err(error) = send.write_all_chunks(&mut out.pieces()).await {
                    return error.into();
                }
                continue;
            }
            if !self.is_idle() {
                continue;
            }
            match turns.next_alarm() {
                None => self.work.notified().await,
                Some(at) => tokio::select! {
                    () = self.work.notified() => {}
                    () = sleep_until(at.into()) => {}
                },
            }
        }
    }

    /// True if there is nothing to do; whoever brings something will say so then.
    fn is_idle(&self) -> bool {
        let mut state = self.state.lock();
        state.writer_idle = state.todo.is_empty();
        state.writer_idle
    }

    fn take_todo(&self, turns: &mut Turns, out: &mut Outgoing) {
        let mut state = self.state.lock();
        let State { todo, members, .. } = &mut *state;
        for handle in turns.rung.drain(..) {
            turns.queue.extend(turn(members, handle));
        }
        for todo in todo.drain(..) {
            match todo {
                Todo::Write(frame) => out.put(&frame),
                Todo::Turn(handle) => turns.queue.extend(turn(members, handle)),
            }
        }
    }

    /// A frame from each in turn, until there is enough for a write.
    fn gather(&self, turns: &mut Turns, out: &mut Outgoing) {
        while out.bytes < WRITE_BYTES_TARGET {
            let Some((handle, core)) = turns.queue.pop_front() else {
                return;
            };
            match core.next_frame(self, handle) {
                Next::Write(frame) => {
                    let more = frame.more;
                    out.publish(handle, frame);
                    if more {
                        turns.queue.push_back((handle, core));
                    }
                }
                Next::Wait(Some(at)) => turns.set_alarm(handle, at),
                Next::Wait(None) => {}
            }
        }
    }

    /// Everybody is told by the loss of what they wait for.
    fn close(&self, end: &StreamEnd) {
        match end {
            StreamEnd::Lost => {}
            StreamEnd::Refused(error) => {
                tracing::info!(%error, "the broker ended a publish stream");
            }
            StreamEnd::Malformed(what) => tracing::warn!(what, "the broker broke the protocol"),
        }
        let mut state = self.state.lock();
        state.over = true;
        state.todo.clear();
        let members = std::mem::take(&mut state.members);
        drop(state);
        drop(members);
    }
}

/// Writes and reads until the stream is of no more use.
async fn run(stream: Arc<PublishStream>, mut send: SendStream, mut reader: FrameReader) {
    let end = tokio::select! {
        end = stream.write(&mut send) => end,
        end = stream.read(&mut reader) => end,
    };
    // A clean end would tell the broker to forget anonymous producers.
    let _ = send.reset(0u32.into());
    stream.close(&end);
}

fn turn(
    members: &HashMap<ProducerHandle, Member>,
    handle: ProducerHandle,
) -> Option<(ProducerHandle, Arc<Core>)> {
    let core = members.get(&handle)?.core.as_ref()?;
    Some((handle, Arc::clone(core)))
}

/// Who is to be asked for a frame, and who at what time. One alarm a producer.
#[derive(Default)]
struct Turns {
    queue: VecDeque<(ProducerHandle, Arc<Core>)>,
    rung: Vec<ProducerHandle>,
    by_time: BTreeSet<(Instant, ProducerHandle)>,
    of: BTreeMap<ProducerHandle, Instant>,
}

impl Turns {
    fn set_alarm(&mut self, handle: ProducerHandle, at: Instant) {
        if let Some(before) = self.of.insert(handle, at) {
            self.by_time.remove(&(before, handle));
        }
        self.by_time.insert((at, handle));
    }

    /// Those whose time has come.
    fn ring(&mut self, now: Instant) {
        while let Some(&(at, handle)) = self.by_time.first()
            && at <= now
        {
            self.by_time.pop_first();
            self.of.remove(&handle);
            self.rung.push(handle);
        }
    }

    fn next_alarm(&self) -> Option<Instant> {
        self.by_time.first().map(|&(at, _)| at)
    }
}

/// What one write takes. Small frames are copied behind one another: QUIC looks for every packet's
/// bytes among the pieces that it has, so a thousand small pieces would cost more than the copy.
#[derive(Default)]
struct Outgoing {
    large: Vec<Bytes>,
    small: BytesMut,
    bytes: usize,
}

impl Outgoing {
    fn put(&mut self, bytes: &[u8]) {
        self.small.put_slice(bytes);
        self.bytes += bytes.len();
    }

    fn publish(&mut self, handle: ProducerHandle, frame: PublishFrame) {
        let bytes = frame.messages.len();
        self.put(&Publish::prefix(handle, frame.previous, frame.count, bytes));
        if bytes <= COPY_BYTES_MAX {
            self.put(&frame.messages);
        } else {
            self.large.push(self.small.split().freeze());
            self.large.push(frame.messages);
            self.bytes += bytes;
        }
    }

    fn pieces(&mut self) -> Vec<Bytes> {
        self.bytes = 0;
        let mut pieces = std::mem::take(&mut self.large);
        if !self.small.is_empty() {
            pieces.push(self.small.split().freeze());
        }
        pieces
    }
}
