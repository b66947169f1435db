//! A consumer of a stream subscription: strict offset order, one committed offset.

use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;
use millpond_protocol::control::Request;
use millpond_protocol::{Offset, StartAt};
use tokio::time::timeout;

use super::SessionHandle;
use super::delivery::SettleReceipt;
use super::session::Item;
use crate::client::{Client, Inner};
use crate::delivery::Received;
use crate::error::Error;

/// A message of a stream subscription.
#[derive(Clone, Debug)]
pub struct StreamMessage {
    received: Received,
}

impl Deref for StreamMessage {
    type Target = Received;

    fn deref(&self) -> &Received {
        &self.received
    }
}

/// Messages of a stream subscription in offset order, while this consumer is the active one.
///
/// A `Stream` of `Result<StreamMessage, Error>`. `Corrupt` tells of a damaged range that is left out
/// and is not the end; any other error is its last item.
pub struct StreamSubscription {
    inner: Arc<Inner>,
    topic: String,
    name: String,
    session: SessionHandle,
}

impl StreamSubscription {
    pub(crate) fn new(
        inner: Arc<Inner>,
        topic: String,
        name: String,
        session: SessionHandle,
    ) -> Self {
        Self {
            inner,
            topic,
            name,
            session,
        }
    }

    /// The next message; `None` once the subscription is closed. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<StreamMessage, Error>> {
        std::future::poll_fn(|context| self.poll_message(context)).await
    }

    /// Everything before `next` is finished. Resolves when that is durable.
    ///
    /// # Errors
    /// `LeaseLost` if the session was lost meanwhile: messages come again from the offset that was
    /// committed last. `NotActive` if another consumer has taken over.
    pub async fn commit(&self, next: Offset) -> Result<(), Error> {
        self.commit_later(next).await
    }

    /// `commit`, with its answer awaited later.
    pub fn commit_later(&self, next: Offset) -> SettleReceipt {
        SettleReceipt::new(self.session.0.commit(next))
    }

    /// Moves the subscription: what comes next is from there. Commits that are on their way are
    /// awaited first. Dropped before it resolves, it may be done all the same.
    ///
    /// # Errors
    /// `Ambiguous` if the answer was lost: what comes next is from there, or again from the offset
    /// that was committed last. After any other error the subscription goes on as it was.
    pub async fn seek(&self, to: StartAt) -> Result<(), Error> {
        let session = &self.session.0;
        // Nothing keeps them in order with the seek: one that came behind it would undo it.
        let limit = self.inner.shared.request_timeout;
        let committed = timeout(limit, session.all_settled()).await;
        committed.map_err(|_| Error::Timeout {
            what: "the answer to a commit",
        })?;
        let request = Request::SubscriptionSeek {
            topic: self.topic.clone(),
            name: self.name.clone(),
            to,
        };
        let client = Client::from_inner(Arc::clone(&self.inner));
        let answer = client.request(request).await;
        if matches!(answer, Ok(_) | Err(Error::Ambiguous)) {
            session.sought();
        }
        answer.map(|_| ())
    }

    /// True while this consumer is the active one; otherwise it stands by.
    #[must_use]
    pub fn active(&self) -> bool {
        self.session.0.is_active()
    }

    /// Sends pending commits, ends the session and waits until the broker has confirmed it.
    pub async fn close(self) {
        self.session.close().await;
    }

    fn poll_message(
        &self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<StreamMessage, Error>>> {
        self.session.0.poll_item(context).map(|item| {
            item.map(|item| match item? {
                Item::Message(held) => Ok(StreamMessage {
                    received: Received::new(held.delivered),
                }),
                Item::Corrupt { first, next } => Err(Error::Corrupt { first, next }),
            })
        })
    }
}

impl Stream for StreamSubscription {
    type Item = Result<StreamMessage, Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_message(context)
    }
}
