//! Settlements, and every other end of a lease.
//!
//! A settlement names its lease. An ack that comes late still counts while the message waits: the
//! work is done, even if the lease itself was lost in a crash. Anything else that comes late changes
//! nothing. Repeating a settlement is fine.

use std::sync::Arc;

use millpond_protocol::control::{DeadReason, MessageState, Outcome as Verdict, RejectKind};
use millpond_protocol::hot::AckRun;
use millpond_protocol::{ErrorCode, SessionId, Stamp, SubscriptionId};

use super::unknown_subscription;
use crate::dispatch::timers::Timer;
use crate::effect::{Outcome, Refusal};
use crate::planted::{self, Bug};
use crate::policy::{self, Failing};
use crate::queue::{At, Queue};
use crate::record::{FailureKind, SettleEntry};
use crate::state::dirty;
use crate::state::lease::LeaseRun;
use crate::state::redelivery::{Answer, Failure, Retry};
use crate::state::subscription::Subscription;

/// A lease that is over; it has been taken out of the subscription's leases.
#[derive(Copy, Clone, Debug)]
pub(super) struct Ended<'a> {
    pub sub: SubscriptionId,
    pub offset: u64,
    pub run: LeaseRun,
    pub consumer: &'a Arc<str>,
    /// Its own session's settlement ended it.
    pub answered: bool,
}

/// How a lease ended, other than by an ack.
#[derive(Copy, Clone, Debug)]
pub(super) enum Ending {
    Failure {
        kind: FailureKind,
        code: u32,
        delay_ms: Option<u64>,
        begun_at: Option<Stamp>,
    },
    Reject {
        kind: RejectKind,
        code: u32,
        begun_at: Option<Stamp>,
    },
    Release {
        delay_ms: Option<u64>,
        suspect: bool,
    },
}

impl Queue {
    pub(crate) fn settle(
        &mut self,
        at: At,
        sub_id: SubscriptionId,
        session: SessionId,
        acks: &[AckRun],
        items: &[SettleEntry],
    ) -> Outcome {
        let Some(sub) = self.subscriptions.get(&sub_id) else {
            return unknown_subscription();
        };
        if !sub.is_queue() {
            return Outcome::error(
                ErrorCode::WrongMode,
                "the subscription is in stream mode; commit the consumer offset instead",
            );
        }
        self.dirty.mark(dirty::leases(sub_id, 0));
        self.dirty.mark(dirty::sessions(sub_id, 0));
        let mut refused = Vec::new();
        let mut count = 0;
        for ack in acks {
            self.ack_run(at, sub_id, session, ack, count, &mut refused);
            count += u64::from(ack.run);
        }
        for item in items {
            if let Err(state) = self.settle_item(at, sub_id, session, item) {
                refused.push(refusal(count, state));
            }
            count += 1;
        }
        self.counters.settlements_late += refused.len() as u64;
        self.wake(sub_id);
        Outcome::Settled { count, refused }
    }

    fn ack_run(
        &mut self,
        at: At,
        sub_id: SubscriptionId,
        session: SessionId,
        ack: &AckRun,
        ordinal: u64,
        refused: &mut Vec<Refusal>,
    ) {
        let (first, end) = (ack.offset.0, ack.offset.0 + u64::from(ack.run));
        let mut offset = first;
        while offset < end {
            let Some(sub) = self.subscriptions.get_mut(&sub_id) else {
                return;
            };
            let run = sub.leases.next(offset).copied();
            let run = run.filter(|run| run.first < end);
            let Some(run) = run.filter(|run| run.first <= offset) else {
                // Up to the next lease nothing is leased: late or repeated acks.
                let stop = run.map_or(end, |run| run.first);
                for at_offset in offset..stop {
                    if let Err(state) = self.ack_late(at, sub_id, session, at_offset, ack) {
                        refused.push(refusal(ordinal + (at_offset - first), state));
                    }
                }
                offset = stop;
                continue;
            };
            let stop = run.end.min(end);
            let is_mine = run.session == session && run.delivery == ack.delivery.0;
            if is_mine || planted::is(Bug::StaleSettlementAccepted) {
                sub.leases.cut(offset, stop);
                self.ack(sub_id, session, offset, stop);
            } else {
                let state = MessageState::Leased;
                let lost = (offset..stop).map(|at| refusal(ordinal + (at - first), state));
                refused.extend(lost);
            }
            offset = stop;
        }
    }

