//! A consumer's delivery stream: credit in, deliveries and notices out.
//!
//! The shard hands out by message credit and an estimate of bytes; here the bytes are exact: a body is
//! sent only when the consumer's byte credit has room for it. What is read before that: `ahead`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use millpond_protocol::control::{ConsumerNotice, ConsumerOpened, OpenConsumer};
use millpond_protocol::frame::{Frame, FrameType};
use millpond_protocol::hot::{ConsumerCredit, Credit};
use millpond_protocol::limits::CONSUMER_NAME_BYTES_MAX;
use millpond_protocol::{ErrorCode, SessionId, SubscriptionMode, WireError};
use millpond_queue::{LeaseRange, StartPosition};
use millpond_wal::storage::Storage;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::ahead::Ahead;
use super::both::both;
use super::connection::Peer;
use super::deliver::{Gathered, gather, range};
use super::frames::{FrameReader, FrameWriter, StreamError};
use super::{Context, Registered, control, random_u64};
use crate::mailbox::Mailbox;
use crate::memory::Class;
use crate::shard::io::{Handout, Input, Opened, Output, StreamId};

/// How long a frame may wait for its peer to read once others want its memory.
pub const DEPARTURE: Duration = Duration::from_secs(2);

/// How long what was read ahead is kept for a consumer that gets nothing.
const AHEAD_IDLE: Duration = Duration::from_secs(1);

/// Longest that anything may wait for its peer to read. By then messages that were handed out have been
/// called back and may have been handed out again, and what tells of that gathers behind it.
pub const STALLED_MAX: Duration = Duration::from_secs(60);

/// Runs one delivery stream to its end.
pub async fn run<S: Storage>(
    context: Arc<Context<S>>,
    peer: Peer,
    mut writer: FrameWriter,
    reader: FrameReader,
    first: Frame,
) {
    let Ok(registered) = context.register().await else {
        return;
    };
    let id = registered.id;
    peer.windows.add_consumer();
    let result = session(&context, &peer, &mut writer, reader, first, registered).await;
    peer.windows.remove_consumer();
    context.unregister(id).await;
    writer.conclude(result, "consumer").await;
}

async fn session<S: Storage>(
    context: &Context<S>,
    peer: &Peer,
    writer: &mut FrameWriter,
    reader: FrameReader,
    first: Frame,
    mut registered: Registered,
) -> Result<(), StreamError> {
    // Boxed, because the session outlives it by far.
    let opened = Box::pin(open(context, first, &mut registered)).await?;
    let stream = registered.id;
    let session = opened.session;
    let mode = opened.mode;
    let result = async {
        writer
            .write_control(FrameType::ConsumerOpened, &answer(opened))
            .await?;
        let (tell_credit, credit) = watch::channel(Credit::default());
        let reading = read(context, reader, (session, stream), tell_credit);
        let mut sender = Sender {
            context,
            peer,
            writer,
            stream,
            session,
            mode,
            ahead: Ahead::new(
                context.bodies.clone(),
                context.memory.clone(),
                peer.share.clone(),
            ),
            credit,
            sent: Credit::default(),
            sent_at: Instant::now(),
            pending: VecDeque::new(),
            frame_bytes: context.memory.frame_bytes(),
            next_bytes: 0,
        };
        let writing = sender.run(&mut registered.outputs);
        both(reading, registered.own, writing).await
    }
    .await;
    // Whatever ended it: if the session was not closed cleanly, its grace begins.
    context
        .shard
        .input(Input::Detach { session, stream })
        .await?;
    result
}

/// Opens a session, or resumes one.
async fn open<S: Storage>(
    context: &Context<S>,
    first: Frame,
    registered: &mut Registered,
) -> Result<Opened, StreamError> {
    let open: OpenConsumer = first.decode()?;
    if open.consumer_name.len() > CONSUMER_NAME_BYTES_MAX {
        let text = format!("a consumer's name has at most {CONSUMER_NAME_BYTES_MAX} bytes");
        return Err(WireError::new(ErrorCode::Malformed, text).into());
    }
    let start = match &open.create {
        Some(create) => control::resolve_start(context, &open.topic, create.start).await?,
        None => StartPosition::Earliest,
    };
    let input = Input::OpenConsumer {
        stream: registered.id,
        open,
        token: random_u64(),
        start,
    };
    context.shard.input(input).await?;
    match registered.outputs.recv().await {
        Output::ConsumerOpened(opened) => Ok(*opened),
        Output::End(error) => Err(error.into()),
        _ => Err(StreamError::Gone("the shard gave no answer".to_owned())),
    }
}

