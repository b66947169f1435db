//! End to end: the client crate against an embedded broker, over real QUIC.

mod common;
mod dead_letters;
mod leases;
mod queue_mode;
mod schedule;
mod worker;
