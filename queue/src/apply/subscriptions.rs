//! Subscriptions: creating, changing, pausing, moving and removing them.
//!
//! A subscription of a dead-letter topic has no dead-letter topic of its own: what fails there for
//! good is finished for that subscription and stays in the topic, dead in place.

use std::sync::Arc;

use millpond_protocol::control::{LeaseName, LostReason};
use millpond_protocol::name::{check_subscription, default_dead_letter};
use millpond_protocol::policy::SubscriptionPatch;
use millpond_protocol::{
    Delivery, ErrorCode, Offset, SessionId, SubscriptionConfig, SubscriptionId, SubscriptionMode,
    TopicConfig, TopicId,
};
use std::collections::BTreeMap;

use super::topics::too_many_topics;
use super::{unknown_subscription, unknown_topic};
use crate::dispatch::timers::Timer;
use crate::effect::{Effect, Outcome};
use crate::limits::SUBSCRIPTIONS_MAX;
use crate::planted::{self, Bug};
use crate::queue::{At, Queue};
use crate::record::StartPosition;
use crate::state::dirty::{self, ENTITY_MAX};
use crate::state::subscription::Subscription;
use crate::state::topic::Topic;

impl Queue {
    pub(crate) fn subscription_create(
        &mut self,
        at: At,
        topic_id: TopicId,
        name: &str,
        config: &SubscriptionConfig,
        start: StartPosition,
    ) -> Outcome {
        if let Err(error) = check_subscription(name) {
            return Outcome::error(ErrorCode::InvalidName, error.to_string());
        }
        if let Err(error) = config.check() {
            return Outcome::error(ErrorCode::InvalidPolicy, error.to_string());
        }
        let Some(topic) = self.topics.get(&topic_id) else {
            return unknown_topic();
        };
        if topic.subscriptions.contains_key(name) {
            return Outcome::error(
                ErrorCode::AlreadyExists,
                "a subscription of this name exists",
            );
        }
        if self.subscriptions.len() >= SUBSCRIPTIONS_MAX || self.next_subscription >= ENTITY_MAX {
            let sentence =
                format!("there are {SUBSCRIPTIONS_MAX} subscriptions; delete some first");
            return Outcome::error(ErrorCode::LimitReached, sentence);
        }
        let start = resolve(topic, start);
        let id = SubscriptionId(self.next_subscription);
        let dead_topic = match self.dead_topic_for(at, topic_id, name, config) {
            Ok(dead_topic) => dead_topic,
            Err(outcome) => return outcome,
        };
        self.next_subscription += 1;
        self.link_dead_topic(id, dead_topic);
        let name: Arc<str> = name.into();
        let sub = Subscription::new(id, topic_id, name.clone(), config.clone(), at.stamp);
        self.subscriptions.insert(
            id,
            Subscription {
                dead_topic,
                start,
                floor: start,
                cursor: start,
                ..sub
            },
        );
        if let Some(topic) = self.topics.get_mut(&topic_id) {
            topic.subscriptions.insert(name, id);
            // Expiries that went before it concern it too.
            topic.reconsider_lives(start, &mut self.dirty);
        }
        self.skip_gone(id);
        self.reset_hand(id);
        self.dirty.mark(dirty::META);
        self.dirty.mark(dirty::topic(topic_id, 0));
        self.dirty.mark(dirty::subscription(id, 0));
        self.finished.insert(topic_id);
        self.work.timers.arm(Timer::Topic(topic_id), at.stamp);
        self.work.timers.arm(Timer::Subscription(id), at.stamp);
        Outcome::SubscriptionCreated(id)
    }

