//! Dead letters: filing, redriving and purging them.
//!
//! Exactly once and atomically: a message is in its subscription or in the dead-letter topic. Redriven
//! and purged letters leave holes; offsets stay, and the subscription's floor does not move back.

use std::collections::BTreeMap;
use std::sync::Arc;

use millpond_protocol::control::{DeadFilter, DeadReason, LostReason, RedriveTarget};
use millpond_protocol::{ErrorCode, Offset, SubscriptionId, TopicId};

use super::unknown_topic;
use crate::dispatch::timers::Timer;
use crate::effect::{Effect, Outcome};
use crate::planted::{self, Bug};
use crate::queue::{At, Queue};
use crate::state::dead_letter::Letter;
use crate::state::dirty;
use crate::state::redelivery::Retry;
use crate::state::redrive::{Job, Pace, RUNNING_JOBS_MAX};
use crate::state::subscription::Subscription;
use crate::state::topic::Extra;

impl Queue {
    /// What the message has of its own.
    pub(crate) fn own(&self, sub: &Subscription, offset: u64, retry: &Retry) -> Extra {
        let of_topic = || self.topics.get(&sub.topic).map(|topic| topic.extra(offset));
        retry.own().or_else(of_topic).unwrap_or_default()
    }

    /// Failures after which the message is dead: its own number or the subscription's.
    pub(crate) fn max_attempts(&self, sub: &Subscription, offset: u64, retry: &Retry) -> u32 {
        match self.own(sub, offset, retry).max_attempts {
            0 => sub.config.max_attempts,
            own => u32::from(own),
        }
    }

    /// Files a message as a dead letter and finishes it. It is neither leased nor waiting any more.
    pub(super) fn kill(
        &mut self,
        at: At,
        sub_id: SubscriptionId,
        offset: u64,
        mut retry: Retry,
        reason: DeadReason,
    ) {
        let Some(sub) = self.subscriptions.get(&sub_id) else {
            return;
        };
        let own = Extra {
            expires_at: None,
            ..self.own(sub, offset, &retry)
        };
        let source = self.topics.get(&sub.topic).map(|topic| topic.name.clone());
        let letter = Letter {
            source: sub.topic,
            source_offset: Offset(offset),
            source_topic: source.unwrap_or_default(),
            subscription: sub.name.clone(),
            subscription_id: sub_id,
            body: self.body_of(sub.topic, Offset(offset)),
            reason,
            place: retry.place().unwrap_or(at.place),
            failures: retry.failures,
            deliveries: retry.deliveries,
            releases: retry.releases,
            redrives: retry.redrives(),
            first_attempt_at: retry.first_attempt_at(),
            dead_at: at.stamp,
            delivery: retry.delivery,
            session: retry.session,
            answered: retry.answered,
            own,
        };
        if planted::is(Bug::DeadLetterLost) {
            self.finish(sub_id, offset, offset + 1);
            return;
        }
        let bytes = self.bytes_of(sub.topic, offset);
        let place = sub
            .dead_topic
            .and_then(|dead| self.file(at, dead, letter, bytes));
        if planted::is(Bug::DeadLetterStays) {
            if let Some(sub) = self.subscriptions.get_mut(&sub_id) {
                retry.set_due(Some(at.stamp));
                sub.wait(offset, Box::new(retry), u32::MAX, &mut self.dirty);
            }
            return;
        }
        *self.counters.dead.entry(reason).or_default() += 1;
        if let Some(sub) = self.subscriptions.get_mut(&sub_id) {
            match place {
                Some(place) => {
                    sub.dead.insert(offset, place);
                }
                None => {
                    sub.parked.insert(offset);
                }
            }
        }
        self.finish(sub_id, offset, offset + 1);
    }

    fn file(
        &mut self,
        at: At,
        dead: TopicId,
        letter: Letter,
        bytes: u64,
    ) -> Option<(TopicId, u64)> {
        let topic = self.topics.get_mut(&dead)?;
        let offset = topic.append(1, bytes, at.stamp, &mut self.dirty);
        self.pins.pin_body(letter.body);
        self.pins.pin_record(Some(letter.place));
        topic.letters.insert(offset, letter);
        self.dirty.mark(dirty::letters(dead, offset));
        self.arm_ages(dead, at.stamp);
        self.wake_topic(dead);
        Some((dead, offset))
    }

