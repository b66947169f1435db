//! Consumers: take messages from a subscription and settle them.

pub(crate) mod delivery;
mod driver;
mod hear;
pub(crate) mod session;
mod settle;
pub(crate) mod stream;
pub(crate) mod worker;

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;
use millpond_protocol::control::CreateSubscription;
use millpond_protocol::{ErrorCode, StartAt, SubscriptionConfig, SubscriptionMode, WireError};
use tokio::time::{Instant, timeout};

use self::delivery::Delivery;
use self::driver::Identity;
use self::session::{Item, Prefetch, Session};
use self::stream::StreamSubscription;
use self::worker::WorkerBuilder;
use crate::client::Inner;
use crate::error::Error;
use crate::limits::{CLOSE_TIMEOUT, PREFETCH_BYTES, PREFETCH_MESSAGES};

/// How a consumer is opened.
#[must_use = "a consumer is opened by `open`, `open_stream` or a worker's `run`"]
pub struct SubscribeBuilder {
    inner: Arc<Inner>,
    topic: String,
    subscription: String,
    prefetch: Prefetch,
    create: Option<CreateSubscription>,
    consumer_name: Option<String>,
}

impl SubscribeBuilder {
    pub(crate) fn new(inner: Arc<Inner>, topic: String, subscription: String) -> Self {
        Self {
            inner,
            topic,
            subscription,
            prefetch: Prefetch {
                messages: u64::from(PREFETCH_MESSAGES),
                bytes: PREFETCH_BYTES,
                in_all: u64::MAX,
            },
            create: None,
            consumer_name: None,
        }
    }

    /// Most deliveries that are here and not settled, taken or not; default 1,000. Who collects more
    /// than that before settling waits for ever.
    pub fn prefetch(mut self, messages: u32) -> Self {
        self.prefetch.messages = u64::from(messages.max(1));
        self
    }

    /// Most deliveries that are taken from the subscription in all; default any number. Once so many
    /// have come, none is leased that nobody would take.
    pub fn at_most(mut self, messages: u64) -> Self {
        self.prefetch.in_all = messages;
        self
    }

    /// Most bytes of them; default 32 MiB.
    pub fn prefetch_bytes(mut self, bytes: u64) -> Self {
        self.prefetch.bytes = bytes.max(1);
        self
    }

    /// Creates the subscription if it is missing. The topic must exist.
    pub fn create(mut self, config: SubscriptionConfig, start: StartAt) -> Self {
        self.create = Some(CreateSubscription { config, start });
        self
    }

    /// The name shown in dead letters; default the client's.
    pub fn consumer_name(mut self, name: impl Into<String>) -> Self {
        self.consumer_name = Some(name.into());
        self
    }

    /// Opens a consumer of a queue subscription.
    ///
    /// # Errors
    /// What the broker says (`UnknownSubscription`, `WrongMode`), or why it cannot be asked.
    pub async fn open(self) -> Result<Subscription, Error> {
        let session = self.open_session(SubscriptionMode::Queue).await?;
        Ok(Subscription { session })
    }

    /// Opens a consumer of a stream subscription. `create` makes one of that mode.
    ///
    /// # Errors
    /// As for `open`.
    pub async fn open_stream(mut self) -> Result<StreamSubscription, Error> {
        if let Some(create) = &mut self.create {
            create.config.mode = SubscriptionMode::Stream;
        }
        let (inner, topic, name) = (
            Arc::clone(&self.inner),
            self.topic.clone(),
            self.subscription.clone(),
        );
        let session = self.open_session(SubscriptionMode::Stream).await?;
        Ok(StreamSubscription::new(inner, topic, name, session))
    }

    /// A worker: runs a handler for each delivery.
    pub fn worker(self) -> WorkerBuilder {
        WorkerBuilder::new(self)
    }

    async fn open_session(self, mode: SubscriptionMode) -> Result<SessionHandle, Error> {
        let shared = &self.inner.shared;
        shared.allow()?;
        let identity = Identity {
            topic: self.topic,
            subscription: self.subscription,
            create: self.create,
            consumer_name: self.consumer_name.unwrap_or_else(|| shared.name.clone()),
        };
        let deadline = Instant::now() + shared.request_timeout;
        let streams = driver::open(shared, &identity, None, deadline).await?;
        let found = streams.opened.mode;
        let session = Arc::new(Session::new(&streams.opened, self.prefetch));
        let task = driver::run(
            Arc::clone(&self.inner),
            Arc::clone(&session),
            identity,
            streams,
        );
        shared.tasks.spawn(task);
        let handle = SessionHandle(session);
        if found == mode {
            return Ok(handle);
        }
        handle.close().await;
        let advice = match found {
            SubscriptionMode::Queue => "this is a queue subscription; open it with open()",
            SubscriptionMode::Stream => "this is a stream subscription; open it with open_stream()",
        };
        Err(WireError::new(ErrorCode::WrongMode, advice).into())
    }
}

/// Ends its session when dropped, once the deliveries that are still out are settled.
pub(crate) struct SessionHandle(pub(crate) Arc<Session>);

impl SessionHandle {
    async fn close(self) {
        self.0.close();
        if timeout(CLOSE_TIMEOUT, self.0.ended()).await.is_err() {
            self.0.end(&Error::Closed);
        }
    }
}

impl Drop for SessionHandle {
    fn drop(&mut self) {
        self.0.detach();
    }
}

/// Deliveries of a queue subscription, each to be settled by itself.
///
/// A `Stream` of `Result<Delivery, Error>`. It survives broken connections and broker restarts; an
/// error is its last item. Dropping it lets deliveries that are still held be settled; those that
/// were not taken are handed back.
pub struct Subscription {
    session: SessionHandle,
}

impl Subscription {
    /// The next delivery; `None` once the subscription is closed. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<Delivery, Error>> {
        std::future::poll_fn(|context| self.poll_delivery(context)).await
    }

    /// Deliveries that were dropped without being settled, and so were released.
    #[must_use]
    pub fn dropped_deliveries(&self) -> u64 {
        self.session.0.dropped_count()
    }

    /// Sends what has been settled, ends the session and waits until the broker has confirmed it.
    /// Whatever has not been settled is handed back at once, uncharged.
    pub async fn close(self) {
        self.session.close().await;
    }

    fn poll_delivery(&self, context: &mut Context<'_>) -> Poll<Option<Result<Delivery, Error>>> {
        let session = &self.session.0;
        session
            .poll_item(context)
            .map_ok(|item| match item {
                Item::Message(held) => Ok(Delivery::new(Arc::clone(session), held)),
                Item::Corrupt { first, next } => Err(Error::Corrupt { first, next }),
            })
            .map(|item| item.map(|item| item.and_then(|item| item)))
    }
}

impl Stream for Subscription {
    type Item = Result<Delivery, Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_delivery(context)
    }
}