    /// Where a subscription's dead letters go; makes that topic if it is missing.
    fn dead_topic_for(
        &mut self,
        at: At,
        topic_id: TopicId,
        name: &str,
        config: &SubscriptionConfig,
    ) -> Result<Option<TopicId>, Outcome> {
        let cycle = |sentence: &str| Err(Outcome::error(ErrorCode::DeadLetterCycle, sentence));
        let Some(topic) = self.topics.get(&topic_id) else {
            return Err(unknown_topic());
        };
        if config.mode == SubscriptionMode::Stream || topic.is_dead_letter {
            return match &config.dead_letter {
                None => Ok(None),
                Some(_) if config.mode == SubscriptionMode::Stream => Err(Outcome::error(
                    ErrorCode::WrongMode,
                    "a stream subscription has no dead letters; name no topic for them",
                )),
                Some(_) => cycle("the topic is a dead-letter topic; its subscriptions have none"),
            };
        }
        let default = default_dead_letter(&topic.name, name);
        let target = config.dead_letter.as_deref().unwrap_or(&default);
        if let Err(error) = millpond_protocol::name::check_topic(target) {
            let sentence = format!("the dead-letter topic {target:?} cannot be: {error}");
            return Err(Outcome::error(ErrorCode::InvalidName, sentence));
        }
        let Some(&dead) = self.topic_names.get(target) else {
            let made = self.new_topic(at, target, TopicConfig::default());
            return made.map(Some).ok_or_else(too_many_topics);
        };
        let has_dead_letters = |id| {
            let sub: Option<&Subscription> = self.subscriptions.get(id);
            sub.is_some_and(|sub| sub.dead_topic.is_some())
        };
        let chained = self.topics.get(&dead);
        let chained = chained.is_some_and(|t| t.subscriptions.values().any(has_dead_letters));
        if dead == topic_id || chained {
            return cycle("a dead-letter topic can have no dead-letter topic of its own");
        }
        Ok(Some(dead))
    }

    fn link_dead_topic(&mut self, sub: SubscriptionId, dead: Option<TopicId>) {
        if let Some(dead) = dead
            && let Some(topic) = self.topics.get_mut(&dead)
        {
            topic.sources.insert(sub);
            topic.is_dead_letter = true;
            self.dirty.mark(dirty::topic(dead, 0));
        }
    }

    fn unlink_dead_topic(&mut self, sub: SubscriptionId, dead: Option<TopicId>) {
        if let Some(dead) = dead
            && let Some(topic) = self.topics.get_mut(&dead)
        {
            topic.sources.remove(&sub);
            self.dirty.mark(dirty::topic(dead, 0));
        }
    }

    pub(crate) fn subscription_update(
        &mut self,
        at: At,
        id: SubscriptionId,
        patch: &SubscriptionPatch,
    ) -> Outcome {
        let Some(sub) = self.subscriptions.get(&id) else {
            return unknown_subscription();
        };
        let config = sub.config.patched(patch);
        if let Err(error) = config.check() {
            return Outcome::error(ErrorCode::InvalidPolicy, error.to_string());
        }
        let (topic, name, old) = (sub.topic, sub.name.clone(), sub.dead_topic);
        if patch.dead_letter.is_some() {
            let dead = match self.dead_topic_for(at, topic, &name, &config) {
                Ok(dead) => dead,
                Err(outcome) => return outcome,
            };
            self.unlink_dead_topic(id, old);
            self.link_dead_topic(id, dead);
            if let Some(sub) = self.subscriptions.get_mut(&id) {
                sub.dead_topic = dead;
            }
        }
        if let Some(sub) = self.subscriptions.get_mut(&id) {
            sub.config = config;
            sub.hand.skipped = (0, 0);
            for session in &sub.sessions {
                self.work.timers.arm(Timer::Session(*session), at.stamp);
            }
        }
        self.sort_last_attempts(id);
        self.dirty.mark(dirty::subscription(id, 0));
        self.work.timers.arm(Timer::Subscription(id), at.stamp);
        self.wake(id);
        Outcome::Done
    }

