//! Reading the state: what people and metrics see, and what cleaning must leave.

use millpond_protocol::control::{RedriveView, SubscriptionView, TokenView, TopicView};
use millpond_protocol::{Offset, Stamp, SubscriptionId, TopicId};
use std::ops::Bound;

use crate::effect::Place;
use crate::limits::{DEAD_SCAN_MAX, DELAYS_COUNTED_MAX};
use crate::queue::Queue;
use crate::state::dead_letter::Letter;
use crate::state::subscription::Subscription;
use crate::state::topic::Topic;

/// A page of letters, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeadPage {
    pub letters: Vec<(Offset, Letter)>,
    /// Where the next page begins.
    pub next: Offset,
    pub more: bool,
}

impl Queue {
    #[must_use]
    pub fn topic_id(&self, name: &str) -> Option<TopicId> {
        self.topic_names.get(name).copied()
    }

    #[must_use]
    pub fn topic_view(&self, topic: TopicId) -> Option<TopicView> {
        let topic = self.topics.get(&topic)?;
        let is_dead = topic.is_dead_letter || !topic.letters.is_empty();
        Some(TopicView {
            name: topic.name.to_string(),
            id: topic.id,
            config: topic.config.clone(),
            first: Offset(topic.first),
            next: Offset(topic.next),
            bytes: topic.bytes(),
            delayed: topic.delays.len(),
            subscriptions: topic.subscriptions.len() as u32,
            created_at: topic.created_at,
            dead_letters: is_dead.then_some(topic.letters.len() as u64),
            // Letters are filed in the order in which they die.
            oldest_dead_at: topic.letters.values().next().map(|letter| letter.dead_at),
        })
    }

    /// Topics by name, after this one.
    #[must_use]
    pub fn topics(&self, after: Option<&str>, limit: usize) -> Vec<TopicView> {
        let after = after.map_or(Bound::Unbounded, Bound::Excluded);
        let ids = self.topic_names.range::<str, _>((after, Bound::Unbounded));
        ids.take(limit)
            .filter_map(|(_, id)| self.topic_view(*id))
            .collect()
    }

    #[must_use]
    pub fn subscription_id(&self, topic: TopicId, name: &str) -> Option<SubscriptionId> {
        self.topics.get(&topic)?.subscriptions.get(name).copied()
    }

    #[must_use]
    pub fn subscription_view(&self, id: SubscriptionId, now: Stamp) -> Option<SubscriptionView> {
        let sub = self.subscriptions.get(&id)?;
        let topic = self.topics.get(&sub.topic)?;
        let (keepers, mut delays_left) = (self.keepers(topic), DELAYS_COUNTED_MAX);
        Some(self.view(sub, topic, keepers, now, &mut delays_left))
    }

    fn view(
        &self,
        sub: &Subscription,
        topic: &Topic,
        keepers: Keepers,
        now: Stamp,
        delays_left: &mut u64,
    ) -> SubscriptionView {
        let dead_letter = sub.dead_topic.and_then(|dead| self.topics.get(&dead));
        let backlog = sub.backlog(topic.next);
        let in_flight = sub.leases.count();
        let due = sub.retries.ready(now);
        let delayed = delayed(sub, topic, now, delays_left);
        let scheduled = (sub.retries.waiting() - due + delayed).min(backlog - in_flight);
        let ready = backlog - in_flight - scheduled;
        SubscriptionView {
            topic: topic.name.to_string(),
            name: sub.name.to_string(),
            id: sub.id,
            config: sub.config.clone(),
            dead_letter: dead_letter
                .map(|dead| dead.name.to_string())
                .unwrap_or_default(),
            paused: sub.paused,
            floor: sub.position(),
            backlog,
            ready,
            in_flight,
            scheduled,
            dead: dead(sub),
            consumers: sub.sessions.len() as u32,
            oldest_ready_ms: (ready > 0).then(|| oldest_ready_ms(sub, topic, now)),
            next_due: [sub.retries.next_due(now), topic.delays.next_due(now)]
                .into_iter()
                .flatten()
                .min(),
            pinned_bytes: pinned_bytes(sub, topic, keepers),
            stalled: self.stalled(sub, ready),
        }
    }

