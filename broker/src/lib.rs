//! The Millpond broker: QUIC sessions, the shard, HTTP, configuration.

pub mod config;
mod start_error;

pub use config::{Config, ConfigError};
pub use start_error::{Door, StartError};
