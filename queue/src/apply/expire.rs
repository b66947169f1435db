//! What the passing of time does, once a record says so: timeouts, ends of life, trims, damage.
//!
//! A message that is leased when its life ends is left to its consumer; the end of the lease decides.

use std::collections::BTreeMap;

use millpond_protocol::control::{DeadReason, LeaseName, LostReason};
use millpond_protocol::policy::OnLimit;
use millpond_protocol::{Offset, SessionId, Stamp, SubscriptionId, TopicId};

use super::sessions::names;
use super::settle::Ending;
use super::{unknown_subscription, unknown_topic};
use crate::dispatch::timers::Timer;
use crate::effect::{Effect, Outcome};
use crate::queue::{At, Queue};
use crate::record::{Expired, FailureKind, LeaseRange, OffsetRun, Overdue};
use crate::state::dirty;
use crate::state::lease::LeaseRun;
use crate::state::redelivery::Retry;

impl Queue {
    /// Delayed messages whose time has come are ready in every subscription.
    pub(crate) fn mature(&mut self, now: Stamp) {
        while let Some((due, id)) = self.delay_heads.first().copied() {
            if due > now {
                return;
            }
            self.delay_heads.pop_first();
            let Some(topic) = self.topics.get_mut(&id) else {
                continue;
            };
            let ready: Vec<_> = topic.delays.ready(now).map(|(_, offset)| offset).collect();
            for offset in &ready {
                topic.delays.remove(*offset);
                self.dirty.mark(dirty::extras(id, *offset));
            }
            topic
                .delays
                .head()
                .map(|head| self.delay_heads.insert((head, id)));
            for sub_id in topic.subscriptions.values() {
                let Some(sub) = self.subscriptions.get_mut(sub_id) else {
                    continue;
                };
                if !sub.is_queue() {
                    continue;
                }
                for offset in &ready {
                    let is_open = *offset >= sub.start && !sub.is_finished(*offset);
                    if is_open && !sub.retries.contains(*offset) {
                        sub.again.insert(*offset);
                        self.dirty.mark_sets(*sub_id, *offset, offset + 1);
                    }
                }
                self.work.hot.insert(*sub_id);
            }
        }
    }

    pub(crate) fn expire(&mut self, at: At, expired: &Expired, out: &mut Vec<Effect>) -> Outcome {
        match expired {
            Expired::Processing {
                subscription,
                session,
                items,
            } => self.expire_processing(at, *subscription, *session, items, out),
            Expired::Held {
                subscription,
                session,
                ranges,
            } => self.expire_held(at, *subscription, *session, ranges, out),
            Expired::Ttl { topic, offsets } => self.expire_lives(at, *topic, offsets),
            Expired::TopicTtl { topic, below } => self.expire_topic(at, *topic, below.0),
            Expired::MaxAge {
                subscription,
                below,
            } => self.expire_age(at, *subscription, below.0),
            Expired::Producers { producers } => {
                let idle = |queue: &Self, key| {
                    let before = Stamp(at.stamp.0.saturating_sub(PRODUCER_IDLE_US));
                    queue
                        .producers
                        .get(key)
                        .is_some_and(|producer| producer.used <= before)
                };
                for key in producers {
                    if idle(self, *key) {
                        self.forget_producer(*key);
                        out.push(Effect::ProducerGone { producer: *key });
                    }
                }
                self.work.timers.arm(Timer::Producers, at.stamp);
                Outcome::Done
            }
        }
    }

    /// The lease of one message, if it is still this one.
    fn leased_as(&self, id: SubscriptionId, session: SessionId, lease: LeaseName) -> bool {
        let run = self
            .subscriptions
            .get(&id)
            .and_then(|sub| sub.leases.get(lease.offset.0));
        run.is_some_and(|run| run.session == session && run.delivery == lease.delivery.0)
    }

    fn expire_processing(
        &mut self,
        at: At,
        id: SubscriptionId,
        session: SessionId,
        items: &[Overdue],
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let mut lost = Vec::new();
        for item in items {
            if !self.leased_as(id, session, item.lease) {
                continue;
            }
            let ending = Ending::Failure {
                kind: FailureKind::ProcessingTimeout,
                code: 0,
                delay_ms: None,
                begun_at: item.story.begun_at,
            };
            self.cut_and_end(at, id, item.lease.offset.0, ending, false);
            lost.push(item.lease);
        }
        self.lose(session, lost, LostReason::ProcessingTimeout, out);
        self.dirty.mark(dirty::sessions(id, 0));
        self.wake(id);
        Outcome::Done
    }