fn answer(opened: Opened) -> ConsumerOpened {
    ConsumerOpened {
        session: opened.session,
        token: opened.token,
        topic: opened.topic,
        subscription: opened.subscription,
        mode: opened.mode,
        lease_ms: opened.lease_ms,
        leases: opened.leases,
        resumed: opened.resumed,
        position: opened.position,
    }
}

async fn read<S: Storage>(
    context: &Context<S>,
    mut reader: FrameReader,
    (session, stream): (SessionId, StreamId),
    tell: watch::Sender<Credit>,
) -> Result<(), StreamError> {
    while let Some(frame) = reader.next_of(&[FrameType::ConsumerCredit]).await? {
        let credit = ConsumerCredit::decode(&frame.body)?;
        tell.send_modify(|held| {
            held.max_messages = held.max_messages.max(credit.credit.max_messages);
            held.max_bytes = held.max_bytes.max(credit.credit.max_bytes);
        });
        context
            .shard
            .input(Input::Credit {
                stream,
                session,
                credit,
            })
            .await?;
    }
    Ok(())
}

struct Sender<'a, S: Storage> {
    context: &'a Context<S>,
    peer: &'a Peer,
    writer: &'a mut FrameWriter,
    stream: StreamId,
    session: SessionId,
    mode: SubscriptionMode,
    ahead: Ahead<S>,
    credit: watch::Receiver<Credit>,
    sent: Credit,
    /// When the last frame was begun.
    sent_at: Instant,
    /// Handed out, not yet sent. Bounded by the consumer's message credit.
    pending: VecDeque<Handout>,
    /// Bytes of messages after which a frame is closed.
    frame_bytes: u64,
    /// What the next message is known to need beyond that.
    next_bytes: u64,
}

