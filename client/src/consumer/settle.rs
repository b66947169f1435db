//! Settlements from the user's call to the broker's answer, without I/O.
//!
//! ```text
//! push -> open rows -> ready -> sent -> answered
//!                        ^       |
//!                        +-------+  the stream broke: all that is unanswered is sent again
//! ```
//! The broker answers in the order of questions and counts: one for each acknowledged offset, each
//! settle item, each commit frame. Repeating a settlement is harmless, so doubt does not arise.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use millpond_protocol::control::{LeaseName, Outcome, Settle, SettleItem, Settled};
use millpond_protocol::frame::{self, FrameType};
use millpond_protocol::hot::{AckRun, encode_acks, encode_commit};
use millpond_protocol::limits::{SETTLE_ITEMS_MAX, SETTLE_ROWS_MAX};
use millpond_protocol::{ErrorCode, Offset};
use tokio::time::Instant;

use crate::completion::{Slots, Wakeups};
use crate::error::Error;

pub type Answer = Result<(), Error>;

/// Where to await a settlement's answer.
pub struct SettleSlot {
    pub slots: Arc<Slots<Answer>>,
    pub index: u32,
}

#[derive(Default)]
pub struct SettleQueue {
    acks: Option<Batch>,
    items: Option<Batch>,
    commit: Option<Batch>,
    ready: VecDeque<Batch>,
    sent: VecDeque<Batch>,
    /// Answers since the stream was opened.
    answered: u64,
    /// So many of them are to what was unanswered when it was opened.
    repeated: u64,
    /// Settlements without an answer.
    pending: usize,
}

/// Settlements that go in one frame.
struct Batch {
    rows: Rows,
    slots: Arc<Slots<Answer>>,
    /// How many calls wait on it.
    calls: u32,
    /// The first rows that have their answer.
    answered: u32,
}

enum Rows {
    Acks(Vec<LeaseName>),
    Items(Vec<Asked>),
    /// One offset for every call: the highest.
    Commit(Offset),
}

/// A settlement and when it was asked for: its delay counts from then, however long it waits here.
struct Asked {
    item: SettleItem,
    at: Instant,
}

impl SettleQueue {
    pub fn ack(&mut self, lease: LeaseName) -> SettleSlot {
        let batch = self
            .acks
            .get_or_insert_with(|| Batch::new(Rows::Acks(Vec::new())));
        let Rows::Acks(rows) = &mut batch.rows else {
            unreachable!("made of acks above")
        };
        rows.push(lease);
        let full = rows.len() >= SETTLE_ROWS_MAX as usize;
        let slot = batch.call();
        self.pending += 1;
        if full {
            self.ready.extend(self.acks.take());
        }
        slot
    }

    pub fn settle(&mut self, lease: LeaseName, outcome: Outcome) -> SettleSlot {
        let batch = self
            .items
            .get_or_insert_with(|| Batch::new(Rows::Items(Vec::new())));
        let Rows::Items(rows) = &mut batch.rows else {
            unreachable!("made of items above")
        };
        rows.push(Asked {
            item: SettleItem { lease, outcome },
            at: Instant::now(),
        });
        let full = rows.len() >= SETTLE_ITEMS_MAX;
        let slot = batch.call();
        self.pending += 1;
        if full {
            // What was acknowledged before stays before.
            self.ready.extend(self.acks.take());
            self.ready.extend(self.items.take());
        }
        slot
    }

    pub fn commit(&mut self, next: Offset) -> SettleSlot {
        let batch = self
            .commit
            .get_or_insert_with(|| Batch::new(Rows::Commit(next)));
        if let Rows::Commit(highest) = &mut batch.rows {
            *highest = next.max(*highest);
        }
        self.pending += 1;
        batch.call()
    }

    /// The next frame to be written.
    pub fn next(&mut self) -> Option<Bytes> {
        let batch = self
            .ready
            .pop_front()
            .or_else(|| self.acks.take())
            .or_else(|| self.items.take())
            .or_else(|| self.commit.take())?;
        let bytes = batch.encode();
        self.sent.push_back(batch);
        Some(bytes)
    }

