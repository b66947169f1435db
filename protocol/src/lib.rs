//! What Millpond's client and broker say to each other: identifiers, limits, the message layout,
//! frames and their codec, control requests, and stable error codes.
//!
//! This crate owns bytes and meanings, nothing else: no I/O, no clock, no state. Everything that
//! arrives from the network is decoded here and every decoder returns a typed error.

pub mod control;
pub mod error;
pub mod frame;
pub mod hot;
pub mod ids;
pub mod limits;
pub mod message;
pub mod name;
pub mod policy;

pub use error::{ErrorClass, ErrorCode, WireError};
pub use ids::{
    Delivery, Epoch, LogIndex, Offset, ProducerHandle, ProducerKey, Sequence, SessionId, Stamp,
    SubscriptionId, TopicId,
};
pub use message::{Message, MessageBuilder, MessageError, MessageView};
pub use policy::{
    Backoff, Jitter, OnLimit, StartAt, SubscriptionConfig, SubscriptionMode, TopicConfig,
};

/// The ALPN protocol name. From the first release on, a change that older peers cannot read gets a new number.
pub const ALPN: &[u8] = b"millpond/1";
/// The lowest protocol version this build speaks.
pub const VERSION_MIN: u16 = 1;
/// The highest protocol version this build speaks.
pub const VERSION_MAX: u16 = 1;
