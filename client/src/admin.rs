//! Typed control requests: topics, subscriptions, dead letters, tokens, status.

use millpond_protocol::control::{
    DeadFilter, DeadLetterView, PeekedMessage, RedriveTarget, RedriveView, Request, Response,
    StatusView, SubscriptionView, TokenView, TopicView,
};
use millpond_protocol::limits::PAGE_ROWS_MAX;
use millpond_protocol::policy::{SubscriptionPatch, TopicPatch};
use millpond_protocol::{Offset, StartAt, SubscriptionConfig, TopicConfig};

use crate::client::Client;
use crate::error::Error;
use crate::limits::LIST_PAGES_MAX;

/// One page of dead letters, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetterPage {
    pub letters: Vec<DeadLetterView>,
    /// Where the next page begins.
    pub next: Offset,
    /// True if there is a next page.
    pub more: bool,
}

/// One page of messages as they are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeekPage {
    pub messages: Vec<PeekedMessage>,
    /// Where the next page begins.
    pub next: Offset,
    /// True if there is a next page.
    pub more: bool,
}

macro_rules! answer {
    ($self:ident, $request:expr, $pattern:pat => $value:expr) => {
        match $self.request($request).await? {
            $pattern => Ok($value),
            other => Err(unexpected(&other)),
        }
    };
}

impl Client {
    /// Asks for nothing but an answer.
    pub async fn ping(&self) -> Result<(), Error> {
        answer!(self, Request::Ping, Response::Done => ())
    }

    pub async fn create_topic(&self, name: &str, config: TopicConfig) -> Result<TopicView, Error> {
        let name = name.to_owned();
        answer!(self, Request::TopicCreate { name, config }, Response::Topic(view) => view)
    }

    /// Every topic, by name; reads all pages.
    pub async fn list_topics(&self) -> Result<Vec<TopicView>, Error> {
        let mut all: Vec<TopicView> = Vec::new();
        for _ in 0..LIST_PAGES_MAX {
            let request = Request::TopicList {
                after: all.last().map(|topic| topic.name.clone()),
                limit: PAGE_ROWS_MAX,
            };
            let (topics, more) = answer!(
                self, request, Response::Topics { topics, more } => (topics, more)
            )?;
            let done = !more || topics.is_empty();
            all.extend(topics);
            if done {
                break;
            }
        }
        Ok(all)
    }

    pub async fn topic(&self, name: &str) -> Result<TopicView, Error> {
        let name = name.to_owned();
        answer!(self, Request::TopicShow { name }, Response::Topic(view) => view)
    }

    pub async fn update_topic(&self, name: &str, patch: TopicPatch) -> Result<TopicView, Error> {
        let name = name.to_owned();
        answer!(self, Request::TopicUpdate { name, patch }, Response::Topic(view) => view)
    }

    /// Removes every message; offsets go on.
    pub async fn purge_topic(&self, name: &str) -> Result<(), Error> {
        let name = name.to_owned();
        answer!(self, Request::TopicPurge { name }, Response::Done | Response::Purged { .. } => ())
    }

    /// Deletes a topic with its subscriptions; refused while letters of theirs are elsewhere, unless
    /// `force`.
    pub async fn delete_topic(&self, name: &str, force: bool) -> Result<(), Error> {
        let name = name.to_owned();
        answer!(self, Request::TopicDelete { name, force }, Response::Done => ())
    }

    pub async fn create_subscription(
        &self,
        topic: &str,
        name: &str,
        config: SubscriptionConfig,
        start: StartAt,
    ) -> Result<SubscriptionView, Error> {
        let request = Request::SubscriptionCreate {
            topic: topic.to_owned(),
            name: name.to_owned(),
            config,
            start,
        };
        answer!(self, request, Response::Subscription(view) => view)
    }

    pub async fn subscriptions(&self, topic: &str) -> Result<Vec<SubscriptionView>, Error> {
        let topic = topic.to_owned();
        answer!(self, Request::SubscriptionList { topic }, Response::Subscriptions(views) => views)
    }

    pub async fn subscription(&self, topic: &str, name: &str) -> Result<SubscriptionView, Error> {
        let (topic, name) = (topic.to_owned(), name.to_owned());
        answer!(self, Request::SubscriptionShow { topic, name }, Response::Subscription(view) => view)
    }

    pub async fn update_subscription(
        &self,
        topic: &str,
        name: &str,
        patch: SubscriptionPatch,
    ) -> Result<SubscriptionView, Error> {
        let request = Request::SubscriptionUpdate {
            topic: topic.to_owned(),
            name: name.to_owned(),
            patch,
        };
        answer!(self, request, Response::Subscription(view) => view)
    }

