//! Producers: publish messages to a topic, in order, once each.

mod batch;
mod core;
mod driver;
mod pipeline;
mod receipt;
mod stream;

use std::sync::Arc;
use std::time::Duration;

use millpond_protocol::limits::{NAME_BYTES_MAX, PRODUCER_ID_BYTES_MAX};
use millpond_protocol::{Message, Sequence};
use tokio::time::Instant;

use self::core::Core;
use self::driver::Identity;
pub use self::pipeline::Pressure;
use self::pipeline::{Pipeline, PipelineConfig};
pub use self::receipt::{Receipt, SendReceipt};
pub(crate) use self::stream::PublishStreams;
use crate::client::Inner;
use crate::error::Error;
use crate::limits::{PRODUCER_WINDOW_MESSAGES, SETTING_MAX};

/// How a producer is opened.
#[must_use = "a producer is opened by `open`"]
pub struct ProducerBuilder {
    inner: Arc<Inner>,
    topic: String,
    id: Option<String>,
    first_sequence: Option<Sequence>,
    linger: Duration,
    send_timeout: Option<Duration>,
    window_messages: usize,
}

impl ProducerBuilder {
    pub(crate) fn new(inner: Arc<Inner>, topic: String) -> Self {
        Self {
            inner,
            topic,
            id: None,
            first_sequence: None,
            linger: Duration::ZERO,
            send_timeout: None,
            window_messages: PRODUCER_WINDOW_MESSAGES,
        }
    }

    /// A lasting name, under which the broker remembers sequences: what a crashed process sends
    /// again is recognised. Opening it fences whoever has it open. Without one, sequences are
    /// remembered as long as this producer lives. At most 200 bytes.
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// The sequence of the first message; default: the one after the last that the broker has.
    pub fn first_sequence(mut self, sequence: u64) -> Self {
        self.first_sequence = Some(Sequence(sequence));
        self
    }

    /// How long a batch may wait for more messages; default zero: a batch is what gathers while the
    /// one before it is written. At most a year: a full batch, `flush` and `close` end the wait.
    pub fn linger(mut self, linger: Duration) -> Self {
        self.linger = linger.min(SETTING_MAX);
        self
    }

    /// How long a message may wait for credit, and then for its answer; default the client's, at most a
    /// year.
    pub fn send_timeout(mut self, limit: Duration) -> Self {
        self.send_timeout = Some(limit.min(SETTING_MAX));
        self
    }

    /// Most messages that are queued or unanswered; default 65,536.
    pub fn window_messages(mut self, messages: usize) -> Self {
        self.window_messages = messages.max(1);
        self
    }

    /// Opens the producer.
    ///
    /// # Errors
    /// What the broker says (`UnknownTopic`, `Unauthorized`), or why it cannot be asked; `TooLong` if
    /// the topic's name or the id is.
    pub async fn open(self) -> Result<Producer, Error> {
        let shared = &self.inner.shared;
        check_length("topic's name", &self.topic, NAME_BYTES_MAX)?;
        let id = self.id.as_deref().unwrap_or_default();
        check_length("producer id", id, PRODUCER_ID_BYTES_MAX)?;
        shared.allow()?;
        let identity = Identity {
            topic: self.topic,
            producer_id: self.id,
        };
        let deadline = Instant::now() + shared.request_timeout;
        let stream = driver::open(shared, &identity, &mut None, deadline).await?;
        let send_timeout = self.send_timeout.unwrap_or(shared.send_timeout);
        let config = PipelineConfig {
            window_messages: self.window_messages,
            linger: self.linger,
            send_timeout,
        };
        let pipeline = Pipeline::new(config, &stream.opened, self.first_sequence);
        let core = Arc::new(Core::new(pipeline, send_timeout));
        let mut stream = stream;
        stream.begin(&core);
        let task = driver::run(Arc::clone(&self.inner), Arc::clone(&core), identity, stream);
        shared.tasks.spawn(task);
        Ok(Producer {
            handle: Arc::new(Handle { core }),
        })
    }
}

fn check_length(what: &'static str, name: &str, max: usize) -> Result<(), Error> {
    let found = name.len();
    if found > max {
        return Err(Error::TooLong { what, found, max });
    }
    Ok(())
}

/// Publishes messages to one topic. Clones share one order, one window and one batch.
///
/// When the last clone is dropped, what was enqueued is still sent.
#[derive(Clone)]
pub struct Producer {
    handle: Arc<Handle>,
}

struct Handle {
    core: Arc<Core>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.close();
    }
}

impl Producer {
    /// Publishes a message and waits until it is durable.
    ///
    /// Dropping the future while it waits for room sends nothing; once there was room, which is at the
    /// first poll unless the producer is slowed down, the message is on its way and stays so. Where the
    /// difference matters, `enqueue` tells it.
    ///
    /// # Errors
    /// `Backpressure` if there was no room within the send timeout, `Ambiguous` if there was no
    /// answer, `Fenced`, `Message`. All but `Ambiguous` mean: not appended.
    pub async fn send(&self, message: Message) -> Result<SendReceipt, Error> {
        self.enqueue(message).await?.await
    }

    /// `send` with the user's own sequence, for example an outbox row's id. It must rise.
    pub async fn send_with_sequence(
        &self,
        message: Message,
        sequence: Sequence,
    ) -> Result<SendReceipt, Error> {
        self.enqueue_with_sequence(message, sequence).await?.await
    }

    /// Waits for room only; the receipt tells the outcome. Messages keep the order in which they found
    /// room. Cancel-safe: a message whose future is dropped before it has returned has not been taken.
    pub async fn enqueue(&self, message: Message) -> Result<Receipt, Error> {
        self.core().push(&message, None).await.map(Receipt::new)
    }

    /// `enqueue` with the user's own sequence. It must rise.
    pub async fn enqueue_with_sequence(
        &self,
        message: Message,
        sequence: Sequence,
    ) -> Result<Receipt, Error> {
        let slot = self.core().push(&message, Some(sequence)).await?;
        Ok(Receipt::new(slot))
    }

    /// Takes the message if there is room now.
    ///
    /// # Errors
    /// `Backpressure` at once if there is none.
    pub fn try_send(&self, message: Message) -> Result<Receipt, Error> {
        self.core().try_push(&message, None).map(Receipt::new)
    }

    /// `try_send` with the user's own sequence. It must rise.
    pub fn try_send_with_sequence(
        &self,
        message: Message,
        sequence: Sequence,
    ) -> Result<Receipt, Error> {
        let slot = self.core().try_push(&message, Some(sequence))?;
        Ok(Receipt::new(slot))
    }

    /// The last sequence given to a message; after opening, the last that the broker has.
    #[must_use]
    pub fn last_sequence(&self) -> Sequence {
        self.core().last_assigned()
    }

    /// Why the broker slows this producer down, if it does.
    #[must_use]
    pub fn pressure(&self) -> Option<Pressure> {
        self.core().pressure()
    }

    /// Waits until every message taken so far has its outcome.
    ///
    /// # Errors
    /// The first failure of any message since the last flush.
    pub async fn flush(&self) -> Result<(), Error> {
        self.core().flush().await
    }

    /// Takes no further messages, on no clone, and waits for the outcome of the present ones.
    pub async fn close(self) {
        self.core().close();
        self.core().finished().await;
    }

    fn core(&self) -> &Core {
        &self.handle.core
    }
}
