//! The task behind a producer: writes what the pipeline gives, feeds it what the broker answers,
//! and opens the stream again when it breaks.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use millpond_protocol::ErrorClass;
use millpond_protocol::control::{OpenProducer, ProducerOpened, ProducerResume};
use millpond_protocol::frame::{Frame, FrameError, FrameType};
use millpond_protocol::hot::PublishAck;
use quinn::SendStream;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout, timeout_at};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::core::Core;
use super::pipeline::{Next, Verdict};
use crate::backoff::{Backoff, random, retry_after};
use crate::client::Inner;
use crate::connection::Link;
use crate::error::Error;
use crate::io::{self, FrameReader, StreamEnd};
use crate::limits::{FINISH_TIMEOUT, RECONNECT_MAX};
use crate::reopening::{Reopening, StreamFate};
use crate::supervisor::Shared;

/// An open producer stream.
pub struct Stream {
    link: Arc<Link>,
    using: TaskTrackerToken,
    send: SendStream,
    reader: FrameReader,
    pub opened: ProducerOpened,
}

/// Whom a stream is opened for.
#[derive(Clone)]
pub struct Identity {
    pub topic: String,
    pub producer_id: Option<String>,
}

/// Why a stream was left.
enum Ended {
    /// Everything is done and the producer is closed.
    Finished,
    Again,
    Fatal(Error),
}

/// Opens a producer stream; tries again until the deadline if the broker is busy.
pub async fn open(
    shared: &Shared,
    identity: &Identity,
    resume: Option<ProducerResume>,
    deadline: Instant,
) -> Result<Stream, Error> {
    let mut question = OpenProducer {
        topic: identity.topic.clone(),
        producer_id: identity.producer_id.clone(),
        resume,
    };
    let mut backoff = Backoff::default();
    loop {
        let link = shared.link(deadline).await?;
        let opening = io::open(
            &link.connection,
            FrameType::OpenProducer,
            &question,
            FrameType::ProducerOpened,
        );
        let end = match timeout_at(deadline, opening).await {
            Ok(Ok((send, reader, frame))) => {
                return Ok(Stream {
                    using: link.users.token(),
                    link,
                    send,
                    reader,
                    opened: frame.decode()?,
                });
            }
            Ok(Err(end)) => end,
            Err(_) => {
                return Err(Error::Timeout {
                    what: "opening the producer",
                });
            }
        };
        // The broker may have opened it, and the answer was lost: that epoch is ours too.
        if let Some(resume) = &mut question.resume {
            resume.epoch = resume.epoch.next();
        }
        let wait = match &end {
            StreamEnd::Lost => {
                if link.is_over() {
                    // Whatever it was, the next connection has no part in it.
                    backoff = Backoff::default();
                }
                backoff.next(random())
            }
            StreamEnd::Refused(wire) if wire.code.class() == ErrorClass::Retriable => {
                retry_after(wire.retry_after_ms)
            }
            _ => return Err(end.into()),
        };
        if Instant::now() + wait >= deadline {
            return Err(end.into());
        }
        sleep(wait).await;
    }
}

/// Runs a producer until it is closed and done, or dead.
pub async fn run(inner: Arc<Inner>, core: Arc<Core>, identity: Identity, first: Stream) {
    let shared = Arc::clone(&inner.shared);
    let tick =
        (core.send_timeout() / 20).clamp(Duration::from_millis(5), Duration::from_millis(500));
    let ended = tokio::select! {
        ended = serve(&shared, &core, &identity, first) => ended,
        never = expire(&core, tick) => never,
        () = shared.closed.cancelled() => Error::Closed,
    };
    core.end(&ended);
}

/// Serves stream after stream; the error with which the handle ends (`Closed` after a clean end).
async fn serve(shared: &Shared, core: &Core, identity: &Identity, first: Stream) -> Error {
    let mut stream = first;
    let mut reopening = Reopening::default();
    loop {
        let link = Arc::clone(&stream.link);
        let resume = ProducerResume {
            producer: stream.opened.producer,
            epoch: stream.opened.epoch,
            last_known: stream.opened.last_sequence,
        };
        let accepted = core.accepted();
        match serve_stream(shared, core, stream).await {
            Ended::Finished => return Error::Closed,
            Ended::Fatal(error) => return error,
            Ended::Again => {}
        }
        core.lost();
        let fate = StreamFate::of(&link, core.accepted() > accepted);
        drop(link);
        match reopening.after(fate, random()) {
            Ok(wait) => sleep(wait).await,
            Err(error) => return error,
        }
        stream = match reopen(shared, core, identity, resume).await {
            Ok(stream) => stream,
            Err(error) => return error,
        };
        if let Err(error) = core.reopened(&stream.opened) {
            return error;
        }
    }
}