    /// Whether anybody is to get what is published there.
    #[must_use]
    pub fn has_subscriptions(&self, topic: TopicId) -> bool {
        let topic = self.topics.get(&topic);
        topic.is_some_and(|topic| !topic.subscriptions.is_empty())
    }

    /// The subscriptions of these topics, of each by name; at most `limit` in all.
    #[must_use]
    pub fn subscriptions(
        &self,
        topics: impl IntoIterator<Item = TopicId>,
        now: Stamp,
        limit: usize,
    ) -> Vec<SubscriptionView> {
        let (mut views, mut delays_left) = (Vec::new(), DELAYS_COUNTED_MAX);
        for topic in topics {
            let room = limit - views.len();
            let Some(topic) = self.topics.get(&topic).filter(|_| room > 0) else {
                continue;
            };
            let keepers = self.keepers(topic);
            let subs = self.subscriptions_of(topic).take(room);
            views.extend(subs.map(|sub| self.view(sub, topic, keepers, now, &mut delays_left)));
        }
        views
    }

    /// Dead letters of all subscriptions of a topic.
    #[must_use]
    pub fn dead_of(&self, topic: TopicId) -> u64 {
        let topic = self.topics.get(&topic).into_iter();
        let subs = topic.flat_map(|topic| self.subscriptions_of(topic));
        subs.map(dead).sum()
    }

    /// The dead-letter topic that has the letters of this subscription, which may be deleted.
    #[must_use]
    pub fn dead_topic(&self, topic: &str, subscription: &str) -> Option<TopicId> {
        let id = self.topic_id(topic);
        let id = id.and_then(|topic| self.subscription_id(topic, subscription));
        match id.and_then(|id| self.subscriptions.get(&id)) {
            Some(sub) => sub.dead_topic,
            None => {
                let name = millpond_protocol::name::default_dead_letter(topic, subscription);
                self.topic_id(&name)
            }
        }
    }

    /// Letters of (topic, subscription) in a dead-letter topic, from this offset on. A page may be
    /// short or empty and have `more` behind it.
    #[must_use]
    pub fn dead_letters(
        &self,
        dead: TopicId,
        topic: &str,
        subscription: &str,
        from: Offset,
        limit: usize,
    ) -> DeadPage {
        let mut page = DeadPage {
            next: from,
            ..DeadPage::default()
        };
        let Some(dead) = self.topics.get(&dead) else {
            return page;
        };
        for (looked, (offset, letter)) in dead.letters.range(from.0..).enumerate() {
            if page.letters.len() == limit || looked == DEAD_SCAN_MAX {
                page.next = Offset(*offset);
                page.more = true;
                return page;
            }
            if letter.is_of(topic, subscription) {
                page.letters.push((Offset(*offset), letter.clone()));
            }
        }
        page.next = Offset(dead.next).max(from);
        page
    }

    /// The letter at this place of a dead-letter topic.
    #[must_use]
    pub fn letter(&self, topic: TopicId, offset: Offset) -> Option<&Letter> {
        self.topics.get(&topic)?.letters.get(&offset.0)
    }

    #[must_use]
    pub fn redrive_view(&self, job: u64) -> Option<RedriveView> {
        Some(self.jobs.all.get(&job)?.view(job))
    }

    #[must_use]
    pub fn tokens(&self) -> Vec<TokenView> {
        let tokens = self.tokens.by_name.iter();
        let view = |(name, token): (&String, &crate::state::token::Token)| TokenView {
            name: name.clone(),
            created_at: token.created_at,
        };
        tokens.map(view).collect()
    }

    /// The name of the token with this hash. Compares every one, whole.
    #[must_use]
    pub fn token_by_hash(&self, hash: &[u8; 32]) -> Option<&str> {
        let differs = |other: &[u8; 32]| {
            let pairs = hash.iter().zip(other);
            pairs.fold(0, |seen, (a, b)| seen | (a ^ b))
        };
        let mut found = None;
        for (name, token) in &self.tokens.by_name {
            if differs(&token.hash) == 0 {
                found = Some(name.as_str());
            }
        }
        found
    }

