//! A producer's messages from `send` to their answers, without I/O: time and frames are arguments.
//!
//! ```text
//! push -> filling -> waiting -> sent -> answered
//!                       ^         |
//!                       +- taken back: refused, or the stream broke
//! ```
//! Sequences rise through taken back, sent, waiting, filling, in this order. `tip` is the `previous`
//! of the next new frame: what the broker will have accepted last when that frame arrives. After a
//! refusal nothing is sent until every frame behind it has been answered too; then `tip` becomes
//! what the broker named, and all goes out again in order. So a message that fails leaves no hole
//! in the chain, and none can overtake it.

mod answers;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use millpond_protocol::control::ProducerOpened;
use millpond_protocol::hot::Credit;
use millpond_protocol::{ErrorCode, Message, ProducerKey, Sequence};

use super::batch::{Batch, Filling, Outcome};
use crate::completion::{Slots, Wakeups};
use crate::error::Error;
use crate::limits::{
    BATCH_CAPACITY_MIN, GATHER_BYTES, GATHER_FRAMES, PRODUCER_WINDOW_BYTES, REFUSED_WAIT,
};

/// Why the broker takes less than this producer would send.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub struct Pressure {
    pub reason: ErrorCode,
    pub retry_after: Duration,
}

/// What the user configured.
#[derive(Copy, Clone, Debug)]
pub struct PipelineConfig {
    pub window_messages: usize,
    pub linger: Duration,
    pub send_timeout: Duration,
}

/// A frame to be written.
pub struct PublishFrame {
    pub previous: Sequence,
    pub count: u32,
    pub messages: Bytes,
    /// Something is left to be asked for.
    pub more: bool,
}

/// What the writer should do.
pub enum Next {
    Write(PublishFrame),
    /// Nothing now; at this time there may be, if nothing else happens before.
    Wait(Option<Instant>),
}

/// What an answer means for the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Fine,
    /// Open the stream again.
    Reopen,
    /// The producer is over.
    Fatal(Error),
}

/// Where to await a message's outcome.
pub struct Slot {
    pub slots: Arc<Slots<Outcome>>,
    pub index: u32,
    pub sequence: Sequence,
}

pub struct Pipeline {
    config: PipelineConfig,
    /// The broker's dedup state; another one remembers nothing of this one.
    producer: ProducerKey,
    tip: Sequence,
    /// The highest sequence known to be accepted.
    accepted: Sequence,
    /// The highest sequence ever written to a stream.
    highest_sent: Sequence,
    /// The highest sequence given to a message.
    last_assigned: Sequence,
    /// What had been accepted before this producer was opened: repeats of that are true duplicates.
    inherited: Sequence,
    filling: Option<Filling>,
    waiting: VecDeque<Batch>,
    sent: VecDeque<Batch>,
    taken_back: VecDeque<Batch>,
    /// Everything above, in messages and bytes.
    pending: Totals,
    /// Of it what is not in `sent`.
    unsent: Totals,
    used: Totals,
    /// `None` while there is no stream.
    credit: Option<Credit>,
    pressure: Option<Pressure>,
    last_refusal: Option<Error>,
    recovering: bool,
    /// Rounds of refusals without any acknowledgement between them.
    refused_rounds: u32,
    hold_until: Option<Instant>,
    flushing: bool,
    last_batch_bytes: usize,
    /// The first failure since the last flush.
    failed: Option<Error>,
}

#[derive(Copy, Clone, Default, Debug, PartialEq, Eq)]
struct Totals {
    messages: u64,
    bytes: u64,
}

impl Totals {
    fn add(&mut self, messages: u64, bytes: usize) {
        self.messages += messages;
        self.bytes += bytes as u64;
    }

    fn take(&mut self, messages: u64, bytes: usize) {
        assert!(self.messages >= messages && self.bytes >= bytes as u64);
        self.messages -= messages;
        self.bytes -= bytes as u64;
    }
}

