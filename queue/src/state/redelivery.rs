//! What a queue subscription remembers of messages that were handed out and came back.
//!
//! Exact and durable: counters, absolute due time, history. Invariant: an entry waits if and only if
//! it has a due time; an entry without one is leased.

mod shelves;

use std::sync::Arc;

use millpond_protocol::limits::HISTORY_MAX;
use millpond_protocol::{LogIndex, SessionId, Stamp};
use serde::{Deserialize, Serialize};

pub use self::shelves::{Glance, Retries, Told};
use crate::effect::Place;
use crate::record::{FailureKind, HistoryItem};
use crate::state::topic::Extra;

/// One allocation for a message that failed once, and for its second lease. What may be absent stands apart from
/// whether it is there, because an `Option` of eight bytes takes sixteen; absent is all zeros, so that equal
/// entries have equal fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retry {
    pub failures: u32,
    /// Hand-outs of any kind since it entered the subscription or was redriven.
    pub deliveries: u32,
    pub releases: u32,
    /// The delivery number of the last lease.
    pub delivery: u32,
    /// Whose it was.
    pub session: SessionId,
    /// How its own session's settlement ended the last lease, if one did.
    pub answered: Option<Answer>,
    /// Begun beside others in a session that was lost: to be delivered alone.
    pub suspect: bool,
    /// Its last failure was the loss of a session: if one attempt is left, it is delivered alone.
    pub lost: bool,
    is_waiting: bool,
    has_begun: bool,
    has_place: bool,
    has_earlier: bool,
    due: Stamp,
    first_attempt_at: Stamp,
    index: LogIndex,
    record: u32,
    earlier_delivery: u32,
    earlier_session: SessionId,
    last: Option<Failure>,
    /// Absent if it is all at its default.
    rest: Option<Box<Rest>>,
}

/// What few messages have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Rest {
    redrives: u32,
    own: Option<Extra>,
    /// Leases before the one before the last, oldest first.
    earlier: Vec<(u32, SessionId)>,
    /// Failures before the last one, oldest first.
    failures: Vec<Failure>,
}

const _: () = assert!(
    size_of::<Retry>() <= 120,
    "with the allocator's eight bytes it is two cache lines"
);

/// A settlement that ended a lease, other than an ack.
#[derive(Copy, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    Nack,
    Reject,
    Release,
}

/// Earlier leases that are remembered, so that their late acks count.
pub const EARLIER_MAX: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub at: Stamp,
    pub duration_ms: u64,
    pub consumer: Arc<str>,
    pub kind: FailureKind,
    pub code: u32,
}

impl Retry {
    /// A message's first hand-out.
    pub fn first(session: SessionId, delivery: u32) -> Self {
        Self {
            deliveries: 1,
            delivery,
            session,
            ..Self::default()
        }
    }

    /// A message that came back from the dead letters so many times, with what it has of its own.
    pub fn redriven(redrives: u32, own: Option<Extra>) -> Self {
        let rest = Rest {
            redrives,
            own,
            ..Rest::default()
        };
        Self {
            rest: (rest != Rest::default()).then(|| Box::new(rest)),
            ..Self::default()
        }
    }

    /// It is leased again.
    pub fn lease(&mut self, session: SessionId, delivery: u32) {
        if self.deliveries > 0
            && let Some(before) = self.replace_earlier(Some((self.delivery, self.session)))
        {
            push_last(&mut self.rest().earlier, before, EARLIER_MAX - 1);
        }
        self.set_due(None);
        self.deliveries += 1;
        self.delivery = delivery;
        self.session = session;
        self.answered = None;
    }

    /// Whether this lease was once given.
    pub fn was_leased(&self, session: SessionId, delivery: u32) -> bool {
        let lease = (delivery, session);
        lease == (self.delivery, self.session) || self.earlier().any(|earlier| earlier == lease)
    }

    pub fn remember(&mut self, failure: Failure) {
        if let Some(before) = self.last.replace(failure) {
            push_last(&mut self.rest().failures, before, HISTORY_MAX - 1);
        }
    }

