//! A consumer's settlement stream: it never queues behind payloads.

use std::collections::VecDeque;
use std::sync::Arc;

use millpond_protocol::control::{OpenSettlements, Outcome, Settle, SettleRefused, Settled};
use millpond_protocol::frame::{Frame, FrameType, empty};
use millpond_protocol::hot::{decode_acks, decode_commit};
use millpond_protocol::limits::{REASON_BYTES_MAX, SETTLE_ITEMS_MAX, SETTLE_OFFSETS_MAX};
use millpond_protocol::{ErrorCode, SessionId, WireError};
use millpond_wal::storage::Storage;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::both::both;
use super::connection::Peer;
use super::consumer::{DEPARTURE, STALLED_MAX, departs};
use super::frames::{FrameReader, FrameWriter, StreamError};
use super::{Context, Registered, UNANSWERED_MAX, inbound};
use crate::mailbox::Mailbox;
use crate::memory::Permit;
use crate::shard::io::{Input, Output, StreamId};

/// What comes on a settlement stream once it is open.
const EXPECTED: [FrameType; 5] = [
    FrameType::Acks,
    FrameType::Settle,
    FrameType::Renew,
    FrameType::Commit,
    FrameType::CloseSession,
];
/// Answers of the shard that are put into one frame.
const COALESCE_MAX: usize = 1_024;
/// Offsets that the unanswered acknowledgements of one stream may cover: more than a subscription of the
/// default policy has in flight. The shard looks each of them up.
const UNANSWERED_OFFSETS_MAX: u64 = 2 * SETTLE_OFFSETS_MAX;
/// What the refusal of one offset takes in an answer, until that is written.
const REFUSAL_BYTES: u64 = 16;

const _: () = assert!(SETTLE_OFFSETS_MAX <= UNANSWERED_OFFSETS_MAX);

/// Runs one settlement stream to its end.
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
    let result = session(&context, &peer, &mut writer, reader, first, registered).await;
    context.unregister(id).await;
    writer.conclude(result, "settlement").await;
}

async fn session<S: Storage>(
    context: &Context<S>,
    peer: &Peer,
    writer: &mut FrameWriter,
    reader: FrameReader,
    first: Frame,
    mut registered: Registered,
) -> Result<(), StreamError> {
    let OpenSettlements { session, token } = first.decode()?;
    context
        .shard
        .input(Input::OpenSettlements {
            stream: registered.id,
            session,
            token,
        })
        .await?;
    match registered.outputs.recv().await {
        Output::SettlementsOpened => writer.write(empty(FrameType::SettlementsOpened)).await?,
        Output::End(error) => return Err(error.into()),
        _ => return Err(StreamError::Gone("the shard gave no answer".to_owned())),
    }
    let unanswered = Unanswered::default();
    let reading = read(context, peer, reader, session, registered.id, &unanswered);
    let writing = write(context, peer, writer, &mut registered.outputs, &unanswered);
    both(reading, registered.own, writing).await
}

/// What the client has not been told the end of, in order: at most `UNANSWERED_MAX` inputs that cover
/// `UNANSWERED_OFFSETS_MAX` offsets.
#[derive(Default)]
struct Unanswered {
    asked: Mutex<Asked>,
    fewer: Notify,
}

#[derive(Default)]
struct Asked {
    /// Of each the offsets that it covers, and what pays for it.
    inputs: VecDeque<(u64, Option<Permit>)>,
    offsets: u64,
}

impl Unanswered {
    async fn ask(&self, offsets: u64, permit: Option<Permit>) {
        loop {
            let fewer = self.fewer.notified();
            if self.has_room(offsets) {
                break;
            }
            fewer.await;
        }
        let mut asked = self.asked.lock();
        asked.offsets += offsets;
        asked.inputs.push_back((offsets, permit));
    }

    fn has_room(&self, offsets: u64) -> bool {
        let asked = self.asked.lock();
        (asked.inputs.len() as u64) < UNANSWERED_MAX
            && asked.offsets + offsets <= UNANSWERED_OFFSETS_MAX
    }

