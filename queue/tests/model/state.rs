//! What a queue must be, as plainly as it can be told: one entry per message and subscription,
//! linear scans, no cleverness. It follows from the documented semantics, not from the core's code.
//!
//! Durable parts change only in `fold.rs`, `settle.rs` and `dead.rs`, record by record. Volatile
//! parts (credit, begin marks, pending proposals) change where the driver makes the same call on
//! the core.

use std::collections::{BTreeMap, BTreeSet};

use millpond_protocol::control::{DeadReason, LeaseName, RedriveTarget};
use millpond_protocol::{
    Delivery, Epoch, ProducerKey, SessionId, Stamp, SubscriptionConfig, SubscriptionId,
    SubscriptionMode, TopicConfig, TopicId,
};
use millpond_queue::{FailureKind, Place, Record};

/// Ages that follow from the policy of a topic or subscription are known to this precision.
pub const AGE_SLACK_MS: u64 = 1_100;

#[derive(Debug, Default)]
pub struct Model {
    pub topics: BTreeMap<TopicId, Topic>,
    pub subs: BTreeMap<SubscriptionId, Sub>,
    pub producers: BTreeMap<ProducerKey, Producer>,
    pub sessions: BTreeMap<SessionId, Session>,
    pub jobs: BTreeMap<u64, Job>,
    pub tokens: BTreeMap<String, [u8; 32]>,
    pub ids: BTreeSet<u64>,
    /// Proposed and not yet applied, in order.
    pub pending: Vec<Record<'static>>,
    /// Leases that had to be handed out alone.
    pub alone: BTreeSet<(SubscriptionId, u64, Delivery)>,
    /// When a lease was proposed.
    pub handed_at: BTreeMap<(SessionId, LeaseName), Stamp>,
    /// Every name under which a lease has become durable.
    pub names: BTreeSet<(SubscriptionId, SessionId, LeaseName)>,
    pub holding: bool,
    pub recovery_epoch: u32,
    pub counts: Counts,
    /// Deaths of the record that is being applied: they must be the new letters.
    pub deaths: Vec<Death>,
    /// Leases that the record took away: effects must say so.
    pub lost: BTreeSet<(SessionId, LeaseName)>,
    /// Leases of which effects may speak.
    pub maybe_lost: BTreeSet<(SessionId, LeaseName)>,
    /// Proposed leases that a seek has overtaken.
    pub overtaken: BTreeSet<(SubscriptionId, LeaseName)>,
}

/// What has happened, to be compared with the core's counters and to see that tests test.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub published: u64,
    pub dedup_hits: u64,
    pub delivered: u64,
    pub acked: u64,
    pub released: u64,
    pub failures: u64,
    pub dead: u64,
    pub redriven: u64,
    pub purged: u64,
    pub fenced: u64,
    pub gaps: u64,
    pub late: u64,
}

#[derive(Debug)]
pub struct Topic {
    pub name: String,
    pub config: TopicConfig,
    pub first: u64,
    /// By offset, for ever.
    pub messages: Vec<Message>,
    /// Let go out of turn, or where a letter was taken away: finished for every subscription that comes or goes
    /// back there.
    pub gone: BTreeSet<u64>,
    /// Made for letters.
    pub is_dead: bool,
}

#[derive(Clone, Debug)]
pub struct Message {
    pub published: Stamp,
    pub bytes: u64,
    pub delay_ms: u64,
    pub ttl_ms: u64,
    pub max_attempts: u32,
    pub initial_ms: u64,
    /// Where its bytes were published.
    pub body: (TopicId, u64),
    pub letter: Option<Death>,
    /// A copy that a redrive made.
    pub copy: bool,
}

/// A message's death, as its letter must tell it.
#[derive(Clone, Debug)]
pub struct Death {
    pub topic: TopicId,
    pub topic_name: String,
    pub sub: SubscriptionId,
    pub sub_name: String,
    pub dead_topic: String,
    pub offset: u64,
    pub body: (TopicId, u64),
    /// Several where two limits are reached by one failure.
    pub reasons: Vec<DeadReason>,
    pub item: Item,
    pub place: Place,
    pub at: Stamp,
}

#[derive(Debug)]
pub struct Sub {
    pub id: SubscriptionId,
    pub topic: TopicId,
    pub name: String,
    pub config: SubscriptionConfig,
    pub dead_topic: String,
    pub paused: bool,
    /// Queue mode, by offset.
    pub items: Vec<Item>,
    /// Everything below is finished, but for what was redriven.
    pub floor: u64,
    /// Stream mode.
    pub committed: u64,
    /// Stream mode: let go before it came there, or where a letter was taken away.
    pub gone: BTreeSet<u64>,
    /// Stream mode: those that wait, the active one first.
    pub line: Vec<SessionId>,
    /// Moved by a seek since the last look.
    pub sought: bool,
}