    /// Takes the broker's answers; the highest offset among them that is committed now.
    pub fn settled(
        &mut self,
        settled: &Settled,
        wakeups: &mut Wakeups,
    ) -> Result<Option<Offset>, String> {
        let mut refused = settled.refused.iter().peekable();
        let mut committed = None;
        while self.answered < settled.upto {
            let Some(batch) = self.sent.front_mut() else {
                return Err("it answered settlements that were not sent".to_owned());
            };
            let next = refused.peek().map_or(u64::MAX, |refused| refused.ordinal);
            let left = u64::from(batch.rows.count() - batch.answered);
            let good = left
                .min(settled.upto - self.answered)
                .min(next.saturating_sub(self.answered));
            let done = if good > 0 {
                if let Rows::Commit(next) = batch.rows {
                    committed = committed.max(Some(next));
                }
                batch.answer(good as u32, &Ok(()), wakeups)
            } else {
                let Some(refused) = refused.next().filter(|r| r.ordinal == self.answered) else {
                    return Err("it refused settlements out of order".to_owned());
                };
                batch.answer(1, &Err(why(refused.code, refused.state)), wakeups)
            };
            self.answered += good.max(1);
            self.pending -= done;
            if batch.answered == batch.rows.count() {
                self.sent.pop_front();
            }
        }
        Ok(committed)
    }

    /// The stream is gone: what has no answer is sent again on the next one.
    pub fn lost(&mut self) {
        (self.answered, self.repeated) = (0, 0);
        for batch in std::mem::take(&mut self.sent).into_iter().rev() {
            self.ready.push_front(batch.rest());
        }
    }

    /// The stream is open again, and everything unanswered goes out first.
    pub fn repeat(&mut self) {
        let open = [self.acks.take(), self.items.take()];
        self.ready.extend(open.into_iter().flatten());
        let rows = self.ready.iter().map(|batch| u64::from(batch.rows.count()));
        self.repeated = rows.sum();
    }

    /// True until all that was unanswered when the stream was opened has its answer.
    pub fn is_repeating(&self) -> bool {
        self.answered < self.repeated
    }

    /// The session is over: everything fails.
    pub fn fail(&mut self, error: &Error, wakeups: &mut Wakeups) {
        let open = [self.acks.take(), self.items.take(), self.commit.take()];
        let waiting = self.sent.drain(..).chain(self.ready.drain(..));
        for mut batch in waiting.chain(open.into_iter().flatten()) {
            let left = batch.rows.count() - batch.answered;
            batch.answer(left, &Err(error.clone()), wakeups);
        }
        (self.answered, self.repeated) = (0, 0);
        self.pending = 0;
    }

    /// The leases that have settlements without an answer.
    pub fn leases(&self) -> impl Iterator<Item = LeaseName> {
        let open = [&self.acks, &self.items].into_iter().flatten();
        let all = self.sent.iter().chain(&self.ready).chain(open);
        all.flat_map(|batch| batch.rows.leases())
    }

    /// Settlements without an answer.
    pub fn pending(&self) -> usize {
        self.pending
    }
}

impl Batch {
    fn new(rows: Rows) -> Self {
        Self {
            rows,
            slots: Arc::new(Slots::new()),
            calls: 0,
            answered: 0,
        }
    }

    fn call(&mut self) -> SettleSlot {
        self.calls += 1;
        SettleSlot {
            slots: Arc::clone(&self.slots),
            index: self.calls - 1,
        }
    }

    /// Answers the next rows; the number of calls that it was.
    fn answer(&mut self, count: u32, answer: &Answer, wakeups: &mut Wakeups) -> usize {
        let (from, calls) = match self.rows {
            // One row answers every call.
            Rows::Commit(_) => (0, self.calls),
            _ => (self.calls - (self.rows.count() - self.answered), count),
        };
        self.slots.resolve(from, calls, answer.clone(), wakeups);
        self.answered += count;
        calls as usize
    }

