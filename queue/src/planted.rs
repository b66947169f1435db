//! Bugs put in on purpose, so that the simulator can show that it catches each by the invariant that
//! it breaks.
//!
//! Without the feature `planted`, which nothing that is released turns on, [`is`] is a constant `false`
//! and the bugs are not compiled. With it one of them is chosen at run time, for the whole process.

use millpond_protocol::Stamp;

use crate::state::subscription::Subscription;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A producer is told the offset behind its own.
    OffsetOffByOne,
    /// What was accepted before is appended again.
    DuplicateAppended,
    /// Messages are accepted although some before them are missing.
    SequenceGapAccepted,
    /// Snapshots have no producers.
    DedupNotInSnapshot,
    /// Snapshots have no acknowledgements above the floor.
    DoneNotInSnapshot,
    /// A retry is handed out a millisecond before it is due.
    DueOneEarly,
    /// Waits are half as long as the policy says.
    BackoffHalved,
    /// What happens to a retry while a snapshot is told is in that snapshot already.
    SnapshotMoves,
    /// After a restart all retries are due.
    RestartForgetsDue,
    /// After a restart every message that failed has failed once more.
    RestartCharges,
    /// A failure counts twice.
    AttemptCountedTwice,
    /// A message dies one failure too late.
    OneAttemptMore,
    /// A dead letter stays in its queue.
    DeadLetterStays,
    /// A dead message leaves its queue and gets no letter.
    DeadLetterLost,
    /// A redrive takes the letter and gives no message back.
    RedriveLosesLetter,
    /// A settlement counts whoever holds the lease now.
    StaleSettlementAccepted,
    /// An acknowledgement finishes the next message too.
    AckTakesNeighbour,
    /// A restart moves ack floors back.
    FloorMovesBack,
    /// A message that was handed back is forgotten.
    ReleaseLost,
    /// What a lost session held is forgotten.
    SessionEndLosesLeases,
    /// A stream leaves a message out.
    StreamSkips,
    /// A seek back meets messages that were let go.
    GoneForgotten,
}

impl Subscription {
    /// What restarts do to subscriptions in some of the bugs.
    pub(crate) fn spoil_at_restart(&mut self, now: Stamp) {
        if is(Bug::FloorMovesBack) {
            self.floor = self.floor.saturating_sub(1).max(self.start);
        }
        let (forgets, charges) = (is(Bug::RestartForgetsDue), is(Bug::RestartCharges));
        if !forgets && !charges {
            return;
        }
        let waiting: Vec<_> = self.retries.iter().map(|(offset, _)| offset).collect();
        for offset in waiting {
            if let Some(mut retry) = self.retries.take(offset) {
                retry.failures += u32::from(charges && retry.due().is_some());
                retry.set_due(retry.due().map(|due| if forgets { now } else { due }));
                self.retries.put(offset, retry, u32::MAX);
            }
        }
    }
}

#[cfg(feature = "planted")]
static CHOSEN: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(u8::MAX);

/// From now on this bug is there, or none.
#[cfg(feature = "planted")]
pub fn choose(bug: Option<Bug>) {
    let bug = bug.map_or(u8::MAX, |bug| bug as u8);
    CHOSEN.store(bug, std::sync::atomic::Ordering::SeqCst);
}

#[cfg(feature = "planted")]
pub(crate) fn is(bug: Bug) -> bool {
    CHOSEN.load(std::sync::atomic::Ordering::Relaxed) == bug as u8
}

#[cfg(not(feature = "planted"))]
pub(crate) const fn is(_: Bug) -> bool {
    false
}
