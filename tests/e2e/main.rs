//! End to end: the client crate against an embedded broker, over real QUIC.

mod common;
mod dead_letters;
mod leases;
mod producers;
mod queue_mode;
mod restart;
mod schedule;
mod stream_mode;
mod worker;