    /// The client has been told the end of so many.
    fn told(&self, inputs: usize) {
        let mut asked = self.asked.lock();
        let inputs = inputs.min(asked.inputs.len());
        let offsets: u64 = asked
            .inputs
            .drain(..inputs)
            .map(|(offsets, _)| offsets)
            .sum();
        asked.offsets -= offsets;
        drop(asked);
        self.fewer.notify_one();
    }
}

/// Memory for the frame and for an answer that refuses all of it. Little is free.
async fn answerable<S: Storage>(
    context: &Context<S>,
    peer: &Peer,
    frame: (usize, Option<Permit>),
    offsets: u64,
) -> Result<Option<Permit>, WireError> {
    let (frame_bytes, permit) = frame;
    let bytes = frame_bytes as u64 + offsets * REFUSAL_BYTES;
    if bytes <= inbound::FREE_BYTES as u64 {
        return Ok(permit);
    }
    // Whoever waits for memory holds none of the same frame: many that do could wait for each other.
    drop(permit);
    Box::pin(inbound::room(context, bytes, &peer.share))
        .await
        .map(Some)
}

fn reason_bytes(outcome: &Outcome) -> usize {
    match outcome {
        Outcome::Nack { reason, .. } | Outcome::Reject { reason, .. } => reason.len(),
        Outcome::Release { .. } | Outcome::Extend => 0,
    }
}

async fn read<S: Storage>(
    context: &Context<S>,
    peer: &Peer,
    mut reader: FrameReader,
    session: SessionId,
    stream: StreamId,
    unanswered: &Unanswered,
) -> Result<(), StreamError> {
    while let Some((frame, mut permit)) =
        inbound::take(context, &mut reader, &peer.share, &EXPECTED).await?
    {
        let mut offsets = 0;
        let input = match frame.kind {
            FrameType::Acks => {
                let acks = decode_acks(&frame.body)?;
                offsets = acks.iter().map(|run| u64::from(run.run)).sum();
                permit = answerable(context, peer, (frame.body.len(), permit), offsets).await?;
                Input::Settle {
                    stream,
                    session,
                    acks,
                    items: Vec::new(),
                }
            }
            FrameType::Settle => {
                let Settle { items } = frame.decode()?;
                if items.len() > SETTLE_ITEMS_MAX {
                    let text = format!("a settle frame has at most {SETTLE_ITEMS_MAX} items");
                    return Err(WireError::new(ErrorCode::TooLarge, text).into());
                }
                if items
                    .iter()
                    .any(|item| reason_bytes(&item.outcome) > REASON_BYTES_MAX)
                {
                    let text = format!("a reason has at most {REASON_BYTES_MAX} bytes; shorten it");
                    return Err(WireError::new(ErrorCode::TooLarge, text).into());
                }
                Input::Settle {
                    stream,
                    session,
                    acks: Vec::new(),
                    items,
                }
            }
            FrameType::Commit => Input::Commit {
                stream,
                session,
                next: decode_commit(&frame.body)?,
            },
            FrameType::Renew => {
                context.shard.input(Input::Renew { session }).await?;
                continue;
            }
            _ => Input::CloseSession { stream, session },
        };
        unanswered.ask(offsets, permit).await;
        context.shard.input(input).await?;
    }
    Ok(())
}

async fn write<S: Storage>(
    context: &Context<S>,
    peer: &Peer,
    writer: &mut FrameWriter,
    outputs: &mut Mailbox<Output>,
    unanswered: &Unanswered,
) -> Result<(), StreamError> {
    let mut settled = Settled::default();
    loop {
        let first = outputs.recv().await;
        let before = settled.upto;
        let (answers, end) = coalesce(first, outputs, &mut settled);
        if settled.upto > before {
            // Boxed, because an idle consumer would keep the size of this.
            Box::pin(write_in_time(context, peer, writer, &settled)).await?;
            settled.refused.clear();
        }
        unanswered.told(answers);
        match end {
            Some(Ok(())) => return writer.write(empty(FrameType::SessionClosed)).await,
            Some(Err(error)) => return Err(error.into()),
            None => {}
        }
    }
}