    /// Finishes leased messages whose leases have been cut.
    fn ack(&mut self, sub_id: SubscriptionId, session: SessionId, first: u64, end: u64) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.leases -= (end - first).min(session.leases);
        }
        self.counters.acked += end - first;
        self.forget_retries(sub_id, first, end);
        let end = end + u64::from(planted::is(Bug::AckTakesNeighbour));
        self.finish(sub_id, first, end);
    }

    fn forget_retries(&mut self, sub_id: SubscriptionId, first: u64, end: u64) {
        let Some(sub) = self.subscriptions.get_mut(&sub_id) else {
            return;
        };
        let mut from = first;
        while from < end
            && let Some(offset) = sub.retries.next_in(from, end)
        {
            if let Some(retry) = sub.take_retry(offset, &mut self.dirty) {
                self.pins.unpin_record(retry.place());
            }
            from = offset + 1;
        }
    }

    /// An ack for a message that is not leased.
    fn ack_late(
        &mut self,
        at: At,
        sub_id: SubscriptionId,
        session: SessionId,
        offset: u64,
        ack: &AckRun,
    ) -> Result<(), MessageState> {
        let Some(sub) = self.subscriptions.get_mut(&sub_id) else {
            return Err(MessageState::Gone);
        };
        let Some(topic) = self.topics.get(&sub.topic) else {
            return Err(MessageState::Gone);
        };
        let state = sub.state_of(offset, topic, at.stamp);
        if state == MessageState::Acked {
            return Ok(());
        }
        let delivery = ack.delivery.0;
        let retry = sub.retries.get(offset);
        let was_leased = delivery > sub.delivery_base
            && retry.is_some_and(|retry| retry.was_leased(session, delivery));
        // A hand-out leaves before its lease is durable: after a crash of the broker the lease may be
        // missing although the work was done. It would have had the next delivery number.
        let last = retry
            .map_or(0, |retry| retry.delivery)
            .max(sub.delivery_base);
        let outlived_a_start = (session.0 >> 32) < u64::from(self.recovery_epoch);
        let was_handed_out = outlived_a_start
            && state == MessageState::Ready
            && delivery == last + 1
            && sub.sessions.contains(&session);
        if !was_leased && !was_handed_out {
            return Err(state);
        }
        self.counters.acked += 1;
        self.forget_retries(sub_id, offset, offset + 1);
        self.finish(sub_id, offset, offset + 1);
        Ok(())
    }

    fn settle_item(
        &mut self,
        at: At,
        sub_id: SubscriptionId,
        session: SessionId,
        item: &SettleEntry,
    ) -> Result<(), MessageState> {
        let offset = item.lease.offset.0;
        let Some(sub) = self.subscriptions.get_mut(&sub_id) else {
            return Err(MessageState::Gone);
        };
        let delivery = item.lease.delivery.0;
        let mine = |run: &&LeaseRun| {
            (run.session == session && run.delivery == delivery)
                || planted::is(Bug::StaleSettlementAccepted)
        };
        if sub.leases.get(offset).filter(mine).is_none() {
            let Some(topic) = self.topics.get(&sub.topic) else {
                return Err(MessageState::Gone);
            };
            let state = sub.state_of(offset, topic, at.stamp);
            let is_repeated = self.is_answered(sub_id, session, item);
            return if is_repeated { Ok(()) } else { Err(state) };
        }
        let ending = match &item.outcome {
            // Restarting the clock is volatile; it is no end.
            Verdict::Extend => return Ok(()),
            Verdict::Nack { delay_ms, code, .. } => Ending::Failure {
                kind: FailureKind::Nack,
                code: *code,
                delay_ms: *delay_ms,
                begun_at: item.begun_at,
            },
            Verdict::Reject { kind, code, .. } => Ending::Reject {
                kind: *kind,
                code: *code,
                begun_at: item.begun_at,
            },
            Verdict::Release { delay_ms } => Ending::Release {
                delay_ms: *delay_ms,
                suspect: false,
            },
        };
        self.cut_and_end(at, sub_id, offset, ending, true);
        Ok(())
    }

    /// Whether this very settlement ended this lease before.
    fn is_answered(&self, sub_id: SubscriptionId, session: SessionId, item: &SettleEntry) -> bool {
        let Some(sub) = self.subscriptions.get(&sub_id) else {
            return false;
        };
        let Some(answer) = answer(&item.outcome) else {
            return false;
        };
        let this = (session, item.lease.delivery.0, Some(answer));
        if let Some(retry) = sub.retries.get(item.lease.offset.0) {
            return (retry.session, retry.delivery, retry.answered) == this;
        }
        let Some((topic, letter)) = sub.dead.get(&item.lease.offset.0) else {
            return false;
        };
        let topic = self.topics.get(topic);
        let letter = topic.and_then(|topic| topic.letters.get(letter));
        letter.is_some_and(|letter| (letter.session, letter.delivery, letter.answered) == this)
    }

    /// Ends the lease of one message.
    pub(super) fn cut_and_end(
        &mut self,
        at: At,
        sub_id: SubscriptionId,
        offset: u64,
        ending: Ending,
        answered: bool,
    ) {
        let Some(sub) = self.subscriptions.get_mut(&sub_id) else {
            return;
        };
        let Some(run) = sub.leases.cut(offset, offset + 1) else {
            return;
        };
        self.dirty.mark(dirty::leases(sub_id, 0));
        let session = self.sessions.get_mut(&run.session);
        let consumer = session.map(|session| {
            if answered {
                session.leases = session.leases.saturating_sub(1);
            }
            session.consumer.clone()
        });
        let ended = Ended {
            sub: sub_id,
            offset,
            run,
            consumer: &consumer.unwrap_or_default(),
            answered,
        };
        self.end_lease(at, ended, ending);
    }

    /// What becomes of a message whose lease is over: it waits, or it is dead.
    pub(super) fn end_lease(&mut self, at: At, ended: Ended<'_>, ending: Ending) {
        let offset = ended.offset;
        let Some(sub) = self.subscriptions.get_mut(&ended.sub) else {
            return;
        };
        let first = || Box::new(Retry::first(ended.run.session, ended.run.delivery));
        let mut retry = sub
            .take_retry(offset, &mut self.dirty)
            .unwrap_or_else(first);
        self.pins.unpin_record(retry.place());
        retry.answered = ended.answered.then(|| ending.answer());
        retry.set_first_attempt_at(retry.first_attempt_at().or(ending.begun_at()));
        match ending {
            Ending::Failure { kind, code, .. } => {
                retry.fail(at, kind, code, ending.begun_at(), ended.consumer);
                self.counters.failed(kind, code);
            }
            Ending::Reject { code, .. } => {
                retry.fail(
                    at,
                    FailureKind::Reject,
                    code,
                    ending.begun_at(),
                    ended.consumer,
                );
                self.counters.failed(FailureKind::Reject, code);
            }
            Ending::Release { .. } if planted::is(Bug::ReleaseLost) => return,
            Ending::Release { suspect, .. } => {
                retry.releases += 1;
                retry.suspect = suspect || (retry.suspect && !ended.answered);
                self.counters.released += 1;
            }
        }
        let Some(sub) = self.subscriptions.get(&ended.sub) else {
            return;
        };
        if let Some(reason) = self.reason_to_die(at.stamp, sub, offset, &retry, ending) {
            self.kill(at, ended.sub, offset, *retry, reason);
            return;
        }
        let due = self.due(at.stamp, sub, offset, &retry, ending);
        let max_attempts = self.max_attempts(sub, offset, &retry);
        retry.set_due(Some(due));
        self.pins.pin_record(retry.place());
        if due > at.stamp {
            self.work.timers.arm(Timer::Subscription(ended.sub), due);
        }
        if let Some(sub) = self.subscriptions.get_mut(&ended.sub) {
            sub.wait(offset, retry, max_attempts, &mut self.dirty);
        }
        self.wake(ended.sub);
    }

    fn reason_to_die(
        &self,
        now: Stamp,
        sub: &Subscription,
        offset: u64,
        retry: &Retry,
        ending: Ending,
    ) -> Option<DeadReason> {
        if let Ending::Reject { kind, .. } = ending {
            return Some(policy::reason_of_reject(kind));
        }
        let failed = matches!(ending, Ending::Failure { .. });
        let more = u32::from(planted::is(Bug::OneAttemptMore));
        if failed && retry.failures >= self.max_attempts(sub, offset, retry) + more {
            return Some(DeadReason::MaxAttempts);
        }
        if retry.deliveries >= sub.config.max_deliveries {
            return Some(DeadReason::MaxDeliveries);
        }
        // Who sends a letter back wants it to be tried, however old it is.
        if retry.redrives() > 0 {
            return None;
        }
        let topic = self.topics.get(&sub.topic)?;
        if topic.is_expired(offset, now) {
            return Some(DeadReason::Expired);
        }
        let age = sub.config.max_age_ms?;
        let turns = topic.index.turns(offset, age)?;
        (turns <= now || offset < sub.age_floor).then_some(DeadReason::MaxAge)
    }

    fn due(
        &self,
        now: Stamp,
        sub: &Subscription,
        offset: u64,
        retry: &Retry,
        ending: Ending,
    ) -> Stamp {
        match ending {
            Ending::Failure {
                delay_ms: Some(delay_ms),
                ..
            }
            | Ending::Release {
                delay_ms: Some(delay_ms),
                ..
            } => policy::due_after_delay(delay_ms, now),
            Ending::Release { .. } | Ending::Reject { .. } => now,
            Ending::Failure { .. } => {
                let failing = Failing {
                    seed: self.options.seed,
                    subscription: sub.id,
                    offset,
                    failures: retry.failures,
                    initial_ms: self.own(sub, offset, retry).backoff_initial_ms,
                };
                policy::due_after_failure(&sub.config, failing, now)
            }
        }
    }

    pub(crate) fn finish(&mut self, sub_id: SubscriptionId, first: u64, end: u64) {
        let Some(sub) = self.subscriptions.get_mut(&sub_id) else {
            return;
        };
        let (before, topic) = (sub.floor, sub.topic);
        sub.finish(first, end, &mut self.dirty);
        if sub.floor > before {
            self.finished.insert(topic);
        }
        for offset in first..end.min(before) {
            self.close_reopened(topic, offset);
        }
    }
}

