//! The state machine: one record in, one outcome out.
//!
//! Owns the whole state and the table of what each kind of record does; the doing is in `apply/`,
//! proposing is in `dispatch/`. Invariant: `apply` reads nothing volatile when it decides.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use millpond_protocol::{SessionId, Stamp, SubscriptionId, TopicId};

use crate::apply::loss::Mending;
use crate::counters::Counters;
use crate::dispatch::timers::Timers;
use crate::effect::{Effect, Outcome, Place};
use crate::limits::Options;
use crate::record::Record;
use crate::state::dead_letter::Pins;
use crate::state::dedup::Producers;
use crate::state::dirty::Dirty;
use crate::state::redrive::Jobs;
use crate::state::session::Session;
use crate::state::subscription::Subscription;
use crate::state::token::Tokens;
use crate::state::topic::Topic;

/// Everything the broker knows of topics, subscriptions, producers and sessions.
#[derive(Debug, Default)]
pub struct Queue {
    pub(crate) options: Options,
    /// The stamp of the last record.
    pub(crate) last: Stamp,
    pub(crate) recovery_epoch: u32,
    pub(crate) next_topic: u32,
    pub(crate) next_subscription: u32,
    pub(crate) next_producer: u64,
    pub(crate) topics: BTreeMap<TopicId, Topic>,
    pub(crate) topic_names: BTreeMap<Arc<str>, TopicId>,
    pub(crate) subscriptions: BTreeMap<SubscriptionId, Subscription>,
    pub(crate) sessions: BTreeMap<SessionId, Session>,
    pub(crate) producers: Producers,
    pub(crate) jobs: Jobs,
    pub(crate) tokens: Tokens,
    /// Follows from letters, aliases and retries.
    pub(crate) pins: Pins,
    /// Topics by the time at which their next delayed message is due; follows from them.
    pub(crate) delay_heads: BTreeSet<(Stamp, TopicId)>,
    /// Topics whose finished messages may go, within one `apply`.
    pub(crate) finished: BTreeSet<TopicId>,
    pub(crate) dirty: Dirty,
    pub(crate) work: Work,
    pub(crate) counters: Counters,
    /// While the fold goes on over entries that are lost.
    pub(crate) mending: Mending,
}

/// What dispatch goes by. Volatile.
#[derive(Debug, Default)]
pub(crate) struct Work {
    /// Subscriptions that may have something to hand out.
    pub hot: BTreeSet<SubscriptionId>,
    /// The one served last.
    pub served: SubscriptionId,
    pub timers: Timers,
    pub draining: bool,
    pub hold: Option<&'static str>,
}

/// Where and when a record stands.
#[derive(Copy, Clone, Debug)]
pub(crate) struct At {
    pub place: Place,
    pub stamp: Stamp,
}

