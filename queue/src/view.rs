//! Reading the state: what people and metrics see.

use std::sync::Arc;

use millpond_protocol::control::{DeadReason, RedriveView, SubscriptionView, TokenView, TopicView};
use millpond_protocol::{Offset, Stamp, SubscriptionId, TopicId};

use crate::effect::Place;
use crate::queue::Queue;

/// A message in a dead-letter topic. Error text, code, consumer and history stand in the record at
/// `place`; the message's bytes at `body`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Letter {
    /// The message in the topic in which it failed.
    pub source: TopicId,
    pub source_offset: Offset,
    pub source_topic: Arc<str>,
    pub subscription: Arc<str>,
    pub subscription_id: SubscriptionId,
    /// The topic and offset under which the message was published.
    pub body: (TopicId, Offset),
    pub reason: DeadReason,
    /// The record of the last failing settlement, or of what made it dead if it never failed.
    pub place: Place,
    pub failures: u32,
    pub deliveries: u32,
    pub releases: u32,
    pub redrives: u32,
    pub first_attempt_at: Option<Stamp>,
    pub dead_at: Stamp,
}

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
    pub fn topic_id(&self, _name: &str) -> Option<TopicId> {
        None
    }

    #[must_use]
    pub fn topic_view(&self, _topic: TopicId) -> Option<TopicView> {
        None
    }

    /// Topics by name, after this one.
    #[must_use]
    pub fn topics(&self, _after: Option<&str>, _limit: usize) -> Vec<TopicView> {
        Vec::new()
    }

    #[must_use]
    pub fn subscription_id(&self, _topic: TopicId, _name: &str) -> Option<SubscriptionId> {
        None
    }

    #[must_use]
    pub fn subscription_view(&self, _id: SubscriptionId, _now: Stamp) -> Option<SubscriptionView> {
        None
    }

    /// A topic's subscriptions by name.
    #[must_use]
    pub fn subscriptions(&self, _topic: TopicId, _now: Stamp) -> Vec<SubscriptionView> {
        Vec::new()
    }

    /// The dead-letter topic that has the letters of this subscription, which may be deleted.
    #[must_use]
    pub fn dead_topic(&self, _topic: &str, _subscription: &str) -> Option<TopicId> {
        None
    }

    /// Letters of (topic, subscription) in a dead-letter topic, from this offset on.
    #[must_use]
    pub fn dead_letters(
        &self,
        _dead: TopicId,
        _topic: &str,
        _subscription: &str,
        _from: Offset,
        _limit: usize,
    ) -> DeadPage {
        DeadPage::default()
    }

    /// The letter at this place of a dead-letter topic.
    #[must_use]
    pub fn letter(&self, _topic: TopicId, _offset: Offset) -> Option<&Letter> {
        None
    }

    /// Under which topic and offset the bytes of this message were published: elsewhere for dead
    /// letters and for messages redriven to their topic.
    #[must_use]
    pub fn body_of(&self, topic: TopicId, offset: Offset) -> (TopicId, Offset) {
        (topic, offset)
    }

    #[must_use]
    pub fn redrive_view(&self, _job: u64) -> Option<RedriveView> {
        None
    }

    #[must_use]
    pub fn tokens(&self) -> Vec<TokenView> {
        Vec::new()
    }

    /// The name of the token with this hash.
    #[must_use]
    pub fn token_by_hash(&self, _hash: &[u8; 32]) -> Option<&str> {
        None
    }

    /// Whether the message published there may still be read by somebody.
    #[must_use]
    pub fn is_live(&self, _topic: TopicId, _offset: Offset) -> bool {
        true
    }

    /// The earliest offset kept.
    #[must_use]
    pub fn first_kept(&self, _topic: TopicId) -> Offset {
        Offset(0)
    }

    /// Whether a dead letter or a waiting retry tells its story by the record at this place.
    #[must_use]
    pub fn record_is_pinned(&self, _place: Place) -> bool {
        true
    }
}