    /// The same without its answered rows.
    fn rest(mut self) -> Self {
        let answered = std::mem::take(&mut self.answered) as usize;
        match &mut self.rows {
            Rows::Acks(rows) => drop(rows.drain(..answered)),
            Rows::Items(rows) => drop(rows.drain(..answered)),
            Rows::Commit(_) => {}
        }
        self
    }

    fn encode(&self) -> Bytes {
        match &self.rows {
            Rows::Acks(leases) => {
                let mut out = BytesMut::new();
                encode_acks(&runs(leases), &mut out);
                out.freeze()
            }
            Rows::Items(items) => {
                let now = Instant::now();
                let settle = Settle {
                    items: items.iter().map(|asked| asked.as_of(now)).collect(),
                };
                frame::encode(FrameType::Settle, &settle)
                    .expect("SETTLE_ITEMS_MAX items with cut reasons fit a control frame")
            }
            Rows::Commit(next) => encode_commit(*next),
        }
    }
}

impl Asked {
    /// What is left of it to ask for: its delay is shorter by what has passed.
    fn as_of(&self, now: Instant) -> SettleItem {
        let mut item = self.item.clone();
        if let Outcome::Nack { delay_ms, .. } | Outcome::Release { delay_ms } = &mut item.outcome
            && let Some(delay_ms) = delay_ms
        {
            let passed = now.saturating_duration_since(self.at).as_millis();
            *delay_ms = delay_ms.saturating_sub(u64::try_from(passed).unwrap_or(u64::MAX));
        }
        item
    }
}

impl Rows {
    fn leases(&self) -> impl Iterator<Item = LeaseName> {
        let (acks, items): (&[LeaseName], &[Asked]) = match self {
            Self::Acks(rows) => (rows, &[]),
            Self::Items(rows) => (&[], rows),
            Self::Commit(_) => (&[], &[]),
        };
        acks.iter()
            .copied()
            .chain(items.iter().map(|asked| asked.item.lease))
    }

    fn count(&self) -> u32 {
        match self {
            Self::Acks(rows) => rows.len() as u32,
            Self::Items(rows) => rows.len() as u32,
            Self::Commit(_) => 1,
        }
    }
}

/// Consecutive offsets with the same delivery number become one run.
fn runs(leases: &[LeaseName]) -> Vec<AckRun> {
    let mut runs: Vec<AckRun> = Vec::new();
    for lease in leases {
        match runs.last_mut() {
            Some(run)
                if run.delivery == lease.delivery
                    && run.offset.0.checked_add(u64::from(run.run)) == Some(lease.offset.0) =>
            {
                run.run += 1;
            }
            _ => runs.push(AckRun {
                offset: lease.offset,
                delivery: lease.delivery,
                run: 1,
            }),
        }
    }
    runs
}