    fn expire_held(
        &mut self,
        at: At,
        id: SubscriptionId,
        session: SessionId,
        ranges: &[LeaseRange],
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let all = ranges.iter().flat_map(|range| {
            names(&LeaseRun {
                first: range.offset.0,
                end: range.offset.0.saturating_add(u64::from(range.count)),
                session,
                delivery: range.delivery.0,
                begun: None,
            })
        });
        let mut lost = Vec::new();
        for lease in all {
            if self.leased_as(id, session, lease) {
                let ending = Ending::Release {
                    delay_ms: None,
                    suspect: false,
                };
                self.cut_and_end(at, id, lease.offset.0, ending, false);
                lost.push(lease);
            }
        }
        self.lose(session, lost, LostReason::HoldMax, out);
        self.dirty.mark(dirty::sessions(id, 0));
        self.wake(id);
        Outcome::Done
    }

    fn expire_lives(&mut self, at: At, id: TopicId, offsets: &[Offset]) -> Outcome {
        let Some(topic) = self.topics.get_mut(&id) else {
            return unknown_topic();
        };
        let mut over = Vec::with_capacity(offsets.len());
        for offset in offsets {
            let expires_at = topic.extra(offset.0).expires_at;
            if let Some(expires_at) = expires_at.filter(|expires_at| *expires_at <= at.stamp) {
                topic.lives.remove(&(expires_at, offset.0));
                self.dirty.mark(dirty::extras(id, offset.0));
                over.push(offset.0);
            }
        }
        let subs: Vec<_> = topic.subscriptions.values().copied().collect();
        for sub in subs {
            for offset in &over {
                self.expire_one(at, sub, *offset, DeadReason::Expired);
            }
        }
        self.work.timers.arm(Timer::Topic(id), at.stamp);
        Outcome::Done
    }

    fn expire_topic(&mut self, at: At, id: TopicId, below: u64) -> Outcome {
        let Some(topic) = self.topics.get_mut(&id) else {
            return unknown_topic();
        };
        let (from, below) = (topic.ttl_floor.max(topic.first), below.min(topic.next));
        if below <= from {
            return Outcome::Done;
        }
        topic.ttl_floor = below;
        self.dirty.mark(dirty::topic(id, 0));
        let own = topic
            .extras
            .range(from..below)
            .filter(|(_, e)| e.expires_at.is_some());
        let own: Vec<_> = own.map(|(at, _)| *at).collect();
        let subs: Vec<_> = topic.subscriptions.values().copied().collect();
        if subs.is_empty() && own.is_empty() {
            self.trim(id, below);
        }
        for sub in subs {
            for offset in from..below {
                if own.binary_search(&offset).is_err() {
                    self.expire_one(at, sub, offset, DeadReason::Expired);
                }
            }
        }
        self.work.timers.arm(Timer::Topic(id), at.stamp);
        Outcome::Done
    }

