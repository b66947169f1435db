//! Sessions: their beginning, their leases, their end; the consumer offset of streams.
//!
//! A session that is lost with exactly one message begun is charged for that one. With several begun
//! none is charged: they become suspects, to be delivered alone. What was only held is released.

use std::collections::BTreeMap;
use std::sync::Arc;

use millpond_protocol::control::{LeaseName, LostReason};
use millpond_protocol::limits::CONSUMER_NAME_BYTES_MAX;
use millpond_protocol::{
    Delivery, ErrorCode, Offset, SessionId, Stamp, SubscriptionId, SubscriptionMode,
};

use super::settle::{Ended, Ending};
use super::unknown_subscription;
use crate::dispatch::timers::Timer;
use crate::effect::{Effect, Outcome};
use crate::limits::{SESSION_GRACE_MS, SESSIONS_MAX};
use crate::planted::{self, Bug};
use crate::queue::{At, Queue, Work};
use crate::record::{FailureKind, LeaseRange, OffsetRun, Story};
use crate::state::dirty;
use crate::state::lease::LeaseRun;
use crate::state::redrive::Pace;
use crate::state::session::{Live, Session};

impl Queue {
    /// After a start every session has the grace to come back; nothing is charged.
    pub(crate) fn start(&mut self, at: At, recovery_epoch: u32) -> Outcome {
        self.recovery_epoch = recovery_epoch;
        self.dirty.mark(dirty::META);
        let (hold, draining) = (self.work.hold, self.work.draining);
        self.work = Work {
            hold,
            draining,
            ..Work::default()
        };
        let grace = at.stamp.plus_ms(SESSION_GRACE_MS);
        for session in self.sessions.values_mut() {
            session.live = Live {
                deadline: grace,
                ..Live::default()
            };
            self.work.timers.arm(Timer::Session(session.id), grace);
        }
        for sub in self.subscriptions.values_mut() {
            sub.spoil_at_restart(at.stamp);
            sub.leases.forget_begun();
            sub.hand = Default::default();
            sub.hand.reset(sub.cursor);
            sub.hand.age_proposed = sub.age_floor;
            self.work.timers.arm(Timer::Subscription(sub.id), at.stamp);
        }
        for topic in self.topics.values_mut() {
            topic.lives_proposed = None;
            topic.ttl_proposed = topic.ttl_floor;
            topic.trim_proposed = topic.first;
            self.work.timers.arm(Timer::Topic(topic.id), at.stamp);
        }
        for (key, job) in &mut self.jobs.all {
            // When the last step was is forgotten: the next one waits as if it had been now.
            let gap_ms = job
                .rate_per_s
                .map_or(0, |rate| (1_000 / u64::from(rate)).max(100));
            job.pace = Pace {
                not_before: at.stamp.plus_ms(gap_ms),
                proposed: false,
            };
            self.work.timers.arm(Timer::Job(*key), job.pace.not_before);
        }
        self.work.timers.arm(Timer::Producers, at.stamp);
        Outcome::Done
    }

    pub(crate) fn session_open(
        &mut self,
        at: At,
        sub_id: SubscriptionId,
        id: SessionId,
        token: u64,
        consumer: &str,
    ) -> Outcome {
        let Some(sub) = self.subscriptions.get_mut(&sub_id) else {
            return unknown_subscription();
        };
        if self.sessions.contains_key(&id) {
            return Outcome::error(
                ErrorCode::AlreadyExists,
                "the session exists; choose a new id",
            );
        }
        if consumer.len() > CONSUMER_NAME_BYTES_MAX {
            return Outcome::error(
                ErrorCode::TooLarge,
                format!("a consumer's name has at most {CONSUMER_NAME_BYTES_MAX} bytes"),
            );
        }
        if sub.sessions.len() >= SESSIONS_MAX {
            let sentence = format!("the subscription has {SESSIONS_MAX} consumers; end some first");
            return Outcome::error(ErrorCode::LimitReached, sentence);
        }
        let is_stream = sub.config.mode == SubscriptionMode::Stream;
        let active = !is_stream || sub.active.is_none();
        if is_stream && active {
            sub.active = Some(id);
        }
        sub.sessions.insert(id);
        let deadline = at.stamp.plus_ms(sub.config.lease_ms);
        let session = Session {
            id,
            subscription: sub_id,
            token,
            consumer: Arc::from(consumer),
            opened_at: at.stamp,
            leases: 0,
            live: Live {
                attached: true,
                deadline,
                read: sub.floor,
                ..Live::default()
            },
        };
        self.sessions.insert(id, session);
        self.work.timers.arm(Timer::Session(id), deadline);
        self.dirty.mark(dirty::subscription(sub_id, 0));
        self.dirty.mark(dirty::sessions(sub_id, 0));
        Outcome::SessionOpened {
            session: id,
            topic: sub.topic,
            subscription: sub_id,
            mode: sub.config.mode,
            lease_ms: sub.config.lease_ms,
            position: sub.position(),
            active,
        }
    }

