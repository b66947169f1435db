//! The Millpond broker as a library: the shard, QUIC sessions, HTTP, configuration.
//!
//! [`Broker::start`] runs one in this process; [`EmbeddedBroker`] one for tests, in a temporary
//! folder. The `millpond serve` command is a thin shell around the former.

mod allocator;
pub mod bodies;
pub mod broker;
pub mod clock;
pub mod config;
pub mod disk;
pub mod embedded;
pub mod http;
pub mod identity;
mod mailbox;
pub mod memory;
pub mod metrics;
mod quic;
mod router;
mod runtime;
pub mod shard;
mod shard_thread;
mod small_file;
mod start_error;
pub mod tls;
pub mod token;
pub mod transport;

pub use broker::{Broker, BrokerError};
pub use config::{Config, ConfigError};
pub use embedded::EmbeddedBroker;
pub use runtime::runtime;
pub use start_error::{Door, StartError};