    fn expire_age(&mut self, at: At, id: SubscriptionId, below: u64) -> Outcome {
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return unknown_subscription();
        };
        let next = self.topics.get(&sub.topic).map_or(0, |topic| topic.next);
        let (from, below) = (sub.age_floor.max(sub.floor), below.min(next));
        sub.age_floor = sub.age_floor.max(below);
        self.dirty.mark(dirty::subscription(id, 0));
        for offset in from..below {
            self.expire_one(at, id, offset, DeadReason::MaxAge);
        }
        self.work.timers.arm(Timer::Subscription(id), at.stamp);
        Outcome::Done
    }

    /// Kills a message that waits; one that is leased, finished or redriven stays what it is.
    fn expire_one(&mut self, at: At, id: SubscriptionId, offset: u64, reason: DeadReason) {
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return;
        };
        let is_redriven = sub
            .retries
            .get(offset)
            .is_some_and(|retry| retry.redrives() > 0);
        if !sub.is_queue()
            || offset < sub.start
            || is_redriven
            || sub.is_finished(offset)
            || sub.leases.get(offset).is_some()
        {
            return;
        }
        self.kill_waiting(at, id, offset, reason);
    }

    fn kill_waiting(&mut self, at: At, id: SubscriptionId, offset: u64, reason: DeadReason) {
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return;
        };
        let retry = *sub.take_retry(offset, &mut self.dirty).unwrap_or_default();
        self.pins.unpin_record(retry.place());
        self.kill(at, id, offset, retry, reason);
    }

    /// Retention lets go what is finished. Below a topic's limit goes more, as `on_limit` says.
    pub(crate) fn trim_record(
        &mut self,
        at: At,
        id: TopicId,
        first: Offset,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let kept = self.kept(id);
        let Some(topic) = self.topics.get(&id) else {
            return unknown_topic();
        };
        let first = first.0.min(topic.next);
        let on_limit = topic.config.on_limit;
        let subs: Vec<_> = topic.subscriptions.values().copied().collect();
        if kept.is_some_and(|kept| kept < first) {
            for sub in subs {
                match on_limit {
                    OnLimit::RefusePublish => {}
                    OnLimit::Drop => self.drop_below(sub, first, LostReason::Expired, out),
                    OnLimit::DeadLetter => self.kill_below(at, sub, first, out),
                }
            }
        }
        // A limit that makes room takes letters too that no subscription has come to.
        let kept = match on_limit {
            OnLimit::RefusePublish => self.kept(id),
            OnLimit::Drop | OnLimit::DeadLetter => self.needed(id),
        };
        let kept = kept.map_or(first, |kept| kept.min(first));
        self.trim(id, kept);
        if let Some(topic) = self.topics.get_mut(&id) {
            topic.trim_proposed = topic.first;
        }
        self.work.timers.arm(Timer::Topic(id), at.stamp);
        Outcome::Done
    }

    fn kill_below(&mut self, at: At, id: SubscriptionId, first: u64, out: &mut Vec<Effect>) {
        let Some(sub) = self.subscriptions.get(&id) else {
            return;
        };
        if !sub.is_queue() || sub.dead_topic.is_none() {
            // Dead in place would be no way to make room: letters go for good here.
            if sub.is_queue() && sub.floor < first {
                let done = sub.done.count_between(sub.floor, first);
                let dead = first - sub.floor - done;
                *self.counters.dead.entry(DeadReason::Expired).or_default() += dead;
            }
            self.drop_below(id, first, LostReason::Expired, out);
            return;
        }
        let mut offset = sub.floor;
        let mut lost = Lost::new();
        while offset < first {
            let Some(sub) = self.subscriptions.get(&id) else {
                return;
            };
            if sub.done.contains(offset) || offset < sub.floor {
                offset = sub.done.next_absent(offset.max(sub.floor));
                continue;
            }
            self.kill_any(at, id, offset, DeadReason::Expired, &mut lost);
            offset += 1;
        }
        self.tell(lost, out);
    }

    /// Kills a message that waits or is leased.
    fn kill_any(
        &mut self,
        at: At,
        id: SubscriptionId,
        offset: u64,
        reason: DeadReason,
        lost: &mut Lost,
    ) {
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return;
        };
        let Some(run) = sub.leases.cut(offset, offset + 1) else {
            return self.kill_waiting(at, id, offset, reason);
        };
        self.dirty.mark(dirty::leases(id, 0));
        self.work.hot.insert(id);
        lost.entry(run.session).or_default().extend(names(&run));
        let retry = sub
            .take_retry(offset, &mut self.dirty)
            .map_or_else(|| Retry::first(run.session, run.delivery), |retry| *retry);
        self.pins.unpin_record(retry.place());
        self.kill(at, id, offset, retry, reason);
    }

    fn tell(&mut self, lost: Lost, out: &mut Vec<Effect>) {
        for (session, leases) in lost {
            self.lose(session, leases, LostReason::Expired, out);
        }
    }

    /// Bodies that cannot be read any more: queue subscriptions file them, leased or not.
    pub(crate) fn damaged(
        &mut self,
        at: At,
        id: TopicId,
        ranges: &[OffsetRun],
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let Some(topic) = self.topics.get(&id) else {
            return unknown_topic();
        };
        let next = topic.next;
        let subs: Vec<_> = topic.subscriptions.values().copied().collect();
        let mut lost = Lost::new();
        for sub in subs {
            for range in ranges {
                let first = range.offset.0;
                let end = first.saturating_add(u64::from(range.count));
                for offset in first..end.min(next) {
                    let waits = self.subscriptions.get(&sub).is_some_and(|sub| {
                        sub.is_queue() && offset >= sub.start && !sub.is_finished(offset)
                    });
                    if waits {
                        self.kill_any(at, sub, offset, DeadReason::Damaged, &mut lost);
                    }
                }
            }
        }
        self.tell(lost, out);
        Outcome::Done
    }
}

/// Leases taken away, by whose they were.
type Lost = BTreeMap<SessionId, Vec<LeaseName>>;

/// `PRODUCER_IDLE_MS` in microseconds.
const PRODUCER_IDLE_US: u64 = crate::limits::PRODUCER_IDLE_MS * 1_000;
