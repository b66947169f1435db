//! The task behind a consumer: two streams, four directions, one session; opened again when they
//! break.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use millpond_protocol::ErrorClass;
use millpond_protocol::control::{
    ConsumerOpened, CreateSubscription, OpenConsumer, OpenSettlements, SessionResume,
};
use millpond_protocol::frame::{self, FrameType};
use millpond_protocol::hot::ConsumerCredit;
use quinn::SendStream;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::hear::{hear, receive};
use super::session::{Session, SettleNext};
use crate::backoff::{Backoff, random, retry_after};
use crate::client::Inner;
use crate::connection::Link;
use crate::error::Error;
use crate::io::{self, FrameReader, StreamEnd};
use crate::limits::RECONNECT_MAX;
use crate::reopening::{Reopening, StreamFate};
use crate::supervisor::Shared;

/// What a consumer asks for when it opens.
#[derive(Clone)]
pub struct Identity {
    pub topic: String,
    pub subscription: String,
    pub create: Option<CreateSubscription>,
    pub consumer_name: String,
}

/// The open streams of a session.
pub struct Streams {
    link: Arc<Link>,
    using: TaskTrackerToken,
    delivery_send: SendStream,
    deliveries: FrameReader,
    settle_send: SendStream,
    answers: FrameReader,
    pub opened: ConsumerOpened,
}

/// Why a session's streams were left.
enum Ended {
    /// The session was closed and the broker has confirmed it.
    Finished,
    /// A seek has made them void.
    Sought,
    Again,
}

