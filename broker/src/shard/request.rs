//! The control stream's requests: those that only look are answered at once, from what is durable;
//! the others become records.

use millpond_protocol::control::{DeadFilter, Request, Response};
use millpond_protocol::limits::{DEAD_OFFSETS_MAX, PAGE_ROWS_MAX};
use millpond_protocol::{ErrorCode, SubscriptionId, TopicId, WireError, name};
use millpond_queue::{Record, StartPosition};
use millpond_wal::storage::Storage;

use super::answer::{Origin, Then, ready};
use super::input::{read_only, unknown_subscription, unknown_topic};
use super::io::{Output, ResolvedRequest, StreamId};
use super::{Outbox, Shard};
use crate::clock::Clock;

/// A record to be logged and what its success is answered with.
type Asked<'a> = (Record<'a>, Then);

impl<S: Storage, C: Clock> Shard<S, C> {
    pub(super) fn request(
        &mut self,
        stream: StreamId,
        id: u64,
        request: ResolvedRequest,
        out: &mut Outbox<S>,
    ) {
        if let ResolvedRequest::Plain(request) = &request
            && let Some(output) = self.look(id, request)
        {
            out.replies.push((stream, output));
            return;
        }
        let asked = if self.gates.read_only {
            Err(read_only())
        } else {
            self.plan(&request)
        };
        match asked {
            Ok((record, then)) => self.push(&record, Origin::Request { stream, id, then }),
            Err(error) => out.replies.push((stream, ready(id, Err(error)))),
        }
    }

    /// Answers what changes nothing; `None` for everything else.
    fn look(&mut self, id: u64, request: &Request) -> Option<Output> {
        let result = match request {
            Request::Ping => Ok(Response::Done),
            Request::TopicShow { name } => self.show_topic(name),
            Request::TopicList { after, limit } => {
                let limit = (*limit).clamp(1, PAGE_ROWS_MAX) as usize;
                let mut topics = self.queue.topics(after.as_deref(), limit + 1);
                let more = topics.len() > limit;
                topics.truncate(limit);
                Ok(Response::Topics { topics, more })
            }
            Request::SubscriptionShow { topic, name } => self.show_subscription(topic, name),
            Request::SubscriptionList { topic } => self.list_subscriptions(topic),
            Request::RedriveShow { job } => self.show_redrive(*job),
            Request::TokenList => Ok(Response::Tokens(self.queue.tokens())),
            Request::Status => Ok(Response::Status(Box::new(self.status()))),
            Request::Peek { topic, from, limit } => {
                return Some(self.peek(id, topic, *from, *limit));
            }
            Request::DeadList {
                topic,
                subscription,
                from,
                limit,
            } => {
                return Some(self.list_dead(id, topic, subscription, *from, *limit));
            }
            _ => return None,
        };
        Some(ready(id, result))
    }

