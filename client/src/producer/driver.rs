//! The task behind a producer: holds its place on a publish stream, and takes another one when it is
//! lost. Writing and reading are the stream's.

use std::sync::Arc;
use std::time::Duration;

use millpond_protocol::control::{OpenProducer, ProducerOpened, ProducerResume};
use millpond_protocol::{ErrorClass, ErrorCode, ProducerHandle};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout_at};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::core::Core;
use super::stream::{Lost, Seat};
use crate::backoff::{Backoff, random, retry_after};
use crate::client::Inner;
use crate::connection::Link;
use crate::error::Error;
use crate::io::StreamEnd;
use crate::limits::RECONNECT_MAX;
use crate::reopening::{Reopening, StreamFate};
use crate::supervisor::Shared;

/// An open producer on a publish stream.
pub struct Stream {
    link: Arc<Link>,
    using: TaskTrackerToken,
    seat: Seat,
    pub opened: ProducerOpened,
}

impl Stream {
    /// Lets the producer write there.
    pub fn begin(&mut self, core: &Arc<Core>) {
        self.seat.take(Arc::clone(core));
        core.begin(self.seat.place());
    }
}

/// Whom it is opened for.
#[derive(Clone)]
pub struct Identity {
    pub topic: String,
    pub producer_id: Option<String>,
}

/// The incarnation as which a producer comes back.
///
/// Of the openings that name one epoch the broker takes one at most, and fences the others. So an
/// opening whose answer was lost is asked for again as it was. If that is fenced, it may be by the
/// lost one, whose epoch is named then. To name more from the beginning would fence a successor
/// that somebody else has opened.
pub struct Incarnation {
    resume: ProducerResume,
    /// An opening that named this epoch was not answered.
    is_in_doubt: bool,
}

impl Incarnation {
    /// Whether it may have fenced itself; it is the next one from now on.
    fn has_fenced_itself(&mut self) -> bool {
        let may_have = std::mem::take(&mut self.is_in_doubt);
        if may_have {
            self.resume.epoch = self.resume.epoch.next();
        }
        may_have
    }
}

/// Opens a producer; tries again until the deadline if the broker is busy.
pub async fn open(
    shared: &Shared,
    identity: &Identity,
    incarnation: &mut Option<Incarnation>,
    deadline: Instant,
) -> Result<Stream, Error> {
    let mut backoff = Backoff::default();
    loop {
        let link = shared.link(deadline).await?;
        let question = OpenProducer {
            // Given where it is seated.
            handle: ProducerHandle(0),
            topic: identity.topic.clone(),
            producer_id: identity.producer_id.clone(),
            resume: incarnation.as_ref().map(|known| known.resume),
        };
        let streams = &link.publishing;
        let opening = streams.open(shared, &link.connection, question);
        let answer = timeout_at(deadline, opening).await;
        if let (Some(known), Err(_) | Ok(Err(StreamEnd::Lost))) = (incarnation.as_mut(), &answer) {
            known.is_in_doubt = true;
        }
        let end = match answer {
            Ok(Ok((seat, opened))) => {
                return Ok(Stream {
                    using: link.users.token(),
                    link,
                    seat,
                    opened,
                });
            }
            Ok(Err(end)) => end,
            Err(_) => {
                return Err(Error::Timeout {
                    what: "opening the producer",
                });
            }
        };
        let is_fenced =
            matches!(&end, StreamEnd::Refused(wire) if wire.code == ErrorCode::ProducerFenced);
        let known = incarnation.as_mut();
        if is_fenced && known.is_some_and(Incarnation::has_fenced_itself) {
            continue;
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
async fn serve(shared: &Shared, core: &Arc<Core>, identity: &Identity, first: Stream) -> Error {
    let mut stream = first;
    let mut reopening = Reopening::default();
    loop {
        let link = Arc::clone(&stream.link);
        let resume = ProducerResume {
            producer: stream.opened.producer,
            epoch: stream.opened.epoch,
            last_known: stream.opened.last_sequence,
        };
        let (accepted, started) = (core.accepted(), Instant::now());
        match serve_stream(shared, core, stream).await {
            None => return Error::Closed,
            Some(Lost::Fatal(error)) => return error,
            Some(Lost::Again) => {}
        }
        core.lost();
        // One that had nothing to send has been of use if it lasted.
        let was_of_use = core.accepted() > accepted || started.elapsed() > RECONNECT_MAX;
        let fate = StreamFate::of(&link, was_of_use);
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
        stream.begin(core);
    }
}

/// Opens the stream again, for as long as it takes.
async fn reopen(
    shared: &Shared,
    core: &Core,
    identity: &Identity,
    resume: ProducerResume,
) -> Result<Stream, Error> {
    let mut incarnation = Some(Incarnation {
        resume: ProducerResume {
            last_known: core.accepted().max(resume.last_known),
            ..resume
        },
        is_in_doubt: false,
    });
    loop {
        if core.is_finished() {
            return Err(Error::Closed);
        }
        let deadline = Instant::now() + shared.request_timeout;
        match open(shared, identity, &mut incarnation, deadline).await {
            Ok(stream) => return Ok(stream),
            // The broker forgot this producer: a new state begins, what was in doubt stays so.
            Err(Error::SequenceExpired) if incarnation.is_some() => incarnation = None,
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

/// Holds the place until it is lost; `None`: until everything is done and the producer is closed.
async fn serve_stream(shared: &Shared, core: &Arc<Core>, stream: Stream) -> Option<Lost> {
    let Stream {
        link,
        using: _using,
        mut seat,
        ..
    } = stream;
    tokio::select! {
        lost = seat.lost() => return Some(lost),
        () = leave(core, &link) => return Some(Lost::Again),
        () = drained(shared, core) => {}
    }
    seat.finish().await;
    None
}

/// When the broker goes away: sends nothing more, and leaves once everything sent is answered.
async fn leave(core: &Core, link: &Link) {
    link.leaving.cancelled().await;
    core.pause();
    core.answered().await;
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