#[derive(Clone, Debug, Default)]
pub struct Item {
    pub state: State,
    pub failures: u32,
    pub deliveries: u32,
    pub releases: u32,
    pub redrives: u32,
    /// Deliveries and releases before the last redrive, whose limit starts again.
    pub before_redrive: (u32, u32),
    pub suspect: Suspect,
    /// The last failure was the loss of a session, and whether it left one attempt.
    pub lost_last: Option<bool>,
    pub first_attempt: Option<Stamp>,
    /// Every lease that it had, oldest first.
    pub leases: Vec<Past>,
    /// The last failing settlement.
    pub failed_at: Option<Place>,
    pub history: Vec<(Stamp, FailureKind, u32)>,
    /// Its time was over while it was leased: it dies with the lease.
    pub is_over: bool,
    /// A seek put it back: what was said of it before may be forgotten.
    pub sought: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    #[default]
    Ready,
    Leased {
        session: SessionId,
        delivery: Delivery,
        at: Stamp,
    },
    /// Due not before `from` and not after `to`; they differ by jitter.
    Scheduled {
        from: Stamp,
        to: Stamp,
    },
    Acked,
    Dead,
    Gone,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Suspect {
    #[default]
    No,
    Yes,
    /// It was, and nothing says whether it still is.
    Maybe,
}

/// A lease of a message, and how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Past {
    pub session: SessionId,
    pub delivery: Delivery,
    pub ending: Option<Ending>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Ack,
    Nack,
    Reject,
    Release,
    /// Taken away: by a timeout, by the session's end.
    Taken,
    /// Taken away by an operator.
    Revoked,
}

#[derive(Clone, Debug)]
pub struct Producer {
    pub topic: TopicId,
    /// `None`: anonymous.
    pub name: Option<String>,
    pub epoch: Epoch,
    pub last: u64,
    /// Accepted sequences and their offsets, oldest first.
    pub accepted: Vec<(u64, u64)>,
    /// Numbers in `accepted` at which batches begin.
    pub batches: Vec<usize>,
    pub active: Stamp,
}

#[derive(Clone, Debug)]
pub struct Session {
    pub sub: SubscriptionId,
    pub token: u64,
    pub attached: bool,
    /// When it was attached or detached.
    pub since: Stamp,
    /// The last sign of life.
    pub alive: Stamp,
    /// When it last came back.
    pub resumed: Stamp,
    /// When it was last given something: a new lease lasts as long as any.
    pub given: Stamp,
    pub max_messages: u64,
    pub max_bytes: u64,
    /// Hand-outs of this attachment in order.
    pub sent: Vec<LeaseName>,
    pub begun: u64,
    /// What it was sent was called back, and it has begun nothing since.
    pub stuck: bool,
    /// When what it holds was begun.
    pub marks: BTreeMap<LeaseName, Stamp>,
    /// Stream mode: the next to be sent in this attachment.
    pub read: Option<u64>,
}

#[derive(Clone, Debug)]
pub struct Job {
    pub dead: TopicId,
    pub source: String,
    pub sub: String,
    pub target: RedriveTarget,
    pub letters: BTreeSet<u64>,
    pub total: u64,
    pub done: u64,
    pub rate: Option<u32>,
    pub begun: Stamp,
    pub cancelled: bool,
}

impl Topic {
    pub fn next(&self) -> u64 {
        self.messages.len() as u64
    }
}

impl Message {
    pub fn ready_at(&self) -> Stamp {
        self.published.plus_ms(self.delay_ms)
    }
}

impl Item {
    pub fn is_finished(&self) -> bool {
        matches!(self.state, State::Acked | State::Dead | State::Gone)
    }

    /// Whether nothing is said of its having to be alone.
    pub fn may_be_alone(&self) -> bool {
        self.suspect == Suspect::Maybe || self.lost_last.is_some()
    }

    /// The newest lease ended so.
    pub fn end(&mut self, ending: Option<Ending>) {
        if let Some(last) = self.leases.last_mut() {
            last.ending = ending;
        }
    }

    pub fn lease(&self) -> Option<(SessionId, Delivery)> {
        match self.state {
            State::Leased {
                session, delivery, ..
            } => Some((session, delivery)),
            _ => None,
        }
    }
}

impl Session {
    pub fn seen(&self) -> Stamp {
        self.alive.max(self.given)
    }
}

impl Sub {
    pub fn is_queue(&self) -> bool {
        self.config.mode == SubscriptionMode::Queue
    }

    pub fn count(&self, which: impl Fn(&Item) -> bool) -> u64 {
        self.items.iter().filter(|item| which(item)).count() as u64
    }
}

impl Model {
    pub fn topic_named(&self, name: &str) -> Option<TopicId> {
        let found = self.topics.iter().find(|(_, topic)| topic.name == name);
        found.map(|(id, _)| *id)
    }

    pub fn sub_named(&self, topic: TopicId, name: &str) -> Option<SubscriptionId> {
        let is_it = |sub: &&Sub| sub.topic == topic && sub.name == name;
        self.subs.values().find(is_it).map(|sub| sub.id)
    }