    fn plan<'a>(&self, request: &'a ResolvedRequest) -> Result<Asked<'a>, WireError> {
        match request {
            ResolvedRequest::Plain(request) => self.plan_plain(request),
            ResolvedRequest::At(request, start) => self.plan_start(request, *start),
            ResolvedRequest::Refused(error) => Err(error.clone()),
            ResolvedRequest::TokenAdd { name, hash } => {
                name::check_topic(name)
                    .map_err(|e| WireError::new(ErrorCode::InvalidName, e.to_string()))?;
                Ok((Record::TokenAdd { name, hash: *hash }, Then::Done))
            }
        }
    }

    fn plan_start<'a>(
        &self,
        request: &'a Request,
        start: StartPosition,
    ) -> Result<Asked<'a>, WireError> {
        match request {
            Request::SubscriptionCreate {
                topic,
                name,
                config,
                ..
            } => {
                let then = Then::ShowSubscription(topic.clone(), name.clone());
                let id = self.topic(topic)?;
                if self.queue.subscription_id(id, name).is_some() {
                    let text = format!(
                        "topic {topic:?} has a subscription {name:?} already; `millpond subscription update {topic} {name}` changes it"
                    );
                    return Err(WireError::new(ErrorCode::AlreadyExists, text));
                }
                let topic = id;
                Ok((
                    Record::SubscriptionCreate {
                        topic,
                        name,
                        config: config.clone(),
                        start,
                    },
                    then,
                ))
            }
            Request::SubscriptionSeek { topic, name, .. } => {
                let subscription = self.subscription(topic, name)?;
                let then = Then::ShowSubscription(topic.clone(), name.clone());
                Ok((
                    Record::SubscriptionSeek {
                        subscription,
                        to: start,
                    },
                    then,
                ))
            }
            _ => Err(unplanned()),
        }
    }

    fn plan_plain<'a>(&self, request: &'a Request) -> Result<Asked<'a>, WireError> {
        let show_topic = |name: &String| Then::ShowTopic(name.clone());
        let show =
            |topic: &String, name: &String| Then::ShowSubscription(topic.clone(), name.clone());
        Ok(match request {
            Request::TopicCreate { name, .. } if self.queue.topic_id(name).is_some() => {
                let text = format!(
                    "topic {name:?} exists already; `millpond topic update {name}` changes it"
                );
                return Err(WireError::new(ErrorCode::AlreadyExists, text));
            }
            Request::TokenRevoke { name }
                if !self.queue.tokens().iter().any(|token| token.name == *name) =>
            {
                let text = format!(
                    "there is no token {name:?}; `millpond token list` shows those there are"
                );
                return Err(WireError::new(ErrorCode::UnknownToken, text));
            }
            Request::TopicCreate { name, config } => (
                Record::TopicCreate {
                    name,
                    config: config.clone(),
                },
                show_topic(name),
            ),
            Request::TopicUpdate { name, patch } => (
                Record::TopicUpdate {
                    topic: self.topic(name)?,
                    patch: patch.clone(),
                },
                show_topic(name),
            ),
            Request::TopicPurge { name } => (
                Record::TopicPurge {
                    topic: self.topic(name)?,
                },
                Then::Done,
            ),
            Request::TopicDelete { name, force } => {
                let topic = self.topic(name)?;
                if !force {
                    self.check_deletable(topic, name)?;
                }
                (Record::TopicDelete { topic }, Then::Done)
            }
            Request::SubscriptionUpdate { topic, name, patch } => {
                let subscription = self.subscription(topic, name)?;
                (
                    Record::SubscriptionUpdate {
                        subscription,
                        patch: patch.clone(),
                    },
                    show(topic, name),
                )
            }
            Request::SubscriptionPause { topic, name } => (
                Record::SubscriptionPause {
                    subscription: self.subscription(topic, name)?,
                },
                show(topic, name),
            ),
            Request::SubscriptionResume { topic, name } => (
                Record::SubscriptionResume {
                    subscription: self.subscription(topic, name)?,
                },
                show(topic, name),
            ),
            Request::SubscriptionDelete { topic, name } => (
                Record::SubscriptionDelete {
                    subscription: self.subscription(topic, name)?,
                },
                Then::Done,
            ),
            Request::DeadRedrive {
                topic,
                subscription,
                filter,
                rate_per_s,
                target,
            } => {
                check_offsets(filter)?;
                let record = Record::Redrive {
                    topic: self.dead_topic(topic, subscription)?,
                    source_topic: topic,
                    subscription,
                    filter: filter.clone(),
                    rate_per_s: *rate_per_s,
                    target: *target,
                };
                (record, Then::Done)
            }
            Request::DeadPurge {
                topic,
                subscription,
                filter,
            } => {
                check_offsets(filter)?;
                let record = Record::DeadPurge {
                    topic: self.dead_topic(topic, subscription)?,
                    source_topic: topic,
                    subscription,
                    filter: filter.clone(),
                };
                (record, Then::Done)
            }
            Request::RedriveCancel { job } => (Record::RedriveCancel { job: *job }, Then::Done),
            Request::TokenRevoke { name } => {
                (Record::TokenRevoke { name }, Then::Revoked(name.clone()))
            }
            _ => return Err(unplanned()),
        })
    }

    /// A topic whose messages failed into dead-letter topics takes their bodies with it.
    fn check_deletable(&self, topic: TopicId, name: &str) -> Result<(), WireError> {
        let dead = self.queue.dead_of(topic);
        if dead == 0 {
            return Ok(());
        }
        let text = format!(
            "{dead} dead letters still need messages of topic {name:?}; redrive or purge them, or delete with force"
        );
        Err(WireError::new(ErrorCode::NotEmpty, text))
    }

    /// The dead-letter topic of a subscription, which may have been deleted since.
    fn dead_topic(&self, topic: &str, subscription: &str) -> Result<TopicId, WireError> {
        let unknown = || unknown_subscription(topic, subscription);
        self.queue
            .dead_topic(topic, subscription)
            .ok_or_else(unknown)
    }

    pub(super) fn topic(&self, name: &str) -> Result<TopicId, WireError> {
        self.queue.topic_id(name).ok_or_else(|| unknown_topic(name))
    }

    pub(super) fn subscription(
        &self,
        topic: &str,
        name: &str,
    ) -> Result<SubscriptionId, WireError> {
        let id = self.topic(topic)?;
        self.queue
            .subscription_id(id, name)
            .ok_or_else(|| unknown_subscription(topic, name))
    }
}

fn unplanned() -> WireError {
    WireError::new(
        ErrorCode::Malformed,
        "this broker does not know that request; use a client of its version",
    )
}

/// A job keeps its filter, and each letter is looked up in it.
fn check_offsets(filter: &DeadFilter) -> Result<(), WireError> {
    if filter.offsets.len() <= DEAD_OFFSETS_MAX {
        return Ok(());
    }
    let text = format!(
        "dead letters are chosen by at most {DEAD_OFFSETS_MAX} offsets; ask for fewer at a time"
    );
    Err(WireError::new(ErrorCode::TooLarge, text))
}