    /// What a snapshot tells of its earlier leases and its failures, oldest first.
    pub fn set_past(&mut self, mut earlier: Vec<(u32, SessionId)>, mut history: Vec<Failure>) {
        self.replace_earlier(earlier.pop());
        self.last = history.pop();
        if !earlier.is_empty() || !history.is_empty() {
            earlier.shrink_to_fit();
            history.shrink_to_fit();
            let rest = self.rest();
            rest.earlier = earlier;
            rest.failures = history;
        }
    }

    pub fn set_due(&mut self, due: Option<Stamp>) {
        self.is_waiting = due.is_some();
        self.due = due.unwrap_or_default();
    }

    pub fn set_first_attempt_at(&mut self, at: Option<Stamp>) {
        self.has_begun = at.is_some();
        self.first_attempt_at = at.unwrap_or_default();
    }

    pub fn set_place(&mut self, place: Option<Place>) {
        self.has_place = place.is_some();
        let place = place.unwrap_or_default();
        (self.index, self.record) = (place.index, place.record);
    }

    /// When it may be handed out again; `None`: it is leased.
    pub fn due(&self) -> Option<Stamp> {
        self.is_waiting.then_some(self.due)
    }

    pub fn first_attempt_at(&self) -> Option<Stamp> {
        self.has_begun.then_some(self.first_attempt_at)
    }

    /// The record of the last failure.
    pub fn place(&self) -> Option<Place> {
        let (index, record) = (self.index, self.record);
        self.has_place.then_some(Place { index, record })
    }

    pub fn redrives(&self) -> u32 {
        self.rest.as_ref().map_or(0, |rest| rest.redrives)
    }

    /// What the message has of its own, kept here once it was redriven.
    pub fn own(&self) -> Option<Extra> {
        self.rest.as_ref()?.own
    }

    /// Leases before the last one, oldest first: delivery number and whose it was.
    pub fn earlier(&self) -> impl Iterator<Item = (u32, SessionId)> {
        let before = self.rest.iter().flat_map(|rest| &rest.earlier);
        before.copied().chain(self.last_earlier())
    }

    /// The last failures, oldest first.
    pub fn history(&self) -> impl Iterator<Item = &Failure> {
        let before = self.rest.iter().flat_map(|rest| &rest.failures);
        before.chain(&self.last)
    }

    /// Whether its next hand-out is to be the only one of its session.
    pub fn is_alone(&self, max_attempts: u32) -> bool {
        self.suspect || (self.lost && self.failures + 1 >= max_attempts)
    }

    fn bytes(&self) -> u64 {
        let has_more = self
            .rest
            .as_ref()
            .is_some_and(|rest| rest.redrives > 0 || rest.own.is_some());
        Self::bytes_with(has_more, self.earlier().count(), self.history().count())
    }

    /// What an entry takes that remembers so many earlier leases and failures, and may have more than they.
    pub fn bytes_with(has_more: bool, earlier: usize, failures: usize) -> u64 {
        // The last of each stands in the entry.
        let (earlier, failures) = (earlier.saturating_sub(1), failures.saturating_sub(1));
        let mut bytes = size_of::<Self>() + MORE_BYTES;
        if has_more || earlier > 0 || failures > 0 {
            let lists = earlier * size_of::<(u32, SessionId)>() + failures * size_of::<Failure>();
            bytes += size_of::<Rest>() + REST_MORE_BYTES + lists;
        }
        bytes as u64
    }

    /// The lease before the last one.
    fn last_earlier(&self) -> Option<(u32, SessionId)> {
        let lease = (self.earlier_delivery, self.earlier_session);
        self.has_earlier.then_some(lease)
    }

    fn replace_earlier(&mut self, lease: Option<(u32, SessionId)>) -> Option<(u32, SessionId)> {
        let before = self.last_earlier();
        self.has_earlier = lease.is_some();
        (self.earlier_delivery, self.earlier_session) = lease.unwrap_or_default();
        before
    }

    /// To put something there that is not its default.
    fn rest(&mut self) -> &mut Rest {
        self.rest.get_or_insert_default()
    }
}

/// What the allocator and the trees need for an entry beside it: 8 bytes, and 56 in nodes that are half full or
/// little more.
const MORE_BYTES: usize = 64;

/// What the allocator needs for the rest and its two lists, in steps of 16 bytes.
const REST_MORE_BYTES: usize = 32;