impl Pipeline {
    /// A pipeline for a stream that has just been opened.
    pub fn new(config: PipelineConfig, opened: &ProducerOpened, first: Option<Sequence>) -> Self {
        let last = opened.last_sequence;
        Self {
            config,
            producer: opened.producer,
            tip: last,
            accepted: last,
            highest_sent: last,
            last_assigned: first.map_or(last, |first| Sequence(first.0.saturating_sub(1))),
            inherited: last,
            filling: None,
            waiting: VecDeque::new(),
            sent: VecDeque::new(),
            taken_back: VecDeque::new(),
            pending: Totals::default(),
            unsent: Totals::default(),
            used: Totals::default(),
            credit: Some(opened.credit),
            pressure: None,
            last_refusal: None,
            recovering: false,
            refused_rounds: 0,
            hold_until: None,
            flushing: false,
            last_batch_bytes: BATCH_CAPACITY_MIN,
            failed: None,
        }
    }

    /// Takes a message in; the time is asked for when a batch begins.
    ///
    /// # Errors
    /// `Message` if it breaks a limit, `SequenceNotRising`, or `Backpressure` if there is no room.
    pub fn push(
        &mut self,
        message: &Message,
        sequence: Option<Sequence>,
        now: impl FnOnce() -> Instant,
    ) -> Result<Slot, Error> {
        let bytes = message.encoded_bytes();
        if !self.has_room(bytes) {
            return Err(self.backpressure());
        }
        let sequence = sequence.unwrap_or(self.last_assigned.next());
        if sequence <= self.last_assigned {
            return Err(Error::SequenceNotRising {
                last: self.last_assigned,
                given: sequence,
            });
        }
        let crosses =
            |filling: &Filling| filling.first() <= self.inherited && sequence > self.inherited;
        if self
            .filling
            .as_ref()
            .is_some_and(|f| f.is_full_for(bytes) || crosses(f))
        {
            self.close_filling();
        }
        let capacity = self.last_batch_bytes.max(bytes);
        let filling = self
            .filling
            .get_or_insert_with(|| Filling::new(capacity, now()));
        let (slots, index) = filling.push(message, sequence);
        if filling.is_full() {
            self.close_filling();
        }
        self.last_assigned = sequence;
        self.pending.add(1, bytes);
        self.unsent.add(1, bytes);
        Ok(Slot {
            slots,
            index,
            sequence,
        })
    }

    /// The next frame to be written.
    pub fn next(&mut self, now: Instant) -> Next {
        let Some(credit) = self.credit else {
            return Next::Wait(None);
        };
        if self.recovering {
            return Next::Wait(None);
        }
        if let Some(until) = self.hold_until {
            if now < until {
                return Next::Wait(Some(until));
            }
            self.hold_until = None;
        }
        if self.waiting.is_empty() {
            match &self.filling {
                None => return Next::Wait(None),
                Some(filling) => {
                    let due = filling.created + self.config.linger;
                    if !self.flushing && now < due {
                        return Next::Wait(Some(due));
                    }
                    if self.gathers() {
                        return Next::Wait(None);
                    }
                }
            }
            self.close_filling();
        }
        match self.take_fitting(credit) {
            Some(batch) => Next::Write(self.send(batch)),
            None => Next::Wait(None),
        }
    }

    /// Whether what waits is too little for a frame of its own while others are unanswered: the next
    /// answer, or a little more, will send it. Many producers would else send a frame a message.
    pub fn gathers(&self) -> bool {
        let little = |filling: &Filling| filling.bytes_len() < GATHER_BYTES;
        self.sent.len() >= GATHER_FRAMES
            && self.waiting.is_empty()
            && !self.flushing
            && self.filling.as_ref().is_some_and(little)
    }

    /// Nothing more is sent before the stream has been opened again.
    pub fn pause(&mut self) {
        self.credit = None;
    }

    /// The stream is gone; what was sent and not answered is in doubt.
    pub fn lost(&mut self) {
        self.credit = None;
        self.used = Totals::default();
        self.recovering = false;
        self.hold_until = None;
        for mut batch in std::mem::take(&mut self.sent) {
            batch.in_doubt = true;
            self.take_back(batch);
        }
        self.requeue();
    }

