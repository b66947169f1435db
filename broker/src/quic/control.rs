//! The control stream: requests in, responses out, and `GoAway` when the broker drains.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use millpond_protocol::control::{
    GoAway, PeekedMessage, Request, RequestFrame, Response, ResponseFrame,
};
use millpond_protocol::frame::{FrameError, FrameType};
use millpond_protocol::limits::{CONTROL_BYTES_MAX, FRAME_BYTES_MAX};
use millpond_protocol::{ErrorCode, Offset, StartAt, WireError};
use millpond_queue::StartPosition;
use millpond_wal::storage::Storage;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::both::both;
use super::connection::{Peer, REVOKED};
use super::consumer::{DEPARTURE, STALLED_MAX, departs};
use super::frames::{FrameReader, FrameWriter, StreamError};
use super::letters;
use super::{Context, inbound};
use crate::bodies::{BodyError, Run};
use crate::mailbox::Mailbox;
use crate::memory::{Class, Permit};
use crate::shard::PEEK_HOLES_MAX;
use crate::shard::io::{Answer, Elsewhere, Input, Output, ResolvedRequest, StreamId};
use crate::token;

/// Bytes of one page of an answer; what does not fit is on the next page. A message that is larger
/// has a page to itself.
const PAGE_BYTES: usize = CONTROL_BYTES_MAX / 2;

/// Runs a connection's control stream to its end; the reason is for the connection's close.
pub async fn run<S: Storage>(
    context: Arc<Context<S>>,
    peer: Peer,
    mut writer: FrameWriter,
    reader: FrameReader,
) -> Option<WireError> {
    let Ok(mut registered) = context.register().await else {
        return None;
    };
    let session = Session {
        context: &context,
        peer: &peer,
        asked: Mutex::default(),
    };
    let reading = session.read(reader, registered.id);
    let writing = session.write(&mut writer, &mut registered.outputs);
    let result = both(reading, registered.own, writing).await;
    context.unregister(registered.id).await;
    match result {
        Ok(()) => {
            writer.finish();
            None
        }
        Err(StreamError::Refused(error)) => {
            writer.end(&error).await;
            Some(error)
        }
        Err(error) => {
            tracing::debug!(client = peer.client_name, %error, "control stream ended");
            None
        }
    }
}

/// Requests of one connection that are taken in and not answered. Each may cost an answer of the
/// largest size, which nobody may ever read.
const REQUESTS_MAX: usize = 8;

/// The text of a new token, kept here until its hash is durable.
type Secret = Option<(String, String)>;

/// A request that the shard has, until its answer is written.
struct Asked {
    /// The client's.
    id: u64,
    secret: Secret,
    _slot: OwnedSemaphorePermit,
    _permit: Option<Permit>,
}

struct Session<'a, S: Storage> {
    context: &'a Context<S>,
    peer: &'a Peer,
    /// By the broker's own number for it: a client may name two requests alike.
    asked: Mutex<BTreeMap<u64, Asked>>,
}

