//! A delivery in the user's hands: the message and the right to settle it.

use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use millpond_protocol::control::{LostReason, Outcome, RejectKind, cut_reason};
use millpond_protocol::limits::DELAY_MS_MAX;

use super::session::{Held, Session, Taken};
use super::settle::SettleSlot;
use crate::delivery::Received;
use crate::error::Error;

/// Why a handler failed, and when it should be tried again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nack {
    /// The wait before the next attempt, at most 30 days, in whole milliseconds from the call on, however
    /// long the nack takes to the broker; `None`: the subscription's backoff.
    pub delay: Option<Duration>,
    /// The user's own code, shown in metrics and dead letters.
    pub code: u32,
    /// Shown in dead letters; cut to 1 KiB.
    pub reason: String,
}

impl Nack {
    /// A failure with this reason.
    pub fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            ..Self::default()
        }
    }

    /// The same with its own wait.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }

    /// The same with a code.
    #[must_use]
    pub fn code(mut self, code: u32) -> Self {
        self.code = code;
        self
    }
}

/// Why a message can never be handled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reject {
    /// The user's own code, shown in metrics and dead letters.
    pub code: u32,
    /// Shown in dead letters; cut to 1 KiB.
    pub reason: String,
    /// True if the payload could not be decoded.
    pub undecodable: bool,
}

impl Reject {
    /// A final failure with this reason.
    pub fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            ..Self::default()
        }
    }

    /// A payload that could not be decoded.
    pub fn undecodable(reason: impl Into<String>) -> Self {
        Self {
            undecodable: true,
            ..Self::new(reason)
        }
    }

    /// The same with a code.
    #[must_use]
    pub fn code(mut self, code: u32) -> Self {
        self.code = code;
        self
    }
}

/// A leased message. It must be settled: acknowledged, nacked, rejected or released. One that is
/// dropped is released after a second, and logged.
#[must_use = "a delivery that is dropped comes again"]
pub struct Delivery {
    received: Received,
    lease: Lease,
}

/// The right to settle one delivery.
pub(crate) struct Lease {
    session: Arc<Session>,
    taken: Taken,
    settled: bool,
}

impl Delivery {
    pub(crate) fn new(session: Arc<Session>, held: Held) -> Self {
        let lease = Lease {
            session,
            taken: held.taken(),
            settled: false,
        };
        Self {
            received: Received::new(held.delivered),
            lease,
        }
    }

    /// The ordinal of this hand-out of the message, from 1.
    #[must_use]
    pub fn delivery(&self) -> u32 {
        self.received.meta.delivery.0
    }

    /// Failures so far + 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.received.meta.attempt
    }

    /// Why the lease is over, if the broker has said so: another may be doing the work.
    #[must_use]
    pub fn lost(&self) -> Option<LostReason> {
        self.lease.lost()
    }

    /// The work is done. Resolves when that is durable.
    ///
    /// # Errors
    /// `LeaseLost` if the message has been handed to another meanwhile, or if its session was lost;
    /// `SessionEnded` if the consumer itself was ended.
    pub async fn ack(self) -> Result<(), Error> {
        self.ack_later().await
    }

    /// The work is done. The acknowledgement is on its way; the receipt resolves when it is durable.
    pub fn ack_later(self) -> SettleReceipt {
        self.settle_later(None)
    }

    /// The work failed: try again after the subscription's backoff, or after the nack's delay.
    pub async fn nack(self, nack: Nack) -> Result<(), Error> {
        self.nack_later(nack).await
    }

    /// `nack`, with its answer awaited later.
    pub fn nack_later(self, nack: Nack) -> SettleReceipt {
        self.settle_later(Some(nack.into()))
    }

    /// The work can never succeed: the message becomes a dead letter.
    pub async fn reject(self, reject: Reject) -> Result<(), Error> {
        self.settle_later(Some(reject.into())).await
    }

    /// Hands the message back untouched and uncharged, to come again at once or after the delay, which
    /// counts from this call on.
    pub async fn release(self, delay: Option<Duration>) -> Result<(), Error> {
        self.settle_later(Some(release(delay))).await
    }

    /// Still working: starts the processing clock again. The lease itself renews by itself.
    pub async fn extend(&self) -> Result<(), Error> {
        self.lease.extend().await
    }

    /// The message and the right to settle it, apart.
    pub(crate) fn into_parts(self) -> (Received, Lease) {
        (self.received, self.lease)
    }

    fn settle_later(self, outcome: Option<Outcome>) -> SettleReceipt {
        self.lease.settle(outcome)
    }
}

impl Deref for Delivery {
    type Target = Received;

    fn deref(&self) -> &Received {
        &self.received
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("offset", &self.offset())
            .field("delivery", &self.delivery())
            .field("attempt", &self.attempt())
            .finish_non_exhaustive()
    }
}

impl Lease {
    /// `None` acknowledges.
    pub fn settle(mut self, outcome: Option<Outcome>) -> SettleReceipt {
        self.settled = true;
        let slot = self.session.settle(self.taken, outcome);
        SettleReceipt { slot }
    }

    pub fn lost(&self) -> Option<LostReason> {
        self.session.lost_reason(self.taken)
    }

    pub fn extender(&self) -> Extender {
        Extender {
            session: Arc::clone(&self.session),
            taken: self.taken,
        }
    }

    async fn extend(&self) -> Result<(), Error> {
        let slot = self.session.extend(self.taken);
        SettleReceipt { slot }.await
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.settled {
            self.session.dropped(self.taken);
        }
    }
}

/// What a worker's job may do with a lease that it does not own.
#[derive(Clone)]
pub(crate) struct Extender {
    session: Arc<Session>,
    taken: Taken,
}

impl Extender {
    pub async fn extend(&self) -> Result<(), Error> {
        let slot = self.session.extend(self.taken);
        SettleReceipt { slot }.await
    }

    pub fn lost(&self) -> Option<LostReason> {
        self.session.lost_reason(self.taken)
    }
}

/// The answer to a settlement or a commit. Dropping it changes nothing for the settlement.
pub struct SettleReceipt {
    slot: Result<SettleSlot, Error>,
}

impl SettleReceipt {
    pub(crate) fn new(slot: Result<SettleSlot, Error>) -> Self {
        Self { slot }
    }
}

impl Future for SettleReceipt {
    type Output = Result<(), Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &self.slot {
            Ok(slot) => slot
                .slots
                .poll(slot.index, context)
                .map(|(_, answer)| answer),
            Err(error) => Poll::Ready(Err(error.clone())),
        }
    }
}

impl From<Nack> for Outcome {
    fn from(nack: Nack) -> Self {
        Self::Nack {
            delay_ms: nack.delay.map(millis),
            code: nack.code,
            reason: cut_reason(nack.reason),
        }
    }
}

impl From<Reject> for Outcome {
    fn from(reject: Reject) -> Self {
        Self::Reject {
            kind: if reject.undecodable {
                RejectKind::Undecodable
            } else {
                RejectKind::Rejected
            },
            code: reject.code,
            reason: cut_reason(reject.reason),
        }
    }
}

pub(crate) fn release(delay: Option<Duration>) -> Outcome {
    Outcome::Release {
        delay_ms: delay.map(millis),
    }
}

fn millis(delay: Duration) -> u64 {
    u64::try_from(delay.as_millis()).map_or(DELAY_MS_MAX, |ms| ms.min(DELAY_MS_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delay_is_at_most_thirty_days() {
        assert_eq!(millis(Duration::MAX), DELAY_MS_MAX);
        assert_eq!(millis(Duration::from_secs(2)), 2_000);
    }
}