    /// The stream has been opened again.
    ///
    /// # Errors
    /// `Fenced` if somebody else has written with this producer's id since.
    pub fn reopened(
        &mut self,
        opened: &ProducerOpened,
        wakeups: &mut Wakeups,
    ) -> Result<(), Error> {
        let last = opened.last_sequence;
        if last > self.highest_sent {
            return Err(Error::Fenced);
        }
        let forgotten = last < self.accepted || opened.producer != self.producer;
        self.producer = opened.producer;
        for mut batch in std::mem::take(&mut self.waiting) {
            if batch.in_doubt && forgotten {
                self.give_up(batch, wakeups);
                continue;
            }
            // The older incarnation is fenced: what is not in now will not come in by itself.
            batch.in_doubt &= batch.first <= last;
            self.waiting.push_back(batch);
        }
        self.tip = last;
        self.accepted = last;
        self.credit = Some(opened.credit);
        Ok(())
    }

    /// Gives up what is older than the send timeout.
    pub fn expire(&mut self, now: Instant, wakeups: &mut Wakeups) {
        let Some(limit) = now.checked_sub(self.config.send_timeout) else {
            return;
        };
        let old = |batch: &Batch| batch.created <= limit;
        while self.taken_back.front().is_some_and(old) {
            let batch = self.taken_back.pop_front().expect("looked at above");
            self.give_up(batch, wakeups);
        }
        for batch in self.sent.iter_mut().take_while(|batch| old(batch)) {
            if !batch.abandoned {
                batch.abandon(wakeups);
                self.failed.get_or_insert(Error::Ambiguous);
            }
        }
        while self.waiting.front().is_some_and(old) {
            let batch = self.waiting.pop_front().expect("looked at above");
            self.give_up(batch, wakeups);
        }
        if self.filling.as_ref().is_some_and(|f| f.created <= limit) {
            self.close_filling();
            if let Some(batch) = self.waiting.pop_back() {
                self.give_up(batch, wakeups);
            }
        }
    }

    /// Everything fails: with `error`, or as `Ambiguous` where the outcome is unknown.
    pub fn fail(&mut self, error: &Error, wakeups: &mut Wakeups) {
        self.close_filling();
        // An error that the broker sent on the stream comes behind the answers to what it took.
        let unanswered = match error {
            Error::Closed => Error::Ambiguous,
            told => told.clone(),
        };
        for (batches, outcome) in [
            (std::mem::take(&mut self.taken_back), error),
            (std::mem::take(&mut self.sent), &unanswered),
            (std::mem::take(&mut self.waiting), error),
        ] {
            for mut batch in batches {
                let outcome = if batch.in_doubt {
                    Error::Ambiguous
                } else {
                    outcome.clone()
                };
                self.finish(&mut batch, Err(outcome), wakeups);
            }
        }
        (self.pending, self.unsent) = (Totals::default(), Totals::default());
        self.credit = None;
    }

    /// Ends the wait of `linger` until everything present has been sent.
    pub fn flush(&mut self) {
        self.flushing = self.filling.is_some();
    }

    /// The first failure since this was last asked.
    pub fn take_failure(&mut self) -> Option<Error> {
        self.failed.take()
    }

    pub fn has_room(&self, bytes: usize) -> bool {
        let window = self.pending.messages < self.config.window_messages as u64
            && self.pending.bytes + bytes as u64 <= PRODUCER_WINDOW_BYTES as u64;
        window
            && self.credit.is_none_or(|credit| {
                self.used.messages + self.unsent.messages < credit.max_messages
                    && self.used.bytes + self.unsent.bytes + bytes as u64 <= credit.max_bytes
            })
    }

    /// Why there is no room, as an error.
    pub fn backpressure(&self) -> Error {
        if self.credit.is_none() {
            return Error::Timeout {
                what: "waiting for the connection to the broker",
            };
        }
        let pressure = self.pressure.unwrap_or(Pressure {
            reason: ErrorCode::CommitQueue,
            retry_after: REFUSED_WAIT,
        });
        Error::Backpressure {
            reason: pressure.reason,
            retry_after: pressure.retry_after,
        }
    }

    pub fn pressure(&self) -> Option<Pressure> {
        self.pressure
    }

    pub fn last_assigned(&self) -> Sequence {
        self.last_assigned
    }

    pub fn accepted(&self) -> Sequence {
        self.accepted
    }

