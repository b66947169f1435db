//! End to end: the client crate against an embedded broker, over real QUIC.

mod common;
mod queue_mode;
