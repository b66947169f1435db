//! Topics: creating, changing, emptying and removing them, and letting finished messages go.

use std::sync::Arc;

use millpond_protocol::control::LostReason;
use millpond_protocol::name::check_topic;
use millpond_protocol::policy::TopicPatch;
use millpond_protocol::{ErrorCode, Offset, SubscriptionId, TopicConfig, TopicId};

use super::unknown_topic;
use crate::dispatch::timers::Timer;
use crate::effect::{Effect, Outcome};
use crate::limits::TOPICS_MAX;
use crate::queue::{At, Queue};
use crate::state::dirty::{self, ENTITY_MAX};
use crate::state::topic::Topic;

impl Queue {
    pub(crate) fn topic_create(&mut self, at: At, name: &str, config: &TopicConfig) -> Outcome {
        if let Err(error) = check_topic(name) {
            return Outcome::error(ErrorCode::InvalidName, error.to_string());
        }
        if let Err(error) = config.check() {
            return Outcome::error(ErrorCode::InvalidPolicy, error.to_string());
        }
        if self.topic_names.contains_key(name) {
            return Outcome::error(ErrorCode::AlreadyExists, "a topic of this name exists");
        }
        match self.new_topic(at, name, config.clone()) {
            Some(id) => Outcome::TopicCreated(id),
            None => too_many_topics(),
        }
    }

    pub(super) fn new_topic(&mut self, at: At, name: &str, config: TopicConfig) -> Option<TopicId> {
        if self.topics.len() >= TOPICS_MAX || self.next_topic >= ENTITY_MAX {
            return None;
        }
        let id = TopicId(self.next_topic);
        self.next_topic += 1;
        let name: Arc<str> = name.into();
        self.topic_names.insert(name.clone(), id);
        self.topics
            .insert(id, Topic::new(id, name, config, at.stamp));
        self.dirty.mark(dirty::META);
        self.dirty.mark(dirty::topic(id, 0));
        Some(id)
    }

    pub(crate) fn topic_update(&mut self, at: At, id: TopicId, patch: &TopicPatch) -> Outcome {
        let Some(topic) = self.topics.get_mut(&id) else {
            return unknown_topic();
        };
        let config = topic.config.patched(patch);
        if let Err(error) = config.check() {
            return Outcome::error(ErrorCode::InvalidPolicy, error.to_string());
        }
        topic.config = config;
        self.dirty.mark(dirty::topic(id, 0));
        self.finished.insert(id);
        self.work.timers.arm(Timer::Topic(id), at.stamp);
        for id in topic.subscriptions.values() {
            if let Some(sub) = self.subscriptions.get_mut(id) {
                sub.hand.skipped = (0, 0);
                self.work.hot.insert(*id);
            }
        }
        Outcome::Done
    }

    /// Everything that is there now goes; what comes later keeps counting.
    pub(crate) fn topic_purge(&mut self, _at: At, id: TopicId, out: &mut Vec<Effect>) -> Outcome {
        let Some(topic) = self.topics.get(&id) else {
            return unknown_topic();
        };
        let (next, count) = (topic.next, topic.next - topic.first);
        let subscriptions: Vec<_> = topic.subscriptions.values().copied().collect();
        for sub in subscriptions {
            self.drop_below(sub, next, LostReason::Purged, out);
        }
        self.trim(id, next);
        self.counters.purged += count;
        Outcome::Purged { count }
    }

    /// Refused while it is another subscription's dead-letter topic.
    pub(crate) fn topic_delete(&mut self, id: TopicId, out: &mut Vec<Effect>) -> Outcome {
        let Some(topic) = self.topics.get(&id) else {
            return unknown_topic();
        };
        let own: Vec<_> = topic.subscriptions.values().copied().collect();
        if topic.sources.iter().any(|source| !own.contains(source)) {
            return Outcome::error(
                ErrorCode::NotEmpty,
                "a subscription sends its dead letters to this topic; delete it or name another \
                 dead-letter topic for it first",
            );
        }
        let (name, next) = (topic.name.clone(), topic.next);
        let head = topic.delays.head();
        let rows = topic.index.rows.front().map_or(next, |row| row.first);
        self.dirty
            .mark_span(|at| dirty::rows(id, at), dirty::ROWS_SHIFT, rows, next + 1);
        for sub in own {
            self.remove_subscription(sub, out);
        }
        self.trim(id, next);
        for producer in self.producers.of_topic(id) {
            self.forget_producer(producer);
            out.push(Effect::ProducerGone { producer });
        }
        if let Some(head) = head {
            self.delay_heads.remove(&(head, id));
        }
        self.topics.remove(&id);
        self.topic_names.remove(&name);
        self.work.timers.drop(Timer::Topic(id));
        self.dirty.mark(dirty::topic(id, 0));
        out.push(Effect::TopicGone { topic: id });
        Outcome::Done
    }