    /// The lowest sequence that has no outcome yet.
    pub fn oldest_pending(&self) -> Option<Sequence> {
        let sent = self.sent.iter().find(|batch| !batch.abandoned);
        let batch = self.taken_back.front().or(sent).or(self.waiting.front());
        let filling = self.filling.as_ref().map(Filling::first);
        batch.map(|batch| batch.first).or(filling)
    }

    /// True if the answer to something sent may still come.
    pub fn is_under_way(&self) -> bool {
        !self.sent.is_empty()
    }

    /// True if something has not been written, or must be written again.
    pub fn has_unsent(&self) -> bool {
        self.unsent != Totals::default()
    }

    pub fn is_empty(&self) -> bool {
        self.pending == Totals::default()
    }

    fn close_filling(&mut self) {
        self.flushing = false;
        if let Some(filling) = self.filling.take() {
            self.last_batch_bytes = filling.bytes_len();
            self.waiting.push_back(filling.close());
        }
    }

    /// The first waiting batch, or as much of it as there is credit for.
    fn take_fitting(&mut self, credit: Credit) -> Option<Batch> {
        let batch = self.waiting.pop_front()?;
        let messages = credit.max_messages.saturating_sub(self.used.messages);
        let bytes = credit.max_bytes.saturating_sub(self.used.bytes);
        if u64::from(batch.count) <= messages && batch.bytes.len() as u64 <= bytes {
            return Some(batch);
        }
        let count = batch.fitting(messages, bytes);
        if count == 0 {
            self.waiting.push_front(batch);
            return None;
        }
        let (front, rest) = batch.split(count);
        self.waiting.push_front(rest);
        Some(front)
    }

    fn send(&mut self, mut batch: Batch) -> PublishFrame {
        let (count, bytes) = (u64::from(batch.count), batch.bytes.len());
        // A batch that may be there already names what came before it, not what came after.
        batch.previous = self.tip.min(Sequence(batch.first.0.saturating_sub(1)));
        self.tip = self.tip.max(batch.last);
        self.highest_sent = self.highest_sent.max(batch.last);
        self.used.add(count, bytes);
        self.unsent.take(count, bytes);
        let frame = PublishFrame {
            previous: batch.previous,
            count: batch.count,
            messages: batch.bytes.clone(),
            more: self.has_unsent(),
        };
        self.sent.push_back(batch);
        frame
    }

    /// Puts an unanswered batch aside to be sent again.
    fn take_back(&mut self, batch: Batch) {
        if batch.unanswered() == 0 {
            return;
        }
        if batch.abandoned {
            self.pending.take(u64::from(batch.count), batch.bytes.len());
            return;
        }
        let (count, bytes) = (batch.count, batch.bytes.len());
        let batch = batch.trim();
        let gone = count - batch.count;
        self.pending
            .take(u64::from(gone), bytes - batch.bytes.len());
        self.unsent.add(u64::from(batch.count), batch.bytes.len());
        self.taken_back.push_back(batch);
    }

    fn requeue(&mut self) {
        let mut again = VecDeque::new();
        for batch in std::mem::take(&mut self.taken_back) {
            if batch.alone {
                batch.singles(&mut again);
            } else {
                again.push_back(batch);
            }
        }
        again.append(&mut self.waiting);
        self.waiting = again;
    }

    /// Fails a batch that is not under way and forgets it.
    fn give_up(&mut self, mut batch: Batch, wakeups: &mut Wakeups) {
        let error = if batch.in_doubt {
            Error::Ambiguous
        } else {
            self.last_refusal
                .clone()
                .unwrap_or_else(|| self.backpressure())
        };
        self.finish(&mut batch, Err(error), wakeups);
        self.unsent.take(u64::from(batch.count), batch.bytes.len());
        self.dropped(&batch);
    }

    fn finish(&mut self, batch: &mut Batch, outcome: Outcome, wakeups: &mut Wakeups) {
        if let Err(error) = &outcome
            && !batch.abandoned
        {
            self.failed.get_or_insert(error.clone());
        }
        batch.answer_all(outcome, wakeups);
    }

    fn dropped(&mut self, batch: &Batch) {
        self.pending.take(u64::from(batch.count), batch.bytes.len());
    }
}

#[cfg(test)]
mod tests;
