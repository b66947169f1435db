//! The parts of the folded state, each with its own invariants. None of them decides anything that
//! concerns another: that is `apply`'s.

pub mod dead_letter;
pub mod dedup;
pub mod delays;
pub mod dirty;
mod invariants;
pub mod lease;
pub mod offset_set;
pub mod redelivery;
pub mod redrive;
pub mod session;
pub mod snapshot;
pub mod subscription;
pub mod token;
pub mod topic;