fn why(code: ErrorCode, state: millpond_protocol::control::MessageState) -> Error {
    match code {
        ErrorCode::LeaseLost => Error::LeaseLost { state: Some(state) },
        other => millpond_protocol::WireError::new(
            other,
            format!("the settlement was refused: {other:?}; the message is {state:?}"),
        )
        .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millpond_protocol::Delivery;
    use millpond_protocol::control::{MessageState, SettleRefused};
    use std::task::{Context, Poll, Waker};

    fn lease(offset: u64, delivery: u32) -> LeaseName {
        LeaseName {
            offset: Offset(offset),
            delivery: Delivery(delivery),
        }
    }

    fn now(slot: &SettleSlot) -> Option<Answer> {
        let context = Context::from_waker(Waker::noop());
        match slot.slots.poll(slot.index, &context) {
            Poll::Ready((_, answer)) => Some(answer),
            Poll::Pending => None,
        }
    }

    fn upto(upto: u64) -> Settled {
        Settled {
            upto,
            refused: vec![],
        }
    }

    #[test]
    fn consecutive_offsets_of_one_delivery_number_make_one_run() {
        let leases = [lease(4, 1), lease(5, 1), lease(6, 2), lease(8, 2)];
        let found: Vec<_> = runs(&leases).iter().map(|r| (r.offset.0, r.run)).collect();
        assert_eq!(found, [(4, 2), (6, 1), (8, 1)]);
    }

    #[test]
    fn a_refusal_hits_its_ordinal_only() {
        let mut queue = SettleQueue::default();
        let slots: Vec<_> = (0..4).map(|offset| queue.ack(lease(offset, 1))).collect();
        let nack = queue.settle(lease(9, 1), Outcome::Release { delay_ms: None });
        while queue.next().is_some() {}
        let settled = Settled {
            upto: 5,
            refused: vec![SettleRefused {
                ordinal: 2,
                code: ErrorCode::LeaseLost,
                state: MessageState::Acked,
            }],
        };
        queue.settled(&settled, &mut Wakeups::default()).unwrap();
        let lost = Error::LeaseLost {
            state: Some(MessageState::Acked),
        };
        assert_eq!(now(&slots[1]), Some(Ok(())));
        assert_eq!(now(&slots[2]), Some(Err(lost)));
        assert_eq!(now(&slots[3]), Some(Ok(())));
        assert_eq!(now(&nack), Some(Ok(())));
        assert_eq!(queue.pending(), 0);
    }

    #[test]
    fn after_a_break_only_the_unanswered_rest_is_sent_again() {
        let mut queue = SettleQueue::default();
        let slots: Vec<_> = (0..3).map(|offset| queue.ack(lease(offset, 1))).collect();
        queue.next().unwrap();
        queue.settled(&upto(1), &mut Wakeups::default()).unwrap();
        queue.lost();
        let again = queue.next().unwrap();
        let runs = millpond_protocol::hot::decode_acks(&again[8..]).unwrap();
        assert_eq!((runs[0].offset, runs[0].run), (Offset(1), 2));
        assert_eq!(now(&slots[0]), Some(Ok(())));
        assert_eq!(now(&slots[2]), None);
        queue.settled(&upto(2), &mut Wakeups::default()).unwrap();
        assert_eq!(now(&slots[2]), Some(Ok(())));
    }

    #[test]
    fn a_delay_counts_from_the_call_however_long_the_settlement_waits() {
        let at = Instant::now();
        let left = |delay_ms: Option<u64>, passed_ms: u64| {
            let outcome = Outcome::Release { delay_ms };
            let item = SettleItem {
                lease: lease(1, 1),
                outcome,
            };
            let later = at + std::time::Duration::from_micros(passed_ms * 1_000 + 999);
            match (Asked { item, at }.as_of(later)).outcome {
                Outcome::Release { delay_ms } => delay_ms,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(left(Some(1_000), 0), Some(1_000), "never early");
        assert_eq!(left(Some(1_000), 300), Some(700));
        assert_eq!(left(Some(1_000), 2_000), Some(0));
        assert_eq!(left(None, 300), None, "the backoff is the broker's");
    }

    #[test]
    fn a_full_batch_does_not_overtake_the_acks_before_it() {
        let mut queue = SettleQueue::default();
        let _ack = queue.ack(lease(7, 1));
        for offset in 0..SETTLE_ITEMS_MAX as u64 {
            queue.settle(lease(offset, 2), Outcome::Release { delay_ms: None });
        }
        let first = queue.next().unwrap();
        let runs = millpond_protocol::hot::decode_acks(&first[8..]).unwrap();
        assert_eq!(runs[0].offset, Offset(7));
    }

    #[test]
    fn commits_that_wait_together_are_one_row() {
        let mut queue = SettleQueue::default();
        let slots = [queue.commit(Offset(3)), queue.commit(Offset(7))];
        let bytes = queue.next().unwrap();
        let next = millpond_protocol::hot::decode_commit(&bytes[8..]);
        assert_eq!(next, Ok(Offset(7)));
        assert!(queue.next().is_none());
        queue.settled(&upto(1), &mut Wakeups::default()).unwrap();
        assert!(slots.iter().all(|slot| now(slot) == Some(Ok(()))));
    }

    #[test]
    fn an_answer_too_many_is_noticed() {
        let mut queue = SettleQueue::default();
        let _slot = queue.ack(lease(0, 1));
        queue.next().unwrap();
        let result = queue.settled(&upto(2), &mut Wakeups::default());
        assert!(result.is_err());
    }
}