    /// Takes a letter away, and with it what it pinned.
    pub(super) fn remove_letter(&mut self, dead: TopicId, offset: u64) -> Option<Letter> {
        let letter = self.topics.get_mut(&dead)?.letters.remove(&offset)?;
        self.dirty.mark(dirty::letters(dead, offset));
        self.pins.unpin_body(letter.body);
        self.pins.unpin_record(Some(letter.place));
        if let Some(sub) = self.subscriptions.get_mut(&letter.subscription_id) {
            let source = letter.source_offset.0;
            if sub.dead.get(&source) == Some(&(dead, offset)) {
                sub.dead.remove(&source);
            }
        }
        Some(letter)
    }

    /// A reopened message is finished: it, and a reference that only it needed, keep no body.
    pub(super) fn close_reopened(&mut self, id: TopicId, offset: u64) {
        let body = self.body_of(id, Offset(offset));
        self.pins.unpin_body(body);
        let is_needed = self.is_reopened(id, offset);
        if let Some(topic) = self.topics.get_mut(&id)
            && offset < topic.first
            && !is_needed
            && let Some(body) = topic.aliases.remove(&offset)
        {
            self.pins.unpin_body(body);
            self.dirty.mark(dirty::letters(id, offset));
        }
    }

    /// Whether any subscription has got this message back.
    pub(super) fn is_reopened(&self, id: TopicId, offset: u64) -> bool {
        let subs = self.topics.get(&id).into_iter();
        let mut subs = subs.flat_map(|topic| topic.subscriptions.values());
        subs.any(|id| {
            let sub = self.subscriptions.get(id);
            sub.is_some_and(|sub| sub.reopened.contains(offset))
        })
    }

    /// Leaves a hole in a dead-letter topic: its own subscriptions have nothing to do there, whenever they come.
    fn withdraw(&mut self, dead: TopicId, offset: u64, out: &mut Vec<Effect>) {
        let Some(topic) = self.topics.get_mut(&dead) else {
            return;
        };
        topic.gone.insert(offset);
        self.dirty.mark(dirty::gone(dead, offset));
        self.finished.insert(dead);
        let subs: Vec<_> = topic.subscriptions.values().copied().collect();
        for id in subs {
            self.revoke(id, offset, offset + 1, LostReason::Purged, out);
            let Some(sub) = self.subscriptions.get_mut(&id) else {
                continue;
            };
            self.dirty.mark_sets(id, offset, offset + 1);
            sub.parked.remove(offset);
            sub.again.remove(offset);
            if let Some(retry) = sub.take_retry(offset, &mut self.dirty) {
                self.pins.unpin_record(retry.place());
            }
            if !sub.is_finished(offset) {
                self.finish(id, offset, offset + 1);
            }
        }
    }

    pub(crate) fn redrive(
        &mut self,
        at: At,
        topic: TopicId,
        (source_topic, subscription): (&str, &str),
        filter: &DeadFilter,
        rate_per_s: Option<u32>,
        target: RedriveTarget,
    ) -> Outcome {
        let Some(dead) = self.topics.get(&topic) else {
            return unknown_topic();
        };
        if self.jobs.running() >= RUNNING_JOBS_MAX {
            let sentence = format!("{RUNNING_JOBS_MAX} redrives are running; wait or cancel some");
            return Outcome::error(ErrorCode::LimitReached, sentence);
        }
        let meant = Meant::of(source_topic, subscription, filter);
        let total = meant.among(&dead.letters).count() as u64;
        let mut job = Job {
            topic,
            source_topic: Arc::from(source_topic),
            subscription: Arc::from(subscription),
            filter: filter.clone(),
            rate_per_s: rate_per_s.filter(|rate| *rate > 0),
            target,
            next: dead.first,
            end: dead.next,
            total: total.min(filter.limit.unwrap_or(u64::MAX)),
            done: 0,
            finished: false,
            cancelled: false,
            pace: Pace::default(),
        };
        job.finished = job.total == 0;
        self.jobs.next += 1;
        let key = self.jobs.next;
        let view = job.view(key);
        self.jobs.all.insert(key, job);
        self.jobs.forget();
        self.dirty.mark(dirty::JOBS);
        self.work.timers.arm(Timer::Job(key), at.stamp);
        Outcome::Redrive(view)
    }