/// Opens the stream again, for as long as it takes.
async fn reopen(
    shared: &Shared,
    core: &Core,
    identity: &Identity,
    resume: ProducerResume,
) -> Result<Stream, Error> {
    let mut resume = Some(ProducerResume {
        last_known: core.accepted().max(resume.last_known),
        ..resume
    });
    loop {
        if core.is_finished() {
            return Err(Error::Closed);
        }
        let deadline = Instant::now() + shared.request_timeout;
        match open(shared, identity, resume, deadline).await {
            Ok(stream) => return Ok(stream),
            // The broker forgot this producer: a new state begins, what was in doubt stays so.
            Err(Error::SequenceExpired) if resume.is_some() => resume = None,
            Err(error) if error.is_retriable() => {
                tracing::debug!(topic = identity.topic, %error, "the producer waits for the broker");
                sleep(Backoff::default().next(random())).await;
            }
            Err(Error::Tls(_) | Error::Version(_)) => {
                sleep(RECONNECT_MAX).await;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn serve_stream(shared: &Shared, core: &Core, stream: Stream) -> Ended {
    let Stream {
        link,
        using: _using,
        mut send,
        mut reader,
        ..
    } = stream;
    let ended = tokio::select! {
        ended = write(core, &mut send) => ended,
        ended = read(core, &mut reader) => ended,
        () = drained(shared, core) => Ended::Finished,
        () = leave(core, &link) => Ended::Again,
    };
    if matches!(ended, Ended::Again) {
        // A clean end would tell the broker to forget an anonymous producer.
        let _ = send.reset(0u32.into());
    } else if send.finish().is_ok() {
        // Lets the last bytes out; the broker needs nothing more from this stream.
        let _ = timeout(FINISH_TIMEOUT, send.stopped()).await;
    }
    ended
}

/// When the broker goes away: sends nothing more, and leaves once everything sent is answered.
async fn leave(core: &Core, link: &Link) {
    link.leaving.cancelled().await;
    core.pause();
    core.answered().await;
}

async fn write(core: &Core, send: &mut SendStream) -> Ended {
    loop {
        match core.next_frame() {
            Next::Write(frame) => {
                let mut chunks: [Bytes; 2] = [frame.prefix, frame.messages];
                if let Err(error) = send.write_all_chunks(&mut chunks).await {
                    return left(error.into());
                }
            }
            Next::Wait(Some(at)) => {
                tokio::select! {
                    () = core.work() => {}
                    () = sleep_until(at.into()) => {}
                }
            }
            Next::Wait(None) => core.work().await,
        }
    }
}

async fn read(core: &Core, reader: &mut FrameReader) -> Ended {
    loop {
        let frame = match reader.next().await {
            Ok(frame) => frame,
            Err(end) => return left(end),
        };
        match answer(core, &frame) {
            Ok(Verdict::Fine) => {}
            Ok(Verdict::Reopen) => return Ended::Again,
            Ok(Verdict::Fatal(error)) => return Ended::Fatal(error),
            Err(what) => {
                tracing::warn!(what, "the broker broke the protocol");
                return Ended::Again;
            }
        }
    }
}

fn answer(core: &Core, frame: &Frame) -> Result<Verdict, String> {
    let malformed = |error: FrameError| error.to_string();
    match frame.kind {
        FrameType::PublishAck => {
            let ack = PublishAck::decode(&frame.body).map_err(malformed)?;
            core.acked(&ack).map(|()| Verdict::Fine)
        }
        FrameType::PublishRefused => core.refused(&frame.decode().map_err(malformed)?),
        found => Err(malformed(FrameError::Unexpected { found })),
    }
}

/// A stream that ended: only what ends the producer is fatal; the rest is tried again.
fn left(end: StreamEnd) -> Ended {
    match &end {
        StreamEnd::Refused(wire) => match Error::from(wire.clone()) {
            Error::Fenced => Ended::Fatal(Error::Fenced),
            error => {
                tracing::info!(%error, "the broker ended a producer's stream");
                Ended::Again
            }
        },
        StreamEnd::Malformed(what) => {
            tracing::warn!(what, "the broker broke the protocol");
            Ended::Again
        }
        StreamEnd::Lost => Ended::Again,
    }
}

/// Returns once the producer is closed and everything is answered.
async fn drained(shared: &Shared, core: &Core) {
    let draining = async {
        shared.draining.cancelled().await;
        core.close();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = draining => {}
        () = core.finished() => {}
    }
}

/// Gives up what is too old, as long as the producer lives.
async fn expire(core: &Core, tick: Duration) -> Error {
    let mut ticks = interval(tick);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        core.expire();
    }
}