fn answer(said: &Verdict) -> Option<Answer> {
    match said {
        Verdict::Nack { .. } => Some(Answer::Nack),
        Verdict::Reject { .. } => Some(Answer::Reject),
        Verdict::Release { .. } => Some(Answer::Release),
        Verdict::Extend => None,
    }
}

impl Ending {
    fn answer(self) -> Answer {
        match self {
            Self::Failure { .. } => Answer::Nack,
            Self::Reject { .. } => Answer::Reject,
            Self::Release { .. } => Answer::Release,
        }
    }

    fn begun_at(self) -> Option<Stamp> {
        match self {
            Self::Failure { begun_at, .. } | Self::Reject { begun_at, .. } => begun_at,
            Self::Release { .. } => None,
        }
    }
}

impl Retry {
    fn fail(
        &mut self,
        at: At,
        kind: FailureKind,
        code: u32,
        begun_at: Option<Stamp>,
        consumer: &Arc<str>,
    ) {
        self.failures += 1 + u32::from(planted::is(Bug::AttemptCountedTwice));
        self.suspect = false;
        self.lost = kind == FailureKind::SessionLost;
        self.set_place(Some(at.place));
        let first = self.first_attempt_at().or(begun_at);
        self.set_first_attempt_at(Some(first.unwrap_or(at.stamp)));
        self.remember(Failure {
            at: at.stamp,
            duration_ms: begun_at.map_or(0, |begun| at.stamp.ms_since(begun)),
            consumer: consumer.clone(),
            kind,
            code,
        });
    }
}

fn refusal(ordinal: u64, state: MessageState) -> Refusal {
    Refusal {
        ordinal,
        code: ErrorCode::LeaseLost,
        state,
    }
}