    pub fn subs_of(&self, topic: TopicId) -> Vec<SubscriptionId> {
        let all = self.subs.values();
        all.filter(|sub| sub.topic == topic)
            .map(|sub| sub.id)
            .collect()
    }

    pub fn sessions_of(&self, sub: SubscriptionId) -> Vec<SessionId> {
        let all = self.sessions.iter();
        all.filter(|(_, session)| session.sub == sub)
            .map(|(id, _)| *id)
            .collect()
    }

    pub fn message(&self, sub: &Sub, offset: u64) -> &Message {
        &self.topics[&sub.topic].messages[offset as usize]
    }

    /// When this message may be handed out next: not before the first, surely from the second on.
    pub fn available(&self, sub: &Sub, offset: u64) -> Option<(Stamp, Stamp)> {
        let item = &sub.items[offset as usize];
        match item.state {
            State::Ready => {
                let ready_at = self.message(sub, offset).ready_at();
                // A redrive need not wait for the delay that it was published with.
                let from = if item.redrives > 0 {
                    Stamp(0)
                } else {
                    ready_at
                };
                Some((from, ready_at))
            }
            State::Scheduled { from, to } => Some((from, to)),
            _ => None,
        }
    }

    /// Leases of a session, applied ones and proposed ones.
    pub fn leases_of(&self, session: SessionId) -> Vec<LeaseName> {
        let mut out = self.applied_leases(session);
        for record in &self.pending {
            if let Record::Lease {
                session: to,
                ranges,
                ..
            } = record
                && *to == session
            {
                for range in ranges {
                    let all = range.offset.0..range.offset.0 + u64::from(range.count);
                    out.extend(all.map(|offset| name(offset, range.delivery)));
                }
            }
        }
        out
    }

    /// Leases of a subscription that are proposed and not yet applied.
    pub fn proposed_of(&self, sub: SubscriptionId) -> Vec<LeaseName> {
        let mut out = Vec::new();
        for record in &self.pending {
            if let Record::Lease {
                subscription,
                ranges,
                ..
            } = record
                && *subscription == sub
            {
                for range in ranges {
                    let all = range.offset.0..range.offset.0 + u64::from(range.count);
                    out.extend(all.map(|offset| name(offset, range.delivery)));
                }
            }
        }
        out
    }

    pub fn applied_leases(&self, session: SessionId) -> Vec<LeaseName> {
        let Some(known) = self.sessions.get(&session) else {
            return Vec::new();
        };
        let items = self.subs[&known.sub].items.iter().enumerate();
        let mine = items.filter_map(|(offset, item)| match item.lease() {
            Some((holder, delivery)) if holder == session => Some(name(offset as u64, delivery)),
            _ => None,
        });
        mine.collect()
    }

    /// Whether a proposal for this message has not been applied yet.
    pub fn is_proposed(&self, sub: SubscriptionId, offset: u64) -> bool {
        self.pending.iter().any(|record| match record {
            Record::Lease {
                subscription,
                ranges,
                ..
            } => {
                *subscription == sub
                    && ranges.iter().any(|range| {
                        (range.offset.0..range.offset.0 + u64::from(range.count)).contains(&offset)
                    })
            }
            _ => false,
        })
    }

    /// Leases of a subscription: applied ones, and proposed ones that no seek has overtaken.
    pub fn in_flight(&self, sub: &Sub) -> (u64, u64) {
        let leased = sub.count(|item| item.lease().is_some());
        let proposed = self.proposed_of(sub.id).into_iter();
        let stand = proposed.filter(|lease| !self.overtaken.contains(&(sub.id, *lease)));
        (leased, stand.count() as u64)
    }

    /// Failures after which this message is dead.
    pub fn max_attempts(&self, sub: &Sub, offset: u64) -> u32 {
        match self.message(sub, offset).max_attempts {
            0 => sub.config.max_attempts,
            own => own,
        }
    }

    /// Whether the message is too old to be delivered: surely not, maybe, surely.
    pub fn outlived(&self, sub: &Sub, offset: u64, now: Stamp) -> Option<bool> {
        let message = self.message(sub, offset);
        if sub.items[offset as usize].redrives > 0 || message.copy {
            return None;
        }
        let mut answer = Some(false);
        if message.ttl_ms > 0 && message.published.plus_ms(message.ttl_ms) <= now {
            return Some(true);
        }
        let topic_ttl = self.topics[&sub.topic].config.ttl_ms;
        let of_topic = topic_ttl.filter(|_| message.ttl_ms == 0);
        for ms in [of_topic, sub.config.max_age_ms].into_iter().flatten() {
            if message.published.plus_ms(ms + AGE_SLACK_MS) <= now {
                return Some(true);
            }
            if message.published.plus_ms(ms) <= now {
                answer = None;
            }
        }
        answer
    }
}

pub fn name(offset: u64, delivery: Delivery) -> LeaseName {
    LeaseName {
        offset: millpond_protocol::Offset(offset),
        delivery,
    }
}