    pub(crate) fn session_end(
        &mut self,
        at: At,
        id: SessionId,
        clean: bool,
        begun: &[OffsetRun],
        story: Option<&Story>,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let Some(session) = self.sessions.remove(&id) else {
            return Outcome::error(ErrorCode::SessionEnded, "the session has ended before");
        };
        let sub_id = session.subscription;
        self.work.timers.drop(Timer::Session(id));
        self.dirty.mark(dirty::sessions(sub_id, 0));
        self.dirty.mark(dirty::leases(sub_id, 0));
        self.dirty.mark(dirty::subscription(sub_id, 0));
        let Some(sub) = self.subscriptions.get_mut(&sub_id) else {
            return Outcome::SessionEnded;
        };
        sub.sessions.remove(&id);
        sub.hand.creditors.remove(&id);
        if sub.hand.draining == Some(id) {
            sub.hand.draining = None;
        }
        let runs = sub.leases.of(id);
        for run in &runs {
            sub.leases.cut(run.first, run.end);
        }
        if clean || !planted::is(Bug::SessionEndLosesLeases) {
            self.end_leases(at, &session, &runs, clean, begun, story);
        }
        if !clean {
            self.tell_lost(id, &runs, out);
        }
        self.next_active(sub_id, id, out);
        self.wake(sub_id);
        Outcome::SessionEnded
    }

    /// Releases or charges what a session held when it ended.
    fn end_leases(
        &mut self,
        at: At,
        session: &Session,
        runs: &[LeaseRun],
        clean: bool,
        begun: &[OffsetRun],
        story: Option<&Story>,
    ) {
        let begun: BTreeMap<u64, u64> = match clean {
            true => BTreeMap::new(),
            false => begun
                .iter()
                .map(|run| (run.offset.0, u64::from(run.count)))
                .collect(),
        };
        let was_begun = |offset: u64| {
            let run = begun.range(..=offset).next_back();
            run.is_some_and(|(first, count)| offset - first < *count)
        };
        let all = runs
            .iter()
            .flat_map(|run| (run.first..run.end).map(move |at| (at, run)));
        let count = all.clone().filter(|(offset, _)| was_begun(*offset)).count();
        for (offset, run) in all {
            let ending = match (was_begun(offset), count) {
                (true, 1) => Ending::Failure {
                    kind: FailureKind::SessionLost,
                    code: 0,
                    delay_ms: None,
                    begun_at: story.and_then(|story| story.begun_at),
                },
                (is_begun, _) => Ending::Release {
                    delay_ms: None,
                    suspect: is_begun,
                },
            };
            let ended = Ended {
                sub: session.subscription,
                offset,
                run: *run,
                consumer: &session.consumer,
                answered: false,
            };
            self.end_lease(at, ended, ending);
        }
    }

    fn tell_lost(&mut self, id: SessionId, runs: &[LeaseRun], out: &mut Vec<Effect>) {
        let leases: Vec<_> = runs.iter().flat_map(names).collect();
        self.lose(id, leases, LostReason::LeaseExpired, out);
        out.push(Effect::SessionEnded {
            session: id,
            code: ErrorCode::SessionEnded,
        });
    }