    /// Stops hand-outs; charges nothing.
    pub async fn pause_subscription(&self, topic: &str, name: &str) -> Result<(), Error> {
        let (topic, name) = (topic.to_owned(), name.to_owned());
        answer!(
            self, Request::SubscriptionPause { topic, name },
            Response::Done | Response::Subscription(_) => ()
        )
    }

    /// Starts hand-outs again.
    pub async fn resume_subscription(&self, topic: &str, name: &str) -> Result<(), Error> {
        let (topic, name) = (topic.to_owned(), name.to_owned());
        answer!(
            self, Request::SubscriptionResume { topic, name },
            Response::Done | Response::Subscription(_) => ()
        )
    }

    /// Moves a subscription: what is below the target is finished, what is not is ready.
    pub async fn seek(&self, topic: &str, name: &str, to: StartAt) -> Result<(), Error> {
        let (topic, name) = (topic.to_owned(), name.to_owned());
        answer!(
            self, Request::SubscriptionSeek { topic, name, to },
            Response::Done | Response::Subscription(_) => ()
        )
    }

    /// Deletes a subscription; its dead letters stay.
    pub async fn delete_subscription(&self, topic: &str, name: &str) -> Result<(), Error> {
        let (topic, name) = (topic.to_owned(), name.to_owned());
        answer!(self, Request::SubscriptionDelete { topic, name }, Response::Done => ())
    }

    /// Dead letters of a subscription from this dead-letter offset on; takes nothing away.
    pub async fn dead_letters(
        &self,
        topic: &str,
        subscription: &str,
        from: Offset,
        limit: u32,
    ) -> Result<DeadLetterPage, Error> {
        let request = Request::DeadList {
            topic: topic.to_owned(),
            subscription: subscription.to_owned(),
            from,
            limit,
        };
        answer!(
            self, request,
            Response::DeadLetters { letters, next, more } => DeadLetterPage { letters, next, more }
        )
    }

    /// Starts a job that sends dead letters back, at most `rate_per_s` of them in a second.
    pub async fn redrive(
        &self,
        topic: &str,
        subscription: &str,
        filter: DeadFilter,
        rate_per_s: Option<u32>,
        target: RedriveTarget,
    ) -> Result<RedriveView, Error> {
        let request = Request::DeadRedrive {
            topic: topic.to_owned(),
            subscription: subscription.to_owned(),
            filter,
            rate_per_s,
            target,
        };
        answer!(self, request, Response::Redrive(view) => view)
    }

    pub async fn redrive_status(&self, job: u64) -> Result<RedriveView, Error> {
        answer!(self, Request::RedriveShow { job }, Response::Redrive(view) => view)
    }

    /// Stops a redrive; each letter is then either dead or redriven.
    pub async fn cancel_redrive(&self, job: u64) -> Result<RedriveView, Error> {
        answer!(self, Request::RedriveCancel { job }, Response::Redrive(view) => view)
    }

    /// Deletes dead letters; the number of those that went.
    pub async fn purge_dead_letters(
        &self,
        topic: &str,
        subscription: &str,
        filter: DeadFilter,
    ) -> Result<u64, Error> {
        let request = Request::DeadPurge {
            topic: topic.to_owned(),
            subscription: subscription.to_owned(),
            filter,
        };
        answer!(self, request, Response::Purged { count } => count)
    }

    /// Messages as they are stored, without taking them. A page may have fewer, or none, though there are more
    /// behind it: where many are gone, each page passes over some.
    pub async fn peek(&self, topic: &str, from: Offset, limit: u32) -> Result<PeekPage, Error> {
        let topic = topic.to_owned();
        answer!(
            self, Request::Peek { topic, from, limit },
            Response::Messages { messages, next, more } => PeekPage { messages, next, more }
        )
    }

    /// Makes an API token and returns it; it is never shown again.
    pub async fn new_token(&self, name: &str) -> Result<String, Error> {
        let name = name.to_owned();
        answer!(self, Request::TokenNew { name }, Response::Token { token, .. } => token)
    }

    pub async fn tokens(&self) -> Result<Vec<TokenView>, Error> {
        answer!(self, Request::TokenList, Response::Tokens(views) => views)
    }

    pub async fn revoke_token(&self, name: &str) -> Result<(), Error> {
        let name = name.to_owned();
        answer!(self, Request::TokenRevoke { name }, Response::Done => ())
    }

    pub async fn status(&self) -> Result<StatusView, Error> {
        answer!(self, Request::Status, Response::Status(view) => *view)
    }
}

fn unexpected(response: &Response) -> Error {
    let name = format!("{response:?}");
    let name = name.split([' ', '(', '{']).next().unwrap_or_default();
    Error::Protocol(format!("it answered with {name}, which was not asked for"))
}
