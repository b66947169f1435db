//! What a producer's user gets for a message: a future of its outcome.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use millpond_protocol::{Offset, Sequence};

use super::pipeline::Slot;
use crate::error::Error;

/// A message that the broker has made durable.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct SendReceipt {
    /// Its position in the topic; unknown only for a duplicate of long ago.
    pub offset: Option<Offset>,
    /// True if an earlier producer had published this sequence already.
    pub duplicate: bool,
    pub sequence: Sequence,
}

/// The outcome of an enqueued message. Dropping it changes nothing for the message.
#[must_use = "the message may still fail; await the receipt, or flush the producer"]
pub struct Receipt {
    slot: Slot,
}

impl Receipt {
    pub(super) fn new(slot: Slot) -> Self {
        Self { slot }
    }

    /// The number that the message was given.
    #[must_use]
    pub fn sequence(&self) -> Sequence {
        self.slot.sequence
    }
}

impl Future for Receipt {
    type Output = Result<SendReceipt, Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let slot = &self.slot;
        slot.slots.poll(slot.index, context).map(|(nth, outcome)| {
            let accepted = outcome?;
            let plus = |first: Offset| Offset(first.0.saturating_add(u64::from(nth)));
            Ok(SendReceipt {
                offset: accepted.offset.map(plus),
                duplicate: accepted.duplicate,
                sequence: slot.sequence,
            })
        })
    }
}
