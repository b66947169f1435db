//! The Millpond broker: QUIC sessions, the shard, HTTP, configuration.

pub mod clock;
pub mod config;
pub mod identity;
pub mod memory;
mod small_file;
mod start_error;
pub mod tls;
pub mod token;
pub mod transport;

pub use config::{Config, ConfigError};
pub use start_error::{Door, StartError};