    /// Lets go what all subscriptions have finished, in topics that keep nothing for replay.
    pub(crate) fn trim_finished(&mut self) {
        while let Some(id) = self.finished.pop_first() {
            match self.topics.get(&id) {
                Some(topic) if topic.config.retention_ms == 0 => self.trim_to_kept(id),
                Some(_) => self.work.timers.arm(Timer::Topic(id), self.last),
                None => {}
            }
        }
    }

    /// Lets go what all subscriptions have finished, whatever the retention.
    pub(crate) fn trim_to_kept(&mut self, id: TopicId) {
        if let Some(first) = self.kept(id) {
            self.trim(id, first);
        }
    }

    /// The earliest offset that a subscription needs, or of a letter that comes before all of them; none if there
    /// is no subscription.
    pub(crate) fn kept(&self, id: TopicId) -> Option<u64> {
        let topic = self.topics.get(&id)?;
        let subs = topic.subscriptions.values();
        let starts = subs.filter_map(|id| Some(self.subscriptions.get(id)?.start));
        let start = starts.min()?;
        let letter = topic.letters.keys().next().filter(|at| **at < start);
        self.needed(id).into_iter().chain(letter.copied()).min()
    }

    /// The earliest offset that a subscription needs; none if there is no subscription.
    pub(crate) fn needed(&self, id: TopicId) -> Option<u64> {
        let topic = self.topics.get(&id)?;
        let of = |id: &SubscriptionId| self.subscriptions.get(id).map(|sub| sub.keeps());
        topic.subscriptions.values().filter_map(of).min()
    }

    /// Moves the topic's first offset up; what lies below it is finished everywhere.
    pub(crate) fn trim(&mut self, id: TopicId, first: u64) {
        let Some(topic) = self.topics.get_mut(&id) else {
            return;
        };
        let first = first.min(topic.next);
        if first <= topic.first {
            return;
        }
        let from = topic
            .index
            .rows
            .front()
            .map_or(topic.first, |row| row.first);
        let gone = topic.gone.next_present(0).unwrap_or(first);
        let gones = |at| dirty::gone(id, at);
        self.dirty.mark_span(gones, dirty::SETS_SHIFT, gone, first);
        topic.gone.remove_below(first);
        topic.first = first;
        topic.trim_proposed = topic.trim_proposed.max(first);
        self.dirty.mark(dirty::topic(id, 0));
        let rows = |at| dirty::rows(id, at);
        self.dirty.mark_span(rows, dirty::ROWS_SHIFT, from, first);
        topic.index.drop_below(first);
        while let Some(entry) = topic.extras.first_entry() {
            if *entry.key() >= first {
                break;
            }
            self.dirty.mark(dirty::extras(id, *entry.key()));
            if let (offset, Some(expires_at)) = (*entry.key(), entry.get().expires_at) {
                topic.lives.remove(&(expires_at, offset));
            }
            entry.remove();
        }
        let head = topic.delays.head();
        while let Some(offset) = topic.delays.next_in(0, first) {
            self.dirty.mark(dirty::extras(id, offset));
            topic.delays.remove(offset);
        }
        if head != topic.delays.head() {
            head.map(|head| self.delay_heads.remove(&(head, id)));
            topic
                .delays
                .head()
                .map(|head| self.delay_heads.insert((head, id)));
        }
        let aliases: Vec<_> = topic.aliases.range(..first).map(|(at, _)| *at).collect();
        let letters: Vec<_> = topic.letters.range(..first).map(|(at, _)| *at).collect();
        for letter in letters {
            self.remove_letter(id, letter);
        }
        for alias in aliases {
            let is_needed = self.is_reopened(id, alias);
            if let Some(topic) = self.topics.get_mut(&id)
                && !is_needed
                && let Some(body) = topic.aliases.remove(&alias)
            {
                self.pins.unpin_body(body);
                self.dirty.mark(dirty::letters(id, alias));
            }
        }
    }

    /// Under which topic and offset the bytes of this message were published: elsewhere for dead
    /// letters and for messages redriven to their topic.
    #[must_use]
    pub fn body_of(&self, topic: TopicId, offset: Offset) -> (TopicId, Offset) {
        let Some(found) = self.topics.get(&topic) else {
            return (topic, offset);
        };
        if let Some(letter) = found.letters.get(&offset.0) {
            return letter.body;
        }
        let alias = found.aliases.get(&offset.0);
        alias.copied().unwrap_or((topic, offset))
    }
}

pub(super) fn too_many_topics() -> Outcome {
    Outcome::error(
        ErrorCode::LimitReached,
        format!("there are {TOPICS_MAX} topics; delete some first"),
    )
}
