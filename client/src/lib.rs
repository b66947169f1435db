//! The Millpond client: producers, subscriptions, workers.
//!
//! ```no_run
//! # async fn example() -> Result<(), millpond_client::Error> {
//! use millpond_client::{Client, Message};
//!
//! let client = Client::builder()
//!     .ca_file("millpond-data/tls/ca.pem")
//!     .connect("millpond://127.0.0.1:7400")
//!     .await?;
//! let producer = client.producer("orders").open().await?;
//! let receipt = producer.send(Message::new("an order")).await?;
//! println!("durable at offset {:?}", receipt.offset);
//!
//! let mut orders = client.subscribe("orders", "billing").open().await?;
//! while let Some(delivery) = orders.next().await {
//!     delivery?.ack().await?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! What is promised: a publish that is reported good was appended exactly once and is durable; one
//! that is reported as an error was not appended, unless the error says that this is unknown
//! (`Error::Ambiguous`). Connections that break are made again; producers and subscriptions go on
//! by themselves.
//!
//! This crate never imports the broker, and shows no type of its transport.

mod address;
mod admin;
mod backoff;
mod breaker;
mod client;
mod completion;
mod connection;
mod consumer;
mod control;
mod delivery;
mod error;
mod io;
pub mod limits;
mod pieces;
mod producer;
mod reopening;
mod supervisor;
mod tls;

pub use millpond_protocol::control::{
    DeadFilter, DeadLetterView, DeadReason, HistoryView, LostReason, MessageState, PeekedMessage,
    RedriveTarget, RedriveView, Request, Response, StatusView, SubscriptionView, TokenView,
    TopicView, Welcome,
};
pub use millpond_protocol::policy::{PolicyError, SubscriptionPatch, TopicPatch};
pub use millpond_protocol::{
    Backoff, ErrorClass, ErrorCode, Jitter, Message, MessageError, MessageView, Offset, OnLimit,
    Sequence, Stamp, StartAt, SubscriptionConfig, SubscriptionMode, TopicConfig, WireError,
};

pub use crate::admin::{DeadLetterPage, PeekPage};
pub use crate::client::{Client, ClientBuilder};
pub use crate::consumer::delivery::{Delivery, Nack, Reject, SettleReceipt};
pub use crate::consumer::stream::{StreamMessage, StreamSubscription};
pub use crate::consumer::worker::{IntoOutcome, Job, Outcome, WorkerBuilder, WorkerStats};
pub use crate::consumer::{SubscribeBuilder, Subscription};
pub use crate::delivery::Received;
pub use crate::error::Error;
pub use crate::producer::{Pressure, Producer, ProducerBuilder, Receipt, SendReceipt};