    /// Whether the message published there may still be read by somebody.
    #[must_use]
    pub fn is_live(&self, topic: TopicId, offset: Offset) -> bool {
        let kept = self.topics.get(&topic);
        kept.is_some_and(|kept| offset.0 >= kept.first) || self.pins.has_body((topic, offset))
    }

    /// The earliest offset kept. Earlier ones may be live as dead letters, see `is_live`.
    #[must_use]
    pub fn first_kept(&self, topic: TopicId) -> Offset {
        Offset(
            self.topics
                .get(&topic)
                .map_or(u64::MAX, |topic| topic.first),
        )
    }

    /// Whether a dead letter or a waiting retry tells its story by the record at this place.
    #[must_use]
    pub fn record_is_pinned(&self, place: Place) -> bool {
        self.pins.has_record(place)
    }

    fn subscriptions_of(&self, topic: &Topic) -> impl Iterator<Item = &Subscription> {
        let ids = topic.subscriptions.values();
        ids.filter_map(|id| self.subscriptions.get(id))
    }

    /// Looks at every subscription of a topic, so that no view of one has to.
    fn keepers(&self, topic: &Topic) -> Keepers {
        let mut keepers = Keepers::default();
        for sub in self.subscriptions_of(topic) {
            let keeper = Some((sub.keeps(), sub.id));
            let [first, second] = keepers;
            if first.is_none() || keeper < first {
                keepers = [keeper, first];
            } else if second.is_none() || keeper < second {
                keepers = [first, keeper];
            }
        }
        keepers
    }

    fn stalled(&self, sub: &Subscription, ready: u64) -> Option<String> {
        let reason = if let Some(reason) = self.work.hold {
            reason
        } else if self.work.draining {
            "the broker is shutting down"
        } else if sub.paused {
            "the subscription is paused"
        } else if ready == 0 {
            return None;
        } else if sub.sessions.is_empty() {
            "it has no consumers"
        } else if sub.leases.count() >= u64::from(sub.config.max_in_flight) {
            "max_in_flight messages are leased"
        } else if sub.retries.bytes() >= self.options.retry_bytes_max {
            "waiting retries take all the memory they may; no new messages until some finish"
        } else {
            return None;
        };
        Some(reason.to_owned())
    }
}

/// The two subscriptions of a topic that keep the earliest of its messages, and from where on: whichever is left
/// out, the others keep what the first of the rest does.
type Keepers = [Option<(u64, SubscriptionId)>; 2];

/// Bytes that would go if this subscription had finished everything.
fn pinned_bytes(sub: &Subscription, topic: &Topic, keepers: Keepers) -> u64 {
    let mut others = keepers.iter().flatten().filter(|(_, id)| *id != sub.id);
    let kept = others.next().map_or(topic.next, |(first, _)| *first);
    let first = sub.keeps().max(topic.first);
    if first < kept {
        topic.bytes_between(first, kept)
    } else {
        0
    }
}

fn dead(sub: &Subscription) -> u64 {
    sub.dead.len() as u64 + sub.parked.len()
}

/// Messages that were never due yet: counted one by one as long as `left` lasts, beyond it all of the topic's.
fn delayed(sub: &Subscription, topic: &Topic, now: Stamp, left: &mut u64) -> u64 {
    if !sub.is_queue() {
        return 0;
    }
    let Some(rest) = left.checked_sub(topic.delays.len()) else {
        return topic.delays.len();
    };
    *left = rest;
    let waits = |offset: u64| !sub.is_finished(offset) && !sub.retries.contains(offset);
    let later = topic.delays.range(sub.start, u64::MAX);
    let later = later.filter(|(offset, due)| *due > now && waits(*offset));
    later.count() as u64
}

fn oldest_ready_ms(sub: &Subscription, topic: &Topic, now: Stamp) -> u64 {
    let fresh = sub.again.next_present(0).unwrap_or(sub.cursor);
    let fresh = topic
        .index
        .published_by(fresh)
        .filter(|_| fresh < topic.next);
    let oldest = sub.retries.first_due().into_iter().chain(fresh).min();
    oldest.map_or(0, |oldest| now.ms_since(oldest))
}