/// While others wait for memory, a peer may not keep that of its answers by not reading them.
async fn write_in_time<S: Storage>(
    context: &Context<S>,
    peer: &Peer,
    writer: &mut FrameWriter,
    settled: &Settled,
) -> Result<(), StreamError> {
    let writing = writer.write_control(FrameType::Settled, settled);
    let is_wanted = || context.memory.is_wanted(&peer.share);
    if let Some(written) = departs(writing, DEPARTURE, STALLED_MAX, is_wanted).await {
        return written;
    }
    writer.reset(ErrorCode::Memory);
    let text = "it did not read in time what became of its settlements";
    Err(StreamError::Gone(text.to_owned()))
}

/// Adds to `settled` what one write is to tell: `first` and what waits behind it. Returns how many
/// answers that is, and how the stream ends, if it does.
fn coalesce(
    first: Output,
    outputs: &mut Mailbox<Output>,
    settled: &mut Settled,
) -> (usize, Option<Result<(), WireError>>) {
    let mut answers = 0;
    let mut next = Some(first);
    for nth in 1..=COALESCE_MAX {
        match next {
            Some(Output::Settled { count, refused }) => {
                answers += 1;
                let base = settled.upto;
                let named = |(ordinal, code, state)| SettleRefused {
                    ordinal: base + ordinal,
                    code,
                    state,
                };
                settled.refused.extend(refused.into_iter().map(named));
                settled.upto += count;
            }
            Some(Output::SessionClosed) => return (answers, Some(Ok(()))),
            Some(Output::End(error)) => return (answers, Some(Err(error))),
            Some(_) => {}
            None => break,
        }
        let crowded = settled.refused.len() as u64 >= SETTLE_OFFSETS_MAX;
        // What is received is taken: at the bound there is no next one.
        next = if !crowded && nth < COALESCE_MAX {
            outputs.try_recv()
        } else {
            None
        };
    }
    (answers, None)
}

#[cfg(test)]
mod tests {
    use millpond_protocol::control::MessageState;

    use super::*;
    use crate::mailbox::mailbox;

    #[tokio::test]
    async fn what_is_unanswered_is_bounded_by_the_offsets_that_it_covers() {
        let unanswered = Unanswered::default();
        let is_taken = async |offsets| {
            let asking = unanswered.ask(offsets, None);
            tokio::select! {
                biased;
                () = asking => true,
                () = std::future::ready(()) => false,
            }
        };
        assert!(is_taken(SETTLE_OFFSETS_MAX).await);
        assert!(is_taken(UNANSWERED_OFFSETS_MAX - SETTLE_OFFSETS_MAX).await);
        assert!(!is_taken(1).await);
        assert!(is_taken(0).await, "nothing else is held up");
        unanswered.told(1);
        assert!(is_taken(SETTLE_OFFSETS_MAX).await);
        assert!(!is_taken(1).await);
        unanswered.told(3);
        for _ in 0..UNANSWERED_MAX {
            assert!(is_taken(1).await);
        }
        assert!(!is_taken(0).await);
    }

    #[test]
    fn more_answers_than_one_write_tells_go_to_their_own_settlements() {
        const ANSWERS: u64 = 3 * COALESCE_MAX as u64 + 7;
        let (asked, mut outputs) = mailbox();
        let is_refused = |nth: u64| nth % 100 == 24;
        for nth in 0..ANSWERS {
            let refusal = (0, ErrorCode::LeaseLost, MessageState::Acked);
            let refused = is_refused(nth).then_some(refusal);
            let refused = refused.into_iter().collect();
            asked.send(Output::Settled { count: 1, refused });
        }
        let mut settled = Settled::default();
        let (mut writes, mut told) = (0, 0);
        while let Some(first) = outputs.try_recv() {
            let (answers, end) = coalesce(first, &mut outputs, &mut settled);
            assert!(end.is_none());
            (writes, told) = (writes + 1, told + answers as u64);
        }
        assert_eq!((settled.upto, told, writes), (ANSWERS, ANSWERS, 4));
        let refused = settled.refused.iter().map(|refused| refused.ordinal);
        assert!(refused.eq((0..ANSWERS).filter(|nth| is_refused(*nth))));
    }
}