    pub(crate) fn redrive_step(
        &mut self,
        at: At,
        key: u64,
        letters: &[Offset],
        next: Offset,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let Some(job) = self.jobs.all.get_mut(&key) else {
            return unknown_job();
        };
        job.pace.proposed = false;
        self.dirty.mark(dirty::JOBS);
        if job.finished {
            return Outcome::Redrive(job.view(key));
        }
        let job = job.clone();
        let meant = Meant::of(&job.source_topic, &job.subscription, &job.filter);
        let mut done = 0;
        for letter in letters {
            let belongs = self
                .topics
                .get(&job.topic)
                .and_then(|t| t.letters.get(&letter.0));
            let belongs = belongs.is_some_and(|found| meant.has(letter.0, found));
            if belongs && self.send_back(at, job.topic, letter.0, job.target, out) {
                done += 1;
            }
        }
        self.counters.redriven += done;
        let Some(job) = self.jobs.all.get_mut(&key) else {
            return unknown_job();
        };
        job.done += done;
        job.next = next.0.max(job.next);
        job.finished = job.next >= job.end || job.done >= job.total;
        let view = job.view(key);
        self.jobs.forget();
        self.work.timers.arm(Timer::Job(key), at.stamp);
        Outcome::Redrive(view)
    }

    /// True: the letter is gone and its message is back.
    fn send_back(
        &mut self,
        at: At,
        dead: TopicId,
        offset: u64,
        target: RedriveTarget,
        out: &mut Vec<Effect>,
    ) -> bool {
        let letter = self
            .topics
            .get(&dead)
            .and_then(|topic| topic.letters.get(&offset));
        let Some(letter) = letter.cloned() else {
            return false;
        };
        let possible = match target {
            RedriveTarget::Subscription => {
                let sub = self.subscriptions.get(&letter.subscription_id);
                sub.is_some_and(|sub| sub.dead.contains_key(&letter.source_offset.0))
            }
            RedriveTarget::Topic => self.topics.contains_key(&letter.source),
        };
        if !possible {
            return false;
        }
        match target {
            RedriveTarget::Subscription if planted::is(Bug::RedriveLosesLetter) => {}
            RedriveTarget::Subscription => self.reopen(at, &letter),
            RedriveTarget::Topic => self.publish_again(at, dead, offset, &letter),
        }
        self.remove_letter(dead, offset);
        self.withdraw(dead, offset, out);
        true
    }

    /// The subscription in which it failed gets the message back, as one that never failed.
    fn reopen(&mut self, at: At, letter: &Letter) {
        let (id, offset) = (letter.subscription_id, letter.source_offset.0);
        let Some(sub) = self.subscriptions.get_mut(&id) else {
            return;
        };
        self.dirty.mark_sets(id, offset, offset + 1);
        if offset < sub.floor {
            sub.reopened.insert(offset);
            self.pins.pin_body(letter.body);
            if let Some(topic) = self.topics.get_mut(&letter.source)
                && letter.body != (letter.source, letter.source_offset)
                && topic.aliases.insert(offset, letter.body).is_none()
            {
                // Its own message was let go; the reference is needed once more.
                self.pins.pin_body(letter.body);
                self.dirty.mark(dirty::letters(letter.source, offset));
            }
        } else {
            sub.done.remove(offset);
        }
        let mut retry = Retry::redriven(letter.redrives + 1, Some(letter.own));
        retry.delivery = letter.delivery;
        retry.session = letter.session;
        retry.set_due(Some(at.stamp));
        sub.wait(offset, Box::new(retry), u32::MAX, &mut self.dirty);
        self.wake(id);
    }

