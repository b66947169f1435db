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
    let writing = write(writer, &mut registered.outputs, &unanswered);
    both(reading, registered.own, writing).await
}

/// What pays for inputs that the shard has not answered, in order; at most `UNANSWERED_MAX`.
#[derive(Default)]
struct Unanswered {
    kept: Mutex<VecDeque<Option<Permit>>>,
    fewer: Notify,
}

impl Unanswered {
    async fn ask(&self, permit: Option<Permit>) {
        loop {
            let fewer = self.fewer.notified();
            if (self.kept.lock().len() as u64) < UNANSWERED_MAX {
                self.kept.lock().push_back(permit);
                return;
            }
            fewer.await;
        }
    }

    fn answer(&self) {
        drop(self.kept.lock().pop_front());
        self.fewer.notify_one();
    }
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
    while let Some((frame, permit)) =
        inbound::take(context, &mut reader, &peer.share, &EXPECTED).await?
    {
        let input = match frame.kind {
            FrameType::Acks => {
                let acks = decode_acks(&frame.body)?;
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
        unanswered.ask(permit).await;
        context.shard.input(input).await?;
    }
    Ok(())
}

async fn write(
    writer: &mut FrameWriter,
    outputs: &mut Mailbox<Output>,
    unanswered: &Unanswered,
) -> Result<(), StreamError> {
    let mut settled = Settled::default();
    loop {
        let first = outputs.recv().await;
        let before = settled.upto;
        let end = coalesce(first, outputs, unanswered, &mut settled);
        if settled.upto > before {
            // Boxed, because an idle consumer would keep the size of this.
            Box::pin(writer.write_control(FrameType::Settled, &settled)).await?;
            settled.refused.clear();
        }
        match end {
            Some(Ok(())) => return writer.write(empty(FrameType::SessionClosed)).await,
            Some(Err(error)) => return Err(error.into()),
            None => {}
        }
    }
}

/// Adds to `settled` what one write is to tell: `first` and what waits behind it. Returns how the stream
/// ends, if it does.
fn coalesce(
    first: Output,
    outputs: &mut Mailbox<Output>,
    unanswered: &Unanswered,
    settled: &mut Settled,
) -> Option<Result<(), WireError>> {
    let mut next = Some(first);
    for nth in 1..=COALESCE_MAX {
        match next {
            Some(Output::Settled { count, refused }) => {
                unanswered.answer();
                let base = settled.upto;
                let named = |(ordinal, code, state)| SettleRefused {
                    ordinal: base + ordinal,
                    code,
                    state,
                };
                settled.refused.extend(refused.into_iter().map(named));
                settled.upto += count;
            }
            Some(Output::SessionClosed) => return Some(Ok(())),
            Some(Output::End(error)) => return Some(Err(error)),
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
    None
}

#[cfg(test)]
mod tests {
    use millpond_protocol::control::MessageState;

    use super::*;
    use crate::mailbox::mailbox;

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
        let (unanswered, mut settled) = (Unanswered::default(), Settled::default());
        let mut writes = 0;
        while let Some(first) = outputs.try_recv() {
            let end = coalesce(first, &mut outputs, &unanswered, &mut settled);
            assert!(end.is_none());
            writes += 1;
        }
        assert_eq!((settled.upto, writes), (ANSWERS, 4));
        let refused = settled.refused.iter().map(|refused| refused.ordinal);
        assert!(refused.eq((0..ANSWERS).filter(|nth| is_refused(*nth))));
    }
}