    /// Stream mode: the consumer that has waited longest takes over.
    fn next_active(&mut self, id: SubscriptionId, ended: SessionId, out: &mut Vec<Effect>) {
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return;
        };
        if sub.active != Some(ended) {
            return;
        }
        let opened = |id: &&SessionId| self.sessions.get(*id).map(|session| session.opened_at);
        sub.active = sub.sessions.iter().min_by_key(opened).copied();
        if let Some(active) = sub.active {
            if let Some(session) = self.sessions.get_mut(&active) {
                session.live.read = sub.floor;
            }
            out.push(Effect::Active {
                session: active,
                from: sub.position(),
            });
        }
    }

    pub(crate) fn commit(
        &mut self,
        id: SubscriptionId,
        session: SessionId,
        next: Offset,
    ) -> Outcome {
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return unknown_subscription();
        };
        if sub.is_queue() {
            return Outcome::error(
                ErrorCode::WrongMode,
                "the subscription is in queue mode; acknowledge messages one by one",
            );
        }
        if sub.active != Some(session) {
            return Outcome::error(
                ErrorCode::NotActive,
                "another consumer is the active one of this stream subscription",
            );
        }
        let topic = sub.topic;
        let end = self.topics.get(&topic).map_or(0, |topic| topic.next);
        if next.0 > end {
            let sentence = format!("the topic ends before {end}; commit at most that");
            return Outcome::error(ErrorCode::OffsetOutOfRange, sentence);
        }
        if next.0 > sub.floor {
            sub.set_floor(next.0, &mut self.dirty);
            self.finished.insert(topic);
        }
        Outcome::Committed {
            next: sub.position(),
        }
    }

    pub(crate) fn lease(
        &mut self,
        at: At,
        sub_id: SubscriptionId,
        id: SessionId,
        ranges: &[LeaseRange],
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let known = self
            .sessions
            .get(&id)
            .is_some_and(|session| session.subscription == sub_id);
        let mut lost = Vec::new();
        for range in ranges {
            let (first, end) = (range.offset.0, range.offset.0 + u64::from(range.count));
            self.settle_proposal(sub_id, first, range.delivery.0);
            if known {
                self.lease_range(
                    at.stamp,
                    sub_id,
                    id,
                    (first, end),
                    range.delivery.0,
                    &mut lost,
                );
            } else {
                lost.extend(names(&run_of(first, end, id, range.delivery.0)));
            }
        }
        if let Some(sub) = self.subscriptions.get_mut(&sub_id)
            && sub.hand.fresh == 0
        {
            sub.hand.cursor = sub.cursor;
        }
        if !lost.is_empty() {
            self.wake(sub_id);
            let mut reason = LostReason::Seek;
            if !known {
                reason = LostReason::LeaseExpired;
            }
            self.counters.lost(reason, lost.len() as u64);
            out.push(Effect::LeasesLost {
                session: id,
                leases: lost,
                reason,
            });
        }
        self.dirty.mark(dirty::leases(sub_id, 0));
        self.dirty.mark(dirty::subscription(sub_id, 0));
        self.dirty.mark(dirty::sessions(sub_id, 0));
        self.begin_early(id);
        Outcome::Done
    }

    fn settle_proposal(&mut self, sub: SubscriptionId, first: u64, delivery: u32) {
        let Some(sub) = self.subscriptions.get_mut(&sub) else {
            return;
        };
        let Some(proposed) = sub.hand.settle(first, delivery) else {
            return;
        };
        if let Some(session) = self.sessions.get_mut(&proposed.session) {
            let count = proposed.end - first;
            session.live.proposed = session.live.proposed.saturating_sub(count);
        }
    }

    fn lease_range(
        &mut self,
        stamp: Stamp,
        sub_id: SubscriptionId,
        id: SessionId,
        (first, end): (u64, u64),
        delivery: u32,
        lost: &mut Vec<LeaseName>,
    ) {
        let Some(sub) = self.subscriptions.get_mut(&sub_id) else {
            return;
        };
        let Some(topic) = self.topics.get(&sub.topic) else {
            return;
        };
        let is_fresh = first >= sub.cursor
            && end <= topic.next
            && delivery == sub.delivery_base + 1
            && sub.is_queue()
            && sub.done.next_present(first).is_none_or(|at| at >= end)
            && sub.again.next_present(first).is_none_or(|at| at >= end)
            && sub.leases.next(first).is_none_or(|run| run.first >= end)
            && topic.delays.next_in(first, end).is_none()
            && sub.retries.next_in(first, end).is_none();
        let mut leased = 0;
        if is_fresh {
            sub.pass_over(first, topic, &mut self.dirty);
            sub.cursor = end;
            sub.hand.cursor = sub.hand.cursor.max(end);
            sub.leases.insert(run_of(first, end, id, delivery));
            sub.delivery_top = sub.delivery_top.max(delivery);
            leased = end - first;
        } else {
            for offset in first..end {
                if sub.lease_again(offset, id, delivery, stamp, &mut self.dirty) {
                    sub.delivery_top = sub.delivery_top.max(delivery);
                    leased += 1;
                } else {
                    lost.extend(names(&run_of(offset, offset + 1, id, delivery)));
                }
            }
        }
        self.counters.delivered += leased;
        if let Some(session) = self.sessions.get_mut(&id) {
            session.leases += leased;
        }
    }
}

pub(super) fn names(run: &LeaseRun) -> impl Iterator<Item = LeaseName> + use<> {
    let delivery = Delivery(run.delivery);
    (run.first..run.end).map(move |offset| LeaseName {
        offset: Offset(offset),
        delivery,
    })
}

fn run_of(first: u64, end: u64, session: SessionId, delivery: u32) -> LeaseRun {
    LeaseRun {
        first,
        end,
        session,
        delivery,
        begun: None,
    }
}
