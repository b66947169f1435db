//! End to end: the client crate against an embedded broker, over real QUIC.

#![allow(clippy::unwrap_used, reason = "a helper's failure is its test's")]

mod attack;
mod common;
mod crowd;
mod damaged;
mod dead_letters;
mod health;
mod hostile;
mod leases;
mod limits;
mod producers;
mod queue_mode;
mod raw;
mod replay;
mod restart;
mod schedule;
mod start;
mod stream_mode;
mod tokens;
mod worker;