    /// About the size of a message; a reference counts as much as what it refers to, so that credit
    /// in bytes is reckoned alike.
    fn bytes_of(&self, topic: TopicId, offset: u64) -> u64 {
        let topic = self.topics.get(&topic);
        topic.map_or(0, |topic| topic.bytes_between(offset, offset + 1))
    }

    /// The source topic gets the message again; every subscription sees a new one.
    fn publish_again(&mut self, at: At, dead: TopicId, place: u64, letter: &Letter) {
        let bytes = self.bytes_of(dead, place);
        let Some(topic) = self.topics.get_mut(&letter.source) else {
            return;
        };
        let offset = topic.append(1, bytes, at.stamp, &mut self.dirty);
        topic.aliases.insert(offset, letter.body);
        if letter.own != Extra::default() {
            topic.extras.insert(offset, letter.own);
            self.dirty.mark(dirty::extras(letter.source, offset));
        }
        self.pins.pin_body(letter.body);
        self.dirty.mark(dirty::letters(letter.source, offset));
        self.arm_ages(letter.source, at.stamp);
        self.wake_topic(letter.source);
    }

    pub(crate) fn redrive_cancel(&mut self, key: u64) -> Outcome {
        let Some(job) = self.jobs.all.get_mut(&key) else {
            return unknown_job();
        };
        if !job.finished {
            (job.finished, job.cancelled) = (true, true);
        }
        self.dirty.mark(dirty::JOBS);
        Outcome::Redrive(job.view(key))
    }

    pub(crate) fn dead_purge(
        &mut self,
        dead: TopicId,
        (source_topic, subscription): (&str, &str),
        filter: &DeadFilter,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        let Some(topic) = self.topics.get(&dead) else {
            return unknown_topic();
        };
        let most = usize::try_from(filter.limit.unwrap_or(u64::MAX)).unwrap_or(usize::MAX);
        let meant = Meant::of(source_topic, subscription, filter);
        let chosen: Vec<_> = meant.among(&topic.letters).take(most).collect();
        for letter in &chosen {
            self.remove_letter(dead, *letter);
            self.withdraw(dead, *letter, out);
        }
        let count = chosen.len() as u64;
        self.counters.purged += count;
        Outcome::Purged { count }
    }
}

/// Which letters are meant, whatever their number. There may be a million, and a thousand offsets: one is looked up
/// in the other.
pub(crate) struct Meant<'a> {
    source_topic: &'a str,
    subscription: &'a str,
    reason: Option<DeadReason>,
    /// Rising, each once; none: any.
    offsets: Vec<u64>,
}

impl<'a> Meant<'a> {
    pub fn of(source_topic: &'a str, subscription: &'a str, filter: &DeadFilter) -> Self {
        let mut offsets: Vec<_> = filter.offsets.iter().map(|offset| offset.0).collect();
        offsets.sort_unstable();
        offsets.dedup();
        Self {
            source_topic,
            subscription,
            reason: filter.reason,
            offsets,
        }
    }

    /// Whether the letter at this offset is one of them.
    pub fn has(&self, offset: u64, letter: &Letter) -> bool {
        self.suits(letter)
            && (self.offsets.is_empty() || self.offsets.binary_search(&offset).is_ok())
    }

    /// Their offsets, rising.
    fn among(&self, letters: &BTreeMap<u64, Letter>) -> impl Iterator<Item = u64> {
        let named = self.offsets.iter();
        let named = named.filter_map(|offset| letters.get_key_value(offset));
        let any = self.offsets.is_empty().then_some(letters);
        let all = named.chain(any.into_iter().flatten());
        all.filter(|(_, letter)| self.suits(letter))
            .map(|(offset, _)| *offset)
    }

    fn suits(&self, letter: &Letter) -> bool {
        letter.is_of(self.source_topic, self.subscription)
            && self.reason.is_none_or(|reason| reason == letter.reason)
    }
}

fn unknown_job() -> Outcome {
    Outcome::error(
        ErrorCode::OffsetOutOfRange,
        "there is no redrive of this number",
    )
}