impl Queue {
    /// An empty state.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self {
            options,
            next_topic: 1,
            next_subscription: 1,
            next_producer: 1,
            ..Self::default()
        }
    }

    /// Decides. `out` gets effects on others than the asker. Asserts that stamps rise.
    pub fn apply(
        &mut self,
        place: Place,
        stamp: Stamp,
        record: &Record<'_>,
        out: &mut Vec<Effect>,
    ) -> Outcome {
        assert!(stamp > self.last, "stamps rise strictly");
        self.last = stamp;
        self.mature(stamp);
        let outcome = self.apply_record(At { place, stamp }, record, out);
        self.trim_finished();
        outcome
    }

    fn apply_record(&mut self, at: At, record: &Record<'_>, out: &mut Vec<Effect>) -> Outcome {
        match record {
            Record::Publish {
                topic,
                producer,
                epoch,
                previous,
                count,
                messages,
            } => self.publish(at, (*topic, *producer, *epoch), *previous, *count, messages),
            Record::Lease {
                subscription,
                session,
                ranges,
            } => self.lease(at, *subscription, *session, ranges, out),
            Record::Settle {
                subscription,
                session,
                acks,
                items,
            } => self.settle(at, *subscription, *session, acks, items),
            Record::Commit {
                subscription,
                session,
                next,
            } => self.commit(*subscription, *session, *next),
            Record::Expire(expired) => self.expire(at, expired, out),
            Record::Start { recovery_epoch } => self.start(at, *recovery_epoch),
            Record::TopicCreate { name, config } => self.topic_create(at, name, config),
            Record::TopicUpdate { topic, patch } => self.topic_update(at, *topic, patch),
            Record::TopicPurge { topic } => self.topic_purge(at, *topic, out),
            Record::TopicDelete { topic } => self.topic_delete(*topic, out),
            Record::SubscriptionCreate {
                topic,
                name,
                config,
                start,
            } => self.subscription_create(at, *topic, name, config, *start),
            Record::SubscriptionUpdate {
                subscription,
                patch,
            } => self.subscription_update(at, *subscription, patch),
            Record::SubscriptionPause { subscription } => self.pause(*subscription, true),
            Record::SubscriptionResume { subscription } => self.pause(*subscription, false),
            Record::SubscriptionSeek { subscription, to } => self.seek(*subscription, *to, out),
            Record::SubscriptionDelete { subscription } => {
                self.subscription_delete(*subscription, out)
            }
            Record::OpenProducer {
                topic,
                producer_id,
                resume,
                owner,
            } => self.open_producer(at, *topic, *producer_id, *resume, *owner, out),
            Record::CloseProducer { producer, epoch } => self.close_producer(*producer, *epoch),
            Record::SessionOpen {
                subscription,
                session,
                token,
                consumer_name,
            } => self.session_open(at, *subscription, *session, *token, consumer_name),
            Record::SessionEnd {
                session,
                clean,
                begun,
                story,
            } => self.session_end(at, *session, *clean, begun, story.as_ref(), out),
            Record::Trim { topic, first } => self.trim_record(at, *topic, *first, out),
            Record::Redrive {
                topic,
                source_topic,
                subscription,
                filter,
                rate_per_s,
                target,
            } => self.redrive(
                at,
                *topic,
                (source_topic, subscription),
                filter,
                *rate_per_s,
                *target,
            ),
            Record::RedriveStep { job, letters, next } => {
                self.redrive_step(at, *job, letters, *next, out)
            }
            Record::RedriveCancel { job } => self.redrive_cancel(*job),
            Record::DeadPurge {
                topic,
                source_topic,
                subscription,
                filter,
            } => self.dead_purge(*topic, (source_topic, subscription), filter, out),
            Record::TokenAdd { name, hash } => self.token_add(at, name, hash),
            Record::TokenRevoke { name } => self.token_revoke(name),
            Record::Mark(_) => Outcome::Done,
            Record::Skip {
                from,
                to,
                messages_max,
            } => self.end_loss(*from, *to, *messages_max),
            Record::Damaged { topic, ranges } => self.damaged(at, *topic, ranges, out),
            Record::LetGo { topic, ranges } => self.let_go(*topic, ranges),
        }
    }

    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// An estimate of the bytes that the state takes.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let topics: u64 = self.topics.values().map(Topic::memory_bytes).sum();
        let subscriptions = self.subscriptions.values().map(Subscription::memory_bytes);
        let subscriptions: u64 = subscriptions.sum();
        let sessions = self
            .sessions
            .values()
            .map(Session::memory_bytes)
            .sum::<u64>();
        topics + subscriptions + sessions + self.producers.bytes() + self.pins.memory_bytes()
    }

    /// There may be something to hand out.
    pub(crate) fn wake(&mut self, subscription: SubscriptionId) {
        self.work.hot.insert(subscription);
    }

    /// The same for every subscription of a topic that has consumers.
    pub(crate) fn wake_topic(&mut self, topic: TopicId) {
        let Some(topic) = self.topics.get(&topic) else {
            return;
        };
        for id in topic.subscriptions.values() {
            if self
                .subscriptions
                .get(id)
                .is_some_and(|sub| !sub.sessions.is_empty())
            {
                self.work.hot.insert(*id);
            }
        }
    }
}