/// Appends to a list that keeps its last `most` items, and takes no more memory than it has items: they are few,
/// and many messages may wait.
fn push_last<T>(list: &mut Vec<T>, item: T, most: usize) {
    if list.len() == most {
        list.remove(0);
    }
    if list.len() == list.capacity() {
        list.reserve_exact(1);
    }
    list.push(item);
}

/// A message's failures with the one that happens now as the last: what a record tells of it.
pub fn history_with(retry: Option<&Retry>, last: &Failure) -> Vec<HistoryItem> {
    let before = retry.into_iter().flat_map(Retry::history);
    let all = before.chain(std::iter::once(last));
    let surplus = retry.map_or(0, |retry| {
        (retry.history().count() + 1).saturating_sub(HISTORY_MAX)
    });
    let item = |failure: &Failure| HistoryItem {
        at: failure.at,
        duration_ms: failure.duration_ms,
        consumer: failure.consumer.to_string(),
        outcome: failure.kind,
        code: failure.code,
    };
    all.skip(surplus).map(item).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(nth: u32) -> Failure {
        Failure {
            at: Stamp(u64::from(nth)),
            duration_ms: 1,
            consumer: "c".into(),
            kind: FailureKind::Nack,
            code: nth,
        }
    }

    /// Handed out and failed so many times, then leased once more.
    fn tried(times: u32) -> Retry {
        let mut retry = Retry::first(SessionId(1), 1);
        for nth in 1..=times {
            retry.remember(failure(nth));
            retry.set_due(Some(Stamp(0)));
            retry.lease(SessionId(u64::from(nth) + 1), nth + 1);
        }
        retry
    }

    #[test]
    fn one_failure_and_the_lease_after_it_stand_in_the_entry() {
        let once = tried(1);
        assert!(once.rest.is_none());
        assert_eq!(once.bytes(), Retry::default().bytes());
        assert!(tried(2).bytes() > once.bytes());
        assert_eq!(once.history().count() + once.earlier().count(), 2);
    }

    #[test]
    fn the_last_leases_and_failures_are_kept_oldest_first() {
        for times in 0..15 {
            let retry = tried(times);
            let earlier: Vec<_> = retry.earlier().map(|(delivery, _)| delivery).collect();
            let codes: Vec<_> = retry.history().map(|failure| failure.code).collect();
            let first_of = |most: usize| (times + 1).saturating_sub(most as u32).max(1);
            assert_eq!(earlier, Vec::from_iter(first_of(EARLIER_MAX)..=times));
            assert_eq!(codes, Vec::from_iter(first_of(HISTORY_MAX)..=times));
            let is_known = |delivery: u32| retry.was_leased(SessionId(delivery.into()), delivery);
            assert!((first_of(EARLIER_MAX)..=times + 1).all(is_known));
        }
    }

    #[test]
    fn an_entry_that_is_told_again_is_equal() {
        for times in 0..15 {
            let retry = tried(times);
            let mut told = Retry::redriven(0, None);
            (told.deliveries, told.delivery) = (retry.deliveries, retry.delivery);
            told.session = retry.session;
            told.set_past(
                retry.earlier().collect(),
                retry.history().cloned().collect(),
            );
            assert_eq!(told, retry);
            assert_eq!(told.bytes(), retry.bytes());
        }
    }

    #[test]
    fn what_is_zero_is_not_what_is_absent() {
        let mut retry = Retry::redriven(0, None);
        retry.set_due(Some(Stamp(0)));
        retry.set_first_attempt_at(Some(Stamp(0)));
        retry.set_place(Some(Place::default()));
        assert_ne!(retry, Retry::default());
        assert_eq!(
            (retry.due(), retry.first_attempt_at()),
            (Some(Stamp(0)), Some(Stamp(0)))
        );
        assert_eq!(retry.place(), Some(Place::default()));
        retry.set_due(None);
        retry.set_first_attempt_at(None);
        retry.set_place(None);
        assert_eq!(retry, Retry::default());
        assert_eq!(
            Retry::redriven(1, Some(Extra::default())).own(),
            Some(Extra::default())
        );
        assert_ne!(Retry::redriven(0, Some(Extra::default())), Retry::default());
    }
}
