//! The log as its users see it: what is acknowledged is there, what is cut stays away, and damage
//! is told from a torn tail.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking, its helpers too"
)]

mod basics;
mod clean;
mod crash;
mod damage;
mod golden;
mod stretch;
mod support;