    /// Which attempts are last ones, to be delivered alone, follows from the policy.
    pub(crate) fn sort_last_attempts(&mut self, id: SubscriptionId) {
        let Some(sub) = self.subscriptions.get(&id) else {
            return;
        };
        let lost: Vec<_> = sub
            .retries
            .lost()
            .map(|(offset, retry)| (offset, self.max_attempts(sub, offset, retry)))
            .collect();
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return;
        };
        for (offset, max_attempts) in lost {
            if let Some(retry) = sub.retries.take(offset) {
                sub.retries.put(offset, retry, max_attempts);
            }
        }
    }

    /// Pause and resume stop and start hand-outs and charge nothing.
    pub(crate) fn pause(&mut self, id: SubscriptionId, paused: bool) -> Outcome {
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return unknown_subscription();
        };
        sub.paused = paused;
        self.dirty.mark(dirty::subscription(id, 0));
        self.wake(id);
        Outcome::Done
    }

    /// Queue mode: below the target acked, from it on ready with counters at zero, leases revoked;
    /// what is in the dead-letter topic stays there. Stream mode: the offset is committed.
    pub(crate) fn seek(
        &mut self,
        id: SubscriptionId,
        to: StartPosition,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let Some(sub) = self.subscriptions.get(&id) else {
            return unknown_subscription();
        };
        let topic_id = sub.topic;
        let Some(topic) = self.topics.get_mut(&topic_id) else {
            return unknown_topic();
        };
        let (target, next) = (resolve(topic, to), topic.next);
        topic.reconsider_lives(target, &mut self.dirty);
        self.dirty.mark(dirty::topic(topic_id, 0));
        self.revoke(id, 0, u64::MAX, LostReason::Seek, out);
        self.forget_waiting(id);
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return unknown_subscription();
        };
        self.dirty.mark(dirty::subscription(id, 0));
        self.dirty
            .mark_sets(id, sub.keeps().min(target), next.max(target) + 1);
        sub.parked.remove_from(target);
        sub.done.clear();
        sub.again.clear();
        sub.start = sub.start.min(target);
        sub.age_floor = sub.age_floor.min(target);
        sub.hand.age_proposed = sub.age_floor;
        (sub.floor, sub.cursor) = (target, target);
        // Beyond every number given, and any that may be on its way.
        sub.delivery_base = sub.delivery_base.max(sub.delivery_top) + 1;
        for (offset, _) in sub.dead.range(target..) {
            sub.done.insert(*offset);
        }
        self.skip_gone(id);
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return unknown_subscription();
        };
        if let Some(active) = sub.active {
            out.push(Effect::Active {
                session: active,
                from: sub.position(),
            });
            if let Some(session) = self.sessions.get_mut(&active) {
                session.live.read = sub.floor;
            }
        }
        self.reset_hand(id);
        self.finished.insert(topic_id);
        self.work.timers.arm(Timer::Subscription(id), self.last);
        self.work.timers.arm(Timer::Topic(topic_id), self.last);
        self.wake(id);
        Outcome::Done
    }

    /// What was let go before a subscription begins or goes back there is finished for it too.
    fn skip_gone(&mut self, id: SubscriptionId) {
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return;
        };
        let Some(topic) = self.topics.get(&sub.topic) else {
            return;
        };
        let floor = sub.floor;
        if !planted::is(Bug::GoneForgotten) {
            sub.done.insert_all(&topic.gone, floor);
        }
        self.dirty.mark_sets(id, floor, topic.next);
        sub.set_floor(floor, &mut self.dirty);
    }

    pub(crate) fn subscription_delete(
        &mut self,
        id: SubscriptionId,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        if !self.subscriptions.contains_key(&id) {
            return unknown_subscription();
        }
        self.remove_subscription(id, out);
        Outcome::Done
    }

    /// Its letters stay.
    pub(super) fn remove_subscription(&mut self, id: SubscriptionId, out: &mut Vec<Effect>) {
        self.revoke(id, 0, u64::MAX, LostReason::Deleted, out);
        self.forget_waiting(id);
        let Some(mut sub) = self.subscriptions.remove(&id) else {
            return;
        };
        if let Some(telling) = &mut self.dirty.telling {
            telling.add(id, sub.retries.take_told());
        }
        let at = |at| dirty::sets(id, at);
        let sets = [&sub.done, &sub.again, &sub.reopened, &sub.parked];
        for key in sets.iter().flat_map(|set| set.chunk_keys()) {
            self.dirty.mark(at(key << dirty::SETS_SHIFT));
        }
        for session in &sub.sessions {
            self.sessions.remove(session);
            self.work.timers.drop(Timer::Session(*session));
            out.push(Effect::SessionEnded {
                session: *session,
                code: ErrorCode::Deleted,
            });
        }
        self.unlink_dead_topic(id, sub.dead_topic);
        if let Some(topic) = self.topics.get_mut(&sub.topic) {
            topic.subscriptions.remove(&sub.name);
        }
        self.finished.insert(sub.topic);
        self.work.hot.remove(&id);
        self.work.timers.drop(Timer::Subscription(id));
        for chunk in [dirty::subscription, dirty::leases, dirty::sessions] {
            self.dirty.mark(chunk(id, 0));
        }
        out.push(Effect::SubscriptionGone { subscription: id });
    }

    /// Takes back the leases on `first..end` and tells their sessions.
    pub(super) fn revoke(
        &mut self,
        id: SubscriptionId,
        first: u64,
        end: u64,
        reason: LostReason,
        out: &mut Vec<Effect>,
    ) {
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return;
        };
        let mut lost: BTreeMap<SessionId, Vec<LeaseName>> = BTreeMap::new();
        while let Some(run) = sub.leases.next(first).copied() {
            let (from, to) = (run.first.max(first), run.end.min(end));
            if from >= to {
                break;
            }
            sub.leases.cut(from, to);
            let names = lost.entry(run.session).or_default();
            names.extend((from..to).map(|offset| LeaseName {
                offset: Offset(offset),
                delivery: Delivery(run.delivery),
            }));
        }
        if lost.is_empty() {
            return;
        }
        self.dirty.mark(dirty::leases(id, 0));
        for (session, leases) in lost {
            self.lose(session, leases, reason, out);
        }
        self.wake(id);
    }

    /// Tells a session that leases, already taken from it, are lost.
    pub(super) fn lose(
        &mut self,
        id: SessionId,
        leases: Vec<LeaseName>,
        reason: LostReason,
        out: &mut Vec<Effect>,
    ) {
        if leases.is_empty() {
            return;
        }
        if let Some(session) = self.sessions.get_mut(&id) {
            session.leases -= (leases.len() as u64).min(session.leases);
        }
        self.counters.lost(reason, leases.len() as u64);
        out.push(Effect::LeasesLost {
            session: id,
            leases,
            reason,
        });
    }

    /// Drops everything that waits, with the bodies and records that only it kept.
    fn forget_waiting(&mut self, id: SubscriptionId) {
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return;
        };
        for (offset, retry) in sub.retries.iter() {
            self.pins.unpin_record(retry.place());
            self.dirty.mark(dirty::retries(id, offset));
        }
        sub.retries.clear();
        let reopened = std::mem::take(&mut sub.reopened);
        let topic = sub.topic;
        for offset in reopened.iter() {
            self.dirty.mark(dirty::sets(id, offset));
            self.close_reopened(topic, offset);
        }
    }

    /// Finishes everything below `first` without a trace, as purge and `on_limit = drop` want it.
    pub(super) fn drop_below(
        &mut self,
        id: SubscriptionId,
        first: u64,
        reason: LostReason,
        out: &mut Vec<Effect>,
    ) {
        self.revoke(id, 0, first, reason, out);
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return;
        };
        let topic = sub.topic;
        let waiting: Vec<_> = sub.retries.range(0, first).map(|(at, _)| at).collect();
        for offset in waiting {
            if let Some(retry) = sub.take_retry(offset, &mut self.dirty) {
                self.pins.unpin_record(retry.place());
            }
        }
        let low = sub.keeps().min(sub.again.next_present(0).unwrap_or(first));
        self.dirty.mark_sets(id, low, first);
        sub.again.remove_below(first);
        sub.parked.remove_below(first);
        let reopened: Vec<_> = sub.reopened.iter().take_while(|at| *at < first).collect();
        for offset in &reopened {
            self.dirty.mark(dirty::sets(id, *offset));
            sub.reopened.remove(*offset);
        }
        if sub.floor < first {
            sub.set_floor(first, &mut self.dirty);
            // It may have finished more behind that.
            self.finished.insert(topic);
        }
        if sub.hand.fresh == 0 {
            sub.hand.cursor = sub.cursor;
        }
        self.dirty.mark(dirty::subscription(id, 0));
        for offset in reopened {
            self.close_reopened(topic, offset);
        }
    }

    /// Forgets proposals of hand-outs; their records will be refused.
    pub(super) fn reset_hand(&mut self, id: SubscriptionId) {
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return;
        };
        sub.hand.reset(sub.cursor);
        for session in &sub.sessions {
            if let Some(session) = self.sessions.get_mut(session) {
                session.live.proposed = 0;
            }
        }
    }
}

fn resolve(topic: &Topic, start: StartPosition) -> u64 {
    match start {
        StartPosition::Earliest => topic.first,
        StartPosition::Latest => topic.next,
        StartPosition::At(offset) => offset.0.clamp(topic.first, topic.next),
    }
}
