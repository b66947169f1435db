//! The Millpond broker: QUIC sessions, the shard, HTTP, configuration.