impl<S: Storage> Session<'_, S> {
    /// Takes requests in, at most `REQUESTS_MAX` unanswered ones.
    async fn read(&self, mut reader: FrameReader, stream: StreamId) -> Result<(), StreamError> {
        let share = &self.peer.share;
        let slots = Arc::new(Semaphore::new(REQUESTS_MAX));
        let mut number = 0;
        while let Some((frame, permit)) =
            inbound::take(self.context, &mut reader, share, &[FrameType::Request]).await?
        {
            let RequestFrame { id, request } = frame.decode()?;
            let (request, secret) = match Box::pin(self.resolve(request)).await {
                Ok(resolved) => resolved,
                Err(StreamError::Refused(error)) => (ResolvedRequest::Refused(error), None),
                Err(error) => return Err(error),
            };
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return Ok(());
            };
            number += 1;
            let kept = Asked {
                id,
                secret,
                _slot: slot,
                _permit: permit,
            };
            self.asked.lock().insert(number, kept);
            self.context
                .shard
                .input(Input::Request {
                    stream,
                    id: number,
                    request,
                })
                .await?;
        }
        Ok(())
    }

    /// Does what only a session can: turns times into offsets, draws tokens.
    async fn resolve(&self, request: Request) -> Result<(ResolvedRequest, Secret), StreamError> {
        match &request {
            Request::SubscriptionCreate { topic, start, .. } => {
                let start = resolve_start(self.context, topic, *start).await?;
                Ok((ResolvedRequest::At(request, start), None))
            }
            Request::SubscriptionSeek { topic, to, .. } => {
                let start = resolve_start(self.context, topic, *to).await?;
                Ok((ResolvedRequest::At(request, start), None))
            }
            Request::TokenNew { name } => {
                let (text, hash) = token::new_token();
                let name = name.clone();
                Ok((
                    ResolvedRequest::TokenAdd {
                        name: name.clone(),
                        hash,
                    },
                    Some((name, text)),
                ))
            }
            _ => Ok((ResolvedRequest::Plain(request), None)),
        }
    }

    async fn write(
        &self,
        writer: &mut FrameWriter,
        outputs: &mut Mailbox<Output>,
    ) -> Result<(), StreamError> {
        let mut draining = self.context.draining.clone();
        let mut told = false;
        loop {
            let output = tokio::select! {
                output = outputs.recv() => output,
                drains = drained(&mut draining), if !told => {
                    told = true;
                    if drains {
                        Box::pin(self.go_away(writer)).await?;
                    }
                    continue;
                }
            };
            match output {
                Output::Response { id: number, answer } => {
                    let asked = self.asked.lock().remove(&number);
                    let Some(mut asked) = asked else {
                        continue;
                    };
                    // Boxed, because an idle connection would keep the size of the longest answer.
                    Box::pin(self.answer(writer, &mut asked, *answer)).await?;
                }
                Output::Revoked { token } if self.peer.token.as_ref() == Some(&token) => {
                    return Err(WireError::new(ErrorCode::Unauthorized, REVOKED).into());
                }
                Output::End(error) => return Err(error.into()),
                _ => {}
            }
        }
    }

    async fn answer(
        &self,
        writer: &mut FrameWriter,
        asked: &mut Asked,
        answer: Answer,
    ) -> Result<(), StreamError> {
        let _paid = self.pay(&answer).await?;
        let result = self.complete(answer, asked.secret.take()).await;
        let id = asked.id;
        let responding = self.respond(writer, ResponseFrame { id, result });
        self.in_time(responding).await
    }

    /// Memory for a page of bodies, and for the largest of them.
    async fn pay(&self, answer: &Answer) -> Result<Option<Permit>, WireError> {
        if matches!(answer, Answer::Ready(_)) {
            return Ok(None);
        }
        self.peer.windows.sends();
        let (bytes, class) = (FRAME_BYTES_MAX as u64, Class::Outbound);
        let permit = self.context.memory.acquire(bytes, class, &self.peer.share);
        Ok(Some(permit.await?))
    }

    /// While others wait for memory, an asker may not keep an answer's by not reading it.
    async fn in_time(
        &self,
        responding: impl Future<Output = Result<(), StreamError>>,
    ) -> Result<(), StreamError> {
        let is_wanted = || self.context.memory.is_wanted(&self.peer.share);
        let departed = departs(responding, DEPARTURE, STALLED_MAX, is_wanted).await;
        departed.unwrap_or_else(|| {
            let text = "it did not read an answer in time";
            Err(StreamError::Gone(text.to_owned()))
        })
    }

    async fn go_away(&self, writer: &mut FrameWriter) -> Result<(), StreamError> {
        let deadline_ms = u32::try_from(self.context.config.shutdown_grace_ms).unwrap_or(u32::MAX);
        let reason = "the broker is shutting down".to_owned();
        writer
            .write_control(
                FrameType::GoAway,
                &GoAway {
                    deadline_ms,
                    reason,
                },
            )
            .await
    }

    async fn respond(
        &self,
        writer: &mut FrameWriter,
        response: ResponseFrame,
    ) -> Result<(), StreamError> {
        let id = response.id;
        match millpond_protocol::frame::encode(FrameType::Response, &response) {
            Ok(frame) => writer.write(frame).await,
            Err(FrameError::TooLong { .. }) => {
                let text = "the answer is too long for one frame; ask for fewer rows";
                let result = Err(WireError::new(ErrorCode::TooLarge, text));
                writer
                    .write_control(FrameType::Response, &ResponseFrame { id, result })
                    .await
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Adds what the shard does not have: bodies, the text of a token, the broker's surroundings.
    async fn complete(&self, answer: Answer, secret: Secret) -> Result<Response, WireError> {
        match (answer, secret) {
            (Answer::Ready(result), secret) => match (*result, secret) {
                (Ok(_), Some((name, token))) => Ok(Response::Token { name, token }),
                (Ok(Response::Status(mut status)), _) => {
                    self.context.look.complete(&mut status);
                    Ok(Response::Status(status))
                }
                (result, _) => result,
            },
            (
                Answer::Peek {
                    topic,
                    first,
                    end,
                    next,
                    elsewhere,
                    limit,
                },
                _,
            ) => {
                let page = Page {
                    topic,
                    first,
                    end,
                    next,
                    limit,
                };
                self.peek(page, elsewhere).await.map_err(unreadable)
            }
            (
                Answer::DeadLetters {
                    letters,
                    next,
                    more,
                },
                _,
            ) => self.letters(letters, next, more).await,
        }
    }

    /// One message, whatever its size, copied out of what it was read with.
    async fn body(
        &self,
        topic: millpond_protocol::TopicId,
        at: Offset,
    ) -> Result<Vec<Run>, BodyError> {
        let mut runs = self
            .context
            .bodies
            .read(topic, at, 1, FRAME_BYTES_MAX)
            .await?;
        for run in &mut runs {
            run.messages = Bytes::copy_from_slice(&run.messages);
        }
        Ok(runs)
    }

    async fn letters(
        &self,
        letters: Vec<(Offset, millpond_queue::Letter)>,
        next: Offset,
        more: bool,
    ) -> Result<Response, WireError> {
        let (mut views, mut bytes) = (Vec::new(), 0);
        for (offset, letter) in &letters {
            let (topic, at) = letter.body;
            let body = self.body(topic, at).await.ok();
            let story = letters::story(&self.context.bodies, letter).await;
            let run = body.as_ref().and_then(|runs| runs.first());
            let view = letters::view(*offset, letter, story, run);
            bytes += letters::view_bytes(&view);
            if bytes > PAGE_BYTES && !views.is_empty() {
                return Ok(Response::DeadLetters {
                    letters: views,
                    next: *offset,
                    more: true,
                });
            }
            views.push(view);
        }
        Ok(Response::DeadLetters {
            letters: views,
            next,
            more,
        })
    }

    async fn peek(
        &self,
        page: Page,
        elsewhere: Vec<(Offset, Elsewhere)>,
    ) -> Result<Response, BodyError> {
        let mut elsewhere: std::collections::BTreeMap<Offset, Elsewhere> =
            elsewhere.into_iter().collect();
        let (mut messages, mut bytes, mut at) = (Vec::new(), 0, page.first);
        let mut holes = 0;
        while at < page.end && messages.len() < page.limit as usize && holes < PEEK_HOLES_MAX {
            let message = match elsewhere.remove(&at) {
                Some(elsewhere) => self.peek_elsewhere(at, &elsewhere).await,
                None => match self.body(page.topic, at).await {
                    Ok(runs) => runs
                        .first()
                        .map(|run| peeked(at, run.stamp, Bytes::new(), run.messages.clone())),
                    // A hole: purged, redriven, or never a message of its own.
                    Err(BodyError::Gone(_)) => {
                        holes += 1;
                        None
                    }
                    Err(BodyError::Damaged { .. }) => Some(peeked(
                        at,
                        millpond_protocol::Stamp(0),
                        Bytes::new(),
                        Bytes::new(),
                    )),
                    Err(error) => return Err(error),
                },
            };
            bytes += message
                .as_ref()
                .map_or(0, |m| m.message.len() + m.extra.len());
            if bytes > PAGE_BYTES && !messages.is_empty() {
                break;
            }
            messages.extend(message);
            at = at.next();
        }
        Ok(Response::Messages {
            messages,
            next: at,
            more: at < page.next,
        })
    }

    async fn peek_elsewhere(&self, offset: Offset, elsewhere: &Elsewhere) -> Option<PeekedMessage> {
        let at = (elsewhere.topic, elsewhere.offset);
        let runs = self.body(at.0, at.1).await.unwrap_or_default();
        let extra = match &elsewhere.letter {
            Some(letter) => {
                let story = letters::story(&self.context.bodies, letter).await;
                letters::headers(letter, &story, runs.first().map(|run| run.stamp))
            }
            None => Bytes::new(),
        };
        let (stamp, message) = runs
            .first()
            .map(|run| (run.stamp, run.messages.clone()))
            .unwrap_or_default();
        Some(peeked(offset, stamp, extra, message))
    }
}

/// Waits until the broker drains; false if it will never say.
async fn drained(draining: &mut watch::Receiver<bool>) -> bool {
    draining.wait_for(|&drains| drains).await.is_ok()
}

struct Page {
    topic: millpond_protocol::TopicId,
    first: Offset,
    end: Offset,
    next: Offset,
    limit: u32,
}

fn peeked(
    offset: Offset,
    published_at: millpond_protocol::Stamp,
    extra: Bytes,
    message: Bytes,
) -> PeekedMessage {
    PeekedMessage {
        offset,
        published_at,
        extra,
        message,
    }
}

/// Where a subscription is to begin. A time is looked up in the log.
pub async fn resolve_start<S: Storage>(
    context: &Context<S>,
    topic: &str,
    start: StartAt,
) -> Result<StartPosition, StreamError> {
    Ok(match start {
        StartAt::Earliest => StartPosition::Earliest,
        StartAt::Latest => StartPosition::Latest,
        StartAt::Offset(offset) => StartPosition::At(offset),
        StartAt::Time(time) => {
            let name = topic.to_owned();
            let Some(id) = context
                .shard
                .look(move |shard| shard.queue().topic_id(&name))
                .await?
            else {
                // The shard will say that there is no such topic.
                return Ok(StartPosition::Earliest);
            };
            match context
                .bodies
                .offset_at(id, time)
                .await
                .map_err(unreadable)?
            {
                Some(offset) => StartPosition::At(offset),
                None => StartPosition::Latest,
            }
        }
    })
}

fn unreadable(error: BodyError) -> WireError {
    WireError::new(ErrorCode::Corrupt, error.to_string())
}