impl<S: Storage> Sender<'_, S> {
    async fn run(&mut self, outputs: &mut Mailbox<Output>) -> Result<(), StreamError> {
        loop {
            let output = if self.can_send() {
                outputs.try_recv()
            } else {
                tokio::select! {
                    output = outputs.recv() => Some(output),
                    Ok(()) = self.credit.changed() => None,
                    () = sleep_until(self.sent_at + AHEAD_IDLE), if self.ahead.holds() => {
                        self.ahead.forget();
                        None
                    }
                }
            };
            // Boxed what is sent, because an idle consumer would keep the size of a busy one.
            match output {
                Some(Output::Deliver(run)) => self.pending.push_back(run),
                Some(Output::Notice(notice)) => Box::pin(self.notice(notice)).await?,
                Some(Output::SessionClosed) => return Ok(()),
                Some(Output::End(error)) => return Err(error.into()),
                Some(_) => {}
                None if self.can_send() => Box::pin(self.send_some()).await?,
                None => {}
            }
        }
    }

    fn can_send(&self) -> bool {
        !self.pending.is_empty() && self.room() > 0
    }

    fn room(&self) -> u64 {
        self.credit
            .borrow()
            .max_bytes
            .saturating_sub(self.sent.max_bytes)
    }

    async fn notice(&mut self, notice: ConsumerNotice) -> Result<(), StreamError> {
        if let ConsumerNotice::Active { .. } = notice {
            // What was handed out for an earlier activity is void.
            let void = self.pending.drain(..).map(|run| range(&run, run.count));
            let void = void.collect();
            self.drop_unsent(void).await?;
        }
        let writing = self
            .writer
            .write_control(FrameType::ConsumerNotice, &notice);
        match timeout(STALLED_MAX, writing).await {
            Ok(written) => written,
            Err(_) => self.break_off(),
        }
    }

    /// Tells the shard what it has handed out in vain, so that it costs the consumer no credit. To be told before what
    /// was handed out later is sent.
    async fn drop_unsent(&self, ranges: Vec<LeaseRange>) -> Result<(), StreamError> {
        if ranges.is_empty() {
            return Ok(());
        }
        let input = Input::Dropped {
            stream: self.stream,
            session: self.session,
            ranges,
        };
        self.context.shard.input(input).await?;
        Ok(())
    }

    /// Writes a frame. While others wait for memory, a peer that gave credit may not keep it by not
    /// reading; its stream cannot carry a reason in the middle of a frame, so the code must do.
    async fn write_in_time(&mut self, pieces: &mut [Bytes]) -> Result<(), StreamError> {
        let writing = self.writer.write_pieces(pieces);
        let is_wanted = || {
            // Whoever takes so long needs nothing read ahead.
            self.ahead.forget();
            self.context.memory.is_wanted(&self.peer.share)
        };
        match departs(writing, DEPARTURE, STALLED_MAX, is_wanted).await {
            Some(written) => written,
            None => self.break_off(),
        }
    }

    fn break_off(&mut self) -> Result<(), StreamError> {
        self.writer.reset(ErrorCode::Memory);
        let text = "it did not read in time what it gave credit for";
        Err(StreamError::Gone(text.to_owned()))
    }

    /// Reads and sends one frame's worth of what is pending.
    async fn send_some(&mut self) -> Result<(), StreamError> {
        let bytes = self.room().min(self.frame_bytes).max(self.next_bytes);
        let (memory, share) = (&self.context.memory, &self.peer.share);
        self.sent_at = Instant::now();
        if memory.is_short(share) {
            self.ahead.forget();
        }
        let _permit = match memory.try_acquire(bytes, Class::Outbound, share) {
            Some(permit) => permit,
            None => {
                // It may have to wait for the memory that is held here.
                self.ahead.forget();
                let permit = memory.acquire(bytes, Class::Outbound, share).await;
                permit.map_err(WireError::from)?
            }
        };
        let gathered = gather(self.context, &mut self.ahead, &mut self.pending, bytes).await?;
        let Gathered {
            frame,
            dropped,
            damaged,
            wanted,
        } = gathered;
        self.drop_unsent(dropped).await?;
        // A large one costs a second look; the next is probably as large.
        self.next_bytes = wanted.unwrap_or(match &frame {
            Some(frame) if frame.messages == 1 => frame.bytes,
            _ => 0,
        });
        if let Some(mut frame) = frame {
            self.peer.windows.sends();
            self.sent.max_bytes += frame.bytes;
            self.context.metrics.sent(frame.messages, frame.bytes);
            self.write_in_time(&mut frame.pieces).await?;
            let (session, messages, bytes) = (self.session, frame.messages, frame.bytes);
            self.context
                .shard
                .input(Input::Sent {
                    stream: self.stream,
                    session,
                    messages,
                    bytes,
                })
                .await?;
        }
        if let Some((topic, first, next)) = damaged {
            self.context
                .shard
                .input(Input::Damaged { topic, first, next })
                .await?;
            if self.mode == SubscriptionMode::Stream {
                self.notice(ConsumerNotice::Corrupt { first, next }).await?;
            }
        }
        Ok(())
    }
}

/// What was written; `None` if that takes longer than `most`, or than `every` while others want memory.
pub async fn departs<T>(
    writing: impl Future<Output = T>,
    every: Duration,
    most: Duration,
    mut is_wanted: impl FnMut() -> bool,
) -> Option<T> {
    tokio::pin!(writing);
    let began = Instant::now();
    loop {
        match timeout(every, &mut writing).await {
            Ok(written) => return Some(written),
            Err(_) if began.elapsed() < most && !is_wanted() => {}
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;

    const EVERY: Duration = Duration::from_millis(5);
    const MOST: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn a_frame_that_is_never_read_is_given_up_although_nobody_wants_its_memory() {
        let began = Instant::now();
        let written = departs(pending::<()>(), EVERY, MOST, || false).await;
        assert_eq!(written, None);
        assert!(began.elapsed() >= MOST);
    }

    #[tokio::test]
    async fn a_frame_that_is_not_read_is_given_up_at_once_if_others_want_its_memory() {
        let written = departs(pending::<()>(), EVERY, Duration::MAX, || true).await;
        assert_eq!(written, None);
    }

    #[tokio::test]
    async fn a_frame_that_is_read_slowly_departs() {
        let slow = tokio::time::sleep(2 * EVERY);
        assert_eq!(
            departs(slow, EVERY, Duration::MAX, || false).await,
            Some(())
        );
    }
}