/// Opens a session; tries again until the deadline if the broker is busy.
pub async fn open(
    shared: &Shared,
    identity: &Identity,
    resume: Option<SessionResume>,
    deadline: Instant,
) -> Result<Streams, Error> {
    let question = OpenConsumer {
        topic: identity.topic.clone(),
        subscription: identity.subscription.clone(),
        create: identity.create.clone(),
        resume,
        consumer_name: identity.consumer_name.clone(),
    };
    let mut backoff = Backoff::default();
    loop {
        let link = shared.link(deadline).await?;
        let opening = open_once(&link, &question);
        let end = match timeout_at(deadline, opening).await {
            Ok(Ok(streams)) => return Ok(streams),
            Ok(Err(end)) => end,
            Err(_) => {
                return Err(Error::Timeout {
                    what: "opening the subscription",
                });
            }
        };
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

async fn open_once(link: &Arc<Link>, question: &OpenConsumer) -> Result<Streams, StreamEnd> {
    let connection = &link.connection;
    let (delivery_send, deliveries, first) = io::open(
        connection,
        FrameType::OpenConsumer,
        question,
        FrameType::ConsumerOpened,
    )
    .await?;
    let opened: ConsumerOpened = first.decode()?;
    let settlements = OpenSettlements {
        session: opened.session,
        token: opened.token,
    };
    let (settle_send, answers, _) = io::open(
        connection,
        FrameType::OpenSettlements,
        &settlements,
        FrameType::SettlementsOpened,
    )
    .await?;
    Ok(Streams {
        link: Arc::clone(link),
        using: link.users.token(),
        delivery_send,
        deliveries,
        settle_send,
        answers,
        opened,
    })
}

/// Runs a session until it is closed, or cannot go on.
pub async fn run(inner: Arc<Inner>, session: Arc<Session>, identity: Identity, first: Streams) {
    let shared = Arc::clone(&inner.shared);
    let error = tokio::select! {
        error = serve(&shared, &session, &identity, first) => error,
        never = drain(&shared, &session) => never,
        () = session.ended() => Error::Closed,
        () = shared.closed.cancelled() => Error::Closed,
    };
    session.end(&error);
}

/// Serves streams after streams; the error with which the session ends (`Closed` after a clean end).
async fn serve(shared: &Shared, session: &Session, identity: &Identity, first: Streams) -> Error {
    let mut streams = first;
    let mut reopening = Reopening::default();
    loop {
        let (link, started) = (Arc::clone(&streams.link), Instant::now());
        let ended = match serve_streams(session, streams).await {
            Ok(Ended::Finished) => return Error::Closed,
            Ok(ended) => ended,
            Err(error) => return error,
        };
        session.stream_lost();
        let fate = StreamFate::of(&link, started.elapsed() > RECONNECT_MAX);
        drop(link);
        if let Ended::Again = ended {
            match reopening.after(fate, random()) {
                Ok(wait) => sleep(wait).await,
                Err(error) => return error,
            }
        }
        streams = match reopen(shared, session, identity).await {
            Ok(streams) => streams,
            Err(error) => return error,
        };
        session.reopened(&streams.opened);
    }
}

/// Opens the session again, for as long as it takes.
async fn reopen(shared: &Shared, session: &Session, identity: &Identity) -> Result<Streams, Error> {
    let mut resume = Some(session.resume());
    let mut backoff = Backoff::default();
    loop {
        let deadline = Instant::now() + shared.request_timeout;
        match open(shared, identity, resume, deadline).await {
            Ok(streams) => return Ok(streams),
            Err(Error::SessionEnded) if resume.is_some() => resume = None,
            // Even a new session may be over before its second stream is open.
            Err(error) if error.is_retriable() || error == Error::SessionEnded => {
                tracing::debug!(%error, "the consumer waits for the broker");
                if Instant::now() >= deadline {
                    // It has waited for a connection, whose pace is the supervisor's business.
                    backoff = Backoff::default();
                }
                sleep(backoff.next(random())).await;
            }
            Err(Error::Tls(_) | Error::Version(_)) => sleep(RECONNECT_MAX).await,
            Err(error) => return Err(error),
        }
    }
}

async fn serve_streams(session: &Session, streams: Streams) -> Result<Ended, Error> {
    let Streams {
        link,
        using: _using,
        mut delivery_send,
        mut deliveries,
        mut settle_send,
        mut answers,
        ..
    } = streams;
    let mut end = tokio::select! {
        end = grant(session, &mut delivery_send) => end,
        end = receive(session, &mut deliveries) => end,
        end = settle(session, &mut settle_send) => end,
        end = hear(session, &mut answers) => match end {
            Ok(()) => return Ok(Ended::Finished),
            Err(end) => end,
        },
        () = leave(session, &link) => StreamEnd::Lost,
        () = session.must_reopen() => return Ok(Ended::Sought),
    };
    if session.is_close_sent() {
        // The broker ends the other streams too; what counts is its word on this one.
        match hear(session, &mut answers).await {
            Ok(()) => return Ok(Ended::Finished),
            Err(heard) => end = heard,
        }
    }
    match end {
        StreamEnd::Refused(wire) => match Error::from(wire) {
            error if error.class() == ErrorClass::RequestFatal => Err(error),
            error => {
                tracing::info!(%error, "the broker ended a consumer's stream");
                Ok(Ended::Again)
            }
        },
        StreamEnd::Malformed(what) => {
            tracing::warn!(what, "the broker broke the protocol");
            Ok(Ended::Again)
        }
        StreamEnd::Lost => Ok(Ended::Again),
    }
}

/// Writes credit, and how far the user has come, whenever either has changed.
async fn grant(session: &Session, send: &mut SendStream) -> StreamEnd {
    let mut written = ConsumerCredit::default();
    loop {
        let credit = session.credit();
        if credit == written {
            session.credit_work().await;
            continue;
        }
        if let Err(error) = send.write_chunk(credit.encode()).await {
            return error.into();
        }
        written = credit;
        // Lets others run, so that what changes meanwhile goes into one frame.
        tokio::task::yield_now().await;
    }
}

async fn settle(session: &Session, send: &mut SendStream) -> StreamEnd {
    let every = Duration::from_millis((session.lease_ms() / 3).max(1));
    let mut renew_at = Instant::now() + every;
    loop {
        if Instant::now() >= renew_at {
            renew_at = Instant::now() + every;
            if session.holds_leases()
                && let Err(end) = put(send, frame::empty(FrameType::Renew)).await
            {
                return end;
            }
        }
        let bytes = match session.next_settlement() {
            SettleNext::Write(bytes) => bytes,
            SettleNext::Close => frame::empty(FrameType::CloseSession),
            SettleNext::Wait => {
                tokio::select! {
                    () = session.settle_work() => {}
                    () = sleep_until(renew_at) => {}
                }
                continue;
            }
        };
        if let Err(end) = put(send, bytes).await {
            return end;
        }
        // As in `grant`.
        tokio::task::yield_now().await;
    }
}

async fn put(send: &mut SendStream, bytes: Bytes) -> Result<(), StreamEnd> {
    Ok(send.write_chunk(bytes).await?)
}

/// When the broker goes away: hands out nothing more, and leaves once everything is settled.
async fn leave(session: &Session, link: &Link) {
    link.leaving.cancelled().await;
    session.pause();
    session.all_settled().await;
}

/// Closes the session when the client is closed.
async fn drain(shared: &Shared, session: &Session) -> Error {
    shared.draining.cancelled().await;
    session.close();
    std::future::pending().await
}
